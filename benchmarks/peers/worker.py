"""Steps of other packages' Sophias, in an environment of their own.

Started by step.py: prints "ready", then takes a step for every line it reads and prints its
seconds. It knows nothing of hf_sophia.

    python worker.py PACKAGE THREADS SIZE [SIZE ...]
"""

import sys
import time

import torch


def labml(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return labml-nn's Sophia, its Hessian set by hand."""
    from labml_nn.optimizers.sophia import Sophia

    optimizer = Sophia(params, lr=1e-9)
    optimizer.update_hessian(1)
    return optimizer


def pytorch_optimizer(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return pytorch_optimizer's SophiaH, given its Hessian once and making none itself."""
    from pytorch_optimizer import SophiaH

    optimizer = SophiaH(params, lr=1e-9, update_period=10**9)
    optimizer.step(hessian=[torch.ones_like(param) for param in params])
    return optimizer


MAKERS = {"labml-nn": labml, "pytorch_optimizer": pytorch_optimizer}


def main() -> None:
    """Serve until the input ends."""
    package, threads, *sizes = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(int(size))) for size in sizes]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = MAKERS[package](params)
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        optimizer.step()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
