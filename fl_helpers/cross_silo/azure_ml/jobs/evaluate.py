"""In a silo, after the last round: test the final global model, release the scores."""

from __future__ import annotations

from argparse import Namespace

import common

from fl_helpers import exchange
from fl_helpers.training import Update, num_examples


def evaluate(args: Namespace, run: common.Run) -> None:
    """Metrics of the final model, as an update without parameters."""
    ledger = exchange.Ledger(args.private / "ledger.jsonl")
    client = run.load_client(args.data, args.silo)
    metrics = common.test(client, run.read_state(args, ledger))
    exchange.write_update(
        args.scores,
        Update(client.silo.name, {}, num_examples(client.silo), metrics),
        round_index=args.round,
        expected={},
        limits=common.limits(args),
        ledger=ledger,
    )


def main() -> None:
    """Test, with all that is printed kept in the silo."""
    args = common.arguments(
        "data model kept? scores private", "silo round= metrics max_bytes="
    )
    what = f"{args.silo}, after {args.round} rounds"
    common.run_privately(args.private, what, lambda: evaluate(args, common.read_run()))


if __name__ == "__main__":
    main()
