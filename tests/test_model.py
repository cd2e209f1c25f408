"""A model of sessions and payloads: whatever the calls, a gate does what a dictionary would."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime
from itertools import product
from time import time
from typing import Any, Protocol

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from redis import Redis

from sessiongate import (
    ArgumentError,
    AsyncSession,
    Codec,
    HandleError,
    JSONCodec,
    MsgpackCodec,
    PayloadConflictError,
    PayloadNotFoundError,
    PayloadOverflowError,
    PayloadTypeError,
    SessionGate,
    SessionInfo,
    SessionNotFoundError,
    TooManySessionsError,
)

from .conftest import CLUSTERED, FLAVOURS, POOLED, AnyClient, Backend

# Some few, so that an operation meets what another one left; and names of our own fields.
names = st.one_of(
    *[st.just("cart")] * 3,
    st.sampled_from(["user", "cart", "visits"]),
    st.sampled_from(["user", "cart", "fp", ":fp", ";fp", "old", "sub", "gen", "sum"]),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50),
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
sizes = st.sampled_from([64, 65, 70_000])
counts = st.sampled_from([0, 41, -7, 2**63 - 1, -(2**63), 2**63])
scalars = st.one_of(
    counts,
    texts,
    sizes.map(lambda size: "x" * size),
    st.sampled_from([None, True, False, 1, 0.0, -1.5, 1e300, "41"]),
)


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """These, and lists and dicts of them."""
    return leaves | st.recursive(
        st.lists(leaves, max_size=3),
        lambda inner: st.dictionaries(texts, inner | leaves, max_size=3),
        max_leaves=4,
    )


class Backwards:
    """A codec of the application's own, which knows no types: text, its bytes in reverse."""

    def encode(self, value: str) -> bytes:
        return value.encode()[::-1]

    def decode(self, data: bytes) -> str:
        return data[::-1].decode()


@dataclass(frozen=True)
class Kind:
    """What values a gate has with one codec, and what it is to make of them.

    Attributes:
        codec: makes the codec; None for a gate without.
        values: what is stored.
        first: what each session begins with.
        encode: what the codec has to make of a value.
        decode: what comes back of that.
        grown: another value, that is made of one and cannot be changed in place itself.
    """

    codec: Callable[[], Codec[Any, Any]] | None
    values: st.SearchStrategy[Any]
    first: object
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    grown: Callable[[Any], Any] = str


def raw(data: bytes | str) -> bytes:
    return data.encode() if isinstance(data, str) else data


def as_json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def as_msgpack(value: object) -> bytes:
    if type(value) is int and value < 2**63:
        return str(value).encode()
    return msgspec.msgpack.encode(value)


def from_msgpack(data: bytes) -> object:
    return int(data) if re.fullmatch(rb"-?[0-9]+", data) else msgspec.msgpack.decode(data)


KINDS = {
    "bytes": Kind(
        codec=None,
        values=st.one_of(
            st.sampled_from([b"0", b"41", b"-7", b"9223372036854775807", b"1.5"]),
            st.binary(min_size=1, max_size=70),
            texts.filter(len),
            sizes.map(lambda size: b"x" * size),
        ),
        first="[]",
        encode=raw,
        decode=bytes,
        grown=lambda data: data + b"x",
    ),
    "JSON": Kind(JSONCodec, nested(scalars), [], as_json, json.loads),
    "msgpack": Kind(
        MsgpackCodec, nested(scalars | st.binary(max_size=70)), [], as_msgpack, from_msgpack
    ),
    "own": Kind(
        Backwards,
        st.sampled_from(["0", "14", "7-", "x" * 70_000]) | texts.filter(len),
        "[]",
        lambda text: raw(text)[::-1],
        lambda data: data[::-1].decode(),
        grown=lambda text: text + "x",
    ),
}
SEALING_KEY = "5e" * 32
SEAL = 48  # what a seal adds to data

