"""A subject's sessions: listing and ending them, the limit of them, and the index they are in."""

import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import cast

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from redis import Redis
from redis.crc import key_slot
from redis.exceptions import ResponseError

from sessiongate import (
    ArgumentError,
    BadSignatureError,
    ConfigurationError,
    MalformedTokenError,
    SessionGate,
    SessionNotFoundError,
    TooManySessionsError,
)
from sessiongate.command import Answer, AnyCommand
from sessiongate.keyspace import ID_ALPHABET, SLOTS, Keyspace, _ending, slot_of, system_random
from sessiongate.tokens import SignKeyRing

from .conftest import SIGN_KEY, Backend, Flavour
from .proxy import Proxy
from .servers import Server

# What a script does, which both gates send: see `conftest`.
OF_SCRIPTS = True

OURS, THEIRS = "a sign key of our application, 32 bytes", "a sign key of another application, 32"
INDEX = "sg-session:subject:{alice}"
TOKEN = SignKeyRing(SIGN_KEY).sign("A" * 16)[0]

# How time passes is told in the scripts alone, which both gates share.
one_gate = pytest.mark.parametrize("flavour", ["sync"], indirect=True)


@pytest.fixture
def client(backend: Backend) -> Redis:
    """A client to look into the backend with."""
    return backend.client()


@pytest.fixture
def unsent(flavour: Flavour) -> SessionGate:
    """A gate that would fail to send anything: nobody listens there."""
    return flavour.gate(flavour.client(1, retry=flavour.no_retry))


def listed(gate: SessionGate, subject: str = "alice") -> list[str]:
    return [info.id for info in gate.sessions(subject)]


def ids(gate: SessionGate, *tokens: str) -> list[str]:
    return [gate.verify(token) for token in tokens]


def alive(gate: SessionGate, token: str) -> bool:
    try:
        gate.touch(token)
    except SessionNotFoundError:
        return False
    return True


def vanish(client: Redis, gate: SessionGate, token: str) -> None:
    """Let the session end as an idle timeout ends it: the index is not told."""
    assert client.delete(f"sg-session:{{{gate.verify(token)}}}")


def entries(client: Redis) -> list[str]:
    """The ids in the index, whether their sessions live or not."""
    return [cast("bytes", entry)[16:].decode() for entry in client.zrange(INDEX, 0, -1)]


def all_keys(client: Redis) -> set[bytes]:
    return cast("set[bytes]", set(client.keys()))


def assert_about(ms: float, seconds: float) -> None:
    """So many seconds from now, of which a slow machine may have used up some."""
    assert seconds * 1000 - 4_000 < ms <= seconds * 1000


# Listing.


def test_sessions_are_listed_oldest_first(gate: SessionGate) -> None:
    """All live sessions of a subject are listed in the order they were started, and no others."""
    tokens = [gate.start(ttl, subject="alice") for ttl in (300, 100, 200, 500, 50)]
    gate.start(300)
    gate.start(300, subject="bob")
    assert listed(gate) == ids(gate, *tokens)
    tokens[1] = gate.renew(tokens[1])
    tokens[2] = gate.renew(tokens[2], subject="alice")  # another id, as old as before
    gate.expire(tokens[0], 1_000)
    gate.end(tokens.pop(3))
    assert listed(gate) == ids(gate, *tokens)
    assert listed(gate, "carol") == []


def test_sessions_tell_what_info_tells(gate: SessionGate) -> None:
    """Each session listed is told of as info tells of it."""
    tokens = [
        gate.start(300, {"user": "1", "fp": "x" * 100}, subject="alice", idle_timeout=100),
        gate.renew(gate.start(200, {"cart": b"\x00"}, subject="alice")),
        gate.start(100, subject="alice"),
    ]
    gate.pset(tokens[0], "timed", "12345", ttl=100)
    infos = [gate.info(token) for token in tokens]
    for told, info in zip(gate.sessions("alice"), infos, strict=True):
        for name in ("id", "subject", "created_at", "idle_timeout", "generation", "payloads"):
            assert getattr(told, name) == getattr(info, name)
        assert abs((told.expires_at - info.expires_at).total_seconds()) < 1
        assert 0 <= info.seconds_left - told.seconds_left < 4
    assert infos[0].payloads == {"user": 1, "fp": 100, "timed": 5}


# Ending.


