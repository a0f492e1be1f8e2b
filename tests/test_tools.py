"""The notebook runner, the record and the figures."""

import multiprocessing
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import nbformat
import numpy as np
import papermill
import pytest

from fl_helpers import plots
from fl_helpers.record import MIME, read_recorded

ROOT = Path(__file__).parent.parent
matplotlib.use("agg")


def runner(*arguments):
    command = [sys.executable, "tools/notebooks.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_an_unknown_parameter_is_an_error_and_names_the_known_ones():
    done = runner("run", "-p", "EPOCH", "3")
    assert done.returncode == 2
    assert "no parameter 'EPOCH'" in done.stderr and "LOCAL_EPOCHS" in done.stderr


def test_an_unknown_notebook_is_an_error():
    done = runner("run", "--only", "77")
    assert done.returncode == 2 and "no notebook starts with '77'" in done.stderr
    done = runner("run", "--at-once", "0")
    assert done.returncode == 2 and "--at-once is 0" in done.stderr


def test_values_from_the_command_line_are_read_as_python(monkeypatch):
    from notebooks import literal

    assert literal("(1, 2)") == [1, 2] and isinstance(literal("(1, 2)"), list)
    assert literal("0.5") == 0.5 and literal("pneumoniamnist") == "pneumoniamnist"


@pytest.fixture
def notebooks(monkeypatch, tmp_path):
    """The runner, with notebooks that all take 61 seconds, and a page of its own."""
    import notebooks

    (tmp_path / "page.md").write_text(notebooks.PAGE.read_text())
    for name, value in {
        "execute": lambda *_: 61.0,
        "read_recorded": lambda _: {"accuracy": 90.0},
        "PAGE": tmp_path / "page.md",
        "TIMINGS": tmp_path / "timings.csv",
    }.items():
        monkeypatch.setattr(notebooks, name, value)
    return notebooks


def test_the_table_says_what_was_slower_than_its_card(notebooks, capsys):
    assert notebooks.run(notebooks.select(["01"]), {}) == 0  # slow is no error
    assert " 61  1 min, slower  accuracy 90" in capsys.readouterr().out


def test_a_row_is_printed_when_its_notebook_is_done(notebooks, capsys):
    printed = []
    notebooks.execute = lambda *_: printed.append(capsys.readouterr().out) or 9.0
    assert notebooks.run(notebooks.select(["01", "10"]), {}) == 0
    assert "Learn" in printed[0] and "01_centralized_baseline" not in printed[0]
    assert "01_centralized_baseline" in printed[1] and "Run for real" in printed[1]


def test_a_notebook_that_fails_has_a_row_and_others_go_on(notebooks, capsys):
    def execute(path, *_):
        if path.name.startswith("01"):
            raise papermill.PapermillExecutionError(0, 3, "", "ValueError", "no", [])
        return 9.0

    notebooks.execute = execute
    assert notebooks.run(notebooks.select(["01", "02"]), {}) == 1
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert "failed" in first and "cell 3: ValueError: no" in first
    assert "02_hospitals_and_their_data" in second and " 9 " in second


@pytest.mark.skipif(
    multiprocessing.get_start_method() != "fork", reason="made-up times are inherited"
)
def test_two_notebooks_at_once_take_the_time_of_one_and_rows_keep_their_order(
    notebooks, capfd
):
    """They meet at a barrier; then the first waits for the second."""
    met, done = multiprocessing.Barrier(2), multiprocessing.Event()

    def execute(path, *_):
        met.wait(60)  # BrokenBarrierError, were they one after the other
        first = path.name.startswith("01")
        done.wait(60) if first else done.set()
        print(f"line {notebooks.LINE}", file=sys.stderr, flush=True)
        return 1.0 if first else 2.0

    notebooks.execute = execute
    assert notebooks.run(notebooks.select(["01", "02"]), {}, at_once=2) == 0
    printed, bars = capfd.readouterr()
    assert sorted(re.findall("line .+", bars)) == ["line 0", "line 1"]
    assert re.findall(r"^(0\d)\S+ +(\d)", printed, re.M) == [("01", "1"), ("02", "2")]


def test_each_notebook_belongs_to_one_part(notebooks):
    found = {part: notebooks.select([], part) for part in notebooks.PARTS}
    assert sum(found.values(), []) == notebooks.select([])
    assert [path.name[:2] for path in found["learn"]] == ["01", "02", "03", "04", "05"]


def test_timings_fail_above_the_card_and_keep_other_rows(notebooks, capsys):
    assert notebooks.timings(notebooks.select(["01", "02"])) == 1
    assert "02_hospitals_and_their_data, small: 61 s" in capsys.readouterr().out
    notebooks.execute = lambda *_: 9.0
    assert notebooks.timings(notebooks.select(["02"])) == 0
    rows = notebooks.read_timings()
    assert [row["seconds"] for row in rows] == ["61", "61", "9", "9"]
    assert notebooks.timings_table(rows) in notebooks.PAGE.read_text()


def test_peak_memory_is_that_of_the_processes_together(notebooks):
    hold = "import time; held = b'x' * 100_000_000; time.sleep(2)"
    with notebooks.peak_memory() as peak:
        both = [subprocess.Popen([sys.executable, "-c", hold]) for _ in range(2)]
        assert [process.wait() for process in both] == [0, 0]
    assert 200e6 < peak[0] < 240e6


def test_recorded_results_come_back_in_order(tmp_path):
    def cell(**results):
        output = nbformat.v4.new_output(
            "display_data", {MIME: [[k, v] for k, v in results.items()]}
        )
        return nbformat.v4.new_code_cell("record()", outputs=[output])

    path = tmp_path / "a.ipynb"
    cells = [cell(z=1.5, a="x"), nbformat.v4.new_markdown_cell("text"), cell(a="y")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    assert list(read_recorded(path).items()) == [("z", 1.5), ("a", "y")]


def test_a_bar_is_dropped_and_what_was_printed_beside_it_stays(notebooks):
    """As tqdm writes it: a carriage return before each state, spaces to clear one."""
    bar = (
        "\r  0%|          | 0/2 [00:00<?, ?round/s]\r 50%|#####     | 1/2 [00:01<00:01]"
    )
    kept = {
        bar + "\n": "",
        bar + "\r" + 40 * " " + "\r": "",
        bar + "\nno quorum: 3 of 4\n": "no quorum: 3 of 4\n",
        "first\n" + bar + "\n\nsecond\r\n": "first\n\nsecond\n",
        bar + "\r" + 40 * " " + "\rkilled\n": "killed\n",
        "50 %|a share, no bar\n": "50 %|a share, no bar\n",
    }
    for text, left in kept.items():
        assert notebooks.without_bars(text) == left, repr(text)
    stream = partial(nbformat.v4.new_output, "stream", name="stdout")
    shown = nbformat.v4.new_output("display_data", {"text/plain": "x"})
    outputs = [stream(text=bar), stream(text=bar + "\nkilled\n"), shown]
    left = notebooks.without_progress(outputs)
    assert [output.get("text") for output in left] == ["killed\n", None]


def bars(axis):
    return [round(patch.get_height()) for patch in axis.patches]


def test_label_mix_draws_the_counts():
    figure = plots.plot_label_mix(
        {"x": {"Hospital A": [3, 1], "Hospital B": [2, 4]}}, "np"
    )
    assert bars(figure.axes[0]) == [3, 2, 1, 4]  # class by class
    assert figure.axes[0].get_title() == "x"


def test_matrix_writes_each_number():
    names = dict(
        rows="ab", columns="ab", row_label="r", column_label="c", value_label="v"
    )
    figure = plots.plot_matrix(np.array([[90.0, 50.0], [60.5, 80.0]]), **names)
    assert [t.get_text() for t in figure.axes[0].texts] == [
        "90.0",
        "50.0",
        "60.5",
        "80.0",
    ]
    for full, limits in {False: (50, 90), True: (0, 100)}.items():
        figure = plots.plot_matrix(np.array([[90.0, 50.0]]), **names, full=full)
        assert figure.axes[0].images[0].get_clim() == limits


def test_curves_and_comparison_draw_what_they_are_given():
    figure = plots.plot_rounds({"a": [1, 2], "b": [3, 4]}, references={"pooled": 5})
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines["mean"] == [2, 3] and lines["pooled"] == [5, 5]
    figure = plots.plot_comparison(
        {"x": {"A": [1, 3], "B": [2, 2]}, "y": {"A": [5], "B": [6]}}
    )
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["x", "y"]
    assert list(figure.axes[0].lines[1].get_xdata()) == [2, 2]  # mean of 1 and 3


def test_time_line_counts_rounds_and_colours_by_outcome():
    spans = [("b", 0, 2, "refused"), ("a", 0, 1, "update"), ("a", 2, 5, "update")]
    figure = plots.plot_timeline(spans, marks={2.5: "killed"}, steps="round")
    axis = figure.axes[0]
    drawn = [(bar.get_x(), bar.get_width()) for bar in axis.patches]
    assert drawn == [(0, 1), (2, 3), (0, 2)]  # updates first, then what was refused
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["update", "refused"]
    assert [t.get_text() for t in axis.child_axes[0].get_xticklabels()] == ["1", "2"]
    assert [text.get_text() for text in axis.texts] == [" killed"]


def test_images_are_drawn_row_by_row():
    figure = plots.show_images(
        {"A": np.zeros((2, 4, 4)), "B": np.zeros((3, 4, 4))}, "xyz"
    )
    assert len(figure.axes) == 6
    assert sum(bool(axis.images) for axis in figure.axes) == 5
    matplotlib.pyplot.close("all")


def test_calibration_draws_each_curve_of_each_silo():
    point = SimpleNamespace(score=0.2, share=0.4, low=0.3, high=0.6)
    figure = plots.plot_calibration({"A": {"sent": [point], "mended": [point, point]}})
    drawn = [line.get_xydata() for line in figure.axes[0].lines]
    assert drawn[0].tolist() == [[0, 0], [100, 100]]  # calibrated
    assert {tuple(xy) for line in drawn[1:] for xy in line} == {(20, 40)}
    bars = [part for curve in figure.axes[0].containers for part in curve[2]]
    ends = np.concatenate([part.get_segments()[0][:, 1] for part in bars])
    assert sorted(set(ends.round(9))) == [30, 60]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["sent", "mended"]


def test_intervals_write_what_was_withheld():
    rows = {"young": (0.5, 0.4, 0.6, 20), "old": (np.nan, 0, 1, 0)}
    figure = plots.plot_intervals({"A": rows, "B": rows, "C": rows}, xlabel="%")
    assert [t.get_text() for axis in figure.axes for t in axis.texts] == 3 * [
        "withheld"
    ]
    assert list(figure.axes[1].lines[0].get_xdata()) == [40, 60]
    figure = plots.plot_intervals({"": rows}, xlabel="%", references={"": 0})
    assert [t.get_text() for t in figure.axes[0].texts] == ["50.0", "withheld"]
    assert list(figure.axes[0].lines[-1].get_xdata()) == [0, 0]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    matplotlib.pyplot.close("all")


def test_outlines_are_drawn_on_their_images():
    mask = np.zeros((2, 6, 6), bool)
    mask[0, 2:4, 2:4] = True  # the second image has none
    figure = plots.show_outlines(np.zeros((2, 6, 6)), {"true": mask}, ["a", "b"])
    assert [len(axis.collections) for axis in figure.axes] == [1, 0]
    line = figure.axes[0].collections[0].get_paths()[0].vertices
    assert line.min() == 1.5 and line.max() == 3.5  # half a pixel around it
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]
    matplotlib.pyplot.close("all")
