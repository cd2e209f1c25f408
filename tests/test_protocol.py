"""docs/protocol.md is the whole protocol: a client written from it alone works."""

import base64
import binascii
import hashlib
import hmac
import itertools
import os
import re
import secrets
import socket
import string
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
from nacl import bindings
from nacl.exceptions import CryptoError
from redis import Redis, RedisCluster
from redis.exceptions import ClusterCrossSlotError, ResponseError

from sessiongate import (
    InvalidTokenError,
    PayloadConflictError,
    PayloadNotFoundError,
    PayloadOverflowError,
    PayloadTypeError,
    SessionGate,
    SessionInfo,
    SessionNotFoundError,
    TooManySessionsError,
    UnsealError,
    arguments,
    call,
    keyspace,
    subjects,
)
from sessiongate.command import AnyCommand, Command
from sessiongate.commands import Commands
from sessiongate.sealing import SealingKeyRing, sealed_by, sealing_key_id
from sessiongate.tokens import SignKeyRing
from sessiongate.values import Values

from .conftest import _BINARIES, SIGN_KEY, running, running_cluster
from .servers import Cluster, Server

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

V1 = re.compile(r"v1\.([A-Za-z0-9]{16})\.([0-9a-f]{64})")
V2 = re.compile(r"v2\.([A-Za-z0-9]{16})\.([1-9][0-9]{0,17})\.([0-9a-f]{64})")
LETTERS = string.ascii_letters + string.digits
CODES = {
    *("IDTAKEN", "NOSESSION", "NOPAYLOAD", "CONFLICT", "NOCOUNTER", "OVERFLOW", "TOOMANY"),
    *("CHANGED", "INCOMPLETE"),
}
NOT_NOW = {"LOADING", "BUSY", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN"}


class RefusedError(Exception):
    """An error that is proven to answer this request."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code = re.sub(r"^.*@user_script: \d+: -", "", text).partition(" ")[0]


class BrokenOffError(RefusedError):
    """One without an echo, proven by the reply to the next request."""


class UnprovenError(Exception):
    """An error that nothing ties to this request."""


class LostReplyError(Exception):
    """The reply of another request came."""


class Token(NamedTuple):
    """What a genuine token says."""

    session_id: str
    generation: int
    fingerprint: bytes


class Info(NamedTuple):
    """What is told of a session: times in the units of the protocol."""

    session_id: str
    started_us: int
    ends_ms: int
    left_ms: int
    idle: int | None
    generation: int
    subject: str
    payloads: dict[str, int]


class Opened(NamedTuple):
    """What is told of a session, and data of its payloads."""

    info: Info
    payloads: dict[str, bytes]


class Client:
    """All operations over a socket, on a server or on a cluster."""

    def __init__(self, port: int, *sign_keys: bytes) -> None:
        self.port = port
        self.sign_keys = sign_keys
        self.sealing_key = b""  # by which it seals anew what moves, if it seals
        self.login: tuple[str, ...] = ()
        self.limit = 0
        self.evicts = True
        self.echo_length = 12
        self.connections = 0
        self._sockets: dict[int, socket.socket] = {}
        self._asked: set[int] = set()  # where a script was called before on the connection
        self._ports: dict[int, int] = {}

    # --- one session ---

    def start(
        self,
        ttl: int,
        payloads: dict[str, bytes],
        subject: str | None = None,
        idle: int | None = None,
    ) -> str:
        idle_timeout = b"" if idle is None else b"%d" % idle
        if subject is not None:
            return self.enroll(subject, number(ttl), idle_timeout, fields=pairs(payloads))
        while True:
            token = self.sign(draw(13) + draw(3))
            try:
                self.send_start(token, ttl, payloads, idle_timeout, again=False)
            except RefusedError as error:
                if error.code != "TRYAGAIN":
                    raise
            else:
                return token

    def send_start(
        self,
        token: str,
        ttl: int,
        payloads: dict[str, bytes],
        idle: bytes = b"",
        *,
        again: bool,
    ) -> None:
        session_id, _, fingerprint = self.verify(token)
        keys = [key_of(session_id), tries_of(session_id)]
        args = (number(ttl), number(again), idle, number(len(payloads)), *pairs(payloads))
        self.call("start", keys, fingerprint, *args, elsewhere=not again)

    def touch(self, token: str) -> None:
        self.ask("touch", token)

    def info(self, token: str) -> Info:
        return info_of(self.verify(token).session_id, self.ask("info", token))

    def expire(self, token: str, ttl: int) -> None:
        subject = self.ask("expire", token, number(ttl))
        if subject:
            session_id, _, fingerprint = self.verify(token)
            keys = [key_of(session_id), index_of(subject.decode())]
            self.call("expire", keys, fingerprint, number(ttl), session_id.encode())

    def renew(self, token: str, grace: int = 10, subject: str | None = None) -> str:
        if subject is None:
            return self.send_renew(token, grace, secrets.token_bytes(8))
        while True:
            try:
                return self.sign_in(token, subject)
            except RefusedError as error:
                if error.code == "CROSSSLOT":
                    return self.move(token, subject)
                if error.code != "CHANGED":
                    raise

    def sign_in(self, token: str, subject: str) -> str:
        """Give the session to the subject in one step, as of now if its payloads are sealed."""
        session_id, generation, _ = self.verify(token)
        held = self.export(token)[3:] if self.sealing_key else None
        new_id = draw_in(slot_of(index_of(subject)))
        return self.enroll(
            subject,
            generation=generation + 1,
            source=token,
            session_id=new_id,
            replaced=None if held is None else self.replacing(held, session_id, new_id),
        )

    def send_renew(self, token: str, grace: int, nonce: bytes) -> str:
        session_id, generation, _ = self.verify(token)
        successor = self.verify(self.sign(session_id, generation + 1))
        answer = self.ask(
            "renew",
            token,
            successor.fingerprint,
            number(successor.generation),
            number(grace),
            realm(self.sign_keys[0]),
            nonce,
        )
        for sign_key in self.sign_keys:
            named = self.sign(session_id, int(answer[16:]), sign_key)
            if self.verify(named).fingerprint == answer[:16]:
                return named
        raise AssertionError("no sign key of the list signed the successor")

    def move(self, token: str, subject: str) -> str:
        session_id, generation, _ = self.verify(token)
        slot = slot_of(index_of(subject))
        ids = [draw_in(slot) for _ in range(2 if self.limit and self.evicts else 1)]
        started, ttl, idle, *fields = self.export(token)
        copied = self.sealed_anew(fields, session_id, ids[-1])
        new = self.enroll(
            *(subject, ttl, idle, started, generation + 1),
            fields=copied,
            session_id=ids[0],
            pends=len(ids) > 1,
        )
        try:
            last = self.export(token, self.verify(new).fingerprint)[3:]
        except RefusedError:
            self.end(new)
            raise
        if couples(last) != couples(fields):
            self.import_fields(new, *self.sealed_anew(last, session_id, ids[-1]))
        for final in ids[1:]:
            new = self.enroll(subject, generation=generation + 1, source=new, session_id=final)
        return new

    def sealed_anew(self, fields: list[bytes], session_id: str, new_id: str) -> list[bytes]:
        """What `export` returned, as it is stored under another id."""
        if not self.sealing_key:
            return fields
        sealed = []
        for held, stored in couples(fields).items():
            name, digits = held[1:].decode(), 13 if held.startswith(b";") else 0
            data = unseal(self.sealing_key, session_id, name, stored[digits:])
            sealed += [held, stored[:digits] + seal(self.sealing_key, new_id, name, data)]
        return sealed

    def replacing(self, fields: list[bytes], session_id: str, new_id: str) -> list[bytes]:
        """Of each payload its field, what `export` returned, and what is to stand there."""
        anew = couples(self.sealed_anew(fields, session_id, new_id))
        return triples((held, stored, anew[held]) for held, stored in couples(fields).items())

    def export(self, token: str, taker: bytes = b"") -> list[bytes]:
        return items(self.ask("export", token, taker))

    def import_fields(self, token: str, *fields: bytes) -> None:
        self.ask("import", token, number(len(fields) // 2), *fields)

    def end(self, token: str, *, again: bool = False) -> None:
        self.ask("end", token, number(again))

    # --- payloads ---

    def pset(self, token: str, name: str, data: bytes) -> None:
        self.ask("pset", token, field(name), data)

    def pset_if(  # noqa: PLR0913, PLR0917  # as many as the script has
        self,
        token: str,
        name: str,
        data: bytes,
        condition: bytes = b"",
        expected: bytes = b"",
        ttl: int | None = None,
    ) -> None:
        end = b"" if ttl is None else number(ttl)
        self.ask("pset_if", token, field(name), data, condition, expected, end)

    def pset_many(
        self, token: str, payloads: dict[str, bytes], delete: tuple[str, ...] = ()
    ) -> None:
        counts = number(len(payloads)), number(len(delete))
        self.ask("pset_many", token, *counts, *pairs(payloads), *map(field, delete))

    def pget(self, token: str, name: str) -> bytes:
        return self.ask("pget", token, field(name))

    def pget_many(self, token: str, *names: str) -> dict[str, bytes]:
        return payloads_of(self.ask("pget_many", token, *map(field, names)))

    def pall(self, token: str) -> dict[str, bytes]:
        return payloads_of(self.ask("pall", token))

    def open(self, token: str, *names: str, all_of_them: bool = False) -> "Opened":
        asked = b"" if all_of_them else number(len(names))
        session_id = self.verify(token).session_id
        return opened_of(session_id, self.ask("open", token, asked, *map(field, names)))

    def pdel(self, token: str, name: str) -> None:
        self.send_pdel(token, name, secrets.token_bytes(7))

    def send_pdel(self, token: str, name: str, nonce: bytes) -> None:
        self.ask("pdel", token, field(name), nonce)

    def ppop(self, token: str, name: str) -> bytes:
        return self.ask("ppop", token, field(name))

    def pincr(self, token: str, name: str, by: int = 1) -> int:
        return int(self.ask("pincr", token, field(name), number(by)))

    # --- a subject's sessions ---

    def enroll(  # noqa: PLR0913  # likewise
        self,
        subject: str,
        ttl: bytes = b"",
        idle: bytes = b"",
        started: bytes = b"",
        generation: int = 0,
        *,
        source: str | None = None,
        fields: list[bytes] | None = None,
        session_id: str = "",
        replaced: list[bytes] | None = None,
        pends: bool = False,
    ) -> str:
        session_id = session_id or draw_in(slot_of(index_of(subject)))
        token = self.sign(session_id, generation)
        words = (ttl, idle, started, source, fields or [])
        self.send_enroll(token, subject, *words, again=False, replaced=replaced, pends=pends)
        return token

    def send_enroll(  # noqa: PLR0913, PLR0917  # likewise
        self,
        token: str,
        subject: str,
        ttl: bytes,
        idle: bytes,
        started: bytes,
        source: str | None,
        fields: list[bytes],
        *,
        again: bool,
        replaced: list[bytes] | None = None,
        pends: bool = False,
    ) -> None:
        session_id, generation, fingerprint = self.verify(token)
        if pends:
            fields = [*fields, b"pending", b"1"]
        keys = [key_of(session_id), index_of(subject), tries_of(session_id)]
        source_id, _, source_fingerprint = self.verify(source) if source else ("", 0, b"")
        if source:
            keys.append(key_of(source_id))
        subs = self.subs(subject)
        entries: list[bytes] = []
        while True:
            answer = self.call(
                "enroll",
                [*keys, *map(key_of_entry, entries)],
                *(fingerprint, ttl, number(again), idle, session_id.encode(), started),
                *(number(generation), source_fingerprint, source_id.encode()),
                *(number(0 if pends else self.limit), b"1" if self.evicts else b"0"),
                *(number(len(subs)), number(len(entries)), number(len(fields) // 2)),
                b"" if replaced is None else number(len(replaced) // 3),
                *(*subs, *entries, *fields, *(replaced or [])),
            )
            if not answer:
                return
            entries = entries_of(answer)

    def sessions(self, subject: str) -> list[Info]:
        now, entries = self.index(subject)
        subs = self.subs(subject)
        infos: dict[bytes, bytes] = {}
        while entries:
            keys = [index_of(subject), *map(key_of_entry, entries)]
            answer = self.call("sessions", keys, now, number(len(subs)), *subs, *entries)
            moved, *told = items(answer)
            infos = couples(told)
            entries = entries + entries_of(moved) if moved else []
        return [info_of(entry[16:].decode(), info) for entry, info in sorted(infos.items())]

    def end_all(self, subject: str, keep: str | None = None) -> int:
        kept = self.verify(keep).session_id.encode() if keep else b""
        now, entries = self.index(subject)
        subs = self.subs(subject)
        ended = 0
        while entries:
            keys = [index_of(subject), *map(key_of_entry, entries)]
            answer = self.call("end_all", keys, kept, now, number(len(subs)), *subs, *entries)
            count, _, moved = answer.partition(b":")
            ended += int(count)
            entries = entries + entries_of(moved) if moved else []
        return ended

    def end_one(self, subject: str, session_id: str, *, again: bool = False) -> None:
        keys = [key_of(session_id), index_of(subject)]
        self.call("end_one", keys, session_id.encode(), number(again), *self.subs(subject))

    def index(self, subject: str) -> tuple[bytes, list[bytes]]:
        """The server's time, and the entries."""
        answer = self.call("index", [index_of(subject)])
        entries = entries_of(answer[16:])
        return max(answer[:16], *(entry[:16] for entry in entries), b""), entries

    def subs(self, subject: str) -> list[bytes]:
        return [realm(sign_key) + subject.encode() for sign_key in self.sign_keys]

    # --- tokens ---

    def sign(self, session_id: str, generation: int = 0, sign_key: bytes = b"") -> str:
        message = f"v2.{session_id}.{generation}" if generation else session_id
        mac = hmac.digest(sign_key or self.sign_keys[0], message.encode(), "sha256")
        return f"{message if generation else f'v1.{session_id}'}.{mac.hex()}"

    def verify(self, token: str) -> Token:
        match = V1.fullmatch(token) or V2.fullmatch(token)
        assert match, "not a token"
        session_id, *digits, signature = match.groups()
        message = token.rpartition(".")[0] if digits else session_id
        claimed = bytes.fromhex(signature)
        for sign_key in self.sign_keys:
            if hmac.compare_digest(hmac.digest(sign_key, message.encode(), "sha256"), claimed):
                fingerprint = hashlib.sha256(claimed).digest()[:16]
                return Token(session_id, int(digits[0]) if digits else 0, fingerprint)
        raise AssertionError("no sign key of the list signed it")

    # --- calls ---

    def ask(self, name: str, token: str, *args: bytes) -> bytes:
        """Call a script for the session of a token."""
        session_id, _, fingerprint = self.verify(token)
        return self.call(name, [key_of(session_id)], fingerprint, *args)

    def call(self, name: str, keys: list[bytes], *args: bytes, elsewhere: bool = False) -> bytes:
        """What a script returns. Another slot would do as well if it may be `elsewhere`."""
        source = SCRIPTS[name]
        slot = slot_of(keys[0])
        port = self._ports.get(slot, self.port)
        call = (b"EVALSHA", sha1(source))
        asking = False
        for _ in range(10):
            if asking:
                assert self.exchange(port, b"ASKING") == (b"+", b"OK")
            done, text = self.attempt(port, *call, number(len(keys)), *keys, *args)
            if done:
                return text
            code, *words = text.decode().split()
            if code == "NOSCRIPT":
                call = (b"EVAL", source)
            elif code in {"MOVED", "ASK"}:
                port = int(words[1].rpartition(":")[2])
                if code == "MOVED":
                    self._ports[slot] = port
            elif code in NOT_NOW and not (code == "TRYAGAIN" and elsewhere):
                time.sleep(0.02)
            else:
                raise BrokenOffError(text.decode())
            asking = code == "ASK"
        raise AssertionError("it is sent to and fro")

    def attempt(self, port: int, *words: bytes) -> tuple[bool, bytes]:
        """Whether the script returned, and what: else an error without an echo, proven."""
        echo = self.new_echo()
        first = self.exchanges_first(port)
        kind, text = self.exchange(port, *words, echo)
        if kind == b"$" and text.endswith(echo):
            return True, text[: -len(echo)]
        if kind == b"-" and text.endswith(b" " + echo):
            raise RefusedError(text[: -len(echo) - 1].decode())
        if kind != b"-" or text.partition(b" ")[0].decode() in CODES:
            self.drop()
            raise LostReplyError
        if not first:
            self.prove(port, text)
        elif text.partition(b" ")[0].decode() in NOT_NOW:
            self.drop()  # so that the next one is proven by itself as well
        return False, text

    def prove(self, port: int, error: bytes) -> None:
        """Only what this lets pass answers the request before."""
        echo = self.new_echo()
        kind, text = self.exchange(port, b"EVAL", SCRIPTS["echo"], b"0", echo)
        if (kind, text) != (b"$", echo):
            self.drop()
            raise UnprovenError(error.decode()) if kind == b"-" else LostReplyError

    def exchanges_first(self, port: int) -> bool:
        """Whether no script was called on the connection before."""
        first = port not in self._asked
        self._asked.add(port)
        return first

    def mark(self, key: bytes, sign: bytes = b"") -> bool:
        """Whether the server has what was written, if there is a sign to know it by."""
        return self.call("mark", [key], sign) == b"1"

    def wait(self, replicas: int, milliseconds: int) -> int:
        """How many replicas have what was written on the connection."""
        kind, count = self.exchange(self.port, b"WAIT", number(replicas), number(milliseconds))
        assert kind == b":"
        return int(count)

    def new_echo(self) -> bytes:
        return base64.b64encode(os.urandom(self.echo_length))[: self.echo_length]

    def exchange(self, port: int, *words: bytes) -> tuple[bytes, bytes]:
        """The kind of the reply and its text."""
        self.send(port, *words)
        with self._sockets[port].makefile("rb", buffering=0) as replies:
            line = replies.readline()
            kind, text = line[:1], line[1:-2]
            if kind == b"$":
                text = b""
                while len(text) < int(line[1:]) + 2:
                    text += replies.read(int(line[1:]) + 2 - len(text)) or b""
                text = text[:-2]
        return kind, text

    def send(self, port: int, *words: bytes) -> None:
        if port not in self._sockets:
            self._sockets[port] = socket.create_connection(("127.0.0.1", port), timeout=10)
            self.connections += 1
            if self.login:
                words_in = (b"AUTH", *(word.encode() for word in self.login))
                assert self.exchange(port, *words_in) == (b"+", b"OK")
        request = b"*%d\r\n" % len(words) + b"".join(
            b"$%d\r\n%b\r\n" % (len(word), word) for word in words
        )
        self._sockets[port].sendall(request)

    def drop(self) -> None:
        for connection in self._sockets.values():
            connection.close()
        self._sockets = {}
        self._asked = set()


def number(value: int) -> bytes:
    return b"%d" % value


def field(name: str) -> bytes:
    return b":" + name.encode()


def pairs(payloads: dict[str, bytes]) -> list[bytes]:
    return [word for name, data in payloads.items() for word in (field(name), data)]


def triples(payloads: Iterable[tuple[bytes, bytes, bytes]]) -> list[bytes]:
    return [word for payload in payloads for word in payload]


def couples(words: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(words[::2], words[1::2], strict=True))


def items(text: bytes) -> list[bytes]:
    """The items of a list."""
    found = []
    while text:
        length, _, text = text.partition(b":")
        found.append(text[: int(length)])
        text = text[int(length) :]
    return found


def payloads_of(text: bytes) -> dict[str, bytes]:
    return {name.decode(): data for name, data in couples(items(text)).items()}


def info_of(session_id: str, text: bytes) -> Info:
    started, ends, left, idle, generation, subject, *sizes = items(text)
    return Info(
        session_id,
        int(started),
        int(ends),
        int(left),
        int(idle) if idle else None,
        int(generation),
        subject.decode(),
        {name.decode(): int(size) for name, size in couples(sizes).items()},
    )


def opened_of(session_id: str, text: bytes) -> Opened:
    facts, held = items(text)[:6], items(text)[6:]
    info = info_of(session_id, b"".join(b"%d:%b" % (len(fact), fact) for fact in facts))
    return Opened(
        info._replace(payloads={name.decode(): len(data) for name, data in couples(held).items()}),
        {name.decode(): data for name, data in couples(held).items()},
    )


def entries_of(text: bytes) -> list[bytes]:
    return [text[at : at + 32] for at in range(0, len(text), 32)]


def key_of(session_id: str) -> bytes:
    return b"sg-session:{%b}" % session_id.encode()


def tries_of(session_id: str) -> bytes:
    return b"sg-session:tries:{%b}" % session_id.encode()


def key_of_entry(entry: bytes) -> bytes:
    return key_of(entry[16:].decode())


def index_of(subject: str) -> bytes:
    tag = re.sub("[%{}]", lambda sign: f"%{ord(sign[0]):02X}", subject)
    return b"sg-session:subject:{%b}" % tag.encode()


def slot_of(key: bytes) -> int:
    """The slot of a Redis key that ends in its hash tag."""
    return binascii.crc_hqx(key.partition(b"{")[2][:-1], 0) % 16384


def draw(count: int) -> str:
    return "".join(secrets.choice(LETTERS) for _ in range(count))


def draw_in(slot: int) -> str:
    """A session id in that slot: without a table, one ending after the other is tried."""
    free = draw(13)
    shuffled = secrets.SystemRandom().sample(LETTERS, len(LETTERS))
    for ending in itertools.product(shuffled, repeat=3):
        session_id = free + "".join(ending)
        if slot_of(key_of(session_id)) == slot:
            return session_id
    raise AssertionError("some endings always are")


def realm(sign_key: bytes) -> bytes:
    return hashlib.sha256(hmac.digest(sign_key, b"realm", "sha256")).digest()[:8]


def sha1(source: bytes) -> bytes:
    return hashlib.sha1(source, usedforsecurity=False).hexdigest().encode()


# --- sealing, likewise ---


class NotSealedError(Exception):
    """What stands there was not sealed in that session under that name."""


def derived(sealing_key: bytes, purpose: bytes) -> bytes:
    return hashlib.blake2b(b"", key=sealing_key, person=purpose, digest_size=32).digest()


def header_of(sealing_key: bytes) -> bytes:
    return bytes.fromhex("C1 53 47 01") + derived(sealing_key, b"sg seal key id")[:4]


def seal(
    sealing_key: bytes, session_id: str, name: str, data: bytes, nonce: bytes | None = None
) -> bytes:
    """What is stored of data."""
    header, nonce = header_of(sealing_key), nonce or secrets.token_bytes(24)
    ciphertext_and_tag = bindings.crypto_aead_xchacha20poly1305_ietf_encrypt(
        data,
        header + key_of(session_id) + field(name),
        nonce,
        derived(sealing_key, b"sg payload seal"),
    )
    return header + nonce + ciphertext_and_tag


def unseal(sealing_key: bytes, session_id: str, name: str, sealed: bytes) -> bytes:
    """The data of what is stored."""
    header, nonce, rest = sealed[:8], sealed[8:32], sealed[32:]
    if header != header_of(sealing_key) or len(rest) < 16:
        raise NotSealedError
    key = derived(sealing_key, b"sg payload seal")
    additional = header + key_of(session_id) + field(name)
    try:
        return bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(rest, additional, nonce, key)
    except CryptoError:
        raise NotSealedError from None


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
    client.touch(token)
    client.mark(key_of(client.verify(token).session_id))
    client.pdel(token, "user")
    for missing in (client.pget, client.pdel, client.ppop):
        with refused("NOPAYLOAD"):
            missing(token, "user")
    with refused("IDTAKEN"):
        client.send_start(token, 300, {}, again=False)
    all_payloads(client, token)
    token = all_renewals(client, token)
    client.end(token)
    over = client.start(300, {})
    client.expire(over, 0)
    for ended in (token, over, client.start(0, {"user": b"x"})):
        for operation, *args in (
            (client.expire, 300),
            (client.expire, 0),
            (client.touch,),
            (client.info,),
            (client.renew,),
            (client.renew, 10, "bob"),
            (client.move, "bob"),
            (client.export,),
            (client.export, b"a taker's print."),
            (client.import_fields,),
            (client.pset, "user", b"x"),
            (client.pset_if, "user", b"x"),
            (client.pset_many, {"user": b"x"}),
            (client.pset_many, {}, ("user",)),
            (client.open,),
            (client.pget, "user"),
            (client.pget_many, "user"),
            (client.pall,),
            (client.pdel, "user"),
            (client.ppop, "user"),
            (client.pincr, "user"),
            (client.end,),
        ):
            with refused("NOSESSION"):
                operation(ended, *args)
    all_of_a_subject(client)


def all_payloads(client: Client, token: str) -> None:
    client.pset_many(token, {"a": b"1", "naïve": b"2"})
    client.pset_if(token, "b", b"3", b"absent")
    client.pset_if(token, "b", b"4", b"match", b"3")
    for condition, expected in ((b"absent", b""), (b"match", b"3")):
        with refused("CONFLICT"):
            client.pset_if(token, "b", b"5", condition, expected)
    client.pset_if(token, "timed", b"5", ttl=100)
    everything = {"a": b"1", "b": b"4", "naïve": b"2", "timed": b"5"}
    assert client.pall(token) == client.pget_many(token, "none", *everything) == everything
    assert client.info(token).payloads == dict.fromkeys(everything, 1)
    assert client.open(token, all_of_them=True).payloads == everything
    assert client.open(token, "none", "timed").payloads == {"timed": b"5"}
    assert client.pincr(token, "timed", -7) == -2
    client.pset_if(token, "timed", b"5", ttl=0)
    client.pset_if(token, "timed", b"5", b"absent", ttl=100)
    client.pset_many(token, {"more": b"6"}, ("timed", "none"))
    client.pset_many(token, {}, ("more",))
    client.pset_if(token, "timed", b"5", b"absent", ttl=100)
    client.pdel(token, "timed")
    with refused("NOPAYLOAD"):
        client.pget(token, "timed")
    assert client.ppop(token, "naïve") == b"2"
    assert client.pincr(token, "n", 2**63 - 1) == 2**63 - 1
    with refused("OVERFLOW"):
        client.pincr(token, "n")
    client.pset(token, "n", b"one")
    with refused("NOCOUNTER"):
        client.pincr(token, "n")
    assert client.pall(token) == {"a": b"1", "b": b"4", "n": b"one"}


def all_renewals(client: Client, token: str) -> str:
    """The token that the session has afterwards."""
    new = client.renew(token)
    assert client.renew(token) == new
    assert client.pget(token, "a") == client.pget(new, "a") == b"1"
    newest = client.send_renew(new, 0, b"a nonce")
    with refused("NOSESSION"):
        client.pget(new, "a")
    assert client.renew(token) == newest  # the grace of that one lasts
    assert client.send_renew(new, 0, b"a nonce") == newest
    with refused("NOSESSION"):
        client.send_renew(new, 0, b"another")
    signed_in = client.renew(newest, subject="bob")
    held = couples(client.export(signed_in)[3:])
    replaced = triples((each, data, b"anew") for each, data in held.items())
    with refused("CHANGED"):
        client.enroll("bob", generation=4, source=signed_in, replaced=replaced[3:])
    again = client.enroll("bob", generation=4, source=signed_in, replaced=replaced)
    assert client.pall(again) == {"a": b"anew", "b": b"anew", "n": b"anew"}
    client.pset_many(again, {each[1:].decode(): data for each, data in held.items()})
    moved = client.move(again, "carol")
    for dead in (token, new, newest, signed_in, again):
        with refused("NOSESSION"):
            client.pget(dead, "a")
    assert client.pall(moved) == {"a": b"1", "b": b"4", "n": b"one"}
    assert client.info(moved)[4:7] == (None, 5, "carol")
    return moved


def all_of_a_subject(client: Client) -> None:
    subject = "50% {zoë}"
    tokens = [client.start(300, {"a": number(n)}, subject, idle=60) for n in range(20)]
    ids = [client.verify(token).session_id for token in tokens]
    told = client.sessions(subject)
    assert [info.session_id for info in told] == ids
    assert [info[4:] for info in told] == [(60, 0, subject, {"a": len(str(n))}) for n in range(20)]
    client.expire(tokens[0], 30)
    assert client.sessions(subject)[0].ends_ms < told[0].ends_ms - 200_000
    client.end(tokens[1])
    client.end_one(subject, ids[2])
    for stranger in ("zoë", subject):
        with refused("NOSESSION"):
            client.end_one(stranger, draw_in(slot_of(index_of(stranger))))
    client.limit, client.evicts = 17, False
    with refused("TOOMANY"):
        client.start(300, {}, subject)
    client.evicts = True
    latest = client.start(300, {}, subject)
    client.limit = 0
    assert [info.session_id for info in client.sessions(subject)] == [
        *ids[4:],
        client.verify(latest).session_id,
    ]
    assert client.end_all(subject, keep=tokens[7]) == 16
    assert [info.session_id for info in client.sessions(subject)] == [ids[7]]
    assert client.end_all(subject) == 1
    assert client.end_all(subject) == 0
    assert client.sessions(subject) == []


def test_a_client_written_from_the_page_does_everything(client: Client, server: Server) -> None:
    """All operations and their errors work as the page says, on a server without scripts."""
    all_operations(client)
    # No error cost the connection: each was proven.
    assert client.connections == 1
    with server.client() as admin:
        known = admin.script_exists(*(sha1(source).decode() for source in SCRIPTS.values()))
    assert all(known), "a script did not run"


@pytest.fixture
def own_client(own_server: Server) -> Iterator[Client]:
    """A client of a server of its own."""
    client = Client(own_server.port, SIGN_KEY.encode())
    yield client
    client.drop()


@pytest.fixture
def cluster() -> Cluster:
    """The suite's cluster, empty."""
    if not _BINARIES:
        pytest.skip("no server was found")
    cluster = running_cluster()
    cluster.flushall()
    return cluster


@pytest.fixture
def cluster_client(cluster: Cluster) -> Iterator[Client]:
    client = Client(cluster.port, SIGN_KEY.encode())
    yield client
    client.drop()


def test_a_client_written_from_the_page_does_everything_on_a_cluster(
    cluster_client: Client,
) -> None:
    """All operations work on a cluster; a session that gets a subject moves to its slot."""
    for _ in range(3):
        all_operations(cluster_client)
    assert cluster_client.connections == 3


def test_a_slot_that_is_on_its_way(
    cluster: Cluster, cluster_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a slot moves, its sessions are found on either side, and new ones have other slots."""
    client, slot = cluster_client, slot_of(key_of("A" * 16))
    moved, left = client.sign("A" * 16), client.sign(draw_in(slot))
    for token in (moved, left):
        client.send_start(token, 300, {"user": b"x"}, again=False)
    here = cluster.server_of(slot)
    there = next(server for server in cluster.servers if server is not here)
    drawn = iter(["A" * 13, "AAA", "B" * 13, "BBB"])
    with here.client() as source, there.client() as target:
        ids = [each.execute_command("CLUSTER", "MYID").decode() for each in (source, target)]
        target.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
        source.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
        try:
            source.execute_command("MIGRATE", "127.0.0.1", there.port, key_of("A" * 16), 0, 5_000)
            for token in (moved, left):
                assert client.pget(token, "user") == b"x"
                client.mark(key_of(client.verify(token).session_id))
                client.end(token)
            monkeypatch.setattr(f"{__name__}.draw", lambda _: next(drawn))
            assert client.verify(client.start(300, {})).session_id == "B" * 16
        finally:
            for each in (source, target):
                each.execute_command("CLUSTER", "SETSLOT", slot, "STABLE")


# --- the client and SessionGate, on the same sessions ---


class Pair:
    """A client and a gate that share sessions, and a look into where these are."""

    def __init__(self, client: Client, redis: Redis | RedisCluster, admin: Redis) -> None:
        self.client = client
        self.redis = redis
        self.admin = admin

    def gate(self, **options: object) -> SessionGate:
        return SessionGate(self.redis, **{"sign_key": SIGN_KEY, **options})  # type: ignore[arg-type]  # options are the gate's own


@pytest.fixture(params=[*_BINARIES, "cluster"] if _BINARIES else [])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A client and a gate on every server, and on a cluster."""
    if request.param == "cluster":
        cluster = running_cluster()
        cluster.flushall()
        client = Client(cluster.port, SIGN_KEY.encode())
        with RedisCluster("127.0.0.1", cluster.port, protocol=2) as redis:
            yield Pair(client, redis, cluster.client())
    else:
        server = running(request.param)
        client = Client(server.port, SIGN_KEY.encode())
        with server.client() as redis, server.client() as admin:
            admin.flushall()
            yield Pair(client, redis, admin)
    client.drop()


def test_what_it_starts_sessiongate_goes_on_with(pair: Pair) -> None:
    """A session of the client is SessionGate's as well, for every operation."""
    client, gate = pair.client, pair.gate()
    token = client.start(300, {"naïve": b"\x00\xff", "cart": b"[]"}, idle=100)
    assert gate.pget(token, "naïve") == b"\x00\xff"
    gate.pset(token, "user", "y")
    assert client.pget(token, "user") == b"y"
    gate.pdel(token, "cart")
    with refused("NOPAYLOAD"):
        client.pget(token, "cart")
    gate.expire(token, 1000)
    assert 999_000 < client.info(token).ends_ms - time.time() * 1000 <= 1_000_000
    gate.end(token)
    with refused("NOSESSION"):
        client.pget(token, "user")


def test_what_sessiongate_starts_it_goes_on_with(pair: Pair) -> None:
    """A session of SessionGate is the client's as well, for every operation."""
    client, gate = pair.client, pair.gate()
    token = gate.start(300, {"naïve": b"\x00\xff", "cart": b"[]"}, idle_timeout=100)
    assert client.pget(token, "naïve") == b"\x00\xff"
    client.pset(token, "user", b"y")
    assert gate.pget(token, "user") == b"y"
    client.expire(token, 1000)
    assert gate.info(token).expires_at - datetime.now(UTC) > timedelta(seconds=999)
    assert 99_000 < pair.admin.pttl(key_of(gate.verify(token))) <= 100_000
    client.pdel(token, "cart")
    with pytest.raises(PayloadNotFoundError):
        gate.pget(token, "cart")
    client.end(token)
    with pytest.raises(SessionNotFoundError):
        gate.pget(token, "user")


def test_payloads_are_shared(pair: Pair) -> None:
    """Ends of payloads, conditions and counters of the one hold for the other."""
    client, gate = pair.client, pair.gate()
    token = client.start(300, {"n": b"41"})
    client.pset_if(token, "code", b"1", ttl=1)
    gate.pset(token, "flash", "2", ttl=1)
    everything = {"n": b"41", "code": b"1", "flash": b"2"}
    assert gate.pall(token) == client.pall(token) == everything
    assert gate.pget_many(token, everything) == client.pget_many(token, *everything) == everything
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "code", "3", if_absent=True)
    with refused("CONFLICT"):
        client.pset_if(token, "flash", b"3", b"match", b"3")
    gate.pset(token, "n", "42", if_match="41")
    assert gate.pincr(token, "n", -50) == -8
    assert client.pincr(token, "n", -(2**63) + 8) == -(2**63)
    with pytest.raises(PayloadOverflowError):
        gate.pincr(token, "n", -1)
    client.pset_many(token, {"n": b"1.5", "more": b"0"})
    with pytest.raises(PayloadTypeError):
        gate.pincr(token, "n")
    time.sleep(1.1)
    assert gate.pall(token) == client.pall(token) == {"n": b"1.5", "more": b"0"}
    assert dict(gate.info(token).payloads) == client.info(token).payloads == {"n": 3, "more": 1}
    with refused("NOPAYLOAD"):
        client.ppop(token, "flash")
    with pytest.raises(PayloadNotFoundError):
        gate.ppop(token, "code")
    client.pset_if(token, "code", b"3", b"absent")
    assert gate.ppop(token, "code") == b"3"
    gate.pset_many(token, {"more": "5"})
    assert client.ppop(token, "more") == b"5"


def test_open_tells_what_info_does_and_reads_all(client: Client) -> None:
    """Asked for all, open returns what `info` tells of the session and what `pall` reads."""
    everything = {"a": b"1", "naïve": bytes(range(256)), "empty": b"", "timed": b"2"}
    for subject, idle in ((None, None), ("50% {zoë}", 100)):
        first = client.start(
            300, {name: everything[name] for name in ("a", "naïve")}, subject, idle
        )
        token = client.renew(first)
        client.pset(token, "empty", b"")
        client.pset_if(token, "timed", b"2", ttl=100)
        info, payloads = client.open(token, all_of_them=True)
        assert payloads == client.pall(token) == everything
        alone = client.info(token)
        assert drop_end(told(info)) == drop_end(told(alone))
        assert (info.generation, info.idle, info.subject) == (1, idle, subject or "")
        # Without an idle timeout the end is reckoned, and the server may stand still meanwhile.
        assert told(info)[2] == pytest.approx(alone.ends_ms, abs=50)
        assert info.left_ms == pytest.approx(alone.left_ms, abs=1000)
        # A token in its grace opens it as well.
        assert client.open(first, all_of_them=True).payloads == everything
    empty = client.start(300, {})
    assert client.open(empty, all_of_them=True).payloads == {}


def test_open_reads_what_is_named(client: Client) -> None:
    """Asked for names, open returns those that are there, and of no name the session alone."""
    token = client.start(300, {"a": b"1", "b": b"2", "c": b"3"}, "zoë")
    for names, held in (
        (("b",), {"b": b"2"}),
        (("c", "none", "a"), {"c": b"3", "a": b"1"}),
        (("none", ";a", "fp", ""), {}),
        ((), {}),
    ):
        info, payloads = client.open(token, *names)
        assert payloads == held
        assert (info.subject, info.generation) == ("zoë", 0)
    assert [*client.open(token, "c", "a").payloads] == ["c", "a"]


def test_open_reads_payloads_until_their_end(client: Client) -> None:
    """A payload with an end of its own is there for open until then, named or not."""
    token = client.start(300, {"a": b"1"})
    client.pset_if(token, "short", b"2", ttl=1)
    client.pset_if(token, "long", b"3", ttl=100)
    for alive in (True, False):
        held = {"a": b"1", "long": b"3"} | ({"short": b"2"} if alive else {})
        assert client.open(token, all_of_them=True).payloads == held
        assert client.open(token, "short", "a", "long").payloads == held
        time.sleep(1.1 if alive else 0)


def test_open_is_use(client: Client, server: Server) -> None:
    """Open begins the idle timeout anew, and tells of the session as it is afterwards."""
    with server.client() as admin:
        for asked in ({}, {"all_of_them": True}):
            token = client.start(300, {"a": b"1"}, idle=100)
            key = key_of(client.verify(token).session_id)
            admin.pexpire(key, 20_000)
            assert 99_000 < client.open(token, **asked).info.left_ms <= 100_000
            assert 99_000 < admin.pttl(key) <= 100_000


def test_open_wants_the_sessions_own_fingerprint(client: Client, server: Server) -> None:
    """No other fingerprint opens a session, however close, nor is it use."""
    token = client.start(300, {"a": b"1"}, idle=100)
    session_id, _, fingerprint = client.verify(token)
    key = key_of(session_id)
    with server.client() as admin:
        admin.pexpire(key, 20_000)
        for wrong in (b"another print...", fingerprint[:-1], fingerprint + b"1", b"", b"\0" * 16):
            for asked in ((b"",), (b"0",), (b"1", b":a")):
                with refused("NOSESSION"):
                    client.call("open", [key], wrong, *asked)
        assert admin.pttl(key) <= 20_000


# What each of them is called with, behind the fingerprint.
COUNTED = {
    "open": [b"12", *(b":%d" % number for number in range(12))],
    "pset_many": [
        *(b"11", b"10"),
        *(word for number in range(11) for word in (b":%d" % number, b"new")),
        *(b":old%d" % number for number in range(10)),
    ],
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_call_that_lost_words_is_incomplete(client: Client, server: Server, name: str) -> None:
    """If words are missing at the end, or a digit in a count, nothing is done and nothing read."""
    held = {f"old{number}": b"x" for number in range(10)} | {"0": b"before"}
    token = client.start(300, held, idle=100)
    session_id, _, fingerprint = client.verify(token)
    key, words = key_of(session_id), COUNTED[name]
    counts = 2 if name == "pset_many" else 1
    with server.client() as admin:
        admin.pexpire(key, 20_000)
        before = admin.hgetall(key)
        # As of a request whose number of words lost a digit: what is last now is no echo.
        for length in range(1, len(words) + 1):
            request = (b"EVAL", SCRIPTS[name], b"1", key, fingerprint, *words[:length])
            assert client.exchange(client.port, *request) == (b"-", b"INCOMPLETE " + request[-1])
        for length in range(len(words)):
            with refused("INCOMPLETE"):
                client.call(name, [key], fingerprint, *words[:length])
        for at in range(counts):
            for count in {words[at][:1], words[at][1:], b"1" + words[at]}:
                with refused("INCOMPLETE"):
                    client.call(name, [key], fingerprint, *words[:at], count, *words[at + 1 :])
        assert admin.hgetall(key) == before
        assert admin.pttl(key) <= 20_000
        client.call(name, [key], fingerprint, *words)
        assert (admin.hgetall(key) == before) == (name == "open")


def test_pset_many_stores_and_deletes(client: Client, server: Server) -> None:
    """It stores some payloads and deletes others, with an end of their own or not, if there."""
    token = client.start(300, {"a": b"1", "b": b"2", "c": b"3", "d": b"4"})
    for name in ("timed", "timed too", "stays"):
        client.pset_if(token, name, b"5", ttl=100)
    key = key_of(client.verify(token).session_id)
    with server.client() as admin:
        left = admin.pttl(key)
        client.pset_many(token, {"a": b"6", "new": b"7", "timed": b"8"}, ("b", "timed too", "none"))
        held = {"a": b"6", "new": b"7", "timed": b"8", "c": b"3", "d": b"4", "stays": b"5"}
        assert client.pall(token) == held
        fields = {b"fp", *map(field, held.keys() - {"stays"}), b";stays"}
        assert set(admin.hgetall(key)) == fields  # what was stored has no end of its own
        client.pset_many(token, {}, ("c", "stays", "new"))
        assert client.pall(token) == {"a": b"6", "timed": b"8", "d": b"4"}
        client.pset_many(token, {}, ("a", "timed", "d"))
        assert admin.hkeys(key) == [b"fp"]
        assert 0 < admin.pttl(key) <= left
    assert client.open(token, all_of_them=True).payloads == {}


def test_deleting_what_is_not_there_is_nothing(client: Client, server: Server) -> None:
    """Names that the session does not hold are none, fields of the protocol stay, all is well."""
    token = client.renew(client.start(300, {"a": b"1"}, "zoë"))
    key = key_of(client.verify(token).session_id)
    with server.client() as admin:
        before = admin.hgetall(key)
        client.pset_many(token, {}, ("none", "fp", "gen", "sub", "old", "", ":a", ";a"))
        client.pset_many(token, {}, ())
        assert admin.hgetall(key) == before
    client.pset_many(token, {"b": b"2"}, ("none",))
    assert client.pall(token) == {"a": b"1", "b": b"2"}


def test_deletes_that_are_refused_delete_nothing(client: Client, server: Server) -> None:
    """Who does not open the session neither stores nor deletes with pset_many."""
    token = client.start(300, {"a": b"1"})
    session_id = client.verify(token).session_id
    with server.client() as admin:
        before = admin.hgetall(key_of(session_id))
        for payloads in ({}, {"b": b"2"}):
            with refused("NOSESSION"):
                client.pset_many(client.sign(session_id, 1), payloads, ("a",))
        assert admin.hgetall(key_of(session_id)) == before


def test_pset_many_deletes_without_memory(own_client: Client, own_server: Server) -> None:
    """On a full server deletes alone succeed as pdel does, use included; with a store none does."""
    client = own_client
    token = client.start(300, {"a": b"1", "b": b"2", "c": b"3"}, idle=100)
    client.pset_if(token, "timed", b"4", ttl=100)
    key = key_of(client.verify(token).session_id)
    with own_server.client() as admin:
        admin.config_set("maxmemory", 1)
        for unused in (False, True):
            admin.pexpire(key, 20_000 if unused else 95_000)
            with refused("OOM"):
                client.pset_many(token, {"new": b"5"}, ("a",))
            held = {"a": b"1", "b": b"2", "c": b"3", "timed": b"4"}
            gone = ("a", "timed", "none") if unused else ("none",)
            assert set(admin.hgetall(key)) == {b"fp", b":a", b":b", b":c", b";timed"}
            client.pset_many(token, {}, gone)
            if unused:
                assert 99_000 < admin.pttl(key) <= 100_000
        left = {name: data for name, data in held.items() if name not in gone}
        assert client.open(token, all_of_them=True).payloads == left == {"b": b"2", "c": b"3"}
        client.pdel(token, "b")
        assert client.pall(token) == {"c": b"3"}


# --- sealed payloads, shared ---

SEALING_KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))


