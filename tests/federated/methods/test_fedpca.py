"""Federated PCA: the subspace is that of all rows, matrices stay orthonormal, multipliers cancel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from atoll.core.errors import RecipeError
from atoll.data.dataset import Dataset, Federation, Info, SiteData
from atoll.data.federation import make_federation
from atoll.data.partitions.feature_sorted import FeatureSorted
from atoll.data.sources.anomalies import Anomalies
from atoll.data.sources.digits import Digits
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.engine import federate
from atoll.federated.local.subspace_admm import aligned, excess, residual_gradient
from atoll.federated.methods.fedpca import fedpca
from atoll.federated.secure.secure_sum import SecureSum
from atoll.federated.select.uniform import Uniform
from atoll.models.subspace import Subspace, orthonormal
from atoll.models.user import User
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import start
from atoll.tasks.anomaly_detection import AnomalyDetection

VARIANTS = ["fedpg", "fedpe"]


def of(sites: list[Tensor], k: int = 2):  # type: ignore[no-untyped-def]
    """A world in which each site has the given rows."""
    info = Info(name="rows", shape=(sites[0].shape[1],), num_classes=2)
    data = [Dataset({"x": x, "y": torch.zeros(len(x), dtype=torch.int64)}, info) for x in sites]
    none = data[0].select([])
    federation = Federation(tuple(SiteData(d, none, none) for d in data), data[0], info=info)
    return {"federation": federation, "task": AnomalyDetection(info, Subspace(k))}


def rows_of(n: int, seed: int, scales=(3.0, 2.0, 1.0, 0.5, 0.2, 0.1)) -> Tensor:  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(seed)
    turn = orthonormal(torch.randn(6, 6, generator=torch.Generator().manual_seed(7)))
    return torch.randn(n, 6, generator=g) * torch.tensor(scales) @ turn.T


@pytest.fixture
def world():  # type: ignore[no-untyped-def]
    """Four sites of unequal size, each of which sees other directions well."""
    scales = [
        (3, 2, 0.5, 0.3, 0.2, 0.1),
        (0.5, 2, 3, 0.3, 0.2, 0.1),
        (2, 1, 2, 0.3, 0.2, 0.1),
        (1, 3, 1, 0.3, 0.2, 0.1),
    ]
    return of([rows_of(n, i, s) for i, (n, s) in enumerate(zip((40, 80, 120, 5), scales, strict=True))])


def run(world, method, rounds: int, **options):  # type: ignore[no-untyped-def]
    done = list(federate(method=method, rounds=rounds, evaluate_every=0, **world, **options))
    assert not any(r.refused or r.notes for r in done)
    return done[-1].engine


def basis(engine) -> Tensor:  # type: ignore[no-untyped-def]
    return engine.state.replica["weights"]["U"]


def kept(engine, site: int):  # type: ignore[no-untyped-def]
    parts = engine.workers.local.states.get(site, engine.state.tags[site]).parts
    return parts["local.admm"]


def angle(u: Tensor, v: Tensor) -> float:
    """The largest principal angle between two subspaces in degrees."""
    cosines = torch.linalg.svdvals(torch.linalg.qr(u.double())[0].T @ torch.linalg.qr(v.double())[0])
    return float(torch.rad2deg(torch.acos(cosines.min().clamp(max=1))))


def top(x: Tensor, k: int) -> Tensor:
    return torch.linalg.svd(x.double(), full_matrices=False).Vh[:k].T


# ------------------------------------------------------------------------------------------- mathematics


def test_the_gradient_is_that_of_the_mean_squared_residual():
    x, u = rows_of(30, 0).double(), torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    (x - x @ u @ u.T).square().sum().div(30).backward()
    s = x.T @ x / 30
    assert torch.allclose(residual_gradient(lambda v: s @ v, u.detach()), u.grad)


def test_the_penalty_of_fedpe_is_that_of_its_lagrangian():
    """<T, max(0, U^T U - I)> + rho/2 ||max(0, U^T U - I)||^2, by autograd."""
    u = torch.tensor([[1.0, 0.5, -1], [1, 0.1, 0], [0, 0.1, 2]], dtype=torch.float64, requires_grad=True)
    t = torch.rand(3, 3, dtype=torch.float64)
    t = t + t.T
    over, rho, zero = excess(u), 0.7, torch.zeros(3, 3, dtype=torch.float64)
    assert bool((over > 0).any())
    assert bool((over == 0).any())
    ((t * over).sum() + rho / 2 * over.square().sum()).backward()
    v = u.detach()
    local = fedpca("fedpe", rho=rho, lr=1.0).local
    step = v - local._step(lambda w: torch.zeros_like(w), v, zero, v, t)
    assert torch.allclose(step, u.grad)


def test_a_step_of_fedpg_by_hand():
    """On the circle, towards the larger eigenvalue: the tangent part of the gradient alone moves the vector."""
    s, u = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6], [0.8]])
    g = -2 * s @ u  # for unit vectors; what the general gradient adds lies along u
    tangent = g - u @ (u.T @ g)
    want = (u - 0.1 * tangent) / torch.linalg.vector_norm(u - 0.1 * tangent)
    got = fedpca("fedpg", rho=0.0, lr=0.1).local._step(lambda v: s @ v, u, torch.zeros(2, 1), u, torch.zeros(1, 1))
    assert torch.allclose(got, want, atol=1e-6)


def test_multiplier_and_consensus_move_the_span_alone():
    u, z, y = torch.tensor([[0.6], [0.8]]), torch.tensor([[1.0], [0.0]]), torch.tensor([[0.3], [-2.0]])
    pull = y + 2.0 * (u - z)
    tangent = pull - u @ (u.T @ pull)
    want = (u - 0.1 * tangent) / torch.linalg.vector_norm(u - 0.1 * tangent)
    got = fedpca("fedpg", rho=2.0, lr=0.1).local._step(torch.zeros_like, u, y, z, torch.zeros(1, 1))
    assert torch.allclose(got, want, atol=1e-6)


def test_alignment_keeps_the_subspace_and_undoes_a_turn():
    z = orthonormal(torch.randn(6, 2))
    turned = z @ orthonormal(torch.randn(2, 2)) @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert torch.allclose(aligned(turned, z), z, atol=1e-5)
    flipped = z * torch.tensor([1.0, -1.0])
    assert torch.allclose(aligned(flipped, z), z, atol=1e-5)


# ------------------------------------------------------------------------------------------- what must hold


def test_fedpg_is_orthonormal_at_all_times(world):
    method = fedpca("fedpg", lr=0.03).but(select=Uniform(count=2))
    for row in federate(method=method, rounds=8, evaluate_every=0, **world):
        engine = row.engine
        matrices = [basis(engine), *(kept(engine, i)["U"] for i in engine.state.tags)]
        for u in matrices:
            assert float((u.T @ u - torch.eye(2)).abs().max()) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [4, 200], ids=["fewer rows than numbers", "more"])
def test_one_site_converges_to_its_principal_components(variant, n):
    x = rows_of(n, 3)
    engine = run(of([x]), fedpca(variant, lr=0.02), rounds=30)
    assert angle(basis(engine), top(x, 2)) < 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_sites_agree_on_the_subspace_of_all_rows(world, variant):
    """What a mean of local steps alone does not reach: the multipliers take the drift out."""
    x = torch.cat([s.train.column("x") for s in world["federation"].sites])
    assert angle(basis(run(world, fedpca(variant, rho=5), rounds=40)), top(x, 2)) < 1
    assert angle(basis(run(world, fedpca(variant, rho=0), rounds=40)), top(x, 2)) > 10


@pytest.mark.parametrize("variant", VARIANTS)
def test_payload_is_the_matrix_each_way(world, variant):
    engine = run(world, fedpca(variant), rounds=2)
    assert engine.state.broadcast.common.payload_bytes == 4 * 6 * 2
    assert engine.workers.local.run(_job(engine)).message.payload_bytes == 4 * 6 * 2


def _job(engine):  # type: ignore[no-untyped-def]
    from atoll.federated.visit import Job

    return Job(0, engine.round, state_tag=engine.state.tags[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_multipliers_cancel_at_full_participation(world, variant):
    sizes = np.array([40, 80, 120, 5])
    for row in federate(method=fedpca(variant), rounds=6, evaluate_every=0, **world):
        engine = row.engine
        total = sum(w * kept(engine, i)["Y"] for i, w in enumerate(sizes / sizes.sum()))
        assert float(total.abs().max()) < 1e-6
    assert float(kept(engine, 0)["Y"].abs().max()) > 1e-2, "and they are not all zero"


def test_what_fedpg_sends_is_in_the_basis_that_came(world):
    """Z^T U is symmetric and positive for the nearest of all bases of a subspace."""
    engine = run(world, fedpca("fedpg"), rounds=1)
    z = run(world, fedpca("fedpg", lr=1e-12), rounds=1).state.replica["weights"]["U"]
    for site in range(4):
        turn = z.T @ kept(engine, site)["U"]
        assert torch.allclose(turn, turn.T, atol=1e-5)
        assert float(torch.linalg.eigvalsh(turn).min()) > 0


def test_the_multiplier_of_fedpes_constraint_grows_with_what_is_in_excess(world):
    engine = run(world, fedpca("fedpe", rho=0.7), rounds=1)
    for site in range(4):
        state = kept(engine, site)
        assert torch.allclose(state["T"], 0.7 * excess(state["U"]))
    assert max(float(kept(engine, i)["T"].max()) for i in range(4)) > 0


# ------------------------------------------------------------------------------------------- use


class Tied(nn.Module):
    """A user's own autoencoder with one matrix."""

    def __init__(self, outputs: int, k: int = 3) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.rand(outputs, k))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.code @ self.code.T


