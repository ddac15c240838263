"""A stand-in for vLLM: its command line, files, log lines and HTTP, without a model or a GPU.

What it says and does was measured on vLLM itself; tests/lab/test_standin_is_like_vllm.py compares
the two. It runs on the standard library of Python 3.10 and later.
"""

from vllm.version import __version__

__all__ = ["__version__"]
