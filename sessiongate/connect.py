"""A URL becomes a redis-py client with the settings that a gate wants."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from redis import Redis, RedisCluster
from redis import __version__ as redis_version
from redis import asyncio as redis_asyncio
from redis.asyncio.cluster import ClusterNode as AsyncClusterNode
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.connection import parse_url
from redis.exceptions import RedisError
from redis.retry import Retry
from redis.sentinel import Sentinel

from .arguments import MISSING_HINT, type_of_setting, utf8
from .errors import ConfigurationError

MEMORY_URL = "memory://"
_SCHEMES = ("redis", "rediss", "unix", "memory")

AnyClient = TypeVar("AnyClient", Redis, redis_asyncio.Redis)

# redis-py's pool makes connections as they are needed and raises at its limit, 100 unless told
# otherwise; tasks that share a gate without its pipeline should meet their own limit first.
_MAX_CONNECTIONS = 10_000
_FIRST_SOUND_CACHE = 8
_TIMEOUTS = ("socket_timeout", "socket_connect_timeout")
_LONGEST_TIMEOUT = 10**9  # seconds; sockets refuse more when they connect
# Less than a gate's timeout, so that a call can try again; a sentinel has but one thing to say.
_TIMEOUT = 2.0
_SENTINEL_TIMEOUT = 1.0

_SENTINEL = "+sentinel"
_CLUSTER = "+cluster"
_PORTS = {_SENTINEL: 26_379, _CLUSTER: 6_379}
_SENTINEL_OPTIONS = {"sentinel_username": "username", "sentinel_password": "password"}

# In all: RESP2, since redis-py's HELLO fails before Redis 6. No retries of redis-py's own, since
# the gate knows which command may be sent twice.


class LaterCluster:
    """A synchronous cluster client that is yet to be made: redis-py's connects when it is."""

    def __init__(self, nodes: list[tuple[str, int]], options: dict[str, Any]) -> None:
        self._nodes = nodes
        self._options = options

    def __call__(self) -> RedisCluster:
        """The client, which has read the topology."""
        nodes = [ClusterNode(host, port) for host, port in self._nodes]
        return RedisCluster(startup_nodes=nodes, **self._options)


