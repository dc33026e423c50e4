"""What parties of a search for heavy hitters know: a shallow trie of frequent prefixes, and at the end the list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from atoll.core.errors import BadReply, RecipeError
from atoll.core.message import Message
from atoll.core.tree import Parts, Tree, copy_, named_tensors, pick
from atoll.federated.method import Share, SiteInfo, Split
from atoll.federated.visit import SiteModel
from atoll.models.top_items import ItemList


@dataclass(frozen=True)
class Plan:
    """Which prefixes are asked for when.

    Args:
        bits: of an item.
        levels: rounds, each of which asks another group of people for longer prefixes.
        shared: of these, the first so many build one trie; later ones extend it at each site alone.
        k: items on the list.
    """

    bits: Annotated[int, Ge(1), Le(62)] = 24
    levels: Annotated[int, Ge(1)] = 12
    shared: Annotated[int, Ge(0)] = 8
    k: Annotated[int, Ge(1)] = 10

    def length(self, level: int) -> int:
        """Bits of the prefixes once ``level`` levels are done."""
        return -(-self.bits * level // self.levels)

    def children(self, trie: Tree) -> Tensor:
        """The candidates of the next level, ``[C]``: every continuation of every prefix."""
        level = int(trie["level"])
        more = self.length(level + 1) - self.length(level)
        return (trie["prefixes"][:, None] << more | torch.arange(1 << more)).flatten()

    def root(self) -> Tree:
        return {"prefixes": torch.zeros(1, dtype=torch.int64), "level": torch.tensor(0)}


@dataclass(frozen=True)
class PrefixTrie(Share):
    """Broadcasts hold ``trie``: ``prefixes`` [P] and how many ``level`` are done; and ``top``, the list, once known.

    Replies hold ``counts`` while the trie is shared: how many reports ``support`` each candidate, the last for none of
    them, and how many ``reports`` there are. Later they are empty, and in the last round ``top``: ``items`` and
    ``counts``. The model, where it is a list, shows the list.
    """

    plan: Plan = Plan()

    def prepare(self, model: nn.Module, site: SiteInfo | None) -> nn.Module:
        if isinstance(model, ItemList) and len(model.items) != self.plan.k:
            raise RecipeError([f"fed_hh finds {self.plan.k} items, the model lists {len(model.items)}; give one `k`."])
        return model

    def split(self, model: nn.Module) -> Split:
        return Split(shared=tuple(n for n in named_tensors(model) if n in ("items", "counts")))

    def initial(self, model: nn.Module) -> Parts:
        return {"trie": self.plan.root(), "top": empty(self.plan.k)}

    def install(self, at: SiteModel, replica: Parts) -> None:
        _show(at.tensors, replica)

    def export(self, model: nn.Module, replica: Parts) -> nn.Module:
        _show(named_tensors(model), replica)
        return model

    def check(self, reply: Message, replica: Parts) -> None:
        parts, kinds = reply.parts, {n: [t.dtype for t in tree.values()] for n, tree in reply.parts.items()}
        if any(set(d) != {torch.int64} for d in kinds.values()):
            raise BadReply("a reply holds counts: whole numbers (int64) and nothing else")
        if not parts:
            return
        if int(replica["trie"]["level"]) < self.plan.shared:
            counts = parts.get("counts", {})
            shape = (len(self.plan.children(replica["trie"])) + 1,)
            if parts.keys() != {"counts"} or counts.keys() != {"support", "reports"}:
                raise BadReply("a reply must consist of `counts/support` and `counts/reports`")
            support, reports = counts["support"], counts["reports"]
            if support.shape != shape or reports.shape != () or not 0 <= int(reports) < 1 << 40:
                raise BadReply(f"`counts/support` must hold {shape[0]} counts, and `counts/reports` one")
            if int(support.min()) < 0 or int(support.max()) > int(reports):
                raise BadReply("a candidate is supported by fewer than no or more than all reports")
            return
        top, like = parts.get("top", {}), empty(self.plan.k)
        if parts.keys() != {"top"} or top.keys() != like.keys() or any(top[n].shape != like[n].shape for n in like):
            raise BadReply(f"a reply must consist of {self.plan.k} `top/items` and their `top/counts`")
        items = [i for i in top["items"].tolist() if i != -1]
        if any(not 0 <= i < 1 << self.plan.bits for i in items) or len(set(items)) < len(items):
            raise BadReply(f"`top/items` must be different numbers of {self.plan.bits} bits")
        if int(top["counts"].abs().max()) > 1 << 40:
            raise BadReply("`top/counts` are beyond what people there are")


def empty(k: int) -> Tree:
    """A list without an item."""
    return {"items": torch.full((k,), -1), "counts": torch.zeros(k, dtype=torch.int64)}


def best(items: Tensor, counts: Tensor, k: int) -> Tree:
    """The list of the k items with the highest counts, which are above 0; of equal ones the smaller first."""
    order = items.argsort()
    items, counts = items[order], counts[order]
    chosen = counts.argsort(descending=True, stable=True)[:k]
    chosen = chosen[counts[chosen] > 0]
    out = empty(k)
    out["items"][: len(chosen)] = items[chosen]
    out["counts"][: len(chosen)] = counts[chosen].round().long()
    return out


def frequent(estimates: Tensor, deviation: float, k: int) -> Tensor:
    """Which candidates to keep, ``[t]`` in rising order: those above max(f_(k) - se, 2 se), yet k to 3 k of them.

    Args:
        estimates: counts ``[C]``.
        deviation: se, the standard deviation of an estimate for a candidate that nobody has.
    """
    order = estimates.argsort(descending=True, stable=True)
    kth = float(estimates[order[min(k, len(order)) - 1]])
    above = int((estimates > max(kth - deviation, 2 * deviation)).sum())
    return order[: min(max(above, k), 3 * k)].sort().values


def _show(tensors: Tree, replica: Parts) -> None:
    fit: Sequence[str] = [n for n, t in replica["top"].items() if n in tensors and tensors[n].shape == t.shape]
    copy_(tensors, pick(replica["top"], fit))
