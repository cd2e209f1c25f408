"""The users of docs/security.md: each rule of theirs is needed, and no other.

The suite runs under them, see conftest; here are the edges.
"""

import hmac
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, cast

import pytest
from redis import Redis, RedisCluster
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.cluster import LoadBalancingStrategy
from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.sentinel import Sentinel

from sessiongate import (
    BadSignatureError,
    SessionGate,
    SessionGateError,
    SessionNotFoundError,
    UnderReplicatedError,
)
from sessiongate.keyspace import slot_of

from . import privileges
from .conftest import (
    _BINARIES,
    CLUSTERED,
    FLAVOURS,
    SIGN_KEY,
    Blocking,
    Flavour,
    running,
    running_cluster,
)
from .sentinels import NAME, Sentinels
from .servers import NO_RETRY, Cluster, Server
from .test_cluster import Migration, eventually

if TYPE_CHECKING:
    from sessiongate.command import Command
    from sessiongate.commands import Commands

LIMIT = 3
READS = LoadBalancingStrategy.RANDOM_REPLICA

# redis-py tells servers its name and version; that they refuse it is nothing to it.
_SETINFO = {"client", "client|setinfo"}


@pytest.fixture
def guarded(server: Server) -> Server:
    """Every server that has users, empty."""
    if not privileges.has_users(server.binary):
        pytest.skip("access control lists came with Redis 6")
    return server


@pytest.fixture
def cluster() -> Cluster:
    """The suite's cluster, empty. A test leaves its slots where they are."""
    if not CLUSTERED:
        pytest.skip("no server to make a cluster of")
    cluster = running_cluster()
    if not privileges.has_users(cluster.servers[0].binary):
        pytest.skip("access control lists came with Redis 6")
    cluster.flushall()
    return cluster


@contextmanager
def user(servers: Sequence[Server], rules: Sequence[str]) -> Iterator[dict[str, str]]:
    """A user of these rules on these servers, as options of redis-py; nothing was refused yet."""
    name = "tried"
    for server in servers:
        with server.client() as admin:
            admin.execute_command("ACL", "SETUSER", name, *rules)
            admin.execute_command("ACL", "LOG", "RESET")
    yield {"username": name, "password": privileges.PASSWORD}
    for server in servers:
        with server.client() as admin:
            admin.execute_command("ACL", "DELUSER", name)


def refused(servers: Sequence[Server]) -> set[str]:
    """What the servers refused anybody, but for what redis-py only tries."""
    found: set[str] = set()
    for server in servers:
        with server.client() as admin:
            found |= {str(entry["object"]) for entry in admin.acl_log()}
    return found - _SETINFO


def without(rules: Sequence[str], *gone: str) -> list[str]:
    assert set(gone) <= set(rules)
    return [rule for rule in rules if rule not in gone]


# --- every operation ---


class Scene:
    """What an operation finds: sessions that a gate made which may do everything.

    Each scene has a subject of its own.
    """

    def __init__(self, full: SessionGate, look: Redis, subject: str) -> None:
        self.full = full
        self.subject = subject
        self._look = look

    def key(self, token: str) -> str:
        return f"{self.full._prefix}:{{{self.full.verify(token)}}}"

    def session(self, **options: object) -> str:
        return self.full.start(300, {"user": "x", "n": "1", "other": "y"}, **options)  # type: ignore[arg-type]  # options are start's

    def crowd(self) -> list[str]:
        """As many sessions of the subject as it may have."""
        return [self.session(subject=self.subject) for _ in range(LIMIT)]

    def long_unused(self) -> str:
        """A session whose use has to be noted."""
        token = self.session(idle_timeout=200)
        self._look.pexpire(self.key(token), 100_000)
        return token

    def timed(self, ttl: int = 100) -> str:
        """A session with a payload that has an end of its own."""
        token = self.session()
        self.full.pset(token, "user", "x", ttl=ttl)
        return token


