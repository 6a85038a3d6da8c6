"""Limits on what trainer and sampler may disagree: told, masked, stopped."""

import numpy as np
import pytest

from launch import build, train
from tapojax import report
from tests.launch.test_asynchrony import tiny


def with_a_wrong_sampler(monkeypatch, shift):
    """The sampler says other log-probs than it sampled by, at every third token."""
    make_engine = build.engine

    def engine(*args):
        local = make_engine(*args)

        def generate(*given, **how):
            rollout = local.generate(*given, **how)
            wrong = rollout.mask & (np.arange(rollout.mask.shape[1]) % 3 == 0)
            return rollout._replace(behaviour_logprobs=rollout.behaviour_logprobs - np.float32(shift) * wrong)

        return local._replace(generate=generate)

    monkeypatch.setattr(build, "engine", engine)


def config_of(**mismatch):
    config = tiny()
    config.steps, config.sft.updates = 2, 10
    config.mismatch.update(mismatch)
    return config


def k3(shift):
    return np.exp(shift) - 1 - shift


def test_a_limit_stops_the_run_and_says_what_to_do(tmp_path, monkeypatch):
    with_a_wrong_sampler(monkeypatch, 0.5)
    with pytest.raises(ValueError) as error:
        train.train(config_of(stop=0.01), tmp_path)
    (line,) = report.read_jsonl(tmp_path / "metrics.jsonl")
    assert 0 < line["mismatch_k3"] < k3(0.5) and line["mismatch_max"] == pytest.approx(0.5, abs=1e-4)
    said = f"step 1: old and behaviour log-probs differ by a mean k3 of {line['mismatch_k3']:.3g} nats (max |λ| 0.5)"
    assert str(error.value).startswith(f"{said}, mismatch.stop=0.01: give trainer and sampler the same precision")
    assert not list((tmp_path / "checkpoints").iterdir()), "the update is not kept"


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_warning_goes_on(tmp_path, monkeypatch, capsys, minibatches):
    with_a_wrong_sampler(monkeypatch, 0.5)
    config = config_of(warn=0.01, stop=10.0)
    config.train.minibatches = minibatches
    train.train(config, tmp_path)
    assert capsys.readouterr().out.count("mismatch.warn=0.01") == 2
    for line in report.read_jsonl(tmp_path / "metrics.jsonl"):
        assert line["mismatch_k3"] > 0.01 and "mismatch_masked" not in line


def test_a_mask_takes_out_what_is_wrong_and_nothing_else(tmp_path, monkeypatch):
    with_a_wrong_sampler(monkeypatch, 0.5)
    train.train(config_of(mask=0.1), tmp_path)
    for line in report.read_jsonl(tmp_path / "metrics.jsonl"):
        share = line["mismatch_k3"] / k3(0.5)
        assert 0.2 < share < 0.5 and line["mismatch_masked"] == pytest.approx(share, abs=1e-3)
        assert line["importance_mean"] == pytest.approx(1 - share, abs=1e-3)


def test_limits_that_are_not_reached_change_nothing(tmp_path, capsys):
    plain, limited = tmp_path / "plain", tmp_path / "limited"
    train.train(config_of(), plain)
    train.train(config_of(warn=0.01, stop=0.1), limited)
    lines = [report.read_jsonl(workdir / "metrics.jsonl") for workdir in (plain, limited)]
    for a, b in zip(*lines, strict=True):
        assert {k: v for k, v in a.items() if "second" not in k} == {k: v for k, v in b.items() if "second" not in k}
    assert "warning" not in capsys.readouterr().out


def test_a_mismatch_that_is_no_number_passes_no_limit():
    section = config_of(stop=1e9).mismatch
    with pytest.raises(ValueError, match="mean k3 of nan nats"):
        train.stop_if_mismatched({"mismatch_k3": np.nan, "mismatch_max": np.inf}, 0, section)