def raw(pair: Pair, token: str) -> dict[str, bytes]:
    """What Redis has of payloads."""
    return pair.client.pall(token)


def unsealed(pair: Pair, token: str) -> dict[str, bytes]:
    """What a client that was told the sealing key makes of it."""
    session_id = pair.client.verify(token).session_id
    return {
        name: unseal(SEALING_KEY, session_id, name, stored)
        for name, stored in raw(pair, token).items()
    }


def test_what_a_gate_seals_the_client_opens(pair: Pair) -> None:
    """Whichever way a gate stores a payload, the page tells how to open what Redis has of it."""
    client, gate = pair.client, pair.gate(sealing_key=SEALING_KEY)
    held = {"naïve": b"\x00\xff", "user": b"John Doe"}
    for subject in (None, "zoë"):
        token = gate.start(300, held, subject=subject)
        assert unsealed(pair, token) == held
        gate.pset(token, "long", b"x" * 100_000)
        gate.pset(token, "timed", "1", ttl=100)
        gate.pset(token, "user", "Jane Roe", if_match="John Doe")
        gate.pset(token, "first", "2", if_absent=True)
        gate.pset_many(token, {"many": "3"}, delete=["naïve"])
        expected = {"long": b"x" * 100_000, "timed": b"1", "first": b"2", "many": b"3"}
        expected["user"] = b"Jane Roe"
        assert unsealed(pair, token) == expected
        stored = raw(pair, token)
        for name, data in expected.items():
            assert len(stored[name]) == len(data) + 48
            assert len(data) < 2 or data not in stored[name]
        assert client.info(token).payloads == {name: len(stored[name]) for name in stored}
        again = gate.renew(token)
        assert raw(pair, again) == stored  # the id is the same


