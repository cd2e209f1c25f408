"""A URL becomes a redis-py client with the settings that a gate wants."""

import re
from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple, TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from redis import Redis, RedisCluster
from redis import __version__ as redis_version
from redis import asyncio as redis_asyncio
from redis.asyncio.client import Pipeline as AsyncPipeline
from redis.asyncio.cluster import ClusterNode as AsyncClusterNode
from redis.asyncio.cluster import ClusterPipeline as AsyncClusterPipeline
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.cluster import ClusterNode, ClusterPipeline
from redis.connection import ConnectionPool, SSLConnection, UnixDomainSocketConnection, parse_url
from redis.exceptions import RedisError
from redis.retry import Retry
from redis.sentinel import Sentinel

from .arguments import MISSING_HINT, type_of_setting, utf8
from .errors import ConfigurationError

MEMORY_URL = "memory://"
_SCHEMES = ("redis", "rediss", "unix", "memory")
_PIPELINES = (Pipeline, ClusterPipeline, AsyncPipeline, AsyncClusterPipeline)

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

# What is wrong with a URL is told in words of our own: any of its own may be of a password.
_CUT_PASSWORD = "is there a `#`, `/`, `?` or `@` in the password? Write %23, %2F, %3F, %40"  # noqa: S105  # none
_NO_PORT = f"the port is no number: {_CUT_PASSWORD}"
_NO_HOST = (
    "the host cannot be read: write [::1] for an IPv6 address, and special characters of a "
    "password as %5B and the like"
)
_LONGEST_OPTION = 40  # characters that are told of a name
_ARGUMENTS = (
    *("sign_key", "prefix", "max_sessions", "on_overflow", "timeout", "min_replicas"),
    *("auto_pipeline", "max_waiting"),
)

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
            takes = signature(redis_asyncio.RedisCluster).parameters
            if lacking := [name for name in many.options if name not in takes]:
                # A name that is one of redis-py's: the options were tried on a single server.
                fault = f"option `{lacking[0]}` is none of redis-py's cluster client for asyncio"
                raise _unusable(url, fault)
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
        if isinstance(many, str):
            raise _unusable(url, many)
        return many

    @classmethod
    def _read(cls, url: str, kind: str) -> "_Many | str":
        """What the URL says; or what is wrong with it."""
        parts = _split(url)
        if parts is None:
            return _NO_HOST
        try:
            words = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        except ValueError:
            return "an option is written as name=value, with an & before the next one"
        login, at, hosts = parts.netloc.rpartition("@")
        names = unquote(parts.path).strip("/").split("/")
        service = names.pop(0) if kind == _SENTINEL else ""
        database = names.pop(0) if names else ""
        if fault := _first(
            {
                # Before an @ of a password, hosts would be lost.
                "there are several `@`: user and password stand once, before the first host, and "
                "an `@` in them is %40": "@" in login,
                "the sentinel URL names no service: redis+sentinel://host:26379/mymaster": (
                    kind == _SENTINEL and not service
                ),
                "a cluster has database 0 only": (
                    kind == _CLUSTER and bool(names or database.strip("0"))
                ),
                "behind the service stands the database and nothing else: "
                "redis+sentinel://host:26379/mymaster/0": bool(names),
            }
        ):
            return fault
        of_data = [(name, value) for name, value in words if name not in _SENTINEL_OPTIONS]
        single = parts._replace(
            scheme=parts.scheme.removesuffix(kind), path=f"/{database}", query=urlencode(of_data)
        )
        nodes: list[tuple[str, int]] = []
        for host in hosts.split(","):
            address = _split(f"//{host}")
            one = single._replace(netloc=f"{login}{at}{host}").geturl()
            if address is None or not address.hostname:
                return "a host is missing: host:port,host:port stands behind the `//` or an `@`"
            if _made(one, _plain) is None:
                return _fault(one, _plain)
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


def not_a_client(client: object, kinds: str, gate: str) -> ConfigurationError:
    """What a gate says to what is no client of a kind that it takes, and what does take it.

    Args:
        client: what it was given.
        kinds: the names of what it takes.
        gate: its own name.
    """
    hint = ""
    if isinstance(client, str):
        hint = f": for a URL use {gate}.from_url(url, ...)"
    elif isinstance(client, _PIPELINES):
        hint = ": give it the client that made this pipeline"
    elif isinstance(client, redis_asyncio.Redis | redis_asyncio.RedisCluster):
        hint = ": use AsyncSessionGate for it"
    elif isinstance(client, Redis | RedisCluster):
        hint = ": use SessionGate for it"
    kind = type(client)
    return ConfigurationError(f"client is a {kinds}, not {kind.__module__}.{kind.__name__}{hint}")


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
        raise _unusable(url, _fault(url, make))
    return client


