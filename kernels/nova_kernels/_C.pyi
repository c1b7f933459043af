"""Host code (csrc/bindings_host.cpp); the docstrings there are the manual."""

import numpy as np
from numpy.typing import NDArray

def pack_best_fit_decreasing(
    lengths: NDArray[np.int32], capacity: int, in_order_up_to: int = 0
) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...
def redraw_packs(
    lengths: NDArray[np.int32],
    order: NDArray[np.int32],
    offsets: NDArray[np.int64],
    documents: NDArray[np.int32],
    packs: NDArray[np.int64],
) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...
def balance_packs(work: NDArray[np.float64], ranks: int) -> NDArray[np.int32]: ...
def attention_tiles(
    segments: NDArray[np.int32], query_tokens: int, key_tokens: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]: ...
