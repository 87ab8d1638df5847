"""One reply in the making: the tokens that stand, their text, what was shown. A rewind folds them again. Knows no engine.

The stream is append-only. A rewind takes back tokens, never text that was shown: it happens while thinking, and a notice says
how many characters of the thought no longer count; the reply that ends the stream has the text that does. What was shown and
comes again in other tokens is not shown twice.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import NamedTuple

from qwq_lite.events import Answer, Event, FinishReason, LoopEnd, Notice, Thinking, ThoughtEnd
from qwq_lite.reply import fold
from qwq_lite.reply.commands import Steer
from qwq_lite.reply.fold import State, Step, utf8
from qwq_lite.reply.policy import Begin, Draw, Policy, Rewind, Rewrite, Stop
from qwq_lite.reply.retokenize import Tokenize, n_common_tokens, retokenize, text_of
from qwq_lite.sampling import Sampling
from qwq_lite.text import breaks, final_answer


class FinishedReply(NamedTuple):
    """What a reply is in the end. n_thinking, n_answer: tokens; what is between the two counts with the thought, if there is one.

    end: what ended the thought.
    """

    thinking: str
    answer: str
    n_thinking: int
    n_answer: int
    end: ThoughtEnd | None


class ReplyBuilder:
    """policies: in their order. piece: a token's bytes. tokenize: ids of a text as plain text, nothing added."""

    def __init__(
        self,
        policies: tuple[Policy, ...],
        begin: Begin,
        piece: Callable[[int], bytes],
        tokenize: Tokenize,
    ) -> None:
        self._policies, self._begin, self._piece, self._tokenize = policies, begin, piece, tokenize
        self._state = fold.start(policies, begin)
        self._texts = _Texts()
        self._n_again = 0  # characters of a thought that were shown and that forced tokens bring again
        self._closed: Notice | None = None  # the word on a thought whose end is still being written
        self._times: list[float] = []
        self.tokens: list[int] = []
        self.n_taken = self.n_forced = 0  # tokens that were decoded, those that a rewind took back too

    @property
    def state(self) -> State:
        return self._state

    @property
    def attempt(self) -> int:
        """How many rewinds there were: part of each draw's seed."""
        return len(self._begin.rewinds)

    @property
    def n_thinking(self) -> int:
        """Tokens of the thought, with the tag or heading that ended it, and all of what was forced to."""
        if self._state.phase == "thinking":
            return self._state.n_tokens
        return max(self._state.turned_at, self._state.given.ended_at or 0)

    @property
    def thought_end(self) -> ThoughtEnd | None:
        """What ended the thought; None while it goes on, or where there was none."""
        if self._state.phase == "thinking" or not self._state.turned_at or not self._has_thought:
            return None
        return next((rewind.ends for rewind in self._begin.rewinds if rewind.ends), "itself")

    @property
    def may_think_yet(self) -> bool:
        """Whether nothing is shown yet of a reply that may begin with a thought of its own accord."""
        return self._state.phase == "answer" and not self._state.turned_at and not self._texts.n_answer

    def ended(self, reason: FinishReason) -> FinishedReply:
        """What the reply is that ends now."""
        thinking, answer = self.texts(reason)
        n_before, end = self.n_thinking, self.thought_end
        if self._begin.undivided and thinking != self._texts.thinking.rstrip():  # the whole text says otherwise
            n_before, end = self._n_tokens(thinking), "itself" if thinking else None
        elif answer and self._state.phase == "thinking":
            n_before = 0
        return FinishedReply(thinking, answer, n_before if thinking else 0, len(self.tokens) - n_before, end)

    def loops(self, reason: FinishReason) -> tuple[LoopEnd, ...]:
        """What was done about each loop of the reply that ends now."""
        found: list[LoopEnd] = []
        for rewind in self._begin.rewinds:
            if rewind.loop or rewind.ends == "loop":
                found.append("rewound" if rewind.loop else "closed")
        return (*found, "stopped") if reason == "loop" else tuple(found)

    def texts(self, reason: FinishReason) -> tuple[str, str]:
        """Thought and answer of the reply that ends now. Of one without tags both together are the text."""
        thinking, answer = self._texts.thinking, self._texts.answer
        if self._begin.undivided:
            whole = (thinking + answer).rstrip()
            if self._was_closed:  # there is no doubt where
                return thinking.rstrip(), answer.rstrip()
            if reason == "cancelled" and self._state.phase == "thinking":
                return whole, ""
            place = final_answer.final_start(whole, ended=reason == "stop") or 0
            return whole[:place], whole[place:]
        if self._state.phase == "thinking" and reason == "stop":  # the model has ended its turn: that was its answer
            return "", thinking.strip()
        return thinking.strip(), answer.rstrip()

    def constrain(self, sampling: Sampling) -> Draw:
        return fold.constrain(self._policies, self._state, sampling)

    def resampled(self, asked: Sampling) -> Notice | None:
        """What whoever asked for these settings should know after a loop, where others hold from here on."""
        now = fold.constrain(self._policies, self._state._replace(forced=()), asked).sampling
        pairs = [(field.name, *(f"{getattr(one, field.name):g}" for one in (now, asked))) for field in fields(asked)]
        changed = [f"{name} is {new} and not {old}" for name, new, old in pairs if new != old]  # as files round them
        if not changed:
            return None
        words = f"for the rest of the thought, {', '.join(changed)}"
        return Notice(f"{words}: as it was asked for, it would repeat itself again", "warmed")

    def take(self, token: int, time_s: float = 0.0) -> tuple[tuple[Event, ...], Rewind | Stop | None]:
        """Take a token in. A Rewind that comes back has been carried out here, and is left to do in the cache."""
        self.n_forced += bool(self._state.forced)
        step: Step = fold.advance(self._policies, self._state, token, self._piece(token), time_s)
        self.tokens.append(token)
        self._times.append(time_s)
        self.n_taken += 1
        action = step.action
        if isinstance(action, Rewrite):
            # What opens the answer was written as part of the thought, and is taken back as such.
            turned = step.state.phase == "answer" != self._state.phase
            action = self._respelled(action, (self._state if turned else step.state).turned_at)
        if isinstance(action, Rewind):  # its own text is not shown first: nothing that can still go is
            return self.rewind(action), action
        self._state = step.state
        return self._unseen(self._kept(step.events)), action

    def rewind(self, rewind: Rewind) -> tuple[Event, ...]:
        """Let only the first tokens stand, and fold them again.

        Raises: ValueError when text of the answer that was shown would be taken back.
        """
        begin = dataclasses.replace(self._begin, rewinds=(*self._begin.rewinds, rewind))
        if begin.asked_at is not None:  # it was asked of a thought that is gone, and still is
            begin = dataclasses.replace(begin, asked_at=min(begin.asked_at, rewind.n_tokens))
        tokens, times = self.tokens[: rewind.n_tokens], self._times[: rewind.n_tokens]
        state, events = fold.fold(self._policies, begin, zip(tokens, map(self._piece, tokens), times, strict=True))
        texts, sent = _Texts(), self._texts
        texts.add(events)
        if texts.n_answer < sent.n_answer or not 0 <= rewind.n_tokens <= len(self.tokens):
            raise ValueError(
                f"a rewind to token {rewind.n_tokens} of {len(self.tokens)} would take back text that was shown"
            )
        seen = self._seen
        unsent = (Thinking(texts.thinking[len(seen) :]), Answer(texts.all_answers[sent.n_answer :]))
        self._begin, self.tokens, self._times, self._state, self._texts = begin, tokens, times, state, texts
        self._n_again = n_common_tokens(seen[texts.n_thinking :], self._to_come)
        notice = _notice(rewind, seen[texts.n_thinking + self._n_again :])
        self._closed = notice if rewind.ends and notice and not notice.n_lost else None
        shown = (event for event in unsent if event.text)
        return (*shown, *([notice] if notice and notice is not self._closed else []))

    def rewrite(self, rewrite: Rewrite) -> tuple[tuple[Event, ...], Rewind]:
        """Carry it out between two tokens; the Rewind is left to do in the cache."""
        rewind = self._respelled(rewrite, self._state.turned_at)
        return self.rewind(rewind), rewind

    def conclude(self) -> bool:
        """The reader waits for the answer: end the thought soon. False where there is none that could end."""
        if self._state.phase != "thinking":
            return False
        if self._begin.asked_at is None:
            asked_at = self._state.n_tokens
            self._begin = dataclasses.replace(self._begin, asked_at=asked_at)
            self._state = self._state._replace(given=self._state.given._replace(asked_at=asked_at))
        return True

    def steer(self, order: Steer) -> Rewind | None:
        """What gives the thought another direction, not carried out yet; None where there is no thought to steer.

        Between two tokens that are drawn: not while forced ones are still to be taken.
        """
        if self._state.phase != "thinking":
            return None
        begins = self._state.turned_at
        text = text_of(self.tokens[begins:], self._piece)
        n_drop = 0 if order.drop is None else breaks.n_unfinished(text, order.drop)
        return self._respelled(Rewrite(n_drop, (f"\n\n{order.hint}",), "it was given a hint"), begins)

    @property
    def _has_thought(self) -> bool:
        return self._was_closed or self._begin.phase == "thinking" or self._texts.n_thinking > 0

    @property
    def _was_closed(self) -> bool:
        return any(rewind.ends for rewind in self._begin.rewinds)

    def flush(self) -> tuple[Event, ...]:
        """What is left to show of a reply that ends where no policy ended it."""
        return self._unseen(self._kept(fold.close(self._state)))

    def _unseen(self, events: tuple[Event, ...]) -> tuple[Event, ...]:
        """The events without text that was shown before; the word on an ended thought stands between it and the answer."""
        if not self._n_again and self._closed is None:  # nearly always
            return events
        found: list[Event] = []
        for event in events:
            if isinstance(event, Thinking):
                text, self._n_again = event.text[self._n_again :], max(0, self._n_again - len(event.text))
                found += [Thinking(text)] if text else []
            else:
                found += self._closing_word()
                found.append(event)
        if self._state.phase == "answer":
            found += self._closing_word()
            self._n_again = 0
        return tuple(found)

    def _closing_word(self) -> list[Event]:
        notice, self._closed = self._closed, None
        return [notice] if notice else []

    @property
    def _seen(self) -> str:
        """What the reader has of the thought: more than stands, where forced tokens bring it again."""
        return self._texts.thinking + self._to_come[: self._n_again] if self._n_again else self._texts.thinking

    @property
    def _to_come(self) -> str:
        """The rest of the thought's line and the white space after it, as far as they are forced."""
        state = self._state
        if not state.n_shown:
            return ""
        pieces = itertools.takewhile(len, map(self._piece, state.forced))  # a tag has no bytes
        text = state.held + utf8(state.pending, b"".join(pieces))[0]
        line, newline, more = text.partition("\n")
        return line + newline + more[: len(more) - len(more.lstrip())]

    def _kept(self, events: tuple[Event, ...]) -> tuple[Event, ...]:
        self._texts.add(events)
        return events

    def _respelled(self, rewrite: Rewrite, begins: int) -> Rewind:
        """begins: the reply's length when its thought began, with a tag that opened it."""
        tokens = self.tokens[begins : len(self.tokens) - rewrite.n_back]
        n_kept, forced = retokenize(tokens, self._piece, rewrite, self._tokenize)
        return Rewind(begins + n_kept, why=rewrite.why, forced=forced, ends=rewrite.ends)

    def _n_tokens(self, text: str) -> int:
        """How many tokens bring a text that the reply begins with."""
        whole = text_of(self.tokens, self._piece)
        n_bytes = len(whole[: len(whole) - len(whole.lstrip("\n"))]) + len(text.encode()) if text else 0
        for n_tokens, token in enumerate(self.tokens):
            if n_bytes <= 0:
                return n_tokens
            n_bytes -= len(self._piece(token))
        return len(self.tokens)