values = st.runner().flatmap(lambda model: model.kind.values)
mappings = st.dictionaries(names, values, max_size=4)
asked_names = st.lists(names, max_size=4)
# What an application does with a session in its hands.
deeds = st.tuples(st.sampled_from(["read", "assign", "delete", "grow", "list"]), names, values)
AS_HELD = object()  # for `if_match`, of which None is a value
ttls = st.sampled_from([60, 3_600, 3_601, 0])
idle_timeouts = st.sampled_from([None, 30, 7_200])
# A grace of some seconds might end in the middle of an example.
graces = st.sampled_from([0, 600])
payload_ttls = st.sampled_from([None, 900, None, 900, 0])
SUBJECTS = ["alice", "{%}é"]
subjects = st.sampled_from(SUBJECTS)
whiches = st.integers(0, 1)

KEYS = ["one sign key, of thirty-two bytes", "another key, of thirty-two bytes"]
LIMIT = 2
# Of each sign key a gate without a limit, one that evicts and one that rejects.
POLICIES: dict[str, dict[str, object]] = {
    "any number": {},
    "evict": {"max_sessions": LIMIT, "on_overflow": "evict"},
    "reject": {"max_sessions": LIMIT, "on_overflow": "reject"},
}
policies = st.sampled_from(list(POLICIES))

# Of all tokens there ever were most are soon dead, and many sessions have each little done to them:
# half of the time it is the token of the session that has lived longest.
tokens = st.runner().flatmap(
    lambda model: st.one_of(
        *[st.just(model.live[0].token if model.live else model.tokens[0])] * 2,
        st.sampled_from(model.good_tokens() or model.tokens),
        st.sampled_from(model.tokens),
    )
)

MAX_PREDECESSORS = 16
CLOCK_SLACK = 1.0


def counted(data: bytes) -> int | None:
    """The number that a counter holds; None if it is no counter."""
    if re.fullmatch(rb"0|-?[1-9][0-9]{0,18}", data) and -(2**63) <= int(data) < 2**63:
        return int(data)
    return None


@dataclass
class Span:
    """A moment that is known to lie between two."""

    first: float
    last: float

    def after(self, seconds: float) -> "Span":
        return Span(self.first + seconds, self.last + seconds)

    def may_be(self, other: "Span") -> bool:
        """Whether they may be the same moment, if the clock was not set meanwhile."""
        return self.first - CLOCK_SLACK <= other.last and other.first <= self.last + CLOCK_SLACK


def at(moment: float) -> Span:
    return Span(moment, moment)


@dataclass(frozen=True)
class Payload:
    """What was stored: what it reads as, and its bytes before they are sealed."""

    value: Any
    data: bytes


class Handle(Protocol):
    """What both kinds of handle have, once they were read."""

    def __getitem__(self, name: str) -> Any: ...
    def __setitem__(self, name: str, value: Any) -> None: ...
    def __delitem__(self, name: str) -> None: ...
    def __iter__(self) -> Iterator[str]: ...


@dataclass
class Session:
    """What the model knows of a live session."""

    which: int
    token: str
    number: int
    created: Span
    ends: Span
    # When its idle timeout began anew, at the earliest.
    used: Span
    idle_timeout: int | None
    subject: str | None
    payloads: dict[str, Payload]
    timed: set[str] = field(default_factory=set)
    generation: int = 0
    created_at: datetime | None = None
    # The tokens before this one, under the same id, and whether they have a grace.
    predecessors: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.token[3:19]

    @property
    def key(self) -> bytes:
        return f"sg-session:{{{self.id}}}".encode()

    def last(self, now: Span) -> Span:
        """When it ends if nobody uses it."""
        if not self.idle_timeout:
            return self.ends
        idle = Span(self.used.first, now.last).after(self.idle_timeout)
        return Span(min(self.ends.first, idle.first), min(self.ends.last, idle.last))

    def good_tokens(self) -> list[str]:
        """Those that open it, the oldest first."""
        recent = self.predecessors[-MAX_PREDECESSORS:]
        return [*(token for token, has_grace in recent if has_grace), self.token]


