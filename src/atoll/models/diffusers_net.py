"""A model of the diffusers library as a network ``net(x, time, cond)``: wrapped, never rewritten.

What a kind of model is called with stands in ``FAMILIES``, so another one is another function.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.core.errors import AtollError, DataError
from atoll.core.files import write_json

Parametrisation = Literal["table", "flow", "edm"]
SCHEDULER = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Layout:
    """How what a text encoder says becomes one tensor of conditions ``[B, rows, width]``: a row for each token, then
    all the rest, filled up with zeros. With a mask there is one more column, 1 for rows that count.

    Args:
        width: numbers per token.
        pooled: numbers that stand for the whole text.
        numbers: further ones, such as sizes and crops.
    """

    width: int
    pooled: int = 0
    numbers: int = 0

    @property
    def rows(self) -> int:
        """Rows after the tokens."""
        return math.ceil((self.pooled + self.numbers) / self.width)

    def pack(
        self, tokens: Tensor, pooled: Tensor | None = None, numbers: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """From tokens ``[B, L, width]``, pooled ``[B, pooled]``, numbers ``[B, numbers]`` and mask ``[B, L]``."""
        rest = [part.float().flatten(1) for part in (pooled, numbers) if part is not None]
        sizes = (tokens.shape[-1], *(part.shape[1] for part in rest))
        wanted = (self.width, *(n for n in (self.pooled, self.numbers) if n))
        if sizes != wanted:
            raise DataError(
                f"This model is told {_sizes(wanted)} numbers (tokens, then what else), not {_sizes(sizes)}."
            )
        out = tokens.float()
        if rest:
            flat = torch.cat(rest, 1)
            flat = F.pad(flat, (0, self.rows * self.width - flat.shape[1]))
            out = torch.cat([out, flat.unflatten(1, (self.rows, self.width))], 1)
        if mask is None:
            return out
        return torch.cat([out, F.pad(mask.float(), (0, self.rows))[..., None]], -1)

    def unpack(self, cond: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """``(tokens, pooled, numbers, mask)``; empty where the model has none."""
        extra = cond.shape[-1] - self.width if cond.dim() == 3 else -1
        if extra not in (0, 1) or cond.shape[1] <= self.rows:
            raise DataError(
                f"This model is told embeddings [B, tokens, {self.width}], and these conditions are "
                f"{list(cond.shape)}; make them with its network's `layout.pack`."
            )
        length = cond.shape[1] - self.rows
        rest = cond[:, length:, : self.width].flatten(1)
        pooled, numbers = rest[:, : self.pooled], rest[:, self.pooled : self.pooled + self.numbers]
        return cond[:, :length, : self.width], pooled, numbers, cond[:, :length, -1] if extra else None


def _sizes(numbers: tuple[int, ...]) -> str:
    return " + ".join(map(str, numbers))


# ------------------------------------------------------------------------------------------- how each is called

Call = Callable[[Any, Mapping[str, Any], Tensor, Tensor, Any], Any]
"""``(model, config, x, time, cond) -> output``; ``cond``: what its family is told."""


def _unet(model: Any, config: Mapping[str, Any], x: Tensor, t: Tensor, label: Any) -> Any:
    return model(x, t, class_labels=label if config.get("num_class_embeds") else None).sample


def _unet_text(model: Any, config: Mapping[str, Any], x: Tensor, t: Tensor, told: Any) -> Any:
    tokens, pooled, numbers, mask = told
    added = {"text_embeds": pooled, "time_ids": numbers} if config.get("addition_embed_type") else None
    return model(x, t, tokens, added_cond_kwargs=added, encoder_attention_mask=mask).sample


def _dit(model: Any, config: Mapping[str, Any], x: Tensor, t: Tensor, label: Any) -> Any:  # noqa: ARG001
    return model(x, t, class_labels=label).sample


def _pixart(model: Any, config: Mapping[str, Any], x: Tensor, t: Tensor, told: Any) -> Any:
    tokens, _, _, mask = told
    asked = config.get("use_additional_conditions")
    if asked is None:
        asked = config.get("sample_size") == 128
    height, width = x.shape[-2:]
    size = x.new_tensor([[8.0 * height, 8.0 * width]]).expand(len(x), -1)  # in pixels, of which a latent has 8 x 8
    shape = x.new_tensor([[height / width]]).expand(len(x), -1)
    added = {"resolution": size if asked else None, "aspect_ratio": shape if asked else None}
    return model(x, tokens, t, added_cond_kwargs=added, encoder_attention_mask=mask).sample


def _sd3(model: Any, config: Mapping[str, Any], x: Tensor, t: Tensor, told: Any) -> Any:  # noqa: ARG001
    tokens, pooled, _, _ = told
    return model(x, tokens, pooled, t).sample


def _sana(model: Any, config: Mapping[str, Any], x: Tensor, t: Tensor, told: Any) -> Any:
    tokens, _, numbers, mask = told
    guidance = numbers[:, 0] if config.get("guidance_embeds") else None
    return model(x, tokens, t, guidance=guidance, encoder_attention_mask=mask).sample


def _tokens_alone(model: Any, config: Mapping[str, Any], x: Tensor, t: Tensor, told: Any) -> Any:  # noqa: ARG001
    return model(hidden_states=x, timestep=t, encoder_hidden_states=told[0]).sample


def _flux(model: Any, config: Mapping[str, Any], x: Tensor, t: Tensor, told: Any) -> Any:
    tokens, pooled, numbers, _ = told
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    y, z = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([torch.zeros_like(y), y, z], -1).flatten(0, 1).to(x)
    guidance = numbers[:, 0] if config.get("guidance_embeds") else None
    out = model(
        F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2), tokens, pooled, t, places, x.new_zeros(tokens.shape[1], 3),
        guidance,
    ).sample  # fmt: skip
    return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (height, width)), 2)


def _unet_layout(config: Mapping[str, Any]) -> Layout:
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    width = max(width) if isinstance(width, list | tuple) else width
    if config.get("addition_embed_type") is None:
        return Layout(width)
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return Layout(width, pooled, 6)


@dataclass(frozen=True)
class Family:
    """What a kind of model is called with.

    Args:
        call: calls it.
        layout: of what it is told about a text; None: it is told a class, or nothing.
        in_one: it counts its time from 0 to 1, whatever its scheduler counts.
        folds: sides of the blocks of pixels that its channels hold.
        only: settings with the values that are supported, where there are others.
    """

    call: Call
    layout: Callable[[Mapping[str, Any]], Layout] | None = None
    in_one: bool = False
    folds: int = 1
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    "UNet2DModel": Family(_unet, only={"class_embed_type": (None,)}),
    "UNet2DConditionModel": Family(
        _unet_text, _unet_layout,
        only={"class_embed_type": (None,), "num_class_embeds": (None,), "addition_embed_type": (None, "text_time"),
              "encoder_hid_dim_type": (None, "text_proj")},
    ),
    "DiTTransformer2DModel": Family(_dit),
    "PixArtTransformer2DModel": Family(_pixart, lambda c: Layout(c["caption_channels"])),
    "SD3Transformer2DModel": Family(_sd3, lambda c: Layout(c["joint_attention_dim"], c["pooled_projection_dim"])),
    "SanaTransformer2DModel": Family(
        _sana, lambda c: Layout(c["caption_channels"], numbers=int(bool(c.get("guidance_embeds")))),
    ),
    "AuraFlowTransformer2DModel": Family(_tokens_alone, lambda c: Layout(c["joint_attention_dim"]), in_one=True),
    "WanTransformer3DModel": Family(_tokens_alone, lambda c: Layout(c["text_dim"]), only={"image_dim": (None,)}),
    "FluxTransformer2DModel": Family(
        _flux,
        lambda c: Layout(c["joint_attention_dim"], c["pooled_projection_dim"], int(bool(c.get("guidance_embeds")))),
        in_one=True, folds=2,
    ),
}  # fmt: skip


class DiffusersNet(nn.Module):
    """``(x [B, C, ...], time [B], cond) -> [B, C, ...]`` around a diffusers model; ``cond`` are classes, or embeddings
    packed by its ``layout``.

    The time is that of its scheduler; where this is a table, it is counted from 1, so that 0 is a clean sample.

    Args:
        model: the diffusers model.
        scheduler: its scheduler's configuration.
        classes: how many classes it was trained to tell. A table with one more has a null class at its end.

    Attributes:
        null: number of the null class, or None.
        wants: what it is told.
    """

    def __init__(self, model: Any, scheduler: Mapping[str, Any], classes: int | None = None) -> None:
        super().__init__()
        self.kind, self.config = type(model).__name__, dict(model.config)
        self.family = family(self.kind, self.config)
        self.model, self.scheduler = model, dict(scheduler)
        self.parametrisation = parametrisation(self.scheduler)
        self.layout = self.family.layout(self.config) if self.family.layout is not None else None
        self.wants: Literal["nothing", "class", "text"] = "text" if self.layout is not None else "class"
        self.classes, self.null = classes, None
        if self.kind == "UNet2DModel":
            self.wants = "class" if self.config.get("num_class_embeds") else "nothing"
            self._classes(self.config.get("num_class_embeds"), classes)
        elif self.kind == "DiTTransformer2DModel":
            self.classes = self.null = int(self.config["num_embeds_ada_norm"])
            for module in model.modules():  # its layers would hide classes at random: that is the caller's business
                if hasattr(module, "dropout_prob"):
                    module.dropout_prob = 0.0

    def _classes(self, table: int | None, classes: int | None) -> None:
        if table is None:
            self.classes = self.null = classes or 1
        elif classes is not None and classes > table:
            raise DataError(f"The model tells {table} classes apart, and there are {classes}; use another checkpoint.")
        else:
            self.classes, self.null = table, None
            if classes == table - 1:
                self.classes = self.null = classes

    @property
    def channels(self) -> int:
        """Of a sample."""
        return int(self.config["in_channels"]) // self.family.folds**2

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        if self.parametrisation == "table":
            t = (t - 1).clamp(min=0)
        if self.family.in_one:
            t = t / int(self.scheduler.get("num_train_timesteps", 1000))
        told: Any = cond
        if self.layout is not None:
            tokens, pooled, numbers, mask = self.layout.unpack(cond)
            told = (tokens.to(dtype), pooled.to(dtype), numbers.to(dtype), mask)
        out: Tensor = self.family.call(self.model, self.config, x.to(dtype), t, told)
        return out[:, : x.shape[1]]  # a learned variance stands in further channels

    def save_pretrained(self, folder: Path | str, **_: Any) -> None:
        """Write model and scheduler as a pipeline of diffusers has them."""
        folder = Path(folder)
        with quiet():
            self.model.save_pretrained(folder / self.part, safe_serialization=True)
        (folder / SCHEDULER).parent.mkdir(exist_ok=True)
        write_json(folder / SCHEDULER, self.scheduler)

    @property
    def part(self) -> str:
        """Its name in a pipeline."""
        return "unet" if self.kind.startswith("UNet") else "transformer"


def family(kind: str, config: Mapping[str, Any]) -> Family:
    """How models of a class are called; raises :class:`DataError` for one that is not supported."""
    if kind not in FAMILIES:
        raise DataError(f"Models of the class {kind} are not supported; these are: {', '.join(FAMILIES)}.")
    found = FAMILIES[kind]
    for name, values in found.only.items():
        if config.get(name) not in values:
            allowed = " or ".join(map(str, values))
            raise DataError(f"A {kind} with `{name}: {config[name]}` is not supported, only with {allowed}.")
    if kind == "PixArtTransformer2DModel" and config.get("caption_channels") is None:
        raise DataError("A PixArtTransformer2DModel without `caption_channels` is told no text and is not supported.")
    return found


def parametrisation(scheduler: Mapping[str, Any]) -> Parametrisation:
    """What a scheduler's configuration says the network was trained as: with a table of noise levels (DDPM and its
    relatives), as a rectified flow, or preconditioned (EDM)."""
    kind = str(scheduler.get("_class_name", ""))
    if kind.startswith("EDM"):
        return "edm"
    flow = kind.startswith("FlowMatch") or scheduler.get("prediction_type") == "flow_prediction"
    return "flow" if flow else "table"


@contextmanager
def quiet() -> Iterator[Any]:
    """The diffusers library, without its reports: what matters in them is checked here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its imports
            import diffusers
            from diffusers.utils import logging
    except ImportError as e:
        raise AtollError("Checkpoints of diffusers need this library: `pip install atoll[diffusion]`.") from e
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield diffusers
    finally:
        logging.set_verbosity(level)
