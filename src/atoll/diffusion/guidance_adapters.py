"""Small networks beside a frozen one, which tell its blocks the guidance scale, the time and the condition.

The blocks are reached by hooks for the length of a call, so the base keeps its class, its names and its weights: taking
the adapters off is to use it as it was, and a sibling of it takes the same adapters.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.core.errors import AtollError, MessageError
from atoll.diffusion.denoiser import Denoiser, tapped
from atoll.diffusion.distiller import Work


@dataclass(frozen=True)
class Shape:
    """All that adapters need to know of the model that they are for.

    Attributes:
        blocks: paths of the adapted modules.
        widths: channels that each of them returns.
        hidden: width of the adapters.
        classes: how many there are; None: the condition is embeddings of ``embedding`` numbers.
        embedding: see above.
        time_scale: what the network's times have been multiplied with.
    """

    blocks: tuple[str, ...]
    widths: tuple[int, ...]
    hidden: int
    classes: int | None
    embedding: int
    time_scale: float


class Waves(nn.Module):
    """A number ``[B]`` as sines and cosines, of frequencies that tell guidance scales and times apart."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", 2.0 ** torch.linspace(-3, 4, hidden // 2), persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        angles = value.float()[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], 1)


class Offset(nn.Module):
    """One vector for all places, by two layers from the context. Its output starts at zero. A group norm right behind
    the block takes what all channels of a group have in common away again, so groups must not be single channels."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(hidden, hidden), nn.Linear(hidden, width)
        _zero(self.outward)

    def forward(self, places: Tensor, context: Tensor) -> Tensor:
        out: Tensor = self.outward(F.silu(self.inward(F.silu(context.sum(1)))))
        return out[:, None]


class CrossAttention(nn.Module):
    """Every place looks at scale, time and the prompt's embeddings, with one head. Its output starts at zero."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (
            nn.Linear(width, hidden),
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, hidden),
        )
        self.outward = nn.Linear(hidden, width)
        _zero(self.outward)

    def forward(self, places: Tensor, context: Tensor) -> Tensor:
        q = self.query(self.norm(places.to(context.dtype)))
        out: Tensor = self.outward(F.scaled_dot_product_attention(q, self.key(context), self.value(context)))
        return out


