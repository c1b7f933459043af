"""CUDA kernels (csrc/bindings_cuda.cpp); the headers csrc/cuda/*/launch.h are the manual."""

def linear_logprob_fold(
    *,
    x_RD: int,
    w_VD: int,
    target_R: int,
    inverse_norm_V: int,
    state_5SR: int,
    e_RV: int,
    max_KR: int,
    rows: int,
    dim: int,
    vocab: int,
    splits: int,
    group: int,
    clusters: int,
    inverse_temperature: float,
    entropy: bool,
    argmax: bool,
    stream: int,
) -> None: ...
def linear_logprob_dlogits(
    *,
    x_RD: int,
    w_VD: int,
    target_R: int,
    inverse_norm_V: int,
    rows_8R: int,
    dz_RW: int,
    rows: int,
    dim: int,
    vocab: int,
    width: int,
    wave_start: int,
    wave_tiles: int,
    group: int,
    clusters: int,
    inverse_temperature: float,
    extras: bool,
    stream: int,
) -> None: ...
def linear_logprob_stored_dlogits(
    *,
    e_RV: int,
    max_KR: int,
    target_R: int,
    inverse_norm_V: int,
    rows_8R: int,
    dz_RW: int,
    rows: int,
    vocab: int,
    width: int,
    wave_start: int,
    wave_tiles: int,
    extras: bool,
    stream: int,
) -> None: ...

class AttentionShape:
    def __init__(self, tokens: int, heads: int, kv_heads: int, head_dim: int) -> None: ...
    @property
    def tokens(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def packs(self) -> int: ...
    @property
    def row_stride(self) -> int: ...
    @property
    def forward_tokens(self) -> int: ...
    @property
    def dq_tokens(self) -> int: ...
    @property
    def key_tokens(self) -> int: ...

def attention_key_parts(tiles: int, kv_heads: int) -> int: ...
def attention_forward(
    shape: AttentionShape,
    *,
    q: tuple[int, int],
    k: tuple[int, int],
    v: tuple[int, int],
    query_tiles: tuple[int, int],
    out: int,
    lse2: int,
    softmax_scale: float,
    blocks: int,
    stream: int,
) -> None: ...
def attention_backward(
    shape: AttentionShape,
    *,
    q: tuple[int, int],
    k: tuple[int, int],
    v: tuple[int, int],
    d_out: tuple[int, int],
    query_tiles: tuple[int, int],
    key_tiles: tuple[int, int],
    out: int,
    lse2_and_delta: tuple[int, int],
    dq_dk_dv: tuple[int, ...],
    partials: int,
    softmax_scale: float,
    blocks: int,
    stream: int,
) -> None: ...
