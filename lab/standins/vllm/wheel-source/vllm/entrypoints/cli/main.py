"""The `vllm` command."""

from __future__ import annotations

import sys

from vllm import bench
from vllm.arguments import EPILOG, Parser
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.logger import log
from vllm.version import __version__, release

DOWNLOADS_KERNELS_SINCE = (0, 32)


def main() -> None:
    """Run the subcommand that the command line names."""
    parser = Parser(prog="vllm", description="vLLM CLI", epilog=EPILOG)
    parser.add_argument("-v", "--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=False, dest="subparser")
    serve = ServeSubcommand()
    serve.subparser_init(commands)
    bench.add_command(commands)
    if release() >= DOWNLOADS_KERNELS_SINCE:
        kernels = commands.add_parser("download-kernels", usage="vllm download-kernels [--dry-run]")
        kernels.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.subparser == serve.name:
        serve.validate(options)
        serve.cmd(options)
    elif options.subparser == "bench":
        sys.exit(bench.run(options))
    elif options.subparser == "download-kernels":
        message = "FlashInfer is not installed; skipping its kernels."
        log("INFO", "download_kernels.py:35", message)
    else:
        parser.print_help()


if __name__ == "__main__":
    main()
