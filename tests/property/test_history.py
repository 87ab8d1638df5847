"""history: whole turns go, the oldest first, no more than must; system messages and the last turn stay; what is left fits."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from qwq_lite.errors import ContextFull, TemplateError
from qwq_lite.prompt.chat_template import Message
from qwq_lite.prompt.history import WhenFull, fit_messages

N_FRAME = 2  # tokens that a prompt has beside its messages, as templates have
NO_ROOM = st.sampled_from([None, 1, 3, 1000])  # max_tokens

# A message's content is its number; encoded, it is that number as often as `size` says, so that tokens tell who stayed.
Spec = tuple[str, int]
SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"


def messages_of(specs: Sequence[Spec]) -> list[Message]:
    return [{"role": role, "content": i, "size": size} for i, (role, size) in enumerate(specs)]


def encode(messages: Sequence[Message]) -> list[int]:
    return [-1] * N_FRAME + [message["content"] for message in messages for _ in range(message["size"])]


def size_of(messages: Sequence[Message]) -> int:
    return len(encode(messages))


def turns_of(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """System messages that lead, and the turns: what comes before the first user's message is a turn too."""
    lead: list[Message] = []
    turns: list[list[Message]] = []
    for message in messages:
        if not turns and message["role"] == SYSTEM:
            lead.append(message)
        elif not turns or message["role"] == USER:
            turns.append([message])
        else:
            turns[-1].append(message)
    return lead, turns


def joined(lead: list[Message], turns: list[list[Message]]) -> list[Message]:
    return [*lead, *(message for turn in turns for message in turn)]


def room(n_ctx: int, max_tokens: int | None) -> int:
    return n_ctx // 4 if max_tokens is None else min(max_tokens, n_ctx // 4)


SIZES = st.integers(1, 12)
ROLES = st.sampled_from([USER, USER, ASSISTANT, TOOL, SYSTEM])
SPECS = st.builds(
    lambda lead, rest: [*lead, *rest],
    st.lists(st.tuples(st.just(SYSTEM), SIZES), max_size=2),
    st.lists(st.tuples(ROLES, SIZES), min_size=1, max_size=14),
)
N_CTX = st.integers(8, 160)


