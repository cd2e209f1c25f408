"""Sessions with signed tokens and named payloads, on stock Redis.

Who imports whom, from the bottom up: `errors`; `arguments`, `tokens` and `keyspace` judge and name
things; `scripts` are the Lua files; `command` is a call of one as a value, `answers` its results;
`commands` makes of an operation its commands, with `subjects` for those on a subject's sessions;
`call` is an operation under way: what is sent again, and when it has to be over; `wire` packs a
command as a request and proves its reply. All of these do no I/O. `timed` makes connections that
keep a deadline, `routes` finds the server of a command on a cluster. `gate` asks on `lines`, `aio`
on a `lane`, with the client that `connect` makes of a URL; `cli` and `demo` show it.
"""

from .aio import AsyncSessionGate
from .answers import SessionInfo
from .errors import (
    ArgumentError,
    BadSignatureError,
    ConfigurationError,
    EventLoopError,
    GateClosedError,
    IdTakenError,
    InvalidSessionError,
    InvalidTokenError,
    MalformedTokenError,
    PayloadConflictError,
    PayloadNotFoundError,
    PayloadOverflowError,
    PayloadTypeError,
    SessionGateError,
    SessionNotFoundError,
    TooManySessionsError,
    UnderReplicatedError,
    WeakSignKeyWarning,
)
from .gate import SessionGate

__all__ = [
    "ArgumentError",
    "AsyncSessionGate",
    "BadSignatureError",
    "ConfigurationError",
    "EventLoopError",
    "GateClosedError",
    "IdTakenError",
    "InvalidSessionError",
    "InvalidTokenError",
    "MalformedTokenError",
    "PayloadConflictError",
    "PayloadNotFoundError",
    "PayloadOverflowError",
    "PayloadTypeError",
    "SessionGate",
    "SessionGateError",
    "SessionInfo",
    "SessionNotFoundError",
    "TooManySessionsError",
    "UnderReplicatedError",
    "WeakSignKeyWarning",
]

__version__ = "0.1.0"
