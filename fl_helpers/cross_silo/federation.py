"""Who takes part in a federation, and where: the one reader of `silos.yaml`.

The file names the project and its silos, and has one section for each engine that runs
it; a section that nobody uses may be left out. Names become those of certificates,
folders and cloud resources, so each value must match what all of these can take.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

LOOPBACK = ("localhost", "127.0.0.1")
RESERVED = ("server", "admin", "localhost")  # NVFlare's own participants
ENGINES = ("on_premises", "azure_ml")
OWN = {f"azure_ml.{key}": key for key in ("compute", "datastore")} | {"name": "key"}
CLIENT = r"[^:]+:[A-Za-z_]\w*"
# As Azure limits them: 3 to 32 characters; lower case.
COMPUTE, DATASTORE = r"[A-Za-z][A-Za-z0-9-]{1,30}[A-Za-z0-9]", r"[a-z0-9_]{1,255}"
FOLDER, GUID = r"[\w.=-]+(/[\w.=-]+)*", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
# Of Azure ML: an exact version, never a label such as latest or stable.
ASSET = r"azureml:[A-Za-z0-9][\w.-]*:\d[\w.-]*"
CURATED = r"azureml://registries/[\w-]+/environments/[\w.-]+/versions/\d[\w.-]*"
IMAGE = r"[a-z0-9.-]+(/[\w.-]+)+@sha256:[0-9a-f]{64}"
INSTANCE = r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?"
SHAPES = {  # each key that a file or an engine's sections must have, and its value
    "project": r"[A-Za-z0-9][\w-]{0,40}",
    "silos[].name": r"[A-Za-z0-9][\w -]{0,60}",
    "on_premises.admin": r"[\w.%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}",
    "on_premises.client": CLIENT,
    "on_premises.host": r"[A-Za-z0-9]([A-Za-z0-9.-]{0,60}[A-Za-z0-9])?",
    "on_premises.organisation": r"\w{1,60}",
    "on_premises.port": r"\d{1,5}",
    "silos[].on_premises.organisation": r"\w{1,60}",
    "silos[].on_premises.data": r".+",
    "azure_ml.workspace.subscription_id": f"(?i:{GUID})",
    "azure_ml.workspace.resource_group": r"[\w.()-]{1,90}",
    "azure_ml.workspace.name": r"[A-Za-z0-9][\w-]{1,32}",
    "azure_ml.orchestrator.compute": COMPUTE,
    "azure_ml.orchestrator.datastore": DATASTORE,
    "azure_ml.client": CLIENT,
    "silos[].azure_ml.compute": COMPUTE,
    "silos[].azure_ml.datastore": DATASTORE,
    "silos[].azure_ml.data": f"{FOLDER}|{ASSET}",
}
NUMBERS = {  # keys that are integers, and the largest
    "on_premises.port": 65535,
    "azure_ml.hours": 504,  # Azure ML ends a job after 21 days
    "silos[].azure_ml.processes": 64,
}
OPTIONAL = {
    "azure_ml.released[]": r"[a-z]\w*",
    "azure_ml.metrics[]": r"[A-Za-z]\w*",
    "azure_ml.environment": f"{ASSET}|{CURATED}|{IMAGE}",
    "azure_ml.base_image": IMAGE,
    "azure_ml.hours": r"[1-9]\d{0,2}",
    "azure_ml.prepare": CLIENT,
    "azure_ml.orchestrator.instance_type": INSTANCE,
    "silos[].azure_ml.account": FOLDER,
    "silos[].azure_ml.instance_type": INSTANCE,
    "silos[].azure_ml.outbox": DATASTORE,
    "silos[].azure_ml.processes": r"[1-9]\d?",
    "silos[].azure_ml.shm_size": r"[1-9]\d{0,4}[bkmg]",
}


@dataclass(frozen=True)
class Machine:
    """A silo's organisation, in its certificate, and the absolute path of its data."""

    organisation: str
    data: str


@dataclass(frozen=True)
class OnPremises:
    """The coordinator's server, and the function that silos start with.

    organisation, admin: in certificates; admin may start and stop runs. host, port:
    where silos connect to; port 0 is any free one, on this machine. client: see
    `turn.load_client`.
    """

    organisation: str
    admin: str
    host: str
    port: int
    client: str


@dataclass(frozen=True)
class Workspace:
    """The Azure ML workspace that all jobs run in."""

    subscription_id: str
    resource_group: str
    name: str


@dataclass(frozen=True)
class Party:
    """A silo, or the orchestrator, on Azure ML: what belongs to it alone.

    data: the folder of a silo's data in its datastore, or a version of a data asset
    that is there. outbox: the orchestrator's datastore that a silo writes its updates
    to. instance_type: for computes that offer several (Kubernetes); "" is its own.
    shm_size: shared memory of a container, "8g". processes: of one training job, on
    one machine, such as one per GPU. account: the folder of its datastore where a silo
    keeps its privacy budget, and what is booked; "" if it trains without.
    """

    name: str
    compute: str
    datastore: str
    data: str = ""
    outbox: str = ""
    instance_type: str = ""
    shm_size: str = ""
    processes: int = 1
    account: str = ""

    @property
    def key(self) -> str:
        """The name as jobs and folders have it: "Hospital A" is "hospital_a"."""
        return re.sub(r"[ -]", "_", self.name).lower()


