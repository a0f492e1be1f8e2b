"""Execute the numbered notebooks: copies into runs/, or the committed files themselves.

python tools/notebooks.py run                       all notebooks, into runs/
python tools/notebooks.py run --only 03             one of them
python tools/notebooks.py run -p DATASET pneumoniamnist
python tools/notebooks.py refresh                   rewrite the committed outputs
"""

import argparse
import ast
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import nbformat
import papermill

from fl_helpers.record import read_recorded

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
RUNS = ROOT / "runs"


def main() -> int:
    options = parse_arguments()
    try:
        paths = select(options.only)
        parameters = {name: literal(value) for name, value in options.parameters}
        check_parameters(paths, parameters)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.command == "refresh":
        for path in paths:
            refresh(path, parameters)
        return 0
    return run(paths, parameters)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "refresh"))
    parser.add_argument("--only", nargs="+", default=[], metavar="NN")
    parser.add_argument(
        *("-p", "--parameter"),
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
    )
    return parser.parse_args()


def select(only: list[str]) -> list[Path]:
    """The numbered notebooks, or those whose names start with what was asked for."""
    found = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if not only:
        return found
    chosen = [path for path in found if path.name.startswith(tuple(only))]
    for start in only:
        if not any(path.name.startswith(start) for path in found):
            names = ", ".join(path.stem for path in found)
            raise ValueError(f"no notebook starts with {start!r}; there are {names}")
    return chosen


def literal(text: str) -> Any:
    """A number, list or quoted string as Python reads it, else the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return list(value) if isinstance(value, tuple) else value  # papermill: no tuples


def check_parameters(paths: list[Path], parameters: dict[str, Any]) -> None:
    """Refuse a parameter that a notebook does not have; papermill would only warn."""
    for path in paths:
        known = papermill.inspect_notebook(str(path))
        for name in parameters.keys() - known.keys():
            raise ValueError(
                f"{path.stem} has no parameter {name!r}; it has "
                f"{', '.join(known)}. Choose notebooks with NB=03 or --only 03"
            )


def execute(path: Path, output: Path, parameters: dict[str, Any]) -> float:
    """Run one notebook on a fresh kernel, with a bar over its cells; seconds taken."""
    output.parent.mkdir(exist_ok=True)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # papermill's own
        papermill.execute_notebook(
            str(path),
            str(output),
            parameters,
            kernel_name="python3",
            extra_arguments=["--log-level=ERROR"],  # a loopback kernel needs no advice
            cwd=str(NOTEBOOKS),
            progress_bar={"desc": path.stem, "unit": "cell"},
        )
    return time.perf_counter() - started


def run(paths: list[Path], parameters: dict[str, Any]) -> int:
    """Execute into runs/, go on after a failure, and end with one table."""
    rows, failed = [], []
    for path in paths:
        output = RUNS / path.name
        try:
            seconds = execute(path, output, parameters)
            rows.append((path.stem, f"{seconds:.0f}", headline(read_recorded(output))))
        except papermill.PapermillExecutionError as error:
            failed.append(path.stem)
            where = f"cell {error.exec_count}: {error.ename}: {error.evalue}"
            rows.append((path.stem, "failed", f"{where} (see {output})"))
    print_table(("notebook", "seconds", "results"), rows)
    return 1 if failed else 0


def headline(results: dict[str, Any], most: int = 4) -> str:
    """The first numbers that the notebook recorded."""
    numbers = [
        f"{name.replace('_', ' ')} {value:g}"
        for name, value in results.items()
        if isinstance(value, (int, float))
    ]
    return " | ".join(numbers[:most])


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    line = "  ".join("-" * width for width in widths)
    print()
    for row in (header, None, *rows):
        if row is None:
            print(line)
        else:
            cells = [cell.ljust(w) for cell, w in zip(row, widths, strict=True)]
            print("  ".join(cells).rstrip())


def refresh(path: Path, parameters: dict[str, Any]) -> None:
    """Execute a committed notebook; keep its outputs, not what differs by run."""
    seconds = execute(path, RUNS / path.name, parameters)
    notebook = nbformat.read(RUNS / path.name, as_version=4)
    notebook.cells = [
        cell
        for cell in notebook.cells
        if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in cell.outputs if not is_progress(output)
            ]
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02d}"  # stable, so that diffs stay small
    nbformat.write(notebook, path)
    keys = "cell.metadata.papermill cell.metadata.execution metadata.papermill "
    keys += "metadata.language_info"
    strip = ("-m", "nbstripout", "--keep-output", "--keep-id", "--extra-keys", keys)
    subprocess.run([sys.executable, *strip, str(path)], check=True)
    print(f"{path.stem}: {seconds:.0f} s")


def is_progress(output: Any) -> bool:
    """Whether an output is only what a progress bar leaves behind."""
    text = output.get("text", "")
    return output.output_type == "stream" and ("\r" in text or not text.strip())


if __name__ == "__main__":
    sys.exit(main())
