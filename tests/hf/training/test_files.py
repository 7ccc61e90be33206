"""Records can be read from every kind of file, and in the formats of other libraries."""

import gzip
import hashlib
import json

import pytest

from lens_kernels.hf.training.data import Encoder, Row, prompt_ids, read_rows
from lens_kernels.hf.training.files import check_download, source_digest
from tests.support.encoding import CHAT, TALK, bpe, halves

PAIRS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(3)]
ROWS = [Row(i + 1, [f"answer {i}"], prompt=f"question {i}") for i in range(3)]
LIMITS = {"prompt_style": "chat", "max_length": 512, "max_prompt_length": 256}


def lines(records):
    return "".join(json.dumps(x) + "\n" for x in records).encode()


def write_json(path):
    path.write_bytes(lines(PAIRS))


def write_array(path):
    path.write_text("\ufeff \n" + json.dumps(PAIRS, indent=1))


def write_gzip(path):
    path.write_bytes(gzip.compress(lines(PAIRS)))


def write_parquet(path):
    pytest.importorskip("datasets").Dataset.from_list(PAIRS).to_parquet(path)


def save(path):
    pytest.importorskip("datasets").Dataset.from_list(PAIRS).save_to_disk(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("data.jsonl", write_json),
        ("data.json", write_json),
        ("data.json", write_array),
        ("data.jsonl.gz", write_gzip),
        ("data.json.gz", write_gzip),
        ("data.parquet", write_parquet),
        ("part[1].parquet", write_parquet),
        ("saved", save),
    ],
)
def test_each_kind_of_file_gives_the_same_rows(tmp_path, name, write):
    write(tmp_path / name)
    assert read_rows(tmp_path / name) == ROWS


def test_a_pattern_reads_its_files_in_order(tmp_path):
    for name, records in (("b", PAIRS[1:]), ("a", PAIRS[:1])):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(records))
    (tmp_path / "a.txt").write_text("not data")
    rows = read_rows(tmp_path / "*.jsonl")
    assert [row.prompt for row in rows] == [row.prompt for row in ROWS]
    with pytest.raises(ValueError, match=r"no file matches the pattern .*\*.csv"):
        read_rows(tmp_path / "*.csv")


def test_errors_name_the_file_and_the_position(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([*PAIRS, {"prompt": "a"}]))
    with pytest.raises(ValueError, match=r"a\.json:4: got the keys \['prompt'\]"):
        read_rows(tmp_path / "*.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.json", b'[{"prompt": "a"},\n x]', r"not JSON at line 2, column 2"),
        ("data.json", b"[" * 100_000, "nested too deeply"),
        ("data.jsonl.gz", gzip.compress(lines(PAIRS))[:-9], "not a complete gzip file"),
        ("data.jsonl.gz", b"plain", "not a complete gzip file"),
        ("data.parquet", b"PAR1 damaged PAR1", "is not a readable Parquet file"),
        ("data.parquet", b"", "is not a readable Parquet file"),
        ("data.json", b"[]", "is empty"),
        ("folder/x", b"", "is not a dataset saved by datasets"),
    ],
    # Automatic ids would contain gzip data, in which the time differs between processes.
    ids=["array", "nesting", "cut gzip", "no gzip", "Parquet", "empty", "no rows", "folder"],
)
def test_damaged_files_are_refused_by_name(tmp_path, name, content, message):
    if "Parquet" in message or "datasets" in message:
        pytest.importorskip("datasets")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    path = path.parent if "/" in name else path
    with pytest.raises(ValueError, match=message) as error:
        read_rows(path)
    assert str(path) in str(error.value)


def test_the_splits_of_a_saved_dataset_are_named(tmp_path):
    library = pytest.importorskip("datasets")
    library.DatasetDict({"dev": library.Dataset.from_list(PAIRS)}).save_to_disk(tmp_path / "all")
    with pytest.raises(ValueError, match="all holds the splits dev: give the folder of one"):
        read_rows(tmp_path / "all")
    assert read_rows(tmp_path / "all" / "dev") == ROWS


