"""A site receives, works, and replies. The same code runs on every backend.

A :class:`Worker` owns one model instance per architecture and reuses it for every site: parameters are copied
in place, nothing is rebuilt. All that a site keeps between visits is one :class:`Message` in a state store.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from atoll.core.allocator import keep_freed_memory
from atoll.core.errors import AtollError, SiteFailed
from atoll.core.message import Message, encoded_size
from atoll.core.streams import key
from atoll.core.tree import Parts, Tree, clone, copy_, moved, named_tensors, pick
from atoll.federated.flops import flops_per_example
from atoll.federated.method import CodecContext
from atoll.federated.secure.site import SecureSite, Summand, summand
from atoll.federated.secure.vault import SimulatedVault
from atoll.federated.states import States
from atoll.federated.visit import Job, Outcome, Result, Setup, SiteModel, Visit, encode_chain
from atoll.models.model import seeded


class Worker:
    """Runs visits one after the other with shared model instances. One per process."""

    def __init__(self, setup: Setup, states: States) -> None:
        self.setup, self.states = setup, states
        self._models: dict[object, SiteModel] = {}
        self.replica: Parts = {}
        vault = setup.vault or SimulatedVault(setup.seed)
        self.secure = SecureSite(setup.method, vault) if setup.method.secure is not None else None
        keep_freed_memory()

    def publish(self, replica: Parts) -> None:
        """Set what every site holds by now."""
        self.replica = replica

    def site_model(self, site: int | None, slot: int = 0) -> SiteModel:
        """The shared instance for a site's architecture (None: the server's); one per slot in a group."""
        s, share = self.setup, self.setup.method.share
        info = s.info(site) if site is not None else None
        cache_key = (s.task.model_key(site), share.prepare_key(info), slot)
        at = self._models.get(cache_key)
        if at is None:
            model = s.task.model(s.seed, site)
            with seeded(s.seed, "prepare"):  # what a share adds starts alike everywhere
                model = share.prepare_for(model, info, s.federation.info).to(s.device)
            split, tensors = share.split(model), named_tensors(model)
            shared = set(split.shared)
            parameters = {n for n, _ in model.named_parameters()}
            reset = [n for n in tensors if n in split.private or (n not in parameters and n not in shared)]
            at = self._models[cache_key] = SiteModel(
                model, tensors, split, clone(pick(tensors, reset)), frozenset(tensors.keys() - parameters)
            )
        return at

    def place(
        self, site: int | None, state_tag: str | None, slot: int = 0, replica: Parts | None = None
    ) -> tuple[SiteModel, Message | None]:
        """Install the replica and the site's private tensors; returns the site's stored state too."""
        at = self.site_model(site, slot)
        copy_(at.tensors, at.initial)
        self.setup.method.share.install(at, self.replica if replica is None else replica)
        state = self.states.get(site, state_tag) if site is not None and state_tag else None
        if state is not None:
            copy_(at.tensors, state.parts.get("private", {}))
        return at, state

    def run(self, job: Job) -> Outcome:
        """Do one visit. Whatever goes wrong at the site is an outcome, not an exception."""
        started = time.perf_counter()
        try:
            with time_limit(self.setup.timeout):
                outcome = self._run(job)
        except Exception as e:
            what = str(e) if isinstance(e, AtollError) else f"{type(e).__name__}: {e}"
            return Outcome(job.site, None, seconds=time.perf_counter() - started, error=what or type(e).__name__)
        return outcome

    def together(self, job: Job, others: Iterable[Job]) -> int:
        """How many of the others, first come first, are best done with ``job`` by one :meth:`run_many`."""
        with contextlib.suppress(Exception):  # a model that cannot be built is an outcome of :meth:`run`
            at = self.site_model(job.site)
            most = 1 if job.dry else self.setup.method.local.together(at, self.setup.task)
            alike = (j.round == job.round and not j.dry and self.site_model(j.site) is at for j in others)
            return sum(itertools.takewhile(bool, itertools.islice(alike, most - 1)))
        return 0

    def run_many(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcomes of jobs that go :meth:`together`: to the bit what :meth:`run` gives for each."""
        limit = self.setup.timeout
        if len(jobs) > 1:
            with contextlib.suppress(Exception), time_limit(limit and limit * len(jobs)):
                started = time.perf_counter()
                visits = [self._enter(job, slot) for slot, job in enumerate(jobs)]
                results = self.setup.method.local.run_many([visit for visit, _ in visits])
                each = (time.perf_counter() - started) / len(jobs)
                return [self._leave(j, *v, r, each) for j, v, r in zip(jobs, visits, results, strict=True)]
        return [self.run(job) for job in jobs]  # also after an error: this tells whose it was

    def _run(self, job: Job) -> Outcome:
        started = time.perf_counter()
        visit, parts = self._enter(job)
        result = self.setup.method.local.run(visit)
        return self._leave(job, visit, parts, result, time.perf_counter() - started)

    def _enter(self, job: Job, slot: int = 0) -> tuple[Visit, Parts]:
        """The visit, ready to work, and all that the site has kept."""
        s, share, replica = self.setup, self.setup.method.share, self.replica
        if job.message is not None and not share.incremental:
            replica = share.receive({}, job.message)  # it came instead of the common broadcast
        at, stored = self.place(job.site, job.state_tag, slot, replica)
        parts = moved(stored.parts, s.device) if stored is not None else {}
        visit = Visit(
            site=s.info(job.site), round=job.round, task=s.task, at=at, data=s.federation.sites[job.site],
            replica=share.own(replica, at), message=job.message, state=_under(parts, "local."),
            seed=s.seed, device=s.device, repeat=job.repeat, dry=job.dry,
        )  # fmt: skip
        _seed_everything(key(s.seed, "global", job.round, job.site, job.repeat), s.device)
        at.model.train()
        return visit, parts

    def _leave(self, job: Job, visit: Visit, parts: Parts, result: Result, seconds: float) -> Outcome:
        """Encode the reply, keep the site's state, and account."""
        s, method = self.setup, self.setup.method
        message, num_samples, metrics = result.message, len(visit.data.train), result.metrics
        codec_states: list[Parts] = [_under(parts, f"codec{i}.") for i in range(len(method.uplink))]
        if self.secure is not None:
            message = self._masked(self.secure, job, self._summand(job, visit, message))
            num_samples, metrics = 1, {}  # the sum alone is the server's business
        else:
            if any(c.private for c in method.uplink):
                num_samples = 1  # the count is private too
            else:
                message = Message(message.kind, message.parts, {"num_samples": num_samples, **message.facts})
            context = CodecContext(s.seed, job.round, job.site, job.cohort)
            message, codec_states = encode_chain(method.uplink, message, codec_states, context)
        encoded_size(message)  # what cannot be encoded is the site's failure, not the server's
        tag = None
        if not job.dry:
            tag = self._keep(job, visit.at, result, codec_states)
        forward, backward = self.flops(self.site_model(job.site), job.site)
        flops = result.cost.forward * forward + result.cost.backward * backward
        return Outcome(job.site, message, tag, num_samples, flops, seconds, metrics)

    def _summand(self, job: Job, visit: Visit, message: Message) -> Summand:
        """The update as integers, bounded first."""
        s, method = self.setup, self.setup.method
        context = CodecContext(s.seed, job.round, job.site, job.cohort)
        bounding = tuple(c for c in method.uplink if not c.private)  # noise is drawn in whole steps, see SecureSum
        message, _ = encode_chain(bounding, message, [{} for _ in bounding], context)
        return summand(method, message, visit.replica, len(visit.data.train), context, lambda: visit.stream("secure"))

    def _masked(self, secure: SecureSite, job: Job, update: Summand) -> Message:
        """Nothing that was learned leaves without its masks."""
        if job.dry:
            return update.message()
        if job.secure is None:
            raise SiteFailed("this method sums in secret, and the server did not say with whom")
        if len(job.secure.channels) != job.cohort:
            raise SiteFailed("the server names another number of sites than take part in the secure sum")
        secure.mask(job.site, job.secure, update.words)
        return update.message(job.secure.scope)

    def form(self, site: int, cohort: int) -> Message:
        """What a reply to a secure sum looks like, before it is masked: that of a visit without steps."""
        job = Job(site, 0, cohort=cohort, dry=True)
        visit, _ = self._enter(job)
        return self._summand(job, visit, self.setup.method.local.run(visit).message).message()

    def _keep(self, job: Job, at: SiteModel, result: Result, codec_states: list[Parts]) -> str | None:
        """Store all that the site keeps, under a new tag; the engine commits the tag when it accepts the reply."""
        parts: dict[str, Tree] = {}
        if at.split.private:
            parts["private"] = clone(pick(at.tensors, at.split.private))
        parts |= {f"local.{name}": tree for name, tree in result.state.items()}
        for i, state in enumerate(codec_states):
            parts |= {f"codec{i}.{name}": tree for name, tree in state.items()}
        if not parts:
            return None
        tag = f"{job.round}-{job.repeat}"
        self.states.put(job.site, tag, Message("state", parts))
        return tag

    def flops(self, at: SiteModel, site: int | None) -> tuple[float, float]:
        """FLOPs of one forward and one backward pass for one example."""
        trains = tuple(p.requires_grad for p in at.model.parameters())  # of several adapters, one
        if trains not in at.flops:
            sites = self.setup.federation.sites
            own = sites[site or 0].train
            labelled = (part for s in sites for part in (s.train, s.validation, s.test))
            rows = own if len(own) else next((part for part in labelled if len(part)), own)
            at.flops[trains] = flops_per_example(self.setup.task, at.model, rows, self.setup.device)
        return at.flops[trains]

    def answer(self, site: int, request: Message) -> Message:
        """Answer a question that is not a visit; raises :class:`AtollError` for one that no site answers."""
        if self.secure is not None and request.kind.startswith("secure."):
            return self.secure.answer(site, request)
        raise SiteFailed(f"a site does not answer `{request.kind}`")

    def evaluate(self, site: int | None, state_tag: str | None, part: str = "test") -> dict[str, float]:
        """Metrics of a site's model on its own rows (``part="common"``: on the common test set), or, without a
        site, of the global model on the common test set."""
        at, _ = self.place(site, state_tag)
        federation = self.setup.federation
        common = site is None or part == "common"
        data = federation.test if common else getattr(federation.sites[site or 0], part)
        if len(data) == 0:
            return {}
        at.model.eval()
        with torch.no_grad():
            return self.setup.task.evaluate(at.model, data)


def _seed_everything(seed: int, device: str) -> None:
    """Seed the global generators (dropout and the like)."""
    if device == "cpu":  # torch.manual_seed also keeps a stack trace for each absent accelerator
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _under(parts: Parts, prefix: str) -> dict[str, Tree]:
    return {name[len(prefix) :]: tree for name, tree in parts.items() if name.startswith(prefix)}


class time_limit:
    """Raise in the running code after ``seconds`` (main thread of a process on Unix; elsewhere no limit)."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        import signal
        import threading

        self.active = bool(self.seconds) and hasattr(signal, "setitimer")
        self.active = self.active and threading.current_thread() is threading.main_thread()
        if self.active:
            self.previous = signal.signal(signal.SIGALRM, self._expired)
            signal.setitimer(signal.ITIMER_REAL, float(self.seconds or 0))

    def __exit__(self, *_: Any) -> None:
        if self.active:
            import signal

            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.previous)

    def _expired(self, *_: Any) -> None:
        raise TimeoutError(f"no answer within {self.seconds:g} s")
