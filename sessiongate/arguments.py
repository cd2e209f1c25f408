"""What a caller may pass: every limit, and the bytes that an argument becomes. No I/O here."""

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from enum import Enum
from typing import TypeVar

from .errors import ArgumentError, ConfigurationError

V = TypeVar("V")


class NoCondition(Enum):
    """Where `if_match` is not given: None is a value, to codecs that have it."""

    ALWAYS = "always"

    def __repr__(self) -> str:
        return "ALWAYS"


ALWAYS = NoCondition.ALWAYS

Data = str | bytes | bytearray | memoryview

MAX_TTL_SECONDS = 100 * 365 * 24 * 60 * 60
MAX_NAME_BYTES = 200
MAX_DATA_BYTES = 8_000_000
MAX_SUBJECT_BYTES = 200
MAX_REPLICAS = 1000
MAX_TIMEOUT_SECONDS = 10**9  # sockets refuse more

DEFAULT_GRACE_SECONDS = 10

MISSING_HINT = ": is it missing from your settings?"

_TOO_LONG_TO_TELL = 10**20


def ttl_arg(ttl: int | timedelta, what: str = "ttl", least: int = 0) -> bytes:
    """The whole seconds of a ttl, or of another span of time, in decimal."""
    if isinstance(ttl, timedelta):
        if ttl.microseconds:
            raise ArgumentError(f"{what} is a whole number of seconds, not {ttl}")
        ttl = ttl.days * 86_400 + ttl.seconds
    elif not isinstance(ttl, int) or isinstance(ttl, bool):
        raise ArgumentError(
            f"{what} is a whole number of seconds (int) or a timedelta, not {type(ttl).__name__}"
        )
    ttl = int.__index__(ttl)  # a subclass may compare as it likes
    if not least <= ttl <= MAX_TTL_SECONDS:
        told = f"{ttl:d}" if abs(ttl) < _TOO_LONG_TO_TELL else "a number of over 20 digits"
        raise ArgumentError(
            f"{what} is {least} to {MAX_TTL_SECONDS} seconds (100 years), not {told}"
        )
    return b"%d" % ttl


def idle_timeout_arg(idle_timeout: int | timedelta | None) -> bytes:
    """The whole seconds of an idle timeout, in decimal; nothing if there is none."""
    return b"" if idle_timeout is None else ttl_arg(idle_timeout, "idle_timeout", 1)


def grace_arg(grace: int | timedelta | None, subject: str | None) -> bytes:
    """The whole seconds of a renewal's grace, in decimal."""
    seconds = ttl_arg(DEFAULT_GRACE_SECONDS if grace is None else grace, "grace")
    if grace is not None and subject is not None:
        raise ArgumentError("with a subject there is no grace: the old token is dead at once")
    return seconds


def subject_arg(subject: str) -> bytes:
    """The bytes of a subject."""
    return _text_arg(subject, "subject", MAX_SUBJECT_BYTES)


