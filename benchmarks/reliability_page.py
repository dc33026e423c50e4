"""docs/reliability.md from a record of ``reliability.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"
HEAD = """# Reliability

Made by `python benchmarks/reliability.py`, which anyone can repeat; do not edit.

What strangers may send is thrown at everything that reads it: {inputs:,} inputs, each a valid message with random
changes to its bytes or to its structure (seed {seed}). An input must be accepted, and then be equal to what a round
trip makes of it, or be refused in a sentence. Anything else is a finding. Then whole federations: real processes, TLS,
sites with keys; outsiders and a hostile site in one, programs killed with `kill -9` in mid-round in the other.

{date}, commit {commit}{dirty}, {processor}, {cores} cores (busy with other work: load {load:.1f}), Python {python},
torch {torch}, flwr {flwr}.

## What was thrown at what

"""
FIXED = """
## Found on the way, and fixed

Found by these inputs, by the hostile site, and by reading the code with an attacker's eyes. Each has a test.

- A fact `NaN`, `Infinity` or `1e999`, or one nested a few hundred levels deep, was read, and ended the server when it
  wrote it into its ledger or checkpoint. Now it is no message.
- An array of Flower lists its chunks, and could list one of them ten thousand times: a megabyte on the wire became ten
  gigabytes in memory. Now what the chunks add up to is known first.
- A recipe from the server could name a checkpoint, a partition's file or a tokenizer's file at a site, or a `pattern`
  that leads out of the folder that its operator opened. Now a site opens what its rules list under `files`.
- A model or a federation without end was built before its size was looked at. Now its size is known before it takes
  memory, and one larger than the machine is refused.
- A request whose pieces do not fit ended a site's process, and an array whose header is no Python ended its reader
  with an error of the tokenizer.
- A site that always answered with Flower's error was asked again for ever. Now ten times.
- Two `atoll join` with one folder signed each other off for ever. Now the second ends with a sentence.
- A site's operator could not see why a SuperNode ended: a wrong certificate, a wrong host, an unknown key.
- What a stranger says reached logs and terminals as it was: escape sequences, thousands of lines. Now one line of
  printable characters, of at most 1,000.
- Low-rank factors as float64 passed the check of a reply and ended the server in its merge. Now that reply is refused
  alone.
- A folder that cannot be written ended in a traceback. Now in a sentence.
- A length of 5,000 digits made the SuperLink's door raise. It answers 413.
- A book with an infinite or negative entry was taken, or raised. Now nothing leaves until it is mended.

## What this does not cover

- Well-formed numbers that are wrong on purpose. A registered site can poison a model with finite values; `clip`,
  `median`, `krum` and the like are the defence, not the reader. The rounds above start anew when that happens.
- A server that learns from what it is entitled to see. That is what secure sums, noise and a site's rules are for.
- Floods. A site with a key may send as fast as it likes, and may keep the SuperLink busy with pieces below the limit;
  anyone who reaches the port may open connections. Put a rate limit in front of a server on the open internet.
- A site that stays silent in a recipe without `timeout` holds its round up for as long as it shows signs of life.
- Flower's own programs. What reaches their interfaces before our reader sees it is theirs to check; only the door in
  front of the inner interfaces is ours.
- Inputs are random changes of valid ones, not guided by coverage. Neither hardware faults nor full disks are played
  through here.
"""


def write_page(record: dict[str, Any]) -> None:
    m, targets = record["machine"], record["targets"]
    inputs = sum(t["inputs"] for t in targets)
    loads = [f["load"] for f in record["federations"]] or [0.0]
    text = HEAD.format(
        inputs=inputs, seed=record["seed"], dirty=" with changes" if m["uncommitted"] else "", load=max(loads),
        torch=m["packages"].get("torch"), flwr=m["packages"].get("flwr"),
        **{k: m[k] for k in ("date", "commit", "processor", "cores", "python")},
    )  # fmt: skip
    text += "| what reads it | inputs | accepted | refused | findings |\n|---|---:|---:|---:|---:|\n"
    for t in [*targets, total(targets)]:
        refused = sum(t["families"].values())
        text += f"| {t['name']} | {t['inputs']:,} | {t['accepted']:,} | {refused:,} | {len(t['findings'])} |\n"
    text += "\nRefusals by sentence (`N`: a number, `..`: a name), the commonest of each:\n\n"
    for t in targets:
        common = sorted(t["families"].items(), key=lambda item: -item[1])
        text += f"- {t['name']}: " + "; ".join(f'"{plain(said)}" {n:,}' for said, n in common[:6])
        text += f"; {len(common) - 6} more\n" if len(common) > 6 else "\n"
    for f in record["federations"]:
        text += federation(f)
    PAGE.write_text(text + FIXED)


def total(targets: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": "all", "inputs": sum(t["inputs"] for t in targets), "accepted": sum(t["accepted"] for t in targets),
        "families": {"all": sum(sum(t["families"].values()) for t in targets)},
        "findings": [f for t in targets for f in t["findings"]],
    }  # fmt: skip


def federation(f: dict[str, Any]) -> str:
    verdict = "passed" if f["passed"] else "FAILED"
    noted = f["noted"].items()
    if "hostile" in f["test"]:
        text = (
            f"\n## A hostile site among honest ones\n\n`tests/deploy/{f['test']}` {verdict} in {f['seconds']:.0f} s. A "
            "certificate of another authority, a certificate for another host, a key that the server does not know, a "
            "second process with the same folder, the inner interfaces without the token, requests without a proper "
            "length: all turned away while the run went on. A site with a key of its own answered each round with "
            "something else; the other sites' rounds completed, and the model has the bits that it has without it:\n\n"
            "| its answer | the ledger says |\n|---|---|\n"
        )
        for name, said in noted:
            text += f"| {name.partition(': ')[2]} | {plain(said)[:110]} |\n"
        return text
    text = (
        f"\n## Kills in the middle of rounds\n\n`tests/deploy/{f['test']}` {verdict} in {f['seconds']:.0f} s. The run "
        "ends with the same bits at every site and the same ledger as if nothing had happened.\n\n"
    )
    if "note" in f:
        text = text.partition("The run ends")[0].rstrip() + f" Why: {f['note']}.\n"
    if noted:
        text += f"Once, with a load of {f['load']:.1f} on the machine; what was killed is started again at once:\n\n"
    return text + "".join(f"- {name}: {value}\n" for name, value in noted)


def plain(text: str) -> str:
    """Fit for a table."""
    return text.replace("|", "/").replace("<", "(").replace(">", ")").replace("\n", " ").strip()
