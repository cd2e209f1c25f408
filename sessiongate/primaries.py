"""Which server is the primary, as the sentinels say, for connections that are open already.

A primary that was replaced takes writes for ten seconds more, until the sentinels make it a
replica: all of these are lost. So who uses an open connection asks them, once in a second.
"""

import asyncio
from contextlib import suppress
from copy import copy
from threading import RLock
from time import monotonic
from typing import Any

from redis import Redis
from redis import asyncio as redis_asyncio
from redis import exceptions as redis_errors
from redis.asyncio import sentinel as asyncio_sentinel
from redis.asyncio.connection import ConnectionPool as AsyncConnectionPool
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import ConnectionPool
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from .timed import within

# Seconds that an answer of the sentinels is good for, that a call waits for one, and that one of
# them may take: if the first stands still, the next is asked while it waits. After that the call
# makes do with what is known, and so do others for a while; the answer counts when it comes.
_GOOD_FOR = 1.0
_WAIT = 0.4
_A_SENTINEL = 0.3
_TIMEOUTS = ("socket_timeout", "socket_connect_timeout")


class _Known:
    """What is known of the primary: its address, and since when."""

    def __init__(self) -> None:
        self._address: tuple[str, int] | None = None
        self._looked = 0.0

    def noted(self, connection: Any) -> None:
        """A new connection leads to it, as the sentinels have just said."""
        self._learnt((connection.host, connection.port))

    def _learnt(self, address: tuple[str, int] | None) -> None:
        self._address = address or self._address
        self._looked = monotonic()

    def _is_old(self) -> bool:
        return monotonic() - self._looked > _GOOD_FOR

    def _is_elsewhere(self, connection: Any) -> bool:
        return self._address not in (None, (connection.host, connection.port))


class _Named(Redis):
    """A client of a sentinel. redis-py shows it when none knows the primary, 6 and 7 all of it."""

    def __repr__(self) -> str:
        return _address(self)


class _AsyncNamed(redis_asyncio.Redis):
    """The same for asyncio."""

    def __repr__(self) -> str:
        return _address(self)


def _address(client: Any) -> str:
    options = client.connection_pool.connection_kwargs
    return f"{options.get('host')}:{options.get('port')}"


class Primary(_Known):
    """The primary of a pool that sentinels manage. `pool` is one like it, which repeats nothing."""

    def __init__(self, pool: SentinelConnectionPool) -> None:
        super().__init__()
        clients = [
            _Named(connection_pool=ConnectionPool(**_hastily(client, Retry(NoBackoff(), 0))))
            for client in pool.sentinel_manager.sentinels
        ]
        self.pool = SentinelConnectionPool(**_like(pool, clients))
        self._lock = RLock()

    def forked(self) -> None:
        """This is another process: who held the lock is no more."""
        self._lock = RLock()

    def is_left_by(self, connection: Any, due: float) -> bool:
        """Whether an open connection does not lead to it any more."""
        if self._is_old():
            due = min(due, monotonic() + _WAIT)
            lock = self._lock
            # A signal's handler may raise at any moment, also when the lock was just acquired: so
            # that it is not held for ever, the lock itself tells whether there is one to release.
            try:
                if lock.acquire(timeout=max(due - monotonic(), 0)) and self._is_old():
                    self._look(due)
            finally:
                try:  # noqa: SIM105  # a call of `suppress` could be interrupted before the release
                    lock.release()
                except RuntimeError:
                    pass
        return self._is_elsewhere(connection)

    def _look(self, due: float) -> None:
        self._learnt(None)
        with suppress(redis_errors.RedisError):
            within(due, lambda: self._learnt(self.pool.get_master_address()), lambda: None)

    def close(self) -> None:
        """Close the connections to the sentinels."""
        for client in self.pool.sentinel_manager.sentinels:
            client.connection_pool.disconnect()


class AsyncPrimary(_Known):
    """The same under asyncio."""

    def __init__(self, pool: asyncio_sentinel.SentinelConnectionPool) -> None:
        super().__init__()
        clients = [
            _AsyncNamed(
                connection_pool=AsyncConnectionPool(**_hastily(client, AsyncRetry(NoBackoff(), 0)))
            )
            for client in pool.sentinel_manager.sentinels
        ]
        self.pool = asyncio_sentinel.SentinelConnectionPool(**_like(pool, clients))
        self._looking: asyncio.Task[None] | None = None

    async def is_left_by(self, connection: Any, due: float) -> bool:
        """Whether an open connection does not lead to it any more."""
        if self._is_old():
            if self._looking is None:
                self._looking = asyncio.create_task(self._look(), name="sessiongate-primary")
            left = max(min(due - asyncio.get_running_loop().time(), _WAIT), 0)
            await asyncio.wait([self._looking], timeout=left)
            self._learnt(None)
        return self._is_elsewhere(connection)

    async def _look(self) -> None:
        address = None
        try:
            with suppress(redis_errors.RedisError):
                address = await self.pool.sentinel_manager.discover_master(self.pool.service_name)
        finally:
            self._looking = None
            self._learnt(address)

    async def close(self) -> None:
        """Close the connections to the sentinels."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        for client in self.pool.sentinel_manager.sentinels:
            await client.connection_pool.disconnect()


def primary_of(pool: AsyncConnectionPool) -> AsyncPrimary | None:
    """The primary that sentinels name, if they manage the pool."""
    if isinstance(pool, asyncio_sentinel.SentinelConnectionPool) and pool.is_master:
        return AsyncPrimary(pool)
    return None


def _hastily(client: Any, retry: object) -> dict[str, Any]:
    """What a pool is made with whose connections give up soon, one after the other."""
    pool = client.connection_pool
    options = {**pool.connection_kwargs, "connection_class": pool.connection_class, "retry": retry}
    for name in _TIMEOUTS:
        options[name] = min(options.get(name) or _A_SENTINEL, _A_SENTINEL)
    return options


def _like(pool: Any, clients: list[Any]) -> dict[str, Any]:
    """What a pool of the same settings is made with, which asks the sentinels by these clients."""
    manager = copy(pool.sentinel_manager)
    manager.sentinels = clients
    options = {**pool.connection_kwargs}
    del options["connection_pool"]
    return {
        **options,
        "service_name": pool.service_name,
        "sentinel_manager": manager,
        "connection_class": pool.connection_class,
        "is_master": pool.is_master,
        "check_connection": pool.check_connection,
        "max_connections": pool.max_connections,
    }
