"""The optimizers that Sophia is compared with."""

import sys

import pytest
import torch
from common.rivals import RIVALS, MuonWithAdamW, NAdamW, SecondMomentSophia, hidden_matrices
from torch import nn
from transformers import ModernBertConfig, ModernBertForSequenceClassification

STEPS = 12


def gradients(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def run(optimizer_class, grads, **options) -> torch.Tensor:
    param = nn.Parameter(torch.ones_like(grads[0]))
    optimizer = optimizer_class([param], **options)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


def test_nadamw_is_dozats_with_decoupled_decay() -> None:
    grads, lr, b1, b2, eps, decay = gradients(5), 0.03, 0.8, 0.95, 1e-6, 0.2
    theta = [1.0] * 5
    m, v = [0.0] * 5, [0.0] * 5
    for t, grad in enumerate(grads, start=1):
        for i, g in enumerate(grad.tolist()):
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            ahead = b1 * m[i] / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
            theta[i] -= lr * decay * theta[i]
            theta[i] -= lr * ahead / ((v[i] / (1 - b2**t)) ** 0.5 + eps)
    moved = run(NAdamW, grads, lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay)
    torch.testing.assert_close(moved, torch.tensor(theta, dtype=torch.float64), rtol=1e-12, atol=0)


def test_nadamw_without_momentum_is_adamw() -> None:
    options = {"lr": 0.02, "betas": (0.0, 0.9), "weight_decay": 0.1}
    grads = gradients(4, 3)
    theirs = run(torch.optim.AdamW, grads, **options)
    torch.testing.assert_close(run(NAdamW, grads, **options), theirs, rtol=1e-12, atol=0)


def test_muon_takes_the_matrices_and_adamw_the_rest_under_one_schedule() -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(7, 4))]
    alone = [nn.Parameter(param.detach().clone()) for param in params]
    groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:]}]
    together = MuonWithAdamW(groups, matrices={params[0]}, lr=0.02, momentum=0.9)
    muon = torch.optim.Muon(
        alone[:1], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(alone[1:], lr=0.02, betas=(0.9, 0.95), weight_decay=0.01)
    optimizers = [together, muon, adamw]
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in optimizers]
    for _ in range(4):
        for ours, other in zip(params, alone, strict=True):
            ours.grad = torch.randn_like(ours)
            other.grad = ours.grad.clone()
        for step in (*optimizers, *schedules):
            step.step()
    for ours, other in zip(params, alone, strict=True):
        torch.testing.assert_close(ours, other)
    with pytest.raises(ValueError, match="needs hidden matrices and other parameters"):
        MuonWithAdamW([{"params": params}], matrices=set())


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_second_moments_take_the_hessians_place(power) -> None:
    grads, lr, rho, b1, b2 = gradients(6), 0.05, 0.4, 0.9, 0.8
    theta = torch.ones(6, dtype=torch.float64)
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        scale = (v / (1 - b2**t)) ** power
        theta = theta - lr / rho * (m / scale).clamp(-rho, rho)
    moved = run(SecondMomentSophia, grads, lr=lr, rho=rho, betas=(b1, b2), power=power)
    torch.testing.assert_close(moved, theta, rtol=1e-12, atol=0)


def test_their_threshold_follows_as_often_as_sophias() -> None:
    param = nn.Parameter(torch.ones(50))
    optimizer = SecondMomentSophia([param], lr=0.01, rho="auto", k=4)
    thresholds = []
    for grad in gradients(50):
        param.grad = grad.float()
        optimizer.step()
        thresholds.append(float(optimizer.state[param]["rho"]))
    changes = [i for i in range(1, STEPS) if thresholds[i] != thresholds[i - 1]]
    assert changes == [4, 8]


def test_their_embeddings_have_a_share_of_their_own(tiny_gpt2) -> None:
    """As Sophia's have, so that what stands in for the Hessian is all that differs."""
    model = tiny_gpt2()
    optimizer_class, options = RIVALS["second_moment_sophia"](
        model, {"rho": "auto", "target_clip_fraction": 0.1, "embedding_clip_fraction": 0.5}
    )
    optimizer = optimizer_class(model.parameters(), **options)
    (group,) = optimizer.param_groups
    embeddings = [model.transformer.wte.weight, model.transformer.wpe.weight]
    for param in group["params"]:
        own = any(param is embedding for embedding in embeddings)
        assert optimizer.clip_fraction_asked(param, group) == (0.5 if own else 0.1)


def test_hidden_matrices_are_neither_embeddings_nor_heads(tiny_gpt2) -> None:
    model = tiny_gpt2()
    names = {name for name, p in model.named_parameters() if p in hidden_matrices(model)}
    layers = model.config.n_layer
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == {f"transformer.h.{i}.{kind}.weight" for i in range(layers) for kind in kinds}
    config = ModernBertConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        pad_token_id=0,
        num_labels=3,
    )
    classifier = ModernBertForSequenceClassification(config)
    chosen = hidden_matrices(classifier)
    assert classifier.classifier.weight not in chosen
    assert classifier.model.embeddings.tok_embeddings.weight not in chosen
    assert classifier.model.layers[0].mlp.Wi.weight in chosen


def test_a_missing_library_is_named_with_its_remedy(tiny_gpt2, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ValueError, match=r"pip install 'hf_sophia\[compare\]'"):
        RIVALS["lion"](tiny_gpt2(), {})
