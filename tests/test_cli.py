"""The command `sessiongate` and its demo."""

import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

import sessiongate
from sessiongate import ConfigurationError, SessionGate, SessionGateError
from sessiongate.cli import main

from .servers import Server

NOBODY_THERE = "redis://127.0.0.1:1/0"


class Row(NamedTuple):
    """A call as the demo shows it: its line, the time it took, what came back and where."""

    line: str
    took: str
    answer: str
    column: int


def rows(output: str) -> list[Row]:
    """The calls in the demo's output, with what was wrapped put together again."""
    found: list[Row] = []
    for line in output.splitlines():
        match = re.fullmatch(r"(\S.*?) {2,}(?:([\d.]+ (?:[µu]s|ms|s))  )?(\S.*)", line)
        if match:
            found.append(Row(match[1], match[2] or "", match[3], match.start(3)))
        elif line.startswith(" "):
            assert len(line) - len(line.lstrip()) == found[-1].column
            found[-1] = found[-1]._replace(answer=f"{found[-1].answer} {line.strip()}")
    return found


def demo(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a demo that went well wrote."""
    assert main(["demo", *arguments]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


class Terminal(io.TextIOWrapper):
    """A stream that counts as a terminal, or as none, with an encoding of its own."""

    def __init__(self, encoding: str = "utf-8", *, terminal: bool = True) -> None:
        super().__init__(io.BytesIO(), encoding, newline="\n")
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def text(self) -> str:
        self.seek(0)
        return self.read()


def shown_on(monkeypatch: pytest.MonkeyPatch, stream: Terminal, *arguments: str) -> str:
    """What a demo wrote to that stream in the place of stdout."""
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["demo", *arguments]) == 0
    return stream.text()


def test_alone_it_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a sub-command the help is printed, with the sub-commands in it."""
    assert main([]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("usage: sessiongate ")
    assert "demo " in output.out
    assert output.err == ""


def test_help_of_the_demo_lists_every_url(capsys: pytest.CaptureFixture[str]) -> None:
    """The demo's help lists each kind of URL that a gate takes."""
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    for scheme in ("redis", "rediss", "unix", "redis+sentinel", "redis+cluster", "memory"):
        assert f" {scheme}://" in told


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` prints the command's name and the library's version."""
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"sessiongate {sessiongate.__version__}\n"


@pytest.mark.parametrize("arguments", [["dance"], ["demo", "--speed"], ["demo", "extra"]])
def test_arguments_that_do_not_exist(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    """An unknown sub-command, option or argument is refused on stderr with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("usage: sessiongate ")


def test_the_demo_shows_every_operation(capsys: pytest.CaptureFixture[str]) -> None:
    """The demo shows the six operations, verify, and each way of being refused."""
    shown = rows(demo(capsys))
    operations = {name for row in shown for name in re.findall(r"gate\.(\w+)", row.line)}
    assert operations == {"start", "pget", "pset", "pdel", "expire", "end", "verify"}
    refusals = [row.answer.partition(":")[0] for row in shown if "Error: " in row.answer]
    assert refusals == [
        "PayloadNotFoundError",
        "BadSignatureError",
        "MalformedTokenError",
        "SessionNotFoundError",
    ]


def test_the_demo_times_every_call(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside each call of the gate stands how long it took."""
    shown = rows(demo(capsys))
    assert [row.line for row in shown if not row.took] == ['forged = token[:20] + 64 * "0"']


def test_what_the_demo_shows_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line of the demo, typed in its turn, gives what the demo says came back."""
    names: dict[str, object] = {"gate": SessionGate.from_url("memory://", sign_key="k" * 32)}
    for row in rows(demo(capsys)):
        name, _, expression = row.line.rpartition(" = ")
        try:
            answer = eval(expression, names)  # noqa: S307  # our own output
            told = repr(answer)
            names[name] = answer
        except SessionGateError as error:
            told = f"{type(error).__name__}: {error}"
        shortened = re.sub(r"\b[A-Za-z0-9]{9}…[0-9a-f]{4}\b", "<ID>", row.answer)
        assert re.sub(r"\b[A-Za-z0-9]{16}\b", "<ID>", shortened) == re.sub(
            r"\b[A-Za-z0-9]{16}(\.[0-9a-f]{64})?\b", "<ID>", told
        )


@pytest.mark.parametrize("url", ["memory://", "MEMORY://"])
def test_the_demo_is_no_pattern_for_sign_keys(capsys: pytest.CaptureFixture[str], url: str) -> None:
    """Above the gate with a sign key of its own stands that a real one comes from settings."""
    lines = demo(capsys, "--url", url).splitlines()
    made = lines.index('gate = SessionGate.from_url("memory://", sign_key=secrets.token_bytes(32))')
    assert re.match("# .*a real one is in your settings", lines[made - 1])
    assert lines[-1].startswith("On a server: ")


def test_the_demo_on_a_server(capsys: pytest.CaptureFixture[str], server: Server) -> None:
    """On a server the same calls give the same, and nothing but the scripts is left there."""
    memory = rows(demo(capsys))
    for url in (server.url, f"unix://{server.socket}"):
        output = demo(capsys, "--url", url)
        assert f'"{url}"' in output
        shown = rows(output)
        assert [row.line for row in shown] == [row.line for row in memory]
        assert [row.answer for row in shown if "'" not in row.answer] == [
            row.answer for row in memory if "'" not in row.answer
        ]
        with server.client() as client:
            assert client.keys() == []


def fail(monkeypatch: pytest.MonkeyPatch, operation: str, after: int, error: BaseException) -> None:
    """Let that many calls of the operation through, and make those that follow raise the error."""
    genuine = getattr(SessionGate, operation)
    calls = iter(range(after))

    def failing(*args: object) -> object:
        if next(calls, None) is None:
            raise error
        return genuine(*args)

    monkeypatch.setattr(SessionGate, operation, failing)


LOST = RedisConnectionError("Connection closed\n by server.")


@pytest.mark.parametrize(
    ("operation", "after"), [("pget", 0), ("pget", 8), ("pset", 1), ("expire", 0), ("verify", 1)]
)
def test_a_demo_that_fails(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    server: Server,
    operation: str,
    after: int,
) -> None:
    """A demo that fails midway ends its session, tells why in one line and exits with 1."""
    fail(monkeypatch, operation, after, LOST)
    assert main(["demo", "--url", server.url]) == 1
    assert capsys.readouterr().err == f"sessiongate: {server.url}: Connection closed by server.\n"
    with server.client() as client:
        assert client.keys() == []


def test_a_demo_that_is_interrupted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    """A demo that is interrupted ends its session and exits with 130, without a traceback."""
    fail(monkeypatch, "pset", 1, KeyboardInterrupt())
    assert main(["demo", "--url", server.url]) == 130
    assert capsys.readouterr().err == ""
    with server.client() as client:
        assert client.keys() == []


@pytest.mark.parametrize("operation", ["expire", "verify"])
def test_a_demo_that_cannot_end_its_session(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    server: Server,
    operation: str,
) -> None:
    """A session that the demo could not end, the server being lost, dies within a minute."""
    fail(monkeypatch, operation, 0, LOST)
    fail(monkeypatch, "end", 0, LOST)
    assert main(["demo", "--url", server.url]) == 1
    assert "Connection closed" in capsys.readouterr().err
    with server.client() as client:
        (key,) = client.keys()
        assert 0 < client.pttl(key) <= 60_000


def test_a_demo_whose_reader_leaves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    """A demo that nobody reads any more (`| head`) ends its session and complains to nobody."""
    reading, writing = os.pipe()

    class Pipe(io.TextIOWrapper):
        def write(self, text: str, /) -> int:
            if text.startswith("gate.pset"):
                os.close(reading)
            return super().write(text)

    with Pipe(os.fdopen(writing, "wb")) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["demo", "--url", server.url]) == 1
    assert capsys.readouterr().err == ""
    with server.client() as client:
        assert client.keys() == []


def test_the_demo_shows_no_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the sign key, which no two demos share, nor a whole token is ever written."""
    sign_keys: list[bytes] = []
    tokens: list[str] = []
    make, start = SessionGate.from_url, SessionGate.start

    def spying_make(url: str, *, sign_key: bytes) -> SessionGate:
        sign_keys.append(sign_key)
        return make(url, sign_key=sign_key)

    def spying_start(gate: SessionGate, ttl: int, payloads: dict[str, str]) -> str:
        tokens.append(start(gate, ttl, payloads))
        return tokens[-1]

    monkeypatch.setattr(SessionGate, "from_url", spying_make)
    monkeypatch.setattr(SessionGate, "start", spying_start)
    output = demo(capsys) + demo(capsys)
    first, second = sign_keys
    assert first != second
    for sign_key in sign_keys:
        assert len(sign_key) >= 32
        assert sign_key.hex() not in output
        assert repr(sign_key)[2:-1] not in output
    for token in tokens:
        signature = token.rpartition(".")[2]
        pieces = {signature[i : i + 5] for i in range(len(signature) - 4)}
        assert not [piece for piece in pieces if piece in output]
    assert f"'{tokens[1][:12]}…{tokens[1][-4:]}'" in output


def test_a_server_that_cannot_be_reached(capsys: pytest.CaptureFixture[str]) -> None:
    """An unreachable server is told in one line on stderr, without the password, exit code 1."""
    assert main(["demo", "--url", "redis://user:hush@127.0.0.1:1/0?socket_timeout=3"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"sessiongate: redis://…@127\.0\.0\.1:1/0\?…: [^\n]+\n", output.err)
    assert "refused" in output.err


def test_a_server_that_refuses(capsys: pytest.CaptureFixture[str], server: Server) -> None:
    """A server's refusal, such as of a password, is told in one line on stderr, exit code 1."""
    assert main(["demo", "--url", f"redis://:hush@127.0.0.1:{server.port}"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"sessiongate: redis://…@127\.0\.0\.1:\d+: [^\n]+\n", output.err)
    assert "hush" not in output.err


@pytest.mark.parametrize("url", ["http://:hush@localhost", "redis://:hu/sh@localhost", "", "hush"])
def test_a_url_that_is_none(capsys: pytest.CaptureFixture[str], url: str) -> None:
    """A URL that no gate can be made from gets the gate's own message, exit code 2."""
    with pytest.raises(ConfigurationError) as caught:
        SessionGate.from_url(url, sign_key="k" * 32)
    assert main(["demo", "--url", url]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"sessiongate: {caught.value}\n"
    assert "hush" not in output.err


def test_memory_without_its_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without fakeredis the demo says which extra to install, exit code 2."""
    monkeypatch.setitem(sys.modules, "fakeredis", None)
    assert main(["demo"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "sessiongate[memory]" in output.err


def test_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """What came back stands in one column, and no line is wider than 100 characters."""
    output = demo(capsys)
    assert len({row.column for row in rows(output)}) == 1
    assert 90 < max(map(len, output.splitlines())) <= 100
    assert output == "".join(f"{line.rstrip()}\n" for line in output.splitlines())


@pytest.mark.parametrize(("columns", "width"), [(60, 80), (90, 90), (300, 100)])
def test_columns_of_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, width: int) -> None:
    """A terminal is filled from 80 to 100 characters."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    output = shown_on(monkeypatch, Terminal())
    assert width - 10 < max(map(len, output.splitlines())) <= width


@pytest.mark.parametrize(
    ("terminal", "variables", "coloured"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": ""}, True),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
    ],
)
def test_colour(
    monkeypatch: pytest.MonkeyPatch, *, terminal: bool, variables: dict[str, str], coloured: bool
) -> None:
    """There is colour on a terminal alone, and not if NO_COLOR or a dumb terminal says no."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ("\x1b[" in shown_on(monkeypatch, Terminal(terminal=terminal))) == coloured


def test_colour_changes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its escapes the coloured demo has the columns of the plain one."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    coloured = shown_on(monkeypatch, Terminal())
    plain = shown_on(monkeypatch, Terminal(terminal=False))
    stripped = re.sub(r"\x1b\[\d*m", "", coloured)
    assert [(row.line, row.column) for row in rows(stripped)] == [
        (row.line, row.column) for row in rows(plain)
    ]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stream_with_fewer_characters(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """Where the encoding has no ellipsis, the demo is written in ASCII with the same columns."""
    output = shown_on(monkeypatch, Terminal(encoding, terminal=False))
    assert output.isascii()
    assert " us  " in output
    assert re.search(r"'v1\.\w{9}\.\.\.\w{4}'", output)
    assert len({row.column for row in rows(output)}) == 1


def test_what_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message with characters that stderr cannot take is written with escapes."""
    stream = Terminal("ascii", terminal=False)
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["demo", "--url", "unix:///nowhere/žluť"]) == 1
    assert "unix:///nowhere/\\u017elu\\u0165" in stream.text()


@pytest.mark.parametrize("way", ["script", "module"])
def test_as_a_process(way: str) -> None:
    """The installed command and `python -m sessiongate` both run it, with its exit code."""
    script = shutil.which("sessiongate", path=sysconfig.get_path("scripts"))
    assert script
    command = [script] if way == "script" else [sys.executable, "-m", "sessiongate"]
    good = subprocess.run([*command, "demo"], capture_output=True, check=False, text=True)
    assert (good.returncode, good.stderr) == (0, "")
    assert rows(good.stdout)[-1].answer.startswith("SessionNotFoundError: ")
    # Its last line can be copied, from this folder.
    told = good.stdout.splitlines()[-1].removeprefix("On a server: ").partition(" demo --url ")[0]
    called = shutil.which("sessiongate") if told == "sessiongate" else told
    assert called
    assert called == "python -m sessiongate" if way == "module" else Path(called).samefile(script)
    bad = subprocess.run(
        [*command, "demo", "--url", NOBODY_THERE], capture_output=True, check=False, text=True
    )
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr.startswith(f"sessiongate: {NOBODY_THERE}: ")


def test_keygen_prints_a_sealing_key(capsys: pytest.CaptureFixture[str]) -> None:
    """Each run prints one line, another key that a gate seals with, and nothing else."""
    assert main(["keygen"]) == main(["keygen"]) == 0
    output = capsys.readouterr()
    first, second = output.out.splitlines()
    assert first != second
    assert output.err == ""
    for key in first, second:
        assert re.fullmatch("[0-9a-f]{64}", key)
        gate = SessionGate.from_url("memory://", sign_key="k" * 32, sealing_key=key)
        assert gate.pget(gate.start(300, {"user": "Ann"}), "user") == b"Ann"
