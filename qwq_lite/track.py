"""One reply in the making: its tokens that stand, its text, what was shown. Rewinding folds again. Knows no engine.

The stream is append-only. A rewind takes back tokens, never text that was shown: it happens while thinking, and a notice says
how many characters of the thought no longer count; the reply that ends the stream has the text that does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from qwq_lite import generation
from qwq_lite.events import Answer, Event, Notice, Thinking
from qwq_lite.generation import Begin, Draw, Policy, Rewind, State, Step, Stop
from qwq_lite.sampling import Sampling


class Track:
    """policies: in their order. piece: a token's bytes."""

    def __init__(self, policies: tuple[Policy, ...], begin: Begin, piece: Callable[[int], bytes]) -> None:
        self._policies, self._begin, self._piece = policies, begin, piece
        self._state = generation.start(policies, begin)
        self._sent_thinking = self._sent_answer = 0
        self._texts: dict[type[Event], list[str]] = {Thinking: [], Answer: []}
        self.tokens: list[int] = []
        self.n_taken = 0  # tokens that were decoded, those that a rewind took back too

    @property
    def state(self) -> State:
        return self._state

    @property
    def attempt(self) -> int:
        """How many rewinds there were: part of each draw's seed."""
        return len(self._begin.rewinds)

    @property
    def thinking(self) -> str:
        return "".join(self._texts[Thinking]).strip()

    @property
    def answer(self) -> str:
        return "".join(self._texts[Answer]).rstrip()

    def constrain(self, sampling: Sampling) -> Draw:
        return generation.constrain(self._policies, self._state, sampling)

    def take(self, token: int) -> tuple[tuple[Event, ...], Rewind | Stop | None]:
        """Take a token in. A Rewind that comes back has been carried out here, and is left to do in the cache."""
        step: Step = generation.advance(self._policies, self._state, token, self._piece(token))
        self.tokens.append(token)
        self.n_taken += 1
        if isinstance(step.action, Rewind):  # its own text is not shown first: nothing that can still go is
            return self.rewind(step.action), step.action
        self._state = step.state
        return self._kept(step.events), step.action

    def rewind(self, rewind: Rewind) -> tuple[Event, ...]:
        """Let only the first tokens stand, and fold them again.

        Raises: ValueError when text of the answer that was shown would be taken back.
        """
        begin = dataclasses.replace(self._begin, rewinds=(*self._begin.rewinds, rewind))
        tokens = self.tokens[: rewind.n_tokens]
        state, events = generation.fold(self._policies, begin, ((token, self._piece(token)) for token in tokens))
        texts: dict[type[Event], list[str]] = {Thinking: [], Answer: []}
        for event in events:
            if isinstance(event, Thinking | Answer):
                texts[type(event)].append(event.text)
        answer, thinking = ("".join(texts[kind]) for kind in (Answer, Thinking))
        if len(answer) < self._sent_answer or not 0 <= rewind.n_tokens <= len(self.tokens):
            raise ValueError(
                f"a rewind to token {rewind.n_tokens} of {len(self.tokens)} would take back text that was shown"
            )
        lost = self._sent_thinking - len(thinking)
        unsent = (Thinking(thinking[self._sent_thinking :]), Answer(answer[self._sent_answer :]))
        self._begin, self.tokens, self._state, self._texts = begin, tokens, state, texts
        self._sent_thinking, self._sent_answer = len(thinking), len(answer)
        why = f": {rewind.why}" if rewind.why else ""
        notice = (
            (Notice(f"the last {lost} characters of the thought no longer count{why}", "rewound"),) if lost > 0 else ()
        )
        return (*notice, *(event for event in unsent if event.text))

    def flush(self) -> tuple[Event, ...]:
        """What is left to show of a reply that ends where no policy ended it."""
        return self._kept(generation.close(self._state))

    def _kept(self, events: tuple[Event, ...]) -> tuple[Event, ...]:
        for event in events:
            if isinstance(event, Answer):
                self._sent_answer += len(event.text)
                self._texts[Answer].append(event.text)
            elif isinstance(event, Thinking):
                self._sent_thinking += len(event.text)
                self._texts[Thinking].append(event.text)
        return events
