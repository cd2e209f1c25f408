"""What the operations on a session and its payloads do, on memory and on every server."""

import time
from datetime import timedelta

import pytest

from sessiongate import (
    BadSignatureError,
    IdTakenError,
    InvalidSessionError,
    MalformedTokenError,
    PayloadNotFoundError,
    SessionGate,
    SessionNotFoundError,
)

from .conftest import Backend, pool_of

# What a script does, which both gates send: see `conftest`.
OF_SCRIPTS = True

GONE = "v1.AAAAAAAAAAAAAAAA.0f21bb0a2b2a5a7a8c5a9f0a4c1a3d4b5e6f708192a3b4c5d6e7f8091a2b3c4d"


def ttl_ms(backend: Backend, gate: SessionGate, token: str) -> int:
    """What is left of the session's Redis key, in ms; -2 if there is none."""
    return int(backend.client().pttl(f"sg-session:{{{gate.verify(token)}}}"))


def keys(backend: Backend) -> set[bytes | str]:
    return set(backend.client().keys())


def test_start_returns_a_token_and_the_session_has_its_ttl(
    backend: Backend, gate: SessionGate
) -> None:
    """A session is one Redis key, named after the id in its token, with the ttl asked for."""
    token = gate.start(300)
    assert keys(backend) == {f"sg-session:{{{gate.verify(token)}}}".encode()}
    assert 290_000 < ttl_ms(backend, gate, token) <= 300_000


def test_start_stores_payloads(gate: SessionGate) -> None:
    """Payloads given to start are there from the beginning, text as UTF-8."""
    token = gate.start(300, {"user": b"\x00\xff", "cart": "žluť", "view": bytearray(b"x")})
    assert gate.pget(token, "user") == b"\x00\xff"
    assert gate.pget(token, "cart") == "žluť".encode()
    assert gate.pget(token, "view") == b"x"


def test_start_takes_any_number_of_payloads(gate: SessionGate) -> None:
    """Ten thousand payloads go in with one start, more than Lua could unpack at once."""
    token = gate.start(300, {f"p{n}": f"{n}" for n in range(10_000)})
    assert gate.pget(token, "p0") == b"0"
    assert gate.pget(token, "p9999") == b"9999"


def test_start_takes_a_timedelta(backend: Backend, gate: SessionGate) -> None:
    """A timedelta of whole seconds is a ttl."""
    token = gate.start(timedelta(minutes=5))
    assert 290_000 < ttl_ms(backend, gate, token) <= 300_000


def test_start_with_ttl_0_is_over_at_once(backend: Backend, gate: SessionGate) -> None:
    """A ttl of 0 returns a genuine token and leaves nothing in Redis."""
    token = gate.start(0, {"user": "x"})
    assert gate.verify(token)
    assert keys(backend) == set()
    with pytest.raises(SessionNotFoundError):
        gate.pget(token, "user")


def test_the_longest_ttl(backend: Backend, gate: SessionGate) -> None:
    """A hundred years are kept to the second, and do not overflow into no ttl at all."""
    token = gate.start(100 * 365 * 86_400)
    assert ttl_ms(backend, gate, token) > 100 * 365 * 86_400_000 - 5_000


def test_a_session_expires(backend: Backend, gate: SessionGate) -> None:
    """After its ttl a session is not found by any operation, and nothing of it is left."""
    token = gate.start(1, {"user": "x"})
    time.sleep(1.1)
    assert_gone(gate, token)
    assert keys(backend) == set()


def assert_gone(gate: SessionGate, token: str) -> None:
    for call in (
        lambda: gate.pget(token, "user"),
        lambda: gate.pset(token, "user", "y"),
        lambda: gate.pdel(token, "user"),
        lambda: gate.expire(token, 300),
        lambda: gate.expire(token, 0),
        lambda: gate.touch(token),
        lambda: gate.info(token),
        lambda: gate.renew(token),
        lambda: gate.renew(token, subject="alice"),
        lambda: gate.pset(token, "user", "y", ttl=300),
        lambda: gate.pset_many(token, {"user": "y"}),
        lambda: gate.pget_many(token, ["user"]),
        lambda: gate.pall(token),
        lambda: gate.ppop(token, "user"),
        lambda: gate.pincr(token, "user"),
        lambda: gate.end(token),
    ):
        with pytest.raises(SessionNotFoundError) as caught:
            call()
        assert caught.value.session_id == gate.verify(token)


def test_expire_moves_the_end(backend: Backend, gate: SessionGate) -> None:
    """After expire the session ends that many seconds from now, later or sooner than before."""
    token = gate.start(300, {"user": "x"})
    gate.expire(token, 600)
    assert 599_000 < ttl_ms(backend, gate, token) <= 600_000
    gate.expire(token, timedelta(seconds=100))
    assert 90_000 < ttl_ms(backend, gate, token) <= 100_000
    assert gate.pget(token, "user") == b"x"


def test_expire_0_ends_the_session(backend: Backend, gate: SessionGate) -> None:
    """With a ttl of 0 the session and its payloads are gone at once."""
    token = gate.start(300, {"user": "x"})
    gate.expire(token, 0)
    assert_gone(gate, token)
    assert keys(backend) == set()


