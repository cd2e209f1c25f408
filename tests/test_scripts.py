"""The Lua files: what they all keep to, and that each runs on every server.

What each of them does is tested where its operation is; that its header is true, with the protocol.
"""

import itertools
import re
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha1
from pathlib import Path
from typing import NamedTuple, cast

import pytest
from redis import Redis
from redis.exceptions import NoScriptError, ResponseError, TryAgainError

from sessiongate import keyspace, scripts

from .conftest import _BINARIES, Flavour, running_cluster
from .servers import Cluster, Server

SOURCES = {
    path.stem: path.read_text("ascii")
    for path in sorted((Path(__file__).parent.parent / "lua").glob("*.lua"))
}
MAX_COLUMNS = 104

# How many lines each passage has that several scripts hold: its comment and what follows.
PASSAGES = {
    "Is this the session's token? And if it has an idle timeout, it begins anew.": 26,
    "A list is one string: of each item its length, a colon and the item.": 2,
    "A payload with an end of its own stands under another field, behind that end.": 8,
    "What is to be told of a session, as the items of a list.": 11,
    "The same, with the name and the size of each payload behind it.": 19,
    "The index ends with the last of its sessions. If there is none left, it is": 4,
    "Entries that are older than the list and not on it: renewals gave their": 6,
}
OPEN = next(iter(PASSAGES))
MARK = "-- (alike in every script) "

# A word that a script uses without declaring it is one of these, or of Redis's own.
KEYWORDS = {
    *("and", "do", "else", "elseif", "end", "false", "for", "function", "if", "in", "local", "nil"),
    *("not", "or", "repeat", "return", "then", "true", "until", "while"),
}
# No `struct`, `cmsgpack`, `bit` nor `redis.sha1hex`: fakeredis has none of them.
GLOBALS = {
    *("ARGV", "KEYS", "ipairs", "math", "redis", "string", "table", "tonumber", "tostring"),
    *("type", "unpack"),
}
REPLICATES = "if redis.replicate_commands then redis.replicate_commands() end"
READS = {
    *("EXISTS", "HEXISTS", "HGET", "HGETALL", "HKEYS", "HLEN", "HMGET", "HSTRLEN", "PTTL"),
    *("TIME", "ZCARD", "ZCOUNT", "ZRANGE", "ZRANGEBYSCORE", "ZREVRANGE"),
}

every_script = pytest.mark.parametrize("name", SOURCES)


def header(name: str) -> str:
    """The comment that a script begins with."""
    lines = SOURCES[name].splitlines()
    length = next(n for n, line in enumerate(lines) if not line.startswith("--"))
    return "\n".join(lines[:length])


def code(name: str) -> str:
    """A script without its comments."""
    return re.sub(r" *--.*", "", SOURCES[name])


def words(text: str) -> list[str]:
    """The names in code: no strings, no fields behind a dot, no keywords."""
    bare = re.sub(r"'[^']*'", "''", text)
    return [word for word in re.findall(r"(?<![\w.])[A-Za-z_]\w*", bare) if word not in KEYWORDS]


def declared(name: str) -> set[str]:
    """The names that a script makes its own: locals, loop variables, functions, parameters."""
    found = re.findall(r"\blocal function (\w+)", code(name))
    for pattern in (r"\blocal ([\w, ]+?) *(?:=|$)", r"\bfor ([\w, ]+?) (?:=|in)"):
        for names in re.findall(pattern, code(name), re.MULTILINE):
            found += re.split(r", *", names.strip())
    for parameters in re.findall(r"\bfunction \w+\(([\w, ]*)\)", code(name)):
        found += re.split(r", *", parameters)
    return set(found)


@every_script
def test_a_script_begins_with_its_contract(name: str) -> None:
    """The header says what a script does, its Redis keys, its arguments and what it returns."""
    assert re.match(r"-- [A-Z].*[.:]", header(name))
    # Its echo comes last, in what it is given and in what it returns.
    assert re.findall(r"^--   \S+ +(\w+)", header(name), re.MULTILINE)[-1] == "echo"
    returned = header(name).partition("-- Returns ")[2].replace("\n--", "")
    assert re.search(r"(?:^|\.\. )echo\b", returned)
    # A literal space after each tag, so that the columns are even.
    starts = {
        len(found[0]) for found in re.finditer(r"^--   \S+ +(?=\S)", header(name), re.MULTILINE)
    }
    assert len(starts) == 1


@every_script
def test_the_echo_is_the_last_word(name: str) -> None:
    """A script takes its echo from the last argument, and ends each of its replies with it."""
    numbers = [int(number) for number in re.findall(r"ARGV\[(\d+)\]", code(name))]
    lists = re.search(r"#ARGV - 1|#KEYS", code(name)) or name == "expire"
    last = r"ARGV\[#ARGV\]" if lists else rf"ARGV\[{max(numbers)}\]"
    if name == "echo":
        assert re.fullmatch(rf"return {last}\n", SOURCES[name].replace(f"{header(name)}\n", ""))
        return
    assert [re.fullmatch(last, value) is not None for value in values_of("echo", name)] == [True]
    # What functions return is no reply.
    functions = r"^local function .*(?: end|(?:\n(?:  .*|))+\nend)$"
    replies = re.sub(functions, "", code(name), flags=re.MULTILINE)
    for reply in re.findall(r"\breturn (.*?)(?: end)?$", replies, re.MULTILINE):
        if reply == "table.concat(list)":
            assert replies.rstrip().endswith("list[#list + 1] = echo\nreturn table.concat(list)")
        else:
            assert re.search(r"\becho(?:\)$|$)", reply), reply


@every_script
def test_a_script_is_neat(name: str) -> None:
    """No line is too long, none ends in blanks, and the last one ends."""
    lines = SOURCES[name].split("\n")
    assert max(map(len, lines)) <= MAX_COLUMNS
    assert not [line for line in lines if line != line.rstrip() or "\t" in line]
    assert lines[-1] == ""
    assert lines[-2] != ""


@every_script
def test_a_script_assigns_no_global_and_uses_what_every_server_has(name: str) -> None:
    """Every name is declared in the script, or is one of the few that fakeredis has too."""
    assert set(words(code(name))) <= declared(name) | GLOBALS
    assert "sha1hex" not in code(name)
    assert not re.search(r"(?<!local )\bfunction \w", code(name))
    # The first assignment of a name is its declaration: an earlier one would be to a global.
    targets = re.findall(r"^ *(?:local )?((?:\w+, *)*\w+) = ", code(name), re.MULTILINE)
    assert {word for names in targets for word in re.split(r", *", names)} <= declared(name)


@every_script
def test_every_redis_key_is_declared(name: str) -> None:
    """A command is given a Redis key that was among KEYS, and none is made of other things."""
    used = set(re.findall(r"redis\.p?call\('[A-Z]+',? ?([^,)]*)", code(name))) - {""}
    for more in re.findall(r"redis\.p?call\('(?:EXISTS|RENAME)', ([^)]*)", code(name)):
        used |= set(more.split(", "))
    # Lists of the Redis keys that were given, of `enroll`: KEYS by entry, and pairs with an entry.
    assert used <= {"session", "index", "new", "tries", "key", "keys[entry]", "live[i][2]"}
    sources = {
        "session": r"KEYS\[\d\]|KEYS\[i\]|nil|function facts\(session",
        "index": r"KEYS\[\d\]",
        "new": r"KEYS\[1\]",
        "tries": r"KEYS\[[23]\]",
        "key": r"KEYS\[1\]",
    }
    for key in used & set(sources):
        for value in values_of(key, name):
            assert re.fullmatch(sources[key], value), f"{key} is {value}"
    for of_list in {use for use in used if "[" in use}:
        assert name == "enroll", of_list
        assert "keys[ARGV[15 + realms + i]] = KEYS[first + i]" in code(name)
        assert "live[i] = {live[i], keys[live[i]]}" in code(name)


