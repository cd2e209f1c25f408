"""One call of one script as a value, and what came of it. No I/O here."""

from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from redis import exceptions as redis_errors

from . import scripts
from .errors import (
    IdTakenError,
    PayloadConflictError,
    PayloadNotFoundError,
    PayloadOverflowError,
    PayloadTypeError,
    SessionNotFoundError,
    TooManySessionsError,
)
from .scripts import Script

if TYPE_CHECKING:
    from collections.abc import Callable

R = TypeVar("R")

# The errors that the scripts raise themselves.
CODES = frozenset(
    {"IDTAKEN", "NOSESSION", "NOPAYLOAD", "CONFLICT", "NOCOUNTER", "OVERFLOW", "TOOMANY"}
)


class Refusal(NamedTuple):
    """A script's own no: one of `CODES`."""

    code: str


# What came of a command: what its script returned, its refusal, or an error to raise.
Answer = bytes | Refusal | Exception


class Command(NamedTuple, Generic[R]):
    """One call of one script. Made here, sent by a gate.

    What `decode` makes of the reply is the result, or the command that an operation goes on with.
    """

    script: Script
    keys: tuple[bytes, ...]
    args: tuple[bytes, ...]
    decode: "Callable[[bytes], R | Command[R]]"
    session_id: str
    payload: str = ""
    recover: "Callable[[Command[R], Exception], Command[R] | None] | None" = None
    by_source: bool = False

    def __repr__(self) -> str:
        # Arguments are fingerprints and payloads: not for logs.
        return f"<Command {self.script.name}>"

    def result(self, answer: Answer) -> "R | Command[R]":
        """The decoded answer, or the error that stands for it, raised."""
        if isinstance(answer, bytes):
            return self.decode(answer)
        if not isinstance(answer, Refusal):
            try:
                raise answer
            finally:
                del answer  # the error refers to this frame: the two would keep each other
        match answer.code:
            case "NOSESSION":
                raise SessionNotFoundError(self.session_id)
            case "NOPAYLOAD":
                raise PayloadNotFoundError(self.payload)
            case "CONFLICT":
                raise PayloadConflictError(self.payload)
            case "NOCOUNTER":
                raise PayloadTypeError(self.payload)
            case "OVERFLOW":
                raise PayloadOverflowError(self.payload)
            case "TOOMANY":
                raise TooManySessionsError
        raise IdTakenError

    def after(self, error: Exception) -> "Command[R] | None":
        """The command to send now that this one failed; None if its error is the caller's.

        The chain ends by itself: each step uses up what led to it.
        """
        if isinstance(error, redis_errors.NoScriptError) and not self.by_source:
            # The same call with the source: needs no other node nor permission, and registers it.
            return self._replace(by_source=True)
        return self.recover(self, error) if self.recover else None


AnyCommand = Command[Any]  # for code that carries commands and never looks at their results


def lost(error: Exception) -> bool:
    """Whether it is unknown if the command ran. Subclasses name a refusal: then it is known."""
    return type(error) in (redis_errors.ConnectionError, redis_errors.TimeoutError)


def once_more(command: Command[R], error: Exception) -> Command[R] | None:
    """For what a second try does not change: send it again if its reply was lost."""
    return command._replace(recover=None) if lost(error) else None


def nothing(_: bytes) -> None:
    """Of an answer without a result."""
    return


# Asked behind an error without an echo, to tell whether that was the answer to the request before.
# Sent by source: it must not meet a NOSCRIPT itself.
PROBE: Command[None] = Command(scripts.ECHO, (), (), nothing, "", by_source=True)
