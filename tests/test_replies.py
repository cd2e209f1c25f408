"""What comes back: replies are bound to requests, and no fault of Redis becomes a wrong answer."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import cast

import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import (
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,
)

from sessiongate import PayloadNotFoundError, SessionGate, SessionNotFoundError, wire
from sessiongate.lane import Lane
from sessiongate.lines import Lines

from .conftest import CLUSTERED, SIGN_KEY, Backend, Blocking, Flavour
from .proxy import Proxy
from .servers import Server


@contextmanager
def paused(server: Server, seconds: float) -> Iterator[None]:
    """The server stands still, and goes on by itself after some time."""
    server.pause()
    timer = threading.Timer(seconds, server.resume)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def soil(flavour: Flavour, gate: SessionGate, *command: object) -> None:
    """Leave a reply unread on the connection that the gate uses next, as if interrupted."""
    if not flavour.is_async:
        assert isinstance(gate._channel, Lines)
        connection, _ = gate._channel._take(float("inf"))
        connection.send_command(*command)
        gate._channel._idle.append(connection)
        return

    async def soil_async() -> None:
        awaited = cast("Blocking", gate).awaited
        if isinstance(awaited._channel, Lane):
            await awaited._channel._connection.send_command(*command)
            return
        assert isinstance(awaited._client, AsyncRedis)
        pool = awaited._client.connection_pool
        connection = await pool.get_connection()
        await connection.send_command(*command)
        await pool.release(connection)

    flavour.runner.run(soil_async())


# Every operation, called so that it succeeds on a session with the payload `user`.
OPERATIONS: list[Callable[[SessionGate, str], object]] = [
    lambda gate, _: gate.start(300),
    lambda gate, token: gate.expire(token, 300),
    lambda gate, token: gate.pset(token, "user", "new"),
    lambda gate, token: gate.pget(token, "user"),
    lambda gate, token: gate.pdel(token, "user"),
    lambda gate, token: gate.end(token),
]
# Those that are sent again after a lost reply: they can tell what they did themselves.
REPEATED = [OPERATIONS[number] for number in (0, 3, 4, 5)]


def test_a_dirty_connection_hands_over_nothing(flavour: Flavour, server: Server) -> None:
    """A connection on which another's reply is still to come is dropped, that reply with it."""
    gate = flavour.gate(flavour.client(server.port, max_connections=1))
    mine, other = gate.start(300, {"user": "mine"}), gate.start(300, {"user": "theirs"})
    assert gate.pget(other, "user") == b"theirs"  # the server knows the script now
    command = gate._commands.pget(other, "user")
    request = ("EVALSHA", command.script.sha, 1, *command.keys, *command.args, wire.new_echo())
    with paused(server, 0.3):
        soil(flavour, gate, *request)
        # pget asks once more on a new connection.
        assert gate.pget(mine, "user") == b"mine"
    assert gate.pget(mine, "user") == b"mine"


@pytest.mark.parametrize("reply", ["data", "error", "nil", "foreign", "no script", "read only"])
@pytest.mark.parametrize("number", range(1, 6))
def test_no_operation_takes_a_foreign_reply(
    flavour: Flavour, server: Server, number: int, reply: str
) -> None:
    """Whatever reply lies in wait on a connection, no operation takes it for its own."""
    gate = flavour.gate(flavour.client(server.port, max_connections=1))
    for operation in OPERATIONS:  # the server knows the scripts now
        operation(gate, gate.start(300, {"user": "x"}))
    token = gate.start(300, {"user": "mine"})
    server.client().set("foreign", b"x" * 30)
    requests: dict[str, tuple[object, ...]] = {
        "data": ("GET", "foreign"),
        "nil": ("GET", "nothing"),
        "error": ("EVAL", "return redis.error_reply('NOSESSION abcdefghijkl')", 0),
        "no script": ("EVALSHA", "f" * 40, 0),
        "read only": ("EVAL", "return redis.error_reply('READONLY secret of another')", 0),
        "foreign": ("EVAL", "return 'abcdefghijkl'", 0),
    }
    with paused(server, 0.06):
        soil(flavour, gate, *requests[reply])
        if OPERATIONS[number] in REPEATED:
            OPERATIONS[number](gate, token)
        else:
            with pytest.raises(ConnectionError, match="belongs to another request"):
                OPERATIONS[number](gate, token)
    # Whatever became of the operation, the next one has a connection of its own.
    assert gate.pget(gate.start(300, {"user": "later"}), "user") == b"later"


