"""Inventory, group data and catalogue in; HostPlans out, or every reason why not.

Everything that can be judged without a host is judged here: names, places, flags, versions, memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from packaging.version import Version

from fleet import advice, command, container, credentials, options, placement, recipefile
from fleet.catalog import FAMILIES, Catalog, CudaLine, ModelCard, Recipe, catalog, holds
from fleet.errors import Problem, did_you_mean
from fleet.lock import LockFile
from fleet.memory import Memory
from fleet.plan import (
    ETC,
    QUESTION,
    STATE,
    UNIT_PREFIX,
    HostPlan,
    Release,
    ServicePlan,
    Weights,
    digest,
)
from fleet.releases import hub_release, image_release, vllm_release
from fleet.render import render
from fleet.spec import Argument, DcgmExporter, GpuKind, HostSpec, SecretReference, Service, Vllm

HIGHEST_PORT = 65535
STAMP = "\0stamp\0"
"""Stands in a unit for its own stamp while that is worked out; no value can hold a NUL."""
STARTS = 5
"""How often systemd starts a service that keeps ending, before it leaves it down."""
START_MARGIN_S = 60
"""What a start that fails takes besides loading: the engine's end, and the pause before the next one."""
RECIPE_FILES = (".yaml", ".yml")
SM90 = (9, 0)


Options = tuple[tuple[str, ...], ...]
"""Each option of a service as its words, see command.options."""


@dataclass(frozen=True)
class Texts:
    """Contents of what group data names on the control machine, read beforehand; a missing file or
    variable is absent. `documents` are recipe files and config.json files, by path."""

    secrets: Mapping[SecretReference, str]
    keys: Mapping[str, str]
    documents: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a service's `model` and `recipe` name. `service` has them as the process will."""

    service: Service
    card: ModelCard
    recipe: Recipe
    notes: tuple[str, ...] = ()


