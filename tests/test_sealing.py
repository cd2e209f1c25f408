"""Sealing: what is a sealing key, what it seals and opens, and what gates do that seal."""

import hashlib
import hmac
import itertools
import re
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl import bindings
from redis import Redis, RedisCluster

from sessiongate import (
    ArgumentError,
    AsyncSessionGate,
    ConfigurationError,
    JSONCodec,
    PayloadConflictError,
    PayloadNotFoundError,
    SessionGate,
    SessionNotFoundError,
    TooManySessionsError,
    UnsealError,
)
from sessiongate import cipher as cipher_module
from sessiongate import sealing as sealing_module
from sessiongate.cipher import by_bindings, direct
from sessiongate.command import Answer, AnyCommand
from sessiongate.sealing import SealingKeyRing, new_sealing_key, sealed_by, sealing_key_id
from sessiongate.tokens import SignKeyRing
from sessiongate.values import Values

from .conftest import CLUSTERED, SIGN_KEY, Backend, Flavour, apart, end_of
from .proxy import Proxy
from .servers import Server

OLD, NEW, OTHER = "0a" * 32, "0b" * 32, "0c" * 32
OVERHEAD = 48
MARK = b"\xc1SG"
ID, ID_2 = b"A" * 16, b"B" * 16
FIELD, FIELD_2 = b":user", b":cart"
SIZES = [1, 2, 15, 16, 17, 48, 1_000, 100_000]
TOKEN = SignKeyRing(SIGN_KEY).sign("A" * 16)[0]
CIPHERS = [direct, by_bindings]

Decorator = Callable[[Callable[..., None]], Callable[..., None]]

# Sealing is done in this process: it is the same on every version of a server.
_servers = [CLUSTERED] if CLUSTERED else []
both_gates = pytest.mark.parametrize("flavour", ["sync", "async"], indirect=True)
one_gate = pytest.mark.parametrize("flavour", ["sync"], indirect=True)
everywhere = pytest.mark.parametrize(
    "backend", ["memory", *_servers, *(["cluster"] if CLUSTERED else [])], indirect=True
)
on_the_cluster = pytest.mark.parametrize("backend", ["cluster"] if CLUSTERED else [], indirect=True)
on_a_server = pytest.mark.parametrize("backend", _servers, indirect=True)
one_server = pytest.mark.parametrize("server", _servers, indirect=True)


def tampered(sealed: bytes) -> Iterator[bytes]:
    """Each byte changed in one bit, each shorter beginning and end, and some longer ones."""
    for at in range(len(sealed)):
        yield sealed[:at] + bytes([sealed[at] ^ 1 << at % 8]) + sealed[at + 1 :]
        yield sealed[:at]
        yield sealed[at + 1 :]
    yield from (sealed + b"\0", b"\0" + sealed, sealed + sealed, sealed + sealed[-16:])


# What a sealing key is.


@pytest.mark.parametrize("key", [b"k" * 32, "0f" * 32, "0F" * 32], ids=repr)
def test_what_is_a_sealing_key(key: str | bytes) -> None:
    """32 bytes, or their 64 hexadecimal digits in whatever case, are a key: alone or in a list."""
    raw = bytes.fromhex(key) if isinstance(key, str) else key
    spelt = [key, [key], (key,), raw, raw.hex(), raw.hex().upper()]
    sealed = SealingKeyRing(key).seal(b"data", ID, FIELD)
    for ring in map(SealingKeyRing, spelt):
        assert ring.open(sealed, ID, FIELD) == b"data"
    assert len({sealing_key_id(one) for one in (key, raw, raw.hex().upper())}) == 1


