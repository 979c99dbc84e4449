"""The project as a whole: imports point down, public names are documented, versions agree."""

import ast
import configparser
import importlib
import inspect
import pkgutil
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import hf_sophia

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_sophia"

#: Layers from the bottom up; a module may import its own layer's modules and lower layers.
LAYERS = ["kernels", "estimators", "optim", "trainer"]

#: What each layer may know besides the standard library. The metrics stand alone.
LIBRARIES = {
    "kernels": {"torch", "triton"},
    "estimators": {"torch"},
    "optim": {"torch"},
    "trainer": {
        "torch",
        "numpy",
        "transformers",
        "accelerate",
        "huggingface_hub",
        "matplotlib",
        "peft",
        "safetensors",
        "yaml",
    },
    "metrics": {"evaluate", "datasets"},
}


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "hf_sophia" and len(parts) > 1 else None


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_down(path) -> None:
    import sys

    own = path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else None
    if own is None:
        return  # the package's front may import everything below
    assert own in LIBRARIES, f"say which layer {own} is"
    for module in imports_of(path):
        top = module.split(".")[0]
        if top == "hf_sophia":
            other = layer_of(module)
            if own == "metrics" or other not in LAYERS:
                assert other == own, f"{path} imports {module}"
            else:
                assert LAYERS.index(other) <= LAYERS.index(own), f"{path} imports {module} upwards"
                if other == "kernels":
                    assert own in ("kernels", "optim"), f"{path} reaches past the optimizers"
        else:
            assert top in sys.stdlib_module_names | LIBRARIES[own], f"{path} imports {module}"


def modules() -> list[str]:
    return [
        info.name
        for info in pkgutil.walk_packages(hf_sophia.__path__, "hf_sophia.")
        if not info.name.startswith("hf_sophia.metrics.")
        and (find_spec("triton") or not info.name.endswith(".triton_kernel"))
    ]


@pytest.mark.parametrize("name", modules())
def test_public_names_are_documented(name) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for attribute, value in vars(module).items():
        if attribute.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{name}.{attribute}"
        if inspect.isclass(value):
            for method, function in vars(value).items():
                if not method.startswith("_") and callable(function):
                    assert function.__doc__, f"{name}.{attribute}.{method}"


def test_everything_the_package_exports_exists() -> None:
    for name in hf_sophia.__all__:
        assert getattr(hf_sophia, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Sofia'"):
        _ = hf_sophia.Sofia


def test_ci_calls_the_readmes_test_command() -> None:
    assert "make test" in (ROOT / ".ci/run").read_text().splitlines()[-1]


def test_versions_and_requirements_agree() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    version = config["metadata"]["version"]
    assert hf_sophia.__version__ == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    requirements = config["options"]["install_requires"].split()
    assert "torch>=2.6" in requirements
    assert {"test", "plots", "trackers", "dev"} <= set(config["options.extras_require"])
    assert "torch<2.14" in config["options.extras_require"]["test"]
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
