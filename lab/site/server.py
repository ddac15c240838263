"""The site host's server: apt repositories, package index and model hub over one HTTP port.

    python3 server.py --root /srv/site --port 80 --log /var/log/site/requests.jsonl

The standard library only: it runs with the site host's own python3. What it serves is under
`--root`, made by `lab.site.build`:

    /apt /files /keys /simple   files as they are
    /hub                        the Hugging Face Hub's API, as far as huggingface_hub downloads by
                                it: point HF_ENDPOINT here; without Xet, as a mirror is
    /v2                         an image registry, as far as `docker pull` reads one
    /_control                   faults to be injected, see `Fault`: GET lists, POST adds one,
                                DELETE removes all

Each request, but for those to /_control, is one line of JSON in the log: when it began (`time`),
`client`, `method`, `path` with its query, `status`, `bytes_sent` (of the body), `range`, the
`fault` that was injected, `seconds` that it took and the client's `agent`.
"""

import argparse
import base64
import contextlib
import email.utils
import fnmatch
import hashlib
import json
import mimetypes
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qs, quote, unquote, urlsplit

STATIC = ("apt", "files", "git", "keys", "nightly", "simple")
REGISTRY_API = "registry/2.0"
CHUNK_BYTES = 64 * 1024
IDLE_CONNECTION_S = 75.0
CONTROL_BODY_LIMIT_BYTES = 64 * 1024

FAULT_MODES = ("corrupt", "drop", "login", "rate", "stall", "status", "token", "truncate")
# These change what is sent of a body, so they leave requests without one alone.
BODY_FAULTS = ("corrupt", "rate", "stall", "truncate")


class BadRequestError(Exception):
    """What was sent to /_control is no fault; the message says why."""


@dataclass
class Fault:
    """What is to go wrong, with which requests, how often. The first that fits a request applies.

    mode: corrupt   one byte of the file, at offset `at`, comes wrong
          drop      the connection is closed without an answer
          login     401, unless the request carries user and password, `token`, as `Authorization: Basic`
          rate      the body comes at `bytes_per_s`
          stall     after `after_bytes` of the body nothing comes for `seconds`, then the rest
          status    the answer is the HTTP status `status`
          token     401, unless the request carries `Authorization: Bearer <token>`
          truncate  the connection is closed after `after_bytes` of the body
    path_prefix: the request's path begins so, before percent-decoding and without its query
    path_glob: and matches this, with * for anything; None for any path
    client: and comes from this address; None for any
    times: how many requests it applies to; None for all from now on
    at: offset in the file, in bytes; None for its middle
    after_bytes: bytes of the body that come before `stall` or `truncate`
    """

    mode: str
    path_prefix: str = "/"
    path_glob: str | None = None
    client: str | None = None
    times: int | None = None
    at: int | None = None
    after_bytes: int = 0
    seconds: float | int = 3600
    status: int = HTTPStatus.SERVICE_UNAVAILABLE
    bytes_per_s: int = 1024 * 1024
    token: str = ""

    @classmethod
    def parse(cls, content: object) -> "Fault":
        """Check what was sent to /_control; raises BadRequestError saying what is wrong with it."""
        if not isinstance(content, dict):
            raise BadRequestError("a fault is a JSON object")
        known = {item.name: item.type for item in fields(cls)}
        for key, value in content.items():
            if key not in known:
                raise BadRequestError(f"{key}: unknown key; use one of {', '.join(known)}")
            expected = cast(type, known[key])
            if not isinstance(value, expected) or isinstance(value, bool):
                raise BadRequestError(f"{key}: {value!r} is not {expected}")
        if content.get("mode") not in FAULT_MODES:
            raise BadRequestError(f"mode: use one of {', '.join(FAULT_MODES)}")
        fault = cls(**content)
        if fault.bytes_per_s <= 0 or fault.after_bytes < 0 or fault.seconds < 0:
            raise BadRequestError("bytes_per_s must be above 0, after_bytes and seconds not below")
        return fault

    @property
    def _basic(self) -> str:
        return base64.b64encode(self.token.encode()).decode()

    def fits(self, method: str, path: str, client: str, authorization: str | None) -> bool:
        """Whether it applies to such a request."""
        return (
            self.times != 0
            and path.startswith(self.path_prefix)
            and (self.path_glob is None or fnmatch.fnmatchcase(path, self.path_glob))
            and self.client in {None, client}
            and not (self.mode in BODY_FAULTS and method != "GET")
            and not (self.mode == "token" and authorization == f"Bearer {self.token}")
            and not (self.mode == "login" and authorization == f"Basic {self._basic}")
        )


