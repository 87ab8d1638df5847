"""A question's tokens, by the model's chat template and vocabulary, cut to the context. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qwq_lite import arguments
from qwq_lite.errors import TemplateError
from qwq_lite.formats.gguf_header import Header
from qwq_lite.prompt import chat_template, history
from qwq_lite.prompt.chat_template import ChatTemplate, Message
from qwq_lite.prompt.history import WhenFull
from qwq_lite.prompt.question import Question
from qwq_lite.text import normalization


class EncoderVocabulary(chat_template.Vocabulary, Protocol):
    """What this module needs of a vocabulary; backend.vocab.Vocab is one."""

    n_tokens: int


class PromptEncoder:
    """Makes the tokens of texts and questions for one model.

    template: None where the model has none. notices: what the user should know of it, one line each.
    """

    def __init__(
        self, header: Header, vocab: EncoderVocabulary, n_ctx: int, given: Sequence[str] | None = None
    ) -> None:
        """given: the text of a template in place of the file's own, and what its errors begin with."""
        self._path, self._vocab, self._n_ctx = header.path, vocab, n_ctx
        self._form = normalization.normal_form(header.keys)
        self.template, self.notices = _choose_template(header, vocab, given)

    def tokenize(self, text: str, *, follows: bool = False) -> list[int]:
        """Ids of a text as plain text, normalised as the model's tokenizer does it. follows: other tokens precede it."""
        return chat_template.tokenize(self._vocab, text, self._form, follows=follows)

    def continue_text(self, text: str) -> list[int]:
        """Ids of a text that other tokens precede."""
        return self.tokenize(text, follows=True)

    def encode(
        self,
        question: Question,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int | None = None,
        when_full: WhenFull | None = None,
    ) -> tuple[list[int], int]:
        """A question's tokens, and how many messages they go without. Options as in `chat.options.Options`.

        Raises: UsageError for a token that the vocabulary does not have; TemplateError; ContextFull.
        """
        if isinstance(question.prompt, str):
            return self.tokenize(question.prompt), 0
        if not question.is_templated:
            most = self._vocab.n_tokens - 1
            return [arguments.check_whole("token", token, 0, most) for token in question.prompt], 0
        if self.template is None:
            raise TemplateError(
                f"{self._path}: has no chat template (tokenizer.chat_template); give one with --chat-template"
                " (chat_template in Python): a file, or chatml"
            )
        template, extra = self.template, {"tools": list(tools)} if tools else {}

        def encode(messages: Sequence[Message]) -> list[int]:
            messages = template.without_empty_system(self._vocab, messages, **extra)
            return template.encode(self._vocab, messages, self._form, **extra)

        return history.fit_messages(question.messages, encode, self._n_ctx, max_tokens, when_full or "drop")

    def shows_system(self, question: Question) -> bool:
        """Whether the template writes the system prompt; True where there is none, or it cannot be told."""
        return self.template is None or not question.system or self.template.shows_system(self._vocab, question.system)

    def shows_tools(self, question: Question, tools: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the template writes the tools; True where that cannot be told."""
        return self.template is None or self.template.shows(self._vocab, question.messages, tools=list(tools))


def _choose_template(
    header: Header, vocab: EncoderVocabulary, given: Sequence[str] | None
) -> tuple[ChatTemplate | None, tuple[str, ...]]:
    """The one that was given, else the file's own, else ChatML where the vocabulary has its tokens; and notices."""
    has_chatml = "<|im_start|>" in vocab.special
    if given is None:
        own = header.text("tokenizer.chat_template") or (chat_template.CHATML if has_chatml else None)
        return None if own is None else ChatTemplate(own, str(header.path)), ()
    source, origin = given
    notices: tuple[str, ...] = ()
    if source == chat_template.CHATML and not has_chatml:
        words = "has no <|im_start|> in its vocabulary, so ChatML's marks are plain text to it"
        notices = (f"{header.path}: {words}; a reply may not end by itself",)
    return ChatTemplate(source, origin, given=True), notices
