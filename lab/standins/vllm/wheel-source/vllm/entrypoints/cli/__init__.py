"""Where vLLM's programs begin."""
