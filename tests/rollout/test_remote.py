"""The remote engine against real gRPC servers: exact, whole groups, nothing lost or doubled, no wrong weights."""

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapojax import entropy, policy, weight_sync
from tapojax.models import decoder
from tapojax.models.config import DecoderConfig
from tapojax.rollout import delivery, local, remote, sampler
from tapojax.rollout.jax_sampler import jax_sampler
from tapojax.rpc import security
from tapojax.types import Prompts, Sampling
from tests.rollout.servers import LIMITS, Fake, expected_tokens, fake_sampler, serving_all, wait_until

MODEL = DecoderConfig(24, 32, 48, 2, 4, 2, 8, qkv_bias=True, tie_embeddings=True, initializer_range=0.4)
SHAPES = weight_sync.shapes(MODEL)
SAMPLING = Sampling(8, stop_token_ids=(1,))
PROMPTS = Prompts([{"id": str(i)} for i in range(6)], [[5 + i, 9, 3][: 1 + i % 3] for i in range(6)])
GROUP_SIZE = 3
KEY = jax.random.key(7)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def params():
    return decoder.init(MODEL, jax.random.key(0))


def moved(params, seed):
    return jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(seed), x.shape), params)


def score(params, tokens, mask):
    return policy.make_score(MODEL, max_scored=delivery.PROBE_TOKENS)(params, tokens, mask).logprobs


@contextlib.contextmanager
def engine_of(servers, in_flight=False, **options):
    options = remote.Options(**{"weights_dtype": "float32", "probe_tolerance": 1e-4, "deadline_s": 20.0} | options)
    addresses = [server.address for server in servers]
    engine = remote.remote_engine(
        addresses, MODEL, max_prompt_tokens=4, probe=score, options=options, in_flight=in_flight, limits=LIMITS
    )
    try:
        yield engine
    finally:
        engine.close()


def generate(engine, weights, **kwargs):
    return engine.generate(weights, PROMPTS, KEY, **{"group_size": GROUP_SIZE, "sampling": SAMPLING} | kwargs)


def fakes(count, **kwargs):
    made = [Fake(**kwargs) for _ in range(count)]
    return made, [fake_sampler(fake, SHAPES) for fake in made]


