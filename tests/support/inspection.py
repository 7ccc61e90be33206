"""An inspection of two tiny models whose tokens are hard to draw or to show in HTML."""

from __future__ import annotations

from tests.support import tiny

ODD = [
    "$a$",
    "<script>alert(1)</script>",
    '"&',
    "日本",
    "",
    " x",
    "\n",
    "\x07",
    "Supercalifragilistic",
]
TEXT = [9, 4, 1, 5, 0, 7, 2, 6]


class OddTokenizer:
    """A tokenizer that reads numbers as ids of tokens in the list ``ODD``."""

    def __call__(self, text):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids):
        return ODD[ids[0]] if ids[0] < len(ODD) else f"w{ids[0]}"

    def convert_ids_to_tokens(self, token):
        return self.decode([token])


def inspected(output):
    """Return an inspection of ``TEXT`` and two models. Its files are in ``output``."""
    from lens_kernels.hf import inspect_lens

    student, teacher = tiny.model(layers=3, seed=1), tiny.model(layers=5, width=24, seed=2)
    options = {"teacher": teacher, "pairs": ([1, 2], [1, 3]), "top_k": 4}
    result = inspect_lens(student, OddTokenizer(), " ".join(map(str, TEXT)), **options)
    result.write(output)
    return result
