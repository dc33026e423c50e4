"""Daily demand at shops of a few kinds, made by a formula: known groups, each driven by features of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import NDArray

from atoll.core.errors import DataError
from atoll.core.streams import numpy_stream
from atoll.data.dataset import Info
from atoll.data.source import Loaded, Source, standardised
from atoll.data.windows import OneSeries, windows

DRIVERS = ("price", "promotion", "weather", "holiday", "advertising", "season")


@dataclass(frozen=True)
class Demand(Source):
    """Windows of sales and of six features; the sales of the days after them are the target.

    The features of a shop are autoregressive noise of its own. Shops are of ``kinds`` in turn, and kind g is driven by
    features 2 g and 2 g + 1, whose values of the days before act with signs that differ by kind::

        sales_t = level + a_g driver_(t-1) + b_g driver'_(t-1) + weekly_(t mod 7) + noise

    so that one model for all kinds must fit none. Columns ``site`` and ``kind`` say whose a window is. The last fifth
    of the days is held out.

    Args:
        shops: how many.
        kinds: of shops.
        days: of each shop.
        window: days that a model sees.
        horizon: days to forecast.
        noise: deviation of the noise; the drivers' part has 1.
        poisoned: further shops, hostile or broken: at each, the features are in another order than their names say,
            and its sales are upside down. They are of kind ``kinds``, ``kinds + 1``, and so on.
        seed: of all draws.
    """

    shops: Annotated[int, Ge(1)] = 12
    kinds: Annotated[int, Ge(1), Le(3)] = 3
    days: Annotated[int, Ge(30)] = 400
    window: Annotated[int, Ge(1)] = 14
    horizon: Annotated[int, Ge(1)] = 1
    noise: Annotated[float, Ge(0)] = 0.3
    poisoned: Annotated[int, Ge(0)] = 0
    seed: int = 0

    def load(self) -> Loaded:
        if self.kinds > self.shops:
            raise DataError(f"{self.shops} shops cannot be of {self.kinds} kinds; give more `shops`.")
        series = []
        for shop in range(self.shops + self.poisoned):
            honest = shop < self.shops
            kind = shop % self.kinds if honest else self.kinds + shop - self.shops
            values = self._shop(shop, kind if honest else shop % self.kinds)
            if not honest:
                order = np.roll(np.arange(len(DRIVERS)), 1 + shop - self.shops)
                values = np.concatenate([-values[:, :1], values[:, 1:][:, order]], 1)
            series.append(OneSeries(values, {"site": shop, "kind": kind}))
        info = Info(
            name="demand", kind="series", shape=(1 + len(DRIVERS), self.window), feature_names=("sales", *DRIVERS),
            names={
                "site": tuple(f"shop {i}" for i in range(len(series))),
                "kind": tuple(f"kind {i}" for i in range(self.kinds + self.poisoned)),
            },
            targets=self.horizon,
        )  # fmt: skip
        return standardised(windows(series, info, window=self.window, horizon=self.horizon, test=0.2))

    def _shop(self, shop: int, kind: int) -> NDArray[np.float32]:
        """Sales and features ``[days, 7]``."""
        draw, days = numpy_stream(self.seed, "demand", shop), self.days
        x = np.zeros((days, len(DRIVERS)))
        shocks = draw.normal(size=x.shape)
        for t in range(1, days):
            x[t] = 0.5 * x[t - 1] + np.sqrt(0.75) * shocks[t]
        effect = np.zeros(len(DRIVERS))
        effect[2 * kind : 2 * kind + 2] = np.array([0.8, -0.6]) * (-1) ** kind
        weekly = 0.3 * np.sin(2 * np.pi * (np.arange(days) + draw.integers(7)) / 7)
        before = np.concatenate([x[:1], x[:-1]])
        sales = before @ effect + weekly + self.noise * draw.normal(size=days)
        return np.concatenate([sales[:, None], x], 1).astype(np.float32)
