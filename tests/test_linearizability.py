"""The judge of histories: what it lets pass, and what it does not."""

import math
import random
from collections.abc import Sequence
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .linearizability import (
    UNKNOWN,
    Answer,
    Call,
    No,
    Operation,
    State,
    Unknown,
    Verdict,
    held,
    judge,
    step,
)

EMPTY = State(())


def call(
    begun: float,
    returned: float,
    answer: Answer | Unknown,
    kind: str,
    name: str = "",
    **more: object,
) -> Call:
    return Call(Operation(kind, name, **more), begun, returned, answer)  # type: ignore[arg-type]  # fields of Operation


def pset(begun: float, returned: float, data: bytes, answer: No | Unknown | None = None) -> Call:
    return call(begun, returned, answer, "pset", "user", data=data)


def pget(begun: float, returned: float, answer: bytes | No) -> Call:
    return call(begun, returned, answer, "pget", "user")


def swap(begun: float, returned: float, expected: bytes, data: bytes, answer: Answer) -> Call:
    return call(begun, returned, answer, "pset", "user", data=data, expected=expected)


def pincr(begun: float, returned: float, answer: Answer | Unknown) -> Call:
    return call(begun, returned, answer, "pincr", "hits")


def verdict(history: Sequence[Call], initial: State = EMPTY, *, repeats: bool = False) -> Verdict:
    return judge(history, initial, repeats=repeats).verdict


GOOD = {
    "nothing": [],
    "one after the other": [pset(0, 1, b"a"), pget(2, 3, b"a"), pset(4, 5, b"b"), pget(6, 7, b"b")],
    "a read during a write, before it": [pset(0, 3, b"a"), pget(1, 2, No.PAYLOAD)],
    "a read during a write, after it": [pset(0, 3, b"a"), pget(1, 2, b"a")],
    "two writes at once, either last": [
        *(pset(0, 3, b"a"), pset(0, 3, b"b")),
        *(pget(4, 5, b"a"), pget(6, 7, b"a")),
    ],
    "a write of what stands there already, after its deletion": [
        *(pset(0, 1, b"a"), pset(2, 9, b"a")),
        *(call(3, 4, b"a", "ppop", "user"), pget(5, 6, b"a")),
    ],
    "a lost write that never ran": [pset(0, 1, b"a", UNKNOWN), pget(2, 3, No.PAYLOAD)],
    "a lost write that ran late": [
        *(pset(0, 1, b"a"), pset(2, 3, b"b", UNKNOWN)),
        *(pget(4, 5, b"a"), pget(6, 7, b"b"), pget(8, 9, b"b")),
    ],
    "a lost write over a later one": [
        *(pset(0, 1, b"b", UNKNOWN), pset(2, 3, b"a")),
        *(pget(4, 5, b"a"), pget(6, 7, b"b")),
    ],
    "a lost pincr": [pincr(0, 1, 1), pincr(2, 3, UNKNOWN), pincr(4, 5, 3)],
    "a lost pincr that did not run": [pincr(0, 1, 1), pincr(2, 3, UNKNOWN), pincr(4, 5, 2)],
    "a lost end": [pset(0, 1, b"a"), call(2, 3, UNKNOWN, "end"), pget(4, 5, No.SESSION)],
    "one of two swaps": [
        *(pset(0, 1, b"a"), swap(2, 4, b"a", b"b", None), swap(2, 4, b"a", b"c", No.CONFLICT)),
        pget(5, 6, b"b"),
    ],
    "all at one moment": [
        call(0, 3, None, "pset_many", many=held({"a": b"1", "b": b"2"})),
        call(1, 2, held({"a": b"1", "b": b"2"}), "pall"),
        call(1, 2, (), "pget_many", many=held({"a": b"", "c": b""})),
    ],
    "a renewed token": [
        call(0, 1, 1, "renew"),
        *(call(2, 3, 1, "renew"), call(2, 3, 2, "renew", token=1)),
        *(call(4, 5, None, "touch", token=token) for token in range(3)),
    ],
    "a token without grace": [
        call(0, 1, 1, "renew", grace=False),
        call(2, 3, No.SESSION, "touch"),
        call(2, 3, None, "touch", token=1),
    ],
}

