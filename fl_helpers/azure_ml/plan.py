"""Reads the plan of a run, and refuses every data flow that is not allowed.

The plan is what would be sent: `job._to_dict()`, or the file that `job.dump` wrote. It
is read without the SDK and fail-closed: what this file does not know is refused. The
rules (`check_plan`):

| who | reads | writes |
|---|---|---|
| a silo's job | its own store; `fl/models` of the orchestrator's, made there | `fl/` of its own store; released outputs to `fl/updates/<its key>` of its outbox |
| an orchestrator's job | the orchestrator's stores | the same, but not below `fl/updates` |
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fl_helpers.azure_ml.federation import MODELS, PATH, UPDATES, Federation, Party

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
BINDING = re.compile(r"\$\{\{parent\.(?:jobs\.(\w+)\.)?outputs\.(\w+)\}\}")
URI = re.compile(rf"azureml://datastores/([A-Za-z0-9_]+)/paths/({PATH})/?", re.ASCII)
SLOT = re.compile(r"\$\{\{(inputs|outputs)\.(\w+)\}\}")
WORDS = re.compile(r"[\w .,:@%+=/-]*", re.ASCII)  # nothing that a shell interprets
TYPES = {
    "string": WORDS.pattern.replace(" ", ""),
    "integer": r"-?\d{1,18}",
    "number": r"-?\d+(\.\d*)?([eE][+-]?\d+)?",
    "boolean": r"(?i)true|false|0|1",
}
READ_ONLY, WRITE_ONLY = ("ro_mount", "download"), ("rw_mount", "upload")


@dataclass(frozen=True)
class Flow:
    """A folder that a job reads or writes, by the name of its input or output.

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
    """One job of a plan. kind: its script. literals: values that are not folders."""

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
        lines = [f"the plan is refused, for {len(self.violations)} reasons:"]
        super().__init__("\n  ".join([*lines, *map(str, self.violations)]))


def read_plan(source: Mapping[str, Any] | str | Path) -> Plan:
    """Read a plan: `job._to_dict()`, or the path of the file that `job.dump` wrote.

    What is wrong with its form is kept in `problems`, for `check_plan` to refuse. Raises
    PlanRefused if there is no telling what the jobs are.
    """
    if not isinstance(source, Mapping):
        source = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
    return _Reader(source).plan()


