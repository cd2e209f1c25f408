"""Campaign "under-replicated": sessions end, no replica has that, and the primary dies.

Their end may be lost with it: then the caller was told so beforehand.
"""

import asyncio
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from sessiongate import (
    AsyncSessionGate,
    SessionGate,
    SessionNotFoundError,
    UnderReplicatedError,
)
from tests.sentinels import Sentinels, frozen
from tests.servers import Server

from .groups import BACK, Fault, Log, in_groups
from .harness import Campaign, Tally

AnyGate = SessionGate | AsyncSessionGate

_FAILOVERS = 100
_SIGN_KEY = "a sign key of the replicas' campaign, 32 bytes"
_TTL = 3_600
_TIMEOUT = 0.8  # it is expected to be used up


class _Ender:
    """Ends sessions through gates of every flavour in turn, and looks what became of them."""

    def __init__(self, sentinels: Sentinels, log: Log) -> None:
        self._log = log
        self._runner = asyncio.Runner()
        url = sentinels.url
        self._gates: list[AnyGate] = [
            SessionGate.from_url(url, sign_key=_SIGN_KEY, timeout=_TIMEOUT),
            AsyncSessionGate.from_url(url, sign_key=_SIGN_KEY, timeout=_TIMEOUT),
            AsyncSessionGate.from_url(
                url, sign_key=_SIGN_KEY, timeout=_TIMEOUT, auto_pipeline=False
            ),
        ]
        self._next = 0

    def start(self) -> str:
        """Start a session, which the next gate in turn is to end."""
        self._next = (self._next + 1) % len(self._gates)
        token = self._insist(lambda gate: gate.start(_TTL, {"text": "x"}, min_replicas=2))
        assert isinstance(token, str)
        return token

    def end(self, token: str) -> int | None:
        """End it, if one replica has that: how many had, or None if there was no error."""
        gate = self._gates[self._next]
        begun = time.monotonic()
        error = None
        try:
            self._call(gate.end(token, min_replicas=1))
        except Exception as raised:  # noqa: BLE001  # all are judged
            error = raised
        self._log.answered(f"end by {gate!r}", _TIMEOUT, begun, error)
        if isinstance(error, UnderReplicatedError):
            if error.result() is not None or error.min_replicas != 1:
                self._log.fail(f"end says {error.result()!r}, {error.min_replicas}")
            return error.replicas
        if error is not None:
            self._log.fail(f"end by {gate!r}: {error!r}")
        return None

    def lives(self, token: str) -> bool:
        """Whether the session is there, once somebody can tell."""
        try:
            self._insist(lambda gate: gate.touch(token))
        except SessionNotFoundError:
            return False
        return True

    def _insist(self, ask: Callable[[AnyGate], Any]) -> object:
        deadline = time.monotonic() + BACK
        while True:
            begun = time.monotonic()
            try:
                return self._call(ask(self._gates[self._next]))
            except SessionNotFoundError:
                raise
            except (RedisError, UnderReplicatedError) as error:
                self._log.answered("a call", _TIMEOUT, begun, error)
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def _call(self, answer: Any) -> object:
        return self._runner.run(answer) if asyncio.iscoroutine(answer) else answer

    def close(self) -> None:
        for gate in self._gates:
            if isinstance(gate, SessionGate):
                gate.close()
            else:
                self._call(gate.aclose())
        self._runner.close()


def _cut_off(server: Server) -> None:
    """Close a primary's connections to its replicas: what it writes now is on its way to none."""
    with server.client() as client:
        client.client_kill_filter(_type="replica")


def _end_and_fail(
    sentinels: Sentinels, log: Log, ender: _Ender, *, live: int, cut: bool
) -> tuple[bool, Server]:
    """End a session, with so many replicas live, and let the primary die.

    Returns whether the session lives on its successor, and which that is.
    """
    primary, replicas = sentinels.primary(), sentinels.replicas()
    token = ender.start()
    log.faults.append(Fault(f"{2 - live} frozen{', cut off' * cut}", time.monotonic()))
    with frozen(*replicas[live:]):
        if cut:
            _cut_off(primary)
        had = ender.end(token)
        primary.kill()
    if had != (None if live else 0):
        log.fail(f"end says that {had} replicas had it, and {live} could have it")
    return ender.lives(token), sentinels.successor(primary)


def _under_replicate(log: Log, binary: Path, numbers: range, _: random.Random) -> Tally:
    threading.Thread(target=log.watch_the_machine, daemon=True).start()
    with Sentinels(binary) as sentinels:
        ender = _Ender(sentinels, log)
        for number in numbers:
            sentinels.mend()
            if number % 6 == 1:
                caught_up = sentinels.replicas()[0]
                alive, successor = _end_and_fail(sentinels, log, ender, live=1, cut=False)
                log.add("ends that one replica had")
                log.add("of these, the other promoted", successor is not caught_up)
                if alive:
                    log.fail("a session lives whose end one replica had")
            else:
                # What is on its way to a frozen replica still reaches it; cut off, it gets nothing.
                alive, _successor = _end_and_fail(
                    sentinels, log, ender, live=0, cut=number % 2 == 1
                )
                log.add("failovers")
                log.add("sessions that lived again", alive)
        ender.close()
    log.stop.set()
    return Tally()


def _run(dice: random.Random, scale: float) -> Tally:
    # Five of six are those that the goal counts.
    return in_groups(_under_replicate, max(2, round(_FAILOVERS * 6 / 5 * scale)), dice)


CAMPAIGN = Campaign(
    "under-replicated",
    "`end` with frozen replicas, then failover: 100, each raised UnderReplicatedError beforehand",
    _run,
    0.01,
)
