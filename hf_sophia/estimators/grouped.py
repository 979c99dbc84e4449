"""What estimators share: sums over groups of predictions, over how many there are."""

import reprlib
from collections.abc import Iterable, Iterator

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

#: Size of the flat buffers in which sums are reduced, in bytes: few calls, little extra memory.
BUCKET_BYTES = 64 * 2**20


#: What estimators take: `model.parameters()`, `model.named_parameters()`, or such a list.
Parameters = Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]]


def trained(params: Parameters) -> list[torch.Tensor]:
    """Return the parameters that require a gradient, each once.

    Args:
        params: Parameters, with or without their names.

    Raises:
        TypeError: Something in it is no parameter.
    """
    many = isinstance(params, torch.nn.ParameterList)  # the one module that is such a list
    single = isinstance(params, torch.Tensor | torch.nn.Module) and not many
    if single or not isinstance(params, Iterable):
        raise TypeError(
            f"params must be an iterable of parameters, got one {type(params).__name__}: pass"
            " model.parameters() or a list"
        )
    found = []
    for param in params:
        match param:
            case str(), param:  # a name first, as a pair of tensors is no parameter
                pass
        if not isinstance(param, torch.Tensor):
            raise TypeError(
                f"params must hold parameters, got {reprlib.repr(param)}: pass"
                " model.parameters() or a list"
            )
        found.append(param)
    return list(dict.fromkeys(param for param in found if param.requires_grad))


class GroupedEstimate:
    """A diagonal summed over groups of predictions, and the number of predictions.

    Args:
        params: The parameters to estimate for, with or without their names; those with
            `requires_grad=False` are left out.

    Attributes:
        params: Those that are left.

    Raises:
        TypeError: Something in params is no parameter.
    """

    def __init__(self, params: Parameters) -> None:
        self.params = trained(params)
        self._sums: dict[torch.Tensor, torch.Tensor] = {}
        self._count: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """The number of predictions so far, B in all; reading it syncs the device."""
        return 0 if self._count is None else int(self._count)

    def _check_params(self) -> None:
        if not self.params:
            raise ValueError("params holds no parameter that requires a gradient")

    def _sum_of(self, param: torch.Tensor) -> torch.Tensor:
        """Return the parameter's sum, made of zeros in fp32 at least where it has none yet."""
        if param not in self._sums:
            dtype = torch.promote_types(param.dtype, torch.float32)
            self._sums[param] = torch.zeros_like(param, dtype=dtype)
        return self._sums[param]

    def _add_count(self, count: torch.Tensor) -> None:
        self._count = count if self._count is None else self._count + count

    @torch.no_grad()
    def all_reduce(self) -> None:
        """Add up sums and counts over the processes of torch's default group.

        Every process calls it once, with the same parameters; then all hold the same estimate, or
        their shards of it. What sharded parameters have was reduced before it was squared.
        """
        self._check_params()
        device = self.params[0].device
        count = torch.zeros((), dtype=torch.long) if self._count is None else self._count
        self._count = count.to(device)
        distributed.all_reduce(self._count)
        whole = [self._sum_of(p) for p in self.params if not isinstance(p, DTensor)]
        for bucket in _buckets(whole):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                distributed.all_reduce(bucket[0])
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            distributed.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    @torch.no_grad()
    def estimate(self) -> dict[torch.Tensor, torch.Tensor]:
        """Return the estimate of every parameter and forget the groups.

        Returns:
            `{parameter: hhat}`, shaped like the parameter, in fp32 at least; zeros where no graph
            reached.

        Raises:
            ValueError: No prediction counted.
        """
        count = self.count
        if count == 0:
            raise ValueError("no prediction counts: every target is -100, so there is no estimate")
        result = {param: self._sum_of(param) for param in self.params}
        for total in result.values():
            total.div_(count)
        self._sums, self._count = {}, None
        return result


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Gather tensors of one device and dtype, in order, up to BUCKET_BYTES; larger ones alone."""
    open_buckets: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.nbytes >= BUCKET_BYTES:
            yield [tensor]
            continue
        bucket = open_buckets.setdefault((tensor.device, tensor.dtype), [])
        if sum(member.nbytes for member in bucket) + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = open_buckets[tensor.device, tensor.dtype] = []
        bucket.append(tensor)
    yield from open_buckets.values()