def twice_renewed(gate: SessionGate, scene: Scene) -> None:
    token = scene.session()
    assert gate.renew(token) == gate.renew(token)


def commands_of(gate: SessionGate) -> "Commands":
    inside = cast("SessionGate", gate.awaited if isinstance(gate, Blocking) else gate)
    return inside._commands


def read_by_handle(gate: SessionGate, token: str, fields: tuple[bytes, ...] | None) -> object:
    commands = commands_of(gate)
    return gate._run(commands.open(commands.session(token), fields))


def sent_again(gate: SessionGate, subject: str | None = None) -> None:
    """A start that is sent again, twice; the first to be sent is the last to arrive."""
    first = commands_of(gate).start(300, None, subject)
    assert first.repeat is not None
    second = first.repeat(first)
    tokens = {gate._run(command) for command in (second, first.repeat(second), first)}
    assert len(tokens) == 3, "of none was known whether it ran, and each went on with another id"


def ended_again(gate: SessionGate, token: str) -> "Command[None]":
    """What a gate sends when the reply to an `end` was lost, and one replica shall know of it."""
    first = commands_of(gate).end(token, 1)
    assert first.repeat is not None
    return first.repeat(first)._replace(unmarked=True)


# Under the name of the method and, if need be, what is special.
OPERATIONS: dict[str, Callable[[SessionGate, Scene], object]] = {
    "start": lambda gate, _: gate.start(300, {"user": "x"}),
    "start for nothing": lambda gate, _: gate.start(0),
    "start idle": lambda gate, _: gate.start(300, {"user": "x"}, idle_timeout=100),
    "start of a subject": lambda gate, scene: gate.start(300, subject=scene.subject),
    "start at the limit": lambda gate, scene: (
        scene.crowd(),
        gate.start(300, {"user": "x"}, subject=scene.subject),
    ),
    "start sent again": lambda gate, _: sent_again(gate),
    "start of a subject sent again": lambda gate, scene: sent_again(gate, scene.subject),
    "touch": lambda gate, scene: gate.touch(scene.session()),
    "touch long unused": lambda gate, scene: gate.touch(scene.long_unused()),
    "info": lambda gate, scene: gate.info(scene.timed()),
    "expire": lambda gate, scene: gate.expire(scene.session(), 200),
    "expire at once": lambda gate, scene: gate.expire(scene.session(), 0),
    "expire idle": lambda gate, scene: gate.expire(scene.long_unused(), 200),
    "expire of a subject": lambda gate, scene: gate.expire(
        scene.session(subject=scene.subject), 200
    ),
    "renew": lambda gate, scene: gate.renew(scene.session()),
    "renew twice": twice_renewed,
    "renew signed in": lambda gate, scene: gate.renew(scene.session(), subject=scene.subject),
    "renew signed in at the limit": lambda gate, scene: (
        scene.crowd(),
        gate.renew(scene.session(), subject=scene.subject),
    ),
    "pset": lambda gate, scene: gate.pset(scene.session(), "new", "x"),
    "pset replaces": lambda gate, scene: gate.pset(scene.timed(), "user", "y"),
    "pset absent": lambda gate, scene: gate.pset(scene.session(), "new", "x", if_absent=True),
    "pset match": lambda gate, scene: gate.pset(scene.session(), "user", "y", if_match="x"),
    "pset timed": lambda gate, scene: gate.pset(scene.session(), "user", "y", ttl=100),
    "pset gone": lambda gate, scene: gate.pset(scene.session(), "user", "y", ttl=0),
    "pset_many": lambda gate, scene: gate.pset_many(scene.timed(), {"user": "y", "new": "x"}),
    "pset_many deletes": lambda gate, scene: gate.pset_many(scene.timed(), {}, delete=["user"]),
    "open": lambda gate, scene: read_by_handle(gate, scene.timed(), None),
    "open long unused": lambda gate, scene: read_by_handle(gate, scene.long_unused(), (b":user",)),
    "pget": lambda gate, scene: gate.pget(scene.session(), "user"),
    "pget timed": lambda gate, scene: gate.pget(scene.timed(), "user"),
    "pget long unused": lambda gate, scene: gate.pget(scene.long_unused(), "user"),
    "pget_many": lambda gate, scene: gate.pget_many(scene.timed(), ["user", "n"]),
    "pall": lambda gate, scene: gate.pall(scene.timed()),
    "pdel": lambda gate, scene: gate.pdel(scene.session(), "user"),
    "pdel timed": lambda gate, scene: gate.pdel(scene.timed(), "user"),
    "ppop": lambda gate, scene: gate.ppop(scene.session(), "user"),
    "ppop timed": lambda gate, scene: gate.ppop(scene.timed(), "user"),
    "pincr": lambda gate, scene: gate.pincr(scene.session(), "n"),
    "pincr new": lambda gate, scene: gate.pincr(scene.session(), "new"),
    "end": lambda gate, scene: gate.end(scene.session()),
    "sessions": lambda gate, scene: (scene.crowd(), gate.sessions(scene.subject)),
    "end_one": lambda gate, scene: gate.end_one(scene.subject, gate.verify(scene.crowd()[0])),
    "end_all": lambda gate, scene: gate.end_all(scene.subject, keep=scene.crowd()[0]),
}


