"""How long a session lives: its ttl, its idle timeout, what is use of it, and what info tells."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import cast

import pytest
from redis import Redis
from redis.exceptions import OutOfMemoryError

from sessiongate import (
    ArgumentError,
    MalformedTokenError,
    PayloadConflictError,
    PayloadNotFoundError,
    PayloadTypeError,
    SessionGate,
    SessionInfo,
    SessionNotFoundError,
)
from sessiongate.tokens import SignKeyRing

from .conftest import SIGN_KEY, Backend, Flavour
from .servers import Server

# What a script does, which both gates send: see `conftest`.
OF_SCRIPTS = True

CENTURY = 100 * 365 * 86_400
TOKEN = SignKeyRing(SIGN_KEY).sign("A" * 16)[0]

# How time passes is told in the scripts alone, which both gates share.
one_gate = pytest.mark.parametrize("flavour", ["sync"], indirect=True)

Use = Callable[[SessionGate, str], object]

# Every operation that leaves the session there, on one with the payload `user` that holds 1.
USES: dict[str, Use] = {
    "touch": lambda gate, token: gate.touch(token),
    "info": lambda gate, token: gate.info(token),
    "renew": lambda gate, token: gate.renew(token),
    "expire": lambda gate, token: gate.expire(token, 400),
    "pset": lambda gate, token: gate.pset(token, "user", "2"),
    "pset if_absent": lambda gate, token: gate.pset(token, "new", "2", if_absent=True),
    "pset if_match": lambda gate, token: gate.pset(token, "user", "2", if_match="1"),
    "pset ttl": lambda gate, token: gate.pset(token, "user", "2", ttl=300),
    "pset ttl 0": lambda gate, token: gate.pset(token, "user", "2", ttl=0),
    "pset_many": lambda gate, token: gate.pset_many(token, {"user": "2"}),
    "pset_many of none": lambda gate, token: gate.pset_many(token, {}),
    "pset_many of deletes": lambda gate, token: gate.pset_many(token, {}, delete=["user"]),
    "open": lambda gate, token: gate._run(gate._commands.open(gate._commands.session(token), None)),
    "pget": lambda gate, token: gate.pget(token, "user"),
    "pget_many": lambda gate, token: gate.pget_many(token, ["user"]),
    "pget_many of none": lambda gate, token: gate.pget_many(token, []),
    "pall": lambda gate, token: gate.pall(token),
    "pdel": lambda gate, token: gate.pdel(token, "user"),
    "ppop": lambda gate, token: gate.ppop(token, "user"),
    "pincr": lambda gate, token: gate.pincr(token, "user"),
}
# What the session's state refuses is use as well.
REFUSED: list[tuple[type[Exception], Use]] = [
    (PayloadNotFoundError, lambda gate, token: gate.pget(token, "nothing")),
    (PayloadNotFoundError, lambda gate, token: gate.pdel(token, "nothing")),
    (PayloadNotFoundError, lambda gate, token: gate.ppop(token, "nothing")),
    (PayloadTypeError, lambda gate, token: gate.pincr(token, "text")),
    (PayloadConflictError, lambda gate, token: gate.pset(token, "user", "2", if_absent=True)),
    (PayloadConflictError, lambda gate, token: gate.pset(token, "user", "2", if_match="2")),
]
NO_USES: dict[str, Use] = {
    "verify": lambda gate, token: gate.verify(token),
    "sessions": lambda gate, _: gate.sessions("alice"),
    "end_all": lambda gate, token: gate.end_all("alice", keep=token),
    "another start": lambda gate, _: gate.start(300, subject="alice"),
}


def key_of(gate: SessionGate, token: str) -> str:
    return f"sg-session:{{{gate.verify(token)}}}"


def left_ms(client: Redis, gate: SessionGate, token: str) -> int:
    """What is left of the session's Redis key, in ms; -2 if there is none. That is no use."""
    return int(client.pttl(key_of(gate, token)))


