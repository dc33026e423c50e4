"""The spectral graph transformer: what it may not depend on, and its steps on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from atoll.core.errors import AtollError, DataError
from atoll.data.graph import edges_between, laplacian
from atoll.data.sources.digits import Digits
from atoll.data.sources.stochastic_blocks import StochasticBlocks
from atoll.models import spectral_transformer
from atoll.models.gcn import GCN, mean_over_neighbours
from atoll.models.mlp import MLP
from atoll.models.model import build_model
from atoll.models.on_graph import reads_edges
from atoll.models.spectral_transformer import (
    Spectral,
    SpectralTransformer,
    encode_eigenvalues,
    filtered,
    runge_kutta,
    spectrum,
)

BLOCKS = StochasticBlocks(nodes=40, degree=6).load().train
ROWS = BLOCKS.ready()
EDGES = edges_between(ROWS["node"], ROWS["neighbours"])


def network(**knobs):  # type: ignore[no-untyped-def]
    return build_model(SpectralTransformer(MLP(hidden=(8,)), Spectral(**knobs)), BLOCKS.info, 4, 0).eval()


@pytest.mark.parametrize("order", [1, 2, 4])
def test_nodes_in_another_order_have_the_same_outputs(order):
    model, moved = network(order=order), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    want = model(ROWS["x"], EDGES)
    edges = edges_between(ROWS["node"][moved], ROWS["neighbours"][moved])
    assert torch.allclose(model(ROWS["x"][moved], edges), want[moved], atol=1e-5)
    assert float((want[moved] - want).detach().abs().max()) > 1e-2


def test_signs_and_bases_of_eigenvectors_do_not_matter(monkeypatch):
    """A complete graph has one eigenvalue 39 times: any basis of that space will do."""
    every = (1 - torch.eye(40)).nonzero().T
    model = network()
    for edges in (EDGES, every):
        want = model(ROWS["x"], edges)
        values, vectors = spectrum(edges, 40)
        other = vectors * torch.tensor([1.0, -1.0] * 20)
        if edges is every:
            turn = torch.linalg.qr(torch.randn(39, 39, generator=torch.Generator().manual_seed(2)))[0]
            other[:, 1:] = other[:, 1:] @ turn
        monkeypatch.setattr(spectral_transformer, "spectrum", lambda *_, v=values, o=other: (v, o))
        assert torch.allclose(model(ROWS["x"], edges), want, atol=1e-4)
        monkeypatch.undo()


def test_the_laplacians_own_eigenvalues_give_the_laplacian():
    values, vectors = spectrum(EDGES, 40)
    h = torch.randn(40, 3)
    twice = torch.stack([values, torch.ones(40)], 1)
    first, second = filtered(vectors, twice, h)
    assert torch.allclose(first, laplacian(EDGES, 40).float() @ h, atol=1e-5)
    assert torch.allclose(second, h, atol=1e-5)


def test_a_layer_is_a_runge_kutta_step_of_the_change_alone():
    """dx/dt = x from 1: Euler 2, Heun 2.5, Kutta 1 + 1 + 1/2 + 1/6 + 1/24. No change leaves x, and not 2 x."""
    one = torch.ones(1, dtype=torch.float64)
    for order, want in ((1, 2.0), (2, 2.5), (4, 65 / 24)):
        assert float(runge_kutta(lambda x: x, one, order)) == pytest.approx(want)
        assert float(runge_kutta(torch.zeros_like, one, order)) == 1.0
    still = network().spectra
    for change in still.layers:  # what ends attention and feed-forward: then nothing changes
        for p in (*change.out.parameters(), *change.down.parameters()):
            nn.init.zeros_(p)
    e = torch.linspace(0, 2, 5)
    assert torch.allclose(still(e), still.decode(still.embed(encode_eigenvalues(e, 32))), atol=1e-6)


def test_codes_of_eigenvalues_by_hand():
    got = encode_eigenvalues(torch.tensor([0.0, 0.03]), 4)
    w = [1.0, 10_000 ** (-2 / 4)]
    want = [0.03, *(math.sin(3 * v) for v in w), *(math.cos(3 * v) for v in w)]
    assert torch.allclose(got[0], torch.tensor([0.0, 0, 0, 1, 1]))
    assert torch.allclose(got[1], torch.tensor(want))


def test_knobs_and_data_that_cannot_be_are_sentences():
    with pytest.raises(AtollError, match="multiple of `heads`"):
        Spectral(dim=10, heads=4)
    with pytest.raises(DataError, match="needs the edges of a graph"):
        network()(ROWS["x"])
    with pytest.raises(DataError, match="gcn reads the edges of a graph"):
        build_model(GCN(), Digits().load().train.info, 10, 0)


def test_a_gcn_layer_by_hand():
    """Nodes 0 - 1, node 2 alone: with itself a node of degree 1 counts twice."""
    edges, h = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[2.0], [4.0], [5.0]])
    assert torch.allclose(mean_over_neighbours(h, edges), torch.tensor([[3.0], [3.0], [5.0]]))
    path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    got = mean_over_neighbours(torch.tensor([[1.0], [0.0], [0.0]]), path)
    assert torch.allclose(got[:, 0], torch.tensor([1 / 2, 1 / math.sqrt(6), 0.0]))


class Neighbourly(nn.Module):
    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        return x


def test_modules_are_asked_by_their_signature():
    assert reads_edges(Neighbourly())
    assert reads_edges(network())
    assert not reads_edges(nn.Linear(2, 2))
    assert not reads_edges(nn.Sequential(nn.Linear(2, 2)))