class Planner:
    """Turns one host's group data into its plan, collecting what is wrong on the way."""

    def __init__(
        self, origins: Mapping[str, str], texts: Texts, lock: LockFile | None = None
    ) -> None:
        self._catalog: Catalog = catalog()
        self._origins = origins
        self._texts = texts
        self._lock = lock
        self.problems: list[Problem] = []

    def plan(self, name: str, group: str, spec: HostSpec) -> HostPlan | None:
        """The host's plan, or None with `problems` filled."""
        before = len(self.problems)
        gpu = self._gpu(spec)
        made = image_release if spec.vllm.channel == "docker" else vllm_release
        release = self._pinned(made(spec, self._texts.documents))
        hub_tool = self._pinned(hub_release(self._catalog, spec.paths.releases, spec.vllm.python))
        self._check_placement(spec)
        minimum_driver = self._check_driver(spec, gpu)
        self._check_runtime(spec, gpu)
        driver_versions = self._locked_driver(spec)
        for mirror, key in spec.mirrors.repository_keys().items():
            if key not in self._texts.keys:
                what = f"{key} is missing on this machine; it is the repository's public key"
                self._refuse(f"mirrors.{mirror}.key", what)
        self._check_exporter(spec, gpu)
        services = [
            planned
            for index, service in enumerate(spec.services)
            if (planned := self._service(f"services[{index}]", service, spec, gpu, release))
            is not None
        ]
        if len(self.problems) > before:
            return None
        return HostPlan(
            name=name,
            group=group,
            spec=spec,
            gpu=gpu,
            minimum_driver=minimum_driver,
            release=release,
            hub_tool=hub_tool,
            driver_versions=driver_versions,
            services=tuple(services),
            keys=self._texts.keys,
            credentials=self._credentials(spec),
        )

    def _refuse(self, path: str, what: str) -> None:
        key = re.split(r"[\[.]", path, maxsplit=1)[0]
        self.problems.append(Problem(f"{self._origins.get(key, 'inventory')}: {path}", what))

    def _pinned(self, release: Release) -> Release:
        """The release as it is locked; where there is no lock, as it is."""
        if self._lock is None:
            return release
        found = self._lock.pin(release)
        if isinstance(found, Release):
            return found
        self.problems.extend(found)
        return release

    def _locked_driver(self, spec: HostSpec) -> Mapping[str, Mapping[str, str]]:
        """Exact versions of the driver's packages, by distribution."""
        if self._lock is None:
            return {}
        other_uv = self._lock.uv(self._catalog.tools.uv)
        if other_uv is not None:
            self.problems.append(other_uv)
        if spec.driver is None:
            return {}
        found = self._lock.driver(spec.driver.version)
        if isinstance(found, Problem):
            self.problems.append(found)
            return {}
        return found

    def _weights(self, service: Service, spec: HostSpec) -> Weights:
        """A service's model: where it lies, and its files as they are locked."""
        repository = service.repository or service.model
        weights = Weights(
            repository=repository,
            revision=service.revision,
            path=f"{spec.paths.models}/{repository}/{service.revision}",
        )
        if self._lock is None:
            return weights
        found = self._lock.files(weights)
        if isinstance(found, Problem):
            self.problems.append(found)
            return weights
        return replace(weights, files={name: (f.size, f.sha256) for name, f in found.items()})

    def _gpu(self, spec: HostSpec) -> GpuKind | None:
        if spec.gpu is None or isinstance(spec.gpu, GpuKind):
            return spec.gpu
        kind = self._catalog.gpus.get(spec.gpu)
        if kind is None:
            self._refuse("gpu", advice.unknown_gpu(spec.gpu))
        return kind

    def _check_driver(self, spec: HostSpec, gpu: GpuKind | None) -> int:
        """Oldest driver branch for the release's CUDA; a declared older one is refused."""
        if gpu is None:
            return 0
        cuda = cuda_of(self._catalog, spec.vllm)
        backend = spec.vllm.torch_backend
        if backend not in (None, "auto") and not str(backend).startswith(cuda.backend):
            self._refuse(
                "vllm.torch_backend",
                f"{backend!r} is another CUDA than that of vLLM {spec.vllm.version}'s wheels, "
                f"{cuda.version}; leave it out or write 'auto'",
            )
        if spec.driver is not None and int(spec.driver.branch) < cuda.driver:
            self._refuse(
                "driver.version",
                f"{spec.driver.version} is too old for vLLM {spec.vllm.version}, whose wheels are for "
                f"CUDA {cuda.version} and need driver {cuda.driver} or later; {cuda.cure}",
            )
        return cuda.driver

    def _credentials(self, spec: HostSpec) -> str:
        """Text of the netrc file that the mirrors' credentials are in; nothing where there is none."""
        reference = spec.mirrors.credentials
        if reference is None:
            return ""
        text = self._texts.secrets.get(reference, "")
        source = reference.file or f"${reference.env}"
        if not text:
            self._refuse("mirrors.credentials", f"{source} is missing or empty on this machine")
        try:
            credentials.read(text)
        except ValueError as error:
            self._refuse("mirrors.credentials", f"{source} {error}")
        return f"{text}\n"

    def _check_runtime(self, spec: HostSpec, gpu: GpuKind | None) -> None:
        """What a way to install vLLM asks for, apart from the driver."""
        vllm, runtime = spec.vllm, self._catalog.tools.runtime
        for index, service in enumerate(spec.services):
            of_client = [name for name in service.env if name.startswith("DOCKER_")]
            if vllm.channel == "docker" and of_client:
                what = f"{of_client[0]} would steer Docker's client, and not vLLM; leave it out"
                self._refuse(f"services[{index}].env", what)
        for index, path in enumerate(vllm.patches):
            if path not in self._texts.documents:
                self._refuse(f"vllm.patches[{index}]", f"{path} is missing on this machine")
        if vllm.kernels and not holds(runtime.download_kernels.vllm, vllm.version):
            what = f"vLLM {vllm.version} has no download-kernels; leave it out"
            self._refuse("vllm.kernels", what)
        compiles = vllm.channel == "source" and not vllm.precompiled
        if compiles and gpu is not None and spec.cuda_toolkit is None:
            what = "False compiles CUDA; set cuda_toolkit, or leave precompiled out"
            self._refuse("vllm.precompiled", what)
        if vllm.deep_gemm is not None:
            oldest = runtime.deep_gemm_cuda
            if spec.cuda_toolkit is None or Version(spec.cuda_toolkit) < Version(oldest):
                there = spec.cuda_toolkit or "none is declared"
                what = f"DeepGEMM is compiled by a CUDA toolkit of {oldest} or later; {there}"
                self._refuse("vllm.deep_gemm", f"{what}: set cuda_toolkit")
            if holds(runtime.bundled_deep_gemm.vllm, vllm.version):
                what = f"vLLM {vllm.version} has DeepGEMM bundled; leave it out"
                self._refuse("vllm.deep_gemm", what)
            if gpu is not None and gpu.capability < SM90:
                self._refuse(
                    "vllm.deep_gemm",
                    f"DeepGEMM needs compute capability 9.0 (Hopper) or later; {gpu.name} has "
                    f"{gpu.compute_capability}; leave it out",
                )

    def _check_placement(self, spec: HostSpec) -> None:
        names: dict[str, int] = {}
        gpus: dict[int, int] = {}
        ports: dict[int, str] = {}
        for index, service in enumerate(spec.services):
            path = f"services[{index}]"
            first = names.setdefault(service.name, index)
            if first != index:
                self._refuse(
                    f"{path}.name",
                    f"{service.name!r} is services[{first}]'s already; choose another",
                )
            self._check_gpus(path, index, service, spec, gpus)
            for role, port in (
                ("port", service.port),
                ("engine_port", command.engine_port(service)),
            ):
                if port > HIGHEST_PORT:
                    self._refuse(
                        f"{path}.port", f"{port} for vLLM itself is no port; set engine_port"
                    )
                user = f"{service.name!r} ({role})"
                other_user = ports.setdefault(port, user)
                if other_user != user:
                    what = f"port {port} is used by {other_user} and {user}; give each its own"
                    self._refuse(f"{path}.{role}", what)

    def _check_exporter(self, spec: HostSpec, gpu: GpuKind | None) -> None:
        """The exporter of GPU metrics needs GPUs, and a port of its own."""
        asked = spec.dcgm_exporter
        if not asked:
            return
        if gpu is None and spec.gpu is None:
            self._refuse("dcgm_exporter", "this host has no GPUs; leave it out")
        port = asked.port if isinstance(asked, DcgmExporter) else DcgmExporter().port
        for service in spec.services:
            if port in (service.port, command.engine_port(service)):
                what = f"port {port} is used by {service.name!r} too; give it another"
                self._refuse("dcgm_exporter.port", what)

    def _check_gpus(
        self, path: str, index: int, service: Service, spec: HostSpec, holders: dict[int, int]
    ) -> None:
        for gpu in service.gpus:
            holder = holders.setdefault(gpu, index)
            if holder != index:
                other = spec.services[holder].name
                what = f"GPU {gpu} is used by {other!r} and {service.name!r}; give each its own"
                self._refuse(f"{path}.gpus", what)
            if gpu >= spec.gpu_count:
                what = f"GPU {gpu} of {spec.gpu_count}; they are counted from 0"
                missing = "gpu_count is not set; say how many GPUs the host has"
                self._refuse(f"{path}.gpus", what if spec.gpu_count else missing)
        if len(set(service.gpus)) < len(service.gpus):
            self._refuse(f"{path}.gpus", f"{service.gpus} names a GPU twice")

    def _service(
        self, path: str, service: Service, spec: HostSpec, gpu: GpuKind | None, release: Release
    ) -> ServicePlan | None:
        before = len(self.problems)
        chosen = self._choose(path, service, spec, gpu)
        if chosen is None:
            return None
        version = spec.vllm.version
        legal = self._check_ranks(path, chosen, spec, gpu)
        self._check_flags(path, chosen, version)
        words = command.options(chosen.service, chosen.recipe, version)
        self._check_options(path, chosen, words, version)
        self._check_fix(chosen, spec.vllm)
        if not chosen.card.accepts(version):
            self._refuse(
                "vllm.version",
                f"{version} does not serve {chosen.service.model}: "
                f"supported {chosen.card.vllm_range} ({chosen.card.vllm_source})",
            )
        elif not holds(chosen.recipe.vllm, version):
            what = f"{version} is not for recipe {service.recipe!r}: supported {chosen.recipe.vllm}"
            self._refuse("vllm.version", what)
        arguments = command.arguments(chosen.service, chosen.recipe, version)
        self._check_code(path, chosen, spec, arguments)
        self._check_kernels(path, chosen, gpu, version)
        held = None
        if gpu is not None and legal:
            held = self._check_memory(path, chosen, spec, gpu, arguments)
        api_key = self._api_key(path, service)
        weights = self._weights(chosen.service, spec)
        if len(self.problems) > before:
            return None
        try:
            return _service_plan(chosen, words, spec, release, weights, api_key, held)
        except ValueError as error:
            self._refuse(path, str(error))
            return None

    def _choose(
        self, path: str, service: Service, spec: HostSpec, gpu: GpuKind | None
    ) -> Chosen | None:
        if service.model.endswith(RECIPE_FILES):
            return self._read_recipe_file(path, service, spec, gpu)
        for key in ("variant", "features", "model_config_file"):
            if key in service.model_fields_set:
                self._refuse(f"{path}.{key}", "belongs to a recipe file; model names none")
        card = self._catalog.models.get(service.model)
        if card is None:
            hint = did_you_mean(service.model, self._catalog.models)
            hint = hint or "; `fleet catalogue` lists what is"
            self._refuse(f"{path}.model", f"{service.model!r} is not in the catalogue{hint}")
            return None
        recipe = self._catalog.recipes.get((card.family, service.recipe))
        if recipe is None or not recipe.serves(service.model, card):
            what = advice.unknown_recipe(service, gpu, spec.gpu_count)
            self._refuse(f"{path}.recipe", what)
            return None
        return Chosen(service=service, card=card, recipe=recipe)

    def _read_recipe_file(
        self, path: str, service: Service, spec: HostSpec, gpu: GpuKind | None
    ) -> Chosen | None:
        text = self._texts.documents.get(service.model)
        if text is None:
            self._refuse(f"{path}.model", f"{service.model} is missing on this machine")
            return None
        try:
            reading = recipefile.read(
                service.model,
                text,
                strategy=service.recipe,
                variant=service.variant,
                features=service.features,
                gpu=(spec.gpu if isinstance(spec.gpu, str) else "", gpu) if gpu else None,
                gpus=len(service.gpus),
                config=self._model_config(path, service),
            )
        except recipefile.RecipeFileError as error:
            key = "model" if error.gpus is None else "gpus"
            self._refuse(f"{path}.{key}", f"{service.model}: {error}")
            return None
        named = {"model": reading.model, "repository": service.repository or reading.model}
        recipe, left_out = _known_variables(reading.recipe, spec.vllm.version)
        return Chosen(
            service=service.model_copy(update=named),
            # The catalogue knows more of its own models than a recipe file says.
            card=self._catalog.models.get(reading.model, reading.card),
            recipe=recipe,
            notes=(*reading.notes, *left_out),
        )

    def _model_config(self, path: str, service: Service) -> dict[str, Any] | None:
        name = service.model_config_file
        if name is None:
            return None
        text = self._texts.documents.get(name)
        where = f"{path}.model_config_file"
        if text is None:
            self._refuse(where, f"{name} is missing on this machine")
            return None
        try:
            config = json.loads(text)
        except ValueError as error:
            self._refuse(where, f"{name} is no JSON: {error}")
            return None
        if not isinstance(config, dict):
            self._refuse(where, f"{name} is no model's config.json: expected an object")
            return None
        return config

    def _check_ranks(self, path: str, chosen: Chosen, spec: HostSpec, gpu: GpuKind | None) -> bool:
        """Whether the recipe can run on these GPUs, memory aside."""
        service, recipe, card = chosen.service, chosen.recipe, chosen.card
        ranks, before = recipe.parallel.ranks, len(self.problems)
        if gpu is None:
            if spec.gpu is not None:
                return False
            if recipe.device == "gpu":
                what = f"recipe {service.recipe!r} wants {ranks} GPUs"
                self._refuse(f"{path}.gpus", f"{what}; declare gpu and gpu_count")
            elif service.gpus:
                what = f"recipe {service.recipe!r} wants no GPUs; leave gpus empty"
                self._refuse(f"{path}.gpus", what)
        elif recipe.device == "cpu":
            what = f"{service.recipe!r} is for hosts without GPUs; {gpu.name} is declared"
            self._refuse(f"{path}.recipe", what)
        elif ranks != len(service.gpus):
            self._refuse(
                f"{path}.gpus",
                f"recipe {service.recipe!r} runs {ranks} ranks on {len(service.gpus)} GPUs; "
                f"give it exactly {ranks} of this host's {spec.gpu_count}",
            )
        reasons = [*placement.illegal(card, recipe.parallel)]
        if gpu is not None:
            reasons += placement.unsupported(card, recipe, gpu)
        if reasons and recipe.family in FAMILIES:
            names = placement.legal_recipes(service.model, gpu, spec.gpu_count)
            use = f"; use {advice.either(names)}" if names else ""
            reasons = [f"{reason}{use}" for reason in reasons]
        for reason in reasons:
            self._refuse(f"{path}.recipe", reason)
        return len(self.problems) == before

    def _check_flags(self, path: str, chosen: Chosen, version: str) -> None:
        service, given = chosen.service, chosen.recipe.arguments(version)
        there = {command.flag_name(name) for name in given}
        must = {name for name, setting in chosen.recipe.args.items() if setting.mandatory}
        for name, value in service.args.items():
            flag = command.flag_name(name)
            key = _manager(flag, version)
            if flag in must and value != given.get(flag):
                why = chosen.recipe.args[flag].why
                self._refuse(f"{path}.args", f"--{flag} {given.get(flag)} is mandatory: {why}")
            turned_off = value is False and options.negative(f"--{flag}", version) is None
            if (value is None or turned_off) and flag not in there and key is None:
                hint = did_you_mean(flag, there) or "; leave it out"
                self._refuse(f"{path}.args", f"--{flag}: the recipe has none to take away{hint}")
            if flag == "host" and value not in (None, "127.0.0.1", "localhost"):
                self._refuse(
                    f"{path}.args",
                    f"--host {value} exposes unauthenticated endpoints (/metrics, /invocations, "
                    "/pause, …): vLLM stays on loopback and the proxy answers on 'port'; leave it out",
                )
            elif flag == "config":
                what = "--config hides flags from the plan; write them in args"
                self._refuse(f"{path}.args", what)
            elif key is not None:
                self._refuse(f"{path}.args", f"--{flag} is set by {key!r}; use that")
        for name in service.env:
            manager = command.MANAGED_ENVIRONMENT.get(name)
            if manager is not None:
                self._refuse(f"{path}.env", f"{name} is set by {manager}; leave it out")

    def _check_fix(self, chosen: Chosen, vllm: Vllm) -> None:
        """A build by commit may be from before a fix that the model needs."""
        fix = self._catalog.tools.runtime.fix
        if chosen.card.family not in fix.families or vllm.commit is None:
            return
        if vllm.commit != fix.commit and not holds(fix.vllm, vllm.version):
            self._refuse(
                "vllm.commit",
                f"a build on the way to {vllm.version} may be older than commit {fix.commit[:9]}, and "
                f"{chosen.service.model} needs it ({fix.why}): {fix.source}; take that commit, or one of "
                f"{fix.vllm.removeprefix('>=')} or later",
            )

    def _check_code(
        self, path: str, chosen: Chosen, spec: HostSpec, arguments: Mapping[str, Argument]
    ) -> None:
        """--trust-remote-code runs the repository's Python: only at a commit that somebody knows."""
        service, code = chosen.service, chosen.card.remote_code
        if not arguments.get("trust-remote-code"):
            return
        if service.revision in code.revisions or service.revision in spec.reviewed_revisions:
            return
        without = (
            "" if code.needed else ", or set args['trust-remote-code'] to None: vLLM needs none"
        )
        self._refuse(
            f"{path}.revision",
            f"--trust-remote-code runs Python of {service.repository or service.model}, which is not "
            f"in the catalogue at this revision; review it and name the commit in "
            f"reviewed_revisions{without}",
        )

    def _check_kernels(self, path: str, chosen: Chosen, gpu: GpuKind | None, version: str) -> None:
        env = command.variables(chosen.service, chosen.recipe, version)
        deep_gemm = env.get("VLLM_USE_DEEP_GEMM") == "1"
        if deep_gemm and gpu is not None and gpu.capability < SM90:
            self._refuse(
                f"{path}.env",
                f"VLLM_USE_DEEP_GEMM=1 needs compute capability 9.0 (Hopper) or later; {gpu.name} has "
                f"{gpu.compute_capability}; set it to 0",
            )

    def _check_memory(
        self,
        path: str,
        chosen: Chosen,
        spec: HostSpec,
        gpu: GpuKind,
        arguments: Mapping[str, Argument],
    ) -> Memory | None:
        version = spec.vllm.version
        try:
            share = placement.utilisation(arguments, version)
            held = placement.service_memory(
                chosen.card, chosen.recipe.parallel, gpu, arguments, version
            )
        except ValueError as error:
            self._refuse(f"{path}.args", str(error))
            return None
        service, card, recipe = chosen.service, chosen.card, chosen.recipe
        what = None
        if held is None:
            what = advice.too_heavy(service.model, card, recipe, gpu, share)
        elif not held.fits:
            what = advice.does_not_fit(held, service, card, recipe, spec)
        if what is not None:
            self._refuse(path, what)
        return held

    def _check_options(self, path: str, chosen: Chosen, words: Options, version: str) -> None:
        """Flags and variables against the pinned vLLM's own; a recipe file answers for its own."""
        service, recipe = chosen.service, chosen.recipe
        own = {f"--{command.flag_name(name)}" for name in service.args}
        for finding in options.check_options(words, version, entrypoint=recipe.entrypoint):
            of_the_file = recipe.family not in FAMILIES and finding.option not in own
            where = f"{path}.model" if of_the_file else f"{path}.args"
            file = f"{recipe.family}: " if of_the_file else ""
            self._refuse(where, f"{file}{finding.option}: {finding.what}")
        env = command.variables(service, recipe, version)
        for finding in options.check_environment(env, version):
            self._refuse(f"{path}.env", f"{finding.option}: {finding.what}")

    def _api_key(self, path: str, service: Service) -> str | None:
        if service.api_key is None:
            return None
        value = self._texts.secrets.get(service.api_key)
        if not value:
            source = service.api_key.file or f"${service.api_key.env}"
            self._refuse(f"{path}.api_key", f"{source} is missing or empty on this machine")
        elif not (value.isascii() and value.isprintable() and " " not in value):
            self._refuse(f"{path}.api_key", "holds a character that no HTTP header can carry")
        return value


