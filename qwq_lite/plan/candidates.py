"""The files that a plan may be for: the one that is named, or those that a conversion would make. No weight is read."""

from __future__ import annotations

from pathlib import Path

from qwq_lite.errors import FormatError, UsageError
from qwq_lite.formats import checkpoint_config, gguf_header, header_only, shape
from qwq_lite.formats.shape import ModelShape
from qwq_lite.formats.tensor_types import file_type, file_type_name
from qwq_lite.plan.run_plan import Candidate
from qwq_lite.store import catalog

DEFAULT_TYPE = "Q4_K_M"
_PROPOSED = ("Q4_K_M", "Q6_K", "Q8_0", "F16", "BF16")  # what may be planned without being asked for


def find_candidates(model: str, quant: str | None) -> tuple[list[Candidate], Path | None]:
    """The candidates, the wanted one first, and the file where one exists.

    Args:
        model: a GGUF file, a checkpoint folder, or a name of the catalogue.
        quant: weight type of a file that does not exist yet; default Q4_K_M.

    Raises: UsageError, FormatError, CheckpointError.
    """
    path = Path(model)
    if not path.exists() and (path.suffix.lower() == ".gguf" or path.is_absolute()):
        raise FormatError(f"{path}: there is no such file")
    if path.is_file():
        if quant is not None:
            raise UsageError(f"{path} is a file, its weight type is what it is; leave -q out")
        return [of_file(gguf_header.read(path))], path
    geometry, tied = checkpoint_config.read(path) if path.is_dir() else (catalog.geometry(model)[1], False)
    return conversions(geometry, tied, file_type_name(file_type(DEFAULT_TYPE if quant is None else quant))), None


def of_file(header: gguf_header.Header) -> Candidate:
    return Candidate(header.path.name, shape.from_header(header), header.tensors)


def conversions(shape: ModelShape, tied: bool, weight_type: str) -> list[Candidate]:
    """Files that a conversion would make: of this weight type, and of the proposed ones that are smaller, the largest first."""
    names = dict.fromkeys((*_PROPOSED, weight_type))
    made = {name: Candidate(name, shape, header_only.tensors(shape, file_type(name), tied)) for name in names}
    first = made[weight_type]
    smaller = [candidate for candidate in made.values() if candidate.n_bytes < first.n_bytes]
    return [first, *sorted(smaller, key=lambda candidate: -candidate.n_bytes)]
