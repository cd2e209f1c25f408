"""Which server of a cluster a command goes to, and where it goes when that one sends it away.

redis-py's cluster client keeps the topology; when it is read anew is decided here. A server that
failed, or that sent a command away, is doubted: before the next command for it the topology is
read. Commands for the other servers do not wait for that.
"""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from inspect import signature
from threading import TIMEOUT_MAX, Event, Lock, RLock, Thread
from time import monotonic
from typing import Any

from redis import RedisCluster
from redis import exceptions as redis_errors
from redis.asyncio.cluster import ClusterNode as AsyncClusterNode
from redis.asyncio.cluster import RedisCluster as AsyncRedisCluster
from redis.cluster import ClusterNode
from redis.connection import ConnectionPool

from .command import Answer, AnyCommand, NotRun
from .timed import FOREVER, within

# What says that a command did not run here, and shall be sent again, elsewhere or later. MovedError
# is an AskError. They have no echo: they count once they are proven.
REDIRECTIONS = (redis_errors.AskError, redis_errors.TryAgainError)

# Sent before a command, in one packet with it.
ASKING = (b"*1\r\n$6\r\nASKING\r\n",)

_MAX_REDIRECTIONS = 16  # as redis-py; of a call without a deadline
# While a slot moves, servers may send a command to and fro: wait from the fourth time on.
_HASTY = 3
_PAUSE = 0.05

# Reading the topology takes some milliseconds, and in an outage every command may ask for it.
_REST = 0.1
# Seconds that a command waits for the topology before it makes do with what is known. A server that
# stands still may hold up the reading for as long as the client's timeouts.
_PATIENCE = 1.0
_TAKES_FAILED = "last_failed_node_name"  # from redis-py 8.1 on

_FAULTS = (
    redis_errors.ClusterDownError,
    redis_errors.ConnectionError,
    redis_errors.MovedError,
    redis_errors.ReadOnlyError,
    redis_errors.TimeoutError,
)
_SILENCE = (redis_errors.ConnectionError, redis_errors.TimeoutError)
# ConnectionErrors that say nothing of the server.
_NO_FAULTS = (redis_errors.AuthenticationError, redis_errors.MaxConnectionsError)
# redis-py's errors, and what it comes to if its own connection has lost its place, so that it takes
# another reply for the topology.
_UNREADABLE = (
    redis_errors.RedisError,
    redis_errors.RedisClusterException,
    AttributeError,
    LookupError,
    OSError,
    TypeError,
    ValueError,
)


class Journey:
    """One command's way through a cluster, for as long as it is sent on."""

    __slots__ = ("_due", "_sent", "_unready", "address", "asking", "pause")

    def __init__(self, due: float) -> None:
        self._due = due
        self._sent = 0
        self._unready: Answer | None = None
        self.address: tuple[str, int] | None = None  # where it was sent; None: to its slot's server
        self.asking = False
        self.pause = 0.0

    def goes_on(self, command: AnyCommand, answer: Answer, host: str, now: float) -> bool:
        """Whether to send the command again, after what the server at that host answered."""
        error = answer.error if isinstance(answer, NotRun) else answer
        unready = isinstance(error, redis_errors.TryAgainError)
        if unready:
            self._unready = answer
        if not isinstance(error, REDIRECTIONS) or (unready and command.anywhere):
            return False
        self._sent += 1
        self.pause = _PAUSE if unready or self._sent > _HASTY else 0.0
        if self._due == FOREVER:
            if self._sent > _MAX_REDIRECTIONS:
                return False
        elif now + self.pause >= self._due:
            return False
        self.address = None
        self.asking = False
        if isinstance(error, redis_errors.AskError):
            # A server may leave out the host if it is its own.
            self.address = (error.host or host, error.port)
            self.asking = not isinstance(error, redis_errors.MovedError)
        return True

    def end(self, answer: Answer) -> Answer:
        """What came of it: if it was only sent about, that the servers were not ready for it."""
        error = answer.error if isinstance(answer, NotRun) else answer
        if not isinstance(error, REDIRECTIONS):
            return answer
        if self._unready is not None:
            return self._unready
        return answer if self._due == FOREVER else NotRun(_too_long())


class _Doubts:
    """The servers that are doubted, by name, and whether it is time to do something about it.

    `silent` is the last one that could not be reached, or did not answer.
    """

    __slots__ = ("_due", "_names", "_since", "silent")

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._since: set[str] = set()  # those doubted since the last reading began
        self._due = 0.0
        self.silent = ""

    def heard(self, name: str, answer: Answer) -> None:
        """Take note of what the server of that name answered."""
        if isinstance(answer, NotRun):
            answer = answer.error
        if isinstance(answer, _FAULTS) and not isinstance(answer, _NO_FAULTS):
            self._names.add(name)
            self._since.add(name)
            if isinstance(answer, _SILENCE):
                self.silent = name
        elif name == self.silent:
            self.silent = ""

    def due(self, name: str | None) -> bool:
        """Whether to read the topology before a command for that server; None if there is none."""
        return (name is None or name in self._names) and monotonic() >= self._due

    def matter(self, name: str | None) -> bool:
        """Whether a command for that server has to wait for the reading.

        One that only sent a command away goes on serving, and tells where else to ask.
        """
        return name is None or name == self.silent

    def begin(self) -> None:
        """The topology is being read."""
        self._since = set()

    def end(self, *, read: bool) -> None:
        """It was read, or could not be."""
        if read:
            self._names = self._since
        self._due = monotonic() + _REST

    def reading(self, manager: Any) -> Any:
        """Begin to read the topology, asking the silent server last: the thing to await, if any."""
        if _TAKES_FAILED in signature(manager.initialize).parameters:
            return manager.initialize(**{_TAKES_FAILED: self.silent or None})
        if silent := manager.startup_nodes.pop(self.silent, None):
            manager.startup_nodes[self.silent] = silent
        return manager.initialize()


