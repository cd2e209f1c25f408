"""The Lua files: what they all keep to, and that each runs on every server.

What each of them does is tested where its operation is; that its header is true, with the protocol.
"""

import re
import textwrap
from hashlib import sha1
from pathlib import Path

import pytest
from redis.exceptions import NoScriptError

from sessiongate import keyspace, scripts

from .servers import Server

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
    "What is to be told of a session, as a list.": 25,
    "The index ends with the last of its sessions.": 3,
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
    *("EXISTS", "HEXISTS", "HGET", "HGETALL", "HKEYS", "HMGET", "HSTRLEN", "PTTL", "TIME"),
    *("ZCARD", "ZCOUNT", "ZRANGE", "ZRANGEBYSCORE", "ZREVRANGE"),
}

every_script = pytest.mark.parametrize("name", SOURCES)


def header(name: str) -> str:
    """The comment that a script begins with."""
    lines = SOURCES[name].splitlines()
    length = next(n for n, line in enumerate(lines) if not line.startswith("--"))
    return "\n".join(lines[:length])


def code(name: str) -> str:
    """A script without its comments."""
    return re.sub(r"--.*", "", SOURCES[name])


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
    assert re.match(r"-- [A-Z].*\.", header(name))
    assert re.search(r"^--   ARGV\[1\] +echo", header(name), re.MULTILINE)
    assert re.search(r"^-- Returns echo", header(name), re.MULTILINE)
    # A literal space after each tag, so that the columns are even.
    starts = {
        len(found[0]) for found in re.finditer(r"^--   \S+ +(?=\S)", header(name), re.MULTILINE)
    }
    assert len(starts) == 1


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
    # Lists of the Redis keys that were given, of `enroll`: KEYS by entry, and pairs with an entry.
    assert used <= {"session", "index", "new", "keys[entry]", "live[i][2]"}
    sources = {
        "session": r"KEYS\[\d\]|KEYS\[i\]|nil|function facts\(session",
        "index": r"KEYS\[\d\]",
        "new": r"KEYS\[1\]",
    }
    for key in used & set(sources):
        for value in values_of(key, name):
            assert re.fullmatch(sources[key], value), f"{key} is {value}"
    for of_list in {use for use in used if "[" in use}:
        assert name == "enroll", of_list
        assert "keys[ARGV[14 + realms + i]] = KEYS[first + i]" in code(name)
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
    # What it opens is what it read, and nothing is written before.
    before = code(name).partition("if not own or #own > 32")[0]
    assert re.search(r"\bown\b.* = ", before)
    assert not written(before), "it writes before it looks"


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


def calls() -> list[tuple[str, list[bytes], list[bytes]]]:
    """One call of each script that succeeds, in an order in which they do: name, KEYS, ARGV."""
    names = keyspace.Keyspace("sg-session", keyspace.system_random)
    index = names.index_key(b"zo")
    ids = [names.new_id_in(keyspace.slot_of(index)).encode() for _ in range(3)]
    first, second, third = (names.session_key(each.decode()) for each in ids)
    token, newer, of_zo = b"1" * 16, b"2" * 16, b"3" * 16
    sub = b"realm..." + b"zo"
    none, limit = b"", (b"5", b"1")
    return [
        ("echo", [], []),
        ("start", [first], [token, b"300", b"0", b"100", b":a", b"1"]),
        ("touch", [first], [token]),
        ("info", [first], [token]),
        ("expire", [first], [token, b"300"]),
        ("renew", [first], [token, newer, b"1", b"10", b"realm...", b"0"]),
        ("pset", [first], [newer, b":b", b"2"]),
        ("pset_if", [first], [newer, b":c", b"3", b"absent", none, b"100"]),
        ("pset_many", [first], [newer, b":d", b"4", b":e", b"5"]),
        ("pincr", [first], [newer, b":c", b"5"]),
        ("pget", [first], [newer, b":c"]),
        ("pget_many", [first], [newer, b":c", b":d"]),
        ("pall", [first], [newer]),
        ("ppop", [first], [newer, b":c"]),
        ("pdel", [first], [newer, b":e"]),
        ("export", [first], [newer, b"0"]),
        ("import", [first], [newer, b":a", b"9"]),
        (
            "enroll",
            [second, index, first],
            [of_zo, none, b"0", none, ids[1], none, b"2", newer, ids[0], *limit, b"1", b"0", sub],
        ),
        (
            "enroll",
            [third, index],
            [
                token,
                b"300",
                b"0",
                none,
                ids[2],
                none,
                b"0",
                none,
                none,
                b"5",
                b"1",
                b"1",
                b"0",
                sub,
            ],
        ),
        ("index", [index], []),
        ("sessions", [index, second], [b"9" * 16, b"1", sub, b"0" * 16 + ids[1]]),
        ("end_one", [second, index], [ids[1], sub]),
        ("end_all", [index, third], [none, b"9" * 16, b"1", sub, b"0" * 16 + ids[2]]),
        ("start", [first], [token, b"300", b"0", none]),
        ("end", [first], [token]),
    ]


def test_every_script_runs_on_a_server_that_has_seen_none(server: Server) -> None:
    """On every server each script is unknown by its SHA-1 at first, and runs from its source."""
    unknown = set(SOURCES)
    with server.client() as client:
        client.script_flush()
        for name, keys, args in calls():
            call = [len(keys), *keys, "the-echo", *args]
            sha = sha1(SOURCES[name].encode(), usedforsecurity=False).hexdigest()
            if name in unknown:
                with pytest.raises(NoScriptError):
                    client.execute_command("EVALSHA", sha, *call)
                reply = client.execute_command("EVAL", SOURCES[name], *call)
                unknown.remove(name)
            else:
                reply = client.execute_command("EVALSHA", sha, *call)
            assert reply.startswith(b"the-echo"), name
            # No session is ever without an end, nor an index.
            assert not [key for key in client.scan_iter() if client.pttl(key) < 0], name
        assert not unknown


@pytest.mark.parametrize("name", ["start", "enroll"])
def test_an_end_that_comes_before_it_is_set_leaves_nothing(server: Server, name: str) -> None:
    """A session that is over while it is being opened leaves no payload behind without an end."""
    ttl = b"0.0001"  # so little that it is over by then
    token, session = b"f" * 16, b"{s}1"
    if name == "start":
        call = [1, session, b"echo", token, ttl, b"0", b""]
    else:
        options = (ttl, b"0", b"", b"A" * 16, b"", b"0", b"", b"", b"0", b"0", b"1", b"0")
        call = [2, session, b"{s}2", b"echo", token, *options, b"realm...alice"]
    with server.client() as client:
        assert client.eval(SOURCES[name], *call, b":user", b"1") == b"echo"
        assert client.exists(session) == 0
