"""People at several companies, each with one item of a long-tailed catalogue: known truth for heavy hitters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt, Le

from atoll.core.errors import DataError
from atoll.core.streams import numpy_stream
from atoll.data.dataset import Info
from atoll.data.source import Loaded, Source, stored


@dataclass(frozen=True)
class ZipfItems(Source):
    """Item number r of a company's own ranking has weight r^-exponent; column ``item`` holds the items, ``x`` the bits.

    Rankings begin with items that only this company has, then go on as everybody's. The test part is the same people:
    what they have is the truth.

    Args:
        people: in each company; column ``site`` names it.
        companies: how many.
        items: in the common catalogue.
        exclusive: items that head a company's ranking and no other's.
        exponent: of the weights.
        bits: of an item; items are random numbers of so many bits.
        seed: of all draws.
    """

    people: Annotated[int, Ge(1)] = 2000
    companies: Annotated[int, Ge(1)] = 6
    items: Annotated[int, Ge(1)] = 1000
    exclusive: Annotated[int, Ge(0)] = 0
    exponent: Annotated[float, Gt(0)] = 1.2
    bits: Annotated[int, Ge(4), Le(62)] = 24
    seed: int = 0

    def load(self) -> Loaded:
        draw, wanted = numpy_stream(self.seed, "zipf"), self.items + self.exclusive * self.companies
        if wanted > 1 << self.bits:
            raise DataError(f"{wanted:,} different items do not fit into {self.bits} bits; give more `bits`.")
        codes = draw.choice(1 << self.bits, wanted, replace=False)
        common, own = codes[: self.items], codes[self.items :].reshape(self.companies, self.exclusive)
        weight = np.arange(1, self.exclusive + self.items + 1) ** -self.exponent
        share = weight / weight.sum()
        chosen = [draw.choice(np.concatenate([mine, common]), self.people, p=share) for mine in own]
        item = np.concatenate(chosen).astype(np.int64)
        x = (item[:, None] >> np.arange(self.bits)[::-1] & 1).astype(np.uint8)
        site = np.repeat(np.arange(self.companies), self.people)
        info = Info(name="zipf items", kind="table", shape=(self.bits,))
        columns = {"x": torch.from_numpy(x), "item": torch.from_numpy(item), "site": torch.from_numpy(site)}
        rows = stored(info.name, columns, info)
        return Loaded(train=rows, test=rows)
