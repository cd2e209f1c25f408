"""How a token is spelt, and whether one of our sign keys signed it. No I/O here."""

import hmac
import re
import sys
import warnings
from collections.abc import Sequence
from hashlib import sha256

from .arguments import MISSING_HINT, type_of_setting, utf8
from .errors import BadSignatureError, ConfigurationError, MalformedTokenError, WeakSignKeyWarning

SignKey = str | bytes

# A key shorter than the hash is the weakest part of an HMAC: RFC 2104, section 3.
STRONG_SIGN_KEY_BYTES = 32
FINGERPRINT_BYTES = 16
REALM_BYTES = 8

# fullmatch and explicit classes: `$` would let a newline in, `\d` and `\w` Unicode.
_match_v1 = re.compile(r"v1\.([A-Za-z0-9]{16})\.([0-9a-f]{64})").fullmatch
# 18 digits are a generation that no session lives to see, and fit into 64 bits.
_match_v2 = re.compile(r"v2\.([A-Za-z0-9]{16})\.([1-9][0-9]{0,17})\.([0-9a-f]{64})").fullmatch


def is_spelt_as_token(text: str) -> bool:
    """Whether it could be a token, of whichever key."""
    return text[:1] == "v" and bool(_match_v1(text) or _match_v2(text))


class SignKeyRing:
    """The sign keys of a gate: the first one signs, all of them verify."""

    __slots__ = ("_macs", "realms")

    def __init__(self, sign_key: SignKey | Sequence[SignKey]) -> None:
        self._macs: tuple[_Mac, ...] = ()  # so that it has a repr, whatever happens
        keys = [sign_key] if isinstance(sign_key, str | bytes) else sign_key
        if not isinstance(keys, Sequence) or isinstance(keys, bytearray | memoryview):
            raise ConfigurationError(
                f"sign_key is a str, bytes or a list of them, newest first, "
                f"not {type_of_setting(sign_key)}"
            )
        if not keys:
            raise ConfigurationError("sign_key is an empty list: give at least one sign key")
        self._macs = tuple(_Mac(_key_bytes(key)) for key in keys)
        # What tells in Redis, of each sign key, that it signed: no message is spelt like this one.
        self.realms = tuple(_fingerprint(mac(b"realm"))[:REALM_BYTES] for mac in self._macs)

    def __repr__(self) -> str:
        return f"<SignKeyRing of {len(self._macs)}>"

    def sign(self, session_id: str, generation: int = 0) -> tuple[str, bytes]:
        """The token of a session id, signed with the newest key, and its fingerprint.

        Generation 0 is a session's first token, others are its successors.
        """
        return _signed(self._macs[0], session_id, generation)

    def token_of(self, fingerprint: bytes, session_id: str, generation: int) -> str:
        """The token of that fingerprint, which another process may have signed with another key.

        Raises:
            BadSignatureError: no key of the ring signed it.
        """
        for mac in self._macs:
            # No token gets a name here: a traceback that shows local variables would hand it out.
            if _signed(mac, session_id, generation)[1] == fingerprint:
                return _signed(mac, session_id, generation)[0]
        raise BadSignatureError

    def verify(self, token: str | bytes) -> tuple[str, bytes, int]:
        """The session id in a genuine token, the token's fingerprint and its generation.

        Raises:
            MalformedTokenError: it is not spelt as a token, or not a str or bytes at all.
            BadSignatureError: no key of the ring signed it.
        """
        text = token if isinstance(token, str) else _text(token)
        if match := _match_v1(text):
            session_id, signature = match.groups()
            message, generation = session_id.encode(), 0
        elif match := _match_v2(text):
            session_id, digits, signature = match.groups()
            generation = int(digits)
            message = _message(session_id, generation)
        else:
            raise MalformedTokenError
        claimed = bytes.fromhex(signature)
        for mac in self._macs:
            # PyNaCl's sodium_memcmp does the same through cffi: 1.4 µs instead of 0.06. The genuine
            # signature gets no name: a traceback that shows local variables would hand it out.
            if hmac.compare_digest(mac(message), claimed):
                return session_id, _fingerprint(claimed), generation
        raise BadSignatureError


class _Mac:
    """HMAC-SHA256 with one key, which is taken in once (RFC 2104, section 4).

    Half the time of `hmac.digest`, which takes in the key anew, and of copies of `hmac.HMAC`.
    """

    __slots__ = ("_inner", "_outer")

    def __init__(self, key: bytes) -> None:
        block = sha256().block_size
        padded = (sha256(key).digest() if len(key) > block else key).ljust(block, b"\0")
        self._inner = sha256(bytes(byte ^ 0x36 for byte in padded))
        self._outer = sha256(bytes(byte ^ 0x5C for byte in padded))

    def __call__(self, message: bytes) -> bytes:
        inner = self._inner.copy()
        inner.update(message)
        outer = self._outer.copy()
        outer.update(inner.digest())
        return outer.digest()


def _message(session_id: str, generation: int) -> bytes:
    """What is signed: of a first token its id, of others all that stands before the signature."""
    return b"v2.%b.%d" % (session_id.encode(), generation) if generation else session_id.encode()


def _signed(mac: _Mac, session_id: str, generation: int) -> tuple[str, bytes]:
    message = _message(session_id, generation)
    signature = mac(message)
    head = message.decode() if generation else f"v1.{session_id}"
    return f"{head}.{signature.hex()}", _fingerprint(signature)


def _fingerprint(signature: bytes) -> bytes:
    """What Redis holds of a token: enough to tell it, too little to make it."""
    return sha256(signature).digest()[:FINGERPRINT_BYTES]


def _text(token: object) -> str:
    """The characters of a token that came as bytes; of anything else, none."""
    return bytes.decode(token, "latin-1") if isinstance(token, bytes) else ""


def _key_bytes(key: object) -> bytes:
    if not isinstance(key, str | bytes):
        raise ConfigurationError(f"a sign key is a str or bytes, not {type_of_setting(key)}")
    raw = utf8(key) if isinstance(key, str) else key
    if raw is None:
        raise ConfigurationError(
            "a sign key must be valid text or bytes: this str holds a lone surrogate"
        )
    if not raw.strip(b"\0"):  # HMAC pads a key with NULs: of them alone it is the empty one
        raise ConfigurationError(f"a sign key is empty{MISSING_HINT}")
    if len(raw) < STRONG_SIGN_KEY_BYTES:
        warnings.warn(
            f"a sign key of {len(raw)} bytes can be guessed: make one with "
            f"secrets.token_hex({STRONG_SIGN_KEY_BYTES})",
            WeakSignKeyWarning,
            stacklevel=_levels_to_caller(),
        )
    return raw


def _levels_to_caller() -> int:
    """How far up the stack the application is: it made the gate, by one of several ways."""
    package = __name__.partition(".")[0] + "."
    level = 1
    frame = sys._getframe(1)  # noqa: SLF001  # CPython's only way
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(package):
        frame = frame.f_back
        level += 1
    return level
