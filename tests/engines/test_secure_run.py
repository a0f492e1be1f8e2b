"""Secure runs of real processes: the sum's bits, and nothing else at the server."""

import contextlib
import json
from functools import partial

import psutil
import pytest
import torch

from fl_helpers import aggregation, exchange
from fl_helpers.cross_silo.fixed_point import ALL, SecureAverage, encode
from fl_helpers.cross_silo.on_premises import gate, site
from fl_helpers.cross_silo.on_premises.fleet import Fleet
from fl_helpers.cross_silo.on_premises.runs import RunError
from fl_helpers.cross_silo.run import Run
from fl_helpers.scaffold import zero_variates
from fl_helpers.simulation import Terms, run_rounds, silo_rng
from fl_helpers.training import ClientFunctions, norm_entries

from . import hospital
from .conftest import LIMITS, METRICS, write_trial

pytestmark = pytest.mark.engines
LIMIT = 120  # seconds that any run of these tests may take
SIZES = {"Hospital A": 40, "Hospital B": 24, "Hospital C": 32, "Hospital D": 28}
NAMES, TOTAL = list(SIZES), sum(SIZES.values())


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    return write_trial(tmp_path_factory.mktemp("trial"), SIZES)


@pytest.fixture(scope="module")
def silos(trial):
    return [hospital.load_silo(f) for f in sorted((trial.parent / "data").iterdir())]


@pytest.fixture(scope="module")
def fleet(trial, params, tmp_path_factory):
    with Fleet(trial, tmp_path_factory.mktemp("secure"), ready=180) as fleet:
        agree(fleet, params)
        yield fleet


@pytest.fixture
def slow(trial):
    """slow({1: 6}): Hospital D needs so many seconds more in that round."""
    path = trial.parent / "data" / "hospital_3" / "faults"
    yield lambda plan: path.write_text(
        "\n".join(f"{r} slow {seconds}" for r, seconds in plan.items())
    )
    path.unlink(missing_ok=True)


def agree(fleet, params, keep_local=()):
    for name in fleet.sites:
        how = {"keep_local": keep_local, "metrics": METRICS, "secure": True}
        gate.allow(fleet.kits / name, params, **how)


def new_run(name, params, **options):
    basis = dict(rounds=3, seed=7, quorum=3, deadline=60, limits=LIMITS, secure=True)
    return Run(name=name, params=params, **basis | options)


def play(fleet, run):
    return list(fleet.run(run, timeout=LIMIT))


def of(events, kind):
    return [event for event in events if event["event"] == kind]


def simulate(run, silos, settings=None, rule=aggregation.weighted_average):
    """The same run in one process: the same integers, without masks."""
    both = ClientFunctions(*hospital.functions(settings or {}))
    return run_rounds(
        run.params, silos, both, SecureAverage(rule, run.shared, total=TOTAL),
        rounds=run.rounds, seed=run.seed, terms=Terms(keep_local=run.keep_local),
    )  # fmt: skip


def assert_same_bits(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].equal(value), name


def kill(fleet, who, *roles):
    """Kill a participant's processes whose command line names one of the roles."""
    for process in fleet.own_processes():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if str(fleet.kits / who) in line and any(role in line for role in roles):
                process.kill()


def out_of(fleet, silo, round_index=None):
    lines = [e for e in fleet.ledger(silo) if e["direction"] == "out"]
    return [e for e in lines if round_index in (None, e["round"])]


def lines_of(fleet, silo):
    """Of its ledger; none before its first run."""
    path = fleet.kits / site.site_name(silo) / "ledger.jsonl"
    return exchange.read_ledger(path)[0] if path.exists() else []


