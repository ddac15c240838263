"""The `serve` subcommand, under the names that vLLM has for it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vllm.arguments import EPILOG, USAGE, Parser, add_serve_options
from vllm.entrypoints.openai.cli_args import validate_parsed_serve_args
from vllm.serve import serve

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Parser]


class ServeSubcommand:
    """Serves what its options say."""

    name = "serve"

    @staticmethod
    def cmd(args: argparse.Namespace) -> None:
        """Serve until told to stop."""
        serve(args)

    def validate(self, args: argparse.Namespace) -> None:
        """Raise where options do not go together."""
        validate_parsed_serve_args(args)

    def subparser_init(self, subparsers: Subparsers) -> Parser:
        """Add the subcommand's own parser."""
        parser = subparsers.add_parser(
            self.name,
            description="Launch a local OpenAI-compatible API server.",
            usage=USAGE,
            epilog=EPILOG,
        )
        add_serve_options(parser)
        return parser