def age(client: Redis, gate: SessionGate, token: str, left: float) -> None:
    """Let the session be as if it had not been used until there are so many seconds left."""
    assert client.pexpire(key_of(gate, token), int(left * 1000))


def assert_about(ms: float, seconds: float) -> None:
    """So many seconds from now, of which a slow machine may have used up some."""
    assert seconds * 1000 - 4_000 < ms <= seconds * 1000


@pytest.fixture
def client(backend: Backend) -> Redis:
    """A client to look into the backend with."""
    return backend.client()


@pytest.fixture
def unsent(flavour: Flavour) -> SessionGate:
    """A gate that would fail to send anything: nobody listens there."""
    return flavour.gate(flavour.client(1, retry=flavour.no_retry))


# Use.


def test_every_operation_is_use(client: Redis, gate: SessionGate) -> None:
    """After any operation on a session its idle timeout begins anew, and its ttl does not."""
    for name, use in USES.items():
        token = gate.start(300, {"user": "1"}, idle_timeout=100)
        assert_about(left_ms(client, gate, token), 100)
        ends = gate.info(token).expires_at
        age(client, gate, token, 50)
        use(gate, token)
        assert_about(left_ms(client, gate, token), 100)
        if name != "expire":
            assert gate.info(token).expires_at == ends


def test_what_is_refused_is_use(client: Redis, gate: SessionGate) -> None:
    """An operation that the payloads refuse is use of the session all the same."""
    for error, use in REFUSED:
        token = gate.start(300, {"user": "1", "text": "x"}, idle_timeout=100)
        age(client, gate, token, 50)
        with pytest.raises(error):
            use(gate, token)
        assert_about(left_ms(client, gate, token), 100)


def test_every_operation_with_a_token_in_its_grace_is_use(client: Redis, gate: SessionGate) -> None:
    """An old token in its grace uses the session like the new one."""
    for use in USES.values():
        token = gate.start(300, {"user": "1"}, idle_timeout=100)
        gate.renew(token)
        age(client, gate, token, 50)
        use(gate, token)
        assert_about(left_ms(client, gate, token), 100)


def test_what_is_no_use(client: Redis, gate: SessionGate) -> None:
    """To verify a token, to list a subject's sessions or to spare one is no use of it."""
    for look in NO_USES.values():
        token = gate.start(300, {"user": "1"}, subject="alice", idle_timeout=100)
        age(client, gate, token, 50)
        look(gate, token)
        assert_about(left_ms(client, gate, token), 50)
        gate.end(token)


def test_signing_in_is_use(client: Redis, gate: SessionGate) -> None:
    """A session that somebody signs in to is used by that."""
    token = gate.start(300, {"user": "1"}, idle_timeout=100)
    age(client, gate, token, 50)
    token = gate.renew(token, subject="alice")
    assert_about(left_ms(client, gate, token), 100)


def test_touch_does_nothing_else(client: Redis, gate: SessionGate) -> None:
    """To touch a session changes nothing that Redis holds but its end, and that only if idle."""
    for idle_timeout in (None, 100):
        token = gate.start(300, {"user": "1"}, subject="alice", idle_timeout=idle_timeout)
        key = key_of(gate, token)
        before = client.hgetall(key)
        age(client, gate, token, 50)
        assert gate.touch(token) is None  # type: ignore[func-returns-value]  # nothing else is returned
        assert client.hgetall(key) == before
        assert_about(left_ms(client, gate, token), idle_timeout or 50)
    gate.end(token)
    with pytest.raises(SessionNotFoundError):
        gate.touch(token)
    with pytest.raises(MalformedTokenError):
        gate.touch("x")


