"""Checkpoints as vectors: what mixing them must keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from atoll.core.errors import DataError
from atoll.core.tree import clone, equal, named_tensors
from atoll.diffusion.trail import CheckpointTrail, Recorder, put, vector
from atoll.models.weights import write_weights


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    made(torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)))
    return made


def test_a_vector_goes_back_to_where_it_came_from() -> None:
    a, b = net(0), net(1)
    put(vector(a), b)
    assert equal(named_tensors(a), named_tensors(b))


def test_counters_stay_and_other_types_are_kept() -> None:
    a = net(0).to(torch.bfloat16)
    a[1](torch.randn(8, 4, dtype=torch.bfloat16))  # type: ignore[index]
    before = clone(named_tensors(a))
    put(2 * vector(a), a)
    after = named_tensors(a)
    assert after["1.num_batches_tracked"] == before["1.num_batches_tracked"] == 2
    assert after["0.weight"].dtype == torch.bfloat16
    assert torch.equal(after["0.weight"], 2 * before["0.weight"])
    assert vector(a).dtype == torch.float32


@settings(deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.integers(0, 99))
def test_equal_checkpoints_make_that_checkpoint_whatever_the_coefficients(free: list[float], seed: int) -> None:
    row = torch.randn(50, generator=torch.Generator().manual_seed(seed))
    a = torch.tensor([1 - sum(free), *free], dtype=torch.float64)
    assert torch.equal(CheckpointTrail(row.repeat(len(a), 1)).mix(a), row)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 999))
def test_a_mix_is_the_weighted_sum(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 20, generator=generator)
    a = torch.randn(count, generator=generator, dtype=torch.float64)
    a = a + (1 - a.sum()) / count
    mixed = CheckpointTrail(rows).mix(a)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.double(), a @ rows.double(), rtol=1e-4, atol=1e-4)
    for i in range(count):
        alone = torch.eye(count, dtype=torch.float64)[i]
        torch.testing.assert_close(CheckpointTrail(rows).mix(alone), rows[i], rtol=0, atol=1e-6)


def test_files_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets = [net(i) for i in range(3)]
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path, each in zip(paths, nets, strict=True):
        write_weights(path, each)
    read: list[str] = []
    from atoll.diffusion import trail as module

    plain = module.read_weights
    monkeypatch.setattr(module, "read_weights", lambda p: (read.append(Path(p).name), plain(p))[1])
    on_disk = CheckpointTrail.files(paths, nets[0])
    assert len(on_disk) == 3
    assert not read
    target = net(9)
    on_disk.put(1, target)
    assert read == ["1.safetensors"]
    assert torch.equal(vector(target), vector(nets[1]))
    a = torch.tensor([0.5, 1.5, -1.0], dtype=torch.float64)
    in_memory = CheckpointTrail([vector(n) for n in nets])
    assert torch.equal(on_disk.mix(a), in_memory.mix(a))


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    write_weights(tmp_path / "a.safetensors", nn.Linear(2, 2))
    trail = CheckpointTrail.files([tmp_path / "a.safetensors"], net(0))
    with pytest.raises(DataError, match="is no checkpoint of this network"):
        trail.rows[0]


def test_a_recorder_is_state() -> None:
    recorder = Recorder(2, net(0))
    recorder.write(1, net(5))
    assert set(named_tensors(recorder)) == {"rows"}
    assert torch.equal(recorder.trail.rows[1], vector(net(5)))
    assert not recorder.trail.rows[0].any()
