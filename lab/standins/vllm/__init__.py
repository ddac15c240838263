"""A stand-in for vLLM, as wheels that installers take for vLLM's own."""
