"""Linearizability: threads and tasks share a session through a network that loses and delays.

Each call is recorded with when it began, when it returned and what it was answered; whether there
is an order of the calls that explains all answers, the judge of histories decides.
"""

import asyncio
import contextlib
import random
import socket
import struct
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any, Self, TypeVar

from redis import Redis

from sessiongate import AsyncSessionGate, SessionGate
from tests.linearizability import (
    UNKNOWN,
    Answer,
    Call,
    Operation,
    State,
    Unknown,
    Verdict,
    held,
    judge,
)
from tests.servers import Server

from .calls import LOST, Request, answer, generation, request
from .harness import Campaign, Tally
from .rules import check_keys, newest_redis_7

R = TypeVar("R")

_HISTORIES = 2_000
_OPERATIONS = 100
_CLIENTS = 4
_AT_ONCE = 8  # histories side by side in a process
_PROCESSES = 2
_ALONE = 200  # so many histories are not worth another process

_SIGN_KEY = "a sign key of the campaigns, 32 bytes and more"
_TIMEOUT = 0.6  # of a call, in seconds
_TRY = 0.25  # of one of its tries
_TTL = 3_600
_MAX_RENEWALS = 12  # a session remembers 16 tokens
_MAX_DELETIONS = 8  # and its last 8 deletions, so that none of them comes a second time
_STARTS = 50
_BUDGET = 50_000
_MANY = 15  # calls without an answer: more than the network alone brings about
_ROUNDS = 3  # to make up for histories that were set aside
_QUIET_SECONDS = 10.0

_OF_ALL = ("pall", "touch", "end")
_NAMES = ("user", "cart", "hits")
# How many requests of 1,000 are struck: most histories should meet a fault, none too many.
_RATES = (0, 20, 40, 80)
_RATE_OF_STARTS = 300
_LONGEST = 0.5
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_CHUNK = 65_536

# What befalls a request, and how likely that is beside the others.
_FAULTS = {
    "refused": 1,  # the connection is reset, and it never reaches the server
    "unanswered": 3,  # it reaches the server, and the connection is reset instead of a reply
    "cut": 2,  # its reply ends in the middle
    "slow": 2,  # its reply comes late, perhaps too late
    "held": 3,  # it comes late, when the client has given up or still waits
    "ghost": 4,  # the connection is reset at once, and it comes later all the same
}