def _notice(rewind: Rewind, lost: str) -> Notice | None:
    """What the reader should know of a rewind that took back this of the thought; white space is not worth words."""
    n_lost = len(lost)
    words = f"the last {n_lost} characters of the thought no longer count"
    if rewind.ends is not None:
        return Notice(f"{rewind.why}; {words}" if lost.strip() else rewind.why, "closed", n_lost)
    if not n_lost:
        return Notice(f"the thought goes on from an earlier place: {rewind.why}", "rewound") if rewind.loop else None
    return Notice(f"{words}: {rewind.why}" if rewind.why else words, "rewound", n_lost)


class _Texts:
    """What was shown, by its kind. n_thinking, n_answer: characters of it."""

    def __init__(self) -> None:
        self._thinking: list[str] = []
        self._answers: list[list[str]] = [[]]  # one more each time that the answer began anew
        self.n_thinking = self.n_answer = 0

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Answer):
                self.n_answer += len(event.text)
                self._answers[-1].append(event.text)
            elif isinstance(event, Thinking):
                self.n_thinking += len(event.text)
                self._thinking.append(event.text)
            elif isinstance(event, Notice) and event.kind == "restarted":
                self._answers.append([])

    @property
    def thinking(self) -> str:
        return "".join(self._thinking)

    @property
    def all_answers(self) -> str:
        return "".join(text for answer in self._answers for text in answer)

    @property
    def answer(self) -> str:
        """The last one that is not empty."""
        return next((text for text in map("".join, reversed(self._answers)) if text.strip()), "")
