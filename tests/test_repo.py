"""Rules that keep the project small, honest and copyable."""

import ast
import csv
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from torchvision.models import resnet18

from notebooks import card, read_timings, timings_table

ROOT = Path(__file__).parent.parent

EXAMPLE = ROOT / "fl_helpers" / "hospital.py"  # to adapt: it puts the helpers together
HELPERS = sorted({*(ROOT / "fl_helpers").glob("[a-z]*.py")} - {EXAMPLE})
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
DOCUMENTS = [
    *ROOT.glob("*.md"),
    ROOT / "data/README.md",
    *(ROOT / "docs").rglob("*.md"),
    ROOT / "experiments/README.md",
]
by_name = dict(ids=lambda path: path.name)

ONE_LIBRARY = {  # what a helper may import beside the standard library, numpy and torch
    "comparison.py": {"scipy"},
    "data.py": {"torchvision"},
    "images.py": {"PIL", "pydicom"},
    "metrics.py": {"scipy"},
    "models.py": {"torchvision"},
    "plots.py": {"matplotlib"},
    "privacy.py": {"opacus"},
    "record.py": {"nbformat", "IPython"},
    "report.py": {"jinja2", "matplotlib"},
    "secure_aggregation.py": {"cryptography"},
    "simulation.py": {"tqdm"},
}


