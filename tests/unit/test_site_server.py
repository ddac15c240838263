"""The site's server over HTTP on loopback: files, conditions and ranges, faults, log."""

import http.client
import json
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from lab.site.server import SiteServer

WHEEL = bytes(range(256)) * 1024


class Site:
    """A running server and what it wrote to its log."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.log = directory / "requests.jsonl"
        (self.root / "files").mkdir(parents=True)
        (self.root / "files" / "a.whl").write_bytes(WHEEL)
        (self.root / "simple" / "a").mkdir(parents=True)
        (self.root / "simple" / "a" / "index.html").write_text("<a>a</a>")
        (self.root / "secret").write_text("not to be served")
        self.server = SiteServer(("127.0.0.1", 0), self.root, self.log)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def get(self, path: str, **headers: str) -> requests.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return requests.get(self.url + path, headers=named, timeout=10, allow_redirects=False)

    def raw(self, path: str) -> int:
        """The status for a path that is sent as it is, which requests would tidy up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", path)
        return connection.getresponse().status

    def fault(self, **fault: Any) -> requests.Response:
        return requests.post(f"{self.url}/_control", json=fault, timeout=10)

    def logged(self, count: int) -> list[dict[str, Any]]:
        """The first `count` lines of the log: one comes after its answer, so maybe not at once."""
        deadline = time.monotonic() + 10
        while len(lines := self.log.read_text().splitlines()) < count:
            assert time.monotonic() < deadline, lines
            time.sleep(0.005)
        return [json.loads(line) for line in lines]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    thread = threading.Thread(target=site.server.serve_forever, args=[0.01])
    thread.start()
    yield site
    site.server.shutdown()
    thread.join()
    site.server.server_close()


def test_a_file_comes_whole_with_its_length_date_and_etag(site: Site) -> None:
    answer = site.get("/files/a.whl")

    assert answer.status_code == 200
    assert answer.content == WHEEL
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["Last-Modified"].endswith("GMT")
    assert answer.headers["ETag"].startswith('"')


def test_head_tells_the_same_without_the_body(site: Site) -> None:
    whole = site.get("/files/a.whl")

    head = requests.head(f"{site.url}/files/a.whl", timeout=10)

    assert head.content == b""
    assert head.headers["Content-Length"] == str(len(WHEEL))
    assert head.headers["ETag"] == whole.headers["ETag"]


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-9", 0, 9),
        ("bytes=1000-", 1000, len(WHEEL) - 1),
        ("bytes=-10", len(WHEEL) - 10, len(WHEEL) - 1),
        ("bytes=5-99999999", 5, len(WHEEL) - 1),
    ],
)
def test_a_range_comes_as_asked(site: Site, asked: str, first: int, last: int) -> None:
    answer = site.get("/files/a.whl", Range=asked)

    assert answer.status_code == 206
    assert answer.content == WHEEL[first : last + 1]
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/{len(WHEEL)}"


def test_a_range_beyond_the_end_is_refused_with_the_size(site: Site) -> None:
    answer = site.get("/files/a.whl", Range=f"bytes={len(WHEEL)}-")

    assert answer.status_code == 416
    assert answer.headers["Content-Range"] == f"bytes */{len(WHEEL)}"


@pytest.mark.parametrize("asked", ["bytes=0-1,5-6", "lines=1-2", "bytes=9-2", "bytes=-"])
def test_a_range_that_is_none_gives_the_whole_file(site: Site, asked: str) -> None:
    assert site.get("/files/a.whl", Range=asked).content == WHEEL


def test_what_the_client_has_is_not_sent_again(site: Site) -> None:
    whole = site.get("/files/a.whl")

    assert site.get("/files/a.whl", If_None_Match=whole.headers["ETag"]).status_code == 304
    by_date = site.get("/files/a.whl", If_Modified_Since=whole.headers["Last-Modified"])
    assert by_date.status_code == 304
    assert site.get("/files/a.whl", If_None_Match='"other"').status_code == 200


def test_a_part_of_a_file_that_changed_since_is_not_sent(site: Site) -> None:
    answer = site.get("/files/a.whl", Range="bytes=5-", If_Range='"of before"')

    assert answer.status_code == 200
    assert answer.content == WHEEL


def test_a_directory_is_its_index_page(site: Site) -> None:
    assert site.get("/simple/a/").text == "<a>a</a>"
    assert site.get("/simple/a/").headers["Content-Type"].startswith("text/html")
    moved = site.get("/simple/a")
    assert (moved.status_code, moved.headers["Location"]) == (301, "/simple/a/")


