"""AsyncSessionGate: what it shares with SessionGate, and what many tasks at once may count on."""

import asyncio
import gc
import inspect
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import get_type_hints

import anyio
import pytest
import redis
from redis.asyncio import Connection, ConnectionPool, Redis
from redis.credentials import CredentialProvider

from sessiongate import (
    AsyncSessionGate,
    ConfigurationError,
    EventLoopError,
    GateClosedError,
    PayloadNotFoundError,
    SessionGate,
    SessionNotFoundError,
)
from sessiongate.lane import Batch, Lane, Room

from .conftest import CLUSTERED, SIGN_KEY, running
from .proxy import Proxy
from .servers import Server


@asynccontextmanager
async def gate_on(port: int, **options: object) -> AsyncIterator[AsyncSessionGate]:
    client = Redis(port=port, protocol=2)
    gate = AsyncSessionGate(client, sign_key=SIGN_KEY, **options)  # type: ignore[arg-type]  # options are the gate's own
    try:
        yield gate
    finally:
        await gate.aclose()
        await client.aclose()


def lane_of(gate: AsyncSessionGate) -> Lane:
    assert isinstance(gate._channel, Lane)
    return gate._channel


def connections(server: Server) -> int:
    return int(server.client().info("clients")["connected_clients"])


OTHER_NAMES = {"close": "aclose", "__enter__": "__aenter__", "__exit__": "__aexit__"}


def methods(kind: type) -> dict[str, Callable[..., object]]:
    return {
        OTHER_NAMES.get(name, name): method
        for name, method in inspect.getmembers(kind, inspect.isroutine)
        if name in vars(kind)
        and (not name.startswith("_") or name in OTHER_NAMES or name in OTHER_NAMES.values())
    }


def test_both_gates_have_the_same_methods() -> None:
    """Every method of SessionGate is one of AsyncSessionGate, awaited, with the same signature."""
    blocking, awaited = methods(SessionGate), methods(AsyncSessionGate)
    assert set(blocking) == set(awaited)
    own = {"auto_pipeline", "max_waiting"}
    for name, method in blocking.items():
        other = awaited[name]
        theirs = inspect.signature(other)
        parameters = [p for p in theirs.parameters.values() if p.name not in own]
        if name == "open":  # a handle of its own kind, which is not awaited but entered
            theirs = theirs.replace(return_annotation=inspect.signature(method).return_annotation)
        else:
            assert get_type_hints(other).get("return") == get_type_hints(method).get("return")
        assert theirs.replace(parameters=parameters) == inspect.signature(method), name
        if name not in ("from_url", "open"):
            assert inspect.iscoroutinefunction(other), name


def test_both_gates_have_the_same_docs() -> None:
    """The documentation of an operation is the same in both gates, but for `await`."""
    for name, method in methods(SessionGate).items():
        if name in ("from_url", "aclose", "open") or name.startswith("_"):
            continue
        ours = (methods(AsyncSessionGate)[name].__doc__ or "").replace("await ", "")
        assert ours == method.__doc__


async def test_what_is_asked_at_once_leaves_at_once(server: Server) -> None:
    """Operations of many tasks in one turn of the loop are one packet each way."""
    with Proxy(server.port) as proxy:
        async with gate_on(proxy.port) as gate:
            token = await gate.start(300, {"user": "x"})
            await gate.pget(token, "user")
            await asyncio.gather(*(gate.pget(token, "user") for _ in range(50)))
            sent = len(proxy.requests)
            await asyncio.gather(*(gate.pget(token, "user") for _ in range(50)))
            assert len(proxy.requests) == sent + 1


async def test_each_task_gets_its_own_answer(server: Server) -> None:
    """Five hundred tasks that write and read at once each read what they wrote, errors included."""
    async with gate_on(server.port) as gate:

        async def work(number: int) -> None:
            token = await gate.start(300, {"user": f"{number}"})
            for turn in range(10):
                await gate.pset(token, "user", f"{number}.{turn}")
                assert await gate.pget(token, "user") == f"{number}.{turn}".encode()
                with pytest.raises(PayloadNotFoundError) as missing:
                    await gate.pget(token, f"missing {number}")
                assert missing.value.name == f"missing {number}"
            await gate.end(token)
            with pytest.raises(SessionNotFoundError) as ended:
                await gate.pget(token, "user")
            assert ended.value.session_id == token[3:19]

        await asyncio.gather(*(work(number) for number in range(500)))


