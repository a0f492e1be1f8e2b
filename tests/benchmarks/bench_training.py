"""train_locally against a hand-written PyTorch loop with the same steps."""

import sys

import torch
from common import cnn_215k, compare, image_silos, report, row, sgd_epoch

from fl_helpers.models import small_cnn
from fl_helpers.training import train_locally

CASES = (("small CNN, 7,500 parameters", lambda: small_cnn(10), 3200, 32),)
CASES += (("CNN, 215,370 parameters", cnn_215k, 1600, 32),)


def main():
    torch.set_num_threads(1)
    rows = []
    for label, make_model, num_images, batch_size in CASES:
        (silo,) = image_silos(1, num_images)
        model = make_model().train()
        start = {name: value.clone() for name, value in model.state_dict().items()}
        options = dict(lr=0.05, batch_size=batch_size)

        def bare(model=model, start=start, silo=silo, options=options):
            model.load_state_dict(start)
            sgd_epoch(model, silo, rng=torch.Generator().manual_seed(0), **options)

        def ours(model=model, start=start, silo=silo, options=options):
            model.load_state_dict(start)
            rng = torch.Generator().manual_seed(0)
            train_locally(model, silo, epochs=1, rng=rng, **options)

        bare()
        by_hand = [value.clone() for value in model.state_dict().values()]
        ours()  # the same work: the same bits
        assert all(map(torch.equal, by_hand, model.state_dict().values()))
        times = compare(bare, ours, pairs=9)
        rows.append(row(f"{label}, CPU", times.cpu, times=times))
    return report("train_locally / bare loop", rows)


if __name__ == "__main__":
    sys.exit(main())
