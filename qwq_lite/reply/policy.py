"""What policies of a reply are asked and what they answer: the protocol, and the actions. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from qwq_lite.events import FinishReason, ThoughtEnd
from qwq_lite.sampling import Sampling
from qwq_lite.text.lines import Line, Row

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Mask = npt.NDArray[np.float32]

Phase = Literal["thinking", "answer"]


@dataclass(frozen=True)
class Rewind:
    """Only the reply's first `n_tokens` stand; what comes next is `forced`, then sampled with another seed, without `banned`.

    why: a few words for the notice. ends: what ends the thought, where the forced tokens do. loop: it leaves a loop.
    """

    n_tokens: int
    banned: frozenset[int] = frozenset()
    why: str = ""
    forced: tuple[int, ...] = ()
    ends: ThoughtEnd | None = None
    loop: bool = False


@dataclass(frozen=True)
class Rewrite:
    """The reply's text loses its last `n_drop` characters and the white space before them, and goes on with `words`.

    In the tokens that tokenizing its last line together with the words gives: a Rewind, once the tokens are known.
    n_drop: None for what follows the last place where a text may end. words: texts, and control tokens between them.
    outside_code: the words mean nothing within a block of code, so that is closed first. why, ends: as in Rewind. n_back: so
    many of the last tokens go before that.
    """

    n_drop: int | None
    words: tuple[str | int, ...]
    why: str = ""
    ends: ThoughtEnd | None = None
    outside_code: bool = False
    n_back: int = 0


@dataclass(frozen=True)
class Stop:
    """The reply ends. mute: the token is no text; drop: so many trailing characters of what is held do not belong to it."""

    reason: FinishReason
    drop: int = 0
    mute: bool = False


Action = Rewind | Rewrite | Stop | None  # None: go on


@dataclass(frozen=True)
class Turn:
    """A phase begins. n_chars: so many trailing characters belong to it already; mute: the token is a tag, not text.

    n_tag: so many characters before those are a tag that was written as text; they are shown nowhere. The answer may begin
    anew: what it held so far stops counting.
    """

    phase: Phase
    n_chars: int = 0
    mute: bool = False
    n_tag: int = 0


@dataclass(frozen=True)
class Begin:
    """What a fold starts from: the phase in which the prompt leaves the model, and what was done to this reply from outside.

    undivided: the model marks no thought, so its end is found in the text. asked_at: from the token after so many on, the
    reader waits for the answer.
    """

    phase: Phase = "answer"
    rewinds: tuple[Rewind, ...] = ()
    undivided: bool = False
    asked_at: int | None = None


class Taken(NamedTuple):
    """One token, as a policy sees it.

    text: the characters that it completed, of the phase that it leaves the reply in; n_tokens: the reply's length with it;
    time_s: seconds from the request to the token; forced: nobody drew it; turned: the phase begins with this token.
    end: the thought is to end for this reason, within so many tokens more; less than none: so many of the last tokens ago.
    added: the characters that it completed, of whichever phase. line: the line that is being written, after it; rows: the lines
    that its text is of, the unfinished one last, none where they mean nothing.
    """

    token: int
    text: str
    phase: Phase
    n_tokens: int
    time_s: float = 0.0
    forced: bool = False
    turned: bool = False
    end: tuple[ThoughtEnd, int] | None = None
    added: str = ""
    line: Line = Line()
    rows: tuple[Row, ...] = ()


class Draw(NamedTuple):
    """What the next token may be. Each policy in turn may change it.

    masks: rows that are added to the logits, shape (n_vocab,), 0 or minus infinity; banned: tokens that are masked;
    forced: the token itself, and nothing is sampled; eager: when the logit of this token is at most so far below the highest
    one, nothing is sampled either and the text is rewritten. pending: bytes of an unfinished character that the token follows.
    allowed: a row as those of masks, which is added only once a token that it masks was drawn: then another one is.
    """

    sampling: Sampling
    masks: tuple[Mask, ...] = ()
    banned: frozenset[int] = frozenset()
    forced: int | None = None
    eager: tuple[int, float, Rewrite] | None = None
    pending: bytes = b""
    allowed: Mask | None = None


class Verdict(NamedTuple):
    """A policy's word on a token: its next state, and what follows.

    hold: so many trailing characters of the phase's text are not to be shown yet. end: as in Taken, for the policies after.
    """

    state: Any
    action: Action = None
    hold: int = 0
    turn: Turn | None = None
    end: tuple[ThoughtEnd, int] | None = None


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