async def test_ten_thousand_tasks_at_once(server: Server) -> None:
    """Ten thousand tasks are served over one connection; there is no pool to run out of."""
    async with gate_on(server.port, timeout=60) as gate:
        before = connections(server)
        token = await gate.start(300, {f"{n}": f"{n}" for n in range(10_000)})
        answers = await asyncio.gather(*(gate.pget(token, f"{n}") for n in range(10_000)))
        assert answers == [f"{n}".encode() for n in range(10_000)]
        assert connections(server) == before + 1


async def test_ten_thousand_tasks_in_memory() -> None:
    """memory:// serves as many tasks as a server does."""
    async with AsyncSessionGate.from_url("memory://", sign_key=SIGN_KEY) as gate:
        token = await gate.start(300, {"user": "x"})
        answers = await asyncio.gather(*(gate.pget(token, "user") for _ in range(10_000)))
        assert set(answers) == {b"x"}


async def test_what_a_task_awaits_in_turn_happens_in_turn(server: Server) -> None:
    """Among many others, each task finds its own writes in the order in which it awaited them."""
    async with gate_on(server.port) as gate:
        token = await gate.start(300)

        async def work(number: int) -> None:
            for turn in range(40):
                await gate.pset(token, f"{number}", f"{turn}")
                if turn % 3 == 0:
                    await gate.pdel(token, f"{number}")
                    with pytest.raises(PayloadNotFoundError):
                        await gate.pget(token, f"{number}")
                else:
                    assert await gate.pget(token, f"{number}") == f"{turn}".encode()

        await asyncio.gather(*(work(number) for number in range(64)))


async def test_a_poisoned_member_spoils_no_batch(server: Server) -> None:
    """In one batch errors of every kind reach those who caused them, and nobody else."""
    async with gate_on(server.port) as gate:
        token = await gate.start(300, {"user": "x"})
        ended = await gate.start(300)
        await gate.end(ended)
        broken, key = gate._commands._ring.sign("P" * 16)[0], f"sg-session:{{{'P' * 16}}}"
        server.client().set(key, "not a hash")
        await asyncio.gather(*(gate.pget(token, "user") for _ in range(3)))
        calls: list[Awaitable[object]] = []
        for _ in range(20):
            calls += [
                gate.pget(token, "user"),
                gate.pget(broken, "user"),
                gate.pget(ended, "user"),
                gate.pget(token, "missing"),
                gate.pset(token, "user", "x"),
            ]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        kinds: list[object] = [
            answer if answer in (b"x", None) else type(answer) for answer in answers
        ]
        assert (
            kinds
            == [
                b"x",
                redis.ResponseError,
                SessionNotFoundError,
                PayloadNotFoundError,
                None,
            ]
            * 20
        )


async def test_an_altered_reply_spoils_no_batch(server: Server) -> None:
    """When one reply of a batch is another's, its caller is told and all others get theirs."""
    altered: list[bytes] = []

    def alter(data: bytes) -> bytes:
        at = data.find(b"$18\r\n", 200)
        if at < 0 or altered:
            return data
        altered.append(data)
        return data[: at + 5] + b"abcdefghijkl" + data[at + 17 :]

    with Proxy(server.port) as proxy:
        async with gate_on(proxy.port) as gate:
            token = await gate.start(300, {f"{n}": f"{n:06}" for n in range(40)})
            await asyncio.gather(*(gate.pset(token, "x", "x") for _ in range(3)))
            proxy.alter = alter
            commands = [gate._commands.pget(token, f"{n}")._replace(repeat=None) for n in range(40)]
            answers = await asyncio.gather(*map(gate._run, commands), return_exceptions=True)
    wrong = [answer for answer in answers if isinstance(answer, Exception)]
    assert len(wrong) == len(altered) == 1
    assert type(wrong[0]) is redis.ConnectionError
    assert "belongs to another request" in str(wrong[0])
    assert all(answer in (f"{n:06}".encode(), wrong[0]) for n, answer in enumerate(answers))


