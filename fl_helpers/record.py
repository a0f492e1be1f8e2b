"""Publish a notebook's results inside the notebook, and read them back for tests.

The results are one display output with its own MIME type: no side file, and a reader
sees them too. Needs IPython (there in every notebook) and nbformat: copy this file on
its own.
"""

from __future__ import annotations

from pathlib import Path

import nbformat

MIME = "application/vnd.fl-helpers.record+json"

Value = float | int | str | list | dict


def record(**results: Value) -> None:
    """Publish named results of this notebook, and show them as a line each.

    Values must be JSON: numbers, strings, lists, dicts. The first ones are the
    headline: `make run` prints up to four numbers.
    """
    from IPython.display import display  # only a notebook has a display

    shown = "\n".join(f"{name} = {value}" for name, value in results.items())
    pairs = [[name, value] for name, value in results.items()]  # JSON keeps this order
    display({MIME: pairs, "text/plain": shown}, raw=True)


def read_recorded(path: str | Path) -> dict[str, Value]:
    """All results recorded in an executed notebook; a later value of a name wins."""
    cells = nbformat.read(path, as_version=4).cells
    outputs = (output for cell in cells for output in cell.get("outputs", []))
    results: dict[str, Value] = {}
    for output in outputs:
        results |= dict(output.get("data", {}).get(MIME, []))
    return results
