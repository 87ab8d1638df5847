"""Several sequences in one context: whose tokens are cached where; reuse, fork, rewind, saved states. Engine thread only.

A sequence belongs to a session, one conversation, and stays in the cache when its reply is done. The next prompt of the
session keeps the longest common prefix; a session without a sequence shares the prefix of another one's. When sequences or
cells run out, the one that was longest out of use goes. Knows no text.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_lite import state_file
from qwq_lite.backend.context import CacheFull, Context, Entry, Row
from qwq_lite.errors import EngineError, FormatError


@dataclass(frozen=True)
class Branch:
    """A place to come back to without a decode: the row of logits after the first `n_tokens` tokens.

    row: shape (n_vocab,), a copy that nobody changes; 608 KB for QwQ.
    """

    n_tokens: int
    row: Row


class Sequence:
    """Tokens whose K and V the context holds under one id.

    row: logits after the last token, shape (n_vocab,), or None. Masks may be added to it in place; it is valid until the
    next decode, so it is sampled at once.
    """

    def __init__(self, number: int) -> None:
        self.id = number
        self.tokens: list[int] = []
        self.row: Row | None = None
        self.branch: Branch | None = None
        self.session: Hashable = None
        self.busy = False
        self.last_use = 0


@dataclass
class Part:
    """A sequence's share of a batch: the tokens that come next in it, and whether the row after them is wanted."""

    sequence: Sequence
    tokens: list[int]
    output: bool = True