def written(tmp_path, record):
    (tmp_path / "data.jsonl").write_bytes(lines([record]))
    return read_rows(tmp_path / "data.jsonl")


def said(message):
    speaker = {"user": "human", "assistant": "gpt"}[message["role"]]
    return {"from": speaker, "value": message["content"]}


def test_sharegpt_conversations_equal_messages(tmp_path):
    same = written(tmp_path, {"messages": TALK})
    assert written(tmp_path, {"conversations": [said(m) for m in TALK], "id": 3}) == same
    with pytest.raises(ValueError, match=r"conversations\[0\].from is 'me': expected one of hum"):
        written(tmp_path, {"conversations": [{"from": "me", "value": "a"}]})


def test_only_the_completion_of_a_conversation_is_trained_on(tmp_path):
    tokenizer = bpe()
    (row,) = written(tmp_path, {"prompt": TALK[:3], "completion": TALK[3:]})
    text, learnt = halves(tokenizer, Encoder(tokenizer, **LIMITS)(row))
    (every,) = written(tmp_path, {"messages": TALK})
    text_of_all, learnt_of_all = halves(tokenizer, Encoder(tokenizer, **LIMITS)(every))
    assert text == text_of_all
    assert learnt == ["two<|im_end|>"] and learnt_of_all == [" one <|im_end|>", *learnt]


def test_plain_text_is_trained_on_as_a_whole(tmp_path):
    tokenizer = bpe(bos=True)
    # Instruction data often has a column with the whole text, which is ignored.
    record = {"instruction": "Say it.", "output": "yes", "input": None, "text": "whole"}
    assert written(tmp_path, record) == [Row(1, ["yes"], instruction="Say it.")]
    (row,) = written(tmp_path, {"text": "abcd"})
    example = Encoder(tokenizer, **LIMITS)(row)
    assert tokenizer.decode(example["input_ids"]) == "<s>abcd</s>"
    assert example["labels"] == example["input_ids"]
    with pytest.raises(ValueError, match="line 1 is plain text: an answer needs a prompt"):
        prompt_ids(row, tokenizer, prompt_style="chat", max_prompt_length=9)


def test_templates_receive_the_calls_of_tools(tmp_path):
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    talk = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "2", "name": "f"},
        {"role": "assistant", "content": "two"},
    ]
    (row,) = written(tmp_path, {"messages": talk})
    template = CHAT.replace(
        "{{ m.content }}",
        "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}",
    )
    tokenizer = bpe(template)
    text, learnt = halves(tokenizer, Encoder(tokenizer, **LIMITS)(row))
    assert "tool\n2<|im_end|>" in text
    assert learnt == ["f<|im_end|>", "two<|im_end|>"]


def test_digests_follow_the_content_of_every_file(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(lines(PAIRS))
    one, both = source_digest(tmp_path / "a.jsonl"), source_digest(tmp_path / "*.jsonl")
    assert one == hashlib.sha256(lines(PAIRS)).hexdigest() != both
    save(tmp_path / "saved")
    saved = source_digest(tmp_path / "saved")
    assert source_digest(tmp_path / "saved") == saved
    (tmp_path / "b.jsonl").write_bytes(lines(PAIRS[1:]))
    (tmp_path / "saved" / "state.json").write_text("{}")
    assert source_digest(tmp_path / "*.jsonl") != both
    assert source_digest(tmp_path / "saved") != saved


def test_hub_datasets_need_a_download(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, split, streaming):
        asked.append((name, split))
        return datasets.Dataset.from_list(PAIRS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("hub:owner/name") == read_rows("hub:owner/name:test[:3]") == ROWS
    assert asked == [("owner/name", "train"), ("owner/name", "test[:3]")]
    assert source_digest("hub:owner/name") == source_digest("hub:owner/name")
    check_download("hub:owner/name", True)
    with pytest.raises(ValueError, match="on the Hugging Face Hub: allow downloads with --allow"):
        check_download("hub:owner/name", False)
