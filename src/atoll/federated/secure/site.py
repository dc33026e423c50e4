"""A site's end of secure sums: it prepares a round, masks its update, and reveals shares, each at most once.

All secrets of a round are derived from the site's one secret and the cohort's scope, so that the requests of a round
may be served by different processes, and one that is repeated gets the same answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from atoll.core.errors import MessageError, SiteFailed
from atoll.core.message import Message
from atoll.core.tree import Parts, moved
from atoll.federated.codecs._flat import Flat, flatten_floats
from atoll.federated.method import CodecContext, Method
from atoll.federated.secure.cohort import CHANNEL, OFFER, PREPARE, SEALED, SHARES, UNMASK, Cohort, rising, rows
from atoll.federated.secure.secure_sum import bound
from atoll.federated.secure.vault import Used, Vault
from atoll.privacy.secure_sum import (
    KEY,
    SEED,
    SHARE,
    Words,
    add_masks_,
    agree,
    commitment,
    digest,
    prf,
    private_key,
    public_key,
    seal,
    share,
    unseal,
    word,
)

CODEC = "secure"
"""Under which part and fact the masked words and their layout travel."""


class SecureSite:
    """Answers for the sites of one worker.

    Args:
        vault: the sites' secrets, and their memory of what they have revealed.
    """

    def __init__(self, method: Method, vault: Vault) -> None:
        assert method.secure is not None
        self.method, self.secure, self.vault = method, method.secure, vault
        self._long_term = lru_cache(1 << 16)(self._made)
        self._channel = lru_cache(1 << 16)(self._agreed)  # key agreements cost more than all else in a phase

    def answer(self, site: int, request: Message) -> Message:
        """Serve a request outside of a visit; raises :class:`AtollError` for one that must not be served."""
        if request.kind == CHANNEL:
            return Message(CHANNEL, {"channel": {"key": rows([public_key(self._long_term(site))], KEY)}})
        cohort = Cohort.read(request, site)
        if request.kind == PREPARE:
            return self._prepare(site, cohort)
        if request.kind == UNMASK:
            return self._unmask(site, cohort, rising(request.facts.get("survivors"), "survivors"))
        raise MessageError(f"a site does not answer `{request.kind[:40]}`")

    # ---------------------------------------------------------------- secrets

    def _made(self, site: int) -> Any:
        return private_key(prf(self.vault.secret(site), "channel"))

    def _agreed(self, site: int, peer: bytes) -> bytes:
        return agree(self._long_term(site), peer, b"channel")

    def _seeds(self, site: int, scope: str) -> tuple[bytes, bytes]:
        """Of the self mask, and of the round's key."""
        secret = self.vault.secret(site)
        return prf(secret, scope, "self")[:SEED], prf(secret, scope, "key")[:SEED]

    def _shares(self, site: int, cohort: Cohort, holders: Iterable[int]) -> dict[int, bytes]:
        """For each holder, its shares of the self mask's seed and of the key's."""
        secret, least = self.vault.secret(site), self.secure.least(len(cohort.channels))
        own, key = (
            share(seed, least, holders, prf(secret, cohort.scope, "shares", i))
            for i, seed in enumerate(self._seeds(site, cohort.scope))
        )
        return {holder: own[holder] + key[holder] for holder in holders}

    def _sealing(self, site: int, sender: int, receiver: int, cohort: Cohort) -> bytes:
        """The key for what ``sender`` tells ``receiver``, of which ``site`` is one."""
        other = cohort.channels[receiver if site == sender else sender]
        return prf(self._channel(site, other), cohort.scope, sender, receiver)

    # ---------------------------------------------------------------- the three phases

    def _enter(self, site: int, cohort: Cohort) -> Used:
        """What the site has done in this sum so far; raises when it must not take part."""
        if len(cohort.channels) < 2:
            raise SiteFailed("a secure sum over one site is its update; ask more sites a round")
        if cohort.channels[site] != public_key(self._long_term(site)):
            raise SiteFailed("the server has another long-term key of this site; the site, or the run, must start anew")
        if changed := self.vault.pin(site, {s: k for s, k in cohort.channels.items() if s != site}):
            raise SiteFailed(f"the long-term key of site {changed[0]} is not the one that this site has kept")
        used = self.vault.recall(site, cohort.session)
        if used is None or used.round < cohort.round:
            used = Used(cohort.round, cohort.scope)
            self.vault.remember(site, cohort.session, used)
        if (used.round, used.scope) != (cohort.round, cohort.scope):
            raise SiteFailed(
                f"this site takes part in one secure sum a round, and round {cohort.round} has had its own"
            )
        return used

    def _prepare(self, site: int, cohort: Cohort) -> Message:
        self._enter(site, cohort)
        own, key = self._seeds(site, cohort.scope)
        public, promise = public_key(private_key(key)), commitment(own)
        peers = [s for s in cohort.channels if s != site]
        sealed = [
            seal(self._sealing(site, site, peer, cohort), text, public + promise)
            for peer, text in self._shares(site, cohort, peers).items()
        ]  # fmt: skip
        parts = {
            "public": rows([public], KEY), "commitment": rows([promise], KEY),
            "sealed": rows(sealed, SEALED),
        }  # fmt: skip
        return Message(OFFER, {"offer": parts})

    def _opened(self, site: int, cohort: Cohort) -> dict[int, bytes]:
        """This site's shares of every prepared site's secrets: proof that the server has not changed their keys."""
        own, key = self._seeds(site, cohort.scope)
        if cohort.keys.get(site) != (public_key(private_key(key)), commitment(own)):
            raise SiteFailed("the server has another key of this site for this round")
        out = {
            peer: unseal(self._sealing(site, peer, site, cohort), sealed, b"".join(cohort.keys[peer]))
            for peer, sealed in cohort.sealed.items()
        }
        return {**out, site: self._shares(site, cohort, [site])[site]}

    def mask(self, site: int, cohort: Cohort, words: Words) -> None:
        """Hide a site's integers, in place."""
        used = self._enter(site, cohort)
        least = self.secure.least(len(cohort.channels))
        if len(cohort.keys) < least:
            raise SiteFailed(
                f"a secure sum over {len(cohort.keys)} of {len(cohort.channels)} sites; {least} are needed"
            )
        self._opened(site, cohort)
        own, seed = self._seeds(site, cohort.scope)
        key = private_key(seed)
        pairs = {
            peer: agree(key, public, b"pair" + cohort.scope.encode())
            for peer, (public, _) in cohort.keys.items() if peer != site
        }  # fmt: skip
        add_masks_(words, site, prf(own, "mask"), pairs)
        sent = digest(hashlib.sha256(words.tobytes()).digest(), sorted(cohort.keys.items()))
        if used.masked not in ("", sent):
            raise SiteFailed(
                "this site masks one update a round, and has sent another; two would tell their difference"
            )
        self.vault.remember(site, cohort.session, replace(used, masked=sent))

    def _unmask(self, site: int, cohort: Cohort, survivors: list[int]) -> Message:
        """A share of the self mask of each site that survived, of the key of each that did not: never of both."""
        used = self._enter(site, cohort)
        least = self.secure.least(len(cohort.channels))
        if not set(survivors) <= set(cohort.keys) or site not in survivors or len(survivors) < least:
            raise SiteFailed(f"a secure sum needs {least} of {len(cohort.channels)} sites, this one among them")
        named = digest(survivors, list(cohort.keys))
        if used.survivors not in ("", named):
            raise SiteFailed("this site has helped with the sum over other sites; both would tell single updates")
        held = self._opened(site, cohort)
        self.vault.remember(site, cohort.session, replace(used, survivors=named))
        gone = [s for s in cohort.keys if s not in set(survivors)]
        parts = {
            "self": rows([held[s][:SHARE] for s in survivors], SHARE),
            "key": rows([held[s][SHARE:] for s in gone], SHARE),
        }
        return Message(SHARES, {"shares": parts})


