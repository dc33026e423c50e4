"""Arithmetic over named tensors.

A *tree* is a flat ``dict`` from a parameter's name to its tensor. Functions that end in an underscore work in
place. Multi-tensor kernels (``torch._foreach_*``) are used throughout: for small models the number of Python
calls is the cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

Tree = dict[str, Tensor]
Parts = Mapping[str, Tree]
"""Several trees under names, e.g. ``{"weights": ..., "control": ...}``."""


def named_tensors(model: nn.Module) -> Tree:
    """All parameters and persistent buffers of ``model`` as detached views: writing to one writes to the model."""
    tree = {name: p.detach() for name, p in model.named_parameters()}
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in persistent:
            tree[name] = buffer.detach()
    return tree


def pick(tree: Mapping[str, Tensor], names: Iterable[str]) -> Tree:
    return {name: tree[name] for name in names}


def clone(tree: Mapping[str, Tensor]) -> Tree:
    return {name: t.detach().clone() for name, t in tree.items()}


def zeros_like(tree: Mapping[str, Tensor]) -> Tree:
    return {name: torch.zeros_like(t) for name, t in tree.items()}


def copy_(into: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy every tensor of ``source`` into the tensor of the same name."""
    if source:
        torch._foreach_copy_([into[name] for name in source], list(source.values()))


def add_(into: Mapping[str, Tensor], other: Mapping[str, Tensor], alpha: float = 1.0) -> None:
    """``into += alpha * other``, name by name."""
    if other:
        torch._foreach_add_([into[name] for name in other], list(other.values()), alpha=alpha)


def scale_(tree: Mapping[str, Tensor], factor: float) -> None:
    if tree:
        torch._foreach_mul_(list(tree.values()), factor)


def sub(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tree:
    """``a - b`` for the names of ``a``, as new tensors."""
    if not a:
        return {}
    return dict(zip(a, torch._foreach_sub(list(a.values()), [b[name] for name in a]), strict=True))


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float = 1.0) -> Tree:
    """``a + alpha * b`` for the names of ``a``, as new tensors."""
    if not a:
        return {}
    return dict(zip(a, torch._foreach_add(list(a.values()), [b[n] for n in a], alpha=alpha), strict=True))


def norm(tree: Mapping[str, Tensor]) -> float:
    """L2 norm of all entries taken as one vector."""
    if not tree:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tree.values())))))


def flatten(tree: Mapping[str, Tensor]) -> Tensor:
    """All entries as one vector, in the order of the tree."""
    return torch.cat([t.reshape(-1) for t in tree.values()]) if tree else torch.empty(0)


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> Tree:
    """The inverse of :func:`flatten`: views of ``vector`` with the names and shapes of ``like``."""
    out, at = {}, 0
    for name, t in like.items():
        out[name] = vector[at : at + t.numel()].view(t.shape)
        at += t.numel()
    return out


def moved(parts: Parts, device: torch.device | str) -> Parts:
    """The same trees on ``device``; tensors that are there already are not copied, shared trees stay shared."""
    if str(device) == "cpu" and all(t.device.type == "cpu" for tree in parts.values() for t in tree.values()):
        return parts
    return {name: {n: t.to(device) for n, t in tree.items()} for name, tree in parts.items()}


def contiguous(parts: Parts) -> Parts:
    """The same numbers in row-major order, as a file or the wire gives them back: kernels round by the layout too."""
    return {
        part: tree if all(t.is_contiguous() for t in tree.values()) else {n: t.contiguous() for n, t in tree.items()}
        for part, tree in parts.items()
    }


def numel(tree: Mapping[str, Tensor]) -> int:
    return sum(t.numel() for t in tree.values())


def nbytes(tree: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tree.values())


def all_finite(tree: Mapping[str, Tensor]) -> bool:
    """True when no floating-point entry is NaN or infinite."""
    floats = [t for t in tree.values() if t.is_floating_point() and t.numel()]
    if not floats:
        return True
    # The sum of absolute values is finite only if each entry is (or it overflows: then look closely).
    total = torch.stack([t.to(torch.float32) for t in torch._foreach_norm(floats, 1)]).sum()
    return bool(torch.isfinite(total)) or all(bool(torch.isfinite(t).all()) for t in floats)


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bitwise equality of names, dtypes, shapes and values."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )
