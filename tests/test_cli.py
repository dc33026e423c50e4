"""The ``atoll`` command: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from atoll import cli
from atoll.recipes.distil import Distil
from atoll.recipes.recipe import Recipe, read_recipe

RECIPE = """\
rounds: 2
sites: 3
limit: 200
model: {name: mlp, hidden: [4]}
method: {name: scaffold}
uplink: [{name: quantise, bits: 8}]
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(RECIPE)


@pytest.fixture
def atoll(monkeypatch, capsys):
    """``atoll(*words)`` -> (exit code, stdout, stderr), through the installed entry point."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["atoll", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return call


@pytest.fixture
def answer(atoll):
    """What a ``--json`` command says, parsed by the strict standard."""

    def call(*words: str):
        code, out, err = atoll(*words)
        assert code == 0, err
        return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    return call


# ------------------------------------------------------------------------------------------- runs


def test_help_imports_nothing_heavy():
    code = """
import sys
from atoll.cli import main
sys.argv = ["atoll", "--help"]
try:
    main()
finally:
    heavy = {"torch", "numpy", "sklearn", "pydantic", "transformers", "yaml"} & set(sys.modules)
    print(sorted(heavy), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
    for command in ("run", "resume", "plan", "show", "report", "methods", "cite", "data", "claim", "schema"):
        assert f"\n  {command} " in done.stdout, command


def test_a_run_its_directory_and_its_words(atoll):
    code, out, _ = atoll("run", "small.yaml")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if not line.startswith(" ")] == [
        "plan", "done", "model", "report",
    ]  # fmt: skip
    folder = Path("runs/run")
    assert {p.name for p in folder.iterdir()} >= {"recipe.yaml", "plan.json", "events.jsonl", "model", "report.html"}
    assert f"report  {folder / 'report.html'}" in out
    resolved = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert resolved["method"]["training"]["lr"] > 0, "defaults are spelled out"
    assert read_recipe(resolved) == read_recipe(yaml.safe_load(RECIPE))

    assert atoll("run", "small.yaml")[0] == 0
    assert (Path("runs/run-2") / "report.html").exists(), "a second run has its own directory"
    assert atoll("run", "small.yaml")[0] == 0
    assert (Path("runs/run-3") / "report.html").exists()


def test_an_existing_run_is_not_written_over(atoll):
    before = (atoll("run", "small.yaml", "--out", "mine"), (Path("mine") / "events.jsonl").read_bytes())
    assert before[0][0] == 0
    code, out, err = atoll("run", "small.yaml", "--out", "mine")
    assert (code, out) == (2, "")
    assert "mine already holds a run; `atoll resume mine`" in err
    assert (Path("mine") / "events.jsonl").read_bytes() == before[1]


def test_run_and_show_and_resume_agree_in_json(answer, atoll):
    ran = answer("run", "small.yaml", "--out", "here", "--json")
    assert (ran["rounds"], ran["refused"], ran["epsilon"]) == (2, 0, None)
    assert 0 <= ran["metrics"]["accuracy"] <= 1
    assert Path(ran["report"]).exists()
    assert Path(ran["model"]).is_dir()
    shown, again = answer("show", "here", "--json"), answer("resume", "here", "--json")
    assert shown == again == {k: v for k, v in ran.items() if k not in ("report", "model")}
    assert atoll("resume", "here")[1].startswith("here is finished already")
    assert "accuracy" in atoll("show", "here")[1]


def test_an_unfinished_run_is_shown_resumed_and_reported(answer, atoll):
    answer("run", "small.yaml", "--out", "calm", "--json")
    from atoll.recipes.recipe import load_recipe
    from atoll.recipes.run import start

    class Stop(Exception):
        pass

    def stop(row):
        raise Stop

    begun, _ = start(load_recipe("small.yaml"), Path("broken"))
    with pytest.raises(Stop):
        begun.go(stop)
    assert answer("show", "broken", "--json") == {"event": "unfinished", "rounds": 1}
    assert "1 rounds done, not finished; `atoll resume broken` goes on" in atoll("show", "broken")[1]
    assert atoll("report", "broken")[1].strip() == "broken/report.html"
    assert "not finished" in Path("broken/report.html").read_text()
    went_on = answer("resume", "broken", "--json")
    same = ("metrics", "up_bytes", "down_bytes", "flops", "virtual_seconds")
    assert {k: went_on[k] for k in same} == {k: answer("show", "calm", "--json")[k] for k in same}


