"""linear_logprob on a Hopper GPU: our CUDA kernels (csrc/cuda/linear_logprob) around the products with the
weight, cuBLAS for the rest, Triton for the passes over rows (_waves.py).

Rows are gathered first, into bf16 (R, D): the tensor memory accelerator copies boxes, not lists of rows, and
the copy serves the product for dW too. Forward and backward multiply it with the same tiles, in the same
order, so that a row's target has the same logit in both.

Legend: T packed tokens, R response rows, D hidden, V vocabulary columns of this rank,
        W columns of one wave, K ranges or tiles of columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nova_kernels.backend import cuda_kernels
from nova_kernels.linear_logprob._triton_rows import inverse_norms
from nova_kernels.linear_logprob._waves import (
    PROGRAMS,
    Block,
    Folded,
    gradients_of,
    merged,
    row_scalars,
    split_rows,
    stored_bytes,
    wave_width,
    whole_state,
)
from nova_kernels.linear_logprob.state import Inputs, Options, RowGradients, RowState, present

__all__ = ["backward", "forward", "stored_bytes"]

TILE_ROWS, TILE_COLUMNS = 128, 256  # kM and kN of csrc/cuda/linear_logprob/work.h
PAIR_ROWS = 2 * TILE_ROWS  # of a cluster of two thread blocks, which share the tiles of the weight
WAVE_GROUP = 8  # pairs walked down before the next column tile: 16 MiB of rows at D = 4096


def forward(inputs: Inputs, options: Options, *, store: bool) -> Folded:
    """Each row's state over the whole vocabulary; if `store`, exponentials and their maxima."""
    return whole_state(inputs, options, lambda: _fold(inputs, options, store=store))


def _fold(inputs: Inputs, options: Options, *, store: bool) -> Folded:
    """The states over this rank's columns, merged."""
    weight_VD, (num_rows, D) = inputs.weight_VD, (len(inputs.row_R), inputs.hidden_TD.shape[1])
    x_RD, target_R = inputs.gathered(), _local_targets(inputs, options)
    column_tiles = -(-options.num_columns // TILE_COLUMNS)
    group, splits = split_rows(
        -(-num_rows // PAIR_ROWS), column_tiles, PAIR_ROWS * D * 2, programs=PROGRAMS // 2
    )
    state_5KR = torch.empty(5, splits, num_rows, dtype=torch.float32, device=weight_VD.device)
    e_RV = max_KR = None
    if store:  # whole tiles, so that rows start at multiples of 16 bytes
        e_RV = weight_VD.new_empty(num_rows, column_tiles * TILE_COLUMNS)
        max_KR = state_5KR.new_empty(column_tiles, num_rows)
    inverse_norm_V = inverse_norms(weight_VD, options, multiple=TILE_COLUMNS)
    _kernels().linear_logprob_fold(
        x_RD=x_RD.data_ptr(),
        w_VD=weight_VD.data_ptr(),
        target_R=target_R.data_ptr(),
        inverse_norm_V=_pointer(inverse_norm_V),
        state_5SR=state_5KR.data_ptr(),
        e_RV=_pointer(e_RV),
        max_KR=_pointer(max_KR),
        rows=num_rows,
        dim=D,
        vocab=options.num_columns,
        splits=splits,
        group=group,
        clusters=_num_clusters(weight_VD),
        inverse_temperature=1.0 / options.temperature,
        entropy=options.with_entropy,
        argmax=options.with_argmax,
        stream=_stream(weight_VD),
    )
    state = merged(state_5KR, options)
    if state.argmax_R is not None:
        state = state._replace(argmax_R=state.argmax_R + options.first_column)
    return state, () if e_RV is None else (e_RV, present(max_KR))


def backward(
    inputs: Inputs,
    state: RowState,
    stored: tuple[Tensor, ...],
    gradients: RowGradients,
    options: Options,
    *,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dhidden_TD summed over the group, dweight_VD), each in its input's dtype."""
    with torch.cuda.device_of(inputs.weight_VD):
        x_RD = inputs.gathered() if needs_dweight or not stored else None
        inverse_norm_V = inverse_norms(inputs.weight_VD, options, multiple=TILE_COLUMNS)
        extras = gradients.dentropy_R is not None or gradients.dmax_logit_R is not None
        common = {
            "target_R": _local_targets(inputs, options),
            "inverse_norm_V": inverse_norm_V,
            "rows_8R": row_scalars(state, gradients, options),
        }
        return gradients_of(
            inputs,
            options,
            _dlogits(inputs, x_RD, stored, options, common, extras=extras),
            x_RD=x_RD,
            inverse_norm_V=inverse_norm_V,
            needs_dhidden=needs_dhidden,
            needs_dweight=needs_dweight,
        )


def _dlogits(
    inputs: Inputs,
    x_RD: Tensor | None,
    stored: tuple[Tensor, ...],
    options: Options,
    common: dict[str, Tensor | None],
    *,
    extras: bool,
) -> Iterator[Block]:
    """Per wave: d loss / d (x W^T) in bf16, first and last column."""
    weight_VD, num_rows = inputs.weight_VD, len(inputs.row_R)
    if num_rows == 0 or options.num_columns == 0:
        return
    width = wave_width(inputs, options, TILE_COLUMNS)
    dz_RW = weight_VD.new_empty(num_rows, width)
    pointers = {name: _pointer(tensor) for name, tensor in common.items()}
    for start in range(0, options.num_columns, width):
        stop = min(start + width, options.num_columns)
        wave = {
            "dz_RW": dz_RW.data_ptr(),
            "rows": num_rows,
            "vocab": options.num_columns,
            "width": width,
            "wave_start": start,
            "wave_tiles": -(-(stop - start) // TILE_COLUMNS),
            "extras": extras,
            "stream": _stream(weight_VD),
        }
        if stored:
            e_RV, max_KR = stored
            _kernels().linear_logprob_stored_dlogits(
                e_RV=e_RV.data_ptr(), max_KR=max_KR.data_ptr(), **pointers, **wave
            )
        else:
            _kernels().linear_logprob_dlogits(
                x_RD=present(x_RD).data_ptr(),
                w_VD=weight_VD.data_ptr(),
                dim=weight_VD.shape[1],
                group=WAVE_GROUP,
                clusters=_num_clusters(weight_VD),
                inverse_temperature=1.0 / options.temperature,
                **pointers,
                **wave,
            )
        yield dz_RW[:, : stop - start], start, stop


def _local_targets(inputs: Inputs, options: Options) -> Tensor:
    """Columns of this rank's weight, int32; -1 where a target is none of them."""
    local_R = inputs.target_R - options.first_column
    outside_R = (local_R < 0) | (local_R >= options.num_columns)
    return local_R.masked_fill_(outside_R, -1).int()


def _kernels() -> Any:
    kernels = cuda_kernels()
    assert kernels is not None  # or the backend would not have been chosen
    return kernels


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _num_clusters(tensor: Tensor) -> int:
    """Clusters that share the items: one per two multiprocessors. No result depends on it."""
    if not tensor.is_cuda:  # the emulator's
        return 2
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count // 2
