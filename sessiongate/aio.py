"""AsyncSessionGate: SessionGate under asyncio. What is asked at once goes out together."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Protocol, Self, TypeVar

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.connection import ConnectionPool
from redis.exceptions import RedisError

from .arguments import Data
from .commands import Answer, AnyCommand, Command, Commands
from .connect import async_client_from_url
from .errors import ConfigurationError, EventLoopError, GateClosedError
from .gate import DEFAULT_PREFIX, SessionGate
from .keyspace import Keyspace, system_random
from .lane import Batch, Lane, OneLoop, Waiting, Watch
from .tokens import SignKey, SignKeyRing

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., object])

DEFAULT_MAX_WAITING = 1_000


def _as_in(method: Callable[..., object]) -> Callable[[F], F]:
    """The docstring is SessionGate's, its example awaited."""

    def documented(awaited: F) -> F:
        awaited.__doc__ = (method.__doc__ or "").replace("gate.", "await gate.")
        return awaited

    return documented


class AsyncSessionGate:
    """Sessions on stock Redis under asyncio: SessionGate, each method awaited.

    Operations that are asked for while the gate's connection is busy leave together when it is
    free, in one packet; each caller gets its own answer, and cancelling one leaves the others
    alone. What a task awaits one after the other happens in that order; two operations in flight at
    once have none.

    A gate belongs to the event loop that first uses it.

    Args:
        client: the `redis.asyncio` client to use; it stays the application's, and `aclose` leaves
            it open. Its decoding, protocol, database and timeouts are fine as they are.
        sign_key: the secret that signs tokens, or a list of them: the first signs, all verify, so
            that a key can be retired without signing anybody out. At least 32 random bytes each.
        prefix: what every key of this gate in Redis begins with; 1 to 200 bytes, no braces.
        auto_pipeline: whether operations share one connection of the gate's own. Without, each
            takes one of the client's pool, which raises when it has no more to give.
        max_waiting: how many operations may be under way; further callers wait for room. At least
            1; without auto_pipeline it does not count.
        random: where ids come from, `random(n)` being n bytes; only a test should replace it.

    Raises:
        ConfigurationError: the client, sign key, prefix or max_waiting cannot be used.

    Example:
        >>> from sessiongate import AsyncSessionGate
        >>> gate = AsyncSessionGate.from_url("memory://", sign_key="k" * 32)
        >>> token = await gate.start(300, {"user": "John Doe"})
        >>> await gate.pget(token, "user")
        b'John Doe'
    """

    def __init__(  # noqa: PLR0913  # options are keyword-only
        self,
        client: Redis,
        *,
        sign_key: SignKey | Sequence[SignKey],
        prefix: str = DEFAULT_PREFIX,
        auto_pipeline: bool = True,
        max_waiting: int = DEFAULT_MAX_WAITING,
        random: Callable[[int], bytes] = system_random,
    ) -> None:
        self._closed = False
        self._prefix = prefix
        if not isinstance(client, Redis) or isinstance(client, Pipeline):
            raise ConfigurationError(
                f"client is a redis.asyncio.Redis, not "
                f"{type(client).__module__}.{type(client).__name__}"
            )
        if not isinstance(max_waiting, int) or max_waiting < 1:
            raise ConfigurationError("max_waiting is a whole number of at least 1")
        self._commands = Commands(SignKeyRing(sign_key), Keyspace(prefix, random))
        self._client = client
        self._owns_client = False
        pool = client.connection_pool
        self._channel: _Channel = Lane(pool, max_waiting) if auto_pipeline else _Pooled(pool)

    @classmethod
    def from_url(  # noqa: PLR0913  # options are keyword-only
        cls,
        url: str,
        *,
        sign_key: SignKey | Sequence[SignKey],
        prefix: str = DEFAULT_PREFIX,
        auto_pipeline: bool = True,
        max_waiting: int = DEFAULT_MAX_WAITING,
        random: Callable[[int], bytes] = system_random,
    ) -> Self:
        """A gate with a client of its own, which `aclose` closes. Connects at the first call.

        Args:
            url: `redis://[[user]:password@]host[:6379][/database]`, `rediss://` (TLS),
                `unix:///path/to/socket` or `memory://`, a store of this gate's own in the process
                (extra `memory`). Options of redis-py follow a `?`, as in `?socket_timeout=2`.
            sign_key: as for the class.
            prefix: as for the class.
            auto_pipeline: as for the class.
            max_waiting: as for the class.
            random: as for the class.

        Raises:
            ConfigurationError: an argument cannot be used, or the extra is missing.

        Example:
            >>> gate = AsyncSessionGate.from_url("memory://", sign_key="k" * 32)
            >>> len(await gate.start(300))
            84
            >>> await gate.aclose()
        """
        gate = cls(
            async_client_from_url(url),
            sign_key=sign_key,
            prefix=prefix,
            auto_pipeline=auto_pipeline,
            max_waiting=max_waiting,
            random=random,
        )
        gate._owns_client = True
        return gate

    @_as_in(SessionGate.start)
    async def start(self, ttl: int | timedelta, payloads: Mapping[str, Data] | None = None) -> str:
        return await self._run(self._commands.start(ttl, payloads))

    @_as_in(SessionGate.expire)
    async def expire(self, token: str | bytes, ttl: int | timedelta) -> None:
        return await self._run(self._commands.expire(token, ttl))

    @_as_in(SessionGate.pset)
    async def pset(self, token: str | bytes, name: str, data: Data) -> None:
        return await self._run(self._commands.pset(token, name, data))

    @_as_in(SessionGate.pget)
    async def pget(self, token: str | bytes, name: str) -> bytes:
        return await self._run(self._commands.pget(token, name))

    @_as_in(SessionGate.pdel)
    async def pdel(self, token: str | bytes, name: str) -> None:
        return await self._run(self._commands.pdel(token, name))

    @_as_in(SessionGate.end)
    async def end(self, token: str | bytes) -> None:
        return await self._run(self._commands.end(token))

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
        return f"<AsyncSessionGate prefix={self._prefix!r}{' closed' if self._closed else ''}>"

    async def _run(self, command: Command[R]) -> R:
        if self._closed:
            raise GateClosedError
        while True:
            # An error here is the caller's: nothing was sent.
            answer = await self._channel.ask(command)
            try:
                return command.result(answer)
            except Exception as error:
                following = command.after(error)
                if following is None:
                    raise
            command = following


class _Channel(Protocol):
    async def ask(self, command: AnyCommand) -> Answer: ...

    async def close(self) -> None: ...


class _Pooled:
    """Sends each command on a connection of the client's pool."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self._loop = OneLoop()

    async def ask(self, command: AnyCommand) -> Answer:
        loop = self._loop.check()
        try:
            connection = await self._pool.get_connection()
        except RedisError:
            raise
        except Exception:
            # redis-py puts a connection back whose handshake failed otherwise, half made for good.
            # (One whose handshake was cancelled has a reply to come, which the echo will tell.)
            await self._pool.disconnect(inuse_connections=False)
            raise
        waiting = Waiting(command, loop.create_future())
        batch = Batch([waiting])
        try:
            # Its own timeout, as it is the pool's.
            await batch.exchange(connection, Watch(None))
        except RedisError as error:
            waiting.settle(error)
        finally:
            try:
                if not batch.sound:
                    await connection.disconnect(nowait=True)
            finally:
                await self._pool.release(connection)
        return waiting.answer.result()

    async def close(self) -> None:
        """Nothing but the check: the connections are the pool's."""
        self._loop.check()