def check_rows(rollout, requests=1):
    """Every row is there once, and is the one that follows from its request."""
    size = len(PROMPTS.tokens) // requests
    for place in range(len(PROMPTS.tokens)):
        key = KEY if requests == 1 else jax.random.fold_in(KEY, place // size)
        words = np.asarray(jax.random.key_data(key)).tolist()
        for sample in range(GROUP_SIZE):
            row = place * GROUP_SIZE + sample
            tokens = rollout.tokens[row][rollout.mask[row]].tolist()
            assert tokens == expected_tokens(words, place, sample, SAMPLING.max_tokens)


# ---- exactness


@pytest.mark.parametrize(
    "sampling, adaptive",
    [(SAMPLING, False), (Sampling(8, temperature=0.7, top_k=5, stop_token_ids=(1,)), False), (SAMPLING, True)],
)
def test_a_jax_server_gives_the_rows_of_the_embedded_sampler_bit_for_bit(params, sampling, adaptive):
    extra = {}
    if adaptive:
        stats = entropy.EntropyStats(*(jnp.float32(x) for x in (0.1, 0.5, 0.7, 0.9)))
        extra = {"temperature": entropy.AdaptiveTemperature(1.0, 0.5), "carry": stats}
    here = local.local_engine(MODEL, max_prompt_tokens=4)
    want = generate(here, here.load(params, 3), sampling=sampling, **extra)
    served = jax_sampler(MODEL, max_prompt_tokens=4, max_tokens=8)
    with serving_all(served) as servers, engine_of(servers) as engine:
        got = generate(engine, engine.load(params, 3), sampling=sampling, **extra)
    for name in want._fields[:-1]:
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    np.testing.assert_array_equal(got.versions, np.where(got.mask, 3, -1), err_msg="versions")


def test_each_version_of_the_weights_samples_its_own_rows(params):
    here = local.local_engine(MODEL, max_prompt_tokens=4)
    served = jax_sampler(MODEL, max_prompt_tokens=4, max_tokens=8)
    with serving_all(served) as servers, engine_of(servers) as engine:
        for version, seed in enumerate((1, 2, 1)):
            changed = moved(params, seed)
            got = generate(engine, engine.load(changed, version))
            want = generate(here, here.load(changed, version))
            np.testing.assert_array_equal(got.behaviour_logprobs, want.behaviour_logprobs)


def test_a_batch_spreads_over_servers_and_comes_back_in_order(params):
    made, samplers = fakes(3, seconds=0.3)  # each is still at work when the next request is sent
    with serving_all(*samplers) as servers, engine_of(servers, probe_tolerance=float("inf")) as engine:
        rollout = generate(engine, engine.load(params, 0))
    check_rows(rollout, requests=3)
    assert sorted(index for fake in made for _, index in fake.asked) == list(range(6)), "each prompt once"
    assert all(fake.asked for fake in made), "every server had work"


def told_of(rows):
    """What generate's `finished` does, and a check that it was told of each row once."""

    def check(rollout):
        want = {row: rollout.tokens[row][mask].tolist() for row, mask in enumerate(rollout.mask)}
        assert len(rows) == len(want) and dict(rows) == want

    return (lambda row, tokens: rows.append((row, tokens))), check


def test_finished_groups_are_told_of_as_they_arrive(params):
    """The server keeps back its last group until the others were told of."""
    (fake,), samplers = fakes(1)
    rows = []
    finished, check = told_of(rows)

    async def before(index):
        while index == 5 and len(rows) < 5 * GROUP_SIZE:
            await asyncio.sleep(0.01)

    fake.on_group = before
    with serving_all(*samplers) as servers, engine_of(servers, probe_tolerance=float("inf")) as engine:
        rollout = generate(engine, engine.load(params, 0), finished=finished)
    check_rows(rollout)
    check(rollout)


def test_a_jax_server_hands_out_groups_while_it_samples(params, monkeypatch):
    """Its sampler keeps back the last news until the trainer was told of a group."""
    stream, first = local.stream, threading.Event()
    rows, news = [], []
    finished, check = told_of(rows)

    def late(*given, **how):
        *given, told = given

        def told_late(row, ended):
            news.append(row)
            assert len(news) < len(PROMPTS.tokens) * GROUP_SIZE or first.wait(30), "nothing was handed out"
            told(row, ended)

        return stream(*given, told_late, **how)

    def finished_first(row, tokens):
        first.set()
        finished(row, tokens)

    monkeypatch.setattr(local, "stream", late)
    served = jax_sampler(MODEL, max_prompt_tokens=4, max_tokens=8, stream_tokens=2)
    with serving_all(served) as servers, engine_of(servers) as engine:
        rollout = generate(engine, engine.load(params, 3), finished=finished_first)
    check(rollout)


def test_a_jax_server_stops_sampling_when_nobody_waits(params, monkeypatch):
    """And is free for the next request, with the same rows."""
    stream, ends, news = local.stream, [], []

    def watched(*given, **how):
        *given, told = given

        def told_late(row, ended):
            news.append(row)
            if len(news) == len(PROMPTS.tokens) * GROUP_SIZE:  # of the first request
                wait_until(lambda: any(work.task.cancelling() for work in servers[0].servicer.works.values()))
                time.sleep(0.5)  # until the server's loop has passed it on to the sampler
            told(row, ended)

        try:
            return stream(*given, told_late, **how)
        except InterruptedError:
            ends.append("stopped")
            raise

    def refuse(row, tokens):
        raise RuntimeError("too many errors")

    monkeypatch.setattr(local, "stream", watched)
    here = local.local_engine(MODEL, max_prompt_tokens=4)
    served = jax_sampler(MODEL, max_prompt_tokens=4, max_tokens=8, stream_tokens=1)
    with serving_all(served) as servers, engine_of(servers) as engine:
        weights = engine.load(params, 3)
        with pytest.raises(RuntimeError, match="too many errors"):
            generate(engine, weights, finished=refuse)
        got = generate(engine, weights)
    want = generate(here, here.load(params, 3))
    np.testing.assert_array_equal(got.behaviour_logprobs, want.behaviour_logprobs)
    assert ends == ["stopped"]


def test_rows_are_told_of_once_though_a_server_dies(params):
    made, samplers = fakes(2, seconds=0.05)
    rows, reached = [], threading.Event()
    finished, check = told_of(rows)

    async def at_third(index):
        reached.set() if index == 2 else None

    with serving_all(*samplers) as servers, engine_of(servers, probe_tolerance=float("inf")) as engine:
        weights = engine.load(params, 0)
        made[0].on_group = made[1].on_group = at_third
        killer = threading.Thread(target=lambda: (reached.wait(10), servers[0].kill()))
        killer.start()
        rollout = generate(engine, weights, finished=finished)
        killer.join()
    check_rows(rollout, requests=2)
    check(rollout)


def test_what_the_listener_raises_ends_generation_on_the_servers_too(params):
    (fake,), samplers = fakes(1, seconds=0.05)

    def refuse(row, tokens):
        raise RuntimeError("too many errors")

    with serving_all(*samplers) as servers, engine_of(servers, probe_tolerance=float("inf")) as engine:
        weights = engine.load(params, 0)
        with pytest.raises(RuntimeError, match="too many errors"):
            generate(engine, weights, finished=refuse)
        wait_until(lambda: all(work.done for work in servers[0].servicer.works.values()))
    assert len(fake.asked) < len(PROMPTS.tokens), "the rest was not sampled"


def test_a_temperature_of_its_own_cannot_be_sent(params):
    _, samplers = fakes(1)
    with serving_all(*samplers) as servers, engine_of(servers, probe_tolerance=float("inf")) as engine:
        weights = engine.load(params, 0)
        with pytest.raises(ValueError, match="only the embedded sampler"):
            generate(engine, weights, temperature=lambda logits, carry: carry)


# ---- faults


def test_a_server_killed_while_generating_loses_and_doubles_nothing(params):
    made, samplers = fakes(2)
    reached = threading.Event()

    async def at_third(index):
        reached.set() if index == 2 else None

    with serving_all(*samplers) as servers, engine_of(servers, probe_tolerance=float("inf")) as engine:
        weights = engine.load(params, 0)
        made[0].on_group = made[1].on_group = at_third
        made[0].seconds = made[1].seconds = 0.05
        killer = threading.Thread(target=lambda: (reached.wait(10), servers[0].kill()))
        killer.start()
        rollout = generate(engine, weights)
        killer.join()
    check_rows(rollout, requests=2)


def test_groups_that_arrived_are_not_asked_for_again(params):
    made, samplers = fakes(2)
    with serving_all(*samplers) as servers:
        with engine_of(servers, probe_tolerance=float("inf"), prompts_per_request=6) as engine:
            weights = engine.load(params, 0)

            stumbled = []

            async def stumble(index):
                if index == 3 and not stumbled:
                    stumbled.append(index)
                    raise RuntimeError("out of memory")

            made[0].on_group = made[1].on_group = stumble
            rollout = generate(engine, weights)
    check_rows(rollout)
    asked = sorted([index for _, index in fake.asked] for fake in made)
    assert asked == [[0, 1, 2], [3, 4, 5]], "the second server is asked only for what is missing"


def test_the_same_request_id_joins_the_work_that_runs(params):
    made, samplers = fakes(1, seconds=0.05)
    with serving_all(*samplers) as servers:
        with engine_of(servers, probe_tolerance=float("inf")) as engine:
            weights = engine.load(params, 0)
            thread = threading.Thread(target=generate, args=(engine, weights))
            thread.start()
            wait_until(lambda: made[0].asked)
            servicer = servers[0].servicer
            assert len(servicer.works) == 1
            thread.join()
    assert len(made[0].asked) == 6


def test_a_server_that_was_started_anew_gets_the_weights_before_it_samples(params):
    made, samplers = fakes(1)
    with serving_all(*samplers) as servers:
        with engine_of(servers, probe_tolerance=float("inf")) as engine:
            weights = engine.load(params, 5)
            servers[0].servicer.version = -1  # what a new process has
            check_rows(generate(engine, weights))
    assert len(made[0].loaded) == 1


def test_all_servers_down_is_an_error_that_names_them(params):
    _, samplers = fakes(1)
    with serving_all(*samplers) as servers, engine_of(servers, deadline_s=1.0, probe_tolerance=float("inf")) as engine:
        weights = engine.load(params, 0)
        servers[0].kill()
        with pytest.raises(ConnectionError, match=servers[0].address):
            generate(engine, weights)


def test_a_process_ends_while_its_requests_are_under_way():
    """Staleness: a run that stopped leaves the thread that samples ahead behind, and does not wait for its requests."""
    made, samplers = fakes(1, seconds=1000.0)
    with serving_all(*samplers) as (one,):
        program = (
            "import sys, threading, jax\nfrom types import SimpleNamespace\n"
            "from tests.rollout import test_remote as t\n"
            f"server = SimpleNamespace(address='{one.address}')\n"
            "with t.engine_of([server], probe_tolerance=float('inf'), deadline_s=1000.0) as engine:\n"
            "    weights = engine.load(t.decoder.init(t.MODEL, jax.random.key(0)), 0)\n"
            "    threading.Thread(target=t.generate, args=(engine, weights), daemon=True).start()\n"
            "    sys.stdin.read()"
        )
        child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE)
        wait_until(lambda: one.servicer.works, 120.0)
        child.stdin.close()
        assert child.wait(60) == 0, "it waited for its deadline"


