"""Payloads that concurrent requests share: several at once, conditions, counters, own ends."""

import time
from collections.abc import Callable
from datetime import timedelta
from itertools import product
from typing import cast

import pytest
from redis import Redis
from redis.exceptions import ConnectionError, OutOfMemoryError

from sessiongate import (
    ArgumentError,
    MalformedTokenError,
    PayloadConflictError,
    PayloadNotFoundError,
    PayloadOverflowError,
    PayloadTypeError,
    SessionGate,
    SessionNotFoundError,
)
from sessiongate.tokens import SignKeyRing

from .conftest import SIGN_KEY, Backend, Flavour
from .proxy import Proxy
from .servers import Server

# What a script does, which both gates send: see `conftest`.
OF_SCRIPTS = True

Call = Callable[[SessionGate, str], object]

# How time passes is told in the scripts alone, which both gates share.
one_gate = pytest.mark.parametrize("flavour", ["sync"], indirect=True)

LEAST, MOST = -(2**63), 2**63 - 1
# Names of the library's own fields, and those that its fields of payloads begin with.
ODD_NAMES = ["fp", "sub", "sum", "old", "gen", ";x", ":x", "x", ";", ":", "3:abc", "\0", "naïve"]


def fields(client: Redis, gate: SessionGate, token: str) -> dict[bytes, bytes]:
    """What Redis holds of a session."""
    held = client.hgetall(f"sg-session:{{{gate.verify(token)}}}")
    return cast("dict[bytes, bytes]", held)


def payload_fields(client: Redis, gate: SessionGate, token: str) -> set[bytes]:
    """The fields that payloads stand in, whether their time is over or not."""
    return {name for name in fields(client, gate, token) if name[:1] in (b":", b";")}


def ttl_ms(client: Redis, gate: SessionGate, token: str) -> int:
    return int(client.pttl(f"sg-session:{{{gate.verify(token)}}}"))


@pytest.fixture
def client(backend: Backend) -> Redis:
    """A client to look into the backend with."""
    return backend.client()


@pytest.fixture
def unsent(flavour: Flavour) -> SessionGate:
    """A gate that would fail to send anything: nobody listens there."""
    return flavour.gate(flavour.client(1, retry=flavour.no_retry))


TOKEN = SignKeyRing(SIGN_KEY).sign("A" * 16)[0]


# Each on a session with the payload `user` that holds 1, but for `if_absent`.
NEW_OPERATIONS: dict[str, Call] = {
    "pget_many": lambda gate, token: gate.pget_many(token, ["user"]),
    "pget_many of none": lambda gate, token: gate.pget_many(token, []),
    "pall": lambda gate, token: gate.pall(token),
    "pset_many": lambda gate, token: gate.pset_many(token, {"user": "x"}),
    "pset_many of none": lambda gate, token: gate.pset_many(token, {}),
    "if_absent": lambda gate, token: gate.pset(token, "user", "x", if_absent=True),
    "if_match": lambda gate, token: gate.pset(token, "user", "x", if_match="1"),
    "ttl": lambda gate, token: gate.pset(token, "user", "x", ttl=300),
    "ttl 0": lambda gate, token: gate.pset(token, "user", "x", ttl=0),
    "ppop": lambda gate, token: gate.ppop(token, "user"),
    "pincr": lambda gate, token: gate.pincr(token, "user"),
}


def test_a_session_that_ended_is_found_by_none(client: Redis, gate: SessionGate) -> None:
    """Every operation on a session that ended is refused, and brings nothing of it back."""
    token = gate.start(300, {"user": "1"})
    gate.end(token)
    for operation in NEW_OPERATIONS.values():
        with pytest.raises(SessionNotFoundError) as caught:
            operation(gate, token)
        assert caught.value.session_id == gate.verify(token)
        with pytest.raises(MalformedTokenError):
            operation(gate, token + "x")
    assert client.keys() == []


