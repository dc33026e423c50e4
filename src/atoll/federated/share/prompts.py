"""What FedMGP shares: one prompt, its key and a head. Class-wise prefixes and a second head stay at the site."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from atoll.core.tree import named_tensors
from atoll.data.dataset import Info
from atoll.federated.method import Share, SiteInfo, Split
from atoll.models import prompted
from atoll.models.model import ModelBuilder


@dataclass(frozen=True)
class Prompts(Share):
    """The network is frozen as it is built, and never travels.

    Args:
        prompts: how many, and where.
    """

    prompts: prompted.Prompts = field(default_factory=prompted.Prompts)

    def prepare_for(self, model: nn.Module, site: SiteInfo | None, rows: Info) -> nn.Module:
        """Raises :class:`RecipeError` for a network that cannot be prompted."""
        return prompted.PromptedNet(model, rows.shape, self.prompts)

    def split(self, model: nn.Module) -> Split:
        names = [n for n in named_tensors(model) if not n.startswith("body.") and not n.endswith(".uses")]
        private = tuple(n for n in names if n.startswith(("prefixes", "pool.", "own_head.", "met")))
        return Split(tuple(n for n in names if n not in private), private)

    def exported(self, network: ModelBuilder, model: nn.Module) -> ModelBuilder:
        return prompted.Prompted(network=network.architecture, prompts=self.prompts)
