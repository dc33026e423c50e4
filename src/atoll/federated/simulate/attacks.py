"""Hostile sites, for simulations that measure a defence. Nothing here can run at a real site.

``Hostile(inner, sites=(0, 3), attack=SignFlip())`` does the inner work everywhere, and at the listed sites
spoils what goes in or comes out. Attackers know the protocol and their own data; they do not see other sites'
updates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Protocol

import torch
from annotated_types import Ge, Gt

from atoll.core.errors import AtollError
from atoll.core.message import Message
from atoll.core.tree import Parts, Tree
from atoll.data.dataset import SiteData
from atoll.federated.local._around import Around
from atoll.federated.visit import Result, Visit

MEMORY = "attack."
"""Prefix of what an attack keeps at its site."""


class Attack(Protocol):
    """What a hostile site does differently: ``before`` changes its visit, ``after`` its result."""

    package: ClassVar[str] = "atoll.federated.simulate.attacks"

    def before(self, visit: Visit) -> Visit:
        return visit

    def after(self, result: Result, visit: Visit, memory: Parts) -> tuple[Result, Parts]:
        """The result, and what the attack remembers for this site's next visit."""
        return result, {}


@dataclass(frozen=True)
class Hostile(Around):
    """Local work with an attack at some sites.

    Args:
        inner: what honest sites do.
        sites: numbers of the hostile sites.
        attack: what they do.
    """

    sites: tuple[int, ...]
    attack: Attack

    def run(self, visit: Visit) -> Result:
        if visit.site.site not in self.sites:
            return self.inner.run(visit)
        memory = {k[len(MEMORY) :]: v for k, v in visit.state.items() if k.startswith(MEMORY)}
        visit = replace(visit, state={k: v for k, v in visit.state.items() if not k.startswith(MEMORY)})
        visit = self.attack.before(visit)
        result, memory_ = self.attack.after(self.inner.run(visit), visit, memory)
        return replace(result, state={**result.state, **{MEMORY + k: v for k, v in memory_.items()}})


@dataclass(frozen=True)
class SignFlip(Attack):
    """Send minus the update, times ``scale``."""

    scale: Annotated[float, Gt(0)] = 1.0

    def after(self, result: Result, visit: Visit, memory: Parts) -> tuple[Result, Parts]:
        return _times(result, -self.scale), {}


@dataclass(frozen=True)
class Scaling(Attack):
    """Send the update times ``factor``: the lever of a model replacement."""

    factor: Annotated[float, Gt(0)] = 10.0

    def after(self, result: Result, visit: Visit, memory: Parts) -> tuple[Result, Parts]:
        return _times(result, self.factor), {}


@dataclass(frozen=True)
class RandomNoise(Attack):
    """Send N(0, std^2) noise instead of the update."""

    std: Annotated[float, Ge(0)] = 1.0

    def after(self, result: Result, visit: Visit, memory: Parts) -> tuple[Result, Parts]:
        g = visit.stream("attack")
        parts = {
            part: {
                n: torch.randn(t.shape, generator=g).mul_(self.std).to(t.dtype) if t.is_floating_point() else t
                for n, t in tree.items()
            }
            for part, tree in result.message.parts.items()
        }
        return replace(result, message=Message(result.message.kind, parts, result.message.facts)), {}


@dataclass(frozen=True)
class ReverseRanking(Attack):
    """Vote for the opposite of what was learned: entry p of n becomes n - 1 - p (for methods that send rankings)."""

    def after(self, result: Result, visit: Visit, memory: Parts) -> tuple[Result, Parts]:
        m = result.message
        ranks = m.parts.get("positions")
        if ranks is None:
            raise AtollError("ReverseRanking attacks rankings, and this method sends none; use SignFlip.")
        parts = {**m.parts, "positions": {n: len(t) - 1 - t for n, t in ranks.items()}}
        return replace(result, message=Message(m.kind, parts, m.facts)), {}


@dataclass(frozen=True)
class LabelFlip(Attack):
    """Train honestly on labels y -> C - 1 - y, C the number of classes."""

    def before(self, visit: Visit) -> Visit:
        train = visit.data.train
        classes = train.info.num_classes or 2
        columns = {n: train.column(n) for n in train.columns}
        y = torch.where(columns["y"] < 0, columns["y"], classes - 1 - columns["y"])  # -1: no label
        flipped = replace(train, columns={**columns, "y": y}, rows=None)
        return replace(visit, data=SiteData(flipped, visit.data.validation, visit.data.test))


@dataclass(frozen=True)
class StaleReplay(Attack):
    """Send the update of this site's first visit again and again."""

    def after(self, result: Result, visit: Visit, memory: Parts) -> tuple[Result, Parts]:
        if not memory:
            return result, dict(result.message.parts)
        old = Message(result.message.kind, memory, result.message.facts)
        return replace(result, message=old), memory


def _times(result: Result, factor: float) -> Result:
    m = result.message
    parts: dict[str, Tree] = {
        p: {n: t * factor if t.is_floating_point() else t for n, t in tree.items()} for p, tree in m.parts.items()
    }
    facts: dict[str, Any] = dict(m.facts)
    return replace(result, message=Message(m.kind, parts, facts))
