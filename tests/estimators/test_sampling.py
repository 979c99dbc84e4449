"""The sampler draws from the softmax it is given: chi-squared tests with fixed seeds."""

import pytest
import torch

from hf_sophia.estimators import likelihoods as likelihoods_module
from hf_sophia.estimators import sample_categorical, sampled_cotangent


def chi_squared_p(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The chance of a chi-squared this large or larger, neighbours pooled to 20 expected draws."""
    cell = (expected.double().cumsum(0) / 20.0).floor().long()
    cells = cell.unique(return_inverse=True)[1]
    size = int(cells.max()) + 1
    pooled = torch.zeros(2, size, dtype=torch.float64)
    pooled[0].index_add_(0, cells, counts.double())
    pooled[1].index_add_(0, cells, expected.double())
    statistic = ((pooled[0] - pooled[1]) ** 2 / pooled[1]).sum()
    freedom = torch.tensor((size - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


def draw(probabilities: torch.Tensor, draws: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for size in [500] * (draws // 500):
        uniform = torch.rand(size, dtype=torch.float64, generator=generator)
        labels.append(sample_categorical(probabilities.expand(size, -1), uniform))
    return torch.cat(labels).bincount(minlength=len(probabilities))


# A correct sampler fails p > 1e-3 once in a thousand seeds; the seed is fixed. Errors worth finding
# (a shifted block, a lost tail) give p far below 1e-20 with these many draws.
@pytest.mark.parametrize("classes", [1, 2, 3, 16, 17, 97, 1000, 1024, 50257])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 3.0])
def test_draws_follow_the_probabilities(classes, sharpness) -> None:
    torch.manual_seed(classes)
    probabilities = (sharpness * torch.randn(classes)).softmax(0)
    draws = 20_000 if classes > 10_000 else 100_000
    counts = draw(probabilities, draws)
    assert counts.sum() == draws
    assert len(counts) == classes
    if classes > 1:
        assert chi_squared_p(counts, probabilities.double() * draws) > 1e-3


@pytest.mark.parametrize("classes", [10, 1000, 50257])
def test_classes_of_weight_zero_are_never_drawn(classes) -> None:
    torch.manual_seed(0)
    probabilities = torch.rand(classes)
    probabilities[torch.rand(classes) < 0.7] = 0.0
    probabilities[-3:] = 0.0
    probabilities[1] = 1.0
    counts = draw(probabilities, 20_000)
    assert counts[probabilities == 0.0].sum() == 0


@pytest.mark.parametrize("classes", [5, 50257])
def test_the_ends_of_the_unit_interval_are_valid(classes) -> None:
    probabilities = torch.zeros(4, classes)
    probabilities[:, 1] = 0.3
    probabilities[:, classes - 2] = 0.7
    uniform = torch.tensor([0.0, 1.0 - 2**-53, 0.3 - 1e-7, 0.3 + 1e-7], dtype=torch.float64)
    expected = [1, classes - 2, 1, classes - 2]
    assert sample_categorical(probabilities, uniform).tolist() == expected


def test_rare_classes_are_drawn_as_often_as_they_should() -> None:
    # A uniform number in fp32 has steps of 6e-8 and could not tell these classes apart.
    probabilities = torch.full((1, 4096), 1e-9)
    probabilities[0, 0] = 1.0 - 4095e-9
    inside = torch.linspace(1.0 - 4095e-9, 1.0, 4096, dtype=torch.float64)[:-1] + 0.5e-9
    labels = sample_categorical(probabilities.expand(4095, -1), inside)
    # fp32 block sums shift places by a few of 4095, not more.
    assert (labels - torch.arange(1, 4096)).abs().max() <= 64
    assert len(labels.unique()) > 3900


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [97, 50257])
def test_labels_sampled_from_logits_follow_their_softmax(dtype, classes) -> None:
    torch.manual_seed(1)
    logits = (2.0 * torch.randn(classes)).to(dtype)
    rows = 20_000 if classes == 97 else 4_000
    counts = torch.zeros(classes, dtype=torch.long)
    for seed in range(4):
        cotangent, count = sampled_cotangent(
            logits.expand(rows // 4, -1), generator=torch.Generator().manual_seed(seed)
        )
        assert cotangent.dtype == dtype
        # (softmax - onehot) is negative only at the label.
        labels = cotangent.argmin(-1)
        assert count == rows // 4
        counts += labels.bincount(minlength=classes)
    assert chi_squared_p(counts, logits.double().softmax(0) * rows) > 1e-3


def test_the_cotangent_is_softmax_minus_onehot() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 11).double()
    targets = torch.zeros(3, 5, dtype=torch.long)
    targets[1, 2:] = -100
    cotangent, count = sampled_cotangent(logits, targets, generator=torch.Generator())
    assert count == 12
    labels = cotangent.argmin(-1)
    counted = targets != -100
    leaf = logits.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(leaf[counted], labels[counted], reduction="sum")
    expected = torch.autograd.grad(loss, leaf)[0]
    torch.testing.assert_close(cotangent, expected)
    assert (cotangent[~counted] == 0).all()


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_labels_do_not_depend_on_chunks_or_strides(likelihood, monkeypatch) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 9, 13)
    whole, _ = sampled_cotangent(
        logits, likelihood=likelihood, generator=torch.Generator().manual_seed(1)
    )
    monkeypatch.setattr(likelihoods_module, "_CHUNK_ELEMENTS", 40)
    strided = torch.stack([logits, logits], dim=-1)[..., 0]
    for values in (logits, strided, logits.clone().requires_grad_()):
        chunked, _ = sampled_cotangent(
            values, likelihood=likelihood, generator=torch.Generator().manual_seed(1)
        )
        # Exponentials may differ in the last bit; another label would differ by 1.
        torch.testing.assert_close(whole, chunked)


def test_uniform_numbers_are_drawn_in_double_precision(monkeypatch) -> None:
    drawn = []

    def spy(probabilities, uniform):
        drawn.append(uniform.dtype)
        return sample_categorical(probabilities, uniform)

    monkeypatch.setattr(likelihoods_module, "sample_categorical", spy)
    sampled_cotangent(torch.zeros(2, 5, dtype=torch.bfloat16))
    assert drawn == [torch.float64]


def test_sampling_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    sampled_cotangent(torch.randn(2, 5, generator=torch.Generator()), generator=torch.Generator())
    assert torch.equal(before, torch.get_rng_state())


def test_no_second_tensor_of_the_logits_size_is_made() -> None:
    logits = torch.zeros(4096, 8192)
    size = logits.numel() * 4
    with torch.profiler.profile(profile_memory=True) as profile:
        sampled_cotangent(logits, torch.zeros(4096, dtype=torch.long))
    level, peak = 0, 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    # The result itself, and scratch space of a few chunks.
    assert size <= peak < 1.6 * size
