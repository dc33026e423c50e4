"""Tensors that torch computes from others (``torch.nn.utils.parametrize``) as ordinary parameters."""

from __future__ import annotations

from typing import Any

from torch import nn


def bake(layer: Any) -> None:
    """Give a parametrised layer its present weights for good, and its own class back.

    torch's ``remove_parametrizations`` changes a class that deep copies of the layer share, and breaks them.
    """
    values = {name: getattr(layer, name).detach() for name in layer.parametrizations}
    layer.__class__ = type(layer).__bases__[0]
    del layer.parametrizations
    for name, value in values.items():
        setattr(layer, name, nn.Parameter(value))