def test_use_does_not_move_the_end(client: Redis, gate: SessionGate) -> None:
    """Use never lets a session live beyond its ttl, whichever of ttl and idle timeout is longer."""
    for ttl, idle_timeout in ((60, 100), (100, 100), (100, 60)):
        token = gate.start(ttl, {"user": "1"}, idle_timeout=idle_timeout)
        assert_about(left_ms(client, gate, token), min(ttl, idle_timeout))
        for name, use in USES.items():
            if name in ("pget", "touch", "pset_many", "pall"):
                age(client, gate, token, 20)
                use(gate, token)
                assert_about(left_ms(client, gate, token), min(ttl, idle_timeout))
        # Just before the end use goes on to that end: as if the ttl were nearly over.
        own = cast("bytes", client.hget(key_of(gate, token), "fp"))
        ends = int(time.time() * 1000) + 9_000
        client.hset(key_of(gate, token), "fp", own[:32] + b"%d" % ends + own[45:])
        age(client, gate, token, 5)
        gate.touch(token)
        assert_about(left_ms(client, gate, token), 9)
        gate.touch(token)
        assert_about(left_ms(client, gate, token), 9)
    plain = gate.start(100, {"user": "1"})
    age(client, gate, plain, 20)
    gate.touch(plain)
    assert_about(left_ms(client, gate, plain), 20)


def test_use_is_written_once_per_tenth(client: Redis, gate: SessionGate) -> None:
    """Within the first tenth of the idle timeout use leaves the end where it was."""
    token = gate.start(300, {"user": "1"}, idle_timeout=100)
    age(client, gate, token, 94)
    for name in ("touch", "pget", "pall", "info", "pget_many"):
        USES[name](gate, token)
        assert_about(left_ms(client, gate, token), 94)
    age(client, gate, token, 89)
    gate.touch(token)
    assert left_ms(client, gate, token) > 95_000


def test_expire_moves_the_end_of_an_idle_session(client: Redis, gate: SessionGate) -> None:
    """After expire the ttl is another, and the idle timeout holds as before."""
    for subject in (None, "alice"):
        token = gate.start(300, {"user": "1"}, subject=subject, idle_timeout=100)
        for ttl in (500, 30, timedelta(minutes=50), 100, 7 * 86_400):
            gate.expire(token, ttl)
            seconds = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
            assert_about(left_ms(client, gate, token), min(seconds, 100))
            info = gate.info(token)
            assert_about((info.expires_at - datetime.now(UTC)).total_seconds() * 1000, seconds)
            assert info.idle_timeout == 100
            age(client, gate, token, 10)
            gate.touch(token)
            assert_about(left_ms(client, gate, token), min(seconds, 100))
        gate.expire(token, 0)
        with pytest.raises(SessionNotFoundError):
            gate.touch(token)


# With real time.


@one_gate
def test_idle_sessions_end(client: Redis, gate: SessionGate) -> None:
    """A session ends when it was not used for its idle timeout, and when its ttl is over."""
    options = {"payloads": {"user": "1"}, "idle_timeout": 1}

    def start(ttl: int = 300, **more: object) -> str:
        return gate.start(ttl, **{**options, **more})  # type: ignore[arg-type]  # options are start's own

    used = {name: (start(), use) for name, use in USES.items()}
    ending = start(1, idle_timeout=300)
    unused, verified, listed = start(), start(), start(subject="alice")
    prolonged = start(1)
    gate.expire(prolonged, 300)
    shortened = start()
    gate.expire(shortened, 1)
    renewed = gate.renew(start())
    signed_in = gate.renew(start(), subject="bob")
    to_its_end = start(2)
    begun = time.monotonic()  # all of them have
    moved = [prolonged, renewed, signed_in, to_its_end]

    def sleep_until(seconds: float) -> None:
        time.sleep(max(0, begun + seconds - time.monotonic()))

    def dead(*tokens: str) -> bool:
        return all(left_ms(client, gate, token) == -2 for token in tokens)

    sleep_until(0.5)
    for token, use in used.values():
        use(gate, token)
    for token in (ending, shortened, *moved):
        gate.touch(token)
    gate.verify(verified)
    assert [info.id for info in gate.sessions("alice")] == [gate.verify(listed)]
    sleep_until(1.25)
    assert [name for name, (token, _) in used.items() if dead(token)] == []
    for token in moved:
        gate.touch(token)
    assert dead(unused, verified, listed, ending, shortened)
    for token in (unused, ending):
        with pytest.raises(SessionNotFoundError):
            gate.touch(token)
    assert gate.sessions("alice") == []
    sleep_until(1.85)
    assert dead(*(token for token, _ in used.values()))
    for token in moved:
        gate.touch(token)
    sleep_until(2.3)
    assert dead(to_its_end)
    assert not any(dead(token) for token in moved[:-1])


