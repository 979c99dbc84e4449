"""`optim_args` and betas: what is asked for is what the optimizer gets, or an error."""

import logging

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_sophia.trainer.options import OPTION_TABLES, constructor_options, parse_optim_args

from .runs import run, sophia_of


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("sophia", None, {}),
        ("sophia", "", {}),
        ("sophia", "rho=0.05,k=10", {"rho": 0.05, "k": 10}),
        ("sophia", " rho = 5e-2 , beta1=.9 ", {"rho": 0.05, "beta1": 0.9}),
        (
            "sophia",
            "hessian_computation_type=hutchinson",
            {"hessian_computation_type": "hutchinson"},
        ),
        ("adam", "optimized_update=False,eps=1e-8", {"optimized_update": False, "eps": 1e-8}),
        (
            "radam",
            "amsgrad=true,degenerated_to_sgd=0",
            {"amsgrad": True, "degenerated_to_sgd": False},
        ),
    ],
)
def test_options_are_typed(name, text, expected) -> None:
    assert parse_optim_args(name, text) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sophia", "rho", "'rho' is not of the form option=value"),
        ("sophia", "rho=", "'rho=' is not of the form"),
        ("sophia", "rho=1=2", "'rho=1=2' is not of the form"),
        ("sophia", "rho=1,", "'' is not of the form"),
        ("sophia", "=1", "'=1' is not of the form"),
        ("sophia", "gamma=1", "unknown option 'gamma'"),
        ("sophia", "rho=0.1,rho=0.2", "'rho' is given twice"),
        ("sophia", "rho=big", "rho must be a number or 'auto', got 'big'"),
        ("sophia", "k=2.5", "k must be an integer, got '2.5'"),
        ("sophia", "amsgrad=true", "unknown option 'amsgrad'"),
        ("sophia", "lr=1", "unknown option 'lr'; use --learning_rate"),
        ("adam", "weight_decay=0.1", "unknown option 'weight_decay'; use --weight_decay"),
        ("adam", "rho=1", "unknown option 'rho'"),
        ("radam", "amsgrad=maybe", "amsgrad must be true or false, got 'maybe'"),
    ],
)
def test_bad_options_are_errors_that_list_the_known_ones(name, text, message) -> None:
    with pytest.raises(ValueError) as caught:
        parse_optim_args(name, text)
    assert message in str(caught.value)
    for option in OPTION_TABLES[name].parsers:
        assert option in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("k=5", {"k": 5}),
        ("rho=auto,nesterov=false", {"nesterov": False}),
        ("target_clip_fraction=0.3", {"target_clip_fraction": 0.3}),
    ],
)
def test_without_a_number_for_rho_it_follows_the_data(text, expected, tmp_path) -> None:
    args = TrainingArguments(tmp_path, optim="sophia", optim_args=text, learning_rate=1e-3)
    options = constructor_options("sophia", args, (0.9, 0.95))
    auto = {"rho": "auto", "target_clip_fraction": 0.01, "embedding_clip_fraction": 0.5}
    auto |= {"nesterov": True, "bias_correction": True}
    assert options == {"lr": 1e-3, "betas": (0.9, 0.95), **auto, **expected}


@pytest.mark.parametrize(("text", "share"), [("", 0.5), (",target_clip_fraction=0.2", 0.2)])
def test_one_threshold_for_a_group_has_a_share_of_its_own(text, share, tmp_path) -> None:
    args = TrainingArguments(tmp_path, optim="sophia", optim_args=f"rho_scope=group{text}")
    options = constructor_options("sophia", args, (0.9, 0.95))
    assert options["target_clip_fraction"] == share
    assert "embedding_clip_fraction" not in options


def test_with_a_number_for_rho_the_rest_is_the_papers(tmp_path) -> None:
    args = TrainingArguments(tmp_path, optim="sophia", optim_args="rho=0.05", learning_rate=1e-3)
    options = constructor_options("sophia", args, (0.9, 0.95))
    assert options == {"lr": 1e-3, "betas": (0.9, 0.95), "rho": 0.05}
    assert "nesterov" not in constructor_options(
        "adam", TrainingArguments(tmp_path, optim="adam"), (0.9, 0.999)
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0.9, 0.95)),
        ({"adam_beta2": 0.98}, (0.9, 0.98)),
        ({"adam_beta1": 0.8, "optim_args": "beta1=0.7"}, (0.7, 0.95)),
        ({"optim_args": "beta2=0.99"}, (0.9, 0.99)),
        # Naming the default is not changing it.
        ({"adam_beta1": 0.9, "adam_beta2": 0.999}, (0.9, 0.95)),
    ],
)
def test_betas_of_adamw_do_not_leak_into_sophia(options, expected, tmp_path, caplog) -> None:
    args = TrainingArguments(tmp_path, optim="sophia", **options)
    with caplog.at_level(logging.INFO, "hf_sophia"):
        assert constructor_options("sophia", args, (0.9, 0.95))["betas"] == expected
    assert len(caplog.records) == 1
    assert f"betas={expected}" in caplog.text


