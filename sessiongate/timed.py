"""Connections of redis-py that keep a deadline: connecting, and however slowly a reply comes in.

redis-py's timeouts count anew with each address that it tries, each step of a handshake and each
piece of a reply. Here all of it together is over when it is due.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import copy_context
from functools import cache
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any, TypeVar

import redis.cluster
from redis import RedisCluster
from redis import exceptions as redis_errors
from redis.backoff import NoBackoff
from redis.connection import Connection, ConnectionPool
from redis.retry import Retry

T = TypeVar("T")

FOREVER = float("inf")

# A part of a deadline that is as good as all of it: no timeout is set for the sake of so little.
_TRIFLE = 0.01
# What is bigger may take several turns to send, and then the reply has less time left.
_BIG = 16 * 1024
_AT_ONCE = 0.000_1  # seconds; 0 would mean not to wait for a socket at all
_AGAIN = 0.05  # seconds between two cancellations of what does not end


def within(due: float, work: Callable[[], object], undo: Callable[[], object]) -> None:
    """Do what keeps no deadline of its own, and wait for it no longer than that.

    It is done in a thread. If that is late, what it did is undone as soon as it is finished.

    Raises:
        redis.exceptions.TimeoutError: it was not done in time.
    """
    if due == FOREVER:
        work()
        return
    outcome: list[BaseException | None] = []
    done, lock = Event(), Lock()
    late = False

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # it is raised by who waits
            outcome.append(error)
        else:
            outcome.append(None)
        with lock:
            done.set()
        if late:
            undo()

    # The application's context counts here as well: of a credential provider, of tracing.
    thread = Thread(target=copy_context().run, args=(run,), name="sessiongate-connect", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        # None is left, or the interpreter is about to end: better late than never.
        work()
        return
    try:
        done.wait(max(due - monotonic(), 0))
    finally:
        with lock:
            late = not done.is_set()
    if late:
        raise redis_errors.TimeoutError("Timeout connecting to server")
    error = outcome.pop()
    if error is not None:
        try:
            raise error
        finally:
            del error  # it refers to this frame: the two would keep each other


_late: set[asyncio.Task[Any]] = set()


async def within_async(
    due: float, work: Coroutine[Any, Any, T], undo: Callable[[T], Awaitable[object]]
) -> T:
    """The same under asyncio: what is late, or whose caller is cancelled, is cancelled.

    Until it ends: before Python 3.12 redis-py's handshake may swallow one cancellation, in
    asyncio.wait_for, and would go on to wait for the server.

    Raises:
        redis.exceptions.TimeoutError: it was not done in time.
    """
    task = asyncio.create_task(work, name="sessiongate-connect")
    task.add_done_callback(_seen)
    left = max(due - asyncio.get_running_loop().time(), 0)
    try:
        await asyncio.wait([task], timeout=None if due == FOREVER else left)
    except asyncio.CancelledError:
        await _end(task, undo)
        raise
    if task.done():
        return task.result()
    ending = asyncio.create_task(_end(task, undo), name="sessiongate-connect")
    _late.add(ending)
    ending.add_done_callback(_late.discard)
    raise redis_errors.TimeoutError("Timeout connecting to server")


def _seen(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # who gave it up asks no more, and nobody else is to be told


async def _end(task: asyncio.Task[T], undo: Callable[[T], Awaitable[object]]) -> None:
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_AGAIN)
    if not task.cancelled() and task.exception() is None:
        await undo(task.result())


def _none_pending() -> int:
    return 0


class _Socket:
    """A socket from which the pieces of a reply come in time, all together."""

    __slots__ = (
        "_again",
        "_due",
        "_set",
        "_timeout",
        "_wrapped",
        "fileno",
        "gettimeout",
        "pending",
        "settimeout",
    )

    def __init__(self, wrapped: socket.socket, due: float) -> None:
        self._wrapped = wrapped
        self._timeout = wrapped.gettimeout()
        self._set = False  # whether it has another timeout just now
        # What redis-py asks for with every call. To look for the last in vain took an eighth of it.
        self.fileno = wrapped.fileno
        self.gettimeout = wrapped.gettimeout
        self.settimeout = wrapped.settimeout
        self.pending = getattr(wrapped, "pending", _none_pending)
        self.expect(due)

    def expect(self, due: float, *, patiently: bool = False) -> None:
        """Let what is sent and read from now on be over by then.

        Patiently means to wait until then, and no less.
        """
        self._due = due
        self._again = False
        if patiently:
            self._set = True
            self.settimeout(None if due == FOREVER else max(due - monotonic(), _AT_ONCE))
            return
        if self._set:
            self._set = False
            self.settimeout(self._timeout)
        if self._timeout is None or due - monotonic() < self._timeout - _TRIFLE:
            self._shorten()

    def recv(self, *args: int) -> bytes:
        if self._again:
            self._shorten()
        self._again = True
        return self._wrapped.recv(*args)

    def recv_into(self, buffer: bytearray, *args: int) -> int:
        if self._again:
            self._shorten()
        self._again = True
        return self._wrapped.recv_into(buffer, *args)

    def sendall(self, data: bytes) -> None:
        if self._again:
            self._shorten()
        elif len(data) > _BIG:
            self._again = True
        self._wrapped.sendall(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def _shorten(self) -> None:
        left = max(self._due - monotonic(), _AT_ONCE)
        if left < (FOREVER if self._timeout is None else self._timeout):
            self._set = True
            self.settimeout(left)


@cache
def _timed(connection_class: type[Connection]) -> type[Connection]:
    class Timed(connection_class):  # type: ignore[valid-type,misc]  # it is the class of a pool
        """As the pool's connections are, with a deadline."""

        due = FOREVER
        _deadline_socket: _Socket | None = None

        def _connect(self) -> Any:
            made = super()._connect()
            if not isinstance(made, socket.socket):
                return made  # fakeredis's, which makes nobody wait
            self._deadline_socket = _Socket(made, self.due)
            return self._deadline_socket

        def expect(self, due: float, *, patiently: bool = False) -> None:
            """Let what is sent and read from now on be over by then; patiently: no sooner."""
            self.due = due
            if self._deadline_socket is not None:
                self._deadline_socket.expect(due, patiently=patiently)

        def connect_by(self, due: float) -> None:
            """Connect, in time."""
            self.due = due
            within(due, self.connect, self.disconnect)

    return Timed