@dataclass
class _Reader:
    """Resolves the bindings between jobs, and collects what is wrong on the way."""

    source: Any
    problems: list[Violation] = field(default_factory=list)

    def plan(self) -> Plan:
        jobs = self.source.get("jobs") if isinstance(self.source, Mapping) else None
        if not isinstance(jobs, Mapping) or not jobs:
            no_jobs = Violation("the plan", "it has no jobs", "pass job._to_dict()")
            raise PlanRefused([no_jobs])
        self.only("plan", "the plan", self.source)
        self.only("settings", "the plan", self.source.get("settings") or {})
        self.jobs = {str(name): self.mapping(name, job) for name, job in jobs.items()}
        read = [self.job(name, job) for name, job in self.jobs.items()]
        return Plan(tuple(self.in_order(read)), tuple(self.problems))

    def say(self, job: str, rule: str, remedy: str) -> None:
        self.problems.append(Violation(job, rule, remedy))

    def only(self, what: str, job: str, found: Any) -> Mapping[str, Any]:
        """The mapping, if it has no keys but those that are known."""
        found = self.mapping(job, found)
        known = KNOWN[what].split()
        empty = (None, "", {}, [], False, "False")
        extra = [k for k, v in found.items() if k not in known and v not in empty]
        if extra:
            self.say(
                job,
                f"the {what} has {sorted(map(str, extra))[:5]}, which nothing here checks",
                f"leave them out; known are {known}",
            )
        return found

    def mapping(self, job: str, found: Any) -> Mapping[str, Any]:
        if isinstance(found, Mapping):
            return found
        self.say(job, f"{str(found)[:60]!r} should be a mapping", "build the plan anew")
        return {}

    def job(self, name: str, job: Mapping[str, Any]) -> Job:
        self.only("job", name, job)
        self.only("resources", name, job.get("resources") or {})
        component = self.only("component", name, job.get("component"))
        if job.get("type") != "command" or component.get("type") != "command":
            self.say(name, "it is not a command", "use command jobs only")
        command, code = str(component.get("command")), str(component.get("code"))
        self.check_code(name, job, component, command, code)
        inputs = self.mapping(name, component.get("inputs") or {})
        outputs = self.mapping(name, component.get("outputs") or {})
        given = self.mapping(name, job.get("inputs") or {})
        made = self.mapping(name, job.get("outputs") or {})
        for extra in sorted({*(given.keys() - inputs), *(made.keys() - outputs)}):
            self.say(name, f"its script does not know {extra!r}", "leave it out")
        literals, reads = {}, []
        for key, port in inputs.items():
            kind = self.only("port", name, port).get("type")
            if kind in TYPES:
                literals[key] = self.literal(name, key, kind, given.get(key))
            elif flow := self.read(name, key, port, given.get(key)):
                reads.append(flow)
        writes = [self.write(name, key, port) for key, port in outputs.items()]
        return Job(
            name,
            kind=re.sub(r"^python (\w+)\.py\b.*", r"\1", command, flags=re.S),
            compute=str(job.get("compute")).removeprefix("azureml:"),
            command=command,
            code=code,
            environment=_environment(component.get("environment")),
            literals=literals,
            reads=tuple(reads),
            writes=tuple(flow for flow in writes if flow),
        )

    def check_code(
        self, name: str, job: Any, component: Any, command: str, code: str
    ) -> None:
        plain = WORDS.fullmatch(SLOT.sub("", command))
        if not plain or not re.match(r"python \w+\.py( |$)", command):
            rule = "its command is not `python script.py` and plain words"
            self.say(name, rule, "leave out quotes, pipes and whatever a shell reads")
        for kind, key in SLOT.findall(command):
            if key not in (component.get(kind) or {}):
                self.say(name, f"its command names {kind}.{key}", "declare it")
        if not Path(code).is_absolute():
            rule = f"its code is {code[:60]!r}, not a folder of this machine"
            self.say(name, rule, "build the plan anew: submitting changes it")
        if not _environment(component.get("environment")):
            rule = "its environment is not pinned"
            self.say(name, rule, "name an image with its tag, or azureml:name:version")
        again = (self.source.get("settings") or {}).get("force_rerun")
        if again is not True and component.get("is_deterministic") not in (False, 0):
            rule = "an old result could be taken instead of running it"
            self.say(name, rule, "set force_rerun in the plan's settings")
        count = (job.get("resources") or {}).get("instance_count", 1)
        if count not in (None, 1, "1"):
            self.say(name, f"it asks for {count} machines", "one job, one machine")

    def literal(self, name: str, key: str, kind: str, value: Any) -> str:
        text = "" if isinstance(value, Mapping | list) else str(value)
        if value is None or not re.fullmatch(TYPES[kind], text, re.ASCII):
            rule = f"{key} must be a {kind}, of letters, digits and .,:@%+=/_- only"
            self.say(name, f"{rule}; it is {str(value)[:60]!r}", "give a plain value")
        return text

    def read(self, name: str, key: str, port: Any, value: Any) -> Flow | None:
        value = {"path": value} if isinstance(value, str) else value
        value = self.only("binding", name, value or {})
        path = str(value.get("path"))
        modes = {value.get("mode"), self.mapping(name, port).get("mode")} - {None}
        if self.mapping(name, port).get("type") != "uri_folder":
            self.say(name, f"{key} is not a folder", "use uri_folder")
        if not modes <= set(READ_ONLY):
            rule = f"{key} has the mode {sorted(map(str, modes))}"
            self.say(name, rule, f"inputs are for reading: {READ_ONLY}")
        bound = BINDING.fullmatch(path)
        if bound and bound[1]:
            found = self.target(bound[1], bound[2])
            if found:
                return Flow(key, *found, *bound.groups())
            rule = f"{key} waits for {bound[1]}.{bound[2]}, which does not say where"
            self.say(name, rule, "give that output a path")
        else:  # elsewhere: `check_plan` decides
            return Flow(key, *(_uri(path) or ("", path)))
        return None

    def write(self, name: str, key: str, port: Any) -> Flow | None:
        self.only("port", name, port)
        given = (self.jobs[name].get("outputs") or {}).get(key)
        if isinstance(given, Mapping):
            self.only("binding", name, given)
        found, modes = self.target(name, key), {self.mode(given)} - {None}
        if self.mapping(name, port).get("type") != "uri_folder":
            self.say(name, f"{key} is not a folder", "use uri_folder")
        if not modes <= set(WRITE_ONLY):
            self.say(name, f"{key} has the mode {modes}", f"use one of {WRITE_ONLY}")
        if found:
            return Flow(key, *found)
        rule = f"{key} does not say where it goes: it would be the workspace's store"
        self.say(name, rule, "give it azureml://datastores/<store>/paths/<folder>")
        return None

    def output(self, given: Any) -> Mapping[str, Any]:
        """What an output says of itself, or the plan's output that it is."""
        given = {"path": given} if isinstance(given, str) else given
        given = given if isinstance(given, Mapping) else {}
        bound = BINDING.fullmatch(str(given.get("path")))
        if not bound:
            return given
        outputs = self.source.get("outputs")
        found = outputs.get(bound[2]) if isinstance(outputs, Mapping) else None
        return found if isinstance(found, Mapping) and not bound[1] else {}

    def target(self, job: str, output: str) -> tuple[str, str] | None:
        """(datastore, path) of a job's output, if it is given and well-formed."""
        given = self.jobs.get(job, {}).get("outputs") or {}
        given = given.get(output) if isinstance(given, Mapping) else None
        return _uri(str(self.output(given).get("path")))

    def mode(self, given: Any) -> Any:
        return self.output(given).get("mode")

    def in_order(self, jobs: list[Job]) -> Iterator[Job]:
        left, done = list(jobs), set[str]()
        while left:
            ready = [j for j in left if {r.producer for r in j.reads} - {""} <= done]
            if not ready:
                for job in left:
                    self.say(job.name, "it waits for itself", "build the plan anew")
                ready = left
            yield from ready
            done |= {job.name for job in ready}
            left = [job for job in left if job.name not in done]


