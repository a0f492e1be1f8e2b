"""Where a round of a real run spends its time: on your own machines, and Azure's graph.

    python tests/benchmarks/rounds.py   # docs/results/rounds.csv and its table, minutes

Real processes on this machine, as in `engines.py`; the graph by `run_locally`. They run
a copy of `fl_helpers` in which some functions also print when they began and ended.
What does not wait for anything is not counted: we follow the silo whose update came
last, and of jobs those that the round waited for. So the stages add up to the round.
"""

import ctypes
import json
import shutil
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import engines
import pandas as pd
import torch
from common import ROUNDS_WHERE, read_results, rounds_table
from machine import circumstances
from run import PAGE, fill

import fl_helpers
from fl_helpers import exchange
from fl_helpers.cross_silo import hospital
from fl_helpers.cross_silo.azure_ml import pipeline, run_locally, start
from fl_helpers.cross_silo.federation import read_federation
from fl_helpers.cross_silo.on_premises.fleet import Fleet
from fl_helpers.cross_silo.run import Run
from fl_helpers.models import small_cnn, torchvision_model

RESULTS = PAGE.parent / "results/rounds.csv"
# On premises, and of the graph; the first one is not used.
ROUNDS = {"small_cnn": (21, 4), "resnet18": (6, 3)}
SILOS = {"on premises": (1, 4), "Azure's graph, here": (2, 4)}  # a graph needs two
HOOK = """
import functools, json, os, time

def timed(owner, *names):
    for name in names:
        setattr(owner, name, wrapped(name, getattr(owner, name)))

def wrapped(name, function):
    @functools.wraps(function)
    def measured(*args, **kwargs):
        began = time.time()
        try:
            return function(*args, **kwargs)
        finally:
            say(name, began)
    return measured

def say(name, began):
    os.write(1, f"\\nTIMED {json.dumps([name, began, time.time()])}\\n".encode())
"""
MODULE, ENGINE = "sys.modules[__name__]", "cross_silo/on_premises"
TIMED = [  # file of fl_helpers, where its functions are, and which
    ("exchange.py", MODULE, "read_model", "write_model", "read_update", "write_update"),
    ("training.py", MODULE, "train_locally"),
    ("cross_silo/turn.py", MODULE, "load_client", "receive"),
    (f"{ENGINE}/controller.py", "RoundController", "_ask", "_read"),
    (f"{ENGINE}/record.py", "Record", "save"),
    (f"{ENGINE}/executor.py", "SiteExecutor", "execute"),
    (f"{ENGINE}/gate.py", "EgressGate", "process"),
]
LARGE = """
from fl_helpers.models import torchvision_model
import torchvision.models
def small_cnn(num_classes):
    return torchvision_model("{model}", num_classes, in_channels=1)
"""
START, TRAIN = "processes start, import torch", "training"
TO, BACK = "model on its way: waiting, transfer", "update on its way: waiting, transfer"
NOTICED, LOAD = "the controller notices the answer", "data and own code load"
SILO, SERVER = "silo: checks, hashes, ledger", "server: checks, hashes, ledger"
AGGREGATE, SAVE = "aggregation", "checkpoint, or the next model"
END, RUNNER, OTHER = "processes end", "runner: folders, fingerprints", "other"
STAGES = [TRAIN, START, LOAD, TO, SILO, BACK, SERVER, NOTICED, AGGREGATE, SAVE]
STAGES += [END, RUNNER, OTHER]


def hook(package, model):
    """Let a copy of `fl_helpers` say how long it takes, and train this model."""
    (package / "timed.py").write_text(HOOK)
    for name, owner, *functions in TIMED:
        if (package / name).exists():
            with (package / name).open("a") as file:
                file.write("\nimport sys\nfrom fl_helpers.timed import timed\n")
                file.write(f"timed({owner}, *{functions})\n")
    if model != "small_cnn":
        with (package / "cross_silo/hospital.py").open("a") as file:
            file.write(LARGE.format(model=model))


