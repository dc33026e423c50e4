"""Models as folders that their own ecosystem loads, without Atoll.

``transformers``, ``diffusers`` and ``peft`` models are saved by their own ``save_pretrained``. Any other module becomes
``model.safetensors`` (plain names and tensors) and ``model.json`` (what built it, and how to load it).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atoll.core.build import Reader, describe
from atoll.core.errors import DataError
from atoll.core.files import write_json
from atoll.data.dataset import Info
from atoll.models.diffusers_folder import holds_diffusers
from atoll.models.diffusers_net import DiffusersNet
from atoll.models.model import ModelBuilder, Wrapper, build_model
from atoll.models.weights import load_weights, read_weights, write_weights

LOAD = [
    "from safetensors.torch import load_model",
    "model = ...  # a module with these tensor names: `builder` says which one this was",
    "load_model(model, 'model.safetensors')",
]
WEIGHTS, ABOUT = "model.safetensors", "model.json"


def about_model(
    network: ModelBuilder, info: Info, outputs: int, seed: int, wrapper: Wrapper | None = None
) -> dict[str, Any]:
    """What :func:`load_model` needs to build a model again: its builder, the data's description, the seed, and what
    its task puts around it."""
    data = {name: _plain(getattr(info, name)) for name in Info.__dataclass_fields__}
    about = {"builder": describe(network), "data": data, "outputs": outputs, "seed": seed}
    return about if wrapper is None else {**about, "wrapper": describe(wrapper)}


def save_model(model: nn.Module, folder: Path | str, info: Mapping[str, Any]) -> None:
    """Write ``model`` to ``folder``, which is made.

    Args:
        info: facts to keep in ``model.json``; those of :func:`about_model` let :func:`load_model` work alone.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    body = getattr(model, "net", model) if info.get("wrapper") and not hasattr(model, "peft_config") else model
    own: Any = getattr(body, "save_pretrained", None)
    if own is not None:
        own(folder, safe_serialization=True)
        how = {"load": [_how(body)]}
    else:
        write_weights(folder / WEIGHTS, model)
        how = {"load": LOAD}
    kind = type(model)
    write_json(folder / ABOUT, {**info, **how, "class": f"{kind.__module__}.{kind.__qualname__}"})


def load_model(folder: Path | str, base: nn.Module | None = None) -> nn.Module:
    """The model in ``folder``, in evaluation mode.

    Args:
        base: for an adapter: the model that it adapts (default: built again from ``model.json``).

    Raises:
        DataError: when the folder holds no model, or not enough to build it.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        adapted = base if base is not None else build_described(_about(folder), str(folder / ABOUT))
        model: nn.Module = PeftModel.from_pretrained(adapted, folder)
    elif holds_diffusers(folder):
        about = _about(folder)
        read = about["builder"] if about["builder"].get("name") == "diffusers_folder" else {"name": "diffusers_folder"}
        model = build_described(
            {**about, "builder": {**read, "path": str(folder), "weights": True}}, str(folder / ABOUT)
        )
    elif (folder / "config.json").exists():
        model = _transformers(folder)
    else:
        model = base if base is not None else build_described(_about(folder), str(folder / ABOUT), fresh=True)
        load_weights(model, read_weights(folder), str(folder))
    return model.eval()


def _about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"`{folder}` holds no readable {ABOUT}. Give the folder of a saved model.") from e
    if not isinstance(about, dict) or not {"builder", "data", "outputs", "seed"} <= about.keys():
        raise DataError(f"{folder / ABOUT} does not say what built the model. Pass the module as `base`.")
    return about


def build_described(about: Mapping[str, Any], where: str, fresh: bool = False) -> nn.Module:
    """The module that facts of :func:`about_model` describe. ``fresh``: its weights will be replaced, so read none."""
    reader = Reader()
    network = reader.read(ModelBuilder, about["builder"], "builder")
    wrapper = reader.read(Wrapper, about["wrapper"], "wrapper") if about.get("wrapper") else None
    if reader.problems:
        raise DataError(f"{where}: {'; '.join(reader.problems)}.")
    if fresh:
        network = network.architecture
    data = about["data"]
    lists: dict[str, Any] = {name: tuple(data[name]) for name in ("shape", "class_names", "feature_names")}
    lists |= {
        mapping: {name: tuple(values) for name, values in data.get(mapping, {}).items()}
        for mapping in ("names", "categories")
    }
    numbers = {name: _tensor(data[name]) for name in ("mean", "scale")}
    outputs = int(about["outputs"])
    model = build_model(network, Info(**{**data, **lists, **numbers}), outputs, int(about["seed"]))
    return model if wrapper is None else wrapper(model, outputs)


def _transformers(folder: Path) -> nn.Module:
    import transformers

    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    kind = getattr(transformers, str(names[0]), None)
    if kind is None:
        raise DataError(f"The installed transformers library has no `{names[0]}`, which {folder} needs.")
    model: nn.Module = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    return model


def _how(model: nn.Module) -> str:
    kind = type(model)
    if hasattr(model, "peft_config"):
        return "peft.PeftModel.from_pretrained(base_model, folder)"
    if isinstance(model, DiffusersNet):
        return f"diffusers.{model.kind}.from_pretrained(folder, subfolder={model.part!r})"
    return f"transformers.{kind.__name__}.from_pretrained(folder)"


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else describe(value)


def _tensor(value: Any) -> Any:
    return torch.tensor(value) if isinstance(value, list) else value
