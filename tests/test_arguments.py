"""What is refused before anything is sent: ttl, names, data, prefixes, clients and URLs."""

import array
import enum
import pickle
from collections import Counter
from datetime import timedelta

import pytest
import redis
from fakeredis import FakeRedis
from hypothesis import given
from hypothesis import strategies as st
from nacl.utils import random as system_random

import sessiongate
from sessiongate import (
    ArgumentError,
    ConfigurationError,
    GateClosedError,
    IdTakenError,
    PayloadNotFoundError,
    SessionGate,
    SessionGateError,
    SessionNotFoundError,
)
from sessiongate.arguments import ttl_arg
from sessiongate.keyspace import Keyspace

from .servers import NO_RETRY

KEY = "k" * 32
CENTURY = 100 * 365 * 86_400


@pytest.fixture
def gate() -> SessionGate:
    """A gate that would fail to send anything: nobody listens there."""
    return SessionGate(redis.Redis(port=1, retry=NO_RETRY), sign_key=KEY)


@pytest.fixture
def token() -> str:
    """A genuine token for `gate`."""
    return SessionGate.from_url("memory://", sign_key=KEY).start(300)


class Level(enum.IntEnum):
    """An int under another name."""

    FIVE = 5


@pytest.mark.parametrize(
    "ttl",
    [
        -1,
        CENTURY + 1,
        2**63,
        10**30,
        True,
        False,
        1.0,
        0.5,
        float("nan"),
        "300",
        b"300",
        None,
        [],
        timedelta(seconds=-1),
        timedelta(milliseconds=1500),
        timedelta(days=36_501),
        timedelta.max,
    ],
    ids=repr,
)
def test_a_ttl_out_of_its_limits(gate: SessionGate, token: str, ttl: object) -> None:
    """A ttl that is negative, no whole number, a bool or over 100 years is refused."""
    with pytest.raises(ArgumentError, match="ttl"):
        gate.start(ttl)  # type: ignore[arg-type]  # what a type checker would refuse
    with pytest.raises(ArgumentError, match="ttl"):
        gate.expire(token, ttl)  # type: ignore[arg-type]  # what a type checker would refuse


@pytest.mark.parametrize("name", ["", "n" * 201, "é" * 101, "\ud800", b"user", None, 7], ids=repr)
def test_a_name_out_of_its_limits(gate: SessionGate, token: str, name: object) -> None:
    """A payload's name of 0 or over 200 bytes of UTF-8, or that is no text, is refused."""
    for call in (
        lambda: gate.start(300, {name: "x"}),  # type: ignore[dict-item]  # what a type checker would refuse
        lambda: gate.pset(token, name, "x"),  # type: ignore[arg-type]  # likewise
        lambda: gate.pget(token, name),  # type: ignore[arg-type]  # likewise
        lambda: gate.pdel(token, name),  # type: ignore[arg-type]  # likewise
    ):
        with pytest.raises(ArgumentError, match="name"):
            call()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        "",
        bytearray(),
        b"x" * 8_000_001,
        "é" * 4_000_001,
        "\ud800",
        None,
        7,
        1.5,
        ["x"],
        {"x": 1},
    ],
    ids=lambda data: repr(data)[:20],
)
def test_data_out_of_its_limits(gate: SessionGate, token: str, data: object) -> None:
    """Data of 0 or over 8,000,000 bytes, or that is neither bytes-like nor text, is refused."""
    with pytest.raises(ArgumentError, match="data"):
        gate.pset(token, "user", data)  # type: ignore[arg-type]  # what a type checker would refuse
    with pytest.raises(ArgumentError, match="data"):
        gate.start(300, {"fine": "x", "user": data})  # type: ignore[dict-item]  # likewise


def test_refused_text_is_in_no_error() -> None:
    """Data that cannot be encoded is neither in the error nor in what led to it."""
    gate = SessionGate.from_url("memory://", sign_key=KEY)
    with pytest.raises(ArgumentError) as caught:
        gate.pset(gate.start(300), "user", "secret\ud800")
    assert caught.value.__context__ is None
    assert "secret" not in str(caught.value)


def test_the_token_is_judged_first(gate: SessionGate) -> None:
    """With a forged token and a bad argument, it is the token that is reported."""
    with pytest.raises(sessiongate.MalformedTokenError):
        gate.pset("forged", "", b"")


@pytest.mark.parametrize(
    "data",
    [
        b"ab",
        bytearray(b"ab"),
        memoryview(b"ab"),
        memoryview(b"a-b-")[::2],
        array.array("B", b"ab"),
        "ab",
    ],
    ids=repr,
)
def test_what_counts_as_data(data: bytes) -> None:
    """Bytes, whatever else has a buffer, and text are data."""
    gate = SessionGate.from_url("memory://", sign_key=KEY)
    assert gate.pget(gate.start(300, {"user": data}), "user") == b"ab"


@given(st.integers(0, CENTURY))
def test_a_ttl_in_its_limits(ttl: int) -> None:
    """Every whole number of seconds up to 100 years is sent in decimal, a timedelta alike."""
    assert ttl_arg(ttl) == str(ttl).encode()
    assert ttl_arg(timedelta(seconds=ttl)) == str(ttl).encode()


def test_an_int_under_another_name_is_a_ttl() -> None:
    """An IntEnum is sent as its number."""
    assert ttl_arg(Level.FIVE) == b"5"


