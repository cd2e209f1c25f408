"""Renewal: a token gets a successor, and a session that somebody signs in to moves."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import cast

import pytest
from redis import Redis
from redis.crc import key_slot

from sessiongate import (
    BadSignatureError,
    MalformedTokenError,
    SessionGate,
    SessionNotFoundError,
    TooManySessionsError,
)

from .conftest import Backend, Flavour, end_of
from .proxy import Proxy
from .servers import Server

# What a script does, which both gates send: see `conftest`.
OF_SCRIPTS = True

OLD, NEW = "the sign key that goes, 32 bytes", "the sign key that comes, 32 bytes"

# How time passes is told in the scripts alone, which both gates share.
one_gate = pytest.mark.parametrize("flavour", ["sync"], indirect=True)

Call = Callable[[SessionGate, str], object]

# Every operation on a session with the payload `user` that holds 1; `end` of its kind comes last.
OPERATIONS: dict[str, Call] = {
    "touch": lambda gate, token: gate.touch(token),
    "info": lambda gate, token: gate.info(token),
    "expire": lambda gate, token: gate.expire(token, 300),
    "pset": lambda gate, token: gate.pset(token, "user", "2"),
    "pset if_match": lambda gate, token: gate.pset(token, "user", "2", if_match="1"),
    "pset_many": lambda gate, token: gate.pset_many(token, {"user": "2"}),
    "pget": lambda gate, token: gate.pget(token, "user"),
    "pget_many": lambda gate, token: gate.pget_many(token, ["user"]),
    "pall": lambda gate, token: gate.pall(token),
    "pdel": lambda gate, token: gate.pdel(token, "user"),
    "ppop": lambda gate, token: gate.ppop(token, "user"),
    "pincr": lambda gate, token: gate.pincr(token, "user"),
    "renew": lambda gate, token: gate.renew(token),
    "renew subject": lambda gate, token: gate.renew(token, subject="alice"),
    "expire 0": lambda gate, token: gate.expire(token, 0),
    "end": lambda gate, token: gate.end(token),
}


@pytest.fixture
def client(backend: Backend) -> Redis:
    """A client to look into the backend with."""
    return backend.client()


def key_of(gate: SessionGate, token: str) -> str:
    return f"sg-session:{{{gate.verify(token)}}}"


def fields(client: Redis, gate: SessionGate, token: str) -> dict[bytes, bytes]:
    """What Redis holds of a session."""
    return cast("dict[bytes, bytes]", client.hgetall(key_of(gate, token)))


def assert_dead(gate: SessionGate, token: str) -> None:
    """The token opens nothing and renews nothing."""
    for operation in OPERATIONS.values():
        with pytest.raises(SessionNotFoundError):
            operation(gate, token)


# A token gets a successor.


def test_renew_keeps_the_session(client: Redis, gate: SessionGate) -> None:
    """The successor is of the next generation of the same session, of which all else stays."""
    for options in ({}, {"subject": "alice"}, {"subject": "alice", "idle_timeout": 100}):
        token = gate.start(300, {"user": "1", "cart": b"\x00"}, **options)
        gate.pset(token, "timed", "x", ttl=100)
        before, end = gate.info(token), end_of(gate, token)
        session_id, keys, held = gate.verify(token), set(client.keys()), fields(client, gate, token)
        successor = gate.renew(token)
        version, its_id, generation, signature = successor.split(".")
        assert (version, its_id, generation) == ("v2", session_id, "1")
        assert len(signature) == 64
        assert gate.verify(successor) == session_id
        assert set(client.keys()) == keys
        after = gate.info(successor)
        assert after.generation == 1
        assert 0 <= before.seconds_left - after.seconds_left < 4
        assert abs(end_of(gate, successor) - end) < 0.01
        for name in ("id", "subject", "created_at", "idle_timeout", "payloads"):
            assert getattr(after, name) == getattr(before, name)
        now = fields(client, gate, token)
        assert now.pop(b"fp")[16:] == held.pop(b"fp")[16:]
        assert {name: now[name] for name in held} == held
        gate.end(successor)


def test_the_old_token_works_within_its_grace(gate: SessionGate) -> None:
    """Within the grace the old token does all that the new one does, and renews to the same."""
    for name, operation in OPERATIONS.items():
        token = gate.start(300, {"user": "1"})
        successor = gate.renew(token)
        assert gate.renew(token) == successor
        result = operation(gate, token)
        if name == "renew":
            assert result == successor
        elif name in ("end", "expire 0", "renew subject"):
            assert_dead(gate, token)
            assert_dead(gate, successor)
        else:
            assert gate.renew(token) == successor
            assert gate.pall(token) == gate.pall(successor)


@one_gate
def test_the_old_token_is_dead_after_its_grace(client: Redis, gate: SessionGate) -> None:
    """When the grace is over the old token opens nothing and renews nothing; the new one does."""
    token = gate.start(300, {"user": "1"}, subject="alice", idle_timeout=100)
    successor = gate.renew(token, grace=1)
    lasting = gate.start(300, {"user": "1"})
    # Of three tokens the first two have graces of their own, the shorter one behind the longer.
    second = gate.renew(lasting, grace=300)
    third = gate.renew(second, grace=1)
    assert gate.renew(second, grace=300) == third  # asking again does not prolong it
    assert gate.pget(token, "user") == gate.pget(second, "user") == b"1"
    time.sleep(1.1)
    before = fields(client, gate, token)
    assert_dead(gate, token)
    assert_dead(gate, second)
    assert fields(client, gate, token) == before
    assert gate.pget(successor, "user") == b"1"
    assert gate.info(successor).subject == "alice"
    # The first one's own grace lasts. Its successor's is over, so it gets the one after.
    assert gate.pget(lasting, "user") == b"1"
    assert gate.renew(lasting) == third
    # What is dead is forgotten at the next renewal.
    assert gate.renew(successor, grace=100).split(".")[2] == "2"
    assert len(fields(client, gate, token)[b"old"]) == 29


def test_without_a_grace_the_old_token_is_dead_at_once(client: Redis, gate: SessionGate) -> None:
    """With grace=0 the old token is a session not found as soon as renew returned."""
    token = gate.start(300, {"user": "1"})
    successor = gate.renew(token, grace=0)
    assert_dead(gate, token)
    assert gate.pget(successor, "user") == b"1"
    third = gate.renew(successor, grace=0)
    assert_dead(gate, token)
    assert_dead(gate, successor)
    assert gate.info(third).generation == 2
    assert client.keys() == [key_of(gate, token).encode()]


def test_renewals_in_a_row(gate: SessionGate) -> None:
    """Within their graces all older tokens work, and each renews to its own direct successor."""
    tokens = [gate.start(300, {"user": "1"})]
    for generation in range(1, 5):
        tokens.append(gate.renew(tokens[-1]))
        for token, successor in pairwise(tokens):
            assert gate.renew(token) == successor
        for token in tokens:
            assert gate.pget(token, "user") == b"1"
            assert gate.info(token).generation == generation
    assert len(set(tokens)) == 5


def test_an_endless_chain_of_renewals_stays_short(client: Redis, gate: SessionGate) -> None:
    """However often a session is renewed within the graces, it remembers few of its old tokens."""
    tokens = [gate.start(300, {"user": "1"})]
    for _ in range(40):
        tokens.append(gate.renew(tokens[-1], grace=300))
    assert gate.info(tokens[-1]).generation == 40
    assert len(fields(client, gate, tokens[0])[b"old"]) == 16 * 29
    for token, successor in pairwise(tokens[24:]):
        assert gate.renew(token) == successor
    assert_dead(gate, tokens[0])
    assert gate.pget(tokens[-1], "user") == b"1"


def test_a_forged_successor_opens_nothing(gate: SessionGate) -> None:
    """Tokens of generations that no renewal made find no session, and end none."""
    token = gate.start(300, {"user": "1"})
    for generation in (1, 2, 10**18 - 1):
        guessed = gate._commands._ring.sign(gate.verify(token), generation)[0]
        assert gate.verify(guessed) == gate.verify(token)
        assert_dead(gate, guessed)
    successor = gate.renew(token)
    assert_dead(gate, gate._commands._ring.sign(gate.verify(token), 2)[0])
    assert gate.pget(successor, "user") == b"1"


def test_renew_of_what_is_not_there(client: Redis, gate: SessionGate) -> None:
    """A session that ended is not renewed, and what is no token is refused."""
    token = gate.start(300)
    gate.end(token)
    for subject in (None, "alice"):
        with pytest.raises(SessionNotFoundError) as caught:
            gate.renew(token, subject=subject)
        assert caught.value.session_id == gate.verify(token)
        with pytest.raises(MalformedTokenError):
            gate.renew(token + "x", subject=subject)
        with pytest.raises(BadSignatureError):
            gate.renew(token[:20] + "0" * 64, subject=subject)
    assert client.keys() == []


def test_a_token_as_bytes(gate: SessionGate) -> None:
    """A token to renew may come as bytes, of either version."""
    token = gate.start(300)
    successor = gate.renew(token.encode())
    assert gate.renew(token) == successor
    assert gate.renew(gate.renew(successor.encode()).encode(), subject="alice").startswith("v2.")


@pytest.mark.parametrize("grace", [0, 300])
def test_a_renewal_whose_reply_was_lost(flavour: Flavour, server: Server, grace: int) -> None:
    """A renewal that ran and whose reply was lost is repeated and returns the same successor."""
    looking = flavour.gate(flavour.client(server.port))
    with Proxy(server.port) as proxy:
        gate = flavour.gate(flavour.client(proxy.port, retry=flavour.no_retry))
        gate.renew(gate.start(300))
        token = gate.start(300, {"user": "1"})
        for generation in (1, 2):
            proxy.cut_replies = 1
            successor = gate.renew(token, grace=grace)
            assert proxy.cut_replies == 0
            assert looking.info(successor).generation == generation
            if grace:
                assert looking.renew(token) == successor
            else:
                assert_dead(looking, token)
            token = successor
        assert looking.pget(token, "user") == b"1"


def test_a_lost_reply_renews_no_dead_token(flavour: Flavour, server: Server) -> None:
    """A token whose grace is over renews nothing, not even when the answer has to be repeated."""
    looking = flavour.gate(flavour.client(server.port))
    with Proxy(server.port) as proxy:
        gate = flavour.gate(flavour.client(proxy.port, retry=flavour.no_retry))
        gate.renew(gate.start(300))
        token = gate.start(300)
        successor = looking.renew(token, grace=0)
        proxy.cut_replies = 1
        with pytest.raises(SessionNotFoundError):
            gate.renew(token)
        assert proxy.cut_replies == 0
        assert looking.info(successor).generation == 1


# Rings of sign keys.


def test_a_successor_is_signed_with_the_newest_key(backend: Backend) -> None:
    """Renewing is how a session comes to the newest sign key: then the old one can go."""
    token = backend.gate(OLD).start(300, {"user": "1"}, subject="alice")
    successor = backend.gate([NEW, OLD]).renew(token, grace=0)
    assert backend.gate(NEW).pget(successor, "user") == b"1"
    assert [info.id for info in backend.gate(NEW).sessions("alice")] == [
        backend.gate(NEW).verify(successor)
    ]
    with pytest.raises(BadSignatureError):
        backend.gate(OLD).pget(successor, "user")
    assert backend.gate(OLD).sessions("alice") == []


def test_gates_with_other_orders_of_keys_return_one_successor(backend: Backend) -> None:
    """Whichever gate is first, one that signs with another key returns the same successor."""
    one, other = backend.gate([NEW, OLD]), backend.gate([OLD, NEW])
    for first, second, key in ((one, other, NEW), (other, one, OLD)):
        for starts in (one, other):
            token = starts.start(300, {"user": "1"})
            successor = first.renew(token)
            assert second.renew(token) == successor
            assert first.renew(token) == successor
            assert backend.gate(key).pget(successor, "user") == b"1"


@one_gate
def test_gates_that_race_return_one_successor(backend: Backend) -> None:
    """Threads with gates of either order that renew one token at once all get the same."""
    gates = [backend.gate([NEW, OLD]), backend.gate([OLD, NEW])]
    token = gates[0].start(300)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            renewals = [pool.submit(gates[turn % 2].renew, token) for turn in range(8)]
            (token,) = {renewal.result() for renewal in renewals}


def test_a_gate_without_the_successors_key(backend: Backend) -> None:
    """A gate that cannot sign as the successor was signed says so, and the session stays."""
    both, old = backend.gate([NEW, OLD]), backend.gate(OLD)
    token = old.start(300, {"user": "1"})
    successor = both.renew(token)
    with pytest.raises(BadSignatureError):
        old.renew(token)
    assert old.pget(token, "user") == both.pget(successor, "user") == b"1"


# Somebody signs in.


def listed(gate: SessionGate, subject: str) -> list[str]:
    return [info.id for info in gate.sessions(subject)]


@pytest.mark.parametrize("idle_timeout", [None, 100])
@pytest.mark.parametrize("renewals", [0, 2])
def test_signing_in_moves_the_session(
    backend: Backend, client: Redis, gate: SessionGate, idle_timeout: int | None, renewals: int
) -> None:
    """The session gets subject, id and token anew, and keeps payloads, ttl and idle timeout."""
    big = {f"p{number}": b"x" * number for number in range(1, 200)}
    token = gate.start(300, {"cart": b"\x00", **big}, idle_timeout=idle_timeout)
    for _ in range(renewals):
        token = gate.renew(token)
    gate.pset(token, "timed", "x", ttl=100)
    before, old_id, payloads = gate.info(token), gate.verify(token), gate.pall(token)
    end = end_of(gate, token)
    signed_in = gate.renew(token, subject="alice")
    assert signed_in.startswith("v2.")
    new_id = gate.verify(signed_in)
    assert new_id != old_id
    index = b"sg-session:subject:{alice}"
    assert key_slot(new_id.encode()) == key_slot(index)
    keys = {f"sg-session:{{{new_id}}}".encode(), index}
    if backend.cluster is not None and key_slot(old_id.encode()) != key_slot(index):
        # What it was taken from stays for a minute, and is no session any more.
        keys.add(key_of(gate, token).encode())
        held = fields(client, gate, token)
        assert b"taken" in held
        assert not held.keys() & {b"fp", b"sub"}
        assert 0 < client.pttl(key_of(gate, token)) <= 60_000
    assert set(client.keys()) == keys
    after = gate.info(signed_in)
    assert (after.id, after.subject, after.generation) == (new_id, "alice", renewals + 1)
    assert (after.created_at, after.idle_timeout) == (before.created_at, idle_timeout)
    assert abs(end_of(gate, signed_in) - end) < 0.1
    # Between two slots the idle timeout begins anew, as with any use.
    assert abs(before.seconds_left - after.seconds_left) < 4
    assert gate.pall(signed_in) == payloads
    assert listed(gate, "alice") == [new_id]
    assert_dead(gate, token)
    assert gate.pall(signed_in) == payloads
    assert b";timed" in fields(client, gate, signed_in)


def test_signing_in_has_no_grace(client: Redis, gate: SessionGate) -> None:
    """Whatever grace lasts, all older tokens are dead when somebody signed in."""
    first = gate.start(300, {"user": "1"})
    second = gate.renew(first, grace=300)
    signed_in = gate.renew(second, subject="alice")
    assert_dead(gate, first)
    assert_dead(gate, second)
    assert b"old" not in fields(client, gate, signed_in)
    later = gate.renew(signed_in, subject="alice")
    assert_dead(gate, signed_in)
    assert gate.pget(later, "user") == b"1"


def test_signing_in_with_a_token_in_its_grace(gate: SessionGate) -> None:
    """An old token in its grace can be signed in with, and both are dead then."""
    first = gate.start(300, {"user": "1"})
    second = gate.renew(first)
    signed_in = gate.renew(first, subject="alice")
    assert_dead(gate, first)
    assert_dead(gate, second)
    assert gate.pget(signed_in, "user") == b"1"


def test_signing_in_as_another(client: Redis, gate: SessionGate) -> None:
    """A session moves from one subject to another, and is listed under the new one alone."""
    token = gate.start(300, {"user": "1"}, subject="alice", idle_timeout=100)
    stays = gate.start(300, subject="alice")
    moved = gate.renew(token, subject="bob")
    assert listed(gate, "alice") == [gate.verify(stays)]
    assert listed(gate, "bob") == [gate.verify(moved)]
    assert gate.info(moved).subject == "bob"
    assert gate.end_all("alice") == 1
    assert gate.pget(moved, "user") == b"1"
    back = gate.renew(moved, subject="alice")
    assert listed(gate, "bob") == []
    assert listed(gate, "alice") == [gate.verify(back)]
    assert client.zcard("sg-session:subject:{alice}") == 1
    assert client.exists("sg-session:subject:{bob}") == 0


def test_signing_in_again(client: Redis, gate: SessionGate) -> None:
    """Who signs in again has one session, in one entry of the index, as old as it was."""
    token = gate.start(300, {"user": "1"}, subject="alice")
    created_at = gate.info(token).created_at
    other = gate.start(300, subject="alice")
    for generation in range(1, 4):
        again = gate.renew(token, subject="alice")
        assert gate.verify(again) != gate.verify(token)
        assert client.zcard("sg-session:subject:{alice}") == 2
        assert listed(gate, "alice") == [gate.verify(again), gate.verify(other)]
        assert_dead(gate, token)
        info = gate.info(again)
        assert (info.created_at, info.generation) == (created_at, generation)
        token = again
    assert gate.pget(token, "user") == b"1"


@pytest.mark.parametrize("subject", [None, "alice", "bob"])
def test_a_sign_in_whose_reply_was_lost(
    flavour: Flavour, server: Server, subject: str | None
) -> None:
    """A sign-in that ran and whose reply was lost is repeated and returns the one token."""
    looking = flavour.gate(flavour.client(server.port))
    with Proxy(server.port) as proxy:
        gate = flavour.gate(flavour.client(proxy.port, retry=flavour.no_retry), max_sessions=3)
        gate.renew(gate.start(300), subject="carol")
        token = gate.start(300, {"user": "1"}, subject=subject)
        proxy.cut_replies = 1
        signed_in = gate.renew(token, subject="alice")
        assert proxy.cut_replies == 0
    assert looking.pget(signed_in, "user") == b"1"
    assert listed(looking, "alice") == [looking.verify(signed_in)]
    assert_dead(looking, token)


def test_signing_in_evicts_the_oldest(backend: Backend) -> None:
    """At the limit the oldest other session ends when somebody signs in; who was in, stays in."""
    gate = backend.gate(max_sessions=2)
    anonymous = gate.start(300, {"user": "1"})  # as a session it is the oldest
    first, second = gate.start(300, subject="alice"), gate.start(300, subject="alice")
    signed_in = gate.renew(anonymous, subject="alice")
    assert listed(gate, "alice") == [gate.verify(signed_in), gate.verify(second)]
    with pytest.raises(SessionNotFoundError):
        gate.touch(first)
    again = gate.renew(second, subject="alice")
    assert {*listed(gate, "alice")} == {gate.verify(signed_in), gate.verify(again)}
    moved = gate.renew(gate.start(300, subject="bob"), subject="alice")
    assert len(gate.sessions("alice")) == 2
    assert gate.info(moved).subject == "alice"


def test_signing_in_is_rejected_at_the_limit(backend: Backend) -> None:
    """Where the limit rejects, the session that cannot sign in stays as it was."""
    gate = backend.gate(max_sessions=1, on_overflow="reject")
    token = gate.start(300, {"user": "1"}, subject="alice")
    anonymous = gate.start(300, {"user": "2"}, idle_timeout=100)
    before = gate.info(anonymous)
    with pytest.raises(TooManySessionsError):
        gate.renew(anonymous, subject="alice")
    assert gate.pget(anonymous, "user") == b"2"
    after = gate.info(anonymous)
    assert (after.id, after.subject, after.generation) == (before.id, None, 0)
    again = gate.renew(token, subject="alice")  # takes no room but its own
    assert listed(gate, "alice") == [gate.verify(again)]
    gate.end(again)
    signed_in = gate.renew(anonymous, subject="alice")
    assert gate.pget(signed_in, "user") == b"2"
    assert listed(gate, "alice") == [gate.verify(signed_in)]


def test_signing_in_needs_a_fresh_id(backend: Backend) -> None:
    """An id that another session has already is drawn again, and that session stays as it is."""
    numbers = iter([0] * 2 + [0] * 2 + [1] * 50)
    gate = backend.gate(random=lambda size: bytes([next(numbers)]) * size)
    taken = gate.start(300, {"user": "taken"}, subject="alice")
    anonymous = backend.gate().start(300, {"user": "1"})
    signed_in = gate.renew(anonymous, subject="alice")
    assert gate.verify(signed_in) != gate.verify(taken)
    assert gate.pget(taken, "user") == b"taken"
    assert gate.pget(signed_in, "user") == b"1"
