"""Nothing secret reaches the server's logs, a repr, an exception or a traceback."""

import gc
import logging
import threading
import traceback
import weakref

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from sessiongate import SessionGate, SessionGateError
from sessiongate.tokens import SignKeyRing

from .conftest import CLUSTERED, SIGN_KEY, Backend, Flavour, running
from .servers import Server

KEY = "sign-key-that-must-not-leak-anywhere"
DATA = "payload-that-must-not-leak-anywhere"


def run_everything(gate: SessionGate) -> tuple[list[str], list[BaseException]]:
    """Every operation once well and once refused; the tokens and the errors."""
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


def test_redis_sees_no_sign_key_signature_or_token(flavour: Flavour, server: Server) -> None:
    """MONITOR, SLOWLOG and what is stored hold neither sign key nor signature nor token."""
    client = server.client()
    slower_than = client.config_get("slowlog-log-slower-than")
    client.config_set("slowlog-log-slower-than", 0)
    seen: list[str] = []
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
    gate = flavour.gate(flavour.client(server.port), KEY)
    tokens, _ = run_everything(gate)
    alive = gate.renew(gate.start(300, subject="alice", idle_timeout=100))
    dump = client.dump(f"sg-session:{{{gate.verify(alive)}}}")
    assert dump
    client.echo("that is all")
    watcher.join()
    client.config_set("slowlog-log-slower-than", str(slower_than["slowlog-log-slower-than"]))
    log = b"\n".join(entry["command"] for entry in client.slowlog_get(1_000))
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
