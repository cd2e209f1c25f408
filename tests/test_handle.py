"""The handle that `gate.open` returns: what it reads and writes, when, and what it leaves alone."""

import asyncio
import gc
import json
import logging
import pickle
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy, deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from threading import Barrier
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis import ConnectionError as LostError

from sessiongate import (
    ArgumentError,
    AsyncSession,
    AsyncSessionGate,
    BadSignatureError,
    HandleError,
    JSONCodec,
    MalformedTokenError,
    MsgpackCodec,
    PayloadDecodeError,
    PayloadNotFoundError,
    Session,
    SessionGate,
    SessionGateError,
    SessionNotFoundError,
    TooManySessionsError,
    UnderReplicatedError,
    UnsealError,
)
from sessiongate.tokens import SignKeyRing

from .conftest import CLUSTERED, SIGN_KEY, Backend, Flavour, running
from .proxy import Proxy

R = TypeVar("R")

AnyGate = SessionGate[Any, Any]
AnySession = Session[Any, Any]

SEALING_KEY = "5e" * 32
SECONDS = 30  # which no test needs: what takes longer hangs

# A handle does not differ between versions of servers, nor by how its gate shares connections.
both = pytest.mark.parametrize("flavour", ["sync", "async"], indirect=True)
SERVERS = [CLUSTERED] if CLUSTERED else []
anywhere = pytest.mark.parametrize(
    "backend", ["memory", *SERVERS, *(["cluster"] if SERVERS else [])], indirect=True
)
in_memory = pytest.mark.parametrize("backend", ["memory"], indirect=True)
on_a_server = pytest.mark.parametrize("backend", SERVERS, indirect=True)


class Blocked:
    """An AsyncSession as a Session: it is loaded when it asks for that, and nothing is awaited."""

    def __init__(self, awaited: AsyncSession[Any, Any], runner: asyncio.Runner) -> None:
        self.awaited = awaited
        self._runner = runner

    def _asked(self, ask: Callable[[], R]) -> R:
        try:
            return ask()
        except HandleError as error:
            if "await session.load()" not in str(error):
                raise
        self.load()
        return ask()

    def load(self) -> Self:
        self._runner.run(self.awaited.load())
        return self

    def __getattr__(self, name: str) -> object:
        found = self._asked(lambda: getattr(self.awaited, name))
        if not callable(found):
            return found
        if asyncio.iscoroutinefunction(found):
            return lambda *args, **options: self._runner.run(found(*args, **options))
        if name in ("items", "keys", "values"):
            self._asked(lambda: len(self.awaited))  # a view reads later
        return lambda *args, **options: self._asked(lambda: found(*args, **options))

    def __getitem__(self, name: str) -> object:
        return self._asked(lambda: self.awaited[name])

    def __setitem__(self, name: str, value: object) -> None:
        self.awaited[name] = value

    def __delitem__(self, name: str) -> None:
        self._asked(lambda: self.awaited.__delitem__(name))

    def __contains__(self, name: object) -> bool:
        return self._asked(lambda: name in self.awaited)

    def __iter__(self) -> Iterator[str]:
        return self._asked(lambda: iter(self.awaited))

    def __len__(self) -> int:
        return self._asked(lambda: len(self.awaited))

    def __eq__(self, other: object) -> bool:
        return self._asked(lambda: self.awaited == other)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return repr(self.awaited)

    def __enter__(self) -> Self:
        self._runner.run(self.awaited.__aenter__())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._runner.run(self.awaited.__aexit__(kind, error, traceback))


def opened(gate: AnyGate, token: str | bytes | None, **options: Any) -> AnySession:
    """The handle, of whichever kind, as one that blocks."""
    session: object = gate.open(token, **options)
    if isinstance(session, AsyncSession):
        return cast("AnySession", Blocked(session, cast("Any", gate)._runner))
    return cast("AnySession", session)


@pytest.fixture
def gate(backend: Backend) -> AnyGate:
    """A gate of values."""
    return backend.gate(codec=JSONCodec())


@pytest.fixture
def raw(backend: Backend) -> AnyGate:
    """A gate of bytes, on the same sessions."""
    return backend.gate()


class Wire:
    """A gate behind a proxy, which tells of its round trips."""

    def __init__(self, flavour: Flavour, proxy: Proxy) -> None:
        client = flavour.client(proxy.port, retry=flavour.no_retry)
        self.gate: AnyGate = flavour.gate(client, codec=JSONCodec())
        self.proxy = proxy
        self._seen = 0

    def trips(self) -> int:
        """How many requests there were since the last time."""
        seen, self._seen = self._seen, len(self.proxy.requests)
        return self._seen - seen


@pytest.fixture
def wire(flavour: Flavour) -> Iterator[Wire]:
    """One whose connection is there and whose server knows the scripts."""
    if not CLUSTERED:
        pytest.skip("there is no server")
    running(CLUSTERED).client().flushall()
    with Proxy(running(CLUSTERED).port) as proxy:
        wire = Wire(flavour, proxy)
        gate = wire.gate
        token = gate.start(300, {"a": 1})
        for turn in range(2):
            with opened(gate, token) as session:
                session["a"] += 1
            token = gate.renew(token) if turn == 0 else gate.renew(token, subject="nobody")
            gate.pget(token, "a")
        gate.end(token)
        gate.start(300, subject="nobody")
        gate.end_all("nobody")
        wire.trips()
        yield wire


# Round trips


def change(session: AnySession, *names: str) -> None:
    for name in names:
        session[name].append(1)


def save_twice(session: AnySession) -> None:
    session["a"] = [7]
    session.save()
    session.save()


def save_then_store(session: AnySession) -> None:
    session["a"] = [7]
    session.save()
    session["b"] = [8]


def change_save_change(session: AnySession) -> None:
    change(session, "a")
    session.save()
    change(session, "a")


def change_save_and_read(session: AnySession) -> None:
    change(session, "a")
    session.save()
    assert session["a"] == [1, 1]


def assign_and_read_it(session: AnySession) -> None:
    session["a"] = [7]
    assert session["a"] == [7]
    assert "a" in session


def assign_and_read(session: AnySession) -> None:
    session["a"] = [7]
    assert session["b"] == [2]


def assign_and_delete(session: AnySession) -> None:
    session["a"] = [7]
    del session["a"]
    assert "a" not in session
    assert session.get("a") is None


def change_and_change_back(session: AnySession) -> None:
    change(session, "a")
    session["a"].pop()


def renew_and_change(session: AnySession) -> None:
    session.renew()
    session["a"] = [7]


def read_and_change(session: AnySession) -> None:
    assert session["b"] == [2]
    change(session, "a")


def end_twice(session: AnySession) -> None:
    session.end()
    session.end()


def save_and_read(session: AnySession) -> None:
    save_twice(session)
    assert session["a"] == [7]
    assert session.get("b") is None
    assert dict(session) == {"a": [7]}


def assign_and_save(session: AnySession) -> None:
    session["a"] = [7]
    session.save()


def assign_and_end(session: AnySession) -> None:
    session["a"] = [7]
    session.end()


def assign_and_sign_in(session: AnySession) -> None:
    session["a"] = [7]
    session.renew(subject="alice")


A = {"names": ["a"]}
A_AND_B = {"names": ["a", "b"]}
TRIPS: dict[str, tuple[int, Callable[[AnySession], object], dict[str, list[str]]]] = {
    "nothing": (0, lambda _: None, {}),
    "id and token": (0, lambda s: (s.id, s.token, repr(s)), {}),
    "save of nothing": (0, lambda s: s.save(), {}),
    "one is read": (1, lambda s: s["a"], {}),
    "two are read": (1, lambda s: (s["a"], s["b"], s["a"], s.get("a")), {}),
    "one is not there": (1, lambda s: (s.get("no"), "no" in s, s.pop("no", 7)), {}),
    "all are read": (1, lambda s: (dict(s), len(s), list(s), list(s.values())), {}),
    "all are told of": (1, lambda s: (s.subject, s.expires_at, s["a"], s.subject), {}),
    "load": (1, lambda s: (s.load(), s.load()["a"], s.expires_at), {}),
    "named are read": (1, lambda s: (s["a"], s["b"]), A_AND_B),
    "changed and changed back": (1, change_and_change_back, {}),
    "two are read, one is changed": (2, read_and_change, {}),
    "two are changed": (2, lambda s: change(s, "a", "b"), {}),
    "a named one is changed": (2, lambda s: change(s, "a"), A),
    "assigned unread": (1, lambda s: s.update(a=[7]), {}),
    "several assigned unread": (1, lambda s: s.update(a=[7], b=[8], c=[9]), {}),
    "assigned, not named": (1, lambda s: s.update(b=[8]), A),
    "assigned and read": (1, assign_and_read_it, {}),
    "assigned, another one read": (2, assign_and_read, {}),
    "deleted unread": (2, lambda s: s.pop("a"), {}),
    "assigned and deleted": (1, assign_and_delete, {}),
    "cleared": (2, lambda s: s.clear(), {}),
    "saved twice": (1, save_twice, {}),
    "saved, then assigned": (2, save_then_store, {}),
    "saved in the middle": (3, change_save_change, {}),
    "saved, then read": (2, change_save_and_read, {}),
    "renewed": (1, lambda s: s.renew(), {}),
    "renewed and assigned": (2, renew_and_change, {}),
    "ended": (1, lambda s: s.end(), {}),
    "ended twice": (1, end_twice, {}),
    "assigned and ended": (1, assign_and_end, {}),
}


@both
@pytest.mark.parametrize("name", TRIPS)
def test_round_trips(wire: Wire, name: str) -> None:
    """A request that reads and writes takes two round trips, one or none, whatever it touches."""
    trips, use, options = TRIPS[name]
    token = wire.gate.start(300, {"a": [1], "b": [2]})
    wire.trips()
    session = opened(wire.gate, token, **options)
    with session:
        use(session)
    assert wire.trips() == trips


