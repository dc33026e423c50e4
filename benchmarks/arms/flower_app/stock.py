"""Flower's own FedAvg over a network of 159,010 parameters, and sites that answer at once with what they got.

No training and no torch: what is left is Flower's own cost of a round.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

SHAPES = {"0.weight": (200, 784), "0.bias": (200,), "1.weight": (10, 200), "1.bias": (10,)}
client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1000})})
    return Message(content=content, reply_to=message)


class Marked(FedAvg):
    """Writes down when each round begins."""

    marks = Path()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        with open(self.marks, "a") as f:
            f.write(f"{time.time()}\n")
        return super().configure_train(server_round, arrays, config, grid)


@server.main()
def main(grid: Grid, context: Context) -> None:
    sites, rounds = int(context.run_config["sites"]), int(context.run_config["rounds"])
    arrays = ArrayRecord({name: Array(np.zeros(shape, np.float32)) for name, shape in SHAPES.items()})
    strategy = Marked(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
    strategy.marks = Path(str(context.run_config["marks"]))
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds)