def blank(site: int, request: Message) -> Message:
    """An answer with the size of a true one, for plans."""
    if request.kind == CHANNEL:
        return Message(CHANNEL, {"channel": {"key": rows([bytes(KEY)], KEY)}})
    cohort = Cohort.read(request, site)
    if request.kind == PREPARE:
        key, sealed = rows([bytes(KEY)], KEY), rows([bytes(SEALED)] * (len(cohort.channels) - 1), SEALED)
        return Message(OFFER, {"offer": {"public": key, "commitment": key, "sealed": sealed}})
    survivors = len(rising(request.facts.get("survivors"), "survivors"))
    revealed = {"self": survivors, "key": len(cohort.keys) - survivors}
    return Message(SHARES, {"shares": {what: rows([bytes(SHARE)] * n, SHARE) for what, n in revealed.items()}})


# ------------------------------------------------------------------------------------------- the update as integers


@dataclass(frozen=True, slots=True)
class Summand:
    """What a site adds to the sum before it is masked.

    Attributes:
        flat: names and shapes.
        words: integers modulo 2^32 or 2^64 ``[D + 1]``; the last is the weight.
    """

    flat: Flat
    words: Words

    def message(self, scope: str = "0" * 64) -> Message:
        """As it travels, masked by then. ``scope`` names the sum that it is masked for."""
        t = torch.from_numpy(self.words.view(np.int32 if self.words.dtype == np.uint32 else np.int64))
        return self.flat.pack(CODEC, {"words": t}, scope=scope)