def test_a_server_with_other_logprobs_stops_the_run(params):
    _, samplers = fakes(1)
    with serving_all(*samplers) as servers, engine_of(servers) as engine:
        with pytest.raises(ValueError, match="other weights or another architecture"):
            engine.load(params, 0)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda group: group[:-1], "a group of 2"),
        (lambda group: [s._replace(logprobs=[float("nan")] * len(s.tokens)) for s in group], "log-probs that are none"),
        (lambda group: [s._replace(tokens=[*s.tokens[:-1], 5]) for s in group], "finish_reason"),
        (lambda group: [s._replace(logprobs=[*s.logprobs, -1.0]) for s in group], "logprobs"),
        (lambda group: [s._replace(versions=[]) for s in group], "version spans"),
    ],
)
def test_a_group_that_cannot_be_is_refused(params, spoil, said):
    made, samplers = fakes(1)
    with serving_all(*samplers) as servers:
        with engine_of(servers, probe_tolerance=float("inf"), retries=0, deadline_s=3.0) as engine:
            weights = engine.load(params, 0)
            made[0].spoil = spoil
            with pytest.raises(ValueError, match=said):
                generate(engine, weights)


def test_a_wrong_token_ends_the_run_at_once(params, tmp_path):
    _, samplers = fakes(1)
    (tmp_path / "token").write_text("another")
    with serving_all(*samplers, secrets=security.Security(token="secret")) as servers:
        with pytest.raises(ConnectionError, match="token"):
            with engine_of(servers, token_file=str(tmp_path / "token")):
                pass


