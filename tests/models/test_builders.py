"""Every builder: equal seeds give equal bits, the global generators are left alone, shapes are right."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

from atoll.core.errors import DataError
from atoll.core.tree import equal, named_tensors
from atoll.data.dataset import Info
from atoll.models.cnn import CNN
from atoll.models.dit import DiT
from atoll.models.lm import LM
from atoll.models.logistic import Logistic
from atoll.models.mlp import MLP
from atoll.models.model import build_model, seeded
from atoll.models.series_transformer import SeriesTransformer
from atoll.models.transformers_model import TransformersModel
from atoll.models.unet import UNet
from atoll.models.user import User
from atoll.models.vit import ViT

IMAGE = Info(name="pictures", kind="image", shape=(3, 13, 9), num_classes=7)
TABLE = Info(name="rows", kind="table", shape=(5,), num_classes=7)
SERIES = Info(name="pumps", kind="series", shape=(3, 10), num_classes=7)
TEXT = Info(name="words", kind="text", shape=(12,), num_classes=30)
GPT = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}


class Noisy(nn.Module):
    """A user's module that draws from every global generator."""

    def __init__(self, outputs: int, width: int = 2) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(outputs, width))
        self.b = nn.Parameter(torch.from_numpy(np.random.rand(3)))  # noqa: NPY002
        self.c = nn.Parameter(torch.tensor(random.random()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :1] * self.a.sum(1) + self.c


CASES = [
    (MLP(hidden=(4,)), IMAGE), (Logistic(start="random"), IMAGE), (Logistic(), TABLE),
    (CNN(channels=(4, 8), dense=6), IMAGE), (CNN(channels=(4, 12), dense=6, norm="group"), IMAGE),
    (CNN(channels=(4, 8), dense=6, norm="batch"), IMAGE), (LM(dim=16, layers=2, heads=2), TEXT),
    (LM(dim=8, layers=1, heads=2, tied=False, norm="layer", dropout=0.1), TEXT),
    (SeriesTransformer(dim=8, layers=1, heads=2, dropout=0.1), SERIES),
    (ViT(patch=1, dim=8, layers=1, heads=2, dropout=0.1), IMAGE), (TransformersModel(config=GPT), TEXT), (User(Noisy, {"width": 3}), IMAGE),
]  # fmt: skip
DENOISERS = [(UNet(width=8, fold=1, numbers=1), IMAGE), (DiT(patch=1, dim=8, layers=1, heads=2), IMAGE)]


def outputs(info: Info) -> int:
    return info.num_classes or 0


@pytest.mark.parametrize(("network", "info"), [*CASES, *DENOISERS], ids=lambda c: repr(c)[:40])
def test_equal_seeds_give_equal_bits_and_leave_the_generators_alone(network, info):
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    first = build_model(network, info, outputs(info), 5)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), str(np.random.get_state()))  # noqa: NPY002
    torch.rand(3)
    random.random()
    np.random.rand(3)  # noqa: NPY002
    again = build_model(pickle.loads(pickle.dumps(network)), info, outputs(info), 5)
    assert equal(named_tensors(first), named_tensors(again))
    other = build_model(network, info, outputs(info), 6)
    if network != Logistic():
        assert not equal(named_tensors(first), named_tensors(other))
    assert hash(network) == hash(pickle.loads(pickle.dumps(network)))
    assert network == pickle.loads(pickle.dumps(network))


@pytest.mark.parametrize(("network", "info"), CASES, ids=lambda c: repr(c)[:40])
def test_outputs_have_the_right_shape(network, info):
    model = build_model(network, info, outputs(info), 0)
    if info.kind == "text":
        out = model(torch.randint(0, 30, (2, *info.shape)))
        out = getattr(out, "logits", out)
        assert out.shape == (2, 12, 30)
    else:
        assert model(torch.randn(2, *info.shape)).shape == (2, 7)


def test_a_failing_builder_restores_the_generators():
    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(ZeroDivisionError), seeded(0, "x"):  # noqa: PT012
        torch.rand(1)
        random.random()
        raise ZeroDivisionError
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_the_cnn_is_the_papers():
    info = Info(name="mnist", kind="image", shape=(1, 28, 28), num_classes=10)
    model = CNN().build(info, 10)
    assert sum(p.numel() for p in model.parameters()) == 1_663_370  # McMahan et al., section 3
    w = model.state_dict()
    x = torch.randn(3, 1, 28, 28)
    h = torch.max_pool2d(torch.relu(torch.conv2d(x, w["conv1.weight"], w["conv1.bias"], padding=2)), 2)
    h = torch.max_pool2d(torch.relu(torch.conv2d(h, w["conv2.weight"], w["conv2.bias"], padding=2)), 2)
    h = torch.relu(h.reshape(3, -1) @ w["dense1.weight"].T + w["dense1.bias"])
    assert torch.allclose(model(x), h @ w["dense2.weight"].T + w["dense2.bias"], atol=1e-5)


def test_a_group_norm_ignores_the_batch_and_a_batch_norm_does_not():
    x = torch.randn(4, 3, 13, 9)
    for norm, same in (("group", True), ("batch", False)):
        model = build_model(CNN(channels=(8, 16), dense=6, norm=norm), IMAGE, 7, 0).train()
        assert torch.allclose(model(x)[:2], model(x[:2]), atol=1e-5) is same
    assert build_model(CNN(channels=(8, 16), norm="group"), IMAGE, 7, 0).norm2.num_groups == 2


def test_a_language_model_does_not_see_the_future():
    model = build_model(LM(dim=16, layers=2, heads=2), TEXT, 30, 0)
    x = torch.randint(0, 30, (1, 12))
    changed = x.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 30
    a, b = model(x), model(changed)
    assert torch.equal(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7:], b[:, 7:])
    assert torch.allclose(model(x[:, :5]), a[:, :5], atol=1e-6)


def test_attention_is_softmax_of_scaled_products():
    model = build_model(LM(dim=16, layers=1, heads=2), TEXT, 30, 0)
    at = model.blocks[0].attention
    x = torch.randn(1, 5, 16)
    want = torch.zeros(5, 16)
    for h in range(2):
        q, k, v = (f(x)[0][:, 8 * h : 8 * h + 8] for f in (at.q_proj, at.k_proj, at.v_proj))
        for t in range(5):
            weight = torch.softmax(q[t] @ k[: t + 1].T / 8**0.5, 0)
            want[t, 8 * h : 8 * h + 8] = weight @ v[: t + 1]
    assert torch.allclose(at(x)[0], at.o_proj(want), atol=1e-5)


def test_tied_weights_are_one_tensor():
    tied, untied = (build_model(LM(dim=16, layers=1, heads=2, tied=t), TEXT, 30, 0) for t in (True, False))
    assert tied.head.weight is tied.embed.weight
    assert "head.weight" not in named_tensors(tied)
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 30 * 16


@pytest.mark.parametrize(
    ("network", "info", "sentence"),
    [
        (MLP(), TEXT, "mlp cannot read tokens"),
        (Logistic(), TEXT, "logistic cannot read tokens"),
        (CNN(), TABLE, "a row of `rows` is 5"),
        (CNN(), Info(name="dots", kind="image", shape=(1, 3, 9)), "halves an image twice"),
        (LM(), TABLE, "of kind `table`"),
        (LM(), IMAGE, "3 x 13 x 9"),
        (LM(dim=10, heads=4), TEXT, "multiple of `heads`"),
    ],
)
def test_a_model_that_does_not_fit_the_data_says_so(network, info, sentence):
    with pytest.raises(DataError, match=sentence):
        network.build(info, 3)
