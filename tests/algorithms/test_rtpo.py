"""RTPO: hints shrink by the schedule, only the prompt sees them, and nothing is compiled twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapojax import evaluation, policy, train_step
from tapojax.algorithms.rtpo import rtpo
from tapojax.models import decoder
from tapojax.models.config import DecoderConfig
from tapojax.rollout import collect, local
from tapojax.tasks.arithmetic import arithmetic
from tapojax.types import Engine, Prompts, Sampling, TokenStats
from tests.algorithms import checks

TASK = arithmetic(seed=0, max_prompt_tokens=32)
HINT = "7+6+0=13,5+8+1=14"  # 17 tokens, of 57+86?
EXAMPLE = {"id": "a", "problem": "57+86?", "answer": "143", "solution": HINT + "#143"}


def make(task=TASK, steps=10, **knobs):
    return rtpo(group_size=4, max_tokens=24, steps=steps, task=task, **knobs)


def plain(*examples, task=TASK) -> Prompts:
    return Prompts(examples, [task.prompt(example) for example in examples])


def texts(algorithm, step, *examples):
    prompts = algorithm.prompts(plain(*(examples or (EXAMPLE,))), step)
    return [TASK.tokenizer.decode(tokens, skip_special_tokens=False) for tokens in prompts.tokens]


# ---- the hint


@pytest.mark.parametrize(
    ("step", "kept"), [(0, 17), (1, 14), (2, 12), (4, 8), (7, 2), (8, 0), (9, 0)], ids=lambda x: str(x)
)
def test_the_hint_opens_the_completion_and_loses_tokens_from_its_end(step, kept):
    """floor(f 17) tokens with f = 1 - step / 8: the horizon is .8 of 10 steps."""
    assert texts(make(), step) == ["57+86?" + HINT[:kept]]


def test_each_prompt_has_its_own_hint():
    other = TASK.train[0]
    steps = other["solution"].partition("#")[0]
    assert texts(make(), 0, EXAMPLE, other) == ["57+86?" + HINT, other["problem"] + steps]


def test_the_whole_hint_does_not_give_the_answer_away():
    assert "#" not in texts(make(schedule="constant", value=1.0), 0)[0]


def test_a_closed_turn_ends_the_hint_and_is_gone_with_it():
    algorithm = make(closed_turn=True)
    assert texts(algorithm, 4) == ["57+86?" + HINT[:8] + "<eos>"]
    assert texts(algorithm, 8) == ["57+86?"], "no empty turn is left behind"


def test_hints_are_cut_between_characters():
    """A token of half a character would be read as another text than the one that was meant."""

    class Bytes:
        eos_token_id = pad_token_id = 0

        def encode(self, text, *, add_special_tokens=True):
            return list(text.encode())

        def decode(self, tokens, skip_special_tokens=True):
            return bytes(tokens).decode(errors="replace")

    task = TASK._replace(tokenizer=Bytes(), solution=lambda example: ("aé€", "#1"))
    prompts = plain(EXAMPLE, task=TASK)
    kept = []
    for value in (1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0):
        hinted = make(task, schedule="constant", value=value).prompts(prompts, 0)
        kept.append(bytes(hinted.tokens[0][len(prompts.tokens[0]) :]).decode())
    assert kept == ["a", "a", "aé", "aé", "aé", "aé€"]


def test_special_tokens_of_the_tokenizer_are_not_part_of_a_hint():
    class WithBos:
        eos_token_id = pad_token_id = 1

        def encode(self, text, *, add_special_tokens=True):
            return [49] * add_special_tokens + TASK.tokenizer.encode(text)

        def decode(self, tokens, skip_special_tokens=True):
            return TASK.tokenizer.decode(tokens)

    assert make(TASK._replace(tokenizer=WithBos())).prompts(plain(EXAMPLE), 0).tokens == [
        TASK.tokenizer.encode("57+86?" + HINT)
    ]


def test_a_schedule_may_go_up_instead():
    algorithm = make(direction="up")
    assert texts(algorithm, 0) == ["57+86?"] and texts(algorithm, 8) == ["57+86?" + HINT]


def test_its_share_is_logged():
    assert make().diagnostics(None, {}, None, 4) == {"hint_fraction": 0.5}


# ---- what cannot be


def test_a_task_without_solutions_is_refused():
    with pytest.raises(ValueError, match="no worked solutions to cut hints from"):
        make(TASK._replace(solution=None))


def test_an_example_without_solution_is_named():
    task = TASK._replace(solution=lambda example: None)
    with pytest.raises(ValueError, match="'a' has no worked solution: set task.solution_key"):
        make(task).prompts(plain(EXAMPLE), 0)
    assert make(task).prompts(plain(EXAMPLE), 8) == plain(EXAMPLE), "when hints are over, none is asked for"


def test_a_closed_turn_needs_a_task_with_turns():
    with pytest.raises(ValueError, match="set task.chat=True, or closed_turn=False"):
        make(TASK._replace(closed_hint=None), closed_turn=True)


def test_a_horizon_of_no_steps_is_refused():
    """The published trainer divides by max_steps = -1 and is without hints from step 1 on."""
    for knobs in ({"anneal": 0.0}, {"steps": -1}):
        with pytest.raises(ValueError, match="anneal horizon of -?0.[08] steps"):
            make(**knobs)


@pytest.mark.parametrize("knobs", [{"rate": 1.0}, {"schedule": "constant", "anneal": 0.5}])
def test_no_knob_is_inert(knobs):
    with pytest.raises(ValueError, match=f"{list(knobs)[-1]}=.* is not read by the (linear|constant) schedule"):
        make(**knobs)


def test_a_hint_beyond_the_budget_names_the_prompt_and_the_fix():
    prompts = make().prompts(plain(EXAMPLE), 0)
    with pytest.raises(ValueError, match=r"'a' has 23 tokens.*raise sampling.max_prompt_tokens \(a hint counts too\)"):
        local.pad_prompts(prompts, 22, 0)


# ---- a real policy

MODEL = DecoderConfig(51, 32, 48, 2, 4, 2, 8, initializer_range=0.3)
PARAMS = decoder.init(MODEL, jax.random.key(0))
SAMPLING = Sampling(8, stop_token_ids=(1,))


ENGINE = local.local_engine(MODEL, max_prompt_tokens=32)


def collected(algorithm, step, engine=ENGINE):
    """The rollout batch of a step: a group each of EXAMPLE and of a problem of the task."""
    key, weights = jax.random.key(step), engine.load(PARAMS, 0)
    batches = iter([[EXAMPLE, TASK.train[0]]])
    return collect.collect(engine, weights, batches, TASK, algorithm, SAMPLING, step=step, key=key)


def test_nothing_is_compiled_again_while_hints_shrink():
    algorithm = make(anneal=1.0)
    score = jax.jit(policy.make_score(MODEL, max_scored=SAMPLING.max_tokens))
    make_batch = jax.jit(functools.partial(train_step.make_batch, algorithm))
    lengths, compiled = [], []
    for step in range(11):
        part = collected(algorithm, step)
        rollout = jax.tree.map(jnp.asarray, part.rollout)
        stats = score(PARAMS, rollout.tokens, rollout.mask)
        make_batch(rollout, dict(part.scores), step, old_stats=stats, ref_logprobs=None)
        lengths.append(int(rollout.prompt_lengths[0]))
        compiled.append((local.sample._cache_size(), score._cache_size(), make_batch._cache_size()))
    assert lengths == [6 + kept for kept in (17, 15, 13, 11, 10, 8, 6, 5, 3, 1, 0)], "the hints did shrink"
    assert set(compiled) == {compiled[0]}, "sampler, score and batch were compiled once"


def test_hint_tokens_are_prompt_tokens():
    """They are outside mask, length and text, and shared by the group."""
    part = collected(make(schedule="constant", value=0.5), 0)
    rollout, hint = part.rollout, TASK.tokenizer.encode(HINT[:8])
    for row in range(4):
        assert rollout.tokens[row, :14].tolist() == TASK.tokenizer.encode("57+86?") + hint
        assert rollout.prompt_lengths[row] == 14 and not rollout.mask[row, :14].any() and rollout.mask[row, 14]
    assert (rollout.mask.sum(axis=1) <= SAMPLING.max_tokens).all()
    assert not any(text.startswith(HINT[:8]) for text in part.completions), "the reward reads the completion only"


def test_the_loss_has_no_gradient_at_hint_tokens():
    """A policy with logits of its own at each position: those of prompt and hint get exactly 0, the others do not."""
    algorithm = make(schedule="constant", value=0.5)
    part = collected(algorithm, 0)
    rollout = jax.tree.map(jnp.asarray, part.rollout)

    def score(logits, tokens, mask):
        """Of all tokens, also outside the mask: whatever keeps hints out of the loss is not the policy."""
        del mask
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
        return TokenStats(chosen, jnp.zeros(tokens.shape))

    logits = jax.random.normal(jax.random.key(0), (*rollout.tokens.shape, 51))
    scores = {"correct": jnp.tile(jnp.array([1.0, 0.0]), 4)}
    batch = train_step.make_batch(algorithm, rollout, scores, 0, old_stats=None, ref_logprobs=None)
    step = jax.jit(train_step.make_train_step(score, algorithm, checks.OPTIMIZER))
    after, _ = step(train_step.init_state(algorithm, checks.OPTIMIZER, logits), batch)
    moved = np.asarray(jnp.any(after.params != logits, axis=-1))
    np.testing.assert_array_equal(moved, part.rollout.mask)


def test_evaluation_gives_no_hint():
    seen = []

    def generate(weights, prompts, key, **kwargs):
        seen.append([TASK.tokenizer.decode(tokens) for tokens in prompts.tokens])
        return ENGINE.generate(weights, prompts, key, **kwargs)

    spied, key = Engine(ENGINE.load, generate), jax.random.key(0)
    collected(make(), 0, spied)
    evaluation.evaluate(spied, ENGINE.load(PARAMS, 0), TASK, [EXAMPLE], SAMPLING, key, samples=4, batch_prompts=2)
    assert seen[0][0] == "57+86?" + HINT and seen[1] == ["57+86?"] * 2
