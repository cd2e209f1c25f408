"""What is sent again, how often and until when: the rule of both gates, without a server."""

import gc
import math
import weakref
from collections.abc import Callable
from contextlib import suppress
from copy import copy

import pytest
from redis import exceptions as redis_errors

from sessiongate import SessionNotFoundError, UnderReplicatedError, scripts
from sessiongate.call import Call
from sessiongate.command import (
    GONE,
    Command,
    NotRun,
    Refusal,
    Trace,
    Written,
    again,
    waited_for,
)

ERRORS: list[Exception] = [
    redis_errors.ConnectionError("x"),
    redis_errors.TimeoutError("x"),
    redis_errors.BusyLoadingError("x"),
    redis_errors.ReadOnlyError("x"),
    redis_errors.ClusterDownError("x"),
    redis_errors.MasterDownError("x"),
    redis_errors.TryAgainError("x"),
    redis_errors.AskError("1 a:1"),
    redis_errors.MovedError("1 a:1"),
    redis_errors.ResponseError("BUSY Redis is busy running a script."),
]
LASTING: list[Exception] = [
    redis_errors.AuthenticationError("x"),
    redis_errors.AuthorizationError("x"),
    redis_errors.MaxConnectionsError("x"),
    redis_errors.NoPermissionError("x"),
    redis_errors.OutOfMemoryError("x"),
    redis_errors.ResponseError("WRONGTYPE x"),
    redis_errors.ResponseError("BUSYKEY x"),
]


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def call(command: Command[bytes], clock: Clock | None = None, due: float = 5.0) -> Call[bytes]:
    return Call(command, due, clock or Clock())


def command(repeat: Callable[[Command[bytes]], Command[bytes]] | None = None) -> Command[bytes]:
    return Command(scripts.PGET, (b"key",), (b"arg",), bytes, "A" * 16, "user", repeat)


