"""What is refused before anything is sent: ttl, names, data, prefixes, clients and URLs."""

import array
import enum
import math
import pickle
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from inspect import signature
from types import MappingProxyType
from urllib.parse import urlencode

import pytest
import redis
from fakeredis import FakeAsyncRedis, FakeRedis
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nacl.utils import random as system_random

import sessiongate
from sessiongate import (
    ArgumentError,
    AsyncSessionGate,
    BadSignatureError,
    ConfigurationError,
    EventLoopError,
    GateClosedError,
    HandleError,
    IdTakenError,
    MalformedTokenError,
    PayloadConflictError,
    PayloadDecodeError,
    PayloadNotFoundError,
    PayloadOverflowError,
    PayloadTypeError,
    SessionGate,
    SessionGateError,
    SessionNotFoundError,
    TooManySessionsError,
    UnderReplicatedError,
    UnsealError,
    WeakSignKeyWarning,
)
from sessiongate.arguments import data_arg, field_arg, payloads_arg, ttl_arg
from sessiongate.commands import Commands
from sessiongate.connect import async_client_from_url, client_from_url
from sessiongate.keyspace import Keyspace
from sessiongate.lines import Lines
from sessiongate.tokens import SignKeyRing
from sessiongate.values import Values

from .conftest import SIGN_KEY, Flavour
from .servers import NO_RETRY

KEY = "k" * 32
CENTURY = 100 * 365 * 86_400
FROM_URL: tuple[Callable[[str], object], ...] = (client_from_url, async_client_from_url)


@pytest.fixture
def gate() -> SessionGate:
    """A gate that would fail to send anything: nobody listens there."""
    return SessionGate(redis.Redis(port=1, retry=NO_RETRY), sign_key=KEY)


@pytest.fixture
def token() -> str:
    """A genuine token for `gate`."""
    return SessionGate.from_url("memory://", sign_key=KEY).start(300)


class Level(enum.IntEnum):
    """An int under another name."""

    FIVE = 5


@pytest.mark.parametrize(
    "ttl",
    [
        -1,
        CENTURY + 1,
        2**63,
        10**30,
        True,
        False,
        1.0,
        0.5,
        float("nan"),
        "300",
        b"300",
        None,
        [],
        timedelta(seconds=-1),
        timedelta(milliseconds=1500),
        timedelta(days=36_501),
        timedelta.max,
    ],
    ids=repr,
)
def test_a_ttl_out_of_its_limits(gate: SessionGate, token: str, ttl: object) -> None:
    """A ttl that is negative, no whole number, a bool or over 100 years is refused."""
    with pytest.raises(ArgumentError, match="ttl"):
        gate.start(ttl)  # type: ignore[arg-type]  # what a type checker would refuse
    with pytest.raises(ArgumentError, match="ttl"):
        gate.expire(token, ttl)  # type: ignore[arg-type]  # what a type checker would refuse


