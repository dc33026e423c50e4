"""Anomalies are what a model cannot give back; the alarm's threshold comes from normal rows alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle
from torch import nn

from atoll.core.errors import DataError, RecipeError
from atoll.data.dataset import Dataset, Info
from atoll.data.federation import make_federation
from atoll.data.partitions.by_column import ByColumn
from atoll.data.partitions.iid import Iid
from atoll.data.source import standardised
from atoll.data.sources.anomalies import Anomalies
from atoll.data.sources.digits import Digits
from atoll.data.sources.sklearn_table import SklearnTable
from atoll.data.windows import OneSeries, windows
from atoll.federated.engine import federate
from atoll.federated.local.training import Training
from atoll.federated.methods.fedavg import fedavg
from atoll.models.mlp import MLP
from atoll.models.model import build_model
from atoll.models.subspace import Subspace, SubspaceNet, orthonormal
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import prepare
from atoll.tasks.anomaly_detection import AnomalyDetection, auc

FLAT = Info(name="flat", shape=(3,), num_classes=2)


class Plane(nn.Module):
    """Gives back the first two numbers of three."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor([1.0, 1.0, 0.0])


def rows(third: list[float], y: list[int]) -> Dataset:
    x = torch.tensor([[5.0, -3.0, v] for v in third])
    return Dataset({"x": x, "y": torch.tensor(y)}, FLAT)


def test_the_score_is_the_squared_residual():
    data, task = rows([0.0, 2.0, -3.0], [0, 0, 1]), AnomalyDetection(FLAT)
    assert task.scores(Plane(), data).tolist() == [0.0, 4.0, 9.0]
    assert torch.allclose(task.loss(Plane(), data.ready()), torch.tensor([0.0, 4.0, 9.0]) / 3)


def test_the_threshold_is_a_quantile_of_normal_rows_that_are_not_judged():
    """Ten calibrating rows score 0 to 9 squared, so at 0.5 the limit is between 4^2 and 5^2."""
    third = [v for i in range(10) for v in (float(i), 100.0 if i < 3 else 0.0)]  # every second row is judged
    data = rows([*third, 3.0, 5.0, 200.0], [0] * 20 + [1] * 3)
    found = AnomalyDetection(FLAT, quantile=0.5).evaluate(Plane(), data)
    assert found["false_alarms"] == 0.3
    assert found["f1"] == 2 * 2 / (2 * 2 + 3 + 1)  # two hits, three false alarms, one miss
    calibrating = data.select(range(0, 20, 2))
    assert AnomalyDetection(FLAT, quantile=0.5).threshold(Plane(), calibrating) == (16 + 25) / 2


def test_neither_judged_nor_anomalous_rows_move_the_threshold():
    third = [v for i in range(10) for v in (float(i), 10.0 + i)]
    found = AnomalyDetection(FLAT, quantile=0.9).evaluate(Plane(), rows([*third, 9.5, 500.0], [0] * 20 + [1] * 2))
    assert found["false_alarms"] == 1.0
    assert found["f1"] == 2 * 2 / (2 * 2 + 10)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_auc_is_the_oracles_ties_included(normal, anomalous):
    ours = auc(torch.tensor(normal).double(), torch.tensor(anomalous).double())
    theirs = oracle.roc_auc_score([0] * len(normal) + [1] * len(anomalous), normal + anomalous)
    assert ours == pytest.approx(theirs)


def test_with_nothing_to_tell_apart_there_are_numbers_all_the_same():
    task = AnomalyDetection(FLAT)
    for data in (rows([1.0, 2.0], [0, 0]), rows([1.0], [1]), rows([1.0, 2.0], [0, 0]).without_column("y")):
        found = task.evaluate(Plane(), data)
        assert found["auc"] == 0.5
        assert found["f1"] == 0.0


def test_a_model_that_gives_no_rows_back_is_refused():
    task = AnomalyDetection(FLAT, MLP(hidden=()))
    with pytest.raises(DataError, match="returns 2 numbers for a row of `flat`, which has 3"):
        task.predict(build_model(MLP(hidden=()), FLAT, 2, 0), rows([1.0], [0]).ready())
    with pytest.raises(DataError, match="holds every row of 3 numbers; give a smaller `k`"):
        AnomalyDetection(FLAT, Subspace(3)).model(0)
    with pytest.raises(DataError, match="gives back the 3 numbers of a row, not 2 outputs"):
        build_model(Subspace(2), FLAT, 2, 0)
    with pytest.raises(DataError, match="holds no classes"):
        task.evaluate(Plane(), Dataset({"x": torch.zeros(2, 3), "y": torch.zeros(2)}, FLAT))