def test_a_server_of_another_model_is_refused():
    samplers = [fake_sampler(Fake(), {**SHAPES, "lm_head.weight": (24, 32)})]
    with serving_all(*samplers) as servers, pytest.raises(ConnectionError, match="model of other tensors"):
        with engine_of(servers):
            pass


def test_a_failed_load_on_one_server_leaves_the_others_at_work(params):
    made, samplers = fakes(2)

    async def crash():
        raise sampler.Broken("half of the old weights, half of the new")

    with serving_all(*samplers) as servers, engine_of(servers, probe_tolerance=float("inf")) as engine:
        engine.load(params, 0)
        made[0].on_load = crash
        weights = engine.load(moved(params, 1), 1)
        rollout = generate(engine, weights)
        check_rows(rollout, requests=2)
        assert (rollout.versions[rollout.mask] == 1).all(), "the failed server must not sample with version 0"
        assert servers[0].servicer.broken.is_set(), "its process has to end"
        assert not servers[1].servicer.broken.is_set()


def test_weights_go_as_a_delta_and_arrive_exactly(params):
    made, samplers = fakes(1)
    with serving_all(*samplers) as servers:
        with engine_of(servers, probe_tolerance=float("inf"), weights_dtype="bfloat16") as engine:
            for version in range(3):
                state = jax.tree.map(lambda x, v=version: x.at[(0,) * x.ndim].add(float(v)), params)
                engine.load(state, version)
                want = weight_sync.tensors(weight_sync.publish(state, MODEL, "bfloat16"))
                got = made[0].loaded[made[0].version]
                assert {k: bytes(v.data) for k, v in got.items()} == {k: bytes(v.data) for k, v in want.items()}
            received = servers[0].servicer.numbers.weight_bytes._value.get()
            whole = sum(len(tensor.data) for tensor in want.values())
    assert whole <= received < 1.2 * whole, "one whole transfer and two small deltas"


