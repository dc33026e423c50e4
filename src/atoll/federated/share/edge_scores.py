"""Supermasks: the weights never change, a score per edge decides which of them are used.

Ramanujan et al., "What's Hidden in a Randomly Weighted Neural Network?", CVPR 2020 (arXiv 1911.13299), and
the ranking view of Mozaffari et al., USENIX Security 2023 (arXiv 2110.04350). What sites share is, per layer,
the *position* of every edge in the order of importance: 0 for the least important, n-1 for the most.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from atoll.core.errors import BadReply, RecipeError
from atoll.core.message import Message
from atoll.core.streams import stream
from atoll.core.tree import Parts, named_tensors
from atoll.federated.method import Share, SiteInfo, Split, expect_like
from atoll.federated.visit import SiteModel
from atoll.models.baking import bake
from atoll.models.masks import straight_through

SCORE = "parametrizations.weight.original"
"""How torch names the trainable tensor behind a parametrised weight."""


class KeepTop(nn.Module):
    """Scores in, weights out: the signed constants of the edges with the highest scores, zero elsewhere.

    The gradient passes straight through the choice, to every score.

    Args:
        constants: fixed weights of the layer.
        keep: number of edges in use; edges that tie with the best unused one are not used.
    """

    constants: Tensor

    def __init__(self, constants: Tensor, keep: int) -> None:
        super().__init__()
        self.keep = keep
        self.register_buffer("constants", constants, persistent=False)

    def forward(self, scores: Tensor) -> Tensor:
        fixed = scores.detach()
        unused = scores.numel() - self.keep
        mask = fixed > fixed.flatten().kthvalue(unused).values if unused else torch.ones_like(fixed)
        return self.constants * straight_through(mask, scores)


@dataclass(frozen=True)
class EdgeScores(Share):
    """Mask every Linear and convolution layer; the replica is the global order of each layer's edges.

    The fresh weights split in two: their signs stay, on constants of size sqrt(2 / fan_in), and their sizes
    give the order before round 0. So the run's seed says everything and the first broadcast is empty. Biases
    are frozen at zero. Other parameters (norms, embeddings) are frozen as built, and batch norms use batch
    statistics, also in evaluation: a running mean would be a weight that changes.

    Args:
        keep: fraction of a layer's edges in use.
    """

    keep: Annotated[float, Gt(0), Le(1)] = 0.5

    def prepare(self, model: nn.Module, site: SiteInfo | None) -> nn.Module:
        """Raises :class:`RecipeError` for a model with no such layer, or with a weight that modules share."""
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd)]
        uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        tied = [n for n, m in layers if uses[id(m.weight)] > 1]
        if tied or not layers:
            why = f"`{tied[0]}` shares its weight with another module" if tied else "the model has none"
            raise RecipeError([f"frl masks Linear and convolution layers, but {why}; use another model."])
        model.requires_grad_(False)
        for name, layer in layers:
            self._mask(name, layer)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        return model

    def _mask(self, name: str, layer: Any) -> None:
        weight = layer.weight.detach()
        if layer.bias is not None:
            layer.bias.zero_()
        # A layer that starts at zero has neither signs nor an order; give it those of a random one.
        start = torch.where(weight == 0, _random(name, weight), weight)
        constants = torch.where(start < 0, -1.0, 1.0) * math.sqrt(2 / fan_in(weight))
        keep = max(1, round(self.keep * weight.numel()))
        layer.weight.copy_(start.abs())
        parametrize.register_parametrization(layer, "weight", KeepTop(constants, keep))
        layer.get_parameter(SCORE).requires_grad_(True)

    def split(self, model: nn.Module) -> Split:
        return Split(shared=tuple(n for n, _ in model.named_parameters() if n.endswith(SCORE)))

    def initial(self, model: nn.Module) -> Parts:
        tensors = named_tensors(model)
        return {"positions": {edges(n): order(tensors[n].flatten()) for n in self.split(model).shared}}

    def receive(self, replica: Parts, message: Message) -> Parts:
        return message.parts or replica

    def install(self, at: SiteModel, replica: Parts) -> None:
        for name, positions in replica["positions"].items():
            tensor = at.tensors[scores(name)]
            tensor.copy_(levels(positions, fan_in(tensor)).view_as(tensor))

    def check(self, reply: Message, replica: Parts) -> None:
        """A reply must hold each position of a layer exactly once: then it has one vote, and no more."""
        expect_like(reply, "positions", replica["positions"])
        for name, p in reply.parts["positions"].items():
            each = torch.arange(len(p), dtype=torch.int32)
            if p.dtype != torch.int32 or not torch.equal(p.sort().values, each):
                raise BadReply(f"`{name}` is no ranking: each position 0..{len(p) - 1} must occur exactly once")

    def export(self, model: nn.Module, replica: Parts) -> nn.Module:
        """An ordinary sparse network: masks applied, scores gone."""
        tensors = named_tensors(model)
        self.install(SiteModel(model, tensors, self.split(model), {}), replica)
        for layer in [m for m in model.modules() if parametrize.is_parametrized(m, "weight")]:
            bake(layer)
        return model


def order(values: Tensor, ties: Tensor | None = None) -> Tensor:
    """Position of each entry when sorted upwards, int32 [n] on the CPU; ties as in ``ties``."""
    values, out = values.cpu(), torch.empty(len(values), dtype=torch.int32)
    first = torch.arange(len(values)) if ties is None else ties.argsort()
    out[first[values[first].argsort(stable=True)]] = torch.arange(len(values), dtype=torch.int32)
    return out


def levels(positions: Tensor, fan: int) -> Tensor:
    """Scores that stand for an order: even steps in (0, 1 / sqrt(fan)], float32.

    The paper hands out its sorted random initial scores, uniform on that range; these are their expectations,
    and never tie.
    """
    return ((positions.double() + 1) / (len(positions) * math.sqrt(fan))).float()


def fan_in(weight: Tensor) -> int:
    return max(1, weight[0].numel())


def scores(name: str) -> str:
    """The model's score tensor behind a layer's entry in the replica."""
    return name.removesuffix("weight") + SCORE


def edges(name: str) -> str:
    """The inverse of :func:`scores`."""
    return name.removesuffix(SCORE) + "weight"


def _random(name: str, like: Tensor) -> Tensor:
    """Uniform around zero, the same in every run: only for entries that a model builder left at zero."""
    drawn = torch.rand(like.shape, generator=stream(0, "edge scores", name)) * 2 - 1
    return drawn.to(like) / math.sqrt(fan_in(like))
