"""Campaign "sealed": somebody who may write to Redis changes, moves and replays sealed payloads.

Whatever he does, an operation that meets it says so and returns nothing of it. Only what the
session itself once stored under that name can be put back.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from redis import Redis

from sessiongate import AsyncSessionGate, SessionGate, UnsealError
from sessiongate.sealing import SealingKeyRing, sealing_key_id
from tests.servers import Server

from .harness import Campaign, Tally
from .rules import newest_redis_7

_GOAL = 100_000
_SIGN_KEY = "a sign key of the campaigns, 32 bytes and more"
_RING = ["0b" * 32, "0a" * 32]
_FOREIGN = "0c" * 32
_TTL = 3_600
_NAMES = [f"payload {number}" for number in range(40)]
_TIMED = _NAMES[::4]  # those with an end of their own
_EVERY = 25  # how many fields are tampered with before the whole session is read and renewed

_MARK_BYTES, _KEY_ID_END, _NONCE_END, _TAG_BYTES = 3, 8, 32, 16
_END_DIGITS = 13
_FAR = b"9999999999999"


class _Awaited:
    """A SessionGate with the methods of an asynchronous one: awaiting them blocks."""

    def __init__(self, gate: SessionGate) -> None:
        self.gate = gate

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self.gate, name)

        async def call(*args: object, **options: object) -> object:
            return method(*args, **options)

        return call

    async def load(self, token: str, name: str) -> object:
        return self.gate.open(token, names=[name])[name]


class _Pipelined:
    """An AsyncSessionGate, with a way to read through a handle that both have."""

    def __init__(self, gate: AsyncSessionGate) -> None:
        self._gate = gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gate, name)

    async def load(self, token: str, name: str) -> object:
        return (await self._gate.open(token, names=[name]).load())[name]


@dataclass
class _Session:
    """A session, what it holds, and how Redis holds it."""

    token: str
    held: dict[str, bytes]
    stored: dict[bytes, bytes] = field(default_factory=dict)
    before: list[tuple[bytes, bytes]] = field(default_factory=list)  # what it once stored
    foreign: dict[bytes, bytes] = field(default_factory=dict)  # what it stored under another id

    @property
    def key(self) -> str:
        return f"sg-session:{{{self.id}}}"

    @property
    def id(self) -> str:
        return self.token[3:19]

    def read(self, client: Redis) -> None:
        found = cast("dict[bytes, bytes]", client.hgetall(self.key))
        self.stored = {own: stored for own, stored in found.items() if own[:1] in (b":", b";")}

    def field_of(self, name: str) -> bytes:
        return (b";" if name in _TIMED else b":") + name.encode()

    def sealed(self, name: str) -> bytes:
        """What was sealed of a payload, without its end."""
        own = self.field_of(name)
        return self.stored[own][_end(own) :]


class _Change(NamedTuple):
    """What is to stand in a payload's field: the kind of change that made it, and what it is."""

    kind: str
    name: str
    field: bytes
    stored: bytes


def _end(own: bytes) -> int:
    return _END_DIGITS if own[:1] == b";" else 0


