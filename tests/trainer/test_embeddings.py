"""Embeddings have a share to clip of their own."""

import copy
import pickle

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import nn
from transformers import GPT2ForSequenceClassification, Trainer

from hf_sophia import Sophia, SophiaTrainer, diagnose
from hf_sophia.trainer.embeddings import embeddings_of, give_embeddings_their_share
from hf_sophia.trainer.sophia_trainer import SophiaTrainerMixin

from .runs import arguments, dataset, run, sophia_of

EMBEDDINGS = {"transformer.wte.weight", "transformer.wpe.weight"}


def shares_of(trainer: Trainer) -> dict[str, float]:
    """The share of each parameter, by its name."""
    sophia = sophia_of(trainer)
    names = {param: name for name, param in trainer.model.named_parameters()}
    return {
        names[param]: sophia.clip_fraction_asked(param, group)
        for group in sophia.param_groups
        for param in group["params"]
    }


def trained(model: nn.Module, folder, optim_args: str, trainer_class=SophiaTrainer, **extra):
    extra = {"extra": extra} if extra else {}
    return run(
        model, folder, trainer_class=trainer_class, optim_args=optim_args, max_steps=1, **extra
    )


@pytest.mark.parametrize(
    ("optim_args", "others", "own"),
    [
        ("rho=auto", 0.01, 0.5),
        ("rho=auto,target_clip_fraction=0.3", 0.3, 0.5),
        ("rho=auto,embedding_clip_fraction=0.8", 0.01, 0.8),
        # One threshold is for all of a group.
        ("rho=auto,rho_scope=group", 0.5, 0.5),
        ("rho=auto,rho_scope=group,target_clip_fraction=0.3", 0.3, 0.3),
    ],
)
def test_embeddings_have_a_share_of_their_own(optim_args, others, own, tiny_gpt2, tmp_path) -> None:
    trainer = trained(tiny_gpt2(), tmp_path, optim_args)
    shares = shares_of(trainer)
    assert {name: share for name, share in shares.items() if name in EMBEDDINGS} == dict.fromkeys(
        EMBEDDINGS, own
    )
    assert {share for name, share in shares.items() if name not in EMBEDDINGS} == {others}
    assert len(trainer.optimizer.param_groups) == 2


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
        trained(tiny_gpt2(), tmp_path, optim_args)


def test_each_kind_clips_its_share(tiny_gpt2, tmp_path) -> None:
    """Of what moves and has curvature, at the last refresh, whose gradients are still there."""
    # The default's 1 % is less than one coordinate of most of these tensors.
    options = "rho=auto,target_clip_fraction=0.05,nesterov=false,k=1"
    kept = {}

    def keep(optimizer, args, kwargs) -> None:
        kept.update({p: p.grad.clone() for g in optimizer.param_groups for p in g["params"]})

    trainer = SophiaTrainer(
        tiny_gpt2(),
        arguments(tmp_path, optim_args=options, max_steps=100),
        train_dataset=dataset(),
    )
    trainer.create_optimizer().register_step_pre_hook(keep)
    trainer.train()
    sophia, clipped = sophia_of(trainer), {}
    for group in sophia.param_groups:
        for param in group["params"]:
            state = sophia.state[param]
            h = state["hessian"] / group["hessian_weight"]
            curved = (h > group["eps"]) & (kept[param] != 0)
            beyond = (state["exp_avg"].abs() >= state["rho"] * h) & curved
            asked = sophia.clip_fraction_asked(param, group)
            clipped.setdefault(asked, []).append((beyond.sum() / curved.sum()).item())
    assert set(clipped) == {0.05, 0.5}
    # rho is averaged with those of earlier refreshes, whose ratios were others.
    for asked, found in clipped.items():
        assert sum(found) / len(found) == pytest.approx(asked, abs=0.4 * asked)


class OwnGroups(Trainer):
    """Makes the groups itself, one of which says its share."""

    def create_optimizer(self, model=None):
        """As in many scripts: with the class and the options that the arguments ask for."""
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        wte = self.model.transformer.wte.weight
        rest = [param for param in self.model.parameters() if param is not wte]
        groups = [{"params": rest}, {"params": [wte], "target_clip_fraction": 0.3}]
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer


class Below(SophiaTrainerMixin, OwnGroups):
    """The mixin before the override."""


class Above(OwnGroups, SophiaTrainer):
    """The override before the mixin."""


@pytest.mark.parametrize("trainer_class", [Below, Above])
def test_whoever_makes_the_optimizer(trainer_class, tiny_gpt2, tmp_path) -> None:
    """A share that a group was given is kept; the others are found all the same."""
    trainer = trained(tiny_gpt2(), tmp_path, "rho=auto", trainer_class)
    first = sophia_of(trainer)
    for again in (False, True):
        if again:
            trainer.train()
            assert sophia_of(trainer) is not first
        shares = shares_of(trainer)
        assert shares.pop("transformer.wte.weight") == 0.3
        assert shares.pop("transformer.wpe.weight") == 0.5
        assert set(shares.values()) == {0.01}


