"""A trainer tokenises raw records, truncates them, and can read them during training."""

import re

import pytest
import torch
from torch.utils.data import IterableDataset

from lens_kernels import cli
from lens_kernels.hf import LensDistillConfig, LensDistillTrainer
from lens_kernels.hf.training.data import Encoder, load_examples
from lens_kernels.hf.training.formats import Row, iterate_rows
from lens_kernels.hf.training.preparation import Rows
from tests.support import tiny
from tests.support.commands import ROWS, arguments, interrupt, weights, write_rows
from tests.support.training import STUDENT, TEACHER

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
TOKENIZER = tiny.tokenizer()
TOKENIZER.chat_template = "{% for m in messages %}{{ m['content'] }};{% endfor %}"


@pytest.fixture(scope="module")
def models():
    return tiny.model(**STUDENT), tiny.model(**TEACHER)


def prepare(models, folder, data, evaluation=None, tokenizer=TOKENIZER, **options):
    """Return a trainer that has prepared its data."""
    args = LensDistillConfig(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        num_lens_pairs=1,
        **{"max_steps": 3, **options},
    )
    datasets = {"train_dataset": data, "eval_dataset": evaluation}
    return LensDistillTrainer(*models, args, processing_class=tokenizer, **datasets)


class Records(IterableDataset):
    """A streamed dataset of records, which can be read several times."""

    def __init__(self, records):
        self.records = records

    def __iter__(self):
        return iter(self.records)


@pytest.mark.parametrize("kind", ["prompt", "messages", "text"])
def test_a_trainer_tokenises_raw_records_as_the_command_does(models, tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    records = {
        "prompt": ROWS,
        "messages": [{"messages": TALK}] * 3,
        "text": [{"text": row["prompt"], "other": 1} for row in ROWS],
    }[kind]
    write_rows(tmp_path / "data.jsonl", records)
    expected = load_examples(tmp_path / "data.jsonl", TOKENIZER, max_length=9)
    for data in (records, datasets.Dataset.from_list(records)):
        trainer = prepare(models, tmp_path, data, {"dev": records}, max_length=9)
        assert trainer.train_dataset.examples == expected.examples
        assert trainer.eval_dataset["dev"].examples == expected.examples
    stream = prepare(models, tmp_path, Records(records), max_length=9).train_dataset
    for given, _ in zip(stream, range(9), strict=False):
        assert given in expected.examples


def test_raw_records_need_a_tokenizer_and_one_format(models, tmp_path):
    with pytest.raises(ValueError, match="train_dataset holds records .* as processing_class"):
        prepare(models, tmp_path, ROWS, tokenizer=None)
    with pytest.raises(ValueError, match="train_dataset:1: the keys 'text' in a file with the key"):
        prepare(models, tmp_path, [ROWS[0], {"text": "a"}])


def test_rows_that_are_too_long_are_counted_and_treated_as_asked(models, tmp_path, caplog):
    sizes = [("a", "b"), ("a", "bcdefg"), ("abcdef", "b")]
    rows = [Row(i, [answer], prompt=prompt) for i, (prompt, answer) in enumerate(sizes)]
    limits = {"max_length": 5, "max_prompt_length": 4}
    for truncation, dropped, cut, lost in (("end", 1, 1, 3), ("drop", 2, 0, 0)):
        encoder = Encoder(TOKENIZER, **limits, truncation=truncation)
        kept = [x for x in map(encoder, rows) if x is not None]
        assert len(kept) == 3 - dropped and all(len(x["labels"]) <= 5 for x in kept)
        assert (encoder.rows, encoder.dropped, encoder.cut, encoder.lost) == (3, dropped, cut, lost)
    assert Encoder(TOKENIZER, **limits, truncation="error")(rows[0]) == kept[0]
    for row, message in ((rows[1], "line 1 has 8 tokens, 1 of them"), (rows[2], "line 2 has 8 to")):
        with pytest.raises(ValueError, match=f"{message}.* max_length is 5 and max_prompt_length"):
            Encoder(TOKENIZER, **limits, truncation="error")(row)
    with pytest.raises(ValueError, match="truncation must be one of end, drop, error, got 'no'"):
        Encoder(TOKENIZER, truncation="no")
    prepare(models, tmp_path, ROWS, max_length=12)
    assert "7 rows, 2 dropped as too long, 3 cut at the end (23 labels lost)" in caplog.text


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 24}])
def test_a_resumed_stream_ends_with_the_same_student(files, tmp_path, monkeypatch, capsys, options):
    # The data is read more than once: a pass over the 7 rows has fewer than 6 batches.
    options = {"streaming": True, "max_steps": 6, "shuffle_buffer": 3, **options}
    assert cli.main(arguments(files, tmp_path / "whole", **options)) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\ntrain: [1-9]\d+ rows, 0 dropped as too long", shown)
    argv = arguments(files, tmp_path / "cut", **options)
    interrupt(monkeypatch, argv, before_step=6)
    assert cli.main(argv) == 0
    assert "resuming from" in capsys.readouterr().out
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], two[name]) for name in one)
    # The stream is shuffled: without a shuffle buffer, the student differs.
    assert cli.main(arguments(files, tmp_path / "plain", **options | {"shuffle_buffer": 0})) == 0
    other = weights(tmp_path / "plain")
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_streamed_rows_come_in_another_order_in_each_epoch(files):
    rows = list(iterate_rows(files / "train.jsonl"))
    stream = Rows(files / "train.jsonl", buffer=3, seed=0)
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append([row.line for row in stream])
    assert orders[0] == orders[2] != orders[1]
    assert all(sorted(order) == [row.line for row in rows] for order in orders)
    assert [row.line for row in Rows(files / "train.jsonl", 0, seed=0)] == [*range(1, 8)]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([ROWS[0], {"prompt": "a"}], "example 1 of train_dataset has no input_ids, only prompt"),
        ([ROWS[0], {"prompt": "a", "completion": 1}], "train_dataset:1: completion is a int"),
        ([{"input_ids": [64], "labels": [1]}], "input_ids of example 0 .* hold 64, but a model"),
        ([], "train_dataset gives no example in epoch 0"),
        ([{"prompt": "a" * 300, "completion": "b"}], "no example in epoch 0: .* not too long"),
    ],
)
def test_streamed_records_are_checked_when_they_are_read(models, tmp_path, records, message):
    stream = prepare(models, tmp_path, Records(records)).train_dataset
    with pytest.raises(ValueError, match=message):
        for _, _ in zip(stream, range(3), strict=False):
            pass


