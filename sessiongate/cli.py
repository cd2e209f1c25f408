"""The command `sessiongate`: its sub-commands, and the exit code that each error becomes."""

import argparse
import os
import sys
from collections.abc import Sequence

from redis.exceptions import RedisError

from . import __version__
from .connect import MEMORY_URL
from .demo import Screen, demo, without_secrets
from .errors import ConfigurationError
from .sealing import new_sealing_key

_OK = 0
_FAILED = 1
_MISUSED = 2  # argparse's own
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments behind the program's name; this process's own unless given.

    Returns:
        The exit code: 0; 1 if the server failed, 2 if what was asked for cannot be, 130 if it was
        interrupted.

    Raises:
        SystemExit: argparse was done (`--help`, `--version`) or refused an argument.

    Example:
        >>> from sessiongate.cli import main
        >>> main(["demo", "--url", "http://localhost"])
        2
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except ConfigurationError as error:
        return _fail(_MISUSED, str(error))
    except RedisError as error:
        return _fail(_FAILED, f"{without_secrets(arguments.url)}: {error}")
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has left (`| head`); what is held back must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    return _OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sessiongate", description="Sessions with signed tokens and named payloads, on Redis."
    )
    parser.add_argument("--version", action="version", version=f"sessiongate {__version__}")
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(title="commands", metavar="command")
    _add_demo(commands)
    _add_keygen(commands)
    return parser


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "demo",
        help="show the operations live, on memory or on a server",
        description="Shows the operations live: each call, how long it took and what came back. "
        "Nothing is left on the server.",
    )
    command.add_argument(
        "--url",
        default=MEMORY_URL,
        help="redis://host:6379/0, rediss://..., unix:///path/to/socket, "
        "redis+sentinel://host:26379,host:26379/mymaster, redis+cluster://host:7000,host:7001 or "
        "memory://; default: %(default)s",
    )
    command.set_defaults(run=lambda arguments: demo(arguments.url, Screen(sys.stdout)))


def _add_keygen(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "keygen",
        help="print a new sealing key",
        description="Prints a new sealing key: 32 random bytes in 64 hexadecimal digits. Keep it "
        "where your other secrets are.",
    )
    command.set_defaults(run=lambda _: Screen(sys.stdout).line(new_sealing_key()))


def _fail(code: int, message: str) -> int:
    # redis-py breaks some of its messages into lines, and a server may put anything into its own.
    shown = "".join(character if character.isprintable() else " " for character in message)
    Screen(sys.stderr).line(f"sessiongate: {' '.join(shown.split())}")
    return code
