"""Every operation with a fault of the network at every byte of its requests and replies.

A case is one call through a proxy that is armed with one fault. What it returned and what Redis
holds afterwards shows whether it ran once, or, if it raised an error, once or not at all.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import combinations, product
from typing import NamedTuple, cast

from redis import Redis
from redis.exceptions import ConnectionError, TimeoutError

from sessiongate import (
    PayloadConflictError,
    PayloadNotFoundError,
    SessionGate,
    SessionInfo,
    SessionNotFoundError,
)
from sessiongate.arguments import names_arg
from sessiongate.command import Command
from sessiongate.commands import Opened
from sessiongate.sealing import SealingKeyRing
from tests.conftest import FLAVOURS, SIGN_KEY, Blocking, Flavour
from tests.faults import DIRECTIONS, FAULTS, Direction, Fault, FaultProxy, Passed
from tests.servers import Server, server_binaries

from .harness import Campaign, Tally
from .rules import TOLERANCE, Stalls

_TRIES = 20
_TURNS = 5
_PLAYERS = 12  # most of the time each waits for a timeout
_BATCH = "several at once"

# What a call and each try of it may take, in seconds.
_CALL = 0.4
_TRY = 0.1

# What connections do to what they carry. They neither duplicate bytes nor lose them.
_REAL: tuple[Fault, ...] = ("reset", "stall", "split")

_TTL = 300
_PAYLOADS = {"user": b"John Doe", "count": b"41", "cart": b"[]"}
_MANY = {f"name{number}": b"%d" % number for number in range(60)}
_HEAD = 12  # bytes: the number of arguments and more
_THEIRS = {"user": b"Jane Roe"}

_SEALING_KEY = bytes(range(32))
_RING = SealingKeyRing(_SEALING_KEY)

# What a connection that is lost, cut or silent becomes. Anything else was not foreseen.
_LOST = (ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Held:
    """What Redis holds of a session."""

    payloads: Mapping[str, bytes]
    subject: str = ""
    generation: int = 0
    ttl: int = _TTL  # to the next ten seconds
    timed: frozenset[str] = frozenset()  # the payloads with an end of their own

    def stored(self, name: str, data: bytes, *, timed: bool = False) -> "Held":
        others = self.timed - {name}
        return replace(
            self,
            payloads={**self.payloads, name: data},
            timed=others | {name} if timed else others,
        )

    def without(self, name: str) -> "Held":
        payloads = {other: data for other, data in self.payloads.items() if other != name}
        return replace(self, payloads=payloads, timed=self.timed - {name})


# Sessions by their ids. One that the scene did not know goes under the name of NEW.
World = dict[str, Held]
NEW = "new"


class Seen(NamedTuple):
    """What a database holds."""

    world: World
    opens: dict[str, bytes]  # the fingerprint of the token that opens the session of an id
    listed: set[str]  # the ids in all indexes
    endless: list[bytes]  # keys without a ttl


@dataclass(frozen=True)
class Scene:
    """What there is before the call: sessions of alice or of nobody, and one of bob's."""

    gate: SessionGate  # straight to the server
    token: str
    second: str  # alice's other one, if the operation asks for her
    theirs: str
    payloads: Mapping[str, bytes]  # of mine

    def id_of(self, token: str) -> str:
        return self.gate.verify(token)

    @property
    def seals(self) -> bool:
        """Whether the payloads of mine are sealed."""
        return self.gate._commands.values.seals

    @property
    def ids(self) -> set[str]:
        return {self.id_of(token) for token in (self.token, self.second, self.theirs) if token}

    def before(self) -> World:
        mine = Held(self.payloads, "alice" if self.second else "")
        world = {self.id_of(self.token): mine, self.id_of(self.theirs): Held(_THEIRS, "bob")}
        return world | ({self.id_of(self.second): mine} if self.second else {})

    def with_mine(self, world: World, change: Callable[[Held], Held]) -> World:
        its_id = self.id_of(self.token)
        return {**world, its_id: change(world[its_id])}

    def without(self, world: World, *tokens: str) -> World:
        gone = {self.id_of(token) for token in tokens}
        return {its_id: held for its_id, held in world.items() if its_id not in gone}


