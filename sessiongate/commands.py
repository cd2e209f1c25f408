"""Every operation as a value: its script, keys, arguments, how to read the reply. No I/O here.

Both gates run these and decide nothing themselves: what is checked, what an error means and what is
sent again after one is all told here.
"""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Generic, NamedTuple, TypeVar

from redis import exceptions as redis_errors

from . import scripts
from .arguments import Data, data_arg, field_arg, payloads_arg, ttl_arg
from .errors import IdTakenError, PayloadNotFoundError, SessionNotFoundError
from .keyspace import Keyspace
from .scripts import Script
from .tokens import SignKeyRing

R = TypeVar("R")

# The errors that the scripts raise themselves.
CODES = frozenset({"IDTAKEN", "NOSESSION", "NOPAYLOAD"})

# Ids that are taken one after the other mean a broken random source, not bad luck (95 bits).
_MAX_DRAWS = 4


class Refusal(NamedTuple):
    """A script's own no: one of `CODES`."""

    code: str


# What came of a command: what its script returned, its refusal, or an error to raise.
Answer = bytes | Refusal | Exception


class Command(NamedTuple, Generic[R]):
    """One call of one script. Made here, sent by a gate."""

    script: Script
    keys: tuple[bytes, ...]
    args: tuple[bytes, ...]
    decode: Callable[[bytes], R]
    session_id: str
    payload: str = ""
    recover: "Callable[[Command[R], Exception], Command[R] | None] | None" = None
    by_source: bool = False

    def __repr__(self) -> str:
        # Arguments are fingerprints and payloads: not for logs.
        return f"<Command {self.script.name}>"

    def result(self, answer: Answer) -> R:
        """What the caller gets: the decoded answer, or the error that stands for it, raised."""
        if isinstance(answer, bytes):
            return self.decode(answer)
        if not isinstance(answer, Refusal):
            try:
                raise answer
            finally:
                del answer  # the error refers to this frame: the two would keep each other
        if answer.code == "NOSESSION":
            raise SessionNotFoundError(self.session_id)
        if answer.code == "NOPAYLOAD":
            raise PayloadNotFoundError(self.payload)
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


def _lost(error: Exception) -> bool:
    """Whether it is unknown if the command ran. Subclasses name a refusal: then it is known."""
    return type(error) in (redis_errors.ConnectionError, redis_errors.TimeoutError)


def _once_more(command: Command[R], error: Exception) -> Command[R] | None:
    """For what only reads: a second try harms nobody."""
    return command._replace(recover=None) if _lost(error) else None


def _nothing(_: bytes) -> None:
    return None


def _data(answer: bytes) -> bytes:
    return answer


# Asked behind an error without an echo, to tell whether that was the answer to the request before.
# Sent by source: it must not meet a NOSCRIPT itself.
PROBE: Command[None] = Command(scripts.ECHO, (), (), _nothing, "", by_source=True)


class Commands:
    """Makes the command of each operation; whatever can be refused locally is refused here."""

    __slots__ = ("_keyspace", "_ring")

    def __init__(self, ring: SignKeyRing, keyspace: Keyspace) -> None:
        self._ring = ring
        self._keyspace = keyspace

    def verify(self, token: str | bytes) -> str:
        return self._ring.verify(token)[0]

    def start(self, ttl: int | timedelta, payloads: Mapping[str, Data] | None) -> Command[str]:
        return self._start(ttl_arg(ttl), payloads_arg(payloads), _MAX_DRAWS)

    def _start(self, ttl: bytes, fields: tuple[bytes, ...], draws: int) -> Command[str]:
        session_id = self._keyspace.new_id()
        token, fingerprint = self._ring.sign(session_id)

        def recover(command: Command[str], error: Exception) -> Command[str] | None:
            if isinstance(error, IdTakenError) and draws > 1:
                return self._start(ttl, fields, draws - 1)
            if _lost(error) and command.args[2] == b"0":
                return command._replace(args=(fingerprint, ttl, b"1", *fields))
            return None

        return Command(
            scripts.START,
            (self._keyspace.session_key(session_id),),
            (fingerprint, ttl, b"0", *fields),
            lambda _: token,
            session_id,
            recover=recover,
        )

    def expire(self, token: str | bytes, ttl: int | timedelta) -> Command[None]:
        session_id, fingerprint, keys = self._session(token)
        return Command(scripts.EXPIRE, keys, (fingerprint, ttl_arg(ttl)), _nothing, session_id)

    def pset(self, token: str | bytes, name: str, data: Data) -> Command[None]:
        session_id, fingerprint, keys = self._session(token)
        args = (fingerprint, field_arg(name), data_arg(data, name))
        return Command(scripts.PSET, keys, args, _nothing, session_id, name)

    def pget(self, token: str | bytes, name: str) -> Command[bytes]:
        session_id, fingerprint, keys = self._session(token)
        args = (fingerprint, field_arg(name))
        return Command(scripts.PGET, keys, args, _data, session_id, name, _once_more)

    def pdel(self, token: str | bytes, name: str) -> Command[None]:
        session_id, fingerprint, keys = self._session(token)
        args = (fingerprint, field_arg(name))
        return Command(scripts.PDEL, keys, args, _nothing, session_id, name)

    def end(self, token: str | bytes) -> Command[None]:
        session_id, fingerprint, keys = self._session(token)
        return Command(scripts.END, keys, (fingerprint,), _nothing, session_id)

    def _session(self, token: str | bytes) -> tuple[str, bytes, tuple[bytes]]:
        session_id, fingerprint = self._ring.verify(token)
        return session_id, fingerprint, (self._keyspace.session_key(session_id),)
