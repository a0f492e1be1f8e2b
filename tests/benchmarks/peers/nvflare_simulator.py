"""NVFlare's simulator: its FedAvg recipe and four processes, each for one silo.

With two processes, four silos take turns in them and a new one starts at every turn:
that took longer.
"""

import os
import tempfile
from pathlib import Path

import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv
from workload import arguments, model_of, write_result

name, workload, path, seed = arguments()
here = Path(__file__).resolve().parent
paths = [str(here), str(here.parent), *os.environ.get("PYTHONPATH", "").split(":")]
os.environ["PYTHONPATH"] = ":".join(filter(None, paths))
if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder, "notes")
        recipe = FedAvgRecipe(
            name="peers",
            model=model_of(name),
            min_clients=workload.sampled,
            num_rounds=workload.rounds,
            train_script=str(here / "nvflare_client.py"),
            train_args=f"{name} {notes} {seed}",
        )
        env = SimEnv(num_clients=workload.silos, num_threads=4, workspace_root=folder)
        recipe.execute(env)
        (final,) = Path(folder).rglob("FL_global_model.pt")
        params = torch.load(final, weights_only=True)["model"]
        ends, total = {}, 0
        for line in notes.read_text().splitlines():
            index, steps, now = line.split()
            ends[index], total = now, total + int(steps)
        write_result(path, params, ends=[*map(float, ends.values())], steps=total)
