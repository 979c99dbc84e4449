"""Runs of `SophiaTrainer` in several processes: the same ones, however they are spread."""

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate
from trainer.by_hand import exact_step_estimate
from trainer.processes import PYTHON, all_ranks_finished, execute, own_environment, torchrun
from trainer.scripts.two_processes import rows, tiny_model

from .scripts import trainer_run

pytestmark = pytest.mark.distributed
SCRIPT = Path(trainer_run.__file__)


def start_alone(rank: int, port: int, folder: Path, **settings) -> subprocess.Popen:
    """Start one of two processes without a launcher that would watch over it."""
    environment = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return subprocess.Popen(
        [*PYTHON, str(SCRIPT), str(folder), json.dumps(settings)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **own_environment(), **{n: str(v) for n, v in environment.items()}},
    )


def train(folder: Path, processes: int, **settings) -> list[dict]:
    """Train in several processes; all end with equal parameters and states after every step."""
    folder.mkdir(exist_ok=True)
    launcher = PYTHON if processes == 1 else torchrun(processes)
    result = execute([*launcher, SCRIPT, folder, json.dumps(settings)])
    assert all_ranks_finished(result), result.stderr
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]
    for rank in ranks:
        assert rank["hashes"] == ranks[0]["hashes"]
        assert len(rank["hashes"]) > 0
        if processes > 1:
            assert rank["wrapper"] == wrapper_of(**settings)
    return ranks


def wrapper_of(fsdp: bool = False, torch_compile: bool = False, **_: object) -> str:
    if fsdp:
        return "FSDPOptimizedModule" if torch_compile else "FSDPGPT2LMHeadModel"
    return "OptimizedModule" if torch_compile else "DistributedDataParallel"


