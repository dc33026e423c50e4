"""Secure aggregation: the server learns the sum of a cohort's updates, and no single one.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017: pairwise masks and a
self mask, with Shamir shares of the seeds of both, so that sites may drop out at any moment
(``atoll.privacy.secure_sum`` has the mathematics). Flower's own SecAgg+ is a workflow of its older Strategy interface,
which our schedules, codecs and merges do not run on; hence this one, the same on every backend.

A round
    1. *prepare*: every site of the cohort makes fresh keys and sends its public key, and for each other site shares of
       its two secrets, sealed under a key that only the two know. Long-term keys for sealing are asked for once.
    2. *visit*: sites work as ever. Each clips and rounds its update to integers, multiplies them by its weight, adds
       the weight as one more number, masks all, and sends that.
    3. *unmask*: the sites whose replies came reveal, for each site, a share of its self mask if its reply came, of its
       key if not. The server removes what is left of the masks from the sum.

What is promised
    Against a server that follows the protocol and is curious, together with fewer than ``threshold`` of the sites: it
    learns the sum over those who replied, and their number. Sites add to that: one never reveals both shares of a
    site, never masks two updates under the same keys, never helps with a sum over fewer than ``threshold`` of the
    cohort, and seals its round's public key to its peers, so that a server cannot put another in its place. The server
    introduces the long-term keys, though: a site keeps the first that it hears and refuses others (deployment), but a
    server that lies from the very start can listen. A server that tells different sites different lists of survivors
    can, at worst, obtain the sum of a smaller group; one that asks for the same round anew, with fewer sites, can
    compare two sums. A sum over few sites, or of one update and zeros by accomplices, tells much: that is what noise is
    for. In a *simulation* one program holds all secrets, which come from the run's seed: it shows what the protocol
    does and costs, and keeps nothing secret.

What the server can no longer see
    Single updates, so it cannot refuse an absurd one: sites drop out themselves when theirs is not finite, and ``clip``
    bounds what a hostile one adds to each coordinate times its weight. It does not see numbers of examples or metrics
    of training either. It sees who took part, when, and for how long.

With Gaussian noise
    A cohort that shares noise is where this matters: nobody sees single messages with little of it. Rounding after
    noise would depend on the data and the noise at once, and nothing in the accountant covers it. So the clipped update
    is rounded first, towards zero, which cannot make it longer; the noise is rounded by itself to the same steps, and
    the two integers are added: what is added is independent of the data. The sum of the rounded noises is, up to a
    relative exp(-pi^2 r^2) for r steps to a standard deviation of a site's noise, the Gaussian of the accountant with
    something independent added, as in Kairouz, Liu, Steinke, "The Distributed Discrete Gaussian Mechanism for
    Federated Learning with Secure Aggregation" (2021, arXiv 2102.06387); the composition check asks for r >= 2 (in
    which the term is below 1e-17). ``clip`` should be the norm of the ``Clip`` before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from atoll.core.card import Card, Cite
from atoll.privacy.secure_sum import least

if TYPE_CHECKING:
    from atoll.federated.method import Method

CARD = Card(
    name="secure_sum",
    area="secure sum",
    summary="updates are masked so that the server learns their sum alone, also when sites drop out",
    cites=(
        Cite(
            authors="Keith Bonawitz, Vladimir Ivanov, Ben Kreuter, Antonio Marcedone, H. Brendan McMahan, "
            "Sarvar Patel, Daniel Ramage, Aaron Segal, Karn Seth",
            year=2017,
            title="Practical Secure Aggregation for Privacy-Preserving Machine Learning",
            venue="CCS",
        ),
        Cite(
            authors="Peter Kairouz, Ziyu Liu, Thomas Steinke",
            year=2021,
            title="The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation",
            arxiv="2102.06387",
            venue="ICML",
        ),
    ),
    server_sees="the sum of a cohort's updates and who took part",
    additive=True,
    threat_model="a curious server that follows the protocol, and fewer sites than the threshold with it",
    suits=("hiding updates from the server",),
)

FAR = 16.0
"""Standard deviations of the cohort's noise that a sum has room for: noise beyond has probability below 1e-56."""


@dataclass(frozen=True)
class SecureSum:
    """Sum the cohort's updates under masks.

    Args:
        bits: of a coordinate's integer: steps are clip / (2^(bits - 1) - 1).
        clip: largest absolute value of a coordinate; larger ones are clipped.
        threshold: fraction of the cohort that must stay to the end of a round; else it merges nothing.
        rounding: ``"stochastic"`` is right on average, ``"nearest"`` has half the error. Noised updates are rounded
            towards zero whatever stands here.
        most_samples: number of examples that no site exceeds, where sites are weighted by them: sums have room for it.
            A site that has more stays out.
    """

    package: ClassVar[str] = "atoll.federated.secure"

    bits: Annotated[int, Ge(8), Le(24)] = 16
    clip: Annotated[float, Gt(0)] = 1.0
    threshold: Annotated[float, Gt(0.5), Le(1)] = 2 / 3
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    most_samples: Annotated[int, Ge(1), Le(1 << 24)] = 1 << 16

    @property
    def levels(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def step(self) -> float:
        return self.clip / self.levels

    def least(self, cohort: int) -> int:
        """How many of a cohort must stay."""
        return least(self.threshold, cohort)


def bound(method: Method, cohort: int) -> int:
    """Absolute value that no coordinate of a cohort's sum exceeds."""
    assert method.secure is not None
    secure, most = method.secure, method.secure.most_samples if method.combine.weighted else 1
    noise = max((c.noise * (c.assumes_bound or 0.0) for c in method.uplink if c.private), default=0.0)
    return cohort * (most * secure.levels + math.ceil(FAR * noise / secure.step))