def test_a_secure_run_has_the_bits_of_the_simulated_one(fleet, params, silos):
    run = new_run("fedavg", params)
    events = play(fleet, run)
    expected = simulate(run, silos)
    assert_same_bits(fleet.result(run), expected.params)
    plain = run_rounds(
        params, silos, ClientFunctions(*hospital.functions({})),
        aggregation.weighted_average, rounds=3, seed=7,
    )  # fmt: skip
    for name, value in plain.params.items():
        # One round: 4 silos, half a step each, 4.8e-7; training carries that on.
        if value.is_floating_point():
            assert (fleet.result(run)[name] - value).abs().max() < 1e-4, name
    ends = of(events, "round_end")
    assert [e["silos"] for e in ends] == [NAMES] * 3
    for end, record in zip(ends, expected.rounds, strict=True):
        losses = [record["train"][silo]["train_loss"] for silo in NAMES]
        # A metric is off by half of 2^-32 per silo.
        mean = pytest.approx(sum(losses) / 4, abs=1e-9)
        assert end["train"][ALL]["train_loss"] == mean
    tested = {e["rounds"]: e["test"][ALL] for e in of(events, "tested")}
    losses = [expected.rounds[2]["test"][silo]["loss"] for silo in NAMES]
    assert tested[3]["loss"] == pytest.approx(sum(losses) / 4, abs=1e-9)


def test_both_ledgers_show_masked_integers_and_nothing_else(fleet, params):
    """Of the run before."""
    here = out_of(fleet, "Hospital A")
    what = {e["what"] for e in here}
    masked = {"masked_weights", "masked_numbers"}
    assert what == masked | {"hello", "mask", "num_examples", "attempt"}
    server = exchange.read_ledger(fleet.kits / "server/runs/fedavg/ledger.jsonl")[0]
    came = {e["sha256"] for e in server if e["what"] in masked}
    sent = {e["sha256"] for n in NAMES for e in out_of(fleet, n) if e["what"] in masked}
    assert came == sent and len(came) == 4 * (3 * 2 + 1 + 1)  # rounds, test, examples
    values = sum(value.numel() for value in params.values())
    sizes = {e["bytes"] for e in here if e["what"] == "masked_weights"}
    plain = sum(value.nbytes for value in params.values())
    assert sizes == {4 * values} and 4 * values <= plain  # its counter has 8 bytes


def test_nothing_of_a_plain_update_is_written_outside_its_hospital(
    fleet, silos, params
):
    """Of the run before: known bytes of each hospital's last update, in every file that
    there is."""
    update, _ = hospital.functions({})
    start = simulate(new_run("fedavg", params, rounds=2), silos).params
    known = {}
    for silo in silos:
        rng = silo_rng(7, silo.name, 2)
        done = update(start, silo, round_index=2, rng=rng)
        plain = encode(done, start, total=TOTAL, metrics=())
        assert plain.weights[:8].tobytes() not in known.values()
        pieces = [value.numpy().tobytes()[:24] for value in done.params.values()]
        known[silo.name] = [p for p in pieces if len(p) == 24] + [
            plain.weights.tobytes()[at : at + 24] for at in (0, 400, 800)
        ]
    # The search finds what is there: the last round's encoding, kept until the next.
    found = {silo: set() for silo in known}
    for path in fleet.folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            for silo, pieces in known.items():
                if any(piece in content for piece in pieces):
                    found[silo].add(path.relative_to(fleet.kits).parts[0])
    assert found == {silo: {silo.replace(" ", "-")} for silo in known}


def test_scaffold_with_a_killed_worker(fleet, silos, params):
    start = params | zero_variates(hospital.new_model())
    own = [name for name in start if name.startswith("own_variate.")]
    settings = {"scaffold": 1}
    run = new_run("scaffold", start, keep_local=own, settings=settings, quorum=4)
    agree(fleet, start, keep_local=own)
    try:
        for event in fleet.run(run, timeout=LIMIT):
            if event["event"] == "round_end" and event["round"] == 0:
                kill(fleet, "Hospital-B", "worker_process")
    finally:
        agree(fleet, params)
    assert_same_bits(fleet.result(run), simulate(run, silos, settings).params)


def test_fedprox_and_fedadam_through_a_server_crash_with_local_layers(
    fleet, silos, params
):
    """FedBN's layers stay. The server dies after a round; the run goes on to the same
    bits, from what it and the hospitals had written."""
    own = norm_entries(hospital.new_model())
    trainable = [name for name, _ in hospital.new_model().named_parameters()]
    settings = {"mu": 0.1}
    run = new_run(
        "fedadam", params, rounds=4, aggregate="FedAdam", options={"lr": 0.02},
        trainable=trainable, settings=settings, keep_local=own, quorum=4,
    )  # fmt: skip
    agree(fleet, params, keep_local=own)
    try:
        with pytest.raises(RunError, match="server ended with code -9\nlast lines of"):
            for event in fleet.run(run, timeout=LIMIT):
                if event["event"] == "update" and event["round"] == 2:
                    kill(fleet, "server", "runner_process", "server_train")
                    fleet.processes["server"].wait(10)
        fleet.start_process("server")
        fleet.wait_ready()
        events = play(fleet, run)
    finally:
        agree(fleet, params)
    assert of(events, "start")[0]["round"] == 2
    rule = run.make_rule(run.shared)
    assert_same_bits(fleet.result(run), simulate(run, silos, settings, rule).params)


