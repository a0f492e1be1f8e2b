"""The work of `engines.py` for Flower: the same function at a silo, and its FedAvg."""

import time
from pathlib import Path

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file, save_file

from fl_helpers.cross_silo import hospital
from fl_helpers.simulation import silo_rng

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    settings = context.run_config
    own = hospital.client(Path(context.node_config["data"]), settings)
    params = message.content["arrays"].to_torch_state_dict()
    index = message.content["config"]["server-round"] - 1
    rng = silo_rng(settings["seed"], own.silo.name, index)
    update = own.update(params, own.silo, round_index=index, rng=rng)
    content = {
        "arrays": ArrayRecord(update.params),
        "metrics": MetricRecord({"num-examples": update.num_examples}),
    }
    return Message(RecordDict(content), reply_to=message)


@server.main()
def main(grid, context):
    settings = context.run_config
    folder, silos = Path(settings["folder"]), settings["silos"]

    def note(index, arrays):
        """Called before the first round, and when a round is over."""
        with (folder / "ends").open("a") as file:
            file.write(f"{time.time()}\n")

    everyone = dict(min_train_nodes=silos, min_available_nodes=silos)
    result = FedAvg(fraction_evaluate=0.0, **everyone).start(
        grid=grid,
        initial_arrays=ArrayRecord(load_file(folder / "initial.safetensors")),
        num_rounds=settings["rounds"],
        evaluate_fn=note,
    )
    save_file(result.arrays.to_torch_state_dict(), folder / "temporary")
    (folder / "temporary").rename(folder / "final.safetensors")
