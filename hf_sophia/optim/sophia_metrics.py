"""What Sophia tells of its last step and its Hessian."""

import torch

from hf_sophia.kernels import SMALLEST_RHO
from hf_sophia.optim.base import BaseOptimizer
from hf_sophia.optim.sharding import local, total
from hf_sophia.optim.sophia_options import AUTO


class SophiaMetrics(BaseOptimizer):
    """The metrics of `Sophia`, from its groups, its state and what its last step clipped."""

    # By parameters that are sharded alike, and of how many coordinates.
    _clipped: list[tuple[int | torch.Tensor, torch.Tensor]]
    _moved: int

    @torch.no_grad()
    def clip_fraction(self) -> torch.Tensor:
        """Return the share of the coordinates of the last step that were clipped, in [0, 1].

        Those are the ones with `|m| >= rho max(h, eps)`; the authors' win rate is 1 minus the
        share. A zero-dimensional tensor on the parameters' device, without a device sync; 0 before
        the first step. Where parameters are sharded, all processes call it together.
        """
        if not self._moved:
            return torch.zeros(())
        counts = [torch.as_tensor(count, dtype=torch.int64) for count, _ in self._clipped]
        owners = [owner for _, owner in self._clipped]
        return total(counts, owners).to(torch.float32) / self._moved

    @torch.no_grad()
    def mean_rho(self) -> torch.Tensor:
        """Return the geometric mean of rho over all coordinates that have moved and have one.

        A zero-dimensional fp32 tensor on the parameters' device, without a device sync; 0 where no
        parameter has a threshold yet.
        """
        rhos, sizes = [], []
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state.get(param)
                auto = group["rho"] == AUTO
                # A run that had a number before has no threshold where nothing moved since.
                if state and state["step"] and (not auto or "rho" in state):
                    own = state["rho"] if auto else torch.tensor(group["rho"])
                    rhos.append(own.to(local(param).device, torch.float32))
                    sizes.append(param.numel())
        if not rhos:
            return torch.zeros(())
        together = torch.stack([rho.to(rhos[0].device) for rho in rhos])
        # Without curvature a parameter has none: its 0 says nothing of the others' scale.
        weights = together.new_tensor(sizes).where(together > 0.0, 0.0)
        logs = together.clamp(min=SMALLEST_RHO).log()
        mean = torch.dot(logs, weights / weights.sum().clamp(min=1.0)).exp()
        return mean.where(weights.any(), 0.0)

    @torch.no_grad()
    def hessian_norm(self) -> torch.Tensor:
        """Return the L2 norm of h over all parameters, as a zero-dimensional fp32 tensor.

        Where parameters are sharded, all processes call it together.
        """
        params = [param for param, state in self.state.items() if state]
        if not params:
            return torch.zeros(())
        norms = [local(self.state[param]["hessian"]).norm() for param in params]
        return total([norm.to(torch.float32).square() for norm in norms], params).sqrt()
