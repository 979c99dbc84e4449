"""Embeddings have parameter groups, and a share to clip, of their own."""

import pytest
import torch
from torch import nn

from hf_sophia import Sophia, SophiaTrainer
from hf_sophia.trainer.embeddings import embeddings_of, split_off_embeddings

from .runs import arguments, dataset, run, sophia_of


def groups_of(model, folder, optim_args: str) -> list[dict]:
    trainer = SophiaTrainer(model, arguments(folder, optim_args=optim_args))
    return trainer.create_optimizer().param_groups


def names_in(model: nn.Module, group: dict) -> set[str]:
    names = {param: name for name, param in model.named_parameters()}
    return {names[param] for param in group["params"]}


@pytest.mark.parametrize(
    ("optim_args", "others", "own"),
    [
        ("rho=auto", 0.1, 0.5),
        ("rho=auto,target_clip_fraction=0.3", 0.3, 0.5),
        ("rho=auto,embedding_clip_fraction=0.8", 0.1, 0.8),
        # Unused, but a checkpoint fits whatever kind of rho it is resumed with.
        ("rho=0.2", 0.5, 0.5),
    ],
)
def test_embeddings_have_groups_of_their_own(optim_args, others, own, tiny_gpt2, tmp_path) -> None:
    model = tiny_gpt2()
    decayed, rest, embeddings = groups_of(model, tmp_path, optim_args)
    assert names_in(model, embeddings) == {"transformer.wte.weight", "transformer.wpe.weight"}
    held = [p for group in (decayed, rest, embeddings) for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    assert decayed["target_clip_fraction"] == rest["target_clip_fraction"] == others
    assert embeddings["target_clip_fraction"] == own
    # All else is that of the group which they were in.
    for name in decayed.keys() - {"params", "target_clip_fraction"}:
        assert embeddings[name] == decayed[name]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_with_one_threshold_for_a_group_it_stays_whole(tiny_gpt2, tmp_path) -> None:
    groups = groups_of(tiny_gpt2(), tmp_path, "rho=auto,rho_scope=group")
    assert [group["target_clip_fraction"] for group in groups] == [0.1, 0.1]


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        (
            "rho=auto,rho_scope=group,embedding_clip_fraction=0.5",
            "embedding_clip_fraction needs a rho for each tensor",
        ),
        ("embedding_clip_fraction=1", r"embedding_clip_fraction must lie in \(0, 1\)"),
        ("embedding_clip_fraction=all", "embedding_clip_fraction must be a number, got 'all'"),
    ],
)
def test_what_the_share_can_not_be(optim_args, message, tiny_gpt2, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        groups_of(tiny_gpt2(), tmp_path, optim_args)


def test_each_kind_clips_its_share(tiny_gpt2, tmp_path) -> None:
    """Of what moves and has curvature, at the last refresh, whose gradients are still there."""
    model = tiny_gpt2()
    kept = {}

    def keep(optimizer, args, kwargs) -> None:
        kept.update({p: p.grad.clone() for g in optimizer.param_groups for p in g["params"]})

    trainer = SophiaTrainer(
        model,
        arguments(tmp_path, optim_args="rho=auto,nesterov=false,k=1", max_steps=30),
        train_dataset=dataset(),
    )
    trainer.create_optimizer().register_step_pre_hook(keep)
    trainer.train()
    shares = {}
    for group in sophia_of(trainer).param_groups:
        for param in group["params"]:
            state = trainer.optimizer.state[param]
            h = state["hessian"] / group["hessian_weight"]
            curved = (h > group["eps"]) & (kept[param] != 0)
            clipped = state["exp_avg"].abs() >= state["rho"] * h
            share = (clipped & curved).sum() / curved.sum()
            shares.setdefault(group["target_clip_fraction"], []).append(share.item())
    assert set(shares) == {0.1, 0.5}
    # rho is averaged with those of earlier refreshes, whose ratios were others.
    for target, found in shares.items():
        assert sum(found) / len(found) == pytest.approx(target, abs=0.4 * target)


def test_names_stay_with_their_parameters_and_twice_is_once() -> None:
    model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 3), nn.Embedding(4, 2))
    named = list(model.named_parameters())
    optimizer = Sophia(
        [{"params": named, "lr": 0.1}, {"params": [("x", nn.Parameter(torch.ones(2)))]}]
    )
    for _ in range(2):
        split_off_embeddings(optimizer, embeddings_of(model), 0.7)
        rest, other, own = optimizer.param_groups
        assert rest["param_names"] == ["1.weight", "1.bias"]
        assert own["param_names"] == ["0.weight", "2.weight"]
        assert own["params"] == [model[0].weight, model[2].weight]
        assert (own["lr"], rest["lr"]) == (0.1, 0.1)
        shares = [group["target_clip_fraction"] for group in (rest, other, own)]
        assert shares == [0.5, 0.5, 0.7]


def test_a_frozen_embedding_is_in_no_group(tiny_gpt2, tmp_path) -> None:
    model = tiny_gpt2()
    model.get_input_embeddings().requires_grad_(False)
    *_, last = groups_of(model, tmp_path, "rho=auto")
    assert names_in(model, last) == {"transformer.wpe.weight"}


@pytest.mark.parametrize("scopes", [("group", "tensor"), ("tensor", "group")])
def test_another_scope_on_resume_is_refused_with_the_remedy(scopes, tiny_gpt2, tmp_path) -> None:
    """The state of other groups would be put to the wrong parameters."""
    before, after = (f"rho=auto,rho_scope={scope}" for scope in scopes)
    run(tiny_gpt2(), tmp_path, optim_args=before, save_strategy="steps", save_steps=2, max_steps=2)
    changed = arguments(tmp_path, optim_args=after, max_steps=4)
    trainer = SophiaTrainer(tiny_gpt2(), changed, train_dataset=dataset())
    with pytest.raises(ValueError, match=f"resume with rho_scope={scopes[0]}"):
        trainer.train(resume_from_checkpoint=True)
