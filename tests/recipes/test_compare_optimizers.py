"""Comparing optimizers: what is refused, what is run, and what is said of it."""

import json
import math
import re
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import compare_optimizers
import pytest
import yaml
from common import trials as trials_module
from common import verdict
from common.study import Trial, read_study
from common.trials import PACE_STEPS, Record, Records, code, measure_paces, run_trial
from common.verdict import Line, differences, plot, steps_ratios, table

from hf_sophia.trainer.picture import new_figure


def study(**changes: Any) -> dict[str, Any]:
    candidate = {"optim": "adamw_torch", "learning_rate": [1.0, 2.0, 4.0, 8.0]}
    tuned = {**candidate, "variants": [{"arguments": {"adam_beta1": 0.8}}]}
    ours = {**tuned, "optim": "sophia", "optim_args": {"rho": "auto"}}
    ours["variants"] = [{"optim_args": {"k": 5}}]
    values = {
        "recipe": "pretrain_gpt2",
        "arguments": {"max_steps": 4},
        "seeds": [1, 2, 3],
        "reference": "adamw",
        "subject": "sophia",
        "optimizers": {"adamw": tuned, "sophia": ours},
        "ablations": {"k 1": {"optim_args": {"k": 1}}},
    }
    return {name: value for name, value in {**values, **changes}.items() if value is not None}


@pytest.fixture
def write(tmp_path):
    def write(**changes: Any) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(study(**changes)))
        return path

    return write


def record(trial: Trial, losses: list[float], seconds: float = 1.0, failure=None) -> Record:
    evaluations = tuple((10 * (i + 1), loss) for i, loss in enumerate(losses))
    return Record(asdict(trial), evaluations, 10 * len(losses), seconds, failure, {})


def candidate(**options) -> dict:
    return {"optim": "a", "learning_rate": [1, 2, 3, 4], **options}


