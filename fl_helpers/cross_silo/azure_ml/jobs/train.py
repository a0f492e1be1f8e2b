"""In a silo: test the global model, train it, release the update.

Reads the silo's own data and the orchestrator's model. All that leaves goes through
`exchange.write_update`, and is in the ledger in the silo's own store.
"""

from __future__ import annotations

from argparse import Namespace

import common

from fl_helpers import exchange
from fl_helpers.cross_silo import turn


def train(args: Namespace) -> None:
    """One silo's turn of one round; of several processes, only the first one writes."""
    run, ledger = common.read_run(), None
    if common.is_first():
        ledger = exchange.Ledger(args.private / "ledger.jsonl")
    params = common.receive_model(args, run, ledger)
    client = common.load_client(args, run)
    update, own = turn.train(run, client, params, round_index=args.round)
    if not common.is_first():
        return
    if own:
        done, target = args.round + 1, args.next_kept
        exchange.write_model(target, own, round_index=done, silo=common.KEPT)
    exchange.write_update(
        args.model_update,
        update,
        round_index=args.round,
        expected={name: params[name] for name in run.shared},
        limits=common.limits(args, run),
        ledger=ledger,
    )


def main() -> None:
    """Train, with all that is printed kept in the silo."""
    parser = common.silo_parser()
    parser.add_argument(
        "--seed", type=int, required=True, help="of the run; it is said"
    )
    parser.add_argument("--model_update", type=common.folder, required=True)
    parser.add_argument("--next_kept", type=common.folder)
    common.run_silo_job(train, parser, "round {round}")


if __name__ == "__main__":
    main()
