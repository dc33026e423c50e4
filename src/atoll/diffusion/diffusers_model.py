"""Checkpoints of the diffusers library as denoisers, LoRA on them, and back into its own format.

The network is wrapped, never rewritten (``models/diffusers_net.py``). What its scheduler says becomes a
:class:`NoiseSchedule`: a table of steps (DDPM, DDIM, Euler, DPM-Solver, ...) :class:`DiscreteVP`, rectified flow
:class:`RF`, EDM's own :class:`EDM`. How its scheduler would sample does not matter here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atoll.adapters.lora import adapt
from atoll.core.errors import AtollError, DataError, first_line
from atoll.diffusion.denoiser import Denoiser, Predicts
from atoll.diffusion.discrete_vp import DiscreteVP
from atoll.diffusion.schedules import EDM, RF
from atoll.models.diffusers_folder import DiffusersFolder
from atoll.models.diffusers_net import DiffusersNet, quiet
from atoll.models.export import ABOUT, load_model
from atoll.models.model import seeded

PREDICTS: Mapping[str, Predicts] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def load_denoiser(
    folder: Path | str, *, classes: int | None = None, null: Tensor | None = None, sigma_data: float = 0.5,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32", checkpointing: bool = False,
) -> Denoiser:  # fmt: skip
    """A denoiser from local files: a checkpoint of diffusers, or a model that Atoll has saved.

    Args:
        folder: of a pipeline, or of its model with the scheduler beside it.
        classes: how many the model was trained to tell; a U-Net whose table has one more takes the last one for the
            null class. (A DiT knows.)
        null: condition of an empty text ``[rows, width]``, packed as the others; guidance needs it.
        sigma_data: standard deviation of the samples: 0.5 for pixels from -1 to 1, about 1 for scaled latents.
        dtype: type of the parameters.
        checkpointing: compute activations again on the way back: less memory, more time.

    Raises:
        DataError: when the folder holds nothing of the kind, or something that is not supported.
    """
    if (Path(folder) / ABOUT).exists():
        made = load_model(folder)
        if not isinstance(made, Denoiser):
            raise DataError(f"`{folder}` holds a {type(made).__name__}, which is no denoiser.")
        return made
    if (Path(folder) / "adapter_config.json").exists():
        raise DataError(
            f"`{folder}` holds an adapter alone; give a whole model, such as the adapter merged into its own."
        )
    builder = DiffusersFolder(path=str(folder), dtype=dtype, checkpointing=checkpointing)
    return denoiser_of(builder.net(classes), sigma_data, null)


def from_diffusers(
    model: Any, scheduler: Any, *, classes: int | None = None, null: Tensor | None = None, sigma_data: float = 0.5
) -> Denoiser:
    """The same around a diffusers model in memory; ``scheduler``: a scheduler, or its configuration."""
    config = scheduler if isinstance(scheduler, Mapping) else json.loads(scheduler.to_json_string())
    return denoiser_of(DiffusersNet(model, config, classes), sigma_data, null)


def denoiser_of(net: DiffusersNet, sigma_data: float = 0.5, null: Tensor | None = None) -> Denoiser:
    """The network under the schedule that its scheduler describes."""
    config, steps = net.scheduler, float(net.scheduler.get("num_train_timesteps", 1000))
    named: dict[str, Any] = {"classes": net.null, "sigma_data": sigma_data, "null": null}
    said = config.get("prediction_type", "epsilon")
    if net.parametrisation == "flow":
        return Denoiser(net, RF(), "flow", **named, time_scale=steps)
    if net.parametrisation == "edm":
        if said != "epsilon":
            raise DataError(f"A preconditioned model with `prediction_type: {said}` is not supported, only epsilon.")
        return Denoiser(net, EDM(), "edm", **{**named, "sigma_data": float(config.get("sigma_data", 0.5))})
    if said not in PREDICTS:
        raise DataError(f"`prediction_type: {said}` is not supported; these are: {', '.join(PREDICTS)}.")
    return Denoiser(net, table_of(config), PREDICTS[said], **named, time_scale=steps)


def table_of(config: Mapping[str, Any]) -> DiscreteVP:
    """The table of noise levels of a scheduler's configuration, as the installed library computes it."""
    kind = str(config.get("_class_name"))
    with quiet() as diffusers:
        cls = getattr(diffusers, kind, None)
        if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
            raise DataError(f"The installed diffusers library has no scheduler `{kind}`.")
        if config.get("timestep_type", "discrete") != "discrete":
            raise DataError(f"A {kind} with `timestep_type: {config['timestep_type']}` is not supported.")
        try:
            made: Any = cls.from_config(dict(config))  # type: ignore[attr-defined]
        except Exception as e:  # the library raises several types
            raise DataError(f"The scheduler's configuration cannot be read as {kind}: {first_line(e)}") from e
    left = getattr(made, "alphas_cumprod", None)
    if left is None:
        raise DataError(f"The scheduler {kind} has no table of noise levels and is not supported; see DDPMScheduler.")
    return DiscreteVP.of(torch.as_tensor(left))


