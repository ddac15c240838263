# 8×H200: one MiniMax-M2.5 over all eight GPUs, tensor parallel with the experts kept whole.
gpu = "h200-141"
gpu_count = 8
driver = {"version": "580.95.05"}

vllm = {"version": "0.33.0", "torch_backend": "auto"}

services = [
    {
        "name": "m25",
        "model": "MiniMaxAI/MiniMax-M2.5",
        "revision": "f710177d938eff80b684d42c5aa84b382612f21f",
        "recipe": "tep8",
        "gpus": [0, 1, 2, 3, 4, 5, 6, 7],
        "port": 8000,
    },
]
