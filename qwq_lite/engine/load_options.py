"""How a model is loaded, as the caller asks for it. Pure; knows neither a file nor what fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from qwq_lite import arguments
from qwq_lite.errors import UsageError
from qwq_lite.plan import speed
from qwq_lite.plan.run_plan import MOST_BYTES, RunPlan, Wishes


@dataclass(frozen=True)
class LoadOptions:
    """Checked when it is made, with numbers that are Python's own; None leaves a choice to the plan or to the machine.

    Raises: UsageError.
    """

    n_ctx: int | None = None  # tokens of context
    type_k: str | None = None  # type of the K cache, in any case of letters
    type_v: str | None = None  # type of the V cache
    n_gpu_layers: int | None = None  # layers on the GPU, -1 for all
    host_weights: str | None = None  # where weights of host layers lie, a name of run_plan.HOST_WEIGHTS
    plan: RunPlan | None = None  # in place of a new one, and of the five above
    memory: int | None = None  # bytes to use, of the GPU where there is one, else of main memory
    n_threads: int | None = None  # of the CPU
    template: Sequence[str] | None = None  # text of a chat template in place of the model's, what its errors begin with

    @property
    def wishes(self) -> Wishes:
        """What is asked of the plan."""
        type_k, type_v = (text.lower() if isinstance(text, str) else text for text in (self.type_k, self.type_v))
        return Wishes(self.n_ctx, type_k, type_v, self.n_gpu_layers, self.host_weights)

    def without_plan(self) -> dict[str, Any]:
        """All but the plan, by name, as JSON has it."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "plan"}

    def __post_init__(self) -> None:
        wishes = self.wishes
        numbers = {"n_ctx": wishes.n_ctx, "n_gpu_layers": wishes.n_gpu_layers}
        if self.n_threads is not None:
            numbers["n_threads"] = arguments.check_whole("n_threads", self.n_threads, 1, speed.MOST_THREADS)
        if self.plan is not None and not isinstance(self.plan, RunPlan):
            raise UsageError(
                f"plan is a {type(self.plan).__name__}, a RunPlan is expected: the `plan` of what plan_model returns"
            )
        if self.memory is not None:
            numbers["memory"] = arguments.check_whole("memory", self.memory, 1, MOST_BYTES)
        if self.plan is not None and wishes != Wishes():
            raise UsageError(
                "a plan is given, and n_ctx, type_k, type_v, n_gpu_layers or host_weights too; give one of the two"
            )
        for name, number in numbers.items():
            object.__setattr__(self, name, number)  # of a frozen class, while it is made
