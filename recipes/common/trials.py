"""Run trials, some at a time, and keep their records so that nothing is run twice."""

import fcntl
import importlib
import json
import math
import os
import platform
import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import transformers

import hf_sophia
from common.rivals import RIVALS
from common.study import Trial

#: What every trial's command line has, since only its evaluations are wanted.
_QUIET = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}

#: Steps of a run that only its pace is wanted of: some refreshes of the Hessian.
PACE_STEPS = 40


@dataclass(frozen=True)
class Record:
    """What a trial gave.

    Args:
        trial: The trial's fields.
        evaluations: Steps and validation losses.
        steps: Steps taken.
        seconds: Wall-clock time of training without its evaluations, whatever ran beside it.
        failure: The error that ended it, or None.
        environment: What times and, a little, losses depend on.
    """

    trial: Mapping[str, Any]
    evaluations: tuple[tuple[int, float], ...]
    steps: int
    seconds: float
    failure: str | None
    environment: Mapping[str, Any]

    @property
    def best(self) -> float:
        """The lowest validation loss; infinite where the run failed or ended in NaN."""
        losses = [loss for _, loss in self.evaluations]
        if self.failure or not losses or not math.isfinite(losses[-1]):
            return math.inf
        return min(loss for loss in losses if math.isfinite(loss))

    def steps_to(self, loss: float) -> float | None:
        """Return the steps to a validation loss, linear between evaluations; None: never."""
        before = None
        for step, reached in self.evaluations if math.isfinite(self.best) else ():
            if reached <= loss:
                if before is None or before[1] == reached:
                    return float(step)
                share = (before[1] - loss) / (before[1] - reached)
                return before[0] + share * (step - before[0])
            before = (step, reached)
        return None


