"""A site's rules refuse with a sentence, and its book is never behind what has left."""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atoll.core.errors import RecipeError, RunError
from atoll.data.dataset import Info
from atoll.deploy.meter import Day, Meter
from atoll.deploy.policy import (
    Policy,
    cohort_refusal,
    columns_read,
    columns_refusal,
    description_refusal,
    evaluation_refusal,
    kind_refusal,
    message_kinds,
    model_refusal,
    participation,
    read_policy,
    recipe_refusal,
    sums_refusal,
    visit_seconds,
)
from atoll.federated.codecs.clip import Clip
from atoll.federated.codecs.gaussian_noise import GaussianNoise
from atoll.federated.codecs.rqm import Rqm
from atoll.federated.method import Codec, Method
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.privacy import privacy_event
from atoll.federated.select.poisson import Poisson
from atoll.federated.select.uniform import Uniform
from atoll.privacy.accounting import Event, Sampling, epsilon

DAY = 86_400.0
NOISY = Event(8.0, Sampling("fixed", 4, 4))
WEAK = Event(3.0, Sampling("fixed", 4, 4))
OTHER_LAW = Event(8.0, Sampling())
EVENTS = [None, NOISY, WEAK, Event(0.0), OTHER_LAW]


def sentences(text: str) -> int:
    return len(re.findall(r"[.!?](?= |$)", text))


