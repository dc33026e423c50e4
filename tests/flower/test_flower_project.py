"""The example project, as Flower runs it: its own simulation, its own loop, a stock mod at the sites."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from atoll.data.dataset import Federation
from atoll.federated.engine import federate

PROJECT = Path(__file__).parents[2] / "examples" / "flower_project"
pytest.importorskip("flwr")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's and Flower's own


def test_flower_finds_the_apps():
    from flwr.cli.config_utils import load_and_validate

    config, _ = load_and_validate(PROJECT / "pyproject.toml")
    assert config["tool"]["flwr"]["app"]["components"] == {"serverapp": "server_app:app", "clientapp": "client_app:app"}


def test_the_project_runs_in_flowers_simulation(monkeypatch, capsys):
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", "")  # Flower adds to it, for the actors
    monkeypatch.syspath_prepend(PROJECT)
    from flwr.app import Context, RecordDict
    from flwr.simulation import run_simulation

    from atoll.flower import MethodStrategy

    server, client = (importlib.import_module(f"{side}_app").app for side in ("server", "client"))
    ray = {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False}
    ended = []
    start = MethodStrategy.start
    monkeypatch.setattr(MethodStrategy, "start", lambda self, **k: ended.append(start(self, **k)) or ended[0])
    run_simulation(server, client, 4, backend_config={"client_resources": {"num_cpus": 1}, "init_args": ray})
    rounds = re.findall(r"round (\d): accuracy (0\.\d+), ([\d.]+) kB up", capsys.readouterr().out)
    assert [number for number, *_ in rounds] == ["1", "2", "3", "4", "5"]
    assert float(rounds[-1][1]) > 0.8
    weights = 64 * 32 + 32 + 32 * 10 + 10
    assert 4 * 2 * weights < float(rounds[0][2]) * 1e3 < 1.3 * 4 * 2 * weights, "weights and control, a byte a number"

    learned, rows = importlib.import_module("what_is_learned"), importlib.import_module("client_app").rows
    nodes = [Context(1, 1, {"partition-id": i, "num-partitions": 4}, RecordDict(), {}) for i in range(4)]
    sites = tuple(map(rows, nodes))
    *_, last = federate(learned.TASK, Federation(sites, sites[0].validation), learned.METHOD, rounds=5)
    for name, t in last.engine.state.replica["weights"].items():
        assert torch.equal(torch.from_numpy(ended[0].arrays[name].numpy()), t), "the bits of the same run inline"
