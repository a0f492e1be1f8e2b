"""A coordinator's lines in an interpreter of their own, as after a lost session."""

import json
import sys
from pathlib import Path

import torch
from nvflare.fuel.flare_api.flare_api import new_secure_session

from fl_helpers.cross_silo.on_premises import runs
from fl_helpers.cross_silo.run import Run

from . import hospital
from .conftest import LIMITS, SIZES


def new_run():
    torch.manual_seed(0)
    params = hospital.new_model().state_dict()
    return Run("again", params, rounds=12, seed=7, deadline=120, limits=LIMITS)


if __name__ == "__main__":
    admin, kits, jobs = sys.argv[1:]
    session = new_secure_session(admin, f"{kits}/admin", timeout=20)
    server_kit = Path(kits, "server")
    places = {"server_kit": server_kit, "jobs": Path(jobs), "silos": list(SIZES)}
    for event in runs.play(new_run(), session, **places, timeout=300):
        print(json.dumps(event), flush=True)
    session.close()
