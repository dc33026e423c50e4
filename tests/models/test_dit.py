"""The diffusion transformer; what it shares with the U-Net is in ``test_unet.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.core.streams import stream
from atoll.data.dataset import Info
from atoll.models.dit import Attention, DiT, DiTBlock, DiTNet
from atoll.models.model import build_model


def info(shape: tuple[int, ...]) -> Info:
    return Info(name="pictures", kind="image", shape=shape, num_classes=4)


def test_attention_is_softmax_of_scaled_products() -> None:
    torch.manual_seed(0)
    at, x = Attention(16, 2), torch.randn(3, 5, 16, generator=stream(0, "x"))
    q, k, v = at.qkv(x).chunk(3, -1)
    heads = []
    for h in (slice(0, 8), slice(8, 16)):
        weight = torch.softmax(q[..., h] @ k[..., h].transpose(1, 2) / 8**0.5, -1)
        heads.append(weight @ v[..., h])
    assert torch.allclose(at(x), at.out(torch.cat(heads, -1)), atol=1e-5)


def test_a_block_starts_as_the_identity_and_its_gates_open_it() -> None:
    torch.manual_seed(0)
    block, g = DiTBlock(16, 2), stream(1, "x")
    x, e = torch.randn(2, 5, 16, generator=g), torch.randn(2, 16, generator=g)
    assert torch.equal(block(x, e), x)
    with torch.no_grad():
        block.modulate.bias[32:48] = 1.0  # the attention's gate
    assert torch.allclose(block(x, e), x + block.attention(F.layer_norm(x, (16,))), atol=1e-5)
    with torch.no_grad():
        block.modulate.bias[32:48] = 0.0
        block.modulate.bias[80:] = 2.0  # and the other one
    mixed = block.down(F.gelu(block.up(F.layer_norm(x, (16,))), approximate="tanh"))
    assert torch.allclose(block(x, e), x + 2 * mixed, atol=1e-5)


def test_patches_come_back_where_they_were() -> None:
    """With patches passed through unmixed, the picture is the same."""
    model = build_model(DiT(patch=2, dim=16, layers=1, heads=2), info((2, 4, 6)), 4, 0)
    assert isinstance(model, DiTNet)
    x = torch.randn(3, 2, 4, 6, generator=stream(2, "x"))
    seen: list[Tensor] = []
    model.inward.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.outward.register_forward_hook(lambda *_: seen[0])  # its answer: the patches that came in
    assert torch.equal(model(x, torch.zeros(3), torch.zeros(3).long()), x)
    assert seen[0].shape == (3, 6, 8)


def test_places_matter() -> None:
    model = build_model(DiT(patch=2, dim=16, layers=1, heads=2), info((1, 4, 4)), 4, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=stream(3, "p", p.numel())))
    x, t, cond = torch.ones(1, 1, 4, 4), torch.zeros(1), torch.zeros(1).long()
    patches = F.pixel_unshuffle(model(x, t, cond).detach(), 2).flatten(2)[
        0
    ]  # equal patches in, one answer per place out
    assert float((patches[:, 0] - patches[:, 1]).abs().max()) > 1e-4
