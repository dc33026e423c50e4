"""Layers whose scale and shift come from secret tensors, passports (Gu et al., 2024, arXiv 2406.01085).

After a layer W and a normalisation without parameters, y = gamma * x + beta with gamma = D(E(Avg(W s_gamma))) and
beta = D(E(Avg(W s_beta))): E and D are linear with LeakyReLU between, Avg is the mean over space, and the passports s
have the shape of W's input. Who lacks them has all weights and still not the function.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.data.dataset import Info
from atoll.models.model import ModelBuilder

SECRET = ("scale_passports", "shift_passports")
STATISTICS = ("running_mean", "running_var")
MOMENTUM, EPS = 0.1, 1e-5


class Passport(nn.Module):
    """A layer with its passports: in training one of them is drawn for each forward pass; in evaluation their gammas
    and betas are averaged, so that nothing is random.

    Passports are zero until somebody draws them.

    Args:
        layer: ``Linear`` on rows, or a convolution.
        shape: of one input of it.
        count: passports of each kind.
    """

    scale_passports: Tensor
    shift_passports: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layer: nn.Module, shape: tuple[int, ...], count: int) -> None:
        super().__init__()
        channels = len(layer.get_parameter("weight"))
        self.layer = layer
        self.encode = nn.Linear(channels, max(1, channels // 4))
        self.decode = nn.Linear(max(1, channels // 4), channels)
        for name in SECRET:
            self.register_buffer(name, torch.zeros(count, *shape))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def scale_and_shift(self, which: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """gamma and beta ``[C]`` of passport ``which`` (``[1]``), or the mean over all."""
        both = [s if which is None else s[which] for s in (self.scale_passports, self.shift_passports)]
        seen = self.layer(torch.cat(both)).flatten(2).mean(2) if both[0].dim() > 2 else self.layer(torch.cat(both))
        gamma, beta = self.decode(F.leaky_relu(self.encode(seen))).chunk(2)
        return gamma.mean(0), beta.mean(0)

    def forward(self, x: Tensor) -> Tensor:
        which = torch.randint(len(self.scale_passports), (1,), device=x.device) if self.training else None
        gamma, beta = self.scale_and_shift(which)
        h = self.layer(x)
        batch = self.training and h[:, 0].numel() > 1  # a single number has no variance
        h = F.batch_norm(h, self.running_mean, self.running_var, None, None, batch, MOMENTUM, EPS)
        return h * _over_space(gamma, h) + _over_space(beta, h)


def _over_space(c: Tensor, like: Tensor) -> Tensor:
    return c.view(-1, *[1] * (like.dim() - 2))


def passports(model: nn.Module) -> Iterator[tuple[str, Passport]]:
    """The guarded layers by name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Passport))


def insert_passports(model: nn.Module, example: Tensor, layers: int, count: int) -> tuple[str, ...]:
    """Guard the first layers that an input meets, in place; returns their names.

    Args:
        example: an input ``[1, ...]``; its values do not matter.
        layers: how many linear and convolutional layers; the last one of a model is never guarded.

    Raises:
        AtollError: there are not so many, or one of them is none that can be guarded.
    """
    seen: dict[str, tuple[int, ...]] = {}
    found = [(m, n) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    names: dict[nn.Module, str] = dict(found)

    def note(layer: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
        seen.setdefault(names[layer], tuple(args[0].shape[1:]))

    hooks = [layer.register_forward_hook(note) for layer in names]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    bottom = list(seen)[:-1][:layers]
    if len(bottom) < layers:
        raise AtollError(
            f"Passports guard {layers} layers before a network's last one, and this network has {len(seen)} linear or "
            f"convolutional layers in all. Use a deeper network{', or lower `layers`' if layers > 1 else ''}."
        )
    for name in bottom:
        layer, shape = model.get_submodule(name), seen[name]
        if isinstance(layer, nn.Linear) and len(shape) != 1:
            raise AtollError(
                f"Layer `{name}` sees a sequence of {shape[0]} vectors; passports guard convolutions and linear layers "
                "that see one vector a row. Use another network."
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Passport(layer, shape, count))
    return tuple(bottom)


def without_passports(model: nn.Module) -> nn.Module:
    """A copy that computes the same in evaluation: each guarded layer, and a batch norm with its gamma and beta."""
    model = copy.deepcopy(model)
    for name, guarded in list(passports(model)):
        parent, _, child = name.rpartition(".")
        with torch.no_grad():
            gamma, beta = guarded.scale_and_shift()
        setattr(model.get_submodule(parent), child, _with_norm(guarded.layer, gamma, beta, guarded))
    return model


def _with_norm(layer: Any, gamma: Tensor, beta: Tensor, statistics: Any) -> nn.Sequential:
    kinds = {nn.Linear: nn.BatchNorm1d, nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d}
    norm: Any = next(kind for t, kind in kinds.items() if isinstance(layer, t))(len(gamma), EPS, MOMENTUM)
    norm.load_state_dict(
        {"weight": gamma, "bias": beta, "num_batches_tracked": torch.tensor(0)}
        | {name: getattr(statistics, name) for name in STATISTICS}
    )
    return nn.Sequential(layer, norm)


@dataclass(frozen=True)
class Passported(ModelBuilder):
    """Another network whose first layers are each followed by a batch norm: how FedAdOb's models are saved.

    Args:
        network: whose layers these are.
        layers: how many.
    """

    network: ModelBuilder
    layers: Annotated[int, Ge(1)] = 1

    def build(self, info: Info, outputs: int) -> nn.Module:
        model = self.network.build(info, outputs)
        insert_passports(model, example_of(info), self.layers, 1)
        return without_passports(model)


def example_of(info: Info) -> Tensor:
    """An input of zeros ``[1, *info.shape]``."""
    return torch.zeros(1, *info.shape, dtype=torch.int64 if info.kind == "text" else torch.float32)
