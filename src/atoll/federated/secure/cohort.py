"""What the server tells a site about the round's cohort, in the three requests of a secure sum."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from atoll.core.errors import MessageError
from atoll.core.message import Message
from atoll.privacy.secure_sum import KEY, SHARE, TAG, digest

CHANNEL, PREPARE, OFFER = "secure.channel", "secure.prepare", "secure.offer"
COHORT, UNMASK, SHARES = "secure.cohort", "secure.unmask", "secure.shares"
SEALED = 2 * SHARE + TAG
"""Bytes of a site's two shares for one peer."""
SESSION = 32
"""Hexadecimal digits."""


@dataclass(frozen=True)
class Cohort:
    """The sites of a round, and what the server knows of their keys.

    Attributes:
        session: names the server's life; a server that starts again makes a new name.
        round: of the run.
        channels: of each site that was asked, in rising order, the long-term public key.
        keys: of each site that prepared, in rising order, public key of the round and commitment to its self mask.
        sealed: for one receiver, the shares from each other site that prepared.
    """

    session: str
    round: int
    channels: Mapping[int, bytes]
    keys: Mapping[int, tuple[bytes, bytes]]
    sealed: Mapping[int, bytes]

    @cached_property
    def scope(self) -> str:
        """Names the sum: all secrets of a site depend on it, so another cohort or round has nothing in common."""
        return digest(self.session, self.round, sorted(self.channels.items()))

    def message(self, kind: str, survivors: Sequence[int] = ()) -> Message:
        asked, prepared = list(self.channels), list(self.keys)
        facts = {"session": self.session, "round": self.round, "asked": asked, "prepared": prepared}
        parts = {
            "channels": rows(list(self.channels.values()), KEY),
            "publics": rows([public for public, _ in self.keys.values()], KEY),
            "commitments": rows([commitment for _, commitment in self.keys.values()], KEY),
            "sealed": rows(list(self.sealed.values()), SEALED),
        }
        return Message(kind, {"cohort": parts}, facts if kind != UNMASK else {**facts, "survivors": list(survivors)})

    @staticmethod
    def read(message: Message, site: int) -> Cohort:
        """What :meth:`message` wrote for ``site``; raises :class:`MessageError` for anything else."""
        f, tree = message.facts, dict(message.parts.get("cohort", {}))
        session, number = f.get("session"), f.get("round")
        if not isinstance(session, str) or not re.fullmatch(f"[0-9a-f]{{{SESSION}}}", session):
            raise MessageError("`session` is not the name of a session")
        if type(number) is not int or number < 0:
            raise MessageError("`round` must be a count")
        asked, prepared = (rising(f.get(name), name) for name in ("asked", "prepared"))
        if not set(prepared) <= set(asked) or site not in asked:
            raise MessageError("the cohort has sites that were not asked, or not this one")
        channels = texts(tree.get("channels"), len(asked), KEY)
        publics, commitments = (texts(tree.get(name), len(prepared), KEY) for name in ("publics", "commitments"))
        others = [s for s in prepared if s != site] if site in prepared else []
        sealed = texts(tree.get("sealed"), len(others), SEALED)
        keys = dict(zip(prepared, zip(publics, commitments, strict=True), strict=True))
        return Cohort(
            session, number, dict(zip(asked, channels, strict=True)), keys, dict(zip(others, sealed, strict=True))
        )


def rows(texts: Sequence[bytes], width: int) -> Tensor:
    """Texts of one length as bytes ``[N, width]``."""
    joined = b"".join(texts)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).view(-1, width) if joined else EMPTY.view(0, width)


EMPTY = torch.empty(0, dtype=torch.uint8)


def texts(t: Tensor | None, count: int, width: int) -> list[bytes]:
    """The inverse of :func:`rows`; raises :class:`MessageError` unless there are ``count`` rows of ``width`` bytes."""
    if t is None or t.dtype != torch.uint8 or t.shape != (count, width):
        raise MessageError(f"a secure sum expected {count} rows of {width} bytes")
    joined = t.contiguous().numpy().tobytes()
    return [joined[at : at + width] for at in range(0, len(joined), width)]


def rising(value: Any, name: str) -> list[int]:
    """Site numbers in rising order."""
    fine = isinstance(value, list) and all(type(s) is int and 0 <= s < 1 << 53 for s in value)
    if not fine or any(a >= b for a, b in itertools.pairwise(value)):
        raise MessageError(f"`{name}` must be site numbers in rising order")
    assert isinstance(value, list)
    return value
