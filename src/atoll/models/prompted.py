"""A frozen vision transformer with a prompt for all and prefixes for each class.

Yu et al., "Personalized Federated Continual Learning via Multi-granularity Prompt", KDD 2024, arXiv 2407.00113.
Prefixes of keys and values: Li and Liang, "Prefix-Tuning", ACL 2021, arXiv 2101.00190.

Shapes: B rows, T tokens, D their width and the feature's, C classes, P = length, L layers with prefixes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from atoll.core.errors import RecipeError
from atoll.data.dataset import Info
from atoll.models.features import Tap, linear_head
from atoll.models.keyed_pool import KeyedPool
from atoll.models.model import ModelBuilder

NOWHERE = -1e4
"""Logit of a class that is not among those to choose from."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """How many there are, and where.

    Args:
        length: tokens of the common prompt, and keys and values of a prefix.
        layers: attention layers with prefixes, counted from 1; those that the network has not are left out.
        spread: standard deviation of their initial numbers.
    """

    length: Annotated[int, Ge(1)] = 15
    layers: tuple[Annotated[int, Ge(1)], ...] = (2, 3, 4)
    spread: Annotated[float, Ge(0)] = 0.02


class Appended:
    """A forward hook that appends ``tokens`` ``[P, D]`` to those that a module makes, ``[B, T, D]``."""

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self.width = 0

    def __call__(self, module: nn.Module, inputs: Any, out: Any) -> Any:
        self.width = out.shape[-1] if isinstance(out, Tensor) and out.dim() == 3 else 0
        return out if self.tokens is None else torch.cat([out, self.tokens.expand(len(out), -1, -1)], 1)


class Prefixed(TorchFunctionMode):
    """Inside, the n-th call of torch's attention gets the n-th layer's prefix before its keys and values.

    Attributes:
        calls: so far.
    """

    def __init__(self, prefixes: dict[int, Tensor] | None = None) -> None:
        """``prefixes``: by layer, from 1: ``[B, 2, P, D]``."""
        super().__init__()
        self.prefixes, self.calls = prefixes or {}, 0

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            prefix = self.prefixes.get(self.calls)
            if prefix is not None:
                q, k, v, *rest = args
                more_k, more_v = (t.unflatten(-1, (k.shape[1], -1)).transpose(1, 2) for t in prefix.unbind(1))
                return func(q, torch.cat([more_k, k], 2), torch.cat([more_v, v], 2), *rest, **kwargs)
        return func(*args, **kwargs)


class PromptedNet(nn.Module):
    """Predicts by a site's own prefixes and head where it has met classes, else by the common prompt and head.

    The common prompt goes in as further tokens. The feature that it gives is the query for the row's class-wise prefix,
    by the nearest key among the classes met; nobody has to say which task a row belongs to.

    Raises:
        RecipeError: for a network without a module ``embedding`` or ``embeddings`` that makes tokens, without a linear
            head, or that does not attend by torch's ``scaled_dot_product_attention``.
    """

    met: Tensor
    """1 for classes that this site has trained, ``[C]``."""

    def __init__(self, body: nn.Module, shape: tuple[int, ...], prompts: Prompts) -> None:
        super().__init__()
        _, head = linear_head(body, "fedmgp")
        self.body, self.tap, self.appended = body.requires_grad_(False).eval(), Tap(), Appended()
        head.register_forward_pre_hook(self.tap)
        embedding = [m for n, m in body.named_modules() if n.rpartition(".")[2] in ("embedding", "embeddings")]
        if embedding:
            embedding[0].register_forward_hook(self.appended)
        with torch.no_grad(), Prefixed() as watch:
            body(torch.zeros(1, *shape))
        dim, classes = head.in_features, head.out_features
        self.layers = tuple(n for n in prompts.layers if n <= watch.calls)
        if self.tap.feature("fedmgp").shape[1] != self.appended.width or not self.layers:
            raise RecipeError([
                "fedmgp prompts vision transformers: a network with a module `embedding` or `embeddings` that makes "
                f"tokens as wide as the feature, and attention in one of the layers {list(prompts.layers)}; use "
                "another model."
            ])  # fmt: skip
        self.prompt = nn.Parameter(prompts.spread * torch.randn(prompts.length, dim))
        self.prompt_pool = KeyedPool(1, dim)
        self.head = copy.deepcopy(head).requires_grad_(True)
        size = (classes, len(self.layers), 2, prompts.length, dim)
        self.prefixes = nn.Parameter(prompts.spread * torch.randn(size))
        self.pool = KeyedPool(classes, dim)
        self.own_head = copy.deepcopy(head).requires_grad_(True)
        self.register_buffer("met", torch.zeros(classes, dtype=torch.int64))

    def train(self, mode: bool = True) -> PromptedNet:
        """The body never trains: no dropout."""
        super().train(mode)
        self.body.eval()
        return self

    def feature(self, x: Tensor, prompt_PD: Tensor | None = None, weights_BC: Tensor | None = None) -> Tensor:
        """``[B, D]``, with the prompt and with each row's mixture of the classes' prefixes."""
        self.appended.tokens = prompt_PD
        prefixes = {}
        if weights_BC is not None:
            mixed = (weights_BC @ self.prefixes.flatten(1)).unflatten(1, self.prefixes.shape[1:])
            prefixes = dict(zip(self.layers, mixed.unbind(1), strict=True))
        try:
            with Prefixed(prefixes):
                self.body(x)
        finally:
            self.appended.tokens = None
        return self.tap.feature("fedmgp")

    def forward(self, x: Tensor) -> Tensor:
        common_BD, met_C = self.feature(x, self.prompt), self.met > 0
        some = met_C.any()
        weights_BC = self.pool(common_BD, 1, met_C | ~some)
        own_BC = self.own_head(self.feature(x, self.prompt, weights_BC)).masked_fill(~met_C, NOWHERE)
        return torch.where(some, own_BC, self.head(common_BD))


@dataclass(frozen=True, kw_only=True)
class Prompted(ModelBuilder):
    """A frozen vision transformer with prompts.

    Args:
        network: what is prompted; best a pretrained one.
        prompts: how many, and where.
    """

    network: ModelBuilder
    prompts: Prompts = Prompts()

    @property
    def architecture(self) -> ModelBuilder:
        return Prompted(network=self.network.architecture, prompts=self.prompts)

    def build(self, info: Info, outputs: int) -> nn.Module:
        return PromptedNet(self.network.build(info, outputs), info.shape, self.prompts)
