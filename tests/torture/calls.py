"""What the model of a session is asked, asked of a gate, and what a gate answers to it."""

from typing import NamedTuple

from redis import exceptions as redis_errors

from sessiongate import (
    PayloadConflictError,
    PayloadNotFoundError,
    PayloadOverflowError,
    PayloadTypeError,
    SessionNotFoundError,
)
from tests.linearizability import UNKNOWN, Answer, No, Operation, Unknown, held

GRACE = 3_600  # longer than any campaign

LOST = (redis_errors.ConnectionError, redis_errors.TimeoutError)

_REFUSALS: tuple[tuple[type[Exception], No], ...] = (
    (SessionNotFoundError, No.SESSION),
    (PayloadNotFoundError, No.PAYLOAD),
    (PayloadConflictError, No.CONFLICT),
    (PayloadOverflowError, No.OVERFLOW),
    (PayloadTypeError, No.COUNTER),
)


class Request(NamedTuple):
    """A method of a gate, and what to call it with."""

    method: str
    args: tuple[object, ...]
    options: dict[str, object]


def request(operation: Operation, token: str) -> Request:
    """An operation as a call, with the token of its generation."""
    kind, name, data, expected, by, grace, many, _ = operation
    args: dict[str, tuple[object, ...]] = {
        "pset": (name, data),
        "pset_new": (name, data),
        "pset_many": (dict(many),),
        "pget_many": ([name for name, _ in many],),
        "pget": (name,),
        "pdel": (name,),
        "ppop": (name,),
        "pincr": (name, by),
    }
    options: dict[str, object] = {}
    if kind == "pset_new":
        options["if_absent"] = True
    if expected is not None:
        options["if_match"] = expected
    if kind == "renew":
        options["grace"] = GRACE if grace else 0
    return Request(kind.removesuffix("_new"), (token, *args.get(kind, ())), options)


def answer(result: object) -> Answer | Unknown:
    """What a call returned or raised, as the model says it.

    Raises:
        Exception: the call's own, if it is none that the model knows.
    """
    if isinstance(result, LOST):
        return UNKNOWN
    if isinstance(result, Exception):
        for kind, refusal in _REFUSALS:
            if isinstance(result, kind):
                return refusal
        raise result
    if isinstance(result, dict):
        return held(result)
    if isinstance(result, str):
        return generation(result)
    assert result is None or isinstance(result, bytes | int), result
    return result


def generation(token: str) -> int:
    """How often a session's token was renewed before."""
    return int(token.split(".")[2]) if token.startswith("v2.") else 0
