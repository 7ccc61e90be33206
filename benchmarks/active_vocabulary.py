"""Time against error of the ``grad_threshold`` approximation, on hidden states of real models.

    python benchmarks/active_vocabulary.py --teacher DIR --data FILE.jsonl --trained FOLDER ...

``--trained`` names output folders of ``lens-kernels train``. Their students were cut from the
teacher, and are measured before and after training. Runs that start from the same student share the
measurement before training. Each measurement has two groups of hidden states: all lens pairs in one
call (JSD, with the norm), and the final hidden states alone (forward KL).

The relative error of a gradient is ``|g - exact| / |exact|`` in the 2-norm. For hidden states, the
largest error over the pairs is reported. ``bf16_rounding`` is the error of rounding the exact
gradients to bfloat16. For hidden states, its smallest error over the pairs is reported, which is
the stricter reference. Loss and backward are timed in interleaved rounds. The floor is the time of
the GEMMs alone, and the ratio to the floor is the median of the ratios within the rounds. Groups
that are already in the CSV are not measured again.
"""

from __future__ import annotations

import argparse
import statistics
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

if not __package__:
    import checkout  # noqa: F401

from benchmarks.support import environment, plot, products, tables, timing
from benchmarks.support.plot import SMALL_ERROR, WANTED_RATIO
from benchmarks.support.shapes import Inputs, Job
from lens_kernels import LensHead, symmetric_lens_loss
from lens_kernels.backends import head_products
from lens_kernels.hf.model.anatomy import lens_head_from
from lens_kernels.hf.model.capture import hidden_states
from lens_kernels.hf.model.loading import load_model, load_tokenizer
from lens_kernels.hf.model.student import shallow_copy
from lens_kernels.hf.training import command
from lens_kernels.hf.training.config import LensDistillConfig
from lens_kernels.hf.training.data import Collator, Example, load_examples, padding_id
from lens_kernels.hf.training.record import RECORD
from lens_kernels.inputs import IGNORE_INDEX

THRESHOLDS = [1e-7, 3e-7, 1e-6, 2e-6, 3e-6, 1e-5, 3e-5, "bf16"]
GROUPS = {"lens": "jsd", "final": "forward_kl"}
WRONG = 0.1  # the maximum relative error of a gradient; a larger error stops the script
COLUMNS = (
    "run state group student_blocks threshold used_share dropped_share hidden_error head_error"
    " median_ms min_ms max_ms ratio_to_floor min_ratio_to_floor max_ratio_to_floor divergence"
    " pairs vocab_entries student_width teacher_width"
)
SHOWN = (
    "run state group threshold used_share dropped_share hidden_error head_error ratio_to_floor"
    " min_ratio_to_floor max_ratio_to_floor"
)

Threshold = Any  # a value of grad_threshold: a number, a name, or None
Row = dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """A run of ``lens-kernels train``: its output folder and its options."""

    folder: Path
    blocks: list[int]
    run: command.RunConfig
    config: LensDistillConfig

    def beginning(self) -> str:
        """Return, as a text, the settings that decide the student before training."""
        config = self.config
        layers = config.student_layers, config.teacher_layers, config.num_lens_pairs
        return str((self.blocks, layers, config.encoder_options()))

    def examples(self, data: Path, tokenizer: Any, tokens: int) -> Sequence[Example]:
        """Return the first examples, with ``tokens`` labels in total, encoded as in training."""
        found = load_examples(data, tokenizer, **self.config.encoder_options())
        counted = 0
        for number, example in enumerate(found.examples, 1):
            counted += sum(label != IGNORE_INDEX for label in example["labels"][1:])
            if counted >= tokens:
                return found.examples[:number]
        raise ValueError(
            f"--tokens {tokens} is too large: {data}, encoded as for {self.folder.name}, has only"
            f" {counted} positions with a label; pass --tokens {counted}, or more data"
        )