class StopError(Exception):
    """What a signal handler raises, as a worker's own timeout does."""


def test_an_interrupted_read_hands_over_nothing(server: Server) -> None:
    """A signal in the middle of a read leaves no reply for the next caller."""
    gate = SessionGate(Redis(port=server.port, protocol=2, max_connections=1), sign_key=SIGN_KEY)
    mine, other = gate.start(300, {"user": "mine"}), gate.start(300, {"user": "theirs"})

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise StopError

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(3):
            with paused(server, 0.15):
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                with pytest.raises(StopError):
                    gate.pget(other, "user")
                assert gate.pget(mine, "user") == b"mine"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings(
    # redis-py leaves a socket to the garbage collector if it is interrupted while it connects.
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_interrupts_at_any_moment_hand_over_nothing(server: Server) -> None:
    """Two thousand calls interrupted at random moments never show one session another's data."""
    # A connection may be lost between two instructions, so there is more than one.
    client = Redis(port=server.port, protocol=2, max_connections=1_000)
    gate = SessionGate(client, sign_key=SIGN_KEY)
    tokens = {f"{n}".encode(): gate.start(300, {"user": f"{n}"}) for n in range(20)}

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise StopError

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for turn in range(2_000):
            data, token = list(tokens.items())[turn % len(tokens)]
            got = data
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.000_02 + turn % 50 * 0.000_005)
                    got = gate.pget(token, "user")
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except Exception:  # noqa: BLE001  # redis-py turns some interrupts into other errors
                interrupted += 1
            assert got == data
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 200
    for data, token in tokens.items():
        assert gate.pget(token, "user") == data


def test_a_start_whose_reply_was_lost(flavour: Flavour, server: Server) -> None:
    """A start that ran and whose reply was lost is repeated, and made one session."""
    with Proxy(server.port) as proxy:
        gate = flavour.gate(flavour.client(proxy.port, retry=flavour.no_retry))
        gate.start(300)
        server.client().flushall()
        proxy.cut_replies = 1
        token = gate.start(300, {"user": "x"})
        assert proxy.cut_replies == 0
    assert server.client().keys() == [f"sg-session:{{{gate.verify(token)}}}".encode()]
    assert flavour.gate(flavour.client(server.port)).pget(token, "user") == b"x"


def test_a_repeated_start_is_no_way_into_another_session(flavour: Flavour, server: Server) -> None:
    """A repeated start takes over no session of another sign key: another id is drawn."""
    theirs = SessionGate(server.client(), sign_key="t" * 32, random=lambda n: b"A" * n)
    token = theirs.start(300, {"user": "theirs"})
    letters = iter([b"A", b"B"])
    with Proxy(server.port) as proxy:
        gate = flavour.gate(
            flavour.client(proxy.port, retry=flavour.no_retry),
            random=lambda n: next(letters) * n,
        )
        with pytest.raises(SessionNotFoundError):  # warms up the connection
            gate.pget(gate._commands._ring.sign("Z" * 16)[0], "user")
        proxy.cut_replies = 1
        ours = gate.start(300, {"user": "ours"})
    assert gate.verify(ours) != theirs.verify(token)
    assert theirs.pget(token, "user") == b"theirs"


