"""What a silo of `nvflare_simulator.py` runs."""

import sys
import time
from pathlib import Path

import nvflare.client as flare
from workload import model_of, train

name, notes, seed = sys.argv[1:]
model = model_of(name)
flare.init()
k = int(flare.get_site_name().removeprefix("site-")) - 1
while flare.is_running():
    received = flare.receive()
    model.load_state_dict(received.params)
    index = received.current_round
    steps = train(model, name, k, seed=int(seed), round_index=index)
    with Path(notes).open("a") as file:  # one line is one write
        file.write(f"{index} {steps} {time.time()}\n")
    meta = {"NUM_STEPS_CURRENT_ROUND": steps}  # what its FedAvg weights by
    flare.send(flare.FLModel(params=model.state_dict(), meta=meta))