def test_what_the_client_seals_a_gate_opens(pair: Pair) -> None:
    """What is sealed as the page says is a payload to a gate, whichever way it reads it."""
    client, gate = pair.client, pair.gate(sealing_key=[OTHER_KEY, SEALING_KEY])
    token = client.start(300, {})
    session_id = client.verify(token).session_id
    held = {"naïve": b"\x00\xff", "timed": b"x" * 1000}
    client.pset(token, "naïve", seal(SEALING_KEY, session_id, "naïve", held["naïve"]))
    client.pset_if(token, "timed", seal(SEALING_KEY, session_id, "timed", held["timed"]), ttl=100)
    assert gate.pall(token) == gate.pget_many(token, held) == held
    assert gate.pget(token, "naïve") == held["naïve"]
    with gate.open(token) as session:
        assert dict(session) == held
    assert {sealed_by(stored) for stored in raw(pair, token).values()} == {
        sealing_key_id(SEALING_KEY)
    }
    assert gate.ppop(token, "timed") == held["timed"]


def test_what_was_not_sealed_there_neither_opens(pair: Pair) -> None:
    """Under another name, in another session, by another key or with a bit changed none opens."""
    client, gate = pair.client, pair.gate(sealing_key=SEALING_KEY)
    token, other = gate.start(300, {"user": "x"}), gate.start(300, {"user": "x"})
    session_id = client.verify(token).session_id
    good, theirs = raw(pair, token)["user"], raw(pair, other)["user"]
    changed = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(len(good))]
    for name, stored in (
        ("other", good),
        ("user", theirs),
        ("user", seal(OTHER_KEY, session_id, "user", b"x")),
        ("user", good[:-1]),
        ("user", good + b"\0"),
        ("user", good[:47]),
        ("user", good[:8]),
        ("user", b"x"),
        *(("user", each) for each in changed),
    ):
        client.pset(token, name, stored)
        with pytest.raises(NotSealedError):
            unseal(SEALING_KEY, session_id, name, stored)
        with pytest.raises(UnsealError):
            gate.pget(token, name)
    client.pset(token, "user", good)
    assert gate.pget(token, "user") == b"x"