def read(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    return read_policy(path)


# ------------------------------------------------------------------------------------------- the file


def test_no_file_is_the_default_and_a_file_changes_what_it_names(tmp_path: Path) -> None:
    assert read_policy(None) == Policy() == read(tmp_path, "")
    policy = read(tmp_path, "methods: [fedavg]\nkinds: [delta, proxies]\nepsilon_per_day: 2\ntrust: sampling\n")
    assert policy == Policy(methods=("fedavg",), kinds=("delta", "proxies"), epsilon_per_day=2.0, trust="sampling")


def test_all_problems_come_at_once_with_suggestions(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as e:
        read(tmp_path, "method: [fedavg]\nother_sites: -1\nleast_rows: 1\ntrust: all\nbytes_per_day: true\n")
    problems = "\n".join(e.value.problems)
    assert len(e.value.problems) == 5
    assert "Did you mean `methods`" in problems
    for place in ("other_sites", "least_rows", "trust", "bytes_per_day"):
        assert f"`{place}`" in problems
    with pytest.raises(RecipeError) as e:
        read(tmp_path, "methods: [fedavgg, fedprox]\nkinds: [delt]\n")
    assert [re.search(r"Did you mean `(\w+)`", p)[1] for p in e.value.problems] == ["fedavg", "delta"]  # type: ignore[index]
    with pytest.raises(RecipeError, match="there is no file"):
        read_policy(tmp_path / "none.yaml")


def test_rows_are_a_kind_of_message_and_stay_by_default() -> None:
    assert message_kinds() >= {"delta", "predictions", "proxies", "low_rank", "seed_scalars"}
    refused = {kind for kind in message_kinds() if kind_refusal(Policy(), kind)}
    assert refused == {"proxies"}
    assert kind_refusal(Policy(kinds=("proxies",)), "proxies") is None


# ------------------------------------------------------------------------------------------- decisions

TABLE = Info(name="t", class_names=("a", "b"), feature_names=("age", "town=Oslo"), categories={"town": ("Oslo",)})
STRICT = Policy(
    methods=("fedavg",), kinds=("delta",), other_sites=2, columns=("age", "y"), class_names=False, counts=True,
    sums=False, evaluate=False, max_parameters=10, max_model_bytes=40, seconds=5.0,
)  # fmt: skip
BUDGET = Policy(epsilon_per_day=1.0)
REFUSALS = {
    "method": recipe_refusal(STRICT, "fedprox", "delta", 9),
    "kind of the method": recipe_refusal(STRICT, "fedavg", "low_rank", 9),
    "sites of the recipe": recipe_refusal(STRICT, "fedavg", "delta", 2),
    "kind": kind_refusal(STRICT, "x" * 1000),
    "rows": kind_refusal(Policy(), "proxies"),
    "nothing allowed": recipe_refusal(Policy(methods=()), "fedavg", "delta", 2),
    "cohort": cohort_refusal(STRICT, 2, 9),
    "alone": cohort_refusal(Policy(), 1, 9),
    "impossible cohort": cohort_refusal(Policy(), 10, 9),
    "no cohort": cohort_refusal(Policy(other_sites=0), 0, 9),
    "columns": columns_refusal(STRICT, columns_read(TABLE, "y", None)),
    "counts": description_refusal(Policy(counts=False), TABLE),
    "class names": description_refusal(STRICT, TABLE),
    "categories": description_refusal(STRICT, Info(name="t", categories={"town": ("Oslo",)})),
    "sums": sums_refusal(STRICT, 100),
    "sums in a budget": sums_refusal(BUDGET, 100),
    "few sums": sums_refusal(Policy(), 4),
    "metrics": evaluation_refusal(STRICT, 100),
    "metrics in a budget": evaluation_refusal(BUDGET, 100),
    "few metrics": evaluation_refusal(Policy(evaluate=True), 4),
    "parameters": model_refusal(STRICT, 11, 1),
    "model bytes": model_refusal(STRICT, 10, 41),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_every_refusal_is_one_or_two_sentences(what: str) -> None:
    text = REFUSALS[what]
    assert text is not None
    assert text.endswith(".")
    assert 1 <= sentences(text) <= 2
    assert len(text) < 300
    assert "\n" not in text


def test_what_the_rules_allow_passes() -> None:
    for policy in (Policy(), STRICT):
        assert recipe_refusal(policy, "fedavg", "delta", 3) is None
        assert cohort_refusal(policy, 3, 3) is None
        assert model_refusal(policy, 10, 40) is None
    assert columns_read(TABLE, "y", "y", None) == ("age", "town", "y")
    assert columns_refusal(STRICT, ("age", "y")) is None
    assert columns_refusal(Policy(), ("anything",)) is None
    assert description_refusal(Policy(), TABLE) is None
    assert description_refusal(STRICT, Info(name="t")) is None
    for asked in (Policy(), Policy(epsilon_per_day=1.0, sums=True, evaluate=True)):
        assert sums_refusal(asked, 5) is None
        assert evaluation_refusal(asked, 5) is None
    assert visit_seconds(Policy(), None) is None
    assert [visit_seconds(STRICT, s) for s in (None, 3.0, 8.0)] == [5.0, 3.0, 5.0]


# ------------------------------------------------------------------------------------------- what a reply costs


def noisy(*codecs: Codec, select: Uniform | Poisson = Uniform(count=2)) -> Method:
    return fedavg().but(uplink=codecs, select=select)


CLIP, SPLIT, WHOLE = Clip(1.0), GaussianNoise(4.0, 1.0), GaussianNoise(4.0, 1.0, split=False)


def test_noise_that_is_not_gaussian_counts_in_the_book_too(tmp_path: Path) -> None:
    """Of a single message with ``trust: nobody``; of the cohort's sum otherwise, where that is what it promises."""
    by_itself, summed = noisy(Rqm(clip=1.0, dimension=3)), noisy(Rqm(clip=1.0, dimension=3, summed=True))
    alone = participation(Policy(), by_itself, 4, 10)
    assert alone == privacy_event(by_itself, 4, 4, True, 10)
    assert participation(Policy(), summed, 4, 10).renyi == alone.renyi
    assert participation(Policy(trust="sum"), summed, 4, 10) == privacy_event(summed, 4, 4, True, 10)
    cost = epsilon((alone,), 1e-5)
    policy, meter = (
        Policy(delta=1e-5, epsilon_per_day=epsilon((replace(alone, count=2),), 1e-5) * 1.001),
        Meter(tmp_path / "book"),
    )
    assert cost > 0
    for _ in range(2):
        assert meter.book(policy, 10, alone) is None
    again = Meter(tmp_path / "book")  # from the file
    assert [e.count for e in again.today().events] == [2]
    assert "spends at most" in str(again.book(policy, 10, alone))


def test_trust_decides_what_a_reply_costs() -> None:
    split, own = noisy(CLIP, SPLIT), noisy(CLIP, WHOLE)
    alone = Sampling("fixed", 10, 10)
    for trust in ("nobody", "sum", "sampling"):
        assert participation(Policy(trust=trust), own, 4, 10) == Event(4.0, alone)  # type: ignore[arg-type]
    assert participation(Policy(), split, 4, 10) == Event(2.0, alone)  # its own quarter of the variance
    trusting, sampled = Policy(trust="sum"), Policy(trust="sampling")
    assert participation(trusting, split, 4, 10) == privacy_event(split, 4, 4, False, 10)
    assert participation(sampled, split, 4, 10) == privacy_event(split, 4, 4, True, 10) != Event(4.0, alone)
    poisson = noisy(CLIP, SPLIT, select=Poisson(rate=0.3))
    assert participation(trusting, poisson, 4, 10) == Event(4.0, Sampling())
    assert participation(sampled, poisson, 4, 10) == Event(4.0, Sampling("poisson", rate=0.3))
    costs = [epsilon([participation(p, split, 4, 10)], 1e-5) for p in (Policy(), trusting, sampled)]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize(
    "uplink",
    [
        (), (CLIP,), (SPLIT,), (Clip(2.0), SPLIT), (SPLIT, CLIP),
        (CLIP, GaussianNoise(4.0, 1.0, test_seed=1, allow_insecure_test_seed=True)),
    ],
    ids=repr,
)  # fmt: skip
def test_noise_that_hides_nothing_costs_infinity(uplink: tuple[Codec, ...], tmp_path: Path) -> None:
    event = participation(Policy(), noisy(*uplink), 4, 10)
    assert event.multiplier == 0
    refused = Meter(tmp_path / "book.jsonl").book(BUDGET, 1, event)
    assert refused is not None
    assert "Add `clip` and `gaussian_noise`" in refused
    assert sentences(refused) <= 2
    assert Meter(tmp_path / "book.jsonl").book(Policy(), 1, event) is None


# ------------------------------------------------------------------------------------------- the book

STEP = st.tuples(
    st.sampled_from(["go", "restart", "cut", "die", "other process"]),
    st.integers(0, 700),  # bytes
    st.sampled_from(EVENTS),
    st.sampled_from([0.0, 3600.0, DAY / 2, -DAY / 2]),  # the clock moves; it may be set back too
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(STEP, max_size=25), most=st.one_of(st.none(), st.integers(0, 2000)),
    budget=st.one_of(st.none(), st.sampled_from([0.0, 1.0, 2.5, 5.0])), data=st.data(),
)  # fmt: skip
def test_no_sequence_of_requests_exceeds_a_days_limits(tmp_path, steps, most, budget, data) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "site" / "book.jsonl"
    path.unlink(missing_ok=True)
    policy = Policy(bytes_per_day=most, epsilon_per_day=budget)
    clock = [1e9]
    meter, other = Meter(path, lambda: clock[0]), Meter(path, lambda: clock[0])
    sent: dict[int, list[tuple[int, Event | None]]] = defaultdict(list)
    for what, size, event, seconds in steps:
        clock[0] += seconds
        if what == "restart":
            meter = Meter(path, lambda: clock[0])
        if what == "cut" and path.exists():  # killed while it wrote a booking: nothing had left for it
            with open(path, "ab") as f:
                f.write(
                    b'{"day": "2001-09-09", "bytes": 123456, "event": null, "about": ""}'[
                        : data.draw(st.integers(1, 60))
                    ]
                )
        refused = (other if what == "other process" else meter).book(policy, size, event)
        if refused is not None:
            assert 1 <= sentences(refused) <= 2
            assert refused.endswith(".")
        elif what == "die":  # killed between booking and sending
            meter = Meter(path, lambda: clock[0])
        else:
            sent[int(clock[0] // DAY)].append((size, event))
        booked = Meter(path, lambda: clock[0]).today()
        assert booked == meter.today() == other.today()
        assert booked.bytes >= sum(size for size, _ in sent[int(clock[0] // DAY)])
    for left in sent.values():
        assert most is None or sum(size for size, _ in left) <= most
        events = [e for _, e in left if e is not None]
        if budget is not None and events:
            assert all(e.multiplier > 0 for e in events)
            assert epsilon(events, policy.delta) <= budget


def test_a_refused_request_books_nothing_and_a_new_day_starts_anew(tmp_path: Path) -> None:
    clock = [DAY - 1]
    meter, policy = Meter(tmp_path / "b", lambda: clock[0]), Policy(bytes_per_day=100)
    assert meter.book(policy, 60) is None
    assert "today it has sent 60, and 50 more are too many" in str(meter.book(policy, 50))
    assert meter.book(policy, 40) is None
    assert meter.today() == Day(100)
    clock[0] = DAY
    assert meter.today() == Day()
    assert meter.book(policy, 100) is None
    (tmp_path / "b").rename(tmp_path / "old")  # an operator moves the book
    assert meter.today() == Day()


def test_epsilon_is_counted_over_all_runs_of_a_day(tmp_path: Path) -> None:
    meter, policy = Meter(tmp_path / "b"), Policy(epsilon_per_day=1.5)
    most = next(n for n in range(1, 1000) if epsilon([Event(8.0, NOISY.sampling, n + 1)], policy.delta) > 1.5)
    answers = [meter.book(policy, 1, NOISY, f"run {i}") for i in range(most + 1)]
    assert answers[:-1] == [None] * most
    assert "This site spends at most epsilon 1.5 a day" in str(answers[-1])
    assert meter.today().events == (Event(8.0, NOISY.sampling, most),)
    assert "cannot be added" in str(meter.book(policy, 1, OTHER_LAW))
    assert meter.book(policy, 1, None) is None  # sent before: bytes only


def test_what_left_without_noise_spends_the_day(tmp_path: Path) -> None:
    meter = Meter(tmp_path / "b")
    assert meter.book(Policy(), 1, Event(0.0)) is None
    assert "without noise today" in str(meter.book(Policy(epsilon_per_day=math.inf), 1, NOISY))


def test_a_damaged_book_lets_nothing_leave(tmp_path: Path) -> None:
    path = tmp_path / "b"
    Meter(path).book(Policy(), 5)
    assert os.stat(path).st_mode & 0o077 == 0  # the owner's business alone
    for bad in (b"{}\n", b"[]\n", b"\xff\n", b'{"day": "x", "bytes": 1, "event": 3}\n'):
        path.write_bytes(bad)
        for call in (lambda: Meter(path).book(Policy(), 5), Meter(path).today):
            with pytest.raises(RunError, match=r"is damaged\. Nothing leaves until it is mended"):
                call()
    with pytest.raises(RunError, match="cannot be opened"):
        Meter(tmp_path).book(Policy(), 5)


def test_a_booking_is_on_the_disk_before_the_answer_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "b", []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(path.read_bytes()))
    assert Meter(path).book(Policy(), 7, NOISY, "run a, round 3") is None
    entry = json.loads(synced[0])
    assert (entry["bytes"], entry["event"]["multiplier"], entry["about"]) == (7, 8.0, "run a, round 3")
