"""Weights that are learned once, kept under the name of their recipe, and fit the run's model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atoll.core.errors import DataError, RecipeError
from atoll.core.tree import equal, named_tensors
from atoll.data.sources.digits import Digits
from atoll.data.sources.sklearn_table import SklearnTable
from atoll.data.sources.subset import Subset
from atoll.data.sources.text_files import TextFiles
from atoll.models.lm import LM
from atoll.models.mlp import MLP
from atoll.models.model import build_model
from atoll.models.pretrained import Pretrained
from atoll.recipes.recipe import read_recipe, recipe_config
from atoll.recipes.run import start
from atoll.tasks.classification import Classification

SIX = Subset(source=Digits(), classes=(0, 1, 2, 3, 4, 5), rows=(0, 600))
SMALL = Pretrained(data=SIX, model=MLP(hidden=(24,)), epochs=6, lr=1e-2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "atoll" / "pretrained"


def test_it_knows_the_classes_that_it_has_seen():
    rest = Subset(source=Digits(), classes=SIX.classes, rows=(600, 1797)).load().train
    task = Classification(rest.info, SMALL)
    assert task.evaluate(task.model(0), rest)["accuracy"] > 0.85


def test_weights_depend_on_the_recipe_and_not_on_the_run(cache, monkeypatch):
    info = SIX.load().train.info
    first = named_tensors(build_model(SMALL, info, 6, 1))
    monkeypatch.setattr(Pretrained, "train", lambda self: pytest.fail("it was in the cache"))
    assert equal(first, named_tensors(build_model(SMALL, info, 6, 2)))
    assert equal(first, named_tensors(build_model(replace(SMALL, fresh=("nothing.",)), info, 6, 2)))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    for other in (replace(SMALL, epochs=5), replace(SMALL, seed=1), replace(SMALL, data=Digits())):
        assert other.key() != SMALL.key()
    assert len(list(cache.iterdir())) == 1


def test_trained_again_it_has_the_same_bits(cache):
    first = SMALL.learned()
    (file,) = cache.iterdir()
    file.unlink()
    assert equal(first.parts["weights"], SMALL.learned().parts["weights"])


def test_a_damaged_file_is_noticed_and_made_again(cache):
    first = SMALL.learned()
    (file,) = cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
    assert equal(first.parts["weights"], SMALL.learned().parts["weights"])
    assert file.read_bytes() == good


def test_another_number_of_classes_gets_a_new_head_whether_it_was_cached_or_not():
    info = Digits().load().train.info
    cold, warm = (named_tensors(build_model(SMALL, info, 10, 3)) for _ in range(2))
    assert equal(cold, warm)
    learned, untouched = SMALL.learned().parts["weights"], named_tensors(build_model(SMALL.model, info, 10, 3))
    assert torch.equal(cold["layers.0.weight"], learned["layers.0.weight"])
    assert torch.equal(cold["layers.1.weight"], untouched["layers.1.weight"])
    six = named_tensors(build_model(replace(SMALL, fresh=("layers.1.",)), SIX.load().train.info, 6, 3))
    assert not torch.equal(six["layers.1.weight"], learned["layers.1.weight"])


def test_rows_of_another_shape_are_refused():
    with pytest.raises(DataError, match="saw rows of 1 x 8 x 8, and those of `iris` are 4"):
        build_model(SMALL, SklearnTable(table="iris").load().train.info, 3, 0)


def test_training_that_diverges_is_an_error_and_is_not_kept(cache):
    with pytest.raises(DataError, match="diverged; lower `lr`"):
        replace(SMALL, lr=1e30).learned()
    assert not cache.exists()


def test_text_and_numbers_train_too(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("to be or not to be, that is the question. " * 12)
    text = Pretrained(
        data=TextFiles(path=str(tmp_path), length=16), model=LM(dim=16, layers=1, heads=2), epochs=12, lr=0.01
    )
    assert text.learned().facts["loss"] < 3  # of log 256 = 5.5
    before = text.key()
    (tmp_path / "3.txt").write_text("more")
    assert text.key() != before
    table = Pretrained(data=SklearnTable(table="diabetes"), epochs=20)
    assert table.learned().facts["loss"] < 0.8  # of 1


def test_a_run_starts_from_it_and_its_model_loads_without_it(tmp_path, monkeypatch):
    from atoll.models.export import load_model

    model = {"name": "pretrained", "model": {"name": "mlp", "hidden": [24]}, "epochs": 6, "lr": 1e-2}
    data = {"name": "subset", "source": "digits", "classes": [0, 1, 2, 3, 4, 5], "rows": [0, 600]}
    theirs = {**data, "rows": [600, 1797]}
    recipe = read_recipe({"name": "w", "sites": 3, "rounds": 1, "data": theirs, "model": {**model, "data": data}})
    assert read_recipe(recipe_config(recipe)) == recipe
    run, _ = start(recipe, tmp_path / "run")
    run.go()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(Pretrained, "train", lambda self: pytest.fail("the weights are in the folder"))
    rest = recipe.data.load().train
    task = Classification(rest.info)
    assert task.evaluate(load_model(tmp_path / "run" / "model"), rest)["accuracy"] > 0.85


def test_bad_fields_are_refused_with_a_sentence():
    with pytest.raises(RecipeError, match=r"model\.data.*is missing"):
        read_recipe({"model": {"name": "pretrained"}})
    with pytest.raises(RecipeError, match=r"model\.epochs"):
        read_recipe({"model": {"name": "pretrained", "data": "digits", "epochs": 0}})
