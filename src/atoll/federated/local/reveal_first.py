"""A signature once, with noise; then whatever a method does, from the model of the site's group."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Gt

from atoll.core.message import Message
from atoll.core.streams import key
from atoll.core.tree import clone
from atoll.federated.method import LocalWork, Share
from atoll.federated.signatures.signature import Signature, known, private, refuse_known_noise, whole
from atoll.federated.visit import Result, Visit


@dataclass(frozen=True)
class RevealFirst(LocalWork):
    """A visit to which nothing came for this site alone asks for its signature: whole numbers, which codecs leave as
    they are. Nothing else leaves in it but the number of rows. Every other visit is ``inner``'s.

    After a visit the site has its group's model as it came, to use and to be judged by.

    Args:
        inner: what a site does in a visit.
        share: what the method shares within a group.
        signature: what is revealed.
        privacy: epsilon of the signature, for all rows of the site together; None: no noise.
        test_seed: INSECURE. Noise from a seed that can be known, for tests; the ledger counts epsilon as infinite.
        allow_insecure_test_seed: must be True for ``test_seed``.
    """

    inner: LocalWork
    share: Share
    signature: Signature
    privacy: Annotated[float, Gt(0)] | None = None
    test_seed: int | None = None
    allow_insecure_test_seed: bool = False
    produces: ClassVar[str] = "signature"
    synchronous_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        refuse_known_noise(self.test_seed, self.allow_insecure_test_seed)

    @property
    def data_dependent_size(self) -> bool:
        return self.inner.data_dependent_size

    @property
    def epsilon(self) -> float | None:
        """Of what is revealed to form groups, and of the inner work where it has one; updates are not covered."""
        if self.privacy is None:
            return self.inner.epsilon
        own = self.privacy if self.test_seed is None else math.inf
        return own + (self.inner.epsilon or 0.0)

    @property
    def epsilon_of(self) -> str:
        return self.inner.epsilon_of if self.privacy is None else "site's signature; its updates are not covered"

    def run(self, visit: Visit) -> Result:
        if visit.message is None:
            return Result(Message("signature", {"signature": {"p": torch.from_numpy(self._signature(visit))}}))
        self.share.install(visit.at, visit.replica)
        at = replace(visit.at, split=self.share.split(visit.model))
        result = self.inner.run(replace(visit, at=at, message=None))
        message = result.message
        own = {part: clone(tree) for part, tree in message.parts.items()}  # none may be a view of what is put back
        self.share.install(visit.at, visit.replica)
        return replace(result, message=replace(message, parts=own))

    def _signature(self, visit: Visit) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        data, site = visit.data.train, visit.site.site
        found = np.ones(self.signature.size(data.info))
        if len(data) and not visit.dry:
            found = self.signature.measure(data, key(visit.seed, "signature", site) >> 1)
        insecure = known(self.test_seed, "signature", site) if self.test_seed is not None else secrets.randbelow
        return private(whole(found), self.privacy, insecure)