def test_none_opens_a_session_of_another_sign_key(
    backend: Backend, client: Redis, gate: SessionGate
) -> None:
    """With a guessed id and another sign key every operation finds no session and changes none."""
    token = gate.start(300, {"user": "1"})
    other = backend.gate("another sign key, of 32 bytes too")
    guessed = other._commands._ring.sign(gate.verify(token))[0]
    before = fields(client, gate, token)
    for operation in NEW_OPERATIONS.values():
        with pytest.raises(SessionNotFoundError):
            operation(other, guessed)
    assert fields(client, gate, token) == before


def test_none_moves_the_end_of_the_session(client: Redis, gate: SessionGate) -> None:
    """Reading, storing and counting payloads leaves the session's ttl as it is."""
    for name, operation in NEW_OPERATIONS.items():
        token = gate.start(100, {} if name == "if_absent" else {"user": "1"})
        operation(gate, token)
        assert 95_000 < ttl_ms(client, gate, token) <= 100_000


def test_a_lost_reply(flavour: Flavour, server: Server) -> None:
    """What was read is read again when its reply was lost; a change is reported, and made once."""
    looking = flavour.gate(flavour.client(server.port))
    with Proxy(server.port) as proxy:
        gate = flavour.gate(flavour.client(proxy.port, retry=flavour.no_retry))
        for name, operation in NEW_OPERATIONS.items():
            # Warms up the connection, and makes the scripts known.
            token, first = (
                gate.start(300, {} if name == "if_absent" else {"user": "1"}) for _ in range(2)
            )
            operation(gate, first)
            sent = len(proxy.requests)
            proxy.cut_replies = 1
            if name.startswith(("pget", "pall")):
                assert operation(gate, token) == operation(looking, token)
            else:
                with pytest.raises(ConnectionError):
                    operation(gate, token)
                assert len([r for r in proxy.requests[sent:] if b"EVALSHA" in r]) == 1
            assert proxy.cut_replies == 0
            if name == "pincr":
                assert looking.pget(token, "user") == b"2"


# Several at once.


def test_pget_many_reads_what_is_there(gate: SessionGate) -> None:
    """Each payload asked for comes once, in the order asked; those not there are left out."""
    token = gate.start(300, {"a": "1", "b": b"\x00\xff", "c": "3"})
    read = gate.pget_many(token, ["c", "nothing", "b", "c", "a", "nothing", "b"])
    assert list(read.items()) == [("c", b"3"), ("b", b"\x00\xff"), ("a", b"1")]
    assert gate.pget_many(token, (name for name in ["b"])) == {"b": b"\x00\xff"}
    assert gate.pget_many(token, {"a"}) == {"a": b"1"}
    assert gate.pget_many(token, ["nothing"]) == {}


def test_pget_many_of_none(gate: SessionGate) -> None:
    """Asking for no payload returns none, of a session that is there."""
    token = gate.start(300, {"a": "1"})
    assert gate.pget_many(token, []) == {}
    gate.end(token)
    with pytest.raises(SessionNotFoundError):
        gate.pget_many(token, [])


@pytest.mark.parametrize("names", ["user", b"user", None, 7, ["user", ""], ["user", 7]], ids=repr)
def test_what_are_no_names(unsent: SessionGate, names: object) -> None:
    """Names that are no list of them, or of which one is out of its limits, are refused."""
    with pytest.raises(ArgumentError, match="name"):
        unsent.pget_many(TOKEN, names)  # type: ignore[arg-type]  # what a type checker would refuse


def test_pall_reads_all_payloads(gate: SessionGate) -> None:
    """All payloads come, whatever is in their names and data, and nothing of the library's own."""
    stored = {name: f"data of {name}".encode() for name in ODD_NAMES}
    stored |= {"length": b"12:3:4", "bytes": bytes(range(256)), "big": b"x" * 100_000}
    token = gate.start(300, stored, subject="alice", idle_timeout=100)
    token = gate.renew(token)
    assert gate.pall(token) == stored
    assert gate.pget_many(token, stored) == stored
    assert gate.info(token).payloads == {name: len(data) for name, data in stored.items()}


