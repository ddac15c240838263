# 8×H800: MiniMax-M1-40k as its guide has it. vLLM 0.9.2 is the first that serves it right.
gpu = "h800-80"
gpu_count = 8
driver = {"version": "570.172.08"}

vllm = {
    "version": "0.9.2",
    "torch_backend": "auto",
    # Releases of its time ask for any later transformers; from 4.54 on vLLM 0.9.2 does not start with it
    # ("'aimv2' is already used by a Transformers config").
    "packages": ["transformers==4.53.3"],
}

services = [
    {
        "name": "m1-40k",
        "model": "MiniMaxAI/MiniMax-M1-40k",
        # A commit that public projects pin; compare it with the head before the first roll-out.
        "revision": "2d1d1c2f00c97fc1245bfce7648649b76e0a8e6e",
        "recipe": "m1-tp8",
        "gpus": [0, 1, 2, 3, 4, 5, 6, 7],
        "port": 8000,
        # The guide's own figure. 8×H800 hold two million tokens: set what your requests need.
        "max_model_len": 4096,
    },
]