def summand(
    method: Method, message: Message, replica: Parts, weight: int, context: CodecContext,
    generator: Callable[[], torch.Generator],
) -> Summand:  # fmt: skip
    """An update as integers: clipped, rounded, times its weight, with the weight as last number.

    Args:
        message: the update, after the codecs that bound it.
        weight: number of examples; counts where the combiner weights by it.
        generator: makes the stream for stochastic rounding.

    Raises:
        SiteFailed: the update cannot be part of a sum.
    """
    secure, combine = method.secure, method.combine
    assert secure is not None
    weight = weight if combine.weighted else 1
    if weight > secure.most_samples:
        raise SiteFailed(f"{weight:,} examples are more than `most_samples`, {secure.most_samples:,}; raise it")
    term = combine.term(message, replica)
    term = Message(term.kind, moved(term.parts, "cpu"))
    flat = flatten_floats(term)
    if flat.others:
        part, tree = next(iter(flat.others.items()))
        raise SiteFailed(f"`{part}/{next(iter(tree))}` holds whole numbers; a secure sum is over floating-point ones")
    x = flat.vector.numpy().astype(np.float64)
    if not np.isfinite(x).all():
        raise SiteFailed("the update holds NaN or infinite numbers, so this site stays out of the sum")
    x = np.clip(x / secure.step, -secure.levels, secure.levels)
    noises = [c for c in method.uplink if c.private]
    if noises:
        k = np.trunc(x)
    elif secure.rounding == "nearest":
        k = np.rint(x)
    else:
        k = np.floor(x + torch.rand(len(x), generator=generator(), dtype=torch.float64).numpy())
    weights = [
        np.full(t.numel(), 1 if part in combine.counted else weight, dtype=np.int64)
        for part, tree in term.parts.items() for t in tree.values()
    ]  # fmt: skip
    whole = k.astype(np.int64) * (np.concatenate(weights) if weights else weight)
    dtype = word(bound(method, context.cohort))
    room = (1 << (np.dtype(dtype).itemsize * 8 - 1)) // max(1, context.cohort) - 1 - secure.levels
    for noise in noises:
        zeros = {part: {n: torch.zeros_like(t) for n, t in tree.items()} for part, tree in term.parts.items()}
        drawn, _ = noise.encode(Message(term.kind, zeros), {}, context)
        steps = flatten_floats(drawn).vector.numpy().astype(np.float64) / secure.step
        whole += np.clip(np.rint(steps), -room, room).astype(np.int64)
    return Summand(flat, np.append(whole, weight).astype(dtype))
