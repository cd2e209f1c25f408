"""Races of many threads and of many tasks, on one server and on a cluster.

Each call is recorded with when it began and when it returned, and what is checked is the whole
history: whether what every caller was told fits together.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from threading import Barrier
from typing import Any, Generic, TypeVar, cast

import pytest
from redis import ConnectionError as LostError
from redis import Redis

from sessiongate import (
    AsyncSessionGate,
    PayloadConflictError,
    PayloadNotFoundError,
    SessionGate,
    SessionGateError,
    SessionInfo,
    SessionNotFoundError,
    TooManySessionsError,
)
from sessiongate.command import Answer, AnyCommand
from sessiongate.keyspace import slot_of
from sessiongate.tokens import SignKeyRing

from .conftest import (
    CLUSTERED,
    SIGN_KEY,
    Backend,
    Flavour,
    Key,
    apart,
    running,
    running_cluster,
)

R = TypeVar("R")

NEW, OLD = "the sign key that comes, 32 bytes", "the sign key that goes, 32 bytes"
ALICE = b"sg-session:subject:{alice}"
SECONDS = 30  # which no test needs: what takes longer hangs
PREDECESSORS = 16  # that a session remembers

dice = random.Random()  # noqa: S311  # no secret


@dataclass(frozen=True)
class Call(Generic[R]):
    """One call: when it began and when it returned, and what it was answered."""

    begun: int
    returned: int
    _result: R | None
    error: SessionGateError | None

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def result(self) -> R:
        assert self.error is None
        return cast("R", self._result)

    def precedes(self, other: "Call[Any]") -> bool:
        """Whether it had returned before the other one began."""
        return self.returned < other.begun


def joined(lists: Iterable[list[R]]) -> list[R]:
    return list(chain.from_iterable(lists))


async def seen(operation: Awaitable[R], *errors: type[SessionGateError]) -> Call[R]:
    """Record a call, which may fail with these errors and no others."""
    begun = time.perf_counter_ns()
    try:
        result = await operation
    except errors as error:
        return Call(begun, time.perf_counter_ns(), None, error)
    return Call(begun, time.perf_counter_ns(), result, None)


def at_once(coroutine: Coroutine[Any, Any, R]) -> R:
    """Run a coroutine that waits for nothing but blocking calls."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return cast("R", done.value)
    raise AssertionError("it waits for an event loop")


class Awaited:
    """A SessionGate with the methods of an asynchronous one: awaiting them blocks the thread."""

    def __init__(self, gate: SessionGate) -> None:
        self.blocking = gate

    def __getattr__(self, name: str) -> object:
        method = getattr(self.blocking, name)

        async def call(*args: object, **options: object) -> object:
            return method(*args, **options)

        return call


class Crowd:
    """Many threads with SessionGates or many tasks with AsyncSessionGates, on one store."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.look = backend.client()
        self._flavour = backend.flavour

    def gate(self, sign_key: Key = SIGN_KEY, **options: object) -> AsyncSessionGate:
        """A gate with connections of its own."""
        client = self.backend.gates_client(socket_timeout=SECONDS / 3)
        gate = self._flavour.gate(client, sign_key, **options)
        if self._flavour.is_async:
            return cast("AsyncSessionGate", gate.awaited)  # type: ignore[attr-defined]  # see Blocking
        return cast("AsyncSessionGate", Awaited(gate))

    def gates(self, count: int, **options: object) -> list[AsyncSessionGate]:
        return [self.gate(SIGN_KEY, **options) for _ in range(count)]

    def do(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Run one."""
        return self.run([coroutine])[0]

    def run(self, coroutines: Sequence[Coroutine[Any, Any, R]]) -> list[R]:
        """Run all at once, each in a thread or a task of its own."""
        if self._flavour.is_async:
            return self._flavour.runner.run(self._together(coroutines))
        if len(coroutines) == 1:
            return [at_once(coroutines[0])]
        barrier = Barrier(len(coroutines))

        def begin(coroutine: Coroutine[Any, Any, R]) -> R:
            barrier.wait(SECONDS)
            return at_once(coroutine)

        with ThreadPoolExecutor(len(coroutines)) as threads:
            return list(threads.map(begin, coroutines, timeout=SECONDS))

    async def _together(self, coroutines: Sequence[Coroutine[Any, Any, R]]) -> list[R]:
        async with asyncio.timeout(SECONDS):
            return list(await asyncio.gather(*coroutines))

    async def pause(self, seconds: float = 0) -> None:
        """Let the others go first."""
        if self._flavour.is_async:
            await asyncio.sleep(seconds)
        else:
            time.sleep(seconds)  # noqa: ASYNC251  # it blocks this thread, as it shall

    async def some_time(self) -> None:
        """Wait, so that the others are somewhere in the middle."""
        await self.pause(dice.random() * 0.004)

    def ids_of(self, subject: str) -> list[str]:
        return [info.id for info in self.do(self.gate().sessions(subject))]

    def ids_held(self) -> set[str]:
        """The ids of all sessions that Redis holds, and not only the traces of."""
        keys = self.look.scan_iter("sg-session:{*")
        return {key.decode()[-17:-1] for key in keys if self.look.hexists(key, "fp")}

    def started_apart(self, gate: AsyncSessionGate, *args: Any, **options: Any) -> str:
        """A session for 300 seconds, in another slot than Alice's."""
        return apart(
            "alice",
            lambda: self.do(gate.start(300, *args, **options)),
            lambda token: self.do(gate.end(token)),
        )

    def index_server(self) -> Redis:
        """A client of the server where Alice's sessions are."""
        if self.backend.cluster:
            return self.backend.cluster.server_of(slot_of(ALICE)).client()
        return self.look


