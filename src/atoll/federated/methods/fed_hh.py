"""Federated heavy hitters with a target-aligning prefix tree, TAP (Zhang et al., 2024, arXiv 2412.14832).

Assumes  a row is a person with one item, a whole number; people trust their own device, not the site or the server.
Sees     how many (random) reports support each candidate while the tree is shared, then each site's list with estimated
         counts; the number of people at each site. Who follows the site's rows sees each report.
Departs  the paper's exact rules are replaced by concrete ones: prefixes above max(f_(k) - se, 2 se), k to 3 k of them.
         TAPS, in which parties work one after the other and prune what others found rare, is not here.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le

from atoll.core.card import Card, Cite
from atoll.core.errors import AtollError
from atoll.federated.combine.sum_reports import SumReports
from atoll.federated.local.prefix_reports import PrefixReports
from atoll.federated.method import Method, method
from atoll.federated.server.extend_trie import ExtendTrie
from atoll.federated.share.prefix_trie import Plan, PrefixTrie

CARD = Card(
    name="fed_hh",
    area="federated method",
    summary="the most frequent items of all sites, each person's report under local differential privacy",
    cites=(
        Cite(
            authors="Yuemin Zhang, Qingqing Ye, Haibo Hu",
            year=2025,
            title="Federated Heavy Hitter Analytics with Local Differential Privacy",
            arxiv="2412.14832",
            venue="SIGMOD",
        ),
    ),
    server_sees="per site, how many randomised reports support each prefix, or a list of estimated counts; the number "
    "of people",
    additive=True,
    privacy_unit="example",
    threat_model="nobody is trusted with a person's item but the person's own device, which reports once",
    suits=("statistics without training", "a privacy guarantee", "less traffic"),
)


@method(CARD)
def fed_hh(
    privacy: Annotated[float, Gt(0), Le(16)] = 4.0,
    k: Annotated[int, Ge(1)] = 10,
    bits: Annotated[int, Ge(1), Le(62)] = 24,
    levels: Annotated[int, Ge(1)] = 12,
    shared: Annotated[int, Ge(0)] = 8,
    column: str = "item",
    test_seed: int | None = None,
    allow_insecure_test_seed: bool = False,
) -> Method:
    """Each round asks one group of people for prefixes of one more level, and keeps the frequent ones.

    The first ``shared`` levels grow one tree from the sums over all sites; with the rest each site goes on alone, and
    the server adds up the sites' lists. A run takes ``levels`` rounds, later ones ask nobody. Every person reports
    once, so epsilon is that of the whole run. A round without any reply is lost, with its group.

    Args:
        privacy: epsilon of a person.
        k: items to find.
        bits: of an item; items are whole numbers below 2^bits.
        levels: rounds; a level adds bits / levels bits. More levels ask fewer people each, and fewer candidates.
        shared: levels of the common tree; 0 lets every site search alone, as before the paper.
        column: of the data, that holds the items.
        test_seed: INSECURE. Reports from a seed that can be known; see :class:`PrefixReports`.
        allow_insecure_test_seed: must be True for ``test_seed``.
    """
    if not shared <= levels <= bits or bits > 16 * levels:
        raise AtollError(
            f"fed_hh needs shared <= levels <= bits <= 16 levels; got shared {shared}, levels {levels}, bits {bits}."
        )
    plan = Plan(bits, levels, shared, k)
    return Method(
        share=PrefixTrie(plan),
        local=PrefixReports(plan, privacy, column, test_seed, allow_insecure_test_seed),
        combine=SumReports(privacy),
        server=ExtendTrie(plan),
    )
