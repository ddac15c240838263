"""`vllm serve`, from parsed options to the exit status."""

from __future__ import annotations

import argparse
import signal
from types import FrameType

from vllm import config, envs
from vllm.arguments import non_default
from vllm.engine_client import EngineClient
from vllm.logger import log
from vllm.metrics import Metrics
from vllm.server import Server, listen
from vllm.version import __version__


def serve(options: argparse.Namespace) -> None:
    """Load and serve until told to stop; what goes wrong before that is raised."""
    model = options.model_tag or options.model
    log("INFO", "api_utils.py:347", f"vLLM server version {__version__}, serving model {model}")
    log("INFO", "api_utils.py:286", f"non-default args: {non_default(options)}")
    signal.signal(signal.SIGTERM, _interrupt)
    config.validate_parsers(options)
    bound = listen(options.host, options.port)
    envs.warn_of_unknown()
    server_config, task = config.configure(options)
    metrics = Metrics(server_config.names[0], server_config.engines)
    # From here until it serves, vLLM's wait for its engine swallows the signal.
    signal.signal(signal.SIGTERM, _ignore)
    engine = EngineClient(task, metrics, server_config.max_num_seqs, bound)
    engine.wait_until_ready()
    Server(bound, server_config, engine, metrics).run()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt("terminated")


def _ignore(number: int, frame: FrameType | None) -> None:
    """Nothing."""
