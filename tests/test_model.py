"""A model of sessions and payloads: whatever the calls, a gate does what a dictionary would."""

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from time import time

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
    PayloadConflictError,
    PayloadNotFoundError,
    PayloadOverflowError,
    PayloadTypeError,
    SessionGate,
    SessionInfo,
    SessionNotFoundError,
    TooManySessionsError,
)

from .conftest import AnyClient, Backend

# Some few, so that an operation meets what another one left; and names of our own fields.
names = st.one_of(
    *[st.just("cart")] * 3,
    st.sampled_from(["user", "cart", "visits"]),
    st.sampled_from(["user", "cart", "fp", ":fp", ";fp", "old", "sub", "gen", "sum"]),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50),
)
datas = st.one_of(
    st.sampled_from([b"0", b"41", b"-7", b"9223372036854775807", b"1.5"]),
    st.binary(min_size=1, max_size=70),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
    st.sampled_from([64, 65, 70_000]).map(lambda size: b"x" * size),
)
mappings = st.dictionaries(names, datas, max_size=4)
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


def raw(data: bytes | str) -> bytes:
    return data.encode() if isinstance(data, str) else data


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
    payloads: dict[str, bytes]
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
    clients: list[Redis]
    gates: dict[tuple[int, str], SessionGate]

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
                self.start((which, "any number"), 3_600, {"cart": "[]"}, subject, None)

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
        payloads: dict[str, bytes | str],
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
            held = {name: raw(data) for name, data in payloads.items()}
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

    @rule(token=tokens, name=names, data=datas, ttl=payload_ttls)
    def pset(self, token: str, name: str, data: bytes | str, ttl: int | None) -> None:
        with self.expected(token):
            self.gate_of(token).pset(token, name, data, ttl=ttl)
            self.store(token, name, data, ttl)

    @rule(token=tokens, name=names, data=datas, ttl=payload_ttls)
    def pset_if_absent(self, token: str, name: str, data: bytes | str, ttl: int | None) -> None:
        session = self.opens(token)
        conflict = session and name in session.payloads
        with pytest.raises(PayloadConflictError) if conflict else self.expected(token):
            self.gate_of(token).pset(token, name, data, if_absent=True, ttl=ttl)
            self.store(token, name, data, ttl)

    @rule(token=tokens, name=names, data=datas, ttl=payload_ttls, guess=st.none() | datas)
    def pset_if_match(
        self, token: str, name: str, data: bytes | str, ttl: int | None, guess: bytes | str | None
    ) -> None:
        session = self.opens(token)
        held = session.payloads.get(name) if session else None
        match = guess or held or b"nothing"
        conflict = session and held != raw(match)
        with pytest.raises(PayloadConflictError) if conflict else self.expected(token):
            self.gate_of(token).pset(token, name, data, if_match=match, ttl=ttl)
            self.store(token, name, data, ttl)

    @rule(token=tokens, payloads=mappings)
    def pset_many(self, token: str, payloads: dict[str, bytes | str]) -> None:
        with self.expected(token):
            self.gate_of(token).pset_many(token, payloads)
            for name, data in payloads.items():
                self.store(token, name, data, None)

    @rule(token=tokens, name=names)
    def pget(self, token: str, name: str) -> None:
        with self.expected(token, name):
            data = self.gate_of(token).pget(token, name)
            assert data == self.opened_by(token).payloads[name]

    @rule(token=tokens, asked=st.lists(names, max_size=4))
    def pget_many(self, token: str, asked: list[str]) -> None:
        with self.expected(token):
            found = self.gate_of(token).pget_many(token, asked)
            held = self.opened_by(token).payloads
            assert found == {name: held[name] for name in asked if name in held}

    @rule(token=tokens)
    def pall(self, token: str) -> None:
        with self.expected(token):
            assert self.gate_of(token).pall(token) == self.opened_by(token).payloads

    @rule(token=tokens, name=names)
    def pdel(self, token: str, name: str) -> None:
        with self.expected(token, name):
            self.gate_of(token).pdel(token, name)
            self.drop(token, name)

    @rule(token=tokens, name=names)
    def ppop(self, token: str, name: str) -> None:
        with self.expected(token, name):
            data = self.gate_of(token).ppop(token, name)
            assert data == self.opened_by(token).payloads[name]
            self.drop(token, name)

    @rule(token=tokens, name=names, by=st.sampled_from([1, -3, 0, 2**63 - 1, -(2**63)]))
    def pincr(self, token: str, name: str, by: int) -> None:
        session = self.opens(token)
        held = session.payloads.get(name, b"0") if session else b"0"
        before = counted(held)
        if before is None and self.backend.server is None and re.fullmatch(rb"[\s\d+_-]+", held):
            return  # fakeredis takes "007" for a number, as Python does
        if before is None:
            expected: AbstractContextManager[object] = pytest.raises(PayloadTypeError)
        elif not -(2**63) <= before + by < 2**63:
            expected = pytest.raises(PayloadOverflowError)
        else:
            expected = self.expected(token)
        with expected:
            total = self.gate_of(token).pincr(token, name, by)
            assert before is not None
            assert total == before + by
            self.opened_by(token).payloads[name] = b"%d" % total

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

    def gate_of(self, token: str, policy: str = "any number") -> SessionGate:
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

    def store(self, token: str, name: str, data: bytes | str, ttl: int | None) -> None:
        session = self.opened_by(token)
        session.payloads.pop(name, None)
        session.timed.discard(name)
        if ttl != 0:
            session.payloads[name] = raw(data)
        if ttl:
            session.timed.add(name)

    def drop(self, token: str, name: str) -> None:
        session = self.opened_by(token)
        del session.payloads[name]
        session.timed.discard(name)

    def check_info(self, info: SessionInfo, session: Session, now: Span) -> None:
        assert info.id == session.id
        assert info.subject == session.subject
        assert info.idle_timeout == session.idle_timeout
        assert info.generation == session.generation
        assert info.payloads == {name: len(data) for name, data in session.payloads.items()}
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
        for name in session.timed:
            data = held.pop(f";{name}".encode())
            assert data[13:] == session.payloads[name]
            assert time() < int(data[:13]) / 1000 < time() + 900 + CLOCK_SLACK
        untimed = session.payloads.keys() - session.timed
        assert held == {f":{name}".encode(): session.payloads[name] for name in untimed}

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
EXAMPLES = {"memory": 5, "server": 10, "cluster": 8}


def test_a_gate_does_what_the_model_does(backend: Backend) -> None:
    """Any sequence of operations leaves exactly the sessions, payloads and indexes of a model."""
    shared: AnyClient = backend.gates_client()

    class OnBackend(Sessions):
        pass

    OnBackend.backend = backend
    OnBackend.clients = (
        [server.client() for server in backend.cluster.servers]
        if backend.cluster
        else [backend.client()]
    )
    OnBackend.gates = {
        (which, policy): backend.flavour.gate(shared, key, **options)
        for which, key in enumerate(KEYS)
        for policy, options in POLICIES.items()
    }
    kind = "cluster" if backend.cluster else "server" if backend.server else "memory"
    run_state_machine_as_test(
        OnBackend,
        settings=settings(
            max_examples=EXAMPLES[kind],
            stateful_step_count=60,
            deadline=None,
            # How fast it is depends on what else the machine does.
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
    for client in OnBackend.clients:
        client.close()
