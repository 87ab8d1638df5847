"""What a process really takes, against the plan's rows: never above them, and with every buffer touched hardly below."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from bench.process import N_OUTPUTS, compared
from qwq_lite.backend.settings import EngineSettings
from qwq_lite.plan.run_plan import HOST_WEIGHTS
from tests.samples import sample


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", sample(HOST_WEIGHTS, 1))
def test_a_process_takes_what_the_plan_says(name: str, demo_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / demo_gguf.name  # its own: the system gives back no pages that another process has mapped too
    shutil.copyfile(demo_gguf, file)
    row = compared(file, EngineSettings(1024, n_outputs_max=N_OUTPUTS, **HOST_WEIGHTS[name]))
    assert row["anonymous"] <= row["anonymous_planned"]
    assert row["mapped"] <= row["mapped_planned"]
    taken, planned = (row["anonymous" + end] + row["mapped" + end] for end in ("", "_planned"))
    assert taken >= 0.95 * planned
    # What was read once for repacking is given back and does not come again.
    assert row["mapped_read"] <= row["mapped_planned"] + row["reclaimable_planned"]
    assert (row["reclaimable_planned"] > 0) == (name == "mmap")
