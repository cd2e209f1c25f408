"""What `sessiongate demo` shows: the operations at work, as lines that a reader could type."""

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from secrets import token_bytes
from typing import TextIO
from urllib.parse import urlsplit

from . import __version__
from .connect import MEMORY_URL
from .errors import InvalidSessionError, PayloadNotFoundError
from .gate import SessionGate

# Shown as they stand and run as they stand. The session lives no longer than the 60 seconds of the
# first line, even if the server is lost before `end`.
_LINES = """\
# A session; its payloads are read and written one by one
token = gate.start(60, {"user": "John Doe"})
gate.pget(token, "user")
gate.pset(token, "cart", '["book"]')
gate.pget(token, "cart")
gate.pdel(token, "cart")
gate.pget(token, "cart")
gate.expire(token, 30)

# Tokens are verified in this process: a forged one never reaches the server
gate.verify(token)
forged = token[:20] + 64 * "0"
gate.pget(forged, "user")
gate.pget(token[:40], "user")

# The session ends, and its payloads with it
gate.end(token)
gate.pget(token, "user")
""".splitlines()

_CALL_WIDTH = max(len(line) for line in _LINES if not line.startswith("#"))
_TOOK_WIDTH = len("123.4 ms")

# A token is a credential until it is ended, and output ends up in logs: its two ends are shown.
_TOKEN_LENGTH, _HEAD, _TAIL = 84, 12, 4


class Screen:
    """A stream, and what it can show: colour on a terminal, ASCII if its encoding has no more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._encoding = stream.encoding or "ascii"
        self._unicode = self._encodes("…µ")
        terminal = stream.isatty()
        # Set and not empty: https://no-color.org
        self._colour = (
            terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        )
        columns = shutil.get_terminal_size((100, 0)).columns if terminal else 100
        self.width = max(80, min(columns, 100))

    def line(self, text: str = "") -> None:
        """Write a line, at once."""
        if not self._unicode:
            text = text.replace("…", "...").replace("µ", "u")
        if not self._encodes(text):
            text = text.encode("ascii", "backslashreplace").decode()
        print(text, file=self._stream, flush=True)

    def dim(self, text: str) -> str:
        """Make the text step back behind the rest."""
        return self._styled("2", text)

    def alert(self, text: str) -> str:
        """Make the text stand out."""
        return self._styled("33", text)

    def _styled(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text

    def _encodes(self, text: str) -> bool:
        try:
            text.encode(self._encoding)
        except UnicodeEncodeError:
            return False
        return True


def demo(url: str, screen: Screen) -> None:
    """Run the operations on the server at `url`; show each call, its time and what came back.

    Args:
        url: as for `SessionGate.from_url`.
        screen: where it is shown; nothing is before the server has answered.

    Raises:
        ConfigurationError: as `SessionGate.from_url` does.
        redis.exceptions.RedisError: the server cannot be reached or refuses. A session that was
            open has been ended, if that was still possible.
    """
    with SessionGate.from_url(url, sign_key=token_bytes(32)) as gate:
        # Once unseen: it connects and registers the scripts, which is not what a call costs.
        _play(gate, lambda *_: None)
        shown = without_secrets(url)
        screen.line(f"SessionGate {__version__}, six operations and verify")
        screen.line()
        screen.line(
            screen.dim(
                "# The demo's own sign key: a real one is in your settings, for all processes"
            )
        )
        screen.line(f'gate = SessionGate.from_url("{shown}", sign_key=secrets.token_bytes(32))')
        screen.line()
        _play(gate, lambda line, answer, took: _show(screen, line, answer, took))
    screen.line()
    screen.line(screen.dim("Times of a second run: the first connected and registered scripts."))
    if shown == MEMORY_URL:
        screen.line(screen.dim(f"On a server: {_command()} demo --url redis://localhost:6379"))


def _command() -> str:
    """How to call this program again, from where it was called."""
    called = Path(sys.argv[0])
    if called.name != "sessiongate":
        return "python -m sessiongate"
    found = shutil.which(called.name)
    return called.name if found and called.samefile(found) else os.path.relpath(called)


def without_secrets(url: str) -> str:
    """Cut user, password and options off a URL that a gate has understood."""
    parts = urlsplit(url)
    _, user, host = parts.netloc.rpartition("@")
    # A slash in the password that was not escaped sends the rest of it into the path.
    path = parts.path.rpartition("@")[2]
    return f"{parts.scheme}://{'…@' if user else ''}{host}{path}{'?…' if parts.query else ''}"


# Called with a line, what came back and the seconds that took.
_Show = Callable[[str, object, float], None]


def _play(gate: SessionGate, show: _Show) -> None:
    names: dict[str, object] = {"gate": gate}
    try:
        for line in _LINES:
            if line and not line.startswith("#"):
                show(line, *_run(line, names))
            else:
                show(line, None, 0)
    except BaseException:
        token = names.get("token")
        if isinstance(token, str):
            with suppress(Exception):
                gate.end(token)
        raise


def _run(line: str, names: dict[str, object]) -> tuple[object, float]:
    name, _, expression = line.rpartition(" = ")
    code = compile(expression, "<demo>", "eval")
    answer: object
    before = time.perf_counter()
    try:
        # The lines above and nothing else, so that what is shown cannot differ from what runs.
        answer = eval(code, names)  # noqa: S307
    except (InvalidSessionError, PayloadNotFoundError) as error:
        answer = error
    took = time.perf_counter() - before
    if name:
        names[name] = answer
    return answer, took


def _show(screen: Screen, line: str, answer: object, took: float) -> None:
    if not line or line.startswith("#"):
        screen.line(screen.dim(line) if line else "")
        return
    call = f"{line:{_CALL_WIDTH}}  "
    # An assignment alone takes no time worth telling.
    time_taken = f"{_duration(took) if 'gate.' in line else '':>{_TOOK_WIDTH}}  "
    first, *rest = textwrap.wrap(
        _told(answer), screen.width - len(call) - len(time_taken), break_on_hyphens=False
    )
    style = screen.alert if isinstance(answer, Exception) else str
    screen.line(call + screen.dim(time_taken) + style(first))
    for words in rest:
        screen.line(" " * (len(call) + len(time_taken)) + style(words))


def _told(answer: object) -> str:
    if isinstance(answer, Exception):
        return f"{type(answer).__name__}: {answer}"
    if isinstance(answer, str) and len(answer) == _TOKEN_LENGTH:
        return repr(f"{answer[:_HEAD]}…{answer[-_TAIL:]}")
    return repr(answer)


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds * 1e6:.0f} µs"
