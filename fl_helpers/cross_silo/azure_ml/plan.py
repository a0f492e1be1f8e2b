"""Reads the plan of a run, and refuses every flow of data that is not allowed.

The plan is what would be sent: `job._to_dict()`, or the file that `job.dump` wrote. It
is read without the SDK and fail-closed: what this file does not know is refused. Who
may do what, and `check_plan` has the other rules:

- a silo's job reads its own store, and `fl/models` of the orchestrator's, made there;
- it writes below `fl/` of its own store, and what is on the list of released outputs
  below `fl/updates/<its key>/` of its outbox;
- an orchestrator's job reads and writes the orchestrator's stores, but writes nothing
  below `fl/updates/`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fl_helpers.cross_silo.azure_ml.federation import (
    MODELS,
    PATH,
    UPDATES,
    Federation,
    Party,
)

KNOWN = {  # keys that a plan may have; what stands at any other must be empty
    "plan": "$schema type name display_name experiment_name description tags settings "
    "outputs jobs",
    "settings": "force_rerun continue_on_step_failure",
    "job": "type name display_name component compute resources inputs outputs",
    "resources": "instance_type instance_count",
    "component": "$schema type name version display_name description tags command code "
    "environment is_deterministic inputs outputs",
    "port": "type mode description",
    "binding": "path type mode",
}
EMPTY = (None, "", {}, [], False, "False")
BINDING = re.compile(r"\$\{\{parent\.(?:jobs\.(\w+)\.)?outputs\.(\w+)\}\}")
URI = re.compile(rf"azureml://datastores/([A-Za-z0-9_]+)/paths/({PATH})/?", re.ASCII)
SLOT = re.compile(r"\$\{\{(inputs|outputs)\.(\w+)\}\}")
PLAIN = re.compile(r"[\w.,:@%+=/-]*", re.ASCII)  # nothing that a shell interprets
COMMAND = re.compile(r"python (\w+)\.py(?: .*)?", re.DOTALL)
TYPES = {
    "string": PLAIN.pattern,
    "integer": r"-?\d{1,18}",
    "number": r"-?\d+(\.\d*)?([eE][+-]?\d+)?",
    "boolean": r"[Tt]rue|[Ff]alse|0|1",  # azure-ai-ml writes 1 and 0
}
READ_MODES, WRITE_MODES = ("ro_mount", "download"), ("rw_mount", "upload")


@dataclass(frozen=True)
class Flow:
    """A folder that a job reads or writes, by the name of its input or output.

    store: "" if it is not in a datastore; then path is what the plan says instead.
    producer, output: the job and output of this plan that a read waits for; "" if the
    folder is there before the plan starts.
    """

    name: str
    store: str
    path: str
    producer: str = ""
    output: str = ""


@dataclass(frozen=True)
class Job:
    """One job. kind: its script. literals: its inputs that are values, as texts."""

    name: str
    kind: str
    compute: str
    command: str
    code: str
    environment: str
    literals: dict[str, str]
    reads: tuple[Flow, ...]
    writes: tuple[Flow, ...]


@dataclass(frozen=True)
class Violation:
    """A rule that a job breaks, and what to do about it."""

    job: str
    rule: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.job}: {self.rule}; {self.remedy}"


@dataclass(frozen=True)
class Plan:
    """Jobs in an order in which they can run, and what is wrong with their form."""

    jobs: tuple[Job, ...]
    problems: tuple[Violation, ...] = ()


class PlanRefused(ValueError):
    """A plan that must not run; `violations` has all the reasons."""

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = tuple(violations)
        count = len(self.violations)
        lines = ["the plan is refused:", *map(str, self.violations[:20])]
        lines += [f"and {count - 20} more (.violations)"] if count > 20 else []
        super().__init__("\n- ".join(lines))


def read_plan(source: Mapping[str, Any] | str | Path) -> Plan:
    """Read a plan: `job._to_dict()`, or the path of the file that `job.dump` wrote.

    What is wrong with its form is kept in `problems`, for `check_plan` to refuse.
    Raises PlanRefused if there is no telling what the jobs are.
    """
    if not isinstance(source, Mapping):
        source = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
    return _Reader(source).plan()


def digest(folder: str | Path) -> str:
    """SHA-256 over the names and contents of the files in a code snapshot."""
    found, folder = hashlib.sha256(), Path(folder)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        found.update(f"{len(name)} {name} {len(content)} ".encode() + content)
    return found.hexdigest()


@dataclass
class _Reader:
    """Follows the bindings between jobs, and collects what is wrong on the way."""

    source: Any
    problems: list[Violation] = field(default_factory=list)

    def plan(self) -> Plan:
        jobs = self.source.get("jobs") if isinstance(self.source, Mapping) else None
        if not isinstance(jobs, Mapping) or not jobs:
            nothing = Violation("the plan", "it has no jobs", "pass job._to_dict()")
            raise PlanRefused([nothing])
        self.only("plan", "the plan", self.source)
        settings = self.only("settings", "the plan", self.source.get("settings"))
        self.runs_anew = settings.get("force_rerun") is True
        self.promoted = self.mapping("the plan", self.source.get("outputs"))
        for key, value in self.promoted.items():
            self.check_folder("the plan", key, WRITE_MODES, value)
        if self.source.get("type", "pipeline") != "pipeline":
            self.say("the plan", "it is not a pipeline", "build the plan anew")
        self.jobs = {name: self.only("job", name, job) for name, job in jobs.items()}
        read = [self.job(name, job) for name, job in self.jobs.items()]
        return Plan(tuple(self.in_order(read)), tuple(self.problems))

    def say(self, job: str, rule: str, remedy: str) -> None:
        self.problems.append(Violation(job, rule, remedy))

    def mapping(self, job: str, found: Any) -> Mapping[str, Any]:
        if found is None or isinstance(found, Mapping):
            return found or {}
        self.say(job, f"{str(found)[:60]!r} must be a mapping", "build the plan anew")
        return {}

    def only(self, what: str, job: str, found: Any) -> Mapping[str, Any]:
        """A mapping; keys that are not known are a problem."""
        found, known = self.mapping(job, found), KNOWN[what].split()
        extra = [k for k, v in found.items() if k not in known and v not in EMPTY]
        if extra:
            rule = (
                f"the {what} says {sorted(map(str, extra))[:5]}, which is not checked"
            )
            self.say(job, rule, f"leave it out; known are {known}")
        return found

    def job(self, name: str, job: Mapping[str, Any]) -> Job:
        component = self.only("component", name, job.get("component"))
        inputs = self.mapping(name, component.get("inputs"))
        outputs = self.mapping(name, component.get("outputs"))
        given = self.mapping(name, job.get("inputs"))
        made = self.mapping(name, job.get("outputs"))
        for extra in sorted({*(given.keys() - inputs), *(made.keys() - outputs)}):
            self.say(name, f"its script does not know {extra!r}", "leave it out")
        self.check_code(name, job, component, {"inputs": inputs, "outputs": outputs})
        literals, reads = {}, []
        for key, port in inputs.items():
            kind = str(self.only("port", name, port).get("type"))
            if kind in TYPES:
                literals[key] = self.literal(name, key, kind, given.get(key))
            else:
                self.check_folder(name, key, READ_MODES, port, given.get(key))
                reads.append(self.read(name, key, given.get(key)))
        for key, port in outputs.items():
            self.only("port", name, port)
            self.check_folder(name, key, WRITE_MODES, port, made.get(key))
        command = str(component.get("command"))
        return Job(
            name,
            kind=COMMAND.sub(r"\1", command),
            compute=str(job.get("compute")).removeprefix("azureml:"),
            command=command,
            code=str(component.get("code")),
            environment=_environment(component.get("environment")),
            literals=literals,
            reads=tuple(reads),
            writes=tuple(Flow(key, *self.target(name, key)) for key in outputs),
        )

    def check_code(
        self, name: str, job: Mapping[str, Any], component: Any, ports: Any
    ) -> None:
        """What runs, in what, on how many machines."""
        command, code = str(component.get("command")), str(component.get("code"))
        if job.get("type") != "command" or component.get("type") != "command":
            self.say(name, "it is not a command", "use command jobs only")
        plain = all(PLAIN.fullmatch(SLOT.sub("", word)) for word in command.split(" "))
        if not plain or not COMMAND.fullmatch(command):
            rule = "its command is not `python script.py` and plain words"
            self.say(name, rule, "leave out quotes, pipes and whatever a shell reads")
        for kind, key in SLOT.findall(command):
            if key not in ports[kind]:
                self.say(name, f"its command names {kind}.{key}", "declare it")
        if not Path(code).is_absolute():
            rule = f"its code is {code[:60]!r}, not a folder of this machine"
            self.say(name, rule, "build the plan anew: submitting changes it")
        if not _environment(component.get("environment")):
            rule = "its environment is not pinned"
            self.say(name, rule, "name an image with its tag, or azureml:name:version")
        if not self.runs_anew and component.get("is_deterministic") not in EMPTY[1:]:
            rule = "an old result could be taken instead of running it"
            self.say(name, rule, "set force_rerun in the plan's settings")
        resources = self.only("resources", name, job.get("resources"))
        if resources.get("instance_count", 1) not in (None, 1, "1"):
            self.say(name, "it asks for several machines", "one job, one machine")

    def literal(self, name: str, key: str, kind: str, value: Any) -> str:
        plain = isinstance(value, str | int | float)
        if not plain or not re.fullmatch(TYPES[kind], str(value), re.ASCII):
            rule = f"{key} is {str(value)[:60]!r}, not a {kind}"
            self.say(name, rule, "a text has letters, digits and .,:@%+=/_- only")
        return str(value)

    def check_folder(
        self, name: str, key: str, modes: Collection[str], *says: Any
    ) -> None:
        """A folder's declaration and binding: its type, and how it is mounted."""
        for found in says:
            if isinstance(found, str):
                continue
            found = self.only("binding", name, found)
            if (found.get("type") or "uri_folder") != "uri_folder":
                self.say(name, f"{key} is a {found['type']}", "use uri_folder")
            if (found.get("mode") or modes[0]) not in modes:
                self.say(name, f"{key} has the mode {found['mode']}", f"use {modes}")

    def read(self, name: str, key: str, value: Any) -> Flow:
        path = _path(value)
        bound = BINDING.fullmatch(path)
        if bound and bound[1]:
            return Flow(key, *self.target(bound[1], bound[2]), bound[1], bound[2])
        return Flow(key, *_place(path))

    def target(self, job: str, output: str) -> tuple[str, str]:
        """(datastore, path) of a job's output, maybe one that the plan promotes."""
        made = self.jobs.get(job, {}).get("outputs")
        path = _path(made.get(output) if isinstance(made, Mapping) else None)
        bound = BINDING.fullmatch(path)
        if bound and not bound[1]:
            path = _path(self.promoted.get(bound[2]))
        return _place(path)

    def in_order(self, jobs: list[Job]) -> Iterator[Job]:
        left, done = jobs, {""}
        while left:
            ready = [job for job in left if {f.producer for f in job.reads} <= done]
            if not ready:
                for job in left:
                    rule = "it waits for itself, or for a job that is not there"
                    self.say(job.name, rule, "build the plan anew")
                ready = left
            yield from ready
            done |= {job.name for job in ready}
            left = [job for job in left if job.name not in done]


