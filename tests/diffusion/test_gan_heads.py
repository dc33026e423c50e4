"""Discriminators: what the best one says, and that real and generated rows are treated alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.core.streams import stream
from atoll.data.dataset import Dataset, Info
from atoll.diffusion.denoiser import Denoiser, tapped
from atoll.diffusion.distiller import Conditions, Draw, Images, Work
from atoll.diffusion.gan_heads import Adversary, ConvHead, discriminator_loss, fooling_loss, mean_logits, places
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.losses import DMDLoss
from atoll.diffusion.methods.dmd import DMD
from atoll.diffusion.rollouts import clean
from atoll.diffusion.schedules import EDM, LogNormal
from atoll.diffusion.trainer import Trainer

REAL, FAKE = (0.5, 1.0), (-0.3, 0.7)  # means and deviations


def nodes(n: int = 400) -> Tensor:
    z = math.sqrt(2) * torch.erfinv(2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1)
    return z / z.square().mean().sqrt()


def log_ratio(x: Tensor, level: float = 0.0) -> Tensor:
    """ln p_real / p_fake, with noise of a level on both."""
    logs = []
    for mean, std in (REAL, FAKE):
        variance = std**2 + level**2
        logs.append(-0.5 * (x - mean) ** 2 / variance - 0.5 * math.log(variance))
    return logs[0] - logs[1]


@pytest.mark.parametrize("kind", ["softplus", "bce"])
def test_the_best_logit_is_the_log_density_ratio(kind: Any) -> None:
    """Of two Gaussians it is a parabola, so a parabola can be it."""
    real, fake = (mean + std * nodes() for mean, std in (REAL, FAKE))
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def logit(x: Tensor) -> Tensor:
        return theta[0] + theta[1] * x + theta[2] * x**2

    optimiser = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = discriminator_loss(logit(real), logit(fake), kind)
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call, arg-type]
    x = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)
    assert float((logit(x).detach() - log_ratio(x)).abs().max()) < 0.1


def test_losses_at_points() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    assert float(discriminator_loss(real, fake, "hinge")) == pytest.approx(0.5 * (0.25 + 0.625))
    both = sum(math.log1p(math.exp(-r)) + math.log1p(math.exp(f)) for r, f in zip([2.0, 0.5], [-3, 0.25], strict=True))
    assert float(discriminator_loss(real, fake, "softplus")) == pytest.approx(both / 2, rel=1e-5)
    assert float(discriminator_loss(real, fake, "bce")) == pytest.approx(both / 4, rel=1e-5)
    assert float(fooling_loss(fake, "hinge")) == pytest.approx(1.375)
    soft = (math.log1p(math.exp(3)) + math.log1p(math.exp(-0.25))) / 2
    assert float(fooling_loss(fake)) == pytest.approx(soft, rel=1e-5)


@pytest.mark.parametrize("kind", ["softplus", "bce", "hinge"])
def test_both_sides_pull_the_right_way(kind: Any) -> None:
    real, fake = (torch.zeros(4, requires_grad=True) for _ in range(2))
    r, f = torch.autograd.grad(discriminator_loss(real, fake, kind), (real, fake))
    assert (r < 0).all()  # descending raises real logits
    assert (f > 0).all()
    (g,) = torch.autograd.grad(fooling_loss(fake, kind), fake)
    assert (g < 0).all()


def test_features_of_any_shape_become_places() -> None:
    assert places(torch.zeros(2, 3, 4, 5)).shape == (2, 3, 20)
    assert places(torch.zeros(2, 7, 3)).shape == (2, 3, 7)  # tokens come before channels
    assert places(torch.zeros(2, 3)).shape == (2, 3, 1)
    f = torch.arange(24.0).view(1, 2, 3, 4)
    assert torch.equal(mean_logits([f, f.flatten(2).transpose(1, 2)])[0], torch.arange(6.0, 18.0).repeat(2))


def test_a_head_starts_undecided_and_reads_class_and_features() -> None:
    torch.manual_seed(0)
    head = ConvHead([3, 5], classes=4)
    g = stream(0, "head")
    features = [torch.randn(2, 3, 4, 4, generator=g), torch.randn(2, 6, 5, generator=g)]
    cond = torch.tensor([0, 1])
    assert torch.equal(head(features, cond), torch.zeros(2))
    for out in head.outs:
        nn.init.normal_(out.weight)  # type: ignore[arg-type]
    said = head(features, cond)
    assert said.shape == (2,)
    assert not torch.allclose(said, head(features, cond.flip(0)))
    assert head(features, torch.tensor([4, 4])).shape == (2,)  # the null condition has a label too
    flipped = [features[0].flip(2), features[1].flip(1)]
    assert torch.allclose(said, head(flipped, cond), atol=1e-5)  # where something is does not matter
    assert not torch.allclose(said, head([2 * f + 1 for f in features], cond), atol=1e-3)


# ------------------------------------------------------------------------------------------- within a method


class Line(nn.Module):
    """For numbers ``x [B, 1]``: random features of the noisy number and its noise level."""

    taps = ("features",)

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.out = nn.Linear(width, 1)
        self.log: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        self.log.append((x.detach(), t))
        out: Tensor = self.out(self.features(torch.cat([x, t[:, None]], 1)))
        return out


def line(rows: int = 4000) -> tuple[Denoiser, Work]:
    torch.manual_seed(0)
    x = REAL[0] + REAL[1] * torch.randn(rows, 1, generator=stream(0, "rows"))
    data = Dataset({"x": x, "y": torch.zeros(rows, dtype=torch.int64)}, Info(name="line", shape=(1,), num_classes=1))
    work = Work((1,), Conditions.classes(1), Images(data, sigma_data=1.0), batch=512)
    return Denoiser(Line(), EDM(), "edm", classes=1, sigma_data=1.0), work


def draw(work: Work, step: int = 0) -> Draw:
    return Draw(work, torch.Generator().manual_seed(step), step, 100)


def test_a_trained_head_estimates_the_ratio_at_a_noise_level() -> None:
    """Head and features learn together, as in DMD2, at one noise level; the ratio is that of the noised laws."""
    net, work = line()
    adversary = Adversary(critic_weight=1.0, law=LogNormal(math.log(0.5), 1e-4))
    head: Any = adversary.head(net, work)
    nets: dict[str, nn.Module] = {"fake": net, "head": head}
    optimiser = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=5e-3)
    g = stream(1, "fakes")
    for step in range(200):
        optimiser.param_groups[0]["lr"] = 5e-3 * (1 - step / 200)
        made = FAKE[0] + FAKE[1] * torch.randn(512, 1, generator=g)
        loss = adversary.critic_loss(nets, clean(made, torch.zeros(512, dtype=torch.int64)), draw(work, step))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    x = torch.linspace(-1.2, 1.4, 14)[:, None]
    cond, t = torch.zeros(14, dtype=torch.int64), torch.full((14,), 0.5)
    with torch.no_grad(), tapped(net, adversary.layers(net)) as features:
        net(x, t, cond)
        ratio = adversary.density_ratio(nets, list(features.values()), cond)
    assert float((ratio.log() - log_ratio(x, 0.5)[:, 0]).abs().mean()) < 0.1


def test_real_and_generated_rows_meet_the_same_law_with_noise_of_their_own() -> None:
    net, work = line(rows=64)
    adversary = Adversary(learned=False, law=LogNormal(0.3, 0.5))
    work = replace(work, batch=4000)
    made = clean(torch.zeros(4000, 1), torch.zeros(4000, dtype=torch.int64))
    net.net.log.clear()  # type: ignore[union-attr, operator]
    adversary.critic_loss({"fake": net}, made, draw(work))
    # x / sqrt(s^2 + 1) and ln(s) / 4 are what the preconditioned network is told
    log: Any = net.net.log
    (_, t_real), (x_fake, t_fake) = log
    for t in (t_real, t_fake):
        assert float((4 * t).mean()) == pytest.approx(0.3, abs=0.05)
        assert float((4 * t).std()) == pytest.approx(0.5, abs=0.05)
    assert abs(float(torch.corrcoef(torch.stack([t_real, t_fake]))[0, 1])) < 0.08
    s = (4 * t_fake).exp()
    eps = x_fake[:, 0] * (s**2 + 1).sqrt() / s
    assert float(eps.std()) == pytest.approx(1.0, abs=0.05)


def test_gradients_go_where_they_belong() -> None:
    """The critic's to head and features, not into the sample; the generator's into the sample."""
    net, work = line(rows=64)
    adversary = Adversary(r1=0.1)
    head: Any = adversary.head(net, work)
    nn.init.normal_(head.outs[0].weight)
    nets: dict[str, nn.Module] = {"fake": net, "head": head}
    x = torch.randn(8, 1, requires_grad=True)
    sample = clean(x, torch.zeros(8, dtype=torch.int64))
    loss = adversary.critic_loss(nets, sample, draw(work))
    features = next(net.net.features.parameters())  # type: ignore[union-attr, operator]
    found = torch.autograd.grad(loss, (x, features, head.outs[0].weight), allow_unused=True)
    assert found[0] is None
    assert all(v is not None and float(v.abs().sum()) > 0 for v in found[1:])
    (pull,) = torch.autograd.grad(adversary.generator_loss(nets, sample, draw(work)), x)
    assert float(pull.abs().sum()) > 0
    double = replace(adversary, weight=2 * adversary.weight)
    (twice,) = torch.autograd.grad(double.generator_loss(nets, sample, draw(work)), x)
    assert torch.allclose(twice, 2 * pull)


def test_the_penalty_is_on_a_small_step() -> None:
    net, work = line(rows=64)
    adversary, sample = Adversary(learned=False), clean(torch.zeros(512, 1), torch.zeros(512, dtype=torch.int64))
    log: Any = net.net.log  # type: ignore[union-attr]
    log.clear()
    with torch.no_grad():
        plain = adversary.critic_loss({"fake": net}, sample, draw(work))
        smooth = replace(adversary, r1=10.0).critic_loss({"fake": net}, sample, draw(work))
    assert float(smooth) > float(plain)
    (x, t), _, (nudged, same) = log[2:]
    assert torch.equal(t, same)  # level and noise are those of the row itself
    step = (nudged - x)[:, 0] * ((8 * t).exp() + 1).sqrt()
    assert float(step.std()) == pytest.approx(0.1, abs=0.01)


def test_ratios_stay_within_their_bounds() -> None:
    adversary = Adversary(learned=False, clip=10.0)
    features = [torch.tensor([[[-50.0]], [[0.0]], [[math.log(3)]], [[50.0]]])]
    found = adversary.density_ratio({}, features, torch.zeros(4))
    assert found.tolist() == pytest.approx([0.1, 1.0, 3.0, 10.0], rel=1e-5)


@pytest.mark.parametrize("on", ["fake", "teacher"])
@pytest.mark.parametrize("learned", [True, False])
def test_methods_train_with_it(on: Any, learned: bool, ring_work: Callable[..., Work], digit_teacher: Denoiser,
                               digit_work: Work) -> None:  # fmt: skip
    """On images and on points; the teacher stays as it is, a ratio is read from the network that is judged by."""

    class Ratio(DMDLoss):
        needs_ratio = True

        def __call__(self, sample: Any, probe: Any) -> Tensor:
            assert probe.rho.shape == (len(sample.x),)
            assert not probe.rho.requires_grad
            return super().__call__(sample, probe) * probe.rho.mean()

    work = ring_work(16, images=True)
    assert work.build is not None
    for teacher, given in ((digit_teacher, digit_work), (work.build(), work)):
        method = DMD(Ratio(), adversary=Adversary(on=on, learned=learned))
        trainer = Trainer(method, teacher, given, 2)
        before = [p.clone() for p in teacher.parameters()]
        losses = trainer.once()
        assert losses.keys() == {"fake/denoising", "fake/discriminator", "student/scores", "student/adversary"}
        assert all(math.isfinite(v) for v in losses.values())
        assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
        assert ("head" in trainer.roles) is learned


@pytest.mark.parametrize("on", ["fake", "teacher"])
def test_the_ratio_is_read_where_the_discriminator_looks(
    on: Any, digit_teacher: Denoiser, digit_work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of the judging network at the probe's own point, for the samples' conditions (guided: twice the rows)."""

    class Ratio(DMDLoss):
        needs_ratio = True

    seen: list[list[Tensor]] = []
    plain = Adversary.density_ratio

    def spied(self: Adversary, nets: Any, features: Any, cond: Tensor) -> Tensor:
        seen.append(features)
        return plain(self, nets, features, cond)

    monkeypatch.setattr(Adversary, "density_ratio", spied)
    method = DMD(Ratio(), adversary=Adversary(on=on, learned=False), guidance=Guidance(2.0))
    nets: Any = Trainer(method, digit_teacher, digit_work, 2).nets
    with torch.no_grad():
        next(nets["fake"].net.inward.parameters()).add_(0.1)  # so that the two differ
        d = draw(digit_work)
        sample = method.rollout(nets["student"], d)
        probe = method.probe(nets, sample, d)
        with tapped(nets[on], method.adversary.layers(nets[on])) as features:  # type: ignore[union-attr]
            nets[on](probe.x_t, probe.t, sample.cond)
    assert torch.allclose(seen[0][0], next(iter(features.values())), atol=1e-5)


def test_a_loss_that_needs_the_ratio_needs_a_discriminator(digit_teacher: Denoiser, digit_work: Work) -> None:
    class Ratio(DMDLoss):
        needs_ratio = True

    with pytest.raises(AtollError, match=r"Ratio needs the density ratio .* give the method an `adversary`"):
        Trainer(DMD(Ratio()), digit_teacher, digit_work, 1)
