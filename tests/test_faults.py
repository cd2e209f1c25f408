"""Faults of the network: the proxy that makes them, and what they can do to a call and how long."""

import asyncio
import builtins
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Self, cast

import pytest
from redis.exceptions import ConnectionError, TimeoutError

from sessiongate import (
    AsyncSessionGate,
    PayloadNotFoundError,
    SessionGate,
    SessionNotFoundError,
    TooManySessionsError,
    UnderReplicatedError,
    scripts,
)

from .conftest import CLUSTERED, SIGN_KEY, Flavour, running
from .faults import DIRECTIONS, Direction, Fault, FaultProxy, Passed
from .proxy import Proxy
from .servers import Server


class Echo:
    """A server that sends back what it gets, and keeps it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.got = b""
        self.resets = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            while data := client.recv(1000):
                self.got += data
                client.sendall(data)
        except ConnectionResetError:
            self.resets += 1
        client.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed already
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[FaultProxy]:
    with FaultProxy(echo.port) as proxy:
        yield proxy


class Client:
    """A connection to a proxy."""

    def __init__(self, proxy: FaultProxy) -> None:
        self._socket = socket.create_connection(("127.0.0.1", proxy.port), timeout=5)

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def gets(self, data: bytes) -> bool:
        """Whether the next bytes are these."""
        got = b""
        while len(got) < len(data) and (more := self._socket.recv(len(data) - len(got))):
            got += more
        return got == data

    def gets_nothing(self) -> bool:
        """Whether nothing comes for a moment."""
        self._socket.settimeout(0.03)
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except builtins.TimeoutError:
            return True
        finally:
            self._socket.settimeout(5)

    def is_reset(self) -> bool:
        """Whether the connection is reset, once all that came before is read."""
        try:
            while self._socket.recv(1000):
                pass
        except ConnectionResetError:
            return True
        return False

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_a_proxy_that_is_not_armed(proxy: FaultProxy) -> None:
    """Without a fault all bytes pass, of any connection, and are counted from when it was asked."""
    with Client(proxy) as one, Client(proxy) as other:
        one.send(b"before")
        assert one.gets(b"before")
        proxy.arm(None)
        one.send(b"a" * 5000)
        other.send(b"bc")
        assert one.gets(b"a" * 5000)
        assert other.gets(b"bc")
    assert proxy.passed == Passed(5002, 5002)
    assert not proxy.struck
    assert proxy.connections == 2


@pytest.mark.parametrize("offset", range(4))
def test_a_reset_request(echo: Echo, proxy: FaultProxy, offset: int) -> None:
    """A request is reset at its byte: what is before it arrives, and both ends are told."""
    with Client(proxy) as client:
        proxy.arm("reset", "request", offset)
        client.send(b"abcd")
        assert client.is_reset()
    assert proxy.struck
    deadline = time.monotonic() + 5
    while not echo.resets:  # it has a thread for each client: the next one may be faster
        assert time.monotonic() < deadline
        time.sleep(0.001)
    with Client(proxy) as client:
        client.send(b"next")
        assert client.gets(b"next")
    assert echo.got == b"abcd"[:offset] + b"next"
    assert echo.resets == 1


@pytest.mark.parametrize("offset", range(4))
def test_a_reset_reply(echo: Echo, proxy: FaultProxy, offset: int) -> None:
    """A reply is reset at its byte: the request ran, and what is before the byte can be read."""
    with Client(proxy) as client:
        proxy.arm("reset", "reply", offset)
        client.send(b"abcd")
        assert client.gets(b"abcd"[:offset])
        assert client.is_reset()
    assert proxy.struck
    assert echo.got == b"abcd"


@pytest.mark.parametrize("offset", range(4))
def test_a_stalled_request(echo: Echo, proxy: FaultProxy, offset: int) -> None:
    """The rest of a stalled request waits, with what comes after it, until it is released."""
    with Client(proxy) as client, Client(proxy) as other:
        proxy.arm("stall", "request", offset)
        client.send(b"abcd")
        assert client.gets(b"abcd"[:offset])
        client.send(b"ef")
        assert client.gets_nothing()
        other.send(b"1")
        assert other.gets(b"1")
        assert echo.got == b"abcd"[:offset] + b"1"
        proxy.release()
        assert client.gets(b"abcdef"[offset:])
        client.send(b"gh")
        assert client.gets(b"gh")
    assert proxy.struck


@pytest.mark.parametrize("offset", range(4))
def test_a_stalled_reply(echo: Echo, proxy: FaultProxy, offset: int) -> None:
    """The rest of a stalled reply waits until it is released; the server knows nothing of it."""
    with Client(proxy) as client:
        proxy.arm("stall", "reply", offset)
        client.send(b"abcd")
        assert client.gets(b"abcd"[:offset])
        assert client.gets_nothing()
        assert echo.got == b"abcd"
        proxy.release()
        assert client.gets(b"abcd"[offset:])


@pytest.mark.parametrize("gives_up", [True, False])
def test_a_ghost(echo: Echo, proxy: FaultProxy, gives_up: bool) -> None:
    """A stalled request reaches the server though its client is gone, once it is released."""
    with Client(proxy) as client, Client(proxy) as other:
        proxy.arm("stall", "request", 1)
        client.send(b"abcd")
        assert client.gets(b"a")
        if gives_up:
            client.close()
            time.sleep(0.05)  # until the proxy has heard of it
        other.send(b"1")
        assert other.gets(b"1")
        proxy.release(ghost=not gives_up)
        assert echo.got == b"a1bcd"
        if not gives_up:
            assert not client.gets(b"b")
        proxy.release(ghost=True)  # there is none
        other.send(b"2")
        assert other.gets(b"2")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("offset", range(4))
def test_a_split(proxy: FaultProxy, direction: Direction, offset: int) -> None:
    """What is split arrives whole, after a pause."""
    with Client(proxy) as client:
        proxy.arm("split", direction, offset, pause=0.1)
        begun = time.monotonic()
        client.send(b"abcd")
        assert client.gets(b"abcd")
        assert time.monotonic() - begun >= 0.09
        assert proxy.struck
        client.send(b"ef")
        assert client.gets(b"ef")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("fault", "arrives"), [("duplicate", b"abccd"), ("drop", b"abd")])
def test_a_byte_too_many_or_too_few(
    proxy: FaultProxy, direction: Direction, fault: Fault, arrives: bytes
) -> None:
    """A duplicated byte arrives twice, a dropped one never, and what comes later is as it was."""
    with Client(proxy) as client:
        proxy.arm(fault, direction, 2)
        client.send(b"abcd")
        assert client.gets(arrives)
        assert client.gets_nothing()
        assert proxy.struck
        client.send(b"abcd")
        assert client.gets(b"abcd")


def test_a_trickle(proxy: FaultProxy) -> None:
    """What trickles comes byte by byte."""
    with Client(proxy) as client:
        proxy.arm("trickle", "reply", 1, pause=0.1)
        begun = time.monotonic()
        client.send(b"abcd")
        assert client.gets(b"abcd")
        assert time.monotonic() - begun >= 0.29
        client.send(b"ef")
        assert client.gets(b"ef")


def test_a_fault_strikes_any_connection(proxy: FaultProxy) -> None:
    """Bytes are counted over all connections from when the fault was armed; it strikes once."""
    with Client(proxy) as one, Client(proxy) as other:
        one.send(b"uncounted")
        assert one.gets(b"uncounted")
        proxy.arm("drop", "request", 3)
        one.send(b"ab")
        assert one.gets(b"ab")
        assert not proxy.struck
        other.send(b"cde")
        assert other.gets(b"ce")
        assert proxy.struck
        one.send(b"fghi")
        assert one.gets(b"fghi")
        proxy.arm("drop", "request", 100)
        proxy.arm("duplicate", "reply", 0)  # in the place of the other
        one.send(b"j" * 101)
        assert one.gets(b"j" * 102)


def test_a_server_that_is_gone(echo: Echo, proxy: FaultProxy) -> None:
    """What connects when there is no server is reset, and the proxy goes on."""
    echo.close()
    for _ in range(2):
        with pytest.raises(ConnectionResetError), Client(proxy) as client:
            client.gets(b"a")


def test_a_choked_client(proxy: FaultProxy) -> None:
    """Of what is choked nothing more is taken, until who sends it cannot send any more."""
    with Client(proxy) as client:
        proxy.arm("choke", "request", 2)
        client.send(b"abcd")
        assert client.gets(b"ab")
        client._socket.settimeout(0.1)
        with pytest.raises(builtins.TimeoutError):
            client.send(b"x" * 8_000_000)


def test_a_fault_that_strikes_again(proxy: FaultProxy) -> None:
    """A fault may strike several times, each at that byte after the one before."""
    proxy.arm("drop", "request", 1, times=2)
    with Client(proxy) as one, Client(proxy) as other:
        one.send(b"abcd")
        assert one.gets(b"acd")
        other.send(b"efgh")
        assert other.gets(b"egh")
        one.send(b"ij")
        assert one.gets(b"ij")


# What the gates make of faults


_PAYLOADS = {"user": "John Doe", "count": "41"}
_HELD = {"user": b"John Doe", "count": b"41"}
_TRY = 0.2  # seconds that a client waits for one reply

LOST = (ConnectionError, TimeoutError)


class Scene:
    """A server, empty, and a gate that reaches it through a proxy."""

    def __init__(self, flavour: Flavour, server: Server, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self.client = server.client()
        self.direct = SessionGate(self.client, sign_key=SIGN_KEY)
        self.gate = flavour.gate_from_url(f"redis://127.0.0.1:{proxy.port}?socket_timeout={_TRY}")
        with self.client.pipeline() as pipeline:
            for script in vars(scripts).values():
                if isinstance(script, scripts.Script):
                    pipeline.script_load(script.source)
            pipeline.execute()
        # A connection is there.
        with pytest.raises(SessionNotFoundError):
            self.gate.touch(a_token())

    def start(self, case: "Case") -> str:
        """The token of a session with two payloads."""
        return self.direct.start(300, _PAYLOADS, subject=case.subject)

    def sessions(self) -> int:
        """How many there are; each ends some time, as everything does."""
        keys = cast("list[bytes]", self.client.keys())
        assert all(self.client.pttl(key) > 0 for key in keys)
        sessions = [key for key in keys if key.startswith(b"sg-session:{")]
        return sum(self.client.hexists(key, "fp") for key in sessions)


class Case(NamedTuple):
    """A call on a session, and whether the session is left as by one that ran once."""

    name: str
    call: Callable[[SessionGate, str], object]
    ran_once: Callable[[Scene, str, object], bool]
    subject: str | None = None


def has_begun(scene: Scene, _: str, returned: object) -> bool:
    token = cast("str", returned)
    assert scene.direct.pall(token) == _HELD
    return (scene.sessions(), scene.direct.info(token).generation) == (2, 0)


def was_renewed(scene: Scene, token: str, returned: object) -> bool:
    infos = [scene.direct.info(cast("str", returned)), scene.direct.info(token)]  # in its grace
    return [scene.sessions(), *(info.generation for info in infos)] == [1, 1, 1]


def has_signed_in(scene: Scene, token: str, returned: object) -> bool:
    new = scene.direct.info(cast("str", returned))
    assert [info.id for info in scene.direct.sessions("alice")] == [new.id]
    with pytest.raises(SessionNotFoundError):
        scene.direct.touch(token)
    return (scene.sessions(), new.generation, new.subject) == (1, 1, "alice")


def is_over(scene: Scene, _: str, returned: object) -> bool:
    return returned is None and scene.sessions() == 0


def holds(expected: object = None, **payloads: bytes) -> Callable[[Scene, str, object], bool]:
    def held(scene: Scene, token: str, returned: object) -> bool:
        return returned in (expected, None) and scene.direct.pall(token) == payloads

    return held


# What is sent again when its reply was lost ...
REPEATED = [
    Case("start", lambda gate, _: gate.start(300, _PAYLOADS), has_begun),
    Case(
        "start of a subject's",
        lambda gate, _: gate.start(300, _PAYLOADS, subject="alice"),
        has_begun,
        "alice",
    ),
    Case("renew", lambda gate, token: gate.renew(token), was_renewed),
    Case("sign in", lambda gate, token: gate.renew(token, subject="alice"), has_signed_in),
    Case("pdel", lambda gate, token: gate.pdel(token, "user"), holds(count=b"41")),
    Case("end", lambda gate, token: gate.end(token), is_over),
    Case(
        "end_one",
        lambda gate, token: gate.end_one("alice", gate.verify(token)),
        is_over,
        "alice",
    ),
]
# ... and what is not.
ONCE = [
    Case(
        "pset",
        lambda gate, token: gate.pset(token, "user", "new"),
        holds(user=b"new", count=b"41"),
    ),
    Case(
        "pset if_match",
        lambda gate, token: gate.pset(token, "count", "42", if_match="41"),
        holds(user=b"John Doe", count=b"42"),
    ),
    Case(
        "pset_many",
        lambda gate, token: gate.pset_many(token, {"user": "new", "count": "0"}),
        holds(user=b"new", count=b"0"),
    ),
    Case(
        "pset_many with deletes",
        lambda gate, token: gate.pset_many(token, {"user": "new"}, delete=["count"]),
        holds(user=b"new"),
    ),
    Case(
        "pincr",
        lambda gate, token: gate.pincr(token, "count"),
        holds(42, user=b"John Doe", count=b"42"),
    ),
    Case("ppop", lambda gate, token: gate.ppop(token, "user"), holds(b"John Doe", count=b"41")),
    Case(
        "expire",
        lambda gate, token: gate.expire(token, 600),
        lambda scene, token, _: scene.direct.info(token).seconds_left > 590,
    ),
    Case(
        "end_all",
        lambda gate, _: gate.end_all("alice"),
        lambda scene, _, returned: returned in (1, None) and scene.sessions() == 0,
        "alice",
    ),
]


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


@pytest.fixture
def scene(flavour: Flavour) -> Iterator[Scene]:
    # One server: what a network loses depends on no version, and test_scripts has them all.
    server = running(CLUSTERED)
    with FaultProxy(server.port) as proxy, server.client() as client:
        client.flushall()
        yield Scene(flavour, server, proxy)


@each(REPEATED)
@pytest.mark.parametrize("offset", [0, 7])
def test_a_lost_reply_of_what_is_repeated(scene: Scene, case: Case, offset: int) -> None:
    """A call whose reply was lost is sent again, and answers and leaves what one call does."""
    token = scene.start(case)
    scene.proxy.arm("reset", "reply", offset)
    returned = case.call(scene.gate, token)
    assert scene.proxy.struck
    assert case.ran_once(scene, token, returned)


def test_an_end_that_never_arrived(flavour: Flavour, scene: Scene) -> None:
    """An end that is sent again ends nothing, and says so, if the session is not its to end."""
    old = scene.direct.start(300, subject="alice")
    token = scene.direct.renew(old, grace=0)
    scene.proxy.arm("reset", "request", 30)
    with pytest.raises(SessionNotFoundError):
        scene.gate.end(old)
    assert scene.proxy.struck
    client = flavour.client(scene.proxy.port)
    other = flavour.gate(client, "the sign key of another application")
    other.sessions("alice")  # it has a connection
    scene.proxy.arm("reset", "request", 30)
    with pytest.raises(SessionNotFoundError):
        other.end_one("alice", scene.direct.verify(token))
    assert scene.proxy.struck
    scene.direct.touch(token)


@pytest.mark.parametrize("end", ["end_one", "end_all"])
def test_a_start_whose_session_was_ended_meanwhile(scene: Scene, end: str) -> None:
    """A start that is sent again does not open that session again which somebody found and ended.

    It opens another one: it was under way all the time.
    """
    scene.proxy.arm("stall", "reply", 0)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(scene.gate.start, 300, _PAYLOADS, subject="alice")
        deadline = time.monotonic() + _TRY
        while not (infos := scene.direct.sessions("alice")):
            assert time.monotonic() < deadline
        if end == "end_one":
            scene.direct.end_one("alice", infos[0].id)
        else:
            assert scene.direct.end_all("alice") == 1
        token = starting.result()
    ended = infos[0].id
    assert [info.id for info in scene.direct.sessions("alice")] == [scene.direct.verify(token)]
    assert not scene.client.exists(f"sg-session:{{{ended}}}")
    assert scene.direct.pall(token) == _HELD


@each(REPEATED)
def test_a_ghost_of_what_is_repeated(scene: Scene, case: Case) -> None:
    """What was held up in the network and arrives behind its own repetition does nothing more."""
    token = scene.start(case)
    scene.proxy.arm("stall", "request", 30)
    returned = case.call(scene.gate, token)
    assert case.ran_once(scene, token, returned)
    scene.proxy.release(ghost=True)
    assert case.ran_once(scene, token, returned)


ENDS: dict[str, Callable[[SessionGate, str], object]] = {
    "end": lambda gate, token: gate.end(token),
    "expire": lambda gate, token: gate.expire(token, 0),
    "end_all": lambda gate, _: gate.end_all("alice"),
}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    ("end", "subject"), [("end", None), ("expire", "alice"), ("end_all", "alice")]
)
def test_a_ghost_of_start_brings_nothing_back(
    scene: Scene, end: str, subject: str | None, times: int
) -> None:
    """A start that arrives late does not bring back a session that was ended meanwhile."""
    scene.proxy.arm("stall", "request", 30, times=times)
    token = scene.gate.start(300, _PAYLOADS, subject=subject)
    assert scene.direct.pall(token) == _HELD
    ENDS[end](scene.direct, token)
    assert scene.sessions() == 0
    scene.proxy.release(ghost=True)
    assert scene.sessions() == 0
    with pytest.raises(SessionNotFoundError):
        scene.gate.pget(token, "user")
    assert scene.direct.sessions("alice") == []


def test_a_ghost_of_a_sign_in_brings_nothing_back(scene: Scene) -> None:
    """A sign-in that arrives late does not bring back the session when it ended meanwhile."""
    scene.proxy.arm("stall", "request", 30)
    token = scene.gate.renew(scene.direct.start(300, _PAYLOADS), subject="alice")
    scene.direct.end(token)
    scene.proxy.release(ghost=True)
    assert scene.sessions() == 0


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("ttl", [None, 100])
def test_a_ghost_of_pdel_deletes_nothing_new(scene: Scene, ttl: int | None, times: int) -> None:
    """A pdel that arrives late leaves alone what was stored after its repetition ran."""
    token = scene.direct.start(300, {"user": "x"})
    scene.proxy.arm("stall", "request", 30, times=times)
    scene.gate.pdel(token, "user")
    assert scene.direct.pall(token) == {}
    scene.direct.pset(token, "user", "new", ttl=ttl)
    scene.proxy.release(ghost=True)
    assert scene.direct.pall(token) == {"user": b"new"}


def test_a_ghost_of_pdel_that_found_nothing(scene: Scene) -> None:
    """A pdel that arrives late deletes nothing if its repetition had found nothing to delete."""
    token = scene.direct.start(300)
    scene.proxy.arm("stall", "request", 30)
    with pytest.raises(PayloadNotFoundError):
        scene.gate.pdel(token, "user")
    scene.direct.pset(token, "user", "new")
    scene.proxy.release(ghost=True)
    assert scene.direct.pall(token) == {"user": b"new"}


def test_a_ghost_of_start_that_was_refused(flavour: Flavour, scene: Scene) -> None:
    """A start that arrives late opens nothing if its repetition was refused."""
    url = f"redis://127.0.0.1:{scene.proxy.port}?socket_timeout={_TRY}"
    gate = flavour.gate_from_url(url, max_sessions=1, on_overflow="reject")
    token = gate.start(300, subject="alice")
    scene.proxy.arm("stall", "request", 30)
    with pytest.raises(TooManySessionsError):
        gate.start(300, subject="alice")
    assert scene.proxy.struck
    scene.direct.end_one("alice", scene.direct.verify(token))
    scene.proxy.release(ghost=True)
    assert scene.direct.sessions("alice") == []
    assert scene.sessions() == 0


def test_a_ghost_of_renew_takes_nothing_back(scene: Scene) -> None:
    """A renewal that arrives late leaves the token current that was renewed since."""
    token = scene.direct.start(300)
    scene.proxy.arm("stall", "request", 30)
    successor = scene.gate.renew(token)
    latest = scene.direct.renew(successor)
    scene.proxy.release(ghost=True)
    assert scene.direct.info(latest).generation == 2
    assert scene.direct.renew(successor) == latest


@each(ONCE)
@pytest.mark.parametrize("fault", ["reset", "stall"])
def test_a_lost_reply_of_what_is_not_repeated(scene: Scene, case: Case, fault: Fault) -> None:
    """What must not run twice is sent once, and its caller is told that the reply was lost."""
    token = scene.start(case)
    scene.proxy.arm(None)
    case.call(scene.gate, token)
    size = scene.proxy.passed.request
    # The last reply is lost: an operation may first ask for what it needs.
    last = scene.proxy.passed.reply - 1
    scene.client.flushall()
    token = scene.start(case)
    scene.proxy.arm(fault, "reply", last)
    with pytest.raises(ConnectionError if fault == "reset" else TimeoutError) as caught:
        case.call(scene.gate, token)
    assert type(caught.value) in LOST
    assert scene.proxy.passed.request == size
    assert case.ran_once(scene, token, None)


@pytest.fixture(scope="module")
def replicated() -> Iterator[Server]:
    """A server with one replica."""
    binary = running(CLUSTERED).binary
    with (
        Server(binary, ("--repl-diskless-sync-delay", "0")) as primary,
        Server(binary, ("--slaveof", "127.0.0.1", str(primary.port))),
        primary.client() as client,
    ):
        deadline = time.monotonic() + 20
        while client.set("ready", "1") and client.wait(1, 100) < 1:
            assert time.monotonic() < deadline
        yield primary


class Failover(Proxy):
    """Leads to a successor from the reply on that the next operation of that script has."""

    script: scripts.Script | None = None
    successor = 0

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.alter = self._fail_over

    def _fail_over(self, data: bytes) -> bytes:
        script = self.script
        if script and not data.startswith(b"-") and script.sha.encode() in self.requests[-1]:
            self.script = None
            self._upstream = self.successor
            self.cut_replies = 1
        return data


# An operation of one step or more, and the script that does its work.
_WAITED_FOR: dict[str, tuple[scripts.Script, Callable[[SessionGate, str], object]]] = {
    "start": (scripts.START, lambda gate, _: gate.start(300, min_replicas=1)),
    "start of a subject's": (
        scripts.ENROLL,
        lambda gate, _: gate.start(300, subject="alice", min_replicas=1),
    ),
    "sign in": (
        scripts.ENROLL,
        lambda gate, token: gate.renew(token, subject="alice", min_replicas=1),
    ),
    "renew": (scripts.RENEW, lambda gate, token: gate.renew(token, min_replicas=1)),
    "expire": (scripts.EXPIRE, lambda gate, token: gate.expire(token, 0, min_replicas=1)),
    "end": (scripts.END, lambda gate, token: gate.end(token, min_replicas=1)),
    "end_all": (scripts.END_ALL, lambda gate, _: gate.end_all("alice", min_replicas=1)),
    "end_all of none": (scripts.INDEX, lambda gate, _: gate.end_all("bob", min_replicas=1)),
}


@pytest.mark.parametrize("name", _WAITED_FOR)
def test_replicas_of_another_server_do_not_count(
    scene: Scene, flavour: Flavour, replicated: Server, name: str
) -> None:
    """A write is on no replica if another server takes over before it is: not on those of that."""
    script, call = _WAITED_FOR[name]
    token = scene.direct.start(300, subject="alice")
    with Failover(scene.client.connection_pool.connection_kwargs["port"]) as proxy:
        gate = flavour.gate_from_url(f"redis://127.0.0.1:{proxy.port}", timeout=2.0)
        gate.touch(token)
        proxy.successor, proxy.script = replicated.port, script
        with pytest.raises(UnderReplicatedError) as caught:
            call(gate, token)
        assert proxy.script is None
    assert caught.value.replicas == 0


@pytest.mark.parametrize("fault", ["duplicate", "drop"])
def test_a_damaged_count_of_replicas(flavour: Flavour, replicated: Server, fault: Fault) -> None:
    """No byte too many or too few makes two replicas of the one that has a write."""
    with FaultProxy(replicated.port) as proxy:
        options = {"timeout": 0.25, "min_replicas": 2}
        gate = flavour.gate_from_url(f"redis://127.0.0.1:{proxy.port}", **options)
        token = SessionGate(replicated.client(), sign_key=SIGN_KEY).start(300)

        def replicas() -> int:
            with pytest.raises(UnderReplicatedError) as caught:
                gate.pset(token, "user", "x")
            return caught.value.replicas

        replicas()  # the script is known
        proxy.arm(None)
        assert replicas() == 1
        end = proxy.passed.reply  # of ":1\r\n"
        for offset in range(end - 4, end):
            replicas()  # there is a connection
            proxy.arm(fault, "reply", offset)
            assert replicas() <= 1
            assert proxy.struck


# How long a call may take


_DEADLINE = 0.4
_TOLERANCE = 0.25
_OFTEN = 1_000


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """The call raises redis-py's error for a lost reply, and before its deadline is over."""
    begun = time.monotonic()
    with pytest.raises(LOST) as caught:
        yield
    assert time.monotonic() - begun < _DEADLINE + _TOLERANCE
    assert type(caught.value) in LOST


