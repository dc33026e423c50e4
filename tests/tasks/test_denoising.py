"""Denoising at sites: the loss is EDM's (or a flow's), its noise follows the worker's seed, and it rides with every part."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from atoll.core.build import Deferred
from atoll.core.errors import AtollError, DataError, RecipeError
from atoll.core.tree import clone, equal, named_tensors
from atoll.data.dataset import Dataset, Federation, Info, SiteData
from atoll.diffusion.denoiser import Denoiser
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.check import check_method
from atoll.federated.codecs.clip import Clip
from atoll.federated.codecs.gaussian_noise import GaussianNoise
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.combine.weighted_mean import WeightedMean
from atoll.federated.engine import federate
from atoll.federated.local.training import Training
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.fedbn import fedbn
from atoll.federated.methods.fedprox import fedprox
from atoll.federated.methods.flora import flora
from atoll.federated.methods.scaffold import scaffold
from atoll.models.checkpoint import Checkpoint
from atoll.models.dit import DiT
from atoll.models.export import load_model
from atoll.models.logistic import Logistic
from atoll.models.mlp import MLP
from atoll.models.model import seeded
from atoll.models.unet import UNet
from atoll.models.user import User
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import prepare, reopen, start
from atoll.tasks.classification import Classification
from atoll.tasks.denoising import Denoising

SMALL = DiT(patch=4, dim=16, layers=1, heads=2)
LITTLE = UNet(width=4)
ADAM = Training(lr=3e-3, optimizer="adam")


class Remembers(nn.Module):
    """A module of one's own: a line through the origin, that notes what it was asked."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((outputs + 1,), 0.3))
        self.asked: list[tuple[torch.Tensor, ...]] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        self.asked.append((x.detach().clone(), t.clone(), label.clone()))
        return self.slope[label].view(-1, *[1] * (x.dim() - 1)) * x


@pytest.fixture(scope="module")
def few(digits: Dataset) -> Federation:
    """Three sites of 40 rows."""
    empty = digits.select([])
    sites = tuple(SiteData(digits.select(range(40 * i, 40 * i + 40)), empty, empty) for i in range(3))
    return Federation(sites, digits.select(range(200, 260)), public=None, info=digits.info)


# ------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_that_of_the_papers(digits):
    batch = digits.ready(torch.arange(6))
    x = batch["x"] * 0.5
    for kind in ("edm", "flow"):
        task = Denoising(digits.info, User(Remembers), kind=kind)
        model = task.model(0).eval()
        torch.manual_seed(5)
        losses = task.loss(model, batch)
        ((seen, time, label),) = model.net.asked
        assert losses.shape == (6,)
        assert torch.equal(label, batch["y"]), "nothing is hidden outside of training"
        if kind == "edm":  # Karras et al. (2022), table 1, from what the network was asked
            sigma = (4 * time).exp().view(-1, 1, 1, 1)
            noisy = seen * (sigma**2 + 0.25).sqrt()
            target = (x - 0.25 / (sigma**2 + 0.25) * noisy) / (sigma * 0.5 / (sigma**2 + 0.25).sqrt())
            want = (0.3 * seen - target).square().flatten(1).mean(1)
        else:
            t = time.view(-1, 1, 1, 1)
            noise = (seen - (1 - t) * x) / t
            want = (0.3 * seen - (noise - x)).square().flatten(1).mean(1)
        assert torch.allclose(losses, want, rtol=1e-4)


def test_noise_levels_follow_the_usual_law(digits):
    rows = digits.ready(torch.arange(1000))
    for kind, mean, std in (("edm", -1.2, 1.2), ("flow", 0.0, 1.0)):
        task = Denoising(digits.info, User(Remembers), kind=kind)
        model = task.model(0)
        torch.manual_seed(0)
        task.loss(model, rows)
        time = model.net.asked[0][1]
        drawn = 4 * time if kind == "edm" else torch.logit(time)
        assert float(drawn.mean()) == pytest.approx(mean, abs=0.15)
        assert float(drawn.std()) == pytest.approx(std, abs=0.1)


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.6])
def test_some_classes_are_hidden_in_training(digits, drop):
    rows = digits.ready(torch.arange(1500))
    task = Denoising(digits.info, User(Remembers), drop=drop)
    model = task.model(0).train()
    torch.manual_seed(1)
    task.mean_loss(model, rows)
    label = model.net.asked[0][2]
    hidden = label == 10
    assert float(hidden.float().mean()) == pytest.approx(drop, abs=0.03)
    assert torch.equal(label[~hidden], rows["y"][~hidden])


def test_noise_comes_from_the_global_generator_and_is_fresh(digits):
    task, batch = Denoising(digits.info, LITTLE), digits.ready(torch.arange(8))
    model = task.model(0)
    torch.manual_seed(3)
    first, second = task.loss(model, batch), task.loss(model, batch)
    torch.manual_seed(3)
    again = task.loss(model, batch)
    assert torch.equal(first, again)
    assert not torch.allclose(first, second)
    task = Denoising(digits.info, User(Remembers), kind="flow")
    model = task.model(0)
    for _ in range(2):
        task.loss(model, batch)
    noise = [(x - (1 - t.view(-1, 1, 1, 1)) * batch["x"] * 0.5) / t.view(-1, 1, 1, 1) for x, t, _ in model.net.asked]
    assert not torch.allclose(noise[0], noise[1], atol=0.1), "the noise is fresh, not only its level"
    assert float(noise[0].std()) == pytest.approx(1, abs=0.1)


