"""A server without memory, under each eviction policy: nothing that is there is called missing.

What is there is asked of Redis itself. A session that was evicted does not come back: one that a
gate did not find must be gone when Redis is asked afterwards, and one that is there afterwards was
there before. Where nothing is evicted the model of each session says the same, without looking.
"""

import asyncio
import random
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from redis import Redis
from redis import exceptions as redis_errors

from sessiongate import AsyncSessionGate, SessionGate, SessionInfo, SessionNotFoundError
from tests.linearizability import No, Operation, State, held, step
from tests.servers import Server, server_binaries

from .calls import Request, answer, generation, request
from .harness import Campaign, Tally
from .rules import check_keys

_OPERATIONS = 1_000  # of each gate on each server under each policy
_SHORT = 100
_POLICIES = (
    *("noeviction", "allkeys-lru", "allkeys-lfu", "allkeys-random"),
    *("volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl"),
)
_GATES = ("threads", "tasks", "pooled")

_SIGN_KEY = "a sign key of the campaigns, 32 bytes and more"
_PREFIX = "sg-session"
_TTL = 3_600
_AGED_MS = 3_000_000  # so much is left of an idle timeout of _TTL that the next use renews it
_SUBJECTS = ("alice", "bob")
_NAMES = ("user", "cart", "hits")
_SESSIONS = 12
_AT_ONCE = 4
_ROOM = 150_000  # bytes that the server may take beyond what it has taken when it is empty
_FILLINGS = (20_000, 1_000, 50)
_MOST_FILLERS = 2_000
_MAX_RENEWALS = 10  # a session remembers 16 tokens

# What may take memory, and so fail without it. All else works without, `end` above all.
_GROWS = frozenset({"start", "pset", "pset_new", "pset_many", "pincr", "renew", "expire"})

_OOM = redis_errors.OutOfMemoryError


class _Gate(Protocol):
    """Either gate, with methods that are awaited."""

    async def ask(self, asked: Request) -> object: ...

    async def close(self) -> None: ...


class _Blocking:
    def __init__(self, port: int) -> None:
        self.gate = SessionGate.from_url(f"redis://127.0.0.1:{port}/0", sign_key=_SIGN_KEY)

    async def ask(self, asked: Request) -> object:
        method, args, options = asked
        try:
            return getattr(self.gate, method)(*args, **options)
        except Exception as error:  # noqa: BLE001  # it is judged
            return error

    async def close(self) -> None:
        self.gate.close()


class _Awaited:
    def __init__(self, port: int, *, auto_pipeline: bool) -> None:
        self.gate = AsyncSessionGate.from_url(
            f"redis://127.0.0.1:{port}/0", sign_key=_SIGN_KEY, auto_pipeline=auto_pipeline
        )

    async def ask(self, asked: Request) -> object:
        method, args, options = asked
        try:
            return await getattr(self.gate, method)(*args, **options)
        except Exception as error:  # noqa: BLE001  # it is judged
            return error

    async def close(self) -> None:
        await self.gate.aclose()


def _gate(kind: str, port: int) -> _Gate:
    if kind == "threads":
        return _Blocking(port)
    return _Awaited(port, auto_pipeline=kind == "tasks")


@dataclass(eq=False)
class _Session:
    """A session as it must be if it is there."""

    token: str
    subject: str | None
    state: State

    @property
    def id(self) -> str:
        return self.token[3:19]

    @property
    def key(self) -> str:
        return f"{_PREFIX}:{{{self.id}}}"


