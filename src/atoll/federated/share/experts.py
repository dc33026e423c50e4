"""Every site has a denoiser of its own; the common model is all of them, with a router between."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import nn

from atoll.core.errors import AtollError, BadReply
from atoll.core.message import Message
from atoll.core.tree import Parts, Tree, copy_, named_tensors
from atoll.data.dataset import Info
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.experts import ExpertEnsemble, ensemble_of
from atoll.federated.method import Share, SiteInfo, Split, expect_like, expect_only
from atoll.federated.visit import SiteModel
from atoll.models.expert_nets import ExpertNets
from atoll.models.model import ModelBuilder


@dataclass(frozen=True)
class Experts(Share):
    """A site's tensors are private and travel as they are, in letters. The replica is the ensemble's: of one untrained
    expert at first, then of as many as there are sites that have written. Sites do not need it, so it is not sent to
    them.

    Args:
        top_k: how many experts see a sample; None: all.
        width: of the router.
    """

    top_k: Annotated[int, Ge(1)] | None = 1
    width: Annotated[int, Ge(4)] = 16

    def prepare_for(self, model: nn.Module, site: SiteInfo | None, rows: Info) -> nn.Module:
        if not isinstance(model, Denoiser):
            raise AtollError("ddm makes generators out of denoisers; use `task: denoising`.")
        return model if site is not None else ensemble_of([model], rows.shape, self.top_k, self.width)

    def prepare_key(self, site: SiteInfo | None) -> object:
        return site is None

    def split(self, model: nn.Module) -> Split:
        names = tuple(named_tensors(model))
        return Split(shared=names) if isinstance(model, ExpertEnsemble) else Split(private=names)

    def receive(self, replica: Parts, message: Message) -> Parts:
        return message.parts or replica

    def install(self, at: SiteModel, replica: Parts) -> None:
        """The server's model takes on the size that the replica has; a site has its own tensors."""
        if isinstance(at.model, ExpertEnsemble) and "weights" in replica:
            resize(at.model, self._size(replica), self.top_k)
            at.tensors = named_tensors(at.model)
            copy_(at.tensors, replica["weights"])

    def check(self, reply: Message, replica: Parts) -> None:
        expect_only(reply, "weights")
        expect_like(reply, "weights", expert(replica["weights"], 0))
        said: Any = reply.facts.get("counts")
        classes = len(replica["weights"]["router.reader.embed.label.weight"]) - 1
        numbers = isinstance(said, list) and len(said) == classes
        if not numbers or not all(type(n) is int and 0 <= n < 2**40 for n in said) or not sum(said):
            raise BadReply(f"fact `counts` is a number of rows for each of {classes} classes, and not all are 0")

    def export(self, model: nn.Module, replica: Parts) -> nn.Module:
        assert isinstance(model, ExpertEnsemble)
        resize(model, self._size(replica), self.top_k)
        copy_(named_tensors(model), replica["weights"])
        return model

    def exported(self, network: ModelBuilder, model: nn.Module) -> ModelBuilder:
        if not isinstance(model, ExpertEnsemble):
            return network
        return ExpertNets(network.architecture, len(model.net), model.top_k, self.width)

    def _size(self, replica: Parts) -> int:
        return len({name.split(".")[1] for name in replica["weights"] if name.startswith("net.")})


def expert(weights: Tree, k: int) -> Tree:
    """The tensors of one expert out of an ensemble's."""
    start = f"net.{k}."
    return {name[len(start) :]: t for name, t in weights.items() if name.startswith(start)}


def resize(ensemble: ExpertEnsemble, experts: int, top_k: int | None) -> None:
    """Change the number of experts, in place; tensors of new ones are to be filled in."""
    if experts != len(ensemble.net):
        first, reader = ensemble.net[0], ensemble.router.reader
        ensemble.net = nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(experts - 1))])
        out: Any = reader.out  # type: ignore[union-attr]
        with torch.no_grad():
            reader.out = nn.utils.skip_init(nn.Linear, out.in_features, experts, device=out.weight.device)  # type: ignore[union-attr]
    ensemble.top_k = None if top_k is None else min(top_k, experts)
