"""Fixtures: every server found, memory beside them, and gates on each."""

from collections.abc import Iterator
from functools import cache

import pytest
from fakeredis import FakeRedis, FakeServer
from redis import Redis

from sessiongate import SessionGate

from .servers import Server, server_binaries

SIGN_KEY = "a sign key of the tests, 32 bytes and more"

_BINARIES = server_binaries()
_running: dict[str, Server] = {}


@cache
def running(name: str) -> Server:
    """The suite's server of that name, started at its first use."""
    _running[name] = Server(_BINARIES[name])
    return _running[name]


def pytest_sessionfinish() -> None:
    for server in _running.values():
        server.close()


class Backend:
    """Where sessions are kept: a server, or fakeredis in the process."""

    def __init__(self, server: Server | None) -> None:
        self.server = server
        self._memory = FakeServer()

    def client(self, **options: object) -> Redis:
        """A new client of this backend, with options of redis-py."""
        if self.server is None:
            return FakeRedis(server=self._memory, **{"protocol": 2, **options})  # type: ignore[arg-type]  # options are redis-py's own
        return Redis(port=self.server.port, **{"protocol": 2, **options})  # type: ignore[arg-type]  # options are redis-py's own

    def gate(
        self, sign_key: str | bytes | list[str | bytes] = SIGN_KEY, **options: object
    ) -> SessionGate:
        """A gate on a client of its own."""
        return SessionGate(self.client(), sign_key=sign_key, **options)  # type: ignore[arg-type]  # options are the gate's own


@pytest.fixture(params=["memory", *_BINARIES])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Memory and every server, empty."""
    if request.param == "memory":
        return Backend(None)
    return Backend(_emptied(running(request.param)))


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
    """A gate on memory and on every server."""
    return backend.gate()


def _emptied(server: Server) -> Server:
    with server.client() as client:
        client.flushall()
    return server
