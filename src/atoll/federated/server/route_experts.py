"""Keep every site's model, and learn which of them to ask, from what they generate."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt

from atoll.core.message import Message
from atoll.core.tree import Parts, Tree, clone, copy_, named_tensors
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.experts import ensemble_of, fit_router, made_by_experts
from atoll.diffusion.solvers import Sampler
from atoll.federated.method import Broadcast, MergeContext, ServerStep
from atoll.federated.share.experts import Experts


@dataclass(frozen=True)
class RouteExperts(ServerStep):
    """The experts of all sites that have written so far, and a router that is trained afresh in each merge.

    No real row is seen: each expert makes samples, of classes in the proportions that its site has them, and the router
    learns whose they are when they are noised. Parts count by their numbers of rows. State: each site's tensors, and
    its counts.

    Args:
        share: the method's own.
        samples: that each expert makes.
        sampler: how.
        steps, batch, lr: of the router's training.
    """

    share: Experts = Experts()
    samples: Annotated[int, Ge(1)] = 512
    sampler: Sampler = Sampler(steps=12)
    steps: Annotated[int, Ge(0)] = 500
    batch: Annotated[int, Ge(1)] = 128
    lr: Annotated[float, Gt(0)] = 1e-3
    accepts: ClassVar[tuple[str, ...]] = ("letters",)
    broadcasts: ClassVar[str] = "ensemble"

    def open(self, replica: Parts) -> Broadcast:
        """Nothing to send: the seed gave everybody the same untrained model."""
        return Broadcast(Message("agreed"))

    def step(self, replica: Parts, state: Parts, combined: Message, context: MergeContext) -> tuple[Broadcast, Parts]:
        new = {**state, **{f"expert{site}": tree for site, tree in combined.parts.items()}}
        about = {s: torch.tensor(said["counts"]) for s, said in combined.facts["from"].items()}
        new["counts"] = {**state.get("counts", {}), **about}
        sites = sorted(new["counts"], key=int)
        device = next(iter(replica["weights"].values())).device
        shape = context.task.info.shape
        model = context.task.model(context.seed).to(device)
        experts = [_with(copy.deepcopy(model), new[f"expert{s}"]) for s in sites]
        ensemble = ensemble_of(experts, shape, self.share.top_k, self.share.width, context.seed).eval()
        if not context.dry:
            counts = torch.stack([new["counts"][s].cpu() for s in sites])
            draws, number = context.stream("classes"), context.stream("router").initial_seed()
            asked = [torch.multinomial(c.double(), self.samples, True, generator=draws).to(device) for c in counts]
            generator = torch.Generator(device).manual_seed(number)
            made = made_by_experts(ensemble, asked, shape, self.sampler, generator)
            fit_router(
                ensemble, *made, counts.sum(1), steps=self.steps, batch=self.batch, lr=self.lr, generator=generator
            )  # fmt: skip
        told = {site: Message("agreed") for site in range(context.num_sites)}
        return Broadcast(Message("ensemble", {"weights": clone(named_tensors(ensemble))}), told), new


def _with(model: Denoiser, tensors: Tree) -> Denoiser:
    copy_(named_tensors(model), tensors)
    return model
