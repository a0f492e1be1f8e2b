"""How a notebook teaches: short cells, words after every result, exercises, outputs."""

import ast
import json
import re
import statistics
from pathlib import Path

import nbformat
import pytest

from notebooks import card

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
# 03 writes the algorithm out, 16 and 17 also read the reader's own files; others: 130
CODE_LINES = {"03": 180, "14": 150, "16": 140, "17": 140}
# Results of these cells are read by tests, not by people.
SILENT = {"check", "results", "parameters"}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def cells(path):
    return nbformat.read(path, as_version=4).cells


def tags(cell):
    return set(cell.metadata.get("tags", []))


def code_of(cells, *, solutions=False):
    code = [cell for cell in cells if cell.cell_type == "code"]
    return [cell for cell in code if solutions or "solution" not in tags(cell)]


def text_of(cells):
    return [cell.source for cell in cells if cell.cell_type == "markdown"]


def lines(cell):
    return sum(bool(line.strip()) for line in cell.source.splitlines())


def test_code_cells_hold_one_idea(path, cells):
    lengths = sorted(lines(cell) for cell in code_of(cells))
    assert statistics.median(lengths) <= 6, lengths
    assert lengths[int(0.9 * len(lengths))] <= 12, lengths
    assert lengths[-1] <= 20, lengths
    assert sum(lengths) <= CODE_LINES.get(path.stem[:2], 130), sum(lengths)


def test_there_is_more_text_than_code_and_not_too_much(cells):
    assert len(text_of(cells)) >= len(code_of(cells, solutions=True))
    words = sum(len(text.split()) for text in text_of(cells))
    assert 600 <= words <= 2200, words  # ten minutes at 220 words a minute
    longest = max(len(text.split()) for text in text_of(cells))
    assert longest <= 160, longest


def test_text_is_no_code(cells):
    """A cell of code whose type was lost is shown to the reader and never run."""
    for text in text_of(cells):
        try:
            assert not ast.parse(text).body, text  # a heading alone is a comment
        except SyntaxError:
            pass


def speaks(cell):
    """Whether a cell prints, or ends in an expression that shows something."""
    body = ast.parse(cell.source).body
    calls = [node for node in ast.walk(ast.Module(body, [])) if is_print(node)]
    last = body[-1] if body else None
    shows = isinstance(last, ast.Expr) and not cell.source.rstrip().endswith(";")
    return bool(calls) or shows and not isinstance(last.value, ast.Constant)


def is_print(node):
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"


def test_whatever_prints_is_committed_with_its_output(cells):
    for cell in code_of(cells, solutions=True):
        if "exercise" not in tags(cell) and speaks(cell):
            assert cell.outputs, f"no output is committed of:\n{cell.source}"


def test_no_result_is_without_words_after_it(cells):
    for cell, after in zip(cells, [*cells[1:], None], strict=True):
        if cell.cell_type == "code" and cell.outputs and not tags(cell) & SILENT:
            said = after is not None and after.cell_type == "markdown"
            assert said, f"no text follows the output of:\n{cell.source}"


def test_the_reader_writes_code_twice_and_predicts_once(cells):
    starters = [cell for cell in cells if "exercise" in tags(cell)]
    solutions = [cell for cell in cells if "solution" in tags(cell)]
    text = "\n".join(text_of(cells))
    assert len(starters) >= 2 and len(solutions) >= len(starters)
    assert text.count("**Predict.**") >= 1
    for number in range(1, len(starters) + 1):
        assert f"**Exercise {number}.**" in text
    for cell in starters:
        assert "your code" in cell.source and not cell.outputs
    for cell in solutions:
        assert "assert" in cell.source, cell.source
        assert cell.metadata.get("jupyter") == {"source_hidden": True}
        assert "hide-input" in tags(cell)


def test_nothing_clever_stands_in_a_cell(cells):
    for cell in code_of(cells, solutions=True):
        tree = ast.parse(cell.source)
        for node in ast.walk(tree):
            assert not isinstance(node, ast.NamedExpr | ast.Global), cell.source
        assert not re.search(r"(?m)^import (re|subprocess|sys)\b", cell.source)


def test_the_parts_that_every_lesson_has(path, cells):
    text = "\n\n".join(text_of(cells))
    headings = re.findall(r"(?m)^(#+) ", text)
    assert headings.count("#") == 1 and max(map(len, headings)) <= 3
    assert 4 <= headings.count("##") <= 12
    for heading in ("## Check", "## What left the silo?", "## Recap"):
        assert heading in text, heading
    assert "**Next.**" in text and text.count("?") >= 3
    assert "| You will | Needs | Time | Data |" in cells[0].source
    times = ["1 min", "2 min", *["3 min"] * (path.stem[:2] == "03")]  # docs/style.md
    assert card(path)[2]["time"] in times
    found = [tag for cell in code_of(cells) for tag in tags(cell)]
    for tag in ("parameters", "check", "results"):
        assert found.count(tag) == 1, tag
    assert code_of(cells)[-1].metadata.tags == ["results"]


def test_it_is_light_and_clean(path, cells):
    text = path.read_text()
    assert len(text) < 600_000
    assert not re.search(r"/(home|root|tmp|work|Users)/", text), "a machine's path"
    assert nbformat.reads(text, as_version=4).metadata.kernelspec == {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    pictures = 0
    for cell in code_of(cells, solutions=True):
        assert cell.execution_count is None
        assert not re.search(r"(?m)^\s*[!%]|sys\.path|pip install", cell.source)
        assert not re.search(r"https?://|urllib|requests", cell.source), "network"
        assert max(map(len, cell.source.splitlines()), default=0) <= 88
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr"
            assert "Warning" not in json.dumps(output.get("text", ""))
            pictures += "image/png" in output.get("data", {})
    assert pictures >= 1