DEADLINE_CALLS: dict[str, Callable[[SessionGate, str], object]] = {
    "repeated": lambda gate, token: gate.pget(token, "user"),
    "once": lambda gate, token: gate.pincr(token, "count"),
}


class Hurried(NamedTuple):
    """A gate with a deadline that is connected through a proxy, and the token of a session."""

    proxy: FaultProxy
    gate: SessionGate
    token: str

    def fails_in_time(self, call: Callable[[SessionGate, str], object]) -> None:
        """The call raises in time, and the next one works."""
        with in_time():
            call(self.gate, self.token)
        assert self.proxy.struck
        self.proxy.arm(None)
        assert self.gate.pget(self.token, "user") == b"John Doe"


@pytest.fixture(params=["url"])
def hurried(request: pytest.FixtureRequest, flavour: Flavour) -> Iterator[Hurried]:
    with FaultProxy(running(CLUSTERED).port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}"
        if request.param == "application":
            gate = flavour.gate(flavour.client(proxy.port), timeout=_DEADLINE)
        elif request.param == "socket_timeout":
            gate = flavour.gate_from_url(f"{url}?socket_timeout=0.1", timeout=_DEADLINE)
        else:
            gate = flavour.gate_from_url(url, timeout=_DEADLINE)
        yield Hurried(proxy, gate, gate.start(300, _PAYLOADS))


