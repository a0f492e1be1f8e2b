"""In a silo: test the global model, train it, release the update.

Reads the silo's own data and the orchestrator's model. All that leaves goes through
`exchange.write_update`, and is in the ledger in the silo's own store.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import common

from fl_helpers import exchange
from fl_helpers.simulation import silo_rng


def train(args: Namespace, run: common.Run) -> None:
    """One silo's part of one round, as `simulation.run_rounds` has it."""
    ledger = exchange.Ledger(args.private / "ledger.jsonl")
    params = run.read_state(args, ledger)
    client = run.load_client(args.data, args.silo)
    metrics = common.test(client, params) if run.evaluate else {}
    rng = silo_rng(args.seed, client.silo.name, args.round)
    update = client.update(params, client.silo, round_index=args.round, rng=rng)
    sent = {k: v for k, v in update.params.items() if k not in run.keep_local}
    if run.keep_local:
        own = {name: update.params[name] for name in run.keep_local}
        done = args.round + 1
        exchange.write_model(args.next_kept, own, round_index=done, silo=common.KEPT)
    exchange.write_update(
        args.model_update,
        replace(update, params=sent, metrics={**update.metrics, **metrics}),
        round_index=args.round,
        expected={k: v for k, v in params.items() if k not in run.keep_local},
        limits=common.limits(args, run.max_norm),
        ledger=ledger,
    )


def main() -> None:
    """Train, with all that is printed kept in the silo."""
    args = common.arguments(
        "data model kept? model_update private next_kept?",
        "silo round= seed= metrics max_bytes=",
    )
    what = f"{args.silo}, round {args.round}"
    common.run_privately(args.private, what, lambda: train(args, common.read_run()))


if __name__ == "__main__":
    main()
