"""Codecs: values go in and come out, whatever the operation, and nothing else comes of them."""

import ast
import datetime as dt
import enum
import json
import math
import subprocess
import sys
import textwrap
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, cast
from uuid import UUID

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sessiongate
from sessiongate import (
    ArgumentError,
    BytesCodec,
    Codec,
    ConfigurationError,
    JSONCodec,
    MsgpackCodec,
    PayloadConflictError,
    PayloadDecodeError,
    PayloadNotFoundError,
    PayloadOverflowError,
    PayloadTypeError,
    SessionGate,
    SessionGateError,
)
from sessiongate.tokens import SignKeyRing
from sessiongate.values import Values

from .conftest import SIGN_KEY, Backend, Flavour

Gate = SessionGate[Any, Any]

SECRET = "payload-that-must-not-leak-anywhere"
TOKEN = SignKeyRing(SIGN_KEY).sign("A" * 16)[0]
LEAST, MOST = -(2**63), 2**63 - 1

# What a codec does, it does before anything is sent and after everything was answered: where that
# is, and over which connection, is all the same to it.
one_gate = pytest.mark.parametrize(
    ("backend", "flavour"), [("memory", "sync"), ("memory", "async")], indirect=True
)


class Deflated:
    """As small as a codec can be: one of the application's own, without `decoder`."""

    def encode(self, value: str) -> bytes:
        return zlib.compress(value.encode())

    def decode(self, data: bytes) -> str:
        return zlib.decompress(data).decode()


class User(msgspec.Struct):
    """What an application stores."""

    name: str
    age: int = 0


@dataclass
class Item:
    """Likewise, without msgspec."""

    title: str
    price: Decimal


class Level(enum.IntEnum):
    """Numbers under names, two of which MessagePack writes as `-` and `5` would be."""

    LOW = 7
    DASH = 45
    FIVE = 53
    HIGH = 300


CODECS: dict[str, tuple[Callable[[], Codec[Any, Any]], list[Any]]] = {
    "bytes": (BytesCodec, [b"1", b"\x00\xff", b"[]", b"data"]),
    "JSON": (JSONCodec, [{"cart": [1, "é", None]}, [], "", {"b": 1, "a": 2.5}]),
    "msgpack": (MsgpackCodec, [{"avatar": b"\x89PNG", 7: None}, b"", "", [{}, True]]),
    "own": (Deflated, ["", "text", "é" * 1000, "1"]),
}
every_codec = pytest.mark.parametrize("name", CODECS)
with_types = pytest.mark.parametrize("codec", [JSONCodec(), MsgpackCodec()], ids=repr)


def memory(codec: Codec[Any, Any] | None = None) -> Gate:
    """A gate in the process."""
    return SessionGate.from_url("memory://", sign_key=SIGN_KEY, codec=codec)


@pytest.fixture
def unsent(flavour: Flavour) -> Callable[[Codec[Any, Any]], Gate]:
    """Makes gates that would fail to send anything: nobody listens there."""
    client = flavour.client(1, retry=flavour.no_retry)
    return lambda codec: flavour.gate(client, codec=codec)


def same(value: object, other: object) -> bool:
    """Whether they are equal and of one type, also within; not a number is itself."""
    if type(value) is not type(other):
        return False
    if isinstance(value, dict) and isinstance(other, dict):
        pairs = zip(value.items(), other.items(), strict=False)
        return len(value) == len(other) and all(same(one, two) for one, two in pairs)
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return len(value) == len(other) and all(map(same, value, other))
    if isinstance(value, float) and isinstance(other, float):
        return value.hex() == other.hex()  # tells 0.0 from -0.0
    return value == other


def assert_without_content(error: BaseException, *secrets: str) -> None:
    """No text, attribute, cause nor local variable of ours shows what was stored."""
    chain: BaseException | None = error
    while chain is not None:
        shown = [str(chain), repr(chain), *map(repr, chain.args), *map(repr, vars(chain).values())]
        for text in shown:
            for secret in (SECRET, *secrets):
                assert secret not in text
        chain = chain.__cause__ or chain.__context__
    assert error.__cause__ is None
    assert error.__context__ is None


def assert_no_frame_shows_content(error: BaseException) -> None:
    """A tool that prints local variables finds nothing of it in our frames."""
    told = traceback.TracebackException.from_exception(error, capture_locals=True)
    frames = [frame for frame in told.stack if "/sessiongate/" in frame.filename]
    assert frames
    for frame in frames:
        for shown in (frame.locals or {}).values():
            assert SECRET not in shown, frame


# Every operation, on every backend.


@every_codec
def test_each_operation_takes_and_returns_values(backend: Backend, name: str) -> None:
    """With any codec values go in and come out, in every operation on payloads."""
    codec, (first, second, third, fourth) = CODECS[name]
    gate: Gate = backend.gate(codec=codec())
    token = gate.start(300, {"a": first, "b": second})
    gate.pset(token, "c", third)
    gate.pset_many(token, {"d": fourth, "e": first}, delete=["b"])
    held = {"a": first, "c": third, "d": fourth, "e": first}
    assert same(gate.pget(token, "a"), first)
    assert same(gate.pget_many(token, ["c", "b", "a"]), {"c": third, "a": first})
    assert same(dict(sorted(gate.pall(token).items())), held)

    gate.pset(token, "b", second, if_absent=True)
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "b", first, if_absent=True)
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "b", third, if_match=first)
    assert same(gate.pget(token, "b"), second)
    gate.pset(token, "b", third, if_match=second)
    gate.pset(token, "b", fourth, if_match=gate.pget(token, "b"), ttl=100)
    assert same(gate.pget(token, "b"), fourth)
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "nothing", first, if_match=first)
    gate.pset(token, "a", first, ttl=0)
    gate.pdel(token, "d")

    assert same(gate.ppop(token, "c"), third)
    with pytest.raises(PayloadNotFoundError):
        gate.pget(token, "c")
    gate.expire(token, 200)
    renewed = gate.renew(gate.renew(token), subject="alice")
    assert same(dict(sorted(gate.pall(renewed).items())), {"b": fourth, "e": first})


