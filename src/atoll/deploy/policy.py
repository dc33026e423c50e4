"""A site's own rules (``policy.yaml``), and what a reply costs by them; ``meter.py`` is the book of what has left.

Each decision is a pure function from the rules and a few facts to a refusal: a sentence or two for the server and the
operator, or None. Nothing here trusts the server beyond what the rules say.

What the epsilon budget counts
    The unit of privacy is all the data of the site. Each reply to a visit is one noised release, at what it costs
    *this* site (:func:`participation`): by itself, with the noise that it carries itself, as if the server looked at
    every single message (``trust: nobody``); or with the noise of the whole cohort, if the site trusts the server to
    see and show sums only and the other sites to bring their share (``trust: sum``); also amplified by sampling, if
    it trusts the server to draw sites by the recipe's law and to keep the draw to itself (``trust: sampling``). The
    site counts every visit that it answers, in whatever run. A method without noise costs infinity.
    Numbers that leave without noise would break the promise: with a budget, sums for standardisation and evaluations
    stay here unless the rules ask for them by name. Class names, the number of rows, times and sizes are not counted:
    the promise does not cover them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from atoll.core.build import Reader, find, names_in
from atoll.core.errors import RecipeError, did_you_mean
from atoll.data.dataset import Info
from atoll.federated.method import LocalWork, Method
from atoll.privacy.accounting import Event, Sampling, epsilon
from atoll.recipes.recipe import PATHS, read_yaml

ROWS = ("proxies",)
"""Kinds of message that hold rows of the site's data. They leave only where the rules name them."""
Amount = Annotated[int, Ge(0)]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a site allows. The default: any method that sends no rows, with at least one other site.

    Args:
        methods: names of the methods that may run; None allows all.
        kinds: kinds of message that may leave after a visit, such as delta, low_rank, predictions; None allows all
            but proxies, which are rows of the data.
        other_sites: fewest other sites in a round before anything leaves. The server says how many there are.
        columns: of a table that may be read, the target included; None allows all.
        class_names: the names of classes and categories may leave; they are values of the data.
        counts: the number of rows may leave.
        sums: sums over the rows, for standardisation, may leave; None allows them unless there is an epsilon budget.
        evaluate: the site may report metrics on its own rows; None allows it unless there is an epsilon budget.
        least_rows: sums and metrics over fewer rows stay here: a sum over one row is that row.
        bytes_per_day: bytes that may leave in a day.
        epsilon_per_day: privacy that may be spent in a day.
        delta: of the (epsilon, delta).
        trust: what the count of epsilon takes on trust: nobody, that only sums are seen, or sampling too.
        max_parameters: of the largest model that the site will run.
        max_model_bytes: likewise.
        packages: whose code a recipe may name.
        files: of this site that a recipe may name, letter by letter, such as the folder with a model's first weights.
        seconds: longest visit.
    """

    methods: tuple[str, ...] | None = None
    kinds: tuple[str, ...] | None = None
    other_sites: Amount = 1
    columns: tuple[str, ...] | None = None
    class_names: bool = True
    counts: bool = True
    sums: bool | None = None
    evaluate: bool | None = None
    least_rows: Annotated[int, Ge(2)] = 5
    bytes_per_day: Amount | None = None
    epsilon_per_day: Annotated[float, Ge(0)] | None = None
    delta: Annotated[float, Gt(0), Lt(1)] = 1e-5
    trust: Literal["nobody", "sum", "sampling"] = "nobody"
    max_parameters: Amount | None = None
    max_model_bytes: Amount | None = None
    packages: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    seconds: Annotated[float, Gt(0)] | None = None


def read_policy(path: Path | None) -> Policy:
    """The rules in a file; without one, the default.

    Raises:
        RecipeError: all problems at once, each with its place.
    """
    if path is None:
        return Policy()
    if not path.is_file():
        raise RecipeError([f"there is no file {path}"], "the site's policy")
    reader = Reader()
    policy = reader.call(Policy, read_yaml(path, "a policy is a mapping such as `bytes_per_day: 1000000`"), "")
    if isinstance(policy, Policy):
        known = {"methods": names_in("atoll.federated.methods"), "kinds": sorted(message_kinds())}
        for name, allowed in known.items():
            for i, word in enumerate(getattr(policy, name) or ()):
                if word not in allowed:
                    reader.problem(f"{name}.{i}", f"there is no `{word}`.{did_you_mean(word, allowed)}")
    if reader.problems:
        raise RecipeError(reader.problems, str(path))
    assert isinstance(policy, Policy)
    return policy


def message_kinds() -> set[str]:
    """What can leave a site after a visit."""
    package = "atoll.federated.local"
    works = (find(package, name, LocalWork) for name in names_in(package, LocalWork))
    return {*ROWS, *(str(getattr(work, "produces", "")) for work in works)} - {""}


# ------------------------------------------------------------------------------------------- decisions


def recipe_refusal(policy: Policy, method: str, kind: str, sites: int) -> str | None:
    """Whether a recipe may run here at all.

    Args:
        method: the name on its card.
        kind: what its local work produces.
        sites: in the federation, with this one.
    """
    if policy.methods is not None and method not in policy.methods:
        return f"This site does not run `{method}`; it runs {_list(policy.methods)}."
    return kind_refusal(policy, kind) or cohort_refusal(policy, sites, sites)


def kind_refusal(policy: Policy, kind: str) -> str | None:
    """Whether a message of this kind may leave."""
    if policy.kinds is not None and kind not in policy.kinds:
        return f"Messages of kind `{kind[:40]}` do not leave this site; it sends {_list(policy.kinds)}."
    if policy.kinds is None and kind in ROWS:
        return f"Messages of kind `{kind}` hold rows of this site's data, which do not leave it."
    return None


def cohort_refusal(policy: Policy, cohort: int, sites: int) -> str | None:
    """Whether enough other sites take part. ``cohort``: sites asked in the round, with this one, of ``sites``."""
    if not 1 <= cohort <= sites:
        return f"A round of {cohort} sites is not possible in a federation of {sites}."
    if cohort - 1 < policy.other_sites:
        others = "site" if policy.other_sites == 1 else "sites"
        return (
            f"Nothing leaves this site unless {policy.other_sites} other {others} take part; here it is {cohort - 1}."
        )
    return None


def columns_refusal(policy: Policy, columns: Iterable[str]) -> str | None:
    """Whether these columns of a table may be read; see :func:`columns_read`."""
    if policy.columns is None:
        return None
    closed = [c for c in columns if c not in policy.columns]
    return (
        f"Column `{closed[0][:80]}` may not be read at this site; it opens {_list(policy.columns)}." if closed else None
    )


def files_refusal(policy: Policy, config: Any) -> str | None:
    """Whether a recipe (plain values) names files or addresses that it may. Rows are the operator's own business."""
    for name, value in _fields({k: v for k, v in config.items() if k != "data"}):
        if name in (*PATHS, "start") and value and value not in policy.files:
            return (
                f"The recipe names `{str(value)[:80]}`, and files of this site are opened only where its rules list "
                "them under `files`."
            )
    return None


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """All fields with a name, at any depth."""
    if isinstance(value, Mapping):
        for name, v in value.items():
            yield name, v
            yield from _fields(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _fields(v)


def columns_read(info: Info, *named: str | None) -> tuple[str, ...]:
    """The columns behind a loaded table: its features, and those named (target, owner)."""
    text = {f"{c}={k}": c for c, kinds in info.categories.items() for k in kinds}
    return tuple(dict.fromkeys([*(text.get(f, f) for f in info.feature_names), *(c for c in named if c)]))


def description_refusal(policy: Policy, info: Info) -> str | None:
    """Whether what the sites need to agree on may leave."""
    if not policy.counts:
        return "This site does not tell how many rows it has, and the server needs to know."
    if not policy.class_names and (info.class_names or info.categories):
        return "The names of this site's classes and categories do not leave it, and all sites must agree on them."
    return None


def sums_refusal(policy: Policy, rows: int) -> str | None:
    """Whether sums over so many rows may leave, for standardisation."""
    if policy.sums is False:
        return "Sums over this site's rows do not leave it; use data whose mean and scale are constants."
    if policy.sums is None and policy.epsilon_per_day is not None:
        return "Sums for standardisation carry no noise, so they would break this site's epsilon budget."
    return _few(policy, rows, "Sums")


def evaluation_refusal(policy: Policy, rows: int) -> str | None:
    """Whether metrics over so many rows may leave."""
    if policy.evaluate is False:
        return "This site does not report metrics on its rows."
    if policy.evaluate is None and policy.epsilon_per_day is not None:
        return "Metrics carry no noise, so they would break this site's epsilon budget."
    return _few(policy, rows, "Metrics")


def _few(policy: Policy, rows: int, what: str) -> str | None:
    few = rows < policy.least_rows
    return f"{what} over fewer than {policy.least_rows} rows do not leave this site; it has {rows}." if few else None


def model_refusal(policy: Policy, parameters: int, size: int, machine: int = 1 << 62) -> str | None:
    """Whether a model of so many parameters and bytes may run here, on a machine with so many bytes of memory."""
    if size > machine:
        return f"The model takes {size:,} bytes, more than the memory of this site's machine."
    if policy.max_parameters is not None and parameters > policy.max_parameters:
        return f"The model has {parameters:,} parameters; this site runs at most {policy.max_parameters:,}."
    if policy.max_model_bytes is not None and size > policy.max_model_bytes:
        return f"The model takes {size:,} bytes; this site runs at most {policy.max_model_bytes:,}."
    return None


def visit_seconds(policy: Policy, asked: float | None) -> float | None:
    """How long a visit may take: the shorter of the recipe's and the site's limits."""
    limits = [s for s in (asked, policy.seconds) if s is not None]
    return min(limits) if limits else None


def _list(names: Sequence[str]) -> str:
    return ", ".join(f"`{n}`" for n in names[:10]) + (", ..." if len(names) > 10 else "") if names else "none"


# ------------------------------------------------------------------------------------------- what a reply costs


def participation(policy: Policy, method: Method, cohort: int, sites: int) -> Event:
    """What one more reply costs this site, as far as its rules trust others; multiplier 0 is no noise at all.

    Noise counts only where a clip before it bounds the message by the norm that the noise is meant for.

    Args:
        cohort: sites asked in the round, as the job says: each brings its share of split noise.
    """
    uplink = list(method.uplink)
    at = next((i for i, codec in enumerate(uplink) if codec.private), None)
    if at is None:
        return Event(0.0)
    codec, bounds = uplink[at], [c.bound for c in uplink[:at] if c.bound is not None]
    meant = codec.assumes_bound
    if meant is not None and (not bounds or min(bounds) > meant):
        return Event(0.0)
    everyone = Sampling("fixed", sites, sites)  # others hold other data: this site's is replaced, not removed
    if renyi := codec.renyi(cohort if codec.needs_sum and policy.trust != "nobody" else 1):
        return Event(0.0, everyone, renyi=renyi if math.isfinite(max(renyi)) else ())
    if not codec.needs_sum:
        return Event(codec.noise, everyone)
    if policy.trust == "nobody":
        return Event(codec.noise / math.sqrt(cohort), everyone)
    law = method.select.sampling(sites)
    if policy.trust == "sum":
        law = everyone if law.law == "fixed" else Sampling()
    return Event(codec.noise, law)


def spent(policy: Policy, event: Event, rounds: int) -> tuple[float, float] | None:
    """Epsilon of one reply and of ``rounds`` at the policy's delta; None when nothing is hidden."""
    if event.bare:
        return None
    return epsilon((event,), policy.delta), epsilon((replace(event, count=rounds),), policy.delta)
