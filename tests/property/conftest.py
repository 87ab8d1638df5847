"""Laws are not judged by the clock: a busy machine, or its slow disk, breaks none of them."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("laws", deadline=None)
settings.load_profile("laws")
