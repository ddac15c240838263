# One host without GPUs: the real vLLM, its CPU build, serving a tiny MiniMax-M2.
# vLLM's CPU kernels ask libnuma where memory is, and torch compiles some of its own with g++.
packages = ["g++", "libnuma1"]

vllm = {"version": "0.32.0"}

# The tiny model's repository: made by the lab, with no Python in it.
reviewed_revisions = ["1ab0000000000000000000000000000000000001"]

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
        # What the CPU needs, and what makes a tiny model start quickly on few cores.
        "args": {
            "enforce-eager": True,
            "distributed-executor-backend": "uni",
            "kv-cache-memory-bytes": "64M",
            "max-num-seqs": 8,
        },
        "env": {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        },
    },
]
