"""Campaign "cluster": slots and primaries move under load, and no caller is told anything wrong.

Workers, threads and tasks with gates of every kind, each own sessions and know what must be in
them. While only slots move, every call succeeds as if nothing happened. A primary that fails may
cost errors, which are all redis-py's own, and what its replica had not yet got: writes that it
acknowledged shortly before, and no others.
"""

import asyncio
import random
import threading
import time
import traceback
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import inf
from statistics import median
from typing import Any, Generic, NamedTuple, TypeVar, cast

from redis import Redis, RedisCluster
from redis import asyncio as redis_asyncio
from redis.exceptions import (
    ClusterDownError,
    ConnectionError,
    MovedError,
    ReadOnlyError,
    RedisError,
    TimeoutError,
)

from sessiongate import (
    AsyncSessionGate,
    PayloadNotFoundError,
    SessionGate,
    SessionGateError,
    SessionNotFoundError,
    UnderReplicatedError,
)
from sessiongate.keyspace import Keyspace, slot_of, system_random
from tests import privileges
from tests.servers import Cluster, Server, server_binaries

from .harness import Campaign, Tally

T = TypeVar("T")
AnyGate = SessionGate | AsyncSessionGate

_MOVES = 20_000
_FAILOVERS = 50
# By agreement; of a primary that is dead, by hand and by election; by force; of one that hangs. The
# first two are quick.
_KINDS = ("graceful", "kill and takeover", "kill", "takeover", "stop")

_SIGN_KEY = "a sign key of the cluster campaign, 32 bytes and more"
_PREFIX = "sg-session"  # which the user that the gates log in as is confined to
_TTL = 3_600
_GRACE = 60
_BLOCK = 64  # slots that stay together: the topology is not to fall into thousands of pieces
_NAMES = ("a", "b", "c")
_COUNTER = "n"

_TIMEOUT = 3.0  # of each gate
_LATE = 0.3  # a call may take so much longer: threads and tasks wait for each other here
_ELECTED = 40.0  # a replica may need more than one vote, and this machine may be busy
_BACK = 5.0  # so long after that every gate has found it
_LAG = 1.0  # what was acknowledged so shortly before a primary failed may be lost
_FLOATING = 2 * _TIMEOUT  # a request whose call failed may arrive for so long
_AFTERMATH = 0.5  # errors of a failover may come for so long after it is over
_HOLD = 1.0  # some moves stand still for so long, half done
_UNHEEDED = 0.6  # what needs one key does not wait for them
_LONG_HOLD = 1.5  # what needs several waits for so long; it may meet another move on its way
_NODE_TIMEOUT_MS = 1_500
_PATIENT_MS = 15_000  # while slots move: a busy machine shall not look like a dead primary

# What a failing primary may come to at a caller.
_CLASSIFIED = (ClusterDownError, ConnectionError, ReadOnlyError, TimeoutError)


class _Span(NamedTuple):
    """When and in which slot something happened; `begun` and `ended` are those of its call."""

    slot: int
    begun: float
    ended: float


class _Write(NamedTuple):
    """What a call left in a payload, None if it deleted it; `known` if that was acknowledged."""

    data: bytes | None
    span: _Span
    known: bool


class _Dead(NamedTuple):
    """A token that opens nothing any more, since when, and whether the replica knows as well."""

    token: str
    span: _Span
    sure: bool


@dataclass(eq=False)
class _Fault:
    """A failover: what of its primary may fail, be lost or be out of date, and when."""

    kind: str
    slots: frozenset[int] = field(repr=False)
    begun: float
    promoted: float = inf  # the replica has become the primary
    silent: float = inf  # from here on the old one acknowledges nothing
    wakes: float = inf  # from here on the old one may answer as if it were the primary ...
    agreed: float = inf  # ... until here
    over: float = inf
    back: dict[str, float] = field(default_factory=dict)
    last_error: float = 0.0

    def loses(self, span: _Span) -> bool:
        return (
            self.kind != "graceful"
            and span.slot in self.slots
            and span.ended >= self.begun - _LAG
            and span.begun <= self.silent
        )

    def is_stale(self, span: _Span) -> bool:
        return span.slot in self.slots and self.wakes <= span.ended and span.begun <= self.agreed

    def explains(self, error: Exception, span: _Span) -> bool:
        classified = ConnectionError if self.kind == "graceful" else _CLASSIFIED
        meanwhile = span.ended >= self.begun and span.begun <= self.over + _AFTERMATH
        return meanwhile and isinstance(error, classified)


class _Held(NamedTuple):
    """Slots whose move stands still, and from when to when. None of them is a subject's."""

    slots: frozenset[int]
    begun: float
    ended: float


