"""`import hf_sophia` makes the names valid wherever transformers reads an optimizer's name."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments, trainer_optimizer
from transformers.training_args import OptimizerNames

import hf_sophia
from hf_sophia.optim import OPTIMIZERS


@pytest.fixture(params=OPTIMIZERS)
def name(request) -> str:
    return request.param


def test_the_constructor_and_set_optimizer_accept_it(name, tmp_path) -> None:
    assert TrainingArguments(tmp_path, optim=name).optim == name
    assert TrainingArguments(tmp_path).set_optimizer(name).optim is OptimizerNames(name)


def test_the_command_line_dictionaries_and_json_accept_it(name, tmp_path) -> None:
    parser = HfArgumentParser(TrainingArguments)
    argv = ["--output_dir", str(tmp_path), "--optim", name, "--optim_args", "beta1=0.8"]
    options = {"output_dir": str(tmp_path), "optim": name}
    (tmp_path / "args.json").write_text(json.dumps(options))
    parsed = [
        parser.parse_args_into_dataclasses(argv),
        parser.parse_dict(options),
        parser.parse_json_file(tmp_path / "args.json"),
    ]
    for (args,) in parsed:
        assert args.optim is OptimizerNames(name)


def test_it_is_an_ordinary_member(name, tmp_path) -> None:
    member = OptimizerNames(name)
    assert isinstance(member, OptimizerNames)
    assert member is OptimizerNames[name.upper()]
    assert member is getattr(OptimizerNames, name.upper())
    assert member in OptimizerNames
    assert name in [m.value for m in OptimizerNames]
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    args = TrainingArguments(tmp_path, optim=name)
    assert pickle.loads(pickle.dumps(args)).optim is member
    assert json.loads(args.to_json_string())["optim"] == name
    torch.save(args, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).optim is member


def test_unknown_names_are_still_refused_and_the_choices_listed(tmp_path, capsys) -> None:
    with pytest.raises(ValueError, match="sofia"):
        TrainingArguments(tmp_path, optim="sofia")
    with pytest.raises(SystemExit):
        HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(["--optim", "sofia"])
    message = capsys.readouterr().err
    assert all(name in message for name in (*OPTIMIZERS, "adamw_torch"))


def library_state() -> dict:
    return {
        "members": list(OptimizerNames),
        "attributes": sorted(vars(OptimizerNames)),
        "map": dict(OptimizerNames._member_map_),
        "values": dict(OptimizerNames._value2member_map_),
        "handlers": dict(trainer_optimizer._OPTIMIZER_HANDLERS),
        "parser": trainer_optimizer._parse_optim_args,
        "trainer's parser": sys.modules[Trainer.__module__]._parse_optim_args,
    }


def test_registering_twice_is_harmless() -> None:
    before = library_state()
    hf_sophia.register()
    assert library_state() == before


def test_unregister_undoes_and_register_redoes(tmp_path) -> None:
    registered = library_state()
    try:
        hf_sophia.unregister()
        hf_sophia.unregister()
        bare = library_state()
        assert not {"sophia", "adam", "radam"} & {m.value for m in OptimizerNames}
        assert bare["parser"].__module__ == "transformers.trainer_optimizer"
        with pytest.raises(ValueError, match="sophia"):
            TrainingArguments(tmp_path, optim="sophia")
    finally:
        hf_sophia.register()
    assert library_state().keys() == registered.keys()
    assert {m.value for m in OptimizerNames} == {m.value for m in registered["members"]}
    TrainingArguments(tmp_path, optim="sophia")


# In processes of their own: the state before the first import, and orders of import.

BARE = """
from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames
def state():
    return (
        [(m.name, m.value, m._sort_order_) for m in OptimizerNames],
        sorted(vars(OptimizerNames)),
        list(OptimizerNames._value2member_map_),
        sorted(map(str, trainer_optimizer._OPTIMIZER_HANDLERS)),
        trainer_optimizer._parse_optim_args,
    )
before = state()
"""


@pytest.mark.parametrize(
    "code",
    [
        BARE + "import hf_sophia\nassert state() != before\nhf_sophia.unregister()\n"
        "assert state() == before",
        BARE + "import hf_sophia\nimport transformers.trainer as t\nhf_sophia.unregister()\n"
        "assert state() == before\nassert t._parse_optim_args is before[-1]",
        # The Trainer before or after this package, and the lazy module that replaces itself.
        "import transformers\nfrom transformers import Trainer\nimport hf_sophia\n"
        "assert issubclass(hf_sophia.SophiaTrainer, Trainer)",
        "import hf_sophia, transformers\nfrom transformers import Trainer, TrainingArguments\n"
        "assert TrainingArguments('out', optim='sophia').optim == 'sophia'\n"
        "assert issubclass(hf_sophia.SophiaTrainer, transformers.Trainer)",
        # A plain torch loop does not pay for the Trainer's import.
        "import sys, hf_sophia\nassert 'transformers.trainer' not in sys.modules",
    ],
)
def test_in_a_fresh_process(code) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
