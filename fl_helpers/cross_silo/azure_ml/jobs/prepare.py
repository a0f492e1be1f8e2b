"""In a silo, before the first round: prepare its data, within its own store."""

from __future__ import annotations

from argparse import ArgumentParser

import common

from fl_helpers.cross_silo import turn


def main() -> None:
    """Call the function `prepare` of `silos.yaml`."""
    parser = ArgumentParser()
    parser.add_argument("--silo", required=True)
    for name in ("data", "prepared", "private"):
        parser.add_argument(f"--{name}", type=common.folder, required=True)
    args = parser.parse_args()

    def prepare() -> None:
        function = turn.load_function(common.here(common.read_content()["prepare"]))
        function(args.data, args.prepared, dict(common.read_run().settings))

    common.run_privately(args.private, f"{args.silo}, data", prepare)


if __name__ == "__main__":
    main()
