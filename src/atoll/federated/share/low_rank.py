"""LoRA adapters that are merged into the base after every round.

The replica is the dense weights of the adapted modules (and of the modules that train in full), under the
names that the model has without adapters: a snapshot or an export is plain. Everything else is frozen and
known by agreement (a seed, or a pretrained checkpoint).

A worker holds one base and one adapter for each *distinct* rank, whoever asks: sites of different ranks share
the instance, and memory grows with the sum of the distinct ranks, not with the number of sites.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import nn

from atoll.adapters.lora import as_peft, inject, lora_layers, target_modules, under, unwrap
from atoll.adapters.low_rank import LowRankUpdate, nearest
from atoll.core.errors import AtollError, BadReply
from atoll.core.message import Message
from atoll.core.tree import Parts, clone, copy_, named_tensors, sub
from atoll.federated.method import Share, SiteInfo, Split, expect_like

if TYPE_CHECKING:
    from peft import PeftModel

    from atoll.federated.visit import SiteModel


@dataclass(frozen=True)
class Ranks:
    """Which rank a site trains with.

    Args:
        ranks: site i gets ``ranks[i % len(ranks)]``, unless ``memory_bytes`` is given.
        memory_bytes: what a site needs for each of ``ranks``: it gets the largest rank that its device can
            hold, or the smallest when it can hold none.
        alpha: LoRA's alpha, the same for every rank (the update is scaled by alpha / rank); None: twice the
            rank.
    """

    ranks: tuple[Annotated[int, Ge(1)], ...] = (16,)
    memory_bytes: tuple[Annotated[float, Gt(0)], ...] = ()
    alpha: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1:
            raise AtollError(f"`ranks` needs one or more positive numbers; got {list(self.ranks)}.")
        if self.memory_bytes and len(self.memory_bytes) != len(self.ranks):
            raise AtollError(f"`memory_bytes` has {len(self.memory_bytes)} values for {len(self.ranks)} ranks.")

    def of(self, site: SiteInfo) -> int:
        if not self.memory_bytes:
            return self.ranks[site.site % len(self.ranks)]
        pairs = zip(self.ranks, self.memory_bytes, strict=True)
        return max((r for r, need in pairs if need <= site.profile.memory_bytes), default=min(self.ranks))

    def alphas(self) -> dict[int, float]:
        """Alpha of each distinct rank."""
        return {r: self.alpha if self.alpha is not None else 2.0 * r for r in sorted(set(self.ranks))}


@dataclass(frozen=True)
class LowRank(Share):
    """Low-rank updates travel; everybody merges them into the base and starts afresh.

    Messages: ``low_rank`` with parts A and B (factors by module), ``dense`` (updates that are cheaper whole)
    and ``delta`` (tensors that train in full), any of them absent; or ``weights``, a snapshot.

    Args:
        ranks: which rank a site trains with.
        targets: patterns of the modules to adapt, e.g. ``("q_proj", "v_proj")``; empty: every linear layer.
        also: patterns of modules that train in full and are averaged, such as a new head; others are frozen.
    """

    ranks: Ranks = Ranks()
    targets: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    incremental: ClassVar[bool] = True

    def prepare(self, model: nn.Module, site: SiteInfo | None) -> nn.Module:
        inject(model, target_modules(model, self.targets, self.also), self.ranks.alphas())
        for name, p in model.named_parameters():
            if under(name, self.also):
                p.requires_grad_(True)
        return model

    def split(self, model: nn.Module) -> Split:
        whole = [n for n, t in named_tensors(model).items() if under(n, self.also) and t.is_floating_point()]
        return Split(shared=(*(f"{m}.base_layer.weight" for m in lora_layers(model)), *whole))

    def initial(self, model: nn.Module) -> Parts:
        tensors = named_tensors(model)
        return {"weights": clone({plain(n): tensors[n] for n in self.split(model).shared})}

    def receive(self, replica: Parts, message: Message) -> Parts:
        if message.kind == "weights":
            return message.parts
        weights = dict(replica["weights"])
        parts = message.parts
        base = {module(n): t for n, t in weights.items() if not under(n, self.also)}
        merged = LowRankUpdate.of(parts).merge_into(base)
        for m, d in parts.get("dense", {}).items():
            merged[m] = (base[m] + d.view(base[m].shape)).to(base[m].dtype)
        weights |= {f"{m}.weight": t for m, t in merged.items()}
        for name, d in parts.get("delta", {}).items():
            weights[name] = (weights[name] + d).to(d.dtype)
        return {"weights": weights}

    def install(self, at: SiteModel, replica: Parts) -> None:
        """Copy the base and silence every adapter (B = 0), whatever an earlier visit left in it."""
        copy_(at.tensors, {n: replica["weights"][plain(n)] for n in at.split.shared})
        torch._foreach_zero_([t for n, t in at.tensors.items() if ".lora_B." in n or ".lora_embedding_B." in n])

    def check(self, reply: Message, replica: Parts) -> None:
        weights, limit = replica["weights"], max(self.ranks.ranks)
        a, b = reply.parts.get("A", {}), reply.parts.get("B", {})
        base = {module(n): t for n, t in weights.items() if not under(n, self.also)}
        odd = sorted((a.keys() ^ base.keys()) | (b.keys() ^ base.keys()))
        if odd or not set(reply.parts) <= {"A", "B", "delta"}:
            raise BadReply(f"the low-rank update has missing or unknown entries: {', '.join(odd[:3]) or 'a part'}")
        for m, w in base.items():
            n, r, rest = len(w), a[m].shape[0] if a[m].ndim else 0, w[0].numel()
            good = tuple(a[m].shape) == (r, rest) and tuple(b[m].shape) == (n, r) and 1 <= r <= limit
            if a[m].dtype != b[m].dtype or a[m].dtype not in (w.dtype, torch.float32):
                raise BadReply(f"the factors of `{m}` have another type of numbers than the model")
            if not good:
                raise BadReply(
                    f"the factors of `{m}` are {list(a[m].shape)} and {list(b[m].shape)}; expected "
                    f"[r, {rest}] and [{n}, r] with r from 1 to {limit}"
                )
        expect_like(reply, "delta", {n: t for n, t in weights.items() if under(n, self.also)})

    def export(self, model: nn.Module, replica: Parts) -> nn.Module:
        """A copy of ``model`` (prepared or plain) without adapters, everything merged."""
        out = unwrap(copy.deepcopy(model))
        copy_(named_tensors(out), replica["weights"])
        return out

    def export_adapter(self, model: nn.Module, replica: Parts, rank: int) -> PeftModel:
        """All that was merged since the start as one peft adapter of rank ``rank``, by SVD (lossy below full
        rank).

        Args:
            model: plain, with its initial weights, as the task builds it; it becomes the adapter's base.
        """
        start = {n: t for n, t in named_tensors(model).items() if n in replica["weights"]}
        moved = sub(replica["weights"], start)
        copy_(named_tensors(model), {n: t for n, t in replica["weights"].items() if under(n, self.also)})
        return as_peft(model, nearest({module(n): t for n, t in moved.items() if not under(n, self.also)}, rank))


def plain(name: str) -> str:
    """A tensor's name in the model without adapters."""
    return name.replace(".base_layer.", ".")


def module(name: str) -> str:
    return name.removesuffix(".weight")


def whole(split: Split) -> list[str]:
    """Names of the shared tensors that train in full."""
    return [n for n in split.shared if ".base_layer." not in n]
