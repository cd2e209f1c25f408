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
    from collections.abc import Callable, Sequence

R = TypeVar("R")

# The errors that the scripts raise themselves.
CODES = frozenset(
    {
        "IDTAKEN",
        "NOSESSION",
        "NOPAYLOAD",
        "CONFLICT",
        "CHANGED",
        "NOCOUNTER",
        "OVERFLOW",
        "TOOMANY",
    }
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

    With `replicas` an answer is returned when as many have what was written, on the connection that
    wrote; one for which `waits` is not true only tells what to send next. `unmarked` says that the
    script may have written nothing, being the second to do its work. `only_waits` says that all was
    written before, so that an error is but one of waiting, and that the script tells whether this
    server has it.
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
    waits: "Callable[[bytes], bool] | None" = None
    unmarked: bool = False
    only_waits: bool = False
    anywhere: bool = False  # another slot of a cluster would do as well: `recover` knows
    by_source: bool = False

    def __repr__(self) -> str:
        # Arguments are fingerprints and payloads: not for logs.
        return f"<Command {self.script.name}>"

    # Sentry shows the items of a tuple that has no such method, whatever its repr is.
    def __sentry_repr__(self) -> str:
        return repr(self)

    def awaits(self, reply: bytes) -> bool:
        """Whether replicas have to have what this reply tells of."""
        return self.replicas > 0 and (self.waits is None or self.waits(reply))

    def written(self, reply: bytes, replicas: int, error: Exception | None = None) -> Written:
        """What a script returned that was waited for, and how many replicas have what it wrote."""
        if self.only_waits and reply != HAS_IT:
            replicas = 0  # a server that has not: its replicas have not either
        return Written(reply, replicas, error)

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
                of_subject = self.script is scripts.END_ONE
                raise SessionNotFoundError(self.session_id, of_subject=of_subject)
            case "NOPAYLOAD":
                raise PayloadNotFoundError(self.payload)
            case "CONFLICT" | "CHANGED":
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


def told_again(at: int) -> "Callable[[Command[R]], Command[R]]":
    """For a script that has to know: the same once more, with `1` for the `0` at that argument."""

    def repeat(command: Command[R]) -> Command[R]:
        args = (*command.args[:at], b"1", *command.args[at + 1 :])
        return command._replace(args=args, anywhere=False)

    return repeat


def is_empty(reply: bytes) -> bool:
    """Of a script that else returns what it has to be told first, and has done nothing."""
    return not reply


def nothing(_: bytes) -> None:
    """Of an answer without a result."""
    return


# Asked behind an error without an echo, to tell whether that was the answer to the request before.
# Sent by source: it must not meet a NOSCRIPT itself.
PROBE: Command[None] = Command(scripts.ECHO, (), (), nothing, "", by_source=True)


def mark_of(command: AnyCommand) -> Command[None]:
    """The write that changes nothing, to be waited for in place of the command's own."""
    return Command(scripts.MARK, command.keys[:1], (b"",), nothing, "", by_source=True)


class Trace(NamedTuple):
    """A Redis key by which a server shows that it has what was written to it: `mark` tells how."""

    key: bytes
    sign: bytes


GONE = b"gone"  # the sign of a session that was taken away
HAS_IT = b"1"


def waited_for(traces: "Sequence[Trace]", replicas: int, result: R) -> "R | Command[R]":
    """What an operation on several servers ends with: its result, once the replicas have it.

    To wait after each step could take the time that the next one needs. So one step is made for
    each server that wrote when all is done; if another one has taken its place, that must have it.

    Args:
        traces: what the servers show.
        replicas: how many; 0 for the result at once.
        result: what the operation returns.
    """
    if not replicas or not traces:
        return result
    first, *rest = traces

    def then(_: bytes) -> "R | Command[R]":
        return waited_for(rest, replicas, result)

    return Command(
        scripts.MARK,
        (first.key,),
        (first.sign,),
        then,
        "",
        repeat=again,
        replicas=replicas,
        only_waits=True,
    )
