"""One large model at the server, and a narrower one for each kind of site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Le
from torch import nn

from atoll.core.errors import AtollError, BadReply
from atoll.core.message import Message
from atoll.core.tree import Parts, Tree, clone, copy_, named_tensors, pick
from atoll.federated.method import SiteInfo, expect_like, expect_only
from atoll.federated.share.parameters import Parameters, floating_names
from atoll.federated.visit import SiteModel
from atoll.models.learned_width import narrower
from atoll.models.narrow import units_of

Ratio = Annotated[float, Gt(0), Le(1)]


@dataclass(frozen=True)
class SubModels(Parameters):
    """The replica has the large model as ``weights`` and each narrower one as ``weights at RATIO``.

    A site is sent its own alone, under the name ``weights``, so to its work it is the only model there is.

    Args:
        ratios: site i has this share of the units of each layer: ``ratios[i % len(ratios)]``.
    """

    ratios: tuple[Ratio, ...] = (1.0, 0.75, 0.5625)

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 < r <= 1 for r in self.ratios):
            raise AtollError(f"`ratios` are shares of a layer's units, from 0 to 1; got {list(self.ratios)}.")

    def ratio(self, site: int) -> float:
        return self.ratios[site % len(self.ratios)]

    def narrow(self) -> list[float]:
        """The different ratios below 1, in the order given."""
        return [r for r in dict.fromkeys(self.ratios) if r < 1]

    def prepare(self, model: nn.Module, site: SiteInfo | None) -> nn.Module:
        if self.narrow() and not units_of(model):
            raise AtollError(
                "This network has no layer that can lose units (one that linear and convolution layers alone read), so "
                "there are no narrower ones; use another network, or fedavg."
            )
        ratio = 1.0 if site is None else self.ratio(site.site)
        return model if ratio == 1 else narrower(model, ratio)

    def prepare_key(self, site: SiteInfo | None) -> object:
        return 1.0 if site is None else self.ratio(site.site)

    def initial(self, model: nn.Module) -> Parts:
        """Before anything is learned, a narrow model is the first units of the large one."""
        names = floating_names(model)
        models = {part(r): narrower(model, r) for r in self.narrow()}
        return {name: clone(pick(named_tensors(m), names)) for name, m in {part(1.0): model, **models}.items()}

    def receive(self, replica: Parts, message: Message) -> Parts:
        return message.parts or replica

    def own(self, replica: Parts, at: SiteModel) -> Parts:
        return {"weights": fitting(replica, pick(at.tensors, at.split.shared))}

    def install(self, at: SiteModel, replica: Parts) -> None:
        copy_(at.tensors, self.own(replica, at)["weights"])

    def check(self, reply: Message, replica: Parts) -> None:
        expect_only(reply, "delta")
        expect_like(reply, "delta", fitting(replica, reply.parts.get("delta", {})))


def part(ratio: float) -> str:
    return "weights" if ratio == 1 else f"weights at {ratio:g}"


def fitting(replica: Parts, like: Tree) -> Tree:
    """The model of the replica that has the shapes of ``like``.

    Raises:
        BadReply: there is none.
    """
    shapes = {n: t.shape for n, t in like.items()}
    for tree in replica.values():
        if {n: t.shape for n, t in tree.items()} == shapes:
            return tree
    raise BadReply("it has the shapes of none of the models in use")
