"""Campaigns "interrupts" and "refusals": reads that are broken off, and servers that say no.

An interrupted read leaves its reply on the way. Every session holds data of its own, so that a
caller who got another's reply would show it.
"""

import asyncio
import builtins
import gc
import random
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, contextmanager
from types import FrameType
from typing import Any, Literal, NamedTuple

import pytest
from redis import Redis, RedisCluster
from redis import asyncio as redis_asyncio
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.sentinel import Sentinel

from sessiongate import AsyncSessionGate, SessionGate, SessionInfo
from tests.sentinels import NAME, _Sentinel
from tests.servers import Cluster, Server

from .harness import Campaign, Tally
from .rules import newest_redis_7

_INTERRUPTS = 100_000
_SIGN_KEY = "a sign key of the campaigns, 32 bytes and more"
_SESSIONS = 40
_THREADS = 4
_CROWD = 30
_SECOND = 0.5  # how often one interrupt follows another
_MANY = 10  # so many mistakes are enough
_PATIENCE = 600.0  # seconds for one kind on one engine


class InterruptError(BaseException):
    """What breaks a call off, as gevent's Timeout and SystemExit do: no Exception."""


class TimeLimitError(Exception):
    """What breaks a call off, as the time limits of task queues do."""


class _Engine(NamedTuple):
    """Where the sessions are, and gates that know it by a URL or by an application's client."""

    name: str
    url: str
    client: Callable[[], Redis | RedisCluster]
    async_client: Callable[[], redis_asyncio.Redis | redis_asyncio.RedisCluster]


class _Read(NamedTuple):
    """A call that reads one session, and whether a result is that one's."""

    call: Callable[[Any], Any]  # of a gate of either kind: the result, or what is to be awaited
    is_own: Callable[[Any], bool]


class _Shelf:
    """Sessions that all hold other data, of other lengths."""

    def __init__(self, gate: SessionGate) -> None:
        # Some replies come in several pieces.
        sizes = (1, 20, 300, 5_000, 100_000)
        self._sessions: list[tuple[str, bytes]] = []
        for number in range(_SESSIONS):
            data = b"%d:" % number + b"x" * sizes[number % len(sizes)]
            self._sessions.append((gate.start(3_600, {"user": data}), data))

    def reads(self) -> Iterator[_Read]:
        """One of each session."""
        for token, data in self._sessions:
            yield _pget(token, data)

    def read(self, dice: random.Random) -> _Read:
        """Any of any session."""
        return dice.choice((_pget, _pget_many, _pall, _info))(*dice.choice(self._sessions))


def _pget(token: str, data: bytes) -> _Read:
    return _Read(lambda gate: gate.pget(token, "user"), lambda got: bool(got == data))


def _pget_many(token: str, data: bytes) -> _Read:
    return _Read(
        lambda gate: gate.pget_many(token, ["user", "no"]), lambda got: bool(got == {"user": data})
    )


def _pall(token: str, data: bytes) -> _Read:
    return _Read(lambda gate: gate.pall(token), lambda got: bool(got == {"user": data}))


def _info(token: str, data: bytes) -> _Read:
    def is_own(got: SessionInfo) -> bool:
        return (got.id, got.payloads) == (token[3:19], {"user": len(data)})

    return _Read(lambda gate: gate.info(token), is_own)