@pytest.fixture
def landscape(monkeypatch) -> list[Trial]:
    """Replace training by a formula: the best rate is 2, k = 5 helps, and seeds differ a little."""
    run: list[Trial] = []

    def fake(records: Records, trials, processes: int) -> None:
        for trial in records.missing(trials):
            run.append(trial)
            options = trial.arguments
            loss = 3.0 + abs(options["learning_rate"] - 2.0) + 0.01 * options["seed"]
            loss -= 0.5 * (trial.optim_args.get("k") == 5) + 0.1 * (trial.optim == "sophia")
            records.add(record(trial, [9.0, loss]))

    def paces(records: Records, trials, rounds: int) -> None:
        paces = {t.key: [0.1 + 0.1 * (t.optim == "sophia")] * rounds for t in trials}
        records.set_paces(paces, {})

    monkeypatch.setattr(compare_optimizers, "run_trials", fake)
    monkeypatch.setattr(compare_optimizers, "measure_paces", paces)
    return run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": None}, "seeds missing"),
        ({"seeds": [1, 1]}, "seeds must be different numbers"),
        ({"colour": 1}, "unknown colour"),
        ({"reference": "sgd"}, "reference 'sgd' is not among"),
        ({"subject": None}, "ablations need a subject"),
        ({"ablations": {"k": {"k": 1}}}, "ablations.k: unknown k"),
        ({"optimizers": {"adamw": [1]}}, "optimizers.adamw: wanted"),
        ({"optimizers": [1]}, "optimizers: wanted"),
        ({"ablations": ["k"]}, "ablations: wanted"),
        ({"arguments": [1]}, "arguments: wanted"),
        ({"seeds": 3}, "seeds must be a list of whole numbers, got 3"),
        ({"seeds": ["a"]}, "seeds must be a list of whole numbers"),
        ({"reference": ""}, "reference '' is not among"),
        (
            {"optimizers": {"adamw": {"optim": "a", "learning_rate": 1e-3}}},
            "at least 4 values > 0 in ascending order, got 0.001",
        ),
        (
            {"optimizers": {"adamw": {"optim": "a", "learning_rate": [-1, 1, 2, 3]}}},
            "at least 4 values > 0 in ascending order",
        ),
        (
            {"optimizers": {"a": {"optim": "a", "learning_rate": [1, 2, 3, 4], "variants": [{}]}}},
            "a variant is the same as the base",
        ),
        (
            {"optimizers": {"a": {"optim": "a", "learning_rate": [1, 2, 3, 4], "optim_args": "k"}}},
            "optim_args: wanted",
        ),
        (
            {"optimizers": {"a": candidate(arguments={"max_steps": 9, "weight_decay": 0.1})}},
            "optimizers.a: max_steps must be the same for all optimizers",
        ),
        (
            {"optimizers": {"a": candidate(variants=[{"arguments": {"data_seed": 7}}])}},
            "variants: data_seed must be the same",
        ),
        (
            {"optimizers": {"a": candidate(variants=[{"optim_args": {"lr": 99}}])}},
            "optim_args must not hold lr",
        ),
        (
            {"ablations": {"k": {"arguments": {"learning_rate": 99}}}},
            "ablations.k: learning_rate must be the same",
        ),
        (
            {"ablations": {"k": {"arguments": {"gradient_accumulation_steps": 4}}}},
            "ablations.k: per_device_train_batch_size times gradient_accumulation_steps must stay",
        ),
        (
            {"optimizers": {"adamw": {"optim": "a", "learning_rate": [1, 2, 3]}}},
            "at least 4 values > 0 in ascending order",
        ),
        (
            # An upper edge that would never be the best.
            {"optimizers": {"adamw": {"optim": "a", "learning_rate": [1, 2, 3, float("inf")]}}},
            "at least 4 values > 0 in ascending order",
        ),
        (
            {"optimizers": {"adamw": {"optim": "a", "learning_rate": [1, 3, 2, 4]}}},
            "at least 4 values > 0 in ascending order",
        ),
        ({"recipe": "json"}, "recipe must be one of finetune_causal_lm, .*, got 'json'"),
        ({"recipe": ["pretrain_gpt2"]}, r"recipe must be one of .*got \['pretrain_gpt2'\]"),
        ({"optimizers": {"a": candidate(optim=["adam"])}}, r"optim must be a name, got \['adam'\]"),
        ({"optimizers": {1: candidate()}}, "optimizers: a name was read as 1: put quotes"),
        ({"ablations": {False: {}}}, "ablations: a name was read as False: put quotes"),
        ({"reference": ["adamw"]}, r"reference \['adamw'\] is not among"),
        ({"validation_rows": -5}, "validation_rows must be a whole number > 0, got -5"),
        ({"seeds": [True]}, "seeds must be a list of whole numbers"),
        (
            {"arguments": {"gradient_accumulation_steps": 1.5}},
            "gradient_accumulation_steps must be a whole number > 0, got 1.5",
        ),
    ],
)
def test_a_study_that_cant_be_compared_is_refused(changes, message, write, tmp_path) -> None:
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        compare_optimizers.main([str(write(**changes)), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_budgets_must_be_equal(write) -> None:
    optimizers = study()["optimizers"]
    optimizers["adamw"]["variants"] = []
    with pytest.raises(ValueError, match=r"same tuning budget.*'adamw': 4, 'sophia': 5"):
        read_study(write(optimizers=optimizers))


def test_a_study_extends_another(write, tmp_path) -> None:
    base = write()
    shorter = tmp_path / "shorter.yaml"
    changes = {
        "extends": base.name,
        "arguments": {"max_steps": 2},
        "subject": None,
        "ablations": None,
        "optimizers": {"sophia": None, "adamw": {"variants": []}},
    }
    shorter.write_text(yaml.safe_dump(changes))
    found = read_study(shorter)
    assert list(found.candidates) == ["adamw"]
    assert found.candidates["adamw"].variants == ()
    assert found.candidates["adamw"].base.arguments == {"max_steps": 2}
    assert found.seeds == (1, 2, 3)
    assert found.subject is None
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"extends": shorter.name}))
    for name in (shorter.name, other.name):
        shorter.write_text(yaml.safe_dump({"extends": name}))
        with pytest.raises(ValueError, match="extends must name a file that does not extend this"):
            read_study(shorter)


