"""A network as an autoencoder's encoder, with several small heads on its code.

The encoder is any network without its last linear layer; the decoder mirrors it. So what a code should keep can be
learned from inputs alone, and what it means from the few labels that there are (Tashakori et al., 2022,
arXiv 2203.08176, use multi-layer perceptrons on sensor data).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from annotated_types import Ge
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.data.dataset import Info
from atoll.models.features import linear_head
from atoll.models.model import ModelBuilder, refuse_tokens

BARE = "This network has nothing before its last linear layer; use one with hidden layers."


class Autoencoder(nn.Module):
    """Inputs -> their code ``[B, D]``, and, from the code alone, ``[B, pixels]`` in (-1, 1) that should be what
    :func:`bounded` makes of the inputs."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def code(self, x: Tensor) -> Tensor:
        out: Tensor = self.encoder(x).flatten(1)
        return out

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.code(x)
        return code, self.decoder(code).tanh()


class Mixture(nn.Module):
    """``[B, D]`` -> ``[B, outputs]``: the mean of what the heads say, weighted by softmax(mixing).

    Of class probabilities where there are classes, as their logarithms, so that a head that is sure and wrong has no
    more than its weight; else of the outputs.

    The heads' statistics are those of the rows that they were trained on: :meth:`train` leaves them in evaluation mode,
    since the few labelled rows of a site (maybe one) have none of their own.
    """

    def __init__(self, heads: Iterable[nn.Module], classes: bool) -> None:
        super().__init__()
        self.classes = classes
        self.heads = nn.ModuleList(heads)
        self.mixing = nn.Parameter(torch.zeros(len(self.heads)))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.heads.eval()
        return self

    def forward(self, code: Tensor) -> Tensor:
        said = torch.stack([head(code) for head in self.heads])
        if self.classes:
            return (said.log_softmax(-1) + self.mixing.log_softmax(0)[:, None, None]).logsumexp(0)
        return (said * self.mixing.softmax(0)[:, None, None]).sum(0)


class CodedNet(nn.Module):
    """What a mixture of heads says about the code of an input."""

    def __init__(self, autoencoder: Autoencoder, mixture: Mixture) -> None:
        super().__init__()
        self.autoencoder, self.mixture = autoencoder, mixture

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mixture(self.autoencoder.code(x))
        return out


def coded(network: nn.Module, info: Info, heads: int) -> CodedNet:
    """A module that uses ``network`` (changed in place) as its encoder; decoder and heads are new.

    The mirror of linear layers in-256-128-64 is 64-128-256-in; other layers (convolutions) have no counterpart and
    the decoder's last layer makes up for them.

    Raises:
        AtollError: tokens, a network without anything before its last linear layer, or one with running statistics
            (nobody can generate what was counted).
    """
    refuse_tokens(info, "An autoencoder")
    name, last = linear_head(network, "An encoder")
    layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
    if not name:
        raise AtollError(BARE)
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    if not list(network.parameters()):
        raise AtollError(BARE)
    if counted := [n for n, b in network.named_buffers() if b.is_floating_point()]:
        raise AtollError(f"An encoder's tensors are generated, and `{counted[0]}` is counted; use `norm: group`.")
    widths = [m.out_features for m in reversed(layers[:-1])]
    if widths[:1] == [last.in_features]:
        widths = widths[1:]  # the layer that gives the code
    sizes = [last.in_features, *widths, math.prod(info.shape)]
    mirror: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        mirror += [nn.Linear(a, b), nn.ReLU()]
    autoencoder = Autoencoder(network, nn.Sequential(*mirror[:-1]))
    made = [head(last.in_features, last.out_features) for _ in range(heads)]
    return CodedNet(autoencoder, Mixture(made, classes=info.num_classes is not None))


def head(code: int, outputs: int) -> nn.Sequential:
    """Batch norm, 64, 16, batch norm, outputs."""
    return nn.Sequential(
        nn.BatchNorm1d(code), nn.Linear(code, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.BatchNorm1d(16),
        nn.Linear(16, outputs),
    )  # fmt: skip


def bounded(x: Tensor, info: Info) -> Tensor:
    """What an autoencoder has to give back for ready inputs ``[B, ...]``: ``[B, pixels]`` between -1 and 1.

    Pixels become 2 v - 1, v from 0 (black) to 1; of the numbers of a table, which have no bounds, tanh is taken.
    """
    if info.kind != "image":
        return x.flatten(1).tanh()
    mean, scale = (t.to(x) if isinstance(t, Tensor) else t for t in (info.mean, info.scale))
    return (2 * (x * scale + mean) - 1).flatten(1).clamp(-1, 1)


@dataclass(frozen=True)
class Coded(ModelBuilder):
    """Another network as an encoder with heads: the form in which SemiPFL's models are saved.

    Args:
        network: the encoder, with a last linear layer that is taken off.
        heads: how many are mixed.
    """

    network: ModelBuilder
    heads: Annotated[int, Ge(1)] = 4

    @property
    def architecture(self) -> ModelBuilder:
        return Coded(self.network.architecture, self.heads)

    def build(self, info: Info, outputs: int) -> nn.Module:
        return coded(self.network.build(info, outputs), info, self.heads)