@given(SPECS, N_CTX, NO_ROOM)
@example([(USER, 10), (ASSISTANT, 10), (USER, 10), (ASSISTANT, 10), (USER, 2)], 40, None)
@example([(ASSISTANT, 10), (USER, 10), (ASSISTANT, 10), (USER, 2)], 32, None)
@example([(SYSTEM, 5), (USER, 30), (TOOL, 1), (SYSTEM, 1), (USER, 5)], 40, 1)
@example([(SYSTEM, 5), (USER, 50)], 40, None)
def test_what_is_kept_is_the_system_prompt_and_the_fewest_oldest_turns_less_that_make_it_short(
    specs: list[Spec], n_ctx: int, max_tokens: int | None
) -> None:
    """All that `fit_messages` promises, said once more without its search by halving."""
    messages = messages_of(specs)
    lead, turns = turns_of(messages)
    if size_of(messages) + room(n_ctx, max_tokens) <= n_ctx:
        assert fit_messages(messages, encode, n_ctx, max_tokens, "drop") == (encode(messages), 0)
        return
    n_dropped = next(
        (n for n in range(1, len(turns)) if size_of(joined(lead, turns[n:])) <= n_ctx // 2), max(len(turns) - 1, 0)
    )
    kept = joined(lead, turns[n_dropped:])
    if size_of(kept) >= n_ctx:
        with pytest.raises(ContextFull, match=f"the prompt has {size_of(kept)} tokens, the context {n_ctx}"):
            fit_messages(messages, encode, n_ctx, max_tokens, "drop")
    else:
        assert fit_messages(messages, encode, n_ctx, max_tokens, "drop") == (encode(kept), len(messages) - len(kept))


@given(SPECS, N_CTX, NO_ROOM)
def test_the_result_fits_and_keeps_what_must_stay(specs: list[Spec], n_ctx: int, max_tokens: int | None) -> None:
    messages = messages_of(specs)
    lead, turns = turns_of(messages)
    try:
        tokens, n_gone = fit_messages(messages, encode, n_ctx, max_tokens, "drop")
    except ContextFull:
        assert size_of(joined(lead, turns[-1:])) >= n_ctx
        return
    assert len(tokens) < n_ctx
    rest = messages[len(lead) + n_gone :]
    assert tokens == encode([*lead, *rest])
    assert turns[-1:] == [] or joined([], turns[-1:]) == rest[-len(turns[-1]) :]
    assert not n_gone or not turns or rest[0]["role"] == USER


@given(SPECS, N_CTX, NO_ROOM, st.tuples(SIZES, SIZES))
def test_a_conversation_that_was_shortened_goes_on_without_losing_more_at_once(
    specs: list[Spec], n_ctx: int, max_tokens: int | None, more: tuple[int, int]
) -> None:
    """Turns go until half of the context is left: the next turn of ordinary length then extends the same prefix."""
    assume(sum(more) <= n_ctx - n_ctx // 2 - room(n_ctx, max_tokens))
    messages = messages_of(specs)
    n_lead = len(turns_of(messages)[0])
    try:
        tokens, n_gone = fit_messages(messages, encode, n_ctx, max_tokens, "drop")
    except ContextFull:
        return
    if not n_gone or len(tokens) > n_ctx // 2:  # nothing was dropped, or the last turn alone is long
        return
    specs = [*specs, (ASSISTANT, more[0]), (USER, more[1])]
    grown = messages_of(specs)
    again, n_more = fit_messages([*grown[:n_lead], *grown[n_lead + n_gone :]], encode, n_ctx, max_tokens, "drop")
    assert n_more == 0
    assert again[: len(tokens)] == tokens


@given(SPECS, N_CTX, NO_ROOM)
def test_where_dropping_is_an_error_nothing_is_dropped(specs: list[Spec], n_ctx: int, max_tokens: int | None) -> None:
    """One turn may use the room of its reply: there is nothing older that could go instead."""
    messages = messages_of(specs)
    n_tokens, turns = size_of(messages), turns_of(messages)[1]
    if n_tokens + room(n_ctx, max_tokens) <= n_ctx or (len(turns) < 2 and n_tokens < n_ctx):
        assert fit_messages(messages, encode, n_ctx, max_tokens, "error") == (encode(messages), 0)
    else:
        with pytest.raises(ContextFull, match=f"the prompt has {n_tokens} tokens, the context {n_ctx}"):
            fit_messages(messages, encode, n_ctx, max_tokens, "error")


@given(SPECS, N_CTX, NO_ROOM)
def test_few_prompts_are_encoded(specs: list[Spec], n_ctx: int, max_tokens: int | None) -> None:
    """Encoding a long conversation takes seconds, so the place is found by halving: at most log2 of the turns, and two."""
    n_calls = 0

    def counted(messages: Sequence[Message]) -> list[int]:
        nonlocal n_calls
        n_calls += 1
        return encode(messages)

    messages = messages_of(specs)
    with contextlib.suppress(ContextFull):
        fit_messages(messages, counted, n_ctx, max_tokens, "drop")
    assert n_calls <= len(turns_of(messages)[1]).bit_length() + 2


@pytest.mark.parametrize("when_full", ["drop", "error"])
def test_a_conversation_that_fits_is_encoded_once_and_left_alone(when_full: WhenFull) -> None:
    messages = messages_of([(SYSTEM, 3), (USER, 10), (ASSISTANT, 10), (USER, 5)])
    assert fit_messages(messages, encode, 40, 10, when_full) == (encode(messages), 0)
    assert fit_messages(messages, encode, 40, None, when_full) == (encode(messages), 0)


def test_what_answers_a_question_goes_with_it() -> None:
    """A tool's word without the call that it answers is a prompt that no template was made for."""
    specs = [(SYSTEM, 1), (USER, 5), (ASSISTANT, 5), (TOOL, 5), (TOOL, 5), (ASSISTANT, 5), (USER, 5), (ASSISTANT, 1)]
    tokens, n_gone = fit_messages(messages_of(specs), encode, 40, None, "drop")
    assert n_gone == 5
    assert set(tokens) == {-1, 0, 6, 7}


def test_a_system_message_in_the_middle_belongs_to_its_turn() -> None:
    tokens, n_gone = fit_messages(
        messages_of([(USER, 15), (SYSTEM, 5), (USER, 15), (SYSTEM, 3)]), encode, 40, 8, "drop"
    )
    assert (set(tokens), n_gone) == ({-1, 2, 3}, 2)


def test_what_comes_before_the_first_question_is_the_oldest_turn() -> None:
    tokens, n_gone = fit_messages(messages_of([(SYSTEM, 1), (ASSISTANT, 30), (USER, 5)]), encode, 40, None, "drop")
    assert (set(tokens), n_gone) == ({-1, 0, 2}, 1)


def test_the_only_turn_stays_and_may_take_the_room_of_its_reply() -> None:
    messages = messages_of([(SYSTEM, 5), (USER, 30)])
    assert fit_messages(messages, encode, 40, None, "drop") == (encode(messages), 0)


@pytest.mark.parametrize("when_full", ["drop", "error"])
@pytest.mark.parametrize("specs", [[(SYSTEM, 5), (USER, 33)], [(SYSTEM, 38)], [(ASSISTANT, 38)]])
def test_what_must_stay_and_does_not_fit_is_an_error(specs: list[Spec], when_full: WhenFull) -> None:
    """A prompt as long as the context leaves no room for a single token."""
    with pytest.raises(ContextFull, match=r"the prompt has 40 tokens, the context 40, .* \(--ctx\)"):
        fit_messages(messages_of(specs), encode, 40, None, when_full)


def test_system_messages_alone_are_a_prompt() -> None:
    messages = messages_of([(SYSTEM, 20), (SYSTEM, 15)])
    assert fit_messages(messages, encode, 40, None, "drop") == (encode(messages), 0)


def test_a_last_turn_as_long_as_the_context_is_an_error_also_when_older_ones_went() -> None:
    with pytest.raises(ContextFull, match="the prompt has 40 tokens, the context 40"):
        fit_messages(messages_of([(USER, 9), (USER, 38)]), encode, 40, None, "drop")
    assert fit_messages(messages_of([(USER, 9), (USER, 37)]), encode, 40, None, "drop")[1] == 1


def test_the_system_prompt_of_a_long_conversation_may_be_what_does_not_fit() -> None:
    with pytest.raises(ContextFull, match="the prompt has 44 tokens"):
        fit_messages(messages_of([(SYSTEM, 40), (USER, 9), (USER, 2)]), encode, 40, None, "drop")


def test_room_is_a_quarter_of_the_context_at_most() -> None:
    """A large max_tokens is what the reply may be, not what it will be: it does not cost the conversation its past."""
    messages = messages_of([(USER, 10), (USER, 18)])
    assert fit_messages(messages, encode, 40, 1000, "drop") == (encode(messages), 0)
    assert fit_messages(messages, encode, 38, 1000, "drop")[1] == 1


def test_what_a_template_refuses_is_the_callers_to_see() -> None:
    def refuse(messages: Sequence[Message]) -> list[int]:
        raise TemplateError("no")

    with pytest.raises(TemplateError, match="no"):
        fit_messages(messages_of([(USER, 1)]), refuse, 40, None, "drop")


def test_a_prompt_as_long_as_the_context_does_not_fit() -> None:
    assert fit_messages(messages_of([(USER, 5), (USER, 5)]), encode, 12, 0, "drop")[1] == 1
