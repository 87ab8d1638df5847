"""Sequences of one context: what is reused and what is computed, and that coming back gives the same bits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from qwq_lite.backend.context import Context, ContextSettings, Row
from qwq_lite.backend.model import LoadedModel
from qwq_lite.backend.sampler import Sampler
from qwq_lite.engine import saved_state
from qwq_lite.engine.sequences import Part, Sequence, Sequences
from qwq_lite.errors import EngineError, FormatError
from qwq_lite.sampling import Sampling, draw_seed
from tests.samples import sample

T = TypeVar("T")
N_CTX = 512
SEED = 7
PROMPT = [1000 + 37 * n for n in range(90)]
OTHER = [2000 + 41 * n for n in range(70)]


class Engine:
    """Sequences of a context, and what the scheduler does with them: prefill, draw, decode; decoded tokens are counted."""

    def __init__(self, weights: LoadedModel, type_kv: str = "f16", n_ctx: int = N_CTX) -> None:
        settings = ContextSettings(n_ctx=n_ctx, n_threads=1, n_seq_max=3, type_k=type_kv, type_v=type_kv)
        self.context = Context(weights, settings)
        self.all = Sequences(self.context)
        self.sampler = Sampler(weights.vocab.n_tokens)
        self.n_decoded = 0

    def decode(self, sequence: Sequence, tokens: list[int], output: bool = True) -> None:
        self.all.decode([Part(sequence, tokens, output)])
        self.n_decoded += len(tokens)

    def prompt(self, session: str, tokens: list[int]) -> Sequence:
        sequence = self.all.place(session, tokens)
        left = tokens[len(sequence.tokens) :]
        if left[:-1]:
            self.decode(sequence, left[:-1], output=False)
        if left:
            self.decode(sequence, left[-1:])
            self.all.mark(sequence)
        return sequence

    def draw(self, sequence: Sequence) -> int:
        assert sequence.row is not None
        position = len(sequence.tokens)
        return self.sampler.sample(sequence.row, Sampling(temperature=1.0), draw_seed(SEED, 0, position))

    def go_on(self, sequence: Sequence, n: int) -> tuple[list[int], list[Row]]:
        """n tokens more, drawn by their places, and the rows they were drawn from."""
        tokens, rows = [], []
        for _ in range(n):
            assert sequence.row is not None
            rows.append(sequence.row.copy())
            tokens.append(self.draw(sequence))
            self.decode(sequence, tokens[-1:])
        return tokens, rows

    def back(self, sequence: Sequence, n_tokens: int) -> None:
        left = self.all.rewind(sequence, n_tokens)
        if left:
            self.decode(sequence, left)

    def call(self, job: Callable[[Sequences], T]) -> T:
        return job(self.all)

    def save(self, session: str, path: Path, fingerprint: str = "m", extra: dict[str, Any] | None = None) -> None:
        saved_state.save(self.call, session, path, fingerprint, extra or {})

    def restore(self, session: str, path: Path, fingerprint: str = "m") -> dict[str, Any]:
        return saved_state.restore(self.call, session, path, fingerprint)

    def close(self) -> None:
        self.sampler.close()
        self.context.close()


@pytest.fixture(scope="module")
def weights(demo_gguf: Path) -> Iterator[LoadedModel]:
    model = LoadedModel(demo_gguf)
    yield model
    model.close()


@pytest.fixture(params=sample(["f16", "q8_0"], 1))
def engine(request: pytest.FixtureRequest, weights: LoadedModel) -> Iterator[Engine]:
    engine = Engine(weights, request.param)
    yield engine
    engine.close()


def same(rows: list[Row], others: list[Row]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(rows, others, strict=True))


@pytest.mark.parametrize("beside", [False, True])
def test_a_rewind_and_the_same_seeds_give_the_same_bits(engine: Engine, beside: bool) -> None:
    if beside:
        engine.all.done(engine.prompt("other", OTHER))
    sequence = engine.prompt("chat", PROMPT)
    tokens, rows = engine.go_on(sequence, 24)
    for n in (0, 1, 10, 23):
        before = engine.n_decoded
        engine.back(sequence, len(PROMPT) + n)
        assert engine.n_decoded - before == (1 if n else 0), "the prompt's end is a branch: its row was kept"
        again, rows_again = engine.go_on(sequence, 24 - n)
        assert again == tokens[n:]
        assert same(rows_again, rows[n:])


def test_a_rewind_beside_a_sequence_that_came_later_gives_the_same_bits(engine: Engine) -> None:
    sequence = engine.prompt("chat", PROMPT)
    tokens, rows = engine.go_on(sequence, 16)
    engine.all.done(engine.prompt("other", OTHER))
    engine.back(sequence, len(PROMPT) + 4)
    again, rows_again = engine.go_on(sequence, 12)
    assert again == tokens[4:]
    assert same(rows_again, rows[4:])


def test_a_fork_decodes_nothing_and_goes_on_with_the_same_bits(engine: Engine) -> None:
    sequence = engine.prompt("chat", PROMPT)
    tokens, rows = engine.go_on(sequence, 8)
    engine.all.done(sequence)
    before = engine.n_decoded
    engine.all.fork("chat", "twin")
    twin = engine.prompt("twin", PROMPT)
    assert engine.n_decoded == before
    assert twin is not sequence
    again, rows_again = engine.go_on(twin, 8)
    assert again == tokens
    assert same(rows_again, rows)
    assert sequence.tokens == PROMPT + tokens, "the first one still has what it had"
    engine.back(sequence, len(PROMPT) + 5)
    assert engine.go_on(sequence, 3)[0] == tokens[5:]


def test_a_second_session_shares_the_prefix_and_leaves_the_first_as_it_was(engine: Engine) -> None:
    first = engine.prompt("a", PROMPT)
    tokens, _ = engine.go_on(first, 4)
    engine.all.done(first)
    before = engine.n_decoded
    second = engine.prompt("b", [*PROMPT[:50], *OTHER])
    assert second is not first
    assert engine.n_decoded - before == len(OTHER)
    assert first.tokens == PROMPT + tokens


def test_a_session_that_starts_alone_finds_an_empty_cache(engine: Engine) -> None:
    engine.all.done(engine.prompt("a", PROMPT))
    sequence = engine.all.place("b", PROMPT, alone=True)
    assert sequence.tokens == []
    engine.all.done(sequence)
    assert engine.all.place("a", PROMPT).tokens == []


def test_the_sequence_longest_out_of_use_gives_way(engine: Engine) -> None:
    for name, token in (("a", 10), ("b", 20), ("c", 30)):
        engine.all.done(engine.prompt(name, [token + n for n in range(5)]))
    engine.all.done(engine.prompt("a", [10, 11, 12, 13, 14, 15]))
    engine.all.done(engine.prompt("d", [40, 41, 42]))  # the fourth of three
    kept = engine.all.place("a", [10, 11, 12, 13, 14, 15, 16])
    assert len(kept.tokens) == 6
    engine.all.done(kept)
    assert engine.all.place("b", [20, 21, 22, 23, 24, 25]).tokens == []


def test_a_full_cache_lets_idle_sequences_go(engine: Engine) -> None:
    engine.all.done(engine.prompt("a", [100 + n for n in range(300)]))
    long = engine.prompt("b", [3000 + n for n in range(400)])
    assert len(long.tokens) == 400
    engine.all.done(long)
    assert engine.all.place("a", [100 + n for n in range(300)]).tokens == []


def test_two_sequences_in_one_batch_are_two_conversations(engine: Engine) -> None:
    a, b = engine.prompt("a", PROMPT), engine.prompt("b", OTHER)
    alone = {}
    for sequence, prompt in ((a, PROMPT), (b, OTHER)):
        engine.decode(sequence, [500])
        assert sequence.row is not None
        alone[sequence.id] = sequence.row.copy()
        engine.back(sequence, len(prompt))
    engine.all.decode([Part(a, [500]), Part(b, [500])])
    for sequence in (a, b):
        assert sequence.row is not None
        # Bits depend on the batch's shape; the conversation does not: the rows lie near their own and far from the other.
        own, other = (np.abs(sequence.row - alone[key]).max() for key in (sequence.id, a.id + b.id - sequence.id))
        assert own < other / 3


def test_a_saved_session_goes_on_with_the_same_bits(engine: Engine, weights: LoadedModel, tmp_path: Path) -> None:
    sequence = engine.prompt("chat", PROMPT)
    tokens, rows = engine.go_on(sequence, 12)
    engine.back(sequence, len(PROMPT) + 6)
    engine.all.done(sequence)
    file = tmp_path / "chat.state"
    engine.save("chat", file, "this model", {"messages": ["你好"]})
    if os.name == "posix":
        assert file.stat().st_mode & 0o777 == 0o600
    other = Engine(weights, engine.context.settings.type_k)
    assert other.restore("later", file, "this model") == {"messages": ["你好"]}
    resumed = other.prompt("later", PROMPT + tokens[:6])
    assert other.n_decoded == 1, "the last token, for its row"
    again, rows_again = other.go_on(resumed, 6)
    other.close()
    assert again == tokens[6:]
    assert same(rows_again, rows[6:])


def test_a_shared_prefix_is_saved_whole(engine: Engine, tmp_path: Path) -> None:
    engine.all.done(engine.prompt("a", PROMPT))
    fork = engine.prompt("b", [*PROMPT[:50], *OTHER[:5]])
    expected, _ = engine.go_on(fork, 4)
    engine.back(fork, 55)
    engine.all.done(fork)
    engine.save("b", tmp_path / "b.state", "m", {})
    for session in ("a", "b"):
        engine.all.release(session)
    engine.restore("c", tmp_path / "b.state", "m")
    assert engine.go_on(engine.prompt("c", [*PROMPT[:50], *OTHER[:5]]), 4)[0] == expected


def test_a_session_without_a_place_in_the_cache_is_saved_without_tokens(engine: Engine, tmp_path: Path) -> None:
    engine.save("never asked", tmp_path / "empty.state", "m", {"n": 1})
    assert engine.restore("x", tmp_path / "empty.state", "m") == {"n": 1}


def test_another_models_state_is_refused(engine: Engine, tmp_path: Path) -> None:
    engine.all.done(engine.prompt("a", PROMPT))
    engine.save("a", tmp_path / "a.state", "one", {})
    with pytest.raises(FormatError, match=r"a\.state: was saved by another model"):
        engine.restore("b", tmp_path / "a.state", "two")


def test_a_damaged_state_never_reaches_llama_cpp(engine: Engine, tmp_path: Path) -> None:
    engine.all.done(engine.prompt("a", PROMPT))
    file = tmp_path / "a.state"
    engine.save("a", file, "m", {})
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:10], b"", _flipped(whole, len(whole) // 2)):
        file.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"a\.state"):
            engine.restore("b", file, "m")
    assert engine.all.place("b", PROMPT).tokens == PROMPT, "shared from a, which nothing has touched"


def test_a_state_larger_than_the_context_is_refused(weights: LoadedModel, engine: Engine, tmp_path: Path) -> None:
    engine.all.done(engine.prompt("a", [100 + n for n in range(400)]))
    engine.save("a", tmp_path / "a.state", "m", {})
    small = Engine(weights, engine.context.settings.type_k, n_ctx=256)
    with pytest.raises(FormatError, match=r"a\.state: holds 400 tokens, the context 256"):
        small.restore("a", tmp_path / "a.state", "m")
    small.close()


def _flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_a_state_that_llama_cpp_refuses_is_an_error_and_costs_no_other_session_its_place(
    engine: Engine, weights: LoadedModel, tmp_path: Path
) -> None:
    engine.all.done(engine.prompt("a", PROMPT))
    engine.save("a", tmp_path / "a.state")
    other = Engine(weights, "q8_0" if engine.context.settings.type_k == "f16" else "f16")
    other.all.done(other.prompt("b", OTHER))
    with pytest.raises(EngineError, match="does not take the saved state"):
        other.restore("c", tmp_path / "a.state")
    assert other.all.place("b", OTHER).tokens == OTHER
    other.close()


def test_a_session_that_changes_while_it_is_saved_is_saved_again_as_it_is_then(engine: Engine, tmp_path: Path) -> None:
    sequence = engine.prompt("a", PROMPT)
    times = iter(range(3))

    def call(job: Callable[[Sequences], T]) -> T:
        done = job(engine.all)
        if next(times) == 0:  # between the question for its size and the copy
            engine.go_on(sequence, 1)
        return done

    with pytest.raises(StopIteration):  # the second copy is the fourth call
        saved_state.save(call, "a", tmp_path / "a.state", "m", {})
    times = iter(range(9))
    saved_state.save(call, "a", tmp_path / "a.state", "m", {})
    engine.all.release("a")
    engine.all.done(sequence)
    engine.restore("b", tmp_path / "a.state")
    assert len(engine.all.place("b", [*PROMPT, *range(9)]).tokens) >= len(PROMPT)
