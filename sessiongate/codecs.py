"""Codecs: what becomes of a payload's value on its way to Redis, and back. No I/O here."""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from .arguments import Data
from .errors import ArgumentError, ConfigurationError

if TYPE_CHECKING:
    from functools import _lru_cache_wrapper
    from types import ModuleType

    # With defaults (PEP 696), so that a gate without a codec is known to be one of bytes.
    from typing_extensions import TypeVar as TypeVarWithDefault

    In = TypeVarWithDefault("In", default=Data)
    Out = TypeVarWithDefault("Out", default=bytes)
else:
    In = TypeVar("In")
    Out = TypeVar("Out")

In_contra = TypeVar("In_contra", contravariant=True)
Out_co = TypeVar("Out_co", covariant=True)
T = TypeVar("T")

# Types differ in what reads them, and a program knows some dozens.
_TYPES = 256

_NEEDS_MSGSPEC = 'needs msgspec: pip install "sessiongate[msgpack]"'


class Codec(Protocol[In_contra, Out_co]):
    """What a codec has to do; one of your own needs no base class.

    Neither method does I/O. What they raise never reaches the caller with its text, which might
    hold the payload: `encode` becomes an ArgumentError, `decode` a PayloadDecodeError. An
    ArgumentError of `encode` itself keeps its text.

    Example:
        >>> import zlib
        >>> from sessiongate import SessionGate
        >>> class Deflated:
        ...     def encode(self, value: str) -> bytes:
        ...         return zlib.compress(value.encode())
        ...
        ...     def decode(self, data: bytes) -> str:
        ...         return zlib.decompress(data).decode()
        >>> gate = SessionGate.from_url("memory://", sign_key="k" * 32, codec=Deflated())
        >>> token = gate.start(300, {"page": "word " * 1000})
        >>> len(gate.pget(token, "page")), gate.info(token).payloads["page"] < 100
        (5000, True)
    """

    def encode(self, value: In_contra, /) -> Data:
        """What to store for a value: 1 to 8,000,000 bytes, a str as UTF-8.

        The same for the same value, or `if_match` and the handle take it for another one.
        """

    def decode(self, data: bytes, /) -> Out_co:
        """The value of what was stored."""


@runtime_checkable
class TypedCodec(Protocol):
    """What a codec does besides for `as_`; without, a gate refuses that argument."""

    def decoder(self, as_: object, /) -> Callable[[bytes], object]:
        """What decodes into that type, and raises if the data is of another one.

        It is asked before anything is sent; a type that it does not know is an ArgumentError.
        """


class BytesCodec:
    r"""Bytes as they are, and text as UTF-8: the codec of a gate that is given none.

    `as_` may be `bytes` or `str`.

    Example:
        >>> from sessiongate import SessionGate
        >>> gate = SessionGate.from_url("memory://", sign_key="k" * 32)
        >>> token = gate.start(300, {"user": "José"})
        >>> gate.pget(token, "user"), gate.pget(token, "user", as_=str)
        (b'Jos\xc3\xa9', 'José')
    """

    def encode(self, value: Data, /) -> Data:
        """The value itself.

        Example:
            >>> from sessiongate import BytesCodec
            >>> BytesCodec().encode("text")
            'text'
        """
        return value

    def decode(self, data: bytes, /) -> bytes:
        """The data itself.

        Example:
            >>> BytesCodec().decode(b"text")
            b'text'
        """
        return data

    def decoder(self, as_: object, /) -> Callable[[bytes], object]:
        """What decodes into `bytes` or `str`.

        Raises:
            ArgumentError: it is another type.

        Example:
            >>> BytesCodec().decoder(str)(b"text")
            'text'
        """
        if as_ is bytes:
            return self.decode
        if as_ is str:
            return bytes.decode
        raise ArgumentError(
            "as_ is bytes or str where payloads are bytes: for other types, give the gate a codec, "
            "as in codec=JSONCodec()"
        )

    def __repr__(self) -> str:
        return "BytesCodec()"


