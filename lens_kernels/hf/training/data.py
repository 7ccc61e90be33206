"""Tokenises instruction data into token ids and labels. Labels mark the tokens to train on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from jinja2 import TemplateError
from torch.utils.data import Dataset
from tqdm import tqdm

from lens_kernels.hf.training.collation import Collator, check_count, padding_id
from lens_kernels.hf.training.formats import Messages, Row, read_rows
from lens_kernels.inputs import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Unpack

__all__ = [
    "Collator",
    "Encoder",
    "Examples",
    "Row",
    "check_count",
    "load_examples",
    "padding_id",
    "prompt_ids",
    "read_rows",
]

PROMPT_STYLES = ("alpaca", "chat")
# What happens to examples that are too long: see ``Encoder``.
TRUNCATIONS = ("end", "drop", "error")

Example = dict[str, list[int]]


class EncoderOptions(TypedDict, total=False):
    """The options of ``Encoder``."""

    prompt_style: str
    max_length: int
    max_prompt_length: int
    truncation: str


@dataclass
class Encoder:
    """Tokenises rows of data, and counts the rows that are too long.

    Prompts and responses are tokenised separately, as in generation, so no token spans both.
    SentencePiece puts a space before each text, and only the first text of a row keeps it. Labels
    are the response tokens, including the end token, and -100 elsewhere. The end token is the chat
    template's end of turn, or the tokenizer's EOS if the template has none.

    Args:
        tokenizer: A tokenizer with an EOS token.
        prompt_style: The format of a prompt from an instruction. ``"alpaca"`` inserts the
            instruction into the Stanford Alpaca text. ``"chat"`` renders it as a user message with
            the tokenizer's chat template. Both styles leave ``prompt`` unchanged and render
            ``messages`` with the template. Training uses every assistant turn from
            ``row.trained_from`` on. In plain text it uses every token.
        max_length: Maximum number of tokens of an example.
        max_prompt_length: Maximum number of tokens before the first response.
        truncation: The treatment of rows that exceed a maximum. ``"end"`` keeps the first
            ``max_length`` tokens, but drops rows with a longer first prompt, and rows without a
            label in the kept tokens. ``"drop"`` drops every row that is too long. ``"error"``
            raises.

    Raises:
        ValueError: A value is out of range, the tokenizer has no EOS token, or its chat template is
            missing or rejects the messages. Or a row is too long, with ``truncation="error"``.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt_style: str = "alpaca"
    max_length: int = 512
    max_prompt_length: int = 256
    truncation: str = "end"
    # The numbers of all rows, of dropped rows, of rows that lost labels, and of lost labels.
    rows: int = field(default=0, init=False)
    dropped: int = field(default=0, init=False)
    cut: int = field(default=0, init=False)
    lost: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_count("max_length", self.max_length, 2)
        _check_prompt(self.prompt_style, self.max_prompt_length)
        if self.truncation not in TRUNCATIONS:
            raise ValueError(
                f"truncation must be one of {', '.join(TRUNCATIONS)}, got {self.truncation!r}"
            )

    def __call__(self, row: Row) -> Example | None:
        """Return ``input_ids`` and ``labels`` of a row, or None if the row is dropped."""
        self.rows += 1
        turns = _turns(row, self.tokenizer, self.prompt_style)
        example: Example = {"input_ids": [], "labels": []}
        for prompt, response in turns:
            example["input_ids"] += prompt + response
            example["labels"] += [IGNORE_INDEX] * len(prompt) + response
        size, prompt_size = len(example["labels"]), len(turns[0][0])
        long_prompt = prompt_size > self.max_prompt_length
        if self.truncation == "error" and (long_prompt or size > self.max_length):
            raise ValueError(
                f"line {row.line} has {size} tokens, {prompt_size} of them in its prompt, but"
                f" max_length is {self.max_length} and max_prompt_length is"
                f" {self.max_prompt_length}: increase them, or choose another truncation"
            )
        kept = {name: ids[: self.max_length] for name, ids in example.items()}
        unwanted = self.truncation == "drop" and size > self.max_length
        if long_prompt or unwanted or not _labelled(kept["labels"]):
            self.dropped += 1
            return None
        lost = _labelled(example["labels"]) - _labelled(kept["labels"])
        self.cut += lost > 0
        self.lost += lost
        return kept

    def summary(self) -> str:
        """Return a text with the numbers of rows that were read, dropped and cut."""
        lost = f" ({self.lost} labels lost)" if self.lost else ""
        return (
            f"{self.rows} rows, {self.dropped} dropped as too long, {self.cut} cut at the end{lost}"
        )


