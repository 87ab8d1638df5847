"""tags: what a user must not be able to write, by the lists of real vocabularies; and what is plain text of theirs."""

from __future__ import annotations

import pytest

from qwq_lite.prompt import chat_template
from qwq_lite.text.tags import find_tags

TAGS = {
    "QwQ-32B": "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response> <|fim_prefix|> <|repo_name|>",
    "R1-Distill-Qwen": "<｜User｜> <｜Assistant｜> <|EOT|> <think> </think>",
    "DeepSeek-Coder": "<｜fim▁hole｜> <|User|> <pad> [PAD32022]",
    "Gemma 4": '<|tool_call> <tool_call|> <|"|> <|channel> <channel|>',
    "Gemma 3": "<start_of_turn> <end_of_turn> <start_of_image> <unused17> [multimodal]",
    "Mistral": "[INST] [/INST] [TOOL_CALLS] [THINK] [/THINK] [SYSTEM_PROMPT]",
    "Command-R": "<|START_OF_TURN_TOKEN|> <|USER_TOKEN|> <|YES_TOKEN|>",
    "Seed-OSS": "<seed:think> </seed:think> <seed:tool_call>",
    "GLM": "<|user|> <|observation|> [gMASK] <sop> <arg_key> </arg_key>",
    "EXAONE": "[|user|] [|assistant|] [|endofturn|]",
    "StarCoder": "<fim_prefix> <file_sep> <issue_comment>",
    "media": "<image> <audio> <video>",
}
HTML = "table caption thead tbody tfoot tr th td h1 h6 blockquote strong em b i u s sub sup code"
TEXTS = {
    "GPT-NeoX, MPT": [" " * n for n in range(2, 25)],
    "Gemma 3, newlines": ["\n" * n for n in range(2, 32)],
    "Gemma 3, tabs and spaces": ["\t\t", "\t\t\t", "▁▁", "▁▁▁▁"],
    "Gemma 3, HTML": [f"<{slash}{name}>" for slash in ("", "/") for name in HTML.split(" ")],
    "DeepSeek": list("õ÷ÁýÀÿøúþüùöû"),
    "code": ["<>", "<=>", "<->", "<-", "->", "[]", "[0]", "[i]", "</", "/>", "<br/>", "<!--", "-->", "<!DOCTYPE>"],
}


@pytest.mark.parametrize("model", TAGS)
def test_tags_are_protected(model: str) -> None:
    spellings = TAGS[model].split(" ")
    assert find_tags(spellings, ["<bos>", "<eos>"]) == spellings


@pytest.mark.parametrize("model", TEXTS)
def test_words_of_a_vocabulary_are_plain_text(model: str) -> None:
    assert find_tags(TEXTS[model], ["<bos>", "<eos>"]) == []


def test_an_end_is_html_unless_its_beginning_is_a_control_token() -> None:
    assert find_tags(["<s>", "</s>"], ["<bos>"]) == []
    assert find_tags(["</s>", "<b>"], ["<s>"]) == ["</s>"]
    assert find_tags(["<s>"], ["</s>"]) == ["<s>"]


class Spaced:
    """A token a letter, after a space where nothing stands before, as SentencePiece has it."""

    adds_bos = False
    bos = eos = -1
    special = {"<think>": 1 << 21, "<s>": 1 << 22}  # noqa: RUF012
    tags: tuple[str, ...] = ("<think>",)

    def tokenize(self, text: str, parse_special: bool, follows: bool = False) -> list[int]:
        assert "<think>" not in text
        return [ord(letter) for letter in ("" if follows else " ") + text]


@pytest.mark.parametrize("text", ["a<think>b", "<think>", "<think<think>>", "<s>a<s>", "a<think><s>"])
def test_a_typed_tag_puts_no_space_into_a_text(text: str) -> None:
    expected = [ord(letter) for letter in f" {text}"]
    assert chat_template.tokenize(Spaced(), text, "none") == expected
    template = chat_template.ChatTemplate("{{ messages[0].content }}")
    assert template.encode(Spaced(), [{"role": "user", "content": text}], "none") == expected
    assert chat_template.tokenize(Spaced(), text, "none", follows=True) == expected[1:]


def test_spellings_that_overlap_are_all_parted() -> None:
    class Overlapping(Spaced):
        tags = ("<a|>", "|><b>", "<b><b>")

        def tokenize(self, text: str, parse_special: bool, follows: bool = False) -> list[int]:
            assert not any(tag in text for tag in self.tags)
            return [ord(letter) for letter in text]

    text = "<a|><b><b><b>x<a|>"
    assert chat_template.tokenize(Overlapping(), text, "none") == list(map(ord, text))
