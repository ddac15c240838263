"""The hub: the real huggingface_hub downloads from it what git and the Hub would have."""

import hashlib
import json
import os
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from lab import LabError
from lab.site import hub
from lab.site.server import SiteServer

REPO = "MiniMaxAI/MiniMax-M2.5"
PINNED = "f710177d938eff80b684d42c5aa84b382612f21f"
LATER = "1ab0000000000000000000000000000000002502"
LAST_SHARD = "model-00007-of-00008.safetensors"


@pytest.fixture(scope="module")
def site_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site with the hub, and two small files in place of the tiny model."""
    directory = tmp_path_factory.mktemp("site")
    for variant in ("1", "2"):
        (directory / "tiny" / variant).mkdir(parents=True)
        (directory / "tiny" / variant / "config.json").write_text("{}")
        (directory / "tiny" / variant / "model.safetensors").write_text(variant)
    hub.ensure(directory / "root", lambda _: None, tiny_model=directory / "tiny")
    return directory / "root"


@pytest.fixture
def server(site_root: Path, tmp_path: Path) -> Iterator[SiteServer]:
    server = SiteServer(("127.0.0.1", 0), site_root, tmp_path / "requests.jsonl")
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def endpoint(server: SiteServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/hub"


def download(endpoint: str, target: Path, revision: str = PINNED, **options: Any) -> Path:
    return Path(
        snapshot_download(REPO, revision=revision, endpoint=endpoint, local_dir=target, **options)
    )


def fault(endpoint: str, **content: Any) -> None:
    url = endpoint.replace("/hub", "/_control")
    requests.post(url, json=content, timeout=10).raise_for_status()


def downloads(tmp_path: Path, count: int) -> list[dict[str, Any]]:
    """What the log says of files, once it has `count`: a line comes after its answer."""
    deadline = time.monotonic() + 10
    while True:
        lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").open()]
        found = [x for x in lines if x["method"] == "GET" and "/resolve/" in x["path"]]
        if len(found) >= count:
            return found
        assert time.monotonic() < deadline, lines
        time.sleep(0.005)


def test_a_snapshot_is_downloaded_whole(endpoint: str, tmp_path: Path) -> None:
    target = download(endpoint, tmp_path / "model")

    info = HfApi(endpoint=endpoint).model_info(REPO, revision=PINNED, files_metadata=True)
    assert info.sha == PINNED
    assert info.siblings is not None
    for sibling in info.siblings:
        content = (target / sibling.rfilename).read_bytes()
        assert sibling.size == len(content)
        if sibling.lfs is not None:
            assert sibling.lfs["sha256"] == hashlib.sha256(content).hexdigest()
        else:
            assert sibling.blob_id == hub.git_object("blob", content)
    in_lfs = {s.rfilename for s in info.siblings if s.lfs is not None}
    assert in_lfs == {
        "tokenizer.json",
        *(f"model-{n:05d}-of-00008.safetensors" for n in range(8)),
    }
    assert (target / "docs" / "vllm_deploy_guide.md").exists()


def test_what_is_there_is_not_asked_for_again(endpoint: str, tmp_path: Path) -> None:
    target = download(endpoint, tmp_path / "model")
    files = [path for path in target.rglob("*") if path.is_file() and ".cache" not in path.parts]
    downloads(tmp_path, len(files))
    (tmp_path / "requests.jsonl").write_bytes(b"")

    download(endpoint, tmp_path / "model")

    assert downloads(tmp_path, 0) == []


def test_an_interrupted_file_is_resumed(endpoint: str, tmp_path: Path) -> None:
    shard = "model-00000-of-00008.safetensors"
    fault(endpoint, mode="truncate", path_glob=f"*/{shard}", after_bytes=15_000_000, times=1)

    path = hf_hub_download(
        "MiniMaxAI/MiniMax-M2", shard, endpoint=endpoint, local_dir=tmp_path / "model"
    )

    asked = [(line["range"], line["status"]) for line in downloads(tmp_path, 2)]
    # What came after the last whole piece of 10 MiB was not kept.
    assert asked == [(None, 200), (f"bytes={10 * 2**20}-", 206)]
    [info] = HfApi(endpoint=endpoint).get_paths_info("MiniMaxAI/MiniMax-M2", [shard])
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert info.lfs.sha256 == digest  # type: ignore[union-attr]


def test_the_cache_of_huggingface_hub_fills_too(endpoint: str, tmp_path: Path) -> None:
    path = hf_hub_download(
        REPO, "config.json", revision=PINNED, endpoint=endpoint, cache_dir=tmp_path / "cache"
    )

    assert f"snapshots/{PINNED}/config.json" in path
    assert json.loads(Path(path).read_text())["num_hidden_layers"] == 62


def test_main_moves_while_what_is_pinned_stays(endpoint: str) -> None:
    api = HfApi(endpoint=endpoint)

    assert api.model_info(REPO).sha == LATER
    assert api.list_repo_refs(REPO).branches[0].target_commit == LATER
    pinned, later = (
        {
            entry.path: entry.blob_id
            for entry in api.list_repo_tree(REPO, revision=revision, recursive=True)
            if isinstance(entry, RepoFile)
        }
        for revision in (PINNED, LATER)
    )
    assert {path for path in pinned if pinned[path] != later[path]} == {
        "README.md",
        "chat_template.jinja",
        LAST_SHARD,
    }


def test_a_tree_lists_one_level_or_all(endpoint: str) -> None:
    api = HfApi(endpoint=endpoint)

    top = {entry.path for entry in api.list_repo_tree(REPO, revision=PINNED)}
    below = {entry.path for entry in api.list_repo_tree(REPO, "docs", revision=PINNED)}

    assert "docs" in top
    assert "docs/vllm_deploy_guide.md" not in top
    assert below == {"docs/vllm_deploy_guide.md"}


def test_single_paths_can_be_asked_about(endpoint: str) -> None:
    [info] = HfApi(endpoint=endpoint).get_paths_info(REPO, [LAST_SHARD], revision=PINNED)

    assert info.path == LAST_SHARD


def test_a_head_tells_digest_size_and_commit(endpoint: str) -> None:
    answer = requests.head(f"{endpoint}/{REPO}/resolve/{PINNED}/{LAST_SHARD}", timeout=10)

    assert answer.headers["X-Repo-Commit"] == PINNED
    assert answer.headers["X-Linked-ETag"] == answer.headers["ETag"]
    assert len(answer.headers["ETag"].strip('"')) == 64
    assert answer.headers["X-Linked-Size"] == answer.headers["Content-Length"]
    assert not [name for name in answer.headers if name.lower().startswith("x-xet")]


def test_what_is_not_there_is_told_apart(endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("MiniMaxAI/M9", endpoint=endpoint, local_dir=tmp_path / "model")
    with pytest.raises(RevisionNotFoundError):
        download(endpoint, tmp_path / "model", revision="0" * 40)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(
            REPO, "nothing.json", revision=PINNED, endpoint=endpoint, cache_dir=tmp_path / "cache"
        )


def test_a_token_opens_what_is_closed_without(endpoint: str, tmp_path: Path) -> None:
    fault(endpoint, mode="token", path_prefix="/hub/", token="hf_right")

    with pytest.raises(RepositoryNotFoundError):
        download(endpoint, tmp_path / "model", token=False)
    with pytest.raises(HfHubHTTPError, match="401"):
        download(endpoint, tmp_path / "model", token="hf_wrong")
    target = download(
        endpoint,
        tmp_path / "model",
        token="hf_right",
        allow_patterns=["config.json"],
    )
    assert (target / "config.json").exists()


def test_commits_have_the_ids_that_git_gives_them(
    site_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = json.loads((site_root / "hub" / "index.json").read_text())
    commits = index["repositories"][REPO]["commits"]
    first = next(iter(commits))
    for entry in commits[first]["files"]:
        path = tmp_path / "clone" / entry["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((site_root / "hub" / "objects" / entry["object"]).read_bytes())
        if "lfs" in entry:
            path.write_text(
                "version https://git-lfs.github.com/spec/v1\n"
                f"oid sha256:{entry['lfs']['oid']}\nsize {entry['lfs']['size']}\n"
            )
            assert path.stat().st_size == entry["lfs"]["pointerSize"]
    name, email = hub.COMMITTER.rstrip(">").split(" <")
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", name)
        monkeypatch.setenv(f"GIT_{role}_EMAIL", email)
        monkeypatch.setenv(f"GIT_{role}_DATE", f"{int(hub.COMMITTED.timestamp())} +0000")
    # No setting of this machine's, above all none of LFS, is to have a say.
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    for command in (
        ["init", "-q"],
        ["add", "--all"],
        ["commit", "-q", "-m", "Shaped like the real one"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path / "clone", check=True)

    head = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=tmp_path / "clone", check=True, capture_output=True, text=True,
    )  # fmt: skip

    assert head.stdout.strip() == first


def test_the_same_is_made_everywhere(site_root: Path, tmp_path: Path) -> None:
    hub.ensure(tmp_path, lambda _: None)

    again = json.loads((tmp_path / "hub" / "index.json").read_text())["repositories"]
    before = json.loads((site_root / "hub" / "index.json").read_text())["repositories"]
    assert again == {repo: before[repo] for repo in hub.FAMILIES}


def test_a_second_call_makes_nothing(site_root: Path) -> None:
    said: list[str] = []

    hub.ensure(site_root, said.append, tiny_model=site_root.parent / "tiny")

    assert said == []


def test_shards_and_index_agree(endpoint: str, tmp_path: Path) -> None:
    target = download(endpoint, tmp_path / "model")
    index = json.loads((target / "model.safetensors.index.json").read_text())

    for file in set(index["weight_map"].values()):
        content = (target / file).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        names = header.keys() - {"__metadata__"}
        assert names == {name for name, held in index["weight_map"].items() if held == file}
        end = max(header[name]["data_offsets"][1] for name in names)
        assert len(content) == 8 + length + end


def test_the_tiny_model_has_both_its_revisions(endpoint: str) -> None:
    for variant in ("1", "2"):
        revision = f"1ab000000000000000000000000000000000000{variant}"
        url = f"{endpoint}/{hub.TINY_MODEL}/resolve/{revision}/model.safetensors"
        assert requests.get(url, timeout=10).text == variant


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ((PINNED, "main"), r"MiniMax-M2.5\[0\].revision: 'main' is no commit id of 40 hex digits"),
        (("variant: 2", "variant: 3"), r"MiniMax-M2.5\[1\].variant: 3 is not from 1 to 2"),
        (("lab/MiniMax-M2-tiny", "lab/other"), "no revision of lab/MiniMax-M2-tiny"),
    ],
)
def test_a_wrong_list_of_revisions_is_refused(change: tuple[str, str], complaint: str) -> None:
    text = hub.REVISIONS.read_text().replace(*change)

    with pytest.raises(LabError, match=complaint):
        hub.read_revisions(text)