def test_a_sophia_of_the_users_own_has_the_shares_of_its_groups(tiny_gpt2, tmp_path) -> None:
    """The doctor speaks of these too."""
    model = tiny_gpt2()
    wte = model.transformer.wte.weight
    groups = [
        {"params": [param for param in model.parameters() if param is not wte]},
        {"params": [wte], "target_clip_fraction": 0.4},
    ]
    sophia = Sophia(groups, lr=1e-3, rho="auto", target_clip_fraction=0.2)
    trainer = SophiaTrainer(
        model,
        arguments(tmp_path, optim="adamw_torch", optim_args=None, max_steps=4),
        train_dataset=dataset(),
        optimizers=(sophia, None),
    )
    found = {c.kind: {part.target for part in c.tensors} for c in diagnose(trainer, 4).curvatures}
    assert found.pop("transformer.wte.weight") == {0.4}
    assert all(targets == {0.2} for targets in found.values())
    trainer.train()
    shares = shares_of(trainer)
    assert shares.pop("transformer.wte.weight") == 0.4
    assert set(shares.values()) == {0.2}


def test_which_parameters_are_embeddings(tiny_gpt2) -> None:
    model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 3), nn.Embedding(4, 2))
    assert embeddings_of(model) == {model[0].weight, model[2].weight}
    del model[2].weight
    assert embeddings_of(model) == {model[0].weight}
    # An output layer has a row for each token, a head for classes does not.
    untied = tiny_gpt2(tie_word_embeddings=False)
    names = {name for name, param in untied.named_parameters() if param in embeddings_of(untied)}
    assert names == {*EMBEDDINGS, "lm_head.weight"}
    classifier = GPT2ForSequenceClassification(untied.config)
    assert embeddings_of(classifier) == {
        classifier.transformer.wte.weight,
        classifier.transformer.wpe.weight,
    }
    # Every text has all rows of a prompt.
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = get_peft_model(tiny_gpt2(), config)
    names = {name for name, param in tuned.named_parameters() if param in embeddings_of(tuned)}
    assert names == {f"base_model.{name}" for name in EMBEDDINGS}


def test_a_frozen_embedding_is_left_out(tiny_gpt2, tmp_path) -> None:
    model = tiny_gpt2()
    model.get_input_embeddings().requires_grad_(False)
    shares = shares_of(trained(model, tmp_path, "rho=auto"))
    assert {name for name, share in shares.items() if share == 0.5} == {"transformer.wpe.weight"}


def test_copies_keep_the_shares_of_their_own_parameters() -> None:
    model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 3))
    optimizer = Sophia(model.parameters(), rho="auto", target_clip_fraction=0.1)
    give_embeddings_their_share(optimizer, model, 0.7)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (group,) = copied.param_groups
        shares = [copied.clip_fraction_asked(param, group) for param in group["params"]]
        assert shares == [0.7, 0.1, 0.1]
        assert group["params"][0] is not model[0].weight


def test_a_share_is_for_parameters_that_the_optimizer_holds() -> None:
    model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 3))
    optimizer = Sophia(model[1].parameters(), rho="auto", target_clip_fraction=0.1)
    with pytest.raises(ValueError, match=r"of shape \(5, 2\) that this optimizer does not hold"):
        optimizer.set_clip_fraction([model[0].weight], 0.5)
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\), without 0 and 1"):
        optimizer.set_clip_fraction([model[1].weight], 1.0)
    give_embeddings_their_share(optimizer, model, 0.5)
    (group,) = optimizer.param_groups
    assert {optimizer.clip_fraction_asked(p, group) for p in group["params"]} == {0.1}


@pytest.mark.parametrize("scopes", [("group", "tensor"), ("tensor", "group")])
def test_another_scope_takes_over_on_resume(scopes, tiny_gpt2, tmp_path) -> None:
    before, after = (f"rho=auto,k=2,rho_scope={scope}" for scope in scopes)
    run(tiny_gpt2(), tmp_path, optim_args=before, save_strategy="steps", save_steps=2, max_steps=2)
    trainer = SophiaTrainer(
        tiny_gpt2(), arguments(tmp_path, optim_args=after, max_steps=4), train_dataset=dataset()
    )
    trainer.train(resume_from_checkpoint=True)
    shares = shares_of(trainer)
    assert shares["transformer.wte.weight"] == 0.5
    assert shares["transformer.ln_f.weight"] == (0.01 if scopes[1] == "tensor" else 0.5)
    sophia = sophia_of(trainer)
    for group in sophia.param_groups:
        rhos = {sophia.state[param]["rho"].item() for param in group["params"]}
        assert len(rhos) > 2 if scopes[1] == "tensor" else len(rhos) == 1
    assert all(torch.isfinite(state["rho"]) for state in sophia.state.values())


def test_the_card_names_both_shares(tiny_gpt2, tmp_path) -> None:
    trainer = trained(tiny_gpt2(), tmp_path, "rho=auto")
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| target_clip_fraction | 0.01 |" in card
    assert "| embedding_clip_fraction | 0.5 |" in card