@pytest.mark.parametrize(
    "prefix", ["", "a{b", "a}b", "{app}", "p" * 201, "\ud800", b"sg", None, 7], ids=repr
)
def test_a_prefix_that_cannot_be_used(prefix: object) -> None:
    """A prefix is 1 to 200 bytes of text without braces, which would move the hash tag."""
    with pytest.raises(ConfigurationError, match="prefix"):
        SessionGate(FakeRedis(), sign_key=KEY, prefix=prefix)  # type: ignore[arg-type]  # what a type checker would refuse


def test_a_client_that_cannot_be_used() -> None:
    """What is no synchronous redis-py client is refused when the gate is made."""
    for client in (None, "redis://localhost", redis.asyncio.Redis(), redis.Redis().pipeline()):
        with pytest.raises(ConfigurationError, match="client"):
            SessionGate(client, sign_key=KEY)  # type: ignore[arg-type]  # what a type checker would refuse


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost",
        "localhost:6379",
        "http://localhost",
        "redis:/localhost",
        "memory",
        "memory://x",
        "redis://:hunter2@localhost:port/0",
        "redis://:hunter2@localhost/0?socket_timeout=soon",
        "redis://:hunter2@localhost/0?nonsense=1",
        "redis://:hunter2@localhost/0?socket_connect_timeout=-1",
        "redis://:hunter2@localhost/0?protocol=9",
        "redis://:hunter2@localhost/zero",
        "redis://:hunter2@a..b/0",
        "rediss://:hunter2@localhost/0?ssl_cert_reqs=zz",
        None,
        7,
    ],
    ids=repr,
)
def test_a_url_that_cannot_be_used(url: object) -> None:
    """A URL that leads nowhere is refused at once, and its password is not in the error."""
    with pytest.raises(ConfigurationError) as caught:
        SessionGate.from_url(url, sign_key=KEY).start(300)  # type: ignore[arg-type]  # what a type checker would refuse
    error: BaseException | None = caught.value
    while error:
        assert "hunter2" not in str(error)
        error = error.__context__


def test_ids_are_drawn_without_bias() -> None:
    """Every letter of an id is as likely as any other."""
    letters = "".join(Keyspace("sg", system_random).new_id() for _ in range(20_000))
    counts = Counter(letters)
    assert len(counts) == 62
    # 320,000 letters, 5,161 of each expected, standard deviation 71: 6 of them either way.
    assert all(4_730 < count < 5_590 for count in counts.values())


def test_every_random_byte_gives_a_letter_or_none() -> None:
    """The 248 bytes that divide evenly by 62 map to letters four times each, the rest to none."""
    drawn: Counter[str] = Counter()
    for byte in range(248):
        source = bytes([byte]) * 32
        drawn[Keyspace("sg", lambda _, source=source: source).new_id()] += 1  # type: ignore[misc]  # the default binds it
    assert set(drawn.values()) == {4}
    rest = iter([bytes(range(248, 256)) * 4, b"A" * 32])
    assert (
        Keyspace("sg", lambda _: next(rest)).new_id() == Keyspace("sg", lambda n: b"A" * n).new_id()
    )


def test_a_closed_gate_says_so() -> None:
    """After close every call is refused with an error that says so; verifying still works."""
    with SessionGate.from_url("memory://", sign_key=KEY) as gate:
        token = gate.start(300)
    for call in (
        lambda: gate.start(300),
        lambda: gate.pget(token, "user"),
        lambda: gate.end(token),
    ):
        with pytest.raises(GateClosedError, match="closed"):
            call()
    assert gate.verify(token)
    gate.close()


def test_closing_a_gate_leaves_the_applications_client_open() -> None:
    """A client that the application brought goes on working after its gate was closed."""
    client = FakeRedis()
    connection = client.connection_pool.get_connection()
    client.connection_pool.release(connection)
    SessionGate(client, sign_key=KEY).close()
    assert connection._sock is not None


def test_closing_a_gate_closes_its_own_connections() -> None:
    """The connections of a gate from a URL are closed with it."""
    gate = SessionGate.from_url("memory://", sign_key=KEY)
    gate.start(300)
    (connection,) = gate._client.connection_pool._available_connections
    gate.close()
    assert connection._sock is None


def test_the_tree_of_errors() -> None:
    """Every error is exported, under one root, and drawn in the root's docstring."""
    errors = [
        value
        for value in vars(sessiongate).values()
        if isinstance(value, type)
        and issubclass(value, Exception)
        and not issubclass(value, Warning)
    ]
    assert all(issubclass(error, SessionGateError) for error in errors)
    assert all(error.__name__ in (SessionGateError.__doc__ or "") for error in errors)
    assert all(error.__name__ in sessiongate.__all__ for error in errors)
    invalid = [error for error in errors if issubclass(error, sessiongate.InvalidSessionError)]
    assert {error.__name__ for error in invalid} == {
        "InvalidSessionError",
        "InvalidTokenError",
        "MalformedTokenError",
        "BadSignatureError",
        "SessionNotFoundError",
    }
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(PayloadNotFoundError, LookupError)


@pytest.mark.parametrize(
    "error",
    [
        SessionNotFoundError("A" * 16),
        PayloadNotFoundError("user"),
        ArgumentError("x"),
        GateClosedError(),
        IdTakenError(),
    ],
    ids=repr,
)
def test_errors_survive_pickling(error: SessionGateError) -> None:
    """An error can be sent between processes, attributes included."""
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
