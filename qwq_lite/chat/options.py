"""The options of one reply, each value checked; None leaves it to the file, then to the catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from qwq_lite import arguments
from qwq_lite.errors import UsageError
from qwq_lite.prompt.history import History, WhenFull
from qwq_lite.prompt.script_intent import AnswerScript
from qwq_lite.sampling import Sampling

ThoughtStyle = Literal["tags", "undivided", "none"]
Effort = Literal["low", "medium", "high"]
# Tokens of a thought: of 27 real ones that ended by themselves 10, 23 and 27 were no longer.
EFFORTS: Mapping[str, int] = {"low": 1024, "medium": 4096, "high": 16384}
_MOST = (1 << 31) - 1
MOST_STOP_CHARS = 1_000  # every beginning of a stop text is kept, to know what must be held back


@dataclass(frozen=True)
class Options:
    """What the user asks for in one reply; None leaves it to the file, then to the catalogue."""

    # None draws one at random. A first question with a seed begins in an empty cache: its reply then does not depend on what
    # was computed before, and other conversations' prompts will be computed again.
    seed: int | None = None
    max_tokens: int | None = None  # of thought and answer together; None ends at the context's end
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop: Sequence[str] | None = None  # texts that end the answer where one begins, or an undivided reply
    tools: Sequence[Mapping[str, Any]] | None = None  # JSON schemas for the model's template
    # What happens to messages that no longer fit: "drop" leaves out the oldest turns, with a Notice; "error" raises ContextFull.
    when_full: WhenFull | None = None
    # Tokens after which the thought ends at a good place, in a tenth more or 96 tokens; 0 for no thought. max_tokens cuts a
    # thought as it cuts an answer: give it the budget, 96 tokens and the answer at least.
    thinking_budget: int | None = None
    effort: Effort | None = None  # a budget by name
    within: float | None = None  # seconds from the call to the end of the answer
    # Tokens of the context that are kept for the answer, half of what the prompt leaves at most, and the most that it has after
    # a forced end of thinking; None for 1,024.
    answer_reserve: int | None = None
    answer_temperature: float | None = None  # in place of temperature once the thought has ended
    answer_top_p: float | None = None  # in place of top_p once the thought has ended
    # How the model marks its thought: "tags"; "undivided", not at all, as QwQ-32B-Preview; "none", it does not think.
    thought_style: ThoughtStyle | None = None
    # What a Chat sends back of an undivided reply, "all" or "answer"; of one with tags it is the answer always.
    history: History | None = None
    # "auto"; or which one of these scripts the answer may have letters of, fenced code aside: "han" (with bopomofo), "kana" (with
    # Han), "hangul", "cyrillic", "arabic", "hebrew", "thai"; "latin" for none of them, "any" for all. Letters of every other
    # script are never masked. "auto" is "latin" where all letters of prompt and messages are Latin or Greek and no word calls for
    # others, else "any". An undivided reply that does not announce its answer before it comes is not masked.
    answer_script: AnswerScript | None = None
    # The same of the thought, which mixes languages unless this is given: one forced language made the reasoning of other models
    # worse.
    think_script: AnswerScript | None = None

    @property
    def budget(self) -> int | None:
        """Tokens of the thought, however they were asked for."""
        return self.thinking_budget if self.effort is None else EFFORTS[self.effort]

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.stop is not None and not _all(self.stop, str):
            raise UsageError(f"stop is {self.stop!r}; a list of texts is allowed, none of them empty")
        if self.stop is not None and any(len(text) > MOST_STOP_CHARS for text in self.stop):
            raise UsageError(f"a text of stop has more than {MOST_STOP_CHARS:,} characters; give its beginning")
        if self.tools is not None and not _all(self.tools, Mapping):
            raise UsageError(
                f"tools is {self.tools!r}; a list of JSON schemas is allowed, each a dict that is not empty"
            )
        if self.thinking_budget is not None and self.effort is not None:
            raise UsageError(
                "thinking_budget and effort are both given; an effort is a budget by name, give one of the two"
            )
        words = {
            "when_full": WhenFull,
            "effort": Effort,
            "thought_style": ThoughtStyle,
            "history": History,
            "answer_script": AnswerScript,
            "think_script": AnswerScript,
        }
        for name, allowed in words.items():
            if getattr(self, name) not in (None, *get_args(allowed)):
                raise UsageError(f"{name} is {getattr(self, name)!r}; {', '.join(get_args(allowed))} are allowed")


def _check_numbers(options: Options) -> None:
    """Check them, and keep them as Python's own."""
    whole = {
        "seed": (0, (1 << 64) - 1),
        "max_tokens": (1, _MOST),
        "top_k": (0, 1 << 20),
        "thinking_budget": (0, _MOST),
        "answer_reserve": (1, _MOST),
    }
    plain: dict[str, float] = {}
    for name, (low, high) in whole.items():
        if (value := getattr(options, name)) is not None:
            plain[name] = arguments.check_whole(name, value, low, high)
    for name in ("temperature", "top_p", "min_p", "answer_temperature", "answer_top_p", "within"):
        if (value := getattr(options, name)) is not None:
            plain[name] = arguments.check_real(name, value)
    for name, number in plain.items():
        object.__setattr__(options, name, number)  # of a frozen class, while it is made
    if options.within is not None and not 0 < options.within < _MOST:
        raise UsageError(f"within is {options.within!r}, a number of seconds above 0 and below {_MOST} is allowed")
    for phase in ("", "answer_"):
        given = {name: getattr(options, phase + name) for name in ("temperature", "top_p")}
        try:
            Sampling(**{name: value for name, value in given.items() if value is not None})
        except UsageError as error:  # it begins with the setting's name
            raise UsageError(f"{phase}{error}") from error


def parse_options(given: Mapping[str, Any]) -> Options:
    """Options by name. Raises: UsageError for one that there is not, or a value that cannot be meant."""
    known = [field.name for field in fields(Options)]
    for name in given:
        if name not in known:
            raise UsageError(f"there is no option {name!r}; known are {', '.join(known)}")
    return Options(**given)


def _all(values: object, kind: type) -> bool:
    return (
        isinstance(values, Sequence) and not isinstance(values, str) and all(isinstance(v, kind) and v for v in values)
    )