BAD = {
    "a payload that nobody wrote": [pget(0, 1, b"a")],
    "a stale read": [pset(0, 1, b"a"), pset(2, 3, b"b"), pget(4, 5, b"a")],
    "a read that goes back": [pset(0, 9, b"a"), pget(1, 2, b"a"), pget(3, 4, No.PAYLOAD)],
    "two reads that differ on an order": [
        *(pset(0, 1, b"a"), pset(0, 1, b"b")),
        *(pget(2, 3, b"a"), pget(4, 5, b"b")),
    ],
    "a lost update": [
        *(pset(0, 1, b"a"), swap(2, 4, b"a", b"b", None), swap(2, 4, b"a", b"c", None)),
        pget(5, 6, b"b"),
    ],
    "a write that ran twice": [
        *(pset(0, 1, b"a"), pset(2, 3, b"b")),
        *(pget(4, 5, b"b"), pget(6, 7, b"a"), pget(8, 9, b"a")),
    ],
    "a lost write that ran twice": [
        *(pset(0, 1, b"a", UNKNOWN), pget(2, 3, b"a"), pset(4, 5, b"b")),
        *(pget(6, 7, b"b"), pget(8, 9, b"a"), call(10, 11, b"a", "ppop", "user")),
        pget(12, 13, b"a"),
    ],
    "an acknowledged write that is gone": [pset(0, 1, b"a"), pget(2, 3, No.PAYLOAD)],
    "a pincr that ran twice": [pincr(0, 1, 1), pincr(2, 3, 3)],
    "a lost pincr that ran twice": [pincr(0, 1, 1), pincr(2, 3, UNKNOWN), pincr(4, 5, 4)],
    "one sum for two": [pincr(0, 1, 1), pincr(0, 1, 1)],
    "one pop for two": [
        pset(0, 1, b"a"),
        *(call(2, 3, b"a", "ppop", "user") for _ in range(2)),
    ],
    "a read after the end": [pset(0, 1, b"a"), call(2, 3, None, "end"), pget(4, 5, b"a")],
    "a session that comes back": [
        *(pset(0, 1, b"a"), call(2, 3, UNKNOWN, "end")),
        *(pget(4, 5, No.SESSION), pget(6, 7, b"a")),
    ],
    "a session that is not found": [pset(0, 1, b"a"), pget(2, 3, No.SESSION)],
    "two moments in one read": [
        call(0, 3, None, "pset_many", many=held({"a": b"1", "b": b"2"})),
        call(1, 2, held({"a": b"1"}), "pall"),
    ],
    "two successors of one token": [call(0, 1, 1, "renew"), call(2, 3, 2, "renew")],
    "a token past its grace": [call(0, 1, 1, "renew", grace=False), call(2, 3, None, "touch")],
    "an end of what is gone": [call(0, 1, None, "end"), call(2, 3, None, "end")],
}


@pytest.mark.parametrize("history", GOOD.values(), ids=GOOD)
def test_what_some_order_explains_is_right(history: list[Call]) -> None:
    """A history passes if its calls can have taken effect one at a time."""
    assert verdict(history) is Verdict.RIGHT


@pytest.mark.parametrize("history", BAD.values(), ids=BAD)
def test_what_no_order_explains_is_wrong(history: list[Call]) -> None:
    """A history does not pass if no order of its calls gives their answers."""
    judgement = judge(history, EMPTY)
    assert judgement.verdict is Verdict.WRONG
    assert "calls fit" in judgement.why


def test_a_repeated_end_finds_its_session_gone() -> None:
    """Where replies were lost `end` may succeed without a session, and nothing else may."""
    gone = [call(0, 1, None, "end"), call(2, 3, None, "end")]
    assert verdict(gone, repeats=True) is Verdict.RIGHT
    assert verdict([call(0, 1, None, "end"), pset(2, 3, b"a")], repeats=True) is Verdict.WRONG
    assert verdict([call(0, 1, No.SESSION, "end")], repeats=True) is Verdict.WRONG