def _manager(flag: str, version: str) -> str | None:
    """The key of group data that decides an option, by whatever name the option is given."""
    names = [flag, *(name.lstrip("-") for name in options.same_option(f"--{flag}", version))]
    return next(
        (command.MANAGED_FLAGS[name] for name in names if name in command.MANAGED_FLAGS), None
    )


def cuda_of(known: Catalog, vllm: Vllm) -> CudaLine:
    """The CUDA of a vLLM's wheel: what its local part says (+cu129), else its version's own.

    A torch backend changes torch and not vLLM's own kernels.
    """
    local = Version(vllm.version).local or ""
    lines = known.tools.cuda
    said = [line for line in lines if local.startswith(line.backend)]
    return next(iter(said), None) or next(line for line in lines if holds(line.vllm, vllm.version))


def _known_variables(recipe: Recipe, version: str) -> tuple[Recipe, list[str]]:
    """A recipe file without variables that this vLLM does not know, and a note for each.

    The catalogue says of its own which versions they are for; a file of others cannot.
    """
    unknown = {
        finding.option: finding.what for finding in options.check_environment(recipe.env, version)
    }
    env = {name: setting for name, setting in recipe.env.items() if name not in unknown}
    notes = [f"{name} of the recipe is left out: {what}" for name, what in unknown.items()]
    return recipe.model_copy(update={"env": env}), notes


