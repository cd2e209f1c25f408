"""What the scripts return beyond one payload, as values: lists, payloads, sessions. No I/O here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# How many digits of microseconds since 1970 an index entry begins with; the id follows.
STARTED_DIGITS = 16
ENTRY_BYTES = 32

_FACTS = 6  # what is told of a session before its payloads


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What Redis knows of a live session.

    Attributes:
        id: the session id: safe to show and to log, it opens nothing by itself.
        subject: who the session belongs to; None if it belongs to nobody.
        created_at: when it was started, by the server's clock, to the millisecond; with a time
            zone (UTC). Renewals do not change it.
        expires_at: when it ends at the latest, whoever uses it; likewise.
        idle_timeout: after how many seconds without use it ends; None if it has no idle timeout.
        seconds_left: for how long it goes on if nobody uses it.
        generation: how often its token was renewed.
        payloads: the name of each payload, and its size in bytes.

    Example:
        >>> from sessiongate import SessionGate
        >>> gate = SessionGate.from_url("memory://", sign_key="k" * 32)
        >>> info = gate.info(gate.start(300, {"user": "John Doe"}))
        >>> info.payloads
        {'user': 8}
        >>> info.created_at.tzinfo
        datetime.timezone.utc
    """

    id: str
    subject: str | None
    created_at: datetime
    expires_at: datetime
    idle_timeout: int | None
    seconds_left: float
    generation: int
    payloads: Mapping[str, int] = field(hash=False)


def items(answer: bytes) -> Iterator[bytes]:
    """The items of a list: of each its length in decimal, a colon and itself."""
    at = 0
    while at < len(answer):
        colon = answer.index(b":", at)
        end = colon + 1 + int(answer[at:colon])
        yield answer[colon + 1 : end]
        at = end


def payloads(answer: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names and data of payloads."""
    listed = items(answer)
    return zip(listed, listed, strict=True)


def session_info(session_id: str, answer: bytes) -> SessionInfo:
    """What a script tells of one session."""
    listed = items(answer)
    started, ends, left, idle, generation, subject = islice(listed, _FACTS)
    return SessionInfo(
        id=session_id,
        subject=text(subject) or None,
        created_at=_moment(int(started) // 1000),
        expires_at=_moment(int(ends)),
        idle_timeout=int(idle) if idle else None,
        seconds_left=int(left) / 1000,
        generation=int(generation),
        payloads={text(name): int(size) for name, size in zip(listed, listed, strict=True)},
    )


def opened(answer: bytes) -> tuple[datetime, str | None, dict[bytes, bytes]]:
    """When a session ends, whose it is, and what is stored of its payloads, by their names."""
    listed = items(answer)
    _, ends, _, _, _, subject = islice(listed, _FACTS)
    return _moment(int(ends)), text(subject) or None, dict(zip(listed, listed, strict=True))


def _moment(milliseconds: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=milliseconds)


def session_infos(answer: bytes) -> tuple[bytes, dict[bytes, SessionInfo]]:
    """What a script tells of several sessions, by their index entries; and entries to ask for."""
    listed = items(answer)
    moved = next(listed)
    pairs = zip(listed, listed, strict=True)
    return moved, {entry: session_info(entry_id(entry), told) for entry, told in pairs}


def entries(answer: bytes) -> list[bytes]:
    """The entries of an index, each when a session was started and its id."""
    return [answer[at : at + ENTRY_BYTES] for at in range(0, len(answer), ENTRY_BYTES)]


def entry_id(entry: bytes) -> str:
    """The id in an entry of an index."""
    return entry[STARTED_DIGITS:].decode()


def text(raw: bytes) -> str:
    """The name that stands for these bytes."""
    # Another client may have stored a name that is no UTF-8: it is to be seen all the same.
    return raw.decode("utf-8", "backslashreplace")
