"""The output layer alone: the body of the network is frozen as it is built, and never travels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from atoll.federated.method import Share, SiteInfo, Split
from atoll.federated.share.only import freeze_all_but
from atoll.models.features import linear_head


@dataclass(frozen=True)
class Head(Share):
    """Weight and bias of the last linear layer train and travel. For a body that was trained elsewhere, e.g. with
    ``model: {name: pretrained, ...}``.
    """

    def prepare(self, model: nn.Module, site: SiteInfo | None) -> nn.Module:
        """Raises :class:`RecipeError` when the model has no linear layer."""
        freeze_all_but(model, head_names(model))
        return model

    def split(self, model: nn.Module) -> Split:
        return Split(shared=head_names(model))


def head_names(model: nn.Module) -> tuple[str, ...]:
    """The tensors of the last linear layer, e.g. ``dense2.weight`` and ``dense2.bias``."""
    name, head = linear_head(model, "`head`")
    return tuple(f"{name}.{n}" if name else n for n, _ in head.named_parameters())
