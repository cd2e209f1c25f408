"""What holds whatever the fault: which errors may reach a caller, and what may stand in Redis."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from redis import Redis
from redis import exceptions as redis_errors

from sessiongate import SessionGateError
from tests.servers import server_binaries

from .harness import Tally

# How long a call may take beyond its timeout, in seconds: what computing takes, and the next turn
# of a busy machine.
TOLERANCE = 0.3

_CLASSIFIED = (
    SessionGateError,
    redis_errors.ConnectionError,
    redis_errors.TimeoutError,
    redis_errors.OutOfMemoryError,
    redis_errors.ReadOnlyError,
    redis_errors.ClusterDownError,
)
_CLASSIFIED_CODES = ("BUSY ", "NOREPLICAS ")


class Stalls:
    """Notices when this process was kept from running, by a thread that wakes all the time."""

    _STEP = 0.01
    _LATE = 0.02  # less than that is the turn of other threads

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        due = time.monotonic() + self._STEP
        while not self._over.wait(max(0, due - time.monotonic())):
            now = time.monotonic()
            if now - due > self._LATE:
                self._spans.append((due, now))
            due = now + self._STEP

    def between(self, begun: float, returned: float) -> float:
        """For how long of that time it did not run."""
        return sum(
            max(0.0, min(last, returned) - max(first, begun)) for first, last in self._spans[-500:]
        )

    @contextmanager
    def watched(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()


def is_classified(error: BaseException) -> bool:
    """Whether the error is one that callers are told of: ours, or one that names what failed."""
    # Some of redis-py's have subclasses that no server of the suite should bring about.
    if isinstance(error, redis_errors.InvalidResponse | redis_errors.AuthenticationError):
        return False
    if isinstance(error, _CLASSIFIED):
        return True
    return type(error) is redis_errors.ResponseError and str(error).startswith(_CLASSIFIED_CODES)


def newest_redis_7() -> Path:
    """The binary of the server that most are likely to have: Redis 7, else the newest there is."""
    binaries = server_binaries()
    return binaries[max(binaries, key=lambda name: ("redis-7" in name, _version(name)))]


def _version(name: str) -> list[int]:
    return [int(part) for part in name.rpartition("-")[2].split(".") if part.isdecimal()]


def check_keys(client: Redis, tally: Tally, pattern: str = "*") -> None:
    """Look at every key: one without a TTL is wrong, and a session that lacks its fingerprint."""
    for keys in _batches(client.scan_iter(pattern, count=1_000), 1_000):
        pipeline = client.pipeline(transaction=False)
        for key in keys:
            pipeline.pttl(key)
            pipeline.type(key)
        found = pipeline.execute()
        ttls = dict(zip(keys, found[::2], strict=True))
        kinds = dict(zip(keys, found[1::2], strict=True))
        sessions = [key for key in keys if kinds[key] == b"hash"]
        for key in sessions:
            pipeline.hmget(key, "fp", "ended", "taken")
        whole = dict(zip(sessions, map(any, pipeline.execute()), strict=True))
        tally.add("keys scanned for a ttl", len(keys))
        tally.wrong += [f"{key!r} has no ttl" for key, ttl in ttls.items() if ttl == -1]
        # One that is gone by now is no half session.
        tally.wrong += [
            f"{key!r} is a session without its fingerprint, and did not end"
            for key, has in whole.items()
            if not has and client.exists(key)
        ]


def _batches(keys: Iterator[bytes], size: int) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for key in keys:
        batch.append(key)
        if len(batch) == size:
            yield batch
            batch = []
    yield batch
