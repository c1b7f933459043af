"""Transformer Engine: the layers of an FP8 run, what they need of the machine, and the scales of delayed scaling.

Transformer Engine computes the four linear layers of a transformer layer in FP8. Attention, norms' statistics, residuals, the output layer and
the loss stay as they are in a bf16 run, and so do names and shapes in checkpoints. It is used when `train.precision` is "fp8", and only then
needed. Checked against Transformer Engine 2.11.0 and megatron-core 0.16.1.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.fp8_utils import get_fp8_context, is_float8tensor
from megatron.core.tensor_parallel import layers as mcore_layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import get_model_config

from nova_sys.config import Fp8Config

CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0)}
"""Of the GPU, at least."""
FORMAT = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3"}
"""hybrid: gradients in E5M2, which trades precision for range. Scales of 128 values make that unnecessary."""
AMAX_HISTORY = 1024
"""delayed: a tensor is scaled by its largest magnitude in so many forward passes."""
BY_ITSELF = "torch, in a pass of its own"
"""How weight gradients reach the gradient buffers where no package adds them inside the matrix product."""
HEADROOM = 1.25
"""delayed: how far above the magnitudes seen so far the scales of a run's first passes reach, at least."""
FP8_MAX = 448.0
"""The largest E4M3 number."""
INSTALL = 'the README says how to install it ("FP8 through Transformer Engine")'


def check_precision(precision: str, fp8: Fp8Config, device: torch.device) -> None:
    """Raises: ValueError when an FP8 run is not possible here, before any data is prepared."""
    if precision != "fp8":
        return
    missing = [problem for problem in (_gpu_problem(fp8.recipe, device), _te_problem()) if problem]
    missing = missing or _refusals(fp8.recipe)
    if missing:
        raise ValueError(
            f'train.precision = "fp8" (fp8.recipe = "{fp8.recipe}"): {", and ".join(missing)}; or set train.precision to "bf16" or "auto"'
        )


def _gpu_problem(recipe: str, device: torch.device) -> str | None:
    needed = CAPABILITY[recipe]
    wanted = f"needs an NVIDIA GPU of compute capability {needed[0]}.{needed[1]} or more"
    if device.type != "cuda":
        return f"{wanted}, and this process runs on the CPU"
    found = torch.cuda.get_device_capability(device)
    if found < needed:
        return f"{wanted}, and this one has {found[0]}.{found[1]}"
    return None


def _te_problem() -> str | None:
    if importlib.util.find_spec("transformer_engine") is None:
        return f"needs Transformer Engine, which is not installed: {INSTALL}"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a build for another torch fails in many ways
        return (
            f"needs Transformer Engine, which is installed and does not load ({error}): {INSTALL}"
        )
    return None


def _refusals(recipe: str) -> list[str]:
    """Of Transformer Engine itself, which also looks at CUDA's version; on a GPU that has the capability."""
    te = importlib.import_module("transformer_engine.pytorch")
    usable = te.is_fp8_block_scaling_available if recipe == "blockwise" else te.is_fp8_available
    there, reason = usable(return_reason=True)
    return [] if there else [f"is refused by Transformer Engine: {reason.rstrip('.')}"]


def mcore_fields(fp8: Fp8Config) -> dict[str, Any]:
    """The fields of Megatron's configuration that turn FP8 on."""
    first, last = fp8.edge_layers
    return {
        "fp8": FORMAT[fp8.recipe],
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.param_gather,
        "fp8_amax_history_len": AMAX_HISTORY,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": bool(first or last),
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }


def te_spec(layer: ModuleSpec) -> ModuleSpec:
    """`specs.layer_spec` with Transformer Engine's linear layers, and the two norms inside the layers that they precede."""
    te = _extension()
    ours: Any = layer.submodules
    attention: Any = ours.self_attention
    mlp: Any = ours.mlp
    normed, plain = te.TELayerNormColumnParallelLinear, te.TERowParallelLinear
    return replace(
        layer,
        submodules=replace(
            ours,
            input_layernorm=IdentityOp,
            self_attention=replace(
                attention,
                submodules=replace(attention.submodules, linear_qkv=normed, linear_proj=plain),
            ),
            pre_mlp_layernorm=IdentityOp,
            mlp=replace(
                mlp, submodules=replace(mlp.submodules, linear_fc1=normed, linear_fc2=plain)
            ),
            sharded_state_dict_keys_map={  # names in checkpoints, and those that initial weights are drawn by
                "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
                "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
            },
        ),
    )


def _extension() -> Any:
    """Megatron's wrappers of Transformer Engine's layers. By name, because importing them takes a while and fp8 is rare."""
    return importlib.import_module("megatron.core.extensions.transformer_engine")


