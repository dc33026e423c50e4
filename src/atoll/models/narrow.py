"""Neurons and channels that can be taken out of a network, and networks without them.

A layer's outputs can go when nothing but further linear and convolution layers reads them, each output its own columns.
That is read off the module's traced graph (``torch.fx``); where it cannot be traced, or where outputs are added to
others, mixed by a norm over channels or returned, the layer keeps its width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn

from atoll.data.dataset import Info
from atoll.models.model import ModelBuilder

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
EACH = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus,
    nn.Hardtanh, nn.Hardswish, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
POOLING = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
CALLS = {
    "relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "tanh", "sigmoid", "softplus",
    "hardtanh", "hardswish", "dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous",
}  # fmt: skip
"""Functions and methods in which a unit meets no other, by name."""


@dataclass(frozen=True, slots=True)
class Units:
    """The outputs of a layer, and all that has a part for each of them.

    Attributes:
        layer: a linear or convolution layer; a unit is a row of its weight.
        norms: batch norms on the way.
        readers: layers that read them, and how many columns of theirs belong to a unit.
    """

    layer: str
    norms: tuple[str, ...]
    readers: tuple[tuple[str, int], ...]

    def within(self, tree: Mapping[str, Tensor]) -> bool:
        """True when ``tree`` holds the weights that a unit has entries in (frozen ones may be missing)."""
        return all(f"{name}.weight" in tree for name in (self.layer, *(reader for reader, _ in self.readers)))

    def parts(self, tree: Mapping[str, Tensor]) -> list[Tensor]:
        """Views of the unit's entries in each tensor of ``tree`` that has some: [units, entries]."""
        own = [f"{m}.{p}" for m in (self.layer, *self.norms) for p in ("weight", "bias")]
        found = [tree[n].reshape(len(tree[n]), -1) for n in own if n in tree]
        units = len(tree[f"{self.layer}.weight"])
        columns = [tree[f"{reader}.weight"] for reader, _ in self.readers]
        return found + [t.reshape(len(t), units, -1).transpose(0, 1) for t in columns]

    def entries(self, tree: Mapping[str, Tensor]) -> Tensor:
        """All entries of each unit side by side: [units, entries]."""
        return torch.cat([part.flatten(1) for part in self.parts(tree)], dim=1)

    def set_(self, tree: Mapping[str, Tensor], which: Tensor, value: bool) -> None:
        """Write ``value`` to every entry of the units ``which`` (bool [units]); tensors must be contiguous."""
        for part in self.parts(tree):
            part[which] = value


def units_of(model: nn.Module) -> list[Units]:
    """The layers of ``model`` whose outputs can be taken out one by one."""
    try:
        from torch import fx

        nodes = list(fx.Tracer().trace(model).nodes)
    except Exception:  # a user's forward may do anything with what is not a tensor
        return []
    walk = _Walk(model, nodes)
    found = []
    for node in nodes:
        layer = walk.module(node, LAYERS)
        if layer is not None and getattr(layer, "groups", 1) == 1:
            norms: list[str] = []
            readers: list[tuple[str, int]] = []
            if walk.follow(node, layer, False, norms, readers):
                found.append(Units(str(node.target), tuple(norms), tuple(readers)))
    return found


