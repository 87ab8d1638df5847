"""What policies of a reply are asked and what they answer: the protocol, and the actions. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from qwq_lite.events import FinishReason, ThoughtEnd
from qwq_lite.sampling import Sampling
from qwq_lite.text.lines import Line, LinePiece

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Mask = npt.NDArray[np.float32]

Phase = Literal["thinking", "answer"]


@dataclass(frozen=True)
class Rewind:
    """Keep the first `n_tokens` of the reply, force some tokens, then sample with another seed."""

    n_tokens: int
    banned: frozenset[int] = frozenset()  # not allowed as the next token
    why: str = ""  # a few words for the notice
    forced: tuple[int, ...] = ()  # the next tokens
    ends: ThoughtEnd | None = None  # what ends the thought, where the forced tokens end it
    loop: bool = False  # it leaves a loop


@dataclass(frozen=True)
class Rewrite:
    """Drop the end of the reply's text, and the white space before it, and go on with given words.

    It becomes a Rewind, in the tokens that tokenizing the last line together with the words gives.
    """

    n_drop: int | None  # characters; None for what follows the last place where a text may end
    words: tuple[str | int, ...]  # texts, and control tokens between them
    why: str = ""  # as in Rewind
    ends: ThoughtEnd | None = None  # as in Rewind
    outside_code: bool = False  # a block of code that is open is closed first
    n_back: int = 0  # tokens that go before n_drop is counted


@dataclass(frozen=True)
class Stop:
    """End the reply."""

    reason: FinishReason
    drop: int = 0  # trailing characters of the held text that do not belong to it
    mute: bool = False  # the token is no text


Action = Rewind | Rewrite | Stop | None  # None: go on


@dataclass(frozen=True)
class Turn:
    """A phase begins. Where an answer begins anew, what it held so far no longer counts."""

    phase: Phase
    n_chars: int = 0  # trailing characters that belong to it already
    mute: bool = False  # the token is a tag, not text
    n_tag: int = 0  # characters before those that are a tag written as text; they are shown nowhere


@dataclass(frozen=True)
class Begin:
    """What a fold starts from."""

    phase: Phase = "answer"  # in which the prompt leaves the model
    rewinds: tuple[Rewind, ...] = ()  # of this reply, in their order
    undivided: bool = False  # the model marks no thought, so its end is found in the text
    asked_at: int | None = None  # the reader waits for the answer from the token after this many on


# What is made for each token is a NamedTuple: a frozen dataclass takes four times as long to make.


class Taken(NamedTuple):
    """One token, as a policy sees it."""

    token: int
    text: str  # characters that it completed, of the phase that it leaves the reply in
    phase: Phase
    n_tokens: int  # the reply's length with it
    time_s: float = 0.0  # seconds from the request to the token
    forced: bool = False  # it was not sampled
    turned: bool = False  # the phase begins with it
    # Why the thought is to end, and within how many tokens more; less than none: that many of the last tokens ago.
    end: tuple[ThoughtEnd, int] | None = None
    added: str = ""  # characters that it completed, of whichever phase
    line: Line = Line()  # the line that is being written, after it
    rows: tuple[
        LinePiece, ...
    ] = ()  # the lines that its text is of, the unfinished one last; none where they mean nothing


class Draw(NamedTuple):
    """What the next token may be. Each policy in turn may change it."""

    sampling: Sampling
    masks: tuple[Mask, ...] = ()  # rows added to the logits, shape (n_vocab,), 0 or minus infinity
    banned: frozenset[int] = frozenset()  # tokens that are masked
    forced: int | None = None  # the token itself; nothing is sampled
    # A token, and how far below the highest logit its own may be for the text to be rewritten in place of a draw.
    eager: tuple[int, float, Rewrite] | None = None
    pending: bytes = b""  # bytes of an unfinished character that the token follows
    allowed: Mask | None = None  # a row as in masks, added once a token that it masks was drawn: then another is drawn


class Verdict(NamedTuple):
    """What follows from a token for one policy."""

    state: Any  # its next state
    action: Action = None
    hold: int = 0  # trailing characters of the phase's text that are not to be shown yet
    turn: Turn | None = None
    end: tuple[ThoughtEnd, int] | None = None  # as in Taken, for the policies after this one


class Policy(Protocol):
    """One rule of a reply. Its state is its own, immutable, and a function of `begin` and the tokens alone."""

    @property
    def name(self) -> str: ...

    @property
    def constrains(self) -> bool:
        """Whether `constrain` may change anything; it is not called otherwise."""
        return False

    def start(self, begin: Begin) -> Any:
        """The state before the first token."""

    def constrain(self, state: Any, draw: Draw) -> Draw:
        """What the next token may be."""
        return draw

    def observe(self, state: Any, taken: Taken) -> Verdict:
        """The state after a token, and what follows from it."""
        ...


WINDOW = 96  # tokens in which a thought finds its end; nine of ten paragraphs of real thoughts have fewer than 64
