"""docs/protocol.md is the whole protocol: a client written from it alone works."""

import base64
import hashlib
import hmac
import os
import re
import secrets
import socket
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from sessiongate import (
    InvalidTokenError,
    PayloadNotFoundError,
    SessionGate,
    SessionNotFoundError,
    arguments,
    keyspace,
)

from .conftest import SIGN_KEY
from .servers import Server

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "protocol.md").read_text("utf-8")
SCRIPTS = {path.stem: path.read_bytes() for path in sorted((ROOT / "lua").glob("*.lua"))}


def section(title: str) -> str:
    """What stands under a heading of the page, up to the next heading."""
    found = re.search(rf"^#+ {title}\n(.*?)(?=^#+ |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found, f"the page has no section {title!r}"
    return found[1]


def table(title: str) -> dict[str, str]:
    """The rows of the tables in a section: the first cell, and the rest without code marks."""
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", section(title), re.MULTILINE)
    return {first.strip("`"): rest.strip("`") for first, rest in rows}


# --- a client, written from the page and nothing else ---

TOKEN = re.compile(r"v1\.([A-Za-z0-9]{16})\.([0-9a-f]{64})")
LETTERS = string.ascii_letters + string.digits


class RefusedError(Exception):
    """An error that is proven to answer this request."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code = re.sub(r"^@user_script: \d+: -", "", text).partition(" ")[0]


class ServerError(Exception):
    """An error that nothing ties to this request."""


class LostReplyError(Exception):
    """The reply of another request came."""


class Client:
    """The six operations over a socket."""

    def __init__(self, port: int, *sign_keys: bytes, login: tuple[str, ...] = ()) -> None:
        self.port = port
        self.sign_keys = sign_keys
        self.login = login
        self.echo_length = 12
        self.connections = 0
        self._socket: socket.socket | None = None

    def start(self, ttl: int, payloads: dict[str, bytes]) -> str:
        session_id = "".join(secrets.choice(LETTERS) for _ in range(16))
        token = self.sign(session_id)
        self.send_start(token, ttl, payloads, repeated=b"0")
        return token

    def send_start(
        self, token: str, ttl: int, payloads: dict[str, bytes], *, repeated: bytes
    ) -> None:
        pairs = [word for name, data in payloads.items() for word in (field(name), data)]
        self.call("start", token, b"%d" % ttl, repeated, *pairs)

    def expire(self, token: str, ttl: int) -> None:
        self.call("expire", token, b"%d" % ttl)

    def pset(self, token: str, name: str, data: bytes) -> None:
        self.call("pset", token, field(name), data)

    def pget(self, token: str, name: str) -> bytes:
        return self.call("pget", token, field(name))

    def pdel(self, token: str, name: str) -> None:
        self.call("pdel", token, field(name))

    def end(self, token: str) -> None:
        self.call("end", token)

    def sign(self, session_id: str) -> str:
        mac = hmac.digest(self.sign_keys[0], session_id.encode(), "sha256")
        return f"v1.{session_id}.{mac.hex()}"

    def verify(self, token: str) -> tuple[str, bytes]:
        """The session id and the fingerprint."""
        match = TOKEN.fullmatch(token)
        assert match, "not a token"
        claimed = bytes.fromhex(match[2])
        for sign_key in self.sign_keys:
            if hmac.compare_digest(hmac.digest(sign_key, match[1].encode(), "sha256"), claimed):
                return match[1], hashlib.sha256(claimed).digest()[:16]
        raise AssertionError("no sign key of the list signed it")

    def call(self, name: str, token: str, *args: bytes) -> bytes:
        source = SCRIPTS[name]
        session_id, fingerprint = self.verify(token)
        key = b"sg-session:{%b}" % session_id.encode()
        for verb, script in (
            (b"EVALSHA", sha1(source)),
            (b"EVAL", source),
        ):
            echo = base64.b64encode(os.urandom(self.echo_length))[: self.echo_length]
            kind, text = self.ask(verb, script, b"1", key, echo, fingerprint, *args)
            if kind == b"$" and text.startswith(echo):
                return text[len(echo) :]
            if kind == b"-" and text.endswith(b" " + echo):
                raise RefusedError(text[: -len(echo) - 1].decode())
            self.drop()
            if kind == b"$" or text.split()[0] in {b"IDTAKEN", b"NOSESSION", b"NOPAYLOAD"}:
                raise LostReplyError
            if not text.startswith(b"NOSCRIPT "):
                break
        raise ServerError(text.decode())

    def ask(self, *words: bytes) -> tuple[bytes, bytes]:
        """The kind of the reply and its text."""
        self.send(*words)
        assert self._socket
        with self._socket.makefile("rb", buffering=0) as replies:
            line = replies.readline()
            kind, text = line[:1], line[1:-2]
            if kind == b"$":
                text = b""
                while len(text) < int(line[1:]) + 2:
                    text += replies.read(int(line[1:]) + 2 - len(text)) or b""
                text = text[:-2]
        return kind, text

    def send(self, *words: bytes) -> None:
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self.port), timeout=10)
            self.connections += 1
            if self.login:
                assert self.ask(b"AUTH", *(word.encode() for word in self.login)) == (b"+", b"OK")
        request = b"*%d\r\n" % len(words) + b"".join(
            b"$%d\r\n%b\r\n" % (len(word), word) for word in words
        )
        self._socket.sendall(request)

    def drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None


def field(name: str) -> bytes:
    return b":" + name.encode()


def sha1(source: bytes) -> bytes:
    return hashlib.sha1(source, usedforsecurity=False).hexdigest().encode()


# --- the client at work ---


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.client() as admin:
        admin.script_flush()
    client = Client(server.port, SIGN_KEY.encode())
    yield client
    client.drop()


def refused(code: str) -> "pytest.RaisesExc[RefusedError]":
    return pytest.raises(RefusedError, check=lambda error: error.code == code)


def all_operations(client: Client) -> None:
    """Every operation and every answer to it."""
    token = client.start(300, {"user": b"John Doe", "naïve": bytes(range(256))})
    assert client.pget(token, "user") == b"John Doe"
    assert client.pget(token, "naïve") == bytes(range(256))
    client.pset(token, "user", b"x" * 100_000)
    assert client.pget(token, "user") == b"x" * 100_000
    client.expire(token, 600)
    client.pdel(token, "user")
    for missing in (client.pget, client.pdel):
        with refused("NOPAYLOAD"):
            missing(token, "user")
    with refused("IDTAKEN"):
        client.send_start(token, 300, {}, repeated=b"0")
    client.end(token)
    over = client.start(300, {})
    client.expire(over, 0)
    for ended in (token, over, client.start(0, {"user": b"x"})):
        for operation, *args in (
            (client.expire, 300),
            (client.expire, 0),
            (client.pset, "user", b"x"),
            (client.pget, "user"),
            (client.pdel, "user"),
            (client.end,),
        ):
            with refused("NOSESSION"):
                operation(ended, *args)


def test_a_client_written_from_the_page_does_everything(client: Client) -> None:
    """Six operations and their errors work as the page says, on a server without scripts."""
    all_operations(client)
    # Each of the six scripts was unknown once, which costs a connection.
    assert client.connections == 1 + 6


def test_what_it_starts_sessiongate_goes_on_with(client: Client, server: Server) -> None:
    """A session of the client is SessionGate's as well, for every operation."""
    gate = SessionGate(server.client(), sign_key=SIGN_KEY)
    token = client.start(300, {"naïve": b"\x00\xff", "cart": b"[]"})
    assert gate.pget(token, "naïve") == b"\x00\xff"
    gate.pset(token, "user", "y")
    assert client.pget(token, "user") == b"y"
    gate.pdel(token, "cart")
    with refused("NOPAYLOAD"):
        client.pget(token, "cart")
    gate.end(token)
    with refused("NOSESSION"):
        client.pget(token, "user")


def test_what_sessiongate_starts_it_goes_on_with(client: Client, server: Server) -> None:
    """A session of SessionGate is the client's as well, for every operation."""
    gate = SessionGate(server.client(), sign_key=SIGN_KEY)
    token = gate.start(300, {"naïve": b"\x00\xff", "cart": b"[]"})
    assert client.pget(token, "naïve") == b"\x00\xff"
    client.pset(token, "user", b"y")
    assert gate.pget(token, "user") == b"y"
    client.expire(token, 1000)
    with server.client() as admin:
        left_ms = admin.pttl(f"sg-session:{{{gate.verify(token)}}}")
        assert 999_000 < left_ms <= 1_000_000
    client.pdel(token, "cart")
    with pytest.raises(PayloadNotFoundError):
        gate.pget(token, "cart")
    client.end(token)
    with pytest.raises(SessionNotFoundError):
        gate.pget(token, "user")


def test_a_retired_sign_key_verifies(client: Client, server: Server) -> None:
    """The first sign key signs and all verify, in the client as in SessionGate."""
    old = client.start(300, {"user": b"x"})
    client.sign_keys = (b"the new one " * 3, SIGN_KEY.encode())
    new = client.start(300, {"user": b"y"})
    gate = SessionGate(server.client(), sign_key=["the new one " * 3, SIGN_KEY])
    assert client.pget(old, "user") == gate.pget(old, "user") == b"x"
    assert client.pget(new, "user") == gate.pget(new, "user") == b"y"


def test_a_start_that_is_sent_again(client: Client) -> None:
    """A repeated start leaves what the first made, opens what it did not, takes nobody's id."""
    token = client.start(300, {"user": b"x"})
    client.send_start(token, 300, {"user": b"other"}, repeated=b"1")
    assert client.pget(token, "user") == b"x"
    lost = client.sign("A" * 16)
    client.send_start(lost, 300, {"user": b"y"}, repeated=b"1")
    assert client.pget(lost, "user") == b"y"
    client.sign_keys = (b"another sign key",)
    with refused("IDTAKEN"):
        client.send_start(client.sign("A" * 16), 300, {}, repeated=b"1")


@pytest.mark.parametrize("name", ["user", "cart"])
def test_the_reply_of_another_request_is_refused(client: Client, name: str) -> None:
    """A dirty connection gives neither data nor an error of another session, and is dropped."""
    mine, other = client.start(300, {"user": b"mine"}), client.start(300, {"user": b"theirs"})
    assert client.pget(mine, "user") == b"mine"
    session_id, fingerprint = client.verify(other)
    key = b"sg-session:{%b}" % session_id.encode()
    client.send(
        b"EVALSHA", sha1(SCRIPTS["pget"]), b"1", key, b"another echo", fingerprint, field(name)
    )
    with pytest.raises(LostReplyError):
        client.pget(mine, "user")
    assert client.pget(mine, "user") == b"mine"


@pytest.mark.parametrize("length", [1, 12, 40])
def test_an_echo_of_any_length_works(client: Client, length: int) -> None:
    """The scripts return whatever echo they are given, in front of data and behind errors."""
    client.echo_length = length
    all_operations(client)


def test_resp3_gives_the_same_replies(client: Client, server: Server) -> None:
    """With RESP3 a script's reply is the string or the error that RESP2 has."""
    if version(server) < 6:
        pytest.skip("RESP3 came with Redis 6")
    session_id, fingerprint = client.verify(client.start(300, {"user": b"x"}))
    with Redis(port=server.port, protocol=3) as resp3:
        words = (
            "EVAL",
            SCRIPTS["pget"],
            1,
            f"sg-session:{{{session_id}}}",
            "the-echo",
            fingerprint,
        )
        assert resp3.execute_command(*words, ":user") == b"the-echox"
        with pytest.raises(ResponseError, match=r"^NOPAYLOAD the-echo$"):
            resp3.execute_command(*words, ":cart")


def version(server: Server) -> int:
    with server.client() as admin:
        return int(admin.info("server")["redis_version"].split(".")[0])


def test_a_server_without_memory(own_server: Server) -> None:
    """OOM comes as the page shows it for the version, with the echo; nothing is written."""
    client = Client(own_server.port, SIGN_KEY.encode())
    token = client.start(300, {"user": b"x"})
    with own_server.client() as admin:
        admin.config_set("maxmemory", 1)
    with refused("OOM") as caught:
        client.pset(token, "user", b"y")
    new = client.sign("A" * 16)
    with refused("OOM"):
        client.send_start(new, 300, {}, repeated=b"0")
    assert client.pget(token, "user") == b"x"
    with refused("NOSESSION"):
        client.pget(new, "user")
    rows = table("Errors of the server")
    shown = rows["before Redis 7" if version(own_server) < 7 else "Redis 7 and later, Valkey"]
    expected = re.escape(shown.removesuffix(" <echo>")).replace("13", r"\d+")
    assert re.fullmatch(expected, str(caught.value))
    client.drop()


def test_a_server_that_became_a_replica(own_server: Server) -> None:
    """READONLY comes from every script that writes, found as the page says, with the echo."""
    client = Client(own_server.port, SIGN_KEY.encode())
    token = client.start(300, {"user": b"x"})
    with own_server.client() as admin:
        admin.slaveof("127.0.0.1", 1)  # its name in Redis 4
    for operation, *args in (
        (client.expire, 300),
        (client.expire, 0),
        (client.pset, "user", b"y"),
        (client.pdel, "user"),
        (client.end,),
    ):
        with refused("READONLY"):
            operation(token, *args)
    with refused("READONLY"):
        client.start(300, {})
    assert client.pget(token, "user") == b"x"
    client.drop()


def test_a_broken_off_script_has_no_echo(client: Client, server: Server) -> None:
    """WRONGTYPE on a foreign Redis key answers without the echo, and costs the connection."""
    token = client.sign("A" * 16)
    with server.client() as admin:
        admin.set("sg-session:{AAAAAAAAAAAAAAAA}", "no hash")
    with pytest.raises(ServerError, match=r"WRONGTYPE"):
        client.pget(token, "user")
    with refused("IDTAKEN"):
        client.send_start(token, 300, {}, repeated=b"0")


def test_the_commands_that_a_user_needs(own_server: Server) -> None:
    """A user who may run the commands that the page lists, on its Redis keys, can do everything."""
    if version(own_server) < 6:
        pytest.skip("access control lists came with Redis 6")
    with own_server.client() as admin:
        admin.execute_command(
            *("ACL", "SETUSER", "app", "on", ">password", "~sg-session:*", "-@all"),
            *(f"+{command.lower()}" for command in needed_commands()),
        )
    client = Client(own_server.port, SIGN_KEY.encode(), login=("app", "password"))
    all_operations(client)
    client.drop()


def needed_commands() -> set[str]:
    listed = section("What the server needs").partition("these commands:")[2].partition(".\n")[0]
    return set(re.findall(r"`([A-Z]+)`", listed))


# --- the page against the rest ---


def test_the_worked_example() -> None:
    """The worked example's values follow from its sign key and session id."""
    shown = table("A worked example")
    sign_key, session_id = shown["sign key"].encode(), shown["session id"]
    mac = hmac.digest(sign_key, session_id.encode(), "sha256")
    assert shown == {
        "sign key": sign_key.decode(),
        "session id": session_id,
        "signature": mac.hex(),
        "token": f"v1.{session_id}.{mac.hex()}",
        "fingerprint, in hex": hashlib.sha256(mac).digest()[:16].hex(),
        "Redis key": f"sg-session:{{{session_id}}}",
    }
    gate = SessionGate.from_url("memory://", sign_key=sign_key)
    assert gate.verify(shown["token"]) == session_id


def test_the_regular_expression_is_the_librarys() -> None:
    """What the page's expression matches whole, and only that, is a token to SessionGate."""
    shown = table("Tokens")["regular expression"]
    assert shown == TOKEN.pattern
    good = table("A worked example")["token"]
    gate = SessionGate.from_url("memory://", sign_key=table("A worked example")["sign key"])
    for text in (
        good,
        good.upper(),
        good.replace("0cbd", "0CBD"),
        good.replace("c9eT", "c٩eT"),
        good.replace("c9eT", "c-eT"),
        good.replace("v1", "v2"),
        good.replace("v1", "V1"),
        good.replace("v1.", "v1"),
        good + "\n",
        " " + good,
        good[:-1],
        good + "0",
        "",
    ):
        try:
            accepted = bool(gate.verify(text))
        except InvalidTokenError:
            accepted = False
        assert accepted == bool(re.fullmatch(shown, text)) == (text == good)


def test_the_limits_are_the_librarys() -> None:
    """The page's limits of arguments and of the prefix are those that the library checks."""
    limits = table("What Redis holds")
    assert limits["ttl"].startswith(f"0 to {arguments.MAX_TTL_SECONDS} whole seconds (100 years)")
    assert limits["name"].startswith(f"1 to {arguments.MAX_NAME_BYTES} bytes of UTF-8")
    assert limits["data"].startswith(f"1 to {arguments.MAX_DATA_BYTES} bytes")
    assert f"1 to {keyspace.MAX_PREFIX_BYTES} bytes of UTF-8 without braces" in section(
        "What Redis holds"
    )


def header_and_code(name: str) -> tuple[str, str]:
    """A script's contract, and what it does without comments."""
    lines = SCRIPTS[name].decode().splitlines()
    length = next(n for n, line in enumerate(lines) if not line.startswith("--"))
    code = "\n".join(line.partition("--")[0] for line in lines[length:])
    return "\n".join(lines[:length]), code


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_specified(name: str) -> None:
    """The page holds each script's header, and that tells all its Redis keys, ARGV and errors."""
    header, code = header_and_code(name)
    assert header in section(name), f"the page does not hold the header of {name}.lua"
    told = set(re.findall(r"^--   ((?:KEYS|ARGV)\[\d+(?:\.\.)?\])", header, re.MULTILINE))
    used = set(re.findall(r"(?:KEYS|ARGV)\[\d+\]", code))
    used |= {f"ARGV[{first}..]" for first in re.findall(r"for i = (\d+), #ARGV", code)}
    assert told == used
    raised = set()
    for error in re.findall(r"error_reply\((.*?)\)", code):
        own = re.fullmatch(r"'([A-Z]+) ' \.\. echo", error)
        assert own or re.fullmatch(r"\w+\.err \.\. ' ' \.\. echo", error), f"no echo: {error}"
        raised |= {own[1]} if own else set()
    errors = re.search(r" Errors: ([A-Z, ]+)\.$", header)
    assert set(errors[1].split(", ") if errors else ()) == raised
    assert raised <= set(table("The scripts"))


def test_nothing_is_specified_that_is_not_there() -> None:
    """The page has a section for no other script, and no other error."""
    names = re.findall(r"^### (\w+)$", PAGE.partition("## The scripts")[2], re.MULTILINE)
    assert sorted(names) == sorted(SCRIPTS)
    raised = {
        code
        for source in SCRIPTS.values()
        for code in re.findall(r"error_reply\('([A-Z]+) ", source.decode())
    }
    assert set(table("The scripts")) - {"code", "---"} == raised


def test_the_commands_are_those_that_the_scripts_call() -> None:
    """The list of commands for a user is what the scripts call, and what calls them."""
    called = {
        command
        for name in SCRIPTS
        for command in re.findall(r"redis\.p?call\('(\w+)'", header_and_code(name)[1])
    }
    assert needed_commands() == called | {"EVALSHA", "EVAL"}
