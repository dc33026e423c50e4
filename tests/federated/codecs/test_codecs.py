"""What every codec must hold: the form of a message, honest bytes, and a decoder that trusts nothing."""

from __future__ import annotations

import itertools
import json
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.core.errors import AtollError, MessageError
from atoll.core.message import Message, decode, encode, encoded_size
from atoll.federated.codecs._flat import flatten_floats, unpack
from atoll.federated.codecs.cast import Cast
from atoll.federated.codecs.clip import Clip
from atoll.federated.codecs.gaussian_noise import GaussianNoise
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.codecs.random_k import RandomK
from atoll.federated.codecs.rqm import Rqm
from atoll.federated.codecs.top_k import TopK
from atoll.federated.method import CodecContext

CONTEXT = CodecContext(0, 0, 0, 4)
FLAT = [
    Cast(), Cast("bfloat16"), Quantise(8), Quantise(1, chunk=8), Quantise(3, chunk=16), TopK(0.5), TopK(0.01),
    RandomK(0.5), RandomK(0.1, feedback=True),
]  # fmt: skip
CHAINS = [
    *((c,) for c in FLAT), (Clip(1.0),), (Clip(1.0), TopK(0.3), Quantise(4, chunk=8)), (RandomK(0.5), Cast()),
    (TopK(0.2), Cast("bfloat16")), (Clip(0.1), GaussianNoise(1.0, 0.1)), (Clip(1.0), Rqm(0.1, 1000, levels=11)),
]  # fmt: skip

dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
shapes = st.lists(st.integers(0, 5), max_size=3)
trees = st.dictionaries(st.sampled_from(["w", "b", "layer.0.weight", "ü"]), st.tuples(shapes, dtypes), max_size=3)
messages = st.dictionaries(st.sampled_from(["delta", "extra"]), trees, max_size=2)


def make(spec, integers: bool) -> Message:  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(0)
    parts = {p: {n: torch.randn(s, generator=g).to(d) for n, (s, d) in tree.items()} for p, tree in spec.items()}
    parts = {p: tree for p, tree in parts.items() if tree}
    if integers:
        parts.setdefault("delta", {})["steps"] = torch.tensor([1, 2**40])
    return Message("delta", parts, {"num_samples": 7} if integers else {})


def form(m: Message):  # type: ignore[no-untyped-def]
    return (
        m.kind,
        m.facts,
        {p: {n: (t.shape, t.dtype) for n, t in tree.items()} for p, tree in m.parts.items()},
    )


@pytest.mark.parametrize("chain", CHAINS, ids=str)
@given(spec=messages, integers=st.booleans())
@settings(max_examples=25, deadline=None)
def test_names_shapes_dtypes_facts_and_integers_survive(chain, spec, integers, travel) -> None:
    message = make(spec, integers and not any(c.private for c in chain))
    before = make(spec, integers and not any(c.private for c in chain))
    out, _ = travel(chain, message)
    assert form(out) == form(message)
    for part, tree in message.parts.items():
        for name, t in tree.items():
            assert torch.equal(t, before.parts[part][name]), "the sender's tensors were changed"
            if not t.is_floating_point():
                assert torch.equal(out.parts[part][name], t)


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_zeros_stay_zero_unless_noise_or_one_bit(chain, travel) -> None:
    out, _ = travel(chain, Message("delta", {"delta": {"w": torch.zeros(40)}}))
    quiet = not any(c.private for c in chain)
    assert (not out.parts["delta"]["w"].any()) or not quiet


