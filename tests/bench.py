"""What the library costs beside what it stands on: `make bench`.

One run on a server of its own, one table, and the same figures in `bench.json`. What is compared is
measured in turns, so that whatever else the machine does disturbs both sides. It judges nothing: a
missed goal is shown, not raised.
"""
# ruff: noqa: T201  # a table on the terminal is what it is for

import argparse
import asyncio
import json
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import cycle, islice, starmap
from pathlib import Path
from secrets import token_hex
from statistics import median
from timeit import repeat
from types import TracebackType
from typing import Any, Self

import msgspec
import redis
from redis import Redis
from redis import asyncio as redis_asyncio
from redis._parsers import Encoder, _RESP2Parser
from redis.connection import Connection, PythonRespSerializer
from redis.utils import HIREDIS_AVAILABLE

import sessiongate
from sessiongate import (
    AsyncSessionGate,
    Codec,
    InvalidTokenError,
    JSONCodec,
    MsgpackCodec,
    SessionGate,
)
from sessiongate.command import AnyCommand, Command
from sessiongate.commands import Commands
from sessiongate.sealing import SealingKeyRing
from sessiongate.wire import new_echo, pack

from .servers import Server, server_binaries

SIGN_KEY = "a sign key of the benchmark, 32 bytes and more"
TTL = 3600
NAME = "user"
FIELD = ":user"
DATA = b"x" * 30

IDLE_TIMEOUT = 1800
SCRIPTED = ("eval", "evalsha")

# Operations, and the commands that would do their work if there were no sessions.
PAIRS = (("pget", "hget"), ("pset", "hset"))

# The pure-Python half of redis-py, whether hiredis is installed or not.
PURE_PYTHON: Mapping[str, object] = {
    "parser_class": _RESP2Parser,
    "command_packer": PythonRespSerializer(6000, Encoder("utf-8", "strict", False).encode),
}


@dataclass(frozen=True, slots=True)
class Row:
    """A figure, the goal it is held to, if any, and what it was made from."""

    figure: str
    measured: float
    goal: float | None
    unit: str = ""
    at_least: bool = False
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.measured >= self.goal if self.at_least else self.measured <= self.goal