@pytest.fixture(params=["server", "cluster"] if CLUSTERED else [])
def where(request: pytest.FixtureRequest) -> str:
    place: str = request.param
    return place


@pytest.fixture(params=["threads", "tasks"])
def crowd(request: pytest.FixtureRequest, where: str) -> Iterator[Crowd]:
    """Threads and tasks, on one server and on a cluster, both empty."""
    flavour = Flavour("async" if request.param == "tasks" else "sync")
    cluster = running_cluster() if where == "cluster" else None
    server = cluster.servers[0] if cluster else running(CLUSTERED)
    crowd = Crowd(Backend(server, flavour, cluster))
    crowd.look.flushall()
    yield crowd
    immortal = [key for key in crowd.look.scan_iter() if crowd.look.pttl(key) == -1]
    crowd.look.close()
    flavour.close()
    assert not immortal


def session_id(token: str) -> str:
    return token[3:19]


def check_register(writes: Sequence[Call[int]], reads: Sequence[Call[int]]) -> None:
    """The reads are what one writer's numbers 1, 2, 3 ... allow: none lost, none early."""
    for read in reads:
        written = [write.result for write in writes if write.precedes(read)]
        begun = [write.result for write in writes if write.begun < read.returned]
        assert max(written, default=0) <= read.result <= max(begun, default=0)


# Renewal


@pytest.mark.parametrize(
    "rings", [[[NEW]], [[NEW, OLD], [OLD, NEW]]], ids=["one ring", "two rings"]
)
def test_renewals_of_one_token_get_one_successor(crowd: Crowd, rings: list[list[str]]) -> None:
    """Callers that renew one token, and what they get, go along one chain of tokens."""
    gates = [crowd.gate(rings[number % len(rings)]) for number in range(6)]  # type: ignore[arg-type]  # a list of str is one of str or bytes
    token = crowd.do(gates[0].start(300, {"user": "x"}, subject="alice"))

    async def walk(gate: AsyncSessionGate, first: str) -> list[str]:
        walk = [first]
        # Whoever is left behind finds its successor as long as it is remembered.
        for _ in range(PREDECESSORS - 4):
            walk.append(await gate.renew(walk[-1]))
        return walk

    for turn in range(5):
        chains = crowd.run([walk(gate, token) for gate in gates])
        assert all(chain == chains[0] for chain in chains)
        assert len(set(chains[0])) == len(chains[0])
        token = chains[0][-1]
        assert token.startswith(f"v2.{session_id(token)}.{(turn + 1) * (PREDECESSORS - 4)}.")
        for gate in gates[:2]:
            for good in chains[0]:
                assert crowd.do(gate.pget(good, "user")) == b"x"
            infos = crowd.do(gate.sessions("alice"))
            assert [info.id for info in infos] == [session_id(token)]


def test_renewals_without_a_grace(crowd: Crowd) -> None:
    """Of callers that renew one token without a grace exactly one gets a successor."""
    gates = crowd.gates(6)
    token = crowd.do(gates[0].start(300, {"user": "x"}))
    for _ in range(20):
        renewals = [seen(gate.renew(token, grace=0), SessionNotFoundError) for gate in gates]
        calls = crowd.run(renewals)
        (successor,) = [call.result for call in calls if call.ok]
        with pytest.raises(SessionNotFoundError):
            crowd.do(gates[0].pget(token, "user"))
        token = successor
        assert crowd.do(gates[0].pget(token, "user")) == b"x"


