"""At the orchestrator, after the last round: the final model's scores of all silos."""

from __future__ import annotations

import common

from fl_helpers.simulation import Metrics


def main() -> None:
    """Check the silos' scores and report them."""
    args, found = common.gather_parser().parse_args(), dict[str, Metrics]()
    for _ in common.receive(args, common.read_run(), {}, found):
        pass
    common.report(args.report, args.round, found)


if __name__ == "__main__":
    main()
