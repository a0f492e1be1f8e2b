"""In a silo, before the first round: prepare its data, within its own store."""

from __future__ import annotations

import common


def main() -> None:
    """Call the function `prepare` of the run."""
    args, run = common.arguments("data prepared private", "silo"), common.read_run()

    def prepare() -> None:
        run.load_prepare()(args.data, args.prepared, dict(run.settings))

    common.run_privately(args.private, f"{args.silo}, data", prepare)


if __name__ == "__main__":
    main()
