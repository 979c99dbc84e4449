"""The first step's estimate written out: sampled labels from their noise, losses by autograd."""

import torch
from torch.nn import functional

from hf_sophia.estimators import sampled_cotangent
from hf_sophia.trainer.noise import label_noise


def exact_step_estimate(
    model: torch.nn.Module, batches: dict[tuple[int, int], dict[str, torch.Tensor]], seed: int
) -> list[torch.Tensor]:
    """Compute ĥ = Σ G² / Σ B over the micro-batches, given by rank and index, of the first step."""
    params = list(model.parameters())
    squares, count = [torch.zeros_like(p) for p in params], 0
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
        for square, grad in zip(squares, torch.autograd.grad(loss, params), strict=True):
            square += grad**2
        count += int(counted.sum())
    return [square / count for square in squares]
