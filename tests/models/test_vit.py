"""The vision transformer against torch's own encoder, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from atoll.core.errors import DataError
from atoll.data.dataset import Info
from atoll.models.model import build_model
from atoll.models.vit import ViT

INFO = Info(name="pictures", kind="image", shape=(3, 8, 12), num_classes=5)
SMALL = ViT(patch=4, dim=16, layers=2, heads=2)


def torchs(model):  # type: ignore[no-untyped-def]
    """The same network from torch's encoder layers, with its weights."""
    layers = nn.ModuleList(
        nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True) for _ in model.blocks
    )
    for layer, block in zip(layers, model.blocks, strict=True):
        a = block.attention
        qkv = (a.q_proj, a.k_proj, a.v_proj)
        layer.load_state_dict({
            "self_attn.in_proj_weight": torch.cat([p.weight for p in qkv]),
            "self_attn.in_proj_bias": torch.cat([p.bias for p in qkv]),
            "self_attn.out_proj.weight": a.o_proj.weight, "self_attn.out_proj.bias": a.o_proj.bias,
            "linear1.weight": block.up_proj.weight, "linear1.bias": block.up_proj.bias,
            "linear2.weight": block.down_proj.weight, "linear2.bias": block.down_proj.bias,
            "norm1.weight": block.norm1.weight, "norm1.bias": block.norm1.bias,
            "norm2.weight": block.norm2.weight, "norm2.bias": block.norm2.bias,
        })  # fmt: skip
    return layers


def test_it_is_the_encoder_of_the_paper():
    model = build_model(SMALL, INFO, 5, 0).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.1)  # so that no norm or bias is at its start
    x = torch.randn(4, 3, 8, 12)
    patches = nn.functional.unfold(x, 4, stride=4).transpose(1, 2)  # [B, 6, 48], row by row
    w = model.state_dict()
    tokens = patches @ w["embedding.patch.weight"].flatten(1).T + w["embedding.patch.bias"]
    tokens = torch.cat([w["embedding.cls"].expand(4, 1, -1), tokens], 1) + w["embedding.position"]
    for layer in torchs(model):
        tokens = layer(tokens)
    feature = nn.functional.layer_norm(tokens[:, 0], (16,), w["norm.weight"], w["norm.bias"])
    assert torch.allclose(model.features(x), feature, atol=1e-5)
    assert torch.allclose(model(x), feature @ w["head.weight"].T + w["head.bias"], atol=1e-5)


@pytest.mark.parametrize(
    ("network", "text"), [(ViT(patch=5), "`patch`"), (ViT(patch=2, dim=6, heads=4), "multiple of `heads`")]
)
def test_what_cannot_be_cut_is_refused(network, text):
    with pytest.raises(DataError, match=text):
        network.build(INFO, 5)
    with pytest.raises(DataError, match="vit takes images"):
        network.build(Info(name="rows", shape=(5,)), 2)
