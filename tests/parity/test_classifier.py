"""Our reward models against transformers' own: tiny, random, saved by transformers, scored in float32.

Qwen2ForRewardModel and Qwen2ForProcessRewardModel live in code beside their checkpoints; here they are written down
after the published layout: model, then score = Linear, ReLU, Linear.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tapojax.judges import reward_model
from tapojax.models import config_json, huggingface
from tests.parity.test_transformers import LLAMA3, SIZES, rope
from tests.tasks.test_files import save_tokenizer

torch = pytest.importorskip("torch", reason="parity tests need the [parity] extra: pip install '.[parity]'")
transformers = pytest.importorskip("transformers", reason="parity tests need the [parity] extra")

FAMILIES = {
    "Qwen2": rope(1e6),
    "Qwen3": {"head_dim": 16, **rope(1e6)},
    "Llama": {"attention_bias": True, **rope(5e5, **LLAMA3)},
}
SEPARATOR, PAD = "<extra_0>", 0
PROBLEMS = ["1+1+1?", "How many apples are left?", "x"]
SOLUTIONS = [["1+1 = 2", "2+1 = 3", "so \\boxed{3}."], ["Seven."], ["a", "b", "c", "d", "e"]]
ROWS = [np.random.default_rng(length).integers(1, 400, length).tolist() for length in (90, 3, 64, 65, 17)]


def config_of(family, **keys):
    return getattr(transformers, f"{family}Config")(**SIZES | {"vocab_size": 400}, **FAMILIES[family], **keys)


def two_layers(kind, labels):
    class TwoLayers(transformers.Qwen2PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.model, width = transformers.Qwen2Model(config), config.hidden_size
            self.score = torch.nn.Sequential(
                torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, labels)
            )

        def forward(self, input_ids):
            return self.score(self.model(input_ids).last_hidden_state)

    TwoLayers.__name__ = f"Qwen2{kind}"
    return TwoLayers(config_of("Qwen2", attn_implementation="eager"))


def made(family, kind, labels):
    torch.manual_seed(0)
    if kind in ("ForRewardModel", "ForProcessRewardModel"):
        model = two_layers(kind, labels)
    else:
        config = config_of(family, num_labels=labels, pad_token_id=PAD, attn_implementation="eager")
        model = getattr(transformers, family + kind)(config)
    model = model.float().eval()
    with torch.no_grad():
        for path, x in model.named_parameters():
            x.copy_(1 + 0.3 * torch.randn_like(x) if "norm" in path else 0.2 * torch.randn_like(x))
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    save_tokenizer(folder, extra_special_tokens=[SEPARATOR])
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"architectures": [type(model).__name__]}
    raw |= {"vocab_size": 400}
    (folder / "config.json").write_text(json.dumps(raw))
    return str(folder)


def ours_of(folder, rows):
    return reward_model.label_logits(config_json.read_classifier(folder), folder, max_tokens=128, batch_tokens=128)(
        rows
    )


@pytest.mark.parametrize(
    ("family", "kind", "labels"),
    [
        ("Qwen2", "ForTokenClassification", 2),
        ("Qwen3", "ForTokenClassification", 3),
        ("Llama", "ForTokenClassification", 2),
        ("Qwen2", "ForProcessRewardModel", 2),
        ("Qwen2", "ForRewardModel", 1),
    ],
)
def test_every_tokens_logits_agree(family, kind, labels, tmp_path):
    model = made(family, kind, labels)
    ours = ours_of(saved(model, tmp_path), ROWS)
    for row, got in zip(ROWS, ours, strict=True):
        with torch.no_grad():
            said = model(torch.tensor([row]))
        theirs = (said if isinstance(said, torch.Tensor) else said.logits)[0].numpy()
        assert theirs.std() > 0.1
        np.testing.assert_allclose(got, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("labels", [1, 2])
def test_outcome_scores_are_those_of_a_padded_batch(family, labels, tmp_path):
    """transformers pools the last token that is not padding, also where padding ends the conversation itself."""
    model = made(family, "ForSequenceClassification", labels)
    folder = saved(model, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["".join(solution) for solution in SOLUTIONS]
    rows = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}, {"role": "assistant", "content": t}])[
            "input_ids"
        ]
        for p, t in zip(PROBLEMS, texts, strict=True)
    ]
    for pad in (PAD, rows[0][-1]):
        model.config.pad_token_id = pad
        raw = json.loads((tmp_path / "config.json").read_text()) | {"pad_token_id": pad}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        width = max(map(len, rows))
        padded = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        with torch.no_grad():
            logits = model(padded).logits
        want = (logits[:, 0] if labels == 1 else torch.softmax(logits, -1)[:, 1]).numpy()
        got = reward_model.load(folder, max_tokens=256, batch_tokens=256).read(PROBLEMS, [[text] for text in texts])
        assert got.errors == [None] * 3
        np.testing.assert_allclose(np.concatenate(got.scores), want, atol=1e-5, rtol=1e-5)


def test_process_scores_are_those_of_the_published_procedure(tmp_path):
    """One text with all separators through the chat template; softmax at the positions that hold the separator."""
    model = made("Qwen2", "ForProcessRewardModel", 2)
    folder = saved(model, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    got = reward_model.load(folder, max_tokens=256, batch_tokens=256, system="Be strict.").read(PROBLEMS, SOLUTIONS)
    for problem, solution, scores in zip(PROBLEMS, SOLUTIONS, got.scores, strict=True):
        said = "".join(step + SEPARATOR for step in solution)
        turns = zip(("system", "user", "assistant"), ("Be strict.", problem, said), strict=True)
        text = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
        tokens = torch.tensor(tokenizer.encode(text))
        with torch.no_grad():
            probabilities = torch.softmax(model(tokens[None])[0], -1)
        want = probabilities[tokens == tokenizer.convert_tokens_to_ids(SEPARATOR), 1].numpy()
        assert len(want) == len(solution)
        np.testing.assert_allclose(scores, want, atol=1e-5, rtol=1e-5)


def test_a_head_of_the_language_model_is_left_aside(tmp_path):
    """Published Qwen2.5-Math-PRM checkpoints kept theirs; nothing else may be left over."""
    model = made("Qwen2", "ForProcessRewardModel", 2)
    before = ours_of(saved(model, tmp_path), ROWS)
    tensors = load_file(tmp_path / "model.safetensors")
    head = {"lm_head.weight": np.ones((400, SIZES["hidden_size"]), np.float32)}
    save_file(tensors | head, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for got, want in zip(ours_of(tmp_path, ROWS), before, strict=True):
        np.testing.assert_array_equal(got, want)
    save_file(tensors | {"v_head.weight": head["lm_head.weight"]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected: v_head.weight"):
        ours_of(tmp_path, ROWS)


@pytest.mark.parametrize("kind", ["ForSequenceClassification", "ForTokenClassification"])
def test_what_we_write_transformers_reads(kind, tmp_path):
    model = made("Qwen3", kind, 3)
    model.save_pretrained(tmp_path / "theirs")
    config = config_json.read_classifier(tmp_path / "theirs")
    params = huggingface.load_params(tmp_path / "theirs", config)
    huggingface.save_params(tmp_path / "ours", params, config)
    back, info = getattr(transformers, f"AutoModel{kind}").from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for path, x in back.state_dict().items():
        assert torch.equal(x, model.state_dict()[path]), path
