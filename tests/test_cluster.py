"""Redis Cluster: every session is found where it is, also while slots and primaries move."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import pytest
import redis.asyncio
from redis import Redis, RedisCluster
from redis.cluster import LoadBalancingStrategy
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterCrossSlotError,
    ClusterDownError,
    ConnectionError,
    MaxConnectionsError,
    MovedError,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

from sessiongate import (
    AsyncSessionGate,
    ConfigurationError,
    GateClosedError,
    SessionGate,
    SessionNotFoundError,
    routes,
    scripts,
    wire,
)
from sessiongate.command import Command, NotRun
from sessiongate.keyspace import ID_ALPHABET, Keyspace, slot_of, system_random
from sessiongate.lane import Lane
from sessiongate.lines import ClusterLines
from sessiongate.routes import Journey, Routes
from sessiongate.timed import FOREVER

from .conftest import CLUSTERED, FLAVOURS, SIGN_KEY, Blocking, Flavour, awaited, new_cluster
from .servers import Cluster, Server, free_port
from .test_clients import survive_forks
from .test_replies import OPERATIONS, paused

if TYPE_CHECKING:
    from sessiongate.aio import _Clustered, _Server

pytestmark = pytest.mark.skipif(not CLUSTERED, reason="no server to make a cluster of")


@pytest.fixture(scope="module")
def moving() -> Iterator[Cluster]:
    """A cluster with replicas, whose slots and primaries a test may move."""
    with new_cluster(replicas=1) as cluster:
        yield cluster


@pytest.fixture
def cluster(moving: Cluster) -> Cluster:
    """The same, empty. A test leaves all its servers running."""
    moving.flushall()
    return moving


@pytest.fixture
def flavours() -> Iterator[list[Flavour]]:
    """All flavours at once, for what takes long to set up."""
    flavours = [Flavour(name) for name in FLAVOURS]
    yield flavours
    for flavour in flavours:
        flavour.close()


def client_of(gate: SessionGate) -> RedisCluster:
    """The gate's client; an asynchronous one, too, can be asked what it knows."""
    found = gate.awaited._client if isinstance(gate, Blocking) else gate._client
    return cast("RedisCluster", found)


def servers_of(gate: SessionGate) -> "dict[str, _Server]":
    """What an asynchronous gate has of each server, by name."""
    return cast("_Clustered", cast("Blocking", gate).awaited._channel)._servers


def port_of(gate: SessionGate, token: str) -> int:
    """Where the gate's client now takes a session to be."""
    node = client_of(gate).get_node_from_key(key_of(gate, token))
    return int(node.port)


def key_of(gate: SessionGate, token: str) -> str:
    return f"sg-session:{{{gate.verify(token)}}}"


def slot_of_token(gate: SessionGate, token: str) -> int:
    return slot_of(key_of(gate, token).encode())


def tokens_everywhere(gate: SessionGate, cluster: Cluster) -> dict[int, str]:
    """A session on each primary, by its port; its payload is its token."""
    tokens: dict[int, str] = {}
    while len(tokens) < 3:
        token = gate.start(300)
        tokens[cluster.server_of(slot_of_token(gate, token)).port] = token
    for token in tokens.values():
        gate.pset(token, "user", token)
    return tokens


def replicated(server: Server, tag: str) -> None:
    """Wait until the server's replica has all that it has."""
    with server.client() as client:
        client.set(f"{{{tag}}}", "waited for")
        assert client.wait(1, 5_000) == 1