def test_end_all_ends_all(client: Redis, gate: SessionGate) -> None:
    """All sessions of the subject are gone, with nothing left of them, and their number is told."""
    for count in (0, 1, 5):
        tokens = [gate.start(300, {"user": "1"}, subject="alice") for _ in range(count)]
        others = [gate.start(300), gate.start(300, subject="bob")]
        assert gate.end_all("alice") == count
        assert not any(alive(gate, token) for token in tokens)
        assert listed(gate) == []
        assert all(alive(gate, token) for token in others)
        assert gate.end_all("alice") == 0
        assert gate.end_all("bob") == 1
        gate.end(others[0])
        assert client.keys() == []


def test_end_all_counts_live_sessions_only(client: Redis, gate: SessionGate) -> None:
    """Sessions that ended before are not counted."""
    tokens = [gate.start(300, subject="alice") for _ in range(4)]
    gate.end(tokens[0])
    vanish(client, gate, tokens[1])
    assert gate.end_all("alice") == 2
    assert client.keys() == []


@one_gate
def test_end_all_of_very_many(client: Redis, gate: SessionGate) -> None:
    """A subject with more sessions than Lua can unpack at once is listed and signed out."""
    tokens = [gate.start(300, subject="alice") for _ in range(1_100)]
    assert listed(gate) == ids(gate, *tokens)
    assert gate.end_all("alice", keep=tokens[7]) == 1_099
    assert entries(client) == ids(gate, tokens[7])
    assert set(client.keys()) == {INDEX.encode(), f"sg-session:{{{tokens[7][3:19]}}}".encode()}


class Between:
    """The channel of a gate, behind whose first answer to a script something else happens."""

    def __init__(self, gate: SessionGate, script: str, event: Callable[[], object]) -> None:
        self._ask = gate._channel.ask
        self._script = script
        self._event = event
        self.asked = 0
        gate._channel = self

    def ask(self, command: AnyCommand, due: float) -> Answer:
        answer = self._ask(command, due)
        if isinstance(answer, bytes):  # or the server does not know the script yet
            self.asked += 1
            if command.script.name == self._script:
                self._event()
        return answer

    def close(self) -> None: ...


@one_gate
def test_a_renewal_between_listing_and_telling(backend: Backend, gate: SessionGate) -> None:
    """A session that gets another id meanwhile is told once, under that, and the others as ever."""
    tokens = [gate.start(300, subject="alice") for _ in range(3)]
    other = backend.gate()

    def renew() -> None:
        tokens[0] = other.renew(tokens[0], subject="alice")

    between = Between(gate, "index", renew)
    assert listed(gate) == ids(other, *tokens)
    assert between.asked == 3


@one_gate
@pytest.mark.parametrize("ahead_s", [0, 5])
def test_a_renewal_between_listing_and_ending(
    backend: Backend, client: Redis, gate: SessionGate, ahead_s: int
) -> None:
    """It saves no session from end_all, were it started by a clock that is ahead of this one."""
    tokens = [gate.start(300, subject="alice") for _ in range(3)]
    other = backend.gate()
    key = f"sg-session:{{{gate.verify(tokens[0])}}}"
    own = cast("bytes", client.hget(key, "fp"))
    entry = own[16:32] + tokens[0][3:19].encode()
    started = b"%016d" % (int(own[16:32]) + ahead_s * 1_000_000)
    client.zadd(INDEX, {started + entry[16:]: cast("float", client.zscore(INDEX, entry))})
    client.hset(key, "fp", own[:16] + started)
    if ahead_s:
        client.zrem(INDEX, entry)
    Between(gate, "index", lambda: other.renew(tokens[0], subject="alice"))
    assert gate.end_all("alice") == 3
    assert client.keys() == []


@pytest.mark.parametrize("kind", [str, str.encode])
def test_end_all_but_one(gate: SessionGate, kind: Callable[[str], str | bytes]) -> None:
    """The session of the token to keep stays, whichever of its tokens that is."""
    tokens = [gate.start(300, {"user": "1"}, subject="alice") for _ in range(3)]
    assert gate.end_all("alice", keep=kind(tokens[1])) == 2
    assert [alive(gate, token) for token in tokens] == [False, True, False]
    assert listed(gate) == ids(gate, tokens[1])
    successor = gate.renew(tokens[1])
    for token in (tokens[1], successor):
        gate.start(300, subject="alice")
        assert gate.end_all("alice", keep=kind(token)) == 1
        assert gate.pget(successor, "user") == b"1"