def _unchanged(_: Scene, world: World) -> World:
    return world


def _mine(change: Callable[[Held], Held]) -> Callable[[Scene, World], World]:
    return lambda scene, world: scene.with_mine(world, change)


IsRight = Callable[[Scene, object, "Seen"], bool]


class Operation(NamedTuple):
    """One call: what it is to return, what it does to the world, and whether it is repeated."""

    call: Callable[[SessionGate, Scene], object]
    is_right: IsRight = lambda _scene, result, _seen: result is None
    effect: Callable[[Scene, World], World] = _unchanged
    repeats: bool = True
    refusal: type[Exception] | None = None  # raised by it in the place of a result
    of_alice: bool = False
    connects: bool = False  # first, and it is there that the faults strike
    head: int | None = None  # only in so many bytes of its request
    seals: bool = False  # it is given a gate that does
    payloads: Mapping[str, bytes] = _PAYLOADS  # of the session that it is about


def _returns(expected: object) -> IsRight:
    return lambda _scene, result, _seen: result == expected


def _opens_mine(scene: Scene, token: object, seen: Seen) -> bool:
    its_id, fingerprint, generation = _read(scene, token)
    return its_id == scene.id_of(scene.token) and (
        (fingerprint, generation) == (seen.opens[its_id], seen.world[its_id].generation)
    )


def _opens_new(scene: Scene, token: object, seen: Seen) -> bool:
    its_id, fingerprint, generation = _read(scene, token)
    return its_id not in scene.ids and (
        (fingerprint, generation) == (seen.opens[NEW], seen.world[NEW].generation)
    )


def _read(scene: Scene, token: object) -> tuple[str, bytes, int]:
    return scene.gate._commands._ring.verify(cast("str", token))


_SIZES = {name: len(data) for name, data in _PAYLOADS.items()}


def _tells(
    scene: Scene,
    token: str,
    subject: str | None,
    info: object,
    sizes: Mapping[str, int] = _SIZES,
) -> bool:
    assert isinstance(info, SessionInfo)
    lasts = (info.expires_at - info.created_at).total_seconds()
    told = (info.id, info.subject, info.generation, info.idle_timeout, info.payloads, round(lasts))
    return told == (scene.id_of(token), subject, 0, None, sizes, _TTL)


def _tells_all(scene: Scene, result: object, _: Seen) -> bool:
    assert isinstance(result, list)
    pairs = zip(result, (scene.token, scene.second), strict=True)
    return all(_tells(scene, token, "alice", info) for info, token in pairs)


def _open(names: tuple[str, ...] | None) -> Callable[[SessionGate, Scene], object]:
    """What a handle sends, which reads at once here."""
    fields = names_arg(names) if names else None

    def read(gate: SessionGate, scene: Scene) -> object:
        commands = scene.gate._commands
        return gate._run(commands.open(commands.session(scene.token), fields))

    return read


def _tells_and_holds(*names: str) -> IsRight:
    held = {name.encode(): _PAYLOADS[name] for name in names}

    def is_right(_scene: Scene, result: object, _seen: Seen) -> bool:
        assert isinstance(result, Opened)
        left = (result.expires_at - datetime.now(UTC)).total_seconds()
        return (result.stored, result.subject) == (held, None) and 0 < left <= _TTL

    return is_right


def _sign_in(gate: SessionGate, scene: Scene) -> object:
    """What a gate that seals sends: it reads the session, and has its payloads replaced."""
    return gate._run(scene.gate._commands.renew(scene.token, None, "carol", 0))


def _replace(gate: SessionGate, scene: Scene) -> object:
    """The second step of that alone."""
    export = scene.gate._commands.renew(scene.token, None, "carol", 0)
    answer = scene.gate._run(export._replace(decode=lambda answer: answer.decode("latin-1")))
    enroll = export.decode(answer.encode("latin-1"))
    assert isinstance(enroll, Command)
    return gate._run(enroll)


