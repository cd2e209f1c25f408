"""What concerns all sessions of a subject: its index, its limit, and joining it. No I/O here.

A script may use only the Redis keys that it was called with, and only the index knows a subject's
sessions. So these operations first list them, then name them to the script that does the work; that
one looks whether the list still holds.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from redis.exceptions import ClusterCrossSlotError

from . import answers, scripts
from .answers import SessionInfo
from .arguments import counted, subject_arg
from .command import GONE, Command, R, Trace, again, is_empty, nothing, told_again, waited_for
from .errors import (
    ArgumentError,
    ConfigurationError,
    IdTakenError,
    PayloadConflictError,
    SessionGateError,
    SessionNotFoundError,
)
from .keyspace import Keyspace, is_session_id, slot_of
from .tokens import SignKeyRing, is_spelt_as_token
from .values import Values

Overflow = Literal["evict", "reject"]

# Ids that are taken one after the other mean a broken random source, not bad luck (95 bits). With
# each reply that is lost one may be given up as well.
MAX_DRAWS = 8

# How often an operation looks again at sessions that others change at the same time. Each time
# somebody got ahead of it; so often is never met.
_MAX_LOOKS = 1000


class Opening(NamedTuple):
    """What a new session begins with, not sealed yet; or what one holds, as it is stored."""

    ttl: bytes
    idle_timeout: bytes
    fields: tuple[bytes, ...]
    started: bytes = b""

    def __repr__(self) -> str:
        # Fields are payloads: not for tracebacks that show local variables.
        return "<Opening>"

    def __sentry_repr__(self) -> str:
        return repr(self)


_PENDING = (b"pending", b"1")
_AS_IT_IS = Opening(b"", b"", ())  # of a session that is open


class Source(NamedTuple):
    """The session that a token opens, and the token."""

    session_id: str
    fingerprint: bytes
    generation: int


class _Joining(NamedTuple):
    """A session that joins a subject: a new one, or one that is open and goes on under a new id."""

    subject: bytes
    index_key: bytes
    opening: Opening
    source: Source | None
    generation: int
    limit: bytes
    replicas: int
    before: tuple[Trace, ...] = ()  # of what was written on other servers
    follow: "Callable[[_Drawn], Command[str]] | None" = None
    seal_for: str = ""  # the id that it is to have in the end, if another one
    redraw: "Callable[[int], Command[str]] | None" = None  # what to do if the id is taken
    moves_from: str = ""  # the id of the session that the payloads are stored in
    reread: "Callable[[], Command[str]] | None" = (
        None  # they stay there: what to do if they changed
    )


class _Payloads(NamedTuple):
    """What a script gets of payloads: how many to store, how many to replace, and all of them."""

    stored: bytes
    replaced: bytes
    words: tuple[bytes, ...]

    def __repr__(self) -> str:
        return "<_Payloads>"

    def __sentry_repr__(self) -> str:
        return repr(self)


class _Drawn(NamedTuple):
    """What a session is to be called, and how many more may be drawn if there is one already.

    `payloads` are what the script gets of them, for that id.
    """

    session_id: str
    token: str
    fingerprint: bytes
    left: int
    payloads: _Payloads

    def __repr__(self) -> str:
        # A traceback that shows local variables must not hand out the token.
        return f"<_Drawn {self.session_id}>"

    def __sentry_repr__(self) -> str:
        return repr(self)


class _Work(NamedTuple):
    """What a script is given to do its work on all sessions of a subject."""

    keys: tuple[bytes, ...]
    args: tuple[bytes, ...]


# What follows once such a script has returned the entries that it missed.
_GoOn = Callable[[bytes], R | Command[R]]


def subject_bytes(subject: str) -> bytes:
    """The bytes of a subject.

    Raises:
        ArgumentError: it is out of its limits, or a token.
    """
    raw = subject_arg(subject)
    if is_spelt_as_token(subject):  # not for Redis, and a slip: it has no sessions to end
        raise ArgumentError(
            "subject is a token: give the user's id, as in info(token).subject; to end the session "
            "of a token, use end(token)"
        )
    return raw


class Subjects:
    """Makes the commands that concern a subject's sessions.

    Args:
        ring: the sign keys of the gate.
        keyspace: what names its Redis keys.
        values: what seals payloads, which a session takes along to its new id.
        max_sessions: how many live sessions a subject may have; None for any number.
        on_overflow: whether the oldest session goes when there is one more, or that one is refused.
    """

    __slots__ = ("_evicts", "_keyspace", "_limit", "_ring", "_values")

    def __init__(
        self,
        ring: SignKeyRing,
        keyspace: Keyspace,
        values: Values[Any, Any],
        max_sessions: int | None,
        on_overflow: Overflow,
    ) -> None:
        if max_sessions is not None and (
            not isinstance(max_sessions, int) or isinstance(max_sessions, bool) or max_sessions < 1
        ):
            raise ConfigurationError("max_sessions is a whole number of at least 1, or None")
        if on_overflow not in ("evict", "reject"):
            raise ConfigurationError("on_overflow is 'evict' or 'reject'")
        if on_overflow == "reject" and max_sessions is None:
            raise ConfigurationError(
                "on_overflow needs max_sessions: how many sessions a subject may have"
            )
        self._ring = ring
        self._keyspace = keyspace
        self._values = values
        self._limit = b"%d" % (max_sessions or 0)
        self._evicts = b"1" if on_overflow == "evict" else b"0"

    def start(self, subject: str, opening: Opening, replicas: int) -> Command[str]:
        """Open a session of the subject."""
        raw = subject_bytes(subject)
        index_key = self.index_key(raw)
        return self._join(_Joining(raw, index_key, opening, None, 0, self._limit, replicas))

    def adopt(self, source: Source, subject: str, replicas: int) -> Command[str]:
        """Give the session to the subject, under a new id and with a new token."""
        raw = subject_bytes(subject)
        index_key, generation = self.index_key(raw), source.generation + 1
        joining = _Joining(raw, index_key, _AS_IT_IS, source, generation, self._limit, replicas)
        if self._values.seals:
            return self._sealed_anew(source, joining)
        return self._join(joining)

    def sessions(self, subject: str) -> Command[list[SessionInfo]]:
        """Tell of the live sessions, the oldest first."""
        raw = subject_bytes(subject)
        infos: dict[bytes, SessionInfo] = {}

        def tell(work: _Work, go_on: _GoOn[list[SessionInfo]]) -> Command[list[SessionInfo]]:
            def told(answer: bytes) -> list[SessionInfo] | Command[list[SessionInfo]]:
                moved, told_of = answers.session_infos(answer)
                infos.clear()
                infos.update(told_of)
                return go_on(moved)

            return Command(scripts.SESSIONS, work.keys, work.args, told, "", "", again)

        return self._for_each(raw, tell, lambda: [infos[entry] for entry in sorted(infos)])

    def end_all(self, subject: str, keep: str, replicas: int) -> Command[int]:
        """End all but the session whose id is to be kept; how many ended."""
        raw = subject_bytes(subject)
        counts: list[int] = []

        def end(work: _Work, go_on: _GoOn[int]) -> Command[int]:
            def ended(answer: bytes) -> int | Command[int]:
                count, _, moved = answer.partition(b":")
                counts.append(int(count))
                return go_on(moved)

            return Command(
                scripts.END_ALL,
                work.keys,
                (keep.encode(), *work.args),
                ended,
                "",
                replicas=replicas,
                waits=lambda answer: answer.endswith(b":"),  # none was moved
                unmarked=True,  # others may have ended them
            )

        # If there are none, a call may have ended them that too few replicas had heard of.
        return self._for_each(raw, end, lambda: sum(counts), replicas)

    def _for_each(
        self,
        subject: bytes,
        command: Callable[[_Work, _GoOn[R]], Command[R]],
        result: Callable[[], R],
        replicas: int = 0,
    ) -> Command[R]:
        """List the sessions, then send the command for all of them.

        If renewals moved some from under it, it is sent again with these as well.
        """
        index = self.index_key(subject)
        subs = self._subs(subject)

        def work(listed: bytes, entries: list[bytes], looks: int) -> Command[R]:
            def go_on(moved: bytes) -> R | Command[R]:
                if not moved:
                    return result()
                if not looks:
                    raise _restless()
                return work(listed, entries + answers.entries(moved), looks - 1)

            args = (listed, b"%d" % len(subs), *subs, *entries)
            return command(_Work(self._keys(index, entries), args), go_on)

        def begin(answer: bytes) -> R | Command[R]:
            now = answer[: answers.STARTED_DIGITS]
            entries = answers.entries(answer[answers.STARTED_DIGITS :])
            if not entries:
                return result()
            # A session may have been started by the clock of another server, which is ahead.
            listed = max(now, *(entry[: answers.STARTED_DIGITS] for entry in entries))
            return work(listed, entries, _MAX_LOOKS)

        return Command(
            scripts.INDEX,
            (index,),
            (),
            begin,
            "",
            repeat=again,
            replicas=replicas,
            waits=lambda answer: len(answer) == answers.STARTED_DIGITS,  # there are none
            unmarked=True,
        )

    def end_one(self, subject: str, session_id: str, replicas: int) -> Command[None]:
        """End the session of that id, if it is the subject's."""
        raw = subject_bytes(subject)
        if not isinstance(session_id, str):
            raise ArgumentError(f"session_id is a str, not {type(session_id).__name__}")
        if not is_session_id(session_id):
            # It may be a token: not for an error to tell.
            raise ArgumentError(
                "session_id is the 16 characters of `info.id` or `verify(token)`; to end the "
                "session of a token, use end(token)"
            )
        index = self.index_key(raw)
        # What could not be the subject's is not asked for: on a cluster it may be elsewhere.
        key = self._session_key(session_id)
        if slot_of(key) != slot_of(index):
            raise SessionNotFoundError(session_id, of_subject=True)
        args = (session_id.encode(), b"0", *self._subs(raw))
        return Command(
            scripts.END_ONE,
            (key, index),
            args,
            nothing,
            session_id,
            repeat=told_again(1),
            replicas=replicas,
        )

    def index_key(self, subject: bytes) -> bytes:
        """The Redis key of a subject's index."""
        return self._keyspace.index_key(subject)

    def _session_key(self, session_id: str) -> bytes:
        return self._keyspace.session_key(session_id)

    def _keys(self, index: bytes, entries: Iterable[bytes]) -> tuple[bytes, ...]:
        return (index, *self._session_keys(entries))

    def _session_keys(self, entries: Iterable[bytes]) -> tuple[bytes, ...]:
        return tuple([self._session_key(answers.entry_id(entry)) for entry in entries])

    def _subs(self, subject: bytes) -> tuple[bytes, ...]:
        """What a session of the subject holds, by the sign key that signed its token."""
        return tuple([realm + subject for realm in self._ring.realms])

    def _join(self, joining: _Joining, draws: int = MAX_DRAWS) -> Command[str]:
        return self._join_as(self._drawn(self._new_id(joining), joining, draws), joining)

    def _new_id(self, joining: _Joining) -> str:
        return self._keyspace.new_id_in(slot_of(joining.index_key))

    def _drawn(self, session_id: str, joining: _Joining, draws: int) -> _Drawn:
        token, fingerprint = self._ring.sign(session_id, joining.generation)
        held, to = joining.opening.fields, self._session_key(joining.seal_for or session_id)
        if joining.moves_from:
            fields = self._values.moved(
                self._session_key(joining.moves_from), to, held, strict=True
            )
        else:
            fields = self._values.sealed(to, held)
        if joining.reread:
            payloads = _replacing(held, fields)
        else:
            payloads = _Payloads(counted(fields), b"", fields)
        return _Drawn(session_id, token, fingerprint, draws - 1, payloads)

    def _join_as(
        self,
        drawn: _Drawn,
        joining: _Joining,
        *,
        entries: Sequence[bytes] = (),
        looks: int = _MAX_LOOKS,
    ) -> Command[str]:
        source, opening, follow = joining.source, joining.opening, joining.follow
        keys: tuple[bytes, ...] = (
            self._session_key(drawn.session_id),
            joining.index_key,
            self._keyspace.tries_key(drawn.session_id),
        )
        if source:
            keys = (*keys, self._session_key(source.session_id))
        subs = self._subs(joining.subject)
        args = (
            drawn.fingerprint,
            opening.ttl,
            b"0",
            opening.idle_timeout,
            drawn.session_id.encode(),
            opening.started,
            b"%d" % joining.generation,
            source.fingerprint if source else b"",
            source.session_id.encode() if source else b"",
            joining.limit,
            self._evicts,
            b"%d" % len(subs),
            b"%d" % len(entries),
            drawn.payloads.stored,
            drawn.payloads.replaced,
            *subs,
            *entries,
            *drawn.payloads.words,
        )

        def joined(answer: bytes) -> str | Command[str]:
            if is_empty(answer):
                if follow:
                    return follow(drawn)
                return waited_for(joining.before, joining.replicas, drawn.token)
            if not looks:
                raise _restless()
            return self._join_as(
                drawn,
                joining,
                entries=answers.entries(answer),
                looks=looks - 1,
            )

        def recover(_: Command[str], error: Exception) -> Command[str] | None:
            if isinstance(error, IdTakenError) and drawn.left:
                redraw = joining.redraw or partial(self._join, joining)
                return redraw(drawn.left)
            if joining.reread and isinstance(error, PayloadConflictError):
                return joining.reread()
            if source and isinstance(error, ClusterCrossSlotError):
                return self._copied(source, joining._replace(reread=None))
            return None

        session_id = source.session_id if source else drawn.session_id
        keys += self._session_keys(entries)
        return Command(
            scripts.ENROLL,
            keys,
            args,
            joined,
            session_id,
            repeat=told_again(2),
            recover=recover,
            replicas=0 if follow else joining.replicas,
            waits=is_empty,
        )

    # What is sealed for one id opens under no other: the payloads are read, and go back sealed for
    # the new one, unless they changed in between.

    def _sealed_anew(
        self, source: Source, joining: _Joining, looks: int = _MAX_LOOKS
    ) -> Command[str]:
        def reread() -> Command[str]:
            if not looks:
                raise _restless("the session's payloads")
            return self._sealed_anew(source, joining, looks - 1)

        def read(answer: bytes) -> Command[str]:
            opening = _AS_IT_IS._replace(fields=_opening(answer).fields)
            return self._join(
                joining._replace(opening=opening, moves_from=source.session_id, reread=reread)
            )

        return self._export(source, b"", read)

    # Between two slots of a cluster: copy the session, take away the old one, and make up for what
    # changed meanwhile. Whoever takes it has it; who comes too late ends the copy. Where another
    # session has to go for it, the copy is pending until it was taken, and then adopted: before
    # that it is not told of, counts for no limit, and nothing is evicted for it, nor is it. Its
    # payloads are sealed for the id that it gets then.

    def _copied(self, source: Source, joining: _Joining) -> Command[str]:
        evicts = self._evicts == b"1" and joining.limit != b"0"
        final, pending = (self._new_id(joining), _PENDING) if evicts else ("", ())
        old = Trace(self._session_key(source.session_id), GONE)

        def taken(drawn: _Drawn, held: tuple[bytes, ...]) -> str | Command[str]:
            if not evicts:
                new = Trace(self._session_key(drawn.session_id), drawn.fingerprint)
                return waited_for((new, old), joining.replicas, drawn.token)
            copied = Source(drawn.session_id, drawn.fingerprint, joining.generation)

            def adopt(session_id: str, draws: int) -> Command[str]:
                return self._join_as(self._drawn(session_id, adopting, draws), adopting)

            def redraw(draws: int) -> Command[str]:
                another = self._new_id(joining)
                return self._import(drawn, source, another, held, adopt(another, draws))

            adopting = joining._replace(
                opening=_AS_IT_IS, source=copied, before=(old,), redraw=redraw
            )
            return adopt(final, MAX_DRAWS)

        def read(answer: bytes) -> Command[str]:
            opening = _opening(answer)

            def follow(drawn: _Drawn) -> Command[str]:
                seal_for = final or drawn.session_id
                return self._take(source, opening.fields, drawn, seal_for, taken)

            copying = joining._replace(
                opening=opening._replace(fields=(*opening.fields, *pending)),
                source=None,
                moves_from=source.session_id,
                limit=b"0" if evicts else joining.limit,
                follow=follow,
                seal_for=final,
            )
            return self._join(copying)

        return self._export(source, b"", read)

    def _take(
        self,
        source: Source,
        copied: tuple[bytes, ...],
        drawn: _Drawn,
        seal_for: str,
        taken: Callable[[_Drawn, tuple[bytes, ...]], str | Command[str]],
    ) -> Command[str]:
        keys = (self._session_key(drawn.session_id),)

        def gone(_: bytes) -> str:
            raise SessionNotFoundError(source.session_id)

        def read(answer: bytes) -> str | Command[str]:
            held = _opening(answer).fields
            then = taken(drawn, held)
            return (
                then if _same(held, copied) else self._import(drawn, source, seal_for, held, then)
            )

        def recover(_: Command[str], error: Exception) -> Command[str] | None:
            if isinstance(error, SessionNotFoundError):
                args = (drawn.fingerprint, b"0")
                return Command(scripts.END, keys, args, gone, source.session_id)
            return None

        return self._export(source, drawn.fingerprint, read)._replace(recover=recover)

    def _import(
        self,
        drawn: _Drawn,
        source: Source,
        seal_for: str,
        held: tuple[bytes, ...],
        then: str | Command[str],
    ) -> Command[str]:
        """Make the copy's payloads what the source held in the end."""
        keys = (self._session_key(drawn.session_id),)
        old, new = self._session_key(source.session_id), self._session_key(seal_for)
        fields = self._values.moved(old, new, held, strict=False)
        args = (drawn.fingerprint, counted(fields), *fields)
        return Command(scripts.IMPORT, keys, args, lambda _: then, source.session_id)

    def _export(
        self, source: Source, taker: bytes, read: Callable[[bytes], str | Command[str]]
    ) -> Command[str]:
        keys = (self._session_key(source.session_id),)
        args = (source.fingerprint, taker)
        return Command(scripts.EXPORT, keys, args, read, source.session_id, repeat=again)


def _opening(answer: bytes) -> Opening:
    started, ttl, idle_timeout, *fields = answers.items(answer)
    return Opening(ttl, idle_timeout, tuple(fields), started)


def _replacing(held: tuple[bytes, ...], fields: tuple[bytes, ...]) -> _Payloads:
    """Of each payload its field, what stands there and what is to stand there."""
    triples = zip(held[::2], held[1::2], fields[1::2], strict=True)
    words = tuple([word for triple in triples for word in triple])
    return _Payloads(b"0", b"%d" % (len(held) // 2), words)


def _same(fields: tuple[bytes, ...], others: tuple[bytes, ...]) -> bool:
    """Whether the two are the same fields with the same data, in any order."""
    pairs = dict(zip(fields[::2], fields[1::2], strict=True))
    return pairs == dict(zip(others[::2], others[1::2], strict=True))


def _restless(what: str = "the subject's sessions") -> SessionGateError:
    return SessionGateError(
        f"{what} changed {_MAX_LOOKS} times while they were looked at: try again"
    )
