"""Limits name the value, the limit and the fix; the rate limiter is a token bucket."""

import inspect

import pytest

from tapojax.rpc import limits
from tapojax.rpc import tapojax_pb2 as pb

BOUNDS = limits.Limits(max_prompts=3, max_group_size=4, max_total_tokens=100)


def generate(*, prompts=3, length=3, group_size=3, max_tokens=10):
    """At the defaults 3 * 3 + 3 * 3 * 10 = 99 tokens."""
    rows = [pb.Prompt(index=i, tokens=range(length)) for i in range(prompts)]
    return pb.GenerateRequest(prompts=rows, group_size=group_size, sampling=pb.Sampling(max_tokens=max_tokens))


def test_what_is_within_all_limits_passes():
    limits.check_generate(generate(), BOUNDS)
    limits.check_generate(pb.GenerateRequest(), BOUNDS)
    limits.check_logprobs(pb.LogprobsRequest(rows=[pb.Row(tokens=range(33))] * 3), BOUNDS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": 4}, "4 prompts are over the server's limit of 3: send fewer a call"),
        ({"group_size": 5}, "5 completions of a prompt are over the server's limit of 4: ask for a smaller group_size"),
        ({"length": 4}, "102 tokens are over the server's limit of 100: send fewer prompts a call"),
        ({"max_tokens": 2**32 - 1}, "tokens are over the server's limit of 100: .* or ask for a smaller max_tokens"),
    ],
)
def test_a_generate_over_a_limit_is_told_which(changes, message):
    with pytest.raises(ValueError, match=message):
        limits.check_generate(generate(**changes), BOUNDS)


@pytest.mark.parametrize("rows, message", [([1] * 4, "4 rows are over .* 3"), ([50, 51], "101 tokens are over .* 100")])
def test_logprobs_over_a_limit_are_told_which(rows, message):
    with pytest.raises(ValueError, match=message):
        limits.check_logprobs(pb.LogprobsRequest(rows=[pb.Row(tokens=range(n)) for n in rows]), BOUNDS)


def test_a_bucket_holds_a_burst_and_refills_at_the_rate():
    now = [1000.0]
    wait = limits.rate_limiter(calls_per_second=4.0, burst=3, clock=lambda: now[0])
    assert [wait("peer") for _ in range(3)] == [0, 0, 0]
    assert wait("peer") == wait("peer") == pytest.approx(0.25), "a refused call costs nothing"
    now[0] += 0.125
    assert wait("peer") == pytest.approx(0.125)
    now[0] += 0.125
    assert wait("peer") == 0 and wait("peer") == pytest.approx(0.25)
    now[0] += 1000
    assert [wait("peer") for _ in range(3)] == [0, 0, 0] and wait("peer") > 0, "it holds no more than a burst"


def test_over_time_a_peer_gets_its_rate_and_no_more():
    now = [0.0]
    wait = limits.rate_limiter(calls_per_second=10.0, burst=5, clock=lambda: now[0])
    admitted = 0
    for _ in range(10_000):
        now[0] += 0.01
        admitted += wait("peer") == 0
    assert admitted == pytest.approx(100 * 10 + 5, abs=2)


def test_peers_have_buckets_of_their_own_and_are_forgotten_at_rest(monkeypatch):
    monkeypatch.setattr(limits, "PEERS", 10)
    now = [0.0]
    wait = limits.rate_limiter(calls_per_second=1.0, burst=1, clock=lambda: now[0])
    assert all(wait(f"peer {i}") == 0 for i in range(50)), "none of them is refused for the others"
    assert wait("peer 3") > 0
    (remembered,) = [
        cell.cell_contents for cell in inspect.unwrap(wait).__closure__ if isinstance(cell.cell_contents, dict)
    ]
    now[0] = 100.0
    assert wait("one more") == 0 and len(remembered) == 1
