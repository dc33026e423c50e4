"""Groups of sites that are alike, found from what they are willing to reveal; nothing passes from one to another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Gt

from atoll.federated.combine.by_site import BySite
from atoll.federated.grouping import Ground
from atoll.federated.local.reveal_first import RevealFirst
from atoll.federated.method import Method, Topology
from atoll.federated.server.serve_groups import ServeGroups
from atoll.federated.share.per_group import PerGroup
from atoll.federated.signatures.feature_importance import FeatureImportance
from atoll.federated.signatures.signature import Signature, refuse_known_noise


@dataclass(frozen=True)
class Bubbles(Topology):
    """The first round asks every site for a signature; from then on each group of alike sites runs the method by itself
    (Long et al., 2025, arXiv 2503.12220, with FedAvg in the groups).

    There is no global model. Sites are judged by the model that their group had when they were last visited.

    Args:
        signature: what sites reveal.
        privacy: epsilon of a signature, for all rows of a site together, at delta 0. The noise in each share has scale
            2 / epsilon, so with F shares groups are little but chance below about 3 F. None: no noise. What sites send
            later is not covered.
        ground: how far apart two shares are: ``"zero_one"`` is 1 for any two, ``"index"`` counts places between them.
        most: groups, at most; None: half as many as sites. The paper allows N - 1, see :func:`grouping.group`.
        test_seed: INSECURE. Noise from a seed that can be known; see :class:`RevealFirst`.
        allow_insecure_test_seed: must be True for ``test_seed``.
    """

    signature: Signature = field(default_factory=FeatureImportance)
    privacy: Annotated[float, Gt(0)] | None = 20.0
    ground: Ground = "zero_one"
    most: Annotated[int, Ge(2)] | None = None
    test_seed: int | None = None
    allow_insecure_test_seed: bool = False

    def __post_init__(self) -> None:
        refuse_known_noise(self.test_seed, self.allow_insecure_test_seed)

    def problems(self, method: Method) -> list[str]:
        if isinstance(method.share, PerGroup):
            return []
        out = []
        server, local, merger = (type(part).__name__ for part in (method.server, method.local, method.combine))
        if method.server.broadcasts != "weights" or method.share.incremental or not method.share.same_model:
            out.append(
                f"Bubbles sends each group a model of its own, which {server} and {type(method.share).__name__} do not "
                "make; use Apply and Parameters, or Star."
            )
        if method.local.produces not in method.combine.accepts and "*" not in method.combine.accepts:
            out.append(
                f"{local} replies with `{method.local.produces}`, which {merger} does not merge; use the combiner that "
                "the method comes with."
            )
        if not method.schedule.synchronous:
            out.append(f"Bubbles groups sites in a round, not by {type(method.schedule).__name__}; use Synchronous.")
        if method.secure is not None:
            out.append(
                f"{type(method.secure).__name__} adds up all replies of a round, and Bubbles merges each group by "
                "itself; leave `secure` out, or use Star."
            )
        out += [
            f"{type(c).__name__} is accounted for a sum over all sites of a round, and Bubbles merges each group by "
            "itself; leave it out, or use Star."
            for c in method.uplink
            if c.private
        ]
        if method.downlink:
            out.append("Bubbles sends to single sites, which `downlink` does not change; leave it out.")
        return out

    def compose(self, method: Method) -> Method:
        if isinstance(method.share, PerGroup) or self.problems(method):
            return method  # done before, or to be refused by the checks
        work = RevealFirst(
            method.local, method.share, self.signature, self.privacy, self.test_seed, self.allow_insecure_test_seed
        )
        return method.but(
            share=PerGroup(method.share), local=work, combine=BySite(method.combine),
            server=ServeGroups(method.server, method.combine, method.share, self.ground, self.most),
        )  # fmt: skip