def test_every_operation_is_tried() -> None:
    """The list above has all methods that ask Redis."""
    public = {name for name in vars(SessionGate) if not name.startswith("_")}
    assert {name.split()[0] for name in OPERATIONS} == public - {"close", "from_url", "verify"}


def page(title: str) -> str:
    return privileges._section(title)


def carry_out(gate: SessionGate, full: SessionGate, look: Redis) -> None:
    """Run every operation."""
    for name, operation in OPERATIONS.items():
        operation(gate, Scene(full, look, name))


def refusals(gate: SessionGate, full: SessionGate, look: Redis) -> set[str]:
    """The operations that are refused for want of a permission; the others succeed.

    No permission is never taken for a session that is not there, nor for a payload, and what was
    broken off in the middle leaves nothing behind without an end.
    """
    found: set[str] = set()
    for name, operation in OPERATIONS.items():
        try:
            operation(gate, Scene(full, look, name))
        except SessionGateError as error:
            pytest.fail(f"{name}: {error!r}")
        except RedisError as error:
            if not is_refusal(error):
                raise
            found.add(name)
    # Of an index that was begun the server may have refused the rest.
    assert not [key for key in look.scan_iter("sg-session:{*") if look.pttl(key) < 0]
    return found


def is_refusal(error: Exception) -> bool:
    # Inside a script servers say it in words of their own, and redis-py has no class for them.
    return isinstance(error, NoPermissionError) or bool(
        re.search(r"permission|can't run this command", str(error))
    )


def gate_on(client: Redis | RedisCluster, **options: object) -> SessionGate:
    return SessionGate(client, sign_key=SIGN_KEY, max_sessions=LIMIT, **options)  # type: ignore[arg-type]  # options are the gate's


def client_of(server: Server, login: dict[str, str]) -> Redis:
    return Redis(port=server.port, protocol=2, retry=NO_RETRY, **login)  # type: ignore[arg-type]  # options of redis-py


# --- one server ---


def test_the_suite_runs_under_the_users_of_the_page(flavour: Flavour, guarded: Server) -> None:
    """A gate of the suite is logged in as a user that the page's own lines would not change."""
    gate = flavour.gate(flavour.client(guarded.port))
    gate.start(300)
    with guarded.client() as admin:
        assert privileges.USER in {client["user"] for client in admin.client_list()}
        before = admin.execute_command("ACL LIST")
        for rules in re.findall(
            rf"^    ACL SETUSER {privileges.USER} (.+)", page("One server"), re.MULTILINE
        ):
            admin.execute_command("ACL", "SETUSER", privileges.USER, *rules.split())
        more = privileges.settings()["`min_replicas`"]  # an argument of some of its calls
        admin.execute_command("ACL", "SETUSER", privileges.USER, *more)
        assert admin.execute_command("ACL LIST") == before
    gate.close()


