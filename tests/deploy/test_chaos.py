"""Nothing is lost: programs are killed without warning in the middle of rounds, and the run ends as if nothing were."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

RECIPE = {
    "name": "chaos", "data": "digits", "partition": {"name": "dirichlet", "alpha": 1.0}, "sites": 4, "rounds": 6,
    "model": {"name": "cnn", "channels": [4, 8], "dense": 16, "norm": "batch"},
    "method": {"name": "fedbn", "training": {"lr": 0.1, "epochs": 1, "batch_size": 16}},
    # Noise that can be repeated: only so can two runs be compared. The ledger counts it as no privacy.
    "uplink": [
        {"name": "clip", "norm": 1.0},
        {"name": "gaussian_noise", "clip_norm": 1.0, "multiplier": 0.1, "split": False, "test_seed": 1,
         "allow_insecure_test_seed": True},
        {"name": "quantise", "bits": 8},
    ],
    "combine": {"name": "weighted_mean", "by": "uniform"}, "evaluate_every": 0,
}  # fmt: skip


def test_kills_in_mid_round_change_no_bit_of_the_model_and_no_number_of_the_ledger(
    deployment, compare, record_property
):
    d = deployment("bern", "lyon", "oslo", "rome")

    def since(kill: float, what: str) -> None:
        record_property(f"seconds from the kill of {what} to the end of the round", round(time.monotonic() - kill, 2))

    for name in d.names:
        d.site(name)
    server = d.serve(RECIPE)

    d.until(lambda: len(d.rounds()) >= 1, "first round")
    time.sleep(0.3)
    at = time.monotonic()
    os.kill(d.child("lyon", "atoll.deploy.supernode"), signal.SIGKILL)  # a node: its process starts it again
    d.until(lambda: len(d.rounds()) >= 2, "round after a node was killed")
    since(at, "a node")
    time.sleep(0.3)
    at = time.monotonic()
    os.kill(d.child("server", "atoll.deploy.superlink"), signal.SIGKILL)  # the SuperLink: the server starts it again
    d.until(lambda: len(d.rounds()) >= 3, "round after the SuperLink was killed")
    since(at, "the SuperLink")
    time.sleep(0.3)
    at = time.monotonic()
    d.kill("oslo")  # a site as a whole: its operator starts it again
    d.site("oslo")
    d.until(lambda: len(d.rounds()) >= 4, "round after a site was killed")
    since(at, "a site")
    time.sleep(0.3)
    at = time.monotonic()
    d.kill("server")  # the server's machine: its operator resumes elsewhere, from a copy without the SuperLink's memory
    assert server.poll() == -signal.SIGKILL
    shutil.copytree(d.folder / "run", d.folder / "elsewhere", ignore=shutil.ignore_patterns("flower"))
    d.serve("elsewhere")
    d.until(lambda: len(d.rounds("elsewhere")) >= 5, "round after the server was killed")
    since(at, "the server")
    d.finished()

    usual = sorted(r["seconds"] for r in d.rounds("elsewhere"))
    record_property("seconds of the fastest round", round(usual[0], 2))
    reference = compare.inline(RECIPE, d.folder / "inline")
    assert compare.rounds(d.folder / "elsewhere") == compare.rounds(reference)
    run = json.loads((d.folder / "elsewhere" / "federation.json").read_text())["run"]
    for i, site in enumerate(d.names):
        own = d.folder / f"site-{site}" / run / "model/model.safetensors"
        assert compare.same(own, reference / "model" / f"site{i}/model.safetensors")
