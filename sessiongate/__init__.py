"""Sessions with signed tokens and named payloads, on stock Redis.

Who imports whom, from the bottom up: `errors`; `arguments`, `tokens` and `keyspace` judge and name
things; `scripts` are the Lua files; `commands` makes of an operation a value; `wire` packs it as a
request and proves its reply. All of these do no I/O. `gate` and `aio` (with its `lane`) run
commands on the clients that `connect` makes of a URL; `cli` and `demo` show it.
"""

from .aio import AsyncSessionGate
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
    PayloadNotFoundError,
    SessionGateError,
    SessionNotFoundError,
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
    "PayloadNotFoundError",
    "SessionGate",
    "SessionGateError",
    "SessionNotFoundError",
    "WeakSignKeyWarning",
]

__version__ = "0.1.0"
