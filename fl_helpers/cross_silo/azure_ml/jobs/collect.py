"""At the orchestrator, after the last round: the final model's scores of all silos."""

from __future__ import annotations

from typing import Any

import common


def main() -> None:
    """Check the silos' scores and report them."""
    args = common.arguments("report", "round= metrics max_bytes=", updates=True)
    found = dict[str, Any]()
    for _ in common.receive(args, common.read_run(), {}, found):
        pass
    common.report(args.report, args.round, found)


if __name__ == "__main__":
    main()
