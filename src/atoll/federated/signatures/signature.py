"""What a site reveals about its rows before sites are grouped."""

from __future__ import annotations

import secrets
from fractions import Fraction
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from atoll.core.errors import AtollError
from atoll.core.streams import numpy_stream
from atoll.data.dataset import Dataset, Info
from atoll.privacy.discrete_laplace import Below, discrete_laplace

Shares = NDArray[np.float64]
"""Numbers that are not negative and sum to one, ``[F]``."""
UNIT = 1 << 20
"""A share of 1 on the wire."""


class Signature(Protocol):
    """A frozen dataclass whose fields say what is measured. File ``signatures/<name>.py``.

    Must   size     ``measure`` gives as many numbers as ``size`` says, the same at every site
           shares   they are not negative; what matters is their proportions
    """

    package: ClassVar[str] = "atoll.federated.signatures"

    def size(self, info: Info) -> int: ...

    def measure(self, data: Dataset, seed: int) -> Shares:
        """Of a site's training rows, before normalisation and noise; ``seed`` is for what it may draw."""
        ...


def whole(shares: Shares) -> NDArray[np.int64]:
    """Shares as whole numbers of 1 / UNIT, rounded down, so that they sum to at most UNIT. All zero: all alike."""
    total = shares.sum()
    p = shares / total if total > 0 else np.full(len(shares), 1 / len(shares))
    found: NDArray[np.int64] = np.floor(p * UNIT).astype(np.int64)
    return found


def private(shares: NDArray[np.int64], epsilon: float | None, below: Below = secrets.randbelow) -> NDArray[np.int32]:
    """Whole shares with Laplace noise of scale 2 / epsilon, clipped at zero and brought to sum to one again.

    Two signatures sum to at most one each, so they are at most 2 apart whatever the rows: the site's whole data set is
    protected. What is done after the noise costs nothing. None: no noise.
    """
    if epsilon is not None:
        scale = 2 * UNIT / Fraction(epsilon)
        shares = shares + np.array([discrete_laplace(scale, below) for _ in shares], dtype=np.int64)
    return whole(shares.clip(min=0).astype(np.float64)).astype(np.int32)


def refuse_known_noise(test_seed: int | None, allowed: bool) -> None:
    """Raise :class:`AtollError` for a seed that nobody has allowed."""
    if test_seed is not None and not allowed:
        raise AtollError(
            "test_seed makes noise that anybody can subtract. Remove it; a test that needs it sets "
            "allow_insecure_test_seed=True as well."
        )


def known(seed: int, *name: str | int) -> Below:
    """INSECURE random numbers, from a seed that can be known."""
    draw = numpy_stream(seed, *name)
    return lambda n: int.from_bytes(draw.bytes(n.bit_length() // 8 + 16), "big") % n