_SIGN_IN = Operation(
    _sign_in,
    _opens_new,
    lambda scene, world: {
        **scene.without(world, scene.token),
        NEW: Held(scene.payloads, "carol", 1),
    },
    seals=True,
)
_PGET = Operation(lambda gate, scene: gate.pget(scene.token, "user"), _returns(b"John Doe"))
_PSET = Operation(
    lambda gate, scene: gate.pset(scene.token, "cart", "[1]"),
    effect=_mine(lambda held: held.stored("cart", b"[1]")),
    repeats=False,
)
_PINCR = Operation(
    lambda gate, scene: gate.pincr(scene.token, "count"),
    _returns(42),
    _mine(lambda held: held.stored("count", b"42")),
    repeats=False,
)
_EXPIRE = Operation(
    lambda gate, scene: gate.expire(scene.token, 600),
    effect=_mine(lambda held: replace(held, ttl=600)),
    repeats=False,
)
_END = Operation(
    lambda gate, scene: gate.end(scene.token),
    effect=lambda scene, world: scene.without(world, scene.token),
)

OPERATIONS: dict[str, Operation] = {
    "start": Operation(
        lambda gate, _: gate.start(_TTL),
        _opens_new,
        lambda _, world: {**world, NEW: Held({})},
    ),
    "start of a subject's": Operation(
        lambda gate, _: gate.start(600, {"a": "1", "b": "2"}, subject="alice"),
        _opens_new,
        lambda _, world: {**world, NEW: Held({"a": b"1", "b": b"2"}, "alice", ttl=600)},
    ),
    "touch": Operation(lambda gate, scene: gate.touch(scene.token)),
    "info": Operation(
        lambda gate, scene: gate.info(scene.token),
        lambda scene, result, _: _tells(scene, scene.token, None, result),
    ),
    "renew": Operation(
        lambda gate, scene: gate.renew(scene.token),
        _opens_mine,
        _mine(lambda held: replace(held, generation=1)),
    ),
    "renew with a subject": Operation(
        lambda gate, scene: gate.renew(scene.token, subject="carol"),
        _opens_new,
        lambda scene, world: {
            **scene.without(world, scene.token),
            NEW: Held(_PAYLOADS, "carol", 1),
        },
    ),
    "sealed renew with a subject": _SIGN_IN,
    "expire": _EXPIRE,
    "expire of a subject's": _EXPIRE._replace(of_alice=True),
    "pset": _PSET,
    "pset if_match": Operation(
        lambda gate, scene: gate.pset(scene.token, "cart", "[1]", if_match="[]"),
        effect=_mine(lambda held: held.stored("cart", b"[1]")),
        repeats=False,
    ),
    "pset if_absent": Operation(
        lambda gate, scene: gate.pset(scene.token, "lang", "en", if_absent=True),
        effect=_mine(lambda held: held.stored("lang", b"en")),
        repeats=False,
    ),
    "pset ttl": Operation(
        lambda gate, scene: gate.pset(scene.token, "code", "123", ttl=100),
        effect=_mine(lambda held: held.stored("code", b"123", timed=True)),
        repeats=False,
    ),
    "pset_many": Operation(
        lambda gate, scene: gate.pset_many(scene.token, {"user": "new", "lang": "en"}),
        effect=_mine(lambda held: held.stored("user", b"new").stored("lang", b"en")),
        repeats=False,
    ),
    "pset_many with deletes": Operation(
        lambda gate, scene: gate.pset_many(scene.token, {"user": "new"}, delete=["cart", "no"]),
        effect=_mine(lambda held: held.stored("user", b"new").without("cart")),
        repeats=False,
    ),
    "pset_many of deletes": Operation(
        lambda gate, scene: gate.pset_many(scene.token, {}, delete=["cart", "count"]),
        effect=_mine(lambda held: held.without("cart").without("count")),
        repeats=False,
    ),
    "open": Operation(_open(None), _tells_and_holds("user", "count", "cart")),
    "open with names": Operation(_open(("user", "cart", "no")), _tells_and_holds("user", "cart")),
    "pget": _PGET,
    "pget_many": Operation(
        lambda gate, scene: gate.pget_many(scene.token, ["user", "cart", "no"]),
        _returns({"user": b"John Doe", "cart": b"[]"}),
    ),
    "pall": Operation(lambda gate, scene: gate.pall(scene.token), _returns(_PAYLOADS)),
    "pdel": Operation(
        lambda gate, scene: gate.pdel(scene.token, "cart"),
        effect=_mine(lambda held: held.without("cart")),
    ),
    "ppop": Operation(
        lambda gate, scene: gate.ppop(scene.token, "cart"),
        _returns(b"[]"),
        _mine(lambda held: held.without("cart")),
        repeats=False,
    ),
    "pincr": _PINCR,
    "end": _END,
    "sessions": Operation(lambda gate, _: gate.sessions("alice"), _tells_all, of_alice=True),
    "end_all": Operation(
        lambda gate, _: gate.end_all("alice"),
        _returns(2),
        lambda scene, world: scene.without(world, scene.token, scene.second),
        repeats=False,
        of_alice=True,
    ),
    "end_one": _END._replace(
        call=lambda gate, scene: gate.end_one("alice", scene.id_of(scene.token)), of_alice=True
    ),
    # One digit less in the number of arguments, and their script would have fewer of them.
    "start with many": Operation(
        lambda gate, _: gate.start(_TTL, _MANY),
        _opens_new,
        lambda _, world: {**world, NEW: Held(_MANY)},
        head=_HEAD,
    ),
    "pset_many of many": Operation(
        lambda gate, scene: gate.pset_many(scene.token, _MANY),
        effect=_mine(lambda held: replace(held, payloads={**held.payloads, **_MANY})),
        repeats=False,
        head=_HEAD,
    ),
    "pset_many of many deletes": Operation(
        lambda gate, scene: gate.pset_many(scene.token, {"lang": "en"}, delete=["cart", *_MANY]),
        effect=_mine(lambda held: held.stored("lang", b"en").without("cart")),
        repeats=False,
        head=_HEAD,
    ),
    "replacement of many": _SIGN_IN._replace(call=_replace, head=_HEAD, payloads=_MANY),
    "open with many names": Operation(
        _open(("user", *_MANY)), _tells_and_holds("user"), head=_HEAD
    ),
    # What fails before the request leaves is no reason not to send it.
    "connecting": _PINCR._replace(repeats=True, connects=True),
    # And what is refused.
    "pget of nothing": Operation(
        lambda gate, scene: gate.pget(scene.token, "no"), refusal=PayloadNotFoundError
    ),
    "pset in vain": Operation(
        lambda gate, scene: gate.pset(scene.token, "cart", "[1]", if_absent=True),
        repeats=False,
        refusal=PayloadConflictError,
    ),
    "touch of nothing": Operation(
        lambda gate, scene: gate.touch(scene.gate._commands._ring.sign("G" * 16)[0]),
        refusal=SessionNotFoundError,
    ),
}

