"""Sites that show no rows come to the description that a simulation has which holds them all, bit for bit."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atoll.core.errors import DataError
from atoll.data.agreement import (
    Summary,
    adopt,
    adopted,
    agree,
    describe,
    first_moments,
    means,
    read_summary,
    second_moments,
    settle,
)
from atoll.data.dataset import Dataset, Federation, Info, SiteData
from atoll.data.federation import make_federation, one_site
from atoll.data.partitions.by_column import ByColumn
from atoll.data.source import Loaded, fitted
from atoll.data.sources.sklearn_table import SklearnTable
from atoll.data.sources.table import Table
from atoll.data.tokenizers import Bytes, train_bpe

SHARES = {"validation": 0.1, "test": 0.3}


def wire(facts: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(facts, allow_nan=False))  # type: ignore[no-any-return]


def together(sites: Mapping[str, Loaded], seed: int) -> tuple[Summary, list[SiteData]]:
    """All steps, each fact on a wire."""
    own = [one_site(loaded, i, seed=seed, **SHARES) for i, loaded in enumerate(sites.values())]
    told = [wire(describe(d, fit=s.fit).facts()) for d, s in zip(own, sites.values(), strict=True)]
    agreed = agree({name: read_summary(facts, name) for name, facts in zip(sites, told, strict=True)})
    own = [adopt(d, read_summary(wire(agreed.facts()), "the server")) for d in own]
    if agreed.fit:
        firsts = {name: wire(first_moments(d)) for name, d in zip(sites, own, strict=True)}
        mean = wire(means(agreed, firsts))
        agreed = settle(agreed, firsts, {n: wire(second_moments(d, mean)) for n, d in zip(sites, own, strict=True)})
        own = [adopt(d, read_summary(wire(agreed.facts()), "the server")) for d in own]
    return agreed, own


def same_value(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)


def check_equal(simulated: Federation, agreed: Summary, own: Sequence[SiteData]) -> None:
    info = agreed.info()
    for f in dataclasses.fields(Info):
        if f.name not in ("name", "names"):  # what a data set and its owners are called
            assert same_value(getattr(info, f.name), getattr(simulated.info, f.name)), f.name
    assert len(own) == len(simulated.sites)
    assert agreed.rows[0] == sum(len(s.train) for s in simulated.sites)
    for mine, theirs in zip(own, simulated.sites, strict=True):
        for part in ("train", "validation", "test"):
            a, b = getattr(mine, part), getattr(theirs, part)
            assert len(a) == len(b)
            x, y = a.ready(), b.ready()
            assert torch.equal(a.column("x"), b.column("x"))
            assert torch.equal(x["x"], y["x"])
            assert torch.equal(x["y"], y["y"])
            assert x["y"].dtype == y["y"].dtype


def write_csv(path: Path, names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([names, *rows])
    return str(path)


TABLE = SklearnTable("breast_cancer").load().train
DISEASE = SklearnTable("diabetes").load().train


def some_rows(data: Dataset, count: int, features: int) -> tuple[list[str], list[list[object]]]:
    picked = np.random.default_rng(0).permutation(len(data))[:count]
    x, y = data.column("x")[picked, :features].tolist(), data.column("y")[picked].tolist()
    names = data.info.class_names
    return list(data.info.feature_names[:features]), [
        [*row, names[t] if names else t] for row, t in zip(x, y, strict=True)
    ]


@st.composite
def owners(draw: st.DrawFn, rows: int) -> list[int]:
    """A site for each row, any way at all; every site that is named has two rows or more."""
    sites = draw(st.integers(1, 5))
    drawn = draw(st.lists(st.integers(0, sites - 1), min_size=rows, max_size=rows))
    return [o if drawn.count(o) > 1 else 0 for o in drawn] if drawn.count(0) > 1 else [0] * rows


@pytest.mark.parametrize("kind", ["classes", "numbers"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), seed=st.integers(0, 99))
def test_tables_at_sites_equal_one_table(kind: str, tmp_path: Path, data: st.DataObject, seed: int) -> None:
    names, rows = some_rows(TABLE if kind == "classes" else DISEASE, 60, 5)
    options: dict[str, Any] = {"target": "t", "task": "classification" if kind == "classes" else "regression"}
    home = data.draw(owners(len(rows)))
    if data.draw(st.booleans(), label="text too"):
        names, rows = (
            [*names[:2], "ward", *names[2:]],
            [[*r[:2], "abcd"[i % 7 % 4], *r[2:]] for i, r in enumerate(rows)],
        )
        options |= {"features": tuple(names), "categorical": "one_hot"}
    if kind == "classes" and data.draw(st.booleans(), label="sites prefer a class"):
        home = [
            o if r[-1] == "benign" else max(home) + 1 + i % 2 for i, (o, r) in enumerate(zip(home, rows, strict=True))
        ]
        home = [o if home.count(o) > 1 else home[0] for o in home]
    for i in data.draw(st.lists(st.integers(0, 59), max_size=4), label="missing"):
        rows[i] = ["", *rows[i][1:]] if home.count(home[i]) > 8 else rows[i]
    header = [*names, "t", "site"]
    table = [[*r, f"s{o}"] for r, o in zip(rows, home, strict=True)]
    whole = Table(write_csv(tmp_path / "all.csv", header, table), site="site", **options)
    simulated = make_federation(whole, ByColumn(), seed=seed, common_test=0.0, **SHARES)
    sites = {}
    for n, site in enumerate(sorted({r[-1] for r in table})):
        order = list(range(len(header) - 1)) if n == 0 else data.draw(st.permutations(range(len(header) - 1)))
        mine = [[r[c] for c in order] for r in table if r[-1] == site]
        file = write_csv(tmp_path / f"{site}.csv", [header[c] for c in order], mine)
        sites[str(site)] = Table(file, **options).load()
    check_equal(simulated, *together(sites, seed))


@settings(max_examples=20, deadline=None)
@given(home=owners(50), seed=st.integers(0, 99), fit=st.booleans())
def test_byte_images_at_sites_equal_one_folder(home: list[int], seed: int, fit: bool) -> None:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.integers(0, 256, (50, 3, 5, 4), dtype=np.uint8))
    y = torch.from_numpy(rng.integers(0, 12, 50))
    y[:2] = torch.tensor([0, 1])

    def loaded(rows: list[int], **further: torch.Tensor) -> Loaded:
        classes = sorted(set(y[rows].tolist()))
        info = Info(
            name="bytes", kind="image", shape=(3, 5, 4), num_classes=len(classes), unit=1 / 255,
            class_names=tuple(map(str, classes)), mean=0.0 if fit else 0.3, scale=1.0 if fit else 0.7,
        )  # fmt: skip
        codes = torch.tensor([classes.index(int(c)) for c in y[rows]])
        return Loaded(train=Dataset({"x": x[rows], "y": codes, **further}, info), fit=fit)

    everything = loaded(list(range(50)), site=torch.tensor(home))
    simulated = make_federation(everything, ByColumn(), seed=seed, common_test=0.0, **SHARES)
    sites = {f"s{o}": loaded([i for i, h in enumerate(home) if h == o]) for o in sorted(set(home))}
    check_equal(simulated, *together(sites, seed))


def test_sums_are_added_in_the_order_of_the_sites() -> None:
    sites = {
        name: table({"age": [v]}, [0], ["ill", "well"]) for name, v in (("a", 2.0**60), ("b", -(2.0**60)), ("c", 1.0))
    }
    agreed = agree({name: summary(d) for name, d in sites.items()})
    assert means(agreed, {name: first_moments(d) for name, d in sites.items()}) == {"x": [1 / 3]}  # 0 in another order
    assert fitted(LYON.train.info, [d.train for d in sites.values()]).mean == torch.tensor([1 / 3])


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    x = torch.randn(300, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = Dataset({"x": x, "y": torch.zeros(300)}, Info(name="x", kind="image", shape=(3, 32, 32)))
    found = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found.append(first_moments(SiteData(data, data, data)))
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------- refusals


def table(features: Mapping[str, Sequence[float]], y: Sequence[int], classes: Sequence[str], **facts: Any) -> SiteData:
    x = torch.tensor(list(features.values()), dtype=torch.float32).T.contiguous()
    info = Info(
        name="t", shape=(len(features),), feature_names=tuple(features), num_classes=len(classes) or None,
        class_names=tuple(classes), **facts,
    )  # fmt: skip
    data = Dataset({"x": x, "y": torch.tensor(y)}, info)
    return SiteData(data, data.select([]), data.select([0]))


LYON = table({"age": [1, 2], "mass": [3, 4]}, [0, 1], ["ill", "well"])


def summary(data: SiteData, **changes: Any) -> Summary:
    return dataclasses.replace(describe(data, fit=True), **changes)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (summary(table({"age": [1], "maas": [2]}, [0], ["ill"])), r"Site `oslo` has no feature `mass`, which site `lyon` has\. Did you mean `maas`"),
        (summary(table({"age": [1], "mass": [2], "pulse": [3]}, [0], ["ill"])), r"Site `lyon` has no feature `pulse`, which site `oslo` has"),
        (summary(LYON, unit=0.5), r"`lyon` and `oslo` differ in the unit of inputs \(1.0 and 0.5\)"),
        (summary(LYON, kind="text"), r"differ in the kind of data \(table and text\)"),
        (summary(LYON, fit=False), r"differ in the standardisation \(true and false\)"),
        (summary(LYON, tokenizer="abc"), r"differ in the tokenizer .* give its file as `tokenizer`"),
        (summary(LYON, num_classes=None, class_names=()), r"Site `lyon` has classes to tell apart, and site `oslo` a number"),
        (summary(LYON, class_names=("well", "dead"), num_classes=2), r"Sites `oslo` and `lyon` have different classes \(well, dead; ill, well\).*order of their own"),
        (summary(table({"age": [1], "mass=high": [1]}, [0], ["ill"], categories={"mass": ("high",)})), r"Feature `mass` holds text at site `oslo` and numbers at site `lyon`"),
        (summary(LYON, feature_names=(), shape=(3,)), r"Inputs of site `lyon` have shape \[2\], those of site `oslo` \[3\]"),
    ],
)  # fmt: skip
def test_differences_are_one_sentence_with_both_sites(other: Summary, words: str) -> None:
    with pytest.raises(DataError, match=words):
        agree({"lyon": summary(LYON), "oslo": other})


def test_one_class_everywhere_is_refused_and_no_site_too() -> None:
    one = summary(table({"age": [1]}, [0], ["ill"]))
    with pytest.raises(DataError, match=r"target of all sites together has 1 value; classification needs at least two"):
        agree({"lyon": one, "oslo": one})
    with pytest.raises(DataError, match="No site"):
        agree({})
    with pytest.raises(DataError, match="classification needs at least two"):
        make_federation(Loaded(train=table({"age": [1, 2]}, [0, 0], ["ill"]).train), ByColumn("y"), common_test=0)


def test_a_description_holds_no_value_of_a_feature() -> None:
    marked = table(
        {"age": [123456.75, 2]}, [0, 1], ["ill", "well"], mean=torch.tensor([61729.375]), target_mean=61729.5
    )
    told = json.dumps(describe(marked, fit=True).facts())
    assert "123456" not in told
    assert "61729" not in told


def test_equal_classes_keep_their_own_order_and_rows_of_others_can_be_adopted() -> None:
    ours = table({"age": [1, 2], "mass": [3, 4]}, [0, 1], ["well", "ill"])
    agreed = agree({"lyon": summary(ours), "oslo": summary(ours)})
    assert agreed.class_names == ("well", "ill")
    public = adopted(table({"mass": [7], "age": [8]}, [0], ["ill"]).train, agreed)
    assert public.column("x").tolist() == [[8, 7]]
    assert public.column("y").tolist() == [1]
    for odd, words in (
        (table({"mass": [7], "age": [8]}, [0], ["dead"]), "class 'dead', which the sites did not agree on"),
        (table({"mass": [7]}, [0], ["ill"]), "lacks the agreed feature `age`"),
        (table({"mass": [7], "age": [7], "b": [1]}, [0], ["ill"]), "feature `b` that is not agreed"),
        (table({"mass": [7], "age": [7]}, [0], []), "not the kind of data"),
    ):
        with pytest.raises(DataError, match=words):
            adopted(odd.train, agreed)


def test_tokenizers_are_compared_by_what_they_do() -> None:
    text = SiteData(*[Dataset({"x": torch.zeros(2, 4)}, Info(name="t", kind="text", shape=(4,), num_classes=256))] * 3)
    told = [describe(text, fit=False, tokenizer=t) for t in (Bytes(), Bytes(), train_bpe([b"abab"], 258))]
    assert agree({"a": told[0], "b": told[1]}).tokenizer == told[0].tokenizer
    with pytest.raises(DataError, match="differ in the tokenizer"):
        agree({"a": told[0], "b": told[2]})


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [1, 2]}, {"rows": [1, 2, -1]}, {"rows": [1, 2, True]}, {"kind": "video"}, {"shape": [3]}, {"unit": "x"},
        {"class_names": ["a", "a"]}, {"num_classes": 5}, {"feature_names": [1, 2]}, {"categories": {"age": ["x"]}},
        {"mean": [1.0]}, {"shape": [1 << 60]},
    ],
)  # fmt: skip
def test_descriptions_from_strangers_are_refused(change: dict[str, Any]) -> None:
    good = wire(summary(LYON).facts())
    assert read_summary(good, "site `lyon`") == summary(LYON)
    with pytest.raises(DataError, match="description of the data from site `lyon`"):
        read_summary({**good, **change}, "site `lyon`")


def test_sums_from_strangers_are_refused() -> None:
    agreed, good = agree({"lyon": summary(LYON)}), wire(first_moments(LYON))
    mean = means(agreed, {"lyon": good})
    assert mean == {"x": [1.5, 3.5]}
    for bad in (
        {},
        {"x": {"count": 2, "sums": [1.0]}},
        {"x": {"count": 0, "sums": [1.0, 2.0]}},
        {"x": 3},
        [],
        {**good, "y": good["x"]},
    ):
        with pytest.raises(DataError, match="What site `lyon` sent for standardisation"):
            means(agreed, {"lyon": bad})  # type: ignore[dict-item]
    with pytest.raises(DataError, match="do not go with its sums"):
        settle(agreed, {"lyon": good}, {"lyon": {"x": {"count": 2, "sums": [-1.0, 0.0]}}})
    for bad_mean in ({"x": [1.0]}, {}, {"x": ["a", "b"]}):
        with pytest.raises(DataError, match="The mean from the server"):
            second_moments(LYON, bad_mean)
