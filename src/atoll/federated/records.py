"""Messages as Flower's native records: every tensor is an ``Array`` that Flower's mods and tools see, in an
``ArrayRecord`` per part; kind and facts are JSON text in one ``ConfigRecord``.

Flower has no bfloat16: such tensors travel as int16 with the same bits. Arrays are read without ever unpickling, and
nothing is allocated that the received bytes do not fill.
"""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from atoll.core.errors import MessageError
from atoll.core.message import Limits, Message, read_json
from atoll.core.tree import Tree

if TYPE_CHECKING:
    from flwr.app import Array, RecordDict

CONFIG = "atoll"
TYPES = {
    "float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "int64": torch.int64,
    "int32": torch.int32, "int16": torch.int16, "int8": torch.int8, "uint8": torch.uint8, "bool": torch.bool,
}  # fmt: skip


def to_records(message: Message) -> RecordDict:
    """The message for a Flower ``Message``."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    def array(t: Tensor) -> Array:
        t = t.detach().cpu().contiguous()
        return Array((t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy())

    parts = {part: ArrayRecord({n: array(t) for n, t in tree.items()}) for part, tree in message.parts.items() if tree}
    order = {part: list(tree) for part, tree in message.parts.items()}
    halves = [[p, n] for p, tree in message.parts.items() for n, t in tree.items() if t.dtype == torch.bfloat16]
    about = {"kind": message.kind, "facts": dict(message.facts), "order": order, "bfloat16": halves}
    return RecordDict({CONFIG: ConfigRecord({"message": json.dumps(about, allow_nan=False)}), **parts})


def from_records(records: RecordDict, limits: Limits = Limits()) -> Message:
    """The message that was sent.

    Raises:
        MessageError: for records that :func:`to_records` does not make, or that are over the limits.
    """
    try:
        text = records.config_records[CONFIG]["message"]
        if not isinstance(text, str) or len(text) > limits.max_header_bytes:
            raise MessageError("The record with the message's facts is malformed or too long.")
        about = read_json(text)
        kind, facts, order = about["kind"], about["facts"], about["order"]
        halves = {(p, n) for p, n in about["bfloat16"]}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise MessageError("The records hold no message of ours.") from e
    if not isinstance(kind, str) or not isinstance(facts, dict) or not isinstance(order, dict):
        raise MessageError("A message needs a kind (text) and facts (a mapping).")
    found = {p: dict(record) for p, record in records.array_records.items()}
    named = [(p, n, found.get(p, {}).get(n)) for p, names in order.items() for n in _texts(names)]
    count = sum(map(len, found.values()))
    if len(named) != count or len({(p, n) for p, n, _ in named}) != count or count > limits.max_tensors:
        raise MessageError("The records' names and the message's do not agree, or there are too many tensors.")
    size = sum(len(a.data) for _, _, a in named if a is not None)
    if size > limits.max_bytes:
        raise MessageError(f"A message of {size:,} bytes is over the limit of {limits.max_bytes:,}.")
    parts: dict[str, Tree] = {p: {} for p in order}
    for part, name, array in named:
        if array is None or not part or "/" in part:
            raise MessageError(f"Tensor {name[:80]!r} is missing, or its part has no proper name.")
        parts[part][name] = _tensor(array, f"{part}/{name}", (part, name) in halves, limits)
    return Message(kind, parts, facts)


def _texts(names: Any) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise MessageError("The names of the message's tensors are malformed.")
    return names


def _tensor(array: Array, name: str, half: bool, limits: Limits) -> Tensor:
    """The tensor in NumPy's file format, read by hand: a header that claims too much would allocate it."""
    file = io.BytesIO(array.data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("version")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=4096)
        kind = TYPES[str(dtype)]
    except Exception as e:  # NumPy's reader tokenizes and parses what it is given, with all their errors
        raise MessageError(f"Tensor {name[:80]!r} is not an array of numbers.") from e
    body = array.data[file.tell() :]
    count = 1
    for n in shape:
        count *= n
    fits = all(0 <= n < 1 << 60 for n in shape) and count * dtype.itemsize == len(body)
    if not fits or len(shape) > limits.max_dims:
        raise MessageError(f"The shape of tensor {name[:80]!r} does not fit its data.")
    if str(dtype) != array.dtype or tuple(shape) != tuple(array.shape):
        raise MessageError(f"The array of tensor {name[:80]!r} is not what its record says.")
    if kind == torch.bool and any(b > 1 for b in set(body)):
        raise MessageError(f"Tensor {name[:80]!r} holds bytes that are not booleans.")
    if half and kind != torch.int16:
        raise MessageError(f"Tensor {name[:80]!r} is not the bits of bfloat16.")
    if count == 0:
        if np.prod([float(n or 1) for n in shape]) >= 1 << 60:
            raise MessageError(f"The shape of tensor {name[:80]!r} is malformed.")
        empty = torch.empty(tuple(shape), dtype=kind)
        return empty.view(torch.bfloat16) if half else empty
    flat = np.frombuffer(bytearray(body), dtype=dtype)
    t = torch.from_numpy(np.asarray(flat.reshape(shape, order="F" if fortran else "C"), order="C"))
    return t.view(torch.bfloat16) if half else t