@dataclass(frozen=True)
class AzureML:
    """The workspace, the orchestrator in it, and what may leave a silo.

    client: see `turn.load_client`. released: outputs of a silo's jobs that may leave
    it. metrics: numbers that may. environment: a registered one, or an image by its
    digest; "" is the one that is pinned in `jobs/`, on base_image ("" is the pinned
    one, too). prepare: a function in the same
    form as client, called in each silo before the first round as function(data, target,
    settings): what it writes into the folder target, the client gets as data. hours:
    that one job may take.
    """

    workspace: Workspace
    orchestrator: Party
    client: str
    released: frozenset[str]
    metrics: frozenset[str]
    environment: str = ""
    base_image: str = ""
    prepare: str = ""
    hours: int = 24


@dataclass(frozen=True)
class Silo:
    """One hospital of a federation; None for an engine that the file does not use."""

    name: str
    on_premises: Machine | None
    azure_ml: Party | None


@dataclass(frozen=True)
class Federation:
    """The content of a `silos.yaml`; silos in the order of their names."""

    project: str
    silos: tuple[Silo, ...]
    on_premises: OnPremises | None
    azure_ml: AzureML | None

    @property
    def parties(self) -> tuple[Party, ...]:
        """On Azure ML: the orchestrator and all silos."""
        return (self.azure_ml.orchestrator, *(s.azure_ml for s in self.silos))

    def only(self, names: Collection[str]) -> Federation:
        """The same federation with some of the silos, by name."""
        unknown = sorted(set(names) - {silo.name for silo in self.silos})
        if unknown:
            raise ValueError(f"no such silos: {unknown}")
        return replace(self, silos=tuple(s for s in self.silos if s.name in names))


def read_federation(path: str | Path, *, engine: str | None = None) -> Federation:
    """Read and check a `silos.yaml`.

    engine: "on_premises" or "azure_ml", whose sections must be there; None takes those
    that are. Relative paths are of the file's own folder.
    Raises ValueError that names the file, the line and the key for anything missing,
    unknown, ill-formed or used twice.
    """
    path = Path(path)
    try:
        content = _read(path.read_text(encoding="utf-8"))
        used = [e for e in ENGINES if e == engine or content.uses(e)]
        _check_complete(content, used)
        return _to_federation(content, used, path.parent.resolve())
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path.name} is not YAML: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


@dataclass(frozen=True)
class _Content:
    """Values by keys such as "silos[1].name", and the line of each key."""

    values: dict[str, Any]
    lines: dict[str, int]

    def error(self, key: str, what: str) -> ValueError:
        """Names a key and its line; if it is not there, that of where it should be."""
        at = key
        while at not in self.lines:
            at = re.sub(r"(\.?\w+|\[\d+\])$", "", at)
        return ValueError(f"line {self.lines[at]}: {key} {what}")

    def claim(self, key: str, what: str, value: str, owners: dict[Any, str]) -> None:
        """Note who owns a value, by the key that says so; nobody may have it before."""
        owner = owners.get((what, value.lower()))
        if owner:
            why = f"gives the {what} {value!r}, used twice: {owner}"
            raise self.error(key, why)
        owners[what, value.lower()] = key

    def uses(self, engine: str) -> bool:
        return any(re.match(rf"(silos\[\d+\]\.)?{engine}\b", k) for k in self.values)

    def section(self, prefix: str, here: Path | None = None) -> dict[str, Any]:
        """The values directly below a key; a function's file is in the folder here."""
        own = {k.removeprefix(prefix): k for k in self.values if k.startswith(prefix)}
        own = {name: self.values[k] for name, k in own.items() if name.isidentifier()}
        for name in {"client", "prepare"} & own.keys() if here else ():
            if own[name].split(":")[0].endswith(".py"):
                own[name] = str(here / own[name])
        return own

    def listed(self, key: str) -> frozenset[str]:
        return frozenset(v for k, v in self.values.items() if _general(k) == f"{key}[]")

    def count(self) -> int:
        """How many silos there are, or should be: Azure ML needs two."""
        numbers = re.findall(r"silos\[(\d+)\]", " ".join(self.lines))
        return max([int(self.uses("azure_ml")), *map(int, numbers)]) + 1


def _read(text: str) -> _Content:
    """The values of a file, each checked by itself."""
    content = _Content({}, {"": 1})
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, node in _nodes(root, "") if root else ():
        line = node.start_mark.line + 1
        if key and key in content.lines:
            raise ValueError(f"line {line}: {key} is given twice")
        content.lines[key] = line
        if isinstance(node, yaml.ScalarNode):
            content.values[key] = yaml.SafeLoader("").construct_object(node)
            _check_value(content, key)
    return content