class Faults:
    """The faults to be injected, shared by the threads that answer requests."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> None:
        """Inject it from now on, after those that are there already."""
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        """Inject none any more."""
        with self._lock:
            self._faults.clear()

    def listed(self) -> list[dict[str, Any]]:
        """All that may still apply, as they were given; `times` is what is left."""
        with self._lock:
            return [asdict(fault) for fault in self._faults if fault.times != 0]

    def take(self, method: str, path: str, client: str, authorization: str | None) -> Fault | None:
        """The first fault that fits a request, counted as applied."""
        with self._lock:
            for fault in self._faults:
                if fault.fits(method, path, client, authorization):
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None


@dataclass
class Answer:
    """What goes back: a status, headers, and bytes or a file."""

    status: int = HTTPStatus.OK
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | Path = b""

    def size(self) -> int:
        """Bytes of the whole body."""
        return len(self.body) if isinstance(self.body, bytes) else self.body.stat().st_size


def json_answer(content: object, status: int = HTTPStatus.OK, **headers: str) -> Answer:
    """An answer of JSON; underscores in the names of headers stand for hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named["Content-Type"] = "application/json; charset=utf-8"
    return Answer(status, named, json.dumps(content, ensure_ascii=False).encode())


def plain_error(status: HTTPStatus, text: str) -> Answer:
    """An error in a line of text."""
    return Answer(status, {"Content-Type": "text/plain; charset=utf-8"}, f"{text}\n".encode())


class HubError(Exception):
    """What the Hub refuses. huggingface_hub tells refusals apart by the code, not by the status.

    status: HTTP status
    code: the Hub's name for it, None if it has none
    text: what it says to a person
    commit: the commit that was looked into, None if it did not come so far
    """

    def __init__(
        self, status: HTTPStatus, code: str | None, text: str, commit: str | None = None
    ) -> None:
        super().__init__(text)
        headers = {"X_Error_Code": code, "X_Error_Message": text, "X_Repo_Commit": commit}
        present = {name: value for name, value in headers.items() if value is not None}
        self.answer = json_answer({"error": text}, status, **present)