Parts = tuple[Operation, ...]

# Calls of an asynchronous gate that leave in one packet. None changes what another returns: those
# that are repeated come late.
_TOGETHER: Parts = (
    _PGET,
    Operation(lambda gate, scene: gate.pget(scene.theirs, "user"), _returns(b"Jane Roe")),
    _PSET,
    _PINCR,
)


class Case(NamedTuple):
    """One call with one fault at one byte."""

    flavour: str
    name: str
    fault: Fault
    direction: Direction
    offset: int


_LOOK = """
local told = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kind, held = redis.call('TYPE', key).ok, {}
  if kind == 'hash' then held = redis.call('HGETALL', key) end
  if kind == 'zset' then held = redis.call('ZRANGE', key, 0, -1) end
  told[#told + 1] = {key, kind, redis.call('PTTL', key), held}
end
return told
"""


class Player:
    """Plays cases, one after the other, on a database of its own."""

    def __init__(self, server: Server, database: int, stalls: Stalls, stack: ExitStack) -> None:
        self.tally = Tally()
        self.longest = 0.0
        self.late = 0  # turns that failed since the machine was slow
        self._late = False
        self._stalls = stalls
        self._proxy = stack.enter_context(FaultProxy(server.port))
        self._client = Redis(port=server.port, db=database, protocol=2)
        stack.callback(self._client.close)
        self._direct = SessionGate(self._client, sign_key=SIGN_KEY)
        self._sealing = SessionGate(self._client, sign_key=SIGN_KEY, sealing_key=_SEALING_KEY)
        self._look = self._client.register_script(_LOOK)
        url = f"redis://127.0.0.1:{self._proxy.port}/{database}?socket_timeout={_TRY}"
        self._flavours = {name: Flavour(name) for name in FLAVOURS}
        self._gates: dict[str, SessionGate] = {}
        for name, flavour in self._flavours.items():
            stack.callback(flavour.close)
            self._gates[name] = flavour.gate_from_url(url, timeout=_CALL)

    def sizes(self, flavour: str, name: str) -> Passed:
        """How many bytes of each direction a fault may strike, as a call without one shows."""
        for _ in range(2):  # the first time it may have to send its script
            scene = self._ready(flavour, name)
            self._proxy.arm(None)
            self._call(flavour, _parts(name), scene)
        passed = self._proxy.passed
        if _parts(name)[0].connects:
            warm = self.sizes(flavour, "pincr")
            return Passed(passed.request - warm.request, passed.reply - warm.reply)
        return Passed(_parts(name)[0].head or passed.request, passed.reply)

    def play(self, case: Case) -> None:
        """Play a case and note what was wrong with it.

        If it failed since the machine was slow it is played again: it would not be so every time.
        """
        self.tally.add("cases")
        for _ in range(_TURNS):
            self._late = False
            wrong = self._play(case)
            self.late += self._late
            if wrong or not self._late:
                break
        else:
            wrong = ["failed for lack of time, and did so each time"]
        self.tally.wrong += [f"{tuple(case)}: {what}" for what in wrong]

    def _play(self, case: Case) -> list[str]:
        parts = _parts(case.name)
        scene = self._ready(case.flavour, case.name)
        self._proxy.arm(case.fault, case.direction, case.offset)
        begun = time.monotonic()
        outcomes = self._call(case.flavour, parts, scene)
        took = time.monotonic() - begun
        struck = self._proxy.struck
        lost = [outcome for outcome in outcomes if isinstance(outcome, _LOST)]
        seen = self._see(scene)
        wrong = [*self._wrong_calls(case, outcomes, begun, took)]
        wrong += _wrong_world(scene, parts, outcomes, seen)
        if case.fault == "stall":
            self._proxy.release(ghost=True)
            ghost = _wrong_world(scene, parts, outcomes, self._see(scene), results=False)
            wrong += [f"with a ghost: {what}" for what in ghost]
        self._proxy.arm(None)
        wrong += self._wrong_afterwards(case, scene)
        self.tally.add("struck", struck)
        self.tally.add("lost calls", len(lost))
        self.longest = max(self.longest, took)
        return wrong

    def _ready(self, flavour: str, name: str) -> Scene:
        """All as it is to be before the call."""
        parts = _parts(name)
        scene = self._prepare(parts)
        if parts[0].connects:
            self._proxy.cut()
            # An event loop hears of it when it runs.
            self._flavours[flavour].runner.run(asyncio.sleep(0.005))
        else:
            self._connect(flavour, scene)
        return scene

    def _prepare(self, parts: Parts) -> Scene:
        self._client.flushdb()
        first = parts[0]
        direct = self._sealing if first.seals else self._direct
        subject = "alice" if first.of_alice else None
        token = direct.start(_TTL, first.payloads, subject=subject)
        second = direct.start(_TTL, first.payloads, subject="alice") if subject else ""
        # The next call reads it, by a gate that does not seal.
        theirs = self._direct.start(_TTL, _THEIRS, subject="bob")
        return Scene(direct, token, second, theirs, first.payloads)

    def _connect(self, flavour: str, scene: Scene) -> None:
        """See to it that there is a connection, however slow the machine is."""
        for _ in range(_TRIES):
            with suppress(*_LOST):
                return self._gates[flavour].touch(scene.theirs)
        raise AssertionError("no connection")

    def _call(self, flavour: str, parts: Parts, scene: Scene) -> list[object]:
        """What each of them returned or raised."""
        gate = self._gates[flavour]
        if len(parts) == 1:
            try:
                return [parts[0].call(gate, scene)]
            except Exception as error:  # noqa: BLE001  # which one is judged
                return [error]
        awaited = cast("SessionGate", cast("Blocking", gate).awaited)

        async def together() -> list[object]:
            calls = [cast("Awaitable[object]", part.call(awaited, scene)) for part in parts]
            return await asyncio.gather(*calls, return_exceptions=True)

        return self._flavours[flavour].runner.run(together())

    def _see(self, scene: Scene) -> Seen:
        seen = Seen({}, {}, set(), [])
        # Indexes first.
        for key, kind, ttl, held in sorted(self._look(), key=lambda row: row[1] != b"zset"):
            if ttl <= 0:
                seen.endless.append(key)
            if kind == b"zset":
                seen.listed.update(entry[16:].decode() for entry in held)
            elif kind == b"hash":
                its_id = key.partition(b"{")[2].rstrip(b"}").decode()
                name = its_id if its_id in scene.ids or NEW in seen.world else NEW
                fields = dict(zip(held[::2], held[1::2], strict=True))
                sealed_in = its_id if scene.seals and name != scene.id_of(scene.theirs) else ""
                seen.world[name] = _held(fields, ttl, sealed_in)
                seen.opens[name] = fields.get(b"fp", b"")[:16]
                if name == NEW:
                    seen.listed.update({NEW} if its_id in seen.listed else ())
        return seen

    def _wrong_calls(
        self, case: Case, outcomes: list[object], begun: float, took: float
    ) -> Iterator[str]:
        stalled = self._stalls.between(begun, begun + took)
        for part, outcome in zip(_parts(case.name), outcomes, strict=True):
            if _is_known(part, outcome):
                continue
            if not isinstance(outcome, _LOST):
                yield f"raised {outcome!r}"
            elif part.repeats or case.fault == "split":
                # A try was lost that the fault did not harm.
                if took >= (2 * _TRY if part.repeats else _TRY) or stalled:
                    self._late = True
                else:
                    yield f"raised {outcome!r} after {took:.3f} s"
        if took > _CALL + TOLERANCE + stalled:
            yield f"took {took:.3f} s, of which it was stalled for {stalled:.3f}"

    def _wrong_afterwards(self, case: Case, scene: Scene) -> Iterator[str]:
        """The next call has a sound connection, and gets its own reply."""
        gate = self._gates[case.flavour]
        begun = time.monotonic()
        try:
            if case.offset % 2:  # now and then it is one that would not be repeated
                gate.pset(scene.theirs, "next", "1")
            if (got := gate.pget(scene.theirs, "user")) != b"Jane Roe":
                yield f"the next call got {got!r}"
        except Exception as error:  # noqa: BLE001  # whatever it is
            if isinstance(error, _LOST) and time.monotonic() - begun >= _TRY:
                self._late = True
            else:
                yield f"the next call raised {error!r}"


