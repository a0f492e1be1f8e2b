"""How tests are handed out, and the guard on their time."""

from types import SimpleNamespace

import groups
import pages
import pytest


def report(nodeid, duration):
    return SimpleNamespace(nodeid=nodeid, duration=duration, when="call")


def test_every_file_of_tests_has_a_group():
    names = [
        "tests/test_notebooks.py::test_a[01]",
        "tests/engines/test_azure_plan.py::test_b",
        "tests/engines/test_play.py::test_c",
        "tests/test_trees.py::test_d",
    ]
    found = ["notebooks", "Azure ML", "on premises", "helpers"]
    assert [groups.group_of(name) for name in names] == found


def test_slow_tests_come_first_and_files_stay_together():
    names = ["tests/test_a.py::one", "tests/test_a.py::two"]
    names += [f"tests/engines/test_{x}.py::{n}" for x in "bc" for n in (1, 2)]
    names += [f"tests/test_notebooks.py::test_runs[{n}]" for n in (1, 2, 3, 4)]
    items = [SimpleNamespace(nodeid=name) for name in names]
    order = [item.nodeid.split("/")[-1] for item in groups.slow_first(items)]
    notebook = "test_notebooks.py::test_runs[{}]".format
    # By place in the group, notebooks counting half: b 0, c 1; notebooks 0, .5, 1, 1.5
    assert order == [
        *("test_b.py::1", "test_b.py::2", notebook(1), notebook(2)),
        *("test_c.py::1", "test_c.py::2", notebook(3), notebook(4)),
        *("test_a.py::one", "test_a.py::two"),
    ]


def test_a_group_that_grew_by_half_is_named():
    before = {"notebooks": 400.0, "browser": 40.0, "helpers": 560.0}
    same = {name: 3 * seconds for name, seconds in before.items()}
    assert groups.grown(same, before) == []  # a slower machine
    assert groups.grown(dict.fromkeys(before, 0.0), before) == []  # --collect-only
    # Notebooks 800 of 1,400 s are 57 %, more than 1.5 times 40 %? no: 1.43 times.
    assert groups.grown(before | {"notebooks": 800.0}, before) == []
    # 1,000 of 1,600 s are 62 %, 1.56 times as much.
    (told,) = groups.grown(before | {"notebooks": 1000.0}, before)
    assert "tests of notebooks take 62% of the time, 40%" in told
    # The browser's share doubles, from 4 to 8 %: less than ten points.
    assert groups.grown(before | {"browser": 84.0}, before) == []


def test_seconds_and_tests_are_added_up_by_group():
    reports = [
        report("tests/test_notebooks.py::a", 2.0),
        report("tests/test_notebooks.py::a", 1.0),  # its set-up
        report("tests/test_trees.py::b", 0.5),
    ]
    seconds, tests = groups.summed(reports), groups.counted(reports)
    assert (seconds["notebooks"], seconds["helpers"]) == (3.0, 0.5)
    assert (tests["notebooks"], tests["helpers"], tests["browser"]) == (1, 1, 0)


@pytest.mark.parametrize("end", ["", "\nmore text\n"])
def test_the_page_gets_the_table_of_the_file(tmp_path, monkeypatch, end):
    monkeypatch.setattr(groups, "TIMES", tmp_path / "times.csv")
    monkeypatch.setattr(groups, "PAGE", tmp_path / "page.md")
    empty = "<!-- from test_times.csv -->\n\n<!-- end of test times -->"
    groups.PAGE.write_text("before\n" + empty + end)
    seconds = dict.fromkeys(groups.GROUPS, 10.0)
    for _ in range(2):  # the second time it is replaced
        groups.write_times(seconds, dict.fromkeys(groups.GROUPS, 3))
    page = groups.PAGE.read_text()
    assert page.startswith("before\n") and page.endswith(end or "times -->")
    assert page.count("| browser | 3 | 10 | 20% |") == 1
    assert groups.read_times() == seconds


@pytest.mark.parametrize("page", ["", "<!-- a -->\n\n<!-- end -->\n" * 2])
def test_a_page_without_its_marks_or_with_two_is_not_written(page):
    with pytest.raises(ValueError, match=f"has {page.count('end')} places"):
        pages.filled(page, "text", "<!-- a -->")


@pytest.mark.skipif(not groups.TIMES.exists(), reason="not measured yet")
def test_the_committed_page_shows_the_committed_file():
    page = groups.PAGE.read_text()
    assert groups.with_table(page) == page
