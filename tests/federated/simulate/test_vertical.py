"""Vertical training equals training in one place; passports in it, and labels that a party infers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from atoll.federated.local.training import Training
from atoll.federated.simulate.vertical import predict_vertical, train_vertical
from atoll.models.passported import insert_passports
from atoll.privacy.label_inference import infer_labels
from atoll.privacy.passports import draw_passports_


@pytest.fixture(scope="module")
def halves():
    """Digits, upper and lower half of each image at two parties."""
    raw = load_digits()
    x, y = torch.tensor(raw.data, dtype=torch.float32) / 16, torch.tensor(raw.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return [x[order][:, :32], x[order][:, 32:]], y[order]


def models(guarded: bool) -> tuple[list[nn.Module], nn.Module]:
    torch.manual_seed(0)
    bottoms = [nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8)) for _ in range(2)]
    top = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    if guarded:  # the party with features alone guards its bottom, the one with labels its top
        insert_passports(bottoms[0], torch.zeros(1, 32), 1, 8)
        insert_passports(top, torch.zeros(1, 16), 1, 8)
        with torch.no_grad():
            draw_passports_(bottoms[0], 5, 1)
            draw_passports_(top, 5, 2)
    return bottoms, top


def test_parties_learn_what_one_owner_of_all_would(halves):
    columns, y = halves
    bottoms, top = models(False)
    whole = nn.ModuleList([*map(copy.deepcopy, bottoms), copy.deepcopy(top)])
    steps = Training(lr=0.1, batch_size=len(y), epochs=3)
    crossed = train_vertical(bottoms, top, columns, y, steps, 0)
    assert crossed == 3 * len(y) * 2 * 2 * 8 * 4  # two parties, up and down, eight floats a row
    for _ in range(3):
        out = whole[2](torch.cat([whole[0](columns[0]), whole[1](columns[1])], 1))
        grads = torch.autograd.grad(F.cross_entropy(out, y), list(whole.parameters()))
        with torch.no_grad():
            for p, g in zip(whole.parameters(), grads, strict=True):
                p -= 0.1 * g
    for ours, theirs in zip([*bottoms, top], whole, strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_passports_in_bottom_and_top_cost_little_and_are_needed(halves):
    columns, y = halves
    train, held = slice(0, 1400), slice(1400, None)
    bottoms, top = models(True)
    train_vertical(bottoms, top, [x[train] for x in columns], y[train], Training(lr=0.1, batch_size=32, epochs=15), 0)

    def accuracy() -> float:
        return float((predict_vertical(bottoms, top, [x[held] for x in columns]).argmax(1) == y[held]).float().mean())

    assert accuracy() > 0.85
    assert accuracy() == accuracy()
    with torch.no_grad():
        draw_passports_(top, 5, 77)
    assert accuracy() < 0.5


def test_a_party_infers_labels_from_its_bottom_model(halves):
    """The attack works on an unprotected model; it is a measure, so it must not be a weak one."""
    columns, y = halves
    bottoms, top = models(False)
    train_vertical(bottoms, top, columns, y, Training(lr=0.1, batch_size=32, epochs=15), 0)
    with torch.no_grad():
        own = bottoms[0](columns[0])
    few = torch.cat([torch.nonzero(y[:300] == c).flatten()[:4] for c in range(10)])
    guess = infer_labels(own[few], y[few], own[300:], 10, torch.Generator().manual_seed(0))
    assert float((guess == y[300:]).float().mean()) > 0.6
    none = infer_labels(torch.randn(40, 8), y[few], torch.randn(len(y) - 300, 8), 10, torch.Generator().manual_seed(0))
    assert float((none == y[300:]).float().mean()) < 0.25
