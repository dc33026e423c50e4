"""A classifier seen as two halves: a body that makes a feature, and a linear head on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from atoll.core.errors import RecipeError


def linear_head(model: nn.Module, who: str) -> tuple[str, nn.Linear]:
    """Name and module of the last linear layer, in the model's order.

    Raises:
        RecipeError: when there is none; ``who`` needs it.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not found:
        raise RecipeError(
            [f"{who} needs a model that ends in a linear layer, and this one has none; use another model."]
        )
    return found[-1]


class Tap:
    """Keeps what a module was last given; a forward pre-hook."""

    def __init__(self) -> None:
        self.seen: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.seen = inputs[0]

    def feature(self, who: str) -> Tensor:
        """The module's input in the last pass, ``[B, D]``, which is forgotten here.

        Raises:
            RecipeError: when the module was not used, or sees more than one vector a row; ``who`` needs one.
        """
        seen, self.seen = self.seen, None
        if seen is None or seen.dim() != 2:
            got = "is not used" if seen is None else f"sees {seen.dim() - 1} dimensions a row"
            raise RecipeError([f"{who} needs one feature per row, but the model's last linear layer {got}."])
        return seen


@contextmanager
def tapped(module: nn.Module) -> Iterator[Tap]:
    """Inside, a :class:`Tap` on the module."""
    tap = Tap()
    handle = module.register_forward_pre_hook(tap)
    try:
        yield tap
    finally:
        handle.remove()
