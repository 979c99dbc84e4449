"""The loopback Hub is to the real client what the Hub is to it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets.config
import huggingface_hub.errors as errors
import pytest
from datasets import Dataset, load_dataset
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    hf_hub_download,
    snapshot_download,
)
from transformers.utils.hub import hf_api

from .client import connected
from .server import LoopbackHub

NAME = "user/model"
LARGE = "model.safetensors"


@pytest.fixture(params=["hub", "xet_hub"])
def any_hub(request: pytest.FixtureRequest) -> LoopbackHub:
    return request.getfixturevalue(request.param)


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    HfApi().create_repo(NAME)
    return HfApi()


def contents(folder: Path | str) -> dict[str, bytes]:
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def without_attributes(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if path != ".gitattributes"}


def asked(hub: LoopbackHub, path: str) -> list[tuple[str, int | None]]:
    return [(r.method, r.status) for r in hub.requests if path in r.path]


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def commit(api: HfApi, *operations, message: str = "a change", **options):
    return api.create_commit(NAME, operations, commit_message=message, **options)


def test_a_folder_comes_back_as_it_was(any_hub, folder_to_push) -> None:
    api = HfApi()
    assert api.whoami()["name"] == "user"
    assert api.create_repo(NAME).repo_id == NAME
    pushed = api.upload_folder(repo_id=NAME, folder_path=folder_to_push, commit_message="all")
    assert any_hub.commits(NAME)[1:] == [(pushed.oid, "all")]
    assert without_attributes(any_hub.files(NAME)) == contents(folder_to_push)
    assert without_attributes(contents(snapshot_download(NAME))) == contents(folder_to_push)
    # In git there is only a pointer to it.
    entry = any_hub.repository(NAME).entries("main")[LARGE]
    assert any_hub.repository(NAME).read(entry.oid) == entry.pointer.text()
    transfers = [r for r in any_hub.requests if r.path.startswith(("/upload/", "/download/"))]
    assert len(transfers) == (0 if any_hub.xet else 2)
    assert not any(r.authorized for r in transfers)
    # Nothing has changed: nothing is sent.
    api.upload_folder(repo_id=NAME, folder_path=folder_to_push)
    assert len(any_hub.commits(NAME)) == 2


def test_what_xet_has_is_there_for_a_client_without_it(xet_hub, folder_to_push, monkeypatch):
    HfApi().create_repo(NAME)
    HfApi().upload_folder(repo_id=NAME, folder_path=folder_to_push)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    path = Path(hf_hub_download(NAME, LARGE))
    assert path.read_bytes() == (folder_to_push / LARGE).read_bytes()
    assert [r.status for r in xet_hub.requests if r.path.startswith("/download/")] == [200]


def test_a_large_file_goes_in_parts(hub, api, folder_to_push) -> None:
    hub.parts_from = 30_000
    api.upload_folder(repo_id=NAME, folder_path=folder_to_push)
    assert [status for _, status in asked(hub, "/part/")] == [200] * 4
    assert without_attributes(hub.files(NAME)) == contents(folder_to_push)


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, api) -> None:
    first = commit(api, add("a", b"one")).oid
    api.create_tag(NAME, tag="v1")
    api.create_branch(NAME, branch="side")
    commit(api, add("a", b"two"), revision="side")
    commit(api, add("a", b"three"))
    read = {r: contents(snapshot_download(NAME, revision=r))["a"] for r in ("v1", "side", "main")}
    assert read == {"v1": b"one", "side": b"two", "main": b"three"}
    assert contents(snapshot_download(NAME, revision=first))["a"] == b"one"
    assert [b.name for b in api.list_repo_refs(NAME).branches] == ["main", "side"]
    assert api.list_repo_commits(NAME, revision="v1")[0].commit_id == first
    with pytest.raises(errors.RevisionNotFoundError):
        snapshot_download(NAME, revision="v2")
    with pytest.raises(errors.RevisionNotFoundError):
        commit(api, add("a", b"four"), revision="v2")


def test_long_listings_come_in_pages(hub, api) -> None:
    commit(api, *[add(f"folder/{n}", b"%d" % n) for n in range(5)])
    hub.page_size = 2
    found = {f.path for f in api.list_repo_tree(NAME, recursive=True)}
    assert found == {".gitattributes", "folder", *(f"folder/{n}" for n in range(5))}
    assert len(asked(hub, "/tree/")) == 4
    (only,) = api.get_paths_info(NAME, ["folder/3", "folder/9"], expand=True)
    assert (only.path, only.size, only.last_commit.title) == ("folder/3", 1, "a change")


def test_files_and_folders_are_deleted(hub, api) -> None:
    commit(api, add("a", b"1"), add("b/c", b"2"), add("b/d", b"3"), add("e", b"4"))
    commit(api, CommitOperationDelete("a"), CommitOperationDelete("b/"))
    assert without_attributes(hub.files(NAME)) == {"e": b"4"}
    with pytest.raises(errors.RemoteEntryNotFoundError):
        commit(api, CommitOperationDelete("a"))
    with pytest.raises(errors.RemoteEntryNotFoundError):
        hf_hub_download(NAME, "a")
    api.delete_repo(NAME)
    with pytest.raises(errors.RepositoryNotFoundError):
        api.model_info(NAME)


def test_who_may_do_what(hub, api) -> None:
    api.create_repo("user/secret", private=True)
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="user/secret")
    for act in (
        lambda: snapshot_download("user/secret", token=False),
        lambda: hf_hub_download("user/secret", "a", token=False),
        lambda: commit(HfApi(token=False), add("a", b"2")),
        lambda: api.model_info("user/none"),
    ):
        with pytest.raises(errors.RepositoryNotFoundError):
            act()
    assert Path(hf_hub_download("user/secret", "a")).read_bytes() == b"1"
    assert api.model_info(NAME, token=False).sha == hub.commits(NAME)[-1][0]
    with pytest.raises(errors.HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_other").whoami()
    with pytest.raises(errors.HfHubHTTPError, match="Invalid credentials"):
        commit(HfApi(token="hf_other"), add("a", b"2"))
    with pytest.raises(errors.HfHubHTTPError, match="don't have the rights"):
        api.create_repo("others/model")
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        api.create_repo(NAME)
    assert api.create_repo(NAME, exist_ok=True).repo_id == NAME
    hub.repository(NAME).gated = True
    with pytest.raises(errors.GatedRepoError):
        hf_hub_download(NAME, ".gitattributes", token=False)
    assert len(hub.commits(NAME)) == 1
    assert not any("hf_" in repr(request) for request in hub.requests)


def test_content_that_is_not_what_was_announced_is_refused(hub, api, tmp_path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"before" * 100)
    operation = CommitOperationAdd("weights.bin", path)
    assert operation.upload_info.sha256
    path.write_bytes(b"behind" * 100)
    with pytest.raises(RuntimeError, match="weights.bin") as raised:
        commit(api, operation)
    assert "BadDigest" in str(raised.value.__cause__)
    # A client that claims to have uploaded what it has not is refused by the commit.
    operation = add("weights.bin", b"other" * 100)
    operation._upload_mode, operation._is_uploaded = "lfs", True
    with pytest.raises(errors.BadRequestError, match="weights.bin was not uploaded"):
        commit(api, operation)
    assert len(hub.commits(NAME)) == 1


def test_commits_at_the_same_time_both_land(hub, api) -> None:
    with ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(commit, api, add(f"{n}.bin", b"%d" % n), message=str(n)) for n in range(8)
        ]
        oids = {job.result().oid for job in jobs}
    assert {sha for sha, _ in hub.commits(NAME)[1:]} == oids
    assert without_attributes(hub.files(NAME)) == {f"{n}.bin": b"%d" % n for n in range(8)}


def test_a_commit_onto_an_old_parent_is_refused(hub, api) -> None:
    (parent, _) = hub.commits(NAME)[0]
    commit(api, add("a", b"1"), parent_commit=parent)
    with pytest.raises(errors.HfHubHTTPError, match="A commit has happened since") as raised:
        commit(api, add("a", b"2"), parent_commit=parent)
    assert raised.value.response.status_code == 412
    assert without_attributes(hub.files(NAME)) == {"a": b"1"}


def test_a_card_is_looked_at(hub, api) -> None:
    ModelCard("---\nlicense: mit\n---\nText.\n").push_to_hub(NAME)
    assert b"license: mit" in hub.files(NAME)["README.md"]
    assert ModelCard.load(NAME).data.license == "mit"
    for broken in ("---\n- a\n---\n", "---\na: [\n---\n"):
        with pytest.raises(ValueError, match="Invalid metadata"):
            commit(api, add("README.md", broken.encode()))
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        commit(api, add("README.md", b"No metadata.\n"))


def test_a_data_set_comes_back(any_hub) -> None:
    rows = {"text": [f"row {n}" for n in range(50)], "label": list(range(50))}
    Dataset.from_dict(rows).push_to_hub("user/data", private=True)
    assert "data/train-00000-of-00001.parquet" in any_hub.files("user/data", kind="dataset")
    assert load_dataset("user/data", split="train").to_dict() == rows
    streamed = load_dataset("user/data", split="train", streaming=True)
    assert [row["label"] for row in streamed] == rows["label"]


def test_a_process_of_its_own_finds_the_hub(any_hub, tmp_path) -> None:
    script = f"""
from huggingface_hub import HfApi, hf_hub_download
HfApi().create_repo({NAME!r})
HfApi().upload_file(path_or_fileobj=b"1" * 1000, path_in_repo="a.bin", repo_id={NAME!r})
print(len(open(hf_hub_download({NAME!r}, "a.bin")).read()))
"""
    environment = {**os.environ, **any_hub.environment(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "1000"
    assert any_hub.files(NAME)["a.bin"] == b"1" * 1000
    assert Path(hf_hub_download(NAME, "a.bin")).read_bytes() == b"1" * 1000


def test_afterwards_the_client_is_as_before(client_that_can_be_led_here, tmp_path) -> None:
    def state():
        own = datasets.config.HF_ENDPOINT, datasets.config.HF_HUB_OFFLINE, HfApi().endpoint
        return *own, hf_api(), dict(vars(constants)), dict(os.environ)

    before = state()
    with LoopbackHub(tmp_path / "server") as hub, connected(hub, tmp_path / "client"):
        assert hf_api().endpoint == HfApi().endpoint == hub.endpoint
        assert HfApi().whoami()["name"] == "user"
    assert state() == before
    with pytest.raises(errors.OfflineModeIsEnabled):
        HfApi().whoami(token="any")
