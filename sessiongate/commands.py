"""Every operation as a value: its script, keys, arguments, how to read the reply. No I/O here.

Both gates run these and decide nothing themselves: what is checked, what an error means, what is
sent again after one and what is sent next is all told here.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Generic, NamedTuple

from redis.exceptions import TryAgainError

from . import answers, scripts
from .answers import SessionInfo
from .arguments import (
    ALWAYS,
    NoCondition,
    by_arg,
    counted,
    field_arg,
    grace_arg,
    idle_timeout_arg,
    min_replicas_arg,
    names_arg,
    ttl_arg,
)
from .codecs import In, Out
from .command import Command, again, is_empty, nothing, told_again
from .errors import ArgumentError, IdTakenError, PayloadConflictError
from .keyspace import Keyspace
from .subjects import MAX_DRAWS, Opening, Overflow, Source, Subjects
from .tokens import FINGERPRINT_BYTES, SignKeyRing
from .values import Values

NONCE_BYTES = 8

# How often `if_match` looks again at a payload that others store anew at the same time.
_MAX_LOOKS = 1000

# What codecs return without `as_`: a value of another type was read as that.
_PLAIN = frozenset({bool, bytes, dict, float, int, list, str, type(None)})


# Of a genuine token: its session's id, its fingerprint and the Redis key of the session's hash.
Verified = tuple[str, bytes, tuple[bytes]]


class Opened(NamedTuple):
    """A session that was read: the Redis key of its hash, and what is stored, by payload names."""

    key: bytes
    expires_at: datetime
    subject: str | None
    stored: dict[bytes, bytes]

    def __repr__(self) -> str:
        # What is stored is for no traceback that shows local variables.
        return "<Opened>"

    def __sentry_repr__(self) -> str:
        return repr(self)


class Commands(Generic[In, Out]):
    """Makes the command of each operation; whatever can be refused locally is refused here."""

    __slots__ = ("_keyspace", "_replicas", "_ring", "_subjects", "values")

    def __init__(  # noqa: PLR0913  # what a gate is made of
        self,
        ring: SignKeyRing,
        keyspace: Keyspace,
        values: Values[In, Out],
        *,
        max_sessions: int | None = None,
        on_overflow: Overflow = "evict",
        min_replicas: int = 0,
    ) -> None:
        self._ring = ring
        self._keyspace = keyspace
        self._replicas = min_replicas
        self.values = values
        self._subjects = Subjects(ring, keyspace, values, max_sessions, on_overflow)

    def verify(self, token: str | bytes) -> str:
        return self._ring.verify(token)[0]

    def start(
        self,
        ttl: int | timedelta,
        payloads: Mapping[str, In] | None = None,
        subject: str | None = None,
        idle_timeout: int | timedelta | None = None,
        min_replicas: int | None = None,
    ) -> Command[str]:
        opening = self.opening(ttl, idle_timeout, payloads)
        return self.begin(opening, subject, min_replicas)

    def opening(
        self,
        ttl: int | timedelta,
        idle_timeout: int | timedelta | None,
        payloads: Mapping[str, In] | None = None,
    ) -> Opening:
        fields = self.values.fields({} if payloads is None else payloads)
        return Opening(ttl_arg(ttl), idle_timeout_arg(idle_timeout), fields)

    def begin(
        self, opening: Opening, subject: str | None, min_replicas: int | None = None
    ) -> Command[str]:
        replicas = min_replicas_arg(min_replicas, self._replicas)
        if subject is not None:
            return self._subjects.start(subject, opening, replicas)
        return self._start(opening, replicas, MAX_DRAWS)

    def _start(self, opening: Opening, replicas: int, draws: int) -> Command[str]:
        session_id = self._keyspace.new_id()
        token, fingerprint = self._ring.sign(session_id)
        ttl, idle_timeout, payloads, _ = opening
        session_key = self._keyspace.session_key(session_id)
        fields = self.values.sealed(session_key, payloads)

        def recover(command: Command[str], error: Exception) -> Command[str] | None:
            # A slot that moves takes no new session, since that has two Redis keys.
            elsewhere = command.anywhere and isinstance(error, TryAgainError)
            if (elsewhere or isinstance(error, IdTakenError)) and draws > 1:
                return self._start(opening, replicas, draws - 1)
            return None

        return Command(
            scripts.START,
            (session_key, self._keyspace.tries_key(session_id)),
            (fingerprint, ttl, b"0", idle_timeout, counted(fields), *fields),
            lambda _: token,
            session_id,
            repeat=told_again(2),
            recover=recover,
            replicas=replicas,
            anywhere=True,
        )

    def touch(self, token: str | bytes) -> Command[None]:
        session_id, fingerprint, keys = self.session(token)
        return Command(scripts.TOUCH, keys, (fingerprint,), nothing, session_id, "", again)

    def info(self, token: str | bytes) -> Command[SessionInfo]:
        session_id, fingerprint, keys = self.session(token)

        def told(answer: bytes) -> SessionInfo:
            return answers.session_info(session_id, answer)

        return Command(scripts.INFO, keys, (fingerprint,), told, session_id, "", again)

    def expire(
        self, token: str | bytes, ttl: int | timedelta, min_replicas: int | None = None
    ) -> Command[None]:
        session_id, fingerprint, keys = self.session(token)
        args = (fingerprint, ttl_arg(ttl))
        replicas = min_replicas_arg(min_replicas, self._replicas)

        def expired(subject: bytes) -> Command[None] | None:
            if is_empty(subject):
                return None
            # A token does not tell whose it is, and the index has to know when its sessions end.
            both = (*keys, self._subjects.index_key(subject))
            return Command(
                scripts.EXPIRE,
                both,
                (*args, session_id.encode()),
                nothing,
                session_id,
                replicas=replicas,
            )

        return Command(
            scripts.EXPIRE, keys, args, expired, session_id, replicas=replicas, waits=is_empty
        )

    def renew(
        self,
        token: str | bytes,
        grace: int | timedelta | None,
        subject: str | None,
        min_replicas: int | None = None,
    ) -> Command[str]:
        session_id, fingerprint, generation = self._ring.verify(token)
        old_lasts = grace_arg(grace, subject)
        replicas = min_replicas_arg(min_replicas, self._replicas)
        if subject is not None:
            source = Source(session_id, fingerprint, generation)
            return self._subjects.adopt(source, subject, replicas)
        successor = self._ring.sign(session_id, generation + 1)[1]
        realm = self._ring.realms[0]
        # What others ask for is the same token: only the nonce tells a repetition from that.
        nonce = os.urandom(NONCE_BYTES)
        args = (fingerprint, successor, b"%d" % (generation + 1), old_lasts, realm, nonce)

        def renewed(answer: bytes) -> str:
            its_fingerprint, digits = answer[:FINGERPRINT_BYTES], answer[FINGERPRINT_BYTES:]
            return self._ring.token_of(its_fingerprint, session_id, int(digits))

        keys = (self._keyspace.session_key(session_id),)
        return Command(
            scripts.RENEW,
            keys,
            args,
            renewed,
            session_id,
            repeat=again,
            replicas=replicas,
            unmarked=True,  # of renewals at the same time one writes, all others read
        )

    def end(self, token: str | bytes, min_replicas: int | None = None) -> Command[None]:
        session_id, fingerprint, keys = self.session(token)
        replicas = min_replicas_arg(min_replicas, self._replicas)
        args = (fingerprint, b"0")
        return Command(
            scripts.END, keys, args, nothing, session_id, repeat=told_again(1), replicas=replicas
        )

    def sessions(self, subject: str) -> Command[list[SessionInfo]]:
        return self._subjects.sessions(subject)

    def end_all(
        self, subject: str, keep: str | bytes | None, min_replicas: int | None = None
    ) -> Command[int]:
        kept = "" if keep is None else self.verify(keep)
        replicas = min_replicas_arg(min_replicas, self._replicas)
        return self._subjects.end_all(subject, kept, replicas)

    def end_one(
        self, subject: str, session_id: str, min_replicas: int | None = None
    ) -> Command[None]:
        replicas = min_replicas_arg(min_replicas, self._replicas)
        return self._subjects.end_one(subject, session_id, replicas)

    def pset(  # noqa: PLR0913  # options are keyword-only
        self,
        token: str | bytes,
        name: str,
        value: In,
        *,
        if_absent: bool = False,
        if_match: In | NoCondition = ALWAYS,
        as_: object = None,
        ttl: int | timedelta | None = None,
    ) -> Command[None]:
        session = session_id, fingerprint, keys = self.session(token)
        values, field = self.values, field_arg(name)
        stored = values.stored(keys[0], field, values.encoded(value, name))
        args = (fingerprint, field, stored)
        if if_absent is False and if_match is ALWAYS and ttl is None and as_ is None:
            return Command(
                scripts.PSET, keys, args, nothing, session_id, name, replicas=self._replicas
            )
        if not isinstance(if_absent, bool):
            raise ArgumentError(f"if_absent is a bool, not {type(if_absent).__name__}")
        if if_absent and if_match is not ALWAYS:
            raise ArgumentError("if_absent and if_match exclude each other: give one of them")
        if as_ is not None:
            if if_match is ALWAYS:
                raise ArgumentError("as_ is the type that if_match was read as: give if_match too")
            values.decoder(as_)  # which refuses what is no type
        end = b"" if ttl is None else ttl_arg(ttl)

        def store(condition: bytes, expected: bytes = b"") -> Command[None]:
            options = (*args, condition, expected, end)
            return Command(
                scripts.PSET_IF, keys, options, nothing, session_id, name, replicas=self._replicas
            )

        if isinstance(if_match, NoCondition):
            return store(b"absent" if if_absent else b"")
        data = values.encoded(if_match, name)
        read_as = type(if_match) if as_ is None and type(if_match) not in _PLAIN else as_

        def is_same(held: bytes) -> bool:
            return values.are_same(values.opened(keys[0], field, held), data, name, read_as)

        return self._if_match(session, name, data, is_same, partial(store, b"match"))

    def _if_match(
        self,
        session: Verified,
        name: str,
        data: bytes,
        is_same: Callable[[bytes], bool],
        store: Callable[[bytes], Command[None]],
    ) -> Command[None]:
        """Store if what is stored is of that data: what Redis compares are its bytes."""
        session_id, fingerprint, keys = session
        args = (fingerprint, field_arg(name))

        def look(looks: int) -> Command[None]:
            def looked(answer: bytes) -> Command[None]:
                held = dict(answers.payloads(answer)).get(name.encode())
                if held is None or not is_same(held):
                    raise PayloadConflictError(name)
                return store(held)._replace(recover=recover)

            def recover(_: Command[None], error: Exception) -> Command[None] | None:
                # It was stored anew in between: sealed again, it may be the same all the same.
                return (
                    look(looks - 1) if looks and isinstance(error, PayloadConflictError) else None
                )

            return Command(scripts.PGET_MANY, keys, args, looked, session_id, "", again)

        def recover(_: Command[None], error: Exception) -> Command[None] | None:
            # Others may have encoded the same to other bytes, as JSON with blanks in it.
            return look(_MAX_LOOKS) if isinstance(error, PayloadConflictError) else None

        if self.values.seals:
            return look(_MAX_LOOKS)  # what is sealed anew never has the same bytes
        command = store(data)
        return command if self.values.is_bytes else command._replace(recover=recover)

    def pset_many(
        self, token: str | bytes, payloads: Mapping[str, In], delete: Iterable[str] = ()
    ) -> Command[None]:
        return self.change(
            self.session(token), self.values.fields(payloads), names_arg(delete, "delete")
        )

    def change(
        self, session: Verified, fields: tuple[bytes, ...], deleted: tuple[bytes, ...]
    ) -> Command[None]:
        session_id, fingerprint, keys = session
        if not set(deleted).isdisjoint(fields[::2]):
            raise ArgumentError("a payload is stored or deleted, not both")
        stored = self.values.sealed(keys[0], fields)
        args = (fingerprint, counted(fields), b"%d" % len(deleted), *stored, *deleted)
        return Command(scripts.PSET_MANY, keys, args, nothing, session_id, replicas=self._replicas)

    def pget(self, token: str | bytes, name: str, as_: Any = None) -> Command[Any]:
        session_id, fingerprint, keys = self.session(token)
        field = field_arg(name)
        read = self.values.reader(keys[0], field, name, as_)
        return Command(scripts.PGET, keys, (fingerprint, field), read, session_id, name, again)

    def pget_many(self, token: str | bytes, names: Iterable[str]) -> Command[dict[str, Out]]:
        session_id, fingerprint, keys = self.session(token)
        args = (fingerprint, *names_arg(names))
        read = self.values.mapping(keys[0])
        return Command(scripts.PGET_MANY, keys, args, read, session_id, "", again)

    def pall(self, token: str | bytes) -> Command[dict[str, Out]]:
        session_id, fingerprint, keys = self.session(token)
        read = self.values.mapping(keys[0])
        return Command(scripts.PALL, keys, (fingerprint,), read, session_id, "", again)

    def pdel(self, token: str | bytes, name: str) -> Command[None]:
        session_id, fingerprint, keys = self.session(token)
        # A later payload of that name is not this call's to delete: the nonce tells a repetition.
        args = (fingerprint, field_arg(name), os.urandom(NONCE_BYTES - 1))
        return Command(
            scripts.PDEL,
            keys,
            args,
            nothing,
            session_id,
            name,
            repeat=again,
            replicas=self._replicas,
        )

    def ppop(self, token: str | bytes, name: str, as_: Any = None) -> Command[Any]:
        session_id, fingerprint, keys = self.session(token)
        field = field_arg(name)
        read = self.values.reader(keys[0], field, name, as_)
        args = (fingerprint, field)
        return Command(scripts.PPOP, keys, args, read, session_id, name, replicas=self._replicas)

    def pincr(self, token: str | bytes, name: str, by: int) -> Command[int]:
        if self.values.seals:
            raise ArgumentError(
                "a gate that seals has no pincr, since Redis cannot count what it cannot read: "
                "use pget and pset(..., if_match=...), or a gate without sealing_key for counters"
            )
        session_id, fingerprint, keys = self.session(token)
        args = (fingerprint, field_arg(name), by_arg(by))
        return Command(scripts.PINCR, keys, args, int, session_id, name, replicas=self._replicas)

    def open(self, session: Verified, fields: tuple[bytes, ...] | None) -> Command[Opened]:
        """Tell of the session and read what is stored in these fields, or in all."""
        session_id, fingerprint, keys = session
        asked = (b"",) if fields is None else (b"%d" % len(fields), *fields)

        def told(answer: bytes) -> Opened:
            return Opened(keys[0], *answers.opened(answer))

        return Command(scripts.OPEN, keys, (fingerprint, *asked), told, session_id, "", again)

    def session(self, token: str | bytes) -> Verified:
        session_id, fingerprint, _ = self._ring.verify(token)
        return session_id, fingerprint, (self._keyspace.session_key(session_id),)
