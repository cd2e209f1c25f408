r"""How payloads are sealed so that Redis cannot read or change them, and by which key. No I/O here.

    sealed = "\xc1SG" version(1) key id(4) nonce(24) ciphertext tag(16)

XChaCha20-Poly1305, with what stands before the nonce, the Redis key of the session's hash and the
payload's field as additional data: what was sealed opens in that session and under that name alone.
"""

import os
import re
from collections.abc import Callable, Sequence
from hashlib import blake2b

from .arguments import MISSING_HINT, type_of_setting
from .cipher import KEY_BYTES, NONCE_BYTES, cipher
from .errors import ConfigurationError
from .tokens import SignKey, SignKeyRing

SealingKey = str | bytes

KEY_ID_BYTES = 4
OVERHEAD_BYTES = 48

# No text in UTF-8 holds the byte C1, and no MessagePack begins with it: what begins like this was
# sealed, or is random.
_MARK = b"\xc1SG"
_VERSION = b"\x01"
_START = _MARK + _VERSION
_HEADER_BYTES = len(_START) + KEY_ID_BYTES
_NONCE_END = _HEADER_BYTES + NONCE_BYTES

_match_text = re.compile(r"[0-9A-Fa-f]{64}").fullmatch

# One secret, one use: what encrypts and the key id are derived from the sealing key under names of
# their own.
_FOR_SEALING = b"sg payload seal"
_FOR_ID = b"sg seal key id"


def new_sealing_key() -> str:
    """A sealing key as `sessiongate keygen` prints it: 32 random bytes in 64 hexadecimal digits.

    Example:
        >>> from sessiongate.sealing import new_sealing_key
        >>> len(new_sealing_key())
        64
    """
    return os.urandom(KEY_BYTES).hex()


def sealing_key_id(sealing_key: SealingKey) -> str:
    """What tells in Redis that a key sealed: 8 hexadecimal digits, no secret.

    Args:
        sealing_key: as the gate is given it.

    Raises:
        ConfigurationError: it is no sealing key.

    Example:
        >>> from sessiongate.sealing import sealing_key_id
        >>> sealing_key_id("00112233445566778899aabbccddeeff" * 2)
        '0c0430ad'
    """
    return _id_of(_key_bytes(sealing_key)).hex()


def sealed_by(data: bytes) -> str | None:
    """The id of the key that sealed what Redis holds of a payload; None if it is not sealed.

    Args:
        data: as it stands in Redis.

    Example:
        >>> from sessiongate.sealing import sealed_by
        >>> print(sealed_by(b"plain text"))
        None
    """
    is_sealed = data.startswith(_MARK) and len(data) >= _HEADER_BYTES
    return data[len(_START) : _HEADER_BYTES].hex() if is_sealed else None