def test_keeping_what_is_not_the_subjects(gate: SessionGate) -> None:
    """A token to keep of another subject, of none, or of an ended session keeps nothing."""
    ended = gate.start(300, subject="alice")
    gate.end(ended)
    for keep in (gate.start(300, subject="bob"), gate.start(300), ended):
        token = gate.start(300, subject="alice")
        assert gate.end_all("alice", keep=keep) == 1
        assert not alive(gate, token)
        assert keep == ended or alive(gate, keep)


@pytest.mark.parametrize(
    ("keep", "error"),
    [
        ("", MalformedTokenError),
        (b"", MalformedTokenError),
        ("x", MalformedTokenError),
        (TOKEN + "\n", MalformedTokenError),
        (7, MalformedTokenError),
        (False, MalformedTokenError),
        (TOKEN[:-1] + ("1" if TOKEN[-1] == "0" else "0"), BadSignatureError),
        (f"v2.{'A' * 16}.1.{'0' * 64}".encode(), BadSignatureError),
    ],
    ids=repr,
)
def test_what_is_no_token_to_keep(
    unsent: SessionGate, keep: object, error: type[Exception]
) -> None:
    """A malformed or forged token to keep is refused, and nobody is signed out."""
    with pytest.raises(error):
        unsent.end_all("alice", keep=keep)  # type: ignore[arg-type]  # what a type checker would refuse


