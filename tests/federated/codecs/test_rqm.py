"""The randomised quantisation mechanism on its way: bytes, means, refusals, and what the ledger says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dp_accounting.rdp import compute_epsilon

from atoll.core.errors import AtollError, MessageError, RecipeError
from atoll.core.message import Message, encode
from atoll.core.tree import equal
from atoll.federated import checkpoint
from atoll.federated.backends.inline import Inline
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.check import problems_of
from atoll.federated.codecs.clip import Clip
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.codecs.rqm import Rqm
from atoll.federated.codecs.top_k import TopK
from atoll.federated.combine.median import Median
from atoll.federated.combine.weighted_mean import WeightedMean
from atoll.federated.engine import Engine
from atoll.federated.local.training import Training
from atoll.federated.method import Method
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.privacy import privacy_event, privacy_ledger, spent
from atoll.federated.schedules.buffered import Buffered
from atoll.federated.schedules.synchronous import Synchronous
from atoll.federated.secure.secure_sum import SecureSum
from atoll.privacy.accounting import ORDERS, PrivacyLedger
from atoll.privacy.rqm import grid, probabilities, worst_divergence

NUMBERS = 64 * 32 + 32 + 32 * 10 + 10
UNIFORM = WeightedMean(by="uniform")


def seeded(**more) -> Rqm:  # type: ignore[no-untyped-def]
    return Rqm(**{"clip": 0.05, "dimension": NUMBERS, "test_seed": 3, "allow_insecure_test_seed": True, **more})


def private(codec: Rqm, **parts) -> Method:  # type: ignore[no-untyped-def]
    return fedavg().but(**{"uplink": (codec,), "combine": UNIFORM, **parts})


def message(x: torch.Tensor) -> Message:
    return Message("delta", {"delta": {"w": x}})


@pytest.mark.parametrize(("levels", "bits"), [(2, 1), (3, 2), (4, 2), (9, 4), (16, 4), (17, 5), (256, 8)])
def test_exact_bits(levels, bits) -> None:
    codec, n = Rqm(1.0, 4096, levels=levels, keep=0.3), 4096
    encoded, _ = codec.encode(message(torch.randn(n)), {}, None)
    (codes,) = encoded.parts["rqm"].values()
    assert codes.dtype == torch.uint8
    assert codes.numel() == n * bits // 8
    header = len(encode(encoded)) - n * bits // 8
    assert header < 300


def test_unbiased_and_on_the_grid(travel) -> None:
    x, n = torch.tensor([0.0, 0.013, -0.02, 0.02, -0.0199, 5.0, -math.inf, math.nan]), 20_000
    codec = Rqm(clip=0.02, dimension=8 * n, levels=8, margin=0.5)
    out, _ = travel((codec,), message(x.repeat(n)))
    draws = out.parts["delta"]["w"].view(n, 8).double()
    values = torch.tensor(0.02 * grid(8, 0.5), dtype=torch.float32).double()
    assert set(draws.unique().tolist()) <= set(values.tolist())
    mean = torch.tensor([0.0, 0.013, -0.02, 0.02, -0.0199, 0.02, -0.02, 0.0])
    p = probabilities(mean.numpy() / 0.02, 8, 0.42, 0.5)
    spread = np.sqrt(p @ (0.02 * grid(8, 0.5)) ** 2 - mean.numpy() ** 2)
    assert ((draws.mean(0) - mean).abs().numpy() < 4.5 * spread / n**0.5).all()


def test_no_seed_no_repeat() -> None:
    x, codec = torch.zeros(400), Rqm(1.0, 400)
    one, two = (codec.encode(message(x), {}, None)[0].parts["rqm"]["codes"] for _ in range(2))
    assert not torch.equal(one, two)


def test_what_it_cannot_hide_is_refused_at_the_site() -> None:
    codec = Rqm(1.0, 8)
    with pytest.raises(AtollError, match=r"Rqm cannot hide delta/steps, fact `num_samples`"):
        codec.encode(Message("delta", {"delta": {"steps": torch.tensor([1])}}, {"num_samples": 3}), {}, None)
    with pytest.raises(AtollError, match=r"A message has 9 numbers.*set dimension=9"):
        codec.encode(message(torch.zeros(9)), {}, None)
    with pytest.raises(AtollError, match=r"anybody can repeat"):
        Rqm(1.0, 8, test_seed=0)
    with pytest.raises(AtollError, match=r"too small to account for"):
        Rqm(1.0, 8, levels=256, keep=0.99)


def test_a_decoder_knows_its_levels() -> None:
    encoded, _ = Rqm(1.0, 64, levels=16).encode(message(torch.ones(64)), {}, None)
    with pytest.raises(MessageError, match="a code above 8"):
        Rqm(1.0, 64, levels=9).decode(Message("delta", {"rqm": {"codes": torch.full((32,), 255, dtype=torch.uint8)}}, encoded.facts))  # fmt: skip
    with pytest.raises(MessageError, match="must be U8"):
        Rqm(1.0, 64, levels=9).decode(Message("delta", {"rqm": {"codes": torch.zeros(31, dtype=torch.uint8)}}, encoded.facts))  # fmt: skip


def test_the_ledger_charges_all_coordinates_of_all_rounds() -> None:
    codec = Rqm(1.0, dimension=7, levels=16, margin=2.0)
    method = private(codec)
    one = np.array(worst_divergence(16, 0.42, 2.0, 1, ORDERS))
    cohorts = [(3, 5, True), (5, 5, False), (0, 5, True)]
    expected = compute_epsilon(ORDERS, 2 * 7 * one, 1e-3)[0]
    assert spent(method, cohorts, 5, 1e-3) == pytest.approx(expected)
    assert spent(method, cohorts, 5, 1e-3) <= 2 * 7 * 3.98  # pure epsilon of one, from the card
    assert privacy_event(method, 0, 5, True, 5) is None
    ledger = privacy_ledger(method, cohorts, 5)
    assert [e.count for e in ledger.events] == [2]
    assert ledger.neighbours == "replace"
    again = PrivacyLedger.resume(ledger.state())
    assert again == ledger


def test_a_sum_costs_less_and_missing_replies_cost() -> None:
    local, summed = (private(Rqm(1.0, 3, margin=2.0, summed=s)) for s in (False, True))
    eps = [spent(summed, [(replies, 40, True)], 40, 1e-3) for replies in (1, 10, 40)]
    assert spent(local, [(40, 40, True)], 40, 1e-3) == pytest.approx(eps[0])
    assert eps[0] > eps[1] > eps[2]


def test_an_insecure_seed_spends_everything() -> None:
    assert spent(private(seeded()), [(5, 5, True)], 5) == math.inf


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"combine": WeightedMean()}, r"Rqm bounds one site's influence, but WeightedMean weights sites"),
        ({"schedule": Buffered(k=3)}, r"Rqm is accounted for per round, but under Buffered"),
        ({"uplink": (TopK(0.1), Rqm(1.0, 8))}, r"TopK before Rqm says by its places .* drop TopK"),
        ({"uplink": (Quantise(), Rqm(1.0, 8))}, r"Quantise before Rqm .* drop Quantise"),
        ({"downlink": (Rqm(1.0, 8),)}, r"Rqm bounds or hides .* put it on the uplink"),
        ({"secure": SecureSum()}, r"cannot be added in the form that Rqm"),
        ({"uplink": (Rqm(1.0, 8, summed=True),), "combine": Median()}, r"accounted for as a sum, but Median is not"),
    ],
    ids=["weighted", "buffered", "top_k", "quantise", "down", "secure", "median"],
)
def test_refused_with_a_sentence(parts, text, run) -> None:
    method = private(Rqm(1.0, 8)).but(**parts)
    with pytest.raises(RecipeError, match=text):
        run(method, rounds=1)


def test_it_composes(run) -> None:
    for method in (
        private(seeded()),
        private(seeded(), schedule=Synchronous(deadline=1e6)),
        private(seeded(), combine=Median()),
        private(seeded(), uplink=(Clip(1.0), seeded())),
    ):
        assert problems_of(method) == []
        rows = run(method, rounds=2)
        assert all(r.refused == {} and r.notes == [] for r in rows)
        assert all(0 <= size - NUMBERS // 2 - 1 < 400 for size in rows[-1].up_bytes.values())


def test_it_learns(run) -> None:
    method = fedavg(Training(lr=0.3)).but(uplink=(seeded(clip=0.03),), combine=UNIFORM)
    rows = run(method, rounds=12)
    assert rows[-1].engine.evaluate_global()["accuracy"] > 0.85


def test_other_backends_and_a_resumed_run_have_the_same_bits(run, tmp_path) -> None:
    method = private(seeded())
    weights = lambda rows: rows[-1].engine.state.replica["weights"]  # noqa: E731
    whole = run(method, rounds=3)
    assert equal(weights(whole), weights(run(method, rounds=3, backend=ProcessPool(workers=2))))
    half = run(method, rounds=2)
    checkpoint.save(half[-1].engine.state, tmp_path, {})
    state, _ = checkpoint.load(tmp_path)
    setup = half[-1].engine.setup
    rest = Engine(setup, Inline().open(setup), state)
    rest.step()
    assert equal(weights(whole), rest.state.replica["weights"])
