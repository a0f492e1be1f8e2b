"""What a hospital would run that does not keep to the rules; copied into its kit."""

import hashlib
import json
import threading
import time
from pathlib import Path

import safetensors.torch
import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import Filter
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.shareable import Shareable
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message


class NoGate(Filter):
    """Sends something else than an honest update, another thing in each round."""

    LIES = ("nan", "shape", "lacks", "hash", "junk", "text", "nothing", "name", "big")

    def process(self, shareable, fl_ctx):
        found = shareable["update"]
        lie = self.LIES[found.round_index % len(self.LIES)]
        params = dict(found.update.params)
        first = next(iter(params))
        if lie == "nan":
            params[first] = params[first] * torch.nan
        elif lie == "shape":
            params[first] = params[first][:1].clone()
        elif lie == "lacks":
            del params[first]
        elif lie == "big":
            params[first] = torch.zeros(1_000_000)
        data = safetensors.torch.save(params) if lie != "junk" else b"\x80\x04junk" * 99
        manifest = {
            "version": 1,
            "silo": "Hospital A" if lie == "name" else found.update.silo,
            "round": found.round_index,
            "num_examples": 10**6,
            "metrics": {},
            "bytes": len(data),
            "sha256": hashlib.sha256(b"" if lie == "hash" else data).hexdigest(),
        }
        message = Shareable()
        if lie != "nothing":
            message["update.safetensors"] = "text" if lie == "text" else data
            message["manifest.json"] = json.dumps(manifest).encode()
        return message


class Neighbour(FLComponent):
    """Says hello to the server and to other hospitals; notes who said hello to it."""

    def handle_event(self, event_type, fl_ctx):
        if event_type == EventType.SYSTEM_START:
            self.kit = Path(
                fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir()
            )
            self.cell = fl_ctx.get_engine().get_cell()
            self.cell.register_request_cb("neighbour", "hello", self.greeted)
            threading.Thread(target=self.greet, daemon=True).start()

    def greeted(self, request):
        with (self.kit / "greeted_by").open("a") as file:
            file.write(f"{request.get_header(MessageHeaderKey.ORIGIN)}\n")
        return make_reply("ok")

    def greet(self):
        """Once the test says whom: by then all are connected."""
        while not (self.kit / "greet").exists():
            time.sleep(0.1)
        answers = {}
        for target in (self.kit / "greet").read_text().split():
            reply = self.cell.send_request(
                "neighbour", "hello", target, new_cell_message({}), timeout=3
            )
            answers[target] = str(reply.get_header(MessageHeaderKey.RETURN_CODE))
        (self.kit / "answers.tmp").write_text(json.dumps(answers))
        (self.kit / "answers.tmp").rename(self.kit / "answers")
