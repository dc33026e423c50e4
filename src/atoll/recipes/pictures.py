"""Samples that a run keeps to be looked at, and the figures that a page makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from atoll.core.errors import AtollError
from atoll.core.files import write_atomic
from atoll.core.message import NO_LIMITS, Message, decode, encode, seal, unseal
from atoll.data.dataset import Info
from atoll.diffusion.evaluate import as_pixels
from atoll.recipes.page import figure
from atoll.recipes.png import grid, picture

NAME = "samples.safetensors"
WIDE = 420
"""Pixels of a page that a row of samples fills, about."""


def keep_samples(folder: Path, info: Info, sigma_data: float, ways: Sequence[tuple[str, Tensor]]) -> None:
    """Write samples ``[N, C, H, W]`` under their titles, with what turns them into pixels."""
    look = {k: torch.as_tensor(getattr(info, k), dtype=torch.float32) for k in ("mean", "scale")}
    samples = {str(i): x.detach().float().cpu().contiguous() for i, (_, x) in enumerate(ways)}
    facts = {"titles": [title for title, _ in ways], "sigma_data": sigma_data}
    write_atomic(folder / "state" / NAME, encode(seal(Message("samples", {"x": samples, "look": look}, facts))))


def sample_figures(folder: Path) -> list[str]:
    """A figure per kept set of samples, ten to a row at most; none where nothing readable was kept."""
    try:
        message = unseal(decode((folder / "state" / NAME).read_bytes(), NO_LIMITS))
        look, out = message.parts["look"], []
        for i, title in enumerate(message.facts["titles"]):
            x = message.parts["x"][str(i)]
            if x.dim() != 4 or x.shape[1] not in (1, 3):
                continue
            pixels = as_pixels(x, look["mean"], look["scale"], float(message.facts["sigma_data"]))
            columns = min(10, len(pixels))
            scale = max(1, round(WIDE / columns / pixels.shape[2]))
            out.append(figure(str(title), picture(grid(pixels, columns), str(title), scale), "grid"))
        return out
    except (OSError, AtollError, KeyError, TypeError, ValueError):
        return []


def gallery(figures: Sequence[str], lead: str) -> str:
    if not figures:
        return ""
    return f'<h2>Samples</h2>\n<p class="lead">{lead}</p>\n<div class="grids">{"".join(figures)}</div>'
