"""A network with its weights drawn anew: what training from scratch starts from where only a trained one is at hand."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from atoll.core.errors import AtollError

M = TypeVar("M", bound=nn.Module)


def redrawn(module: M) -> M:
    """``module`` with every weight drawn anew, in place, from the global generator, as its layers do when they are
    made. What a network set by hand after that, such as layers that start at zero, is not set again.

    Raises:
        AtollError: where a part with weights of its own does not know how; nothing trained may be left over.
    """
    drawn: set[int] = set()
    for part in module.modules():
        inner: Any = part
        reset = getattr(inner, "reset_parameters", None) or getattr(inner, "_reset_parameters", None)
        if callable(reset):
            reset()
            drawn |= {id(p) for p in part.parameters()}
    for name, p in module.named_parameters():
        if id(p) not in drawn:
            raise AtollError(
                f"The weights `{name}` cannot be drawn anew, as nothing says how; start from a teacher that was "
                "trained for 0 steps, or give a `build` that makes a fresh network."
            )
    return module
