"""Redis Sentinel: every gate follows the primary. And `min_replicas`: how many have a write."""

import asyncio
import builtins
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.exceptions import ConnectionError, TimeoutError
from redis.sentinel import Sentinel

from sessiongate import (
    SessionGate,
    SessionNotFoundError,
    UnderReplicatedError,
)

from . import privileges
from .conftest import _BINARIES, CLUSTERED, FLAVOURS, AnyClient, Blocking, Flavour
from .proxy import Proxy
from .sentinels import NAME, Sentinels, frozen
from .servers import Server, free_port

if TYPE_CHECKING:
    from sessiongate.lines import Lines

BACK = 15.0  # seconds after which every gate has found the new primary
NOTICED = 2.0  # after which it has noticed that a living primary is none any more
LATE = 0.5  # how much longer than its timeout a call may take: a turn of a busy machine
SHORT = 0.5  # a timeout that is expected to be used up, most of it

_running: dict[str, Sentinels] = {}


def running(name: str, down_after: float) -> Sentinels:
    """The module's servers of that kind, started at their first use, whole again at each other."""
    key = f"{name} {down_after}"
    if key not in _running:
        _running[key] = Sentinels(_BINARIES[name], down_after=down_after)
    _running[key].mend()
    return _running[key].emptied()


@pytest.fixture(scope="module", autouse=True)
def _gone_with_the_module() -> Iterator[None]:
    yield
    while _running:
        _running.popitem()[1].close()


@pytest.fixture(params=list(_BINARIES))
def sentinels(request: pytest.FixtureRequest) -> Sentinels:
    """Servers under sentinels, of every kind, empty, whose primary stays what it is."""
    if "flavour" in request.fixturenames:
        logs_in = privileges.has_users(_BINARIES[request.param])
        request.getfixturevalue("flavour").logs_in = logs_in
    return running(request.param, 60)


@pytest.fixture
def failing() -> Sentinels:
    """Servers of one kind, for tests that let them fail, which takes its time."""
    return running(CLUSTERED, 2)


def sentinel_client(flavour: Flavour, sentinels: Sentinels, **options: object) -> AnyClient:
    """A client as an application has it that asks the sentinels."""
    kind = AsyncSentinel if flavour.is_async else Sentinel
    asking = kind(sentinels.addresses, sentinel_kwargs={"protocol": 2, "socket_timeout": 0.5})
    login = flavour.login(options)
    client: AnyClient = asking.master_for(NAME, protocol=2, **login, **options)  # type: ignore[arg-type]  # options are redis-py's own
    for one in (client, *asking.sentinels):
        flavour.closes(one)
    return client


def gate_to(flavour: Flavour, sentinels: Sentinels, how: str, **options: Any) -> SessionGate:
    """A gate that was given a URL, or a client."""
    if how == "url":
        return flavour.gate_from_url(sentinels.url, **options)
    return flavour.gate(sentinel_client(flavour, sentinels), **options)


HOW = ["url", "client"]
how = pytest.mark.parametrize("how", HOW)


@contextmanager
def gates_of_all_kinds(sentinels: Sentinels, **options: Any) -> Iterator[list[SessionGate]]:
    """Gates of every flavour from a URL and from a client, each on an event loop of its own."""
    with ExitStack() as stack:
        gates = []
        for name in FLAVOURS:
            for kind in HOW:
                flavour = Flavour(name)
                stack.callback(flavour.close)
                gates.append(gate_to(flavour, sentinels, kind, **options))
        yield gates


def use_at_once(gate: SessionGate, count: int) -> None:
    """Have so many calls under way at once, so that the gate has connections for them."""
    if isinstance(gate, Blocking):

        async def starts() -> None:
            await asyncio.gather(*(gate.awaited.start(300) for _ in range(count)))

        gate._runner.run(starts())
        return
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(gate.start, 300) for _ in range(count)]:
            future.result()


def key_of(gate: SessionGate, token: str) -> str:
    return f"sg-session:{{{gate.verify(token)}}}"


