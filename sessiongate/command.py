"""One call of one script as a value, and what came of it. No I/O here."""

from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

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


class NotRun(NamedTuple):
    """The command did not run, for certain: it was not sent, or the server would not run it now."""

    error: Exception


class Written(NamedTuple):
    """What a script returned, and how many replicas had what it wrote when the wait was over.

    `error` is what the wait ended with if it could not be waited for.
    """

    reply: bytes
    replicas: int
    error: Exception | None = None


# What came of a command: what its script returned, its refusal, or an error to raise. An error
# leaves open whether it ran.
Answer = bytes | Refusal | NotRun | Written | Exception


class Command(NamedTuple, Generic[R]):
    """One call of one script. Made here, sent by a gate.

    What `decode` makes of the reply is the result, or the command that an operation goes on with.
    `repeat` makes the command to send when it is unknown whether this one ran; without, it is not
    sent again. `recover` makes what to send after another error, if anything.

    With `replicas` the answer is waited for until as many have what was written. `unmarked` says
    that the script may have written nothing, being the second to do its work. `only_waits` says
    that all was written before, so that an error is but one of waiting.
    """

    script: Script
    keys: tuple[bytes, ...]
    args: tuple[bytes, ...]
    decode: "Callable[[bytes], R | Command[R]]"
    session_id: str
    payload: str = ""
    repeat: "Callable[[Command[R]], Command[R]] | None" = None
    recover: "Callable[[Command[R], Exception], Command[R] | None] | None" = None
    replicas: int = 0
    unmarked: bool = False
    only_waits: bool = False
    absence_is_done: bool = False  # that the session is gone is what it was sent for
    anywhere: bool = False  # another slot of a cluster would do as well: `recover` knows
    by_source: bool = False

    def __repr__(self) -> str:
        # Arguments are fingerprints and payloads: not for logs.
        return f"<Command {self.script.name}>"

    def judge(self, answer: Answer) -> Answer:
        """The answer; a refusal that tells of what was to be brought about is none."""
        if self.absence_is_done and isinstance(answer, Refusal) and answer.code == "NOSESSION":
            return b""
        return answer

    def result(self, answer: bytes | Refusal | Exception) -> "R | Command[R]":
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


AnyCommand = Command[Any]  # for code that carries commands and never looks at their results


def again(command: Command[R]) -> Command[R]:
    """For what a second try does not change: the same once more."""
    return command


def or_gone(command: Command[R]) -> Command[R]:
    """For what ends a session: the same once more, and done if the session is gone by then."""
    return command._replace(absence_is_done=True)


def nothing(_: bytes) -> None:
    """Of an answer without a result."""
    return


# Asked behind an error without an echo, to tell whether that was the answer to the request before.
# Sent by source: it must not meet a NOSCRIPT itself.
PROBE: Command[None] = Command(scripts.ECHO, (), (), nothing, "", by_source=True)


def mark_of(command: AnyCommand) -> Command[None]:
    """The write that changes nothing, to be waited for in place of the command's own."""
    return Command(scripts.MARK, command.keys[:1], (), nothing, "", by_source=True)


def waited_for(key: bytes, replicas: int, result: R, *others: bytes) -> "R | Command[R]":
    """What an operation of several steps ends with: its result, once the replicas have it.

    To wait after each step could take the time that the next one needs.

    Args:
        key: a Redis key of the server that wrote.
        replicas: how many; 0 for the result at once.
        result: what the operation returns.
        others: keys of other servers that wrote.
    """
    if not replicas:
        return result

    def then(_: bytes) -> "R | Command[R]":
        return waited_for(others[0], replicas, result, *others[1:]) if others else result

    keys = (key,)
    return Command(
        scripts.MARK, keys, (), then, "", repeat=again, replicas=replicas, only_waits=True
    )
