"""What pages and docstrings show is what happens: every code block and example runs here."""

import ast
import asyncio
import builtins
import doctest
import importlib
import inspect
import io
import pkgutil
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from hashlib import sha1
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import hiredis
import pytest

import sessiongate

from .servers import Server

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LUA = {path.name: path.read_bytes() for path in (ROOT / "lua").glob("*.lua")}

# What stands on the pages for the server of a reader.
READERS_URL = "redis://localhost:6379/0"

# What a page that is not true ends in.
WRONG = (
    AssertionError,
    NameError,
    pytest.fail.Exception,
    subprocess.CalledProcessError,
    SyntaxError,
    ValueError,
)


# --- pages ---


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_code_block_of_a_page_is_true(path: Path, server: Server) -> None:
    """The code blocks of a page run in order, and what it shows of their output is what comes."""
    Page(path.read_text("utf-8"), path, server).run()


@pytest.mark.parametrize(
    "page",
    [
        "```\nno language\n```\n",
        "```ruby\nputs 1\n```\n",
        "```python\nno end\n",
        "```python\nraise ValueError\n```\n",
        "```python\nurl\n```\n",
        "```python\nno Python\n```\n",
        "```python\n>>> 1 + 1\n3\n\n```\n",
        "```python\nprint(1)\n```\n```text\n2\n```\n",
        "```python\nprint(1)\nprint(2)\n```\n```console\n1\n```\n",
        "```text\nout of nowhere\n```\n",
        "```python\n>>> 1\n1\n\n```\n```text\n1\n```\n",
        "- indented:\n\n  ```python\n  raise ValueError\n  ```\n",
        "~~~~python\n```\n~~~~\n",
        "```text\nSessionGateError\n├── ArgumentError\n```\n",
        "```text\nSessionGateError\n├── ArgumentError   also a TypeError\n```\n",
        "```text\nSessionGateError\n├── ArgumentError\n│   └── GateClosedError\n```\n",
        "```sh\nrm -rf build\n```\n",
        "```sh\nmake nothing-of-the-kind\n```\n",
        "```sh\nmake docs  # a folder, not a target\n```\n",
        "```sh\nmake help\n```\n```text\nsomething else\n```\n",
        "```sh\npip install session-gate\n```\n",
        '```sh\npip install "sessiongate[nothing]"\n```\n',
        "```lua\nreturn 42\n```\n",
        "```lua\n-- Errors: NOTHING.\n```\n",
        '```redis\n> EXISTS "a"\n(integer) 1\n```\n',
        '```redis\n> EXISTS "a"\n```\n',
        '```redis\n(integer) 0\n> EXISTS "a"\n```\n',
        "```redis\n> EXISTS\n(integer) 0\n```\n",
    ],
)
def test_a_page_that_is_not_true_fails(page: str, server: Server) -> None:
    """What a page cannot keep, or what nothing checks, is found."""
    with pytest.raises(WRONG):
        Page(page, ROOT / "page.md", server).run()


def test_a_page_that_is_true_passes(server: Server) -> None:
    """Every kind of block passes when it is right, and names live on from block to block."""
    page = """
    ```python
    from redis import Redis
    one = 1
    print(one, "and", object())
    ```
    ```text
    1 and <object ...>
    ```
    ```python
    >>> one + 1
    2
    >>> Redis.from_url("redis://localhost:6379/0", protocol=2).exists("a")
    0
    ```
    ```sh
    # A comment.
    pip install "sessiongate[memory,fast]"
    make test
    make help
    ```
    Text between.
    ```console
    make demo  ...
    ...
    make bench ... bench.json
    ```
    ```lua
    if not data then return redis.error_reply('NOPAYLOAD ' .. echo) end
    return data .. echo
    ```
    ```redis
    > HSET a field "\\xff\\n\\"'\\\\ x"
    (integer) 1
    > HGETALL a
    1) "field"
    2) "\\xff\\n\\"'\\\\ x"
    > GET a
    (error) WRONGTYPE ...
    > GET b
    (nil)
    > EVAL <end.lua> 1 a fingerprint 0 echo
    (error) NOSESSION echo
    > EVALSHA <sha1 of end.lua> 1 a fingerprint 0 echo
    (error) NOSESSION echo
    ```
    """
    Page(inspect.cleandoc(page), ROOT / "page.md", server).run()


