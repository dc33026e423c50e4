"""Methods that need other data than the digits, or another kind of network, get it under the same fixtures."""

from __future__ import annotations

import pytest

from atoll.data.federation import make_federation
from atoll.data.partitions.iid import Iid
from atoll.data.sources.stochastic_blocks import StochasticBlocks
from atoll.models.mlp import MLP
from atoll.models.subspace import Subspace
from atoll.models.unet import UNet
from atoll.models.vit import ViT
from atoll.tasks.anomaly_detection import AnomalyDetection
from atoll.tasks.classification import Classification
from atoll.tasks.denoising import Denoising
from atoll.tasks.node_classification import NodeClassification

GRAPHS = {"fed_gnodeformer"}
SUBSPACES = {"fedpca": Subspace(4)}  # as `run` has it
DENOISERS = {"ddm"}
NETWORKS = {"fedmgp": ViT(patch=4, dim=8, layers=2, heads=2)}


def _name(request: pytest.FixtureRequest) -> str:
    callspec = getattr(request.node, "callspec", None)
    return str(callspec.params.get("name", "")) if callspec else ""


@pytest.fixture(scope="session")
def blocks():
    """A random graph of four classes, shared by five sites."""
    return make_federation(StochasticBlocks(nodes=300, degree=30), Iid(), sites=5, validation=0.0, test=0.2)


@pytest.fixture
def digits_federation(request, digits_federation, blocks):
    return blocks if _name(request) in GRAPHS else digits_federation


@pytest.fixture
def digits_task(request, digits, digits_task, blocks):
    if network := SUBSPACES.get(_name(request)):
        return AnomalyDetection(digits.info, network)
    if _name(request) in DENOISERS:
        return Denoising(digits.info, UNet(width=8))
    if network := NETWORKS.get(_name(request)):
        return Classification(digits.info, network)
    return NodeClassification(blocks.info, MLP(hidden=(16,))) if _name(request) in GRAPHS else digits_task
