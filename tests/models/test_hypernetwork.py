"""A network that makes weights: its gradient, its size, and who is alike."""

from __future__ import annotations

import torch

from atoll.core.streams import stream
from atoll.models.hypernetwork import generate, pull, start


def phi(sites: int = 8, size: int = 11) -> dict[str, torch.Tensor]:
    """A trained one, in double precision: nothing is zero, no two sites are alike."""
    g = torch.Generator().manual_seed(3)
    return {
        n: torch.randn(t.shape, generator=g, dtype=torch.float64)
        for n, t in start(sites, size, 7, 4, stream(0, "h")).items()
    }


def test_the_first_weights_are_the_common_ones() -> None:
    fresh = start(8, 11, 7, 4, stream(0, "h"))
    assert torch.equal(generate(fresh, range(8)), torch.zeros(8, 11))
    assert fresh["embedding"].shape == (8, 3)  # 1 + N / 4


def test_the_gradient_is_that_of_the_inner_product_with_the_error() -> None:
    """By central differences in every number of phi."""
    weights, sites = phi(), [1, 4, 6]
    error = torch.randn(3, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = pull(weights, sites, error)
    step = 1e-6
    for name, t in weights.items():
        flat = t.view(-1)
        for i in range(0, len(flat), 3):
            at = flat[i].item()
            values = []
            for moved in (at + step, at - step):
                flat[i] = moved
                values.append(float((generate(weights, sites) * error).sum()))
            flat[i] = at
            slope = (values[0] - values[1]) / (2 * step)
            assert abs(slope - float(found[name].view(-1)[i])) < 1e-6 * max(1, abs(slope)), name


def test_who_took_no_part_keeps_its_embedding() -> None:
    grads = pull(phi(), [1, 4], torch.ones(2, 11, dtype=torch.float64))
    moved = grads["embedding"].abs().sum(1) > 0
    assert moved.tolist() == [False, True, False, False, True, False, False, False]


def test_memory_is_the_rank_times_the_weights() -> None:
    fresh = start(100, 10_000, 100, 16, stream(0, "h"))
    assert sum(t.numel() for t in fresh.values()) < 18 * 10_000
