"""pfl: its simulated backend in one process, whole data sets in memory."""

import random
import time
from functools import partial

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import nn
from workload import Model, arguments, silo, write_result

name, workload, path, seed = arguments()
torch.set_num_threads(1)
rng = torch.Generator().manual_seed(seed)
ends = []


class Trained(Model):
    steps = 0

    def loss(self, x, y):
        self.steps += 1
        return nn.functional.cross_entropy(self(x), y)

    def metrics(self, x, y):
        return {}  # nobody else evaluates on training data


class Note(TrainingProcessCallback):
    def after_central_iteration(self, metrics, model, *, central_iteration):
        ends.append(time.time())
        return False, Metrics()


def dataset(k):
    """Shuffled anew for each round; pfl takes the batches in order."""
    order = torch.randperm(workload.images, generator=rng)
    return Dataset([values[order] for values in silo(name, k).train], user_id=str(k))


silos = random.Random(seed).sample(range(workload.silos), workload.silos)
data = FederatedDataset(dataset, MinimizeReuseUserSampler(silos))
sgd = partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-4)
module = Trained()
FederatedAveraging().run(
    NNAlgorithmParams(
        central_num_iterations=workload.rounds,
        evaluation_frequency=workload.rounds,
        train_cohort_size=workload.sampled,
        val_cohort_size=0,
    ),
    SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
    PyTorchModel(module, sgd, torch.optim.SGD(module.parameters(), lr=1.0)),
    NNTrainHyperParams(
        local_batch_size=workload.batch_size,
        local_num_epochs=None,
        local_num_steps=workload.images // workload.batch_size,
        local_learning_rate=workload.lr,
    ),
    callbacks=[Note()],
)
write_result(path, module.state_dict(), ends=ends, steps=module.steps)