def test_a_new_key_is_random() -> None:
    """Each new sealing key is another one, and spelt as a gate takes it."""
    keys = {new_sealing_key() for _ in range(50)}
    assert len(keys) == 50
    assert len({sealing_key_id(key) for key in keys}) == 50


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (b"k" * 31, r"is 32 bytes, or a str of their 64 .* not 31 bytes: .*`sessiongate keygen`"),
        (b"k" * 33, "not 33 bytes: make one"),
        (b"0f" * 32, "not 64 bytes: hexadecimal digits are given as a str"),
        (b"", "not 0 bytes: make one"),
        ("", "not 0 characters: make one"),
        ("k" * 32, "not 32 characters: make one"),
        ("0g" * 32, "not 64 characters that are not all of 0-9 and a-f"),
        ("0f" * 31, "not 62 characters: make one"),
        ("0f" * 32 + "\n", "not 65 characters: make one"),
        ("0f " * 21 + "f", "not all of 0-9 and a-f"),
        ("\N{ARABIC-INDIC DIGIT ZERO}f" * 32, "not all of 0-9 and a-f"),
        ("00" * 32, "nothing but zeros: is it missing from your settings?"),
        (b"\0" * 32, "nothing but zeros: is it missing from your settings?"),
        ([], "is an empty list: give at least one, or None"),
        ((), "is an empty list"),
        (bytearray(32), r"32 bytes, .* or a list of them, newest first, not bytearray"),
        (memoryview(b"k" * 32), "not memoryview"),
        ({OLD}, "not set"),
        (7, "not int"),
        ([OLD, None], "is a str or bytes, not NoneType: is it missing from your settings?"),
        ([OLD, 7], "is a str or bytes, not int"),
        ([OLD, b"k" * 31], "not 31 bytes"),
        ([[OLD]], "is a str or bytes, not list"),
    ],
    ids=lambda value: re.sub("^<memory.*", "a view", repr(value)[:30]),
)
def test_what_is_no_sealing_key(key: Any, message: str) -> None:
    """What is no key is refused when the gate is made; the message says what to do, and no key."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        SessionGate.from_url("memory://", sign_key=SIGN_KEY, sealing_key=key)
    for one in key if isinstance(key, list) else [key]:
        if isinstance(one, str | bytes) and len(one) > 3:
            assert str(one) not in str(caught.value)
    with pytest.raises(ConfigurationError, match=message):
        AsyncSessionGate.from_url("memory://", sign_key=SIGN_KEY, sealing_key=key)


@pytest.mark.parametrize("sign_key", [f"{OLD}\n", f" {OLD}".encode()])
def test_a_sign_key_with_blanks_is_no_other_secret(sign_key: str | bytes) -> None:
    """One secret for both is refused however it is spelt, with a newline behind it too."""
    with pytest.raises(ConfigurationError, match="both a sign_key and a sealing_key"):
        SessionGate.from_url("memory://", sign_key=sign_key, sealing_key=OLD)


def test_every_payload_has_a_nonce_of_its_own() -> None:
    """Payloads of one call are sealed under nonces of their own; so are those of a sign-in."""
    values: Values[Any, Any] = Values(None, SealingKeyRing(OLD))
    payloads = (b":a", b"1", b":b", b"1", b";c", b"1" * 13 + b"1")
    sealed = values.sealed(b"key", payloads)
    moved = values.moved(b"key", b"other", sealed, strict=True)
    nonces = {held[-17 - 24 : -17] for held in (*sealed[1::2], *moved[1::2])}
    assert len(nonces) == 6


def test_what_is_no_key_id() -> None:
    """Of sealed data that is cut within its head, no key is told."""
    for length in range(len(SEALED)):
        assert sealed_by(SEALED[:length]) == (KEY_ID if length >= 8 else None)


def test_the_first_key_seals_and_all_open() -> None:
    """A ring seals with its first key, and opens what any of its keys sealed and no other."""
    rings = [SealingKeyRing(keys) for keys in ([OLD, NEW], [NEW, OLD], NEW)]
    of_old, of_new, of_new_too = (ring.seal(b"data", ID, FIELD) for ring in rings)
    assert [sealed_by(one) for one in (of_old, of_new, of_new_too)] == [
        sealing_key_id(key) for key in (OLD, NEW, NEW)
    ]
    for ring in rings[:2]:
        assert ring.open(of_old, ID, FIELD) == ring.open(of_new, ID, FIELD) == b"data"
    assert rings[2].open(of_new, ID, FIELD) == b"data"
    assert rings[2].open(of_old, ID, FIELD) is None
    assert SealingKeyRing(OTHER).open(of_old, ID, FIELD) is None


def test_a_key_of_another_id_is_not_tried() -> None:
    """What a key sealed opens under no other id, were it that of a key in the ring."""
    ring = SealingKeyRing([NEW, OLD])
    sealed = ring.seal(b"data", ID, FIELD)
    for key in (OLD, OTHER):
        assert (
            ring.open(sealed[:4] + bytes.fromhex(sealing_key_id(key)) + sealed[8:], ID, FIELD)
            is None
        )


def test_key_ids() -> None:
    """An id is 8 hexadecimal digits, of each key its own, and holds no part of the key."""
    ids = [sealing_key_id(key) for key in (OLD, NEW, OTHER, b"k" * 32)]
    assert len(set(ids)) == 4
    for key_id in ids:
        assert len(bytes.fromhex(key_id)) == 4
        assert key_id not in OLD + NEW + OTHER + (b"k" * 32).hex()
    # It stands in what is stored for good.
    assert sealing_key_id("00112233445566778899aabbccddeeff" * 2) == KEY_ID
    with pytest.raises(ConfigurationError, match="not 3 characters"):
        sealing_key_id("key")


@pytest.mark.parametrize("data", [b"", b"text", b"\xc1", b"\xc1S", b"\0" * 99, b"SG", b"\x01" * 48])
def test_what_nobody_sealed(data: bytes) -> None:
    """Of data without the mark nobody is said to have sealed it."""
    assert sealed_by(data) is None


def test_a_key_that_is_given_twice() -> None:
    """A key that stands in the ring twice, in whatever spelling, is one key."""
    ring = SealingKeyRing([OLD, bytes.fromhex(OLD), NEW, OLD.upper()])
    assert repr(ring) == "<SealingKeyRing of 2>"
    assert sealed_by(ring.seal(b"data", ID, FIELD)) == sealing_key_id(OLD)


def test_two_keys_of_one_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two keys whose ids are the same by chance are refused, since one would hide the other."""
    monkeypatch.setattr(sealing_module, "_id_of", lambda _: b"same")
    with pytest.raises(
        ConfigurationError, match="two of the sealing keys have one id: make another"
    ):
        SealingKeyRing([OLD, NEW])
    assert repr(SealingKeyRing([OLD, OLD])) == "<SealingKeyRing of 1>"


@pytest.mark.parametrize(
    ("sign_key", "sealing_key"),
    [
        (OLD, OLD),
        (OLD, bytes.fromhex(OLD)),
        (bytes.fromhex(OLD), OLD),
        (bytes.fromhex(OLD), bytes.fromhex(OLD)),
        (OLD.upper(), OLD),
        (OLD.encode(), OLD),
        (OLD.encode(), bytes.fromhex(OLD)),
        ("k" * 32, b"k" * 32),
        ([SIGN_KEY, OLD], [NEW, OLD]),
        ([SIGN_KEY, bytes.fromhex(OLD)], (NEW, OLD)),
    ],
    ids=lambda key: type(key).__name__,
)
@pytest.mark.parametrize("kind", [SessionGate, AsyncSessionGate])
def test_one_secret_for_two_things(kind: Any, sign_key: Any, sealing_key: Any) -> None:
    """A secret that signs tokens is refused as a sealing key, in whichever spelling it comes."""
    with pytest.raises(
        ConfigurationError, match="is both a sign_key and a sealing_key: make another"
    ):
        kind.from_url("memory://", sign_key=sign_key, sealing_key=sealing_key)


def test_a_refused_key_can_be_shown_with_its_frames() -> None:
    """A tool that prints local variables can show that a key was refused: reprs do not fail."""
    with pytest.raises(ConfigurationError) as caught:
        SealingKeyRing(b"short")
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert "SealingKeyRing" in "".join(shown.format())


@pytest.mark.parametrize("kind", [SessionGate, AsyncSessionGate])
def test_a_gate_tells_whether_it_seals(kind: Any) -> None:
    """The repr of a gate names its codec, and says what becomes of payloads."""
    for options, told in (
        ({}, ""),
        ({"codec": JSONCodec()}, " JSONCodec"),
        ({"sealing_key": OLD}, " sealed"),
        ({"sealing_key": [NEW, OLD], "codec": JSONCodec()}, " JSONCodec sealed"),
        ({"sealing_key": OLD, "accept_unsealed": True}, " sealed, accepts unsealed"),
        (
            {"sealing_key": [None, OLD], "accept_unsealed": True},
            " opens sealed, accepts unsealed",
        ),
    ):
        gate = kind.from_url("memory://", sign_key=SIGN_KEY, prefix="shop", **options)
        assert repr(gate) == f"<{kind.__name__} prefix='shop'{told}>"


@pytest.mark.parametrize("kind", [SessionGate, AsyncSessionGate])
def test_accept_unsealed_by_itself(kind: Any) -> None:
    """accept_unsealed needs a sealing key, and is a bool."""
    with pytest.raises(ConfigurationError, match=r"needs a sealing_key: .* is it missing"):
        kind.from_url("memory://", sign_key=SIGN_KEY, accept_unsealed=True)
    for wrong in (1, "yes", None, 0):
        with pytest.raises(ConfigurationError, match="accept_unsealed is a bool, not "):
            kind.from_url("memory://", sign_key=SIGN_KEY, sealing_key=OLD, accept_unsealed=wrong)


# What a sealed payload looks like.

KEY_ID = "0c0430ad"
SEALED = bytes.fromhex(
    "c15347010c0430ad000102030405060708090a0b0c0d0e0f10111213141516173944e6b50469f0421be28ae18825845e89d4cd74b9a2d2dc"
)


