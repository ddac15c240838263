#!/usr/bin/python3
"""nvcc on a lab host: says which CUDA it is, as NVIDIA's does, and compiles nothing."""

import sys

LINE = "@VERSION@"

# What the real ones of these lines print.
BUILDS = {
    "12.9": ("Tue_May_27_02:21:03_PDT_2025", "V12.9.86", "cuda_12.9.r12.9/compiler.36037853_0"),
    "13.0": ("Wed_Aug_20_01:58:59_PM_PDT_2025", "V13.0.88", "cuda_13.0.r13.0/compiler.36424714_0"),
}
NO_INPUT = "nvcc fatal   : No input files specified; use option --help for more information\n"


def main(arguments: list[str]) -> int:
    """0 for the version, 1 for everything else."""
    if {"--version", "-V"} & set(arguments):
        built, version, build = BUILDS[LINE]
        print(
            "nvcc: NVIDIA (R) Cuda compiler driver\n"
            "Copyright (c) 2005-2025 NVIDIA Corporation\n"
            f"Built on {built}\n"
            f"Cuda compilation tools, release {LINE}, {version}\n"
            f"Build {build}"
        )
        return 0
    files = [word for word in arguments if not word.startswith("-")]
    sys.stderr.write("nvcc fatal   : a stand-in compiles nothing\n" if files else NO_INPUT)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
