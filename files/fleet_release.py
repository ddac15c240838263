"""Releases: a Python environment with vLLM, built beside the one that runs; the long verb `release`.

Whatever the channel, the steps are the same: an environment under a temporary name; vLLM's own wheel,
where it does not come from the index; everything else resolved to exact versions with hashes, unless a
lock has them; installed by hash; checked as the user that services run as; a manifest; the rename.

Also the long verb `arguments`: do units' argv mean to their release what the plan means?
"""

from __future__ import annotations

import html
import http.client
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import time
import urllib.parse
import zipfile

import fleet_host as core

LOGS = pathlib.Path("/var/log/minimax-fleet")
LOCK = "fleet-release.lock"
LAST_LINES = 20
PROGRESS_EVERY_S = 5
BLOCK = 1 << 20
GIB = 1 << 30
MEMORY_PER_COMPILER_GIB = 8
"""What one compiler of vLLM's attention kernels may take; cicc of FlashAttention was seen with that much
(flash-attention's own README warns of 96 GB and many cores)."""
MACHINES = {"x86_64": ("x86_64", "amd64"), "aarch64": ("aarch64", "arm64")}


def release(request):
    """A Python environment built beside the running one: under a temporary name, checked, renamed.

    It is checked as the user that services run as, who must be able to read all of it.
    """
    path = pathlib.Path(request["path"])
    if core.release_complete(path):
        return
    if request["netrc"]:
        os.environ["NETRC"] = request["netrc"]
    build = Build(request, install_uv(request["uv"], request["index"]))
    build.begin()
    wheel = ORIGINS[request["origin"]["kind"]](build)
    build.install(wheel)
    copy_libraries(build)
    build_deep_gemm(build)
    download_kernels(build)
    manifest = {**build.document(wheel), **checked(build, wheel)}
    build.finish(manifest)


