"""`hf-sophia plot`: which files a run's name stands for, what runs are called, what goes wrong."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from trainer.runs import dataset, run

from hf_sophia import plot
from hf_sophia.run import command

pytest.importorskip("matplotlib")

SAVING = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "eval_strategy": "steps"}


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=37, n_positions=12, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    folder = tmp_path_factory.mktemp("runs") / "sophia"
    extra = {"eval_dataset": dataset(8)}
    trainer = run(GPT2LMHeadModel(config), folder, extra=extra, eval_steps=4, **SAVING)
    trainer.save_state()
    return folder


def state(folder: Path, steps: int = 4, **fields) -> Path:
    """Write what a Trainer would after some steps of AdamW."""
    folder.mkdir(parents=True, exist_ok=True)
    logs = [{"step": s, "loss": 5 / s, "learning_rate": 1e-3} for s in range(1, steps + 1)]
    path = folder / plot.STATE_NAME
    path.write_text(json.dumps({"global_step": steps, "log_history": logs, **fields}))
    return path


@pytest.fixture
def histories_drawn(monkeypatch) -> list[dict]:
    """Note what is drawn, and draw it."""
    noted = []
    draw = plot.draw

    def noting(histories, **options):
        noted.append(histories)
        return draw(histories, **options)

    monkeypatch.setattr(plot, "draw", noting)
    return noted


def fails(capsys, *argv: object) -> str:
    with pytest.raises(SystemExit) as caught:
        plot.main([str(piece) for piece in argv])
    message = caught.value.code
    assert isinstance(message, str), capsys.readouterr().err
    assert message.startswith("hf-sophia plot: ")
    assert "\n" not in message
    return message


def test_runs_of_the_trainer_become_one_picture(output, tmp_path, capsys, histories_drawn) -> None:
    state(tmp_path / "adamw")
    picture = tmp_path / "both.png"
    command(["plot", str(output), str(tmp_path / "adamw"), "--output", str(picture)])
    assert capsys.readouterr().out.strip() == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    (histories,) = histories_drawn
    assert list(histories) == ["sophia", "adamw"]
    logged = json.loads((output / plot.STATE_NAME).read_text())["log_history"]
    assert histories["sophia"] == logged
    assert sum("sophia/rho" in entry for entry in logged) == 8
    assert sum("eval_loss" in entry for entry in logged) == 2


def test_the_picture_goes_to_the_current_folder(output, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    plot.main([str(output)])
    assert capsys.readouterr().out.strip() == "plot.png"
    assert (tmp_path / "plot.png").stat().st_size > 5_000


@pytest.mark.parametrize("suffix", ["pdf", "svg", "PNG"])
def test_the_suffix_says_the_kind(suffix, tmp_path) -> None:
    state(tmp_path)
    path = tmp_path / f"a.{suffix}"
    plot.main([str(tmp_path), "--output", str(path)])
    start = {"pdf": b"%PDF", "svg": b"<?xml", "PNG": b"\x89PNG"}[suffix]
    assert path.read_bytes().startswith(start)


def test_a_run_is_found_by_folder_checkpoint_or_file(output, tmp_path) -> None:
    assert plot.state_file(output) == output / plot.STATE_NAME
    assert plot.state_file(output / "checkpoint-4") == output / "checkpoint-4" / plot.STATE_NAME
    assert plot.state_file(output / plot.STATE_NAME) == output / plot.STATE_NAME
    unfinished = tmp_path / "unfinished"
    shutil.copytree(output, unfinished)
    (unfinished / plot.STATE_NAME).unlink()
    assert plot.state_file(unfinished) == unfinished / "checkpoint-8" / plot.STATE_NAME
    # Killed while it was written.
    (unfinished / "checkpoint-8" / plot.STATE_NAME).unlink()
    assert plot.state_file(unfinished) == unfinished / "checkpoint-4" / plot.STATE_NAME
    assert plot.read_history(plot.state_file(unfinished))[-1]["step"] == 4


def test_a_run_that_was_resumed_is_one_line(output, tmp_path) -> None:
    from transformers import GPT2LMHeadModel

    folder = tmp_path / "resumed"
    shutil.copytree(output, folder)
    from trainer.runs import arguments

    from hf_sophia import SophiaTrainer

    options = {**SAVING, "max_steps": 12, "eval_strategy": "no"}
    model = GPT2LMHeadModel.from_pretrained(folder / "checkpoint-8")
    trainer = SophiaTrainer(model, arguments(folder, **options), train_dataset=dataset())
    trainer.train(resume_from_checkpoint=True)
    trainer.save_state()
    logs = plot.read_history(plot.state_file(folder))
    assert [entry["step"] for entry in logs if "loss" in entry] == list(range(1, 13))


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        (["runs/sophia"], ["sophia"]),
        (["runs/sophia", "other/adamw"], ["sophia", "adamw"]),
        (["a/out", "b/out"], ["a", "b"]),
        (["x/a/out/1", "x/b/out/1"], ["a", "b"]),
        (["runs/a/trainer_state.json", "runs/b"], ["a", "b"]),
        (["kept/sophia.json", "runs/b"], ["sophia.json", "b"]),
        (["runs/a/checkpoint-300"], ["a/checkpoint-300"]),
        (["runs/a/checkpoint-300", "runs/b/checkpoint-300"], ["a", "b"]),
        (["runs/a/checkpoint-100", "runs/a/checkpoint-200"], ["checkpoint-100", "checkpoint-200"]),
        (["runs/a/checkpoint-1", "runs/b/checkpoint-2"], ["a/checkpoint-1", "b/checkpoint-2"]),
        (["runs/a", "runs/a/checkpoint-300"], ["a", "a/checkpoint-300"]),
        (["a/x", "a/b/x"], ["a", "b"]),
        (["a/x", "b/y", "c/x"], ["a/x", "b/y", "c/x"]),
        (["/x", "/a/x"], ["/", "a"]),
    ],
)  # fmt: skip
def test_runs_have_the_shortest_names_that_differ(runs, names) -> None:
    assert plot.names_of([Path(run) for run in runs]) == names


def test_a_missing_run_is_named(tmp_path, capsys) -> None:
    output = ("--output", tmp_path / "a.png")
    message = fails(capsys, tmp_path / "none", *output)
    assert f"'{tmp_path / 'none'}' does not exist" in message
    (tmp_path / "begun" / "checkpoint-4").mkdir(parents=True)
    message = fails(capsys, tmp_path / "begun", *output)
    assert "neither a trainer_state.json nor a whole checkpoint" in message
    state(tmp_path / "a")
    message = fails(capsys, tmp_path / "a", tmp_path / "a" / plot.STATE_NAME, *output)
    assert "is given twice" in message
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"log_history": [{"st', "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1, 2]", "has no log_history"),
        (b'{"log_history": 3}', "has no log_history"),
        (b'{"log_history": [1]}', "has no log_history"),
        (b'{"log_history": []}', "has logged nothing to draw"),
        (b'{"log_history": [{"step": 1, "train_loss": 3}]}', "has logged nothing to draw"),
    ],
)
def test_a_broken_state_is_named(content, expected, tmp_path, capsys) -> None:
    file = tmp_path / "broken.json"
    file.write_bytes(content)
    message = fails(capsys, file, "--output", tmp_path / "a.png")
    assert expected in message
    assert "broken.json" in message


def test_an_output_that_cant_be_written_is_named_before_anything_is_read(tmp_path, capsys) -> None:
    (tmp_path / "folder.png").mkdir()
    for output, expected in {
        "a.docx": "whose suffix is '.docx'; it knows .",
        "a": "whose suffix is ''; it knows .",
        "none/a.png": "does not exist; make it: mkdir -p",
        "folder.png": "is a folder; name a file",
    }.items():
        message = fails(capsys, tmp_path / "no_run", "--output", tmp_path / output)
        assert expected in message
        assert str(tmp_path / output) in message


def test_without_matplotlib_the_remedy_is_named(monkeypatch, tmp_path, capsys) -> None:
    state(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'hf_sophia[plots]'" in fails(capsys, tmp_path)


@pytest.mark.parametrize("argv", [[], ["--output"], ["a", "--colour", "red"]])
def test_a_wrong_command_line_is_refused(argv, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        command(["plot", *argv])
    assert caught.value.code == 2
    assert "hf-sophia plot: error: " in capsys.readouterr().err