class _Log:
    """What all workers share: the faults so far, what came out wrong, and what is counted."""

    def __init__(self) -> None:
        self.faults: list[_Fault] = []
        self.held = _Held(frozenset(), 0.0, 0.0)
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.slowest = 0.0
        self.stop = threading.Event()  # no further steps
        self.over = threading.Event()  # nobody works any more
        self._lock = threading.Lock()
        self._stalls: list[tuple[float, float]] = []

    def add(self, what: str, count: int = 1) -> None:
        with self._lock:
            self.counts[what] += count

    def fail(self, text: str) -> None:
        now = time.monotonic()
        last = self.faults[-1] if self.faults else None
        when = f"; {last.kind} {now - last.begun:.2f} s before" if last else ""
        with self._lock:
            self.wrong.append(text + when)

    def lost(self, span: _Span) -> str:
        """What kind of failover may have lost what was acknowledged then; "" if none."""
        return next((fault.kind for fault in reversed(self.faults) if fault.loses(span)), "")

    def is_stale(self, span: _Span) -> bool:
        return any(fault.is_stale(span) for fault in self.faults[-2:])

    def answered(self, what: str, flavour: str, span: _Span, error: Exception | None) -> None:
        """Take note of a call that is over."""
        took = span.ended - span.begun
        late = took - self._stalled(span.begun, span.ended)
        held = self.held
        # A sign-in goes to the slot of its subject as well.
        if span.slot in held.slots and what != "sign-in":
            waited = min(span.ended, held.ended) - max(span.begun, held.begun)
            if waited - self._stalled(span.begun, span.ended) > _UNHEEDED:
                self.fail(f"{what} by {flavour} waited {waited:.2f} s for a slot to move")
        with self._lock:
            self.counts["calls"] += 1
            self.slowest = max(self.slowest, took)
        if late > _TIMEOUT + _LATE:
            self.fail(f"{what} by {flavour} took {took:.2f} s, {error!r}")
        if error is None or isinstance(error, SessionGateError):
            fault = self.faults[-1] if self.faults else None
            if fault and span.slot in fault.slots and span.begun > fault.promoted:
                fault.back.setdefault(flavour, span.ended)
            return
        causes = [fault for fault in self.faults[-3:] if fault.explains(error, span)]
        with self._lock:
            for cause in causes[-1:]:
                cause.last_error = max(cause.last_error, span.ended)
            when = causes[-1].kind if causes else "calm"
            self.errors[f"{type(error).__name__} ({when})"] += 1
        if not causes:
            self.fail(f"{what} by {flavour}, after {took:.2f} s: {type(error).__name__}: {error}")

    def watch_the_machine(self) -> None:
        """Note when this process got no time: a call's delay by that is not its own."""
        before = time.monotonic()
        while not self.over.wait(0.02):
            now = time.monotonic()
            if now - before > 0.06:
                self._stalls.append((before, now))
            before = now

    def _stalled(self, begun: float, ended: float) -> float:
        first = bisect_left(self._stalls, (begun - 60, 0.0))
        overlaps = (min(ended, end) - max(begun, start) for start, end in self._stalls[first:])
        return sum(overlap for overlap in overlaps if overlap > 0)


class _Reply(NamedTuple, Generic[T]):
    """What came of a call, or of several that were made until one was answered."""

    span: _Span
    value: T | None
    error: Exception | None
    repeated: bool = False

    @property
    def unknown(self) -> bool:
        """Whether the call may have run or not."""
        return self.error is not None and not isinstance(self.error, SessionGateError)

    @property
    def missing(self) -> bool:
        return isinstance(self.error, SessionNotFoundError)


@dataclass(eq=False)
class _Subject:
    name: str
    slot: int
    sessions: "list[_Session]" = field(default_factory=list)
    ended: dict[str, _Span] = field(default_factory=dict)
    unsure: float = 0.0  # until when there may be sessions whose start failed

    def doubt(self) -> None:
        self.unsure = inf


@dataclass(eq=False)
class _Session:
    token: str
    id: str
    made: _Span  # when its token was last issued
    subject: _Subject | None
    payloads: dict[str, list[_Write]]
    sum: int = 0
    sums: list[_Write] = field(default_factory=list)
    maybe: list[float] = field(default_factory=list)  # increments that may have run

    @property
    def slot(self) -> int:
        return self.made.slot


