"""How sites that each hold their own rows come to one description of all the data, without showing a row.

The steps, in the order in which a server and its sites take them::

    site    own = one_site(source.load(), ...)            its rows in three parts (``federation.py``)
    site    describe(own, fit=..., tokenizer=...)         a Summary: names, shapes and counts, no value of a feature
    server  agreed = agree({site: summary, ...})          one Summary for all of them, or a sentence that names a site
    site    own = adopt(own, agreed)                      the same classes and features everywhere
    if ``agreed.fit``, mean and scale follow the rows:
    site    first_moments(own)                            counts and sums of the training rows
    server  mean = means(agreed, {site: ..., ...})
    site    second_moments(own, mean)                     sums of squared differences
    server  agreed = settle(agreed, firsts, seconds)
    site    own = adopt(own, agreed)                      (adopting twice does no harm)

Every function is pure, and the bits are those of a simulation that holds all rows and gives each site its own: the
sums are its subtotals (``source.fitted``), added in the same order. What a server or a site reads from the other may
be anything: it is well-formed, or refused with a :class:`DataError`.

Two things that a site should know before it takes part. Class names, and the categories of text columns, are values
of its rows. And a sum over one row is that row: ``deploy/policy.py`` says from how many rows sums may leave.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Len, Lt
from torch import Tensor

from atoll.core.errors import DataError, did_you_mean
from atoll.data import source
from atoll.data.columns import MAX_CATEGORIES, check_classes, ordered
from atoll.data.dataset import Dataset, Info, SiteData
from atoll.data.tokenizers import Tokenizer, identity

Count = Annotated[int, Ge(0), Lt(1 << 53)]
Text = Annotated[str, Len(0, 1000)]
Texts = Annotated[tuple[Text, ...], Len(0, 1_000_000)]
Values = Annotated[tuple[float, ...], Len(0, 1_000_000)]
Facts = Mapping[str, Any]
"""What crosses the wire: JSON-able. Numbers keep their bits, since JSON writes them in full."""


@dataclass(frozen=True, slots=True)
class Array:
    """A float32 tensor as JSON-able values."""

    shape: Annotated[tuple[Count, ...], Len(0, 8)]
    values: Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a site tells about its rows, and what all sites together agree on. Fields as in :class:`Info`.

    Attributes:
        dtype: of a stored input.
        labelled: there is a target column.
        rows: numbers of training, validation and test rows.
        fit: mean and scale follow the training rows; they are 0 and 1 until :func:`settle`.
        tokenizer: of text, a digest of what it does.
    """

    kind: Literal["image", "table", "text", "series"]
    shape: Annotated[tuple[Count, ...], Len(0, 8)]
    dtype: Text
    labelled: bool
    rows: tuple[Count, Count, Count]
    fit: bool
    name: Text = ""
    num_classes: Count | None = None
    class_names: Texts = ()
    feature_names: Texts = ()
    categories: dict[Text, Texts] = field(default_factory=dict)
    unit: float = 1.0
    mean: float | Array = 0.0
    scale: float | Array = 1.0
    target_mean: float = 0.0
    target_scale: float = 1.0
    targets: Count = 1
    tokenizer: Text = ""
    skipped: dict[Text, Count] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """JSON-able; :func:`read_summary` reads it."""
        return asdict(self)

    def info(self) -> Info:
        """What the data set is about, the same at every site."""
        return Info(
            name=self.name, kind=self.kind, shape=self.shape, num_classes=self.num_classes,
            class_names=self.class_names, feature_names=self.feature_names, categories=dict(self.categories),
            mean=_unpacked(self.mean), scale=_unpacked(self.scale), unit=self.unit, target_mean=self.target_mean,
            target_scale=self.target_scale, targets=self.targets, skipped=dict(self.skipped),
        )  # fmt: skip


def describe(data: SiteData, *, fit: bool, tokenizer: Tokenizer | None = None) -> Summary:
    """What a site tells.

    Args:
        fit, tokenizer: as in ``Loaded``. With ``fit`` the site's own mean and scale are left out.
    """
    info, columns = data.train.info, data.train.columns
    if info.whole:
        raise DataError(f"`{info.name}` is a graph. Sites elsewhere agree on images, tables and text; simulate graphs.")
    constants: dict[str, Any] = {} if fit else {
        "mean": _packed(info.mean), "scale": _packed(info.scale), "target_mean": info.target_mean,
        "target_scale": info.target_scale,
    }  # fmt: skip
    kind: Any = info.kind
    return Summary(
        kind=kind, shape=tuple(info.shape), dtype=str(columns["x"].dtype), labelled="y" in columns,
        rows=(len(data.train), len(data.validation), len(data.test)), fit=fit, num_classes=info.num_classes,
        class_names=tuple(info.class_names), feature_names=tuple(info.feature_names),
        categories={c: tuple(kinds) for c, kinds in info.categories.items()}, unit=info.unit, targets=info.targets,
        tokenizer=identity(tokenizer) if tokenizer is not None else "", skipped=dict(info.skipped), **constants,
    )  # fmt: skip