def test_the_format_is_for_good() -> None:
    """What was sealed once is opened for good: mark, version, key id, nonce, ciphertext, tag."""
    key = "00112233445566778899aabbccddeeff" * 2
    nonce = bytes(range(24))
    ring = SealingKeyRing(key, random=lambda size: nonce[:size])
    assert ring.seal(b"John Doe", ID, FIELD) == SEALED
    assert SealingKeyRing(key).open(SEALED, ID, FIELD) == b"John Doe"
    assert SEALED[:4] == MARK + b"\x01"
    assert SEALED[4:8].hex() == KEY_ID
    assert SEALED[8:32] == nonce
    secret = hashlib.blake2b(
        key=bytes.fromhex(key), person=b"sg payload seal", digest_size=32
    ).digest()
    opened = bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(
        SEALED[32:], SEALED[:8] + ID + FIELD, nonce, secret
    )
    assert opened == b"John Doe"


def test_another_version_is_not_opened() -> None:
    """What begins with the mark and another version is refused, by a gate that accepts all too."""
    for ring in (SealingKeyRing(OLD), SealingKeyRing(OLD, accept_unsealed=True)):
        sealed = ring.seal(b"data", ID, FIELD)
        for version in (0, 2, 255):
            assert ring.open(sealed[:3] + bytes([version]) + sealed[4:], ID, FIELD) is None


@pytest.mark.parametrize("size", SIZES)
def test_sealing_takes_48_bytes(size: int) -> None:
    """Sealed data is 48 bytes longer than the data, and shows nothing of it."""
    data = b"\x01" * size
    sealed = SealingKeyRing(OLD).seal(data, ID, FIELD)
    assert len(sealed) == size + OVERHEAD
    assert b"\x01\x01\x01\x01" not in sealed


RING, ACCEPTING = SealingKeyRing([NEW, OLD]), SealingKeyRing([NEW, OLD], accept_unsealed=True)
owners = st.text("abcXYZ019", min_size=16, max_size=16).map(str.encode)
names = st.binary(min_size=1, max_size=200).map(lambda name: b":" + name)


@given(st.binary(min_size=1, max_size=5_000), owners, names, owners, names)
def test_what_was_sealed_opens_there_alone(
    data: bytes, owner: bytes, name: bytes, other_owner: bytes, other_name: bytes
) -> None:
    """Whatever was sealed opens as it was, in that session and under that name and nowhere else."""
    sealed = RING.seal(data, owner, name)
    assert RING.open(sealed, owner, name) == data
    if other_owner != owner:
        assert RING.open(sealed, other_owner, name) is None
        assert ACCEPTING.open(sealed, other_owner, name) is None
    if other_name != name:
        assert RING.open(sealed, owner, other_name) is None
    assert RING.open(RING.seal(data, owner, name) + b"x", owner, name) is None


@pytest.mark.parametrize("data", [b"x", b"text", b"\xc1SG\x01", b"\0" * 100])
def test_what_was_tampered_with_does_not_open(data: bytes) -> None:
    """A single changed bit, what was cut at either end and what is longer are refused."""
    sealed = RING.seal(data, ID, FIELD)
    for changed in tampered(sealed):
        assert RING.open(changed, ID, FIELD) is None


def test_unsealed_data_is_accepted_if_it_cannot_be_sealed() -> None:
    """At accept_unsealed data that does not begin as sealed data opens as it is, and no other."""
    for data in (b"text", b"x", b"SG\x01", b"{}", b"\xc2\xa0", b"\xc1xx", bytes(100)):
        assert ACCEPTING.open(data, ID, FIELD) == data
        assert RING.open(data, ID, FIELD) is None
    sealed = RING.seal(b"data", ID, FIELD)
    for length in range(len(sealed)):
        assert ACCEPTING.open(sealed[:length], ID, FIELD) is None
        assert RING.open(sealed[:length], ID, FIELD) is None
    for changed in tampered(sealed):
        if changed.startswith(MARK):
            assert ACCEPTING.open(changed, ID, FIELD) is None


# The cipher.


@settings(max_examples=60)
@given(
    st.binary(max_size=300), st.binary(max_size=230), st.binary(min_size=24, max_size=24), st.data()
)
def test_both_ciphers_are_one(
    data: bytes, additional: bytes, nonce: bytes, draw: st.DataObject
) -> None:
    """By libsodium itself and by PyNaCl's functions, the same is encrypted and opened."""
    key = draw.draw(st.binary(min_size=32, max_size=32))
    one, other = direct(), by_bindings()
    encrypted = one.encrypt(data, additional, nonce, key)
    assert other.encrypt(data, additional, nonce, key) == encrypted
    assert len(encrypted) == len(data) + cipher_module.TAG_BYTES
    at = draw.draw(st.integers(0, len(encrypted) - 1))
    changed = encrypted[:at] + bytes([encrypted[at] ^ 1]) + encrypted[at + 1 :]
    for decrypt in (one.decrypt, other.decrypt):
        assert decrypt(encrypted, additional, nonce, key) == data
        assert decrypt(changed, additional, nonce, key) is None
        assert decrypt(encrypted[:at], additional, nonce, key) is None
        assert decrypt(encrypted[at + 1 :], additional, nonce, key) is None
        assert decrypt(encrypted + b"\0", additional, nonce, key) is None
        assert decrypt(encrypted, additional + b"\0", nonce, key) is None
        assert decrypt(encrypted, additional, nonce, hashlib.sha256(key).digest()) is None


@pytest.mark.parametrize("make", CIPHERS)
def test_what_a_cipher_refuses(make: Callable[[], cipher_module.Cipher]) -> None:
    """Data without room for a tag and nonces of another length open nothing, and read no memory."""
    cipher = make()
    encrypted = cipher.encrypt(b"data", b"a", b"n" * 24, b"k" * 32)
    for length in range(len(encrypted)):
        assert cipher.decrypt(encrypted[:length], b"a", b"n" * 24, b"k" * 32) is None
    for length in (0, 1, 12, 23, 25, 48):
        assert cipher.decrypt(encrypted, b"a", b"n" * length, b"k" * 32) is None
    assert cipher.decrypt(encrypted, b"a", b"n" * 24, b"l" * 32) is None
    assert cipher.decrypt(encrypted, b"b", b"n" * 24, b"k" * 32) is None
    assert cipher.decrypt(encrypted, b"a", b"n" * 24, b"k" * 32) == b"data"


