"""Campaigns "sentinel" and "under-replicated": primaries fail, and others take their place.

Replication is asynchronous: what a primary acknowledged shortly before it failed may be lost, and
the campaign counts it. Nothing else may be: each worker owns sessions and knows what each call has
made of them.
"""

import asyncio
import random
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.exceptions import RedisError
from redis.sentinel import Sentinel

from sessiongate import (
    AsyncSessionGate,
    PayloadNotFoundError,
    SessionGate,
    SessionNotFoundError,
    UnderReplicatedError,
)
from tests.sentinels import NAME, Sentinels

from . import replicas
from .groups import BACK, NOTICED, Fault, Log, in_groups
from .harness import Campaign, Tally
from .rules import check_keys

T = TypeVar("T")
AnyGate = SessionGate | AsyncSessionGate

_FAILOVERS = 100
_KINDS = ("kill", "failover", "stop", "failover")

_SIGN_KEY = "a sign key of the sentinel campaigns, 32 bytes"
_TTL = 3_600
_TIMEOUTS = (2.0, 3.0)  # of gates from a URL, and from a client
_UNNOTICED = 3.0  # so long before the sentinels name it they may have made a replica a primary


@dataclass(eq=False)
class _Write(Generic[T]):
    """What a call left in a register, and when it was under way."""

    value: T
    begun: float = 0.0
    ended: float = 0.0
    had: int = 0  # replicas that had it, if it was waited for
    seen: float = 0.0  # when it was last seen to be there, while nothing failed


class _Register(Generic[T]):
    """One value of a session that a single worker writes: all that it may be, and why."""

    def __init__(self, value: T, log: Log) -> None:
        self._log = log
        self._writes: deque[_Write[T]] = deque([_Write(value)], maxlen=50)
        self._unsure: list[T] = []  # of calls of which it is not known whether they ran
        self._lost: list[T] = []  # they may be seen once more, on the primary that was replaced

    @property
    def value(self) -> T:
        return self._writes[-1].value

    @property
    def since(self) -> float:
        """When the last write was acknowledged."""
        return self._writes[-1].ended

    def wrote(self, write: _Write[T]) -> None:
        self._writes.append(write)

    def may_have_written(self, value: T) -> None:
        self._unsure.append(value)

    def explain(self, value: T, begun: float, ended: float) -> list[_Write[T]] | None:
        """The acknowledged writes that must be lost if a call then saw this; None: impossible."""
        failing = self._log.covered(begun, ended)
        lost: list[_Write[T]] = []
        if value != self.value and value not in self._unsure:
            if value in self._lost and failing:
                return []
            lost = list(takewhile(lambda write: write.value != value, reversed(self._writes)))
            if len(lost) == len(self._writes) or not all(map(self._may_be_lost, lost)):
                return None
            for write in lost:
                self._lost.append(write.value)
                self._writes.pop()
        if not failing:
            self._lost.clear()
            for write in self._writes:
                write.seen = begun
        return lost

    def _may_be_lost(self, write: _Write[T]) -> bool:
        return self._log.covered(write.begun, write.ended, write.seen)


@dataclass(eq=False)
class _Session:
    token: str
    subject: str | None
    lives: _Register[bool]
    text: _Register[bytes]
    sum: _Register[int]
    generation: _Register[int]  # of the token that it goes by
    told: bool = False  # its end said that too few replicas had it


class _Reply(NamedTuple):
    """What came of a call, and when it was under way."""

    value: Any  # of the operation's own type
    error: Exception | None
    begun: float
    ended: float

    @property
    def ran(self) -> bool:
        return self.error is None or isinstance(self.error, UnderReplicatedError)

    @property
    def missing(self) -> bool:
        return isinstance(self.error, SessionNotFoundError)

    @property
    def unknown(self) -> bool:
        return isinstance(self.error, RedisError)

    def wrote(self, value: T, had: int = 0) -> _Write[T]:
        return _Write(value, self.begun, self.ended, had)