@pytest.mark.parametrize(
    ("ttl", "told"),
    [
        (-1, "not -1"),
        (timedelta(days=36_501), "not 3153686400"),
        (1 - 10**20, "not -99999999999999999999"),
        (10**20, "not a number of over 20 digits"),
        (-(10**5_000), "not a number of over 20 digits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_ttl_out_of_its_limits_is_told(gate: SessionGate, ttl: int, told: str) -> None:
    """The error for a ttl out of its limits ends in that ttl, unless it is long."""
    with pytest.raises(ArgumentError, match=rf"100 years\), {told}$"):
        gate.start(ttl)


@pytest.mark.parametrize("name", ["", "n" * 201, "é" * 101, "\ud800", b"user", None, 7], ids=repr)
def test_a_name_out_of_its_limits(gate: SessionGate, token: str, name: object) -> None:
    """A payload's name of 0 or over 200 bytes of UTF-8, or that is no text, is refused."""
    for call in (
        lambda: gate.start(300, {name: "x"}),  # type: ignore[dict-item]  # what a type checker would refuse
        lambda: gate.pset(token, name, "x"),  # type: ignore[arg-type]  # likewise
        lambda: gate.pget(token, name),  # type: ignore[call-overload]  # likewise
        lambda: gate.pdel(token, name),  # type: ignore[arg-type]  # likewise
    ):
        with pytest.raises(ArgumentError, match="name"):
            call()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        "",
        bytearray(),
        b"x" * 8_000_001,
        "é" * 4_000_001,
        "\ud800",
        None,
        7,
        1.5,
        ["x"],
        {"x": 1},
    ],
    ids=lambda data: repr(data)[:20],
)
def test_data_out_of_its_limits(gate: SessionGate, token: str, data: object) -> None:
    """Data of 0 or over 8,000,000 bytes, or that is neither bytes-like nor text, is refused."""
    with pytest.raises(ArgumentError, match="data of payload 'user'"):
        gate.pset(token, "user", data)  # type: ignore[arg-type]  # what a type checker would refuse
    with pytest.raises(ArgumentError, match="data of payload 'user'"):
        gate.start(300, {"fine": "x", "user": data})  # type: ignore[dict-item]  # likewise


def test_data_that_needs_a_codec() -> None:
    """The error for an object as data names its payload and type, and says how to go on."""
    with pytest.raises(ArgumentError) as caught:
        data_arg({"x": 1}, "user")  # type: ignore[arg-type]  # what a type checker would refuse
    assert str(caught.value) == (
        "data of payload 'user' is bytes-like or a str, not dict: "
        "for other types, give the gate a codec, as in codec=JSONCodec()"
    )


@pytest.mark.parametrize(
    "nothing",
    [b"", "", bytearray(), memoryview(b"")],
    ids=["bytes", "str", "bytearray", "memoryview"],
)
def test_data_of_nothing(nothing: bytes) -> None:
    """The error for data of 0 bytes says what to do for nothing."""
    with pytest.raises(ArgumentError, match=r" bytes, not 0: for nothing, use pdel$"):
        data_arg(nothing, "user")
    with pytest.raises(ArgumentError, match=r" bytes, not 8000001$"):
        data_arg(b"x" * 8_000_001, "user")


@pytest.mark.parametrize("payloads", [[], (), "", b"", set(), 0, False, [("user", "x")], "user"])
def test_what_is_no_mapping_of_payloads(gate: SessionGate, payloads: object) -> None:
    """Payloads that are no mapping are refused with their type, empty ones too."""
    message = f"^payloads is a mapping of names to data, not {type(payloads).__name__}$"
    with pytest.raises(ArgumentError, match=message):
        gate.start(300, payloads)  # type: ignore[arg-type]  # what a type checker would refuse


@given(st.dictionaries(st.text(min_size=1, max_size=50), st.binary(min_size=1)))
def test_what_counts_as_payloads(payloads: dict[str, bytes]) -> None:
    """Any mapping is payloads, in its order; an empty one is none."""
    fields = [part for name, data in payloads.items() for part in (field_arg(name), data)]
    asked = [payloads_arg(each, data_arg) for each in (payloads, MappingProxyType(payloads))]
    assert asked == [tuple(fields)] * 2
    assert payloads_arg({}, data_arg) == ()


def test_refused_text_is_in_no_error() -> None:
    """Data that cannot be encoded is neither in the error nor in what led to it."""
    gate = SessionGate.from_url("memory://", sign_key=KEY)
    with pytest.raises(ArgumentError) as caught:
        gate.pset(gate.start(300), "user", "secret\ud800")
    assert caught.value.__context__ is None
    assert "secret" not in str(caught.value)


def test_the_token_is_judged_first(gate: SessionGate) -> None:
    """With a forged token and a bad argument, it is the token that is reported."""
    with pytest.raises(sessiongate.MalformedTokenError):
        gate.pset("forged", "", b"")


@pytest.mark.parametrize(
    "data",
    [
        b"ab",
        bytearray(b"ab"),
        pytest.param(memoryview(b"ab"), id="memoryview"),
        pytest.param(memoryview(b"a-b-")[::2], id="memoryview with gaps"),
        array.array("B", b"ab"),
        "ab",
    ],
    ids=repr,
)
def test_what_counts_as_data(data: bytes) -> None:
    """Bytes, whatever else has a buffer, and text are data."""
    gate = SessionGate.from_url("memory://", sign_key=KEY)
    assert gate.pget(gate.start(300, {"user": data}), "user") == b"ab"


@given(st.integers(0, CENTURY))
def test_a_ttl_in_its_limits(ttl: int) -> None:
    """Every whole number of seconds up to 100 years is sent in decimal, a timedelta alike."""
    assert ttl_arg(ttl) == str(ttl).encode()
    assert ttl_arg(timedelta(seconds=ttl)) == str(ttl).encode()


def test_an_int_under_another_name_is_a_ttl() -> None:
    """An IntEnum is sent as its number."""
    assert ttl_arg(Level.FIVE) == b"5"


@pytest.mark.parametrize(
    "prefix",
    ["", "a{b", "a}b", "{app}", "a:subject", "p" * 201, "\ud800", b"sg", None, 7],
    ids=repr,
)
def test_a_prefix_that_cannot_be_used(prefix: object) -> None:
    """A prefix is 1 to 200 bytes of text without braces, which would move the hash tag."""
    with pytest.raises(ConfigurationError, match="prefix"):
        SessionGate(FakeRedis(), sign_key=KEY, prefix=prefix)  # type: ignore[arg-type]  # what a type checker would refuse


def test_braces_in_a_prefix() -> None:
    """The error for braces in a prefix names them, and why not."""
    for prefix in ("a{b}", "{", "}"):
        with pytest.raises(ConfigurationError) as caught:
            SessionGate(FakeRedis(), sign_key=KEY, prefix=prefix)
        assert str(caught.value) == "prefix may hold no { or }: Redis Cluster gives them a meaning"


def test_a_short_sign_key_warns_with_how_to_make_one() -> None:
    """The warning for a short sign key says how to make one."""
    with pytest.warns(WeakSignKeyWarning) as caught:
        SessionGate.from_url("memory://", sign_key="k")
    assert str(caught[0].message) == (
        "a sign key of 1 bytes can be guessed: make one with secrets.token_hex(32)"
    )


def test_rejecting_needs_a_limit(flavour: Flavour) -> None:
    """To reject sessions over a limit without a limit is refused; to evict them is the default."""
    with pytest.raises(ConfigurationError) as caught:
        flavour.gate_from_url("memory://", on_overflow="reject")
    assert str(caught.value) == (
        "on_overflow needs max_sessions: how many sessions a subject may have"
    )
    flavour.gate_from_url("memory://", on_overflow="reject", max_sessions=1)
    flavour.gate_from_url("memory://", on_overflow="evict")


def test_a_client_that_cannot_be_used() -> None:
    """What is no synchronous redis-py client is refused when the gate is made."""
    for client in (None, "redis://localhost", redis.asyncio.Redis(), redis.Redis().pipeline()):
        with pytest.raises(ConfigurationError, match="client"):
            SessionGate(client, sign_key=KEY)  # type: ignore[arg-type]  # what a type checker would refuse


@pytest.mark.parametrize(
    ("gate", "client", "told"),
    [
        (
            SessionGate,
            "redis://:hunter2@localhost",
            "redis.RedisCluster, not builtins.str: for a URL use SessionGate.from_url(url, ...)",
        ),
        (
            AsyncSessionGate,
            "redis://:hunter2@localhost",
            "not builtins.str: for a URL use AsyncSessionGate.from_url(url, ...)",
        ),
        (SessionGate, FakeAsyncRedis(), "FakeRedis: use AsyncSessionGate for it"),
        (
            SessionGate,
            redis.asyncio.RedisCluster("localhost"),
            "not redis.asyncio.cluster.RedisCluster: use AsyncSessionGate for it",
        ),
        (AsyncSessionGate, redis.Redis(), "not redis.client.Redis: use SessionGate for it"),
        (SessionGate, redis.Redis().pipeline(), "give it the client that made this pipeline"),
        (
            AsyncSessionGate,
            redis.asyncio.Redis().pipeline(),
            "give it the client that made this pipeline",
        ),
        (SessionGate, 7, "not builtins.int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_takes_another_client(gate: Callable[..., object], client: object, told: str) -> None:
    """What is no client of a gate's kind is refused with what does take it, and not shown."""
    with pytest.raises(ConfigurationError) as caught:
        gate(client, sign_key=KEY)
    assert str(caught.value).endswith(told)
    assert "hunter2" not in str(caught.value)


def refusal(make: Callable[[str], object], url: object) -> str:
    """The error for a URL that must be refused, once it is seen that nothing stands behind it."""
    with pytest.raises(ConfigurationError) as caught:
        make(url)  # type: ignore[arg-type]  # what a type checker would refuse
    assert caught.value.__context__ is None
    return str(caught.value)


@pytest.mark.parametrize("make", FROM_URL)
@pytest.mark.parametrize(
    ("told", "urls"),
    {
        "url is a str, not NoneType: is it missing from your settings?": [None],
        "url is a str, not int": [7],
        "url is a str, not bytes": [b"redis://localhost"],
        "url is a str, not Redis": [redis.Redis(), redis.asyncio.Redis()],
        "url is empty: is it missing from your settings?": [""],
        "this one holds a lone surrogate": ["redis://:hunter2\udcff@localhost"],
        "not a URL that a gate understands: give redis://": [
            "localhost",
            "localhost:6379",
            "http://localhost",
            "redis:/localhost",
            " redis://localhost",
            "memory",
            "memory://x",
        ],
        "used: the host cannot be read: write [::1]": [
            "redis://:hunter2@a..b/0",
            "redis://:hunter2@[::1/0",
            "redis+sentinel://:hunter2@a,[::1,::2]/mymaster",
            "redis+cluster://:hunter2@a,[::1",
        ],
        "used: the port is no number: is there a `#`, `/`, `?` or `@` in the password? Write %23, "
        "%2F, %3F, %40": [
            "redis://:hunter2@localhost:port/0",
            "redis://:hunter2@a:b:6379",
            "redis://:hunter2@[::1]:x",
            "redis://:hunter2/x@localhost/0",
            "redis://:hunter2?x=1@localhost/0",
            "redis://:hunter2#x@localhost/0",
            "redis+sentinel://:hunter2@a:26379,b:x/mymaster",
            "redis+cluster://:hunter2@a:7000,b:x",
        ],
        "used: the port is none of 1 to 65535": [
            "redis://:hunter2@localhost:0",
            "redis://:hunter2@localhost:65536",
            "redis+cluster://:hunter2@a:7000,b:70000",
        ],
        "used: an `@` stands behind the host: is there a `#`, `/`, `?` or `@` in the password?": [
            "redis://:123456?hunter2=1@localhost",
            "redis://:1234?hunter2=1@localhost",
            "redis://:1234?a#hunter2@localhost",
            "redis://:1234/hunter2@localhost",
            "redis://user?hunter2=1@localhost",
            "redis+sentinel://:1?hunter2=1@localhost/mymaster",
            "redis+sentinel://user/hunter2@localhost/mymaster",
            "redis+cluster://:1/hunter2@localhost",
        ],
        "used: a `#` may not stand in a URL: write %23": ["redis://:hunter2@localhost/0#1"],
        "used: the database, behind the last `/`, is a number": [
            "redis://:hunter2@localhost/zero",
            "redis://:hunter2@localhost/-1",
            "redis://:hunter2@localhost/1/2",
            "redis+sentinel://:hunter2@localhost/mymaster/zero",
        ],
        "used: `timeout` is an argument of from_url, not an option of the URL": [
            "redis://:hunter2@localhost/0?timeout=3",
            "redis+sentinel://localhost/mymaster?timeout=hunter2",
        ],
        "used: `sign_key` is an argument of from_url, not an option of the URL": [
            "redis+cluster://localhost?sign_key=hunter2",
        ],
        "used: option `sock_timeout` is none of redis-py's": [
            "redis://localhost?db=0&sock_timeout=hunter2",
            "unix://:hunter2@/run/redis.sock?sock_timeout=1",
            "redis://:hunter2%3Fnonsense@localhost/0?sock_timeout=1",
            "redis+sentinel://:hunter2@localhost/mymaster?sock_timeout=1",
            "redis+cluster://:hunter2@localhost?sock_timeout=1",
        ],
        "used: option `ssl_ca_certs` is one of TLS: that is rediss, not redis": [
            "redis://:hunter2@localhost?ssl_ca_certs=hunter2",
        ],
        "used: option `socket_timeout` cannot have the value that it is given": [
            "redis://localhost/0?socket_timeout=hunter2",
            "redis://:hunter2@localhost/0?socket_timeout=-1",
            "redis+cluster://:hunter2@localhost?socket_timeout=hunter2",
        ],
        "used: option `socket_connect_timeout` cannot": [
            "redis://:hunter2@localhost/0?socket_connect_timeout=-1",
        ],
        "used: option `protocol` cannot": ["redis://:hunter2@localhost/0?protocol=9"],
        "used: option `max_connections` cannot": ["redis://localhost?max_connections=-1"],
        "used: option `db` cannot": ["redis://localhost?db=zero"],
        "used: option `ssl_cert_reqs` cannot": ["rediss://:hunter2@localhost/0?ssl_cert_reqs=zz"],
        # What looks like one may be of a password.
        "used: an option is none of redis-py's, or has a value": [
            "redis://localhost?password=a&hunter2=1",
            "redis://localhost?password=&hunter2=1",
            "redis+sentinel://h/mymaster?password=a&hunter2=1",
            "redis://localhost?hunter2%40=1",
            f"redis://localhost?hunter2{34 * 'x'}=1",
        ],
        "used: an option is written as name=value": ["redis+cluster://h?hunter2"],
        "used: the sentinel URL names no service: redis+sentinel://host:26379/mymaster": [
            "redis+sentinel://:hunter2@localhost:26379",
            "redis+sentinel://:hunter2@localhost:26379/",
        ],
        "used: behind the service stands the database and nothing else": [
            "redis+sentinel://:hunter2@localhost/mymaster/0/x",
        ],
        "used: a cluster has database 0 only": [
            "redis+cluster://:hunter2@localhost:7000/1",
            "redis+cluster://:hunter2@localhost:7000/0/1",
        ],
        "used: a host is missing": [
            "redis+cluster://:hunter2@",
            "redis+cluster://:hunter2@a,,b",
            "redis+sentinel://:hunter2@:26379/mymaster",
        ],
        "used: there are several `@`: user and password stand once": [
            "redis+cluster://:hunter2@a,:hunter2@b",
        ],
        "give redis://user:password@host:6379/0?option=value": [
            "redis://:hunter2@localhost?credential_provider=x",
        ],
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_url_that_cannot_be_used(
    make: Callable[[str], object], told: str, urls: list[object]
) -> None:
    """A URL that leads nowhere is refused at once, with what is wrong and nothing secret."""
    for url in urls:
        message = refusal(make, url)
        assert told in message, url
        assert "hunter2" not in message


def test_an_option_that_a_cluster_has_not_under_asyncio() -> None:
    """An option that redis-py takes for servers, but not for clusters, is named and refused."""
    told = refusal(async_client_from_url, "rediss+cluster://:hunter2@localhost?ssl_ca_path=hunter2")
    assert told.endswith("option `ssl_ca_path` is none of redis-py's cluster client for asyncio")
    async_client_from_url("rediss+cluster://:hunter2@localhost?ssl_ca_certs=ca.pem")


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://",
        "redis:///3",
        "REDIS://localhost:6379/0/",
        "redis://[::1]:6379/0",
        "redis://user:p%2Fq@localhost/0?socket_timeout=2",
        "redis://localhost?decode_responses=True&client_name=a@b",
        "Rediss://localhost?ssl_cert_reqs=none&ssl_check_hostname=no&ssl_ca_certs=ca.pem",
        "UNIX://user@/run/redis.sock?db=2&password=x",
        "Memory://",
    ],
)
def test_a_url_that_can_be_used(url: str) -> None:
    """A URL with a scheme of ours, in whatever case, and options of redis-py makes a gate."""
    SessionGate.from_url(url, sign_key=KEY)
    AsyncSessionGate.from_url(url, sign_key=KEY)


def test_a_url_leads_where_it_says() -> None:
    """Host, port, database, password and options of a URL reach redis-py as they are."""
    for make in FROM_URL:
        client = make("REDIS://us%2Fer:P%40ss@Host:7000/3?socket_timeout=2")
        assert isinstance(client, redis.Redis | redis.asyncio.Redis)
        options = client.connection_pool.connection_kwargs
        expected = {"username": "us/er", "password": "P@ss", "host": "host", "port": 7000, "db": 3}
        assert options.items() >= (expected | {"socket_timeout": 2, "protocol": 2}).items()


SECRET = "hunter2"
# Every option of redis-py's connections, those of its pools and clients, and what is none.
OPTIONS = [
    name
    for base in (redis.UnixDomainSocketConnection, *redis.SSLConnection.__mro__)
    for name in signature(base).parameters
] + ["cache_config", "connection_class", "max_connections", "nonsense", "timeout"]
odd_text = st.one_of(
    st.sampled_from(["", "-1", "9" * 5_000, "1e999", "utf-16", "a.b", "é"]),
    st.text(max_size=9),
    st.text("/?#@:[]&=%.\0\n", max_size=9),
)
passwords = st.tuples(odd_text, st.just(SECRET), odd_text).map("".join)


def mostly(good: list[str], odd: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Good nine times out of ten, so that what stands behind it matters."""
    return st.integers(0, 9).flatmap(lambda die: odd if die == 5 else st.sampled_from(good))


options = st.tuples(
    mostly(OPTIONS, odd_text), mostly(["0", "1", "2", "no", "none", "yes"], odd_text)
).map(lambda option: urlencode([option]))
urls = st.tuples(
    mostly(
        ["redis://", "Rediss://", "UNIX:///", "redis+sentinel://", "rediss+cluster://"],
        st.sampled_from(["memory://", "unix://"]),
    ),
    mostly([""], passwords.map(":{}@".format)),
    mostly(["", "localhost", "[::1]"], odd_text),
    mostly(["", ":6379"], odd_text.map(":{}".format)),
    mostly(["", "/0", "/mymaster/0"], odd_text.map("/{}".format)),
    mostly(["?"], odd_text),
    st.lists(options, max_size=3).map("&".join),
).map("".join)


@settings(deadline=None)
@given(st.one_of(urls, st.text(), passwords.map("redis://localhost?db=1&password={}".format)))
@example(f"redis://u:6379?{SECRET}=1@localhost")
@example(f"redis+sentinel://u:6379?{SECRET}=1@localhost/mymaster")
@example(f"redis://localhost?db=1&password=a&{SECRET}=1")
def test_any_url_makes_a_gate_or_is_refused(url: str) -> None:
    """Whatever the URL, it makes a gate or a ConfigurationError without its password."""
    for make in FROM_URL:
        # redis-py deprecates some options.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                made: object = make(url)
            except ConfigurationError as error:
                made = error
        if isinstance(made, ConfigurationError):
            assert made.__context__ is None
            assert SECRET not in str(made)


def test_ids_are_drawn_without_bias() -> None:
    """Every letter of an id is as likely as any other."""
    letters = "".join(Keyspace("sg", system_random).new_id() for _ in range(20_000))
    counts = Counter(letters)
    assert len(counts) == 62
    # 320,000 letters, 5,161 of each expected, standard deviation 71: 6 of them either way.
    assert all(4_730 < count < 5_590 for count in counts.values())


def test_every_random_byte_gives_a_letter_or_none() -> None:
    """The 248 bytes that divide evenly by 62 map to letters four times each, the rest to none."""
    drawn: Counter[str] = Counter()
    for byte in range(248):
        source = bytes([byte]) * 32
        drawn[Keyspace("sg", lambda _, source=source: source).new_id()] += 1  # type: ignore[misc]  # the default binds it
    assert set(drawn.values()) == {4}
    rest = iter([bytes(range(248, 256)) * 4, b"A" * 32])
    assert (
        Keyspace("sg", lambda _: next(rest)).new_id() == Keyspace("sg", lambda n: b"A" * n).new_id()
    )


def test_a_closed_gate_says_so() -> None:
    """After close every call is refused with an error that says so; verifying still works."""
    with SessionGate.from_url("memory://", sign_key=KEY) as gate:
        token = gate.start(300)
    for call in (
        lambda: gate.start(300),
        lambda: gate.pget(token, "user"),
        lambda: gate.end(token),
        lambda: gate.start(300, subject="alice"),
        lambda: gate.renew(token, subject="alice"),
        lambda: gate.sessions("alice"),
        lambda: gate.end_all("alice"),
    ):
        with pytest.raises(GateClosedError, match="closed"):
            call()
    assert gate.verify(token)
    gate.close()


def test_closing_a_gate_leaves_the_applications_client_open() -> None:
    """A client that the application brought goes on working after its gate was closed."""
    client = FakeRedis()
    connection = client.connection_pool.get_connection()
    client.connection_pool.release(connection)
    SessionGate(client, sign_key=KEY).close()
    assert connection._sock is not None


@pytest.mark.parametrize(
    "gate",
    [
        SessionGate.from_url("memory://", sign_key=KEY),
        SessionGate(FakeRedis(protocol=2), sign_key=KEY),
    ],
    ids=["from a URL", "on a client"],
)
def test_closing_a_gate_closes_its_own_connections(gate: SessionGate) -> None:
    """The connections that a gate made are closed with it, on whichever client it made them."""
    gate.start(300)
    assert isinstance(gate._channel, Lines)
    (connection,) = gate._channel._idle
    gate.close()
    assert connection._sock is None


def test_the_tree_of_errors() -> None:
    """Every error is exported, under one root, and drawn in the root's docstring."""
    errors = [
        value
        for value in vars(sessiongate).values()
        if isinstance(value, type)
        and issubclass(value, Exception)
        and not issubclass(value, Warning)
    ]
    assert all(issubclass(error, SessionGateError) for error in errors)
    assert all(error.__name__ in (SessionGateError.__doc__ or "") for error in errors)
    assert all(error.__name__ in sessiongate.__all__ for error in errors)
    invalid = [error for error in errors if issubclass(error, sessiongate.InvalidSessionError)]
    assert {error.__name__ for error in invalid} == {
        "InvalidSessionError",
        "InvalidTokenError",
        "MalformedTokenError",
        "BadSignatureError",
        "SessionNotFoundError",
    }
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(PayloadNotFoundError, LookupError)
    assert issubclass(PayloadOverflowError, PayloadTypeError)
    assert issubclass(PayloadOverflowError, OverflowError)


def test_the_token_is_looked_at_first(flavour: Flavour) -> None:
    """With a token that is none, whatever else is wrong: the client has to sign in again."""
    gate = flavour.gate(flavour.client(1))
    for call in (gate.pget, gate.ppop, gate.pdel, gate.pincr):
        with pytest.raises(MalformedTokenError):
            call("no token", "")
    with pytest.raises(MalformedTokenError):
        gate.pset("no token", "", b"")
    with pytest.raises(MalformedTokenError):
        gate.pset_many("no token", {"": b""})
    with pytest.raises(MalformedTokenError):
        gate.pget_many("no token", [""])


def test_what_is_no_list_of_names(flavour: Flavour) -> None:
    """The message tells the argument by its name."""
    gate = flavour.gate(flavour.client(1))
    token = SignKeyRing(SIGN_KEY).sign("A" * 16)[0]
    with pytest.raises(ArgumentError, match=r"^delete is a list of payload names, not str"):
        gate.pset_many(token, {}, delete="cart")
    with pytest.raises(ArgumentError, match=r"^names is a list of payload names, not str"):
        gate.pget_many(token, "cart")
    with pytest.raises(
        ArgumentError, match=r"^payloads is a mapping of names to data, not NoneType"
    ):
        gate.pset_many(token, None)  # type: ignore[arg-type]  # what a type checker would refuse


def test_a_token_is_no_subject(flavour: Flavour) -> None:
    """A token given for a subject is a slip: it is refused, and neither told nor sent."""
    gate = flavour.gate(flavour.client(1))
    genuine = SignKeyRing(SIGN_KEY).sign("A" * 16)[0]
    for token in (genuine, "v2.AAAAAAAAAAAAAAAA.12." + "0" * 64):
        calls: list[Callable[[], object]] = [
            lambda: gate.sessions(token),  # noqa: B023  # it is called within this turn
            lambda: gate.end_all(token),  # noqa: B023
            lambda: gate.end_one(token, "A" * 16),  # noqa: B023
            lambda: gate.start(300, subject=token),  # noqa: B023
            lambda: gate.renew(genuine, subject=token),  # noqa: B023
            lambda: gate.open(None, subject=token),  # noqa: B023
        ]
        for call in calls:
            with pytest.raises(
                ArgumentError, match=r"subject is a token: .*end\(token\)"
            ) as caught:
                call()
            assert token not in str(caught.value)


def test_a_grace_with_a_subject(flavour: Flavour) -> None:
    """A grace that is given together with a subject is refused, and the token goes on working."""
    gate = flavour.gate_from_url("memory://")
    token = gate.start(300)
    for grace in (0, 5, 10, timedelta(seconds=5)):
        with pytest.raises(ArgumentError) as caught:
            gate.renew(token, subject="alice", grace=grace)
        assert str(caught.value) == (
            "with a subject there is no grace: the old token is dead at once"
        )
    gate.touch(token)
    gate.touch(gate.renew(token, subject="alice"))


def test_a_grace_unless_it_is_given(flavour: Flavour) -> None:
    """Without a grace, and with None for it, the old token goes on working for ten seconds."""
    gate = flavour.gate_from_url("memory://")
    keyspace, ring = gate._commands._keyspace, gate._commands._ring
    commands = Commands(ring, keyspace, Values())
    token = gate.start(300)
    assert commands.renew(token, None, None).args[3] == b"10"
    assert commands.renew(token, 5, None).args[3] == b"5"
    for old in (token, gate.start(300)):
        gate.renew(old) if old == token else gate.renew(old, grace=None)
        gate.touch(old)


def test_a_token_is_no_session_id(flavour: Flavour) -> None:
    """A token or other text where `end_one` wants an id is refused, with what it wants."""
    gate = flavour.gate_from_url("memory://")
    token = gate.start(300, subject="alice")
    for text in (token, "", "hunter2", token[:-1]):
        with pytest.raises(ArgumentError) as caught:
            gate.end_one("alice", text)
        assert str(caught.value) == (
            "session_id is the 16 characters of `info.id` or `verify(token)`; to end the session "
            "of a token, use end(token)"
        )
        assert caught.value.__context__ is None
    gate.touch(token)


def test_a_session_that_the_subject_has_not(flavour: Flavour) -> None:
    """Of an id that is no live session of the subject's, `end_one` asks nobody to sign in again."""
    gate = flavour.gate_from_url("memory://")
    ended, theirs = gate.start(300, subject="alice"), gate.start(300, subject="bob")
    gate.end(ended)
    for token in (ended, theirs):
        with pytest.raises(SessionNotFoundError) as caught:
            gate.end_one("alice", gate.verify(token))
        assert caught.value.session_id == gate.verify(token)
        assert str(caught.value) == (
            "the subject has no live session with this id: it ended already, or is somebody else's"
        )
    with pytest.raises(SessionNotFoundError, match=r"ask the client to sign in again$"):
        gate.touch(ended)


def test_too_few_replicas_in_words() -> None:
    """The error of too few replicas tells how many, and the class of what the wait ended with."""
    told = (
        "fewer replicas than asked for (0 of 1) confirmed in time: what was written stands, unless "
        "a failover loses it"
    )
    error = UnderReplicatedError(0, 1)
    assert str(error) == told
    error.__cause__ = redis.exceptions.NoPermissionError("hunter2")
    assert str(error) == f"{told}: NoPermissionError"


ERRORS: list[SessionGateError] = [
    MalformedTokenError(),
    BadSignatureError(),
    SessionNotFoundError("A" * 16),
    SessionNotFoundError("A" * 16, of_subject=True),
    PayloadNotFoundError("user"),
    PayloadConflictError("user"),
    PayloadTypeError("user"),
    PayloadOverflowError("user"),
    PayloadDecodeError("user"),
    UnsealError("user"),
    TooManySessionsError(),
    UnderReplicatedError(1, 2),
    ArgumentError("x"),
    ConfigurationError("x"),
    GateClosedError(),
    HandleError("x"),
    EventLoopError(),
    IdTakenError(),
]


def test_every_error_is_pickled_below() -> None:
    """No error but the abstract ones is left out of the list that is pickled."""
    concrete = {
        value.__name__
        for value in vars(sessiongate).values()
        if isinstance(value, type) and issubclass(value, SessionGateError)
    } - {"SessionGateError", "InvalidSessionError", "InvalidTokenError"}
    assert {type(error).__name__ for error in ERRORS} == concrete


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_errors_survive_pickling(error: SessionGateError) -> None:
    """An error can be sent between processes, attributes included."""
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize(
    "timeout", [0, -1, 1e10, math.inf, math.nan, True, "2", timedelta(seconds=1)]
)
def test_a_timeout_that_is_none(flavour: Flavour, timeout: object) -> None:
    """A timeout is a number of seconds above 0, or None."""
    with pytest.raises(ConfigurationError, match="timeout is"):
        flavour.gate_from_url("memory://", timeout=timeout)


@pytest.mark.parametrize("timeout", [None, 1, 0.5])
def test_a_timeout(flavour: Flavour, timeout: float | None) -> None:
    """Whole seconds, parts of them, or none at all."""
    gate = flavour.gate_from_url("memory://", timeout=timeout)
    assert gate.pget(gate.start(300, {"user": "x"}), "user") == b"x"


@pytest.mark.parametrize("count", [-1, 1001, True, 1.0, "1"])
def test_a_number_of_replicas_that_is_none(flavour: Flavour, count: object) -> None:
    """How many replicas is a whole number of 0 to 1000, on the gate and in each call."""
    with pytest.raises(ConfigurationError, match="min_replicas is"):
        flavour.gate_from_url("memory://", min_replicas=count)
    gate = flavour.gate_from_url("memory://")
    token = gate.start(300, min_replicas=0)
    calls: list[Callable[..., object]] = [
        lambda **options: gate.start(300, **options),
        lambda **options: gate.renew(token, **options),
        lambda **options: gate.renew(token, subject="alice", **options),
        lambda **options: gate.expire(token, 300, **options),
        lambda **options: gate.end_all("alice", **options),
        lambda **options: gate.end(token, **options),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match="min_replicas is"):
            call(min_replicas=count)
    assert gate.info(token).generation == 0