def test_a_subspace_is_a_projection_and_its_basis_is_unique():
    net = build_model(Subspace(2), FLAT, 3, 0)
    assert isinstance(net, SubspaceNet)
    assert torch.allclose(net.U.T @ net.U, torch.eye(2), atol=1e-6)
    x = torch.randn(5, 3)
    assert torch.allclose(net(net(x)), net(x), atol=1e-6)
    turned = net.U.detach() @ torch.tensor([[2.0, 1.0], [0.0, 3.0]])  # same flag of subspaces, another basis
    assert torch.allclose(orthonormal(turned), orthonormal(net.U.detach()), atol=1e-6)


# ------------------------------------------------------------------------------------------- sources


def test_only_normal_rows_are_trained_on():
    federation = make_federation(Anomalies(SklearnTable()), Iid(), sites=4)
    assert federation.info.class_names == ("normal", "anomalous")
    for site in federation.sites:
        assert not site.train.column("y").any()
        assert not site.validation.column("y").any()
        assert set(site.test.column("y").tolist()) == {0, 1}
    assert int(federation.test.column("y").sum()) == 212, "every malignant row"
    assert int((federation.test.column("y") == 0).sum()) == round(0.2 * 357)
    x = torch.cat([s.train.column("x") for s in federation.sites])
    assert torch.allclose(federation.info.mean, x.mean(0)), "held-out rows leave no trace"


def test_any_class_may_be_the_anomaly():
    loaded = Anomalies(Digits(), anomalous=("3", "8")).load()
    assert int(loaded.train.column("y").sum()) == 183 + 174
    with pytest.raises(DataError, match=r"has no class `maligant`\. Did you mean `malignant`"):
        Anomalies(SklearnTable(), anomalous=("maligant",)).load()
    with pytest.raises(DataError, match="Every row of `breast_cancer` is anomalous"):
        Anomalies(SklearnTable(), anomalous=("malignant", "benign")).load()
    with pytest.raises(DataError, match="needs classes, and `diabetes` has none"):
        Anomalies(SklearnTable("diabetes")).load()


# ------------------------------------------------------------------------------------------- learning


def learned(federation, network, rounds: int = 15, lr: float = 0.5) -> tuple[float, dict[str, float]]:  # type: ignore[no-untyped-def]
    task = AnomalyDetection(federation.info, network)
    before = task.evaluate(task.model(0), federation.test)["residual"]
    training = Training(lr=lr, epochs=2, batch_size=16)
    return before, list(federate(task, federation, fedavg(training), rounds=rounds, evaluate_every=rounds))[-1].metrics


def test_an_autoencoder_learns_with_any_method():
    federation = make_federation(Anomalies(SklearnTable()), Iid(), sites=3)
    before, after = learned(federation, MLP(hidden=(6,)))
    assert after["residual"] < before / 2
    assert after["auc"] > 0.85


def test_windows_of_series_with_a_fault_are_found():
    """Two channels that move together, until at some times they do not."""
    series, rng = [], np.random.default_rng(0)
    for site in range(3):
        t = np.arange(200)
        wave = np.sin(t / 5 + site)
        fault = (t >= 100) & (t < 105)
        values = np.stack([wave, np.where(fault, -wave, wave)], 1) + 0.05 * rng.normal(size=(200, 2))
        series.append(OneSeries(values.astype(np.float32), {"site": site}, fault))
    info = Info(name="pumps", kind="series", shape=(2, 4), num_classes=2, class_names=("normal", "anomalous"))
    federation = make_federation(standardised(windows(series, info, window=4, horizon=0, test=0.2)), ByColumn())
    _, after = learned(federation, Subspace(2), rounds=8, lr=0.2)
    assert after["auc"] > 0.95


def test_as_a_recipe():
    recipe = {"data": {"name": "anomalies"}, "partition": "iid", "sites": 3, "task": "anomaly_detection", "rounds": 1}
    prepared = prepare(read_recipe({**recipe, "model": {"name": "subspace", "k": 3}}))
    assert isinstance(prepared.setup.task, AnomalyDetection)
    with pytest.raises(RecipeError, match="quantile"):
        read_recipe({**recipe, "task": {"name": "anomaly_detection", "quantile": 1.5}})
