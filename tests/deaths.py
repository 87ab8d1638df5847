"""An engine that dies of one request, in the place of the interpreter of its process. POSIX only."""

from __future__ import annotations

import sys
from pathlib import Path

POISON_TEXT, POISON_SEED, DEADLY_TOKEN = "poison", 666, 10
# While a text with the word in it is made into tokens; at the tenth token of a reply with the seed; or by its own tokenizer, of
# which a long run of letters takes more stack than there is.
PLANTS = {
    "prompt": """
    from qwq_lite.backend.vocab import Vocab
    tokenize = Vocab.tokenize
    def deadly(vocab, text, *how, **named):
        if {text!r} in text:
            signal.raise_signal(signal.SIGSEGV)
        return tokenize(vocab, text, *how, **named)
    Vocab.tokenize = deadly
""",
    "token": """
    from qwq_lite.engine.request import ActiveReply
    take = ActiveReply.take
    def deadly(reply, token, time_s=None):
        if reply.request.seed == {seed} and len(reply.track.tokens) == {token}:
            signal.raise_signal(signal.SIGSEGV)
        return take(reply, token, time_s)
    ActiveReply.take = deadly
""",
    "stack": """
    from qwq_lite.backend import pretokenizer
    pretokenizer.call = lambda work, text, pre, bounded: work()
""",
}
SCRIPT = """#!{python}
import signal, sys

def plant():
{plant}

code = sys.argv[2].split("; ", 2)  # the path of the packages, what is to be run, its start
exec("; ".join(code[:2]))
plant()
exec(code[2])
"""


def interpreter(folder: Path, kind: str) -> Path:
    """What to give `load` as `python`, for an engine that dies of one kind of request."""
    plant = PLANTS[kind].format(text=POISON_TEXT, seed=POISON_SEED, token=DEADLY_TOKEN)
    path = folder / f"python-{kind}"
    path.write_text(SCRIPT.format(python=sys.executable, plant=plant))
    path.chmod(0o755)
    return path