class JSONCodec:
    """JSON, as short as it goes: `dict`, `list`, `str`, `int`, `float`, `bool` and `None`.

    As with `json`, a tuple comes back as a list and a key of a dict as a str. With msgspec (extra
    `msgpack`) it also takes structs, dataclasses and what else msgspec knows, and `as_` brings
    them back; without `as_` they come back as what JSON has for them.

    Example:
        >>> from dataclasses import dataclass
        >>> from sessiongate import JSONCodec, SessionGate
        >>> @dataclass
        ... class User:
        ...     name: str
        >>> gate = SessionGate.from_url("memory://", sign_key="k" * 32, codec=JSONCodec())
        >>> token = gate.start(300, {"user": User("Ann"), "cart": [1, 2]})
        >>> gate.pget(token, "cart"), gate.pget(token, "user"), gate.pget(token, "user", as_=User)
        ([1, 2], {'name': 'Ann'}, User(name='Ann'))
    """

    def __init__(self) -> None:
        self._encode = json.JSONEncoder(
            ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_as_builtins
        ).encode
        self._decode = json.JSONDecoder(parse_constant=_no_constant).decode

    def encode(self, value: Any, /) -> str:
        """The value in JSON.

        Raises:
            ArgumentError: JSON has nothing for it.

        Example:
            >>> JSONCodec().encode({"name": "Ann", "age": 42})
            '{"name":"Ann","age":42}'
        """
        # An error with a cause would carry that, and it may hold the value.
        try:
            return self._encode(value)
        except TypeError as error:
            # Of `json` and of msgspec it names types alone.
            reason = str(error)
        except ValueError:
            reason = "a number in it is NaN, infinite or over 4,300 digits long, or it holds itself"
        except RecursionError:
            reason = "it is nested too deep"
        raise ArgumentError(reason)

    def decode(self, data: bytes, /) -> Any:
        """The value that JSON in UTF-8 stands for.

        Example:
            >>> JSONCodec().decode(b'{"name": "Ann"}')
            {'name': 'Ann'}
        """
        return self._decode(data.decode())

    def decoder(self, as_: object, /) -> Callable[[bytes], object]:
        """What decodes into that type and validates.

        Raises:
            ArgumentError: msgspec does not know the type, or is missing.

        Example:
            >>> JSONCodec().decoder(set[int])(b"[1, 2, 2]")
            {1, 2}
        """
        return _cached(_json_decoder, as_)

    def __repr__(self) -> str:
        return "JSONCodec()"


class MsgpackCodec:
    r"""MessagePack by msgspec (extra `msgpack`): what JSON has, and bytes and datetimes; smaller.

    It takes structs, dataclasses and what else msgspec knows, and `as_` brings them back. A whole
    number of 64 bits that is a payload by itself is stored in decimal, which is what `pincr`
    counts.

    Raises:
        ConfigurationError: msgspec is missing.

    Example:
        >>> from sessiongate import MsgpackCodec, SessionGate
        >>> gate = SessionGate.from_url("memory://", sign_key="k" * 32, codec=MsgpackCodec())
        >>> token = gate.start(300, {"avatar": {"png": b"\x89PNG"}, "visits": 41})
        >>> gate.pget(token, "avatar"), gate.pincr(token, "visits"), gate.pget(token, "visits")
        ({'png': b'\x89PNG'}, 42, 42)
    """

    def __init__(self) -> None:
        msgspec = _msgspec()
        if msgspec is None:
            raise ConfigurationError(f"MsgpackCodec {_NEEDS_MSGSPEC}")
        self._encode: Callable[[Any], bytes] = msgspec.msgpack.Encoder().encode
        self._decode: Callable[[bytes], Any] = msgspec.msgpack.Decoder().decode

    def encode(self, value: Any, /) -> bytes:
        r"""The value in MessagePack.

        Raises:
            ArgumentError: MessagePack has nothing for it.

        Example:
            >>> MsgpackCodec().encode([1, 2]), MsgpackCodec().encode(300)
            (b'\x92\x01\x02', b'300')
        """
        if type(value) is int and -(2**63) <= value < 2**63:
            return b"%d" % value
        try:
            data = self._encode(value)
        except (TypeError, OverflowError) as error:
            reason = str(error)  # names types alone
        except ValueError:
            reason = "MessagePack has no text with a lone surrogate and nothing so big"
        except RecursionError:
            reason = "it is nested too deep, or holds itself"
        else:
            # A number all the same, as the member of an enum is.
            return b"%d" % data[0] if len(data) == 1 and data in _NUMBER_STARTS else data
        raise ArgumentError(reason)

    def decode(self, data: bytes, /) -> Any:
        r"""The value that MessagePack, or a number in decimal, stands for.

        Example:
            >>> MsgpackCodec().decode(b"\x92\x01\x02"), MsgpackCodec().decode(b"300")
            ([1, 2], 300)
        """
        return _number(data) if data[0] in _NUMBER_STARTS else self._decode(data)

    def decoder(self, as_: object, /) -> Callable[[bytes], object]:
        """What decodes into that type and validates.

        Raises:
            ArgumentError: msgspec does not know the type.

        Example:
            >>> MsgpackCodec().decoder(float)(b"300")
            300.0
        """
        return _cached(_msgpack_decoder, as_)

    def __repr__(self) -> str:
        return "MsgpackCodec()"