def test_writes_during_renewals(crowd: Crowd) -> None:
    """While its token is renewed, a session takes every write, through a token in grace as well."""
    gates = crowd.gates(4)
    names = ["a", "b", "c"]
    writes: dict[str, list[Call[int]]] = {name: [] for name in names}
    reads: dict[str, list[Call[int]]] = {name: [] for name in names}
    token = crowd.do(gates[0].start(300, dict.fromkeys(names, "0")))
    rounds, renewers, renewals, stores = 4, 2, PREDECESSORS // 2 - 1, 15
    known = [token]

    async def renew(gate: AsyncSessionGate) -> None:
        for _ in range(renewals):
            known.append(await gate.renew(known[-1]))
            await crowd.some_time()

    async def write(gate: AsyncSessionGate, name: str) -> None:
        for _ in range(stores):
            number = len(writes[name]) + 1
            call = await seen(gate.pset(dice.choice(known), name, f"{number}"))
            writes[name].append(Call(call.begun, call.returned, number, None))
            await crowd.pause()

    async def read(gate: AsyncSessionGate) -> None:
        for _ in range(2 * stores):
            name = dice.choice(names)
            call = await seen(gate.pget(dice.choice(known), name))
            reads[name].append(Call(call.begun, call.returned, int(call.result), None))

    for _ in range(rounds):
        del known[:-1]
        actors = [renew(gate) for gate in gates[:renewers]]
        actors += [write(gate, name) for gate, name in zip(gates, names, strict=False)]
        actors += [read(gate) for gate in gates[:2]]
        crowd.run(actors)
    for name in names:
        check_register(writes[name], reads[name])
        assert int(crowd.do(gates[0].pget(known[-1], name))) == rounds * stores


def test_writes_during_a_sign_in(crowd: Crowd) -> None:
    """No acknowledged write is lost when a session moves to a subject, and none comes after it.

    That holds between two slots of a cluster, too, unless the move is interrupted.
    """
    gates = crowd.gates(4)
    names = ["a", "b", "c"]
    crowd.do(gates[0].renew(crowd.do(gates[0].start(300)), subject="alice"))

    async def write(gate: AsyncSessionGate, token: str, name: str) -> list[Call[None]]:
        calls: list[Call[None]] = []
        while sum(not call.ok for call in calls) < 3:
            pset = gate.pset(token, name, f"{len(calls) + 1}")
            calls.append(await seen(pset, SessionNotFoundError))
            assert len(calls) < 5_000
        return calls

    async def count(gate: AsyncSessionGate, token: str) -> list[Call[None]]:
        calls: list[Call[None]] = []
        while not calls or calls[-1].ok:
            call = await seen(gate.pincr(token, "count"), SessionNotFoundError)
            calls.append(Call(call.begun, call.returned, None, call.error))
            assert len(calls) < 5_000
        return calls

    for _ in range(12):
        token = crowd.do(gates[0].start(300, {"kept": "x", **dict.fromkeys(names, "0")}))
        renewal: list[Call[str]] = []

        async def sign_in(token: str, renewal: list[Call[str]]) -> list[Call[None]]:
            await crowd.some_time()
            renewal.append(await seen(gates[3].renew(token, subject="alice")))
            return []

        actors = [write(gate, token, name) for gate, name in zip(gates, names, strict=False)]
        _, *histories = crowd.run([sign_in(token, renewal), *actors, count(gates[0], token)])
        held = crowd.do(gates[0].pall(renewal[0].result))
        assert held.pop("kept") == b"x"
        for name, calls in zip([*names, "count"], histories, strict=True):
            acknowledged = [call for call in calls if call.ok]
            assert calls[: len(acknowledged)] == acknowledged
            assert not any(renewal[0].precedes(call) for call in acknowledged)
            assert int(held.pop(name, b"0")) == len(acknowledged)
        assert not held
        assert session_id(renewal[0].result) in crowd.ids_of("alice")
    assert crowd.ids_held() == set(crowd.ids_of("alice"))


@pytest.mark.parametrize("max_sessions", [None, 1], ids=["any number", "one"])
@pytest.mark.parametrize("subjects", [["alice"], ["alice", "bob"]], ids=" and ".join)
def test_sign_ins_with_one_token(
    crowd: Crowd, subjects: list[str], max_sessions: int | None
) -> None:
    """Of callers that sign in with one token exactly one gets the session, the others nothing."""
    gates = crowd.gates(6, max_sessions=max_sessions)

    for _ in range(8):
        token = crowd.do(gates[0].start(300, {"cart": "[]"}))
        calls = crowd.run(
            [
                seen(
                    gate.renew(token, subject=subjects[number % len(subjects)]),
                    SessionNotFoundError,
                )
                for number, gate in enumerate(gates)
            ]
        )
        (renewed,) = [call.result for call in calls if call.ok]
        assert crowd.do(gates[0].pall(renewed)) == {"cart": b"[]"}
        listed = [one for subject in subjects for one in crowd.ids_of(subject)]
        assert listed == [session_id(renewed)]
        assert crowd.ids_held() == {session_id(renewed)}
        crowd.do(gates[0].end(renewed))


