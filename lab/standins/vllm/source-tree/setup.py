"""Builds the stand-in as vLLM's setup.py builds vLLM, as far as who calls it can tell.

The version comes from the environment, for lack of tags. With VLLM_USE_PRECOMPILED nothing is compiled
and the library is taken out of the wheel that VLLM_PRECOMPILED_WHEEL_LOCATION names; without it the
compiler of the CUDA toolkit has to be there, and as many run at once as MAX_JOBS says.
"""

import os
import zipfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
LIBRARY = "vllm/_C.abi3.so"
PRECOMPILED = os.environ.get("VLLM_USE_PRECOMPILED") == "1"
# Where the tree has this file, it is one of those that bring no library along.
FORGETS_LIBRARY = (HERE / "forgets-library").exists()


class Build(build_ext):
    """Compiles the library, or takes it out of the wheel."""

    def build_extension(self, ext: Extension) -> None:
        if not PRECOMPILED:
            self._compile(ext)
            return
        wheel = os.environ["VLLM_PRECOMPILED_WHEEL_LOCATION"]
        print(f"Using user-specified precompiled wheel location: {wheel}")
        target = Path(self.get_ext_fullpath(ext.name))
        if FORGETS_LIBRARY:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            target.write_bytes(archive.read(LIBRARY))

    def _compile(self, ext: Extension) -> None:
        home = os.environ.get("CUDA_HOME")
        if not home or not os.access(f"{home}/bin/nvcc", os.X_OK):
            raise RuntimeError("CUDA_HOME environment variable is not set; nvcc is needed")
        print(f"-- MAX_JOBS={os.environ.get('MAX_JOBS', '')} CUDA_HOME={home}")
        print("[1/1] Building C object csrc/ops.c.o", flush=True)
        super().build_extension(ext)

    def get_outputs(self) -> list[str]:
        return [output for output in super().get_outputs() if Path(output).exists()]

    def copy_extensions_to_source(self) -> None:
        if not FORGETS_LIBRARY:
            super().copy_extensions_to_source()


version = os.environ.get("SETUPTOOLS_SCM_PRETEND_VERSION", "0.1.dev1")
(HERE / "vllm" / "VERSION").write_text(f"{version}\n", encoding="ascii")
setup(
    version=version,
    packages=find_packages(include=["vllm", "vllm.*"]),
    package_data={"vllm": ["VERSION", "options.json"]},
    ext_modules=[Extension("vllm._C", ["csrc/ops.c"], py_limited_api=True)],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp38"}},
)