@pytest.mark.parametrize("limit", [None, 1])
def test_sealed_payloads_are_sealed_anew_for_a_subject(pair: Pair, limit: int | None) -> None:
    """Whoever gives a session to a subject, the other opens its payloads, sealed for the new id."""
    client = pair.client
    gate = pair.gate(sealing_key=SEALING_KEY, max_sessions=limit)
    client.sealing_key, client.limit = SEALING_KEY, limit or 0
    held = {"naïve": b"\x00\xff", "user": b"John Doe", "timed": b"1"}
    sign_ins: list[Callable[[str], str]] = [
        lambda token: gate.renew(token, subject="zoë"),
        lambda token: client.renew(token, subject="zoë"),
    ]
    for sign_in in sign_ins:
        before = gate.start(300, subject="zoë")
        token = gate.start(300, {"naïve": held["naïve"], "user": held["user"]}, idle_timeout=100)
        gate.pset(token, "timed", "1", ttl=100)
        session_id, stored = client.verify(token).session_id, raw(pair, token)
        new = sign_in(token)
        assert client.verify(new).session_id != session_id
        assert gate.pall(new) == unsealed(pair, new) == held
        assert not set(raw(pair, new).values()) & set(stored.values())
        with pytest.raises(SessionNotFoundError):
            gate.touch(token)
        # It is pending no more, and the oldest one went for it, if any had to.
        ids = [client.verify(each).session_id for each in (before, new)]
        assert [info.id for info in gate.sessions("zoë")] == (ids[1:] if limit else ids)
        assert gate.info(new).generation == 1
        assert gate.end_all("zoë") == (1 if limit else 2)


