"""One connection for many tasks: what waits while it is busy leaves together when it is free.

A lane writes a batch of requests at once, reads their replies in order, and gives each to the
caller whose echo it carries. Cancelling a caller neither stops its batch nor leaves its reply on
the wire, where the next caller would find it.
"""

import asyncio
from collections import OrderedDict
from copy import copy
from typing import TYPE_CHECKING, NamedTuple

from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import RedisError, ResponseError

from .command import PROBE, Answer, AnyCommand
from .errors import EventLoopError, GateClosedError
from .routes import ASKING, REDIRECTIONS
from .wire import misplaced, new_echo, new_echoes, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# More in a batch make no command cheaper, and let the first wait for the last.
_BATCH_COMMANDS = 512
_BATCH_BYTES = 256 * 1024


class Waiting(NamedTuple):
    """A command, and where its caller waits for the answer."""

    command: AnyCommand
    answer: asyncio.Future[Answer]
    asking: bool = False  # sent there by a server of a cluster whose slot is about to move

    def settle(self, answer: Answer) -> None:
        """Give the caller the answer, or an error of sending it."""
        if not self.answer.done():  # it was cancelled: nobody wants it any more
            self.answer.set_result(answer)

    def refuse(self, error: Exception) -> None:
        """Raise an error at the caller, whose command was not sent."""
        if not self.answer.done():
            self.answer.set_exception(error)


class Batch:
    """Requests that leave together, and how far their replies were read.

    `sound` is whether the connection has kept its place, once the exchange is over.
    """

    __slots__ = (
        "_answered",
        "_asked",
        "_echoes",
        "_members",
        "_misread",
        "_moved",
        "_unsure",
        "_written",
        "sound",
    )

    def __init__(self, members: list[Waiting]) -> None:
        self.sound = False
        self._members = members
        self._echoes = new_echoes(len(members))
        self._unsure: list[tuple[Waiting, Answer]] = []
        self._misread = False
        self._moved = False  # the primary became a replica: only a new connection finds the next
        self._written = False
        self._answered = 0
        self._asked = False  # the reply to the ASKING of the next member was read

    def __len__(self) -> int:
        return len(self._members)

    async def exchange(self, connection: AbstractConnection, watch: "Watch") -> None:
        """Write the requests and read as many replies, each judged by its own echo.

        Goes on where it was cancelled if it is called again and still owes replies.
        """
        if not self._written:
            await self._write(connection)
        proven = False
        answer: Answer = b""
        while self._answered < len(self._members):
            member = self._members[self._answered]
            reply = await _read(connection)
            watch.progressed()
            if member.asking and not self._asked:
                # Whatever it says: the command's own reply shows whether it served.
                self._asked = True
                continue
            self._asked = False
            answer, proven = unpack(reply, self._echoes[self._answered])
            self._answered += 1
            if not proven and isinstance(answer, ResponseError):
                # The server's own errors have no echo: is the last reply the last request's?
                self._unsure.append((member, answer))
                if len(self._unsure) == 1:
                    await self._send_probe(connection)
                continue
            self._misread = self._misread or isinstance(answer, redis_errors.ConnectionError)
            self._moved = self._moved or isinstance(answer, redis_errors.ReadOnlyError)
            member.settle(answer)
        self.sound = proven and not (self._misread or self._moved)
        foreign = self._misread or isinstance(answer, redis_errors.ConnectionError)
        for member, refusal in self._unsure:
            # A redirection says that the command did not run: not so one that is not proven.
            unproven = not proven and isinstance(refusal, REDIRECTIONS)
            member.settle(misplaced() if foreign or unproven else refusal)

    async def _write(self, connection: AbstractConnection) -> None:
        pieces: list[bytes] = []
        for member, echo in zip(self._members, self._echoes, strict=True):
            if member.asking:
                pieces += ASKING
            pieces += pack(member.command, echo)
        # Private to redis-py, which closes an interrupted connection only once its buffer went
        # out: a request that is over would still be sent, behind what comes on a new one.
        writer = getattr(connection, "_writer", None)
        try:
            await connection.send_packed_command(pieces)
        except BaseException:
            if transport := getattr(writer, "transport", None):
                transport.abort()
            raise
        self._written = True

    async def _send_probe(self, connection: AbstractConnection) -> None:
        probe = Waiting(PROBE, asyncio.get_running_loop().create_future())
        echo = new_echo()
        self._members.append(probe)
        self._echoes.append(echo)
        await connection.send_packed_command(pack(PROBE, echo))

    @property
    def owes(self) -> bool:
        """Whether replies are on their way that nobody has read."""
        return self._written and self._answered < len(self._members)

    def fail(self, error: Exception) -> None:
        """Give the error to all who have no answer: what became of their commands is unknown."""
        for member in self._members:
            member.settle(_copied(error))

    def abandon(self) -> None:
        """Cancel all who have no answer."""
        for member in self._members:
            member.answer.cancel()

    async def settled(self) -> None:
        """Wait until all have an answer."""
        await asyncio.wait([member.answer for member in self._members])


