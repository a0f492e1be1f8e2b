"""In a silo: test the global model, train it, release the update.

Reads the silo's own data and the orchestrator's model; all that leaves goes through
`exchange.write_update`, and is in the ledger in the silo's own store.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import common

from fl_helpers import exchange
from fl_helpers.simulation import silo_rng


def train(args: argparse.Namespace, run: common.Run) -> None:
    """One silo's part of one round, as `simulation.run_rounds` has it."""
    index, silo = args.round, run.silos[args.silo]
    ledger = exchange.Ledger(args.private / "ledger.jsonl")
    shared = exchange.read_model(
        args.model, run.expected(), round_index=index, ledger=ledger
    )
    own = exchange.Params()
    if run.keep_local:
        expected = run.expected(kept=True)
        own = exchange.read_model(
            args.kept, expected, round_index=index, silo=common.KEPT
        )
    params = common.in_order(shared | own, run)
    client = run.load_client(args.data, args.silo)
    metrics = common.test(client, params) if run.evaluate else {}
    rng = silo_rng(args.seed, silo, index)
    update = client.update(params, client.silo, round_index=index, rng=rng)
    sent = {k: v for k, v in update.params.items() if k not in own}
    if own:
        own = {name: update.params[name] for name in own}
        exchange.write_model(
            args.next_kept, own, round_index=index + 1, silo=common.KEPT
        )
    exchange.write_update(
        args.model_update,
        replace(update, params=sent, metrics={**update.metrics, **metrics}),
        round_index=index,
        expected=shared,
        limits=common.limits(args.metrics, run.max_norm, args.max_bytes),
        ledger=ledger,
    )


def main() -> None:
    """Train, with all that is printed kept in the silo."""
    args = common.arguments(
        *("data", "model", "kept-", "model_update", "private", "next_kept-"),
        **{"silo": str, "round": int, "seed": int, "metrics": str, "max_bytes": int},
    )
    with common.privately(args.private, f"{args.silo}, round {args.round}"):
        train(args, common.read_run())


if __name__ == "__main__":
    main()