class Replicated:
    """A server with a replica, and what it has written to the replica so far."""

    def __init__(self, primary: Server) -> None:
        self._client = primary.client()
        self.settle()

    def settle(self) -> None:
        """Wait until the replica is there and what is under way has been written."""
        deadline = time.monotonic() + 20
        while self._client.info("replication").get("slave0", {}).get("state") != "online":
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def offset(self) -> int:
        return int(self._client.info("replication")["master_repl_offset"])


@pytest.fixture
def replicated(own_server: Server) -> Iterator[Replicated]:
    """A server of this test alone, with a replica that it does not ping."""
    client = own_server.client()
    client.config_set("repl-diskless-sync-delay", 0)
    client.config_set("repl-ping-slave-period", 3_600)
    with Server(own_server.binary, ("--slaveof", "127.0.0.1", str(own_server.port))):
        yield Replicated(own_server)


READS = [name for name in USES if name.startswith(("touch", "info", "open", "pget", "pall"))]


@one_gate
def test_use_costs_a_write_once_per_tenth_of_the_idle_timeout(
    flavour: Flavour, own_server: Server, replicated: Replicated
) -> None:
    """Reads leave the replication offset where it was, but for one in a tenth of the timeout."""
    gate = flavour.gate(flavour.client(own_server.port))
    client = own_server.client()
    plain = gate.start(300, {"user": "1"})
    token = gate.start(300, {"user": "1"}, subject="alice", idle_timeout=100)
    # Redis 4 hands each script on to its replicas, once.
    for name in READS * 2:
        USES[name](gate, plain)
    before = replicated.offset()
    for name in READS * 2:
        USES[name](gate, token)
        USES[name](gate, plain)
        with pytest.raises(PayloadNotFoundError):
            gate.pget(token, "nothing")
    assert replicated.offset() == before
    gate.pset(token, "user", "2")
    assert replicated.offset() > before  # so a write is seen

    client.pexpire(key_of(gate, token), 94_000)
    before = replicated.offset()
    for name in READS:
        USES[name](gate, token)
    assert replicated.offset() == before

    for name in READS:
        client.pexpire(key_of(gate, token), 89_000)
        before = replicated.offset()
        USES[name](gate, token)
        noted = replicated.offset()
        assert noted > before
        for other in READS:
            USES[other](gate, token)
        assert replicated.offset() == noted

    # In real time: a second is ten tenths.
    token = gate.start(300, {"user": "1"}, idle_timeout=1)
    offsets = set()
    begun = time.monotonic()
    while (passed := time.monotonic() - begun) < 1.2:
        gate.pget(token, "user")
        offsets.add(replicated.offset())
    assert 3 <= len(offsets) <= 1 + passed * 10


# What info tells.


