"""AsyncSessionGate: SessionGate under asyncio. What is asked at once goes out together."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar, overload

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.client import Pipeline
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .answers import SessionInfo
from .arguments import ALWAYS, NoCondition, min_replicas_setting, timeout_setting
from .call import Call
from .codecs import Codec, In, Out, T
from .command import Answer, AnyCommand, Command, NotRun
from .commands import Commands
from .connect import async_client_from_url, not_a_client
from .errors import ConfigurationError, EventLoopError, GateClosedError
from .gate import DEFAULT_PREFIX, DEFAULT_TIMEOUT, SessionGate
from .handle import DEFAULT_TTL, AsyncSession
from .keyspace import Keyspace, system_random
from .lane import Batch, Lane, OneLoop, Waiting, Watch
from .primaries import primary_of
from .routes import AsyncRoutes, Journey
from .sealing import SealingKey, key_rings
from .subjects import Overflow
from .timed import FOREVER, within_async
from .tokens import SignKey
from .values import Values

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., object])

DEFAULT_MAX_WAITING = 1_000


def _as_in(method: Callable[..., object]) -> Callable[[F], F]:
    """The docstring is SessionGate's, its example awaited."""

    def documented(awaited: F) -> F:
        awaited.__doc__ = (method.__doc__ or "").replace("gate.", "await gate.")
        return awaited

    return documented


