"""A session as a mapping of its payloads, for the time of a request: what `gate.open` returns.

What was read, what is to be written, and the command for each; the gate runs it.
"""

import asyncio
import warnings
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping
from datetime import datetime, timedelta
from functools import partial
from types import TracebackType
from typing import Any, Generic, NamedTuple, NoReturn, Protocol, Self, TypeVar, cast, overload

from . import answers
from .arguments import field_arg, grace_arg, names_arg
from .codecs import In, Out, T
from .command import Command
from .commands import Commands, Opened, Verified
from .errors import (
    HandleError,
    PayloadDecodeError,
    PayloadNotFoundError,
    SessionNotFoundError,
    UnderReplicatedError,
)
from .subjects import Opening, subject_bytes
from .values import decoded

R = TypeVar("R")
D = TypeVar("D")

DEFAULT_TTL = timedelta(days=1)

# Nothing can be changed in these, so that they need not be looked at again.
_IMMUTABLE = frozenset({bool, bytes, float, int, str, type(None)})


class Run(Protocol):
    """Runs a command to its result, as `SessionGate` does."""

    def __call__(self, command: Command[R], /) -> R:
        """The result of the command."""


class AsyncRun(Protocol):
    """The same, awaited."""

    def __call__(self, command: Command[R], /) -> Awaitable[R]:
        """The result of the command."""


class _Unknown:
    """Stands for a value that was not decoded yet."""


_UNKNOWN: Any = _Unknown()


class _Payload:
    """What is known of one payload.

    Attributes:
        field: its field in the session's hash.
        stored: what Redis has of it, until it was opened; None if it was assigned.
        data: what the value was decoded from; None if the value was assigned.
        is_pending: whether data is still to be stored: a value that was assigned or changed was
            asked for as another type since.
        before: what a value that was read as a type was then, encoded; None if it cannot be.
        value: what the application has in its hands.
        as_: the type that it was asked for.
    """

    __slots__ = ("as_", "before", "data", "field", "is_pending", "stored", "value")

    def __init__(self, field: bytes, stored: bytes | None = None, value: Any = _UNKNOWN) -> None:
        self.field = field
        self.stored = stored
        self.data: bytes | None = None
        self.is_pending = False
        self.before: bytes | None = None
        self.value = value
        self.as_: Any = None


def _is_assigned(payload: _Payload) -> bool:
    return payload.is_pending or (payload.value is not _UNKNOWN and payload.data is None)


class _Change(NamedTuple):
    """A payload that a write stores: the data, and what its value was decoded from by then."""

    payload: _Payload
    data: bytes
    base: bytes | None

    def __repr__(self) -> str:
        return "<_Change>"

    def __sentry_repr__(self) -> str:
        return repr(self)


class _Changes(NamedTuple):
    """What a write stores, by name; and what it deletes: by name its field."""

    stored: dict[str, _Change]
    deleted: dict[str, bytes]

    def __repr__(self) -> str:
        return "<_Changes>"

    def __sentry_repr__(self) -> str:
        return repr(self)


_NO_CHANGES = _Changes({}, {})


