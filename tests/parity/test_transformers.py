"""Our decoder against transformers' own models: tiny, random, saved by transformers, logits compared in float32.

Needs torch, which the trainer itself never imports.
"""

import json

import jax
import numpy as np
import pytest

from tapojax.models import config_json, decoder, huggingface

torch = pytest.importorskip("torch", reason="parity tests need the [parity] extra: pip install '.[parity]'")
transformers = pytest.importorskip("transformers", reason="parity tests need the [parity] extra")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped queries everywhere
    "max_position_embeddings": 512,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}


def rope(theta, **more):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


MODELS = {
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True, **rope(1e6)}),
    "qwen2 untied": ("Qwen2", {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, **rope(1e4)}),
    "qwen3 tied": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 16, **rope(1e6)}),
    "qwen3 untied": ("Qwen3", {"tie_word_embeddings": False, "head_dim": 16, **rope(1e6)}),
    "qwen3 attention_bias": ("Qwen3", {"attention_bias": True, "head_dim": 8, **rope(1e6)}),
    "llama": ("Llama", {**rope(1e4)}),
    "llama head_dim": ("Llama", {"head_dim": 12, **rope(1e4)}),
    "llama3 rope": ("Llama", {"tie_word_embeddings": True, **rope(5e5, **LLAMA3)}),
    "llama attention_bias mlp_bias": ("Llama", {"attention_bias": True, "mlp_bias": True, **rope(1e4)}),
}
TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 80))


def make_model(name):
    """Norms and biases are drawn too: at one and zero a forgotten one would not show."""
    family, keys = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **keys)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for path, x in model.named_parameters():
            if "norm" in path:
                x.copy_(1 + 0.3 * torch.randn_like(x))
            else:
                x.copy_(0.2 * torch.randn_like(x))
    return model


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def our_logits(folder):
    config = config_json.read_config(folder)
    params = jax.device_put(huggingface.load_params(folder, config))

    @jax.jit
    def logits(params, tokens):
        return decoder.hidden_states(config, params, tokens) @ decoder.head(params)

    return np.asarray(logits(params, jax.numpy.asarray(TOKENS)))


def rewrite_rope_as_transformers_4_did(folder):
    raw = json.loads((folder / "config.json").read_text())
    parameters = raw.pop("rope_parameters")
    raw["rope_theta"] = parameters.pop("rope_theta")
    raw["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
    raw["torch_dtype"] = raw.pop("dtype")
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_both_ways(name, tmp_path):
    """transformers saves, we load; we save, transformers loads. Weights survive the circle bit for bit."""
    model = make_model(name)
    theirs = their_logits(model)
    assert theirs.std() > 0.1
    model.save_pretrained(tmp_path / "theirs")
    np.testing.assert_allclose(our_logits(tmp_path / "theirs"), theirs, atol=1e-4, rtol=0)

    config = config_json.read_config(tmp_path / "theirs")
    params = huggingface.load_params(tmp_path / "theirs", config)
    huggingface.save_params(tmp_path / "ours", params, config, eos_token_id=1)
    huggingface.save_params(tmp_path / "kept", params, config, source=tmp_path / "theirs")
    for export in ("ours", "kept"):
        back, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / export, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert type(back) is type(model)
        assert back.dtype == torch.float32
        np.testing.assert_array_equal(their_logits(back.eval()), theirs)
        want = model.state_dict()
        for path, x in back.state_dict().items():
            assert torch.equal(x, want[path]), f"{path} changed on its way through our params"


@pytest.mark.parametrize("name", ["qwen2 untied", "llama3 rope"])
def test_logits_agree_with_the_older_config_layout(name, tmp_path):
    model = make_model(name)
    model.save_pretrained(tmp_path)
    rewrite_rope_as_transformers_4_did(tmp_path)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    np.testing.assert_array_equal(their_logits(reloaded), their_logits(model))
    np.testing.assert_allclose(our_logits(tmp_path), their_logits(model), atol=1e-4, rtol=0)


def test_shards_written_by_transformers_are_read_and_ours_by_transformers(tmp_path):
    model = make_model("qwen2 untied")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    np.testing.assert_allclose(our_logits(tmp_path / "theirs"), their_logits(model), atol=1e-4, rtol=0)

    config = config_json.read_config(tmp_path / "theirs")
    params = huggingface.load_params(tmp_path / "theirs", config)
    huggingface.save_params(tmp_path / "ours", params, config, max_shard_bytes=20_000)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    np.testing.assert_array_equal(their_logits(back), their_logits(model))


def test_bfloat16_checkpoints_pass_without_a_lost_bit(tmp_path):
    model = make_model("qwen3 untied").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    config = config_json.read_config(tmp_path / "theirs")
    assert (config.dtype, config.param_dtype) == ("bfloat16", "float32")
    params = huggingface.load_params(tmp_path / "theirs", config, dtype="bfloat16")
    huggingface.save_params(tmp_path / "ours", params, config)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert back.dtype == torch.bfloat16
    for path, x in back.state_dict().items():
        assert torch.equal(x, model.state_dict()[path]), path
