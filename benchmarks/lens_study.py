"""Does the lens help, and what should be set? Small models, many seeds, two cores.

A teacher of 6 blocks x 128 is trained on the documentation of Django (a source distribution of
10.8 MB on PyPI, BSD-3-Clause; 1.9 million tokens of a vocabulary of 2,048 made here). Students of
3 blocks x 64 learn from it, through ``LensDistillTrainer``. Each run has a key made of its
settings, and one line in ``runs.csv``: a run that is there is not repeated, and the same command
resumes an interrupted study.

The main comparison, written before any of its runs:

    Forward KL at the output, against forward KL with a JSD lens (coefficient 1, two pairs by the
    uniform rule, through the final norm). Measured is KL(teacher, student) in nats per token, on
    128 rows of 128 tokens of documents that were held out, after 600 steps of 2,048 tokens. Five
    seeds (1 to 5), paired: both students of a seed start alike and see the same rows in the same
    order. The learning rate is the best of a sweep for forward KL without a lens (seed 0, which
    the comparison does not use). The lens helps if the 95 % interval of the mean difference, by
    Student's t over the five pairs, lies below 0.

    Second, with the same rule: reverse KL against reverse KL with a JSD lens, which is the paper's
    objective and the library's default.

All else is exploration, where one comparison in twenty would look real by chance alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

if not __package__:
    import checkout  # noqa: F401

from benchmarks.study import groups, report, runs
from benchmarks.support import environment


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*groups.GROUPS]
    parser.add_argument("--only", nargs="+", choices=names, default=["rate", "main"])
    parser.add_argument("--all", action="store_true", help="all groups, in the order of worth")
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than a group's own")
    parser.add_argument("--quick", action="store_true", help="a small form, for a test: minutes")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run")
    parser.add_argument("--shared", action="store_true", help="record that the machine was shared")
    parser.add_argument("--out", type=Path, default=environment.OUT / "lens_study")
    parser.add_argument("--csv", type=Path, help="results to report, rather than those of --out")
    parser.add_argument(
        "--report", action="store_true", help="run nothing; write CSV, tables and figures anew"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Do the runs that are missing, then print the tables."""
    args = parse(argv)
    chosen = [groups.quick()] if args.quick else [groups.GROUPS[x] for x in args.only]
    if args.all:
        chosen = [*groups.GROUPS.values()]
    seeds = tuple(args.seeds) if args.seeds else None
    if args.report:
        report.publish(args.csv or args.out / "runs.csv")
        return
    for group in chosen:
        runs.do(group.runs(seeds), args.out, args.jobs, args.threads, args.shared)
        results = runs.read(args.out / "runs.csv")
        print(f"\n{group.question}\n\n{report.table(group, results, seeds)}", flush=True)


if __name__ == "__main__":
    main()
