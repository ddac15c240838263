"""The options of the API server, under the names that vLLM up to 0.27 has for them."""

from __future__ import annotations

import argparse

from vllm import config
from vllm.arguments import Parser as FlexibleArgumentParser
from vllm.arguments import add_serve_options

__all__ = ["FlexibleArgumentParser", "make_arg_parser", "validate_parsed_serve_args"]


def make_arg_parser(parser: FlexibleArgumentParser) -> FlexibleArgumentParser:
    """Give `parser` the options of the API server."""
    add_serve_options(parser)
    return parser


def validate_parsed_serve_args(args: argparse.Namespace) -> None:
    """Raise where options do not go together."""
    config.validate_options(args)
