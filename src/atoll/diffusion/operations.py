"""Floating-point operations of whatever runs inside: products, convolutions, attention, forwards and backwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Operations(TorchDispatchMode):
    """Counts by torch's own formulas; ``total`` is the sum. torch's ``FlopCounterMode`` also says which module asked,
    and for that hooks modules, which fails where a tensor with a graph enters one under ``no_grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += float(formula(*args, **(kwargs or {}), out_val=out))
        return out
