"""Tokens: which are accepted, which are refused, and what a ring of sign keys does."""

import hashlib
import hmac
import json
import string
import warnings
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sessiongate import (
    BadSignatureError,
    ConfigurationError,
    InvalidTokenError,
    MalformedTokenError,
    SessionGate,
    WeakSignKeyWarning,
)
from sessiongate.tokens import SignKeyRing

VECTORS = json.loads((Path(__file__).parent / "vectors" / "module_tokens.json").read_text())[
    "tokens"
]
KEY = b"k" * 32
RING = SignKeyRing(KEY)
ID = "Ab0123456789zZ9a"
TOKEN, FINGERPRINT = RING.sign(ID)
SUCCESSOR, _ = RING.sign(ID, 42)
HEX = "0123456789abcdef"

ids = st.text(string.ascii_letters + string.digits, min_size=16, max_size=16)


def quiet_ring(*keys: bytes) -> SignKeyRing:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WeakSignKeyWarning)
        return SignKeyRing(list(keys))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["session_id"])
def test_tokens_of_the_module(vector: dict[str, str]) -> None:
    """Tokens that the original module issued are accepted, and made alike to the last byte."""
    ring = quiet_ring(bytes.fromhex(vector["sign_key_hex"]))
    assert ring.verify(vector["token"])[0] == vector["session_id"]
    assert ring.sign(vector["session_id"])[0] == vector["token"]


@given(ids, st.binary(min_size=32, max_size=200).filter(any))
@example(ID, b"k" * 64)
@example(ID, b"k" * 65)
def test_a_signature_is_the_hmac_of_the_id(session_id: str, key: bytes) -> None:
    """A token is `v1.<id>.` and the HMAC-SHA256 of the id; the fingerprint is of its signature."""
    ring = SignKeyRing(key)
    token, fingerprint = ring.sign(session_id)
    signature = hmac.digest(key, session_id.encode(), "sha256")
    assert token == f"v1.{session_id}.{signature.hex()}"
    assert fingerprint == hashlib.sha256(signature).digest()[:16]
    assert ring.verify(token) == (session_id, fingerprint, 0)
    assert ring.verify(token.encode()) == (session_id, fingerprint, 0)


@given(ids, st.integers(1, 10**18 - 1), st.binary(min_size=32, max_size=200).filter(any))
@example(ID, 1, b"k" * 64)
@example(ID, 10**18 - 1, b"k" * 65)
def test_the_signature_of_a_successor(session_id: str, generation: int, key: bytes) -> None:
    """A renewed token is `v2.<id>.<generation>.` and the HMAC-SHA256 of all before the last dot."""
    ring = SignKeyRing(key)
    token, fingerprint = ring.sign(session_id, generation)
    signature = hmac.digest(key, f"v2.{session_id}.{generation}".encode(), "sha256")
    assert token == f"v2.{session_id}.{generation}.{signature.hex()}"
    assert fingerprint == hashlib.sha256(signature).digest()[:16]
    assert ring.verify(token) == (session_id, fingerprint, generation)
    assert ring.verify(token.encode()) == (session_id, fingerprint, generation)


@pytest.mark.parametrize("token", [TOKEN, SUCCESSOR])
def test_every_change_of_one_character_is_refused(token: str) -> None:
    """No token that differs in one character, whatever character, is accepted."""
    alphabet = [chr(code) for code in range(256)] + ["\u0660", "\uff11", "\ud800", "\U0001d7d8"]
    for place, original in enumerate(token):
        for character in alphabet:
            if character != original:
                changed = token[:place] + character + token[place + 1 :]
                with pytest.raises(InvalidTokenError):
                    RING.verify(changed)


@pytest.mark.parametrize("token", [TOKEN, SUCCESSOR])
def test_every_character_less_or_more_is_refused(token: str) -> None:
    """No token that lacks one character or has one more, wherever, is accepted."""
    for place in range(len(token) + 1):
        if place < len(token):
            with pytest.raises(InvalidTokenError):
                RING.verify(token[:place] + token[place + 1 :])
        for character in "0A. \n\0\u0660":
            with pytest.raises(InvalidTokenError):
                RING.verify(token[:place] + character + token[place:])


@pytest.mark.parametrize("token", [TOKEN, SUCCESSOR])
def test_a_change_is_called_what_it_is(token: str) -> None:
    """A change within the spelling is a bad signature; one that leaves it is malformed."""
    for place, original in enumerate(token):
        if original == ".":
            continue
        other = "1" if original != "1" else "2"
        expected = MalformedTokenError if place < 3 else BadSignatureError
        with pytest.raises(expected):
            RING.verify(token[:place] + other + token[place + 1 :])


@pytest.mark.parametrize("token", [TOKEN, SUCCESSOR])
def test_every_other_length_is_malformed(token: str) -> None:
    """A token cut short or made longer is malformed at every length."""
    for length in range(len(token) + 20):
        if length != len(token):
            with pytest.raises(MalformedTokenError):
                RING.verify((token + "0" * 20)[:length])


