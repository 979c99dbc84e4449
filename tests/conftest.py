"""Fixtures of all tests: tiny models from configs, no network but loopback."""

import atexit
import ipaddress
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator

# Read when the libraries are imported: a cache of the tests' own, and no look at the Hub.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_sophia_tests_")
os.environ["HF_HUB_OFFLINE"] = "1"
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

# Programs that tests start, not tests.
collect_ignore = ["trainer/scripts"]

# The models are so small that threads would only wait for each other.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, this machine has none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails at once instead of waiting for a time-out."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple):
            host = str(address[0])
            loopback = host == "localhost" or (
                host.replace(".", "").isdigit() and ipaddress.ip_address(host).is_loopback
            )
            if not loopback and host != "::1":
                raise AssertionError(f"a test tried to connect to {address!r}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def log_level_of_our_own() -> Iterator[None]:
    """Undo what a recipe run inside of a test does to the log level, or later tests see more."""
    logger = logging.getLogger("hf_sophia")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def tiny_gpt2() -> Callable[..., GPT2LMHeadModel]:
    """Make a GPT-2 of a few thousand parameters, the same one for the same seed."""

    def make(seed: int = 0, **overrides: object) -> GPT2LMHeadModel:
        torch.manual_seed(seed)
        options = {
            "vocab_size": 37,
            "n_positions": 32,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        return GPT2LMHeadModel(GPT2Config(**{**options, **overrides}))

    return make
