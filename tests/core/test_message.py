"""The wire format: a valid safetensors file, exact sizes, and nothing malformed gets through."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atoll.core.errors import MessageError
from atoll.core.message import DTYPES, Limits, Message, decode, encode, encode_into, encoded_size, seal, unseal
from atoll.core.tree import equal

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
names = st.text("abcdefgh.0123_é ", min_size=1, max_size=8)
facts = st.dictionaries(
    st.text(max_size=5), st.integers() | st.text(max_size=5) | st.booleans() | st.none(), max_size=3
)


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(shapes)
    seed = draw(st.integers(0, 2**31))
    raw = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed))
    return raw.to(dtype)


@st.composite
def messages(draw):
    trees = st.dictionaries(names, tensors(), min_size=1, max_size=4)
    parts = draw(st.dictionaries(st.sampled_from(["delta", "control", "a.b"]), trees, max_size=3))
    return Message(draw(st.text(min_size=1, max_size=6)), parts, draw(facts))


@settings(max_examples=60, deadline=None)
@given(messages())
def test_round_trip_and_exact_size(message):
    raw = encode(message)
    assert len(raw) == encoded_size(message)
    back = decode(raw)
    assert back.kind == message.kind
    assert back.facts == dict(message.facts)
    assert back.parts.keys() == message.parts.keys()
    assert all(equal(back.parts[p], message.parts[p]) for p in message.parts)
    assert message.payload_bytes == back.payload_bytes


@settings(max_examples=30, deadline=None)
@given(messages())
def test_the_bytes_are_a_safetensors_file(message):
    opened = safetensors.torch.load(bytes(encode(message)))
    ours = {f"{p}/{n}": t for p, tree in message.parts.items() for n, t in tree.items()}
    assert equal(opened, ours)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused_or_still_a_message(data):
    message = Message("delta", {"delta": {"w": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)}}, {"num_samples": 3})
    raw = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()) and len(raw) > 1:
            raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
        elif raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = decode(raw)
    except MessageError:
        return
    assert encoded_size(got) <= len(raw) + 64  # still well formed: bits of a value or a name have changed


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_never_a_message(raw):
    with pytest.raises(MessageError):
        decode(raw)


def crafted(header: dict, body: bytes = b"", meta: str = '{"kind": "k", "facts": {}}') -> bytes:
    text = json.dumps({"__metadata__": {"atoll": meta}, **header}).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (struct.pack("<Q", 1 << 60) + b"{}", "header claims"),
        (crafted({"d/w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4), "do not fit"),
        (
            crafted({"d/w": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}, b"\0" * 4),
            "do not fit",
        ),
        (crafted({"d/w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4), "malformed"),
        (crafted({"d/w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"\0" * 4), "malformed"),
        (crafted({"d/w": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4), "malformed"),
        (crafted({"d/w": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}, b"\7"), "not booleans"),
        (crafted({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"\0"), "part/name"),
        (crafted({}, b"extra"), "follow the last"),
        (crafted({}, meta='{"kind": 3, "facts": {}}'), "needs a kind"),
        (crafted({}, meta="[" * 100_000), "not the JSON"),
        (b"\0" * 7, "at least 8"),
    ],
)
def test_hostile_headers_are_refused_with_a_reason(raw, why):
    with pytest.raises(MessageError, match=why):
        decode(raw)


def test_limits_hold():
    raw = encode(Message("k", {"p": {str(i): torch.zeros(1) for i in range(5)}}))
    with pytest.raises(MessageError, match="over the limit of 4"):
        decode(raw, Limits(max_tensors=4))
    with pytest.raises(MessageError, match="over the limit of 10"):
        decode(raw, Limits(max_bytes=10))
    with pytest.raises(MessageError, match="does not fit a buffer"):
        encode_into(Message("k", {"p": {"w": torch.zeros(9)}}), memoryview(bytearray(8)))


def test_a_decoded_buffer_is_not_copied_but_bytes_are_safe_to_write():
    raw = encode(Message("k", {"p": {"w": torch.zeros(4)}}))
    view = decode(raw).parts["p"]["w"]
    view.fill_(1.0)
    assert decode(raw).parts["p"]["w"].sum() == 4  # a bytearray is shared memory
    frozen = bytes(raw)
    decode(frozen).parts["p"]["w"].fill_(7.0)
    assert decode(frozen).parts["p"]["w"].sum() == 4  # bytes stay what they were


@pytest.mark.parametrize("shape", [[0, 10**30], [0, 2**62, 2**62], [2**47, 0, 2**47], [0, 2**63 - 1]])
def test_an_empty_tensor_of_impossible_shape_is_refused(shape):
    about = {"atoll": json.dumps({"kind": "k", "facts": {}})}
    header = {"__metadata__": about, "p/w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    with pytest.raises(MessageError, match="malformed"):
        decode(struct.pack("<Q", len(text)) + text)


def test_a_type_that_has_no_encoding_is_named():
    with pytest.raises(MessageError, match="complex64"):
        encode(Message("k", {"p": {"w": torch.zeros(1, dtype=torch.complex64)}}))


def test_the_order_of_parts_and_tensors_survives():
    types = (torch.bfloat16, torch.float64, torch.int8, torch.float32, torch.float64)
    tree = {f"{i}": torch.ones(i % 3, dtype=t) for i, t in enumerate(types)}
    message = Message("k", {"z": dict(tree), "a": dict(reversed(tree.items()))})
    back = decode(encode(message))
    assert list(back.parts) == ["z", "a"]
    assert [list(t) for t in back.parts.values()] == [list(t) for t in message.parts.values()]
    assert all(equal(back.parts[p], message.parts[p]) for p in message.parts)
    raw = encode(message)
    assert set(safetensors.torch.load(bytes(raw))) == {f"{p}/{n}" for p in message.parts for n in tree}


@settings(max_examples=60, deadline=None)
@given(messages())
@example(Message("0", {}, {"a": 1, "crc32": None, "b": 2}))
@example(Message("0", {}, {"crc32": [1, 2]}))
def test_a_sealed_message_opens_and_a_changed_one_does_not(message):
    sealed = decode(encode(seal(message)))
    assert unseal(sealed).facts == dict(message.facts)
    with pytest.raises(MessageError, match="checksum"):
        unseal(Message(sealed.kind + "x", sealed.parts, sealed.facts))
    for tree in sealed.parts.values():
        for t in tree.values():
            if t.numel():
                t.view(-1).view(torch.uint8)[0] ^= 1
                with pytest.raises(MessageError, match="checksum"):
                    unseal(sealed)
                t.view(-1).view(torch.uint8)[0] ^= 1


def test_one_number_of_a_wider_row_is_sealed():
    """A slice of one number keeps its stride, and PyTorch calls it contiguous all the same."""
    lone = torch.arange(4.0).view(2, 2)[:1, 1].as_strided((1,), (2,), 1)
    assert lone.stride() == (2,)
    message = seal(Message("weights", {"a": {"w": lone}}))
    assert unseal(decode(encode(message))).parts["a"]["w"].tolist() == [1.0]
