"""GNB against exact Gauss-Newton diagonals, and what must not change its mean."""

import importlib
import weakref

import pytest
import torch
from reference.copies import assert_unbiased, copy_parameters, forward_copies
from reference.curvature import gauss_newton_diagonal
from torch.nn import functional

from hf_sophia.estimators import GaussNewtonBartlett, gauss_newton_bartlett, grouped, hutchinson

# The package's name for it is the function inside.
estimator_module = importlib.import_module("hf_sophia.estimators.gauss_newton_bartlett")


def mlp(outputs: int) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, outputs)
    ).double()
    for param in model.parameters():
        param.data.mul_(2.0)
    return model, torch.randn(6, 3).double()


def exact_categorical(logits, params, targets=None):
    classes = logits.shape[-1]
    flat_targets = torch.zeros(logits.shape[:-1], dtype=torch.long).reshape(-1)
    if targets is not None:
        flat_targets = torch.where(targets == -100, -100, 0).reshape(-1)

    # The Hessian of cross-entropy by the logits does not depend on the labels.
    def loss(flat: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(flat.view(-1, classes), flat_targets)

    return gauss_newton_diagonal(logits, params, loss)


def drawing(model, call, groups=lambda logits: [(logits, None)], likelihood="categorical", seed=1):
    """Return a function that makes n draws: B counts all copies, so each draw is n times hhat."""
    generator = torch.Generator().manual_seed(seed)

    def estimate(draws: int) -> list[torch.Tensor]:
        copies = copy_parameters(model, draws)
        accumulator = GaussNewtonBartlett(copies.values())
        for logits, targets in groups(forward_copies(model, copies, call)):
            accumulator.add(
                logits, targets, likelihood=likelihood, generator=generator, retain_graph=True
            )
        return [draws * h for h in accumulator.estimate().values()]

    return estimate


def test_unbiased_on_an_mlp() -> None:
    model, x = mlp(5)
    exact = exact_categorical(model(x), list(model.parameters()))
    assert_unbiased(drawing(model, lambda run: run(x)), exact, draws=80_000)


def test_unbiased_one_call_at_a_time() -> None:
    """The public function as a user calls it, 3,000 draws; the standard error is about 1.2 %."""
    model, x = mlp(5)
    params = list(model.parameters())
    exact = exact_categorical(model(x), params)
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for _ in range(3_000):
        result = gauss_newton_bartlett(model(x), params, generator=generator)
        total += sum(h.sum() for h in result.values()).item() / 3_000
    assert total == pytest.approx(sum(e.sum().item() for e in exact), rel=0.04)


def gpt2_with_padding(tiny_gpt2):
    model = tiny_gpt2(
        vocab_size=11, n_embd=8, n_layer=1, n_positions=8, attn_implementation="eager"
    ).double()
    for name, param in model.named_parameters():
        if "ln" not in name:
            param.data.mul_(8.0)  # far from uniform predictions
    ids = torch.arange(12).view(2, 6) % 11
    targets = torch.ones(2, 6, dtype=torch.long)
    targets[0, :2] = targets[1, 3:] = -100
    exact = exact_categorical(model(ids).logits, list(model.parameters()), targets)
    return model, ids, targets, exact


@pytest.mark.parametrize("by_sequence", [False, True])
def test_unbiased_on_a_gpt2_with_padding(tiny_gpt2, by_sequence) -> None:
    model, ids, targets, exact = gpt2_with_padding(tiny_gpt2)

    def groups(logits):
        every = targets.expand(len(logits), -1, -1)
        rows = [0, 1] if by_sequence else [slice(None)]
        return [(logits[:, row], every[:, row]) for row in rows]

    estimate = drawing(model, lambda run: run(ids, use_cache=False).logits, groups)
    assert_unbiased(estimate, exact, draws=60_000, batch=2_000)


def test_unbiased_for_bernoulli_labels() -> None:
    model, x = mlp(3)
    labels = torch.zeros(18).double()
    exact = gauss_newton_diagonal(
        model(x),
        list(model.parameters()),
        lambda flat: functional.binary_cross_entropy_with_logits(flat, labels),
    )
    estimate = drawing(model, lambda run: run(x), likelihood="bernoulli")
    assert_unbiased(estimate, exact, draws=80_000)


def test_unbiased_for_squared_error() -> None:
    model, x = mlp(2)
    labels = torch.zeros(12).double()
    exact = gauss_newton_diagonal(
        model(x), list(model.parameters()), lambda flat: functional.mse_loss(flat, labels)
    )
    estimate = drawing(model, lambda run: run(x), likelihood="gaussian")
    assert_unbiased(estimate, exact, draws=80_000)


@pytest.mark.parametrize("split", [[3, 3], [1, 5], [2, 2, 2], [1] * 6])
def test_the_mean_does_not_depend_on_micro_batches(split) -> None:
    model, x = mlp(5)
    exact = exact_categorical(model(x), list(model.parameters()))

    def groups(logits):
        return [(part, None) for part in logits.split(split, dim=1)]

    assert_unbiased(drawing(model, lambda run: run(x), groups), exact, draws=80_000)


def test_the_mean_does_not_depend_on_the_share_of_uncounted_rows() -> None:
    model, x = mlp(5)
    exact = exact_categorical(model(x), list(model.parameters()))
    padded = torch.cat([x, torch.randn(9, 3).double()])
    targets = torch.tensor([1] * 6 + [-100] * 9)

    def groups(logits):
        return [(logits, targets.expand(len(logits), -1))]

    assert_unbiased(drawing(model, lambda run: run(padded), groups), exact, draws=80_000)


def test_more_groups_have_less_variance() -> None:
    model, x = mlp(5)
    deviations = []
    for parts in (1, 2, 6):

        def groups(logits, parts=parts):
            return [(part, None) for part in logits.chunk(parts, dim=1)]

        drawn = drawing(model, lambda run: run(x), groups)(20_000)
        deviations.append(sum(h.flatten(1).sum(1) for h in drawn).std().item())
    assert deviations[0] > 1.2 * deviations[1]
    assert deviations[1] > 1.2 * deviations[2]


def test_uncounted_rows_do_not_matter_bit_for_bit() -> None:
    model, x = mlp(5)
    params = list(model.parameters())
    targets = torch.tensor([0, 1, -100, 2, -100, 3])
    seeded = [torch.Generator().manual_seed(4) for _ in range(2)]
    changed = x.clone()
    changed[targets == -100] = 1e3
    one, other = (
        gauss_newton_bartlett(model(data), params, targets=targets, generator=generator)
        for data, generator in zip((x, changed), seeded, strict=True)
    )
    for param in params:
        assert torch.equal(one[param], other[param])


def test_rows_that_do_not_count_may_even_be_nan() -> None:
    logits = torch.randn(4, 7, requires_grad=True)
    weight = torch.ones(7, requires_grad=True)
    outputs = (logits * weight).masked_fill(torch.tensor([[0], [1], [0], [0]]).bool(), float("nan"))
    targets = torch.tensor([1, -100, 2, 3])
    assert gauss_newton_bartlett(outputs, [weight], targets=targets)[weight].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_large_vocabulary_does_not_underflow_in_half_precision(dtype, accumulate) -> None:
    """GPT-2's vocabulary and 2,048 tokens: most of a softmax over B would be 0 in fp16."""
    torch.manual_seed(0)
    x = torch.randn(2048, 8)
    # A mean in the head makes the many small probabilities count together.
    head = (0.5 + 0.02 * torch.randn(50257, 8)).to(dtype)
    weight = torch.eye(8)
    sums = []
    for precision in (torch.float32, dtype):
        param = torch.nn.Parameter(weight.to(precision))
        logits = (x.to(precision) @ param) @ head.to(precision).T
        # The same values, so that the same labels are drawn.
        same = logits.detach().to(dtype).to(precision)
        logits = logits + (same - logits).detach()
        groups = GaussNewtonBartlett([param])
        generator = torch.Generator().manual_seed(1)
        for part in logits.chunk(accumulate):
            groups.add(part, generator=generator, retain_graph=True)
        sums.append(groups.estimate()[param].sum().item())
        if precision is torch.float32:
            x, weight = x.to(dtype).float(), weight
    assert sums[1] == pytest.approx(sums[0], rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_and_returns_fp32(dtype) -> None:
    model, x = mlp(5)
    reference = model.float()
    half = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 5))
    half.load_state_dict(reference.state_dict())
    half = half.to(dtype)
    results = []
    for net, data in ((reference, x.float()), (half, x.to(dtype))):
        generator = torch.Generator().manual_seed(5)
        total = dict.fromkeys(range(4), 0.0)
        logits = net(data)
        for _ in range(300):
            result = gauss_newton_bartlett(
                logits, net.parameters(), generator=generator, retain_graph=True
            )
            for index, param in enumerate(net.parameters()):
                assert result[param].dtype == torch.float32
                total[index] += result[param].sum().item()
        results.append(total)
    for index in range(4):
        assert results[1][index] == pytest.approx(results[0][index], rel=0.05)


