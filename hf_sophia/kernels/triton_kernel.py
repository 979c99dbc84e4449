"""Sophia's step in Triton: one launch over the addresses of a list of tensors.

Each program takes a block of one tensor, found by two tables. Blocks that are whole and aligned are
read and written without a mask: with one, Triton would make an access of each element instead of
one of 128 bits for four.

Imported only where it is used, since it needs the package triton.
"""

import triton
import triton.language as tl


@triton.jit
def _between(start, end, weight):
    """Return what lies on the way; for a weight of 1 it is exactly the end."""
    near = start + weight * (end - start)
    return tl.where(weight < 0.5, near, end - (1.0 - weight) * (end - start))


@triton.jit
def _change(
    theta_at, g_at, m_at, h_at, inside, rho, step, decay, weight, further, eps, hessian_weight
):
    """Update a block; return how many coordinates were clipped and were not finite."""
    theta = tl.load(theta_at, mask=inside).to(tl.float32)
    g = tl.load(g_at, mask=inside).to(tl.float32)
    m = tl.load(m_at, mask=inside)
    h = tl.load(h_at, mask=inside)
    spoilt = ~(tl.abs(g) < float("inf"))
    g = tl.where(spoilt, 0.0, g)
    m = _between(m, g, weight)
    # m is the average already; by Nesterov it goes further along g. Not even by a weight of 0 past
    # an m near fp32's end: 0 times infinity is NaN.
    ahead = tl.where(further == 0.0, m, _between(m, g, further))
    ratio = ahead * hessian_weight / tl.maximum(h, eps)
    hit = tl.abs(ratio) >= rho
    theta = theta * decay - step * tl.minimum(tl.maximum(ratio, -rho), rho)
    tl.store(m_at, m, mask=inside)
    tl.store(theta_at, theta.to(theta_at.dtype.element_ty), mask=inside)
    if inside is not None:
        hit &= inside
        spoilt &= inside
    return tl.sum(hit.to(tl.int32)), tl.sum(spoilt.to(tl.int32))


# One compilation serves any number of tensors and any slot of the counter.
@triton.jit(do_not_specialize=["tensors"], do_not_specialize_on_alignment=["clipped"])
def sophia_kernel(
    table,  # addresses: a row each of theta, g, m, h and rho
    sizes,  # elements of each tensor
    owner,  # the tensor of each program
    start,  # and its first element there
    clipped,  # coordinates, a counter
    bad,  # gradients that are not finite, a counter
    tensors,
    lr,
    decay,
    weight,
    further,
    eps,
    hessian_weight,
    smallest_rho,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update the block of this program: theta and m in place."""
    program = tl.program_id(0)
    t = tl.load(owner + program)
    first = tl.load(start + program)
    left = tl.load(sizes + t) - first
    theta = tl.load(table + t).to(tl.pointer_type(TYPE)) + first
    g = tl.load(table + tensors + t).to(tl.pointer_type(TYPE)) + first
    m = tl.load(table + 2 * tensors + t).to(tl.pointer_type(tl.float32)) + first
    h = tl.load(table + 3 * tensors + t).to(tl.pointer_type(tl.float32)) + first
    rho = tl.load(tl.load(table + 4 * tensors + t).to(tl.pointer_type(tl.float32)))
    rho = tl.maximum(rho, smallest_rho)
    place = tl.arange(0, BLOCK)
    if ALIGNED and left >= BLOCK:
        hits, spoilt = _change(
            tl.multiple_of(theta, 16) + place,
            tl.multiple_of(g, 16) + place,
            tl.multiple_of(m, 16) + place,
            tl.multiple_of(h, 16) + place,
            None,
            rho,
            lr / rho,
            decay,
            weight,
            further,
            eps,
            hessian_weight,
        )
    else:
        hits, spoilt = _change(
            theta + place,
            g + place,
            m + place,
            h + place,
            place < left,
            rho,
            lr / rho,
            decay,
            weight,
            further,
            eps,
            hessian_weight,
        )
    tl.atomic_add(clipped, hits.to(tl.int64))
    if spoilt > 0:
        tl.atomic_add(bad, spoilt.to(tl.int64))
