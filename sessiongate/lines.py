"""How SessionGate asks: on connections of its own, to one server or to each of a cluster."""

import os
from collections.abc import Callable
from contextlib import suppress
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from redis import RedisCluster
from redis import exceptions as redis_errors
from redis.connection import ConnectionPool
from redis.exceptions import RedisError, ResponseError
from redis.sentinel import SentinelConnectionPool

from .call import refuses
from .command import PROBE, Answer, AnyCommand, NotRun, mark_of
from .primaries import Primary
from .routes import ASKING, REDIRECTIONS, Journey, Routes
from .timed import connection_of
from .wire import UNREADABLE, may_be_garbled, misplaced, new_echo, pack, unpack, wait_for

if TYPE_CHECKING:
    from redis.cluster import ClusterNode


class Channel(Protocol):
    """Where a gate's commands go."""

    def ask(self, command: AnyCommand, due: float) -> Answer:
        """What comes of a command by then."""

    def close(self) -> None:
        """Close all connections that are idle; what is in use is closed by who uses it."""


class Lines:
    """Connections to one server, made as a pool makes its own. As many are kept as were in use.

    To take one from the pool and give it back costs a quarter of a call.

    Args:
        pool: how connections are made.
        timeout: seconds that a call may take: one try of it takes half of them at most, so that a
            server that stands still leaves time to find another one.
    """

    __slots__ = ("_closed", "_idle", "_pid", "_pool", "_primary", "_timeout")

    def __init__(self, pool: ConnectionPool, timeout: float) -> None:
        self._primary = Primary(pool) if _is_watched(pool) else None
        self._pool: ConnectionPool = self._primary.pool if self._primary else pool
        self._timeout = timeout / 2
        self._idle: list[Any] = []
        self._pid = os.getpid()
        self._closed = False

    def ask(self, command: AnyCommand, due: float, *, asking: bool = False) -> Answer:
        """What comes of a command on one of them."""
        try:
            connection, fresh = self._take(due)
        except RedisError as error:
            return NotRun(error)
        sound = False
        try:
            answer, sound = _ask(connection, command, due, fresh=fresh, asking=asking)
        except RedisError as error:
            # Of a connection that never asked anything before, it can be no other request's.
            return NotRun(error) if fresh and refuses(error) else error
        finally:
            if sound and not self._closed:
                self._idle.append(connection)
            else:
                connection.disconnect()
                if not sound:
                    # The others go where this one did: to a server that is gone, stands still or
                    # has become a replica.
                    self._drop()
        return answer

    def _take(self, due: float) -> tuple[Any, bool]:
        if self._pid != os.getpid():
            # They are the parent's: to drop them here closes them for this process alone.
            self._idle, self._pid = [], os.getpid()
            if self._primary:
                self._primary.forked()
        try:
            connection = self._idle.pop()
        except IndexError:
            pass
        else:
            connection.expect(due)
            if self._primary and self._primary.is_left_by(connection, due):
                self._drop()
            elif not _has_unread(connection):
                return connection, False
            connection.disconnect()
        return self._connected(due), True

    def _connected(self, due: float) -> Any:
        connection = connection_of(self._pool, self._timeout)
        try:
            connection.connect_by(min(due, monotonic() + self._timeout))
            connection.expect(due)
            if self._primary:
                self._primary.noted(connection)
        except RedisError:
            connection.disconnect()
            raise
        except OSError as error:
            connection.disconnect()
            text = f"{type(error).__name__} while connecting"
            raise redis_errors.ConnectionError(text) from error
        except BaseException:
            connection.disconnect()  # its handshake may have been interrupted
            raise
        return connection

    def _drop(self) -> None:
        while self._idle:
            with suppress(IndexError):  # another thread may have taken the last one
                self._idle.pop().disconnect()

    def close(self) -> None:
        """Close what is idle; what is in use is closed by who uses it."""
        self._closed = True
        self._drop()
        if self._primary:
            self._primary.close()