class _Attack:
    """Somebody who may write to Redis, and what he comes up with."""

    def __init__(self, dice: random.Random, victim: _Session, other: _Session) -> None:
        self._dice = dice
        self._victim = victim
        self._other = other
        self._kinds: dict[str, Callable[[str], bytes]] = {
            "flipped": self._flipped,
            "cut": self._cut,
            "extended": self._extended,
            "of another name": self._of_another_name,
            "of another session": other.sealed,
            "of another name and session": lambda name: other.sealed(self._another(name)),
            "of before a sign-in": lambda name: victim.foreign[name.encode()],
            "of another key": self._of_another_key,
            "said to be of a known key": self._said_to_be,
            "put together": self._put_together,
            "never sealed": lambda name: victim.held[name],
            "made up": self._made_up,
        }

    def change(self, name: str) -> _Change:
        """Something to put into the payload's field that the session never stored there."""
        dice, own = self._dice, self._victim.field_of(name)
        if own[:1] == b";" and dice.random() < 0.3:
            return self._other_kind(name, own)
        kind = dice.choice(list(self._kinds))
        sealed = self._kinds[kind](name)
        return _Change(kind, name, own, self._digits(own) + sealed)

    def _other_kind(self, name: str, own: bytes) -> _Change:
        """Its own, but with digits where none belong, or digits of an end too many."""
        stored = self._victim.stored[own]
        if self._dice.random() < 0.5:
            return _Change("with an end that it has not", name, b":" + own[1:], stored)
        return _Change("with two ends", name, own, _FAR + stored)

    def _digits(self, own: bytes) -> bytes:
        return self._dice.choice((self._victim.stored[own][:_END_DIGITS], _FAR))[: _end(own)]

    def _another(self, name: str) -> str:
        return self._dice.choice([one for one in _NAMES if one != name])

    def _flipped(self, name: str) -> bytes:
        sealed = bytearray(self._victim.sealed(name))
        for at in self._dice.sample(range(len(sealed)), self._dice.choice((1, 1, 1, 2, 8))):
            sealed[at] ^= 1 << self._dice.randrange(8)
        return bytes(sealed)

    def _cut(self, name: str) -> bytes:
        sealed = self._victim.sealed(name)
        first = self._dice.randrange(len(sealed))
        last = self._dice.randrange(first, len(sealed))
        parts = (sealed[:first], sealed[first + 1 :], sealed[:first] + sealed[last + 1 :])
        return self._dice.choice(parts)

    def _extended(self, name: str) -> bytes:
        sealed = self._victim.sealed(name)
        at = self._dice.choice((0, len(sealed), self._dice.randrange(len(sealed))))
        more = self._dice.randbytes(self._dice.choice((1, 2, 16, 48)))
        extended = sealed[:at] + more + sealed[at:]
        return extended if self._dice.random() < 0.8 else sealed + sealed

    def _of_another_name(self, name: str) -> bytes:
        return self._victim.sealed(self._another(name))

    def _of_another_key(self, name: str) -> bytes:
        ring = SealingKeyRing(_FOREIGN)
        return ring.seal(self._victim.held[name], self._victim.key.encode(), b":" + name.encode())

    def _said_to_be(self, name: str) -> bytes:
        sealed = self._of_another_key(name)
        known = bytes.fromhex(sealing_key_id(self._dice.choice(_RING)))
        return sealed[: _KEY_ID_END - len(known)] + known + sealed[_KEY_ID_END:]

    def _put_together(self, name: str) -> bytes:
        """Of two that are genuine, both of this very payload if it was stored before."""
        before = [stored for one, stored in self._victim.before if one == name.encode()]
        one, other = self._victim.sealed(name), self._dice.choice(before)
        at = self._dice.choice((_KEY_ID_END, _NONCE_END, len(other) - _TAG_BYTES))
        together = one[:at] + other[at:]
        return together if together not in (one, other) else together[:-1]

    def _made_up(self, name: str) -> bytes:
        sealed = self._victim.sealed(name)
        known = sealed[: self._dice.choice((0, _MARK_BYTES, _KEY_ID_END, _NONCE_END))]
        return known + self._dice.randbytes(self._dice.choice((0, 1, 16, 40, 99)))


# What meets a payload that was tampered with, by its token and name; each raises.
_READS: dict[str, Callable[[Any, str, str, bytes], Coroutine[Any, Any, object]]] = {
    "pget": lambda gate, token, name, _: gate.pget(token, name),
    "pget_many": lambda gate, token, name, _: gate.pget_many(token, [name]),
    "ppop": lambda gate, token, name, _: gate.ppop(token, name),
    "if_match": lambda gate, token, name, data: gate.pset(token, name, "x", if_match=data),
    "handle": lambda gate, token, name, _: gate.load(token, name),
}


