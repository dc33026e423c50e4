"""Refuse a composition that cannot be right, before anything runs, naming all problems at once.

Rules read what parts declare (``method.py``, the "May" lines), never what they are called.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

from atoll.core.errors import AtollError, RecipeError
from atoll.federated.method import Codec, Method
from atoll.federated.secure.secure_sum import bound
from atoll.privacy.secure_sum import word

CLIP, NOISE, SPARSIFY, QUANTISE = range(4)
"""``Codec.order``"""


def check_method(method: Method, task: Any, federation: Any) -> None:
    """Raise :class:`RecipeError` with every clash between the parts."""
    problems = [*problems_of(method), *_with_data(method, task, federation)]
    if problems:
        raise RecipeError(problems, f"method `{method.card.name}`")


def name(part: object) -> str:
    return type(part).__name__


def problems_of(m: Method) -> list[str]:
    """Clashes between the parts of a method, each as a sentence with the alternative."""
    return [
        *_kinds(m),
        *_chain("uplink", m.uplink),
        *_chain("downlink", m.downlink),
        *_downlink(m),
        *_sparse(m),
        *_secure(m),
        *m.topology.problems(m),
        *_at_peers(m),
    ] + [problem for codec in m.uplink if codec.private for problem in _private(m, codec)]


def _kinds(m: Method) -> Iterator[str]:
    kind = m.local.produces
    if "*" not in m.combine.accepts and kind not in m.combine.accepts:
        yield (
            f"{name(m.local)} replies with `{kind}`, but {name(m.combine)} merges "
            f"{', '.join(m.combine.accepts)}. Use the combiner that the method comes with."
        )
    if m.local.synchronous_only and not m.schedule.synchronous:
        yield f"{name(m.local)} needs rounds that wait for replies; use Synchronous, not {name(m.schedule)}."
    if m.combine.interval is not None and m.combine.interval != m.schedule.interval:
        paced = "has no fixed interval" if m.schedule.interval is None else f"merges every {m.schedule.interval:g}"
        yield (
            f"{name(m.combine)} weights sites by how often they report when merges are {m.combine.interval:g} s apart, "
            f"but {name(m.schedule)} {paced}; use FixedInterval(dt={m.combine.interval:g})."
        )


def _at_peers(m: Method) -> Iterator[str]:
    if m.combine.at_peers and not m.topology.peers:
        yield (
            f"{name(m.combine)} judges updates by the model and the rows of the site that merges them, and under "
            f"{name(m.topology)} a server merges; use Gossip, or Median instead of {name(m.combine)}."
        )


def _chain(way: str, codecs: tuple[Codec, ...]) -> Iterator[str]:
    """One direction's codecs beside each other."""
    order = [c.order for c in codecs]
    if order != sorted(order):
        chain = " -> ".join(name(c) for c in codecs)
        right = " -> ".join(name(c) for c in sorted(codecs, key=lambda c: c.order))
        yield f"The {way} {chain} is in an order that loses its meaning; use {right}."
    names = [name(c) for c in codecs]
    for twice in sorted({n for n in names if names.count(n) > 1}):
        yield f"The {way} has {twice} and {twice} again; a message can pass it once: keep one."
    sparse = [c for c in codecs if c.sparse]
    if len(sparse) > 1 and len({name(c) for c in sparse}) > 1:
        yield (
            f"The {way} has {name(sparse[0])} and {name(sparse[1])}, which both drop numbers; keep one with "
            "a smaller fraction, and use Quantise for what is left."
        )


def _downlink(m: Method) -> Iterator[str]:
    for c in m.downlink:
        if c.private or (c.order == CLIP and c.bound is not None):
            yield (
                f"{name(c)} bounds or hides what a site sends, but it is on the downlink, where "
                f"{name(m.server)} sends what all sites made; put it on the uplink."
            )
        elif c.sparse and m.server.broadcasts == "weights":
            yield (
                f"{name(c)} on the downlink would set most weights that {name(m.server)} broadcasts to "
                f"zero; use Cast or Quantise on the downlink, and {name(c)} on the uplink."
            )
        elif c.feedback:
            yield (
                f"{name(c)}(feedback=True) on the downlink needs a memory that {name(m.server)} has not; use "
                f"{name(c)}(feedback=False), or Quantise."
            )


