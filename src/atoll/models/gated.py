"""A network of which each site uses the blocks that its gate chooses (Chen et al., 2023, arXiv 2305.02776).

Shapes: B examples, L blocks, P numbers that the gate sees of an example.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from atoll.core.errors import AtollError, RecipeError
from atoll.core.tree import Tree
from atoll.models.masks import knapsack, straight_through


def cut(numel: int, blocks: int) -> list[int]:
    """Sizes of a tensor's blocks, runs of neighbouring entries as even as can be; the first is never the larger."""
    n = max(1, min(blocks, numel))
    return [numel // n + (i >= n - numel % n) for i in range(n)]


def flat_sizes(tree: Mapping[str, Tensor], blocks: int) -> list[int]:
    """Sizes of all blocks of all tensors, one after the other."""
    return [size for t in tree.values() for size in cut(t.numel(), blocks)]


START = 2.0
"""Shift of a fresh gate, so that its scores are near 0.88: at 0, where they are near 0.5, a network of n layers would
start with 2^-n of its outputs and of its gradients."""


class Gate(nn.Module):
    """A linear layer with batch normalisation: from an example to a score for each block, averaged over the batch.

    The normalisation always uses the statistics of the rows at hand; with a single row only its shift is left.

    Attributes:
        scores: of this site, float [L], what its model uses outside of training.
        kept: its choice, bool [L].
    """

    scores: Tensor
    kept: Tensor

    def __init__(self, inputs: int, blocks: int, least: float) -> None:
        super().__init__()
        self.inputs, self.least = inputs, least
        self.linear = nn.Linear(inputs, blocks, bias=False)
        self.scale, self.shift = nn.Parameter(torch.ones(blocks)), nn.Parameter(torch.full((blocks,), START))
        self.register_buffer("scores", torch.full((blocks,), START).sigmoid().clamp(min=least))
        self.register_buffer("kept", torch.ones(blocks, dtype=torch.bool))

    def logits(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, L], before the normalisation."""
        out: Tensor = self.linear(seen(x, self.inputs))
        return out

    def forward(self, logits_BL: Tensor) -> Tensor:
        """Scores [L], in [least, 1]."""
        centred = logits_BL - logits_BL.mean(0)
        normal = centred * (centred.square().mean(0) + 1e-5).rsqrt()
        return torch.sigmoid(normal * self.scale + self.shift).mean(0).clamp(min=self.least)


def seen(x: Tensor, inputs: int) -> Tensor:
    """What a gate sees of examples ``x`` [B, ...]: [B, P], each with mean 0 and variance 1.

    Long inputs are averaged down, images in both directions; short ones are followed by zeros.
    """
    if not x.is_floating_point():
        raise AtollError("pfedgate's gate reads numbers, and this data is tokens or other codes; use another method.")
    if x.dim() == 4 and x[0].numel() > inputs:
        side = max(1, math.isqrt(inputs // x.shape[1]))
        x = F.adaptive_avg_pool2d(x, (min(side, x.shape[2]), min(side, x.shape[3])))
    rows = x.flatten(1)
    if rows.shape[1] > inputs:
        rows = F.adaptive_avg_pool1d(rows[:, None], inputs)[:, 0]
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows * (rows.square().mean(1, keepdim=True) + 1e-5).rsqrt()
    return F.pad(rows, (0, inputs - rows.shape[1]))


class GatedNet(nn.Module):
    """``network`` with each block of its parameters times the block's score, or zero.

    In training every batch chooses anew, and the gradient of a score is that of a kept one; outside of it the site's
    settled choice counts, so that a prediction does not depend on the other examples of a batch.

    Args:
        keep: fraction of the trainable entries that may be in use, of the linear layers' and of the others' alike.
        blocks: of each tensor, as far as it has as many entries. Its first one is always kept.
        inputs: numbers that the gate sees of an example.
        per_entry: choose by score over size.
    """

    def __init__(self, network: nn.Module, keep: float, blocks: int, inputs: int, per_entry: bool = False) -> None:
        super().__init__()
        self.network, self.blocks, self.per_entry = network, blocks, per_entry
        trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
        if not trained:
            raise RecipeError(["pfedgate gates trainable parameters, but the model has none; use another model."])
        linear = {id(p) for m in network.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
        self.sizes = [cut(p.numel(), blocks) for p in trained.values()]
        self.names = list(trained)
        flat = [size for sizes in self.sizes for size in sizes]
        first = {sum(map(len, self.sizes[:i])) for i in range(len(self.sizes))}
        kind = [id(p) in linear for p, sizes in zip(trained.values(), self.sizes, strict=True) for _ in sizes]
        self.groups: list[tuple[list[int], int]] = []
        for wanted in (True, False):
            group = [i for i, k in enumerate(kind) if k == wanted]
            whole, least = sum(flat[i] for i in group), sum(flat[i] for i in group if i in first)
            budget = math.floor(keep * whole + 1e-9)
            if least > budget:
                raise RecipeError([
                    f"pfedgate keeps a block of each tensor, {least:,} of {whole:,} numbers here, but `keep` "
                    f"{keep:g} allows {budget:,}; raise it, or give more `blocks`."
                ])  # fmt: skip
            self.groups += [(group, budget)] if group else []
        self.flat, self.first = flat, first
        device = next(iter(trained.values())).device
        self.gate = Gate(inputs, len(flat), min(max(1 / blocks, 0.1), keep)).to(device)
        self.gate.kept.copy_(self.choose(self.gate.scores))

    @property
    def budget(self) -> int:
        """Most entries that a choice can keep."""
        return sum(budget for _, budget in self.groups)

    def choose(self, scores_L: Tensor) -> Tensor:
        """The blocks to use: bool [L]."""
        values: Sequence[float] = scores_L.tolist()
        if self.per_entry:
            values = [v / size for v, size in zip(values, self.flat, strict=True)]
        kept = [False] * len(self.flat)
        for group, budget in self.groups:
            always = [at for at, i in enumerate(group) if i in self.first]
            chosen = knapsack([values[i] for i in group], [self.flat[i] for i in group], budget, always)
            for i, k in zip(group, chosen, strict=True):
                kept[i] = k
        return torch.tensor(kept, device=scores_L.device)

    def adapted(self, scores_L: Tensor, kept_L: Tensor) -> Tree:
        """The parameters in use, by name."""
        factors = straight_through(torch.where(kept_L, scores_L, 0.0).detach(), scores_L)
        params, at, out = dict(self.network.named_parameters()), 0, {}
        for name, sizes in zip(self.names, self.sizes, strict=True):
            own = factors[at : at + len(sizes)]
            factor = own.repeat_interleave(torch.tensor(sizes, device=own.device), output_size=sum(sizes))
            out[name] = params[name] * factor.view(params[name].shape)
            at += len(sizes)
        return out

    def forward(self, x: Tensor) -> Any:
        if self.training:
            scores = self.gate(self.gate.logits(x))
            kept = self.choose(scores.detach())
        else:
            scores, kept = self.gate.scores, self.gate.kept
        return functional_call(self.network, self.adapted(scores, kept), (x,))

    @torch.no_grad()
    def settle(self, logits_BL: Tensor) -> None:
        """Choose once and for all, from the gate's logits for all rows of a site."""
        scores = self.gate(logits_BL)
        self.gate.scores.copy_(scores)
        self.gate.kept.copy_(self.choose(scores))
