"""policies: one order, pinned; each sees what the one before made of a draw; one action a token, forced tokens in a queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwq_lite import generation
from qwq_lite.events import Answer, Thinking
from qwq_lite.generation import Action, Begin, Draw, Force, Policy, Rewind, State, Stop, Taken, Turn, Verdict
from qwq_lite.policies import ORDER, arranged
from qwq_lite.policies.phases import Phases
from qwq_lite.policies.stops import Stops
from qwq_lite.sampling import Sampling

SAMPLING = Sampling()
END, CLOSE = 1, 3


@dataclass(frozen=True)
class Invented:
    """A policy that says the same to every token, writes down what it is asked, and counts as its state.

    seen, draws: what it was asked, in the order of asking; policies that share a list write into one record.
    """

    name: str = "invented"
    constrains: ClassVar[bool] = True
    action: Action = None
    hold: int = 0
    turn: Turn | None = None
    bans: frozenset[int] = frozenset()
    seen: list[tuple[str, Taken]] = field(default_factory=list)
    draws: list[tuple[str, int, Draw]] = field(default_factory=list)

    def start(self, begin: Begin) -> int:
        return 0

    def constrain(self, state: int, draw: Draw) -> Draw:
        self.draws.append((self.name, state, draw))
        return draw._replace(banned=draw.banned | self.bans)

    def observe(self, state: int, taken: Taken) -> Verdict:
        self.seen.append((self.name, taken))
        return Verdict(state + 1, self.action, self.hold, self.turn)


def take(policies: Sequence[Policy], *tokens: tuple[int, bytes], begin: Begin | None = None) -> generation.Step:
    """The step of the last of the tokens."""
    asked = tuple(policies)
    state, _ = generation.fold(asked, begin or Begin(), tokens[:-1])
    return generation.advance(asked, state, *tokens[-1])


def recorded(**kinds: Any) -> tuple[list[tuple[str, Taken]], tuple[Invented, ...]]:
    """Policies by name, each with its action, and the one record that all write into."""
    seen: list[tuple[str, Taken]] = []
    return seen, tuple(Invented(name, action, seen=seen) for name, action in kinds.items())


def test_the_order_is_this_one() -> None:
    """Which policy is asked first decides what a reply is: who changes the order changes this line too, and says why."""
    assert ORDER == ("phases", "stops")


def test_the_policies_have_the_names_that_the_order_speaks_of() -> None:
    assert [policy.name for policy in arranged([Stops(frozenset()), Phases()])] == ["phases", "stops"]


@given(st.permutations(ORDER), st.data())
def test_arranged_sorts_any_choice_of_policies(names: Sequence[str], data: st.DataObject) -> None:
    chosen = names[: data.draw(st.integers(0, len(names)))]
    assert [policy.name for policy in arranged(Invented(name) for name in chosen)] == [n for n in ORDER if n in chosen]


@pytest.mark.parametrize("names", [("nobody",), ("phases", "nobody"), ("stops", "stops"), ("stops", "phases", "stops")])
def test_arranged_refuses_a_policy_without_a_place_and_one_that_is_there_twice(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"policies \['"):
        arranged(Invented(name) for name in names)


@given(st.lists(st.frozensets(st.integers(0, 9)), max_size=5))
def test_each_policy_sees_the_draw_of_the_one_before(bans: list[frozenset[int]]) -> None:
    draws: list[tuple[str, int, Draw]] = []
    policies = tuple(Invented(str(i), bans=banned, draws=draws) for i, banned in enumerate(bans))
    draw = generation.constrain(policies, generation.start(policies, Begin()), SAMPLING)
    expected = [frozenset[int]().union(*bans[:n]) for n in range(len(bans) + 1)]
    assert [(name, asked.banned) for name, _, asked in draws] == [
        (str(i), seen) for i, seen in enumerate(expected[:-1])
    ]
    assert draw == Draw(SAMPLING, banned=expected[-1])


def test_a_policy_may_change_every_part_of_a_draw() -> None:
    """Masks, settings and a token of its own; without a policy the draw is that of the request."""
    mask = np.zeros(4, np.float32)

    @dataclass(frozen=True)
    class Strict(Invented):
        def constrain(self, state: int, draw: Draw) -> Draw:
            return Draw(Sampling(temperature=0), (*draw.masks, mask), draw.banned | {2}, forced=3)

    policies = (Strict(),)
    draw = generation.constrain(policies, generation.start(policies, Begin()), SAMPLING)
    assert (draw.sampling, draw.banned, draw.forced) == (Sampling(temperature=0), frozenset({2}), 3)
    assert draw.masks[0] is mask
    assert generation.constrain((), generation.start((), Begin()), SAMPLING) == Draw(SAMPLING)


def test_each_policy_is_asked_with_its_own_state() -> None:
    policies = (Invented("a"), Invented("b"))
    state = generation.start(policies, Begin())
    state = state._replace(policies=(5, 7))
    generation.constrain(policies, state, SAMPLING)
    assert [policy.draws[0][:2] for policy in policies] == [("a", 5), ("b", 7)]
    assert generation.advance(policies, state, 0, b"").state.policies == (6, 8)


def test_every_policy_observes_every_token_in_order_also_after_a_word_that_ends_it() -> None:
    seen, policies = recorded(a=Stop("stop"), b=Rewind(0), c=None)
    step = take(policies, (9, b"x"))
    assert [name for name, _ in seen] == ["a", "b", "c"]
    assert [taken for _, taken in seen] == [Taken(9, "x", "answer", 1)] * 3
    assert step.state.policies == (1, 1, 1)


ACTIONS = st.one_of(
    st.none(),
    st.builds(Force, st.lists(st.integers(0, 9), max_size=3).map(tuple)),
    st.builds(Rewind, st.integers(0, 3), st.frozensets(st.integers(0, 9))),
    st.builds(Stop, st.sampled_from(["stop", "length"])),
)


@given(st.lists(ACTIONS, max_size=5), st.lists(st.integers(0, 9), max_size=3))
def test_the_first_end_or_rewind_wins_and_forced_tokens_queue_up_in_order(
    actions: list[Action], queued: list[int]
) -> None:
    """What was forced already comes first, less the token in hand."""
    _, policies = recorded(**{str(i): action for i, action in enumerate(actions)})
    before = generation.start(policies, Begin())._replace(forced=tuple(queued))
    step = generation.advance(policies, before, 9, b"x")
    assert step.action == next((action for action in actions if isinstance(action, Stop | Rewind)), None)
    added = [token for action in actions if isinstance(action, Force) for token in action.tokens]
    assert step.state.forced == (*queued[1:], *added)


def test_a_forced_token_is_drawn_and_no_policy_is_asked() -> None:
    policies = (Invented(action=Force((4, 5)), bans=frozenset({4})),)
    state = take(policies, (0, b"x")).state
    assert generation.constrain(policies, state, SAMPLING) == Draw(SAMPLING, forced=4)
    assert not policies[0].draws


def test_forced_tokens_come_one_after_the_other_and_then_the_policies_are_asked_again() -> None:
    @dataclass(frozen=True)
    class Once(Invented):
        def observe(self, state: int, taken: Taken) -> Verdict:
            return Verdict(state + 1, Force((4, 5)) if taken.token == 0 else None)

    policies = (Once(),)
    state, drawn = take(policies, (0, b"x")).state, []
    while (token := generation.constrain(policies, state, SAMPLING).forced) is not None:
        drawn.append(token)
        state = generation.advance(policies, state, token, b"y").state
    assert drawn == [4, 5]
    assert [asked for _, asked, _ in policies[0].draws] == [3]


@given(st.lists(st.builds(Rewind, st.integers(0, 4), st.frozensets(st.integers(0, 9))), max_size=5))
def test_what_a_rewind_bans_is_banned_at_its_place_until_the_text_before_it_goes(rewinds: list[Rewind]) -> None:
    state = generation.start((), Begin(rewinds=tuple(rewinds)))
    for n_tokens in range(6):
        first = max((i + 1 for i, rewind in enumerate(rewinds) if rewind.n_tokens < n_tokens), default=0)
        same_text = [rewind for rewind in rewinds[first:] if rewind.n_tokens == n_tokens]
        banned = frozenset(token for rewind in same_text for token in rewind.banned)
        assert generation.constrain((), state, SAMPLING) == Draw(SAMPLING, banned=banned)
        state = generation.advance((), state, 0, b"x").state


@given(st.lists(st.integers(0, 6), max_size=4), st.integers(0, 8))
def test_as_much_is_held_as_the_most_cautious_policy_asks_for(holds: list[int], n_characters: int) -> None:
    policies = tuple(Invented(str(i), hold=hold) for i, hold in enumerate(holds))
    written = "abcdefgh"[:n_characters]
    step = take(policies, (9, written.encode()))
    shown = written[: max(0, n_characters - max(holds, default=0))]
    assert step.events == ((Answer(shown),) if shown else ())
    assert step.state.held == written[len(shown) :]


def test_text_that_is_held_is_shown_when_the_phase_ends() -> None:
    policies = (Phases(think_close=CLOSE), Invented(hold=9))
    step = take(policies, (9, b"Hm."), (CLOSE, b"</think>"), begin=Begin("thinking"))
    assert (step.events, step.state.held, step.state.phase) == ((Thinking("Hm."),), "", "answer")


def test_the_first_turn_wins_and_those_asked_later_see_the_new_phase() -> None:
    seen: list[tuple[str, Taken]] = []
    policies = [
        Invented("a", seen=seen),
        Invented("b", turn=Turn("thinking", mute=True), seen=seen),
        Invented("c", turn=Turn("answer"), seen=seen),
    ]
    step = take(policies, (9, b"x"))
    assert [(name, taken.phase, taken.text) for name, taken in seen] == [
        ("a", "answer", "x"),
        ("b", "answer", "x"),
        ("c", "thinking", ""),
    ]
    assert (step.state.phase, step.events) == ("thinking", ())


@dataclass(frozen=True)
class Spelled(Invented):
    """A phase that begins with a text, for a model whose tags are no tokens: token 8 ends the thought `n` characters back."""

    n: int = 0

    def observe(self, state: int, taken: Taken) -> Verdict:
        turn = Turn("answer", n_chars=self.n) if taken.token == 8 else None
        return Verdict(state + 1, turn=turn, hold=0 if turn else self.hold)


@given(st.integers(0, 6))
def test_a_turn_may_begin_within_the_text_of_its_token_or_before_it(n: int) -> None:
    """The last characters belong to the new phase, also those that were held; what is before them ends the old one."""
    step = take((Spelled(n=n, hold=3),), (9, b"abc"), (8, b"def"), begin=Begin("thinking"))
    old, new = "abcdef"[: 6 - n], "abcdef"[6 - n :]
    assert step.events == (*((Thinking(old),) if old else ()), *((Answer(new),) if new else ()))


def test_an_unfinished_character_of_a_token_that_turns_belongs_to_the_new_phase() -> None:
    step = take((Spelled(n=1),), (8, b"ab\xe4"), begin=Begin("thinking"))
    assert step.events == (Thinking("a"), Answer("b"))
    assert step.state.pending == b"\xe4"


def test_a_stop_text_in_front_of_a_turn_does_not_end_the_answer() -> None:
    step = take((Spelled(n=2), Stops(frozenset(), ("STOP",))), (8, b"STOPab"), begin=Begin("thinking"))
    assert (step.events, step.action) == ((Thinking("STOP"), Answer("ab")), None)


def test_a_stop_drops_so_many_characters_of_what_was_not_shown() -> None:
    step = take((Invented(action=Stop("stop", drop=2)),), (9, b"abcd"))
    assert (step.events, step.action) == ((Answer("ab"),), Stop("stop", drop=2))


def test_a_stop_that_drops_more_than_there_is_shows_nothing() -> None:
    assert take((Invented(action=Stop("stop", drop=6)),), (9, b"abcd")).events == ()


def test_a_fold_of_no_tokens_is_the_start() -> None:
    policies = (Invented(),)
    begin = Begin("thinking", (Rewind(2, frozenset({1})),))
    state = State("thinking", bans={2: frozenset({1})}, policies=(0,))
    assert generation.fold(policies, begin, []) == (state, [])
    assert generation.start(policies, begin) == state