def test_pall_of_none(gate: SessionGate) -> None:
    """A session without payloads has none, that of a subject with an idle timeout too."""
    assert gate.pall(gate.start(300)) == {}
    assert gate.pall(gate.renew(gate.start(300, subject="alice", idle_timeout=100))) == {}


@one_gate
def test_many_payloads(gate: SessionGate) -> None:
    """Ten thousand payloads go in with one pset_many and come out with one read."""
    token = gate.start(300)
    payloads = {f"p{number}": f"{number}".encode() for number in range(10_000)}
    gate.pset_many(token, payloads)
    assert gate.pall(token) == payloads
    assert gate.pget_many(token, payloads) == payloads


def test_pset_many_stores_all(gate: SessionGate) -> None:
    """Every payload of the mapping is stored as pset does; the others stay."""
    token = gate.start(300, {"kept": "1", "replaced": "long" * 100})
    gate.pset_many(token, {"replaced": b"2", "new": "žluť", "view": memoryview(b"x")})
    assert gate.pall(token) == {
        "kept": b"1",
        "replaced": b"2",
        "new": "žluť".encode(),
        "view": b"x",
    }
    gate.pset_many(token, {})
    assert len(gate.pall(token)) == 4


@pytest.mark.parametrize("bad", [{"": "x"}, {"x": ""}, {"x": None}, {7: "x"}], ids=repr)
def test_pset_many_stores_all_or_none(unsent: SessionGate, bad: dict[str, bytes]) -> None:
    """One payload out of its limits, wherever it stands, and nothing is sent."""
    for payloads in ({"old": b"2", "new": b"3", **bad}, {**bad, "old": b"2", "new": b"3"}):
        with pytest.raises(ArgumentError):
            unsent.pset_many(TOKEN, payloads)


@pytest.mark.parametrize("payloads", [None, [], (), "", [("user", "x")], "user"], ids=repr)
def test_pset_many_of_what_is_no_mapping(unsent: SessionGate, payloads: object) -> None:
    """What is no mapping of names to data is refused, None included."""
    with pytest.raises(ArgumentError, match="payloads is a mapping of names to data, not "):
        unsent.pset_many(TOKEN, payloads)  # type: ignore[arg-type]  # what a type checker would refuse


# Conditions.


def test_if_absent(gate: SessionGate) -> None:
    """A payload is stored if there is none of its name, and only the first time."""
    token = gate.start(300)
    gate.pset(token, "user", "1", if_absent=True)
    for data in ("1", "2"):
        with pytest.raises(PayloadConflictError) as caught:
            gate.pset(token, "user", data, if_absent=True)
        assert caught.value.name == "user"
    assert gate.pget(token, "user") == b"1"
    gate.pdel(token, "user")
    gate.pset(token, "user", "3", if_absent=True)
    assert gate.pget(token, "user") == b"3"


def test_if_absent_false_is_no_condition(gate: SessionGate) -> None:
    """With if_absent=False a payload is stored as ever."""
    token = gate.start(300, {"user": "1"})
    gate.pset(token, "user", "2", if_absent=False)
    assert gate.pget(token, "user") == b"2"


def test_if_match(gate: SessionGate) -> None:
    """A payload is stored if that of its name has the data given, byte for byte."""
    token = gate.start(300, {"cart": b"[\x00]"})
    for wrong in (b"[\x00", b"[\x00] ", "[]", b"\x00", "absent", "match"):
        with pytest.raises(PayloadConflictError) as caught:
            gate.pset(token, "cart", "new", if_match=wrong)
        assert caught.value.name == "cart"
        assert gate.pget(token, "cart") == b"[\x00]"
    gate.pset(token, "cart", "žluť", if_match=bytearray(b"[\x00]"))
    gate.pset(token, "cart", "last", if_match="žluť")
    assert gate.pget(token, "cart") == b"last"


def test_if_match_of_a_missing_payload(gate: SessionGate) -> None:
    """What is not there matches nothing, and is not stored."""
    token = gate.start(300)
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "cart", "x", if_match="x")
    assert gate.pall(token) == {}