# Signing out everywhere


def test_starts_while_all_are_ended(crowd: Crowd) -> None:
    """What was started before end_all is dead when it returns, what comes meanwhile dead or listed.

    And each session is ended, and counted, once.
    """
    gates = crowd.gates(4)
    started: list[str] = []

    async def start(gate: AsyncSessionGate) -> int:
        for _ in range(50):
            token = await gate.start(300, {"user": "x"}, subject="alice")
            started.append(token)
        return 0

    async def end_all(gate: AsyncSessionGate) -> int:
        ended = 0
        checked = 0
        for _ in range(12):
            before = started[checked:]
            checked += len(before)
            ended += await gate.end_all("alice")
            calls = [await seen(gate.touch(token), SessionNotFoundError) for token in before]
            assert not any(call.ok for call in calls)
            await crowd.some_time()
        return ended

    ended = sum(crowd.run([*map(start, gates), *map(end_all, gates[:2])]))
    listed = crowd.ids_of("alice")
    assert ended + len(listed) == len(started) == 200
    assert crowd.ids_held() == set(listed)
    assert set(listed) <= set(map(session_id, started))


def test_no_session_escapes_by_a_renewal(crowd: Crowd) -> None:
    """A session that is renewed while its subject's are all ended is ended as well, once."""
    gates = crowd.gates(5)

    async def renew(gate: AsyncSessionGate, token: str, *, moves: bool) -> int:
        for _ in range(2_000):
            renewal = gate.renew(token, subject="alice") if moves else gate.renew(token, grace=0)
            call = await seen(renewal, SessionNotFoundError)
            if not call.ok:
                return 0
            token = call.result
        raise AssertionError("it escaped")

    async def end_all(gate: AsyncSessionGate) -> int:
        await crowd.some_time()
        return await gate.end_all("alice")

    for _ in range(8):
        tokens = [crowd.do(gates[0].start(300, subject="alice")) for _ in range(8)]
        renewers = [
            renew(gates[number % 4], token, moves=number % 4 > 0)
            for number, token in enumerate(tokens)
        ]
        assert sum(crowd.run([*renewers, end_all(gates[4])])) == len(tokens)
        assert crowd.ids_of("alice") == []
        assert crowd.ids_held() == set()


def test_sessions_that_are_listed_while_they_are_renewed(crowd: Crowd) -> None:
    """Each session of a subject is listed once, whatever ids renewals give it meanwhile."""
    gates = crowd.gates(4)
    tokens = [crowd.do(gates[0].start(300, subject="alice")) for _ in range(6)]
    created = [info.created_at for info in crowd.do(gates[0].sessions("alice"))]
    listings: list[list[SessionInfo]] = []

    async def renew(gate: AsyncSessionGate, token: str) -> None:
        for _ in range(40):
            token = await gate.renew(token, subject="alice")

    async def look(gate: AsyncSessionGate) -> None:
        for _ in range(40):
            infos = await gate.sessions("alice")
            listings.append(infos)

    renewers = [renew(gates[number % 3], token) for number, token in enumerate(tokens)]
    crowd.run([*renewers, look(gates[3]), look(gates[0])])
    for infos in listings:
        assert [info.created_at for info in infos] == created


def test_nothing_brings_an_ended_session_back(crowd: Crowd) -> None:
    """After end returned every operation on the session finds nothing, and nothing is left."""
    gates = crowd.gates(4)

    def operations(gate: AsyncSessionGate, token: str) -> list[Callable[[], Awaitable[object]]]:
        return [
            lambda: gate.pset(token, "a", "x"),
            lambda: gate.pset(token, "b", "x", ttl=100),
            lambda: gate.pset_many(token, {"c": "x", "d": "x"}),
            lambda: gate.pincr(token, "e"),
            lambda: gate.touch(token),
            lambda: gate.expire(token, 200),
            lambda: gate.renew(token),
            lambda: gate.pset(token, "f", "x", if_match="x"),
        ]

    async def use(gate: AsyncSessionGate, token: str, first: int) -> list[Call[object]]:
        calls: list[Call[object]] = []
        todo = operations(gate, token)
        while sum(not call.ok for call in calls) < 2 * len(todo):
            operation = todo[(first + len(calls)) % len(todo)]
            call = await seen(operation(), SessionNotFoundError, PayloadConflictError)
            if not isinstance(call.error, PayloadConflictError):
                calls.append(call)
            else:
                first += 1
            assert len(calls) < 5_000
        return calls

    async def end(gate: AsyncSessionGate, token: str) -> list[Call[object]]:
        await crowd.some_time()
        return [await seen(gate.end(token))]

    for turn in range(8):
        subject = "alice" if turn % 2 else None
        token = crowd.do(gates[0].start(300, {"a": "x"}, subject=subject, idle_timeout=60))
        users = [use(gate, token, 3 * number) for number, gate in enumerate(gates)]
        *histories, (ending,) = crowd.run([*users, end(gates[0], token)])
        for calls in histories:
            finding = [call.ok for call in calls]
            assert finding == sorted(finding, reverse=True)
            assert not any(call.ok and ending.precedes(call) for call in calls)
        assert crowd.ids_held() == set()
        assert crowd.ids_of("alice") == []


