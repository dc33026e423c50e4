"""A site's own rules (``policy.yaml``), and the book of what has left it today.

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

Days are UTC. Budgets are per day and start anew: a promise over several days is the sum of them.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from atoll.core.build import Reader, find, names_in
from atoll.core.errors import AtollError, RecipeError, RunError, did_you_mean
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


# ------------------------------------------------------------------------------------------- the book


@dataclass(frozen=True, slots=True)
class Day:
    """What has been booked on a day."""

    bytes: int = 0
    events: tuple[Event, ...] = ()


@dataclass
class Meter:
    """What has left the site, by UTC day: an append-only file of JSON lines in the site's folder.

    A booking is on the disk before what it stands for leaves. So whatever is killed when, the book may say more than
    has left, never less. Several processes may share a book.

    Args:
        path: of the file.
        now: seconds since 1970.
    """

    path: Path
    now: Callable[[], float] = time.time
    _days: dict[str, Day] = field(default_factory=dict, init=False, repr=False)
    _read: int = field(default=0, init=False, repr=False)

    def today(self) -> Day:
        """What has been booked today.

        Raises:
            RunError: the book cannot be read; then nothing may leave.
        """
        with self._open() as file:
            return self._catch_up(file).get(self._day(), Day())

    def book(self, policy: Policy, size: int, event: Event | None = None, about: str = "") -> str | None:
        """Book something that is about to leave; a refusal means that it must not, and that nothing was booked.

        Args:
            size: bytes on the wire.
            event: of :func:`participation`; None for what is no reply to a visit, or was sent before.
            about: for people who read the book.

        Raises:
            RunError: the book cannot be read or written.
        """
        with self._open() as file:
            day = self._day()
            before = self._catch_up(file).get(day, Day())
            refused = _over(policy, before, size, event)
            if refused is None:
                entry = {"day": day, "bytes": size, "event": asdict(event) if event else None, "about": about[:200]}
                _append(file, json.dumps(entry, allow_nan=False).encode() + b"\n", self.path)
            return refused

    def refusal(self, policy: Policy, size: int, event: Event | None = None) -> str | None:
        """What :meth:`book` would answer today; nothing is booked."""
        return _over(policy, self.today(), size, event)

    def _day(self) -> str:
        return datetime.fromtimestamp(self.now(), UTC).date().isoformat()

    @contextmanager
    def _open(self) -> Iterator[int]:
        """The file, locked for this process alone."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as e:
            raise RunError(f"{self.path}, the book of what leaves this site, cannot be opened ({e.strerror}).") from e
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)

    def _catch_up(self, file: int) -> dict[str, Day]:
        """Read what was added since the last look. A last line that was cut off was never acted upon: it goes."""
        size = os.fstat(file).st_size
        if size < self._read:  # somebody else's file by now
            self._days, self._read = {}, 0
        raw = os.pread(file, size - self._read, self._read) if size > self._read else b""
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            os.ftruncate(file, self._read + whole)
        for line in raw[:whole].splitlines():
            day, bytes_, event = self._entry(line)
            d = self._days.get(day, Day())
            self._days[day] = Day(d.bytes + bytes_, _with(d.events, event))
        self._read += whole
        return self._days

    def _entry(self, line: bytes) -> tuple[str, int, Event | None]:
        try:
            e = json.loads(line)
            event, size = e["event"], e["bytes"]
            if event is not None:
                renyi = tuple(float(d) for d in event["renyi"])
                event = Event(float(event["multiplier"]), Sampling(**event["sampling"]), _count(event["count"]), renyi)
                if not 0 <= event.multiplier < math.inf:
                    raise ValueError("multiplier")
            return date.fromisoformat(e["day"]).isoformat(), _count(size), event
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise RunError(
                f"{self.path}, the book of what leaves this site, is damaged. Nothing leaves until it is mended."
            ) from error


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("count")
    return value


def _append(file: int, line: bytes, path: Path) -> None:
    """The whole line on the disk, or an error: then what it stands for does not leave."""
    try:
        if os.write(file, line) != len(line):
            raise OSError(None, "the disk is full")
        os.fsync(file)
    except OSError as e:
        raise RunError(f"{path}, the book of what leaves this site, cannot be written ({e.strerror}).") from e


def _with(events: tuple[Event, ...], new: Event | None) -> tuple[Event, ...]:
    """Equal events become one with a count."""
    if new is None:
        return events
    for i, e in enumerate(events):
        if replace(e, count=new.count) == new:
            return (*events[:i], replace(e, count=e.count + new.count), *events[i + 1 :])
    return (*events, new)


def _over(policy: Policy, day: Day, size: int, event: Event | None) -> str | None:
    """Whether a day's limits would be exceeded."""
    if policy.bytes_per_day is not None and day.bytes + size > policy.bytes_per_day:
        return (
            f"This site sends at most {policy.bytes_per_day:,} bytes a day; today it has sent {day.bytes:,}, and "
            f"{size:,} more are too many."
        )
    if policy.epsilon_per_day is None or event is None:
        return None
    if event.bare:
        return (
            "The method adds no noise that this site can count on, and the site has an epsilon budget. Add `clip` and "
            "`gaussian_noise` to `uplink`."
        )
    if any(e.bare for e in day.events):
        return "Something left this site without noise today, so its epsilon budget for the day is spent."
    try:
        spent = epsilon(_with(day.events, event), policy.delta)
    except AtollError as e:
        return f"What this reply would cost cannot be added to what left today. {str(e).split('. ')[0].rstrip('.')}."
    if spent > policy.epsilon_per_day:
        before = epsilon(day.events, policy.delta)
        return (
            f"This site spends at most epsilon {policy.epsilon_per_day:g} a day (at delta {policy.delta:g}); today it "
            f"has spent {before:.3g}, and with this reply it would be {spent:.3g}."
        )
    return None
