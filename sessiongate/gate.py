"""SessionGate: runs commands on a redis-py client, one round trip each."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from time import sleep
from types import TracebackType
from typing import Protocol, Self, TypeVar

from redis import Redis, RedisCluster
from redis import exceptions as redis_errors
from redis.client import Pipeline
from redis.cluster import ClusterNode, ClusterPipeline
from redis.connection import Connection, ConnectionPool
from redis.exceptions import RedisError, ResponseError

from .answers import SessionInfo
from .arguments import Data
from .command import PROBE, Answer, AnyCommand, Command
from .commands import Commands
from .connect import client_from_url, refuse_stale_cache
from .errors import ConfigurationError, GateClosedError
from .keyspace import Keyspace, system_random
from .routes import ASKING, READWRITE, REDIRECTIONS, Journey, Routes
from .subjects import Overflow
from .tokens import SignKey, SignKeyRing
from .wire import misplaced, new_echo, pack, unpack

R = TypeVar("R")

DEFAULT_PREFIX = "sg-session"


class SessionGate:
    """Sessions on stock Redis: signed tokens, named payloads, one atomic script an operation.

    A gate is made once and shared: by threads, and by the children of a fork.

    Args:
        client: the redis-py client to use, `Redis` or `RedisCluster`; it stays the application's,
            and `close` leaves it open.
            Its decoding, protocol, database and timeouts are fine as they are.
        sign_key: the secret that signs tokens, or a list of them: the first signs, all verify, so
            that a key can be retired without signing anybody out. At least 32 random bytes each.
        prefix: what every key of this gate in Redis begins with; 1 to 200 bytes, no braces.
        max_sessions: how many live sessions a subject may have; None for any number.
        on_overflow: when a subject has that many and opens another, `"evict"` ends its oldest,
            `"reject"` raises TooManySessionsError.
        random: where ids come from, `random(n)` being n bytes; only a test should replace it.

    Raises:
        ConfigurationError: the client, sign key, prefix or limit cannot be used.

    Example:
        >>> from sessiongate import SessionGate
        >>> gate = SessionGate.from_url("memory://", sign_key="at least 32 bytes that nobody knows")
        >>> token = gate.start(300, {"user": "John Doe"})
        >>> gate.pget(token, "user")
        b'John Doe'
    """

    def __init__(  # noqa: PLR0913  # options are keyword-only
        self,
        client: Redis | RedisCluster,
        *,
        sign_key: SignKey | Sequence[SignKey],
        prefix: str = DEFAULT_PREFIX,
        max_sessions: int | None = None,
        on_overflow: Overflow = "evict",
        random: Callable[[int], bytes] = system_random,
    ) -> None:
        self._closed = False
        self._prefix = prefix
        if not isinstance(client, Redis | RedisCluster) or isinstance(
            client, Pipeline | ClusterPipeline
        ):
            raise ConfigurationError(
                f"client is a redis.Redis or redis.RedisCluster, not "
                f"{type(client).__module__}.{type(client).__name__}"
            )
        refuse_stale_cache(client)
        self._commands = Commands(
            SignKeyRing(sign_key), Keyspace(prefix, random), max_sessions, on_overflow
        )
        self._client = client
        self._channel: _Channel = (
            _Clustered(client) if isinstance(client, RedisCluster) else _Single(client)
        )

    @classmethod
    def from_url(  # noqa: PLR0913  # options are keyword-only
        cls,
        url: str,
        *,
        sign_key: SignKey | Sequence[SignKey],
        prefix: str = DEFAULT_PREFIX,
        max_sessions: int | None = None,
        on_overflow: Overflow = "evict",
        random: Callable[[int], bytes] = system_random,
    ) -> Self:
        """A gate with a client of its own, which `close` closes. Connects at the first call.

        Args:
            url: `redis://[[user]:password@]host[:6379][/database]`, `rediss://` (TLS),
                `unix:///path/to/socket` or `memory://`, a store of this gate's own in the process
                (extra `memory`). Options of redis-py follow a `?`, as in `?socket_timeout=2`.
            sign_key: as for the class.
            prefix: as for the class.
            max_sessions: as for the class.
            on_overflow: as for the class.
            random: as for the class.

        Raises:
            ConfigurationError: an argument cannot be used, or the extra is missing.

        Example:
            >>> with SessionGate.from_url("memory://", sign_key="k" * 32) as gate:
            ...     gate.verify(gate.start(300)).isalnum()
            True
        """
        return cls(
            client_from_url(url),
            sign_key=sign_key,
            prefix=prefix,
            max_sessions=max_sessions,
            on_overflow=on_overflow,
            random=random,
        )

    def start(
        self,
        ttl: int | timedelta,
        payloads: Mapping[str, Data] | None = None,
        *,
        subject: str | None = None,
        idle_timeout: int | timedelta | None = None,
    ) -> str:
        """Open a session, with its first payloads.

        Args:
            ttl: whole seconds (or a timedelta) until it ends, 0 to 100 years. With 0 it is over at
                once, and the token is returned all the same.
            payloads: names and data, as for `pset`.
            subject: who the session belongs to, 1 to 200 bytes of UTF-8; it is listed among that
                subject's sessions.
            idle_timeout: whole seconds (or a timedelta), at least 1: the session also ends when it
                was not used for that long. Use is noted once per tenth of it, so that the last
                tenth may be missing.

        Returns:
            The token to hand to the client: `v1.<id>.<signature>`, 84 characters.

        Raises:
            ArgumentError: an argument is out of its limits; nothing was sent.
            TooManySessionsError: the subject has `max_sessions`, and the gate rejects more.

        Example:
            >>> token = gate.start(300, {"user": "John Doe", "cart": b"[]"})
            >>> len(token)
            84
            >>> token = gate.start(86_400, {"cart": b"[]"}, subject="alice", idle_timeout=1800)
        """
        return self._run(self._commands.start(ttl, payloads, subject, idle_timeout))

    def touch(self, token: str | bytes) -> None:
        """Use the session, so that its idle timeout begins anew, and do nothing else.

        Args:
            token: as `start` or `renew` returned it.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.

        Example:
            >>> gate.touch(token)
        """
        return self._run(self._commands.touch(token))

    def info(self, token: str | bytes) -> SessionInfo:
        """Tell of the session: whose it is, when it ends, what payloads it holds.

        Args:
            token: as `start` or `renew` returned it.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.

        Example:
            >>> info = gate.info(token)
            >>> info.subject, info.idle_timeout, dict(info.payloads)
            ('alice', 1800, {'cart': 2})
        """
        return self._run(self._commands.info(token))

    def renew(
        self, token: str | bytes, *, grace: int | timedelta = 10, subject: str | None = None
    ) -> str:
        """Replace the session's token by a new one, and say who signed in.

        Without a subject the session stays what it is, and its token is replaced by the next
        generation. The old one goes on working for the grace, so that parallel requests do not sign
        their user out. Renewals of one old token within its grace all return the same successor.

        With a subject the session moves to a fresh id, listed among the subject's sessions, and
        keeps its payloads, ttl and idle timeout. The old token is dead at once, so that whoever
        knew it before the sign-in is not signed in with it.

        Args:
            token: as `start` or `renew` returned it.
            grace: whole seconds (or a timedelta) for which the old token goes on working; with a
                subject it has none.
            subject: who the session belongs to from now on, 1 to 200 bytes of UTF-8, whoever it
                belonged to before.

        Returns:
            The new token: `v2.<id>.<generation>.<signature>`, signed with the newest sign key.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired, or the grace of the token is over.
            BadSignatureError: the token was renewed already, by a process that signs with a key
                that this gate does not have.
            TooManySessionsError: the subject has `max_sessions`, and the gate rejects more.
            ArgumentError: an argument is out of its limits; nothing was sent.

        Example:
            >>> token = gate.renew(token)
            >>> token[:3], gate.info(token).generation
            ('v2.', 1)
            >>> anonymous = gate.start(300, {"cart": "3 books"})
            >>> signed_in = gate.renew(anonymous, subject="alice")
            >>> gate.pget(signed_in, "cart")
            b'3 books'
        """
        return self._run(self._commands.renew(token, grace, subject))

    def expire(self, token: str | bytes, ttl: int | timedelta) -> None:
        """Let the session, payloads included, end `ttl` seconds from now.

        Args:
            token: as `start` or `renew` returned it.
            ttl: whole seconds (or a timedelta), 0 to 100 years. 0 ends it at once.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.
            ArgumentError: the ttl is out of its limits; nothing was sent.

        Example:
            >>> gate.expire(token, 600)
        """
        return self._run(self._commands.expire(token, ttl))

    def pset(  # noqa: PLR0913  # options are keyword-only
        self,
        token: str | bytes,
        name: str,
        data: Data,
        *,
        if_absent: bool = False,
        if_match: Data | None = None,
        ttl: int | timedelta | None = None,
    ) -> None:
        """Store one payload; when the session ends does not change.

        Args:
            token: as `start` or `renew` returned it.
            name: 1 to 200 bytes of UTF-8.
            data: 1 to 8,000,000 bytes; a str is stored as UTF-8.
            if_absent: store it only if there is no payload of that name.
            if_match: store it only if the payload of that name has this data.
            ttl: whole seconds (or a timedelta) until the payload is gone, if the session does not
                end before; 0 deletes it. Without, it stays as long as the session.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.
            PayloadConflictError: the condition is not met; nothing was stored.
            ArgumentError: an argument is out of its limits; nothing was sent.

        Example:
            >>> gate.pset(token, "user", '{"name":"John Doe"}')
            >>> gate.pset(token, "cart", '["book"]', if_match="[]")
            >>> gate.pset(token, "signed in", "yes", ttl=300)
        """
        return self._run(
            self._commands.pset(token, name, data, if_absent=if_absent, if_match=if_match, ttl=ttl)
        )

    def pset_many(self, token: str | bytes, payloads: Mapping[str, Data]) -> None:
        """Store several payloads, all or none; when the session ends does not change.

        Args:
            token: as `start` or `renew` returned it.
            payloads: names and data, as for `pset`.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.
            ArgumentError: a payload is out of its limits; nothing was sent.

        Example:
            >>> gate.pset_many(token, {"lang": "en", "cart": b"[]"})
        """
        return self._run(self._commands.pset_many(token, payloads))

    def pget(self, token: str | bytes, name: str) -> bytes:
        """Read one payload.

        Args:
            token: as `start` or `renew` returned it.
            name: 1 to 200 bytes of UTF-8.

        Returns:
            Its data, always bytes.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.
            PayloadNotFoundError: the session holds no payload of that name.
            ArgumentError: the name is out of its limits; nothing was sent.

        Example:
            >>> gate.pget(token, "cart")
            b'[]'
        """
        return self._run(self._commands.pget(token, name))

    def pget_many(self, token: str | bytes, names: Iterable[str]) -> dict[str, bytes]:
        """Read several payloads, as they were at one moment.

        Args:
            token: as `start` or `renew` returned it.
            names: each 1 to 200 bytes of UTF-8.

        Returns:
            The data of each, always bytes; those that are not there are left out.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.
            ArgumentError: a name is out of its limits; nothing was sent.

        Example:
            >>> gate.pget_many(token, ["cart", "lang", "nothing"])
            {'cart': b'[]', 'lang': b'en'}
        """
        return self._run(self._commands.pget_many(token, names))

    def pall(self, token: str | bytes) -> dict[str, bytes]:
        """Read all payloads, as they were at one moment.

        Args:
            token: as `start` or `renew` returned it.

        Returns:
            The data of each, always bytes, in no order.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.

        Example:
            >>> sorted(gate.pall(token))
            ['cart', 'lang', 'signed in', 'user']
        """
        return self._run(self._commands.pall(token))

    def pdel(self, token: str | bytes, name: str) -> None:
        """Delete one payload; when the session ends does not change.

        Args:
            token: as `start` or `renew` returned it.
            name: 1 to 200 bytes of UTF-8.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.
            PayloadNotFoundError: the session holds no payload of that name.
            ArgumentError: the name is out of its limits; nothing was sent.

        Example:
            >>> gate.pdel(token, "cart")
        """
        return self._run(self._commands.pdel(token, name))

    def ppop(self, token: str | bytes, name: str) -> bytes:
        """Read one payload and delete it: for flash messages and one-time codes.

        Of several callers at once exactly one gets it.

        Args:
            token: as `start` or `renew` returned it.
            name: 1 to 200 bytes of UTF-8.

        Returns:
            Its data, always bytes.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.
            PayloadNotFoundError: the session holds no payload of that name.
            ArgumentError: the name is out of its limits; nothing was sent.

        Example:
            >>> gate.ppop(token, "signed in")
            b'yes'
        """
        return self._run(self._commands.ppop(token, name))

    def pincr(self, token: str | bytes, name: str, by: int = 1) -> int:
        """Add to a counter: a payload that holds a whole number in decimal. One not there is 0.

        Args:
            token: as `start` or `renew` returned it.
            name: 1 to 200 bytes of UTF-8.
            by: what to add; a signed number of 64 bits.

        Returns:
            The sum.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.
            PayloadTypeError: the payload is no counter; it was left as it is.
            PayloadOverflowError: the sum would not fit into 64 bits; likewise.
            ArgumentError: an argument is out of its limits; nothing was sent.

        Example:
            >>> gate.pincr(token, "visits")
            1
            >>> gate.pincr(token, "visits", 10)
            11
        """
        return self._run(self._commands.pincr(token, name, by))

    def end(self, token: str | bytes) -> None:
        """End the session: it and all its payloads are gone.

        Args:
            token: as `start` or `renew` returned it.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired before.

        Example:
            >>> gate.end(token)
        """
        return self._run(self._commands.end(token))

    def sessions(self, subject: str) -> list[SessionInfo]:
        """Tell of the live sessions of a subject, the oldest first. Telling is no use of them.

        Args:
            subject: as given to `start` or `renew`.

        Raises:
            ArgumentError: the subject is out of its limits; nothing was sent.

        Example:
            >>> token = gate.start(300, subject="bob")
            >>> (info,) = gate.sessions("bob")
            >>> info.id == gate.verify(token)
            True
        """
        return self._run(self._commands.sessions(subject))

    def end_all(self, subject: str, *, keep: str | bytes | None = None) -> int:
        """End all sessions of a subject, at one moment: sign out everywhere.

        Each session whose start had returned before is dead after this; one that was started
        meanwhile is dead or listed.

        Args:
            subject: as given to `start` or `renew`.
            keep: the token of a session that is not to end. If that is none of the subject's, as
                after a sign-in the token from before it, all end.

        Returns:
            How many ended.

        Raises:
            InvalidTokenError: the token to keep is malformed or forged; nothing was sent.
            ArgumentError: the subject is out of its limits; nothing was sent.

        Example:
            >>> other = gate.start(300, subject="bob")
            >>> gate.end_all("bob", keep=other)
            1
        """
        return self._run(self._commands.end_all(subject, keep))

    def end_one(self, subject: str, session_id: str) -> None:
        """End one session of a subject, by its id: sign out that device.

        Args:
            subject: as given to `start` or `renew`.
            session_id: as `sessions` told it.

        Raises:
            SessionNotFoundError: the subject has no live session of that id. That says nothing of
                the caller's own session.
            ArgumentError: an argument is out of its limits; nothing was sent.

        Example:
            >>> (info,) = gate.sessions("bob")
            >>> gate.end_one("bob", info.id)
            >>> gate.sessions("bob")
            []
        """
        return self._run(self._commands.end_one(subject, session_id))

    def verify(self, token: str | bytes) -> str:
        """The session id of a token that one of the gate's sign keys signed; Redis is not asked.

        Its session may have ended all the same.

        Args:
            token: as a client sent it.

        Returns:
            The session id in it: safe to log, it opens nothing by itself.

        Raises:
            MalformedTokenError: it is not spelt as a token, or not a str or bytes.
            BadSignatureError: none of the sign keys signed it.

        Example:
            >>> len(gate.verify(token))
            16
        """
        return self._commands.verify(token)

    def close(self) -> None:
        """Close the gate's own connections; a client of the application's stays open.

        Calls that come later raise GateClosedError, but for `verify`. Closing twice is fine.

        Example:
            >>> gate.close()
        """
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        if self._closed:
            raise GateClosedError
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SessionGate prefix={self._prefix!r}{' closed' if self._closed else ''}>"

    def _run(self, command: Command[R]) -> R:
        if self._closed:
            raise GateClosedError
        while True:
            # An error here is the caller's: nothing was sent.
            answer = self._channel.ask(command)
            try:
                result = command.result(answer)
                if not isinstance(result, Command):
                    return result
                following = result
            except Exception as error:
                repetition = command.after(error)
                if repetition is None:
                    raise
                following = repetition
            finally:
                del answer  # an error refers to this frame: the two would keep each other
            command = following


class _Channel(Protocol):
    def ask(self, command: AnyCommand) -> Answer: ...

    def close(self) -> None: ...


class _Single:
    """Sends each command on a connection of the gate's own, made as the client's pool makes its.

    To take one from the pool and give it back costs a quarter of a call. As many are kept as were
    in use at once.
    """

    __slots__ = ("_closed", "_idle", "_pid", "_pool")

    def __init__(self, client: Redis) -> None:
        # Of a client made with single_connection_client too: its one connection knows no forks.
        self._pool = client.connection_pool
        self._idle: list[Connection] = []
        self._pid = os.getpid()
        self._closed = False

    def ask(self, command: AnyCommand) -> Answer:
        sound = False
        try:
            connection = self._take()
            try:
                answer, sound = _ask(connection, command)
            finally:
                if sound and not self._closed:
                    self._idle.append(connection)
                else:
                    connection.disconnect()
        except RedisError as error:
            return error
        return answer

    def _take(self) -> Connection:
        if self._pid != os.getpid():
            # They are the parent's: to drop them here closes them for this process alone.
            self._idle, self._pid = [], os.getpid()
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._pool.connection_class(**self._pool.connection_kwargs)
        else:
            if not _has_unread(connection):
                return connection
            connection.disconnect()
        try:
            connection.connect()
        except BaseException:
            connection.disconnect()  # its handshake may have been interrupted
            raise
        return connection

    def close(self) -> None:
        """Close what is idle; what is in use is closed by who uses it."""
        self._closed = True
        while self._idle:
            self._idle.pop().disconnect()


class _Clustered:
    """Sends each command on a connection of its server's pool; servers come and go with these."""

    __slots__ = ("_client", "_prelude", "_routes")

    def __init__(self, client: RedisCluster) -> None:
        self._client = client
        self._routes = Routes(client)
        # Connections of a client that reads from replicas would read from a primary, too, that has
        # become one.
        reads_from_replicas = client.read_from_replicas or client.load_balancing_strategy
        self._prelude = READWRITE if reads_from_replicas else ()

    def ask(self, command: AnyCommand) -> Answer:
        journey = Journey()
        while True:
            node = self._routes.node(command, journey)
            answer = self._ask_at(node, command, asking=journey.asking)
            self._routes.heard(node, answer)
            if not journey.goes_on(answer, node.host):
                return answer
            sleep(journey.pause)

    def _ask_at(self, node: ClusterNode, command: AnyCommand, *, asking: bool) -> Answer:
        prelude = self._prelude + ASKING if asking else self._prelude
        try:
            pool = self._client.get_redis_connection(node).connection_pool
            connection = _take(pool)
            sound = False
            try:
                answer, sound = _ask(connection, command, prelude)
            finally:
                if not sound:
                    connection.disconnect()
                pool.release(connection)
        except RedisError as error:
            return error
        return answer

    def close(self) -> None:
        """Nothing: a cluster client is always the application's."""


