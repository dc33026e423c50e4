"""Some rows or classes of a data set: what one party has and another has not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Ge, Len

from atoll.core.errors import DataError
from atoll.data.dataset import Dataset
from atoll.data.source import Loaded, Source, fitted


@dataclass(frozen=True, kw_only=True)
class Subset(Source):
    """The named classes of the named training rows of another source.

    Two subsets with ``rows`` that do not overlap share no training row: e.g. the server's public ones (to pretrain on)
    and those that sites share.

    Args:
        source: of the rows.
        classes: the classes that are kept, by number; they are numbered anew in this order, unless
            ``renumber`` is False. Empty: all.
        renumber: False keeps the classes' own numbers, and the others as classes without a row.
        rows: positions ``[first, end)`` in the source's training part, before classes are chosen; None: all. The
            test part keeps all its rows of these classes.
    """

    source: Source
    classes: tuple[Annotated[int, Ge(0)], ...] = ()
    renumber: bool = True
    rows: Annotated[tuple[Annotated[int, Ge(0)], ...], Len(2, 2)] | None = None

    def load(self) -> Loaded:
        loaded = self.source.load()
        train, test = loaded.train, loaded.test
        if self.rows is not None:
            first, end = self.rows
            if not first < end <= len(train):
                raise DataError(
                    f"`rows: [{first}, {end}]` of `{train.info.name}`, which has {len(train):,} training rows; give "
                    "the first row and the one after the last."
                )
            train = train.select(torch.arange(first, end))
        if self.classes:
            train, test = self._of_classes(train), self._of_classes(test) if test is not None else None
        if loaded.fit:
            info = fitted(train.info, [train])
            train, test = train.about(info), test.about(info) if test is not None else None
        return replace(loaded, train=train, test=test)

    def _of_classes(self, data: Dataset) -> Dataset:
        info, classes = data.info, torch.tensor(self.classes)
        if not info.num_classes or info.kind == "text" or int(classes.max()) >= info.num_classes:
            has = f"{info.num_classes} classes" if info.num_classes and info.kind != "text" else "no classes"
            raise DataError(f"`classes: {list(self.classes)}` of `{info.name}`, which has {has}.")
        if len(classes.unique()) < len(classes):
            raise DataError(f"`classes: {list(self.classes)}` names a class twice.")
        same = data.column("y")[:, None] == classes
        kept = same.any(1).nonzero().flatten()
        if not len(kept):
            raise DataError(f"No row of `{info.name}` has one of the classes {list(self.classes)}.")
        if not self.renumber:
            return data.select(kept)
        names = tuple(info.class_names[c] for c in self.classes) if info.class_names else ()
        data = data.select(kept).with_column("y", same[kept].int().argmax(1))
        return data.about(replace(info, num_classes=len(classes), class_names=names))