def read_summary(facts: Facts, who: str) -> Summary:
    """What :meth:`Summary.facts` wrote; ``who`` sent it, for the error."""
    s: Summary = _read(Summary, facts, f"The description of the data from {who}")
    lists = (s.class_names, s.feature_names, *s.categories.values())
    fits = all(len(set(names)) == len(names) for names in lists)
    fits &= not s.feature_names or s.shape[:1] == (len(s.feature_names),)
    fits &= not s.class_names or s.kind == "text" or s.num_classes == len(s.class_names)
    dims = {"table": 1, "series": 2, "text": len(s.shape)}.get(s.kind, 3)
    fits &= math.prod(s.shape) < 1 << 40 and len(s.shape) == dims
    fits &= all({f"{c}={k}" for k in kinds} <= set(s.feature_names) for c, kinds in s.categories.items())
    if not fits:
        raise DataError(f"The description of the data from {who} contradicts itself; run the same version everywhere.")
    return s


# ------------------------------------------------------------------------------------------- agreeing

SAME = {
    "kind": "kind of data", "dtype": "type of stored inputs", "unit": "unit of inputs", "labelled": "labelling",
    "fit": "standardisation", "tokenizer": "tokenizer", "mean": "mean of inputs", "scale": "scale of inputs",
    "target_mean": "mean of the target", "target_scale": "scale of the target", "targets": "number of steps to predict",
}  # fmt: skip


def agree(summaries: Mapping[str, Summary], name: str = "data of the sites") -> Summary:
    """The summary of all rows together, as a simulation that holds them would find it.

    Classes and categories are the union, features those of the first site in its order.

    Args:
        summaries: by the sites' names, in the order of their numbers.

    Raises:
        DataError: sites whose data cannot be learned from together; the sentence names one and the difference.
    """
    if not summaries:
        raise DataError("No site has described its data, so there is nothing to agree on.")
    (first, base), *others = summaries.items()
    for site, s in others:
        for attribute, words in SAME.items():
            ours, theirs = getattr(base, attribute), getattr(s, attribute)
            if ours != theirs:
                hint = " Train one and give its file as `tokenizer`." if attribute == "tokenizer" else ""
                raise DataError(
                    f"Sites `{first}` and `{site}` differ in the {words} ({_short(ours)} and {_short(theirs)}), so "
                    f"they cannot learn one model together.{hint}"
                )
        if (base.num_classes is None) != (s.num_classes is None):
            a, b = (first, site) if s.num_classes is None else (site, first)
            raise DataError(f"Site `{a}` has classes to tell apart, and site `{b}` a number to predict.")
        named = 1 if base.feature_names and s.feature_names else 0  # the first dimension is then a matter of names
        if base.shape[named:] != s.shape[named:]:
            raise DataError(
                f"Inputs of site `{first}` have shape {list(base.shape)}, those of site `{site}` {list(s.shape)}; "
                "bring them to one (images: `size`)."
            )
    classes, skipped = _classes(summaries), dict[str, int]()
    for s in summaries.values():
        skipped = {**skipped, **{why: skipped.get(why, 0) + n for why, n in s.skipped.items()}}
    features, categories = _features(summaries)
    train, validation, test = (sum(s.rows[i] for s in summaries.values()) for i in range(3))
    return replace(
        base, name=name, rows=(train, validation, test), skipped=skipped, class_names=classes,
        num_classes=len(classes) if classes and base.kind != "text" else base.num_classes, feature_names=features,
        categories=categories, shape=(len(features), *base.shape[1:]) if features else base.shape,
    )  # fmt: skip


def _classes(summaries: Mapping[str, Summary]) -> tuple[str, ...]:
    """Equal names keep their order, whatever it is; different ones are found in data, which has one order."""
    base = next(iter(summaries.values()))
    if all((s.class_names, s.num_classes) == (base.class_names, base.num_classes) for s in summaries.values()):
        if base.class_names:
            check_classes(base.class_names, "The target of all sites together")
        return base.class_names
    for site, s in summaries.items():
        if s.class_names != ordered(s.class_names) or not s.class_names:
            other = next(
                n for n, o in summaries.items() if (o.class_names, o.num_classes) != (s.class_names, s.num_classes)
            )
            raise DataError(
                f"Sites `{site}` and `{other}` have different classes ({_some(s)}; {_some(summaries[other])}), and "
                "those of the former have an order of their own. Give the same class names at every site."
            )
    union = ordered(c for s in summaries.values() for c in s.class_names)
    check_classes(union, "The target of all sites together")
    return union