def test_pset_replaces_and_leaves_the_ttl(backend: Backend, gate: SessionGate) -> None:
    """A payload is replaced whole, whatever its size was, and the end of the session stays."""
    token = gate.start(100)
    for data in (b"short", b"long" * 1000, b"s"):
        gate.pset(token, "user", data)
        assert gate.pget(token, "user") == data
    assert 90_000 < ttl_ms(backend, gate, token) <= 100_000


@pytest.mark.parametrize("size", [1, 64, 65, 65_536, 65_537, 8_000_000])
def test_data_of_every_size_comes_back(gate: SessionGate, size: int) -> None:
    """What goes in comes out, up to 8,000,000 bytes of any value."""
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    token = gate.start(300, {"first": data})
    gate.pset(token, "second", memoryview(data))
    assert gate.pget(token, "first") == data
    assert gate.pget(token, "second") == data


def test_names_do_not_collide_with_what_the_library_keeps(gate: SessionGate) -> None:
    """Any name is a payload's, those of the library's own fields and with every byte included."""
    token = gate.start(300)
    names = ["fp", ":fp", "", " ", "\0", "\r\n", "naïve", "n" * 200, "{x}"]
    for name in names[:2] + names[3:]:
        with pytest.raises(PayloadNotFoundError):
            gate.pget(token, name)
        gate.pset(token, name, f"data of {name}")
    for name in names[:2] + names[3:]:
        assert gate.pget(token, name) == f"data of {name}".encode()


def test_pget_of_a_missing_payload(gate: SessionGate) -> None:
    """A payload that is not there is told apart from a session that is not there."""
    token = gate.start(300, {"user": "x"})
    with pytest.raises(PayloadNotFoundError) as caught:
        gate.pget(token, "cart")
    assert caught.value.name == "cart"
    assert not isinstance(caught.value, InvalidSessionError)
    assert isinstance(caught.value, LookupError)


def test_pdel_deletes_one_payload(backend: Backend, gate: SessionGate) -> None:
    """One payload goes, the others and the end of the session stay."""
    token = gate.start(100, {"user": "x", "cart": "y"})
    gate.pdel(token, "user")
    with pytest.raises(PayloadNotFoundError):
        gate.pget(token, "user")
    assert gate.pget(token, "cart") == b"y"
    assert 90_000 < ttl_ms(backend, gate, token) <= 100_000


def test_pdel_of_a_missing_payload(gate: SessionGate) -> None:
    """Deleting what is not there is refused, whatever else the session holds."""
    token = gate.start(300)
    with pytest.raises(PayloadNotFoundError):
        gate.pdel(token, "user")
    gate.pset(token, "cart", "y")
    with pytest.raises(PayloadNotFoundError):
        gate.pdel(token, "user")
    gate.pdel(token, "cart")
    with pytest.raises(PayloadNotFoundError):
        gate.pdel(token, "cart")


def test_a_session_outlives_its_last_payload(backend: Backend, gate: SessionGate) -> None:
    """Deleting the only payload leaves the session, with its end."""
    token = gate.start(100, {"user": "x"})
    gate.pdel(token, "user")
    assert 90_000 < ttl_ms(backend, gate, token) <= 100_000
    gate.pset(token, "user", "z")


def test_end_removes_everything(backend: Backend, gate: SessionGate) -> None:
    """After end nothing of the session is left, and ending it again is refused."""
    token = gate.start(300, {"user": "x"})
    gate.end(token)
    assert keys(backend) == set()
    assert_gone(gate, token)


def test_sessions_do_not_touch_each_other(gate: SessionGate) -> None:
    """Each session has payloads of its own under the same name, and ends on its own."""
    first, second = gate.start(300, {"user": "1"}), gate.start(300, {"user": "2"})
    gate.pset(first, "user", "one")
    assert gate.pget(second, "user") == b"2"
    gate.end(second)
    assert gate.pget(first, "user") == b"one"


def test_a_late_pset_does_not_bring_a_session_back(backend: Backend, gate: SessionGate) -> None:
    """Storing a payload in a session that ended is refused and creates nothing."""
    token = gate.start(300)
    gate.end(token)
    with pytest.raises(SessionNotFoundError):
        gate.pset(token, "user", "x")
    assert keys(backend) == set()


def test_tokens_as_bytes(gate: SessionGate) -> None:
    """A token may come as bytes, as it does out of a header."""
    token = gate.start(300, {"user": "x"})
    assert gate.pget(token.encode(), "user") == b"x"
    assert gate.verify(token.encode()) == gate.verify(token)


