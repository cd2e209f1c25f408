"""Campaign "refusals": servers that forget the scripts, read their files or are busy.

Nobody notices that scripts are flushed. A server that loads or is busy may make callers wait and
may cost them an error, the right one; what it holds is never said to be missing.
"""

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from redis.exceptions import BusyLoadingError, ConnectionError, ResponseError, TimeoutError

from sessiongate import AsyncSessionGate, SessionGate
from tests.servers import Server, server_binaries

from .harness import Campaign, Tally
from .rules import TOLERANCE, Stalls, check_keys

_SIGN_KEY = "a sign key of the campaigns, 32 bytes and more"
_TTL = 3_600
_HELD = {"user": b"0", "count": b"0"}
_THREADS = 3
_TASKS = 8
_TIMEOUT = 0.5  # of a call, in seconds: some callers are to be told
_PATIENCE = 600.0  # seconds that one server may take at the most

_FLUSH_EVERY = 0.01
# Commands in the file that is loaded, each of which takes a moment; after a thousand of them the
# server looks who else is there.
_FILLERS = 10_000
_KEPT = ("--appendonly", "yes", "--appendfsync", "always", "--key-load-delay", "1")
_SLOW = 5  # milliseconds after which a script makes the server busy for others
_REST = 0.05  # seconds in which a server that goes on runs what its sockets still hold

Work = Callable[[Any, str], Coroutine[Any, Any, None]]


class _Awaited:
    """A SessionGate with the methods of an asynchronous one: awaiting them blocks the thread."""

    def __init__(self, gate: SessionGate) -> None:
        self._gate = gate

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._gate, name)

        async def call(*args: object, **options: object) -> object:
            return method(*args, **options)

        return call


class _Record:
    """What the workers do and find, and when they may stop."""

    def __init__(self, what: str, goal: int) -> None:
        self.tally = Tally()
        self.done = 0
        self.longest = 0.0
        self.rounds = 0  # what the server was put through
        self.stalls = Stalls()
        self._what = what
        self._goal = goal
        self._over = time.monotonic() + _PATIENCE
        self._lock = threading.Lock()

    @property
    def goes_on(self) -> bool:
        """Whether there is more to do. Who made mistakes has done enough."""
        if time.monotonic() > self._over:
            self.wrong(f"{self.done} of {self._goal} operations in time")
        return (self.done < self._goal or not self.rounds) and not self.tally.wrong

    def did(self) -> None:
        with self._lock:
            self.done += 1
            self.tally.add(f"operations {self._what}")

    def add(self, what: str, count: int = 1) -> None:
        with self._lock:
            self.tally.add(what, count)

    def wrong(self, what: str) -> None:
        with self._lock:
            self.tally.wrong.append(f"{self._what}: {what}")


@contextmanager
def _at_work(url: str, timeout: float, work: Work) -> Iterator[None]:
    """Meanwhile threads and tasks do it, with gates of every kind, each under a name of its own."""

    def thread(name: str) -> None:
        with SessionGate.from_url(url, sign_key=_SIGN_KEY, timeout=timeout) as gate:
            asyncio.run(work(_Awaited(gate), name))

    async def tasks(name: str, auto_pipeline: bool) -> None:
        async with AsyncSessionGate.from_url(
            url, sign_key=_SIGN_KEY, timeout=timeout, auto_pipeline=auto_pipeline
        ) as gate:
            await asyncio.gather(*(work(gate, f"{name} {number}") for number in range(_TASKS)))

    jobs: list[Callable[[], None]] = [
        *(partial(thread, f"thread {number}") for number in range(_THREADS)),
        lambda: asyncio.run(tasks("task", auto_pipeline=True)),
        lambda: asyncio.run(tasks("pooled task", auto_pipeline=False)),
    ]
    with ThreadPoolExecutor(len(jobs)) as pool:
        running = [pool.submit(job) for job in jobs]
        yield
        for future in running:
            future.result()


# Scripts flushed: every operation, and every result as it should be


