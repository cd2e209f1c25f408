"""The commands of docs/operations.md turn a server into a cluster, and nobody is signed out."""

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import MovedError, RedisError

from sessiongate import SessionGate

from .conftest import Flavour
from .servers import NO_RETRY, Server, _free_port_of_two, server_binaries

PAGE = Path(__file__).parent.parent / "docs" / "operations.md"
WITH_CLI = {
    name: binary
    for name, binary in server_binaries().items()
    if binary.with_name("redis-cli").exists()
}
# One will do: it takes seconds, and what the servers do here is old.
BINARY = WITH_CLI.get(max(WITH_CLI, default=""))
PERSISTENT = ("--appendonly", "yes")
CLUSTERED = ("--cluster-enabled", "yes")


def steps() -> dict[str, list[str]]:
    """The commands that the page shows under "Growing into a cluster", by number of their step."""
    section = PAGE.read_text("utf-8").partition("## Growing into a cluster")[2]
    section = re.split(r"\n#{2,3} |\n```", section)[0]
    parts = re.split(r"^\*\*(\d)\. ", section, flags=re.MULTILINE)[1:]
    return {
        number: lines
        for number, text in zip(parts[::2], parts[1::2], strict=True)
        if (lines := re.findall(r"^    (\S.*)$", text, re.MULTILINE))
    }


class Operator:
    """Types what the page shows, with the addresses and folders of this test."""

    def __init__(self, servers: list[Server], folder: Path) -> None:
        binary = servers[0].binary
        self._steps = steps()
        self._port = _free_port_of_two()
        self._here = {
            "/tmp/seed": str(folder / "seed"),  # noqa: S108  # the page's
            "/var/lib/redis": str(servers[0].folder),
            "-p 7000": f"-p {self._port}",
            "--port 7000": f"--port {self._port} --bind 127.0.0.1",
            "-h 10.0.0.1 -p 6379": f"-p {servers[0].port}",
            **{f"10.0.0.{n}:6379": f"127.0.0.1:{s.port}" for n, s in enumerate(servers, start=1)},
            "redis-server ": f"{binary} ",
            "redis-cli ": f"{binary.with_name('redis-cli')} ",
        }

    def types(self, step: str, more: str = "") -> str:
        """All commands of a step, with `more` behind the first; returns what they printed."""
        first, *others = self._steps.pop(step)
        return "".join(map(self._run, (f"{first} {more}", *others)))

    def has_typed_all(self) -> bool:
        return not self._steps

    def close(self) -> None:
        """End the server of the first step, if something broke off before that did."""
        with suppress(RedisError), Redis(port=self._port, protocol=2, retry=NO_RETRY) as client:
            client.shutdown(nosave=True)

    def _run(self, line: str) -> str:
        for theirs, ours in self._here.items():
            line = line.replace(theirs, ours)
        deadline = time.monotonic() + 20
        while True:
            done = subprocess.run(
                ["bash", "-c", f"set -o pipefail; {line}"],  # noqa: S607  # it is wherever it is
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            # As the page says: what came too early is typed again.
            if "Nodes don't agree" not in done.stdout or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        assert not done.returncode, f"{line}\n{done.stdout}{done.stderr}"
        if "redis-server" in line:
            # It returns before it serves.
            wait_for(self._port, "CLUSTER INFO")
        return done.stdout


def wait_for(port: int, command: str, *lines: str) -> None:
    """Wait until a server is there and answers a command with all these lines."""
    deadline = time.monotonic() + 20
    with Redis(port=port, protocol=2, retry=NO_RETRY) as client:
        client.response_callbacks.clear()
        while True:
            with suppress(RedisError):
                told = client.execute_command(*command.split()).decode().split("\r\n")
                if set(lines) <= set(told):
                    return
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    """One server on its own, two empty nodes to add and one for a replica."""
    if BINARY is None:
        pytest.skip("no server here has its redis-cli beside it")
    made: list[Server] = []
    try:
        made.append(Server(BINARY, port=_free_port_of_two))
        made.extend(Server(BINARY, CLUSTERED, _free_port_of_two) for _ in range(3))
        yield made
    finally:
        for server in made:
            server.close()


def test_a_server_grows_into_a_cluster_and_nobody_is_signed_out(
    servers: list[Server], tmp_path: Path
) -> None:
    """After each step of the page every session is there, for both kinds of gate."""
    one, two, three, fourth = servers
    operator = Operator(servers, tmp_path)
    flavours = [Flavour("sync"), Flavour("async")]
    for flavour in flavours:
        flavour.logs_in = False  # the first server was started with no rules for a cluster
    try:
        plain = [flavour.gate_from_url(one.url) for flavour in flavours]
        kept = [gate.start(600, {"n": str(n)}) for n in range(300) for gate in plain]
        hers = [gate.start(600, {"n": "hers"}, subject="alice") for gate in plain]

        operator.types("1")
        wait_for(one.port, "INFO persistence", "aof_enabled:1", "aof_rewrite_in_progress:0")
        kept.append(plain[0].start(600, {"n": "late"}))
        operator.types("2")
        one.kill()  # it has ended: this collects it
        one.start((*PERSISTENT, *CLUSTERED))
        wait_for(one.port, "CLUSTER INFO", "cluster_state:ok")
        for gate in plain:
            assert all(gate.pget(token, "n") for token in (*kept, *hers))
            assert works(gate)
            assert len(gate.sessions("alice")) == len(hers)

        url = f"redis+cluster://127.0.0.1:{one.port},127.0.0.1:{two.port}"
        clustered = [flavour.gate_from_url(url) for flavour in flavours]
        assert all(works(gate) for gate in clustered)

        told = operator.types("4")
        for server in (one, two, three):
            wait_for(server.port, "CLUSTER INFO", "cluster_state:ok", "cluster_known_nodes:3")
        assert "cluster_state" in told
        assert "cluster_known_nodes" in told
        # Some slots will do: to move two thirds of them takes half a minute.
        weights = " ".join(f"{node_id(s)}={w}" for s, w in ((one, 50), (two, 1), (three, 1)))
        operator.types("5", f"--cluster-weight {weights}")
        assert two.client().dbsize()
        assert three.client().dbsize()
        for gate in clustered:
            assert all(gate.pget(token, "n") for token in (*kept, *hers))
            assert works(gate)
        assert clustered[0].end_all("alice", keep=hers[0]) == 1
        with pytest.raises(MovedError):
            assert [plain[0].pget(token, "n") for token in kept]

        operator.types("6")
        wait_for(fourth.port, "INFO replication", "role:slave", "master_link_status:up")
        assert operator.has_typed_all()
    finally:
        operator.close()
        for flavour in flavours:
            flavour.close()


def node_id(server: Server) -> str:
    with server.client() as client:
        found: bytes = client.execute_command("CLUSTER MYID")
        return found.decode()


def works(gate: SessionGate) -> bool:
    """Whether operations of every kind do what they are for, of several keys too."""
    visitor = gate.start(600, {"cart": "book"})
    gate.pset(visitor, "cart", "books")
    token = gate.renew(visitor, subject="bob")
    return gate.pget(token, "cart") == b"books" and gate.end_all("bob") == 1