async def test_scripts_forgotten_in_the_middle_of_a_batch(server: Server) -> None:
    """Scripts that the server forgets under load run again, and each takes effect once."""
    async with gate_on(server.port) as gate:
        client = server.client()
        token = await gate.start(300)
        for turn in range(20):
            client.script_flush()
            await asyncio.gather(*(gate.pset(token, f"{n}", f"{turn}") for n in range(30)))
            client.script_flush()
            await asyncio.gather(*(gate.pdel(token, f"{n}") for n in range(30)))


async def test_a_big_payload_does_not_hold_up_small_ones(server: Server) -> None:
    """Small operations that come while 8 MB are under way are answered soon after."""
    async with gate_on(server.port) as gate:
        token = await gate.start(300, {"user": "x"})
        big = b"x" * 8_000_000
        begun = time.perf_counter()
        await gate.pset(token, "big", big)
        alone = time.perf_counter() - begun
        task = asyncio.create_task(gate.pset(token, "big", big))
        await asyncio.sleep(0)
        begun = time.perf_counter()
        await asyncio.gather(*(gate.pget(token, "user") for _ in range(10)))
        # The figure is generous: what must not be is waiting for several of them.
        assert time.perf_counter() - begun < 3 * alone + 0.2
        await task
        assert await gate.pget(token, "big") == big


async def test_big_payloads_travel_in_batches_of_their_own(server: Server) -> None:
    """A batch is bounded in bytes: what is big goes alone, and what is small with its like."""
    async with gate_on(server.port) as gate:
        token = await gate.start(300, {"user": "x"})
        lane = lane_of(gate)
        sizes: list[int] = []
        run = lane._run

        async def watched(batch: Batch, due: float) -> None:
            sizes.append(len(batch))
            await run(batch, due)

        lane._run = watched  # type: ignore[method-assign]  # to watch it
        await asyncio.gather(
            *(gate.pset(token, f"{n}", b"x" * (200_000 if n % 10 == 5 else 10)) for n in range(40))
        )
        assert max(sizes) <= 20
        sizes.clear()
        await asyncio.gather(*(gate.pset(token, f"{n}", b"x" * 200_000) for n in range(5)))
        assert sizes == [1] * 5
        sizes.clear()
        await asyncio.gather(*(gate.pget(token, "user") for _ in range(1_000)))
        assert max(sizes) == 512


async def test_callers_wait_for_room(server: Server) -> None:
    """With more callers than max_waiting the rest wait, and all are served in the end."""
    async with gate_on(server.port, max_waiting=7) as gate:
        token = await gate.start(300, {"user": "x"})
        lane = lane_of(gate)
        most = 0

        async def work() -> bytes:
            nonlocal most
            data = await gate.pget(token, "user")
            most = max(most, len(lane._waiting))
            return data

        tasks = [asyncio.create_task(work()) for _ in range(500)]
        await asyncio.sleep(0.001)
        for task in tasks[::3]:
            task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(
            answer == b"x" or isinstance(answer, asyncio.CancelledError) for answer in answers
        )
        assert most <= 7
        assert await gate.pget(token, "user") == b"x"


@pytest.mark.parametrize("max_waiting", [0, -1, None, "7"], ids=repr)
def test_a_max_waiting_that_cannot_be_used(max_waiting: object) -> None:
    """max_waiting is a whole number of at least 1."""
    with pytest.raises(ConfigurationError, match="max_waiting"):
        AsyncSessionGate(Redis(), sign_key=SIGN_KEY, max_waiting=max_waiting)  # type: ignore[arg-type]  # what a type checker would refuse


def test_a_client_that_is_not_asynchronous() -> None:
    """A synchronous client, or a pipeline, is refused when the gate is made."""
    for client in (redis.Redis(), Redis().pipeline(), None):
        with pytest.raises(ConfigurationError, match=r"redis\.asyncio"):
            AsyncSessionGate(client, sign_key=SIGN_KEY)  # type: ignore[arg-type]  # what a type checker would refuse