@dataclass(frozen=True, eq=False)
class Group:
    """The inputs of one call: hidden states, heads and divergence."""

    inputs: Inputs
    heads: tuple[LensHead, LensHead]
    divergence: str

    def gradients(self, threshold: Threshold) -> tuple[Tensor, ...]:
        """Return the gradients of all hidden states, followed by the gradient of the head."""
        hidden = self.inputs.student_hidden, self.inputs.teacher_hidden
        options = {"divergence": self.divergence, "grad_threshold": threshold}
        loss = symmetric_lens_loss(*hidden, *self.heads, **options)
        return torch.autograd.grad(loss, self.inputs.leaves())


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the groups that the CSV lacks, then print the table and draw the figure."""
    args = parse(argv)
    start = time.perf_counter()
    path = args.out / "active_vocabulary.csv"
    conditions = {"tokens": args.tokens, "rounds": args.rounds, "data": args.data.name}
    conditions |= {"teacher": args.teacher.name} | environment.environment(environment.CPU)
    done: defaultdict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in tables.read_own_csv(path, conditions):
        done[row["run"], row["state"], row["group"]].append(row)
    students = read_trained(args.trained)
    tokenizer = load_tokenizer(str(args.teacher))
    # Read all data before loading a model, so that missing files are reported at once.
    examples = [student.examples(args.data, tokenizer, args.tokens) for student in students]
    teacher = load_model(str(args.teacher), "float32")
    begun: set[str] = set()
    wanted = {*map(str, args.thresholds)}
    for trained, chosen in zip(students, examples, strict=True):
        batch = Collator(padding_id(tokenizer))(chosen)
        for state in ("after",) if trained.beginning() in begun else ("before", "after"):
            keys = [(trained.folder.name, state, group) for group in GROUPS]
            lacking = [key for key in keys if not wanted <= {r["threshold"] for r in done[key]}]
            if not lacking:
                print(f"{trained.folder.name} {state}: measured already")
                continue
            groups = groups_of(trained, state, teacher, batch, args.tokens)
            for key in lacking:
                print(" ".join(key), flush=True)
                names: Row = dict(zip(("run", "state", "group"), key, strict=True))
                names |= {"student_blocks": " ".join(map(str, trained.blocks)), **conditions}
                done[key] = measure(groups[key[2]], args.thresholds, args.rounds, names)
                tables.write_csv(path, [row for rows in done.values() for row in rows])
        begun.add(trained.beginning())
    rows = [row for rows in done.values() for row in rows]
    print()
    tables.print_rows([row for row in rows if row["threshold"] != "floor"], SHOWN.split())
    print("\n" + "\n".join(verdicts(rows)))
    picture = plot.active_vocabulary(path, png=args.figure)
    print(f"{path}\n{picture}\n{time.perf_counter() - start:.0f} s")


def threshold_of(text: str) -> Threshold:
    """Convert a text to a number, unless it names a threshold, such as ``bf16``."""
    try:
        return float(text)
    except ValueError:
        return text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command-line arguments."""
    parser = environment.parser(__doc__, on_device=False, tokens=1024, rounds=3)
    parser.add_argument("--teacher", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--trained", type=Path, required=True, nargs="+", metavar="FOLDER")
    parser.add_argument("--thresholds", type=threshold_of, nargs="+", default=THRESHOLDS)
    parser.add_argument("--figure", type=Path, metavar="PNG", help="default: beside the CSV")
    return parser.parse_args(argv)


def read_trained(folders: Sequence[Path]) -> list[Trained]:
    """Return the training runs that are in the given folders.

    Raises:
        ValueError: A folder has no run, or its student was not cut from a model, or two folders
            have the same name.
    """
    students = []
    for folder in folders:
        record = folder / RECORD
        if not record.is_file():
            raise ValueError(
                f"--trained {folder} holds no {RECORD}: give a folder that lens-kernels train wrote"
            )
        run, config, _ = command.parse(["--config", str(record)])
        if run.student_blocks is None:
            raise ValueError(
                f"{record} has no student_blocks, so the student before training is unknown: give a"
                " run with --student_blocks"
            )
        students.append(Trained(folder, run.student_blocks, run, config))
    names = [folder.name for folder in folders]
    if len({*names}) < len(names):
        raise ValueError(
            f"--trained needs folders with different names, got {names}: rename them, because the"
            " CSV identifies runs by these names"
        )
    return students


def groups_of(
    trained: Trained, state: str, teacher: Any, batch: Mapping[str, Tensor], tokens: int
) -> dict[str, Group]:
    """Return two groups of a student's hidden states: its lens pairs, and its final states.

    ``state`` is ``before`` or ``after`` training. The groups hold the first ``tokens`` positions of
    the batch that have a label.
    """
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
    # The model has already applied its norm to the final states.
    bare = replace(heads[0], norm=None), replace(teacher_head, norm=None)
    groups = {}
    for name, part, used in (("lens", slice(-1), heads), ("final", slice(-1, None), bare)):
        hidden = [x.requires_grad_() for x in mine[part]]
        weights = leaf, teacher_head.weight.detach()
        groups[name] = Group(Inputs(hidden, theirs[part], *weights), used, GROUPS[name])
    return groups


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Count all entries of the logits' gradient, and the entries that the GEMMs use.

    ``mass`` is the sum of the absolute values of the counted entries, for each count.
    """
    seen = dict.fromkeys(("all", "all mass", "used", "used mass"), 0.0)

    def counting(owner: Any, name: str, what: str, at: int, columns: int | None = None) -> Any:
        """Make a function count the entries of its argument number ``at`` when it is called.

        With ``columns``, only these columns of the argument count.
        """
        inner = getattr(owner, name)

        def counted(*args: Any) -> Any:
            grad = args[at] if columns is None else args[at][:, args[columns]]
            seen[what] += grad.numel()
            seen[f"{what} mass"] += float(grad.abs().sum(dtype=torch.float64))
            return inner(*args)

        return mock.patch.object(owner, name, counted)

    with (
        counting(head_products.ColumnStatistics, "add", "all", at=1),
        counting(head_products, "full_products", "used", at=0),
        counting(head_products, "active_products", "used", at=0, columns=1),
    ):
        yield seen


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Return the relative error of each gradient, in the 2-norm."""
    pairs = zip(found, exact, strict=True)
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]