def batches_of(processes: int, turns: int) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    data = rows()
    size = 16 // turns
    batches = [default_collate(data[start : start + size]) for start in range(0, 16, size)]
    # The processes take turns with the batches.
    return {(turn % processes, turn // processes): batch for turn, batch in enumerate(batches)}


def assert_close(ranks: list[dict], expected: dict, names: tuple[str, ...]) -> None:
    for name in names:
        for one, other in zip(ranks[0][name], expected[name], strict=True):
            # float64: only the order of sums differs.
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12, msg=name)


@pytest.mark.parametrize("own", [False, True], ids=["kept graph", "own pass"])
def test_the_run_does_not_depend_on_how_many_processes_it_has(own, tmp_path) -> None:
    """Four micro-batches of uneven labels a step, one after the other or beside each other."""
    optim_args = "rho=1.0,k=2,eps=1e-5" + (",hessian_batch_fraction=1.0" if own else "")
    runs = {}
    for processes in (1, 2, 4):
        runs[processes] = train(
            tmp_path / str(processes),
            processes,
            gradient_accumulation_steps=4 // processes,
            optim_args=optim_args,
            turns=4,
        )
    names = ("hessians", "momenta", "params")
    for processes in (2, 4):
        assert_close(runs[processes], runs[1][0], names)
        for one, other in zip(runs[processes][0]["logs"], runs[1][0]["logs"], strict=True):
            # The Trainer's loss is fp32 from the first process's view of all of them.
            assert one["sophia/hessian_tokens"] == other["sophia/hessian_tokens"] == 8 * (11 + 5)
            assert one["sophia/clip_fraction"] == other["sophia/clip_fraction"]
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("processes", [2, 4])
def test_fsdp2_estimates_from_gradients_summed_over_the_processes(processes, tmp_path) -> None:
    accumulation = 4 // processes
    ranks = train(
        tmp_path,
        processes,
        fsdp=True,
        max_steps=1,
        gradient_accumulation_steps=accumulation,
        optim_args="rho=1.0,hessian_batch_fraction=1.0",
    )
    expected = exact_step_estimate(
        tiny_model().double(), batches_of(processes, 4), seed=5, summed_over_ranks=True
    )
    for estimate, hessian in zip(expected, ranks[0]["hessians"], strict=True):
        torch.testing.assert_close(hessian, 0.05 * estimate, rtol=1e-8, atol=1e-14)
    assert ranks[0]["logs"][0]["sophia/hessian_tokens"] == 8 * (11 + 5)
    assert "in a pass of its own on 1 of the batch" in ranks[0]["plan"]


def test_fsdp2s_training_gradients_are_those_of_ddp(tmp_path) -> None:
    """A pass between micro-batches would be added to what FSDP2 has not reduced yet."""
    still = {"learning_rate": 0.0, "gradient_accumulation_steps": 2, "optim_args": "k=1"}
    plain = train(tmp_path / "ddp", 2, **still)
    sharded = train(tmp_path / "fsdp", 2, fsdp=True, **still)
    assert_close(sharded, plain[0], ("momenta", "params"))
    for one, other in zip(plain[0]["logs"], sharded[0]["logs"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)
        assert other["sophia/hessian_tokens"] > 0


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
def test_a_compiled_model_has_the_same_estimate(fsdp, tmp_path) -> None:
    options = {"fsdp": fsdp, "max_steps": 1, "gradient_accumulation_steps": 2}
    plain = train(tmp_path / "plain", 2, **options)
    # Traced and cut into graphs, but run as it is: that takes seconds instead of minutes.
    compiling = {"torch_compile": True, "torch_compile_backend": "eager"}
    compiled = train(tmp_path / "compiled", 2, **compiling, **options)
    assert_close(compiled, plain[0], ("hessians", "momenta", "params"))


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
def test_a_rank_without_labels_that_count_adds_nothing(fsdp, tmp_path) -> None:
    ranks = train(
        tmp_path, 2, fsdp=fsdp, data="silent rank", optim_args="hessian_batch_fraction=1.0",
        max_steps=1, gradient_accumulation_steps=2,
    )  # fmt: skip
    spoken = {place: batch for place, batch in batches_of(2, 4).items() if place[0] == 0}
    expected = exact_step_estimate(tiny_model().double(), spoken, seed=5)
    for estimate, hessian in zip(expected, ranks[0]["hessians"], strict=True):
        torch.testing.assert_close(hessian, 0.05 * estimate, rtol=1e-8, atol=1e-14)
    assert ranks[0]["logs"][0]["sophia/hessian_tokens"] == 8 * 11


@pytest.mark.parametrize("fsdp", [False, True, "sharded files"], ids=["ddp", "fsdp2", "dcp"])
def test_a_resumed_run_equals_the_uninterrupted_one(fsdp, tmp_path) -> None:
    options = {
        "fsdp": fsdp,
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
        "dropout": 0.1,
        # With thresholds in the state, and a share of their own for embeddings.
        "optim_args": "rho=auto,k=2,eps=1e-5",
    }
    whole = train(tmp_path / "whole", 2, **options)
    # Step 7 is a refresh, the step after the checkpoint.
    resumed = train(
        tmp_path / "again", 2, resume=str(tmp_path / "whole" / "run" / "checkpoint-6"), **options
    )
    assert len(resumed[0]["hashes"]) == 1
    for run in (whole, resumed):
        shares = run[0]["shares"].items()
        assert {share for name, share in shares if ".wte." in name or ".wpe." in name} == {0.5}
        assert {share for name, share in shares if ".h." in name or ".ln_f." in name} == {0.01}
    for name in ("params", "momenta", "hessians"):
        for one, other in zip(resumed[0][name], whole[0][name], strict=True):
            # Nothing but the order of sums may differ.
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.parametrize("fsdp", [True, "sharded files"], ids=["fsdp2", "dcp"])
def test_thresholds_begin_at_once_where_a_number_was(fsdp, tmp_path) -> None:
    options = {"fsdp": fsdp, "max_steps": 3}
    saving = {"save_strategy": "steps", "save_steps": 2, "optim_args": "rho=1.0,k=10,eps=1e-5"}
    train(tmp_path / "number", 2, **options, **saving)
    saved = str(tmp_path / "number" / "run" / "checkpoint-2")
    # No refresh is due in the step that is left.
    auto = {"resume": saved, "optim_args": "rho=auto,target_clip_fraction=0.1,k=10,eps=1e-5"}
    for rank in train(tmp_path / "auto", 2, **options, **auto):
        (log,) = rank["logs"][-1:]
        assert log["step"] == 3
        assert log["sophia/rho"] > 0.0
        assert log["sophia/clip_fraction"] < 0.5


def spread(checkpoint: Path) -> None:
    """Spread the weights over two files, as those of large models are."""
    whole = checkpoint / "model.safetensors"
    weights = load_file(whole)
    names, index = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: weights[name] for name in part}, checkpoint / file)
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (checkpoint / "model.safetensors.index.json").write_text(text)
    whole.unlink()


