"""Programs that the tests start."""

import os
import socket
import subprocess
import sys
from pathlib import Path

PYTHON = [sys.executable]
TESTS = Path(__file__).parents[1]


def execute(
    command: list, *, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, on one thread a process; it imports the tests' modules."""
    return subprocess.run(
        [str(piece) for piece in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=cwd,
        env={**os.environ, **own_environment(), **environment},
    )


def own_environment() -> dict[str, str]:
    """Return what programs need to import the tests' modules, on one thread."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def torchrun(processes: int) -> list:
    """Return the command that starts what follows it in several processes of this machine."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    address = ["--master_addr", "127.0.0.1", "--master_port", port]
    return [*PYTHON, "-m", "torch.distributed.run", "--nproc_per_node", processes, *address]


def all_ranks_finished(result: subprocess.CompletedProcess[str]) -> bool:
    """Whether every rank came to its end without an error.

    Gloo sometimes aborts while it takes its threads down, with any optimizer and after all is
    saved: the scripts wait for each other at their end.
    """
    taken_down = "terminate called without an active exception" in result.stderr
    return result.returncode == 0 or (taken_down and "]: Traceback" not in result.stderr)
