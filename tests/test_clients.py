"""Clients of every kind, threads and forks: one gate serves them all."""

import subprocess
import sys
import textwrap
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from fakeredis import FakeRedis
from redis import BlockingConnectionPool, Connection, ConnectionPool, Redis, RedisCluster
from redis._parsers import _RESP2Parser
from redis.cache import CacheConfig

from sessiongate import PayloadNotFoundError, SessionGate, SessionNotFoundError

from .conftest import CLUSTERED, SIGN_KEY, Backend, Flavour, running, running_cluster
from .servers import NO_RETRY, Server, free_port

BINARY = bytes(range(256))


def tour(gate: SessionGate) -> None:
    """All six operations, with data that no text encoding survives."""
    token = gate.start(300, {"user": BINARY})
    assert gate.pget(token, "user") == BINARY
    gate.pset(token, "user", "text")
    assert gate.pget(token, "user") == b"text"
    gate.expire(token, 200)
    gate.pdel(token, "user")
    with pytest.raises(PayloadNotFoundError):
        gate.pget(token, "user")
    gate.end(token)
    with pytest.raises(SessionNotFoundError):
        gate.end(token)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decode_responses": True},
        {"decode_responses": True, "encoding": "utf-16"},
        {"protocol": 3},
        {"protocol": 3, "decode_responses": True},
        {"health_check_interval": 1},
        {"single_connection_client": True},
        {"single_connection_client": True, "decode_responses": True},
        {"db": 3},
    ],
    ids=repr,
)
def test_clients_as_applications_have_them(backend: Backend, options: dict[str, object]) -> None:
    """Data is bytes, and errors are ours, whatever the client decodes, speaks or pools."""
    if backend.cluster and {"db", "single_connection_client", "encoding"} & options.keys():
        pytest.skip("redis-py's cluster client has no such option, or fails with it")
    if options.get("protocol") == 3 and backend.server and not speaks_resp3(backend.server):
        pytest.skip("redis-py speaks RESP3 with Redis 6 and later only")
    if "health_check_interval" in options and backend.server is None and backend.flavour.is_async:
        pytest.skip("fakeredis 2.40 fails health checks under asyncio, without a gate as well")
    tour(backend.flavour.gate(backend.gates_client(**options)))


def speaks_resp3(server: Server) -> bool:
    try:
        return bool(Redis(port=server.port, protocol=3).ping())
    except redis.ResponseError:
        return False


def test_a_client_without_hiredis(server: Server) -> None:
    """The parser in Python serves as well as the one in C."""
    pool = ConnectionPool(port=server.port, protocol=2, parser_class=_RESP2Parser)
    tour(SessionGate(Redis(connection_pool=pool), sign_key=SIGN_KEY))


def test_a_client_with_a_blocking_pool(server: Server) -> None:
    """Threads wait for a connection if that is how the application's pool works."""
    pool = BlockingConnectionPool(port=server.port, protocol=2, max_connections=2, timeout=10)
    gate = SessionGate(Redis(connection_pool=pool), sign_key=SIGN_KEY)
    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(tour, gate) for _ in range(40)]:
            done.result()


def test_a_client_with_client_side_caching(server: Server) -> None:
    """A caching client works, and never serves a payload from its cache."""
    client = Redis(port=server.port, protocol=3, cache_config=CacheConfig(), retry=NO_RETRY)
    try:
        client.ping()
    except (redis.ConnectionError, redis.ResponseError):
        pytest.skip("redis-py caches with Redis 7.4 and later only")
    tour(SessionGate(client, sign_key=SIGN_KEY))