class _Scene:
    """One gate against one attacker, and one session after the other."""

    def __init__(self, gate: Any, client: Redis, dice: random.Random, tally: Tally) -> None:
        self._gate = gate
        self._client = client
        self._dice = dice
        self._tally = tally
        self._number = 0
        self.met: set[tuple[str, str]] = set()  # kinds of changes, and what met them

    async def play(self, count: int) -> None:
        """So many fields are tampered with."""
        while count > 0:
            victim, other = await self._opened(), await self._opened()
            attack = _Attack(self._dice, victim, other)
            for _ in range(8):
                names = self._dice.sample(_NAMES, min(_EVERY, max(count, 1)))
                await self._tamper(victim, [attack.change(name) for name in names])
                count -= len(names)
                await self._replay(victim)
                if count <= 0:
                    break
            for session in (victim, other):
                self._client.delete(session.key)

    async def _opened(self) -> _Session:
        """A session that signed in, some of whose payloads were stored more than once."""
        self._number += 1
        gate, dice = self._gate, self._dice
        first = {name: dice.randbytes(dice.choice((8, 30, 200))) for name in _NAMES}
        token = await gate.start(_TTL, first)
        visitor = _Session(token, first)
        visitor.read(self._client)
        token = await gate.renew(token, subject=f"subject {self._number % 7}")
        session = _Session(token, first)
        session.foreign = {name[1:]: stored for name, stored in visitor.stored.items()}
        for _ in range(2):
            session.read(self._client)
            session.before += [
                (own[1:], stored[_end(own) :]) for own, stored in session.stored.items()
            ]
            session.held = {name: dice.randbytes(len(data)) for name, data in first.items()}
            await gate.pset_many(token, session.held)
        for name in _TIMED:
            await gate.pset(token, name, session.held[name], ttl=_TTL)
        session.read(self._client)
        return session

    async def _tamper(self, victim: _Session, changes: list[_Change]) -> None:
        """Put all of that in place, look that each is refused, and put right what was changed."""
        with self._client.pipeline(transaction=False) as pipeline:
            for change in changes:
                pipeline.hdel(victim.key, victim.field_of(change.name))
                pipeline.hset(victim.key, change.field, change.stored)
            pipeline.execute()
        await asyncio.gather(*(self._refused(victim, change) for change in changes))
        left = set(self._client.hkeys(victim.key))  # what was popped is gone
        if left & {change.field for change in changes}:
            await self._refused_whole(victim)
        with self._client.pipeline(transaction=False) as pipeline:
            for change in changes:
                own = victim.field_of(change.name)
                pipeline.hdel(victim.key, change.field)
                pipeline.hset(victim.key, own, victim.stored[own])
            pipeline.execute()
        held = await self._gate.pall(victim.token)
        if held != victim.held:
            self._tally.wrong.append("what was put right does not read as it was")

    async def _refused(self, victim: _Session, change: _Change) -> None:
        how = self._dice.choices(list(_READS), (6, 1, 1, 1, 1))[0]
        try:
            read = await _READS[how](
                self._gate, victim.token, change.name, victim.held[change.name]
            )
        except UnsealError as error:
            if error.name != change.name:
                self._wrong(f"{how} of what was {change.kind} names {error.name!r}")
        except Exception as error:  # noqa: BLE001  # none other is right
            self._wrong(f"{how} of what was {change.kind} raised {error!r}")
        else:
            self._wrong(f"{how} of what was {change.kind} returned {read!r}: {change.stored!r}")
        self._tally.add("tampered fields")
        self.met.add((change.kind, how))

    async def _refused_whole(self, victim: _Session) -> None:
        """Nothing of a session is told, nor does it sign in, with such a payload in it."""
        gate, token = self._gate, victim.token
        for what, call in (
            ("pall", gate.pall(token)),
            ("renew(subject=)", gate.renew(token, subject="subject x")),
        ):
            try:
                read = await call
            except UnsealError:
                self._tally.add("sessions with such a field in them")
            except Exception as error:  # noqa: BLE001  # none other is right
                self._wrong(f"{what} raised {error!r}")
            else:
                self._wrong(f"{what} returned {read!r}")

    async def _replay(self, victim: _Session) -> None:
        """What it once stored under that name opens, wherever the server had it."""
        name, stored = self._dice.choice(victim.before)
        kinds = (b":", b";") if self._dice.random() < 0.5 else (b";", b":")
        self._client.hdel(victim.key, kinds[1] + name)
        digits = _FAR if kinds[0] == b";" else b""
        self._client.hset(victim.key, kinds[0] + name, digits + stored)
        read = await self._gate.pget(victim.token, name.decode())
        if not isinstance(read, bytes) or len(read) != len(victim.held[name.decode()]):
            self._wrong(f"a replay returned {read!r}")
        self._tally.add("replays of a payload's own")
        own = victim.field_of(name.decode())
        self._client.hdel(victim.key, b":" + name, b";" + name)
        self._client.hset(victim.key, own, victim.stored[own])

    def _wrong(self, what: str) -> None:
        self._tally.wrong.append(what)


def _run(dice: random.Random, scale: float) -> Tally:
    tally = Tally()
    each = max(_EVERY, round(_GOAL * scale / 2))
    options: dict[str, Any] = {"sign_key": _SIGN_KEY, "sealing_key": _RING}
    met = set()
    with Server(newest_redis_7()) as server, server.client() as client:

        async def play(gate: Any) -> None:
            scene = _Scene(gate, client, dice, tally)
            await scene.play(each)
            met.update(scene.met)

        async def pipelined() -> None:
            async with AsyncSessionGate.from_url(server.url, **options) as gate:
                await play(_Pipelined(gate))

        with SessionGate.from_url(server.url, **options) as gate:
            asyncio.run(play(_Awaited(gate)))
        asyncio.run(pipelined())
    tally.figures["kinds of change"] = f"{len({kind for kind, _ in met})}"
    tally.figures["with what met them"] = f"{len(met)}"
    return tally


CAMPAIGNS = [
    Campaign(
        "sealed",
        "100,000 sealed fields tampered with, moved and replayed: 0 of them opened",
        _run,
        0.02,
    )
]