def test_end_one(client: Redis, gate: SessionGate) -> None:
    """One session of the subject ends, by the id that was listed; ending it again is refused."""
    tokens = [gate.start(300, {"user": "1"}, subject="alice") for _ in range(3)]
    tokens[1] = gate.renew(tokens[1])
    for left in (2, 1, 0):
        info = gate.sessions("alice")[left // 2]
        gate.end_one("alice", info.id)
        assert sum(alive(gate, token) for token in tokens) == left
        assert info.id not in listed(gate)
        assert int(client.zcard(INDEX)) == left
        with pytest.raises(SessionNotFoundError) as caught:
            gate.end_one("alice", info.id)
        assert caught.value.session_id == info.id
    assert client.keys() == []


def test_end_one_of_another(client: Redis, gate: SessionGate) -> None:
    """The id of another subject's session, of one of nobody, or of none is not found."""
    mine = gate.start(300, subject="alice")
    others = [gate.start(300, subject="bob"), gate.start(300)]
    index = entries(client)
    unknown = gate._commands._keyspace.new_id_in(slot_of(INDEX.encode()))
    for session_id in (*ids(gate, *others), unknown, "A" * 16):
        with pytest.raises(SessionNotFoundError) as caught:
            gate.end_one("alice", session_id)
        assert caught.value.session_id == session_id
    with pytest.raises(SessionNotFoundError):
        gate.end_one("bob", gate.verify(mine))
    assert all(alive(gate, token) for token in (mine, *others))
    assert entries(client) == index


def test_end_one_of_another_in_the_same_slot(backend: Backend) -> None:
    """Another subject's session is not found even if it lives in the subject's own slot."""
    gate = backend.gate()
    slot = slot_of(b"sg-session:subject:{alice}")
    keyspace = gate._commands._keyspace
    # Enough subjects that some share a slot, by the birthday of 16,384 slots.
    double = next(
        name
        for name in map("bob{}".format, range(500_000))
        if slot_of(keyspace.index_key(name.encode())) == slot
    )
    token = gate.start(300, subject=double)
    with pytest.raises(SessionNotFoundError):
        gate.end_one("alice", gate.verify(token))
    assert gate.end_all("alice") == 0
    assert listed(gate) == []
    assert listed(gate, double) == ids(gate, token)


@pytest.mark.parametrize(
    "session_id",
    ["", "A" * 15, "A" * 17, "A" * 15 + "é", "A" * 15 + "\n", "A" * 15 + "\0", "\ud800" * 16, "}"],
    ids=repr,
)
def test_what_is_no_session_id(unsent: SessionGate, session_id: str) -> None:
    """Text that is not spelt as a session id is refused, without asking."""
    with pytest.raises(ArgumentError, match=r"^session_id is the 16 characters"):
        unsent.end_one("alice", session_id)


@pytest.mark.parametrize("session_id", [b"A" * 16, None, 7, ["A" * 16]], ids=repr)
def test_a_session_id_is_text(unsent: SessionGate, session_id: object) -> None:
    """A session id that is no str is refused, without asking."""
    with pytest.raises(ArgumentError, match="session_id is a str"):
        unsent.end_one("alice", session_id)  # type: ignore[arg-type]  # what a type checker would refuse


# Whose is whose.

SUBJECTS = [
    *("alice", "Alice", "alice ", "alice\0", "\0", "{alice}", "%7Balice%7D", "alice}", "{alice"),
    *("{", "}", "{}", "%", "%25", "%7B", "%257B", "%7b", "a:{b}", "sg-session", "subject:{alice}"),
    *("é", "e\u0301", "\U0001f600", "s" * 200, "s" * 199, "é" * 100, "{" * 200, "\r\n", "*", "?"),
]


def test_subjects_do_not_mix(client: Redis, gate: SessionGate) -> None:
    """Whatever is in their names, subjects have sessions of their own, and names come back."""
    tokens = {subject: gate.start(300, subject=subject) for subject in SUBJECTS}
    assert client.dbsize() == 2 * len(SUBJECTS)
    for subject, token in tokens.items():
        assert gate.info(token).subject == subject
        (info,) = gate.sessions(subject)
        assert (info.id, info.subject) == (gate.verify(token), subject)
        gate.expire(token, 400)  # the index is found by what Redis holds of the subject
    assert client.dbsize() == 2 * len(SUBJECTS)
    for subject, token in list(tokens.items())[::2]:
        assert gate.end_all(subject) == 1
        del tokens[subject]
        assert not alive(gate, token)
    assert all(alive(gate, token) for token in tokens.values())
    assert client.dbsize() == 2 * len(tokens)


def test_all_keys_of_a_subject_share_a_slot(client: Redis, gate: SessionGate) -> None:
    """Session and index of a subject are in one slot, whatever is in its name."""
    for subject in SUBJECTS:
        token = gate.start(300, subject=subject)
        gate.renew(gate.start(300), subject=subject)
        keys = {key for key in all_keys(client) if b":subject:" in key or client.hexists(key, "fp")}
        assert len(keys) == 3
        assert len({key_slot(key) for key in keys}) == 1
        assert gate.end_all(subject, keep=token) == 1
        gate.end_one(subject, gate.verify(token))


def test_prefixes_keep_subjects_apart(backend: Backend, client: Redis) -> None:
    """Gates with one sign key and different prefixes see subjects of their own."""
    one, other = backend.gate(prefix="one"), backend.gate(prefix="other")
    token = one.start(300, subject="alice")
    other.start(300, subject="alice")
    assert listed(one) == ids(one, token)
    assert other.end_all("alice") == 1
    assert alive(one, token)
    assert {key[:4] for key in all_keys(client)} == {b"one:"}


def test_two_applications_share_a_subject(backend: Backend, client: Redis) -> None:
    """Gates with different sign keys never see, count or end sessions of one subject's other."""
    ours, theirs = backend.gate(OURS, max_sessions=2), backend.gate(THEIRS, max_sessions=2)
    rejecting = backend.gate(THEIRS, max_sessions=3, on_overflow="reject")
    mine = [ours.start(300, subject="alice") for _ in range(2)]
    other = [theirs.start(300, subject="alice") for _ in range(3)]  # the third evicts the first
    assert [alive(theirs, token) for token in other] == [False, True, True]
    other = other[1:]
    assert listed(ours) == ids(ours, *mine)
    assert listed(theirs) == ids(theirs, *other)
    other.append(rejecting.start(300, subject="alice"))
    with pytest.raises(TooManySessionsError):
        rejecting.start(300, subject="alice")
    anonymous = rejecting.start(300)
    with pytest.raises(TooManySessionsError):
        rejecting.renew(anonymous, subject="alice")
    rejecting.end(anonymous)
    for token in other:
        with pytest.raises(SessionNotFoundError):
            ours.end_one("alice", theirs.verify(token))
    other[0] = rejecting.renew(other[0], subject="alice")
    assert len(listed(ours)) == 2
    mine[0] = ours.renew(mine[0])
    mine[1] = ours.renew(mine[1], subject="alice")
    assert ours.end_all("alice", keep=mine[0]) == 1
    assert listed(ours) == ids(ours, mine[0])
    assert listed(theirs) == ids(theirs, *other)
    assert ours.end_all("alice") == 1
    assert listed(ours) == []
    assert all(alive(theirs, token) for token in other)
    assert sorted(entries(client)) == sorted(ids(theirs, *other))
    assert theirs.end_all("alice") == 3
    assert all_keys(client) == set()


def test_a_ring_sees_the_sessions_of_all_its_keys(backend: Backend) -> None:
    """With a ring, sessions of every key in it are listed, counted and ended; of others none."""
    old, new = backend.gate(OURS), backend.gate(THEIRS)
    both = backend.gate([THEIRS, OURS], max_sessions=3)
    before, after = old.start(300, subject="alice"), new.start(300, subject="alice")
    assert listed(both) == ids(both, before, after)
    assert listed(old) == ids(old, before)
    assert listed(new) == ids(new, after)
    third = both.start(300, subject="alice")
    fourth = both.start(300, subject="alice")
    assert not alive(both, before)
    assert listed(both) == ids(both, after, third, fourth)
    before = old.start(300, subject="alice")
    both.end_one("alice", old.verify(before))
    before = old.start(300, subject="alice")
    assert both.end_all("alice") == 4
    assert not alive(old, before)


# The limit.


def test_the_oldest_go_when_there_are_too_many(backend: Backend) -> None:
    """Beyond max_sessions each new session ends the oldest, by when they were started."""
    gate = backend.gate(max_sessions=3)
    tokens = [gate.start(ttl, {"user": "1"}, subject="alice") for ttl in (900, 800, 700)]
    tokens[0] = gate.renew(tokens[0])
    gate.expire(tokens[0], 2_000)  # neither makes it younger
    for ttl in (600, 500, 400):
        tokens.append(gate.start(ttl, subject="alice"))
        assert [alive(gate, token) for token in tokens] == [False] * (len(tokens) - 3) + [True] * 3
        assert listed(gate) == ids(gate, *tokens[-3:])
    for _ in range(5):  # without a subject there is no limit, and each subject has its own
        assert alive(gate, gate.start(300))
    assert alive(gate, gate.start(300, subject="bob"))
    assert len(listed(gate)) == 3


def test_a_start_is_rejected_when_there_are_too_many(backend: Backend, client: Redis) -> None:
    """Where the limit rejects, a start beyond it leaves everything as it was."""
    gate = backend.gate(max_sessions=2, on_overflow="reject")
    tokens = [gate.start(300, subject="alice") for _ in range(2)]
    before = all_keys(client), entries(client)
    for _ in range(3):
        with pytest.raises(TooManySessionsError):
            gate.start(300, {"user": "1"}, subject="alice")
    assert (all_keys(client), entries(client)) == before
    assert listed(gate) == ids(gate, *tokens)
    gate.end_one("alice", gate.verify(tokens[0]))
    tokens.append(gate.start(300, subject="alice"))
    assert listed(gate) == ids(gate, *tokens[1:])
    assert alive(gate, gate.start(300, subject="bob"))
    assert alive(gate, gate.start(300))


def test_a_limit_of_one(backend: Backend) -> None:
    """With max_sessions=1 a subject is signed in at one place at a time."""
    gate = backend.gate(max_sessions=1)
    first = gate.start(300, subject="alice")
    second = gate.start(300, subject="alice")
    assert [alive(gate, first), alive(gate, second)] == [False, True]


@pytest.mark.parametrize("on_overflow", ["evict", "reject"])
def test_what_ended_is_not_counted(backend: Backend, client: Redis, on_overflow: str) -> None:
    """Sessions that ended in whatever way take no room."""
    gate = backend.gate(max_sessions=3, on_overflow=on_overflow)
    keeps = gate.start(300, subject="alice")
    endings: list[Callable[[str], object]] = [
        gate.end,
        lambda token: gate.expire(token, 0),
        lambda token: gate.end_one("alice", gate.verify(token)),
        lambda token: vanish(client, gate, token),
        lambda token: gate.renew(token, subject="bob"),
        lambda _: gate.end_all("alice", keep=keeps),
    ]
    for end in endings:
        for _ in range(2):
            end(gate.start(300, subject="alice"))
        others = [gate.start(300, subject="alice") for _ in range(2)]
        assert listed(gate) == ids(gate, keeps, *others)
        for token in others:
            gate.end(token)
    assert gate.start(0, subject="alice")  # over at once: needs no room and takes none
    others = [gate.start(300, subject="alice") for _ in range(2)]
    gate.start(0, subject="alice")
    assert listed(gate) == ids(gate, keeps, *others)


@one_gate
def test_what_expired_is_neither_listed_nor_counted(backend: Backend, client: Redis) -> None:
    """When ttl or idle timeout are over a session is not listed, counted, nor in the index."""
    gate = backend.gate(max_sessions=3, on_overflow="reject")
    keeps = gate.start(300, subject="alice")
    gate.start(1, subject="alice")
    gate.start(300, subject="alice", idle_timeout=1)
    for subject in ("bob", "carol"):
        gate.start(1, subject=subject)
    for subject in ("dave", "eve"):
        gate.start(300, subject=subject)
        gate.start(1, subject=subject)
        gate.start(300, subject=subject, idle_timeout=1)
    gate.expire(gate.start(300, subject="frank"), 1)
    with pytest.raises(TooManySessionsError):
        gate.start(300, subject="alice")
    time.sleep(1.1)
    # An index that nobody touches is gone with its last session, without being asked for.
    assert client.exists("sg-session:subject:{bob}") == 0
    assert client.exists("sg-session:subject:{frank}") == 0
    tokens = [gate.start(300, subject="alice") for _ in range(2)]
    assert listed(gate) == ids(gate, keeps, *tokens)
    assert int(client.zcard(INDEX)) == 3
    assert len(gate.sessions("dave")) == gate.end_all("eve") == 1
    assert int(client.zcard("sg-session:subject:{dave}")) == 1
    assert client.exists("sg-session:subject:{eve}") == 0
    assert listed(gate, "carol") == []


def test_a_limit_that_was_lowered(backend: Backend) -> None:
    """A gate with a lower limit ends as many of the oldest as it takes, or rejects."""
    tokens = [backend.gate().start(300, subject="alice") for _ in range(10)]
    with pytest.raises(TooManySessionsError):
        backend.gate(max_sessions=3, on_overflow="reject").start(300, subject="alice")
    gate = backend.gate(max_sessions=3)
    assert listed(gate) == ids(gate, *tokens)
    last = gate.start(300, subject="alice")
    assert listed(gate) == ids(gate, *tokens[-2:], last)


@pytest.mark.parametrize("on_overflow", ["evict", "reject"])
def test_a_start_at_the_limit_whose_reply_was_lost(
    flavour: Flavour, server: Server, on_overflow: str
) -> None:
    """A start that ran and whose reply was lost made one session, and evicted at most one."""
    with Proxy(server.port) as proxy:
        client = flavour.client(proxy.port, retry=flavour.no_retry)
        gate = flavour.gate(client, max_sessions=2, on_overflow=on_overflow)
        gate.start(300, subject="bob")
        first = gate.start(300, subject="alice")
        proxy.cut_replies = 1
        second = gate.start(300, {"user": "x"}, subject="alice")
        assert proxy.cut_replies == 0
    looking = flavour.gate(flavour.client(server.port))
    assert listed(looking) == ids(looking, first, second)
    assert looking.pget(second, "user") == b"x"


@pytest.mark.parametrize("max_sessions", [0, -1, True, False, 1.0, "3", b"3", [3]], ids=repr)
def test_a_limit_that_cannot_be_used(flavour: Flavour, max_sessions: object) -> None:
    """A limit is a whole number of at least 1, or the gate is not made."""
    with pytest.raises(ConfigurationError, match="max_sessions is a whole number"):
        flavour.gate(flavour.client(1), max_sessions=max_sessions)
    with pytest.raises(ConfigurationError, match="max_sessions is a whole number"):
        flavour.gate_from_url("memory://", max_sessions=max_sessions)


@pytest.mark.parametrize("on_overflow", ["", "Evict", None, True, b"evict", ["evict"]], ids=repr)
def test_an_overflow_that_cannot_be_used(flavour: Flavour, on_overflow: object) -> None:
    """What is to be done at the limit is "evict" or "reject", or the gate is not made."""
    for max_sessions in (None, 3):
        with pytest.raises(ConfigurationError, match="on_overflow is 'evict' or 'reject'"):
            flavour.gate(flavour.client(1), max_sessions=max_sessions, on_overflow=on_overflow)
        with pytest.raises(ConfigurationError, match="on_overflow is 'evict' or 'reject'"):
            flavour.gate_from_url("memory://", max_sessions=max_sessions, on_overflow=on_overflow)


# The index.


def index_ttl(client: Redis) -> int:
    return int(client.pttl(INDEX))


def test_an_index_ends_with_its_last_session(client: Redis, gate: SessionGate) -> None:
    """After each change the index ends when the last of its sessions does at the latest."""
    tokens = [gate.start(ttl, subject="alice") for ttl in (100, 300, 200)]
    assert_about(index_ttl(client), 300)
    gate.expire(tokens[0], 600)
    assert_about(index_ttl(client), 600)
    gate.expire(tokens[0], 50)
    assert_about(index_ttl(client), 300)
    gate.end_one("alice", gate.verify(tokens[1]))
    assert_about(index_ttl(client), 200)
    idle = gate.start(500, subject="alice", idle_timeout=10)
    assert_about(index_ttl(client), 500)  # use may keep it that long
    gate.expire(idle, 400)
    assert_about(index_ttl(client), 400)
    idle = gate.renew(idle, subject="alice")
    assert_about(index_ttl(client), 400)
    gate.renew(idle, subject="bob")
    gate.sessions("alice")
    assert_about(index_ttl(client), 200)
    gate.end_all("alice", keep=tokens[0])
    assert_about(index_ttl(client), 50)
    gate.renew(gate.start(700), subject="alice")
    assert_about(index_ttl(client), 700)
    gate.end_all("alice")
    assert index_ttl(client) == -2


def test_an_index_ends_with_those_that_are_left_by_the_limit(
    backend: Backend, client: Redis
) -> None:
    """When the session that would have ended last is evicted the index ends earlier."""
    gate = backend.gate(max_sessions=2)
    for ttl in (900, 100):
        gate.start(ttl, subject="alice")
    assert_about(index_ttl(client), 900)
    gate.start(200, subject="alice")
    assert_about(index_ttl(client), 200)
    assert int(client.zcard(INDEX)) == 2


def test_an_entry_tells_when_its_session_ends(client: Redis, gate: SessionGate) -> None:
    """Each session is in the index once, at its absolute end, which only expire moves."""
    token = gate.start(300, subject="alice", idle_timeout=10)
    for ttl in (300, 600, 100, 400):
        if ttl != 300:
            gate.expire(token, ttl)
        gate.touch(token)
        token = gate.renew(token)
        assert entries(client) == ids(gate, token)
        (entry,) = client.zrange(INDEX, 0, -1)
        ends = float(client.zscore(INDEX, cast("bytes", entry)) or 0)
        assert abs(ends / 1000 - gate.info(token).expires_at.timestamp()) < 0.01
        assert_about(ends - datetime.now(UTC).timestamp() * 1000, ttl)


def test_entries_of_sessions_that_ended_go(client: Redis, gate: SessionGate) -> None:
    """What ended without telling the index goes from it as soon as it is looked at."""
    for look in (lambda: gate.sessions("alice"), lambda: gate.end_all("alice")):
        live = gate.start(300, subject="alice")
        for end in (gate.end, lambda token: vanish(client, gate, token)):
            end(gate.start(400, subject="alice"))
        assert int(client.zcard(INDEX)) == 3
        look()
        left = int(client.zcard(INDEX))
        assert left == alive(gate, live)
        if left:
            assert_about(index_ttl(client), 300)
            gate.end_one("alice", gate.verify(live))
    assert client.keys() == []


def test_entries_whose_ttl_is_over_go(client: Redis, gate: SessionGate) -> None:
    """Entries whose time is over go whenever somebody touches the index, those of a start too."""
    live = gate.start(300, subject="alice")
    for touch in (
        lambda: gate.start(300, subject="alice"),
        lambda: gate.sessions("alice"),
        lambda: gate.end_all("alice", keep=live),
    ):
        past = {f"{number:016}{number:016}": 1_000 + number for number in range(500)}
        client.zadd(INDEX, past)
        touch()
        assert int(client.zcard(INDEX)) == len(listed(gate)) <= 2


def test_an_index_does_not_grow_by_sessions_that_end(client: Redis, gate: SessionGate) -> None:
    """Without a limit, the index holds at most twice the live sessions and sixteen."""
    for live in (0, 5, 20):
        for _ in range(live):
            gate.start(300, subject="alice")
        for _ in range(60):
            gate.end(gate.start(300, subject="alice"))
            assert int(client.zcard(INDEX)) <= 2 * live + 16
        assert len(listed(gate)) == live
        gate.end_all("alice")
    assert client.keys() == []


def test_something_else_at_the_index(client: Redis, gate: SessionGate) -> None:
    """Something else at the index's Redis key is redis-py's error, and nothing is half done."""
    token = gate.start(300, {"user": "1"}, subject="alice")
    session_id = gate.verify(token)
    anonymous = gate.start(300, {"user": "2"})
    client.delete(INDEX)
    client.set(INDEX, "not an index")
    keys = set(client.keys())
    for call in (
        lambda: gate.start(300, {"user": "3"}, subject="alice"),
        lambda: gate.renew(anonymous, subject="alice"),
        lambda: gate.renew(token, subject="alice"),
        lambda: gate.expire(token, 500),
        lambda: gate.sessions("alice"),
        lambda: gate.end_all("alice"),
        lambda: gate.end_one("alice", session_id),
    ):
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            call()
        assert set(client.keys()) == keys
    assert client.get(INDEX) == b"not an index"
    assert_about(gate.info(token).seconds_left * 1000, 300)
    assert gate.info(token).generation == gate.info(anonymous).generation == 0
    assert gate.pget(token, "user") == b"1"
    assert gate.pget(anonymous, "user") == b"2"
    gate.end(token)
    assert client.get(INDEX) == b"not an index"


def test_an_id_that_another_session_has_is_drawn_again(backend: Backend) -> None:
    """A start with a subject that draws an id in use leaves that session and draws again."""
    numbers = iter([0, 0, 0, 0, 1, 1])
    gate = backend.gate(random=lambda size: bytes([next(numbers)]) * size)
    first = gate.start(300, {"user": "1"}, subject="alice")
    second = gate.start(300, {"user": "2"}, subject="alice")
    assert listed(gate) == ids(gate, first, second)
    assert gate.pget(first, "user") == b"1"
    assert gate.pget(second, "user") == b"2"


# Slots and ids.

braced = st.text("{}ab%", max_size=12).map(str.encode)


@given(st.one_of(st.binary(max_size=40), braced))
@example(b"")
@example(b"{}")
@example(b"{}{a}")
@example(b"{{a}}")
@example(b"}{a}")
@example(b"a{b}c{d}")
@example(b"{a")
def test_slots_are_those_of_redis(key: bytes) -> None:
    """The slot of any key, braces in whatever order included, is the one that redis-py has."""
    assert slot_of(key) == key_slot(key)


text = st.characters(exclude_categories=["Cs"])
names = st.one_of(
    st.text("{}%ab\0", min_size=1, max_size=20), st.text(text, min_size=1, max_size=50)
)


@given(
    names,
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="{}"), min_size=1),
)
def test_keys_of_any_subject_share_a_slot(subject: str, prefix: str) -> None:
    """Whatever subject and prefix, an id drawn for the subject lives in the slot of its index."""
    prefix = prefix[:50]
    assume(not prefix.endswith((":subject", ":tries")))  # kept for others
    keyspace = Keyspace(prefix, system_random)
    index = keyspace.index_key(subject.encode())
    session_id = keyspace.new_id_in(slot_of(index))
    key = keyspace.session_key(session_id)
    assert key_slot(key) == key_slot(index)
    assert len(session_id) == 16
    assert not session_id.encode().strip(ID_ALPHABET)