class AsyncSessionGate(Generic[In, Out]):
    """Sessions on stock Redis under asyncio: SessionGate, each method awaited.

    Operations that are asked for while the gate's connection is busy leave together when it is
    free, in one packet; each caller gets its own answer, and cancelling one leaves the others
    alone. What a task awaits one after the other happens in that order; two operations in flight at
    once have none.

    A gate belongs to the event loop that first uses it.

    Args:
        client: the `redis.asyncio` client to use, `Redis` or `RedisCluster`, or what
            `Sentinel(...).master_for(...)` returns; it stays the application's, and `aclose` leaves
            it open. Its decoding, protocol, database and timeouts are fine as they are, and its
            retries are not used.
        sign_key: the secret that signs tokens, or a list of them: the first signs, all verify, so
            that a key can be retired without signing anybody out. At least 32 random bytes each.
        prefix: what every key of this gate in Redis begins with; 1 to 200 bytes, no braces.
        max_sessions: how many live sessions a subject may have; None for any number.
        on_overflow: when a subject has that many and opens another, `"evict"` ends its oldest,
            `"reject"` raises TooManySessionsError and needs `max_sessions`.
        auto_pipeline: whether operations share one connection of the gate's own. Without, each
            takes one of the client's pool, which raises when it has no more to give.
        max_waiting: how many operations may be under way, for each server of a cluster; further
            callers wait for room. At least 1; without auto_pipeline it does not count.
        timeout: seconds after which a call is over, whatever it waits for and however often it is
            sent again; None leaves it to the client's timeouts.
        min_replicas: how many replicas have to have what a call writes before it returns, 0 to
            1,000; the calls that matter most take one of their own.
        codec: what makes bytes of payloads and back: `JSONCodec()`, `MsgpackCodec()` or one of your
            own (`Codec` says how); bytes and text as they are, if not given.
        sealing_key: the secret that encrypts and authenticates payloads before they leave the
            process, or a list of them: the first seals, all open. 32 random bytes each, or the
            64 hexadecimal digits that `sessiongate keygen` prints. None seals nothing, also in the
            first place of a list.
        accept_unsealed: whether payloads that were never sealed are read all the same: for the time
            of the change-over.
        random: where ids come from, `random(n)` being n bytes; only a test should replace it.

    Raises:
        ConfigurationError: the client, sign key, prefix or another setting cannot be used.

    Example:
        >>> from sessiongate import AsyncSessionGate
        >>> gate = AsyncSessionGate.from_url("memory://", sign_key="k" * 32)
        >>> token = await gate.start(300, {"user": "John Doe"})
        >>> await gate.pget(token, "user")
        b'John Doe'
    """

    def __init__(  # noqa: PLR0913  # options are keyword-only
        self,
        client: Redis | RedisCluster,
        *,
        sign_key: SignKey | Sequence[SignKey],
        prefix: str = DEFAULT_PREFIX,
        max_sessions: int | None = None,
        on_overflow: Overflow = "evict",
        auto_pipeline: bool = True,
        max_waiting: int = DEFAULT_MAX_WAITING,
        timeout: float | None = DEFAULT_TIMEOUT,  # of every call, not of this one
        min_replicas: int = 0,
        codec: Codec[In, Out] | None = None,
        sealing_key: SealingKey | Sequence[SealingKey | None] | None = None,
        accept_unsealed: bool = False,
        random: Callable[[int], bytes] = system_random,
    ) -> None:
        self._closed = False
        self._prefix = prefix
        self._kind = ""
        try:
            rings = key_rings(sign_key, sealing_key, accept_unsealed=accept_unsealed)
        finally:
            del sign_key, sealing_key  # a log that shows the variables of an error shows no key
        if not isinstance(client, Redis | RedisCluster) or isinstance(client, Pipeline):
            kinds = "redis.asyncio.Redis or redis.asyncio.RedisCluster"
            raise not_a_client(client, kinds, "AsyncSessionGate")
        if not isinstance(max_waiting, int) or max_waiting < 1:
            raise ConfigurationError("max_waiting is a whole number of at least 1")
        self._timeout = timeout_setting(timeout)
        self._commands: Commands[In, Out] = Commands(
            rings[0],
            Keyspace(prefix, random),
            Values(codec, rings[1]),
            max_sessions=max_sessions,
            on_overflow=on_overflow,
            min_replicas=min_replicas_setting(min_replicas),
        )
        self._kind = self._commands.values.kind
        self._client = client
        self._owns_client = False

        def channel(pool: ConnectionPool) -> _Channel:
            a_try = self._timeout / 2
            return Lane(pool, max_waiting, a_try) if auto_pipeline else _Pooled(pool, a_try)

        self._channel: _Channel = (
            _Clustered(client, channel)
            if isinstance(client, RedisCluster)
            else channel(client.connection_pool)
        )

    @classmethod
    def from_url(  # noqa: PLR0913  # options are keyword-only
        cls,
        url: str,
        *,
        sign_key: SignKey | Sequence[SignKey],
        prefix: str = DEFAULT_PREFIX,
        max_sessions: int | None = None,
        on_overflow: Overflow = "evict",
        auto_pipeline: bool = True,
        max_waiting: int = DEFAULT_MAX_WAITING,
        timeout: float | None = DEFAULT_TIMEOUT,  # of every call, not of this one
        min_replicas: int = 0,
        codec: Codec[In, Out] | None = None,
        sealing_key: SealingKey | Sequence[SealingKey | None] | None = None,
        accept_unsealed: bool = False,
        random: Callable[[int], bytes] = system_random,
    ) -> Self:
        """A gate with a client of its own, which `aclose` closes. Connects at the first call.

        Args:
            url: `redis://[[user]:password@]host[:6379][/database]`, `rediss://` (TLS),
                `unix:///path/to/socket`, `redis+sentinel://host:26379,host:26379/mymaster[/0]`,
                `redis+cluster://host:7000,host:7001`, or `memory://`, a store of this gate's own in
                the process (extra `memory`). Options of redis-py follow a `?`, as in
                `?socket_timeout=1`: how long one try of a call may take, 2 unless you say so.
            sign_key: as for the class.
            prefix: as for the class.
            max_sessions: as for the class.
            on_overflow: as for the class.
            auto_pipeline: as for the class.
            max_waiting: as for the class.
            timeout: as for the class.
            min_replicas: as for the class.
            codec: as for the class.
            sealing_key: as for the class.
            accept_unsealed: as for the class.
            random: as for the class.

        Raises:
            ConfigurationError: an argument cannot be used, or the extra is missing.

        Example:
            >>> gate = AsyncSessionGate.from_url("memory://", sign_key="k" * 32)
            >>> len(await gate.start(300))
            84
            >>> await gate.aclose()
        """
        try:
            gate = cls(
                async_client_from_url(url),
                sign_key=sign_key,
                prefix=prefix,
                max_sessions=max_sessions,
                on_overflow=on_overflow,
                auto_pipeline=auto_pipeline,
                max_waiting=max_waiting,
                timeout=timeout,
                min_replicas=min_replicas,
                codec=codec,
                sealing_key=sealing_key,
                accept_unsealed=accept_unsealed,
                random=random,
            )
        finally:
            del sign_key, sealing_key
        gate._owns_client = True
        return gate

    @_as_in(SessionGate.start)
    async def start(
        self,
        ttl: int | timedelta,
        payloads: Mapping[str, In] | None = None,
        *,
        subject: str | None = None,
        idle_timeout: int | timedelta | None = None,
        min_replicas: int | None = None,
    ) -> str:
        command = self._commands.start(ttl, payloads, subject, idle_timeout, min_replicas)
        del payloads  # a log that shows the variables of an error shows no data
        return await self._run(command)

    @_as_in(SessionGate.touch)
    async def touch(self, token: str | bytes) -> None:
        return await self._run(self._commands.touch(token))

    @_as_in(SessionGate.info)
    async def info(self, token: str | bytes) -> SessionInfo:
        return await self._run(self._commands.info(token))

    @_as_in(SessionGate.renew)
    async def renew(
        self,
        token: str | bytes,
        *,
        grace: int | timedelta | None = None,
        subject: str | None = None,
        min_replicas: int | None = None,
    ) -> str:
        return await self._run(self._commands.renew(token, grace, subject, min_replicas))

    @_as_in(SessionGate.expire)
    async def expire(
        self, token: str | bytes, ttl: int | timedelta, *, min_replicas: int | None = None
    ) -> None:
        return await self._run(self._commands.expire(token, ttl, min_replicas))

    @_as_in(SessionGate.pset)
    async def pset(  # noqa: PLR0913  # options are keyword-only
        self,
        token: str | bytes,
        name: str,
        data: In,
        *,
        if_absent: bool = False,
        if_match: In | NoCondition = ALWAYS,
        as_: object = None,
        ttl: int | timedelta | None = None,
    ) -> None:
        command = self._commands.pset(
            token, name, data, if_absent=if_absent, if_match=if_match, as_=as_, ttl=ttl
        )
        del data, if_match
        return await self._run(command)

    @_as_in(SessionGate.pset_many)
    async def pset_many(
        self, token: str | bytes, payloads: Mapping[str, In], *, delete: Iterable[str] = ()
    ) -> None:
        command = self._commands.pset_many(token, payloads, delete)
        del payloads
        return await self._run(command)

    @overload
    async def pget(self, token: str | bytes, name: str) -> Out: ...

    @overload
    async def pget(self, token: str | bytes, name: str, *, as_: type[T]) -> T: ...

    @overload
    async def pget(self, token: str | bytes, name: str, *, as_: object) -> Any: ...

    @_as_in(SessionGate.pget)
    async def pget(self, token: str | bytes, name: str, *, as_: object = None) -> object:
        return await self._run(self._commands.pget(token, name, as_))

    @_as_in(SessionGate.pget_many)
    async def pget_many(self, token: str | bytes, names: Iterable[str]) -> dict[str, Out]:
        return await self._run(self._commands.pget_many(token, names))

    @_as_in(SessionGate.pall)
    async def pall(self, token: str | bytes) -> dict[str, Out]:
        return await self._run(self._commands.pall(token))

    @_as_in(SessionGate.pdel)
    async def pdel(self, token: str | bytes, name: str) -> None:
        return await self._run(self._commands.pdel(token, name))

    @overload
    async def ppop(self, token: str | bytes, name: str) -> Out: ...

    @overload
    async def ppop(self, token: str | bytes, name: str, *, as_: type[T]) -> T: ...

    @overload
    async def ppop(self, token: str | bytes, name: str, *, as_: object) -> Any: ...

    @_as_in(SessionGate.ppop)
    async def ppop(self, token: str | bytes, name: str, *, as_: object = None) -> object:
        return await self._run(self._commands.ppop(token, name, as_))

    @_as_in(SessionGate.pincr)
    async def pincr(self, token: str | bytes, name: str, by: int = 1) -> int:
        return await self._run(self._commands.pincr(token, name, by))

    def open(
        self,
        token: str | bytes | None,
        *,
        names: Iterable[str] | None = None,
        ttl: int | timedelta = DEFAULT_TTL,
        subject: str | None = None,
        idle_timeout: int | timedelta | None = None,
    ) -> AsyncSession[In, Out]:
        """The session as a mapping of its payloads, for an `async with` block.

        As `SessionGate.open`, but that reading is awaited: `await session.load()`, once, brings the
        payloads; to assign needs no reading. Leaving the block stores what it assigned, deleted or
        changed in place.

        Args:
            token: as for `SessionGate.open`.
            names: likewise.
            ttl: likewise.
            subject: likewise.
            idle_timeout: likewise.

        Raises:
            InvalidTokenError: the token is malformed or forged.
            ArgumentError: an argument is out of its limits.

        Example:
            >>> session = gate.open(token)
            >>> session["cart"] = "3 books"
            >>> await session.save()
            >>> session = await gate.open(token, names=["cart"]).load()
            >>> session["cart"], session.subject
            (b'3 books', 'alice')
        """
        opening = self._commands.opening(ttl, idle_timeout)
        return AsyncSession(
            self._commands, self._run, token, names=names, opening=opening, subject=subject
        )

    @_as_in(SessionGate.end)
    async def end(self, token: str | bytes, *, min_replicas: int | None = None) -> None:
        return await self._run(self._commands.end(token, min_replicas))

    @_as_in(SessionGate.sessions)
    async def sessions(self, subject: str) -> list[SessionInfo]:
        return await self._run(self._commands.sessions(subject))

    @_as_in(SessionGate.end_all)
    async def end_all(
        self,
        subject: str,
        *,
        keep: str | bytes | None = None,
        min_replicas: int | None = None,
    ) -> int:
        return await self._run(self._commands.end_all(subject, keep, min_replicas))

    @_as_in(SessionGate.end_one)
    async def end_one(
        self, subject: str, session_id: str, *, min_replicas: int | None = None
    ) -> None:
        return await self._run(self._commands.end_one(subject, session_id, min_replicas))

    @_as_in(SessionGate.verify)
    async def verify(self, token: str | bytes) -> str:
        return self._commands.verify(token)

    async def aclose(self) -> None:
        """Close the gate's connections; a client of the application's stays open.

        What was sent is finished, what waits to be sent fails with GateClosedError, and so do calls
        that come later. Closing twice is fine.

        Raises:
            EventLoopError: the gate belongs to another event loop.

        Example:
            >>> await gate.aclose()
        """
        was_closed, self._closed = self._closed, True
        try:
            await self._channel.close()
        except EventLoopError:
            self._closed = was_closed
            raise
        if self._owns_client:
            await self._client.aclose()
            if isinstance(self._client, Redis):
                await self._client.connection_pool.disconnect()

    async def __aenter__(self) -> Self:
        if self._closed:
            raise GateClosedError
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        closed = " closed" if self._closed else ""
        return f"<AsyncSessionGate prefix={self._prefix!r}{self._kind}{closed}>"

    async def _run(self, command: Command[R]) -> R:
        if self._closed:
            raise GateClosedError
        clock = asyncio.get_running_loop().time
        call = Call(command, clock() + self._timeout, clock)
        ask: Callable[[Command[R], float], Awaitable[Answer]] = self._channel.ask
        while call.goes_on(await ask(call.command, call.due)):
            if call.pause:
                await asyncio.sleep(call.pause)
            # What is sent now is due before what others have sent meanwhile.
            ask = self._ask_in_time
        return call.result

    async def _ask_in_time(self, command: AnyCommand, due: float) -> Answer:
        try:
            async with asyncio.timeout_at(None if due == FOREVER else due):
                return await self._channel.ask(command, due)
        except TimeoutError:
            return RedisTimeoutError("Timeout of the whole call")


