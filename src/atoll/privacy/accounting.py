"""What noise has bought: epsilon at delta for client-level differential privacy, through ``dp-accounting``.

The unit of privacy is all the data of one site. Each merge of a noised sum is an :class:`Event`; a ledger is
a list of them. The bound is by Renyi differential privacy (Mironov, 2017, arXiv 1702.07476; conversion by
Canonne et al., 2020, arXiv 2004.00010), with amplification by sampling for Poisson draws (Mironov et al.,
2019, arXiv 1908.10530) and for draws without replacement (Wang et al., 2019, arXiv 1808.00087).

Two things that are easy to get wrong:

- *Neighbours.* With everybody taking part, or a Poisson draw, neighbouring federations differ by a site whose
  update
  is there or is nothing: the clipped sum moves by at most C. A draw of fixed size hides a site by *replacing*
      it, so the sum may move by 2 C, and the same noise counts half (``multiplier / 2``). Epsilons of the two
      do not compare, and a ledger refuses to add them.
- *Amplification* holds against those who see the models and do not know who was asked. The server knows; so
  does whoever has the seed that sites are drawn with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from atoll.core.errors import AtollError

NEIGHBOURS = {"all": "add_or_remove", "poisson": "add_or_remove", "fixed": "replace"}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the sites of a merge were drawn.

    Attributes:
        law: ``"all"`` sites (or by a rule that says nothing); ``"fixed"``: ``size`` out of ``population``
            uniformly without replacement; ``"poisson"``: each independently with probability ``rate``.
    """

    law: Literal["all", "fixed", "poisson"] = "all"
    size: int = 0
    population: int = 0
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.law not in NEIGHBOURS:
            raise AtollError(f"Sampling law {self.law!r} is unknown; use one of {', '.join(NEIGHBOURS)}.")
        if self.law == "fixed" and not 1 <= self.size <= self.population:
            raise AtollError(f"A draw of {self.size} out of {self.population} sites is not possible.")
        if self.law == "poisson" and not 0 < self.rate <= 1:
            raise AtollError(f"A Poisson rate lies in (0, 1]; got {self.rate}.")

    def expected(self, num_sites: int) -> float:
        """The mean number of sites drawn from ``num_sites``."""
        return {"all": num_sites, "fixed": self.size, "poisson": self.rate * num_sites}[self.law]


@dataclass(frozen=True, slots=True)
class Event:
    """``count`` merges of one kind.

    Attributes:
        multiplier: standard deviation of the noise in the sum, over the clip norm C. 0 is no noise.
        sampling: how sites were drawn.
        renyi: for noise that is not Gaussian, the Renyi divergence of one merge at each of ``ORDERS``, instead of
            the multiplier. Nothing is claimed for sampling then, beyond the neighbours that it stands for.
    """

    multiplier: float
    sampling: Sampling = Sampling()
    count: int = 1
    renyi: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not (self.multiplier >= 0 and math.isfinite(self.multiplier) and self.count >= 0):
            raise AtollError(f"A merge has a noise multiplier >= 0 and a count >= 0; got {self}.")
        if self.renyi and (len(self.renyi) != len(ORDERS) or not min(self.renyi) >= 0):
            raise AtollError(f"A merge has a Renyi divergence >= 0 at each of {len(ORDERS)} orders, or none.")

    @property
    def bare(self) -> bool:
        """No noise of any kind hides what was released."""
        return self.multiplier == 0 and not self.renyi


def effective_multiplier(multiplier: float, replies: int, asked: int) -> float:
    """The multiplier of a sum that lacks some replies: ``multiplier * sqrt(replies / asked)``.

    Each of ``asked`` sites brings noise of variance (multiplier C)^2 / asked, so noise that never arrived is
    missing.
    """
    if not 0 <= replies <= asked or asked < 1:
        raise AtollError(f"{replies} replies of {asked} sites asked is not possible.")
    return multiplier * math.sqrt(replies / asked)


