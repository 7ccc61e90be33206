"""The command ``lens-kernels student``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from lens_kernels.hf.model.anatomy import blocks_of
from lens_kernels.hf.model.loading import DTYPES, load_model, load_tokenizer
from lens_kernels.hf.model.student import shallow_copy


def make_student(argv: Sequence[str], say: Callable[[str], None]) -> None:
    """Make a student from some blocks of its teacher, and write it to a folder.

    Raises:
        ValueError: A block does not exist, the copy fails, or the folder has files.
    """
    parser = argparse.ArgumentParser(
        prog="lens-kernels student",
        description="Make a student of some blocks of its teacher, and its embeddings and head.",
        allow_abbrev=False,
    )
    parser.add_argument("--teacher", required=True, help="folder or Hub name of the teacher")
    parser.add_argument("--output", type=Path, required=True, help="folder for the student")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--blocks", nargs="+", type=block_range, metavar="I-J", help="blocks to keep; 1 is first"
    )
    which.add_argument(
        "--num_blocks", "--num-blocks", type=int, metavar="N", help="keep N blocks, evenly spaced"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the weights; default %(default)s"
    )
    parser.add_argument(
        "--allow_download", "--allow-download", action="store_true", help="allow the Hub"
    )
    args = parser.parse_args(argv)
    if args.output.exists() and any(args.output.iterdir()):
        raise ValueError(f"the folder {str(args.output)!r} has files: give another --output")
    tokenizer = load_tokenizer(args.teacher, args.allow_download)
    teacher = load_model(args.teacher, args.dtype, args.allow_download)
    total = len(blocks_of(teacher))
    if args.num_blocks is None:
        blocks = [i for part in args.blocks for i in part]
    else:
        blocks = even_blocks(args.num_blocks, total)
    student = shallow_copy(teacher, blocks)
    student.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    sizes = [sum(x.numel() for x in model.parameters()) for model in (student, teacher)]
    say(
        f"{args.output}: blocks {' '.join(map(str, blocks))} of {total};"
        f" {sizes[0]:,} of {sizes[1]:,} parameters"
    )


def block_range(text: str) -> range:
    """Parse ``7`` or ``1-11``."""
    first, dash, last = text.partition("-")
    try:
        numbers = int(first), int(last if dash else first)
    except ValueError:
        numbers = (1, 0)
    if numbers[0] > numbers[1]:
        raise argparse.ArgumentTypeError(f"must be a block or a range such as 1-11, got {text!r}")
    return range(numbers[0], numbers[1] + 1)


def even_blocks(number: int, total: int) -> list[int]:
    """Return evenly spaced blocks, including the first and the last.

    Raises:
        ValueError: ``number`` is not in [1, total].
    """
    if not 1 <= number <= total:
        raise ValueError(f"num_blocks must lie in [1, {total}], got {number}")
    steps = max(1, number - 1)
    return [1 + (2 * i * (total - 1) + steps) // (2 * steps) for i in range(number)]
