"""FedLab: its standalone pipeline with a serial trainer, in one process."""

import random
import time

import torch
from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer
from fedlab.contrib.algorithm.basic_server import SyncServerHandler
from fedlab.core.standalone import StandalonePipeline
from fedlab.utils import SerializationTool
from workload import Model, arguments, train, write_result

name, workload, path, seed = arguments()
torch.set_num_threads(1)
random.seed(seed)  # with which FedLab samples silos
ends, steps = [], []


class Trainer(SGDSerialClientTrainer):
    """Trains each silo as the others here do, instead of with a DataLoader."""

    def local_process(self, payload, id_list):
        for k in id_list:
            self.set_model(payload[0])
            options = dict(seed=seed, round_index=len(ends))
            steps.append(train(self._model, name, k, **options))
            self.cache.append([self.model_parameters])


class Pipeline(StandalonePipeline):
    def evaluate(self):
        ends.append(time.time())


handler = SyncServerHandler(Model(), workload.rounds, workload.sampled / workload.silos)
Pipeline(handler, Trainer(Model(), workload.silos)).main()
final = Model()
SerializationTool.deserialize_model(final, handler.model_parameters)
write_result(path, final.state_dict(), ends=ends, steps=sum(steps))
