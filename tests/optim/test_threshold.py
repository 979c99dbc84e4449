"""`rho="auto"` clips the share that was asked for, on any scale; Nesterov and bias correction."""

import copy
import io

import pytest
import torch

from hf_sophia import Sophia, WeightDecay
from hf_sophia.optim import threshold
from hf_sophia.optim.threshold import SAMPLE_SIZE, sample_indices, smoothed


def problem(seed: int = 0) -> tuple[list[torch.nn.Parameter], torch.Generator]:
    """Make tensors of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(64, 96), (50, 40), (7,), (300, 30)]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    return params, generator


def take_steps(
    optimizer: Sophia,
    params: list[torch.nn.Parameter],
    generator: torch.Generator,
    steps: int,
    scales: list[float] | None = None,
) -> None:
    """Step on noise whose variance is the curvature, with a scale of its own for each tensor."""
    for _ in range(steps):
        for index, param in enumerate(params):
            scale = 10.0 ** (index - 1) if scales is None else scales[index]
            spread = torch.linspace(0.5, 2.0, param.numel()).view_as(param)
            param.grad = scale * spread * torch.randn(param.shape, generator=generator)
        if optimizer.hessian_due:
            optimizer.update_hessian({p: p.grad.square() * 100.0 for p in params})
        optimizer.step()


def clipped_of(optimizer: Sophia, param: torch.Tensor) -> float:
    state, group = optimizer.state[param], optimizer.param_groups[0]
    bound = state["rho"] * state["hessian"].clamp(min=group["eps"])
    return (state["exp_avg"].abs() >= bound).float().mean().item()


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_each_tensor_clips_the_share_that_was_asked_for(target) -> None:
    params, generator = problem()
    optimizer = Sophia(params, lr=1e-3, rho="auto", target_clip_fraction=target, k=5)
    take_steps(optimizer, params, generator, 101)
    for param in params:
        if param.numel() > 100:
            # A sample of 1,024 and smoothing over refreshes of a noisy m: measured once, 5 % of
            # all coordinates is three times the largest deviation over seeds 0 to 9.
            assert clipped_of(optimizer, param) == pytest.approx(target, abs=0.05)
    assert optimizer.clip_fraction().item() == pytest.approx(target, abs=0.05)


@pytest.mark.parametrize(
    ("size", "low", "high"),
    # Of the first a sample of 1,024 is looked at, seed 0: 1 % of rank has a standard deviation of
    # 0.3 %, and three are allowed. Of less than 100 coordinates one is clipped, as the threshold
    # lies between the two largest.
    [(100_000, 0.001, 0.019), (1_000, 0.01, 0.01), (64, 1 / 64, 1 / 64), (2, 1 / 2, 1 / 2)],
)
def test_small_shares_of_large_and_of_small_tensors(size, low, high) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator))]
    optimizer = Sophia(params, lr=1e-3, rho="auto", target_clip_fraction=0.01, k=1)
    take_steps(optimizer, params, generator, 1, scales=[1.0])
    assert low - 1e-6 <= clipped_of(optimizer, params[0]) <= high + 1e-6


def test_a_decay_that_is_added_to_the_gradient_is_counted_too() -> None:
    # Strong enough that the gradient alone would put the threshold elsewhere.
    decay, generator = WeightDecay(3.0, weight_decouple=False), torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(600, generator=generator) ** 3)]
    optimizer = Sophia(
        params,
        lr=1e-5,
        betas=(0.0, 0.9),
        rho="auto",
        target_clip_fraction=0.2,
        k=1,
        weight_decay=decay,
    )
    for _ in range(80):
        params[0].grad = torch.randn(600, generator=generator)
        optimizer.update_hessian({params[0]: torch.rand(600, generator=generator) + 0.5})
        optimizer.step()
    assert optimizer.clip_fraction().item() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("scope", ["tensor", "group"])
def test_the_scale_of_the_loss_does_not_matter(scope) -> None:
    """A loss times c has gradients times c and a Hessian times c squared here: the same steps."""
    runs = []
    for factor in (1.0, 2.0**20):
        params, generator = problem()
        optimizer = Sophia(params, lr=1e-2, rho="auto", rho_scope=scope, k=3, eps=1e-30)
        take_steps(optimizer, params, generator, 20, [factor] * 4)
        runs.append([p.detach() for p in params])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_one_rho_for_the_group_counts_every_coordinate_alike() -> None:
    params, generator = problem()
    optimizer = Sophia(
        params, lr=1e-3, rho="auto", rho_scope="group", target_clip_fraction=0.3, k=1
    )
    take_steps(optimizer, params, generator, 60, [1.0, 3.0, 1.0, 0.2])
    rhos = {optimizer.state[p]["rho"].item() for p in params}
    assert len(rhos) == 1
    assert optimizer.clip_fraction().item() == pytest.approx(0.3, abs=0.05)
    assert optimizer.mean_rho().item() == pytest.approx(rhos.pop(), rel=1e-5)


@pytest.mark.parametrize(("corrected", "weight"), [(False, 0.25), (True, 1.0)])
def test_the_first_threshold_by_hand(corrected, weight) -> None:
    param = torch.nn.Parameter(torch.zeros(5))
    optimizer = Sophia(
        [param], lr=1.0, betas=(0.5, 0.75), rho="auto", target_clip_fraction=0.25, eps=1e-3,
        bias_correction=corrected,
    )  # fmt: skip
    hessian = torch.tensor([4.0, 4.0, 4.0, 0.0, 8.0])
    param.grad = torch.tensor([1.0, -2.0, 3.0, 0.0, 8.0])
    optimizer.update_hessian({param: hessian})
    optimizer.step()
    # h is a quarter of the estimate unless that is corrected, m half the gradient; the coordinate
    # that rests does not count.
    ratios = torch.tensor([0.125, 0.25, 0.375, 0.5]) / weight
    rho = ratios.quantile(0.75)
    torch.testing.assert_close(optimizer.state[param]["rho"], rho)
    signed = torch.tensor([0.125, -0.25, 0.375, 0.0, 0.5]) / weight
    expected = signed.clamp(-rho, rho) / rho
    torch.testing.assert_close(param.detach(), -expected)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_threshold_follows_its_equations_through_refreshes(nesterov) -> None:
    """In float64, of every coordinate, with half of the logarithm kept over ten steps."""
    beta1, beta2, target, size = 0.6, 0.8, 0.3, 501
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(size))
    optimizer = Sophia(
        [param], lr=1e-3, betas=(beta1, beta2), rho="auto", target_clip_fraction=target, k=2,
        nesterov=nesterov, bias_correction=True,
    )  # fmt: skip
    m, h = torch.zeros(2, size, dtype=torch.float64)
    rho, refreshes = None, 0
    for step in range(1, 8):
        g, estimate = torch.randn(2, size, generator=generator)
        param.grad = 2.0**step * g
        m = beta1 * m + (1 - beta1) * param.grad.double()
        if step % 2:
            assert optimizer.hessian_due
            optimizer.update_hessian({param: estimate.square() + 0.1})
            refreshes += 1
            h = beta2 * h + (1 - beta2) * (estimate.square() + 0.1).double()
            ahead = beta1 * m + (1 - beta1) * param.grad.double() if nesterov else m
            ratios = ahead.abs() / (h / (1 - beta2**refreshes))
            quantile = ratios.quantile(1 - target).item()
            kept = 0.5 ** (optimizer.param_groups[0]["k"] / 10)
            rho = quantile if rho is None else rho**kept * quantile ** (1 - kept)
        optimizer.step()
        assert optimizer.state[param]["rho"].item() == pytest.approx(rho, rel=1e-5)


def test_thresholds_are_averaged_in_the_logarithm() -> None:
    old, new = torch.tensor([0.0, 1.0, 4.0, 0.0]), torch.tensor([3.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(smoothed(old, new, 10), torch.tensor([3.0, 1.0, 2.0, 0.0]))


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_how_fast_thresholds_follow_does_not_depend_on_k(k) -> None:
    old, new = torch.tensor([5.0]), torch.tensor([0.2])
    every_step = old
    for _ in range(20 // k):
        every_step = smoothed(every_step, new, k)
    # Half of the way in the logarithm in 10 steps, three quarters in 20.
    torch.testing.assert_close(every_step, (old.log() / 4 + new.log() * 3 / 4).exp())


@pytest.mark.parametrize("size", [1, 7, SAMPLE_SIZE, SAMPLE_SIZE + 1, 64 * 1024, 50257 * 768])
def test_the_sample_is_spread_evenly_and_falls_into_no_columns(size) -> None:
    indices = sample_indices(size)
    assert torch.equal(indices, sample_indices(size))
    assert len(indices) == min(size, SAMPLE_SIZE)
    # In a tensor hardly larger than the sample some coordinates stand for their neighbours too.
    assert len(indices.unique()) > 0.85 * len(indices)
    assert size > SAMPLE_SIZE or len(indices.unique()) == size
    assert indices.min() >= 0
    assert indices.max() < size
    if size >= 64 * 1024:
        # Golden-ratio points leave no gap larger than 2.62 / n.
        assert indices.diff().max() <= 2.7 * size / SAMPLE_SIZE
        columns = (indices % 64).bincount(minlength=64)
        assert columns.min() > 0


def test_what_never_moves_or_has_no_curvature_does_no_harm() -> None:
    frozen, flat = torch.nn.Parameter(torch.ones(10)), torch.nn.Parameter(torch.ones(10))
    optimizer = Sophia([frozen, flat], lr=0.5, rho="auto", k=1)
    for _ in range(3):
        frozen.grad, flat.grad = torch.zeros(10), torch.ones(10)
        optimizer.update_hessian({frozen: torch.zeros(10), flat: torch.zeros(10)})
        optimizer.step()
    assert torch.equal(frozen.detach(), torch.ones(10))
    torch.testing.assert_close(flat.detach(), torch.full((10,), -0.5))


@pytest.mark.parametrize("scope", ["tensor", "group"])
def test_coordinates_without_curvature_do_not_set_the_threshold(scope) -> None:
    # As Hutchinson's estimate has them, and the biases of keys: |m| / eps is no scale of anything.
    params = [torch.nn.Parameter(torch.ones(100)), torch.nn.Parameter(torch.ones(50))]
    optimizer = Sophia(
        params, lr=1e-3, betas=(0.0, 0.0), rho="auto", target_clip_fraction=0.2, rho_scope=scope
    )
    curvatures = [torch.ones(100), -torch.ones(50)]
    curvatures[0][:40] = -1.0
    grads = [torch.arange(1.0, 101.0), torch.arange(1.0, 51.0)]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer.update_hessian(dict(zip(params, curvatures, strict=True)))
    optimizer.step()
    rho = float(optimizer.state[params[0]]["rho"])
    # Of 41 ... 100, those with curvature, a fifth is above.
    assert 87.5 <= rho <= 89.0
    other = float(optimizer.state[params[1]]["rho"])
    assert other == (rho if scope == "group" else 0.0)


@pytest.mark.parametrize("scope", ["tensor", "group"])
@pytest.mark.parametrize("k", [1, 2, 10])
def test_the_first_estimate_gives_the_first_threshold_however_late(k, scope) -> None:
    """Steps are those of the sign until then, and no threshold of before holds it back."""
    param = torch.nn.Parameter(torch.zeros(1000))
    optimizer = Sophia([param], lr=1.0, betas=(0.0, 0.0), rho="auto", k=k, rho_scope=scope)
    for _ in range(2 * k + 1):
        before = param.detach().clone()
        param.grad = torch.arange(1.0, 1001.0)
        if optimizer.hessian_due:
            seen = optimizer.param_groups[0]["refreshed_step"] == k + 1
            optimizer.update_hessian({param: torch.full((1000,), 2.0)} if seen else {})
        optimizer.step()
        if optimizer.param_groups[0]["refreshed_step"] <= k + 1:
            torch.testing.assert_close(before - param.detach(), torch.ones(1000))
    # The half that is clipped by default.
    assert optimizer.state[param]["rho"].item() == pytest.approx(250.0, abs=1.0)
    assert optimizer.clip_fraction().item() == pytest.approx(0.5, abs=0.002)


def test_a_parameter_that_joins_between_refreshes_leaves_the_others_thresholds() -> None:
    old, new = (torch.nn.Parameter(torch.zeros(100)) for _ in range(2))
    optimizer = Sophia([old, new], lr=1e-3, betas=(0.0, 0.0), rho="auto", k=4)
    for step in range(1, 10):
        old.grad = step * torch.arange(1.0, 101.0)
        if step >= 3:
            new.grad = torch.arange(1.0, 101.0)
        if optimizer.hessian_due:
            estimates = {old: torch.ones(100), new: torch.full((100,), 5.0)}
            optimizer.update_hessian({p: e for p, e in estimates.items() if p.grad is not None})
        optimizer.step()
        if step in (1, 3, 4):
            assert optimizer.state[old]["rho"].item() == pytest.approx(50.5)
        if step == 3:
            assert optimizer.state[new]["rho"].item() == 0.0
            assert optimizer.mean_rho().item() == pytest.approx(50.5)
        if step == 5:
            kept = 0.5**0.4
            expected = 50.5 * 5 ** (1 - kept)
            assert optimizer.state[old]["rho"].item() == pytest.approx(expected)
            assert optimizer.state[new]["rho"].item() == pytest.approx(10.1)


@pytest.mark.parametrize("joins", [3, 5])
def test_a_parameter_that_joins_later_takes_the_threshold_of_its_group(joins) -> None:
    old, new = (torch.nn.Parameter(torch.zeros(100)) for _ in range(2))
    optimizer = Sophia([old, new], lr=1e-3, rho="auto", rho_scope="group", k=4)
    for step in range(1, 10):
        old.grad = step * torch.arange(1.0, 101.0)
        if step >= joins:
            new.grad = 7.0 * torch.arange(1.0, 101.0)
        if optimizer.hessian_due:
            moving = [p for p in (old, new) if p.grad is not None]
            optimizer.update_hessian({p: torch.ones(100) for p in moving})
        optimizer.step()
        rhos = {optimizer.state[p]["rho"].item() for p in (old, new) if p.grad is not None}
        assert len(rhos) == 1
        if step == 1:
            first = rhos
        assert (rhos == first) == (step < 5)  # whoever joins between refreshes changes nothing
        assert min(rhos) >= min(first)


def test_a_parameter_without_a_gradient_keeps_the_threshold_of_its_group() -> None:
    params = [torch.nn.Parameter(torch.zeros(100)) for _ in range(3)]
    optimizer = Sophia(params, lr=1e-3, rho="auto", rho_scope="group", k=2)
    # The last one joins in a step without the others.
    moving = {1: [0, 1], 2: [0], 3: [1], 4: [2], 5: [0, 2]}
    seen = []
    for step, indices in moving.items():
        for index, param in enumerate(params):
            param.grad = step**2 * torch.arange(1.0, 101.0) if index in indices else None
        if optimizer.hessian_due:
            optimizer.update_hessian({params[index]: torch.ones(100) for index in indices})
        optimizer.step()
        rhos = {state["rho"].item() for state in optimizer.state.values()}
        assert len(rhos) == 1
        seen += rhos
    assert seen[0] == pytest.approx(seen[1])
    assert seen[2] == pytest.approx(seen[3])
    assert seen[0] < seen[2] < seen[4]


@pytest.mark.filterwarnings("ignore:Sophia steps without")
def test_before_the_first_refresh_it_takes_sign_steps() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = Sophia([param], lr=0.5, rho="auto")
    param.grad = torch.tensor([2.0, -1e-3, 0.0])
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([-0.5, 0.5, 0.0]))


@pytest.mark.parametrize("cut", [6, 10])
def test_a_loaded_state_goes_on_exactly(cut) -> None:
    options = {
        "lr": 1e-2, "rho": "auto", "target_clip_fraction": 0.2, "k": 5, "nesterov": True,
        "bias_correction": True,
    }  # fmt: skip
    params, generator = problem()
    optimizer = Sophia(params, **options)
    take_steps(optimizer, params, generator, cut)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = Sophia(others, **options)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    copied = copy.deepcopy(generator.get_state())
    take_steps(optimizer, params, generator, 9)
    generator.set_state(copied)
    take_steps(resumed, others, generator, 9)
    for one, other in zip(params, others, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(optimizer.state[one]["rho"], resumed.state[other]["rho"])


@pytest.mark.parametrize(("before", "after"), [(0.3, "auto"), ("auto", 0.3)])
def test_a_state_of_the_other_kind_of_rho_loads(before, after) -> None:
    params, generator = problem()
    optimizer = Sophia(params, lr=1e-2, rho=before, k=2)
    take_steps(optimizer, params, generator, 3)
    resumed = Sophia(params, lr=1e-2, rho=after, k=2)
    for _ in range(2):
        resumed.load_state_dict(optimizer.state_dict())
        for group in resumed.param_groups:
            group["rho"] = after
        before = [p.detach().clone() for p in params]
        take_steps(resumed, params, generator, 1)
        # No refresh is due: without a threshold every coordinate would take a sign step.
        largest = [(p - b).abs() >= 0.999e-2 for p, b in zip(params, before, strict=True)]
        assert not all(tensor.all() for tensor in largest)
        take_steps(resumed, params, generator, 2)
        optimizer = resumed
    assert all(p.isfinite().all() for p in params)


def test_nesterov_and_bias_correction_by_hand() -> None:
    torch.manual_seed(0)
    start = torch.randn(20, dtype=torch.float64)
    param = torch.nn.Parameter(start.clone())
    optimizer = Sophia(
        [param], lr=0.1, betas=(0.9, 0.8), rho=2.0, k=2, nesterov=True, bias_correction=True
    )
    theta, m, h = start.clone(), torch.zeros(20).double(), torch.zeros(20).double()
    refreshes = 0
    for t in range(1, 7):
        g, estimate = torch.randn(20).double(), torch.rand(20).double()
        param.grad = g
        if optimizer.hessian_due:
            optimizer.update_hessian({param: estimate})
        optimizer.step()
        if t % 2 == 1:
            h, refreshes = 0.8 * h + 0.2 * estimate, refreshes + 1
        m = 0.9 * m + 0.1 * g
        ratio = (0.9 * m + 0.1 * g) / (h / (1 - 0.8**refreshes)).clamp(min=1e-12)
        theta = theta - 0.1 / 2.0 * ratio.clamp(-2.0, 2.0)
        torch.testing.assert_close(param.detach(), theta)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": "automatic"}, "rho must be a number > 0 or 'auto', got 'automatic'"),
        ({"target_clip_fraction": 0.0}, r"target_clip_fraction must lie in \(0, 1\), without 0"),
        ({"target_clip_fraction": 1.0}, "target_clip_fraction must lie in"),
        ({"rho_scope": "layer"}, "rho_scope must be one of 'tensor', 'group', got 'layer'"),
    ],
)
def test_bad_options_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Sophia([torch.nn.Parameter(torch.zeros(1))], **options)


def test_quantiles_are_found_in_parts(monkeypatch) -> None:
    runs = []
    for rows in (threshold.ROWS_AT_ONCE, 1):
        monkeypatch.setattr(threshold, "ROWS_AT_ONCE", rows)
        params, generator = problem()
        optimizer = Sophia(params, lr=1e-2, rho="auto", k=3)
        take_steps(optimizer, params, generator, 7)
        runs.append([optimizer.state[p]["rho"] for p in params])
    assert torch.equal(*map(torch.stack, runs))


def corrected(optimizer: Sophia, param: torch.Tensor) -> torch.Tensor:
    return optimizer.state[param]["hessian"] / optimizer.param_groups[0]["hessian_weight"]


def test_bias_correction_fits_a_parameter_that_joins_later() -> None:
    old, new, unmoved = (torch.nn.Parameter(torch.zeros(3)) for _ in range(3))
    optimizer = Sophia([old, new, unmoved], bias_correction=True, k=2)
    for step in range(1, 16):
        for param in (old, unmoved):
            param.grad = torch.ones(3)
        if step >= 8:  # its state is there before its first estimate
            new.grad = torch.ones(3)
        if optimizer.hessian_due:
            estimates = {old: torch.full((3,), 2.0)}
            if step >= 8:
                estimates[new] = torch.full((3,), 5.0)
            if step == 1:
                estimates[unmoved] = torch.full((3,), 7.0)  # and left out from then on
            if step == 9:  # a resumed run goes on alike
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.update_hessian(estimates)
            torch.testing.assert_close(corrected(optimizer, old), torch.full((3,), 2.0))
            torch.testing.assert_close(corrected(optimizer, unmoved), torch.full((3,), 7.0))
            if step >= 8:
                torch.testing.assert_close(corrected(optimizer, new), torch.full((3,), 5.0))
        optimizer.step()


def test_a_first_estimate_of_zero_counts_after_a_load_too() -> None:
    # As LoRA's A has, whose B begins at 0. Later estimates tell whether it counted.
    param, other = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = Sophia([param, other], bias_correction=True, k=1)
    for step, value in enumerate([0.0, 4.0, 4.0, 4.0], start=1):
        for each in (param, other):
            each.grad = torch.ones(3)
        if step == 2:
            loaded = Sophia([param, other], bias_correction=True, k=1)
            loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for one in (optimizer, loaded) if step >= 2 else (optimizer,):
            one.update_hessian({param: torch.full((3,), value), other: torch.ones(3)})
        optimizer.step()
    assert optimizer.state[param]["hessian"].min() > 0.0
    assert torch.equal(optimizer.state[param]["hessian"], loaded.state[param]["hessian"])


def test_a_state_dictionary_that_does_not_say_whether_h_holds_an_estimate() -> None:
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = Sophia(params, bias_correction=True, k=1)
    for param in params:
        param.grad = torch.ones(3)
    optimizer.update_hessian({params[1]: torch.ones(3)})
    optimizer.step()
    older = optimizer.state_dict()
    assert [older["state"][index].pop("refreshed") for index in (0, 1)] == [False, True]
    optimizer.load_state_dict(older)
    optimizer.update_hessian({param: torch.full((3,), 2.0) for param in params})
    torch.testing.assert_close(corrected(optimizer, params[0]), torch.full((3,), 2.0))
    assert corrected(optimizer, params[1]).max() < 2.0


def test_a_refresh_in_two_calls_is_corrected_alike() -> None:
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = Sophia(params, bias_correction=True)
    for param in params:
        optimizer.update_hessian({param: torch.full((2,), 3.0)})
    for param in params:
        torch.testing.assert_close(corrected(optimizer, param), torch.full((2,), 3.0))


def test_the_mean_threshold_leaves_out_what_has_none_yet() -> None:
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    optimizer = Sophia(params, rho=0.5)
    for param in params:
        param.grad = torch.ones(4)
    optimizer.update_hessian({param: torch.ones(4) for param in params})
    optimizer.step()
    optimizer.param_groups[0]["rho"] = "auto"
    params[1].grad = None  # frozen since
    optimizer.step()
    assert optimizer.mean_rho().item() == pytest.approx(optimizer.state[params[0]]["rho"].item())