@pytest.mark.parametrize("chain", [c for c in CHAINS if not isinstance(c[0], Clip)], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_diverged_update_does_not_become_a_harmless_one(chain, bad, travel) -> None:
    w = torch.randn(100, generator=torch.Generator().manual_seed(0))
    w[50] = bad
    out, _ = travel(chain, Message("delta", {"delta": {"w": w}}))
    if any(isinstance(c, RandomK) for c in chain):
        return  # it may not have been drawn
    assert not out.finite()


@pytest.mark.parametrize("codec", FLAT, ids=str)
def test_a_codec_passes_once(codec) -> None:
    once, _ = codec.encode(Message("delta", {"delta": {"w": torch.ones(9)}}), {}, CONTEXT)
    with pytest.raises(AtollError, match="is already in this chain"):
        codec.encode(once, {}, CONTEXT)
    with pytest.raises(MessageError, match="has not passed the codec"):
        codec.decode(Message("delta", {"delta": {"w": torch.ones(9)}}))


def test_bytes_are_what_the_bits_say(travel) -> None:
    n = 4096
    m = Message("delta", {"delta": {"w": torch.randn(n, generator=torch.Generator().manual_seed(0))}})
    base = 700  # header
    for codec, bits in (
        (Cast(), 16), (Quantise(8), 8), (Quantise(3), 3), (Quantise(1), 1),
        (TopK(0.01), 0.01 * 64), (TopK(0.5), 0.5 * 32 + 1), (RandomK(0.25), 8),
    ):  # fmt: skip
        _, size = travel((codec,), m)
        assert n * bits / 8 <= size <= n * bits / 8 + base, codec


def test_top_k_then_quantise_shrinks_the_values_alone(travel) -> None:
    m = Message("delta", {"delta": {"w": torch.randn(100_000, generator=torch.Generator().manual_seed(0))}})
    _, size = travel((TopK(0.01), Quantise(4)), m)
    assert size <= 1000 * 4 + 1000 // 2 + 700


# ------------------------------------------------------------------------------------- hostile messages

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=5) | st.just("F32"),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=5) | st.just("layout"), x, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("codec", [*FLAT, Rqm(0.1, 64, levels=11)], ids=str)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_decoder_trusts_nothing(codec, data) -> None:
    """Facts and tensors are mutated at random; the answer is a message or a refusal, never anything else."""
    m = Message("delta", {"delta": {"w": torch.randn(5, 4), "b": torch.randn(3)}})
    encoded, _ = codec.encode(m, {}, CONTEXT)
    (part,) = encoded.parts
    facts = json.loads(json.dumps(encoded.facts))
    tensors = {part: dict(encoded.parts[part])}
    for _ in range(data.draw(st.integers(1, 3))):
        what = data.draw(st.integers(0, 6))
        layout = facts.get(part, {}).get("layout") if isinstance(facts.get(part), dict) else None
        tree = layout.get("delta") if isinstance(layout, dict) else None
        if what == 0:
            facts[part] = data.draw(JUNK)
        elif what == 1 and isinstance(facts.get(part), dict):
            facts[part][data.draw(st.sampled_from(["layout", "seed"]))] = data.draw(JUNK)
        elif what == 2 and isinstance(tree, dict):
            tree[data.draw(st.sampled_from(["w", "b", "", "new"]))] = data.draw(JUNK)
        elif what == 3 and isinstance(tree, dict):
            dims = data.draw(st.lists(st.integers(-1, 2**40), max_size=3))
            tree[data.draw(st.sampled_from(["w", "b"]))] = [
                data.draw(st.sampled_from(["F32", "I8", "?"])),
                *dims,
            ]
        elif what == 4:
            size = data.draw(st.integers(0, 40))
            dtype = data.draw(st.sampled_from([torch.float32, torch.uint8, torch.int32, torch.float16]))
            tensors[part][data.draw(st.sampled_from([*encoded.parts[part], "x"]))] = torch.ones(size).to(dtype)
        elif what == 5 and tensors[part]:
            tensors[part].pop(data.draw(st.sampled_from(sorted(tensors[part]))))
        elif what == 6:
            for t in tensors[part].values():
                if not t.is_floating_point() and t.numel():
                    t[data.draw(st.integers(0, len(t) - 1))] = data.draw(st.integers(0, 127))
    bad = Message("delta", tensors, facts)
    try:
        out = codec.decode(bad)
        encoded_size(out)
    except AtollError:
        pass


