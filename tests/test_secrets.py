"""Nothing secret reaches the server's logs, a repr, an exception or a traceback."""

import gc
import inspect
import logging
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from sessiongate import (
    AsyncSessionGate,
    ConfigurationError,
    JSONCodec,
    PayloadDecodeError,
    SessionGate,
    SessionGateError,
    UnsealError,
)
from sessiongate.tokens import SignKeyRing

from .conftest import CLUSTERED, SIGN_KEY, Backend, Flavour, running
from .servers import Server

KEY = "sign-key-that-must-not-leak-anywhere"
DATA = "payload-that-must-not-leak-anywhere"
SEALING_KEY = "5ea1ab1e" * 8

# Sealing is done in this process: it is the same on every version of a server.
_servers = [CLUSTERED] if CLUSTERED else []
both_gates = pytest.mark.parametrize("flavour", ["sync", "async"], indirect=True)
few_backends = pytest.mark.parametrize("backend", ["memory", *_servers], indirect=True)
one_server = pytest.mark.parametrize("server", _servers, indirect=True)


def run_everything(gate: SessionGate) -> tuple[list[str], list[BaseException]]:
    """Every operation once well and once refused; the tokens and the errors."""
    seals = gate._commands.values.seals
    token = gate.start(300, {"user": DATA})
    gate.pset(token, "cart", DATA)
    gate.pset(token, "cart", DATA, if_match=DATA)
    gate.pset(token, "code", DATA, if_absent=True, ttl=100)
    gate.pset_many(token, {"lang": DATA, "flash": DATA})
    gate.pget(token, "user")
    gate.pget_many(token, ["user", "code"])
    gate.pall(token)
    gate.ppop(token, "flash")
    gate.pdel(token, "user")
    if not seals:
        gate.pincr(token, "visits")
    gate.touch(token)
    gate.info(token)
    gate.expire(token, 200)
    successor = gate.renew(token)
    gate.renew(token)
    first = gate.start(300, {"user": DATA}, subject="alice", idle_timeout=100)
    signed_in = gate.renew(successor, subject="alice")
    signed_in_again = gate.renew(signed_in, subject="bob")
    gate.expire(first, 200)
    gate.sessions("alice")
    gate.end_one("bob", gate.verify(signed_in_again))
    second = gate.start(300, subject="alice")
    gate.end_all("alice", keep=second)
    gate.end(second)
    tokens = [token, successor, first, signed_in, signed_in_again, second]
    changed = token[:-1] + ("1" if token[-1] == "0" else "0")
    open_ = gate.start(300, {"user": DATA})
    errors: list[BaseException] = []
    for call in (
        lambda: gate.pget(token, "user"),
        lambda: gate.pset(token, "user", DATA),
        lambda: gate.pset(changed, "user", DATA),
        lambda: gate.pget(token + "x", "user"),
        lambda: gate.pset(token, "user", DATA * 300_000),
        lambda: gate.pset(token, "user", DATA + "\ud800"),
        lambda: gate.start(300, {"user": DATA, "cart": [DATA]}),  # type: ignore[dict-item]  # what a type checker would refuse
        lambda: gate.start(-1, {"user": DATA}),
        lambda: gate.pset(open_, "user", DATA, if_absent=True),
        lambda: gate.pset(open_, "user", DATA, if_match=DATA + "x"),
        lambda: gate.pset(open_, "user", DATA, if_match=DATA + "\ud800"),
        lambda: gate.pset(open_, "user", DATA, ttl=-1),
        lambda: gate.pset_many(open_, {"user": DATA, "": DATA}),
        lambda: gate.pset_many(signed_in, {"user": DATA}),
        lambda: gate.pincr(open_, "user"),
        lambda: gate.pall(first),
        lambda: gate.pget_many(second, ["user"]),
        lambda: gate.ppop(open_, "nothing"),
        lambda: gate.touch(signed_in),
        lambda: gate.info(successor),
        lambda: gate.renew(signed_in),
        lambda: gate.renew(signed_in, subject="alice"),
        lambda: gate.start(300, {"user": DATA}, subject="alice\ud800"),
        lambda: gate.end_all("alice", keep=changed),
        lambda: gate.end_one("alice", first),
    ):
        with pytest.raises(SessionGateError) as caught:
            call()
        errors.append(caught.value)
    gate.end(open_)
    return [*tokens, open_], errors


