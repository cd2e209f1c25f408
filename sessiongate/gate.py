"""SessionGate: runs commands on a redis-py client, one round trip each."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar

from redis import Redis
from redis import exceptions as redis_errors
from redis.client import Pipeline
from redis.connection import Connection
from redis.exceptions import RedisError, ResponseError

from .arguments import Data
from .commands import PROBE, Answer, AnyCommand, Command, Commands
from .connect import client_from_url, refuse_stale_cache
from .errors import ConfigurationError, GateClosedError
from .keyspace import Keyspace, system_random
from .tokens import SignKey, SignKeyRing
from .wire import misplaced, new_echo, pack, unpack

R = TypeVar("R")

DEFAULT_PREFIX = "sg-session"


class SessionGate:
    """Sessions on stock Redis: signed tokens, named payloads, one atomic script an operation.

    A gate is made once and shared: by threads, and by the children of a fork.

    Args:
        client: the redis-py client to use; it stays the application's, and `close` leaves it open.
            Its decoding, protocol, database and timeouts are fine as they are.
        sign_key: the secret that signs tokens, or a list of them: the first signs, all verify, so
            that a key can be retired without signing anybody out. At least 32 random bytes each.
        prefix: what every key of this gate in Redis begins with; 1 to 200 bytes, no braces.
        random: where ids come from, `random(n)` being n bytes; only a test should replace it.

    Raises:
        ConfigurationError: the client, sign key or prefix cannot be used.

    Example:
        >>> from sessiongate import SessionGate
        >>> gate = SessionGate.from_url("memory://", sign_key="at least 32 bytes that nobody knows")
        >>> token = gate.start(300, {"user": "John Doe"})
        >>> gate.pget(token, "user")
        b'John Doe'
    """

    def __init__(
        self,
        client: Redis,
        *,
        sign_key: SignKey | Sequence[SignKey],
        prefix: str = DEFAULT_PREFIX,
        random: Callable[[int], bytes] = system_random,
    ) -> None:
        self._closed = False
        self._prefix = prefix
        if not isinstance(client, Redis) or isinstance(client, Pipeline):
            raise ConfigurationError(
                f"client is a redis.Redis, not {type(client).__module__}.{type(client).__name__}"
            )
        refuse_stale_cache(client)
        self._commands = Commands(SignKeyRing(sign_key), Keyspace(prefix, random))
        self._client = client
        self._owns_client = False

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        sign_key: SignKey | Sequence[SignKey],
        prefix: str = DEFAULT_PREFIX,
        random: Callable[[int], bytes] = system_random,
    ) -> Self:
        """A gate with a client of its own, which `close` closes. Connects at the first call.

        Args:
            url: `redis://[[user]:password@]host[:6379][/database]`, `rediss://` (TLS),
                `unix:///path/to/socket` or `memory://`, a store of this gate's own in the process
                (extra `memory`). Options of redis-py follow a `?`, as in `?socket_timeout=2`.
            sign_key: as for the class.
            prefix: as for the class.
            random: as for the class.

        Raises:
            ConfigurationError: the URL, sign key or prefix cannot be used, or the extra is missing.

        Example:
            >>> with SessionGate.from_url("memory://", sign_key="k" * 32) as gate:
            ...     gate.verify(gate.start(300)).isalnum()
            True
        """
        gate = cls(client_from_url(url), sign_key=sign_key, prefix=prefix, random=random)
        gate._owns_client = True
        return gate

    def start(self, ttl: int | timedelta, payloads: Mapping[str, Data] | None = None) -> str:
        """Open a session, with its first payloads.

        Args:
            ttl: whole seconds (or a timedelta) until it ends, 0 to 100 years. With 0 it is over at
                once, and the token is returned all the same.
            payloads: names and data, as for `pset`.

        Returns:
            The token to hand to the client: `v1.<id>.<signature>`, 84 characters.

        Raises:
            ArgumentError: the ttl or a payload is out of its limits; nothing was sent.

        Example:
            >>> token = gate.start(300, {"user": "John Doe", "cart": b"[]"})
            >>> len(token)
            84
        """
        return self._run(self._commands.start(ttl, payloads))

    def expire(self, token: str | bytes, ttl: int | timedelta) -> None:
        """Let the session, payloads included, end `ttl` seconds from now.

        Args:
            token: as `start` returned it.
            ttl: whole seconds (or a timedelta), 0 to 100 years. 0 ends it at once.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.
            ArgumentError: the ttl is out of its limits; nothing was sent.

        Example:
            >>> gate.expire(token, 600)
        """
        return self._run(self._commands.expire(token, ttl))

    def pset(self, token: str | bytes, name: str, data: Data) -> None:
        """Store one payload; when the session ends does not change.

        Args:
            token: as `start` returned it.
            name: 1 to 200 bytes of UTF-8.
            data: 1 to 8,000,000 bytes; a str is stored as UTF-8.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.
            ArgumentError: the name or data is out of its limits; nothing was sent.

        Example:
            >>> gate.pset(token, "user", '{"name":"John Doe"}')
        """
        return self._run(self._commands.pset(token, name, data))

    def pget(self, token: str | bytes, name: str) -> bytes:
        """Read one payload.

        Args:
            token: as `start` returned it.
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

    def pdel(self, token: str | bytes, name: str) -> None:
        """Delete one payload; when the session ends does not change.

        Args:
            token: as `start` returned it.
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

    def end(self, token: str | bytes) -> None:
        """End the session: it and all its payloads are gone.

        Args:
            token: as `start` returned it.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired before.

        Example:
            >>> gate.end(token)
        """
        return self._run(self._commands.end(token))

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
        """Close the connections that `from_url` made; a client of the application's stays open.

        Calls that come later raise GateClosedError, but for `verify`. Closing twice is fine.

        Example:
            >>> gate.close()
        """
        self._closed = True
        if self._owns_client:
            self._client.close()
            self._client.connection_pool.disconnect()

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
            connection = self._take()
            try:
                return command.result(_ask(connection, command))
            except Exception as error:
                following = command.after(error)
                if following is None:
                    raise
            finally:
                self._give_back(connection)
            command = following

    def _take(self) -> Connection:
        # Of a client made with single_connection_client too: its one connection knows no forks.
        pool = self._client.connection_pool
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

    def _give_back(self, connection: Connection) -> None:
        if self._closed and self._owns_client:
            connection.disconnect()
        self._client.connection_pool.release(connection)


def _ask(connection: Connection, command: AnyCommand) -> Answer:
    """The answer to a command. Unless it is proven, the connection is not used again."""
    sound = False
    try:
        answer, proven = _round_trip(connection, command)
        if not proven and isinstance(answer, ResponseError):
            # The server's own errors have no echo: is the next reply the next request's?
            probed, proven = _round_trip(connection, PROBE)
            if isinstance(probed, redis_errors.ConnectionError):
                answer = misplaced()
        # A primary that became a replica: only a new connection finds its successor.
        sound = proven and not isinstance(answer, redis_errors.ReadOnlyError)
    finally:
        if not sound:
            connection.disconnect()
    return answer


def _round_trip(connection: Connection, command: AnyCommand) -> tuple[Answer, bool]:
    echo = new_echo()
    connection.send_packed_command(pack(command, echo))
    try:
        reply: object = connection.read_response(disable_decoding=True)
    except ResponseError as error:
        # Under no other name: it refers to this frame, and the two would keep each other.
        return unpack(error, echo)
    return unpack(reply, echo)
