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


def test_types_reach_a_program(tmp_path: Path, install_of: InstallOf) -> None:
    """For mypy, in a program that uses the installed library, results are what they are."""
    (tmp_path / "program.py").write_text("""\
from sessiongate import SessionGate

gate = SessionGate.from_url("memory://", sign_key="k" * 32)
reveal_type(gate)
reveal_type(gate.start(300, {"user": "John Doe", "cart": b"[]"}))
reveal_type(gate.pget("token", "user"))
reveal_type(gate.pset("token", "user", b"data"))
reveal_type(gate.verify(b"token"))
gate.start("300")
gate.pset("token", "user", 42)
""")
    options = ("--strict", "--config-file=", "--cache-dir=cache", "--no-error-summary")
    python = ("--python-executable", install_of("wheel").python)
    command = (sys.executable, "-m", "mypy", *options, *python, "program.py")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, text=True)
    told = re.findall(
        r"program\.py:(\d+): (?:note: Revealed type is \"(.*)\"|.*\[(.*)\])", done.stdout
    )
    assert [(int(line), kind or error) for line, kind, error in told] == [
        (4, "sessiongate.gate.SessionGate"),
        (5, "str"),
        (6, "bytes"),
        (7, "None"),
        (8, "str"),
        (9, "arg-type"),
        (10, "arg-type"),
    ], done.stdout + done.stderr


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
    """Every argument and result of the public interface has a type, and none is Any."""
    for function in public_functions(getattr(sessiongate, name)):
        hints = get_type_hints(function)
        arguments = set(inspect.signature(function).parameters) - {"self", "cls"}
        assert hints.keys() == arguments | {"return"}, function
        for argument, hint in hints.items():
            assert Any not in within(hint), (function, argument)


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
