"""The data that flows through tapojax, and the three values a user composes: `Algorithm`, `Engine`, `Task`.

Shape legend
  P  prompts in a rollout batch            G  group_size, completions per prompt
  B  rows, B = P * G, a group's rows adjacent
  T  row length in tokens                  R  completion budget in tokens
  V  vocabulary size                       D  width of the residual stream

One row is prompt, completion, right padding. Every [B, T] array aligns with `tokens`:
`logprobs[b, t] = log p(tokens[b, t] | tokens[b, :t])`. `mask` is True exactly at completion tokens, EOS included; it
comes from the sampler and never from a token's value. Entries outside the mask are 0.

A score or reward that does not exist (a judge failed, a verifier was killed) is NaN, never 0: it poisons whatever
forgets to look, and the rows it belongs to are masked.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int

Array = Any  # numpy on the host, jax inside jit
Params = Any  # a nested dict of arrays
Example = Mapping[str, Any]  # one problem: at least id, problem, answer
Scores = Mapping[str, Float[Array, "B"]]  # channel name -> one score a row, NaN where there is none


class Prompts(NamedTuple):
    """P prompts, ragged, on the host."""

    examples: Sequence[Example]
    tokens: Sequence[Sequence[int]]


class Rollout(NamedTuple):
    """B sampled rows.

    Old log-probs are not here: they come from `score` under the policy that was loaded, because a sampler's numbers
    (behaviour_logprobs) differ from the trainer's by its kernels, its precision and its sampling filters.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    behaviour_logprobs: Float[Array, "B T"]  # under the distribution really sampled from
    base_logprobs: Float[Array, "B T"]  # of the same tokens at temperature 1, unfiltered
    prompt_lengths: Int[Array, "B"]
    truncated: Bool[Array, "B"]  # the budget ended before a stop token came
    source: Int[Array, "B"]  # provenance: 0 sampled from the policy, others are an algorithm's injections
    # of the weights that each completion token was sampled by, -1 outside; None: those the engine had loaded
    versions: Int[Array, "B T"] | None = None


class TokenStats(NamedTuple):
    """What the mathematics may know of a model: the output of `score`, zeros outside the mask."""

    logprobs: Float[Array, "B T"]
    entropies: Float[Array, "B T"]


class Batch(NamedTuple):
    """Rows ready for the train step; all constants of the loss."""

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    advantages: Float[Array, "B T"]
    behaviour_logprobs: Float[Array, "B T"]
    # None where the batch serves one update only: then they are the train step's own log-probs, gradient stopped
    old_logprobs: Float[Array, "B T"] | None
    ref_logprobs: Float[Array, "B T"] | None  # None unless the algorithm needs a reference
    # of the train/rollout mismatch: truncated ratios, 0 where rejected; None where uncorrected
    importance: Float[Array, "B T"] | None
    signals: Mapping[str, Float[Array, "B T"]]
    source: Int[Array, "B"] | None = None  # as in Rollout; None: nothing was sampled


class TrainState(NamedTuple):
    """All that decides the next update, in one checkpointed pytree. Randomness is derived from (seed, step)."""

    step: Int[Array, ""]  # optimizer updates so far
    params: Params
    opt_state: Any
    carry: Any  # the algorithm's own small pytree


def _correct(scores, rollout, step):
    del rollout, step
    return scores["correct"]


