"""A hospital's line to the server: as slow as one says, and cut when one says."""

import contextlib
import json
import re
import socket
import threading
import time

from fl_helpers.cross_silo.on_premises.fleet import Fleet

PIECE = 16_384  # bytes that are passed on at once


class BadLine:
    """A TCP proxy on a port of its own, with threads; all its connections share one
    line in each direction.

    target: port of this machine that it leads to. rate: bytes per second in each
    direction; None is no limit. up, down: bytes passed on so far, towards the server
    and from it. connections: how many there were.
    """

    def __init__(self, target, rate=None):
        self.target, self.rate = target, rate
        self.open = threading.Event()
        self.open.set()
        self.passed, self.free = {"up": 0, "down": 0}, {"up": 0.0, "down": 0.0}
        self.connections, self.pairs, self.lock = 0, [], threading.Lock()
        self.cuts, self.planned = 0, None
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, hang_up=False):
        """Nothing gets through. hang_up: what is connected is told so, else it only
        hears nothing, as when a cable is pulled."""
        self.cuts += 1
        self.open.clear()
        if hang_up:
            self._hang_up()

    def cut_at(self, up, *, seconds=None, hang_up=False):
        """A cut when so many bytes have passed towards the server; None: until it is
        mended."""
        self.planned = up, seconds, hang_up

    def _cut_if_planned(self):
        with self.lock:
            if self.planned is None or self.passed["up"] < self.planned[0]:
                return
            (_, seconds, hang_up), self.planned = self.planned, None
        self.cut(hang_up)
        if seconds is not None:
            threading.Timer(seconds, self.mend).start()

    def mend(self):
        self.open.set()

    def close(self):
        self.listener.close()
        self.cut(hang_up=True)
        self.mend()

    def _hang_up(self):
        with self.lock:
            pairs, self.pairs = self.pairs, []
        for end in (end for pair in pairs for end in pair):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:  # closed
                return
            self.open.wait()
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:  # the server is down
                near.close()
                continue
            self.connections += 1
            with self.lock:
                self.pairs.append((near, far))
            for way, source, sink in (("up", near, far), ("down", far, near)):
                given = (way, source, sink)
                threading.Thread(target=self._pass_on, args=given, daemon=True).start()

    def _pass_on(self, way, source, sink):
        with contextlib.suppress(OSError):
            while piece := source.recv(PIECE):
                self._take_turn(way, len(piece))
                self.open.wait()
                sink.sendall(piece)
                self.passed[way] += len(piece)
                self._cut_if_planned()
        self.open.wait()  # that an end hung up is not heard either
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()  # the other direction closes the other end

    def _take_turn(self, way, size):
        """Wait until the line has carried what came before, and this."""
        if self.rate is None:
            return
        with self.lock:
            start = max(self.free[way], time.monotonic())
            self.free[way] = start + size / self.rate
        time.sleep(max(0.0, self.free[way] - time.monotonic()))


class FleetOverLines(Fleet):
    """A fleet whose hospitals that are named each have a `BadLine` to the server."""

    def __init__(self, silos, folder, *, over, **how):
        super().__init__(silos, folder, **how)
        self.over, self.lines = over, {}

    def start_process(self, who):
        path = self.kits / who / "startup" / "fed_client.json"
        if who in self.over:
            text = path.read_text()
            if who not in self.lines:
                port = json.loads(text)["servers"][0]["service"]["target"].split(":")[1]
                self.lines[who] = BadLine(int(port))
            port = self.lines[who].port
            path.write_text(re.sub(r"(localhost:)\d+", rf"\g<1>{port}", text))
        super().start_process(who)

    def stop(self):
        super().stop()
        for line in self.lines.values():
            line.close()
        self.lines.clear()
