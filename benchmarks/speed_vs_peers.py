"""Time of loss and backward against peers and floor, by tokens, vocabulary, pairs and mask.

    python benchmarks/speed_vs_peers.py                     under 15 minutes on two quiet cores
    python benchmarks/speed_vs_peers.py --sweep models      sizes of four models, 4 more minutes
    python benchmarks/speed_vs_peers.py --cross-entropy     the cross entropy of labels alone
    python benchmarks/speed_vs_peers.py --quick             tiny sizes that test the script

A point is one set of sizes. The floor is the time of the four GEMMs with the heads, for the
unmasked tokens. Every contender is first compared with the fp64 oracle. At each point, its loss and
gradient norms are compared with those of the contender that ran first. If they differ, dense
PyTorch decides: a wrong peer is not timed, and a wrong first contender ends the run. Code is
compiled before the timed rounds. Each round runs every contender at every point. Ratios are taken
within a round, because the speed of a machine drifts. The median of the ratios is reported.

Slow contenders run in every other round and at fewer points, which the CSV names. The same command
resumes a stopped run on the same machine, code and versions. If a contender is new at a point, all
contenders run there again. The sweep ``memory`` runs lens_kernels and TRL once. Other contenders
take too long or do not fit, so their memory is counted over fake tensors.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

if not __package__:
    import checkout  # noqa: F401

from benchmarks.peers import bars, cross_entropy
from benchmarks.peers.points import SWEEPS, points
from benchmarks.peers.results import Results
from benchmarks.peers.runner import Runner, large_point
from benchmarks.support import environment, plot, tables
from benchmarks.support.contenders import gather
from benchmarks.support.providers import OURS, PEERS, SPEED_CONTENDERS

CONTENDERS = {"lens_kernels": OURS, **PEERS, **SPEED_CONTENDERS}
PAGE = environment.ROOT / "docs" / "memory_and_speed.md"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all points, then print the tables, write the CSV, and draw the figure."""
    args = parse(argv)
    start = time.perf_counter()
    device = torch.device(args.device)
    if args.cross_entropy:
        print(cross_entropy.run(args.out, device, args.tokens, args.rounds, args.quick))
        return
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
    """Return the parsed command-line arguments. ``--quick`` changes the default sizes."""
    parser = environment.parser(__doc__, rounds=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument(
        "--cross-entropy", action="store_true", help="compare only the cross entropy of labels"
    )
    parser.add_argument(
        "--sweep",
        nargs="+",
        choices=SWEEPS,
        default=SWEEPS[:-1],
        help="the sweeps to run; default: all except models",
    )
    parser.add_argument("--tokens", type=int, help="default 1024, with --quick 64")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS])
    parser.add_argument(
        "--docs", action="store_true", help=f"also write the tables into docs/{PAGE.name}"
    )
    args = parser.parse_args(argv)
    args.tokens = args.tokens or (64 if args.quick else 1024)
    return args


if __name__ == "__main__":
    main()