def _labelled(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORE_INDEX)


def prompt_ids(
    row: Row, tokenizer: PreTrainedTokenizerBase, prompt_style: str, max_prompt_length: int
) -> list[int] | None:
    """Return the tokens before the last response, or None if they exceed ``max_prompt_length``."""
    _check_prompt(prompt_style, max_prompt_length)
    if row.is_text:
        raise ValueError(f"line {row.line} is plain text: an answer needs a prompt or messages")
    *earlier, (prompt, _) = _turns(row, tokenizer, prompt_style)
    ids = [i for turn in earlier for part in turn for i in part] + prompt
    return ids if len(ids) <= max_prompt_length else None


def _turns(
    row: Row, tokenizer: PreTrainedTokenizerBase, prompt_style: str
) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of each prompt in a row, and of the response to each prompt."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token to end responses: set tokenizer.eos_token")
    if row.messages:
        return _chat_turns(row, row.messages, tokenizer)
    response = row.references[0]
    if row.is_text:
        ids = _begin(tokenizer, _ids(tokenizer, response))
        end = [tokenizer.eos_token_id] * (not response.endswith(tokenizer.eos_token))
        return [([], ids + end)]
    if row.instruction and prompt_style == "chat":
        question = f"{row.instruction}\n\n{row.input}" if row.input.strip() else row.instruction
        asked = {"role": "user", "content": question}
        answered = {"role": "assistant", "content": response}
        return _chat_turns(row, [asked, answered], tokenizer)
    prompt = _ids(tokenizer, _alpaca(row) if row.instruction else row.prompt)
    return [(_begin(tokenizer, prompt), _end(tokenizer, response, tokenizer.eos_token))]