class Block(NamedTuple):
    """A fenced code block: the first word after the fence, the lines, the number of the first."""

    language: str
    lines: list[str]
    line: int

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)


def blocks(page: str) -> Iterator[Block]:
    """The fenced code blocks of a page, in order."""
    numbered = enumerate(page.splitlines(), start=1)
    for number, line in numbered:
        opened = re.match(r"( *)(`{3,}|~{3,}) *(\S*)", line)
        if not opened:
            continue
        indent, fence, language = opened.groups()
        lines: list[str] = []
        for _, inner in numbered:
            if re.fullmatch(f" *{fence}{fence[0]}* *", inner):
                break
            lines.append(inner.removeprefix(indent))
        else:
            pytest.fail(f"the block of line {number} has no end")
        yield Block(language, lines, number + 1)


class Page:
    """Runs the code blocks of a page. A reader's server is for its Python a real, empty one."""

    def __init__(self, text: str, path: Path, server: Server) -> None:
        self._text = text
        self._path = path
        self._server = server
        self._names: dict[str, object] = {"__name__": path.stem}
        # Tells what the last block printed, if that can be shown.
        self._printed: Callable[[], str] | None = None

    def run(self) -> None:
        for block in blocks(self._text):
            try:
                self._block(block)
            except (Exception, pytest.fail.Exception) as error:
                error.add_note(f"{self._path.relative_to(ROOT)}:{block.line}")
                raise

    def _block(self, block: Block) -> None:
        printed, self._printed = self._printed, None
        match block.language:
            case "python":
                self._python(block)
            case "sh":
                self._sh(block)
            case "text" if block.lines[:1] == ["SessionGateError"]:
                assert_error_tree(block.lines)
            case "text" | "console":
                assert printed, "no output stands before this block"
                assert_shown(block.text, printed())
            case "lua":
                assert any(holds(source, block.lines) for source in LUA.values())
            case "redis":
                self._redis(block)
            case language:
                pytest.fail(f"nothing checks a block of {language or 'no language'}")

    def _python(self, block: Block) -> None:
        block = block._replace(lines=[self._here(line) for line in block.lines])
        if any(line.lstrip().startswith(">>>") for line in block.lines):
            parser = doctest.DocTestParser()
            path, line = str(self._path), block.line - 1
            run_examples(parser.get_doctest(block.text, {}, path, path, line), self._names)
            return
        # The lines in front make a traceback name the line of the page.
        code = compile("\n" * (block.line - 1) + block.text, self._path, "exec", dont_inherit=True)
        with redirect_stdout(io.StringIO()) as printed:
            exec(code, self._names)  # noqa: S102  # pages are code of this project
        self._printed = printed.getvalue

    def _here(self, line: str) -> str:
        return line.replace(READERS_URL, self._server.url)

    def _sh(self, block: Block) -> None:
        for line in block.lines:
            self._printed = None
            match shlex.split(line, comments=True):
                case []:
                    pass
                case ["make", *words]:
                    self._printed = make(words)
                case ["pip", "install", requirement]:
                    assert_installable(requirement)
                case _:
                    pytest.fail(f"nothing checks the command: {line}")

    def _redis(self, block: Block) -> None:
        """`> ` and a command, then the reply, as redis-cli spells both; no script is known yet."""
        assert block.lines[0].startswith("> "), "the first line is a command"
        with self._server.client() as client:
            client.script_flush()
        # hiredis by itself, since redis-py takes the code off an error.
        replies = hiredis.Reader()
        with socket.create_connection(("127.0.0.1", self._server.port), timeout=10) as connection:
            for exchange in re.split(r"^> ", block.text, flags=re.MULTILINE)[1:]:
                command, _, shown = exchange.partition("\n")
                words = tuple(redis_words(command))
                connection.sendall(hiredis.pack_command(words))  # type: ignore[arg-type]  # any number
                while (reply := replies.gets()) is False:
                    replies.feed(connection.recv(65_536))
                assert_shown(shown, redis_spelling(reply))