@pytest.mark.parametrize("codec", [JSONCodec(), MsgpackCodec(), BytesCodec()], ids=repr)
def test_a_counter_is_a_whole_number(backend: Backend, codec: Codec[Any, Any]) -> None:
    """What pincr made reads as a number, and it counts whole numbers that were stored."""
    gate: Gate = backend.gate(codec=codec)
    number: Callable[[int], Any] = int
    if isinstance(codec, BytesCodec):
        number = lambda count: str(count).encode()  # noqa: E731  # in place of `int`
    token = gate.start(300, {"n": number(41), "most": number(MOST), "least": number(LEAST)})
    assert gate.pincr(token, "n") == 42
    assert same(gate.pget(token, "n"), number(42))
    gate.pset(token, "n", number(5), if_match=number(42))
    assert gate.pincr(token, "new", -45) == -45
    assert same(gate.pget_many(token, ["new", "n"]), {"new": number(-45), "n": number(5)})
    assert gate.pincr(token, "new", -45) == -90
    for name, by in (("most", 1), ("least", -1)):
        with pytest.raises(PayloadOverflowError):
            gate.pincr(token, name, by)
        assert gate.pincr(token, name, -by) == (MOST if by == 1 else LEAST) - by
    assert same(gate.ppop(token, "most"), number(MOST - 1))


@one_gate
@with_types
def test_what_is_no_counter(backend: Backend, codec: Codec[Any, Any]) -> None:
    """Values that are no whole number of 64 bits are not counted, and stay as they are."""
    gate: Gate = backend.gate(codec=codec)
    for value in (MOST + 1, True, None, 1.0, "1", [1], {"n": 1}):
        token = gate.start(300, {"n": value})
        with pytest.raises(PayloadTypeError) as caught:
            gate.pincr(token, "n")
        assert_without_content(caught.value)
        assert same(gate.pget(token, "n"), value)


def test_as_it_is_asked_for(backend: Backend) -> None:
    """With as_ the value is of that type: by pget and ppop, on every backend."""
    for codec in (JSONCodec(), MsgpackCodec()):
        gate: Gate = backend.gate(codec=codec)
        token = gate.start(300, {"user": User("Ann", 42), "item": Item("pen", Decimal("1.50"))})
        assert gate.pget(token, "user", as_=User) == User("Ann", 42)
        assert same(gate.pget(token, "user"), {"name": "Ann", "age": 42})
        assert gate.ppop(token, "item", as_=Item) == Item("pen", Decimal("1.50"))
        with pytest.raises(PayloadDecodeError) as caught:
            gate.pget(token, "user", as_=list[int])
        assert caught.value.name == "user"
        with pytest.raises(PayloadNotFoundError):
            gate.pget(token, "item", as_=Item)
        with pytest.raises(PayloadDecodeError):
            gate.ppop(token, "user", as_=Item)
        assert gate.pall(token) == {}  # what was popped is gone, of whatever type it was


# Values, there and back.

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
whole = st.integers() | st.sampled_from(
    [0, -1, 45, 48, 57, 127, 128, -32, -33, 2**53 + 1]
    + [edge + step for edge in (LEAST, MOST, 2**64) for step in (-1, 0, 1)]
)
scalars = st.none() | st.booleans() | whole | texts | st.floats(allow_nan=False)


def nested(leaves: st.SearchStrategy[Any], keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """These, and lists and dicts of them."""
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=10,
    )


json_values = nested(scalars.filter(lambda x: not isinstance(x, float) or math.isfinite(x)), texts)
in_64_bits = st.integers(LEAST, 2**64 - 1) | st.sampled_from([45, 48, 57, MOST + 1, 2**64 - 1])
msgpack_values = nested(
    st.none() | st.booleans() | in_64_bits | texts | st.floats() | st.binary(max_size=20),
    texts | in_64_bits | st.booleans() | st.binary(max_size=5),
)


def values_of(codec: Codec[Any, Any]) -> Values[Any, Any]:
    """What a gate with that codec does to values; without Redis, which is slow in memory."""
    return memory(codec)._commands.values


def read(values: Values[Any, Any], data: bytes, as_: object = None) -> object:
    """What a gate returns of what stands in Redis."""
    return values.reader(b"sg-session:{A}", b":x", "x", as_)(data)


JSON, MSGPACK = values_of(JSONCodec()), values_of(MsgpackCodec())


@settings(max_examples=100, deadline=None)
@given(json_values)
def test_any_json_value_comes_back(value: object) -> None:
    """Whatever JSON has comes back as it was, is read by others, and matches itself."""
    data = JSON.encoded(value, "x")
    assert same(read(JSON, data), value)
    assert same(json.loads(data), value)
    others = json.dumps(value, indent=1).encode()
    assert same(read(JSON, others), value)
    assert JSON.are_same(others, data, "x")
    assert not JSON.are_same(others, JSON.encoded([value], "x"), "x")


@settings(max_examples=100, deadline=None)
@given(msgpack_values)
def test_any_msgpack_value_comes_back(value: object) -> None:
    """Whatever MessagePack has comes back as it was, and matches itself."""
    data = MSGPACK.encoded(value, "x")
    assert same(read(MSGPACK, data), value)
    assert MSGPACK.are_same(data, data, "x")
    assert not MSGPACK.are_same(data, MSGPACK.encoded([value], "x"), "x")
    if type(value) is not int:
        assert data == msgspec.msgpack.encode(value)


@settings(max_examples=150, deadline=None)
@given(st.integers(LEAST, 2**64 - 1))
@example(LEAST)
@example(MOST)
@example(MOST + 1)
@example(2**64 - 1)
@example(-0)
@example(-1)
@example(45)
@example(48)
@example(57)
@example(127)
def test_a_whole_number_is_never_taken_for_another(number: int) -> None:
    """Every number that MessagePack has reads as itself, stored in decimal or not."""
    codec = MsgpackCodec()
    data = codec.encode(number)
    assert same(codec.decode(data), number)
    assert same(codec.decoder(int)(data), number)
    assert (data == str(number).encode()) == (number <= MOST)


def test_no_message_of_one_byte_is_taken_for_a_number() -> None:
    """Everything that MessagePack writes in one byte reads as what was stored."""
    codec = MsgpackCodec()
    read = set()
    for byte in range(256):
        data = bytes([byte])
        try:
            value = msgspec.msgpack.decode(data)
        except msgspec.DecodeError:
            with pytest.raises((msgspec.DecodeError, ValueError)):
                codec.decode(data)
            continue
        encoded = codec.encode(value)
        assert same(codec.decode(encoded), value)
        read.add(encoded)
    # Of 128 + 32 whole numbers, None, two bools and four things that hold nothing.
    assert len(read) == 128 + 32 + 3 + 4 - 1


def test_a_number_in_decimal_has_one_spelling() -> None:
    """Digits that no counter and no gate writes are no number, whatever Python makes of them."""
    assert read(MSGPACK, b"-7") == -7
    for data in (b"007", b"-01", b"1_000", b"7 ", b"7\n", b"--7", b"-", b"1.0", b"1" * 20):
        for as_ in (None, int):
            with pytest.raises(PayloadDecodeError):
                read(MSGPACK, data, as_)


def test_a_number_under_a_name() -> None:
    """A member of an enum is stored as its value, and reads as that."""
    for codec in (JSONCodec(), MsgpackCodec()):
        for member in Level:
            data = codec.encode(member)
            raw = data.encode() if isinstance(data, str) else data
            assert same(codec.decode(raw), member.value)
            assert codec.decoder(Level)(raw) is member


