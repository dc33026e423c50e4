"""What pFedGate shares: a network whose blocks each site chooses from, with a gate that never leaves the site."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from atoll.core.errors import AtollError, BadReply, MessageError, RecipeError
from atoll.core.message import Message
from atoll.core.tree import Parts, Tree, copy_, named_tensors, numel
from atoll.federated.method import Share, SiteInfo, Split, expect_only
from atoll.federated.share.parameters import floating_names
from atoll.models.gated import GatedNet, flat_sizes
from atoll.models.masks import unpack_bits

NETWORK, GATE = "network.", "gate."


@dataclass(frozen=True)
class GatedParameters(Share):
    """The network travels; gate, scores and choice are private. All sites cut it into the same blocks.

    A reply has the part ``blocks``: ``sent``, a bit for each block of all shared tensors in order, and ``values``, what
    was added to the entries of these blocks, in a row.

    Args:
        keep: fraction of the network that a site uses and sends; of several, site i has the i-th, in turn.
        blocks: of each tensor; as many as 1 / keep when that is more, so that one of each always fits.
        inputs: numbers that a gate sees of an example.
        per_entry: choose blocks by score over size.
    """

    keep: tuple[Annotated[float, Gt(0), Le(1)], ...] = (0.5,)
    blocks: Annotated[int, Ge(1)] = 5
    inputs: Annotated[int, Ge(1)] = 784
    per_entry: bool = False

    def __post_init__(self) -> None:
        if not self.keep or not all(0 < s <= 1 for s in self.keep):
            raise AtollError(f"`keep` needs one or more fractions above 0 and up to 1; got {list(self.keep)}.")

    @property
    def count(self) -> int:
        return max(self.blocks, math.ceil(1 / min(self.keep) - 1e-9))

    def keep_at(self, site: SiteInfo | None) -> float:
        return max(self.keep) if site is None else self.keep[site.site % len(self.keep)]

    def prepare(self, model: nn.Module, site: SiteInfo | None) -> nn.Module:
        """Raises :class:`RecipeError` for a model that reads tokens, of which a gate could make nothing."""
        if any(isinstance(m, nn.Embedding) for m in model.modules()):
            raise RecipeError(["pfedgate's gate reads numbers, and this model embeds tokens; use another method."])
        return GatedNet(model, self.keep_at(site), self.count, self.inputs, self.per_entry)

    def prepare_key(self, site: SiteInfo | None) -> object:
        return self.keep_at(site)

    def split(self, model: nn.Module) -> Split:
        shared = tuple(n for n in floating_names(model) if n.startswith(NETWORK))
        return Split(shared, tuple(n for n in named_tensors(model) if n.startswith(GATE)))

    def check(self, reply: Message, replica: Parts) -> None:
        """Values may be followed by zeros: a plan, which cannot know the choice, counts the most."""
        expect_only(reply, "blocks")
        tree = reply.parts.get("blocks", {})
        if tree.keys() != {"sent", "values"} or tree["values"].dim() != 1 or tree["values"].dtype != torch.float32:
            raise BadReply("a reply must consist of `blocks/sent` and `blocks/values`, a float32 vector")
        try:
            sent, sizes = sent_blocks(tree["sent"], replica["weights"], self.count)
        except MessageError as e:
            raise BadReply(f"`blocks/sent`: {e}") from e
        if not int(sizes[sent].sum()) <= len(tree["values"]) <= numel(replica["weights"]):
            raise BadReply(f"`blocks/values` has {len(tree['values']):,} numbers, which do not fit the blocks sent")

    def personal(self, model: nn.Module) -> nn.Module:
        """The network alone, with the weights that this site uses: zeros where it uses none."""
        assert isinstance(model, GatedNet)
        network = copy.deepcopy(model.network)
        with torch.no_grad():
            copy_(named_tensors(network), model.adapted(model.gate.scores, model.gate.kept))
        return network

    def export(self, model: nn.Module, replica: Parts) -> nn.Module:
        """The network that all sites choose from."""
        assert isinstance(model, GatedNet)
        super().export(model, replica)
        return model.network


def sent_blocks(bits: Tensor, weights: Tree, count: int) -> tuple[Tensor, Tensor]:
    """Which blocks were sent, bool [L], and the sizes of all, int64 [L]; both on the CPU."""
    sizes = torch.tensor(flat_sizes(weights, count))
    return unpack_bits(bits, {"blocks": torch.empty(len(sizes))})["blocks"], sizes