async def _life(gate: Any, name: str, record: _Record) -> None:
    async def do(call: Awaitable[Any], expected: object = ...) -> Any:
        result = await call
        record.did()
        if expected is not ... and result != expected:
            record.wrong(f"{name}: {result!r} in the place of {expected!r}")
        return result

    token = await do(gate.start(_TTL, {"a": "1", "b": "2"}, idle_timeout=200))
    await do(gate.touch(token), None)
    await do(gate.pset(token, "c", "3"), None)
    await do(gate.pset(token, "c", "4", if_match="3"), None)
    await do(gate.pset(token, "d", "5", ttl=100), None)
    await do(gate.pset_many(token, {"e": "6", "f": "7"}), None)
    await do(gate.pget(token, "c"), b"4")
    await do(gate.pget_many(token, ["a", "d", "no"]), {"a": b"1", "d": b"5"})
    await do(gate.pincr(token, "count", 3), 3)
    await do(gate.ppop(token, "f"), b"7")
    await do(gate.pdel(token, "e"), None)
    held = {"a": b"1", "b": b"2", "c": b"4", "d": b"5", "count": b"3"}
    await do(gate.pall(token), held)
    token = await do(gate.renew(token))
    await do(gate.expire(token, 600), None)
    token = await do(gate.renew(token, subject=name))
    await do(gate.pall(token), held)
    others = [await do(gate.start(_TTL, subject=name)) for _ in range(2)]
    info = await do(gate.info(token))
    listed = await do(gate.sessions(name))
    told = [info.id, info.generation, *(one.id for one in listed)]
    if told != [token[3:19], 2, *(one[3:19] for one in (token, *others))]:
        record.wrong(f"{name}: told of {info} and {listed}")
    await do(gate.expire(others[0], 600), None)
    await do(gate.end(others[0]), None)
    await do(gate.end_one(name, others[1][3:19]), None)
    await do(gate.end_all(name), 1)
    await do(gate.sessions(name), [])


def _flushed(binary: Path, _: random.Random, goal: int) -> Tally:
    record = _Record("with scripts flushed", goal)

    async def work(gate: Any, name: str) -> None:
        while record.goes_on:
            try:
                await _life(gate, name, record)
            except Exception as error:  # noqa: BLE001  # whatever it is
                record.wrong(f"{name}: {error!r}")

    with Server(binary) as server, server.client() as client:
        with _at_work(server.url, 10.0, work):
            while record.goes_on:
                time.sleep(_FLUSH_EVERY)
                client.script_flush()
                record.add("flushes")
                record.rounds += 1
        check_keys(client, record.tally)
    return record.tally


# Loading and busy: each worker knows what its session holds, or what it may hold after an error


_FAILED = object()


class _Owner:
    """A worker with a session of its own."""

    def __init__(self, gate: Any, token: str, record: _Record, dice: random.Random) -> None:
        self._gate = gate
        self._token = token
        self._record = record
        self._dice = dice
        self._held = dict(_HELD)
        self._number = 0

    async def work(self) -> None:
        while self._record.goes_on:
            operation = self._dice.choice(("pget", "pall", "touch", "renew", "pset", "pincr"))
            await self._step(operation)

    async def _step(self, operation: str) -> None:
        gate, token, held = self._gate, self._token, self._held
        self._number += 1
        after = held
        expected: object = None
        match operation:
            case "pget":
                call, expected = gate.pget(token, "user"), held["user"]
            case "pall":
                call, expected = gate.pall(token), held
            case "touch":
                call = gate.touch(token)
            case "renew":
                call = gate.renew(token, grace=_TTL)
            case "pset":
                after = {**held, "user": b"%d" % self._number}
                call = gate.pset(token, "user", after["user"])
            case _:
                count = int(held["count"]) + 1
                after = {**held, "count": b"%d" % count}
                call, expected = gate.pincr(token, "count"), count
        result = await self._try(operation, call)
        if result is _FAILED:
            await self._find_out(held, after)
            return
        self._held = after
        if operation == "renew":
            self._token = result
        elif result != expected:
            self._record.wrong(f"{operation} returned {result!r} in the place of {expected!r}")

    async def _find_out(self, *possible: dict[str, bytes]) -> None:
        """What was sent before an error may still run when the server goes on, but not later."""
        calm = 0
        while calm < 2 and self._record.goes_on:
            held = await self._try("pall", self._gate.pall(self._token))
            if held is _FAILED:
                calm = 0
                continue
            if held not in possible:
                self._record.wrong(f"holds {held}, which is none of {possible}")
            self._held = held
            calm += 1
            await asyncio.sleep(_REST)

    async def _try(self, operation: str, call: Awaitable[Any]) -> Any:
        begun = time.monotonic()
        result: Any = _FAILED
        try:
            result = await call
        except Exception as error:  # noqa: BLE001  # which one is judged
            self._record.add(f"{type(error).__name__}s")
            if not _says_so(error):
                self._record.wrong(f"{operation} raised {error!r}")
        ended = time.monotonic()
        self._record.did()
        took = ended - begun - self._record.stalls.between(begun, ended)
        self._record.longest = max(self._record.longest, took)
        if took > _TIMEOUT + TOLERANCE:
            self._record.wrong(f"{operation} took {took:.2f} s")
        return result


