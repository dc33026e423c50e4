"""Further numbers for a network that was built without: a second time, a number of steps, a guidance scale.

A small branch turns the numbers into a vector that is added to what some module returns, by default to the embedding
of the time, whence it reaches every block. The branch ends in zeros, so a copy of a teacher still is the teacher; and
without numbers the network is what it was. So any network can learn what nets built for numbers (``UNet(numbers=2)``)
can be told from the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser, tapped
from atoll.diffusion.distiller import Work
from atoll.models.unet import TimeAndClass

TIME_CLASSES = ("TimeAndClass", "TimestepEmbedding", "TimestepEmbedder")
"""Classes of modules that embed a time: ours, those of diffusers, those of the DiT family."""
TIME_NAMES = ("time_embedding", "time_embed", "time_embedder", "timestep_embedder", "time_mlp", "t_embedder")
"""What such a module is called elsewhere."""


def time_embedders(net: nn.Module) -> tuple[str, ...]:
    """Names of the modules that embed the time: by their class, else by their name; none within another."""
    modules = dict(net.named_modules())
    for found in (
        [n for n, m in modules.items() if type(m).__name__ in TIME_CLASSES],
        [n for n in modules if n.rpartition(".")[2] in TIME_NAMES],
    ):
        outer = [n for n in found if not any(n.startswith(f"{o}.") for o in found)]
        if outer:
            return tuple(outer)
    return ()


class Numbered(nn.Module):
    """A network ``(x, time, cond)`` that takes ``numbers [B, n]`` as well.

    Args:
        net: the network.
        count: how many numbers a sample has.
        at: names of the modules to whose outputs (or first outputs) the branch is added: ``[B, C]``, ``[B, T, C]`` or
            ``[B, C, ...]`` with two or more trailing dimensions.
        width: their C.
    """

    def __init__(self, net: nn.Module, count: int, at: Sequence[str], width: int, waves: int = 16) -> None:
        super().__init__()
        self.net, self.count, self.at = net, count, tuple(at)
        self.taps = tuple(f"net.{name}" for name in getattr(net, "taps", ()))
        self.frequencies: Tensor
        self.register_buffer("frequencies", 2.0 ** torch.linspace(-2, 4, waves), persistent=False)
        self.branch = nn.Sequential(nn.Linear(2 * waves * count, width), nn.SiLU(), nn.Linear(width, width))
        for p in self.branch[-1].parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, numbers: Tensor | None = None, **more: Any) -> Tensor:
        out: Tensor
        if numbers is None:
            out = self.net(x, t, cond, **more)
            return out
        if numbers.shape != (len(x), self.count):
            raise AtollError(
                f"The network takes {self.count} further number(s) a sample; got {list(numbers.shape)} for {len(x)} "
                "samples."
            )
        angles = numbers.to(self.frequencies)[..., None] * self.frequencies
        with self._added(self.branch(torch.cat([angles.cos(), angles.sin()], -1).flatten(1))):
            out = self.net(x, t, cond, **more)
        return out

    @contextmanager
    def _added(self, vector: Tensor) -> Iterator[None]:
        def hook(_: nn.Module, __: Any, out: Any) -> Any:
            first = out[0] if isinstance(out, tuple) else out
            shape = (len(vector), 1, -1) if first.dim() == 3 else (len(vector), -1, *[1] * (first.dim() - 2))
            first = first + vector.to(first.dtype).reshape(shape)
            return (first, *out[1:]) if isinstance(out, tuple) else first

        modules = dict(self.net.named_modules())
        hooks = [modules[name].register_forward_hook(hook) for name in self.at]
        try:
            yield
        finally:
            for h in hooks:
                h.remove()


def takes_numbers(net: nn.Module, count: int) -> bool:
    """Whether a network takes that many numbers already."""
    for m in net.modules():
        if isinstance(m, Numbered) and m.count == count:
            return True
        if isinstance(m, TimeAndClass) and m.numbers is not None:
            return bool(m.numbers[0].in_features == count * 2 * len(m.frequencies))
    return False


def with_numbers(denoiser: Denoiser, count: int, work: Work, at: Sequence[str] = ()) -> Denoiser:
    """``denoiser``, changed to take ``numbers=[B, count]``; as it is when its network takes them already.

    Args:
        denoiser: a copy that is about to be trained.
        count: how many numbers a sample has.
        work: shape and conditions of one sample, to see what the modules return.
        at: modules of the network to add them to; empty takes those that embed the time.

    Raises:
        AtollError: when no module is named and none is found, or they differ in width.
    """
    if takes_numbers(denoiser.net, count):
        return denoiser
    at = tuple(at) or time_embedders(denoiser.net)
    if not at:
        raise AtollError(
            "No module of the network seems to embed the time, so there is nowhere to add further numbers; name one, "
            f"such as `{next((n for n, _ in denoiser.net.named_children()), 'net')}`."
        )
    device = next((p.device for p in denoiser.parameters()), torch.device(work.device))
    x, t = torch.zeros(1, *work.shape, device=device), denoiser.schedule.time(torch.ones(1, device=device))
    with torch.no_grad(), tapped(denoiser, [f"net.{name}" for name in at]) as outputs:
        denoiser(x, t, work.conditions.rows[:1].to(device))
    widths = {f.shape[2] if f.dim() == 3 else f.shape[1] for f in outputs.values()}
    if len(widths) != 1:
        raise AtollError(f"Numbers are added to modules of one width; {', '.join(at)} have {sorted(widths)}.")
    denoiser.net = Numbered(denoiser.net, count, at, widths.pop()).to(device)
    return denoiser
