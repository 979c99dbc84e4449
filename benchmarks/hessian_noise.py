"""How noisy Sophia-G's Hessian is, by the share of the batch that it is estimated on.

    python benchmarks/hessian_noise.py --output benchmarks/results/hessian_noise_cpu.json

A small GPT-2 is trained on bytes of Python's standard library and then held still. The diagonal
that all estimates scatter about is the mean of many of them, on the whole batch and with noise of
their own. Beside it, for each share: the error of one estimate, that of Sophia's moving average of
them, and the coordinates where this average is wrong by more than a factor of two either way. A
coordinate that is twice as large as it should be moves half as far, or is not clipped.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import write
from train import text
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from hf_sophia import SophiaTrainer, gauss_newton_bartlett

FRACTIONS = (1.0, 0.5, 0.25, 0.125, 0.0625)

Estimate = list[torch.Tensor]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=150, help="Steps of training (default 150)")
    parser.add_argument("--batch", type=int, default=16, help="Sequences a step (default 16)")
    parser.add_argument("--length", type=int, default=128, help="Tokens a sequence (default 128)")
    parser.add_argument("--reference", type=int, default=400, help="Estimates that make the mean")
    parser.add_argument("--refreshes", type=int, default=60, help="Estimates in the average")
    parser.add_argument("--beta2", type=float, default=0.95, help="Decay of the average")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="Write the results here too, as JSON")
    return parser.parse_args()


def trained(options: argparse.Namespace) -> GPT2LMHeadModel:
    """Train a model with Sophia's default options."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=options.layers,
            n_embd=options.width,
            n_head=4,
            vocab_size=256,
            n_positions=options.length,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            optim="sophia",
            learning_rate=3e-3,
            warmup_steps=options.steps // 5,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            use_cpu=options.device == "cpu",
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            logging_steps=max(options.steps // 3, 1),
        )
        data = text(options.steps * options.batch, options.length)
        SophiaTrainer(model=model, args=arguments, train_dataset=data).train()
    return model.to(options.device).train(False)


def estimates(
    model: GPT2LMHeadModel, data: torch.Tensor, batch: int, fraction: float, seed: int
) -> Iterator[Estimate]:
    """Yield an estimate for each draw of a batch, without end."""
    params = list(model.parameters())
    rows_of = torch.Generator().manual_seed(seed)
    labels_of = torch.Generator(model.device).manual_seed(seed)
    while True:
        rows = torch.randperm(len(data), generator=rows_of)[: max(round(fraction * batch), 1)]
        logits = model(input_ids=data[rows].to(model.device)).logits[:, :-1]
        found = gauss_newton_bartlett(logits, params, generator=labels_of)
        yield [found[param] for param in params]


def mean_of(source: Iterator[Estimate], count: int) -> Estimate:
    """Return the mean of some estimates."""
    total = [part.double() for part in next(source)]
    for _ in range(count - 1):
        for whole, part in zip(total, next(source), strict=True):
            whole += part
    return [whole / count for whole in total]


def relative_error(found: Estimate, reference: Estimate) -> float:
    """Return |found - reference| / |reference|, the median over tensors."""
    pairs = zip(found, reference, strict=True)
    return statistics.median(((a - b).norm() / b.norm()).item() for a, b in pairs if b.any())


def far_off(found: Estimate, reference: Estimate) -> float:
    """Return the share of the coordinates that differ by more than a factor of two."""
    a, b = (torch.cat([part.flatten().double() for part in parts]) for parts in (found, reference))
    a, b = a[b > 0], b[b > 0]
    return ((a > 2 * b) | (2 * a < b)).double().mean().item()


def main() -> None:
    """Measure and print a table."""
    options = parse()
    torch.set_num_threads(options.threads)
    model = trained(options)
    # Text that the model has not been trained on.
    every = text(2 * options.steps * options.batch, options.length)
    data = torch.stack([row["input_ids"] for row in every[options.steps * options.batch :]])
    reference = mean_of(estimates(model, data, options.batch, 1.0, seed=0), options.reference)
    results = {}
    print(f"{'share':>8s} {'one estimate':>14s} {'average':>9s} {'off by > 2':>11s}")
    for number, fraction in enumerate(FRACTIONS, start=1):
        source = estimates(model, data, options.batch, fraction, seed=number)
        average = [torch.zeros_like(part) for part in reference]
        single = []
        for _ in range(options.refreshes):
            estimate = next(source)
            single.append(relative_error(estimate, reference))
            for old, new in zip(average, estimate, strict=True):
                old.lerp_(new.double(), 1.0 - options.beta2)
        filled = 1.0 - options.beta2**options.refreshes
        average = [part / filled for part in average]
        row = {
            "one": statistics.median(single),
            "average": relative_error(average, reference),
            "far off": far_off(average, reference),
        }
        results[f"{fraction:g}"] = row
        print(
            f"{fraction:8g} {row['one']:14.2f} {row['average']:9.2f} {row['far off']:11.1%}",
            flush=True,
        )
    write(options.output, options.device, vars(options), results)


if __name__ == "__main__":
    main()
