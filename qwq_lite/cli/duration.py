"""A length of time on the command line."""

from __future__ import annotations

import re

import click

_NUMBER = r"\d+(?:\.\d+)?"
# A bare number is seconds only where it stands alone: 1h30 may be meant for an hour and a half.
_PARTS = re.compile(rf"(?P<alone>{_NUMBER})|(?:(?P<h>{_NUMBER})h)?(?:(?P<m>{_NUMBER})m)?(?:(?P<s>{_NUMBER})s)?")
_SECONDS = {"h": 3600, "m": 60, "s": 1, "alone": 1}


def parse_duration(text: str) -> float:
    """Seconds, from `60s`, `2m30s`, `1h` or a bare number. Raises: click.BadParameter."""
    found = _PARTS.fullmatch("".join(text.split()).lower())
    seconds = sum(float(part) * _SECONDS[unit] for unit, part in found.groupdict().items() if part) if found else 0.0
    if not seconds:
        raise click.BadParameter(
            f"{text!r} is no length of time; such as 60s, 2m30s, 1h or a number of seconds is expected."
        )
    return seconds
