"""Every recipe's configuration is one that the recipe accepts."""

from importlib import import_module
from pathlib import Path

import pytest
import yaml
from common.arguments import parse_arguments

ROOT = Path(__file__).parents[2]
RECIPES = [path.stem for path in (ROOT / "recipes").glob("*.py")]


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
        assert any(name in path.stem for name in RECIPES), path