# What there is nothing for.


def holding_itself() -> list[object]:
    value: list[object] = [SECRET]
    value.append(value)
    return value


def too_deep() -> list[object]:
    value: list[object] = [SECRET]
    for _ in range(100_000):
        value = [value]
    return value


class Unknown:
    """An object of a class that no codec knows."""

    def __repr__(self) -> str:
        return SECRET


class Failing(dict[str, object]):
    """A dict that cannot be iterated, and says more than it should."""

    def items(self) -> Any:
        raise LookupError(SECRET)


REFUSED: dict[str, tuple[Codec[Any, Any], Callable[[], object], str]] = {
    "JSON, not a number": (JSONCodec(), lambda: [SECRET, math.nan], "is NaN, infinite"),
    "JSON, infinite": (JSONCodec(), lambda: {SECRET: -math.inf}, "is NaN, infinite"),
    "JSON, many digits": (JSONCodec(), lambda: [SECRET, 10**4300], "over 4,300 digits long"),
    "JSON, a cycle": (JSONCodec(), holding_itself, "holds itself"),
    "JSON, deep": (JSONCodec(), too_deep, "nested too deep"),
    "JSON, an object": (JSONCodec(), lambda: [SECRET, Unknown()], "type Unknown"),
    "JSON, keys": (JSONCodec(), lambda: {(SECRET,): SECRET}, "keys must be str.*not tuple"),
    "JSON, complex": (JSONCodec(), lambda: [SECRET, 1j], "complex"),
    "JSON, a generator": (JSONCodec(), lambda: (each for each in [SECRET]), "generator"),
    "JSON, a class": (JSONCodec(), lambda: Unknown, "type"),
    "msgpack, a cycle": (MsgpackCodec(), holding_itself, "nested too deep, or holds itself"),
    "msgpack, deep": (MsgpackCodec(), too_deep, "nested too deep"),
    "msgpack, an object": (MsgpackCodec(), lambda: [SECRET, Unknown()], "type Unknown"),
    "msgpack, big": (MsgpackCodec(), lambda: [SECRET, 2**64], r"2\*\*64"),
    "msgpack, small": (MsgpackCodec(), lambda: [SECRET, LEAST - 1], r"2\*\*63"),
    "msgpack, a surrogate": (MsgpackCodec(), lambda: [SECRET + "\ud800"], "lone surrogate"),
    "msgpack, complex": (MsgpackCodec(), lambda: {SECRET: 1j}, "complex"),
    "own": (Deflated(), lambda: [SECRET], "AttributeError"),
    "own, a surrogate": (Deflated(), lambda: SECRET + "\ud800", "UnicodeEncodeError"),
}


@pytest.mark.parametrize("flavour", ["sync", "async"], indirect=True)
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_encoded(unsent: Callable[[Codec[Any, Any]], Gate], case: str) -> None:
    """What a codec has nothing for is refused before anything is sent, with the payload's name."""
    codec, make, reason = REFUSED[case]
    gate, value = unsent(codec), make()
    told = rf"^{type(codec).__name__} cannot encode payload 'odd': .*{reason}"
    fine = "fine"
    calls: list[Callable[[], object]] = [
        lambda: gate.pset(TOKEN, "odd", value),
        lambda: gate.pset(TOKEN, "odd", value, if_absent=True, ttl=0),
        lambda: gate.pset(TOKEN, "odd", fine, if_match=value),
        lambda: gate.pset_many(TOKEN, {"fine": fine, "odd": value}),
        lambda: gate.start(300, {"odd": value, "fine": fine}),
        lambda: gate.start(300, {"odd": value}, subject="alice"),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match=told) as caught:
            call()
        assert_without_content(caught.value)


@pytest.mark.parametrize("flavour", ["sync"], indirect=True)
def test_a_lone_surrogate_in_json(unsent: Callable[[Codec[Any, Any]], Gate]) -> None:
    """Text that UTF-8 does not have is refused, wherever in a value it stands."""
    gate = unsent(JSONCodec())
    for value in (SECRET + "\ud800", {"\udfff": SECRET}, [SECRET, "\ud800"]):
        with pytest.raises(ArgumentError, match=r"payload 'odd'.*lone surrogate") as caught:
            gate.pset(TOKEN, "odd", value)
        assert_without_content(caught.value)


def test_a_value_that_raises() -> None:
    """An error of the value itself is told by its class alone."""
    with pytest.raises(ArgumentError) as caught:
        memory(JSONCodec()).start(300, {"odd": Failing(x=1)})
    assert str(caught.value) == "JSONCodec cannot encode payload 'odd': LookupError"
    assert_without_content(caught.value)


@settings(max_examples=80, deadline=None)
@given(nested(scalars | st.floats() | st.text() | st.complex_numbers() | st.binary(), st.text()))
def test_a_value_is_stored_or_refused(value: object) -> None:
    """Whatever is to be stored, what it reads as is stored again; or it is an ArgumentError."""
    for values in (JSON, MSGPACK):
        try:
            data = values.encoded(value, "x")
        except ArgumentError as error:
            assert "payload 'x'" in str(error)  # noqa: PT017  # it need not be raised
            assert_without_content(error)
        else:
            assert values.encoded(read(values, data), "x") == data


# What cannot be decoded.


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    """What little data is."""

    one: int
    two: list[str]


TYPES: list[Any] = [
    *(None, Any, User, Strict, Item, int, str, bytes, float, bool, list[int], set[str]),
    *(dict[str, int], tuple[int, str], int | None, str | list[Any], dt.datetime, UUID, Decimal),
    *(Annotated[int, msgspec.Meta(ge=5)], Literal["a", 3], Level, msgspec.Raw),
]
# Beginnings of what codecs write, so that some of it is found to be wrong late.
stored = st.one_of(
    st.binary(min_size=1, max_size=40),
    st.sampled_from(
        [b"\x93\x01", b"\x81\xa1a", b"\xd9\xff", b"\xdd\xff\xff\xff\xff", b"\xc1SG\x01"]
    ),
    st.sampled_from([b"[" * 100_000, b"\x91" * 100_000, b'{"a":' * 50_000, b"9" * 5_000, b"-"]),
    st.sampled_from(
        [b"NaN", b"-Infinity", b'"\\ud800"', b"007", b"-0", b"1" * 19, b"1e999", b"{}"]
    ),
    st.sampled_from(
        [b"\xc7\x0c\xff" + b"\xff" * 12, b"\xd6\xff\0\0\0\0", b"\xef\xbb\xbf1", b"\x81\x90\x01"]
    ),
    msgpack_values.map(msgspec.msgpack.encode),
    json_values.map(lambda value: json.dumps(value).encode()),
    json_values.map(lambda value: json.dumps(value).encode()[:-1]).filter(len),
)


