"""Time against error of the approximation ``grad_threshold``, on hidden states of real models.

    python benchmarks/active_vocabulary.py --teacher DIR --data FILE.jsonl --trained FOLDER ...

``--trained`` names what ``lens-kernels train`` wrote for students cut from the teacher. Each is
taken in two states: before training, as its blocks are cut from the teacher, and after. Runs that
began alike share the first. In each state two groups are judged: all lens pairs in one call (JSD,
through the norm), and the final hidden states alone (forward KL).

The error of a gradient is ``|g - exact| / |exact|`` in the 2-norm, of the hidden gradients the
largest over the pairs. ``bf16_rounding`` is what the exact gradients suffer by being rounded to
bfloat16 and nothing else, of the hidden ones the smallest over the pairs: the stricter yardstick.
Times are of loss and backward on the same inputs, interleaved; a ratio to the floor (the four
products of each pair) is taken within each round, and its median counts. Groups that are in the
CSV already are not measured again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works without an install

from benchmarks import harness, memory_vs_vocab, plot, speed_vs_floor  # noqa: E402
from benchmarks.shapes import Inputs  # noqa: E402
from lens_kernels import LensHead, symmetric_lens_loss  # noqa: E402
from lens_kernels.backends import head_products  # noqa: E402
from lens_kernels.hf.model.capture import hidden_states  # noqa: E402
from lens_kernels.hf.model.families import lens_head_from  # noqa: E402
from lens_kernels.hf.model.loading import load_model, load_tokenizer  # noqa: E402
from lens_kernels.hf.model.student import shallow_copy  # noqa: E402
from lens_kernels.hf.training import command  # noqa: E402
from lens_kernels.hf.training.config import LensDistillConfig  # noqa: E402
from lens_kernels.hf.training.data import Collator, Example, load_examples, padding_id  # noqa: E402
from lens_kernels.validation import IGNORE_INDEX  # noqa: E402

CPU = torch.device("cpu")
THRESHOLDS = [1e-7, 3e-7, 1e-6, 2e-6, 3e-6, 1e-5, 3e-5, "bf16"]
GROUPS = {"lens": "jsd", "final": "forward_kl"}
WRONG = 0.1  # an error above which nothing is timed
SMALL_ERROR, WANTED_RATIO = 1e-3, 0.80  # what a threshold must reach to be worth its while
HEADER = ["run and state", "group", "threshold", "used %", "dropped %", "hidden error"]
HEADER += ["head error", "x floor", "range"]
MEASURED = ["used_share", "dropped_share", "hidden_error", "head_error", "median_ms", "min_ms"]
MEASURED += ["max_ms", "ratio_to_floor", "min_ratio_to_floor", "max_ratio_to_floor"]

Threshold = Any  # what grad_threshold takes
Row = dict[str, Any]
Key = tuple[str, str, str]  # run, state and group


@dataclass(frozen=True)
class Trained:
    """A folder that ``lens-kernels train`` wrote, and its options."""

    folder: Path
    blocks: list[int]
    run: command.RunConfig
    config: LensDistillConfig

    def beginning(self) -> str:
        """Return what the state before training depends on."""
        run, config = self.run, self.config
        layers = config.student_layers, config.teacher_layers, config.num_lens_pairs
        return str((self.blocks, layers, run.prompt_style, run.max_length, run.max_prompt_length))

    def examples(self, data: Path, tokenizer: Any, tokens: int) -> Sequence[Example]:
        """Return as many examples, encoded as in training, as hold ``tokens`` counted positions."""
        names = "prompt_style", "max_length", "max_prompt_length"
        found = load_examples(data, tokenizer, **{name: getattr(self.run, name) for name in names})
        counted = 0
        for number, example in enumerate(found.examples, 1):
            counted += sum(label != IGNORE_INDEX for label in example["labels"][1:])
            if counted >= tokens:
                return found.examples[:number]
        raise ValueError(
            f"--tokens {tokens} is more than the {counted} positions with a label one step on that"
            f" {data} holds as {self.folder.name} reads it: pass --tokens {counted}, or more data"
        )


@dataclass(frozen=True, eq=False)
class Group:
    """What one call compares, and the heads that it goes through."""

    inputs: Inputs
    heads: tuple[LensHead, LensHead]
    divergence: str

    def gradients(self, threshold: Threshold) -> tuple[Tensor, ...]:
        """Return the gradients of the hidden states and, last, of the head."""
        loss = symmetric_lens_loss(
            self.inputs.student_hidden,
            self.inputs.teacher_hidden,
            *self.heads,
            divergence=self.divergence,
            grad_threshold=threshold,
        )
        return torch.autograd.grad(loss, self.inputs.leaves())


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the CSV lacks, then print the table and draw."""
    args = parse(argv)
    start = time.perf_counter()
    path = args.out / "active_vocabulary.csv"
    conditions = {"tokens": args.tokens, "rounds": args.rounds, "data": args.data.name}
    conditions |= {"teacher": args.teacher.name} | harness.environment(CPU)
    done = read_results(path, conditions)
    students = read_trained(args.trained)
    tokenizer = load_tokenizer(str(args.teacher))
    # All data before any model: what is missing shows at once.
    examples = [student.examples(args.data, tokenizer, args.tokens) for student in students]
    teacher = load_model(str(args.teacher), "float32")
    begun: set[str] = set()
    wanted = {*map(str, args.thresholds)}
    for trained, chosen in zip(students, examples, strict=True):
        batch = Collator(padding_id(tokenizer))(chosen)
        states = ["after"] if trained.beginning() in begun else ["before", "after"]
        begun.add(trained.beginning())
        for state in states:
            keys = [(trained.folder.name, state, group) for group in GROUPS]
            lacking = [key for key in keys if not wanted <= {r["threshold"] for r in done[key]}]
            if not lacking:
                print(f"{trained.folder.name} {state}: is there already")
                continue
            groups = groups_of(trained, state, teacher, batch, args.tokens)
            for key in lacking:
                print(" ".join(key), flush=True)
                measured = measure(groups[key[2]], args.thresholds, args.rounds)
                names = dict(zip(("run", "state", "group"), key, strict=True))
                names["student_blocks"] = " ".join(map(str, trained.blocks))
                done[key] = [names | row | conditions for row in measured]
                harness.write_csv(path, [row for rows in done.values() for row in rows])
    rows = [row for rows in done.values() for row in rows]
    print()
    harness.print_table(HEADER, [cells(row) for row in rows if row["threshold"] != "floor"])
    print("\n" + "\n".join(verdicts(rows)))
    png = args.figure or path.with_suffix(".png")
    drawn = plot.active_vocabulary(path, png, SMALL_ERROR, WANTED_RATIO)
    picture = png if drawn else memory_vs_vocab.drawn_not()
    print(f"{path}\n{picture}\n{time.perf_counter() - start:.0f} s")


