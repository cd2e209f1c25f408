"""Judges histories of one session: is there an order of its calls that explains all answers?

A call took effect at one moment between its beginning and its return. One without an answer may
have taken effect at any moment after it began, or never. The search is that of Wing and Gong, with
Lowe's memory of what was tried: the calls that had their turn, and the state that they led to.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

_INT64 = range(-(2**63), 2**63)


class No(Enum):
    """What a session answers instead of a result."""

    SESSION = "no session"
    PAYLOAD = "no payload"
    CONFLICT = "conflict"
    COUNTER = "no counter"
    OVERFLOW = "overflow"


class Unknown(Enum):
    """Stands for the answer of a call whose reply was lost."""

    UNKNOWN = "unknown"


UNKNOWN = Unknown.UNKNOWN

Held = tuple[tuple[str, bytes], ...]
Answer = None | bytes | int | Held | No


def held(payloads: Mapping[str, bytes]) -> Held:
    """Payloads as a value that can be compared and remembered."""
    return tuple(sorted(payloads.items()))


class Operation(NamedTuple):
    """What was asked for. A token is known by its generation: 0 as `start` returned it.

    `pset` with `expected` is if_match, `pset_new` is if_absent, `renew` answers the generation of
    the successor; without `grace` the old token is dead at once, else it outlives the history.
    """

    kind: str
    name: str = ""
    data: bytes = b""
    expected: bytes | None = None
    by: int = 1
    grace: bool = True
    many: Held = ()  # what pset_many stores, what pget_many asks for (names alone count)
    token: int = 0

    def __str__(self) -> str:
        usual = Operation._field_defaults
        told = self._asdict().items()
        return ", ".join(f"{field}={value!r}" for field, value in told if value != usual.get(field))


class State(NamedTuple):
    """A session between two calls: its payloads, or None if it ended, and which tokens open it."""

    payloads: Held | None
    generation: int = 0
    dead: frozenset[int] = frozenset()


class Call(NamedTuple):
    """One call: when it began and when it returned, on one clock, and what it was answered.

    That of an unknown answer does not matter: it may take effect later.
    """

    operation: Operation
    begun: float
    returned: float
    answer: Answer | Unknown

    def __str__(self) -> str:
        return f"[{self.begun:.6f}, {self.returned:.6f}] {self.operation} -> {self.answer!r}"


class Verdict(Enum):
    """What came out: undecided is a history that took too long."""

    RIGHT = "right"
    WRONG = "wrong"
    UNDECIDED = "undecided"


class Judgement(NamedTuple):
    """The verdict, and of what is wrong as much as could be explained."""

    verdict: Verdict
    why: str = ""


def step(operation: Operation, state: State) -> tuple[Answer, State]:
    """What a session answers to one call, and what it is after it."""
    if (
        state.payloads is None
        or operation.token > state.generation
        or operation.token in state.dead
    ):
        return No.SESSION, state
    if operation.kind == "end":
        return None, state._replace(payloads=None)
    if operation.kind == "renew":
        return _renew(operation, state)
    payloads = dict(state.payloads)
    answer = _ON_PAYLOADS[operation.kind](operation, payloads)
    return answer, state._replace(payloads=held(payloads))


def _renew(operation: Operation, state: State) -> tuple[Answer, State]:
    token = operation.token
    if token < state.generation:
        # Renewed before: the first of its successors that still opens the session.
        later = range(token + 1, state.generation + 1)
        return next(other for other in later if other not in state.dead), state
    dead = state.dead if operation.grace else state.dead | {token}
    return token + 1, State(state.payloads, token + 1, dead)


def _pget(operation: Operation, payloads: dict[str, bytes]) -> Answer:
    return payloads.get(operation.name, No.PAYLOAD)


def _pget_many(operation: Operation, payloads: dict[str, bytes]) -> Answer:
    asked = dict(operation.many)
    return held({name: data for name, data in payloads.items() if name in asked})


def _pall(_: Operation, payloads: dict[str, bytes]) -> Answer:
    return held(payloads)


def _touch(_: Operation, __: dict[str, bytes]) -> Answer:
    return None


def _pset(operation: Operation, payloads: dict[str, bytes]) -> Answer:
    if operation.expected not in (None, payloads.get(operation.name)):
        return No.CONFLICT
    payloads[operation.name] = operation.data
    return None


def _pset_new(operation: Operation, payloads: dict[str, bytes]) -> Answer:
    if operation.name in payloads:
        return No.CONFLICT
    payloads[operation.name] = operation.data
    return None


def _pset_many(operation: Operation, payloads: dict[str, bytes]) -> Answer:
    payloads.update(operation.many)
    return None


def _ppop(operation: Operation, payloads: dict[str, bytes]) -> Answer:
    return payloads.pop(operation.name, No.PAYLOAD)


def _pdel(operation: Operation, payloads: dict[str, bytes]) -> Answer:
    return None if payloads.pop(operation.name, None) else No.PAYLOAD


def _pincr(operation: Operation, payloads: dict[str, bytes]) -> Answer:
    before = payloads.get(operation.name, b"0")
    if not re.fullmatch(rb"0|-?[1-9][0-9]*", before) or int(before) not in _INT64:
        return No.COUNTER
    number = int(before) + operation.by
    if number not in _INT64:
        return No.OVERFLOW
    payloads[operation.name] = b"%d" % number
    return number


_ON_PAYLOADS: dict[str, Callable[[Operation, dict[str, bytes]], Answer]] = {
    "pget": _pget,
    "pget_many": _pget_many,
    "pall": _pall,
    "touch": _touch,
    "pset": _pset,
    "pset_new": _pset_new,
    "pset_many": _pset_many,
    "ppop": _ppop,
    "pdel": _pdel,
    "pincr": _pincr,
}


# A renewal counts: one that changed nothing now will not do so later.
_READS = frozenset({"pget", "pget_many", "pall", "touch", "renew"})


def judge(
    history: Iterable[Call], initial: State, *, repeats: bool = False, budget: int = 200_000
) -> Judgement:
    """Whether the calls of a history, in some order, have got the answers of `step`.

    Args:
        history: the calls, in any order.
        initial: the session before all of them.
        repeats: whether replies were lost, so that a gate may have sent a call twice. Then `end`
            succeeds if the session is gone, and a `pdel` or `renew` that found no session may have
            taken effect before the session ended.
        budget: how many states are looked at before the history counts as undecided.
    """
    calls = list(history)
    answered = [call for call in calls if call.answer is not UNKNOWN]
    unanswered = [call for call in calls if call.answer is UNKNOWN]
    if repeats:
        unanswered += [call for call in answered if _may_hide(call, calls)]
    answered.sort(key=lambda call: call.begun)
    # Those that nobody saw the effect of had none, most often: without them it is a short search.
    glance = _Glance(answered)
    likely = [call for call in unanswered if glance.may_have_seen(call.operation)]
    judgement = _Search(answered, likely, repeats=repeats).run(initial, budget)
    if judgement.verdict is Verdict.RIGHT or len(likely) == len(unanswered):
        return judgement
    return _Search(answered, unanswered, repeats=repeats).run(initial, budget)


class _Glance:
    """What all answers of a history show, whenever they came."""

    def __init__(self, answered: Iterable[Call]) -> None:
        self._data: set[bytes | None] = set()
        self._counters: set[str] = set()
        for operation, _, _, answer in answered:
            if isinstance(answer, bytes):
                self._data.add(answer)
            elif isinstance(answer, tuple):
                self._data.update(data for _, data in answer)
            elif isinstance(answer, int):
                self._counters.add(operation.name)
            elif answer is None:
                self._data.add(operation.expected)

    def may_have_seen(self, operation: Operation) -> bool:
        """Whether the operation left anything that an answer shows."""
        match operation.kind:
            case "pget" | "pget_many" | "pall" | "touch":
                return False
            case "pset" | "pset_new":
                return self._shows(operation.name, operation.data)
            case "pset_many":
                return any(self._shows(*payload) for payload in operation.many)
        return True

    def _shows(self, name: str, data: bytes) -> bool:
        return data in self._data or name in self._counters


def _may_hide(call: Call, calls: Iterable[Call]) -> bool:
    """Whether it may have taken effect, and found no session when it was sent again."""
    kind, token = call.operation.kind, call.operation.token
    if call.answer is not No.SESSION or kind not in ("pdel", "renew"):
        return False
    if kind == "pdel" or call.operation.grace:
        return True
    # A renewal that ended its own token is known again, unless somebody with an older token ended
    # the session or renewed the successor as well.
    return any(
        other.operation.kind == "end"
        or (other.operation.kind == "renew" and other.operation.token == token + 1)
        for other in calls
        if other.begun < call.returned
    )


class _Place(NamedTuple):
    """How far a search came: bit sets of the calls that had their turn, and the state."""

    answered: int
    unanswered: int
    state: State


# To look through more of what was tried takes longer than to try it once more.
_MANY = 64


class _Search:
    def __init__(
        self, answered: Sequence[Call], unanswered: Sequence[Call], *, repeats: bool
    ) -> None:
        self._answered = answered  # in the order in which they began
        self._unanswered = unanswered
        self._repeats = repeats
        self._all = (1 << len(answered)) - 1
        self._tried: dict[tuple[int, State], list[int]] = {}
        self._furthest = _Place(0, 0, State(None))

    def run(self, initial: State, budget: int) -> Judgement:
        places = [self._settled(_Place(0, 0, initial))]
        self._furthest = places[0]
        for _ in range(budget):
            if not places:
                return Judgement(Verdict.WRONG, self._why())
            place = places.pop()
            if place.answered == self._all:
                return Judgement(Verdict.RIGHT)
            places += filter(self._is_new, self._after(place))
        return Judgement(Verdict.UNDECIDED, self._why())

    def _is_new(self, place: _Place) -> bool:
        """Whether nothing as good was tried: the same, with fewer unanswered calls used."""
        if place.answered.bit_count() > self._furthest.answered.bit_count():
            self._furthest = place
        tried = self._tried.setdefault((place.answered, place.state), [])
        if any(other & place.unanswered == other for other in tried):
            return False
        if len(tried) < _MANY:
            tried.append(place.unanswered)
        return True

    def _after(self, place: _Place) -> list[_Place]:
        """Where one more call leads, the most likely last."""
        turns, until = self._turns(place)
        found: list[_Place] = []
        for number, call in enumerate(self._unanswered):
            if not place.unanswered >> number & 1 and call.begun <= until:
                _, state = step(call.operation, place.state)
                if state != place.state:
                    used = place.unanswered | 1 << number
                    found.append(self._settled(_Place(place.answered, used, state)))
        for number in sorted(turns, key=lambda number: -self._answered[number].returned):
            call = self._answered[number]
            answer, state = step(call.operation, place.state)
            if self._fits(call, answer):
                had = place.answered | 1 << number
                found.append(self._settled(_Place(had, place.unanswered, state)))
        return found

    def _settled(self, place: _Place) -> _Place:
        """The place after all calls whose turn it may be and that never change anything.

        If they fit they may as well come at once: no other order is lost by that.
        """
        while True:
            had = place.answered
            for number in self._turns(place)[0]:
                call = self._answered[number]
                answer, state = step(call.operation, place.state)
                # One that would write what stands there already may have to come later.
                idle = isinstance(call.answer, No) or call.operation.kind in _READS
                if state == place.state and self._fits(call, answer) and idle:
                    had |= 1 << number
            if had == place.answered:
                return place
            place = place._replace(answered=had)

    def _turns(self, place: _Place) -> tuple[list[int], float]:
        """The answered calls that may come next, and by when the next one has returned."""
        had, calls = place.answered, self._answered
        until = math.inf
        turns: list[int] = []
        first = (~had & (had + 1)).bit_length() - 1  # the first that had no turn
        for number in range(first, len(calls)):
            if calls[number].begun > until:
                break
            if not had >> number & 1:
                turns.append(number)
                until = min(until, calls[number].returned)
        return turns, until

    def _fits(self, call: Call, answer: Answer) -> bool:
        if self._repeats and answer is No.SESSION and call.operation.kind == "end":
            return call.answer in (None, No.SESSION)
        return answer == call.answer

    def _why(self) -> str:
        place = self._furthest
        turns, _ = self._turns(place)
        had = [call for number, call in enumerate(self._answered) if place.answered >> number & 1]
        lines = [f"{len(had)} of {len(self._answered)} calls fit, then {place.state}; none of"]
        lines += [f"  {self._answered[number]}" for number in turns]
        lines += ["after", *(f"  {call}" for call in had), "with, unanswered,"]
        return "\n".join([*lines, *(f"  {call}" for call in self._unanswered)])
