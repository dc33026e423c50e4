"""Claims whose arms make few-step generators."""

from __future__ import annotations

from pathlib import Path

import pytest

from atoll.claims import distil, run
from atoll.claims.catalogue import subject
from atoll.claims.claim import Claim
from atoll.claims.run import run_claim
from atoll.claims.table import claims_page
from atoll.core.errors import RecipeError, RunError

WORK = {
    "data": "digits", "limit": 400, "teacher": {"steps": 2, "batch": 16, "model": {"name": "unet", "width": 8}},
    "steps": 3, "batch": 16, "samples": 60,
}  # fmt: skip
ARMS = {
    "teacher_1": {"method": "edm_fm_teacher", "steps": 0, "calls": [1]},
    "teacher_4": {"method": "edm_fm_teacher", "steps": 0, "calls": [4]},
    "dmd_1": {"method": "dmd", "calls": [1]},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    distil._trained.clear()


def claim(**fields: object) -> Claim:
    return Claim(**{
        "name": "tiny", "subject": "dmd", "statement": "Three steps teach nothing.", "stage": "distil",
        "work": WORK, "arms": ARMS, "seeds": (0, 1), "expect": ("dmd_1 < teacher_1", "teacher_4 < teacher_1"), **fields,
    })  # type: ignore[arg-type]  # fmt: skip


def test_an_arm_is_judged_at_its_calls_and_billed(monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = []
    plain = distil.Trainer.go
    monkeypatch.setattr(distil.Trainer, "go", lambda self, **k: trainings.append(self.steps) or plain(self, **k))
    record = run_claim(claim())
    assert sorted(t for t in trainings if t != 2) == [0, 0, 3, 3], "arms that differ in calls alone share a training"
    arms = record["arms"]
    assert [a["seeds"][0]["calls"] for a in arms.values()] == [1, 4, 1]
    for arm in arms.values():
        for seed in arm["seeds"]:
            assert seed["value"] == seed["judged"]["fid"]
            assert not seed["higher_is_better"]
    assert arms["dmd_1"]["seeds"][0]["steps"] == 3
    assert arms["dmd_1"]["seeds"][0]["trained_parameters"] > 0
    values = {s["value"] for a in arms.values() for s in a["seeds"]}
    assert len(values) == 6, "other calls and other seeds give other samples"
    page = claims_page([record])
    assert "| 1 | dmd_1 | [tiny](#tiny) | one place | nothing |" in page
    assert "| 4 | teacher_4 | [tiny](#tiny) | one place | images |" in page
    assert subject(record, "dmd_1 < teacher_1") == "dmd"


def test_another_measure_may_be_claimed() -> None:
    record = run_claim(
        claim(
            measure="recall",
            seeds=(0,),
            arms={k: ARMS[k] for k in ("teacher_1", "teacher_4")},
            expect=("teacher_4 > teacher_1",),
        )
    )
    seed = record["arms"]["teacher_4"]["seeds"][0]
    assert seed["higher_is_better"]
    assert seed["value"] == seed["judged"]["recall"]


def test_a_mistake_is_told_before_anything_runs() -> None:
    with pytest.raises(RecipeError, match="arm dmd_1"):
        run_claim(claim(arms={**ARMS, "dmd_1": {"method": {"name": "dmd", "critic_step": 2}}}))


SITES = {
    "data": "digits", "limit": 300, "task": "denoising", "model": {"name": "unet", "width": 8}, "sites": 2, "rounds": 1,
    "method": {"name": "fedavg", "training": {"lr": 0.002, "optimizer": "adam", "epochs": 1, "batch_size": 64}},
}  # fmt: skip


def test_sites_may_make_the_teacher_once_for_all_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain = distil.start
    monkeypatch.setattr(distil, "start", lambda recipe, folder: asked.append(recipe.name) or plain(recipe, folder))
    work = {**WORK, "start": SITES}
    record = run_claim(claim(work=work, seeds=(0,)))
    again = run_claim(claim(work=work, seeds=(0,)))
    assert asked == ["teacher"], "one federated run for all arms and claims"
    for arm in record["arms"]:
        (seed,) = record["arms"][arm]["seeds"]
        assert seed["up_bytes"] > 1000
        assert seed["value"] == again["arms"][arm]["seeds"][0]["value"]
        assert record["arms"][arm]["recipe"]["start"]["sites"] == 2
    assert str(distil.user_cache()) not in str(record), "a record names no folder of the machine"
    page = claims_page([record, {**again, "name": "second"}])
    assert page.count("| dmd_1 | [tiny](#tiny) | 2 sites, fedavg |") == 1
    assert "[second](#second) | 2 sites" not in page, "the same work is one row"


def test_sites_may_make_the_student_too() -> None:
    """The federated run of a student begins with that of its teacher; bytes and steps are those of all of them."""
    local = {"name": "distil_at_sites", "steps": 2, "batch": 8, "rounds": 2}
    student = {
        **SITES, "rounds": 2, "method": local, "task": {"name": "distilling", "start": SITES, "method": "cd_ct"}
    }  # fmt: skip
    del student["model"]
    arms = {
        "teacher_1": {"method": "edm_fm_teacher", "steps": 0, "calls": [1], "start": SITES},
        "at_sites_1": {"method": "cd_ct", "steps": 0, "calls": [1], "start": student},
    }
    record = run_claim(claim(arms=arms, expect=("at_sites_1 < teacher_1",), seeds=(0,)))
    assert str(distil.user_cache()) not in str(record)
    seeds = {name: record["arms"][name]["seeds"][0] for name in arms}
    assert seeds["at_sites_1"]["steps"] == 4
    assert seeds["at_sites_1"]["up_bytes"] > 2 * seeds["teacher_1"]["up_bytes"]
    assert seeds["at_sites_1"]["value"] != seeds["teacher_1"]["value"]
    assert "2 sites, fedavg, then distil_at_sites" in claims_page([record])


def test_a_mistake_in_the_sites_recipe_is_told_before_anything_runs() -> None:
    with pytest.raises(RecipeError, match="arm teacher_1, start"):
        run_claim(claim(work={**WORK, "start": {**SITES, "ruonds": 3}}))


def test_a_method_that_leaves_models_at_the_sites_has_no_teacher() -> None:
    sites = {**SITES, "method": {**SITES["method"], "name": "fedbn"}}
    with pytest.raises(RunError, match="a model at each site"):
        run_claim(claim(work={**WORK, "start": sites}, seeds=(0,)))


def test_an_interrupted_claim_measures_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_claim(claim())
    plain, asked = run.measure_distil, []

    def broken(measure: str, making: distil.Making) -> dict[str, object]:
        asked.append(making.distil.name)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return plain(measure, making)

    monkeypatch.setattr(run, "measure_distil", broken)
    monkeypatch.setattr(run, "_commit", lambda: "abc1234")
    journal = tmp_path / "tiny.partial.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_claim(claim(), journal)
    with journal.open("a") as f:
        f.write('{"commit": "abc1234", "key": "half a li')
    record = run_claim(claim(), journal)
    assert len(asked) == 4 + 3, "three of six measurements were there"
    assert record["comparisons"] == whole["comparisons"]
    for arm, a in record["arms"].items():
        assert [s["value"] for s in a["seeds"]] == [s["value"] for s in whole["arms"][arm]["seeds"]]
    monkeypatch.setattr(run, "_commit", lambda: "abc1234-dirty")
    run_claim(claim(), journal)
    assert len(asked) == 7 + 6, "code that changes has no results that stay"


def test_a_budget_pays_for_methods_that_divide_their_run() -> None:
    arms = {"pd_1": {"method": "pd", "steps": None, "budget": 0.02, "calls": [1]}, **ARMS}
    record = run_claim(claim(arms=arms, seeds=(0,), expect=("pd_1 < teacher_1",)))
    assert record["arms"]["pd_1"]["seeds"][0]["steps"] > 5
