"""From a data set to sites: who owns what, and which rows nobody trains on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.core.errors import DataError
from atoll.core.streams import numpy_stream
from atoll.data.columns import check_classes
from atoll.data.dataset import Dataset, Federation, Info, SiteData
from atoll.data.graph import with_labels_of
from atoll.data.heterogeneity import heterogeneity, histogram
from atoll.data.partition import Partitioner, Rows
from atoll.data.source import Loaded, Source, fitted


@dataclass(frozen=True, slots=True)
class Pool:
    """Rows before anybody owns them. Partitioners, ``from_file`` too, count positions within ``shared``."""

    shared: Dataset
    test: Dataset
    public: Dataset | None


def make_federation(
    source: Source | Loaded,
    partition: Partitioner,
    *,
    sites: int | None = None,
    otherwise: int | None = None,
    seed: int = 0,
    validation: float = 0.1,
    test: float = 0.1,
    public: float = 0.0,
    common_test: float = 0.1,
    limit: int | None = None,
    labelled: float = 1.0,
) -> Federation:
    """Load, hold out, share among sites, and split each site's rows in three.

    The common test set is the source's test part, or the rows that it names as ``held_out``, or a fraction held out
    before sharing. Normalisation that
    follows the data is fitted to the sites' training rows alone. Every draw has its own named stream: the
    same arguments give the same federation, and e.g. another ``validation`` moves no row to another site.

    Args:
        sites: number of sites; None for as many as the partitioner finds (natural owners).
        otherwise: number of sites where ``sites`` is None and the partitioner finds none.
        validation, test: fractions of each site's rows, rounded down; at least one row is left to train on. Where the
            data names rows that are ``held_out``, a site's test rows are those that it owns, whatever ``test`` says.
        public: fraction of the rows that the server keeps; ``federation.public``.
        common_test: fraction held out for all when the source has no test part.
        limit: use at most this many rows of the source's training part, and of its test part, drawn at
            random.
        labelled: fraction of each site's training rows that keep their label (rounded); the others become
            ``unlabelled`` rows, whose labels nobody has.

    Raises:
        DataError: fractions that leave nothing, fewer rows than sites, a site without rows.
    """
    _check_fractions(validation=validation, test=test, public=public, common_test=common_test)
    loaded = source if isinstance(source, Loaded) else source.load()
    if loaded.train.info.class_names:
        check_classes(loaded.train.info.class_names, f"The target of `{loaded.train.info.name}`")
    pool = hold_out(loaded, seed=seed, public=public, common_test=common_test, limit=limit)
    data = pool.shared
    if sites is None:
        natural = partition.natural_sites(data)
        sites = otherwise if natural is None else natural
        if sites is None:
            raise DataError(f"Partitioner `{_name(partition)}` does not know how many sites there are; say `sites`.")
    if sites < 1:
        raise DataError(f"A federation has at least one site; got {sites}.")
    if len(data) < sites:
        raise DataError(f"{len(data):,} rows of `{data.info.name}` cannot be shared by {sites} sites; use fewer sites.")
    assignment = partition.assign(data, sites, seed)
    _check_owners(assignment, sites, _name(partition))
    parts = [_three(data, rows, validation, test, seed, i) for i, rows in enumerate(assignment)]
    numbers = heterogeneity(histogram([p.train for p in parts], data.info, loaded.tokenizer))
    parts = [label_some(own, labelled, seed, i) for i, own in enumerate(parts)]
    unlabelled = [p.unlabelled for p in parts if p.unlabelled is not None]
    info = fitted(data.info, [*(p.train for p in parts), *unlabelled]) if loaded.fit else data.info
    parts = [_about(own, info) for own in parts]
    labels: dict[str, object] = {
        "source": info.name,
        "partition": _name(partition),
        "partition_settings": _settings(partition),
        "sites": sites,
        **dataclasses.asdict(numbers),
        "skipped": dict(info.skipped),
    }
    names = partition.site_names(data, assignment)
    if names:
        labels["site_names"] = list(names)
    return Federation(
        sites=tuple(parts),
        test=pool.test.about(info),
        public=pool.public.about(info) if pool.public is not None else None,
        info=info,
        labels=labels,
        tokenizer=loaded.tokenizer,
    )


def label_some(own: SiteData, labelled: float, seed: int, site: int) -> SiteData:
    """The same rows, of which a random fraction of the training rows are still labelled."""
    if not 0 <= labelled <= 1:
        raise DataError(f"`labelled` is a fraction from 0 to 1; got {labelled}.")
    if labelled == 1:
        return own
    if own.train.info.whole:
        raise DataError("`labelled` hides whole rows, and the nodes of a graph belong together; raise `test` instead.")
    if "y" not in own.train.columns:
        raise DataError(f"`labelled: {labelled}` hides labels, and `{own.train.info.name}` has none; leave it out.")
    order = numpy_stream(seed, "labelled", site).permutation(len(own.train))
    cut = round(labelled * len(order))
    kept, hidden = (_rows(own.train, np.sort(rows)) for rows in (order[:cut], order[cut:]))
    return replace(own, train=kept, unlabelled=hidden.without_column("y"))


def one_site(loaded: Loaded, site: int, *, seed: int, validation: float, test: float) -> SiteData:
    """The rows of a site that holds nothing but its own: the three parts that :func:`make_federation` gives to site
    number ``site`` when it owns these rows, in this order, and nothing was held out before sharing."""
    _check_fractions(validation=validation, test=test)
    return _three(loaded.train, np.arange(len(loaded.train)), validation, test, seed, site)


def hold_out(loaded: Loaded, *, seed: int, public: float, common_test: float, limit: int | None) -> Pool:
    """Apply ``limit``, and take out the common test rows and the server's rows."""
    train, held = _at_most(loaded.train, limit, seed, "train"), loaded.test
    if held is not None:
        held = _at_most(held, limit, seed, "test")
    elif (named := held_out(train)).any():
        held = _rows(train, np.flatnonzero(named))  # and the sites that own them test themselves on them
    else:
        held, train = _take(train, common_test, seed, "common test")
    kept, train = _take(train, public, seed, "public")
    return Pool(train, held, kept if public else None)


