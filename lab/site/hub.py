"""The hub's repositories: small, of the shape of MiniMax's, always the same, and the tiny model.

What is real of them is what the project reads: file names, `config.json` with the architecture's
own figures, an index and shards with valid headers, sizes and digests that agree with each other.
The weights are pseudo-random and a few MiB; nothing can be inferred with them.

Under `site_root`/hub, for `lab.site.server`:

    index.json          repositories -> branches, commits -> files with size, git id and SHA-256
    objects/aa/bbbb…    contents, named by their SHA-256, each once

A commit's files carry the ids that git and Git LFS give them: safetensors and tokenizer.json are in
LFS (SHA-256), all else is plain (SHA-1 of the blob).
"""

import hashlib
import json
import os
import re
import struct
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from lab import LabError
from lab.process import Progress

REVISIONS = Path(__file__).with_name("hub.yaml")
TINY_MODEL = "lab/MiniMax-M2-tiny"

LFS_FILES = ("*.safetensors", "tokenizer.json")
SHARDS = 8
VARIANTS = 2

# All commits are of this moment, so that they have the same ids wherever they are made.
COMMITTED = datetime(2026, 1, 1, tzinfo=timezone.utc)
COMMITTER = "minimax-fleet lab <lab@minimax-fleet.invalid>"

# The control tokens of all these models, with their ids.
TOKENS = {"[e~[": 200020, "]~b]": 200019, "]~!b[": 200034, "<think>": 200050, "</think>": 200051}

# A tensor as a shard holds it: type, shape.
TensorShape = tuple[str, tuple[int, ...]]
BYTES_PER_ELEMENT = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


@dataclass(frozen=True)
class Family:
    """What models of one architecture have in common.

    config: content of config.json
    code: stem of the files with the model's own code: configuration_<code>.py, modeling_<code>.py
    """

    config: dict[str, Any]
    code: str


M2 = Family(
    code="minimax_m2",
    config={
        "architectures": ["MiniMaxM2ForCausalLM"],
        "attn_type_list": [1] * 62,
        "auto_map": {
            "AutoConfig": "configuration_minimax_m2.MiniMaxM2Config",
            "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM",
        },
        "dtype": "bfloat16",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "max_position_embeddings": 196608,
        "model_type": "minimax_m2",
        "mtp_transformer_layers": 1,
        "num_attention_heads": 48,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 62,
        "num_key_value_heads": 8,
        "num_local_experts": 256,
        "num_mtp_modules": 3,
        "qk_norm_type": "per_layer",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "float8_e4m3fn",
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_theta": 5000000,
        "rotary_dim": 64,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "tie_word_embeddings": False,
        "transformers_version": "4.46.1",
        "use_cache": True,
        "use_mtp": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": 200064,
    },
)

M1 = Family(
    code="minimax_m1",
    config={
        "architectures": ["MiniMaxM1ForCausalLM"],
        "attention_dropout": 0.0,
        "attn_type_list": ([0] * 7 + [1]) * 10,
        "auto_map": {
            "AutoConfig": "configuration_minimax_m1.MiniMaxM1Config",
            "AutoModelForCausalLM": "modeling_minimax_m1.MiniMaxM1ForCausalLM",
        },
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 6144,
        "initializer_range": 0.02,
        "intermediate_size": 9216,
        "layernorm_full_attention_alpha": 3.5565588200778455,
        "layernorm_full_attention_beta": 1.0,
        "layernorm_linear_attention_alpha": 3.5565588200778455,
        "layernorm_linear_attention_beta": 1.0,
        "layernorm_mlp_alpha": 3.5565588200778455,
        "layernorm_mlp_beta": 1.0,
        "max_position_embeddings": 10240000,
        "model_type": "minimax_m1",
        "num_attention_heads": 64,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "output_router_logits": False,
        "postnorm": True,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000000,
        "rotary_dim": 64,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "4.45.2",
        "use_cache": True,
        "vocab_size": 200064,
    },
)

