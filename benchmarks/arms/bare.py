"""Federated averaging as a bare PyTorch loop: ``loop`` in one process, ``pool`` with two lasting workers.

The pool keeps weights and replies in shared memory and starts the longest visit first; its only machinery is
a queue of three numbers. ``loop-floor`` and ``pool-floor`` do of a dense model's training nothing but the products,
in place and with ready buffers: no float32 step on this library and processor can take less.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parents[1]))
from work import BATCH, PER_ROUND, Clock, Job, flat, load_flat, local_train

Train = Callable[[Job, torch.nn.Module, int, int], int]


@torch.no_grad()
def products(job: Job, model: torch.nn.Module, site: int, seed: int) -> int:
    """The matrix products of one epoch of plain SGD, and nothing else: forward, to the inputs, into the weights."""
    weights = [p for p in model.parameters() if p.dim() == 2]
    for start in range(0, job.size(site), BATCH):
        rows = min(BATCH, job.size(site) - start)
        inputs = [torch.zeros(rows, w.shape[1]) for w in weights]
        outputs = [torch.zeros(rows, w.shape[0]) for w in weights]
        for w, x, y in zip(weights, inputs, outputs, strict=True):
            torch.mm(x, w.t(), out=y)
        for i in reversed(range(len(weights))):
            if i:
                torch.mm(outputs[i], weights[i], out=inputs[i])
            weights[i].addmm_(outputs[i].t(), inputs[i], alpha=-0.05)
    return job.size(site)


def loop(job: Job, clock: Clock, train: Train = local_train) -> torch.Tensor:
    model = job.model()
    weights = flat(model)
    for chosen in job.plan:
        clock.start()
        total = sum(job.size(s) for s, _ in chosen)
        merged = torch.zeros_like(weights)
        for site, seed in chosen:
            load_flat(model, weights)
            n = train(job, model, site, seed)
            merged.add_(flat(model), alpha=n / total)
        weights = merged
        clock.stop()
        clock.keep_first(weights)
    clock.finish()
    return weights


def worker(
    job: Job, train: Train, weights: torch.Tensor, replies: torch.Tensor, tasks: mp.SimpleQueue, done: mp.SimpleQueue
) -> None:
    torch.set_num_threads(1)
    model = job.model()
    while (task := tasks.get()) is not None:
        slot, site, seed = task
        load_flat(model, weights)
        n = train(job, model, site, seed)
        torch.cat([p.detach().reshape(-1) for p in model.parameters()], out=replies[slot])
        done.put((slot, n))


def pool(job: Job, clock: Clock, train: Train = local_train, workers: int = 2) -> torch.Tensor:
    context = mp.get_context("fork")
    weights = flat(job.model()).share_memory_()
    replies = torch.empty(PER_ROUND, weights.numel()).share_memory_()
    tasks, done = context.SimpleQueue(), context.SimpleQueue()
    processes = [
        context.Process(target=worker, args=(job, train, weights, replies, tasks, done)) for _ in range(workers)
    ]
    for p in processes:
        p.start()
    for chosen in job.plan:
        clock.start()
        for slot, (site, seed) in sorted(enumerate(chosen), key=lambda t: -job.size(t[1][0])):
            tasks.put((slot, site, seed))
        counts = torch.zeros(len(chosen))
        for _ in chosen:
            slot, n = done.get()
            counts[slot] = n
        torch.mv(replies.t(), counts / counts.sum(), out=weights)
        clock.stop()
        clock.keep_first(weights)
    clock.finish()
    for _ in processes:
        tasks.put(None)
    for p in processes:
        p.join()
    return weights


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, folder = sys.argv[1:3]
    clock, job = Clock(), Job(folder)
    run, _, floor = mode.partition("-")
    if floor:
        os.environ.pop("BENCH_WEIGHTS", None)  # nothing is learned, so there is nothing to compare
    weights = {"loop": loop, "pool": pool}[run](job, clock, products if floor else local_train)
    clock.report(job, weights)