class _Channel(Protocol):
    async def ask(self, command: AnyCommand, due: float, *, asking: bool = False) -> Answer: ...

    async def close(self) -> None: ...


class _Pooled:
    """Sends each command on a connection of the client's pool."""

    def __init__(self, pool: ConnectionPool, a_try: float) -> None:
        self._primary = primary_of(pool)
        self._pool: ConnectionPool = self._primary.pool if self._primary else pool
        self._a_try = a_try
        self._loop = OneLoop()

    async def ask(self, command: AnyCommand, due: float, *, asking: bool = False) -> Answer:
        loop = self._loop.check()
        limit = min(due, loop.time() + self._a_try)
        try:
            connection = await within_async(limit, self._connection(limit), self._pool.release)
        except RedisError as error:
            return NotRun(error)
        except OSError as error:
            # What redis-py lets through: of TLS, of a name that cannot be looked up.
            return NotRun(RedisConnectionError(f"{type(error).__name__} while connecting"))
        except Exception:
            # redis-py puts a connection back whose handshake failed otherwise, half made for good.
            # (One whose handshake was cancelled has a reply to come, which the echo will tell.)
            await self._pool.disconnect(inuse_connections=False)
            raise
        waiting = Waiting(command, loop.create_future(), due, asking)
        batch = Batch([waiting], fresh=False)
        own = connection.socket_timeout
        if command.replicas:
            limit = due  # they may take all of the time
        elif own is not None:
            limit = min(limit, loop.time() + own)
        # Kept here, and not by redis-py as well: see `within_async`.
        connection.socket_timeout = None
        try:
            async with asyncio.timeout_at(None if limit == FOREVER else limit):
                await batch.exchange(connection, Watch(FOREVER))
        except RedisError as error:
            batch.fail(error)
        except TimeoutError:
            batch.fail(RedisTimeoutError("Timeout waiting for the reply of Redis"))
        finally:
            connection.socket_timeout = own
            try:
                if not batch.sound:
                    await connection.disconnect(nowait=True)
            finally:
                await self._pool.release(connection)
        return waiting.answer.result()

    async def _connection(self, due: float) -> AbstractConnection:
        connection: AbstractConnection = await self._pool.get_connection()
        if self._primary is None:
            return connection
        try:
            if await self._primary.is_left_by(connection, due):
                await connection.disconnect(nowait=True)
                await connection.connect()
                self._primary.noted(connection)
        except BaseException:
            await self._pool.release(connection)
            raise
        return connection

    async def close(self) -> None:
        """Nothing but the check, mostly: the connections are the pool's."""
        self._loop.check()
        if self._primary:
            await self._pool.disconnect()
            await self._primary.close()


