"""Fixtures: memory, every server found and a cluster, and gates of both kinds on each."""

import asyncio
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import metadata
from typing import Self, cast
from urllib.parse import urlsplit

import pytest
from fakeredis import FakeAsyncRedis, FakeRedis, FakeServer
from redis import ConnectionPool, Redis, RedisCluster
from redis import asyncio as redis_asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.crc import key_slot

from sessiongate import AsyncSessionGate, SessionGate

from . import privileges
from .servers import NO_RETRY, Cluster, Server, server_binaries

# redis-py parses the metadata of its own package for every client: a twelfth of the suite's time.
metadata.version = cache(metadata.version)

SIGN_KEY = "a sign key of the tests, 32 bytes and more"


def _version(name: str) -> list[int]:
    return [int(part) for part in name.rpartition("-")[2].split(".") if part.isdecimal()]


_BINARIES = server_binaries()
_running: dict[str, Server | Cluster] = {}

# What the clusters are made of: Redis 7 if there is one, else the newest.
CLUSTERED = max(_BINARIES, key=lambda name: ("redis-7" in name, _version(name)), default="")

# Options of a client, and of a gate, that take more than docs/security.md gives to every gate.
_TAKE_MORE = {"client_name", "db", "health_check_interval", "load_balancing_strategy", "prefix"}
# With an encoding such as UTF-16, redis-py does not understand that its login succeeded.
_LOGS_IN_ITSELF = {"credential_provider", "encoding", "password", "username"}

POOLED = "async-pooled"
FLAVOURS = ["sync", "async", POOLED]

AnyClient = Redis | redis_asyncio.Redis | RedisCluster | redis_asyncio.RedisCluster
Key = str | bytes | list[str | bytes]


def _has_users(name: str) -> bool:
    """Whether a server that tests go under that name has users: memory has none."""
    binary = _BINARIES.get(CLUSTERED if name == "cluster" else name)
    return binary is not None and privileges.has_users(binary)


@cache
def running(name: str) -> Server:
    """The suite's server of that name, started at its first use."""
    server = _running[name] = Server(_BINARIES[name])
    return server


def new_cluster(replicas: int = 0) -> Cluster:
    """A cluster of three primaries."""
    return Cluster(_BINARIES[CLUSTERED], replicas)


