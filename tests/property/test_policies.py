"""policies: one order, pinned; each sees what the one before made of a draw; one action a token, forced tokens in a queue.

Here too: what a turn does to the text around it, and which thoughts a closing tag ends that is written as text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qwq_lite.events import Answer, Event, Notice, Thinking, ThoughtEnd
from qwq_lite.reply import fold
from qwq_lite.reply.fold import Given, State
from qwq_lite.reply.policies.closing import Closing
from qwq_lite.reply.policies.deadline import Deadline
from qwq_lite.reply.policies.headings import Headings
from qwq_lite.reply.policies.loops import Loops
from qwq_lite.reply.policies.order import ORDER, arrange
from qwq_lite.reply.policies.phases import CLOSINGS, Phases
from qwq_lite.reply.policies.reserve import Reserve
from qwq_lite.reply.policies.script import Script
from qwq_lite.reply.policies.stops import Stops
from qwq_lite.reply.policy import Action, Begin, Draw, Policy, Rewind, Rewrite, Stop, Taken, Turn, Verdict
from qwq_lite.sampling import Sampling
from qwq_lite.text.lines import Line, follow

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
    end: tuple[ThoughtEnd, int] | None = None
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
        return Verdict(state + 1, self.action, self.hold, self.turn, self.end)


def take(policies: Sequence[Policy], *tokens: tuple[int, bytes], begin: Begin | None = None) -> fold.Step:
    """The step of the last of the tokens."""
    asked = tuple(policies)
    state, _ = fold.fold(asked, begin or Begin(), [(token, piece, 0.0) for token, piece in tokens[:-1]])
    return fold.advance(asked, state, *tokens[-1])


def recorded(**kinds: Any) -> tuple[list[tuple[str, Taken]], tuple[Invented, ...]]:
    """Policies by name, each with its action, and the one record that all write into."""
    seen: list[tuple[str, Taken]] = []
    return seen, tuple(Invented(name, action, seen=seen) for name, action in kinds.items())


def test_the_order_is_this_one() -> None:
    """Which policy is asked first decides what a reply is: who changes the order changes this line too, and says why."""
    assert ORDER == ("phases", "headings", "stops", "script", "deadline", "loops", "closing", "reserve")


def test_the_policies_have_the_names_that_the_order_speaks_of() -> None:
    assert [policy.name for policy in arrange([Stops(frozenset()), Phases()])] == ["phases", "stops"]
    kinds = (Phases, Headings, Stops, Script, Deadline, Loops, Closing, Reserve)
    assert tuple(kind.name for kind in kinds) == ORDER


@given(st.permutations(ORDER), st.data())
def test_arranged_sorts_any_choice_of_policies(names: Sequence[str], data: st.DataObject) -> None:
    chosen = names[: data.draw(st.integers(0, len(names)))]
    assert [policy.name for policy in arrange(Invented(name) for name in chosen)] == [n for n in ORDER if n in chosen]


@pytest.mark.parametrize("names", [("nobody",), ("phases", "nobody"), ("stops", "stops"), ("stops", "phases", "stops")])
def test_arranged_refuses_a_policy_without_a_place_and_one_that_is_there_twice(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"policies \['"):
        arrange(Invented(name) for name in names)


@given(st.lists(st.frozensets(st.integers(0, 9)), max_size=5))
def test_each_policy_sees_the_draw_of_the_one_before(bans: list[frozenset[int]]) -> None:
    draws: list[tuple[str, int, Draw]] = []
    policies = tuple(Invented(str(i), bans=banned, draws=draws) for i, banned in enumerate(bans))
    draw = fold.constrain(policies, fold.start(policies, Begin()), SAMPLING)
    expected = [frozenset[int]().union(*bans[:n]) for n in range(len(bans) + 1)]
    assert [(name, asked.banned) for name, _, asked in draws] == [
        (str(i), seen) for i, seen in enumerate(expected[:-1])
    ]
    assert draw == Draw(SAMPLING, banned=expected[-1])


def test_a_policy_may_change_every_part_of_a_draw() -> None:
    """Masks, settings and a token of its own; without a policy the draw is that of the request."""
    mask = np.zeros(4, np.float32)
    eager = (1, 0.5, Rewrite(0, ("\n",)))

    @dataclass(frozen=True)
    class Strict(Invented):
        def constrain(self, state: int, draw: Draw) -> Draw:
            return Draw(Sampling(temperature=0), (*draw.masks, mask), draw.banned | {2}, forced=3, eager=eager)

    policies = (Strict(),)
    draw = fold.constrain(policies, fold.start(policies, Begin()), SAMPLING)
    assert (draw.sampling, draw.banned, draw.forced) == (Sampling(temperature=0), frozenset({2}), 3)
    assert draw.eager == eager
    assert draw.masks[0] is mask
    assert fold.constrain((), fold.start((), Begin()), SAMPLING) == Draw(SAMPLING)


def test_a_policy_without_a_word_on_draws_is_not_asked_and_would_change_none() -> None:
    @dataclass(frozen=True)
    class Mute(Policy):
        name: ClassVar[str] = "mute"

        def start(self, begin: Begin) -> int:
            return 0

        def observe(self, state: int, taken: Taken) -> Verdict:
            return Verdict(state + 1)

    @dataclass(frozen=True)
    class Fails(Mute):
        def constrain(self, state: Any, draw: Draw) -> Draw:
            raise AssertionError("it said that it has no word")

    policies = (Fails(), Invented(bans=frozenset({4})))
    draw = fold.constrain(policies, fold.start(policies, Begin()), SAMPLING)
    assert draw == Draw(SAMPLING, banned=frozenset({4}))
    assert Mute().constrain(0, draw) is draw


def test_each_policy_is_asked_with_its_own_state() -> None:
    policies = (Invented("a"), Invented("b"))
    state = fold.start(policies, Begin())
    state = state._replace(policies=(5, 7))
    fold.constrain(policies, state, SAMPLING)
    assert [policy.draws[0][:2] for policy in policies] == [("a", 5), ("b", 7)]
    assert fold.advance(policies, state, 0, b"").state.policies == (6, 8)


def test_every_policy_observes_every_token_in_order_also_after_a_word_that_ends_it() -> None:
    seen, policies = recorded(a=Stop("stop"), b=Rewind(0), c=None)
    step = take(policies, (9, b"x"))
    assert [name for name, _ in seen] == ["a", "b", "c"]
    line, rows = follow(Line(), "x")
    assert [taken for _, taken in seen] == [Taken(9, "x", "answer", 1, added="x", line=line, rows=rows)] * 3
    assert step.state.policies == (1, 1, 1)


ACTIONS = st.one_of(
    st.none(),
    st.builds(Rewind, st.integers(0, 3), st.frozensets(st.integers(0, 9))),
    st.builds(Rewrite, st.one_of(st.none(), st.integers(0, 3)), st.just(("a", CLOSE))),
    st.builds(Stop, st.sampled_from(["stop", "length"])),
)


@given(st.lists(ACTIONS, max_size=5), st.lists(st.integers(0, 9), max_size=3))
def test_the_first_end_or_rewind_wins_and_forced_tokens_stay_in_order(actions: list[Action], queued: list[int]) -> None:
    """What was forced already comes first, less the token in hand."""
    _, policies = recorded(**{str(i): action for i, action in enumerate(actions)})
    before = fold.start(policies, Begin())._replace(forced=tuple(queued))
    step = fold.advance(policies, before, 9, b"x")
    assert step.action == next((action for action in actions if isinstance(action, Stop | Rewind | Rewrite)), None)
    assert step.state.forced == tuple(queued[1:])


def test_a_forced_token_is_drawn_and_no_policy_is_asked() -> None:
    policies = (Invented(bans=frozenset({4})),)
    state = take(policies, (0, b"x"), begin=Begin(rewinds=(Rewind(1, forced=(4, 5)),))).state
    assert fold.constrain(policies, state, SAMPLING) == Draw(SAMPLING, forced=4)
    assert not policies[0].draws


def test_forced_tokens_come_one_after_the_other_and_then_the_policies_are_asked_again() -> None:
    policies = (Invented(),)
    state, drawn = take(policies, (0, b"x"), begin=Begin(rewinds=(Rewind(1, forced=(4, 5)),))).state, []
    while (token := fold.constrain(policies, state, SAMPLING).forced) is not None:
        drawn.append(token)
        state = fold.advance(policies, state, token, b"y").state
    assert drawn == [4, 5]
    assert [asked for _, asked, _ in policies[0].draws] == [3]


@given(st.lists(st.builds(Rewind, st.integers(0, 4), st.frozensets(st.integers(0, 9))), max_size=5))
def test_what_a_rewind_bans_is_banned_at_its_place_until_the_text_before_it_goes(rewinds: list[Rewind]) -> None:
    state = fold.start((), Begin(rewinds=tuple(rewinds)))
    for n_tokens in range(6):
        first = max((i + 1 for i, rewind in enumerate(rewinds) if rewind.n_tokens < n_tokens), default=0)
        same_text = [rewind for rewind in rewinds[first:] if rewind.n_tokens == n_tokens]
        banned = frozenset(token for rewind in same_text for token in rewind.banned)
        assert fold.constrain((), state, SAMPLING) == Draw(SAMPLING, banned=banned)
        state = fold.advance((), state, 0, b"x").state


FORCED = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@given(st.lists(st.builds(lambda n, forced: Rewind(n, forced=forced), st.integers(0, 6), FORCED), max_size=5))
def test_what_a_rewind_forces_comes_at_its_place_until_the_text_at_it_goes(rewinds: list[Rewind]) -> None:
    """Of those that still hold, the last one that begins at or before a place says what comes there."""
    holding: list[Rewind] = []
    for rewind in rewinds:
        n = rewind.n_tokens
        holding = [replace(other, forced=other.forced[: n - other.n_tokens]) for other in holding if other.n_tokens < n]
        holding += [rewind] if rewind.forced else []
    seen: list[tuple[str, Taken]] = []
    policies = (Invented(seen=seen),)
    state = fold.start(policies, Begin(rewinds=tuple(rewinds)))
    expected: list[int | None] = []
    for n_tokens in range(12):
        at = [(rewind.n_tokens, rewind.forced) for rewind in holding if rewind.n_tokens <= n_tokens]
        place, forced = max(at, default=(0, ()))
        expected.append(dict(enumerate(forced, place)).get(n_tokens))
        assert fold.constrain(policies, state, SAMPLING).forced == expected[-1]
        state = fold.advance(policies, state, expected[-1] or 0, b"x").state
    assert [taken.forced for _, taken in seen] == [token is not None for token in expected]


def test_a_policy_is_told_when_a_token_came_and_whether_it_was_drawn() -> None:
    seen: list[tuple[str, Taken]] = []
    policies, begin = (Invented(seen=seen),), Begin(rewinds=(Rewind(1, forced=(4,)),))
    fold.fold(policies, begin, [(9, b"x", 0.5), (4, b"y", 0.75)])
    assert [(taken.time_s, taken.forced) for _, taken in seen] == [(0.5, False), (0.75, True)]


@pytest.mark.parametrize("asked_at", [None, 0, 2])
def test_from_where_the_reader_waits_each_token_says_that_the_thought_is_to_end(asked_at: int | None) -> None:
    seen: list[tuple[str, Taken]] = []
    begin = Begin("thinking", asked_at=asked_at)
    take((Invented(seen=seen),), *[(9, b"x")] * 4, begin=begin)
    first = 4 if asked_at is None else asked_at
    assert [taken.end for _, taken in seen] == [None] * first + [("asked", 96)] * (4 - first)


def test_the_policies_after_one_that_wants_the_thought_to_end_see_its_word() -> None:
    seen: list[tuple[str, Taken]] = []
    policies = [
        Invented("a", seen=seen),
        Invented("b", end=("deadline", 5), seen=seen),
        Invented("c", seen=seen),
        Invented("d", end=("budget", 3), seen=seen),
        Invented("e", seen=seen),
    ]
    take(policies, (9, b"x"), begin=Begin("thinking", asked_at=0))
    asked, deadline, budget = ("asked", 96), ("deadline", 5), ("budget", 3)
    assert [taken.end for _, taken in seen] == [asked, asked, deadline, deadline, budget]


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
    """A phase that begins with a text, for a model whose tags are no tokens: token 8 ends the thought `n` characters back.

    n_tag: so many characters before those are the tag.
    """

    n: int = 0
    n_tag: int = 0

    def observe(self, state: int, taken: Taken) -> Verdict:
        turn = Turn("answer", n_chars=self.n, n_tag=self.n_tag) if taken.token == 8 else None
        return Verdict(state + 1, turn=turn, hold=0 if turn else self.hold)


@given(st.integers(0, 6))
def test_a_turn_may_begin_within_the_text_of_its_token_or_before_it(n: int) -> None:
    """The last characters belong to the new phase, also those that were held; what is before them ends the old one."""
    step = take((Spelled(n=n, hold=3),), (9, b"abc"), (8, b"def"), begin=Begin("thinking"))
    old, new = "abcdef"[: 6 - n], "abcdef"[6 - n :]
    assert step.events == (*((Thinking(old),) if old else ()), *((Answer(new),) if new else ()))


@given(st.integers(0, 6), st.integers(0, 8))
def test_a_tag_that_is_written_as_text_is_shown_nowhere(n: int, n_tag: int) -> None:
    """It may begin in what was held; no more than that can go."""
    seen: list[tuple[str, Taken]] = []
    policies = (Spelled(n=n, n_tag=n_tag, hold=3), Invented(seen=seen))
    step = take(policies, (9, b"abc"), (8, b"def"), begin=Begin("thinking"))
    old, new = "abcdef"[: max(0, 6 - n - n_tag)], "abcdef"[6 - n :]
    assert step.events == (*((Thinking(old),) if old else ()), *((Answer(new),) if new else ()))
    assert (seen[-1][1].text, seen[-1][1].phase, seen[-1][1].turned) == (new, "answer", True)
    assert (step.state.turned_at, step.state.n_shown) == (2, n)


def test_text_before_a_tag_that_was_shown_stays_shown() -> None:
    step = take((Spelled(n=1, n_tag=5),), (9, b"abc"), (8, b"def"), begin=Begin("thinking"))
    assert step.events == (Answer("f"),)


def written(*pieces: str, begin: Begin | None = None) -> tuple[fold.State, str, str]:
    """State, thought and answer of a model without tags, from the pieces of its text."""
    state, events = fold.fold((Phases(),), begin or Begin("thinking"), [(9, piece.encode(), 0.0) for piece in pieces])
    events += fold.close(state)

    def joined(kind: type[Event]) -> str:
        return "".join(event.text for event in events if isinstance(event, Thinking | Answer) and type(event) is kind)

    return state, joined(Thinking), joined(Answer)


NEAR_TAGS = st.text("a<‹/think>思考 \n", max_size=12)


@given(NEAR_TAGS, st.sampled_from(CLOSINGS), NEAR_TAGS, st.lists(st.integers(0, 1000)))
def test_a_closing_tag_that_is_written_as_text_ends_the_thought_however_its_characters_are_put_together(
    before: str, tag: str, after: str, places: list[int]
) -> None:
    whole = f"a{before}{tag}{after}"
    ends = [0, *sorted({place % (len(whole) + 1) for place in places} - {0, len(whole)}), len(whole)]
    state, thought, answer = written(*(whole[a:b] for a, b in itertools.pairwise(ends)))
    first = min(found for tag in CLOSINGS if (found := whole.find(tag)) >= 0)
    rest = next(whole[first + len(tag) :] for tag in CLOSINGS if whole.startswith(tag, first))
    assume(not any(tag in rest for tag in CLOSINGS))  # see below
    assert (state.phase, thought, answer) == ("answer", whole[:first], rest.lstrip("\n"))


def test_a_second_closing_tag_that_is_written_as_text_counts_at_the_start_of_a_line_alone() -> None:
    policies, tokens = (Phases(),), ["Hm.", "</think>", "4\n", "</", "think>", "\n5"]
    events = fold.fold(policies, Begin("thinking"), [(9, piece.encode(), 0.0) for piece in tokens])[1]
    notice = Notice("the 2 characters of the answer so far no longer count", "restarted", 2)
    assert events == [Thinking("Hm."), Answer("4\n"), notice, Answer("5")]
    assert written("Hm.", "</think>", "4", "</think>", "5")[1:] == ("Hm.", "4</think>5")


@given(NEAR_TAGS, st.lists(st.integers(0, 1000)))
def test_text_that_only_looks_like_a_closing_tag_stays_in_the_thought(text: str, places: list[int]) -> None:
    whole = f"a{text}"
    if any(tag in whole for tag in CLOSINGS):
        return
    ends = [0, *sorted({place % (len(whole) + 1) for place in places} - {0, len(whole)}), len(whole)]
    state, thought, answer = written(*(whole[a:b] for a, b in itertools.pairwise(ends)))
    assert (state.phase, thought, answer) == ("thinking", whole, "")


@pytest.mark.parametrize("tag", ["<答案>", "‹答案>", "‹答案›"])
def test_a_tag_that_opens_the_answer_ends_the_thought_at_the_start_of_a_line_alone(tag: str) -> None:
    assert written("a\n", tag, "5")[1:] == ("a\n", "5")
    assert written("a", f"\n{tag[:1]}", f"{tag[1:]}5")[1:] == ("a\n", "5")
    assert written(f"a{tag}5")[1:] == (f"a{tag}5", "")
    assert written("a", tag, "5")[1:] == (f"a{tag}5", "")


@pytest.mark.parametrize("pieces", [("<think>\n", "Hm."), ("\n", "<", "think", ">", "\n", "Hm."), ("\n<thi", "nk>Hm.")])
def test_an_opening_tag_that_is_written_as_text_begins_a_thought_at_the_very_start(pieces: tuple[str, ...]) -> None:
    assert written(*pieces, "</think>", "\n5", begin=Begin())[1:] == ("Hm.", "5")
    assert written("a", *pieces, begin=Begin())[1:] == ("", "a" + "".join(pieces))


def test_a_reply_that_only_begins_like_an_opening_tag_is_an_answer() -> None:
    assert written("<thi", "s", begin=Begin())[1:] == ("", "<this")
    assert written("<thi", begin=Begin())[1:] == ("", "<thi")


def test_a_model_with_tokens_for_its_tags_has_no_opening_tag_in_its_text() -> None:
    step = take((Phases(think_open=2, think_close=CLOSE),), (9, b"<think>"))
    assert (step.events, step.state.phase) == ((Answer("<think>"),), "answer")


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
    state = State("thinking", given=Given({2: frozenset({1})}), policies=(0,))
    assert fold.fold(policies, begin, []) == (state, [])
    assert fold.start(policies, begin) == state
    again = replace(begin, rewinds=(Rewind(0, forced=(4, 5), ends="budget"),), asked_at=7)
    given = Given({0: frozenset()}, {0: (4, 5)}, 2, 7)
    assert fold.start(policies, again) == state._replace(forced=(4, 5), given=given)
