"""Recipes over every kind of data, from files to a report, and the recipes that ship with Atoll."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest
import torch
import yaml

from atoll.core.files import read_json_lines
from atoll.models.export import load_model
from atoll.recipes.pipeline import as_yaml, load_any
from atoll.recipes.recipe import load_recipe, read_recipe, recipe_config
from atoll.recipes.run import plan, prepare, start

RECIPES = Path(__file__).parents[2] / "recipes"


def done(folder, **fields):
    begun, foreseen = start(read_recipe({"evaluate_every": 0, **fields}), folder)
    summary = begun.go()
    assert summary["refused"] == 0
    assert summary["up_bytes"] == foreseen.up_bytes
    assert (folder / "model").is_dir()
    (first,) = [e for e in read_json_lines(folder / "events.jsonl") if e["event"] == "start"]
    return first, summary


@pytest.fixture
def patients(tmp_path) -> str:
    """Three hospitals; whoever is old or has a high value comes back. One row lacks its value."""
    luck = random.Random(0)
    path = tmp_path / "patients.csv"
    with open(path, "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["age", "value", "stay", "hospital", "readmitted"])
        for i in range(300):
            age, value = luck.randint(20, 90), luck.gauss(0, 1)
            back = "yes" if age / 30 + value > 2 else "no"
            out.writerow([age, "" if i == 7 else f"{value:.3f}", f"{age / 10 + 2 * value:.3f}", "ABC"[i % 7 % 3], back])
    return str(path)


def test_a_table_whose_rows_say_who_owns_them(patients, tmp_path):
    """The owners are the sites, also when nobody says how many."""
    first, summary = done(
        tmp_path / "run", rounds=15,
        data={"name": "table", "path": patients, "target": "readmitted", "site": "hospital", "features": ["age", "value"]},
        partition="by_column", model={"name": "mlp", "hidden": [8]},
        method={"name": "fedprox", "training": {"lr": 0.3, "epochs": 3}},
    )  # fmt: skip
    assert len(first["sites"]) == 3
    assert sum(first["skipped"].values()) == 1
    assert summary["metrics"]["accuracy"] > 0.9


def test_ten_sites_where_neither_data_nor_recipe_says_how_many():
    assert len(read_recipe({"limit": 300, "partition": "iid"}).federation().sites) == 10


def test_regression_in_the_units_of_the_target(patients, tmp_path):
    """stay = age / 10 + 2 value: a linear model finds it, and says its error in days."""
    _, summary = done(
        tmp_path / "run", rounds=20, sites=3,
        data={"name": "table", "path": patients, "target": "stay", "task": "regression", "features": ["age", "value"]},
        partition="iid", model={"name": "mlp", "hidden": []}, method={"name": "fedavg", "training": {"lr": 0.1, "epochs": 3}},
    )  # fmt: skip
    assert summary["metrics"]["rmse"] < 0.05
    assert summary["metrics"]["r2"] > 0.99


def test_regression_bundled_table(tmp_path):
    _, summary = done(
        tmp_path / "run", rounds=20, sites=4, data={"name": "sklearn_table", "table": "diabetes"},
        partition={"name": "clusters", "k": 5}, model={"name": "mlp", "hidden": [8]},
        method={"name": "scaffold", "training": {"lr": 0.02, "epochs": 2}},
    )  # fmt: skip
    assert 0.3 < summary["metrics"]["r2"] < 0.7, "a mean explains nothing; this table is known for about a half"


@pytest.mark.parametrize("method", ["fedavg", "flora"])
def test_text_in_files_one_owner_each(method, tmp_path):
    (tmp_path / "texts").mkdir()
    for i, word in enumerate(("abc ", "bcd ", "cab ")):
        (tmp_path / "texts" / f"{i}.txt").write_text(word * 100)
    training = {"lr": 0.01, "optimizer": "adamw", "epochs": 4, "batch_size": 4}
    first, summary = done(
        tmp_path / "run", rounds=3,
        data={"name": "text_files", "path": str(tmp_path / "texts"), "length": 16}, partition="by_column",
        model={"name": "lm", "dim": 16, "layers": 1, "heads": 2},
        method={"name": method, "training": training, **({"ranks": [8], "also": ["embed", "position"]} if method == "flora" else {})},
    )  # fmt: skip
    assert len(first["sites"]) == 3
    uniform = 5.545  # log 256: a model that knows nothing
    assert summary["metrics"]["loss"] < uniform - 0.5
    assert summary["metrics"]["bits_per_byte"] == pytest.approx(summary["metrics"]["loss"] / 0.6931, rel=1e-3)
    logits = load_model(tmp_path / "run" / "model")(torch.tensor([list(b"abc abc ")]))
    assert logits.shape == (1, 8, 256)


def test_a_folder_of_pictures(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    luck = random.Random(0)
    for label, bright in (("dark", 40), ("light", 200)):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i in range(40):
            color = tuple(bright + luck.randint(-30, 30) for _ in range(3))
            Image.new("RGB", (8, 8), color).save(tmp_path / "pictures" / label / f"{i}.png")
    (tmp_path / "pictures" / "dark" / "broken.png").write_bytes(b"not a picture")
    first, summary = done(
        tmp_path / "run", rounds=5, sites=2, partition="iid",
        data={"name": "image_folder", "path": str(tmp_path / "pictures"), "size": [8, 8]},
        model={"name": "cnn", "channels": [2, 4], "dense": 8}, method={"name": "fedavg", "training": {"lr": 0.1, "epochs": 3}},
    )  # fmt: skip
    assert first["skipped"] == {"unreadable image": 1}
    assert summary["metrics"]["accuracy"] == 1.0


# ------------------------------------------------------------------------------------------- shipped recipes

TINY = {
    "digits": ["limit=400", "rounds=2", "sites=4", "backend=inline"],
    "fashion_scaffold": ["data=digits", "limit=400", "rounds=2", "sites=4", "backend=inline"],
    "graph": ["data.nodes=120", "data.degree=16", "rounds=2", "method.spectral.layers=1"],
    "hospital_table": ["rounds=2"],
    "language_flora": ["data.path=TEXTS", "data.length=16", "rounds=2", "model.dim=16", "model.layers=1", "model.heads=2"],
    "private": ["limit=400", "rounds=2"],
    "secure": ["limit=400", "rounds=2"],
    "gossip": ["limit=400", "rounds=2", "sites=6"],
    "demand_forecast": ["rounds=2"],
    "anomaly_table": ["rounds=2"],
    "retail_bubbles": ["data.days=60", "data.window=7", "rounds=2"],
    "hostile": ["limit=400", "rounds=2"],
}  # fmt: skip


STAGES = {
    "demo": ["generator", "classifier", "one_step"],
    "one_step_at_sites": ["generator", "student", "slow", "fast"],
}  # fmt: skip


def test_every_shipped_recipe_is_tried_here():
    assert {p.stem for p in RECIPES.glob("*.yaml")} == {*TINY, *STAGES}


@pytest.mark.parametrize("name", STAGES)
def test_recipes_of_stages_are_the_same_when_written_out(name, tmp_path):
    path = RECIPES / f"{name}.yaml"
    assert path.read_text().startswith("# "), "a comment says what it shows"
    story = load_any(str(path))
    assert story.name == name
    assert list(story.stages) == STAGES[name]
    (tmp_path / "again.yaml").write_text(as_yaml(story))
    assert as_yaml(load_any(str(tmp_path / "again.yaml"))) == as_yaml(story)


@pytest.mark.parametrize("name", TINY)
def test_a_shipped_recipe_is_planned(name, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"the quick brown fox number {i} jumps over the lazy dog. " * 20)
    path = RECIPES / f"{name}.yaml"
    assert path.read_text().startswith("# "), "a comment says what it shows"
    chosen = load_recipe(str(path), [c.replace("TEXTS", str(tmp_path)) for c in TINY[name]])
    assert chosen.name == name
    foreseen = plan(prepare(chosen))
    assert foreseen.rounds == 2
    assert foreseen.up_bytes > 0
    assert foreseen.refused == ()
    assert (foreseen.epsilon is not None) == (name in ("private", "secure", "retail_bubbles"))
    if name == "hostile":
        assert chosen.make_method().local.sites, "somebody is hostile"


@pytest.mark.parametrize("name", TINY)
def test_a_resolved_recipe_is_the_same_recipe(name):
    chosen = load_recipe(str(RECIPES / f"{name}.yaml"))
    config = recipe_config(chosen)
    assert recipe_config(read_recipe(yaml.safe_load(yaml.safe_dump(config)))) == config
