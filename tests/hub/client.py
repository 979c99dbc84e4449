"""The real client, pointed at a loopback Hub inside of this process."""

import importlib.util
import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import datasets.config
import huggingface_hub
import pytest
import transformers.utils.hub
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http, _xet, close_session

from .server import QUIET, LoopbackHub


@contextmanager
def connected(hub: LoopbackHub, home: Path) -> Iterator[LoopbackHub]:
    """Let the client talk to this Hub, signed in, with an empty cache, and take it all back.

    The client reads its environment when it is imported, and the tests import it offline: what it
    read is replaced, in its constants and where others copied them.
    """
    with pytest.MonkeyPatch.context() as patch:
        cache = str(home / "hub")
        url = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        values = {
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": url,
            "HF_URL_HOSTS": constants.HF_URL_HOSTS | {"127.0.0.1"},
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": cache,
            "HUGGINGFACE_HUB_CACHE": cache,
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_TELEMETRY": True,
            # The client does not ask whether a Hub speaks xet: it uses it where it is installed.
            "HF_HUB_DISABLE_XET": hub.xet is None,
        }
        for name, value in values.items():
            patch.setattr(constants, name, value)
        origins = _http._HUB_ORIGINS | {_http._url_origin(hub.endpoint)}
        patch.setattr(_http, "_HUB_ORIGINS", origins)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
        patch.setattr(transformers.utils.hub, "_hf_api", None)
        values = {
            "HF_ENDPOINT": hub.endpoint,
            "HUB_DATASETS_URL": hub.endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}",
            "HF_HUB_OFFLINE": False,
            "HF_DATASETS_OFFLINE": False,
            "HF_DATASETS_CACHE": home / "datasets",
        }
        for name, value in values.items():
            patch.setattr(datasets.config, name, value)
        for name, value in {"HF_TOKEN": hub.token, **QUIET}.items():
            patch.setenv(name, value)
        retry_at_once(patch)
        _xet.XET_CONNECTION_INFO_CACHE.clear()
        # Sessions keep connections, to the port of an earlier Hub.
        close_session()
        try:
            yield hub
        finally:
            close_session()
            huggingface_hub.HfFileSystem.clear_instance_cache()


def retry_at_once(patch: pytest.MonkeyPatch) -> None:
    """Keep how often the client tries again, and take the waiting between away."""
    for function in map(inspect.unwrap, (_http.http_backoff, _http.http_stream_backoff)):
        at_once = {"base_wait_time": 0, "max_wait_time": 0}
        patch.setattr(function, "__kwdefaults__", {**function.__kwdefaults__, **at_once})
    # A download that broke off waits for a second that is written in the function's text.
    clock = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    patch.setattr(file_download, "time", clock)


def has_xet() -> bool:
    return importlib.util.find_spec("hf_xet") is not None
