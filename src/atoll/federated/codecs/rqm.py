"""The randomised quantisation mechanism (Youn et al., 2023, arXiv 2306.11913): few bits, private by rounding alone.

What is promised, and what not
    The unit is all that one site sends in a round: its message may be replaced by any other. Coordinates are clipped
    and hidden one by one, so a message of ``dimension`` numbers costs ``dimension`` times what one costs, whatever its
    L2 norm: this is for small models, many sites, or few rounds. By default the promise is for a single message and
    whoever sees it, and any combiner may follow. With ``summed`` it is for the sum of a round's messages, for those who
    see only merged models; the server, who sees the messages, is trusted. No amplification by sampling is claimed.

    Random bits are as in ``gaussian_noise``. The output is discrete, so there are no gaps of floating point to exploit;
    probabilities are right to within 2^-50.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Ge, Gt, Le

from atoll.core.card import Card, Cite
from atoll.core.errors import AtollError, MessageError
from atoll.core.message import Message
from atoll.core.streams import key
from atoll.core.tree import Parts
from atoll.federated.codecs._flat import flatten_floats, floats_alone, unpack
from atoll.federated.codecs.quantise import pack_bits, packed_size, unpack_bits
from atoll.federated.method import Codec, CodecContext
from atoll.privacy.accounting import ORDERS
from atoll.privacy.rqm import draw, grid, worst_divergence

CARD = Card(
    name="rqm",
    area="codec",
    summary="private rounding to few bits: each site forgets at random which levels there are",
    cites=(
        Cite(
            authors="Yeojoon Youn, Zihao Hu, Juba Ziani, Jacob Abernethy",
            year=2023,
            title="Randomized Quantization is All You Need for Differential Privacy in Federated Learning",
            arxiv="2306.11913",
        ),
    ),
    server_sees="single messages, each private by itself (with `summed`: their sum is)",
    privacy_unit="site",
    threat_model="honest sites; the adversary sees every message (with `summed`: only merged models)",
    suits=("a privacy guarantee", "less traffic"),
)


@dataclass(frozen=True, repr=False)
class Rqm(Codec):
    """Each coordinate, clipped to [-clip, clip], becomes one of ``levels`` values that is right on average.

    What is not finite becomes 0, or an end of the range: a diverged site must not show.
    Departs from the paper in one way: of a sum it claims what holds whatever the other sites send, which is less than
        the paper's numbers (see ``privacy/rqm.py``).

    Args:
        clip: the largest magnitude of a coordinate.
        dimension: coordinates that a message may have: the promise is for all of them together.
        levels: m of the paper; ceil(log2 m) bits a coordinate.
        keep: q, the probability that an inner level is kept. Less is more private and noisier.
        margin: how far the levels reach beyond the clip, in clips (Delta / c). More is more private and noisier.
        summed: the promise is for the sum of a round's messages.
        test_seed: INSECURE. Rounding from a seed that can be known, for tests; the ledger counts it as no privacy.
        allow_insecure_test_seed: must be True for ``test_seed``.
    """

    clip: Annotated[float, Gt(0)]
    dimension: Annotated[int, Ge(1)]
    levels: Annotated[int, Ge(2), Le(256)] = 16
    keep: Annotated[float, Ge(0.01), Le(0.99)] = 0.42
    margin: Annotated[float, Ge(0.01), Le(100)] = 1.0
    summed: bool = False
    test_seed: int | None = None
    allow_insecure_test_seed: bool = False
    private: ClassVar[bool] = True
    order: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if self.test_seed is not None and not self.allow_insecure_test_seed:
            raise AtollError(
                "Rqm(test_seed=...) rounds in a way that anybody can repeat. Remove it; a test that needs it sets "
                "allow_insecure_test_seed=True as well."
            )
        if (self.levels - 2) * math.log10(1 - self.keep) < -250:
            raise AtollError(
                f"Rqm(levels={self.levels}, keep={self.keep:g}) gives some levels a probability too small to account "
                "for; use fewer levels, or keep fewer of them."
            )

    def __repr__(self) -> str:
        summed = ", summed=True" if self.summed else ""
        insecure = "" if self.test_seed is None else f", INSECURE test_seed={self.test_seed}"
        return (
            f"Rqm(clip={self.clip:g}, dimension={self.dimension}, levels={self.levels}, keep={self.keep:g}, "
            f"margin={self.margin:g}{summed}{insecure})"
        )

    @property
    def bits(self) -> int:
        return (self.levels - 1).bit_length()

    @property
    def needs_sum(self) -> bool:
        return self.summed

    def renyi(self, replies: int) -> tuple[float, ...]:
        if self.test_seed is not None:
            return ()
        one = worst_divergence(self.levels, self.keep, self.margin, replies, ORDERS)
        return tuple(self.dimension * d for d in one)

    def encode(self, message: Message, state: Parts, context: CodecContext) -> tuple[Message, Parts]:
        floats_alone(message, "Rqm")
        flat = flatten_floats(message)
        if len(flat.vector) > self.dimension:
            raise AtollError(
                f"A message has {len(flat.vector):,} numbers, and the promise of Rqm(dimension={self.dimension}) is "
                f"for no more than that; set dimension={len(flat.vector)}."
            )
        x = np.nan_to_num(flat.vector.cpu().numpy().astype(np.float64) / self.clip).clip(-1, 1)
        codes = draw(x, self.levels, self.keep, self.margin, self._generator(context))
        return flat.pack("rqm", {"codes": pack_bits(torch.from_numpy(codes), self.bits)}), {}

    def decode(self, message: Message) -> Message:
        packed = unpack(message, "rqm")
        packed.only("codes")
        n = packed.numel
        codes = unpack_bits(packed.take("codes", torch.uint8, packed_size(n, self.bits)), self.bits, n)
        if n and int(codes.max()) >= self.levels:
            raise MessageError(f"`rqm/codes` holds a code above {self.levels - 1}.")
        values = torch.from_numpy((grid(self.levels, self.margin) * self.clip).astype(np.float32))
        return packed.restore(values[codes.long()])

    def _generator(self, context: CodecContext) -> np.random.Generator:
        if self.test_seed is None:
            return np.random.Generator(np.random.Philox(key=secrets.randbits(128)))
        return np.random.Generator(np.random.Philox(key=key(self.test_seed, "rqm", context.round, context.site)))