@pytest.mark.parametrize(
    "path",
    [
        "/secret",
        "/",
        "/files/",
        "/files/../secret",
        "/files/%2e%2e/secret",
        "/files/..%2fsecret",
        "/files//a.whl",
        "/files/a.whl/",
        "/files/.hidden",
        "/files/nothing",
        "/hub/index.json",
    ],
)
def test_nothing_else_is_served(site: Site, path: str) -> None:
    (site.root / "files" / ".hidden").write_text("not to be served")

    assert site.raw(path) == 404


def test_one_connection_serves_many_requests(site: Site) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=10)
    for _ in range(3):
        connection.request("GET", "/simple/a/")
        socket = connection.sock
        assert connection.getresponse().read() == b"<a>a</a>"
        assert connection.sock is socket


def test_each_request_is_a_line_in_the_log(site: Site) -> None:
    site.get("/files/a.whl?x=1", Range="bytes=10-19", User_Agent="a test")
    site.get("/files/nothing")

    first, second = site.logged(2)

    assert first["method"] == "GET"
    assert first["path"] == "/files/a.whl?x=1"
    assert (first["status"], first["bytes_sent"], first["range"]) == (206, 10, "bytes=10-19")
    assert (first["client"], first["agent"], first["fault"]) == ("127.0.0.1", "a test", None)
    assert (second["path"], second["status"]) == ("/files/nothing", 404)


def test_an_emptied_log_begins_anew(site: Site) -> None:
    site.get("/files/a.whl")
    site.logged(1)
    site.log.write_bytes(b"")
    site.get("/simple/a/")

    assert [line["path"] for line in site.logged(1)] == ["/simple/a/"]


def test_a_client_that_goes_away_is_logged_with_what_it_got(site: Site) -> None:
    (site.root / "files" / "large").write_bytes(bytes(64 * 1024 * 1024))
    with requests.get(f"{site.url}/files/large", stream=True, timeout=10) as answer:
        answer.raw.read(1000)

    [line] = site.logged(1)

    assert line["status"] == 200
    assert 1000 <= line["bytes_sent"] < 64 * 1024 * 1024


def test_a_corrupt_byte_comes_as_often_as_told(site: Site) -> None:
    site.fault(mode="corrupt", path_prefix="/files/", at=1000, times=1)

    corrupt, right = site.get("/files/a.whl"), site.get("/files/a.whl")

    differing = [i for i, byte in enumerate(corrupt.content) if byte != WHEEL[i]]
    assert differing == [1000]
    assert right.content == WHEEL
    assert [line["fault"] for line in site.logged(2)] == ["corrupt", None]


def test_a_corrupt_byte_is_at_the_same_offset_in_a_range(site: Site) -> None:
    site.fault(mode="corrupt", at=1000)

    assert site.get("/files/a.whl", Range="bytes=2000-").content == WHEEL[2000:]
    assert site.get("/files/a.whl", Range="bytes=999-").content[1] == WHEEL[1000] ^ 0xFF


def test_a_status_is_given_instead_of_the_file(site: Site) -> None:
    site.fault(mode="status", status=502, path_glob="*/a.whl", times=2)

    assert [site.get("/files/a.whl").status_code for _ in range(3)] == [502, 502, 200]
    assert site.get("/simple/a/").status_code == 200


def test_a_truncated_body_ends_the_connection(site: Site) -> None:
    site.fault(mode="truncate", after_bytes=1000, times=1)

    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        site.get("/files/a.whl")

    assert site.logged(1)[0]["bytes_sent"] == 1000


def test_a_dropped_connection_has_no_answer(site: Site) -> None:
    site.fault(mode="drop", times=1)

    with pytest.raises(requests.exceptions.ConnectionError):
        site.get("/files/a.whl")


def test_a_stall_pauses_and_goes_on(site: Site) -> None:
    site.fault(mode="stall", after_bytes=10, seconds=0.3, times=1)
    began = time.monotonic()

    assert site.get("/files/a.whl").content == WHEEL
    assert time.monotonic() - began >= 0.3


def test_a_rate_limits_the_bytes_per_second(site: Site) -> None:
    site.fault(mode="rate", bytes_per_s=len(WHEEL) * 4)
    began = time.monotonic()

    assert site.get("/files/a.whl").content == WHEEL
    assert 0.2 <= time.monotonic() - began < 2