@pytest.mark.parametrize("call", DEADLINE_CALLS)
@pytest.mark.parametrize(
    ("fault", "direction", "offset"),
    [
        ("stall", "request", 30),
        ("stall", "reply", 0),
        ("stall", "reply", 5),
        ("trickle", "reply", 0),
        ("trickle", "request", 0),
        ("reset", "request", 30),
    ],
)
def test_no_call_outlives_its_deadline(
    hurried: Hurried, call: str, fault: Fault, direction: Direction, offset: int
) -> None:
    """Whatever the network does to each try, a call returns in time, and the next one works."""
    hurried.proxy.arm(fault, direction, offset, pause=0.1, times=_OFTEN)
    hurried.fails_in_time(DEADLINE_CALLS[call])


@pytest.mark.parametrize("call", DEADLINE_CALLS)
@pytest.mark.parametrize("fault", ["stall", "trickle"])
@pytest.mark.parametrize("hurried", ["application", "socket_timeout"], indirect=True)
def test_no_call_takes_longer_for_its_client(hurried: Hurried, call: str, fault: Fault) -> None:
    """A client with timeouts for each reply, or with retries of its own, changes no deadline."""
    hurried.proxy.arm(fault, "reply", 0, pause=0.08, times=_OFTEN)
    hurried.fails_in_time(DEADLINE_CALLS[call])


