"""Methods that need other data than the digits, or another kind of network, get it under the same fixtures."""

from __future__ import annotations

import importlib

import pytest

from atoll.data.federation import make_federation
from atoll.data.partitions.iid import Iid
from atoll.data.sources.stochastic_blocks import StochasticBlocks
from atoll.diffusion.solvers import Sampler
from atoll.federated.local.training import Training
from atoll.federated.method import Method
from atoll.models.mlp import MLP
from atoll.models.subspace import Subspace
from atoll.models.unet import UNet
from atoll.models.vit import ViT
from atoll.tasks.anomaly_detection import AnomalyDetection
from atoll.tasks.classification import Classification
from atoll.tasks.denoising import Denoising
from atoll.tasks.distilling import Distilling
from atoll.tasks.node_classification import NodeClassification

GRAPHS = {"fed_gnodeformer"}
SUBSPACES = {"fedpca": Subspace(4)}  # as `run` has it
DENOISERS = {"ddm"}
DISTILLERS = {"distil_at_sites"}
ARGUMENTS: dict[str, dict[str, object]] = {
    "ddm": {"training": Training(epochs=1), "samples": 10, "sampler": Sampler(steps=2), "steps": 3},  # 20 epochs else
    "distil_at_sites": {"steps": 2, "batch": 8, "rounds": 3},
    "fed_hh": {"column": "y", "test_seed": 1, "allow_insecure_test_seed": True},  # its noise would differ in each run
    "fedadob": {"passports": 2, "test_seed": 1, "allow_insecure_test_seed": True},  # each run would draw others
    "fedbuff": {"k": 2},
    "fedkseed": {"steps": 5, "pool": 64},  # 200 steps of two forward passes say no more here
    "pacfl": {"test_seed": 1, "allow_insecure_test_seed": True},  # the same as fedadob
}
"""Of methods that cannot be shown on digits with their defaults, or not soon."""
NETWORKS = {"fedmgp": ViT(patch=4, dim=8, layers=2, heads=2)}


def _name(request: pytest.FixtureRequest) -> str:
    callspec = getattr(request.node, "callspec", None)
    return str(callspec.params.get("name", "")) if callspec else ""


@pytest.fixture(scope="session")
def build():
    """``build(name)`` -> a method of the package, by name."""

    def made(name: str) -> Method:
        module = importlib.import_module(f"atoll.federated.methods.{name}")
        return getattr(module, name)(**ARGUMENTS.get(name, {}))

    return made


@pytest.fixture(scope="session")
def blocks():
    """A random graph of four classes, shared by five sites."""
    return make_federation(StochasticBlocks(nodes=300, degree=30), Iid(), sites=5, validation=0.0, test=0.2)


@pytest.fixture
def digits_federation(request, digits_federation, blocks):
    return blocks if _name(request) in GRAPHS else digits_federation


@pytest.fixture
def digits_task(request, digits, digits_task, blocks, generator):
    if network := SUBSPACES.get(_name(request)):
        return AnomalyDetection(digits.info, network)
    if _name(request) in DENOISERS:
        return Denoising(digits.info, UNet(width=8))
    if _name(request) in DISTILLERS:
        return Distilling(digits.info, start=generator, samples=50)
    if network := NETWORKS.get(_name(request)):
        return Classification(digits.info, network)
    return NodeClassification(blocks.info, MLP(hidden=(16,))) if _name(request) in GRAPHS else digits_task