def test_plan_writes_nothing(answer, atoll):
    before = sorted(Path().rglob("*"))
    foreseen = answer("plan", "small.yaml", "--json")
    code, out, _ = atoll("plan", "small.yaml")
    assert code == 0
    assert f"plan    2 rounds, 3 of 3 sites in each, {foreseen['parameters']:,} parameters" in out
    assert "at most" not in out
    assert sorted(Path().rglob("*")) == before
    assert foreseen["up_bytes"] == answer("run", "small.yaml", "--json")["up_bytes"]


def test_plan_says_what_it_does_not_know(atoll):
    assert "at most" in atoll("plan", "small.yaml", "--set", "method=edgefd", "--set", "uplink=null")[1]
    out = atoll("plan", "small.yaml", "--set", "attack=reverse_ranking", "--set", "hostile=0.4")[1]
    assert "will be refused: site" in out
    assert "this method sends none" in out


def test_changes_reach_nested_fields(answer):
    shown = answer("plan", "small.yaml", "--set", "rounds=3", "--set", "uplink.0.bits=2", "--json")
    plain = answer("plan", "small.yaml", "--set", "rounds=3", "--json")
    assert shown["up_bytes"] < plain["up_bytes"]
    assert shown["rounds"] == 3


def test_a_python_recipe(answer, atoll):
    Path("mine.py").write_text(
        "from atoll import Recipe\nfrom atoll.models.mlp import MLP\n\n"
        "def tiny() -> Recipe:\n    return Recipe(rounds=1, sites=3, limit=200, model=MLP((4,)))\n"
    )
    assert answer("show", "mine.py:tiny", "--json")["model"] == {"name": "mlp", "hidden": [4]}
    assert answer("plan", "mine.py:tiny", "--set", "rounds=4", "--json")["rounds"] == 4
    assert answer("run", "mine.py:tiny", "--json")["rounds"] == 1


def test_your_own_model_needs_trust(answer, atoll, monkeypatch):
    Path("own_net.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n    def __init__(self, outputs):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, outputs))\n"
    )
    monkeypatch.syspath_prepend(str(Path().resolve()))
    change = ("--set", "model={name: user, factory: 'own_net:Net'}", "--set", "method=fedavg")
    code, _, err = atoll("run", "small.yaml", *change, "--out", "own")
    assert (code, Path("own").exists(), "own_net" in sys.modules) == (2, False, False)
    assert "is not trusted" in err
    assert answer("run", "small.yaml", *change, "--out", "own", "--trust", "own_net", "--json")["rounds"] == 2
    assert answer("resume", "own", "--trust", "own_net", "--json")["rounds"] == 2


# ------------------------------------------------------------------------------------------- listings


def test_show_spells_a_recipe_out(answer, atoll):
    chosen = answer("show", "small.yaml", "--json")
    assert yaml.safe_load(atoll("show", "small.yaml")[1]) == chosen
    assert set(chosen) == set(Recipe.__dataclass_fields__)
    assert chosen["method"]["name"] == "scaffold"