class _Walk:
    """Follows a layer's outputs through a traced graph."""

    def __init__(self, model: nn.Module, nodes: list[Any]) -> None:
        self.modules = dict(model.named_modules())
        self.calls = Counter(node.target for node in nodes if node.op == "call_module")
        self.uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))

    def module(self, node: Any, kinds: tuple[type, ...]) -> Any:
        """The module that a node calls, if it is of exactly such a type, called once, with parameters of its own."""
        found = self.modules.get(node.target) if node.op == "call_module" else None
        if found is None or type(found) not in kinds or self.calls[node.target] > 1:
            return None
        return found if all(self.uses[id(p)] == 1 for p in found.parameters()) else None

    def follow(self, node: Any, layer: Any, flat: bool, norms: list[str], readers: list[tuple[str, int]]) -> bool:
        """Collect all that reads ``node``; False when something reads it that mixes units or cannot do without one.

        ``flat``: channels have been spread over the columns of rows.
        """
        units, images = len(layer.weight), not isinstance(layer, nn.Linear)
        for user in node.users:
            reader = self.module(user, LAYERS)
            if reader is not None:
                columns = reader.weight.shape[1]
                spread = columns // units if images and flat else 1
                fits = getattr(reader, "groups", 1) == 1 and columns == units * spread
                if not fits or isinstance(reader, nn.Linear) == (images and not flat):
                    return False
                readers.append((str(user.target), spread))
            elif self.module(user, NORMS) is not None:
                if flat or self.modules[user.target].num_features != units:
                    return False
                norms.append(str(user.target))
                if not self.follow(user, layer, flat, norms, readers):
                    return False
            else:
                flattens = self._flattens(user)
                if not flattens and not self._along(user, pooling=images and not flat):
                    return False
                if not self.follow(user, layer, flat or flattens, norms, readers):
                    return False
        return bool(node.users)

    def _along(self, node: Any, pooling: bool) -> bool:
        """True for a function of each number alone and, with ``pooling``, of the pixels of each channel."""
        if node.op == "call_module":
            kind = type(self.modules[node.target])
            return kind in EACH or (pooling and kind in POOLING)
        name = _name(node) if node.op in ("call_function", "call_method") else ""
        return name in CALLS or (pooling and "_pool" in name and name[-2:] in ("1d", "2d", "3d"))

    def _flattens(self, node: Any) -> bool:
        """All dimensions but the first become one."""
        if node.op == "call_module":
            found = self.modules[node.target]
            return type(found) is nn.Flatten and (found.start_dim, found.end_dim) == (1, -1)
        given = (*node.args[1:], *node.kwargs.values())
        return node.op in ("call_function", "call_method") and _name(node) == "flatten" and given in ((1,), (1, -1))


def _name(node: Any) -> str:
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))


def remove_units(model: nn.Module, units: Units, keep: Tensor) -> None:
    """Take out all units but those of ``keep`` (bool [units]), with all that belongs to them, in place."""
    layer: Any = model.get_submodule(units.layer)
    norms: list[Any] = [model.get_submodule(name) for name in units.norms]
    for module in (layer, *norms):
        _shrink(module, keep)
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", int(keep.sum()))
    for norm in norms:
        norm.num_features = int(keep.sum())
    for name, columns in units.readers:
        reader: Any = model.get_submodule(name)
        reader.weight = _cut(reader.weight, 1, keep.repeat_interleave(columns))
        setattr(reader, "in_features" if isinstance(reader, nn.Linear) else "in_channels", int(keep.sum()) * columns)


def _shrink(module: nn.Module, keep: Tensor) -> None:
    """Cut every parameter and buffer, each of which has an entry for each unit or is a single number."""
    for name, p in list(module.named_parameters(recurse=False)):
        setattr(module, name, _cut(p, 0, keep))
    for name, t in list(module.named_buffers(recurse=False)):
        if t.dim():
            setattr(module, name, t[keep.to(t.device)])


def _cut(t: Tensor, dim: int, keep: Tensor) -> nn.Parameter:
    where = keep.nonzero().flatten().to(t.device)
    return nn.Parameter(t.detach().index_select(dim, where), requires_grad=t.requires_grad)


@dataclass(frozen=True)
class Narrow(ModelBuilder):
    """Another network with fewer units in some layers: the form in which pruned networks are saved.

    Args:
        network: the network as it was.
        layers: names of layers that are narrower here.
        widths: how many units each of them has; the first ones stay.
    """

    network: ModelBuilder
    layers: tuple[str, ...] = ()
    widths: tuple[Annotated[int, Ge(1)], ...] = ()

    def build(self, info: Info, outputs: int) -> nn.Module:
        model, width = self.network.build(info, outputs), dict(zip(self.layers, self.widths, strict=True))
        for units in units_of(model):
            n = len(dict(model.named_parameters())[f"{units.layer}.weight"])
            remove_units(model, units, torch.arange(n) < width.get(units.layer, n))
        return model


def narrowed(network: ModelBuilder, model: nn.Module) -> Narrow:
    """What builds networks with the shapes of ``model``, one of ``network`` from which units were removed."""
    network = network.architecture
    widths = {u.layer: len(dict(model.named_parameters())[f"{u.layer}.weight"]) for u in units_of(model)}
    return Narrow(network, tuple(widths), tuple(widths.values()))