@pytest.mark.parametrize("number", [1, 2])
def test_what_may_have_run_is_not_repeated(flavour: Flavour, server: Server, number: int) -> None:
    """When the reply of a write is lost, the caller is told and nothing runs twice."""
    with Proxy(server.port) as proxy:
        gate = flavour.gate(flavour.client(proxy.port, retry=flavour.no_retry))
        token = gate.start(300, {"user": "x"})
        sent = len(proxy.requests)
        proxy.cut_replies = 1
        with pytest.raises(ConnectionError):
            OPERATIONS[number](gate, token)
        assert proxy.cut_replies == 0
        assert len([r for r in proxy.requests[sent:] if b"EVALSHA" in r]) == 1


def test_redis_pys_own_retries_are_not_used(flavour: Flavour, server: Server) -> None:
    """A client that retries ten times, as redis.Redis() does, sends a write of ours once."""
    with Proxy(server.port) as proxy:
        gate = flavour.gate(flavour.client(proxy.port))
        token = gate.start(300, {"user": "x"})
        sent = len(proxy.requests)
        proxy.cut_replies = 1
        with pytest.raises(ConnectionError):
            gate.pset(token, "user", "y")
        assert len([r for r in proxy.requests[sent:] if b"EVALSHA" in r]) == 1


def test_scripts_that_the_server_forgot(backend: Backend) -> None:
    """After SCRIPT FLUSH every operation runs as if nothing had happened, and only once."""
    gate, client = backend.gate(), backend.client()
    for number, operation in enumerate(OPERATIONS):
        token = gate.start(300, {"user": "x"})
        client.script_flush()
        operation(gate, token)
        if number:  # a second start is a second session
            client.script_flush()
            if number in (4, 5):
                with pytest.raises((PayloadNotFoundError, SessionNotFoundError)):
                    operation(gate, token)


def test_a_server_that_was_restarted(flavour: Flavour, own_server: Server) -> None:
    """After a restart the sessions are gone, which is said, and the gate goes on working."""
    gate = flavour.gate(flavour.client(own_server.port))
    token = gate.start(300, {"user": "x"})
    own_server.restart()
    with pytest.raises(SessionNotFoundError):
        gate.pget(token, "user")
    assert gate.pget(gate.start(300, {"user": "y"}), "user") == b"y"


def test_a_connection_that_the_server_closed(flavour: Flavour, server: Server) -> None:
    """A connection that was closed while nobody used it is replaced before a write is sent."""
    gate = flavour.gate(flavour.client(server.port, retry=flavour.no_retry))
    token = gate.start(300, {"user": "x"})
    gate.pset(token, "user", "y")
    with server.client() as client:
        for number in range(3):
            assert client.client_kill_filter(_type="normal", skipme=True)
            flavour.runner.run(asyncio.sleep(0.01))  # until this end has heard of it
            gate.pset(token, "user", f"{number}")
    assert gate.pget(token, "user") == b"2"


def test_sessions_outlive_a_restart_with_persistence(flavour: Flavour, own_server: Server) -> None:
    """With an append-only file sessions survive a restart, and their end does not move."""
    client = own_server.client()
    gate = flavour.gate(flavour.client(own_server.port))
    client.config_set("appendonly", "yes")
    token = gate.start(100, {"user": "x"})
    gate.pset(token, "user", "z")
    gate.expire(token, 200)
    client.config_set("appendfsync", "always")
    time.sleep(0.7)
    own_server.kill()
    own_server.start(("--appendonly", "yes"))
    assert gate.pget(token, "user") == b"z"
    # A relative ttl would begin anew when the file is read.
    assert 190_000 < client.pttl(f"sg-session:{{{gate.verify(token)}}}") < 199_300


def test_sessions_are_on_the_replica(flavour: Flavour, own_server: Server) -> None:
    """A replica holds the same sessions, with the same end to the millisecond."""
    own_server.client().config_set("repl-diskless-sync-delay", 0)
    with Server(own_server.binary, ("--slaveof", "127.0.0.1", str(own_server.port))) as replica:
        gate = flavour.gate(flavour.client(own_server.port))
        copy = replica.client()
        deadline = time.monotonic() + 15
        while own_server.client().info("replication")["connected_slaves"] == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        token = gate.start(100, {"user": "x", "cart": "y"})
        gate.pset(token, "user", "z" * 100)
        gate.pdel(token, "cart")
        gate.expire(token, 200)
        ended = gate.start(100)
        gate.end(ended)
        assert own_server.client().wait(1, 5_000) >= 0
        key = f"sg-session:{{{gate.verify(token)}}}"
        while copy.hgetall(key) != own_server.client().hgetall(key) or copy.dbsize() != 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        lag = own_server.client().pttl(key) - copy.pttl(key)
        assert abs(lag) < 50