def test_a_null_of_a_study_of_its_own_is_as_if_nothing_were_said(write) -> None:
    found = read_study(write(arguments={"max_steps": 4, "per_device_train_batch_size": None}))
    assert found.candidates["adamw"].base.arguments == {"max_steps": 4}


def test_the_best_of_each_runs_with_every_seed_and_nothing_twice(
    write, landscape, tmp_path, capsys
) -> None:
    argv = [str(write()), "--output", str(tmp_path / "out")]
    lines = {line.name: line for line in compare_optimizers.main(argv)}
    # 4 rates and a variant each; two more seeds each; an ablation with three.
    assert len(landscape) == 2 * 5 + 2 * 2 + 3
    assert len({trial.key for trial in landscape}) == len(landscape)
    assert lines["sophia"].trial.optim_args == {"rho": "auto", "k": 5}
    assert lines["sophia"].trial.arguments["learning_rate"] == 2.0
    assert lines["adamw"].trial.arguments == {"max_steps": 4, "learning_rate": 2.0, "seed": 1}
    assert lines["sophia"].losses == pytest.approx([2.41, 2.42, 2.43])
    assert lines["sophia: k 1"].losses == pytest.approx([2.91, 2.92, 2.93])
    assert lines["sophia"].pace == pytest.approx(2 * lines["adamw"].pace)
    assert math.isnan(lines["sophia: k 1"].pace)
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| sophia | 2.420 ± 0.010 | -0.600 ± 0.000 |" in text
    assert "1: 4.010, 2: 3.010, 4: 5.010, 8: 9.000" in text
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 5_000

    compare_optimizers.main(argv)
    assert len(landscape) == 17
    # A grid that moves costs its new points.
    optimizers = study()["optimizers"]
    optimizers["adamw"]["learning_rate"] = [0.5, 1.0, 2.0, 4.0]
    compare_optimizers.main([str(write(optimizers=optimizers)), *argv[1:]])
    assert [trial.arguments["learning_rate"] for trial in landscape[17:]] == [0.5]


@pytest.mark.parametrize("rates", [[2.0, 4.0, 8.0, 16.0], [0.25, 0.5, 1.0, 2.0]])
def test_a_best_rate_at_the_edge_is_refused(rates, write, landscape, tmp_path) -> None:
    optimizers = study()["optimizers"]
    optimizers["sophia"]["learning_rate"] = rates
    with pytest.raises(SystemExit, match=r"lies at the edge.*\(sophia: 2 of "):
        compare_optimizers.main([str(write(optimizers=optimizers)), "--output", str(tmp_path)])
    assert len(landscape) == 8
    assert not (tmp_path / "table.md").exists()


def test_only_some_run_beside_the_reference(write, landscape, tmp_path) -> None:
    argv = [str(write()), "--output", str(tmp_path / "out"), "--only"]
    assert [line.name for line in compare_optimizers.main([*argv, "adamw"])] == ["adamw"]
    assert {trial.optim for trial in landscape} == {"adamw_torch"}
    lines = compare_optimizers.main([*argv[:-1], "--no-ablations"])
    assert [line.name for line in lines] == ["adamw", "sophia"]
    with pytest.raises(SystemExit, match="sgd not among adamw, sophia"):
        compare_optimizers.main([*argv, "sgd"])


