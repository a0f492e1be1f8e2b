"""At the orchestrator: from the updates of one round to the next global model."""

from __future__ import annotations

from typing import Any

import common

from fl_helpers import exchange


def main() -> None:
    """Check and reduce the updates in the order of the silos' names."""
    args = common.arguments(
        "model memory? next_model next_memory? report",
        "round= metrics max_bytes=",
        updates=True,
    )
    run, found = common.read_run(), dict[str, Any]()
    ledger = exchange.Ledger(args.report / "ledger.jsonl")
    model = exchange.read_model(args.model, run.expected(), round_index=args.round)
    model = run.in_order(model)
    rule = run.rule(model)
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