def eventually(call: Callable[[], object], seconds: float = 10) -> object:
    """What a call comes to; until then it fails with an error of redis-py's and no other."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except RedisError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


class Migration:
    """A slot on its way from one primary to another, by the commands that a resharding uses."""

    def __init__(self, cluster: Cluster, slot: int) -> None:
        self._slot = slot
        self._cluster = cluster
        self._from = cluster.server_of(slot)
        self.to = next(server for server in cluster.primaries() if server is not self._from)
        self.source, self.target = self._from.client(), self.to.client()
        self._ids = [cluster.id_of(server) for server in (self._from, self.to)]
        self.target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", self._ids[0])
        self.source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", self._ids[1])

    def move(self, *keys: str) -> None:
        self.source.execute_command(
            "MIGRATE", "127.0.0.1", self.to.port, "", 0, 5_000, "KEYS", *keys
        )

    def finish(self) -> None:
        self.move(*cast("list[str]", self.source.cluster("getkeysinslot", str(self._slot), "9")))
        for client in (self.target, self.source):
            client.execute_command("CLUSTER SETSLOT", self._slot, "NODE", self._ids[1])
        self._cluster.wait_for(self._slot, self.to)


def test_sessions_of_all_slots(flavour: Flavour, cluster: Cluster) -> None:
    """Sessions of whatever slot are each on the server that serves it, and all operations work."""
    gate = flavour.gate(flavour.cluster_client(cluster))
    tokens = {gate.start(300, {"user": f"{n}"}): f"{n}".encode() for n in range(150)}
    for token, data in tokens.items():
        assert gate.pget(token, "user") == data
    assert all(server.client().dbsize() > 10 for server in cluster.primaries())
    for operation in OPERATIONS:
        for token in tokens_everywhere(gate, cluster).values():
            operation(gate, token)


@pytest.mark.parametrize("number", range(1, 6))
def test_a_slot_that_was_moved(flavour: Flavour, cluster: Cluster, number: int) -> None:
    """A session that moved to another server is found there by any operation, and remembered."""
    gate = flavour.gate(flavour.cluster_client(cluster))
    token = gate.start(300, {"user": "x"})
    migration = Migration(cluster, slot_of_token(gate, token))
    migration.finish()
    OPERATIONS[number](gate, token)
    if number < 5:
        gate.expire(token, 100)
    else:
        with pytest.raises(SessionNotFoundError):
            gate.expire(token, 100)
    # Nobody waits for the topology as long as servers send on what is not theirs.
    deadline = time.monotonic() + 5
    while port_of(gate, token) != migration.to.port:
        assert time.monotonic() < deadline
        flavour.runner.run(asyncio.sleep(0.02))
        with suppress(SessionNotFoundError):
            gate.expire(token, 100)


@pytest.mark.parametrize("number", range(1, 6))
def test_a_slot_that_is_moving(flavour: Flavour, cluster: Cluster, number: int) -> None:
    """In the middle of a migration sessions are found on either side, and new ones are opened."""
    gate = flavour.gate(flavour.cluster_client(cluster))
    token = gate.start(300, {"user": "x"})
    slot = slot_of_token(gate, token)
    session_id = Keyspace("sg", system_random).new_id_in(slot)
    drawn = iter([bytes(map(ID_ALPHABET.index, session_id.encode()))])
    rigged = flavour.gate(
        flavour.cluster_client(cluster),
        random=lambda n: next(drawn, system_random(n)).ljust(n, b"0"),
    )
    migration = Migration(cluster, slot)
    assert gate.pget(token, "user") == b"x"
    new = rigged.start(300, {"user": "new"})
    migration.move(key_of(gate, token))
    assert slot_of_token(rigged, new) != slot  # a slot that moves takes no new ones
    assert rigged.pget(new, "user") == b"new"
    OPERATIONS[number](gate, token)
    migration.finish()
    assert rigged.pget(new, "user") == b"new"


def with_two_keys(gate: SessionGate, token: str, other: str) -> "Command[bytes]":
    """A command that reads one session and names another of its slot."""
    command = gate._commands.pget(token, "user")
    return command._replace(keys=(*command.keys, key_of(gate, other).encode()))


def test_keys_on_both_sides(flavour: Flavour, cluster: Cluster) -> None:
    """What names sessions on both sides of a migration is sent again until they are on one."""
    gate = flavour.gate(flavour.cluster_client(cluster), timeout=1)
    token = gate.start(300, {"user": "x"})
    slot = slot_of_token(gate, token)
    session_id = Keyspace("sg", system_random).new_id_in(slot)
    other = gate._commands._ring.sign(session_id)[0]
    cluster.client().set(key_of(gate, other), "is there")
    migration = Migration(cluster, slot)
    migration.move(key_of(gate, other))
    command = with_two_keys(gate, token, other)
    began = time.monotonic()
    # Or a timeout, if the last try is under way by then.
    with pytest.raises((TryAgainError, TimeoutError)):
        gate._run(command)
    assert 0.5 < time.monotonic() - began < 1.5
    later = threading.Timer(0.2, migration.move, [key_of(gate, token)])
    later.start()
    assert gate._run(command) == b"x"
    later.join()
    migration.finish()
    assert gate._run(command) == b"x"


def test_keys_of_two_slots(flavour: Flavour, cluster: Cluster) -> None:
    """What names sessions of two slots gets redis-py's error, and is not sent again."""
    gate = flavour.gate(flavour.cluster_client(cluster))
    here, there = list(tokens_everywhere(gate, cluster).values())[:2]
    with pytest.raises(ClusterCrossSlotError):
        gate._run(with_two_keys(gate, here, there))


