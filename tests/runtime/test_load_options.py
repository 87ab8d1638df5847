"""How a model is loaded: what is refused, whichever process loads it, and what travels to the worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qwq_lite
from qwq_lite.engine.load_options import LoadOptions
from qwq_lite.errors import UsageError
from qwq_lite.plan.run_plan import Wishes

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n_ctx": 8}, "n_ctx"),
    ({"type_k": "q9"}, "type_k"),
    ({"type_v": 8}, "type_v"),
    ({"n_gpu_layers": -2}, "n_gpu_layers"),
    ({"host_weights": "disk"}, "host_weights"),
    ({"n_threads": 0}, "n_threads"),
    ({"n_threads": 513}, "n_threads"),
    ({"memory": "2GiB"}, "memory is '2GiB'"),
    ({"plan": "a plan"}, "plan is a str, a RunPlan is expected"),
]


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_cannot_be_meant_is_refused_before_the_file_is_read(
    given: dict[str, Any], message: str, isolated: bool, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        qwq_lite.load(tmp_path / "there is none.gguf", isolated=isolated, **given)


def test_they_are_the_same_on_the_other_side_of_a_pipe() -> None:
    numbers: dict[str, Any] = {name: np.int64(300) for name in ("n_ctx", "n_gpu_layers", "memory", "n_threads")}
    options = LoadOptions(type_k="Q8_0", type_v="q8_0", template=["{{ 1 }}", "a file"], **numbers)
    assert LoadOptions(**json.loads(json.dumps(options.without_plan()))) == options
    assert options.wishes == Wishes(300, "q8_0", "q8_0", 300)
    assert LoadOptions().wishes == Wishes()
