"""What a policy has that has no word on what may be drawn."""

from __future__ import annotations

from typing import Any, ClassVar

from qwq_lite.reply.policy import Draw


class Unconstrained:
    constrains: ClassVar[bool] = False

    def constrain(self, state: Any, draw: Draw) -> Draw:
        return draw
