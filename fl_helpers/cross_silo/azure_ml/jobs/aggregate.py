"""At the orchestrator: from the updates of one round to the next global model."""

from __future__ import annotations

import common

from fl_helpers import exchange
from fl_helpers.simulation import Metrics


def main() -> None:
    """Check and reduce the updates in the order of the silos' names."""
    parser = common.gather_parser()
    for name in ("model", "next_model"):
        parser.add_argument(f"--{name}", type=common.folder, required=True)
    for name in ("memory", "next_memory"):
        parser.add_argument(f"--{name}", type=common.folder)
    args, run, found = parser.parse_args(), common.read_run(), dict[str, Metrics]()
    ledger = exchange.Ledger(args.report / "ledger.jsonl")
    model = exchange.read_model(args.model, run.shared, round_index=args.round)
    model = run.in_order(model)
    rule = run.make_rule(model)
    if args.memory:
        common.load_memory(args.memory, rule)
    new = rule(common.receive(args, run, model, found))
    if args.next_memory:
        common.save_memory(args.next_memory, rule)
    done = args.round + 1
    exchange.write_model(args.next_model, new, round_index=done, ledger=ledger)
    common.report(args.report, args.round, found)


if __name__ == "__main__":
    main()