class Build:
    """A release under construction: its folder under a temporary name, uv for it, and the log of it all."""

    def __init__(self, request, uv):
        self.request = request
        self.origin = request["origin"]
        self.addresses = request["addresses"]
        self.uv = uv
        self.began = time.monotonic()
        self.path = pathlib.Path(request["path"])
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        self.wheels = self.partial / ".wheels"
        self.python = str(self.partial / "bin" / "python3")
        self.log = LOGS / f"{self.path.name}.log"
        self.env = uv_environment(request)
        self.locked = request.get("lock")
        self.precompiled = None
        """The wheel that a source build took its libraries from."""

    def begin(self):
        """An empty environment on an interpreter that services can run."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")
        core.say(f"{self.path.name}: building")
        asked = self.request["python"]
        self.run("Python", self.uv, "venv", "--relocatable", "--python", asked, str(self.partial))
        check_python(self.python, self.request["user"])
        check_locked_python(self.python, self.request["lock_python"])
        self.wheels.mkdir()

    def run(self, what, *argv, env=None, cwd=None):
        """A step that may take minutes; its output goes to the log, and its last lines into an error."""
        logged(f"{self.path.name}: {what}", self.log, argv, {**self.env, **(env or {})}, cwd)

    def install(self, wheel):
        """All that the release holds, each file by its hash; vLLM's own wheel was looked at before."""
        apart = [line for line in self.request["requirements"] if " @ git+" in line]
        if self.locked is None:
            self.locked = self.resolve(wheel, apart)
        locked = self.partial / LOCK
        core.write_atomically(locked, self.locked)
        bytecode = ["--compile-bytecode"] if self.request["bytecode"] else []
        install = (self.uv, "pip", "install", *bytecode, *self.backend(), "--python", self.python)
        if hashes_of(self.locked):
            # A version that came to the index a moment ago counts, whatever uv has cached of it. All that
            # anything requires is listed, and overrides have their say: nothing is to be resolved again.
            options = ("--refresh", "--require-hashes", "--no-deps", "-r", str(locked))
            self.run("installing", *install, *options)
        # These are known by a hash or a commit already, which --require-hashes cannot express.
        rest = [*([str(wheel)] if wheel else []), *apart]
        if rest:
            self.run("installing vLLM" if wheel else "installing", *install, "--no-deps", *rest)

    def resolve(self, wheel, apart):
        """Exact versions with hashes of everything but `wheel` and what comes `apart` from git."""
        wanted, found = self.partial / "wanted.txt", self.partial / LOCK
        lines = [*self.request["requirements"]]
        hidden = [line.partition(" @ ")[0].strip() for line in apart]
        if wheel:
            lines.append(f"{wheel_project(wheel)} @ {wheel.as_uri()}")
            hidden.append(wheel_project(wheel))
        core.write_atomically(wanted, "".join(f"{line}\n" for line in lines))
        options = ("--refresh", "--generate-hashes", "--no-header", "--no-annotate", "--quiet")
        without = [word for name in hidden for word in ("--no-emit-package", name)]
        overrides = self.partial / "overrides.txt"
        lines = [f"{line}\n" for line in self.request["overrides"]]
        core.write_atomically(overrides, "".join(lines))
        compile_ = (self.uv, "pip", "compile", *options, *self.backend(), *without)
        compile_ += ("--overrides", str(overrides)) if lines else ()
        self.run("resolving", *compile_, "--python", self.python, "-o", str(found), str(wanted))
        wanted.unlink()
        overrides.unlink()
        return found.read_text()

    def backend(self):
        backend = self.request["torch_backend"]
        return ["--torch-backend", backend] if backend else []

    def document(self, wheel):
        """What was asked for and what came of it, for the manifest."""
        asked = ("requirements", "python", "torch_backend", "origin")
        return {
            "asked": {key: self.request[key] for key in asked},
            "locked": self.request.get("lock") is not None,
            "wheel": {"name": wheel.name, "sha256": core.sha256_of(wheel)} if wheel else None,
            "log": str(self.log),
        }

    def finish(self, manifest):
        """The release appears under its name, complete. What only its building needed is gone."""
        for left in self.partial.glob(".[!.]*"):
            if left.is_dir():
                shutil.rmtree(left)
        manifest.update(
            seconds=round(time.monotonic() - self.began, 1),
            bytes=core.size_of(self.partial),
            built_at=time.time(),
        )
        appear(self.path, self.partial, manifest)


def appear(path, partial, manifest):
    """What was built under a temporary name is there, complete, under its own."""
    # The manifest is what makes a release complete, so it comes last; the rename makes it appear whole.
    core.write_atomically(partial / core.MANIFEST, json.dumps(manifest, indent=1))
    os.sync()
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    core.say(
        f"{path.name}: complete after {manifest['seconds']:.0f} s, "
        f"{len(manifest['packages'])} packages, {manifest['bytes'] / GIB:.1f} GiB"
    )


def uv_environment(request):
    """How uv and git reach what a release is made of: the site's addresses, and no settings of the host."""
    addresses = request["addresses"]
    env = {
        "UV_CACHE_DIR": str(pathlib.Path(request["path"]).parent / ".cache"),
        "UV_NO_PROGRESS": "1",
        "UV_LINK_MODE": "hardlink",
        # The driver that the release will run on, which this host may get in its wave only.
        **({"UV_CUDA_DRIVER_VERSION": request["driver"]} if request.get("driver") else {}),
        "UV_NO_CONFIG": "1",
        # uv's own place for the interpreters that it fetches is in root's home, closed to services.
        "UV_PYTHON_INSTALL_DIR": request["pythons"],
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_LFS_SKIP_SMUDGE": "1",
        # Compiled code of one release is found again for the next, whose folder has another name.
        "CCACHE_DIR": str(pathlib.Path(request["path"]).parent / ".ccache"),
        "CCACHE_NOHASHDIR": "true",
    }
    if request["netrc"]:
        # Where git looks for it.
        env["HOME"] = os.path.dirname(request["netrc"])
    if request["index"]:
        env["UV_DEFAULT_INDEX"] = request["index"]
    if addresses["extra_index"]:
        env["UV_INDEX"] = " ".join(addresses["extra_index"])
    plain = [request["index"], *addresses["extra_index"]]
    hosts = [urllib.parse.urlsplit(url) for url in plain if url]
    insecure = {host.netloc for host in hosts if host.scheme == "http"}
    if insecure:
        env["UV_INSECURE_HOST"] = " ".join(sorted(insecure))
    if addresses["python"]:
        env["UV_PYTHON_INSTALL_MIRROR"] = addresses["python"]
    for number, (prefix, mirror) in enumerate(addresses["git"].items()):
        env[f"GIT_CONFIG_KEY_{number}"] = f"url.{mirror.rstrip('/')}/.insteadOf"
        env[f"GIT_CONFIG_VALUE_{number}"] = prefix
    env["GIT_CONFIG_COUNT"] = str(len(addresses["git"]))
    return env


