"""The launcher: scripts of the shape of HF's examples, unmodified, really refresh the Hessian."""

import json
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import get_last_checkpoint

from hf_sophia import SophiaTrainer, SophiaTrainerMixin
from hf_sophia.trainer import injection

from .processes import PYTHON, all_ranks_finished, execute, torchrun
from .runs import arguments, dataset

SCRIPTS = Path(__file__).parent / "scripts"
BIN = Path(sys.executable).parent
LAUNCHED = [sys.executable, "-m", "hf_sophia.run"]
COMMAND = [str(BIN / "hf-sophia"), "run"]


def options(output: Path, **changes) -> list[str]:
    values = {
        "output_dir": output,
        "optim": "sophia",
        "optim_args": "rho=0.3,k=3",
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "save_steps": 4,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return [piece for name, value in values.items() for piece in (f"--{name}", str(value))]


def check_refreshed(output: Path, steps: int = 8, predictions: int | None = None) -> None:
    """The saved Hessian of every trained parameter is positive, and the logs say so too."""
    checkpoint = Path(get_last_checkpoint(str(output)))
    assert checkpoint.name == f"checkpoint-{steps}"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    states = list(saved["state"].values())
    assert len(states) == sum(len(group["params"]) for group in saved["param_groups"]) > 5
    for state in states:
        # Keys' biases cancel in the softmax; their gradients are rounding.
        if state["exp_avg"].abs().max() > 1e-7:
            assert state["hessian"].max() > 0
            assert state["hessian"].isfinite().all()
    logs = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert all(entry["sophia/hessian_norm"] > 0 for entry in logs if "loss" in entry)
    if predictions is not None:
        assert logs[0]["sophia/hessian_tokens"] == predictions


def metrics_of(output: Path) -> dict:
    return json.loads((output / "eval_results.json").read_text())


@pytest.mark.parametrize("launcher", [LAUNCHED, COMMAND], ids=["module", "command"])
def test_a_causal_language_model(launcher, tmp_path) -> None:
    script = [SCRIPTS / "run_clm.py", "--model_type", "gpt2", "--do_train", "--do_eval"]
    result = execute([*launcher, *script, *options(tmp_path / "out")])
    assert result.returncode == 0, result.stderr
    check_refreshed(tmp_path / "out", predictions=4 * 11)
    assert metrics_of(tmp_path / "out")["perplexity"] < 40


def test_a_resumed_run_goes_on_with_its_hessian(tmp_path) -> None:
    script = [*LAUNCHED, SCRIPTS / "run_clm.py", "--do_train"]
    assert execute([*script, *options(tmp_path / "whole")]).returncode == 0
    first = tmp_path / "whole" / "checkpoint-4"
    resumed = options(tmp_path / "resumed", resume_from_checkpoint=first)
    result = execute([*script, *resumed])
    assert result.returncode == 0, result.stderr
    check_refreshed(tmp_path / "resumed")
    states = [
        torch.load(tmp_path / name / "checkpoint-8" / "optimizer.pt", weights_only=True)["state"]
        for name in ("whole", "resumed")
    ]
    for index, state in states[0].items():
        assert torch.equal(state["hessian"], states[1][index]["hessian"])


def test_a_classifier_with_evaluate(tmp_path) -> None:
    result = execute(
        [*LAUNCHED, SCRIPTS / "run_glue.py", *options(tmp_path / "out")],
        HF_HOME=str(tmp_path / "cache"),
    )
    assert result.returncode == 0, result.stderr
    check_refreshed(tmp_path / "out", predictions=4)
    assert 0.0 <= metrics_of(tmp_path / "out")["eval_accuracy"] <= 1.0


def test_an_encoder_decoder_with_generation(tmp_path) -> None:
    changes = options(tmp_path / "out", predict_with_generate=True)
    result = execute([*LAUNCHED, SCRIPTS / "run_summarization.py", *changes])
    assert result.returncode == 0, result.stderr
    check_refreshed(tmp_path / "out", predictions=4 * 5)
    assert metrics_of(tmp_path / "out")["eval_width"] >= 1


def test_a_trainer_of_the_scripts_own(tmp_path) -> None:
    result = execute([*LAUNCHED, SCRIPTS / "run_qa.py", *options(tmp_path / "out")])
    assert result.returncode == 0, result.stderr
    check_refreshed(tmp_path / "out", predictions=8)
    metrics = metrics_of(tmp_path / "out")
    assert metrics["eval_greeting"] == "hello"
    assert metrics["eval_losses"] == 8 + 1


@pytest.mark.parametrize("script", ["run_clm.py", "run_qa.py"])
def test_two_processes_under_torchrun(script, tmp_path) -> None:
    launcher = [*torchrun(2), "-m", "hf_sophia.run"]
    changes = {"do_train": True} if script == "run_clm.py" else {}
    result = execute([*launcher, SCRIPTS / script, *options(tmp_path / "out", **changes)])
    assert all_ranks_finished(result), result.stderr
    # Counted over both processes.
    check_refreshed(tmp_path / "out", predictions=2 * (44 if script == "run_clm.py" else 8))


def test_accelerate_launch(tmp_path) -> None:
    launcher = [BIN / "accelerate", "launch", "--cpu", "--num_processes", 1, "-m", "hf_sophia.run"]
    script = [SCRIPTS / "run_clm.py", "--do_train"]
    environment = {"HF_HOME": str(tmp_path / "cache")}
    result = execute([*launcher, *script, *options(tmp_path / "out")], **environment)
    assert result.returncode == 0, result.stderr
    check_refreshed(tmp_path / "out", predictions=4 * 11)


PROBE = """
import json, os, pickle, sys, __main__
class Here: pass
print(json.dumps({
    "names": sorted(globals()),
    "name": __name__, "file": __file__, "package": __package__, "spec": __spec__,
    "argv": sys.argv, "path": sys.path[0], "main": __main__.__dict__ is globals(),
    "pickled": type(pickle.loads(pickle.dumps(Here()))) is Here,
    "sibling": __import__("sibling").VALUE, "cwd": os.getcwd(),
}))
"""


@pytest.mark.parametrize("launcher", [LAUNCHED, COMMAND], ids=["module", "command"])
@pytest.mark.parametrize("linked", [False, True], ids=["plain", "link"])
def test_the_script_sees_what_python_would_show_it(launcher, linked, tmp_path) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "sibling.py").write_text("VALUE = 5")
    (folder / "probe.py").write_text(PROBE)
    script = "scripts/probe.py"
    if linked:
        script = "link.py"
        (tmp_path / script).symlink_to(folder / "probe.py")
    seen = []
    for start in (PYTHON, launcher):
        result = execute([*start, script, "--optim", "sophia", "two words"], cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        seen.append(json.loads(result.stdout))
    assert seen[0] == seen[1]
    assert seen[0]["argv"] == [script, "--optim", "sophia", "two words"]


@pytest.mark.parametrize(
    "text",
    [
        "import sys\nsys.exit(7)",
        "raise SystemExit('a last word')",
        "def inner():\n    return 1 / 0\ntry:\n    inner()\nexcept ZeroDivisionError as e:\n"
        "    raise KeyError('outer') from e",
        "x = (\n",
        "# -*- coding: latin-1 -*-\nprint('\\xe9')\nraise ValueError('\\xe9')",
        # A process in the background may have inherited that it ignores the signal.
        "import os, signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)",
        "import sys\nsys.excepthook = lambda *error: print(error[0].__name__)\n1 / 0",
        "import nowhere_to_be_found",
    ],
    ids=["exit", "message", "chained", "syntax", "encoding", "interrupt", "hook", "import"],
)
def test_endings_are_those_of_python(text, tmp_path) -> None:
    (tmp_path / "script.py").write_bytes(text.encode("latin-1"))
    ends = []
    for start in (PYTHON, LAUNCHED):
        result = execute([*start, "script.py"], cwd=tmp_path, PYTHONIOENCODING="utf-8")
        ends.append((result.returncode, result.stdout, result.stderr))
    assert ends[0] == ends[1]
    assert ends[0] != (0, "", "")


@pytest.mark.parametrize(
    ("start", "arguments", "message"),
    [
        (LAUNCHED, [], "a script's path comes first, got 'nothing'"),
        (LAUNCHED, ["--optim", "sophia"], "a script's path comes first, got '--optim'"),
        (LAUNCHED, ["nowhere.py"], "nowhere.py': no such file"),
        (LAUNCHED, ["."], "no such file"),
        (COMMAND[:1], [], "a command is missing"),
        (COMMAND[:1], ["train.py"], "unknown command 'train.py'"),
    ],
)
def test_a_wrong_command_line_is_explained(start, arguments, message, tmp_path) -> None:
    result = execute([*start, *arguments], cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "usage:" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("start", [LAUNCHED, COMMAND[:1], COMMAND])
def test_help(start) -> None:
    result = execute([*start, "--help"])
    assert result.returncode == 0
    assert "torchrun --nproc_per_node 2 -m hf_sophia.run" in result.stdout


def test_an_unmodified_script_without_the_launcher_is_refused(tmp_path) -> None:
    result = execute([*PYTHON, SCRIPTS / "run_clm.py", "--do_train", *options(tmp_path / "out")])
    assert result.returncode != 0
    assert "invalid choice: 'sophia'" in result.stderr


def test_the_injection_reaches_subclasses_and_can_be_undone(tiny_gpt2, tmp_path) -> None:
    class Own(Trainer):
        def __init__(self, *args, greeting=None, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.greeting = greeting

    class Base(Trainer):
        kinds: ClassVar[list[str]] = []

        def __init_subclass__(cls, kind, **kwargs) -> None:
            super().__init_subclass__(**kwargs)
            cls.kinds.append(kind)

    class Hooked(Base, kind="own"):
        pass

    def make(cls, **options):
        return cls(tiny_gpt2(), arguments(tmp_path), train_dataset=dataset(), **options)

    before = dict(vars(Trainer))
    injection.inject()
    injection.inject()
    try:
        for cls, options in ((Trainer, {}), (Own, {"greeting": 1})):
            trainer = make(cls, **options)
            assert isinstance(trainer, SophiaTrainerMixin)
            assert isinstance(trainer, cls)
            assert type(trainer) is type(make(cls, **options))
            assert type(trainer).__name__ == cls.__name__
            bases = type(trainer).__mro__
            assert bases.index(SophiaTrainerMixin) < bases.index(cls)
        assert trainer.greeting == 1
        assert isinstance(make(Hooked), Hooked)
        assert Hooked.kinds == ["own"]
        assert type(make(SophiaTrainer)) is SophiaTrainer
        assert issubclass(injection.with_mixin(Seq2SeqTrainer), Seq2SeqTrainer)
    finally:
        injection.withdraw()
        injection.withdraw()
    assert dict(vars(Trainer)) == before
    assert type(make(Trainer)) is Trainer
    assert type(make(Own, greeting=2)) is Own