@pytest.mark.parametrize("files", [1, 2])
def test_fsdp2_takes_over_a_run_on_one_process(files, tmp_path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "optim_args": "rho=1.0,k=10,eps=1e-5"}
    one = train(tmp_path / "one", 1, max_steps=3, gradient_accumulation_steps=4, **options)
    saved = tmp_path / "one" / "run" / "checkpoint-2"
    if files == 2:
        spread(saved)
    # No refresh is due in the steps that are left, so that both take the same steps.
    sharded = train(
        tmp_path / "sharded",
        2,
        fsdp=True,
        max_steps=3,
        gradient_accumulation_steps=2,
        resume=str(saved),
        **options,
    )
    assert len(sharded[0]["hashes"]) == 1
    assert_close(sharded, one[0], ("hessians", "momenta", "params"))


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
def test_poisoned_logits_of_one_rank_discard_the_estimate_on_all(fsdp, tmp_path) -> None:
    ranks = train(tmp_path, 2, fsdp=fsdp, poison=[1, 2], max_steps=4, optim_args="k=2,rho=1.0")
    clean = train(tmp_path / "clean", 2, fsdp=fsdp, max_steps=2, optim_args="k=2,rho=1.0")
    # The refresh of step 1 stands, that of step 3 was left out.
    assert_close(ranks, clean[0], ("hessians",))
    assert all(p.isfinite().all() for p in ranks[0]["params"])
    assert [rank["warnings"] for rank in ranks] == [["the Hessian estimate of step 3"]] * 2


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
def test_when_a_process_dies_the_other_ends_with_an_error_and_the_run_resumes(
    fsdp, tmp_path
) -> None:
    options = {"fsdp": fsdp, "max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path / "whole", 2, **options)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    folder = tmp_path / "died"
    folder.mkdir()
    pair = [start_alone(rank, port, folder, death=[1, 3], **options) for rank in (0, 1)]
    try:
        # It must not wait for ever; what it waits for is the connection's end.
        _, error = pair[0].communicate(timeout=120)
        pair[1].wait(timeout=10)
    finally:
        for process in pair:
            process.kill()
    assert pair[1].returncode == -signal.SIGKILL
    assert pair[0].returncode not in (0, -signal.SIGKILL)
    assert "Error" in error
    assert not (folder / "rank0.pt").exists()
    resumed = train(folder, 2, resume=True, **options)
    assert len(resumed[0]["hashes"]) == 3
    for name in ("params", "momenta", "hessians"):
        for one, other in zip(resumed[0][name], whole[0][name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.parametrize("processes", [1, 2])
def test_fsdp2_resumes_from_weights_alone_and_says_so(processes, tmp_path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "save_only_model": True}
    train(tmp_path, processes, fsdp=processes == 2, **options)
    ranks = train(tmp_path, 2, fsdp=True, resume=True, **{**options, "max_steps": 3})
    assert len(ranks[0]["hashes"]) == 1
    assert ranks[0]["logs"][-1]["loss"] < ranks[0]["logs"][0]["loss"]
    assert any("holds no state of the" in warning for warning in ranks[0]["warnings"])


@pytest.mark.parametrize("kind", ["foreign weights", "no weights", "damaged shards"])
def test_a_checkpoint_that_fsdp2_can_not_load_is_an_error_on_all_processes(kind, tmp_path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    fsdp = "sharded files" if kind == "damaged shards" else False
    train(tmp_path, 2, fsdp=fsdp, **options)
    saved = tmp_path / "run" / "checkpoint-2"
    if fsdp:
        for path in (saved / "optimizer_0").glob("__*"):
            path.write_bytes(path.read_bytes()[:200])
    elif kind == "no weights":
        (saved / "model.safetensors").unlink()
    else:
        weights = load_file(saved / "model.safetensors")
        weights["another.weight"] = weights.pop("transformer.ln_f.weight")
        save_file(weights, saved / "model.safetensors")
    messages = {
        "foreign weights": "are not those of this model: ['transformer.ln_f.weight']",
        "no weights": "holds no model.safetensors that FSDP could take over",
        "damaged shards": "optimizer_0 can't be loaded",
    }
    settings = {"fsdp": fsdp or True, "resume": True, **options, "max_steps": 3}
    result = execute([*torchrun(2), SCRIPT, tmp_path, json.dumps(settings)])
    assert not all_ranks_finished(result)
    assert f"ValueError: {saved}" in result.stderr or "ValueError: the weights" in result.stderr
    assert messages[kind] in result.stderr, result.stderr