def test_a_pdel_that_found_no_session_may_have_run() -> None:
    """Where replies were lost it may have deleted before the session ended, else not."""
    history = [
        pset(0, 1, b"a"),
        call(2, 9, No.SESSION, "pdel", "user"),
        pget(3, 4, No.PAYLOAD),
        call(5, 6, None, "end"),
    ]
    assert verdict(history, repeats=True) is Verdict.RIGHT
    assert verdict(history) is Verdict.WRONG
    assert verdict([*history[:3], pget(5, 6, b"a")], repeats=True) is Verdict.WRONG


def test_a_renewal_that_found_no_session_may_have_run() -> None:
    """Where replies were lost it may have run before the session ended; its own doing is no end."""
    renewal = call(2, 9, No.SESSION, "renew")
    seen = call(4, 5, None, "touch", token=1), call(6, 7, None, "end")
    assert verdict([renewal, *seen], repeats=True) is Verdict.RIGHT
    assert verdict([renewal, *seen]) is Verdict.WRONG
    assert verdict([renewal], repeats=True) is Verdict.WRONG
    without_grace = call(2, 9, No.SESSION, "renew", grace=False)
    assert verdict([without_grace], repeats=True) is Verdict.WRONG
    older = call(0, 1, 1, "renew"), call(3, 4, 2, "renew"), call(5, 6, 3, "renew", token=2)
    without_grace = call(2, 9, No.SESSION, "renew", grace=False, token=1)
    assert verdict([*older, without_grace], repeats=True) is Verdict.RIGHT
    assert verdict([*older, without_grace]) is Verdict.WRONG


def test_a_history_that_takes_too_long_is_undecided() -> None:
    """Past its budget the judge does not guess."""
    history = [
        *(pset(0, 1, b"%d" % number, UNKNOWN) for number in range(12)),
        *(pget(2 + 2 * number, 3 + 2 * number, b"%d" % number) for number in range(12)),
        pget(50, 51, b"never"),
    ]
    assert judge(history, EMPTY, budget=50).verdict is Verdict.UNDECIDED
    assert judge(history, EMPTY).verdict is Verdict.WRONG


NAMES = ["user", "hits"]


def dice_of(seed: int | str) -> random.Random:
    return random.Random(seed)  # noqa: S311  # no secret


def some_operation(dice: random.Random, number: int) -> Operation:
    if dice.random() < 0.5:
        number %= 3  # so that calls write what stands there already
    name, data = dice.choice(NAMES), b"%d" % number
    seen = b"%d" % dice.randrange(number + 1)
    kinds = {
        Operation("pget", name): 5,
        Operation("pset", name, data): 3,
        Operation("pincr", "hits", by=number): 3,
        Operation("pset", name, data, expected=seen): 2,
        Operation("pset_new", name, data): 1,
        Operation("pdel", name): 1,
        Operation("ppop", name): 1,
        Operation("pall"): 1,
        Operation("touch"): 1,
        Operation("renew", grace=dice.random() < 0.5, token=dice.randrange(3)): 1,
        Operation("end"): 0.3,
    }
    return dice.choices(list(kinds), list(kinds.values()))[0]


def interleaved(dice: random.Random, length: int, clients: int, lost: float) -> list[Call]:
    """A history as it comes about: calls begin, take effect one at a time, and return.

    A lost one takes effect at some later time, or never.
    """
    history: list[Call] = []
    state = EMPTY
    late: list[Operation] = []
    waiting: dict[int, tuple[Operation, int]] = {}
    effects: dict[int, tuple[Operation, int, Answer]] = {}
    for now in range(3 * length):
        client = dice.randrange(clients)
        if late and dice.random() < 0.1:
            _, state = step(late.pop(dice.randrange(len(late))), state)
        if client in effects:
            operation, begun, answer = effects.pop(client)
            history.append(Call(operation, begun, now, answer))
        elif client not in waiting:
            waiting[client] = some_operation(dice, now), now
        elif dice.random() < lost:
            operation, begun = waiting.pop(client)
            history.append(Call(operation, begun, now, UNKNOWN))
            late.append(operation)
        else:
            operation, begun = waiting.pop(client)
            answer, state = step(operation, state)
            effects[client] = operation, begun, answer
    # What was under way at the end has no answer.
    under_way = [
        *waiting.values(),
        *((operation, begun) for operation, begun, _ in effects.values()),
    ]
    return history + [Call(operation, begun, math.inf, UNKNOWN) for operation, begun in under_way]