def _parts(name: str) -> Parts:
    return _TOGETHER if name == _BATCH else (OPERATIONS[name],)


def _held(fields: dict[bytes, bytes], ttl: int, sealed_in: str = "") -> Held:
    """What a hash holds; of one that was sealed in a session the data, if it opens there."""

    def data_of(name: str, stored: bytes) -> bytes:
        if not sealed_in:
            return stored
        return (
            _RING.open(stored, f"sg-session:{{{sealed_in}}}".encode(), b":" + name.encode())
            or b"not to be opened"
        )

    payloads: dict[str, bytes] = {}
    timed = set()
    for field, data in fields.items():
        name = field[1:].decode()
        if field.startswith(b":"):
            payloads[name] = data_of(name, data)
        elif field.startswith(b";"):
            payloads[name] = data_of(name, data[13:])
            timed.add(name)
    subject = fields.get(b"sub", b"")[8:].decode()
    generation = int(fields.get(b"gen", b"0").partition(b" ")[0])
    return Held(payloads, subject, generation, round(ttl / 10_000) * 10, frozenset(timed))


def _is_known(part: Operation, outcome: object) -> bool:
    """Whether the outcome says what became of the call."""
    return not isinstance(outcome, Exception) or type(outcome) is part.refusal


def _wrong_world(
    scene: Scene, parts: Parts, outcomes: list[object], seen: Seen, *, results: bool = True
) -> Iterator[str]:
    """What returned has run, the rest perhaps, nothing else has, and results say what there is."""
    pairs = list(zip(parts, outcomes, strict=True))
    unsure = [part for part, outcome in pairs if not _is_known(part, outcome)]
    worlds = []
    for count in range(len(unsure) + 1):
        for absent in combinations(unsure, count):
            world = scene.before()
            for part in parts:
                world = world if part in absent else part.effect(scene, world)
            worlds.append(world)
    if seen.world not in worlds:
        yield f"{outcomes} and there is {seen.world}"
    elif results:
        for part, outcome in pairs:
            known = _is_known(part, outcome) and part.refusal is None
            if known and not part.is_right(scene, outcome, seen):
                yield f"returned {outcome!r}"
    if seen.endless:
        yield f"keys without an end: {seen.endless}"
    if unlisted := {name for name, held in seen.world.items() if held.subject} - seen.listed:
        yield f"no end_all would find {unlisted}"


