"""Stages as one run: read with all problems at once, resumed to the same bits, told on one page."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from typer.testing import CliRunner

from atoll.cli import app
from atoll.core.errors import DataError, RecipeError, RunError
from atoll.core.files import read_json_lines
from atoll.core.tree import equal, named_tensors
from atoll.diffusion.denoiser import Denoiser
from atoll.models.export import load_model
from atoll.recipes.distil import Distil, read_distil
from atoll.recipes.pipeline import (
    Pipeline,
    as_yaml,
    foreseen,
    load_any,
    read_pipeline,
    reopen_stages,
    start_stages,
)  # fmt: skip
from atoll.recipes.png import grid, png
from atoll.recipes.recipe import Recipe, load_recipe, read_recipe, recipe_yaml
from atoll.recipes.run import start as start_run

TINY = {"name": "unet", "width": 8}
GENERATOR = {"task": "denoising", "model": TINY, "sites": 3, "rounds": 2, "method": {"name": "fedavg"}}
ONE_STEP = {
    "stage": "distil", "start": "generator", "method": "sim", "steps": 4, "batch": 16, "samples": 40,
    "compare": [{"solver": "ddim", "steps": 3}],
}  # fmt: skip
ALONE = {
    "stage": "distil", "name": "alone", "teacher": {"steps": 2, "batch": 16, "model": TINY}, "method": "dmd",
    "steps": 8, "batch": 16, "samples": 40, "limit": 400,
}  # fmt: skip
AT_SITES = {
    "task": {"name": "distilling", "start": "generator", "method": "cd_ct", "samples": 20}, "sites": 3, "rounds": 1,
    "method": {"name": "distil_at_sites", "steps": 1, "batch": 8},
}  # fmt: skip
STORY = {
    "name": "story", "shared": {"data": "digits", "limit": 400},
    "stages": {"generator": GENERATOR, "classifier": {"sites": 3, "rounds": 2}, "one_step": ONE_STEP, "student": AT_SITES},
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def test_all_problems_of_all_stages_are_told_at_once():
    wrong = {
        "name": "x", "shared": {"dat": "digits"}, "extra": 1,
        "stages": {
            "generator": {**GENERATOR, "roundz": 3},
            "one_step": {**ONE_STEP, "start": "generatr", "method": "simm"},
            "later": {"stage": "distill"},
        },
    }  # fmt: skip
    with pytest.raises(RecipeError) as e:
        read_pipeline(wrong)
    text = str(e.value)
    for said in (
        "`extra`: a recipe with stages has", "`shared.dat`: no stage has such a field. Did you mean `data`?",
        "stage `generator`: `roundz`", "stage `one_step`: `method`", "there is no stage `distill`. Did you mean `distil`?",
    ):  # fmt: skip
        assert said in text, said
    with pytest.raises(RecipeError, match=r"`start` names no earlier stage\. Did you mean `generator`"):
        read_pipeline({**STORY, "stages": {"generator": GENERATOR, "one_step": {**ONE_STEP, "start": "generatr"}}})
    astray = {**AT_SITES, "task": {**AT_SITES["task"], "start": "generatr"}}
    with pytest.raises(RecipeError, match=r"`student`: `start` names no earlier stage\. Did you mean `generator`"):
        read_pipeline({**STORY, "stages": {"generator": GENERATOR, "student": astray}})
    with pytest.raises(RecipeError, match=r"^1 problem"):  # a broken stage is earlier all the same
        read_pipeline({**STORY, "stages": {"generator": {**GENERATOR, "rounds": -1}, "one_step": ONE_STEP}})
    with pytest.raises(RecipeError, match="`stages` must be a mapping"):
        read_pipeline({"stages": []})
    with pytest.raises(RecipeError, match="Say how long to train"):
        read_distil({"method": "sim"})


def test_a_recipe_is_written_as_it_is_read(tmp_path: Path):
    pipeline = read_pipeline(STORY)
    (tmp_path / "r.yaml").write_text(as_yaml(pipeline))
    again = load_any(str(tmp_path / "r.yaml"))
    assert isinstance(again, Pipeline)
    assert as_yaml(again) == as_yaml(pipeline)
    stages = again.stages
    assert isinstance(stages["one_step"], Distil)
    assert isinstance(stages["classifier"], Recipe)
    assert stages["classifier"].limit == 400
    with pytest.raises(RecipeError, match="a single federated recipe"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_a_story_from_start_to_page(tmp_path: Path):
    (tmp_path / "story.yaml").write_text(yaml.safe_dump(STORY))
    result = CliRunner().invoke(app, ["run", str(tmp_path / "story.yaml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert re.search(r"sim: 1 call, distance [\d.e+]+, class agreement", result.output)
    for stage in STORY["stages"]:
        assert (tmp_path / "run" / stage / "report.html").exists()
        assert list((tmp_path / "run" / stage / "model").iterdir())
    page = (tmp_path / "run" / "report.html").read_text()
    assert (
        page.count('src="data:image/png;base64,') == 6
    )  # generator and student of the sites before and after, the teacher, the student
    assert not re.search(r'(src|href)="(?!data:|generator/|classifier/|one_step/|student/)', page)
    assert "<script>" in page
    for said in ("Generator", "Classifier", "One step", "distance", "0 B"):
        assert said in page, said
    done = reopen_stages(tmp_path / "run")
    assert done is not None
    before = (tmp_path / "run" / "one_step" / "events.jsonl").read_bytes()
    done.go()  # finished: nothing is done twice
    assert (tmp_path / "run" / "one_step" / "events.jsonl").read_bytes() == before
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "run"), "--json"])
    assert set(json.loads(shown.output)) == set(STORY["stages"])
    with pytest.raises(RunError, match="already holds a run"):
        start_stages(read_pipeline(STORY), tmp_path / "run")
    drawn = CliRunner().invoke(
        app, ["draw", str(tmp_path / "run" / "one_step"), "--out", str(tmp_path / "x.png"), "--per-class", "3"]
    )
    assert "30 samples" in drawn.output, drawn.output
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    wrong = CliRunner().invoke(app, ["draw", str(tmp_path / "run" / "classifier")])
    assert isinstance(wrong.exception, DataError)


def test_a_killed_distillation_ends_with_the_same_bits(tmp_path: Path):
    chosen = read_distil({**ALONE, "steps": 40})
    start_stages(chosen, tmp_path / "straight").go()

    run = start_stages(chosen, tmp_path / "killed")
    pid = os.fork()
    if pid == 0:
        try:
            from atoll.diffusion import trainer

            trainer.Trainer.save_every = 0.0  # after every step
            run.chosen = chosen
            run.go()
        finally:
            os._exit(1)
    events = tmp_path / "killed" / "events.jsonl"
    for _ in range(3000):
        if events.exists() and sum(e["event"] == "step" for e in read_json_lines(events)) >= 5:
            break
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    reopened = reopen_stages(tmp_path / "killed")
    assert reopened is not None
    reopened.go()
    ours, theirs = (
        safetensors.torch.load_file(tmp_path / name / "model" / "model.safetensors") for name in ("straight", "killed")
    )
    assert equal(ours, theirs)
    steps = [e["step"] for e in read_json_lines(events) if e["event"] == "step"]
    assert steps == sorted(set(steps))


def test_a_plan_names_steps_and_work():
    plans = foreseen(read_pipeline(STORY))
    assert plans["one_step"]["steps"] == 4
    assert plans["one_step"]["flops"] > 0
    assert plans["generator"].up_bytes > 0
    budget = foreseen(read_distil({**ALONE, "steps": None, "budget": 0.001}))[""]
    assert budget["steps"] >= 1
    assert budget["flops"] <= 0.001e12


def test_equal_budgets_are_equal_work(tmp_path: Path):
    """A method whose step is dearer gets fewer of them."""
    budget = {**ALONE, "steps": None, "budget": 0.01}
    steps = {m: foreseen(read_distil({**budget, "method": m}))[""]["steps"] for m in ("dmd", "sim")}
    assert steps["sim"] < steps["dmd"]


def test_a_student_loads_alone(tmp_path: Path):
    run = start_stages(read_distil({**ALONE, "steps": 2}), tmp_path / "run")
    run.go()
    student = load_model(tmp_path / "run" / "model")
    assert isinstance(student, Denoiser)
    saved = safetensors.torch.load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert equal(saved, dict(named_tensors(student)))
    again = read_distil({**ALONE, "steps": 1, "start": str(tmp_path / "run" / "model")})  # and teaches
    start_stages(again, tmp_path / "again").go()
    assert isinstance(load_model(tmp_path / "again" / "model"), Denoiser)


@pytest.mark.parametrize("where", ["server", "sites"])
@pytest.mark.parametrize("lora", [None, 2])
def test_a_checkpoint_of_diffusers_is_distilled_into_its_own_format(where: str, lora: int | None, tmp_path: Path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    body = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=1, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=1,
    )  # fmt: skip
    body.save_pretrained(tmp_path / "dit" / "transformer")
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "dit" / "scheduler")
    begins = {"start": str(tmp_path / "dit"), "lora": lora}
    if where == "server":
        start_stages(read_distil({**ALONE, "steps": 2, **begins}), tmp_path / "run").go()
    else:
        task = {"name": "distilling", "method": {"name": "cd_ct", "lr": 0.01}, "samples": 20, **begins}
        start_run(read_recipe({**AT_SITES, "data": "digits", "limit": 100, "task": task}), tmp_path / "run")[0].go()
    folder = tmp_path / "run" / "model"
    if lora is None:
        student = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer")
        moved = [bool((a != b).any()) for a, b in zip(student.parameters(), body.parameters(), strict=True)]
        assert any(moved)
    else:
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(body, folder)
        assert sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n) > 0


def test_a_teacher_that_does_not_fit_the_data_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="holds no"):
        foreseen(read_distil({**ALONE, "start": str(tmp_path)}))
    start_stages(read_distil({**ALONE, "steps": 0}), tmp_path / "run").go()
    wine = {"name": "sklearn_table", "table": "wine"}
    wrong = read_distil({**ALONE, "start": str(tmp_path / "run" / "model"), "data": wine, "limit": None})
    with pytest.raises(DataError, match="does not make rows of 13"):
        start_stages(wrong, tmp_path / "wrong").go()


def test_a_png_holds_the_pixels():
    import zlib

    import numpy as np

    image = np.arange(2 * 3 * 1, dtype=np.uint8).reshape(2, 3, 1)
    data = png(image)
    body = data[data.index(b"IDAT") + 4 : data.index(b"IEND") - 8]
    assert zlib.decompress(body) == b"\0\x00\x01\x02\0\x03\x04\x05"
    tiles = grid(np.zeros((3, 2, 2, 1), np.uint8), columns=2, gap=1)
    assert tiles.shape == (5, 5, 1)
    assert tiles[2].min() == 255


def test_folders_that_stages_start_from_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "models" / "old").mkdir(parents=True)
    (tmp_path / "generator").mkdir()
    monkeypatch.chdir(tmp_path)
    alone = yaml.safe_load(as_yaml(read_distil({**ALONE, "start": "generator"}), with_places=True))
    assert alone["start"] == str(tmp_path / "generator")
    stages = {"generator": GENERATOR, "one_step": ONE_STEP, "other": {**ONE_STEP, "start": "models/old"}}
    story = yaml.safe_load(as_yaml(read_pipeline({**STORY, "stages": stages}), with_places=True))["stages"]
    assert story["one_step"]["start"] == "generator", "a stage, whatever lies about"
    assert story["other"]["start"] == str(tmp_path / "models" / "old")


def test_a_plan_of_stages_needs_no_model_that_they_make():
    """Whichever kind of stage begins with whichever."""
    stages = {
        "alone": ALONE, "again": {**ONE_STEP, "start": "alone"}, "sites": {**AT_SITES, "task": {**AT_SITES["task"], "start": "again"}},
        "last": {**ONE_STEP, "start": "sites"},
    }  # fmt: skip
    found = foreseen(read_pipeline({**STORY, "stages": stages}))
    assert found["again"]["parameters"] == found["last"]["parameters"] == found["alone"]["parameters"]
    assert found["sites"].exact


def test_stages_go_on_where_their_folder_was_moved_to(tmp_path: Path):
    """A federated stage begins with the model that lies beside it now."""
    pipeline = read_pipeline({**STORY, "stages": {"generator": GENERATOR, "student": {**AT_SITES, "rounds": 2}}})
    run = start_stages(pipeline, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run.go(on_row=lambda row: stop_at(row, "energy_distance"))
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = reopen_stages(tmp_path / "b")
    assert moved is not None
    moved.go()
    start_stages(pipeline, tmp_path / "c").go()
    same = [load_model(tmp_path / name / "student" / "model") for name in ("b", "c")]
    assert equal(*(dict(named_tensors(m)) for m in same))


def stop_at(row: object, metric: str) -> None:
    if metric in row.metrics:  # type: ignore[attr-defined]
        raise KeyboardInterrupt


def test_a_stage_that_leaves_models_at_sites_is_no_beginning(tmp_path: Path):
    apart = {**GENERATOR, "method": {"name": "fedbn"}}
    run = start_stages(read_pipeline({**STORY, "stages": {"generator": apart, "one_step": ONE_STEP}}), tmp_path / "run")
    with pytest.raises(RunError, match="left a model at each site, and `one_step` starts from one"):
        run.go()


def test_a_lone_recipe_names_its_teacher_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "teacher").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe({**AT_SITES, "task": {**AT_SITES["task"], "start": "teacher"}})
    assert yaml.safe_load(recipe_yaml(recipe, with_places=True))["task"]["start"] == str(tmp_path / "teacher")
    pipeline = read_pipeline(
        {
            **STORY,
            "stages": {"teacher": GENERATOR, "student": {**AT_SITES, "task": {**AT_SITES["task"], "start": "teacher"}}},
        }
    )
    said = yaml.safe_load(as_yaml(pipeline, with_places=True))
    assert said["stages"]["student"]["task"]["start"] == "teacher", "a stage's name, whatever lies there"