class SealingKeyRing:
    """The sealing keys of a gate: the first one seals, all of them open.

    Args:
        sealing_key: one, or several, newest first; None in the first place seals nothing.
        accept_unsealed: whether data that was never sealed is opened as it is.
        random: where nonces come from; only a test should replace it.
    """

    __slots__ = (
        "_accepts_unsealed",
        "_decrypt",
        "_encrypt",
        "_header",
        "_key",
        "_keys",
        "_random",
        "_seals",
    )

    def __init__(
        self,
        sealing_key: SealingKey | Sequence[SealingKey | None],
        *,
        accept_unsealed: bool = False,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._keys: dict[bytes, bytes] = {}  # so that it has a repr, whatever happens
        keys = [sealing_key] if isinstance(sealing_key, str | bytes) else sealing_key
        if not isinstance(keys, Sequence) or isinstance(keys, bytearray | memoryview):
            raise ConfigurationError(
                f"sealing_key is 32 bytes, or their 64 hexadecimal digits as a str, or a list of "
                f"them, newest first, not {type_of_setting(sealing_key)}"
            )
        if not keys:
            raise ConfigurationError("sealing_key is an empty list: give at least one, or None")
        seals = keys[0] is not None
        secrets = [_key_bytes(key) for key in (keys if seals else keys[1:])]
        if not secrets:
            raise ConfigurationError("sealing_key is a list without keys: give one, or None alone")
        if not seals and not accept_unsealed:
            raise ConfigurationError(
                "a sealing_key that begins with None seals nothing: it needs accept_unsealed=True"
            )
        self._keys = {_START + _id_of(secret): _derived(secret, _FOR_SEALING) for secret in secrets}
        if len(self._keys) < len(set(secrets)):
            raise ConfigurationError("two of the sealing keys have one id: make another one")
        self._header, self._key = next(iter(self._keys.items()))
        self._seals = seals
        self._accepts_unsealed = accept_unsealed
        self._random = random
        self._encrypt, self._decrypt = cipher()

    def __repr__(self) -> str:
        return f"<SealingKeyRing of {len(self._keys)}>"

    @property
    def kind(self) -> str:
        """What it does, in a few words."""
        seals = "sealed" if self._seals else "opens sealed"
        return f"{seals}, accepts unsealed" if self._accepts_unsealed else seals

    def seal(self, data: bytes, session_key: bytes, field: bytes) -> bytes:
        """What to store of data in that field of the hash at that Redis key: 48 bytes more."""
        if not self._seals and not _looks_sealed(data):
            return data
        return self._sealed(data, session_key, field)

    def open(self, sealed: bytes, session_key: bytes, field: bytes) -> bytes | None:
        """The data that was sealed for that field of that hash; None if it was not."""
        header = sealed[:_HEADER_BYTES]
        key = self._keys.get(header)
        if key is None:
            return sealed if self._accepts_unsealed and not _looks_sealed(sealed) else None
        nonce = sealed[_HEADER_BYTES:_NONCE_END]
        return self._decrypt(sealed[_NONCE_END:], header + session_key + field, nonce, key)

    def reseal(self, sealed: bytes, session_key: bytes, to: bytes, field: bytes) -> bytes | None:
        """What to store of it in another hash; None if it was not sealed for this one.

        What is sealed stays so, whether the ring seals new data or not.
        """
        data = self.open(sealed, session_key, field)
        if data is None or (data is sealed and not self._seals):
            return data
        return self._sealed(data, to, field)

    def _sealed(self, data: bytes, session_key: bytes, field: bytes) -> bytes:
        header, nonce = self._header, self._random(NONCE_BYTES)
        return header + nonce + self._encrypt(data, header + session_key + field, nonce, self._key)


def _looks_sealed(data: bytes) -> bool:
    """Whether it begins as sealed data does, however little of it is left."""
    return _MARK.startswith(data[: len(_MARK)])


def key_rings(
    sign_key: SignKey | Sequence[SignKey],
    sealing_key: SealingKey | Sequence[SealingKey | None] | None,
    *,
    accept_unsealed: bool,
) -> tuple[SignKeyRing, SealingKeyRing | None]:
    """What a gate signs and seals with.

    Raises:
        ConfigurationError: a key cannot be used. A log that shows variables finds no key with it.
    """
    try:
        return SignKeyRing(sign_key), _sealing_key_ring(
            sealing_key, sign_key, accept_unsealed=accept_unsealed
        )
    except ConfigurationError as error:
        del sign_key, sealing_key
        raise error.with_traceback(None) from None


def _sealing_key_ring(
    sealing_key: SealingKey | Sequence[SealingKey | None] | None,
    sign_key: SignKey | Sequence[SignKey],
    *,
    accept_unsealed: bool,
) -> SealingKeyRing | None:
    """The ring of a gate; None if it does not seal.

    Raises:
        ConfigurationError: a key cannot be used, or signs tokens as well.
    """
    if not isinstance(accept_unsealed, bool):
        raise ConfigurationError(f"accept_unsealed is a bool, not {type(accept_unsealed).__name__}")
    if sealing_key is None:
        if accept_unsealed:
            raise ConfigurationError(
                f"accept_unsealed needs a sealing_key: without, nothing is sealed{MISSING_HINT}"
            )
        return None
    ring = SealingKeyRing(sealing_key, accept_unsealed=accept_unsealed)
    if _spellings(sealing_key) & _spellings(sign_key):
        raise ConfigurationError(
            "one secret is both a sign_key and a sealing_key: make another one with "
            "`sessiongate keygen`"
        )
    return ring


def _spellings(keys: SignKey | Sequence[SignKey | None]) -> set[bytes]:
    """The bytes of keys, and of those in hexadecimal digits what they stand for."""
    listed: Sequence[SignKey | None] = [keys] if isinstance(keys, str | bytes) else keys
    raw = {key.encode() if isinstance(key, str) else key for key in listed if key is not None}
    texts = [key.decode("latin-1").strip() for key in raw]
    return raw | {bytes.fromhex(text) for text in texts if _match_text(text)}


def _derived(secret: bytes, purpose: bytes) -> bytes:
    return blake2b(key=secret, person=purpose, digest_size=KEY_BYTES).digest()


def _id_of(secret: bytes) -> bytes:
    return _derived(secret, _FOR_ID)[:KEY_ID_BYTES]


def _key_bytes(key: object) -> bytes:
    raw: bytes | None = None
    if isinstance(key, str):
        # Not `fromhex` alone, which takes white space for nothing.
        raw = bytes.fromhex(key) if _match_text(key) else None
    elif isinstance(key, bytes):
        raw = bytes(key) if len(key) == KEY_BYTES else None
    else:
        raise ConfigurationError(f"a sealing key is a str or bytes, not {type_of_setting(key)}")
    if raw is None:
        digits = 2 * KEY_BYTES
        if len(key) == digits:
            found = (
                f"{digits} characters that are not all of 0-9 and a-f"
                if isinstance(key, str)
                else f"{digits} bytes: hexadecimal digits are given as a str"
            )
        else:
            found = (
                f"{len(key)} {'characters' if isinstance(key, str) else 'bytes'}: make one with "
                "`sessiongate keygen`, and look whether something is before or behind it, as a "
                "newline"
            )
        raise ConfigurationError(
            f"a sealing key is {KEY_BYTES} bytes, or a str of their {digits} hexadecimal digits, "
            f"not {found}"
        )
    if not raw.strip(b"\0"):
        raise ConfigurationError(f"a sealing key is nothing but zeros{MISSING_HINT}")
    return raw