def savable(denoiser: Denoiser) -> bool:
    """True for what :func:`save_denoiser` has a format for: diffusers' networks, and adapters that peft wraps (in a
    network of our own they may be part of it)."""
    body = _body(denoiser)
    return (hasattr(body, "peft_config") and hasattr(body, "save_pretrained")) or isinstance(denoiser.net, DiffusersNet)


def save_denoiser(denoiser: Denoiser, folder: Path | str) -> None:
    """Write a wrapped checkpoint as diffusers has it, which its ``from_pretrained`` loads; of one that is
    :func:`adapted`, the adapter alone, as peft has it.

    Our own small networks are saved by ``save_model`` (``models/export.py``) with what built them, as a run does.

    Raises:
        AtollError: for such a network.
    """
    body = _body(denoiser)
    if hasattr(body, "peft_config"):
        body.save_pretrained(Path(folder), safe_serialization=True)
    elif isinstance(denoiser.net, DiffusersNet):
        denoiser.net.save_pretrained(folder)
    else:
        raise AtollError(
            f"A {type(denoiser.net).__name__} has no format of diffusers; use `save_model` with `about_model`."
        )


# ------------------------------------------------------------------------------------------- LoRA


def adapted(
    denoiser: Denoiser, rank: int, targets: Sequence[str] = (), alpha: float | None = None, seed: int = 0
) -> Denoiser:
    """A copy with LoRA from peft, of which only the factors train; it starts as the same function.

    Args:
        denoiser: around a diffusers model, or a network of our own.
        rank: of the adapter.
        targets: patterns such as ``"to_q"`` of the modules to adapt; empty: every linear layer.
        alpha: the update is scaled by alpha / rank; None: twice the rank.
        seed: of the factor that does not start at zero.
    """
    made = copy.deepcopy(denoiser).requires_grad_(False)
    with seeded(seed, "lora"):
        _put_body(made, adapt(_body(made), rank, 2.0 * rank if alpha is None else alpha, targets))
    return made


def with_adapter(denoiser: Denoiser, folder: Path | str, trainable: bool = False) -> Denoiser:
    """A copy with the adapter in ``folder``, made by :func:`save_denoiser` or by peft for the same model.

    Raises:
        DataError: when there is no such adapter, or it belongs to another model.
    """
    if not (Path(folder) / "adapter_model.safetensors").exists():
        raise DataError(f"`{folder}` holds no adapter (`adapter_model.safetensors`).")
    from peft import PeftModel

    made = copy.deepcopy(denoiser).requires_grad_(False)
    try:
        _put_body(made, PeftModel.from_pretrained(_body(made), Path(folder), is_trainable=trainable))
    except Exception as e:  # peft raises several types
        raise DataError(f"The adapter in `{folder}` does not fit this model: {first_line(e)}") from e
    return made


def _body(denoiser: Denoiser) -> Any:
    """The module that adapters know by its own names."""
    return denoiser.net.model if isinstance(denoiser.net, DiffusersNet) else denoiser.net


def _put_body(denoiser: Denoiser, body: nn.Module) -> None:
    if isinstance(denoiser.net, DiffusersNet):
        denoiser.net.model = body
    else:
        denoiser.net = body
