"""In a silo, after the last round: test the final global model, release the scores."""

from __future__ import annotations

import argparse

import common

from fl_helpers import exchange
from fl_helpers.training import Update


def evaluate(args: argparse.Namespace, run: common.Run) -> None:
    """Metrics of the final model, as an update without parameters."""
    ledger = exchange.Ledger(args.private / "ledger.jsonl")
    params = exchange.read_model(
        args.model, run.expected(), round_index=args.round, ledger=ledger
    )
    if run.keep_local:
        expected = run.expected(kept=True)
        params |= exchange.read_model(
            args.kept, expected, round_index=args.round, silo=common.KEPT
        )
    client = run.load_client(args.data, args.silo)
    metrics = common.test(client, common.in_order(params, run))
    exchange.write_update(
        args.scores,
        Update(client.silo.name, {}, len(client.silo.train[0]), metrics),
        round_index=args.round,
        expected={},
        limits=common.limits(args.metrics, None, args.max_bytes),
        ledger=ledger,
    )


def main() -> None:
    """Test, with all that is printed kept in the silo."""
    args = common.arguments(
        *("data", "model", "kept-", "scores", "private"),
        **{"silo": str, "round": int, "metrics": str, "max_bytes": int},
    )
    with common.privately(args.private, f"{args.silo}, after round {args.round}"):
        evaluate(args, common.read_run())


if __name__ == "__main__":
    main()