def use_everything(gate: SessionGate) -> None:
    """Each operation once, and what it does."""
    token = gate.start(300, {"user": "x", "cart": "y"}, subject="alice", idle_timeout=100)
    gate.touch(token)
    gate.pset(token, "user", "z")
    assert gate.pget(token, "user") == b"z"
    gate.pset_many(token, {"a": "1", "b": "2"})
    assert gate.pget_many(token, ["a", "b"]) == {"a": b"1", "b": b"2"}
    gate.pset(token, "c", "3", if_absent=True)
    gate.pdel(token, "c")
    assert gate.ppop(token, "b") == b"2"
    assert gate.pincr(token, "a", 4) == 5
    assert gate.pall(token) == {"user": b"z", "cart": b"y", "a": b"5"}
    renewed = gate.renew(token)
    gate.expire(renewed, 200)
    assert gate.info(renewed).generation == 1
    signed_in = gate.renew(renewed, subject="bob")
    assert [one.id for one in gate.sessions("bob")] == [gate.verify(signed_in)]
    with pytest.raises(SessionNotFoundError):
        gate.pget(renewed, "user")
    gate.end_one("bob", gate.verify(signed_in))
    kept, other = gate.start(300, subject="bob"), gate.start(300, subject="bob")
    assert gate.end_all("bob", keep=kept) == 1
    with pytest.raises(SessionNotFoundError):
        gate.touch(other)
    gate.end(kept)
    assert gate.sessions("bob") == []


@how
def test_every_operation(flavour: Flavour, sentinels: Sentinels, how: str) -> None:
    """A gate that asks sentinels does everything that one on a single server does."""
    use_everything(gate_to(flavour, sentinels, how))


# Failovers.


def fail(sentinels: Sentinels, fault: str) -> None:
    """Let the primary fail, and wait until the sentinels agree on another one."""
    old = sentinels.primary()
    if fault == "failover":
        sentinels.failover()
        return
    if fault == "kill":
        old.kill()
    else:
        old.pause()
    sentinels.successor(old)


def revive(old: Server, fault: str) -> None:
    """Let a primary come back that failed so: for ten seconds it takes itself for the primary."""
    if fault == "kill":
        old.start()
    elif fault == "stop":
        old.resume()


def served_by_another(sentinels: Sentinels, gate: SessionGate, old: Server) -> None:
    """Start sessions until one stands on another primary: no call is late, nor all of them."""
    timeout, deadline = 1.0, time.monotonic() + BACK
    while True:
        begun = time.monotonic()
        try:
            token = gate.start(300, {"user": "x"})
        except (ConnectionError, TimeoutError):
            token = ""
        assert time.monotonic() - begun < timeout + LATE
        if token and sentinels.primary() is not old and on_primary(sentinels, gate, token):
            return
        assert time.monotonic() < deadline
        time.sleep(0.02)


def on_primary(sentinels: Sentinels, gate: SessionGate, token: str) -> bool:
    """Whether a session stands on the primary that the sentinels name."""
    with sentinels.client() as client:
        return bool(client.exists(key_of(gate, token)))


