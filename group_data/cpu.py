# One host without GPUs: the real vLLM, its CPU build, serving a tiny MiniMax-M2.
# vLLM's CPU kernels ask libnuma where memory is, and torch compiles some of its own with g++.
packages = ["g++", "libnuma1"]

vllm = {"version": "0.32.0"}

services = [
    {
        "name": "tiny",
        "model": "MiniMaxAI/MiniMax-M2.5",
        "repository": "lab/MiniMax-M2-tiny",
        "revision": "1ab0000000000000000000000000000000000001",
        "recipe": "cpu",
        "port": 8000,
        "max_model_len": 1024,
        "drain_timeout_s": 20,
        "args": {"enforce-eager": True},
        "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
    },
]