class _Worker:
    """Owns sessions, uses them, and judges each answer by what it knows of them."""

    def __init__(  # noqa: PLR0913  # nothing of it has a default
        self,
        name: str,
        gate: AnyGate,
        timeout: float,
        rest: Callable[[float], Awaitable[None] | None],
        *,
        log: Log,
        dice: random.Random,
    ) -> None:
        self._name = name
        self._gate = gate
        self._timeout = timeout
        self._rest_for = rest
        self._log = log
        self._dice = dice
        self._count = 0
        self._sessions: list[_Session] = []
        self._ended: deque[_Session] = deque(maxlen=30)
        self.wrote_at = time.monotonic()
        self._steps = {
            self._pset: 8,
            self._pget: 6,
            self._pincr: 5,
            self._pall: 3,
            self._renew: 2,
            self._sessions_of: 2,
            self._look_at_ended: 3,
            self._end: 3,
            self._end_all: 1,
        }

    async def work(self) -> None:
        """Work until the log says stop."""
        steps, weights = list(self._steps), list(self._steps.values())
        while not self._log.stop.is_set():
            if len(self._sessions) < 3:
                await self._start()
                continue
            (step,) = self._dice.choices(steps, weights)
            await step(self._dice.choice(self._sessions))
            await self._rest(self._dice.random() * 0.04)

    async def look(self, gate: SessionGate) -> None:
        """Look at all that there is, through a new gate: this one may be at an old primary."""
        self._gate, self._timeout, self._rest_for = gate, _TIMEOUTS[0], _blocking_rest
        for session in list(self._sessions):
            await self._pall(session)
        for session in list(self._ended):
            await self._look_at(session)

    async def _rest(self, seconds: float) -> None:
        resting = self._rest_for(seconds)
        if resting is not None:
            await resting

    async def _ask(
        self, what: str, ask: Callable[[], Any | Awaitable[Any]], *, writes: bool = False
    ) -> _Reply:
        value: Any = None
        error: Exception | None = None
        begun = time.monotonic()
        try:
            answer = ask()
            value = await answer if isinstance(answer, Awaitable) else answer
        except Exception as raised:  # noqa: BLE001  # all are judged
            error = raised
        reply: _Reply = _Reply(value, error, begun, time.monotonic())
        self._log.answered(f"{what} by {self._name}", self._timeout, begun, error)
        if isinstance(error, UnderReplicatedError):
            reply = reply._replace(value=error.result())
        if writes and reply.ran:
            self._log.gap = max(self._log.gap, reply.ended - self.wrote_at)
            self.wrote_at = reply.ended
        if reply.unknown:
            await self._rest(0.05)
        return reply

    def _fail(self, what: str, text: str) -> None:
        self._log.fail(f"{what} by {self._name}: {text}")

    def _new_data(self) -> bytes:
        self._count += 1
        return f"{self._name}:{self._count}".encode()

    def _judge(self, what: str, register: _Register[T], value: T, reply: _Reply) -> list[_Write[T]]:
        lost = register.explain(value, reply.begun, reply.ended)
        if lost is None:
            time.sleep(0.1)  # the sentinels may be about to tell of a failover
            lost = register.explain(value, reply.begun, reply.ended)
        if lost is None:
            self._fail(
                what,
                f"{value!r}, where {register.value!r} was acknowledged "
                f"{reply.ended - register.since:.2f} s before",
            )
            return []
        self._log.add("acknowledged writes lost by failovers", len(lost))
        return lost

    def _drop(self, session: _Session) -> None:
        if session in self._sessions:
            self._sessions.remove(session)

    async def _met(self, what: str, session: _Session, reply: _Reply) -> bool:
        """Whether the session was there. If it is not known what ran, that is its last call."""
        if reply.missing:
            self._drop(session)
            # Its start may be lost, or that its token was renewed.
            older = session.generation.value - 1
            if older >= 0:
                lost = session.generation.explain(older, reply.begun, reply.ended)
                if lost is not None:
                    self._log.add("acknowledged writes lost by failovers", len(lost))
                    return False
            self._judge(what, session.lives, False, reply)
            return False
        if reply.unknown:
            return False
        if not reply.ran and not isinstance(reply.error, PayloadNotFoundError):
            return False  # unclassified, which was noted
        self._judge(what, session.lives, True, reply)
        self._judge(what, session.generation, session.generation.value, reply)
        return True

    async def _retire(self, what: str, session: _Session) -> None:
        """Look once at what became of a session after a call that may or may not have run."""
        self._drop(session)
        reply = await self._insist(f"pall after {what}", lambda: self._gate.pall(session.token))
        if await self._met(f"pall after {what}", session, reply) and reply.value is not None:
            self._read(f"pall after {what}", session, reply)

    async def _insist(self, what: str, ask: Callable[[], Any | Awaitable[Any]]) -> _Reply:
        deadline = time.monotonic() + 2 * BACK
        while True:
            reply = await self._ask(what, ask)
            if not reply.unknown:
                return reply
            if time.monotonic() > deadline:
                self._fail(what, f"goes on failing: {reply.error!r}")
                return reply

    def _read(self, what: str, session: _Session, reply: _Reply) -> None:
        payloads: dict[str, bytes] = reply.value
        self._judge(what, session.text, payloads.get("text", b""), reply)
        total = payloads.get("sum", b"0")
        if not total.isdigit() or payloads.keys() - {"text", "sum"}:
            self._fail(what, f"foreign payloads: {payloads!r}")
            return
        self._judge(what, session.sum, int(total), reply)

    # The operations.

    async def _start(self) -> None:
        data = self._new_data()
        subject = f"{self._name}-{self._count}" if self._dice.random() < 0.5 else None
        reply = await self._ask(
            "start", lambda: self._gate.start(_TTL, {"text": data}, subject=subject), writes=True
        )
        if reply.ran and isinstance(reply.value, str):
            session = _Session(
                reply.value,
                subject,
                _Register(False, self._log),
                _Register(data, self._log),
                _Register(0, self._log),
                _Register(0, self._log),
            )
            session.lives.wrote(reply.wrote(True))
            self._sessions.append(session)

    async def _pset(self, session: _Session) -> None:
        data = self._new_data()
        reply = await self._ask(
            "pset", lambda: self._gate.pset(session.token, "text", data), writes=True
        )
        if reply.unknown:
            session.text.may_have_written(data)
            await self._retire("pset", session)
        elif await self._met("pset", session, reply):
            session.text.wrote(reply.wrote(data))

    async def _pget(self, session: _Session) -> None:
        reply = await self._ask("pget", lambda: self._gate.pget(session.token, "text"))
        if await self._met("pget", session, reply):
            self._judge("pget", session.text, reply.value or b"", reply)

    async def _pall(self, session: _Session) -> None:
        reply = await self._ask("pall", lambda: self._gate.pall(session.token))
        if await self._met("pall", session, reply):
            self._read("pall", session, reply)

    async def _pincr(self, session: _Session) -> None:
        reply = await self._ask(
            "pincr", lambda: self._gate.pincr(session.token, "sum"), writes=True
        )
        if reply.unknown:
            session.sum.may_have_written(session.sum.value + 1)
            await self._retire("pincr", session)
        elif await self._met("pincr", session, reply):
            self._judge("pincr", session.sum, reply.value - 1, reply)
            session.sum.wrote(reply.wrote(reply.value))

    async def _renew(self, session: _Session) -> None:
        reply = await self._ask(
            "renew", lambda: self._gate.renew(session.token, grace=60), writes=True
        )
        if reply.unknown:
            await self._retire("renew", session)
        elif await self._met("renew", session, reply):
            session.token = reply.value
            session.generation.wrote(reply.wrote(session.generation.value + 1))

    async def _sessions_of(self, session: _Session) -> None:
        subject = session.subject
        if subject is None:
            return
        reply = await self._ask("sessions", lambda: self._gate.sessions(subject))
        if reply.ran:
            session_id = session.token.split(".")[1]
            ids = [one.id for one in reply.value]
            if ids not in ([], [session_id]):
                self._fail("sessions", f"{ids} of a subject with {session_id} alone")
            self._judge("sessions", session.lives, bool(ids), reply)
            if not ids:
                self._drop(session)

    async def _end(self, session: _Session) -> None:
        count = self._dice.choice((0, 0, 0, 1, 1, 2))
        reply = await self._ask(
            "end", lambda: self._gate.end(session.token, min_replicas=count), writes=True
        )
        await self._over("end", session, reply, count)

    async def _end_all(self, session: _Session) -> None:
        subject = session.subject
        if subject is None:
            return
        count = self._dice.choice((0, 1))
        reply = await self._ask(
            "end_all", lambda: self._gate.end_all(subject, min_replicas=count), writes=True
        )
        if reply.ran and reply.value != 1:
            if reply.value != 0:
                self._fail("end_all", f"{reply.value} of a subject with one session")
            self._judge("end_all", session.lives, False, reply)
            self._drop(session)
            return
        await self._over("end_all", session, reply, count)

    async def _over(self, what: str, session: _Session, reply: _Reply, count: int) -> None:
        if reply.unknown:
            session.lives.may_have_written(False)
            await self._retire(what, session)
        elif await self._met(what, session, reply):
            session.told = isinstance(reply.error, UnderReplicatedError)
            if isinstance(reply.error, UnderReplicatedError):
                self._log.add("ends that said too few replicas had them")
                if not 0 <= reply.error.replicas < count:
                    self._fail(what, f"{reply.error.replicas} replicas had it, of {count}")
            session.lives.wrote(reply.wrote(False, 0 if session.told else count))
            self._drop(session)
            self._ended.append(session)

    async def _look_at_ended(self, _: _Session) -> None:
        if self._ended:
            await self._look_at(self._dice.choice(self._ended))

    async def _look_at(self, session: _Session) -> None:
        """An ended session stays so, unless a failover lost its end."""
        reply = await self._ask("pall of an ended one", lambda: self._gate.pall(session.token))
        if not reply.ran:
            return
        for write in self._judge("pall of an ended one", session.lives, True, reply):
            if write.value is False:
                acknowledged = f"with {write.had} replicas" if write.had else "without replicas"
                if session.told:
                    acknowledged = "with a warning"
                self._log.add(f"ends lost by failovers, acknowledged {acknowledged}")
                if write.had == 2:
                    self._fail("end", "it was lost, and two replicas had it")
        self._ended.remove(session)


