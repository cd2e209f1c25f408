"""Kill, stop and restart: a server that keeps an append-only file dies under 16 workers at work.

Each worker has sessions of its own, so that it knows what must be there: of a payload the one
value, or after a lost reply the two or more that it may have. All share some counters.
"""

import asyncio
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NamedTuple

from redis import exceptions as redis_errors

from sessiongate import (
    AsyncSessionGate,
    PayloadConflictError,
    PayloadNotFoundError,
    SessionGate,
    SessionInfo,
    SessionNotFoundError,
)
from tests.servers import Server

from .harness import Campaign, Tally
from .rules import TOLERANCE, Stalls, check_keys, newest_redis_7

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

_FAULTS = 500
_OPERATIONS = 1_000_000
_THREADS = 8
_TASKS = 8
_PROCESSES = 2
_ALONE = 50_000  # so many operations are not worth another process

_SIGN_KEY = "a sign key of the campaigns, 32 bytes and more"
_TIMEOUT = 1.0  # of a call, in seconds
_TRY = 0.6  # of one of its tries
_TTL = 3_600
_GRACE = 3_600  # longer than any run
_SESSIONS = 6  # of each worker at a time
_NAMES = tuple(f"name{number}" for number in range(12))
_COUNTERS = tuple(f"count{number}" for number in range(4))
_SHARED = tuple(f"shared{number}" for number in range(4))
_WIDTH = 24  # what a task asks for at once
_MAX_RENEWALS = 10  # a session remembers 16 tokens
_GRAVES = 200  # ended sessions that a worker goes on asking for
# A server that runs again first reads what its sockets hold, also what nobody waits for any more:
# after so many answers nothing of before is left.
_REST = 30
_LAST_TRIES = 10
_RESTART_SECONDS = 30.0
_PROGRESS_SECONDS = 120.0  # from one fault to the next
_LAST_SECONDS = 120.0
_KINDS = ("kill", "stop", "restart")
_LONGEST_STOP = 1.5
_OPTIONS = (
    *("--appendonly", "yes", "--appendfsync", "always"),
    *("--auto-aof-rewrite-min-size", "4mb"),
)
# Below those that the system gives to clients: one of these would keep the server from its port.
_PORTS = range(20_000, 30_000)

_LOST = (redis_errors.ConnectionError, redis_errors.TimeoutError)

Value = bytes | None


class _Ask(NamedTuple):
    """A call to make, and what takes note of its result or error."""

    method: str
    args: tuple[object, ...]
    options: dict[str, object]
    settle: Callable[[object], None]


@dataclass
class _Cell:
    """A payload, or its absence: what it may be, and the round until which it is left alone."""

    possible: set[Value] = field(default_factory=lambda: {None})
    rest: int = 0


@dataclass
class _Session:
    """A session of one worker. Its fate is unknown after an `end` without an answer."""

    tokens: list[str]
    subject: str | None
    cells: dict[str, _Cell]
    known: bool = True
    rest: int = 0

    @property
    def id(self) -> str:
        return self.tokens[0][3:19]


@dataclass
class _Report:
    """What a worker did and found."""

    answered: int = 0
    unanswered: int = 0
    latest: float = 0.0  # how far the latest call went past its timeout, stalls taken off
    excused: int = 0  # calls that were late only before that
    stalled: float = 0.0  # the longest that was taken off
    acknowledged: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_SHARED, 0))
    unknown: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_SHARED, 0))
    wrong: list[str] = field(default_factory=list)


