"""The benchmarks run; what they measure is not a test's business."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_sophia.kernels import no_kernel_because

ROOT = Path(__file__).parents[1]


def run(script: str, *options: str) -> str:
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *options],
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def measured(script: str, tmp_path: Path, *options: str) -> dict:
    """Run a script small; its record has what a committed one has."""
    output = tmp_path / "results.json"
    run(script, *options, "--device=cpu", f"--output={output}")
    record = json.loads(output.read_text())
    assert record.keys() == {"command", "options", "environment", "results"}
    assert record["environment"]["device"]
    return record["results"]


def test_steps_are_measured_side_by_side(tmp_path) -> None:
    tables = measured("step.py", tmp_path, "--sizes", "148 tiny", "--rounds=2")
    (table,) = tables.values()
    assert table["torch AdamW fused"]["ratio"] == 1.0
    assert {"sophia", "sophia eager", "adam", "radam", "torch RAdam foreach"} <= table.keys()
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in table.values())
    if not no_kernel_because(torch.device("cpu"), torch.float32):
        assert "memory limit" in table


def test_the_refreshs_overhead_is_measured(tmp_path) -> None:
    options = ("--sizes=tiny", "--rounds=1", "--length=8", "--accumulation=2")
    (table,) = measured("refresh.py", tmp_path, *options).values()
    assert {"adamw", "sophia, no refresh", "kept graph", "kept graph of 1 of 2"} <= table.keys()
    plain = table["sophia, no refresh"]
    assert plain["overhead"] == pytest.approx(plain["ratio"] - 1)
    kept = table["kept graph"]
    amortised = 0.9 * plain["ratio"] + 0.1 * kept["ratio"] - 1
    assert kept["overhead"] == pytest.approx(amortised)


def test_samplers_are_measured(tmp_path) -> None:
    options = ("--rows=8", "--classes", "2", "30", "--rounds=1")
    assert measured("sampler.py", tmp_path, *options).keys() == {"8 x 2", "8 x 30"}


def test_the_noise_of_the_hessian_is_measured(tmp_path) -> None:
    sizes = ("--layers=1", "--width=16", "--steps=4", "--batch=16", "--length=16")
    results = measured("hessian_noise.py", tmp_path, *sizes, "--reference=60", "--refreshes=20")
    assert results.keys() == {"1", "0.5", "0.25", "0.125", "0.0625"}
    # The square of a normal variable has a relative error of sqrt(2), whatever the batch's size;
    # an average of 20 with weights of 0.95^n has 0.23 of that, and the reference 0.13.
    assert 0.9 < results["1"]["one"] < 2.0
    assert all(row["average"] < 0.6 * row["one"] for row in results.values())
    assert all(0.0 <= row["far off"] <= 1.0 for row in results.values())


def test_whole_runs_are_measured(tmp_path) -> None:
    options = ("--size=tiny", "--steps=2", "--skip=1", "--rounds=1", "--length=8")
    results = measured("train.py", tmp_path, *options)
    assert {"adamw_torch_fused", "sophia"} <= results.keys()
    for (one,) in results.values():
        assert one["tokens a second"] > 0
        assert one["peak bytes"] > 2**20


def test_the_gpu_check_runs_but_for_the_gpu(tmp_path) -> None:
    output = run("gpu_check.py", "--device=cpu", f"--output={tmp_path}")
    assert "failed" not in output
    made = {path.stem for path in tmp_path.iterdir()}
    assert made == {
        *("summary", "tune", "step_fp32", "step_bf16"),
        *("refresh_bf16", "refresh_fp32", "train"),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_says_so(tmp_path) -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu_check.py", f"--output={tmp_path / 'none'}"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "no CUDA device here, so nothing was checked" in result.stderr
    assert not (tmp_path / "none").exists()


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


def test_quoted_figures_are_the_committed_ones() -> None:
    """Above each table stands which file and which of its figures it quotes."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    tables = re.findall(r"<!-- (\S+) \| (\w+) \| (.+) -->\n\|.*\n\|[-|]+\n((?:\|.*\n)+)", text)
    assert {name for name, *_ in tables} == {
        "step_cpu.json",
        "refresh_cpu.json",
        "sampler_cpu.json",
    }
    for file, field, columns, rows in tables:
        results = json.loads((ROOT / "benchmarks" / "results" / file).read_text())["results"]
        for row in rows.splitlines():
            name, *shown = (cell.strip() for cell in row.strip("|").split("|"))
            for column, cell in zip(columns.split(" | "), shown, strict=True):
                if not cell:
                    assert name not in results[column]
                    continue
                figure = results[column][name][field]
                expected = f"{figure:.1%}" if cell.endswith("%") else f"{figure:.2f}"
                assert cell == expected, (file, name, column)
    (rows,) = re.findall(r"<!-- hessian_noise_cpu.json -->\n\|.*\n\|[-|]+\n((?:\|.*\n)+)", text)
    noise = json.loads((ROOT / "benchmarks/results/hessian_noise_cpu.json").read_text())["results"]
    for row, found in zip(rows.splitlines(), noise.values(), strict=True):
        shown = [cell.strip() for cell in row.strip("|").split("|")][1:]
        one, average, far = found["one"], found["average"], found["far off"]
        assert shown == [f"{one:.2f}", f"{average:.2f}", f"{far:.1%}"]
    wholes = re.findall(r"<!-- (train\w*.json) -->\n\|.*\n\|[-|]+\n((?:\|.*\n)+)", text)
    assert len(wholes) == 2
    for file, rows in wholes:
        runs = json.loads((ROOT / "benchmarks/results" / file).read_text())["results"]
        for row in rows.splitlines():
            name, *shown = (cell.strip() for cell in row.strip("|").split("|"))
            for cell, key in zip(shown, ("tokens a second", "peak bytes"), strict=True):
                pairs = zip(runs[name], runs["adamw_torch_fused"], strict=True)
                ratio = statistics.median(own[key] / other[key] for own, other in pairs)
                assert cell.split()[-1] == f"{ratio:.3f}", (file, name, key)


