"""One site's odd reply is refused by itself; it must not spoil the merge or the model for the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from atoll.federated.combine.median import Median
from atoll.federated.combine.weighted_mean import WeightedMean
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.method import LocalWork, Method
from atoll.federated.methods.flora import flora
from atoll.federated.methods.scaffold import scaffold


@dataclass(frozen=True)
class Odd(LocalWork):
    """Site 0 sends one part too many, or numbers of another type."""

    what: str
    inner: LocalWork = field(default_factory=LocalSGD)

    def run(self, visit):
        result = self.inner.run(visit)
        parts = result.message.parts
        if visit.site.site == 0 and self.what == "part":
            parts["more"] = {"x": torch.zeros(2)}
        if visit.site.site == 0 and self.what == "type":
            parts["delta"] = {n: t.double() for n, t in parts["delta"].items()}
        return result


@pytest.mark.parametrize("what", ["part", "type"])
@pytest.mark.parametrize("combine", [WeightedMean(), Median()], ids=lambda c: type(c).__name__)
def test_an_odd_reply_is_refused_alone(run, what, combine):
    rows = run(Method(local=Odd(what), combine=combine), rounds=2)
    for row in rows:
        assert list(row.refused) == [0]
        assert what in row.refused[0]
        assert (row.replies, row.notes) == (4, [])
    assert all(t.dtype == torch.float32 for t in rows[-1].engine.state.replica["weights"].values())


@pytest.mark.parametrize("what", ["part", "type"])
def test_also_where_replies_have_two_parts(run, what):
    method = scaffold()
    row = run(method.but(local=Odd(what, method.local)), rounds=1)[0]
    assert (list(row.refused), row.replies, row.notes) == ([0], 4, [])


@dataclass(frozen=True)
class OddFactors(LocalWork):
    """Site 0 sends low-rank factors of other types."""

    types: tuple[torch.dtype, torch.dtype]
    produces: ClassVar[str] = "low_rank"
    inner: LocalWork

    def run(self, visit):
        result = self.inner.run(visit)
        if visit.site.site == 0:
            for part, dtype in zip("AB", self.types, strict=True):
                result.message.parts[part] = {n: t.to(dtype) for n, t in result.message.parts[part].items()}
        return result


@pytest.mark.parametrize("types", [(torch.float64, torch.float32), (torch.float64,) * 2, (torch.int32,) * 2], ids=str)
def test_factors_of_another_type_are_refused_alone(run, types):
    method = flora()
    rows = run(method.but(local=OddFactors(types, method.local)), rounds=2)
    assert [(list(row.refused), row.replies, row.notes) for row in rows] == [([0], 4, [])] * 2
