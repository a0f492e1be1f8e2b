"""The coordinator's part on the server's machine: wait for all, start a run."""

import json
import sys
import time
from pathlib import Path

import torch
from nvflare.fuel.flare_api.flare_api import new_secure_session

from fl_helpers.cross_silo.on_premises import runs
from fl_helpers.cross_silo.on_premises.site import site_name
from fl_helpers.cross_silo.run import Run

from . import hospital
from .conftest import LIMITS

WAIT = 40  # seconds, for the server and for all hospitals


def new_run():
    torch.manual_seed(0)
    params = hospital.new_model().state_dict()
    basis = dict(rounds=2, seed=7, quorum=2, deadline=120, limits=LIMITS)
    return Run("separate", params, **basis)


def connect(admin, kit, sites):
    """A session, as soon as the server has heard of all hospitals."""
    end, found = time.monotonic() + WAIT, set()
    while True:
        try:
            session = new_secure_session(admin, str(kit), timeout=5)
            while not found >= sites:
                info = session.get_system_info()
                found = {client.name for client in info.client_info}
                time.sleep(0.2)
                assert time.monotonic() < end, f"only {found} in {WAIT} s"
            return session
        except Exception:  # not up yet
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    admin, admin_kit, server_kit, *silos = sys.argv[1:]
    session = connect(admin, admin_kit, {site_name(silo) for silo in silos})
    server_kit = Path(server_kit)
    events = runs.play(
        new_run(), session, silos=silos, server_kit=server_kit,
        jobs=server_kit.parent / "to_run", timeout=200,
    )  # fmt: skip
    for event in events:
        print(json.dumps(event), flush=True)
    session.close()