def values_of(variable: str, name: str) -> list[str]:
    """What a script assigns to a variable."""
    found = []
    for names, values in re.findall(
        r"^ *(?:local )?((?:\w+, *)*\w+) = (.*)$", code(name), re.MULTILINE
    ):
        listed = re.split(r", *", names)
        if variable in listed:
            found.append(re.split(r", *", values)[listed.index(variable)].strip())
    return found


@pytest.mark.parametrize("passage", PASSAGES)
def test_what_is_alike_in_every_script_is(passage: str) -> None:
    """A passage that several scripts hold is the same in all of them, word for word."""
    found = {}
    for name, source in SOURCES.items():
        lines = source.splitlines()
        places = [n for n, line in enumerate(lines) if line.strip() == MARK + passage]
        assert len(places) <= 1, f"twice in {name}"
        for at in places:
            found[name] = textwrap.dedent("\n".join(lines[at : at + PASSAGES[passage]]))
    assert len(found) >= 2, "what is in one script only is alike in none"
    first, *others = found
    assert [name for name in others if found[name] != found[first]] == [], f"others than {first}"
    # It is held to its end, and it is marked wherever it is.
    lines = [line.strip() for line in found[first].splitlines()[1:]]
    blocks = re.findall(r"\b(?:if|for|function)\b", "\n".join(lines))
    assert len(blocks) == len(re.findall(r"\bend\b", "\n".join(lines)))
    assert {name for name, source in SOURCES.items() if lines[0] in source} == set(found)


def test_every_passage_is_held() -> None:
    """No mark stands in a script that these tests do not know."""
    marked = {
        line.strip().removeprefix(MARK)
        for source in SOURCES.values()
        for line in source.splitlines()
        if "(alike" in line
    }
    assert marked == set(PASSAGES)


@every_script
def test_what_opens_a_session_looks_at_its_token_in_the_one_way(name: str) -> None:
    """A script that is given a token's fingerprint and raises NOSESSION holds that passage."""
    opens = "fingerprint" in header(name) and "NOSESSION" in header(name)
    assert (MARK + OPEN in SOURCES[name]) == opens
    if not opens:
        return
    # What it opens is what it read, and nothing is written before, unless it was done by then.
    before = code(name).partition("if not own or #own > 32")[0]
    assert re.search(r"\bown\b.* = ", before)
    assert not written(before.replace(looks_at_tries(name), "")), "it writes before it looks"


def looks_at_tries(name: str) -> str:
    """What a script that opens a session asks first: whether it is the first try to open it."""
    found = re.search(
        r"^if again == '1' then\n.*?^if [^\n]*, tries\).*?^end\n",
        code(name),
        re.MULTILINE | re.DOTALL,
    )
    return found[0] if found else ""


def test_what_opens_a_session_looks_at_its_tries_in_the_one_way() -> None:
    """`start` and `enroll` hold the same lines; a repetition writes only if it found no session."""
    told = looks_at_tries("enroll")
    assert told == looks_at_tries("start").replace("session", "new").replace(
        "fingerprint", "successor"
    )
    before, _, after = told.partition("== successor then return echo end\n")
    assert not written(before)
    assert written(after) == ["SET"]
    repeated, _, first = after.partition("\nend\n")
    assert written(repeated) == ["SET"]
    assert first.startswith("if again == '1' or redis.call('EXISTS', new, tries) > 0 then\n")
    assert {name for name in SOURCES if "tries" in declared(name)} == {"start", "enroll"}
    for name in ("start", "enroll"):
        assert words(code(name).replace(looks_at_tries(name), "")).count("tries") == 1  # its KEYS


def written(text: str) -> list[str]:
    """The commands in code that write."""
    return [
        command for command in re.findall(r"redis\.p?call\('(\w+)'", text) if command not in READS
    ]


@every_script
def test_effects_are_replicated_before_anything_is_written(name: str) -> None:
    """Redis 4 lets a script write after TIME only if it was told so before its first write."""
    lines = SOURCES[name].splitlines()
    opening = [n for n, line in enumerate(lines) if line.strip() == MARK + OPEN]
    for at in opening:
        # That tells by itself, but mostly it is not run at all.
        del lines[at : at + PASSAGES[OPEN]]
    text = "\n".join(lines)
    if "'TIME'" not in text or not written(text):
        return
    told, _, after = text.partition(f"\n{REPLICATES}\n")
    assert after, "it writes, asks for the time, and never tells"
    # What a branch writes that returns is no earlier write.
    branch = r"^if [^\n]* then\n(?:  [^\n]*\n)*?  return echo\nend$"
    assert not written(re.sub(branch, "", told, flags=re.MULTILINE))


@every_script
def test_a_script_is_loaded_as_it_is(name: str) -> None:
    """The package has each file, byte for byte, under the name of its file."""
    loaded = {
        each.name: each for each in vars(scripts).values() if isinstance(each, scripts.Script)
    }
    assert set(loaded) == set(SOURCES)
    assert loaded[name].source == SOURCES[name].encode()
    assert loaded[name].sha == sha1(SOURCES[name].encode(), usedforsecurity=False).hexdigest()


# --- on servers ---


ECHO = b"the-echo"


class Call(NamedTuple):
    """A call of a script, but for the echo."""

    name: str
    keys: list[bytes]
    args: list[bytes]

    def words(self) -> list[bytes | int]:
        """What follows the script's SHA-1 or source."""
        return [len(self.keys), *self.keys, *self.args, ECHO]

    def run(self, client: Redis, behind: str = "") -> bytes:
        """What the script returns, behind more Lua."""
        reply: bytes = client.execute_command("EVAL", behind + SOURCES[self.name], *self.words())
        assert reply.endswith(ECHO), self.name
        return reply.removesuffix(ECHO)


KEYSPACE = keyspace.Keyspace("sg-session", keyspace.system_random)
INDEX = KEYSPACE.index_key(b"zo")
SUB = b"realm..." + b"zo"
TOKEN, NEWER, OF_ZO = b"1" * 16, b"2" * 16, b"3" * 16
STARTED = b"0" * 16  # whatever the clock says
NONE = b""


class New(NamedTuple):
    """A session id in the slot of the index, and the Redis keys that belong to it."""

    id: bytes
    session: bytes
    tries: bytes

    @property
    def entry(self) -> bytes:
        return STARTED + self.id


def new() -> New:
    session_id = KEYSPACE.new_id_in(keyspace.slot_of(INDEX))
    return New(
        session_id.encode(), KEYSPACE.session_key(session_id), KEYSPACE.tries_key(session_id)
    )


def start(one: New, again: bool = False, ttl: bytes = b"300", idle: bytes = NONE) -> Call:
    return Call(
        "start", [one.session, one.tries], [TOKEN, ttl, b"%d" % again, idle, b"1", b":a", b"1"]
    )


def enroll(
    one: New,
    *others: New,
    again: bool = False,
    ttl: bytes = b"300",
    limit: tuple[bytes, bytes] = (b"5", b"1"),
) -> Call:
    """Open a session of the subject, knowing of others."""
    args = [ttl, b"%d" % again, NONE, one.id, STARTED, b"0", NONE, NONE, *limit, b"1"]
    listed = [b"%d" % len(others), b"1", NONE, SUB, *(other.entry for other in others)]
    keys = [one.session, INDEX, one.tries, *(other.session for other in others)]
    return Call("enroll", keys, [TOKEN, *args, *listed, b":a", b"1"])


# Of a payload its field, what stands there and what is to stand there.
Replaced = tuple[bytes, bytes, bytes]


def sign_in(  # noqa: PLR0913  # as many as there are to it
    one: New,
    source: New,
    again: bool = False,
    *others: New,
    token: bytes = TOKEN,
    replaced: Sequence[Replaced] | None = None,
    limit: tuple[bytes, bytes] = (b"5", b"1"),
) -> Call:
    """Give the subject a session that is open, knowing of others."""
    given = [NONE, b"%d" % again, NONE, one.id, NONE, b"2", token, source.id, *limit]
    counts = [b"1", b"%d" % len(others), b"0", NONE if replaced is None else b"%d" % len(replaced)]
    words = [SUB, *(other.entry for other in others), *itertools.chain(*(replaced or ()))]
    keys = [one.session, INDEX, one.tries, source.session, *(other.session for other in others)]
    return Call("enroll", keys, [OF_ZO, *given, *counts, *words])


