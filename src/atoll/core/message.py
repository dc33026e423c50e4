"""What crosses the wire: named tensors and JSON-able facts. Never code, never pickle.

The encoding is a valid safetensors file: an 8-byte little-endian header length, a JSON header, the tensors.
Tensor names are ``part/name``; kind and facts are one JSON string under ``__metadata__``. We write and parse the
layout ourselves for two reasons: the exact size is known without encoding anything, and a reader gets views of
the buffer (shared memory, a file) without a copy. Other tools can open the bytes with ``safetensors.torch.load``.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atoll.core.errors import MessageError
from atoll.core.files import Bytes
from atoll.core.tree import Parts, Tree, all_finite

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WIDTH = {name: torch.empty(0, dtype=dtype).element_size() for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Message:
    """Several trees under names, and a few facts.

    Attributes:
        kind: what the message is, e.g. ``"weights"`` or ``"delta"``; parts of a method are matched by it.
        parts: trees by name, e.g. ``{"delta": {...}}``. Part names hold no slash.
        facts: small JSON-able values, e.g. ``{"num_samples": 120}``.
    """

    kind: str
    parts: Parts = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def payload_bytes(self) -> int:
        """Bytes of the tensors alone, without names, shapes and facts."""
        return sum(t.numel() * t.element_size() for tree in self.parts.values() for t in tree.values())

    def finite(self) -> bool:
        return all(all_finite(tree) for tree in self.parts.values())


@dataclass(frozen=True, slots=True)
class Limits:
    """What a reader is willing to accept."""

    max_bytes: int = 4 << 30
    max_header_bytes: int = 16 << 20
    max_tensors: int = 100_000
    max_dims: int = 16


MOST_LEVELS = 100
"""Of mappings and lists within each other, in facts."""
NO_LIMITS = Limits(max_bytes=1 << 62, max_header_bytes=1 << 62, max_tensors=1 << 62)
"""For what this program has written itself: checkpoints, states, shared memory. Their size is no attack."""


def _layout(message: Message) -> tuple[bytes, list[tuple[str, Tensor]]]:
    """The padded header, in the message's order, and the tensors in theirs (widest type first: aligned)."""
    named = [(f"{part}/{name}", t) for part, tree in message.parts.items() for name, t in tree.items()]
    header: dict[str, Any] = {
        "__metadata__": {"atoll": json.dumps({"kind": message.kind, "facts": dict(message.facts)}, allow_nan=False)},
        **dict.fromkeys(name for name, _ in named),
    }
    named.sort(key=lambda item: -item[1].element_size())  # stable: ties keep the order of the tree
    at = 0
    for name, t in named:
        end = at + t.numel() * t.element_size()
        if t.dtype not in NAMES:
            raise MessageError(f"Tensor {name!r} has type {t.dtype}, which a message cannot hold.")
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), named


def encoded_size(message: Message) -> int:
    """Exactly ``len(encode(message))``, without encoding."""
    return 8 + len(_layout(message)[0]) + message.payload_bytes


def encode_into(message: Message, buffer: memoryview) -> int:
    """Write the message to ``buffer``; returns the bytes used, or raises when the buffer is too small."""
    header, named = _layout(message)
    size = 8 + len(header) + message.payload_bytes
    if size > len(buffer):
        raise MessageError(f"A message of {size:,} bytes does not fit a buffer of {len(buffer):,}.")
    struct.pack_into("<Q", buffer, 0, len(header))
    buffer[8 : 8 + len(header)] = header
    at = 8 + len(header)
    for _, t in named:
        count = t.numel() * t.element_size()
        if count:
            target = torch.frombuffer(buffer, dtype=t.dtype, count=t.numel(), offset=at)
            target.copy_(t.detach().reshape(-1))
        at += count
    return size


def encode(message: Message) -> bytearray:
    """The message as bytes."""
    out = bytearray(encoded_size(message))
    encode_into(message, memoryview(out))
    return out


def read_json(text: str | bytes) -> Any:
    """JSON from a stranger that can be written again: numbers are finite, and nothing is nested without end.

    Raises:
        ValueError: for any other text.
    """
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError as e:
        raise ValueError("nested without end") from e
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return value
    raise ValueError("nested without end")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


