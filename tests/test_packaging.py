"""What is built and installed: the distributions, their metadata, the types they come with."""

import inspect
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints
from zipfile import ZipFile

import pytest

import sessiongate

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a process; the test fails with its errors if it does."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(tree: Path, hook: str, folder: Path) -> Path:
    """The file that a hook of the build backend makes of a source tree."""
    folder.mkdir()
    code = (
        "import setuptools.build_meta as backend, sys; getattr(backend, sys.argv[1])(sys.argv[2])"
    )
    run(sys.executable, "-c", code, hook, folder, cwd=tree)
    (made,) = folder.iterdir()
    return made


@dataclass(frozen=True)
class Built:
    """A copy of the source tree, and the distributions made of it."""

    tree: Path
    sdist: Path
    wheels: dict[str, Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist, and a wheel of each kind; nothing is written into the checkout."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    # Works in an unpacked sdist too, where git has nothing to tell.
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=left_out)
    sdist = build(tree, "build_sdist", folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    return Built(
        tree,
        sdist,
        {
            "wheel": build(tree, "build_wheel", folder / "wheel"),
            "wheel from the sdist": build(unpacked, "build_wheel", folder / "from_sdist"),
            "editable": build(tree, "build_editable", folder / "editable"),
        },
    )


@dataclass(frozen=True)
class Install:
    """A bare environment with one of the wheels in it, and redis, PyNaCl and fakeredis beside."""

    folder: Path
    kind: str

    @property
    def site(self) -> Path:
        return Path(self._paths["purelib"])

    @property
    def python(self) -> Path:
        return self.scripts / Path(sys.executable).name

    @property
    def scripts(self) -> Path:
        return Path(self._paths["scripts"])

    @property
    def _paths(self) -> dict[str, str]:
        base = str(self.folder)
        return sysconfig.get_paths("venv", {"base": base, "platbase": base})

    @property
    def metadata(self) -> Distribution:
        (folder,) = self.site.glob("sessiongate-*.dist-info")
        return Distribution.at(folder)

    def tell(self, code: str) -> Any:  # JSON is whatever the code says
        """What the code prints as JSON, run in this environment and nowhere near the checkout."""
        return json.loads(run(self.python, "-I", "-c", textwrap.dedent(code), cwd=self.folder))


InstallOf = Callable[[str], Install]


@pytest.fixture(scope="module")
def install_of(built: Built, tmp_path_factory: pytest.TempPathFactory) -> InstallOf:
    """Makes the environment of each kind of install, once."""

    @cache
    def make(kind: str) -> Install:
        install = Install(tmp_path_factory.mktemp("venv"), kind)
        venv.create(install.folder, symlinks=sys.platform != "win32")
        pip = (sys.executable, "-m", "pip", "--python", install.python)
        options = ("--disable-pip-version-check", "--no-index", "--no-deps")
        run(*pip, "install", *options, built.wheels[kind], cwd=install.folder)
        # Behind the environment's own packages, and without the .pth files that they bring.
        ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (install.site / "dependencies.pth").write_text("\n".join(ours))
        return install

    return make


@pytest.fixture(params=["wheel", "wheel from the sdist", "editable"])
def install(request: pytest.FixtureRequest, install_of: InstallOf) -> Install:
    """The library, installed in each way."""
    return install_of(request.param)


@pytest.fixture
def wheel(built: Built) -> Iterator[ZipFile]:
    """The wheel, opened."""
    with ZipFile(built.wheels["wheel"]) as archive:
        yield archive


def test_an_install_works(built: Built, install: Install) -> None:
    """Each kind of install keeps a session, with its own modules and all its own Lua files."""
    told = install.tell("""
        import json
        from importlib.resources import files
        import sessiongate
        from sessiongate import scripts

        gate = sessiongate.SessionGate.from_url("memory://", sign_key="k" * 32)
        token = gate.start(60, {"user": "John Doe"})
        print(json.dumps({
            "user": gate.pget(token, "user").decode(),
            "package": sessiongate.__file__,
            "lua": str(files("sessiongate.lua")),
            "scripts": {
                value.name: value.source.decode()
                for value in vars(scripts).values() if isinstance(value, scripts.Script)
            },
        }))
        """)
    assert told["user"] == "John Doe"
    editable = install.kind == "editable"
    package = (built.tree if editable else install.site) / "sessiongate"
    assert Path(told["package"]) == package / "__init__.py"
    assert Path(told["lua"]) == (built.tree / "lua" if editable else package / "lua")
    sources = {path.stem: path.read_text("utf-8") for path in (built.tree / "lua").glob("*.lua")}
    assert told["scripts"] == sources


def test_a_checkout_that_hides_the_install(built: Built, install_of: InstallOf) -> None:
    """In the folder of a checkout, whose package hides the installed one, it runs all the same."""
    assert not (built.tree / "sessiongate" / "lua").exists()
    code = "import sessiongate.scripts as it; print(it.__file__, len(it.PGET.source))"
    told = run(install_of("wheel").python, "-B", "-c", code, cwd=built.tree)
    size = (built.tree / "lua" / "pget.lua").stat().st_size
    assert told == f"{built.tree / 'sessiongate' / 'scripts.py'} {size}\n"


def test_an_install_has_the_command(install: Install) -> None:
    """Each kind of install brings the command `sessiongate`."""
    output = run(install.scripts / "sessiongate", "--version", cwd=install.folder)
    assert output == f"sessiongate {install.metadata.version}\n"


def test_the_version_is_told_once(install: Install) -> None:
    """`sessiongate.__version__` is the version in the metadata."""
    told = install.tell("import json, sessiongate; print(json.dumps(sessiongate.__version__))")
    assert told == install.metadata.version == sessiongate.__version__


def test_dependencies(install: Install) -> None:
    """At run time only redis and PyNaCl are required; everything else is an extra of its own."""
    required: dict[str, set[str]] = {}
    for requirement in install.metadata.requires or ():
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == [\"'](\w+)[\"']", requirement)
        assert name
        required.setdefault(extra[1] if extra else "", set()).add(name[0].lower())
    assert required[""] == {"redis", "pynacl"}
    assert required["memory"] == {"fakeredis"}
    assert required["fast"] == {"hiredis"}
    assert install.metadata.metadata["Requires-Python"] == ">=3.11"


def test_the_wheel_holds_the_library_and_no_more(built: Built, wheel: ZipFile) -> None:
    """The wheel holds every module, every Lua file, py.typed and the licence; no tests, no docs."""
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {f"sessiongate/{path.name}" for path in (built.tree / "sessiongate").glob("*.py")}
    scripts = {f"sessiongate/lua/{path.name}" for path in (built.tree / "lua").glob("*.*")}
    assert names == modules | scripts | {"sessiongate/py.typed"}
    (licence,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_the_sdist_holds_what_a_build_needs(built: Built) -> None:
    """The sdist holds the Lua files where the checkout has them, and what goes with a source."""
    top = built.sdist.name.removesuffix(".tar.gz")
    with tarfile.open(built.sdist) as archive:
        names = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    assert names >= {f"lua/{path.name}" for path in (built.tree / "lua").glob("*.*")}
    assert names >= {"LICENSE", "README.md", "pyproject.toml", "sessiongate/py.typed"}


def test_import_brings_nothing_optional(install_of: InstallOf) -> None:
    """`import sessiongate` imports no package but its dependencies, and no asyncio of its own."""
    told = install_of("wheel").tell("""
        import json, sys
        import redis, nacl.utils

        before = set(sys.modules)
        import sessiongate

        brought = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(json.dumps({
            "packages": sorted(brought - sys.stdlib_module_names),
            "asyncio": "asyncio" in brought,
            "async client": "redis.asyncio.client" in set(sys.modules) - before,
        }))
        """)
    assert told == {"packages": ["sessiongate"], "asyncio": False, "async client": False}


def test_import_brings_nothing_for_later(install_of: InstallOf) -> None:
    """Who does not use msgspec or libsodium does not import them: not with the library."""
    told = install_of("wheel").tell("""
        import json, sys

        import sessiongate

        def there():
            return [name for name in ("msgspec", "nacl._sodium") if name in sys.modules]

        told = [there()]
        sessiongate.JSONCodec().encode({"user": ["John Doe", None]})
        sessiongate.JSONCodec().decode(b"[]")
        told.append(there())
        sessiongate.MsgpackCodec()
        told.append(there())
        sessiongate.SessionGate.from_url("memory://", sign_key="k" * 32, sealing_key=b"s" * 32)
        told.append(there())
        print(json.dumps(told))
        """)
    assert told == [[], [], ["msgspec"], ["msgspec", "nacl._sodium"]]


def test_without_fakeredis(install_of: InstallOf) -> None:
    """Without the extra the library works, and memory:// says which extra it needs."""
    told = install_of("wheel").tell("""
        import json, sys

        sys.modules["fakeredis"] = None
        from sessiongate import ConfigurationError, SessionGate

        try:
            SessionGate.from_url("memory://", sign_key="k" * 32)
        except ConfigurationError as error:
            print(json.dumps(str(error)))
        """)
    assert "sessiongate[memory]" in told


# What mypy makes of each expression stands behind it, or the error that it finds there.
PROGRAM = """\
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, assert_type

import redis
import redis.asyncio
from sessiongate import AsyncSession, AsyncSessionGate, BytesCodec, Codec, JSONCodec, MsgpackCodec
from sessiongate import Session, SessionGate

KEY = "k" * 32
TOKEN = "token"

@dataclass
class User:
    name: str

class Decimal:
    def encode(self, value: int) -> str:
        return str(value)

    def decode(self, data: bytes) -> int:
        return int(data)

class Half:
    def encode(self, value: int) -> str:
        return str(value)

# Without a codec

gate = SessionGate.from_url("memory://", sign_key=KEY)
reveal_type(gate)  # SessionGate[Data, bytes]
reveal_type(SessionGate(redis.Redis(), sign_key=KEY))  # SessionGate[Data, bytes]
reveal_type(SessionGate(redis.Redis(), sign_key=KEY, codec=None))  # SessionGate[Data, bytes]
reveal_type(gate.start(300, {"user": "John Doe", "cart": b"[]"}))  # str
reveal_type(gate.pget(TOKEN, "user"))  # bytes
reveal_type(gate.pget(TOKEN, "user", as_=str))  # str
reveal_type(gate.pget_many(TOKEN, ["user"]))  # dict[str, bytes]
reveal_type(gate.pall(TOKEN))  # dict[str, bytes]
reveal_type(gate.ppop(TOKEN, "user"))  # bytes
reveal_type(gate.pset(TOKEN, "user", b"data", if_match=b"old"))  # None
reveal_type(gate.pset_many(TOKEN, {"user": memoryview(b"x")}, delete=["cart"]))  # None
reveal_type(gate.pincr(TOKEN, "visits"))  # int
reveal_type(gate.verify(b"token"))  # str
gate.start("300")  # error: arg-type
gate.start(300, {"user": 42})  # error: dict-item
gate.pset(TOKEN, "user", 42)  # error: arg-type
gate.pset(TOKEN, "user", "x", if_match=None)  # error: arg-type
gate.pset_many(TOKEN, {"user": 42})  # error: dict-item

# With a codec

json = SessionGate.from_url("memory://", sign_key=KEY, codec=JSONCodec())
reveal_type(json)  # SessionGate[Any, Any]
client = redis.Redis()
reveal_type(SessionGate(client, sign_key=KEY, codec=MsgpackCodec()))  # SessionGate[Any, Any]
reveal_type(SessionGate(client, sign_key=KEY, codec=BytesCodec()))  # SessionGate[Data, bytes]
json.pset(TOKEN, "user", User("Ann"), if_match=None)
json.pset_many(TOKEN, {"user": User("Ann"), "n": 1})
reveal_type(json.pget(TOKEN, "user"))  # Any
reveal_type(json.pget(TOKEN, "user", as_=User))  # User
reveal_type(json.pget(TOKEN, "n", as_=int))  # int
reveal_type(json.pget(TOKEN, "list", as_=list[int]))  # list[int]
reveal_type(json.pget(TOKEN, "map", as_=dict[str, User]))  # dict[str, User]
number: int | None = json.pget(TOKEN, "n", as_=int | None)
reveal_type(json.ppop(TOKEN, "user"))  # Any
reveal_type(json.ppop(TOKEN, "user", as_=User))  # User
user: User | None = json.ppop(TOKEN, "user", as_=User | None)
reveal_type(json.pall(TOKEN))  # dict[str, Any]
reveal_type(json.pget_many(TOKEN, ["user"]))  # dict[str, Any]
json.pget(TOKEN, "user", User)  # error: call-overload

# With one of the application's own

counts = SessionGate.from_url("memory://", sign_key=KEY, codec=Decimal())
reveal_type(counts)  # SessionGate[int, int]
reveal_type(SessionGate(redis.Redis(), sign_key=KEY, codec=Decimal()))  # SessionGate[int, int]
reveal_type(counts.pget(TOKEN, "n"))  # int
reveal_type(counts.pall(TOKEN))  # dict[str, int]
reveal_type(counts.ppop(TOKEN, "n"))  # int
counts.pset(TOKEN, "n", 42, if_match=41)
counts.pset(TOKEN, "n", "42")  # error: arg-type
counts.pset(TOKEN, "n", 42, if_match="41")  # error: arg-type
counts.start(300, {"n": "42"})  # error: dict-item
SessionGate.from_url("memory://", sign_key=KEY, codec=Half())  # error: arg-type
codec: Codec[int, int] = Decimal()

# As an argument

def any_gate(gate: SessionGate) -> None:
    reveal_type(gate.pget(TOKEN, "user"))  # bytes

def json_gate(gate: SessionGate[Any, Any]) -> Any:
    return gate.pget(TOKEN, "user")

any_gate(gate)
any_gate(json)
any_gate(counts)  # error: arg-type
json_gate(gate)
json_gate(counts)

# A handle

with gate.open(TOKEN) as session:
    reveal_type(session)  # Session[Data, bytes]
    reveal_type(session["user"])  # bytes
    reveal_type(session.get("user"))  # bytes | None
    reveal_type(session.get("user", b""))  # bytes
    reveal_type(session.get("user", as_=str))  # str | None
    reveal_type(session.get("user", 7))  # bytes | int
    reveal_type(session.token)  # str | None
    session["user"] = "text"
    session["user"] = 42  # error: assignment

with json.open(None) as document:
    reveal_type(document)  # Session[Any, Any]
    reveal_type(document["user"])  # Any
    reveal_type(document.get("user", as_=User))  # User | None
    reveal_type(document.get("user", User("Ann"), as_=User))  # User
    maybe: int | None = document.get("user", as_=int | None)
    document["user"] = User("Ann")

with counts.open(TOKEN) as numbers:
    reveal_type(numbers["n"])  # int
    reveal_type(dict(numbers))  # dict[str, int]
    numbers["n"] += 1
    numbers["n"] = "42"  # error: assignment

def handled(session: Session) -> Mapping[str, bytes]:
    return session

handled(session)

# Awaited

async def main() -> None:
    gate = AsyncSessionGate.from_url("memory://", sign_key=KEY)
    reveal_type(gate)  # AsyncSessionGate[Data, bytes]
    reveal_type(await gate.pget(TOKEN, "user"))  # bytes
    reveal_type(await gate.pall(TOKEN))  # dict[str, bytes]
    reveal_type(await gate.pget(TOKEN, "user", as_=str))  # str
    await gate.pset(TOKEN, "user", 42)  # error: arg-type
    json = AsyncSessionGate(redis.asyncio.Redis(), sign_key=KEY, codec=JSONCodec())
    reveal_type(json)  # AsyncSessionGate[Any, Any]
    reveal_type(await json.pget(TOKEN, "user"))  # Any
    reveal_type(await json.pget(TOKEN, "user", as_=User))  # User
    reveal_type(await json.ppop(TOKEN, "user", as_=list[int]))  # list[int]
    reveal_type(await json.pget_many(TOKEN, ["user"]))  # dict[str, Any]
    counts = AsyncSessionGate.from_url("memory://", sign_key=KEY, codec=Decimal())
    reveal_type(await counts.ppop(TOKEN, "n"))  # int
    await counts.pset(TOKEN, "n", "42")  # error: arg-type
    async with counts.open(TOKEN) as numbers:
        reveal_type(numbers)  # AsyncSession[int, int]
        reveal_type(await numbers.load())  # AsyncSession[int, int]
        reveal_type(numbers["n"])  # int
        reveal_type(numbers.get("n", as_=str))  # str | None
        numbers["n"] = "42"  # error: assignment
    assert_type(json.open(TOKEN), AsyncSession[Any, Any])
"""
DATA = "str | bytes | bytearray | memoryview[int]"


def test_types_reach_a_program(tmp_path: Path, install_of: InstallOf) -> None:
    """For mypy, in a program that uses the installed library, results are what they are."""
    (tmp_path / "program.py").write_text(PROGRAM)
    options = ("--strict", "--config-file=", "--cache-dir=cache", "--no-error-summary")
    python = ("--python-executable", install_of("wheel").python)
    command = (sys.executable, "-m", "mypy", *options, *python, "program.py")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, text=True)
    told = re.findall(
        r"program\.py:(\d+): (?:note: Revealed type is \"(.*)\"|error: .*\[(.*)\])", done.stdout
    )
    lines = enumerate(PROGRAM.splitlines(), 1)
    expected = {number: line.partition("  # ")[2] for number, line in lines if "  # " in line}
    assert {
        int(number): f"error: {error}" if error else short(kind) for number, kind, error in told
    } == expected, done.stdout + done.stderr


def short(kind: str) -> str:
    """A type as a program writes it: without modules, and what a gate without a codec takes."""
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", kind).replace(DATA, "Data")


def within(hint: object) -> Iterator[object]:
    """A type and every type that it is made of."""
    yield hint
    for part in hint if isinstance(hint, list) else get_args(hint):
        yield from within(part)


def public_functions(value: object) -> Iterator[Callable[..., object]]:
    """A function, or those of a class's own methods that a user calls."""
    if not inspect.isclass(value):
        yield cast("Callable[..., object]", value)
        return
    for name, member in vars(value).items():
        # Behind properties, class methods and static methods.
        function = getattr(member, "fget", getattr(member, "__func__", member))
        if not inspect.isfunction(function):
            continue
        # What `dataclass` writes has no file, or one of its own, and partly no types.
        written = "sessiongate" in inspect.unwrap(function).__code__.co_filename
        if written and (not name.startswith("_") or name.startswith("__")):
            yield function


@pytest.mark.parametrize("name", sessiongate.__all__)
def test_public_signatures_are_exact(name: str) -> None:
    """Every argument and result has a type, which is Any where a codec knows values of any."""
    knows_any = name in ("JSONCodec", "MsgpackCodec")
    for function in public_functions(getattr(sessiongate, name)):
        hints = get_type_hints(function)
        arguments = set(inspect.signature(function).parameters) - {"self", "cls"}
        assert hints.keys() == arguments | {"return"}, function
        for argument, hint in hints.items():
            assert knows_any or Any not in within(hint), (function, argument)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `make --dry-run` would do in a copy of the checkout whose environment is finished."""
    for variable in ("MAKEFLAGS", "MFLAGS", "PYTHON", "URL"):
        monkeypatch.delenv(variable, raising=False)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    venv.create(tmp_path / ".venv", symlinks=sys.platform != "win32")
    for stamp in ("demo", "dev"):
        (tmp_path / ".venv" / stamp).touch()
    return lambda *words: run("make", "--dry-run", *words, cwd=tmp_path)


def test_make_demo_with_a_url(make: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`make demo` heeds a URL on its command line, and none that the shell exports."""
    assert "--url" in make("demo", "URL=redis://localhost")
    monkeypatch.setenv("URL", "http://localhost")
    assert "--url" not in make("demo")


def test_make_help(make: Callable[..., str]) -> None:
    """`make help` names every target and variable."""
    told = make("help")
    (phony,) = re.findall(r"^\.PHONY: (help .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    known = re.findall(r"make (\w+) ", told)
    assert set(phony.split()) - {"help", "lint", "types"} == set(known)
    assert "URL=" in told
    assert "PYTHON=" in told