FAMILIES = {
    "MiniMaxAI/MiniMax-M2.5": M2,
    "MiniMaxAI/MiniMax-M2.1": M2,
    "MiniMaxAI/MiniMax-M2": M2,
    "MiniMaxAI/MiniMax-M1-40k": M1,
    "MiniMaxAI/MiniMax-M1-80k": M1,
}

# huggingface_hub writes in pieces of 10 MB, so only a shard above that can be resumed midway: one
# repository has one, for tests, and the others are quick to download.
EMBEDDING_ROWS = {"MiniMaxAI/MiniMax-M2": 200064}


def ensure(site_root: Path, progress: Progress, *, tiny_model: Path | None = None) -> None:
    """Make the hub's repositories, or leave them if they are up to date.

    site_root: the directory that the site host serves
    progress: told, in a line for a person, what is being done
    tiny_model: what `lab.tinymodel.build.ensure` returned; None leaves the tiny model out

    Raises LabError if hub.yaml does not fit what there is to serve.
    """
    root = site_root / "hub"
    stamp = root / ".inputs"
    inputs = _inputs(tiny_model)
    if stamp.exists() and stamp.read_text() == inputs:
        return
    revisions = read_revisions(REVISIONS.read_text(encoding="utf-8"))
    progress(f"making the hub's {len(FAMILIES)} repositories of MiniMax's shape")
    store = _Store(root / "objects")
    repositories = {
        repo: _repository(
            store, revisions[repo], [dict(_files(repo, n)) for n in range(1, VARIANTS + 1)]
        )
        for repo in FAMILIES
    }
    if tiny_model is not None:
        contents = [dict(_tiny_files(tiny_model / str(n))) for n in range(1, VARIANTS + 1)]
        repositories[TINY_MODEL] = _repository(store, revisions[TINY_MODEL], contents)
    store.drop_unused()
    _write(root / "index.json", json.dumps({"repositories": repositories}, indent=1).encode())
    _write(stamp, inputs.encode())


def read_revisions(text: str) -> dict[str, dict[str, int]]:
    """hub.yaml as repository -> commit id -> variant.

    Raises LabError if it is not of that form.
    """
    content = yaml.safe_load(text)
    revisions: dict[str, dict[str, int]] = {}
    for repo, listed in content.items():
        revisions[repo] = {}
        for position, item in enumerate(listed):
            where = f"lab/site/hub.yaml: {repo}[{position}]"
            commit, variant = item.get("revision"), item.get("variant")
            if not (isinstance(commit, str) and re.fullmatch(r"[0-9a-f]{40}", commit)):
                raise LabError(f"{where}.revision: {commit!r} is no commit id of 40 hex digits")
            if variant not in range(1, VARIANTS + 1):
                raise LabError(f"{where}.variant: {variant!r} is not from 1 to {VARIANTS}")
            revisions[repo][commit] = variant
    missing = sorted({*FAMILIES, TINY_MODEL} - revisions.keys())
    if missing:
        raise LabError(f"lab/site/hub.yaml: no revision of {', '.join(missing)}")
    return revisions


