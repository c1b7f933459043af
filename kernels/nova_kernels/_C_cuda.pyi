"""CUDA kernels (csrc/bindings_cuda.cpp); the headers csrc/cuda/*/launch.h are the manual."""

def linear_logprob_fwd(
    x_RD: int,
    w_VD: int,
    target_R: int,
    part_S3R: int,
    *,
    rows: int,
    dim: int,
    vocab: int,
    splits: int,
    scale: float,
    stream: int,
) -> None: ...