def test_what_is_no_token_is_refused_by_every_operation(backend: Backend) -> None:
    """A malformed or forged token gets its error from all operations and reaches no server."""
    if backend.cluster:
        pytest.skip("the connections of a cluster client cannot be replaced")
    client = backend.gates_client()
    pool_of(client).connection_class = Untouchable
    gate = backend.flavour.gate(client, "k" * 32)
    for token, error in (
        ("", MalformedTokenError),
        ("v1", MalformedTokenError),
        (None, MalformedTokenError),
        (42, MalformedTokenError),
        (b"\xff" * 84, MalformedTokenError),
        (GONE, BadSignatureError),
        (GONE.encode(), BadSignatureError),
    ):
        for operation, args in (
            (gate.expire, (300,)),
            (gate.pset, ("user", "x")),
            (gate.pget, ("user",)),
            (gate.pdel, ("user",)),
            (gate.touch, ()),
            (gate.info, ()),
            (gate.renew, ()),
            (gate.pset_many, ({"user": "x"},)),
            (gate.pget_many, (["user"],)),
            (gate.pall, ()),
            (gate.ppop, ("user",)),
            (gate.pincr, ("user",)),
            (gate.end, ()),
            (gate.verify, ()),
        ):
            with pytest.raises(error):
                operation(token, *args)  # type: ignore[arg-type]  # what a type checker would refuse
        for forged in (
            lambda token=token: gate.renew(token, subject="alice"),
            lambda token=token: gate.pset(token, "user", "x", ttl=300),
        ):
            with pytest.raises(error):
                forged()


class Untouchable:
    """A connection that must not be used."""

    socket_timeout = None

    def __init__(self, **_: object) -> None: ...

    def __getattr__(self, name: str) -> None:
        if name not in ("can_read", "can_read_destructive"):
            pytest.fail(f"something was about to be sent: {name}")

    async def disconnect(self) -> None: ...


def test_two_applications_share_a_redis(backend: Backend) -> None:
    """Gates with different sign keys never see each other's sessions, even with the same id."""
    ours = backend.gate("the one " * 4)
    theirs = backend.gate("the other " * 4)
    token = ours.start(300, {"user": "x"})
    with pytest.raises(BadSignatureError):
        theirs.pget(token, "user")
    guessed = theirs._commands._ring.sign(ours.verify(token))[0]
    assert theirs.verify(guessed) == ours.verify(token)
    assert_gone(theirs, guessed)
    assert ours.pget(token, "user") == b"x"


def test_an_id_of_another_application_is_not_taken_over(backend: Backend) -> None:
    """A start that draws an id that another sign key's session has draws again."""
    ours = backend.gate("the one " * 4, random=Rigged(b"A", b"A", b"B"))
    theirs = backend.gate("the other " * 4, random=Rigged(b"A", b"C"))
    token = ours.start(300, {"user": "x"})
    other = theirs.start(300, {"user": "y"})
    assert ours.verify(token) != theirs.verify(other)
    assert ours.pget(token, "user") == b"x"
    assert theirs.pget(other, "user") == b"y"


def test_an_id_that_exists_is_drawn_again(backend: Backend) -> None:
    """A start that draws an id in use leaves that session as it is and takes another id."""
    gate = backend.gate(random=Rigged(b"A", b"A", b"A", b"B"))
    first = gate.start(300, {"user": "1"})
    second = gate.start(100, {"user": "2"})
    assert gate.verify(first) != gate.verify(second)
    assert gate.pget(first, "user") == b"1"
    assert ttl_ms(backend, gate, first) > 290_000


def test_a_random_source_that_repeats_itself_is_reported(backend: Backend) -> None:
    """When every id drawn is taken, start gives up and overwrites nothing."""
    gate = backend.gate(random=lambda n: b"A" * n)
    token = gate.start(300, {"user": "1"})
    with pytest.raises(IdTakenError):
        gate.start(300, {"user": "2"})
    assert gate.pget(token, "user") == b"1"


def test_a_ttl_of_0_on_an_id_that_exists(backend: Backend) -> None:
    """A start with ttl 0 that draws an id in use draws again as well."""
    gate = backend.gate(random=Rigged(b"A", b"A", b"B"))
    first = gate.start(300, {"user": "1"})
    assert gate.verify(gate.start(0)) != gate.verify(first)
    assert gate.pget(first, "user") == b"1"


class Rigged:
    """A random source that returns these letters, each for one id."""

    def __init__(self, *letters: bytes) -> None:
        self._letters = iter(letters)

    def __call__(self, size: int) -> bytes:
        return next(self._letters) * size


def test_a_retired_sign_key_still_opens(backend: Backend) -> None:
    """With a ring, new tokens are signed by the first key and old ones go on working."""
    old, new = "the old one " * 3, "the new one " * 3
    before = backend.gate(old).start(300, {"user": "x"})
    both = backend.gate([new, old])
    assert both.pget(before, "user") == b"x"
    after = both.start(300, {"user": "y"})
    assert backend.gate(new).pget(after, "user") == b"y"
    with pytest.raises(BadSignatureError):
        backend.gate(old).pget(after, "user")
    with pytest.raises(BadSignatureError):
        backend.gate(new).pget(before, "user")


def test_prefixes_keep_sessions_apart(backend: Backend) -> None:
    """Gates with different prefixes do not see each other's sessions, even with one sign key."""
    one, other = backend.gate(prefix="one"), backend.gate(prefix="other")
    token = one.start(300, {"user": "x"})
    assert_gone(other, token)
    assert keys(backend) == {f"one:{{{one.verify(token)}}}".encode()}