def test_another_reference_measures_the_others(write, landscape, tmp_path) -> None:
    argv = [str(write()), "--output", str(tmp_path / "out"), "--no-ablations"]
    for reference, other in (("adamw", "sophia"), ("sophia", "adamw")):
        compare_optimizers.main([*argv, "--reference", reference])
        verdict = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
        assert f"| minus {reference} |" in verdict
        (row,) = [row for row in verdict.splitlines() if row.startswith(f"| {reference} |")]
        assert "| +0.000 ± 0.000 | 1.00 |" in row
        (row,) = [row for row in verdict.splitlines() if row.startswith(f"| {other} |")]
        assert "| +0.000 ± 0.000 | 1.00 |" not in row
    with pytest.raises(SystemExit, match="reference 'sgd' not among adamw, sophia"):
        compare_optimizers.main([*argv, "--reference", "sgd"])


def test_steps_are_counted_between_evaluations_and_failures_never_win() -> None:
    trial = Trial("r", {"learning_rate": 1.0, "seed": 1}, "sophia", {})
    slow, fast = record(trial, [5.0, 4.0, 3.0, 2.0], 40.0), record(trial, [4.0, 1.0], 40.0)
    assert slow.steps_to(2.0) == 40.0
    assert fast.steps_to(2.0) == pytest.approx(10 + 10 * 2 / 3)
    assert fast.steps_to(4.5) == 10.0
    assert slow.steps_to(1.5) is None
    failed = record(trial, [0.5], failure="ValueError: NaN")
    assert failed.best == float("inf")
    assert record(trial, [float("nan"), 2.5]).best == 2.5
    reference, other = Line("a", trial, [slow], paces=[1.0]), Line("b", trial, [fast], paces=[2.0])
    assert steps_ratios(other, reference) == [pytest.approx(50 / 3 / 40)]
    assert steps_ratios(other, reference, timed=True) == [pytest.approx(2 * 50 / 3 / 40)]
    rows = table([reference, other, Line("c", trial, [failed])], reference).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["b", "a", "c"]
    assert "| never | never |" in rows[-1]


def test_what_diverged_is_said_and_spoils_nothing(tmp_path) -> None:
    trial = Trial("r", {"learning_rate": 1.0, "seed": 1}, "sophia", {})
    good = [record(trial, [5.0, 4.0, loss], 30.0) for loss in (3.0, 3.2, 3.4)]
    failed = record(trial, [5.0], -1.0, failure="ValueError: NaN")
    diverged = record(trial, [3.5, float("nan"), float("nan")], 30.0)
    assert diverged.best == float("inf")
    reference = Line("a", trial, good)
    some, none = Line("b", trial, [good[0], failed, diverged]), Line("c", trial, [failed] * 3)
    rows = table([reference, some, none], reference).splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["a", "b", "c"]
    assert "| 3.000 (1 of 3) | +0.000 (1 of 3) | 1.00 (1 of 3) |" in rows[1]
    assert "| failed | failed | never | never |" in rows[2]
    assert plot([reference, some, none], tmp_path / "p.png", "t").stat().st_size > 5_000
    assert plot([none], tmp_path / "q.png", "t").exists()


def test_thirty_lines_of_a_picture_look_different(tmp_path, monkeypatch) -> None:
    figures = []

    def remembered(**options: object) -> object:
        figures.append(new_figure(**options))
        return figures[-1]

    monkeypatch.setattr(verdict, "new_figure", remembered)
    trial = Trial("r", {"learning_rate": 1.0, "seed": 1}, "sophia", {})
    lines = [Line(f"n{i}", trial, [record(trial, [5.0, 4.0 + i], 30.0)]) for i in range(30)]
    assert verdict.plot(lines, tmp_path / "p.png", "t").exists()
    (axes,) = figures[0].axes
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
    assert len(looks) == len(axes.lines) == 30
    (legend,) = figures[0].legends
    box, inside = legend.get_window_extent(), axes.get_window_extent()
    assert box.x0 >= inside.x1
    assert box.x1 <= figures[0].bbox.x1
    assert box.y0 >= figures[0].bbox.y0