def test_a_server_that_died(flavours: list[Flavour], cluster: Cluster) -> None:
    """While a server is down its sessions are redis-py's errors, others work; then all do again."""
    # All of it takes less than the others need to replace it.
    gates = [flavour.gate(flavour.cluster_client(cluster), timeout=1) for flavour in flavours]
    tokens = tokens_everywhere(gates[0], cluster)
    victim = cluster.primaries()[0]
    lost = tokens.pop(victim.port)
    for gate in gates:  # they have connections
        assert gate.pget(lost, "user") == lost.encode()
    victim.kill()
    for gate in gates:
        for operation in (OPERATIONS[2], OPERATIONS[3]):
            with pytest.raises((ConnectionError, TimeoutError)):
                operation(gate, lost)
        for token in tokens.values():
            assert gate.pget(token, "user") == token.encode()
    victim.start()
    for gate in gates:
        with pytest.raises(SessionNotFoundError):
            eventually(lambda: gate.pget(lost, "user"))  # noqa: B023  # it is over within this turn
        for token in tokens_everywhere(gate, cluster).values():
            assert gate.pget(token, "user") == token.encode()
    cluster.wait()


def test_a_replica_that_took_over(flavours: list[Flavour], cluster: Cluster) -> None:
    """After the death of a primary its replica is found: the sessions are there, and go on."""
    gates = [flavour.gate(flavour.cluster_client(cluster)) for flavour in flavours]
    tokens = tokens_everywhere(gates[0], cluster)
    victim = cluster.primaries()[0]
    replica = cluster.replica_of(victim)
    token = tokens[victim.port]
    for gate in gates:
        gate.pset(token, "user", "x")
    replicated(victim, gates[0].verify(token))
    victim.kill()
    for gate in gates:
        with pytest.raises(ConnectionError):
            gate.pset(token, "user", "y")
    replica.client().execute_command("CLUSTER FAILOVER", "TAKEOVER")
    for gate in gates:
        assert eventually(lambda: gate.pget(token, "user")) == b"x"  # noqa: B023  # likewise
        gate.pset(token, "user", "x")
        assert port_of(gate, token) == replica.port
    victim.start()
    cluster.wait()


@pytest.mark.parametrize("strategy", [None, LoadBalancingStrategy.RANDOM_REPLICA], ids=str)
def test_a_primary_that_became_a_replica(
    flavour: Flavour, cluster: Cluster, strategy: LoadBalancingStrategy | None
) -> None:
    """A failover by hand is no error; the old primary is not read from, whatever the client reads.

    Not even if its connections were made to read from replicas.
    """
    gate = flavour.gate(flavour.cluster_client(cluster, load_balancing_strategy=strategy))
    token = gate.start(300, {"user": "x"})
    before = cluster.server_of(slot_of_token(gate, token))
    after = cluster.replica_of(before)
    replicated(before, gate.verify(token))
    after.client().execute_command("CLUSTER FAILOVER", "TAKEOVER")
    cluster.wait_for(slot_of_token(gate, token), after)
    assert gate.pget(token, "user") == b"x"
    gate.pset(token, "user", "y")
    # Nobody waits for the topology as long as servers send on what is not theirs.
    deadline = time.monotonic() + 5
    while port_of(gate, token) != after.port:
        assert time.monotonic() < deadline
        flavour.runner.run(asyncio.sleep(0.02))
        gate.pset(token, "user", "y")
    cluster.wait()


