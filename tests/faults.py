"""A proxy between a client and a server that does harm at one byte of what passes.

The next harm is armed: which fault, in which direction, at which byte counted from now on. It
strikes once. Bytes are counted over all connections: whichever brings that byte is struck.
"""

import contextlib
import selectors
import socket
import struct
import threading
import time
from typing import Literal, NamedTuple, Self, cast

Fault = Literal["reset", "stall", "split", "duplicate", "drop", "trickle", "choke"]
Direction = Literal["request", "reply"]

# Those that a campaign tries at every byte. The others are for tests of deadlines.
FAULTS: tuple[Fault, ...] = ("reset", "stall", "split", "duplicate", "drop")
DIRECTIONS: tuple[Direction, ...] = ("request", "reply")

_CHUNK = 65_536
_SECONDS = 5.0  # for peers that take nothing, or do not answer a ghost
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Passed(NamedTuple):
    """How many bytes came since the proxy was armed, those that a fault took included."""

    request: int
    reply: int


class _Armed(NamedTuple):
    fault: Fault
    direction: Direction
    offset: int
    pause: float
    times: int
    begun: int = 0  # at which count the offset begins


class _Link:
    """A connection of a client, and the one to the server that belongs to it."""

    __slots__ = ("client", "flows", "server")

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client: socket.socket | None = client  # None: it gave up while a request was held
        self.server = server
        self.flows = (_Flow(self, "request", server), _Flow(self, "reply", client))

    @property
    def ends(self) -> list[socket.socket]:
        return [end for end in (self.client, self.server) if end is not None]


class _Flow:
    """One direction of a connection, and what is held back of it."""

    __slots__ = ("due", "held", "link", "pause", "sink", "step", "way")

    def __init__(self, link: _Link, way: Direction, sink: socket.socket) -> None:
        self.link = link
        self.way: Direction = way
        self.sink = sink
        self.held: bytearray | None = None  # None: what comes is passed on
        self.due = 0.0  # when some of it goes on by itself, if it does
        self.pause = 0.0
        self.step: int | None = None  # how much then; None: all


