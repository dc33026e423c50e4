"""Named rows and classes of a source."""

from __future__ import annotations

import pytest
import torch

from atoll.core.errors import DataError, RecipeError
from atoll.data.sources.digits import Digits
from atoll.data.sources.sklearn_table import SklearnTable
from atoll.data.sources.subset import Subset
from atoll.recipes.recipe import read_recipe


def test_classes_are_kept_in_order_and_numbered_anew():
    whole, data = Digits().load().train, Subset(source=Digits(), classes=(7, 2)).load().train
    y = whole.column("y")
    rows = ((y == 7) | (y == 2)).nonzero().flatten()
    assert torch.equal(data.column("x"), whole.column("x")[rows])
    assert torch.equal(data.column("y"), (y[rows] == 2).long())
    assert (data.info.num_classes, data.info.class_names) == (2, ("7", "2"))


def test_rows_that_do_not_overlap_share_none_and_together_are_all():
    whole = Digits().load().train
    parts = [Subset(source=Digits(), rows=r).load().train.column("x") for r in ((0, 700), (700, 1797))]
    assert torch.equal(torch.cat(parts), whole.column("x"))


def test_moments_that_follow_the_rows_follow_those_that_are_kept():
    wine = SklearnTable(table="wine")
    data = Subset(source=wine, rows=(0, 60)).load()
    assert data.fit
    x = data.train.ready()["x"]
    assert torch.allclose(x.mean(0), torch.zeros(x.shape[1]), atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rows": (5, 5)}, "1,797 training rows"), ({"rows": (0, 2000)}, "1,797 training rows"),
        ({"classes": (3, 10)}, "has 10 classes"), ({"classes": (3, 3)}, "twice"),
        ({"classes": (9,), "rows": (0, 3)}, "No row"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused(fields, text):
    with pytest.raises(DataError, match=text):
        Subset(source=Digits(), **fields).load()
    with pytest.raises(DataError, match="no classes"):
        Subset(source=SklearnTable(table="diabetes"), classes=(0,)).load()


def test_a_recipe_says_two_ends():
    with pytest.raises(RecipeError, match=r"data\.rows"):
        read_recipe({"data": {"name": "subset", "source": "digits", "rows": [1, 2, 3]}})