class Sequences:
    """The sequences of a context. Raises: EngineError as the context does."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._all = [Sequence(number) for number in range(context.settings.n_seq_max)]
        self._clock = 0

    def place(self, session: Hashable, prompt: list[int], alone: bool = False) -> Sequence:
        """A sequence for a session's next reply, which holds as long a prefix of `prompt` as the cache has.

        Where the whole prompt was decoded before, and its row kept, the sequence has that row and needs no decode; else
        at least the prompt's last token is left to do.

        alone: a session that holds nothing yet shares nothing and starts in an empty cache. Attention over an f16 cache
        gives other bits where its cells are not those of the first time, and so may the same seed give another reply.
        """
        common = {s.id: _common_prefix(s.tokens, prompt) for s in self._all}
        best = max(self._all, key=lambda s: common[s.id])
        own = next((s for s in self._all if s.session == session and not s.busy and s.tokens), None)
        if alone and (own is None or session is None):
            for idle in [s for s in self._all if not s.busy]:
                self._clear(idle)
            sequence = self._vacant()
        elif own is not None and common[own.id] == common[best.id]:
            sequence = own
        else:
            shared = common[best.id]
            sequence = own or self._vacant(keep=best if shared else None)
            if sequence is not best:
                self._share(best, sequence, shared)
        sequence.session, sequence.busy = session, True
        self._touch(sequence)
        self._reuse(sequence, prompt)
        return sequence

    def fork(self, session: Hashable, twin: Hashable) -> None:
        """Give the session `twin` what the session holds. K and V are shared in the cache: nothing is computed."""
        source = next((s for s in self._all if s.session == session and s.tokens), None)
        if source is not None and len(self._all) > 1:
            target = self._vacant(keep=source)
            self._share(source, target, len(source.tokens))
            target.session = twin
            self._touch(target)

    def done(self, sequence: Sequence) -> None:
        """The reply has ended: the sequence stays, for the session's next prompt, until its place is needed."""
        sequence.busy = False

    def release(self, session: Hashable) -> None:
        """The session is over: forget what it holds."""
        for sequence in self._all:
            if sequence.session == session and not sequence.busy:
                self._clear(sequence)

    def decode(self, parts: list[Part]) -> None:
        """One batch. Afterwards every part's tokens stand, and its sequence has its row if it was wanted.

        Idle sequences give way when the cache is full. After an error nothing of the batch stands.
        Raises: Aborted; CacheFull when the busy sequences alone fill the cache; EngineError.
        """
        entries = [
            Entry(token, len(part.sequence.tokens) + i, part.sequence.id, part.output and i == len(part.tokens) - 1)
            for part in parts
            for i, token in enumerate(part.tokens)
        ]
        while True:
            try:
                self._context.decode(entries)
                break
            except CacheFull:
                self._cut_back(parts)
                if not self._evict():
                    raise
            except BaseException:
                self._cut_back(parts)
                raise
        end = -1
        for part in parts:
            part.sequence.tokens += part.tokens
            end += len(part.tokens)
            part.sequence.row = self._context.row(end) if part.output else None
            self._touch(part.sequence)

    def mark(self, sequence: Sequence) -> None:
        """Keep the sequence's row, so that to come back to this place needs no decode."""
        if sequence.row is not None and (sequence.branch is None or sequence.branch.n_tokens != len(sequence.tokens)):
            sequence.branch = Branch(len(sequence.tokens), sequence.row.copy())

    def rewind(self, sequence: Sequence, n_tokens: int) -> list[int]:
        """Let only the first `n_tokens` stand, at least one. Returns what is left to decode before the next draw.

        At the sequence's branch its row comes back and nothing is left; elsewhere it is the last token, to be decoded alone
        as it was before, which gives the same bits.
        """
        if sequence.branch is not None and sequence.branch.n_tokens == n_tokens:
            self._cut(sequence, n_tokens)
            sequence.row = sequence.branch.row.copy()
            return []
        last = sequence.tokens[n_tokens - 1]
        self._cut(sequence, n_tokens - 1)
        return [last]

    def save(self, session: Hashable, path: Path, fingerprint: str, extra: dict[str, Any]) -> None:
        """Write a session's tokens and K and V to a file; none of them when the cache holds it no longer.

        The row is not kept: after `restore` the last token is decoded again.
        Raises: OutputError; UsageError when `extra` is no JSON.
        """
        sequence = next((s for s in self._all if s.session == session and s.tokens), None)
        tokens = [] if sequence is None else list(sequence.tokens)
        n_bytes = 0 if sequence is None else self._context.state_bytes(sequence.id)

        def fill(payload: memoryview) -> None:
            written = 0 if sequence is None else self._context.state_into(sequence.id, payload)
            if written != n_bytes:
                raise EngineError(f"llama.cpp wrote {written} bytes of state where it had asked for {n_bytes}")

        state_file.write(path, state_file.Saved(fingerprint, tokens, extra), n_bytes, fill)

    def restore(self, session: Hashable, path: Path, fingerprint: str) -> dict[str, Any]:
        """Bring back what `save` wrote, idle, for the session's next prompt. Returns the caller's own words.

        Raises: FormatError for a damaged file, another model's, or one that the context is too small for.
        """
        with state_file.read(path) as (saved, payload):
            if saved.fingerprint != fingerprint:
                raise FormatError(
                    f"{path}: was saved by another model or with other cache types ({saved.fingerprint}, this one is"
                    f" {fingerprint}); load that one"
                )
            if len(saved.tokens) > self._context.n_ctx:
                raise FormatError(
                    f"{path}: holds {len(saved.tokens)} tokens, the context {self._context.n_ctx}; load a larger one (--ctx)"
                )
            if saved.tokens:
                sequence = self._vacant()
                self._clear(sequence)
                self._load(sequence, payload)
                sequence.tokens, sequence.session = saved.tokens, session
                self._touch(sequence)
        return saved.extra

    def _load(self, sequence: Sequence, payload: memoryview) -> None:
        while True:
            try:
                self._context.state_from(sequence.id, payload)
                return
            except CacheFull:
                if not self._evict():
                    raise

    def _reuse(self, sequence: Sequence, prompt: list[int]) -> None:
        branch = sequence.branch
        kept = _common_prefix(sequence.tokens, prompt)
        if branch is not None and branch.n_tokens == len(prompt) == kept:
            self.rewind(sequence, kept)
            return
        try:
            self._cut(sequence, min(kept, len(prompt) - 1))
        except EngineError:  # a recurrent model's cache can be dropped whole, and not cut
            self._clear(sequence, keep_owner=True)

    def _share(self, source: Sequence, target: Sequence, n_tokens: int) -> None:
        self._clear(target)
        if n_tokens < len(source.tokens) and not self._context.can_cut:
            return
        self._context.copy(source.id, target.id, n_tokens)
        target.tokens = source.tokens[:n_tokens]
        if source.branch is not None and source.branch.n_tokens <= n_tokens:
            target.branch = source.branch

    def _vacant(self, keep: Sequence | None = None) -> Sequence:
        """A sequence to overwrite: an empty one, else the idle one that was longest out of use."""
        idle = [s for s in self._all if not s.busy and s is not keep]
        if not idle and keep is not None and not keep.busy:
            return keep
        if not idle:
            raise EngineError(f"all {len(self._all)} sequences of the context are in use")
        return min(idle, key=lambda s: (bool(s.tokens), s.last_use))

    def _evict(self) -> bool:
        idle = [s for s in self._all if not s.busy and s.tokens]
        if idle:
            self._clear(min(idle, key=lambda s: s.last_use))
        return bool(idle)

    def _cut_back(self, parts: list[Part]) -> None:
        for part in parts:
            try:
                self._cut(part.sequence, len(part.sequence.tokens))
            except EngineError:
                self._clear(part.sequence, keep_owner=True)

    def _cut(self, sequence: Sequence, n_tokens: int) -> None:
        self._context.remove(sequence.id, n_tokens)
        del sequence.tokens[n_tokens:]
        sequence.row = None
        if sequence.branch is not None and sequence.branch.n_tokens > n_tokens:
            sequence.branch = None

    def _clear(self, sequence: Sequence, keep_owner: bool = False) -> None:
        self._cut(sequence, 0)
        if not keep_owner:
            sequence.session = None

    def _touch(self, sequence: Sequence) -> None:
        self._clock += 1
        sequence.last_use = self._clock


def _common_prefix(left: list[int], right: list[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