class _Handle(MutableMapping[str, Out], Generic[In, Out]):
    """What both kinds of handle are, but for running commands."""

    # An attribute that somebody sets by mistake would be stored nowhere.
    __slots__ = (
        "_commands",
        "_deleted",
        "_expires_at",
        "_fields",
        "_is_entered",
        "_is_minded",
        "_is_over",
        "_opening",
        "_payloads",
        "_run",
        "_session",
        "_session_key",
        "_subject",
        "_there",
        "_token",
    )

    def __init__(  # noqa: PLR0913  # a gate alone makes it
        self,
        commands: Commands[In, Out],
        run: Any,
        token: str | bytes | None,
        *,
        names: Iterable[str] | None,
        opening: Opening,
        subject: str | None,
    ) -> None:
        # First what a repr and `__del__` need, whatever happens.
        self._session: Verified | None = None
        self._payloads: dict[str, _Payload] = {}
        self._deleted: dict[str, bytes] = {}
        # The names of what Redis has; None if that was not read yet.
        self._there: set[str] | None = None
        self._is_entered = self._is_over = self._is_minded = False
        self._commands = commands
        self._run = run
        if token is not None:
            self._session = commands.session(token)  # verified once
        # Behind a call: a traceback that shows local variables shows attributes of none.
        self._token = token.decode() if isinstance(token, bytes) else token
        self._fields = None if names is None else names_arg(names)
        self._opening = opening
        if subject is not None:
            subject_bytes(subject)
        # That of a session that is there already is its own.
        self._subject = subject if token is None else None
        self._expires_at: datetime | None = None
        self._session_key = b""  # the Redis key of the hash that was read

    def __repr__(self) -> str:
        read = "" if self._there is None else ", read"
        return f"<{type(self).__name__} {self.id or 'not started'}{read}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is one request's: it is neither copied nor pickled")

    def __del__(self) -> None:
        if not self._is_minded and (
            self._deleted or any(map(_is_assigned, self._payloads.values()))
        ):
            warnings.warn(
                "the changes of a session were never stored: use `with gate.open(token) as "
                "session`, or session.save()",
                RuntimeWarning,
                stacklevel=2,
            )

    # What reports errors with their variables would go through a mapping, and read the session.
    def __sentry_repr__(self) -> str:
        return repr(self)

    @property
    def token(self) -> str | None:
        """What to send to the client; None if there is no session (any more).

        That of a session that this starts is there when it was stored: after the block, or after
        `save`.
        """
        return self._token

    @property
    def id(self) -> str | None:
        """The session id; None if it is not started. Redis is not asked."""
        return self._session[0] if self._session else None

    @property
    def subject(self) -> str | None:
        """Who the session belongs to, as it was read; None if it has no subject.

        Raises:
            SessionNotFoundError: the session ended or expired; told by the first read.
            HandleError: under asyncio, it was not loaded.
        """
        if self._there is None and self._subject is None:
            self._fetch()
        return self._subject

    @property
    def expires_at(self) -> datetime | None:
        """When the session ends at the latest, as it was read; None if it is not started.

        Raises:
            SessionNotFoundError: the session ended or expired; told by the first read.
            HandleError: under asyncio, it was not loaded.
        """
        if self._is_unread():
            self._fetch()
        return self._expires_at

    def __getitem__(self, name: str) -> Out:
        return cast("Out", self._value(name, None))

    @overload
    def get(self, name: str) -> Out | None: ...

    @overload
    def get(self, name: str, default: D) -> Out | D: ...

    @overload
    def get(self, name: str, default: None = None, *, as_: type[T]) -> T | None: ...

    @overload
    def get(self, name: str, default: D, *, as_: type[T]) -> T | D: ...

    @overload
    def get(self, name: str, default: object = None, *, as_: object) -> Any: ...

    def get(self, name: str, default: object = None, *, as_: object = None) -> object:
        """The payload of that name, or the default if there is none.

        Args:
            name: as it was stored.
            default: what to return if there is none.
            as_: the type that it is to be of, as for `pget`. If it was read as another one before,
                the object that is returned now is the one of which changes are stored.

        Raises:
            SessionNotFoundError: the session ended or expired; told by the first read.
            PayloadDecodeError: the codec cannot decode it, or it is of another type.
            UnsealError: the gate seals, and what is there was not sealed there.
            HandleError: it was not named in `open`, or under asyncio not loaded.
            ArgumentError: the codec knows no such type.

        Example:
            >>> from sessiongate import SessionGate
            >>> gate = SessionGate.from_url("memory://", sign_key="k" * 32)
            >>> session = gate.open(gate.start(300, {"lang": "en"}))
            >>> session.get("lang", as_=str), session.get("flash", "none")
            ('en', 'none')
        """
        try:
            self._find(name)
        except KeyError:
            return default
        return self._value(name, as_)

    def __bool__(self) -> bool:
        # Asked by `logging`, among others: it is no reason to read.
        return True

    # As objects are: to compare payloads would be to read them, and a handle may be in a set.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __setitem__(self, name: str, value: In) -> None:  # type: ignore[override]  # may be more
        self._check_writable()
        field = field_arg(name)
        values = self._commands.values
        # Now, so that what cannot be stored is told where it is assigned.
        data = values.encoded(value, name)
        self._payloads[name] = _Payload(field, value=data if values.is_bytes else value)
        self._deleted.pop(name, None)

    def __delitem__(self, name: str) -> None:
        self._check_writable()
        payload = self._find(name)
        del self._payloads[name]
        if self._there is None or self._fields is not None or name in self._there:
            self._deleted[name] = payload.field

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        try:
            self._find(name)
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        if self._there is None:
            self._fetch()
        return iter(list(self._payloads))

    def __len__(self) -> int:
        if self._there is None:
            self._fetch()
        return len(self._payloads)

    def setdefault(self, name: str, default: In | None = None) -> Out:  # type: ignore[override]  # what goes in may be more
        """The payload of that name; if there is none, the default, which is then assigned.

        Example:
            >>> session.setdefault("lang", "de"), session.setdefault("cart", "3 books")
            (b'en', b'3 books')
        """
        if name not in self:
            self[name] = cast("In", default)
        return self[name]

    @overload  # type: ignore[override]  # what goes in may be more
    def update(self, payloads: Mapping[str, In], /, **more: In) -> None: ...

    @overload
    def update(self, payloads: Iterable[tuple[str, In]] = (), /, **more: In) -> None: ...

    def update(self, payloads: Any = (), /, **more: In) -> None:
        """Assign several payloads, as `dict.update`.

        Example:
            >>> session.update({"lang": "de"}, seen="yes")
            >>> sorted(session)
            ['cart', 'lang', 'seen']
        """
        for name, value in dict(payloads, **more).items():
            self[name] = value

    def __ior__(self, payloads: Mapping[str, In]) -> Self:
        self.update(payloads)
        return self

    def clear(self) -> None:
        """Delete all payloads: of those that were to be read, if they were named.

        Example:
            >>> session.clear()
            >>> session.save()
            >>> gate.pall(session.token)
            {}
        """
        for name in self:
            del self[name]

    def _enter(self) -> None:
        self._check_writable()
        if self._is_entered:
            raise HandleError("the handle was entered already: one block has one, from open(token)")
        self._is_entered = self._is_minded = True

    def _is_unread(self) -> bool:
        """Whether there is something of the session to read."""
        return self._there is None or (self._expires_at is None and self._token is not None)

    def _fetch(self) -> None:
        """Read the session now, or say that it has to be read first."""
        raise NotImplementedError

    def _find(self, name: str) -> _Payload:
        if name not in self._payloads:
            if name not in self._deleted:
                if self._there is None:
                    self._fetch()
                self._check_named(name)
            if name not in self._payloads:
                raise PayloadNotFoundError(name)
        return self._payloads[name]

    def _check_named(self, name: str) -> None:
        # It may be there: to say that it is not would be wrong.
        if (
            self._fields is not None
            and self._token
            and isinstance(name, str)
            and name not in (self._there or ())
            and b":" + name.encode(errors="replace") not in self._fields
        ):
            raise HandleError(f"payload {name!r} was not read: name it in open(token, names=[...])")

    def _check_writable(self) -> None:
        if self._is_over:
            raise HandleError("the block is over: to change more, open the token again")

    def _value(self, name: str, as_: Any) -> Any:
        payload, values = self._find(name), self._commands.values
        if payload.value is not _UNKNOWN and (
            as_ is None or payload.as_ == as_ or type(payload.value) is as_
        ):
            return payload.value
        value = decoded(values.decoder(as_), self._data(name, payload), name)
        if values.is_bytes and as_ is not None:
            return value  # nothing in it can be changed
        payload.value, payload.as_ = value, as_
        if as_ is not None:
            payload.before = values.encoded_or_none(value, name)
        return value

    def _data(self, name: str, payload: _Payload) -> bytes:
        """The data of a payload, as it is to be stored."""
        if payload.stored is not None:
            opened = self._commands.values.opened
            payload.data = opened(self._session_key, payload.field, payload.stored)
            payload.stored = None
        changed = self._change(name, payload)
        if changed is not None:
            payload.data, payload.is_pending = changed, True
        return payload.data or b""  # the value may have defaults that this has not

    # What to send, and what to make of the answers.

    def _reading(self) -> Command[Opened] | None:
        """What reads the session; None if there is none to read."""
        if self._session is None:
            self._there = set()
            return None
        return self._commands.open(self._session, self._fields)

    def _was_read(self, answer: Opened) -> None:
        self._session_key, self._expires_at, self._subject, stored = answer
        self._there = set()
        for raw, data in stored.items():
            name = answers.text(raw)
            self._there.add(name)
            if name not in self._payloads and name not in self._deleted:
                self._payloads[name] = _Payload(b":" + raw, data)

    def _writing(self, subject: str | None = None) -> tuple[Command[Any], _Changes] | None:
        """What stores all changes, and these; None if there is nothing to store."""
        self._is_minded = True
        stored = {
            name: _Change(payload, data, payload.data)
            for name, payload in self._payloads.items()
            if (data := self._change(name, payload)) is not None
        }
        changes = _Changes(stored, dict(self._deleted))
        fields = tuple(
            [word for change in stored.values() for word in (change.payload.field, change.data)]
        )
        if self._session is None:
            return (self._starting(fields, subject), changes) if stored else None
        if not stored and not changes.deleted:
            return None
        deleted = tuple(changes.deleted.values())
        return self._commands.change(self._session, fields, deleted), changes

    def _starting(self, fields: tuple[bytes, ...], subject: str | None) -> Command[str]:
        opening = self._opening._replace(fields=fields)
        return self._commands.begin(opening, self._subject if subject is None else subject)

    def _change(self, name: str, payload: _Payload) -> bytes | None:
        """The data of a payload that is to be stored: it was assigned, or changed in place."""
        if payload.value is _UNKNOWN:
            return None
        if payload.data is not None and self._is_unchanged(name, payload):
            return payload.data if payload.is_pending else None
        return self._commands.values.encoded(payload.value, name)  # or what tells why it cannot be

    def _is_unchanged(self, name: str, payload: _Payload) -> bool:
        """Whether a value is still what was decoded."""
        if type(payload.value) in _IMMUTABLE:
            return True
        values = self._commands.values
        data = values.encoded_or_none(payload.value, name)
        if data is not None and data == payload.data:
            return True
        # Others may have encoded the same value to other bytes. What was read as a type is not
        # decoded again: a default of it may be another one each time.
        before = payload.before
        if payload.as_ is None:
            before = values.encoded_anew(payload.data or b"", name)
        if data is not None or before is not None:
            return data == before
        # It cannot be encoded: others may have stored it.
        try:
            read = decoded(values.decoder(payload.as_), payload.data or b"", name)
            return bool(read == payload.value) and repr(read) == repr(payload.value)  # 1 is no True
        except (PayloadDecodeError, RecursionError):
            return True  # so deep that it cannot even be looked at from here
        except Exception:  # noqa: BLE001  # a class of the application's that cannot be compared
            return False

    def _was_written(self, changes: _Changes, token: str | None) -> None:
        # Under asyncio another task may have gone on meanwhile: what it did is still to be stored.
        for name, field in changes.deleted.items():
            if self._deleted.get(name) == field:
                del self._deleted[name]
        for name, (payload, data, base) in changes.stored.items():
            if payload.data is base and data != base:
                payload.data = payload.before = data
            if payload.data == data:
                payload.is_pending = False
            if name not in self._payloads:
                self._deleted[name] = payload.field
        if self._there is not None:
            self._there -= changes.deleted.keys()
            self._there |= changes.stored.keys()
        if token is not None:
            self._has_token(token)
            # It was started here: all that it holds is known.
            self._there, self._fields = set(changes.stored), None

    def _renewing(
        self, grace: "int | timedelta | None", subject: str | None
    ) -> tuple[Command[str], _Changes] | None:
        """What renews the token; for a session that is not started, what starts the subject's."""
        if self._token is not None:
            return self._commands.renew(self._token, grace, subject), _NO_CHANGES
        grace_arg(grace, subject)
        if subject is None:
            return None
        return self._writing(subject) or (self._starting((), subject), _NO_CHANGES)

    def _was_renewed(self, subject: str | None, changes: _Changes, token: str) -> None:
        if subject is not None:
            self._subject = subject
        if self._token is None:
            self._was_written(changes, token)
            return
        self._has_token(token)

    def _has_token(self, token: str) -> None:
        self._token, self._session = token, self._commands.session(token)

    def _ending(self) -> Command[None] | None:
        return None if self._token is None else self._commands.end(self._token)

    def _was_ended(self) -> None:
        self._token = self._session = self._expires_at = self._subject = None
        self._payloads, self._deleted, self._there = {}, {}, set()