@pytest.mark.parametrize("limit", [0, 1])
def test_what_changes_while_a_sealed_session_moves_is_sealed_anew(
    client: Client, server: Server, limit: int
) -> None:
    """What `import` brings behind the second export is sealed for the id of the end as well."""
    gate = SessionGate(server.client(), sign_key=SIGN_KEY, sealing_key=SEALING_KEY)
    client.sealing_key, client.limit = SEALING_KEY, limit
    token = gate.start(300, {"a": "1", "b": "2"})
    held = {"a": b"5", "c": b"6"}

    def change(copy: str) -> None:
        if client.verify(copy).session_id in changed:
            return
        changed.append(client.verify(copy).session_id)
        if len(changed) == 1:
            gate.pset(token, "a", "5", ttl=100)
            gate.pset_many(token, {"c": "6"}, delete=["b"])

    changed: list[str] = []
    between_the_exports(client, change)
    moved = client.move(token, "zoë")
    assert gate.pall(moved) == held
    assert len(changed) == 1 + limit
    assert client.verify(moved).session_id == changed[-1]


@pytest.mark.parametrize("names", [(), ("a", "b")])
def test_what_is_stored_while_a_sealed_session_signs_in_is_read_again(
    client: Client, server: Server, names: tuple[str, ...]
) -> None:
    """What comes between export and enroll makes it CHANGED; the client reads again, and has it."""
    gate = SessionGate(server.client(), sign_key=SIGN_KEY, sealing_key=SEALING_KEY)
    client.sealing_key = SEALING_KEY
    token = gate.start(300, dict.fromkeys(names, "1"))
    exports = []

    def export(token: str, taker: bytes = b"") -> list[bytes]:
        read = Client.export(client, token, taker)
        exports.append(read)
        if len(exports) == 1:
            gate.pset_many(token, {"c": "6"}, delete=names[:1])
        elif len(exports) == 2:
            gate.pset(token, "c", "7", ttl=100)
        return read

    client.export = export  # type: ignore[method-assign]  # that is the moment
    new = client.renew(token, subject="zoë")
    assert gate.pall(new) == dict.fromkeys(names[1:], b"1") | {"c": b"7"}
    assert len(exports) == 3
    assert [info.id for info in gate.sessions("zoë")] == [client.verify(new).session_id]


def test_a_sealed_sign_in_that_is_sent_again(client: Client, server: Server) -> None:
    """Its repetition leaves what the first made; after IDTAKEN all is sealed for another id."""
    gate = SessionGate(server.client(), sign_key=SIGN_KEY, sealing_key=SEALING_KEY)
    client.sealing_key = SEALING_KEY
    ids = [draw_in(slot_of(index_of("zoë"))) for _ in range(2)]
    token = gate.start(300, {"a": "1", "b": "2"})
    session_id, fields = client.verify(token).session_id, client.export(token)[3:]

    def send(new_id: str, *, again: bool) -> str:
        new = client.sign(new_id, 1)
        words = (b"", b"", b"", token, list[bytes]())
        replaced = client.replacing(fields, session_id, new_id)
        client.send_enroll(new, "zoë", *words, again=again, replaced=replaced)
        return new

    for again in (True, False):  # the first try was lost, or comes late
        with refused("IDTAKEN"):
            send(ids[0], again=again)
    assert gate.pall(token) == {"a": b"1", "b": b"2"}
    new = send(ids[1], again=False)
    gate.pset(new, "a", "3")
    before = raw_fields(server, ids[1])
    assert send(ids[1], again=True) == new
    assert raw_fields(server, ids[1]) == before
    assert gate.pall(new) == {"a": b"3", "b": b"2"}
    with refused("NOSESSION"):
        client.touch(token)


def raw_fields(server: Server, session_id: str) -> object:
    with server.client() as admin:
        return admin.hgetall(key_of(session_id))


@pytest.mark.parametrize("limit", [0, 1])
def test_a_sealed_session_moves_to_another_slot(
    cluster: Cluster, cluster_client: Client, limit: int
) -> None:
    """On a cluster CROSSSLOT sends it the way of copies, sealed for the id that it gets at last."""
    client = cluster_client
    client.sealing_key, client.limit = SEALING_KEY, limit
    with RedisCluster("127.0.0.1", cluster.port, protocol=2) as redis:
        gate = SessionGate(redis, sign_key=SIGN_KEY, sealing_key=SEALING_KEY)
        token = gate.start(300, {"a": "1"}, subject="alice")
        gate.pset(token, "timed", "2", ttl=100)
        with refused("CROSSSLOT"):
            client.sign_in(token, "zoë")
        new = client.renew(token, subject="zoë")
        assert gate.pall(new) == {"a": b"1", "timed": b"2"}
        assert gate.info(new).generation == 1
        # In the same slot it is one step: it neither is copied nor pends.
        last = client.sign_in(new, "zoë")
        assert gate.pall(last) == {"a": b"1", "timed": b"2"}
        assert [info.id for info in gate.sessions("zoë")] == [client.verify(last).session_id]
        assert gate.sessions("alice") == []


@pytest.mark.parametrize("evicts", [True, False])
def test_a_session_that_is_the_subjects_takes_its_own_place(
    client: Client, server: Server, evicts: bool
) -> None:
    """At a full limit a session signs in as its own subject again: none goes, nor is it refused."""
    gate = SessionGate(
        server.client(),
        sign_key=SIGN_KEY,
        sealing_key=SEALING_KEY,
        max_sessions=2,
        on_overflow="evict" if evicts else "reject",
    )
    client.sealing_key, client.limit, client.evicts = SEALING_KEY, 2, evicts
    token, other = (gate.start(300, {"a": "1"}, subject="zoë") for _ in range(2))
    for sign_in in (client.renew, gate.renew):
        token = sign_in(token, subject="zoë")
        assert gate.pget(token, "a") == gate.pget(other, "a") == b"1"
        ids = [client.verify(each).session_id for each in (token, other)]
        assert [info.id for info in gate.sessions("zoë")] == ids
    gate.end_all("zoë")


def test_a_sealed_session_that_does_not_open_stays(client: Client, server: Server) -> None:
    """If a payload does not open, nobody signs in, and the session is as it was."""
    gate = SessionGate(server.client(), sign_key=SIGN_KEY, sealing_key=SEALING_KEY)
    client.sealing_key = SEALING_KEY
    token = gate.start(300, {"a": "1"})
    client.pset(token, "b", b"not sealed")
    with server.client() as admin:
        before = admin.hgetall(key_of(client.verify(token).session_id))
        with pytest.raises(UnsealError):
            gate.renew(token, subject="zoë")
        with pytest.raises(NotSealedError):
            client.renew(token, subject="zoë")
        assert admin.hgetall(key_of(client.verify(token).session_id)) == before
    assert client.sessions("zoë") == []


def test_what_was_never_sealed_is_taken_for_a_time(client: Client, server: Server) -> None:
    """Told so, a gate takes data as it is unless it begins as the mark does, as the page says."""
    accepting = SessionGate(
        server.client(), sign_key=SIGN_KEY, sealing_key=SEALING_KEY, accept_unsealed=True
    )
    token = client.start(300, {})
    mark = bytes.fromhex("C1 53 47")
    for data in (b"x", b"plain text", b"\xc1x", b"\xc1Sx", b"x" + mark):
        client.pset(token, "a", data)
        assert accepting.pget(token, "a") == data
    for data in (b"\xc1", b"\xc1S", mark, mark + b"x", mark + b"\1", mark + b"\2" + bytes(60)):
        client.pset(token, "a", data)
        with pytest.raises(UnsealError):
            accepting.pget(token, "a")


def test_renewals_are_shared(pair: Pair) -> None:
    """Whoever of the two renews a token within its grace gets the successor of the other."""
    client, gate = pair.client, pair.gate()
    token = client.start(300, {"user": b"x"})
    second = client.renew(token)
    assert gate.renew(token) == second
    third = gate.renew(second, grace=0)
    with refused("NOSESSION"):
        client.renew(second)
    assert client.renew(token) == gate.renew(token) == third
    assert client.pget(third, "user") == gate.pget(token, "user") == b"x"
    assert gate.info(third).generation == client.info(third).generation == 2


def test_a_successor_signed_with_another_key_of_the_ring_is_found(pair: Pair) -> None:
    """The fingerprint tells which sign key signed the successor, whoever asks for it."""
    client = pair.client
    rings = (b"the new one " * 3, SIGN_KEY.encode()), (SIGN_KEY.encode(), b"the new one " * 3)
    client.sign_keys = rings[0]
    gate = pair.gate(sign_key=list(rings[1]))
    for first, second in ((client.renew, gate.renew), (gate.renew, client.renew)):
        token = client.start(300, {"user": b"x"}, "zoë")
        assert first(token) == second(token)
        # The realm went with the sign key, and both count it as theirs.
        assert len(gate.sessions("zoë")) == len(client.sessions("zoë")) == 1
        assert gate.end_all("zoë") == 1


