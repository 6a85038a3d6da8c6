"""Everything that can break between a trainer and its servers: no row lost or doubled, no hang, no wrong weights.

Run with -s to see the table of what was counted.
"""

import threading
import time

import jax
import numpy as np
import pytest

from tapojax import weight_sync
from tapojax.models import decoder
from tests.rollout import test_remote
from tests.rollout.proxy import Proxy
from tests.rollout.servers import Fake, Served, fake_sampler, serving_all, wait_until
from tests.rollout.test_remote import GROUP_SIZE, MODEL, PROMPTS, SHAPES, check_rows, engine_of, fakes, generate, moved

NO_PROBE = {"probe_tolerance": float("inf")}
TABLE: list[tuple] = []


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print("\n| fault | rows | asked twice | seconds | deadline |\n|---|---|---|---|---|")
    for row in TABLE:
        print("| " + " | ".join(str(x) for x in row) + " |")


@pytest.fixture(scope="module")
def params():
    return decoder.init(MODEL, jax.random.key(0))


@pytest.fixture
def proxied():
    """Starts a proxy before a server's port."""
    made = []

    def make(server) -> Proxy:
        made.append(Proxy(server.port))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


def count(what, made, rollout, started, deadline):
    """Each row is there once; a line for the table."""
    seconds = time.monotonic() - started
    assert rollout.mask.any(1).sum() == len(PROMPTS.tokens) * GROUP_SIZE, "a row was lost"
    assert seconds < 3 * deadline + 5, "it hung beyond its deadlines"
    asked = [index for fake in made for _, index in fake.asked]
    TABLE.append((what, len(rollout.tokens), len(asked) - len(set(asked)), f"{seconds:.1f}", f"{deadline:g}"))


@pytest.mark.parametrize("phase", ["queued", "generating"])
def test_server_killed(params, phase):
    made, samplers = fakes(2)
    reached = threading.Event()

    async def signal(index):
        reached.set()
        if phase == "generating" and index in (1, 4):
            made[0].seconds = made[1].seconds = 0.1

    with serving_all(*samplers) as servers, engine_of(servers, **NO_PROBE, deadline_s=10.0) as engine:
        weights = engine.load(params, 0)
        for fake in made:
            fake.seconds, fake.on_group = 0.3 if phase == "queued" else 0.02, signal
        victim = threading.Thread(target=lambda: (phase == "queued" or reached.wait(5), servers[0].kill()))
        started = time.monotonic()
        victim.start()
        rollout = generate(engine, weights)
        victim.join()
    check_rows(rollout, requests=2)
    count(f"server killed, {phase}", made, rollout, started, 10)


def test_server_killed_in_the_middle_of_a_load(params):
    made, samplers = fakes(2)
    with serving_all(*samplers) as servers, engine_of(servers, **NO_PROBE, deadline_s=10.0) as engine:
        engine.load(params, 0)

        async def die():
            servers[0].loop.create_task(servers[0].running.drain(0))
            import asyncio

            await asyncio.sleep(30)

        made[0].on_load = die
        started = time.monotonic()
        weights = engine.load(moved(params, 1), 1)
        rollout = generate(engine, weights)
    check_rows(rollout, requests=2)
    assert (rollout.versions[rollout.mask] == 1).all(), "rows of version 0 after version 1 was loaded"
    count("server killed, mid-load", made, rollout, started, 10)


def test_server_that_comes_back_gets_the_weights_and_work(params):
    made, samplers = fakes(1)
    with serving_all(*samplers) as servers, engine_of(servers, **NO_PROBE, deadline_s=10.0) as engine:
        weights = engine.load(params, 0)
        port = servers[0].port
        servers[0].kill()
        again = Fake()
        reborn = []
        threading.Timer(1.0, lambda: reborn.append(Served(fake_sampler(again, SHAPES), port=port))).start()
        started = time.monotonic()
        rollout = generate(engine, weights)
        reborn[0].kill()
    check_rows(rollout)
    assert len(again.loaded) == 1 and again.asked
    count("server restarted, weights sent anew", [again], rollout, started, 10)


