"""Sampling settings, and whose word counts: the user's, then the file's, then the catalogue's."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwq_lite import arguments
from qwq_lite.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """Settings of one draw. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch a stage off.

    The defaults are those that QwQ's authors give for it. No repetition penalty: llama.cpp's breaks even bf16 QwQ.
    Source: QwenLM/QwQ, README
    """

    temperature: float = 0.6
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.0

    def __post_init__(self) -> None:
        bounds = {"temperature": (0, 100), "top_k": (0, 1 << 20), "top_p": (0, 1), "min_p": (0, 1)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not math.isfinite(value) or not low <= value <= high:
                raise UsageError(f"{name} is {value}, a number from {low} to {high} is allowed")
        if self.top_p == 0:
            raise UsageError(
                "top_p is 0, a number above 0 and up to 1 is allowed; for the likeliest token set temperature to 0"
            )


_FILE_KEYS = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}  # general.sampling.*


def resolve(user: Mapping[str, float | None], file_keys: Mapping[str, object], catalogue: Sampling) -> Sampling:
    """Each setting from the first that has it: the user, the file's general.sampling.* keys, the catalogue.

    Raises: UsageError for a value of the user's out of range; a file's absurd value is passed over.
    """
    settings = catalogue
    for name, key in _FILE_KEYS.items():
        value = file_keys.get(f"general.sampling.{key}")
        if arguments.is_real(value):
            try:
                settings = _replace_values(settings, {name: int(value) if name == "top_k" else float(value)})
            except (UsageError, ValueError, OverflowError):
                continue
    return _replace_values(settings, {name: value for name, value in user.items() if value is not None})


def _replace_values(settings: Sampling, values: Mapping[str, float]) -> Sampling:
    changes: dict[str, Any] = dict(values)
    return dataclasses.replace(settings, **changes)


def draw_seed(seed: int, attempt: int, position: int) -> int:
    """The 32-bit seed of one draw. A function of its place, so that rewind, fork and resume carry no random state."""
    text = f"{seed}:{attempt}:{position}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")