def test_a_user_of_the_page_runs_everything(flavour: Flavour, guarded: Server) -> None:
    """The rules of the page are enough for every operation, and the server refuses nothing."""
    with user([guarded], privileges.rules()) as login, guarded.client() as look:
        full = gate_on(look)
        for protocol in (2, 3):
            client = flavour.client(guarded.port, protocol=protocol, **login)
            carry_out(flavour.gate(client, max_sessions=LIMIT), full, look)
            look.flushall()
            look.script_flush()
        assert refused([guarded]) == set()


@pytest.mark.parametrize("rule", privileges.rules()[4:])
def test_no_command_of_the_page_is_too_many(guarded: Server, rule: str) -> None:
    """Without any one command some operation is refused, and is not taken for something else."""
    with guarded.client() as look:
        look.script_flush()
        with user([guarded], without(privileges.rules(), rule)) as login:
            gate = gate_on(client_of(guarded, login))
            assert refusals(gate, gate_on(look), look)
            assert rule.removeprefix("+") in refused([guarded])
            gate.close()


@pytest.mark.parametrize("prefix", ["another", "sg-sessions", "Sg-session"])
def test_redis_keys_of_another_prefix_are_refused(
    flavour: Flavour, guarded: Server, prefix: str
) -> None:
    """A gate of a prefix that is not the user's gets redis-py's error from every operation."""
    login = flavour.login({})
    gate = flavour.gate(flavour.client(guarded.port, **login), prefix=prefix, max_sessions=LIMIT)
    with guarded.client() as look:
        full = gate_on(look, prefix=prefix)
        for name, operation in OPERATIONS.items():
            with pytest.raises(NoPermissionError):
                operation(gate, Scene(full, look, name))


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [("", False), ("~sg-session:{* ~sg-session:tries:*", True), ("~sg-session:subject:*", False)],
)
def test_no_redis_key_of_the_page_is_too_many(guarded: Server, pattern: str, allowed: bool) -> None:
    """Without the pattern nothing works; with part of it only what leaves the rest alone."""
    rules = [*without(privileges.rules(), "~sg-session:*"), *pattern.split()]
    of_subjects = {
        "start of a subject sent again",
        *("start of a subject", "start at the limit", "expire of a subject", "renew signed in"),
        *("renew signed in at the limit", "sessions", "end_one", "end_all"),
    }
    with guarded.client() as look, user([guarded], rules) as login:
        gate = gate_on(client_of(guarded, login))
        found = refusals(gate, gate_on(look), look)
        gate.close()
    assert found == (of_subjects if allowed else set(OPERATIONS))


# --- some settings ---


def rested(gate: SessionGate) -> None:
    """Use a gate, and again after a while."""
    token = gate.start(300)
    time.sleep(0.05)
    gate.touch(token)


SETTINGS: dict[str, tuple[dict[str, object], Callable[[SessionGate], object]]] = {
    "a database other than 0": ({"db": 3}, lambda gate: gate.start(300)),
    "`client_name`": ({"client_name": "somebody"}, lambda gate: gate.start(300)),
    "`health_check_interval`": ({"health_check_interval": 0.01}, rested),
}
OTHER_SETTINGS = {"`min_replicas`", "a cluster client that reads from replicas"}


def test_every_setting_of_the_page_is_tried() -> None:
    """The table of the page has these settings and no others."""
    assert privileges.settings().keys() == SETTINGS.keys() | OTHER_SETTINGS


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_needs_what_the_page_says(
    flavour: Flavour, guarded: Server, setting: str
) -> None:
    """With its rules a setting works, and without any one of them it is refused."""
    options, use = SETTINGS[setting]
    rules = privileges.settings()[setting]
    with user([guarded], [*privileges.rules(), *rules]) as login:
        use(flavour.gate(flavour.client(guarded.port, retry=flavour.no_retry, **options, **login)))
        assert refused([guarded]) == set()
    for rule in rules:
        with user([guarded], [*privileges.rules(), *without(rules, rule)]) as login:
            client = flavour.client(guarded.port, retry=flavour.no_retry, **options, **login)
            gate = flavour.gate(client)
            with pytest.raises(NoPermissionError):
                use(gate)


