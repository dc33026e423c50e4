"""Rows whose labels nobody has."""

from __future__ import annotations

import pytest
import torch

from atoll.core.errors import DataError, RecipeError
from atoll.data.dataset import Dataset, Federation, Info
from atoll.data.federation import make_federation
from atoll.data.partitions.dirichlet import Dirichlet
from atoll.data.partitions.iid import Iid
from atoll.data.picture import partition_svg, picture
from atoll.data.source import Loaded
from atoll.data.sources.digits import Digits
from atoll.data.sources.sklearn_table import SklearnTable
from atoll.deploy.guard import Guard
from atoll.federated.topologies.pooled import Pooled
from atoll.recipes.recipe import read_recipe


def split(labelled: float, seed: int = 3) -> Federation:
    return make_federation(Digits(), Dirichlet(alpha=0.5), sites=4, seed=seed, labelled=labelled)


@pytest.mark.parametrize("labelled", [0.0, 0.1, 0.5])
def test_the_other_rows_keep_their_inputs_and_lose_their_labels(labelled: float) -> None:
    whole, part = split(1.0), split(labelled)
    for a, b in zip(whole.sites, part.sites, strict=True):
        assert a.unlabelled is None
        assert b.unlabelled is not None
        assert "y" not in b.unlabelled.columns
        with pytest.raises(DataError, match="no column `y`"):
            b.unlabelled.column("y")
        assert len(b.train) == round(labelled * len(a.train))
        assert a.train.rows is not None
        assert b.train.rows is not None
        assert b.unlabelled.rows is not None
        assert sorted(torch.cat([b.train.rows, b.unlabelled.rows]).tolist()) == sorted(a.train.rows.tolist())
        assert torch.equal(a.test.column("y"), b.test.column("y"))  # to measure by
    assert part.labels["js_distance"] == whole.labels["js_distance"]  # of who owns what


def test_which_rows_are_labelled_follows_the_seed() -> None:
    one, again, other = (split(0.1, seed).sites[0].train.rows for seed in (3, 3, 4))
    assert one is not None
    assert again is not None
    assert other is not None
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_hidden_target_leaves_no_trace() -> None:
    """Inputs are standardised by all training rows, a target by those that have one."""
    f = make_federation(SklearnTable("diabetes"), Iid(), sites=3, labelled=0.2)
    y = torch.cat([s.train.column("y") for s in f.sites]).double()
    x = torch.cat([d.column("x") for s in f.sites for d in (s.train, s.unlabelled) if d is not None]).double()
    assert f.info.target_mean == pytest.approx(float(y.mean()), rel=1e-6)
    assert torch.allclose(torch.as_tensor(f.info.mean).double(), x.mean(0), atol=1e-6)


def test_a_picture_counts_rows_of_which_nobody_knows_more() -> None:
    for labelled in (0.0, 0.1):
        assert (picture(split(labelled)).parts == picture(split(1.0)).parts).all()
        assert picture(split(labelled)).found.of == "rows"
        assert "nan" not in partition_svg(split(labelled))
    assert picture(split(1.0)).found.of == "classes"


def test_pooling_keeps_them() -> None:
    f = split(0.1)
    one = Pooled().arrange(f).sites[0]
    assert one.unlabelled is not None
    assert len(one.unlabelled) == sum(len(s.unlabelled) for s in f.sites if s.unlabelled is not None)
    assert Pooled().arrange(split(1.0)).sites[0].unlabelled is None


def test_refusals() -> None:
    with pytest.raises(DataError, match=r"`labelled` is a fraction from 0 to 1; got 1\.5"):
        split(1.5)
    nameless = Dataset({"x": torch.zeros(40, 2)}, Info(name="nameless", shape=(2,)))
    with pytest.raises(DataError, match="hides labels, and `nameless` has none"):
        make_federation(Loaded(train=nameless), Iid(), sites=2, labelled=0.5)
    with pytest.raises(RecipeError, match="labelled"):
        read_recipe({"labelled": -0.1})


def test_a_real_site_hides_nothing_from_itself() -> None:
    with pytest.raises(Exception, match="hides labels"):
        Guard(policy=None, meter=None).recipe(read_recipe({"labelled": 0.5}), 3)  # type: ignore[arg-type]