class Algorithm(NamedTuple):
    """An algorithm is a value: pure functions in data-flow order. Unset slots do what GRPO does.

    Slots marked (host) take and give host data; the others are traced by jit.
    """

    group_size: int
    # [B] rewards -> [B, T] advantages
    advantages: Callable[[Any, Scores, Rollout], Any]
    # -> per-token loss, to be minimised, and named per-token diagnostics, all [B, T]
    loss: Callable[[TokenStats, Batch], tuple[Any, Mapping[str, Any]]]
    # [B, T] aggregation weights of the whole minibatch: loss = sum(weights * per_token)
    weights: Callable[[Any], Any]
    # score channels that must exist; a missing one stops the run
    needs: frozenset[str] = frozenset({"correct"})
    # True when the loss reads ref_logprobs
    needs_reference: bool = False
    # (host) change the prompts before sampling: (prompts, step) -> prompts
    prompts: Callable[[Prompts, int], Prompts] | None = None
    # temperature [B] of each row at one decode step, from unscaled logits [B, V]: (logits, carry) -> temperatures
    temperature: Callable[[Any, Any], Any] | None = None
    # (host) replace rows after scoring, add score channels: (rollout, scores, prompts, key, memory, score) -> the first
    # two and the new memory; `score(tokens, mask) -> TokenStats` is the policy that sampled the rows
    inject: Callable[..., tuple[Rollout, Scores, Any]] | None = None
    # what inject remembers from batch to batch: a plain JSON value, checkpointed
    memory: Any = None
    # one reward a row, NaN where there is none: (scores, rollout, step) -> [B]
    rewards: Callable[[Scores, Rollout, Any], Any] = _correct
    # (host) which of the P groups to keep, the others are sampled anew: (rewards, scores) -> [P]
    keep: Callable[[Any, Scores], Any] | None = None
    # named [B, T] arrays made once per rollout batch: (old_stats, rollout) -> signals
    signals: Callable[[Any, Rollout], Mapping[str, Any]] | None = None
    # a small pytree that lives in TrainState, and how a rollout batch changes it: (carry, old_stats, rollout) -> carry
    carry: Any = ()
    update_carry: Callable[[Any, Any, Rollout], Any] | None = None
    # (host) numbers of its own for the log of each step: (rewards, scores, rollout, step) -> name to number
    diagnostics: Callable[[Any, Scores, Rollout, int], Mapping[str, float]] | None = None


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions are drawn. temperature = 0 takes the most likely token; top_k = 0 and top_p = 1 keep all."""

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.max_tokens < 1:
            raise ValueError(f"{self}: need temperature >= 0, 0 < top_p <= 1, top_k >= 0 and max_tokens >= 1")


class Engine(NamedTuple):
    """Where completions come from. `generate` takes as weights what `load` hands out: both are functions."""

    # (params, version) -> weights of their own, which stay when params are given away; called by the thread that
    # trains, also while generate runs in another one, which goes on with the weights it has
    load: Callable[[Params, int], Any]
    # (weights, prompts, key, *, group_size, sampling, temperature, carry, finished) -> rollout; where it is given,
    # `finished(row, tokens)` is called once for each row as soon as its completion is known, by any thread, and returns
    # at once; what it raises ends generation and is raised by generate
    generate: Callable[..., Rollout]
    # the same where the completions come scored: -> (rollout, scores by channel, error text or None by row)
    generate_scored: Callable[..., tuple[Rollout, Scores, Sequence[str | None]]] | None = None
    score_channels: Sequence[str] = ()  # that it gives
    # (params, version) -> weights, while generate runs elsewhere: its remaining tokens come from the new weights
    update: Callable[[Params, int], Any] | None = None
    close: Callable[[], None] = lambda: None  # lets go of connections


@runtime_checkable
class Examples(Protocol):
    """Random access to problems; a list is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class Tokenizer(Protocol):
    """What of a Hugging Face tokenizer is used; the gym's own has the same."""

    @property
    def eos_token_id(self) -> int: ...

    @property
    def pad_token_id(self) -> int: ...

    def __len__(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...


class Perturbed(NamedTuple):
    """A completion whose answer was exchanged for a wrong one; begin and end count completion tokens.

    Tokens before `begin` are those of the original, tokens in [begin, end) write the new answer, the rest closes the
    completion, end of sequence included.
    """

    tokens: Sequence[int]
    begin: int
    end: int


class Task(NamedTuple):
    """Problems, how they become prompts, and how completions are scored."""

    tokenizer: Tokenizer
    train: Examples
    evaluation: Examples
    prompt: Callable[[Example], list[int]]  # the tokens the policy continues
    # (examples, completions as text) -> (scores by channel, error text or None by row)
    score: Callable[[Sequence[Example], Sequence[str]], tuple[Scores, Sequence[str | None]]]
    answer: Callable[[str], str | None]  # what a completion answers, for majority votes
    # a completion to imitate in the supervised warm start, given a numpy Generator; None where the task has none
    demonstration: Callable[[Example, Any], str] | None = None
    # the reference solution as (reasoning, closing with the answer), together a right completion; None without one
    solution: Callable[[Example], tuple[str, str] | None] | None = None
    # completions of a stronger model, which may be wrong
    teacher: Callable[[Example], Sequence[str]] | None = None
    # a completion's tokens with another, wrong answer: (example, tokens, answers to try first, numpy Generator)
    perturb: Callable[[Example, Sequence[int], Sequence[str], Any], Perturbed | None] | None = None
    # the prompt with a hint's tokens as a finished turn of the assistant, where the next turn begins (RTPO's option)
    closed_hint: Callable[[Example, Sequence[int]], list[int]] | None = None
    warm_start: Examples | None = None  # problems of the supervised warm start; None: those of train