# What MessagePack never begins with, but for the whole numbers 45 and 48 to 57 in one byte, which
# are written in decimal here.
_NUMBER_STARTS = b"-0123456789"
_match_number = re.compile(rb"0|-?[1-9][0-9]{0,18}").fullmatch


def _number(data: bytes) -> int:
    if not _match_number(data):
        raise ValueError
    return int(data)


def _msgspec() -> "ModuleType | None":
    # Not at the top: an extra, and as much time as the rest of our own import.
    try:
        import msgspec  # noqa: PLC0415
    except ImportError:
        return None
    return msgspec


def _as_builtins(value: object) -> object:
    """What JSON has for a value that it does not know itself."""
    msgspec = _msgspec()
    if msgspec is None:
        raise TypeError(f"JSON has no {type(value).__name__}: to store it {_NEEDS_MSGSPEC}")
    return msgspec.to_builtins(value, str_keys=True)


def _no_constant(_: str) -> float:
    raise ValueError  # NaN and the like: `json` would read what JSON does not have


def _cached(make: "_lru_cache_wrapper[Callable[[bytes], Any]]", as_: Any) -> Callable[[bytes], Any]:
    try:
        hash(as_)
    except TypeError:
        return make.__wrapped__(as_)
    return make(as_)


@lru_cache(_TYPES)
def _json_decoder(as_: Any) -> Callable[[bytes], Any]:
    msgspec = _msgspec()
    if msgspec is None:
        raise ArgumentError(f"as_ {_NEEDS_MSGSPEC}")
    return _decoder_of(msgspec.json.Decoder, as_)


@lru_cache(_TYPES)
def _msgpack_decoder(as_: Any) -> Callable[[bytes], Any]:
    import msgspec  # noqa: PLC0415  # there is one, or there were no codec

    decode = _decoder_of(msgspec.msgpack.Decoder, as_)

    def decode_any(data: bytes) -> Any:
        if data[0] in _NUMBER_STARTS:
            return msgspec.convert(_number(data), as_)
        return decode(data)

    return decode_any


def _decoder_of(kind: Any, as_: Any) -> Callable[[bytes], Any]:
    try:
        decode: Callable[[bytes], Any] = kind(as_).decode
        known = not _is_custom(as_)
    except (TypeError, ValueError, NameError):
        known = False
    if not known:
        # What msgspec says may show `as_`, which may be a value by mistake.
        raise ArgumentError(
            "as_ is a type that msgspec decodes into, as a struct, a dataclass or list[int]: "
            "msgspec.inspect.type_info(as_) may tell why this one is none"
        )
    return decode


def _is_custom(as_: Any) -> bool:
    """Whether a type holds one that msgspec does not know, as it finds out when it decodes."""
    inspect = import_module("msgspec.inspect")
    try:
        told = inspect.type_info(as_)
    except (TypeError, ValueError, NameError):
        return False  # it can decode more than it can tell of: 0.18 Literal["a", 3]
    return _holds(told, inspect.CustomType, set())


def _holds(told: Any, kind: type, seen: set[int]) -> bool:
    """Whether what `msgspec.inspect` tells of a type has one of that kind in it."""
    if isinstance(told, kind):
        return getattr(told, "cls", None) is not object  # which is anything
    if isinstance(told, tuple):
        return any(_holds(each, kind, seen) for each in told)
    if id(told) in seen or type(told).__module__ != "msgspec.inspect":
        return False
    seen.add(id(told))
    return any(_holds(getattr(told, name), kind, seen) for name in told.__struct_fields__)