@dataclass
class _Scene:
    """One gate on one full server under one policy."""

    about: str
    client: Redis
    gate: _Gate
    policy: str
    dice: random.Random
    tally: Tally
    evicts: bool = False
    sessions: list[_Session] = field(default_factory=list)
    fillers: int = 0
    written: int = 0

    async def play(self, count: int) -> None:
        try:
            self._clear()
            for _ in range(_SESSIONS):
                await self._start()
            used = self.client.info("memory")["used_memory"]
            self.client.config_set("maxmemory", used + _ROOM)
            self.client.config_set("maxmemory-policy", self.policy)
            self.evicts = self.policy != "noeviction"
            self._fill()
            for _ in range(0, count, _AT_ONCE):
                await self._turn()
            await self._look()
        finally:
            await self.gate.close()

    def _clear(self) -> None:
        self.client.config_set("maxmemory", 0)
        self.client.config_set("maxmemory-policy", "noeviction")
        self.client.flushall()

    def _fill(self) -> None:
        """Fill the server until it refuses more or evicts, the last bytes too."""
        lasting = self.dice.random() < 0.5  # what the volatile policies leave alone
        before = self.client.info("stats")["evicted_keys"]
        for size in _FILLINGS:
            for _ in range(_MOST_FILLERS):
                self.fillers += 1
                name = f"filler:{self.fillers}"
                try:
                    self.client.set(name, b"x" * size, ex=None if lasting else _TTL)
                except _OOM:
                    break
                if self.fillers % 8 == 0 and self.client.info("stats")["evicted_keys"] > before:
                    return

    # Turns

    async def _turn(self) -> None:
        """Some calls at once, each of another session."""
        dice = self.dice
        choice = dice.random()
        if choice < 0.05:
            self._fill()
        elif choice < 0.08:
            # Now there is room for something, until the next fill.
            self.client.delete(*(f"filler:{dice.randint(1, self.fillers)}" for _ in range(3)))
        elif choice < 0.10:
            self.client.script_flush()
        elif choice < 0.12:
            await self._end_all(dice.choice(_SUBJECTS))
        elif choice < 0.20:
            await self._list(dice.choice(_SUBJECTS))
        chosen = dice.sample(self.sessions, min(_AT_ONCE, len(self.sessions)))
        calls: list[Awaitable[None]] = [self._use(session) for session in chosen]
        if len(self.sessions) < _SESSIONS:
            calls.append(self._start())
        await asyncio.gather(*calls)
        self.tally.add("operations", len(calls))

    async def _start(self) -> None:
        dice = self.dice
        subject = dice.choice([None, *_SUBJECTS])
        payloads = {name: self._new() for name in dice.sample(_NAMES, dice.randint(0, 3))}
        options: dict[str, object] = {"subject": subject, "idle_timeout": dice.choice([None, _TTL])}
        result = await self.gate.ask(Request("start", (_TTL, payloads), options))
        if isinstance(result, str):
            self.sessions.append(_Session(result, subject, State(held(payloads))))
        elif isinstance(result, _OOM):
            self.tally.add("out of memory")
        else:
            self._wrong(f"start came to {result!r}")

    def _new(self) -> bytes:
        self.written += 1
        return b"%d" % self.written + b"0" * self.dice.choice([0, 0, 0, 50, 50, 1_000])

    async def _use(self, session: _Session) -> None:
        if self.dice.random() < 0.2:
            self._age(session)
        choice = self.dice.random()
        if choice < 0.05:
            await self._info(session)
        elif choice < 0.10:
            await self._expire(session)
        elif choice < 0.15:
            await self._sign_in(session)
        elif choice < 0.17 and session.subject:
            await self._end_one(session)
        else:
            await self._ask(session, self._operation(session.state))

    def _age(self, session: _Session) -> None:
        """If it has an idle timeout the next use has to write, even to read."""
        self.client.pexpire(session.key, _AGED_MS)

    def _operation(self, state: State) -> Operation:
        dice = self.dice
        name = dice.choice(_NAMES)
        token = state.generation
        kinds = {"pget": 6, "pset": 6, "swap": 3, "pset_new": 3, "pset_many": 3, "pincr": 4}
        kinds |= {"pdel": 3, "ppop": 3, "pall": 4, "pget_many": 2, "touch": 2, "end": 1}
        if state.generation < _MAX_RENEWALS:
            kinds["renew"] = 2
        kind = dice.choices(list(kinds), list(kinds.values()))[0]
        if kind == "swap":
            held_now = dict(state.payloads or ()).get(name, b"?")
            expected = held_now if dice.random() < 0.8 else b"never written"
            return Operation("pset", name, self._new(), expected, token=token)
        if kind in ("pset", "pset_new"):
            return Operation(kind, name, self._new(), token=token)
        if kind.endswith("_many"):
            many = held({name: self._new() for name in dice.sample(_NAMES, 2)})
            return Operation(kind, many=many, token=token)
        if kind == "renew":
            return Operation(kind, grace=dice.random() < 0.5, token=token)
        of_all = kind in ("pall", "touch", "end")
        return Operation(kind, "" if of_all else name, token=token)

    async def _ask(self, session: _Session, operation: Operation) -> None:
        """Ask for what the model knows the answer to."""
        expected, after = step(operation, session.state)
        asked = request(operation, session.token)
        if operation.kind.startswith("pset") and operation.kind != "pset_many":
            asked.options.update(self.dice.choice([{}, {}, {"ttl": _TTL}]))
        result = await self.gate.ask(asked)
        if self._failed(session, operation.kind, result):
            return
        said = answer(result)
        if said != expected:
            self._wrong(f"{operation} of {session.state} came to {result!r}, not {expected!r}")
        session.state = after
        if isinstance(result, str):
            session.token = result
        if operation.kind == "end":
            self._ended(session)

    def _failed(self, session: _Session, kind: str, result: object) -> bool:
        """Whether a call found no memory or no session, rightly or not: then it changed nothing."""
        if isinstance(result, _OOM):
            self.tally.add("out of memory")
            if kind not in _GROWS:
                self._wrong(f"{kind} came to {result!r}, and it needs no memory")
            return True
        if isinstance(result, SessionNotFoundError):
            self._lose(session, kind)
            return True
        if isinstance(result, Exception) and not _is_refusal(result):
            self._wrong(f"{kind} came to {result!r}")
            return True
        return False

    def _lose(self, session: _Session, kind: str) -> None:
        """A call did not find a session: it must have been evicted."""
        if not self.evicts:
            self._wrong(f"{kind} did not find session {session.id}, and nothing is evicted")
        elif self.client.exists(session.key):
            self._wrong(f"{kind} did not find session {session.id}, which is there")
        self.tally.add("evicted")
        self.sessions.remove(session)

    def _ended(self, session: _Session) -> None:
        if self.client.exists(session.key):
            self._wrong(f"session {session.id} has ended, and it is there")
        self.sessions.remove(session)

    async def _info(self, session: _Session) -> None:
        result = await self.gate.ask(Request("info", (session.token,), {}))
        if self._failed(session, "info", result):
            return
        sizes = {name: len(data) for name, data in session.state.payloads or ()}
        if not isinstance(result, SessionInfo) or (
            (result.subject, result.generation, dict(result.payloads))
            != (session.subject, session.state.generation, sizes)
        ):
            self._wrong(f"info came to {result!r} of {session}")

    async def _expire(self, session: _Session) -> None:
        result = await self.gate.ask(Request("expire", (session.token, _TTL), {}))
        if not self._failed(session, "expire", result) and result is not None:
            self._wrong(f"expire came to {result!r}")

    async def _sign_in(self, session: _Session) -> None:
        subject = self.dice.choice(_SUBJECTS)
        asked = Request("renew", (session.token,), {"subject": subject})
        result = await self.gate.ask(asked)
        if self._failed(session, "renew", result):
            return
        if not isinstance(result, str):
            self._wrong(f"renew came to {result!r}")
            return
        before = session.key
        session.token, session.subject = result, subject
        session.state = State(session.state.payloads, generation(result))
        if self.client.exists(before):
            self._wrong(f"session {session.id} has another id, and {before} is there")

    async def _end_one(self, session: _Session) -> None:
        result = await self.gate.ask(Request("end_one", (session.subject, session.id), {}))
        if self._failed(session, "end_one", result):
            return
        if result is not None:
            self._wrong(f"end_one came to {result!r}")
        self._ended(session)

    async def _list(self, subject: str) -> None:
        """An index that was evicted forgets whose the sessions are: then some are not listed."""
        result = await self.gate.ask(Request("sessions", (subject,), {}))
        if not isinstance(result, list):
            self._wrong(f"sessions came to {result!r}")
            return
        listed = {info.id for info in result}
        mine = {session.id for session in self.sessions if session.subject == subject}
        if listed - mine or (mine - listed and not self.evicts):
            self._wrong(f"sessions lists {listed}, not {mine}")

    async def _end_all(self, subject: str) -> None:
        result = await self.gate.ask(Request("end_all", (subject,), {}))
        mine = [session for session in self.sessions if session.subject == subject]
        if not isinstance(result, int) or result > len(mine):
            self._wrong(f"end_all of {len(mine)} came to {result!r}")
            return
        if result < len(mine) and not self.evicts:
            self._wrong(f"end_all of {len(mine)} ended {result}")
        for session in mine:
            if not self.client.exists(session.key):
                self.sessions.remove(session)

    # The end

    async def _look(self) -> None:
        """What is left is answered rightly and can be ended, with not a byte of memory left."""
        self.evicts = False
        self.client.config_set("maxmemory-policy", "noeviction")
        self.client.config_set("maxmemory", 1)
        for session in list(self.sessions):
            if not self.client.exists(session.key):
                self.sessions.remove(session)
        known = {session.key.encode() for session in self.sessions}
        there = {key for key in self._keys() if b":subject:" not in key}
        if there != known:
            self._wrong(f"{there - known} are there, and {known - there} are not")
        check_keys(self.client, self.tally, f"{_PREFIX}*")
        for session in list(self.sessions):
            await self._use_once_more(session)
        self.client.script_flush()
        for subject in _SUBJECTS:
            listed = await self.gate.ask(Request("sessions", (subject,), {}))
            if not isinstance(listed, list):
                self._wrong(f"sessions came to {listed!r}")
        for session in list(self.sessions):
            if session.subject and self.dice.random() < 0.3:
                await self._end_one(session)
            else:
                await self._ask(session, Operation("end", token=session.state.generation))
            self.tally.add("ends without a byte left")
        left = [key for key in self._keys() if b":subject:" not in key]
        if left:
            self._wrong(f"all sessions have ended, and {left} are there")

    async def _use_once_more(self, session: _Session) -> None:
        """Ask for what needs memory, and whether that changed anything; then for the rest."""
        self._age(session)
        token = session.state.generation
        grows = self.dice.choice(
            [
                Operation("pset", "user", b"more", token=token),
                Operation("pincr", "count", token=token),
                Operation("pset_many", many=held({"cart": b"a", "user": b"b"}), token=token),
                Operation("renew", token=token),
            ]
        )
        works = [Operation(kind, "user", token=token) for kind in ("pget", "pdel", "ppop")]
        for operation in (grows, Operation("pall", token=token), *works):
            await self._ask(session, operation)
        await self._info(session)

    def _keys(self) -> Iterator[bytes]:
        return self.client.scan_iter(f"{_PREFIX}*", count=1_000)

    def _wrong(self, what: str) -> None:
        self.tally.wrong.append(f"{self.about}: {what}")


