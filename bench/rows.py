"""Are the converter's rows llama.cpp's, byte for byte, for every type?

What is at stake. Our kernels are ggml's, called by windows, and what they are given decides the bytes: the same rows, the same
importances, the same tables made ready before. llama_model_quantize of the same loaded library is asked for the same tensors.

What is measured, for each type of tensors, with importances and without: rows of Gaussian weights with outliers and blocks of
zeros, 5120, 27,648, 896 and 4864 columns wide; types that need importances are compared without as the embedding and the output,
of which llama.cpp asks for none. tests/convert/test_bytes.py does the same with fewer rows of the slow types.

    python bench/rows.py [--rows 64] [--types IQ2_XS,IQ3_S]

Prints a line for each case and one JSON line; exit status 1 where a byte differs. Takes a minute on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]

from tests.rows import CASES, compared  # noqa: E402


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    options.add_argument("--rows", type=int, default=64)
    options.add_argument("--types", help="names of types, with commas")
    given = options.parse_args()
    wanted = given.types.split(",") if given.types else [case.kind.name for case in CASES]
    cases = [case for case in CASES if case.kind.name in wanted and not case.impossible]
    different: dict[str, list[str]] = {}
    n_rows = 0
    for case in cases:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = compared(Path(folder), case, given.rows)
        n_rows += given.rows * len(found)
        if names := [f"{info.name} ({info.type.name})" for info, same in found.items() if not same]:
            different[str(case)] = names
        word = f"differs: {', '.join(names)}" if names else "the same"
        print(f"{case!s:20} {word}, {len(found)} tensors, {time.perf_counter() - begin:.1f} s", flush=True)
    print(json.dumps({"bench": "rows", "cases": len(cases), "rows": n_rows, "different": different}))
    raise SystemExit(1 if different or not cases else 0)


if __name__ == "__main__":
    main()