class Routes:
    """The routes of a synchronous cluster client, for any number of threads.

    Args:
        client: the client, or how to make it: one that is made reads the topology at once.

    `turn` counts how often the topology was read: what is known may have changed with it.
    """

    def __init__(self, client: RedisCluster | Callable[[], RedisCluster]) -> None:
        self._client: RedisCluster | None = None
        self._make: Callable[[], RedisCluster] | None = None
        if isinstance(client, RedisCluster):
            self._client = client
        else:
            self._make = client
        self._doubts = _Doubts()
        self._lock = Lock()
        self._making = RLock()
        self._reading: Event | None = None
        self._pid = os.getpid()
        self.turn = 0

    def node(self, command: AnyCommand, journey: Journey, due: float) -> ClusterNode:
        """The server to send a command to.

        Raises:
            redis.exceptions.ConnectionError: none is known, and none of those that were is there.
            redis.exceptions.TimeoutError: to find out takes too long.
        """
        self._mind_forks()
        client = self._client or self._made(due)
        if journey.address:
            return _named(client, *journey.address)
        node = _known(client, command)
        name = node.name if node else None
        if self._doubts.due(name):
            self._read(client, name, due)
            node = _known(client, command)
        if node is None:
            raise _not_covered()
        return node

    def heard(self, name: str, answer: Answer) -> None:
        """Take note of what the server of that name answered."""
        self._doubts.heard(name, answer)

    def pool(self, node: ClusterNode) -> ConnectionPool:
        """What the client makes its connections to a server with."""
        if node.redis_connection is None and self._client:
            self._client.get_redis_connection(node)  # makes one
        pool: ConnectionPool = node.redis_connection.connection_pool
        return pool

    def names(self) -> set[str]:
        """The names of all servers that are known."""
        return set(self._client.nodes_manager.nodes_cache) if self._client else set()

    def close(self) -> None:
        """Close the client, if it was made here."""
        if self._make and self._client:
            self._client.close()

    def _made(self, due: float) -> RedisCluster:
        made: list[RedisCluster] = []
        lock = self._making
        # As in `primaries`: the lock itself tells whether there is one to release.
        try:
            if not lock.acquire(timeout=min(max(due - monotonic(), 0), TIMEOUT_MAX)):
                raise _too_slow()
            make = self._make
            if self._client is None and make is not None:
                try:
                    within(due, lambda: made.append(make()), lambda: made.pop().close())
                except redis_errors.RedisClusterException as error:
                    raise _unreachable(error) from error
                (self._client,) = made
        finally:
            try:  # noqa: SIM105  # a call of `suppress` could be interrupted before the release
                lock.release()
            except RuntimeError:
                pass
        if self._client is None:
            raise _not_covered()
        return self._client

    def _read(self, client: RedisCluster, name: str | None, due: float) -> None:
        """Have the topology read, and wait for that if it matters, though not for long."""
        with self._lock:
            if self._reading is None and self._doubts.due(name):
                begun = Event()
                thread = Thread(
                    target=self._read_now,
                    args=(client, begun),
                    name="sessiongate-topology",
                    daemon=True,
                )
                self._reading = begun
                try:
                    thread.start()
                except BaseException as error:
                    self._reading = None
                    # None is left, or the interpreter is about to end: what is known has to do.
                    if not isinstance(error, RuntimeError):
                        raise
            reading = self._reading
        if reading is not None and self._doubts.matter(name):
            reading.wait(max(min(due - monotonic(), _PATIENCE), 0))

    def _read_now(self, client: RedisCluster, reading: Event) -> None:
        self._doubts.begin()
        read = False
        try:
            # What is known may still serve if this fails; if not, its own error says more.
            with suppress(*_UNREADABLE):
                self._doubts.reading(client.nodes_manager)
                read = True
        finally:
            self._doubts.end(read=read)
            self.turn += read
            if self._reading is reading:
                self._reading = None
            reading.set()

    def _mind_forks(self) -> None:
        if self._pid != os.getpid():
            # Other threads may have held them when this process was forked, and are no more.
            self._lock, self._making, self._reading = Lock(), RLock(), None
            if self._client:
                _renew_locks(self._client)
            self._pid = os.getpid()


