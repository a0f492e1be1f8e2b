"""Execute the numbered notebooks: copies into runs/, or the committed files themselves.

python tools/notebooks.py run                       all notebooks, into runs/
python tools/notebooks.py run --only 03             one of them
python tools/notebooks.py run --part learn          01 to 05, which need fewer packages
python tools/notebooks.py run --at-once 1           one after the other, not two at once
python tools/notebooks.py run -p DATASET pneumoniamnist
python tools/notebooks.py refresh                   rewrite the committed outputs
python tools/notebooks.py timings                   time and memory: docs/timings.md
"""

import argparse
import ast
import contextlib
import csv
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
import yaml
from machine import circumstances, cpu_seconds
from pages import filled

from fl_helpers.record import read_recorded

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
RUNS = ROOT / "runs"
SMALL = ROOT / "tools" / "small.yaml"
PAGE, TIMINGS = ROOT / "docs/timings.md", ROOT / "docs/results/timings.csv"
WHERE = "date", "machine", "python", "torch"
PARTS = {  # the first notebook of each part, and its title
    "learn": ("01", "Learn"),
    "protect": ("06", "Protect"),
    "real": ("10", "Run for real"),
    "data": ("13", "Your data"),
}
AT_ONCE = min(2, os.cpu_count() or 1)  # each holds up to 5 GB; most compute on one core
LINE = None  # of the terminal, where the bars of this process are drawn
BAR = re.compile(r"\d+%\|")  # tqdm's: "rounds:  25%|##5   | 2/8 [00:01<00:03]"


def main() -> int:
    # The models are small: threads wait for each other, most of all where other work is
    # done, and their number changes the last digits. Silos train in parallel.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options = parse_arguments()
    try:
        paths = select(options.only, options.part)
        parameters = {name: literal(value) for name, value in options.parameters}
        check_parameters(paths, parameters)
        if parameters and options.command == "timings":
            raise ValueError("timings are of the default and the small parameters")
        if options.at_once < 1:
            raise ValueError(f"--at-once is {options.at_once}; it must be 1 or more")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.command == "refresh":
        for path in paths:
            refresh(path, parameters)
        return 0
    if options.command == "timings":
        return timings(paths)
    return run(paths, parameters, options.at_once)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "refresh", "timings"))
    parser.add_argument("--only", nargs="+", default=[], metavar="NN")
    parser.add_argument("--part", choices=PARTS, help="only one part of the lessons")
    told = "notebooks that `run` executes side by side (default: %(default)s)"
    parser.add_argument("--at-once", type=int, default=AT_ONCE, metavar="N", help=told)
    parser.add_argument(
        *("-p", "--parameter"),
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
    )
    return parser.parse_args()


def select(only: list[str], part: str | None = None) -> list[Path]:
    """The numbered notebooks: all, those of a part, or those that start as asked."""
    found = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    for start in only:
        if not any(path.name.startswith(start) for path in found):
            names = ", ".join(path.stem for path in found)
            raise ValueError(f"no notebook starts with {start!r}; there are {names}")
    chosen = [p for p in found if not only or p.name.startswith(tuple(only))]
    return [path for path in chosen if part in (None, part_of(path))]


def part_of(path: Path) -> str:
    """The part that a notebook belongs to, by its number."""
    return [name for name, (first, _) in PARTS.items() if first <= path.name[:2]][-1]


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


def card(path: Path) -> tuple[str, str, dict[str, str]]:
    """Number, title and table row of a notebook's first cell."""
    first = nbformat.read(path, as_version=4).cells[0].source
    title = re.search(r"^# (\d\d) · (.+)$", first, re.M)
    row = first.strip().splitlines()[-1].strip("| ").split(" | ")
    names = ("will", "needs", "time", "data")
    return title[1], title[2], dict(zip(names, row, strict=True))


def card_minutes(path: Path) -> int:
    return int(card(path)[2]["time"].removesuffix(" min"))


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
            progress_bar={"desc": path.stem, "unit": "cell", "position": LINE},
        )
    return time.perf_counter() - started


def run(paths: list[Path], parameters: dict[str, Any], at_once: int = 1) -> int:
    """Execute into runs/, with a row for each in order, also when it failed."""
    width, failed, part = max(len(path.stem) for path in paths), 0, None
    print(f"{'notebook':{width}}  seconds  on the card    results")
    at_once = min(at_once, len(paths))
    with mapping(at_once) as each:
        one = partial(run_one, parameters=parameters, alone=at_once == 1)
        rows = each(one, paths)
        for path in paths:
            if part != part_of(path):
                part = part_of(path)
                print(f"\n{PARTS[part][1]}\n{'-' * (width + 60)}", flush=True)
            seconds, card_time, numbers = next(rows)
            failed += seconds == "failed"
            print(f"{path.stem:{width}}  {seconds:>7}  {card_time:13}  {numbers}")
            sys.stdout.flush()
    return int(failed > 0)


