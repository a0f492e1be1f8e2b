"""Shared by the experiments with many runs: compute what is missing, in processes."""

import csv
import multiprocessing

import pandas as pd


def run_jobs(jobs, path, processes, *, work, columns, keys, identify=tuple, text=()):
    """Append the rows of the jobs that the file lacks; all rows of these jobs.

    work(job): its rows, dicts with columns. identify(job): the values of keys in them.
    text: columns that hold text, even where it looks like a number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(",".join(columns) + "\n")
    jobs, keys, text = list(jobs), list(keys), dict.fromkeys(text, str)
    known = pd.read_csv(path, dtype=text, keep_default_na=False)[keys]
    known = set(known.itertuples(index=False, name=None))
    todo = [job for job in jobs if identify(job) not in known]
    context = multiprocessing.get_context("spawn")
    with path.open("a", newline="") as file, context.Pool(processes) as pool:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        for done, rows in enumerate(pool.imap(work, todo), start=1):
            writer.writerows(rows)
            file.flush()
            print(f"\r{done}/{len(todo)}", *rows[0].values(), " " * 20, end="")
    print()
    asked = pd.DataFrame([identify(job) for job in jobs], columns=keys)
    return pd.read_csv(path, dtype=text).merge(asked)
