"""A URL becomes a redis-py client with the settings that a gate wants."""

from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from redis import Redis
from redis import asyncio as redis_asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from .errors import ConfigurationError

MEMORY_URL = "memory://"

AnyClient = TypeVar("AnyClient", Redis, redis_asyncio.Redis)

# redis-py's pool makes connections as they are needed and raises at its limit, 100 unless told
# otherwise; threads that share a gate should meet their own limit first.
_MAX_CONNECTIONS = 10_000
_TIMEOUTS = ("socket_timeout", "socket_connect_timeout")

# In both: RESP2, since redis-py's HELLO fails before Redis 6. No retries of redis-py's own, since
# the gate knows which command may be sent twice.


def client_from_url(url: str) -> Redis:
    """A client of the server at `url`; it has not connected yet.

    Raises:
        ConfigurationError: the URL is none of ours, or needs an extra that is not installed.
    """
    if url == MEMORY_URL:
        try:
            from fakeredis import FakeRedis, FakeServer  # noqa: PLC0415  # slow to import
        except ImportError:
            raise _memory_is_missing() from None
        return FakeRedis(server=FakeServer(), protocol=2)
    retry = Retry(NoBackoff(), 0)
    return _checked(
        url,
        lambda: Redis.from_url(url, protocol=2, retry=retry, max_connections=_MAX_CONNECTIONS),
    )


def async_client_from_url(url: str) -> redis_asyncio.Redis:
    """The same for asyncio."""
    if url == MEMORY_URL:
        try:
            from fakeredis import FakeAsyncRedis, FakeServer  # noqa: PLC0415  # slow to import
        except ImportError:
            raise _memory_is_missing() from None
        return FakeAsyncRedis(server=FakeServer(), protocol=2)
    retry = AsyncRetry(NoBackoff(), 0)
    return _checked(
        url,
        lambda: redis_asyncio.Redis.from_url(
            url, protocol=2, retry=retry, max_connections=_MAX_CONNECTIONS
        ),
    )


def _memory_is_missing() -> ConfigurationError:
    return ConfigurationError(
        'memory:// needs the extra "memory": pip install "sessiongate[memory]"'
    )


def _checked(url: str, make: Callable[[], AnyClient]) -> AnyClient:
    client = _made(url, make)
    if client is None:
        # Not the URL itself: it may hold a password.
        raise ConfigurationError(
            "not a URL that a gate understands: give redis://host:6379/0, rediss://..., "
            "unix:///path/to/socket or memory://, with options of redis-py behind a ?"
        )
    return client


def _made(url: str, make: Callable[[], AnyClient]) -> AnyClient | None:
    try:
        parts = urlsplit(url)
        if parts.scheme != "unix" and parts.path.strip("/"):
            int(parts.path.strip("/"))  # redis-py takes what is no database for database 0
        client = make()
        # What redis-py and the socket module look at when they connect, looked at now.
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)
        pool.connection_kwargs.get("host", "").encode("idna")
        if min(pool.connection_kwargs.get(option) or 1 for option in _TIMEOUTS) < 0:
            return None
    except (AttributeError, RedisError, TypeError, ValueError):
        return None
    return client