def logged(label, log, argv, env, cwd=None):
    """A command whose output goes to a log; says every so often how long it runs and its last line."""
    began = told = time.monotonic()
    with open(log, "ab") as output:
        output.write(f"$ {' '.join(argv)}\n".encode())
        output.flush()
        start = output.tell()
        with subprocess.Popen(
            argv, env={**os.environ, **env}, cwd=cwd, stdout=output, stderr=subprocess.STDOUT
        ) as running:
            while True:
                try:
                    running.wait(core.HEARTBEAT_S)
                    break
                except subprocess.TimeoutExpired:
                    told = time.monotonic()
                    last = (last_lines(log, start, 1) or [""])[0]
                    core.say(f"{label}: {told - began:.0f} s {last[:120]}".rstrip())
    if running.returncode:
        said = "\n".join(last_lines(log, start, LAST_LINES))
        raise core.HostError(f"{label} exited {running.returncode}; all of it is in {log}:\n{said}")


TAIL = 1 << 16


def last_lines(log, start, lines):
    """The last lines that a file has after `start`."""
    with open(log, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(start, size - TAIL))
        said = stream.read().decode(errors="replace").replace("\r", "\n").splitlines()
    return [line for line in said if line.strip()][-lines:]


# ------------------------------------------------------------------------------- where vLLM comes from


def from_index(_build):
    """vLLM is one of the requirements."""
    return


def from_file(build):
    """The wheel that group data names, by its hash."""
    url = build.addresses["wheel"]
    name = urllib.parse.unquote(build.origin["name"])
    return fetched(build, url, name, build.origin["sha256"])


def from_nightly(build):
    """The wheel of vLLM's own index of builds, for the commit."""
    url, sha256 = nightly_wheel(build)
    # A lock's word comes before that of the page that has the wheel.
    sha256 = build.origin.get("sha256") or sha256
    return fetched(build, url, urllib.parse.unquote(url.rsplit("/", 1)[1]), sha256)


def from_source(build):
    """A wheel built here: the commit, the patches, and what setup.py makes of them."""
    tree = build.partial / ".source"
    checkout(build, build.addresses["vllm"], build.origin["commit"], tree)
    apply_patches(build, tree)
    version = build.origin["version"].partition("+")[0]
    env = {
        # A checkout of one commit has no tags to tell its version by.
        "SETUPTOOLS_SCM_PRETEND_VERSION": f"{version}+g{build.origin['commit'][:9]}",
        **(precompiled(build) if build.origin["precompiled"] else compilers(build)),
    }
    out = build.path.parent / ".wheels" / build.path.name
    shutil.rmtree(out, ignore_errors=True)
    command = (build.uv, "build", "--wheel", "--python", build.python, "--out-dir", str(out))
    build.run("building the wheel", *command, str(tree), env=env)
    (wheel,) = out.glob("*.whl")
    core.say(f"{build.path.name}: built {wheel}, sha256 {core.sha256_of(wheel)}")
    return wheel


ORIGINS = {
    "index": from_index,
    "nightly": from_nightly,
    "source": from_source,
    "wheel": from_file,
}


