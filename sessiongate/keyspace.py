"""The names of things in Redis: session ids and the keys they live at. No I/O here."""

import string
from collections.abc import Callable

from .arguments import utf8
from .errors import ConfigurationError

ID_LENGTH = 16
ID_ALPHABET = (string.ascii_uppercase + string.ascii_lowercase + string.digits).encode()
MAX_PREFIX_BYTES = 200

# A random byte becomes a letter by its remainder; the 8 bytes that would favour some letters go.
_FAIR = 256 - 256 % len(ID_ALPHABET)
_LETTERS = bytes(ID_ALPHABET[byte % len(ID_ALPHABET)] for byte in range(256))
_UNFAIR = bytes(range(_FAIR, 256))


def system_random(size: int) -> bytes:
    """Bytes of the system's random source, through libsodium."""
    from nacl.utils import random  # noqa: PLC0415  # a third of our import time, and only for start

    return random(size)


class Keyspace:
    """Draws session ids and names their hashes: `<prefix>:{<id>}`."""

    __slots__ = ("_head", "_random")

    def __init__(self, prefix: str, random: Callable[[int], bytes]) -> None:
        self._head = _prefix_bytes(prefix) + b":{"
        self._random = random

    def new_id(self) -> str:
        """A session id nobody can foresee: 16 of `[A-Za-z0-9]`, 95 bits."""
        letters = b""
        while len(letters) < ID_LENGTH:
            letters += self._random(2 * ID_LENGTH).translate(_LETTERS, _UNFAIR)
        return letters[:ID_LENGTH].decode()

    def session_key(self, session_id: str) -> bytes:
        """The Redis key of a session's hash; the braces make its id the hash tag."""
        return b"%b%b}" % (self._head, session_id.encode())


def _prefix_bytes(prefix: object) -> bytes:
    if not isinstance(prefix, str) or not prefix:
        raise ConfigurationError("prefix is a str of at least one character, as in 'sg-session'")
    # A brace would move the hash tag from the session id to the prefix: one slot for everything.
    if "{" in prefix or "}" in prefix:
        raise ConfigurationError("prefix holds no braces: they are the hash tag's")
    raw = utf8(prefix)
    if raw is None:
        raise ConfigurationError("prefix is valid text: this one holds a lone surrogate")
    if len(raw) > MAX_PREFIX_BYTES:
        raise ConfigurationError(f"prefix is at most {MAX_PREFIX_BYTES} bytes, not {len(raw)}")
    return raw
