"""A checkpoint folder of the diffusers library in place of one of our networks.

Nothing is downloaded, unpickled or executed: weights come from safetensors, code from the installed library.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from atoll.core.errors import DataError, first_line
from atoll.data.dataset import Info
from atoll.models.diffusers_net import SCHEDULER, DiffusersNet, family, quiet
from atoll.models.model import ModelBuilder

CONFIG = "config.json"
LEGACY = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
"""What became of ``Transformer2DModel``, by its ``norm_type``."""


@dataclass(frozen=True)
class Parts:
    """Where a checkpoint's model is, and the configurations of model and scheduler."""

    folder: Path
    config: dict[str, Any]
    scheduler: dict[str, Any]


def parts_of(path: Path | str) -> Parts:
    """The parts of a pipeline's folder, or of a model's own with its scheduler in or beside it.

    Raises:
        DataError: when it holds no such thing.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"There is no folder `{path}`. Give that of a checkpoint in the format of diffusers.")
    found = next((f for f in (root / "transformer", root / "unet", root) if (f / CONFIG).exists()), None)
    config = _read(found / CONFIG) if found is not None else {}
    if found is None or "_class_name" not in config:
        raise DataError(
            f"`{path}` holds no diffusers model: neither `transformer/config.json` nor `unet/config.json`, nor one of "
            "its own. Save the model with `save_pretrained`."
        )
    schedulers = (root / SCHEDULER, root / "scheduler_config.json", root.parent / SCHEDULER)
    scheduler = next((p for p in schedulers if p.exists()), None)
    if scheduler is None:
        raise DataError(
            f"`{path}` holds no `{SCHEDULER}`, which says at which noise levels the model was trained; give the folder "
            "of the whole pipeline."
        )
    return Parts(found, config, _read(scheduler))


def holds_diffusers(folder: Path) -> bool:
    """True for a folder that :meth:`DiffusersNet.save_pretrained` may have made."""
    return (folder / SCHEDULER).exists()


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{path} is not readable JSON; save the checkpoint again.") from e
    if not isinstance(value, dict):
        raise DataError(f"{path} is no configuration: a mapping is expected.")
    return value


@dataclass(frozen=True, kw_only=True)
class DiffusersFolder(ModelBuilder):
    """A diffusers checkpoint: a U-Net, DiT, PixArt, SD3, ... with the schedule that it was trained under.

    Args:
        path: folder of a pipeline (with ``transformer/`` or ``unet/``, and ``scheduler/``), or of the model alone with
            its scheduler beside it.
        dtype: type of the parameters.
        checkpointing: compute activations again on the way back: less memory, more time.
        weights: read them; False draws random ones for the same architecture.
    """

    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    checkpointing: bool = False
    weights: bool = True
    denoises: ClassVar[bool | None] = True

    @property
    def architecture(self) -> ModelBuilder:
        return dataclasses.replace(self, weights=False)

    def build(self, info: Info, outputs: int) -> nn.Module:
        net = self.net(outputs)
        if not info.shape or info.shape[0] != net.channels:
            rows = " x ".join(map(str, info.shape))
            raise DataError(
                f"`{self.path}` makes samples of {net.channels} channels; a row of `{info.name}` is {rows}."
            )
        if net.wants == "class" and outputs > (net.classes or 0):
            raise DataError(f"`{self.path}` tells {net.classes} classes apart, and `{info.name}` has {outputs}.")
        return net

    def net(self, classes: int | None = None) -> DiffusersNet:
        """The network, for as many classes as it was trained to tell (see :class:`DiffusersNet`)."""
        parts = parts_of(self.path)
        kind = str(parts.config["_class_name"])
        kind = LEGACY.get(str(parts.config.get("norm_type")), kind) if kind == "Transformer2DModel" else kind
        family(kind, parts.config)
        if self.weights and not any(parts.folder.glob("*.safetensors")):
            raise DataError(
                f"`{parts.folder}` holds no .safetensors file, and pickled weights are not read because they can run "
                "code. If you trust its origin, load it and call `save_pretrained` to convert it."
            )
        with quiet() as diffusers:
            cls = getattr(diffusers, kind)
            try:
                model = self._load(cls, parts.folder) if self.weights else cls.from_config(parts.config).to(self._type)
            except DataError:
                raise
            except Exception as e:  # the library raises a dozen types for a bad folder
                raise DataError(f"`{self.path}` cannot be loaded as {kind}: {first_line(e)}") from e
            if self.checkpointing:
                model.enable_gradient_checkpointing()
        return DiffusersNet(model, parts.scheduler, classes)

    @property
    def _type(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    def _load(self, cls: Any, folder: Path) -> Any:
        model, report = cls.from_pretrained(
            str(folder),  # peft writes it into a model card, where a `Path` would be a Python object
            use_safetensors=True, local_files_only=True, output_loading_info=True, torch_dtype=self._type,
        )  # fmt: skip
        lost = sorted(report["missing_keys"])
        if lost:  # the library would go on with random numbers in these places
            raise DataError(f"`{self.path}` lacks {len(lost)} tensors of its {cls.__name__}, such as `{lost[0]}`.")
        return model
