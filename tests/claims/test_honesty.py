"""A verdict is no kinder than the statistics, and tuning helps an arm whichever way its metric points."""

from __future__ import annotations

import math

import pytest

from atoll.claims.claim import Claim
from atoll.claims.run import best_try, run_claim
from atoll.claims.verdict import NOISE, NOT_IN_ONE, NOT_REPRODUCED, REPRODUCED, SO_IN_ONE, T90, T90_BEYOND, judge
from atoll.core.errors import RecipeError


def test_the_quantiles_are_those_of_student():
    stats = pytest.importorskip("scipy.stats")
    for df in range(1, 60):
        exact = stats.t.ppf(0.95, df)
        assert exact <= T90.get(df, T90_BEYOND)
    assert all(t < stats.t.ppf(0.95, df) * 1.001 for df, t in T90.items())


def test_one_seed_is_never_called_reproduced():
    assert judge([2.0], [1.0], ">") == SO_IN_ONE
    assert judge([1.0], [1.0], ">=") == SO_IN_ONE
    assert judge([1.0], [1.0], ">") == NOT_IN_ONE
    assert judge([math.nan], [1.0], "<=") == NOT_IN_ONE
    assert judge([1.0], [math.inf], "<") == SO_IN_ONE


def test_two_seeds_need_a_gap_of_six_standard_errors():
    # Gaps 1 and 1.9: mean 1.45, standard error 0.45; at one degree of freedom the interval is +- 2.84.
    assert judge([2.0, 2.9], [1.0, 1.0], ">") == NOISE
    assert judge([2.0, 2.1], [1.0, 1.0], ">") == REPRODUCED  # 1.05 +- 0.32
    assert judge([1.0, 1.0], [2.0, 2.1], ">") == NOT_REPRODUCED


@pytest.mark.parametrize(("higher", "best"), [(True, "b"), (False, "c")])
def test_the_best_try_follows_the_metric(higher, best):
    tries = [{"change": n, "value": v} for n, v in {"a": math.nan, "b": 3.0, "c": 1.0, "d": 2.0, "e": 3.0}.items()]
    assert best_try(tries, higher)["change"] == best


def test_an_error_is_tuned_down():
    """The diabetes table is a regression: its headline is an error, and a step of 1e-6 leaves it high."""
    claim = Claim(
        name="c", subject="fedavg", statement="-", metric="final", seeds=(0,), arms={"a": {}},
        work={
            "data": {"name": "sklearn_table", "table": "diabetes"}, "sites": 2, "rounds": 4, "method": "fedavg",
            "partition": "iid", "model": "logistic",
        },
        tune={"all": {"method.training.lr": [1e-6, 0.05]}},
    )  # fmt: skip
    assert run_claim(claim)["arms"]["a"]["chosen"] == {"method.training.lr": 0.05}


def test_an_arm_that_cannot_be_right_is_refused():
    noise = {"name": "gaussian_noise", "multiplier": 1.0, "clip_norm": 1.0}
    work = {"rounds": 1, "sites": 2, "uplink": [noise]}
    claim = Claim(name="c", subject="fedavg", statement="-", seeds=(0,), arms={"unclipped": {}}, work=work)
    with pytest.raises(RecipeError, match="needs Clip"):
        run_claim(claim)