class Hub:
    """The Hub's API over `root`/index.json and `root`/objects, both made by `lab.site.hub`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._loaded: tuple[int, dict[str, Any]] | None = None

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: bytes) -> Answer:
        """Answer a request for `path`, which begins after /hub and is percent-encoded."""
        try:
            return self._route(method, path, query, body)
        except HubError as error:
            return error.answer

    def _route(self, method: str, path: str, query: dict[str, list[str]], body: bytes) -> Answer:
        read = method in {"GET", "HEAD"}
        match [unquote(part) for part in path.split("/") if part]:
            case ["api", "models", owner, name] if read:
                return self._info(f"{owner}/{name}", "main", query)
            case ["api", "models", owner, name, "revision", revision] if read:
                return self._info(f"{owner}/{name}", revision, query)
            case ["api", "models", owner, name, "refs"] if read:
                return self._refs(f"{owner}/{name}")
            case ["api", "models", owner, name, "tree", revision, *folder] if read:
                return self._tree(f"{owner}/{name}", revision, "/".join(folder), query)
            case ["api", "models", owner, name, "paths-info", revision] if method == "POST":
                return self._paths_info(f"{owner}/{name}", revision, body)
            case [owner, name, "resolve", revision, *file] if file and read:
                return self._file(f"{owner}/{name}", revision, "/".join(file))
            case _:
                raise HubError(HTTPStatus.NOT_FOUND, None, "Sorry, we can't find this page.")

    def _info(self, repo: str, revision: str, query: dict[str, list[str]]) -> Answer:
        commit, content = self._commit(repo, revision)
        return json_answer(model_info(repo, commit, content, with_blobs=_flag(query, "blobs")))

    def _refs(self, repo: str) -> Answer:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in self._repository(repo)["refs"].items()
        ]
        return json_answer({"branches": branches, "converts": [], "tags": []})

    def _tree(self, repo: str, revision: str, folder: str, query: dict[str, list[str]]) -> Answer:
        commit, content = self._commit(repo, revision)
        listed = list(tree(content["files"], folder, recursive=_flag(query, "recursive")))
        if folder and not listed:
            raise HubError(
                HTTPStatus.NOT_FOUND, "EntryNotFound", f"{folder} does not exist", commit
            )
        return json_answer(listed, X_Repo_Commit=commit)

    def _paths_info(self, repo: str, revision: str, body: bytes) -> Answer:
        _, content = self._commit(repo, revision)
        wanted = wanted_paths(body)
        files = [tree_entry(entry) for entry in content["files"] if entry["path"] in wanted]
        return json_answer(files)

    def _file(self, repo: str, revision: str, path: str) -> Answer:
        commit, content = self._commit(repo, revision)
        entry = next((entry for entry in content["files"] if entry["path"] == path), None)
        if entry is None:
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found", commit)
        etag = f'"{entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]}"'
        name = quote(path.rsplit("/", 1)[-1])
        headers = {
            "Content-Disposition": f"inline; filename*=UTF-8''{name}; filename=\"{name}\";",
            "Content-Type": "application/octet-stream" if "lfs" in entry else content_type(path),
            "ETag": etag,
            "X-Repo-Commit": commit,
        }
        if "lfs" in entry:
            headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(entry["size"])}
        return Answer(HTTPStatus.OK, headers, self._root / "objects" / entry["object"])

    def _commit(self, repo: str, revision: str) -> tuple[str, dict[str, Any]]:
        """The commit that a branch or a commit's full id names, and what is in it."""
        known = self._repository(repo)
        commit = known["refs"].get(revision.removeprefix("refs/heads/"), revision)
        if commit not in known["commits"]:
            text = f"Invalid rev id: {revision}"
            raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound", text)
        return commit, known["commits"][commit]

    def _repository(self, repo: str) -> dict[str, Any]:
        known = self._repositories().get(repo)
        if known is None:
            # The Hub does not tell the unknown from the private.
            raise HubError(HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Repository not found")
        return cast(dict[str, Any], known)

    def _repositories(self) -> dict[str, Any]:
        index = self._root / "index.json"
        try:
            changed = index.stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        with self._lock:
            if self._loaded is None or self._loaded[0] != changed:
                self._loaded = (changed, json.loads(index.read_text(encoding="utf-8")))
            return cast(dict[str, Any], self._loaded[1]["repositories"])


def model_info(
    repo: str, commit: str, content: dict[str, Any], *, with_blobs: bool
) -> dict[str, Any]:
    """What /api/models/… says of a repository at a commit."""
    siblings = []
    for entry in content["files"]:
        sibling = {"rfilename": entry["path"]}
        if with_blobs:
            sibling |= {"size": entry["size"], "blobId": entry["oid"]}
            if "lfs" in entry:
                lfs = entry["lfs"]
                sibling["lfs"] = {
                    "sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"],
                }  # fmt: skip
        siblings.append(sibling)
    return {
        "_id": hashlib.sha256(repo.encode()).hexdigest()[:24],
        "id": repo,
        "modelId": repo,
        "author": repo.partition("/")[0],
        "sha": commit,
        "createdAt": content["date"],
        "lastModified": content["date"],
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["transformers", "safetensors", "text-generation"],
        "siblings": siblings,
    }


def tree(
    entries: Iterable[dict[str, Any]], under: str, *, recursive: bool
) -> Iterator[dict[str, Any]]:
    """What /api/models/…/tree/… lists: files and folders below `under`, in order of their paths."""
    prefix = f"{under}/" if under else ""
    folders: set[str] = set()
    for entry in entries:
        if not entry["path"].startswith(prefix):
            continue
        names = entry["path"].removeprefix(prefix).split("/")
        for depth in range(1, len(names)):
            folder = prefix + "/".join(names[:depth])
            if folder not in folders and (recursive or depth == 1):
                folders.add(folder)
                oid = hashlib.sha1(folder.encode(), usedforsecurity=False).hexdigest()
                yield {"type": "directory", "oid": oid, "size": 0, "path": folder}
        if recursive or len(names) == 1:
            yield tree_entry(entry)


def tree_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """A file as the Hub lists it."""
    listed = {key: entry[key] for key in ("oid", "size", "path")}
    return {"type": "file"} | listed | ({"lfs": entry["lfs"]} if "lfs" in entry else {})


