"""How long masks take, for plans."""

from __future__ import annotations

import time

import numpy as np
import torch

from atoll.core.message import Message
from atoll.federated.method import Method
from atoll.federated.secure.cohort import CHANNEL
from atoll.federated.secure.server import SecureRound, channel_key
from atoll.federated.secure.site import CODEC, SecureSite
from atoll.federated.secure.vault import SimulatedVault

FEW = 8
"""Sites of the rehearsed sum."""


def seconds(method: Method, form: Message, cohort: int) -> float:
    """Of one site's phases, and its part of the server's, in a cohort: from a small sum, by the number of pairs.

    Args:
        form: of a reply.
    """
    site, n = SecureSite(method, SimulatedVault(0)), min(max(cohort, 2), FEW)
    channels = {s: channel_key(site.answer(s, Message(CHANNEL))) for s in range(n)}
    _sum(site, SecureRound(method, "0" * 32, 0, channels, form))  # the first pays for imports and long-term keys
    began = time.perf_counter()
    _sum(site, SecureRound(method, "0" * 32, 1, channels, form))
    return (time.perf_counter() - began) / n * cohort / n


def _sum(site: SecureSite, server: SecureRound) -> None:
    server.prepared({s: site.answer(s, m) for s, m in server.preparing().items()}, _raise)
    for s in server.cohort.channels:
        words = np.zeros_like(server.words)
        site.mask(s, server.told(s), words)
        numbers = torch.from_numpy(words.view(np.int32 if server.dtype == np.uint32 else np.int64))
        server.add(s, Message("masked", {CODEC: {"words": numbers}}))
    server.unmask({s: site.answer(s, m) for s, m in server.unmasking().items()}, _raise)


def _raise(site: int, why: str) -> None:
    raise AssertionError(f"site {site}: {why}")
