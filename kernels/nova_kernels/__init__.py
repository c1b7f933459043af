"""GPU kernels for aligning language models, each with a readable PyTorch reference.

Each function lives in a package of the same name, so import helpers as
`from nova_kernels.packed_attention.reference import dense_attention`, not as attributes of this one.
"""

from nova_kernels.kv_shift_rope import kv_shift_rope
from nova_kernels.linear_dpo_loss import linear_dpo_loss
from nova_kernels.linear_logprob import linear_logprob
from nova_kernels.packed_attention import packed_attention
from nova_kernels.preference_loss import preference_loss

__all__ = [
    "kv_shift_rope",
    "linear_dpo_loss",
    "linear_logprob",
    "packed_attention",
    "preference_loss",
]