SEALED_ANEW: list[Replaced] = [(b":a", b"1", b"anew")]  # all that `start` stores


def listed(*those: New) -> list[bytes]:
    return [b"9" * 16, b"1", SUB, *(one.entry for one in those)]


def calls() -> list[Call]:
    """One call of each script that succeeds, in an order in which they do, and some more."""
    first, second, third, fourth, fifth, *others = (new() for _ in range(8))
    by_export, by_expire, by_end = others
    sealed, of_zo, older, another = (new() for _ in range(4))
    session = [first.session]
    return [
        Call("echo", [], []),
        start(first, idle=b"100"),
        start(first, again=True, idle=b"100"),
        Call("touch", session, [TOKEN]),
        Call("info", session, [TOKEN]),
        Call("expire", session, [TOKEN, b"300"]),
        Call("renew", session, [TOKEN, NEWER, b"1", b"10", b"realm...", b"a nonce."]),
        Call("renew", session, [TOKEN, NEWER, b"1", b"10", b"realm...", b"another."]),
        Call("renew", session, [TOKEN, NEWER, b"1", b"10", b"realm...", b"a nonce."]),
        Call("pset", session, [NEWER, b":b", b"2"]),
        Call("pset_if", session, [NEWER, b":c", b"3", b"absent", NONE, b"100"]),
        Call("pset_many", session, [NEWER, b"2", b"0", b":d", b"4", b":e", b"5"]),
        Call("pset_many", session, [NEWER, b"1", b"2", b":g", b"7", b":a", b":none"]),
        Call("pset_many", session, [NEWER, b"0", b"1", b":g"]),
        Call("open", session, [NEWER, NONE]),
        Call("open", session, [NEWER, b"3", b":c", b":d", b":none"]),
        Call("pincr", session, [NEWER, b":c", b"5"]),
        Call("pget", session, [NEWER, b":c"]),
        Call("pget", session, [NEWER, b":d"]),
        Call("pget_many", session, [NEWER, b":c", b":d"]),
        Call("pall", session, [NEWER]),
        Call("ppop", session, [NEWER, b":c"]),
        Call("pdel", session, [NEWER, b":e", b"a nonce"]),
        Call("pdel", session, [NEWER, b":e", b"a nonce"]),
        Call("pset_if", session, [NEWER, b":f", b"6", NONE, NONE, b"100"]),
        Call("pdel", session, [NEWER, b":f", b"another"]),
        Call("export", session, [NEWER, NONE]),
        Call("import", session, [NEWER, b"2", b":a", b"9", b":b", b"8"]),
        *(Call("mark", session, [sign]) for sign in (NONE, NEWER, TOKEN, b"gone")),
        sign_in(second, first, token=NEWER),
        sign_in(second, first, again=True, token=NEWER),
        Call("expire", [second.session], [OF_ZO, b"300"]),
        Call("expire", [second.session, INDEX], [OF_ZO, b"300", second.id]),
        *(enroll(third, again=again) for again in (False, True)),
        Call("mark", [INDEX], [NONE]),
        Call("index", [INDEX], []),
        Call("sessions", [INDEX, second.session, third.session], listed(second, third)),
        *(
            Call("end_one", [second.session, INDEX], [second.id, again, SUB])
            for again in (b"0", b"1")
        ),
        enroll(fourth, limit=(b"1", b"1")),
        enroll(fourth, third, limit=(b"1", b"1")),
        Call("end_one", [fourth.session, INDEX], [fourth.id, b"1", SUB]),
        start(sealed),
        Call("pset_if", [sealed.session], [TOKEN, b":b", b"2", NONE, NONE, b"0.0001"]),
        sign_in(of_zo, sealed, replaced=SEALED_ANEW),
        sign_in(of_zo, sealed, True, replaced=SEALED_ANEW),
        Call("end_one", [of_zo.session, INDEX], [of_zo.id, b"0", SUB]),
        start(sealed),
        enroll(older),
        *(
            sign_in(another, sealed, False, *those, replaced=SEALED_ANEW, limit=(b"1", b"1"))
            for those in ((), (older,))
        ),
        Call("end_one", [another.session, INDEX], [another.id, b"0", SUB]),
        enroll(fifth),
        Call("end_all", [INDEX, fifth.session], [NONE, *listed(fifth)]),
        Call("end_all", [INDEX], [NONE, *listed()]),
        Call("index", [INDEX], []),
        Call("sessions", [INDEX], listed()),
        *(Call("mark", session, [sign]) for sign in (NONE, TOKEN, b"gone")),
        *(start(other) for other in others),
        *(Call("export", [by_export.session], [TOKEN, NEWER]) for _ in range(2)),
        Call("mark", [by_export.session], [b"gone"]),
        Call("expire", [by_expire.session], [TOKEN, b"0"]),
        *(Call("end", [by_end.session], [TOKEN, again]) for again in (b"0", b"1")),
    ]


def test_every_script_runs_on_a_server_that_has_seen_none(server: Server) -> None:
    """On every server each script is unknown by its SHA-1 at first, and runs from its source."""
    unknown = set(SOURCES)
    with server.client() as client:
        client.script_flush()
        for call in calls():
            sha = sha1(SOURCES[call.name].encode(), usedforsecurity=False).hexdigest()
            if call.name in unknown:
                with pytest.raises(NoScriptError):
                    client.execute_command("EVALSHA", sha, *call.words())
                call.run(client)
                unknown.remove(call.name)
            else:
                assert client.execute_command("EVALSHA", sha, *call.words()).endswith(ECHO)
            assert without_end(client) == [], call
        assert not unknown


def without_end(client: Redis) -> list[bytes]:
    """No session is ever without an end, nor an index, nor what is noted of a try."""
    return [key for key in client.scan_iter() if client.pttl(key) < 0]


@pytest.mark.parametrize("opens", [start, enroll])
def test_an_end_that_comes_before_it_is_set_leaves_nothing(
    server: Server, opens: Callable[..., Call]
) -> None:
    """A session that is over while it is being opened leaves no payload behind without an end."""
    one = new()
    with server.client() as client:
        opens(one, ttl=b"0.0001").run(client)  # so little that it is over by then
        assert client.exists(one.session) == 0


# --- Redis keys that go while a script runs ---

# Lua that stands in front of a script and takes the place of what it calls Redis with.
REPLACED = """
local redis = {
  call = replaced(real.call), pcall = replaced(real.pcall),
  error_reply = real.error_reply, replicate_commands = real.replicate_commands,
}
"""

# A command that names what was there before and is gone breaks the script off.
WATCHED = f"""
local real, had, gone = redis, {{}}, {{}}
local function look()
  for _, key in ipairs(KEYS) do
    local there = real.call('EXISTS', key) == 1
    if had[key] and not there then gone[key] = true end
    had[key] = there
  end
end
local function replaced(call)
  return function(...)
    for _, word in ipairs({{...}}) do
      if gone[word] then error('what is gone was asked for') end
    end
    local reply = call(...)
    look()
    return reply
  end
end
look()
{REPLACED}"""


def test_what_is_gone_is_not_asked_for(server: Server) -> None:
    """No script names a Redis key that it deleted or emptied: in a slot that moves that fails."""
    with server.client() as client:
        for call in itertools.chain(calls(), emptying(client)):
            call.run(client, WATCHED)
        client.set("key", "x")
        asks = "redis.call('DEL', KEYS[1]) redis.call('GET', KEYS[1])"
        with pytest.raises(ResponseError, match="what is gone was asked for"):
            client.eval(WATCHED + asks, 1, "key")


def emptying(client: Redis) -> Iterator[Call]:
    """Calls each of which finds nothing live in an index, and empties it."""
    one = new()
    for call in (
        Call("index", [INDEX], []),
        Call("sessions", [INDEX, one.session], listed(one)),
        Call("end_all", [INDEX, one.session], [NONE, *listed(one)]),
    ):
        client.zadd(INDEX, {one.entry: 1 if call.name == "index" else 4e12})
        client.hset(one.session, "other", "x")  # it is there, and is no session
        yield call
        assert client.exists(INDEX) == 0, call
        client.delete(one.session)