def _sparse(m: Method) -> Iterator[str]:
    for c in m.uplink:
        if c.sparse and m.combine.coordinatewise:
            yield (
                f"{name(c)} leaves most coordinates of a reply at zero, and {name(m.combine)} takes the "
                "majority of every coordinate: nothing would be learned. Use Quantise instead of "
                f"{name(c)}, or Krum or NormClip instead of {name(m.combine)}."
            )


def _private(m: Method, noise: Codec) -> Iterator[str]:
    """What client-level privacy needs from the other parts."""
    at = m.uplink.index(noise)
    bounds = [c for c in m.uplink[:at] if c.bound is not None]
    if not bounds and noise.assumes_bound is not None:
        yield f"{name(noise)} needs Clip before it: without a bound on an update, noise protects nothing."
    elif bounds and noise.assumes_bound is not None and bounds[-1].bound != noise.assumes_bound:
        yield (
            f"{name(noise)} counts on a norm of {noise.assumes_bound:g}, but {name(bounds[-1])} before it "
            f"bounds {bounds[-1].bound:g}; use {name(noise)}(clip_norm={bounds[-1].bound:g})."
        )
    for c in m.uplink[:at]:
        if SPARSIFY <= c.order <= noise.order:
            yield (
                f"{name(c)} before {name(noise)} says by its places or scales what the data hold, and {name(noise)} "
                f"hides the values alone; drop {name(c)}."
            )
    if m.combine.weighted:
        yield (
            f"{name(noise)} bounds one site's influence, but {name(m.combine)} weights sites by their "
            "number of samples; use WeightedMean(by='uniform')."
        )
    if m.local.tells:
        yield (
            f"{name(noise)} hides what tensors say, and {name(m.local)} tells more of a site's rows than that, e.g. "
            f"how many there are of each class; drop {name(noise)}."
        )
    if not m.schedule.synchronous:
        yield (
            f"{name(noise)} is accounted for per round, but under {name(m.schedule)} a site may reply twice "
            "in one merge; use Synchronous."
        )
    if not noise.needs_sum:
        return
    if not m.combine.additive:
        yield (
            f"{name(noise)} is accounted for as a sum, but {name(m.combine)} is not one; use WeightedMean, "
            f"or give every reply all the noise with {name(noise)}(split=False)."
        )
    for c in m.uplink[at + 1 :]:
        if c.lossy:
            yield (
                f"{name(noise)} shares the noise over the cohort and protects the plain sum, but {name(c)} "
                f"after it changes each message by what it holds, before the sum; drop {name(c)}, or use "
                f"{name(noise)}(split=False)."
            )


def _secure(m: Method) -> Iterator[str]:
    """What a sum under masks needs from the other parts."""
    if m.secure is None:
        return
    secure = name(m.secure)
    if not m.combine.additive:
        yield (
            f"{secure} shows the server nothing but a sum, and {name(m.combine)} looks at single replies; use "
            f"WeightedMean instead of {name(m.combine)}, or leave `secure` out."
        )
    elif not m.combine.summable:
        yield (
            f"{secure} rounds floating-point numbers to steps, and {name(m.combine)} adds up something else; use "
            f"WeightedMean or FixedMean instead of {name(m.combine)}, or leave `secure` out."
        )
    if not m.schedule.synchronous:
        yield (
            f"{secure} needs to know a round's cohort before its visits, which {name(m.schedule)} does not; use "
            "Synchronous."
        )
    for c in m.uplink:
        if c.order in (SPARSIFY, QUANTISE):
            yield (
                f"{secure} sends masked integers of its own, which cannot be added in the form that {name(c)} gives "
                f"them; drop {name(c)}, and choose the `bits` of {secure} instead."
            )
    if m.local.data_dependent_size:
        yield (
            f"{secure} adds replies of one size, and those of {name(m.local)} depend on what was learned; use other "
            "local work, or leave `secure` out."
        )
    if not m.share.same_model:
        yield f"{secure} adds replies of one form, and under {name(m.share)} sites have models of their own."
    if importlib.util.find_spec("cryptography") is None:
        yield f"{secure} needs the package `cryptography`; `pip install atoll[secure]`."


