"""`python -m vllm.entrypoints.openai.api_server --model X`, the older way to serve."""

from __future__ import annotations

from vllm.arguments import Parser, add_serve_options
from vllm.serve import serve


def main() -> None:
    """Serve what the command line says."""
    parser = Parser(prog="api_server.py", description="vLLM OpenAI-Compatible RESTful API server.")
    add_serve_options(parser)
    serve(parser.parse_args())


if __name__ == "__main__":
    main()