def _service_plan(  # noqa: PLR0913, PLR0917 - each is worked out before, once
    chosen: Chosen,
    words: Options,
    spec: HostSpec,
    release: Release,
    weights: Weights,
    api_key: str | None,
    held: Memory | None,
) -> ServicePlan:
    service, recipe, card = chosen.service, chosen.recipe, chosen.card
    version = spec.vllm.version
    program = command.program(recipe, release.path, weights.path)
    env = command.environment(service, recipe, version, release=release.path, state=STATE)
    template, written, of_container = "service.service.j2", command.systemd_line, None
    if release.image is not None:
        cache = env["VLLM_CACHE_ROOT"]
        env = container.environment(env, cache)
        program = container.program(
            program,
            release.image,
            name=service.name,
            release=release.path,
            gpus=service.gpus,
            models=weights.path,
            cache=cache,
            names=[*env, *(["VLLM_API_KEY"] if api_key else [])],
        )
        template, written = "container.service.j2", container.systemd_line
        of_container = container.values(service.name, cache, service.gpus, service.drain_timeout_s)
    values = {
        "name": service.name,
        "model": service.model,
        "vllm_version": version,
        "port": service.port,
        "state_dir": STATE,
        "stage_dir": f"{ETC}/services/{service.name}",
        "has_secrets": api_key is not None,
        "stop_timeout_s": service.drain_timeout_s + 60,
        "starts": STARTS,
        "starts_interval_s": STARTS * (service.gate.ready_timeout_s + START_MARGIN_S),
        "environment_lines": [command.systemd_assignment(*item) for item in env.items()],
        "program_line": written(program),
        "release": release.path,
        "container": of_container,
        "option_lines": [" ".join(map(command.systemd_word, option)) for option in words],
    }
    # The stamp names everything that the process is made of; it is the last thing put into the unit.
    bare = render(template, service=values, stamp=STAMP)
    stamp = digest(bare, api_key or "")
    return ServicePlan(
        name=service.name,
        unit=f"{UNIT_PREFIX}{service.name}.service",
        model=service.model,
        weights=weights,
        release=release.path,
        vllm_version=version,
        recipe=service.recipe,
        gpus=tuple(service.gpus),
        port=service.port,
        engine_port=command.engine_port(service),
        program=program,
        options=words,
        environment=env,
        drain_timeout_s=service.drain_timeout_s,
        gate={
            "model": service.model,
            "ready_timeout_s": service.gate.ready_timeout_s,
            "answer_timeout_s": service.gate.answer_timeout_s,
            "expect": service.gate.expect or card.gate.expect,
            "request": {
                "model": service.model,
                **QUESTION,
                "max_tokens": _answer_tokens(service, held),
            },
        },
        memory=held,
        claims=tuple(advice.claims(service, spec)),
        notes=(*chosen.notes, *advice.notes(service, card, recipe, spec, held)),
        stamp=stamp,
        unit_text=bare.replace(STAMP, stamp),
        api_key=api_key,
        image=release.image,
    )


def _answer_tokens(service: Service, held: Memory | None) -> int:
    """How long the gate's answer may be: vLLM refuses a request that leaves no room for its prompt."""
    wanted, context = service.gate.max_tokens, service.max_model_len
    if context is None and held is not None:
        context = held.max_model_len
    return wanted if context is None else min(wanted, context // 2)
