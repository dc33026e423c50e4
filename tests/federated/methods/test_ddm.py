"""ddm: experts that never see each other, one letter each, and a router that has seen no row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from atoll.core.errors import AtollError, RecipeError
from atoll.core.message import Message
from atoll.core.tree import clone, equal, named_tensors
from atoll.data.dataset import Federation
from atoll.data.federation import make_federation
from atoll.data.partitions.by_column import ByColumn
from atoll.data.source import Loaded, Source
from atoll.data.sources.digits import Digits
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.experts import ExpertEnsemble
from atoll.diffusion.solvers import Sampler
from atoll.federated.codecs.clip import Clip
from atoll.federated.codecs.gaussian_noise import GaussianNoise
from atoll.federated.engine import federate
from atoll.federated.local.training import Training
from atoll.federated.method import Method
from atoll.federated.methods.ddm import ddm
from atoll.federated.methods.local_only import local_only
from atoll.federated.select.uniform import Uniform
from atoll.federated.share.experts import expert
from atoll.models.export import load_model
from atoll.models.unet import UNet
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import start
from atoll.tasks.classification import Classification
from atoll.tasks.denoising import Denoising

TRAINING = Training(lr=2e-3, optimizer="adam", epochs=1, batch_size=32)


class Owned(Source):
    """300 digits; sites have classes 0 to 3, 4 to 6, and 7 to 9."""

    def load(self) -> Loaded:
        data = Digits().load().train.select(range(300))
        return Loaded(train=data.with_column("site", (data.column("y") >= 4).long() + (data.column("y") >= 7).long()))


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    federation = make_federation(Owned(), ByColumn(), validation=0.0, test=0.2)
    return {"federation": federation, "task": Denoising(federation.info, UNet(width=8))}


def small(**more: Any) -> Method:
    return ddm(**{"training": TRAINING, "samples": 20, "sampler": Sampler(steps=3), "steps": 10, **more})


def go(world: dict[str, Any], method: Method, rounds: int = 1, **options: Any) -> list[Any]:
    rows = list(federate(method=method, rounds=rounds, **{**world, **options}))
    assert not any(r.refused or r.notes for r in rows), [(r.refused, r.notes) for r in rows]
    return rows


def ensemble_in(engine: Any) -> ExpertEnsemble:
    model = engine.method.share.export(engine.workers.local.site_model(None).model, engine.state.replica)
    assert isinstance(model, ExpertEnsemble)
    return model


def test_an_expert_is_what_its_site_would_have_alone_bit_for_bit(world: dict[str, Any]) -> None:
    """Its training touches no other part: also other rows elsewhere do not matter."""
    rows = go(world, small())
    engine = rows[-1].engine
    alone = go(world, local_only(TRAINING))[-1].engine
    for site in range(3):
        own = alone.workers.local.states.get(site, alone.state.tags[site]).parts["private"]
        assert equal(engine.state.server[f"expert{site}"], own)
        assert equal(expert(engine.state.replica["weights"], site), own)
    federation: Federation = world["federation"]
    other = replace(federation.sites[2], train=federation.sites[2].train.select(range(10)))
    changed = replace(federation, sites=(*federation.sites[:2], other))
    again = go(world, small(), federation=changed)[-1].engine
    for site in range(3):
        same = equal(engine.state.server[f"expert{site}"], again.state.server[f"expert{site}"])
        assert same == (site < 2)


def test_one_letter_goes_up_and_nothing_comes_down(world: dict[str, Any]) -> None:
    rows = go(world, small(), rounds=2)
    size = sum(t.numel() * 4 for t in named_tensors(world["task"].model(0)).values())
    for row in rows:
        assert all(size < n < size * 1.1 for n in row.up_bytes.values())
        assert all(n < 2000 for n in row.down_bytes.values())
    engine = rows[-1].engine
    told = {site: t.tolist() for site, t in engine.state.server["counts"].items()}
    for i, site in enumerate(world["federation"].sites):
        assert told[str(i)] == site.train.column("y").bincount(minlength=10).tolist()


def test_with_one_site_it_is_that_sites_model(world: dict[str, Any]) -> None:
    federation = replace(world["federation"], sites=world["federation"].sites[:1])
    engine = go(world, small(), federation=federation)[-1].engine
    alone = world["task"].model(0)
    alone.load_state_dict(engine.state.server["expert0"], strict=False)
    x, t, cond = torch.randn(6, 1, 8, 8), torch.rand(6) + 0.1, torch.arange(6)
    assert torch.equal(ensemble_in(engine)(x, t, cond), alone.eval()(x, t, cond))


def test_sites_that_write_later_join(world: dict[str, Any]) -> None:
    rows, sizes, seen = [], [], set()
    for row in federate(method=small().but(select=Uniform(count=1)), rounds=4, **world):
        seen |= set(row.up_bytes)
        sizes.append((len(ensemble_in(row.engine).net), len(seen)))
        rows.append(row)
    assert all(have == written for have, written in sizes)
    assert sizes[-1][0] > 1
    assert all(torch.isfinite(torch.tensor(r.metrics["loss"])) for r in rows)


def test_the_router_finds_the_part_of_a_class_without_a_row(world: dict[str, Any]) -> None:
    """Sites have classes of their own, so a class tells the part; the ensemble then is better than any expert."""
    method = small(training=replace(TRAINING, epochs=6), samples=150, steps=150, lr=3e-3)
    engine = go(world, method)[-1].engine
    ensemble = ensemble_in(engine).eval()
    x, t = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((100,), 1.0)
    cond = torch.arange(100) % 10
    which, _ = ensemble.chosen(x, t, cond)
    owner = (cond >= 4).long() + (cond >= 7).long()
    assert float((which[:, 0] == owner).float().mean()) > 0.95
    mixed = engine.evaluate_global()["loss"]
    alone = [m["loss"] for m in engine.evaluate_sites("common").values()]
    assert mixed < 0.9 * min(alone)


@pytest.mark.parametrize("counts", [None, [1, 2], [0] * 10, [1.5] * 10, [-1] * 10, "many"])
def test_a_letter_without_sound_counts_is_refused(world: dict[str, Any], counts: Any) -> None:
    engine = go(world, small())[-1].engine
    letter = Message("letter", {"weights": clone(engine.state.server["expert0"])}, {"counts": counts} if counts else {})
    with pytest.raises(AtollError, match="`counts` is a number of rows for each of 10 classes"):
        engine.method.share.check(letter, engine.state.replica)
    engine.method.share.check(replace(letter, facts={"counts": [1] * 10}), engine.state.replica)


def test_it_loads_alone_as_a_denoiser(tmp_path: Any) -> None:
    recipe = read_recipe({
        "name": "experts", "task": "denoising", "data": "digits", "limit": 120, "sites": 3, "rounds": 1,
        "model": {"name": "unet", "width": 8}, "partition": "iid",
        "method": {"name": "ddm", "training": {"epochs": 1}, "samples": 10, "steps": 3, "top_k": 2},
    })  # fmt: skip
    run, _ = start(recipe, tmp_path / "run")
    run.go()
    loaded = load_model(tmp_path / "run" / "model")
    assert isinstance(loaded, ExpertEnsemble)
    assert (len(loaded.net), loaded.top_k) == (3, 2)
    assert isinstance(loaded, Denoiser)
    z = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.isfinite(Sampler(steps=2)(loaded.eval(), z, torch.arange(4))).all()
    assert not equal(named_tensors(loaded.net[0]), named_tensors(loaded.net[1]))
    assert loaded.router.reader.out.weight.detach().any()  # type: ignore[union-attr,operator]
    assert equal(named_tensors(loaded), load_file(tmp_path / "run" / "model" / "model.safetensors"))


def test_what_cannot_be_is_refused(world: dict[str, Any]) -> None:
    with pytest.raises(AtollError, match="use `task: denoising`"):
        go(world, small(), task=Classification(world["federation"].info))
    noisy = small().but(uplink=(Clip(1.0), GaussianNoise(1.0, clip_norm=1.0, split=False)))
    with pytest.raises(RecipeError, match="LearnExpert tells more of a site's rows than that"):
        go(world, noisy)