class Session(_Handle[In, Out]):
    """A session as a mapping of its payloads: what `SessionGate.open` returns.

    It is one request's: not for several threads. Nothing is read before something is asked, and
    then everything at once. What was assigned, deleted or changed in place is stored when the
    `with` block is left, all or nothing; a block that changes nothing stores nothing. Besides the
    payloads it tells `id`, `token`, `subject` and `expires_at`.

    Example:
        >>> from sessiongate import JSONCodec, SessionGate
        >>> gate = SessionGate.from_url("memory://", sign_key="k" * 32, codec=JSONCodec())
        >>> with gate.open(None, ttl=3600) as session:
        ...     session["cart"] = ["book"]
        >>> with gate.open(session.token) as session:
        ...     session["cart"].append("pen")
        >>> gate.pget(session.token, "cart")
        ['book', 'pen']
    """

    __slots__ = ()
    _run: Run

    def load(self) -> Self:
        """Read the session now, unless it was read before: one round trip.

        Raises:
            SessionNotFoundError: the session ended or expired.

        Example:
            >>> sorted(gate.open(session.token).load())
            ['cart']
        """
        if self._is_unread():
            self._fetch()
        return self

    def save(self) -> None:
        """Store now what was changed, as leaving the block does: one round trip, or none.

        Raises:
            SessionNotFoundError: the session ended or expired; nothing was stored.
            ArgumentError: a payload was changed to what the codec cannot encode; likewise.
            TooManySessionsError: the session was to be started, and its subject has `max_sessions`.

        Example:
            >>> session = gate.open(None)
            >>> session["lang"] = "en"
            >>> session.save()
            >>> gate.pget(session.token, "lang")
            'en'
        """
        if writing := self._writing():
            command, changes = writing
            self._finish(command, partial(self._was_written, changes))

    def renew(self, *, grace: int | timedelta | None = None, subject: str | None = None) -> None:
        """Replace the token by a new one, at once, and say who signed in: as `SessionGate.renew`.

        `token` is then the new one. Without a session, one with that subject is started.

        Args:
            grace: as for `SessionGate.renew`.
            subject: likewise.

        Raises:
            SessionNotFoundError: the session ended or expired.
            TooManySessionsError: the subject has `max_sessions`, and the gate rejects more.
            UnsealError: with a subject, a payload was not sealed there; all is as it was.

        Example:
            >>> session = gate.open(session.token)
            >>> session.renew(subject="alice")
            >>> gate.info(session.token).subject
            'alice'
        """
        if renewing := self._renewing(grace, subject):
            command, changes = renewing
            self._finish(command, partial(self._was_renewed, subject, changes))

    def end(self) -> None:
        """End the session, at once; what was changed is not stored.

        What is assigned after that starts another one, as with `open(None)`.

        Raises:
            SessionNotFoundError: the session ended or expired before.

        Example:
            >>> session.end()
            >>> print(session.token)
            None
        """
        if ending := self._ending():
            try:
                self._run(ending)
            except (SessionNotFoundError, UnderReplicatedError):
                self._was_ended()  # it is over all the same
                raise
        self._was_ended()

    def __enter__(self) -> Self:
        self._enter()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over = True
        if exc_type is None:
            self.save()

    def _fetch(self) -> None:
        if reading := self._reading():
            self._was_read(self._run(reading))

    def _finish(self, command: Command[R], then: Callable[[Any], None]) -> None:
        try:
            result = self._run(command)
        except UnderReplicatedError as error:
            then(error.result())  # it was written
            raise
        then(result)


