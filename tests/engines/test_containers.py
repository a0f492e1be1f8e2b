"""The kit in a container: same bits, and what is not its own is out of reach."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fl_helpers import exchange
from fl_helpers.aggregation import weighted_average
from fl_helpers.cross_silo import hospital, sandbox, turn
from fl_helpers.cross_silo.federation import read_federation
from fl_helpers.cross_silo.on_premises import fleet, gate, precheck_kit, provision
from fl_helpers.cross_silo.run import Run
from fl_helpers.silos import Examples, Silo
from fl_helpers.simulation import run_rounds
from fl_helpers.training import ClientFunctions

from . import hospital as its
from . import in_a_container
from .conftest import LIMITS, METRICS, write_trial
from .oci import ENTRYPOINT, needs_runc, podman_line, volumes_of, write_bundle

pytestmark = pytest.mark.engines
CLIENT = "from fl_helpers.cross_silo.hospital import client\n"
SILOS_YAML = """\
project: trial
on_premises: {organisation: coordinator, admin: admin@coordinator.org, port: 8002,
              host: fl.coordinator.example, client: "x:client"}
silos:
  - {name: Hospital A, on_premises: {organisation: hospital_a, data: /srv/fl/data}}
"""


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A provisioned kit that has agreed to the model."""
    folder = tmp_path_factory.mktemp("pod")
    (folder / "silos.yaml").write_text(SILOS_YAML)
    provision.provision(read_federation(folder / "silos.yaml"), folder / "federation")
    kit = folder / "federation" / "kits" / "Hospital-A"
    gate.allow(kit, in_a_container.new_run().params)
    return kit


@pytest.fixture(scope="module")
def volumes(kit, tmp_path_factory):
    """The pod's volumes, of this kit."""
    folder = tmp_path_factory.mktemp("volumes")
    rng = torch.Generator().manual_seed(0)
    x, y = torch.rand(24, 1, 16, 16, generator=rng), torch.arange(24) % 2
    silo = Silo("Hospital A", Examples(x[:16], y[:16]), Examples(x[16:], y[16:]))
    hospital.save_silo(silo, folder / "its data")
    return volumes_of(kit, folder / "its data", CLIENT, folder)


NAME = f"fl-{os.getpid()}"  # of a container


def runc(folder, *words):
    return ["runc", "--root", str(folder / "state"), *map(str, words)]