def _path(value: Any) -> str:
    """What an input or output is bound to, as the plan says it."""
    path = value.get("path") if isinstance(value, Mapping) else value
    return "nothing" if path in EMPTY else str(path)


def _place(text: str) -> tuple[str, str]:
    """(datastore, path), or ("", text) if it is not the short URI of a datastore."""
    found = URI.fullmatch(text)
    plain = found and not {".", ".."} & set(found[2].split("/"))
    return (found[1], found[2]) if plain else ("", text)


def _environment(found: Any) -> str:
    """What a job runs in if it is pinned: an image's tag and packages, or a version."""
    if not isinstance(found, Mapping):
        form, text = r"azureml:[\w./-]+(:|/versions/)[\w.-]+", str(found)
    elif found.keys() <= {"name", "version", "image", "conda_file"}:
        form, text = r"[\w./-]+(:[\w.-]+|@sha256:[0-9a-f]{64})", str(found.get("image"))
    else:
        return ""
    if not re.fullmatch(form, text) or "latest" in text:
        return ""
    conda = found.get("conda_file") if isinstance(found, Mapping) else None
    if conda is None:
        return text
    packages = hashlib.sha256(json.dumps(conda, sort_keys=True, default=str).encode())
    return f"{text} with packages {packages.hexdigest()}" if _is_pinned(conda) else ""