@contextmanager
def plain_weights(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """While the block runs, weights that are kept in FP8 (`fp8.param_gather`) stand there as ordinary ones, to be set or read.

    At its end they are rounded, and what the block left becomes what the optimizer's fp32 weights start from.
    """
    held = [
        (module, name, weight)
        for chunk in chunks
        for module in chunk.modules()
        for name, weight in module.named_parameters(recurse=False)
        if is_float8tensor(weight)
    ]
    for module, name, weight in held:
        module._parameters[name] = torch.nn.Parameter(_exact(weight))
    yield
    with torch.no_grad():
        for module, name, weight in held:
            exact = module._parameters[name]
            assert exact is not None
            weight.copy_(exact)
            weight._high_precision_init_val = exact.detach().cpu()  # pyright: ignore[reportAttributeAccessIssue]
            module._parameters[name] = weight


def _exact(weight: Any) -> torch.Tensor:
    """As it was set, if the optimizer has not taken that yet; else what FP8 left of it."""
    exact = weight.get_high_precision_init_val()
    rounded = weight.dequantize().detach()
    return rounded if exact is None else exact.to(rounded)


def accumulate_in_place(chunks: Sequence[torch.nn.Module]) -> str:
    """Lets linear layers add weight gradients to the gradient buffers inside the matrix product, where something here can; says what does.

    For chunks that have gradient buffers, on a GPU.
    """
    layers: list[Any] = [module for chunk in chunks for module in chunk.modules()]
    of_te = [layer for layer in layers if hasattr(layer, "fuse_wgrad_accumulation")]
    for layer in of_te:
        layer.fuse_wgrad_accumulation = True
    if of_te:
        return "Transformer Engine"
    if not hasattr(mcore_layers, "fused_weight_gradient_mlp_cuda"):  # apex's; Megatron has tried
        return BY_ITSELF
    for layer in layers:
        if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)):
            layer.gradient_accumulation_fusion = True
    return "NVIDIA apex"


def scaled_layers(chunks: Sequence[torch.nn.Module]) -> dict[tuple[int, str], Any]:
    """The layers that keep scales from one forward pass to the next, by chunk and name: Transformer Engine's with delayed scaling."""
    config = get_model_config(chunks[0])
    if not config.fp8 or config.fp8_recipe != "delayed":
        return {}
    return {
        (index, name): module
        for index, chunk in enumerate(chunks)
        for name, module in chunk.named_modules()
        if hasattr(module, "reset_fp8_meta_tensors")
    }


SCALE_PARTS = ("scale", "amax_history")
Scales = dict[tuple[int, str], dict[str, list[torch.Tensor]]]
"""By layer: {"scaling_fwd": [scale (3,), amax history (AMAX_HISTORY, 3)], "scaling_bwd": [(2,), (AMAX_HISTORY, 2)]}, fp32."""


def read_scales(chunks: Sequence[torch.nn.Module]) -> Scales:
    """A copy. Layers that have not run yet get the scales that they would start with, 1."""
    layers = scaled_layers(chunks)
    with torch.no_grad(), get_fp8_context(get_model_config(chunks[0])):
        for layer in layers.values():
            layer.init_fp8_metadata()
    return {place: layer.get_fp8_meta_tensors() for place, layer in layers.items()}


def write_scales(chunks: Sequence[torch.nn.Module], scales: Scales) -> None:
    for place, layer in scaled_layers(chunks).items():
        layer.reset_fp8_meta_tensors(scales[place])


def settle_scales(chunks: Sequence[torch.nn.Module], forward: Callable[[], object]) -> None:
    """Gives layers with delayed scaling the scales of these weights and these packs, which then hold for AMAX_HISTORY - 1 forward passes.

    Each magnitude that `forward` shows is rounded up to a power of two, at least HEADROOM times it, and written into the history. So what the
    next passes find, a little more or less, changes no scale: a reference pass and the first step run with the same ones, bit for bit.
    Collectives: Transformer Engine's maximum over the ranks that share a layer.
    """
    if not scaled_layers(chunks):
        return
    for _ in range(2):  # with scales of 1, then with those that the first pass suggests
        forward()
        _extension().FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=True)
    scales = read_scales(chunks)
    for scale, history in (kept["scaling_fwd"] for kept in scales.values()):
        amax = history.amax(0)
        rounded = torch.exp2(torch.ceil(torch.log2(amax * HEADROOM)))
        seen = (amax > 0) & amax.isfinite()
        history.zero_()[-1] = torch.where(seen, rounded, 0.0)  # the last row is forgotten last
        scale.copy_(torch.where(seen, FP8_MAX / rounded, 1.0))
    write_scales(chunks, scales)


def scale_shards(chunks: Sequence[Any]) -> dict[str, ShardedTensor]:
    """`read_scales` for a checkpoint, by names that do not depend on the layout. Every rank that shares a layer has the same scales."""
    places = [chunk.sharded_state_dict() if scaled_layers([chunk]) else {} for chunk in chunks]
    return {
        f"{index}.{name}.{key}.{part}": _shard_like(
            places[index][f"{name}._extra_state"], f"{key}.{part}", tensor
        )
        for (index, name), kept in read_scales(chunks).items()
        for key, tensors in kept.items()
        for part, tensor in zip(SCALE_PARTS, tensors, strict=True)
    }


def _shard_like(place: ShardedObject, name: str, tensor: torch.Tensor) -> ShardedTensor:
    """A tensor that belongs to a layer, where Megatron would put a pickled object of it."""
    axes = zip(place.global_offset, place.global_shape, strict=True)
    offsets = [(axis, offset, size) for axis, (offset, size) in enumerate(axes)]
    return ShardedTensor.from_rank_offsets(
        f"scales.{place.key.removesuffix('._extra_state')}.{name}",
        tensor,
        *offsets,
        replica_id=place.replica_id,
        prepend_axis_num=len(offsets),
    )


def load_scales(chunks: Sequence[torch.nn.Module], loaded: dict[str, torch.Tensor]) -> None:
    """What `scale_shards` saved, into layers that may not have run yet."""
    scales = {
        (index, name): {
            key: [loaded[f"{index}.{name}.{key}.{part}"] for part in SCALE_PARTS] for key in kept
        }
        for (index, name), kept in read_scales(chunks).items()
    }
    write_scales(chunks, scales)
