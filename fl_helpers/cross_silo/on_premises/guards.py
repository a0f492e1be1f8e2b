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
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey as Header
from nvflare.fuel.f3.cellnet.defs import MessagePropKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message

from fl_helpers.cross_silo.on_premises import certificates

SERVER = "server"  # first part of the name of each of the server's processes
REFUSED_TOPICS = frozenset({"sys.shell"})  # browsing a hospital's files
STARTS = (EventType.SYSTEM_BOOTSTRAP, EventType.SYSTEM_START, EventType.START_RUN)


def family(cell: Any) -> str:
    """Participant that a process belongs to: "Hospital-A" of "Hospital-A.<job>"."""
    return str(cell or "").split(".")[0]


class _Guard(FLComponent):
    """Installs `check` once, as soon as the process has a message layer."""

    install_with = ""  # which of the message layer's methods takes the check

    def __init__(self) -> None:
        super().__init__()
        self.own = ""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type in STARTS and not self.own:
            self.install(fl_ctx.get_engine().get_cell().core_cell)

    def install(self, core: Any) -> None:
        self.own = family(core.get_fqcn())
        getattr(core, self.install_with)("*", "*", self.check)

    def check(self, message: Message) -> Message | None:
        """A refusal, or None to let the message through."""
        origin = family(message.get_header(Header.ORIGIN))
        target = family(message.get_header(Header.DESTINATION))
        # Who is at the other end of the connection was checked against its certificate
        # when it connected; the message's own headers are only what the sender says.
        endpoint = message.get_prop(MessagePropKey.ENDPOINT)
        sender = family(endpoint.name if endpoint else "")
        if self.allows(message, sender, origin, target):
            return None
        topic = (
            f"{message.get_header(Header.CHANNEL)}/{message.get_header(Header.TOPIC)}"
        )
        self.logger.warning(
            f"{type(self).__name__} refused {topic} of {sender!r}: {origin} -> {target}"
        )
        return make_reply(ReturnCode.UNAUTHENTICATED, "refused by guard")

    def allows(self, message: Message, sender: str, origin: str, target: str) -> bool:
        raise NotImplementedError


class HubGuard(_Guard):
    """Server: a message comes from who it says, and starts or ends at the server. It
    also says what is wrong with the server's certificates."""

    install_with = "add_incoming_filter"

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type == EventType.SYSTEM_BOOTSTRAP:
            kit = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir()
            certificates.watch(kit, self.logger.error)

    def allows(self, message: Message, sender: str, origin: str, target: str) -> bool:
        return sender in (origin, SERVER) and SERVER in (origin, target)


class SiteGuard(_Guard):
    """Hospital: act on requests of the server or of the hospital's own processes."""

    install_with = "add_incoming_request_filter"

    def allows(self, message: Message, sender: str, origin: str, target: str) -> bool:
        inner = getattr(message.payload, "topic", None)  # of an admin request
        topics = {message.get_header(Header.TOPIC), inner}
        return {origin, sender} <= {SERVER, self.own} and not topics & REFUSED_TOPICS