def _is_refusal(error: Exception) -> bool:
    try:
        return isinstance(answer(error), No)
    except Exception:  # noqa: BLE001  # it is the error itself
        return False


def run(dice: random.Random, scale: float) -> Tally:
    count = max(_AT_ONCE, round(_OPERATIONS * scale))
    tally = Tally()
    for name, binary in server_binaries().items():
        with Server(binary) as server, server.client() as client:
            known = [policy for policy in _POLICIES if _knows(client, policy)]
            tally.add("policies of servers", len(known))
            for number, policy in enumerate(known):
                # A short run has each gate meet some policies, not all.
                kinds = _GATES if count > _SHORT else [_GATES[number % len(_GATES)]]
                for kind in kinds:
                    about = f"{name}, {policy}, {kind}"
                    its_dice = random.Random(dice.getrandbits(64))  # noqa: S311  # no secret
                    gate = _gate(kind, server.port)
                    scene = _Scene(about, client, gate, policy, its_dice, tally)
                    asyncio.run(scene.play(count))
    tally.figures["evicted"] = f"{tally.did.pop('evicted', 0):,}"
    return tally


def _knows(client: Redis, policy: str) -> bool:
    try:
        client.config_set("maxmemory-policy", policy)
    except redis_errors.ResponseError:
        return False
    return True


CAMPAIGNS = [
    Campaign(
        "memory",
        "maxmemory reached, every eviction policy: `end` always works; errors are OOM, "
        'never "not found" for what is there',
        run,
        0.05,
    )
]
