"""Which tests run beside each other, and how much of the time each group of them takes.

`make test ARGS=--write-times` measures anew and rewrites the table in docs/timings.md.
"""

import csv
import re
from pathlib import Path

from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).parent.parent
TIMES, PAGE = ROOT / "docs/results/test_times.csv", ROOT / "docs/timings.md"
GROUPS = {  # the first that fits; the last fits all
    "notebooks": r"tests/test_notebooks",
    "browser": r"tests/test_browser",
    "Azure ML": r"tests/engines/test_azure",
    "on premises": r"tests/engines/",
    "helpers": r"tests/",
}
SLOW = "browser", "on premises", "Azure ML", "notebooks"
GROWN = 1.5  # a group fails the suite when its share of the time grew by half,
LEAST = 0.1  # and by more than this, which may be chance


class Scheduling(LoadFileScheduling):
    """The tests of a file share a process and its servers; each notebook is alone."""

    def _split_scope(self, nodeid: str) -> str:
        alone = group_of(nodeid) == "notebooks"
        return nodeid if alone else super()._split_scope(nodeid)


def group_of(nodeid: str) -> str:
    return next(name for name, start in GROUPS.items() if re.match(start, nodeid))


def slow_first(items: list) -> list:
    """What waits for servers, next to what computes, and quick tests to fill the gaps.

    Files keep their order, and so do the tests of a file.
    """
    files: dict[str, list] = {}
    for item in items:
        group = group_of(item.nodeid)
        name = item.nodeid if group == "notebooks" else item.nodeid.split("::")[0]
        files.setdefault(name, []).append(item)
    places: dict[str, int] = {}

    def place(name: str) -> tuple[bool, float]:
        group = group_of(name)
        places[group] = places.get(group, -1) + 1
        # About two runs of notebooks for each file that starts servers.
        return group not in SLOW, places[group] / (2 if group == "notebooks" else 1)

    order = {name: place(name) for name in files}
    return [item for name in sorted(files, key=order.get) for item in files[name]]


def summed(reports: list) -> dict[str, float]:
    """Seconds by group, set-up and tear-down included."""
    seconds = dict.fromkeys(GROUPS, 0.0)
    for report in reports:
        seconds[group_of(report.nodeid)] += report.duration
    return seconds


def counted(reports: list) -> dict[str, int]:
    """Tests by group, those that were skipped included."""
    tests = {report.nodeid for report in reports}
    return {name: sum(group_of(t) == name for t in tests) for name in GROUPS}


def grown(seconds: dict[str, float], before: dict[str, float]) -> list[str]:
    """The groups whose share of the time grew by half; a sentence for each."""
    told, total, was = [], sum(seconds.values()) or 1.0, sum(before.values())
    for name, now in seconds.items():
        share, old = now / total, before.get(name, 0.0) / was
        if share > GROWN * old and share > old + LEAST:
            told.append(
                f"the tests of {name} take {share:.0%} of the time, {old:.0%} when it "
                f"was measured: make them shorter, or measure all groups anew with "
                "make test ARGS=--write-times"
            )
    return told


def read_times() -> dict[str, float]:
    with TIMES.open() as file:
        return {row["group"]: float(row["seconds"]) for row in csv.DictReader(file)}


def write_times(seconds: dict[str, float], tests: dict[str, int]) -> None:
    """Rewrite the table, in the file and on the page."""
    rows = [(name, tests[name], round(seconds[name])) for name in GROUPS]
    with TIMES.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [("group", "tests", "seconds"), *rows]
        )
    PAGE.write_text(with_table(PAGE.read_text()))


def with_table(page: str) -> str:
    """The page with the table of the file."""
    from pages import filled  # here: processes of tests read conftest without tools/

    with TIMES.open() as file:
        rows = list(csv.DictReader(file))
    total = sum(int(row["seconds"]) for row in rows)
    lines = ["| tests of | tests | seconds | share |", "|---|---:|---:|---:|"]
    for row in rows:
        share = f"{int(row['seconds']) / total:.0%}"
        lines.append(
            f"| {row['group']} | {row['tests']} | {row['seconds']} | {share} |"
        )
    marks = "<!-- from test_times.csv -->", "<!-- end of test times -->"
    return filled(page, "\n" + "\n".join(lines) + "\n", *marks)
