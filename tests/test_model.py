"""A model of sessions and payloads: whatever the calls, a gate does what a dictionary would."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from sessiongate import PayloadNotFoundError, SessionGate, SessionNotFoundError

from .conftest import Backend

names = st.one_of(
    st.sampled_from(["user", "cart", "fp", ":fp", "ends"]),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50),
)
datas = st.one_of(
    st.binary(min_size=1, max_size=70),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
    st.sampled_from([64, 65, 70_000]).map(lambda size: b"x" * size),
)
ttls = st.sampled_from([0, 60, 3_600])
KEYS = ["one sign key, of thirty-two bytes", "another key, of thirty-two bytes"]


def raw(data: bytes | str) -> bytes:
    return data.encode() if isinstance(data, str) else data


class Sessions(RuleBasedStateMachine):
    """Two gates with keys of their own on one store, and dictionaries that say what they hold."""

    backend: Backend

    tokens = Bundle("tokens")

    @initialize()
    def empty(self) -> None:
        self.client = self.backend.client()
        self.client.flushall()
        self.gates = [self.backend.gate(key) for key in KEYS]
        self.live: dict[str, dict[str, bytes]] = {}
        self.owner: dict[str, SessionGate] = {}

    @rule(
        target=tokens,
        which=st.integers(0, 1),
        ttl=ttls,
        payloads=st.dictionaries(names, datas, max_size=4),
    )
    def start(self, which: int, ttl: int, payloads: dict[str, bytes | str]) -> str:
        token = self.gates[which].start(ttl, payloads)
        assert token not in self.owner
        self.owner[token] = self.gates[which]
        if ttl:
            self.live[token] = {name: raw(data) for name, data in payloads.items()}
        return token

    @rule(token=tokens, name=names, data=datas)
    def pset(self, token: str, name: str, data: bytes | str) -> None:
        with self.expected(token):
            self.owner[token].pset(token, name, data)
            self.live[token][name] = raw(data)

    @rule(token=tokens, name=names)
    def pget(self, token: str, name: str) -> None:
        with self.expected(token, name):
            assert self.owner[token].pget(token, name) == self.live[token][name]

    @rule(token=tokens, name=names)
    def pdel(self, token: str, name: str) -> None:
        with self.expected(token, name):
            self.owner[token].pdel(token, name)
            del self.live[token][name]

    @rule(token=tokens, ttl=ttls)
    def expire(self, token: str, ttl: int) -> None:
        with self.expected(token):
            self.owner[token].expire(token, ttl)
            if not ttl:
                del self.live[token]

    @rule(token=tokens)
    def end(self, token: str) -> None:
        with self.expected(token):
            self.owner[token].end(token)
            del self.live[token]

    @rule(token=tokens)
    def guess(self, token: str) -> None:
        """The other gate signs the same id, and finds nothing there."""
        other = self.gates[self.owner[token] is self.gates[0]]
        guessed = other._commands._ring.sign(token[3:19])[0]
        with pytest.raises(SessionNotFoundError):
            other.pget(guessed, "user")
        with pytest.raises(SessionNotFoundError):
            other.end(guessed)

    @rule()
    def forget_scripts(self) -> None:
        self.client.script_flush()

    def expected(
        self, token: str, name: str | None = None
    ) -> "pytest.RaisesExc[Exception] | _Nothing":
        """The error that the model foresees, or none."""
        if token not in self.live:
            return pytest.raises(SessionNotFoundError)
        if name is not None and name not in self.live[token]:
            return pytest.raises(PayloadNotFoundError)
        return _Nothing()

    @invariant()
    def redis_holds_what_the_model_says(self) -> None:
        if not hasattr(self, "live"):
            return
        held = {key: self.client.hgetall(key) for key in self.client.scan_iter()}
        assert set(held) == {f"sg-session:{{{token[3:19]}}}".encode() for token in self.live}
        for token, payloads in self.live.items():
            key = f"sg-session:{{{token[3:19]}}}".encode()
            assert len(held[key].pop(b"fp")) == 16
            assert held[key] == {f":{name}".encode(): data for name, data in payloads.items()}
            assert 0 < self.client.pttl(key) <= 3_600_000


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_a_gate_does_what_the_model_does(backend: Backend) -> None:
    """Any sequence of operations leaves exactly the sessions and payloads that a model holds."""

    class OnBackend(Sessions):
        pass

    OnBackend.backend = backend
    run_state_machine_as_test(
        OnBackend,
        settings=settings(max_examples=40, stateful_step_count=40, deadline=None),
    )
