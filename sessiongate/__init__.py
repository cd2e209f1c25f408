"""Sessions with signed tokens and named payloads, on stock Redis."""

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