def test_conditions_that_make_no_sense(unsent: SessionGate) -> None:
    """Both conditions at once, if_absent that is no bool and no data to match are refused."""
    with pytest.raises(ArgumentError, match="exclude each other"):
        unsent.pset(TOKEN, "user", "2", if_absent=True, if_match="1")
    for wrong in (1, "yes", None, 0):
        with pytest.raises(ArgumentError, match="if_absent is a bool"):
            unsent.pset(TOKEN, "user", "2", if_absent=wrong)  # type: ignore[arg-type]  # what a type checker would refuse
    for nothing in ("", b"", 7, False):
        with pytest.raises(ArgumentError, match="data of payload 'user'"):
            unsent.pset(TOKEN, "user", "2", if_match=nothing)  # type: ignore[arg-type]  # likewise


def test_conditions_and_a_ttl(client: Redis, gate: SessionGate) -> None:
    """A condition holds for a payload with an end of its own as well, as what is there and new."""
    token = gate.start(300)
    gate.pset(token, "code", "1", if_absent=True, ttl=100)
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "code", "2", if_absent=True)
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "code", "2", if_match="2", ttl=100)
    gate.pset(token, "code", "2", if_match="1", ttl=100)
    assert gate.pget(token, "code") == b"2"
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "code", "3", if_match="1", ttl=0)
    gate.pset(token, "code", "3", if_match="2", ttl=0)
    assert payload_fields(client, gate, token) == set()


# Read and delete.


def test_ppop_reads_and_deletes(gate: SessionGate) -> None:
    """A payload is handed out once; a missing one is told apart from a missing session."""
    token = gate.start(300, {"flash": b"\x00\xff", "kept": "1"})
    assert gate.ppop(token, "flash") == b"\x00\xff"
    for name in ("flash", "nothing"):
        with pytest.raises(PayloadNotFoundError) as caught:
            gate.ppop(token, name)
        assert caught.value.name == name
    assert gate.pall(token) == {"kept": b"1"}
    gate.pset(token, "flash", "again", ttl=100)
    assert gate.ppop(token, "flash") == b"again"
    with pytest.raises(PayloadNotFoundError):
        gate.ppop(token, "flash")


def test_a_session_outlives_its_last_payload_popped(gate: SessionGate) -> None:
    """A session whose last payload was popped is still there."""
    token = gate.start(300, {"flash": "x"})
    gate.ppop(token, "flash")
    gate.pset(token, "flash", "y")
    assert gate.pall(token) == {"flash": b"y"}


# Counters.


def test_pincr_counts(gate: SessionGate) -> None:
    """A counter begins at 0, goes up and down, and is a payload like any other."""
    token = gate.start(300, {"stored": "-41"})
    assert [gate.pincr(token, "visits") for _ in range(3)] == [1, 2, 3]
    assert gate.pincr(token, "visits", -5) == -2
    assert gate.pincr(token, "visits", 0) == -2
    assert gate.pincr(token, "visits", by=2) == 0
    assert gate.pincr(token, "stored") == -40
    assert gate.pincr(token, "new", 0) == 0
    assert gate.pall(token) == {"visits": b"0", "stored": b"-40", "new": b"0"}


@pytest.mark.parametrize("ttl", [None, 100])
def test_pincr_over_all_64_bits(client: Redis, gate: SessionGate, ttl: int | None) -> None:
    """Counters are exact up to both ends of 64 bits; a sum beyond leaves the counter alone."""
    token = gate.start(300)
    for end, step in ((MOST, 1), (LEAST, -1)):
        gate.pset(token, "n", f"{end - step}", ttl=ttl)
        assert gate.pincr(token, "n", step) == end
        for over in (step, MOST if step > 0 else LEAST):
            with pytest.raises(PayloadOverflowError) as caught:
                gate.pincr(token, "n", over)
            assert caught.value.name == "n"
            assert isinstance(caught.value, OverflowError)
            assert gate.pget(token, "n") == str(end).encode()
            assert set(fields(client, gate, token)) == {b"fp", b";n" if ttl else b":n"}
        assert gate.pincr(token, "n", 0) == end
        assert gate.pincr(token, "n", -end + (end < 0) * -1) == (end < 0) * -1
    assert gate.pincr(token, "least", LEAST) == LEAST
    assert gate.pincr(token, "most", MOST) == MOST
    # Doubles have 53 bits: these would be rounded.
    assert gate.pincr(token, "odd", 2**53 + 1) == 2**53 + 1
    assert gate.pincr(token, "odd", 2**60) == 2**60 + 2**53 + 1