class _Judge:
    """Counts reads, and notes what they should not have come to."""

    def __init__(self, name: str, goal: int) -> None:
        self._name = name
        self._goal = goal
        self._over = time.monotonic() + _PATIENCE
        self._lock = threading.Lock()
        self.interrupted = 0
        self._wrong: list[str] = []

    def report(self, tally: Tally, engine: str) -> None:
        tally.add(f"on {engine}", self.interrupted)
        tally.wrong += self._wrong

    def goes_on(self) -> bool:
        if len(self._wrong) >= _MANY:
            return False
        if time.monotonic() > self._over:
            self.wrong(f"only {self.interrupted} of {self._goal} were interrupted in time")
            return False
        return self.interrupted < self._goal

    def got(self, read: _Read, result: Any) -> None:
        if not read.is_own(result):
            self.wrong(f"a foreign reply: {str(result)[:100]}")

    def raised(self, error: BaseException, *kinds: type[BaseException]) -> None:
        """It was interrupted, by one of those, or by what redis-py made of it."""
        with self._lock:
            self.interrupted += 1
        if isinstance(error, kinds):
            return
        cause: BaseException | None = error
        while isinstance(cause, Exception):
            cause = cause.__cause__ or cause.__context__
            if isinstance(cause, kinds):
                return
        self.wrong(f"interrupted, it raised {error!r}")

    def wrong(self, what: str) -> None:
        with self._lock:
            self._wrong.append(f"{self._name}: {what}")

    def undisturbed(self, gate: SessionGate, read: _Read) -> None:
        """A read that nobody interrupts returns, whatever became of others."""
        try:
            self.got(read, read.call(gate))
        except Exception as error:  # noqa: BLE001  # whatever it is
            self.wrong(f"not interrupted, it raised {error!r}")

    async def undisturbed_async(self, gate: AsyncSessionGate, read: _Read) -> None:
        try:
            self.got(read, await read.call(gate))
        except Exception as error:  # noqa: BLE001  # likewise
            self.wrong(f"not interrupted, it raised {error!r}")


# Signals: they come between any two instructions


def _by_signals(gate: SessionGate, shelf: _Shelf, dice: random.Random, judge: _Judge) -> None:
    armed = False

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        if armed:
            raise dice.choice((InterruptError, TimeLimitError))

    before = signal.signal(signal.SIGALRM, interrupt)
    typical = 0.001
    try:
        while judge.goes_on():
            read = shelf.read(dice)
            begun = time.monotonic()
            judge.undisturbed(gate, read)
            typical += (time.monotonic() - begun - typical) / 20
            for _ in range(dice.randrange(1, 4)):  # the later ones while it connects anew
                read = shelf.read(dice)
                delay = dice.uniform(0.000_01, 1.2 * typical)
                got: list[Any] = []
                try:
                    try:
                        armed = True
                        signal.setitimer(signal.ITIMER_REAL, delay)
                        got.append(read.call(gate))
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                        armed = False
                except BaseException as error:  # noqa: BLE001  # which one is judged
                    judge.raised(error, InterruptError, TimeLimitError)
                for result in got:
                    judge.got(read, result)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# As gevent does it: where a call waits, for a socket or for another thread, something is raised


class _Plan(threading.local):
    """Where the next call of this thread is interrupted; "" is nowhere."""

    where: Literal["", "read", "write", "wait"] = ""
    left: int = 0  # so many bytes of the reply are still read, or so many of the request sent

    def strikes(self, where: str) -> bool:
        if self.where != where:
            return False
        self.where = ""
        return True


_plan = _Plan()
_recv, _recv_into, _sendall = socket.socket.recv, socket.socket.recv_into, socket.socket.sendall
_wait = threading.Event.wait


def _allowed(size: int) -> int:
    """How much of a reply may be read: once some of it, and then nothing more."""
    if _plan.where != "read":
        return size
    if not _plan.left:
        _plan.where = ""
        raise InterruptError
    size, _plan.left = min(size, _plan.left), 0
    return size


def _patched_recv(self: socket.socket, size: int, flags: int = 0) -> bytes:
    return _recv(self, _allowed(size), flags)


def _patched_recv_into(self: socket.socket, buffer: Any, size: int = 0, flags: int = 0) -> int:
    return _recv_into(self, buffer, _allowed(size or len(buffer)), flags)


def _patched_sendall(self: socket.socket, data: Any, flags: int = 0) -> None:
    if _plan.strikes("write"):
        self.send(memoryview(data)[: _plan.left])
        raise InterruptError
    _sendall(self, data, flags)