def test_a_pace_is_compared_within_its_rounds() -> None:
    """The machine was twice as slow in the second round, for both."""
    trial = Trial("r", {"learning_rate": 1.0, "seed": 1}, "sophia", {})
    one = record(trial, [5.0, 4.0])
    reference = Line("a", trial, [one], paces=[1.0, 2.0, 1.0])
    other = Line("b", trial, [one], paces=[1.5, 1.6, 1.2])
    assert steps_ratios(other, reference, timed=True) == [pytest.approx(1.2)]
    assert "| 1.20 (0.80 to 1.50) |" in table([reference, other], reference)


def test_environments_that_differ_are_told_of() -> None:
    trial = Trial("r", {"learning_rate": 1.0, "seed": 1}, "sophia", {})
    ours, theirs = record(trial, [1.0]), record(trial, [1.0])
    assert differences([ours, theirs]) == ""
    ours = replace(ours, environment={"threads": 1, "torch": "2"})
    theirs = replace(theirs, environment={"threads": 2, "torch": "2"})
    assert differences([ours, theirs]) == "threads: 1, 2"
    # Of records from before it was noted.
    noted = replace(ours, environment={**ours.environment, "hf_sophia": "1 ab"})
    assert differences([ours, noted]) == "hf_sophia: 1 ab, unknown"


def test_times_that_were_not_measured_together_are_not_compared() -> None:
    trial = Trial("r", {"learning_rate": 1.0, "seed": 1}, "sophia", {})
    one = record(trial, [5.0, 4.0])
    timed, other = Line("a", trial, [one], paces=[0.5]), Line("b", trial, [one])
    rows = table([timed, other], timed)
    assert "| 1.00 | unknown |" in rows
    assert "| 1.00 | 1.00 |" in rows


def test_paces_are_measured_in_turns_and_once(tmp_path, monkeypatch) -> None:
    ran = []

    class Pool:
        def __init__(self, *args) -> None: ...
        def __enter__(self):
            return self

        def __exit__(self, *args) -> None: ...
        def submit(self, function, trial):
            ran.append(trial)
            failure = "ValueError: NaN" if trial.optim == "b" else None
            future = Future()
            future.set_result(record(trial, [1.0], 20.0, failure=failure))
            return future

    monkeypatch.setattr(trials_module, "ProcessPoolExecutor", Pool)
    trials = [Trial("pretrain_gpt2", {"learning_rate": 1.0, "seed": 1}, name, {}) for name in "abc"]
    records = Records(tmp_path / "results.json")
    for _ in range(2):
        measure_paces(records, trials, 2)
    assert [[t.optim for t in ran[i : i + 3]] for i in (0, 3)] != [["a", "b", "c"]] * 2
    assert sorted(t.optim for t in ran[:3]) == sorted(t.optim for t in ran[3:]) == ["a", "b", "c"]
    assert {t.arguments["max_steps"] for t in ran} == {PACE_STEPS}
    records.close()
    again = Records(tmp_path / "results.json")
    assert again.paces[trials[0].key] == [2.0, 2.0]
    assert all(map(math.isnan, again.paces[trials[1].key]))
    measure_paces(again, trials, 3)
    assert len(ran) == 6 + 9  # more rounds are measured anew, all together
    monkeypatch.setattr(trials_module, "code", lambda recipe: {"hf_sophia": "another"})
    measure_paces(again, trials, 3)
    assert len(ran) == 6 + 9 + 9  # and all with other code


def test_a_failure_of_other_code_is_tried_again(tmp_path) -> None:
    good, bad, elsewhere = (
        Trial("pretrain_gpt2", {"learning_rate": 1.0, "seed": 1}, name, {}) for name in "abc"
    )
    records = Records(tmp_path / "results.json")
    records.add(record(good, [1.0]))
    failed = record(bad, [], failure="ValueError: NaN")
    records.add(replace(failed, environment=code("pretrain_gpt2")))
    records.add(record(elsewhere, [], failure="ValueError: NaN"))
    assert records.missing([good, bad, elsewhere]) == [elsewhere]


