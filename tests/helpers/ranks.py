"""Processes that are the ranks of a gloo group, for all tests that need one."""

import os
import pickle
import select
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("rank_worker.py")


class Ranks:
    """`run` calls a function of `rank_worker.py` on the first ranks, each with its own arguments.

    The processes start with the first call. If one does not answer, all are stopped, and the next call starts new ones.
    """

    def __init__(self, world, folders):
        self.world, self.folders, self.processes = world, folders, []

    def _start(self):
        folder = self.folders.mktemp("ranks")
        # PyTorch 2.13's caches take a graph of an uneven DTensor from a rank whose shard has another size.
        caches = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
        # The C library gives blocks of a MiB back to the system when they are freed, for measurements.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20), **caches}
        self.processes = [
            subprocess.Popen(
                [sys.executable, WORKER, str(rank), str(self.world), str(folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            )
            for rank in range(self.world)
        ]  # fmt: skip

    def run(self, name, arguments, timeout=300):
        """Calls a function, and returns every rank's result. `arguments` has the keyword arguments for each rank."""
        if not self.processes:
            self._start()
        processes = self.processes[: len(arguments)]
        for process, kwargs in zip(processes, arguments, strict=True):
            pickle.dump((name, kwargs), process.stdin)
            process.stdin.flush()
        answers = [self._answer(rank, process, timeout) for rank, process in enumerate(processes)]
        for rank, (succeeded, answer) in enumerate(answers):
            assert succeeded, f"rank {rank}: {answer}"
        return [answer for _, answer in answers]

    def _answer(self, rank, process, timeout):
        ready, _, _ = select.select([process.stdout], [], [], timeout)
        if not ready:
            self.stop()
            pytest.fail(f"rank {rank} did not answer within {timeout} s")
        return pickle.load(process.stdout)

    def stop(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            process.stdin.close()
            process.stdout.close()
        self.processes = []
