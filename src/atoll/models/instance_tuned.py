"""A frozen network whose layers are rescaled for each input, from a pool that the input chooses from.

Feng et al., "Towards Instance-adaptive Inference for Federated Learning", ICCV 2023, arXiv 2308.06051. Scales and
shifts: Lian et al., "Scaling & Shifting Your Features", NeurIPS 2022, arXiv 2210.08823.

Shapes: B rows, M entries of the pool, D the feature, C outputs, W the width of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from atoll.core.errors import AtollError
from atoll.data.dataset import Info
from atoll.models.features import Tap, linear_head
from atoll.models.keyed_pool import KeyedPool
from atoll.models.model import ModelBuilder
from atoll.models.norm_free import NORMS


@dataclass(frozen=True, kw_only=True)
class TunerPool:
    """What inputs choose from.

    Args:
        size: entries.
        k: entries that an input chooses, at most ``size``.
        spread: standard deviation of the initial scales around 1 and shifts around 0.
        usage_penalty: while training, what an entry that every input has chosen so far loses of its cosine.
    """

    size: Annotated[int, Ge(1)] = 25
    k: Annotated[int, Ge(1)] = 3
    spread: Annotated[float, Ge(0)] = 0.02
    usage_penalty: Annotated[float, Ge(0)] = 0.0

    def __post_init__(self) -> None:
        if self.k > self.size:
            raise AtollError(f"`k` is {self.k}, but the pool has {self.size} entries; an input chooses at most these.")


class ScaleShift(nn.Module):
    """M scales and shifts of one layer's output. As a forward hook it applies those in ``weights`` ``[B, M]``."""

    weights: Tensor | None = None

    def __init__(self, size: int, width: int, channel: int, spread: float) -> None:
        super().__init__()
        self.channel = channel
        self.scale = nn.Parameter(1 + spread * torch.randn(size, width))
        self.shift = nn.Parameter(spread * torch.randn(size, width))

    def hook(self, layer: nn.Module, inputs: Any, out: Tensor) -> Tensor | None:
        """scale * out + shift, both averaged over the row's entries; nothing is changed while there are no weights."""
        if self.weights is None:
            return None
        shape = [1] * out.dim()
        shape[0], shape[self.channel] = len(out), out.shape[self.channel]
        scale_BW, shift_BW = self.weights @ self.scale, self.weights @ self.shift
        return scale_BW.view(shape) * out + shift_BW.view(shape)


class InstanceTunedNet(nn.Module):
    """Two passes: the untouched ``body`` gives the query, then the tuned one the feature, which a chosen head reads.

    Raises:
        RecipeError: for a model without a linear head.
    """

    def __init__(self, body: nn.Module, pool: TunerPool) -> None:
        super().__init__()
        name, head = linear_head(body, "fedins")
        size = pool.size
        self.body, self.k = body.requires_grad_(False), pool.k
        self.tap = Tap()
        head.register_forward_pre_hook(self.tap)
        self.pool = KeyedPool(size, head.in_features, pool.usage_penalty)
        self.tuners = nn.ModuleDict()
        for layer_name, layer in body.named_modules():
            point = _point(layer)
            if point is not None and layer_name != name:
                tuner = ScaleShift(size, *point, pool.spread)
                layer.register_forward_hook(tuner.hook)
                self.tuners[layer_name.replace(".", "/")] = tuner
        bias = head.bias if head.bias is not None else head.weight.new_zeros(head.out_features)
        self.heads = nn.Parameter(head.weight.detach().repeat(size, 1, 1))
        self.biases = nn.Parameter(bias.detach().repeat(size, 1))

    def train(self, mode: bool = True) -> InstanceTunedNet:
        """The body never trains: no dropout, no running statistics."""
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.body(x)
            query_BD = self.tap.feature("fedins")
        weights_BM = self.pool(query_BD, self.k)
        self._apply_to_layers(weights_BM)
        try:
            self.body(x)
            feature_BD = self.tap.feature("fedins")
        finally:
            self._apply_to_layers(None)
        head_BCD = (weights_BM @ self.heads.flatten(1)).unflatten(1, self.heads.shape[1:])
        out: Tensor = torch.bmm(head_BCD, feature_BD[:, :, None])[:, :, 0] + weights_BM @ self.biases
        return out

    def _apply_to_layers(self, weights_BM: Tensor | None) -> None:
        for tuner in self.tuners.values():
            assert isinstance(tuner, ScaleShift)
            tuner.weights = weights_BM


def _point(layer: nn.Module) -> tuple[int, int] | None:
    """Width and channel dimension of a layer's output, where it is scaled and shifted: linear layers, convolutions and
    norms with parameters."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, -1
    if isinstance(layer, _ConvNd):
        return layer.out_channels, 1
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm) and len(layer.normalized_shape) == 1 and layer.elementwise_affine:
        return layer.normalized_shape[0], -1
    weight = getattr(layer, "weight", None)
    if isinstance(layer, NORMS) and isinstance(weight, Tensor) and weight.dim() == 1:
        return len(weight), 1
    return None


@dataclass(frozen=True, kw_only=True)
class InstanceTuned(ModelBuilder):
    """Another network, frozen, with a pool of scales, shifts and heads that each input chooses from.

    Args:
        network: what is tuned; best a pretrained one.
        pool: what inputs choose from.
    """

    network: ModelBuilder
    pool: TunerPool = TunerPool()

    @property
    def architecture(self) -> ModelBuilder:
        return InstanceTuned(network=self.network.architecture, pool=self.pool)

    def build(self, info: Info, outputs: int) -> nn.Module:
        return InstanceTunedNet(self.network.build(info, outputs), self.pool)