# Payloads


def test_one_of_many_pops_a_payload(crowd: Crowd) -> None:
    """Of callers that pop one payload at once exactly one gets it."""
    gates = crowd.gates(4)
    names = [f"code {number}" for number in range(40)]
    token = crowd.do(gates[0].start(300, {name: f"data of {name}" for name in names}))
    for name in names[::2]:
        crowd.do(gates[0].pset(token, name, f"data of {name}", ttl=100))

    async def pop(gate: AsyncSessionGate) -> list[bytes]:
        calls = [await seen(gate.ppop(token, name), PayloadNotFoundError) for name in names]
        return [call.result for call in calls if call.ok]

    popped = crowd.run([pop(gate) for gate in gates * 2])
    assert sorted(joined(popped)) == sorted(f"data of {name}".encode() for name in names)
    assert crowd.do(gates[0].pall(token)) == {}


def test_what_is_stored_if_absent_is_popped_once(crowd: Crowd) -> None:
    """Through a slot for one payload each stored value goes to one caller, after it was stored."""
    gates = crowd.gates(4)
    token = crowd.do(gates[0].start(300))
    stored: dict[bytes, Call[None]] = {}
    popped: list[Call[bytes]] = []
    producing = [1, 2, 3, 4]

    async def produce(gate: AsyncSessionGate, number: int) -> None:
        for turn in range(40):
            data = f"{number}.{turn}"
            pset = gate.pset(token, "slot", data, if_absent=True, ttl=100 if turn % 2 else None)
            call = await seen(pset, PayloadConflictError)
            if call.ok:
                stored[data.encode()] = call
        producing.remove(number)

    async def consume(gate: AsyncSessionGate) -> None:
        while producing:
            call = await seen(gate.ppop(token, "slot"), PayloadNotFoundError)
            if call.ok:
                popped.append(call)

    producers = [produce(gate, number) for gate, number in zip(gates, list(producing), strict=True)]
    crowd.run([*producers, *map(consume, gates)])
    taken = [call.result for call in popped] + list(crowd.do(gates[0].pall(token)).values())
    assert Counter(taken) == Counter(list(stored))
    assert len(stored) > 4
    assert not any(call.precedes(stored[call.result]) for call in popped)
    # Two values are never in the slot at once: what was stored surely before and is taken surely
    # after another was stored cannot be.
    for data, call in stored.items():
        for pop in popped:
            other = stored[pop.result]
            assert pop.result == data or not (other.precedes(call) and call.precedes(pop))


def test_a_counter_by_compare_and_set(crowd: Crowd) -> None:
    """With if_match no update is lost: each value has exactly one successor."""
    gates = crowd.gates(4)
    token = crowd.do(gates[0].start(300, {"count": "0"}))

    async def count(gate: AsyncSessionGate) -> list[int]:
        won: list[int] = []
        for _ in range(60):
            before = await gate.pget(token, "count")
            after = b"%d" % (int(before) + 1)
            pset = gate.pset(token, "count", after, if_match=before)
            if (await seen(pset, PayloadConflictError)).ok:
                won.append(int(after))
        return won

    won = sorted(joined(crowd.run([count(gate) for gate in gates * 2])))
    assert won == list(range(1, len(won) + 1))
    assert len(won) >= 60
    assert int(crowd.do(gates[0].pget(token, "count"))) == len(won)