@pytest.mark.parametrize("ttl", [None, 100])
def test_pincr_of_what_is_no_counter(client: Redis, gate: SessionGate, ttl: int | None) -> None:
    """Data that is not a decimal number of 64 bits in its one spelling is refused and stays."""
    token = gate.start(300)
    for data in (
        *(" 1", "1 ", "01", "00", "-01", "-0", "+1", "-", "--1", "1.0", "1e3", "0x10", "1,0"),
        *(
            "\u0661",
            "\uff11",
            "\xb2",
            "nan",
            "inf",
            "1_000",
            "1\n",
            "1\0",
            "\0",
            "one",
            b"\xff",
            b"\x01",
        ),
        *(str(MOST + 1), str(LEAST - 1), "1" * 40, "-" + "9" * 40, "x" * 1_000),
    ):
        gate.pset(token, "n", data, ttl=ttl)
        with pytest.raises(PayloadTypeError) as caught:
            gate.pincr(token, "n")
        assert not isinstance(caught.value, PayloadOverflowError), data
        assert caught.value.name == "n"
        assert gate.pget(token, "n") == (data if isinstance(data, bytes) else data.encode())
    assert set(fields(client, gate, token)) == {b"fp", b";n" if ttl else b":n"}


@pytest.mark.parametrize("by", [True, 1.0, "1", b"1", None, MOST + 1, LEAST - 1, 10**40], ids=repr)
def test_what_cannot_be_added(unsent: SessionGate, by: object) -> None:
    """What to add is a whole number of 64 bits, or nothing is counted."""
    with pytest.raises(ArgumentError, match="by is a"):
        unsent.pincr(TOKEN, "n", by)  # type: ignore[arg-type]  # what a type checker would refuse


# Names.


def test_no_name_collides(client: Redis, gate: SessionGate) -> None:
    """Payloads of any name, with an end of their own or without, stay apart and out of our way."""
    token = gate.start(300, subject="alice", idle_timeout=100)
    own = fields(client, gate, token)
    for number, name in enumerate(ODD_NAMES):
        ttl = 100 if number % 2 else None
        with pytest.raises(PayloadNotFoundError):
            gate.pget(token, name)
        with pytest.raises(PayloadNotFoundError):
            gate.ppop(token, name)
        gate.pset(token, name, f"{number}", ttl=ttl, if_absent=True)
        assert gate.pincr(token, name, 1_000) == number + 1_000
    everything = {name: f"{number + 1_000}".encode() for number, name in enumerate(ODD_NAMES)}
    assert gate.pall(token) == gate.pget_many(token, ODD_NAMES) == everything
    assert gate.info(token).payloads == dict.fromkeys(ODD_NAMES, 4)
    for name, data in everything.items():
        assert gate.ppop(token, name) == data
    assert fields(client, gate, token) == own


@pytest.mark.parametrize("name", ["", "n" * 201, "\ud800", b"user", None, 7], ids=repr)
def test_a_name_out_of_its_limits(unsent: SessionGate, name: str) -> None:
    """A name of 0 or over 200 bytes, or that is no text, is refused by all operations."""
    for call in (
        lambda: unsent.pget_many(TOKEN, [name]),
        lambda: unsent.pset_many(TOKEN, {name: "x"}),
        lambda: unsent.pset(TOKEN, name, "x", if_absent=True),
        lambda: unsent.pset(TOKEN, name, "x", ttl=300),
        lambda: unsent.ppop(TOKEN, name),
        lambda: unsent.pincr(TOKEN, name),
    ):
        with pytest.raises(ArgumentError, match="name"):
            call()


# Ends of their own.