def _renew_locks(client: RedisCluster) -> None:
    """The same for those of redis-py, which holds one of them for as long as it reads."""
    renewed: dict[int, object] = {}
    for owner in (client, client.nodes_manager):
        for name in ("_lock", "_initialization_lock"):  # private, and not in all of its versions
            if lock := getattr(owner, name, None):
                setattr(owner, name, renewed.setdefault(id(lock), RLock()))


def _known(client: RedisCluster, command: AnyCommand) -> ClusterNode | None:
    try:
        node: ClusterNode = client.get_node_from_key(command.keys[0])
    except redis_errors.SlotNotCoveredError:
        return None
    return node


def _named(client: RedisCluster, host: str, port: int) -> ClusterNode:
    manager = client.nodes_manager
    host, port = manager.remap_host_port(host, port)
    # One that is new to the client gets to know it, as in redis-py's own redirections: the next
    # reading takes over its connections.
    node = client.get_node(host, port) or ClusterNode(host, port, "primary")
    return manager.nodes_cache.setdefault(node.name, node)


class AsyncRoutes:
    """The routes of an asynchronous cluster client.

    `turn` counts how often the topology was read: what is known may have changed with it.
    """

    def __init__(self, client: AsyncRedisCluster) -> None:
        self._client = client
        self._doubts = _Doubts()
        self._ready = False
        self._reading: asyncio.Task[redis_errors.ConnectionError | None] | None = None
        self.turn = 0

    async def node(self, command: AnyCommand, journey: Journey, due: float) -> AsyncClusterNode:
        """The server to send a command to.

        Raises:
            redis.exceptions.ConnectionError: none is known, and none of those that were is there.
            redis.exceptions.TimeoutError: to find out takes too long.
        """
        if not self._ready:
            await self._wait_for_reading(due - asyncio.get_running_loop().time())
            if not self._ready:
                raise _too_slow()
        if journey.address:
            return self._named(*journey.address)
        node = self._known(command)
        name = node.name if node else None
        if self._doubts.due(name):
            self._begin_reading()
            if self._doubts.matter(name):
                left = due - asyncio.get_running_loop().time()
                await self._wait_for_reading(min(left, _PATIENCE))
            node = self._known(command)
        if node is None:
            raise _not_covered()
        return node

    def heard(self, name: str, answer: Answer) -> None:
        """Take note of what the server of that name answered."""
        self._doubts.heard(name, answer)

    def names(self) -> set[str]:
        """The names of all servers that are known."""
        return set(self._client.nodes_manager.nodes_cache)

    async def close(self) -> None:
        """Read nothing any more."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])

    def _known(self, command: AnyCommand) -> AsyncClusterNode | None:
        try:
            return self._client.get_node_from_key(command.keys[0])  # type: ignore[arg-type]  # bytes will do: it encodes a str to them
        except redis_errors.SlotNotCoveredError:
            return None

    def _named(self, host: str, port: int) -> AsyncClusterNode:
        host, port = self._client.nodes_manager.remap_host_port(host, port)
        node = self._client.get_node(host, port)
        return node or AsyncClusterNode(
            host, port, "primary", **self._client.nodes_manager.connection_kwargs
        )

    def _begin_reading(self) -> asyncio.Task[redis_errors.ConnectionError | None]:
        if self._reading is None:
            self._reading = asyncio.create_task(self._read(), name="sessiongate-topology")
        return self._reading

    async def _wait_for_reading(self, seconds: float) -> None:
        reading = self._begin_reading()
        # A caller that is cancelled or late does not interrupt it: others wait as well.
        limit = None if seconds == FOREVER else max(seconds, 0)
        await asyncio.wait([reading], timeout=limit)
        if reading.done() and not self._ready:
            error = None if reading.cancelled() else reading.result()
            raise copy(error) if error else _not_covered()

    async def _read(self) -> redis_errors.ConnectionError | None:
        try:
            if self._ready:
                await self._read_again()
                return None
            try:
                await self._client.initialize()
            except redis_errors.RedisClusterException as error:
                return _unreachable(error)
            self._ready = True
            return None
        finally:
            self._reading = None

    async def _read_again(self) -> None:
        self._doubts.begin()
        read = False
        try:
            # As above.
            with suppress(*_UNREADABLE):
                await self._doubts.reading(self._client.nodes_manager)
                read = True
                self.turn += 1
        finally:
            self._doubts.end(read=read)


def _unreachable(error: Exception) -> redis_errors.ConnectionError:
    # redis-py's is no RedisError; why the last server could not be asked says more.
    if isinstance(error.__cause__, redis_errors.AuthenticationError):
        return copy(error.__cause__)
    return redis_errors.ConnectionError(f"{error}")


def _too_long() -> redis_errors.TimeoutError:
    return redis_errors.TimeoutError("Timeout while the servers of the cluster sent the call about")


def _too_slow() -> redis_errors.TimeoutError:
    return redis_errors.TimeoutError("Timeout reading the topology of the cluster")


def _not_covered() -> redis_errors.ClusterDownError:
    # As a server says that knows of none.
    return redis_errors.ClusterDownError("CLUSTERDOWN Hash slot not served")