def test_a_token_is_asked_for(site: Site) -> None:
    site.fault(mode="token", path_prefix="/files/", token="right")

    assert site.get("/files/a.whl").status_code == 401
    assert site.get("/files/a.whl", Authorization="Bearer wrong").status_code == 401
    assert site.get("/files/a.whl", Authorization="Bearer right").status_code == 200


def test_a_user_and_a_password_are_asked_for(site: Site) -> None:
    site.fault(mode="login", path_prefix="/files/", token="fetch:right")

    refused = site.get("/files/a.whl")
    assert (refused.status_code, refused.headers["WWW-Authenticate"][:5]) == (401, "Basic")
    wrong, right = (b64encode(f"fetch:{word}".encode()).decode() for word in ("wrong", "right"))
    assert site.get("/files/a.whl", Authorization=f"Basic {wrong}").status_code == 401
    assert site.get("/files/a.whl", Authorization=f"Basic {right}").status_code == 200


def test_a_fault_for_one_client_spares_the_others(site: Site) -> None:
    site.fault(mode="status", client="10.86.1.1")

    assert site.get("/files/a.whl").status_code == 200


def test_faults_are_listed_and_removed(site: Site) -> None:
    site.fault(mode="status", status=500, times=5)
    site.get("/files/a.whl")

    [listed] = requests.get(f"{site.url}/_control", timeout=10).json()["faults"]
    assert (listed["mode"], listed["times"]) == ("status", 4)

    assert requests.delete(f"{site.url}/_control", timeout=10).json() == {"faults": []}
    assert site.get("/files/a.whl").status_code == 200
    assert all(line["path"] != "/_control" for line in site.logged(2))


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ({"mode": "explode"}, "mode: use one of"),
        ({}, "mode: use one of"),
        ({"mode": "stall", "second": 1}, "second: unknown key"),
        ({"mode": "status", "status": "500"}, "status: '500' is not"),
        ({"mode": "status", "times": True}, "times: True is not"),
        ({"mode": "rate", "bytes_per_s": 0}, "bytes_per_s must be above 0"),
    ],
)
def test_what_is_no_fault_is_refused(site: Site, fault: dict[str, Any], complaint: str) -> None:
    answer = site.fault(**fault)

    assert answer.status_code == 400
    assert complaint in answer.json()["error"]


DIGEST = f"sha256:{'a' * 64}"


def registry(site: Site) -> None:
    folder = site.root / "registry" / "vllm" / "vllm-openai"
    for kind, content in (("manifests", '{"mediaType": "application/x"}'), ("blobs", "layer")):
        (folder / kind).mkdir(parents=True)
        (folder / kind / DIGEST).write_text(content)
    (site.root / "registry" / "images.json").write_text("{}")


def test_a_registry_gives_manifests_and_blobs_by_their_digest(site: Site) -> None:
    registry(site)

    version = site.get("/v2/")
    manifest = site.get(f"/v2/vllm/vllm-openai/manifests/{DIGEST}")
    blob = site.get(f"/v2/vllm/vllm-openai/blobs/{DIGEST}", Range="bytes=2-")

    assert version.status_code == 200
    assert version.headers["Docker-Distribution-Api-Version"] == "registry/2.0"
    assert manifest.headers["Content-Type"] == "application/x"
    assert manifest.headers["Docker-Content-Digest"] == DIGEST
    assert (blob.status_code, blob.text) == (206, "yer")


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v2/vllm/vllm-openai/manifests/latest", "MANIFEST_UNKNOWN"),
        (f"/v2/other/blobs/{DIGEST}", "BLOB_UNKNOWN"),
        ("/v2/vllm/vllm-openai/blobs/%2e%2e%2f%2e%2e%2f%2e%2e%2f%2e%2e%2fsecret", "BLOB_UNKNOWN"),
        ("/v2/%2e%2e/blobs/secret", "BLOB_UNKNOWN"),
        ("/v2/images.json", "BLOB_UNKNOWN"),
    ],
)
def test_what_a_registry_does_not_have(site: Site, path: str, code: str) -> None:
    registry(site)
    (site.root / "blobs").mkdir()
    (site.root / "blobs" / "secret").write_text("not to be served")

    answer = site.get(path)

    assert answer.status_code == 404
    assert answer.json()["errors"][0]["code"] == code