ALL_VALUES = [values_of(codec()) for codec, _ in CODECS.values()]


@settings(max_examples=150, deadline=None)
@given(stored, st.sampled_from(TYPES))
def test_whatever_stands_in_redis(data: bytes, as_: object) -> None:
    """Any bytes decode to a value, or it is a PayloadDecodeError and no other."""
    for values in ALL_VALUES:
        for each in (None, as_ if values in ALL_VALUES[1:3] else None):
            try:
                read(values, data, each)
            except PayloadDecodeError as error:
                assert error.name == "x"  # noqa: PT017  # it need not be raised
                assert error.__context__ is None  # noqa: PT017


UNREADABLE: dict[str, tuple[Codec[Any, Any], Any, bytes]] = {
    "JSON": (JSONCodec(), None, SECRET.encode()),
    "JSON, late": (JSONCodec(), None, f'["{SECRET}", nonsense]'.encode()),
    "JSON, no UTF-8": (JSONCodec(), None, f'"{SECRET}\xff"'.encode("latin-1")),
    "JSON, deep": (JSONCodec(), None, b"[" * 100_000 + SECRET.encode()),
    "JSON, not a number": (JSONCodec(), None, f'["{SECRET}", NaN]'.encode()),
    "JSON, infinite": (JSONCodec(), None, f'["{SECRET}", -Infinity]'.encode()),
    "JSON as": (JSONCodec(), User, f'{{"name": "{SECRET}", "age": "{SECRET}"}}'.encode()),
    "JSON as literal": (JSONCodec(), Literal["a"], f'"{SECRET}"'.encode()),
    "JSON as datetime": (JSONCodec(), dt.datetime, f'"{SECRET}"'.encode()),
    "JSON as pattern": (
        JSONCodec(),
        Annotated[str, msgspec.Meta(pattern="^x$")],
        f'"{SECRET}"'.encode(),
    ),
    "msgpack": (MsgpackCodec(), None, SECRET.encode()),
    "msgpack, a number": (MsgpackCodec(), None, b"1" + SECRET.encode()),
    "msgpack as": (MsgpackCodec(), User, msgspec.msgpack.encode({"name": SECRET, "age": SECRET})),
    "msgpack as a number": (MsgpackCodec(), str, b"1234567"),
    "msgpack as set": (MsgpackCodec(), set[int], msgspec.msgpack.encode([SECRET])),
    "own": (Deflated(), None, SECRET.encode()),
    "bytes as": (BytesCodec(), str, SECRET.encode() + b"\xff"),
}


@one_gate
@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_decoded(backend: Backend, case: str) -> None:
    """The error names the payload; neither it nor what led to it nor a frame shows its content."""
    codec, as_, data = UNREADABLE[case]
    raw, gate = backend.gate(), cast("Gate", backend.gate(codec=codec))
    token = raw.start(300, {"odd": data})
    options = {} if as_ is None else {"as_": as_}
    calls: list[Callable[[], object]] = [lambda: gate.pget(token, "odd", **options)]
    if as_ is None:
        calls += [lambda: gate.pget_many(token, ["odd"]), lambda: gate.pall(token)]
    calls.append(lambda: gate.ppop(token, "odd", **options))
    for call in calls:
        with pytest.raises(PayloadDecodeError, match=r"^payload 'odd' cannot be decoded") as caught:
            call()
        assert caught.value.name == "odd"
        assert caught.value.args == ("odd",)
        assert_without_content(caught.value, "1234567")
        assert_no_frame_shows_content(caught.value)
    assert raw.pall(token) == {}


@one_gate
def test_a_payload_that_cannot_be_decoded_is_nobodys_else(backend: Backend) -> None:
    """Other payloads are read, and it can be replaced, deleted and told of."""
    raw, gate = backend.gate(), cast("Gate", backend.gate(codec=JSONCodec()))
    token = raw.start(300, {"fine": b"1", "odd": b"odd"})
    assert gate.pget_many(token, ["fine"]) == {"fine": 1}
    assert gate.info(token).payloads == {"fine": 1, "odd": 3}
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "odd", 2, if_match="odd")
    gate.pset(token, "odd", 2)
    assert gate.pall(token) == {"fine": 1, "odd": 2}


# Types.

NOW = dt.datetime(2024, 2, 29, 12, 30, tzinfo=dt.UTC)
AS: list[tuple[Any, Any, object]] = [
    (User("Ann", 7), User, User("Ann", 7)),
    ({"name": "Ann"}, User, User("Ann", 0)),
    (Item("pen", Decimal("1.50")), Item, Item("pen", Decimal("1.50"))),
    ([User("Ann")], list[User], [User("Ann")]),
    ([1, 2], list[int], [1, 2]),
    ([2, 1, 2], set[int], {1, 2}),
    ({1, 2}, frozenset[int], frozenset({1, 2})),
    ((1, "a"), tuple[int, str], (1, "a")),
    ({"a": [1]}, dict[str, list[int]], {"a": [1]}),
    (7, int | None, 7),
    (None, int | None, None),
    (None, type(None), None),
    (300, float, 300.0),
    (MOST, int, MOST),
    (2**64 - 1, int, 2**64 - 1),
    (NOW, dt.datetime, NOW),
    (NOW.date(), dt.date, NOW.date()),
    (UUID(int=7), UUID, UUID(int=7)),
    (b"\x00\xff", bytes, b"\x00\xff"),
    ("a", Literal["a", "b"], "a"),
    (5, Annotated[int, msgspec.Meta(ge=5)], 5),
    (5, Annotated[int, []], 5),  # which has no hash
    ("text", str, "text"),
    ([1, "a"], Any, [1, "a"]),
    (7, Level, Level.LOW),
    (300, Level, Level.HIGH),
]
NOT_AS: list[tuple[Any, Any]] = [
    ({"age": 7}, User),
    ({"name": 7}, User),
    ({"title": "pen", "price": "dear"}, Item),
    ([1, "2"], list[int]),
    ("7", int),
    (7, str),
    (True, int),
    (1, bool),
    (1.5, int),
    ("", int | None),
    (4, Annotated[int, msgspec.Meta(ge=5)]),
    (4, Annotated[int, msgspec.Meta(ge=5), []]),
    ("c", Literal["a", "b"]),
    (8, Level),
    ("yesterday", dt.datetime),
    ({"a": 1}, list[int]),
    (300, list[int]),
]


