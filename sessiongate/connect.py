"""A URL becomes a redis-py client with the settings that a gate wants."""

from collections.abc import Callable
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from redis import Redis, RedisCluster
from redis import __version__ as redis_version
from redis import asyncio as redis_asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from .arguments import MISSING_HINT, type_of_setting, utf8
from .errors import ConfigurationError

MEMORY_URL = "memory://"

AnyClient = TypeVar("AnyClient", Redis, redis_asyncio.Redis)

# redis-py's pool makes connections as they are needed and raises at its limit, 100 unless told
# otherwise; tasks that share a gate without its pipeline should meet their own limit first.
_MAX_CONNECTIONS = 10_000
_FIRST_SOUND_CACHE = 8
_TIMEOUTS = ("socket_timeout", "socket_connect_timeout")
_LONGEST_TIMEOUT = 10**9  # seconds; sockets refuse more when they connect

# In both: RESP2, since redis-py's HELLO fails before Redis 6. No retries of redis-py's own, since
# the gate knows which command may be sent twice.


def client_from_url(url: str) -> Redis:
    """A client of the server at `url`; it has not connected yet.

    Raises:
        ConfigurationError: the URL is none of ours, or needs an extra that is not installed.
    """
    url = _with_scheme(url)
    if url == MEMORY_URL:
        try:
            from fakeredis import FakeRedis, FakeServer  # noqa: PLC0415  # slow to import
        except ImportError:
            raise _memory_is_missing() from None
        return FakeRedis(server=FakeServer(), protocol=2)
    retry = Retry(NoBackoff(), 0)
    return _checked(url, lambda url: Redis.from_url(url, protocol=2, retry=retry))


def async_client_from_url(url: str) -> redis_asyncio.Redis:
    """The same for asyncio."""
    url = _with_scheme(url)
    if url == MEMORY_URL:
        try:
            from fakeredis import FakeAsyncRedis, FakeServer  # noqa: PLC0415  # slow to import
        except ImportError:
            raise _memory_is_missing() from None
        return FakeAsyncRedis(server=FakeServer(), protocol=2)
    retry = AsyncRetry(NoBackoff(), 0)
    return _checked(
        url,
        lambda url: redis_asyncio.Redis.from_url(
            url, protocol=2, retry=retry, max_connections=_MAX_CONNECTIONS
        ),
    )


def refuse_stale_cache(client: Redis | RedisCluster) -> None:
    """Refuse a caching client of redis-py before 8, which may cache a reply under another's key.

    Its connections take a packed request for the one before it when that failed.
    """
    clients = (
        [client]
        if isinstance(client, Redis)
        else [client.get_redis_connection(node) for node in client.get_nodes()]
    )
    cached = any(getattr(one.connection_pool, "cache", None) is not None for one in clients)
    if cached and int(redis_version.partition(".")[0]) < _FIRST_SOUND_CACHE:
        raise ConfigurationError(
            "client caches replies, and before redis-py 8 mixes them up with a gate's: upgrade, or "
            "give the gate a client without cache_config"
        )


def _memory_is_missing() -> ConfigurationError:
    return ConfigurationError(
        'memory:// needs the extra "memory": pip install "sessiongate[memory]"'
    )


def _with_scheme(url: object) -> str:
    """The URL with a scheme of ours, in lower case as redis-py wants it."""
    if not isinstance(url, str):
        raise ConfigurationError(f"url is a str, not {type_of_setting(url)}")
    if not url:
        raise ConfigurationError(f"url is empty{MISSING_HINT}")
    if utf8(url) is None:
        # The error of encoding it would hold the password, and come at the first call.
        raise ConfigurationError("url is valid text: this one holds a lone surrogate")
    scheme, separator, rest = url.partition("://")
    url = scheme.lower() + separator + rest
    if url != MEMORY_URL and not url.startswith(("redis://", "rediss://", "unix://")):
        raise ConfigurationError(
            "not a URL that a gate understands: give redis://host:6379/0, rediss://..., "
            "unix:///path/to/socket or memory://, with options of redis-py behind a ?"
        )
    return url


def _checked(url: str, make: Callable[[str], AnyClient]) -> AnyClient:
    client = _made(url, make)
    if client is None:
        # Nothing of the URL, nor an error that led here: they may hold a password.
        raise ConfigurationError(
            "the URL names no host, port, database or path that can be used, or an option that "
            "redis-py lacks or cannot set so: give redis://user:password@host:6379/0?option=value, "
            "and write special characters of a password as %2F and the like"
        )
    return client


def _made(url: str, make: Callable[[str], AnyClient]) -> AnyClient | None:
    """The client, unless something of its URL would fail when it connects, or be passed over."""
    try:
        parts = urlsplit(url)
        # redis-py takes what is no database for database 0, and port 0 for 6379.
        path = unquote(parts.path).strip("/")
        if parts.fragment or (path and parts.scheme != "unix" and not path.isdecimal()):
            return None
        if parts.port == 0:
            return None
        client = make(url)
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)
        pool.connection_kwargs.get("host", "").encode("idna")
        timeouts = [pool.connection_kwargs.get(option) or 1 for option in _TIMEOUTS]
        if not all(0 < seconds <= _LONGEST_TIMEOUT for seconds in timeouts):
            return None
    except (
        AttributeError,
        LookupError,
        MemoryError,
        RedisError,
        TypeError,
        UnboundLocalError,
        ValueError,
    ):
        # What redis-py makes of text for options that want objects, and 5.3 of ?protocol=two.
        return None
    return client