@pytest.mark.parametrize("lacks", ["the module", "its names"])
def test_a_pynacl_without_sodium_of_its_own(monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    """Where PyNaCl's inner module is gone or changed, its documented functions do the same work."""
    fast = SealingKeyRing(OLD)
    assert "direct" in fast._encrypt.__qualname__
    replaced = None if lacks == "the module" else type(sys)("nacl._sodium")
    if replaced is not None:
        vars(replaced).update(ffi=object(), lib=object())
    monkeypatch.setitem(sys.modules, "nacl._sodium", replaced)
    slow = SealingKeyRing(OLD)
    assert slow._encrypt is bindings.crypto_aead_xchacha20poly1305_ietf_encrypt
    assert slow.open(fast.seal(b"data", ID, FIELD), ID, FIELD) == b"data"
    assert fast.open(slow.seal(b"data", ID, FIELD), ID, FIELD) == b"data"
    assert slow.open(fast.seal(b"data", ID, FIELD), ID, FIELD_2) is None


# Nonces and keys.

NONCES = textwrap.dedent("""
    import os, sys
    from concurrent.futures import ThreadPoolExecutor
    from sessiongate.sealing import SealingKeyRing

    ring = SealingKeyRing(sys.argv[1])
    seal = ring.seal
    seal(b"data", b"A" * 16, b":user")

    def nonces(count):
        return b"".join(seal(b"x", b"A" * 16, b":x")[8:32] for _ in range(count))

    ends = []
    for _ in range(3):
        read, write = os.pipe()
        if not os.fork():
            break
        ends.append(read)
        os.close(write)
    mine = len(ends) == 3
    with ThreadPoolExecutor(2) as pool:
        own = b"".join(pool.map(nonces, [13_000] * 2))
    if not mine:
        with open(write, "wb") as end:
            end.write(own)
        os._exit(0)
    for end in ends:
        own += open(end, "rb").read()
    print(len(own) // 24, len({own[at : at + 24] for at in range(0, len(own), 24)}))
""")


def test_no_nonce_comes_twice() -> None:
    """In 104,000 seals by threads of four processes, three of them forked, no nonce is repeated."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::ResourceWarning", "-c", NONCES, OLD],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("104000 104000\n", "")


def test_what_encrypts_is_made_for_that_alone() -> None:
    """The key that encrypts is neither the sealing key, nor its id, nor an HMAC of a token."""
    secret = bytes.fromhex(OLD)
    ring = SealingKeyRing(OLD)
    assert len(ring._key) == 32
    assert ring._key != secret
    assert not ring._key.startswith(bytes.fromhex(sealing_key_id(OLD)))
    # Were the same secret to sign as well, which a gate refuses, none of these would be that key.
    signing = SignKeyRing(secret)
    token, fingerprint = signing.sign("A" * 16)
    signatures = [
        bytes.fromhex(token[-64:]),
        *(hmac.digest(secret, text, "sha256") for text in (b"", ID, b"realm", b"sg payload seal")),
        hashlib.sha256(secret).digest(),
        hashlib.blake2b(secret, digest_size=32).digest(),
        hashlib.blake2b(key=secret, digest_size=32).digest(),
    ]
    for one in (*signatures, fingerprint, *signing.realms):
        assert one not in ring._key
    sealed = ring.seal(b"data", ID, FIELD)
    with pytest.raises(Exception, match="Decryption failed"):
        bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(
            sealed[32:], sealed[:8] + ID + FIELD, sealed[8:32], secret
        )


# Gates that seal.


def held(client: Redis, gate: SessionGate, token: str) -> dict[bytes, bytes]:
    """What Redis holds of a session."""
    return cast("dict[bytes, bytes]", client.hgetall(key_of(gate, token)))


def key_of(gate: SessionGate, token: str) -> str:
    return f"sg-session:{{{gate.verify(token)}}}"


def put(client: Redis, gate: SessionGate, token: str, field: bytes, stored: bytes) -> None:
    """Somebody who may write to Redis writes this."""
    client.hset(key_of(gate, token), cast("str", field), cast("str", stored))


def onlooker(backend: Backend, **options: Any) -> SessionGate:
    """A gate that blocks, on the same store, whichever kind the other one is."""
    cluster = backend.cluster
    client = RedisCluster("127.0.0.1", cluster.port, protocol=2) if cluster else backend.client()
    return SessionGate(client, sign_key=SIGN_KEY, **{"sealing_key": OLD, **options})


class Steps:
    """The channel of a gate, before each of whose commands something else happens."""

    def __init__(self, gate: SessionGate, event: Callable[[str, int], object]) -> None:
        inner: Any = getattr(gate, "awaited", gate)
        self._channel, self._event = inner._channel, event
        self.taken: list[str] = []
        inner._channel = self

    def ask(self, command: AnyCommand, due: float) -> Answer:
        self.taken.append(command.script.name)
        self._event(command.script.name, len(self.taken))
        answer: Answer = self._channel.ask(command, due)  # or what is to be awaited for it
        return answer

    def close(self) -> Any:
        return self._channel.close()


def started_apart(gate: SessionGate, payloads: dict[str, str]) -> str:
    """A session for 300 seconds, in another slot than Alice's."""
    return apart("alice", lambda: gate.start(300, payloads), gate.end)


@pytest.fixture
def client(backend: Backend) -> Redis:
    """A client to look into the backend with."""
    return backend.client()


@everywhere
@both_gates
def test_every_operation_works_sealed(backend: Backend, client: Redis) -> None:
    """What a gate that seals stored by any operation, any operation reads; Redis never sees it."""
    gate = backend.gate(sealing_key=OLD)
    data = b"John Doe \x00\xff"
    token = gate.start(300, {"user": data, "naïve": "žluť"}, idle_timeout=200)
    assert gate.pget(token, "user") == data
    gate.pset(token, "User Ä", "capitals")
    assert gate.pget(token, "User Ä") == gate.ppop(token, "User Ä") == b"capitals"
    gate.pset(token, "cart", "[]")
    gate.pset(token, "cart", b"[1]", ttl=100)
    gate.pset(token, "lang", "en", if_absent=True)
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "lang", "de", if_absent=True)
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "lang", "de", if_match="fr")
    gate.pset(token, "lang", "de", if_match="en")
    gate.pset(token, "cart", "[2]", if_match="[1]", ttl=100)
    gate.pset_many(token, {"a": "1", "b": "2", "c": "3"})
    gate.pset_many(token, {"a": "4"}, delete=["b"])
    gate.pdel(token, "c")
    everything = {"user": data, "naïve": "žluť".encode(), "cart": b"[2]", "lang": b"de", "a": b"4"}
    assert gate.pall(token) == everything
    assert gate.pget_many(token, ["cart", "nothing", "a"]) == {"cart": b"[2]", "a": b"4"}
    assert gate.pget(token, "naïve", as_=str) == "žluť"
    assert gate.info(token).payloads == {
        name: len(one) + OVERHEAD for name, one in everything.items()
    }
    key_id = sealing_key_id(OLD)
    payloads = {
        field: stored
        for field, stored in held(client, gate, token).items()
        if field[:1] in (b":", b";")
    }
    assert set(payloads) == {b":user", ":naïve".encode(), b";cart", b":lang", b":a"}
    for field, stored in payloads.items():
        sealed = stored[13:] if field[:1] == b";" else stored
        assert sealed[:3] == MARK
        assert sealed_by(sealed) == key_id
    for one in (data, "žluť".encode()):
        assert not any(one in stored for stored in payloads.values())
    assert gate.ppop(token, "user") == data
    assert gate.ppop(token, "cart") == b"[2]"
    with pytest.raises(PayloadNotFoundError):
        gate.pget(token, "user")


