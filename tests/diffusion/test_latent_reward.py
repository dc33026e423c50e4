"""A network that learns a reward from its answers, and when it is believed."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor

from atoll.core.build import describe, find, names_in
from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Conditions, Draw, Work
from atoll.diffusion.latent_reward import LatentReward, LatentRewardNet, rank_correlation
from atoll.diffusion.rewards import ClassConfidence, InkFraction, PngSize, Reward, scores


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30))
def test_rank_correlation_is_spearmans(pairs: list[tuple[int, int]]) -> None:
    a, b = torch.tensor(pairs, dtype=torch.float32).T
    if len(a.unique()) == 1 or len(b.unique()) == 1:
        assert rank_correlation(a, b) == 0
    else:
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a.numpy(), b.numpy()).statistic, abs=1e-9)


# ------------------------------------------------------------------------------------------- rewards


def test_rewards_have_names_and_descriptions() -> None:
    assert set(names_in(Reward.package, Reward)) == {"ink_fraction", "png_size", "class_confidence"}
    for name in names_in(Reward.package, Reward):
        made = find(Reward.package, name, Reward)()
        assert describe(made)["name"] == name


def test_ink_is_counted() -> None:
    x = torch.tensor([[0.1, -1.0, 3.0, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    cond = torch.zeros(2, dtype=torch.int64)
    assert InkFraction()(x, cond).tolist() == [0.5, 0.0]
    assert InkFraction(threshold=1.0)(x, cond).tolist() == [0.25, 0.0]
    assert InkFraction(wanted=0.4)(x, cond).tolist() == pytest.approx([-0.1, -0.4])


def png(grey: Tensor) -> bytes:
    """A grey PNG file ``[H, W]`` of bytes, every row filtered by Sub, written out by hand."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    h, w = grey.shape
    rows = b""
    for row in grey.tolist():
        rows += bytes([1, row[0], *((row[i] - row[i - 1]) % 256 for i in range(1, w))])
    head = struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def test_the_size_is_that_of_a_png_file() -> None:
    x = 0.7 * torch.randn(5, 2, 6, 9)
    x[4] = 0.0
    grey = ((x + 1) / 2 * 255).round().clamp(0, 255).long()
    found = PngSize()(x, torch.zeros(5, dtype=torch.int64))
    for i in range(5):
        assert -1000 * float(found[i]) == pytest.approx(len(png(grey[i].flatten(0, 1))) - 57)  # all else of the file
    assert found.argmax() == 4
    PIL = pytest.importorskip("PIL.Image")
    import io

    read = torch.tensor(list(PIL.open(io.BytesIO(png(grey[0].flatten(0, 1)))).tobytes()))
    assert torch.equal(read, grey[0].flatten())
    with pytest.raises(AtollError, match="`low` below `high`"):
        PngSize(1.0, 1.0)


def test_a_classifier_prefers_what_was_asked_for(digit_images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, int]] = []

    def least_squares(images: Any, seed: int) -> Any:
        asked.append((images.sigma_data, seed))
        x, y = images.all()
        fit = torch.linalg.lstsq(x.flatten(1), torch.nn.functional.one_hot(y, 10).float()).solution
        layer = torch.nn.Linear(64, 10, bias=False)
        layer.weight.data = 5 * fit.T
        return torch.nn.Sequential(torch.nn.Flatten(), layer).requires_grad_(False)

    monkeypatch.setattr("atoll.diffusion.rewards.make_judge", least_squares)
    x, y = digit_images.all(200)
    reward = ClassConfidence()
    said = reward(x, y)
    assert (said <= 0).all()
    assert float((said > reward(x, (y + 1) % 10)).float().mean()) > 0.95
    assert asked == [(0.5, 1)]  # once, and not the judge that samples are measured with, whose seed is 0


@pytest.mark.parametrize(
    ("reward", "what"),
    [
        (lambda x, c: x, r"a tensor of shape \(4, 2\)"),
        (lambda x, c: 1.0, r"a tensor of shape \(\)"),
        (lambda x, c: x[:, 0] / 0, "some that are not finite"),
    ],
)
def test_a_reward_that_is_not_one_number_a_sample_is_refused(reward: Callable[..., Any], what: str) -> None:
    with pytest.raises(AtollError, match=f"for 4 samples it said {what}"):
        scores(reward, torch.zeros(4, 2), torch.zeros(4))


def test_a_reward_gets_samples_without_a_graph() -> None:
    def reward(x: Tensor, cond: Tensor) -> Tensor:
        assert not x.requires_grad
        assert not torch.is_grad_enabled()
        return x[:, 0]

    x = torch.randn(4, 2, requires_grad=True)
    assert torch.equal(scores(reward, 2 * x, torch.zeros(4)), 2 * x.detach()[:, 0])  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- the network


def made(work: Work, teacher: Denoiser, **more: Any) -> tuple[LatentReward, LatentRewardNet]:
    torch.manual_seed(0)
    knobs = LatentReward(**{"reward": InkFraction(), "keep": 64, **more})  # type: ignore[arg-type]
    return knobs, knobs.net(teacher, work)