async def _read(connection: AbstractConnection) -> object:
    try:
        return await connection.read_response(disable_decoding=True, disconnect_on_error=False)
    except RedisError as error:
        if type(error) in (redis_errors.ConnectionError, redis_errors.TimeoutError):
            raise  # the connection's; all others are the server's, and an answer
        return error


def _copied(error: Exception) -> Exception:
    """An error for one more caller, or the same one if it cannot be copied."""
    try:
        return copy(error)
    except Exception:  # noqa: BLE001  # what a class makes of its arguments is its own affair
        return error


class OneLoop:
    """Remembers the event loop that it is first used in."""

    __slots__ = ("_loop",)

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def check(self) -> asyncio.AbstractEventLoop:
        """The running event loop; an EventLoopError if it is another one than before."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            if self._loop is not None:
                raise EventLoopError
            self._loop = loop
        return loop


class Watch:
    """Ends an exchange that makes no progress, with one timer for any number of exchanges.

    To set a timer and take it back costs more than to read a reply. This one stays; where it goes
    off too early it is set anew.
    """

    __slots__ = ("_deadline", "_due", "_loop", "_seconds", "_timer")

    def __init__(self, seconds: float | None) -> None:
        self._loop: asyncio.AbstractEventLoop
        self._seconds = seconds
        self._deadline: asyncio.Timeout | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> asyncio.Timeout:
        """The context of an exchange, which ends with a TimeoutError if it must."""
        self._deadline = asyncio.timeout(None)
        self._loop = asyncio.get_running_loop()
        self.progressed()
        if self._timer is None and self._seconds is not None:
            self._timer = self._loop.call_at(self._due, self._look)
        return self._deadline

    def progressed(self) -> None:
        """Begin to count anew."""
        if self._seconds is not None:
            self._due = self._loop.time() + self._seconds

    def stop(self) -> None:
        """The exchange has ended."""
        self._deadline = None

    def _look(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        now = self._loop.time()
        if now < self._due:
            self._timer = self._loop.call_at(self._due, self._look)
        else:
            self._deadline.reschedule(now)


class Lane:
    """Sends the commands of one event loop to one server.

    Args:
        pool: how connections are made; the lane makes one of its own and takes none of the pool's.
        max_waiting: how many commands may be under way; more callers wait for room.
    """

    def __init__(self, pool: ConnectionPool, max_waiting: int) -> None:
        self._room = asyncio.Semaphore(max_waiting)
        self._waiting: OrderedDict[asyncio.Future[Answer], Waiting] = OrderedDict()
        self._loop = OneLoop()
        self._connection: AbstractConnection = pool.make_connection()
        # Until redis-py 8 the check had another name.
        self._has_unread: Callable[[], Awaitable[bool]] = getattr(
            self._connection, "can_read", self._connection.can_read_destructive
        )
        self._timeout: float | None = self._connection.socket_timeout
        self._watch = Watch(self._timeout)
        self._batch: Batch | None = None
        self._unfinished: Batch | None = None  # cancelled while its replies were on their way
        self._busy = False
        self._alone = False  # the last batch was of one command
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def ask(self, command: AnyCommand, *, asking: bool = False) -> Answer:
        """The answer to a command, once it was its turn."""
        loop = self._loop.check()
        if self._alone and not self._busy and self._unfinished is None and not self._closed:
            return await self._ask_alone(command, asking=asking)
        async with self._room:
            if self._closed:
                raise GateClosedError
            answer: asyncio.Future[Answer] = loop.create_future()
            self._waiting[answer] = Waiting(command, answer, asking)
            if not self._busy:
                # A task begins when the other tasks of this turn of the loop have had theirs.
                self._go_on()
            try:
                return await answer
            finally:
                self._waiting.pop(answer, None)

    async def _ask_alone(self, command: AnyCommand, *, asking: bool) -> Answer:
        """Ask in the caller's own task, which is faster if nobody else is waiting."""
        self._busy = True
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            if await self._is_usable():
                await self._run(Batch([Waiting(command, answer, asking)]))
            else:
                self._waiting[answer] = Waiting(command, answer, asking)
        finally:
            # If the caller was cancelled, others may be left; or all were, with their event loop.
            if self._waiting and not all(other.done() for other in self._waiting):
                self._go_on()
            else:
                self._busy = False
        try:
            return await answer
        finally:
            self._waiting.pop(answer, None)

    async def close(self) -> None:
        """Fail what waits, let finish what was sent, and close the connection."""
        self._loop.check()
        self._closed = True
        while self._waiting:
            self._next().refuse(GateClosedError())
        if self._batch is not None:
            await self._batch.settled()
        if self._task is not None:
            self._task.cancel()  # it may still be connecting, for nobody
            await asyncio.wait([self._task])
        await self._connection.disconnect()

    def _go_on(self) -> None:
        self._busy = True
        self._alone = False
        self._task = asyncio.create_task(self._send_all(), name="sessiongate")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self._task is task:
            self._task = None
            self._busy = False
            # Somebody cancelled all tasks, as at the end of a loop, this one perhaps before it had
            # begun: let no caller wait for nothing.
            while self._waiting:
                self._next().answer.cancel()

    def _next(self) -> Waiting:
        return self._waiting.popitem(last=False)[1]

    async def _send_all(self) -> None:
        """Send what is waiting, batch by batch, until nothing is."""
        if self._unfinished is not None:
            await self._run(self._unfinished)
        while self._waiting:
            try:
                if not await self._is_usable():
                    await self._connect()
            except Exception as error:  # noqa: BLE001  # whatever it is, nobody may hang
                # Nobody can be served now: to tell all beats one timeout after the other.
                while self._waiting:
                    self._next().refuse(_copied(error))
            else:
                await self._run(self._next_batch())
        self._busy = False
        self._task = None

    def _next_batch(self) -> Batch:
        members: list[Waiting] = []
        size = 0
        while self._waiting and len(members) < _BATCH_COMMANDS:
            size += sum(map(len, next(iter(self._waiting.values())).command.args))
            if members and size > _BATCH_BYTES:
                break
            waiting = self._next()
            if not waiting.answer.done():  # cancelled before it was sent
                members.append(waiting)
        return Batch(members)

    async def _run(self, batch: Batch) -> None:
        if not len(batch):
            return
        self._batch = batch
        self._unfinished = None
        self._alone = len(batch) == 1
        try:
            async with self._watch.start():
                await batch.exchange(self._connection, self._watch)
        except TimeoutError:
            batch.fail(redis_errors.TimeoutError("Timeout waiting for the replies of Redis"))
        except Exception as error:  # noqa: BLE001  # whatever it is, nobody may hang
            batch.fail(error)
        except BaseException:
            # Who is cancelled here waits for himself alone, or for a task that was cancelled.
            batch.abandon()
            self._unfinished = batch if batch.owes else None
            raise
        finally:
            self._watch.stop()
            self._batch = None
        if not batch.sound:
            await self._connection.disconnect(nowait=True)

    async def _is_usable(self) -> bool:
        """Whether there is a connection that the server has not closed, with nothing to read."""
        if not self._connection.is_connected:
            return False
        if not await self._has_unread():
            return True
        await self._connection.disconnect(nowait=True)
        return False

    async def _connect(self) -> None:
        self._connection.socket_timeout = self._timeout
        try:
            await self._connection.connect()
        except BaseException:
            # redis-py leaves a handshake that failed otherwise than by an error of its own as it
            # is: connected, perhaps to the wrong database.
            await self._connection.disconnect(nowait=True)
            raise
        # From here on a batch keeps the time, once for all of its replies.
        self._connection.socket_timeout = None
