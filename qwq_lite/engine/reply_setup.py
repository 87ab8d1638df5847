"""From a question and its options to the `Request` that the scheduler takes. Knows no threads and no context of llama.cpp."""

from __future__ import annotations

import secrets
import time
from collections.abc import Hashable

from qwq_lite import sampling
from qwq_lite.backend.vocab import Vocab
from qwq_lite.chat.options import Options, ThoughtStyle
from qwq_lite.engine import ignored_options, reply_rules
from qwq_lite.engine.reply_rules import PieceTokenizer, Thoughts
from qwq_lite.engine.request import Request
from qwq_lite.events import Notice
from qwq_lite.formats.gguf_header import Header
from qwq_lite.prompt import script_intent
from qwq_lite.prompt.prompt_encoder import PromptEncoder
from qwq_lite.prompt.question import Question, flatten_texts
from qwq_lite.reply.commands import ReplyLog
from qwq_lite.reply.script_masks import MaskSets, ScriptMasks
from qwq_lite.sampling import Sampling
from qwq_lite.store import catalog
from qwq_lite.text.tags import THINK_TAGS


class ReplySetup:
    """Makes the requests of one model: all that holds for its replies, whatever is asked."""

    def __init__(self, header: Header, vocab: Vocab, encoder: PromptEncoder, n_ctx: int) -> None:
        self._keys, self._vocab, self._encoder, self._n_ctx = header.keys, vocab, encoder, n_ctx
        self._tokenizer = PieceTokenizer(vocab.end_tokens, vocab.piece, encoder.continue_text)
        self._known = catalog.find(header.text("general.name"), header.text("general.basename"), header.path.name)
        self._masks = MaskSets(vocab.piece, vocab.n_tokens)

    def request(
        self, question: Question, options: Options, session: Hashable = None, course: ReplyLog | None = None
    ) -> Request:
        """The reply to make. course: of one whose host keeps what was done to it.

        Raises: UsageError, TemplateError, ContextFull.
        """
        asked = time.monotonic() - (course.elapsed_s if course else 0.0)
        drawn = secrets.randbits(32) if course is None else course.seed
        tokens, n_dropped = self._encoder.encode(
            question, tools=options.tools, max_tokens=options.max_tokens, when_full=options.when_full
        )
        thoughts = self._thoughts(options)
        scripts = self._scripts(question, options, thoughts)
        rules = reply_rules.make_rules(options, thoughts, question, tokens, self._n_ctx, self._tokenizer, scripts)
        thought_sampling, answer_sampling = self._sampling(options)
        return Request(
            tokens,
            rules.policies,
            thought_sampling,
            drawn if options.seed is None else options.seed,
            rules.begin,
            session,
            n_dropped=n_dropped,
            alone=options.seed is not None and question.is_first,
            answer_sampling=answer_sampling,
            thinking_budget=options.budget,
            thinking_limit=rules.thinking_limit,
            n_words=rules.n_words,
            within_s=options.within,
            asked=asked,
            notices=self._ignored(question, options, thoughts.style),
            course=course,
        )

    def _thoughts(self, options: Options) -> Thoughts:
        undivided = self._known is not None and self._known.undivided
        template = self._encoder.template
        source = template.source if template else None
        known: ThoughtStyle | None = "undivided" if undivided else None
        return reply_rules.find_thoughts(options.thought_style, known, self._vocab.special, source)

    def _scripts(
        self, question: Question, options: Options, thoughts: Thoughts
    ) -> tuple[ScriptMasks | None, ScriptMasks | None]:
        """What is masked in the answer and in the thought."""
        asked = options.answer_script or "auto", options.think_script or "any"
        texts = None
        if "auto" in asked:
            texts = question.list_texts(tag=None if thoughts.style == "undivided" else THINK_TAGS[1])
            texts = None if texts is None else [*texts, *flatten_texts(options.tools or ())]
        answer, thought = (self._masks.of(script_intent.scripts_to_mask(word, texts)) for word in asked)
        return answer, thought

    def _sampling(self, options: Options) -> tuple[Sampling, Sampling]:
        """Of the thought and of the answer. Neither files nor the catalogue know settings of a phase."""
        catalogue = self._known.sampling if self._known else catalog.DEFAULT_SAMPLING
        user = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        answer = {"temperature": options.answer_temperature, "top_p": options.answer_top_p}
        both = user, {**user, **{name: value for name, value in answer.items() if value is not None}}
        thought, answered = (sampling.resolve(settings, self._keys, catalogue) for settings in both)
        return thought, answered

    def _ignored(self, question: Question, options: Options, style: ThoughtStyle) -> tuple[Notice, ...]:
        """What was asked for and has nothing to act on in this reply, with the reason."""
        notices = [*ignored_options.list_ignored(options, style, templated=question.is_templated)]
        if question.is_templated and not self._encoder.shows_system(question):
            notices.append(ignored_options.ignored_system())
        if question.is_templated and options.tools and not self._encoder.shows_tools(question, options.tools):
            notices.append(ignored_options.ignored_tools())
        return tuple(notices)