async def storm(gate: AsyncSessionGate, operations: int, tasks: int) -> int:
    """Runs operations of many tasks, cancels a third of them at random; how many were cancelled."""
    dice = random.Random(5)  # noqa: S311  # a seed makes it repeatable
    cancelled = 0

    async def work(number: int) -> None:
        nonlocal cancelled
        data = f"data of {number}".encode()
        token = await gate.start(300, {"user": data})
        for turn in range(operations // tasks):
            way = dice.randrange(9)
            soon = dice.random() * 0.0006
            if way == 0:
                asked = asyncio.create_task(gate.pget(token, "user"))
                await asyncio.sleep(soon if turn % 2 else 0)
                asked.cancel()
                with suppress(asyncio.CancelledError):
                    assert await asked == data
                cancelled += asked.cancelled()
            elif way == 1:
                try:
                    async with asyncio.timeout(soon):
                        assert await gate.pget(token, "user") == data
                except TimeoutError:
                    cancelled += 1
            elif way == 2:
                with anyio.move_on_after(soon) as scope:
                    assert await gate.pget(token, "user") == data
                cancelled += scope.cancelled_caught
            elif way < 6:
                assert await gate.pget(token, "user") == data
            elif way == 6:
                await gate.pset(token, "user", data)
            else:
                with pytest.raises(PayloadNotFoundError) as missing:
                    await gate.pget(token, f"{number}")
                assert missing.value.name == f"{number}"

    await asyncio.gather(*(work(number) for number in range(tasks)))
    return cancelled


@pytest.mark.parametrize(
    ("operations", "tasks", "least"), [(3_000, 1, 50), (5_000, 3, 100), (100_000, 64, 15_000)]
)
async def test_a_storm_of_cancellations(
    server: Server, operations: int, tasks: int, least: int
) -> None:
    """Whoever is cancelled, however: all others get their own answers, and nothing is left over."""
    if server is not running(CLUSTERED):  # servers differ in nothing that matters here
        operations, least = operations // 5, least // 5
    async with gate_on(server.port) as gate:
        before = connections(server)
        assert await storm(gate, operations, tasks) > least
        lane = lane_of(gate)
        await asyncio.sleep(0.05)
        assert not lane._waiting
        assert not lane._busy
        assert connections(server) == before + 1
        assert await gate.pget(await gate.start(300, {"user": "x"}), "user") == b"x"


async def test_a_storm_of_cancellations_without_a_pipeline(server: Server) -> None:
    """The same holds when each operation takes a connection of the pool."""
    async with gate_on(server.port, auto_pipeline=False) as gate:
        assert await storm(gate, 2_000, 16) > 100
        assert isinstance(gate._client, Redis)
        pool = gate._client.connection_pool
        assert not pool._in_use_connections
        assert connections(server) < 40


async def test_a_cancelled_call_keeps_the_connection(server: Server) -> None:
    """Cancelling a call whose reply is under way costs no reconnection."""
    async with gate_on(server.port) as gate:
        token = await gate.start(300, {"user": "x"})
        await gate.pget(token, "user")
        accepted = server.client().info("stats")["total_connections_received"]
        for _ in range(100):
            asked = asyncio.create_task(gate.pget(token, "user"))
            await asyncio.sleep(0)
            asked.cancel()
            with suppress(asyncio.CancelledError):
                await asked
            assert await gate.pget(token, "user") == b"x"
        assert server.client().info("stats")["total_connections_received"] == accepted + 1


async def test_a_call_cancelled_before_it_was_sent_is_not_sent(server: Server) -> None:
    """What is cancelled while it waits for its turn never reaches the server."""
    async with gate_on(server.port) as gate:
        token = await gate.start(300)
        server.pause()
        first = asyncio.create_task(gate.pset(token, "first", "x"))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(gate.pset(token, "second", "x"))
        await asyncio.sleep(0.05)
        second.cancel()
        await asyncio.wait([second])
        server.resume()
        await first
        with pytest.raises(PayloadNotFoundError):
            await gate.pget(token, "second")


async def test_a_server_killed_and_restarted_under_load(own_server: Server) -> None:
    """Under 64 tasks a server dies and comes back: each call ends in time, the gate recovers."""
    async with gate_on(own_server.port) as gate:
        done, lost, stop = 0, 0, False

        async def work(number: int) -> None:
            nonlocal done, lost
            data, token = f"{number}".encode(), ""
            while not stop:
                try:
                    async with asyncio.timeout(30):
                        token = token or await gate.start(300, {"user": data})
                        assert await gate.pget(token, "user") == data
                        await gate.pset(token, "user", data)
                        done += 1
                except SessionNotFoundError:
                    token = ""
                    lost += 1  # the restart took it
                except redis.ConnectionError:
                    await asyncio.sleep(0.01)

        tasks = [asyncio.create_task(work(number)) for number in range(64)]
        for _ in range(3):
            await asyncio.sleep(0.3)
            await asyncio.to_thread(own_server.restart)
        before = done
        await asyncio.sleep(0.5)
        stop = True
        await asyncio.gather(*tasks)
        assert lost >= 2 * 64
        assert done > before + 64


async def test_no_write_runs_twice_when_its_reply_is_lost(own_server: Server) -> None:
    """When a connection breaks under a batch, each member is told and none is sent again."""
    with Proxy(own_server.port) as proxy:
        client = Redis(port=proxy.port, protocol=2)
        gate = AsyncSessionGate(client, sign_key=SIGN_KEY)
        token = await gate.start(300)
        await asyncio.gather(*(gate.pset(token, f"{n}", "x") for n in range(3)))
        own_server.client().config_resetstat()
        proxy.cut_replies = 1
        answers = await asyncio.gather(
            *(gate.pset(token, f"{n}", "x") for n in range(30)), return_exceptions=True
        )
        assert {type(answer) for answer in answers} == {redis.ConnectionError}
        assert len({id(answer) for answer in answers}) == 30
        ran = own_server.client().info("commandstats")["cmdstat_evalsha"]["calls"]
        assert ran == 30
        await gate.pset(token, "later", "x")
        await gate.aclose()
        await client.aclose()


async def test_a_server_that_stands_still(server: Server) -> None:
    """Every call ends with redis-py's timeout, those that wait behind others too."""
    client = Redis(port=server.port, protocol=2, socket_timeout=0.2, socket_connect_timeout=0.2)
    gate = AsyncSessionGate(client, sign_key=SIGN_KEY, max_waiting=5_000)
    token = await gate.start(300, {"user": "x"})
    server.pause()
    try:
        begun = time.perf_counter()
        answers = await asyncio.gather(
            *(gate.pset(token, "user", "y") for _ in range(2_000)), return_exceptions=True
        )
    finally:
        server.resume()
    assert {type(answer) for answer in answers} == {redis.TimeoutError}
    assert time.perf_counter() - begun < 20
    await gate.pset(token, "user", "z")
    assert await gate.pget(token, "user") == b"z"
    await gate.aclose()
    await client.aclose()


async def test_closing_while_calls_wait(server: Server) -> None:
    """At close what was sent is finished; what waits fails at once, what comes later too."""
    async with gate_on(server.port, max_waiting=10) as gate:
        token = await gate.start(300, {"user": "x"})
        await gate.pget(token, "user")
        server.pause()
        sent = asyncio.create_task(gate.pget(token, "user"))
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(gate.pget(token, "user")) for _ in range(50)]
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(gate.aclose())
        begun = time.perf_counter()
        for task in waiting:
            with pytest.raises(GateClosedError, match="closed"):
                await task
        assert time.perf_counter() - begun < 1
        assert not sent.done()
        server.resume()
        assert await sent == b"x"
        await closing
        with pytest.raises(GateClosedError):
            await gate.pget(token, "user")
        await gate.aclose()


