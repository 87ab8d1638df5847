"""The models this project is about: how they are recognised, sampled and prompted, each with its source. Knows no files."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwq_lite.sampling import Sampling


@dataclass(frozen=True)
class CatalogModel:
    """One known model. `matches` is tried on the file's general.name and on the file name."""

    name: str
    repository: str
    matches: str
    sampling: Sampling


# Sources: QwenLM/QwQ README; deepseek-ai/DeepSeek-R1 README, usage recommendations. The settings that a file carries
# (its generation_config.json) win over these: for Preview, whose authors gave none, that is how it is meant.
MODELS = (
    CatalogModel("qwq-32b-preview", "Qwen/QwQ-32B-Preview", r"qwq.*32b.*preview", Sampling()),
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