def test_rows_without_classes_are_of_one():
    info = Info(name="shapes", kind="image", shape=(1, 8, 8))
    data = Dataset({"x": torch.randn(20, 1, 8, 8), "y": torch.randn(20)}, info)
    task = Denoising(info, User(Remembers))
    model = task.model(0)
    assert task.outputs == 1
    task.loss(model, data.ready())
    assert set(model.net.asked[0][2].tolist()) <= {0, 1}
    classes = Denoising(dataclasses.replace(info, num_classes=3), User(Remembers))
    model = classes.model(0)
    classes.loss(model, {"x": torch.randn(20, 1, 8, 8)})
    assert set(model.net.asked[0][2].tolist()) == {3}, "nobody knows their class"


# ------------------------------------------------------------------------------------------- evaluation


def test_evaluation_repeats_changes_nothing_and_sees_fixed_levels(digits):
    data = digits.select(range(100))
    task = Denoising(digits.info, User(Remembers), levels=5)
    model = task.model(0).train()
    before, generator = clone(named_tensors(model)), torch.get_rng_state()
    first = task.evaluate(model, data)
    torch.rand(7)
    assert task.evaluate(model, data) == first
    assert model.training
    torch.set_rng_state(generator)
    task.evaluate(model, data)
    assert torch.equal(torch.get_rng_state(), generator)
    assert equal(before, named_tensors(model))
    time = torch.cat([t for _, t, _ in model.net.asked[:1]])
    assert len(time.unique()) == 5
    assert torch.equal(time[:5], time[5:10])
    assert time[:5].tolist() == sorted(time[:5].tolist())
    normal = torch.distributions.Normal(-1.2, 1.2)
    assert torch.allclose(4 * time[:5], normal.icdf((torch.arange(5) + 0.5) / 5), atol=0.1)
    noise = [x for x, _, _ in model.net.asked]
    assert torch.equal(noise[0], noise[1])


def test_the_loss_of_an_evaluation_is_the_mean_over_rows(digits):
    task = Denoising(digits.info, LITTLE)
    model, data = task.model(0), digits.select(range(30))
    wide = dataclasses.replace(
        digits.info, shape=(1, 8, 8 * 2**17)
    )  # so few rows at a time that there are many batches
    one = task.evaluate(model, data)["loss"]
    many = task.evaluate(model, data.about(wide))["loss"]
    assert math.isfinite(one)
    assert many == pytest.approx(one, rel=0.2), "other noise, as many rows"


def test_a_guess_has_the_units_of_the_rows(digits):
    task = Denoising(digits.info, LITTLE)
    model, batch = task.model(0).eval(), digits.ready(torch.arange(200))
    with torch.no_grad(), seeded(0, "t"):
        guess = task.predict(model, batch)
    # An untrained network answers c_skip x_t, half of a row and as much noise: E (guess - x)^2 = x^2/4 + 1/4.
    assert guess.shape == batch["x"].shape
    want = float(batch["x"].square().mean() / 4 + 0.25)
    assert float((guess - batch["x"]).square().mean()) == pytest.approx(want, rel=0.05)


# ------------------------------------------------------------------------------------------- with every part


