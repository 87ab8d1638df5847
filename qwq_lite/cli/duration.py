"""A length of time on the command line."""

from __future__ import annotations

import re

import click

_PARTS = re.compile(r"(?:(?P<h>\d+(?:\.\d+)?)h)?(?:(?P<m>\d+(?:\.\d+)?)m)?(?:(?P<s>\d+(?:\.\d+)?)s?)?")
_SECONDS = {"h": 3600, "m": 60, "s": 1}


def duration(text: str) -> float:
    """Seconds, from `60s`, `2m30s`, `1h` or a bare number. Raises: click.BadParameter."""
    found = _PARTS.fullmatch("".join(text.split()).lower())
    seconds = sum(float(part) * _SECONDS[unit] for unit, part in found.groupdict().items() if part) if found else 0.0
    if not seconds:
        raise click.BadParameter(
            f"{text!r} is no length of time; such as 60s, 2m30s, 1h or a number of seconds is expected."
        )
    return seconds