@settings(max_examples=150, deadline=None)
@given(st.integers(0), st.integers(1, 100), st.integers(1, 5), st.booleans())
def test_what_a_session_answered_is_right(
    seed: int, length: int, clients: int, loses: bool
) -> None:
    """Any history of a session that takes one call at a time passes."""
    history = interleaved(dice_of(seed), length, clients, 0.04 if loses else 0)
    assert verdict(history) is Verdict.RIGHT
    assert verdict(history, repeats=True) is Verdict.RIGHT


@settings(max_examples=100, deadline=None)
@given(st.integers(0), st.integers(10, 60), st.integers(1, 4))
def test_an_answer_that_was_never_written_is_wrong(seed: int, length: int, clients: int) -> None:
    """A history with one read of what nobody stored does not pass."""
    dice = dice_of(seed)
    history = interleaved(dice, length, clients, 0.04)
    reads = [n for n, one in enumerate(history) if one.operation.kind == "pget"]
    answered = [n for n in reads if history[n].answer is not UNKNOWN]
    if answered:
        number = dice.choice(answered)
        history[number] = history[number]._replace(answer=b"never written")
        assert verdict(history, repeats=True) is Verdict.WRONG


def test_most_false_answers_are_found() -> None:
    """With one answer replaced by another that such a call may get, few histories still pass."""
    dice = dice_of("false answers")
    found = tried = 0
    for _ in range(300):
        history = interleaved(dice, 60, 3, 0.02)
        number = dice.randrange(len(history))
        operation, answer = history[number].operation, history[number].answer
        others = {one.answer for one in history if one.operation.kind == operation.kind}
        others -= {UNKNOWN, answer}
        if answer is UNKNOWN or not others:
            continue
        tried += 1
        history[number] = history[number]._replace(answer=dice.choice(sorted(others, key=repr)))
        found += verdict(history) is Verdict.WRONG
    assert tried > 150
    assert found / tried > 0.8


def explained(history: Sequence[Call], state: State) -> bool:
    """Whether some order explains a history, by trying them all."""
    if not any(one.answer is not UNKNOWN for one in history):
        return True
    for number, one in enumerate(history):
        others = [*history[:number], *history[number + 1 :]]
        if any(o.answer is not UNKNOWN and o.returned < one.begun for o in others):
            continue
        answer, after = step(one.operation, state)
        if one.answer in (UNKNOWN, answer) and explained(others, after):
            return True
    return False


small = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *(Operation("pget", "a"), Operation("ppop", "a"), Operation("pincr", "a")),
                *(Operation("pset", "a", b"1"), Operation("pset", "a", b"2")),
                *(Operation("end"), Operation("pset_new", "a", b"2")),
            ]
        ),
        st.integers(0, 8),
        st.integers(0, 4),
        st.sampled_from([None, b"1", b"2", 1, 2, No.PAYLOAD, No.SESSION, No.CONFLICT, UNKNOWN]),
    ),
    max_size=6,
)


@settings(max_examples=500, deadline=None)
@given(small)
def test_short_histories_are_judged_as_by_trying_all_orders(
    given: list[tuple[Operation, int, int, Answer | Unknown]],
) -> None:
    """The search leaves no order out and adds none."""
    history = [Call(one, begun, begun + lasts, answer) for one, begun, lasts, answer in given]
    assert (verdict(history) is Verdict.RIGHT) == explained(history, EMPTY)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_calls_come_in_any_order(order: tuple[int, ...]) -> None:
    """A history is judged by the times of its calls, whatever order it is written in."""
    good = [pset(0, 1, b"a"), pset(2, 3, b"b"), pget(4, 5, b"b")]
    bad = [pset(0, 1, b"a"), pset(2, 3, b"b"), pget(4, 5, b"a")]
    assert verdict([good[number] for number in order]) is Verdict.RIGHT
    assert verdict([bad[number] for number in order]) is Verdict.WRONG