def _unusable(url: str, fault: str) -> ConfigurationError:
    # Nothing of the URL's values, nor an error that led here: they may hold a password.
    if fault != _NO_PORT and re.search(r"://.*[/?#].*@", url, re.DOTALL):
        # What looks like an option may be what a password goes on with.
        fault = f"an `@` stands behind the host: {_CUT_PASSWORD}"
    return ConfigurationError(f"the URL cannot be used: {fault}")


def _fault(url: str, make: Callable[[str], AnyClient]) -> str:
    """What is wrong with the URL of one server of which no client could be made."""
    parts = _split(url)
    if parts is None:
        return _NO_HOST
    return (
        _fault_of_address(parts)
        or _fault_of_options(parts, make)
        or _first({_NO_HOST: not _is_host(parts.hostname or "")})
        or "it names no host, port, database or path that can be used, or options that do not go "
        "together: give redis://user:password@host:6379/0?option=value, and write special "
        "characters of a password as %2F and the like"
    )


def _fault_of_address(parts: SplitResult) -> str:
    path = unquote(parts.path).strip("/")
    no_port = _port(parts) == 0  # which redis-py takes for 6379
    # What stands behind the first colon, but for those of an IPv6 address.
    digits = parts.netloc.rpartition("@")[2].rpartition("]")[2].partition(":")[2]
    return _first(
        {
            _NO_PORT: no_port and not (digits.isascii() and digits.isdigit()),
            "the port is none of 1 to 65535": no_port,
            "a `#` may not stand in a URL: write %23 if the password has one": bool(parts.fragment),
            # redis-py takes what is no database for database 0.
            "the database, behind the last `/`, is a number": (
                parts.scheme != "unix" and bool(path) and not path.isdecimal()
            ),
        }
    )


def _fault_of_options(parts: SplitResult, make: Callable[[str], AnyClient]) -> str:
    base = "unix:///socket" if parts.scheme == "unix" else f"{parts.scheme}://localhost"
    nameable = True
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if value and _made(f"{base}?{urlencode([(name, value)])}", make) is None:
            is_name = name.isascii() and name.isidentifier() and len(name) <= _LONGEST_OPTION
            if not (nameable and is_name):
                return "an option is none of redis-py's, or has a value that it does not take"
            return _fault_of_option(parts.scheme, name)
        # Behind a password, what looks like an option may be what follows an & in it.
        nameable = nameable and "pass" not in name.lower()
    return ""


def _fault_of_option(scheme: str, name: str) -> str:
    if name in _ARGUMENTS:
        return f"`{name}` is an argument of from_url, not an option of the URL"
    kinds = (*SSLConnection.__mro__, UnixDomainSocketConnection, ConnectionPool)
    if not any(name in signature(kind).parameters for kind in kinds):
        return f"option `{name}` is none of redis-py's"
    if name.startswith("ssl") and scheme != "rediss":
        return f"option `{name}` is one of TLS: that is rediss, not {scheme}"
    return f"option `{name}` cannot have the value that it is given"


def _first(faults: dict[str, bool]) -> str:
    """The first of them that is so; nothing if none is."""
    return next((fault for fault, is_so in faults.items() if is_so), "")


# These return nothing useful rather than raise: an error of theirs may hold a password.


def _split(url: str) -> SplitResult | None:
    try:
        return urlsplit(url)
    except ValueError:
        return None


def _port(parts: SplitResult) -> int | None:
    """The port of a URL; 0 if it is none."""
    try:
        return parts.port
    except ValueError:
        return 0


def _is_host(name: str) -> bool:
    try:
        unquote(name).encode("idna")
    except UnicodeError:
        return False
    return True


def _made(url: str, make: Callable[[str], AnyClient]) -> AnyClient | None:
    """The client, unless something of its URL would fail when it connects, or be passed over."""
    try:
        if _fault_of_address(urlsplit(url)):
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
