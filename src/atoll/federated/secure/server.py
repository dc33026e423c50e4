"""The server's end of one secure sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from atoll.core.errors import AtollError, BadReply, MessageError
from atoll.core.message import Message
from atoll.federated.codecs._flat import unpack
from atoll.federated.method import Method
from atoll.federated.secure.cohort import CHANNEL, OFFER, PREPARE, SEALED, SHARES, UNMASK, Cohort, texts
from atoll.federated.secure.secure_sum import bound
from atoll.federated.secure.site import CODEC
from atoll.privacy.secure_sum import (
    KEY,
    SHARE,
    agree,
    at_zero,
    commitment,
    prf,
    private_key,
    public_key,
    recover,
    remove_masks_,
    signed,
    word,
)


def channel_key(answer: Message | str) -> bytes:
    """A site's long-term public key; raises :class:`AtollError` when it sent none."""
    return texts(_tree(answer, CHANNEL, "channel").get("key"), 1, KEY)[0]


class SecureRound:
    """From a cohort's long-term keys to the sum of its updates.

    Args:
        channels: long-term keys by site, in rising order.
        form: what every reply must look like (an unmasked one, e.g. of a dry visit).
        dry: replies are not masked.
    """

    def __init__(
        self, method: Method, session: str, round: int, channels: Mapping[int, bytes], form: Message, dry: bool = False
    ) -> None:
        assert method.secure is not None
        self.method, self.secure, self.form, self.dry = method, method.secure, form, dry
        self.cohort = Cohort(session, round, dict(sorted(channels.items())), {}, {})
        self.least = self.secure.least(len(channels))
        self.dtype = word(bound(method, len(channels)))
        self.words = np.zeros(unpack(form, CODEC).numel + 1, dtype=self.dtype)
        self.survivors: list[int] = []
        self._offers: dict[int, dict[int, bytes]] = {}

    # ---------------------------------------------------------------- prepare

    def preparing(self) -> dict[int, Message]:
        if len(self.cohort.channels) < 2:
            raise AtollError("a secure sum over one site is its update; ask more sites a round")
        return {site: self.cohort.message(PREPARE) for site in self.cohort.channels}

    def prepared(self, answers: Mapping[int, Message | str], refuse: Callable[[int, str], None]) -> None:
        """Take the offers; ``refuse`` hears why sites are left out. Raises when too few are in."""
        keys = {}
        for site, answer in sorted(answers.items()):
            try:
                keys[site] = self._offer(site, answer)
            except AtollError as e:
                refuse(site, str(e))
        c = self.cohort
        self.cohort = Cohort(c.session, c.round, c.channels, keys, {})
        if len(keys) < self.least:
            raise AtollError(f"{len(keys)} of {len(c.channels)} sites prepared a secure sum that needs {self.least}")

    def _offer(self, site: int, answer: Message | str) -> tuple[bytes, bytes]:
        tree = _tree(answer, OFFER, "offer")
        others = [s for s in self.cohort.channels if s != site]
        (public,), (promise,) = (texts(tree.get(name), 1, KEY) for name in ("public", "commitment"))
        self._offers[site] = dict(zip(others, texts(tree.get("sealed"), len(others), SEALED), strict=True))
        return public, promise

    def told(self, site: int) -> Cohort:
        """What a site must know for its visit."""
        c = self.cohort
        return Cohort(c.session, c.round, c.channels, c.keys, {s: self._offers[s][site] for s in c.keys if s != site})

    # ---------------------------------------------------------------- replies

    def check(self, reply: Message) -> None:
        """Raise :class:`BadReply` unless the reply has the form of the sum. Its numbers look like chance."""
        packed, like = unpack(reply, CODEC), unpack(self.form, CODEC)
        packed.only("words")
        packed.take("words", torch.int32 if self.dtype == np.uint32 else torch.int64, len(self.words))
        odd = reply.parts.keys() - {CODEC} or reply.facts.keys() - {CODEC}
        if odd or reply.kind != self.form.kind or packed.layout != like.layout:
            raise BadReply("the reply has not the form of the secure sum")
        if not self.dry and packed.facts.get("scope") != self.cohort.scope:
            raise BadReply("the reply is masked for another sum, so it is late or was sent again")

    def add(self, site: int, reply: Message) -> None:
        self.words += reply.parts[CODEC]["words"].numpy().view(self.dtype)
        self.survivors.append(site)

    # ---------------------------------------------------------------- unmask

    def unmasking(self) -> dict[int, Message]:
        """What to ask the survivors; raises when they are too few."""
        self.survivors.sort()
        if len(self.survivors) < self.least:
            raise AtollError(
                f"{len(self.survivors)} of {len(self.cohort.channels)} replies arrived, and the secure sum needs "
                f"{self.least}, so none was learned"
            )
        return {site: self.told(site).message(UNMASK, self.survivors) for site in self.survivors}

    def unmask(self, answers: Mapping[int, Message | str], refuse: Callable[[int, str], None]) -> None:
        """Remove the masks; ``refuse`` hears why sites' shares are left out.

        Raises:
            AtollError: too few sites gave shares, or wrong ones.
        """
        gone = [s for s in self.cohort.keys if s not in set(self.survivors)]
        held: dict[int, tuple[list[bytes], list[bytes]]] = {}
        for site, answer in sorted(answers.items()):
            try:
                tree = _tree(answer, SHARES, "shares")
                held[site] = (
                    texts(tree.get("self"), len(self.survivors), SHARE),
                    texts(tree.get("key"), len(gone), SHARE),
                )
            except AtollError as e:
                refuse(site, str(e))
        if len(held) < self.least:
            raise AtollError(
                f"{len(held)} of {len(self.survivors)} sites helped to unmask the secure sum, which needs {self.least}"
            )
        if not self.dry:
            self._remove(gone, dict(list(held.items())[: self.least]))

    def _remove(self, gone: list[int], held: Mapping[int, tuple[list[bytes], list[bytes]]]) -> None:
        weights, cohort = at_zero(list(held)), self.cohort
        own, dropped = [], {}
        for i, site in enumerate(self.survivors):
            seed = recover({holder: shares[i] for holder, (shares, _) in held.items()}, weights)
            if commitment(seed) != cohort.keys[site][1]:
                raise BadReply(f"the shares of site {site}'s self mask do not fit")
            own.append(prf(seed, "mask"))
        for i, site in enumerate(gone):
            seed = recover({holder: shares[i] for holder, (_, shares) in held.items()}, weights)
            key = private_key(seed)
            if public_key(key) != cohort.keys[site][0]:
                raise BadReply(f"the shares of site {site}'s key do not fit")
            purpose = b"pair" + cohort.scope.encode()
            dropped[site] = {s: agree(key, cohort.keys[s][0], purpose) for s in self.survivors}
        remove_masks_(self.words, own, dropped)

    def total(self) -> tuple[Message, int]:
        """The sum of the weighted updates in the form of one, and the sum of the weights."""
        whole = signed(self.words)
        numbers = torch.from_numpy(whole[:-1] * self.secure.step)
        return unpack(self.form, CODEC).restore(numbers), int(whole[-1])


def _tree(answer: Message | str, kind: str, part: str) -> dict[str, torch.Tensor]:
    if isinstance(answer, str):
        raise BadReply(answer)
    if answer.kind != kind:
        raise MessageError(f"expected `{kind}`; got `{answer.kind[:40]}`")
    return dict(answer.parts.get(part, {}))
