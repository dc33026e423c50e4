"""Forgetting, by hand and on a run."""

from __future__ import annotations

import math

from atoll.data.class_stream import ClassStream
from atoll.federated.forgetting import by_task, forgetting
from atoll.federated.local.in_sequence import InSequence
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.local.training import Training
from atoll.federated.methods.custom import custom
from atoll.recipes.recipe import read_recipe


def test_it_is_the_best_score_so_far_minus_the_last():
    # task 0: 0.9, 0.95, 0.5; task 1: 0.8, 0.7 (what it scored before it was learned is no memory); the last task: nothing
    history = [[0.9, 0.99, 0.0], [0.95, 0.8, 0.0], [0.5, 0.7, 0.9]]
    assert math.isclose(forgetting(history), (0.45 + 0.1) / 2)
    assert forgetting([[0.3]]) == 0.0


def test_plain_training_forgets_and_training_on_all_does_not(run):  # type: ignore[no-untyped-def]
    stream = ClassStream(tasks=2, rounds=3)
    train = LocalSGD(Training(lr=0.3, epochs=3, batch_size=16))
    lost = {}
    for name, local in (("in turn", InSequence(train, stream)), ("at once", train)):
        history: dict[int, list[list[float]]] = {site: [] for site in range(5)}

        def note(engine, _, history=history):  # type: ignore[no-untyped-def]
            if engine.state.round in (3, 6):
                for site, scores in by_task(engine, stream).items():
                    history[site].append(scores)

        run(custom(share=read_recipe({"method": "local_only"}).method.share, local=local), rounds=6, on_merge=note)
        lost[name] = [forgetting(h) for h in history.values()]
    assert min(lost["in turn"]) > 0.3
    assert max(lost["at once"]) < 0.1


def test_a_recipe_can_put_any_work_in_sequence():
    local = {"name": "in_sequence", "inner": {"name": "local_sgd"}, "stream": {"tasks": 2, "rounds": 4}}
    method = read_recipe({"method": {"name": "custom", "local": local}}).method
    assert method.local.stream == ClassStream(tasks=2, rounds=4)
