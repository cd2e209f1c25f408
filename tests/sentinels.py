"""A primary, two replicas and three sentinels that watch them: gone when this process is."""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self, cast

from redis import Redis
from redis.exceptions import RedisError

from .servers import NO_RETRY, Server, _die_with_parent

NAME = "mymaster"
_REPLICAS = 2
_SENTINELS = 3
# A vote that nobody wins is held again after twice that.
_FAILOVER_TIMEOUT = 3.0
_WAIT_SECONDS = 40.0


class _Sentinel(Server):
    """One sentinel. What it learns it keeps in its configuration file."""

    def __init__(
        self, binary: Path, primary: Server, down_after: float, lines: Sequence[str]
    ) -> None:
        self._watched = primary.port
        self._down_after = down_after
        self._lines = lines
        super().__init__(binary)

    def _spawn(self, port: int, options: Sequence[str]) -> subprocess.Popen[bytes]:
        config = self.folder / "sentinel.conf"
        if not self.port:  # it has not run yet
            lines = [
                "bind 127.0.0.1",
                f"port {port}",
                f"dir {self.folder}",
                f"sentinel monitor {NAME} 127.0.0.1 {self._watched} 2",
                f"sentinel down-after-milliseconds {NAME} {self._down_after * 1000:.0f}",
                f"sentinel failover-timeout {NAME} {_FAILOVER_TIMEOUT * 1000:.0f}",
                f"sentinel parallel-syncs {NAME} {_REPLICAS}",
                *self._lines,
            ]
            config.write_text("\n".join([*lines, ""]))
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [self.binary, config, "--sentinel", *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  # as a Server's
            )


