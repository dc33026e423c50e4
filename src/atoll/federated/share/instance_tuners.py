"""What FedIns shares: a pool of scales, shifts and heads on a frozen network, and the keys that choose from it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from atoll.federated.method import Share, SiteInfo, Split
from atoll.models.instance_tuned import InstanceTuned, InstanceTunedNet, TunerPool
from atoll.models.model import ModelBuilder


@dataclass(frozen=True)
class InstanceTuners(Share):
    """The network is frozen as it is built; the pool travels and is averaged entry by entry.

    Entry m means the same at every site because all start from the same keys. The exported model is the whole: frozen
    network, pool, keys.

    Args:
        pool: what inputs choose from.
    """

    pool: TunerPool = TunerPool()

    def prepare(self, model: nn.Module, site: SiteInfo | None) -> nn.Module:
        """Raises :class:`RecipeError` for a model without a linear head."""
        return InstanceTunedNet(model, self.pool)

    def split(self, model: nn.Module) -> Split:
        return Split(shared=tuple(n for n, p in model.named_parameters() if p.requires_grad))

    def exported(self, network: ModelBuilder, model: nn.Module) -> ModelBuilder:
        return InstanceTuned(network=network.architecture, pool=self.pool)