def test_a_counter_that_many_increment(crowd: Crowd) -> None:
    """A counter that many add to at once is exact, and tells each of them another number."""
    gates = crowd.gates(4)
    token = crowd.do(gates[0].start(300))
    crowd.do(gates[0].pset(token, "timed", "0", ttl=100))

    async def count(gate: AsyncSessionGate, name: str) -> list[Call[int]]:
        return [await seen(gate.pincr(token, name)) for _ in range(50)]

    async def add(gate: AsyncSessionGate, by: int) -> list[Call[int]]:
        return [await seen(gate.pincr(token, "sum", by)) for _ in range(50)]

    for name in ("count", "timed"):
        calls = joined(crowd.run([count(gate, name) for gate in gates * 2]))
        assert sorted(call.result for call in calls) == list(range(1, 401))
        for one in calls[::7]:
            assert all(one.result < other.result for other in calls if one.precedes(other))
        assert crowd.do(gates[0].pget(token, name)) == b"400"
    crowd.run([add(gate, by) for gate, by in zip(gates, (1, 10, -100, 2**40), strict=True)])
    assert int(crowd.do(gates[0].pget(token, "sum"))) == 50 * (1 + 10 - 100 + 2**40)


# The limit


LIMIT = 3


class Watch:
    """Looks again and again how many sessions Alice has, until all others are done."""

    def __init__(self, crowd: Crowd, gate: AsyncSessionGate, working: int) -> None:
        self._crowd = crowd
        self._gate = gate
        self._working = working
        self._done: list[None] = []
        self._server = crowd.index_server()
        self.most = 0

    def done(self) -> None:
        """One of the others is."""
        self._done.append(None)

    async def look(self, keys: str = "sg-session:{*") -> None:
        deadline = time.monotonic() + SECONDS
        while len(self._done) < self._working and time.monotonic() < deadline:
            infos = await self._gate.sessions("alice")
            # All of them were live at one moment, and so were all of these.
            held = self._server.keys(keys)
            self.most = max(self.most, len(infos), len(held))
            await self._crowd.pause()

    async def while_working(self, work: Coroutine[Any, Any, R]) -> R:
        try:
            return await work
        finally:
            self.done()


def test_starts_that_evict(crowd: Crowd) -> None:
    """However many start at once, a subject never has more than its limit, and the newest stay."""
    gates = crowd.gates(6, max_sessions=LIMIT)
    watch = Watch(crowd, gates[0], len(gates))

    async def start(gate: AsyncSessionGate) -> list[Call[str]]:
        return [await seen(gate.start(300, subject="alice")) for _ in range(25)]

    async def look() -> list[Call[str]]:
        await watch.look()
        return []

    starters = [watch.while_working(start(gate)) for gate in gates]
    calls = joined(crowd.run([*starters, look()]))
    listed = crowd.ids_of("alice")
    assert 1 <= watch.most <= LIMIT
    assert len(listed) == LIMIT
    assert crowd.ids_held() == set(listed)
    by_id = {session_id(call.result): call for call in calls}
    for survivor in listed:
        newer = [call for call in calls if by_id[survivor].precedes(call)]
        assert len(newer) < LIMIT


def test_sign_ins_that_evict(crowd: Crowd) -> None:
    """Sessions that join a subject by signing in keep its limit as those that start do.

    None is evicted before its caller has the token.
    """
    gates = crowd.gates(4, max_sessions=LIMIT)
    watch = Watch(crowd, gates[0], len(gates))

    async def sign_in(gate: AsyncSessionGate) -> None:
        for _ in range(12):
            token = await gate.start(300, {"cart": "[]"}, idle_timeout=100)
            await gate.renew(token, subject="alice")

    # Before they signed in they were nobody's, and are not counted.
    crowd.run([*(watch.while_working(sign_in(gate)) for gate in gates), watch.look(keys="none")])
    assert 1 <= watch.most <= LIMIT
    listed = crowd.ids_of("alice")
    assert len(listed) == LIMIT
    assert crowd.ids_held() == set(listed)


def test_starts_that_are_rejected(crowd: Crowd) -> None:
    """Of starts at once exactly as many succeed as there are places."""
    gates = crowd.gates(6, max_sessions=LIMIT, on_overflow="reject")
    for turn in range(10):
        starts = [
            seen(gate.start(300, subject="alice"), TooManySessionsError) for gate in gates * 2
        ]
        started = [call.result for call in crowd.run(starts) if call.ok]
        free = LIMIT if turn == 0 else 2
        assert len(started) == free
        listed = crowd.ids_of("alice")
        assert len(listed) == LIMIT
        assert crowd.ids_held() == set(listed)
        # Those that ended free their places, one way and the other.
        crowd.do(gates[0].end(started[0]) if turn % 2 else gates[0].expire(started[0], 0))
        crowd.do(gates[0].end_one("alice", session_id(started[1])))