def ring_draw(work: Work, step: int = 0, steps: int = 10) -> Draw:
    return Draw(work, torch.Generator().manual_seed(step), step, steps)


def test_the_memory_keeps_the_newest(ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    _, net = made(ring_work(), ring_teacher, keep=8)
    x = torch.arange(20.0)[:, None].expand(20, 2)
    for part in (slice(0, 5), slice(5, 10)):
        net.told(x[part], torch.arange(20)[part] % 4, x[part, 0])
    assert sorted(net.score.tolist()) == list(range(2, 10))
    net.told(x[10:], torch.arange(20)[10:] % 4, x[10:, 0])
    # The last batch is larger than the memory: its first eight rows are kept.
    assert sorted(net.score.tolist()) == list(range(10, 18))
    assert torch.equal(net.x[:, 0], net.score)
    assert torch.equal(net.cond, net.score.long() % 4)
    assert int(net.seen) == 18


def test_it_is_judged_on_new_samples_before_it_learns_them(
    ring_teacher: Denoiser, ring_work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that knows only what is in its memory gets no credit for it."""
    _, net = made(ring_work(), ring_teacher)

    def by_heart(x: Tensor, cond: Tensor) -> Tensor:
        same = (x[:, None] == net.x).all(2)
        return (same.float() * net.score).sum(1)

    monkeypatch.setattr(net, "forward", by_heart)
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        net.told(torch.randn(16, 2, generator=g), torch.zeros(16, dtype=torch.int64), torch.randn(16, generator=g))
    assert float(net.trust) == 0.0


def test_trust_is_a_running_mean_that_starts_at_nothing(
    ring_teacher: Denoiser, ring_work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs, net = made(ring_work(), ring_teacher)
    monkeypatch.setattr(net, "forward", lambda x, cond: x[:, 0])
    believed = []
    for n in range(1, 20):
        x = torch.randn(16, 2)
        net.told(x, torch.zeros(16, dtype=torch.int64), 3 * x[:, 0] ** 3)
        assert float(net.trust) == pytest.approx(1 - 0.9**n, abs=1e-5)
        believed.append(knobs.believed(net))
    assert believed == [n >= 16 for n in range(1, 20)]  # 1 - 0.9^16 = 0.815


def test_the_share_rises_from_the_first_step_of_trust(ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    knobs, net = made(ring_work(), ring_teacher, ramp=0.4, reward=lambda x, c: x[:, 0])
    with torch.no_grad():
        net.reader.out.weight.normal_()
    x = torch.randn(256, 2, requires_grad=True)
    cond = torch.zeros(256, dtype=torch.int64)
    main = (3 * x).square().mean()
    (theirs,) = torch.autograd.grad(main, x, retain_graph=True)
    shares = []
    for step in range(9):
        trust = 1.0 if 2 <= step < 8 else 0.1  # in the end it is lost again
        net.trust.fill_(trust)
        list(knobs.learn(net, x, cond, ring_draw(ring_work(), step)))
        net.trust.fill_(trust)
        loss = knobs.generator_loss(net, x, cond, main)
        if loss is None:
            shares.append(0.0)
            continue
        (ours,) = torch.autograd.grad(loss, x)
        shares.append(float(ours.norm() / theirs.norm()))
    assert shares == pytest.approx([0, 0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0], abs=1e-5)


def test_a_network_without_slope_adds_nothing(ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    knobs, net = made(ring_work(), ring_teacher)
    net.trust.fill_(1.0)
    net.ramp.fill_(1.0)
    x = torch.randn(16, 2, requires_grad=True)
    loss = knobs.generator_loss(net, x, torch.zeros(16, dtype=torch.int64), x.square().mean())
    assert loss is not None
    (slope,) = torch.autograd.grad(loss, x)
    assert torch.equal(slope, torch.zeros_like(slope))


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (4, 8, 8)])
def test_it_learns_a_step_function(shape: tuple[int, ...], digit_teacher: Denoiser) -> None:
    """Rank correlation on fresh samples rises above what is asked for, whatever the samples' shape."""
    work = Work(shape, Conditions.classes(10), batch=64)
    torch.manual_seed(0)
    knobs = LatentReward(lambda x, c: (4 * x.flatten(1)[:, :2].mean(1)).round() + 0.2 * c)  # type: ignore[arg-type]
    net = knobs.net(digit_teacher, work)
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(60):
        draw = dataclasses.replace(ring_draw(work, step), work=work)
        x, cond = draw.noise(), draw.cond()
        for _, losses in knobs.learn(net, x, cond, draw):
            optimiser.zero_grad()
            losses["regression"].backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    assert knobs.believed(net), float(net.trust)


def test_resumed_it_remembers(ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    _, net = made(ring_work(), ring_teacher)
    assert {"x", "cond", "score", "seen", "trust", "ramp"} <= net.state_dict().keys()