@everywhere
@both_gates
def test_a_gate_of_another_sealing_key(backend: Backend) -> None:
    """Without the key, or without sealing at all, nobody reads a payload; the error names it."""
    gate, other = backend.gate(sealing_key=OLD), backend.gate(sealing_key=NEW)
    token = gate.start(300, {"user": "John Doe"})
    calls: list[Callable[[], object]] = [
        lambda: other.pget(token, "user"),
        lambda: other.ppop(token, "user"),
        lambda: other.pget_many(token, ["user"]),
        lambda: other.pall(token),
        lambda: other.pset(token, "user", "x", if_match="John Doe"),
        lambda: other.renew(token, subject="alice"),
    ]
    for number, call in enumerate(calls):
        if number == 2:  # it was popped
            gate.pset(token, "user", "John Doe")
        with pytest.raises(UnsealError, match="'user' is not what this session sealed") as caught:
            call()
        assert caught.value.name == "user"
    assert b"John Doe" not in backend.gate().pget(token, "user")
    assert gate.pall(token) == {"user": b"John Doe"}


@everywhere
@both_gates
def test_what_is_moved_in_redis_opens_nowhere_else(backend: Backend, client: Redis) -> None:
    """Sealed data opens in no other session, name or kind of field; where it was put, it does."""
    gate = backend.gate(sealing_key=OLD)
    one, two = (gate.start(300, {"user": name, "cart": name}) for name in ("Ann", "Bob"))
    for token in (one, two):
        gate.pset(token, "code", "1", ttl=100)
    first = held(client, gate, one)
    moves = [
        (two, b":user", first[b":user"]),
        (one, b":cart", first[b":user"]),
        (two, b":cart", first[b":user"]),
        (two, b";code", first[b";code"]),
        (one, b":user", first[b";code"]),  # with the digits of its end
        (one, b":user", first[b";code"][13:]),
        (one, b";code", first[b";code"][:13] + first[b":user"]),
        (one, b";code", first[b";code"][:13] + first[b";code"]),
    ]
    for token, field, stored in moves:
        before = held(client, gate, token)
        put(client, gate, token, field, stored)
        name = field[1:].decode()
        with pytest.raises(UnsealError) as caught:
            gate.pget(token, name)
        assert caught.value.name == name
        with pytest.raises(UnsealError):
            gate.pall(token)
        put(client, gate, token, field, before[field])
    # What it stored itself under that name, and replaced later, can be put back.
    gate.pset_many(one, {"user": "Zoe", "cart": "Zoe"})
    gate.pset(one, "code", "2")
    assert gate.pget(one, "user") == b"Zoe"
    put(client, gate, one, b":user", first[b":user"])
    assert gate.pget(one, "user") == b"Ann"
    client.hdel(key_of(gate, one), ":code")
    put(client, gate, one, b";code", first[b";code"])
    assert gate.pget(one, "code") == b"1"
    put(client, gate, one, b":code", first[b";code"][13:])
    assert gate.pget(one, "code") == b"1"


@on_a_server
@both_gates
def test_sealed_data_without_the_end_that_its_field_has(backend: Backend, client: Redis) -> None:
    """Moved to the field of a payload with an end of its own, but without one, it opens nothing."""
    gate = backend.gate(sealing_key=OLD)
    token = gate.start(300, {"user": "1"})
    stored = held(client, gate, token)[b":user"]
    client.hdel(key_of(gate, token), ":user")
    put(client, gate, token, b";user", stored)
    with pytest.raises(PayloadNotFoundError):
        gate.pget(token, "user")
    assert gate.pall(token) == {}


@on_a_server
@one_gate
def test_the_limit_counts_the_data(backend: Backend) -> None:
    """A payload may hold 8,000,000 bytes as encoded: what sealing adds does not count."""
    gate = cast("SessionGate[Any, Any]", backend.gate(sealing_key=OLD, codec=JSONCodec()))
    token = gate.start(300)
    value = "x" * 7_999_998  # in quotes
    gate.pset(token, "big", value)
    assert gate.pget(token, "big") == value
    assert gate.info(token).payloads == {"big": 8_000_000 + OVERHEAD}
    for call in (gate.pset, lambda token, name, value: gate.pset_many(token, {name: value})):
        with pytest.raises(ArgumentError, match="1 to 8000000 bytes, not 8000001"):
            call(token, "big", value + "x")


@both_gates
def test_pincr_is_refused(flavour: Flavour) -> None:
    """A gate that seals has no counters: pincr says what to use, and sends nothing."""
    # Nobody listens there: to send would be a ConnectionError.
    unsent = flavour.gate(flavour.client(1, retry=flavour.no_retry), sealing_key=OLD)
    with pytest.raises(ArgumentError, match=r"has no pincr, .* use pget and pset\(.*if_match"):
        unsent.pincr(TOKEN, "visits")


@everywhere
@both_gates
@pytest.mark.parametrize("times", [1, 5])
def test_if_match_of_what_is_sealed_anew(backend: Backend, times: int) -> None:
    """What others store anew between looking and storing matches if it is the same, else not."""
    gate, other = backend.gate(sealing_key=OLD), onlooker(backend)
    token = gate.start(300, {"cart": "[]", "count": "0"})
    left = [times]

    def store(data: str) -> Callable[[str, int], object]:
        def event(script: str, _: int) -> None:
            if script == "pset_if" and left[0]:
                left[0] -= 1
                other.pset(token, "cart", data)

        return event

    steps = Steps(gate, store("[]"))
    gate.pset(token, "cart", "[1]", if_match="[]")
    assert left == [0]
    assert steps.taken.count("pset_if") >= times + 1
    assert other.pget(token, "cart") == b"[1]"
    left[0] = 1
    steps._event = store("[2]")
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "cart", "[3]", if_match="[1]")
    assert other.pget(token, "cart") == b"[2]"
    with pytest.raises(PayloadConflictError):
        gate.pset(token, "nothing", "x", if_match="x")


@on_a_server
@one_gate
def test_a_counter_of_many_threads(backend: Backend) -> None:
    """With if_match no update of sealed data is lost: it stands in for pincr."""
    gate = backend.gate(sealing_key=OLD)
    token = gate.start(300, {"count": "0"})

    def count(times: int) -> None:
        while times:
            seen = gate.pget(token, "count")
            try:
                gate.pset(token, "count", f"{int(seen) + 1}", if_match=seen)
            except PayloadConflictError:
                continue
            times -= 1

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(count, [15] * 4))
    assert gate.pget(token, "count") == b"60"


