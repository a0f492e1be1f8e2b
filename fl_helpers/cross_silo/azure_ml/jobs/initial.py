"""At the orchestrator, before the first round: publish the initial model.

Also what silos that keep entries start from, and the empty memory of a server rule.
"""

from __future__ import annotations

from argparse import ArgumentParser

import common
from safetensors.torch import load_file

from fl_helpers import exchange


def main() -> None:
    """Write the model of this snapshot as one that has done 0 rounds."""
    parser = ArgumentParser()
    parser.add_argument("--next_model", type=common.folder, required=True)
    for name in ("kept", "next_memory"):
        parser.add_argument(f"--{name}", type=common.folder)
    args, run = parser.parse_args(), common.read_run()
    params = load_file(common.HERE / common.INITIAL)
    shared = {name: params[name] for name in run.shared}
    exchange.write_model(args.next_model, shared, round_index=0)
    if args.kept:
        own = {name: params[name] for name in sorted(run.keep_local)}
        exchange.write_model(args.kept, own, round_index=0, silo=common.KEPT)
    if args.next_memory:
        common.save_memory(args.next_memory, run.make_rule(shared))


if __name__ == "__main__":
    main()
