"""TRL's side of `launch.benchmark`: GRPOTrainer with transformers' generate, in PyTorch on the CPU.

    python -m launch.peers.trl JOB RESULT

Runs in a Python of its own, which needs nothing of ours. Written for trl 1.16 with transformers 5.23 and torch 2.13:
generation and log-probs alone are reached through methods with a leading underscore, there being no public ones.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from launch.peers import workload


class Laps(TrainerCallback):
    """Ends a repetition when the trainer ends a step."""

    def __init__(self, watch: workload.Stopwatch):
        self.watch = watch

    def on_step_end(self, args, state, control, **kwargs):
        self.watch.lap()


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    special = {"<pad>": workload.PAD, "<eos>": workload.EOS, "<bos>": workload.BOS, "<unk>": workload.UNKNOWN}
    vocabulary = special | {f"w{i}": i for i in range(workload.FIRST_WORD, vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def model(job: workload.Job):
    """Random parameters; where a reference is needed, the folder that TRL reads it from."""
    torch.manual_seed(0)
    size = job.model
    config = Qwen3Config(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        tie_word_embeddings=True,
        rms_norm_eps=workload.NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": workload.ROPE_THETA},
        max_position_embeddings=4096,
        pad_token_id=workload.PAD,
        eos_token_id=workload.EOS,
        bos_token_id=workload.BOS,
    )
    network = Qwen3ForCausalLM(config)
    if not job.kl_coef:
        return network
    network.save_pretrained(job.folder)
    return job.folder


def trainer(job: workload.Job) -> GRPOTrainer:
    """Same loss, optimizer and precision as ours; recomputation and bfloat16, which TRL would turn on, are off."""
    config = GRPOConfig(
        output_dir=str(Path(job.folder) / "trainer"),
        per_device_train_batch_size=job.rows,
        num_generations=job.group_size,
        max_completion_length=job.completion_tokens,
        beta=job.kl_coef,
        epsilon=workload.CLIP_RATIO,
        loss_type="grpo",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        learning_rate=workload.LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=workload.CLIP_NORM,
        max_steps=job.warmup + job.repetitions,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    prompts = [workload.text(tokens) for tokens in workload.prompts(job)]
    made = GRPOTrainer(
        model=model(job),
        reward_funcs=lambda prompts, completions, **kwargs: [workload.reward(text) for text in completions],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(job.model.vocab_size),
    )
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}
    return made


def rows(job: workload.Job) -> dict[str, torch.Tensor]:
    """Prompts, completions and advantages as TRL's trainer holds them after scoring."""
    prompts, completions = torch.tensor(workload.grouped_prompts(job)), torch.tensor(workload.completions(job))
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": torch.tensor(workload.advantages(job)),
        "num_items_in_batch": torch.tensor(completions.numel()),
    }


def generate(job: workload.Job) -> workload.Stopwatch:
    made, prompts = trainer(job), workload.grouped_prompts(job)
    watch = workload.Stopwatch(job)
    for _ in watch.repetitions():
        completions = made._generate_single_turn(prompts, None, {}, job.group_size)[0]
        made.processing_class.batch_decode(completions, skip_special_tokens=True)
    return watch


def step(job: workload.Job, *, given_rows: bool = False) -> workload.Stopwatch:
    """The trainer's own loop; given_rows: without sampling and scoring."""
    made = trainer(job)
    if given_rows:
        batch = rows(job)
        made._generate_and_score_completions = lambda inputs: dict(batch)
    watch = workload.Stopwatch(job)
    made.add_callback(Laps(watch))
    made.train()
    return watch


def logprobs(job: workload.Job, *, backward: bool = False) -> workload.Stopwatch:
    made, batch = trainer(job), rows(job)
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    watch = workload.Stopwatch(job)
    for _ in watch.repetitions():
        with torch.set_grad_enabled(backward):
            stats = made._get_per_token_logps_and_entropies(
                made.model, tokens, torch.ones_like(tokens), job.completion_tokens, compute_entropy=True
            )
        if backward:
            stats[0].mean().backward()
            made.model.zero_grad(set_to_none=True)
    return watch


CASES: dict[str, Callable[..., workload.Stopwatch]] = {
    "generate": generate,
    "train": functools.partial(step, given_rows=True),
    "step": step,
    "startup": step,
    "logprobs": logprobs,
    "logprobs_backward": functools.partial(logprobs, backward=True),
}

if __name__ == "__main__":
    workload.main(CASES, ("trl", "torch", "transformers"))
