"""Time of loss and backward beside the peers and the floor: tokens, vocabulary, pairs, mask.

    python benchmarks/speed_vs_peers.py                     under 15 minutes on two quiet cores
    python benchmarks/speed_vs_peers.py --sweep models      sizes of other models, 4 minutes more
    python benchmarks/speed_vs_peers.py --quick             tiny sizes, to try the script

The floor is the four products with the heads alone, of the tokens that count. Every contender is
first checked against the fp64 oracle, and at each point its loss and the norms of its gradients are
compared with those of the first one. Where they differ, dense PyTorch decides: a peer that is wrong
is not timed, and if the first one is wrong the run ends. Compilers run before the timed rounds. In
each round every contender has its turn at every point. Ratios are taken within a round, because the
clock of a machine drifts; their medians count.

Slow contenders take part in every other round and not at every point; the CSV says so. The same
command resumes a stopped run on the same machine, code and versions. If a contender is new at a
point, all are timed there again. The sweep ``memory`` runs ours and TRL once, and counts the bytes
of the others over fake tensors: they take too long or do not fit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

if not __package__:
    import checkout  # noqa: F401

from benchmarks.peers import bars
from benchmarks.peers.points import SWEEPS, points
from benchmarks.peers.results import Results
from benchmarks.peers.runner import Runner, large_point
from benchmarks.support import environment, plot, tables
from benchmarks.support.contenders import gather
from benchmarks.support.providers import OURS, PEERS, SPEED_CONTENDERS, backend

CONTENDERS = {
    "lens_kernels": OURS,
    "triton": backend("triton", gpu_only=True),
    **PEERS,
    **SPEED_CONTENDERS,
}
PAGE = environment.ROOT / "docs" / "memory_and_speed.md"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse(argv)
    start = time.perf_counter()
    device = torch.device(args.device)
    results = Results(args.out / "speed_vs_peers.csv", environment.environment(device))
    chosen = {key: CONTENDERS[key] for key in args.contenders}
    contenders, missing = gather(chosen, device, needed=["lens_kernels"])
    for key, reason in missing.items():
        results.put(None, key, CONTENDERS[key].label(), note=reason)
    plan = [p for p in points(args.tokens, device, args.quick) if {*p.sweeps} & {*args.sweep}]
    timed = [point for point in plan if point.sweeps != ("memory",)]
    runners = [Runner(point, contenders, results, args.rounds) for point in timed]
    results.save()
    for number in range(args.rounds + 1):
        for runner in runners:
            runner.turn(number)
    for point in plan:
        if point.sweeps == ("memory",):
            large_point(point, contenders, results)
    picture = plot.speed_vs_peers(results.path)
    print()
    rows = results.rows()
    for header, lines in bars.both_tables(rows):
        tables.print_table(header, lines)
        print()
    if args.docs:
        bars.write_tables(PAGE, rows)
    print(f"{results.path}\n{picture}\n{time.perf_counter() - start:.0f} s")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments, ``--quick`` applied."""
    parser = environment.parser(__doc__, rounds=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument(
        "--sweep",
        nargs="+",
        choices=SWEEPS,
        default=SWEEPS[:-1],
        help="all but models unless given",
    )
    parser.add_argument("--tokens", type=int, help="1024, with --quick 64")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS])
    parser.add_argument(
        "--docs", action="store_true", help=f"also write the tables into docs/{PAGE.name}"
    )
    args = parser.parse_args(argv)
    args.tokens = args.tokens or (64 if args.quick else 1024)
    return args


if __name__ == "__main__":
    main()
