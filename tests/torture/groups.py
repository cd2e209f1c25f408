"""Groups of servers under sentinels that fail at the same time, and what is noted of each."""

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from redis.exceptions import ResponseError

from tests.servers import server_binaries

from .harness import Tally
from .rules import TOLERANCE, is_classified

_GROUPS = 4  # most of a failover is waiting

BACK = 15.0  # seconds after which every worker's calls succeed again
LAG = 0.5  # what was acknowledged so shortly before a primary failed may not be sent on
NOTICED = 3.0  # so long a gate may go on with a living primary that was replaced


class Fault:
    """A failover, and what it excuses: losses of what was acknowledged while it went on."""

    def __init__(self, kind: str, begun: float) -> None:
        self.kind = kind
        self.begun = begun
        self.agreed = float("inf")  # the sentinels name the new primary

    def covers(self, begun: float, ended: float) -> bool:
        return ended >= self.begun - LAG and begun <= self.agreed + NOTICED


class Log:
    """What the workers of a group share."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.faults: list[Fault] = []
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.stop = threading.Event()
        self.gap = 0.0
        self.slowest: dict[float, float] = {}
        self._lock = threading.Lock()
        self._stalls: deque[tuple[float, float]] = deque(maxlen=1_000)

    def covered(self, begun: float, ended: float, seen: float = 0.0) -> bool:
        """Whether a failover excuses the loss of what was acknowledged then, and last seen so."""
        return any(
            fault.covers(begun, ended) and fault.agreed + NOTICED >= seen for fault in self.faults
        )

    def add(self, what: str, count: int = 1) -> None:
        with self._lock:
            self.counts[what] += count

    def fail(self, text: str) -> None:
        now = time.monotonic()
        faults = ", ".join(
            f"{fault.kind} {now - fault.begun:.2f} s, agreed {now - fault.agreed:.2f} s"
            for fault in self.faults[-2:]
        )
        with self._lock:
            self.wrong.append(f"{self.name}: {text}; before: {faults or 'no fault'}")

    def answered(self, what: str, timeout: float, begun: float, error: Exception | None) -> None:
        """Take note of a call that is over."""
        now = time.monotonic()
        took = now - begun
        with self._lock:
            self.counts["calls"] += 1
            self.slowest[timeout] = max(self.slowest.get(timeout, 0.0), took)
            if error is not None:
                self.errors[type(error).__name__] += 1
        if took - self._stalled(begun, now) > timeout + TOLERANCE:
            self.fail(f"{what} took {took:.2f} s at a timeout of {timeout:g}: {error!r}")
        if error is not None and not _is_classified(error):
            self.fail(f"{what}: unclassified: {error!r}")

    def watch_the_machine(self) -> None:
        """Note when this process got no time: a call's delay by that is not its own."""
        before = time.monotonic()
        while not self.stop.wait(0.02):
            now = time.monotonic()
            if now - before > 0.1:
                self._stalls.append((before, now))
            before = now

    def _stalled(self, begun: float, ended: float) -> float:
        overlaps = (min(ended, end) - max(begun, start) for start, end in list(self._stalls))
        return sum(overlap for overlap in overlaps if overlap > 0)


def _is_classified(error: Exception) -> bool:
    # A WAIT that the primary was replaced under.
    unblocked = type(error) is ResponseError and str(error).startswith("UNBLOCKED ")
    return is_classified(error) or unblocked


def _binaries() -> list[tuple[str, Path]]:
    """Redis 7 and 6.2, or whatever there is."""
    found = sorted(server_binaries().items(), reverse=True)
    wanted = [one for one in found if one[0].startswith(("redis-6.2", "redis-7"))]
    return wanted or found


def in_groups(
    work: Callable[[Log, Path, range, random.Random], Tally], count: int, dice: random.Random
) -> Tally:
    """Divide so many pieces of work among groups of servers.

    Each has a thread of its own, which lives as long as its servers.
    """
    binaries = _binaries()
    groups = min(_GROUPS, count)
    tally = Tally()
    logs, futures = [], []
    with ThreadPoolExecutor(groups) as pool:
        for number in range(groups):
            name, binary = binaries[number % len(binaries)]
            part = range(count * number // groups, count * (number + 1) // groups)
            logs.append(log := Log(f"group {number}, {name}"))
            own = random.Random(dice.random())  # noqa: S311  # no secret
            futures.append(pool.submit(work, log, binary, part, own))
        for future in futures:
            tally.merge(future.result())
    _sum_up(tally, logs)
    return tally


def _sum_up(tally: Tally, logs: list[Log]) -> None:
    counts: Counter[str] = Counter()
    slowest: dict[float, float] = {}
    for log in logs:
        counts += log.counts + log.errors
        tally.wrong += log.wrong
        for timeout, took in log.slowest.items():
            slowest[timeout] = max(slowest.get(timeout, 0.0), took)
    for what in ("failovers", "calls"):
        if what in counts:
            tally.add(what, counts.pop(what))
    if gap := max(log.gap for log in logs):
        tally.figures["longest time without a write"] = f"{gap:.1f} s"
        if gap > BACK:
            tally.wrong.append(f"no write succeeded for {gap:.1f} s")
    for timeout, took in sorted(slowest.items()):
        tally.figures[f"longest call at a timeout of {timeout:g} s"] = f"{took:.2f} s"
    for what, count in sorted(counts.items()):
        tally.figures[what] = f"{count:,}"
