"""The same work in Atoll: ``inline``, ``pool`` (two processes) or ``flower`` (two actors of Flower's engine), with the
``auto`` or the ``stock`` step.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from atoll.federated.backends.flower_simulation import FlowerSimulation
from atoll.federated.backends.inline import Inline
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.engine import federate
from atoll.federated.local.training import Training
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.select.uniform import Uniform

from prepare import SEED, federation
from work import BATCH, LR, PER_ROUND, Clock, Job

if __name__ == "__main__":
    backend, step, folder = sys.argv[1:4]
    clock, job = Clock(), Job(folder)
    task, sites = federation(Path(folder))
    method = fedavg(Training(lr=LR, batch_size=BATCH, step=step)).but(select=Uniform(count=PER_ROUND))
    backends = {"inline": Inline(), "pool": ProcessPool(workers=2), "flower": FlowerSimulation(workers=2)}
    rounds = federate(task, sites, method, rounds=len(job.plan), seed=SEED, backend=backends[backend], evaluate_every=0)
    for _ in job.plan:
        clock.start()
        row = next(rounds)
        clock.stop()
        weights = torch.cat([t.reshape(-1) for t in row.engine.state.replica["weights"].values()])
        clock.keep_first(weights)
    clock.finish()
    rounds.close()
    clock.report(job, weights)
