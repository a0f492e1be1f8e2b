"""Nothing passes between hospitals: two guards on the engine's message layer.

Hospitals need to talk to the coordinator's server only. `HubGuard` sits in the server
and drops whatever does not begin or end there; `SiteGuard` sits in every process of a
hospital and acts on requests of the server and of the hospital's own processes only.
Each works without the other. They rely on NVFlare 2.9.0 calling filters that are
registered for all channels; the tests say so if another version does not.
"""

from __future__ import annotations

from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.f3.cellnet.defs import (
    MessageHeaderKey,
    MessagePropKey,
    ReturnCode,
)
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message

SERVER = "server"  # first part of the name of each of the server's processes
REFUSED_TOPICS = frozenset({"sys.shell"})  # browsing a hospital's files
STARTS = (EventType.SYSTEM_BOOTSTRAP, EventType.SYSTEM_START, EventType.START_RUN)


def family(cell: Any) -> str:
    """Participant that a process belongs to: "Hospital-A" of "Hospital-A.<job>"."""
    return str(cell or "").split(".")[0]


def sender_of(message: Message) -> str:
    """Participant at the other end of the connection that a message came in by.

    This name was checked against the peer's certificate when it connected; the
    message's own headers are only what the sender says.
    """
    endpoint = message.get_prop(MessagePropKey.ENDPOINT)
    return family(endpoint.name if endpoint else "")


class _Guard(FLComponent):
    """Installs `check` once, as soon as the process has a message layer."""

    def __init__(self) -> None:
        super().__init__()
        self.own = ""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type in STARTS and not self.own:
            self.install(fl_ctx.get_engine().get_cell())

    def install(self, cell: Any) -> None:
        core = getattr(cell, "core_cell", cell)
        self.own = family(core.get_fqcn())
        self._register(core)

    def _register(self, core: Any) -> None:
        raise NotImplementedError

    def _refuse(self, message: Message) -> Message:
        header = message.get_header
        self.logger.warning(
            f"{type(self).__name__} refused a message from {sender_of(message)!r}: "
            f"{header(MessageHeaderKey.ORIGIN)} -> "
            f"{header(MessageHeaderKey.DESTINATION)}, "
            f"{header(MessageHeaderKey.CHANNEL)}/{header(MessageHeaderKey.TOPIC)}"
        )
        return make_reply(ReturnCode.UNAUTHENTICATED, "refused by guard")


class HubGuard(_Guard):
    """Server: a message comes from who it says, and starts or ends at the server."""

    def _register(self, core: Any) -> None:
        core.add_incoming_filter("*", "*", self.check)

    def check(self, message: Message) -> Message | None:
        """A refusal, or None to let the message through."""
        origin = family(message.get_header(MessageHeaderKey.ORIGIN))
        target = family(message.get_header(MessageHeaderKey.DESTINATION))
        if sender_of(message) not in (origin, SERVER):
            return self._refuse(message)
        if SERVER not in (origin, target):
            return self._refuse(message)
        return None


class SiteGuard(_Guard):
    """Hospital: act on requests of the server or of the hospital's own processes."""

    def _register(self, core: Any) -> None:
        core.add_incoming_request_filter("*", "*", self.check)

    def check(self, message: Message) -> Message | None:
        """A refusal, or None to let the request through."""
        origin = family(message.get_header(MessageHeaderKey.ORIGIN))
        topics = {
            message.get_header(MessageHeaderKey.TOPIC),
            getattr(message.payload, "topic", None),  # of an admin request inside
        }
        trusted = (SERVER, self.own)
        if origin not in trusted or sender_of(message) not in trusted:
            return self._refuse(message)
        if topics & REFUSED_TOPICS:
            return self._refuse(message)
        return None