def precompiled(build):
    """setup.py takes the libraries from the commit's own wheel, and compiles nothing."""
    build.precompiled = from_nightly(build)
    return {
        "VLLM_USE_PRECOMPILED": "1",
        "VLLM_PRECOMPILED_WHEEL_LOCATION": str(build.precompiled),
        "VLLM_SKIP_PRECOMPILED_VERSION_SUFFIX": "1",
    }


def compilers(build):
    """How many compilers run at once, and where CUDA's is."""
    jobs = build.request["max_jobs"]
    if jobs is None:
        memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // GIB
        jobs = max(1, min(os.cpu_count() or 1, memory_gib // MEMORY_PER_COMPILER_GIB))
    core.say(f"{build.path.name}: {jobs} compilers at once")
    return {"MAX_JOBS": str(jobs), **cuda_environment(build.request)}


def cuda_environment(request):
    """The toolkit that group data names, before any other; nothing where it names none."""
    home = request["cuda_home"]
    if home is None:
        return {}
    if not os.access(f"{home}/bin/nvcc", os.X_OK):
        raise core.HostError(f"{home}/bin/nvcc is missing; is cuda_toolkit what the host has?")
    return {"CUDA_HOME": home, "PATH": f"{home}/bin:{os.environ['PATH']}"}


LINK = re.compile(r"<a\b[^>]*?\bhref=[\"']([^\"']+)[\"']", re.IGNORECASE)


def nightly_wheel(build):
    """Address and SHA-256 (None where the page has none) of the commit's wheel for this machine."""
    commit, variant = build.origin["commit"], build.origin["variant"]
    folder = "/".join(filter(None, (build.addresses["nightly"], commit, variant)))
    page = f"{folder}/vllm/"
    try:
        with core.open_url(page) as response:
            text = response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        why = core.reason(error)
        raise core.HostError(
            f"no build of commit {commit[:12]} at {page}: {why}; old ones are removed, and not every "
            "commit has one: take another commit, or channel 'source' with precompiled = False"
        ) from error
    machine = platform.machine()
    for link in LINK.findall(text):
        url, _, fragment = urllib.parse.urljoin(page, html.unescape(link)).partition("#")
        tag = url.removesuffix(".whl").rsplit("-", 1)[-1]
        fits = tag == "any" or tag.endswith(MACHINES.get(machine, (machine,)))
        if url.endswith(".whl") and fits:
            return url, fragment.partition("sha256=")[2] or None
    raise core.HostError(f"{page} has no wheel for {machine}")


def fetched(build, url, name, sha256):
    """A file fetched into the build, or where it lies already; refused if its hash is another."""
    if url.startswith("file://"):
        path = pathlib.Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path))
        if not path.is_file():
            raise core.HostError(f"{path} is not there; vllm.wheel.url names it")
    else:
        path = build.wheels / name
        download(url, path, build.path.name)
    found = core.sha256_of(path)
    if sha256 and found != sha256:
        raise core.HostError(
            f"{url} has SHA-256 {found}, not {sha256}: not the file that was meant"
        )
    return path


def download(url, path, label):
    """One file, with its progress. Raises HostError."""
    told = time.monotonic()
    try:
        with core.open_url(url) as response, open(path, "wb") as output:
            total = int(response.headers.get("Content-Length") or 0)
            while block := response.read(BLOCK):
                output.write(block)
                if time.monotonic() - told > PROGRESS_EVERY_S:
                    told = time.monotonic()
                    core.say(
                        f"{label}: {output.tell() / 1e6:.0f} of {total / 1e6:.0f} MB of {path.name}"
                    )
            size = output.tell()
    except (OSError, http.client.HTTPException) as error:
        raise core.HostError(f"{url}: {core.reason(error)}") from error
    if total and size != total:
        raise core.HostError(f"{url}: {size} of {total} bytes came")


def wheel_project(wheel):
    return wheel.name.partition("-")[0]