def names_arg(names: Iterable[str], what: str = "names") -> tuple[bytes, ...]:
    """The hash fields of payloads, each once."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ArgumentError(f"{what} is a list of payload names, not {type(names).__name__}")
    return tuple(dict.fromkeys(map(field_arg, names)))


def by_arg(by: int) -> bytes:
    """What to add to a counter, in decimal."""
    if not isinstance(by, int) or isinstance(by, bool):
        raise ArgumentError(f"by is a whole number (int), not {type(by).__name__}")
    by = int.__index__(by)
    if not -(2**63) <= by < 2**63:
        raise ArgumentError("by is a signed number of 64 bits: -2**63 to 2**63 - 1")
    return b"%d" % by


def min_replicas_arg(min_replicas: int | None, otherwise: int) -> int:
    """How many replicas to wait for."""
    if min_replicas is None:
        return otherwise
    if not _is_count(min_replicas):
        raise ArgumentError(f"min_replicas is a whole number of 0 to {MAX_REPLICAS}")
    return min_replicas


def min_replicas_setting(min_replicas: int) -> int:
    """How many replicas to wait for unless a call says otherwise."""
    if not _is_count(min_replicas):
        raise ConfigurationError(f"min_replicas is a whole number of 0 to {MAX_REPLICAS}")
    return min_replicas


def timeout_setting(timeout: float | None) -> float:
    """The seconds that a call may take."""
    if timeout is None:
        return float("inf")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise ConfigurationError(
            f"timeout is a number of seconds, or None, not {type(timeout).__name__}"
        )
    if not 0 < timeout <= MAX_TIMEOUT_SECONDS:
        raise ConfigurationError(f"timeout is above 0 and at most {MAX_TIMEOUT_SECONDS} seconds")
    return timeout


def field_arg(name: str) -> bytes:
    """The hash field of a payload: its name behind a colon."""
    return b":" + _text_arg(name, "a payload's name", MAX_NAME_BYTES)


def _text_arg(text: str, what: str, limit: int) -> bytes:
    if not isinstance(text, str):
        raise ArgumentError(f"{what} is a str, not {type(text).__name__}")
    raw = utf8(text)
    if raw is None:
        raise ArgumentError(f"{what} must be valid text: this one holds a lone surrogate")
    if not 0 < len(raw) <= limit:
        raise ArgumentError(f"{what} is 1 to {limit} bytes of UTF-8, not {len(raw)}")
    return raw


def payloads_arg(payloads: Mapping[str, V], encode: Callable[[V, str], bytes]) -> tuple[bytes, ...]:
    """Field and data of each payload, one behind the other."""
    if not isinstance(payloads, Mapping):
        raise ArgumentError(
            f"payloads is a mapping of names to data, not {type(payloads).__name__}"
        )
    fields: list[bytes] = []
    for name, value in payloads.items():
        fields += (field_arg(name), encode(value, name))
    return tuple(fields)


def counted(fields: tuple[bytes, ...]) -> bytes:
    """How many payloads there are in fields and data, one behind the other."""
    return b"%d" % (len(fields) // 2)


def data_arg(data: Data, name: str) -> bytes:
    """The bytes of the payload of that name, as they are now: later changes do not count."""
    # Only bytes themselves are taken at their word: a subclass may say anything of its length.
    if type(data) is bytes and 0 < len(data) <= MAX_DATA_BYTES:
        return data
    content = _view(data)
    if content is None:
        raise ArgumentError(
            f"data of payload {name!r} is bytes-like or a str, not {type(data).__name__}: "
            f"for other types, give the gate a codec, as in codec=JSONCodec()"
            if not isinstance(data, str)
            else f"data of payload {name!r} must be valid text: this str holds a lone surrogate"
        )
    size = content.nbytes if isinstance(content, memoryview) else len(content)
    if not 0 < size <= MAX_DATA_BYTES:
        hint = "" if size else ": for nothing, use pdel"
        raise ArgumentError(
            f"data of payload {name!r} is 1 to {MAX_DATA_BYTES} bytes, not {size}{hint}"
        )
    return content.tobytes() if isinstance(content, memoryview) else content


def type_of_setting(value: object) -> str:
    """The name of a type for a message; None has mostly one cause."""
    return type(value).__name__ + (MISSING_HINT if value is None else "")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_REPLICAS


# These two return None rather than raise: an encoding error carries the text, which may be a
# secret, and so would an error raised while it is handled.


def utf8(text: str) -> bytes | None:
    """The text in UTF-8; None if it cannot be encoded (it holds a lone surrogate)."""
    try:
        return str.encode(text)
    except UnicodeEncodeError:
        return None


def _view(data: object) -> bytes | memoryview | None:
    """The content of text or of a buffer, which is not copied yet: it may be too big."""
    if isinstance(data, str):
        return utf8(data)
    try:
        return memoryview(data)  # type: ignore[arg-type]  # what is no buffer says so
    except TypeError:
        return None