def test_an_answer_is_the_end() -> None:
    """What the script returned, decoded, is the result, and nothing more is sent."""
    one = call(command())
    assert not one.goes_on(b"data")
    assert one.result == b"data"


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("repeat", [None, again])
def test_what_did_not_run_is_sent_again(
    error: Exception, repeat: Callable[[Command[bytes]], Command[bytes]] | None
) -> None:
    """A command that certainly did not run is sent again four times, whatever it does."""
    one = call(command(repeat))
    for _ in range(4):
        assert one.goes_on(NotRun(error))
        assert one.command.args == (b"arg",)
        assert not one.command.unmarked
    with pytest.raises(type(error)) as caught:
        one.goes_on(NotRun(error))
    assert caught.value is error


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_what_may_have_run_is_sent_again_if_it_knows_its_traces(error: Exception) -> None:
    """After another error only what has a way to repeat it is sent again, in that way."""
    with pytest.raises(type(error)):
        call(command()).goes_on(error)

    def repeat(one: Command[bytes]) -> Command[bytes]:
        return one._replace(args=(*one.args, b"again"))

    one = call(command(repeat))
    for times in range(1, 5):
        assert one.goes_on(error)
        assert one.command.args == (b"arg", *[b"again"] * times)
        # It may find its work done: then a WAIT behind it would wait for nothing.
        assert one.command.unmarked
    with pytest.raises(type(error)):
        one.goes_on(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_does_not_pass_is_the_callers(error: Exception) -> None:
    """An error that does not pass by itself reaches the caller at once."""
    for answer in (error, NotRun(error)):
        with pytest.raises(type(error)):
            call(command(again)).goes_on(answer)


def test_pauses_grow_and_differ() -> None:
    """The pauses are at most 20, 80, 320 and 1280 ms, and no two callers have the same."""
    limits = [0.02, 0.08, 0.32, 1.28]
    seen: list[list[float]] = [[] for _ in limits]
    for _ in range(200):
        one = call(command(), due=math.inf)
        for number, limit in enumerate(limits):
            assert one.goes_on(NotRun(ERRORS[0]))
            assert 0 <= one.pause <= limit
            seen[number].append(one.pause)
    for pauses, limit in zip(seen, limits, strict=True):
        assert len(set(pauses)) > 190
        assert min(pauses) < limit / 4
        assert max(pauses) > limit * 3 / 4


def test_nothing_is_sent_again_after_the_deadline() -> None:
    """When the deadline is over, or would be after the pause, the last error is the caller's."""
    clock = Clock()
    one = call(command(again), clock)
    assert one.goes_on(ERRORS[1])
    clock.now = 5.0
    with pytest.raises(redis_errors.TimeoutError):
        one.goes_on(ERRORS[1])


def test_what_a_later_try_did_not_do_an_earlier_one_may_have() -> None:
    """After a lost reply the error is that, if what was sent again was refused by the server."""
    full = redis_errors.OutOfMemoryError("x")
    lost = redis_errors.ConnectionError("x")
    one = call(command(again))
    assert one.goes_on(lost)
    with pytest.raises(redis_errors.ConnectionError) as caught:
        one.goes_on(full)
    assert caught.value is lost
    assert caught.value.__cause__ is full
    one = call(command(again))
    assert one.goes_on(lost)
    with pytest.raises(SessionNotFoundError):
        one.goes_on(Refusal("NOSESSION"))


def test_an_error_keeps_nothing_alive() -> None:
    """An error that a call ended with, or went on after, is gone with the last name for it."""

    def ended(errors: list[Exception]) -> list[weakref.ref[Exception]]:
        one = call(command(again))
        seen = list(map(weakref.ref, errors))
        while errors:
            with suppress(redis_errors.RedisError):
                one.goes_on(errors.pop(0))
        return seen

    gc.disable()
    try:
        seen = ended([copy(ERRORS[0]) for _ in range(5)])
        seen += ended([copy(ERRORS[0]), redis_errors.OutOfMemoryError("x")])
        assert [error() for error in seen] == [None] * 7
    finally:
        gc.enable()


def test_a_forgotten_script_costs_no_repetition() -> None:
    """An unknown script is sent by its source, at once; if that is unknown, it is an error."""
    one = call(command())
    assert one.goes_on(redis_errors.NoScriptError("x"))
    assert one.command.by_source
    assert one.pause == 0
    for _ in range(4):
        assert one.goes_on(NotRun(ERRORS[0]))
    with pytest.raises(redis_errors.ConnectionError):
        one.goes_on(NotRun(ERRORS[0]))


def test_a_step_after_a_repetition_has_no_pause() -> None:
    """The next command of an operation is sent at once, and the repeats are of the whole of it."""
    following = command()
    one = call(command()._replace(decode=lambda _: following))
    for _ in range(4):
        assert one.goes_on(NotRun(ERRORS[0]))
    assert one.goes_on(b"")
    assert one.command is following
    assert one.pause == 0
    with pytest.raises(redis_errors.ConnectionError):
        one.goes_on(NotRun(ERRORS[0]))


def test_recovery_comes_before_repetition() -> None:
    """What an operation does about an error of its own is done at once."""
    other = command()
    one = call(command(again)._replace(recover=lambda _, __: other))
    assert one.goes_on(NotRun(ERRORS[6]))
    assert one.command is other
    assert one.pause == 0


def test_a_server_that_has_not_what_was_written() -> None:
    """Its replicas have not either, whatever it counts: another one took the place of who wrote."""
    last = waited_for([Trace(b"one", b"fingerprint")], 2, b"result")
    assert isinstance(last, Command)
    assert last.written(b"1", 2) == Written(b"1", 2)
    assert last.written(b"0", 2) == Written(b"0", 0)


def test_only_an_answer_that_ends_it_is_waited_for() -> None:
    """One that tells what to send next wrote nothing, and takes none of the time."""
    one = command()._replace(replicas=1)
    assert one.awaits(b"data")
    assert not command().awaits(b"data")
    assert not one._replace(waits=lambda answer: not answer).awaits(b"data")


def test_too_few_replicas() -> None:
    """The result is there all the same, with how many had it, and in no text."""
    one = call(command()._replace(replicas=2))
    with pytest.raises(UnderReplicatedError) as caught:
        one.goes_on(Written(b"token", 1))
    error = caught.value
    assert (error.replicas, error.min_replicas, error.result()) == (1, 2, b"token")
    assert "token" not in f"{error!r}{error}{vars(error)}"
    assert not call(command()._replace(replicas=2)).goes_on(Written(b"token", 3))


def test_a_wait_that_failed_is_no_failed_write() -> None:
    """If it could not be waited for, that error is the cause, and no replica counts."""
    denied = redis_errors.NoPermissionError("x")
    with pytest.raises(UnderReplicatedError) as caught:
        call(command()._replace(replicas=1)).goes_on(Written(b"token", 0, denied))
    assert caught.value.__cause__ is denied


def test_operations_of_several_steps_wait_at_their_end() -> None:
    """They wait once for each server that wrote; an error there leaves the result as it is."""
    traces = Trace(b"one", b"fingerprint"), Trace(b"two", GONE)
    assert waited_for(traces, 0, b"result") == b"result"
    last = waited_for(traces, 2, b"result")
    assert isinstance(last, Command)
    one = call(last)
    assert one.goes_on(Written(b"", 2))
    assert one.command.keys == (b"two",)
    lost = redis_errors.ConnectionError("x")
    for _ in range(4):
        assert one.goes_on(lost)
    with pytest.raises(UnderReplicatedError) as caught:
        one.goes_on(lost)
    assert (caught.value.replicas, caught.value.result()) == (0, b"result")
    assert caught.value.__cause__ is lost


def test_the_fewest_replicas_count() -> None:
    """Of several servers the one with the fewest replicas is told of."""
    last = waited_for([Trace(key, GONE) for key in (b"one", b"two", b"three")], 2, b"result")
    assert isinstance(last, Command)
    one = call(last)
    assert one.goes_on(Written(b"", 1))
    assert one.goes_on(Written(b"", 0))
    with pytest.raises(UnderReplicatedError) as caught:
        one.goes_on(Written(b"", 2))
    assert caught.value.replicas == 0