def test_places_that_are_freed_and_taken(crowd: Crowd) -> None:
    """At the limit a start is rejected only if all places may be taken, and never one too many."""
    gates = crowd.gates(6, max_sessions=LIMIT, on_overflow="reject")
    watch = Watch(crowd, gates[0], len(gates))
    lives: list[tuple[Call[str], Call[None]]] = []
    rejected: list[Call[str]] = []

    async def come_and_go(gate: AsyncSessionGate) -> None:
        for _ in range(25):
            start = await seen(gate.start(300, subject="alice"), TooManySessionsError)
            if start.ok:
                await crowd.some_time()
                lives.append((start, await seen(gate.end(start.result))))
            else:
                rejected.append(start)

    crowd.run([*(watch.while_working(come_and_go(gate)) for gate in gates), watch.look()])
    assert watch.most <= LIMIT
    assert len(lives) >= LIMIT
    for start, _ in lives:
        # When this one was there for sure, so many others were for sure.
        sure = [
            one
            for one, end in lives
            if one.returned <= start.returned and start.returned < end.begun
        ]
        assert len(sure) <= LIMIT
    for call in rejected:
        perhaps = [
            one for one, end in lives if one.begun < call.returned and call.begun < end.returned
        ]
        assert len(perhaps) >= LIMIT
    assert crowd.ids_of("alice") == []
    last = crowd.run([gate.start(300, subject="alice") for gate in gates[:LIMIT]])
    assert set(crowd.ids_of("alice")) == set(map(session_id, last))


@pytest.mark.parametrize("on_overflow", ["evict", "reject"])
def test_starts_at_the_limit_while_all_are_ended(crowd: Crowd, on_overflow: str) -> None:
    """At the limit, too, what was started before end_all is dead when it returns."""
    gates = crowd.gates(5, max_sessions=LIMIT, on_overflow=on_overflow)
    watch = Watch(crowd, gates[0], len(gates))
    started: list[str] = []

    async def start(gate: AsyncSessionGate) -> None:
        for _ in range(25):
            call = await seen(gate.start(300, subject="alice"), TooManySessionsError)
            if call.ok:
                started.append(call.result)
            else:
                assert on_overflow == "reject"
                await crowd.pause()

    async def end_all(gate: AsyncSessionGate) -> None:
        checked = 0
        for _ in range(15):
            before = started[checked:]
            checked += len(before)
            assert await gate.end_all("alice") <= LIMIT
            calls = [await seen(gate.touch(token), SessionNotFoundError) for token in before]
            assert not any(call.ok for call in calls)
            await crowd.pause()

    actors = [*map(start, gates[1:]), end_all(gates[0])]
    crowd.run([*map(watch.while_working, actors), watch.look()])
    assert watch.most <= LIMIT
    listed = crowd.ids_of("alice")
    assert crowd.ids_held() == set(listed)
    assert crowd.do(gates[0].end_all("alice")) == len(listed)
    last = crowd.run([gate.start(300, subject="alice") for gate in gates[:LIMIT]])
    assert set(crowd.ids_of("alice")) == set(map(session_id, last))


# A sign-in that is interrupted


class CrashError(Exception):
    """The process is no more."""


Hook = Callable[[AnyCommand, Callable[[], Awaitable[Answer]]], Awaitable[Answer]]


class Hooked:
    """A channel whose commands go through a hook."""

    def __init__(self, channel: Any, hook: Hook) -> None:
        self._channel = channel
        self._hook = hook

    def ask(self, command: AnyCommand, due: float) -> Answer:
        async def asked() -> Answer:
            answer: Answer = self._channel.ask(command, due)
            return answer

        return at_once(self._hook(command, asked))  # type: ignore[arg-type]  # it is a coroutine

    def close(self) -> Any:
        """Whatever its own says, which is awaitable if it is asynchronous."""
        return self._channel.close()


class AsyncHooked(Hooked):
    """The same, awaited."""

    async def ask(self, command: AnyCommand, due: float) -> Answer:  # type: ignore[override]  # as the gates differ
        async def asked() -> Answer:
            answer: Answer = await self._channel.ask(command, due)
            return answer

        return await self._hook(command, asked)


def hook_into(gate: AsyncSessionGate, hook: Hook) -> None:
    if isinstance(gate, Awaited):
        gate.blocking._channel = Hooked(gate.blocking._channel, hook)
    else:
        gate._channel = AsyncHooked(gate._channel, hook)  # type: ignore[assignment]  # it has all that is used