class Sessions(RuleBasedStateMachine):
    """Gates of two sign keys on one store, and dictionaries that say what they hold."""

    backend: Backend
    kind: Kind
    seals: bool
    clients: list[Redis]
    gates: dict[tuple[int, str], SessionGate[Any, Any]]

    @initialize()
    def empty(self) -> None:
        for client in self.clients:
            client.flushall()
        self.live: list[Session] = []
        self.tokens: list[str] = []
        self.owner: dict[str, int] = {}
        self.was_listed: dict[str, set[str]] = {}
        self.started = 0
        for which in range(len(KEYS)):
            for subject in [SUBJECTS[0], None, *SUBJECTS]:
                self.start((which, "any number"), 3_600, {"cart": self.kind.first}, subject, None)

    # Lifetime

    @rule(
        at=st.tuples(whiches, policies),
        ttl=ttls,
        payloads=mappings,
        subject=st.none() | subjects,
        idle_timeout=idle_timeouts,
    )
    def start(
        self,
        at: tuple[int, str],
        ttl: int,
        payloads: dict[str, Any],
        subject: str | None,
        idle_timeout: int | None,
    ) -> None:
        which, policy = at
        gate = self.gates[at]
        before = time()
        if ttl and subject and self.must_reject(which, policy, subject):
            with pytest.raises(TooManySessionsError):
                gate.start(ttl, payloads, subject=subject, idle_timeout=idle_timeout)
            return
        token = gate.start(ttl, payloads, subject=subject, idle_timeout=idle_timeout)
        self.know(token, which)
        if ttl:
            if subject:
                self.evict(which, policy, subject)
            self.started += 1
            now = Span(before, time())
            held = {name: self.payload(value) for name, value in payloads.items()}
            self.join(
                Session(
                    which=which,
                    token=token,
                    number=self.started,
                    created=now,
                    ends=now.after(ttl),
                    used=now,
                    idle_timeout=idle_timeout,
                    subject=subject,
                    payloads=held,
                )
            )

    @rule(token=tokens)
    def touch(self, token: str) -> None:
        with self.expected(token):
            self.gate_of(token).touch(token)

    @rule(token=tokens)
    def info(self, token: str) -> None:
        before = time()
        with self.expected(token):
            info = self.gate_of(token).info(token)
            self.check_info(info, self.opened_by(token), Span(before, time()))

    @rule(token=tokens, ttl=ttls)
    def expire(self, token: str, ttl: int) -> None:
        before = time()
        with self.expected(token):
            self.gate_of(token).expire(token, ttl)
            session = self.opened_by(token)
            session.used = Span(before, time())
            session.ends = session.used.after(ttl)
            if not ttl:
                self.live.remove(session)

    @rule(token=tokens)
    def end(self, token: str) -> None:
        with self.expected(token):
            self.gate_of(token).end(token)
            self.live.remove(self.opened_by(token))

    # Renewal

    @rule(token=tokens, grace=graces)
    def renew(self, token: str, grace: int) -> None:
        with self.expected(token):
            renewed = self.gate_of(token).renew(token, grace=grace)
            session = self.opened_by(token)
            good = session.good_tokens()
            if token == session.token:
                self.know(renewed, session.which)
                session.predecessors.append((token, grace > 0))
                session.token = renewed
                session.generation += 1
            else:
                assert renewed == good[good.index(token) + 1]

    @rule(token=tokens, policy=policies, subject=subjects)
    def adopt(self, token: str, policy: str, subject: str) -> None:
        """It signs in: a new id, a new token, and the old ones are dead."""
        session = self.opens(token)
        gate = self.gate_of(token, policy)
        if session and self.must_reject(session.which, policy, subject, session):
            with pytest.raises(TooManySessionsError):
                gate.renew(token, subject=subject)
            return
        with self.expected(token):
            renewed = gate.renew(token, subject=subject)
            session = self.opened_by(token)
            assert renewed[3:19] != session.id
            self.evict(session.which, policy, subject, session)
            self.live.remove(session)
            self.know(renewed, session.which)
            # Of which token it is the successor is what a token tells.
            version, _, generation, *_ = token.split(".")
            session.generation = int(generation) + 1 if version == "v2" else 1
            session.token, session.subject, session.predecessors = renewed, subject, []
            self.join(session)

    # A user's sessions

    @rule(which=whiches, policy=policies, subject=subjects)
    def sessions(self, which: int, policy: str, subject: str) -> None:
        before = time()
        infos = self.gates[which, policy].sessions(subject)
        now = Span(before, time())
        theirs = self.sessions_of(which, subject)
        assert [info.id for info in infos] == [session.id for session in theirs]
        for info, session in zip(infos, theirs, strict=True):
            self.check_info(info, session, now)
        self.forget_ended(subject)

    @rule(which=whiches, policy=policies, subject=subjects, token=st.none() | tokens)
    def end_all(self, which: int, policy: str, subject: str, token: str | None) -> None:
        keep = token if token and self.owner[token] == which else None
        theirs = self.sessions_of(which, subject)
        ending = [session for session in theirs if not keep or session.id != keep[3:19]]
        assert self.gates[which, policy].end_all(subject, keep=keep) == len(ending)
        for session in ending:
            self.live.remove(session)
        self.forget_ended(subject)

    @rule(which=whiches, subject=subjects, token=tokens)
    def end_one(self, which: int, subject: str, token: str) -> None:
        gate = self.gates[which, "any number"]
        for session in self.sessions_of(which, subject):
            if session.id == token[3:19]:
                gate.end_one(subject, session.id)
                self.live.remove(session)
                return
        with pytest.raises(SessionNotFoundError):
            gate.end_one(subject, token[3:19])

    # Payloads

    @rule(token=tokens, name=names, value=values, ttl=payload_ttls)
    def pset(self, token: str, name: str, value: object, ttl: int | None) -> None:
        with self.expected(token):
            self.gate_of(token).pset(token, name, value, ttl=ttl)
            self.store(token, name, value, ttl)

    @rule(token=tokens, name=names, value=values, ttl=payload_ttls)
    def pset_if_absent(self, token: str, name: str, value: object, ttl: int | None) -> None:
        session = self.opens(token)
        conflict = session and name in session.payloads
        with pytest.raises(PayloadConflictError) if conflict else self.expected(token):
            self.gate_of(token).pset(token, name, value, if_absent=True, ttl=ttl)
            self.store(token, name, value, ttl)

    @rule(token=tokens, name=names, value=values, ttl=payload_ttls, guess=st.just(AS_HELD) | values)
    def pset_if_match(
        self, token: str, name: str, value: object, ttl: int | None, guess: object
    ) -> None:
        session = self.opens(token)
        held = session.payloads.get(name) if session else None
        match = guess
        if guess is AS_HELD:
            match = held.value if held else "nothing"
        conflict = session and (held is None or held.data != self.kind.encode(match))
        with pytest.raises(PayloadConflictError) if conflict else self.expected(token):
            self.gate_of(token).pset(token, name, value, if_match=match, ttl=ttl)
            self.store(token, name, value, ttl)

    @rule(token=tokens, payloads=mappings, delete=st.just([]) | asked_names)
    def pset_many(self, token: str, payloads: dict[str, Any], delete: list[str]) -> None:
        both = not payloads.keys().isdisjoint(delete)
        with pytest.raises(ArgumentError, match="not both") if both else self.expected(token):
            self.gate_of(token).pset_many(token, payloads, delete=delete)
            for name, value in payloads.items():
                self.store(token, name, value, None)
            for name in delete:
                self.drop(token, name)

    @rule(token=tokens, name=names)
    def pget(self, token: str, name: str) -> None:
        with self.expected(token, name):
            value = self.gate_of(token).pget(token, name)
            self.check_value(value, self.opened_by(token).payloads[name])

    @rule(token=tokens, asked=asked_names)
    def pget_many(self, token: str, asked: list[str]) -> None:
        with self.expected(token):
            found = self.gate_of(token).pget_many(token, asked)
            held = self.opened_by(token).payloads
            self.check_values(found, {name: held[name] for name in asked if name in held})

    @rule(token=tokens)
    def pall(self, token: str) -> None:
        with self.expected(token):
            self.check_values(self.gate_of(token).pall(token), self.opened_by(token).payloads)

    @rule(token=tokens, name=names)
    def pdel(self, token: str, name: str) -> None:
        with self.expected(token, name):
            self.gate_of(token).pdel(token, name)
            self.drop(token, name)

    @rule(token=tokens, name=names)
    def ppop(self, token: str, name: str) -> None:
        with self.expected(token, name):
            value = self.gate_of(token).ppop(token, name)
            self.check_value(value, self.opened_by(token).payloads[name])
            self.drop(token, name)

    @rule(token=tokens, name=names, by=st.sampled_from([1, -3, 0, 2**63 - 1, -(2**63)]))
    def pincr(self, token: str, name: str, by: int) -> None:
        session = self.opens(token)
        held = session.payloads[name].data if session and name in session.payloads else b"0"
        before = counted(held)
        if before is None and self.backend.server is None and re.fullmatch(rb"[\s\d+_-]+", held):
            return  # fakeredis takes "007" for a number, as Python does
        if self.seals:
            expected: AbstractContextManager[object] = pytest.raises(ArgumentError, match="seals")
        elif before is None:
            expected = pytest.raises(PayloadTypeError)
        elif not -(2**63) <= before + by < 2**63:
            expected = pytest.raises(PayloadOverflowError)
        else:
            expected = self.expected(token)
        with expected:
            total = self.gate_of(token).pincr(token, name, by)
            assert before is not None
            assert total == before + by
            data = b"%d" % total
            self.opened_by(token).payloads[name] = Payload(self.kind.decode(data), data)

    # A handle

    @rule(token=tokens, asked=st.none() | asked_names, deeds=st.lists(deeds, max_size=5))
    def handle(
        self, token: str, asked: list[str] | None, deeds: list[tuple[str, str, Any]]
    ) -> None:
        session = self.opens(token)
        if session is None:
            # Without a deed it need not be noticed.
            with pytest.raises(SessionNotFoundError):
                self.use(token, asked, [("list", "", None), *deeds], {})
            return
        held = session.payloads
        there = {
            name: deepcopy(payload.value)
            for name, payload in held.items()
            if asked is None or name in asked
        }
        assigned, deleted = self.use(token, asked, deeds, there)
        for name, value in there.items():
            if name in assigned or self.kind.encode(value) != held[name].data:
                self.store(token, name, value, None)
        for name in deleted:
            self.drop(token, name)

    def use(
        self,
        token: str,
        asked: list[str] | None,
        deeds: list[tuple[str, str, Any]],
        there: dict[str, Any],
    ) -> tuple[set[str], set[str]]:
        """Do that with a session, and with what is there; the names assigned and deleted."""
        assigned: set[str] = set()
        deleted: set[str] = set()
        with self.opened(token, asked) as handle:
            for deed, name, value in deeds:
                if deed == "list":
                    self.check_values(
                        {each: handle[each] for each in handle},
                        {each: self.payload(value) for each, value in there.items()},
                    )
                elif deed == "assign":
                    # What is in the handle's hands is the application's to change.
                    handle[name], there[name] = deepcopy(value), self.payload(value).value
                    assigned.add(name)
                    deleted.discard(name)
                elif name in there:
                    self.check_value(handle[name], self.payload(there[name]))
                    if deed == "delete":
                        del handle[name], there[name]
                        assigned.discard(name)
                        deleted.add(name)
                    elif deed == "grow":
                        for owner in (handle, there):
                            grown = owner[name]
                            if isinstance(grown, list):
                                grown.append("more")
                            elif isinstance(grown, dict):
                                grown["more"] = len(grown)
                            else:
                                owner[name] = self.kind.grown(grown)
                                assigned.add(name)
                else:
                    unknown = asked is not None and name not in {*asked, *deleted}
                    with pytest.raises(HandleError if unknown else KeyError):
                        handle[name]
        return assigned, deleted

    @contextmanager
    def opened(self, token: str, asked: list[str] | None) -> Iterator[Handle]:
        """The block of a handle, whichever kind its gate has."""
        handle: Any = self.gate_of(token).open(token, names=asked)  # of one kind or the other
        if isinstance(handle, AsyncSession):
            run = self.backend.flavour.runner.run
            run(handle.load())
            yield handle
            run(handle.save())
        else:
            with handle:
                yield handle

    # Around them

    @rule(token=tokens)
    def guess(self, token: str) -> None:
        """The other sign key signs the same id, and finds nothing there."""
        other = self.gates[1 - self.owner[token], "any number"]
        guessed = other._commands._ring.sign(token[3:19])[0]
        with pytest.raises(SessionNotFoundError):
            other.pget(guessed, "user")
        with pytest.raises(SessionNotFoundError):
            other.renew(guessed)
        with pytest.raises(SessionNotFoundError):
            other.renew(guessed, subject="alice")
        with pytest.raises(SessionNotFoundError):
            other.end(guessed)

    @rule()
    def forget_scripts(self) -> None:
        for client in self.clients:
            client.script_flush()

    # What the model knows

    def know(self, token: str, which: int) -> None:
        assert token not in self.owner
        self.tokens.append(token)
        self.owner[token] = which

    def good_tokens(self) -> list[str]:
        """All that open a session."""
        return [token for session in self.live for token in session.good_tokens()]

    def gate_of(self, token: str, policy: str = "any number") -> SessionGate[Any, Any]:
        return self.gates[self.owner[token], policy]

    def opens(self, token: str) -> Session | None:
        """The session that a token opens."""
        found = [session for session in self.live if token in session.good_tokens()]
        assert len(found) <= 1
        return found[0] if found else None

    def opened_by(self, token: str) -> Session:
        session = self.opens(token)
        assert session is not None
        return session

    def sessions_of(self, which: int, subject: str) -> list[Session]:
        """The live sessions of a subject that one of the sign keys opened, the oldest first."""
        theirs = [one for one in self.live if one.which == which and one.subject == subject]
        return sorted(theirs, key=lambda session: session.number)

    def others_at_the_limit(
        self, which: int, subject: str, joining: Session | None
    ) -> list[Session]:
        """Those that are too many for one more, the oldest first."""
        theirs = [one for one in self.sessions_of(which, subject) if one is not joining]
        return theirs[: max(0, len(theirs) - LIMIT + 1)]

    def must_reject(
        self, which: int, policy: str, subject: str, joining: Session | None = None
    ) -> bool:
        too_many = self.others_at_the_limit(which, subject, joining)
        return policy == "reject" and bool(too_many)

    def evict(self, which: int, policy: str, subject: str, joining: Session | None = None) -> None:
        if policy == "evict":
            for session in self.others_at_the_limit(which, subject, joining):
                self.live.remove(session)

    def join(self, session: Session) -> None:
        self.live.append(session)
        if session.subject:
            self.was_listed.setdefault(session.subject, set()).add(session.id)

    def forget_ended(self, subject: str) -> None:
        """The index was touched: only live sessions are left in it."""
        self.was_listed[subject] = {one.id for one in self.live if one.subject == subject}

    def payload(self, value: object) -> Payload:
        """What becomes of a value that is stored now."""
        data = self.kind.encode(value)
        return Payload(self.kind.decode(data), data)

    def check_value(self, value: object, payload: Payload) -> None:
        assert value == payload.value
        assert type(value) is type(payload.value)
        # Also within: 1 and True are equal.
        assert self.kind.encode(value) == payload.data

    def check_values(self, found: dict[str, Any], payloads: dict[str, Payload]) -> None:
        assert found.keys() == payloads.keys()
        for name, value in found.items():
            self.check_value(value, payloads[name])

    def store(self, token: str, name: str, value: object, ttl: int | None) -> None:
        session = self.opened_by(token)
        session.payloads.pop(name, None)
        session.timed.discard(name)
        if ttl != 0:
            session.payloads[name] = self.payload(value)
        if ttl:
            session.timed.add(name)

    def drop(self, token: str, name: str) -> None:
        session = self.opened_by(token)
        session.payloads.pop(name, None)
        session.timed.discard(name)

    def check_info(self, info: SessionInfo, session: Session, now: Span) -> None:
        assert info.id == session.id
        assert info.subject == session.subject
        assert info.idle_timeout == session.idle_timeout
        assert info.generation == session.generation
        more = SEAL if self.seals else 0
        sizes = {name: len(payload.data) + more for name, payload in session.payloads.items()}
        assert info.payloads == sizes
        session.created_at = session.created_at or info.created_at
        assert info.created_at == session.created_at
        assert session.created.may_be(at(info.created_at.timestamp()))
        assert session.ends.may_be(at(info.expires_at.timestamp()))
        assert info.seconds_left > 0
        assert session.last(now).may_be(now.after(info.seconds_left))

    def expected(self, token: str, name: str | None = None) -> AbstractContextManager[object]:
        """The error that the model foresees, or none."""
        session = self.opens(token)
        if session is None:
            return pytest.raises(SessionNotFoundError)
        if name is not None and name not in session.payloads:
            return pytest.raises(PayloadNotFoundError)
        return nullcontext()

    # What Redis holds

    @invariant()
    def redis_holds_what_the_model_says(self) -> None:
        if not hasattr(self, "live"):
            return
        before = time()
        hashes, indexes, left = self.held()
        now = Span(before, time())
        by_key = {session.key: session for session in self.live}
        assert set(hashes) == set(by_key)
        for key, session in by_key.items():
            self.check_hash(hashes[key], session)
            assert left[key] > 0
            assert session.last(now).may_be(now.after(left[key] / 1000))
        subjects_by_key = {index_key(subject): subject for subject in self.was_listed}
        assert set(indexes) <= set(subjects_by_key)
        for key, subject in subjects_by_key.items():
            self.check_index(indexes.get(key, {}), subject)
            if key in indexes:
                assert left[key] > 0
                last = now.after(left[key] / 1000)
                assert last.may_be(at(max(indexes[key].values()) / 1000))

    def held(
        self,
    ) -> tuple[dict[bytes, dict[bytes, bytes]], dict[bytes, dict[bytes, float]], dict[bytes, int]]:
        """The sessions, the indexes, and of both how many milliseconds they have left."""
        hashes: dict[bytes, dict[bytes, bytes]] = {}
        indexes: dict[bytes, dict[bytes, float]] = {}
        left: dict[bytes, int] = {}
        for client in self.clients:
            keys = list(client.scan_iter(count=1_000))
            pipeline = client.pipeline(transaction=False)
            for key in keys:
                if b":subject:" in key:
                    pipeline.zrange(key, 0, -1, withscores=True)
                else:
                    pipeline.hgetall(key)
                pipeline.pttl(key)
            answers = pipeline.execute()
            for key, value, pttl in zip(keys, answers[::2], answers[1::2], strict=True):
                if b"taken" in value and b"fp" not in value:  # it went on in another slot
                    assert 0 < pttl <= 60_000
                    continue
                left[key] = pttl
                if isinstance(value, dict):
                    hashes[key] = value
                else:
                    indexes[key] = dict(value)
        return hashes, indexes, left

    def check_hash(self, held: dict[bytes, bytes], session: Session) -> None:
        held = dict(held)
        ring = self.gates[session.which, "any number"]._commands._ring
        own, old = held.pop(b"fp"), held.pop(b"old", b"")
        assert len(held.pop(b"did", b"")) in range(0, 65, 8)
        assert own[:16] == ring.verify(session.token)[1]
        started, ends, idle = own[16:32], own[32:45], own[45:]
        assert session.created.may_be(at(int(started) / 1_000_000))
        assert idle == (b"%d" % session.idle_timeout if session.idle_timeout else b"")
        if idle:
            assert session.ends.may_be(at(int(ends) / 1000))
        fingerprints = [old[at : at + 16] for at in range(0, len(old), 29)]
        assert len(fingerprints) <= MAX_PREDECESSORS
        recent = [ring.verify(token)[1] for token, _ in session.predecessors]
        assert fingerprints == recent[len(recent) - len(fingerprints) :]
        generation, _, _ = held.pop(b"gen", b"0").partition(b" ")
        assert generation == b"%d" % session.generation
        if session.subject:
            assert held.pop(b"sub") == ring.realms[0] + session.subject.encode()
        for name, payload in session.payloads.items():
            if name in session.timed:
                stored = held.pop(f";{name}".encode())
                assert time() < int(stored[:13]) / 1000 < time() + 900 + CLOCK_SLACK
                stored = stored[13:]
            else:
                stored = held.pop(f":{name}".encode())
            assert self.unsealed(session, name, stored) == payload.data
        assert held == {}

    def unsealed(self, session: Session, name: str, stored: bytes) -> bytes:
        if not self.seals:
            return stored
        assert stored.startswith(b"\xc1SG\x01")
        values = self.gates[session.which, "any number"]._commands.values
        return values.opened(f"sg-session:{{{session.id}}}".encode(), f":{name}".encode(), stored)

    def check_index(self, held: dict[bytes, float], subject: str) -> None:
        """Entries of live sessions are there, perhaps some of sessions that ended, no others."""
        by_id = {entry[16:].decode(): (int(entry[:16]), score) for entry, score in held.items()}
        assert len(by_id) == len(held)
        live = {session.id: session for session in self.live if session.subject == subject}
        assert set(live) <= set(by_id) <= self.was_listed[subject]
        for session_id, session in live.items():
            started, score = by_id[session_id]
            assert session.created.may_be(at(started / 1_000_000))
            assert session.ends.may_be(at(score / 1000))