@pytest.mark.parametrize(
    "token",
    [
        TOKEN + "\n",
        "\n" + TOKEN,
        TOKEN + "\0",
        TOKEN + " ",
        " " + TOKEN,
        TOKEN.upper(),
        TOKEN.replace("v1", "V1"),
        TOKEN.replace("v1", "v2"),
        TOKEN.replace("v1", "v\u0661"),
        TOKEN.replace(".", "?"),
        TOKEN.replace(".", "\uff0e"),
        TOKEN[:20] + TOKEN[20:].upper(),
        f"v1.{ID[:-1]}\u00e9.{TOKEN[20:]}",
        f"v1..{TOKEN[20:]}",
        f"v1.{ID}.",
        f"{ID}.{TOKEN[20:]}",
        "v1." * 28,
        "",
        "\0" * 84,
        "x" * 10_000_000,
    ],
    ids=lambda token: repr(token[:30]),
)
def test_one_spelling_only(token: str) -> None:
    """Other case, white space, NUL, newlines, dots and digits of Unicode: all malformed."""
    with pytest.raises(MalformedTokenError):
        RING.verify(token)
    with pytest.raises(MalformedTokenError):
        RING.verify(token.encode())


@pytest.mark.parametrize(
    "generation",
    [
        "0",
        "00",
        "042",
        "0042",
        "+42",
        "-42",
        " 42",
        "42 ",
        "42\n",
        "4_2",
        "42.0",
        "4e1",
        "0x2a",
        "",
        "\u0664\u0662",
        "\uff14\uff12",
        "4\u0662",
        "4\uff12",
        "4\u00b2",
        "9" * 19,
        "1" + "0" * 18,
        "9" * 5_000,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_one_spelling_of_a_generation(generation: str) -> None:
    """Zero, leading zeros, signs, white space, other digits and over 18 of them: all malformed."""
    message = f"v2.{ID}.{generation}".encode()
    signed = f"v2.{ID}.{generation}.{hmac.digest(KEY, message, 'sha256').hex()}"
    # With the signature of 42 as well: some are 42, for who reads numbers generously.
    for token in (signed, SUCCESSOR.replace(".42.", f".{generation}.")):
        with pytest.raises(MalformedTokenError):
            RING.verify(token)
        with pytest.raises(MalformedTokenError):
            RING.verify(token.encode())


@pytest.mark.parametrize(
    "token",
    [
        SUCCESSOR + "\n",
        "\n" + SUCCESSOR,
        SUCCESSOR + "\0",
        SUCCESSOR.upper(),
        SUCCESSOR.replace("v2", "V2"),
        SUCCESSOR.replace("v2", "v1"),
        SUCCESSOR.replace("v2", "v3"),
        SUCCESSOR.replace("v2", "v\u0662"),
        SUCCESSOR.replace(".", "?"),
        SUCCESSOR.replace(".", "\uff0e"),
        SUCCESSOR.replace(".42", ""),
        SUCCESSOR.replace(".42", ".4.2"),
        SUCCESSOR[:-64] + SUCCESSOR[-64:].upper(),
        SUCCESSOR.replace(ID, ID[:-1] + "\u00e9"),
        SUCCESSOR.replace(ID, ""),
        SUCCESSOR[:-64],
    ],
    ids=lambda token: repr(token[:30]),
)
def test_one_spelling_of_a_successor(token: str) -> None:
    """Of a renewed token too other case, newlines, NUL, dots and Unicode are malformed."""
    with pytest.raises(MalformedTokenError):
        RING.verify(token)
    with pytest.raises(MalformedTokenError):
        RING.verify(token.encode())


def test_versions_and_generations_do_not_share_signatures() -> None:
    """The signature of one generation is none of another, nor of the session's first token."""
    signatures = [RING.sign(ID, generation)[0][-64:] for generation in range(12)]
    assert len(set(signatures)) == 12
    for generation, signature in enumerate(signatures):
        for other in range(1, 12):
            if other != generation:
                with pytest.raises(BadSignatureError):
                    RING.verify(f"v2.{ID}.{other}.{signature}")
        if generation:
            with pytest.raises(BadSignatureError):
                RING.verify(f"v1.{ID}.{signature}")


@given(
    st.one_of(
        st.none(),
        st.integers(),
        st.floats(),
        st.lists(st.text()),
        st.just(object()),
        st.just(bytearray(TOKEN.encode())),
    )
)
def test_what_is_neither_str_nor_bytes_is_malformed(token: object) -> None:
    """Anything else than a str or bytes is refused as malformed, and is no crash."""
    with pytest.raises(MalformedTokenError):
        RING.verify(token)  # type: ignore[arg-type]  # what a type checker would refuse


@given(
    st.one_of(
        st.text(),
        st.text(alphabet="v1." + HEX, min_size=80, max_size=90),
        st.binary(),
        st.from_regex(r"v2\.[A-Za-z0-9]{16}\.[0-9]{1,20}\.[0-9a-f]{64}", fullmatch=True),
    )
)
@example("v1." + "A" * 16 + "." + "0" * 64)
@example("v2." + "A" * 16 + ".1." + "0" * 64)
def test_nothing_made_up_is_accepted(token: str | bytes) -> None:
    """No text or bytes that were not signed are accepted, and all are refused as tokens."""
    with pytest.raises(InvalidTokenError):
        RING.verify(token)


@given(ids)
def test_another_key_does_not_verify(session_id: str) -> None:
    """A token of another sign key is a bad signature."""
    token, _ = SignKeyRing(b"x" * 32).sign(session_id)
    with pytest.raises(BadSignatureError):
        RING.verify(token)


def test_a_ring_signs_with_its_first_key_and_verifies_with_all() -> None:
    """The first key of a ring signs; tokens of every key in it are accepted."""
    old, new = SignKeyRing(b"old " * 8), SignKeyRing(b"new " * 8)
    ring = SignKeyRing([b"new " * 8, b"old " * 8])
    assert ring.sign(ID) == new.sign(ID)
    assert ring.verify(old.sign(ID)[0]) == old.verify(old.sign(ID)[0])
    assert ring.sign(ID, 42) == new.sign(ID, 42)
    assert ring.verify(old.sign(ID, 42)[0]) == old.verify(old.sign(ID, 42)[0])


def test_a_ring_finds_the_token_of_a_fingerprint() -> None:
    """Whichever key of the ring signed it, a token is found by its fingerprint, and no other."""
    ring = SignKeyRing([b"new " * 8, b"old " * 8])
    for key in (b"new " * 8, b"old " * 8):
        token, fingerprint = SignKeyRing(key).sign(ID, 42)
        assert ring.token_of(fingerprint, ID, 42) == token
        for session_id, generation in ((ID, 41), (ID[::-1], 42)):
            with pytest.raises(BadSignatureError):
                ring.token_of(fingerprint, session_id, generation)
    with pytest.raises(BadSignatureError):
        ring.token_of(RING.sign(ID, 42)[1], ID, 42)


def test_realms_tell_sign_keys_apart() -> None:
    """Each key of a ring has a realm of 8 bytes, the same in every ring that it is in."""
    ring = SignKeyRing([b"new " * 8, b"old " * 8])
    assert ring.realms == (*SignKeyRing(b"new " * 8).realms, *SignKeyRing(b"old " * 8).realms)
    assert len(set(ring.realms)) == 2
    assert {len(realm) for realm in ring.realms} == {8}


def test_text_and_bytes_are_the_same_key() -> None:
    """A sign key given as str is its UTF-8."""
    assert SignKeyRing("žluť" * 10).sign(ID) == SignKeyRing(("žluť" * 10).encode()).sign(ID)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("", "a sign key is empty: is it missing from your settings?"),
        (b"", "a sign key is empty: is it missing from your settings?"),
        ([""], "a sign key is empty: is it missing from your settings?"),
        ([KEY, b""], "a sign key is empty: is it missing from your settings?"),
        (None, "newest first, not NoneType: is it missing from your settings?"),
        ([None], "a str or bytes, not NoneType: is it missing from your settings?"),
        ([KEY, None], "a str or bytes, not NoneType: is it missing from your settings?"),
        ([], "an empty list: give at least one sign key"),
        ((), "an empty list: give at least one sign key"),
        (7, "newest first, not int"),
        ({KEY}, "newest first, not set"),
        ({"new": KEY}, "newest first, not dict"),
        pytest.param((key for key in [KEY]), "newest first, not generator", id="generator"),
        (bytearray(32), "newest first, not bytearray"),
        ([7], "a str or bytes, not int"),
        ([bytearray(32)], "a str or bytes, not bytearray"),
        ("\ud800" * 32, "valid text or bytes: this str holds a lone surrogate"),
        ([KEY, "\ud800"], "valid text or bytes: this str holds a lone surrogate"),
    ],
    ids=repr,
)
def test_what_is_no_sign_key(key: object, told: str) -> None:
    """An empty, missing or ill-typed sign key is refused when the gate is made, and told apart."""
    with pytest.raises(ConfigurationError) as caught:
        SignKeyRing(key)  # type: ignore[arg-type]  # what a type checker would refuse
    assert str(caught.value).endswith(told)
    assert caught.value.__context__ is None


def test_the_causes_of_a_bad_signature() -> None:
    """The error of a bad signature names its causes: forgery, retirement, and a key a process."""
    assert str(BadSignatureError()) == (
        "no sign key of this gate signed the token: it is forged, its sign key was retired, "
        "or another process signs with another key"
    )


def test_a_short_sign_key_warns_at_the_caller() -> None:
    """A sign key under 32 bytes works, and warns where it is given, without naming it."""
    with pytest.warns(WeakSignKeyWarning, match="31 bytes") as caught:
        SessionGate.from_url("memory://", sign_key="s" * 31)
    assert caught[0].filename == __file__
    assert "s" * 31 not in str(caught[0].message)