def test_a_server_that_forgot_the_scripts(flavour: Flavour, cluster: Cluster) -> None:
    """After SCRIPT FLUSH on one server every operation works there and everywhere."""
    gate = flavour.gate(flavour.cluster_client(cluster))
    for operation in OPERATIONS:
        for port, token in tokens_everywhere(gate, cluster).items():
            Redis(port=port, protocol=2).script_flush()
            operation(gate, token)


@pytest.mark.parametrize(("auto_pipeline", "count"), [(True, 1_000), (False, 90)])
async def test_many_tasks_over_many_servers(
    cluster: Cluster, auto_pipeline: bool, count: int
) -> None:
    """Many tasks at once each get what is theirs, while a slot moves away under them."""
    client = redis.asyncio.RedisCluster(host="127.0.0.1", port=cluster.port, protocol=2)
    async with AsyncSessionGate(client, sign_key=SIGN_KEY, auto_pipeline=auto_pipeline) as gate:
        tokens = [await gate.start(300, {"user": "0"}) for _ in range(3)]
        slot = slot_of(f"sg-session:{{{await gate.verify(tokens[0])}}}".encode())
        migration = asyncio.create_task(
            asyncio.to_thread(lambda: Migration(cluster, slot).finish())
        )

        async def work(number: int) -> int:
            token = await gate.start(300, {"user": f"{number}"})
            turns = 0
            while turns < 2 or not migration.done():
                data = f"{number}.{turns}"
                await gate.pset(token, "user", data)
                assert await gate.pget(token, "user") == data.encode()
                assert await gate.pget(tokens[number % 3], "user") == b"0"
                turns += 1
            return turns

        await asyncio.gather(*map(work, range(count)))
        await migration
    await client.aclose()


def test_threads_over_many_servers(cluster: Cluster) -> None:
    """Threads on one gate each read what they wrote, while slots move away under them."""
    client = RedisCluster(host="127.0.0.1", port=cluster.port, protocol=2)
    gate = SessionGate(client, sign_key=SIGN_KEY)
    tokens = [gate.start(300, {"user": "0"}) for _ in range(16)]
    moved = threading.Event()

    def work(token: str) -> None:
        turns = 0
        while not moved.is_set() or turns < 20:
            turns += 1
            gate.pset(token, "user", f"{token}{turns}")
            assert gate.pget(token, "user") == f"{token}{turns}".encode()

    with ThreadPoolExecutor(16) as threads:
        working = [threads.submit(work, token) for token in tokens]
        try:
            for token in tokens[:4]:
                Migration(cluster, slot_of_token(gate, token)).finish()
        finally:
            moved.set()
        for done in working:
            done.result()
    client.close()


def test_a_gate_survives_a_fork(cluster: Cluster) -> None:
    """After a fork parent and children go on with one gate, and none sees another's reply."""
    survive_forks(cluster.port, "cluster")


