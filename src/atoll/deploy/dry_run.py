"""What a recipe would send from a site, found by planning it with the site's own rows and checking the site's rules.

Nothing is sent, and nothing is trained: the plan runs the real engine on visits without steps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from atoll.core.errors import AtollError
from atoll.data.agreement import adopt, agree, describe
from atoll.deploy import policy as rules
from atoll.deploy.guard import Guard
from atoll.deploy.site import Place, read_rows, setup_of, stand_in, with_own_rows
from atoll.federated.engine import Engine
from atoll.federated.method import Codec
from atoll.recipes import words
from atoll.recipes.plan import DryWorkers
from atoll.recipes.recipe import load_recipe, recipe_config

ROUNDS = 3
"""Planned in full; a first round may be unlike the others."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What would leave a site.

    Attributes:
        kinds: of message, with the sizes of one in bytes, in the order of the rounds planned.
        about: what leaves once, before the first round.
        epsilon: privacy that one round and that all rounds would spend at the policy's delta; None without noise.
        refusal: why this site would not take part, or None.
    """

    recipe: str
    method: str
    sites: int
    rows: int
    kinds: tuple[tuple[str, int], ...]
    uplink: tuple[str, ...]
    rounds: int
    about: tuple[str, ...]
    epsilon: tuple[float, float] | None
    delta: float
    refusal: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.recipe}: {self.method} with {self.sites} sites, {self.rounds} rounds; {self.rows:,} rows here"]
        lines += [f"leaves  once: {', '.join(self.about)}"]
        for i, (kind, size) in enumerate(self.kinds):
            when = (
                "each round"
                if len(self.kinds) == 1
                else f"round {i}" + ("" if i < len(self.kinds) - 1 else " and later")
            )
            lines.append(f"        {when}: `{kind}`, {words.size(size)}")
        through = " -> ".join(self.uplink) if self.uplink else "as it is, without a codec"
        lines.append(f"        through {through}")
        if self.epsilon is None:
            lines.append("privacy no noise is added: what leaves may tell about single rows")
        else:
            once, all_of_them = self.epsilon
            spent = f"epsilon {once:.3g} a round, {all_of_them:.3g} in all {self.rounds} rounds"
            lines.append(f"privacy {spent} (delta {self.delta:g})")
        lines.append("rules   " + ("would take part" if self.refusal is None else f"would refuse: {self.refusal}"))
        return "\n".join(lines)


def would_send(reference: str, place: Place, guard: Guard, sites: int) -> Sent:
    """Plan a recipe as if this site were number 0 of ``sites`` alike.

    Raises:
        AtollError: the recipe or the site's rows cannot be read.
    """
    recipe = with_own_rows(recipe_config(load_recipe(reference)), place)
    refused = [_refusal(lambda: guard.recipe(recipe, sites))]
    own, fit, tokenizer = read_rows(recipe, place, 0, sites)
    refused.append(_refusal(lambda: guard.rows(recipe, own)))
    summary = describe(own, fit=fit, tokenizer=tokenizer)
    if fit:
        refused.append(_refusal(lambda: guard.sums(own)))
    own = adopt(own, agree({"this site": summary}))
    info = own.train.info
    rows = (len(own.train), len(own.validation), len(own.test))
    setup = setup_of(recipe, {0: own, **{i: stand_in(info, rows) for i in range(1, sites)}}, sites, info)
    asked = min(sites, max(1, round(setup.method.select.sampling(sites).expected(sites))))
    refused.append(_refusal(lambda: guard.cohort(asked, sites)))
    kinds = []
    workers = _Listening(setup)
    try:
        refused.append(_refusal(lambda: guard.model(workers.local.site_model(0).model)))
        engine = Engine(setup, workers)
        for _ in range(min(ROUNDS, recipe.rounds)):
            row = engine.step()
            kinds.append((workers.kind, max(row.up_bytes.values(), default=0)))
    finally:
        workers.close()
    method = setup.method
    refused += [rules.kind_refusal(guard.policy, kind) for kind, _ in kinds]
    event = rules.participation(guard.policy, method, asked, sites)
    refused.append(guard.meter.refusal(guard.policy, kinds[-1][1], event))
    return Sent(
        recipe=recipe.name, method=method.card.name, sites=sites, rows=rows[0], kinds=_without_repeats(kinds),
        uplink=tuple(_codec(c) for c in method.uplink), rounds=recipe.rounds,
        about=_about(summary.class_names, summary.feature_names, fit),
        epsilon=rules.spent(guard.policy, event, recipe.rounds), delta=guard.policy.delta,
        refusal=next((r for r in refused if r), None),
    )  # fmt: skip


class _Listening(DryWorkers):
    """Dry visits that remember what kind of message sites send."""

    kind = "nothing"

    def result(self, ticket: int) -> Any:
        outcome = super().result(ticket)
        if outcome.message is not None:
            self.kind = outcome.message.kind
        return outcome


def _refusal(check: Any) -> str | None:
    try:
        check()
    except AtollError as e:
        return str(e)
    return None


def _without_repeats(kinds: list[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    while len(kinds) > 1 and kinds[-1] == kinds[-2]:
        kinds.pop()
    return tuple(kinds)


def _about(classes: tuple[str, ...], features: tuple[str, ...], fit: bool) -> tuple[str, ...]:
    about = ["numbers of rows"]
    about += [f"{len(classes)} class names"] if classes else []
    about += [f"{len(features)} feature names"] if features else []
    return tuple(about + (["sums over the rows, for standardisation"] if fit else []))


def _codec(codec: Codec) -> str:
    return type(codec).__name__