@pytest.mark.parametrize("fault", ["cut", "half-open", "slow"])
def test_connection(params, proxied, fault):
    made, samplers = fakes(1, seconds=0.05)
    deadline = 2.0 if fault == "half-open" else 10.0
    with serving_all(*samplers) as servers:
        proxy = proxied(servers[0])
        with engine_of([proxy], **NO_PROBE, deadline_s=deadline, retries=5) as engine:
            weights = engine.load(params, 0)

            def misbehave():
                wait_until(lambda: len(made[0].asked) >= 2)
                if fault == "cut":
                    proxy.cut()
                elif fault == "half-open":
                    proxy.mode = "freeze"
                    time.sleep(1.5 * deadline)
                    proxy.cut()
                    proxy.mode = "forward"
                else:
                    proxy.mode = "slow"

            thread = threading.Thread(target=misbehave)
            started = time.monotonic()
            thread.start()
            rollout = generate(engine, weights)
            thread.join()
    check_rows(rollout)
    assert len({name for name, _ in made[0].asked}) == 1, "the same request id"
    assert len(made[0].asked) == len(PROMPTS.tokens), "the server sampled a group twice"
    count(f"connection {fault}", made, rollout, started, deadline)


def test_a_corrupted_chunk_of_weights_is_noticed_and_sent_again(params, proxied):
    made, samplers = fakes(1)
    with serving_all(*samplers) as servers:
        proxy = proxied(servers[0])
        with engine_of([proxy], **NO_PROBE, deadline_s=10.0, load_deadline_s=5.0, retries=6) as engine:
            engine.load(params, 0)
            proxy.mode = "corrupt"
            threading.Thread(
                target=lambda: (wait_until(lambda: proxy.corrupted), setattr(proxy, "mode", "forward"))
            ).start()
            started = time.monotonic()
            changed = moved(params, 1)
            weights = engine.load(changed, 1)
            rollout = generate(engine, weights)
    want = weight_sync.tensors(weight_sync.publish(changed, MODEL, "float32"))
    got = made[0].loaded[made[0].version]
    assert {name: bytes(t.data) for name, t in got.items()} == {name: bytes(t.data) for name, t in want.items()}
    assert len(made[0].loaded) == 2, "nothing corrupt was ever loaded"
    count("corrupted chunk of weights", made, rollout, started, 10)


def test_version_skew_between_servers(params):
    made, samplers = fakes(2)
    with serving_all(*samplers) as servers, engine_of(servers, **NO_PROBE, deadline_s=10.0) as engine:
        weights = engine.load(params, 3)
        servers[1].servicer.version = 12345  # another trainer was here
        started = time.monotonic()
        rollout = generate(engine, weights)
    check_rows(rollout, requests=2)
    assert (rollout.versions[rollout.mask] == 3).all()
    count("version skew", made, rollout, started, 10)


def test_a_new_trainer_takes_over_servers_that_live_on(params):
    """What a trainer that was killed and resumed finds."""
    made, samplers = fakes(1)
    with serving_all(*samplers) as servers:
        with engine_of(servers, **NO_PROBE) as engine:
            first = generate(engine, engine.load(params, 7))
        made[0].asked.clear()
        started = time.monotonic()
        with engine_of(servers, **NO_PROBE) as engine:
            second = generate(engine, engine.load(params, 7))
    assert len(made[0].loaded) == 2, "weights of the session before are not trusted, though they are called version 7"
    for name in first._fields:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    count("trainer restarted, servers live", made, second, started, 20)


def test_hundred_streams_at_once(params):
    made, samplers = fakes(2, seconds=0.01)
    prompts = test_remote.Prompts([{"id": str(i)} for i in range(100)], [[5, 6 + i % 10] for i in range(100)])
    with serving_all(*samplers) as servers:
        with engine_of(servers, **NO_PROBE, prompts_per_request=1, requests_per_server=50) as engine:
            weights = engine.load(params, 0)
            rollout = engine.generate(
                weights, prompts, test_remote.KEY, group_size=GROUP_SIZE, sampling=test_remote.SAMPLING
            )
    assert rollout.mask.any(1).all() and len(rollout.tokens) == 100 * GROUP_SIZE
    asked = [index for fake in made for _, index in fake.asked]
    assert sorted(asked) == list(range(100))
