"""The users that docs/security.md shows: the suite makes these very ones, and runs under them."""

import re
import subprocess
from functools import cache
from pathlib import Path

_PAGE = (Path(__file__).parent.parent / "docs" / "security.md").read_text("utf-8")

ONE_SERVER, CLUSTER, SENTINEL = "One server", "Cluster", "Sentinel"

# A gate's user, and one who may also do what some settings need.
USER, PASSWORD = "sessions", "PASSWORD"
MORE = "sessions-and-more"
_OTHER_PREFIXES = ("~one:*", "~other:*")


def users(title: str) -> dict[str, list[str]]:
    """The users that a section of the page makes, each with its rules, in order."""
    found: dict[str, list[str]] = {}
    for user, rules in re.findall(r"^    ACL SETUSER (\S+) (.+)$", _section(title), re.MULTILINE):
        found.setdefault(user, []).extend(rules.split())
    assert found, f"docs/security.md makes no user under {title!r}"
    return found


def settings() -> dict[str, list[str]]:
    """What some settings need as well, by setting: the table of the page."""
    rows = re.findall(r"^\| (.+?) \| `([^`]+)` \|$", _section("Some settings"), re.MULTILINE)
    # Inside a table a vertical bar has a backslash.
    return {setting: rules.replace(r"\|", "|").split() for setting, rules in rows}


def rules(*, cluster: bool = False) -> list[str]:
    """The rules of a gate's user on one server, or on the servers of a cluster."""
    extra = users(CLUSTER)[USER] if cluster else []
    return users(ONE_SERVER)[USER] + extra


def options(binary: Path, *, cluster: bool = False) -> list[str]:
    """The options of a server that is to have the suite's users; they survive a restart."""
    if not has_users(binary):
        return []
    # `min_replicas` is an argument of every call, so that a client cannot know of it.
    suite = [*rules(cluster=cluster), *settings()["`min_replicas`"]]
    more = [rule for extra in settings().values() for rule in extra]
    return [
        *("--user", USER, *suite),
        *("--user", MORE, *suite, *more, *_OTHER_PREFIXES),
    ]


@cache
def has_users(binary: Path) -> bool:
    """Whether it is a server with access control lists: Redis 6 and later, or Valkey."""
    said = subprocess.check_output([binary, "--version"], text=True)
    version = re.search(r"v=(\d+)", said)
    return version is not None and int(version[1]) >= 6


def _section(title: str) -> str:
    found = re.search(rf"^### {re.escape(title)}\n(.*?)(?=^#|\Z)", _PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"docs/security.md has no section {title!r}"
    return found[1]
