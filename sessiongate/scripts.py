"""The Lua files of `lua/` as values: each one's name, source and SHA-1."""

from dataclasses import dataclass, field
from hashlib import sha1
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


def _folder() -> "Traversable":
    try:
        return files("sessiongate.lua")
    except ModuleNotFoundError:
        # A checkout in the current folder hides the package that is installed.
        return Path(__file__).parents[1] / "lua"


_LUA = _folder()


@dataclass(frozen=True, slots=True)
class Script:
    """A registered script, and the words that call it, packed for the wire once."""

    name: str
    source: bytes = field(repr=False)
    sha: str = field(init=False)
    call_by_sha: bytes = field(init=False, repr=False)
    call_by_source: bytes = field(init=False, repr=False)
    templates: tuple[bytes, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # SHA-1 is how Redis names a script; nothing rests on its strength.
        sha = sha1(self.source, usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", sha)
        object.__setattr__(self, "call_by_sha", b"$7\r\nEVALSHA\r\n$40\r\n%b\r\n" % sha.encode())
        call_by_source = b"$4\r\nEVAL\r\n$%d\r\n%b\r\n" % (len(self.source), self.source)
        object.__setattr__(self, "call_by_source", call_by_source)
        # A whole request by SHA-1, but for its one Redis key, 1 to 3 arguments and the echo.
        templates = [
            b"*%d\r\n%b$1\r\n1\r\n" % (5 + count, self.call_by_sha)
            + b"$%d\r\n%b\r\n" * (1 + count)
            + b"$12\r\n%b\r\n"
            for count in range(1, 4)
        ]
        object.__setattr__(self, "templates", tuple(templates))


def _load(name: str) -> Script:
    return Script(name, _LUA.joinpath(f"{name}.lua").read_bytes())


START = _load("start")
ENROLL = _load("enroll")
TOUCH = _load("touch")
INFO = _load("info")
EXPIRE = _load("expire")
RENEW = _load("renew")
EXPORT = _load("export")
IMPORT = _load("import")
END = _load("end")
OPEN = _load("open")
PSET = _load("pset")
PSET_IF = _load("pset_if")
PSET_MANY = _load("pset_many")
PGET = _load("pget")
PGET_MANY = _load("pget_many")
PALL = _load("pall")
PDEL = _load("pdel")
PPOP = _load("ppop")
PINCR = _load("pincr")
INDEX = _load("index")
SESSIONS = _load("sessions")
END_ALL = _load("end_all")
END_ONE = _load("end_one")
MARK = _load("mark")
ECHO = _load("echo")