@contextlib.contextmanager
def mapping(at_once: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map`, or one that uses so many processes, each with a line for its bars."""
    if at_once == 1:
        yield map
        return
    lines = multiprocessing.SimpleQueue()
    for line in range(at_once):
        lines.put(line)
    with ProcessPoolExecutor(at_once, initializer=take_line, initargs=[lines]) as pool:
        yield pool.map


def take_line(lines: Any) -> None:
    """Take a line of the terminal for the bars of this process."""
    global LINE
    LINE = lines.get()


def run_one(
    path: Path, parameters: dict[str, Any], alone: bool
) -> tuple[str, str, str]:
    """Execute one notebook into runs/: seconds, time on its card, first results.

    alone: the card's time is for a notebook that has the machine to itself.
    """
    output, minutes = RUNS / path.name, card_minutes(path)
    try:
        seconds = execute(path, output, parameters)
    except papermill.PapermillExecutionError as error:
        where = f"cell {error.exec_count}: {error.ename}: {error.evalue}"
        return "failed", "", f"{where} (see {output})"
    slower = ", slower" if alone and seconds > 60 * minutes else ""
    numbers = headline(read_recorded(output))
    return f"{seconds:.0f}", f"{minutes} min{slower}", numbers


def headline(results: dict[str, Any], most: int = 4) -> str:
    """The first numbers that the notebook recorded."""
    numbers = [
        f"{name.replace('_', ' ')} {value:g}"
        for name, value in results.items()
        if isinstance(value, (int, float))
    ]
    return " | ".join(numbers[:most])


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
            cell.outputs = without_progress(cell.outputs)
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02d}"  # stable, so that diffs stay small
    nbformat.write(notebook, path)
    keys = "cell.metadata.papermill cell.metadata.execution metadata.papermill "
    keys += "metadata.language_info"
    strip = ("-m", "nbstripout", "--keep-output", "--keep-id", "--extra-keys", keys)
    subprocess.run([sys.executable, *strip, str(path)], check=True)
    print(f"{path.stem}: {seconds:.0f} s")


def timings(paths: list[Path]) -> int:
    """Measure notebooks with default and small parameters, rewrite their rows and the
    page; 1 if one took longer than its card says."""
    where, slow = circumstances(), []
    small = yaml.safe_load(SMALL.read_text())
    done = {(row["notebook"], row["parameters"]): row for row in read_timings()}
    done = {
        key: row
        for key, row in done.items()
        if (NOTEBOOKS / f"{key[0]}.ipynb").exists()
    }
    for path in paths:
        for kind, parameters in (("default", {}), ("small", small[path.stem])):
            before = sum(psutil.cpu_times()[:3]) - cpu_seconds()
            with peak_memory() as peak:
                seconds = execute(path, RUNS / path.name, parameters)
            others = sum(psutil.cpu_times()[:3]) - cpu_seconds() - before
            row = {"notebook": path.stem, "parameters": kind}
            row |= {"seconds": f"{seconds:.0f}", "peak_mb": f"{peak[0] / 1e6:.0f}"}
            row |= {"card_minutes": card_minutes(path)}
            row |= {"cores_of_others": f"{max(others, 0) / seconds:.1f}"}
            done[path.stem, kind] = row | {name: where[name] for name in WHERE}
            if seconds > 60 * card_minutes(path):
                slow.append(f"{path.stem}, {kind}: {seconds:.0f} s")
        write_timings([row for _, row in sorted(done.items())])
    print("slower than the card says:", "; ".join(slow) or "none")
    return int(bool(slow))


def write_timings(rows: list[dict[str, Any]]) -> None:
    with TIMINGS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader(), writer.writerows(rows)
    text = timings_table(read_timings())
    PAGE.write_text(filled(PAGE.read_text(), text, "<!-- from timings.csv -->"))


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Largest memory of all processes started in the meantime, in bytes, by samples.

    Pages that only one process has count there; of those that several have, libraries
    above all, the largest part that one process sees. (PSS would divide them by all
    processes of the machine that have them, also by those of other people.)
    """
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            own = shared = 0
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    memory = process.memory_full_info()
                    own += memory.uss
                    shared = max(shared, memory.rss - memory.uss)
            peak[0] = max(peak[0], own + shared)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def read_timings() -> list[dict[str, str]]:
    if not TIMINGS.exists():
        return []
    with TIMINGS.open(newline="") as file:
        return list(csv.DictReader(file))


def timings_table(rows: list[dict[str, str]]) -> str:
    """The results as docs/timings.md shows them."""
    text = ""
    for name in WHERE:
        values = dict.fromkeys(row[name] for row in rows)
        text += f"\n- {name}: {'; '.join(values)}"
    columns = "seconds", "peak_mb", "cores_of_others"
    one = "seconds | peak, MB | others, cores"
    text += f"\n\n| notebook | card, min | {one} | small: {one} |\n|---{'|---:' * 7}|\n"
    for full, small in zip(rows[::2], rows[1::2], strict=True):
        link = f"[{full['notebook']}](../notebooks/{full['notebook']}.ipynb)"
        cells = [link, full["card_minutes"]]
        cells += [row[column] for row in (full, small) for column in columns]
        text += f"| {' | '.join(cells)} |\n"
    known = {row["notebook"] for row in rows}
    absent = [path.stem for path in select([]) if path.stem not in known]
    return text + f"\nNot measured yet: {', '.join(absent) or 'none'}.\n"


def without_progress(outputs: list[Any]) -> list[Any]:
    """The outputs without what progress bars leave behind; printed lines stay."""
    kept = []
    for output in outputs:
        if output.output_type == "stream":
            output.text = without_bars(output.text)
            if not output.text.strip():
                continue
        kept.append(output)
    return kept


def without_bars(text: str) -> str:
    """Printed text without bars: a bar draws itself anew after each carriage return."""
    parts = text.replace("\r\n", "\n").splitlines(keepends=True)  # at \r, too
    said = (p for p in parts if not BAR.search(p) and (p.strip() or "\r" not in p))
    return "".join(part.replace("\r", "") for part in said)


if __name__ == "__main__":
    sys.exit(main())