def _is_pinned(conda: Any) -> bool:
    """Whether a conda file names the version of each of its packages."""
    listed = conda.get("dependencies") if isinstance(conda, Mapping) else None
    if not isinstance(listed, list) or not listed:
        return False
    for item in listed:
        pip = item.get("pip") if isinstance(item, Mapping) else [item]
        exact = "=" if pip == [item] else "=="
        if not isinstance(pip, list) or not all(
            isinstance(line, str)
            and (exact in line or line.startswith("--extra-index"))
            for line in pip
        ):
            return False
    return True


def check_plan(
    plan: Plan, federation: Federation, *, allow: Collection[str] = ()
) -> None:
    """Refuse a plan with a flow of data that is not allowed.

    Beside the rules above: a compute and a datastore belong to one party; exactly one
    update per silo and round reaches the aggregation; no two jobs write the same place,
    and none reads by its path what another one of the plan writes; the numbers that
    leave are on the allow-list. allow: inputs in no datastore that may be read, such as
    "azureml:scanners:1". Raises PlanRefused with all violations at once.
    """
    found = list(plan.problems)
    makers = {job.name: federation.owner(compute=job.compute) for job in plan.jobs}
    for job in plan.jobs:
        party = makers[job.name]
        if party is None:
            rule = f"its compute {job.compute!r} belongs to nobody"
            found.append(Violation(job.name, rule, "use one of silos.yaml"))
            continue
        for flow in job.reads:
            if flow.store or flow.path not in allow:
                maker = makers.get(flow.producer) if flow.producer else None
                found += _check_read(job, flow, party, maker, federation)
        for flow in job.writes:
            found += _check_write(job, flow, party, federation)
        if party is federation.orchestrator:
            found += _check_gather(job, federation)
        else:
            found += _check_silo(job, party, federation)
    found += [*_check_places(plan), *_check_released(plan)]
    if found:
        raise PlanRefused(found)