def decode(data: Bytes, limits: Limits = Limits()) -> Message:
    """Read a message; the tensors are views of ``data`` (copy them when the buffer will be reused).

    Raises:
        MessageError: for anything that is not exactly a message within ``limits``.
    """
    view = memoryview(data).cast("B")
    if len(view) > limits.max_bytes:
        raise MessageError(f"A message of {len(view):,} bytes is over the limit of {limits.max_bytes:,}.")
    if len(view) < 8:
        raise MessageError(f"A message has at least 8 bytes; got {len(view)}.")
    (length,) = struct.unpack_from("<Q", view, 0)
    if length > limits.max_header_bytes or 8 + length > len(view):
        raise MessageError(f"The header claims {length:,} bytes, more than is allowed or there.")
    body = view[8 + length :]
    try:
        header = read_json(bytes(view[8 : 8 + length]))
        about = read_json(header.pop("__metadata__")["atoll"])
        kind, facts = about["kind"], about["facts"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise MessageError("The header is not the JSON of a message.") from e
    if not isinstance(kind, str) or not isinstance(facts, dict):
        raise MessageError("A message needs a kind (text) and facts (a mapping).")
    if len(header) > limits.max_tensors:
        raise MessageError(f"{len(header):,} tensors are over the limit of {limits.max_tensors:,}.")
    parts: dict[str, Tree] = {}
    tensors, at = {}, 0
    for name, entry in sorted(header.items(), key=_place):
        tensors[name], at = _tensor(name, entry, body, at, limits)
    for name in header:  # the sender's order: norms, chunks and codecs run through a message in order
        part, _, rest = name.partition("/")
        if not part or not rest:
            raise MessageError(f"Tensor name {name[:80]!r} is not of the form part/name.")
        parts.setdefault(part, {})[rest] = tensors[name]
    if at != len(body):
        raise MessageError(f"{len(body) - at:,} bytes follow the last tensor.")
    return Message(kind, parts, facts)


def _place(item: tuple[str, Any]) -> tuple[int, int]:
    """Where an entry's bytes lie; what is malformed comes first, to be refused."""
    try:
        start, end = item[1]["data_offsets"]
    except (KeyError, TypeError, ValueError):
        return -1, -1
    return (start, end) if type(start) is type(end) is int else (-1, -1)


def _tensor(name: str, entry: Any, body: memoryview, at: int, limits: Limits) -> tuple[Tensor, int]:
    """The tensor that starts at byte ``at``, and where the next one starts."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        width = WIDTH[dtype]
    except (KeyError, TypeError, ValueError) as e:
        raise MessageError(f"The entry of tensor {name[:80]!r} is malformed.") from e
    ints = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in (*shape, start, end))
    if not ints or len(shape) > limits.max_dims:
        raise MessageError(f"The shape or offsets of tensor {name[:80]!r} are malformed.")
    count = math.prod(shape)
    if start != at or end - start != count * width or end > len(body):
        raise MessageError(f"The offsets of tensor {name[:80]!r} do not fit its shape or the data.")
    if count == 0:
        if math.prod(n or 1 for n in shape) >= 1 << 60:  # no byte vouches for the other sizes: strides overflow
            raise MessageError(f"The shape of tensor {name[:80]!r} is malformed.")
        return torch.empty(shape, dtype=DTYPES[dtype]), end
    raw = np.frombuffer(body[start:end], dtype=np.uint8)
    if dtype == "BOOL" and int(raw.max()) > 1:
        raise MessageError(f"Tensor {name[:80]!r} holds bytes that are not booleans.")
    if not raw.flags.writeable or (raw.ctypes.data % width):
        raw = raw.copy()  # bytes objects are read-only and a foreign buffer may be unaligned: give a safe copy
    return torch.from_numpy(raw).view(DTYPES[dtype]).view(shape), end


def detach(message: Message) -> Message:
    """The same message with tensors of its own (not views of a buffer that will be reused)."""
    parts = {part: {n: t.clone() for n, t in tree.items()} for part, tree in message.parts.items()}
    return Message(message.kind, parts, dict(message.facts))


def checksum(message: Message) -> int:
    """CRC-32 of all that the message says. It notices damage, not forgery."""
    names = [[p, n, NAMES[t.dtype], list(t.shape)] for p, tree in message.parts.items() for n, t in tree.items()]
    crc = zlib.crc32(json.dumps([message.kind, dict(message.facts), names]).encode())
    for tree in message.parts.values():
        for t in tree.values():
            if t.numel():
                flat = t.detach().cpu().contiguous().as_strided((t.numel(),), (1,))  # one number may keep any stride
                raw: Any = flat.view(torch.uint8).numpy()
                crc = zlib.crc32(raw, crc)
    return crc


SEAL = "crc32"


def seal(message: Message) -> Message:
    """The message with its checksum, for a file that must be noticed when it is damaged."""
    crc: Any = checksum(message)
    if SEAL in message.facts:  # a fact of that name: both, so that it comes back
        crc = [crc, message.facts[SEAL]]
    return Message(message.kind, message.parts, {**message.facts, SEAL: crc})


def unseal(message: Message) -> Message:
    """The message that was sealed; raises :class:`MessageError` when it is not what it was."""
    facts = dict(message.facts)
    claimed = facts.get(SEAL)
    if isinstance(claimed, list) and len(claimed) == 2:
        claimed, facts[SEAL] = claimed
    else:
        facts.pop(SEAL, None)
    whole = Message(message.kind, message.parts, facts)
    if claimed != checksum(whole):
        raise MessageError("its checksum does not fit, so it was damaged or changed")
    return whole
