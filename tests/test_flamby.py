"""docs/results/flamby.csv is what experiments/flamby.py computes."""

import csv

import torch

from experiments import flamby


def rows(source, seed):
    with flamby.RESULTS.open() as file:
        return {
            (row["approach"], row["silo"]): float(row["accuracy"])
            for row in csv.DictReader(file)
            if (row["source"], row["seed"]) == (source, str(seed))
        }


def test_one_training_seed_of_fedavg_is_as_committed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    silos = flamby.published_split()
    found = list(flamby.accuracies(silos, 42, ("federated",)))
    torch.set_num_threads(threads)
    committed = rows("here", 42)
    assert len(found) == 4
    for (approach, name, accuracy), silo in zip(found, silos, strict=True):
        one_patient = 100 / len(silo.test.y)  # another processor may round otherwise
        assert abs(accuracy - committed[approach, name]) <= one_patient + 0.01


def test_published_rows_are_those_of_the_script():
    names = [silo.name for silo in flamby.published_split()]
    committed = rows("published", "42 to 46")
    for approach, values in flamby.PUBLISHED.items():
        assert tuple(committed[approach, name] for name in names) == values