UNSTARTED: dict[str, tuple[int, Callable[[AnySession], object]]] = {
    "nothing": (0, lambda _: None),
    "read": (0, lambda s: (s.get("a"), dict(s), len(s), "a" in s, s.load(), s.pop("a", 7))),
    "told of": (0, lambda s: (s.id, s.token, s.subject, s.expires_at)),
    "assigned and deleted": (0, assign_and_delete),
    "renewed": (0, lambda s: s.renew()),
    "ended": (0, lambda s: s.end()),
    "assigned and ended": (0, assign_and_end),
    "assigned": (1, lambda s: s.update(a=[7], b=[8])),
    "signed in": (1, lambda s: s.renew(subject="alice")),
    "assigned and signed in": (1, assign_and_sign_in),
    "saved twice": (1, save_twice),
    "saved, then assigned": (2, save_then_store),
    "saved, then read": (1, save_and_read),
}


@both
@pytest.mark.parametrize("name", UNSTARTED)
def test_round_trips_without_a_session(wire: Wire, name: str) -> None:
    """Without a token nothing is sent before there is something to store."""
    trips, use = UNSTARTED[name]
    session = opened(wire.gate, None)
    with session:
        use(session)
    assert wire.trips() == trips
    assert (session.token is not None) == (trips > 0)


@both
def test_what_is_stored_are_the_touched_names_alone(wire: Wire) -> None:
    """The one write holds what was changed, and of other payloads neither name nor data."""
    token = wire.gate.start(300, {"theirs": "their data", "mine": ["old"], "gone": 1})
    with opened(wire.gate, token) as session:
        assert session["theirs"] == "their data"
        del session["gone"]
        session["mine"].append("new")
    written = wire.proxy.requests[-1]
    assert b'["old","new"]' in written
    assert b":gone" in written
    assert b"their" not in written


@pytest.mark.parametrize("flavour", ["sync", "async"], indirect=True)
def test_the_end_of_a_started_session_is_asked_for(wire: Wire) -> None:
    """When a session ends that was started by the handle takes one round trip to know."""
    with opened(wire.gate, None, ttl=100) as session:
        session["a"] = 1
    assert wire.trips() == 1
    left = session.expires_at - datetime.now(UTC)  # type: ignore[operator]  # it is started
    assert timedelta(seconds=95) < left <= timedelta(seconds=101)
    assert session.expires_at
    assert wire.trips() == 1


# A mapping


NAMES = ["a", "b", "c", "fp", ":a", "ä {b}"]
names = st.sampled_from(NAMES)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
plain = st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 2**40), texts)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "values": st.one_of(
        plain,
        st.lists(plain, max_size=3),
        st.dictionaries(texts, st.lists(plain, max_size=2), max_size=2),
    ),
    "bytes": st.binary(min_size=1, max_size=20),
}


def as_told(value: object) -> str:
    """Which values are the same: 1 and True are not."""
    return json.dumps(value, default=repr)


@dataclass
class Opened:
    """A handle, and what a mapping in its place would hold."""

    session: AnySession
    held: dict[str, Any] = field(default_factory=dict)
    # What Redis had of each payload, as far as it is known, and whether all of it is.
    data: dict[str, str] = field(default_factory=dict)
    is_read: bool = False
    touched: set[str] = field(default_factory=set)

    def read(self, stored: dict[str, Any]) -> dict[str, Any]:
        """Everything that it holds: what was touched before is as it was touched."""
        if not self.is_read:
            self.is_read = True
            # What it stored itself before it read is its own, whoever stored another since.
            self.data = {
                name: self.data.get(name, as_told(value)) for name, value in stored.items()
            }
            unread = stored.keys() - self.held.keys() - self.touched
            self.held |= {name: deepcopy(stored[name]) for name in unread}
        return self.held

    def find(self, name: str, stored: dict[str, Any]) -> dict[str, Any]:
        known = name in self.held or name in self.touched
        return self.held if known else self.read(stored)

    def assign(self, name: str, value: object) -> None:
        self.held[name] = deepcopy(value)
        self.touched.add(name)

    def delete(self, name: str) -> None:
        del self.held[name]
        self.touched.add(name)
        if self.is_read and name not in self.data:
            self.touched.discard(name)  # it came and went here alone

    def store(self, stored: dict[str, Any]) -> None:
        for name in list(self.held):
            told = as_told(self.held[name])
            if name in self.touched or told != self.data.get(name, told):
                stored[name] = deepcopy(self.held[name])
                self.data[name] = told
        for name in self.touched - self.held.keys():
            stored.pop(name, None)
            self.data.pop(name, None)
        self.touched.clear()


class Mapped(RuleBasedStateMachine):
    """Two handles on one session, one after the other and at the same time."""

    gate: ClassVar[AnyGate]
    values: ClassVar[st.SearchStrategy[Any]]

    @initialize(payloads=st.runner().flatmap(lambda self: st.dictionaries(names, self.values)))
    def start(self, payloads: dict[str, Any]) -> None:
        self.token = self.gate.start(300, payloads)
        self.stored = deepcopy(payloads)
        self.handles = [self.new(), self.new()]

    def new(self) -> Opened:
        session = opened(self.gate, self.token)
        session.__enter__()
        return Opened(session)

    def check(self) -> None:
        assert as_told(sorted(self.gate.pall(self.token).items())) == as_told(
            sorted(self.stored.items())
        )

    # Handles that come and go.

    @rule(which=st.integers(0, 1))
    def leave(self, which: int) -> None:
        handle = self.handles[which]
        handle.session.__exit__(None, None, None)
        handle.store(self.stored)
        self.handles[which] = self.new()
        self.check()

    @rule(which=st.integers(0, 1))
    def fail(self, which: int) -> None:
        self.handles[which].session.__exit__(OSError, OSError(), None)
        self.handles[which] = self.new()
        self.check()

    @rule(which=st.integers(0, 1))
    def save(self, which: int) -> None:
        self.handles[which].session.save()
        self.handles[which].store(self.stored)
        self.check()

    @rule(which=st.integers(0, 1))
    def load(self, which: int) -> None:
        self.handles[which].session.load()
        self.handles[which].read(self.stored)

    # What one does with a mapping.

    handles_ = st.runner().flatmap(lambda self: st.sampled_from(self.handles))
    values_ = st.runner().flatmap(lambda self: self.values)

    @rule(handle=handles_, name=names, value=values_)
    def assign(self, handle: Opened, name: str, value: Any) -> None:
        handle.session[name] = deepcopy(value)
        handle.assign(name, value)

    @rule(handle=handles_, name=names)
    def get_item(self, handle: Opened, name: str) -> None:
        held = handle.find(name, self.stored)
        if name in held:
            assert as_told(handle.session[name]) == as_told(held[name])
        else:
            with pytest.raises(KeyError):
                handle.session[name]

    @rule(handle=handles_, name=names)
    def get(self, handle: Opened, name: str) -> None:
        held = handle.find(name, self.stored)
        assert as_told(handle.session.get(name)) == as_told(held.get(name))
        assert as_told(handle.session.get(name, "default")) == as_told(held.get(name, "default"))
        assert (name in handle.session) == (name in held)

    @rule(handle=handles_, name=names)
    def delete(self, handle: Opened, name: str) -> None:
        if name in handle.find(name, self.stored):
            del handle.session[name]
            handle.delete(name)
        else:
            with pytest.raises(KeyError):
                del handle.session[name]

    @rule(handle=handles_, name=names, with_default=st.booleans())
    def pop(self, handle: Opened, name: str, with_default: bool) -> None:
        held = handle.find(name, self.stored)
        args = ("default",) if with_default else ()
        if name in held:
            assert as_told(handle.session.pop(name, *args)) == as_told(held[name])
            handle.delete(name)
        elif with_default:
            assert handle.session.pop(name, "default") == "default"
        else:
            with pytest.raises(KeyError):
                handle.session.pop(name)

    @rule(handle=handles_)
    def pop_item(self, handle: Opened) -> None:
        held = handle.read(self.stored)
        if held:
            name, value = handle.session.popitem()
            assert as_told(value) == as_told(held[name])
            handle.delete(name)
        else:
            with pytest.raises(KeyError):
                handle.session.popitem()

    @rule(handle=handles_, name=names, value=values_)
    def set_default(self, handle: Opened, name: str, value: Any) -> None:
        held = handle.find(name, self.stored)
        got = handle.session.setdefault(name, deepcopy(value))
        if name not in held:
            handle.assign(name, value)
        assert as_told(got) == as_told(held[name])

    @rule(
        handle=handles_,
        values=st.runner().flatmap(lambda self: st.dictionaries(names, self.values, max_size=3)),
    )
    def update(self, handle: Opened, values: dict[str, Any]) -> None:
        handle.session.update(deepcopy(values))
        for name, value in values.items():
            handle.assign(name, value)

    @rule(handle=handles_)
    def clear(self, handle: Opened) -> None:
        for name in list(handle.read(self.stored)):
            handle.delete(name)
        handle.session.clear()

    @rule(handle=handles_)
    def look_at_all(self, handle: Opened) -> None:
        held = handle.read(self.stored)
        assert len(handle.session) == len(held)
        assert sorted(handle.session) == sorted(handle.session.keys()) == sorted(held)
        assert sorted(map(as_told, handle.session.values())) == sorted(map(as_told, held.values()))
        assert as_told(sorted(handle.session.items())) == as_told(sorted(held.items()))
        assert dict(handle.session) == held

    # What is changed in place.

    @precondition(lambda self: self.values is VALUES["values"])
    @rule(handle=handles_, name=names, value=plain)
    def change(self, handle: Opened, name: str, value: Any) -> None:
        held = handle.find(name, self.stored)
        for mapping in (handle.session, held):
            found = mapping.get(name)
            if isinstance(found, dict) and found:
                found = next(iter(found.values()))
            if isinstance(found, list):
                found.append(deepcopy(value))
            elif isinstance(found, dict):
                found["new"] = [deepcopy(value)]

    @precondition(lambda self: self.values is VALUES["values"])
    @rule(handle=handles_, name=names)
    def change_back(self, handle: Opened, name: str) -> None:
        held = handle.find(name, self.stored)
        for mapping in (handle.session, held):
            found = mapping.get(name)
            if isinstance(found, list) and found:
                found.pop()