@pytest.mark.parametrize("kind", ["server", "cluster"])
def test_a_function_of_the_application_on_connect(kind: str) -> None:
    """What a client does with each new connection is done with those of a gate as well."""
    seen: list[object] = []

    def on_connect(connection: Connection) -> None:
        if kind == "server":
            connection.on_connect()
        seen.append(connection)

    options = {"protocol": 2, "redis_connect_func": on_connect, "host": "127.0.0.1"}
    client = (
        Redis(port=running(CLUSTERED).port, **options)  # type: ignore[arg-type]  # options are redis-py's own
        if kind == "server"
        else RedisCluster(port=running_cluster().port, **options)  # type: ignore[arg-type]  # likewise
    )
    gate = SessionGate(client, sign_key=SIGN_KEY)
    seen.clear()
    token = gate.start(300)
    assert len(seen) == 1
    gate.touch(token)
    assert len(seen) == 1
    gate.close()
    client.close()


def test_urls(flavour: Flavour, server: Server) -> None:
    """A gate from a URL works over TCP, over a socket, and in the database that it names."""
    for url in (server.url, f"redis://127.0.0.1:{server.port}/5", f"unix://{server.socket}?db=5"):
        with flavour.gate_from_url(url) as gate:
            tour(gate)
            gate.start(300)
    assert server.client().info("keyspace")["db5"]["keys"] == 2


@pytest.mark.filterwarnings(
    # redis-py leaves the socket to the garbage collector when the TLS handshake fails.
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_a_url_with_tls(flavour: Flavour, server: Server, tmp_path: Path) -> None:
    """A gate from a rediss:// URL speaks TLS and checks the certificate."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-keyout", key, "-out", certificate, "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        ],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("no openssl to make a certificate with")
    port = free_port()
    options = {"--tls-port": port, "--tls-cert-file": certificate, "--tls-key-file": key}
    try:
        own = Server(
            server.binary,
            [str(word) for pair in options.items() for word in pair] + ["--tls-auth-clients", "no"],
        )
    except RuntimeError:
        pytest.skip("this server was built without TLS")
    with own:
        url = f"rediss://127.0.0.1:{port}/0"
        with flavour.gate_from_url(f"{url}?ssl_ca_certs={certificate}") as gate:
            tour(gate)
        with (
            flavour.gate_from_url(url) as gate,
            pytest.raises(redis.ConnectionError, match="certificate"),
        ):
            gate.start(300)


def test_a_url_with_a_wrong_password(flavour: Flavour, server: Server) -> None:
    """A password that the server refuses is redis-py's error, and does not hold it."""
    client = server.client()
    client.config_set("requirepass", "right")
    try:
        gate = flavour.gate_from_url(f"redis://:wrong@127.0.0.1:{server.port}")
        with pytest.raises(redis.AuthenticationError) as caught:
            gate.start(300)
        assert "wrong@" not in str(caught.value)
        gate = flavour.gate_from_url(f"redis://:right@127.0.0.1:{server.port}")
        tour(gate)
    finally:
        Redis(port=server.port, protocol=2, password="right").config_set("requirepass", "")


@pytest.fixture(params=[True, False], ids=["memory", "server"])
def threads_gate(request: pytest.FixtureRequest, server: Server) -> SessionGate:
    """A synchronous gate, in memory and on every server."""
    client = FakeRedis() if request.param else server.client()
    return SessionGate(client, sign_key=SIGN_KEY)


def test_threads_share_a_gate(threads_gate: SessionGate) -> None:
    """Sixteen threads on one gate each read what they themselves wrote, all the time."""
    gate = threads_gate

    def work(number: int) -> None:
        token = gate.start(300, {"user": f"{number}"})
        for turn in range(100):
            data = f"{number}.{turn}".encode()
            gate.pset(token, "user", data)
            assert gate.pget(token, "user") == data
        gate.end(token)

    with ThreadPoolExecutor(16) as threads:
        for done in [threads.submit(work, number) for number in range(32)]:
            done.result()


@pytest.mark.parametrize("kind", [ConnectionPool, BlockingConnectionPool])
def test_a_pool_that_is_exhausted(server: Server, kind: type[ConnectionPool]) -> None:
    """A gate takes none of the application's connections, and waits for none of them."""
    client = Redis(connection_pool=kind(port=server.port, protocol=2, max_connections=1))
    held = client.connection_pool.get_connection()
    with SessionGate(client, sign_key=SIGN_KEY) as gate, ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(tour, gate) for _ in range(8)]:
            done.result()
    client.connection_pool.release(held)
    assert client.ping()
    client.close()


