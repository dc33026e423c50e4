"""Secure sums in the engine: the model of an unmasked but equally rounded sum, whoever drops out, on every backend."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from atoll.core.errors import AtollError, MessageError, RecipeError, RunError, SiteFailed
from atoll.core.message import Message, decode, encode, encoded_size
from atoll.core.streams import stream
from atoll.core.tree import equal, flatten, unflatten
from atoll.federated import checkpoint
from atoll.federated.backends.inline import Inline, InlineWorkers
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.check import check_method
from atoll.federated.codecs.cast import Cast
from atoll.federated.codecs.clip import Clip
from atoll.federated.codecs.gaussian_noise import GaussianNoise
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.codecs.top_k import TopK
from atoll.federated.combine.fixed_mean import FixedMean
from atoll.federated.combine.krum import Krum
from atoll.federated.combine.median import Median
from atoll.federated.combine.weighted_mean import WeightedMean
from atoll.federated.dispatch import Dispatch
from atoll.federated.engine import Engine
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.method import CodecContext, DeviceProfile, LocalWork, MergeContext, Reply
from atoll.federated.methods.edgefd import edgefd
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.fedbuff import fedbuff
from atoll.federated.methods.fedkseed import fedkseed
from atoll.federated.methods.flora import flora
from atoll.federated.methods.frl import frl
from atoll.federated.methods.scaffold import scaffold
from atoll.federated.remote import RemoteSite
from atoll.federated.schedules.synchronous import Synchronous
from atoll.federated.secure import rehearsal
from atoll.federated.secure.cohort import CHANNEL, COHORT, PREPARE, UNMASK, Cohort
from atoll.federated.secure.secure_sum import SecureSum, bound
from atoll.federated.secure.server import SecureRound
from atoll.federated.secure.site import SecureSite, summand
from atoll.federated.secure.vault import FileVault, SimulatedVault, Used
from atoll.federated.select.uniform import Uniform
from atoll.federated.states import FileStates
from atoll.federated.visit import Job, Outcome, Setup
from atoll.federated.wire import pack, unpack
from atoll.federated.worker import Worker
from atoll.models.logistic import Logistic
from atoll.privacy.secure_sum import word
from atoll.recipes.plan import make_plan
from atoll.tasks.classification import Classification

SECURE = SecureSum(threshold=0.6)
UNIFORM = WeightedMean(by="uniform")


@pytest.fixture(scope="module")
def task(digits):
    return Classification(digits.info, Logistic())


@pytest.fixture(scope="module")
def setup(task, digits_federation):
    """Five sites of unequal size, FedAvg under a secure sum."""
    method = fedavg().but(secure=SECURE)
    return Setup(task=task, federation=digits_federation, method=method, profiles=(DeviceProfile(),) * 5, seed=3)


@dataclass(frozen=True)
class Flaky(Inline):
    """Sites that fail: ``lost[phase]`` are those that do not answer in it, in round 0 alone. Keeps what was sent."""

    lost: dict = field(default_factory=dict)
    seen: list = field(default_factory=list)

    def open(self, setup):
        workers = FlakyWorkers(setup)
        workers.lost, workers.seen = dict(self.lost), self.seen
        return workers


class FlakyWorkers(InlineWorkers):
    asked = 0

    def submit(self, jobs):
        self.sites = {**getattr(self, "sites", {}), **{self._next + i: job for i, job in enumerate(jobs)}}
        self.seen += [("down", job.site, job.secure.message(COHORT)) for job in jobs if job.secure is not None]
        return super().submit(jobs)

    def result(self, ticket):
        outcome, job = super().result(ticket), self.sites[ticket]
        if job.round == 0 and job.site in self.lost.get("visit", ()):
            return Outcome(job.site, None, error="no power")
        self.seen.append(("up", job.site, outcome.message))
        return outcome

    def ask(self, requests):
        answers = super().ask(requests)
        self.seen += [("down", site, request) for site, request in requests.items()]
        for site, request in requests.items():
            phase = request.kind.removeprefix("secure.")
            if request.facts.get("round", self.asked) == 0 and site in self.lost.get(phase, ()):
                answers[site] = "no power"
        self.asked += 1  # a long-term key is asked for outside of rounds, at first and when it did not come
        self.seen += [("up", site, a) for site, a in answers.items() if isinstance(a, Message)]
        return answers


def open_engine(setup, backend=None, state=None):
    return Engine(setup, (backend or Inline()).open(setup), state)


# ------------------------------------------------------------------------------------------- the oracle


def expected(setup, replica, round, sites, cohort=5):
    """The next weights from an open sum over ``sites`` of updates that are rounded alike, in exact integers."""
    secure = setup.method.secure
    plain = Worker(replace(setup, method=setup.method.but(secure=None)), states=None)
    plain.publish(replica)
    levels = 2 ** (secure.bits - 1) - 1
    total, weight = 0, 0
    for site in sites:
        outcome = plain.run(Job(site, round, cohort=cohort))
        x = flatten(outcome.message.parts["delta"]).double().numpy() / (secure.clip / levels)
        u = torch.rand(len(x), generator=stream(setup.seed, "secure", round, site), dtype=torch.float64).numpy()
        k = np.floor(np.clip(x, -levels, levels) + u).astype(np.int64)
        total, weight = total + k.astype(object) * outcome.num_samples, weight + outcome.num_samples
    summed = torch.tensor([float(int(t)) * (secure.clip / levels) for t in total], dtype=torch.float64).float()
    mean = unflatten(summed * (1.0 / weight), replica["weights"])
    return {n: w + mean[n] for n, w in replica["weights"].items()}


subsets = st.sets(st.integers(0, 4), max_size=3)


def test_whoever_drops_out_the_rest_is_summed_or_nothing_is(setup):
    @settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking takes minutes
    @given(channel=st.sets(st.integers(0, 4), max_size=1), prepare=subsets, visit=subsets, unmask=subsets)
    def holds(channel, prepare, visit, unmask):
        engine = open_engine(setup, Flaky({"channel": channel, "prepare": prepare, "visit": visit, "unmask": unmask}))
        before, known = engine.state.replica, set(range(5)) - channel
        prepared = known - prepare
        stay = prepared - visit
        need = setup.method.secure.least(len(known))
        row = engine.step()
        if min(len(prepared), len(stay), len(stay - unmask)) >= need:
            assert equal(engine.state.replica["weights"], expected(setup, before, 0, sorted(stay), len(known)))
            assert row.replies == len(stay)
            assert len(row.notes) == len(stay & unmask)
        else:
            assert equal(engine.state.replica["weights"], before["weights"])
            assert len([n for n in row.notes if n.startswith(("merge skipped", "no usable reply"))]) == 1
        if len(prepared) >= need:
            assert row.refused.keys() == set(range(5)) - stay
        before = engine.state.replica
        row = engine.step()  # all are back
        assert (row.replies, row.notes, row.refused) == (5, [], {})
        assert equal(engine.state.replica["weights"], expected(setup, before, 1, range(5)))

    holds()


@pytest.mark.parametrize(
    ("phase", "says"),
    [
        ("prepare", "2 of 5 sites prepared a secure sum that needs 3"),
        ("visit", "2 of 5 replies arrived, and the secure sum needs 3, so none was learned"),
        ("unmask", "2 of 5 sites helped to unmask the secure sum, which needs 3"),
    ],
)
def test_a_merge_that_lacks_sites_says_so(setup, phase, says):
    row = open_engine(setup, Flaky({phase: {0, 2, 4}})).step()
    assert any(f"merge skipped: {says}" in note for note in row.notes), row.notes


# ------------------------------------------------------------------------------------------- what the server sees


def test_replies_look_like_chance_and_hold_nothing_else(setup):
    flaky = Flaky()
    engine = open_engine(setup, flaky)
    row = engine.step()
    replies = [m for way, _, m in flaky.seen if way == "up" and m.kind == "delta"]
    assert len(replies) == 5
    for m in replies:
        assert m.facts.keys() == {"secure"}
        assert list(m.parts) == ["secure"]
        bits = np.unpackbits(m.parts["secure"]["words"].numpy().view(np.uint8))
        assert abs(bits.mean() - 0.5) < 5 * 0.5 / len(bits) ** 0.5
    assert row.site_metrics == {}


def test_a_plan_knows_that_masks_take_time(setup):
    worker = Worker(setup, states=None)
    worker.publish(setup.method.share.initial(worker.site_model(None).model))
    form = worker.form(0, 5)
    few, many = (rehearsal.seconds(setup.method, form, n) for n in (8, 800))
    assert 0 < 20 * few < many


def test_masks_are_fresh_in_every_run_and_the_model_is_not(setup):
    runs = []
    for _ in range(2):
        flaky = Flaky()
        engine = open_engine(setup, flaky)
        engine.step()
        runs.append((engine.state.replica, [m.parts["secure"]["words"] for _, _, m in flaky.seen if m.kind == "delta"]))
    (model, first), (same, second) = runs
    assert equal(model["weights"], same["weights"])
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_byte_of_the_phases_is_in_the_ledger_and_the_plan(setup):
    flaky = Flaky()
    engine = open_engine(setup, flaky)
    rows = [engine.step() for _ in range(3)]
    for way, counted in (("up", [r.up_bytes for r in rows]), ("down", [r.down_bytes for r in rows])):
        sent = sum(len(encode(m)) for direction, _, m in flaky.seen if direction == way)
        broadcasts = 15 * engine.broadcasts.bytes if way == "down" else 0
        assert sum(sum(c.values()) for c in counted) == sent + broadcasts
    foreseen = make_plan(setup, 3)
    assert foreseen.exact
    assert foreseen.up_bytes == sum(sum(r.up_bytes.values()) for r in rows)
    assert foreseen.down_bytes == sum(sum(r.down_bytes.values()) for r in rows)
    assert foreseen.virtual_seconds == pytest.approx(rows[-1].time)
    open_sum = open_engine(replace(setup, method=fedavg()))
    assert rows[0].time > open_sum.step().time, "phases take virtual time"


# ------------------------------------------------------------------------------------------- same bits


@pytest.mark.parametrize("method", [fedavg(), scaffold(), fedkseed(steps=5, pool=64)], ids=lambda m: m.card.name)
def test_the_pool_has_the_same_bits(run, method):
    secure = SecureSum(threshold=0.6, bits=24, clip=50.0 if method.card.name == "fedkseed" else 1.0)
    method = method.but(secure=secure, select=Uniform(count=3))
    traces = []
    for backend in (Inline(), ProcessPool(workers=2)):
        rows = run(method, rounds=3, backend=backend)
        assert all(r.replies == 3 and not r.refused and not r.notes and not r.site_metrics for r in rows)
        traces.append((rows[-1].engine.state.replica, [(r.time, r.up_bytes, r.down_bytes) for r in rows]))
    (model, ledger), (model_, ledger_) = traces
    assert ledger == ledger_
    assert all(equal(model[part], model_[part]) for part in model)
    plain = run(method.but(secure=None), rounds=3)[-1].engine.state.replica
    for n, w in plain["weights"].items():
        assert torch.allclose(model["weights"][n], w, atol=2e-4), n


def test_a_resumed_run_goes_on_with_the_same_bits_and_bytes(setup, tmp_path):
    whole = open_engine(setup)
    rows = [whole.step() for _ in range(4)]
    first = open_engine(setup)
    first.step(), first.step()
    checkpoint.save(first.state, tmp_path, {})
    state, _ = checkpoint.load(tmp_path)
    again = open_engine(setup, state=state)
    for row in rows[2:]:
        other = again.step()
        assert (other.up_bytes, other.down_bytes, other.time) == (row.up_bytes, row.down_bytes, row.time)
    assert equal(again.state.replica["weights"], whole.state.replica["weights"])


def test_a_straggler_is_a_dropout(setup):
    slow = replace(setup.profiles[0], flops_per_second=1.0)
    late = replace(
        setup, profiles=(*setup.profiles[:4], slow), method=setup.method.but(schedule=Synchronous(deadline=60.0))
    )
    engine = open_engine(late)
    before = engine.state.replica
    row = engine.step()
    assert row.refused == {4: "late"}
    assert equal(engine.state.replica["weights"], expected(late, before, 0, range(4)))


@dataclass(frozen=True)
class Diverges(LocalWork):
    """At site 1 a number overflows."""

    inner: LocalSGD = field(default_factory=LocalSGD)

    def run(self, visit):
        result = self.inner.run(visit)
        if visit.site.site == 1:
            next(iter(result.message.parts["delta"].values())).view(-1)[0] = float("nan")
        return result


def test_a_site_whose_update_is_not_finite_stays_out(setup):
    broken = replace(setup, method=setup.method.but(local=Diverges()))
    engine = open_engine(broken)
    before = engine.state.replica
    row = engine.step()
    assert row.refused == {1: "the update holds NaN or infinite numbers, so this site stays out of the sum"}
    assert equal(engine.state.replica["weights"], expected(setup, before, 0, [0, 2, 3, 4]))


# ------------------------------------------------------------------------------------------- combiners


def replies(n=4):
    draw = torch.Generator().manual_seed(0)
    parts = [{"delta": {"w": torch.randn(3, 2, generator=draw), "b": torch.randn(2, generator=draw)}} for _ in range(n)]
    return [Reply(i, Message("delta", p), num_samples=3 * i + 1) for i, p in enumerate(parts)]


def scalar_replies(n=4):
    draw = torch.Generator().manual_seed(0)
    out = []
    for i in range(n):
        seeds = torch.randint(8, (5,), generator=draw, dtype=torch.int32)
        steps = {"seeds": seeds, "scalars": torch.randn(5, generator=draw)}
        out.append(Reply(i, Message("seed_scalars", {"steps": steps}), num_samples=3 * i + 1))
    return out


def combiners():
    from atoll.federated.combine.scatter_sum import ScatterSum

    return [
        (WeightedMean(), replies()), (UNIFORM, replies()), (FixedMean(count=7.0), replies()),
        (ScatterSum(), scalar_replies()), (ScatterSum(by="uniform"), scalar_replies()),
    ]  # fmt: skip


@pytest.mark.parametrize(("combine", "given_"), combiners(), ids=lambda c: repr(c)[:40])
def test_terms_and_total_are_the_combiner(combine, given_):
    """sum_k w_k term(u_k), with counted parts unweighted, then total: what ``combine`` gives."""
    context = MergeContext(0, {"scalars": {"G": torch.zeros(8)}}, 4, 0, None)
    usual = combine.combine(iter(given_), context)
    sums, weight = None, 0
    for reply in given_:
        w = reply.num_samples if combine.weighted else 1
        term = combine.term(reply.message, context.replica)
        scaled = {
            part: {n: t.double() * (1 if part in combine.counted else w) for n, t in tree.items()}
            for part, tree in term.parts.items()
        }
        sums = (
            scaled if sums is None else {p: {n: sums[p][n] + t for n, t in tree.items()} for p, tree in scaled.items()}
        )
        weight += w
    total = combine.total(Message(usual.kind, sums), weight)
    assert total.parts.keys() == usual.parts.keys()
    for part, tree in usual.parts.items():
        assert total.parts[part].keys() == tree.keys()
        for n, t in tree.items():
            assert torch.allclose(total.parts[part][n], t.double(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------- rounding and noise


def integers(method, tree, cohort=5, weight=1, site=0):
    generator = partial(stream, 0, "secure", 0, site)
    update = summand(method, Message("delta", {"delta": tree}), {}, weight, CodecContext(0, 0, site, cohort), generator)
    return update.words.astype(np.int64) if update.words.dtype == np.uint64 else update.words.view(np.int32).astype(int)


def test_stochastic_rounding_is_right_on_average_and_nearest_is_nearest():
    secure = SecureSum(bits=8, clip=1.0)
    tree = {"w": torch.full((20_000,), 0.3 / 127)}
    stochastic = integers(fedavg().but(combine=UNIFORM, secure=secure), tree)[:-1]
    assert set(stochastic.tolist()) == {0, 1}
    assert stochastic.mean() == pytest.approx(0.3, abs=0.02)
    nearest = integers(fedavg().but(combine=UNIFORM, secure=replace(secure, rounding="nearest")), tree)[:-1]
    assert not nearest.any()


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=5), st.integers(8, 24), st.integers(1, 1000))
def test_no_site_exceeds_its_bound(values, bits, weight):
    method = fedavg().but(secure=SecureSum(bits=bits, most_samples=1000))
    k = integers(method, {"w": torch.tensor(values)}, cohort=1, weight=weight)
    assert abs(k).max() <= bound(method, 1)
    assert k[-1] == weight


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=30), st.integers(0, 9))
def test_noise_is_added_in_steps_that_do_not_depend_on_the_update(values, seed):
    noise = GaussianNoise(1.0, 0.5, test_seed=seed, allow_insecure_test_seed=True)
    method = fedavg().but(uplink=(Clip(0.5), noise), combine=UNIFORM, secure=SecureSum(clip=0.5))
    x = torch.tensor(values)
    x = x * min(1.0, 0.5 / float(x.norm().clamp(min=1e-9))) * (1 - 1e-6)
    noised, alone = integers(method, {"w": x}), integers(method, {"w": torch.zeros_like(x)})
    rounded = noised - alone
    assert rounded[:-1].tolist() == [int(v) for v in x.double().numpy() / method.secure.step]
    assert np.linalg.norm(rounded[:-1] * method.secure.step) <= 0.5, "rounding towards zero keeps the norm"


def test_the_sum_carries_the_noise_that_the_accountant_counts():
    noise = GaussianNoise(multiplier=2.0, clip_norm=0.5)
    method = fedavg().but(uplink=(Clip(0.5), noise), combine=UNIFORM, secure=SecureSum(clip=0.5))
    total = sum(integers(method, {"w": torch.zeros(20_000)}, cohort=8, site=s)[:-1] for s in range(8))
    assert total.std() * method.secure.step == pytest.approx(1.0, rel=0.03)


def test_sums_have_room_for_noise():
    loud = fedavg().but(uplink=(Clip(1.0), GaussianNoise(500.0, 1.0)), combine=UNIFORM, secure=SecureSum(bits=16))
    quiet = loud.but(uplink=(Clip(1.0), GaussianNoise(1.0, 1.0)))
    assert word(bound(quiet, 100)) is np.uint32
    assert word(bound(loud, 100)) is np.uint64


def test_a_noised_run_learns_and_costs_what_it_costs_without_masks(run):
    parts = {"uplink": (Clip(1.0), GaussianNoise(0.1, 1.0)), "combine": UNIFORM}
    rows = run(fedavg().but(**parts, secure=SECURE), rounds=3)
    assert all(r.replies == 5 and not r.refused for r in rows)
    usual = run(fedavg().but(**parts), rounds=3)
    assert rows[-1].engine.state.cohorts == usual[-1].engine.state.cohorts
    assert rows[-1].metrics["loss"] == pytest.approx(usual[-1].metrics["loss"], rel=0.2)


def test_counts_are_added_without_the_weight():
    method = fedkseed(pool=4).but(secure=SecureSum(bits=20, clip=4.0, rounding="nearest"))
    steps = {"seeds": torch.tensor([3, 3, 1], dtype=torch.int32), "scalars": torch.tensor([0.5, -0.25, 1.0])}
    update = summand(
        method, Message("seed_scalars", {"steps": steps}), {"scalars": {"G": torch.zeros(4)}}, 10,
        CodecContext(0, 0, 0, 5), partial(stream, 0),
    )  # fmt: skip
    found = update.words.astype(np.int64) * method.secure.step
    g, magnitude, visits = [0, 10, 0, 2.5], [0, 1, 0, 0.75], [0, 1, 0, 2]
    assert found[:-1] == pytest.approx(np.array([*g, *magnitude, *visits]), abs=10 * method.secure.step)
    assert update.words[-1] == 10


def test_what_cannot_be_summed_stays_at_the_site():
    method = fedavg().but(secure=SecureSum(most_samples=10))
    with pytest.raises(SiteFailed, match="11 examples are more than `most_samples`, 10; raise it"):
        integers(method, {"w": torch.zeros(2)}, weight=11)
    with pytest.raises(SiteFailed, match="`delta/n` holds whole numbers"):
        integers(method, {"w": torch.zeros(2), "n": torch.zeros(1, dtype=torch.int64)})
    with pytest.raises(SiteFailed, match="NaN or infinite numbers, so this site stays out"):
        integers(method, {"w": torch.tensor([1.0, float("inf")])})


# ------------------------------------------------------------------------------------------- a site against its server


class World:
    """Three sites and a server that may say what it likes."""

    def __init__(self, vaults=None):
        self.method = fedavg().but(secure=SecureSum(threshold=0.6))
        self.vaults = vaults or SimulatedVault(0)
        self.sites = {i: SecureSite(self.method, self.vaults) for i in range(3)}
        channels = {i: self.ask(i, Message(CHANNEL)).parts["channel"]["key"].numpy().tobytes() for i in range(3)}
        self.channels = channels
        self.round = self.opened()

    def ask(self, site, request):
        return self.sites[site].answer(site, decode(encode(request)))

    def opened(self, session="0" * 32, round=0, channels=None):
        method = self.method
        form = summand(
            method, Message("delta", {"delta": {"w": torch.zeros(4)}}), {}, 1, CodecContext(0, round, 0, 3),
            partial(stream, 0),
        ).message()  # fmt: skip
        return SecureRound(method, session, round, channels or self.channels, form)

    def prepare(self, server=None):
        server = server or self.round
        server.prepared({s: self.ask(s, m) for s, m in server.preparing().items()}, lambda s, why: pytest.fail(why))
        return server

    def mask(self, site, cohort, value=1.0):
        words = np.full(5, int(value)).astype(np.uint64)
        self.sites[site].mask(site, cohort, words)
        return words


def test_a_site_helps_with_one_list_of_survivors_only():
    """First site 2 is said to have survived, then to have dropped out: both shares would unmask its reply."""
    w = World()
    server = w.prepare()
    for site in range(3):
        w.mask(site, server.told(site))
    answer = w.ask(0, server.told(0).message(UNMASK, [0, 1, 2]))
    assert len(answer.parts["shares"]["self"]) == 3
    assert len(answer.parts["shares"]["key"]) == 0
    with pytest.raises(SiteFailed, match="helped with the sum over other sites"):
        w.ask(0, server.told(0).message(UNMASK, [0, 1]))
    again = w.ask(0, server.told(0).message(UNMASK, [0, 1, 2]))
    assert encode(again) == encode(answer), "asking again is allowed, and tells nothing new"


def test_a_site_that_dropped_out_is_not_unmasked_though_its_key_is_known():
    w = World()
    server = w.prepare()
    answer = w.ask(0, server.told(0).message(UNMASK, [0, 1]))
    assert len(answer.parts["shares"]["self"]) == 2
    assert len(answer.parts["shares"]["key"]) == 1, "of site 2: its key, and not its self mask"


@pytest.mark.parametrize("survivors", [[0], [1, 2], [0, 1, 5]])
def test_a_site_helps_with_no_sum_over_too_few_or_strangers_or_without_itself(survivors):
    w = World()
    server = w.prepare()
    with pytest.raises(SiteFailed, match="needs 2 of 3 sites, this one among them"):
        w.ask(0, server.told(0).message(UNMASK, survivors))


def test_a_site_masks_one_update_a_round():
    w = World()
    cohort = w.prepare().told(0)
    first = w.mask(0, cohort)
    assert w.mask(0, cohort).tolist() == first.tolist(), "the same one again, say after a lost connection"
    with pytest.raises(SiteFailed, match="masks one update a round, and has sent another"):
        w.mask(0, cohort, value=2.0)
    fewer = replace(cohort, keys={s: k for s, k in cohort.keys.items() if s != 2}, sealed={1: cohort.sealed[1]})
    with pytest.raises(SiteFailed, match="masks one update a round"):
        w.mask(0, fewer)


def test_a_round_of_a_session_has_one_cohort_and_old_rounds_are_over():
    w = World()
    cohort = w.prepare().told(0)
    other = w.opened(channels={0: w.channels[0], 1: w.channels[1]})
    with pytest.raises(SiteFailed, match="one secure sum a round, and round 0 has had its own"):
        w.ask(0, other.preparing()[0])
    w.prepare(w.opened(round=1))
    with pytest.raises(SiteFailed, match="one secure sum a round"):
        w.mask(0, cohort)


def test_a_server_cannot_put_its_own_keys_between_two_sites():
    w = World()
    told = w.prepare().told(0)
    forged = replace(told, keys={**told.keys, 1: told.keys[2]})
    with pytest.raises(AtollError, match="keys that came with them, were changed"):
        w.mask(0, forged)
    with pytest.raises(SiteFailed, match="another key of this site for this round"):
        w.mask(0, replace(told, keys={**told.keys, 0: told.keys[2]}))
    with pytest.raises(SiteFailed, match="2 are needed"):
        w.mask(0, replace(told, keys={0: told.keys[0]}, sealed={}))
    with pytest.raises(SiteFailed, match="another long-term key of this site"):
        w.ask(0, w.opened(session="1" * 32, channels={**w.channels, 0: w.channels[1]}).preparing()[0])
    with pytest.raises(SiteFailed, match="over one site is its update"):
        w.ask(0, Cohort("2" * 32, 0, {0: w.channels[0]}, {}, {}).message(PREPARE))


def test_two_sums_have_no_secret_in_common():
    w = World()
    first, second = (w.ask(0, w.opened(session=s).preparing()[0]).parts["offer"] for s in ("a" * 32, "b" * 32))
    for name in first:
        assert not torch.equal(first[name], second[name]), name


def test_a_worker_sends_nothing_unmasked(setup):
    worker = Worker(setup, states=None)
    worker.publish(worker.setup.method.share.initial(worker.site_model(None).model))
    outcome = worker.run(Job(0, 0, cohort=5))
    assert (outcome.message, outcome.error) == (
        None, "this method sums in secret, and the server did not say with whom",
    )  # fmt: skip


@pytest.mark.parametrize("harm", ["share", "key share", "offer", "form", "names", "scope", "kind"])
def test_a_hostile_site_is_noticed(setup, harm):
    class Hostile(Flaky):
        def open(self, setup):
            workers = super().open(setup)
            ask, result = workers.ask, workers.result

            def asked(requests):
                answers = ask(requests)
                for site, a in answers.items():
                    if site == 1 and isinstance(a, Message) and "shares" in a.parts:
                        a.parts["shares"]["self" if harm == "share" else "key"][:, 3] ^= harm in ("share", "key share")
                    if site == 1 and isinstance(a, Message) and "offer" in a.parts and harm == "offer":
                        a.parts["offer"]["sealed"] = torch.zeros(4, 7, dtype=torch.uint8)
                return answers

            def resulted(ticket):
                o = result(ticket)
                if o.site != 1 or o.message is None:
                    return o
                m = o.message
                if harm == "form":
                    m = Message("delta", {"secure": {"words": m.parts["secure"]["words"][1:]}}, m.facts)
                if harm == "names":
                    layout = {"delta": {f"{n}x": at for n, at in m.facts["secure"]["layout"]["delta"].items()}}
                    m = Message("delta", m.parts, {"secure": {**m.facts["secure"], "layout": layout}})
                if harm == "scope":
                    m = Message("delta", m.parts, {"secure": {**m.facts["secure"], "scope": "f" * 64}})
                if harm == "kind":
                    m = Message("weights", m.parts, m.facts)
                return replace(o, message=m)

            workers.ask, workers.result = asked, resulted
            return workers

    engine = open_engine(setup, Hostile({"visit": {4}}))
    before = engine.state.replica
    row = engine.step()
    if "share" in harm:
        assert any("do not fit" in note for note in row.notes), row.notes
        assert equal(engine.state.replica["weights"], before["weights"])
    else:
        assert row.refused.keys() == {1, 4}
        assert equal(engine.state.replica["weights"], expected(setup, before, 0, [0, 2, 3]))


# ------------------------------------------------------------------------------------------- vaults


def test_a_file_vault_outlives_its_process(tmp_path):
    vault = FileVault(tmp_path / "vault")
    secret = vault.secret(2)
    again = FileVault(tmp_path / "vault")
    assert (len(secret), again.secret(2)) == (32, secret)
    assert FileVault(tmp_path / "other").secret(2) != secret
    assert stat.S_IMODE(os.stat(tmp_path / "vault" / "site2.secret").st_mode) == 0o600
    vault.remember(2, "s", Used(4, "scope", "m"))
    vault.remember(2, "t", Used(1, "other"))
    assert again.recall(2, "s") == Used(4, "scope", "m")
    assert again.recall(2, "u") is None
    assert vault.pin(2, {0: b"a", 1: b"b"}) == []
    assert again.pin(2, {0: b"a", 1: b"c", 3: b"d"}) == [1]
    assert again.pin(2, {3: b"e"}) == [3]


def test_a_damaged_vault_is_noticed(tmp_path):
    vault = FileVault(tmp_path)
    vault.secret(0)
    (tmp_path / "site0.secret").write_bytes(b"short")
    with pytest.raises(RunError, match="damaged; remove it and join as a new site"):
        vault.secret(0)
    (tmp_path / "site0.used.json").write_text("{")
    with pytest.raises(RunError, match="cannot know what it has revealed"):
        vault.recall(0, "s")


def test_sites_with_real_vaults_sum_and_remember(tmp_path):
    w = World(FileVault(tmp_path))
    server = w.prepare()
    for site in range(3):
        words = torch.from_numpy(w.mask(site, server.told(site), site + 1).view(np.int64))
        server.add(site, Message("delta", {"secure": {"words": words}}))
    server.unmask({s: w.ask(s, m) for s, m in server.unmasking().items()}, lambda s, why: pytest.fail(why))
    sums, weight = server.total()
    assert weight == 6
    assert torch.allclose(sums.parts["delta"]["w"], torch.full((4,), 6 * w.method.secure.step))
    later = World(FileVault(tmp_path))
    with pytest.raises(SiteFailed, match="helped with the sum over other sites"):
        later.ask(0, server.told(0).message(UNMASK, [0, 1]))
    forged = Cohort("5" * 32, 9, {**w.channels, 1: w.channels[2]}, {}, {})
    with pytest.raises(SiteFailed, match="long-term key of site 1 is not the one"):
        later.ask(0, forged.message(PREPARE))


# ------------------------------------------------------------------------------------------- sites of their own


class Apart(InlineWorkers):
    """Every site in a folder of its own with a real vault, every message as bytes, and a new process for every one."""

    def __init__(self, setup, folder):
        super().__init__(setup)
        self.folder, self.dispatch = folder, Dispatch(setup.method.share, "run")

    def end(self, site):
        folder = self.folder / str(site)
        setup = replace(self.local.setup, vault=FileVault(folder / "vault"))
        return RemoteSite(Worker(setup, FileStates(folder / "states")), site, folder, "run")

    def publish(self, publication):
        super().publish(publication)
        self.dispatch.publish(publication)

    def result(self, ticket):
        job = self._jobs.pop(ticket)
        answer = self.end(job.site).handle(decode(bytes(encode(self.dispatch.request(job)))))
        return self.dispatch.outcome(decode(bytes(encode(answer))), job)

    def ask(self, requests):
        return {
            site: decode(bytes(encode(self.end(site).handle(decode(bytes(encode(m))))))) for site, m in requests.items()
        }


def test_sites_of_their_own_have_the_same_bits_also_when_the_server_starts_anew(setup, tmp_path):
    usual = open_engine(setup)
    rows = [usual.step() for _ in range(3)]
    first = Engine(setup, Apart(setup, tmp_path))
    first.step(), first.step()
    checkpoint.save(first.state, tmp_path / "server", {})
    lost = first.step()  # the server is killed before this is committed: round 2 will be done again
    state, _ = checkpoint.load(tmp_path / "server")
    again = Engine(setup, Apart(setup, tmp_path), state)
    row = again.step()
    for other in (lost, row):
        assert (other.refused, other.notes) == ({}, [])
        assert (other.up_bytes, other.down_bytes, other.time) == (rows[2].up_bytes, rows[2].down_bytes, rows[2].time)
    assert equal(again.state.replica["weights"], usual.state.replica["weights"])
    assert len(json.loads((tmp_path / "0" / "vault" / "site0.used.json").read_text())) == 2, "two sessions"


# ------------------------------------------------------------------------------------------- the wire


def test_a_cohort_crosses_the_wire_and_its_size_is_what_is_counted():
    told = World().prepare().told(1)
    job = Job(1, 3, cohort=3, secure=told)
    request = unpack(decode(encode(pack(job, [], 0, "run"))))
    assert request.job == job
    assert Cohort.read(decode(encode(told.message(COHORT))), 1) == told
    assert encoded_size(told.message(COHORT)) == len(encode(told.message(COHORT)))


@pytest.mark.parametrize(
    "facts",
    [
        {"session": "x"}, {"round": -1}, {"round": True}, {"asked": [0, 2, 1]}, {"asked": [0, 1]}, {"asked": None},
        {"prepared": [0, 1, 7]}, {"prepared": [1]}, {"asked": [0, 2, 3], "prepared": [0, 2, 3]},
    ],
)  # fmt: skip
def test_a_malformed_cohort_is_refused(facts):
    m = World().prepare().told(1).message(COHORT)
    with pytest.raises(MessageError):
        Cohort.read(Message(m.kind, m.parts, {**m.facts, **facts}), 1)
    for name in m.parts["cohort"]:
        for harm in (None, torch.zeros(3, 9, dtype=torch.uint8), torch.zeros(3, 32)):
            tree = {**m.parts["cohort"], name: harm}
            with pytest.raises(MessageError):
                Cohort.read(Message(m.kind, {"cohort": {n: t for n, t in tree.items() if t is not None}}, m.facts), 1)


# ------------------------------------------------------------------------------------------- refusals

NOISE = (Clip(1.0), GaussianNoise(1.0, 1.0))
BAD = {
    "median": (fedavg().but(combine=Median()), "shows the server nothing but a sum, and Median looks at single replies"),
    "krum": (fedavg().but(combine=Krum(f=1)), "Krum looks at single replies; use WeightedMean instead of Krum"),
    "stack": (flora(), "Stack looks at single replies"),
    "predictions": (edgefd(), "MaskedMean looks at single replies"),
    "ranks": (frl(), "RankVote adds up something else; use WeightedMean or FixedMean"),
    "asynchronous": (fedbuff(k=2), "cohort before its visits, which Buffered does not; use Synchronous"),
    "cast": (fedavg().but(uplink=(Cast(),)), "in the form that Cast gives them; drop Cast, and choose the `bits`"),
    "quantise": (fedavg().but(uplink=(Quantise(),)), "drop Quantise, and choose the `bits`"),
    "sparse": (fedavg().but(uplink=(TopK(),)), "drop TopK, and choose the `bits`"),
    "alone": (fedavg().but(select=Uniform(count=1)), "hides an update among others, but Uniform asks 1 of 5"),
    "coarse": (
        fedavg().but(combine=UNIFORM, uplink=NOISE, secure=SecureSum(bits=8, clip=100.0)),
        r"too coarse for a site's share of the noise of GaussianNoise, 0.45; use SecureSum\(bits=10\)",
    ),
    "many": (fedavg().but(secure=SecureSum(most_samples=100)), "room for 100 examples a site, and one has"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_compositions_that_cannot_be_right_are_refused(case, digits_task, digits_federation):
    method, says = BAD[case]
    method = method.but(secure=method.secure or SecureSum())
    world = replace(digits_federation, public=digits_federation.test.select(range(50)))
    with pytest.raises(RecipeError, match=says):
        check_method(method, digits_task, world)


@pytest.mark.parametrize("method", [fedavg(), scaffold(), fedkseed(), fedavg().but(combine=UNIFORM, uplink=NOISE)])
def test_good_compositions_pass(method, digits_task, digits_federation):
    check_method(method.but(secure=SecureSum()), digits_task, digits_federation)


def test_a_missing_package_is_told_before_the_run(monkeypatch, digits_task, digits_federation):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"needs the package `cryptography`; `pip install atoll\[secure\]`"):
        check_method(fedavg().but(secure=SecureSum()), digits_task, digits_federation)


def test_the_number_of_bits_that_a_refusal_names_is_enough(digits_task, digits_federation):
    method = fedavg().but(combine=UNIFORM, uplink=NOISE)
    check_method(method.but(secure=SecureSum(bits=10, clip=100.0)), digits_task, digits_federation)
    with pytest.raises(RecipeError, match="bits=10"):
        check_method(method.but(secure=SecureSum(bits=9, clip=100.0)), digits_task, digits_federation)
