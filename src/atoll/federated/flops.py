"""FLOPs of a model: matrix products, convolutions and attention, counted while it runs once on a few examples.

``torch.utils.flop_counter`` counts the same operations, but works below autograd and thereby imports a compiler
stack of over a second in each fresh process. Here the calls themselves are watched, and the backward cost follows
from which inputs need a gradient. A model that uses a composite function which hides its products (PyTorch's own
multi-head attention, recurrent layers) is counted by PyTorch's counter after all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from atoll.core.tree import clone, copy_, named_tensors
from atoll.data.dataset import Dataset
from atoll.tasks.task import Task


def flops_per_example(task: Task, model: nn.Module, data: Dataset, device: str = "cpu") -> tuple[float, float]:
    """FLOPs of (forward, backward) for one example; a multiplication with its addition is two.

    The model is left as it was. A model with nothing to train has a backward cost of zero. A task that takes steps of
    its own kind says itself what they cost, in ``flops``; all of it then counts as forward.
    """
    if hasattr(task, "flops"):
        return float(task.flops(model, data, device)), 0.0
    rows = len(data) if data.info.whole else min(len(data), 4)
    if rows == 0:
        return 0.0, 0.0
    before = clone(named_tensors(model))
    batch = data.ready(torch.arange(rows), device)
    with torch.random.fork_rng(devices=[]):
        watch = _Watch()
        with watch:
            loss = task.mean_loss(model, batch)
        counts = (watch.forward, watch.backward if loss.requires_grad else 0.0)
        if watch.opaque:
            counts = _below_autograd(task, model, batch)
    copy_(named_tensors(model), before)  # running statistics may have moved
    return counts[0] / rows, counts[1] / rows


def _below_autograd(task: Task, model: nn.Module, batch: Any) -> tuple[float, float]:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        loss = task.mean_loss(model, batch)
    forward, backward = counter.get_total_flops(), 0
    if loss.requires_grad:
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        backward = counter.get_total_flops()
    return float(forward), float(backward)


def _product(out: Tensor, inner: int, *inputs: Any) -> tuple[float, float]:
    """A product with ``inner`` terms per output; each input that needs a gradient costs one more of the same."""
    once = 2.0 * out.numel() * inner
    return once, once * sum(isinstance(t, Tensor) and t.requires_grad for t in inputs)


def _linear(out: Tensor, x: Tensor, w: Tensor, *_: Any, **__: Any) -> tuple[float, float]:
    return _product(out, w.shape[-1], x, w)


def _matmul(out: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> tuple[float, float]:
    return _product(out, a.shape[-1], a, b)


def _rmatmul(out: Tensor, b: Tensor, a: Tensor, *_: Any, **__: Any) -> tuple[float, float]:
    return _matmul(out, a, b)


def _addmm(out: Tensor, _: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> tuple[float, float]:
    return _product(out, a.shape[-1], a, b)


def _conv(out: Tensor, x: Tensor, w: Tensor, *_: Any, **__: Any) -> tuple[float, float]:
    return _product(out, math.prod(w.shape[1:]), x, w)


def _conv_transposed(_out: Tensor, x: Tensor, w: Tensor, *_: Any, **__: Any) -> tuple[float, float]:
    return _product(x, math.prod(w.shape[1:]), x, w)


def _attention(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[float, float]:
    scores = 2.0 * q.numel() * k.shape[-2]
    mix = 2.0 * out.numel() * k.shape[-2]
    grads = sum(t.requires_grad for t in (q, k))
    return scores + mix, scores * grads + mix * (v.requires_grad + (grads > 0))


COUNTED: dict[Any, Callable[..., tuple[float, float]]] = {
    F.linear: _linear,
    torch.matmul: _matmul, torch.bmm: _matmul, torch.mm: _matmul, Tensor.matmul: _matmul, Tensor.bmm: _matmul,
    Tensor.mm: _matmul, Tensor.__matmul__: _matmul, Tensor.__rmatmul__: _rmatmul,
    torch.addmm: _addmm, torch.baddbmm: _addmm, Tensor.addmm: _addmm, Tensor.baddbmm: _addmm,
    F.conv1d: _conv, F.conv2d: _conv, F.conv3d: _conv, torch.conv1d: _conv, torch.conv2d: _conv, torch.conv3d: _conv,
    F.conv_transpose1d: _conv_transposed, F.conv_transpose2d: _conv_transposed, F.conv_transpose3d: _conv_transposed,
    F.scaled_dot_product_attention: _attention,
}  # fmt: skip

OPAQUE = {F.multi_head_attention_forward, F.bilinear, torch.einsum, torch.tensordot}


class _Watch(TorchFunctionMode):
    """Adds up the cost of the calls made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0.0
        self.opaque = False

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        cost = COUNTED.get(func)
        if cost is not None:
            forward, backward = cost(out, *args, **(kwargs or {}))
            self.forward += forward
            self.backward += backward
        elif func in OPAQUE or getattr(func, "__name__", "") in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            self.opaque = True
        return out