@with_types
def test_as_many_types(codec: Codec[Any, Any]) -> None:
    """A value that is stored comes back as the type that is asked for."""
    gate = memory(codec)
    for value, as_, expected in AS:
        token = gate.start(300, {"x": value})
        for _ in range(2):  # the second time with the decoder that was made the first time
            assert same(gate.pget(token, "x", as_=as_), expected), as_
        assert same(gate.ppop(token, "x", as_=as_), expected), as_


@with_types
def test_what_is_of_another_type(codec: Codec[Any, Any]) -> None:
    """A value of another type than is asked for is no value, and no number is taken for text."""
    gate = memory(codec)
    for value, as_ in NOT_AS:
        token = gate.start(300, {"x": value})
        with pytest.raises(PayloadDecodeError) as caught:
            gate.pget(token, "x", as_=as_)
        assert caught.value.name == "x"
        assert gate.info(token).payloads.keys() == {"x"}


@dataclass
class Broken:
    """A class whose annotations nobody can follow."""

    what: "Nothing"  # type: ignore[name-defined]  # noqa: F821  # that is the point


@dataclass
class Shelf:
    """What holds what msgspec does not know."""

    places: list[PurePath]


NO_TYPES: list[object] = [
    *(7, "int", User("Ann"), [int], (int, str), {}, len, ...),
    *(str | bytes, list[int] | set[int], Literal[[]], Literal[1.5], Broken, enum.Enum),
    # These msgspec itself would find out when it decodes.
    *(complex, SessionGate, list[complex], dict[str, int | PurePath], Shelf),
]


@pytest.mark.parametrize("flavour", ["sync", "async"], indirect=True)
@pytest.mark.parametrize("codec", [JSONCodec(), MsgpackCodec(), BytesCodec()], ids=repr)
def test_what_is_no_type(unsent: Callable[[Codec[Any, Any]], Gate], codec: Codec[Any, Any]) -> None:
    """What the codec cannot decode into is refused before anything is sent or deleted."""
    gate = unsent(codec)
    for as_ in NO_TYPES:
        for call in (gate.pget, gate.ppop):
            with pytest.raises(ArgumentError, match=r"^as_ is "):
                call(TOKEN, "user", as_=as_)


@pytest.mark.parametrize("flavour", ["sync"], indirect=True)
def test_types_of_bytes(unsent: Callable[[Codec[Any, Any]], Gate], backend: Backend) -> None:
    """Without a codec as_ is bytes or str; other types are refused with how to have them."""
    gate: Gate = backend.gate()
    token = gate.start(300, {"user": "José", "odd": b"\xff"})
    assert same(gate.pget(token, "user", as_=str), "José")
    assert same(gate.pget(token, "user", as_=bytes), "José".encode())
    with pytest.raises(PayloadDecodeError):
        gate.pget(token, "odd", as_=str)
    assert same(gate.ppop(token, "user", as_=str), "José")
    for as_ in (int, User, bytearray, list[bytes], str | None):
        with pytest.raises(ArgumentError, match=r"bytes or str .* codec=JSONCodec\(\)"):
            unsent(BytesCodec()).pget(TOKEN, "user", as_=as_)


# Conditions.


@pytest.mark.parametrize("sealing_key", [None, "5e" * 32], ids=["plain", "sealed"])
@one_gate
def test_what_matches_as_a_value(backend: Backend, sealing_key: str | None) -> None:
    """A value matches however it was written, and no other value does."""
    options: dict[str, Any] = {"sealing_key": sealing_key}
    raw, gate = backend.gate(**options), cast("Gate", backend.gate(codec=JSONCodec(), **options))
    cases = [
        (b'{"a": [1, 2],\n "b": null}', {"a": [1, 2], "b": None}),
        (b' "\\u00e9" ', "é"),
        (b"1.50", 1.5),
        (b"1e2", 100.0),
        (b" null", None),
        (b"[ ]", []),
    ]
    for written, value in cases:
        token = raw.start(300, {"x": written})
        for other in (1, True, "", {"b": None}, [value], 0):
            with pytest.raises(PayloadConflictError) as caught:
                gate.pset(token, "x", "new", if_match=other)
            assert caught.value.__context__ is None
        assert raw.pget(token, "x") == written
        gate.pset(token, "x", "new", if_match=value)
        assert gate.pget(token, "x") == "new"
        raw.pset(token, "x", written)
        gate.pset(token, "x", "newer", if_match=gate.pget(token, "x"), ttl=100)
        assert gate.pget(token, "x") == "newer"


@one_gate
@with_types
def test_equal_is_not_the_same(backend: Backend, codec: Codec[Any, Any]) -> None:
    """Values that are equal in Python alone do not match: 1, 1.0 and True are three."""
    gate: Gate = backend.gate(codec=codec)
    for held in (1, 1.0, True, [1], [True]):
        token = gate.start(300, {"x": held})
        for match in (1, 1.0, True, [1], [True]):
            if same(match, held):
                continue
            with pytest.raises(PayloadConflictError):
                gate.pset(token, "x", "new", if_match=match)
        gate.pset(token, "x", "new", if_match=held)


@dataclass
class Grown:
    """What has gained a field since it was stored, and lost another one."""

    name: str
    tags: list[str] = field(default_factory=list)


@one_gate
@with_types
@pytest.mark.parametrize("sealing_key", [None, "5e" * 32], ids=["plain", "sealed"])
def test_what_was_read_as_a_type_matches(
    backend: Backend, codec: Codec[Any, Any], sealing_key: str | None
) -> None:
    """A value that was read as a type matches, though it is encoded to other bytes."""
    gate: Gate = backend.gate(codec=codec, sealing_key=sealing_key)
    read_as: list[tuple[object, Any]] = [
        ({"name": "Ann"}, User),
        ({"name": "Ann"}, Grown),
        (["b", "a", "c", "d"], set[str]),
        (["b", "a", "c", "d"], frozenset[str]),
        (3, float),
        ([3, 4], list[float]),
    ]
    for held, as_ in read_as:
        token = gate.start(300, {"x": held})
        read = gate.pget(token, "x", as_=as_)
        if as_ in (float, list[float]):  # nothing tells that they were read as that
            with pytest.raises(PayloadConflictError):
                gate.pset(token, "x", "new", if_match=read)
            gate.pset(token, "x", "new", if_match=read, as_=as_)
        else:
            with pytest.raises(PayloadConflictError):
                gate.pset(token, "x", "new", if_match=type(read)("Bea"))
            gate.pset(token, "x", "new", if_match=read)
        assert gate.pget(token, "x") == "new"