def threshold_of(text: str) -> Threshold:
    """Return a number, or a name for the library to check."""
    try:
        return float(text)
    except ValueError:
        return text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--teacher", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--trained", type=Path, required=True, nargs="+", metavar="FOLDER")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after one to warm up")
    parser.add_argument("--thresholds", type=threshold_of, nargs="+", default=THRESHOLDS)
    parser.add_argument("--out", type=Path, default=harness.OUT, metavar="DIR")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="default: beside the CSV")
    return parser.parse_args(argv)


def read_results(path: Path, conditions: Mapping[str, Any]) -> defaultdict[Key, list[Row]]:
    """Return the rows that are there already, by run, state and group.

    Raises:
        RuntimeError: They were measured otherwise.
    """
    done: defaultdict[Key, list[Row]] = defaultdict(list)
    for row in harness.read_own_csv(path, conditions):
        done[row["run"], row["state"], row["group"]].append(row)
    return done


def read_trained(folders: Sequence[Path]) -> list[Trained]:
    """Return the runs in folders.

    Raises:
        ValueError: No run, one whose student was not cut from a model, or two of one name.
    """
    students = []
    for folder in folders:
        record = folder / command.RECORD
        if not record.is_file():
            raise ValueError(
                f"--trained {folder} holds no {command.RECORD}: give a folder that lens-kernels"
                " train wrote"
            )
        run, config, _ = command.parse(["--config", str(record)])
        if run.student_blocks is None:
            raise ValueError(
                f"{record} has no student_blocks, and what the student was before training is"
                " unknown: give a run that cut its student from the teacher"
            )
        students.append(Trained(folder, run.student_blocks, run, config))
    names = [folder.name for folder in folders]
    if len({*names}) < len(names):
        raise ValueError(f"--trained names {names}, and results go by name: give each its own")
    return students


