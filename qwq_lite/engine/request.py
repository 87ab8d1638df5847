"""A request, and the reply to it while it is being made. Engine thread only. Knows no engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from qwq_lite.engine.sequences import Sequence
from qwq_lite.errors import EngineError
from qwq_lite.events import Event, FinishReason, Notice, Progress, Stats
from qwq_lite.reply.builder import FinishedReply, ReplyBuilder
from qwq_lite.reply.commands import Command, Conclude, LogEntry, ReplyLog
from qwq_lite.reply.policy import Begin, Policy, Rewind, Rewrite, Stop
from qwq_lite.reply.retokenize import Tokenize
from qwq_lite.reply.stream import Feed
from qwq_lite.sampling import Sampling

_METER_EVERY = 16  # tokens of a thought


@dataclass(frozen=True)
class Request:
    """One reply to make: the prompt's tokens and what holds for the reply.

    answer_sampling: of the answer, None for the same as of the thought. session: whose sequence it goes on; None is the one
    that all requests without a session share. n_dropped: messages that were left out of the prompt, for Stats. alone: as in
    `Sequences.place`. thinking_budget: as asked for, thinking_limit: most tokens of the thought, n_words: those of them that are
    kept for what ends it. within_s: seconds from `asked`, a time of time.monotonic(), to the deadline.
    notices: what the reader should know before it begins. course: of a reply whose host keeps what was done to it.
    """

    prompt: list[int]
    policies: tuple[Policy, ...]
    sampling: Sampling
    seed: int
    begin: Begin = field(default_factory=Begin)
    session: Hashable = None
    n_dropped: int = 0
    alone: bool = False
    answer_sampling: Sampling | None = None
    thinking_budget: int | None = None
    thinking_limit: int | None = None
    n_words: int = 0
    within_s: float | None = None
    asked: float = field(default_factory=time.monotonic)
    notices: tuple[Notice, ...] = ()
    course: ReplyLog | None = None


class ActiveReply:
    """A request under way. left: tokens to decode before the next draw; pending: the token drawn and not yet decoded."""

    def __init__(
        self, feed: Feed, request: Request, sequence: Sequence, piece: Callable[[int], bytes], tokenize: Tokenize
    ) -> None:
        self.feed, self.request, self.sequence = feed, request, sequence
        self.track = ReplyBuilder(request.policies, request.begin, piece, tokenize)
        self.n_reused, self.n_prefilled = len(sequence.tokens), 0
        self.n_refused = 0  # tokens that were drawn, and another one in their place
        self.left = request.prompt[self.n_reused :]
        self.pending: int | None = None
        self.begins_anew = False  # the cache was emptied, for it cannot be cut
        self.started = time.monotonic()
        self.prefilled: float | None = None
        times = [entry[1] for entry in self._entries if isinstance(entry, tuple)]
        self._before_s = times[-1] - times[0] if times else 0.0  # of decoding, in other engines

    @property
    def _entries(self) -> tuple[LogEntry, ...]:
        return self.request.course.entries if self.request.course else ()

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompt, and of the reply that stand."""
        return len(self.request.prompt) + len(self.track.tokens)

    @property
    def elapsed_s(self) -> float:
        """Since it was asked for."""
        return time.monotonic() - self.request.asked

    @property
    def sampling(self) -> Sampling:
        """What holds in this phase."""
        own = self.request.answer_sampling
        return self.request.sampling if own is None or self.track.state.phase == "thinking" else own

    @property
    def must_pause(self) -> bool:
        """Whether something else is to be done than to decode its next token."""
        return self.feed.cancelled or self.feed.full or bool(self.feed.orders)

    @property
    def can_obey(self) -> bool:
        """Whether it is known if there is a thought for an order to be about."""
        return self.prefilled is not None and not self.track.may_think_yet

    def meter(self) -> None:
        """Say now and then how far the thought has come."""
        state, most = self.track.state, self.request.thinking_limit
        if most is not None and state.phase == "thinking" and state.n_tokens % _METER_EVERY == 0:
            self.feed.put(Progress("thinking", state.n_tokens, most))

    def take(self, token: int, time_s: float | None = None) -> Rewind | Stop | None:
        """Take in a token, drawn or forced, and show what follows. A Rewind is left to do in the cache. time_s: None for now."""
        at = round(self.elapsed_s, 4) if time_s is None else time_s
        self._note((token, at))
        events, action = self.track.take(token, at)
        self._show(events)
        if isinstance(action, Rewind) and action.loop:
            notice = self.track.resampled(self.sampling)
            self._show([notice] if notice else [])
        return action

    def rewrite(self, rewrite: Rewrite) -> Rewind:
        """Rewrite the text between two tokens, and show what follows; the Rewind is left to do in the cache."""
        self._note(None)
        events, rewind = self.track.rewrite(rewrite)
        self._show(events)
        return rewind

    def obey(self, order: Command) -> Rewind | None:
        """Carry out what the reader asked for; a Notice tells where that came too late. A Rewind is left to do in the cache."""
        self._note(order)
        if isinstance(order, Conclude):
            if not self.track.conclude():
                self._show([Notice("the answer has begun already, there is no thought to end", "late")])
            return None
        rewind = self.track.steer(order)
        if rewind is None:
            self._show([Notice("the thought has ended already, the hint was not used", "late")])
            return None
        if not self.hint_fits(rewind.n_tokens + len(rewind.forced)):
            limit = self.request.thinking_limit
            words = f"the hint does not fit the {limit} tokens that the thought may have and was not used"
            self._show([Notice(words, "full")])
            return None
        self._show(self.track.rewind(rewind))
        return rewind

    def catch_up(self) -> FinishReason | None:
        """Do again what another engine did to this reply; nothing is decoded. Why it ended, where it did.

        Raises: EngineError where the policies would now do something else.
        """
        done, self.feed.done = self.feed.done, None  # its host has these
        try:
            for entry in self._entries:
                action = self._again(entry)
                if isinstance(action, Stop):
                    return action.reason
        finally:
            self.feed.done = done
        return None

    def _again(self, entry: LogEntry) -> Rewind | Stop | None:
        if isinstance(entry, tuple):
            token, time_s = entry
            forced = self.track.state.forced
            if forced and forced[0] != token:
                raise _unlike()
            return self.take(token, time_s)
        if entry is not None:
            return self.obey(entry)
        eager = self.track.constrain(self.sampling).eager
        if eager is None:
            raise _unlike()
        return self.rewrite(eager[2])

    def _note(self, entry: LogEntry) -> None:
        """Before its events: who has one of those has the entry."""
        if self.feed.done is not None:
            self.feed.done.append(entry)

    def _show(self, events: Iterable[Event]) -> None:
        for event in events:
            self.feed.put(event)

    def tell_progress(self, n_tokens: int) -> None:
        """Tells that n_tokens more were decoded: of the prompt, or of all tokens where the cache was emptied."""
        if self.prefilled is None:
            self.n_prefilled += n_tokens
            self.feed.put(Progress("prefill", self.n_reused + self.n_prefilled, len(self.request.prompt)))
        elif self.begins_anew:
            self.feed.put(Progress("prefill", self.n_tokens - len(self.left), self.n_tokens))

    def begin_anew(self) -> None:
        """The cache was emptied, for it cannot be cut: all that stands is to be decoded. The reader is told once."""
        if not self.begins_anew:
            self.begins_anew = True
            words = "this model's cache cannot be cut, so the prompt and what stands of the thought are computed again"
            self.feed.put(Notice(f"{words}; each change of a thought takes that long here", "recomputed"))

    def go_back(self) -> None:
        """What is to be decoded follows from what the cache holds: a batch came to nothing, or several tokens are to come."""
        whole = self.request.prompt + (self.track.tokens if self.prefilled is not None else [])
        self.left = whole[len(self.sequence.tokens) :]
        if self.pending is not None and len(self.left) == 1:
            self.left = []
        else:
            self.pending = None

    def token(self) -> int:
        assert self.pending is not None
        return self.pending

    def hint_fits(self, n_tokens: int) -> bool:
        """Whether a thought of so many tokens has room left to go on in, before it is ended."""
        limit = self.request.thinking_limit
        return limit is None or n_tokens + self.request.n_words < limit

    def stats(self, n_ctx: int, ended: FinishedReply, reason: FinishReason) -> Stats:
        now = time.monotonic()
        request, track = self.request, self.track
        prefilled = now if self.prefilled is None else self.prefilled
        return Stats(
            n_prompt=len(request.prompt),
            n_reused=self.n_reused,
            n_prefilled=self.n_prefilled,
            n_generated=track.n_taken,
            n_dropped=request.n_dropped,
            prefill_s=prefilled - self.started,
            decode_s=now - prefilled + self._before_s,
            n_thinking=ended.n_thinking,
            n_answer=ended.n_answer,
            n_forced=track.n_forced,
            n_refused=self.n_refused,
            thinking_budget=request.thinking_budget,
            thinking_limit=request.thinking_limit,
            thought_end=ended.end,
            time_left_s=None if request.within_s is None else request.within_s - (now - request.asked),
            n_ctx=n_ctx,
            n_kv=len(self.sequence.tokens),
            loops=track.loops(reason),
        )


def _unlike() -> EngineError:
    return EngineError("the reply cannot go on in another engine: its prompt or its options mean something else there")