class _Worker:
    """Decides what to ask for, and judges the answers."""

    def __init__(self, number: int, seed: int, shared: str, stalls: Stalls) -> None:
        self.report = _Report()
        self.rounds = 0
        self.number = number
        self._dice = random.Random(seed)  # noqa: S311  # no secret
        self._shared = shared
        self._stalls = stalls
        self._sums = dict.fromkeys(_SHARED, 0)
        self._written = 0
        self._sessions: list[_Session] = []
        self._graves: list[str] = []
        self._subject = f"worker {number}"
        self._strays = 0  # sessions of the subject that this worker lost sight of

    # What to ask for

    def plan(self, width: int) -> list[_Ask]:
        """Calls that do not touch one another, to be made at once."""
        dice = self._dice
        if dice.random() < 0.01:
            return [self._list()]
        asks: list[_Ask] = []
        free = [session for session in self._sessions if session.rest <= self.rounds]
        alone = [session for session in free if dice.random() < 0.1 or not session.known]
        cells = [
            (session, name)
            for session in free
            if session not in alone
            for name, cell in session.cells.items()
            if cell.rest <= self.rounds
        ]
        dice.shuffle(cells)
        for _ in range(width):
            choice = dice.random()
            if len(self._sessions) + len(asks) < _SESSIONS:
                asks.append(self._start())
            elif choice < 0.01 and self._graves:
                asks.append(self._visit(dice.choice(self._graves)))
            elif choice < 0.03:
                asks.append(self._count_shared())
            elif alone:
                asks.append(self._on_session(alone.pop()))
            elif cells:
                asks.append(self._on_cell(*cells.pop()))
        return asks or [self._count_shared()]

    def last(self) -> Iterator[_Ask]:
        """Calls to be made one after the other when there are no more faults: what is left?"""
        for _ in range(_REST):
            yield self._count_shared()
        for session in list(self._sessions):
            if not session.known:
                yield self._find(session)
        for session in self._sessions:
            session.rest = 0
            yield self._read(session, whole=True)
        for token in self._graves:
            yield self._visit(token)
        yield self._list()

    def _new(self) -> bytes:
        """Data that nobody else stores."""
        self._written += 1
        return b"of %d: %d" % (self.number, self._written)

    def _token(self, session: _Session) -> str:
        return (
            session.tokens[-1] if self._dice.random() < 0.8 else self._dice.choice(session.tokens)
        )

    def _start(self) -> _Ask:
        subject = self._subject if self._dice.random() < 0.5 else None
        names = self._dice.sample(_NAMES, 4)
        payloads = {name: self._new() for name in names}
        idle_timeout = self._dice.choice([None, _TTL])

        def settle(result: object) -> None:
            if self._is_lost(result):
                self._strays += subject is not None
            elif isinstance(result, str):
                cells = {name: _Cell() for name in (*_NAMES, *_COUNTERS)}
                for name, data in payloads.items():
                    cells[name].possible = {data}
                self._sessions.append(_Session([result], subject, cells))
            else:
                self._unexpected("start", result)

        return _Ask(
            "start",
            (_TTL, payloads),
            {"subject": subject, "idle_timeout": idle_timeout},
            settle,
        )

    def _visit(self, token: str) -> _Ask:
        def settle(result: object) -> None:
            if not self._is_lost(result) and not isinstance(result, SessionNotFoundError):
                self._wrong(f"the session {token[3:19]} has ended, and yet: {result!r}")

        method, *args = self._dice.choice([("pget", _NAMES[0]), ("touch",), ("pall",)])
        return _Ask(method, (token, *args), {}, settle)

    def _count_shared(self) -> _Ask:
        name = self._dice.choice(_SHARED)
        before = self._sums[name]

        def settle(result: object) -> None:
            if self._is_lost(result):
                self.report.unknown[name] += 1
            elif isinstance(result, int):
                self.report.acknowledged[name] += 1
                self._sums[name] = max(result, self._sums[name])
                if result <= before:
                    self._wrong(f"{name} went from {before} to {result}")
            else:
                self._unexpected("pincr", result)

        return _Ask("pincr", (self._shared, name), {}, settle)

    def _list(self) -> _Ask:
        def settle(result: object) -> None:
            if self._is_lost(result):
                return
            if not isinstance(result, list):
                self._unexpected("sessions", result)
                return
            listed = {info.id for info in result}
            mine = [session for session in self._sessions if session.subject]
            lacking = {session.id for session in mine if session.known} - listed
            others = listed - {session.id for session in mine}
            if lacking or len(others) > self._strays:
                self._wrong(f"sessions: {lacking} are not listed, {others} are")

        return _Ask("sessions", (self._subject,), {}, settle)

    # One session, which nothing else is asked of meanwhile

    def _on_session(self, session: _Session) -> _Ask:
        if not session.known:
            return self._find(session)
        kinds = {"pall": 6, "pget_many": 2, "info": 2, "touch": 1, "expire": 1}
        kinds |= {"pset_many": 3, "end": 1}
        if len(session.tokens) <= _MAX_RENEWALS:
            kinds["renew"] = 1
        kind = self._draw(kinds)
        match kind:
            case "pall" | "pget_many":
                return self._read(session, whole=kind == "pall")
            case "pset_many":
                return self._write(session)
            case "renew":
                return self._renew(session)
            case "end":
                return self._end(session)
        return self._use(session, kind)

    def _find(self, session: _Session) -> _Ask:
        def settle(result: object) -> None:
            if result is None:
                session.known = True
            elif isinstance(result, SessionNotFoundError):
                self._bury(session)
            elif not self._is_lost(result):
                self._unexpected("touch", result)

        return _Ask("touch", (session.tokens[-1],), {}, settle)

    def _read(self, session: _Session, *, whole: bool) -> _Ask:
        names = list(session.cells) if whole else self._dice.sample(_NAMES, 3)

        def settle(result: object) -> None:
            if self._is_lost(result):
                return
            if not isinstance(result, dict):
                self._unexpected("pall", result)
                return
            for name in names:
                self._saw(session, name, result.pop(name, None))
            if result:
                self._wrong(f"session {session.id} holds what is not its own: {result!r}")

        if whole:
            return _Ask("pall", (self._token(session),), {}, settle)
        return _Ask("pget_many", (self._token(session), names), {}, settle)

    def _write(self, session: _Session) -> _Ask:
        free = [name for name in _NAMES if session.cells[name].rest <= self.rounds]
        payloads = {name: self._new() for name in self._dice.sample(free, min(3, len(free)))}

        def settle(result: object) -> None:
            for name, data in payloads.items():
                self._wrote(session.cells[name], {data}, result, "pset_many")

        return _Ask("pset_many", (self._token(session), payloads), {}, settle)

    def _renew(self, session: _Session) -> _Ask:
        def settle(result: object) -> None:
            if isinstance(result, str) and result[3:19] == session.id:
                session.tokens.append(result)
            elif not self._is_lost(result):
                self._unexpected("renew", result)

        return _Ask("renew", (session.tokens[-1],), {"grace": _GRACE}, settle)

    def _end(self, session: _Session) -> _Ask:
        one = session.subject is not None and self._dice.random() < 0.3

        def settle(result: object) -> None:
            if result is None:
                self._bury(session)
            elif self._is_lost(result):
                session.known = False
                session.rest = self.rounds + _REST
            else:
                self._unexpected("end", result)

        if one:
            return _Ask("end_one", (session.subject, session.id), {}, settle)
        return _Ask("end", (self._token(session),), {}, settle)

    def _bury(self, session: _Session) -> None:
        self._sessions.remove(session)
        self._graves = [*self._graves, session.tokens[-1]][-_GRAVES:]

    def _use(self, session: _Session, kind: str) -> _Ask:
        def settle(result: object) -> None:
            if self._is_lost(result):
                return
            if kind == "info" and isinstance(result, SessionInfo):
                if (result.id, result.subject) != (session.id, session.subject):
                    self._wrong(f"info of session {session.id}: {result!r}")
            elif result is not None:
                self._unexpected(kind, result)

        args = (self._token(session), _TTL) if kind == "expire" else (self._token(session),)
        return _Ask(kind, args, {}, settle)

    # One payload

    def _on_cell(self, session: _Session, name: str) -> _Ask:
        cell = session.cells[name]
        if name in _COUNTERS:
            kind = self._draw({"pincr": 6, "pget": 3, "ppop": 1})
        else:
            kind = self._draw(
                {"pget": 8, "pset": 6, "if_match": 3, "if_absent": 2, "pdel": 2, "ppop": 2}
            )
        match kind:
            case "pget" | "ppop":
                return self._take(session, name, cell, kind)
            case "pdel":
                return self._delete(session, name, cell)
            case "pincr":
                return self._count(session, name, cell)
            case "pset":
                return self._store(session, name, cell)
        return self._store_if(session, name, cell, kind)

    def _take(self, session: _Session, name: str, cell: _Cell, kind: str) -> _Ask:
        def settle(result: object) -> None:
            if self._is_lost(result):
                if kind == "ppop":
                    self._doubt(cell, {None})
                return
            value = None if isinstance(result, PayloadNotFoundError) else result
            if value is not None and not isinstance(value, bytes):
                self._unexpected(kind, result)
                return
            self._saw(session, name, value)
            if kind == "ppop":
                cell.possible = {None}

        return _Ask(kind, (self._token(session), name), {}, settle)

    def _delete(self, session: _Session, name: str, cell: _Cell) -> _Ask:
        def settle(result: object) -> None:
            if isinstance(result, PayloadNotFoundError):
                self._saw(session, name, None)
                return
            if result is None and cell.possible == {None}:
                self._wrong(f"{name} of session {session.id} was not there, and pdel deleted it")
            self._wrote(cell, {None}, result, "pdel")

        return _Ask("pdel", (self._token(session), name), {}, settle)

    def _count(self, session: _Session, name: str, cell: _Cell) -> _Ask:
        by = self._dice.randint(1, 1_000)

        def settle(result: object) -> None:
            sums: set[Value] = {b"%d" % (int(value or b"0") + by) for value in cell.possible}
            if isinstance(result, int):
                cell.possible = sums
                self._saw(session, name, b"%d" % result)
            else:
                self._wrote(cell, sums, result, "pincr")

        return _Ask("pincr", (self._token(session), name, by), {}, settle)

    def _store(self, session: _Session, name: str, cell: _Cell) -> _Ask:
        data = self._new()

        def settle(result: object) -> None:
            self._wrote(cell, {data}, result, "pset")

        return _Ask("pset", (self._token(session), name, data), {}, settle)

    def _store_if(self, session: _Session, name: str, cell: _Cell, kind: str) -> _Ask:
        data = self._new()
        expected: Value = None
        if kind == "if_match":
            known = [value for value in cell.possible if value is not None]
            expected = known[0] if known and self._dice.random() < 0.7 else b"never written"

        def settle(result: object) -> None:
            met = expected in cell.possible
            if isinstance(result, PayloadConflictError):
                cell.possible.discard(expected)
                if not cell.possible:
                    self._wrong(f"{name} of session {session.id} is {expected!r}, yet: conflict")
                    cell.possible = {expected}
                return
            if result is None and not met:
                self._wrong(f"{name} of session {session.id} is not {expected!r}, yet: stored")
            self._wrote(cell, {data}, result, "pset")

        options = {"if_absent": True} if expected is None else {"if_match": expected}
        return _Ask("pset", (self._token(session), name, data), {**options}, settle)

    # What comes of it

    def took(self, ask: _Ask, begun: float, result: object) -> None:
        """A call has returned. None may outlive its timeout, unless this process stood still."""
        returned = time.monotonic()
        if self._is_lost(result):
            self.report.unanswered += 1
        else:
            self.report.answered += 1
        over = returned - begun - _TIMEOUT
        if over > 0:
            stalled = self._stalls.between(begun, returned)
            self.report.stalled = max(stalled, self.report.stalled)
            self.report.latest = max(over - stalled, self.report.latest)
            self.report.excused += over > TOLERANCE >= over - stalled
            if over - stalled > TOLERANCE:
                self._wrong(f"{ask.method} returned {over:.3f} s late, {stalled:.3f} s stalled")
        ask.settle(result)

    def _is_lost(self, result: object) -> bool:
        """Whether the call had no answer: then it may have run, or still may."""
        return isinstance(result, _LOST)

    def _saw(self, session: _Session, name: str, value: Value) -> None:
        cell = session.cells[name]
        if value not in cell.possible:
            among = ", ".join(sorted(map(repr, cell.possible)))
            self._wrong(f"{name} of session {session.id} is {value!r}, not one of {among}")
            cell.possible = {value}
        elif cell.rest <= self.rounds:  # else a lost call may still run
            cell.possible = {value}

    def _wrote(self, cell: _Cell, values: set[Value], result: object, kind: str) -> None:
        if self._is_lost(result):
            self._doubt(cell, values)
        elif result is None:
            cell.possible = values
        else:
            self._unexpected(kind, result)

    def _doubt(self, cell: _Cell, values: set[Value]) -> None:
        cell.possible |= values
        cell.rest = self.rounds + _REST

    def _unexpected(self, method: str, result: object) -> None:
        self._wrong(f"{method} came to {result!r}")

    def _wrong(self, what: str) -> None:
        self.report.wrong.append(f"worker {self.number}, round {self.rounds}: {what}")

    def _draw(self, kinds: dict[str, int]) -> str:
        return self._dice.choices(list(kinds), list(kinds.values()))[0]


