"""The plan of a run on Azure ML: its jobs, and the folders that each reads and writes.

Plain values, made by `pipeline.build_pipeline` of a run, a federation and the code.
There is exactly one plan for these; what the SDK would send must be equal to it
(`wire.check_job`), so that nothing has to be judged:

- a silo's job reads its own store, and `fl/models` of the orchestrator's;
- it writes below `fl/` of its own store, what it books below its account there, and the
  released outputs below `fl/updates/<its key>/` of its outbox;
- an orchestrator's job reads and writes the orchestrator's stores, but writes nothing
  below `fl/updates/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fl_helpers.cross_silo.azure_ml import start
from fl_helpers.cross_silo.federation import Federation, Party
from fl_helpers.cross_silo.run import Run


@dataclass(frozen=True)
class Part:
    """A part of a run as a graph of its own; by default it is the whole run.

    name: of the graph, a new one each time: jobs write where nothing is yet; "" is the
    run's. start: (name, rounds done) of the graph that left the model; None starts from
    the run's. rounds: how many are done after it; None is all of the run's. silos: the
    names of those that take part; None is all. kept: {silo: (name, rounds done)} of
    silos that kept their own entries elsewhere, as they missed the last rounds. final:
    the silos test the model that it ends with, if the run says that they test.
    """

    name: str = ""
    start: tuple[str, int] | None = None
    rounds: int | None = None
    silos: frozenset[str] | None = None
    kept: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    final: bool = True


@dataclass(frozen=True)
class Flow:
    """A folder that a job reads or writes, by the name of its input or output.

    store: "" for a data asset, whose name and version are the path. mode: how it is
    mounted. producer, output: the job of this plan that a read waits for; "" if the
    folder is there before.
    """

    name: str
    store: str
    path: str
    mode: str
    producer: str = ""
    output: str = ""

    @property
    def uri(self) -> str:
        """As Azure ML names it."""
        return (
            f"azureml://datastores/{self.store}/paths/{self.path}"
            if self.store
            else self.path
        )


@dataclass(frozen=True)
class Job:
    """One job. kind: its script. literals: its inputs that are values."""

    name: str
    kind: str
    party: Party
    command: str
    literals: dict[str, int | str]
    reads: tuple[Flow, ...]
    writes: tuple[Flow, ...]

    @property
    def code(self) -> str:
        """Whose snapshot it runs: "silo" or "orchestrator"."""
        return "silo" if self.kind in start.SCRIPTS["silo"] else "orchestrator"


@dataclass(frozen=True)
class Plan:
    """A run, or a part of it, as jobs in an order in which they can run.

    outputs: what the whole graph makes, {name: the flow that writes it}. code: folders
    of the snapshots, by `Job.code`; codes: their digests. digest: of all that is
    agreed, the same for each part of a run; it is what the parties sign.
    """

    run: Run
    federation: Federation
    part: Part
    jobs: tuple[Job, ...]
    outputs: Mapping[str, Flow]
    code: Mapping[str, Path]
    codes: Mapping[str, str]
    digest: str

    @property
    def name(self) -> str:
        """Of the graph: no other one has it."""
        return self.part.name or self.run.name

    @property
    def silos(self) -> tuple[Party, ...]:
        """Those that take part, in the order of their names."""
        some = self.federation.only(self.part.silos) if self.part.silos else None
        return tuple(s.azure_ml for s in (some or self.federation).silos)


@dataclass(frozen=True)
class Violation:
    """Where something is not as the plan says, what is there, and what should be."""

    job: str
    where: str
    found: str
    legal: str

    def __str__(self) -> str:
        return f"{self.job}: {self.where} is {self.found}, the plan says {self.legal}"


class PlanRefused(ValueError):
    """Something that is not the plan, and must not run; `violations` has all of it."""

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = tuple(violations)
        count = len(self.violations)
        lines = ["this is not the plan; send the plan itself, or sign another one:"]
        lines += map(str, self.violations[:20])
        lines += [f"and {count - 20} more (.violations)"] if count > 20 else []
        super().__init__("\n- ".join(lines))


def place(kind: str, name: str, step: str | int, key: str = "") -> str:
    """The folder in a party's store for something that the graph `name` makes.

    kind: in the orchestrator's store "models" (silos may read them), "updates" (of silo
    `key`), "memory" and "reports"; in a silo's "kept", "private", and "prepared".
    step: the round, or its number of rounds done, or a name.
    """
    step = f"{step:04d}" if isinstance(step, int) else step
    return "/".join(["fl", kind, *([key] if key else []), name, step])
