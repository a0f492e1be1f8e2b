"""A tiny federation: two unequal silos, two small models, and a run of it."""

import os
from dataclasses import fields
from types import SimpleNamespace

import groups
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

from fl_helpers.checkpoint import Checkpoint
from fl_helpers.simulation import Execution, Terms, run_rounds
from fl_helpers.training import ClientFunctions

# How fast examples are made depends on what else the machine does.
CALM = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("calm", deadline=None, suppress_health_check=CALM)
settings.load_profile("calm")
# Three processes test side by side. If the kernels that they start took all cores each,
# their threads would wait for one another: three notebooks at once took twice as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    told = "rewrite the seconds of each group of tests in docs/timings.md"
    parser.addoption("--write-times", action="store_true", help=told)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return groups.Scheduling(config, log)


def pytest_collection_modifyitems(items):
    items[:] = groups.slow_first(items)


def pytest_sessionfinish(session, exitstatus):
    """Fail when a group of tests takes a larger share of the time than it did."""
    config = session.config
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    some = config.option.keyword or config.option.markexpr
    everything = config.args_source is config.ArgsSource.TESTPATHS and not some
    if hasattr(config, "workerinput") or not everything:
        return
    reports = [r for all in reporter.stats.values() for r in all if hasattr(r, "when")]
    seconds = groups.summed(reports)
    if config.option.write_times:
        groups.write_times(seconds, groups.counted(reports))
    if exitstatus == 0 and groups.TIMES.exists():  # a test that failed may be short
        config.grown = groups.grown(seconds, groups.read_times())
    if getattr(config, "grown", ()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    for sentence in getattr(config, "grown", ()):
        terminalreporter.write_line(f"FAILED {sentence}", red=True)


@pytest.fixture(autouse=True)
def one_thread():
    """Fix the order of additions, and leave the other core to other work."""
    torch.set_num_threads(1)


@pytest.fixture
def silos():
    """Silo "a" with 40 rows and "b" with 24, two classes, [N, 1, 16, 16]."""
    rng = torch.Generator().manual_seed(0)

    def silo(name, n):
        x = torch.randn(n, 1, 16, 16, generator=rng)
        y = torch.arange(n) % 2
        x[y == 1] += 0.5
        return SimpleNamespace(name=name, train=(x, y), test=(x, y))

    return [silo("a", 40), silo("b", 24)]


def play(params, silos, client, aggregate, *, rounds, seed, evaluate=None, **options):
    """`run_rounds` with the fields of Terms and Execution as keywords, without a bar.

    checkpoint: a path. threads: whether a function draws only from its rng.
    """
    threads = options.pop("threads", False)
    if not isinstance(client, ClientFunctions):
        client = ClientFunctions(client, evaluate, draws_only_from_rng=threads)
    if options.get("checkpoint"):
        every = options.pop("checkpoint_every", 1)
        options["checkpoint"] = Checkpoint(options["checkpoint"], every)
    names = {field.name for field in fields(Terms)}
    terms = Terms(**{k: v for k, v in options.items() if k in names})
    here = {k: v for k, v in options.items() if k not in names}
    execution = Execution(**{"progress": False} | here)
    how = {"rounds": rounds, "seed": seed, "terms": terms, "execution": execution}
    return run_rounds(params, silos, client, aggregate, **how)


def linear_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 2))


def batchnorm_model():
    """Has floating buffers and an integer one, as real models do."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(196, 2)
    )
