"""The named tensors train, and nothing else: a head, some adapters, a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from atoll.core.errors import RecipeError, did_you_mean
from atoll.core.tree import named_tensors
from atoll.federated.method import Share, SiteInfo, Split


@dataclass(frozen=True, kw_only=True)
class Only(Share):
    """Tensors whose names match a pattern train; all others are frozen as they are built, and never travel.

    A pattern is a name in which ``*`` stands for anything, e.g. ``"head.*"``. A frozen batch norm still normalises by
    the batch while training, and forgets what it saw after the visit.

    Args:
        shared: patterns of the tensors that travel.
        private: patterns of those that train and stay at the site; a tensor that matches both stays.
    """

    shared: tuple[str, ...] = ()
    private: tuple[str, ...] = ()

    def prepare(self, model: nn.Module, site: SiteInfo | None) -> nn.Module:
        """Raises :class:`RecipeError` for a pattern that no tensor matches."""
        freeze_all_but(model, (*self.shared, *self.private))
        return model

    def split(self, model: nn.Module) -> Split:
        names = [n for n, t in named_tensors(model).items() if t.is_floating_point()]
        private = matching(names, self.private)
        kept = set(private)
        return Split(tuple(n for n in matching(names, self.shared) if n not in kept), private)


def matching(names: Iterable[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """The names that match a pattern, in their order."""
    return tuple(n for n in names if any(fnmatchcase(n, p) for p in patterns))


def freeze_all_but(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let only parameters that match a pattern train; raises :class:`RecipeError` for a pattern without a tensor."""
    names = [n for n, t in named_tensors(model).items() if t.is_floating_point()]
    if lost := [p for p in patterns if not matching(names, [p])]:
        raise RecipeError([f"no tensor of the model is called `{p}`.{did_you_mean(p, names[-20:])}" for p in lost])
    for name, p in model.named_parameters():
        p.requires_grad_(bool(matching([name], patterns)))