@cache
def running_cluster() -> Cluster:
    """The suite's cluster, started at its first use. A test leaves its slots where they are."""
    cluster = _running["cluster"] = new_cluster()
    return cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An asynchronous gate does not meet every version of a server where scripts alone are tested.

    What differs between versions, the scripts do: they are the same ones. Without its pipeline it
    nowhere does.
    """
    met = {"memory", "cluster", CLUSTERED}

    def adds_something(item: pytest.Item) -> bool:
        call = getattr(item, "callspec", None)  # of tests with parameters alone
        params = call.params if call else {}
        of_scripts = getattr(getattr(item, "module", None), "OF_SCRIPTS", False)
        if params.get("flavour") not in ((POOLED, "async") if of_scripts else (POOLED,)):
            return True
        return {params.get(of, CLUSTERED) for of in ("backend", "server", "sentinels")} <= met

    items[:] = filter(adds_something, items)


def pytest_sessionfinish() -> None:
    for server in _running.values():
        server.close()


class Flavour:
    """Gates of one kind, and clients for them; an asynchronous gate has blocking methods here.

    So one test states a behaviour for both.

    Clients log in as the user that docs/security.md gives to gates, unless `logs_in` is off: where
    servers have no users.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.logs_in = _has_users(CLUSTERED)
        self.is_async = name != "sync"
        self._auto_pipeline = name != POOLED
        self.no_retry = AsyncRetry(NoBackoff(), 0) if self.is_async else NO_RETRY
        self.runner = asyncio.Runner()
        self._close: list[Callable[[], object]] = []

    def client(self, port: int, **options: object) -> AnyClient:
        """A client as an application has it, with options of redis-py."""
        kind = redis_asyncio.Redis if self.is_async else Redis
        client = kind(port=port, **{"protocol": 2, **self.login(options), **options})  # type: ignore[arg-type]  # options are redis-py's own
        self.closes(client)
        return client

    def closes(self, client: AnyClient) -> None:
        """Close that client in the end, after the gates that come later."""
        if isinstance(client, Redis | RedisCluster):
            self._close.append(client.close)
        else:
            self._close.append(client.aclose)

    def cluster_client(self, cluster: Cluster, **options: object) -> AnyClient:
        """A cluster client as an application has it, with options of redis-py."""
        kind = redis_asyncio.RedisCluster if self.is_async else RedisCluster
        client: RedisCluster | redis_asyncio.RedisCluster = kind(
            host="127.0.0.1",
            port=cluster.port,
            **{"protocol": 2, **self.login(options), **options},  # type: ignore[arg-type]  # likewise
        )
        self.closes(client)
        return client

    def memory(self, server: FakeServer, **options: object) -> AnyClient:
        """A client of fakeredis."""
        kind = FakeAsyncRedis if self.is_async else FakeRedis
        return kind(server=server, **{"protocol": 2, **options})  # type: ignore[arg-type]  # likewise

    def gate(self, client: AnyClient, sign_key: Key = SIGN_KEY, **options: object) -> SessionGate:
        """A gate on that client."""
        if isinstance(client, Redis | RedisCluster):
            return SessionGate(client, sign_key=sign_key, **options)  # type: ignore[arg-type]  # options are the gate's own
        options.setdefault("auto_pipeline", self._auto_pipeline)
        gate = AsyncSessionGate(client, sign_key=sign_key, **options)  # type: ignore[arg-type]  # likewise
        return self._blocking(gate)

    def gate_from_url(self, url: str, **options: object) -> SessionGate:
        """A gate on a client of its own."""
        url = self._with_login(url)
        if self.is_async:
            options.setdefault("auto_pipeline", self._auto_pipeline)
            return self._blocking(AsyncSessionGate.from_url(url, sign_key=SIGN_KEY, **options))  # type: ignore[arg-type]  # likewise
        gate = SessionGate.from_url(url, sign_key=SIGN_KEY, **options)  # type: ignore[arg-type]  # likewise
        self._close.append(gate.close)
        return gate

    def login(self, options: Mapping[str, object]) -> dict[str, str]:
        """Options that log a client in, unless it does so itself or cannot."""
        if not self.logs_in or _LOGS_IN_ITSELF & options.keys():
            return {}
        user = privileges.MORE if _TAKE_MORE & options.keys() else privileges.USER
        return {"username": user, "password": privileges.PASSWORD}

    def _with_login(self, url: str) -> str:
        parts = urlsplit(url)
        if not self.logs_in or parts.scheme == "memory" or "@" in parts.netloc:
            return url
        in_another_database = "db=" in parts.query or (
            parts.scheme != "unix" and parts.path.rpartition("/")[2] not in ("", "0")
        )
        user = privileges.MORE if in_another_database else privileges.USER
        return url.replace("://", f"://{user}:{privileges.PASSWORD}@", 1)

    def _blocking(self, gate: AsyncSessionGate) -> SessionGate:
        self._close.append(gate.aclose)
        return cast("SessionGate", Blocking(gate, self.runner))

    def close(self) -> None:
        # Gates before the clients that they were made with.
        for close in reversed(self._close):
            closing = close()
            if inspect.isawaitable(closing):
                self.runner.run(awaited(closing))
        self.runner.close()


async def awaited(awaitable: object) -> object:
    """For a runner, which takes coroutines only."""
    return await awaitable  # type: ignore[misc]  # it is awaitable


def apart(subject: str, start: Callable[[], str], end: Callable[[str], object]) -> str:
    """A session in another slot than the subject's index; once in 16,384 starts it has the same.

    On a cluster it takes more steps to sign in.
    """
    while key_slot((token := start())[3:19].encode()) == key_slot(subject.encode()):
        end(token)
    return token


def end_of(gate: SessionGate, token: str) -> float:
    """When a session ends, in seconds since 1970.

    A script asks for the time and then for the time that is left: if it is held up in between, what
    it tells is too early. Not every time.
    """
    return max(gate.info(token).expires_at.timestamp() for _ in range(3))