# The load, and the faults.


def _blocking_rest(seconds: float) -> None:
    time.sleep(seconds)


def _block(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a worker that waits for nothing but blocking calls."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("it waits for an event loop")


class _Load:
    """Eight workers: threads and tasks, with gates from URLs and from clients."""

    def __init__(self, sentinels: Sentinels, log: Log, dice: random.Random) -> None:
        self._sentinels = sentinels
        self._log = log
        self._dice = dice
        self.workers: list[_Worker] = []
        self._ready = threading.Event()
        self._threads: list[threading.Thread] = []
        self._gates: list[SessionGate] = []

    def start(self) -> None:
        """Start them all, and return when each has begun."""
        asking = Sentinel(self._sentinels.addresses, sentinel_kwargs=_ASKING)
        client = asking.master_for(NAME, protocol=2)
        url, (timeout, longer) = self._sentinels.url, _TIMEOUTS
        self._gates = [
            SessionGate.from_url(url, sign_key=_SIGN_KEY, timeout=timeout),
            SessionGate(client, sign_key=_SIGN_KEY, timeout=longer),
        ]
        workers = self._workers("thread", self._gates, _blocking_rest)
        works: list[Callable[[], None]] = [
            lambda: asyncio.run(self._tasks()),
            self._log.watch_the_machine,
            lambda: _watch(self._sentinels, self._log),
            *(partial(_block, worker.work()) for worker in workers),
        ]
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in self._threads:
            thread.start()
        assert self._ready.wait(BACK)

    async def _tasks(self) -> None:
        asking = AsyncSentinel(self._sentinels.addresses, sentinel_kwargs=_ASKING)
        url, (timeout, longer) = self._sentinels.url, _TIMEOUTS
        async with (
            asking.master_for(NAME, protocol=2) as client,
            AsyncSessionGate.from_url(url, sign_key=_SIGN_KEY, timeout=timeout) as first,
            AsyncSessionGate(
                client, sign_key=_SIGN_KEY, timeout=longer, auto_pipeline=False
            ) as second,
        ):
            workers = self._workers("task", [first, second], asyncio.sleep)
            self._ready.set()
            await asyncio.gather(*(worker.work() for worker in workers))
        for one in asking.sentinels:
            await one.aclose()

    def _workers(
        self, kind: str, gates: Sequence[AnyGate], rest: Callable[[float], Any]
    ) -> list[_Worker]:
        """Two for each gate: of a URL, and of a client."""
        workers = [
            _Worker(
                f"{kind}-{made_of}-{number}",
                gate,
                timeout,
                rest,
                log=self._log,
                dice=random.Random(self._dice.random()),  # noqa: S311  # no secret
            )
            for gate, timeout, made_of in zip(gates, _TIMEOUTS, ("url", "client"), strict=True)
            for number in range(2)
        ]
        self.workers += workers
        return workers

    def finish(self) -> None:
        """Stop them all, and look at all that they know of."""
        self._log.stop.set()
        for thread in self._threads:
            thread.join(4 * BACK)
            if thread.is_alive():
                self._log.fail("a worker never came to an end")
        for gate in self._gates:
            gate.close()
        with SessionGate.from_url(
            self._sentinels.url, sign_key=_SIGN_KEY, timeout=_TIMEOUTS[0]
        ) as gate:
            for worker in self.workers:
                _block(worker.look(gate))


_ASKING = {"protocol": 2, "socket_timeout": 0.5}


def _watch(sentinels: Sentinels, log: Log) -> None:
    """Note when the sentinels agree on another primary, whether they were made to or not.

    At so short a down-after they sometimes take a sound primary for dead.
    """
    known = sentinels.named()
    while not log.stop.wait(0.02):
        try:
            named = sentinels.named()
        except RedisError:
            continue  # a sentinel that is slow, on a busy machine
        going_on = [fault for fault in log.faults if fault.agreed == float("inf")]
        now = time.monotonic()
        if named != known and not going_on:
            # What came back last may be the new one, with what it had when it failed.
            begun = min([now - _UNNOTICED, *(fault.begun for fault in log.faults[-2:])])
            log.faults.append(fault := Fault("unasked", begun))
            log.add("failovers that nobody asked for")
            going_on = [fault]
        if len(named) == 1 and named != known:
            known = named
            for fault in going_on:
                fault.agreed = now


def _strike(sentinels: Sentinels, fault: Fault, pause: float) -> None:
    """Let the primary fail, and come back after a while, as what the sentinels make of it."""
    old = sentinels.primary()
    if fault.kind == "failover":
        sentinels.failover()
        return
    if fault.kind == "kill":
        old.kill()
    else:
        old.pause()
    sentinels.successor(old)
    time.sleep(pause)
    if fault.kind == "kill":
        old.start()
    else:
        old.resume()


def _fail_over(log: Log, binary: Path, numbers: range, dice: random.Random) -> Tally:
    tally = Tally()
    # An empty server that sentinels then choose, as they sometimes do, would lose everything.
    with Sentinels(binary, ("--appendonly", "yes")) as sentinels:
        load = _Load(sentinels, log, dice)
        load.start()
        time.sleep(0.5)
        for number in numbers:
            # Sentinels choose among the replicas that they know: one that follows is enough.
            sentinels.wait(1)
            fault = Fault(_KINDS[number % len(_KINDS)], time.monotonic())
            log.faults.append(fault)
            _strike(sentinels, fault, dice.random())
            _until(lambda: all(one.wrote_at > fault.agreed for one in load.workers))  # noqa: B023  # it is over within this turn
            log.add("failovers")
        if len(numbers) > 1:
            time.sleep(NOTICED + 0.5)  # if a gate has not noticed by now, it is seen
        load.finish()
        with sentinels.client() as client:
            check_keys(client, tally)
    return tally


def _until(so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BACK
    while not so() and time.monotonic() < deadline:
        time.sleep(0.02)


def _run(dice: random.Random, scale: float) -> Tally:
    return in_groups(_fail_over, max(2, round(_FAILOVERS * scale)), dice)


CAMPAIGNS = [
    Campaign(
        "sentinel",
        "100 Sentinel failovers under load, Redis 6.2 and 7: back within 15 s at a down-after of "
        "1 s, no call past its deadline",
        _run,
        0.02,
    ),
    replicas.CAMPAIGN,
]
