"""A plain loop under FSDP2; and the same loop on whole parameters, for the test to compare with."""

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional
from trainer.scripts.two_processes import rows, tiny_model
from transformers import GPT2LMHeadModel

from hf_sophia import Adam, RAdam, Sophia, gauss_newton_bartlett, hutchinson
from hf_sophia.estimators import GaussNewtonBartlett, sampled_cotangent
from hf_sophia.optim.kernel_plan import KernelPlan
from hf_sophia.trainer.noise import label_noise

STEPS, SEED, MICRO_BATCHES = 4, 3, 2

Batch = dict[str, torch.Tensor]


def double_model() -> GPT2LMHeadModel:
    """Make the model in float64, so that the order of sums hardly shows."""
    return tiny_model().double()


def sophia(params: list[torch.Tensor], **options: object) -> Sophia:
    """Make the optimizer; its eps keeps coordinates without curvature from taking sign steps."""
    # The threshold that follows the data needs all shards of a tensor.
    return Sophia(
        params, lr=1e-2, rho="auto", eps=1e-5, k=2, weight_decay=0.1, nesterov=True,
        bias_correction=True, target_clip_fraction=0.3, **options,
    )  # fmt: skip


def batches_of(rank: int, processes: int) -> list[Batch]:
    """Return a process's micro-batches: every one has a share of each group of eight sequences."""
    data, size = rows(), 16 // MICRO_BATCHES
    share = size // processes
    starts = [index * size + rank * share for index in range(MICRO_BATCHES)]
    names = ("input_ids", "labels")
    return [{n: torch.stack([r[n] for r in data[s : s + share]]) for n in names} for s in starts]