async def test_closing_while_the_gate_connects(server: Server) -> None:
    """At close while the server does not answer, whoever waits fails at once."""
    client = Redis(port=server.port, protocol=3, socket_timeout=30)
    gate = AsyncSessionGate(client, sign_key=SIGN_KEY)
    server.pause()
    try:
        waiting = [asyncio.create_task(gate.start(300)) for _ in range(5)]
        await asyncio.sleep(0.05)
        begun = time.perf_counter()
        await gate.aclose()
        answers = await asyncio.gather(*waiting, return_exceptions=True)
    finally:
        server.resume()
    assert time.perf_counter() - begun < 1
    assert {type(answer) for answer in answers} == {GateClosedError}
    await client.aclose()


async def test_the_task_of_the_gate_cancelled_before_it_began(server: Server) -> None:
    """Whoever cancels the gate's task in the turn it was made in leaves no caller waiting."""
    async with gate_on(server.port) as gate:
        token = await gate.start(300, {"user": "x"})
        await asyncio.gather(*(gate.pget(token, "user") for _ in range(3)))
        callers = [asyncio.create_task(gate.pget(token, "user")) for _ in range(3)]
        await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task()} - {*callers}:
            task.cancel()
        done, _ = await asyncio.wait(callers, timeout=2)
        assert len(done) == 3
        assert await gate.pget(token, "user") == b"x"