def spans(*logs):
    """What the copies have printed: (function, began, ended), in the order of time."""
    lines = [
        line for log in logs if log.exists() for line in log.open(errors="replace")
    ]
    found = [json.loads(line[6:]) for line in lines if line.startswith("TIMED ")]
    return sorted(found, key=lambda span: span[1])


def durations(began, cuts):
    """Seconds per stage, from (stage, when it was over) in the order of time."""
    found = dict.fromkeys(STAGES, 0.0)
    for stage, ended in cuts:
        assert ended > began - 0.001, (stage, cuts)
        found[stage] += ended - began
        began = ended
    return found


class HookedFleet(Fleet):
    def _link_code(self):
        code = self.folder / "code/fl_helpers"
        shutil.copytree(Path(fl_helpers.__file__).parent, code)
        hook(code, MODEL)


def on_premises(work, rounds):
    """Stages of each round but the first; what a run needs once."""
    ours, submitted = engines.Ours(work), None
    try:
        ours.start()
        submitted = time.time()
        events = list(ours.fleet.run(ours.job, timeout=engines.PATIENCE))
        final = ours.fleet.result(ours.job)
    finally:
        ours.stop()
    logs = ours.fleet.logs
    names = {site.silo: name for name, site in ours.fleet.sites.items()}
    server = spans(logs / "server.log")
    of = {silo: spans(logs / f"{name}.log") for silo, name in names.items()}
    ends = [e["time"] for e in events if e["event"] == "round_end"]

    def play(index):
        answers = [e for e in events if e["event"] == "update" and e["round"] == index]
        ask, save = nth(server, "_ask", index), nth(server, "save", index)
        read = [s for s in server if s[0] == "_read" and ask[0] < s[1] < ask[1]]
        read = max(read, key=lambda span: span[2])
        own = of[answers[-1]["silo"]]
        execute, model, train, gate = (
            nth(own, name, index)
            for name in ("execute", "receive", "train_locally", "process")
        )
        cuts = [(OTHER, ask[0]), (TO, execute[0]), (OTHER, model[0]), (SILO, model[1])]
        cuts += [
            (OTHER, train[0]),
            (TRAIN, train[1]),
            (OTHER, gate[0]),
            (SILO, gate[1]),
        ]
        cuts += [(BACK, read[1]), (SERVER, read[2]), (NOTICED, ask[1])]
        return cuts + [(AGGREGATE, save[0]), (SAVE, save[1]), (OTHER, ends[index])]

    found = [durations(ends[r - 1], play(r)) for r in range(1, rounds)]
    first = max(nth(own, "execute", 0)[0] for own in of.values())
    begun = next(e["time"] for e in events if e["event"] == "start")
    once = {"once a run: the server's process": begun - submitted}
    return final, found, once | {"once a run: the silos' processes": first - begun}


def nth(found, name, index):
    """When the call of a function began and ended."""
    return [span[1:] for span in found if span[0] == name][index]


class TimedRunner(run_locally._Runner):
    times = {}  # job: its start began, and was done; its end was seen, and was done

    def start(self, job):
        began = time.time()
        process = super().start(job)
        self.times[job.name] = [began, time.time()]
        return process

    def end(self, name, process, seconds):
        self.times[name].append(time.time())
        super().end(name, process, seconds)
        self.times[name].append(time.time())