def test_adam_epsilon_is_adams_but_not_sophias(tmp_path, caplog) -> None:
    default = TrainingArguments(tmp_path)
    assert "eps" not in constructor_options("adam", default, (0.9, 0.999))
    changed = TrainingArguments(tmp_path, adam_epsilon=1e-6)
    assert constructor_options("radam", changed, (0.9, 0.999))["eps"] == 1e-6
    assert "eps" not in constructor_options("sophia", changed, (0.9, 0.95))
    assert "--adam_epsilon 1e-06 is not used by sophia" in caplog.text
    both = TrainingArguments(tmp_path, adam_epsilon=1e-6, optim_args="eps=1e-4")
    assert constructor_options("adam", both, (0.9, 0.999))["eps"] == 1e-4


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("adam", "eps", "Options of hf_sophia's optimizers: sophia: .*; adam: .*; radam: "),
        ("sophia", "rho=0.1,", "Options of hf_sophia"),
        ("radam", "rho=0.1", "unknown option 'rho'"),
        ("sophia", "rho=-1", "rho must be a finite number > 0, got -1.0"),
        ("sophia", "hessian_computation_type=exact", "'gnb', 'hutchinson', got 'exact'"),
    ],
)
def test_the_stock_trainer_passes_the_errors_on(name, text, message, tiny_gpt2, tmp_path) -> None:
    args = TrainingArguments(tmp_path, optim=name, optim_args=text, use_cpu=True)
    with pytest.raises(ValueError, match=message):
        Trainer(tiny_gpt2(), args).create_optimizer()


@pytest.mark.parametrize("name", OPTION_TABLES)
def test_the_trainer_builds_the_optimizer_that_was_asked_for(name, tiny_gpt2, tmp_path) -> None:
    args = TrainingArguments(
        tmp_path,
        optim=name,
        learning_rate=3e-4,
        weight_decay=0.1,
        optim_args="beta1=0.8,eps=1e-9",
        use_cpu=True,
    )
    optimizer = Trainer(tiny_gpt2(), args).create_optimizer()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert type(optimizer).__mro__[-1] is object
    decayed, rest = optimizer.param_groups
    for group in (decayed, rest):
        assert group["lr"] == 3e-4
        assert group["eps"] == 1e-9
        assert group["betas"] == (0.8, {"sophia": 0.95}.get(name, 0.999))
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() < 2 for p in rest["params"])


def test_rho_may_be_auto(tiny_gpt2, tmp_path) -> None:
    """Every option of it reaches the optimizer, and its logs the share that was asked for."""
    given = "rho=auto,target_clip_fraction=0.3,rho_scope=group,nesterov=true,bias_correction=1,k=2"
    trainer = run(tiny_gpt2(), tmp_path, optim_args=given, max_steps=20, learning_rate=1e-3)
    for group in sophia_of(trainer).param_groups:
        assert (group["rho"], group["target_clip_fraction"]) == ("auto", 0.3)
        assert (group["rho_scope"], group["nesterov"], group["bias_correction"]) == (
            "group",
            True,
            True,
        )
    logs = trainer.state.log_history[-2]
    assert logs["sophia/rho"] > 0
    # m changes direction between refreshes, and the logs judge m without Nesterov's part.
    assert 0.1 < logs["sophia/clip_fraction"] < 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rho=often", "rho must be a number or 'auto', got 'often'"),
        ("rho=auto,target_clip_fraction=1", r"target_clip_fraction must lie in \(0, 1\)"),
        ("rho=auto,rho_scope=layer", "rho_scope must be one of 'tensor', 'group', got 'layer'"),
        ("nesterov=maybe", "nesterov must be true or false"),
        (
            "rho=0.05,target_clip_fraction=0.3,rho_scope=group",
            "target_clip_fraction, rho_scope would have no effect with rho=0.05",
        ),
        ("embedding_clip_fraction=0.3,rho=1", "embedding_clip_fraction would have no effect with"),
    ],
)
def test_what_rho_auto_can_not_be(text, message, tiny_gpt2, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny_gpt2(), tmp_path, optim_args=text)
