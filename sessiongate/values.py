"""What a payload's value becomes on its way to Redis, and back: encoded, then sealed. No I/O here.

A *value* is the application's; encoded it is *data*, which the limits count; *stored* is what Redis
gets: the data itself or, at a gate that seals, the data sealed.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Generic, cast

from . import answers
from .arguments import Data, data_arg, payloads_arg
from .codecs import BytesCodec, Codec, In, Out, T, TypedCodec
from .errors import ArgumentError, ConfigurationError, PayloadDecodeError, UnsealError
from .sealing import SealingKeyRing

# What stands in front of the data of a payload with an end of its own: digits of that end.
_END_DIGITS = 13
_TIMED = b";"
_PAYLOAD_KINDS = (b":", _TIMED)


def _as_it_is(data: bytes) -> bytes:
    return data


def _payloads_as_they_are(answer: bytes) -> dict[str, Any]:
    return {answers.text(name): data for name, data in answers.payloads(answer)}


class Values(Generic[In, Out]):
    """The codec of a gate, and the keys that it seals with, if it does.

    Args:
        codec: what makes data of values; None for bytes as they are.
        ring: what seals data; None leaves it as it is.
    """

    __slots__ = ("_codec", "_decode", "_decoder", "_ring", "is_bytes", "seals")

    def __init__(
        self, codec: Codec[In, Out] | None = None, ring: SealingKeyRing | None = None
    ) -> None:
        if codec is None:
            codec = cast("Codec[In, Out]", BytesCodec())
        # Before it is looked at, so that there is a repr, whatever happens.
        self._codec = codec
        self._ring = ring
        self.seals = ring is not None
        if isinstance(codec, type) or not all(
            callable(getattr(codec, method, None)) for method in ("encode", "decode")
        ):
            raise ConfigurationError(
                "codec is an object with the methods encode and decode, as in codec=JSONCodec()"
            )
        self.is_bytes = self.codec_type is BytesCodec
        self._decode: Callable[[bytes], Any] = _as_it_is if self.is_bytes else codec.decode
        # Asked once: to look for the method of a protocol takes 5 µs.
        self._decoder = codec.decoder if isinstance(codec, TypedCodec) else None

    def __repr__(self) -> str:
        return f"<Values {self.codec_type.__name__}{f' {self._ring.kind}' if self._ring else ''}>"

    @property
    def kind(self) -> str:
        """What becomes of payloads, in a few words; none if they stay as they are."""
        codec = "" if self.is_bytes else f" {self.codec_type.__name__}"
        return codec + (f" {self._ring.kind}" if self._ring else "")

    @property
    def codec_type(self) -> type:
        """The class of the codec."""
        return type(self._codec)

    def encoded(self, value: In, name: str) -> bytes:
        """The data of a value, as it is now: later changes do not count.

        Raises:
            ArgumentError: the codec cannot encode it, or the data is out of its limits.
        """
        if self.is_bytes:
            return data_arg(cast("Data", value), name)
        # Raised outside the `except`: the codec's error may hold the value, and would be chained.
        try:
            data = self._codec.encode(value)
        except ArgumentError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001  # whatever a codec of the application's raises
            reason = type(error).__name__
        else:
            return data_arg(data, name)
        del value  # it may have been sealed, and a traceback may show variables
        raise ArgumentError(f"{self.codec_type.__name__} cannot encode payload {name!r}: {reason}")

    def decoder(self, as_: Any) -> Callable[[bytes], Any]:
        """What makes a value of data, of that type unless it is None.

        Raises:
            ArgumentError: the codec knows no such type.
        """
        if as_ is None:
            return self._decode
        if self._decoder:
            return self._decoder(as_)
        raise ArgumentError(
            f"as_ needs a codec with a method `decoder`: {self.codec_type.__name__} has none"
        )

    def fields(self, payloads: Mapping[str, In]) -> tuple[bytes, ...]:
        """Field and data of each payload, one behind the other."""
        return payloads_arg(payloads, self.encoded)

    def sealed(self, session_key: bytes, fields: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """What to store in a session's fields of payloads; its other fields stay as they are.

        Args:
            session_key: the Redis key of the session's hash.
            fields: field and data, one behind the other.
        """
        ring = self._ring
        if ring is None:
            return fields
        return _changed(fields, lambda data, field: ring.seal(data, session_key, field))

    def moved(
        self, session_key: bytes, to: bytes, fields: tuple[bytes, ...], *, strict: bool
    ) -> tuple[bytes, ...]:
        """What to store in another session of what one has stored.

        Args:
            session_key: the Redis key of the hash that it comes from.
            to: of the one that it goes to.
            fields: field and what is stored there, one behind the other.
            strict: whether all has to open; else what does not goes along, and opens nowhere.

        Raises:
            UnsealError: the session did not seal it so.
        """
        ring = self._ring
        if ring is None:
            return fields

        def resealed(stored: bytes, field: bytes) -> bytes:
            anew = ring.reseal(stored, session_key, to, field)
            if anew is None and strict:
                raise UnsealError(answers.text(field[1:]))
            return stored if anew is None else anew

        return _changed(fields, resealed)

    def stored(self, session_key: bytes, field: bytes, data: bytes) -> bytes:
        """What Redis gets of data, in that field of the hash at that Redis key."""
        return self._ring.seal(data, session_key, field) if self._ring else data

    def opened(self, session_key: bytes, field: bytes, stored: bytes) -> bytes:
        """The data of what Redis has there.

        Raises:
            UnsealError: it was not sealed there.
        """
        if self._ring is None:
            return stored
        data = self._ring.open(stored, session_key, field)
        if data is None:
            raise UnsealError(answers.text(field[1:]))
        return data

    def reader(
        self, session_key: bytes, field: bytes, name: str, as_: Any = None
    ) -> Callable[[bytes], Any]:
        """What makes a value of what is stored in that field of the hash at that Redis key.

        Raises:
            ArgumentError: the codec knows no such type.
        """
        decode = self.decoder(as_)
        if self._ring is None:
            return decode if decode is _as_it_is else lambda data: decoded(decode, data, name)
        return lambda stored: decoded(decode, self.opened(session_key, field, stored), name)

    def mapping(self, session_key: bytes) -> Callable[[bytes], dict[str, Out]]:
        """What makes values, by name, of what a script returned of several payloads."""
        if self.is_bytes and self._ring is None:
            return _payloads_as_they_are

        def read(answer: bytes) -> dict[str, Out]:
            values: dict[str, Out] = {}
            for raw, stored in answers.payloads(answer):
                name = answers.text(raw)
                data = self.opened(session_key, b":" + raw, stored)
                values[name] = decoded(self._decode, data, name)
            return values

        return read

    def are_same(self, data: bytes, other: bytes, name: str, as_: object = None) -> bool:
        """Whether data is of the value that `other` was encoded from, perhaps read as a type.

        It need not be the same bytes: others may have encoded it, with blanks in it; and a type may
        have defaults that the data has not. What the type leaves out is no part of the value: if
        there is some, they are not the same.
        """
        if data == other or self.is_bytes:
            return data == other
        if self.encoded_anew(data, name) == other:
            return True
        if as_ is None or self.encoded_anew(data, name, as_) != other:
            return False
        return _are_all_in(decoded(self._decode, data, name), decoded(self._decode, other, name))

    def encoded_or_none(self, value: In, name: str) -> bytes | None:
        """The data of a value; None if it cannot be encoded."""
        try:
            return self.encoded(value, name)
        except ArgumentError:
            return None

    def encoded_anew(self, data: bytes, name: str, as_: object = None) -> bytes | None:
        """Data decoded and encoded again; None if it cannot be."""
        try:
            return self.encoded(decoded(self.decoder(as_), data, name), name)
        except (PayloadDecodeError, ArgumentError):
            return None


def decoded(decode: Callable[[bytes], T], data: bytes, name: str) -> T:
    """The value of data.

    Raises:
        PayloadDecodeError: it cannot be decoded.
    """
    try:
        return decode(data)
    except Exception:  # noqa: BLE001, S110  # whatever a codec of the application's raises
        pass
    # Outside the `except`, as in `encoded`; and without the data: a traceback may show variables.
    del data
    raise PayloadDecodeError(name)


def _are_all_in(value: object, other: object) -> bool:
    """Whether all members of a value are in the other, which may have more of them.

    In which order is not asked: of a list it has been, and of a set it is any.
    """
    places: dict[tuple[int, object], int] = {}
    try:
        return _members(value, places) <= _members(other, places)
    except TypeError:  # a codec of the application's has members that cannot be counted
        return False


def _members(value: object, places: dict[tuple[int, object], int]) -> "Counter[object]":
    """What is in a value, and where: by the names that lead there, all items of a list alike.

    Not by recursion: somebody else may have nested it as deep as he likes.
    """
    members: Counter[object] = Counter()
    left = [(0, value)]
    while left:
        place, value = left.pop()
        if isinstance(value, dict):
            for name, member in value.items():
                left.append((places.setdefault((place, name), len(places) + 1), member))
            value = dict
        elif isinstance(value, list):
            within = places.setdefault((place, list), len(places) + 1)
            left += [(within, member) for member in value]
            value = list
        members[place, value] += 1
    return members


def _changed(
    fields: tuple[bytes, ...], change: Callable[[bytes, bytes], bytes]
) -> tuple[bytes, ...]:
    """The fields with the data of payloads changed, in whichever of two ways they are stored."""
    changed: list[bytes] = []
    for field, held in zip(fields[::2], fields[1::2], strict=True):
        kind = field[:1]
        if kind in _PAYLOAD_KINDS:
            # One that gets an end of its own is sealed as before: the server moves it.
            ends = _END_DIGITS if kind == _TIMED else 0
            changed += (field, held[:ends] + change(held[ends:], b":" + field[1:]))
        else:
            changed += (field, held)
    return tuple(changed)
