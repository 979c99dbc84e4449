"""Drawing labels for Sophia-G: the sampler of this package beside other ways to draw.

    python benchmarks/sampler.py --output benchmarks/results/sampler_cpu.json

A ratio is that to the forward pass of the cross-entropy of the same logits.
"""

import argparse
from pathlib import Path

import torch
from measuring import Way, ratios, take_turns, write

from hf_sophia.estimators.likelihoods import sampled_cotangent
from hf_sophia.estimators.sampling import sample_categorical

REFERENCE = "cross-entropy, forward"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024, help="Predictions (default 1024)")
    parser.add_argument("--classes", type=int, nargs="+", default=[50257, 8192, 2])
    parser.add_argument("--rounds", type=int, default=15, help="Draws of each (default 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="Write the results here too, as JSON")
    return parser.parse_args()


def ways(rows: int, classes: int, device: str) -> dict[str, Way]:
    """Return what to measure, by name."""
    torch.manual_seed(0)
    logits = torch.randn(rows, classes, device=device)
    probabilities = logits.softmax(-1)
    targets = torch.randint(classes, (rows,), device=device)
    generator = torch.Generator(device).manual_seed(0)
    uniform = torch.rand(rows, dtype=torch.float64, device=device)
    exponential = torch.empty_like(probabilities)

    def race() -> None:
        (probabilities / exponential.exponential_(generator=generator)).argmax(-1)

    return {
        REFERENCE: lambda: torch.nn.functional.cross_entropy(logits, targets),
        "ours, from probabilities": lambda: sample_categorical(probabilities, uniform),
        "ours, cotangent from logits": lambda: sampled_cotangent(
            logits, None, likelihood="categorical", generator=generator
        ),
        "torch.multinomial": lambda: torch.multinomial(probabilities, 1, generator=generator),
        "Categorical.sample": lambda: torch.distributions.Categorical(logits=logits).sample(),
        "exponential race": race,
        "one cumulative sum": lambda: torch.searchsorted(
            probabilities.cumsum(-1), uniform[:, None].float()
        ),
    }


def main() -> None:
    """Measure and print a table for each number of classes."""
    options = parse()
    torch.set_num_threads(options.threads)
    results = {}
    with torch.no_grad():
        for classes in options.classes:
            found = ways(options.rows, classes, options.device)
            summary = ratios(take_turns(found, options.rounds, options.device), REFERENCE)
            results[f"{options.rows} x {classes}"] = summary
            print(f"\n{options.rows} predictions of {classes} classes")
            for name, row in sorted(summary.items(), key=lambda item: item[1]["ratio"]):
                print(f"{name:28s} {row['seconds'] * 1e3:9.3f} ms  {row['ratio']:6.2f}")
    write(options.output, options.device, vars(options), results)


if __name__ == "__main__":
    main()