def groups_of(
    trained: Trained, state: str, teacher: Any, batch: Mapping[str, Tensor], tokens: int
) -> dict[str, Group]:
    """Return both groups of a student in a state, of the first counted positions of a batch."""
    if state == "before":
        student = shallow_copy(teacher, trained.blocks)
    else:
        student = load_model(str(trained.folder), "float32")
    inputs = dict(batch)
    counted = inputs.pop("labels")[:, 1:] != IGNORE_INDEX

    @torch.no_grad()
    def rows(model: Any, layers: Sequence[int]) -> list[Tensor]:
        hidden, final = hidden_states(model, layers, inputs)
        return [x[:, :-1][counted][:tokens] for x in (*hidden, final)]

    layers = trained.config.layers(student, teacher)
    mine, theirs = (rows(m, depths) for m, depths in zip((student, teacher), layers, strict=True))
    head, teacher_head = lens_head_from(student), lens_head_from(teacher)
    leaf = head.weight.detach().requires_grad_()
    heads = replace(head, weight=leaf), teacher_head
    # The model has normed its final states already.
    bare = replace(heads[0], norm=None), replace(teacher_head, norm=None)
    groups = {}
    for name, part, used in (("lens", slice(-1), heads), ("final", slice(-1, None), bare)):
        hidden = [x.requires_grad_() for x in mine[part]]
        weights = leaf, teacher_head.weight.detach()
        groups[name] = Group(Inputs(hidden, theirs[part], *weights), used, GROUPS[name])
    return groups


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Count the logits' gradients, in number and absolute sum: all, and those that are used."""
    seen = dict.fromkeys(("all", "all mass", "used", "used mass"), 0.0)
    add, whole, active = head_products.Survey.add, head_products.whole, head_products.active

    def count(what: str, grad: Tensor) -> None:
        seen[what] += grad.numel()
        seen[f"{what} mass"] += float(grad.abs().sum(dtype=torch.float64))

    def survey(self: head_products.Survey, grad: Tensor) -> None:
        count("all", grad)
        add(self, grad)

    def all_products(grad: Tensor, *args: Any) -> Tensor | None:
        count("used", grad)
        return whole(grad, *args)

    def some_products(grad: Tensor, columns: Tensor, *args: Any) -> Tensor | None:
        count("used", grad[:, columns])
        return active(grad, columns, *args)

    with (
        mock.patch.object(head_products.Survey, "add", survey),
        mock.patch.object(head_products, "whole", all_products),
        mock.patch.object(head_products, "active", some_products),
    ):
        yield seen


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Return the relative error of each gradient."""
    return [
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(found, exact, strict=True)
    ]


def judge(group: Group, thresholds: Sequence[Threshold]) -> dict[str, Row]:
    """Return by name the yardstick, and what the exact gradients and those of thresholds are.

    Raises:
        RuntimeError: A threshold is wrong by more than a tenth, or something is not a number.
    """
    exact = group.gradients(None)
    *hidden, head = errors([g.bfloat16() for g in exact], exact)
    rows = {"bf16_rounding": _errors(min(hidden), head)}
    rows["exact"] = _errors(0.0, 0.0) | {"used_share": "1", "dropped_share": "0"}
    for threshold in thresholds:
        with watched() as seen:
            found = group.gradients(threshold)
        *hidden, head = errors(found, exact)
        by_name = {f"hidden state {i}": error for i, error in enumerate(hidden)} | {"head": head}
        for what, error in by_name.items():
            if not error <= WRONG:  # not "above": a NaN is to be seen
                raise RuntimeError(
                    f"grad_threshold {threshold} gives the gradient of the {what} a relative"
                    f" error of {error:.2g}, and nothing above {WRONG} is timed: pass smaller"
                    " --thresholds, and look for NaN in the models if that does not help"
                )
        rows[str(threshold)] = _errors(max(hidden), head) | {
            "used_share": f"{seen['used'] / seen['all']:.5g}",
            "dropped_share": f"{max(0.0, 1 - seen['used mass'] / seen['all mass']):.4g}",
        }
    return rows


def _errors(hidden: float, head: float) -> Row:
    return {"hidden_error": f"{hidden:.3g}", "head_error": f"{head:.3g}"}


def timed(group: Group, thresholds: Sequence[Threshold], rounds: int) -> dict[str, Row]:
    """Return times and ratios to the floor, by threshold."""
    functions: dict[str, Callable[[], Any]] = {
        "floor": lambda: speed_vs_floor.products(group.inputs),
        "exact": lambda: group.gradients(None),
    }
    functions |= {str(t): partial(group.gradients, t) for t in thresholds}
    timings = harness.time_interleaved(functions, rounds, CPU)
    rows = {}
    for name, timing in timings.items():
        pairs = zip(timing.times_ms, timings["floor"].times_ms, strict=True)
        ratios = [mine / floor for mine, floor in pairs]
        rows[name] = {
            "median_ms": f"{timing.median_ms:.2f}",
            "min_ms": f"{min(timing.times_ms):.2f}",
            "max_ms": f"{max(timing.times_ms):.2f}",
            "ratio_to_floor": f"{statistics.median(ratios):.3f}",
            "min_ratio_to_floor": f"{min(ratios):.3f}",
            "max_ratio_to_floor": f"{max(ratios):.3f}",
        }
    return rows


def measure(group: Group, thresholds: Sequence[Threshold], rounds: int) -> list[Row]:
    """Return the rows of a group; nothing is timed that is wrong."""
    judged = judge(group, thresholds)
    times = timed(group, thresholds, rounds)
    inputs = group.inputs
    sizes = {
        "divergence": group.divergence,
        "pairs": len(inputs.student_hidden),
        "vocab_entries": inputs.student_head.shape[0],
        "student_width": inputs.student_head.shape[1],
        "teacher_width": inputs.teacher_head.shape[1],
    }
    blank = dict.fromkeys(MEASURED, "")
    return [
        {"threshold": name, **blank, **judged.get(name, {}), **times.get(name, {}), **sizes}
        for name in ("floor", *judged)
    ]


def cells(row: Row) -> list[str]:
    """Return a line of the table."""

    def percent(value: str) -> str:
        return f"{100 * float(value):.3g}" if value else ""

    place = [f"{row['run']} {row['state']}", row["group"], row["threshold"]]
    shares = [percent(row["used_share"]), percent(row["dropped_share"])]
    ends = f"{row['min_ratio_to_floor']} to {row['max_ratio_to_floor']}" if row["min_ms"] else ""
    return [*place, *shares, row["hidden_error"], row["head_error"], row["ratio_to_floor"], ends]


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Say for each lens state how quick a threshold of small errors is."""
    lines = []
    lens = [row for row in rows if row["group"] == "lens" and row["used_share"]]
    for run, state in dict.fromkeys((row["run"], row["state"]) for row in lens):
        good = [
            (float(row["ratio_to_floor"]), row["threshold"])
            for row in lens
            if (row["run"], row["state"]) == (run, state)
            and row["threshold"] != "exact"
            and max(float(row["hidden_error"]), float(row["head_error"])) < SMALL_ERROR
        ]
        said = "no threshold"
        if good:
            ratio, threshold = min(good)
            met = "is" if ratio < WANTED_RATIO else "is not"
            said = f"{ratio:.3f} of the floor at {threshold}, which {met} below {WANTED_RATIO:.2f}"
        lines.append(f"{run} {state}, lens, both errors below {SMALL_ERROR:g}: {said}")
    return lines


if __name__ == "__main__":
    main()