@dataclass
class SignIn:
    """A session that signs in, with a writer between the steps, and how far it comes."""

    crowd: Crowd
    gate: AsyncSessionGate
    other: AsyncSessionGate
    writes: bool
    old: str
    step: int
    how: str
    steps: list[str] = field(default_factory=list)
    stored: int = 0

    async def hook(self, command: AnyCommand, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        self.steps.append(command.script.name)
        if self.writes:
            pset = self.other.pset(self.old, "count", f"{self.stored + 1}")
            self.stored += (await seen(pset, SessionNotFoundError)).ok
        at = len(self.steps) - self.step
        if (self.how == "the command is lost" and at == 0) or (
            self.how == "the connection is lost" and at > 0
        ):
            return LostError("lost")
        answer = await ask()
        if self.how == "the process ends" and at == 0:
            raise CrashError
        if self.how in ("the reply is lost", "the connection is lost") and at == 0:
            return LostError("lost")
        return answer

    def run(self) -> str | None:
        """The new token, if there is one."""
        hook_into(self.gate, self.hook)
        try:
            return self.crowd.do(self.gate.renew(self.old, subject="alice"))
        except (CrashError, LostError):
            return None


@pytest.mark.parametrize("where", ["cluster"] if CLUSTERED else [])
@pytest.mark.parametrize("writes", [False, True], ids=["idle", "written"])
@pytest.mark.parametrize("limited", [False, True], ids=["any number", "one"])
@pytest.mark.parametrize(
    "how",
    ["the process ends", "the command is lost", "the reply is lost", "the connection is lost"],
)
def test_a_sign_in_that_is_interrupted(crowd: Crowd, how: str, limited: bool, writes: bool) -> None:
    """A sign-in across slots that stops after any step leaves the old session, or the new complete.

    The old one is as it was, with what was written meanwhile. The new one holds at least what was
    acknowledged before the call. After a success the new one alone is there, and holds everything.
    At a limit of one it takes the place of another, which stays if the old one does. There the new
    one is pending until it does, and not told of.
    """
    look = crowd.gate()
    options: dict[str, object] = {"max_sessions": 1} if limited else {}
    walked: list[str] = []
    for step in range(1, 20):
        crowd.do(look.end_all("alice"))
        others = [crowd.do(look.start(300, subject="alice"))] if limited else []
        old = crowd.started_apart(look, {"cart": "[]", "count": "0"}, idle_timeout=100)
        crowd.do(look.pset(old, "code", "123", ttl=200))
        sign_in = SignIn(crowd, crowd.gate(SIGN_KEY, **options), look, writes, old, step, how)
        new = sign_in.run()
        if how == "the reply is lost":
            assert new or sign_in.steps[-1] == "import", "all others are sent again"
        infos = crowd.do(look.sessions("alice"))
        listed = [info for info in infos if info.id not in map(session_id, others)]
        hidden = crowd.ids_held() - {info.id for info in infos} - {session_id(old)}
        everything = {"cart": b"[]", "count": b"%d" % sign_in.stored, "code": b"123"}
        kept = crowd.do(seen(look.pall(old), SessionNotFoundError))
        if new:
            assert not kept.ok
            assert not hidden
            assert [info.id for info in infos] == [session_id(new)]
            assert crowd.do(look.pall(new)) == everything
        elif kept.ok:
            assert kept.result == everything
            assert len(infos) == len(listed) + len(others)
            info = crowd.do(look.info(old))
            assert (info.subject, info.generation, info.idle_timeout) == (None, 0, 100)
            assert_ends_after(info, 300)
            # And whoever tries again succeeds.
            assert crowd.do(look.pall(crowd.do(look.renew(old, subject="alice")))) == everything
        else:
            assert len(listed) + len(hidden) == 1
        if not limited:
            assert not hidden
        for its_id in {info.id for info in listed} | hidden:
            its_token = ring_of(look).sign(its_id, 1)[0]
            info = crowd.do(look.info(its_token))
            held = crowd.do(look.pall(its_token))
            assert int(held.pop("count")) <= sign_in.stored
            assert held == {"cart": b"[]", "code": b"123"}
            assert (info.subject, info.generation, info.idle_timeout) == ("alice", 1, 100)
            assert_ends_after(info, 300)
            assert info.seconds_left > 90
        walked = sign_in.steps
        if len(walked) < step:
            assert new
            break
    expected = ["enroll", "export", "enroll", "export", *(["import"] if writes else [])]
    assert walked == expected + ["enroll", "enroll"] * limited


def assert_ends_after(info: SessionInfo, ttl: int) -> None:
    """The end did not move, but for the time that the session was under way."""
    lasts = (info.expires_at - info.created_at).total_seconds()
    assert ttl - 0.01 <= lasts < ttl + 2


def ring_of(gate: AsyncSessionGate) -> SignKeyRing:
    return (gate.blocking if isinstance(gate, Awaited) else gate)._commands._ring