class _Store:
    """Contents by their SHA-256, in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._used: set[str] = set()

    def add(self, content: bytes) -> str:
        """Keep a content; returns where it is, relative to the directory."""
        digest = hashlib.sha256(content).hexdigest()
        name = f"{digest[:2]}/{digest[2:]}"
        self._used.add(name)
        target = self._directory / name
        if not target.exists():
            _write(target, content)
        return name

    def drop_unused(self) -> None:
        """Remove what was not added in this run."""
        for file in self._directory.glob("*/*"):
            if str(file.relative_to(self._directory)) not in self._used:
                file.unlink()


def _repository(
    store: _Store, revisions: dict[str, int], contents: list[dict[str, bytes]]
) -> dict[str, Any]:
    """What index.json says of a repository; its variants become one commit after the other."""
    commits: dict[str, Any] = {}
    variants = []
    parent = None
    for files in contents:
        entries = [_entry(store, path, content) for path, content in sorted(files.items())]
        parent = git_commit(git_tree((e["path"], e["oid"]) for e in entries), parent)
        variants.append({"date": COMMITTED.strftime("%Y-%m-%dT%H:%M:%S.000Z"), "files": entries})
        commits[parent] = variants[-1]
    commits |= {commit: variants[number - 1] for commit, number in revisions.items()}
    return {"refs": {"main": list(revisions)[-1]}, "commits": commits}


def _entry(store: _Store, path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": path, "size": len(content), "object": store.add(content)}
    if not _in_lfs(path):
        return entry | {"oid": git_object("blob", content)}
    digest = hashlib.sha256(content).hexdigest()
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n"
    ).encode()
    lfs = {"oid": digest, "size": len(content), "pointerSize": len(pointer)}
    return entry | {"oid": git_object("blob", pointer), "lfs": lfs}


def _in_lfs(path: str) -> bool:
    return any(Path(path).match(pattern) for pattern in LFS_FILES)


def git_object(kind: str, content: bytes) -> str:
    """The id that git gives an object: `kind` is blob, tree or commit."""
    header = f"{kind} {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def git_tree(files: Iterable[tuple[str, str]]) -> str:
    """The id of the tree of these paths and blobs."""
    entries: dict[str, tuple[str, str]] = {}
    folders: dict[str, list[tuple[str, str]]] = {}
    for path, oid in files:
        name, _, rest = path.partition("/")
        if rest:
            folders.setdefault(name, []).append((rest, oid))
        else:
            entries[name] = ("100644", oid)
    # git sorts a folder as if its name ended in a slash.
    entries |= {f"{name}/": ("40000", git_tree(inner)) for name, inner in folders.items()}
    return git_object(
        "tree",
        b"".join(
            f"{mode} {name.removesuffix('/')}\0".encode() + bytes.fromhex(oid)
            for name, (mode, oid) in sorted(entries.items())
        ),
    )


def git_commit(tree: str, parent: str | None) -> str:
    """The id of a commit of this tree, by the lab, at the lab's one moment."""
    stamp = f"{COMMITTER} {int(COMMITTED.timestamp())} +0000"
    lines = [f"tree {tree}", *([f"parent {parent}"] if parent else [])]
    lines += [f"author {stamp}", f"committer {stamp}", "", "Shaped like the real one", ""]
    return git_object("commit", "\n".join(lines).encode())


