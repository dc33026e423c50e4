"""Gaussian noise for client-level differential privacy (McMahan et al., 2018, arXiv 1710.06963).

What is promised, and what not
    With ``split`` (the default) each of the ``cohort`` sites of a round adds N(0, (multiplier * C)^2 /
    cohort), so the *sum* of their messages carries multiplier * C. The promise is about the sum, for those
    who see only merged models. Who sees single messages sees them with 1 / sqrt(cohort) of the noise: keep
    them from the server (secure summation), or trust it, or set ``split=False``: then every message carries
    all the noise and is protected by itself, and any codec and combiner may follow.

    A site believes the server about the size of the cohort. The noise of sites that drop out is missing (the
    accountant knows: ``privacy.accounting.effective_multiplier``).

    Random bits are Philox numbers under a fresh 128-bit key from the operating system for every message: not
    predictable without the key as far as is known, yet not a proven cryptographic generator. Noise is in
    floating point, whose gaps the analysis over real numbers ignores; an adversary who sees single exact sums
    of few messages might use them (Mironov, 2012, for Laplace noise; the remedy is a discrete Gaussian, arXiv
    2004.00010).
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Gt
from torch import Tensor

from atoll.core.card import Card, Cite
from atoll.core.errors import AtollError
from atoll.core.message import Message
from atoll.core.streams import key
from atoll.core.tree import Parts
from atoll.federated.codecs._flat import floats_alone
from atoll.federated.method import Codec, CodecContext

CARD = Card(
    name="gaussian_noise",
    area="codec",
    summary="each site adds its share of Gaussian noise to a clipped message",
    cites=(
        Cite(
            authors="H. Brendan McMahan, Daniel Ramage, Kunal Talwar, Li Zhang",
            year=2018,
            title="Learning Differentially Private Recurrent Language Models",
            arxiv="1710.06963",
            venue="ICLR",
        ),
    ),
    server_sees="single messages with 1/sqrt(cohort) of the noise, unless they are summed securely",
    privacy_unit="site",
    threat_model="honest server and sites; the adversary sees merged models and does not know who took part",
    suits=("a privacy guarantee",),
)


@dataclass(frozen=True, repr=False)
class GaussianNoise(Codec):
    """Add Gaussian noise to every floating-point number of a message that is clipped to ``clip_norm``.

    A message with other tensors or facts is refused at the site: noise would not hide them.

    Args:
        multiplier: standard deviation of the noise in the sum, over ``clip_norm``.
        clip_norm: what the message was clipped to; must equal the ``Clip`` before it.
        split: the cohort shares the noise; False: every message has all of it.
        test_seed: INSECURE. Noise from a seed that can be known, for tests; the ledger counts such noise as
            none.
        allow_insecure_test_seed: must be True for ``test_seed``.
    """

    multiplier: Annotated[float, Gt(0)]
    clip_norm: Annotated[float, Gt(0)]
    split: bool = True
    test_seed: int | None = None
    allow_insecure_test_seed: bool = False
    private: ClassVar[bool] = True
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.test_seed is not None and not self.allow_insecure_test_seed:
            raise AtollError(
                "GaussianNoise(test_seed=...) makes noise that anybody can subtract. Remove it; a test that "
                "needs it sets allow_insecure_test_seed=True as well."
            )

    def __repr__(self) -> str:
        insecure = "" if self.test_seed is None else f", INSECURE test_seed={self.test_seed}"
        split = "" if self.split else ", split=False"
        return f"GaussianNoise(multiplier={self.multiplier:g}, clip_norm={self.clip_norm:g}{split}{insecure})"

    @property
    def noise(self) -> float:
        return self.multiplier if self.test_seed is None else 0.0

    @property
    def assumes_bound(self) -> float:
        return self.clip_norm

    @property
    def needs_sum(self) -> bool:
        return self.split

    def encode(self, message: Message, state: Parts, context: CodecContext) -> tuple[Message, Parts]:
        floats = floats_alone(message, "GaussianNoise")
        std = self.multiplier * self.clip_norm / (math.sqrt(context.cohort) if self.split else 1.0)
        generator = self._generator(context)
        parts = {
            part: {n: t + normal(generator, t.shape).mul_(std).to(t.dtype) for n, t in tree.items()}
            for part, tree in floats.items()
        }
        return Message(message.kind, parts), {}

    def decode(self, message: Message) -> Message:
        return message

    def _generator(self, context: CodecContext) -> np.random.Generator:
        if self.test_seed is None:
            return np.random.Generator(np.random.Philox(key=secrets.randbits(128)))
        return np.random.Generator(np.random.Philox(key=key(self.test_seed, "noise", context.round, context.site)))


def normal(generator: np.random.Generator, shape: torch.Size) -> Tensor:
    """Standard normal float32 numbers."""
    return torch.from_numpy(generator.standard_normal(shape.numel(), np.float32)).view(shape)