def test_a_users_module_with_one_matrix(world):
    task = replace(world["task"], network=User(Tied))
    engine = run({**world, "task": task}, fedpca(lr=0.02), rounds=5)
    u = engine.state.replica["weights"]["code"]
    assert torch.allclose(u.T @ u, torch.eye(3), atol=1e-5)


def test_other_models_are_refused(run, digits_task):
    with pytest.raises(RecipeError, match=r"a subspace is one matrix .* use `model: subspace`"):
        run(fedpca(), rounds=1, task=digits_task)


def test_too_large_a_step_is_the_sites_failure_in_a_sentence(world):
    (row,) = federate(method=fedpca("fedpe", lr=5.0), rounds=1, evaluate_every=0, **world)
    assert len(row.refused) == 4
    assert "use an `lr` below 5" in row.refused[0]


def test_codecs_and_secure_sums_go_with_it(world):
    x = torch.cat([s.train.column("x") for s in world["federation"].sites])
    rough = run(world, fedpca(rho=5).but(uplink=(Quantise(bits=8),)), rounds=30)
    assert angle(basis(rough), top(x, 2)) < 3
    pytest.importorskip("cryptography")
    secret = run(world, fedpca(lr=0.02).but(secure=SecureSum(clip=4.0, bits=24)), rounds=2)
    assert torch.allclose(basis(secret), basis(run(world, fedpca(lr=0.02), rounds=2)), atol=1e-4)