class NoCredentials(CredentialProvider):
    """Has none the first time."""

    asked = 0

    def get_credentials(self) -> tuple[str]:
        self.asked += 1
        if self.asked == 1:
            raise Uncopyable(reason="the vault is closed")
        return ("x",)


class Uncopyable(Exception):  # noqa: N818  # as libraries have them
    """An error that copy.copy cannot make again."""

    def __init__(self, *, reason: str) -> None:
        super().__init__(reason)


@pytest.mark.parametrize("auto_pipeline", [True, False])
async def test_a_handshake_that_failed_is_not_gone_on_with(
    server: Server, auto_pipeline: bool
) -> None:
    """A connection whose handshake broke off is made anew, and its error reaches every caller."""
    server.client().config_set("requirepass", "x")
    client = Redis(port=server.port, protocol=2, db=5, credential_provider=NoCredentials())
    gate = AsyncSessionGate(client, sign_key=SIGN_KEY, auto_pipeline=auto_pipeline)
    try:
        calls = [gate.start(300) for _ in range(3 if auto_pipeline else 1)]
        answers = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5)
        assert {type(answer) for answer in answers} == {Uncopyable}
        await gate.start(300)
        look = redis.Redis(port=server.port, protocol=2, password="x")
        assert look.info("keyspace")["db5"]["keys"] == 1
        assert "db0" not in look.info("keyspace")
    finally:
        redis.Redis(port=server.port, protocol=2, password="x").config_set("requirepass", "")
        await gate.aclose()
        await client.aclose()


async def test_cancelled_callers_leave_nothing_behind(server: Server) -> None:
    """What a cancelled caller wanted to send is let go at once, even while the server stands."""
    async with gate_on(server.port, max_waiting=2) as gate:
        token = await gate.start(300)
        server.pause()
        try:
            first = asyncio.create_task(gate.pset(token, "first", "x"))
            await asyncio.sleep(0.05)
            for _ in range(50):
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.001):
                        await gate.pset(token, "big", b"x" * 1_000_000)
            assert not lane_of(gate)._waiting
        finally:
            server.resume()
        await first


async def test_a_write_that_was_cancelled_is_not_sent_later(server: Server) -> None:
    """A big write that was cut off does not arrive behind a later one that was acknowledged."""
    async with gate_on(server.port) as gate:
        token = await gate.start(300)
        await gate.pset(token, "user", "first")
        server.pause()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await gate.pset(token, "user", b"old" * 2_600_000)
        finally:
            server.resume()
        await gate.pset(token, "user", "new")
        await asyncio.sleep(0.3)
        assert await gate.pget(token, "user") == b"new"


async def test_an_error_that_names_a_state_of_the_server(server: Server) -> None:
    """A reply such as LOADING goes to its own caller; the others in the batch get theirs."""
    altered: list[bytes] = []

    def alter(data: bytes) -> bytes:
        at = data.find(b"$18\r\n", 200)
        if at < 0 or altered:
            return data
        altered.append(data)
        return data[:at] + b"-LOADING Redis is loading the dataset\r\n" + data[at + 25 :]

    with Proxy(server.port) as proxy:
        async with gate_on(proxy.port) as gate:
            token = await gate.start(300, {f"{n}": f"{n:06}" for n in range(40)})
            await asyncio.gather(*(gate.pset(token, "x", "x") for _ in range(3)))
            proxy.alter = alter
            commands = [gate._commands.pget(token, f"{n}")._replace(repeat=None) for n in range(40)]
            answers = await asyncio.gather(*map(gate._run, commands), return_exceptions=True)
    wrong = [answer for answer in answers if isinstance(answer, Exception)]
    assert [type(answer) for answer in wrong] == [redis.BusyLoadingError]
    assert all(answer in (f"{n:06}".encode(), wrong[0]) for n, answer in enumerate(answers))