@everywhere
@both_gates
def test_a_codec_and_a_handle(backend: Backend) -> None:
    """Values of a codec and changes made through a handle are sealed and read back."""
    gate = cast("SessionGate[Any, Any]", onlooker(backend, codec=JSONCodec()))
    through = cast("Any", backend.gate(sealing_key=OLD, codec=JSONCodec()))
    token = gate.start(300, {"cart": ["book"], "name": "Ann"})
    assert through.pget(token, "cart") == ["book"]
    through.pset(token, "cart", ["pen"], if_match=["book"])
    through.pset(token, "cart", {"a": 1, "b": [None]}, if_match=["pen"])
    with gate.open(token) as session:
        session["cart"]["b"].append("late")
        del session["name"]
    with gate.open(token) as session:
        assert dict(session) == {"cart": {"a": 1, "b": [None, "late"]}}
    assert through.pall(token) == {"cart": {"a": 1, "b": [None, "late"]}}
    with gate.open(None) as session:
        session["new"] = 1
    assert session.token is not None
    assert through.pget(session.token, "new") == 1


# Renewal.


@everywhere
@both_gates
def test_payloads_survive_a_renewal(backend: Backend, client: Redis) -> None:
    """A renewal changes nothing of what is stored: old and new token read all payloads."""
    gate = backend.gate(sealing_key=OLD)
    token = gate.start(300, {"user": "John Doe"})
    gate.pset(token, "code", "1", ttl=100)
    before = held(client, gate, token)
    new = gate.renew(token)
    for one in (token, new, gate.renew(new)):
        assert gate.pall(one) == {"user": b"John Doe", "code": b"1"}
    after = held(client, gate, token)
    assert {field: after[field] for field in (b":user", b";code")} == {
        field: before[field] for field in (b":user", b";code")
    }


POLICIES: dict[str, dict[str, Any]] = {
    "any number": {},
    "evict": {"max_sessions": 2},
    "reject": {"max_sessions": 2, "on_overflow": "reject"},
}
policies = pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)


@everywhere
@both_gates
@policies
def test_signing_in_seals_anew(backend: Backend, client: Redis, options: dict[str, Any]) -> None:
    """The session moves with all payloads, sealed for its new id; a payload's own end stays."""
    gate = backend.gate(sealing_key=[NEW, OLD], **options)
    visitor = onlooker(backend).start(300, {"user": "John Doe", "cart": "[]"}, idle_timeout=100)
    onlooker(backend).pset(visitor, "code", "1", ttl=100)
    before, info, end = held(client, gate, visitor), gate.info(visitor), end_of(gate, visitor)
    token = gate.renew(visitor, subject="alice")
    everything = {"user": b"John Doe", "cart": b"[]", "code": b"1"}
    assert gate.pall(token) == everything
    after = held(client, gate, token)
    assert after[b";code"][:13] == before[b";code"][:13]
    for field in (b":user", b":cart", b";code"):
        assert sealed_by(after[field][13 if field[:1] == b";" else 0 :]) == sealing_key_id(NEW)
        # What was sealed for the id before the sign-in opens no more.
        put(client, gate, token, field, before[field])
        with pytest.raises(UnsealError):
            gate.pget(token, field[1:].decode())
        put(client, gate, token, field, after[field])
    moved = gate.info(token)
    assert (moved.subject, moved.generation, moved.idle_timeout) == ("alice", 1, 100)
    assert moved.created_at == info.created_at
    assert abs(end_of(gate, token) - end) < 0.1
    assert b"pending" not in after
    for call in (gate.pall, gate.touch, gate.renew):
        with pytest.raises(SessionNotFoundError):
            call(visitor)
    again = gate.renew(token, subject="alice")
    to_bob = gate.renew(again, subject="bob")
    assert gate.pall(to_bob) == everything
    assert [one.id for one in gate.sessions("bob")] == [gate.verify(to_bob)]
    assert gate.sessions("alice") == []
    assert (gate.end_all("alice"), gate.end_all("bob")) == (0, 1)


@everywhere
@both_gates
def test_signing_in_sealed_at_the_limit(backend: Backend, client: Redis) -> None:
    """At the limit the oldest goes, or the session that cannot sign in stays as it was."""
    gate = backend.gate(sealing_key=OLD, max_sessions=2)
    visitor = gate.start(300, {"user": "1"})
    gate.start(300, subject="alice")
    second = gate.start(300, subject="alice")
    token = gate.renew(visitor, subject="alice")
    assert {one.id for one in gate.sessions("alice")} == {gate.verify(token), gate.verify(second)}
    assert gate.pget(token, "user") == b"1"
    strict = backend.gate(sealing_key=OLD, max_sessions=2, on_overflow="reject")
    visitor = gate.start(300, {"user": "2"})
    before = held(client, gate, visitor)
    with pytest.raises(TooManySessionsError):
        strict.renew(visitor, subject="alice")
    assert held(client, gate, visitor) == before
    assert {one.id for one in gate.sessions("alice")} == {gate.verify(token), gate.verify(second)}
    gate.end(second)
    assert strict.pget(strict.renew(visitor, subject="alice"), "user") == b"2"


@everywhere
@both_gates
def test_signing_in_again_takes_no_room_but_its_own(backend: Backend) -> None:
    """Where the limit rejects, a session of the subject's is renewed to it all the same."""
    gate = backend.gate(sealing_key=OLD, max_sessions=1, on_overflow="reject")
    token = gate.start(300, {"user": "1"}, subject="alice")
    again = gate.renew(token, subject="alice")
    assert gate.pget(again, "user") == b"1"
    assert [one.id for one in gate.sessions("alice")] == [gate.verify(again)]


@everywhere
@both_gates
@policies
def test_writes_between_the_steps_of_a_sign_in(backend: Backend, options: dict[str, Any]) -> None:
    """What is stored, replaced and deleted by the old token while it signs in goes along."""
    gate, other = backend.gate(sealing_key=OLD, **options), onlooker(backend)
    token = started_apart(gate, {"cart": "[]", "count": "0", "gone": "x"})
    done: dict[str, bytes] = {"cart": b"[]", "count": b"0", "gone": b"x"}

    def write(_: str, step: int) -> None:
        if step > 6:
            return  # sealed anew are payloads that nobody changes in between
        number = b"%d" % step
        try:
            other.pset_many(token, {"count": number, f"step {step}": number}, delete=["gone"])
        except SessionNotFoundError:
            return  # it was taken
        done.pop("gone", None)
        done.update({"count": number, f"step {step}": number})
        other.pset(token, "code", number, ttl=100)
        done["code"] = number

    steps = Steps(gate, write)
    new = gate.renew(token, subject="alice")
    # What changed was read again, or imported where it came too late for that.
    assert ("import" in steps.taken) == (backend.cluster is not None)
    assert steps.taken.count("export") > 2
    assert len(done) > 4
    assert other.pall(new) == done
    assert [one.id for one in other.sessions("alice")] == [other.verify(new)]
    with pytest.raises(SessionNotFoundError):
        other.pall(token)