def _connecting(also: Callable[[Any], object] | None) -> Callable[[Any], None] | None:
    """What a connection does when it is there, and what an application wants it to do as well."""
    if also is None:
        return None

    def connect(connection: Any) -> None:
        connection.on_connect()
        also(connection)

    return connect


def connection_of(pool: ConnectionPool, timeout: float) -> Any:
    """A connection as the pool makes its own, but one that keeps deadlines and repeats nothing.

    It is none of the pool's. `timeout` limits each of its steps, as the client's own timeouts do.
    """
    options = {**pool.connection_kwargs, "retry": Retry(NoBackoff(), 0)}
    cluster_client = getattr(options.get("redis_connect_func"), "__self__", None)
    if isinstance(cluster_client, RedisCluster):
        # Its own function would have the connection read from replicas.
        options["redis_connect_func"] = _connecting(cluster_client.user_on_connect_func)
        # Before redis-py 6 it also chose the parser: no other one knows a redirection.
        if parser := getattr(redis.cluster, "ClusterParser", None):
            options["parser_class"] = parser
    connection = _timed(pool.connection_class)(**options)
    if timeout < FOREVER:
        for name in ("socket_timeout", "socket_connect_timeout"):
            own = getattr(connection, name, None)
            setattr(connection, name, timeout if own is None else min(own, timeout))
    return connection