def test_streamed_positions_are_checked(tmp_path):
    students = tiny.model("gpt2", max_position_embeddings=8), tiny.model("gpt2")
    long = [{"input_ids": [*range(2, 11)], "labels": [*range(2, 11)]}]
    stream = prepare(students, tmp_path, Records(long)).train_dataset
    with pytest.raises(ValueError, match="example 0 .* reaches position 9, but a model has only 8"):
        next(iter(stream))


def test_a_bad_line_stops_a_stream_and_names_its_file(files, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text((files / "train.jsonl").read_text() + '{"prompt": "x"}\n')
    argv = arguments(files, tmp_path / "out", data=bad, streaming=True, shuffle_buffer=0)
    assert cli.main(argv) == 1
    assert "bad.jsonl:8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": None},
        {"teacher_cache": "cache"},
        {"teacher_targets": "targets", "teacher": None},
        {"dataloader_num_workers": 1},
    ],
)
def test_options_that_streaming_does_not_support(files, tmp_path, capsys, options):
    assert cli.main(arguments(files, tmp_path / "out", streaming=True, **options)) == 1
    assert (
        "set --max_steps, and leave --teacher_cache, --teacher_targets and"
        in capsys.readouterr().err
    )


def test_a_stream_needs_a_number_of_steps(models, tmp_path):
    with pytest.raises(ValueError, match="without a length: set max_steps"):
        prepare(models, tmp_path, Records(ROWS), max_steps=-1)
    collator = {"data_collator": lambda x: x, "train_dataset": ROWS}
    args = LensDistillConfig(output_dir=str(tmp_path), packing=True, report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="packing=True needs the default data_collator"):
        LensDistillTrainer(*models, args, **collator)