def checkout(build, url, commit, tree):
    """The tree of one commit, with its submodules."""
    name = url.rsplit("/", 1)[-1]
    git = ("git", "-C", str(tree))
    tree.mkdir()
    build.run(f"git of {name}", *git, "init", "--quiet")
    try:
        build.run(f"fetching {name}", *git, "fetch", "--quiet", "--depth=1", url, commit)
    except core.HostError:
        # Plain file servers, which mirrors may be, do not give single commits.
        core.say(f"{build.path.name}: {url} gives no single commit; fetching all of it")
        everything = ("+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*")
        build.run(f"fetching {name}", *git, "fetch", "--quiet", url, *everything)
    there = core.run(*git, "cat-file", "-e", f"{commit}^{{commit}}", check=False)
    if there.returncode:
        raise core.HostError(
            f"{url} has no commit {commit}; is it on a branch that the mirror has?"
        )
    build.run(f"checking {name} out", *git, "checkout", "--quiet", "--detach", commit)
    if (tree / ".gitmodules").exists():
        modules = ("submodule", "update", "--init", "--recursive", "--quiet")
        build.run(f"submodules of {name}", *git, *modules)


def apply_patches(build, tree):
    for path, text in build.request["patches"]:
        patch = build.partial / ".patch"
        core.write_atomically(patch, text)
        applied = core.run("git", "-C", str(tree), "apply", "--index", str(patch), check=False)
        patch.unlink()
        if applied.returncode:
            said = " ".join(applied.stderr.split())
            raise core.HostError(f"{path} does not apply to {build.origin['commit'][:12]}: {said}")
        core.say(f"{build.path.name}: {path} applied")


# ------------------------------------------------------------------------------ what is added to it


def copy_libraries(build):
    """The guides' first cure for a missing vllm._C: the libraries of the wheel, copied into the tree.

    Only for versions that have a library of that name, and only where the build brought none along.
    """
    if not build.origin.get("copy_libraries") or build.precompiled is None:
        return
    place = package_folder(build)
    if any(place.glob("_C.*so")):
        return
    wanted = re.compile(r"vllm/(?:[^/]+\.so|vllm_flash_attn/.+)")
    with zipfile.ZipFile(build.precompiled) as wheel:
        names = [name for name in wheel.namelist() if wanted.fullmatch(name)]
        wheel.extractall(place.parent, names)
    core.say(
        f"{build.path.name}: the build has no vllm._C; {len(names)} files copied from "
        f"{build.precompiled.name}, as the guides do"
    )


def package_folder(build):
    """Where vLLM's own package lies in the release."""
    (place,) = (build.partial / "lib").glob("python3.*/site-packages/vllm")
    return place


def build_deep_gemm(build):
    """DeepGEMM at its commit, for versions that do not bundle it."""
    commit = build.origin.get("deep_gemm")
    if commit is None:
        return
    if build.request["cuda_home"] is None:
        raise core.HostError("DeepGEMM is compiled by nvcc; set cuda_toolkit")
    env = cuda_environment(build.request)
    tree = build.partial / ".deep-gemm"
    checkout(build, build.addresses["deep_gemm"], commit, tree)
    out = str(build.wheels / "deep-gemm")
    # It is compiled against the release's own torch.
    options = ("--wheel", "--no-build-isolation", "--python", build.python, "--out-dir", out)
    build.run("building DeepGEMM", build.uv, "build", *options, str(tree), env=env)
    (wheel,) = pathlib.Path(out).glob("*.whl")
    install = (build.uv, "pip", "install", "--no-deps", "--python", build.python, str(wheel))
    build.run("installing DeepGEMM", *install)


def download_kernels(build):
    """What vLLM would otherwise fetch or compile at its first start."""
    if not build.origin.get("kernels"):
        return
    env = {"VIRTUAL_ENV": str(build.partial), "PATH": f"{build.partial}/bin:{os.environ['PATH']}"}
    build.run("kernels", str(build.partial / "bin" / "vllm"), "download-kernels", env=env)


# ---------------------------------------------------------------------------------------- checked


