"""Data sets of the Hugging Face hub, or saved on disk by its ``datasets`` library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt

from atoll.core.errors import DataError, did_you_mean
from atoll.data.columns import Schema, apply, learn, ordered, with_new_owners
from atoll.data.dataset import Dataset, Info
from atoll.data.images import pixels, stack
from atoll.data.source import Loaded, Source, standardised, stored
from atoll.data.text import choose_tokenizer, windows
from atoll.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class HuggingFace(Source):
    """Image, text or tabular columns of a ``datasets`` data set.

    Text without a target becomes windows of tokens for a language model, the rows of one owner running on
    into each other; with a target, one window per row, cut or filled with token 0.

    Args:
        path: a name on the hub (``ylecun/mnist``) or a folder written by ``save_to_disk``.
        config: the data set's configuration, where it has several.
        train_split, test_split: names of the parts; no test part when ``test_split`` is None.
        input: the image or text column; default: the first one there is. Tables use ``features``.
        target: the column to predict; None for unlabelled text.
        site: a column that names each row's natural owner; kept as column ``site``.
        features: columns of a table; default: every numeric one.
        task: for tables.
        size, grayscale: for images, as in ``image_folder``.
        length, tokenizer, vocab_size: for text, as in ``text_files``.
    """

    path: str
    config: str | None = None
    train_split: str = "train"
    test_split: str | None = "test"
    input: str | None = None
    target: str | None = "label"
    site: str | None = None
    features: tuple[str, ...] | None = None
    task: Literal["classification", "regression"] = "classification"
    size: tuple[int, int] | None = None
    grayscale: bool = False
    length: Annotated[int, Ge(2)] = 128
    tokenizer: str = "bytes"
    vocab_size: Annotated[int, Gt(256)] = 2000

    def load(self) -> Loaded:
        parts = self._open()
        train = self._part(parts, self.train_split)
        test = self._part(parts, self.test_split) if self.test_split and self.test_split in parts else None
        for wanted in (self.input, self.target, self.site, *(self.features or ())):
            if wanted is not None and wanted not in train.column_names:
                known = train.column_names
                raise DataError(f"`{self.path}` has no column `{wanted}`." + did_you_mean(wanted, known))
        kinds = {name: _kind(feature) for name, feature in train.features.items()}
        column = self.input
        if column is None and self.features is None:
            free = [n for n in kinds if n not in (self.target, self.site)]
            column = next((n for want in ("image", "text") for n in free if kinds[n] == want), None)
        if column is None:
            return self._table(train, test)
        names, both = _Names.of(self, (train, test)), (train, test)
        if kinds[column] == "image":
            ours = [self._images(rows, column, names) for rows in both if rows is not None]
            return standardised(*ours)
        if kinds[column] == "text":
            tokenizer = choose_tokenizer(self.tokenizer, self.vocab_size, _texts(train, column))
            ours = [self._text(rows, column, tokenizer, names) for rows in both if rows is not None]
            return Loaded(train=ours[0], test=ours[1] if len(ours) > 1 else None, tokenizer=tokenizer)
        raise DataError(f"Column `{column}` of `{self.path}` holds neither images nor text; use `features`.")

    def _open(self) -> Any:
        try:
            import datasets
        except ImportError as e:
            raise DataError("Hugging Face data sets need the library: pip install 'atoll[datasets]'.") from e
        folder = Path(self.path).expanduser()
        try:
            if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
                found = datasets.load_from_disk(str(folder))
                return found if isinstance(found, dict) else {self.train_split: found}
            return datasets.load_dataset(self.path, self.config)
        except Exception as e:  # the library raises a score of types, from several packages
            why = " ".join(str(e).split())[:200]
            raise DataError(
                f"`{self.path}` could not be loaded from Hugging Face ({type(e).__name__}: {why}). Check the "
                "name and the connection, or give a folder written by `save_to_disk`."
            ) from e

    def _part(self, parts: Any, name: str) -> Any:
        if name not in parts:
            raise DataError(f"`{self.path}` has no part `{name}`." + did_you_mean(name, parts))
        return parts[name]

    def _images(self, rows: Any, column: str, names: _Names) -> Dataset:
        images, keep = [], []
        for i in range(len(rows)):
            try:
                images.append(pixels(rows[i][column], self.size, self.grayscale))
            except (OSError, ValueError, SyntaxError, AttributeError):  # damaged, or None
                continue
            keep.append(i)
        if not images:
            raise DataError(f"Column `{column}` of `{self.path}` holds no picture that can be read.")
        lost = len(rows) - len(keep)
        x = stack(images, f"`{self.path}`")
        skipped = {"unreadable image": lost} if lost else {}
        facts = {"kind": "image", "shape": tuple(x.shape[1:]), "unit": 1 / 255, "skipped": skipped}
        return self._labelled({"x": x}, rows, keep, names, **facts)

    def _text(self, rows: Any, column: str, tokenizer: Tokenizer, names: _Names) -> Dataset:
        texts = _texts(rows, column)
        facts: dict[str, Any] = {"kind": "text", "shape": (self.length,), "num_classes": tokenizer.size}
        if self.target is None:
            codes = _codes(rows[self.site], names.owners) if self.site else [0] * len(texts)
            cut = windows(texts, codes, tokenizer, self.length)
            columns = {"x": cut.x, "site": cut.owner} if self.site else {"x": cut.x}
            info = Info(name=self.path, names={"site": names.owners} if self.site else {}, **facts)
            return stored(self.path, columns, info)
        x = torch.zeros(len(texts), self.length, dtype=torch.int32)
        for row, text in zip(x, texts, strict=True):
            tokens = torch.from_numpy(tokenizer.encode(text)[: self.length])
            row[: len(tokens)] = tokens
        return self._labelled({"x": x}, rows, list(range(len(texts))), names, **facts)

    def _labelled(
        self, columns: dict[str, torch.Tensor], rows: Any, keep: list[int], names: _Names, **facts: Any
    ) -> Dataset:
        """Columns with target and owner of the kept rows."""
        if self.target is not None:
            plain = hasattr(rows.features[self.target], "names")  # numbers of named classes already
            codes = list(rows[self.target]) if plain else _codes(rows[self.target], names.classes)
            if min(codes, default=0) < 0:
                raise DataError(f"`{self.path}` hides its labels (-1) in one part; choose another part.")
            columns["y"] = torch.tensor([codes[i] for i in keep], dtype=torch.int64)
        if self.site is not None:
            owners = _codes(rows[self.site], names.owners)
            columns["site"] = torch.tensor([owners[i] for i in keep], dtype=torch.int64)
        facts = {"num_classes": len(names.classes) or None, **facts}
        known = {"site": names.owners} if self.site else {}
        return stored(self.path, columns, Info(name=self.path, class_names=names.classes, names=known, **facts))

    def _table(self, train: Any, test: Any) -> Loaded:
        if self.target is None:
            raise DataError(f"`{self.path}` is a table; name its `target` column.")
        columns = {name: train[name] for name in train.column_names}
        schema: Schema = learn(
            columns, name=self.path, target=self.target, features=self.features, site=self.site,
            task=self.task, categorical="one_hot", missing="drop",
        )  # fmt: skip
        held = None
        if test is not None:
            more = {name: test[name] for name in test.column_names}
            schema = with_new_owners(schema, more)
            held = apply(schema, more, f"{self.path} ({self.test_split})")
        return standardised(apply(schema, columns, self.path), held)


@dataclass(frozen=True, slots=True)
class _Names:
    """What classes and owners are called, the same for both parts."""

    classes: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()

    @staticmethod
    def of(source: HuggingFace, parts: tuple[Any, Any]) -> _Names:
        def distinct(column: str | None) -> tuple[str, ...]:
            if column is None:
                return ()
            feature = parts[0].features[column]
            if hasattr(feature, "names") and column == source.target:
                return tuple(feature.names)
            return ordered(str(v) for rows in parts if rows is not None for v in rows[column])

        return _Names(distinct(source.target), distinct(source.site))


def _texts(rows: Any, column: str) -> list[bytes]:
    return [str(t or "").encode() for t in rows[column]]


def _codes(values: Any, names: tuple[str, ...]) -> list[int]:
    """Each value's number among the names."""
    code = {n: i for i, n in enumerate(names)}
    return [code[str(v)] for v in values]


def _kind(feature: Any) -> str:
    """``image``, ``text`` or ``other`` for a column of the ``datasets`` library."""
    if type(feature).__name__ == "Image":
        return "image"
    return "text" if getattr(feature, "dtype", "") in ("string", "large_string") else "other"