class GuidanceAdapters(nn.Module):
    """An adapter for each block, and what they share: the context, from scale, time and condition.

    Classes give an *offset* each block adds to all its places, embeddings are looked at by *cross-attention*.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, h = shape, shape.hidden
        kind = Offset if shape.classes is not None else CrossAttention
        self.waves = Waves(h)
        self.scale = nn.Sequential(nn.Linear(h, h), nn.SiLU(), nn.Linear(h, h), nn.LayerNorm(h))
        self.time = nn.Linear(h, h)
        self.cond = nn.Embedding(shape.classes + 1, h) if shape.classes is not None else nn.Linear(shape.embedding, h)
        self.blocks = nn.ModuleList(kind(width, h) for width in shape.widths)

    def context(self, w: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """``[B, 2 + L, hidden]``: scale, time, and a class (L = 1) or embeddings ``[B, L, E]`` or ``[B, E]``."""
        c = self.cond(cond if self.shape.classes is not None else cond.float())
        parts = [self.scale(self.waves(w))[:, None], self.time(self.waves(t / self.shape.time_scale))[:, None]]
        return torch.cat([*parts, c.reshape(len(c), -1, self.shape.hidden)], 1)

    @contextmanager
    def on(self, net: nn.Module, w: Tensor, t: Tensor, cond: Tensor) -> Iterator[None]:
        """Inside, the blocks of ``net`` return what they say plus what their adapters say of it."""
        modules, context = dict(net.named_modules()), self.context(w, t, cond)
        absent = [name for name in self.shape.blocks if name not in modules]
        if absent:
            raise AtollError(
                f"The adapters are for a network with a block `{absent[0]}`, which this one does not have."
            )
        hooks = [
            modules[name].register_forward_hook(_adding(block, context))
            for name, block in zip(self.shape.blocks, self.blocks, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _adding(adapter: nn.Module, context: Tensor) -> Any:
    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (add(out[0]), *out[1:])
        return add(out)

    def add(out: Tensor) -> Tensor:
        places = out.flatten(2).transpose(1, 2) if out.dim() > 3 else out.reshape(len(out), -1, out.shape[-1])
        more: Tensor = adapter(places, context).to(out.dtype).expand_as(places)
        return out + (more.transpose(1, 2) if out.dim() > 3 else more).reshape(out.shape)

    return hook


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class AdaptedNet(nn.Module):
    """A network that can be told a guidance scale: ``(x, time, cond, w=[B])``. Without ``w`` it is the base."""

    def __init__(self, base: nn.Module, adapters: GuidanceAdapters) -> None:
        super().__init__()
        self.base, self.adapters = base, adapters

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, w: Tensor | None = None, **more: Any) -> Tensor:
        if w is None:
            return self.base(x, t, cond, **more)  # type: ignore[no-any-return]
        with self.adapters.on(self.base, w.expand(len(x)), t, cond):
            return self.base(x, t, cond, **more)  # type: ignore[no-any-return]


class AtScale(nn.Module):
    """A denoiser with adapters, asked at one guidance scale: a plain conditional model for any sampler."""

    def __init__(self, inner: Denoiser, scale: float) -> None:
        super().__init__()
        self.inner, self.schedule, self.scale = inner, inner.schedule, scale

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor, **more: Any) -> Tensor:
        w = torch.full((len(x_t),), self.scale, device=x_t.device)
        out: Tensor = self.inner(x_t, t, cond, w=w, **more)
        return out


# ------------------------------------------------------------------------------------------- on and off


def blocks_of(net: nn.Module, blocks: Sequence[str] = ()) -> tuple[str, ...]:
    """Paths of the modules to adapt: those given; else attention blocks; else, without any, residual blocks.

    Raises:
        AtollError: when there are none, or one that is given is missing.
    """
    modules = {name: m for name, m in net.named_modules() if name}
    absent = [name for name in blocks if name not in modules]
    if not absent and blocks:
        return tuple(blocks)
    if not absent:
        for ending in ("Attention", "ResBlock", "ResnetBlock2D"):
            found = [name for name, m in modules.items() if type(m).__name__.endswith(ending)]
            found = [n for n in found if not any(n.startswith(f"{outer}.") for outer in found)]
            if found:
                return tuple(found)
    what = f"has no block `{absent[0]}`" if absent else "has neither attention nor residual blocks"
    raise AtollError(f"The network {what}; name some in `blocks`. Its modules are: {', '.join(list(modules)[:12])}.")


def make_adapters(denoiser: Denoiser, work: Work, blocks: Sequence[str] = (), hidden: int = 32) -> GuidanceAdapters:
    """Fresh adapters that fit a model; the widths of its blocks are found by asking it once."""
    paths, device = blocks_of(denoiser.net, blocks), work.device
    cond = work.conditions.rows[:1].to(device)
    with torch.no_grad(), tapped(denoiser.net, paths) as found:
        denoiser(torch.zeros(1, *work.shape, device=device), denoiser.schedule.time(torch.ones(1, device=device)), cond)
    widths = tuple(f.shape[1] if f.dim() > 3 else f.shape[-1] for f in (found[path] for path in paths))
    embedding = 0 if denoiser.classes is not None else cond.shape[-1]
    scale = 1.0 if denoiser.predicts == "edm" else denoiser.time_scale  # EDM's time is ln(sigma) / 4 in any case
    return GuidanceAdapters(Shape(paths, widths, hidden, denoiser.classes, embedding, scale))


def attach(denoiser: Denoiser, adapters: GuidanceAdapters) -> Denoiser:
    """The same model with adapters, sharing both; ask it with ``w=`` a guidance scale ``[B]``."""
    if isinstance(denoiser.net, AdaptedNet):
        raise AtollError("This model has guidance adapters already; detach them first.")
    out = copy.copy(denoiser)
    out._modules = dict(denoiser._modules)  # a shallow copy shares its parts, and must not share the list of them
    out.net = AdaptedNet(denoiser.net, adapters)
    return out


def detach(denoiser: Denoiser) -> tuple[Denoiser, GuidanceAdapters]:
    """The model without its adapters, and these."""
    if not isinstance(denoiser.net, AdaptedNet):
        raise AtollError("This model has no guidance adapters to detach.")
    out = copy.copy(denoiser)
    out._modules = {**denoiser._modules, "net": denoiser.net.base}
    return out, denoiser.net.adapters


def save_adapters(adapters: GuidanceAdapters, path: Path) -> None:
    """Write them to a safetensors file that says what they are for."""
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous() for name, t in adapters.state_dict().items()}
    save_file(tensors, path, {"guidance_adapters": json.dumps(asdict(adapters.shape))})


def load_adapters(path: Path) -> GuidanceAdapters:
    """Read what :func:`save_adapters` wrote. Raises :class:`MessageError` for another file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as f:
            said: dict[str, Any] = json.loads(f.metadata()["guidance_adapters"])
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  it is not a mapping
        said["blocks"], said["widths"] = tuple(said["blocks"]), tuple(said["widths"])
        made = GuidanceAdapters(Shape(**said))
        made.load_state_dict(tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as e:
        raise MessageError(f"{path} holds no guidance adapters ({e}).") from e
    return made