def _files(repo: str, variant: int) -> Iterator[tuple[str, bytes]]:
    """A repository's files; from one variant to the next a few change, as with a real push."""
    family, name = FAMILIES[repo], repo.rpartition("/")[2]
    yield ".gitattributes", _git_attributes()
    yield "LICENSE", _license(repo)
    yield "README.md", _readme(repo, variant)
    yield (
        "docs/vllm_deploy_guide.md",
        b"See https://docs.vllm.ai for how to serve the real model.\n",
    )
    yield "config.json", _json(family.config)
    yield (
        "generation_config.json",
        _json(
            {
                "bos_token_id": TOKENS["]~b]"],
                "do_sample": True,
                "eos_token_id": TOKENS["[e~["],
                "temperature": 1.0,
                "top_k": 40,
                "top_p": 0.95,
            }
        ),
    )
    yield "chat_template.jinja", _chat_template(variant)
    yield "tokenizer.json", _tokenizer()
    yield (
        "tokenizer_config.json",
        _json(
            {
                "bos_token": "]~!b[",
                "eos_token": "[e~[",
                "model_max_length": 40960000,
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
        ),
    )
    yield f"configuration_{family.code}.py", _remote_code(name)
    yield f"modeling_{family.code}.py", _remote_code(name)
    yield from _weights(repo, family, variant)


def _tiny_files(directory: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(directory.iterdir()):
        yield file.name, file.read_bytes()
    yield ".gitattributes", _git_attributes()
    yield "LICENSE", _license(TINY_MODEL)
    yield "README.md", _readme(TINY_MODEL, int(directory.name))


def _weights(repo: str, family: Family, variant: int) -> Iterator[tuple[str, bytes]]:
    """The shards, numbered from zero as MiniMax numbers them, and their index."""
    tensors = dict(_tensors(family, EMBEDDING_ROWS.get(repo, 128)))
    names = list(tensors)
    per_shard = -(-len(names) // SHARDS)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number in range(SHARDS):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        held = names[number * per_shard : (number + 1) * per_shard]
        weight_map |= dict.fromkeys(held, file)
        # A push that changes weights changes the last shard.
        seed = f"{repo}/{file}/{variant if number == SHARDS - 1 else 1}"
        content = safetensors({name: tensors[name] for name in held}, seed)
        total_bytes += len(content)
        yield file, content
    yield (
        "model.safetensors.index.json",
        _json({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}),
    )


def _tensors(family: Family, embedding_rows: int) -> Iterator[tuple[str, TensorShape]]:
    """A few of the real model's tensors for each layer, under their names, far too small."""
    quantized = "quantization_config" in family.config
    yield "model.embed_tokens.weight", ("BF16", (embedding_rows, 64))
    for layer in range(family.config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", ("BF16", (128,))
        for name in (
            "self_attn.o_proj",
            "block_sparse_moe.experts.0.w1",
            "block_sparse_moe.experts.0.w2",
        ):
            yield f"{prefix}.{name}.weight", ("F8_E4M3" if quantized else "BF16", (128, 128))
            if quantized:
                yield f"{prefix}.{name}.weight_scale_inv", ("F32", (1, 1))
        yield f"{prefix}.post_attention_layernorm.weight", ("BF16", (128,))
    yield "model.norm.weight", ("BF16", (128,))
    yield "lm_head.weight", ("BF16", (128, 64))


def safetensors(tensors: dict[str, TensorShape], seed: str) -> bytes:
    """A safetensors file of these tensors with pseudo-random content, the same for each seed."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (kind, shape) in tensors.items():
        begin, end = end, end + BYTES_PER_ELEMENT[kind] * _product(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + hashlib.shake_256(seed.encode()).digest(end)


def _product(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _tokenizer() -> bytes:
    """A tokenizer that the tokenizers library reads: a word is unknown or a control token."""
    return _json(
        {
            "version": "1.0",
            "added_tokens": [
                {
                    "id": number, "content": token, "single_word": False, "lstrip": False,
                    "rstrip": False, "normalized": False, "special": True,
                }
                for token, number in sorted(TOKENS.items(), key=lambda item: item[1])
            ],
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"},
        }
    )  # fmt: skip


def _chat_template(variant: int) -> bytes:
    return (
        f"{{#- variant {variant} -#}}]~!b[\n"
        "{%- for message in messages -%}]~b]{{ message.role }}\n{{ message.content }}[e~[\n"
        "{% endfor -%}{%- if add_generation_prompt -%}]~b]ai\n<think>\n{% endif -%}\n"
    ).encode()


def _remote_code(name: str) -> bytes:
    text = f"the lab's {name} has the files of the real one, not its code"
    return f'raise NotImplementedError("{text}")\n'.encode()


def _readme(repo: str, variant: int) -> bytes:
    content = (
        "A tiny model, trained by lab/tinymodel"
        if repo == TINY_MODEL
        else f"It has the shape of {repo} and pseudo-random weights"
    )
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {repo}\n\n"
        f"Made by the lab of minimax-fleet. {content}. Variant {variant}.\n"
    ).encode()


def _license(repo: str) -> bytes:
    if repo == TINY_MODEL:
        return b"Apache-2.0, as the rest of minimax-fleet.\n"
    return (
        f"Nothing here is of {repo}; the real model's licence is in its own repository.\n".encode()
    )


def _git_attributes() -> bytes:
    lines = (f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_FILES)
    return "".join(lines).encode()


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"


def _inputs(tiny_model: Path | None) -> str:
    """A digest of all that the repositories are made of."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + REVISIONS.read_bytes())
    digest.update(str(tiny_model).encode())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: the site host may be reading."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.chmod(name, 0o644)
    os.replace(name, path)