def test_methods(answer, atoll):
    rows = answer("methods", "--json")
    assert {"fedavg", "scaffold", "top_k", "krum", "dirichlet", "flora"} <= {r["name"] for r in rows}
    for r in rows:
        assert set(r) == {"name", "area", "summary", "source", "parameters", "card", "claims"}, r["name"]
        assert r["area"]
        assert r["summary"]
        assert isinstance(r["claims"], list)
        assert all(p.keys() == {"type", "required", "help", "default"} for p in r["parameters"].values())
    codecs = answer("methods", "--area", "codec", "--json")
    assert {r["area"] for r in codecs} == {"codec"}
    assert {r["name"] for r in codecs} < {r["name"] for r in rows}
    (one,) = answer("methods", "fedprox", "--json")
    assert one["parameters"]["mu"]["help"]
    out = atoll("methods", "fedprox")[1]
    assert out.startswith("fedprox (federated method): ")
    assert "1812.06127" in out
    assert "  mu: float" in out
    listed = atoll("methods")[1]
    assert all(r["name"] in listed for r in rows)


def test_cite_names_exactly_the_papers_of_the_parts(answer, atoll):
    found = answer("cite", "small.yaml", "--json")
    by_part = {f["part"]: f for f in found}
    assert by_part["scaffold"]["arxiv"] == "1910.06378"
    assert {"scaffold", "quantise", "dirichlet"} == set(by_part)
    lines = atoll("cite", "small.yaml")[1].splitlines()
    assert len(lines) == len(found)
    assert any(line.startswith("scaffold: Sai Praneeth Karimireddy") for line in lines)
    bibtex = atoll("cite", "small.yaml", "--bibtex")[1]
    assert bibtex.count("@") == len(found)
    assert "author = {Sai Praneeth Karimireddy and Satyen Kale and " in bibtex
    assert "topk" not in atoll("cite", "small.yaml", "--set", "uplink=null")[1]


def test_data_show(answer, atoll):
    shown = answer("data", "show", "small.yaml", "--json")
    assert len(shown["rows"]) == shown["sites"] == 3
    everyone = sum(sum(r.values()) for r in shown["rows"]) + shown["common_test"]
    assert everyone == 200
    code, out, _ = atoll("data", "show", "small.yaml", "--out", "pictures/sites.svg")
    assert code == 0
    assert out.rstrip().endswith("picture: pictures/sites.svg")
    assert Path("pictures/sites.svg").read_text().startswith("<svg")


def test_schema_knows_every_field_and_part(answer):
    defs = answer("schema")["$defs"]
    assert set(defs["federate"]["properties"]) == set(Recipe.__dataclass_fields__)
    assert set(defs["distil"]["properties"]) == {"stage", *Distil.__dataclass_fields__}
    codecs = json.dumps(defs["atoll.federated.method.Codec"])
    assert '"top_k"' in codecs
    assert '"fraction"' in codecs
    assert '"info"' not in json.dumps(defs["atoll.tasks.task.Task"]), "a task learns of the data by itself"


def test_claims(answer, atoll):
    Path("claims").mkdir()
    (Path("claims") / "tiny.yaml").write_text(
        "name: tiny\nsubject: quantise\nstatement: Eight bits are fewer bytes than thirty-two.\n"
        "work: {sites: 3, limit: 200, rounds: 1, model: {name: mlp, hidden: [4]}}\n"
        "arms:\n  full: {}\n  small: {uplink: [{name: quantise, bits: 8}]}\n"
        "metric: bytes\nseeds: [0, 1]\nexpect:\n  - small < full\n"
    )
    (record,) = answer("claim", "run", "--folder", "claims", "--json")
    assert record["comparisons"][0]["verdict"] == "reproduced"
    assert [s["seed"] for s in record["arms"]["full"]["seeds"]] == [0, 1]
    assert answer("claim", "table", "--folder", "claims", "--json") == [record]
    out = atoll("claim", "run", "--folder", "claims")[1]
    assert "Every claim in claims has a record" in out
    assert atoll("claim", "run", "tiny", "--folder", "claims")[1] == "tiny: small < full: reproduced\n"
    assert atoll("claim", "table")[1].split() == ["docs/claims.md", "docs/methods.md"]
    assert "| [tiny](#tiny) | small < full | **reproduced** |" in Path("docs/claims.md").read_text()
    (quantise,) = answer("methods", "quantise", "--json")
    assert [c["verdict"] for c in quantise["claims"]] == ["reproduced"]