class FaultProxy:
    """Passes bytes on from a port of its own to that of a server on this machine, and back.

    Faults, at the byte at `offset` of the requests or the replies that come from now on:
        reset: what comes before it is passed on, then both connections are reset.
        stall: what comes before it is passed on, the rest is held until `release`.
        split: what comes before it is passed on, the rest after a pause.
        duplicate: the byte is passed on twice.
        drop: the byte is lost.
        trickle: what comes before it is passed on, the rest byte by byte with a pause before each.
        choke: what comes before it is passed on, and nothing more is taken from who sends it.

    `struck` is whether it did. `connections` counts those that were ever made.
    """

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.struck = False
        self.connections = 0
        self._closed = False
        self._counts: dict[Direction, int] = {"request": 0, "reply": 0}
        self._armed: _Armed | None = None
        self._links: dict[socket.socket, _Link] = {}  # by both of their ends
        self._timed: list[_Flow] = []  # what is held and goes on by itself
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="faults", daemon=True)
        self._thread.start()

    @property
    def passed(self) -> Passed:
        return Passed(**self._counts)

    def arm(
        self,
        fault: Fault | None,
        direction: Direction = "request",
        offset: int = 0,
        pause: float = 0.002,
        times: int = 1,
    ) -> None:
        """Let that fault strike at that byte, counted from now; None: count, and let none strike.

        If it is to strike more than once, it counts anew each time. Whatever was armed before and
        did not strike is forgotten.
        """
        with self._lock:
            self.struck = False
            self._counts = {"request": 0, "reply": 0}
            self._armed = _Armed(fault, direction, offset, pause, times) if fault else None

    def release(self, *, ghost: bool = False) -> None:
        """Pass on what a stall holds back.

        As a ghost: its client is gone for good, and this returns when the server has run whatever
        request it was. A client that gave up by itself makes a ghost, too.
        """
        haunted: list[socket.socket] = []
        with self._lock:
            self._timed = []
            for flow in self._stalled():
                link = flow.link
                with contextlib.suppress(OSError):
                    flow.sink.sendall(flow.held or b"")
                flow.held = None
                if flow.way == "request" and (ghost or link.client is None):
                    haunted.append(link.server)
                    self._selector.unregister(link.server)
                    del self._links[link.server]
                    self._close(link)
        for server in haunted:
            # It reads what was sent before it sees the end, and closes once it has run that.
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_WR)
                while server.recv(_CHUNK):
                    pass
            server.close()

    def cut(self) -> None:
        """Close all connections that there are; what is held is lost."""
        with self._lock:
            for link in set(self._links.values()):
                self._close(link)

    def close(self) -> None:
        """Close everything; what is held is lost."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stalled(self) -> list[_Flow]:
        links = set(self._links.values())
        return [flow for link in links for flow in link.flows if flow.held is not None]

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(self._patience()):
                with self._lock:
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._read(cast("socket.socket", key.fileobj))
            with self._lock:
                self._go_on()
        self.cut()
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # it was shut down, or the client is gone
        try:
            server = socket.create_connection(("127.0.0.1", self._upstream))
        except OSError:
            _reset(client)
            return
        self.connections += 1
        link = _Link(client, server)
        for end in link.ends:
            end.settimeout(_SECONDS)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._links[end] = link
            self._selector.register(end, selectors.EVENT_READ)

    def _read(self, end: socket.socket) -> None:
        link = self._links.get(end)
        if link is None:
            return  # it was closed after it was selected
        try:
            data = end.recv(_CHUNK)
        except OSError:
            data = b""
        requests, replies = link.flows
        if data:
            self._pass(requests if end is link.client else replies, data)
        elif end is link.client and requests.held is not None and requests not in self._timed:
            # The network still has the request, whatever has become of who sent it.
            self._selector.unregister(end)
            del self._links[end]
            end.close()
            link.client = None
        else:
            self._close(link)

    def _pass(self, flow: _Flow, data: bytes) -> None:
        if flow.held is not None:
            flow.held += data
            return
        before = self._counts[flow.way]
        self._counts[flow.way] += len(data)
        armed = self._armed
        at = armed.begun + armed.offset - before if armed else 0
        if not armed or armed.direction != flow.way or at >= len(data):
            self._send(flow, data)
            return
        self.struck = True
        again = armed._replace(times=armed.times - 1, begun=before + len(data))
        self._armed = again if again.times else None
        match armed.fault:
            case "duplicate":
                self._send(flow, data[: at + 1] + data[at:])
            case "drop":
                self._send(flow, data[:at] + data[at + 1 :])
            case "reset":
                self._send(flow, data[:at])
                self._close(flow.link, reset=True)
            case "choke":
                self._send(flow, data[:at])
                source = flow.link.client if flow.way == "request" else flow.link.server
                assert source is not None
                source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                self._selector.unregister(source)
            case fault:
                self._send(flow, data[:at])
                flow.held = bytearray(data[at:])
                if fault != "stall":
                    flow.pause = armed.pause
                    flow.due = time.monotonic() + armed.pause
                    flow.step = 1 if fault == "trickle" else None
                    self._timed.append(flow)

    def _send(self, flow: _Flow, data: bytes) -> None:
        if not data or (flow.way == "reply" and flow.link.client is None):
            return
        try:
            flow.sink.sendall(data)
        except OSError:
            self._close(flow.link)

    def _patience(self) -> float | None:
        if not self._timed:
            return None
        return max(0.0, min(flow.due for flow in self._timed) - time.monotonic())

    def _go_on(self) -> None:
        for flow in list(self._timed):
            if flow.held is None or flow.due > time.monotonic():
                continue
            data = bytes(flow.held[: flow.step])
            del flow.held[: flow.step]
            if flow.held:
                flow.due += flow.pause
            else:
                flow.held = None
                self._timed.remove(flow)
            self._send(flow, data)

    def _close(self, link: _Link, *, reset: bool = False) -> None:
        self._timed = [flow for flow in self._timed if flow.link is not link]
        for end in link.ends:
            if self._links.pop(end, None) is None:
                continue
            with contextlib.suppress(KeyError):  # it was choked
                self._selector.unregister(end)
            if reset:
                _reset(end)
            else:
                end.close()


def _reset(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    end.close()