def imported(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else node.module.split(".")[0]


@pytest.mark.parametrize("path", HELPERS, **by_name)
def test_helper_imports_no_sibling_and_one_library(path):
    allowed = (
        sys.stdlib_module_names | {"numpy", "torch"} | ONE_LIBRARY.get(path.name, set())
    )
    extra = set(imported(path.read_text())) - allowed
    assert not extra, (
        f"{path.name} imports {extra}; inline it, or say why in ONE_LIBRARY"
    )


@pytest.mark.parametrize("path", HELPERS, **by_name)
def test_helper_works_when_copied_alone(path, tmp_path):
    shutil.copy(path, tmp_path)
    code = f"import {path.stem}; print({path.stem}.__doc__.splitlines()[0])"
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c",
         f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; {code}"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


@pytest.mark.parametrize("path", HELPERS, **by_name)
def test_helper_functions_can_be_seen_whole(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            length = node.end_lineno - node.lineno - docstring.count("\n")
            assert length <= 55, f"{path.name}: {node.name} has {length} lines"


def test_the_one_function_in_two_files_does_the_same():
    from fl_helpers import silos, synthetic_cxr

    for index in (0, 25, 26, 701, 702):
        assert silos._letters(index) == synthetic_cxr._letters(index)


def test_nothing_unpickles_but_our_own_checkpoint():
    found = [
        f"{path.name}: {line.strip()}"
        for path in HELPERS
        for line in path.read_text().splitlines()
        if re.search(r"torch\.load\(|import pickle|allow_pickle=True", line)
    ]
    assert len(found) == 1 and "weights_only=True" in found[0], found


@pytest.fixture(params=NOTEBOOKS, **by_name)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def lines(cell):
    return sum(bool(line.strip()) for line in cell.source.splitlines())


def test_notebook_parameters_have_comments(notebook):
    cell = next(
        c for c in code_cells(notebook) if "parameters" in c.metadata.get("tags", [])
    )
    assignments = [line for line in cell.source.splitlines() if line]
    assert 3 <= len(assignments) <= 8
    for line in assignments:
        assert re.match(r"[A-Z_]+ = .+  # .+", line), line


def test_readme_lists_every_notebook_as_its_card_says():
    readme = (ROOT / "README.md").read_text()
    for path in NOTEBOOKS:
        number, title, row = card(path)
        name = title.split(" (")[0]
        link = f"[{name}](notebooks/{path.name})"
        expected = f"| {number} | {link} | {row['will']} | {row['time']} |"
        assert expected in readme, f"README.md lacks the line\n{expected}"
    assert len(re.findall(r"\(notebooks/\d\d_", readme)) >= len(NOTEBOOKS)


def test_notebooks_take_the_time_on_their_cards():
    rows = read_timings()
    kinds = "default", "small"
    measured = [(row["notebook"], row["parameters"]) for row in rows]
    assert measured == [(path.stem, kind) for path in NOTEBOOKS for kind in kinds]
    for row in rows:
        number, _, found = card(ROOT / "notebooks" / f"{row['notebook']}.ipynb")
        assert found["time"] == f"{row['card_minutes']} min", "run make timings"
        most = 60 * min(
            int(row["card_minutes"]), 5 if row["parameters"] == "default" else 1
        )
        assert int(row["seconds"]) <= most, f"{number}, {row['parameters']}: too slow"
        assert int(row["peak_mb"]) > 0
    assert timings_table(rows) in (ROOT / "docs/timings.md").read_text()


@pytest.mark.parametrize(
    "path", [*DOCUMENTS, *NOTEBOOKS], ids=lambda p: str(p.relative_to(ROOT))
)
def test_relative_links_lead_somewhere(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_commands_of_the_documents_exist():
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    for path in DOCUMENTS:
        for target in re.findall(r"(?m)(?:^|`)make ([a-z-]+)", path.read_text()):
            assert target in targets, f"{path.name} says make {target}"


def test_requirements_say_who_uses_them():
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith(("#", "-r")):
                assert "# used by: " in line, line


def test_the_engines_latency_is_what_was_measured():
    text = (ROOT / "docs/on-premises.md").read_text()
    with (ROOT / "docs/results/engines.csv").open() as file:
        for row in csv.DictReader(file):
            first, later, cpu = (
                float(row[f"{key}_s"]) for key in ("first_round", "later_round", "cpu")
            )
            line = f"{row['version']} | {first:.0f} | {later:.1f} | {cpu:.0f} |"
            assert re.search(rf"\| {row['silos']} \| .* {re.escape(line)}", text), line


def test_python_in_the_concepts_runs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs/concepts.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, {})
    assert len(blocks) == 2 and "train_loss" in capsys.readouterr().out


def said_by(path):
    """Texts of a file's errors, with … for what is filled in, up to the remedy."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        values = [v.value if isinstance(v, ast.Constant) else "…" for v in parts]
        if all(isinstance(v, str) for v in values):
            found.add(re.split(r"; | on its way", "".join(values))[0].strip())
    return found


def test_troubleshooting_has_the_messages_of_the_code():
    text = (ROOT / "docs/troubleshooting.md").read_text().replace(r"\|", "|")
    listed = [row.split("`")[1] for row in text.splitlines() if row.startswith("| `")]
    said = set().union(*map(said_by, HELPERS))
    whole = {message for message in said if len(message) > 4}
    heads = {message.split("; ")[0] for message in listed}
    unknown = {h for h in heads if not any(m.startswith(h.rstrip(".")) for m in whole)}
    assert not unknown and len(listed) >= 50
    path = ROOT / "fl_helpers/exchange.py"
    raised = [
        argument
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        if getattr(node.exc.func, "id", "") == "ValueError"
        for argument in node.exc.args
        if isinstance(argument, ast.JoinedStr | ast.Constant)
    ]
    for argument in raised:
        parts = getattr(argument, "values", [argument])
        values = [v.value if isinstance(v, ast.Constant) else "…" for v in parts]
        head = "".join(values).split("; ")[0]
        assert head in heads, f"docs/troubleshooting.md lacks {head!r}"
    assert len(raised) > 20


def test_python_in_security_audits_a_model_that_is_not_ours(capsys):
    text = (ROOT / "docs/security.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    part = torch.randn(100, 3, 32, 32), torch.randint(2, (100,))
    silo = SimpleNamespace(train=part, test=part)  # the same images: nothing to find
    exec(textwrap.dedent(block), {"model": resnet18(num_classes=2), "silo": silo})
    assert "'auroc': 0.5" in capsys.readouterr().out