def _says_so(error: Exception) -> bool:
    """Whether it is the error of a server that is not there, loads or is busy."""
    if type(error) is ResponseError:
        return str(error).startswith("BUSY ")
    return type(error) in (BusyLoadingError, ConnectionError, TimeoutError)


@contextmanager
def _owners(server: Server, record: _Record, dice: random.Random) -> Iterator[None]:
    """Meanwhile workers are at work, each on its session."""
    with server.client() as client:
        direct = SessionGate(client, sign_key=_SIGN_KEY)
        left = [
            (direct.start(_TTL, _HELD), random.Random(dice.random()))  # noqa: S311  # no secret
            for _ in range(_THREADS + 2 * _TASKS)
        ]

    async def work(gate: Any, _: str) -> None:
        token, own_dice = left.pop()
        await _Owner(gate, token, record, own_dice).work()

    with record.stalls.watched(), _at_work(server.url, _TIMEOUT, work):
        yield


def _loading(binary: Path, dice: random.Random, goal: int) -> Tally:
    record = _Record("while it loads", goal)
    with Server(binary, _KEPT) as server, server.client() as client:
        with client.pipeline(transaction=False) as pipeline:
            for number in range(_FILLERS):
                pipeline.set(f"filler {number}", "x", ex=_TTL)
            pipeline.execute()
        with _owners(server, record, dice):
            while record.goes_on:
                time.sleep(dice.uniform(0.1, 0.3))
                server.restart()  # returns as soon as it tells of itself
                loads = 0
                while client.info("persistence")["loading"]:
                    loads = 1
                    time.sleep(0.02)
                record.add("restarts that took their time", loads)
                record.rounds += loads
        check_keys(client, record.tally)
    record.tally.figures["longest call while it loads"] = f"{record.longest:.2f} s"
    return record.tally


def _busy(binary: Path, dice: random.Random, goal: int) -> Tally:
    record = _Record("while it is busy", goal)
    with Server(binary, ("--lua-time-limit", str(_SLOW))) as server, server.client() as client:

        def hog() -> None:
            with server.client() as hogging, suppress(ResponseError):  # that it was killed
                hogging.eval("while true do end", 0)

        with ThreadPoolExecutor(1) as pool, _owners(server, record, dice):
            while record.goes_on:
                time.sleep(dice.uniform(0.05, 0.2))
                hogging = pool.submit(hog)
                time.sleep(dice.uniform(0.02, 0.8))
                while not hogging.done():
                    with suppress(ResponseError):  # it is not busy: not yet, or no more
                        client.script_kill()
                    time.sleep(0.005)
                record.add("long scripts")
                record.rounds += 1
        check_keys(client, record.tally)
    record.tally.figures["longest call while it is busy"] = f"{record.longest:.2f} s"
    return record.tally


# What is done, how often, and at how much of it there is another server.
_PARTS: tuple[tuple[Callable[[Path, random.Random, int], Tally], int, int], ...] = (
    (_flushed, 60_000, 20_000),
    (_loading, 20_000, 5_000),
    (_busy, 20_000, 7_000),
)


def _run(dice: random.Random, scale: float) -> Tally:
    binaries = list(server_binaries().values())
    tally = Tally()
    for part, operations, piece in _PARTS:
        dice.shuffle(binaries)
        left = max(1, round(operations * scale))
        for binary in cycle(binaries):
            if left <= 0:
                break
            tally.merge(part(binary, dice, min(left, piece)))
            left -= piece
    return tally


CAMPAIGNS = [
    Campaign(
        "refusals",
        "scripts flushed, server loading, busy: 100,000 operations, 0 errors or the right one",
        _run,
        0.01,
    )
]