class _Server:
    """A server of a cluster: its channel, and how many callers are at it."""

    __slots__ = ("callers", "channel", "gone", "pool")

    def __init__(self, node: ClusterNode, channel: Callable[[ConnectionPool], _Channel]) -> None:
        # As the node makes its own connections; but never one that may read from a replica.
        options = {**node.connection_kwargs, "retry": Retry(NoBackoff(), 0)}
        options.pop("redis_connect_func", None)
        self.pool = ConnectionPool(node.connection_class, node.max_connections, **options)
        self.channel = channel(self.pool)
        self.callers = 0
        self.gone = False

    async def close(self) -> None:
        """Close the channel, and all connections unless callers are left: the last one does."""
        await self.channel.close()
        self.gone = True
        if not self.callers:
            await self.pool.disconnect()


class _Clustered:
    """Sends each command to the server of its slot, over a channel for each of them.

    A server that left the cluster is closed when nobody waits for it any more.
    """

    def __init__(self, client: RedisCluster, channel: Callable[[ConnectionPool], _Channel]) -> None:
        self._routes = AsyncRoutes(client)
        self._turn = 0
        self._make_channel = channel
        self._servers: dict[str, _Server] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._loop = OneLoop()
        self._closed = False

    async def ask(self, command: AnyCommand, due: float, *, asking: bool = False) -> Answer:
        loop = self._loop.check()
        journey = Journey(due)
        while True:
            if self._closed:
                raise GateClosedError
            try:
                node = await self._routes.node(command, journey, due)
            except RedisError as error:
                return NotRun(error)
            if self._turn != self._routes.turn:
                self._turn = self._routes.turn
                self._forget(self._servers.keys() - self._routes.names())
            answer = await self._ask_at(node, command, due, asking=asking or journey.asking)
            self._routes.heard(node.name, answer)
            if not journey.goes_on(command, answer, node.host, loop.time()):
                return journey.end(answer)
            await asyncio.sleep(journey.pause)

    async def _ask_at(
        self, node: ClusterNode, command: AnyCommand, due: float, *, asking: bool
    ) -> Answer:
        if self._closed:
            raise GateClosedError
        if node.name not in self._servers:
            self._servers[node.name] = _Server(node, self._make_channel)
        server = self._servers[node.name]
        server.callers += 1
        try:
            return await server.channel.ask(command, due, asking=asking)
        finally:
            server.callers -= 1
            if server.gone and not server.callers:
                self._close(server)

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            server = self._servers.pop(name)
            server.gone = True
            if not server.callers:
                self._close(server)

    def _close(self, server: _Server) -> None:
        task = asyncio.create_task(server.close(), name="sessiongate-close")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close the channels, each in its way, and all connections that are idle by then."""
        self._loop.check()
        self._closed = True
        await self._routes.close()
        await asyncio.gather(*(server.close() for server in self._servers.values()))
        if self._closing:
            await asyncio.wait(self._closing)
