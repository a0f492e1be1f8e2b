"""The benchmarks' guard, and that docs/benchmarks.md says what was measured."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import bench_gpu
import bench_scale
import common
import measure
import pytest
import torch
import workload
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent

CASE, (GOAL, BOUND) = (
    "update to disk and back",
    common.BOUNDS["update to disk and back"],
)


@pytest.mark.parametrize(
    ("values", "noise", "code"),
    [
        # quartiles of five are the second and the fourth: the noise is half their gap
        ([BOUND + x for x in (-0.2, -0.1, 0.0, 0.1, 0.2)], 0.1, 0),
        ([BOUND + x for x in (-0.1, 0.0, 0.05, 0.1, 0.2)], 0.05, 0),  # within noise
        ([BOUND + x for x in (0.0, 0.1, 0.2, 0.3, 0.4)], 0.1, 1),  # a regression
        ([BOUND / 2] * 4 + [99.0], 0.0, 0),  # one run that was disturbed
        (BOUND + 0.01, None, 1),  # one value: no noise is known
    ],
)
def test_guard_fails_above_the_bound_by_more_than_the_noise(values, noise, code):
    found = common.row(CASE, values)
    assert (found["goal"], found["bound"]) == (GOAL, BOUND)
    assert found["noise"] == pytest.approx(noise)
    assert common.report("guard", [found]) == code


def test_what_has_no_bound_cannot_fail():
    assert common.report("guard", [common.row("not in the table", 1e9)]) == 0


@pytest.fixture
def no_garbage(monkeypatch):
    """To look for garbage before each run takes long in a process with many modules."""
    monkeypatch.setattr(common.gc, "collect", lambda: None)


@pytest.mark.usefixtures("no_garbage")
def test_compare_pairs_the_runs_and_alternates_their_order():
    calls = []
    times = common.compare(
        lambda: calls.append("r"), lambda: calls.append("c"), pairs=3
    )
    assert "".join(calls) == "rc" + "cr" + "rc" + "cr"  # one untimed run of each
    assert len(times.wall) == len(times.cpu) == len(times.runs) == 3


@pytest.mark.usefixtures("no_garbage")
@pytest.mark.parametrize(("full", "pairs"), [(True, 15), (False, 8)])
def test_a_short_run_takes_half_of_the_pairs(monkeypatch, full, pairs):
    monkeypatch.setattr(common, "FULL", full)
    nothing = (lambda: None,) * 2
    runs = common.compare(*nothing, pairs=15).runs
    assert len(runs) == pairs


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.234, "1.23"),
        ("12.34", "12.3"),
        (123.4, "123"),
        (4321.0, "4,321"),
        (0.0312, "0.0312"),
        (0, "0"),
        ("", "-"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert common.shown(value) == text


def test_page_has_the_tables_of_the_results():
    page, rows = (ROOT / "docs/benchmarks.md").read_text(), common.read_results()
    assert common.tables(rows) in page
    for key in ("date", "machine", "python", "torch", "numpy", "safetensors"):
        (value,) = {row[key] for row in rows}
        assert f"- {key}: {value}" in page


def test_every_bound_was_measured_and_held():
    rows = {row["case"]: row for row in common.read_results()}
    for case, (goal, bound) in common.BOUNDS.items():
        row = rows[case]
        assert [row["goal"], row["bound"]] == [
            "" if number is None else f"{number:.4g}" for number in (goal, bound)
        ]
        if bound is not None:
            assert float(row["value"]) - float(row["noise"] or 0) <= bound, case


def test_what_is_projected_follows_from_what_was_measured():
    rows = common.read_results()
    found = {row["case"]: row for row in rows}
    for row in bench_scale.projection(rows):
        value = float(found[row["case"]]["value"])  # four digits in the file
        assert value == pytest.approx(row["value"], rel=2e-3)
    # 4 bytes for each parameter, there and back, 100 silos; 8 bits, 10^10 in a second
    assert float(found["sent in a round, both directions"]["value"]) == 800
    assert float(found["that over a line of 10 Gbit/s"]["value"]) == 640


def test_the_benchmark_of_a_gpu_is_skipped_without_one_and_runs(monkeypatch, capsys):
    monkeypatch.setattr(bench_gpu, "CASES", bench_gpu.CASES[:1])
    monkeypatch.setattr(bench_gpu.torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main() == 0 and "SKIPPED" in capsys.readouterr().out
    assert bench_gpu.measure("cpu", num_images=128, pairs=1) == 0
    assert capsys.readouterr().out.count("GPU / CPU") == 2


def test_page_says_where_a_rounds_time_goes():
    rows = common.read_results(ROOT / "docs/results/rounds.csv")
    page = (ROOT / "docs/benchmarks.md").read_text()
    marks = "<!-- from rounds.csv -->\n", "<!-- end of rounds -->"
    assert page.split(marks[0])[1].split(marks[1])[0] == common.rounds_table(rows)
    cases = {}
    for row in rows:
        if not row["stage"].startswith("once"):
            key = row["engine"], row["model"], row["silos"]
            cases.setdefault(key, {})[row["stage"]] = float(row["seconds"])
    assert len(cases) == 8
    for stages in cases.values():
        assert stages.pop("a round") == pytest.approx(sum(stages.values()), rel=1e-2)


def test_page_has_the_table_of_other_frameworks_and_the_goals_that_are_missed():
    page, rows = (ROOT / "docs/benchmarks.md").read_text(), measure.read_results()
    _, _, part = page.partition("<!-- from peers.csv -->")
    part, _, _ = part.partition("<!-- end of peers -->")
    assert measure.table(rows) in part
    for key in ("date", "machine", "python", "torch", "load_before"):
        (value,) = {row[key] for row in rows}
        assert f"- {key}: {value}" in part


def test_other_frameworks_did_the_same_work():
    rows = measure.read_results()
    assert {row["framework"] for row in rows} == set(measure.PEERS)
    assert measure.unlike(rows, workload.WORKLOADS) == []


def peers(**flower):
    """Rows of a made-up measurement."""
    steps = workload.WORKLOADS["W1"].steps
    same = dict(workload="W1", rounds=5, steps=steps, test_loss=0.2)
    same |= dict(seconds_to_ours=2, memory_to_ours=3)
    names = ("ours", measure.REFERENCE, "Flower", "pfl")
    rows = [same | dict(framework=name) for name in names]
    rows[2] |= flower
    return rows


@pytest.mark.parametrize(
    ("flower", "problem", "goal"),
    [
        ({}, [], []),
        (dict(steps=619), ["Flower, W1: 619 steps in 5 rounds"], []),
        (dict(test_loss=0.31), ["Flower, W1: test loss 0.31, reference 0.2"], []),
        (dict(rounds=1, steps=124, test_loss=2.0), [], []),  # fewer rounds, as told
        (dict(seconds_to_ours=1.9), [], ["Flower, W1, seconds"]),
        (dict(memory_to_ours=2.9), [], ["Flower, W1, memory"]),
    ],
)
def test_other_work_and_missed_goals_are_found(flower, problem, goal):
    rows = peers(**flower)
    assert measure.unlike(rows, workload.WORKLOADS) == problem
    assert measure.missed(rows) == goal


def test_the_comparison_finds_its_parts_when_it_is_started_alone():
    """At its end it writes the results of twenty minutes."""
    folder = ROOT / "tests/benchmarks/peers"
    code = f"import sys; sys.path[0] = {str(folder)!r}; import measure, run, workload"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=ROOT.parent, env=environment, check=True)


def ends_of(name, tmp_path, monkeypatch):
    """What our simulation and the bare loop make of a workload."""
    models, threads = [], torch.get_num_threads()
    for script in ("ours", "bare"):
        result = tmp_path / f"{script}.json"
        monkeypatch.setattr(sys, "argv", [script, name, str(result), "0"])
        runpy.run_path(str(ROOT / f"tests/benchmarks/peers/{script}.py"))
        torch.set_num_threads(threads)
        found, expected = json.loads(result.read_text()), workload.WORKLOADS[name]
        assert (found["steps"], len(found["ends"])) == (expected.steps, expected.rounds)
        models.append(load_file(result.with_suffix(".safetensors")))
    return models


def test_our_simulation_and_a_bare_loop_reach_the_same_model(tmp_path, monkeypatch):
    ours, bare = ends_of("tiny", tmp_path, monkeypatch)
    torch.testing.assert_close(ours, bare, rtol=0, atol=1e-5)
    start = workload.Model().state_dict()
    assert all((ours[key] - start[key]).abs().max() > 1e-4 for key in start)


def test_so_they_do_with_pictures_of_a_dataset_and_adamw(tmp_path, monkeypatch):
    ours, bare = ends_of("tiny pictures", tmp_path, monkeypatch)
    start = workload.model_of("tiny pictures")
    for name, value in start.named_parameters():
        # AdamW's first step is lr for every entry, up or down. The order in the batch
        # changes rounding, and with it the sign where a gradient is about zero.
        moved, apart = (ours[name] - value).abs().mean(), ours[name] - bare[name]
        assert moved > 1e-4 and apart.abs().mean() < 0.05 * moved, name
    loss, accuracy = workload.test_loss("tiny pictures", ours)
    assert loss > 0 and 0 <= accuracy <= 1


def test_augmentation_draws_and_keeps_the_shape():
    from pictures import SIZE, Pictures

    data, still = (Pictures(4, 0, augment=how) for how in (True, False))
    torch.manual_seed(0)
    a, b = data[0][0], data[0][0]
    assert a.shape == (3, SIZE, SIZE) and not torch.equal(a, b)
    torch.manual_seed(0)
    assert torch.equal(data[0][0], a) and torch.equal(still[0][0], still[0][0])


def test_w3_is_for_those_that_take_a_dataset():
    third = [name for name, which in measure.cases(measure.PEERS) if which == "W3"]
    assert third == ["ours", measure.REFERENCE, "Flower", "NVFlare"]
    assert len(measure.cases(measure.PEERS)) == 2 * len(measure.PEERS) + 4


def test_the_parts_of_a_round_send_and_average_what_it_is_made_of(
    tmp_path, monkeypatch
):
    # By its file: beside the tests there is a folder of the same name.
    path = ROOT / "tests/benchmarks/engines.py"
    spec = importlib.util.spec_from_file_location("engines", path)
    monkeypatch.setitem(sys.modules, "engines", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules["engines"])
    import bench_rounds

    work = bench_rounds.engines.Work(tmp_path, num_silos=3, rounds=1, size=32)
    payload = bytes(range(256)) * 5000  # more than one record of TLS
    seconds, arrived = bench_rounds.over_tls(payload, work.kits / "server/startup")
    assert arrived == payload and seconds > 0
    found = bench_rounds.parts(work)
    assert set(found) == {"training", "files", "TLS", "average"}
    assert all(seconds > 0 for seconds in found.values())
    models = sorted((tmp_path / "parts").iterdir())
    assert len(models) == 1 + 3  # the global one, and an update of each