def _patched_wait(self: threading.Event, timeout: float | None = None) -> bool:
    if _plan.strikes("wait"):
        raise InterruptError
    return _wait(self, timeout)


@contextmanager
def _waits_may_raise() -> Iterator[None]:
    """In this time the plans of the threads count, for all that a call waits for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "recv", _patched_recv)
        patch.setattr(socket.socket, "recv_into", _patched_recv_into)
        patch.setattr(socket.socket, "sendall", _patched_sendall)
        patch.setattr(threading.Event, "wait", _patched_wait)
        yield


def _in_waits(gate: SessionGate, shelf: _Shelf, dice: random.Random, judge: _Judge) -> None:
    def call(read: _Read, where: Literal["read", "write", "wait"], left: int) -> None:
        _plan.where, _plan.left = where, left
        try:
            result = read.call(gate)
        except BaseException as error:  # noqa: BLE001  # which one is judged
            judge.raised(error, InterruptError)
        else:
            judge.got(read, result)
        finally:
            _plan.where = ""

    def work(dice: random.Random) -> None:
        while judge.goes_on():
            judge.undisturbed(gate, shelf.read(dice))
            where: Literal["read", "write"] = dice.choice(("read", "read", "write"))
            call(shelf.read(dice), where, dice.choice((0, 1, dice.randrange(100), 5_000)))
            if dice.random() < _SECOND:
                # While it connects anew.
                call(shelf.read(dice), dice.choice(("read", "write", "wait")), dice.randrange(30))

    with _waits_may_raise(), ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(work, [random.Random(dice.random()) for _ in range(_THREADS)]))  # noqa: S311  # no secret


# Tasks: cancelled, or out of time


async def _by_cancelling(
    gate: AsyncSessionGate, shelf: _Shelf, dice: random.Random, judge: _Judge
) -> None:
    typical = 0.001
    while judge.goes_on():
        begun = time.monotonic()
        await judge.undisturbed_async(gate, shelf.read(dice))
        typical += (time.monotonic() - begun - typical) / 20
        async with asyncio.TaskGroup() as tasks:
            cancelled = []
            for _ in range(dice.randrange(1, _CROWD)):
                read = shelf.read(dice)
                match dice.randrange(3):
                    case 0:
                        tasks.create_task(judge.undisturbed_async(gate, read))
                    case 1:
                        seconds = dice.uniform(0, 3 * typical)
                        tasks.create_task(_cut_short(gate, read, judge, seconds))
                    case _:
                        cancelled.append(tasks.create_task(_cut_short(gate, read, judge)))
            for task in cancelled:
                if dice.random() < _SECOND:
                    await asyncio.sleep(dice.choice((0, 0, dice.uniform(0, typical))))
                task.cancel()


async def _cut_short(
    gate: AsyncSessionGate, read: _Read, judge: _Judge, seconds: float | None = None
) -> None:
    """A call that is cancelled, or has so long."""
    try:
        async with asyncio.timeout(seconds):
            result = await read.call(gate)
    except (asyncio.CancelledError, builtins.TimeoutError) as error:
        judge.raised(error, asyncio.CancelledError, builtins.TimeoutError)
    except Exception as error:  # noqa: BLE001  # whatever it is
        judge.wrong(f"to be cut short, it raised {error!r}")
    else:
        judge.got(read, result)


# All of it


def _server(stack: ExitStack) -> _Engine:
    server = stack.enter_context(Server(newest_redis_7()))
    return _Engine(
        "server",
        server.url,
        lambda: Redis(port=server.port, protocol=2),
        lambda: redis_asyncio.Redis(port=server.port, protocol=2),
    )


def _sentinel(stack: ExitStack) -> _Engine:
    primary = stack.enter_context(Server(newest_redis_7()))
    # One is enough to ask: nothing fails here.
    sentinel = _Sentinel(newest_redis_7(), primary, down_after=60, lines=())
    port = stack.enter_context(sentinel).port
    return _Engine(
        "sentinel",
        f"redis+sentinel://127.0.0.1:{port}/{NAME}/0",
        lambda: Sentinel([("127.0.0.1", port)]).master_for(NAME, protocol=2),
        lambda: AsyncSentinel([("127.0.0.1", port)]).master_for(NAME, protocol=2),
    )


def _cluster(stack: ExitStack) -> _Engine:
    port = stack.enter_context(Cluster(newest_redis_7())).port
    return _Engine(
        "cluster",
        f"redis+cluster://127.0.0.1:{port}",
        lambda: RedisCluster("127.0.0.1", port, protocol=2),
        lambda: redis_asyncio.RedisCluster("127.0.0.1", port, protocol=2),
    )


def _is_debris(error: BaseException | None) -> bool:
    """Whether it is an interrupt of a destructor, or of the start of a thread."""
    interrupts = isinstance(error, InterruptError | TimeLimitError)
    return interrupts or (isinstance(error, KeyError) and "<Thread(" in str(error))


@contextmanager
def _debris_is_swept() -> Iterator[None]:
    """What an interrupt leaves half made is closed by the garbage collector, which tells of it."""
    before = sys.unraisablehook
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        sys.unraisablehook = lambda told: None if _is_debris(told.exc_value) else before(told)
        try:
            yield
            gc.collect()
        finally:
            sys.unraisablehook = before


def _interrupted(engine: _Engine, dice: random.Random, goal: int, *, by_url: bool) -> Tally:
    """Reads on an engine, so many of each kind interrupted."""
    tally = Tally()
    with ExitStack() as stack:
        stack.enter_context(_debris_is_swept())
        client: Redis | RedisCluster = stack.enter_context(engine.client())
        shelf = _Shelf(SessionGate(client, sign_key=_SIGN_KEY))
        if by_url:
            gate = stack.enter_context(SessionGate.from_url(engine.url, sign_key=_SIGN_KEY))
        else:
            gate = stack.enter_context(SessionGate(client, sign_key=_SIGN_KEY))
        for name, interrupt in (("signals", _by_signals), ("waits", _in_waits)):
            judge = _Judge(f"{engine.name}, {name}", goal)
            interrupt(gate, shelf, dice, judge)
            for read in shelf.reads():
                judge.undisturbed(gate, read)
            judge.report(tally, engine.name)

    async def cancel() -> None:
        async with AsyncExitStack() as stack:
            if by_url:
                gate = AsyncSessionGate.from_url(engine.url, sign_key=_SIGN_KEY)
            else:
                client = engine.async_client()
                stack.push_async_callback(client.aclose)
                gate = AsyncSessionGate(client, sign_key=_SIGN_KEY, auto_pipeline=False)
            await stack.enter_async_context(gate)
            judge = _Judge(f"{engine.name}, tasks", goal)
            await _by_cancelling(gate, shelf, dice, judge)
            for read in shelf.reads():
                await judge.undisturbed_async(gate, read)
            judge.report(tally, engine.name)

    with _debris_is_swept():
        asyncio.run(cancel())
    return tally


def _run_interrupts(dice: random.Random, scale: float) -> Tally:
    tally = Tally()
    engines = (_server, _sentinel, _cluster)
    goal = max(1, round(_INTERRUPTS * scale / len(engines) / 6))
    with ExitStack() as stack:
        for begin in engines:
            engine = begin(stack)
            for by_url in (True, False):
                tally.merge(_interrupted(engine, dice, goal, by_url=by_url))
    return tally


CAMPAIGNS = [
    Campaign(
        "interrupts",
        "100,000 interrupted reads on server, sentinel and cluster: 0 foreign replies",
        _run_interrupts,
        0.005,
    ),
]