def _uri(text: str) -> tuple[str, str] | None:
    """(datastore, path) of the short form of a datastore URI, without "." or ".."."""
    found = URI.fullmatch(text)
    if not found or {".", ".."} & set(found[2].split("/")):
        return None
    return found[1], found[2]


def _environment(found: Any) -> str:
    """What a job runs in, if it is pinned: an image with its tag, or a version."""
    if isinstance(found, Mapping):
        extra = found.keys() - {"name", "version", "image", "conda_file"}
        image = str(found.get("image"))
        pinned = re.fullmatch(r"[\w./-]+(:[\w.-]+|@sha256:[0-9a-f]{64})", image)
        return image if pinned and not extra and "latest" not in image else ""
    text = str(found)
    pinned = re.fullmatch(r"azureml:[\w./-]+(:|/versions/)[\w.-]+", text)
    return text if pinned and "latest" not in text else ""


def check_plan(
    plan: Plan, federation: Federation, *, allow: Collection[str] = ()
) -> None:
    """Refuse a plan with a flow of data that is not allowed (the table above).

    Also: each compute and datastore belongs to one party; one update per silo and round
    reaches the aggregation; nothing is written twice, or read by its path while a job of
    this plan writes it; numbers that leave are on the allow-list. allow: inputs that are
    no folders of a datastore, such as "azureml:scanners:1", and yet may be read.
    Raises PlanRefused with all violations at once.
    """
    found = list(plan.problems)
    owners = _owners(federation)
    parties = {party.compute: party for party in federation.parties}
    makers = {job.name: parties.get(job.compute) for job in plan.jobs}
    for job in plan.jobs:
        party = makers[job.name]
        if party is None:
            rule = f"its compute {job.compute!r} belongs to nobody"
            found.append(Violation(job.name, rule, "use one of silos.yaml"))
            continue
        for flow in job.reads:
            maker = makers.get(flow.producer)
            if rule := _read_rule(federation, owners, party, flow, maker, allow):
                found.append(Violation(job.name, f"{flow.name} {rule[0]}", rule[1]))
        for flow in job.writes:
            if rule := _write_rule(federation, owners, party, flow):
                found.append(Violation(job.name, f"{flow.name} {rule[0]}", rule[1]))
        found += _check_numbers(job, party, federation)
        if party is federation.orchestrator:
            found += _check_gather(job, federation)
    found += [*_check_places(plan), *_check_once(plan)]
    if found:
        raise PlanRefused(found)


