"""One reply in the making: its tokens that stand, its text, what was shown. Rewinding folds again. Knows no engine.

The stream is append-only. A rewind takes back tokens, never text that was shown: it happens while thinking, and a notice says
how many characters of the thought no longer count; the reply that ends the stream has the text that does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from qwq_lite import boundary, breaks, generation
from qwq_lite.events import Answer, Event, FinishReason, Notice, Thinking, ThoughtEnd
from qwq_lite.generation import Begin, Draw, Policy, Rewind, Rewrite, State, Step, Stop
from qwq_lite.orders import Steer
from qwq_lite.respelling import Tokenize, respelled, text_of
from qwq_lite.sampling import Sampling


class Track:
    """policies: in their order. piece: a token's bytes. tokenize: ids of a text, nothing added and nothing normalised."""

    def __init__(
        self,
        policies: tuple[Policy, ...],
        begin: Begin,
        piece: Callable[[int], bytes],
        tokenize: Tokenize,
    ) -> None:
        self._policies, self._begin, self._piece, self._tokenize = policies, begin, piece, tokenize
        self._state = generation.start(policies, begin)
        self._texts = _Texts()
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
        """Tokens of the thought, with the tag or heading that ended it."""
        return self._state.n_tokens if self._state.phase == "thinking" else self._state.turned_at

    @property
    def thought_end(self) -> ThoughtEnd | None:
        """What ended the thought; None while it goes on, or where there was none."""
        if self._state.phase == "thinking" or not self._state.turned_at or not self._has_thought:
            return None
        return next((rewind.ends for rewind in self._begin.rewinds if rewind.ends), "itself")

    def texts(self, reason: FinishReason) -> tuple[str, str]:
        """Thought and answer of the reply that ends now. Of one without tags both together are the text."""
        thinking, answer = self._texts.thinking, self._texts.answer
        if self._begin.undivided:
            whole = (thinking + answer).rstrip()
            place = boundary.final_start(whole, ended=reason == "stop") or 0
            return whole[:place], whole[place:]
        if self._state.phase == "thinking" and reason == "stop":  # the model has ended its turn: that was its answer
            return "", thinking.strip()
        return thinking.strip(), answer.rstrip()

    def constrain(self, sampling: Sampling) -> Draw:
        return generation.constrain(self._policies, self._state, sampling)

    def take(self, token: int, time_s: float = 0.0) -> tuple[tuple[Event, ...], Rewind | Stop | None]:
        """Take a token in. A Rewind that comes back has been carried out here, and is left to do in the cache."""
        self.n_forced += bool(self._state.forced)
        step: Step = generation.advance(self._policies, self._state, token, self._piece(token), time_s)
        self.tokens.append(token)
        self._times.append(time_s)
        self.n_taken += 1
        action = step.action
        if isinstance(action, Rewrite):
            action = self._respelled(action)
        if isinstance(action, Rewind):  # its own text is not shown first: nothing that can still go is
            return self.rewind(action), action
        self._state = step.state
        return self._kept(step.events), action

    def rewind(self, rewind: Rewind) -> tuple[Event, ...]:
        """Let only the first tokens stand, and fold them again.

        Raises: ValueError when text of the answer that was shown would be taken back.
        """
        begin = dataclasses.replace(self._begin, rewinds=(*self._begin.rewinds, rewind))
        if begin.asked_at is not None:  # it was asked of a thought that is gone, and still is
            begin = dataclasses.replace(begin, asked_at=min(begin.asked_at, rewind.n_tokens))
        tokens, times = self.tokens[: rewind.n_tokens], self._times[: rewind.n_tokens]
        state, events = generation.fold(
            self._policies, begin, zip(tokens, map(self._piece, tokens), times, strict=True)
        )
        texts, sent = _Texts(), self._texts
        texts.add(events)
        if texts.n_answer < sent.n_answer or not 0 <= rewind.n_tokens <= len(self.tokens):
            raise ValueError(
                f"a rewind to token {rewind.n_tokens} of {len(self.tokens)} would take back text that was shown"
            )
        lost = sent.n_thinking - texts.n_thinking
        unsent = (Thinking(texts.thinking[sent.n_thinking :]), Answer(texts.all_answers[sent.n_answer :]))
        self._begin, self.tokens, self._times, self._state, self._texts = begin, tokens, times, state, texts
        notice = _notice(rewind, lost)
        return (*([notice] if notice else []), *(event for event in unsent if event.text))

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
        n_drop = 0 if order.drop is None else breaks.n_unfinished(text_of(self._thought, self._piece), order.drop)
        return self._respelled(Rewrite(n_drop, (f"\n\n{order.hint}",), "it was given a hint"))

    @property
    def _has_thought(self) -> bool:
        return self._begin.phase == "thinking" or self._texts.n_thinking > 0

    def flush(self) -> tuple[Event, ...]:
        """What is left to show of a reply that ends where no policy ended it."""
        return self._kept(generation.close(self._state))

    def _kept(self, events: tuple[Event, ...]) -> tuple[Event, ...]:
        self._texts.add(events)
        return events

    @property
    def _thought(self) -> list[int]:
        """Its tokens, without a tag that opened it."""
        return self.tokens[self._state.turned_at :]

    def _respelled(self, rewrite: Rewrite) -> Rewind:
        n_kept, forced = respelled(self._thought, self._piece, rewrite, self._tokenize)
        return Rewind(self._state.turned_at + n_kept, why=rewrite.why, forced=forced, ends=rewrite.ends)


def _notice(rewind: Rewind, n_lost: int) -> Notice | None:
    """What the reader should know of a rewind that took back so many characters of the thought."""
    lost = f"the last {n_lost} characters of the thought no longer count"
    if rewind.ends is not None:
        return Notice(f"{rewind.why}; {lost}" if n_lost > 0 else rewind.why, "closed")
    if n_lost <= 0:
        return None
    return Notice(f"{lost}: {rewind.why}" if rewind.why else lost, "rewound")


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