SORTS: dict[str, dict[str, object]] = {
    "values": {"codec": JSONCodec()},
    "sealed values": {"codec": JSONCodec(), "sealing_key": SEALING_KEY},
    "bytes": {"sealing_key": SEALING_KEY},
}


@pytest.mark.parametrize(
    ("backend", "flavour", "sort"),
    [
        ("memory", "sync", "values"),
        *((server, "sync", "bytes") for server in SERVERS),
        *((server, "async", "sealed values") for server in SERVERS),
    ],
    indirect=["backend", "flavour"],
)
def test_a_handle_is_a_mapping(backend: Backend, sort: str) -> None:
    """Whatever is done with them, two handles on one session do what two dictionaries would.

    What each one stores are the names that it touched; of a name that both touched, the one stored
    last is there; a name that neither touched is as it was.
    """

    class OfThisGate(Mapped):
        pass

    OfThisGate.gate = backend.gate(**SORTS[sort])  # type: ignore[arg-type]  # options of a gate
    OfThisGate.values = VALUES["bytes" if sort == "bytes" else "values"]
    run_state_machine_as_test(
        OfThisGate,
        settings=settings(
            max_examples=12,
            stateful_step_count=40,
            deadline=None,
            # How fast it is depends on what else the machine does.
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


@both
@in_memory
def test_a_deletion_then_an_assignment(gate: AnyGate) -> None:
    """Of a deletion and an assignment the later one counts, in a block and over two saves."""
    token = gate.start(300, {"a": 1, "b": 2})
    with opened(gate, token) as session:
        del session["a"]
        session["a"] = 3
        session["b"] = 4
        del session["b"]
    assert gate.pall(token) == {"a": 3}
    with opened(gate, token) as session:
        del session["a"]
        session.save()
        assert gate.pall(token) == {}
        session["a"] = 5
    assert gate.pall(token) == {"a": 5}


@both
@in_memory
def test_what_was_touched_before_the_read(gate: AnyGate) -> None:
    """Reading leaves as it is what was assigned or deleted before."""
    token = gate.start(300, {"a": 1, "b": 2, "c": 3})
    with opened(gate, token) as session:
        session["a"] = 4
        session["b"] = 5
        del session["b"]
        assert session["c"] == 3
        assert dict(session) == {"a": 4, "c": 3}
    assert gate.pall(token) == {"a": 4, "c": 3}


@both
@anywhere
def test_two_that_touch_different_names(gate: AnyGate) -> None:
    """Of two requests at once that read everything and change something each, neither is lost."""
    token = gate.start(300, {"cart": ["book"], "visits": 1, "lang": "en", "old": 1})
    with opened(gate, token) as first:
        assert dict(first)
        with opened(gate, token) as second:
            assert dict(second)
            second["cart"].append("pen")
            del second["old"]
        first["visits"] += 1
    assert gate.pall(token) == {"cart": ["book", "pen"], "visits": 2, "lang": "en"}


# What was changed in place, and what was not


@dataclass
class User:
    """A dataclass of an application's."""

    name: str
    tags: list[str] = field(default_factory=list)
    age: int = 0


def needs_msgspec() -> None:
    pytest.importorskip("msgspec")


def codecs() -> list[Any]:
    with suppress(SessionGateError):
        return [JSONCodec(), MsgpackCodec()]
    return [JSONCodec()]


@both
@in_memory
@pytest.mark.parametrize("codec", codecs(), ids=repr)
def test_a_change_deep_inside(backend: Backend, codec: Any) -> None:
    """A change anywhere inside of a value is found, of one that was read and one assigned."""
    gate: AnyGate = backend.gate(codec=codec)
    tree: dict[str, Any] = {"a": {"b": [{"c": 1}]}, "x": []}
    token = gate.start(300, {"tree": tree})
    with opened(gate, token) as session:
        session["tree"]["a"]["b"][0]["c"] = 2
    assert gate.pget(token, "tree") == {"a": {"b": [{"c": 2}]}, "x": []}
    with opened(gate, token) as session:
        session["tree"] = tree
        tree["x"].append("later")
        session.save()
        assert gate.pget(token, "tree")["x"] == ["later"]
        tree["x"].append("later still")
    assert gate.pget(token, "tree")["x"] == ["later", "later still"]


@both
@in_memory
def test_what_others_encoded(gate: AnyGate, raw: AnyGate) -> None:
    """JSON with blanks in it, as others write it, is not written anew for having been read."""
    spelt = {"list": b'[1,  2.50, "\\u00e9"]', "number": b" 1e2 ", "object": b'{"a": 1, "a": 2}'}
    token = raw.start(300, spelt)
    with opened(gate, token) as session:
        assert dict(session) == {"list": [1, 2.5, "é"], "number": 100, "object": {"a": 2}}
    assert raw.pall(token) == spelt
    with opened(gate, token) as session:
        dict(session)
        session["list"].append(3)
    assert raw.pall(token) == {**spelt, "list": '[1,2.5,"é",3]'.encode()}


@both
@in_memory
@pytest.mark.parametrize("codec", codecs(), ids=repr)
def test_a_changed_attribute(backend: Backend, codec: Any) -> None:
    """A changed attribute of an object that was read by as_ is found, and one inside of it."""
    needs_msgspec()
    gate: AnyGate = backend.gate(codec=codec)
    token = gate.start(300, {"user": User("Ann"), "other": User("Ben")})
    with opened(gate, token) as session:
        user = session.get("user", as_=User)
        assert user == User("Ann")
        user.name = "Anne"
        other = session.get("other", as_=User)
        assert other
        other.tags.append("new")
    assert gate.pget(token, "user", as_=User) == User("Anne")
    assert gate.pget(token, "other", as_=User) == User("Ben", ["new"])


@both
@in_memory
def test_a_struct_of_msgspec(gate: AnyGate) -> None:
    """A struct is kept as a dataclass is, one without its defaults as well."""
    msgspec = pytest.importorskip("msgspec")
    kind = msgspec.defstruct("Cart", [("books", int), ("pens", int, 0)], omit_defaults=True)
    token = gate.start(300, {"cart": kind(3)})
    with opened(gate, token) as session:
        session.get("cart", as_=kind).pens = 2
    assert gate.pget(token, "cart") == {"books": 3, "pens": 2}


@both
@in_memory
def test_another_type_than_before(gate: AnyGate) -> None:
    """What is read as another type is the object that counts then, with the changes so far."""
    needs_msgspec()
    token = gate.start(300, {"user": {"name": "Ann"}})
    with opened(gate, token) as session:
        as_dict = session["user"]
        as_dict["name"] = "Anne"
        user = session.get("user", as_=User)
        assert user == User("Anne")
        assert session.get("user", as_=User) is session["user"] is user
        user.age = 42
        as_dict["name"] = "nobody any more"
    assert gate.pget(token, "user") == {"name": "Anne", "tags": [], "age": 42}
    with opened(gate, token) as session:
        user = session.get("user", as_=User)
        assert user
        user.age = 43
        assert session.get("user", as_=dict) == {"name": "Anne", "tags": [], "age": 43}
        session["user"]["more"] = True
    assert gate.pget(token, "user") == {"name": "Anne", "tags": [], "age": 43, "more": True}


@both
@in_memory
def test_defaults_are_no_change(gate: AnyGate, raw: AnyGate) -> None:
    """An object that was read and left alone is not written, whatever defaults its type adds."""
    needs_msgspec()
    spelt = b'{"name": "Ann", "unknown": 1}'
    token = raw.start(300, {"user": spelt})
    with opened(gate, token) as session:
        assert session.get("user", as_=User) == User("Ann")
    assert raw.pget(token, "user") == spelt


@both
@in_memory
def test_another_type_is_no_change(gate: AnyGate, raw: AnyGate) -> None:
    """What was read as one type and then as another, and left alone, is not written either."""
    needs_msgspec()
    spelt = b'{"name": "Ann", "unknown": 1}'
    token = raw.start(300, {"user": spelt})
    with opened(gate, token) as session:
        assert session.get("user", as_=User) == User("Ann")
        assert session.get("user", as_=dict) == {"name": "Ann", "unknown": 1}
    assert raw.pget(token, "user") == spelt


@both
@in_memory
def test_a_type_that_does_not_fit(gate: AnyGate) -> None:
    """What is not of the type asked for raises; it is still read as what it is, and changed."""
    needs_msgspec()
    token = gate.start(300, {"cart": [1]})
    with opened(gate, token) as session:
        with pytest.raises(PayloadDecodeError):
            session.get("cart", as_=User)
        session["cart"].append(2)
        with pytest.raises(PayloadDecodeError):
            session.get("cart", as_=User)
        assert session.get("missing", as_=User) is None
        assert session.get("missing", 7, as_=User) == 7
    assert gate.pget(token, "cart") == [1, 2]


@both
@in_memory
def test_bytes(raw: AnyGate) -> None:
    """Without a codec payloads are bytes, what was assigned as text or a buffer as well."""
    buffer = bytearray(b"buffer")
    with opened(raw, None) as session:
        session["text"] = "José"
        session["buffer"] = buffer
        buffer[:] = b"reused"
        assert dict(session) == {"text": "José".encode(), "buffer": b"buffer"}
    with opened(raw, session.token) as session:
        assert session.get("text", as_=str) == "José"
        assert session.get("text", as_=bytes) == "José".encode()
        assert session["buffer"] == b"buffer"


# What goes wrong meanwhile


@both
@anywhere
@pytest.mark.parametrize(
    "error", [OSError, KeyboardInterrupt, asyncio.CancelledError, SystemExit, GeneratorExit]
)
def test_an_exception_stores_nothing(gate: AnyGate, error: type[BaseException]) -> None:
    """A block that an exception leaves stores nothing of what it did, and lets it through."""
    token = gate.start(300, {"a": [1], "b": 2})

    def work() -> None:
        with opened(gate, token) as session:
            session["a"].append(2)
            del session["b"]
            session["c"] = 3
            raise error

    with pytest.raises(error):
        work()
    assert gate.pall(token) == {"a": [1], "b": 2}


@both
@in_memory
def test_an_exception_starts_nothing(gate: AnyGate) -> None:
    """Nor is there a session when an exception leaves a block that was to start one."""
    unstarted = opened(gate, None, subject="alice")
    with suppress(OSError), unstarted:
        unstarted["a"] = 1
        raise OSError
    assert unstarted.token is None
    assert gate.sessions("alice") == []


async def test_a_task_that_is_cancelled() -> None:
    """A task that is cancelled in its block stores nothing of what it did."""
    async with AsyncSessionGate.from_url("memory://", sign_key=SIGN_KEY, codec=JSONCodec()) as gate:
        token = await gate.start(300, {"a": 1})
        inside = asyncio.Event()

        async def work() -> None:
            async with gate.open(token) as session:
                session["a"] = 2
                inside.set()
                await asyncio.sleep(SECONDS)

        task = asyncio.create_task(work())
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await gate.pall(token) == {"a": 1}


ENDINGS: dict[str, Callable[[AnyGate, str], object]] = {
    "ended": lambda gate, token: gate.end(token),
    "expired": lambda gate, token: gate.expire(token, 0),
    "renewed without a grace": lambda gate, token: gate.renew(token, grace=0),
}


@both
@anywhere
@pytest.mark.parametrize("how", ENDINGS)
def test_a_session_that_ended_meanwhile(backend: Backend, gate: AnyGate, how: str) -> None:
    """A session that ended is told of at the read or the write, and is not brought back."""
    token = gate.start(300, {"a": [1], "b": 2})
    read, unread = opened(gate, token), opened(gate, token)
    assert read["a"] == [1]
    with opened(gate, token) as unchanged:
        assert unchanged["b"] == 2
        ENDINGS[how](gate, token)
    with pytest.raises(SessionNotFoundError):
        unread.get("a")
    with pytest.raises(SessionNotFoundError), read:
        read["a"].append(2)
    with pytest.raises(SessionNotFoundError), unread:
        unread["a"] = 3
    with pytest.raises(SessionNotFoundError), opened(gate, token) as session:
        del session["a"]
    with pytest.raises(SessionNotFoundError):
        read.save()
    with pytest.raises(SessionNotFoundError):
        opened(gate, token).renew()
    with pytest.raises(SessionNotFoundError):
        opened(gate, token).end()
    client = backend.client()
    held = [key for key in client.scan_iter("sg-session:{*") if client.hexists(key, ":a")]
    client.close()
    assert len(held) == (how == "renewed without a grace")


@both
@in_memory
def test_end_inside_of_the_block(gate: AnyGate) -> None:
    """A session that the block ends is over at once, and nothing of it is stored or held."""
    token = gate.start(300, {"a": 1})
    with opened(gate, token) as session:
        session["a"] = 2
        session.end()
        with pytest.raises(SessionNotFoundError):
            gate.touch(token)
        assert session.token is None
        assert session.expires_at is None
        assert dict(session) == {}
        session.end()
        session.save()
    assert session.token is None
    with pytest.raises(SessionNotFoundError):
        gate.touch(token)


@both
@in_memory
def test_another_session_after_the_end(gate: AnyGate) -> None:
    """What is assigned after a session was ended starts another one, and so does a sign-in."""
    token = gate.start(300, {"a": 1}, subject="alice")
    with opened(gate, token) as session:
        assert session.subject == "alice"
        session.end()
        assert session.subject is None
        session["b"] = 2
    assert session.token != token
    assert gate.pall(str(session.token)) == {"b": 2}
    assert gate.info(str(session.token)).subject is None
    with opened(gate, session.token) as session:
        session["c"] = 3
        session.end()
        session.renew(subject="bob")
        session["d"] = 4
    assert gate.pall(str(session.token)) == {"d": 4}
    assert [info.id for info in gate.sessions("bob")] == [session.id]
    assert gate.sessions("alice") == []


@both
@in_memory
def test_end_of_what_was_never_started(gate: AnyGate) -> None:
    """To end before there is a session is to start none."""
    with opened(gate, None, subject="alice") as session:
        session["a"] = 1
        session.end()
    assert session.token is None
    assert gate.sessions("alice") == []


# Renewal and sign-in


@both
@anywhere
@pytest.mark.parametrize("seals", [False, True], ids=["plain", "sealed"])
@pytest.mark.parametrize("reads_before", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize("subject", [None, "alice"])
def test_renew_inside_of_the_block(
    backend: Backend, subject: str | None, reads_before: bool, seals: bool
) -> None:
    """A renewed session goes on under its new token, with all changes from before and after."""
    options: dict[str, Any] = {"sealing_key": SEALING_KEY} if seals else {}
    gate: AnyGate = backend.gate(codec=JSONCodec(), **options)
    token = gate.start(300, {"a": [1], "b": [2], "kept": [3], "gone": 4})
    with opened(gate, token) as session:
        if reads_before:
            session["a"].append("before")
            assert session.subject is None
        session["new"] = "before"
        session.renew(subject=subject)
        assert session.token != token
        if reads_before:
            assert session.subject == subject
        assert gate.pall(session.token) == {"a": [1], "b": [2], "kept": [3], "gone": 4}  # type: ignore[arg-type]  # there is one
        session["b"].append("after")
        del session["gone"]
        assert session["kept"] == [3]
    assert session.token
    assert session.id == gate.verify(session.token)
    assert (session.id == gate.verify(token)) == (subject is None)
    assert session.subject == gate.info(session.token).subject == subject
    assert gate.pall(session.token) == {
        "a": [1, "before"] if reads_before else [1],
        "b": [2, "after"],
        "kept": [3],
        "new": "before",
    }
    if subject:
        with pytest.raises(SessionNotFoundError):
            gate.touch(token)
    else:
        gate.touch(token)


@both
@in_memory
def test_the_grace_of_a_renewal(gate: AnyGate) -> None:
    """A renewal inside of a block has the grace that it is given."""
    token = gate.start(300, {"a": 1})
    with opened(gate, token) as session:
        session.renew(grace=0)
        assert session["a"] == 1
        with pytest.raises(ArgumentError, match="grace"):
            session.renew(grace=5, subject="alice")
    with pytest.raises(SessionNotFoundError):
        gate.touch(token)


@both
@anywhere
@pytest.mark.parametrize("seals", [False, True], ids=["plain", "sealed"])
def test_a_sign_in_without_a_session(backend: Backend, seals: bool) -> None:
    """A sign-in starts the subject's session if there is none, with what was assigned so far."""
    options: dict[str, Any] = {"sealing_key": SEALING_KEY} if seals else {}
    gate: AnyGate = backend.gate(codec=JSONCodec(), **options)
    with opened(gate, None, ttl=100, idle_timeout=50) as session:
        session["cart"] = ["book"]
        session.renew(subject="alice")
        assert session.token
        assert gate.pall(session.token) == {"cart": ["book"]}
        session["cart"].append("pen")
    info = gate.info(session.token)
    assert (info.subject, info.idle_timeout, info.id) == ("alice", 50, session.id)
    assert gate.pall(session.token) == {"cart": ["book", "pen"]}
    with opened(gate, None) as empty:
        empty.renew(subject="bob")
    assert [info.id for info in gate.sessions("bob")] == [empty.id]
    assert empty.subject == "bob"


@both
@anywhere
def test_a_session_is_started_as_told(gate: AnyGate) -> None:
    """What open(None) starts has the ttl, subject and idle timeout given, or a day and none."""
    with opened(gate, None, ttl=100, subject="alice", idle_timeout=50) as session:
        session["a"] = 1
        assert session.token is None
        assert session.id is None
        assert session.subject == "alice"
    assert session.token
    info = gate.info(session.token)
    assert (info.id, info.subject, info.idle_timeout) == (session.id, "alice", 50)
    assert 95 <= (info.expires_at - info.created_at).total_seconds() <= 101
    with opened(gate, None) as session:
        session["a"] = 1
    assert session.token
    info = gate.info(session.token)
    assert (info.subject, info.idle_timeout) == (None, None)
    assert abs(info.expires_at - info.created_at - timedelta(days=1)) < timedelta(seconds=1)


@both
@in_memory
def test_what_is_told_of_a_session(gate: AnyGate) -> None:
    """A handle tells whose the session is and when it ends, of a token in bytes as well."""
    token = gate.start(300, {"a": 1}, subject="alice")
    session = opened(gate, token.encode(), names=[])
    info = gate.info(token)
    assert (session.id, session.subject, session.token) == (info.id, "alice", token)
    assert session.expires_at
    assert abs(session.expires_at - info.expires_at) < timedelta(seconds=1)


@both
@in_memory
def test_too_many_sessions(backend: Backend) -> None:
    """A start beyond the subject's limit raises, and neither starts nor stores anything."""
    gate: AnyGate = backend.gate(codec=JSONCodec(), max_sessions=1, on_overflow="reject")
    first = gate.start(300, subject="alice")
    session = opened(gate, None, subject="alice")
    with pytest.raises(TooManySessionsError), session:
        session["a"] = 1
    assert (session.token, session.id) == (None, None)
    assert [info.id for info in gate.sessions("alice")] == [gate.verify(first)]
    gate.end(first)
    session.save()
    assert session.token
    assert gate.pall(session.token) == {"a": 1}


@both
@in_memory
def test_a_sign_in_that_is_refused(backend: Backend) -> None:
    """A session that may not sign in stays what it is, with what the block changes."""
    gate: AnyGate = backend.gate(codec=JSONCodec(), max_sessions=1, on_overflow="reject")
    gate.start(300, subject="alice")
    token = gate.start(300, {"a": 1})
    with opened(gate, token) as session:
        session["a"] = 2
        with pytest.raises(TooManySessionsError):
            session.renew(subject="alice")
        assert session.subject is None
    assert session.token == token
    assert gate.pall(token) == {"a": 2}
    assert gate.info(token).subject is None


@both
@in_memory
def test_a_sign_in_that_is_refused_without_a_session(backend: Backend) -> None:
    """Whoever was refused a sign-in is nobody: what is stored later starts no session of theirs."""
    gate: AnyGate = backend.gate(codec=JSONCodec(), max_sessions=1, on_overflow="reject")
    first = gate.start(300, subject="alice")
    with opened(gate, None) as session:
        session["a"] = 1
        with pytest.raises(TooManySessionsError):
            session.renew(subject="alice")
        gate.end(first)
    assert session.token
    assert gate.info(session.token).subject is None


# While it is saved


@pytest.mark.parametrize("flavour", ["async"], indirect=True)
def test_a_change_while_it_is_saved(wire: Wire) -> None:
    """What another task of the request changes while the handle is saved is stored later."""
    gate: AsyncSessionGate[Any, Any] = cast("Any", wire.gate).awaited

    async def work() -> dict[str, Any]:
        token = await gate.start(300, {"deleted": 1, "kept": 2})
        session = await gate.open(token).load()
        session["a"] = 1
        session["b"] = 1
        del session["deleted"]
        saving = asyncio.create_task(session.save())
        await asyncio.sleep(0)
        session["a"] = 2
        del session["b"]
        del session["kept"]
        await saving
        await session.save()
        return await gate.pall(token)

    assert cast("Any", wire.gate)._runner.run(work()) == {"a": 2}


# Writes that are not confirmed


@both
@on_a_server
def test_too_few_replicas(backend: Backend) -> None:
    """A write that too few replicas have is made, told of, and not made again."""
    gate: AnyGate = backend.gate(codec=JSONCodec(), timeout=0.3, min_replicas=1)
    looking: AnyGate = backend.gate(codec=JSONCodec())
    gate.touch(looking.start(300))  # it is connected
    session = opened(gate, None)
    with pytest.raises(UnderReplicatedError), session:
        session["a"] = [1]
    token = session.token
    assert token
    assert looking.pall(token) == {"a": [1]}
    session.save()  # there is nothing left to store
    session = opened(gate, token)
    with pytest.raises(UnderReplicatedError), session:
        session["a"].append(2)
    assert looking.pall(token) == {"a": [1, 2]}
    session.save()
    session = opened(gate, token)
    session["b"] = 1
    for subject in (None, "alice"):
        with pytest.raises(UnderReplicatedError):
            session.renew(subject=subject)
        assert session.token not in (token, None)
        token = session.token
    with pytest.raises(UnderReplicatedError):
        session.save()
    assert token
    assert looking.pall(token) == {"a": [1, 2], "b": 1}
    with pytest.raises(UnderReplicatedError):
        session.end()
    assert session.token is None
    with pytest.raises(SessionNotFoundError):
        looking.touch(token)


@both
def test_a_lost_reply(wire: Wire) -> None:
    """When the reply to the write is lost that is told, and a later save makes it once more."""
    token = wire.gate.start(300, {"a": [1], "b": 2})
    session = opened(wire.gate, token).load()
    session["a"].append(2)
    del session["b"]
    session["c"] = 3
    wire.proxy.cut_replies = 1
    with pytest.raises(LostError), session:
        pass
    assert wire.proxy.cut_replies == 0
    session.save()
    assert wire.gate.pall(token) == {"a": [1, 2], "c": 3}
    wire.trips()
    session.save()
    assert wire.trips() == 0


@both
def test_a_lost_reply_to_a_start(wire: Wire) -> None:
    """When the reply to a start is lost it is sent again; when all are, a later save starts it."""
    with opened(wire.gate, None, subject="alice") as session:
        session["a"] = [1]
        wire.proxy.cut_replies = 1
    assert [info.id for info in wire.gate.sessions("alice")] == [session.id]
    session = opened(wire.gate, None)
    session["a"] = [1]
    wire.proxy.cut_replies = 1000
    with pytest.raises(LostError), session:
        pass
    wire.proxy.cut_replies = 0
    assert session.token is None
    session.save()
    assert session.token
    assert wire.gate.pall(session.token) == {"a": [1]}


# Misuse


@both
def test_after_the_block(wire: Wire) -> None:
    """After its block a handle is read, and neither assigned nor entered."""
    token = wire.gate.start(300, {"a": 1})
    with opened(wire.gate, token) as session:
        assert session["a"] == 1
    wire.trips()
    for misuse in (
        lambda: session.__setitem__("a", 2),
        lambda: session.__delitem__("a"),
        lambda: session.pop("a"),
        lambda: session.update(a=2),
        lambda: session.setdefault("b", 2),
        session.clear,
        session.__enter__,
    ):
        with pytest.raises(HandleError, match="block is over"):
            misuse()
    assert session["a"] == 1
    session.save()
    assert wire.trips() == 0
    assert wire.gate.pall(token) == {"a": 1}


@both
@in_memory
def test_names_that_were_not_named(gate: AnyGate) -> None:
    """Of names that were not to be read a handle does not say whether they are there."""
    token = gate.start(300, {"a": [1], "b": 2, "c": 3})
    with opened(gate, token, names=(name for name in ["a", "missing", "a"])) as session:
        assert dict(session) == {"a": [1]}
        assert session.get("missing") is None
        for misuse in (
            lambda: session["b"],
            lambda: session.get("b"),
            lambda: session.pop("b", None),
            lambda: session.setdefault("b", 1),
            lambda: session.__delitem__("b"),
            lambda: "b" in session,
        ):
            with pytest.raises(HandleError, match="name it in open"):
                misuse()
        session["a"].append(2)
        session["b"] = 4
        assert dict(session) == {"a": [1, 2], "b": 4}
    assert gate.pall(token) == {"a": [1, 2], "b": 4, "c": 3}
    with opened(gate, token, names=["a"]) as session:
        session.clear()
    assert gate.pall(token) == {"b": 4, "c": 3}


@both
@in_memory
def test_a_name_that_was_not_named_is_assigned_and_deleted(gate: AnyGate) -> None:
    """A payload that was assigned and deleted is not there afterwards, named or not."""
    token = gate.start(300, {"a": 1, "b": 2})
    with opened(gate, token, names=["a"]) as session:
        assert session["a"] == 1
        session["b"] = 3
        del session["b"]
    assert gate.pall(token) == {"a": 1}


@pytest.mark.parametrize("flavour", ["async"], indirect=True)
def test_reading_before_loading(wire: Wire) -> None:
    """Under asyncio what asks for something before it is loaded is told to load it first."""
    token = wire.gate.start(300, {"a": 1})
    wire.trips()
    session = cast("Blocked", opened(wire.gate, token)).awaited
    asks: list[Callable[[], object]] = [
        lambda: session["a"],
        lambda: session.get("a"),
        lambda: "a" in session,
        lambda: len(session),
        lambda: list(session),
        lambda: dict(session),
        lambda: session.pop("a", None),
        session.popitem,
        lambda: session.setdefault("a", 1),
        lambda: session.__delitem__("a"),
        session.clear,
        lambda: session.subject,
        lambda: session.expires_at,
    ]
    for ask in asks:
        with pytest.raises(HandleError, match=r"await session\.load"):
            ask()
    session["a"] = 2
    assert session["a"] == 2
    assert (session.token, session.id) == (token, wire.gate.verify(token))
    session._is_minded = True  # it is not to be stored
    assert wire.trips() == 0


BAD_NAMES: list[Any] = ["", "x" * 201, "\ud800", 7, None, b"a"]
LOOP: list[Any] = []
LOOP.append(LOOP)


@both
@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, 1) for name in BAD_NAMES), *(("a", v) for v in (object(), float("nan"), LOOP))],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_stored(wire: Wire, name: Any, value: Any) -> None:
    """A name or value out of its limits is refused where it is assigned; the rest is stored."""
    token = wire.gate.start(300, {"a": 1})
    wire.trips()
    with opened(wire.gate, token) as session:
        session["b"] = 2
        with pytest.raises(ArgumentError):
            session[name] = value
        with pytest.raises(ArgumentError):
            session.update({name: value})
        assert wire.trips() == 0
    assert wire.gate.pall(token) == {"a": 1, "b": 2}


