"""`make bench`: the table and the file that it writes. Figures themselves are judged by readers."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_bench_measures_every_figure(tmp_path: Path) -> None:
    """A quick run prints a row for each goal of the project, and writes the same as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--quick"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": str(Path(sys.executable).parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for row in (
        "pget / hget",
        "pset / hset",
        "async pget / hget, 64 tasks",
        "async pget / hget, 64 tasks, p99",
        "async pget / hget, 8 tasks",
        "async pget / hget, one task",
        "pget with an idle timeout / without",
        "start with a subject / without",
        "end_all of 1,000 sessions",
        "sessions, 10,000 of them expired",
        "subject, idle timeout, index: 10 a subject",
        "verifying a token",
        "pset and pget of 200 B, sealed / not",
        "pset and pget through JSON / encoded by hand",
        "pset and pget through msgpack / encoded by hand",
        "requests of a block that reads and writes",
        "memory of a session, no payload",
        "import sessiongate / import redis",
    ):
        assert row in done.stdout
    assert json.loads((tmp_path / "bench.json").read_text())