class Network:
    """Passes the bytes of one history between its clients and the server, and does harm to some."""

    def __init__(self, port: int, dice: random.Random) -> None:
        self._upstream = port
        self._dice = dice
        self._server: asyncio.Server | None = None
        self._delays = 0  # requests that are still to reach the server
        self._links: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._quiet = asyncio.Event()
        self.port = 0
        self.rate = 0
        self.longest = 0.0  # for which a request is held back
        self.faults = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._link, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for client in self._links.values():
            client.transport.abort()
        if self._links:
            await asyncio.wait(self._links, timeout=_QUIET_SECONDS)

    async def quiet(self) -> None:
        """Wait until every request that was held back has been to the server."""
        async with asyncio.timeout(_QUIET_SECONDS):
            while self._delays:
                self._quiet.clear()
                await self._quiet.wait()

    def _draw(self) -> str:
        if self._dice.random() * 1_000 >= self.rate:
            return ""
        self.faults += 1
        return self._dice.choices(list(_FAULTS), list(_FAULTS.values()))[0]

    @contextlib.contextmanager
    def _delay(self) -> Iterator[None]:
        self._delays += 1
        try:
            yield
        finally:
            self._delays -= 1
            self._quiet.set()

    async def _link(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links[task] = client
        upstream: asyncio.StreamWriter | None = None
        try:
            replies, upstream = await asyncio.open_connection("127.0.0.1", self._upstream)
            harm = _Harm()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._replies(replies, client, harm))
                await self._requests(reader, client, upstream, harm)
                # What was sent is read to its end by the server, which closes then.
                with self._delay(), contextlib.suppress(OSError):
                    upstream.write_eof()
                    await harm.over.wait()
        finally:
            del self._links[task]
            for writer in (client, upstream):
                if writer is not None:
                    writer.transport.abort()

    async def _requests(
        self,
        reader: asyncio.StreamReader,
        client: asyncio.StreamWriter,
        upstream: asyncio.StreamWriter,
        harm: "_Harm",
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                fault = self._draw()
                if fault == "refused":
                    _reset(client)
                    return
                if fault in ("held", "ghost"):
                    if fault == "ghost":
                        _reset(client)
                    with self._delay():
                        await asyncio.sleep(self._dice.random() ** 2 * self.longest)
                        upstream.write(data)
                    continue
                if fault == "unanswered":
                    _reset(client)
                if fault == "cut":
                    harm.cut = True
                if fault == "slow":
                    harm.pause = self._dice.random() * _LONGEST
                upstream.write(data)

    async def _replies(
        self, replies: asyncio.StreamReader, client: asyncio.StreamWriter, harm: "_Harm"
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await replies.read(_CHUNK):
                if harm.pause:
                    await asyncio.sleep(harm.pause)
                    harm.pause = 0
                if harm.cut:
                    client.write(data[: self._dice.randrange(len(data))])
                    await client.drain()
                    _reset(client)
                    harm.cut = False
                elif not client.transport.is_closing():
                    client.write(data)
        harm.over.set()
        client.close()


@dataclass
class _Harm:
    """What shall befall the replies of a connection."""

    cut: bool = False
    pause: float = 0
    over: asyncio.Event = field(default_factory=asyncio.Event)


def _reset(client: asyncio.StreamWriter) -> None:
    its_socket = client.get_extra_info("socket")
    if its_socket is not None:
        with contextlib.suppress(OSError):
            its_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    client.transport.abort()


class History:
    """What happens to one session, and the tokens that its clients know."""

    def __init__(
        self, token: str, payloads: dict[str, bytes], errors: Sequence[Exception] = ()
    ) -> None:
        self.tokens = {0: token}
        self.initial = State(held(payloads))
        self.calls: list[Call] = []
        self.errors = list(errors)
        self.faults = 0
        self.deletions = 0  # asked for so far

    def record(self, operation: Operation, begun: float, result: object) -> None:
        returned = time.perf_counter()
        if isinstance(result, str):
            self.tokens[generation(result)] = result
        said: Answer | Unknown
        try:
            said = answer(result)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is unclassified
            self.errors.append(error)
            said = UNKNOWN
        self.calls.append(Call(operation, begun, returned, said))


class Client:
    """Decides what one of the clients of a session does next."""

    def __init__(self, history: History, seed: int, number: int) -> None:
        self._history = history
        self._dice = random.Random(seed)  # noqa: S311  # no secret
        self._number = number
        self._count = 0
        self._seen: list[bytes] = [b"0"]

    def operations(self, count: int) -> Iterator[tuple[Operation, Request]]:
        for number in range(count):
            operation = self._next(may_end=number > count * 2 / 3)
            yield operation, request(operation, self._history.tokens[operation.token])

    def pause(self) -> float:
        """For some of the operations, so that what was held back meets others."""
        return self._dice.random() * 0.01 if self._dice.random() < 0.2 else 0

    def did(self, operation: Operation, begun: float, result: object) -> None:
        self._history.record(operation, begun, result)
        if isinstance(result, bytes):
            self._seen.append(result)

    def _new(self) -> bytes:
        """Data that no other call stores."""
        self._count += 1
        data = b"%d%03d" % (self._number + 1, self._count)
        self._seen.append(data)
        return data

    def _next(self, *, may_end: bool) -> Operation:
        dice = self._dice
        name = dice.choice(_NAMES)
        tokens = list(self._history.tokens)
        known = max(tokens)
        token = known if dice.random() < 0.8 else dice.choice(tokens)
        kinds = {"pget": 22, "pset": 12, "swap": 12, "pset_new": 5, "ppop": 5}
        kinds |= {"pincr": 14, "pall": 6, "pget_many": 4, "pset_many": 5, "touch": 2}
        if known < _MAX_RENEWALS - _CLIENTS:  # each client may be renewing
            kinds["renew"] = 3
        if self._history.deletions <= _MAX_DELETIONS - _CLIENTS:
            kinds["pdel"] = 8
        if may_end:
            kinds["end"] = 2
        kind = dice.choices(list(kinds), list(kinds.values()))[0]
        self._history.deletions += kind == "pdel"
        if kind == "swap":
            expected = self._seen[-1] if dice.random() < 0.5 else dice.choice(self._seen[-4:])
            return Operation("pset", name, self._new(), expected, token=token)
        if kind == "pincr":
            return Operation(kind, "hits", by=dice.choice([1, 10, 100]), token=token)
        if kind == "renew":
            return Operation(kind, grace=dice.random() < 0.8, token=token)
        if kind.endswith("_many"):
            many = held({name: self._new() for name in dice.sample(_NAMES, 2)})
            return Operation(kind, many=many, token=token)
        data = self._new() if kind in ("pset", "pset_new") else b""
        return Operation(kind, "" if kind in _OF_ALL else name, data, token=token)


class _Gates:
    """A gate for threads and two for tasks, through a network or straight to the server."""

    def __init__(self, port: int) -> None:
        url = f"redis://127.0.0.1:{port}/0?socket_timeout={_TRY}"
        self.threads = SessionGate.from_url(url, sign_key=_SIGN_KEY, timeout=_TIMEOUT)
        self.tasks = AsyncSessionGate.from_url(url, sign_key=_SIGN_KEY, timeout=_TIMEOUT)
        self.pooled = AsyncSessionGate.from_url(
            url, sign_key=_SIGN_KEY, timeout=_TIMEOUT, auto_pipeline=False
        )

    async def close(self) -> None:
        self.threads.close()
        await self.tasks.aclose()
        await self.pooled.aclose()


async def _in_task(client: Client, gate: AsyncSessionGate, count: int) -> None:
    for operation, (method, args, options) in client.operations(count):
        begun = time.perf_counter()
        try:
            result = await getattr(gate, method)(*args, **options)
        except Exception as error:  # noqa: BLE001  # it is judged
            result = error
        client.did(operation, begun, result)
        await asyncio.sleep(client.pause())


def _in_thread(client: Client, gate: SessionGate, count: int) -> None:
    for operation, (method, args, options) in client.operations(count):
        begun = time.perf_counter()
        try:
            result = getattr(gate, method)(*args, **options)
        except Exception as error:  # noqa: BLE001  # it is judged
            result = error
        client.did(operation, begun, result)
        time.sleep(client.pause())


class _Place:
    """Where histories come about, one after the other: a network, and gates on both sides of it."""

    def __init__(
        self, network: Network, direct: _Gates, dice: random.Random, threads: ThreadPoolExecutor
    ) -> None:
        self._network = network
        self._gates = _Gates(network.port)
        self._direct = direct
        self._dice = dice
        self._threads = threads

    async def history(self) -> History:
        """Let one come about."""
        dice, network = self._dice, self._network
        faults = network.faults
        # A start that comes once more when the session has ended is rare enough.
        network.rate, network.longest = _RATE_OF_STARTS, _LONGEST * 6
        history = await self._begun()
        network.rate, network.longest = dice.choice(_RATES), _LONGEST
        await asyncio.gather(
            *(
                self._client(Client(history, dice.getrandbits(64), number))
                for number in range(_CLIENTS)
            )
        )
        await network.quiet()
        await self._look(history)
        history.faults = network.faults - faults
        return history

    async def _begun(self) -> History:
        """A session that was started through the network; its start may come a second time."""
        payloads = {"user": b"0", "hits": b"1"}
        errors: list[Exception] = []
        for _ in range(_STARTS):
            try:
                subject = self._dice.choice([None, "alice"])
                if self._dice.random() < 0.5:
                    start = partial(self._gates.threads.start, subject=subject)
                    token = await self._in_thread(start, _TTL, payloads)
                else:
                    token = await self._gates.tasks.start(_TTL, payloads, subject=subject)
            except Exception as error:  # noqa: BLE001  # it is judged
                if not isinstance(error, LOST):
                    errors.append(error)
            else:
                return History(token, payloads, errors)
        raise AssertionError("no session could be started")

    def _client(self, client: Client) -> Coroutine[Any, Any, None]:
        count = _OPERATIONS // _CLIENTS
        match self._dice.choice(["thread", "thread", "task", "pooled"]):
            case "thread":
                return self._in_thread(_in_thread, client, self._gates.threads, count)
            case "task":
                return _in_task(client, self._gates.tasks, count)
        return _in_task(client, self._gates.pooled, count)

    async def _in_thread(self, function: Callable[..., R], *args: object) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def _look(self, history: History) -> None:
        """See what is left, past the network: what came late has come by now."""
        for token in list(history.tokens):
            for operation in (Operation("touch", token=token), Operation("pall", token=token)):
                begun = time.perf_counter()
                method, args, options = request(operation, history.tokens[token])
                try:
                    result = await getattr(self._direct.tasks, method)(*args, **options)
                except Exception as error:  # noqa: BLE001  # it is judged
                    result = error
                history.record(operation, begun, result)

    async def close(self) -> None:
        await self._gates.close()


def _some_histories(port: int, seed: int, count: int) -> Tally:
    """As many histories, in this process. They are judged when none is under way any more."""
    tally = Tally()
    dice = random.Random(seed)  # noqa: S311  # no secret
    for _ in range(_ROUNDS):
        lacking = count - tally.did.get("histories", 0)
        if lacking:
            for history in asyncio.run(_run(port, dice, lacking)):
                _judge(history, tally)
    return tally


def _judge(history: History, tally: Tally) -> None:
    calls = history.calls
    # On a machine that stood still a try may be late without a fault of the network.
    repeats = history.faults > 0 or any(call.returned - call.begun > _TRY for call in calls)
    judgement = judge(calls, history.initial, repeats=repeats, budget=_BUDGET)
    unanswered = sum(call.answer is UNKNOWN for call in calls)
    if judgement.verdict is Verdict.UNDECIDED and unanswered > _MANY:
        tally.add("set aside")  # the server itself stood still: another one takes its place
        return
    tally.add("histories")
    tally.add("operations", len(calls))
    tally.add("faults", history.faults)
    tally.add("unanswered", unanswered)
    tally.add("undecided", judgement.verdict is Verdict.UNDECIDED)
    if judgement.verdict is not Verdict.RIGHT:
        about = f"{history.tokens[0][3:19]}, {history.faults} faults: {judgement.verdict.value}"
        tally.wrong.append(f"{about}: {judgement.why}")
    tally.wrong += [f"unclassified: {error!r}" for error in history.errors]


async def _run(port: int, dice: random.Random, count: int) -> list[History]:
    histories: list[History] = []
    left = iter(range(count))  # shared by all places

    async def at_one_place(dice: random.Random, threads: ThreadPoolExecutor) -> None:
        async with Network(port, dice) as network:
            place = _Place(network, direct, dice, threads)
            try:
                histories.extend([await place.history() for _ in left])
            finally:
                await place.close()

    direct = _Gates(port)
    try:
        with ThreadPoolExecutor(_AT_ONCE * _CLIENTS) as threads:
            places = min(_AT_ONCE, count)
            seeds = [dice.getrandbits(64) for _ in range(places)]
            async with asyncio.TaskGroup() as group:
                for seed in seeds:
                    own = random.Random(seed)  # noqa: S311  # no secret
                    group.create_task(at_one_place(own, threads))
    finally:
        await direct.close()
    return histories


def run(dice: random.Random, scale: float) -> Tally:
    count = max(_AT_ONCE, round(_HISTORIES * scale))
    processes = 1 if count <= _ALONE else _PROCESSES
    tally = Tally()
    with Server(newest_redis_7()) as server:
        shares = [count // processes + (number < count % processes) for number in range(processes)]
        seeds = [dice.getrandbits(64) for _ in shares]
        work = partial(_some_histories, server.port)
        if processes == 1:
            tally.merge(work(*seeds, *shares))
        else:
            with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
                for share in pool.map(work, seeds, shares):
                    tally.merge(share)
        with Redis(port=server.port, protocol=2) as client:
            check_keys(client, tally)
    if tally.did["histories"] < count:
        tally.wrong.append(f"only {tally.did['histories']} of {count} histories could be judged")
    for what in ("unanswered", "undecided", "set aside"):
        tally.figures[what] = f"{tally.did.pop(what, 0):,}"
    return tally


CAMPAIGNS = [
    Campaign(
        "histories",
        "linearizability per session (an unanswered call may or may not have run): "
        "2,000 histories of 100 operations on one server",
        run,
        0.01,
    )
]
