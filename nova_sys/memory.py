"""What a rank needs in GPU memory, by formula: states of the training, activations kept for the backward pass, the output layer's buffer.

T tokens of a pack on this rank, D hidden, F ffn, N query and K key/value heads of dimension H, a bytes of an activation, t tensor-parallel
ranks (s = t under sequence parallelism, else 1). A layer keeps, per token:

    inputs of the two norms and what they give      4 D a / s            (and 8 bytes / s: 1 / rms)
    q, k, v as projected; q and k rotated; output   (3 N H + 3 K H) a / t
    sine and cosine of its rotation                 4 H
    SwiGLU                                          3 F a / t            (gate, up, and the product; on a CPU two more)

with KV shifting one more K H, with norms of queries and keys one more N H (and K H with both). Selective recomputation drops what the
attention computed from q, k and v but its output; full recomputation keeps the input of each block of layers, and one block as above.

Not in it: temporaries of the operation that runs, NCCL's and CUDA's own memory, fragmentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from nova_sys.config import VOCAB_MULTIPLE, Heads, ModelConfig, RunConfig

GRADIENT_BYTES = 4
MOMENT_BYTES = 8
MASTER_BYTES = 4
OUTPUT_BYTES = 256 * 2**20
"""linear_logprob's buffer, at most."""
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. optimizer: fp32 moments, and beside bf16 weights an fp32 copy of them. output: the output layer's buffer."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    output: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))

    def __str__(self) -> str:
        parts = (f"{part.name} {getattr(self, part.name) / GIB:.2g}" for part in fields(self))
        return f"{self.total / GIB:.3g} GiB = {' + '.join(parts)}"


@dataclass(frozen=True)
class Device:
    """What differs between devices. bytes: of a weight, and of an activation. On a CPU norms and SwiGLU keep more."""

    bytes: int = 2
    is_gpu: bool = True


def fullest_rank(
    config: RunConfig, vocab_size: int, world_size: int, device: Device | None = None
) -> Memory:
    """The largest total of any pipeline stage; without a device that of the run's precision on a GPU."""
    stages = range(config.parallel.pipeline)
    device = device or Device(bytes=4 if config.train.precision == "fp32" else 2)
    return max(
        (memory_of(config, vocab_size, world_size, stage, device) for stage in stages),
        key=lambda memory: memory.total,
    )


def memory_of(
    config: RunConfig, vocab_size: int, world_size: int, stage: int, device: Device
) -> Memory:
    """A rank of this pipeline stage."""
    parallel, algo = config.parallel, config.algo
    parameters = stage_parameters(config, vocab_size, stage)
    replicas = world_size // (parallel.tensor * parallel.pipeline)  # context-parallel ranks, too
    shards = replicas if parallel.distributed_optimizer else 1
    state = MOMENT_BYTES + (MASTER_BYTES if device.bytes == 2 else 0)
    online = algo.name == "dpo" and algo.reference == "online"
    return Memory(
        weights=parameters * device.bytes,
        gradients=parameters * GRADIENT_BYTES,
        optimizer=parameters * state // shards,
        reference=parameters * device.bytes if online else 0,
        activations=_activations(config, world_size, stage, device),
        output=_output(config, vocab_size, stage, device),
    )


def layers_of(config: RunConfig, stage: int) -> list[int]:
    """The layers on a stage, of all its chunks."""
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline
    per_chunk = layers_per_chunk(config)
    starts = [(chunk * stages + stage) * per_chunk for chunk in range(chunks)]
    return [start + i for start in starts for i in range(per_chunk)]


def layers_per_chunk(config: RunConfig) -> int:
    return config.model.num_layers // (config.parallel.pipeline * config.parallel.virtual_pipeline)


def recompute_block(config: RunConfig) -> int:
    """Layers per recomputed block. Keeping L/n inputs and recomputing n layers at a time costs least memory at n = sqrt(L); Megatron
    wants a divisor of the layers that it runs in one piece."""
    per_chunk, chosen = layers_per_chunk(config), config.train.recompute_layers
    if chosen != "auto":
        return min(chosen, per_chunk)
    best = math.sqrt(config.model.num_layers)
    divisors = (n for n in range(1, per_chunk + 1) if per_chunk % n == 0)
    return min(divisors, key=lambda n: abs(n - best))


def stage_parameters(config: RunConfig, vocab_size: int, stage: int) -> int:
    """Parameters that a rank of this stage holds, the padding of the vocabulary included."""
    model, tensor = config.model, config.parallel.tensor
    width, last = model.hidden_size, config.parallel.pipeline - 1
    count = sum(_layer_parameters(model, layer, tensor) for layer in layers_of(config, stage))
    table = math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE * width // tensor
    count += table if stage == 0 else 0
    if stage == last:
        count += width + (0 if model.tied_embeddings and last == 0 else table)
    return count