def test_a_fork_while_the_topology_is_read(cluster: Cluster) -> None:
    """The child of a fork waits for no lock that a thread of its parent held."""
    client = RedisCluster(host="127.0.0.1", port=cluster.port, protocol=2)
    mine = Routes(client)
    command = Command(scripts.TOUCH, (b"sg-session:{A}",), (), bytes, "")
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        # Private, and not in all versions of redis-py.
        theirs: Any = getattr(client.nodes_manager, "_initialization_lock", None)
        with ExitStack() as stack:
            for lock in filter(None, [theirs, client._lock, mine._lock, mine._making]):
                stack.enter_context(lock)
            held.set()
            done.wait(30)

    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(hold)
        assert held.wait(5)
        child = os.fork()
        if not child:
            code = 1
            try:
                signal.alarm(10)
                # A thread of the child may be taken for one of the parent's: these take the names.
                for _ in range(5):
                    threading.Thread(target=done.wait, daemon=True).start()
                name = mine.node(command, Journey(FOREVER), FOREVER).name
                mine.heard(name, ConnectionError("x"))
                mine.node(command, Journey(FOREVER), FOREVER)
                code = int(mine.turn != 1)  # it was read, or not
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        done.set()
        holding.result()
    client.close()
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_slot_that_nobody_serves(flavour: Flavour, cluster: Cluster) -> None:
    """If the client knows no server for a slot, the topology is read first."""
    gate = flavour.gate(flavour.cluster_client(cluster))
    token = gate.start(300, {"user": "x"})
    client_of(gate).nodes_manager.slots_cache.clear()
    assert gate.pget(token, "user") == b"x"


def connections(server: Server) -> int:
    """How many connections a server has had, but for this one."""
    with server.client() as client:
        return int(client.info("stats")["total_connections_received"])


async def test_one_that_moved_among_many(cluster: Cluster) -> None:
    """A session that moved does not disturb those that it leaves with: their connection stays."""
    client = redis.asyncio.RedisCluster(host="127.0.0.1", port=cluster.port, protocol=2)
    async with AsyncSessionGate(client, sign_key=SIGN_KEY) as gate:
        tokens = {await gate.start(300, {"user": f"{n}"}): f"{n}".encode() for n in range(90)}
        slot = slot_of(f"sg-session:{{{await gate.verify(next(iter(tokens)))}}}".encode())
        source = cluster.server_of(slot)
        await asyncio.to_thread(lambda: Migration(cluster, slot).finish())
        before = connections(source)
        answers = await asyncio.gather(*(gate.pget(token, "user") for token in tokens))
        assert answers == list(tokens.values())
        # Its own, and perhaps one that redis-py reads the topology with.
        assert connections(source) <= before + 2
    await client.aclose()


def soil(flavour: Flavour, gate: SessionGate, token: str, *command: object) -> None:
    """Leave a reply unread on the connection that the gate uses next for that session."""
    if not isinstance(gate, Blocking):
        assert isinstance(gate._channel, ClusterLines)
        node = client_of(gate).get_node_from_key(key_of(gate, token))
        lines = gate._channel._lines_to(node)
        connection, _ = lines._take(float("inf"))
        connection.send_command(*command)
        lines._idle.append(connection)
        return

    server = servers_of(gate)[f"127.0.0.1:{port_of(gate, token)}"]

    async def soil_async() -> None:
        if isinstance(server.channel, Lane):
            await server.channel._connection.send_command(*command)
            return
        connection = await server.pool.get_connection()
        await connection.send_command(*command)
        await server.pool.release(connection)

    flavour.runner.run(soil_async())


@pytest.mark.parametrize("reply", ["another's", "MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN"])
def test_an_interrupted_read_hands_over_nothing(
    flavour: Flavour, cluster: Cluster, reply: str
) -> None:
    """A reply that another call left on a connection is neither handed over nor followed."""
    gate = flavour.gate(flavour.cluster_client(cluster))
    token = gate.start(300, {"user": "mine"})
    assert gate.pget(token, "user") == b"mine"
    gate.pset(token, "user", "mine")  # an unknown script would be one more error to tell apart
    script = {
        "another's": f"return '{wire.new_echo().decode()}theirs'",
        "TRYAGAIN": "return redis.error_reply('TRYAGAIN of another')",
        "CLUSTERDOWN": "return redis.error_reply('CLUSTERDOWN of another')",
    }.get(reply, f"return redis.error_reply('{reply} 1 127.0.0.1:1')")
    server = cluster.server_of(slot_of_token(gate, token))
    with paused(server, 0.2):
        soil(flavour, gate, token, "EVAL", script, 0)
        with pytest.raises(ConnectionError, match="belongs to another request"):
            gate.pset(token, "user", "new")
        # pget asks once more, on a new connection.
        soil(flavour, gate, token, "EVAL", script, 0)
        assert gate.pget(token, "user") == b"new"


