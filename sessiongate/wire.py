"""A command as the bytes of a request, and a reply as what the script said. No I/O here.

A reply is bound to its request: every request carries an echo that no other one has, and a reply
that does not return it belongs to somebody else, whatever it says.
"""

import os
import re
from binascii import b2a_base64
from typing import TYPE_CHECKING, NamedTuple

from redis import exceptions as redis_errors
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

if TYPE_CHECKING:
    from .commands import AnyCommand

ECHO_BYTES = 12

# Above this, copying an argument into the request costs more than sending it by itself.
_JOIN_BYTES = 64 * 1024

# What a server before Redis 7 makes of an error that a command raises inside a script.
_BURIED = re.compile(r"@user_script: ?\d+: -([A-Z]+) (.*)", re.DOTALL)
_CLASSES: dict[str, type[ResponseError]] = {"OOM": OutOfMemoryError, "READONLY": ReadOnlyError}


# The errors that the scripts raise themselves.
CODES = frozenset({"IDTAKEN", "NOSESSION", "NOPAYLOAD"})


class Refusal(NamedTuple):
    """A script's own no."""

    code: str


def new_echo() -> bytes:
    """12 ASCII characters that no other request has.

    From the system's random source each time: threads, forks that share a socket and whoever chose
    the data of another reply all fail to hit it. 72 bits.
    """
    return b2a_base64(os.urandom(9), newline=False)


def pack(command: "AnyCommand", echo: bytes) -> list[bytes]:
    """The request, in the pieces it is sent in. Keys and echo come before the arguments."""
    keys, args = command.keys, command.args
    script = command.script
    head = [
        b"*%d\r\n%b$1\r\n%d\r\n"
        % (
            4 + len(keys) + len(args),
            script.by_source if command.by_source else script.by_sha,
            len(keys),
        )
    ]
    head += [b"$%d\r\n%b\r\n" % (len(key), key) for key in keys]
    head.append(b"$12\r\n%b\r\n" % echo)
    pieces: list[bytes] = []
    for arg in args:
        if len(arg) <= _JOIN_BYTES:
            head.append(b"$%d\r\n%b\r\n" % (len(arg), arg))
        else:
            head.append(b"$%d\r\n" % len(arg))
            pieces += (b"".join(head), arg)
            head = [b"\r\n"]
    pieces.append(b"".join(head))
    return pieces


def unpack(reply: object, echo: bytes) -> "bytes | Refusal | ResponseError":
    """What the script of this very request returned; an error of its own or of Redis as a value.

    Raises:
        redis.exceptions.ConnectionError: the reply is not to this request.
        redis.exceptions.ResponseError: the server refused, and whose request cannot be told. After
            either the connection may have lost its place and must be dropped.
    """
    if isinstance(reply, bytes) and reply[:ECHO_BYTES] == echo:
        return reply[ECHO_BYTES:]
    if isinstance(reply, ResponseError):
        text = str(reply)
        said = text.removesuffix(" " + echo.decode())
        proven = said != text
        if proven and said in CODES:
            return Refusal(said)
        buried = _BURIED.search(said)
        error = _unburied(*buried.groups()) if buried else type(reply)(said) if proven else reply
        if proven and not isinstance(error, ReadOnlyError):
            return error
        # A primary that became a replica: only a new connection finds its successor.
        if text.partition(" ")[0] not in CODES:
            raise error
    raise redis_errors.ConnectionError(
        "a reply that belongs to another request was refused and its connection dropped: "
        "an earlier read on it was interrupted"
    )


def _unburied(code: str, text: str) -> ResponseError:
    found = _CLASSES.get(code)
    return found(text.strip()) if found else ResponseError(f"{code} {text.strip()}")
