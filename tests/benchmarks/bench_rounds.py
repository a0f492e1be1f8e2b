"""A round on own machines with models that hospitals use, against the sum of its parts.

Only with --full: minutes. Real processes of a server and three hospitals on this
machine, as in `rounds.py`, and then its parts one after another, each alone: training,
files (serialise, hash, check), TLS, average. More than one core, and hospitals on
machines of their own, make a round shorter than the sum; polls and NVFlare longer.
Linux only.
"""

import ctypes
import shutil
import socket
import ssl
import statistics
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import engines
import psutil
import rounds
import torch
from common import report, row

from fl_helpers.aggregation import weighted_average
from fl_helpers.cross_silo import hospital
from fl_helpers.exchange import read_model, read_update, write_model, write_update
from fl_helpers.silos import Silo

SILOS, ROUNDS, SIZE = 3, 5, 32  # pixels: DenseNet-121 needs 32
MODELS = {"ResNet-18": "resnet18", "DenseNet-121": "densenet121"}


def over_tls(payload, startup):
    """Seconds to send bytes through TLS on the loopback interface, and what arrived.

    startup: the server's folder with its certificate."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(startup / "server.crt", startup / "server.key")
    client = ssl.create_default_context(cafile=startup / "rootCA.pem")
    client.check_hostname = False
    arrived = bytearray()

    def receive(listener):
        with server.wrap_socket(listener.accept()[0], server_side=True) as connection:
            while part := connection.recv(2**20):
                arrived.extend(part)
                if len(arrived) == len(payload):
                    break
            connection.sendall(b"!")  # it is there; who closes before loses the rest

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=receive, args=(listener,))
        thread.start()
        plain = socket.create_connection(listener.getsockname())
        with client.wrap_socket(plain) as connection:
            began = time.perf_counter()
            connection.sendall(payload)
            connection.recv(1)
            seconds = time.perf_counter() - began
        thread.join()
    return seconds, bytes(arrived)


def parts(work):
    """{part: seconds} of a round, for all hospitals, each done alone."""
    found = dict.fromkeys(("training", "files", "TLS", "average"), 0.0)

    def timed(part, function, *args, **kwargs):
        began = time.perf_counter()
        result = function(*args, **kwargs)
        found[part] += time.perf_counter() - began
        return result

    startup, received = work.kits / "server/startup", []
    folder, start = work.folder / "parts", work.start
    shutil.rmtree(folder, ignore_errors=True)
    model = timed("files", write_model, folder / "model", start, round_index=0)
    for place in work.places:
        found["TLS"] += over_tls(*_sent(model, startup))[0]
        params = timed("files", read_model, model, start)
        silo, rng = hospital.load_silo(place), torch.Generator().manual_seed(0)
        update = hospital.client(place, work.settings).update
        update = timed("training", update, params, _named(silo), round_index=0, rng=rng)
        out = folder / update.silo
        timed("files", write_update, out, update, round_index=0, expected=start)
        found["TLS"] += over_tls(*_sent(out, startup))[0]
        how = dict(silo=update.silo, round_index=0)
        received.append(timed("files", read_update, out, start, **how))
    timed("average", weighted_average, received)
    return found


def _sent(folder, startup):
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes(), startup


def _named(silo):
    """The name has to be one for a folder."""
    return Silo(silo.name.replace(" ", "_"), silo.train, silo.test)


def watch(fleet, peaks, over):
    """{who: the largest sum of resident memory of its processes, in bytes}."""
    while not over.wait(0.2):
        for who, process in list(fleet.processes.items()):
            total = 0
            try:
                root = psutil.Process(process.pid)
                for one in (root, *root.children(recursive=True)):
                    total += one.memory_info().rss
            except psutil.Error:
                continue  # it has ended, or just now
            peaks[who] = max(peaks.get(who, 0), total)


def measure(name, model):
    rounds.prepare(model)
    peaks, over = {}, threading.Event()
    with tempfile.TemporaryDirectory(prefix="rounds_") as folder:
        work = engines.Work(Path(folder), SILOS, ROUNDS, size=SIZE)
        ours = engines.Ours(work)
        watcher = threading.Thread(target=watch, args=(ours.fleet, peaks, over))
        watcher.start()
        try:
            ours.start()
            ends, final = ours.run()
        finally:
            over.set()
            watcher.join()
            ours.stop()
        for entry, value in work.end.items():
            assert torch.equal(final[entry], value), entry  # the run that was meant
        parts(work)  # what a process loads once is no part of a round
        found = parts(work)
    size = sum(value.nbytes for value in work.start.values()) / 1e6
    case, seconds = f"{name}, {size:.0f} MB", [b - a for a, b in pairwise(ends)]
    rows = [row(f"{case}, a round", seconds, unit="s")]
    rows += [row(f"{case}, {part}", value, unit="s") for part, value in found.items()]
    ratio = statistics.median(seconds) / sum(found.values())
    rows.append(row(f"{case}, a round / its parts", ratio))
    hospitals = max(peak for who, peak in peaks.items() if who != "server")
    for who, peak in {"server": peaks["server"], "hospital": hospitals}.items():
        rows.append(row(f"{case}, memory of the {who}", peak / 1e6, unit="MB"))
    return rows


def main():
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans come to us
    torch.set_num_threads(1)  # as in the silos: for the same bits
    rows = [one for case in MODELS.items() for one in measure(*case)]
    return report(f"a round on own machines, {SILOS} hospitals", rows)


if __name__ == "__main__":
    sys.exit(main())