@contextmanager
def moving(cluster: Cluster, slot: int) -> Iterator[Redis]:
    """The server of a slot that is about to move, with all that is in it."""
    here = cluster.server_of(slot)
    there = next(server for server in cluster.primaries() if server is not here)
    with here.client() as source, there.client() as target:
        target.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", cluster.id_of(here))
        source.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", cluster.id_of(there))
        try:
            yield source
        finally:
            for each in (source, target):
                each.execute_command("CLUSTER", "SETSLOT", slot, "STABLE")


@pytest.fixture
def cluster() -> Cluster:
    """The suite's cluster, empty."""
    if not _BINARIES:
        pytest.skip("no server was found")
    cluster = running_cluster()
    cluster.flushall()
    return cluster


def test_every_script_runs_in_a_slot_that_moves(cluster: Cluster) -> None:
    """What is still where a slot comes from is used there, to its end, by every script."""
    slot, ran = keyspace.slot_of(INDEX), set()
    with cluster.server_of(slot).client() as client:
        for call in itertools.chain(calls(), emptying(client)):
            if call.keys and client.exists(*call.keys) == len(call.keys):
                ran.add(call.name)
                with moving(cluster, slot) as source:
                    call.run(source)
            else:
                call.run(client)  # it names what is not there: such a slot sends it away
        for opens in (start, enroll):  # mostly nothing is noted of a session that is there
            one = new()
            opens(one).run(client)
            client.set(one.tries, "", px=1000)
            with moving(cluster, slot) as source:
                assert opens(one, again=True).run(source) == b""
            ran.add(opens(one).name)
    assert ran == set(SOURCES) - {"echo"}


def test_the_sessions_of_a_subject_in_a_slot_that_moves(cluster: Cluster, flavour: Flavour) -> None:
    """They are listed and ended, the last one too, which takes the index along."""
    gate = flavour.gate(flavour.cluster_client(cluster))
    ends: list[Callable[[str], object]] = [
        lambda _: gate.end_all("zo"),
        lambda token: gate.end_one("zo", gate.verify(token)),
    ]
    for end in ends:
        token = gate.start(300, subject="zo")
        with moving(cluster, keyspace.slot_of(INDEX)) as source:
            assert [info.id for info in gate.sessions("zo")] == [gate.verify(token)]
            end(token)
            assert source.dbsize() == 0


# Redis before 6 evicts what it likes in front of a script's first write, if that takes memory: here
# one of the script's own Redis keys.
EVICTED = f"""
local real, evicts = redis, true
local takes = {{HINCRBY = true, HSET = true, SET = true, ZADD = true}}
local writes = {{
  HDEL = true, PEXPIREAT = true, RENAME = true, UNLINK = true, ZREM = true,
  ZREMRANGEBYSCORE = true,
}}
local function replaced(call)
  return function(command, ...)
    if evicts and takes[command] then real.call('DEL', KEYS[%d]) end
    evicts = evicts and not takes[command] and not writes[command]
    return call(command, ...)
  end
end
{REPLACED}"""


def test_what_is_evicted_under_a_script_stays_behind_with_an_end(server: Server) -> None:
    """Whatever a full server evicts while a script runs, nothing is left without an end."""
    commands = {command for name in SOURCES for command in written(code(name))}
    assert commands == set(re.findall(r"\b[A-Z]{3,}(?= = true)", EVICTED))
    with server.client() as client:
        for call in calls():
            held = {key: (client.pttl(key), client.dump(key)) for key in client.scan_iter()}
            for number in range(len(call.keys)):
                with suppress(ResponseError):
                    call.run(client, EVICTED % (number + 1))
                assert without_end(client) == [], (call.name, number)
                client.flushdb()
                for key, (ttl, data) in held.items():
                    client.restore(key, ttl, data)
            call.run(client)


# --- what arrives late ---

# How a session is opened: a start without a subject, with one, and a sign-in.
OPENINGS: dict[str, Callable[[New, New, bool], Call]] = {
    "start": lambda one, _, again: start(one, again),
    "enroll": lambda one, _, again: enroll(one, again=again),
    "sign-in": sign_in,
    "sealed sign-in": lambda one, source, again: sign_in(one, source, again, replaced=SEALED_ANEW),
}


def refused(code: str) -> "pytest.RaisesExc[ResponseError]":
    return pytest.raises(ResponseError, match=f"^{code} {ECHO.decode()}$")


@pytest.mark.parametrize("ends_behind", range(-1, 4))
@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("opening", OPENINGS)
def test_no_try_brings_a_session_back(
    server: Server, opening: str, first: int, ends_behind: int
) -> None:
    """Of all tries of a start one at most opens a session, and none does after its end."""
    one, source = new(), new()
    opened = noted = ended = False
    with server.client() as client:
        start(source).run(client)
        for at in range(4):
            again = at != first  # wherever the first try arrives among its repetitions
            call = OPENINGS[opening](one, source, again)
            there = client.exists(one.session) == 1
            if again and there:
                before = client.dump(one.session)
                assert call.run(client) == b""
                assert client.dump(one.session) == before
            elif again or noted or ended:
                with refused("IDTAKEN"):
                    call.run(client)
            else:
                assert call.run(client) == b""
                opened = True
            assert client.exists(one.session) == (opened and not ended)
            noted |= again and not there
            assert client.get(one.tries) == (b"" if noted else None)
            if noted:
                assert 3_590_000 < client.pttl(one.tries) <= 3_600_000
            if at == ends_behind and opened:
                Call("end", [one.session], [call.args[0], b"0"]).run(client)
                ended = True
        assert opened == (first == 0)
        assert client.exists(one.session) == (opened and not ended)
        # A sign-in that moved nothing left the session as it was.
        assert client.exists(source.session) == ("sign-in" not in opening or not opened)


@pytest.mark.parametrize("opening", OPENINGS)
def test_a_start_that_is_not_sent_again_leaves_nothing_to_know_it_by(
    server: Server, opening: str
) -> None:
    """Something is noted of a repetition that finds no session; all others cost no memory."""
    one, source = new(), new()
    with server.client() as client:
        start(source).run(client)
        for again in (False, True):
            OPENINGS[opening](one, source, again).run(client)
            assert client.exists(one.session) == 1
            assert client.exists(one.tries) == 0


def test_a_start_that_was_refused_is_not_made_up_for(server: Server) -> None:
    """Once the caller was told that the subject has too many, no earlier try opens a session."""
    lost, one, other = new(), new(), new()
    with server.client() as client:
        enroll(other).run(client)
        full = (b"1", b"0")
        for held_up in (enroll(lost, limit=full), enroll(lost, other, limit=full)):
            with refused("IDTAKEN"):
                held_up._replace(args=[*held_up.args[:2], b"1", *held_up.args[3:]]).run(client)
        assert enroll(one, limit=full).run(client) == other.entry
        with refused("TOOMANY"):
            enroll(one, other, limit=full).run(client)
        assert client.exists(one.tries) == 0  # it was answered: no try of it is on its way
        Call("end", [other.session], [TOKEN, b"0"]).run(client)
        for held_up in (enroll(lost, limit=full), enroll(lost, other, limit=full)):
            with refused("IDTAKEN"):
                held_up.run(client)
        assert client.exists(lost.session, one.session) == 0


# --- payloads that are replaced ---


def in_ms(milliseconds: int) -> bytes:
    """An end of a payload, so far from now."""
    return b"%013d" % (time.time() * 1000 + milliseconds)


def everything(client: Redis) -> dict[object, object]:
    """All that a server holds, but for when it ends."""
    return {key: content(client, key) for key in client.scan_iter()}


def content(client: Redis, key: bytes | str) -> object:
    """What stands there, however it is encoded."""
    if client.type(key) == b"hash":
        return client.hgetall(key)
    if client.type(key) == b"zset":
        return client.zrange(key, 0, -1, withscores=True)
    return client.dump(key)


