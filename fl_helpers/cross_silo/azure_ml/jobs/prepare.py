"""In a silo, before the first round: prepare its data, within its own store."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import common

from fl_helpers.cross_silo import turn


def prepare(args: Namespace) -> None:
    """Call the function `prepare` of `silos.yaml`."""
    function = turn.load_function(common.here(common.read_content()["prepare"]))
    function(args.data, args.prepared, dict(common.read_run().settings))


def main() -> None:
    """Prepare, with all that is printed kept in the silo."""
    parser = ArgumentParser()
    parser.add_argument("--silo", required=True)
    for name in ("data", "prepared", "private"):
        parser.add_argument(f"--{name}", type=common.folder, required=True)
    common.run_silo_job(prepare, parser, "data")


if __name__ == "__main__":
    main()
