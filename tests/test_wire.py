"""Requests as bytes: whatever the arguments, the server reads exactly them."""

from hypothesis import given
from hypothesis import strategies as st

from sessiongate import scripts, wire
from sessiongate.command import Command

words = st.one_of(st.binary(max_size=40), st.integers(65_530, 65_540).map(lambda size: b"x" * size))


def read_request(request: bytes) -> list[bytes]:
    """The words of a request, read as a server does: by their lengths."""
    assert request[:1] == b"*"
    count, _, rest = request[1:].partition(b"\r\n")
    read: list[bytes] = []
    for _ in range(int(count)):
        assert rest[:1] == b"$"
        size, _, rest = rest[1:].partition(b"\r\n")
        word, end, rest = rest[: int(size)], rest[int(size) : int(size) + 2], rest[int(size) + 2 :]
        assert (len(word), end) == (int(size), b"\r\n")
        read.append(word)
    assert rest == b""
    return read


@given(
    st.lists(words, min_size=1, max_size=2),
    st.lists(words, max_size=8),
    st.booleans(),
    st.sampled_from([scripts.START, scripts.PGET]),
)
def test_a_request_holds_its_words(
    keys: list[bytes], args: list[bytes], by_source: bool, script: scripts.Script
) -> None:
    """Few or many arguments, short or long, by SHA-1 or source: the request is what was meant."""
    echo = wire.new_echo()
    command = Command(
        script, tuple(keys), tuple(args), lambda answer: answer, "A" * 16, by_source=by_source
    )
    call = [b"EVAL", script.source] if by_source else [b"EVALSHA", script.sha.encode()]
    request = b"".join(wire.pack(command, echo))
    assert read_request(request) == [*call, str(len(keys)).encode(), *keys, *args, echo]


@given(st.integers(1, 600))
def test_echoes_drawn_together_differ(count: int) -> None:
    """A batch of echoes has as many as asked for, all different and of one length."""
    echoes = wire.new_echoes(count)
    assert len(set(echoes)) == count
    assert {len(echo) for echo in echoes} == {wire.ECHO_BYTES}
