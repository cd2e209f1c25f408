"""The names of things in Redis: session ids, the keys they live at, their slots. No I/O here."""

import string
from binascii import crc_hqx
from collections.abc import Callable
from functools import cache

from .arguments import utf8
from .errors import ConfigurationError

ID_LENGTH = 16
ID_ALPHABET = (string.ascii_uppercase + string.ascii_lowercase + string.digits).encode()
MAX_PREFIX_BYTES = 200
SLOTS = 16_384

# A random byte becomes a letter by its remainder; the 8 bytes that would favour some letters go.
_FAIR = 256 - 256 % len(ID_ALPHABET)
_LETTERS = bytes(ID_ALPHABET[byte % len(ID_ALPHABET)] for byte in range(256))
_UNFAIR = bytes(range(_FAIR, 256))

# What stands between the prefix and a subject, and the prefix and an id in the key of its tries.
_INDEX = ":subject"
_TRIES = ":tries"

# The letters of an id that carry it into a slot; the others are free.
_ENDING = 3


def system_random(size: int) -> bytes:
    """Bytes of the system's random source, through libsodium."""
    from nacl.utils import random  # noqa: PLC0415  # a third of our import time, and only for start

    return random(size)


class Keyspace:
    """Draws session ids and names what is kept for them.

    A session's hash is `<prefix>:{<id>}`; `<prefix>:tries:{<id>}` says that its id was given up; a
    subject's index is `<prefix>:subject:{<subject>}`. The ids of a subject's sessions are drawn so
    that they share the slot of its index: one script may then use them all, on a cluster too.
    """

    __slots__ = ("_head", "_index_head", "_random", "_tries_head")

    def __init__(self, prefix: str, random: Callable[[int], bytes]) -> None:
        self._head = _prefix_bytes(prefix) + b":{"
        self._index_head = _prefix_bytes(prefix) + _INDEX.encode() + b":{"
        self._tries_head = _prefix_bytes(prefix) + _TRIES.encode() + b":{"
        self._random = random

    def new_id(self) -> str:
        """A session id nobody can foresee: 16 of `[A-Za-z0-9]`, 95 bits."""
        return self._letters(ID_LENGTH).decode()

    def new_id_in(self, slot: int) -> str:
        """A session id of that slot: 80 bits that nobody can foresee, 78 at the least."""
        letters = self._letters(ID_LENGTH - _ENDING + 1)
        free, where = letters[:-1], letters[-1]
        # CRC is linear: what the ending has to add depends on the rest alone. Some always do; which
        # of them is taken depends on where the search begins.
        delta = slot ^ _slot_of_tag(free + ID_ALPHABET[:1] * _ENDING)
        return (free + _ending(delta, ID_ALPHABET.index(where))).decode()

    def session_key(self, session_id: str) -> bytes:
        """The Redis key of a session's hash; the braces make its id the hash tag."""
        return b"%b%b}" % (self._head, session_id.encode())

    def tries_key(self, session_id: str) -> bytes:
        """The Redis key that holds how often a session's start was tried, if more than once."""
        return b"%b%b}" % (self._tries_head, session_id.encode())

    def index_key(self, subject: bytes) -> bytes:
        """The Redis key of a subject's index; the braces make the subject the hash tag."""
        tag = subject.replace(b"%", b"%25").replace(b"{", b"%7B").replace(b"}", b"%7D")
        return b"%b%b}" % (self._index_head, tag)

    def _letters(self, count: int) -> bytes:
        letters = b""
        while len(letters) < count:
            letters += self._random(2 * ID_LENGTH).translate(_LETTERS, _UNFAIR)
        return letters[:count]


def slot_of(key: bytes) -> int:
    """The slot of a Redis key on a cluster: that of its hash tag, if it has one."""
    _, brace, rest = key.partition(b"{")
    tag, brace, _ = rest.partition(b"}") if brace else (b"", b"", b"")
    return _slot_of_tag(tag if tag and brace else key)


def is_session_id(text: str) -> bool:
    """Whether it is spelt as a session id."""
    raw = utf8(text) or b""
    return len(raw) == ID_LENGTH and not raw.strip(ID_ALPHABET)


def _slot_of_tag(tag: bytes) -> int:
    return crc_hqx(tag, 0) % SLOTS  # CRC16/XMODEM: Redis Cluster specification, "Key distribution"


def _ending(delta: int, where: int) -> bytes:
    """An ending that moves the slot of an id by `delta` from that of the id ending in `AAA`.

    The first one that is found from the letter at `where` on.
    """
    first, pairs = _shifts()
    for at in range(where, where + len(ID_ALPHABET)):
        pair = pairs.get(delta ^ first[at])
        if pair:
            return b"%c%b" % (ID_ALPHABET[at % len(ID_ALPHABET)], pair)
    raise AssertionError("every slot has endings")  # pragma: no cover  # 8 at the least


@cache
def _shifts() -> tuple[list[int], dict[int, bytes]]:
    """How far each first letter of an ending moves the slot, twice over; and what two more do.

    A table of all endings would take a tenth of a second to make; this one takes a thousandth.
    """
    zero = ID_ALPHABET[:1]
    home = _slot_of_tag(zero * _ENDING)
    first = [home ^ _slot_of_tag(b"%c" % letter + zero * 2) for letter in ID_ALPHABET]
    pairs = {
        home ^ _slot_of_tag(zero + b"%c%c" % (one, two)): b"%c%c" % (one, two)
        for one in ID_ALPHABET
        for two in ID_ALPHABET
    }
    return first * 2, pairs


def _prefix_bytes(prefix: object) -> bytes:
    if not isinstance(prefix, str) or not prefix:
        raise ConfigurationError("prefix is a str of at least one character, as in 'sg-session'")
    # A brace would move the hash tag from the session id to the prefix: one slot for everything.
    if "{" in prefix or "}" in prefix:
        raise ConfigurationError("prefix may hold no { or }: Redis Cluster gives them a meaning")
    if prefix.endswith((_INDEX, _TRIES)):
        raise ConfigurationError(
            f"prefix does not end in {_INDEX!r} or {_TRIES!r}: kept for others"
        )
    raw = utf8(prefix)
    if raw is None:
        raise ConfigurationError("prefix is valid text: this one holds a lone surrogate")
    if len(raw) > MAX_PREFIX_BYTES:
        raise ConfigurationError(f"prefix is at most {MAX_PREFIX_BYTES} bytes, not {len(raw)}")
    return raw