@dataclass(frozen=True, slots=True)
class Bench:
    """The server of this run, and how much of everything is measured."""

    server: Server
    quick: bool

    def times(self, full: int) -> int:
        """How often to do what a full run does `full` times."""
        return max(1, full // 64) if self.quick else full

    def client(self, **settings: object) -> Redis:
        """A client, made the same way for a gate and for bare redis-py."""
        return Redis.from_url(self.server.url, protocol=2, **settings)

    def async_client(self) -> redis_asyncio.Redis:
        """The same for asyncio."""
        return redis_asyncio.Redis.from_url(self.server.url, protocol=2)


# --- in turns -------------------------------------------------------------------------------------

# Works for one round and returns its figure. One that awaits runs a loop of its own.
Contender = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Rounds:
    """What each contender returned, round by round."""

    figures: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        return median(self.figures[name])

    def ratio(self, name: str, other: str) -> float:
        """The median of each round's ratio: what slows a whole round does not count."""
        pairs = zip(self.figures[name], self.figures[other], strict=True)
        return median(ours / theirs for ours, theirs in pairs)


def in_turns(contenders: Mapping[str, Contender], rounds: int) -> Rounds:
    """Let each contender work once a round; every other round runs in reverse."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        for name in order:
            figures[name].append(contenders[name]())
        order.reverse()
    return Rounds(figures)


def timed(call: Callable[[], object], calls: int = 50) -> Contender:
    """Microseconds a call, the median of a round."""

    def contender() -> float:
        clock = time.perf_counter_ns
        taken = []
        for _ in range(calls):
            begun = clock()
            call()
            taken.append(clock() - begun)
        return median(taken) / 1000

    return contender


@contextmanager
def on_cores(server: Server, *, shared: bool) -> Iterator[None]:
    """Keep this process and the server on one core or on two, where the system lets us (Linux).

    Left alone they come to lie together or apart, at random, and the ratios with them: to wake a
    core that idles may take longer than the call itself, and hides what is compared.
    """
    if sys.platform != "linux":
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    os.sched_setaffinity(server.pid, {max(cores) if shared else min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        os.sched_setaffinity(server.pid, cores)


# --- figures --------------------------------------------------------------------------------------


def calls(bench: Bench) -> Iterator[Row]:
    """A call of the gate beside the bare command it stands for, as redis-py comes."""
    yield from _calls(bench, "", {})


def calls_to_another_core(bench: Bench) -> Iterator[Row]:
    """The same, waking the server on a core of its own."""
    yield from _calls(bench, ", on two cores", {}, shared=False)


def pure_python_calls(bench: Bench) -> Iterator[Row]:
    """The same without hiredis."""
    if HIREDIS_AVAILABLE:
        yield from _calls(bench, ", without hiredis", PURE_PYTHON)


def _calls(
    bench: Bench, variant: str, settings: Mapping[str, object], *, shared: bool = True
) -> Iterator[Row]:
    with (
        on_cores(bench.server, shared=shared),
        bench.client(**settings) as ours,
        bench.client(**settings) as bare,
    ):
        gate = SessionGate(ours, sign_key=SIGN_KEY)
        token = gate.start(TTL, {NAME: DATA})
        key = plain_hash(bare)
        rounds = in_turns(
            {
                "pget": timed(lambda: gate.pget(token, NAME)),
                "hget": timed(lambda: bare.hget(key, FIELD)),
                "pset": timed(lambda: gate.pset(token, NAME, DATA)),
                "hset": timed(lambda: bare.hset(key, FIELD, DATA)),
            },
            bench.times(800),
        )
    for operation, command in PAIRS:
        yield Row(
            f"{operation} / {command}{variant}",
            rounds.ratio(operation, command),
            goal=1.10,
            parts={f"{name}_us": rounds.median(name) for name in (operation, command)},
        )


def lifetimes(bench: Bench) -> Iterator[Row]:
    """What an idle timeout and a subject cost a call; a session that has neither pays nothing."""
    with on_cores(bench.server, shared=True), bench.client() as client:
        gate = SessionGate(client, sign_key=SIGN_KEY)
        plain = gate.start(TTL, {NAME: DATA})
        idle = gate.start(TTL, {NAME: DATA}, idle_timeout=IDLE_TIMEOUT)
        reads = in_turns(
            {
                "idle": timed(lambda: gate.pget(idle, NAME)),
                "plain": timed(lambda: gate.pget(plain, NAME)),
            },
            bench.times(400),
        )
        subjects = cycle([f"user{number:04}" for number in range(1000)])
        starts = in_turns(
            {
                "subject": timed(lambda: gate.start(TTL, {NAME: DATA}, subject=next(subjects))),
                "plain": timed(lambda: gate.start(TTL, {NAME: DATA})),
            },
            bench.times(200),
        )
        client.flushall()
    for figure, rounds, kind, goal in (
        ("pget with an idle timeout / without", reads, "idle", 1.10),
        ("start with a subject / without", starts, "subject", 1.35),
    ):
        parts = {f"{name}_us": rounds.median(name) for name in (kind, "plain")}
        yield Row(figure, rounds.ratio(kind, "plain"), goal, parts=parts)


SEALING_KEY = "00112233445566778899aabbccddeeff" * 2
SEALED = b"x" * 200
CART = {"user": 4217, "name": "Jo Doe", "items": ["book", "pen"] * 8, "paid": False, "total": 17.5}


def sealing(bench: Bench) -> Iterator[Row]:
    """Storing and reading 200 bytes, sealed beside unsealed; and what sealing takes by itself."""
    with on_cores(bench.server, shared=True), bench.client() as client:
        plain = SessionGate(client, sign_key=SIGN_KEY)
        sealed = SessionGate(client, sign_key=SIGN_KEY, sealing_key=SEALING_KEY)
        calls: dict[str, Callable[[], object]] = {}
        for kind, gate in ("plain", plain), ("sealed", sealed):
            token = gate.start(TTL, {NAME: SEALED})
            calls[kind] = partial(_stored_and_read, gate, token, SEALED)
        rounds = in_turns({kind: timed(call) for kind, call in calls.items()}, bench.times(800))
        ring = SealingKeyRing(SEALING_KEY)
        owner, field_name = b"A" * 16, FIELD.encode()
        stored = ring.seal(SEALED, owner, field_name)
        alone = in_turns(
            {
                "seal": timed(lambda: ring.seal(SEALED, owner, field_name)),
                "open": timed(lambda: ring.open(stored, owner, field_name)),
            },
            bench.times(200),
        )
    yield Row(
        "pset and pget of 200 B, sealed / not",
        rounds.ratio("sealed", "plain"),
        goal=1.15,
        parts={
            "sealed_us": rounds.median("sealed"),
            "plain_us": rounds.median("plain"),
            "seal_us": alone.median("seal"),
            "open_us": alone.median("open"),
        },
    )


def _stored_and_read(gate: SessionGate[Any, Any], token: str, value: object) -> None:
    gate.pset(token, NAME, value)
    gate.pget(token, NAME)


def encoding(bench: Bench) -> Iterator[Row]:
    """A gate with a codec beside a gate of bytes whose caller calls the encoder himself."""
    pack, unpack = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder().decode
    by_hand: dict[str, tuple[Codec[Any, Any], Callable[[Any], bytes], Callable[[bytes], Any]]] = {
        "JSON": (JSONCodec(), lambda value: json.dumps(value).encode(), json.loads),
        "msgpack": (MsgpackCodec(), pack, unpack),
    }
    with on_cores(bench.server, shared=True), bench.client() as client:
        bare = SessionGate(client, sign_key=SIGN_KEY)
        for name, (codec, encode, decode) in by_hand.items():
            gate = SessionGate(client, sign_key=SIGN_KEY, codec=codec)
            token, other = gate.start(TTL, {NAME: CART}), bare.start(TTL, {NAME: encode(CART)})

            def hand(
                other: str = other,
                encode: Callable[[Any], bytes] = encode,
                decode: Callable[[bytes], Any] = decode,
            ) -> None:
                bare.pset(other, NAME, encode(CART))
                decode(bare.pget(other, NAME))

            rounds = in_turns(
                {
                    "codec": timed(partial(_stored_and_read, gate, token, CART)),
                    "by_hand": timed(hand),
                },
                bench.times(400),
            )
            yield Row(
                f"pset and pget through {name} / encoded by hand",
                rounds.ratio("codec", "by_hand"),
                goal=1.1,
                parts={f"{kind}_us": rounds.median(kind) for kind in ("codec", "by_hand")},
            )


def handles(bench: Bench) -> Iterator[Row]:
    """Requests of a block that reads two payloads and writes one, only reads, and does neither."""
    with bench.client(connection_class=CountingConnection) as client:
        gate = SessionGate(client, sign_key=SIGN_KEY, codec=JSONCodec())
        token = gate.start(TTL, {"cart": [1], "user": "Ann"})

        def reads_and_writes() -> None:
            with gate.open(token) as session:
                session["cart"].append(session["user"])

        def reads() -> None:
            with gate.open(token) as session:
                _ = session["cart"], session["user"]

        def does_nothing() -> None:
            with gate.open(token):
                pass

        reads_and_writes()  # registers the scripts
        blocks = ((reads_and_writes, 2), (reads, 1), (does_nothing, 0))
        for block, goal in blocks:
            before = CountingConnection.sent
            block()
            what = block.__name__.replace("_", " ")
            yield Row(f"requests of a block that {what}", CountingConnection.sent - before, goal)


def many_sessions(bench: Bench) -> Iterator[Row]:
    """Milliseconds of server time that a subject's many sessions take."""
    with on_cores(bench.server, shared=False), bench.client() as client:
        gate = SessionGate(client, sign_key=SIGN_KEY)

        def spent(call: Callable[[], object]) -> float:
            before = _script_ms(client)
            call()
            return _script_ms(client) - before

        ended = []
        for _ in range(bench.times(32)):
            for _ in range(1000):
                gate.start(TTL, {NAME: DATA}, subject="everywhere")
            ended.append(spent(lambda: gate.end_all("everywhere")))
        yield Row("end_all of 1,000 sessions", median(ended), goal=10, unit="ms")

        expired = []
        for _ in range(bench.times(8)):
            # The last one keeps the index alive: else it would be gone by itself, at no cost.
            gate.start(TTL, subject="gone")
            index = client.keys("*subject*")[0]
            entries = {f"{number:016}{number:016}": number + 1 for number in range(10_000)}
            client.zadd(index, entries)  # as of sessions that ended in 1970
            expired.append(spent(lambda: gate.sessions("gone")))
            gate.end_all("gone")
            if client.keys("*subject*"):
                raise RuntimeError("the index outlived its sessions")
        yield Row("sessions, 10,000 of them expired", median(expired), goal=5, unit="ms")
        client.flushall()


def _script_ms(client: Redis) -> float:
    """What the server has spent in scripts, in ms."""
    spent = client.info("commandstats")
    return sum(float(spent.get(f"cmdstat_{name}", {}).get("usec", 0)) for name in SCRIPTED) / 1000


def async_calls(bench: Bench) -> Iterator[Row]:
    """Operations a second of tasks that each await one after the other, as redis-py comes."""
    many = _awaited(bench, PAIRS, tasks=64, each=100, rounds=12)
    yield many.row("pget", "hget", ", 64 tasks", goal=3.0)
    yield many.row("pset", "hset", ", 64 tasks", goal=3.0)
    yield many.p99_row("pget", "hget", ", 64 tasks", goal=0.5)
    few = _awaited(bench, PAIRS[:1], tasks=8, each=250, rounds=24)
    yield few.row("pget", "hget", ", 8 tasks", goal=1.8)
    alone = _awaited(bench, PAIRS[:1], tasks=1, each=100, rounds=160, shared=True)
    yield alone.row("pget", "hget", ", one task", goal=1.0)
    alone = _awaited(bench, PAIRS[:1], tasks=1, each=100, rounds=160)
    yield alone.row("pget", "hget", ", one task, on two cores", goal=1.0)


def uvloop_calls(bench: Bench) -> Iterator[Row]:
    """The same on another event loop, where there is one."""
    if not find_spec("uvloop"):
        return
    import uvloop  # noqa: PLC0415  # there is none for Windows

    loop = uvloop.new_event_loop
    many = _awaited(bench, PAIRS[:1], tasks=64, each=100, rounds=8, loop=loop)
    yield many.row("pget", "hget", ", 64 tasks, uvloop")
    alone = _awaited(bench, PAIRS[:1], tasks=1, each=100, rounds=64, loop=loop)
    yield alone.row("pget", "hget", ", one task, uvloop")


def unbatched_calls(bench: Bench) -> Iterator[Row]:
    """The same with each operation on a connection of the client's pool."""
    many = _awaited(bench, PAIRS[:1], tasks=64, each=100, rounds=8, auto_pipeline=False)
    yield many.row("pget", "hget", ", 64 tasks, no auto_pipeline")


@dataclass(frozen=True, slots=True)
class Awaited:
    """What tasks achieved: calls a second, and how long the slowest hundredth of them took."""

    per_s: Rounds
    p99_us: Rounds

    def row(self, operation: str, command: str, variant: str, goal: float | None = None) -> Row:
        """How many times as many calls of the operation a second."""
        return Row(
            f"async {operation} / {command}{variant}",
            self.per_s.ratio(operation, command),
            goal,
            at_least=True,
            parts={f"{name}_per_s": self.per_s.median(name) for name in (operation, command)},
        )

    def p99_row(self, operation: str, command: str, variant: str, goal: float) -> Row:
        """How many times as long the slowest hundredth of the operation take."""
        return Row(
            f"async {operation} / {command}{variant}, p99",
            self.p99_us.ratio(operation, command),
            goal,
            parts={f"{name}_us": self.p99_us.median(name) for name in (operation, command)},
        )


def _awaited(  # noqa: PLR0913  # options are keyword-only
    bench: Bench,
    pairs: Sequence[tuple[str, str]],
    *,
    tasks: int,
    each: int,
    rounds: int,
    shared: bool = False,
    auto_pipeline: bool = True,
    loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> Awaited:
    with (
        on_cores(bench.server, shared=shared),
        bench.client() as client,
        asyncio.Runner(loop_factory=loop) as runner,
    ):
        ours, bare = bench.async_client(), bench.async_client()
        gate = AsyncSessionGate(ours, sign_key=SIGN_KEY, auto_pipeline=auto_pipeline)
        token = runner.run(gate.start(TTL, {NAME: DATA}))
        key = plain_hash(client)
        awaitables: dict[str, Callable[[], Awaitable[object]]] = {
            "pget": lambda: gate.pget(token, NAME),
            "hget": lambda: bare.hget(key, FIELD),
            "pset": lambda: gate.pset(token, NAME, DATA),
            "hset": lambda: bare.hset(key, FIELD, DATA),
        }
        crews = {name: Tasks(awaitables[name], tasks) for pair in pairs for name in pair}
        for crew in crews.values():
            runner.run(crew.work(1))  # connects
        per_s = in_turns(
            {name: partial(crew.measured, runner, each) for name, crew in crews.items()},
            bench.times(rounds),
        )
        for close in gate.aclose, ours.aclose, bare.aclose:
            runner.run(close())
    return Awaited(per_s, Rounds({name: crew.p99s_us for name, crew in crews.items()}))


class Tasks:
    """Tasks of an event loop that all call the same, each one call after the other."""

    def __init__(self, call: Callable[[], Awaitable[object]], count: int) -> None:
        self._call = call
        self._count = count
        self.p99s_us: list[float] = []

    def measured(self, runner: asyncio.Runner, each: int) -> float:
        """Calls a second while each task makes some; their 99th percentile is kept beside."""
        begun = time.perf_counter()
        taken = runner.run(self.work(each))
        seconds = time.perf_counter() - begun
        self.p99s_us.append(sorted(taken)[len(taken) * 99 // 100] / 1000)
        return len(taken) / seconds

    async def work(self, each: int) -> list[int]:
        """Nanoseconds that the calls took."""
        taken: list[int] = []

        async def one() -> None:
            clock = time.perf_counter_ns
            for _ in range(each):
                begun = clock()
                await self._call()
                taken.append(clock() - begun)

        await asyncio.gather(*(one() for _ in range(self._count)))
        return taken


def verifying(bench: Bench) -> Iterator[Row]:
    """A genuine token, verified locally."""
    with bench.client() as client:
        gate = SessionGate(client, sign_key=SIGN_KEY)
        token = gate.start(TTL)
        runs = repeat(
            "verify(token)",
            globals={"verify": gate.verify, "token": token},
            repeat=bench.times(1000),
            number=1000,
        )
    yield Row("verifying a token", median(runs) * 1000, goal=3.0, unit="us")


def forging(bench: Bench) -> Iterator[Row]:
    """What the server receives while tokens with a wrong signature are presented."""
    with bench.client() as ours, bench.client() as observer:
        gate = SessionGate(ours, sign_key=SIGN_KEY)
        session_id = gate.verify(gate.start(TTL, {NAME: DATA}))
        forged = [f"v1.{session_id}.{token_hex(32)}" for _ in range(1000)]
        before = _received(observer)
        asking = _received(observer) - before
        refused = sum(_is_refused(gate, token) for token in forged)
        sent = _received(observer) - before - 2 * asking
    yield Row(
        "sent to the server for 1,000 forged tokens",
        sent,
        goal=0,
        unit="B",
        parts={"refused": refused},
    )


def _received(observer: Redis) -> int:
    return int(observer.info("stats")["total_net_input_bytes"])


def _is_refused(gate: SessionGate, token: str) -> bool:
    try:
        gate.pget(token, NAME)
    except InvalidTokenError:
        return True
    return False


def round_trips(bench: Bench) -> Iterator[Row]:
    """Requests of each operation, once its script is registered."""
    with bench.client(connection_class=CountingConnection) as client:
        gate = SessionGate(client, sign_key=SIGN_KEY)
        _requests_of_each(gate)
        counts = _requests_of_each(gate)
    yield Row("requests of an operation, at most", max(counts.values()), goal=1, parts=counts)


class CountingConnection(Connection):
    """A connection of redis-py that counts what is sent over all of its kind."""

    sent = 0

    def send_packed_command(self, command: list[bytes], check_health: bool = True) -> None:
        CountingConnection.sent += 1
        super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]  # as redis-py has it


def _requests_of_each(gate: SessionGate) -> dict[str, int]:
    token = ""

    def start() -> None:
        nonlocal token
        token = gate.start(TTL)

    def renew() -> None:
        nonlocal token
        token = gate.renew(token)

    operations: dict[str, Callable[[], object]] = {
        "start": start,
        "expire": lambda: gate.expire(token, TTL),
        "touch": lambda: gate.touch(token),
        "info": lambda: gate.info(token),
        "renew": renew,
        "pset": lambda: gate.pset(token, NAME, DATA),
        "pset ttl": lambda: gate.pset(token, NAME, DATA, ttl=TTL),
        "pset_many": lambda: gate.pset_many(token, {NAME: DATA}),
        "pget": lambda: gate.pget(token, NAME),
        "pget_many": lambda: gate.pget_many(token, [NAME]),
        "pall": lambda: gate.pall(token),
        "pdel": lambda: gate.pdel(token, NAME),
        "pincr": lambda: gate.pincr(token, NAME),
        "ppop": lambda: gate.ppop(token, NAME),
        "end": lambda: gate.end(token),
    }
    counts = {}
    for name, operation in operations.items():
        before = CountingConnection.sent
        operation()
        counts[name] = CountingConnection.sent - before
    return counts


def throughput(bench: Bench) -> Iterator[Row]:
    """Pipelined requests per second of the server's CPU time, script beside plain command."""
    with (
        on_cores(bench.server, shared=False),
        bench.client() as client,
        Crowd(bench.server) as crowd,
    ):
        gate = SessionGate(client, sign_key=SIGN_KEY)
        token = gate.start(TTL, {NAME: DATA})
        gate.pget(token, NAME)
        gate.pset(token, NAME, DATA)
        pget = commands_of(gate).pget(token, NAME)
        pset = commands_of(gate).pset(token, NAME, DATA)
        key, field_name = pget.keys[0], FIELD.encode()
        requests: dict[str, Callable[[], bytes]] = {
            "pget": partial(request, pget),
            "hget": partial(plain_request, b"HGET", key, field_name),
            "pset": partial(request, pset),
            "hset": partial(plain_request, b"HSET", key, field_name, DATA),
        }
        contenders = {name: crowd.contender(client, make) for name, make in requests.items()}
        rounds = in_turns(contenders, bench.times(64))
    for operation, command in PAIRS:
        yield Row(
            f"{operation} / {command}, pipelined, on the server",
            rounds.ratio(operation, command),
            goal=0.25,
            at_least=True,
            parts={f"{name}_per_s": rounds.median(name) for name in (operation, command)},
        )


class Crowd:
    """50 plain connections that keep a server busy, 16 requests deep, as redis-benchmark would.

    A Python client is hardly faster than the server: so what counts is the server's CPU time, not
    the clock.
    """

    CONNECTIONS = 50
    DEPTH = 16
    TURNS = 40

    def __init__(self, server: Server) -> None:
        with ExitStack() as stack:
            self._sockets = [
                stack.enter_context(connected(server)) for _ in range(self.CONNECTIONS)
            ]
            self._stack = stack.pop_all()

    def contender(self, client: Redis, make: Callable[[], bytes]) -> Contender:
        """Requests per second of CPU time that `client` sees the server spend."""
        batch = b"".join(make() for _ in range(self.DEPTH))
        expected = len(replies(self._sockets[0], batch))

        def contender() -> float:
            before = _cpu_seconds(client)
            self._exchange(batch, expected)
            spent = _cpu_seconds(client) - before
            return self.CONNECTIONS * self.DEPTH * self.TURNS / spent

        return contender

    def _exchange(self, batch: bytes, expected: int) -> None:
        buffer = bytearray(expected)
        for sock in self._sockets:
            sock.sendall(batch)
        for turn in range(1, self.TURNS + 1):
            for sock in self._sockets:
                missing = expected
                while missing:
                    missing -= sock.recv_into(buffer, missing)
                if turn < self.TURNS:
                    sock.sendall(batch)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()


def _cpu_seconds(client: Redis) -> float:
    spent = client.info("cpu")
    return float(spent["used_cpu_user"]) + float(spent["used_cpu_sys"])


def memory(bench: Bench) -> Iterator[Row]:
    """Server memory of a session."""
    # A 64th fills the server's hash tables as much as the whole does.
    sessions = 1_563 if bench.quick else 100_000
    with bench.client() as client:
        gate = SessionGate(client, sign_key=SIGN_KEY)
        gate.start(TTL)
        make = commands_of(gate)
        for payload_bytes, goal in (0, 190), (30, 240), (88, 510):
            payloads = {NAME: b"x" * payload_bytes} if payload_bytes else None
            starts = starmap(make.start, [(TTL, payloads)] * sessions)
            measured = _taken(bench.server, client, starts)
            what = f"a payload of {payload_bytes} B" if payload_bytes else "no payload"
            yield Row(f"memory of a session, {what}", measured, goal, unit="B")

        payloads = {NAME: DATA}
        plain = _taken(bench.server, client, starmap(make.start, [(TTL, payloads)] * sessions))
        # The goal is for an index entry. The index itself is shared by a subject's sessions; what
        # it takes of them if they are few is shown.
        for each in 10, 2, 1:
            users = (f"user{number // each:06}" for number in range(sessions))
            owned = (make.start(TTL, payloads, user, IDLE_TIMEOUT) for user in users)
            measured = _taken(bench.server, client, owned) - plain
            what = f"subject, idle timeout, index: {each} a subject"
            yield Row(what, measured, 160 if each == 10 else None, unit="B")
        client.flushall()


def _taken(server: Server, client: Redis, starts: Iterator[Command[str]]) -> float:
    """Bytes of server memory that a session takes, of those that the commands start."""
    client.flushall()
    before = _settled_memory(client)
    sessions = 0
    with connected(server) as sock:
        while batch := list(islice(starts, 1000)):
            replies(sock, b"".join(map(request, batch)))
            sessions += len(batch)
    if len(client.keys("*[^:]:{*")) < sessions:
        raise RuntimeError("sessions were refused: what they take cannot be told")
    return (_settled_memory(client) - before) / sessions


def _settled_memory(client: Redis) -> int:
    """Bytes in use, once nothing is being freed, rehashed or shrunk any more."""
    readings: list[int] = []
    while len(readings) < 100:
        readings.append(client.info("memory")["used_memory"])
        if len(readings) >= 10 and len(set(readings[-10:])) == 1:
            break
        time.sleep(0.05)
    return readings[-1]


def importing(bench: Bench) -> Iterator[Row]:
    """CPU time of an interpreter that imports the library, beside one that imports redis-py."""
    modules = ("sessiongate", "redis")
    for module in modules:  # writes the bytecode, if it is not there yet
        _import_ms(module)
    rounds = in_turns({module: partial(_import_ms, module) for module in modules}, bench.times(32))
    yield Row(
        "import sessiongate / import redis",
        rounds.ratio(*modules),
        goal=1.15,
        parts={f"{module}_ms": rounds.median(module) for module in modules},
    )


def _import_ms(module: str) -> float:
    command = [sys.executable, "-c", f"import {module}"]
    # With its bytecode, as an installed package has it.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    process = os.posix_spawn(sys.executable, command, environment)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"import {module} failed")
    return (usage.ru_utime + usage.ru_stime) * 1000


FIGURES: Sequence[Callable[[Bench], Iterator[Row]]] = (
    calls,
    calls_to_another_core,
    pure_python_calls,
    sealing,
    encoding,
    handles,
    lifetimes,
    many_sessions,
    async_calls,
    uvloop_calls,
    unbatched_calls,
    verifying,
    forging,
    round_trips,
    throughput,
    memory,
    importing,
)


def plain_hash(client: Redis) -> str:
    """The Redis key of a new hash with what a session holds, for a command to work on."""
    key = f"sg-session:{{{token_hex(8)}}}"
    client.hset(key, mapping={"fp": os.urandom(16), FIELD: DATA})
    client.expire(key, TTL)
    return key


# --- plain sockets --------------------------------------------------------------------------------


def commands_of(gate: SessionGate) -> Commands:
    """What the gate itself makes its commands with."""
    return gate._commands  # the very requests of a gate, not a copy of how it makes them


def request(command: AnyCommand) -> bytes:
    """A command as a gate sends it."""
    return b"".join(pack(command, new_echo()))


def plain_request(*words: bytes) -> bytes:
    """A command of Redis as any client sends it."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)


def connected(server: Server) -> socket.socket:
    """A plain connection; a server that says nothing for 10 s is an error."""
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def replies(sock: socket.socket, requests: bytes) -> bytes:
    """All that comes back for the requests. A PING behind them tells where it ends."""
    sock.sendall(requests + b"PING\r\n")
    received = bytearray()
    while not received.endswith(b"+PONG\r\n"):
        received += sock.recv(65536)
    return bytes(received.removesuffix(b"+PONG\r\n"))


# --- the table ------------------------------------------------------------------------------------

LINE = "{:<46} {:>10}    {:>10}  {:<6}  {}"


def line(row: Row) -> str:
    """A row as a line of the table."""
    sign = ">=" if row.at_least else "<="
    goal = "" if row.goal is None else f"{sign} {_figure(row.goal)} {row.unit}".strip()
    return LINE.format(
        row.figure,
        f"{_figure(row.measured)} {row.unit}".strip(),
        goal,
        {True: "met", False: "MISSED", None: ""}[row.met],
        ", ".join(f"{name} {_figure(value)}" for name, value in row.parts.items()),
    ).rstrip()


def _figure(value: float) -> str:
    """Three digits; of a count, and of what is larger, all before the point."""
    if isinstance(value, int) or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def surroundings(server: str) -> dict[str, str | bool]:
    """What the figures hold for."""
    name, version = server.split("-", 1)
    return {
        "sessiongate": sessiongate.__version__,
        "server": name,
        "server_version": version,
        "python": platform.python_version(),
        "redis_py": redis.__version__,
        "hiredis": HIREDIS_AVAILABLE,
    }


def preferred(servers: Sequence[str]) -> str:
    """Redis 7 if it is there: what the goals were set on. Else the newest Redis, else anything."""

    def rank(server: str) -> tuple[bool, bool, list[int]]:
        version = [int(number) for number in re.findall(r"\d+", server)]
        return server.startswith("redis-7."), server.startswith("redis-"), version

    return max(servers, key=rank)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything, print the table and write `bench.json` into the current folder."""
    binaries = server_binaries()
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--server", choices=binaries, help="one of those found")
    parser.add_argument("--quick", action="store_true", help="10 seconds, to see that it runs")
    options = parser.parse_args(argv)
    if not binaries:
        parser.error("no server found")
    name = options.server or preferred(list(binaries))

    about = surroundings(name)
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    print(LINE.format("figure", "measured", "goal", "", ""), flush=True)
    rows = []
    with Server(binaries[name]) as server:
        bench = Bench(server, options.quick)
        for figure in FIGURES:
            for row in figure(bench):
                print(line(row), flush=True)
                rows.append(row)
    figures = [{**asdict(row), "met": row.met} for row in rows]
    Path("bench.json").write_text(
        json.dumps({**about, "quick": options.quick, "figures": figures}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
