"""Graphs as rows: induced subgraphs, labels that are hidden, spectra, and where graphs come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.core.errors import DataError
from atoll.data import graph
from atoll.data.agreement import describe
from atoll.data.dataset import Dataset, Info
from atoll.data.federation import make_federation
from atoll.data.graph import edges_between, laplacian, neighbour_columns, spectrum
from atoll.data.partitions.communities import Communities
from atoll.data.partitions.iid import Iid
from atoll.data.sources.digits import Digits
from atoll.data.sources.graph_files import GraphFiles
from atoll.data.sources.stochastic_blocks import StochasticBlocks


def dataset(ends: list[tuple[int, int]], nodes: int, first: int = 0) -> Dataset:
    columns = {"x": torch.randn(nodes, 3), "y": torch.arange(nodes) % 2}
    columns |= neighbour_columns(np.array(ends, dtype=np.int64).reshape(-1, 2), nodes, "g", first)
    return Dataset(columns, Info(name="g", kind="graph", shape=(3,), num_classes=2))


def pairs(data: Dataset) -> set[tuple[int, int]]:
    """Edges of some rows, by the names of the nodes."""
    node = data.column("node")
    a, b = edges_between(node, data.column("neighbours"))
    return {(int(node[i]), int(node[j])) for i, j in zip(a, b, strict=True)}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_selection_has_the_edges_among_its_rows_and_no_other(data):
    nodes = data.draw(st.integers(1, 9))
    ends = data.draw(st.lists(st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1)), max_size=20))
    rows = data.draw(st.permutations(range(nodes)))[: data.draw(st.integers(0, nodes))]
    first = data.draw(st.sampled_from([0, 100]))
    want = {(a + first, b + first) for a, b in [*ends, *((b, a) for a, b in ends)] if a != b and {a, b} <= set(rows)}
    assert pairs(dataset(ends, nodes, first).select(rows)) == want


def test_a_node_with_too_many_neighbours_is_a_sentence(monkeypatch):
    monkeypatch.setattr(graph, "MOST_NEIGHBOURS", 10)
    with pytest.raises(DataError, match="has 4 neighbours, too many for a graph of 5 nodes"):
        dataset([(0, i) for i in range(1, 5)], 5)


def test_the_laplacian_by_hand():
    edges = edges_between(*(dataset([(0, 1), (1, 2)], 4).column(c) for c in ("node", "neighbours")))
    half = -(0.5**0.5)
    want = [[1, half, 0, 0], [half, 1, half, 0], [0, half, 1, 0], [0, 0, 0, 1]]  # node 3 has no neighbour
    assert torch.allclose(laplacian(edges, 4), torch.tensor(want, dtype=torch.float64))


def test_the_spectrum_rebuilds_the_laplacian_and_its_ends_are_kept(monkeypatch):
    blocks = StochasticBlocks(nodes=60, degree=8).load().train
    edges = edges_between(blocks.column("node"), blocks.column("neighbours"))
    e, u = spectrum(edges, 60)
    assert torch.allclose(u @ torch.diag(e) @ u.T, laplacian(edges, 60).float(), atol=1e-5)
    assert float(e[0]) == pytest.approx(0, abs=1e-5)
    kept, vectors = spectrum(edges, 60, 7)
    assert torch.equal(kept, torch.cat([e[:4], e[-3:]]))
    assert vectors.shape == (60, 7)
    monkeypatch.setattr(graph, "DENSE", 50)
    graph._spectrum.cache_clear()
    sparse, vectors = spectrum(edges, 60, 7)
    assert len(sparse) == 7
    assert torch.allclose(sparse[[0, 1, -1]], e[[0, 1, -1]], atol=1e-5)
    assert torch.allclose(laplacian(edges, 60).float() @ vectors, vectors * sparse, atol=1e-4)
    with pytest.raises(DataError, match="give `pairs`"):
        spectrum(edges, 60)
    graph._spectrum.cache_clear()


# ------------------------------------------------------------------------------------------- sharing


def test_parts_of_a_site_hold_all_its_nodes_and_different_labels():
    federation = make_federation(StochasticBlocks(nodes=90, degree=8), Iid(), sites=3, validation=0.2, test=0.3)
    for own in federation.sites:
        parts = (own.train, own.validation, own.test)
        assert [len(p) for p in parts] == [30, 30, 30]
        assert all(torch.equal(p.column("node"), own.train.column("node")) for p in parts)
        seen = torch.stack([p.column("y") >= 0 for p in parts])
        assert seen.sum(0).tolist() == [1] * 30
        assert seen.sum(1).tolist() == [15, 6, 9]
        assert all(p.columns["x"] is own.train.columns["x"] for p in parts)  # one storage
    nodes = torch.cat([own.train.column("node") for own in federation.sites])
    assert sorted(nodes.tolist()) == list(range(90))
    assert federation.labels["effective_classes"] > 3  # hidden labels do not count
    nothing = make_federation(StochasticBlocks(nodes=90, degree=8), Iid(), sites=3, validation=0.0, test=0.0)
    assert [len(s.test) for s in nothing.sites] == [0, 0, 0]


def test_communities_are_cut_where_edges_are_few():
    clique = [(i, j) for i in range(6) for j in range(i)]
    two = dataset([*clique, *((i + 6, j + 6) for i, j in clique), (0, 6)], 12)
    parts = Communities().assign(two, 2, 0)
    assert sorted(sorted(p.tolist()) for p in parts) == [list(range(6)), list(range(6, 12))]
    blocks = StochasticBlocks(nodes=200, degree=12, homophily=0.95).load().train
    parts = Communities().assign(blocks, 3, 0)
    assert sorted(map(len, parts)) == [66, 67, 67]
    assert sorted(np.concatenate(parts)) == list(range(200))
    kept = sum(len(pairs(blocks.select(p))) for p in parts)
    assert kept > 1.5 * sum(len(pairs(blocks.select(p))) for p in Iid().assign(blocks, 3, 0))
    with pytest.raises(DataError, match="has no edges; use `clusters`"):
        make_federation(Digits(), Communities(), sites=2)


@pytest.mark.parametrize("homophily", [0.8, 0.05])
def test_blocks_have_the_degree_and_homophily_that_were_asked_for(homophily):
    source = StochasticBlocks(nodes=800, degree=20, homophily=homophily)
    for part in (loaded := source.load()).train, loaded.test:
        a, b = edges_between(part.column("node"), part.column("neighbours"))
        y = part.column("y")
        assert len(a) / 800 == pytest.approx(20, rel=0.05)
        assert float((y[a] == y[b]).float().mean()) == pytest.approx(homophily, abs=0.02)
        assert torch.bincount(y).tolist() == [200] * 4
    assert not set(loaded.train.column("node").tolist()) & set(loaded.test.column("node").tolist())
    with pytest.raises(DataError, match="lower `degree`"):
        StochasticBlocks(nodes=20, degree=19, homophily=0.9).load()


# ------------------------------------------------------------------------------------------- files


@pytest.fixture
def files(tmp_path: Path):
    """Five papers; the edge list says one edge twice and has one loop."""
    nodes, edges = tmp_path / "papers.csv", tmp_path / "cites.csv"
    nodes.write_text(
        "id,words,year,topic,lab\na,3,1990,ml,oslo\nb,1,1991,db,lyon\nc,2,1992,,lyon\nd,5,1993,ml,oslo\n7,0,1994,db,oslo\n"
    )
    edges.write_text("from,to\na,b\nb,a\nb,c\nd,d\nd,7\n")

    def source(**more):  # type: ignore[no-untyped-def]
        return GraphFiles(**{"path": str(nodes), "edges": str(edges), "target": "topic", "node": "id", "ends": ("from", "to"),
                             "held_out": 0.0, "site": "lab", **more})  # fmt: skip

    return source, nodes, edges


def test_a_graph_comes_from_two_files(files):
    source, _, _ = files
    data = source().load().train
    assert pairs(data) == {(0, 1), (1, 0), (1, 2), (2, 1), (3, 4), (4, 3)}
    assert data.info.feature_names == ("words", "year")
    assert data.info.class_names == ("db", "ml")
    assert data.column("y").tolist() == [1, 0, -1, 1, 0]
    assert data.info.names["site"] == ("lyon", "oslo")
    assert data.info.skipped == {"edge to itself or a second time": 2}
    assert torch.allclose(data.ready()["x"].mean(0), torch.zeros(2), atol=1e-3)


def test_held_out_nodes_belong_to_no_site_and_show_their_labels_in_the_common_part_alone(files):
    source, _, _ = files
    loaded = source(held_out=0.4).load()
    assert len(loaded.train) == 3
    assert len(loaded.test) == 5
    held = set(range(5)) - set(loaded.train.column("node").tolist())
    shown = {i for i, y in enumerate(loaded.test.column("y").tolist()) if y >= 0}
    assert shown <= held
    assert not any(b in held for _, b in pairs(loaded.train))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"target": "topics"}, "papers.csv has no column `topics`. Did you mean `topic`?"),
        ({"node": "name"}, "has no column `name`"),
        ({"ends": ("from", "into")}, "cites.csv has no column `into`"),
        ({"features": ("words", "lab"), "site": None}, "holds text"),
        ({"node": "year"}, "Edge 1 of cites.csv names node 'a', which papers.csv does not have"),
    ],
)
def test_what_is_wrong_with_files_is_a_sentence(files, change, text):
    with pytest.raises(DataError) as e:
        files[0](**change).load()
    assert text in str(e.value)


def test_a_node_that_stands_twice_is_a_sentence(files):
    source, nodes, _ = files
    nodes.write_text(nodes.read_text() + "a,1,1990,ml,oslo\n")
    with pytest.raises(DataError, match="names the node 'a' twice"):
        source().load()


def test_sites_elsewhere_refuse_a_graph_with_a_sentence():
    own = make_federation(StochasticBlocks(nodes=40, degree=6), Iid(), sites=1).sites[0]
    with pytest.raises(DataError, match="simulate graphs"):
        describe(own, fit=True)