def test_to_wait_for_replicas_needs_what_the_page_says(flavour: Flavour, guarded: Server) -> None:
    """With its rules WAIT counts, also behind what is sent again; without one it counts nothing."""
    rules = privileges.settings()["`min_replicas`"]
    for missing in ("", *rules):
        given = [rule for rule in rules if rule != missing]
        with user([guarded], [*privileges.rules(), *given]) as login:
            gate = flavour.gate(flavour.client(guarded.port, **login), timeout=0.5)
            token = gate.start(300)
            gate.end(token)
            with pytest.raises(UnderReplicatedError) as caught:
                gate._run(ended_again(gate, token))
            assert caught.value.replicas == 0
            cause = caught.value.__cause__
            assert refused([guarded]) == {missing[1:]} - {""}
            assert is_refusal(cause) if isinstance(cause, Exception) else not missing


# --- clusters ---


def test_a_user_of_the_page_runs_everything_on_a_cluster(
    flavour: Flavour, cluster: Cluster
) -> None:
    """The rules of the page are enough for a cluster, and no server refuses anything."""
    look = cluster.client()
    with user(cluster.servers, privileges.rules(cluster=True)) as login:
        for protocol in (2, 3):
            client = flavour.cluster_client(cluster, protocol=protocol, **login)
            carry_out(flavour.gate(client, max_sessions=LIMIT), full_gate(cluster), look)
            look.flushall()
            look.script_flush()
        assert refused(cluster.servers) == set()
    look.close()


def full_gate(cluster: Cluster) -> SessionGate:
    return gate_on(RedisCluster("127.0.0.1", cluster.port, protocol=2))


@pytest.mark.parametrize(
    "rule", without(privileges.users(privileges.CLUSTER)[privileges.USER], "+asking")
)
def test_a_client_cannot_do_without_the_commands_of_a_cluster(
    flavour: Flavour, cluster: Cluster, rule: str
) -> None:
    """redis-py finds no way into a cluster without any one of the commands, but for ASKING."""
    rules = without(privileges.rules(cluster=True), rule)
    with (
        user(cluster.servers, rules) as login,
        pytest.raises((RedisError, RedisClusterException)),
    ):
        flavour.gate(flavour.cluster_client(cluster, **login)).start(300)


@pytest.mark.parametrize("rule", ["", "+asking"])
def test_a_slot_on_its_way_needs_asking(flavour: Flavour, cluster: Cluster, rule: str) -> None:
    """A session whose slot is being moved is found, and without ASKING it is no missing session."""
    rules = [one for one in privileges.rules(cluster=True) if one != rule]
    with user(cluster.servers, rules) as login:
        gate = flavour.gate(flavour.cluster_client(cluster, **login), timeout=1)
        token = gate.start(300, {"user": "x"})
        key = f"sg-session:{{{gate.verify(token)}}}"
        migration = Migration(cluster, slot_of(key.encode()))
        migration.move(key)
        try:
            if rule:
                with pytest.raises(RedisError):
                    gate.pget(token, "user")
                assert refused(cluster.servers) == {"asking"}
            else:
                assert gate.pget(token, "user") == b"x"
                assert refused(cluster.servers) == set()
        finally:
            migration.finish()
            Migration(cluster, slot_of(key.encode())).finish()