class Sentinels:
    """Three servers that hold the same data and three sentinels that say which is the primary.

    The thread that makes it and restarts its servers has to live as long as they shall.

    Args:
        binary: the server; with `--sentinel` it is one.
        data_options: of the servers, as for `Server`. Their default user stays without a password.
        sentinel_lines: more lines of the sentinels' configuration, as `user ...`; likewise.
        down_after: seconds without a sign of life after which they take a server for dead. They
            look once a second: at one second they now and then do so with a sound one.
    """

    def __init__(
        self,
        binary: Path,
        data_options: Sequence[str] = (),
        sentinel_lines: Sequence[str] = (),
        down_after: float = 1.0,
    ) -> None:
        self.binary = binary
        self.servers: list[Server] = []
        self.sentinels: list[Server] = []
        options = ("--repl-diskless-sync-delay", "0", *data_options)
        try:
            for _ in range(1 + _REPLICAS):
                self.servers.append(Server(binary, options))
            for replica in self.servers[1:]:
                _ask(replica, "SLAVEOF", "127.0.0.1", self.servers[0].port)
            for _ in range(_SENTINELS):
                self.sentinels.append(
                    _Sentinel(binary, self.servers[0], down_after, sentinel_lines)
                )
            self.wait()
        except BaseException:
            self.close()
            raise

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where the sentinels are, as redis-py's `Sentinel` wants it."""
        return [("127.0.0.1", sentinel.port) for sentinel in self.sentinels]

    @property
    def url(self) -> str:
        hosts = ",".join(f"{host}:{port}" for host, port in self.addresses)
        return f"redis+sentinel://{hosts}/{NAME}/0"

    def named(self) -> set[int]:
        """The ports of the primaries that the sentinels name now: one, unless they disagree."""
        ports = set()
        for sentinel in self.sentinels:
            answer = _ask(sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)
            ports.add(int(cast("list[bytes]", answer)[1]))
        return ports

    def primary(self) -> Server:
        """The server that the sentinels say is the primary, once they agree."""
        named: set[int] = set()

        def agree() -> bool:
            nonlocal named
            named = self.named()
            return len(named) == 1

        self._wait(agree)
        return next(server for server in self.servers if server.port in named)

    def replicas(self) -> list[Server]:
        """The other servers, whatever has become of them."""
        primary = self.primary()
        return [server for server in self.servers if server is not primary]

    def client(self) -> Redis:
        """A client to look into the primary with, as it is now."""
        return self.primary().client()

    def wait(self, replicas: int = _REPLICAS, seconds: float = _WAIT_SECONDS) -> None:
        """Wait until everything is as it should be.

        The sentinels agree on a primary and know each other, and so many replicas are in sync and
        could take its place.
        """
        self._wait(lambda: self._is_ready(replicas), seconds)

    def failover(self) -> Server:
        """Let a replica take the place of the living primary, and return it."""
        old = self.primary()
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                _ask(self.sentinels[0], "SENTINEL", "FAILOVER", NAME)
                break
            except RedisError:  # "in progress", or no replica that it knows well enough
                assert time.monotonic() < deadline
                time.sleep(0.05)
        return self.successor(old)

    def successor(self, old: Server) -> Server:
        """The primary that comes after this one, once the sentinels agree on it."""
        self._wait(lambda: len(named := self.named()) == 1 and old.port not in named)
        return self.primary()

    def mend(self) -> None:
        """Make everything as it should be, and wait until it is.

        Servers that are dead or frozen are there again. Sentinels take ten seconds to make a
        replica of a primary that came back.
        """
        for server in (*self.servers, *self.sentinels):
            if _is_running(server):
                server.resume()
            else:
                server.start()
        self._wait(self._is_mended)

    def _is_mended(self) -> bool:
        primary = self.primary()
        for server in self.servers:
            if server is not primary and not _is_replica(server, primary):
                _ask(server, "SLAVEOF", "127.0.0.1", primary.port)
        return self._is_ready(_REPLICAS)

    def emptied(self) -> Self:
        """Without any data."""
        with self.client() as client:
            client.flushall()
        return self

    def close(self) -> None:
        # The sentinels first: they have nothing to decide any more.
        for server in (*self.sentinels, *self.servers):
            server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self, ready: Callable[[], bool], seconds: float = _WAIT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while True:
            # Who is made a replica drops its clients.
            with contextlib.suppress(RedisError):
                if ready():
                    return
            assert time.monotonic() < deadline, self._state()
            time.sleep(0.05)

    def _state(self) -> str:
        """What everybody says, for somebody to read."""
        said = []
        for server in (*self.servers, *self.sentinels):
            commands: list[tuple[str, ...]] = [("ROLE",)]
            if server in self.sentinels:
                commands = [("SENTINEL", what, NAME) for what in ("MASTER", "SLAVES")]
            for command in commands:
                try:
                    said.append(f"{server.port}: {_ask(server, *command)!r}")
                except RedisError as error:
                    said.append(f"{server.port}: {error!r}")
        return "\n".join(["they never got there:", *said])

    def _is_ready(self, replicas: int) -> bool:
        primary = self.primary()
        in_sync = {server.port for server in self.servers if _follows(server, primary)}
        for sentinel in self.sentinels:
            state = _pairs(_ask(sentinel, "SENTINEL", "MASTER", NAME))
            if state["flags"] != "master" or int(state["num-other-sentinels"]) < _SENTINELS - 1:
                return False
            known = [_pairs(one) for one in _list(_ask(sentinel, "SENTINEL", "SLAVES", NAME))]
            offsets: dict[bool, list[int]] = {True: [], False: [-1]}
            for one in known:
                if one["flags"] == "slave":
                    offset = int(one["slave-repl-offset"])
                    offsets[int(one["port"]) in in_sync].append(offset)
            # It would also choose a primary that came back, which it takes for a replica already.
            if len(offsets[True]) < replicas or min(offsets[True]) <= max(offsets[False]):
                return False
        # What counts in the end: they acknowledge writes. A channel without listeners is one.
        with contextlib.suppress(RedisError), _client(primary) as client:
            client.publish("ready", "")
            return int(client.execute_command("WAIT", replicas, 100)) >= replicas
        return False


@contextlib.contextmanager
def frozen(*servers: Server) -> Iterator[None]:
    """These servers stand still meanwhile: to others they are there, and do not answer."""
    for server in servers:
        server.pause()
    try:
        yield
    finally:
        for server in servers:
            server.resume()


def _client(server: Server) -> Redis:
    return Redis(
        port=server.port,
        protocol=2,
        retry=NO_RETRY,
        socket_timeout=2,
        single_connection_client=True,
    )


def _ask(server: Server, *command: object) -> object:
    """What a server answers, without redis-py's callbacks, whose versions differ."""
    with _client(server) as client:
        connection = client.connection
        assert connection is not None
        connection.send_command(*command)
        return connection.read_response()


def _is_running(server: Server) -> bool:
    process = server._process
    return process is not None and process.poll() is None


def _is_replica(server: Server, primary: Server, state: bytes | None = None) -> bool:
    """Whether it is a replica of that one, and its link is in that state."""
    match _ask(server, "ROLE"):
        case [b"slave", _, port, link, _]:
            return port == primary.port and state in (None, link)
    return False


def _follows(server: Server, primary: Server) -> bool:
    """Whether it is a replica of that one, with a sound link; not if it does not answer."""
    with contextlib.suppress(RedisError):
        return _is_replica(server, primary, b"connected")
    return False


def _list(answer: object) -> list[object]:
    return cast("list[object]", answer)


def _pairs(answer: object) -> dict[str, str]:
    words = [cast("bytes", word).decode() for word in _list(answer)]
    return dict(zip(words[::2], words[1::2], strict=True))
