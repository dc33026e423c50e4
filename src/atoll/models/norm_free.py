"""Networks without normalisation layers: convolutions standardise their own weights instead.

Brock, De, Smith, "Characterizing Signal Propagation to Close the Performance Gap in Unnormalized ResNets", ICLR 2021,
arXiv 2101.08692. Zhuang and Lyu (arXiv 2306.05879) bring it to federated learning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from atoll.data.dataset import Info
from atoll.models.baking import bake
from atoll.models.model import ModelBuilder

NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # batch and instance norm of any dimension, synchronised ones included
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)

RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))
"""One over the standard deviation of max(0, x) for a standard normal x: 1.71286 (the authors'
code has an estimate, 1.71396)."""


def standardise(weight: Tensor, gain_O: Tensor, gamma: float) -> Tensor:
    """gamma g_o (W_o - mean_o) / (std_o sqrt(fan_in)) for each output o: mean 0 and length gamma g_o.

    Args:
        weight: of a convolution, ``[O, I / groups, ...]``; fan_in is the number of entries of a row.
        gain_O: ``[O]``.
    """
    rows = weight.flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    length = torch.linalg.vector_norm(centred, dim=1, keepdim=True).clamp(min=1e-6)  # std_o sqrt(fan_in)
    out: Tensor = centred * (gamma * gain_O[:, None] / length)
    return out.view_as(weight)


class Standardised(nn.Module):
    """The parametrisation of one weight, with its gain: ones at the start, learned."""

    def __init__(self, weight: Tensor, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        self.gain = nn.Parameter(weight.new_ones(len(weight)), requires_grad=weight.requires_grad)

    def forward(self, weight: Tensor) -> Tensor:
        return standardise(weight, self.gain, self.gamma)


def convolutions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The convolutions whose weights can be standardised, by name.

    Not among them: transposed ones, depthwise ones (a few numbers a row, which standardising leaves little of), rows of
    one number (which it leaves nothing of), and weights that are parametrised already.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, _ConvNd) and not layer.transposed and not parametrize.is_parametrized(layer, "weight"):
            depthwise = layer.groups > 1 and layer.groups == layer.in_channels
            if not depthwise and layer.weight[0].numel() > 1:
                yield name, layer


def strip_norms(model: nn.Module) -> tuple[str, ...]:
    """Replace every normalisation layer by an identity, in place, and return their names.

    Convolutions that left their bias to a norm get one, zero at the start. A second call changes nothing. A model
    without a convolution to standardise keeps its norms: nothing would take their place.
    """
    layers = [layer for _, layer in convolutions(model)]
    names = [n for n, m in model.named_modules(remove_duplicate=False) if n and isinstance(m, NORMS)] if layers else []
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
    for layer in layers if names else ():
        if layer.bias is None:
            weight = layer.weight
            layer.bias = nn.Parameter(weight.new_zeros(layer.out_channels), requires_grad=weight.requires_grad)
    return tuple(names)


def standardise_convolutions(model: nn.Module, gamma: float = RELU_GAIN) -> tuple[str, ...]:
    """Let every convolution use standardised weights from now on, in place, and return their names.

    Trained are the raw weights and a gain per output. A second call changes nothing.
    """
    found = list(convolutions(model))
    for _, layer in found:
        parametrize.register_parametrization(layer, "weight", Standardised(layer.weight, gamma))
    return tuple(name for name, _ in found)


def bake_convolutions(model: nn.Module) -> tuple[str, ...]:
    """Undo :func:`standardise_convolutions`, with the standardised weights in the place of the raw ones."""
    found: list[tuple[str, Any]] = [
        (name, m) for name, m in model.named_modules() if parametrize.is_parametrized(m, "weight")
    ]
    ours = [(name, layer) for name, layer in found if isinstance(layer.parametrizations.weight[0], Standardised)]
    for _, layer in ours:
        bake(layer)
    return tuple(name for name, _ in ours)


@dataclass(frozen=True)
class NormFree(ModelBuilder):
    """Another network, without its normalisation layers and with ordinary convolutions.

    This is the form in which FedWon's models are saved. Alone it is the baseline without any norm.

    Args:
        network: whose norms are taken out.
    """

    network: ModelBuilder

    @property
    def architecture(self) -> ModelBuilder:
        return NormFree(self.network.architecture)

    def build(self, info: Info, outputs: int) -> nn.Module:
        model = self.network.build(info, outputs)
        strip_norms(model)
        return model