def put(client: Redis, one: New, fields: Mapping[bytes, bytes]) -> None:
    """Write to a session past the scripts."""
    for name, data in fields.items():
        client.hset(one.session, name, data)


def exported(client: Redis, one: New) -> list[Replaced]:
    """A session's payloads as it tells them, each to become what says which it was."""
    fields = items(Call("export", [one.session], [TOKEN, NONE]).run(client))[3:]
    return [(name, held, anew(name, held)) for name, held in batched(fields)]


def batched(fields: list[bytes]) -> list[tuple[bytes, bytes]]:
    return list(zip(fields[::2], fields[1::2], strict=True))


def anew(name: bytes, held: bytes) -> bytes:
    """What is to stand there: the end, if it has one, is what it was."""
    return (held[:13] if name.startswith(b";") else b"") + b"anew: " + name


def payloads(client: Redis, one: New) -> dict[bytes, bytes]:
    held = cast("dict[bytes, bytes]", client.hgetall(one.session))
    return {name: data for name, data in held.items() if name[:1] in {b":", b";"}}


FAR = in_ms(1_000_000)
HELD = {b":a": b"1", b":b": b"\x00\xff" * 1000, b":": b"", b";t": FAR + b"2", b";u": FAR}


def opened(client: Redis, idle: bytes = NONE) -> New:
    """A session with payloads, with an end of their own and without."""
    one = new()
    start(one, idle=idle).run(client)
    put(client, one, HELD)
    return one


def test_payloads_are_replaced_when_a_session_is_given_to_a_subject(server: Server) -> None:
    """The session goes on under its new id with other data in each field, and else as it was."""
    with server.client() as client:
        for idle in (NONE, b"100"):
            one, source = new(), opened(client, idle)
            before, left = client.hgetall(source.session), client.pttl(source.session)
            replaced = exported(client, source)
            assert {name: held for name, held, _ in replaced} == HELD
            assert sign_in(one, source, replaced=replaced).run(client) == b""
            held = client.hgetall(one.session)
            assert payloads(client, one) == {name: anew(name, data) for name, data in HELD.items()}
            assert {name: held[name] for name in held if name not in HELD} == {
                b"fp": OF_ZO + before[b"fp"][16:],
                b"sub": SUB,
                b"gen": b"2",
            }
            assert client.exists(source.session) == 0
            assert left - 5_000 < client.pttl(one.session) <= left
            assert client.zscore(INDEX, before[b"fp"][16:32] + one.id) is not None


def test_a_session_without_payloads_has_none_to_be_replaced(server: Server) -> None:
    """With none named, a session that has none is given to the subject, and one that has is not."""
    with server.client() as client:
        for held in ({}, {b";over": b"0" * 13}, {b":a": b"1"}, {b";a": FAR}):
            one, source = new(), new()
            start(source).run(client)
            client.hdel(source.session, ":a")
            put(client, source, held)
            before = everything(client)
            if exported(client, source):
                with refused("CHANGED"):
                    sign_in(one, source, replaced=[]).run(client)
                assert everything(client) == before
            else:
                assert sign_in(one, source, replaced=[]).run(client) == b""
                assert client.exists(source.session) == 0