def epsilon(events: Iterable[Event], delta: float) -> float:
    """The least known epsilon such that all events together are (epsilon, delta)-private.

    Raises:
        AtollError: delta is not in (0, 1), or the events have different neighbours (see the module's
            docstring).
    """
    if not 0 < delta < 1:
        raise AtollError(f"delta lies in (0, 1), e.g. 1 / (10 * sites); got {delta}.")
    events = [e for e in events if e.count]
    if not events:
        return 0.0
    relations = sorted({NEIGHBOURS[e.sampling.law] for e in events})
    if len(relations) > 1:
        raise AtollError(
            "Merges with a draw of fixed size and merges with a Poisson draw or everybody protect against "
            "different neighbours, so their epsilons do not add up. Keep one `select` for the run."
        )
    if any(e.multiplier == 0 and not e.renyi for e in events):
        return math.inf
    rdp = sum(e.count * (np.array(e.renyi) if e.renyi else _rdp(e.multiplier, e.sampling)) for e in events)
    return float(_dp_accounting().rdp.compute_epsilon(ORDERS, rdp, delta)[0])


def multiplier_for(target: float, delta: float, rounds: int, sampling: Sampling = Sampling()) -> float:
    """The least multiplier (to half a percent, rounded up) that keeps ``rounds`` merges within ``target``."""
    if not target > 0 or rounds < 1:
        raise AtollError(f"A target epsilon is > 0 and rounds >= 1; got {target} and {rounds}.")
    low, high = 0.0, 1.0
    while epsilon([Event(high, sampling, rounds)], delta) > target:
        low, high = high, 2 * high
        if high > 1e6:
            raise AtollError(f"No amount of noise gives epsilon {target} at delta {delta} over {rounds} rounds.")
    while high - low > 5e-3 * high:
        middle = (low + high) / 2
        if epsilon([Event(middle, sampling, rounds)], delta) > target:
            low = middle
        else:
            high = middle
    return high


@dataclass
class PrivacyLedger:
    """Noised merges so far. Equal successive ones are kept as one event with a count."""

    events: list[Event] = field(default_factory=list)

    def add(self, event: Event) -> None:
        last = self.events[-1] if self.events else None
        if last is not None and replace(last, count=event.count) == event:
            self.events[-1] = replace(last, count=last.count + event.count)
        else:
            self.events.append(event)

    def spent(self, delta: float) -> float:
        """Epsilon at ``delta`` for all merges so far."""
        return epsilon(self.events, delta)

    @property
    def neighbours(self) -> str:
        """``"add_or_remove"`` or ``"replace"`` a site; empty before the first event."""
        return NEIGHBOURS[self.events[0].sampling.law] if self.events else ""

    def state(self) -> list[dict[str, Any]]:
        """JSON-able; :meth:`resume` reads it."""
        return [asdict(e) for e in self.events]

    @classmethod
    def resume(cls, state: Iterable[Mapping[str, Any]]) -> PrivacyLedger:
        try:
            return cls(
                [
                    Event(**{**e, "sampling": Sampling(**e["sampling"]), "renyi": tuple(e.get("renyi", ()))})
                    for e in state
                ]
            )
        except (KeyError, TypeError) as e:
            raise AtollError(f"A privacy ledger cannot be read from this state ({e}).") from e


# Fractions serve weak noise over many rounds; for sampled noise they gain little and converge slowly.
FRACTIONS = (1.05, 1.1, 1.25, 1.5, 1.75)
INTEGERS = (*range(2, 65), 72, 80, 96, 128, 160, 192, 256, 384, 512)
ORDERS = (*FRACTIONS, *INTEGERS)


@lru_cache(maxsize=4096)
def _rdp(multiplier: float, sampling: Sampling) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Renyi divergence of one merge at each order. Cached: a sampled one takes a fifth of a second."""
    dp = _dp_accounting()
    relation = dp.NeighboringRelation[f"{NEIGHBOURS[sampling.law].upper()}_ONE"]
    accountant = dp.rdp.RdpAccountant(ORDERS if sampling.law == "all" else INTEGERS, relation)
    if sampling.law == "fixed":
        event = dp.SampledWithoutReplacementDpEvent(
            sampling.population, sampling.size, dp.GaussianDpEvent(multiplier / 2)
        )
    elif sampling.law == "poisson":
        event = dp.PoissonSampledDpEvent(sampling.rate, dp.GaussianDpEvent(multiplier))
    else:
        event = dp.GaussianDpEvent(multiplier)
    rdp = accountant.compose(event).rdp
    return np.concatenate([np.full(len(ORDERS) - len(rdp), np.inf), rdp])


def _dp_accounting() -> Any:
    try:
        import dp_accounting
        import dp_accounting.rdp
    except ImportError as e:
        raise AtollError("Privacy accounting needs `dp-accounting`: pip install 'atoll[privacy]'.") from e
    return dp_accounting