@both
@in_memory
@pytest.mark.parametrize("value", [None, b"", "", 7, "\ud800"], ids=repr)
def test_what_are_no_bytes(raw: AnyGate, value: Any) -> None:
    """Without a codec what is neither bytes nor text is refused where it is assigned."""
    with opened(raw, None) as session, pytest.raises(ArgumentError, match="data of payload 'a'"):
        session["a"] = value
    assert session.token is None


@both
@in_memory
def test_a_name_that_cannot_be(gate: AnyGate) -> None:
    """Of a name that no payload can have a handle says that there is none."""
    token = gate.start(300, {"a": 1})
    session = opened(gate, token)
    for name in BAD_NAMES:
        assert session.get(name, "none") == "none"
        assert name not in session
        with pytest.raises(KeyError):
            session[name]
        with pytest.raises(KeyError):
            del session[name]


@both
@in_memory
def test_a_value_that_becomes_bad(gate: AnyGate) -> None:
    """A change in place to what cannot be stored is told at the end, and nothing at all stored."""
    token = gate.start(300, {"a": [1], "b": 1})
    session = opened(gate, token)
    session["b"] = 2
    session["a"].append(object())
    with pytest.raises(ArgumentError, match="payload 'a'"), session:
        pass
    assert gate.pall(token) == {"a": [1], "b": 1}
    session["a"].pop()
    session.save()
    assert gate.pall(token) == {"a": [1], "b": 2}