def pool_of(client: AnyClient) -> ConnectionPool:
    """The pool of a client that has one, as cluster clients do not."""
    assert isinstance(client, Redis | redis_asyncio.Redis)
    # An asynchronous one has all that the tests look at.
    return cast("ConnectionPool", client.connection_pool)


class Blocking:
    """An asynchronous gate, each of whose methods is run to its end on the event loop."""

    def __init__(self, gate: AsyncSessionGate, runner: asyncio.Runner) -> None:
        self.awaited = gate
        self._runner = runner

    def __getattr__(self, name: str) -> object:
        found = getattr(self.awaited, "aclose" if name == "close" else name)
        if not inspect.iscoroutinefunction(found):
            return found
        return lambda *args, **options: self._runner.run(found(*args, **options))

    def __repr__(self) -> str:
        return repr(self.awaited).replace("AsyncSessionGate", "SessionGate")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self.awaited.aclose())


class Backend:
    """Where sessions are kept, and the kind of its gates.

    That is a server, a cluster (`server` is one of it) or fakeredis in the process (`server` is
    None).
    """

    def __init__(
        self, server: Server | None, flavour: Flavour, cluster: Cluster | None = None
    ) -> None:
        self.server = server
        self.cluster = cluster
        self.flavour = flavour
        if server is not None:
            flavour.logs_in = privileges.has_users(server.binary)
        self._memory = FakeServer()

    def client(self) -> Redis:
        """A client to look into the backend with."""
        if self.cluster is not None:
            return self.cluster.client()
        if self.server is None:
            return FakeRedis(server=self._memory, protocol=2)
        return Redis(port=self.server.port, protocol=2)

    def gates_client(self, **options: object) -> AnyClient:
        """A client for a gate, with options of redis-py."""
        if self.cluster is not None:
            return self.flavour.cluster_client(self.cluster, **options)
        if self.server is None:
            return self.flavour.memory(self._memory, **options)
        return self.flavour.client(self.server.port, **options)

    def gate(self, sign_key: Key = SIGN_KEY, **options: object) -> SessionGate:
        """A gate on a client of its own."""
        on_real_one = self.server is not None
        login = self.flavour.login(options) if on_real_one else {}
        return self.flavour.gate(self.gates_client(**login), sign_key, **options)


@pytest.fixture(params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> Iterator[Flavour]:
    """Both kinds of gate, the asynchronous one with its pipeline and without."""
    flavour = Flavour(request.param)
    # Of whatever fixture it is a parameter, a test meets servers of one kind.
    met = [value for value in request.node.callspec.params.values() if isinstance(value, str)]
    flavour.logs_in = _has_users(next((name for name in met if name in _BINARIES), CLUSTERED))
    yield flavour
    flavour.close()


@pytest.fixture(params=["memory", *_BINARIES, "cluster"] if _BINARIES else ["memory"])
def backend(request: pytest.FixtureRequest, flavour: Flavour) -> Backend:
    """Memory, every server and a cluster, empty, with gates of both kinds."""
    if request.param == "memory":
        return Backend(None, flavour)
    if request.param == "cluster":
        cluster = running_cluster()
        cluster.flushall()
        return Backend(cluster.servers[0], flavour, cluster)
    return Backend(_emptied(running(request.param)), flavour)


@pytest.fixture(params=list(_BINARIES))
def server(request: pytest.FixtureRequest) -> Server:
    """Every server, empty. A test leaves it running and with the settings it had."""
    return _emptied(running(request.param))


@pytest.fixture
def own_server(server: Server) -> Iterator[Server]:
    """A server of this test alone, of every kind: to be stopped, reconfigured, filled."""
    with Server(server.binary) as own:
        yield own


@pytest.fixture
def gate(backend: Backend) -> SessionGate:
    """A gate of both kinds on memory, on every server and on a cluster."""
    return backend.gate()


def _emptied(server: Server) -> Server:
    with Redis(port=server.port, protocol=2, retry=NO_RETRY) as client:
        client.flushall()
    return server