@one_gate
def test_a_payload_with_an_end_of_its_own(  # noqa: PLR0915  # all of it shares one sleep
    client: Redis, gate: SessionGate
) -> None:
    """After its ttl a payload is not there for any operation; the session and others go on."""
    token = gate.start(300, {"plain": "1"})
    timed = ["pget", "pget_many", "pdel", "ppop", "pincr", "absent", "match", "again", "expire"]
    for name in timed:
        gate.pset(token, name, "7", ttl=1)
    gate.pset(token, "counter", "5", ttl=1)
    gate.pset(token, "longer", "7", ttl=1)
    gate.pset(token, "longer", "7", ttl=timedelta(minutes=5))
    gate.pset(token, "shorter", "7", ttl=300)
    gate.pset(token, "shorter", "7", ttl=1)
    gate.pset(token, "endless", "7", ttl=1)
    gate.pset(token, "endless", "8")
    gate.pset(token, "many", "7", ttl=1)
    gate.pset_many(token, {"many": "8"})
    gate.pset(token, "bounded", "7")
    gate.pset(token, "bounded", "8", ttl=1)
    renewed = gate.renew(gate.start(300))
    gate.pset(renewed, "timed", "7", ttl=1)
    renewed = gate.renew(gate.renew(renewed), subject="alice")
    short = gate.start(1)
    gate.pset(short, "user", "x", ttl=100)
    assert 0 < ttl_ms(client, gate, short) <= 1_000

    # Until then each operation sees them.
    assert gate.pget(token, "pget") == b"7"
    assert gate.pget_many(token, ["pget_many", "bounded"]) == {"pget_many": b"7", "bounded": b"8"}
    assert set(gate.pall(token)) == set(gate.info(token).payloads) >= {*timed, "bounded"}
    assert gate.info(token).payloads["pget"] == 1
    assert gate.pincr(token, "counter") == 6
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "absent", "8", if_absent=True)
    gate.pset(token, "match", "8", if_match="7", ttl=1)
    gate.expire(token, 500)
    assert gate.pall(renewed) == {"timed": b"7"}

    time.sleep(1.1)
    for missing in (
        lambda: gate.pget(token, "pget"),
        lambda: gate.pdel(token, "pdel"),
        lambda: gate.ppop(token, "ppop"),
        lambda: gate.pget(token, "counter"),
        lambda: gate.pget(token, "shorter"),
        lambda: gate.pget(token, "expire"),
    ):
        with pytest.raises(PayloadNotFoundError):
            missing()
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "match", "9", if_match="8")
    assert gate.pget_many(token, [*timed, "bounded", "longer"]) == {"longer": b"7"}
    rest = {"plain": b"1", "longer": b"7", "endless": b"8", "many": b"8"}
    assert gate.pall(token) == rest
    assert gate.info(token).payloads == dict.fromkeys(rest, 1)
    assert gate.pall(renewed) == {}
    assert gate.info(renewed).payloads == {}
    with pytest.raises(SessionNotFoundError):
        gate.pget(short, "user")

    # What is stored anew under such a name has no end of its own.
    assert gate.pincr(token, "pincr") == 1
    gate.pset(token, "absent", "9", if_absent=True)
    gate.pset(token, "again", "9")
    held = payload_fields(client, gate, token)
    assert {b":pincr", b":absent", b":again"} <= held
    assert held.isdisjoint({b";pincr", b";absent", b";again"})

    # Those that nobody asks for any more go when there are twice as many.
    more = {f"next{number}" for number in range(32)}
    for name in more:
        gate.pset(token, name, "x", ttl=100)
    held = payload_fields(client, gate, token)
    timed_fields = {b";longer", *(b";" + name.encode() for name in more)}
    assert {name for name in held if name[:1] == b";"} == timed_fields
    assert {*gate.pall(token)} == {*rest, "pincr", "absent", "again", *more}