def test_a_redirection_without_proof(flavour: Flavour, cluster: Cluster) -> None:
    """If the reply behind a redirection is an error as well, nothing is sent again."""
    gate = flavour.gate(flavour.cluster_client(cluster))
    token = gate.start(300, {"user": "mine"})
    server = cluster.server_of(slot_of_token(gate, token))
    command = gate._commands.pset(token, "user", "new")
    # Its script is unknown: as an answer to the probe, that proves nothing.
    command = command._replace(script=replace(command.script, source=b"return"), repeat=None)
    with paused(server, 0.2):
        soil(flavour, gate, token, "EVAL", "return redis.error_reply('MOVED 1 127.0.0.1:1')", 0)
        with pytest.raises(ConnectionError, match="belongs to another request"):
            gate._run(command)
    assert gate.pget(token, "user") == b"mine"


@pytest.mark.parametrize("error", [MovedError("1 a:1"), AskError("1 a:1"), TryAgainError("x")])
def test_redirections_end(error: ResponseError) -> None:
    """What is sent to and fro for ever ends with the error that sent it last."""
    command = Command(scripts.PGET, (b"x",), (), bytes, "")
    journey = Journey(float("inf"))
    pauses = []
    while journey.goes_on(command, NotRun(error), "here", 0):
        pauses.append(journey.pause)
        assert journey.asking is (type(error) is AskError)
        assert journey.address == (None if isinstance(error, TryAgainError) else ("a", 1))
    assert len(pauses) == 16
    assert 0.5 < sum(pauses) < 1
    assert journey.end(NotRun(error)) == NotRun(error)


def test_redirections_go_on_until_they_are_due() -> None:
    """With a deadline it decides, and what comes of it is that the servers were not ready."""
    journey = Journey(2.0)
    command = Command(scripts.PGET, (b"x",), (), bytes, "")
    unready = NotRun(TryAgainError("x"))
    assert journey.goes_on(command, unready, "here", 0)
    for _ in range(100):
        assert journey.goes_on(command, MovedError("1 a:1"), "here", 1.9)
    assert not journey.goes_on(command, MovedError("1 a:1"), "here", 1.96)
    assert journey.end(MovedError("1 a:1")) == unready
    assert journey.end(b"x") == b"x"
    lost = Journey(2.0).end(NotRun(MovedError("1 a:1")))
    assert isinstance(lost, NotRun)
    assert type(lost.error) is TimeoutError


def test_what_goes_anywhere_does_not_wait_for_a_slot() -> None:
    """A new session, for which any slot will do, is not sent again to one that is about to move."""
    command = Command(scripts.START, (b"x",), (), bytes, "", anywhere=True)
    journey = Journey(2.0)
    assert not journey.goes_on(command, NotRun(TryAgainError("x")), "here", 0)
    assert journey.goes_on(command, MovedError("1 a:1"), "here", 0)