LOOK = """
import hashlib, importlib, importlib.metadata, importlib.util, json, pathlib, sys
modules = json.loads(sys.argv[1])
for module in modules:
    importlib.import_module(module)
libraries = []
if "vllm" in modules:
    folder = pathlib.Path(importlib.import_module("vllm").__file__).parent
    torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
    for name in ("_C", "_C_stable_libtorch"):
        if any(folder.glob(name + ".*so")):
            libraries.append("vllm." + name)
            # A build for the CPU has one for each set of instructions; which is for vLLM to choose.
            if torch is None or torch.version.cuda:
                importlib.import_module("vllm." + name)
    wheel = importlib.metadata.distribution("vllm").read_text("WHEEL") or ""
    if not libraries and "Root-Is-Purelib: false" in wheel:
        raise ModuleNotFoundError("No module named 'vllm._C'")
packages = {}
for found in importlib.metadata.distributions():
    record = found.read_text("RECORD") or ""
    packages[found.metadata["Name"]] = {
        "version": found.version, "record_sha256": hashlib.sha256(record.encode()).hexdigest()
    }
print(json.dumps({
    "python": ".".join(map(str, sys.version_info[:3])), "libraries": libraries, "packages": packages
}))
"""


def checked(build, wheel):
    """What the release says of itself, run as services will run it; for the manifest. Raises HostError."""
    request = build.request
    env = {"HF_HUB_OFFLINE": "1", "HOME": request["home"], "PYTHONNOUSERSITE": "1"}
    program, *arguments = request["check"]
    command = core.as_user(request["user"], str(build.partial / "bin" / program), *arguments)
    said = core.run_long(f"{build.path.name}: checking", *command, env=env).stdout.strip()
    version = (said.splitlines() or [""])[-1]
    wrong = unlike(version, build.origin)
    if wrong:
        raise core.HostError(f"{build.path.name}: {wrong}")
    modules = json.dumps(request["modules"])
    look = core.as_user(request["user"], build.python, "-c", LOOK, modules)
    try:
        looked = core.run_long(f"{build.path.name}: importing", *look, env=env, cwd="/")
    except core.HostError as error:
        raise core.HostError(f"{build.path.name} cannot be imported: {with_cure(error)}") from error
    found = json.loads(looked.stdout.splitlines()[-1])
    hashes = hashes_of(build.locked)
    if wheel:
        hashes[normal(wheel_project(wheel))] = [core.sha256_of(wheel)]
    found["packages"] = [
        {"name": name, **known, "sha256": hashes.get(normal(name), [])}
        for name, known in sorted(found["packages"].items(), key=lambda item: normal(item[0]))
    ]
    return {"checked": version, **found}


def unlike(said, origin):
    """Why what `vllm --version` says is not what was asked for; None where it is."""
    wanted = origin.get("version")
    if wanted is None:
        return None
    if "commit" in origin:
        built = re.search(r"[+.]g([0-9a-f]{7,40})", said)
        if built is None or not origin["commit"].startswith(built[1]):
            return f"it calls itself {said}, which is not commit {origin['commit'][:12]}"
        return None
    if said != wanted and not said.startswith(f"{wanted}+"):
        return f"it calls itself {said}, not {wanted}"
    return None


def with_cure(error):
    """An import that failed, with the guides' second cure where that is one."""
    cure = ""
    if "No module named 'vllm._C" in str(error):
        cure = "\nbuild it here, as the guides do: channel 'source' with precompiled = False"
    return f"{error}{cure}"


HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


def hashes_of(locked):
    """Package to the SHA-256 of its files, as a lock has them."""
    found = {}
    for line in locked.replace("\\\n", " ").splitlines():
        name = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line)
        if name:
            found[normal(name[0])] = HASH.findall(line)
    return found


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


# -------------------------------------------------------------------------------------- arguments


