"""The models this project is about: how they are recognised, sampled and built, each with its source. Knows no files.

`find` serves a file that is there: it goes by what the file says of itself. `geometry` serves a plan without any file: it
goes by the exact name. Where a file or a config.json is at hand, `shape` reads the same from there, and that counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from qwq_lite.errors import UsageError
from qwq_lite.formats.shape import ModelShape
from qwq_lite.sampling import Sampling


@dataclass(frozen=True)
class CatalogModel:
    """One known model."""

    name: str
    repository: str  # on the Hub
    matches: str  # a pattern, tried on the file's general.name and on the file name
    sampling: Sampling
    tied: bool = False  # the output layer is the embedding, so the file has no output.weight
    undivided: bool = False  # it thinks and marks no thought


# Sources: QwenLM/QwQ README; deepseek-ai/DeepSeek-R1 README, usage recommendations. The settings that a file carries
# (its generation_config.json) win over these: for Preview, whose authors gave none, that is how it is meant.
MODELS = (
    CatalogModel("qwq-32b-preview", "Qwen/QwQ-32B-Preview", r"qwq.*32b.*preview", Sampling(), undivided=True),
    CatalogModel("qwq-32b", "Qwen/QwQ-32B", r"qwq.*32b", Sampling()),
    CatalogModel(
        "deepseek-r1-distill-qwen",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
        r"r1.*distill.*qwen",
        Sampling(0.6, 0, 0.95, 0.0),
    ),
)
DEFAULT_SAMPLING = Sampling()


def find(*names: str | None) -> CatalogModel | None:
    """The known model that one of the names speaks of; the first match of the most special pattern wins."""
    for model in MODELS:
        if any(name and re.search(model.matches, name, re.IGNORECASE) for name in names):
            return model
    return None


_PREVIEW, _QWQ, _DISTILL = MODELS
_DISTILL_HUB = "deepseek-ai/DeepSeek-R1-Distill-Qwen"


def _distill(size: str) -> CatalogModel:
    return replace(_DISTILL, name=f"{_DISTILL.name}-{size}", repository=f"{_DISTILL_HUB}-{size.upper()}")


def _shape(
    n_layer: int, n_embd: int, n_ff: int, n_head: int, n_head_kv: int, n_vocab: int, n_ctx: int, eps: float, base: float
) -> ModelShape:
    """A qwen2 of the catalogue: n_embd_head is n_embd / n_head, and no config.json of these has rope scaling."""
    return ModelShape(
        "qwen2", n_layer, n_embd, n_ff, n_head, n_head_kv, n_embd // n_head, n_vocab, n_ctx, eps, base
    )  # fmt: skip


# Source: config.json of each repository on the Hub, all with tie_word_embeddings false; read in a copy for Preview and
# 1.5B, for 7B in the keys that llama.cpp lists of its GGUF, for 14B and 32B in the parts its log shows (parameters,
# n_vocab; 32B also n_ff, rope base, n_ctx); the rest is Qwen2.5's of that size. The distilled 1.5B and 7B come from
# Qwen2.5-Math, hence the rope base of 10,000. QwQ-32B's config.json said 131,072 positions at first and says 40,960 since
# May 2025 (QwenLM/QwQ issue tracker): the smaller one is planned with.
_KNOWN = (  # the largest first
    (_PREVIEW, _shape(64, 5120, 27648, 40, 8, 152_064, 32_768, 1e-5, 1e6)),
    (_QWQ, _shape(64, 5120, 27648, 40, 8, 152_064, 40_960, 1e-5, 1e6)),
    (_distill("32b"), _shape(64, 5120, 27648, 40, 8, 152_064, 131_072, 1e-5, 1e6)),
    (_distill("14b"), _shape(48, 5120, 13824, 40, 8, 152_064, 131_072, 1e-5, 1e6)),
    (_distill("7b"), _shape(28, 3584, 18944, 28, 4, 152_064, 131_072, 1e-6, 1e4)),
    (_distill("1.5b"), _shape(28, 1536, 8960, 12, 2, 151_936, 131_072, 1e-6, 1e4)),
)
GEOMETRIES: dict[str, tuple[CatalogModel, ModelShape]] = {model.name: (model, shape) for model, shape in _KNOWN}


def how_to_get(name: str) -> str | None:
    """What to type for a model that was named and is no file yet; None for what is no name of the catalogue."""
    try:
        known = geometry(name)[0]
    except UsageError:
        return None
    folder = known.repository.rpartition("/")[2]
    return (
        f"is the name of a model, and a file is needed; to see what fits here, type: qwq-lite plan {known.name};"
        f" to get it: hf download {known.repository} --local-dir {folder}, then: qwq-lite convert {folder} -q Q4_K_M"
    )


def geometry(name: str) -> tuple[CatalogModel, ModelShape]:
    """The known model of exactly that name, or of that repository, and its shape; case does not count.

    Raises: UsageError with the names that there are.
    """
    named = (pair for pair in GEOMETRIES.values() if name.lower() in (pair[0].name, pair[0].repository.lower()))
    found = next(named, None)
    if found is None:
        raise UsageError(f"no model is known as {name!r}; known are {', '.join(GEOMETRIES)}")
    return found