def _alpaca(row: Row) -> str:
    further, section = "", ""
    if row.input.strip():
        further = ", paired with an input that provides further context"
        section = f"### Input:\n{row.input}\n\n"
    return (
        f"Below is an instruction that describes a task{further}. Write a response that"
        " appropriately completes the request.\n\n"
        f"### Instruction:\n{row.instruction}\n\n{section}### Response:\n"
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False silences the tokenizer's warning about long texts, which are cut or dropped
    # later.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _further_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text that follows other text.

    SentencePiece tokenizers put a space before a text that is tokenised alone. To avoid the space,
    tokenise the text after another character, and remove that character's tokens.
    """
    if not any(ids not in (None, _ids(tokenizer, "a")) for ids in _behind(tokenizer, "a")):
        return _ids(tokenizer, text)
    for ids in _behind(tokenizer, text):
        if ids is not None:
            return ids
    raise ValueError(
        f"the tokenizer adds a space before {text[:40]!r} that cannot be removed: use another"
        " tokenizer, or pass data with input_ids and labels"
    )


def _behind(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[list[int] | None]:
    """Yield ``text``'s tokens after each of two characters, or None if a token spans both."""
    for character in ("\n", "."):
        before, whole = _ids(tokenizer, character), _ids(tokenizer, character + text)
        yield whole[len(before) :] if whole[: len(before)] == before else None


def _begin(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Prepend the BOS token to ``ids`` if the tokenizer begins texts with BOS."""
    bos, letter = tokenizer.bos_token_id, _ids(tokenizer, "a")
    writes = bos is not None and tokenizer("a")["input_ids"][: 1 + len(letter)] == [bos, *letter]
    return [bos, *ids] if writes and ids[:1] != [bos] else ids


def _end(tokenizer: PreTrainedTokenizerBase, response: str, *ends: str) -> list[int]:
    """Return a response's tokens. Append EOS unless the response ends with one of ``ends``."""
    ids = _further_ids(tokenizer, response)
    return ids + [tokenizer.eos_token_id] * (not response.endswith(ends))


def _chat_turns(
    row: Row, messages: Messages, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    """Render a conversation, and return the tokens of each prompt and of the assistant's answer.

    If the template writes white space after an answer, the white space belongs to the next prompt.
    """
    # An end-of-turn token is often a special token for which the tokenizer has no attribute.
    ends = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    turns = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < row.trained_from:
            continue
        prompt = _render(row, messages[:i], tokenizer, add_generation_prompt=True)
        whole = _render(row, messages[: i + 1], tokenizer, add_generation_prompt=False)
        if not prompt.startswith(done) or not whole.startswith(prompt):
            raise ValueError(
                f"line {row.line}: the tokenizer's chat template changes the text before"
                f" messages[{i}] when later messages are added. Use a tokenizer whose template only"
                " appends text, or end the conversation after its first assistant turn"
            )
        response = whole[len(prompt) :].rstrip()
        tokenise = _further_ids if done else _ids
        opening = tokenise(tokenizer, prompt[len(done) :])
        turns.append((opening, _end(tokenizer, response, tokenizer.eos_token, *ends)))
        done = prompt + response
    return turns


def _render(
    row: Row, messages: Messages, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool
) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"line {row.line}: the tokenizer has no chat template: use another tokenizer"
            + (
                ", or rows with prompt and completion"
                if row.messages
                else ', or prompt_style="alpaca"'
            )
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except TemplateError as error:
        raise ValueError(
            f"line {row.line}: the tokenizer's chat template rejects the messages ({error}):"
            " correct them, or use another tokenizer"
        ) from error


def _check_prompt(prompt_style: str, max_prompt_length: int) -> None:
    if prompt_style not in PROMPT_STYLES:
        raise ValueError(
            f"prompt_style must be one of {', '.join(PROMPT_STYLES)}, got {prompt_style!r}"
        )
    check_count("max_prompt_length", max_prompt_length, 1)


class Examples(Dataset[dict[str, list[int] | int]]):
    """A dataset of encoded rows. The ``example_id`` of an example is its position.

    Args:
        examples: The rows that ``encoder`` has returned.
        encoder: The ``Encoder`` that made the examples. It has counted the dropped rows.

    Attributes:
        examples: The encoded rows, each with the lists ``input_ids`` and ``labels``.
        dropped: Number of rows that were left out.
        cut: Number of rows that lost tokens with a label.
    """

    def __init__(self, examples: Sequence[Example], encoder: Encoder) -> None:
        self.examples = examples
        self.dropped, self.cut = encoder.dropped, encoder.cut
        self._counts = encoder.summary()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int] | int]:
        position = range(len(self))[index]  # the index may be negative
        return {**self.examples[position], "example_id": position}

    def summary(self) -> str:
        """Return one line with the numbers of rows, tokens and labels."""
        tokens = sum(len(x["labels"]) for x in self.examples)
        learnt = sum(_labelled(x["labels"]) for x in self.examples)
        return f"{self._counts}; {tokens} tokens, {learnt} with a label"


def load_examples(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: bool = True,
    **options: Unpack[EncoderOptions],
) -> Examples:
    """Read and encode all rows of a source. Rows that ``Encoder`` drops are left out.

    Args:
        path: A source of records, as for ``--data``: a file, a saved dataset, ``hub:NAME`` or a
            pattern. ``docs/data.md`` describes the formats.
        tokenizer: A tokenizer with an EOS token.
        progress: Show a progress bar.
        **options: Options of ``Encoder``.

    Raises:
        ValueError: ``read_rows`` or ``Encoder`` fails, or every row is too long.
    """
    return encode_rows(str(path), read_rows(path), Encoder(tokenizer, **options), progress)


def encode_rows(
    name: str, rows: Sequence[Row], encoder: Encoder, progress: bool = True
) -> Examples:
    """Encode ``rows``. If all of them are dropped, raise an error that names the data ``name``."""
    bar = tqdm(rows, "Encoding", disable=not progress, delay=1)  # short files need no progress bar
    examples = [x for x in map(encoder, bar) if x is not None]
    if not examples:
        raise ValueError(
            f"all {len(rows)} rows of {name} are too long for max_prompt_length"
            f" {encoder.max_prompt_length} and max_length {encoder.max_length}: increase them"
        )
    return Examples(examples, encoder)