def told(info: SessionInfo | Info) -> tuple[object, ...]:
    """What stays the same from one moment to the next."""
    if isinstance(info, Info):
        return (info.session_id, info.started_us // 1000, info.ends_ms, *info[4:])
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    return (
        info.id,
        (info.created_at - epoch) // timedelta(milliseconds=1),
        (info.expires_at - epoch) // timedelta(milliseconds=1),
        info.idle_timeout,
        info.generation,
        info.subject or "",
        dict(info.payloads),
    )


def drop_end(info: tuple[object, ...]) -> tuple[object, ...]:
    return (*info[:2], *info[3:])


def test_what_is_told_of_sessions_is_the_same(pair: Pair) -> None:
    """Both tell the same of every session of a subject, whoever opened, moved or renewed it."""
    client, gate = pair.client, pair.gate()
    subject = "50% {zoë}"
    tokens = [
        client.start(300, {"a": b"1"}, subject, idle=100),
        gate.start(300, {"a": b"12"}, subject=subject, idle_timeout=200),
        client.renew(gate.start(300, {"b": b"1"}), subject=subject),
        gate.renew(client.start(300, {"b": b"12"}, idle=50), subject=subject),
        client.renew(gate.start(300, subject="alice", idle_timeout=7), subject=subject),
        gate.renew(client.start(300, {}, "alice"), subject=subject),
    ]
    tokens[0] = gate.renew(tokens[0])
    tokens[1] = client.renew(tokens[1])
    client.pset_if(tokens[0], "timed", b"123", ttl=100)
    listed = [told(info) for info in client.sessions(subject)]
    for others in (
        gate.sessions(subject),
        [client.info(token) for token in tokens],
        [gate.info(token) for token in tokens],
    ):
        # The server may stand still between the time and what a session has left.
        ends = [pytest.approx(info[2], abs=50) for info in listed]
        assert [told(info)[2] for info in others] == ends
        assert [drop_end(told(info)) for info in others] == [drop_end(info) for info in listed]
    assert [info[4] for info in listed] == [1] * 6
    assert client.sessions("alice") == []
    assert gate.sessions("alice") == []


def test_a_subjects_sessions_are_shared(pair: Pair) -> None:
    """Each of the two ends sessions of a subject, and keeps to its limit, for both."""
    client, gate = pair.client, pair.gate()
    ours, theirs = client.start(300, {}, "zoë"), gate.start(300, subject="zoë")
    other = client.start(300, {}, "zoë")
    client.end_one("zoë", gate.verify(theirs))
    with pytest.raises(SessionNotFoundError):
        gate.touch(theirs)
    gate.end_one("zoë", gate.verify(other))
    with refused("NOSESSION"):
        client.touch(other)
    client.expire(ours, 1000)
    assert gate.sessions("zoë")[0].seconds_left > 999
    info = client.info(ours)
    score = pair.admin.zscore(index_of("zoë"), entry(info))
    assert score == pytest.approx(info.ends_ms, abs=50)
    client.limit, client.evicts = 2, False
    strict = pair.gate(max_sessions=2, on_overflow="reject")
    new = strict.start(300, subject="zoë")
    with pytest.raises(TooManySessionsError):
        strict.start(300, subject="zoë")
    with refused("TOOMANY"):
        client.start(300, {}, "zoë")
    client.evicts = True
    newest = client.start(300, {}, "zoë")
    with pytest.raises(SessionNotFoundError):
        gate.touch(ours)
    assert gate.end_all("zoë", keep=newest) == 1
    with refused("NOSESSION"):
        client.touch(new)
    assert client.end_all("zoë") == 1
    assert pair.admin.exists(index_of("zoë")) == 0


def entry(info: Info) -> bytes:
    return b"%d%b" % (info.started_us, info.session_id.encode())


def test_an_application_with_another_sign_key_is_no_concern(pair: Pair) -> None:
    """Two applications list, end and limit their own sessions of a subject, in one index."""
    gate = pair.gate(sign_key="another sign key, 32 bytes and more", max_sessions=1)
    theirs, ours = gate.start(300, subject="zoë"), pair.client.start(300, {}, "zoë")
    assert [info.session_id for info in pair.client.sessions("zoë")] == [
        pair.client.verify(ours).session_id
    ]
    with refused("NOSESSION"):
        pair.client.end_one("zoë", gate.verify(theirs))
    pair.client.limit = 1
    pair.client.start(300, {}, "zoë")
    assert pair.client.end_all("zoë") == 1
    assert [info.id for info in gate.sessions("zoë")] == [gate.verify(theirs)]


def test_use_is_written_once_per_tenth(client: Client, server: Server) -> None:
    """Use moves the end of a session if a tenth of its idle timeout is gone, and not before."""
    token = client.start(300, {"user": b"x"}, idle=100)
    key = key_of(client.verify(token).session_id)
    uses: list[Callable[[str], object]] = [
        client.touch,
        client.info,
        client.pall,
        lambda token: client.pget(token, "user"),
        lambda token: client.pget_many(token, "none"),
        client.export,
        client.open,
        lambda token: client.open(token, all_of_them=True),
        lambda token: client.pset_many(token, {}, ("none",)),
        lambda token: client.pset(token, "user", b"y"),
    ]
    with server.client() as admin:
        for use in uses:
            admin.pexpire(key, 91_000)
            use(token)
            assert 80_000 < admin.pttl(key) <= 91_000
            admin.pexpire(key, 90_000)
            use(token)
            assert 99_000 < admin.pttl(key) <= 100_000
        client.expire(token, 50)
        admin.pexpire(key, 20_000)
        client.touch(token)
        assert 49_000 < admin.pttl(key) <= 50_000


def test_what_changes_while_a_session_moves_is_taken_along(client: Client) -> None:
    """A payload stored behind the first export is moved by the second; an end ends the copy."""
    token = client.start(300, {"a": b"1", "b": b"2"})

    def change(_: str) -> None:
        client.pset_if(token, "a", b"5", ttl=100)
        client.pdel(token, "b")
        client.pset(token, "c", b"6")

    between_the_exports(client, change)
    moved = client.move(token, "zoë")
    assert client.pall(moved) == {"a": b"5", "c": b"6"}
    copies = []

    def end(copy: str) -> None:
        copies.append(copy)
        client.end(moved)

    between_the_exports(client, end)
    with refused("NOSESSION"):
        client.move(moved, "zoë")
    for dead in (token, moved, *copies):
        with refused("NOSESSION"):
            client.pall(dead)
    assert client.sessions("zoë") == []


def between_the_exports(client: Client, event: Callable[[str], None]) -> None:
    """Let this happen behind each enroll of a client, with the token of the new session."""

    def enroll(*args: object, **options: object) -> str:
        new = Client.enroll(client, *args, **options)  # type: ignore[arg-type]  # as they were given
        event(new)
        return new

    client.enroll = enroll  # type: ignore[method-assign]  # that is the moment


def test_a_retired_sign_key_verifies(client: Client, server: Server) -> None:
    """The first sign key signs and all verify, in the client as in SessionGate."""
    old = client.start(300, {"user": b"x"})
    client.sign_keys = (b"the new one " * 3, SIGN_KEY.encode())
    new = client.start(300, {"user": b"y"})
    gate = SessionGate(server.client(), sign_key=["the new one " * 3, SIGN_KEY])
    assert client.pget(old, "user") == gate.pget(old, "user") == b"x"
    assert client.pget(new, "user") == gate.pget(new, "user") == b"y"


def test_a_start_that_is_sent_again(client: Client) -> None:
    """A repeated start leaves what the first made, opens nothing itself, and takes nobody's id."""
    token = client.start(300, {"user": b"x"})
    for _ in range(2):
        client.send_start(token, 300, {"user": b"other"}, again=True)
    assert client.pget(token, "user") == b"x"
    lost = client.sign("A" * 16)
    client.end(token)
    for gone in (token, lost):
        # Whether the first try never came or what it opened has ended: neither opens it any more.
        for again in (True, False, True):
            with refused("IDTAKEN"):
                client.send_start(gone, 300, {}, again=again)
        with refused("NOSESSION"):
            client.touch(gone)
    theirs = client.start(300, {"user": b"theirs"})
    client.sign_keys = (b"another sign key", *client.sign_keys)
    with refused("IDTAKEN"):
        client.send_start(client.sign(client.verify(theirs).session_id), 300, {}, again=True)
    assert client.pget(theirs, "user") == b"theirs"


def test_an_enroll_that_is_sent_again(client: Client) -> None:
    """A repeated enroll leaves what the first made, opens nothing itself, and takes nobody's id."""
    source, other = (client.start(300, {"user": b"x"}) for _ in range(2))
    ids = [draw_in(slot_of(index_of("zoë"))) for _ in range(4)]
    words = (b"300", b"", b"", None, [b":user", b"x"])
    given = (b"", b"", b"", source, list[bytes]())
    calls = ((client.sign(ids[0]), words), (client.sign(ids[1], 1), given))
    for token, args in calls:
        client.send_enroll(token, "zoë", *args, again=False)
        for _ in range(2):
            client.send_enroll(token, "zoë", *args, again=True)
        with refused("IDTAKEN"):
            client.send_enroll(token, "zoë", *args, again=False)
        assert client.pget(token, "user") == b"x"
    assert len(client.sessions("zoë")) == 2
    with refused("NOSESSION"):
        client.touch(source)
    client.sign_keys = (b"another sign key", *client.sign_keys)
    with refused("IDTAKEN"):
        client.send_enroll(client.sign(ids[0]), "zoë", *words, again=True)
    client.sign_keys = client.sign_keys[1:]
    assert client.end_all("zoë") == 2
    lost = (
        (client.sign(ids[2]), words),
        (client.sign(ids[3], 1), (b"", b"", b"", other, list[bytes]())),
    )
    for token, args in calls + lost:
        for again in (True, False, True):
            with refused("IDTAKEN"):
                client.send_enroll(token, "zoë", *args, again=again)
    assert client.sessions("zoë") == []
    assert client.pget(other, "user") == b"x"


def test_a_deletion_that_is_sent_again(client: Client) -> None:
    """A repeated pdel succeeds, and leaves what was stored after it: so do those of the last 8."""
    token = client.start(300, {"user": b"x"})
    nonces = [secrets.token_bytes(7) for _ in range(8)]
    for nonce in nonces:
        client.pset(token, "user", b"y")
        client.send_pdel(token, "user", nonce)
    client.pset(token, "user", b"z")
    for nonce in nonces:
        client.send_pdel(token, "user", nonce)
        assert client.pget(token, "user") == b"z"
    client.pdel(token, "user")
    with refused("NOPAYLOAD"):
        client.send_pdel(token, "user", nonces[0])
    client.pset(token, "user", b"z")
    with refused("NOPAYLOAD"):
        client.send_pdel(token, "user", nonces[0])
    assert client.pget(token, "user") == b"z"


def test_an_end_that_is_sent_again(client: Client) -> None:
    """A repeated end succeeds if the session is gone, by token or by id; a first one does not."""
    by_token, by_id = (client.start(300, {}, "zoë") for _ in range(2))
    client.end(by_token)
    client.end_one("zoë", client.verify(by_id).session_id)
    for token in (by_token, by_id):
        session_id = client.verify(token).session_id
        client.end(token, again=True)
        client.end_one("zoë", session_id, again=True)
        with refused("NOSESSION"):
            client.end(token)
        with refused("NOSESSION"):
            client.end_one("zoë", session_id)


def test_an_end_that_is_sent_again_is_no_success_on_what_is_there(client: Client) -> None:
    """A repeated end of a session that is not this token's or subject's is NOSESSION, as ever."""
    token = client.start(300, {}, "zoë")
    session_id = client.verify(token).session_id
    with refused("NOSESSION"):
        client.end_one("alice", session_id, again=True)
    with refused("NOSESSION"):
        client.end(client.sign(session_id, 5), again=True)
    client.touch(token)
    # The first may never have come.
    client.end(token, again=True)
    other = client.start(300, {}, "zoë")
    client.end_one("zoë", client.verify(other).session_id, again=True)
    for ended in (token, other):
        with refused("NOSESSION"):
            client.touch(ended)


def test_a_session_that_was_taken(client: Client, server: Server) -> None:
    """Who took a session gets it once more, nobody else does, and no token opens it."""
    token = client.start(300, {"a": b"1"}, "zoë")
    client.pset_if(token, "b", b"2", ttl=100)
    session_id, _, fingerprint = client.verify(token)
    with server.client() as admin:
        before = admin.hget(key_of(session_id), "fp")
        taker = client.verify(client.sign(session_id, 1)).fingerprint
        taken = client.export(token, taker)
        assert couples(client.export(token, taker)[3:]) == couples(taken[3:])
        assert couples(taken[3:])[b":a"] == b"1"
        held = admin.hgetall(key_of(session_id))
        assert held.keys() == {b"taken", b":a", b";b"}
        assert held[b"taken"] == taker + before
        assert before.startswith(fingerprint)
        assert 0 < admin.pttl(key_of(session_id)) <= 60_000
    for operation, *args in (
        (client.export,),
        (client.export, b"another taker..."),
        (client.touch,),
        (client.pall,),
        (client.end,),
    ):
        with refused("NOSESSION"):
            operation(token, *args)
    assert client.sessions("zoë") == []


@pytest.mark.parametrize("name", ["user", "cart"])
def test_the_reply_of_another_request_is_refused(client: Client, name: str) -> None:
    """A dirty connection gives neither data nor an error of another session, and is dropped."""
    mine, other = client.start(300, {"user": b"mine"}), client.start(300, {"user": b"theirs"})
    assert client.pget(mine, "user") == b"mine"
    send_pget(client, other, field(name))
    with pytest.raises(LostReplyError):
        client.pget(mine, "user")
    assert client.pget(mine, "user") == b"mine"


def send_pget(client: Client, token: str, *args: bytes) -> None:
    """Leave a reply unread."""
    session_id, _, fingerprint = client.verify(token)
    key = key_of(session_id)
    call = (b"EVALSHA", sha1(SCRIPTS["pget"]), b"1", key)
    client.send(client.port, *call, fingerprint, *args, b"another echo")


def test_an_error_without_an_echo_is_refused_unless_it_is_proven(
    client: Client, server: Server
) -> None:
    """What broke off the script of another request is not taken for an answer."""
    mine, other = client.start(300, {"user": b"mine"}), client.sign("A" * 16)
    assert client.pget(mine, "user") == b"mine"
    with server.client() as admin:
        admin.set(key_of("A" * 16), "no hash")
    send_pget(client, other, field("user"))
    with pytest.raises(LostReplyError):
        client.pget(mine, "user")
    assert client.pget(mine, "user") == b"mine"
    assert client.connections == 2


@pytest.mark.parametrize("length", [1, 12, 40])
def test_an_echo_of_any_length_works(client: Client, length: int) -> None:
    """The scripts return whatever echo they are given, behind data and behind errors."""
    client.echo_length = length
    all_operations(client)


def test_resp3_gives_the_same_replies(client: Client, server: Server) -> None:
    """With RESP3 a script's reply is the string or the error that RESP2 has."""
    if version(server) < 6:
        pytest.skip("RESP3 came with Redis 6")
    session_id, _, fingerprint = client.verify(client.start(300, {"user": b"x"}))
    with Redis(port=server.port, protocol=3) as resp3:
        words = (
            "EVAL",
            SCRIPTS["pget"],
            1,
            f"sg-session:{{{session_id}}}",
            fingerprint,
        )
        assert resp3.execute_command(*words, ":user", "the-echo") == b"xthe-echo"
        with pytest.raises(ResponseError, match=r"^NOPAYLOAD the-echo$"):
            resp3.execute_command(*words, ":cart", "the-echo")


def version(server: Server) -> int:
    with server.client() as admin:
        return int(admin.info("server")["redis_version"].split(".")[0])


def replacing_sign_in(client: Client) -> Callable[[str, str], str]:
    """What gives a session to a subject with its payloads replaced."""

    def sign_in(token: str, subject: str) -> str:
        held = couples(client.export(token)[3:])
        replaced = triples((each, data, b"anew") for each, data in held.items())
        return client.enroll(subject, generation=1, source=token, replaced=replaced)

    return sign_in


def test_a_server_without_memory(own_client: Client, own_server: Server) -> None:
    """OOM comes as the page shows it for the version, with the echo; nothing is written."""
    client = own_client
    sealed_sign_in = replacing_sign_in(client)
    token = client.start(300, {"user": b"x"})
    with own_server.client() as admin:
        admin.config_set("maxmemory", 1)
    with refused("OOM") as caught:
        client.pset(token, "user", b"y")
    new = client.sign("A" * 16)
    with refused("OOM"):
        client.send_start(new, 300, {}, again=False)
    for operation, *args in (
        (client.pset_if, "user", b"y"),
        (client.pset_if, "user", b"y", b"", b"", 10),
        (client.pset_many, {"user": b"y"}),
        (client.pset_many, {"new": b"y"}, ("user",)),
        (client.pincr, "n"),
        (client.renew,),
        (client.renew, 10, "zoë"),
        (sealed_sign_in, "zoë"),
        (client.move, "zoë"),
        (client.import_fields, b":user", b"y"),
    ):
        with refused("OOM"):
            operation(token, *args)
    with refused("OOM"):
        client.start(300, {"user": b"y"}, "zoë")
    assert client.sessions("zoë") == []
    assert client.pall(token) == client.open(token, "user").payloads == {"user": b"x"}
    with refused("NOSESSION"):
        client.pget(new, "user")
    # What takes no memory works.
    for _ in range(2):
        client.mark(key_of(client.verify(token).session_id))
        with refused("NOPAYLOAD"):
            client.pdel(token, "none")
    client.pdel(token, "user")
    client.end(token)
    client.mark(key_of(client.verify(token).session_id))
    rows = table("Errors of the server")
    shown = rows["before Redis 7" if version(own_server) < 7 else "Redis 7 and later, Valkey"]
    expected = re.escape(shown.removesuffix(" <echo>")).replace("13", r"\d+")
    assert re.fullmatch(expected, str(caught.value))


def read_only(*, broken_off: bool = False) -> "pytest.RaisesExc[RefusedError]":
    """READONLY, behind it an echo unless the script was broken off."""
    kind = BrokenOffError if broken_off else RefusedError
    return pytest.raises(
        RefusedError, check=lambda error: error.code == "READONLY" and type(error) is kind
    )


def test_a_server_that_became_a_replica(own_client: Client, own_server: Server) -> None:
    """READONLY comes from every script that writes, found as the page says."""
    client = own_client
    sealed_sign_in = replacing_sign_in(client)
    token = client.start(300, {"user": b"x", "n": b"1"})
    of_zoe = client.start(300, {}, "zoë")
    used = client.start(300, {}, idle=1)
    time.sleep(0.2)
    with own_server.client() as admin:
        admin.slaveof("127.0.0.1", 1)  # its name in Redis 4
    for operation, *args in (
        (client.expire, 300),
        (client.expire, 0),
        (client.renew,),
        (client.renew, 10, "zoë"),
        (sealed_sign_in, "zoë"),
        (client.pset, "user", b"y"),
        (client.pset_if, "user", b"y"),
        (client.pset_many, {"user": b"y"}),
        (client.pset_many, {}, ("user",)),
        (client.pdel, "user"),
        (client.pdel, "none"),
        (client.ppop, "user"),
        (client.pincr, "n"),
        (client.export, b"a taker's print."),
        (client.import_fields, b":user", b"y"),
        (client.end,),
    ):
        with read_only():
            operation(token, *args)
    with read_only():
        client.end_one("zoë", client.verify(of_zoe).session_id)
    for subject in (None, "zoë"):
        with read_only():
            client.start(300, {}, subject)
    with read_only():
        client.touch(used)  # use has to be written
    for key in (key_of(client.verify(token).session_id), key_of("A" * 16)):
        with read_only():
            client.mark(key)
    for listing in (client.sessions, client.end_all):
        with read_only(broken_off=True):
            listing("zoë")
    assert client.pall(token) == {"user": b"x", "n": b"1"}


def test_a_server_that_is_busy(own_client: Client, own_server: Server) -> None:
    """BUSY is proven on a connection that asked nothing before; then the call is sent again."""
    client, other = own_client, Client(own_server.port, SIGN_KEY.encode())
    token = client.start(300, {"n": b"1"})
    with own_server.client() as admin, own_server.client() as busy:
        admin.config_set("lua-time-limit", 1)
        endless = threading.Thread(target=run_endlessly, args=(busy,))
        endless.start()
        while not is_busy(admin):
            time.sleep(0.01)
        with pytest.raises(UnprovenError, match=r"^BUSY"):
            client.pincr(token, "n")
        threading.Timer(0.05, admin.script_kill).start()
        assert other.pincr(token, "n") == 2
        endless.join()
        other.drop()


def run_endlessly(busy: Redis) -> None:
    with pytest.raises(ResponseError, match=r"(?i)script killed"):
        busy.eval("while true do end", 0)


def is_busy(admin: Redis) -> bool:
    try:
        admin.ping()
    except ResponseError as error:
        return str(error).startswith("BUSY")
    return False


def test_waiting_for_replicas(own_client: Client, own_server: Server) -> None:
    """WAIT on the connection that wrote tells who has it; behind what only read, after a mark."""
    client, other = own_client, Client(own_server.port, SIGN_KEY.encode())
    with own_server.client() as admin:
        admin.config_set("repl-diskless-sync-delay", 0)
    with Server(own_server.binary, ("--slaveof", "127.0.0.1", str(own_server.port))) as replica:
        token = client.start(300, {}, "zoë")
        assert client.wait(1, 10_000) == 1
        replica.pause()
        try:
            new = client.renew(token)
            assert client.wait(1, 1) == 0
            key = key_of(client.verify(token).session_id)
            assert other.renew(token) == new  # it only reads
            other.mark(key)
            assert other.wait(1, 1) == 0
            client.end(new)
            assert client.wait(1, 1) == 0
            other.end(new, again=True)  # it only reads
            for gone in (key, index_of("nobody")):
                other.mark(gone)
                assert other.wait(1, 1) == 0
            assert other.mark(key, b"gone")
            assert not other.mark(key, client.verify(new).fingerprint)
            assert other.end_all("zoë") == 0
            other.mark(index_of("zoë"))
            assert other.wait(1, 1) == 0
        finally:
            replica.resume()
        for each in (client, other):
            assert each.wait(1, 10_000) == 1
            each.drop()
        with replica.client() as there:
            assert there.exists(key) == 0


def test_a_broken_off_script_has_no_echo(client: Client, server: Server) -> None:
    """WRONGTYPE on a foreign Redis key answers without the echo, and `echo` proves it."""
    token = client.sign("A" * 16)
    with server.client() as admin:
        admin.set(key_of("A" * 16), "no hash")
    with pytest.raises(BrokenOffError, match=r"WRONGTYPE"):
        client.pget(token, "user")
    with refused("IDTAKEN"):
        client.send_start(token, 300, {}, again=False)
    assert client.connections == 1


def test_the_commands_that_a_user_needs(own_client: Client, own_server: Server) -> None:
    """A user who may run the commands that the page lists, on its Redis keys, can do everything."""
    if version(own_server) < 6:
        pytest.skip("access control lists came with Redis 6")
    with own_server.client() as admin:
        admin.execute_command(
            *("ACL", "SETUSER", "app", "on", ">password", "~sg-session:*", "-@all"),
            *(f"+{command.lower()}" for command in needed_commands()),
        )
    own_client.login = ("app", "password")
    all_operations(own_client)
    assert own_client.wait(0, 1) == 0


def needed_commands() -> set[str]:
    listed = section("What the server needs").partition("these commands:")[2].partition(".")[0]
    return set(re.findall(r"`([A-Z]+)`", listed))


# --- the page against the rest ---


def test_the_worked_example() -> None:
    """The worked example's values follow from its sign key, session id and subject."""
    shown = table("A worked example")
    sign_key, session_id = shown["sign key"].encode(), shown["session id"]
    mac = hmac.digest(sign_key, session_id.encode(), "sha256")
    successor = f"v2.{session_id}.1"
    second = hmac.digest(sign_key, successor.encode(), "sha256")
    subject = shown["subject"]
    assert shown == {
        "sign key": sign_key.decode(),
        "realm, in hex": realm(sign_key).hex(),
        "session id": session_id,
        "Redis key": f"sg-session:{{{session_id}}}",
        "signature": mac.hex(),
        "token": f"v1.{session_id}.{mac.hex()}",
        "fingerprint, in hex": hashlib.sha256(mac).digest()[:16].hex(),
        "signature, generation 1": second.hex(),
        "token, generation 1": f"{successor}.{second.hex()}",
        "its fingerprint, in hex": hashlib.sha256(second).digest()[:16].hex(),
        "subject": subject,
        "Redis key of its index": index_of(subject).decode(),
        "slot of that one": str(slot_of(index_of(subject))),
    }
    assert set("%{}") < set(subject)
    gate = SessionGate.from_url("memory://", sign_key=sign_key)
    assert gate.verify(shown["token"]) == session_id
    assert gate.verify(shown["token, generation 1"]) == session_id
    names = keyspace.Keyspace("sg-session", os.urandom)
    assert names.index_key(subject.encode()) == index_of(subject)
    assert keyspace.slot_of(index_of(subject)) == slot_of(index_of(subject))


def test_the_example_of_sealing() -> None:
    """The example's values follow from its keys, id, name, data and nonce, for a gate as well."""
    shown = table("An example of sealing")
    sealing_key, nonce = (
        bytes.fromhex(shown[f"{name}, in hex"]) for name in ("sealing key", "nonce")
    )
    session_id, name = shown["session id"], shown["payload field"].removeprefix(":")
    sealed = seal(sealing_key, session_id, name, shown["data"].encode(), nonce)
    additional = header_of(sealing_key) + key_of(session_id) + field(name)
    assert shown == {
        "sealing key, in hex": sealing_key.hex(),
        "encryption key, in hex": derived(sealing_key, b"sg payload seal").hex(),
        "key id, in hex": header_of(sealing_key)[4:].hex(),
        "session id": session_id,
        "payload field": f":{name}",
        "data": shown["data"],
        "nonce, in hex": nonce.hex(),
        "additional data, in hex": additional.hex(),
        "sealed data, in hex": sealed.hex(),
    }
    ring = SealingKeyRing(sealing_key, random=lambda _: nonce)
    data, words = shown["data"].encode(), (key_of(session_id), field(name))
    assert ring.seal(data, *words) == sealed
    assert ring.open(sealed, *words) == unseal(sealing_key, session_id, name, sealed) == data
    assert sealing_key_id(sealing_key) == sealed_by(sealed) == shown["key id, in hex"]
    told = table("Sealed payloads")
    assert f"{len(sealed) - len(data)} bytes more" in told["sealed data"]
    for purpose, row in (("sg payload seal", "encryption key"), ("sg seal key id", "key id")):
        assert f"personalization `{purpose}`" in told[row] + "`"


def test_every_slot_has_an_ending() -> None:
    """As many endings as the page says carry 13 letters into a slot, whichever it is."""
    free = draw(13)
    endings = map("".join, itertools.product(LETTERS, repeat=3))
    found = Counter(slot_of(key_of(free + ending)) for ending in endings)
    assert len(found) == 16384
    text = " ".join(section("The slot of a session with a subject").split())
    assert f"of the {found.total()} endings {min(found.values())} to {max(found.values())}" in text


@pytest.mark.parametrize("which", ["v1", "v2"])
def test_the_regular_expressions_are_the_librarys(which: str) -> None:
    """What an expression of the page matches whole, and only that, is a token to SessionGate."""
    shown = table("Tokens")[f"regular expression, {which}"]
    assert shown == {"v1": V1, "v2": V2}[which].pattern
    example = table("A worked example")
    good = example["token" if which == "v1" else "token, generation 1"]
    gate = SessionGate.from_url("memory://", sign_key=example["sign key"])
    signature = good.rpartition(".")[2]
    for text in (
        good,
        good.upper(),
        good.replace(signature, signature.upper()),
        good.replace("c9eT", "c٩eT"),
        good.replace("c9eT", "c-eT"),
        good.replace(which, "v3"),
        good.replace(which, which.upper()),
        good.replace(f"{which}.", which),
        good.replace("Mvk.", "Mvk.0"),
        good.replace("Mvk.", "Mvk.+"),
        good.replace("Mvk.", "Mvk.0."),
        good.replace("Mvk.1", "Mvk.\N{ARABIC-INDIC DIGIT ONE}"),
        good.replace("Mvk.1", "Mvk."),
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


def test_the_longest_generation_is_the_librarys() -> None:
    """A generation has up to 18 digits, as the page says."""
    client = Client(0, SIGN_KEY.encode())
    gate = SessionGate.from_url("memory://", sign_key=SIGN_KEY)
    token = client.sign("A" * 16, 10**18 - 1)
    assert gate.verify(token) == client.verify(token).session_id == "A" * 16
    assert f"86 to {len(token)} ASCII characters" in section("Tokens")
    with pytest.raises(InvalidTokenError):
        gate.verify(client.sign("A" * 16, 10**18))


def test_the_limits_are_the_librarys() -> None:
    """The page's limits of arguments and of the prefix are those that the library checks."""
    text = section("What Redis holds")
    limits = table("What Redis holds")
    longest = f"{arguments.MAX_TTL_SECONDS} whole seconds"
    assert limits["ttl"].startswith(f"0 to {longest} (100 years)")
    assert limits["grace"] == "likewise"
    assert limits["idle timeout"].startswith(f"1 to {longest}")
    assert limits["name"].startswith(f"1 to {arguments.MAX_NAME_BYTES} bytes of UTF-8")
    assert limits["data"].startswith(f"1 to {arguments.MAX_DATA_BYTES} bytes")
    assert limits["subject"].startswith(f"1 to {arguments.MAX_SUBJECT_BYTES} bytes of UTF-8")
    assert limits["what is added to a counter"].startswith(f"{-(2**63)} to {2**63 - 1} (64 bits)")
    assert f"1 to {keyspace.MAX_PREFIX_BYTES} bytes of UTF-8 without braces" in text


def test_a_hash_holds_what_the_page_says(client: Client, server: Server) -> None:
    """Fields of a session and the entry of its index have the lengths and contents of the page."""
    first = client.start(300, {"a": b"1"}, "zoë", idle=100)
    token = client.renew(client.renew(first))
    client.pset_if(token, "timed", b"2", ttl=50)
    client.pincr(token, "timed")
    nonces = [b"nonce%02d" % n for n in range(10)]
    for nonce in nonces[:-1]:
        client.pset(token, "b", b"")
        client.send_pdel(token, "b", nonce)
    with refused("NOPAYLOAD"):
        client.send_pdel(token, "b", nonces[-1])
    again, never = client.start(300, {"a": b"1"}), client.sign("B" * 16)
    client.send_start(again, 300, {}, again=True)
    with refused("IDTAKEN"):
        client.send_start(never, 300, {}, again=True)
    for key in (key_of(client.verify(again).session_id), key_of("A" * 16)):
        client.mark(key)
    session_id, _, fingerprint = client.verify(token)
    info = client.info(token)
    now_ms = time.time() * 1000
    with server.client() as admin:
        held = {name.decode(): data for name, data in admin.hgetall(key_of(session_id)).items()}
        ((listed, score),) = admin.zrange(index_of("zoë"), 0, -1, withscores=True)
        assert 299_000 < admin.pttl(index_of("zoë")) <= 300_000
        tries = tries_of("B" * 16)
        assert admin.get(tries) == b""
        assert 3_599_000 < admin.pttl(tries) <= 3_600_000
        keys = {key_of(client.verify(each).session_id) for each in (token, again)}
        assert set(admin.keys()) == keys | {tries, index_of("zoë")}
        assert set(admin.hgetall(key_of(client.verify(again).session_id))) == {b"fp", b":a"}
    assert set(held) == {"fp", ":a", ";timed", "sub", "gen", "old", "did"}
    rows = set(table("What Redis holds"))
    fields = {"fp", "sub", "gen", "old", "did", "pending", "taken", "sum`, `mark"}
    assert fields | {":<name>", ";<name>"} <= rows
    for shown in ("{<id>}", "subject:{<subject>}", "tries:{<id>}"):
        assert f"<prefix>:{shown}" in rows
    assert held["fp"] == fingerprint + b"%d%d100" % (info.started_us, info.ends_ms)
    assert 299_000 < info.ends_ms - now_ms <= 300_000
    assert held["sub"] == realm(SIGN_KEY.encode()) + "zoë".encode()
    assert re.fullmatch(rb"2 .{8}", held["gen"], re.DOTALL)
    earlier = [held["old"][at : at + 29] for at in range(0, len(held["old"]), 29)]
    assert [old[:16] for old in earlier] == [
        client.verify(older).fingerprint for older in (first, client.sign(session_id, 1))
    ]
    for end, seconds in (*((old[16:], 10) for old in earlier), (held[";timed"][:13], 50)):
        assert (seconds - 1) * 1000 < int(end) - now_ms <= seconds * 1000
    assert held[";timed"][13:] == b"3"
    assert held["did"] == b"1".join(nonces[-8:]) + b"0"
    assert (listed, score) == (entry(info), info.ends_ms)


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
    assert f"```lua\n{header}\n```" in section(name), f"not the header of {name}.lua"
    told = set(re.findall(r"^--   ((?:KEYS|ARGV)\[(?:last|\d+(?:\.\.)?)\])", header, re.MULTILINE))
    used = set(re.findall(r"(?:KEYS|ARGV)\[\d+\]", code))
    used |= {"ARGV[last]" for _ in re.findall(r"ARGV\[#ARGV\]", code)}
    used |= {
        f"ARGV[{first}..]"
        for first in re.findall(r"for i = (\d+), (?:#ARGV|\d+ \+ (?:realms|stored))", code)
    }
    used |= {f"KEYS[{first}..]" for first in re.findall(r"for i = (\d+), #KEYS", code)}
    if name == "enroll":
        used |= {"KEYS[4..]"}  # its last ones, as many as were listed
        assert "#KEYS - listed" in code
    # A first one of several may be used by itself.
    assert used - {name.replace("..", "") for name in told if ".." in name} <= told <= used
    for error in re.findall(r"error_reply\((.*)\)", code):
        assert re.search(r"(?:' '|\b[A-Z]+ ') \.\. echo(?:$|\))", error), f"no echo: {error}"
    errors = re.search(r" Errors: ([^.]+)\.$", header)
    assert set(re.findall(r"[A-Z]{5,}", errors[1] if errors else "")) == raised(name)


def raised(name: str) -> set[str]:
    """The codes of a script's own errors."""
    others = r"redis\.p?call\('[A-Z]+'|'WITHSCORES'"
    return set(re.findall(r"'([A-Z]{5,}) ?'", re.sub(others, "", header_and_code(name)[1])))


def test_nothing_is_specified_that_is_not_there() -> None:
    """The page has a section for no other script, and no other error."""
    names = re.findall(r"^### (\w+)$", PAGE.partition("## The scripts")[2], re.MULTILINE)
    assert sorted(names) == sorted(SCRIPTS)
    listed = set(table("The scripts")) - {"code", "---"}
    assert listed == set.union(*map(raised, SCRIPTS)) == CODES


def test_the_commands_are_those_that_the_scripts_call() -> None:
    """The list of commands for a user is what the scripts call, and what calls them."""
    called = {
        command
        for name in SCRIPTS
        for command in re.findall(r"redis\.p?call\('(\w+)'", header_and_code(name)[1])
    }
    assert needed_commands() == called | {"EVALSHA", "EVAL", "WAIT", "ASKING"}


def test_what_is_sent_again_is_what_the_library_sends_again() -> None:
    """The page lets a client send again what SessionGate does, and leaves alone what it does."""
    rows = re.findall(r"^\| (`.+?) \|", section("What is sent again"), re.MULTILINE)
    shown = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}
    told_so = {
        name: int(number) - 1
        for row, number in re.findall(r"^\| (`.+?) \| .*`1` in `ARGV\[(\d)\]`", PAGE, re.MULTILINE)
        for name in re.findall(r"`([a-z_]+)`", row)
    }
    assert told_so.keys() == {"start", "enroll", "end", "end_one"}
    left = section("What is sent again").partition("Leave the others")[2].partition(". ")[0]
    alone = set(re.findall(r"`([a-z_]+)`", left))
    assert not shown & alone
    assert shown | alone == set(SCRIPTS)
    met = set()
    for command in commands_of_the_library():
        name = command.script.name
        met.add(name)
        assert (command.repeat is not None) == (name in shown), name
        if command.repeat:
            args = list(command.args)
            if name in told_so:
                assert args[told_so[name]] == b"0"
                args[told_so[name]] = b"1"
            once_more = command.repeat(command)
            assert (once_more.keys, once_more.args) == (command.keys, tuple(args)), name
    assert met == set(SCRIPTS) - {"echo"}  # that is no operation
    pauses = [round(1000 * call._PAUSE * call._LONGER**n) for n in range(call._REPEATS)]
    text = " ".join(section("What is sent again").split())
    assert "at most four times, after pauses of up to {}, {}, {} and {} ms".format(*pauses) in text
    assert f"SessionGate does after {subjects.MAX_DRAWS} ids" in table("The scripts")["IDTAKEN"]


def commands_of_the_library() -> Iterator[AnyCommand]:
    """One of each kind: the first of every operation, and those that it goes on with."""
    names = keyspace.Keyspace("sg-session", keyspace.system_random)
    commands = Commands(SignKeyRing(SIGN_KEY), names, Values())
    token = Client(0, SIGN_KEY.encode()).sign("A" * 16)
    entry = b"0" * 16 + draw_in(slot_of(index_of("zoë"))).encode()
    yield commands.start(300)
    yield commands.touch(token)
    yield commands.info(token)
    expire = commands.expire(token, 300)
    yield expire
    yield following(expire, b"zo")
    yield commands.renew(token, 10, None)
    yield commands.end(token)
    yield commands.pset(token, "a", "1")
    yield commands.pset(token, "a", "1", if_absent=True)
    yield commands.pset_many(token, {})
    yield commands.open(commands.session(token), None)
    yield commands.pget(token, "a")
    yield commands.pget_many(token, ["a"])
    yield commands.pall(token)
    yield commands.pdel(token, "a")
    yield commands.ppop(token, "a")
    yield commands.pincr(token, "a", 1)
    yield commands.end_one("zoë", entry[16:].decode())
    for listing in (commands.sessions("zoë"), commands.end_all("zoë", None)):
        yield listing
        yield following(listing, b"9" * 16 + entry)
    # From slot to slot.
    sign_in = commands.renew(token, None, "zoë", 1)
    yield sign_in
    assert sign_in.recover is not None
    export = sign_in.recover(sign_in, ClusterCrossSlotError("CROSSSLOT"))
    assert export is not None
    yield export
    enroll = following(export, b"16:" + b"9" * 16 + b"1:90:2::a1:1")
    yield enroll
    take = following(enroll, b"")
    yield take
    fields = following(take, b"16:" + b"9" * 16 + b"1:90:2::a1:2")
    yield fields
    for key, sign in ((enroll.keys[0], enroll.args[0]), (export.keys[0], b"gone")):
        mark = following(fields, b"")
        yield mark
        assert (mark.keys, mark.args) == ((key,), (sign,))
        fields = mark


def test_replicas_are_waited_for_where_the_page_says() -> None:
    """Of several calls the library waits behind the one that did the work, told by its result."""
    entry = b"0" * 16 + draw_in(slot_of(index_of("zoë"))).encode()
    done = {
        "expire": (b"", b"zo"),
        "enroll": (b"", entry),
        "end_all": (b"1:", b"1:" + entry),
        "index": (b"9" * 16, b"9" * 16 + entry),
    }
    names = keyspace.Keyspace("sg-session", keyspace.system_random)
    commands = Commands(SignKeyRing(SIGN_KEY), names, Values())
    token = Client(0, SIGN_KEY.encode()).sign("A" * 16)
    expire, listing = commands.expire(token, 300, 1), commands.end_all("zoë", None, 1)
    several: list[AnyCommand] = [
        expire,
        commands.start(300, subject="zoë", min_replicas=1),
        commands.renew(token, None, "zoë", 1),
        listing,
        following(listing, b"9" * 16 + entry),
    ]
    for command in several:
        result, no_result = done[command.script.name]
        assert command.awaits(result)
        assert not command.awaits(no_result)
    assert {command.script.name for command in several} == set(done)
    assert following(expire, b"zo").awaits(b"")
    rows = section("Waiting for replicas")
    assert {name for name in done if f"`{name}`" in rows} == set(done)


def following(command: AnyCommand, answer: bytes) -> AnyCommand:
    """The command that an operation goes on with after this answer."""
    found = command.decode(answer)
    assert isinstance(found, Command)
    return found


def test_the_exchange(client: Client, server: Server) -> None:
    """What the page shows of an exchange is what a server says, word for word."""
    shown = section("An exchange").partition("```redis\n")[2].partition("```")[0]
    exchanges = re.split("^> ", shown, flags=re.MULTILINE)[1:]
    for exchange in exchanges:
        request, *lines = exchange.splitlines()
        for (kind, reply), line in zip(replies_to(client, server, request), lines, strict=True):
            sign, expected = re.fullmatch(r"(\(\w+\) |\d\) |)(.*)", line).groups()  # type: ignore[union-attr]  # what it does not match fails the test
            assert kind == {"(error) ": b"-", "(integer) ": b":"}.get(sign, b"$")
            beginning, dots, nothing = unquoted(expected).partition(b"...")
            assert reply.startswith(beginning) if dots else reply == beginning
            assert not nothing
    assert len(exchanges) == 9


def replies_to(client: Client, server: Server, request: str) -> list[tuple[bytes, bytes]]:
    """The kinds and texts that a server answers a request with, spelt as by `redis-cli`."""
    sources = {f"<{name}.lua>": source for name, source in SCRIPTS.items()}
    sources |= {f"<sha1 of {name}.lua>": sha1(source) for name, source in SCRIPTS.items()}
    words = [
        sources[word] if word.startswith("<") else unquoted(word)
        for word in re.findall(r'"(?:[^"\\]|\\.)*"|<[^>]+>|\S+', request)
    ]
    if words[0] != b"HGETALL":
        return [client.exchange(client.port, *words)]
    with server.client() as admin:
        return [(b"$", word) for pair in admin.hgetall(words[1]).items() for word in pair]


def unquoted(word: str) -> bytes:
    """A word as `redis-cli` spells it."""
    if not word.startswith('"'):
        return word.encode()
    return word[1:-1].encode().decode("unicode_escape").encode("latin-1")
