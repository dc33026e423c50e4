"""What a text encoder said of prompts, from a file: a stage distils models of texts without running an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from atoll.core.errors import DataError
from atoll.models.diffusers_net import DiffusersNet

PARTS = ("tokens", "pooled", "numbers", "mask")
NULL = "null_"


@dataclass(frozen=True)
class Texts:
    """Conditions of a model that is told texts.

    Attributes:
        rows: of prompts ``[N, rows, width]``, packed as the model's layout has them.
        null: of the empty text ``[rows, width]``, which guidance needs; None where the file has none.
    """

    rows: Tensor
    null: Tensor | None


def read_texts(path: Path | str, net: DiffusersNet) -> Texts:
    """Read a safetensors file with ``tokens [N, L, width]`` and what else the model is told (``pooled [N, P]``,
    ``numbers [N, K]``, ``mask [N, L]``); of the empty text the same with ``null_`` before their names and N = 1.

    Raises:
        DataError: when it cannot be read, or does not suit the model.
    """
    if net.layout is None:
        raise DataError(f"A {net.kind} is told no text; leave `texts` out.")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise DataError(f"`{path}` cannot be read as safetensors ({e}).") from e
    unknown = [name for name in tensors if name.removeprefix(NULL) not in PARTS]
    if unknown or "tokens" not in tensors:
        wrong = f"has `{unknown[0]}`" if unknown else "has no `tokens`"
        raise DataError(f"`{path}` {wrong}; its tensors are {', '.join(PARTS)}, and the same after `{NULL}`.")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise DataError(f"`{name}` of `{path}` has values that are not finite numbers.")
    try:
        rows = net.layout.pack(**_parts(tensors, ""))
        empty = _parts(tensors, NULL)
        null = net.layout.pack(**empty)[0] if empty else None
    except (RuntimeError, IndexError, TypeError) as e:
        raise DataError(f"The tensors of `{path}` do not fit each other: {e}") from e
    if null is not None and null.shape != rows.shape[1:]:
        shapes = f"{list(null.shape)} and {list(rows.shape[1:])}"
        raise DataError(f"The empty text of `{path}` has another shape than its prompts ({shapes}); pad it alike.")
    return Texts(rows, null)


def _parts(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {part: tensors[prefix + part] for part in PARTS if prefix + part in tensors}
