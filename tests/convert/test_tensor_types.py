"""Names of types, and what needs importances: what of `tensor_types` no dry run of llama.cpp shows."""

from __future__ import annotations

import pytest
from gguf.constants import GGMLQuantizationType, LlamaFileType

from qwq_lite.errors import UsageError
from qwq_lite.formats import tensor_types
from qwq_lite.formats.tensor_types import FILE_TYPES, TENSOR_TYPES, QuantizeOptions

T = GGMLQuantizationType


@pytest.mark.parametrize("name", FILE_TYPES)
def test_a_name_names_its_file_type_in_any_case(name: str) -> None:
    kind = tensor_types.file_type(name)
    assert tensor_types.file_type(name.lower()) == tensor_types.file_type(name.replace("_", "-")) == kind
    assert tensor_types.file_type_name(kind) == name


@pytest.mark.parametrize(("alias", "name"), [("q3_k", "Q3_K_M"), ("Q4_K", "Q4_K_M"), ("q5_K", "Q5_K_M")])
def test_the_aliases_of_llama_quantize(alias: str, name: str) -> None:
    assert tensor_types.file_type(alias) == FILE_TYPES[name]


@pytest.mark.parametrize("name", ["", "Q7_K", "COPY", "IQ1_S", "Q4_K_M ", "15"])
def test_an_unknown_file_type_is_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(UsageError, match=r"known are F32, F16, BF16, Q8_0, .*IQ2_XXS"):
        tensor_types.file_type(name)


@pytest.mark.parametrize("name", TENSOR_TYPES)
def test_a_tensor_type_is_named_in_any_case(name: str) -> None:
    assert tensor_types.tensor_type(name.lower()) == tensor_types.tensor_type(name) == T[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [("q9_0", r"unknown tensor type 'q9_0'; known are F32, "), ("Q4_K_M", "Q4_K_M is a type of whole files, .*Q4_K,")],
)
def test_an_unknown_tensor_type_is_refused_with_those_that_are_known(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tensor_types.tensor_type(name)


def test_what_needs_importances() -> None:
    assert {kind.name for kind in TENSOR_TYPES.values() if tensor_types.importance_needed(kind)} == {
        "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS",
    }  # fmt: skip
    # Of these two llama.cpp asks only what the kernels cannot do without.
    for name in ("output.weight", "token_embd.weight"):
        needed = {kind.name for kind in TENSOR_TYPES.values() if tensor_types.importance_needed(kind, name)}
        assert needed == {"IQ2_XS", "IQ2_XXS"}
    assert tensor_types.importance_needed(T.Q2_K, "blk.0.ffn_up.weight", LlamaFileType.MOSTLY_Q2_K_S)
    assert not tensor_types.importance_needed(T.Q2_K, "blk.0.ffn_up.weight", LlamaFileType.MOSTLY_Q2_K)


def test_a_chosen_type_that_does_not_fit_names_those_that_do() -> None:
    shapes = {"output.weight": (896, 10), "token_embd.weight": (896, 10)}
    with pytest.raises(UsageError, match=r"output.weight has 896 columns.*Q4_K's blocks of 256; F32, F16, .*IQ4_NL"):
        tensor_types.tensor_types(shapes, FILE_TYPES["Q8_0"], 1, QuantizeOptions(output_tensor_type=T.Q4_K))
    # Where the embedding is the output, it takes that type as far as its columns allow.
    tied = {"token_embd.weight": (896, 10)}
    found = tensor_types.tensor_types(tied, FILE_TYPES["Q8_0"], 1, QuantizeOptions(output_tensor_type=T.Q4_K))
    assert found == {"token_embd.weight": T.Q5_0}