FAULTS = ["kill", "stop", "failover"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failover_is_found(failing: Sentinels, fault: str) -> None:
    """Whatever became of the primary, calls succeed again soon, and on its successor.

    The old primary comes back as one, before the sentinels make a replica of it: nothing is asked
    of it.
    """
    old = failing.primary()
    with gates_of_all_kinds(failing, timeout=1.0) as gates:
        tokens = [gate.start(300, {"user": "before"}) for gate in gates]
        failing.wait()
        begun = time.monotonic()
        with ThreadPoolExecutor(len(gates)) as pool:
            # Calls go on all the time, as an application's do.
            found = [pool.submit(served_by_another, failing, gate, old) for gate in gates]
            fail(failing, fault)
            for future in found:
                future.result()
        assert time.monotonic() - begun < BACK
        revive(old, fault)
        for _ in range(5):
            for gate, token in zip(gates, tokens, strict=True):
                assert gate.pget(token, "user") == b"before"
                assert on_primary(failing, gate, gate.start(300))
            time.sleep(0.1)


@pytest.mark.parametrize("fault", ["stop", "failover"])
def test_a_stale_connection_serves_nothing(failing: Sentinels, fault: str) -> None:
    """A gate that was idle meanwhile leaves its connections to a primary that is none any more.

    That one is there and takes itself for the primary for ten seconds more; whatever was written
    to it is gone then.
    """
    old = failing.primary()
    with gates_of_all_kinds(failing) as gates:
        tokens = [gate.start(300, {"user": "before"}) for gate in gates]
        for gate in gates:
            use_at_once(gate, 3)
        failing.wait()
        fail(failing, fault)
        revive(old, fault)
        time.sleep(NOTICED)
        with failing.client() as client:
            for gate, token in zip(gates, tokens, strict=True):
                client.hset(key_of(gate, token), ":user", "written to the new one")
        for gate, token in zip(gates, tokens, strict=True):
            assert gate.pget(token, "user") == b"written to the new one"
            assert on_primary(failing, gate, gate.start(300))
        # It does take writes, still.
        with old.client() as client:
            client.set("x", "1")


@how
@pytest.mark.parametrize("state", ["dead", "frozen"])
def test_a_sentinel_that_does_not_answer(
    flavour: Flavour, failing: Sentinels, how: str, state: str
) -> None:
    """The first sentinel being dead or standing still, calls succeed in time by the others."""
    first = failing.sentinels[0]
    with ExitStack() as stack:
        if state == "frozen":
            stack.enter_context(frozen(first))
        else:
            stack.callback(first.start)
            first.kill()
        gate = gate_to(flavour, failing, how, timeout=4.0)
        begun = time.monotonic()
        gate.end(gate.start(300))
        assert time.monotonic() - begun < 2 * 4.0 + LATE


@how
def test_no_sentinel_answers(flavour: Flavour, failing: Sentinels, how: str) -> None:
    """With no sentinel to ask, a gate goes on with the primary it knows, and a new one fails."""
    gate = gate_to(flavour, failing, how, timeout=1.0)
    token = gate.start(300, {"user": "x"})
    with frozen(*failing.sentinels):
        fresh = gate_to(flavour, failing, how, timeout=SHORT)
        begun = time.monotonic()
        with pytest.raises((ConnectionError, TimeoutError)):
            fresh.start(300)
        assert time.monotonic() - begun < SHORT + LATE
        ends = time.monotonic() + NOTICED
        while time.monotonic() < ends:
            begun = time.monotonic()
            assert gate.pget(token, "user") == b"x"
            assert time.monotonic() - begun < 1.0 + LATE
            time.sleep(0.05)


# What replicas have.

Write = Callable[[SessionGate, str, int], object]

# Every operation that takes min_replicas, on a session of alice's.
WRITES: dict[str, Write] = {
    "start": lambda gate, _, count: gate.start(300, {"user": "x"}, min_replicas=count),
    "start of a subject": lambda gate, _, count: gate.start(300, subject="bob", min_replicas=count),
    "renew": lambda gate, token, count: gate.renew(token, min_replicas=count),
    "sign in": lambda gate, token, count: gate.renew(token, subject="eve", min_replicas=count),
    "expire": lambda gate, token, count: gate.expire(token, 200, min_replicas=count),
    "end": lambda gate, token, count: gate.end(token, min_replicas=count),
    "end_one": lambda gate, token, count: gate.end_one(
        "alice", gate.verify(token), min_replicas=count
    ),
    # The last: it ends the others.
    "end_all": lambda gate, token, count: gate.end_all("alice", keep=token, min_replicas=count),
}


def new_session(gate: SessionGate) -> str:
    """One of alice's, who has another one as well."""
    gate.start(300, subject="alice")
    return gate.start(300, {"user": "x"}, subject="alice")


def gate_on(flavour: Flavour, server: Server, **options: Any) -> SessionGate:
    return flavour.gate(flavour.client(server.port), **options)


def assert_under_replicated(call: Callable[[], object], had: int, wanted: int) -> object:
    """The call raises that so few replicas had it, in time, and this returns its result."""
    begun = time.monotonic()
    with pytest.raises(UnderReplicatedError) as raised:
        call()
    assert SHORT / 4 < time.monotonic() - begun < SHORT + LATE
    assert (raised.value.replicas, raised.value.min_replicas) == (had, wanted)
    return raised.value.result()


def test_enough_replicas(flavour: Flavour, sentinels: Sentinels) -> None:
    """A call that waits for replicas returns what it always returns, as soon as they have it."""
    for count in (1, 2):
        gate = gate_to(flavour, sentinels, "url")
        for name, write in WRITES.items():
            token = new_session(gate)
            begun = time.monotonic()
            result = write(gate, token, count)
            assert time.monotonic() - begun < 1
            if name in ("start", "sign in", "renew"):
                assert gate.pget(cast("str", result), "user") == b"x"
            if name == "end":
                assert (
                    sum(has_not(one, key_of(gate, token)) for one in sentinels.replicas()) >= count
                )


def has_not(server: Server, key: str) -> bool:
    with server.client() as client:
        return not client.exists(key)


def test_a_gate_waits_for_replicas(flavour: Flavour, sentinels: Sentinels) -> None:
    """A gate with min_replicas does everything, and every write waits for them."""
    use_everything(gate_to(flavour, sentinels, "url", min_replicas=2))
    gate = gate_to(flavour, sentinels, "client", min_replicas=2, timeout=SHORT)
    token = gate.start(300, {"user": "x", "cart": "1", "a": "1", "b": "1"})
    with frozen(sentinels.replicas()[0]):
        for call, result in (
            (lambda: gate.pset(token, "user", "y"), None),
            (lambda: gate.pset(token, "new", "y", if_absent=True), None),
            (lambda: gate.pset_many(token, {"user": "z"}), None),
            (lambda: gate.pdel(token, "a"), None),
            (lambda: gate.ppop(token, "b"), b"1"),
            (lambda: gate.pincr(token, "cart"), 2),
        ):
            assert assert_under_replicated(call, 1, 2) == result
        # What only reads waits for nobody, and a call may ask for fewer.
        assert gate.pget(token, "user") == b"z"
        gate.expire(token, 200, min_replicas=1)
        gate.end(token, min_replicas=0)


@pytest.mark.parametrize("live", [0, 1])
def test_frozen_replicas(flavour: Flavour, sentinels: Sentinels, live: int) -> None:
    """If too few replicas have it in time, the error says how many had, and the write stands."""
    gate = gate_to(flavour, sentinels, "url", timeout=SHORT)
    sessions = {name: new_session(gate) for name in WRITES}
    with frozen(*sentinels.replicas()[live:]):
        for name, write in WRITES.items():
            token, of_alice = sessions[name], len(gate.sessions("alice"))
            call = lambda: write(gate, token, live + 1)  # noqa: B023, E731  # it is over within this turn
            result = assert_under_replicated(call, live, live + 1)
            if name in ("start", "sign in", "renew"):
                assert gate.pget(cast("str", result), "user") == b"x"
            elif name == "expire":
                assert gate.info(token).seconds_left <= 200
            elif name == "end_all":
                assert result == of_alice - 1
            elif name in ("end", "end_one"):
                assert result is None
                with pytest.raises(SessionNotFoundError):
                    gate.touch(token)
            if live:
                # As many as there are.
                other = new_session(gate)
                begun = time.monotonic()
                gate.end(other, min_replicas=live)
                assert time.monotonic() - begun < SHORT


def test_more_replicas_than_there_are(flavour: Flavour, sentinels: Sentinels) -> None:
    """The deadline ends the wait for replicas that do not exist."""
    gate = gate_to(flavour, sentinels, "url", timeout=SHORT)
    assert_under_replicated(lambda: gate.start(300, min_replicas=3), 2, 3)


def test_a_replica_that_catches_up(flavour: Flavour, sentinels: Sentinels) -> None:
    """A call that waits for replicas returns as soon as one catches up."""
    gate = gate_to(flavour, sentinels, "url", timeout=5.0)
    token = gate.start(300)
    with ThreadPoolExecutor(1) as pool, frozen(*sentinels.replicas()):
        ending = pool.submit(gate.end, token, min_replicas=2)
        time.sleep(SHORT)
        assert not ending.done()
    ending.result()


def without_retries(flavour: Flavour, proxy: Proxy, **options: Any) -> SessionGate:
    return flavour.gate(flavour.client(proxy.port, retry=flavour.no_retry), **options)


# What is sent again after a lost reply, on a session of alice's.
REPEATED = ["start", "start of a subject", "renew", "sign in", "end"]


@pytest.mark.parametrize("name", REPEATED)
def test_a_repeated_write_is_waited_for(flavour: Flavour, sentinels: Sentinels, name: str) -> None:
    """A repetition that finds its work done, on another connection, waits for it all the same.

    WAIT itself would not: newer servers wait only for what the same connection wrote.
    """
    with Proxy(sentinels.primary().port) as proxy:
        gate = without_retries(flavour, proxy, timeout=SHORT)
        token = new_session(gate)
        WRITES[name](gate, new_session(gate), 2)  # the server knows the script now
        with frozen(*sentinels.replicas()):
            proxy.cut_replies = 1
            call = lambda: WRITES[name](gate, token, 1)  # noqa: E731  # a call
            result = assert_under_replicated(call, 0, 1)
            assert proxy.cut_replies == 0
            if name == "end":
                with pytest.raises(SessionNotFoundError):
                    gate.touch(token)
            elif name != "start of a subject":
                assert gate.pget(cast("str", result), "user") == b"x"
        patient = without_retries(flavour, proxy)
        token = new_session(patient)
        proxy.cut_replies = 1
        WRITES[name](patient, token, 2)
        assert proxy.cut_replies == 0


def test_what_another_wrote_is_waited_for(flavour: Flavour, sentinels: Sentinels) -> None:
    """A renewal that finds a successor there waits until replicas have that one."""
    gate = gate_to(flavour, sentinels, "url", timeout=SHORT)
    other = gate_to(flavour, sentinels, "url")
    token = gate.start(300)
    gate.renew(gate.start(300))  # the server knows the script now
    with frozen(*sentinels.replicas()):
        successor = other.renew(token)
        assert assert_under_replicated(lambda: gate.renew(token, min_replicas=1), 0, 1) == successor


def test_a_wait_holds_up_nobody_else(sentinels: Sentinels) -> None:
    """While one task waits for a replica that stands still, the others' calls go on."""
    flavour = Flavour("async")
    flavour.logs_in = privileges.has_users(sentinels.binary)
    gate = cast("Blocking", gate_to(flavour, sentinels, "url", timeout=2.0)).awaited

    async def race() -> None:
        token = await gate.start(300, {"user": "x"})
        ending = [
            asyncio.create_task(gate.end(await gate.start(300), min_replicas=1)) for _ in range(3)
        ]
        begun = time.monotonic()
        for _ in range(20):
            answers = await asyncio.gather(*(gate.pget(token, "user") for _ in range(10)))
            assert answers == [b"x"] * 10
            await gate.pset(token, "user", "x")
        assert time.monotonic() - begun < 1.2
        assert not any(task.done() for task in ending)
        # Nor do they hold up each other.
        outcomes = await asyncio.gather(*ending, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [UnderReplicatedError] * 3
        assert time.monotonic() - begun < 2.0 + LATE

    try:
        with frozen(*sentinels.replicas()):
            flavour.runner.run(race())
    finally:
        flavour.close()


def test_a_wait_that_is_cancelled_holds_up_nobody(sentinels: Sentinels) -> None:
    """When a task is cancelled that waits for a replica, the next one waits for its own alone."""
    flavour = Flavour("async")
    flavour.logs_in = privileges.has_users(sentinels.binary)
    options: dict[str, object] = {"timeout": 1.0, "min_replicas": 1}
    gate = cast("Blocking", gate_to(flavour, sentinels, "url", **options)).awaited

    async def race() -> None:
        token = await gate.start(300)
        with frozen(*sentinels.replicas()):
            with pytest.raises(builtins.TimeoutError):
                await asyncio.wait_for(gate.pset(token, "user", "x"), 0.3)
            with pytest.raises(UnderReplicatedError):
                await gate.pset(token, "user", "y")
        begun = time.monotonic()
        assert await gate.pget(token, "user") == b"y"
        await gate.pset(token, "user", "z")
        assert time.monotonic() - begun < SHORT

    try:
        flavour.runner.run(race())
    finally:
        flavour.close()


def test_sentinels_that_are_down(flavour: Flavour) -> None:
    """The error names the sentinels that were asked, and shows nothing else of their clients."""
    port = free_port()
    url = f"redis+sentinel://127.0.0.1:{port}/mymaster?sentinel_password=secret"
    # Time for all tries: one that the deadline cuts short tells of that alone.
    gate = flavour.gate_from_url(url)
    with pytest.raises(ConnectionError, match=f"mymaster.*127.0.0.1:{port}") as caught:
        gate.sessions("alice")
    shown = "".join(traceback.format_exception(caught.value))
    assert "secret" not in shown
    assert "Connection(" not in shown


class Interrupt(BaseException):
    """What a signal's handler raises."""


class Interrupted:
    """A lock, and a signal that comes in the very moment in which it was acquired."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self.release = lock.release

    def acquire(self, **options: Any) -> bool:
        self._lock.acquire(**options)
        raise Interrupt


def test_a_signal_leaves_no_lock_behind(sentinels: Sentinels) -> None:
    """Whoever is interrupted while it asks for the primary, others ask all the same."""
    flavour = Flavour("sync")
    flavour.logs_in = privileges.has_users(sentinels.binary)
    gate = gate_to(flavour, sentinels, "url")
    token = gate.start(300)
    lines = cast("Lines", gate._channel)
    primary = lines._primary
    assert primary is not None
    lock = primary._lock
    primary._lock = cast("Any", Interrupted(lock))
    primary._looked = 0.0  # what is known is old
    with pytest.raises(Interrupt):
        gate.touch(token)
    with ThreadPoolExecutor(1) as pool:  # another thread: this one could acquire it twice
        assert pool.submit(lock.acquire, timeout=0).result()
    flavour.close()


def test_a_demoted_primary_acknowledges_nothing(flavour: Flavour, failing: Sentinels) -> None:
    """A write that is thrown away, its server being a primary no more, is on no replica."""
    gate = gate_on(flavour, old := failing.primary(), timeout=SHORT)
    gate.end(gate.start(300), min_replicas=2)
    failing.failover()
    failing.wait(1)
    assert_under_replicated(lambda: gate.start(300, min_replicas=1), 0, 1)
    failing.mend()
    assert failing.primary() is not old