@both
def test_what_cannot_be_opened(wire: Wire) -> None:
    """A token or an option out of its limits is refused when it is given, and nothing sent."""
    token = wire.gate.start(300)
    wire.trips()
    stranger = SessionGate.from_url("memory://", sign_key="another sign key, of 32 bytes too")
    forged = stranger.start(300)
    stranger.close()
    for bad, error in (("no token", MalformedTokenError), (forged, BadSignatureError)):
        with pytest.raises(error):
            wire.gate.open(bad)
    options: list[dict[str, Any]] = [
        {"ttl": -1},
        {"ttl": 1.5},
        {"idle_timeout": 0},
        {"names": "a"},
        {"names": [7]},
        {"names": [""]},
    ]
    for option in options:
        for its_token in (token, None):
            with pytest.raises(ArgumentError):
                wire.gate.open(its_token, **option)
    assert wire.trips() == 0


# Payloads that cannot be read, or end before the session


@both
@in_memory
def test_a_missing_payload(gate: AnyGate) -> None:
    """A payload that is not there is a KeyError, of a handle and of a gate."""
    session = opened(gate, gate.start(300))
    with pytest.raises(KeyError, match="missing"):
        session["missing"]
    with pytest.raises(KeyError) as caught:
        gate.pget(gate.start(300), "missing")
    assert type(caught.value) is PayloadNotFoundError
    assert str(caught.value) == "the session holds no payload named 'missing'"


