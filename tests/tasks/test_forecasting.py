"""Forecasts: the horizon comes from the data, units are the target's, and the skill is over repeating the last value."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from atoll.core.errors import DataError
from atoll.data.dataset import Dataset, Info
from atoll.data.federation import make_federation
from atoll.data.partitions.by_column import ByColumn
from atoll.data.sources.demand import Demand
from atoll.federated.engine import federate
from atoll.federated.local.training import Training
from atoll.federated.methods.fedavg import fedavg
from atoll.models.logistic import Logistic
from atoll.models.model import build_model
from atoll.models.series_transformer import SeriesTransformer
from atoll.recipes.recipe import load_recipe, read_recipe
from atoll.recipes.run import prepare
from atoll.tasks.forecasting import Forecasting
from atoll.tasks.regression import Regression

INFO = Info(
    name="s", kind="series", shape=(2, 3), targets=2, target_mean=100.0, target_scale=10.0,
    mean=torch.tensor([[90.0], [0.0]]), scale=torch.tensor([[20.0], [1.0]]),
)  # fmt: skip
DATA = Dataset(
    {
        "x": torch.tensor([[[80.0, 90, 100], [0, 1, 2]], [[120.0, 110, 100], [0, 0, 0]]]),
        "y": torch.tensor([[110.0, 120], [90.0, 80]]),
    },
    INFO,
)


class Says(nn.Module):
    """The same for every window."""

    def __init__(self, *value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value.expand(len(x), -1)


@pytest.mark.parametrize(
    ("base", "standardise", "said", "means"),
    [
        ("mean", True, (1.0, 2.0), [[110.0, 120.0], [110.0, 120.0]]),
        ("mean", False, (1.0, 2.0), [[1.0, 2.0], [1.0, 2.0]]),
        ("last", True, (1.0, 2.0), [[110.0, 120.0], [110.0, 120.0]]),
        ("last", False, (1.0, 2.0), [[101.0, 102.0], [101.0, 102.0]]),
    ],
)
def test_what_a_model_says_means(base, standardise, said, means):
    task = Forecasting(INFO, base=base, standardise=standardise)
    assert torch.allclose(task.predict(Says(*said), DATA.ready()), torch.tensor(means))


def test_the_last_value_is_that_of_the_window():
    batch = {"x": DATA.ready()["x"], "y": DATA.column("y")}
    assert torch.allclose(Forecasting(INFO).last(batch), torch.tensor([100.0, 100.0]))
    moved = Dataset({"x": DATA.column("x") + 7, "y": DATA.column("y")}, INFO)
    still = Forecasting(INFO, base="last").predict(Says(0.0, 0.0), moved.ready())
    assert torch.allclose(still, torch.full((2, 2), 107.0)), "a forecast moves with the level"


@pytest.mark.parametrize("base", ["mean", "last"])
def test_the_loss_is_in_units_of_the_target(base):
    task = Forecasting(INFO, base=base)
    losses = task.loss(Says(0.0, 0.0), DATA.ready())  # predicts 100, 100
    assert torch.allclose(losses, torch.tensor([(1 + 4) / 2, (1 + 4) / 2]))


def test_metrics_by_hand():
    found = Forecasting(INFO).evaluate(Says(1.0, 2.0), DATA)  # 110, 120: right for the first, 20 and 40 off
    assert found["mae"] == pytest.approx(60 / 4)
    assert found["rmse"] == pytest.approx(((400 + 1600) / 4) ** 0.5)
    assert found["skill"] == pytest.approx(1 - 15 / 15)
    assert Forecasting(INFO, base="last").evaluate(Says(0.0, 0.0), DATA)["skill"] == pytest.approx(0.0)


def test_the_data_say_how_far_ahead():
    assert Forecasting(INFO).outputs == 2
    assert Forecasting(INFO).model(0)(torch.randn(4, 2, 3)).shape == (4, 2)
    assert Regression(INFO).outputs == 2
    with pytest.raises(DataError, match="needs windows of series, and `t` is none"):
        Forecasting(Info(name="t", shape=(3,))).model(0)


def test_the_transformer_reads_every_time_and_channel():
    net = build_model(SeriesTransformer(dim=8, layers=1, heads=2), INFO, 2, 0).eval()
    x = torch.randn(1, 2, 3, requires_grad=True)
    net(x).sum().backward()
    assert bool((x.grad.abs() > 1e-6).all())
    order = x.detach()[:, :, [1, 0, 2]]
    assert not torch.allclose(net(x), net(order), atol=1e-5), "the order of times matters"
    with pytest.raises(DataError, match=r"takes windows of a series .*Choose another model"):
        build_model(SeriesTransformer(), Info(name="t", shape=(3,)), 1, 0)
    with pytest.raises(DataError, match="a multiple of `heads`; got 6 and 4"):
        build_model(SeriesTransformer(dim=6), INFO, 1, 0)


# ------------------------------------------------------------------------------------------- demand


def test_demand_is_driven_by_features_of_the_kind():
    loaded = Demand(days=300, noise=0.0).load().train
    last = loaded.column("x")[:, :, -1].double()
    y, kind = loaded.column("y").double(), loaded.column("kind")
    for k in range(3):
        rows = kind == k
        x = torch.cat([last[rows][:, 1:], torch.ones(int(rows.sum()), 1)], 1)
        slope = torch.linalg.lstsq(x, y[rows, None]).solution.flatten()[:6]
        sign = (-1) ** k
        want = torch.zeros(6).double()
        want[2 * k : 2 * k + 2] = torch.tensor([0.8, -0.6]) * sign
        assert torch.allclose(slope, want, atol=0.05), k


def test_poisoned_shops_have_their_features_in_another_order():
    honest, both = Demand(shops=3, days=60).load().train, Demand(shops=3, days=60, poisoned=2).load().train
    assert both.column("site").unique().tolist() == [0, 1, 2, 3, 4]
    assert both.column("kind").unique().tolist() == [0, 1, 2, 3, 4]
    rows = both.column("site") < 3
    assert torch.equal(both.column("x")[rows], honest.column("x"))
    with pytest.raises(DataError, match="2 shops cannot be of 3 kinds"):
        Demand(shops=2).load()


@pytest.mark.parametrize(
    "network", [Logistic(), SeriesTransformer(dim=16, layers=1, heads=2)], ids=["linear", "transformer"]
)
@pytest.mark.parametrize("horizon", [1, 3])
def test_models_learn_to_forecast(network, horizon):
    data = Demand(shops=2, kinds=1, days=300, window=7, horizon=horizon)
    federation = make_federation(data, ByColumn())
    task = Forecasting(federation.info, network)
    method = fedavg(Training(lr=0.01, optimizer="adam", epochs=2))
    metrics = list(federate(task, federation, method, rounds=5, evaluate_every=5))[-1].metrics
    assert metrics["r2"] > (0.7 if horizon == 1 else 0.2)
    assert metrics["skill"] > 0.2


def test_as_a_recipe(tmp_path):
    found = prepare(
        read_recipe(
            {"data": {"name": "demand", "days": 60}, "partition": "by_column", "model": "logistic", "rounds": 1}
        )
    )
    assert isinstance(found.setup.task, Forecasting), "what fits windows of series"
    shipped = load_recipe(str(Path(__file__).parents[2] / "recipes" / "demand_forecast.yaml"))
    assert isinstance(prepare(shipped).setup.task, Forecasting)
