"""`python -m vllm.entrypoints.openai.api_server --model X`, the older way to serve."""

from __future__ import annotations

from vllm.entrypoints.openai.cli_args import (
    FlexibleArgumentParser,
    make_arg_parser,
    validate_parsed_serve_args,
)
from vllm.serve import serve


def main() -> None:
    """Serve what the command line says."""
    description = "vLLM OpenAI-Compatible RESTful API server."
    parser = make_arg_parser(FlexibleArgumentParser(prog="api_server.py", description=description))
    options = parser.parse_args()
    validate_parsed_serve_args(options)
    serve(options)


if __name__ == "__main__":
    main()