def index_key(subject: str) -> bytes:
    spelt = subject.replace("%", "%25").replace("{", "%7B").replace("}", "%7D")
    return f"sg-session:subject:{{{spelt}}}".encode()


# In memory a step takes five times as long as on a server.
EXAMPLES = {"memory": 3, "server": 5, "cluster": 4}
CODED_EXAMPLES = {"memory": 2, "server": 4, "cluster": 2}


def run_model(backend: Backend, examples: dict[str, int], kind: Kind, *, seals: bool) -> None:
    """Any sequence of operations, on gates with that codec, which seal or do not."""
    shared: AnyClient = backend.gates_client()

    class OnBackend(Sessions):
        pass

    OnBackend.backend, OnBackend.kind, OnBackend.seals = backend, kind, seals
    OnBackend.clients = (
        [server.client() for server in backend.cluster.servers]
        if backend.cluster
        else [backend.client()]
    )
    OnBackend.gates = {
        (which, policy): backend.flavour.gate(
            shared,
            key,
            codec=kind.codec() if kind.codec else None,
            sealing_key=SEALING_KEY if seals else None,
            **options,
        )
        for which, key in enumerate(KEYS)
        for policy, options in POLICIES.items()
    }
    where = "cluster" if backend.cluster else "server" if backend.server else "memory"
    run_state_machine_as_test(
        OnBackend,
        settings=settings(
            max_examples=examples[where],
            stateful_step_count=60,
            deadline=None,
            # How fast it is depends on what else the machine does.
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
    for client in OnBackend.clients:
        client.close()


def test_a_gate_does_what_the_model_does(backend: Backend) -> None:
    """Any sequence of operations leaves exactly the sessions, payloads and indexes of a model."""
    run_model(backend, EXAMPLES, KINDS["bytes"], seals=False)


# What codecs and seals do, they do before anything is sent: on one server as on another. On a
# cluster a sealed session goes on in another slot.
CODED = [case for case in product(KINDS, [False, True]) if case != ("bytes", False)]
PLACES = ["memory", CLUSTERED] if CLUSTERED else ["memory"]
ON_CLUSTER = [("cluster", "sync", "bytes", True), ("cluster", POOLED, "JSON", True)]


@pytest.mark.parametrize(
    ("backend", "flavour", "kind", "seals"),
    [
        (place, FLAVOURS[(at + number) % len(FLAVOURS)], kind, seals)
        for number, place in enumerate(PLACES)
        for at, (kind, seals) in enumerate(CODED)
    ]
    + (ON_CLUSTER if CLUSTERED else []),
    indirect=["backend", "flavour"],
)
def test_a_gate_with_a_codec_does_what_the_model_does(
    backend: Backend, kind: str, seals: bool
) -> None:
    """It does so with every codec, on gates that seal and on gates that do not."""
    run_model(backend, CODED_EXAMPLES, KINDS[kind], seals=seals)
