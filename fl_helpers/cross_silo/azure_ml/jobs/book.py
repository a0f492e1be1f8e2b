"""In a silo: book a turn in the silo's privacy account, before another job draws noise.

What a job wrote with `upload` is in its store once it has ended, and not at all if it
failed or was stopped. So a job that books and trains, and is killed, would forget what
it spent. This one books and ends; `train.py` starts after that, because it reads what
was booked, and trains for nothing else. The update leaves when that job has ended: if
it is in the orchestrator's store, its cost is in the silo's.
"""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import replace

import common

from fl_helpers.cross_silo import account, turn


def book(args: Namespace) -> None:
    """All of the client's turn up to the point where it would draw noise."""
    run = common.read_run()
    params = common.receive_model(args, run, None)
    place = common.own_place(args, run, "book")
    turn_of = {"run": run.name, "round_index": args.round}
    account.gather(args.account, place.folder / turn.ACCOUNT, **turn_of)
    client = common.load_client(args, run, place)
    whole = replace(run, evaluate=False)
    try:
        turn.train(whole, client, params, round_index=args.round)
    except account.Booked:
        own = place.account(client.silo.name)
        path = args.booked / turn.ACCOUNT
        path.with_suffix(".tmp").write_text(account.kept(own, **turn_of))
        os.replace(path.with_suffix(".tmp"), path)
        print(own.said())
        return
    raise ValueError(
        "the silo has an account, but its client books nothing there; it must train "
        "with place.account, as hospital.private_client does"
    )


def main() -> None:
    """Book, with all that is printed kept in the silo."""
    common.run_silo_job(book, common.silo_parser(), "round {round}")


if __name__ == "__main__":
    main()
