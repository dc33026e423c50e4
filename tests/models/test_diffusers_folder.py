"""A diffusers checkpoint as the model of a recipe: adapted by sites together, saved as diffusers has it."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from atoll.core.errors import DataError, RecipeError
from atoll.core.tree import equal, named_tensors
from atoll.data.dataset import Dataset, Federation, Info, SiteData
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.diffusers_model import from_diffusers, load_denoiser, save_denoiser
from atoll.diffusion.discrete_vp import DiscreteVP
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.check import check_method
from atoll.federated.engine import federate
from atoll.federated.local.training import Training
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.flora import flora
from atoll.models.diffusers_folder import DiffusersFolder
from atoll.models.export import load_model
from atoll.models.model import build_model
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import start
from atoll.tasks.classification import Classification
from atoll.tasks.denoising import Denoising

with warnings.catch_warnings():  # of the library's imports
    warnings.simplefilter("ignore")
    from diffusers import DDPMScheduler, DiTTransformer2DModel, PixArtTransformer2DModel

SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "num_layers": 1, "sample_size": 8}


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> str:
    """A checkpoint for digits: one channel of 8 x 8, ten classes, learned variance."""
    folder = tmp_path_factory.mktemp("dit")
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**SMALL, out_channels=2, num_embeds_ada_norm=10, norm_num_groups=2)
    save_denoiser(from_diffusers(model, DDPMScheduler()), folder)
    return str(folder)


@pytest.fixture(scope="module")
def few(digits: Dataset) -> Federation:
    empty = digits.select([])
    sites = tuple(SiteData(digits.select(range(40 * i, 40 * i + 40)), empty, empty) for i in range(3))
    return Federation(sites, digits.select(range(200, 260)), public=None, info=digits.info)


def test_it_builds_what_is_in_the_folder(dit, digits):
    builder = DiffusersFolder(path=dit)
    net, again = (build_model(builder, digits.info, 10, seed) for seed in (0, 1))
    assert equal(named_tensors(net), named_tensors(again)), "its weights are the folder's, whatever the seed"
    fresh, other, same = (build_model(builder.architecture, digits.info, 10, seed) for seed in (0, 1, 0))
    assert named_tensors(fresh).keys() == named_tensors(net).keys()
    assert equal(named_tensors(fresh), named_tensors(same))
    assert not equal(named_tensors(fresh), named_tensors(other))
    assert net(torch.randn(2, 1, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([0, 10])).shape == (2, 1, 8, 8)
    task = Denoising(digits.info, builder, sigma_data=0.7)
    model = task.model(0)
    assert isinstance(model.schedule, DiscreteVP)
    assert (model.predicts, model.sigma_data, model.classes) == ("eps", 0.7, 10)
    check_method(fedavg(), task, Federation((), digits, public=None, info=digits.info))


@pytest.mark.parametrize("method", [flora(ranks=(2, 3)), fedavg(Training(lr=1e-3, optimizer="adam"))], ids=["flora", "fedavg"])  # fmt: skip
def test_sites_adapt_it_together_with_the_same_bits_anywhere(method, dit, few):
    task = Denoising(few.info, DiffusersFolder(path=dit, checkpointing=True))
    ends = []
    for more in ({}, {"backend": ProcessPool(workers=2)}):
        rows = list(federate(task, few, method, rounds=2, **more))
        assert not any(r.refused for r in rows)
        ends.append((rows[-1].engine.state.replica, [dict(r.metrics) for r in rows]))
    (here, metrics), (there, metrics_) = ends
    assert metrics == metrics_
    assert all(equal(here[p], there[p]) for p in here)
    before = named_tensors(task.model(0))
    assert any(not torch.equal(t, before[n]) for n, t in here["weights"].items())


@pytest.mark.parametrize("method", ["flora", "fedavg"])
def test_a_run_leaves_a_folder_of_diffusers(method, dit, tmp_path):
    recipe = read_recipe(
        {"task": "denoising", "data": "digits", "limit": 120, "sites": 2, "rounds": 1, "method": method,
         "model": {"name": "diffusers_folder", "path": dit}}
    )  # fmt: skip
    run, foreseen = start(recipe, tmp_path / "run")
    summary = run.go()
    assert (foreseen.up_bytes, foreseen.down_bytes) == (summary["up_bytes"], summary["down_bytes"])
    folder = tmp_path / "run" / "model"
    theirs = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer").eval()
    said = json.loads((folder / "model.json").read_text())
    assert said["load"] == ["diffusers.DiTTransformer2DModel.from_pretrained(folder, subfolder='transformer')"]
    x, k, label = torch.randn(2, 1, 8, 8), torch.tensor([10, 700]), torch.tensor([3, 4])
    setup = run.prepared.setup
    for model in (load_model(folder), load_denoiser(folder)):
        assert isinstance(model, Denoiser)
        assert setup.task.evaluate(model, setup.federation.test) == summary["metrics"]
        with torch.no_grad():
            got = model.predict(x, (k + 1) / 1000, label, "eps")
            assert torch.allclose(got, theirs(x, k, class_labels=label).sample[:, :1], atol=1e-4)
    start_ = named_tensors(setup.task.model(0))
    assert any(not torch.equal(t, start_[n]) for n, t in named_tensors(load_model(folder)).items())


def test_rows_may_bring_the_embedding_of_a_text(tmp_path):
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(**SMALL, out_channels=2, cross_attention_dim=16, caption_channels=12)
    save_denoiser(from_diffusers(model, DDPMScheduler()), tmp_path)
    info = Info(name="captioned", kind="image", shape=(1, 8, 8))
    rows = Dataset({"x": torch.randn(30, 1, 8, 8), "cond": torch.randn(30, 4, 12)}, info)
    empty = rows.select([])
    sites = tuple(SiteData(rows.select(range(10 * i, 10 * i + 10)), empty, empty) for i in range(2))
    federation = Federation(sites, rows.select(range(20, 30)), public=None, info=info)
    task = Denoising(info, DiffusersFolder(path=str(tmp_path)))
    metrics = list(federate(task, federation, flora(ranks=(2,)), rounds=1))[-1].metrics
    assert torch.isfinite(torch.tensor(metrics["loss"]))
    other = rows.with_column("cond", torch.randn(30, 4, 12))
    found = task.evaluate(task.model(0).eval(), rows)["loss"]
    assert found != task.evaluate(task.model(0).eval(), other)["loss"], "it listens to them"
    with pytest.raises(DataError, match="`captioned` has no column `cond`"):
        task.loss(task.model(0), rows.without_column("cond").ready())


def test_what_does_not_fit_is_refused(dit, digits, few):
    builder = DiffusersFolder(path=dit)
    with pytest.raises(DataError, match=r"makes samples of 1 channels; a row of `wide` is 3 x 8 x 8"):
        build_model(builder, Info(name="wide", kind="image", shape=(3, 8, 8)), 10, 0)
    with pytest.raises(DataError, match="tells 10 classes apart, and `digits` has 11"):
        build_model(builder, digits.info, 11, 0)
    with pytest.raises(DataError, match="There is no folder"):
        build_model(DiffusersFolder(path="nowhere"), digits.info, 10, 0)
    with pytest.raises(RecipeError, match=r"DiffusersFolder takes noisy rows .*Classification does not"):
        check_method(fedavg(), Classification(few.info, builder), few)
