"""What FRAug shares: the model without its running statistics, and a generator of features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from atoll.core.tree import Parts, named_tensors
from atoll.federated.method import Share, SiteInfo, Split
from atoll.federated.share.parameters import floating_names
from atoll.models.augmented import AugmentedNet


@dataclass(frozen=True)
class WithGenerator(Share):
    """The model and the generator travel; running statistics of the model's batch norms, the transform and the class
    means never leave a site. What a site exports is the model as its own ecosystem knows it."""

    def prepare(self, model: nn.Module, site: SiteInfo | None) -> nn.Module:
        """Raises :class:`RecipeError` for a model without a linear head."""
        return AugmentedNet(model)

    def split(self, model: nn.Module) -> Split:
        statistics = {
            f"{name}.{buffer}"
            for name, module in model.named_modules()
            if name.startswith("body.") and hasattr(module, "running_mean")
            for buffer in ("running_mean", "running_var", "num_batches_tracked")
        }
        own = ("transform.", "means", "met")
        private = [n for n in named_tensors(model) if n in statistics or n.startswith(own)]
        kept = set(private)
        return Split(tuple(n for n in floating_names(model) if n not in kept), tuple(private))

    def export(self, model: nn.Module, replica: Parts) -> nn.Module:
        return self.personal(super().export(model, replica))

    def personal(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, AugmentedNet)
        return model.body
