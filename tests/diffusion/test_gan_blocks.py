"""Discriminators on several blocks of a network, and misaligned pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.data.dataset import Info
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Draw, Work
from atoll.diffusion.exact import ring
from atoll.diffusion.gan_heads import Adversary, ConvHead, blocks_of
from atoll.diffusion.rollouts import clean
from atoll.models.unet import UNet

LADD = Adversary(on="teacher", blocks=4, apart=True, misaligned=True, kind="hinge", weight=0.5, critic_weight=1.0)


def test_blocks_are_spread_over_the_network() -> None:
    net = UNet(width=8).build(Info(name="digits", shape=(1, 8, 8), num_classes=10), 10)
    assert blocks_of(net, 99) == ("down1.0", "down2.0", "middle", "up2.0", "up1.0")
    assert blocks_of(net, 1) == ("middle",)
    assert blocks_of(net, 2) == ("down2.0", "up2.0")
    deep = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleList([nn.Linear(1, 1)]) for _ in range(20))})
    assert blocks_of(deep, 3) == ("blocks.3", "blocks.10", "blocks.16")
    with pytest.raises(AtollError, match="no blocks to look at; name some of its modules in `taps`"):
        LADD.layers(ring())


def test_each_block_has_a_logit_of_its_own(digit_teacher: Denoiser, digit_work: Work) -> None:
    head: Any = LADD.head(digit_teacher, digit_work)
    assert len(head.bodies) == 4
    for out in head.outs:
        nn.init.normal_(out.weight)
    nets = {"teacher": digit_teacher, "head": head}
    x, cond = torch.randn(5, 1, 8, 8), torch.arange(5)
    apart = LADD.logits(nets, x, cond, _draw(digit_work))
    assert apart.shape == (5, 4)
    head.apart = False
    assert torch.allclose(LADD.logits(nets, x, cond, _draw(digit_work)), apart.mean(1), atol=1e-6)


def _draw(work: Work, seed: int = 0) -> Draw:
    return Draw(work, torch.Generator().manual_seed(seed), 0, 1)


def test_misaligned_pairs_are_fakes(digit_teacher: Denoiser, digit_work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Tensor, Tensor]] = []

    def logits(self: Adversary, nets: Any, x: Tensor, cond: Tensor, *_: Any) -> Tensor:
        asked.append((x, cond))
        return torch.full((len(x), 4), [0.25, -0.5, 0.5][len(asked) - 1])

    monkeypatch.setattr(Adversary, "logits", logits)
    x, cond = _draw(digit_work).real(16)
    sample = clean(torch.zeros_like(x), cond)
    loss = LADD.critic_loss({"teacher": digit_teacher}, sample, _draw(digit_work))
    (real, right), (made, _), (again, wrong) = asked
    assert torch.equal(made, sample.x)
    kept = [i for i in range(16) if cond[i - 1] != cond[i]]
    assert torch.equal(real, x)
    assert torch.equal(right, cond)
    assert torch.equal(again, x[kept])
    assert torch.equal(wrong, cond[[i - 1 for i in kept]])
    assert not (wrong == cond[kept]).any()
    # hinge: 1 - 0.25 for real rows; 1 - 0.5 for 16 generated ones, 1 + 0.5 for the misaligned
    fake = (16 * 0.5 + len(kept) * 1.5) / (16 + len(kept))
    assert float(loss) == pytest.approx(0.5 * (0.75 + fake))


def test_embeddings_can_be_misaligned_and_equal_ones_cannot() -> None:
    class Net(nn.Module):
        taps = ("dense",)

        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(4, 2)

        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            out: Tensor = self.dense(torch.cat([x, cond], 1))
            return out

    teacher = Denoiser(Net(), ring().schedule, "flow")
    nets = {"teacher": teacher, "head": ConvHead([2], None, apart=True)}
    rows: list[int] = []
    teacher.register_forward_hook(lambda _, inputs, out: rows.append(len(inputs[0])))

    class Some:
        def __init__(self, cond: Tensor) -> None:
            self.cond, self.generator = cond, torch.Generator().manual_seed(0)

        def real(self, n: int) -> tuple[Tensor, Tensor]:
            return torch.randn(n, 2), self.cond

        def ratios(self, law: Any, n: int) -> Tensor:
            return torch.ones(n)

        noise_like = staticmethod(torch.randn_like)

    adversary = Adversary(on="teacher", misaligned=True, kind="hinge")
    for cond, expected in ((torch.randn(6, 2), [6, 6, 6]), (torch.ones(6, 2), [6, 6])):
        rows.clear()
        adversary.critic_loss(nets, clean(torch.randn(6, 2), cond), Some(cond))  # type: ignore[arg-type]
        assert rows == expected
