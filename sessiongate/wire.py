"""A command as the bytes of a request, and a reply as what the script said. No I/O here.

A reply is bound to its request: every request carries an echo that no other one has, and a reply
that does not return it belongs to somebody else, whatever it says.
"""

import os
import re
from binascii import b2a_base64
from copy import copy

from redis import exceptions as redis_errors
from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisError, ResponseError

from .command import CODES, Answer, AnyCommand, Refusal

ECHO_BYTES = 12

# Above this, copying an argument into the request costs more than sending it by itself.
_JOIN_BYTES = 64 * 1024

# What a server before Redis 7 makes of an error that a command raises inside a script.
_BURIED = re.compile(r"@user_script: ?\d+: -([A-Z]+) (.*)", re.DOTALL)
# What servers say of a command that they do not have, as if it were renamed, quotes its arguments.
_QUOTED = re.compile(r",? with args beginning with.*", re.DOTALL)
# Servers look at the timeouts of WAIT ten times a second, if they have the time: measured on Redis
# 4.0.14 to Valkey 9.1.2, it was up to 0.1 s late, on a busy machine twice that.
_WAIT_LATENESS = 0.15
_WAIT_SHARE = 0.8

# What parsers make of bytes that are no reply at all.
UNREADABLE = (redis_errors.InvalidResponse, LookupError, TypeError, ValueError)

_CLASSES: dict[str, type[ResponseError]] = {"OOM": OutOfMemoryError, "READONLY": ReadOnlyError}


def new_echo() -> bytes:
    """12 ASCII characters that no other request has.

    From the system's random source each time: threads, forks that share a socket and whoever chose
    the data of another reply all fail to hit it. 72 bits.
    """
    return b2a_base64(os.urandom(9), newline=False)


def new_echoes(count: int) -> list[bytes]:
    """As many echoes, for little more than the price of one."""
    drawn = b2a_base64(os.urandom(9 * count), newline=False)
    return [drawn[at : at + ECHO_BYTES] for at in range(0, len(drawn), ECHO_BYTES)]


def pack(command: AnyCommand, echo: bytes) -> list[bytes]:
    """The request, in the pieces it is sent in. Its last argument is the echo.

    So one byte too many or too few, anywhere before, spoils the echo or the request.
    """
    keys, args = command.keys, command.args
    if len(keys) == 1 and not command.by_source:
        # Filling in a template takes a third of the time. All that is called often fits one.
        (key,) = keys
        one, two, three = command.script.templates
        match args:
            case (a,):
                return [one % (len(key), key, len(a), a, echo)]
            case (a, b):
                return [two % (len(key), key, len(a), a, len(b), b, echo)]
            case (a, b, c) if len(c) <= _JOIN_BYTES:
                return [three % (len(key), key, len(a), a, len(b), b, len(c), c, echo)]
    return _pack_any(command, echo)


def _pack_any(command: AnyCommand, echo: bytes) -> list[bytes]:
    keys, args, script = command.keys, command.args, command.script
    call = script.call_by_source if command.by_source else script.call_by_sha
    head = [b"*%d\r\n%b" % (4 + len(keys) + len(args), call)]
    head += [b"$%d\r\n%b\r\n" % (len(word), word) for word in (b"%d" % len(keys), *keys)]
    pieces: list[bytes] = []
    for arg in args:
        if len(arg) <= _JOIN_BYTES:
            head.append(b"$%d\r\n%b\r\n" % (len(arg), arg))
        else:
            head.append(b"$%d\r\n" % len(arg))
            pieces += (b"".join(head), arg)
            head = [b"\r\n"]
    head.append(b"$%d\r\n%b\r\n" % (ECHO_BYTES, echo))
    pieces.append(b"".join(head))
    return pieces


def unpack(reply: object, echo: bytes) -> tuple[Answer, bool]:
    """What the script of this very request returned, or an error, and whether that is proven.

    After a reply that is not proven to be this request's, its connection may have lost its place.
    """
    if isinstance(reply, bytes) and reply[-ECHO_BYTES:] == echo:
        return reply[:-ECHO_BYTES], True
    if isinstance(reply, ResponseError):
        text = _QUOTED.sub("", str(reply))
        said = text.removesuffix(" " + echo.decode())
        proven = said != text
        if proven and said in CODES:
            return Refusal(said), True
        # A code of ours without our echo is another request's; one word alone is nobody's, nor is
        # what has our echo somewhere else.
        mangled = " " not in said if proven else echo.decode() in text
        if text.partition(" ")[0] in CODES or mangled:
            return misplaced(), False
        buried = _BURIED.search(said)
        error = _unburied(*buried.groups()) if buried else copy(reply)
        if not buried:
            error.args = (said,)
        return error, proven
    if isinstance(reply, RedisError) and not isinstance(reply, UNREADABLE):
        return copy(reply), False
    return misplaced(), False


def may_be_garbled(error: Exception) -> bool:
    """Whether a server may say so of a request that it did not get as it was sent.

    Of such an error nothing is certain if the reply behind it is not the next request's.
    """
    text = str(error)
    return type(error) is ResponseError and not text.startswith("BUSY ") and "EVAL" not in text


def wait_for(replicas: int, seconds: float) -> list[bytes]:
    """A WAIT, to be sent behind what wrote: until so many replicas have it, or the time is over."""
    # Without a deadline it waits for ever, as its timeout of 0 says.
    forever = seconds == float("inf")
    milliseconds = 0 if forever else max(int((seconds * _WAIT_SHARE - _WAIT_LATENESS) * 1000), 1)
    words = (b"WAIT", b"%d" % replicas, b"%d" % milliseconds)
    return [b"*3\r\n", *[b"$%d\r\n%b\r\n" % (len(word), word) for word in words]]


def misplaced() -> redis_errors.ConnectionError:
    """The error of a request whose connection has lost its place."""
    return redis_errors.ConnectionError(
        "a reply that belongs to another request was refused and its connection dropped: "
        "an earlier read on it was interrupted"
    )


def _unburied(code: str, text: str) -> ResponseError:
    found = _CLASSES.get(code)
    return found(text.strip()) if found else ResponseError(f"{code} {text.strip()}")
