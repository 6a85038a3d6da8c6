"""RTPO's hint schedules against the published trainer, and the defects of it that we do not share."""

from pathlib import Path

import numpy as np
import pytest

from tapojax import schedules

GOLDEN = np.load(Path(__file__).parent / "golden" / "rtpo_schedule.npz", allow_pickle=False)
CASES = {
    "linear_down": ("linear", 100, {}),
    "linear_up": ("linear", 100, {"direction": "up"}),
    "cosine_down": ("cosine", 100, {}),
    "cosine_up": ("cosine", 100, {"direction": "up"}),
    "exp5_down": ("exponential", 100, {}),
    "exp1_down": ("exponential", 100, {"rate": 1.0}),
    "piecewise_down": ("piecewise", 100, {}),
    "piecewise_up": ("piecewise", 100, {"direction": "up"}),
    "linear_down_total37": ("linear", 37, {}),
    "cosine_down_total37": ("cosine", 37, {}),
    # the trainer turns a constant around: its .25 "down" keeps .75
    "constant1_down": ("constant", 100, {"value": 0.0}),
    "constant025_down": ("constant", 100, {"value": 0.75}),
}


@pytest.mark.parametrize("name", CASES)
def test_published_factors(name):
    kind, steps, knobs = CASES[name]
    fraction = schedules.hint_fraction(kind, steps, **knobs)
    got = [fraction(step) for step in GOLDEN["steps"].tolist()]
    np.testing.assert_allclose(got, GOLDEN[f"factor__{name}"], rtol=0, atol=1e-15)


def test_every_published_factor_is_compared():
    factors = {name.removeprefix("factor__") for name in GOLDEN.files if name.startswith("factor__")}
    assert factors - CASES.keys() == {"linear_down_total_minus1", "cosine_down_total_minus1"}


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_hints_go_from_whole_to_none_and_stay_away(kind):
    fraction = schedules.hint_fraction(kind, 80)
    assert fraction(0) == 1 and fraction(40) == pytest.approx(0.5) and fraction(80) == fraction(100) == 0


def test_defect_the_horizon_of_minus_one_drops_all_hints_after_the_first_step():
    for kind in ("linear", "cosine"):
        published = GOLDEN[f"factor__{kind}_down_total_minus1"]
        assert published[0] == 1 and not published[1:].any()
        for steps in (-1, 0):
            with pytest.raises(ValueError, match=f"horizon of {steps} steps: give the steps"):
                schedules.hint_fraction(kind, steps)


def test_defect_published_defaults_of_three_kinds_raise_and_ours_work():
    assert GOLDEN["default_config_raises_typeerror_exp_piecewise_constant"].all()
    ends = {kind: schedules.hint_fraction(kind, 10)(10) for kind in ("exponential", "piecewise", "constant")}
    assert ends == {"exponential": pytest.approx(np.exp(-5)), "piecewise": 0, "constant": 0}


def test_defect_binary_floor_loses_a_token():
    """1 - .9 is a little less than .1: the trainer keeps 0 of 10 tokens, we keep 1; nowhere else do we differ."""
    assert int((1 - 0.9) * 10) == 0 and schedules.kept_tokens(1 - 0.9, 10) == 1
    factors, lengths, published = (GOLDEN[name] for name in ("anneal_factors", "cot_lengths", "kept_tokens"))
    ours = np.array([[schedules.kept_tokens(f, n) for n in lengths.tolist()] for f in factors.tolist()])
    exact = factors[:, None] * lengths
    lost = ours != published
    assert lost.sum() == 16 and (ours[lost] == published[lost] + 1).all()
    np.testing.assert_allclose(exact[lost], ours[lost], atol=1e-9, err_msg="only whole numbers missed by rounding")


def test_kept_tokens_at_the_ends():
    assert [schedules.kept_tokens(f, 7) for f in (0.0, 1e-12, 0.5, 1.0)] == [0, 0, 3, 7]


@pytest.mark.parametrize(
    ("kind", "knobs", "message"),
    [
        ("lineal", {}, r"no schedule is called 'lineal': choose one of \['linear', 'cosine'"),
        ("linear", {"direction": "sideways"}, "direction='sideways': choose 'down' or 'up'"),
        ("linear", {"rate": 4.0}, "rate=4.0 is not read by the linear schedule, only direction"),
        ("exponential", {"value": 0.5}, "value=0.5 is not read by the exponential schedule, only direction and rate"),
        ("constant", {"direction": "up"}, "direction='up' is not read by the constant schedule, only value"),
        ("cosine", {"values": (1.0,)}, "values=.* is not read by the cosine schedule"),
        ("exponential", {"rate": 0.0}, "rate=0.0: must be positive"),
        ("constant", {"value": 1.5}, "value=1.5: a share of the hint"),
        ("piecewise", {"values": (0.5, 1.0)}, "give increasing milestones and one value more"),
        ("piecewise", {"milestones": (0.6, 0.3, 0.9)}, "give increasing milestones"),
        ("piecewise", {"values": (0.2, 0.5, 0.8, 1.2)}, r"one value more, in \[0, 1\]"),
    ],
)
def test_what_makes_no_schedule_is_named(kind, knobs, message):
    with pytest.raises(ValueError, match=message):
        schedules.hint_fraction(kind, 100, **knobs)
