"""One connection for many tasks: what waits while it is busy leaves together when it is free.

A lane writes a batch of requests at once, reads their replies in order, and gives each to the
caller whose echo it carries. Cancelling a caller neither stops its batch nor leaves its reply on
the wire, where the next caller would find it.
"""

import asyncio
from collections import OrderedDict, deque
from copy import copy
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from .call import lost, refuses
from .command import PROBE, Answer, AnyCommand, NotRun, mark_of
from .errors import EventLoopError, GateClosedError
from .primaries import primary_of
from .routes import ASKING, REDIRECTIONS
from .timed import FOREVER, within_async
from .wire import (
    UNREADABLE,
    may_be_garbled,
    misplaced,
    new_echo,
    new_echoes,
    pack,
    unpack,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

# More in a batch make no command cheaper, and let the first wait for the last.
_BATCH_COMMANDS = 512
_BATCH_BYTES = 256 * 1024


class Waiting(NamedTuple):
    """A command, and where its caller waits for the answer."""

    command: AnyCommand
    answer: asyncio.Future[Answer]
    due: float  # by the event loop's clock
    asking: bool = False  # sent there by a server of a cluster whose slot is about to move

    def settle(self, answer: Answer) -> None:
        """Give the caller what came of it."""
        if not self.answer.done():  # it was cancelled: nobody wants it any more
            self.answer.set_result(answer)

    def refuse(self, error: Exception) -> None:
        """Raise an error at the caller, whose command was not sent."""
        if not self.answer.done():
            self.answer.set_exception(error)


class Batch:
    """Requests that leave together, and how far their replies were read.

    `sound` is whether the connection has kept its place, once the exchange is over. On one that is
    `fresh` nothing was asked before: what the server says there is meant for this batch.
    """

    __slots__ = (
        "_answered",
        "_asked",
        "_echoes",
        "_fresh",
        "_members",
        "_misread",
        "_moved",
        "_unsure",
        "_waited_for",
        "_written",
        "sound",
    )

    def __init__(self, members: list[Waiting], *, fresh: bool) -> None:
        self.sound = False
        self._fresh = fresh
        self._waited_for: list[tuple[Waiting, bytes]] = []  # replicas have to have what they wrote
        self._members = members
        self._echoes = new_echoes(len(members))
        self._unsure: list[tuple[Waiting, ResponseError]] = []
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
            watch.progressed(member.due)
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
            command = member.command
            if command.replicas and type(answer) is bytes and command.awaits(answer):
                self._waited_for.append((member, answer))
                continue
            if isinstance(answer, Exception):
                self._misread = self._misread or _is_misplaced(answer)
                self._moved = self._moved or isinstance(answer, redis_errors.ReadOnlyError)
                answer = _judged(answer, proven=proven or self._fresh)
            member.settle(answer)
        foreign = self._misread or _is_misplaced(answer)
        self.sound = proven and not (foreign or self._moved)
        for member, refusal in self._unsure:
            # A redirection says that the command did not run: not so one that is not proven.
            dubious = isinstance(refusal, REDIRECTIONS) or may_be_garbled(refusal)
            believed = misplaced() if foreign or (dubious and not proven) else refusal
            member.settle(_judged(believed, proven=proven or self._fresh))
        if self._waited_for:
            await self._await_replicas(connection, watch)

    async def _await_replicas(self, connection: AbstractConnection, watch: "Watch") -> None:
        """Wait on the connection that wrote: on another one WAIT does not know what to wait for."""
        sound, self.sound = self.sound, False
        members = [member for member, _ in self._waited_for]
        due = min(member.due for member in members)
        watch.be_patient(due)
        for command in (mark_of(member.command) for member in members if member.command.unmarked):
            echo = new_echo()
            await connection.send_packed_command(pack(command, echo))
            marked, _ = unpack(await _read(connection), echo)
            if isinstance(marked, Exception):
                self._settle_waiting(0, marked)
                return
        left = due - asyncio.get_running_loop().time()
        most = max(member.command.replicas for member in members)
        await connection.send_packed_command(wait_for(most, left))
        count = await _read(connection)
        if isinstance(count, int) and count >= min(member.command.replicas for member in members):
            # A number proves nothing: if it was misread it will not be so twice.
            await connection.send_packed_command(wait_for(most, 0))
            again = await _read(connection)
            count = min(count, again) if isinstance(again, int) else again
        if isinstance(count, int):
            self._settle_waiting(count, None)
            self.sound = sound
        else:
            error = count if isinstance(count, Exception) else misplaced()
            self._settle_waiting(0, error)

    def _settle_waiting(self, count: int, error: Exception | None) -> None:
        for member, reply in self._waited_for:
            member.settle(member.command.written(reply, count, error))

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
        probe = Waiting(PROBE, asyncio.get_running_loop().create_future(), FOREVER)
        echo = new_echo()
        self._members.append(probe)
        self._echoes.append(echo)
        await connection.send_packed_command(pack(PROBE, echo))

    @property
    def due(self) -> float:
        """When the first of the callers wants to have its answer."""
        return min([member.due for member in self._members])

    @property
    def owes(self) -> bool:
        """Whether replies are on their way that nobody has read."""
        return self._written and self._answered < len(self._members)

    def fail(self, error: Exception) -> None:
        """Give the error to all who have no answer: what became of their commands is unknown."""
        self._settle_waiting(0, error)
        for member in self._members:
            member.settle(_copied(error))

    def abandon(self) -> None:
        """Cancel all who have no answer."""
        for member in self._members:
            member.answer.cancel()

    async def settled(self) -> None:
        """Wait until all have an answer."""
        await asyncio.wait([member.answer for member in self._members])


def _is_misplaced(answer: Answer) -> bool:
    """Whether it says that the connection has lost its place."""
    return isinstance(answer, Exception) and lost(answer)


def _judged(answer: Answer, *, proven: bool) -> Answer:
    """An answer, or that the command did not run if the server would not run it now."""
    if proven and isinstance(answer, Exception) and refuses(answer):
        return NotRun(answer)
    return answer


async def _read(connection: AbstractConnection) -> object:
    try:
        return await connection.read_response(disable_decoding=True, disconnect_on_error=False)
    except UNREADABLE:
        return None  # which is no reply of ours
    except RedisError as error:
        # A connection that Sentinel manages makes this of it.
        if isinstance(error.__context__, redis_errors.ReadOnlyError):
            return error.__context__
        if lost(error):
            raise  # the connection's; all others are the server's, and an answer
        return error


def _unconnected(error: Exception) -> NotRun:
    """What came of a command for which there is no connection."""
    if isinstance(error, RedisError):
        return NotRun(_copied(error))
    if isinstance(error, OSError):
        # What redis-py lets through: of TLS, of a name that cannot be looked up.
        return NotRun(redis_errors.ConnectionError(f"{type(error).__name__} while connecting"))
    return NotRun(error)


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


class Room:
    """So many places; who finds none waits for a turn, in the order of coming.

    To take one is up to the caller, `places -= 1`, if there is one: asyncio's Semaphore, with its
    coroutines, is a tenth of all that the client does for a call.
    """

    __slots__ = ("_queue", "places")

    def __init__(self, places: int) -> None:
        self.places = places
        self._queue: deque[asyncio.Future[None]] = deque()

    async def turn(self, turn: "asyncio.Future[None]") -> None:
        """Wait for a place, and take it."""
        self._queue.append(turn)
        try:
            await turn
        except BaseException:
            if turn in self._queue:
                self._queue.remove(turn)
            elif not turn.cancelled():
                self.leave()  # it came in the very moment in which the caller was cancelled
            raise

    def leave(self) -> None:
        """Give up a place: to who has waited longest, if anybody."""
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():  # else it was cancelled
                turn.set_result(None)
                return
        self.places += 1


class Watch:
    """Ends an exchange that makes no progress or is due, with one timer for any number of them.

    To set a timer and take it back costs more than to read a reply. This one stays; where it goes
    off too early it is set anew.
    """

    __slots__ = ("_deadline", "_due", "_loop", "_now", "_seconds", "_timer")

    def __init__(self, seconds: float) -> None:
        self._loop: asyncio.AbstractEventLoop
        self._now: Callable[[], float] = monotonic
        self._seconds = seconds
        self._deadline: asyncio.Timeout | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, due: float) -> asyncio.Timeout:
        """The context of an exchange, which ends with a TimeoutError if it must."""
        self._deadline = asyncio.timeout(None)
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self.progressed(due)
        if self._due < FOREVER and (self._timer is None or self._timer.when() > self._due):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(self._due, self._look)
        return self._deadline

    def progressed(self, due: float) -> None:
        """Begin to count anew, for what has to be over by then."""
        limit = self._now() + self._seconds
        self._due = min(limit, due)

    def be_patient(self, due: float) -> None:
        """Wait until then, whatever comes in."""
        self._due = due

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

    What waits for replicas has a lane of its own: it would hold up all others.

    Args:
        pool: how connections are made; the lane makes one of its own and takes none of the pool's.
        max_waiting: how many commands may be under way; more callers wait for room.
        a_try: seconds that an exchange may last without progress, if the client allows as many.
    """

    def __init__(self, pool: ConnectionPool, max_waiting: int, a_try: float = FOREVER) -> None:
        self._make_slow_lane: Callable[[], Lane] = lambda: Lane(pool, max_waiting, a_try)
        self._slow_lane: Lane | None = None
        self._room = Room(max_waiting)
        self._waiting: OrderedDict[asyncio.Future[Answer], Waiting] = OrderedDict()
        self._loop = OneLoop()
        self._primary = primary_of(pool)
        self._pool: ConnectionPool = self._primary.pool if self._primary else pool
        self._connection, self._has_unread = self._new_connection()
        self._timeout: float | None = self._connection.socket_timeout
        self._a_try = a_try
        self._watch = Watch(min(a_try, FOREVER if self._timeout is None else self._timeout))
        self._batch: Batch | None = None
        self._unfinished: Batch | None = None  # cancelled while its replies were on their way
        self._busy = False
        self._alone = False  # the last batch was of one command
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def ask(
        self, command: AnyCommand, due: float, *, asking: bool = False
    ) -> "Coroutine[Any, Any, Answer]":
        """What comes of a command, once it was its turn.

        It is over in time if calls that came before are due before.
        """
        lane = self
        if command.replicas:
            if self._slow_lane is None:
                self._slow_lane = self._make_slow_lane()
            lane = self._slow_lane
        return lane._ask(command, due, asking=asking)  # noqa: SLF001  # a lane

    async def _ask(self, command: AnyCommand, due: float, *, asking: bool) -> Answer:
        loop = self._loop.check()
        if self._alone and not self._busy and self._unfinished is None and not self._closed:
            return await self._ask_alone(command, due, asking=asking)
        room = self._room
        if room.places:
            room.places -= 1
        else:
            await room.turn(loop.create_future())
        answer: asyncio.Future[Answer] = loop.create_future()
        try:
            if self._closed:
                raise GateClosedError
            self._waiting[answer] = Waiting(command, answer, due, asking)
            if not self._busy:
                # A task begins when the other tasks of this turn of the loop have had theirs.
                self._go_on()
            return await answer
        finally:
            self._waiting.pop(answer, None)
            room.leave()

    async def _ask_alone(self, command: AnyCommand, due: float, *, asking: bool) -> Answer:
        """Ask in the caller's own task, which is faster if nobody else is waiting."""
        self._busy = True
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            usable = await self._is_usable(due)
            if self._closed:
                raise GateClosedError
            if usable:
                await self._run(Batch([Waiting(command, answer, due, asking)], fresh=False), due)
            else:
                self._waiting[answer] = Waiting(command, answer, due, asking)
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
        if self._slow_lane is not None:
            await self._slow_lane.close()
        while self._waiting:
            self._next().refuse(GateClosedError())
        if self._batch is not None:
            await self._batch.settled()
        if self._task is not None:
            self._task.cancel()  # it may still be connecting, for nobody
            await asyncio.wait([self._task])
        await self._connection.disconnect()
        if self._primary:
            await self._primary.close()

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
            error = None if task.cancelled() else task.exception()
            while self._waiting:
                waiting = self._next()
                if isinstance(error, Exception):
                    waiting.refuse(error)
                else:
                    waiting.answer.cancel()

    def _next(self) -> Waiting:
        return self._waiting.popitem(last=False)[1]

    async def _send_all(self) -> None:
        """Send what is waiting, batch by batch, until nothing is."""
        if self._unfinished is not None:
            await self._run(self._unfinished, self._unfinished.due)
        while self._waiting:
            fresh = not await self._is_usable(next(iter(self._waiting.values())).due)
            if fresh:
                try:
                    await self._connect()
                except Exception as error:  # noqa: BLE001  # whatever it is, nobody may hang
                    # Nobody can be served now: to tell all beats one timeout after the other.
                    while self._waiting:
                        self._next().settle(_unconnected(error))
                    continue
            batch = self._next_batch(fresh=fresh)
            if len(batch):
                await self._run(batch, batch.due)
        self._busy = False
        self._task = None

    def _next_batch(self, *, fresh: bool) -> Batch:
        members: list[Waiting] = []
        size = 0
        while self._waiting and len(members) < _BATCH_COMMANDS:
            size += sum(map(len, next(iter(self._waiting.values())).command.args))
            if members and size > _BATCH_BYTES:
                break
            waiting = self._next()
            if not waiting.answer.done():  # cancelled before it was sent
                members.append(waiting)
        return Batch(members, fresh=fresh)

    async def _run(self, batch: Batch, due: float) -> None:
        self._batch = batch
        self._unfinished = None
        self._alone = len(batch) == 1
        try:
            async with self._watch.start(due):
                await batch.exchange(self._connection, self._watch)
        except TimeoutError:
            batch.fail(redis_errors.TimeoutError("Timeout waiting for the replies of Redis"))
        except Exception as error:  # noqa: BLE001  # whatever it is, nobody may hang
            batch.fail(error)
        except BaseException as error:
            # Who is cancelled here waits for himself alone, or for a task that was cancelled.
            batch.abandon()
            if batch.owes:
                self._unfinished = batch
            elif not isinstance(error, GeneratorExit):  # nothing is awaited any more
                # It was only half written, or a WAIT is under way, which nobody shall wait for.
                await self._connection.disconnect(nowait=True)
            raise
        finally:
            self._watch.stop()
            self._batch = None
        if not batch.sound:
            await self._connection.disconnect(nowait=True)

    async def _is_usable(self, due: float) -> bool:
        """Whether there is a connection that the server has not closed, with nothing to read."""
        if not self._connection.is_connected:
            return False
        # Until redis-py 8 hiredis's parser raises what others tell: the server has closed it.
        primary = self._primary
        try:
            left = primary is not None and await primary.is_left_by(self._connection, due)
            if not left and not await self._has_unread():
                return True
        except (RedisError, OSError):  # `suppress` costs time, for each batch
            pass
        await self._connection.disconnect(nowait=True)
        return False

    async def _connect(self) -> None:
        due = min(waiting.due for waiting in self._waiting.values())
        due = min(due, asyncio.get_running_loop().time() + self._a_try)
        connection = self._connection
        connection.socket_timeout = self._timeout
        try:
            await within_async(
                due, connection.connect(), lambda _: connection.disconnect(nowait=True)
            )
        except BaseException:
            # It may be connecting still, or connected to the wrong database: redis-py leaves a
            # handshake that failed otherwise than by an error of its own as it is.
            self._connection, self._has_unread = self._new_connection()
            await connection.disconnect(nowait=True)
            raise
        if self._primary:
            self._primary.noted(connection)
        # From here on a batch keeps the time, once for all of its replies.
        connection.socket_timeout = None

    def _new_connection(self) -> "tuple[AbstractConnection, Callable[[], Awaitable[bool]]]":
        connection: AbstractConnection = self._pool.make_connection()
        # What is sent again is decided elsewhere, and so is for how long to connect.
        connection.retry = Retry(NoBackoff(), 0)
        # Until redis-py 8 the check for what is unread had another name.
        check = getattr(connection, "can_read", connection.can_read_destructive)
        return connection, check