def azure(work, rounds):
    """The same of the graph of jobs, on this machine."""
    fed = read_federation(Path(hospital.__file__).with_name("silos.yaml"))
    silos = fed.silos[: len(work.places)]
    silos = [
        replace(silo, azure_ml=replace(silo.azure_ml, name=f"silo {k:03d}"))
        for k, silo in enumerate(silos)
    ]
    silos = [replace(silo, name=silo.azure_ml.name) for silo in silos]
    fed, folder = replace(fed, silos=tuple(silos)), work.folder / "azure"
    how = dict(evaluate=False, settings=work.settings, **work.how)
    listed = start.write_files

    def with_clocks(code):  # before the list is made that the jobs look at
        hook(code / "fl_helpers", MODEL)
        with (code / "common.py").open("a") as file:
            file.write("\nimport time\nfrom fl_helpers.timed import say\n")
            file.write("say('imported', time.time())\n")
        return listed(code)

    start.write_files = with_clocks
    try:
        run = Run("latency", work.start, **how)
        graph = pipeline.build_pipeline(run, fed, folder)
    finally:
        start.write_files = listed
    TimedRunner.times.clear()
    places = {
        silo.name: place for silo, place in zip(fed.silos, work.places, strict=True)
    }
    result = run_locally.run(graph, folder, data=places, show=lambda line: None)
    times, jobs = TimedRunner.times, {job.name: job for job in graph.jobs}
    found = []
    for index in range(1, rounds):
        began, last = times[f"aggregate_{index - 1:04d}"][3], f"aggregate_{index:04d}"
        chain = [last]
        while (begun := times[chain[0]][0]) > began + 0.05:
            over = {name: t[3] for name, t in times.items() if t[3] <= begun}
            chain.insert(0, max(over, key=over.get))
        cuts = []
        for name in chain:
            written = [folder / "stores" / f.store / f.path for f in jobs[name].writes]
            logs = [folder / f"logs/{name}.log", *(p / "log.txt" for p in written)]
            cuts += of_job(times[name], spans(*logs))
        found.append(durations(began, cuts))
    first = times["initial"]
    final = exchange.read_model(result.model, work.start)
    return final, found, {"once a run: the job initial": first[3] - first[0]}


def of_job(times, found):
    """The cuts of one job."""
    aggregates = any(span[0] == "read_update" for span in found)
    check = SERVER if aggregates else SILO
    stages = dict(
        read_model=check, read_update=check, write_update=check, imported=START
    )
    stages |= dict(write_model=SAVE, train_locally=TRAIN, load_client=LOAD)
    cuts, between = [(RUNNER, times[1])], START
    for name, began, ended in found:
        if name not in stages:  # on premises it is
            continue
        cuts += [(between, began), (stages[name], ended)]
        between = AGGREGATE if aggregates and name.startswith("read") else OTHER
    return cuts + [(END, times[2]), (RUNNER, times[3])]


def prepare(model):
    """Let this process and the copies of `fl_helpers` train this model."""
    global MODEL
    MODEL = model
    make = small_cnn if model == "small_cnn" else partial(large, model)
    hospital.small_cnn = engines.small_cnn = make  # the copies' too, see `hook`
    engines.Fleet, run_locally._Runner = HookedFleet, TimedRunner


def measure(engine, model, silos):
    """Rows of the results: seconds of each stage, the mean over rounds."""
    prepare(model)
    play = azure if engine.startswith("Azure") else on_premises
    rounds = ROUNDS[model][play is azure]
    with tempfile.TemporaryDirectory(prefix="rounds_") as folder:
        work = engines.Work(Path(folder), silos, rounds)
        final, found, once = play(work, rounds)
    for name, value in work.end.items():
        assert torch.equal(final[name], value), name  # the run that was to be timed
    stages = pd.DataFrame(found).mean().to_dict()
    about = dict(engine=engine, model=model, silos=silos)
    about["megabytes"] = sum(value.nbytes for value in work.start.values()) / 1e6
    whole = {"a round": sum(stages.values())}
    return [
        about | dict(stage=stage, seconds=seconds, rounds=count)
        for part, count in ((whole | stages, len(found)), (once, 1))
        for stage, seconds in part.items()
    ]


def large(model, num_classes):
    return torchvision_model(model, num_classes, in_channels=1)


def main():
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans come to us
    torch.set_num_threads(1)  # as in the silos: for the same bits
    where, rows = circumstances(), []
    where = {key: where[key] for key in ROUNDS_WHERE}
    for model, engine in product(ROUNDS, SILOS):
        for silos in SILOS[engine]:
            rows += measure(engine, model, silos)
            print(pd.DataFrame(rows[-18:]).to_string(), flush=True)
    table = pd.DataFrame(rows).assign(**where)
    table.to_csv(RESULTS, index=False, float_format="%.4g")
    text = rounds_table(read_results(RESULTS)).removesuffix("\n")
    fill(text, RESULTS.name, "end of rounds")


if __name__ == "__main__":
    main()