def client_from_url(url: str) -> Redis | LaterCluster:
    """A client of what is at `url`; it has not connected yet.

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
    if many := _Many.of(url):
        if many.kind == _CLUSTER:
            return LaterCluster(many.nodes, many.options)
        sentinel = Sentinel(many.nodes, sentinel_kwargs={**many.sentinel_options, "retry": retry})
        primary: Redis = sentinel.master_for(many.service, **many.options, retry=retry)
        return primary
    return _checked(url, lambda url: Redis.from_url(url, protocol=2, retry=retry))


def async_client_from_url(url: str) -> redis_asyncio.Redis | redis_asyncio.RedisCluster:
    """The same for asyncio."""
    url = _with_scheme(url)
    if url == MEMORY_URL:
        try:
            from fakeredis import FakeAsyncRedis, FakeServer  # noqa: PLC0415  # slow to import
        except ImportError:
            raise _memory_is_missing() from None
        return FakeAsyncRedis(server=FakeServer(), protocol=2)
    retry = AsyncRetry(NoBackoff(), 0)
    if many := _Many.of(url):
        if many.kind == _CLUSTER:
            nodes = [AsyncClusterNode(host, port) for host, port in many.nodes]
            return redis_asyncio.RedisCluster(
                startup_nodes=nodes, max_connections=_MAX_CONNECTIONS, **many.options
            )
        sentinel = AsyncSentinel(
            many.nodes, sentinel_kwargs={**many.sentinel_options, "retry": retry}
        )
        primary: redis_asyncio.Redis = sentinel.master_for(
            many.service, max_connections=_MAX_CONNECTIONS, **many.options, retry=retry
        )
        return primary
    return _checked(
        url,
        lambda url: redis_asyncio.Redis.from_url(
            url, protocol=2, retry=retry, max_connections=_MAX_CONNECTIONS
        ),
    )


class _Many(NamedTuple):
    """What a URL says that names several servers."""

    kind: str
    nodes: list[tuple[str, int]]
    service: str
    options: dict[str, Any]
    sentinel_options: dict[str, Any]

    @classmethod
    def of(cls, url: str) -> "_Many | None":
        """Of such a URL; None of any other."""
        scheme = url.partition("://")[0]
        kind = next((kind for kind in _PORTS if scheme.endswith(kind)), "")
        if not kind:
            return None
        many = cls._read(url, kind)
        if many is None:
            # Nothing of the URL, nor an error that led here: they may hold a password.
            raise ConfigurationError(
                "the URL names no hosts, ports, service or options that can be used: give "
                "redis+sentinel://user:password@host:26379,host:26379/mymaster/0?option=value or "
                "redis+cluster://user:password@host:7000,host:7001?option=value, and write special "
                "characters of a password as %2F and the like"
            )
        return many

    @classmethod
    def _read(cls, url: str, kind: str) -> "_Many | None":
        try:
            parts = urlsplit(url)
            words = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        except ValueError:
            return None
        login, at, hosts = parts.netloc.rpartition("@")
        names = unquote(parts.path).strip("/").split("/")
        service = names.pop(0) if kind == _SENTINEL else ""
        database = names.pop(0) if names else ""
        # An @ of a password has to be written as %40: before one that is not, hosts would be lost.
        if names or "@" in login or (kind == _SENTINEL) != bool(service):
            return None
        if kind == _CLUSTER and database.strip("0"):
            return None  # there is only database 0
        of_data = [(name, value) for name, value in words if name not in _SENTINEL_OPTIONS]
        single = parts._replace(
            scheme=parts.scheme.removesuffix(kind), path=f"/{database}", query=urlencode(of_data)
        )
        nodes: list[tuple[str, int]] = []
        for host in hosts.split(","):
            address = urlsplit(f"//{host}")
            one = single._replace(netloc=f"{login}{at}{host}").geturl()
            if not address.hostname or _made(one, _plain) is None:
                return None
            nodes.append((address.hostname, address.port or _PORTS[kind]))
        of_sentinels = [
            (_SENTINEL_OPTIONS[name], value) for name, value in words if name in _SENTINEL_OPTIONS
        ]
        return cls(kind, nodes, service, *_options(kind, parse_url(one), dict(of_sentinels)))


def _options(
    kind: str, options: dict[str, Any], login: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What redis-py is told for the servers that hold data, and for sentinels."""
    for name in ("host", "port", "path", *(["db"] if kind == _CLUSTER else [])):
        options.pop(name, None)
    if options.pop("connection_class", None):
        options["ssl"] = True
    theirs = {name: value for name, value in options.items() if name.startswith(("ssl", "socket"))}
    for name in _TIMEOUTS:
        options.setdefault(name, _TIMEOUT)
        theirs.setdefault(name, _SENTINEL_TIMEOUT)
    return {**options, "protocol": 2}, {**theirs, **login, "protocol": 2}


def _plain(url: str) -> Redis:
    return Redis.from_url(url, protocol=2)


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
    plain = scheme.lower().removesuffix(_SENTINEL).removesuffix(_CLUSTER)
    several = plain != scheme.lower()
    if not separator or plain not in (("redis", "rediss") if several else _SCHEMES):
        raise _not_understood()
    if plain == "memory" and url != MEMORY_URL:
        raise _not_understood()
    return url


def _not_understood() -> ConfigurationError:
    return ConfigurationError(
        "not a URL that a gate understands: give redis://host:6379/0, rediss://..., "
        "unix:///path/to/socket, redis+sentinel://host:26379,host:26379/mymaster, "
        "redis+cluster://host:7000,host:7001 or memory://, with options of redis-py behind a ?"
    )


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
        for option in _TIMEOUTS:
            if option not in parse_url(url):
                pool.connection_kwargs[option] = _TIMEOUT
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
