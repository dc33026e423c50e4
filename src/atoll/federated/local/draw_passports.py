"""A site draws its passports at its first visit, and keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from atoll.core.errors import AtollError
from atoll.core.tree import Tree
from atoll.federated.local.local_sgd import Finish
from atoll.federated.visit import Visit
from atoll.privacy.passports import draw_passports_


@dataclass(frozen=True)
class DrawPassports:
    """Passports come from the operating system's cryptographic generator and are private tensors of the model.

    Args:
        reach: means of a passport's channels are whole numbers from -reach to reach, but 0.
        decay: weight decay of D, which makes scales and shifts of what E sees in passports.
        test_seed: INSECURE. Passports from a seed that can be known, for tests.
        allow_insecure_test_seed: must be True for ``test_seed``.
    """

    reach: Annotated[int, Ge(1), Le(100)] = 5
    decay: Annotated[float, Ge(0)] = 1e-3
    test_seed: int | None = None
    allow_insecure_test_seed: bool = False

    def __post_init__(self) -> None:
        if self.test_seed is not None and not self.allow_insecure_test_seed:
            raise AtollError(
                "test_seed makes passports that anybody can draw again. Remove it; a test that needs it sets "
                "allow_insecure_test_seed=True as well."
            )

    def start(self, visit: Visit, params: Tree) -> list[int]:
        """Which of the parameters are weights of a D."""
        if "passports" not in visit.state and not visit.dry:
            with torch.no_grad():
                draw_passports_(visit.model, self.reach, self.test_seed, visit.site.site)
        return [i for i, name in enumerate(params) if name.endswith(".decode.weight")]

    def correct_(self, work: list[int], grads: list[Tensor], params: list[Tensor]) -> None:
        for i in work:
            grads[i].add_(params[i].detach(), alpha=self.decay)

    def finish(self, work: list[int], delta: Tree, steps: int, lr: float) -> Finish:
        return Finish(delta, state={"passports": {"drawn": torch.ones(1)}})
