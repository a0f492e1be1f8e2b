"""In a silo, after the last round: test the final global model, release the scores."""

from __future__ import annotations

from argparse import Namespace

import common

from fl_helpers import exchange
from fl_helpers.cross_silo import turn


def evaluate(args: Namespace) -> None:
    """Metrics of the final model, as an update without parameters."""
    run, ledger = common.read_run(), exchange.Ledger(args.private / "ledger.jsonl")
    params = common.receive_model(args, run, ledger)
    client = common.load_client(args, run)
    exchange.write_update(
        args.scores,
        turn.test(run, client, params, round_index=args.round),
        round_index=args.round,
        expected={},
        limits=common.limits(args, run),
        ledger=ledger,
    )


def main() -> None:
    """Test, with all that is printed kept in the silo."""
    parser = common.silo_parser()
    parser.add_argument("--scores", type=common.folder, required=True)
    common.run_silo_job(evaluate, parser, "after {round} rounds")


if __name__ == "__main__":
    main()