@pytest.fixture(scope="module", params=["runc", "podman"])
def said(request, volumes):
    """What `in_a_container` says after a turn there: in the shipped pod, as an OCI
    bundle, and under the guide's `podman run`."""
    if not shutil.which(request.param):
        pytest.skip(f"needs {request.param}: NOT tested")
    shutil.copy(in_a_container.__file__, volumes["kit"])
    python = ["python", "/srv/fl/kit/in_a_container.py"]
    answer = volumes["kit"] / "said"
    answer.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:  # podman takes no long path
        folder = Path(folder)
        if request.param == "podman":
            start = podman_line(folder, volumes, python)
        else:
            write_bundle(folder, volumes, python)
            start = runc(folder, "run", "--bundle", folder, NAME)
        try:
            done = subprocess.run(start, capture_output=True, text=True, timeout=300)
        finally:
            delete = runc(folder, "delete", "--force", NAME)
            subprocess.run(delete, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(answer.read_text())


@needs_runc
def test_a_turn_in_the_shipped_pod_has_the_bits_of_one_here(said, volumes):
    run = in_a_container.new_run()
    own = hospital.client(volumes["data"], dict(run.settings))
    expected, _ = turn.train(run, own, run.params, round_index=0)
    found = load_file(volumes["kit"] / "update")
    assert said["examples"] == expected.num_examples == 16
    assert found.keys() == expected.params.keys()
    for name, value in expected.params.items():
        assert found[name].equal(value), name
    assert not any(value.equal(run.params[name]) for name, value in found.items()
                   if name.endswith("weight"))  # fmt: skip


@needs_runc
def test_there_it_reads_and_writes_its_own_and_nothing_else(said):
    own = ["read the key", "read the data", "write in the kit", "write in /tmp"]
    assert said["done"] == own
    status = said["status"]
    assert status["Uid"] == ["10001"] * 4 and status["Gid"] == ["10001"] * 4
    assert {int(status[k][0], 16) for k in ("CapPrm", "CapEff", "CapBnd")} == {0}
    assert status["NoNewPrivs"] == ["1"] and status["Seccomp"] == ["2"]
    assert said["network"] == ["lo"]
    if sandbox.works("landlock"):  # the worker fences the function in there, too
        assert said["sandbox"] == "landlock"


@needs_runc
def test_the_precheck_there_finds_the_kit_as_a_cluster_mounts_it(said):
    rows = said["rows"]
    bad = {item for item, ok in rows.items() if ok is False}
    assert bad == {"connection"}  # there is no network
    for item in ("private key", "policy is protected", "user", "data folder"):
        assert rows[item] is True, item


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can lend a key: NOT tested")
@pytest.mark.parametrize(
    ("mode", "ok"),
    [(0o400, True), (0o440, True), (0o640, True), (0o444, False), (0o660, False)],
)
def test_a_key_that_root_lends_to_the_pods_group_is_nobody_elses(
    kit, tmp_path, monkeypatch, mode, ok
):
    shutil.copytree(kit, tmp_path / "kit")
    key = tmp_path / "kit" / "startup" / "client.key"
    key.chmod(mode)
    monkeypatch.setattr(precheck_kit.os, "geteuid", lambda: 10001)
    assert precheck_kit.CHECKS["hospital"]["private key"](tmp_path / "kit")[0] is ok
    monkeypatch.undo()  # one's own key is for nobody else to read
    found = precheck_kit.CHECKS["hospital"]["private key"](tmp_path / "kit")[0]
    assert found is (mode == 0o400)


def test_nvflares_own_preparation_takes_the_policy_away(kit, tmp_path):
    """Why there is a manifest of our own: `docs/on-premises.md` says so."""
    shutil.copytree(kit, tmp_path / "kit")
    (tmp_path / "k8s.yaml").write_text(
        "{runtime: k8s, parent: {docker_image: 'fl-hospital:1'}}"
    )
    command = [sys.executable, "-m", "nvflare.cli", "deploy", "prepare", "kit"]
    command += ["--output", "out", "--config", "k8s.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (kit / "local" / "resources.json").exists()
    assert not (tmp_path / "out" / "local" / "resources.json").exists()
    chart = tmp_path / "out" / "helm_chart"
    values = yaml.safe_load((chart / "values.yaml").read_text())
    assert values["serviceAccount"]["automountServiceAccountToken"] is True
    template = (chart / "templates" / "client-deployment.yaml").read_text()
    pod, container = template.split("containers:")
    assert "securityContext" in pod and "securityContext" not in container
    assert "secrets" in (chart / "templates" / "role.yaml").read_text()


# ---- a run of the engine


class Contained(fleet.Fleet):
    """A fleet of which each hospital is the shipped pod; the loopback is shared."""

    def start_process(self, who):
        if who == "server":
            return super().start_process(who)
        folder = self.folder / "pod"
        folder.mkdir()
        data, client = self.sites[who].data, Path(its.__file__).read_text()
        gate.allow(self.kits / who, its.new_model().state_dict(), metrics=METRICS)
        self.volumes = volumes_of(self.kits / who, Path(data), client, folder)
        network = f"/proc/{os.getpid()}/ns/net"
        write_bundle(folder, self.volumes, ENTRYPOINT, network=network)
        config = json.loads((folder / "config.json").read_text())
        config["process"]["env"].append(f"{fleet.MARK}={self.folder}")
        (folder / "config.json").write_text(json.dumps(config))
        self.since[who] = time.time()
        with (self.logs / f"{who}.log").open("ab") as log:
            self.processes[who] = subprocess.Popen(
                runc(folder, "run", "--bundle", folder, f"{NAME}-run"),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def stop(self):
        delete = runc(self.folder / "pod", "delete", "--force", f"{NAME}-run")
        subprocess.run(delete, capture_output=True)
        super().stop()


@needs_runc
def test_a_run_with_the_shipped_pod_equals_the_simulation(tmp_path):
    file = write_trial(tmp_path, {"Hospital A": 24})
    silo = its.load_silo(tmp_path / "data" / "hospital_0")
    torch.manual_seed(0)
    params = its.new_model().state_dict()
    run = Run("pod", params, rounds=2, seed=7, quorum=1, deadline=120, limits=LIMITS)
    with Contained(file, tmp_path / "fleet", ready=300) as contained:
        events = list(contained.run(run, timeout=300))
        found = contained.result(run)
    assert events[-1]["event"] == "done", events
    expected = run_rounds(
        params, [silo], ClientFunctions(*its.functions({})), weighted_average,
        rounds=run.rounds, seed=run.seed,
    )  # fmt: skip
    assert list(found) == list(expected.params)
    for name, value in expected.params.items():
        assert found[name].equal(value), name
    kit = contained.volumes["kit"]
    entries, torn = exchange.read_ledger(kit / "ledger.jsonl")
    assert {entry["verdict"] for entry in entries} == {"accepted"}
    assert not torn
    written = [path for path in kit.rglob("*") if path.is_file()]
    assert len(written) > 5 and {path.stat().st_uid for path in written} == {10001}
    assert not list((kit / "startup").iterdir()) + list((kit / "local").iterdir())