# ------------------------------------------------------------------------------------------- refusals

TABLE = "data={name: table, path: rows.csv, target: y}"
BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no file": (("run", "smal.yaml"), "there is no file smal.yaml"),
    "a folder": (("run", "."), "cannot be read as text"),
    "a list": (("plan", "list.yaml"), "a recipe is a mapping such as `method: fedavg`"),
    "not YAML": (("plan", "broken.yaml"), "broken.yaml is not YAML in line 2"),
    "not text": (("plan", "binary.yaml"), "binary.yaml cannot be read as text"),
    "unknown field": (("run", "small.yaml", "--set", "methd=fedavg"), "`methd`: is not an argument of Recipe. Did you"),
    "unknown method": (("run", "small.yaml", "--set", "method=fedvag"), "Did you mean `fedavg`?"),
    "two problems": (
        ("run", "small.yaml", "--set", "rounds=0", "--set", "model=mpl"),
        "2 problems in small.yaml:\n 1. `rounds`: input should be greater than or equal to 1, got 0\n 2. `model`: there is",
    ),
    "no value": (("run", "small.yaml", "--set", "rounds"), "`--set rounds` is not of the form a.b=c"),
    "empty step": (("run", "small.yaml", "--set", "method.=3"), "`--set method.=3` is not of the form a.b=c"),
    "half a value": (("run", "small.yaml", "--set", "method={"), "'{' is not a YAML value"),
    "field of a number": (("run", "small.yaml", "--set", "rounds.x=1"), "`rounds` is a value and has no fields"),
    "item out of range": (("run", "small.yaml", "--set", "uplink.3.bits=1"), "there is no item 3 to set"),
    "escaping name": (("run", "small.yaml", "--set", "name=../up"), "`name` also names the run's directory"),
    "too many sites": (("run", "small.yaml", "--set", "sites=500"), "cannot be shared by 500 sites; use fewer sites"),
    "no rows left": (("run", "small.yaml", "--set", "validation=0.9"), "together leave no rows to train on"),
    "no such column": (("plan", "small.yaml", "--set", TABLE.replace("y}", "z}")), "`rows` has no column `z`"),
    "too few owners": (
        ("plan", "small.yaml", "--set", TABLE.replace("y}", "y, site: h}"), "--set", "partition=by_column", "--set", "sites=9"),
        "names 3 owners; use at most 3 sites",
    ),
    "model for pictures": (("plan", "small.yaml", "--set", TABLE, "--set", "model=cnn"), "cnn takes images"),
    "task for text": (("plan", "small.yaml", "--set", "task=language"), "which a language task needs"),
    "codecs in the wrong order": (
        ("plan", "small.yaml", "--set", "uplink=[quantise, top_k]"), "use TopK -> Quantise",
    ),
    "noise without a bound": (
        ("plan", "small.yaml", "--set", "uplink=[{name: gaussian_noise, multiplier: 1, clip_norm: 1}]"),
        "GaussianNoise needs Clip before it",
    ),
    "no GPU": (("plan", "small.yaml", "--set", "device=cuda"), "`device: cuda` needs a GPU"),
    "untrusted code": (
        ("plan", "small.yaml", "--set", "model={name: user, factory: 'os:system'}"), "allow it with `--trust os`",
    ),
    "every visit fails": (
        ("plan", "small.yaml", "--set", "attack=reverse_ranking", "--set", "hostile=0.99"),
        "No visit can succeed. site 0: ReverseRanking attacks rankings",
    ),
    "out is a file": (("run", "small.yaml", "--out", "small.yaml"), "cannot be written (File exists)"),
    "no function": (("run", "recipe.py:god"), "has no function `god`. Did you mean `good`?"),
    "not a recipe": (("run", "recipe.py:number"), "must return a Recipe, not int"),
    "it raises": (("run", "recipe.py:boom"), "recipe.py cannot be run: RuntimeError in line 6: bang"),
    "it does not parse": (("run", "syntax.py:f"), "syntax.py cannot be run: SyntaxError"),
    "resume nothing": (("resume", "."), "holds no run (there is no recipe.yaml in it)"),
    "report nothing": (("report", "nowhere"), "holds no run (there is no recipe.yaml in it)"),
    "show nothing": (("show", "."), "holds no run (there is no recipe.yaml in it)"),
    "damaged events": (("resume", "damaged"), "events.jsonl is damaged: a line is not JSON"),
    "damaged events, shown": (("show", "damaged"), "events.jsonl is damaged: a line is not JSON"),
    "damaged checkpoint": (("resume", "checkpoint"), "The checkpoint checkpoint/state/"),
    "no method": (("methods", "fedvag"), "there is no `fedvag`. Did you mean `fedavg`?"),
    "no area": (("methods", "--area", "codek"), "there is no area `codek`. Did you mean `codec`?"),
    "picture is a folder": (("data", "show", "small.yaml", "--out", "."), ". is a folder; give the name of a file"),
    "no claims": (("claim", "run", "--folder", "nowhere"), "There is no claim in nowhere"),
    "no claim folder": (("claim", "table", "--folder", "nowhere"), "There is no folder nowhere"),
    "claim and file differ": (("claim", "run", "odd", "--folder", "."), "`name` is other, but the file is odd.yaml"),
    "no command": (("fly",), "No such command 'fly'"),
    "no argument": (("run",), "Missing argument"),
}  # fmt: skip


