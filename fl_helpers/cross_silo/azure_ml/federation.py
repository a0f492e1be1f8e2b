"""Who takes part, and where each keeps its data: the Azure ML part of `silos.yaml`.

Each party, the orchestrator and every silo, has a compute and a datastore that nobody
else has. Where a run puts what is fixed here, so that rights can be given by folder.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

PATH = r"[\w.=-]+(/[\w.=-]+)*"
NAME = {  # what Azure ML takes as a name
    "compute": r"[A-Za-z][A-Za-z0-9-]{1,31}",
    "datastore": r"[A-Za-z0-9_]{1,255}",
}
SHAPES = {  # each key of the file, and what its value must match
    "project": r"[A-Za-z0-9][\w-]{0,40}",
    "silos[].name": r"[A-Za-z0-9][\w -]{0,60}",
    "silos[].azure_ml.compute": NAME["compute"],
    "silos[].azure_ml.datastore": NAME["datastore"],
    "silos[].azure_ml.data": PATH,
    "azure_ml.workspace.subscription_id": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-"
    r"[0-9a-fA-F]{12}",
    "azure_ml.workspace.resource_group": r"[\w.()-]{1,90}",
    "azure_ml.workspace.name": r"[A-Za-z0-9][\w-]{1,32}",
    "azure_ml.orchestrator.compute": NAME["compute"],
    "azure_ml.orchestrator.datastore": NAME["datastore"],
    "azure_ml.client": r"[^:]+:[A-Za-z_]\w*",
    "azure_ml.released[]": r"[a-z]\w*",
    "azure_ml.metrics[]": r"[A-Za-z]\w*",
}
OPTIONAL = {
    "silos[].azure_ml.outbox": NAME["datastore"],
    "silos[].azure_ml.instance_type": r"\w+",
    "azure_ml.orchestrator.instance_type": r"\w+",
    "azure_ml.environment": r"azureml:[\w.-]+:[\w.-]+",
}
OTHERS = re.compile(r"(silos\[\d+\]\.)?on_premises\b.*")  # another engine's sections

MODELS, UPDATES = "fl/models", "fl/updates"  # in the orchestrator's store: see `place`


@dataclass(frozen=True)
class Workspace:
    """The Azure ML workspace that all jobs run in."""

    subscription_id: str
    resource_group: str
    name: str


@dataclass(frozen=True)
class Party:
    """A silo, or the orchestrator, and what belongs to it alone.

    data: the folder of a silo's data in its datastore. outbox: the orchestrator's
    datastore that a silo writes its updates to. instance_type: for computes that offer
    several (Kubernetes); "" is the compute's own.
    """

    name: str
    compute: str
    datastore: str
    data: str = ""
    outbox: str = ""
    instance_type: str = ""

    @property
    def key(self) -> str:
        """The name as jobs and folders have it: "Hospital A" is "hospital_a"."""
        return re.sub(r"[ -]", "_", self.name).lower()


@dataclass(frozen=True)
class Federation:
    """The content of a `silos.yaml`; silos in the order of their names.

    client: "module:function" or "/path/to/file.py:function", see `client.load_client`.
    released: outputs of a silo's jobs that may leave it. metrics: numbers that may.
    environment: a registered one, "azureml:name:version", or "" for the one that is
    pinned in `jobs/`.
    """

    project: str
    workspace: Workspace
    orchestrator: Party
    silos: tuple[Party, ...]
    client: str
    released: frozenset[str]
    metrics: frozenset[str]
    environment: str = ""

    @property
    def parties(self) -> tuple[Party, ...]:
        """The orchestrator and all silos."""
        return (self.orchestrator, *self.silos)

    def owner(self, *, compute: str = "", datastore: str = "") -> Party | None:
        """Whose a compute or a datastore is; None if it is nobody's."""
        for party in self.parties:
            if compute == party.compute or datastore == party.datastore:
                return party
        boxes = {silo.outbox for silo in self.silos}
        return self.orchestrator if datastore in boxes else None

    def only(self, names: Collection[str]) -> Federation:
        """The same federation with some of the silos, by name: for a quorum."""
        unknown = sorted(set(names) - {silo.name for silo in self.silos})
        if unknown:
            raise ValueError(f"no such silos: {unknown}")
        return replace(self, silos=tuple(s for s in self.silos if s.name in names))


def place(kind: str, run: str, step: str | int, key: str = "") -> str:
    """The folder in a party's store for something that a run makes.

    kind: in the orchestrator's store "models" (silos may read them), "updates" (of silo
    `key`), "memory" and "reports"; in a silo's "kept", "private", and "prepared".
    step: the round, or its number of rounds done, or a name.
    """
    step = f"{step:04d}" if isinstance(step, int) else step
    return "/".join(["fl", kind, *([key] if key else []), run, step])