def _take(data: Dataset, fraction: float, seed: int, purpose: str) -> tuple[Dataset, Dataset]:
    """A random fraction of the rows that may be trained on, and all others, both in their old order."""
    held = held_out(data)
    order = numpy_stream(seed, purpose).permutation(np.flatnonzero(~held))
    cut = round(fraction * len(order))
    rest = np.concatenate([order[cut:], np.flatnonzero(held)])
    return _rows(data, np.sort(order[:cut])), _rows(data, np.sort(rest))


def held_out(data: Dataset) -> NDArray[np.bool_]:
    """Which rows the data set itself keeps for tests, ``[N]``."""
    if "held_out" not in data.columns:
        return np.zeros(len(data), dtype=np.bool_)
    return data.column("held_out").numpy().astype(np.bool_)


def _at_most(data: Dataset, limit: int | None, seed: int, purpose: str) -> Dataset:
    if limit is None or limit >= len(data):
        return data
    if limit < 1:
        raise DataError(f"`limit` is a number of rows, at least 1; got {limit}.")
    return _rows(data, np.sort(numpy_stream(seed, "limit", purpose).permutation(len(data))[:limit]))


def _three(data: Dataset, rows: Rows, validation: float, test: float, seed: int, site: int) -> SiteData:
    """Disjoint training, validation and test rows of one site; of a graph, all its nodes with disjoint labels."""
    held = held_out(data)[rows]
    if held.any():
        return replace(_three(data, rows[~held], validation, 0.0, seed, site), test=_rows(data, rows[held]))
    order = numpy_stream(seed, "site parts", site).permutation(rows)
    for_test, for_validation = int(test * len(rows)), int(validation * len(rows))
    cut = for_test + for_validation
    parts = order[cut:], order[for_test:cut], order[:for_test]
    if data.info.whole:
        return SiteData(*(with_labels_of(data, np.sort(rows), p) for p in parts))
    return SiteData(*(_rows(data, np.sort(p)) for p in parts))


def _about(own: SiteData, info: Info) -> SiteData:
    unlabelled = own.unlabelled.about(info) if own.unlabelled is not None else None
    return SiteData(own.train.about(info), own.validation.about(info), own.test.about(info), unlabelled)


def _rows(data: Dataset, rows: Any) -> Dataset:
    return data.select(torch.from_numpy(rows))


def _name(partition: Partitioner) -> str:
    return type(partition).__module__.rsplit(".", 1)[-1]


def _settings(partition: Partitioner) -> dict[str, object]:
    return {k: v for k, v in vars(partition).items() if not k.startswith("_")}


def _check_fractions(**fractions: float) -> None:
    for name, value in fractions.items():
        if not 0 <= value < 1:
            raise DataError(f"`{name}` is a fraction from 0 up to (not including) 1; got {value}.")
    if fractions["validation"] + fractions["test"] >= 1:
        raise DataError("`validation` and `test` together leave no rows to train on; lower them.")


def _check_owners(assignment: list[Rows], sites: int, who: str) -> None:
    empty = [i for i, rows in enumerate(assignment) if not len(rows)]
    if empty:
        some = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        raise DataError(
            f"{len(empty)} of {sites} sites have no training data with partitioner `{who}` (sites {some}). "
            "Use fewer sites, more rows, or a milder skew."
        )
    owned = np.concatenate(assignment)
    if len(np.unique(owned)) != len(owned):
        raise DataError(f"Partitioner `{who}` gave a row to two sites.")
