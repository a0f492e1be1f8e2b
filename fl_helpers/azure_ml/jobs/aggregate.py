"""At the orchestrator: from the updates of one round to the next global model."""

from __future__ import annotations

from typing import Any

import common

from fl_helpers import exchange


def main() -> None:
    """Check and reduce the updates in the order of the silos' names."""
    args = common.arguments(
        *("model", "memory-", "next_model", "next_memory-", "report"),
        **{"round": int, "metrics": str, "max_bytes": int, "updates": dict},
    )
    run = common.read_run()
    ledger = exchange.Ledger(args.report / "ledger.jsonl")
    model = exchange.read_model(args.model, run.expected(), round_index=args.round)
    model = common.in_order(model, run)
    rule, found = run.rule(model), dict[str, Any]()
    if args.memory:
        common.load_memory(args.memory, rule)
    new = rule(common.received(args, run, model, found))
    if args.next_memory:
        common.save_memory(args.next_memory, rule)
    exchange.write_model(
        args.next_model, new, round_index=args.round + 1, ledger=ledger
    )
    common.report(args.report, args.round, found)


if __name__ == "__main__":
    main()