@pytest.mark.parametrize("allowed", [True, False])
def test_a_client_that_reads_from_replicas(
    flavour: Flavour, cluster: Cluster, allowed: bool
) -> None:
    """Such a client has to be allowed READONLY; it is redis-py's, no gate reads from replicas."""
    rules = privileges.settings()["a cluster client that reads from replicas"]
    assert rules == ["+readonly"]
    given = rules if allowed else []
    with user(cluster.servers, [*privileges.rules(cluster=True), *given]) as login:
        try:
            client = flavour.cluster_client(cluster, load_balancing_strategy=READS, **login)
            gate = flavour.gate(client)
            gate.pset(gate.start(300), "user", "x")
        except (RedisError, RedisClusterException):
            assert not allowed
        assert refused(cluster.servers) == (set() if allowed else {"readonly"})


# --- sentinels ---


@pytest.fixture(scope="module")
def sentinels() -> Iterator[Sentinels]:
    """Servers and sentinels with the users of the page: those of gates, and the sentinels' own."""
    binary = _BINARIES.get(CLUSTERED)
    if binary is None or not privileges.has_users(binary):
        pytest.skip("access control lists came with Redis 6")
    users = privileges.users(privileges.SENTINEL)
    (watching,) = users.keys() - {privileges.USER}
    lines = [
        f"user {privileges.USER} {' '.join(users[privileges.USER])}",
        f"sentinel auth-user {NAME} {watching}",
        f"sentinel auth-pass {NAME} {privileges.PASSWORD}",
    ]
    with Sentinels(binary, ["--user", watching, *users[watching]], lines) as sentinels:
        yield sentinels


def gate_by_url(flavour: Flavour, sentinels: Sentinels, name: str) -> SessionGate:
    """A gate that logs in on the servers as ever, and at the sentinels under that name."""
    login = f"sentinel_username={name}&sentinel_password={privileges.PASSWORD}"
    return flavour.gate_from_url(f"{sentinels.url}?{login}", max_sessions=LIMIT)


def gate_by_client(flavour: Flavour, sentinels: Sentinels, name: str) -> SessionGate:
    """The same, on a client of the application's."""
    kind = AsyncSentinel if flavour.is_async else Sentinel
    login = {"username": name, "password": privileges.PASSWORD}
    found = kind(sentinels.addresses, sentinel_kwargs={"protocol": 2, **login})
    client = found.master_for(NAME, protocol=2, **flavour.login({}))  # type: ignore[arg-type]  # options are redis-py's own
    for one in (client, *found.sentinels):
        flavour.closes(one)
    return flavour.gate(client, max_sessions=LIMIT)


def test_the_users_of_the_page_are_enough_for_sentinels(sentinels: Sentinels) -> None:
    """Gates find the primary and run everything, also when sentinels have put another in charge."""
    flavours = [Flavour(name) for name in FLAVOURS]
    gates = [
        make(flavour, sentinels, privileges.USER)
        for flavour in flavours
        for make in (gate_by_url, gate_by_client)
    ]
    everyone = [*sentinels.servers, *sentinels.sentinels]
    for dies in (True, False):
        primary = sentinels.primary()
        with primary.client() as look:
            for gate in gates:
                eventually(lambda: gate.start(300))  # noqa: B023  # it is over within this turn
                look.flushall()
                carry_out(gate, gate_on(look), look)
        assert refused(everyone) == set()
        if dies:
            primary.kill()
            everyone.remove(primary)
            sentinels.successor(primary)
    for flavour in flavours:
        flavour.close()


@pytest.mark.parametrize("make", [gate_by_url, gate_by_client])
def test_without_its_one_rule_no_sentinel_tells(
    flavour: Flavour, sentinels: Sentinels, make: Callable[..., SessionGate]
) -> None:
    """A user without the rule of the page is refused at the sentinels."""
    rules = privileges.users(privileges.SENTINEL)[privileges.USER]
    assert rules == ["reset", "on", f">{privileges.PASSWORD}", "+sentinel|masters"]
    with user(sentinels.sentinels, without(rules, "+sentinel|masters")) as login:
        with pytest.raises(RedisError) as caught:
            make(flavour, sentinels, login["username"]).start(300)
        assert is_refusal(caught.value)