@one_gate
@with_types
@pytest.mark.parametrize("sealing_key", [None, "5e" * 32], ids=["plain", "sealed"])
def test_what_a_type_leaves_out_is_no_match(
    backend: Backend, codec: Codec[Any, Any], sealing_key: str | None
) -> None:
    """What would be lost, being no part of the type that a value was read as, is a conflict."""
    gate: Gate = backend.gate(codec=codec, sealing_key=sealing_key)
    left_out: list[tuple[object, Any]] = [
        ({"name": "Ann", "points": 1}, User),
        ({"name": "Ann", "points": False}, User),  # as its `admin` is by default
        ({"name": "Ann", "gone": [1]}, Grown),
        ({"name": "Ann", "gone": []}, Grown),
        ({"name": "Ann", "gone": {}}, Grown),
        ([1, 1, 2], set[int]),
        ([1, 2, 2], set[int]),
        ([{"name": "Ann", "points": 1}], list[User]),
    ]
    for held, as_ in left_out:
        token = gate.start(300, {"x": held})
        read = gate.pget(token, "x", as_=as_)
        with pytest.raises(PayloadConflictError):
            gate.pset(token, "x", "new", if_match=read, as_=as_)
        assert gate.pget(token, "x") == held


@dataclass
class Node:
    """What is nested as deep as somebody likes."""

    nodes: list["Node"] = field(default_factory=list)


@one_gate
@pytest.mark.parametrize("shape", ["a chain", "pairs"])
@pytest.mark.parametrize("depth", [20, 40, 300, 700])
def test_what_a_type_leaves_out_far_down(backend: Backend, shape: str, depth: int) -> None:
    """However deep it is, what is left out is a conflict, at once; and nothing but a conflict."""
    raw, gate = backend.gate(), cast("Gate", backend.gate(codec=JSONCodec()))
    if shape == "a chain":
        data = '{"nodes":[' * depth + '{"nodes":[],"x":1}' + "]}" * depth
    else:
        data = '{"nodes":[{"nodes":[]},' * depth + '{"nodes":[],"x":1}' + "]}" * depth
    token = raw.start(300, {"tree": data})
    began = time.process_time()
    try:
        read = gate.pget(token, "tree", as_=Node)
        gate.pset(token, "tree", Node(), if_match=read)
    except (PayloadConflictError, PayloadDecodeError, ArgumentError):
        assert raw.pget(token, "tree") == data.encode()
    else:
        raise AssertionError("a field was lost")
    assert time.process_time() - began < 5  # a try for each order would take years
    raw.pset(token, "tree", '{"nodes": [{}, {}]}')
    gate.pset(token, "tree", Node(), if_match=gate.pget(token, "tree", as_=Node))


@one_gate
@with_types
def test_a_set_of_what_has_members_matches(backend: Backend, codec: Codec[Any, Any]) -> None:
    """A set of objects or tuples matches as it was read, in whichever order it is stored."""
    gate: Gate = backend.gate(codec=codec)
    names = [{"name": name} for name in "dbcaefg"]
    for held, as_ in ((names, set[Named]), ([[n, "x"] for n in "dbca"], set[tuple[str, str]])):
        token = gate.start(300, {"x": held})
        gate.pset(token, "x", "new", if_match=gate.pget(token, "x", as_=as_), as_=as_)
        gate.pset(token, "x", [*held, held[0]])
        with pytest.raises(PayloadConflictError):  # one that is there twice would be lost
            gate.pset(token, "x", "new", if_match=gate.pget(token, "x", as_=as_), as_=as_)


@dataclass(frozen=True)
class Named:
    """What a set may hold."""

    name: str
    age: int = 7


@pytest.mark.parametrize("flavour", ["sync", "async"], indirect=True)
def test_as_is_of_the_condition(unsent: Callable[[Codec[Any, Any]], Gate]) -> None:
    """The type that a condition was read as is a type, and comes with a condition."""
    gate = unsent(JSONCodec())
    with pytest.raises(ArgumentError, match=r"as_.*give if_match too"):
        gate.pset(TOKEN, "n", 1, as_=int)
    with pytest.raises(ArgumentError, match="as_ is a type"):
        gate.pset(TOKEN, "n", 1, if_match=1, as_="nonsense")
    with pytest.raises(ArgumentError, match=r"as_ is bytes or str"):
        unsent(BytesCodec()).pset(TOKEN, "n", b"1", if_match=b"1", as_=int)


@one_gate
@with_types
def test_the_order_of_a_dict(backend: Backend, codec: Codec[Any, Any]) -> None:
    """A dict as it was read matches; one in another order is encoded to another value."""
    gate: Gate = backend.gate(codec=codec)
    token = gate.start(300, {"x": {"b": 1, "a": [2]}})
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "x", "new", if_match={"a": [2], "b": 1})
    read = gate.pget(token, "x")
    gate.pset(token, "x", {**read, "c": 3}, if_match=read)
    assert list(gate.pget(token, "x")) == ["b", "a", "c"]


@one_gate
@with_types
def test_none_is_a_value(backend: Backend, codec: Codec[Any, Any]) -> None:
    """None to match is the value None and not no condition, and None is stored as any other."""
    gate: Gate = backend.gate(codec=codec)
    token = gate.start(300, {"x": 1, "none": None})
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "x", 2, if_match=None)
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "nothing", 2, if_match=None)
    assert gate.pall(token) == {"x": 1, "none": None}
    gate.pset(token, "none", 3, if_match=None)
    gate.pset(token, "x", None, if_match=1)
    assert gate.pall(token) == {"x": None, "none": 3}
    with pytest.raises(ArgumentError, match="exclude each other"):
        gate.pset(token, "x", 2, if_match=None, if_absent=True)


@one_gate
def test_msgpack_of_others_matches(backend: Backend) -> None:
    """A value matches if another encoder wrote it in more bytes, a number in MessagePack too."""
    raw, gate = backend.gate(), cast("Gate", backend.gate(codec=MsgpackCodec()))
    for written, value in (
        (b"\xcd\x01\x2c", 300),
        (b"\xdc\x00\x01\x01", [1]),
        (b"\xd9\x01a", "a"),
        (b"\xde\x00\x01\xa1a\xcc\x01", {"a": 1}),
    ):
        token = raw.start(300, {"x": written})
        assert same(gate.pget(token, "x"), value)
        with pytest.raises(PayloadConflictError):
            gate.pset(token, "x", "new", if_match=301)
        gate.pset(token, "x", "new", if_match=value)
        assert gate.pget(token, "x") == "new"


# Limits.


@pytest.mark.parametrize("sealing_key", [None, "5e" * 32], ids=["plain", "sealed"])
def test_the_limit_counts_what_is_encoded(sealing_key: str | None) -> None:
    """8,000,000 bytes are allowed when they are encoded, and not one more, sealed or not."""
    gate: Gate = SessionGate.from_url(
        "memory://", sign_key=SIGN_KEY, codec=JSONCodec(), sealing_key=sealing_key
    )
    command = gate._commands.pset(TOKEN, "x", "x" * 7_999_998)
    assert len(command.args[2]) == 8_000_000 + (48 if sealing_key else 0)
    for value in ("x" * 7_999_999, "é" * 3_999_999 + "x", "\n" * 4_000_000):
        with pytest.raises(ArgumentError, match=r"payload 'x' is 1 to 8000000 bytes, not 80000"):
            gate._commands.pset(TOKEN, "x", value)


