"""Flower's simulation: its message API, FedAvg, and Ray with two actors of one core.

`run_simulation` starts it within this process; `flwr run`, which replaces it, starts
further processes before.
"""

import time

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from workload import arguments, model_of, train, write_result

name, workload, path, seed = arguments()
client, server = ClientApp(), ServerApp()


@client.train()
def train_silo(message, context):
    model = model_of(name)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    k = context.node_config["partition-id"]
    index = message.content["config"]["server-round"] - 1
    steps = train(model, name, k, seed=seed, round_index=index)
    metrics = {"num-examples": workload.images, "steps": steps}
    content = dict(
        arrays=ArrayRecord(model.state_dict()), metrics=MetricRecord(metrics)
    )
    return Message(RecordDict(content), reply_to=message)


@server.main()
def main(grid, context):
    ends, steps = [], []

    def count(replies, weighted_by):
        steps.extend(reply["metrics"]["steps"] for reply in replies)
        return MetricRecord()

    def note(index, arrays):
        """Called before the first round, and when a round is over."""
        if index:
            ends.append(time.time())

    strategy = FedAvg(
        fraction_train=workload.sampled / workload.silos,
        fraction_evaluate=0.0,
        min_train_nodes=workload.sampled,
        min_available_nodes=workload.silos,
        train_metrics_aggr_fn=count,
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model_of(name).state_dict()),
        num_rounds=workload.rounds,
        evaluate_fn=note,
    )
    params = result.arrays.to_torch_state_dict()
    write_result(path, params, ends=ends, steps=sum(steps))


if __name__ == "__main__":
    resources = dict(
        init_args=dict(num_cpus=2), client_resources=dict(num_cpus=1, num_gpus=0.0)
    )
    run_simulation(server, client, workload.silos, backend_config=resources)