def outputs_of(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits and the targets that they are about."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return logits, batch["labels"][:, 1:]


def loss_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the sum of the losses."""
    logits, targets = outputs_of(model, batch)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def whole_loop(processes: int) -> tuple[GPT2LMHeadModel, Sophia]:
    """Train on one process with the groups and the labels that the processes together have."""
    model = double_model()
    params = list(model.parameters())
    optimizer = sophia(params)
    batches = [batches_of(rank, processes) for rank in range(processes)]
    for step in range(STEPS):
        for index in range(MICRO_BATCHES):
            for rank in range(processes):
                (loss_of(model, batches[rank][index]) / 100).backward()
        if optimizer.hessian_due:
            squares, count = [torch.zeros_like(p) for p in params], 0
            for index in range(MICRO_BATCHES):
                summed = 0.0
                for rank in range(processes):
                    logits, targets = outputs_of(model, batches[rank][index])
                    noise = label_noise(SEED, step, rank, index)
                    cotangent, counted = sampled_cotangent(logits, targets, generator=noise)
                    summed = summed + (cotangent * logits).sum()
                    count += int(counted)
                grads = torch.autograd.grad(summed, params)
                for square, grad in zip(squares, grads, strict=True):
                    square += grad**2
            optimizer.update_hessian(
                {p: square / count for p, square in zip(params, squares, strict=True)}
            )
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def shard(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Shard every block, and the rest."""
    for block in model.transformer.h:
        fully_shard(block)
    return fully_shard(model)


def sharded_loop(model: torch.nn.Module, optimizer: Sophia) -> None:
    """Train as `whole_loop` does, on this process's share."""
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    batches = batches_of(rank, processes)
    for step in range(STEPS):
        for index, batch in enumerate(batches):
            model.set_requires_gradient_sync(index == MICRO_BATCHES - 1)
            # FSDP2 takes the mean over the processes.
            (loss_of(model, batch) * processes / 100).backward()
        if optimizer.hessian_due:
            estimator = GaussNewtonBartlett(model.parameters())
            for index, batch in enumerate(batches):
                noise = label_noise(SEED, step, rank, index)
                estimator.add(*outputs_of(model, batch), generator=noise)
            estimator.all_reduce()
            optimizer.update_hessian(estimator.estimate())
        optimizer.step()
        optimizer.zero_grad()


def whole(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return whole tensors, on every process."""
    return [t.detach().full_tensor() for t in tensors]


def held(model: torch.nn.Module, optimizer: Sophia) -> dict[str, list[torch.Tensor]]:
    """Return the parameters and states, whole."""
    params = list(model.parameters())
    states = [optimizer.state[p] for p in params]
    return {
        "params": whole(params),
        "exp_avg": whole([s["exp_avg"] for s in states]),
        "hessian": whole([s["hessian"] for s in states]),
        "step": [s["step"] for s in states],
    }


def message_of(kind: type[Exception], function: object, *args: object) -> str:
    """Call a function that must raise, and return what it says."""
    try:
        function(*args)
    except kind as error:
        return str(error)
    raise AssertionError(f"{function} raised no {kind.__name__}")


def faults(output: Path) -> dict[str, object]:
    """Do what must be refused, or found by all processes."""
    found = {}
    model = shard(double_model())
    params = list(model.parameters())
    optimizer = sophia(params)
    batch = batches_of(distributed.get_rank(), distributed.get_world_size())[0]
    model.set_requires_gradient_sync(False)
    estimator = GaussNewtonBartlett(params)
    found["no sync"] = message_of(RuntimeError, estimator.add, *outputs_of(model, batch))

    model = shard(double_model())
    params = list(model.parameters())
    optimizer = sophia(params)
    loss = loss_of(model, batch)
    found["hutchinson"] = message_of(ValueError, hutchinson, loss, params)
    loss.backward()
    before = whole(params)
    own = params[3].grad.to_local()
    if distributed.get_rank() == 0:
        own[0] = float("nan")
    optimizer.update_hessian({})
    found["gradient"] = message_of(ValueError, optimizer.step)
    found["unchanged"] = all(
        torch.equal(one, other) for one, other in zip(before, whole(params), strict=True)
    )
    estimate = {p: torch.zeros_like(p) for p in params}
    if distributed.get_rank() == 0:
        estimate[params[2]].to_local()[0] = float("inf")
    found["estimate"] = message_of(ValueError, optimizer.update_hessian, estimate)
    found |= one_call(batch)
    mixed = [*params, torch.nn.Parameter(torch.zeros(3))]
    estimator = GaussNewtonBartlett(mixed)
    found["mixed"] = message_of(ValueError, estimator.add, *outputs_of(model, batch))
    return found


def by_kernel() -> dict[str, object]:
    """Train in fp32, whose shards a kernel takes, and by the eager step; then meet a NaN."""
    found = {}
    for name, fused in (("kernel", None), ("eager", False)):
        model = shard(tiny_model())
        optimizer = sophia(list(model.parameters()), fused=fused)
        sharded_loop(model, optimizer)
        found[name] = held(model, optimizer)
        found[name]["clip_fraction"] = optimizer.clip_fraction()
        found[f"{name} calls"] = len(optimizer.__dict__.get("_plans", {0: KernelPlan()})[0].calls)
        params = list(model.parameters())
        loss_of(
            model, batches_of(distributed.get_rank(), distributed.get_world_size())[0]
        ).backward()
        if distributed.get_rank() == 0:
            params[3].grad.to_local()[0] = float("nan")
        optimizer.update_hessian({})
        optimizer.param_groups[0]["refreshed_step"] = (
            0  # rho is not followed, so nothing is checked
        )
        found[f"{name} message"] = message_of(ValueError, optimizer.step)
        found[f"{name} after"] = held(model, optimizer)
    return found


def on_two_meshes() -> dict[str, object]:
    """Meet a NaN that one of four processes has in a parameter of one of two meshes."""
    meshes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "y"))
    params = []
    for name in ("x", "y"):
        whole_param = distribute_tensor(torch.arange(8.0), meshes[name], [Shard(0)])
        params.append(torch.nn.Parameter(whole_param))
    optimizer = Sophia(params, lr=0.1, k=10**9)
    for param in params:
        param.grad = distribute_tensor(torch.ones(8), param.device_mesh, param.placements)
    optimizer.step()
    found = {"clip_fraction": optimizer.clip_fraction(), "before": whole(params)}
    if distributed.get_rank() == 3:
        params[1].grad.to_local()[0] = float("nan")
    found["message"] = message_of(ValueError, optimizer.step)
    found["after"] = whole(params)
    return found


def one_call(batch: Batch) -> dict[str, object]:
    """Estimate in one call, from shards and beside DistributedDataParallel."""
    found = {}
    model = shard(double_model())
    params = list(model.parameters())
    logits, targets = outputs_of(model, batch)
    noise = label_noise(SEED, 0, distributed.get_rank(), 0)
    together = GaussNewtonBartlett(params)
    together.add(logits, targets, generator=noise)
    together.all_reduce()
    expected = whole(list(together.estimate().values()))
    logits, targets = outputs_of(model, batch)
    noise = label_noise(SEED, 0, distributed.get_rank(), 0)
    estimate = gauss_newton_bartlett(logits, params, targets=targets, generator=noise)
    actual = whole(list(estimate.values()))
    found["one call"] = all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))

    optimizer = sophia(params)
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step(logits=outputs_of(model, batch)[0])
    found["step on shards"] = max(h.max().item() for h in held(model, optimizer)["hessian"]) > 0

    model = double_model()
    optimizer = sophia(list(model.parameters()))
    logits, _ = outputs_of(model, batch)
    found["logits"] = message_of(RuntimeError, lambda: optimizer.step(logits=logits))
    by_hutchinson = Sophia(model.parameters(), hessian_computation_type="hutchinson")
    found["closure"] = message_of(RuntimeError, by_hutchinson.step, lambda: loss_of(model, batch))
    return found


def of_one_process(output: Path) -> dict[str, object]:
    """Load the optimizer state of a run on whole parameters, and take a step from it."""
    result = {}
    for kind in (Sophia, Adam, RAdam):
        model = shard(double_model())
        optimizer = kind(model.parameters(), lr=1e-2)
        saved = torch.load(output / f"{kind.__name__}.pt", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        for param, grad in zip(model.parameters(), saved["grads"], strict=True):
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements)
        optimizer.step()
        states = [optimizer.state[p] for p in model.parameters()]
        result[kind.__name__] = {
            "params": whole(list(model.parameters())),
            "states": [
                {n: whole([v])[0] if isinstance(v, torch.Tensor) else v for n, v in s.items()}
                for s in states
            ],
        }
    return result


def main(mode: str, folder: str) -> None:
    """Run one mode in each process and save what every rank holds."""
    output = Path(folder)
    distributed.init_process_group("gloo")
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    if mode == "faults":
        result = faults(output)
    elif mode == "kernel":
        result = by_kernel()
    elif mode == "two meshes":
        result = on_two_meshes()
    elif mode == "one process":
        result = of_one_process(output)
    else:
        model = shard(double_model())
        optimizer = sophia(list(model.parameters()))
        if mode == "train":
            sharded_loop(model, optimizer)
        model_state, optimizer_state = checkpointing.get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        if mode == "train":
            checkpoint.save(state, checkpoint_id=output / "checkpoint")
        else:
            checkpoint.load(state, checkpoint_id=output / "checkpoint")
            checkpointing.set_state_dict(
                model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
            )
        result = held(model, optimizer)
        result["clip_fraction"] = optimizer.clip_fraction()
        result["hessian_norm"] = optimizer.hessian_norm()
        result["due"] = optimizer.hessian_due
    torch.save(result, output / f"{mode}-{processes}-{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
