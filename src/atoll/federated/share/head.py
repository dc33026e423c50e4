"""The output layer alone: the body of the network is frozen as it is built, and never travels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from atoll.core.errors import RecipeError
from atoll.core.tree import named_tensors
from atoll.federated.method import Share, SiteInfo, Split
from atoll.federated.share.only import freeze_all_but


@dataclass(frozen=True)
class Head(Share):
    """Weight and bias of the last linear layer train and travel. For a body that was trained elsewhere, e.g. with
    ``model: {name: pretrained, ...}``.
    """

    def prepare(self, model: nn.Module, site: SiteInfo | None) -> nn.Module:
        """Raises :class:`RecipeError` when the model's last layer with parameters is not linear."""
        freeze_all_but(model, (f"{head_of(model)}.*",))
        return model

    def split(self, model: nn.Module) -> Split:
        head = f"{head_of(model)}."
        return Split(shared=tuple(n for n in named_tensors(model) if n.startswith(head)))


def head_of(model: nn.Module) -> str:
    """The name of the last linear layer, e.g. ``"dense2"``."""
    with_parameters = [(n, m) for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
    if with_parameters and with_parameters[-1][0] and isinstance(with_parameters[-1][1], nn.Linear):
        return str(with_parameters[-1][0])
    what = type(with_parameters[-1][1]).__name__ if with_parameters else "none"
    raise RecipeError([
        f"`head` shares the last linear layer of a network, and the last layer of {type(model).__name__} with "
        f"parameters is {what}; use `only` with the names of its tensors."
    ])  # fmt: skip