class Records:
    """The records of trials in a file, which is whole at any moment.

    Args:
        path: The JSON file; made with the first record.

    Raises:
        ValueError: The file holds something else, or another process adds records to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Held until the process ends: a second one would overwrite what this one adds.
        self._lock = path.with_suffix(".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another study is writing to {path}") from None
        self._records: dict[str, Record] = {}
        #: Seconds per step by trial, in runs that took turns, and what they were measured with.
        self.paces: dict[str, list[float]] = {}
        self.paced_with: dict[str, Any] = {}
        if path.exists():
            try:
                whole = json.loads(path.read_text(encoding="utf-8"))
                rows, self.paces = whole["records"], whole.get("paces", {})
                self.paced_with = whole.get("paced_with", {})
                records = [
                    Record(**{**row, "evaluations": tuple(map(tuple, row["evaluations"]))})
                    for row in rows
                ]
                self._records = {Trial(**record.trial).key: record for record in records}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} holds no records of trials ({error}): choose another --output"
                ) from error

    def close(self) -> None:
        """Let others add records."""
        self._lock.close()

    def __getitem__(self, trial: Trial) -> Record:
        return self._records[trial.key]

    def __len__(self) -> int:
        return len(self._records)

    def missing(self, trials: Iterable[Trial]) -> list[Trial]:
        """Return the trials that have no record yet, each once.

        One that failed has a record, but with other code it may not fail.
        """
        unique = {trial.key: trial for trial in trials}
        return [
            trial
            for key, trial in unique.items()
            if key not in self._records or self._failed_elsewhere(self._records[key])
        ]

    def _failed_elsewhere(self, record: Record) -> bool:
        return bool(record.failure) and not code(record.trial["recipe"]).items() <= (
            record.environment.items()
        )

    def add(self, record: Record) -> None:
        """Add a record and write them all."""
        self._records[Trial(**record.trial).key] = record
        self._write()

    def set_paces(self, paces: Mapping[str, list[float]], environment: Mapping[str, Any]) -> None:
        """Replace all paces, since only those that were measured together can be compared."""
        self.paces, self.paced_with = dict(paces), dict(environment)
        self._write()

    def _write(self) -> None:
        lines = ",\n".join(json.dumps(asdict(r)) for r in self._records.values())
        new = self._path.with_suffix(".new")
        paces, code = json.dumps(self.paces, indent=1), json.dumps(self.paced_with)
        new.write_text(
            f'{{"records": [\n{lines}\n],\n"paced_with": {code},\n"paces": {paces}}}\n',
            encoding="utf-8",
        )
        os.replace(new, self._path)


def run_trials(records: Records, trials: Iterable[Trial], processes: int) -> None:
    """Run the trials that have no record, and print a line for each as it ends.

    Args:
        records: Where records are kept.
        trials: To run.
        processes: How many run at a time, each on an equal share of the cores.
    """
    missing = records.missing(trials)
    if not missing:
        return
    threads = max((os.cpu_count() or 1) // processes, 1)
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (threads,))
    with pool:
        running = [pool.submit(run_trial, trial) for trial in missing]
        try:
            for count, future in enumerate(as_completed(running), start=1):
                record = future.result()
                records.add(record)
                print(f"{count:3d}/{len(missing)}  {describe(record)}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def measure_paces(records: Records, trials: Sequence[Trial], rounds: int) -> None:
    """Run the first steps of each trial in turns, for their seconds per step.

    Whole runs are hours apart, and what else a machine does in between shows in their times.

    Args:
        records: Where paces are kept; nothing is run where they are there for all trials, measured
            with this code.
        trials: The trials.
        rounds: Runs of each.
    """
    measured = all(len(records.paces.get(trial.key, ())) >= rounds for trial in trials)
    if rounds == 0 or (measured and records.paced_with == code(trials[0].recipe)):
        return
    short = {"max_steps": PACE_STEPS, "eval_strategy": "no", "warmup_steps": 1}
    paces: dict[str, list[float]] = {trial.key: [] for trial in trials}
    with ProcessPoolExecutor(
        1, get_context("spawn"), _start_worker, (os.cpu_count() or 1,)
    ) as pool:
        for turn in range(rounds):
            order = random.Random(turn).sample(list(trials), len(trials))
            for trial in order:
                record = pool.submit(run_trial, trial.changed(short)).result()
                pace = math.nan if record.failure else record.seconds / record.steps
                paces[trial.key].append(pace)
                print(f"round {turn + 1} of {rounds}  {pace:.3f} s/step  {trial.optim}", flush=True)
    records.set_paces(paces, code(trials[0].recipe))


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)

    def end_with_the_parent() -> None:
        # A pool's processes outlive a parent that is killed, and would go on with its queue.
        parent_process().join()
        os._exit(1)

    Thread(target=end_with_the_parent, daemon=True).start()


def describe(record: Record) -> str:
    """Say in a line what a trial was and what it gave."""
    arguments, options = record.trial["arguments"], record.trial["optim_args"]
    given = ",".join(f"{name}={value}" for name, value in options.items())
    outcome = record.failure or f"loss {record.best:.4f}"
    return (
        f"{record.trial['optim']} lr {arguments['learning_rate']:g} seed {arguments['seed']}"
        f" {given}: {outcome} ({record.seconds:.0f} s)"
    )


def run_trial(trial: Trial) -> Record:
    """Train as the recipe does, with evaluations and without checkpoints.

    Args:
        trial: The trial.

    Returns:
        Its record. A ValueError while it trains, such as a gradient that holds NaN, makes it a
        failed one.

    Raises:
        ValueError: The recipe or the optimizer does not accept the trial's options.
    """
    rival = RIVALS.get(trial.optim)
    named = {} if rival else {"optim": trial.optim, "optim_args": _joined(trial.optim_args)}
    with tempfile.TemporaryDirectory() as folder:
        nothing = Path(folder) / "nothing.yaml"
        nothing.touch()
        # The study says everything: the recipe's own configuration may change, records stay.
        options = {"config": nothing, "optim": "adamw_torch", "optim_args": ""}
        options |= {**trial.arguments, **named, **_QUIET, "output_dir": folder}
        argv = [f"--{name}={_written(value)}" for name, value in options.items()]
        failure = None
        log = Path(folder) / "log.txt"
        with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
            try:
                trainer = importlib.import_module(trial.recipe).prepare(argv).trainer
                if trial.validation_rows:
                    rows = trainer.eval_dataset
                    every = max(len(rows) // trial.validation_rows, 1)
                    trainer.eval_dataset = rows.select(range(0, len(rows), every))
                if rival:
                    kind, own = rival(trainer.model, dict(trial.optim_args))
                    rate = trainer.args.learning_rate
                    trainer.optimizer_cls_and_kwargs = (kind, {"lr": rate, **own})
                trainer.create_optimizer()  # its options are checked here
            except (SystemExit, ValueError, TypeError, OSError, ImportError) as error:
                reason = str(error)
                file.flush()
                if isinstance(error, SystemExit) and not isinstance(error.code, str):
                    reason = log.read_text().strip().splitlines()[-1]  # argparse has printed it
                raise ValueError(f"{trial.optim} {dict(trial.optim_args)}: {reason}") from error
            try:
                trainer.train()
            except ValueError as error:
                failure = f"{type(error).__name__}: {error}".splitlines()[0]
    history = trainer.state.log_history
    evaluations = [entry for entry in history if "eval_loss" in entry]
    spent = sum(entry["eval_runtime"] for entry in evaluations)
    # There is none of a run that failed.
    whole = next((e["train_runtime"] for e in history if "train_runtime" in e), spent)
    return Record(
        asdict(trial),
        tuple((entry["step"], entry["eval_loss"]) for entry in evaluations),
        trainer.state.global_step,
        whole - spent,
        failure,
        {
            "device": str(trainer.args.device),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **code(trial.recipe),
        },
    )


@cache
def code(recipe: str) -> dict[str, str]:
    """Return hashes of the code that a trial's result depends on, which changes between versions.

    Args:
        recipe: The recipe's module.
    """
    package = Path(hf_sophia.__file__).parent
    common = Path(__file__).parent
    elsewhere = {common / f"{name}.py" for name in ("study", "trials", "verdict")}
    own = [common.parent / f"{recipe}.py", *(set(common.glob("*.py")) - elsewhere)]
    sources = [path for path in package.rglob("*") if path.suffix in (".py", ".c")]
    return {
        "hf_sophia": f"{hf_sophia.__version__} {_hash(sources)}",
        "recipe": f"{recipe} {_hash(own)}",
    }


def _hash(files: Iterable[Path]) -> str:
    return sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:8]


def _joined(options: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items())


def _written(value: Any) -> str:
    return json.dumps(value) if isinstance(value, Mapping) else str(value)