def assert_shown(want: str, got: str) -> None:
    """What a page shows is what came; `...` stands for anything."""
    same = doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS)
    assert same, f"the page shows:\n{want}\nwhat came is:\n{got}"


def assert_error_tree(lines: list[str]) -> None:
    """A drawing of the errors has all of them, each below its base, `also a` naming another."""
    root = sessiongate.SessionGateError
    drawn: set[type] = set()
    above: list[type] = []
    for line in lines:
        node = re.fullmatch(r"([│├└─ ]*)(\w+)(?: +also a (\w+))?.*", line)
        assert node, f"no branch of the tree: {line}"
        branch, name, also = node.groups()
        error = getattr(sessiongate, name)
        above[len(branch) // 4 :] = [error]
        assert error is root or error.__base__ is above[-2], f"{name} is below another error"
        assert not also or issubclass(error, getattr(builtins, also)), f"{name} is no {also}"
        drawn.add(error)
    every = {value for value in vars(sessiongate).values() if inspect.isclass(value)}
    assert drawn == {value for value in every if issubclass(value, root)}


def holds(source: bytes, lines: list[str]) -> bool:
    """Whether these lines are lines of the source, one after the other."""
    wanted = "\n".join(line.strip() for line in lines).strip("\n")
    there = "\n".join(line.strip() for line in source.decode().splitlines())
    return bool(wanted) and f"\n{wanted}\n" in f"\n{there}\n"


def make(words: list[str]) -> Callable[[], str]:
    """Checks that the Makefile can do it, and returns what does it and tells what it printed."""
    # In the virtual environment of this process, as it is: nothing is installed.
    stamps = (f"--old-file={sys.prefix}/{stamp}" for stamp in ("demo", "dev"))
    command = ["make", "--silent", *stamps, f"VENV={sys.prefix}", *words]

    def run(*options: str) -> str:
        return subprocess.check_output([*command, *options], cwd=ROOT, text=True)

    assert run("--dry-run").strip(), "nothing is to be done: that is a file, not a target"
    return run


def assert_installable(requirement: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    spelt = re.fullmatch(r"([\w-]+)(?:\[([\w,-]+)\])?", requirement)
    assert spelt, f"nothing checks the requirement {requirement}"
    assert spelt[1] == project["name"]
    extras = set(spelt[2].split(",")) if spelt[2] else set()
    assert extras <= set(project["optional-dependencies"])


def redis_words(command: str) -> Iterator[bytes]:
    """The arguments of a command; `<name.lua>` is a script, `<sha1 of name.lua>` its SHA-1."""
    for sha1_of, source, quoted, bare in re.findall(
        r'<sha1 of (\w+\.lua)>|<(\w+\.lua)>|("(?:[^"\\]|\\.)*")|(\S+)', command
    ):
        if sha1_of:
            yield sha1(LUA[sha1_of], usedforsecurity=False).hexdigest().encode()
        elif source:
            yield LUA[source]
        else:
            yield ast.literal_eval(f"b{quoted}") if quoted else bare.encode()


def redis_spelling(reply: object) -> str:
    match reply:
        case None:
            return "(nil)\n"
        case int():
            return f"(integer) {reply}\n"
        case hiredis.ReplyError():
            return f"(error) {reply}\n"
        case bytes():
            return '"' + "".join(map(redis_character, reply)) + '"\n'
        case list():
            return "".join(f"{n}) {redis_spelling(item)}" for n, item in enumerate(reply, start=1))
        case _:
            pytest.fail(f"redis-cli's spelling of {reply!r}?")


def redis_character(byte: int) -> str:
    if byte in b'"\\':
        return f"\\{byte:c}"
    named = {10: "\\n", 13: "\\r", 9: "\\t", 7: "\\a", 8: "\\b"}
    return named.get(byte) or (f"{byte:c}" if 32 <= byte < 127 else f"\\x{byte:02x}")


# --- docstrings ---


def public_modules() -> list[ModuleType]:
    """The package and its modules, but those with an underscore in front."""
    found = pkgutil.walk_packages(sessiongate.__path__, "sessiongate.")
    names = [module.name for module in found if "._" not in module.name]
    return [sessiongate, *map(importlib.import_module, names)]


def documented(owner: object) -> list[tuple[str, object]]:
    """An object and, of a class, its public members, in the order they are written in."""
    name = str(getattr(owner, "__qualname__", getattr(owner, "__name__", "")))
    inside = list(vars(owner)) if inspect.isclass(owner) else []
    members = [member for member in inside if not member.startswith("_")]
    return [(name, owner), *((f"{name}.{member}", getattr(owner, member)) for member in members)]


def with_examples() -> list[object]:
    """Each module, class and function of which a docstring holds an example."""
    public: list[object] = []
    for module in public_modules():
        public.append(module)
        public += (
            value
            for name, value in vars(module).items()
            if getattr(value, "__module__", "") == module.__name__
            and (inspect.isclass(value) or not name.startswith("_"))  # two may have a base
        )
    return [owner for owner in public if any(examples(*each) for each in documented(owner))]


def examples(name: str, value: object) -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(recurse=False)
    return [test for test in finder.find(value, name, False, {}) if test.examples]


def run_examples(test: doctest.DocTest, names: dict[str, object]) -> None:
    """Runs examples in these names, which keep what they make."""
    for example in test.examples:
        example.source = re.sub(r"await ((?:gate|session)\.\w+\(.*\))", r"_run(\1)", example.source)
    test.globs = names
    report: list[str] = []
    checker = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    checker.run(test, out=report.append, clear_globs=False)
    assert not checker.failures, "".join(report)


@pytest.mark.parametrize("owner", with_examples(), ids=lambda owner: documented(owner)[0][0])
def test_the_examples_of_docstrings_are_true(owner: object) -> None:
    """Examples show what comes; those of a class and its methods run in order, in one namespace."""
    with asyncio.Runner() as runner:
        # What a reader awaits, doctest runs to its end.
        names: dict[str, object] = {"_run": runner.run}
        for name, value in documented(owner):
            # A classmethod makes an object of its own, which the others should not get.
            made = inspect.ismethod(value)
            for test in examples(name, value):
                run_examples(test, dict(names) if made else names)


def test_the_error_tree_of_the_docstring_is_true() -> None:
    """The root of the errors draws all of them as they are."""
    _, _, drawing = inspect.cleandoc(sessiongate.SessionGateError.__doc__ or "").partition("::\n\n")
    assert_error_tree(inspect.cleandoc(drawing).splitlines())


def test_every_public_method_has_an_example() -> None:
    """Each method of the classes to import, errors and protocols apart, shows how it is called."""
    classes = [
        value
        for name in sessiongate.__all__
        if inspect.isclass(value := getattr(sessiongate, name))
        and not issubclass(value, BaseException)
        and not getattr(value, "_is_protocol", False)  # its methods are the reader's to write
    ]
    assert sessiongate.SessionGate in classes
    bases = {base for owner in classes for base in owner.__mro__}
    for owner in bases:
        if owner.__module__.startswith("sessiongate."):
            for name, value in documented(owner):
                is_shown = not callable(value) or inspect.isclass(value) or examples(name, value)
                assert is_shown, f"{name} has no example"
    assert all(examples(owner.__name__, owner) for owner in classes)
