"""A run's state as one safetensors file, replaced atomically after every merge."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atoll.core.errors import MessageError, RunError
from atoll.core.files import write_atomic
from atoll.core.message import NO_LIMITS, Message, decode, encode, seal, unseal
from atoll.core.tree import Parts, Tree
from atoll.federated.method import Broadcast
from atoll.federated.run_state import Flight, RunState
from atoll.federated.visit import Outcome

NAME = "current.safetensors"
FLIGHT = ("site", "round", "repeat", "started", "finish", "down_bytes", "up_bytes")


def save(state: RunState, folder: Path, extra: Mapping[str, Any], durable: bool = True) -> None:
    """Write ``state`` and a few JSON-able facts; the old checkpoint stays until the new one is complete."""
    parts: dict[str, Tree] = {}
    shared: dict[str, str] = {}  # name -> name of an identical tree that is already in the file
    homes: dict[int, str] = {}

    def put(prefix: str, trees: Parts) -> list[str]:
        for name, tree in trees.items():
            full = f"{prefix}{name}"
            home = homes.setdefault(id(tree), full)
            if home == full:
                parts[full] = tree
            else:
                shared[full] = home
        return list(trees)

    def message(prefix: str, m: Message) -> dict[str, Any]:
        return {"kind": m.kind, "facts": dict(m.facts), "parts": put(prefix, m.parts)}

    flights = []
    for i, f in enumerate(state.flights.values()):
        assert f.outcome is not None
        kept = {
            name: getattr(f, name)
            for name in ("site", "round", "repeat", "started", "finish", "down_bytes", "up_bytes")
        }
        reply = message(f"flight{i}.", f.reply) if f.reply is not None else None
        outcome = {k: v for k, v in asdict_shallow(f.outcome).items() if k != "message"}
        outcome["metrics"] = {n: float(v).hex() for n, v in f.outcome.metrics.items()}  # exact, and NaN is allowed
        flights.append({**kept, "reply": reply, "outcome": outcome})
    facts = {
        "round": state.round, "now": state.now, "starts": state.starts,
        "replica": put("replica.", state.replica),
        "site_replica": put("site_replica.", state.site_replica),
        "server": put("server.", state.server),
        "common": message("common.", state.broadcast.common),
        "per_site": {str(s): message(f"site{s}.", m) for s, m in state.broadcast.per_site.items()},
        "everyone": state.broadcast.everyone, "asks": state.broadcast.asks,
        "seen": _text_keys(state.seen), "tags": _text_keys(state.tags), "visits": _text_keys(state.visits),
        "history": state.history, "sent": state.sent, "flights": flights, "cohorts": state.cohorts,
        "channels": {str(s): k.hex() for s, k in state.channels.items()},
        "shared": shared, "extra": dict(extra),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    # Names of empty trees are in the facts; the file holds the tensors.
    write_atomic(folder / NAME, encode(seal(Message("checkpoint", parts, facts))), durable=durable)


def load(folder: Path) -> tuple[RunState, dict[str, Any]]:
    """The last committed state and its extra facts; raises :class:`RunError` when there is none to read."""
    path = folder / NAME
    try:
        with open(path, "rb") as f:
            saved = decode(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY), NO_LIMITS)
        return _unpack(unseal(saved))
    except (OSError, ValueError, KeyError, TypeError) as e:
        if isinstance(e, FileNotFoundError):
            raise RunError(f"There is no checkpoint at {path}; start the run again.") from e
        what = str(e) if isinstance(e, MessageError) else type(e).__name__
        raise RunError(f"The checkpoint {path} cannot be read ({what}); start the run again.") from e


def _unpack(saved: Message) -> tuple[RunState, dict[str, Any]]:
    facts, trees = saved.facts, {name: dict(tree) for name, tree in saved.parts.items()}
    shared = facts["shared"]

    def get(prefix: str, names: list[str]) -> Parts:
        out = {}
        for name in names:
            full = f"{prefix}{name}"
            out[name] = trees.setdefault(shared.get(full, full), {})
        return out

    def message(prefix: str, about: dict[str, Any]) -> Message:
        return Message(about["kind"], get(prefix, about["parts"]), about["facts"])

    flights = {}
    for i, f in enumerate(facts["flights"]):
        reply = message(f"flight{i}.", f.pop("reply")) if f["reply"] is not None else f.pop("reply")
        about = f.pop("outcome")
        metrics = {n: float.fromhex(v) for n, v in about.pop("metrics").items()}
        outcome = Outcome(message=reply, metrics=metrics, **about)
        flights[f["site"]] = Flight(**f, outcome=outcome, reply=reply)
    per_site = {int(s): message(f"site{s}.", m) for s, m in facts["per_site"].items()}
    state = RunState(
        round=facts["round"], now=facts["now"], starts=facts["starts"],
        replica=get("replica.", facts["replica"]),
        site_replica=get("site_replica.", facts["site_replica"]),
        server=get("server.", facts["server"]),
        broadcast=Broadcast(
            message("common.", facts["common"]), per_site, facts["everyone"], tuple(facts.get("asks", ()))
        ),
        seen=_int_keys(facts["seen"]), tags=_int_keys(facts["tags"]),
        visits={s: (r, n) for s, (r, n) in _int_keys(facts["visits"]).items()},
        history=[(r, b) for r, b in facts["history"]], sent=facts["sent"], flights=flights,
        cohorts=[(replies, asked, drawn) for replies, asked, drawn in facts["cohorts"]],
        channels={s: bytes.fromhex(k) for s, k in _int_keys(facts.get("channels", {})).items()},
    )  # fmt: skip
    return state, facts["extra"]


def asdict_shallow(outcome: Outcome) -> dict[str, Any]:
    return {name: getattr(outcome, name) for name in outcome.__slots__}


def _text_keys(d: Mapping[int, Any]) -> dict[str, Any]:
    return {str(k): v for k, v in d.items()}


def _int_keys(d: Mapping[str, Any]) -> dict[int, Any]:
    return {int(k): v for k, v in d.items()}