def _in_thread(worker: _Worker, gate: SessionGate, control: "_Control") -> None:
    def make(ask: _Ask) -> bool:
        begun = time.monotonic()
        result: object
        try:
            result = getattr(gate, ask.method)(*ask.args, **ask.options)
        except Exception as error:  # noqa: BLE001  # it is judged
            result = error
        worker.took(ask, begun, result)
        return not isinstance(result, _LOST)

    while not control.is_over():
        (ask,) = worker.plan(1)
        worker.rounds += make(ask)
        control.did(worker)
    for ask in worker.last():
        worker.rounds += any(make(ask) for _ in range(_LAST_TRIES))


async def _in_task(worker: _Worker, gate: AsyncSessionGate, control: "_Control") -> None:
    async def make(ask: _Ask) -> bool:
        begun = time.monotonic()
        result: object
        try:
            result = await getattr(gate, ask.method)(*ask.args, **ask.options)
        except Exception as error:  # noqa: BLE001  # it is judged
            result = error
        worker.took(ask, begun, result)
        return not isinstance(result, _LOST)

    while not control.is_over():
        worker.rounds += any(await asyncio.gather(*map(make, worker.plan(_WIDTH))))
        control.did(worker)
    for ask in worker.last():
        for _ in range(_LAST_TRIES):
            if await make(ask):
                worker.rounds += 1
                break


