"""XChaCha20-Poly1305 of the libsodium that PyNaCl brings along, at half the price. No I/O here.

PyNaCl's own functions check and copy what is fixed here: 7.4 µs to encrypt 200 bytes and 6.3 to
decrypt them, of which libsodium takes 1.5. They stand in where a PyNaCl has no `_sodium` any more.
"""

from collections.abc import Callable
from typing import NamedTuple

KEY_BYTES = 32
NONCE_BYTES = 24
TAG_BYTES = 16


class Cipher(NamedTuple):
    """Two functions, each of data, additional data, nonce and key: bytes of the right lengths.

    `decrypt` returns None for what that key did not encrypt so. Data holds no more than memory.
    """

    encrypt: Callable[[bytes, bytes, bytes, bytes], bytes]
    decrypt: Callable[[bytes, bytes, bytes, bytes], bytes | None]


def cipher() -> Cipher:
    """The faster one that there is."""
    try:
        return direct()
    except (ImportError, AttributeError):
        return by_bindings()


def direct() -> Cipher:
    """By libsodium itself, as PyNaCl calls it."""
    # Imported by those alone who seal. It is compiled, and has no types.
    from nacl._sodium import ffi, lib  # type: ignore[import-not-found]  # noqa: PLC0415

    characters = ffi.typeof("unsigned char[]")
    null, new = ffi.NULL, ffi.new
    buffer: Callable[[object], bytes] = ffi.buffer  # a slice of it is bytes
    c_encrypt = lib.crypto_aead_xchacha20poly1305_ietf_encrypt
    c_decrypt = lib.crypto_aead_xchacha20poly1305_ietf_decrypt

    def encrypt(data: bytes, additional: bytes, nonce: bytes, key: bytes) -> bytes:
        size = len(data)
        if len(nonce) != NONCE_BYTES or len(key) != KEY_BYTES:
            raise ValueError("a nonce has 24 bytes and a key 32")  # libsodium reads as many
        to = new(characters, size + TAG_BYTES)
        if c_encrypt(to, null, data, size, additional, len(additional), null, nonce, key):
            raise AssertionError("libsodium always encrypts")  # pragma: no cover
        return buffer(to)[:]

    def decrypt(data: bytes, additional: bytes, nonce: bytes, key: bytes) -> bytes | None:
        size = len(data)
        if size < TAG_BYTES or len(nonce) != NONCE_BYTES:
            return None
        to = new(characters, size - TAG_BYTES)
        if c_decrypt(to, null, null, data, size, additional, len(additional), nonce, key):
            return None
        return buffer(to)[:]

    return Cipher(encrypt, decrypt)


def by_bindings() -> Cipher:
    """By PyNaCl's documented functions."""
    from nacl import bindings, exceptions  # noqa: PLC0415  # likewise

    def decrypt(data: bytes, additional: bytes, nonce: bytes, key: bytes) -> bytes | None:
        if len(data) < TAG_BYTES or len(nonce) != NONCE_BYTES:
            return None
        try:
            return bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(data, additional, nonce, key)
        except exceptions.CryptoError:
            return None

    return Cipher(bindings.crypto_aead_xchacha20poly1305_ietf_encrypt, decrypt)
