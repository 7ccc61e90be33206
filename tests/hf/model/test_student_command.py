"""``lens-kernels student`` writes a model with some of a teacher's blocks, or explains errors."""

import re

import pytest
import torch

from lens_kernels import cli
from lens_kernels.hf.model.loading import load_model, load_tokenizer
from lens_kernels.hf.model.student import shallow_copy
from lens_kernels.hf.model.student_command import block_range, even_blocks
from tests.support import tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "teacher"
    tiny.model("gemma2", layers=6).to(torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "blocks"),
    [(["--blocks", "1-2", "4", "6"], [1, 2, 4, 6]), (["--num_blocks", "3"], [1, 4, 6])],
)
def test_the_student_has_the_blocks_and_dtype_of_the_teacher(
    teacher, tmp_path, options, blocks, capsys
):
    argv = ["student", "--teacher", str(teacher), "--output", str(tmp_path / "s"), *options]
    assert cli.main(argv) == 0
    assert f"blocks {' '.join(map(str, blocks))} of 6" in capsys.readouterr().out
    student = load_model(str(tmp_path / "s"))
    expected = shallow_copy(load_model(str(teacher)), blocks).state_dict()
    assert student.state_dict().keys() == expected.keys()
    for name, x in student.state_dict().items():
        assert x.dtype is torch.bfloat16 and torch.equal(x, expected[name])
    assert load_tokenizer(str(tmp_path / "s")).get_vocab() == tiny.tokenizer().get_vocab()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blocks", "5-7"], "blocks must lie in [1, 6], got 7"),
        (["--num_blocks", "7"], "num_blocks must lie in [1, 6], got 7"),
    ],
)
def test_blocks_that_do_not_exist_are_refused(teacher, tmp_path, options, message, capsys):
    argv = ["student", "--teacher", str(teacher), "--output", str(tmp_path / "s"), *options]
    assert cli.main(argv) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_no_file_is_overwritten_and_the_blocks_must_be_given(teacher, tmp_path, capsys):
    (tmp_path / "mine").write_text("kept")
    argv = ["student", "--teacher", str(teacher), "--output", str(tmp_path)]
    assert cli.main([*argv, "--num-blocks", "2"]) == 1
    assert "has files: give another --output" in capsys.readouterr().err
    for wrong in ([], ["--blocks", "3-1"], ["--blocks", "x"], ["--blocks", "1", "--num_blocks=1"]):
        assert cli.main([*argv, *wrong]) == 1
        assert re.search("give either blocks or|blocks must be", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("number", "total", "expected"),
    [
        (1, 6, [1]),
        (6, 6, [1, 2, 3, 4, 5, 6]),
        (3, 5, [1, 3, 5]),
        (2, 9, [1, 9]),
        (4, 10, [1, 4, 7, 10]),
    ],
)
def test_even_blocks_hold_the_first_and_the_last(number, total, expected):
    assert even_blocks(number, total) == expected
    assert list(block_range("2-4")) == [2, 3, 4] and list(block_range("7")) == [7]