class _Worker:
    """Owns sessions, uses them through a gate, and judges each answer by what it knows."""

    def __init__(  # noqa: PLR0913  # nothing of it has a default
        self,
        name: str,
        flavour: str,
        gate: AnyGate,
        rest: Callable[[float], Awaitable[None] | None],
        *,
        log: _Log,
        dice: random.Random,
    ) -> None:
        self._name = name
        self._flavour = flavour
        self._gate = gate
        self._rest_for = rest
        self._log = log
        self._dice = dice
        self._count = 0
        self._sessions: list[_Session] = []
        self._dead: deque[_Dead] = deque(maxlen=20)
        self._subjects = _subjects_of(name)
        self._steps = {
            self._start: 4,
            self._start_of_subject: 2,
            self._pset: 8,
            self._pget: 8,
            self._pdel: 3,
            self._pincr: 5,
            self._pall: 3,
            self._renew: 2,
            self._sign_in: 2,
            self._end: 3,
            self._end_one: 2,
            self._end_all: 2,
            self._tell: 3,
            self._look_at_dead: 3,
        }

    async def work(self) -> None:
        """Work until the log says stop, then look at all that there is."""
        steps, weights = list(self._steps), list(self._steps.values())
        for step in (self._start, self._start, self._start_of_subject):
            await step()
        while not self._log.stop.is_set():
            (step,) = self._dice.choices(steps, weights)
            await step()
            await self._rest(self._dice.random() * 0.05)
        for session in list(self._sessions):
            await self._read_all(session)
        for subject in self._subjects:
            await self._tell_of(subject)
        for dead in list(self._dead):
            await self._look_at(dead)

    async def _rest(self, seconds: float) -> None:
        resting = self._rest_for(seconds)
        if resting is not None:
            await resting

    async def _ask(self, what: str, slot: int, ask: Callable[[], T | Awaitable[T]]) -> _Reply[T]:
        value: T | None = None
        error: Exception | None = None
        begun = time.monotonic()
        try:
            answer = ask()
            value = await answer if isinstance(answer, Awaitable) else answer
        except Exception as raised:  # noqa: BLE001  # all are judged
            error = raised
        span = _Span(slot, begun, time.monotonic())
        self._log.answered(what, self._flavour, span, error)
        return _Reply(span, value, error)

    async def _insist(self, what: str, slot: int, ask: Callable[[], T | Awaitable[T]]) -> _Reply[T]:
        """Ask until it is known what came of it."""
        reply = await self._ask(what, slot, ask)
        begun, repeated = reply.span.begun, False
        while reply.unknown:
            await self._rest(0.1)
            if reply.span.ended > begun + _ELECTED + _BACK:
                self._fail(what, f"goes on failing: {reply.error!r}")
                break
            reply, repeated = await self._ask(what, slot, ask), True
        return _Reply(reply.span._replace(begun=begun), reply.value, reply.error, repeated)

    def _fail(self, what: str, text: str) -> None:
        self._log.fail(f"{what} by {self._flavour}, {self._name}: {text}")

    def _new_data(self) -> bytes:
        self._count += 1
        return f"{self._name}:{self._count}".encode()

    def _any_session(self) -> _Session | None:
        return self._dice.choice(self._sessions) if self._sessions else None

    # What is known

    def _opened(self, token: str, reply: _Reply[str], subject: _Subject | None, a: bytes) -> None:
        session_id = _id_of(token)
        span = reply.span._replace(slot=_slot_of(session_id))
        nothing = _Write(None, span, known=True)
        payloads: dict[str, list[_Write]] = {name: [nothing] for name in _NAMES}
        payloads["a"].append(_Write(a, span, known=True))
        self._sessions.append(_Session(token, session_id, span, subject, payloads))
        if subject:
            subject.sessions.append(self._sessions[-1])

    def _drop(self, session: _Session, ended: _Span | None = None, *, sure: bool = False) -> None:
        """Forget a session: one that ended, or that nothing certain is known of any more."""
        if session in self._sessions:
            self._sessions.remove(session)
        if ended:
            self._dead.append(_Dead(session.token, ended, sure))
        if session.subject and session in session.subject.sessions:
            session.subject.sessions.remove(session)
            if ended:
                session.subject.ended[session.id] = ended
            else:
                session.subject.doubt()

    async def _retire(self, session: _Session) -> None:
        self._drop(session)
        await self._ask("end", session.slot, lambda: self._gate.end(session.token))

    def _missed(self, what: str, session: _Session, span: _Span) -> None:
        """A session that must be there was not found."""
        if self._log.is_stale(span):
            return
        if kind := self._log.lost(session.made):
            self._log.add(f"sessions lost ({kind})")
        else:
            age = span.ended - session.made.ended
            self._fail(what, f"session {session.id} not found, its token is {age:.2f} s old")
        self._drop(session)

    def _wrote(self, session: _Session, name: str, data: bytes | None, reply: _Reply[T]) -> None:
        span = reply.span._replace(slot=session.slot)
        session.payloads[name].append(_Write(data, span, known=not reply.unknown))
        del session.payloads[name][:-12]

    async def _judge(
        self, what: str, session: _Session, name: str, span: _Span, found: bytes | bool | None
    ) -> None:
        """Is that what the payload may hold? True stands for anything but nothing."""
        if self._log.is_stale(span):
            return
        history = session.payloads[name]
        certain = False
        lost: list[str] = []
        for write in reversed(history):
            fits = write.data is not None if found is True else write.data == found
            floats = not write.known and span.begun - write.span.ended < _FLOATING
            if fits and (floats or not certain):
                break
            if write.known and not certain:
                kind = self._log.lost(write.span)
                certain = not kind
                lost += [kind] if kind else []
        else:
            known = [(write.data, write.known) for write in history]
            self._fail(what, f"{found!r} in {name} of {session.id}, not one of {known}")
            await self._retire(session)
            return
        if lost:
            self._log.add(f"writes lost ({lost[0]})", len(lost))
            await self._retire(session)
            return
        history.remove(write)
        if not write.known:
            write = write._replace(known=True, span=write.span._replace(ended=span.ended))
        history.append(write)

    async def _judge_sum(self, what: str, session: _Session, span: _Span, found: int) -> bool:
        """Is that what the counter may have held? If so its doubts are resolved."""
        if self._log.is_stale(span):
            return False
        if found < session.sum:
            beyond = [write for write in session.sums if int(write.data or 0) > found]
            kinds = [self._log.lost(write.span) for write in beyond]
            if kinds and all(kinds):
                self._log.add(f"writes lost ({kinds[0]})", len(beyond))
            else:
                self._fail(what, f"{found} counted in {session.id}, not {session.sum}")
        elif found > session.sum + len(session.maybe):
            most = session.sum + len(session.maybe)
            self._fail(what, f"{found} counted in {session.id}, not {session.sum} to {most}")
        else:
            session.maybe = [
                failed
                for failed in session.maybe[found - session.sum :]
                if span.begun - failed < _FLOATING
            ]
            self._count_to(session, found, span)
            return True
        await self._retire(session)
        return False

    def _count_to(self, session: _Session, count: int, span: _Span) -> None:
        if count > session.sum:
            session.sum = count
            session.sums.append(_Write(b"%d" % count, span, known=True))
            del session.sums[:-30]

    # Steps

    async def _start(self) -> None:
        if len(self._sessions) < 20:
            a = self._new_data()
            idle = self._dice.choice([None, 900])
            reply = await self._ask(
                "start", -1, lambda: self._gate.start(_TTL, {"a": a}, idle_timeout=idle)
            )
            if reply.value:
                self._opened(reply.value, reply, None, a)
            elif not reply.unknown:
                self._fail("start", repr(reply.error))

    async def _start_of_subject(self) -> None:
        subject = self._dice.choice(self._subjects)
        if len(subject.sessions) < 5:
            a = self._new_data()
            reply = await self._ask(
                "start of a subject",
                subject.slot,
                lambda: self._gate.start(_TTL, {"a": a}, subject=subject.name),
            )
            if reply.value:
                self._opened(reply.value, reply, subject, a)
            elif reply.unknown:
                subject.doubt()
            else:
                self._fail("start of a subject", repr(reply.error))

    async def _pset(self) -> None:
        if session := self._any_session():
            data = self._new_data()
            name = self._dice.choice(_NAMES)
            reply = await self._ask(
                "pset", session.slot, lambda: self._gate.pset(session.token, name, data)
            )
            if reply.missing:
                self._missed("pset", session, reply.span)
            else:
                self._wrote(session, name, data, reply)

    async def _pget(self) -> None:
        if session := self._any_session():
            name = self._dice.choice(_NAMES)
            reply = await self._ask(
                "pget", session.slot, lambda: self._gate.pget(session.token, name)
            )
            if reply.missing:
                self._missed("pget", session, reply.span)
            elif not reply.unknown:
                await self._judge("pget", session, name, reply.span, reply.value)

    async def _pdel(self) -> None:
        if session := self._any_session():
            name = self._dice.choice(_NAMES)
            reply = await self._ask(
                "pdel", session.slot, lambda: self._gate.pdel(session.token, name)
            )
            if reply.missing:
                self._missed("pdel", session, reply.span)
                return
            if not reply.unknown:
                was_there = None if isinstance(reply.error, PayloadNotFoundError) else True
                await self._judge("pdel", session, name, reply.span, was_there)
            self._wrote(session, name, None, reply)

    async def _pincr(self) -> None:
        if session := self._any_session():
            reply = await self._ask(
                "pincr", session.slot, lambda: self._gate.pincr(session.token, _COUNTER)
            )
            if reply.missing:
                self._missed("pincr", session, reply.span)
            elif reply.value is None:
                session.maybe.append(reply.span.ended)
            elif await self._judge_sum("pincr", session, reply.span, reply.value - 1):
                self._count_to(session, reply.value, reply.span)
            else:
                session.maybe.append(reply.span.ended)

    async def _pall(self) -> None:
        if session := self._any_session():
            await self._read_all(session)

    async def _read_all(self, session: _Session) -> None:
        reply = await self._ask("pall", session.slot, lambda: self._gate.pall(session.token))
        if reply.missing:
            self._missed("pall", session, reply.span)
        elif reply.value is not None:
            found = dict(reply.value)
            await self._judge_sum("pall", session, reply.span, int(found.pop(_COUNTER, b"0")))
            for name in _NAMES:
                await self._judge("pall", session, name, reply.span, found.pop(name, None))
            if found:
                self._fail("pall", f"{found} in {session.id}")

    async def _renew(self) -> None:
        if session := self._any_session():
            # While its grace lasts, a renewal that is asked for again has the same successor.
            reply = await self._insist(
                "renew", session.slot, lambda: self._gate.renew(session.token, grace=_GRACE)
            )
            if reply.missing:
                self._missed("renew", session, reply.span)
            elif reply.value:
                session.token, session.made = reply.value, reply.span
                if _id_of(reply.value) != session.id:
                    self._fail("renew", f"a token of another session than {session.id}")

    async def _sign_in(self) -> None:
        subject = self._dice.choice(self._subjects)
        session = self._any_session()
        if session and len(subject.sessions) < 5:
            old = session.slot
            reply = await self._ask(
                "sign-in", old, lambda: self._gate.renew(session.token, subject=subject.name)
            )
            if reply.missing:
                self._missed("sign-in", session, reply.span)
            elif reply.value:
                self._drop(session, reply.span)
                session.token, session.id = reply.value, _id_of(reply.value)
                session.made = reply.span._replace(slot=subject.slot)
                session.subject = subject
                self._sessions.append(session)
                subject.sessions.append(session)
                if _slot_of(session.id) != subject.slot:
                    self._fail("sign-in", f"{session.id} is not in the slot of its subject")
            else:
                subject.doubt()
                await self._retire(session)

    async def _end(self) -> None:
        if session := self._any_session():
            replicas = self._dice.choice([0, 1])
            reply = await self._insist(
                "end",
                session.slot,
                lambda: self._gate.end(session.token, min_replicas=replicas),
            )
            if isinstance(reply.error, UnderReplicatedError):
                self._log.add("ends that no replica had")
            self._ended("end", session, reply, sure=replicas == 1 and reply.error is None)

    async def _end_one(self) -> None:
        subject = self._dice.choice(self._subjects)
        if subject.sessions:
            session = self._dice.choice(subject.sessions)
            reply = await self._insist(
                "end_one", subject.slot, lambda: self._gate.end_one(subject.name, session.id)
            )
            self._ended("end_one", session, reply)

    def _ended(
        self, what: str, session: _Session, reply: _Reply[None], *, sure: bool = False
    ) -> None:
        if reply.missing and not reply.repeated:
            self._missed(what, session, reply.span)
        else:
            self._drop(session, reply.span, sure=sure)

    async def _end_all(self) -> None:
        subject = self._dice.choice(self._subjects)
        keep = self._dice.choice([None, *subject.sessions])
        token = keep.token if keep else None
        reply = await self._insist(
            "end_all", subject.slot, lambda: self._gate.end_all(subject.name, keep=token)
        )
        if reply.value is None:
            self._fail("end_all", repr(reply.error))
        ending = [session for session in subject.sessions if session is not keep]
        spans = [session.made for session in subject.sessions] + list(subject.ended.values())
        if not (
            reply.value == len(ending)
            or reply.repeated
            or subject.unsure > reply.span.begun
            or self._log.is_stale(reply.span)
            or any(map(self._log.lost, spans))
        ):
            self._fail("end_all", f"{reply.value} of {subject.name} ended, not {len(ending)}")
        for session in ending:
            self._drop(session, reply.span)
        if subject.unsure > reply.span.ended:
            subject.unsure = reply.span.ended + _FLOATING

    async def _tell(self) -> None:
        await self._tell_of(self._dice.choice(self._subjects))

    async def _tell_of(self, subject: _Subject) -> None:
        reply = await self._ask("sessions", subject.slot, lambda: self._gate.sessions(subject.name))
        if reply.value is None or self._log.is_stale(reply.span):
            return
        told = {info.id for info in reply.value}
        for session in [session for session in subject.sessions if session.id not in told]:
            self._missed("sessions", session, reply.span)
        for session_id in told.difference(session.id for session in subject.sessions):
            ended = subject.ended.get(session_id)
            kind = self._log.lost(ended) if ended else ""
            if kind:
                self._log.add(f"ended sessions back ({kind})")
            elif ended or subject.unsure < reply.span.begun:
                when = f"ended {reply.span.begun - ended.ended:.2f} s ago" if ended else "unknown"
                self._fail("sessions", f"of {subject.name}, {session_id} is told of: {when}")
        if any(info.subject != subject.name for info in reply.value):
            self._fail("sessions", f"one of another subject than {subject.name}")

    async def _look_at_dead(self) -> None:
        if self._dead:
            await self._look_at(self._dice.choice(self._dead))

    async def _look_at(self, dead: _Dead) -> None:
        slot = dead.span.slot
        reply = await self._ask(
            "pget of a dead one", slot, lambda: self._gate.pget(dead.token, "a")
        )
        if reply.missing or reply.unknown or self._log.is_stale(reply.span):
            return
        kind = "" if dead.sure else self._log.lost(dead.span)
        if kind:
            self._log.add(f"ended sessions back ({kind})")
        else:
            age = reply.span.begun - dead.span.ended
            self._fail("pget of a dead one", f"{_id_of(dead.token)}, dead for {age:.2f} s")
        self._dead.remove(dead)