def test_a_request_that_nobody_takes(hurried: Hurried) -> None:
    """A request too big for what the network holds is given up in time as well."""
    data = b"x" * 8_000_000
    hurried.proxy.arm("choke", "request", 1_000, times=_OFTEN)
    hurried.fails_in_time(lambda gate, token: gate.pset(token, "user", data))


@pytest.mark.parametrize("call", DEADLINE_CALLS)
@pytest.mark.parametrize("offset", [0, 50])
def test_a_server_that_accepts_and_says_nothing(flavour: Flavour, call: str, offset: int) -> None:
    """A call returns in time if its connection is accepted, and is never ready."""
    with FaultProxy(running(CLUSTERED).port) as proxy:
        gate = flavour.gate_from_url(f"redis://127.0.0.1:{proxy.port}/1", timeout=_DEADLINE)
        token = a_token()
        proxy.arm("stall", "request", offset, times=_OFTEN)
        with in_time():
            DEADLINE_CALLS[call](gate, token)
        assert proxy.struck


@pytest.mark.parametrize("call", DEADLINE_CALLS)
def test_a_server_that_does_not_accept(flavour: Flavour, call: str) -> None:
    """A call returns in time if no connection can be made."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port = full.getsockname()[1]
        for _ in range(3):  # now the system answers nobody for it
            other = stack.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(("127.0.0.1", port))
        gate = flavour.gate_from_url(f"redis://127.0.0.1:{port}", timeout=_DEADLINE)
        token = a_token()
        with in_time():
            DEADLINE_CALLS[call](gate, token)


def a_token() -> str:
    """One of a session that no server holds."""
    return SessionGate.from_url("memory://", sign_key=SIGN_KEY).start(300)


@pytest.mark.parametrize("auto_pipeline", [True, False])
def test_each_of_many_callers_has_a_deadline_of_its_own(auto_pipeline: bool) -> None:
    """Who calls while others already wait returns in time too, counted from its own call."""
    token = a_token()

    async def call(gate: AsyncSessionGate, after: float) -> None:
        await asyncio.sleep(after)
        with in_time():
            await gate.pget(token, "user")

    async def call_all(port: int) -> None:
        async with AsyncSessionGate.from_url(
            f"redis://127.0.0.1:{port}",
            sign_key=SIGN_KEY,
            timeout=_DEADLINE,
            auto_pipeline=auto_pipeline,
        ) as gate:
            await asyncio.gather(*(call(gate, 0.03 * number) for number in range(20)))

    with FaultProxy(running(CLUSTERED).port) as proxy:
        for direction in DIRECTIONS:
            proxy.arm("stall", direction, 20, times=_OFTEN)
            asyncio.run(call_all(proxy.port))