def _flag(query: dict[str, list[str]], name: str) -> bool:
    return query.get(name, ["false"])[0].lower() in {"1", "true"}


def wanted_paths(body: bytes) -> set[str]:
    """The paths that a request for paths-info names, in JSON or as a form."""
    try:
        content = json.loads(body)
    except ValueError:
        return set(parse_qs(body.decode("utf-8", "replace")).get("paths", []))
    paths = content.get("paths", []) if isinstance(content, dict) else []
    return {paths} if isinstance(paths, str) else {str(path) for path in paths}


def static_file(root: Path, path: str) -> Answer:
    """The file that a percent-encoded path names below `root`, as it is."""
    # A flat apt repository names its files "./name", and apt asks for them so.
    names = [name for name in map(unquote, path.split("/")[1:]) if name != "."]
    inside = names[-1:] == [""]
    names = names[:-1] if inside else names
    # Nothing hidden, nothing empty and no way up, however it was encoded.
    unsafe = any(not name or name.startswith(".") or "/" in name or "\0" in name for name in names)
    if unsafe or not names or names[0] not in STATIC:
        return plain_error(HTTPStatus.NOT_FOUND, "not found")
    file = root.joinpath(*names)
    if file.is_dir():
        if not inside:
            return Answer(HTTPStatus.MOVED_PERMANENTLY, {"Location": f"{path}/"})
        file = file / "index.html"
    elif inside:
        return plain_error(HTTPStatus.NOT_FOUND, "not found")
    if not file.is_file():
        return plain_error(HTTPStatus.NOT_FOUND, "not found")
    stat = file.stat()
    headers = {
        "Content-Type": content_type(file.name),
        "ETag": f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"',
        "Last-Modified": email.utils.formatdate(stat.st_mtime, usegmt=True),
    }
    return Answer(HTTPStatus.OK, headers, file)


def content_type(name: str) -> str:
    """The media type of a file of that name."""
    guessed, encoding = mimetypes.guess_type(name)
    if guessed is None or encoding is not None:
        return "application/octet-stream"
    return f"{guessed}; charset=utf-8" if guessed.startswith("text/") else guessed


def registry_answer(root: Path, path: str) -> Answer:
    """What a registry says to a percent-encoded path below /v2, from files that lie below `root`."""
    names = [unquote(part) for part in path.split("/")[2:] if part]
    if not names:
        return json_answer({}, Docker_Distribution_Api_Version=REGISTRY_API)
    kind = names[-2] if len(names) > 2 else ""  # noqa: PLR2004 - a name, a kind and a digest
    file = root.joinpath(*names)
    unsafe = any(name.startswith(".") or "/" in name or "\0" in name for name in names)
    if unsafe or kind not in {"blobs", "manifests"} or not file.is_file():
        code = "MANIFEST_UNKNOWN" if kind == "manifests" else "BLOB_UNKNOWN"
        error = {"code": code, "message": f"{kind or 'it'} unknown"}
        return json_answer({"errors": [error]}, HTTPStatus.NOT_FOUND)
    media = "application/octet-stream"
    if kind == "manifests":
        media = json.loads(file.read_text(encoding="utf-8"))["mediaType"]
    headers = {"Content-Type": media, "Docker-Content-Digest": names[-1], "ETag": f'"{names[-1]}"'}
    return Answer(HTTPStatus.OK, headers, file)


def asked_range(header: str, size: int) -> tuple[int, int] | None:
    """First and last byte that a Range header asks for, of a file of `size` bytes.

    None if it is none that is understood: then the whole file is the right answer. An empty range
    (last below first) if the file has nothing of what is asked for.
    """
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header.strip())
    if found is None or found[0].endswith("=-"):
        return None
    first, last = found[1], found[2]
    if not first:
        return (max(0, size - int(last)), size - 1) if int(last) else (size, size - 1)
    if last and int(last) < int(first):
        return None
    return int(first), min(int(last), size - 1) if last else size - 1


