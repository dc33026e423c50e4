"""What README and CONTRIBUTING say is true: their code runs, their recipes are recipes, their commands exist."""

from __future__ import annotations

import itertools
import re
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
import yaml

from atoll.core.errors import DataError
from atoll.federated.local.training import Training
from atoll.federated.methods.fedavg import fedavg
from atoll.recipes.distil import read_distil
from atoll.recipes.pipeline import read_pipeline
from atoll.recipes.recipe import load_recipe, read_recipe
from atoll.recipes.run import plan, prepare

ROOT = Path(__file__).parents[2]
README, CONTRIBUTING = (ROOT / name for name in ("README.md", "CONTRIBUTING.md"))


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language, without the indentation that a list gives them."""
    out: list[str] = []
    fence = None
    for line in path.read_text().splitlines():
        if line.strip().startswith("```"):
            fence = line.strip()[3:] if fence is None else None
            if fence == language:
                out.append("")
        elif fence == language:
            out[-1] += line + "\n"
    return [textwrap.dedent(block) for block in out]


def test_there_is_something_to_test():
    assert len(blocks(README, "python")) >= 1
    assert len(blocks(README, "yaml")) >= 1
    assert len(blocks(CONTRIBUTING, "python")) == 1


@pytest.mark.parametrize("code", blocks(README, "python"), ids=lambda c: c.split("\n", 1)[0])
def test_python_in_the_readme_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5, "a line a round"
    assert lines[-1].startswith("4 {'accuracy': ")


@pytest.mark.parametrize("text", blocks(README, "yaml"), ids=lambda t: t.split("\n", 1)[0])
def test_recipes_in_the_readme_are_recipes(text, tmp_path, monkeypatch):
    value = yaml.safe_load(text)
    if "stages" in value:
        stages = read_pipeline(value).stages
        assert stages["one_step"].start in stages
        return
    if value.get("stage") == "distil":
        assert read_distil(value).texts == value["texts"]
        return
    recipe = read_recipe(value)
    monkeypatch.chdir(tmp_path)
    if "task" in value:
        with pytest.raises(DataError, match="story/generator/model"):  # nobody has made it yet
            plan(prepare(recipe))
        return
    with pytest.raises(DataError, match="There is no file"):
        prepare(recipe)
    rows = "".join(f"{i},{i % 5},{'ABC'[i % 7 % 3]},{i % 2}\n" for i in range(200))
    Path(recipe.data.path).write_text(f"age,stay,{recipe.data.site},{recipe.data.target}\n" + rows)
    foreseen = plan(prepare(recipe))
    assert foreseen.sites == 3, "every hospital is a site"
    assert foreseen.rounds == recipe.rounds
    assert not foreseen.refused


def commands(path: Path) -> list[list[str]]:
    """Lines of shell blocks and inline code that call ``atoll``, without their comments."""
    shell = [line for block in blocks(path, "") for line in block.splitlines()]
    inline = re.findall(r"`(atoll [^`\n]*)`", path.read_text())
    calls = [line.split("#")[0].split() for line in [*shell, *inline]]
    return [[w.removeprefix(".venv/bin/") for w in c] for c in calls if c and c[0].endswith("atoll")]


@pytest.mark.parametrize("path", [README, CONTRIBUTING], ids=lambda p: p.name)
def test_commands_exist(path):
    import typer.main

    from atoll.cli import app

    found = commands(path)
    assert len(found) >= 2
    for _, *words in found:
        here = typer.main.get_command(app)
        for word in words:
            inner = getattr(here, "commands", {})
            if not inner:
                break
            assert word in inner, f"{path.name} says `atoll {' '.join(words)}`"
            here = inner[word]
        options = {o for p in here.params for o in p.opts}
        assert {w for w in words if w.startswith("--")} <= options | {"--help"}, words


@pytest.mark.parametrize("words", [c for c in commands(README) if c[1] in ("run", "plan")], ids=" ".join)
def test_recipes_and_changes_that_commands_name_are_real(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    changes = [after for before, after in itertools.pairwise(words) if before == "--set"]
    recipe = load_recipe(words[2], changes)
    assert recipe.rounds > 0
    for change in changes:
        if change.startswith("method.name="):
            assert recipe.method.card.name == change.partition("=")[2]


def test_links_and_targets_exist():
    for path in (README, CONTRIBUTING):
        text = path.read_text()
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        for line in re.findall(r"(?:^|`)make ([a-z ]+?)(?:  |`|$)", text, re.M):
            assert set(line.split()) <= set(targets), f"{path.name} says `make {line}`"


def test_files_that_contributing_points_at_exist():
    text = CONTRIBUTING.read_text()
    for name in re.findall(r"`((?:local|share|combine|server|select|schedules|codecs)/\w+\.py)`", text):
        assert (ROOT / "src/atoll/federated" / name).exists(), name
    for name in re.findall(r"`((?:docs|src|tests|claims)/[\w/.]+)`", text):
        promised = name in ("tests/federated/methods/test_fedsam.py", "claims/fedsam.yaml")
        assert promised or (ROOT / name).exists(), name


@pytest.fixture
def fedsam(monkeypatch):
    """The file that CONTRIBUTING shows whole, as a module."""
    (code,) = blocks(CONTRIBUTING, "python")
    module = types.ModuleType("fedsam")
    monkeypatch.setitem(sys.modules, "fedsam", module)
    exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
    return module


def test_the_method_in_contributing_works(fedsam, run):
    def weights(method):
        return run(method, rounds=2)[-1].engine.state.replica["weights"]

    plain = weights(fedavg(Training(step="stock")))
    none, some = weights(fedsam.fedsam(rho=0.0)), weights(fedsam.fedsam(rho=0.5))
    assert all(torch.equal(plain[n], none[n]) for n in plain), "rho = 0 is FedAvg's stock step, to the bit"
    assert any(not torch.equal(plain[n], some[n]) for n in plain)
    assert fedsam.fedsam().card.name == "fedsam"


def test_the_method_in_contributing_is_found_by_its_file(fedsam, monkeypatch):
    """As if the file lay among the methods: recipes name it, bounds are checked."""
    import pkgutil

    from atoll.core.errors import RecipeError
    from atoll.federated import methods

    there = "atoll.federated.methods.fedsam"
    monkeypatch.setitem(sys.modules, there, fedsam)
    fedsam.fedsam.__module__ = there
    listed = pkgutil.iter_modules
    monkeypatch.setattr(
        pkgutil, "iter_modules",
        lambda path: [*listed(path), *([pkgutil.ModuleInfo(None, "fedsam", False)] if path == methods.__path__ else [])],
    )  # fmt: skip
    recipe = read_recipe({"method": {"name": "fedsam", "rho": 0.1}})
    assert recipe.method.arguments["rho"] == 0.1
    with pytest.raises(RecipeError, match=r"`method.rho`: input should be greater than or equal to 0"):
        read_recipe({"method": {"name": "fedsam", "rho": -1}})
