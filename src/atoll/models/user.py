"""A user's own ``nn.Module`` in place of one of ours."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from atoll.core.errors import AtollError
from atoll.core.imports import TRUSTED, dotted_name, import_allowed, is_trusted
from atoll.data.dataset import Info
from atoll.models.model import ModelBuilder


@dataclass(frozen=True)
class User(ModelBuilder):
    """A module of your own, by name or as an object.

    Args:
        factory: ``"package.module:name"`` of a class or function that returns a module; from Python also the
            class or function itself, or a module (each model is then a copy of it). It receives ``info`` (the
            data's :class:`Info`) and ``outputs`` (how many numbers per row) if it has parameters so named.
        arguments: further keyword arguments.

    A name is imported only where the user trusts its package: ``--trust package``, from Python :func:`trust`.
    """

    factory: str | Callable[..., nn.Module]
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    denoises: ClassVar[bool | None] = None
    loaded: Any = field(default=None, init=False, repr=False, compare=False)
    """The object, found when the builder is made: worker processes need no trust of their own."""

    def __post_init__(self) -> None:
        factory = self.factory
        if not isinstance(factory, str):
            object.__setattr__(self, "loaded", factory)
            object.__setattr__(self, "factory", dotted_name(factory) or factory)  # a name can be written down
        elif is_trusted(factory.partition(":")[0], TRUSTED.get()):
            object.__setattr__(self, "loaded", import_allowed(factory))

    def build(self, info: Info, outputs: int) -> nn.Module:
        factory = self.loaded if self.loaded is not None else import_allowed(str(self.factory))
        if isinstance(factory, nn.Module):
            return copy.deepcopy(factory)
        try:
            signature = inspect.signature(factory)
            offered = {"info": info, "outputs": outputs}
            arguments = {k: v for k, v in offered.items() if k in signature.parameters} | dict(self.arguments)
            signature.bind(**arguments)
        except (TypeError, ValueError) as e:
            raise AtollError(f"The model `{self.factory}` cannot be called with these arguments: {e}.") from e
        model = factory(**arguments)
        if not isinstance(model, nn.Module):
            what = type(model).__name__
            raise AtollError(f"The model `{self.factory}` returned {what}; it must return a torch.nn.Module.")
        return model