def _check_read(
    job: Job, flow: Flow, party: Party, maker: Party | None, federation: Federation
) -> Iterator[Violation]:
    """maker: who makes it in this plan; None if it is there before."""
    owner, main = federation.owner(datastore=flow.store), federation.orchestrator
    if not flow.store:
        rule = f"{flow.name} is {flow.path[:80]!r}, not a folder of a datastore"
        remedy = "no local path (it would be uploaded), URL or asset; use "
        remedy += "azureml://datastores/<own store>/paths/<folder>"
        yield Violation(job.name, rule, remedy)
    elif owner is None:
        rule = f"{flow.name} is in {flow.store!r}, which belongs to nobody"
        yield Violation(job.name, rule, "use a datastore of silos.yaml")
    elif owner not in (party, main):
        rule = f"{party.name!r} reads {flow.name} from the store of {owner.name!r}"
        remedy = "each reads its own store, silos also the orchestrator's models"
        yield Violation(job.name, rule, remedy)
    elif party is not main and maker not in (None, owner):
        rule = f"{flow.name} was made by {maker.name!r}, not by {owner.name!r}"
        yield Violation(job.name, rule, "read what the owner of the store made")
    elif owner is not party and not (
        flow.store == main.datastore and flow.path.startswith(f"{MODELS}/")
    ):
        rule = (
            f"{party.name!r} reads {flow.path!r} of the orchestrator's {flow.store!r}"
        )
        remedy = f"silos read only {MODELS}/ of {main.datastore!r}"
        yield Violation(job.name, rule, remedy)


def _check_write(
    job: Job, flow: Flow, party: Party, federation: Federation
) -> Iterator[Violation]:
    owner, main = federation.owner(datastore=flow.store), federation.orchestrator
    rule = f"{flow.name} goes from {party.name!r} to {flow.path!r} of {flow.store!r}"
    released = f"{UPDATES}/{party.key}/"
    if not flow.store:
        rule = f"{flow.name} goes to {flow.path[:80]!r}; maybe to the workspace's store"
        remedy = "give it azureml://datastores/<store>/paths/<folder>"
        yield Violation(job.name, rule, remedy)
    elif owner is None:
        rule += ", which belongs to nobody"
        yield Violation(job.name, rule, "use a datastore of silos.yaml")
    elif owner is party:
        own = flow.path.startswith("fl/") and not (
            party is main and flow.path.startswith(f"{UPDATES}/")
        )
        if not own:
            remedy = f"a run writes below fl/, and only silos below {UPDATES}/"
            yield Violation(job.name, rule, remedy)
    elif owner is not main:
        rule += f", a store of {owner.name!r}"
        yield Violation(job.name, rule, "write to the own store")
    elif flow.name not in federation.released:
        rule += ", and may not leave"
        remedy = f"write to the own store; released are {sorted(federation.released)}"
        yield Violation(job.name, rule, remedy)
    elif flow.store != party.outbox or not flow.path.startswith(released):
        remedy = f"use {released} of its outbox {party.outbox!r}"
        yield Violation(job.name, rule, remedy)