@pytest.mark.parametrize("server", [CLUSTERED] if CLUSTERED else [], indirect=True)
def test_a_server_that_is_not_there(flavour: Flavour, server: Server) -> None:
    """A server that cannot be reached is redis-py's connection error, never a missing session."""
    token = flavour.gate(flavour.client(server.port)).start(300)
    gate = flavour.gate(flavour.client(1, retry=flavour.no_retry))
    for operation in OPERATIONS:
        with pytest.raises(ConnectionError):
            operation(gate, token)


def test_a_server_that_does_not_answer(flavour: Flavour, server: Server) -> None:
    """A server that stands still is redis-py's timeout, and the next call gets its own reply."""
    options = {"socket_timeout": 0.1, "max_connections": 1, "retry": flavour.no_retry}
    gate = flavour.gate(flavour.client(server.port, **options))
    for operation in OPERATIONS[1:3]:
        token = gate.start(300, {"user": "x"})
        with paused(server, 0.3), pytest.raises(TimeoutError):
            operation(gate, token)
    assert gate.pget(gate.start(300, {"user": "y"}), "user") == b"y"


def test_a_server_that_is_full(flavour: Flavour, own_server: Server) -> None:
    """Out of memory is redis-py's OutOfMemoryError; sessions stay readable and can be ended."""
    client = own_server.client()
    gate = flavour.gate(flavour.client(own_server.port))
    token = gate.start(300, {"user": "x"})
    client.config_set("maxmemory", "1")
    for call in (lambda: gate.start(300), lambda: gate.pset(token, "user", "y")):
        with pytest.raises(OutOfMemoryError) as caught:
            call()
        assert str(caught.value) == "command not allowed when used memory > 'maxmemory'."
    assert gate.pget(token, "user") == b"x"
    gate.expire(token, 200)
    gate.pdel(token, "user")
    gate.end(token)
    client.config_set("maxmemory", "0")
    assert client.keys() == []


# What is evicted under a script is the server's choice, whichever gate sent it.
@pytest.mark.parametrize("flavour", ["sync"], indirect=True)
@pytest.mark.parametrize(
    "policy", ["allkeys-random", "volatile-random", "volatile-ttl", "allkeys-lru"]
)
def test_eviction_leaves_no_session_without_an_end(
    flavour: Flavour, own_server: Server, policy: str
) -> None:
    """Under eviction a session may vanish, but none is left without a ttl or a fingerprint."""
    client = own_server.client()
    gate = flavour.gate(flavour.client(own_server.port))
    gate.start(300)
    client.config_set("maxmemory-policy", policy)
    client.config_set("maxmemory", str(client.info("memory")["used_memory"] + 400_000))
    tokens: list[str] = []
    for turn in range(1_500):
        try:
            tokens.append(gate.start(300, {"user": "x" * 200}))
            gate.pset(tokens[turn * 7 % len(tokens)], f"p{turn}", "y" * 300)
        except SessionNotFoundError:
            pass
        except (OutOfMemoryError, IndexError, ZeroDivisionError):
            pytest.fail("an evicting server is never full")
    client.config_set("maxmemory", "0")
    assert client.info("stats")["evicted_keys"] > 100
    for key in client.scan_iter():
        assert client.pttl(key) > 0
        assert client.hget(key, "fp")


