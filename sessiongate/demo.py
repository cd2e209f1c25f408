"""What `sessiongate demo` shows: the operations run on a server, as lines that a reader could type."""

import os
import shutil
import textwrap
import time
from contextlib import suppress
from secrets import token_bytes
from typing import TextIO
from urllib.parse import urlsplit

from . import __version__
from .connect import MEMORY_URL
from .errors import InvalidSessionError, PayloadNotFoundError
from .gate import SessionGate

# Comments and calls, shown as they stand and run as they stand. Nothing lives longer than the 60
# seconds of the first one, even if the server is lost before `end`.
_LINES = """\
# A session, its payloads read and written one by one
token = gate.start(60, {"user": "John Doe"})
gate.pget(token, "user")
gate.pset(token, "cart", '["book"]')
gate.pget(token, "cart")
gate.pdel(token, "cart")
gate.pget(token, "cart")
gate.expire(token, 30)

# Tokens are verified in this process: a forged one never reaches the server
gate.verify(token)
forged = token[:20] + 64 * "0"
gate.pget(forged, "user")
gate.pget(token[:40], "user")

# The session ends, and its payloads with it
gate.end(token)
gate.pget(token, "user")
""".splitlines()

_CALL_COLUMN = max(map(len, _LINES)) if all(len(line) < 48 for line in _LINES) else 48
_WIDTH = 100