def test_what_is_small_when_it_is_encoded() -> None:
    """A value of more than 8,000,000 characters is stored if its codec makes less of it."""
    gate = memory(Deflated())
    assert len(gate.pget(gate.start(300, {"x": "x" * 9_000_000}), "x")) == 9_000_000


@one_gate
def test_values_of_nothing(backend: Backend) -> None:
    """Values that are empty or false are values: what counts are the bytes they are encoded to."""
    cases: list[tuple[Codec[Any, Any], list[Any]]] = [
        (JSONCodec(), ["", [], {}, None, False, 0, 0.0]),
        (MsgpackCodec(), ["", [], {}, None, False, 0, 0.0, b""]),
        (Deflated(), [""]),
    ]
    for codec, values in cases:
        gate: Gate = backend.gate(codec=codec)
        for value in values:
            token = gate.start(300, {"x": value})
            assert same(gate.pall(token), {"x": value})
            assert same(gate.pget_many(token, ["x"]), {"x": value})
            assert same(gate.ppop(token, "x"), value)


# Codecs of the application's own.


class Returning:
    """A codec that makes the same of everything."""

    def __init__(self, result: object) -> None:
        self.result = result

    def encode(self, _: object) -> Any:
        return self.result

    def decode(self, data: bytes) -> Any:
        return data


class Raising:
    """A codec that raises that, with all that it knows."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def encode(self, value: object) -> bytes:
        raise self.error(SECRET, value)

    def decode(self, data: bytes) -> object:
        raise self.error(SECRET, data)


class Typed(Raising):
    """One that raises as well for a type."""

    def decoder(self, _: object) -> Callable[[bytes], object]:
        return self.decode


def test_what_a_codec_may_return() -> None:
    """What a codec makes of a value is whatever a gate without one takes: a str or bytes-like."""
    for result in ("é", b"\xc3\xa9", bytearray(b"\xc3\xa9"), memoryview(b"\xc3-\xa9")[::2]):
        gate = memory(Returning(result))
        assert same(gate.pget(gate.start(300, {"x": object()}), "x"), b"\xc3\xa9")


@pytest.mark.parametrize("result", [None, 7, [SECRET], b"", "", SECRET + "\ud800", object()])
def test_what_a_codec_may_not_return(result: object) -> None:
    """Anything else is refused, with the payload's name and nothing of what it holds."""
    with pytest.raises(ArgumentError, match=r"^data of payload 'x' (is|must be) ") as caught:
        memory(Returning(result)).start(300, {"x": SECRET})
    assert_without_content(caught.value)


def test_a_codec_that_changes_its_mind() -> None:
    """What was encoded is stored as it was at the call, whatever becomes of the buffer."""
    buffer = bytearray(b"then")
    gate = memory(Returning(buffer))
    command = gate._commands.pset(gate.start(300), "x", None)
    buffer[:] = b"now!"
    assert b"then" in command.args


@pytest.mark.parametrize("error", [ValueError, KeyError, PayloadDecodeError, RuntimeError])
def test_a_codec_that_raises(error: type[Exception]) -> None:
    """An error of a codec is an ArgumentError or a PayloadDecodeError that has nothing of it."""
    gate = memory(Raising(error) if error is KeyError else Typed(error))
    raw = SessionGate(gate._client, sign_key=SIGN_KEY)
    token = raw.start(300, {"x": SECRET})
    if error is PayloadDecodeError:  # takes one argument: what is raised is a TypeError
        error = TypeError
    with pytest.raises(ArgumentError) as refused:
        gate.pset(token, "x", SECRET)
    assert_without_content(refused.value)
    assert str(refused.value).endswith(f" cannot encode payload 'x': {error.__name__}")
    options = {} if error is KeyError else {"as_": int}
    for call in (lambda: gate.pget(token, "x", **options), lambda: gate.pall(token)):
        with pytest.raises(PayloadDecodeError) as caught:
            call()
        assert_without_content(caught.value)
        assert_no_frame_shows_content(caught.value)