def test_the_evidence_is_what_the_studies_wrote() -> None:
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    tables = (ROOT / "benchmarks" / "results" / "study").glob("*/table.md")
    written = [row for path in tables for row in rows_of(path.read_text(encoding="utf-8"))]
    quoted = [row for row in rows_of(text) if "±" in row.get("validation loss", "")]
    assert len(quoted) > 30
    for row in quoted:
        gap = next((cell for name, cell in row.items() if name.startswith("minus ")), "")
        figures = {row["validation loss"], gap, row.get("steps", ""), row.get("time", "")}
        wanted = {counted(figure) for figure in figures - {"", "1"}}
        rate = f"learning_rate {float(row['lr'].split()[0].strip(',:')):g}," if "lr" in row else ""
        assert any(
            wanted <= {*own.values()} and rate in own["settings"] + "," for own in written
        ), row


SHORT_NAMES = {
    "AdamW": "AdamW",
    "NAdamW": "NAdamW",
    "√v": "Sophia's step with √v in the place of h",
    "v": "Sophia's step with v in the place of h",
    "v for h": "Sophia's step with v in the place of h",
    "h": "Sophia-G, `rho=auto`",
    "Sophia-G": "Sophia-G, `rho=auto`",
    "Muon": "Muon on hidden matrices, AdamW on the rest",
}


def test_the_summaries_quote_the_evidence() -> None:
    """Each mean of the README and of "Is it the Hessian?" stands in one setting's table in full."""
    evidence = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    tables = tables_of(evidence)
    settings = [
        {row["optimizer"]: row["validation loss"].split(" ±")[0] for row in table}
        for table in tables
        if {"optimizer", "validation loss"} <= {*table[0]}
    ]
    assert len(settings) == 6
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [row for table in tables + tables_of(readme) for row in table]
    summaries = [row for row in rows if {"Sophia-G", "h"} & {*row}]
    assert len(summaries) == 12
    for row in summaries:
        shown = {SHORT_NAMES[name]: cell for name, cell in row.items() if name in SHORT_NAMES}
        shown = {name: cell for name, cell in shown.items() if cell}
        assert len(shown) >= 3
        assert any(shown.items() <= setting.items() for setting in settings), row
        if "v's part of the lead" in row:
            adamw, v, h = (float(row[name]) for name in ("AdamW", "v", "h"))
            part = float(row["v's part of the lead"].rstrip(" %")) / 100
            assert (adamw - v) / (adamw - h) == pytest.approx(part, abs=0.01), row


def counted(cell: str) -> str:
    """Return `0.79 in two of 3` as tables have it, `0.79 (2 of 3)`."""
    numbers = {"one": 1, "two": 2}
    return re.sub(r" in (\w+) of (\d)", lambda m: f" ({numbers[m[1]]} of {m[2]})", cell)


def rows_of(text: str) -> list[dict[str, str]]:
    return [row for table in tables_of(text) for row in table]


def tables_of(text: str) -> list[list[dict[str, str]]]:
    """Return the rows of each Markdown table of a text, by the names of its columns."""
    tables, names = [], None
    for line in text.splitlines():
        if not line.startswith("|"):
            names = None
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if names is None:
            names = cells
            tables.append([])
        elif not set(line) <= set("|- "):
            tables[-1].append(dict(zip(names, cells, strict=False)))
    return tables


def test_the_guides_overheads_are_the_committed_ones() -> None:
    text = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "benchmarks/results/refresh_cpu.json").read_text())["results"]
    rows = {
        "kept graph, whole batch": "kept graph",
        "own pass on the whole batch": "own pass, 1",
        "own pass on 1/2": "own, 1/2",
        "own pass on 1/4, the default": "own, 1/4",
        "own pass on 1/8": "own, 1/8",
    }
    for shown, name in rows.items():
        figure = results["5M, accumulation 1"][name]["overhead"]
        assert f"| {shown} | {100 * figure:.1f} % |" in text