def test_info_of_a_plain_session(gate: SessionGate) -> None:
    """Info tells id, times with their zone, sizes of payloads, and None for what there is not."""
    before = datetime.now(UTC) - timedelta(seconds=1)
    token = gate.start(300, {"user": "žluť", "cart": b"\x00" * 100_000, "fp": "x"})
    gate.pset(token, "timed", "12345", ttl=100)
    info = gate.info(token)
    after = datetime.now(UTC) + timedelta(seconds=1)
    assert isinstance(info, SessionInfo)
    assert info.id == gate.verify(token)
    assert info.subject is None
    assert info.idle_timeout is None
    assert info.generation == 0
    assert info.payloads == {"user": 6, "cart": 100_000, "fp": 1, "timed": 5}
    for moment in (info.created_at, info.expires_at):
        assert moment.utcoffset() == timedelta(0)
    assert before <= info.created_at <= after
    ttl = timedelta(seconds=300)
    assert abs(info.expires_at - info.created_at - ttl) < timedelta(seconds=0.05)
    assert isinstance(info.seconds_left, float)
    assert_about(info.seconds_left * 1000, 300)


def test_info_of_a_session_with_everything(gate: SessionGate) -> None:
    """Info tells subject, idle timeout, generation, and for how long it goes on if not used."""
    token = gate.start(300, subject="žluť", idle_timeout=timedelta(seconds=100))
    for _ in range(11):
        token = gate.renew(token)
    info = gate.info(token)
    assert (info.id, info.subject, info.idle_timeout) == (gate.verify(token), "žluť", 100)
    assert info.generation == 11
    assert info.payloads == {}
    assert_about(info.seconds_left * 1000, 100)
    assert_about((info.expires_at - datetime.now(UTC)).total_seconds() * 1000, 300)
    gate.expire(token, 30)
    later = gate.info(token)
    assert_about(later.seconds_left * 1000, 30)
    assert_about((later.expires_at - datetime.now(UTC)).total_seconds() * 1000, 30)
    assert later.created_at == info.created_at


def test_created_at_never_moves(gate: SessionGate) -> None:
    """When a session was started is told to the millisecond, whatever happened to it since."""
    for options in ({}, {"subject": "alice"}, {"idle_timeout": 100}):
        token = gate.start(300, {"user": "1"}, **options)
        created_at = gate.info(token).created_at
        for use in USES.values():
            if use is not USES["pdel"]:
                gate.pset(token, "user", "1")
                gate.pset(token, "new", "1", ttl=0)
                use(gate, token)
        assert gate.info(token).created_at == created_at
        # Not on an even second, but for one start in a thousand.
    starts = [gate.info(gate.start(300)).created_at.microsecond for _ in range(3)]
    assert any(starts)
    assert not any(microsecond % 1_000 for microsecond in starts)


def test_info_of_a_session_that_is_not_there(gate: SessionGate) -> None:
    """Of a session that ended nothing is told, and what is no token is refused."""
    token = gate.start(300)
    gate.end(token)
    with pytest.raises(SessionNotFoundError):
        gate.info(token)
    with pytest.raises(MalformedTokenError):
        gate.info("x")


def test_the_longest_life(client: Redis, gate: SessionGate) -> None:
    """A hundred years of ttl and idle timeout are kept to the second."""
    token = gate.start(CENTURY, idle_timeout=CENTURY)
    assert_about(left_ms(client, gate, token), CENTURY)
    age(client, gate, token, 100)
    info = gate.info(token)
    assert info.idle_timeout == CENTURY
    assert abs(info.expires_at - info.created_at - timedelta(seconds=CENTURY)) < timedelta(
        milliseconds=2
    )
    assert_about(left_ms(client, gate, token), CENTURY)


def test_a_ttl_of_0_with_options(client: Redis, gate: SessionGate) -> None:
    """A session that is over at once leaves nothing, with an idle timeout and a subject too."""
    for subject in (None, "alice"):
        token = gate.start(0, {"user": "1"}, subject=subject, idle_timeout=100)
        with pytest.raises(SessionNotFoundError):
            gate.touch(token)
    assert client.keys() == []


# Limits.