def test_what_casts_doubt_on_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of a server has the topology read before its next command; not all the time."""
    now = 100.0
    monkeypatch.setattr(routes, "monotonic", lambda: now)
    doubts = routes._Doubts()
    for answer in (b"", ResponseError("x"), AuthenticationError("x"), MaxConnectionsError("x")):
        doubts.heard("a", answer)
        assert not doubts.due("a")
    for fault in (ConnectionError("x"), TimeoutError("x"), ClusterDownError("x")):
        doubts = routes._Doubts()
        doubts.heard("a", fault)
        assert doubts.due("a")
        assert not doubts.due("b")
    doubts.begin()
    doubts.heard("b", fault)  # of what is being read, that may be the newer news
    doubts.end(read=True)
    assert not doubts.due("b")
    now += 0.1
    assert doubts.due("b")
    assert not doubts.due("a")
    doubts.begin()
    doubts.end(read=False)
    now += 0.1
    assert doubts.due("b")


def test_a_redirection_to_the_same_host() -> None:
    """A server that names no host means its own."""
    journey = Journey(1)
    command = Command(scripts.PGET, (b"x",), (), bytes, "")
    assert journey.goes_on(command, MovedError("1 :7000"), "here", 0)
    assert journey.address == ("here", 7000)


@pytest.mark.parametrize("auto_pipeline", [True, False])
async def test_a_cluster_that_is_not_there(auto_pipeline: bool) -> None:
    """A cluster that cannot be reached is redis-py's error, as of its own client."""
    client = redis.asyncio.RedisCluster(host="127.0.0.1", port=1)
    async with AsyncSessionGate(client, sign_key=SIGN_KEY, auto_pipeline=auto_pipeline) as gate:
        with pytest.raises(ConnectionError, match="cannot be connected"):
            await gate.start(300)


def test_a_pipeline_is_no_client(cluster: Cluster) -> None:
    """A pipeline of a cluster client is refused, as that of a client is."""
    with pytest.raises(ConfigurationError, match="ClusterPipeline"):
        SessionGate(
            RedisCluster(host="127.0.0.1", port=cluster.port, protocol=2).pipeline(),
            sign_key=SIGN_KEY,
        )


def test_closing_a_gate_closes_its_connections(flavours: list[Flavour], cluster: Cluster) -> None:
    """A closed gate has no connections of its own any more; the application's client goes on."""
    for flavour in flavours[1:]:
        client = flavour.cluster_client(cluster, username=None)  # the application's, which may ping
        gate = flavour.gate(client)
        token = next(iter(tokens_everywhere(gate, cluster).values()))
        connections = [
            connection
            for server in servers_of(gate).values()
            for connection in (
                [server.channel._connection]
                if isinstance(server.channel, Lane)
                else server.pool._available_connections
            )
        ]
        assert [connection.is_connected for connection in connections] == [True] * 3
        gate.close()
        assert not any(connection.is_connected for connection in connections)
        with pytest.raises(GateClosedError):
            gate.pget(token, "user")
        assert flavour.runner.run(awaited(cast("redis.asyncio.RedisCluster", client).ping()))


