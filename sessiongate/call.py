"""One operation under way: what it sends next, when it is due, what it comes to. No I/O here.

Here alone it is decided what is sent again, how often and after which pause. A gate sends what it
is told, and hands in what came of it.
"""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from redis import exceptions as redis_errors

from .command import Answer, Command, NotRun, Written
from .errors import SessionGateError, UnderReplicatedError

if TYPE_CHECKING:
    from .errors import Result

R = TypeVar("R")

_REPEATS = 4
# Seconds that the first repeat waits for at most; each further one may wait four times as long.
# Which part of that is left to chance: callers that failed together do not come back together.
_PAUSE = 0.02
_LONGER = 4

# What passes by itself: a server that starts, is busy, has become a replica, has no primary.
_PASSING = (
    redis_errors.AskError,
    redis_errors.BusyLoadingError,
    redis_errors.ClusterDownError,
    redis_errors.ConnectionError,
    redis_errors.MasterDownError,
    redis_errors.ReadOnlyError,
    redis_errors.TimeoutError,
    redis_errors.TryAgainError,
)
# ConnectionErrors that say nothing of the sort.
_LASTING = (
    redis_errors.AuthenticationError,
    redis_errors.AuthorizationError,
    redis_errors.MaxConnectionsError,
)


def lost(error: Exception) -> bool:
    """Whether it is unknown if the command ran. Subclasses name a refusal: then it is known."""
    return type(error) in (redis_errors.ConnectionError, redis_errors.TimeoutError)


def passes(error: Exception) -> bool:
    """Whether an error is of the kind that may be gone in a moment."""
    if isinstance(error, redis_errors.ResponseError) and str(error).startswith("BUSY "):
        return True
    return isinstance(error, _PASSING) and not isinstance(error, _LASTING)


def refuses(error: Exception) -> bool:
    """Whether a server says with it that it does not run the command just now."""
    return passes(error) and not lost(error)


class Call(Generic[R]):
    """An operation from its first command to its result.

    Args:
        command: what it begins with.
        due: when it has to be over, by the clock.
        clock: seconds of a clock that never goes back.
    """

    __slots__ = ("_clock", "_repeats", "_short", "_unknown", "command", "due", "pause", "result")

    def __init__(self, command: Command[R], due: float, clock: Callable[[], float]) -> None:
        self.command = command
        self.due = due
        self.pause = 0.0  # seconds to wait for before the command is sent
        self.result: R
        self._clock = clock
        self._repeats = 0
        self._unknown: Exception | None = None  # what left open whether an earlier try ran
        self._short: tuple[int, int, Exception | None] | None = None

    def goes_on(self, answer: Answer) -> bool:
        """Take in what came of the command: whether there is another one to send.

        If not, `result` is the operation's, or its error is raised.
        """
        command = self.command
        certain = False
        if type(answer) is not bytes:
            if isinstance(answer, NotRun):
                certain, answer = True, answer.error
            elif isinstance(answer, Written):
                answer = self._noted(answer)
        try:
            result = command.result(answer)
        except Exception as error:  # noqa: BLE001  # `_given_up` raises it
            following = self._after(error, certain=certain)
            if following is not None:
                self.command = following
                return True
            result = self._given_up(error)
        finally:
            del answer  # an error refers to this frame: the two would keep each other
        return self._has_result(result)

    def _has_result(self, result: R | Command[R]) -> bool:
        self.pause = 0.0
        self._unknown = None
        if isinstance(result, Command):
            self.command = result
            return True
        self.result = result
        if self._short is not None:
            had, wanted, cause = self._short
            raise UnderReplicatedError(had, wanted, cast("Result", result)) from cause
        return False

    def _given_up(self, error: Exception) -> R | Command[R]:
        """Raise the error of the operation; or its result, if that had but to be waited for."""
        unknown, self._unknown = self._unknown, None
        try:
            if isinstance(error, redis_errors.RedisError):
                if self.command.only_waits:
                    return self.command.result(self._noted(self.command.written(b"", 0, error)))
                if isinstance(error, redis_errors.MovedError):
                    error.add_note("this server belongs to a cluster: use redis+cluster://")
                if unknown is not None and not lost(error):
                    # That this try did not run does not say that of those before.
                    raise unknown from error
            if isinstance(error, SessionGateError):
                # Not from where it arose: what is decoded there is for no log that shows variables.
                error.__traceback__ = None
            raise error
        finally:
            del error, unknown  # they refer to this frame: they would keep each other

    def _noted(self, answer: Written) -> bytes:
        reply, had, error = answer
        if had < self.command.replicas and (self._short is None or had < self._short[0]):
            self._short = (had, self.command.replicas, error)
        return reply

    def _after(self, error: Exception, *, certain: bool) -> Command[R] | None:
        """The command to send now that this one failed; None if its error is the caller's."""
        command = self.command
        self.pause = 0.0
        if isinstance(error, redis_errors.NoScriptError) and not command.by_source:
            # The same call with the source: needs no other node nor permission, and registers it.
            return command._replace(by_source=True)
        following = command.recover(command, error) if command.recover else None
        if following is not None:
            self._unknown = None  # it tells what became of the tries before
        if following is None and passes(error):
            following = command if certain else _repeated(command)
            if following is None or not self._has_time():
                return None
            if not certain and self._unknown is None:
                self._unknown = error
            return following
        return following

    def _has_time(self) -> bool:
        if self._repeats == _REPEATS:
            return False
        longest = _PAUSE * _LONGER**self._repeats
        self._repeats += 1
        self.pause = longest * random.random()  # noqa: S311  # no secret
        return self._clock() + self.pause < self.due


def _repeated(command: Command[R]) -> Command[R] | None:
    if command.repeat is None:
        return None
    # It may find its work done, by its first try: on another connection, so that a WAIT would not
    # wait for that.
    return command.repeat(command)._replace(unmarked=True)
