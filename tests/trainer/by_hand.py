"""The first step's estimate written out: sampled labels from their noise, losses by autograd."""

import torch
from torch.nn import functional

from hf_sophia.estimators import sampled_cotangent
from hf_sophia.trainer.noise import label_noise


def exact_step_estimate(
    model: torch.nn.Module,
    batches: dict[tuple[int, int], dict[str, torch.Tensor]],
    seed: int,
    *,
    summed_over_ranks: bool = False,
) -> list[torch.Tensor]:
    """Compute ĥ = Σ G² / Σ B over the micro-batches, given by rank and index, of the first step.

    Gradients that are reduced before they are squared are `summed_over_ranks`.
    """
    params = list(model.parameters())
    groups: dict[tuple[int, int], list[torch.Tensor]] = {}
    count = 0
    for (rank, index), batch in batches.items():
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        padded = torch.full_like(batch["labels"], -100)
        padded[:, :-1] = targets
        full = torch.cat([logits.detach(), logits.detach()[:, -1:]], dim=1)
        noise = label_noise(seed, 0, rank, index)
        labels = sampled_cotangent(full, padded, generator=noise)[0].argmin(-1)[:, :-1]
        counted = targets != -100
        loss = functional.cross_entropy(logits[counted], labels[counted], reduction="sum")
        group = groups.setdefault(
            (0 if summed_over_ranks else rank, index), [torch.zeros_like(p) for p in params]
        )
        for summed, grad in zip(group, torch.autograd.grad(loss, params), strict=True):
            summed += grad
        count += int(counted.sum())
    squares = [torch.stack(grads).square().sum(0) for grads in zip(*groups.values(), strict=True)]
    return [square / count for square in squares]