# --- what the page says of attackers ---


def fingerprint(token: str) -> bytes:
    """What Redis holds of a token, made of the token alone."""
    return sha256(bytes.fromhex(token[-64:])).digest()[:16]


def key_of(gate: SessionGate, token: str) -> str:
    return f"sg-session:{{{gate.verify(token)}}}"


def signed(sign_key: str, session_id: str) -> str:
    """The token that somebody makes who has the sign key."""
    return f"v1.{session_id}.{hmac.new(sign_key.encode(), session_id.encode(), sha256).hexdigest()}"


def test_who_reads_redis_finds_no_token_but_can_guess_at_a_weak_sign_key(server: Server) -> None:
    """Redis holds a hash of the signature: not the signature, and enough to try a guess."""
    with server.client() as look:
        gate = SessionGate(look, sign_key=SIGN_KEY)
        token = gate.start(300, {"user": "x"}, subject="alice")
        held = look.hgetall(key_of(gate, token))
    everything = b"".join(field + value for field, value in held.items())
    assert bytes.fromhex(token[-64:])[:8] not in everything
    assert token[-64:-48].encode() not in everything
    assert held[b"fp"][:16] == fingerprint(signed(SIGN_KEY, gate.verify(token)))
    assert held[b":user"] == b"x"
    assert held[b"sub"].endswith(b"alice")


def test_who_writes_to_redis_needs_a_token_of_his_own_and_nothing_more(server: Server) -> None:
    """With a visitor's token and write access one is anybody; without a token, nobody."""
    with server.client() as admin:
        gate = SessionGate(admin, sign_key=SIGN_KEY)
        victim = gate.start(300, {"role": "admin"}, subject="alice")
        visitor = gate.start(300)
        admin.hset(key_of(gate, visitor), mapping=hidden(admin.hgetall(key_of(gate, victim))))
        assert gate.info(visitor).subject == "alice"
        assert gate.pget(visitor, "role") == b"admin"
        admin.persist(key_of(gate, visitor))
        gate.touch(visitor)
        assert admin.ttl(key_of(gate, visitor)) == -1
        gate.end(visitor)
        admin.hset(key_of(gate, visitor), "fp", fingerprint(visitor) + b"0" * 16)
        gate.touch(visitor)
        # He gives the victim's session a fingerprint that he knows: no token is spelt for it.
        admin.hset(key_of(gate, victim), "fp", fingerprint(visitor) + b"0" * 16)
        with pytest.raises(BadSignatureError):
            gate.touch(f"v1.{gate.verify(victim)}.{visitor[-64:]}")


def hidden(fields: dict[bytes, bytes]) -> dict[bytes, bytes]:
    return {field: value for field, value in fields.items() if field != b"fp"}


def test_a_sign_key_opens_what_it_signed_for_as_long_as_it_is_in_the_ring(server: Server) -> None:
    """A key that leaked makes tokens of sessions that it signed, and once it is out, none."""
    old, new = "the sign key that leaked, 32 bytes", "the sign key that comes, 32 bytes"
    with server.client() as look:
        by_old = SessionGate(look, sign_key=old)
        ring = SessionGate(look, sign_key=[new, old])
        theirs, ours = by_old.start(300), ring.start(300)
        ring.touch(signed(old, ring.verify(theirs)))
        with pytest.raises(SessionNotFoundError):
            ring.touch(signed(old, ring.verify(ours)))
        with pytest.raises(SessionNotFoundError):
            ring.touch(signed(old, "A" * 16))
        look.config_resetstat()
        with pytest.raises(BadSignatureError):
            SessionGate(look, sign_key=new).touch(signed(old, ring.verify(theirs)))
        assert "cmdstat_evalsha" not in look.info("commandstats")


