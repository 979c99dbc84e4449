"""The benchmarks run; what they measure is not a test's business."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_hessians_overhead_is_measured(tmp_path) -> None:
    output = tmp_path / "results.json"
    options = {"rounds": 1, "batch": 8, "length": 8, "layers": 1, "width": 16, "vocabulary": 40}
    subprocess.run(
        [
            sys.executable,
            ROOT / "benchmarks/hessian_overhead.py",
            *(f"--{name}={value}" for name, value in options.items()),
            "--device=cpu",
            f"--output={output}",
        ],
        check=True,
        timeout=120,
        capture_output=True,
    )
    record = json.loads(output.read_text())
    committed = json.loads((ROOT / "benchmarks/results/hessian_overhead_cpu.json").read_text())
    assert record.keys() == committed.keys()
    assert record["overhead"].keys() == committed["overhead"].keys()
    assert record["plain_step_seconds"] > 0


def test_a_killed_run_resumes_to_the_same_end(tmp_path) -> None:
    """Two of the soak's trials; the committed result has twenty."""
    output = tmp_path / "soak.json"
    subprocess.run(
        [sys.executable, ROOT / "benchmarks/soak.py", "--trials=2", f"--output={output}"],
        check=True,
        timeout=300,
        capture_output=True,
    )
    record = json.loads(output.read_text())
    committed = json.loads((ROOT / "benchmarks/results/soak.json").read_text())
    assert record.keys() == committed.keys()
    assert record["equal"] == 2
    assert [trial["killed"] for trial in record["trials"]] == [True, True]
    assert committed["equal"] == len(committed["trials"]) == 20
    assert committed["killed while a checkpoint was being written"] >= 5