@pytest.mark.parametrize(
    "idle_timeout",
    [
        0,
        -1,
        CENTURY + 1,
        True,
        False,
        1.0,
        float("nan"),
        "100",
        b"100",
        [],
        timedelta(0),
        timedelta(seconds=-1),
        timedelta(milliseconds=1500),
        timedelta(microseconds=1),
        timedelta.max,
    ],
    ids=repr,
)
def test_an_idle_timeout_out_of_its_limits(unsent: SessionGate, idle_timeout: object) -> None:
    """An idle timeout is a whole number of seconds, 1 to 100 years, or nothing is sent."""
    for subject in (None, "alice"):
        with pytest.raises(ArgumentError, match=r"^idle_timeout is "):
            unsent.start(300, subject=subject, idle_timeout=idle_timeout)  # type: ignore[arg-type]  # what a type checker would refuse


@pytest.mark.parametrize(
    "grace",
    [-1, CENTURY + 1, True, 1.0, "10", timedelta(seconds=-1), timedelta(milliseconds=1500)],
    ids=repr,
)
def test_a_grace_out_of_its_limits(unsent: SessionGate, grace: object) -> None:
    """A grace is a whole number of seconds, 0 to 100 years, or nothing is sent."""
    for subject in (None, "alice"):
        with pytest.raises(ArgumentError, match=r"^grace is "):
            unsent.renew(TOKEN, grace=grace, subject=subject)  # type: ignore[arg-type]  # what a type checker would refuse


@pytest.mark.parametrize(
    "subject", ["", "s" * 201, "é" * 101, "\ud800", b"alice", 7, ["alice"], True], ids=repr
)
def test_a_subject_out_of_its_limits(unsent: SessionGate, subject: object) -> None:
    """A subject is 1 to 200 bytes of text for every operation, or nothing is sent."""
    for call in (
        lambda: unsent.start(300, subject=subject),  # type: ignore[arg-type]  # what a type checker would refuse
        lambda: unsent.renew(TOKEN, subject=subject),  # type: ignore[arg-type]  # likewise
        lambda: unsent.sessions(subject),  # type: ignore[arg-type]  # likewise
        lambda: unsent.end_all(subject),  # type: ignore[arg-type]  # likewise
        lambda: unsent.end_one(subject, "A" * 16),  # type: ignore[arg-type]  # likewise
    ):
        with pytest.raises(ArgumentError, match=r"^subject (is|must be) "):
            call()


def test_a_subject_that_is_missing(unsent: SessionGate) -> None:
    """None is no subject to list or to end, and is not taken for everybody."""
    for call in (
        lambda: unsent.sessions(None),  # type: ignore[arg-type]  # what a type checker would refuse
        lambda: unsent.end_all(None),  # type: ignore[arg-type]  # likewise
        lambda: unsent.end_one(None, "A" * 16),  # type: ignore[arg-type]  # likewise
    ):
        with pytest.raises(ArgumentError, match=r"^subject (is|must be) "):
            call()


@pytest.mark.parametrize(
    "write",
    [
        lambda gate, token: gate.pset(token, "new", "x"),
        lambda gate, token: gate.pset(token, "new", "x", ttl=100),
        lambda gate, token: gate.pset_many(token, {"new": "x"}),
        lambda gate, token: gate.pincr(token, "new"),
        lambda gate, token: gate.renew(token),
        lambda gate, token: gate.renew(token, subject="alice"),
    ],
    ids=["pset", "pset ttl", "pset_many", "pincr", "renew", "renew subject"],
)
@one_gate
def test_use_is_no_way_around_a_full_server(
    flavour: Flavour, own_server: Server, write: Callable[[SessionGate, str], object]
) -> None:
    """A full server refuses what takes memory, in a session too whose use is due to be noted."""
    gate = flavour.gate(flavour.client(own_server.port))
    token = gate.start(300, {"user": "1"}, idle_timeout=100)
    with own_server.client() as client:
        client.config_set("maxmemory", "1")
        client.pexpire(key_of(gate, token), 50_000)
        with pytest.raises(OutOfMemoryError):
            write(gate, token)
        assert gate.pall(token) == {"user": b"1"}
        assert client.pttl(key_of(gate, token)) > 99_000
    assert gate.info(token).generation == 0