def _layer_parameters(model: ModelConfig, layer: int, tensor: int) -> int:
    heads, width = model.heads_of(layer), model.hidden_size
    projected = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    count = width * (projected + heads.num_heads * heads.head_dim + 3 * model.ffn_hidden_size)
    count += projected if model.qkv_bias else 0
    count += 4 * heads.num_kv_heads if model.kv_shift else 0
    return count // tensor + 2 * width + (2 * heads.head_dim if model.qk_norm else 0)


# -- activations ---------------------------------------------------------------------------------------------------------


def _activations(config: RunConfig, world_size: int, stage: int, device: Device) -> int:
    model, parallel = config.model, config.parallel
    tokens = config.data.pack_length // parallel.context
    split = parallel.tensor if parallel.sequence else 1
    layers = layers_of(config, stage)
    per_chunk = layers_per_chunk(config)
    passes = chunks_in_flight(config, world_size, stage)
    kept = [_layer_bytes(config, model.heads_of(layer), device) for layer in layers]
    mean = sum(kept) / len(kept)
    last = 0.0
    if stage == parallel.pipeline - 1:
        last = _norm_bytes(model.hidden_size, device) / split
    if config.train.recompute != "full":
        return int(tokens * (passes * per_chunk * mean + last))
    block = recompute_block(config)
    inputs = passes * (per_chunk // block) * model.hidden_size * device.bytes / split
    return int(tokens * (inputs + max(last, block * mean)))


def chunks_in_flight(config: RunConfig, world_size: int, stage: int) -> int:
    """Forward passes of a chunk whose backward is still to come, at most, on Megatron's 1F1B schedules."""
    parallel = config.parallel
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    replicas = world_size // (parallel.tensor * parallel.context * stages)
    packs = config.train.global_batch_packs // replicas
    if chunks == 1:
        return min(packs, stages - stage)
    return min(packs * chunks, 2 * (stages - stage - 1) + (chunks - 1) * stages + 1)


def _layer_bytes(config: RunConfig, heads: Heads, device: Device) -> float:
    """Per token, of one layer. Under full recomputation what a recomputed one keeps."""
    model, parallel = config.model, config.parallel
    split = parallel.tensor if parallel.sequence else 1
    norms = 2 * _norm_bytes(model.hidden_size, device) / split
    widths = 3 if device.is_gpu else 5  # unfused, silu(gate) and a copy of up besides
    swiglu = widths * model.ffn_hidden_size * device.bytes / parallel.tensor
    attention = _attention_bytes(config, heads, device) / parallel.tensor
    tables = 0 if config.train.recompute == "selective" else 4 * heads.head_dim * parallel.context
    return norms + attention + tables + swiglu


def _norm_bytes(width: int, device: Device) -> int:
    """Input and output of a norm, and 1 / rms in fp32."""
    return (2 if device.is_gpu else 3) * width * device.bytes + 4


def _attention_bytes(config: RunConfig, heads: Heads, device: Device) -> int:
    """Of all the tensor-parallel ranks together."""
    model, context, selective = (
        config.model,
        config.parallel.context,
        config.train.recompute == "selective",
    )
    query, key = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    copied = query if heads.num_heads > heads.num_kv_heads else 0  # q is cut out of a wider row
    projected, values, fp32 = query + 2 * key, query, 0  # values: the output
    if context > 1 and not selective:  # all tokens of some heads: what was projected may go
        values += key * (1 + model.kv_shift) + (query if device.is_gpu else 0)
        projected = projected if model.qk_norm else 0
    if model.qk_norm:
        values += copied + (0 if device.is_gpu else query + key)
        fp32 += heads.num_heads + heads.num_kv_heads
    if selective:
        values += query + key if model.qk_norm else copied
    else:
        values += query + key + key * (model.kv_shift + (model.kv_shift and model.qk_norm))
        fp32 += heads.num_heads if device.is_gpu else 0  # log of the softmax's sum
    return (projected + values) * device.bytes + 4 * fp32


def _output(config: RunConfig, vocab_size: int, stage: int, device: Device) -> int:
    """On the last stage: the logits' exponentials of response rows, as far as the buffer holds them."""
    if stage != config.parallel.pipeline - 1:
        return 0
    rows = config.data.pack_length // config.parallel.context
    return min(OUTPUT_BYTES, rows * vocab_size // config.parallel.tensor * device.bytes)