class ClusterLines:
    """Lines to each server of a cluster. Each command goes to the server of its slot."""

    __slots__ = ("_closed", "_lines", "_routes", "_timeout", "_turn")

    def __init__(self, client: RedisCluster | Callable[[], RedisCluster], timeout: float) -> None:
        self._routes = Routes(client)
        self._lines: dict[str, Lines] = {}
        self._timeout = timeout
        self._turn = 0
        self._closed = False

    def ask(self, command: AnyCommand, due: float) -> Answer:
        """What comes of a command, wherever it is sent on to."""
        journey = Journey(due)
        while True:
            try:
                node = self._routes.node(command, journey, due)
            except RedisError as error:
                return NotRun(error)
            if self._turn != self._routes.turn:
                self._turn = self._routes.turn
                self._forget(self._lines.keys() - self._routes.names())
            answer = self._lines_to(node).ask(command, due, asking=journey.asking)
            self._routes.heard(node.name, answer)
            if not journey.goes_on(command, answer, node.host, monotonic()):
                return journey.end(answer)
            sleep(journey.pause)

    def _lines_to(self, node: "ClusterNode") -> Lines:
        lines = self._lines.get(node.name)
        if lines is None:
            pool = self._routes.pool(node)
            lines = self._lines.setdefault(node.name, Lines(pool, self._timeout))
            if self._closed:
                lines.close()
        return lines

    def _forget(self, names: set[str]) -> None:
        for name in names:
            if lines := self._lines.pop(name, None):
                lines.close()

    def close(self) -> None:
        """Close what is idle; a cluster client is closed by whose it is."""
        self._closed = True
        self._forget(set(self._lines))
        self._routes.close()


def _is_watched(pool: ConnectionPool) -> TypeGuard[SentinelConnectionPool]:
    return isinstance(pool, SentinelConnectionPool) and bool(pool.is_master)


def _has_unread(connection: Any) -> bool:
    """Whether there is something to read that is no reply to what comes.

    The server has closed the connection, or somebody left it dirty.
    """
    try:
        return bool(connection.can_read())
    except RedisError:
        return True


def _ask(
    connection: Any, command: AnyCommand, due: float, *, fresh: bool, asking: bool
) -> tuple[Answer, bool]:
    """The answer to a command, and whether the connection may be used again."""
    answer, proven = _round_trip(connection, command, asking=asking)
    if type(answer) is bytes:
        if command.replicas and command.awaits(answer):
            return _await_replicas(connection, command, answer, due)
        return answer, proven
    if not proven and isinstance(answer, ResponseError):
        # The server's own errors have no echo: is the next reply the next request's?
        probed, proven = _round_trip(connection, PROBE)
        # A redirection says that the command did not run: not so one that is not proven.
        dubious = isinstance(answer, REDIRECTIONS) or may_be_garbled(answer)
        if isinstance(probed, redis_errors.ConnectionError) or (dubious and not proven):
            answer = misplaced()
    if isinstance(answer, Exception) and refuses(answer):
        # A primary that became a replica: only a new connection finds its successor.
        sound = proven and not isinstance(answer, redis_errors.ReadOnlyError)
        return (NotRun(answer) if proven or fresh else answer), sound
    return answer, proven


def _await_replicas(
    connection: Any, command: AnyCommand, reply: bytes, due: float
) -> tuple[Answer, bool]:
    """Wait on the connection that wrote: on another one WAIT does not know what to wait for."""
    try:
        connection.expect(due, patiently=True)
        if command.unmarked:
            marked, _ = _round_trip(connection, mark_of(command))
            if isinstance(marked, Exception):
                return command.written(reply, 0, marked), False
        connection.send_packed_command(wait_for(command.replicas, due - monotonic()))
        count = connection.read_response()
        if count >= command.replicas:
            # A number proves nothing: if it was misread it will not be so twice.
            connection.send_packed_command(wait_for(command.replicas, 0))
            count = min(count, connection.read_response())
    except RedisError as error:
        return command.written(reply, 0, error), False
    except UNREADABLE:
        return command.written(reply, 0, misplaced()), False
    return command.written(reply, count), True


def _round_trip(
    connection: Any, command: AnyCommand, *, asking: bool = False
) -> tuple[Answer, bool]:
    echo = new_echo()
    request = pack(command, echo)
    connection.send_packed_command([*ASKING, *request] if asking else request)
    if asking:
        # Whatever it says: the command's own reply shows whether it served.
        with suppress(ResponseError):
            connection.read_response(disable_decoding=True)
    try:
        reply: object = connection.read_response(disable_decoding=True)
    except ResponseError as error:
        # Under no other name: it refers to this frame, and the two would keep each other.
        return unpack(error, echo)
    except redis_errors.ConnectionError as error:
        # A connection that Sentinel manages makes this of it, but the echo is in what it said.
        if isinstance(error.__context__, redis_errors.ReadOnlyError):
            return unpack(error.__context__, echo)
        raise
    except UNREADABLE:
        return misplaced(), False
    return unpack(reply, echo)
