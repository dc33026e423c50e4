"""The laptop run and the real federation are the same recipe and the same bits."""

from __future__ import annotations

import json

BASE = {"data": "digits", "partition": {"name": "dirichlet", "alpha": 1.0}, "sites": 2, "rounds": 2}
MLP = {"name": "mlp", "hidden": [32]}
TRAINING = {"lr": 0.2, "epochs": 1, "batch_size": 16}
RECIPES = {
    "state at the site, codec both ways": {
        "model": MLP, "method": {"name": "scaffold", "training": TRAINING}, "uplink": [{"name": "quantise", "bits": 8}],
        "downlink": [{"name": "cast"}],
    },
    "shapes of each site's own": {
        "model": MLP, "method": {"name": "flora", "ranks": [2, 4], "training": TRAINING},
    },
    "a sum that hides its parts": {
        "model": MLP, "method": {"name": "fedavg", "training": TRAINING},
        "secure": {"name": "secure_sum", "bits": 16, "clip": 0.5, "threshold": 0.6},
    },
    "a running average that sites get in the end": {
        "method": {"name": "distil_at_sites", "steps": 1, "batch": 8},
        "task": {"name": "distilling", "samples": 20, "method": {"name": "cd_ct", "mode": "train"}},
    },
    "predictions and models of each site's own": {
        "site_models": [MLP, {"name": "mlp", "hidden": [16]}], "method": {"name": "edgefd"},
    },
}  # fmt: skip


def test_a_deployment_gives_the_bits_and_the_ledger_of_an_inline_run(deployment, compare, generator):
    d = deployment("lyon", "oslo")  # the same two site processes take part in one run after the other
    (d.folder / "policy.yaml").write_text(f"kinds: [delta, low_rank, predictions, proxies]\nfiles: [{generator}]")
    for site in d.names:
        d.site(site, "--policy", "policy.yaml")
    for number, recipe in enumerate(RECIPES.values()):
        recipe = {**BASE, **recipe, "name": "rehearsal"}
        if "task" in recipe:
            recipe["task"] = {**recipe["task"], "start": generator}
        out = f"run{number}"
        d.serve(recipe, out)
        d.finished()
        reference = compare.inline(recipe, d.folder / f"inline{number}")
        assert compare.rounds(d.folder / out) == compare.rounds(reference)
        run = json.loads((d.folder / out / "federation.json").read_text())["run"]
        personal = (reference / "model" / "site0").exists()
        if not personal:
            assert compare.same(d.folder / out / "model/model.safetensors", reference / "model/model.safetensors")
        for i, site in enumerate(d.names):
            own = reference / "model" / (f"site{i}/model.safetensors" if personal else "model.safetensors")
            if "downlink" not in recipe:  # what a site holds is of lower precision then
                assert compare.same(d.folder / f"site-{site}" / run / "model/model.safetensors", own)
        assert (d.folder / out / "report.html").exists()