@everywhere
@both_gates
@policies
def test_a_session_that_cannot_be_sealed_anew(
    backend: Backend, client: Redis, options: dict[str, Any]
) -> None:
    """With one payload that does not open the sign-in is refused, and all is as it was."""
    gate = backend.gate(sealing_key=OLD, **options)
    token = gate.start(300, {"user": "1", "cart": "[]"})
    put(client, gate, token, b":cart", held(client, gate, token)[b":user"])
    before = held(client, gate, token), sorted(client.keys())
    with pytest.raises(UnsealError) as caught:
        gate.renew(token, subject="alice")
    assert caught.value.name == "cart"
    assert (held(client, gate, token), sorted(client.keys())) == before
    assert gate.pget(token, "user") == b"1"
    gate.pset(token, "cart", "[]")
    assert gate.pall(gate.renew(token, subject="alice")) == {"user": b"1", "cart": b"[]"}


@on_a_server
@both_gates
@policies
def test_a_session_that_is_sealed_anew_is_listed_once(
    backend: Backend, options: dict[str, Any]
) -> None:
    """While a session of the subject's gets another id it is listed once, under one of the two."""
    gate, other = backend.gate(sealing_key=OLD, **options), onlooker(backend, **options)
    token = gate.start(300, {"user": "1"}, subject="alice")
    listed: list[int] = []
    Steps(gate, lambda *_: listed.append(len(other.sessions("alice"))))
    gate.renew(token, subject="alice")
    assert set(listed) == {1}


@on_a_server
@both_gates
@policies
def test_what_cannot_be_opened_comes_between_the_steps(
    backend: Backend, client: Redis, options: dict[str, Any]
) -> None:
    """What a process with another key stores while a session signs in costs nobody the session."""
    gate = backend.gate(sealing_key=OLD, **options)
    ahead = onlooker(backend, sealing_key=[NEW, OLD])
    token = gate.start(300, {"user": "1"})

    def write(script: str, _: int) -> None:
        if script == "enroll":
            ahead.pset(token, "cart", "[]")

    Steps(gate, write)
    with pytest.raises(UnsealError) as caught:
        gate.renew(token, subject="alice")
    assert caught.value.name == "cart"
    assert ids_held(client) == {gate.verify(token)}
    assert ahead.pall(token) == {"user": b"1", "cart": b"[]"}


@on_the_cluster
@both_gates
@policies
def test_what_cannot_be_opened_comes_before_the_last_step(
    backend: Backend, options: dict[str, Any]
) -> None:
    """Between two slots, what is stored last and does not open goes along, and opens nowhere."""
    gate = backend.gate(sealing_key=OLD, **options)
    ahead = onlooker(backend, sealing_key=[NEW, OLD])
    token = started_apart(gate, {"user": "1", "lang": "en"})

    def write(script: str, _: int) -> None:
        # An unknown script is sent twice. The third that is exported is taken away.
        sent = [name for name, _ in itertools.groupby(steps.taken)]
        if script == "export" and sent.count("export") == 3:
            ahead.pset_many(token, {"cart": "[]", "lang": "de"})
            gate_of_old.pset(token, "lang", "fr")

    gate_of_old = onlooker(backend, sealing_key=OLD)
    steps = Steps(gate, write)
    new = gate.renew(token, subject="alice")
    assert "import" in steps.taken
    assert ahead.pget_many(new, ["user", "lang"]) == {"user": b"1", "lang": b"fr"}
    with pytest.raises(UnsealError) as caught:
        ahead.pall(new)
    assert caught.value.name == "cart"
    with pytest.raises(SessionNotFoundError):
        ahead.pall(token)


@on_a_server
@both_gates
def test_a_payload_that_is_over_hinders_no_sign_in(backend: Backend, client: Redis) -> None:
    """What no other operation sees any more is there for a sign-in no more than for them."""
    gate = backend.gate(sealing_key=OLD)
    token = gate.start(300, {"user": "1"})
    put(client, gate, token, b";code", b"1000000000000" + SEALED)
    assert gate.pall(token) == {"user": b"1"}
    assert gate.pall(gate.renew(token, subject="alice")) == {"user": b"1"}


@one_server
@both_gates
@pytest.mark.parametrize("limited", [False, True], ids=["any number", "one"])
@pytest.mark.parametrize("writes", [False, True], ids=["idle", "written"])
def test_replies_that_are_lost_while_a_session_signs_in(
    flavour: Flavour, server: Server, limited: bool, writes: bool
) -> None:
    """Whichever reply is lost, the session signs in, once, with all of its payloads."""
    look = onlooker(Backend(server, flavour))
    options: dict[str, Any] = {"max_sessions": 1} if limited else {}

    def walk(lost: int) -> list[str]:
        """Sign in without the reply of that step; all steps that it took."""
        look.end_all("alice")
        if limited:
            look.start(300, subject="alice")
        before: set[str] = set()
        with Proxy(server.port) as proxy:
            gate = flavour.gate(
                flavour.client(proxy.port, retry=flavour.no_retry), sealing_key=OLD, **options
            )
            old = gate.start(300, {"cart": "[]", "count": "0"})
            look.pset(old, "code", "1", ttl=100)

            def event(script: str, step: int) -> None:
                if writes and script == "enroll" and script not in before:
                    look.pset(old, "count", "1")
                before.add(script)
                proxy.cut_replies = int(step == lost)

            steps = Steps(gate, event)
            new = gate.renew(old, subject="alice")
            assert proxy.cut_replies == 0
        assert look.pall(new) == {"cart": b"[]", "code": b"1", "count": b"%d" % writes}
        assert [info.id for info in look.sessions("alice")] == [look.verify(new)]
        with pytest.raises(SessionNotFoundError):
            look.pall(old)
        return steps.taken

    lost = 1
    while len(taken := walk(lost)) >= lost:
        lost += 1
    assert lost > 2
    assert taken.count("export") == 1 + writes  # no reply was lost on the last walk
    assert set(taken) == {"export", "enroll"}


def ids_held(client: Redis) -> set[str]:
    """The ids of the sessions that Redis holds."""
    keys = client.scan_iter("sg-session:{*")
    return {key.decode()[-17:-1] for key in keys if client.hexists(key, "fp")}


# Other keys, and data that was never sealed.


@on_a_server
@both_gates
def test_a_key_is_replaced_without_losing_a_payload(backend: Backend) -> None:
    """From OLD by [OLD, NEW] and [NEW, OLD] to NEW, processes of neighbouring steps read all."""
    rings: list[Any] = [OLD, [OLD, NEW], [NEW, OLD], NEW]
    gates = [backend.gate(sealing_key=ring) for ring in rings]
    token = gates[0].start(300, {"user": "step 0", "kept": "old"})
    raw = backend.gate()
    for number, (before, after) in enumerate(itertools.pairwise(gates), 1):
        assert after.pget(token, "user") == b"step %d" % (number - 1)
        after.pset(token, "user", f"step {number}")
        assert before.pget(token, "user") == b"step %d" % number
        seals = OLD if number == 1 else NEW
        assert sealed_by(raw.pget(token, "user")) == sealing_key_id(seals)
    # What was not stored anew in all that time opens no more: then the old key is still needed.
    assert sealed_by(raw.pget(token, "kept")) == sealing_key_id(OLD)
    with pytest.raises(UnsealError):
        gates[3].pget(token, "kept")
    assert gates[2].pget(token, "kept") == b"old"
    signed_in = gates[2].renew(token, subject="alice")
    assert gates[3].pall(signed_in) == {"user": b"step 3", "kept": b"old"}