def _check_silo(job: Job, party: Party, federation: Federation) -> Iterator[Violation]:
    """A silo's job says whose it is, which numbers leave, and how large a file."""
    said = job.literals.get("silo")
    if said != party.key:
        rule = f"it is told that it is silo {said!r}, and runs at {party.key!r}"
        yield Violation(job.name, rule, "run each silo's jobs on its own compute")
    if not any(flow.store == party.outbox for flow in job.writes):
        return
    if not {"metrics", "max_bytes"} <= job.literals.keys():
        rule = "it does not say which numbers leave, and how large a file"
        yield Violation(job.name, rule, "give it the inputs metrics and max_bytes")
    names = set(job.literals.get("metrics", "").split(",")) - {""}
    if extra := sorted(names - federation.metrics):
        rule = f"it lets the numbers {extra} out"
        remedy = f"on the allow-list are {sorted(federation.metrics)}"
        yield Violation(job.name, rule, remedy)


def _check_gather(job: Job, federation: Federation) -> Iterator[Violation]:
    """What reads updates, reads one of each silo, all of its own round."""
    updates = [flow for flow in job.reads if flow.path.startswith(f"{UPDATES}/")]
    if not updates and job.kind not in ("aggregate", "collect"):
        return
    parts = [flow.path.split("/")[2:] for flow in updates]
    silos = {silo.key: silo for silo in federation.silos}
    if sorted(part[0] for part in parts) != sorted(silos):
        rule = f"it gathers from {sorted(part[0] for part in parts)}"
        yield Violation(job.name, rule, f"once from each of {sorted(silos)}")
    step = "scores" if job.kind == "collect" else job.literals.get("round", "").zfill(4)
    for flow, (key, *rest) in zip(updates, parts, strict=True):
        outbox = silos[key].outbox if key in silos else ""
        if flow.name != f"update_{key}" or flow.store != outbox:
            rule = f"its input {flow.name} is the update of {key!r}"
            yield Violation(job.name, rule, "give each input its own silo's update")
        if rest[1:] != [step]:
            rule = f"{flow.name} is {flow.path!r}, not of its round, {step!r}"
            yield Violation(job.name, rule, "gather the updates of the same round")


def _check_places(plan: Plan) -> Iterator[Violation]:
    """No two writes meet, and no read meets a write that it does not wait for."""
    exact, inside = dict[str, str](), dict[str, str]()
    for job in plan.jobs:
        for flow in filter(_in_store, job.writes):
            name, folders = f"{job.name}.{flow.name}", _above(flow)
            other = inside.get(folders[-1]) or _first(exact, folders)
            if other:
                rule = f"{flow.name} writes where {other} does: {flow.path!r}"
                yield Violation(job.name, rule, "give each output its own folder")
            exact[folders[-1]] = name
            inside |= dict.fromkeys(folders, name)
    for job in plan.jobs:
        for flow in filter(_in_store, job.reads):
            folders = _above(flow)
            other = inside.get(folders[-1]) or _first(exact, folders)
            if other and not flow.producer:
                rule = f"{flow.name} reads what {other} writes, without waiting for it"
                yield Violation(job.name, rule, "bind the input to that output")


def _in_store(flow: Flow) -> bool:
    return bool(flow.store)


def _above(flow: Flow) -> list[str]:
    """A folder's place, and those of all that hold it, from the outside in."""
    parts = [flow.store, *flow.path.split("/")]
    return ["/".join(parts[:n]) for n in range(2, len(parts) + 1)]


def _first(found: Mapping[str, str], keys: Iterable[str]) -> str:
    return next((found[key] for key in keys if key in found), "")


def _check_released(plan: Plan) -> Iterator[Violation]:
    """What a silo releases in this plan reaches one job, not none and not two."""
    readers = [(f.producer, f.output) for job in plan.jobs for f in job.reads]
    for job in plan.jobs:
        for flow in job.writes:
            count = readers.count((job.name, flow.name))
            if flow.path.startswith(f"{UPDATES}/") and count != 1:
                rule = f"{flow.name} is read by {count} jobs"
                yield Violation(job.name, rule, "one job gathers each update, once")
