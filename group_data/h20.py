# 8×H20 with 141 GB each: two MiniMax-M2.5 services side by side, tensor parallel over four GPUs each.
gpu = "h20-141"
gpu_count = 8
driver = {"version": "580.95.05"}

vllm = {"version": "0.33.0", "torch_backend": "auto"}

services = [
    {
        "name": "m25-a",
        "model": "MiniMaxAI/MiniMax-M2.5",
        "revision": "f710177d938eff80b684d42c5aa84b382612f21f",
        "recipe": "tp4",
        "gpus": [0, 1, 2, 3],
        "port": 8000,
    },
    {
        "name": "m25-b",
        "model": "MiniMaxAI/MiniMax-M2.5",
        "revision": "f710177d938eff80b684d42c5aa84b382612f21f",
        "recipe": "tp4",
        "gpus": [4, 5, 6, 7],
        "port": 8001,
    },
]
