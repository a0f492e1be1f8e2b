"""A notebook's part in the tests: starts a fleet and a run, and is then ended."""

import signal
import sys

from fl_helpers.cross_silo.on_premises import gate
from fl_helpers.cross_silo.on_premises.fleet import Fleet
from fl_helpers.cross_silo.run import Run

from . import hospital
from .conftest import LIMITS, METRICS

if __name__ == "__main__":
    # As in a notebook's kernel; a shell may start us in the background, without it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    silos_yaml, folder = sys.argv[1:]
    params = hospital.new_model().state_dict()
    run = Run("endless", params, rounds=10_000, seed=1, quorum=1, limits=LIMITS)
    with Fleet(silos_yaml, folder) as fleet:
        for site in fleet.sites:
            gate.allow(fleet.kits / site, params, metrics=METRICS)
        print("ready", flush=True)
        for event in fleet.run(run):
            print(event["event"], flush=True)
