"""The KV cache of several conversations in one context: prefix reuse, fork, rewind, eviction. Engine thread only.

A sequence belongs to a session, one conversation, and stays in the cache when its reply is done. The next prompt of the
session keeps the longest common prefix; a session without a sequence shares the prefix of another one's. When sequences or
cells run out, the one that was longest out of use goes. Knows no text.

A recurrent state stands for all its tokens: such a cache cannot be cut. What must lose tokens there is emptied and decoded anew.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from qwq_lite.backend.context import Aborted, CacheFull, Context, Entry, Row
from qwq_lite.errors import EngineError
from qwq_lite.reply.retokenize import n_common_tokens


@dataclass(frozen=True)
class Branch:
    """A place to come back to without a decode: the row of logits after the first `n_tokens` tokens.

    row: shape (n_vocab,), a copy that nobody changes; 608 KB for QwQ. fresh: computed from the first token on in an empty cache.
    """

    n_tokens: int
    row: Row
    fresh: bool = False


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
        self.fresh = False  # nothing was in the cache when its reply began
        self.last_use = 0


class Part(NamedTuple):
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

        alone: share nothing, and start in an empty cache. Attention over an f16 cache gives other bits where its cells are
        not those of the first time, and so may the same seed give another reply. What was itself computed so is kept.
        """
        own = self._of(session, idle=True)
        exact = own is not None and own.branch is not None and own.branch.fresh and self._has_row(own, prompt)
        if alone and not exact:
            for idle in [s for s in self._all if not s.busy]:
                self._clear(idle)
            sequence = self._vacant()
        else:
            sequence = self._with_longest_prefix(own, prompt)
        self._reuse(sequence, prompt)
        sequence.fresh = not any(s.tokens for s in self._all)
        sequence.session, sequence.busy = session, True
        self._touch(sequence)
        return sequence

    def _with_longest_prefix(self, own: Sequence | None, prompt: list[int]) -> Sequence:
        common = {s.id: self._usable(s, prompt) for s in self._all}
        best = max(self._all, key=lambda s: common[s.id])
        if own is not None and common[own.id] == common[best.id]:
            return own
        sequence = own or self._vacant(keep=best if common[best.id] else None)
        if sequence is not best:
            self._share(best, sequence, common[best.id])
        return sequence

    def _of(self, session: Hashable, idle: bool = False) -> Sequence | None:
        """The sequence that holds something of a session; with `idle`, unless a reply is using it."""
        return next((s for s in self._all if s.session == session and s.tokens and not (idle and s.busy)), None)

    def _has_row(self, sequence: Sequence, prompt: list[int]) -> bool:
        return sequence.branch is not None and sequence.tokens[: sequence.branch.n_tokens] == prompt

    def fork(self, session: Hashable, twin: Hashable) -> None:
        """Give the session `twin` what the session holds. K and V are shared in the cache: nothing is computed."""
        source = self._of(session)
        target = source and self._vacant(keep=source)
        if source is not None and target is not None and target is not source:
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
            except CacheFull as error:
                lengths = [len(part.sequence.tokens) for part in parts]
                self._cut_back(parts)
                if not self._evict():
                    raise
                if lengths != [
                    len(part.sequence.tokens) for part in parts
                ]:  # emptied: other tokens are to be decoded now
                    raise Aborted from error
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
            sequence.branch = Branch(len(sequence.tokens), sequence.row.copy(), sequence.fresh)

    def rewind(self, sequence: Sequence, n_tokens: int) -> list[int]:
        """Let only the first `n_tokens` stand, at least one. Returns what is left to decode before the next draw.

        At the sequence's branch its row comes back and nothing is left; elsewhere it is the last token, to be decoded alone
        as it was before, which gives the same bits. A cache that cannot be cut is emptied, and all of them are left.
        """
        kept, branch = sequence.tokens[:n_tokens], sequence.branch
        if branch is not None and branch.n_tokens == n_tokens and self._cut(sequence, n_tokens):
            sequence.row = branch.row.copy()
        else:
            self._cut(sequence, min(n_tokens - 1, len(sequence.tokens)))
        return [] if sequence.row is not None else kept[len(sequence.tokens) :]

    def keep(self, sequence: Sequence, n_tokens: int) -> None:
        """Let at most the first `n_tokens` stand, for others to be decoded after them; no row is wanted of the last one.

        In a cache that cannot be cut none may stand.
        """
        self._cut(sequence, min(n_tokens, len(sequence.tokens)))

    def held(self, session: Hashable) -> tuple[list[int], int]:
        """The tokens that the cache holds of a session, and the bytes of their state; nothing for one it does not hold."""
        sequence = self._of(session)
        return ([], 0) if sequence is None else (list(sequence.tokens), self._context.state_bytes(sequence.id))

    def copy_state(self, session: Hashable, tokens: list[int], payload: memoryview) -> bool:
        """Fill `payload` with a session's K and V, if it still holds these tokens and their state has that size."""
        sequence = self._of(session)
        if sequence is None or sequence.tokens != tokens or self._context.state_bytes(sequence.id) != len(payload):
            return False
        return self._context.state_into(sequence.id, payload) == len(payload)

    def adopt(self, session: Hashable, tokens: list[int], payload: memoryview) -> str | None:
        """Let a session begin with tokens and their state, in the place of idle ones. Returns why not, where it cannot be."""
        context = self._context
        if len(tokens) > context.n_ctx:
            return f"holds {len(tokens)} tokens, the context {context.n_ctx}; load a larger one (--ctx)"
        if not all(0 <= token < context.n_vocab for token in tokens):
            return f"holds tokens that the model does not have ({context.n_vocab} are known)"
        self.release(session)
        while sum(len(s.tokens) for s in self._all) + len(tokens) > context.n_ctx and self._evict():
            pass
        sequence = self._vacant()
        self._clear(sequence)
        context.state_from(sequence.id, payload)
        if context.n_positions(sequence.id) != len(tokens):
            self._clear(sequence)
            return "its state is not that of its tokens"
        sequence.tokens, sequence.session = list(tokens), session
        self._touch(sequence)
        return None

    def _reuse(self, sequence: Sequence, prompt: list[int]) -> None:
        if self._has_row(sequence, prompt):
            self.rewind(sequence, len(prompt))
        else:
            self._cut(sequence, min(n_common_tokens(sequence.tokens, prompt), len(prompt) - 1))

    def _share(self, source: Sequence, target: Sequence, n_tokens: int) -> None:
        self._clear(target)
        if not n_tokens:  # a recurrent state would be shared whole
            return
        self._context.copy(source.id, target.id, n_tokens)
        target.tokens = source.tokens[:n_tokens]
        if source.branch is not None and source.branch.n_tokens <= n_tokens:
            target.branch = source.branch

    def _usable(self, sequence: Sequence, prompt: list[int]) -> int:
        """How long a prefix of `prompt` a sequence has to give: all of its tokens or none, where the cache cannot be cut."""
        n_common = n_common_tokens(sequence.tokens, prompt)
        return n_common if self._context.can_cut or n_common == len(sequence.tokens) else 0

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
            self._cut(part.sequence, len(part.sequence.tokens))

    def _cut(self, sequence: Sequence, n_tokens: int) -> bool:
        """Let the first `n_tokens` stand. False where the cache cannot be cut there: then none of them does."""
        done = self._context.remove(sequence.id, n_tokens)
        if not done:
            n_tokens = 0
            self._context.remove(sequence.id, 0)
        del sequence.tokens[n_tokens:]
        sequence.row = None
        if sequence.branch is not None and sequence.branch.n_tokens > n_tokens:
            sequence.branch = None
        return done

    def _clear(self, sequence: Sequence) -> None:
        self._cut(sequence, 0)
        sequence.session = None

    def _touch(self, sequence: Sequence) -> None:
        self._clock += 1
        sequence.last_use = self._clock
