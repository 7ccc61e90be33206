"""Train small students with and without a lens: does the lens help, and with which settings?

A teacher of 6 blocks x 128 is trained on the documentation of Django (a source distribution of
10.8 MB on PyPI, BSD-3-Clause; 1.9 million tokens; the tokenizer of 2,048 entries is trained here).
Students of 3 blocks x 64 are distilled from it by ``LensDistillTrainer``. Each run has a key that
is a hash of its settings, and one line in ``runs.csv``. Runs in that file are not repeated, so the
same command resumes an interrupted study.

The main comparison was fixed before any of its runs:

    Forward KL at the output, against forward KL with a JSD lens (coefficient 1, two pairs by the
    uniform rule, with the final norm). The metric is KL(teacher, student) in nats per token, on
    128 rows of 128 tokens of held-out documents, after 600 steps of 2,048 tokens. There are five
    seeds (1 to 5), paired: both students of a seed start from the same weights and see the same
    rows in the same order. The learning rate is the best of a sweep for forward KL without a lens
    (seed 0, which the comparison does not use). The lens helps if the 95 % interval of the mean
    difference, by Student's t over the five pairs, lies below 0.

    The second comparison has the same rule: reverse KL against reverse KL with a JSD lens, which is
    the paper's objective and the library's default.

The first ten differences of the main comparison (seeds 1 to 5, and the group ``second``: 6 to 10)
have a standard deviation of 4.1 points around a mean of -4.8. Five seeds are therefore too few:
half of the interval is 5.1 points wide. The group ``third`` was fixed after those results and
before any of its runs: the main comparison with the same rule and ten new seeds (11 to 20), so that
half of the interval is about 2.9 points wide.

All other groups are exploratory. Even without any effect, about one comparison in twenty would look
significant.
"""

from __future__ import annotations

import argparse
from pathlib import Path

if not __package__:
    import checkout  # noqa: F401

from benchmarks.study import groups, report, runs
from benchmarks.support import environment


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command-line arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*groups.GROUPS]
    parser.add_argument("--only", nargs="+", choices=names, default=["rate", "main"])
    parser.add_argument("--all", action="store_true", help="all groups, the most important first")
    parser.add_argument("--seeds", type=int, nargs="+", help="replaces the seeds of the groups")
    parser.add_argument("--quick", action="store_true", help="a small version for tests: minutes")
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel runs")
    parser.add_argument("--threads", type=int, default=1, help="threads per run")
    parser.add_argument("--shared", action="store_true", help="record that the machine was shared")
    parser.add_argument("--out", type=Path, default=environment.OUT / "lens_study")
    parser.add_argument(
        "--csv", type=Path, nargs="+", help="results for --report, instead of --out/runs.csv"
    )
    parser.add_argument(
        "--report", action="store_true", help="run nothing; rewrite CSV, tables and figures"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Execute all missing runs, then print the tables."""
    args = parse(argv)
    chosen = [groups.quick()] if args.quick else [groups.GROUPS[x] for x in args.only]
    if args.all:
        chosen = [*groups.GROUPS.values()]
    seeds = tuple(args.seeds) if args.seeds else None
    if args.report:
        report.publish(args.csv or [args.out / "runs.csv"])
        return
    for group in chosen:
        runs.do(group.runs(seeds), args.out, args.jobs, args.threads, args.shared)
        results = runs.read(args.out / "runs.csv")
        print(f"\n{group.question}\n\n{report.table(group, results, seeds)}", flush=True)


if __name__ == "__main__":
    main()