def _some(s: Summary) -> str:
    names = s.class_names or (f"{s.num_classes} without names",)
    return ", ".join(n[:40] for n in names[:5]) + (", ..." if len(names) > 5 else "")


def _short(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _features(summaries: Mapping[str, Summary]) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Names of the features, and the categories of columns that hold text."""
    (first, base), *others = summaries.items()
    columns = _columns(base)
    for site, s in others:
        own = _columns(s)
        for has, lacks, one, two in ((columns, own, first, site), (own, columns, site, first)):
            if gone := [c for c in has if c not in lacks]:
                raise DataError(
                    f"Site `{two}` has no feature `{gone[0]}`, which site `{one}` has.{did_you_mean(gone[0], lacks)} "
                    "Rename or add the column, or name the `features` that all sites have."
                )
        for c, kinds in columns.items():
            if (kinds is None) != (own[c] is None):
                text, numbers = (site, first) if kinds is None else (first, site)
                raise DataError(
                    f"Feature `{c}` holds text at site `{text}` and numbers at site `{numbers}`; make it one of them "
                    "or leave it out of `features`."
                )
    every = {
        c: ordered(k for s in summaries.values() for k in s.categories[c])
        for c, kinds in columns.items()
        if kinds is not None
    }
    for c, kinds in every.items():
        if len(kinds) > MAX_CATEGORIES:
            raise DataError(f"Feature `{c}` has {len(kinds):,} different values at all sites, too many for one-hot.")
    names = tuple(n for c in columns for n in ([f"{c}={k}" for k in every[c]] if c in every else [c]))
    return names, every


def _columns(s: Summary) -> dict[str, tuple[str, ...] | None]:
    """The columns behind the features, in their order, each with its categories."""
    column = {f"{c}={k}": c for c, kinds in s.categories.items() for k in kinds}
    return {column.get(f, f): s.categories.get(column.get(f, f)) for f in s.feature_names}


# ------------------------------------------------------------------------------------------- adopting


def adopt(data: SiteData, agreed: Summary) -> SiteData:
    """A site's rows in the agreed terms: classes and features by their agreed numbers, mean and scale as agreed.

    Further columns (ids) stay behind: nothing at a site reads them.
    """
    done: dict[int, Mapping[str, Tensor]] = {}  # the parts share one storage, and go on doing so
    parts = []
    for part in (data.train, data.validation, data.test):
        key = id(part.columns)
        if key not in done:
            done[key] = adopted(part, agreed).columns
        parts.append(Dataset(done[key], agreed.info(), part.rows))
    return SiteData(*parts)


def adopted(data: Dataset, agreed: Summary) -> Dataset:
    """The same for rows of any owner, e.g. public rows of the server.

    Raises:
        DataError: the rows cannot be put in the agreed terms.
    """
    own, x = data.info, data.columns["x"]
    alike = own.kind == agreed.kind and str(x.dtype) == agreed.dtype and ("y" in data.columns) == agreed.labelled
    if not alike or (own.num_classes is None) != (agreed.num_classes is None):
        raise DataError(f"`{own.name}` is not the kind of data that the sites agreed on ({agreed.kind}).")
    if agreed.feature_names and own.feature_names != agreed.feature_names:
        x = _reordered(x, own, agreed)
    if tuple(x.shape[1:]) != agreed.shape:
        raise DataError(f"Inputs of `{own.name}` have shape {list(x.shape[1:])}; agreed is {list(agreed.shape)}.")
    columns = {"x": x}
    if "y" in data.columns:
        columns["y"] = data.columns["y"]
        if own.class_names != agreed.class_names:
            columns["y"] = _recoded(columns["y"], own, agreed)
    return Dataset(columns, agreed.info(), data.rows)


def _reordered(x: Tensor, own: Info, agreed: Summary) -> Tensor:
    """Features in the agreed order; zeros for categories that only others have."""
    place = {f: i for i, f in enumerate(own.feature_names)}
    elsewhere = {f"{c}={k}" for c in own.categories for k in agreed.categories.get(c, ())}
    lacks = [f for f in agreed.feature_names if f not in place and f not in elsewhere]
    odd = sorted(place.keys() - set(agreed.feature_names))
    if lacks or odd:
        what = f"lacks the agreed feature `{lacks[0]}`" if lacks else f"has a feature `{odd[0]}` that is not agreed"
        raise DataError(f"`{own.name}` {what}; every owner of rows needs the same features.")
    zeros = torch.zeros(len(x), 1, *x.shape[2:], dtype=x.dtype)
    return torch.cat([x, zeros], 1)[:, [place.get(f, -1) for f in agreed.feature_names]]


def _recoded(y: Tensor, own: Info, agreed: Summary) -> Tensor:
    code = {c: i for i, c in enumerate(agreed.class_names)}
    if odd := [c for c in own.class_names if c not in code]:
        raise DataError(f"`{own.name}` has class {odd[0][:40]!r}, which the sites did not agree on.")
    if not own.class_names:
        raise DataError(f"`{own.name}` has no class names, and the sites agreed on some; give it the same names.")
    return torch.tensor([code[c] for c in own.class_names])[y]


# ------------------------------------------------------------------------------------------- mean and scale


@dataclass(frozen=True, slots=True)
class Sums:
    """Values per feature (or channel), and their sums."""

    count: Count
    sums: Values


def first_moments(data: SiteData) -> dict[str, Any]:
    """Counts and sums of a site's training rows: of its inputs, and of a regression target."""
    return {name: _sums(source.moments(data.train, name)) for name in source.measured(data.train)}


def means(agreed: Summary, firsts: Mapping[str, Facts]) -> dict[str, Any]:
    """The mean of each feature over all sites; ``firsts`` in the order of the sites' numbers."""
    read = _sums_of(agreed, firsts)
    return {name: source.average(parts).tolist() for name, parts in read.items()}


def second_moments(data: SiteData, mean: Facts) -> dict[str, Any]:
    """Sums of the squared differences from ``mean`` over a site's training rows."""
    names = source.measured(data.train)
    centres: dict[str, Values] = _read(dict[str, Values], mean, "The mean from the server")
    for name in names:
        t = data.train.columns[name]
        if len(centres.get(name, ())) != (t.shape[1] if t.ndim > 1 else 1):
            raise DataError("The mean from the server does not fit the agreed features.")
    found = {name: source.moments(data.train, name, np.array(centres[name])) for name in names}
    return {name: _sums(m) for name, m in found.items()}


def settle(agreed: Summary, firsts: Mapping[str, Facts], seconds: Mapping[str, Facts]) -> Summary:
    """The agreement with mean and scale of all sites' training rows."""
    one, two = _sums_of(agreed, firsts), _sums_of(agreed, seconds)
    for name, parts in two.items():
        for site, (n, _), (m, squares) in zip(seconds, one[name], parts, strict=True):
            if n != m or bool((squares < 0).any()):
                raise DataError(f"Site `{site}` sent sums of squares that do not go with its sums; start again.")
    info = source.with_moments(
        agreed.info(), {n: source.average(p) for n, p in one.items()}, {n: source.average(p) for n, p in two.items()}
    )
    return replace(
        agreed, mean=_packed(info.mean), scale=_packed(info.scale), target_mean=info.target_mean,
        target_scale=info.target_scale,
    )  # fmt: skip


def _sums(moments: source.Moments) -> dict[str, Any]:
    return {"count": moments[0], "sums": moments[1].tolist()}


def _sums_of(agreed: Summary, facts: Mapping[str, Facts]) -> dict[str, list[source.Moments]]:
    """By column, what each site sent."""
    names = ("x", "y") if agreed.num_classes is None and agreed.labelled else ("x",)
    sizes = {"x": agreed.shape[0], "y": agreed.targets}
    out: dict[str, list[source.Moments]] = {name: [] for name in names}
    for site, sent in facts.items():
        read: dict[str, Sums] = _read(dict[str, Sums], sent, f"What site `{site}` sent for standardisation")
        if read.keys() != out.keys() or any(len(s.sums) != sizes[n] or s.count < 1 for n, s in read.items()):
            raise DataError(f"What site `{site}` sent for standardisation does not fit the agreed features.")
        for name, s in read.items():
            out[name].append((s.count, np.array(s.sums)))
    return out


# ------------------------------------------------------------------------------------------- values on the wire


def _packed(value: Tensor | float) -> float | Array:
    if not isinstance(value, Tensor):
        return float(value)
    return Array(tuple(value.shape), tuple(value.float().flatten().tolist()))


def _unpacked(value: float | Array) -> Tensor | float:
    if not isinstance(value, Array):
        return value
    if math.prod(value.shape) != len(value.values):
        raise DataError("A mean or scale in the agreed description has values that do not fit its shape.")
    return torch.tensor(value.values, dtype=torch.float32).view(value.shape)


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _read(kind: Any, facts: Any, what: str) -> Any:
    """JSON-able values of the type, or a :class:`DataError`. Fields that it does not have are left aside."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(json.dumps(facts, allow_nan=False), strict=True)
    except (ValidationError, TypeError, ValueError, RecursionError) as e:
        raise DataError(f"{what} cannot be read; run the same version everywhere.") from e