def _cases(players: list[Player]) -> Iterator[Case]:
    """All there are, on each of the players' servers."""
    for flavour in FLAVOURS:
        for name in [*OPERATIONS, *([_BATCH] if flavour == "async" else [])]:
            sizes = [player.sizes(flavour, name) for player in players]
            # What redis-py says first has no echo: a byte too many or too few is read as it is.
            faults = [f for f in FAULTS if f in _REAL] if _parts(name)[0].connects else FAULTS
            for direction, each in zip(DIRECTIONS, zip(*sizes, strict=True), strict=True):
                for offset, fault in product(range(min(each)), faults):
                    yield Case(flavour, name, fault, direction, offset)


def _run(dice: random.Random, scale: float) -> Tally:
    with ExitStack() as stack:
        options = ("--databases", str(_PLAYERS))
        servers = [
            stack.enter_context(Server(binary, options)) for binary in server_binaries().values()
        ]
        stalls = Stalls()
        stack.enter_context(stalls.watched())
        players = [
            Player(servers[number % len(servers)], number, stalls, stack)
            for number in range(_PLAYERS)
        ]
        cases = list(_cases(players[: len(servers)]))
        chosen = dice.sample(cases, max(1, round(scale * len(cases))))

        def play(number: int) -> None:
            for case in chosen[number::_PLAYERS]:
                players[number].play(case)

        with ThreadPoolExecutor(_PLAYERS) as pool:
            list(pool.map(play, range(_PLAYERS)))
        tally = Tally()
        for player in players:
            tally.merge(player.tally)
        tally.figures["of all"] = f"{len(cases):,}"
        tally.figures["played again"] = f"{sum(player.late for player in players):,}"
        tally.figures["longest call"] = f"{max(player.longest for player in players):.2f} s"
    return tally


CAMPAIGNS = [
    Campaign(
        "bytewise",
        "a proxy at every byte of every operation, each fault, both gates: 0 wrong outcomes",
        _run,
        0.0025,
    )
]