def read_federation(path: str | Path) -> Federation:
    """Read and check the `azure_ml` parts of a `silos.yaml`.

    Raises ValueError that names the file, the line and the key for anything missing,
    unknown, ill-formed or used twice.
    """
    path = Path(path)
    try:
        found = _read_values(path)
        federation = _to_federation(found, path.parent.resolve())
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path.name} is not YAML: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    return federation


def _read_values(path: Path) -> dict[str, str]:
    """Values by keys such as "silos[1].name", checked one by one."""
    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    found: dict[str, str] = {}
    for key, value, line in _leaves(root) if root else ():
        shape = (SHAPES | OPTIONAL).get(_general(key))
        if OTHERS.fullmatch(key):
            continue
        if shape is None:
            known = ", ".join([*SHAPES, *OPTIONAL])
            raise ValueError(f"line {line}: {key} is not a known key; known: {known}")
        if key in found:
            raise ValueError(f"line {line}: {key} is given twice")
        if type(value) is not str or not re.fullmatch(shape, value, re.ASCII):
            raise ValueError(f"line {line}: {key} must match {shape}, got {value!r}")
        if key.endswith(".data") and {".", "..", "fl"} & set(value.split("/")):
            raise ValueError(
                f"line {line}: {key} must be a folder of its own, got {value!r}; runs "
                "write to fl/"
            )
        found[key] = value
    return found


def _general(key: str) -> str:
    return re.sub(r"\[\d+\]", "[]", key)


def _leaves(node: yaml.Node, key: str = "") -> Iterator[tuple[str, Any, int]]:
    """Values of nested lists and mappings, with their keys and lines (from 1)."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _leaves(value, f"{key}.{name.value}" if key else name.value)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _leaves(value, f"{key}[{index}]")
    else:
        value = yaml.SafeLoader("").construct_object(node)
        yield key, value, node.start_mark.line + 1


def _to_federation(found: dict[str, str], here: Path) -> Federation:
    numbers = [int(n) for n in re.findall(r"silos\[(\d+)\]", " ".join(found))]
    count = max([1, *numbers]) + 1  # there are at least two
    wanted = [key for key in SHAPES if not key.endswith("[]")]
    for n in range(count):
        for key in wanted:
            if (key := key.replace("[]", f"[{n}]")) not in found:
                raise ValueError(f"{key} is missing")
    client = found["azure_ml.client"]
    if client.split(":")[0].endswith(".py"):
        client = str(here / client)
    own = _section(found, "azure_ml.orchestrator.")
    orchestrator, silos = Party("orchestrator", **own), []
    for n in range(count):
        own = {"outbox": orchestrator.datastore}
        own |= _section(found, f"silos[{n}].azure_ml.")
        silos.append(Party(found[f"silos[{n}].name"], **own))
    _check_parties(orchestrator, silos)
    return Federation(
        project=found["project"],
        workspace=Workspace(**_section(found, "azure_ml.workspace.")),
        orchestrator=orchestrator,
        silos=tuple(sorted(silos, key=lambda silo: silo.name)),
        client=client,
        released=_listed(found, "azure_ml.released"),
        metrics=_listed(found, "azure_ml.metrics"),
        environment=found.get("azure_ml.environment", ""),
    )


def _section(found: dict[str, str], prefix: str) -> dict[str, str]:
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


def _listed(found: dict[str, str], key: str) -> frozenset[str]:
    return frozenset(v for k, v in found.items() if _general(k) == f"{key}[]")


def _check_parties(orchestrator: Party, silos: list[Party]) -> None:
    """Nobody shares a name, a compute or a datastore with somebody else."""
    owners: dict[tuple[str, str], Party] = {}
    for party in (orchestrator, *silos):
        for what in ("key", "compute", "datastore"):
            value = getattr(party, what)
            other = owners.setdefault((what, value.lower()), party)
            if other is not party:
                raise ValueError(
                    f"the {what} {value!r} is used twice, by {other.name!r} and "
                    f"{party.name!r}; each party needs its own"
                )
    for silo in silos:
        owner = owners.get(("datastore", silo.outbox.lower()), orchestrator)
        if owner is not orchestrator:
            raise ValueError(
                f"the outbox {silo.outbox!r} of {silo.name!r} belongs to "
                f"{owner.name!r}; it must be a datastore of the orchestrator's"
            )
