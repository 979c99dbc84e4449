"""What training with Sophia-G costs over fused AdamW, by how the Hessian is refreshed.

    python benchmarks/refresh.py --output benchmarks/results/refresh_cpu.json

Whole training steps, forward and backward included, take turns in one run: AdamW's, Sophia's
without a refresh, and Sophia's with one, made in each way. A way's overhead is

    ((k - 1) * plain + refresh) / k / adamw - 1

of the medians over rounds of the ratios to AdamW's step of the same round.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import Way, ratios, take_turns, write
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sophia import Sophia
from hf_sophia.trainer.heads import head_output
from hf_sophia.trainer.noise import noise_seed
from hf_sophia.trainer.own_pass import share_counts, undisturbed
from hf_sophia.trainer.refresh import HessianRefresh

#: Layers, width and vocabulary of GPT-2s.
SIZES = {
    "tiny": (1, 16, 40),
    "5M": (4, 256, 8192),
    "29M": (6, 512, 20000),
    "124M": (12, 768, 50257),
    "1B": (24, 1792, 50257),
}

#: The share of the batch that has a pass of its own.
FRACTIONS = {"own pass, 1": 1.0, "own, 1/2": 0.5, "own, 1/4": 0.25, "own, 1/8": 0.125}

Batches = list[dict[str, torch.Tensor]]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["5M", "29M"], choices=SIZES)
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=15, help="Steps of each way (default 15)")
    parser.add_argument("--k", type=int, default=10, help="Steps between refreshes (default 10)")
    parser.add_argument("--batch", type=int, default=8, help="Sequences a step (default 8)")
    parser.add_argument("--length", type=int, default=128, help="Tokens a sequence (default 128)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bf16", action="store_true", help="Run the model under autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="Write the results here too, as JSON")
    return parser.parse_args()


def main() -> None:
    """Measure and print a table for each size and accumulation."""
    options = parse()
    torch.set_num_threads(options.threads)
    results = {}
    for size in options.sizes:
        for accumulation in options.accumulation:
            if options.batch % accumulation:
                raise SystemExit(f"--batch {options.batch} can't be cut into {accumulation}")
            summary = measure(size, accumulation, options)
            results[f"{size}, accumulation {accumulation}"] = summary
            # As it grows: a run that is stopped keeps what it has measured.
            write(options.output, options.device, vars(options), results)
            print(f"\nGPT-2 {size}, {accumulation} micro-batches, k = {options.k}")
            for name, row in summary.items():
                print(f"{name:22s} {row['seconds'] * 1e3:9.1f} ms  {row['overhead']:7.2%}")


def measure(size: str, accumulation: int, options: argparse.Namespace) -> dict[str, dict]:
    """Return seconds, ratio and amortised overhead of every way."""
    torch.manual_seed(0)
    layers, width, vocabulary = SIZES[size]
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=max(width // 64, 1),
        vocab_size=vocabulary,
        n_positions=options.length,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.device(options.device):
        model = GPT2LMHeadModel(config).train()
    shape = (accumulation, options.batch // accumulation, options.length)
    ids = torch.randint(vocabulary, shape, device=options.device)
    batches = [{"input_ids": part, "labels": part} for part in ids]
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    sophia = Sophia(model.parameters(), lr=1e-6, rho=0.1, k=1)
    autocast = torch.autocast(options.device, torch.bfloat16, enabled=options.bf16)

    def way(refreshing: Callable[[HessianRefresh], None] | None, graphs: int = 0) -> Way:
        def once() -> None:
            refresh = HessianRefresh(model.parameters(), seed=0, step=0, rank=0)
            backward(model, batches, autocast, refresh, graphs)
            if refreshing is not None:
                refreshing(refresh)
            sophia.update_hessian(refresh.estimate() if refreshing or graphs else {})
            sophia.step()
            sophia.zero_grad()

        return once

    def with_adamw() -> None:
        backward(model, batches, autocast, None, 0)
        adamw.step()
        adamw.zero_grad()

    def own_passes(fraction: float) -> Callable[[HessianRefresh], None]:
        return lambda refresh: own(model, refresh, fraction, autocast)

    ways = {"adamw": with_adamw, "sophia, no refresh": way(None)}
    ways["kept graph"] = way(None, graphs=accumulation)
    if accumulation > 1:
        ways[f"kept graph of 1 of {accumulation}"] = way(None, graphs=1)
    ways |= {name: way(own_passes(fraction)) for name, fraction in FRACTIONS.items()}
    summary = ratios(take_turns(ways, options.rounds, options.device), "adamw")
    plain = summary["sophia, no refresh"]["ratio"]
    for name, row in summary.items():
        refreshed = name not in ("adamw", "sophia, no refresh")
        share = 1.0 / options.k if refreshed else 0.0
        row["overhead"] = (1 - share) * (plain if refreshed else row["ratio"]) - 1
        row["overhead"] += share * row["ratio"]
    return summary


def backward(
    model: GPT2LMHeadModel,
    batches: Batches,
    autocast: torch.autocast,
    refresh: HessianRefresh | None,
    graphs: int,
) -> None:
    """Run the training passes; keep the graphs of some micro-batches for the estimate."""
    for index, inputs in enumerate(batches):
        with autocast:
            outputs = model(**inputs)
        if refresh is not None:
            refresh.batches.append(inputs)
            if index < graphs:
                refresh.add_graph(head_output(model, inputs, outputs))
        (outputs.loss / len(batches)).backward()


def own(
    model: GPT2LMHeadModel, refresh: HessianRefresh, fraction: float, autocast: torch.autocast
) -> None:
    """Estimate in forward passes of its own, as the Trainer does."""
    for index, count in enumerate(share_counts(refresh.batches, fraction)):
        if count:
            share = refresh.part(index, count)
            with undisturbed(model, noise_seed(refresh.place(index), "dropout")):
                with autocast:
                    outputs = model(**share)
                refresh.add_part(head_output(model, share, outputs), index, count)


if __name__ == "__main__":
    main()
