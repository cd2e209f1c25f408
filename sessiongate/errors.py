"""Every error and warning that SessionGate raises of its own. Imports nothing.

redis-py's errors (connection lost, timeout, out of memory, read only) are not wrapped: they reach
the caller as they are.
"""

from collections.abc import Callable

Result = str | bytes | int | None


class SessionGateError(Exception):
    """The root of every error of this library.

    ::

        SessionGateError
        ├── InvalidSessionError          answer with 401: sign in again
        │   ├── InvalidTokenError        refused without asking Redis
        │   │   ├── MalformedTokenError
        │   │   └── BadSignatureError
        │   └── SessionNotFoundError     ended, expired or never there
        ├── PayloadNotFoundError         also a KeyError
        ├── PayloadConflictError         the condition of if_absent or if_match was not met
        ├── PayloadTypeError             the payload is no counter
        │   └── PayloadOverflowError     also an OverflowError
        ├── PayloadDecodeError           the codec cannot read what is stored
        ├── UnsealError                  changed, foreign, or sealed with another key
        ├── TooManySessionsError         the subject has max_sessions
        ├── UnderReplicatedError         written, but too few replicas have it
        ├── ArgumentError                also a ValueError
        ├── ConfigurationError           also a ValueError
        ├── GateClosedError
        ├── HandleError                  also a RuntimeError
        ├── EventLoopError               also a RuntimeError
        └── IdTakenError                 the random source is broken
    """


class InvalidSessionError(SessionGateError):
    """The token opens no session: the one to turn into a 401 (sign in again)."""


class InvalidTokenError(InvalidSessionError):
    """The token was refused locally; Redis was not asked."""


class MalformedTokenError(InvalidTokenError):
    """The token is not spelt as a token: it was cut, changed or never one."""

    def __str__(self) -> str:
        return "not a session token: ask the client to sign in again"


class BadSignatureError(InvalidTokenError):
    """The token is well spelt, and none of the gate's sign keys signed it."""

    def __str__(self) -> str:
        return (
            "no sign key of this gate signed the token: it is forged, its sign key was retired, "
            "or another process signs with another key"
        )


class SessionNotFoundError(InvalidSessionError):
    """The token is genuine, but its session ended, expired or was never there.

    Or the session that `end_one` was to end is none of the subject's.

    Attributes:
        session_id: the id in the token, or that was given; not a secret, it opens nothing by
            itself.
        of_subject: whether it was asked for as one of a subject's, without a token.
    """

    def __init__(self, session_id: str, *, of_subject: bool = False) -> None:
        super().__init__(session_id)
        self.session_id = session_id
        self.of_subject = of_subject

    def __str__(self) -> str:
        if self.of_subject:
            return (
                "the subject has no live session with this id: it ended already, or is somebody "
                "else's"
            )
        return "the session ended, expired or never was: ask the client to sign in again"


class PayloadNotFoundError(SessionGateError, KeyError):
    """The session lives, but holds no payload of that name.

    Attributes:
        name: the payload's name, as it was asked for.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"the session holds no payload named {self.name!r}"


class PayloadConflictError(SessionGateError):
    """The payload is not what `if_absent` or `if_match` asked for; nothing was stored.

    Attributes:
        name: the payload's name, as it was given.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"payload {self.name!r} does not meet if_absent or if_match: read it and decide anew"


class PayloadTypeError(SessionGateError):
    """The payload is no counter: no decimal number of 64 bits. It was left as it is.

    Attributes:
        name: the payload's name, as it was given.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"payload {self.name!r} is no whole number of 64 bits: pincr counts what pincr made"


class PayloadOverflowError(PayloadTypeError, OverflowError):
    """The sum would not fit into 64 bits; the counter was left as it is."""

    def __str__(self) -> str:
        return f"payload {self.name!r} would leave the range of a signed number of 64 bits"


class PayloadDecodeError(SessionGateError):
    """The gate's codec cannot read what is stored, or it is not what `as_` asks for.

    Attributes:
        name: the payload's name, as it was asked for.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return (
            f"payload {self.name!r} cannot be decoded: another codec wrote it, or it is of another "
            "type than was asked for"
        )


class UnsealError(SessionGateError):
    """What is stored is not what this session sealed under this name with one of the gate's keys.

    It was changed, cut, moved from elsewhere, never sealed, or sealed with a key that the gate does
    not have. Nothing of it is returned. Log it, end the session and start another.

    Attributes:
        name: the payload's name, as it was asked for.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return (
            f"payload {self.name!r} is not what this session sealed: it was changed, moved, never "
            "sealed, or sealed with a key that this gate does not have"
        )


class TooManySessionsError(SessionGateError):
    """The subject has `max_sessions` live sessions already, and the gate rejects more."""

    def __str__(self) -> str:
        return "the subject has as many live sessions as max_sessions allows: end one of them first"


class UnderReplicatedError(SessionGateError):
    """The write was made and stands, but too few replicas had it in time: a failover may undo it.

    Attributes:
        replicas: how many had it for certain.
        min_replicas: how many were asked for.
    """

    _told: tuple[Callable[[], Result]] = (lambda: None,)

    def __init__(self, replicas: int, min_replicas: int, result: Result = None) -> None:
        super().__init__(replicas, min_replicas)
        self.replicas = replicas
        self.min_replicas = min_replicas
        # It may be a token: behind a call, it is shown by no log that shows attributes.
        if result is not None:
            self._told = (lambda: result,)

    def result(self) -> Result:
        """What the call would have returned: of `start` and `renew` the token."""
        return self._told[0]()

    def __reduce__(self) -> tuple[object, ...]:
        # What `result` tells does not travel: not into a queue nor another process.
        return type(self), self.args

    def __str__(self) -> str:
        # What the wait ended with: its text is the server's, its class says enough.
        cause = f": {type(self.__cause__).__name__}" if self.__cause__ else ""
        return (
            f"fewer replicas than asked for ({self.replicas} of {self.min_replicas}) confirmed in "
            f"time: what was written stands, unless a failover loses it{cause}"
        )


class ArgumentError(SessionGateError, ValueError):
    """An argument of a call is out of its limits; nothing was sent to Redis."""


class ConfigurationError(SessionGateError, ValueError):
    """The gate cannot be made as asked: sign key, prefix, URL or client."""


class GateClosedError(SessionGateError):
    """The gate was closed before the call."""

    def __str__(self) -> str:
        return "the gate is closed: make a new one, or close this one later"


class HandleError(SessionGateError, RuntimeError):
    """What `gate.open` returned was used in a way that it cannot serve; nothing was sent."""


class EventLoopError(SessionGateError, RuntimeError):
    """The gate was used from another event loop than before; its connection lives in that one.

    Make one gate for each event loop.
    """

    def __str__(self) -> str:
        return (
            "this gate belongs to another event loop, or to the process that this one was forked "
            "from: make one gate for each event loop"
        )


class IdTakenError(SessionGateError):
    """Every id that was drawn for a new session exists already; none was overwritten."""

    def __str__(self) -> str:
        return "several new session ids in a row were taken: the random source repeats itself"


class WeakSignKeyWarning(UserWarning):
    """A sign key is shorter than the 32 bytes that HMAC-SHA256 deserves."""