class SiteServer(ThreadingHTTPServer):
    """The server. In a test: `SiteServer(("127.0.0.1", 0), root)` and `serve_forever` in a thread.

    address: what to listen at; port 0 for any free one, then in `server_address`
    root: the directory to serve
    log: file that a line is added to for each request; None for no log
    """

    daemon_threads = True
    # Twenty hosts at once, each with several connections.
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], root: Path, log: Path | None = None) -> None:
        self.root = root.resolve()
        self.hub = Hub(self.root / "hub")
        self.faults = Faults()
        self.stopping = threading.Event()
        self._log_lock = threading.Lock()
        # Unbuffered and appending: whoever empties the file finds the next line at its start.
        self._log = log.open("ab", buffering=0) if log is not None else None
        super().__init__(address, Handler)

    def log_request(self, record: dict[str, Any]) -> None:
        """Add a line to the log."""
        if self._log is not None:
            line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
            with self._log_lock:
                self._log.write(line)

    def server_close(self) -> None:
        """Stop listening, and end what stalls."""
        self.stopping.set()
        super().server_close()
        if self._log is not None:
            self._log.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is nothing to write about; all else is."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_CONNECTION_S
    # Small answers to one client after the other: do not wait for more to send.
    disable_nagle_algorithm = True
    server: SiteServer

    def do_GET(self) -> None:
        """Answer a GET."""
        self._handle()

    do_HEAD = do_POST = do_DELETE = do_GET  # noqa: N815

    def version_string(self) -> str:
        """What the Server header says."""
        return "lab-site"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Write nothing to standard error: requests have a log of their own."""

    def _handle(self) -> None:
        began = time.monotonic()
        stamp = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        target = urlsplit(self.path)
        body = self._body()
        self._status, self._sent_bytes = 0, 0
        if target.path == "/_control":
            self._send(self._control(body), None)
            return
        fault = self.server.faults.take(
            self.command, target.path, self.client_address[0], self.headers["Authorization"]
        )
        try:
            self._send(self._answer(target.path, target.query, body, fault), fault)
        finally:
            self.server.log_request(
                {
                    "time": stamp,
                    "client": self.client_address[0],
                    "method": self.command,
                    "path": self.path,
                    "status": self._status,
                    "bytes_sent": self._sent_bytes,
                    "range": self.headers["Range"],
                    "fault": fault.mode if fault else None,
                    "seconds": round(time.monotonic() - began, 4),
                    "agent": self.headers["User-Agent"],
                }
            )

    def _body(self) -> bytes:
        length = self.headers["Content-Length"] or "0"
        if not length.isdigit() or int(length) > CONTROL_BODY_LIMIT_BYTES:
            self.close_connection = True
            return b""
        return self.rfile.read(int(length))

    def _control(self, body: bytes) -> Answer:
        faults = self.server.faults
        if self.command == "POST":
            try:
                faults.add(Fault.parse(json.loads(body)))
            except (BadRequestError, ValueError) as error:
                return json_answer({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        elif self.command == "DELETE":
            faults.clear()
        return json_answer({"faults": faults.listed()})

    def _answer(self, path: str, query: str, body: bytes, fault: Fault | None) -> Answer:
        if fault is not None and fault.mode in {"login", "status", "token"}:
            return self._refusal(fault)
        if path.startswith("/hub/"):
            return self.server.hub.answer(self.command, path[4:], parse_qs(query), body)
        if path == "/v2" or path.startswith("/v2/"):
            return registry_answer(self.server.root / "registry", path)
        if self.command not in {"GET", "HEAD"}:
            return plain_error(HTTPStatus.METHOD_NOT_ALLOWED, "files are read by GET and HEAD")
        return static_file(self.server.root, path)

    def _refusal(self, fault: Fault) -> Answer:
        """What a fault that is an answer by itself says."""
        if fault.mode == "status":
            return plain_error(HTTPStatus(fault.status), "injected by /_control")
        if fault.mode == "login":
            headers = {"WWW-Authenticate": 'Basic realm="mirror"'}
            return Answer(HTTPStatus.UNAUTHORIZED, headers, b"who are you?\n")
        if self.headers["Authorization"] is None:
            code, text = "RepoNotFound", "Repository not found"
        else:
            code, text = None, "Invalid credentials in Authorization header"
        return HubError(HTTPStatus.UNAUTHORIZED, code, text).answer

    def _send(self, answer: Answer, fault: Fault | None) -> None:
        """Send an answer, or what of it the request's conditions and the fault leave."""
        if fault is not None and fault.mode == "drop":
            self.close_connection = True
            return
        size = answer.size()
        first, last = 0, size - 1
        status, headers = int(answer.status), dict(answer.headers)
        if status == HTTPStatus.OK and self.command in {"GET", "HEAD"} and "ETag" in headers:
            headers["Accept-Ranges"] = "bytes"
            status, first, last = self._conditions(headers, size)
            if status == HTTPStatus.PARTIAL_CONTENT:
                headers["Content-Range"] = f"bytes {first}-{last}/{size}"
            elif status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                headers["Content-Range"] = f"bytes */{size}"
        length = max(0, last - first + 1)
        if status != HTTPStatus.NOT_MODIFIED:
            headers["Content-Length"] = str(length)
        self._status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD" and length:
            self._send_body(answer.body, first, length, fault)

    def _conditions(self, headers: dict[str, str], size: int) -> tuple[int, int, int]:
        """Status, first and last byte, as the request's conditional headers and range want it."""
        matches = self.headers["If-None-Match"]
        if matches is not None:
            unchanged = headers["ETag"] in {etag.strip() for etag in matches.split(",")}
        else:
            unchanged = not _modified_since(headers, self.headers["If-Modified-Since"])
        if unchanged:
            return HTTPStatus.NOT_MODIFIED, 0, -1
        only_if = self.headers["If-Range"]
        current = only_if in {None, headers["ETag"], headers.get("Last-Modified")}
        wanted = asked_range(self.headers["Range"], size) if self.headers["Range"] else None
        if wanted is None or not current:
            return HTTPStatus.OK, 0, size - 1
        if wanted[0] > wanted[1]:
            return HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, 0, -1
        return HTTPStatus.PARTIAL_CONTENT, *wanted

    def _send_body(self, body: bytes | Path, first: int, length: int, fault: Fault | None) -> None:
        if isinstance(body, bytes):
            self.wfile.write(body[first : first + length])
            self._sent_bytes = length
            return
        with body.open("rb") as file:
            if fault is not None and fault.mode in BODY_FAULTS:
                self._send_faulty(file, first, length, fault)
                return
            try:
                self.connection.sendfile(file, first, length)
            finally:
                # Where it stands tells how far it came, also when the client went away.
                self._sent_bytes = max(0, file.tell() - first)

    def _send_faulty(self, file: BinaryIO, first: int, length: int, fault: Fault) -> None:
        began = time.monotonic()
        wrong_at = os.fstat(file.fileno()).st_size // 2 if fault.at is None else fault.at
        file.seek(first)
        while (sent := self._sent_bytes) < length:
            size = min(CHUNK_BYTES, length - sent)
            if fault.mode in {"stall", "truncate"}:
                if sent == fault.after_bytes:
                    if fault.mode == "truncate":
                        self.close_connection = True
                        return
                    self.server.stopping.wait(fault.seconds)
                elif sent < fault.after_bytes:
                    size = min(size, fault.after_bytes - sent)
            chunk = bytearray(file.read(size))
            if fault.mode == "corrupt" and 0 <= wrong_at - first - sent < len(chunk):
                chunk[wrong_at - first - sent] ^= 0xFF
            if fault.mode == "rate":
                ahead_s = (sent + size) / fault.bytes_per_s - (time.monotonic() - began)
                self.server.stopping.wait(max(0.0, ahead_s))
            self.wfile.write(chunk)
            self._sent_bytes += size


def _modified_since(headers: dict[str, str], since: str | None) -> bool:
    """Whether what has these headers is newer than the date of an If-Modified-Since header."""
    if since is None or "Last-Modified" not in headers:
        return True
    parse: Callable[[str], datetime] = email.utils.parsedate_to_datetime
    try:
        return parse(headers["Last-Modified"]) > parse(since)
    except (TypeError, ValueError):
        return True


def main() -> int:
    """Serve until told to stop; returns the exit status."""
    parser = argparse.ArgumentParser(description="The lab's site: apt, package index, model hub.")
    parser.add_argument("--root", type=Path, required=True, help="directory to serve")
    parser.add_argument("--bind", default="0.0.0.0", help="address to listen at")
    parser.add_argument("--port", type=int, default=80, help="port to listen at")
    parser.add_argument("--log", type=Path, help="file that each request is logged to")
    arguments = parser.parse_args()
    if not arguments.root.is_dir():
        parser.error(f"--root {arguments.root}: no such directory")
    try:
        server = SiteServer((arguments.bind, arguments.port), arguments.root, arguments.log)
    except OSError as error:
        parser.error(f"{arguments.bind}:{arguments.port}: {error.strerror}")
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
