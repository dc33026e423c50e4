"""The server: an ordinary ServerApp whose strategy is a method of Atoll."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from what_is_learned import METHOD, TASK

import atoll.flower

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Start from the task's own weights, and print how each round went."""
    strategy = atoll.flower.strategy(METHOD, TASK, num_sites=int(context.run_config.get("num-sites", 4)))
    result = strategy.start(
        grid=grid,
        initial_arrays=strategy.initial_arrays(),
        num_rounds=int(context.run_config.get("num-server-rounds", 5)),
    )
    for number, metrics in result.evaluate_metrics_clientapp.items():
        sent = result.train_metrics_clientapp[number]["up-bytes"]
        print(f"round {number}: accuracy {metrics['accuracy']:.3f}, {sent / 1e3:.1f} kB up")