METHODS = {
    "fedavg": (fedavg(ADAM), LITTLE),
    "fedprox": (fedprox(0.1), LITTLE),
    "scaffold": (scaffold(), LITTLE),
    "flora": (flora(ranks=(2, 4)), SMALL),
    "fedbn": (fedbn(), LITTLE),
    "quantise": (fedavg(ADAM).but(uplink=(Quantise(bits=8),)), SMALL),
    "private": (
        fedavg().but(uplink=(Clip(0.1), GaussianNoise(1.0, 0.1, test_seed=1, allow_insecure_test_seed=True)),
                     combine=WeightedMean(by="uniform")), LITTLE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", METHODS)
def test_a_pool_gives_the_same_bits(case, few):
    method, network = METHODS[case]
    task = Denoising(few.info, network)
    ends = []
    for backend in ({}, {"backend": ProcessPool(workers=2)}):
        seen = []
        rows = list(federate(task, few, method, rounds=2, on_merge=lambda e, _, s=seen: s.append(e.evaluate_sites("common")), **backend))  # fmt: skip
        assert not any(r.refused for r in rows)
        ends.append((rows[-1].engine.state.replica, [dict(r.metrics) for r in rows], seen))
    (here, metrics, sites), (there, metrics_, sites_) = ends
    assert metrics == metrics_
    assert sites == sites_
    assert all(equal(here[p], there[p]) for p in here)
    start = {n.replace(".base_layer", ""): t for n, t in named_tensors(task.model(0)).items()}
    assert any(not torch.equal(t, start[n]) for n, t in here["weights"].items() if n in start), "something was learned"


@pytest.mark.parametrize("kind", ["edm", "flow"])
def test_sites_learn_to_denoise_together(kind, few):
    task = Denoising(few.info, UNet(width=8), kind=kind)
    method = fedavg(Training(lr=3e-3, optimizer="adam", epochs=3, batch_size=20))
    losses = [r.metrics["loss"] for r in federate(task, few, method, rounds=8)]
    assert losses[-1] < 0.8 * task.evaluate(task.model(0), few.test)["loss"]


def recipe(**changes):
    base = {
        "name": "noise", "task": "denoising", "data": "digits", "limit": 150, "sites": 3, "rounds": 3,
        "model": {"name": "unet", "width": 4},
        "method": {"name": "scaffold"},
    }  # fmt: skip
    return read_recipe({**base, **changes})


@pytest.mark.parametrize(
    "changes",
    [{}, {"method": "flora", "model": {"name": "dit", "dim": 16, "layers": 1, "heads": 2}},
     {"task": {"name": "denoising", "kind": "flow", "sigma_data": 1.0}, "uplink": [{"name": "quantise", "bits": 4}]}],
    ids=["scaffold", "flora", "flow, coded"],
)  # fmt: skip
def test_a_run_costs_what_was_planned_resumes_and_loads(changes, tmp_path):
    made = recipe(**changes)
    run, foreseen = start(made, tmp_path / "calm")
    summary = run.go()
    assert (foreseen.up_bytes, foreseen.down_bytes) == (summary["up_bytes"], summary["down_bytes"])
    assert foreseen.exact
    assert foreseen.flops == pytest.approx(summary["flops"])
    broken, _ = start(made, tmp_path / "broken")
    engine_rows = 0

    class Stop(Exception):
        pass

    def stop(row):
        nonlocal engine_rows
        engine_rows += 1
        if engine_rows == 2:
            raise Stop

    with pytest.raises(Stop):
        broken.go(stop)
    assert reopen(tmp_path / "broken").go()["metrics"] == summary["metrics"]
    models = [load_model(tmp_path / name / "model") for name in ("calm", "broken")]
    assert equal(*(named_tensors(m) for m in models))
    model, setup = models[0], prepare(made).setup
    assert isinstance(model, Denoiser)
    assert setup.task.evaluate(model, setup.federation.test) == summary["metrics"]
    assert type(model.schedule).__name__ == ("RF" if "task" in changes else "EDM")
    assert json.loads((tmp_path / "calm" / "model" / "model.json").read_text())["wrapper"]["name"] == "as_denoiser"


def test_a_module_of_ones_own_and_a_checkpoint_go_too(few, tmp_path):
    task = Denoising(few.info, User(Remembers))
    rows = list(federate(task, few, fedavg(ADAM), rounds=1))
    assert math.isfinite(rows[-1].metrics["loss"])
    whole = Denoiser(Remembers(10), task.model(0).schedule, "edm", classes=10)
    assert type(Denoising(few.info, User(whole)).model(0)) is Denoiser, "a finished denoiser stays as it is"
    start(recipe(method="fedavg", rounds=1), tmp_path / "run")[0].go()
    again = recipe(method="fedavg", model={"name": "checkpoint", "path": str(tmp_path / "net"), "network": "unet"})
    check_method(fedavg(), again.make_task(few.info), few)


# ------------------------------------------------------------------------------------------- refusals


def test_networks_and_tasks_that_do_not_fit_are_refused_before_anything_runs(few, tmp_path):
    with pytest.raises(RecipeError, match=r"Denoising gives its network noisy rows .* MLP does not take"):
        check_method(fedavg(), Denoising(few.info, MLP()), few)
    with pytest.raises(RecipeError, match=r"UNet takes noisy rows .* Classification does not give it"):
        check_method(fedavg(), Classification(few.info, UNet()), few)
    with pytest.raises(RecipeError, match="Logistic does not take"):
        check_method(fedavg(), Denoising(few.info, LITTLE, (LITTLE, Logistic())), few)
    with pytest.raises(RecipeError, match="MLP does not take"):
        check_method(fedavg(), Denoising(few.info, Checkpoint(path="x")), few)
    with pytest.raises(AtollError, match="does not take"):
        start(recipe(model="cnn"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_method(fedavg(), Denoising(few.info, User(Remembers)), few)
    check_method(fedavg(), Classification(few.info, User(Remembers)), few)


def test_rows_that_cannot_be_noisy_are_refused():
    for kind in ("text", "graph"):
        with pytest.raises(DataError, match="no noise can be added"):
            Denoising(Info(name="w", kind=kind, shape=(4,), num_classes=9)).model(0)


@pytest.mark.parametrize("wrong", [{"kind": "vp"}, {"sigma_data": 0}, {"drop": 1.0}, {"levels": 0}])
def test_settings_have_bounds(wrong):
    with pytest.raises(RecipeError):
        recipe(task={"name": "denoising", **wrong})
    assert isinstance(recipe().task, Deferred)