def _secure_with_data(m: Method, sizes: list[int]) -> Iterator[str]:
    if m.secure is None or not m.combine.summable:
        return
    secure, asked = m.secure, m.select.sampling(len(sizes)).expected(len(sizes))
    if asked < 2:
        yield (
            f"{name(secure)} hides an update among others, but {name(m.select)} asks {asked:g} of {len(sizes)} "
            "sites a round; ask more."
        )
    if m.combine.weighted and max(sizes, default=0) > secure.most_samples:
        yield (
            f"{name(secure)} has room for {secure.most_samples:,} examples a site, and one has {max(sizes):,}; raise "
            "`most_samples`, or use WeightedMean(by='uniform')."
        )
    try:
        word(bound(m, len(sizes)))
    except AtollError as e:
        yield str(e)
    for noise in m.uplink:
        if noise.private and noise.noise:
            own = noise.noise * (noise.assumes_bound or 0.0) / math.sqrt(max(1, len(sizes)) if noise.needs_sum else 1)
            if own < 2 * secure.step:
                need = math.ceil(math.log2(2 * secure.clip / own + 1)) + 1
                yield (
                    f"{name(secure)} has steps of {secure.step:.2g}, too coarse for a site's share of the noise of "
                    f"{name(noise)}, {own:.2g}; use {name(secure)}(bits={need}), or a smaller `clip`."
                )


def _networks(task: Any, keys: set[Any]) -> Iterator[str]:
    """Networks that take other inputs than the task gives them."""
    wanted = getattr(task, "denoises", False)
    for network in sorted((getattr(key, "architecture", key) for key in keys), key=repr):
        if getattr(network, "denoises", None) not in (None, wanted):
            yield (
                f"{name(task)} gives its network noisy rows and a noise level, which {name(network)} does not take; "
                "choose `unet` or `dit` as the model."
                if wanted
                else f"{name(network)} takes noisy rows and a noise level, which {name(task)} does not give it; choose "
                "another model, or `task: denoising`."
            )


def _with_data(m: Method, task: Any, federation: Any) -> Iterator[str]:
    num_sites = len(federation.sites)
    keys = {task.model_key(i) for i in range(num_sites)}
    if m.share.same_model and len(keys) > 1:
        yield (
            f"{name(m.share)} needs the same model at every site, but the sites have {len(keys)} different "
            "ones; give one model, or use a method that exchanges predictions such as edgefd."
        )
    yield from _networks(task, keys)
    if getattr(task, "alternates", False) and not m.local.alternates:
        yield f"{name(m.local)} descends one loss, and the networks of {name(task)} take turns; use `distil_at_sites`."
    for part in (m.combine, m.server):
        if part.needs_public_data and (federation.public is None or len(federation.public) == 0):
            yield f"{name(part)} needs public data at the server; give the data a `public` fraction."
    yield from _secure_with_data(m, [len(site.train) for site in federation.sites])
    sampling = m.select.sampling(num_sites)
    expected = sampling.expected(num_sites)
    if m.combine.least > max(1.0, expected):  # an empty Poisson round is no mistake
        yield (
            f"{name(m.combine)} needs at least {m.combine.least} replies, but {name(m.select)} asks "
            f"{expected:g} of {num_sites} sites; ask more, or use a combiner that withstands less."
        )
    if m.combine.restless and (expected < num_sites or sampling.law == "poisson"):
        yield (
            f"{name(m.combine)} weights sites by the time of their visits, which says how often they report when all "
            f"start again at once, but {name(m.select)} asks {expected:g} of {num_sites}; ask all."
        )
    for noise in m.uplink:
        if noise.private and noise.needs_sum and sampling.law == "poisson" and m.combine.divisor is None:
            yield (
                f"{name(m.combine)} divides by the number of replies, which under {name(m.select)} tells "
                f"who took part and is not covered by {name(noise)}; use "
                f"FixedMean(count={max(expected, 1e-9):g})."
            )
