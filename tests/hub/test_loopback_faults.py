"""Each fault has the effect on the plain client that its name says."""

from pathlib import Path

import huggingface_hub.errors as errors
import pytest
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

from .server import LoopbackHub

httpx2 = pytest.importorskip("httpx2")

NAME = "user/model"
LARGE = "model.safetensors"
COMMIT, UPLOAD, DOWNLOAD = "/commit/", "^/upload/", "^/download/"


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    HfApi().create_repo(NAME)
    return HfApi()


def push(folder: Path, **options):
    return HfApi().upload_folder(repo_id=NAME, folder_path=folder, **options)


def statuses(hub: LoopbackHub, path: str) -> list[int | None]:
    return [r.status for r in hub.requests if path.strip("^") in r.path]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_raised_at_once(status, hub, api, folder_to_push) -> None:
    rule = hub.fail("POST", COMMIT, status=status)
    with pytest.raises(errors.HfHubHTTPError) as raised:
        push(folder_to_push)
    assert raised.value.response.status_code == status
    assert (rule.hits, len(hub.commits(NAME))) == (1, 1)


def test_a_server_that_fails_once_is_asked_again(hub, api, folder_to_push) -> None:
    rules = [hub.fail("POST", "/preupload/", times=1), hub.fail("PUT", UPLOAD, times=1)]
    push(folder_to_push)
    assert [rule.hits for rule in rules] == [1, 1]
    assert statuses(hub, UPLOAD) == [503, 200]
    assert len(hub.commits(NAME)) == 2


def test_a_server_that_fails_for_ever_is_given_up(hub, api, folder_to_push) -> None:
    rule = hub.fail("POST", "/preupload/")
    with pytest.raises(errors.HfHubHTTPError, match="503"):
        push(folder_to_push)
    assert rule.hits == 6
    rule.release()
    push(folder_to_push)


@pytest.mark.parametrize("which", ["hub", "xet_hub"])
def test_only_with_xet_a_failed_commit_is_sent_again(which, request, folder_to_push) -> None:
    hub = request.getfixturevalue(which)
    HfApi().create_repo(NAME)
    hub.fail("POST", COMMIT, times=1)
    if hub.xet:
        push(folder_to_push)
        assert statuses(hub, COMMIT) == [503, 200]
    else:
        with pytest.raises(errors.HfHubHTTPError, match="503"):
            push(folder_to_push)
        assert statuses(hub, COMMIT) == [503]


def test_a_fault_can_come_later(hub, api) -> None:
    hub.fail("POST", COMMIT, status=403, skip=1, times=1)
    ends = []
    for n in range(3):
        try:
            api.upload_file(path_or_fileobj=b"%d" % n, path_in_repo=f"{n}", repo_id=NAME)
            ends.append("landed")
        except errors.HfHubHTTPError:
            ends.append("refused")
    assert ends == ["landed", "refused", "landed"]
    assert set(hub.files(NAME)) == {".gitattributes", "0", "2"}


def test_an_upload_that_is_cut_is_sent_again_as_a_whole(hub, api, folder_to_push) -> None:
    # More than the sockets of both ends hold, so that the client is still sending.
    (folder_to_push / LARGE).write_bytes(bytes(16 * 2**20))
    hub.reset("PUT", UPLOAD, after=100_000, times=1)
    push(folder_to_push)
    assert statuses(hub, UPLOAD) == [None, 200]
    assert hub.files(NAME)[LARGE] == bytes(16 * 2**20)


def test_a_connection_that_is_reset_for_ever_fails_the_push(hub, api, folder_to_push) -> None:
    rule = hub.reset("PUT", UPLOAD, after=1000)
    with pytest.raises(RuntimeError, match=LARGE) as raised:
        push(folder_to_push)
    # Reset, or ended without an answer: as the client's next write or next read is what meets it.
    assert isinstance(raised.value.__cause__, httpx2.TransportError)
    assert (rule.hits, len(hub.commits(NAME))) == (6, 1)


def test_a_lost_answer_leaves_the_commit(hub, api, folder_to_push) -> None:
    hub.lose("POST", COMMIT, times=1)
    with pytest.raises(httpx2.TransportError):
        push(folder_to_push)
    assert len(hub.commits(NAME)) == 2
    assert statuses(hub, COMMIT) == [None]


def test_a_stalled_push_waits_until_it_is_released(hub, api, folder_to_push) -> None:
    rule = hub.stall("POST", COMMIT)
    job = push(folder_to_push, run_as_future=True)
    rule.wait_until_reached()
    assert not job.done()
    assert len(hub.commits(NAME)) == 1
    rule.release()
    assert job.result(60).oid == hub.commits(NAME)[-1][0]


def test_a_stalled_push_ends_with_the_hub(hub, api, folder_to_push) -> None:
    rule = hub.stall("POST", COMMIT)
    job = push(folder_to_push, run_as_future=True)
    rule.wait_until_reached()
    hub.stop()
    with pytest.raises(httpx2.TransportError):
        job.result(60)


def test_a_stalled_download_times_out(hub, api, folder_to_push, monkeypatch) -> None:
    push(folder_to_push)
    rule = hub.stall("HEAD", "/resolve/")
    # The last tries of the client have a time-out of a minute of their own.
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.1)
    with pytest.raises(errors.LocalEntryNotFoundError) as raised:
        hf_hub_download(NAME, "config.json", etag_timeout=0.1)
    assert isinstance(raised.value.__cause__, httpx2.TimeoutException)
    assert rule.hits > 1


def test_a_truncated_download_goes_on_where_it_broke_off(
    hub, api, folder_to_push, monkeypatch
) -> None:
    push(folder_to_push)
    # What came of a piece that did not come whole is forgotten.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 20_000)
    hub.truncate("GET", DOWNLOAD, after=50_000, times=2)
    path = Path(hf_hub_download(NAME, LARGE))
    assert path.read_bytes() == (folder_to_push / LARGE).read_bytes()
    assert statuses(hub, DOWNLOAD) == [200, 206, 206]


def test_a_download_that_always_breaks_off_leaves_no_file(hub, api, folder_to_push) -> None:
    push(folder_to_push)
    hub.truncate("GET", DOWNLOAD)
    with pytest.raises(httpx2.RemoteProtocolError):
        hf_hub_download(NAME, LARGE)
    hub.faults.clear()
    path = snapshot_download(NAME)
    assert (Path(path) / LARGE).read_bytes() == (folder_to_push / LARGE).read_bytes()