@one_gate
def test_a_full_server_refuses_a_payload_with_an_end(flavour: Flavour, own_server: Server) -> None:
    """It does so too if another payload of the session has ended, which is no room."""
    gate = flavour.gate(flavour.client(own_server.port))
    token = gate.start(300, {"user": "1"})
    with own_server.client() as client:
        # As of a payload that ended in 1970, and as many fields as make it due to go.
        client.hset(f"sg-session:{{{gate.verify(token)}}}", ";old", b"0000000000001x")
        gate.pset_many(token, {f"{number}": "x" for number in range(12)})
        client.config_set("maxmemory", "1")
        with pytest.raises(OutOfMemoryError):
            gate.pset(token, "new", "x", ttl=100)
        client.config_set("maxmemory", "0")
    assert gate.pget(token, "user") == b"1"


def test_a_ttl_of_0_deletes_the_payload(client: Redis, gate: SessionGate) -> None:
    """With a ttl of 0 a payload is gone, whether it had an end, had none, or was not there."""
    token = gate.start(300, {"plain": "1"})
    gate.pset(token, "timed", "1", ttl=100)
    for name in ("plain", "timed", "nothing"):
        gate.pset(token, name, "2", ttl=0)
    assert payload_fields(client, gate, token) == set()
    gate.pset(token, "plain", "3")


@pytest.mark.parametrize(
    "ttl", [-1, 100 * 365 * 86_400 + 1, True, 1.0, "300", timedelta(milliseconds=1)], ids=repr
)
def test_a_ttl_out_of_its_limits(unsent: SessionGate, ttl: object) -> None:
    """The ttl of a payload has the limits of a session's, and nothing is stored beyond them."""
    with pytest.raises(ArgumentError, match="ttl"):
        unsent.pset(TOKEN, "user", "x", ttl=ttl)  # type: ignore[arg-type]  # what a type checker would refuse


def test_the_longest_ttl(gate: SessionGate) -> None:
    """A payload may be given a hundred years, and is there."""
    token = gate.start(300)
    gate.pset(token, "user", "x", ttl=100 * 365 * 86_400)
    assert gate.pall(token) == {"user": b"x"}


CHANGES: dict[str, Call] = {
    "pset": lambda gate, token: gate.pset(token, "n", "1"),
    "with ttl": lambda gate, token: gate.pset(token, "n", "1", ttl=100),
    "ttl 0": lambda gate, token: gate.pset(token, "n", "1", ttl=0),
    "pset_many": lambda gate, token: gate.pset_many(token, {"n": "1"}),
    "if_absent": lambda gate, token: gate.pset(token, "n", "1", if_absent=True),
    "if_match": lambda gate, token: gate.pset(token, "n", "1", if_match="1"),
    "if_match, ttl": lambda gate, token: gate.pset(token, "n", "1", if_match="1", ttl=9),
    "pincr": lambda gate, token: gate.pincr(token, "n"),
    "pdel": lambda gate, token: gate.pdel(token, "n"),
    "ppop": lambda gate, token: gate.ppop(token, "n"),
}
GONE_AFTER = {"ttl 0", "pdel", "ppop"}


@one_gate
def test_a_payload_stands_in_one_place(client: Redis, gate: SessionGate) -> None:
    """Whatever follows on whatever, a payload is held once, with its end or without, or is gone."""
    for first, second in product(CHANGES, CHANGES):
        token = gate.start(300)
        stored = False
        for change in (first, second):
            try:
                CHANGES[change](gate, token)
            except (PayloadConflictError, PayloadNotFoundError):
                assert stored == (change == "if_absent")
            else:
                # No data to match is a conflict, as is no payload to delete, above.
                assert stored or change not in {"if_match", "if_match, ttl", "pdel", "ppop"}
                stored = change not in GONE_AFTER
        held = payload_fields(client, gate, token)
        assert len(held) == stored
        gate.end(token)


@pytest.mark.parametrize("ttl", [None, 100])
def test_pdel_deletes_either_kind(client: Redis, gate: SessionGate, ttl: int | None) -> None:
    """A payload is deleted with its end, and then is not there to be deleted."""
    token = gate.start(300)
    gate.pset(token, "user", "x", ttl=ttl)
    gate.pdel(token, "user")
    with pytest.raises(PayloadNotFoundError):
        gate.pdel(token, "user")
    assert payload_fields(client, gate, token) == set()
