"""Sessions with signed tokens and named payloads, on stock Redis.

Who imports whom, from the bottom up: `errors`; `arguments`, `tokens` and `keyspace` judge and name
things; `codecs` and, on `cipher`, `sealing` make what Redis holds of a payload, `values` is both;
`scripts` are the Lua files; `command` is a call of one as a value, `answers` its results;
`commands` makes of an operation its commands, with `subjects` for those on a subject's sessions;
`call` is an operation under way: what is sent again, and when it has to be over; `wire` packs a
command as a request and proves its reply. All of these do no I/O. `timed` makes connections that
keep a deadline, `routes` finds the server of a command on a cluster. `handle` is a session as a
mapping of payloads. `gate` asks on `lines`, `aio` on a `lane`, with the client that `connect` makes
of a URL; `cli` and `demo` show it.
"""

from .aio import AsyncSessionGate
from .answers import SessionInfo
from .codecs import BytesCodec, Codec, JSONCodec, MsgpackCodec
from .errors import (
    ArgumentError,
    BadSignatureError,
    ConfigurationError,
    EventLoopError,
    GateClosedError,
    HandleError,
    IdTakenError,
    InvalidSessionError,
    InvalidTokenError,
    MalformedTokenError,
    PayloadConflictError,
    PayloadDecodeError,
    PayloadNotFoundError,
    PayloadOverflowError,
    PayloadTypeError,
    SessionGateError,
    SessionNotFoundError,
    TooManySessionsError,
    UnderReplicatedError,
    UnsealError,
    WeakSignKeyWarning,
)
from .gate import SessionGate
from .handle import AsyncSession, Session

__all__ = [
    "ArgumentError",
    "AsyncSession",
    "AsyncSessionGate",
    "BadSignatureError",
    "BytesCodec",
    "Codec",
    "ConfigurationError",
    "EventLoopError",
    "GateClosedError",
    "HandleError",
    "IdTakenError",
    "InvalidSessionError",
    "InvalidTokenError",
    "JSONCodec",
    "MalformedTokenError",
    "MsgpackCodec",
    "PayloadConflictError",
    "PayloadDecodeError",
    "PayloadNotFoundError",
    "PayloadOverflowError",
    "PayloadTypeError",
    "Session",
    "SessionGate",
    "SessionGateError",
    "SessionInfo",
    "SessionNotFoundError",
    "TooManySessionsError",
    "UnderReplicatedError",
    "UnsealError",
    "WeakSignKeyWarning",
]

__version__ = "0.1.0"