@contextmanager
def watched(server: Server) -> Iterator[tuple[list[str], list[bytes]]]:
    """What the server's MONITOR and, in the end, its SLOWLOG tell of what is done meanwhile."""
    client = server.client()
    slower_than = client.config_get("slowlog-log-slower-than")
    client.config_set("slowlog-log-slower-than", 0)
    seen: list[str] = []
    slow: list[bytes] = []
    ready = threading.Event()

    def watch() -> None:
        with server.client().monitor() as monitor:
            ready.set()
            for event in monitor.listen():
                seen.append(event["command"])
                if "that is all" in event["command"]:
                    return

    watcher = threading.Thread(target=watch)
    watcher.start()
    ready.wait()
    yield seen, slow
    client.echo("that is all")
    watcher.join()
    client.config_set("slowlog-log-slower-than", str(slower_than["slowlog-log-slower-than"]))
    slow += [entry["command"] for entry in client.slowlog_get(1_000)]


def test_redis_sees_no_sign_key_signature_or_token(flavour: Flavour, server: Server) -> None:
    """MONITOR, SLOWLOG and what is stored hold neither sign key nor signature nor token."""
    client = server.client()
    with watched(server) as (seen, slow):
        gate = flavour.gate(flavour.client(server.port), KEY)
        tokens, _ = run_everything(gate)
        alive = gate.renew(gate.start(300, subject="alice", idle_timeout=100))
        dump = client.dump(f"sg-session:{{{gate.verify(alive)}}}")
        assert dump
    log = b"\n".join(slow)
    assert b"EVALSHA" in log
    assert any(gate.verify(tokens[0]) in command for command in seen)
    secrets = [KEY]
    for token in (*tokens, alive):
        secrets += (token, token[-64:])
    for secret in secrets:
        raw = bytes.fromhex(secret) if len(secret) == 64 else b"\0" * 99
        for text in ("\n".join(seen).encode(), log, repr(dump).encode(), dump):
            assert secret.encode() not in text
            assert raw not in text


def test_errors_and_tracebacks_hold_no_secret(backend: Backend) -> None:
    """No error of ours, nor its traceback, nor what led to it, holds key, token or data."""
    gate = backend.gate(KEY)
    tokens, errors = run_everything(gate)
    for error in errors:
        chain: BaseException | None = error
        while chain is not None:
            for text in (str(chain), repr(chain), *map(repr, vars(chain).values())):
                assert_no_secret(text, *tokens)
            chain = chain.__cause__ or chain.__context__
        assert_no_secret("".join(traceback.format_exception(error)), *tokens)


def assert_no_secret(text: str, *tokens: str) -> None:
    for secret in (KEY, DATA, *(token[-64:] for token in tokens)):
        assert secret not in text


def test_reprs_hold_no_secret(backend: Backend) -> None:
    """The repr of a gate, and of everything in it, holds no key, token or data."""
    gate = backend.gate(KEY)
    token = gate.start(300, {"user": DATA})
    commands = gate._commands
    command = commands.pset(token, "user", DATA)
    for thing in (
        *(gate, commands, commands._ring, commands._keyspace, commands._subjects),
        *(command, command.script, commands.renew(token, 10, None), commands.sessions("alice")),
        *(commands.start(300, {"user": DATA}, "alice", 100), commands.renew(token, None, "alice")),
        *(commands.pset_many(token, {"user": DATA}), commands.end_all("alice", token)),
    ):
        assert_no_secret(repr(thing), token)
    assert repr(gate) == "<SessionGate prefix='sg-session'>"
    assert repr(command) == "<Command pset>"


def test_locals_of_our_frames_hold_no_data_or_sign_key(backend: Backend) -> None:
    """A tool that prints local variables finds no sign key and no packed request in our frames."""
    gate = backend.gate(KEY)
    token = gate.start(300, {"user": "x"})
    gate.end(token)
    with pytest.raises(SessionGateError) as caught:
        gate.pget(token, "user")
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    frames = [frame for frame in shown.stack if "/sessiongate/" in frame.filename]
    assert frames
    for frame in frames:
        for value in (frame.locals or {}).values():
            assert KEY not in value


def test_a_forgery_does_not_bring_out_the_genuine_signature(backend: Backend) -> None:
    """The frames of a refused forgery hold no signature that would have been accepted."""
    gate = backend.gate(KEY)
    token = gate.start(300)
    with pytest.raises(SessionGateError) as caught:
        gate.pget(f"{token[:20]}{'0' * 64}", "user")
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    genuine = bytes.fromhex(token[20:])
    for frame in shown.stack:
        if "/sessiongate/" in frame.filename:
            for value in (frame.locals or {}).values():
                assert repr(genuine) not in value
                assert token[20:] not in value