@both
@anywhere
@pytest.mark.parametrize("error", [PayloadDecodeError, UnsealError])
def test_a_payload_that_cannot_be_read(
    backend: Backend, raw: AnyGate, error: type[SessionGateError]
) -> None:
    """What cannot be decoded or unsealed raises where it is read, and is left as it is."""
    options: dict[str, Any] = {"sealing_key": SEALING_KEY} if error is UnsealError else {}
    gate: AnyGate = backend.gate(codec=JSONCodec(), **options)
    token = gate.start(300, {"good": [1], "also": 2})
    raw.pset(token, "bad", b"{\xff")
    with opened(gate, token) as session:
        assert session["good"] == [1]
        assert "bad" in session
        assert sorted(session) == ["also", "bad", "good"]
        for ask in (
            lambda: session["bad"],
            lambda: session.get("bad", 7),
            lambda: session.pop("bad", None),
            lambda: dict(session),
        ):
            with pytest.raises(error) as caught:
                ask()
            assert caught.value.name == "bad"  # type: ignore[attr-defined]  # both have it
        session["good"].append(2)
    assert raw.pget(token, "bad") == b"{\xff"
    assert gate.pget(token, "good") == [1, 2]
    with opened(gate, token) as session:
        session["bad"] = "good"
    assert gate.pall(token) == {"good": [1, 2], "also": 2, "bad": "good"}
    raw.pset(token, "bad", b"{\xff")
    with opened(gate, token) as session:
        del session["bad"]
    assert gate.pall(token) == {"good": [1, 2], "also": 2}


@both
@anywhere
@pytest.mark.parametrize("seals", [False, True], ids=["plain", "sealed"])
def test_a_payload_with_an_end_of_its_own(backend: Backend, seals: bool) -> None:
    """A payload that ends by itself is read as any other, and ends when it was to if left alone."""
    options: dict[str, Any] = {"sealing_key": SEALING_KEY} if seals else {}
    gate: AnyGate = backend.gate(codec=JSONCodec(), **options)
    token = gate.start(300, {"a": 1})
    gate.pset(token, "code", ["123"], ttl=100)
    gate.pset(token, "over", "x", ttl=0)
    client = backend.client()
    key = f"sg-session:{{{gate.verify(token)}}}"
    before = client.hget(key, ";code")
    assert before
    for handle in (opened(gate, token), opened(gate, token, names=["code", "a", "over"])):
        with handle as session:
            assert session["code"] == ["123"]
            assert "over" not in session
            session["a"] += 1
    assert client.hget(key, ";code") == before
    with opened(gate, token) as session:
        session["code"].append("456")
    assert client.hget(key, ";code") is None
    assert gate.pall(token) == {"a": 3, "code": ["123", "456"]}
    client.close()


@both
@in_memory
def test_what_is_shown_of_a_handle(gate: AnyGate) -> None:
    """A handle is shown by its kind and its id: without token, names, data or subject."""
    token = gate.start(300, {"name of it": "secret of it"}, subject="alice")
    session = opened(gate, token)
    kind = type(getattr(session, "awaited", session)).__name__
    shown = [repr(session)]
    assert dict(session)
    session["name of it"] = "new secret"
    shown += [repr(session), str(session), f"{session}", repr(session.items())]
    session.renew()
    shown.append(repr(session))
    session_id = gate.verify(token)
    assert set(shown) - {shown[4]} == {f"<{kind} {session_id}>", f"<{kind} {session_id}, read>"}
    for secret in ("secret", "name of it", token[20:], str(session.token)[20:], "alice"):
        assert not [text for text in shown if secret in text]
    session.end()
    assert repr(session) == f"<{kind} not started, read>"
    assert repr(opened(gate, None)) == f"<{kind} not started>"


# Races

WORKERS = 5
BLOCKS = 60


def check_turn(session: AnySession | AsyncSession[Any, Any], name: str, number: int) -> None:
    """One request of a worker's: what it finds of its names is what it left."""
    assert session.get(f"{name} number", 0) == number - 1
    session[f"{name} number"] = number
    log = session.setdefault(f"{name} log", [])
    assert log == list(range(1, number))
    log.append(number)
    if number % 2:
        session[f"{name} flag"] = number
    else:
        del session[f"{name} flag"]


def expected_of(workers: list[str], blocks: int) -> dict[str, Any]:
    return {
        **{f"{name} number": blocks for name in workers},
        **{f"{name} log": list(range(1, blocks + 1)) for name in workers},
        **({f"{name} flag": blocks for name in workers} if blocks % 2 else {}),
    }


@both
@on_a_server
@pytest.mark.parametrize("seals", [False, True], ids=["plain", "sealed"])
def test_threads_and_tasks_on_one_session(backend: Backend, seals: bool) -> None:
    """Requests at once on one session, each with names of its own, lose nothing to each other."""
    options: dict[str, Any] = {"sealing_key": SEALING_KEY} if seals else {}
    gate: AnyGate = backend.gate(codec=JSONCodec(), **options)
    token = gate.start(300)
    workers = [f"worker {number}" for number in range(WORKERS)]
    barrier = Barrier(WORKERS)

    def work(name: str) -> None:
        barrier.wait(SECONDS)
        for number in range(1, BLOCKS + 1):
            with gate.open(token) as session:
                check_turn(session, name, number)

    async def work_async(gate: AsyncSessionGate[Any, Any], name: str) -> None:
        for number in range(1, BLOCKS + 1):
            async with gate.open(token) as session:
                await session.load()
                check_turn(session, name, number)

    async def work_all(gate: AsyncSessionGate[Any, Any]) -> None:
        async with asyncio.timeout(SECONDS):
            await asyncio.gather(*(work_async(gate, name) for name in workers))

    if backend.flavour.is_async:
        backend.flavour.runner.run(work_all(cast("Any", gate).awaited))
    else:
        with ThreadPoolExecutor(WORKERS) as threads:
            list(threads.map(work, workers, timeout=SECONDS))
    assert gate.pall(token) == expected_of(workers, BLOCKS)


# One process of them: it counts in names of its own, over one session.
PROCESS = """
import asyncio, json, sys
from sessiongate import AsyncSessionGate, JSONCodec, SessionGate

url, kind, name, blocks, options = sys.argv[1:]
options = {"codec": JSONCodec(), **json.loads(options)}
print("ready", flush=True)
token = sys.stdin.readline().strip()


def turn(session, number):
    assert session.get(f"{name} number", 0) == number - 1
    session[f"{name} number"] = number
    session.setdefault(f"{name} log", []).append(number)


def sync_main():
    with SessionGate.from_url(url, **options) as gate:
        for number in range(1, int(blocks) + 1):
            with gate.open(token) as session:
                turn(session, number)


async def async_main():
    async with AsyncSessionGate.from_url(url, **options) as gate:
        for number in range(1, int(blocks) + 1):
            async with gate.open(token) as session:
                await session.load()
                turn(session, number)


sync_main() if kind == "sync" else asyncio.run(async_main())
"""


@pytest.mark.parametrize("flavour", ["sync"], indirect=True)
@on_a_server
@pytest.mark.parametrize("seals", [False, True], ids=["plain", "sealed"])
def test_processes_on_one_session(backend: Backend, seals: bool) -> None:
    """Processes with both kinds of gate, each with names of its own, lose nothing either."""
    assert backend.server
    options: dict[str, Any] = {"sealing_key": SEALING_KEY} if seals else {}
    gate: AnyGate = backend.gate(codec=JSONCodec(), **options)
    token = gate.start(300)
    url = backend.flavour._with_login(f"redis://127.0.0.1:{backend.server.port}")
    told = json.dumps({"sign_key": SIGN_KEY, **options})
    blocks = 100
    kinds = {"first": "sync", "second": "sync", "third": "async"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, url, kind, name, f"{blocks}", told],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, kind in kinds.items()
    ]
    try:
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin
            process.stdin.write(f"{token}\n")
            process.stdin.flush()
        for process in processes:
            process.communicate(timeout=SECONDS)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0, 0, 0]
    expected = expected_of(list(kinds), blocks)
    assert gate.pall(token) == expected


# What looks at a handle without being asked to.