def test_records_know_the_code_that_they_depend_on(tmp_path, monkeypatch) -> None:
    hashes = {name: code(name) for name in ("pretrain_gpt2", "finetune_seq2seq")}
    assert len({found["hf_sophia"] for found in hashes.values()}) == 1
    assert len({found["recipe"] for found in hashes.values()}) == 2


def test_an_optimizer_that_always_fails_is_no_edge(write, tmp_path, monkeypatch) -> None:
    def fail(records: Records, trials, processes: int) -> None:
        for trial in records.missing(trials):
            records.add(record(trial, [], failure="ValueError: NaN at step 3"))

    monkeypatch.setattr(compare_optimizers, "run_trials", fail)
    monkeypatch.setattr(compare_optimizers, "measure_paces", lambda *args: None)
    with pytest.raises(SystemExit, match="every trial of adamw failed: ValueError: NaN at step 3"):
        compare_optimizers.main([str(write()), "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("optim", "optim_args", "arguments", "message"),
    [
        ("sophia", {"roh": 1}, {}, "unknown option 'roh'"),
        ("nadamw", {"beta1": 0.9}, {}, "unexpected keyword argument 'beta1'"),
        ("sophia", {}, {"colour": 1}, "unrecognized arguments: --colour=1"),
        ("sophia", {}, {"n_head": 3}, "n_embd=16 is not a multiple of n_head=3"),
        ("adamw", {}, {}, "invalid choice: 'adamw'"),
    ],
)
def test_wrong_options_of_a_trial_end_the_study_with_a_message(
    optim, optim_args, arguments, message, write_rows, options
) -> None:
    rows = write_rows([{"text": f"{i} and {i * i} make {i + i * i}."} for i in range(200)])
    given = dict(option[2:].split("=", 1) for option in options(train_file=rows))
    trial = Trial("pretrain_gpt2", {**given, "seed": 1, **arguments}, optim, optim_args)
    with pytest.raises(ValueError, match=re.escape(message)):
        run_trial(trial)


def test_records_survive_and_foreign_files_are_refused(tmp_path) -> None:
    path = tmp_path / "results.json"
    trial = Trial("r", {"learning_rate": 1.0, "seed": 1}, "sophia", {"betas": [0.9, 0.95]})
    records = Records(path)
    records.add(record(trial, [5.0, 4.0]))
    with pytest.raises(ValueError, match="another study is writing to"):
        Records(path)
    records.close()
    again = Records(path)
    assert again.missing([trial, trial.changed({"seed": 2}), trial.changed({"seed": 2})]) == [
        trial.changed({"seed": 2})
    ]
    assert again[trial] == record(trial, [5.0, 4.0])
    again.close()
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="results.json holds no records of trials"):
        Records(path)


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("sophia", {"rho": "auto", "k": 2}),
        ("nadamw", {"betas": [0.9, 0.95]}),
        ("muon_adamw", {}),
        ("lion", {}),
        ("second_moment_sophia", {"rho": "auto"}),
    ],
)
def test_a_trial_trains_with_the_optimizer_it_names(
    optim, optim_args, write_rows, options, caplog
) -> None:
    rows = write_rows([{"text": f"{i} and {i * i} make {i + i * i}."} for i in range(200)])
    given = dict(option[2:].split("=", 1) for option in options(train_file=rows))
    given |= {"learning_rate": 5e-3, "seed": 1, "eval_strategy": "steps", "block_size": 16}
    given |= {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    }
    trial = Trial("pretrain_gpt2", given, optim, optim_args, validation_rows=5)
    result = run_trial(trial)
    assert result.failure is None
    assert [step for step, _ in result.evaluations] == [6, 12]
    assert result.evaluations[-1][1] < result.evaluations[0][1] < 6.0
    assert result.steps == 12
    assert result.seconds > 0
    assert run_trial(trial).evaluations == result.evaluations
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
