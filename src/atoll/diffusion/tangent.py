"""The derivative of a network along a direction of its inputs, which continuous-time consistency models need."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from atoll.diffusion.consistency import rewound


def jvp_tangent(
    function: Callable[[Tensor, Tensor], Tensor], inputs: tuple[Tensor, Tensor], along: tuple[Tensor, Tensor],
    exact: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``function(*inputs)`` and its derivative along ``along``, both without a graph. Dropout is as in the next call.

    All in float32: in less the derivative drowns. Fused attention has no forward-mode derivative, so attention is
    computed plainly. A network with a part that has none either is differentiated by :func:`differences`.
    """
    device = inputs[0].device
    with torch.no_grad(), torch.autocast(device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        if exact:
            try:
                with rewound(device), warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's own, about how it loads its rules
                    found = torch.func.jvp(function, inputs, along)
                return found[0], found[1]
            except RuntimeError as e:  # also what PyTorch raises where a rule is missing
                if not any(word in str(e) for word in ("forward AD", "forward mode", "forward-mode", "jvp")):
                    raise
        return differences(function, inputs, along)


def differences(
    function: Callable[[Tensor, Tensor], Tensor], inputs: tuple[Tensor, Tensor], along: tuple[Tensor, Tensor],
    step: float = 5e-3,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same by central differences, whose error is of second order: three calls, with the same dropout."""
    device = inputs[0].device

    def at(h: float) -> Tensor:
        with rewound(device):
            return function(inputs[0] + h * along[0], inputs[1] + h * along[1])

    return at(0.0), (at(step) - at(-step)) / (2 * step)
