"""The `vllm` command."""

from __future__ import annotations

import sys

from vllm import bench
from vllm.arguments import EPILOG, USAGE, Parser, add_serve_options
from vllm.logger import log
from vllm.serve import serve
from vllm.version import __version__, release

DOWNLOADS_KERNELS_SINCE = (0, 32)


def main() -> None:
    """Run the subcommand that the command line names."""
    parser = Parser(prog="vllm", description="vLLM CLI", epilog=EPILOG)
    parser.add_argument("-v", "--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=False, dest="subparser")
    serving = commands.add_parser(
        "serve",
        description="Launch a local OpenAI-compatible API server.",
        usage=USAGE,
        epilog=EPILOG,
    )
    add_serve_options(serving)
    bench.add_command(commands)
    if release() >= DOWNLOADS_KERNELS_SINCE:
        kernels = commands.add_parser("download-kernels", usage="vllm download-kernels [--dry-run]")
        kernels.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.subparser == "serve":
        serve(options)
    elif options.subparser == "bench":
        sys.exit(bench.run(options))
    elif options.subparser == "download-kernels":
        message = "FlashInfer is not installed; skipping its kernels."
        log("INFO", "download_kernels.py:35", message)
    else:
        parser.print_help()


if __name__ == "__main__":
    main()
