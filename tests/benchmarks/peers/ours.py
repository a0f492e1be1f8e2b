"""`fl_helpers.simulation.run_rounds`: silos in threads, one per core."""

import copy
import threading
import time

from workload import arguments, model_of, silo, write_result

from fl_helpers.aggregation import weighted_average
from fl_helpers.simulation import Execution, Terms, run_rounds
from fl_helpers.training import ClientFunctions, Step, train_locally

name, workload, path, seed = arguments()
first, models, ends = model_of(name), threading.local(), []
step = Step()
if workload.pictures:
    from pictures import adamw

    step = Step(adamw)


def client_update(params, silo, *, round_index, rng):
    if not hasattr(models, "own"):  # each thread trains in a model of its own
        models.own = copy.deepcopy(first)  # a new one would draw, in threads
    models.own.load_state_dict(params)
    options = dict(lr=workload.lr, batch_size=workload.batch_size, step=step, rng=rng)
    return train_locally(models.own, silo, epochs=1, **options)


history = run_rounds(
    first.state_dict(),
    [silo(name, k) for k in range(workload.silos)],
    ClientFunctions(client_update, draws_only_from_rng=True),
    weighted_average,
    rounds=workload.rounds,
    seed=seed,
    terms=Terms(silos_per_round=workload.sampled),
    execution=Execution(
        progress=False, on_round=lambda record, params: ends.append(time.time())
    ),
)
steps = sum(m["steps"] for r in history.rounds for m in r["train"].values())
write_result(path, history.params, ends=ends, steps=steps)
