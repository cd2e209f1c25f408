"""SessionGate: runs commands on a redis-py client, one round trip each."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, overload

from redis import Redis, RedisCluster
from redis.client import Pipeline
from redis.cluster import ClusterPipeline

from .answers import SessionInfo
from .arguments import ALWAYS, NoCondition, min_replicas_setting, timeout_setting
from .call import Call
from .codecs import Codec, In, Out, T
from .command import Command
from .commands import Commands
from .connect import LaterCluster, client_from_url, not_a_client, refuse_stale_cache
from .errors import GateClosedError
from .handle import DEFAULT_TTL, Session
from .keyspace import Keyspace, system_random
from .lines import Channel, ClusterLines, Lines
from .sealing import SealingKey, key_rings
from .subjects import Overflow
from .tokens import SignKey
from .values import Values

R = TypeVar("R")

DEFAULT_PREFIX = "sg-session"
DEFAULT_TIMEOUT = 5.0


class SessionGate(Generic[In, Out]):
    """Sessions on stock Redis: signed tokens, named payloads, one atomic script an operation.

    A gate is made once and shared: by threads, and by the children of a fork.

    Args:
        client: the redis-py client to use, `Redis` or `RedisCluster`, or what
            `Sentinel(...).master_for(...)` returns; it stays the application's, and `close` leaves
            it open. Its decoding, protocol, database and timeouts are fine as they are, and its
            retries are not used.
        sign_key: the secret that signs tokens, or a list of them: the first signs, all verify, so
            that a key can be retired without signing anybody out. At least 32 random bytes each.
        prefix: what every key of this gate in Redis begins with; 1 to 200 bytes, no braces.
        max_sessions: how many live sessions a subject may have; None for any number.
        on_overflow: when a subject has that many and opens another, `"evict"` ends its oldest,
            `"reject"` raises TooManySessionsError and needs `max_sessions`.
        timeout: seconds after which a call is over, whatever it waits for and however often it is
            sent again; None leaves it to the client's timeouts.
        min_replicas: how many replicas have to have what a call writes before it returns, 0 to
            1,000; the calls that matter most take one of their own.
        codec: what makes bytes of payloads and back: `JSONCodec()`, `MsgpackCodec()` or one of your
            own (`Codec` says how); bytes and text as they are, if not given.
        sealing_key: the secret that encrypts and authenticates payloads before they leave the
            process, or a list of them: the first seals, all open. 32 random bytes each, or the
            64 hexadecimal digits that `sessiongate keygen` prints. None seals nothing, also in the
            first place of a list.
        accept_unsealed: whether payloads that were never sealed are read all the same: for the time
            of the change-over.
        random: where ids come from, `random(n)` being n bytes; only a test should replace it.

    Raises:
        ConfigurationError: the client, sign key, prefix or another setting cannot be used.

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
        timeout: float | None = DEFAULT_TIMEOUT,
        min_replicas: int = 0,
        codec: Codec[In, Out] | None = None,
        sealing_key: SealingKey | Sequence[SealingKey | None] | None = None,
        accept_unsealed: bool = False,
        random: Callable[[int], bytes] = system_random,
    ) -> None:
        self._closed = False
        self._prefix = prefix
        self._kind = ""
        try:
            rings = key_rings(sign_key, sealing_key, accept_unsealed=accept_unsealed)
        finally:
            del sign_key, sealing_key  # a log that shows the variables of an error shows no key
        if not isinstance(client, Redis | RedisCluster | LaterCluster) or isinstance(
            client, Pipeline | ClusterPipeline
        ):
            raise not_a_client(client, "redis.Redis or redis.RedisCluster", "SessionGate")
        if not isinstance(client, LaterCluster):
            refuse_stale_cache(client)
        self._client = client
        self._timeout = timeout_setting(timeout)
        self._commands: Commands[In, Out] = Commands(
            rings[0],
            Keyspace(prefix, random),
            Values(codec, rings[1]),
            max_sessions=max_sessions,
            on_overflow=on_overflow,
            min_replicas=min_replicas_setting(min_replicas),
        )
        self._kind = self._commands.values.kind
        self._channel: Channel = (
            Lines(client.connection_pool, self._timeout)
            if isinstance(client, Redis)
            else ClusterLines(client, self._timeout)
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
        timeout: float | None = DEFAULT_TIMEOUT,
        min_replicas: int = 0,
        codec: Codec[In, Out] | None = None,
        sealing_key: SealingKey | Sequence[SealingKey | None] | None = None,
        accept_unsealed: bool = False,
        random: Callable[[int], bytes] = system_random,
    ) -> Self:
        """A gate with a client of its own, which `close` closes. Connects at the first call.

        Args:
            url: `redis://[[user]:password@]host[:6379][/database]`, `rediss://` (TLS),
                `unix:///path/to/socket`, `redis+sentinel://host:26379,host:26379/mymaster[/0]`,
                `redis+cluster://host:7000,host:7001`, or `memory://`, a store of this gate's own in
                the process (extra `memory`). Options of redis-py follow a `?`, as in
                `?socket_timeout=1`: how long one try of a call may take, 2 unless you say so.
            sign_key: as for the class.
            prefix: as for the class.
            max_sessions: as for the class.
            on_overflow: as for the class.
            timeout: as for the class.
            min_replicas: as for the class.
            codec: as for the class.
            sealing_key: as for the class.
            accept_unsealed: as for the class.
            random: as for the class.

        Raises:
            ConfigurationError: an argument cannot be used, or the extra is missing.

        Example:
            >>> with SessionGate.from_url("memory://", sign_key="k" * 32) as gate:
            ...     gate.verify(gate.start(300)).isalnum()
            True
        """
        try:
            return cls(
                client_from_url(url),  # type: ignore[arg-type]  # what makes a cluster client later is ours alone
                sign_key=sign_key,
                prefix=prefix,
                max_sessions=max_sessions,
                on_overflow=on_overflow,
                timeout=timeout,
                min_replicas=min_replicas,
                codec=codec,
                sealing_key=sealing_key,
                accept_unsealed=accept_unsealed,
                random=random,
            )
        finally:
            del sign_key, sealing_key

    def start(
        self,
        ttl: int | timedelta,
        payloads: Mapping[str, In] | None = None,
        *,
        subject: str | None = None,
        idle_timeout: int | timedelta | None = None,
        min_replicas: int | None = None,
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
            min_replicas: how many replicas have to have it; the gate's, if not given.

        Returns:
            The token to hand to the client: `v1.<id>.<signature>`, 84 characters.

        Raises:
            ArgumentError: an argument is out of its limits; nothing was sent.
            TooManySessionsError: the subject has `max_sessions`, and the gate rejects more.
            UnderReplicatedError: it was written, but too few replicas had it in time.

        Example:
            >>> token = gate.start(300, {"user": "John Doe", "cart": b"[]"})
            >>> len(token)
            84
            >>> token = gate.start(86_400, {"cart": b"[]"}, subject="alice", idle_timeout=1800)
        """
        command = self._commands.start(ttl, payloads, subject, idle_timeout, min_replicas)
        del payloads  # a log that shows the variables of an error shows no data
        return self._run(command)

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
        self,
        token: str | bytes,
        *,
        grace: int | timedelta | None = None,
        subject: str | None = None,
        min_replicas: int | None = None,
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
            grace: whole seconds (or a timedelta) for which the old token goes on working, 10 unless
                you say so. With a subject there is none to give.
            subject: who the session belongs to from now on, 1 to 200 bytes of UTF-8, whoever it
                belonged to before.
            min_replicas: how many replicas have to have it; the gate's, if not given.

        Returns:
            The new token: `v2.<id>.<generation>.<signature>`, signed with the newest sign key.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired, or the grace of the token is over.
            BadSignatureError: the token was renewed already, by a process that signs with a key
                that this gate does not have.
            TooManySessionsError: the subject has `max_sessions`, and the gate rejects more.
            UnderReplicatedError: it was written, but too few replicas had it in time.
            UnsealError: with a subject, at a gate that seals: a payload was not sealed there.
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
        return self._run(self._commands.renew(token, grace, subject, min_replicas))

    def expire(
        self, token: str | bytes, ttl: int | timedelta, *, min_replicas: int | None = None
    ) -> None:
        """Let the session, payloads included, end `ttl` seconds from now.

        Args:
            token: as `start` or `renew` returned it.
            ttl: whole seconds (or a timedelta), 0 to 100 years. 0 ends it at once.
            min_replicas: how many replicas have to have it; the gate's, if not given.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.
            UnderReplicatedError: it was written, but too few replicas had it in time.
            ArgumentError: the ttl is out of its limits; nothing was sent.

        Example:
            >>> gate.expire(token, 600)
        """
        return self._run(self._commands.expire(token, ttl, min_replicas))

    def pset(  # noqa: PLR0913  # options are keyword-only
        self,
        token: str | bytes,
        name: str,
        data: In,
        *,
        if_absent: bool = False,
        if_match: In | NoCondition = ALWAYS,
        as_: object = None,
        ttl: int | timedelta | None = None,
    ) -> None:
        """Store one payload; when the session ends does not change.

        Args:
            token: as `start` or `renew` returned it.
            name: 1 to 200 bytes of UTF-8.
            data: what the gate's codec encodes, without one bytes or a str, which is stored as
                UTF-8; 1 to 8,000,000 bytes when it is encoded.
            if_absent: store it only if there is no payload of that name.
            if_match: store it only if the payload of that name has this data, as it was read.
            as_: the type that this was read as, if that is not its own, as with `list[float]`.
            ttl: whole seconds (or a timedelta) until the payload is gone, if the session does not
                end before; 0 deletes it. Without, it stays as long as the session.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.
            PayloadConflictError: the condition is not met; nothing was stored.
            UnsealError: with `if_match`, what is there was not sealed there.
            ArgumentError: an argument is out of its limits; nothing was sent.

        Example:
            >>> gate.pset(token, "user", '{"name":"John Doe"}')
            >>> gate.pset(token, "cart", '["book"]', if_match="[]")
            >>> gate.pset(token, "signed in", "yes", ttl=300)
        """
        command = self._commands.pset(
            token, name, data, if_absent=if_absent, if_match=if_match, as_=as_, ttl=ttl
        )
        del data, if_match
        return self._run(command)

    def pset_many(
        self, token: str | bytes, payloads: Mapping[str, In], *, delete: Iterable[str] = ()
    ) -> None:
        """Store several payloads, and delete others, all or none; the session's end stays.

        Args:
            token: as `start` or `renew` returned it.
            payloads: names and data, as for `pset`.
            delete: names of payloads to delete in the same step, if they are there.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.
            ArgumentError: a payload is out of its limits; nothing was sent.

        Example:
            >>> gate.pset_many(token, {"lang": "en", "cart": b"[]"}, delete=["flash"])
        """
        command = self._commands.pset_many(token, payloads, delete)
        del payloads
        return self._run(command)

    @overload
    def pget(self, token: str | bytes, name: str) -> Out: ...

    @overload
    def pget(self, token: str | bytes, name: str, *, as_: type[T]) -> T: ...

    @overload
    def pget(self, token: str | bytes, name: str, *, as_: object) -> Any: ...

    def pget(self, token: str | bytes, name: str, *, as_: object = None) -> object:
        """Read one payload.

        Args:
            token: as `start` or `renew` returned it.
            name: 1 to 200 bytes of UTF-8.
            as_: the type that it is to be of, if the gate's codec knows types: a msgspec struct, a
                dataclass, a builtin type such as `list[int]`. `bytes` or `str` without a codec.

        Returns:
            Its data, decoded: without a codec always bytes.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.
            PayloadNotFoundError: the session holds no payload of that name.
            PayloadDecodeError: the codec cannot decode it, or it is of another type.
            UnsealError: the gate seals, and what is there was not sealed there.
            ArgumentError: the name is out of its limits, or the codec knows no such type; nothing
                was sent.

        Example:
            >>> gate.pget(token, "cart")
            b'[]'
            >>> gate.pget(token, "lang", as_=str)
            'en'
        """
        return self._run(self._commands.pget(token, name, as_))

    def pget_many(self, token: str | bytes, names: Iterable[str]) -> dict[str, Out]:
        """Read several payloads, as they were at one moment.

        Args:
            token: as `start` or `renew` returned it.
            names: each 1 to 200 bytes of UTF-8.

        Returns:
            The data of each, decoded as by `pget`; those that are not there are left out.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.
            PayloadDecodeError: the codec cannot decode one of them.
            UnsealError: the gate seals, and one of them was not sealed there.
            ArgumentError: a name is out of its limits; nothing was sent.

        Example:
            >>> gate.pget_many(token, ["cart", "lang", "nothing"])
            {'cart': b'[]', 'lang': b'en'}
        """
        return self._run(self._commands.pget_many(token, names))

    def pall(self, token: str | bytes) -> dict[str, Out]:
        """Read all payloads, as they were at one moment.

        Args:
            token: as `start` or `renew` returned it.

        Returns:
            The data of each, decoded as by `pget`, in no order.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.
            PayloadDecodeError: the codec cannot decode one of them.
            UnsealError: the gate seals, and one of them was not sealed there.

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

    @overload
    def ppop(self, token: str | bytes, name: str) -> Out: ...

    @overload
    def ppop(self, token: str | bytes, name: str, *, as_: type[T]) -> T: ...

    @overload
    def ppop(self, token: str | bytes, name: str, *, as_: object) -> Any: ...

    def ppop(self, token: str | bytes, name: str, *, as_: object = None) -> object:
        """Read one payload and delete it: for flash messages and one-time codes.

        Of several callers at once exactly one gets it.

        Args:
            token: as `start` or `renew` returned it.
            name: 1 to 200 bytes of UTF-8.
            as_: as for `pget`.

        Returns:
            Its data, decoded: without a codec always bytes.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired.
            PayloadNotFoundError: the session holds no payload of that name.
            PayloadDecodeError: the codec cannot decode it; it is deleted all the same.
            UnsealError: the gate seals, and it was not sealed there; it is deleted all the same.
            ArgumentError: the name is out of its limits, or the codec knows no such type; nothing
                was sent.

        Example:
            >>> gate.ppop(token, "signed in")
            b'yes'
        """
        return self._run(self._commands.ppop(token, name, as_))

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
            ArgumentError: an argument is out of its limits, or the gate seals: Redis cannot count
                what it cannot read. Nothing was sent.

        Example:
            >>> gate.pincr(token, "visits")
            1
            >>> gate.pincr(token, "visits", 10)
            11
        """
        return self._run(self._commands.pincr(token, name, by))

    def open(
        self,
        token: str | bytes | None,
        *,
        names: Iterable[str] | None = None,
        ttl: int | timedelta = DEFAULT_TTL,
        subject: str | None = None,
        idle_timeout: int | timedelta | None = None,
    ) -> Session[In, Out]:
        """The session as a mapping of its payloads: for a `with` block, as a request has one.

        Nothing is sent yet. The first read brings the payloads, in one round trip; leaving the
        block stores what it assigned, deleted or changed in place, in one more, and nothing else.
        An exception stores nothing.

        Args:
            token: as `start` or `renew` returned it; with None a session is started as soon as
                something is to be stored, and `session.token` is then what to send to the client.
            names: the payloads to read, each 1 to 200 bytes of UTF-8; all, if not given.
            ttl: of a session that this starts, as for `start`; a day unless you say so.
            subject: likewise.
            idle_timeout: likewise.

        Returns:
            A mapping of names to values. Using it may raise SessionNotFoundError, at the first read
            and when the block is left, and of a payload UnsealError and PayloadDecodeError.

        Raises:
            InvalidTokenError: the token is malformed or forged.
            ArgumentError: an argument is out of its limits.

        Example:
            >>> with gate.open(token) as session:
            ...     session["cart"] = "3 books"
            >>> with gate.open(token, names=["cart"]) as session:
            ...     session["cart"], session.subject
            (b'3 books', 'alice')
            >>> with gate.open(None) as session:
            ...     session["lang"] = "en"
            >>> session.token[:3]
            'v1.'
        """
        opening = self._commands.opening(ttl, idle_timeout)
        return Session(
            self._commands, self._run, token, names=names, opening=opening, subject=subject
        )

    def end(self, token: str | bytes, *, min_replicas: int | None = None) -> None:
        """End the session: it and all its payloads are gone.

        If it was sent again after a lost reply, a session that is gone by then is no error.

        Args:
            token: as `start` or `renew` returned it.
            min_replicas: how many replicas have to have it; the gate's, if not given.

        Raises:
            InvalidTokenError: the token is malformed or forged; nothing was sent.
            SessionNotFoundError: the session ended or expired before.
            UnderReplicatedError: it was written, but too few replicas had it in time.

        Example:
            >>> gate.end(token)
        """
        return self._run(self._commands.end(token, min_replicas))

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

    def end_all(
        self,
        subject: str,
        *,
        keep: str | bytes | None = None,
        min_replicas: int | None = None,
    ) -> int:
        """End all sessions of a subject, at one moment: sign out everywhere.

        Each session whose start had returned before is dead after this; one that was started
        meanwhile is dead or listed.

        Args:
            subject: as given to `start` or `renew`.
            keep: the token of a session that is not to end. If that is none of the subject's, as
                after a sign-in the token from before it, all end.
            min_replicas: how many replicas have to have it; the gate's, if not given.

        Returns:
            How many ended.

        Raises:
            InvalidTokenError: the token to keep is malformed or forged; nothing was sent.
            UnderReplicatedError: it was written, but too few replicas had it in time.
            ArgumentError: the subject is out of its limits; nothing was sent.

        Example:
            >>> other = gate.start(300, subject="bob")
            >>> gate.end_all("bob", keep=other)
            1
        """
        return self._run(self._commands.end_all(subject, keep, min_replicas))

    def end_one(self, subject: str, session_id: str, *, min_replicas: int | None = None) -> None:
        """End one session of a subject, by its id: sign out that device.

        Args:
            subject: as given to `start` or `renew`.
            session_id: as `sessions` told it.
            min_replicas: how many replicas have to have it; the gate's, if not given.

        Raises:
            SessionNotFoundError: the subject has no live session of that id. That says nothing of
                the caller's own session.
            UnderReplicatedError: it was written, but too few replicas had it in time.
            ArgumentError: an argument is out of its limits; nothing was sent.

        Example:
            >>> (info,) = gate.sessions("bob")
            >>> gate.end_one("bob", info.id)
            >>> gate.sessions("bob")
            []
        """
        return self._run(self._commands.end_one(subject, session_id, min_replicas))

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
        closed = " closed" if self._closed else ""
        return f"<SessionGate prefix={self._prefix!r}{self._kind}{closed}>"

    def _run(self, command: Command[R]) -> R:
        if self._closed:
            raise GateClosedError
        call = Call(command, monotonic() + self._timeout, monotonic)
        while call.goes_on(self._channel.ask(call.command, call.due)):
            if call.pause:
                sleep(call.pause)
        return call.result