@pytest.mark.parametrize("codec", [*FLAT, Rqm(0.1, 64, levels=11)], ids=str)
@pytest.mark.parametrize("shape", [[2**28], [2**20, 2**20], [2**31, 2**31, 2**31], [0, 2**62], [2**40, 0]], ids=str)
def test_a_huge_claim_is_refused_before_it_is_allocated(codec, shape) -> None:
    encoded, _ = codec.encode(Message("delta", {"delta": {"w": torch.randn(64)}}), {}, CONTEXT)
    (part,) = encoded.parts
    encoded.facts[part]["layout"]["delta"]["w"] = ["F32", *shape]
    tracemalloc.start()
    rss = _peak()
    with pytest.raises(MessageError):
        codec.decode(decode(encode(encoded)))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert _peak() - rss < 64 << 10  # KiB


def _peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (["F32", -1], "malformed"), (["I32", 64], "malformed"),
        (["F32", 64.0], "malformed"), (["F32", True], "malformed"),
        ([], "malformed"), ("F32", "malformed"), (["F32", *[1] * 17], "malformed"), (["F32", 65], "must be"),
    ],
)  # fmt: skip
def test_bad_layouts_are_named(entry, text) -> None:
    encoded, _ = Cast().encode(Message("delta", {"delta": {"w": torch.randn(64)}}), {}, CONTEXT)
    encoded.facts["cast"]["layout"]["delta"]["w"] = entry
    with pytest.raises(MessageError, match=text):
        Cast().decode(encoded)


def test_a_tensor_cannot_come_twice() -> None:
    m = Message("delta", {"delta": {"w": torch.randn(4), "n": torch.tensor([3])}})
    encoded, _ = Cast().encode(m, {}, CONTEXT)
    encoded.parts["delta"]["w"] = torch.tensor([1])
    with pytest.raises(MessageError, match="`delta/w` is there twice"):
        Cast().decode(encoded)


@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_top_k_places_must_ascend_and_fit(fraction) -> None:
    codec = TopK(fraction)
    encoded, _ = codec.encode(Message("delta", {"delta": {"w": torch.arange(300.0)}}), {}, CONTEXT)
    parts = encoded.parts["top_k"]
    if "indices" in parts:
        for bad in ([2, 1, 0], [1, 1, 2], [-1, 0, 1], [0, 1, 300]):
            parts["indices"] = torch.tensor(bad, dtype=torch.int32)
            with pytest.raises(MessageError, match="must ascend"):
                codec.decode(encoded)
    else:
        for place in (0, -1):  # one bit too many; a bit beyond the end
            good = parts["bitmap"].clone()
            parts["bitmap"][place] ^= 128
            with pytest.raises(MessageError, match="must mark 150 of 300"):
                codec.decode(encoded)
            parts["bitmap"] = good


def test_random_k_seed_is_checked() -> None:
    encoded, _ = RandomK(0.5).encode(Message("delta", {"delta": {"w": torch.ones(8)}}), {}, CONTEXT)
    for seed in (-1, 2**63, 1.5, True, "1", None):
        facts = {"random_k": {**encoded.facts["random_k"], "seed": seed}}
        with pytest.raises(MessageError, match="needs a seed"):
            RandomK(0.5).decode(Message("delta", encoded.parts, facts))


def test_flatten_and_restore_are_inverse() -> None:
    parts = {
        "a": {"x": torch.randn(2, 3), "s": torch.tensor(4.0)},
        "b": {"e": torch.empty(0, 3), "h": torch.ones(2).half()},
    }
    flat = flatten_floats(Message("delta", parts))
    packed = unpack(flat.pack("cast", {"values": flat.vector}), "cast")
    assert packed.numel == 9
    out = packed.restore(flat.vector)
    for part, name in itertools.chain.from_iterable([(p, n) for n in parts[p]] for p in parts):
        assert torch.equal(out.parts[part][name], parts[part][name])
        assert out.parts[part][name].dtype == parts[part][name].dtype