def test_a_reason_of_the_codecs_own() -> None:
    """An ArgumentError of a codec keeps its text, and has the payload's name before it."""

    class Choosy(Half):
        def encode(self, _: object) -> bytes:
            raise ArgumentError("text only in the afternoon")

        decode = Deflated.decode

    with pytest.raises(ArgumentError) as caught:
        memory(Choosy()).start(300, {"x": SECRET})
    assert str(caught.value) == "Choosy cannot encode payload 'x': text only in the afternoon"
    assert_without_content(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_codec_does_not_swallow_an_interrupt(error: type[BaseException]) -> None:
    """What is no Exception goes through as it is."""

    class Interrupted:
        def encode(self, _: object) -> bytes:
            raise error

        decode = encode

    gate = memory(Interrupted())
    with pytest.raises(error):
        gate.start(300, {"x": "x"})
    token = SessionGate(gate._client, sign_key=SIGN_KEY).start(300, {"x": "x"})
    with pytest.raises(error):
        gate.pget(token, "x")


@pytest.mark.parametrize("flavour", ["sync", "async"], indirect=True)
def test_a_codec_that_knows_no_types(unsent: Callable[[Codec[Any, Any]], Gate]) -> None:
    """Without `decoder` as_ is refused before anything is sent, with what is missing."""
    for read in (unsent(Deflated()).pget, unsent(Deflated()).ppop):
        with pytest.raises(ArgumentError) as caught:
            read(TOKEN, "x", as_=str)
        assert str(caught.value) == "as_ needs a codec with a method `decoder`: Deflated has none"


class Half:
    """No codec: it does one half."""

    def encode(self, value: object) -> bytes:
        raise NotImplementedError


@pytest.mark.parametrize(
    "codec",
    [JSONCodec, Deflated, Half(), json, "json", 7, json.dumps],
    ids=["JSONCodec", "a class", "half of one", "a module", "a name", "a number", "a function"],
)
def test_what_is_no_codec(flavour: Flavour, codec: object) -> None:
    """What has not both methods is no codec, nor is a class of them, for either kind of gate."""
    with pytest.raises(ConfigurationError) as caught:
        flavour.gate_from_url("memory://", codec=codec)
    assert str(caught.value).endswith("methods encode and decode, as in codec=JSONCodec()")


def test_a_gate_without_a_codec() -> None:
    """None for a codec is bytes as they are, and so is a BytesCodec."""
    for codec in (None, BytesCodec()):
        gate = memory(codec)
        token = gate.start(300, {"x": "é"})
        assert same(gate.pget(token, "x"), b"\xc3\xa9")
        gate.pset(token, "x", b"y", if_match=memoryview(b"\xc3\xa9"))
        assert same(gate.pall(token), {"x": b"y"})


def test_reprs() -> None:
    """A codec and what a gate makes of it show which codec it is, and no value."""
    for codec in (BytesCodec(), JSONCodec(), MsgpackCodec()):
        assert repr(codec) == f"{type(codec).__name__}()"
        values = memory(cast("Codec[Any, Any]", codec))._commands.values
        assert repr(values) == f"<Values {type(codec).__name__}>"


# Errors all in all.


@one_gate
@with_types
def test_no_error_shows_content(backend: Backend, codec: Codec[Any, Any]) -> None:
    """Whatever goes wrong with a payload, no error says what it holds."""
    gate: Gate = backend.gate(codec=codec)
    token = gate.start(300, {"x": [SECRET]})
    for call in (
        lambda: gate.pset(token, "x", [SECRET], if_absent=True),
        lambda: gate.pset(token, "x", [SECRET], if_match=SECRET),
        lambda: gate.pset(token, "nothing", [SECRET], if_match=SECRET),
        lambda: gate.pset(token, "x", [SECRET, 1j]),
        lambda: gate.pset(token, "x", [SECRET], if_match=[SECRET, 1j]),
        lambda: gate.pset(token, "x", [SECRET], ttl=-1),
        lambda: gate.pset(token, "", [SECRET]),
        lambda: gate.pset(token, "x", SECRET * 300_000),
        lambda: gate.pset_many(token, {"x": [SECRET]}, delete=["x"]),
        lambda: gate.pget(token, "x", as_=int),
        lambda: gate.ppop(token, "x", as_=set[int]),
        lambda: gate.ppop(token, "x", as_=SECRET[:3]),
        lambda: gate.pincr(token, "x"),
    ):
        if "x" not in gate.pall(token):
            gate.pset(token, "x", [SECRET])
        with pytest.raises(SessionGateError) as caught:
            call()
        assert_without_content(caught.value)


# Without msgspec.


def told_without_msgspec(code: str) -> Any:  # JSON is whatever the code says
    """What the code prints as JSON in a process that has no msgspec."""
    begin = "import json, sys\nsys.modules['msgspec'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", begin + textwrap.dedent(code)],
        capture_output=True,
        check=False,
        cwd=Path(__file__).parents[1],
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_json_needs_no_msgspec() -> None:
    """Without msgspec JSON goes there and back; what needs it says what to install."""
    told = told_without_msgspec("""
        from dataclasses import dataclass, field
        from sessiongate import ArgumentError, ConfigurationError
        from sessiongate import JSONCodec, MsgpackCodec, SessionGate

        gate = SessionGate.from_url("memory://", sign_key="k" * 32, codec=JSONCodec())
        value = {"cart": [1, None, 2.5, "e", True]}
        token = gate.start(300, {"x": value})
        told = [gate.pget(token, "x") == value, gate.pall(token) == {"x": value}]
        gate.pset(token, "x", 1, if_match=value)
        told.append(gate.pincr(token, "x"))

        @dataclass
        class User:
            name: str

        for call in (
            lambda: gate.pget(token, "x", as_=int),
            lambda: gate.ppop(token, "x", as_=list[int]),
            lambda: gate.pset(token, "x", User("hunter2")),
            lambda: gate.pset(token, "x", [object()]),
            MsgpackCodec,
        ):
            try:
                call()
            except (ArgumentError, ConfigurationError) as error:
                told.append([type(error).__name__, str(error), repr(error.__context__)])
        told.append(gate.ppop(token, "x"))
        print(json.dumps(told))
        """)
    needs = 'needs msgspec: pip install "sessiongate[msgpack]"'
    assert told == [
        True,
        True,
        2,
        ["ArgumentError", f"as_ {needs}", "None"],
        ["ArgumentError", f"as_ {needs}", "None"],
        [
            "ArgumentError",
            f"JSONCodec cannot encode payload 'x': JSON has no User: to store it {needs}",
            "None",
        ],
        [
            "ArgumentError",
            f"JSONCodec cannot encode payload 'x': JSON has no object: to store it {needs}",
            "None",
        ],
        ["ConfigurationError", f"MsgpackCodec {needs}", "None"],
        2,
    ]


def test_no_codec_is_a_pickle() -> None:
    """Nothing of the library imports what could run what it reads."""
    imported = set()
    for path in Path(sessiongate.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or "").partition(".")[0])
    assert "json" in imported
    assert imported.isdisjoint({"pickle", "marshal", "shelve", "dill", "yaml", "jsonpickle"})


class Upper(BytesCodec):
    """A codec that is a BytesCodec by inheritance alone."""

    def encode(self, value: Any, /) -> Any:
        return value.upper()


def test_a_codec_that_inherits_is_asked() -> None:
    """What inherits from BytesCodec is a codec as any other."""
    gate = memory(Upper())
    assert gate.pget(gate.start(300, {"x": "a"}), "x") == b"A"


def test_a_type_that_holds_itself() -> None:
    """A type may be recursive."""
    for codec in (JSONCodec(), MsgpackCodec()):
        gate = memory(codec)
        tree = Node([Node(), Node([Node()])])
        assert gate.pget(gate.start(300, {"x": tree}), "x", as_=Node) == tree


@dataclass
class Keyed:
    """What has keys that JSON has to write as text."""

    by_id: dict[UUID, int]


def test_keys_that_are_no_text() -> None:
    """Keys of a type come back as that type."""
    one = Keyed({UUID(int=1): 2})
    gate = memory(JSONCodec())
    assert gate.pget(gate.start(300, {"x": one}), "x", as_=Keyed) == one


def test_a_number_has_one_spelling() -> None:
    """What pincr would refuse is no number in MessagePack either."""
    with pytest.raises(PayloadDecodeError):
        read(MSGPACK, b"-0")


class Buffers(JSONCodec):
    """A codec with values that have no hash; as a type, they are text without blanks."""

    def encode(self, value: Any, /) -> Any:
        return value if isinstance(value, str) else bytes(value)

    def decode(self, data: bytes, /) -> Any:
        return bytearray(data)

    def decoder(self, _: Any, /) -> Callable[[bytes], Any]:
        return lambda data: data.decode().strip()


def test_values_that_cannot_be_counted_conflict() -> None:
    """Where it cannot be told whether a type leaves something out, nothing is stored."""
    gate = memory(Buffers())
    token = gate.start(300, {"x": " a"})
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "x", "b", if_match=gate.pget(token, "x", as_=str), as_=str)
    assert gate.pget(token, "x") == b" a"