def _owners(federation: Federation) -> dict[str, Party]:
    """{datastore: whose it is}."""
    owners = {silo.outbox: federation.orchestrator for silo in federation.silos}
    return owners | {party.datastore: party for party in federation.parties}


def _read_rule(
    federation: Federation,
    owners: Mapping[str, Party],
    party: Party,
    flow: Flow,
    maker: Party | None,
    allow: Collection[str],
) -> tuple[str, str] | None:
    """The rule that a read breaks, and the remedy; None if it is allowed."""
    owner, main = owners.get(flow.store), federation.orchestrator
    if not flow.store:
        if flow.path in allow:
            return None
        return (
            f"is {flow.path[:80]!r}, not a folder of a datastore",
            "no local path (it would be uploaded), URL or asset: use "
            "azureml://datastores/<own store>/paths/<folder>",
        )
    if owner is None:
        return f"is in {flow.store!r}, which belongs to nobody", "use silos.yaml's"
    if owner is not party and owner is not main:
        remedy = "each party reads its own store, silos also the orchestrator's models"
        return f"is read from {owner.name!r}, by {party.name!r}", remedy
    if flow.producer and maker is not owner and party is not main:
        return f"was not made by {owner.name!r}", "read what its owner made"
    if party is not main and owner is main:
        inside = flow.store == main.datastore and _below(flow.path, MODELS)
        if not inside:
            remedy = f"a silo reads only {MODELS} of {main.datastore!r}"
            return f"is {flow.path!r} in the orchestrator's {flow.store!r}", remedy
    return None


def _write_rule(
    federation: Federation, owners: Mapping[str, Party], party: Party, flow: Flow
) -> tuple[str, str] | None:
    """The rule that a write breaks, and the remedy; None if it is allowed."""
    owner, main = owners.get(flow.store), federation.orchestrator
    if owner is None:
        return f"goes to {flow.store!r}, which belongs to nobody", "use silos.yaml's"
    if owner is party:
        if not _below(flow.path, "fl") or (
            party is main and _below(flow.path, UPDATES)
        ):
            remedy = f"a run writes below fl/, and only silos below {UPDATES}"
            return f"goes to {flow.path!r} in {flow.store!r}", remedy
        return None
    if owner is not main or party is main:
        remedy = "each party writes to its own store, silos also to their outbox"
        return f"of {party.name!r} goes to {owner.name!r}", remedy
    if flow.name not in federation.released:
        allowed = f"on the allow-list are {sorted(federation.released)}"
        return f"may not leave {party.name!r}", f"write it to its own store; {allowed}"
    if flow.store != party.outbox or not _below(flow.path, f"{UPDATES}/{party.key}"):
        remedy = f"use {UPDATES}/{party.key} in {party.outbox!r}"
        return f"goes to {flow.path!r} in {flow.store!r}", remedy
    return None


def _below(path: str, folder: str) -> bool:
    return path.startswith(f"{folder}/")


def _check_numbers(
    job: Job, party: Party, federation: Federation
) -> Iterator[Violation]:
    """A job at a silo says which numbers leave, how large a file, and whose it is."""
    if party is federation.orchestrator:
        return
    if job.literals.get("silo") != party.key:
        rule = f"it runs at {party.key!r} as silo {job.literals.get('silo')!r}"
        yield Violation(job.name, rule, "each silo's job runs at its own compute")
    if any(flow.store == party.outbox for flow in job.writes):
        names = set(job.literals.get("metrics", "?").split(",")) - {""}
        if extra := sorted(names - federation.metrics):
            rule = f"the numbers {extra} may not leave {party.name!r}"
            remedy = f"on the allow-list are {sorted(federation.metrics)}"
            yield Violation(job.name, rule, remedy)
        if "max_bytes" not in job.literals:
            rule = "it does not say how large a file may leave"
            yield Violation(job.name, rule, "give it max_bytes")