def _subjects_of(worker: str) -> list[_Subject]:
    subjects = [f"{worker}-{number}" for number in range(2)]
    return [_Subject(name, slot_of(f"{_PREFIX}:subject:{{{name}}}".encode())) for name in subjects]


def _slot_of(session_id: str) -> int:
    return slot_of(f"{_PREFIX}:{{{session_id}}}".encode())


def _id_of(token: str) -> str:
    return token.split(".")[1]


class _Load:
    """The workers: threads, and one more with an event loop for tasks."""

    def __init__(self, cluster: Cluster, log: _Log, dice: random.Random, workers: int) -> None:
        self._log = log
        self._port = cluster.port
        user = privileges.has_users(cluster.servers[0].binary)
        self._login: dict[str, Any] = (
            {"username": privileges.USER, "password": privileges.PASSWORD} if user else {}
        )
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in cluster.servers)
        login = f"{privileges.USER}:{privileges.PASSWORD}@" if user else ""
        self._url = f"redis+cluster://{login}{hosts}"
        self._closing = ExitStack()
        self.flavours = ["client", "url", "async client", "async url", "async pooled"]
        self._dice = {
            flavour: {
                f"{flavour.replace(' ', '-')}-{number}": random.Random(dice.random())  # noqa: S311  # no secret
                for number in range(workers)
            }
            for flavour in self.flavours
        }
        self.subjects = {
            subject.slot
            for names in self._dice.values()
            for name in names
            for subject in _subjects_of(name)
        }
        works: list[Callable[[], None]] = [partial(asyncio.run, self._tasks())]
        for flavour in self.flavours[:2]:
            workers_of = self._of(flavour, self._gate(flavour), time.sleep)
            works += [partial(_finish, worker.work()) for worker in workers_of]
        self._threads = [
            threading.Thread(target=self._watch, args=[work], daemon=True) for work in works
        ]
        threading.Thread(target=log.watch_the_machine, daemon=True).start()

    def _options(self) -> dict[str, Any]:
        return {"sign_key": _SIGN_KEY, "prefix": _PREFIX, "timeout": _TIMEOUT}

    def _gate(self, flavour: str) -> SessionGate:
        if flavour == "url":
            gate = SessionGate.from_url(self._url, **self._options())
        else:
            client = RedisCluster("127.0.0.1", self._port, protocol=2, **self._login)
            self._closing.callback(client.close)
            gate = SessionGate(client, **self._options())
        return self._closing.enter_context(gate)

    def _of(
        self, flavour: str, gate: AnyGate, rest: Callable[[float], Awaitable[None] | None]
    ) -> list[_Worker]:
        return [
            _Worker(name, flavour, gate, rest, log=self._log, dice=dice)
            for name, dice in self._dice[flavour].items()
        ]

    def _watch(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException:  # noqa: BLE001  # whatever it is, it is told of
            self._log.fail(f"a worker died: {traceback.format_exc()}")

    async def _tasks(self) -> None:
        client, pooled = (
            redis_asyncio.RedisCluster(host="127.0.0.1", port=self._port, protocol=2, **self._login)
            for _ in range(2)
        )
        gates = [
            AsyncSessionGate(client, **self._options()),
            AsyncSessionGate.from_url(self._url, **self._options()),
            AsyncSessionGate(pooled, auto_pipeline=False, **self._options()),
        ]
        await asyncio.gather(
            *(
                worker.work()
                for flavour, gate in zip(self.flavours[2:], gates, strict=True)
                for worker in self._of(flavour, gate, asyncio.sleep)
            )
        )
        for gate in gates:
            await gate.aclose()
        for owned in (client, pooled):
            await owned.aclose()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Let the workers look at what there is, and wait for them."""
        self._log.stop.set()
        deadline = time.monotonic() + _ELECTED
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        hung = sum(thread.is_alive() for thread in self._threads)
        if hung:
            self._log.fail(f"{hung} of {len(self._threads)} threads never ended")
        else:
            self._closing.close()
        self._log.over.set()


def _finish(work: Coroutine[Any, Any, None]) -> None:
    """Run to its end what awaits nothing: a worker whose gate and rest are a thread's."""
    try:
        work.send(None)
    except StopIteration:
        return
    raise AssertionError("a worker in a thread awaited something")


@dataclass(eq=False)
class _Primary:
    """A server that slots are moved from and to."""

    server: Server
    client: Redis
    id: str
    slots: set[int]

    def asked(self, what: str, slots: Iterable[int], *args: str) -> list[object]:
        """The replies to a subcommand of CLUSTER for each of some slots."""
        pipeline = self.client.pipeline(transaction=False)
        for slot in slots:
            pipeline.execute_command(f"CLUSTER {what}", slot, *args)
        return pipeline.execute()


def _ranges(client: Redis) -> frozenset[tuple[int, int, int]]:
    """The slots from which to which are served at which port, as a server knows."""
    served = client.execute_command("CLUSTER", "SLOTS")
    return frozenset((first, last, port) for first, last, (_, port, *_rest), *_replicas in served)


def _wait_for_whole(cluster: Cluster) -> None:
    """Wait until the cluster serves all slots, and all servers agree on which serves which.

    A replica that takes over before it has heard of a move takes the slot along, without its keys.
    """
    cluster.wait(_ELECTED)
    clients = [cluster.client_of(server) for server in cluster.servers]
    assert _until(lambda: len(set(map(_ranges, clients))) == 1, _ELECTED), "they do not agree"


def _wait_for_replicas(cluster: Cluster) -> None:
    """Wait until each replica follows: one just synchronised may hear nothing for a second more."""
    keys = Keyspace(_PREFIX, system_random)
    for server in cluster.primaries():
        client = cluster.client_of(server)
        slot = next(first for first, _, port in _ranges(client) if port == server.port)
        with client.pipeline(transaction=False) as pipeline:  # WAIT is of the connection that wrote
            pipeline.set(keys.session_key(keys.new_id_in(slot)), "waited for", ex=60)
            pipeline.wait(1, 4_000)
            assert pipeline.execute()[1] == 1, "a replica does not follow"


@contextmanager
def _primaries(cluster: Cluster) -> Iterator[list[_Primary]]:
    """The primaries as they are now."""
    with ExitStack() as stack:
        primaries = []
        for server in cluster.primaries():
            client = stack.enter_context(server.client())
            slots = {
                slot
                for first, last, port in _ranges(client)
                if port == server.port
                for slot in range(first, last + 1)
            }
            primaries.append(_Primary(server, client, cluster.id_of(server), slots))
        yield primaries


class _Mover:
    """Moves slots between the primaries, as a resharding does, with all that is in between."""

    def __init__(
        self, cluster: Cluster, log: _Log, dice: random.Random, subjects: set[int]
    ) -> None:
        self._cluster = cluster
        self._log = log
        self._dice = dice
        self._subjects = subjects  # their slots
        self._visits = 0
        self.took = 0.0

    def move(self, count: int) -> None:
        """Move that many slots, about half of them with sessions."""
        begun = time.monotonic()
        with _primaries(self._cluster) as primaries:
            left = count
            while left:
                by_size = sorted(primaries, key=lambda primary: len(primary.slots))
                source = self._dice.choice(by_size[1:])  # none shall be left without slots
                target = self._dice.choice([other for other in by_size if other is not source])
                if self._dice.randrange(3):
                    # There and back: pieces that are too small would make the topology huge.
                    slots = self._with_sessions(source)
                    hold = {0: _HOLD, 16: _LONG_HOLD}.get(self._visits % 32, 0.0)
                    if hold == _HOLD:
                        slots = [slot for slot in slots if slot not in self._subjects]
                    slots = slots[: min(_BLOCK // 4, left // 2)]
                    self._visits += 1
                    left -= self._move(source, target, slots, hold)
                    left -= self._move(target, source, slots)
                else:
                    left -= self._move(source, target, self._block(source)[:left])
        self.took += time.monotonic() - begun

    def _with_sessions(self, source: _Primary) -> list[int]:
        slots = sorted({slot_of(key) for key in source.client.scan_iter(count=1_000)})
        return self._dice.sample(slots, len(slots))

    def _block(self, source: _Primary) -> list[int]:
        block = self._dice.choice(sorted({slot // _BLOCK for slot in source.slots}))
        return [
            slot for slot in range(block * _BLOCK, (block + 1) * _BLOCK) if slot in source.slots
        ]

    def _move(self, source: _Primary, target: _Primary, slots: list[int], hold: float = 0.0) -> int:
        target.asked("SETSLOT", slots, "IMPORTING", source.id)
        source.asked("SETSLOT", slots, "MIGRATING", target.id)
        self._pause(0.05)
        # Some of the keys of a slot: those of one subject are on both sides for a while.
        some = self._move_keys(source, target, slots, lambda keys: self._dice.randint(0, len(keys)))
        if hold:
            now = time.monotonic()
            unheeded = frozenset(slots) - self._subjects
            self._log.held = _Held(unheeded, now, now + hold)
            time.sleep(hold)
        else:
            self._pause(0.05 if self._dice.randrange(16) else 0.6)
        more = self._move_keys(source, target, slots, len)
        self._pause(0.01)
        # The new one first, as redis-cli does it; elsewhere it has been the other way round.
        order = [target, source] if self._dice.randrange(8) else [source, target]
        for primary in order:
            primary.asked("SETSLOT", slots, "NODE", target.id)
            self._pause(0.005)
        source.slots.difference_update(slots)
        target.slots.update(slots)
        self._log.add("slot moves", len(slots))
        self._log.add("of slots with sessions", len(some | more))
        return len(slots)

    def _move_keys(
        self,
        source: _Primary,
        target: _Primary,
        slots: list[int],
        how_many: Callable[[list[bytes]], int],
    ) -> set[int]:
        """Move so many of the keys of each slot; the slots that had any."""
        held = cast("list[list[bytes]]", source.asked("GETKEYSINSLOT", slots, "1000"))
        moving = {slot: keys for slot, keys in zip(slots, held, strict=True) if keys}
        for keys in moving.values():
            going = self._dice.sample(keys, how_many(keys))
            if going:
                source.client.execute_command(
                    "MIGRATE", "127.0.0.1", target.server.port, "", 0, 5_000, "KEYS", *going
                )
        return set(moving)

    def _pause(self, seconds: float) -> None:
        time.sleep(self._dice.random() * seconds)


class _Failovers:
    """Lets replicas take over, in all ways in which they do."""

    def __init__(
        self, cluster: Cluster, log: _Log, dice: random.Random, flavours: list[str]
    ) -> None:
        self._cluster = cluster
        self._log = log
        self._dice = dice
        self._flavours = flavours

    def fail_over(self, kind: str) -> None:
        """Let a replica take over, and wait until the cluster is whole again."""
        _wait_for_whole(self._cluster)
        _wait_for_replicas(self._cluster)
        with _primaries(self._cluster) as primaries:
            failing = self._dice.choice(primaries)
            victim = failing.server
            replica = self._cluster.replica_of(victim)
            heir = self._cluster.client_of(replica)
            fault = _Fault(kind, frozenset(failing.slots), time.monotonic())
            self._log.faults.append(fault)
            if kind == "graceful":
                heir.execute_command("CLUSTER FAILOVER")
            elif kind == "takeover":
                fault.wakes = fault.begun
            elif kind == "stop":
                victim.pause()
            else:
                victim.kill()
                fault.silent = time.monotonic()
            if kind in {"takeover", "kill and takeover"}:
                heir.execute_command("CLUSTER FAILOVER", "TAKEOVER")
            if _until(lambda: heir.info("replication")["role"] == "master", _ELECTED):
                fault.promoted = time.monotonic()
            else:
                self._log.fail(f"{kind}: the replica did not take over")
            if kind == "stop":
                self._wait_for_all(fault)
                fault.wakes = time.monotonic()
                victim.resume()
            killed = kind in {"kill", "kill and takeover"}
            if not killed:
                self._cluster.wait_for(next(iter(fault.slots)), replica)
            fault.agreed = time.monotonic()
            fault.silent = min(fault.silent, fault.agreed)
            self._wait_for_all(fault)
            if killed:
                victim.start()
            _wait_for_whole(self._cluster)
            fault.over = time.monotonic()
            self._log.add("failovers")

    def _wait_for_all(self, fault: _Fault) -> None:
        """Wait until gates of each flavour have found the new primary."""
        if not _until(lambda: len(fault.back) == len(self._flavours), _BACK):
            missing = set(self._flavours).difference(fault.back)
            self._log.fail(f"{fault.kind}: not back after {_BACK:.0f} s: {', '.join(missing)}")


def _until(so: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _scan(cluster: Cluster, log: _Log) -> None:
    """Look at every key of every primary: none may be without an end."""
    for server in cluster.primaries():
        with server.client() as client:
            keys = list(client.scan_iter(count=1_000))
            pipeline = client.pipeline(transaction=False)
            for key in keys:
                pipeline.ttl(key)
            for key, ttl in zip(keys, pipeline.execute(raise_on_error=False), strict=True):
                if isinstance(ttl, MovedError):
                    # Its replica took over before it had heard that the key was moved away.
                    log.add("keys left behind by moves")
                elif ttl == -1:
                    log.fail(f"{key!r} has no TTL")
                else:
                    log.add("keys with a TTL")


def _run(dice: random.Random, scale: float) -> Tally:
    from tests.conftest import CLUSTERED  # noqa: PLC0415  # it needs what only the suite has

    failovers = max(2, round(_FAILOVERS * scale))
    moves = max(64, round(_MOVES * scale))
    log = _Log()
    with Cluster(server_binaries()[CLUSTERED], 1, _NODE_TIMEOUT_MS) as cluster:
        load = _Load(cluster, log, dice, workers=8)
        mover = _Mover(cluster, log, dice, load.subjects)
        failing = _Failovers(cluster, log, dice, load.flavours)
        load.start()
        _until(lambda: log.counts["calls"] > 200, _BACK)  # there are sessions to move
        try:
            for number in range(failovers):
                cluster.set_node_timeout(_PATIENT_MS)
                mover.move(moves * (number + 1) // failovers - moves * number // failovers)
                cluster.set_node_timeout(_NODE_TIMEOUT_MS)
                failing.fail_over(_KINDS[number % len(_KINDS)])
            time.sleep(_AFTERMATH)
        except (AssertionError, RedisError):
            log.fail(f"the cluster itself failed: {traceback.format_exc()}")
        load.finish()
        _scan(cluster, log)
    return _tally(log, mover)


def _tally(log: _Log, mover: _Mover) -> Tally:
    tally = Tally(wrong=log.wrong)
    for what in ("calls", "slot moves", "of slots with sessions", "failovers", "keys with a TTL"):
        tally.add(what, log.counts.pop(what, 0))
    tally.figures["moves a second"] = f"{tally.did['slot moves'] / mover.took:.0f}"
    for kind in dict.fromkeys(fault.kind for fault in log.faults):
        faults = [fault for fault in log.faults if fault.kind == kind]
        elections = [fault.promoted - fault.begun for fault in faults]
        found = [max(fault.back.values(), default=inf) - fault.promoted for fault in faults]
        errors = [max(0.0, fault.last_error - fault.promoted) for fault in faults]
        tally.figures[f"{len(faults)} {kind}"] = (
            f"promoted after {median(elections):.2f} s (at most {max(elections):.2f}), found "
            f"{median(found):.2f} s later ({max(found):.2f}), last error {max(errors):.2f} s later"
        )
    tally.figures["slowest call"] = f"{log.slowest:.2f} s"
    for what, count in sorted((log.counts + log.errors).items()):
        tally.figures[what] = f"{count}"
    return tally


CAMPAIGNS = [
    Campaign(
        "cluster",
        "50 failovers, 20,000 slot moves, 0 errors of theirs reaching callers, 0 wrong",
        _run,
        0.003,
    )
]
