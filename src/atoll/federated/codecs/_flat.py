"""All floating-point tensors of a message as one vector, and back. What most codecs are written on.

An encoded message has the other tensors as they were, one part under the codec's name, and the codec's facts:
the layout, and what else the codec needs. One vector for the whole message is what the papers speak of, costs
one header entry instead of one for each tensor, and keeps kernels long.

    {"delta": {"w": f32 [3, 4], "b": f32 [4], "steps": i64 []}} ->  {"delta": {"steps": ...}, "cast":
    {"values": f16 [16]}}, {"cast": {"layout": {"delta": {"w": ["F32", 3, 4], ...}}}}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atoll.core.errors import AtollError, MessageError
from atoll.core.message import DTYPES, NAMES, Limits, Message
from atoll.core.tree import Tree

Layout = dict[str, dict[str, list[Any]]]
"""part -> name -> [dtype, *shape]"""


def split_floats(message: Message) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """The parts' floating-point tensors, and all other tensors."""
    floats: dict[str, Tree] = {}
    others: dict[str, Tree] = {}
    for part, tree in message.parts.items():
        for name, t in tree.items():
            (floats if t.is_floating_point() else others).setdefault(part, {})[name] = t
    return floats, others


def floats_alone(message: Message, codec: str) -> dict[str, Tree]:
    """The parts' floating-point tensors, for a codec that cannot hide anything else.

    Raises:
        AtollError: the message holds something else.
    """
    floats, others = split_floats(message)
    what = [f"{part}/{n}" for part, tree in others.items() for n in tree] + [f"fact `{f}`" for f in message.facts]
    if what:
        raise AtollError(f"{codec} cannot hide {', '.join(what[:3])}; use a method that sends floats alone.")
    return floats


@dataclass(frozen=True, slots=True)
class Flat:
    """A message as ``vector`` (float32 ``[D]``, its own memory), the layout to undo it, and all else."""

    message: Message
    vector: Tensor
    layout: Layout
    others: Mapping[str, Tree]

    def pack(self, codec: str, tensors: Tree, **facts: Any) -> Message:
        """The encoded message: ``tensors`` under part ``codec``, with the layout among the facts."""
        if codec in self.message.facts or codec in self.others:
            raise AtollError(f"Codec `{codec}` is already in this chain; a message can pass it once.")
        about = {**self.message.facts, codec: {"layout": self.layout, **facts}}
        return Message(self.message.kind, {**self.others, codec: tensors}, about)


def flatten_floats(message: Message) -> Flat:
    """Float64 loses its extra digits here, which no codec would have kept."""
    floats, others = split_floats(message)
    tensors = [t for tree in floats.values() for t in tree.values()]
    vector = torch.cat([t.detach().reshape(-1).float() for t in tensors]) if tensors else torch.empty(0)
    layout = {part: {n: [NAMES[t.dtype], *t.shape] for n, t in tree.items()} for part, tree in floats.items()}
    return Flat(message, vector, layout, others)


@dataclass(frozen=True, slots=True)
class Packed:
    """An encoded message whose layout has been checked; nothing of size ``numel`` is allocated yet."""

    message: Message
    codec: str
    layout: Layout
    numel: int
    facts: Mapping[str, Any]
    tensors: Tree

    def take(self, name: str, dtype: torch.dtype, count: int) -> Tensor:
        """The tensor ``name``, which must be a vector of ``count`` numbers of ``dtype``."""
        t = self.tensors.get(name)
        if t is None or t.dtype != dtype or t.shape != (count,):
            got = "nothing" if t is None else f"{NAMES[t.dtype]} {list(t.shape)}"
            raise MessageError(f"`{self.codec}/{name}` must be {NAMES[dtype]} [{count}]; got {got}.")
        return t

    def only(self, *names: str) -> None:
        """Raise unless the part has just these tensors."""
        if self.tensors.keys() != set(names):
            raise MessageError(f"Part `{self.codec}` must hold {sorted(names)}; got {sorted(self.tensors)[:5]}.")

    def restore(self, vector: Tensor) -> Message:
        """The decoded message, from the float32 ``[numel]`` vector."""
        parts = {part: dict(tree) for part, tree in self.message.parts.items() if part != self.codec}
        at = 0
        for part, tree in self.layout.items():
            for name, (dtype, *shape) in tree.items():
                count = math.prod(shape)
                tensor = vector[at : at + count].view(shape).to(DTYPES[dtype])
                if name in parts.setdefault(part, {}):
                    raise MessageError(f"Tensor `{part}/{name}` is there twice.")
                parts[part][name] = tensor
                at += count
        facts = {k: v for k, v in self.message.facts.items() if k != self.codec}
        return Message(self.message.kind, parts, facts)


def unpack(message: Message, codec: str, limits: Limits = Limits()) -> Packed:
    """Read the layout of an encoded message, trusting nothing in it.

    Raises:
        MessageError: the facts are not a layout, or the decoded tensors would be over ``limits``.
    """
    facts = message.facts.get(codec)
    layout = facts.get("layout") if isinstance(facts, dict) else None
    if not isinstance(layout, dict) or not all(_is_name(p) and isinstance(tree, dict) for p, tree in layout.items()):
        raise MessageError(f"The message has not passed the codec `{codec}`.")
    entries = [(n, e) for tree in layout.values() for n, e in tree.items()]
    if len(entries) > limits.max_tensors:
        raise MessageError(f"{len(entries):,} tensors are over the limit of {limits.max_tensors:,}.")
    numel = 0
    for name, entry in entries:
        if not (isinstance(name, str) and name and isinstance(entry, list) and _is_shape(entry, limits)):
            raise MessageError(f"The layout of tensor {str(name)[:80]!r} is malformed.")
        numel += math.prod(entry[1:])
    if numel * 8 > limits.max_bytes:
        raise MessageError(f"A message of {numel:,} numbers is over the limit of {limits.max_bytes // 8:,}.")
    assert isinstance(facts, dict)
    return Packed(message, codec, layout, numel, facts, dict(message.parts.get(codec, {})))


def count(fraction: float, n: int) -> int:
    """How many of ``n`` numbers a sparsifier sends: at least one, if there is one."""
    return min(n, max(1, math.ceil(fraction * n - 1e-9 * n)))


def _is_name(part: object) -> bool:
    return isinstance(part, str) and part != "" and "/" not in part


def _is_shape(entry: list[Any], limits: Limits) -> bool:
    if not entry or not isinstance(entry[0], str) or len(entry) - 1 > limits.max_dims:
        return False
    floating = entry[0] in DTYPES and DTYPES[entry[0]].is_floating_point
    return floating and all(type(n) is int and 0 <= n <= limits.max_bytes for n in entry[1:])