def judge(group: Group, thresholds: Sequence[Threshold]) -> dict[str, Row]:
    """Return a CSV row of errors: of bfloat16 rounding, of exact gradients, and of each threshold.

    Raises:
        RuntimeError: The error of a threshold is above ``WRONG``, or NaN.
    """
    exact = group.gradients(None)
    *hidden, head = errors([g.bfloat16() for g in exact], exact)
    rows = {"bf16_rounding": _errors(min(hidden), head)}
    rows["exact"] = _errors(0.0, 0.0) | {"used_share": "1", "dropped_share": "0"}
    for threshold in thresholds:
        with watched() as seen:
            found = group.gradients(threshold)
        *hidden, head = errors(found, exact)
        names = [*(f"hidden state {i}" for i in range(len(hidden))), "head"]
        for what, error in zip(names, (*hidden, head), strict=True):
            if not error <= WRONG:  # `not <=` also catches NaN
                raise RuntimeError(
                    f"grad_threshold {threshold}: the gradient of the {what} has a relative error"
                    f" of {error:.2g}, above the limit of {WRONG}: pass smaller --thresholds,"
                    " and look for NaN in the models if that does not help"
                )
        rows[str(threshold)] = _errors(max(hidden), head) | {
            "used_share": f"{seen['used'] / seen['all']:.5g}",
            "dropped_share": f"{max(0.0, 1 - seen['used mass'] / seen['all mass']):.4g}",
        }
    return rows


def _errors(hidden: float, head: float) -> Row:
    return {"hidden_error": f"{hidden:.3g}", "head_error": f"{head:.3g}"}


def timed(group: Group, thresholds: Sequence[Threshold], rounds: int) -> dict[str, Row]:
    """Return CSV columns for each threshold: the time of loss and backward, in ms and as a ratio.

    The ratio is to the time of the GEMMs alone.
    """
    functions: dict[str, Callable[[], Any]] = {
        "floor": partial(products.products, group.inputs),
        "exact": partial(group.gradients, None),
        **{str(t): partial(group.gradients, t) for t in thresholds},
    }
    timings = timing.time_interleaved(functions, rounds, environment.CPU)
    rows = {}
    for name, times in timings.items():
        ratios = times.ratios(timings["floor"])
        ends = {"": statistics.median(ratios), "min_": min(ratios), "max_": max(ratios)}
        columns = {f"{end}ratio_to_floor": f"{ratio:.3f}" for end, ratio in ends.items()}
        rows[name] = times.columns() | columns
    return rows


def measure(group: Group, thresholds: Sequence[Threshold], rounds: int, names: Row) -> list[Row]:
    """Return a group's CSV rows. All errors are checked before the first timing."""
    judged = judge(group, thresholds)
    times = timed(group, thresholds, rounds)
    (vocab, width), (_, teacher_width) = (head.weight.shape for head in group.heads)
    job = Job(0, vocab, len(group.inputs.student_hidden), width, teacher_width)
    same = job.columns() | {"divergence": group.divergence, **names}
    columns = " ".join(dict.fromkeys([*COLUMNS.split(), *names]))
    return [
        tables.row(columns, same, {"threshold": name}, judged.get(name, {}), times.get(name, {}))
        for name in ("floor", *judged)
    ]


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Return a line for each student: the fastest threshold with small errors for lens pairs."""
    quickest: dict[str, tuple[float, str] | None] = {}
    for row in rows:
        if row["group"] != "lens" or not row["used_share"]:
            continue
        best = quickest.setdefault(f"{row['run']} {row['state']}", None)
        found = float(row["ratio_to_floor"]), row["threshold"]
        small = max(float(row["hidden_error"]), float(row["head_error"])) < SMALL_ERROR
        if small and row["threshold"] != "exact" and (best is None or found < best):
            quickest[f"{row['run']} {row['state']}"] = found
    lines = []
    for state, best in quickest.items():
        said = "no threshold"
        if best:
            met = "is" if best[0] < WANTED_RATIO else "is not"
            said = f"{best[0]:.3f} of the floor at {best[1]}, which {met} below {WANTED_RATIO:.2f}"
        lines.append(f"{state}, lens, both errors below {SMALL_ERROR:g}: {said}")
    return lines


if __name__ == "__main__":
    main()