def test_a_failed_call_keeps_nothing_alive(backend: Backend) -> None:
    """A call that failed leaves no cycle: its error and what it sent go when they are dropped."""
    gate = backend.gate(KEY)
    token = gate.start(300)
    gate.end(token)
    key = f"sg-session:{{{gate.verify(token)}}}"
    if backend.server:
        backend.client().set(key, "not a hash")
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            try:
                gate.pset(token, "user", DATA)
            except Exception as error:  # noqa: BLE001  # ours, or redis-py's
                gone = weakref.ref(error)
            if not backend.flavour.is_async:
                assert gone() is None
    finally:
        gc.enable()


def test_nothing_is_logged(backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    """With every logger at DEBUG, no record holds a secret."""
    caplog.set_level(logging.DEBUG)
    tokens, _ = run_everything(backend.gate(KEY))
    for record in caplog.records:
        assert_no_secret(record.getMessage(), *tokens)


def test_a_url_with_a_password_is_not_shown() -> None:
    """The password of a URL is in no repr of the gate."""
    gate = SessionGate.from_url("redis://:hunter2@127.0.0.1:1/0", sign_key=KEY)
    assert "hunter2" not in repr(gate)
    assert isinstance(gate._client, Redis)


def test_a_server_that_quotes_a_command(flavour: Flavour) -> None:
    """What a server says of a command that it does not have holds nothing of its arguments."""
    flavour.logs_in = False
    options = ("--rename-command", "EVALSHA", "", "--rename-command", "EVAL", "")
    with Server(running(CLUSTERED).binary, options) as server:
        gate = flavour.gate(flavour.client(server.port))
        ring = SignKeyRing(SIGN_KEY)
        token, fingerprint = ring.sign("A" * 16)
        with pytest.raises(ResponseError, match="unknown command") as caught:
            gate.pset(token, "user", DATA)
        shown = "".join(traceback.format_exception(caught.value))
        for secret in (DATA, repr(fingerprint)[2:-1], "A" * 16):
            assert secret not in shown


# Gates that seal.


def sealing_secrets(gate: SessionGate) -> list[bytes]:
    """The sealing key and what is made from it to encrypt, as they are and as Python shows them."""
    ring = gate._commands.values._ring
    assert ring is not None
    raw = [SEALING_KEY.encode(), bytes.fromhex(SEALING_KEY), *ring._keys.values()]
    return [*raw, *(repr(one)[2:-1].encode() for one in raw)]


def assert_nothing_sealed(text: str, gate: SessionGate) -> None:
    """Neither a payload nor a key is in it."""
    for secret in (DATA.encode(), *sealing_secrets(gate)):
        assert secret not in text.encode()


@one_server
@both_gates
def test_redis_sees_nothing_of_what_is_sealed(flavour: Flavour, server: Server) -> None:
    """MONITOR, SLOWLOG, DUMP and a dump of the whole server hold neither plaintext nor key."""
    plain_data = "what-is-not-sealed-is-seen-by-everybody"
    with Server(server.binary, ("--rdbcompression", "no")) as own:
        client = own.client()
        with watched(own) as (seen, slow):
            gate = flavour.gate(flavour.client(own.port), KEY, sealing_key=SEALING_KEY)
            run_everything(gate)
            alive = gate.start(300, {"user": DATA, "cart": DATA}, idle_timeout=100)
            gate.pset(alive, "code", DATA, ttl=100)
            alive = gate.renew(alive, subject="alice")
            gate.pset(alive, "cart", DATA + "!", if_match=DATA)
            plain = flavour.gate(flavour.client(own.port), KEY)
            unsealed = plain.start(300, {"user": plain_data})
            dumps = [
                cast("bytes", client.dump(f"sg-session:{{{gate.verify(token)}}}"))
                for token in (alive, unsealed)
            ]
        client.save()
        whole = (own.folder / "dump.rdb").read_bytes()
        assert gate.pget(alive, "cart") == (DATA + "!").encode()
    everything = ["\n".join(seen).encode(), b"\n".join(slow), b"".join(dumps), whole]
    for text in everything:
        assert plain_data.encode() in text
        for secret in (KEY.encode(), DATA.encode(), *sealing_secrets(gate)):
            assert secret not in text


@few_backends
@both_gates
def test_errors_of_a_gate_that_seals_hold_no_secret(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """No error of a gate that seals, nor its traceback or a log record, holds a key or data."""
    caplog.set_level(logging.DEBUG)
    gate = backend.gate(KEY, sealing_key=SEALING_KEY)
    tokens, errors = run_everything(gate)
    other = backend.gate(KEY, sealing_key="0a" * 32)
    token = gate.start(300, {"user": DATA})
    for refused in (other.pget, other.ppop):
        with pytest.raises(UnsealError) as caught:
            refused(token, "user")
        errors.append(caught.value)
    for error in errors:
        shown = [*traceback.format_exception(error), str(error), repr(error), repr(vars(error))]
        assert_no_secret("".join(shown), *tokens, token)
        assert_nothing_sealed("".join(shown), gate)
    for record in caplog.records:
        assert_nothing_sealed(record.getMessage(), gate)


@few_backends
@both_gates
def test_reprs_of_a_gate_that_seals_hold_no_secret(backend: Backend) -> None:
    """The repr of a gate that seals, and of everything in it, holds no key and no data."""
    gate = backend.gate(KEY, sealing_key=["0a" * 32, SEALING_KEY])
    token = gate.start(300, {"user": DATA})
    commands, session = gate._commands, loaded(gate, token)
    assert session["user"] == DATA.encode()
    session["cart"] = DATA
    for thing in (
        *(gate, commands, commands.values, commands.values._ring, commands._subjects),
        *(commands.pset(token, "user", DATA), commands.pset(token, "user", DATA, if_match=DATA)),
        *(commands.start(300, {"user": DATA}, "alice", 100), commands.renew(token, None, "alice")),
        *(commands.pget(token, "user"), commands.opening(300, None, {"user": DATA})),
        *(session, session.keys(), session._payloads["user"], session._payloads["cart"]),
    ):
        assert_no_secret(repr(thing), token)
        assert_nothing_sealed(repr(thing), gate)
    assert repr(commands.values) == "<Values BytesCodec sealed>"
    assert repr(commands.values._ring) == "<SealingKeyRing of 2>"
    assert repr(session) == f"<{type(session).__name__} {gate.verify(token)}, read>"
    session._is_minded = True  # it is not to be stored


def loaded(gate: SessionGate, token: str) -> Any:
    """A handle of the session that was read, whichever kind the gate is of."""
    session: Any = gate.open(token)
    loading = session.load()
    return cast("Any", gate)._runner.run(loading) if inspect.isawaitable(loading) else session


def all_locals(error: BaseException | None) -> Iterator[str]:
    """The local variables of our frames that led to the error, and to what led to it."""
    while error is not None:
        shown = traceback.TracebackException.from_exception(error, capture_locals=True)
        for frame in shown.stack:
            if "/sessiongate/" in frame.filename:
                yield from (frame.locals or {}).values()
        error = error.__cause__ or error.__context__


@few_backends
@both_gates
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unsealed"])
def test_locals_of_our_frames_hold_no_payload(backend: Backend, sealed: bool) -> None:
    """With what cannot be opened or decoded no local variable of our frames shows data or a key."""
    options: dict[str, Any] = {"sealing_key": SEALING_KEY} if sealed else {}
    writer = backend.gate(KEY, **options)
    gate: Any = backend.gate(KEY, codec=JSONCodec(), **options)
    good = f'"{DATA}"'
    token = writer.start(300, {"a": good, "user": DATA, "z": good})
    calls: list[Callable[[], object]] = [
        lambda: gate.pget(token, "user"),
        lambda: gate.pget(token, "user", as_=str),
        lambda: gate.pget_many(token, ["a", "user", "z"]),
        lambda: gate.pall(token),
        lambda: loaded(gate, token)["user"],
        lambda: loaded(gate, token).get("user", as_=int),
        lambda: loaded(gate, token).get("a", as_=int),
        lambda: gate.ppop(token, "user"),
    ]
    for call in calls:
        with pytest.raises(PayloadDecodeError) as caught:
            call()
        check_locals(caught.value, gate, sealed=sealed)
    if not sealed:
        return
    other = backend.gate(KEY, sealing_key="0a" * 32)
    other.pset(token, "user", DATA)
    calls[-1:] = [
        lambda: gate.pset(token, "user", 1, if_match=2),
        lambda: gate.renew(token, subject="alice"),
        lambda: gate.ppop(token, "user"),
    ]
    del calls[6]  # it opens
    for call in calls:
        with pytest.raises(UnsealError) as refused:
            call()
        check_locals(refused.value, gate, sealed=True)


@few_backends
@both_gates
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unsealed"])
def test_locals_of_our_frames_hold_nothing_that_is_stored(backend: Backend, sealed: bool) -> None:
    """With what is not stored, by whatever fault, no local variable of our frames shows data."""
    options: dict[str, Any] = {"codec": JSONCodec()}
    if sealed:
        options["sealing_key"] = SEALING_KEY
    gate: Any = backend.gate(KEY, **options)
    nowhere: Any = backend.flavour.gate(
        backend.flavour.client(1, retry=backend.flavour.no_retry), KEY, **options
    )
    token, ended = gate.start(300, {"user": [DATA], "cart": [DATA]}), gate.start(300)
    gate.end(ended)

    def changed(by: object) -> None:
        session = loaded(gate, token)
        session["user"].append(by)
        saving = session.save()
        if inspect.isawaitable(saving):
            gate._runner.run(saving)

    calls: list[Callable[[], object]] = [
        lambda: gate.pset(ended, "user", DATA),
        lambda: gate.pset(token, "user", DATA, if_absent=True),
        lambda: gate.pset(token, "user", 1, if_match=DATA),
        lambda: gate.pset_many(ended, {"user": DATA}),
        lambda: nowhere.pset(token, "user", DATA),
        lambda: nowhere.pset_many(token, {"user": DATA}),
        lambda: nowhere.start(300, {"user": DATA}),
        lambda: changed({1j}),
        lambda: changed(float("nan")),
    ]
    for call in calls:
        with pytest.raises((SessionGateError, RedisError)) as caught:
            call()
        check_locals(caught.value, gate, sealed=sealed)


NO_GATES: list[dict[str, Any]] = [
    {"sealing_key": [SEALING_KEY, "bad"]},
    {"sealing_key": SEALING_KEY + "0"},
    {"sealing_key": SEALING_KEY, "sign_key": [KEY, ""]},
    {"sealing_key": SEALING_KEY, "sign_key": SEALING_KEY},
    {"sealing_key": SEALING_KEY, "prefix": "{"},
    {"sealing_key": SEALING_KEY, "codec": JSONCodec},
    {"sealing_key": SEALING_KEY, "max_sessions": -1},
    {"sealing_key": SEALING_KEY, "timeout": -1},
    {"sealing_key": SEALING_KEY, "url": "nonsense://"},
]


@pytest.mark.parametrize("kind", [SessionGate, AsyncSessionGate])
@pytest.mark.parametrize("options", NO_GATES)
def test_locals_of_our_frames_hold_no_key(kind: Any, options: dict[str, Any]) -> None:
    """A gate that cannot be made, for whatever reason, shows no key in a local variable of ours."""
    with pytest.raises(ConfigurationError) as caught:
        kind.from_url(**{"url": "memory://", "sign_key": KEY, **options})
    shown = list(all_locals(caught.value))
    assert shown
    for value in shown:
        assert KEY not in value
        assert SEALING_KEY not in value


def check_locals(error: BaseException, gate: SessionGate, *, sealed: bool) -> None:
    shown = list(all_locals(error))
    assert shown
    for value in shown:
        assert DATA not in value
        assert KEY not in value
        if sealed:
            assert_nothing_sealed(value, gate)


@few_backends
@pytest.mark.parametrize("flavour", ["sync"], indirect=True)
def test_what_cannot_be_opened_keeps_nothing_alive(backend: Backend) -> None:
    """An UnsealError or PayloadDecodeError leaves no cycle: it goes when it is dropped."""
    gate: Any = backend.gate(KEY, sealing_key=SEALING_KEY, codec=JSONCodec())
    token = backend.gate(KEY, sealing_key="0a" * 32).start(300, {"user": DATA})
    backend.gate(KEY, sealing_key=SEALING_KEY).pset(token, "cart", DATA)
    gc.collect()
    gc.disable()
    try:
        for name in ("user", "cart"):
            for handle in (False, True):
                try:
                    if handle:
                        gate.open(token, names=[name])[name]
                    else:
                        gate.pget(token, name)
                except (UnsealError, PayloadDecodeError) as error:
                    gone = weakref.ref(error)
                assert gone() is None
    finally:
        gc.enable()