def test_a_late_hospital_costs_one_more_upload_and_no_training(
    fleet, silos, params, slow
):
    slow({1: 8})
    how = {"rounds": 3, "seed": 8, "deadline": 4, "evaluate": False}
    run = new_run("late", params, **how)
    before = len(lines_of(fleet, "Hospital A"))
    events = play(fleet, run)
    assert [e["silos"] for e in of(events, "asked_again")] == [NAMES[:3]]
    ends = of(events, "round_end")
    assert ends[0]["silos"] == NAMES and ends[1]["silos"] == NAMES[:3]
    assert ends[1]["missing"] == ["Hospital D"]
    # A model that comes in is trained on: once per round, though two sets were asked.
    lines = lines_of(fleet, "Hospital A")[before:]
    name = next(iter(params))
    models = [e["round"] for e in lines if e["what"] == name]
    sent = [e["round"] for e in lines if e["what"] == "masked_weights"]
    assert models == [0, 1, 2] and sent == [0, 1, 1, 2]
    # By hand: from round 1, A, B and C with the total of all four.
    update, _ = hospital.functions({})
    rule = SecureAverage(aggregation.weighted_average, params, total=TOTAL)
    for end in ends:
        present = [silo for silo in silos if silo.name in end["silos"]]
        train = partial(update, rule.params, round_index=end["round"])
        rule([train(s, rng=silo_rng(8, s.name, end["round"])) for s in present])
    assert_same_bits(fleet.result(run), rule.params)


def test_a_plain_run_gets_nothing_from_hospitals_that_agreed_to_secure_ones(
    fleet, params
):
    with pytest.raises(RunError, match="TASK_RESULT_FILTER_ERROR"):
        play(fleet, new_run("plain", params, secure=False))
    said = [
        e["reason"] for e in fleet.ledger("Hospital A") if e["verdict"] == "refused"
    ]
    assert said == ["this hospital takes part in secure runs only"]


def test_a_hospital_that_nobody_confirmed_ends_the_run_before_it_begins(fleet, params):
    path = fleet.kits / "Hospital-A" / "local" / "peers.json"
    before = json.loads(path.read_text())
    fewer = {k: v for k, v in before["confirmed"].items() if k != "Hospital D"}
    site.confirm(fleet.kits / "Hospital-A", fewer)
    try:
        with pytest.raises(RunError, match="'Hospital A'.* did not answer.*SUM_DENIED"):
            play(fleet, new_run("stranger", params))
    finally:
        site.confirm(fleet.kits / "Hospital-A", before["confirmed"])
    log = (fleet.logs / "Hospital-A.log").read_text()
    assert "certificate of 'Hospital D' is not confirmed here" in log


def test_an_update_that_goes_too_far_stays_in_its_hospital(fleet, params):
    """The norm limit of the run, and one of the hospital's own."""
    far = LIMITS.__class__(max_norm=1e-6, metrics=LIMITS.metrics)
    with pytest.raises(RunError, match="TASK_RESULT_FILTER_ERROR"):
        play(fleet, new_run("far", params, limits=far))
    kit, how = fleet.kits / "Hospital-D", {"metrics": METRICS, "secure": True}
    gate.allow(kit, params, max_norm=1e-6, **how)
    try:
        how_far = {"rounds": 1, "seed": 9, "evaluate": False}
        events = play(fleet, new_run("own_limit", params, **how_far))
    finally:
        gate.allow(kit, params, **how)
    assert of(events, "round_end")[0]["silos"] == NAMES[:3]
    said = [
        e["reason"] for e in fleet.ledger("Hospital D") if e["verdict"] == "refused"
    ]
    assert "the limit is 1e-06" in said[-1]


def test_torch_is_held_to_one_thread():
    assert torch.get_num_threads() == 1