def test_a_server_that_left(flavours: list[Flavour]) -> None:
    """A gate keeps no connection to a server that has no part in the cluster any more."""
    with new_cluster() as cluster:
        leaving, heir, other = cluster.servers
        try:
            leaving.client().config_set("cluster-allow-replica-migration", "no")
        except ResponseError:
            pytest.skip("before Redis 6.2 a server without slots becomes a replica")
        gates = [
            flavour.gate(flavour.cluster_client(cluster, client_name=flavour.name))
            for flavour in flavours[1:]
        ]
        token = next(
            token
            for port, token in tokens_everywhere(gates[0], cluster).items()
            if port == leaving.port
        )
        for gate in gates:
            gate.pget(token, "user")
        names = {entry["name"] for entry in leaving.client().client_list()}
        assert names >= {"async", "async-pooled"}
        leaving.client().flushall()
        slots = range(16_384 // 3)  # the first server's
        for server in (heir, leaving, other):
            pipeline = server.client().pipeline(transaction=False)
            for slot in slots:
                pipeline.execute_command("CLUSTER SETSLOT", slot, "NODE", cluster.id_of(heir))
            pipeline.execute()
        deadline = time.monotonic() + 5
        while names & {"async", "async-pooled"}:
            assert time.monotonic() < deadline
            for gate in gates:
                with pytest.raises(SessionNotFoundError):
                    gate.pget(token, "user")
            names = {entry["name"] for entry in leaving.client().client_list()}


def url_of(*servers: Server, login: str = "", options: str = "") -> str:
    """A URL that names these servers of a cluster."""
    hosts = ",".join(f"127.0.0.1:{server.port}" for server in servers)
    return f"redis+cluster://{login}{hosts}{options}"


def names_at(server: Server) -> set[str]:
    """The names of the clients that are connected to a server."""
    with server.client() as client:
        return {entry["name"] for entry in client.client_list()}


def test_a_url_of_a_cluster(flavour: Flavour, cluster: Cluster) -> None:
    """A gate from a URL finds all servers of the cluster, and every operation works on each."""
    gate = flavour.gate_from_url(url_of(cluster.primaries()[0]))
    for operation in OPERATIONS:
        for token in tokens_everywhere(gate, cluster).values():
            operation(gate, token)


def test_the_first_server_of_a_url_is_down(flavour: Flavour, cluster: Cluster) -> None:
    """A gate from a URL needs one of the servers that it names, whichever that is."""
    there = url_of(cluster.primaries()[0])
    gate = flavour.gate_from_url(there.replace("://", f"://127.0.0.1:{free_port()},"))
    assert gate.pget(gate.start(300, {"user": "x"}), "user") == b"x"


def test_a_url_of_a_cluster_that_is_not_there(flavour: Flavour) -> None:
    """A gate is made before there is a cluster; a call is a ConnectionError, each time anew."""
    gate = flavour.gate_from_url("redis+cluster://127.0.0.1:1,127.0.0.1:2")
    for _ in range(2):
        with pytest.raises(ConnectionError):
            gate.start(300)


@pytest.mark.parametrize("password", ["secret", "se/cr:et@%,"], ids=["plain", "quoted"])
def test_a_url_of_a_cluster_with_a_login(flavour: Flavour, cluster: Cluster, password: str) -> None:
    """User and password of the URL are those for every server, special characters quoted."""
    user = "a,b@c"
    for server in cluster.servers:
        server.client().execute_command("ACL", "SETUSER", user, "on", f">{password}", "~*", "+@all")
    try:
        login = f"{quote(user, safe='')}:{quote(password, safe='')}@"
        gate = flavour.gate_from_url(url_of(*cluster.servers, login=login))
        for token in tokens_everywhere(gate, cluster).values():
            assert gate.pget(token, "user") == token.encode()
        users = {entry["user"] for entry in cluster.primaries()[0].client().client_list()}
        assert user in users
        wrong = flavour.gate_from_url(url_of(*cluster.servers, login="nobody:knows@"))
        with pytest.raises(AuthenticationError):
            wrong.start(300)
    finally:
        for server in cluster.servers:
            server.client().execute_command("ACL", "DELUSER", user)


def test_a_gate_of_a_url_closes_its_connections(flavours: list[Flavour], cluster: Cluster) -> None:
    """Options of redis-py follow the URL; closing the gate closes whatever it had connected."""
    for flavour in flavours:
        name = f"url-{flavour.name}"
        flavour.logs_in = False  # the user of a gate may give it no name
        gate = flavour.gate_from_url(url_of(*cluster.servers, options=f"?client_name={name}"))
        tokens_everywhere(gate, cluster)
        assert all(name in names_at(server) for server in cluster.primaries())
        gate.close()
        deadline = time.monotonic() + 5
        while any(name in names_at(server) for server in cluster.servers):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(GateClosedError):
            gate.start(300)


@pytest.mark.parametrize(
    "rest",
    [
        "",
        ":7000",
        "h:0",
        "h:70000",
        "h:x",
        "h:7000,",
        "h:7000,:7001",
        "h:7000,h:x",
        "h:7000/1",
        "h:7000/x",
        "h:7000#x",
        "h:7000?nonsense=1",
        "h:7000?socket_timeout=x",
        "u:secret@h:7000,u:secret@h:7001",
    ],
)
def test_what_is_no_url_of_a_cluster(flavour: Flavour, rest: str) -> None:
    """What would fail later, or be passed over, is refused at once, and no password is told."""
    login = "" if "@" in rest else "u:secret@"
    with pytest.raises(ConfigurationError) as caught:
        flavour.gate_from_url(f"redis+cluster://{login}{rest}")
    assert "secret" not in f"{caught.value}{caught.value.__cause__}{caught.value.__context__}"