def test_the_name_of_an_index() -> None:
    """A subject's braces and per cent signs are escaped in the name of its index, and no others."""
    keyspace = Keyspace("sg", system_random)
    name = keyspace.index_key("a{b}%7B:é\0 ".encode())
    assert name == "sg:subject:{a%7Bb%7D%257B:é\0 }".encode()


@given(names, names)
def test_subjects_have_indexes_of_their_own(one: str, other: str) -> None:
    """Two subjects never share an index, and no index is named as a session."""
    keyspace = Keyspace("sg", system_random)
    first, second = (keyspace.index_key(name.encode()) for name in (one, other))
    assert (first == second) == (one == other)
    assert first[:4] != keyspace.session_key("A" * 16)[:4]


def test_every_slot_is_reached_by_endings() -> None:
    """From any beginning an id reaches any slot, by 8 endings or more, none of them mostly."""
    home = slot_of(b"A" * 16)
    for delta in range(SLOTS):
        found = Counter(_ending(delta, where) for where in range(62))
        for ending in found:
            assert slot_of(b"A" * 13 + ending) == home ^ delta
        assert len(found) >= 8
        assert max(found.values()) <= 31


def test_ids_of_a_slot_are_drawn_evenly() -> None:
    """In the free letters of ids of one slot each is as likely as any other; no id comes twice."""
    keyspace = Keyspace("sg", system_random)
    drawn = [keyspace.new_id_in(4_711) for _ in range(20_000)]
    assert len(set(drawn)) == 20_000
    assert {slot_of(b"{%b}" % session_id.encode()) for session_id in drawn} == {4_711}
    # 4,194 of each expected among 260,000; standard deviation 64: 6 of them either way.
    letters = Counter("".join(session_id[:13] for session_id in drawn))
    assert len(letters) == 62
    assert all(3_810 < count < 4_580 for count in letters.values())
    # The others follow from the slot, but all occur.
    for place in (13, 14, 15):
        assert len({session_id[place] for session_id in drawn}) == 62
