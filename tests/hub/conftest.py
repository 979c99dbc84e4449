"""A loopback Hub for each test that asks for one."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from packaging.version import Version

from .client import connected, has_xet
from .server import LoopbackHub


@pytest.fixture(scope="session")
def client_that_can_be_led_here() -> None:
    if Version(huggingface_hub.__version__) < Version("2"):
        pytest.skip("huggingface_hub before 2.0 has the Hub's address in its text here and there")


@pytest.fixture
def hub(
    client_that_can_be_led_here: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoopbackHub]:
    """A Hub without xet, and the client of this process connected to it."""
    folder = tmp_path_factory.mktemp("hub")
    with LoopbackHub(folder / "server") as hub, connected(hub, folder / "client"):
        yield hub


@pytest.fixture
def xet_hub(
    client_that_can_be_led_here: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoopbackHub]:
    """A Hub with xet, which the client speaks where hf_xet is installed, so by default."""
    if not has_xet():
        pytest.skip("needs hf_xet")
    folder = tmp_path_factory.mktemp("hub")
    with LoopbackHub(folder / "server", xet=True) as hub, connected(hub, folder / "client"):
        yield hub


@pytest.fixture
def folder_to_push(tmp_path: Path) -> Path:
    """A folder with a small text, a large file, and one in a folder of its own."""
    folder = tmp_path / "pushed"
    (folder / "deeper").mkdir(parents=True)
    (folder / "config.json").write_text('{"a": 1}\n')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 400)
    (folder / "deeper" / "näme with spaces.txt").write_text("ä\n")
    return folder
