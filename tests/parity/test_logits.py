"""The whole way from a checkpoint to logits, against transformers in float32 on the same token ids.

What it shows and no test of bytes can: a tensor under the wrong name, a wrong rotation base or epsilon, a missing bias.
llama.cpp's CPU kernels round the activations to the type of the weights, to 8 bits of mantissa for BF16; the F16 file, with
11 bits, tells that rounding from a mistake: there the same weights come ten times nearer. The demo model's biases are zero
and its head is tied, so small random models stand in for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from qwq_convert.pipeline import convert
from qwq_lite.backend.context import Context, ContextSettings, Entry
from qwq_lite.backend.model import LoadedModel
from qwq_lite.formats import gguf_header
from qwq_lite.formats.tensor_types import file_type
from qwq_lite.prompt import chat_template
from tests.checkpoints import N_TOKENS, Layout, write_random_checkpoint
from tests.parity import corpus

LONGEST = 600  # tokens of a text that are read
MOST_KL = {"BF16": 1e-3, "F16": 1e-4}  # a rotation base of 9e4 for 1e5 gives 3e-4, one of 1e4 0.14
LEAST_SAME_TOP = 0.99
# F16 kernels cost 0.0016; an epsilon of 1e-6 for 1e-5 shows with 0.009, a rotation base of 1e4 for 1e6 with 0.08, biases
# that are left out with 0.4.
MOST_RELATIVE_ERROR = 0.004
N_THREADS = 1  # two wait for each other wherever something else wants a core

Logits = npt.NDArray[np.float32]
Rows = npt.NDArray[np.float64]


@dataclass
class Comparison:
    """Distances of our distributions from the reference's, position by position."""

    divergences: list[float] = field(default_factory=list)
    ties: list[str] = field(default_factory=list)  # the positions with another top token
    widest_tie: float = 0.0

    @property
    def same_top(self) -> float:
        return 1 - len(self.ties) / len(self.divergences)

    @property
    def mean(self) -> float:
        return float(np.mean(self.divergences))

    def add(self, where: str, theirs: Rows, ours: Rows) -> None:
        """Take in one position. Both: log-probabilities, shape (n_vocab,)."""
        self.divergences.append(float(np.sum(np.exp(theirs) * (theirs - ours))))
        first, chosen = int(theirs.argmax()), int(ours.argmax())
        if first != chosen:
            gap = float(theirs[first] - theirs[chosen])
            self.widest_tie = max(self.widest_tie, gap)
            shares = f"{np.exp(theirs[first]):.4f} against {np.exp(theirs[chosen]):.4f}"
            self.ties.append(f"  {where}: token {first} has {shares} by transformers, {gap:.4f} nats apart")


def log_probabilities(logits: Logits) -> Rows:
    shifted = logits.astype(np.float64) - logits.max()
    result: Rows = shifted - np.log(np.exp(shifted).sum())
    return result


def read_by_transformers(folder: Path) -> Callable[[Sequence[int]], Logits]:
    """Token ids -> logits, (n, n_vocab), from one pass over the whole text."""
    torch.set_num_threads(N_THREADS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    def logits(tokens: Sequence[int]) -> Logits:
        with torch.inference_mode():
            rows: Logits = model(torch.tensor([list(tokens)])).logits[0].numpy()
        return rows

    return logits


def read_by_us(model: LoadedModel, tokens: Sequence[int]) -> Iterator[Logits]:
    """The logits after each token, decoded one by one; each row is good until the next is asked for."""
    context = Context(model, ContextSettings(n_ctx=LONGEST, n_threads=N_THREADS))
    try:
        for position, token in enumerate(tokens):
            context.decode([Entry(token, position, output=True)])
            yield context.row(0)
    finally:
        context.close()


@pytest.fixture(scope="module", params=list(MOST_KL))
def loaded(
    request: pytest.FixtureRequest, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, LoadedModel]]:
    """The demo checkpoint converted to one type, and the type's name."""
    path = tmp_path_factory.mktemp("parity") / f"{request.param}.gguf"
    convert(demo_folder, file_type(request.param), path)
    model = LoadedModel(path)
    yield request.param, model
    model.close()


def token_lists(model: LoadedModel) -> Mapping[str, list[int]]:
    """Name -> tokens of each text; the chat goes through the model's own template."""
    template = gguf_header.read(model.path).keys["tokenizer.chat_template"]
    assert isinstance(template, str)
    lists = {name: chat_template.tokenize(model.vocab, text, "NFC") for name, text in corpus.plain_texts().items()}
    lists["chat"] = chat_template.ChatTemplate(template).encode(model.vocab, corpus.CHAT, "NFC")
    return {name: tokens[:LONGEST] for name, tokens in lists.items()}


def test_logits_are_those_of_transformers(
    loaded: tuple[str, LoadedModel], demo_folder: Path, report: Callable[[str], None]
) -> None:
    kind, model = loaded
    reference, found = read_by_transformers(demo_folder), Comparison()
    for name, tokens in token_lists(model).items():
        pairs = zip(reference(tokens), read_by_us(model, tokens), strict=True)
        for position, (theirs, ours) in enumerate(pairs):
            found.add(f"{name}, position {position}", log_probabilities(theirs), log_probabilities(ours))
    positions, worst = len(found.divergences), max(found.divergences)
    report(
        f"{kind}: {positions:,} positions, same top token {found.same_top:.2%}, KL(transformers || ours) mean {found.mean:.2e},"
        f" largest {worst:.2e}; {len(found.ties)} other top tokens, the widest tie {found.widest_tie:.4f} nats"
    )
    for tie in found.ties:
        report(tie)
    assert positions >= 2_000
    assert found.same_top >= LEAST_SAME_TOP
    assert found.mean <= MOST_KL[kind]


@pytest.mark.parametrize("layout", ["transformers4", "transformers5"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_biases_and_head_of_a_random_model_count(tmp_path: Path, layout: Layout, tied: bool) -> None:
    folder = write_random_checkpoint(tmp_path / "model", layout=layout, tied=tied)
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, N_TOKENS, 200)]
    path = tmp_path / "model.gguf"
    convert(folder, file_type("F16"), path)
    model = LoadedModel(path)
    ours = np.stack([row.copy() for row in read_by_us(model, tokens)])
    model.close()
    theirs = read_by_transformers(folder)(tokens)
    assert np.sqrt(np.mean((ours - theirs) ** 2)) / np.std(theirs) <= MOST_RELATIVE_ERROR
