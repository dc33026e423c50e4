"""Windows over series: their values, where they end, and that nothing of the test part is trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.core.errors import DataError
from atoll.data.agreement import adopt, agree, describe, first_moments, means, second_moments, settle
from atoll.data.dataset import Info
from atoll.data.federation import make_federation, one_site
from atoll.data.partitions.by_column import ByColumn
from atoll.data.source import standardised
from atoll.data.sources.series import Series
from atoll.data.windows import OneSeries, windows

INFO = Info(name="clock", kind="series", shape=(2, 3))


def clock(length: int, site: int = 0, anomalous: tuple[int, ...] | None = None) -> OneSeries:
    """Channel 0 counts 1000 site + t, channel 1 is negative."""
    t = np.arange(length, dtype=np.float32)
    marks = None if anomalous is None else np.isin(np.arange(length), anomalous)
    return OneSeries(np.stack([1000 * site + t, -t], 1), {"site": site}, marks)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(20, 40), min_size=1, max_size=3), window=st.integers(1, 5), horizon=st.integers(1, 4),
    test=st.sampled_from([0.0, 0.3]), stride=st.integers(1, 3),
)  # fmt: skip
def test_rows_are_windows_of_one_series_and_forecasts_follow_them(lengths, window, horizon, test, stride):
    series = [clock(n, site) for site, n in enumerate(lengths)]
    data = windows(series, INFO, window=window, horizon=horizon, test=test, stride=stride)
    x, y, site = data.column("x"), data.column("y").reshape(len(data), -1), data.column("site")
    first = 1000 * site + data.column("start")
    assert torch.equal(x[:, 0].long(), first[:, None] + torch.arange(window))
    assert torch.equal(y.long(), first[:, None] + window + torch.arange(horizon))
    assert torch.equal(x[:, 1], 1000.0 * site[:, None] - x[:, 0])
    cut = torch.tensor([n - int(test * n) for n in lengths])[site] + 1000 * site
    held = data.column("held_out").bool()
    assert bool((y[held] >= cut[held, None]).all()), "a test forecast lies in the test part"
    assert bool((y[~held] < cut[~held, None]).all()), "nothing of the test part is trained on"
    starts = [set((first[site == i] - 1000 * i).tolist()) for i in range(len(lengths))]
    for n, got in zip(lengths, starts, strict=True):
        c = n - int(test * n)
        every = range(0, n - window - horizon + 1, stride)
        assert got == {s for s in every if s + window >= c or s + window + horizon <= c}


def test_anomalous_windows_are_for_tests_wherever_they_are():
    data = windows([clock(20, anomalous=(4,)), clock(20, 1)], INFO, window=3, horizon=0, test=0.25)
    y, held, start, site = (data.column(n) for n in ("y", "held_out", "start", "site"))
    assert start[(y == 1)].tolist() == [2, 3, 4]
    assert bool(held[y == 1].all())
    assert start[(held == 0) & (site == 0)].tolist() == [0, 1, *range(5, 13)], "windows end before time 15"
    assert start[(held == 1) & (site == 1)].tolist() == [15, 16, 17]
    assert "y" not in windows([clock(20)], INFO, window=3, horizon=0, test=0.25).columns


def test_windows_are_views():
    data = windows([clock(2000)], INFO, window=50, horizon=7, test=0.2)
    assert data.columns["x"].untyped_storage().nbytes() == 2000 * 2 * 4


@pytest.mark.parametrize(("length", "test"), [(5, 0.0), (8, 0.5)])
def test_too_short_a_series_is_named(length, test):
    with pytest.raises(
        DataError, match=rf"has {length} times, .*no window of 4 times and 2 to forecast.*shorter `window`"
    ):
        windows([clock(30), clock(length, 1)], INFO, window=4, horizon=2, test=test)


def test_sites_train_before_the_cut_and_test_after_it():
    loaded = standardised(windows([clock(40, 0), clock(60, 1)], INFO, window=3, horizon=2, test=0.2))
    federation = make_federation(loaded, ByColumn(), validation=0.1, test=0.5, public=0.2)
    assert federation.public is not None
    assert not federation.public.column("held_out").any()
    for site, parts in enumerate(federation.sites):
        assert not torch.cat([parts.train.column("held_out"), parts.validation.column("held_out")]).any()
        assert parts.test.column("start").tolist() == ([*range(29, 36)] if site == 0 else [*range(45, 56)])
    assert len(federation.test) == 7 + 11
    x = torch.cat([s.train.column("x") for s in federation.sites])
    assert torch.allclose(federation.info.mean.flatten(), x.mean((0, 2)))
    assert federation.info.mean.shape == (2, 1)


CSV = "day,shop,item,sold,price\n" + "".join(
    f"2024-01-{d:02d},{shop},{item},{d + 100 * k},{k}\n"
    for k, (shop, item) in enumerate([("Oslo", "tea"), ("Lyon", "tea"), ("Oslo", "jam")])
    for d in range(20, 0, -1)
)


@pytest.fixture
def csv(tmp_path):  # type: ignore[no-untyped-def]
    def write(text: str = CSV, **options):  # type: ignore[no-untyped-def]
        path = tmp_path / "sales.csv"
        path.write_text(text)
        given = {"time": "day", "target": "sold", "site": "shop", "series": "item", "window": 4, "horizon": 2}
        return Series(str(path), **{**given, **options})

    return write


def test_a_table_with_times_sites_and_series(csv):
    train = csv().load().train
    assert train.info.feature_names == ("sold", "price")
    assert train.info.shape == (2, 4)
    assert train.info.targets == 2
    assert train.info.names == {"site": ("Lyon", "Oslo")}
    x, y = train.column("x"), train.column("y")
    assert bool((x[:, 0].diff(dim=1) == 1).all()), "in the order of time, within one series"
    assert torch.equal(y[:, 0], x[:, 0, -1] + 1)
    assert torch.equal(y[:, 1], x[:, 0, -1] + 2)
    price = x[:, 1, 0].long()
    assert torch.equal(train.column("site"), (price != 1).long()), "two series of Oslo, one of Lyon"
    alone = csv(series="price", features=()).load().train
    assert alone.info.feature_names == ("sold",)


def test_labels_of_times(csv):
    text = (
        CSV.replace("price", "odd")
        .replace(",2\n", ",0\n")
        .replace(",1\n", ",0\n")
        .replace("-03,Lyon,tea,103,0", "-03,Lyon,tea,103,1")
    )
    train = csv(text, label="odd", horizon=0).load().train
    assert train.info.class_names == ("normal", "anomalous")
    assert train.info.feature_names == ("sold",)
    odd = train.column("y") == 1
    assert train.column("start")[odd].tolist() == [0, 1, 2]
    assert bool(train.column("held_out")[odd].all())


@pytest.mark.parametrize(
    ("options", "text", "words"),
    [
        ({"series": None}, CSV, r"Rows \d+ and \d+ of sales.csv are of the same time and series"),
        ({"time": "days"}, CSV, "no column `days`.*Did you mean `day`"),
        ({}, CSV.replace("2024-01-07,Lyon", "January,Lyon"), "Column `day` of sales.csv has 'January', neither a number nor"),
        ({}, CSV.replace("tea,103,1", "tea,,1"), "has no value in row"),
        ({"label": "price"}, CSV, "goes with `horizon: 0`"),
        ({"label": "price", "horizon": 0}, CSV, "Column `price` of sales.csv has '2' in row 41; it says 0 or 1"),
        ({"window": 40}, CSV, "no window of 40 times"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said(csv, options, text, words):
    with pytest.raises(DataError, match=words):
        csv(text, **options).load()


def test_sites_that_hold_a_file_each_agree_on_what_one_holder_of_all_would_find(csv):
    whole = make_federation(csv().load(), ByColumn(), validation=0.0, test=0.3)
    own = [
        one_site(csv(CSV if name == "all" else _of(name)).load(), i, seed=0, validation=0.0, test=0.3)
        for i, name in enumerate(["Lyon", "Oslo"])
    ]
    names = [str(i) for i in range(2)]
    agreed = agree({n: describe(d, fit=True) for n, d in zip(names, own, strict=True)})
    own = [adopt(d, agreed) for d in own]
    firsts = {n: first_moments(d) for n, d in zip(names, own, strict=True)}
    centre = means(agreed, firsts)
    agreed = settle(agreed, firsts, {n: second_moments(d, centre) for n, d in zip(names, own, strict=True)})
    own = [adopt(d, agreed) for d in own]
    assert torch.equal(agreed.info().mean, whole.info.mean)
    assert torch.equal(agreed.info().scale, whole.info.scale)
    assert (agreed.target_mean, agreed.target_scale) == (whole.info.target_mean, whole.info.target_scale)
    for mine, theirs in zip(own, whole.sites, strict=True):
        for part in ("train", "test"):
            a, b = getattr(mine, part).ready(), getattr(theirs, part).ready()
            order = a["y"][:, 0].argsort(), b["y"][:, 0].argsort()
            assert torch.equal(a["x"][order[0]], b["x"][order[1]])


def _of(shop: str) -> str:
    head, *lines = CSV.splitlines()
    return "\n".join([head, *(line for line in lines if f",{shop}," in line)]) + "\n"
