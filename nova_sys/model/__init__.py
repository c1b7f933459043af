"""The model: Megatron-core's GPT wired to the kernels of nova_kernels."""