ACCEPTED = "accepted.json"
"""Beside a staged unit: its release has parsed its arguments."""
PARSE = """
import json, sys
entrypoint, *words = sys.argv[1:]
if entrypoint == "serve":
    import vllm.entrypoints.cli.main as cli
    from vllm.entrypoints.cli.serve import ServeSubcommand
    # What is called once the arguments are understood.
    ServeSubcommand.cmd = staticmethod(lambda args: None)
    sys.argv = ["vllm", "serve", *words]
    cli.main()
else:
    from vllm.entrypoints.openai import cli_args
    parser = cli_args.make_arg_parser(cli_args.FlexibleArgumentParser(prog="api_server.py"))
    cli_args.validate_parsed_serve_args(parser.parse_args(words))
print("understood")
"""


def arguments(request):
    """Every unit's arguments, parsed by the very release that it is to run from, as its user.

    What a release understands is noted beside the staged unit, so that it is asked once.
    """
    for service in request["services"]:
        stage = core.SERVICES / service["name"] / service["stamp"]
        if (stage / ACCEPTED).is_file():
            continue
        env = {**service["environment"], "PYTHONNOUSERSITE": "1"}
        command = (service["python"], "-c", PARSE, service["entrypoint"], *service["words"])
        asking = core.as_user(request["user"], *command)
        done = core.run_long(
            f"{service['name']}: arguments", *asking, env=env, cwd="/", check=False
        )
        if done.returncode or "understood" not in done.stdout:
            said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            why = said[-1][: core.LINE_LENGTH] if said else f"exit status {done.returncode}"
            raise core.HostError(f"{service['name']}: its vLLM does not take its arguments: {why}")
        core.write_atomically(stage / ACCEPTED, json.dumps({"python": service["python"]}))
        core.say(f"{service['name']}: its arguments are understood")


HIDDEN_FROM_SERVICES = ("/home/", "/root/", "/run/user/")
"""What ProtectHome of the units hides."""


def check_locked_python(python, locked):
    """Raises HostError where an interpreter is not of the version that the lock's wheels are for."""
    if locked is None:
        return
    version = core.run(python, "-c", "import platform; print(platform.python_version())")
    found = version.stdout.strip()
    if not f"{found}.".startswith(f"{locked}."):
        raise core.HostError(
            f"its Python is {found}, and the lock is for {locked}; `fleet lock --upgrade python` locks anew"
        )


def check_python(python, user):
    """Raises HostError where services, which run as `user`, could not run this interpreter."""
    place = os.path.realpath(python)
    cure = "set vllm.python to a version, or to an interpreter elsewhere"
    if place.startswith(HIDDEN_FROM_SERVICES):
        raise core.HostError(f"its Python is {place}, where no service may look; {cure}")
    if core.run(*core.as_user(user, python, "-c", ""), check=False).returncode:
        raise core.HostError(f"its Python is {place}, which user {user} cannot run; {cure}")


def install_uv(uv, index):
    """uv at its pinned version, from the package index, by hash; the path of its program."""
    program = pathlib.Path(uv["path"])
    if os.access(program, os.X_OK):
        return str(program)
    folder = program.parent.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    with core.locked(folder.with_name(f".{folder.name}.lock")):
        if os.access(program, os.X_OK):
            return str(program)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        machine = platform.machine()
        if machine not in uv["sha256"]:
            raise core.HostError(f"uv {uv['version']} is not pinned for {machine}")
        wanted = partial.with_suffix(".txt")
        core.write_atomically(
            wanted, f"uv=={uv['version']} --hash=sha256:{uv['sha256'][machine]}\n"
        )
        source = []
        if index:
            host = urllib.parse.urlsplit(index)
            source = ["--index-url", index]
            source += ["--trusted-host", host.hostname] if host.scheme == "http" else []
        core.say(f"uv {uv['version']}: installing")
        core.run_long(
            f"uv {uv['version']}",
            *("/usr/bin/python3", "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir"),
            *("--disable-pip-version-check", "--only-binary=:all:"),
            *(*source, "--require-hashes", "--target", str(partial), "-r", str(wanted)),
            # As an option it is unknown to the pip of Ubuntu 22.04, which takes no offence at this.
            env={"PIP_ROOT_USER_ACTION": "ignore"},
        )
        wanted.unlink()
        partial.rename(folder)
    return str(program)
