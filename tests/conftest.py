"""Fixtures on tiny real data: scikit-learn's digits, split over a few sites."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from atoll.data.dataset import Dataset, Federation, Info, SiteData
from atoll.diffusion.distiller import Conditions, Images, Work
from atoll.diffusion.methods.edm_fm_teacher import EdmFmTeacher
from atoll.diffusion.trainer import Trainer
from atoll.federated.backends.ray import Crew, Ray
from atoll.federated.engine import federate
from atoll.federated.ledger import Row
from atoll.models.export import about_model, save_model
from atoll.models.mlp import MLP
from atoll.models.subspace import Subspace
from atoll.models.unet import UNet
from atoll.tasks.anomaly_detection import AnomalyDetection
from atoll.tasks.classification import Classification
from atoll.tasks.denoising import Denoising

OF_ROWS = {"fedpca": Subspace(4)}
"""Methods that are for rows alone, without classes, and what they train."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Many small operators: one thread is the fastest, and results do not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """1,797 images of 8 x 8 in bytes 0..16, in a fixed random order."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    info = Info(name="digits", kind="image", shape=(1, 8, 8), num_classes=10, unit=1 / 16)
    x = torch.tensor(raw.images, dtype=torch.uint8)[:, None]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return Dataset({"x": x[order], "y": torch.tensor(raw.target)[order]}, info)


def split_by_label(data: Dataset, sites: int, test: int = 300) -> Federation:
    """Sites of unequal size and label mix: site i prefers the labels around i."""
    train, held = data.select(range(test, len(data))), data.select(range(test))
    y = train.column("y")
    lean = (y * sites // 10 + torch.arange(len(y)) % 3) % sites
    empty = data.select([])
    parts = []
    for s in range(sites):
        rows = torch.nonzero(lean == s).flatten()
        cut = int(len(rows) * 0.8)
        parts.append(SiteData(train.select(rows[:cut]), empty, train.select(rows[cut:])))
    return Federation(tuple(parts), held, public=None, info=data.info)


@pytest.fixture(scope="session")
def generator(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small denoiser that has learned a little."""
    task, folder = Denoising(digits.info, UNet(width=8)), tmp_path_factory.mktemp("generator")
    work = Work(digits.info.shape, Conditions.classes(10), Images(digits), batch=64)
    trainer = Trainer(EdmFmTeacher(lr=5e-3), task.model(0), work, steps=60)  # type: ignore[arg-type]
    trainer.go()
    about = about_model(task.network, task.info, task.outputs, 0, task.wrapper)
    save_model(trainer.nets["student_ema"], folder, about)
    return str(folder)


@pytest.fixture(scope="session")
def digits_federation(digits: Dataset) -> Federation:
    """Five sites."""
    return split_by_label(digits, 5)


@pytest.fixture(scope="session")
def digits_task(digits: Dataset) -> Classification:
    """A small MLP on digits."""
    return Classification(digits.info, MLP(hidden=(32,)))


@pytest.fixture
def run(digits_task: Classification, digits_federation: Federation):  # type: ignore[no-untyped-def]
    """``run(method, rounds=3, **options)`` -> the ledger rows; the last row's engine holds the model."""

    def go(method, rounds: int = 3, **options) -> list[Row]:  # type: ignore[no-untyped-def]
        network = OF_ROWS.get(method.card.name)
        task = AnomalyDetection(digits_task.info, network) if network else digits_task
        options = {"task": task, "federation": digits_federation, **options}
        return list(federate(method=method, rounds=rounds, **options))

    return go


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    """Two actors of a Ray cluster on this machine, a backend for many runs: a start takes seconds. A program has one
    cluster at a time, so it must end before other tests start theirs."""
    pytest.importorskip("ray")
    with Crew(Ray(workers=2)) as open_crew:
        yield open_crew
