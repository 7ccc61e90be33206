"""A gloo group of real processes, which run functions of the tests and count their collectives.

A server process imports torch once. Every rank is a fork of the server, and starts in milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 300.0  # a collective without progress for this many seconds raises an error
# The second module imports Triton.
PRELOADED = "tests.support.sharded", "lens_kernels.backends.torch.sharded_row_kernel_pass"
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch._dynamo", *PRELOADED])


def _work(rank: int, world: int, file: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(file, world)
    limit = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            torch.manual_seed(20260213)
            pipe.send((function(*arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """A group of processes, called ranks, that run functions one after another."""

    def __init__(self, world: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        pipes = [_context.Pipe() for _ in range(world)]
        self.pipes = [ours for ours, _ in pipes]
        file = os.path.join(self.folder.name, "store")
        self.processes = [
            _context.Process(target=_work, args=(rank, world, file, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()  # the pipe then closes if the rank is killed

    def outcomes(self, function: Callable[..., Any], *arguments: Any) -> list[tuple[Any, Any]]:
        """Run ``function`` on every rank. Return each rank's ``(result, traceback)``."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        received = []
        for rank, pipe in enumerate(self.pipes):
            # Interpreted kernels take minutes on a busy machine.
            if not pipe.poll(3 * TIMEOUT):
                raise TimeoutError(f"rank {rank} still runs after {3 * TIMEOUT} s")
            try:
                received.append(pipe.recv())
            except EOFError:
                received.append((None, "killed"))
        return received

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run ``function`` on every rank, and return the results in the order of ranks."""
        outcomes = self.outcomes(function, *arguments)
        failed = [f"rank {i}: {error}" for i, (_, error) in enumerate(outcomes) if error]
        assert not failed, "\n".join(failed)
        return [result for result, _ in outcomes]

    def close(self) -> None:
        """End all processes of the group."""
        for pipe in self.pipes:
            with suppress(OSError):  # the rank was killed
                pipe.send(None)
        for process in self.processes:
            process.join(10)
        self.folder.cleanup()


KINDS = ("all_reduce", "all_gather", "reduce_scatter")


@contextmanager
def counted() -> Any:
    """Return a context that lists the collectives in it: ``(kind, bytes of the whole tensor)``."""
    seen: list[tuple[str, int]] = []
    names = ["all_reduce", "all_gather"]
    for kind, old in (("all_gather", "into_tensor"), ("reduce_scatter", "tensor")):
        new = f"{kind}_single"  # torch 2.13 and later use this name
        names.append(new if hasattr(dist, new) else f"{kind}_{old}")
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        kind = next(kind for kind in KINDS if name.startswith(kind))

        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append((kind, max(map(_bytes, [*args, *kwargs.values()]))))
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in originals:
            setattr(dist, name, counting(name))
        yield seen
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def _bytes(x: Any) -> int:
    if isinstance(x, (list, tuple)):
        return sum(map(_bytes, x))
    return x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0