def test_an_update_in_flight_reaches_the_tokens_still_to_come(params):
    made, samplers = fakes(1)

    async def hold(index):
        while index == 3 and len(made[0].loaded) < 2:
            await asyncio.sleep(0.01)

    made[0].on_group = hold
    with serving_all(*samplers) as servers:
        with engine_of(servers, in_flight=True, probe_tolerance=float("inf")) as engine:
            weights = engine.load(params, 0)
            results = []
            thread = threading.Thread(target=lambda: results.append(generate(engine, weights)))
            thread.start()
            wait_until(lambda: len(made[0].asked) == 3)
            engine.update(moved(params, 1), 1)
            thread.join()
    rollout = results[0]
    check_rows(rollout)
    versions = rollout.versions.reshape(6, GROUP_SIZE, -1).max((1, 2))
    assert versions.tolist() == [0, 0, 0, 1, 1, 1], "groups before the update are of version 0, later ones of version 1"


def test_weights_ahead_wait_for_the_rows_that_are_being_sampled(params):
    """Staleness 1: version 1 is handed out while version 0 samples, and samples the next batch."""
    made, samplers = fakes(1, seconds=0.05)
    with serving_all(*samplers) as servers, engine_of(servers, probe_tolerance=float("inf")) as engine:
        first, results = engine.load(params, 0), []
        thread = threading.Thread(target=lambda: results.append(generate(engine, first)))
        thread.start()
        wait_until(lambda: made[0].asked)
        second = engine.load(moved(params, 1), 1)
        later = generate(engine, second)
        thread.join()
    assert set(results[0].versions[results[0].mask].tolist()) == {0}
    assert set(later.versions[later.mask].tolist()) == {1}


def test_scores_of_the_servers_come_with_the_rows(params):
    _, samplers = fakes(1)

    async def scorer(examples, completions):
        correct = np.array([float(len(tokens) % 2) for tokens in completions], np.float32)
        return {"correct": correct}, [None if x else "even" for x in correct]

    with serving_all(*samplers, scorer=scorer, score_channels=["correct"]) as servers:
        with engine_of(servers, probe_tolerance=float("inf")) as engine:
            assert engine.score_channels == () and engine.generate_scored is None
        with engine_of(servers, score_on_server=True, probe_tolerance=float("inf")) as engine:
            assert engine.score_channels == ("correct",)
            rollout, scores, errors = engine.generate_scored(
                engine.load(params, 0), PROMPTS, KEY, group_size=GROUP_SIZE, sampling=SAMPLING
            )
    lengths = rollout.mask.sum(1)
    np.testing.assert_array_equal(scores["correct"], lengths % 2)
    assert [error is None for error in errors] == (lengths % 2 == 1).tolist()