def _take(pool: ConnectionPool) -> Connection:
    try:
        return pool.get_connection()
    except RedisError:
        raise
    except BaseException:
        # redis-py puts a connection back whose handshake was interrupted, half made for good.
        # (Before version 7 its BlockingConnectionPool cannot close idle connections alone.)
        with suppress(TypeError):
            pool.disconnect(inuse_connections=False)
        raise


def _has_unread(connection: Connection) -> bool:
    """Whether there is something to read that is no reply to what comes.

    The server has closed the connection, or somebody left it dirty.
    """
    try:
        return connection.can_read()
    except RedisError:
        return True


def _ask(
    connection: Connection, command: AnyCommand, prelude: tuple[bytes, ...] = ()
) -> tuple[Answer, bool]:
    """The answer to a command, and whether the connection may be used again."""
    answer, proven = _round_trip(connection, command, prelude)
    if not proven and isinstance(answer, ResponseError):
        # The server's own errors have no echo: is the next reply the next request's?
        probed, proven = _round_trip(connection, PROBE)
        # A redirection says that the command did not run: not so one that is not proven.
        if isinstance(probed, redis_errors.ConnectionError) or (
            not proven and isinstance(answer, REDIRECTIONS)
        ):
            answer = misplaced()
    # A primary that became a replica: only a new connection finds its successor.
    return answer, proven and not isinstance(answer, redis_errors.ReadOnlyError)


def _round_trip(
    connection: Connection, command: AnyCommand, prelude: tuple[bytes, ...] = ()
) -> tuple[Answer, bool]:
    echo = new_echo()
    if prelude:
        connection.send_packed_command([*prelude, *pack(command, echo)])
        for _ in prelude:
            # Whatever it says: the command's own reply shows whether it served.
            with suppress(ResponseError):
                connection.read_response(disable_decoding=True)
    else:
        connection.send_packed_command(pack(command, echo))
    try:
        reply: object = connection.read_response(disable_decoding=True)
    except ResponseError as error:
        # Under no other name: it refers to this frame, and the two would keep each other.
        return unpack(error, echo)
    return unpack(reply, echo)