def _nodes(node: yaml.Node, key: str) -> Iterator[tuple[str, yaml.Node]]:
    """All nodes of nested lists and mappings, with their keys."""
    yield key, node
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _nodes(value, f"{key}.{name.value}" if key else name.value)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _nodes(value, f"{key}[{index}]")


def _general(key: str) -> str:
    return re.sub(r"\[\d+\]", "[]", key)


def _check_value(content: _Content, key: str) -> None:
    known, value = SHAPES | OPTIONAL, content.values[key]
    shape = known.get(_general(key))
    if shape is None:
        below = [k for k in known if k.startswith(f"{_general(key)}.")]
        what = "needs keys of its own" if below else "is not a known key"
        raise content.error(key, f"{what}; known: {', '.join(below or known)}")
    limit = NUMBERS.get(_general(key))
    kind = int if limit else str
    if type(value) is not kind or not re.fullmatch(shape, str(value), re.ASCII):
        raise content.error(key, f"must match {shape}, got {value!r}")
    folder = key.endswith(("azure_ml.data", "azure_ml.account"))
    if folder and {".", "..", "fl"} & set(value.split("/")):
        why = f"must be a folder of its own, got {value!r}; runs write to fl/"
        raise content.error(key, why)
    if limit and value > limit:
        raise content.error(key, f"must be at most {limit}, got {value}")


def _check_complete(content: _Content, used: Collection[str]) -> None:
    """Each silo, and each engine that is used, has all that it needs."""
    others = [engine for engine in ENGINES if engine not in used]
    wanted = [key for key in SHAPES if not any(other in key for other in others)]
    for n in range(content.count()):
        for key in (key.replace("[]", f"[{n}]") for key in wanted):
            if key not in content.values:
                raise content.error(key, "is missing")


def _to_federation(content: _Content, used: Collection[str], here: Path) -> Federation:
    names = [content.values[f"silos[{n}].name"] for n in range(content.count())]
    on_premises = azure_ml = None
    machines = parties = [None] * len(names)
    if "on_premises" in used:
        on_premises, machines = _on_premises(content, names, here)
    if "azure_ml" in used:
        azure_ml, parties = _azure_ml(content, names, here)
    silos = sorted(map(Silo, names, machines, parties), key=lambda silo: silo.name)
    return Federation(content.values["project"], tuple(silos), on_premises, azure_ml)


def _on_premises(
    content: _Content, names: list[str], here: Path
) -> tuple[OnPremises, list[Machine]]:
    own, machines = content.section("on_premises.", here), []
    if own["port"] == 0 and own["host"] not in LOOPBACK:
        why = "0 (any) is for localhost only; choose one"
        raise content.error("on_premises.port", why)
    owners = {("site", name): "reserved for NVFlare" for name in RESERVED}
    for n, name in enumerate(names):
        content.claim(f"silos[{n}].name", "site", name.replace(" ", "-"), owners)
        place = content.section(f"silos[{n}].on_premises.")
        machines.append(Machine(**place | {"data": str(here / place["data"])}))
    return OnPremises(**own), machines


def _azure_ml(
    content: _Content, names: list[str], here: Path
) -> tuple[AzureML, list[Party]]:
    own, parties = content.section("azure_ml.", here), []
    if {"environment", "base_image"} <= own.keys():
        why = "is for the packages in jobs/; environment names another one"
        raise content.error("azure_ml.base_image", why)
    own["workspace"] = Workspace(**content.section("azure_ml.workspace."))
    main = Party("orchestrator", **content.section("azure_ml.orchestrator."))
    owners = {(key, getattr(main, key).lower()): main.name for key in OWN.values()}
    for n, name in enumerate(names):
        place = {"outbox": main.datastore, **content.section(f"silos[{n}].azure_ml.")}
        parties.append(Party(name, **place))
        for at, key in OWN.items():
            content.claim(f"silos[{n}].{at}", key, getattr(parties[n], key), owners)
    for n, party in enumerate(parties):
        if bool(party.account) != bool(parties[0].account):
            why = "must be there for all silos or for none: their jobs are the same"
            raise content.error(f"silos[{n}].azure_ml.account", why)
        data, account = f"{party.data}/", f"{party.account}/"
        if data.startswith(account) or account.startswith(data):
            why = f"must be beside the data, {party.data!r}, got {party.account!r}"
            raise content.error(f"silos[{n}].azure_ml.account", why)
        owner = owners.get(("datastore", party.outbox.lower()), main.name)
        if owner != main.name:
            why = (
                f"{party.outbox!r} belongs to {owner!r}; it must be the orchestrator's"
            )
            raise content.error(f"silos[{n}].azure_ml.outbox", why)
    lists = {key: content.listed(f"azure_ml.{key}") for key in ("released", "metrics")}
    return AzureML(orchestrator=main, **own, **lists), parties