async def test_the_timeout_counts_from_the_last_reply(server: Server) -> None:
    """A batch whose replies come one by one may take longer than the timeout of each."""
    with Proxy(server.port) as proxy:
        client = Redis(port=proxy.port, protocol=2, socket_timeout=0.5)
        gate = AsyncSessionGate(client, sign_key=SIGN_KEY)
        token = await gate.start(300, {"user": "x" * 100_000})
        await asyncio.gather(*(gate.pget(token, "user") for _ in range(3)))

        def slowly(data: bytes) -> bytes:
            time.sleep(0.02)
            return data

        proxy.alter = slowly
        begun = time.perf_counter()
        answers = await asyncio.gather(*(gate.pget(token, "user") for _ in range(30)))
        assert set(answers) == {b"x" * 100_000}
        assert time.perf_counter() - begun > 0.6
        await gate.aclose()
        await client.aclose()


async def test_closing_from_another_loop_leaves_the_gate_open(server: Server) -> None:
    """A close from another event loop is refused, and the gate goes on in its own."""
    async with gate_on(server.port) as gate:
        token = await gate.start(300, {"user": "x"})
        with pytest.raises(EventLoopError):
            await asyncio.to_thread(asyncio.run, gate.aclose())
        assert await gate.pget(token, "user") == b"x"


def test_two_event_loops() -> None:
    """A gate says so when it is used from another event loop than before, and does not hang."""
    gate = AsyncSessionGate.from_url("memory://", sign_key=SIGN_KEY)
    token = asyncio.run(gate.start(300))
    for call in (gate.pget(token, "user"), gate.start(300), gate.aclose()):
        with pytest.raises(EventLoopError, match="another event loop"):
            asyncio.run(call)


AFTER_A_FORK = textwrap.dedent("""
    import asyncio, os, sys
    from sessiongate import AsyncSessionGate, EventLoopError

    async def parent():
        gate = AsyncSessionGate.from_url(sys.argv[1], sign_key="k" * 32)
        token = await gate.start(300, {"user": "x"})
        await gate.pget(token, "user")
        child = os.fork()
        if child == 0:
            return gate, token
        status = await asyncio.to_thread(os.waitpid, child, 0)
        assert await gate.pget(token, "user") == b"x"
        await gate.aclose()
        print(os.waitstatus_to_exitcode(status[1]))

    loop = asyncio.new_event_loop()
    inherited = loop.run_until_complete(parent())
    if inherited:
        gate, token = inherited
        try:
            asyncio.run(asyncio.wait_for(gate.pget(token, "user"), 5))
        except EventLoopError:
            os._exit(7)
        os._exit(1)
    loop.close()
""")


