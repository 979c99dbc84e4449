"""Every recipe's configuration is one that the recipe accepts."""

from importlib import import_module
from pathlib import Path

import pytest
import yaml
from common.arguments import parse_arguments
from common.study import read_study
from test_gpt2_configs import SIZES

ROOT = Path(__file__).parents[2]

#: The comparison takes studies instead, which are checked where they are read.
RECIPES = [p.stem for p in (ROOT / "recipes").glob("*.py") if p.stem != "compare_optimizers"]

STUDIES = sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_configuration_that_parses(name) -> None:
    recipe = import_module(name)
    configs = [path for path in (ROOT / "recipes/configs").glob("*.yaml") if name in path.stem]
    assert recipe.CONFIG in configs
    for path in configs:
        options = ["--config", str(path), "--use_cpu", "true"]
        args = parse_arguments(recipe.ARGUMENTS, options, path)[-1]
        assert args.optim == "sophia"
        assert args.learning_rate == yaml.safe_load(path.read_text())["learning_rate"]


def test_no_configuration_is_without_a_recipe() -> None:
    for path in (ROOT / "recipes/configs").glob("*.yaml"):
        # GPT-2 in its real sizes has tests of its own.
        sizes = any(path.stem == f"gpt2_{size}" for size in SIZES)
        assert sizes or any(name in path.stem for name in RECIPES), path


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_can_be_read(path) -> None:
    study = read_study(path)
    assert study.reference in study.candidates
    recipe = import_module(next(iter(study.candidates.values())).base.recipe)
    for candidate in study.candidates.values():
        arguments = candidate.at(candidate.learning_rates[0], study.seeds[0]).arguments
        options = [f"--{name}={value}" for name, value in arguments.items()]
        parsed = parse_arguments(recipe.ARGUMENTS, options, recipe.CONFIG)[-1]
        assert parsed.learning_rate == candidate.learning_rates[0]