def test_a_connection_for_each_call_at_once(server: Server) -> None:
    """As many connections are made as calls were under way at once, and they are used again."""
    with server.client() as looking, SessionGate.from_url(server.url, sign_key=SIGN_KEY) as gate:
        token = gate.start(300, {"user": "x"})
        before = len(looking.client_list())
        for _ in range(3):
            tour(gate)
        assert len(looking.client_list()) == before
        gate.close()
        until = time.monotonic() + 5
        while len(looking.client_list()) == before and time.monotonic() < until:
            time.sleep(0.01)
        assert len(looking.client_list()) == before - 1
    assert token


def test_one_payload_under_contention(threads_gate: SessionGate) -> None:
    """A payload that many threads write is always one of the values written, whole."""
    gate = threads_gate
    token = gate.start(300, {"user": "0" * 1_000})
    seen: Counter[bytes] = Counter()

    def work(number: int) -> None:
        for _ in range(50):
            gate.pset(token, "user", str(number) * 1_000)
            seen[gate.pget(token, "user")] += 1

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work, number) for number in range(8)]:
            done.result()
    assert set(seen) <= {str(number).encode() * 1_000 for number in range(10)}


FORKS = textwrap.dedent("""
    import os, sys
    from redis import Redis, RedisCluster
    from sessiongate import SessionGate

    # A reply that another process took never comes.
    options = {"host": "127.0.0.1", "port": int(sys.argv[1]), "protocol": 2, "socket_timeout": 0.5}
    if sys.argv[2] == "cluster":
        client = RedisCluster(**options)
    else:
        client = Redis(**options, single_connection_client=sys.argv[2] == "single")
    gate = SessionGate(client, sign_key="k" * 32)
    tokens = {n: gate.start(300, {"user": f"{n}"}) for n in range(4)}
    children = []
    wrong = lost = 0
    for me in tokens:
        child = os.fork()
        if not child:
            break
        children.append(child)
    else:
        me = 0
    for _ in range(500):
        try:
            wrong += gate.pget(tokens[me], "user") != f"{me}".encode()
        except Exception as error:
            lost += 1
            assert type(error).__module__ == "redis.exceptions", error
    # A gate on one server has connections of its own in each process: there nothing is lost.
    wrong = 1 if wrong else 2 if lost > (50 if sys.argv[2] == "cluster" else 0) else 0
    if not children or len(children) < 4:
        os._exit(wrong)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(wrong, codes)
""")


@pytest.mark.parametrize("pooling", ["pool", "single"])
def test_a_gate_survives_a_fork(server: Server, pooling: str) -> None:
    """After a fork parent and children go on with one gate, and none sees another's reply."""
    survive_forks(server.port, pooling)


ONE_FORK = textwrap.dedent("""
    import os, sys
    from redis import Redis
    from sessiongate import SessionGate

    client = Redis(port=int(sys.argv[1]), protocol=2)
    gate = SessionGate(client, sign_key="k" * 32)
    token = gate.start(300)
    before = client.info("stats")["total_connections_received"]
    child = os.fork()
    if not child:
        gate.touch(token)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    gate.touch(token)
    print(code, client.info("stats")["total_connections_received"] - before)
""")


def test_a_child_takes_none_of_its_parents_connections(server: Server) -> None:
    """After a fork the child connects anew, and the parent goes on with the connection it has."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_FORK, str(server.port)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("0 1\n", "")


def survive_forks(port: int, pooling: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(port), pooling],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("0 [0, 0, 0, 0]\n", "")