class AsyncSession(_Handle[In, Out]):
    """A session as a mapping of its payloads: what `AsyncSessionGate.open` returns.

    As `Session`, but that reading it is awaited: `await session.load()`, once, before something is
    asked. To assign needs no reading.

    Example:
        >>> from sessiongate import AsyncSessionGate, JSONCodec
        >>> gate = AsyncSessionGate.from_url("memory://", sign_key="k" * 32, codec=JSONCodec())
        >>> token = await gate.start(300, {"cart": ["book"]})
        >>> session = gate.open(token)
        >>> (await session.load())["cart"]
        ['book']
    """

    __slots__ = ("_lock",)
    _run: AsyncRun

    def __init__(  # noqa: PLR0913  # a gate alone makes it
        self,
        commands: Commands[In, Out],
        run: AsyncRun,
        token: str | bytes | None,
        *,
        names: Iterable[str] | None,
        opening: Opening,
        subject: str | None,
    ) -> None:
        super().__init__(commands, run, token, names=names, opening=opening, subject=subject)
        self._lock = asyncio.Lock()  # of several tasks, one after the other reads and stores

    async def load(self) -> Self:
        """Read the session, unless it was read before, as `Session.load`: what the mapping needs.

        Raises:
            SessionNotFoundError: the session ended or expired.

        Example:
            >>> session = await gate.open(token).load()
            >>> session.get("nothing"), list(session)
            (None, ['cart'])
        """
        async with self._lock:
            if self._is_unread() and (reading := self._reading()):
                self._was_read(await self._run(reading))
        return self

    async def save(self) -> None:
        """Store now what was changed, as `Session.save`.

        Raises:
            SessionNotFoundError: the session ended or expired; nothing was stored.
            ArgumentError: a payload was changed to what the codec cannot encode; likewise.
            TooManySessionsError: the session was to be started, and its subject has `max_sessions`.

        Example:
            >>> session["lang"] = "en"
            >>> await session.save()
            >>> await gate.pget(token, "lang")
            'en'
        """
        async with self._lock:
            if writing := self._writing():
                command, changes = writing
                await self._finish(command, partial(self._was_written, changes))

    async def renew(
        self, *, grace: int | timedelta | None = None, subject: str | None = None
    ) -> None:
        """Replace the token by a new one, at once, as `Session.renew`.

        Raises:
            SessionNotFoundError: the session ended or expired.

        Example:
            >>> await session.renew(subject="alice")
            >>> session.subject
            'alice'
        """
        async with self._lock:
            if renewing := self._renewing(grace, subject):
                command, changes = renewing
                await self._finish(command, partial(self._was_renewed, subject, changes))

    async def end(self) -> None:
        """End the session, at once, as `Session.end`.

        Raises:
            SessionNotFoundError: the session ended or expired before.

        Example:
            >>> await session.end()
            >>> print(session.token)
            None
        """
        async with self._lock:
            if ending := self._ending():
                try:
                    await self._run(ending)
                except (SessionNotFoundError, UnderReplicatedError):
                    self._was_ended()
                    raise
            self._was_ended()

    async def __aenter__(self) -> Self:
        self._enter()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over = True
        if exc_type is None:
            await self.save()

    def _fetch(self) -> None:
        raise HandleError("`await session.load()` first, in the block: then everything can be read")

    async def _finish(self, command: Command[R], then: Callable[[Any], None]) -> None:
        try:
            result = await self._run(command)
        except UnderReplicatedError as error:
            then(error.result())
            raise
        then(result)
