# 8×H800: MiniMax-M1-40k as its guide has it. vLLM 0.9.2 is the first that serves it right.
gpu = "h800-80"
gpu_count = 8
driver = {"version": "570.172.08"}

vllm = {"version": "0.9.2", "torch_backend": "auto"}

services = [
    {
        "name": "m1-40k",
        "model": "MiniMaxAI/MiniMax-M1-40k",
        # One of the repository's own commits; compare it with the head before the first roll-out.
        "revision": "b50f3ee860c8dc698136986c4a0838d2cd87de4d",
        "recipe": "m1-tp8",
        "gpus": [0, 1, 2, 3, 4, 5, 6, 7],
        "port": 8000,
        # The guide's own figure. 8×H800 hold two million tokens: set what your requests need.
        "max_model_len": 4096,
    },
]