def as_reported(value: object) -> object:
    """What a reporter of errors makes of a variable: Sentry goes through containers."""
    shown = getattr(type(value), "__sentry_repr__", None)
    if shown:
        return shown(value)
    if isinstance(value, Mapping):
        return {str(name): as_reported(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [as_reported(each) for each in value]
    return repr(value)


@pytest.mark.parametrize("flavour", ["sync", "async"], indirect=True)
def test_who_looks_at_a_handle_reads_nothing(
    flavour: Flavour, caplog: pytest.LogCaptureFixture
) -> None:
    """To log, compare, count as true or report a handle neither asks Redis nor shows a payload."""
    gate = flavour.gate(flavour.client(1, retry=flavour.no_retry))  # where nobody listens
    token = SignKeyRing(SIGN_KEY).sign("A" * 16)[0]
    one, other = gate.open(token), gate.open(token)
    one["secret"] = "of this handle"
    logging.getLogger("shop").warning("request of %s", one)
    assert "A" * 16 in caplog.text
    assert one
    assert one != other
    assert one != {"secret": "of this handle"}
    assert {one, other} == {other, one}
    assert as_reported({"session": one}) == {"session": repr(one)}
    getattr(one, "awaited", one)._is_minded = True  # it is not to be stored


@pytest.mark.parametrize("flavour", ["sync"], indirect=True)
@in_memory
def test_frames_of_a_handle_report_nothing(backend: Backend) -> None:
    """What a reporter finds in our frames, as a session cannot be stored, is no payload."""
    gate = backend.gate(sealing_key="5e" * 32)
    token = gate.start(300, {"secret": "of this session"})
    uses: list[Callable[[AnySession], object]] = [
        lambda session: session.save(),
        lambda session: session.renew(subject="alice"),
    ]
    for use in uses:
        session = gate.open(token).load()
        session["other secret"] = "of this handle"
        gate.end(token)
        with pytest.raises(SessionNotFoundError) as caught:
            use(session)
        for frame, _ in traceback.walk_tb(caught.tb):
            if "sessiongate" in frame.f_code.co_filename:
                assert "of this" not in str(as_reported(dict(frame.f_locals)))
        token = gate.start(300, {"secret": "of this session"})
        session._is_minded = True  # it cannot be stored


# What an attacker of the handle tried.


@in_memory
@pytest.mark.parametrize("flavour", ["async"], indirect=True)
def test_tasks_that_share_a_handle(backend: Backend) -> None:
    """What several tasks assign, delete and store at once is stored, in one session."""
    gate = cast("Any", backend.gate(codec=JSONCodec())).awaited

    async def use() -> None:
        started = gate.open(None, subject="alice")

        async def store(name: str) -> None:
            started[name] = name
            await started.save()

        await asyncio.gather(*map(store, "abc"))
        assert await gate.pall(started.token) == {"a": "a", "b": "b", "c": "c"}
        assert len(await gate.sessions("alice")) == 1
        session = gate.open(started.token)
        session["x"] = 1
        await asyncio.gather(session.load(), session.save(), session.load())
        del session["x"]
        session["a"] = 1
        saving = asyncio.ensure_future(session.save())
        await asyncio.sleep(0)
        session["a"] = 2
        await asyncio.gather(saving, session.save())
        assert await gate.pall(started.token) == {"a": 2, "b": "b", "c": "c"}

    backend.flavour.runner.run(use())


NUMBERS = (number / 8 for number in range(10**6))


@dataclass
class Numbered:
    """What has another default each time."""

    items: list[str]
    number: float = field(default_factory=lambda: next(NUMBERS))


@both
@in_memory
def test_a_default_that_changes_is_no_change(backend: Backend) -> None:
    """What was read as a type with such a default, and not changed, is not stored."""
    gate: AnyGate = backend.gate(codec=JSONCodec())
    token = gate.start(300, {"cart": {"items": ["a"]}})
    with opened(gate, token) as session:
        assert session.get("cart", None, as_=Numbered) is not None
        gate.pset(token, "cart", {"items": ["of another request"]})
    assert gate.pget(token, "cart") == {"items": ["of another request"]}
    with opened(gate, token) as session:
        cart = session.get("cart", as_=Numbered)
        assert cart
        cart.items.append("b")
    assert gate.pget(token, "cart")["items"] == ["of another request", "b"]


@both
@in_memory
@pytest.mark.parametrize("data", [b"[1e999]", b'["\\ud800"]'])
def test_what_cannot_be_encoded_again_is_no_change(backend: Backend, data: bytes) -> None:
    """What others stored, the codec reads and cannot write, hinders no block that leaves it."""
    raw = backend.gate()
    gate: AnyGate = backend.gate(codec=JSONCodec())
    token = raw.start(300, {"odd": data})
    with opened(gate, token) as session:
        assert len(session["odd"]) == 1
        session["a"] = 1
    assert raw.pget_many(token, ["odd", "a"]) == {"odd": data, "a": b"1"}
    with pytest.raises(ArgumentError), opened(gate, token) as session:
        session["odd"].append({1j})
    assert raw.pget(token, "odd") == data


@both
@in_memory
def test_signing_out_is_no_sign_in(gate: AnyGate) -> None:
    """What is stored after `end` is nobody's, also where a started session would be somebody's."""
    token = gate.start(300, {"a": 1}, subject="alice")
    with opened(gate, token, subject="alice") as session:
        session.end()
        session["flash"] = "Good bye."
    assert gate.info(str(session.token)).subject is None
    assert gate.sessions("alice") == []


@both
@in_memory
def test_the_end_of_what_has_ended(gate: AnyGate) -> None:
    """A session that is gone already is told once, and the block stores nothing of it."""
    token = gate.start(300, {"a": 1})
    with opened(gate, token) as session:
        session["a"] = 2
        gate.end(token)
        with pytest.raises(SessionNotFoundError):
            session.end()
        assert session.token is None
    assert session.token is None


class Picky(JSONCodec):
    """A codec that fails as a dictionary does."""

    def decoder(self, as_: object, /) -> Callable[[bytes], object]:
        return {int: JSONCodec().decoder(int)}[cast("type[int]", as_)]


@both
@in_memory
def test_a_codec_that_lacks_a_type_is_no_missing_payload(backend: Backend) -> None:
    """A KeyError of a codec does not come out as the default of a payload that is there."""
    gate: AnyGate = backend.gate(codec=Picky())
    token = gate.start(300, {"a": 1})
    with opened(gate, token) as session:
        assert session.get("a", as_=int) == 1
        with pytest.raises(KeyError):
            session.get("a", "none", as_=str)


@dataclass
class Name:
    """A type that lacks a field of what is stored."""

    name: str


FULL = {"name": "Ann", "admin": True}


def ask_for_a_name(session: AnySession) -> None:
    assert session.get("user", as_=Name) == Name("Ann")


def assign_and_ask(session: AnySession) -> None:
    session["user"] = dict(FULL)
    ask_for_a_name(session)


def change_and_ask(session: AnySession) -> None:
    session["user"]["name"] = "Ann"
    ask_for_a_name(session)


def ask_and_save(session: AnySession) -> None:
    change_and_ask(session)
    session.save()
    session.save()


def ask_twice(session: AnySession) -> None:
    assign_and_ask(session)
    assert session.get("user", as_=dict[str, object]) == FULL


@both
@in_memory
@pytest.mark.parametrize("use", [assign_and_ask, change_and_ask, ask_and_save, ask_twice])
def test_to_ask_for_a_type_loses_no_field(gate: AnyGate, use: Callable[..., None]) -> None:
    """What is to be stored is stored whole, though it was asked for as a type with less fields."""
    token = gate.start(300, {"user": {**FULL, "name": "Bob"}})
    with opened(gate, token) as session:
        use(session)
    assert gate.pget(token, "user") == FULL
    # And then it is stored: another request's is left alone.
    gate.pset(token, "user", 1)
    session.save()
    assert gate.pget(token, "user") == 1


@both
@in_memory
def test_what_was_asked_for_as_a_type_and_changed_then(gate: AnyGate) -> None:
    """A change to the object of that type is stored as the type has it, once."""
    token = gate.start(300, {"user": FULL})
    with opened(gate, token) as session:
        assign_and_ask(session)
        name = session.get("user", as_=Name)
        assert name
        name.name = "Zoë"
        session.save()
        gate.pset(token, "user", 1)
    assert gate.pget(token, "user") == 1
    with opened(gate, token) as session:
        assign_and_ask(session)
        session.get("user", None, as_=Name).name = "Zoë"  # type: ignore[union-attr]  # it is there
    assert gate.pget(token, "user") == {"name": "Zoë"}


@pytest.mark.parametrize("flavour", ["async"], indirect=True)
@in_memory
def test_to_ask_for_a_type_while_it_is_stored_loses_no_field(backend: Backend) -> None:
    """Under asyncio the same holds for what another task asks for meanwhile."""
    gate = cast("Any", backend.gate(codec=JSONCodec())).awaited

    async def use() -> None:
        token = await gate.start(300)
        session = gate.open(token)
        run, asked = session._run, asyncio.Event()

        async def slowly(command: object) -> object:
            await asked.wait()
            return await run(command)

        session._run = slowly
        session["user"] = dict(FULL)
        for change in ({}, {"x": 2}):
            asked.clear()
            saving = asyncio.ensure_future(session.save())
            await asyncio.sleep(0)
            session["user"].update(change)
            ask_for_a_name(session)
            asked.set()
            await saving
            await session.save()
            assert await gate.pget(token, "user") == {**FULL, **change}
            session["user"] = {**FULL, "x": 1}

    backend.flavour.runner.run(use())


@both
@in_memory
@pytest.mark.parametrize("change", [True, 1.0])
def test_what_is_equal_may_be_a_change(backend: Backend, change: object) -> None:
    """In what cannot be encoded again 1, 1.0 and True are three: the change is told."""
    token = backend.gate().start(300, {"odd": b"[1e999,1]"})
    gate: AnyGate = backend.gate(codec=JSONCodec())
    with pytest.raises(ArgumentError), opened(gate, token) as session:
        session["odd"][1] = change


@both
@in_memory
def test_what_is_nested_to_the_limit_hinders_no_block(backend: Backend) -> None:
    """A payload so deep that it can just be read is left, and the others are stored."""
    raw, gate = backend.gate(), cast("AnyGate", backend.gate(codec=JSONCodec()))
    token, read = raw.start(300), 0
    for depth in range(800, 1_000):
        raw.pset(token, "tree", b"[" * depth + b"]" * depth)
        with opened(gate, token) as session, suppress(PayloadDecodeError):
            read += bool(session["tree"] is not None)
            session["other"] = depth
        assert raw.pget(token, "tree") == b"[" * depth + b"]" * depth
        if read == depth - 799:
            assert gate.pget(token, "other") == depth
    assert read > 50


def forget(sessions: list[AnySession]) -> None:
    sessions.clear()
    gc.collect()  # the memory store may keep the frames of the first use of a script


FORGOTTEN: dict[str, Callable[[AnySession], object]] = {
    "assigned": lambda session: session.update(a=1),
    "assigned and asked for": lambda session: (session.update(a={}), session.get("a", as_=Part)),
    "deleted": lambda session: session.pop("cart"),
    "cleared": lambda session: session.clear(),
}
MINDED: dict[str, Callable[[AnySession], object]] = {
    "only read": lambda session: session["cart"],
    "saved": assign_and_save,
    "renewed": lambda session: session.renew(),
    "ended": assign_and_end,
}


@both
@in_memory
@pytest.mark.parametrize("name", FORGOTTEN)
def test_a_forgotten_with_is_told(gate: AnyGate, name: str) -> None:
    """A handle with changes that nobody was going to store says so when it goes, not what."""
    token = gate.start(300, {"cart": ["book"]})
    sessions = [opened(gate, token)]
    FORGOTTEN[name](sessions[0])
    with pytest.warns(RuntimeWarning, match=r"never stored.*session\.save\(\)") as told:
        forget(sessions)
    assert len(told) == 1
    assert gate.pall(token) == {"cart": ["book"]}


@both
@in_memory
@pytest.mark.parametrize("name", MINDED)
def test_nothing_forgotten_is_not_told(gate: AnyGate, name: str) -> None:
    """A handle with nothing to store, or that was stored, warns of nothing."""
    sessions = [opened(gate, gate.start(300, {"cart": ["book"]}))]
    MINDED[name](sessions[0])
    with warnings.catch_warnings(record=True) as told:
        forget(sessions)
    assert not told


@both
@in_memory
def test_what_could_not_be_saved_is_told_once(gate: AnyGate) -> None:
    """What `save` could not store is told by its error, and not again when the handle goes."""
    token = gate.start(300)
    sessions = [opened(gate, token)]
    sessions[0]["a"] = 1
    gate.end(token)
    with warnings.catch_warnings(record=True) as told:
        with suppress(SessionNotFoundError):
            sessions[0].save()
        forget(sessions)
    assert not told


@both
@in_memory
def test_an_error_in_the_block_forgets_on_purpose(gate: AnyGate) -> None:
    """What a block that raised did not store is told by its error alone."""
    with warnings.catch_warnings(record=True) as told:
        with suppress(ZeroDivisionError), opened(gate, None) as session:
            session["a"] = 1
            session["b"] = 1 / 0
        del session
        gc.collect()
    assert not told


@both
@in_memory
def test_ways_to_assign(raw: AnyGate, gate: AnyGate) -> None:
    """`setdefault`, `update` and `|=` do what they do to a dict, with values as they come back."""
    with opened(raw, None) as session:
        session.setdefault("a", "1")
        assert session.setdefault("a", "2") == session["a"] == b"1"
        session.update({"b": "2"}, c="3")
        session.update([("d", "4"), ("e", b"5")])
        session.update()
    token = str(session.token)
    assert raw.pall(token) == {"a": b"1", "b": b"2", "c": b"3", "d": b"4", "e": b"5"}
    with pytest.raises(ArgumentError, match="payload 'f'"), opened(raw, token) as session:
        session.setdefault("f")
    with opened(gate, token) as session:
        one: Any = getattr(session, "awaited", session)
        one |= {"a": [1]}
        assert one is getattr(session, "awaited", session)
        assert session.setdefault("f") is None
        session.setdefault("a", []).append(2)
    assert gate.pget_many(token, ["a", "f"]) == {"a": [1, 2], "f": None}


@both
def test_who_signed_in_is_known(wire: Wire) -> None:
    """After a sign-in through the handle its subject is told without asking for it."""
    token = wire.gate.start(300, {"a": 1})
    session = opened(wire.gate, token)
    session.renew(subject="alice")
    wire.trips()
    session = getattr(session, "awaited", session)
    assert session.subject == "alice"
    assert wire.trips() == 0
    # Who was named for a session that might be started is no subject of one that is there.
    other = opened(wire.gate, wire.gate.start(300), subject="bob")
    assert other.subject is None


@both
@in_memory
def test_what_could_not_be_made_can_be_shown(backend: Backend, gate: AnyGate) -> None:
    """With a forged token or a wrong argument, whoever reports the error finds reprs that work."""
    calls: list[Callable[[], object]] = [
        lambda: gate.open("forged"),
        lambda: gate.open(None, names="cart"),
        lambda: gate.open(None, subject=""),
        lambda: backend.gate(codec=JSONCodec),
        lambda: backend.gate(codec=JSONCodec(), sealing_key="short"),
        lambda: backend.gate(prefix="{"),
    ]
    for call in calls:
        with pytest.raises(SessionGateError) as caught:
            call()
        shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
        assert "sessiongate" in "".join(shown.format())
    token = gate.start(300)
    for copied in (copy, deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="neither copied nor pickled"):
            copied(gate.open(token))


@dataclass
class Tree:
    """What can be changed far inside."""

    trees: list["Tree"] = field(default_factory=list)


@both
@in_memory
def test_what_is_changed_back_after_it_was_saved(gate: AnyGate) -> None:
    """A value of a type that is changed, saved and changed back is stored as it was first."""
    token = gate.start(300, {"x": {"trees": []}})
    with opened(gate, token) as session:
        tree = session.get("x", as_=Tree)
        assert tree
        tree.trees.append(Tree())
        session.save()
        tree.trees.pop()
    assert gate.pget(token, "x") == {"trees": []}


@both
@in_memory
def test_what_is_inside_of_a_tuple(gate: AnyGate) -> None:
    """A tuple does not change, but what it holds may, and is stored."""
    with opened(gate, None) as session:
        held: list[int] = [1]
        session["a"] = (held,)
        session.save()
        held.append(2)
    assert gate.pget(str(session.token), "a") == [[1, 2]]


@both
@in_memory
def test_the_type_that_a_value_has_is_that_value(gate: AnyGate) -> None:
    """What is asked for as the type that it is of is the object that was read."""
    with opened(gate, gate.start(300, {"a": [1]})) as session:
        held: Any = session["a"]
        assert id(session.get("a", as_=list)) == id(held)
        held.append(2)
    assert gate.pget(str(session.token), "a") == [1, 2]


@both
@in_memory
def test_a_block_that_could_not_store_is_over(gate: AnyGate) -> None:
    """After a block whose changes could not be stored nothing more is assigned."""
    token = gate.start(300)
    with suppress(SessionNotFoundError), opened(gate, token) as session:
        session["a"] = 1
        gate.end(token)
    with pytest.raises(HandleError, match="block is over"):
        session["a"] = 2


@both
@in_memory
def test_arguments_without_a_session(gate: AnyGate) -> None:
    """What is no grace or no subject is told at once, whether there is a session or not."""
    with pytest.raises(ArgumentError):
        opened(gate, None).renew(grace=-1)
    with pytest.raises(ArgumentError):
        opened(gate, None).renew(grace=5, subject="alice")
    with pytest.raises(ArgumentError):
        opened(gate, None, subject="")


@both
@in_memory
def test_names_are_of_a_session_that_was_there(gate: AnyGate) -> None:
    """Of a session that the handle started it knows all, named or not."""
    session = opened(gate, None, names=["a"])
    session["a"] = 1
    session.save()
    with pytest.raises(PayloadNotFoundError):
        session["b"]


@both
@in_memory
def test_a_payload_with_an_end_of_its_own_is_deleted(raw: AnyGate) -> None:
    """By a handle and by pset_many as any other payload."""
    token = raw.start(300)
    raw.pset(token, "code", "1", ttl=100)
    with opened(raw, token) as session:
        del session["code"]
    assert raw.pall(token) == {}
    raw.pset(token, "code", "1", ttl=100)
    raw.pset_many(token, {}, delete=["code"])
    assert raw.pall(token) == {}


@pytest.mark.parametrize("flavour", ["async"], indirect=True)
@in_memory
def test_tasks_that_load_renew_and_end_at_once(backend: Backend) -> None:
    """Of several tasks that do the same to a session one does it, and none fails."""
    gate = cast("Any", backend.gate(codec=JSONCodec())).awaited

    async def use() -> None:
        session = gate.open(await gate.start(300, {"a": [1]}))
        sent: list[object] = []
        run = session._run

        async def slowly(command: object) -> object:
            sent.append(command)
            await asyncio.sleep(0)
            return await run(command)

        session._run = slowly
        await asyncio.gather(session.load(), session.load())
        assert len(sent) == 1
        await asyncio.gather(session.end(), session.end())
        assert len(sent) == 2
        await asyncio.gather(session.renew(subject="alice"), session.renew(subject="alice"))
        assert len(await gate.sessions("alice")) == 1

    backend.flavour.runner.run(use())


@dataclass
class Part:
    """A type that lacks most of what is stored."""

    new: list[int] | None = None


@in_memory
@pytest.mark.parametrize("flavour", ["sync"], indirect=True)
@pytest.mark.parametrize("sealing_key", [None, SEALING_KEY], ids=["plain", "sealed"])
def test_whatever_types_a_payload_is_asked_for(backend: Backend, sealing_key: str | None) -> None:
    """It is stored as it is in the application's hands, whole unless a narrower object changed."""
    gate: AnyGate = backend.gate(codec=JSONCodec(), sealing_key=sealing_key)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.sampled_from(["assign", "grow", "part", "dict", "save"]), max_size=12))
    def check(steps: list[str]) -> None:
        whole: dict[str, Any] = {"x": 0}
        token = gate.start(300, {"p": whole})
        session = gate.open(token)
        for number, step in enumerate(steps):
            if step == "assign":
                whole = {"x": number, "new": [number]}
                session["p"] = deepcopy(whole)
            elif step == "grow":
                held = session["p"]
                if isinstance(held, Part):
                    held.new = [*(held.new or []), number]
                    whole = {"new": held.new}
                else:
                    held["new"] = [*held.get("new", []), number]
                    whole = deepcopy(held)
            elif step == "part":
                assert session.get("p", as_=Part) == Part(whole.get("new"))
            elif step == "dict":
                assert session.get("p", as_=dict) == whole
            else:
                session.save()
                assert gate.pget(token, "p") == whole
                gate.pset(token, "p", "of another request")
                session.save()
                assert gate.pget(token, "p") == "of another request"
                gate.pset(token, "p", whole)
        session.save()
        assert gate.pget(token, "p") == whole

    check()