class _Control:
    """How far all workers are, and whether they shall stop; shared by processes."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self._answered = context.RawArray("q", _THREADS + _TASKS)
        self._over = context.RawValue("b", 0)

    def did(self, worker: _Worker) -> None:
        self._answered[worker.number] = worker.report.answered

    @property
    def answered(self) -> int:
        return sum(self._answered)

    def is_over(self) -> bool:
        return bool(self._over.value)

    def end(self) -> None:
        self._over.value = 1


class _Share(NamedTuple):
    """The workers of one process."""

    port: int
    shared: str
    threads: dict[int, int]  # number: seed
    tasks: dict[int, int]


def _work(share: _Share, control: _Control, reports: Connection) -> None:
    """Do the work of a process, and send the reports of its workers."""
    stalls = Stalls()
    url = f"redis://127.0.0.1:{share.port}/0?socket_timeout={_TRY}"

    def workers(seeds: dict[int, int]) -> list[_Worker]:
        return [_Worker(*one, share.shared, stalls) for one in seeds.items()]

    async def in_tasks(tasks: list[_Worker]) -> None:
        async with AsyncSessionGate.from_url(url, sign_key=_SIGN_KEY, timeout=_TIMEOUT) as gate:
            await asyncio.gather(*(_in_task(worker, gate, control) for worker in tasks))

    blocking, awaited = workers(share.threads), workers(share.tasks)
    with (
        stalls.watched(),
        SessionGate.from_url(url, sign_key=_SIGN_KEY, timeout=_TIMEOUT) as gate,
        ThreadPoolExecutor(max(1, len(blocking))) as pool,
    ):
        threads = [pool.submit(_in_thread, worker, gate, control) for worker in blocking]
        asyncio.run(in_tasks(awaited))
        for thread in threads:
            thread.result()
    reports.send([worker.report for worker in (*blocking, *awaited)])


def _strike(server: Server, dice: random.Random, kind: str) -> None:
    """Let one fault befall the server; it runs again afterwards."""
    if kind == "stop":
        server.pause()
        try:
            time.sleep(0.05 + dice.random() ** 3 * (_LONGEST_STOP - 0.05))
        finally:
            server.resume()
        return
    if kind == "kill":
        server.kill()
    else:
        _terminate(server)
    time.sleep(dice.choice([0, 0, 0.1, 0.3]))
    server.start()


def _terminate(server: Server) -> None:
    process = server._process
    assert process is not None
    process.terminate()
    process.wait(_RESTART_SECONDS)


def _port() -> int:
    for port in random.sample(_PORTS, len(_PORTS)):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


class _Workers:
    """All workers, in as many processes; in this one if it is one."""

    def __init__(self, shares: Sequence[_Share]) -> None:
        self.control = _Control()
        self._reports: list[Connection] = []
        self._running: list[threading.Thread | SpawnProcess] = []
        context = get_context("spawn")
        start = threading.Thread if len(shares) == 1 else context.Process
        for share in shares:
            reports, sending = context.Pipe(duplex=False)
            self._reports.append(reports)
            self._running.append(start(target=_work, args=(share, self.control, sending)))
        for one in self._running:
            one.start()

    def are_alive(self) -> bool:
        return all(one.is_alive() for one in self._running)

    def finish(self) -> list[_Report]:
        """Let them stop, look at what is left, and report."""
        self.control.end()
        found: list[_Report] = []
        for reports, one in zip(self._reports, self._running, strict=True):
            if not reports.poll(_LAST_SECONDS):
                raise AssertionError("workers did not finish")
            found += reports.recv()
            one.join()
            reports.close()
        return found


def run(dice: random.Random, scale: float) -> Tally:
    operations, faults = round(_OPERATIONS * scale), max(1, round(_FAULTS * scale))
    kinds = [_KINDS[number % len(_KINDS)] for number in range(faults)]
    dice.shuffle(kinds)
    tally = Tally()
    with (
        Server(newest_redis_7(), _OPTIONS, _port) as server,
        SessionGate.from_url(server.url, sign_key=_SIGN_KEY) as gate,
    ):
        shared = gate.start(_TTL)
        workers = _Workers(_shares(dice, server.port, shared, operations))
        try:
            for number, kind in enumerate(kinds):
                # At any moment between the last fault and the next.
                _wait_for(workers, operations * (number + dice.random()) / faults)
                _strike(server, dice, kind)
                tally.add(kind)
            _wait_for(workers, operations)
        finally:
            reports = workers.finish()
        tally.did = {"faults": faults, **tally.did}
        for report in reports:
            tally.add("operations", report.answered)
            tally.wrong += report.wrong
        for name in _SHARED:
            least = sum(report.acknowledged[name] for report in reports)
            most = least + sum(report.unknown[name] for report in reports)
            count = int(gate.pall(shared).get(name, b"0"))
            if not least <= count <= most:
                tally.wrong.append(f"{name} is {count}, not from {least} to {most}")
        check_keys(server.client(), tally)
    tally.figures["unanswered"] = f"{sum(report.unanswered for report in reports):,}"
    latest = max(report.latest for report in reports)
    stalled = max(report.stalled for report in reports)
    excused = sum(report.excused for report in reports)
    tally.figures["latest call"] = f"{latest:.2f} s past its timeout of {_TIMEOUT:g} s"
    tally.figures["later while the process itself stood still"] = (
        f"{excused:,} calls, {stalled:.2f} s at most"
    )
    return tally


def _shares(dice: random.Random, port: int, shared: str, operations: int) -> list[_Share]:
    processes = 1 if operations <= _ALONE else _PROCESSES
    seeds = [dice.getrandbits(64) for _ in range(_THREADS + _TASKS)]
    threads, tasks = list(enumerate(seeds))[:_THREADS], list(enumerate(seeds))[_THREADS:]
    return [
        _Share(port, shared, dict(threads[number::processes]), dict(tasks[number::processes]))
        for number in range(processes)
    ]


def _wait_for(workers: _Workers, answered: float) -> None:
    deadline = time.monotonic() + _PROGRESS_SECONDS
    while workers.control.answered < answered:
        if not workers.are_alive() or time.monotonic() > deadline:
            raise AssertionError("workers came to a standstill")
        time.sleep(0.002)


CAMPAIGNS = [
    Campaign(
        "processes",
        "kill, stop, restart under 16 workers: 500 faults, 1,000,000 operations, 0 wrong",
        run,
        0.006,
    )
]