def test_who_renews_as_well_is_not_shaken_off(server: Server) -> None:
    """A thief who renews gets the user's token; a sign-in and `end_all` put an end to his."""
    with server.client() as look:
        gate = SessionGate(look, sign_key=SIGN_KEY)
        stolen = gate.start(300)
        assert gate.renew(stolen) == gate.renew(stolen)
        signed_in = gate.renew(gate.renew(stolen), subject="alice")
        with pytest.raises(SessionNotFoundError):
            gate.renew(stolen)
        also_stolen = gate.renew(signed_in, grace=0)
        mine = gate.start(300, subject="alice")
        gate.end_all("alice", keep=mine)
        with pytest.raises(SessionNotFoundError):
            gate.touch(also_stolen)


@pytest.mark.parametrize(
    "command",
    [
        *(
            "ACL LIST",
            "CONFIG GET *",
            "FLUSHALL",
            "KEYS *",
            "MONITOR",
            "RANDOMKEY",
        ),
        *("SCAN 0", "SCRIPT FLUSH", "SHUTDOWN", "SLOWLOG GET", "SUBSCRIBE x", "HGETALL other"),
        *("LRANGE sg-session:x 0 1", "DUMP sg-session:x", "SELECT 1", "CLIENT LIST", "INFO"),
    ],
)
def test_the_gates_password_is_good_for_nothing_else(guarded: Server, command: str) -> None:
    """The user of the page cannot look around, nor do what harms others, in a script neither."""
    words = command.split()
    with user([guarded], privileges.rules()) as login, client_of(guarded, login) as client:
        with pytest.raises(NoPermissionError):
            client.execute_command(*words)
        with pytest.raises(ResponseError):
            client.eval("return redis.call(unpack(ARGV))", 0, *words)


def test_what_the_logs_of_redis_hold(server: Server) -> None:
    """SLOWLOG holds the beginning of what is stored, and no token."""
    data = "".join(chr(65 + n % 26) for n in range(500))
    with server.client() as look:
        slower_than = look.config_get("slowlog-log-slower-than")
        look.config_set("slowlog-log-slower-than", 0)
        gate = SessionGate(look, sign_key=SIGN_KEY)
        token = gate.start(300)
        gate.pset(token, "user", data)
        log = b"\n".join(entry["command"] for entry in look.slowlog_get(100))
        look.config_set("slowlog-log-slower-than", str(slower_than["slowlog-log-slower-than"]))
    assert data[:100].encode() in log
    assert data[:129].encode() not in log
    assert token[-64:].encode() not in log


def test_the_user_default_can_be_closed() -> None:
    """Where nobody is let in without a login, replicas follow all the same, and gates go on."""
    binary = running(CLUSTERED).binary
    page_users = privileges.users("The user default")
    url = f"redis://{privileges.USER}:{privileges.PASSWORD}@127.0.0.1"
    with (
        Server(binary, ("--repl-diskless-sync-delay", "0")) as primary,
        Server(binary, ("--slaveof", "127.0.0.1", str(primary.port))) as replica,
        SessionGate.from_url(f"{url}:{primary.port}", sign_key=SIGN_KEY) as gate,
    ):
        token = gate.start(300)
        for server in (primary, replica):
            with server.client() as client:
                for user in ("admin", "replica"):
                    client.execute_command("ACL", "SETUSER", user, *page_users[user])
                client.config_set("masteruser", "replica")
                client.config_set("masterauth", privileges.PASSWORD)
                client.execute_command("ACL", "SETUSER", "default", *page_users["default"])
            with Redis(port=server.port, username="admin", password=privileges.PASSWORD) as admin:
                admin.execute_command("CLIENT", "KILL", "USER", "default")
            with pytest.raises(AuthenticationError), server.client() as client:
                client.ping()
        with Redis(port=replica.port, username="admin", password=privileges.PASSWORD) as admin:
            deadline = time.monotonic() + 20
            while admin.info("replication")["master_link_status"] != "up":
                assert time.monotonic() < deadline
                time.sleep(0.05)
        gate.end(token, min_replicas=1)
