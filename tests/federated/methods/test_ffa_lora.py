"""FFA-LoRA: one factor is agreed on, the other one is averaged, and that is exact."""

from __future__ import annotations

import torch

from atoll.adapters.lora import lora_layers
from atoll.core.tree import clone, equal, named_tensors
from atoll.federated.engine import Engine
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import prepare

WORK = {"sites": 4, "limit": 300, "rounds": 2, "model": {"name": "mlp", "hidden": [16]}}


def engine(**fields):
    recipe = read_recipe({**WORK, "method": {"name": "ffa_lora", "rank": 3}, **fields})
    prepared = prepare(recipe)
    return Engine(prepared.setup, recipe.backend.open(prepared.setup))


def test_the_random_factor_is_the_same_everywhere_and_never_trains():
    run = engine()
    model = run.workers.local.site_model(None).model
    before = clone({n: t for n, t in named_tensors(model).items() if ".lora_A." in n or "base_layer" in n})
    run.step()
    run.commit()
    after = {n: t for n, t in named_tensors(model).items() if n in before}
    assert equal(before, after)
    again = engine().workers.local.site_model(None).model
    assert equal(before, {n: t for n, t in named_tensors(again).items() if n in before})
    assert all(".lora_B." in n for n in run.state.replica["weights"])


def test_a_reply_is_as_large_as_the_factors_that_train():
    run = engine()
    model = run.workers.local.site_model(None).model
    layers = lora_layers(model)
    numbers = sum(3 * layer.out_features for layer in layers.values())
    assert sum(t.numel() for t in run.state.replica["weights"].values()) == numbers


def test_the_mean_of_the_factors_is_the_factor_of_the_mean():
    """And the exported model is the base plus it, to the last rounding."""
    run = engine()
    share = run.method.share
    model = run.workers.local.site_model(None).model
    base = {m: layer.base_layer.weight.detach().clone() for m, layer in lora_layers(model).items()}
    run.step()
    run.commit()
    merged = named_tensors(share.export(model, run.state.replica))
    for m, layer in lora_layers(model).items():
        b = run.state.replica["weights"][next(n for n in run.state.replica["weights"] if n.startswith(f"{m}."))]
        assert b.abs().max() > 0
        expected = base[m] + layer.scaling["rank3"] * b @ layer.lora_A["rank3"].weight
        torch.testing.assert_close(merged[f"{m}.weight"], expected, rtol=1e-5, atol=1e-6)


def test_it_goes_with_noise_and_with_masks():
    """Clip and noise act on the update; a secure sum sees no single one."""
    noisy = [{"name": "clip", "norm": 1.0}, {"name": "gaussian_noise", "multiplier": 1.0, "clip_norm": 1.0}]
    row = engine(uplink=noisy, combine={"name": "weighted_mean", "by": "uniform"}).step()
    assert not row.refused
    row = engine(secure={"name": "secure_sum", "bits": 16, "clip": 0.5, "threshold": 0.6}).step()
    assert not row.refused


def test_a_head_may_train_in_full_beside_the_adapters():
    run = engine(
        method={"name": "ffa_lora", "rank": 3, "also": ["layers.2"]}, model={"name": "mlp", "hidden": [16, 16]}
    )
    names = set(run.state.replica["weights"])
    assert {n for n in names if ".lora_" not in n} == {"layers.2.weight", "layers.2.bias"}