def test_a_gate_after_a_fork(server: Server) -> None:
    """A forked process that uses the gate is told so, and the parent's connection is not harmed."""
    done = subprocess.run(
        [sys.executable, "-c", AFTER_A_FORK, server.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("7\n", "")


def test_uvloop(server: Server) -> None:
    """Under uvloop a gate does the same, cancellations included."""
    uvloop = pytest.importorskip("uvloop")

    async def main() -> int:
        async with gate_on(server.port) as gate:
            return await storm(gate, 2_000, 32)

    assert uvloop.run(main()) > 100


async def test_a_gate_that_nobody_closes_leaves_no_task(server: Server) -> None:
    """Between calls no task of the gate is running."""
    async with gate_on(server.port) as gate:
        await asyncio.gather(*(gate.start(300) for _ in range(10)))
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.filterwarnings(
    # Nobody closes the gate here, on purpose.
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
def test_a_loop_that_is_torn_down(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """An event loop that ends with calls under way ends at once, and leaves no task pending."""

    async def main() -> list[asyncio.Task[bytes]]:
        gate = AsyncSessionGate(Redis(port=server.port, protocol=2), sign_key=SIGN_KEY)
        token = await gate.start(300, {"user": "x"})
        server.pause()
        callers = [asyncio.create_task(gate.pget(token, "user")) for _ in range(20)]
        await asyncio.sleep(0.05)
        callers += [asyncio.create_task(gate.pget(token, "user")) for _ in range(20)]
        await asyncio.sleep(0.05)
        return callers

    begun = time.perf_counter()
    try:
        callers = asyncio.run(main())
    finally:
        server.resume()
    assert time.perf_counter() - begun < 2
    assert all(task.cancelled() for task in callers)
    del callers
    gc.collect()
    assert caplog.text == ""


async def test_a_task_of_the_gate_that_is_cancelled(server: Server) -> None:
    """Whoever cancels every task there is leaves no caller waiting, and the gate goes on."""
    async with gate_on(server.port) as gate:
        token = await gate.start(300, {"user": "x"})
        await asyncio.gather(*(gate.pget(token, "user") for _ in range(3)))
        server.pause()
        callers = [asyncio.create_task(gate.pget(token, "user")) for _ in range(20)]
        await asyncio.sleep(0.05)
        for task in asyncio.all_tasks() - {asyncio.current_task()} - {*callers}:
            task.cancel()
        await asyncio.wait(callers, timeout=1)
        server.resume()
        assert all(task.cancelled() for task in callers)
        assert await gate.pget(token, "user") == b"x"


class RaisingConnection(Connection):
    """As redis-py's before 8 with hiredis: to look for what is unread on a closed one raises."""

    async def can_read(self) -> bool:
        check = getattr(super(), "can_read", super().can_read_destructive)
        if await check():
            raise redis.ConnectionError("Connection closed by server.")
        return False

    can_read_destructive = can_read


@pytest.mark.parametrize("callers", [1, 3])
async def test_a_connection_that_the_server_closed(server: Server, callers: int) -> None:
    """Calls connect anew when the server has closed an idle connection, whatever redis-py says."""
    pool = ConnectionPool(connection_class=RaisingConnection, port=server.port, protocol=2)
    client = Redis(connection_pool=pool)
    gate = AsyncSessionGate(client, sign_key=SIGN_KEY)
    token = await gate.start(300, {"user": "x"})
    for _ in range(3):
        if callers == 1:
            await gate.touch(token)  # the last batch was of one command: the next is asked alone
        server.client().client_kill_filter(_type="normal", skipme=True)
        await asyncio.sleep(0.02)
        calls = [gate.pget(token, "user") for _ in range(callers)]
        assert await asyncio.gather(*calls) == [b"x"] * callers
    await gate.aclose()
    await client.aclose()


async def test_an_error_in_the_lane_is_told(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong in a lane, its callers are told, not cancelled, and others are served."""
    async with gate_on(server.port) as gate:
        token = await gate.start(300, {"user": "x"})
        with monkeypatch.context() as patch:
            patch.setattr(Lane, "_next_batch", lambda *_, **__: 1 // 0)
            calls = [gate.pget(token, "user") for _ in range(4)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert outcomes[0] == b"x"  # it was asked by itself, without a batch
        assert [type(outcome) for outcome in outcomes[1:]] == [ZeroDivisionError] * 3
        assert await gate.pget(token, "user") == b"x"


async def test_turns_are_taken_in_order() -> None:
    """Whoever waits for a place gets it in the order of coming, and cancelled callers take none."""
    room = Room(1)
    loop = asyncio.get_running_loop()
    came: list[int] = []

    async def visit(number: int) -> None:
        if room.places:
            room.places -= 1
        else:
            await room.turn(loop.create_future())
        try:
            came.append(number)
            await asyncio.sleep(0)
        finally:
            room.leave()

    dice = random.Random(7)  # noqa: S311  # no secret
    for _ in range(200):
        came.clear()
        tasks = [asyncio.create_task(visit(number)) for number in range(12)]
        cancelled = set()
        for number in dice.sample(range(12), 4):
            for _ in range(dice.randrange(4)):
                await asyncio.sleep(0)
            if tasks[number].cancel():
                cancelled.add(number)
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert came == sorted(came)
        assert set(range(12)) - cancelled <= set(came)
        assert room.places == 1
        assert not room._queue