def test_digits_with_one_class_as_the_anomaly():
    federation = make_federation(Anomalies(Digits(), anomalous=("0",)), FeatureSorted("20"), sites=5)
    task = AnomalyDetection(federation.info, Subspace(4))
    metrics = list(federate(task, federation, fedpca(lr=0.03), rounds=25, evaluate_every=25))[-1].metrics
    x = torch.cat([s.train.ready()["x"].flatten(1) for s in federation.sites])
    model = task.model(0)
    with torch.no_grad():
        model.U.copy_(top(x, 4))
    assert metrics["residual"] < 1.05 * task.evaluate(model, federation.test)["residual"]


def test_from_a_recipe(tmp_path):
    recipe = {
        "data": "anomalies", "partition": {"name": "feature_sorted", "feature": "mean radius"}, "sites": 4, "rounds": 3,
        "task": "anomaly_detection", "model": {"name": "subspace", "k": 3}, "method": "fedpca",
    }  # fmt: skip
    runs = [start(read_recipe(recipe), tmp_path / name)[0].go() for name in "ab"]
    assert runs[0]["metrics"] == runs[1]["metrics"]
    with pytest.raises(RecipeError, match=r"`method.variant`.*fedpq"):
        read_recipe({**recipe, "method": {"name": "fedpca", "variant": "fedpq"}})