def test_unreached_parameters_get_zeros_and_frozen_ones_nothing() -> None:
    model, x = mlp(5)
    other = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    model[0].bias.requires_grad_(False)
    result = gauss_newton_bartlett(model(x), [*model.parameters(), other, model[0].weight])
    assert set(result) == {model[0].weight, model[2].weight, model[2].bias, other}
    assert torch.equal(result[other], torch.zeros(2))
    assert result[model[0].weight].max() > 0
    assert all(p.grad is None for p in model.parameters())


def test_the_training_gradient_is_untouched() -> None:
    model, x = mlp(5)
    y = torch.arange(6) % 5
    functional.cross_entropy(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logits = model(x)
    gauss_newton_bartlett(logits, model.parameters(), retain_graph=True)
    functional.cross_entropy(logits, y).backward()
    for param, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(param.grad, grad)


def test_bad_input_is_named() -> None:
    model, x = mlp(5)
    params = list(model.parameters())
    logits = model(x)
    with pytest.raises(ValueError, match="'categorical', 'bernoulli', 'gaussian', got 'poisson'"):
        gauss_newton_bartlett(logits, params, likelihood="poisson")
    with pytest.raises(ValueError, match=r"shape \(6,\) for logits.*, got.*\(5,\)"):
        gauss_newton_bartlett(logits, params, targets=torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="logits must be a floating-point tensor"):
        gauss_newton_bartlett([1.0], params)
    with pytest.raises(ValueError, match="logits must be a floating-point tensor.*int64"):
        gauss_newton_bartlett(torch.zeros(2, 3).long(), params)
    with pytest.raises(ValueError, match="no prediction counts"):
        gauss_newton_bartlett(logits, params, targets=torch.full((6,), -100), retain_graph=True)
    with pytest.raises(ValueError, match="carry no graph"):
        gauss_newton_bartlett(logits.detach(), params)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        gauss_newton_bartlett(logits, [])
    with pytest.raises(ValueError, match="targets must be a tensor or None"):
        gauss_newton_bartlett(logits, params, targets=[0] * 6)
    logits.sum().backward()
    with pytest.raises(RuntimeError, match="graph of the logits is gone"):
        gauss_newton_bartlett(logits, params)


@pytest.mark.parametrize(
    "estimate",
    [
        lambda logits, params: gauss_newton_bartlett(logits, params, retain_graph=True),
        lambda logits, params: hutchinson(logits.square().sum(), params),
    ],
    ids=["gnb", "hutchinson"],
)
def test_parameters_may_come_with_their_names_and_nothing_else_may(estimate) -> None:
    model, x = mlp(5)
    found = []
    for params in (
        model.parameters(),
        model.named_parameters(),
        list(model.named_parameters()),
        torch.nn.ParameterList(model.parameters()),
    ):
        torch.manual_seed(0)
        found.append(estimate(model(x), params))
    assert all(each.keys() == set(model.parameters()) for each in found)
    assert all(torch.equal(found[0][p], other[p]) for other in found[1:] for p in found[0])
    with pytest.raises(TypeError, match="params must be an iterable of parameters, got one Param"):
        estimate(model(x), next(model.parameters()))
    with pytest.raises(TypeError, match=r"got one Sequential: pass model.parameters\(\)"):
        estimate(model(x), model)
    with pytest.raises(TypeError, match="params must hold parameters, got '0.weight'"):
        estimate(model(x), dict(model.named_parameters()))
    for wrong in (tuple(model[0].parameters()), (), ("weight", None)):
        with pytest.raises(TypeError, match="params must hold parameters, got "):
            estimate(model(x), [wrong])


def test_sums_are_reduced_in_buckets_of_one_kind_and_a_bounded_size(monkeypatch) -> None:
    """Stands for a second process with the same sums: everything doubles, in few calls."""
    calls = []

    def double(tensor: torch.Tensor) -> None:
        calls.append(tensor.numel())
        tensor.mul_(2)

    monkeypatch.setattr(grouped.distributed, "all_reduce", double)
    monkeypatch.setattr(grouped, "BUCKET_BYTES", 4 * 100)
    sizes = [10, 30, 300, 70, 1, 90, 12]
    params = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    params.append(torch.nn.Parameter(torch.randn(5, dtype=torch.float64)))
    params.append(torch.nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)))
    estimator = GaussNewtonBartlett(params)
    total = sum((p.double() + 1.0).sum() * 1e-3 for p in params)
    estimator.add(torch.stack([total, -total])[None])
    before = [estimator._sum_of(p).clone() for p in params]
    estimator.all_reduce()
    assert estimator.count == 2
    for param, sums in zip(params, before, strict=True):
        assert sums.abs().max() > 0
        assert torch.equal(estimator._sum_of(param), 2 * sums)
    # The count, a large one alone, 10 + 30, 70 + 1, ..., and at the end what is left of each kind.
    assert calls == [1, 300, 40, 71, 90, 12, 96, 5]


def test_gradients_are_let_go_as_they_are_squared(monkeypatch) -> None:
    """What an estimate needs at its peak: the parameters' size once, and the largest twice."""
    model = torch.nn.Sequential(*(torch.nn.Linear(20, 20) for _ in range(8)))
    alive: list[weakref.ref] = []
    peak = 0
    original = estimator_module.gradients
    make_sum = GaussNewtonBartlett._sum_of

    def watched(*args, **kwargs):
        found = original(*args, **kwargs)
        alive.extend(map(weakref.ref, found))
        return found

    def measured(self, param):
        nonlocal peak
        total = make_sum(self, param)
        kept = [grad() for grad in alive if grad() is not None]
        peak = max(peak, sum(t.nbytes for t in (*kept, *self._sums.values())))
        return total

    monkeypatch.setattr(estimator_module, "gradients", watched)
    monkeypatch.setattr(GaussNewtonBartlett, "_sum_of", measured)
    gauss_newton_bartlett(model(torch.randn(4, 20)), model.parameters())
    sizes = [param.nbytes for param in model.parameters()]
    assert sum(sizes) <= peak <= sum(sizes) + max(sizes)
