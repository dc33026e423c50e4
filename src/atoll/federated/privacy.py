"""What a run's noise has bought: from a method and its cohorts to epsilon."""

from __future__ import annotations

from collections.abc import Iterable

from atoll.federated.method import Method
from atoll.privacy.accounting import Event, PrivacyLedger, Sampling, effective_multiplier


def privacy_event(method: Method, replies: int, asked: int, drawn: bool, num_sites: int) -> Event | None:
    """What one merge costs; None when no codec adds noise, or when there was no reply (nothing was released).

    Noise that the cohort shares is short when replies are missing. It is amplified by sampling only if the
    sites were drawn by the law of ``method.select``. Noise that every message carries in full protects each
    message from whoever sees it, so nothing is claimed for sampling or for the other sites' noise, and a site
    is replaced rather than removed (a message is always there). Nor is sampling claimed for noise that is not
    Gaussian.

    Args:
        replies: merged replies.
        asked: sites that began a visit: each brings its share of the noise.
        drawn: every site was available, and none was asked for another reason.
    """
    codec = next((c for c in method.uplink if c.private), None)
    if codec is None or replies == 0:
        return None
    everyone = Sampling("fixed", num_sites, num_sites)
    if renyi := codec.renyi(replies if codec.needs_sum else 1):
        return Event(0.0, everyone, renyi=renyi)
    if not codec.needs_sum:
        return Event(codec.noise, everyone)
    law = method.select.sampling(num_sites)
    if not drawn:
        law = everyone if law.law == "fixed" else Sampling()
    return Event(effective_multiplier(codec.noise, replies, max(asked, replies)), law)


def privacy_ledger(method: Method, cohorts: Iterable[tuple[int, int, bool]], num_sites: int) -> PrivacyLedger:
    """All merges of a run. ``cohorts``: (replies, asked, drawn) of each merge, as in ``RunState.cohorts``."""
    ledger = PrivacyLedger()
    for replies, asked, drawn in cohorts:
        event = privacy_event(method, replies, asked, drawn, num_sites)
        if event is not None:
            ledger.add(event)
    return ledger


def unit_of(method: Method) -> str:
    """What an epsilon of the ledger is about: all of a ``"site"``, or each ``"row"`` where it is hidden there, or what
    the local work says."""
    return "site" if method.local.epsilon is None else method.local.epsilon_of


def spent(
    method: Method, cohorts: Iterable[tuple[int, int, bool]], num_sites: int, delta: float | None = None
) -> float | None:
    """Epsilon of a run so far at ``delta`` (None: 1 / (10 sites)); None when nothing adds noise.

    Infinite when noise is missing (an insecure test seed). Local work that randomises each row by itself counts for
    rows, not sites, in full from the first merge on, and at delta 0.
    """
    own = method.local.epsilon
    if own is not None:
        return own if any(asked for _, asked, _ in cohorts) else 0.0
    if not any(c.private for c in method.uplink):
        return None
    return privacy_ledger(method, cohorts, num_sites).spent(delta or 0.1 / num_sites)
