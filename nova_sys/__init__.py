"""nova_sys aligns large language models on top of Megatron-core."""

__version__ = "0.1.0"
