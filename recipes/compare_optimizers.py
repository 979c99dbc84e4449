"""Compare optimizers on a recipe: the same data, order, initialisation, schedule and budget.

    python recipes/compare_optimizers.py benchmarks/studies/gpt2_1m_2k.yaml --processes 2
    python recipes/compare_optimizers.py my_study.yaml --output runs/my_study

Each optimizer is tried with every learning rate of its grid, then with its variants at the best of
these, and the best of all runs with every seed. Where the best learning rate lies at an edge of a
grid nothing is compared: the grid has to move first. Trials that have been run are not run again,
so that a study that was stopped goes on, and a grid that moved costs its new points only.

Writes `results.json` (every trial with its evaluations), `table.md` and `comparison.png`. For
wall-clock times the winners' first steps are run again at the end, in turns.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.arguments import one_line_errors
from common.study import Candidate, Study, Trial, read_study
from common.trials import Record, Records, measure_paces, run_trials
from common.verdict import Line, differences, learning_rates, plot, table

import hf_sophia


def main(argv: Sequence[str] | None = None) -> list[Line]:
    """Run what is missing of a study and write what it says.

    Args:
        argv: The command line without the program's name; None: the process's own.

    Returns:
        The candidates' lines.

    Raises:
        SystemExit: The study can't be read, or can't be compared.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("study", type=Path, help="YAML file that says what to compare")
    parser.add_argument("--output", type=Path, help="Folder to write to; runs/<study> by default")
    parser.add_argument("--processes", type=int, default=1, help="Trials at a time (default 1)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="Leave other optimizers out")
    parser.add_argument("--reference", metavar="NAME", help="Measure by it, not the study's own")
    parser.add_argument("--no-ablations", action="store_true", help="Compare optimizers alone")
    parser.add_argument(
        "--pace-rounds", type=int, default=3, help="Short runs of each for its pace; 0: none"
    )
    options = parser.parse_args(argv)
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    if options.pace_rounds < 0:
        parser.error(f"--pace-rounds must be at least 0, got {options.pace_rounds}")
    with one_line_errors():
        study = read_study(options.study).measured_by(options.reference).only(options.only)
        if options.no_ablations:
            study = replace(study, ablations={})
        output = options.output or Path("runs") / options.study.stem
        records = Records(output / "results.json")

        winners = tune(study, records, options.processes)
        lines = run_seeds(study, records, winners, options.processes)
        measure_paces(records, list(winners.values()), options.pace_rounds)
        lines = [replace(line, paces=records.paces.get(line.trial.key, ())) for line in lines]
    arguments = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "recipes/compare_optimizers.py", *arguments])
    write(study, records, lines, output, f"# {options.study.stem}\n\n`{command}`")
    records.close()
    return lines


def tune(study: Study, records: Records, processes: int) -> dict[str, Trial]:
    """Try learning rates, then variants at the best of them; return each candidate's best trial.

    Args:
        study: The study.
        records: Of the trials run so far.
        processes: Trials at a time.

    Returns:
        The best trial of each candidate, with the first seed.

    Raises:
        SystemExit: A best learning rate lies at the edge of its grid.
        ValueError: Every trial of a candidate failed, or its options are wrong.
    """
    seed = study.seeds[0]
    candidates = study.candidates
    # Point by point through all candidates, so that what else the machine does falls on all alike.
    grid = [c.at(rate, seed) for c in candidates.values() for rate in c.learning_rates]
    run_trials(records, grid, processes)
    for name, c in candidates.items():
        tried = [records[c.at(rate, seed)] for rate in c.learning_rates]
        if not any(math.isfinite(record.best) for record in tried):
            raise ValueError(f"every trial of {name} failed: {tried[0].failure or 'NaN'}")
    best = {name: best_rate(c, records, seed) for name, c in candidates.items()}
    at_edge = [
        f"{name}: {rate:g} of {', '.join(f'{r:g}' for r in candidates[name].learning_rates)}"
        for name, rate in best.items()
        if rate in (candidates[name].learning_rates[0], candidates[name].learning_rates[-1])
    ]
    if at_edge:
        raise SystemExit(
            "error: nothing is compared, since the best learning rate lies at the edge of its grid."
            f" Move the grids and run again ({'; '.join(at_edge)})"
        )
    tried = {
        name: [c.at(best[name], seed), *(c.at(best[name], seed).changed(**v) for v in c.variants)]
        for name, c in candidates.items()
    }
    run_trials(records, [trial for trials in tried.values() for trial in trials], processes)
    return {name: min(trials, key=lambda t: records[t].best) for name, trials in tried.items()}


def tuning(study: Study, records: Records) -> list[Record]:
    """Return the records that the winners were chosen by."""
    seed = study.seeds[0]
    found = []
    for candidate in study.candidates.values():
        best = candidate.at(best_rate(candidate, records, seed), seed)
        found += [records[candidate.at(rate, seed)] for rate in candidate.learning_rates]
        found += [records[best.changed(**variant)] for variant in candidate.variants]
    return found


def best_rate(candidate: Candidate, records: Records, seed: int) -> float:
    """Return the learning rate with the lowest loss."""
    return min(candidate.learning_rates, key=lambda rate: records[candidate.at(rate, seed)].best)


def run_seeds(
    study: Study, records: Records, winners: dict[str, Trial], processes: int
) -> list[Line]:
    """Run each candidate's best trial, and the subject's ablations, with every seed."""
    named = dict(winners)
    for name, change in study.ablations.items():
        named[f"{study.subject}: {name}"] = winners[study.subject].changed(**change)
    seeded = {
        name: [trial.changed({"seed": seed}) for seed in study.seeds]
        for name, trial in named.items()
    }
    # Seed by seed, so that a study that is stopped has some seeds of all.
    run_trials(
        records, [t for trials in zip(*seeded.values(), strict=True) for t in trials], processes
    )
    return [
        Line(name, named[name], [records[trial] for trial in trials])
        for name, trials in seeded.items()
    ]


def write(study: Study, records: Records, lines: list[Line], output: Path, heading: str) -> None:
    """Write table and picture, and print where they lie."""
    ours = [line for line in lines if line.name in study.candidates]
    reference = next(line for line in ours if line.name == study.reference)
    parts = [
        f"{heading}, hf_sophia {hf_sophia.__version__}; {len(study.seeds)} seeds, mean ± standard"
        " deviation.\n",
        table(ours, reference),
    ]
    if found := differences(
        [*tuning(study, records), *(r for line in lines for r in line.records)]
    ):
        parts.append(f"These records were made in environments that differ: {found}.\n")
    if study.ablations:
        subject = next(line for line in ours if line.name == study.subject)
        changed = [line for line in lines if line not in ours]
        parts += ["## Ablations\n", table([subject, *changed], subject)]
    seed = study.seeds[0]
    grids = {
        name: [(rate, records[c.at(rate, seed)]) for rate in c.learning_rates]
        for name, c in study.candidates.items()
    }
    parts += [f"## Learning rates, seed {seed}\n", learning_rates(grids)]
    (output / "table.md").write_text("\n".join(parts), encoding="utf-8")
    picture = plot(ours, output / "comparison.png", output.name)
    print("\n" + "\n".join(parts))
    print(f"{len(records)} trials in {output}; {picture or 'no picture: pip install matplotlib'}")


if __name__ == "__main__":
    main()
