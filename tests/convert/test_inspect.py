"""qwq-lite inspect: a file and its checkpoint say the same, every setting has its origin, nothing reaches the terminal raw."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import GGMLQuantizationType, GGUFValueType

from qwq_convert.inspection import Inspection, Setting, inspect
from qwq_convert.pipeline import convert
from qwq_lite.cli import console
from qwq_lite.errors import CheckpointError, FormatError
from qwq_lite.formats import gguf_header, gguf_writer
from qwq_lite.formats.gguf_header import Value
from qwq_lite.formats.tensor_types import file_type
from tests.checkpoints import CONTROL, END_OF_TEXT, END_OF_TURN, MERGES, TEMPLATE, write_random_checkpoint
from tests.convert.broken import BROKEN
from tests.convert.commands import run

V, T = GGUFValueType, GGMLQuantizationType
TOKENS = ["a", "b", "c"]
HOSTILE = "\x1b]0;owned\x07\x1b[31m\r\n\x9b2J\u202eABC"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("inspect") / "Tiny")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    path = folder.parent / "Tiny-Q4_K_M.gguf"
    convert(folder, file_type("Q4_K_M"), path)
    return path


def written(path: Path, **keys: tuple[Value, GGUFValueType]) -> Path:
    """A file of one tensor with these keys; `__` stands for a dot."""
    infos = gguf_writer.layout([("token_embd.weight", (32, 3), T.Q8_0)])
    named = {name.replace("__", "."): value for name, value in keys.items()}
    path.write_bytes(gguf_writer.encode("qwen2", named, infos) + bytes(gguf_header.padded(infos[0].n_bytes)))
    return path


def test_a_file_and_its_checkpoint_say_the_same(folder: Path, file: Path) -> None:
    of_file, of_folder = inspect(file), inspect(folder)
    assert of_file.shape is not None and of_folder.shape is not None
    assert of_file.shape.rms_norm_eps == pytest.approx(of_folder.shape.rms_norm_eps)
    assert dataclasses.replace(of_file.shape, rms_norm_eps=of_folder.shape.rms_norm_eps) == of_folder.shape
    assert of_file.template == of_folder.template == TEMPLATE
    assert of_file.total.n_params == of_folder.total.n_params
    assert of_file.tokenizer is not None and of_folder.tokenizer is not None
    same = dataclasses.replace(of_file.tokenizer, normalizer_origin="tokenizer.json")
    assert {token.role: token.id for token in same.special} == {
        token.role: token.id for token in of_folder.tokenizer.special
    }
    assert dataclasses.replace(same, special=()) == dataclasses.replace(of_folder.tokenizer, special=())
    assert [setting.value for setting in of_file.sampling] == pytest.approx(
        [setting.value for setting in of_folder.sampling]
    )
    assert (of_file.digests, of_folder.digests) == (True, None)
    assert of_file.notices == of_folder.notices == ()


def test_the_tokenizer_is_told(file: Path) -> None:
    words = inspect(file).tokenizer
    assert words is not None
    assert (words.model, words.pre, words.normalizer, words.n_merges) == ("gpt2", "qwen2", "NFC", len(MERGES))
    texts = {token.role: (token.id, token.text) for token in words.special}
    assert texts["eos"] == (END_OF_TURN, CONTROL[END_OF_TURN])
    assert texts["bos"] == (END_OF_TEXT, CONTROL[END_OF_TEXT])
    assert [token.text for token in words.added] == ["<|im_start|>", "<think>", "</think>"]
    assert (words.add_bos, words.add_eos) == (False, False)


def test_sizes_by_type_add_up_to_the_file(file: Path) -> None:
    found, header = inspect(file), gguf_header.read(file)
    assert {entry.type: entry.n_tensors for entry in found.types} == {"Q4_K": 13, "Q6_K": 3, "F32": 11}
    assert found.total.n_bytes == sum(info.n_bytes for info in header.tensors) <= found.n_bytes == file.stat().st_size
    assert {entry.type: entry.bits for entry in found.types} == {"Q4_K": 4.5, "Q6_K": 6.5625, "F32": 32}


def settings(found: Inspection) -> dict[str, Setting]:
    return {setting.name: setting for setting in found.sampling}


def test_each_setting_has_its_origin(folder: Path, file: Path, tmp_path: Path) -> None:
    assert {name: setting.origin for name, setting in settings(inspect(folder)).items()} == {
        "temperature": "generation_config.json",
        "top_k": "generation_config.json",
        "top_p": "generation_config.json",
        "min_p": "default",
    }
    assert settings(inspect(file))["temperature"].origin == "general.sampling.temp"
    known = written(
        tmp_path / "x.gguf",
        general__name=("QwQ 32B", V.STRING),
        general__sampling__top_k=(30, V.INT32),
        general__sampling__penalty_repeat=(1.1, V.FLOAT32),
    )
    found = settings(inspect(known))
    assert (found["top_k"].value, found["top_k"].origin) == (30, "general.sampling.top_k")
    assert (found["top_p"].value, found["top_p"].origin) == (0.95, "catalogue: qwq-32b")
    assert (found["penalty_repeat"].used, found["top_k"].used) == (False, True)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e30])
def test_an_absurd_setting_is_shown_as_what_it_is(value: float, tmp_path: Path) -> None:
    found = settings(inspect(written(tmp_path / "x.gguf", general__sampling__temp=(value, V.FLOAT32))))
    assert (found["temperature"].value, found["temperature"].origin) == (0.6, "default")
    assert not found["temp"].used


@pytest.mark.parametrize(
    ("keys", "form", "origin"),
    [
        ({"qwq_lite__tokenizer__normalizer": ("none", V.STRING)}, "none", "qwq_lite.tokenizer.normalizer"),
        ({"tokenizer__ggml__pre": ("qwen2", V.STRING)}, "NFC", "assumed by tokenizer.ggml.pre: the file does not say"),
        ({}, "none", "assumed by tokenizer.ggml.pre: the file does not say"),
    ],
)
def test_the_normalizer_is_the_files_or_an_assumption(keys: Any, form: str, origin: str, tmp_path: Path) -> None:
    words = inspect(written(tmp_path / "x.gguf", tokenizer__ggml__tokens=(TOKENS, V.ARRAY), **keys)).tokenizer
    assert words is not None
    assert (words.normalizer, words.normalizer_origin) == (form, origin)


def test_what_cannot_be_understood_becomes_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "x.gguf", general__file_type=(4000, V.UINT32))
    found = inspect(path)
    assert found.shape is None and found.tokenizer is None and found.template is None
    assert found.file_type == "unknown (4000)"
    assert "block_count" in found.notices[0]
    assert run(monkeypatch, "inspect", path) == 0
    out, err = capsys.readouterr()
    assert "Q8_0" in out and "cannot be verified" in out
    assert err.count("note: ") == 1


def test_a_checkpoint_that_cannot_be_converted_is_still_shown(folder: Path, tmp_path: Path) -> None:
    other = write_random_checkpoint(tmp_path / "Other")
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    tokenizer["model"]["type"] = "Unigram"
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    (other / "generation_config.json").write_text("[]", "utf-8")
    found = inspect(other)
    assert found.shape == inspect(folder).shape
    assert found.tokenizer is None
    assert ["Unigram" in found.faults[0], "generation_config.json" in found.faults[1]] == [True, True]
    assert not found.notices


NOTED: dict[str, tuple[dict[str, object], str]] = {
    "a sliding window": ({"use_sliding_window": True}, "use_sliding_window"),
    "tied and not": ({"tie_word_embeddings": True}, "lm_head.weight of their own"),
}


@pytest.mark.parametrize("what", NOTED)
def test_what_convert_would_note_is_a_note(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, words = NOTED[what]
    folder = write_random_checkpoint(tmp_path / "Tiny", overrides=overrides)
    found = inspect(folder)
    assert [words in notice for notice in found.notices] == [True]
    assert found.shape is not None and found.tokenizer is not None and found.total.n_params
    assert not found.faults
    assert run(monkeypatch, "inspect", folder) == 0
    assert capsys.readouterr().err.startswith("note: ")


@pytest.mark.parametrize("case", BROKEN)
def test_what_convert_refuses_is_a_fault_in_the_same_words(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_random_checkpoint(tmp_path / "Tiny")
    BROKEN[case][0](folder)
    assert run(monkeypatch, "convert", folder, "-q", "Q8_0", "-o", tmp_path / "out.gguf") == 1
    refused = capsys.readouterr().err.strip()
    assert run(monkeypatch, "inspect", folder) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    quoted = re.compile("`.*`")  # of two tensors that overlap, safetensors' library names one or the other
    assert quoted.sub("", said) == quoted.sub("", refused)


def test_several_faults_are_all_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides: dict[str, object] = {"quantization_config": {"quant_method": "awq"}, "use_sliding_window": True}
    folder = write_random_checkpoint(tmp_path / "Tiny", overrides=overrides | {"num_hidden_layers": 3})
    assert run(monkeypatch, "inspect", folder, "--json") == 1
    out, err = capsys.readouterr()
    assert ["AWQ" in fault for fault in json.loads(out)["faults"]] == [True, False]
    assert err.splitlines()[0].startswith("note: ") and "tensors are missing" in err.splitlines()[0]
    assert "AWQ" in err.splitlines()[1]


def test_a_shard_that_is_missing_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_random_checkpoint(tmp_path / "Tiny", shards=3)
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    found = inspect(folder)
    assert [f"{gone}: the shard is missing" in fault for fault in found.faults] == [True]
    assert found.shape is not None and found.tokenizer is not None
    assert (found.types, found.tied) == ((), None)
    assert run(monkeypatch, "inspect", folder) == 1
    out, err = capsys.readouterr()
    assert "none that can be read" in out and "parameters" not in out
    assert err.startswith(f"qwq-lite: {gone}")
    assert run(monkeypatch, "inspect", folder, "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["types"], said["tied"], said["shape"]["n_layer"]) == ([], None, 2)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (2_540_000, "2.5 MB"), (19_851_000_000, "19.85 GB")],
)
def test_sizes_are_given_in_powers_of_ten(n_bytes: int, text: str) -> None:
    assert console.size(n_bytes) == text


def test_the_command_shows_every_section(
    file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (file, folder):
        assert run(monkeypatch, "inspect", path) == 0
        out, err = capsys.readouterr()
        titles = [line for line in out.splitlines() if line and not line.startswith(" ")][1:]
        assert titles == ["Model", "Weights", "Tokenizer", "Template", "Sampling", "Origin"]
        assert not err
        assert max(map(len, out.splitlines())) < 140
    assert run(monkeypatch, "inspect", file, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["shape"]["n_layer"] == 2
    assert said["tokenizer"]["special"][0].keys() == {"id", "text", "role"}
    assert [entry["name"] for entry in said["sampling"]] == ["temperature", "top_k", "top_p", "min_p"]


def hostile(folder: Path) -> Path:
    text = (HOSTILE, V.STRING)
    return written(
        folder / "x.gguf",
        **{"general__base_model__0__name": text, "qwq_lite__\x1b[1m": text, "general__sampling__\x9b": text},
        general__name=text,
        general__license=text,
        general__sampling__sequence=text,
        general__sampling__mirostat_tau=(float("nan"), V.FLOAT32),
        qwen2__rope__scaling__type=text,
        tokenizer__ggml__model=text,
        tokenizer__ggml__pre=text,
        tokenizer__ggml__tokens=([HOSTILE, HOSTILE + "2", "c"], V.ARRAY),
        tokenizer__ggml__token_type=([3, 3, 1], V.ARRAY),
        tokenizer__ggml__eos_token_id=(0, V.UINT32),
        tokenizer__ggml__bos_token_id=(9, V.UINT32),
        tokenizer__chat_template=(HOSTILE * 50, V.STRING),
    )


def test_no_escape_sequence_reaches_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = hostile(tmp_path)
    assert run(monkeypatch, "inspect", path) == 0
    text = "".join(capsys.readouterr())
    assert all(c == "\n" or c.isprintable() for c in text)
    assert "\\x1b]0;owned\\x07" in text and "\\u202eABC" in text
    assert "9: there is no such token" in text
    assert run(monkeypatch, "inspect", path, "--json") == 0
    text = capsys.readouterr().out
    assert all(c == "\n" or " " <= c <= "~" for c in text)
    said = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert said["name"] == HOSTILE


def test_a_models_text_keeps_what_its_script_needs_and_a_name_does_not() -> None:
    text = "\u202eה\u200d\x1b[2J\t\n"
    assert console.printable(text) == "\u202eה\u200d[2J\t\n"
    assert console.escaped(text) == "\\u202eה\\u200d\\x1b[2J\\t\\n"


def test_an_error_names_a_path_that_turns_the_line_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "inspect", tmp_path / "a\u202efugg.exe") == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "a\\u202efugg.exe" in err and "\u202e" not in err


def test_bytes_that_are_no_text_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "x.gguf", general__name=("qwerty", V.STRING))
    path.write_bytes(path.read_bytes().replace(b"qwerty", b"qw\xff\xfety"))
    assert console.escaped(str(inspect(path).name)) == "qw\\udcff\\udcfety"
    assert run(monkeypatch, "inspect", path) == run(monkeypatch, "inspect", path, "--json") == 0


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        inspect(tmp_path)
    with pytest.raises(FormatError, match="is not a file"):
        inspect(tmp_path / "gone.gguf")
    (tmp_path / "x.gguf").write_bytes(b"no model")
    with pytest.raises(FormatError, match="b'no m'"):
        inspect(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="qwq-lite chat"):
        inspect(tmp_path)