def test_a_replica_is_read_only(flavour: Flavour, own_server: Server) -> None:
    """A primary that became a replica is redis-py's ReadOnlyError, on every version of Redis."""
    client = own_server.client()
    gate = flavour.gate(flavour.client(own_server.port))
    token = gate.start(300, {"user": "x"})
    client.execute_command("SLAVEOF", "127.0.0.1", "1")
    for operation in (*OPERATIONS[:3], *OPERATIONS[4:]):
        with pytest.raises(ReadOnlyError, match=r"^You can't write against a read only"):
            operation(gate, token)
    client.execute_command("SLAVEOF", "NO", "ONE")
    gate.end(token)


def test_a_connection_to_a_replica_is_dropped(flavour: Flavour, own_server: Server) -> None:
    """After a read-only error the next call connects anew, where it may find the new primary."""
    gate = flavour.gate(flavour.client(own_server.port))
    token = gate.start(300, {"user": "x"})
    client = own_server.client()
    client.execute_command("SLAVEOF", "127.0.0.1", "1")
    before = client.info("stats")["total_connections_received"]
    for _ in range(3):
        with pytest.raises(ReadOnlyError):
            gate.pset(token, "user", "y")
    assert client.info("stats")["total_connections_received"] >= before + 2


def test_a_start_that_cannot_set_an_end_leaves_nothing(
    flavour: Flavour, own_server: Server
) -> None:
    """If the server denies the expiry, start fails with its error and no session is left."""
    client = own_server.client()
    try:
        client.execute_command(
            "ACL", "SETUSER", "u", "on", ">p", "~*", "+@all", "-pexpireat", "-unlink"
        )
    except ResponseError:
        pytest.skip("Redis has users from version 6 on")
    gate = flavour.gate(flavour.client(own_server.port, username="u", password="p"))
    with pytest.raises(ResponseError, match=r"(?i)permission|can.t run"):
        gate.start(300, {"user": "x"})
    assert client.keys() == []


def test_an_error_of_the_server_is_itself(flavour: Flavour, server: Server) -> None:
    """An error of the server that is proven keeps its class and text, and the connection."""
    gate = flavour.gate(flavour.client(server.port, max_connections=1))
    broken = gate._commands._ring.sign("P" * 16)[0]
    client = server.client()
    client.set(f"sg-session:{{{'P' * 16}}}", "not a hash")
    before = 0
    for _ in range(3):
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            gate.pget(broken, "user")
        received = client.info("stats")["total_connections_received"]
        assert before in (0, received)
        before = received


def test_a_foreign_key_is_left_alone(backend: Backend) -> None:
    """Something else at a session's key is redis-py's error, and start takes another id."""
    client = backend.client()
    letters = iter([b"A", b"B"])
    gate = backend.gate(random=lambda n: next(letters) * n)
    taken = backend.gate(random=lambda n: b"A" * n)
    key = b"sg-session:{%b}" % taken._commands._keyspace.new_id().encode()
    client.set(key, "not a session")
    token = gate.start(300)
    assert client.get(key) == b"not a session"
    guessed = gate._commands._ring.sign(key[12:28].decode())[0]
    for operation in OPERATIONS[1:]:
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            operation(gate, guessed)
    gate.end(token)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_round_trip(
    flavour: Flavour, server: Server, operation: Callable[[SessionGate, str], object]
) -> None:
    """Every operation is one request and one reply, once its script is known."""
    with Proxy(server.port) as proxy:
        gate = flavour.gate(flavour.client(proxy.port))
        operation(gate, gate.start(300, {"user": "x"}))
        token = gate.start(300, {"user": "x"})
        sent = len(proxy.requests)
        operation(gate, token)
        assert len(proxy.requests) == sent + 1


def test_echoes_differ() -> None:
    """No two requests have the same echo, in one process or after a fork."""
    mine = {wire.new_echo() for _ in range(10_000)}
    assert len(mine) == 10_000
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"".join(wire.new_echo() for _ in range(1_000)))
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reading, 12_000)
    os.close(reading)
    os.close(writing)
    assert len(theirs) == 12_000
    assert mine.isdisjoint(theirs[n : n + 12] for n in range(0, 12_000, 12))