@pytest.fixture
def mess():
    """Files that somebody may have lying about."""
    Path("list.yaml").write_text("- 1\n")
    Path("broken.yaml").write_text("a: [1\nb: {")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    Path("rows.csv").write_text("a,y,h\n" + "".join(f"{i},{i % 2},{'ABC'[i % 3]}\n" for i in range(60)))
    Path("recipe.py").write_text(
        "from atoll import Recipe\n\n\nnumber = lambda: 3\ndef boom():\n    raise RuntimeError('bang')\n"
        "def good():\n    return Recipe()\n"
    )
    Path("syntax.py").write_text("def f(:\n")
    Path("odd.yaml").write_text("name: other\nsubject: x\nstatement: y\n")
    for name in ("damaged", "checkpoint"):
        Path(name).mkdir()
        (Path(name) / "recipe.yaml").write_text(RECIPE)
    (Path("damaged") / "events.jsonl").write_text("not json\n")
    from atoll.federated import checkpoint

    (Path("checkpoint") / "state").mkdir()
    (Path("checkpoint") / "state" / checkpoint.NAME).write_bytes(b"half a file")


@pytest.mark.parametrize("case", BAD)
@pytest.mark.usefixtures("mess")
def test_bad_input_ends_with_a_sentence_and_code_2(case, atoll):
    words, said = BAD[case]
    before = sorted(Path().rglob("*"))
    code, out, err = atoll(*words)
    assert code == 2
    assert said in err, err
    assert "Traceback" not in err
    assert len(err) < 700, "a sentence, not a page"
    assert out == ""
    assert sorted(p for p in Path().rglob("*") if "__pycache__" not in p.parts) == before, "nothing was written"


def test_an_interrupted_run_says_how_to_go_on(atoll, monkeypatch):
    from atoll.recipes import run

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Run, "go", interrupted)
    code, _, err = atoll("run", "small.yaml")
    assert code == 130
    assert "`atoll resume runs/run`" in err


def test_a_slip_of_ours_is_not_hidden(monkeypatch):
    """A traceback is right where the user has made no mistake."""
    from atoll.recipes import pipeline

    def broken(*_):
        raise KeyError("ours")

    monkeypatch.setattr(pipeline, "load_any", broken)
    monkeypatch.setattr(sys, "argv", ["atoll", "plan", "small.yaml"])
    with pytest.raises(KeyError, match="ours"):
        cli.main()
