"""One plain PyTorch loop, one thread, no federation: what the steps alone cost."""

import random
import time

import torch
from workload import arguments, model_of, train, write_result

name, workload, path, seed = arguments()
torch.set_num_threads(1)
model, draw = model_of(name), random.Random(seed)
params = {key: value.clone() for key, value in model.state_dict().items()}
ends, steps = [], 0
for index in range(workload.rounds):
    mean = {key: torch.zeros_like(value) for key, value in params.items()}
    for k in draw.sample(range(workload.silos), workload.sampled):
        model.load_state_dict(params)
        steps += train(model, name, k, seed=seed, round_index=index)
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                mean[key] += value / workload.sampled
            else:  # BatchNorm counts batches
                mean[key] = value.clone()
    params = mean
    ends.append(time.time())
write_result(path, params, ends=ends, steps=steps)