@everywhere
@both_gates
def test_the_change_over(backend: Backend, client: Redis) -> None:
    """With accept_unsealed what was there before is read, what is stored is sealed."""
    plain, strict = backend.gate(), backend.gate(sealing_key=OLD)
    gate = backend.gate(sealing_key=OLD, accept_unsealed=True)
    token = plain.start(300, {"user": "Ann", "cart": "[]", "lang": "en"})
    plain.pset(token, "code", "1", ttl=100)
    everything = {"user": b"Ann", "cart": b"[]", "lang": b"en", "code": b"1"}
    for call in (
        lambda: strict.pget(token, "user"),
        lambda: strict.ppop(token, "lang"),
        lambda: strict.pget_many(token, ["user"]),
        lambda: strict.pall(token),
        lambda: strict.pset(token, "user", "x", if_match="Ann"),
        lambda: strict.renew(token, subject="alice"),
    ):
        with pytest.raises(UnsealError):
            call()
    plain.pset(token, "lang", "en")  # it was popped
    assert gate.pall(token) == everything
    assert gate.pget(token, "user") == b"Ann"
    gate.pset(token, "user", "Zoe", if_match="Ann")
    gate.pset(token, "cart", "[1]")
    assert gate.ppop(token, "lang") == b"en"
    assert strict.pget_many(token, ["user", "cart"]) == {"user": b"Zoe", "cart": b"[1]"}
    assert sealed_by(held(client, gate, token)[b":user"]) == sealing_key_id(OLD)
    token = gate.renew(token, subject="alice")
    assert strict.pall(token) == {"user": b"Zoe", "cart": b"[1]", "code": b"1"}


@on_a_server
@both_gates
def test_tampering_during_the_change_over(backend: Backend, client: Redis) -> None:
    """A gate with accept_unsealed, too, refuses sealed data that was changed, moved or cut."""
    gate = backend.gate(sealing_key=OLD, accept_unsealed=True)
    token = gate.start(300, {"user": "John Doe", "cart": "[]"})
    sealed = held(client, gate, token)
    stored = sealed[b":user"]
    wrong = [sealed[b":cart"], *(stored[:length] for length in range(len(stored)))]
    wrong += [one for one in tampered(stored) if one.startswith(MARK)]
    for one in wrong:
        put(client, gate, token, b":user", one)
        with pytest.raises(UnsealError):
            gate.pget(token, "user")
    for end in (0, 1, 2, 3, 55):
        put(client, gate, token, b";user", b"9999999999999" + stored[:end])
        client.hdel(key_of(gate, token), ":user")
        with pytest.raises(UnsealError):
            gate.pall(token)
    put(client, gate, token, b";user", b"9999999999999" + stored)
    assert gate.pall(token) == {"user": b"John Doe", "cart": b"[]"}


@on_a_server
@both_gates
def test_a_change_over_that_rolls(backend: Backend) -> None:
    """Processes that open and do not seal yet share every payload with their neighbouring steps."""
    before = backend.gate()
    opens = backend.gate(sealing_key=[None, NEW], accept_unsealed=True)
    changing = backend.gate(sealing_key=NEW, accept_unsealed=True)
    after = backend.gate(sealing_key=NEW)
    token = before.start(300, {"user": "1", "cart": "[]"})
    opens.pset(token, "user", "2", if_match="1")
    assert before.pall(token) == {"user": b"2", "cart": b"[]"}
    changing.pset(token, "user", "3", if_match="2")
    assert opens.pall(token) == {"user": b"3", "cart": b"[]"}
    opens.pset(token, "user", "4", if_match="3")
    assert opens.pget(token, "user") == before.pget(token, "user") == b"4"
    with pytest.raises(UnsealError):
        after.pall(token)
    signed_in = changing.renew(opens.renew(token, subject="alice"), subject="alice")
    assert after.pall(signed_in) == opens.pall(signed_in) == {"user": b"4", "cart": b"[]"}
    assert opens.pall(opens.renew(signed_in, subject="alice")) == {"user": b"4", "cart": b"[]"}


@pytest.mark.parametrize(
    ("keys", "hint"),
    [
        ([None], "without keys"),
        ([None, OLD], "needs accept_unsealed=True"),
        ([OLD, None], "not NoneType"),
        ([None, None, OLD], "not NoneType"),
    ],
)
def test_where_none_may_stand(keys: list[str | None], hint: str) -> None:
    """None stands before keys and nowhere else, and unsealed data has to be accepted then."""
    with pytest.raises(ConfigurationError, match=hint):
        SessionGate.from_url("memory://", sign_key=SIGN_KEY, sealing_key=keys)


@on_a_server
@both_gates
def test_a_gate_that_opens_alone_unseals_nothing(backend: Backend, client: Redis) -> None:
    """What is sealed stays sealed in a sign-in there, and what looks sealed is sealed."""
    sealing = backend.gate(sealing_key=[OLD, NEW])
    opens = backend.gate(sealing_key=[None, NEW, OLD], accept_unsealed=True)
    token = sealing.start(300, {"card": "secret"})
    opens.pset(token, "lang", "en")
    signed_in = opens.renew(token, subject="alice")
    assert sealed_by(held(client, opens, signed_in)[b":card"]) == sealing_key_id(NEW)
    assert held(client, opens, signed_in)[b":lang"] == b"en"
    for data in (b"\xc1", b"\xc1S", b"\xc1SG", b"\xc1SG\x01 and more"):
        opens.pset(signed_in, "odd", data)
        assert opens.pget(signed_in, "odd") == sealing.pget(signed_in, "odd") == data
    opens.pset(signed_in, "plain", b"S\xc1G")
    assert held(client, opens, signed_in)[b":plain"] == b"S\xc1G"


@on_a_server
@both_gates
def test_a_session_copied_to_another_prefix(backend: Backend, client: Redis) -> None:
    """What was sealed under one prefix opens under no other, even with the same keys."""
    shop, admin = (
        backend.gate(sealing_key=OLD, prefix=f"sg-session:{name}") for name in ("shop", "admin")
    )
    token = shop.start(300, {"user": "alice"})
    session_id = shop.verify(token)
    stored = client.dump(f"sg-session:shop:{{{session_id}}}")
    assert stored
    client.restore(f"sg-session:admin:{{{session_id}}}", 300_000, stored)
    with pytest.raises(UnsealError):
        admin.pget(token, "user")
    assert shop.pget(token, "user") == b"alice"