# What happens to a session between the reading of its payloads and the sign-in.
CHANGES: dict[str, dict[bytes, bytes | None]] = {
    "one more": {b":c": b"3"},
    "one more that is timed": {b";c": FAR + b"3"},
    "one less": {b":a": None},
    "one less that is timed": {b";t": None},
    "none": dict.fromkeys(HELD),
    "other data": {b":a": b"2"},
    "other data behind the same": {b":a": b"12"},
    "no data": {b":a": b""},
    "data where there was none": {b":": b"1"},
    "other data of a timed one": {b";t": FAR + b"3"},
    "another field": {b":a": None, b":c": b"1"},
    "data of two fields exchanged": {b":a": HELD[b":b"], b":b": b"1"},
    "timed by now": {b":a": None, b";a": FAR + b"1"},
    "timed no more": {b";t": None, b":t": b"2"},
    "timed no more, its end now data": {b";t": None, b":t": FAR + b"2"},
    "another end": {b";t": b"%013d" % (int(FAR) + 1) + b"2"},
    "an end with fewer digits": {b";t": FAR[1:] + b"2"},
    "an end without digits": {b";t": b"x" * 13 + b"2"},
    "over": {b";t": b"1" * 13 + b"2"},
    "alive": {b";over": FAR + b"3"},
    "another one in its place": {b":a": None, b";over": FAR + b"3"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_not_replaced(server: Server, change: str) -> None:
    """If payloads are not those that were read, nothing is done; read again, they are replaced."""
    one, older = new(), new()
    with server.client() as client:
        enroll(older).run(client)
        source = opened(client)
        client.hset(source.session, ";over", b"0" * 13 + b"3")
        replaced = exported(client, source)
        assert {name for name, _, _ in replaced} == set(HELD)
        for name, data in CHANGES[change].items():
            if data is None:
                client.hdel(source.session, name)
            else:
                client.hset(source.session, name, data)
        before, left = everything(client), client.pttl(source.session)
        for others, limit in (((), b"5"), ((older,), b"1")):
            with refused("CHANGED"):
                sign_in(one, source, False, *others, replaced=replaced, limit=(limit, b"1")).run(
                    client
                )
        assert everything(client) == before
        assert left - 5_000 < client.pttl(source.session) <= left
        now = exported(client, source)
        assert now != replaced
        call = sign_in(one, source, False, older, replaced=now, limit=(b"1", b"1"))
        assert call.run(client) == b""
        held = payloads(client, one)
        assert {name: held[name] for name, _, _ in now} == {name: data for name, _, data in now}
        assert client.exists(source.session, older.session) == 0


WRONG: dict[str, list[Replaced]] = {
    "one is named twice in the place of another": [(b":a", b"1", b"2"), (b":a", b"1", b"2")],
    "one is not there": [(b":a", b"1", b"2"), (b":c", b"3", b"2")],
    "one is over": [(b":a", b"1", b"2"), (b";over", b"0" * 13, b"2")],
    "one is a field of the protocol": [(b":a", b"1", b"2"), (b"other", b"x", b"2")],
    "one too many": [(b":a", b"1", b"2"), (b":b", b"2", b"2"), (b":c", b"3", b"2")],
    "one too few": [(b":a", b"1", b"2")],
    "none": [],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_only_a_sessions_own_payloads_are_replaced(server: Server, wrong: str) -> None:
    """Whoever names other payloads than the session has, each of them once, replaces none."""
    one, source = new(), new()
    with server.client() as client:
        start(source).run(client)
        put(client, source, {b":b": b"2", b";over": b"0" * 13, b"other": b"x"})
        before = everything(client)
        with refused("CHANGED"):
            sign_in(one, source, replaced=WRONG[wrong]).run(client)
        assert everything(client) == before


@pytest.mark.parametrize("over", [b"0" * 13, b"1" * 13 + b"2", b"", b"x", b"x" * 13, b"12345"])
def test_what_is_over_does_not_hinder(server: Server, over: bytes) -> None:
    """A payload whose end is over is not told, need not be named, and stays over."""
    one = new()
    with server.client() as client:
        source = opened(client)
        client.hset(source.session, ";over", over)
        replaced = exported(client, source)
        assert b";over" not in [name for name, _, _ in replaced]
        assert sign_in(one, source, replaced=replaced).run(client) == b""
        with refused("NOPAYLOAD"):
            Call("pget", [one.session], [OF_ZO, b":over"]).run(client)


def test_a_payload_that_ends_between_is_read_no_more(server: Server) -> None:
    """One that was read and is over by the sign-in has changed; then the others are replaced."""
    one = new()
    with server.client() as client:
        source = opened(client)
        client.hset(source.session, ";short", in_ms(1_000) + b"3")
        replaced = exported(client, source)
        assert len(replaced) == len(HELD) + 1
        time.sleep(1.1)
        with refused("CHANGED"):
            sign_in(one, source, replaced=replaced).run(client)
        assert client.exists(one.session) == 0
        assert sign_in(one, source, replaced=exported(client, source)).run(client) == b""


def test_what_changed_is_told_only_to_who_opens_the_session(server: Server) -> None:
    """Another fingerprint is NOSESSION, whatever it names; and to ask with the right one is use."""
    one = new()
    with server.client() as client:
        source = opened(client, b"100")
        client.pexpire(source.session, 20_000)
        for replaced in (exported(client, source), [], SEALED_ANEW):
            client.pexpire(source.session, 20_000)
            with refused("NOSESSION"):
                sign_in(one, source, token=NEWER, replaced=replaced).run(client)
            assert client.pttl(source.session) <= 20_000
        with refused("CHANGED"):
            sign_in(one, source, replaced=SEALED_ANEW).run(client)
        assert 99_000 < client.pttl(source.session) <= 100_000
        assert payloads(client, source) == HELD


def test_replacements_and_the_limit(server: Server) -> None:
    """Until the sessions are known nothing is replaced, nor where the subject has too many."""
    one, older = new(), new()
    with server.client() as client:
        source = opened(client)
        enroll(older).run(client)
        replaced, before = exported(client, source), everything(client)
        for evicts in (b"0", b"1"):
            call = sign_in(one, source, replaced=replaced, limit=(b"1", evicts))
            assert call.run(client) == older.entry
        with refused("TOOMANY"):
            sign_in(one, source, False, older, replaced=replaced, limit=(b"1", b"0")).run(client)
        assert everything(client) == before
        call = sign_in(one, source, False, older, replaced=replaced, limit=(b"1", b"1"))
        assert call.run(client) == b""
        assert payloads(client, one) == {name: data for name, _, data in replaced}
        assert set(everything(client)) == {one.session, INDEX}
        assert [entry[16:] for entry in client.zrange(INDEX, 0, -1)] == [one.id]


@pytest.mark.parametrize("evicts", [b"0", b"1"])
def test_a_session_of_the_subject_is_replaced_in_its_own_place(
    server: Server, evicts: bytes
) -> None:
    """At a full limit a session that is the subject's already signs in again, and nobody goes."""
    source, older, one = new(), new(), new()
    with server.client() as client:
        for each in (older, source):
            enroll(each).run(client)
        call = sign_in(one, source, replaced=SEALED_ANEW, limit=(b"2", evicts))
        assert call.run(client) == b""
        assert payloads(client, one) == {b":a": b"anew"}
        assert set(everything(client)) == {one.session, older.session, INDEX}
        assert {entry[16:] for entry in client.zrange(INDEX, 0, -1)} == {one.id, older.id}


def test_a_replacement_that_is_sent_again_leaves_what_came_since(server: Server) -> None:
    """Once it ran, its repetition succeeds and replaces nothing, whatever was stored meanwhile."""
    one = new()
    with server.client() as client:
        source = opened(client)
        replaced = exported(client, source)
        sign_in(one, source, replaced=replaced).run(client)
        Call("pset", [one.session], [OF_ZO, b":a", b"since"]).run(client)
        Call("pdel", [one.session], [OF_ZO, b":b", b"a nonce"]).run(client)
        before = everything(client)
        assert sign_in(one, source, True, replaced=replaced).run(client) == b""
        with refused("IDTAKEN"):
            sign_in(one, source, replaced=replaced).run(client)
        assert everything(client) == before


def test_a_full_server_replaces_nothing(own_server: Server) -> None:
    """Without memory all stays as it was, the session and its payloads under the old id."""
    one, other = new(), new()
    with own_server.client() as client:
        source = opened(client)
        enroll(other).run(client)
        replaced, before = exported(client, source), everything(client)
        client.config_set("maxmemory", 1)
        for others, limit in (((), b"5"), ((other,), b"1")):
            call = sign_in(one, source, False, *others, replaced=replaced, limit=(limit, b"1"))
            with pytest.raises(ResponseError, match=rf"command not allowed .*{ECHO.decode()}$"):
                call.run(client)
        assert everything(client) == before
        client.config_set("maxmemory", 0)
        assert sign_in(one, source, replaced=replaced).run(client) == b""
        assert payloads(client, one) == {name: data for name, _, data in replaced}


def test_a_sign_in_waits_for_a_slot_that_moves(cluster: Cluster) -> None:
    """It names what is not there yet, so a slot that moves takes it later, replacements or not."""
    slot = keyspace.slot_of(INDEX)
    with cluster.server_of(slot).client() as client:
        for replaced in (None, SEALED_ANEW):
            one, source = new(), new()
            start(source).run(client)
            before = everything(client)
            with moving(cluster, slot) as here, pytest.raises(TryAgainError):
                sign_in(one, source, replaced=replaced).run(here)
            assert everything(client) == before
            sign_in(one, source, replaced=replaced).run(client)
            assert payloads(client, one) == {b":a": b"anew" if replaced else b"1"}


def test_a_sign_in_that_lost_words_is_incomplete(server: Server) -> None:
    """If a digit of how many are replaced is missing, or words at the end, nothing is done."""
    one, source = new(), new()
    with server.client() as client:
        start(source).run(client)
        put(client, source, {b":%d" % number: b"1" for number in range(11)})
        replaced = exported(client, source)
        before, call = everything(client), sign_in(one, source, replaced=replaced)
        assert call.args[14] == b"12"
        for count in (b"1", b"2", b"", b"112", b"0", b"x"):
            with refused("INCOMPLETE"):
                call._replace(args=[*call.args[:14], count, *call.args[15:]]).run(client)
        # As of a request whose number of words lost a digit, or some: what is last is its echo.
        for length in range(14, len(call.args)):
            with refused("INCOMPLETE"):
                call._replace(args=call.args[:length]).run(client)
        for fields in (call.args[14:], [NONE, *call.args[15:]]):  # the number of payloads as well
            with refused("INCOMPLETE"):
                call._replace(args=[*call.args[:13], b"1", *fields]).run(client)
        assert everything(client) == before
        assert call.run(client) == b""


# --- payloads whose end is over ---

# What may stand under `;` and is over: an end that has come, or none at all.
OVER = [
    *(b"0" * 13, b"1" * 13 + b"data", b"", b"x", b"12345", b"x" * 13, b"x" * 13 + b"data"),
    *(
        b"\xc1SG\x01" + b"\0" * 60,
        b"-" + b"9" * 12 + b"data",
        b"9" * 12 + b"x" + b"data",
        b"\0" * 13,
    ),
    *(b" " * 13, b"1.5", b"\n"),
]


@pytest.mark.parametrize("over", OVER)
def test_what_is_over_is_not_there_for_any_script(server: Server, over: bytes) -> None:
    """A payload whose end is over, or that has none, is not there, and breaks no script off."""
    one = new()
    session, met = [one.session], set()
    none: list[tuple[str, list[bytes]]] = [
        ("pget", [b":x"]),
        ("ppop", [b":x"]),
        ("pdel", [b":x", b"a nonce"]),
    ]
    some: list[tuple[str, list[bytes]]] = [
        ("pall", []),
        ("open", [NONE]),
        ("open", [b"3", b":x", b":a", b":y"]),
    ]
    with server.client() as client:
        enroll(one).run(client)
        client.hset(one.session, ";y", FAR + b"2")

        def run(name: str, *args: bytes) -> bytes:
            client.hset(one.session, ";x", over)
            met.add(name)
            return Call(name, session, [TOKEN, *args]).run(client)

        for name, args in none:
            with refused("NOPAYLOAD"):
                run(name, *args)
        assert client.hexists(one.session, ";x") == 0  # `pdel` met it
        held = [b"a", b"1", b"y", b"2"]
        assert items(run("pget_many", b":x", b":a", b":y")) == held
        for name, args in some:
            told = items(run(name, *args))[6 if name == "open" else 0 :]
            assert sorted(batched(told)) == sorted(batched(held))
        sizes = sorted(batched([b"a", b"1", b"y", b"1"]))
        assert sorted(batched(items(run("info"))[6:])) == sizes
        _, entry, facts = items(Call("sessions", [INDEX, *session], listed(one)).run(client))
        assert entry == one.entry
        assert sorted(batched(items(facts)[6:])) == sizes
        assert sorted(batched(items(run("export", NONE))[3:])) == [
            (b":a", b"1"),
            (b";y", FAR + b"2"),
        ]
        for condition, expected in ((b"match", NONE), (b"match", over), (b"match", over[13:])):
            with refused("CONFLICT"):
                run("pset_if", b":x", b"3", condition, expected, NONE)
        for ttl in (NONE, b"100"):
            run("pset_if", b":x", b"3", b"absent", NONE, ttl)
            assert Call("pget", session, [TOKEN, b":x"]).run(client) == b"3"
            client.hdel(one.session, ":x")
        assert run("pincr", b":x", b"5") == b"5"
        assert payloads(client, one) == {b":a": b"1", b":x": b"5", b";y": FAR + b"2"}
        client.hdel(one.session, ":x")
        run("pset_many", b"0", b"1", b":x")
        run("pset", b":x", b"3")
        run("pset_many", b"1", b"0", b":x", b"4")
        assert client.hget(one.session, ":x") == b"4"
        client.hset(one.session, ";x", over)
        taken = items(take(one).run(client))
        assert b";x" not in taken[3::2]
    assert met >= {
        name for name in SOURCES if "';' .. " in code(name) or "== ';'" in code(name)
    } - {*("enroll", "import", "sessions")}


def test_what_is_over_goes_when_there_are_many(server: Server) -> None:
    """At 16 fields a conditional store forgets what is over, and what has no end as well."""
    one = new()
    with server.client() as client:
        start(one).run(client)
        put(client, one, {b";%d" % number: over for number, over in enumerate(OVER[:13])})
        Call("pset_if", [one.session], [TOKEN, b":y", b"2", NONE, NONE, b"100"]).run(client)
        assert {name[:2] for name in payloads(client, one)} == {b":a", b";y"}


# --- an end that is sent again ---


def test_an_end_that_is_sent_again_wants_the_session_gone(server: Server) -> None:
    """One that is gone is success; one that is there under another token or subject is not."""
    one, gone = new(), new()
    with server.client() as client:
        enroll(one).run(client)
        held = client.dump(one.session), client.dump(INDEX)
        for again in (b"0", b"1"):
            with refused("NOSESSION"):
                Call("end", [one.session], [NEWER, again]).run(client)
            for subs in ([], [b"realm..." + b"other"], [b"another." + b"zo"]):
                with refused("NOSESSION"):
                    Call("end_one", [one.session, INDEX], [one.id, again, *subs]).run(client)
        assert (client.dump(one.session), client.dump(INDEX)) == held
        ends = [
            Call("end", [gone.session], [TOKEN, b"0"]),
            Call("end_one", [gone.session, INDEX], [gone.id, b"0", SUB]),
        ]
        for end in ends:
            with refused("NOSESSION"):
                end.run(client)
            repeated = end._replace(args=[end.args[0], b"1", *end.args[2:]])
            assert repeated.run(client) == b""
            enroll(gone).run(client)
            assert repeated.run(client) == b""  # the first may never have come
            assert client.exists(gone.session) == 0


def test_an_old_token_ends_a_session_when_it_is_sent_again(server: Server) -> None:
    """A repeated end by a token in its grace ends the session, and by one past it does not."""
    one = new()
    with server.client() as client:
        start(one).run(client)
        for old, newer, grace in ((TOKEN, NEWER, b"0"), (NEWER, OF_ZO, b"100")):
            Call("renew", [one.session], [old, newer, b"1", grace, b"realm...", old[:8]]).run(
                client
            )
        with refused("NOSESSION"):
            Call("end", [one.session], [TOKEN, b"1"]).run(client)
        assert Call("end", [one.session], [NEWER, b"1"]).run(client) == b""
        assert client.exists(one.session) == 0


# --- a session that was taken to another slot ---


def items(text: bytes) -> list[bytes]:
    """The items of a list."""
    found = []
    while text:
        length, _, text = text.partition(b":")
        found.append(text[: int(length)])
        text = text[int(length) :]
    return found


TAKER, ANOTHER = b"4" * 16, b"5" * 16


def take(one: New, taker: bytes = TAKER, token: bytes = TOKEN) -> Call:
    return Call("export", [one.session], [token, taker])


@pytest.mark.parametrize("idle", [NONE, b"30", b"100", b"3000"])
@pytest.mark.parametrize("ttl", [b"20", b"300"])
def test_a_session_that_was_taken_is_there_for_its_taker_a_minute_at_most(
    server: Server, ttl: bytes, idle: bytes
) -> None:
    """Who took it gets the same once more, nobody else does, and no asking makes it last longer."""
    one, longest = new(), min(int(ttl), 60) * 1000
    with server.client() as client:
        start(one, ttl=ttl, idle=idle).run(client)
        Call("pset_if", [one.session], [TOKEN, b":b", b"2", NONE, NONE, b"100"]).run(client)
        held = client.hgetall(one.session)
        seen = items(take(one, NONE).run(client))
        for token in (NEWER, TAKER, b""):
            with refused("NOSESSION"):
                take(one, token=token).run(client)
        assert client.hgetall(one.session) == held  # it was left
        taken = items(take(one).run(client))
        left = client.pttl(one.session)
        assert 0 < left <= longest
        for _ in range(3):
            with refused("NOSESSION"):
                take(one, ANOTHER).run(client)
            with refused("NOSESSION"):
                take(one, NONE).run(client)
            # What stands there, and when it was started; the time that is left need not.
            again = items(take(one).run(client))
            for each in (taken, again):
                assert [each[0], each[2], *sorted(each[3:])] == [
                    *(seen[0], seen[2], *sorted(seen[3:]))
                ]
            assert 0 < client.pttl(one.session) <= longest
        fp = held.pop(b"fp")
        assert client.hgetall(one.session) == {**held, b"taken": TAKER + fp}
        assert client.exists(one.session) == 1


def test_a_session_with_little_left_is_not_prolonged_by_being_taken(server: Server) -> None:
    """What a session had left when it was taken is the most that it has afterwards."""
    one = new()
    with server.client() as client:
        start(one).run(client)
        client.pexpire(one.session, 5_000)
        for _ in range(2):
            take(one).run(client)
            assert 0 < client.pttl(one.session) <= 5_000


def test_an_old_token_takes_a_session_with_its_grace(server: Server) -> None:
    """A token in its grace takes the session, and asks again; one past it takes nothing."""
    one = new()
    with server.client() as client:
        start(one).run(client)
        for old, newer, grace in ((TOKEN, NEWER, b"0"), (NEWER, OF_ZO, b"1")):
            Call("renew", [one.session], [old, newer, b"1", grace, b"realm...", old[:8]]).run(
                client
            )
        with refused("NOSESSION"):
            take(one).run(client)
        taken = take(one, token=NEWER).run(client)
        time.sleep(1.1)
        # It was taken while its grace lasted: whoever took it has it.
        assert sorted(items(take(one, token=NEWER).run(client))[3:]) == sorted(items(taken)[3:])


def test_no_script_opens_or_lists_a_session_that_was_taken(server: Server) -> None:
    """For every other script there is no session where one was taken, under any of its tokens."""
    one, other = new(), new()
    session, met = [one.session], set()
    opening: list[tuple[str, list[bytes]]] = [
        ("touch", []),
        ("info", []),
        ("expire", [b"300"]),
        ("expire", [b"0"]),
        ("renew", [ANOTHER, b"2", b"10", b"realm...", b"another."]),
        ("renew", [NEWER, b"1", b"10", b"realm...", b"a nonce."]),  # sent again
        ("pset", [b":a", b"2"]),
        ("pset_if", [b":a", b"2", NONE, NONE, NONE]),
        ("pset_many", [b"1", b"0", b":a", b"2"]),
        ("pset_many", [b"0", b"1", b":a"]),
        ("pincr", [b":a", b"1"]),
        ("pget", [b":a"]),
        ("pget_many", [b":a"]),
        ("pall", []),
        ("open", [NONE]),
        ("open", [b"1", b":a"]),
        ("pdel", [b":a", b"a nonce"]),
        ("ppop", [b":a"]),
        ("export", [NONE]),
        ("import", [b"1", b":a", b"2"]),
        ("end", [b"0"]),
    ]
    with server.client() as client:
        enroll(one).run(client)
        renew = [TOKEN, NEWER, b"1", b"100", b"realm...", b"a nonce."]
        Call("renew", session, renew).run(client)
        take(one, token=NEWER).run(client)
        held = client.dump(one.session), client.pttl(one.session)
        for token in (TOKEN, NEWER, TAKER):
            for name, args in opening:
                met.add(name)
                with refused("NOSESSION"):
                    Call(name, session, [token, *args]).run(client)
            with refused("NOSESSION"):
                Call("expire", [*session, INDEX], [token, b"300", one.id]).run(client)
            with refused("NOSESSION"):
                sign_in(other, one, token=token).run(client)
            # It is gone, if that is what was asked for.
            assert Call("end", session, [token, b"1"]).run(client) == b""
        with refused("NOSESSION"):
            Call("end_one", [*session, INDEX], [one.id, b"0", SUB]).run(client)
        assert Call("end_one", [*session, INDEX], [one.id, b"1", SUB]).run(client) == b""
        assert Call("mark", session, [b"gone"]).run(client) == b"1"
        assert Call("mark", session, [NEWER]).run(client) == b"0"
        for opens in (start, enroll):
            for again in (False, True):
                with refused("IDTAKEN"):
                    opens(one, again=again).run(client)
        # It takes no room of the limit.
        assert enroll(other, one, limit=(b"1", b"0")).run(client) == b""
        client.zadd(INDEX, {one.entry: 4e12})
        both = [INDEX, *session, other.session]
        moved, *told = items(Call("sessions", both, listed(one, other)).run(client))
        assert (moved, told[::2]) == (NONE, [other.entry])
        assert client.zscore(INDEX, one.entry) is None
        client.zadd(INDEX, {one.entry: 4e12})
        assert Call("end_all", both, [other.id, *listed(one, other)]).run(client) == b"0:"
        assert client.zscore(INDEX, one.entry) is None
        assert client.dump(one.session) == held[0]
        assert client.pttl(one.session) <= held[1]
    met |= {"start", "enroll", "end_one", "mark", "sessions", "end_all"}
    assert met == set(SOURCES) - {"echo", "index"}  # that one looks at no session


def test_a_session_is_taken_by_one_of_two(server: Server) -> None:
    """Of two who would take a session the first gets it, and the second none, however often."""
    one = new()
    with server.client() as client:
        start(one).run(client)
        take(one).run(client)
        for _ in range(2):
            with refused("NOSESSION"):
                take(one, ANOTHER).run(client)
            take(one).run(client)


def test_a_deletion_that_comes_late_deletes_nothing(server: Server) -> None:
    """A `pdel` that its own repetition overtook leaves what was stored meanwhile."""
    one = new()
    with server.client() as client:
        start(one).run(client)
        for ttl in (NONE, b"100"):
            for nonce in (b"nonce%02d" % n for n in range(20)):
                delete = Call("pdel", [one.session], [TOKEN, b":a", nonce])
                store = Call("pset_if", [one.session], [TOKEN, b":a", b"2", NONE, NONE, ttl])
                store.run(client)
                delete.run(client)
                store.run(client)
                delete.run(client)
                assert Call("pget", [one.session], [TOKEN, b":a"]).run(client) == b"2"
                assert client.hstrlen(one.session, "did") <= 64


def test_a_deletion_that_found_nothing_finds_nothing_later(server: Server) -> None:
    """A `pdel` whose repetition was told that there is no payload deletes none that came since."""
    one = new()
    with server.client() as client:
        start(one).run(client)
        delete = Call("pdel", [one.session], [TOKEN, b":b", b"a nonce"])
        with refused("NOPAYLOAD"):
            delete.run(client)
        for ttl in (NONE, b"100"):
            Call("pset_if", [one.session], [TOKEN, b":b", b"2", NONE, NONE, ttl]).run(client)
            with refused("NOPAYLOAD"):
                delete.run(client)
            assert Call("pget", [one.session], [TOKEN, b":b"]).run(client) == b"2"


# --- a mark ---


@pytest.fixture
def replicated(own_server: Server) -> Iterator[Redis]:
    """A client of a server of this test alone, with a replica that it does not ping."""
    with own_server.client() as client:
        client.config_set("repl-diskless-sync-delay", 0)
        client.config_set("repl-ping-slave-period", 3_600)
        with Server(own_server.binary, ("--slaveof", "127.0.0.1", str(own_server.port))):
            deadline = time.monotonic() + 20
            while client.info("replication").get("slave0", {}).get("state") != "online":
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield client


def test_a_mark_changes_nothing_and_is_replicated(replicated: Redis) -> None:
    """It is a write, to a session, an index or what is not there, and changes none of them."""
    client, one = replicated, new()
    start(one, idle=b"100").run(client)
    enroll(new()).run(client)
    Call("mark", [one.session], [NONE]).run(
        client
    )  # Redis 4 replicates the text of each script once
    signs = (NONE, TOKEN, NEWER, b"gone")  # of these none is less of a write
    marked = ((INDEX, NONE), *((key, sign) for key in (one.session, one.tries) for sign in signs))
    for key, sign in marked:
        # The machine may stand still between two commands of a script: not five times.
        lost = []
        for _ in range(5):
            end = round(time.time() * 1000) + 50_000
            client.pexpireat(key, end)
            before = client.dump(key), client.info("replication")["master_repl_offset"]
            Call("mark", [key], [sign]).run(client)
            assert client.dump(key) == before[0]
            assert client.info("replication")["master_repl_offset"] > before[1]
            lost.append(end - end_of(client, key))
        assert min(lost) >= 0, "a session must not live longer for it"
        assert client.exists(key) == 0 or min(lost) <= 1


def end_of(client: Redis, key: bytes) -> float:
    """When it ends, in milliseconds since 1970: never later than it does."""
    now = "local now = redis.call('TIME') now = now[1] * 1000 + math.floor(now[2] / 1000)"
    return max(
        float(client.eval(f"{now} return now + redis.call('PTTL', KEYS[1])", 1, key))
        for _ in range(5)
    )


def test_a_mark_works_without_memory(own_server: Server) -> None:
    """A full server refuses no mark, whatever is there."""
    one = new()
    with own_server.client() as client:
        enroll(one).run(client)
        client.config_set("maxmemory", 1)
        for key in (one.session, INDEX, one.tries):
            assert Call("mark", [key], [NONE]).run(client) == b"1"
        for sign, has in ((TOKEN, b"1"), (NEWER, b"0"), (b"gone", b"0")):
            assert Call("mark", [one.session], [sign]).run(client) == has
        assert Call("mark", [one.tries], [b"gone"]).run(client) == b"1"
        assert client.exists(one.tries) == 0


def test_a_mark_tells_whether_the_server_has_what_was_written(server: Server) -> None:
    """It knows it by the session's fingerprint, by that there is no session, or not at all."""
    one, none, taken, renewed = (new() for _ in range(4))
    signs = (NONE, TOKEN, NEWER, b"gone")
    expected = {
        one: b"1100",
        none: b"1001",
        taken: b"1001",
        renewed: b"1010",  # the old token's grace does not matter
    }
    with server.client() as client:
        start(one, idle=b"100").run(client)
        enroll(taken).run(client)
        take(taken).run(client)
        start(renewed).run(client)
        renew = [TOKEN, NEWER, b"1", b"100", b"realm...", b"a nonce."]
        Call("renew", [renewed.session], renew).run(client)
        held = {key: client.dump(key) for key in client.scan_iter()}
        for which, told in expected.items():
            marks = [Call("mark", [which.session], [sign]).run(client) for sign in signs]
            assert b"".join(marks) == told
        assert Call("mark", [INDEX], [NONE]).run(client) == b"1"
        assert {key: client.dump(key) for key in client.scan_iter()} == held