def _updates(job: Job, federation: Federation) -> dict[Flow, list[str]]:
    """Reads of what silos released: {read: [key, run, step] of its folder}."""
    stores = {silo.outbox for silo in federation.silos}
    prefix = f"{UPDATES}/"
    return {
        flow: flow.path.removeprefix(prefix).split("/")
        for flow in job.reads
        if flow.store in stores and flow.path.startswith(prefix)
    }


def _check_gather(job: Job, federation: Federation) -> Iterator[Violation]:
    """What gathers, gathers one update of each silo, all of its own round."""
    updates = _updates(job, federation)
    if not updates and job.kind not in ("aggregate", "collect"):
        return
    keys = [parts[0] for parts in updates.values()]
    silos = {silo.key: silo for silo in federation.silos}
    if sorted(keys) != sorted(silos):
        rule = f"it gathers from {sorted(keys)}, not once from each of {sorted(silos)}"
        yield Violation(job.name, rule, "give it one update of each silo")
    step = "scores" if job.kind == "collect" else job.literals.get("round", "?")
    step = step.zfill(4) if step.isdigit() else step
    for flow, parts in updates.items():
        key = parts[0]
        if flow.name != f"update_{key}" or flow.store != silos.get(key, _NOBODY).outbox:
            rule = f"{flow.name} is the update of {key!r}"
            yield Violation(job.name, rule, "give each input its own silo's update")
        if len(parts) != 3 or parts[2] != step:
            rule = f"{flow.name} is {flow.path!r}, not of {step!r}"
            yield Violation(job.name, rule, "gather the updates of the same round")


_NOBODY = Party("", "", "")


def _check_places(plan: Plan) -> Iterator[Violation]:
    """No two writes meet, and no read by path meets a write of this plan."""
    taken: dict[tuple[str, str], str] = {}  # folders written, and all that hold them
    exact: dict[tuple[str, str], str] = {}
    for job in plan.jobs:
        for flow in job.writes:
            parts = flow.path.split("/")
            above = [(flow.store, "/".join(parts[:n])) for n in range(1, len(parts))]
            here = (flow.store, flow.path)
            other = taken.get(here) or next((exact[a] for a in above if a in exact), "")
            if other:
                rule = f"{flow.name} writes where {other} does, {flow.path!r}"
                yield Violation(job.name, rule, "give each output its own folder")
            taken |= dict.fromkeys([here, *above], f"{job.name}.{flow.name}")
            exact[here] = f"{job.name}.{flow.name}"
    for job in plan.jobs:
        for flow in job.reads:
            parts = flow.path.split("/")
            around = [
                (flow.store, "/".join(parts[:n])) for n in range(1, len(parts) + 1)
            ]
            meets = next((exact[a] for a in around if a in exact), "")
            meets = meets or taken.get((flow.store, flow.path), "")
            if meets and meets != f"{flow.producer}.{flow.output}":
                rule = f"{flow.name} reads what {meets} writes, without waiting for it"
                yield Violation(job.name, rule, "bind the input to that output")


def _check_once(plan: Plan) -> Iterator[Violation]:
    """Every released output reaches one job, not none and not two."""
    readers: dict[tuple[str, str], list[str]] = {}
    for job in plan.jobs:
        for flow in job.reads:
            readers.setdefault((flow.producer, flow.output), []).append(job.name)
    for job in plan.jobs:
        for flow in job.writes:
            found = readers.get((job.name, flow.name), [])
            if _below(flow.path, UPDATES) and len(found) != 1:
                rule = f"{flow.name} reaches {len(found)} jobs, {found[:3]}"
                yield Violation(job.name, rule, "one job gathers each update, once")
