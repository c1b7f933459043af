"""Every field of a run, with its unit and default. Frozen data: built once by `config_io`, checked whole, never changed.

Standard library only, so that anything may import it. A recipe (TOML) has one table per class below; leaf code
receives values (`beta=config.algo.beta`), not the config.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to it: the same size for every tensor-parallel size up to 128, so checkpoints do not depend on it."""
REFERENCE_FREE_LOSSES = ("simpo", "orpo")
FORBID_UNKNOWN_KEYS = {"extra": "forbid"}  # read by the validator in config_io


@dataclass(frozen=True, kw_only=True)
class RunSection:
    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN_KEYS

    dir: str = "runs/default"
    """Folder of the run: checkpoints/, tensorboard/, metrics.jsonl, tokenizer/, cache/."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the last complete checkpoint in `dir` if there is one. never: refuse a folder that holds a run."""


class Heads(NamedTuple):
    """The attention of a layer. window: tokens that a token sees, itself included; 0: all before it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-shaped decoder: RMSNorm, SwiGLU, rotary positions, grouped-query attention, no biases but `qkv_bias`.

    Where `init_from` is a Hugging Face folder, its config.json gives every field that decides a shape or a number of the model; a
    recipe may leave them out, and those it names must agree.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN_KEYS

    num_layers: int = 4
    hidden_size: int = 256
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 0
    """0: hidden_size / num_heads."""
    ffn_hidden_size: int = 688
    vocab_size: int = 0
    """0: the tokenizer's. A larger value leaves unused rows. Padded to a multiple of 128 in memory, masked in the loss."""
    qkv_bias: bool = False
    """A bias on the projections to queries, keys and values (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm of every query and key head, before the rotation (Qwen3)."""
    sliding_window: int = 0
    """Tokens that a token may see, itself included; 0: all before it."""
    window_layers: tuple[int, ...] = ()
    """The layers, counted from 0, that have the window; in the others tokens see everything. Empty: all layers."""
    window_heads: int = 0
    """Query heads of the layers in `window_layers`, of hidden_size / window_heads each (Baichuan-M1); 0: as in the others."""
    window_kv_heads: int = 0
    """Key/value heads of those layers; 0: as in the others."""
    rope_base: float = 10000.0
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """What stretches the rotary frequencies. linear: all divided by `rope_factor`. llama3: the low ones are, those between the two
    bounds in part (Llama 3.1)."""
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    """llama3: frequencies that turn less often than this in `rope_original_positions` tokens are low."""
    rope_high_freq_factor: float = 4.0
    """llama3: those that turn more often than this stay as they are."""
    rope_original_positions: int = 0
    """llama3: the context length of the model before it was stretched, tokens."""
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    norm_head: bool = False
    """Output weight rows normalised to length 1 (Baichuan 2's NormHead)."""
    kv_shift: bool = False
    """KV-shifting attention (arXiv 2411.19574): four learned scalars per KV head mix each key and value with its predecessor's."""
    kv_shift_init: Literal["identity", "random"] = "identity"
    """identity: previous 0, current 1 (outputs unchanged). random: the paper's U(0,1) current, 1 - that for previous."""
    init_std: float = 0.02
    init_from: str = ""
    """Where to start: a run's `checkpoints/step_N`, a run folder (its last checkpoint), or a Hugging Face folder (config.json and
    safetensors). Empty: random weights."""

    @property
    def layers_differ(self) -> bool:
        """Whether some layers have weights of other shapes than others."""
        return bool(self.window_layers) and bool(self.window_heads or self.window_kv_heads)

    def heads_of(self, layer: int) -> Heads:
        """The attention of a layer, counted from 0."""
        heads, kv_heads, window = self.num_heads, self.num_kv_heads, self.sliding_window
        if layer in self.window_layers:
            heads, kv_heads = self.window_heads or heads, self.window_kv_heads or kv_heads
        elif self.window_layers:
            window = 0
        return Heads(heads, kv_heads, self.head_dim or self.hidden_size // heads, window)

    def kinds_of_layers(self) -> dict[Heads, int]:
        """How many layers have each attention that there is, in the order of their first."""
        return dict(Counter(self.heads_of(layer) for layer in range(self.num_layers)))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN_KEYS

    train: str | list[str] = ""
    """JSON-lines files, plain or .gz: a path, a glob, or a list of them."""
    tokenizer: str = ""
    """A SentencePiece .model file, or a folder with Hugging Face tokenizer.json. Empty: the tokenizer in `model.init_from`,
    else a SentencePiece model of `model.vocab_size` pieces is trained on the training text and kept in the run folder."""
    template: str = "auto"
    """Chat template: auto (the tokenizer's own for message lists, strings are taken as they are), none, a built-in name
    (chatml, dialogue), or the path of a Jinja2 file. A named template also turns plain strings into turns."""
    pack_length: int = 2048
    """T: tokens per pack. One pack is one micro-batch."""
    max_length: int = 0
    """Longest prefix + response in tokens; 0: pack_length. Longer documents are truncated by the rule in data/truncate.py, and counted."""
    share_prefix: bool = True
    """Store and compute a document's prefix once for all its responses; False gives every response its own copy."""
    max_skipped: float = 0.05
    """Largest share of a run's records that may be unusable (no common start, identical or empty answers, ...): they are
    counted and left out, and above this share the run stops before its first step."""
    workers: int = 0
    """Processes that tokenise; 0: one per core of the machine that prepares the data."""
    cache_dir: str = ""
    """Tokenised data and reference log-probs, keyed by content. Empty: <run.dir>/cache."""


@dataclass(frozen=True, kw_only=True)
class AlgoConfig:
    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN_KEYS

    name: Literal["sft", "dpo"] = "dpo"
    loss: Literal["sigmoid", "conservative", "robust", "hinge", "ipo", "simpo", "orpo"] = "sigmoid"
    """Loss of a preference pair; equations in nova_kernels/preference_loss. simpo and orpo read no reference: there `beta` scales
    the rewards (simpo) or weighs the odds-ratio term (orpo)."""
    beta: float = 0.1
    """Strength of the pull towards the reference, 1/nats."""
    reference: Literal["cache", "online", "host"] = "cache"
    """cache: reference log-probs computed once, kept on disk. online: a frozen copy of the initial weights stays in the GPU's memory. host:
    in the host's memory; every step its weights visit the GPU, one module's at a time."""
    label_smoothing: float = 0.0
    """conservative and robust: the share of pairs whose labels are swapped, above 0 and below 0.5."""
    target_margin: float = 0.0
    """simpo: its gamma, by how much the chosen answer's reward should be larger."""
    length_normalize: bool = False
    """Rewards from log-probs per token instead of their sums. ipo, simpo and orpo always do that."""
    nll_weight: float = 0.0
    """Weight of the chosen answer's NLL per token, added to the loss (RPO); orpo has one such term of its own."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN_KEYS

    steps: int = 0
    """Optimizer steps; 0: as many as `epochs` need."""
    epochs: float = 1.0
    global_batch_packs: int = 8
    """Packs per optimizer step over all data-parallel ranks; a multiple of the data-parallel size."""
    seed: int = 1234
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU. fp8: linear layers in FP8 through Transformer Engine, the rest as in bf16; see [fp8]."""
    recompute: Literal["none", "selective", "full"] = "none"
    """selective: attention only. full: blocks of `recompute_layers` layers keep only their input."""
    recompute_layers: int | Literal["auto"] = "auto"
    """Layers per recomputed block; must divide those of a pipeline stage (of a chunk of it). auto: the divisor next to sqrt(layers), the
    Baichuan alignment report's optimum."""
    kernels: Literal["auto", "reference", "triton", "cuda"] = "auto"
    """Implementation of the ops of nova_kernels; auto: for each op the fastest that has been proven here."""
    non_finite: Literal["stop", "skip"] = "stop"
    """When a loss or gradient is not finite, before any weight changes: stop, or leave this step's update out and go on
    (after 10 such steps in a row the run stops all the same)."""
    check_first_loss: bool = True
    """DPO: stop when the first step's loss is not ln 2, or what `algo.loss` gives at a margin of 0 (wrong reference, dropout, or a
    parallelism fault)."""


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """Read where `train.precision` is "fp8"."""

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN_KEYS

    recipe: Literal["blockwise", "tensorwise", "delayed"] = "blockwise"
    """What shares a scale. blockwise: 128 channels of a token, 128 x 128 of a weight, so that a token's numbers do not depend on the rest
    of its pack. tensorwise: a whole tensor. delayed: a whole tensor, by its largest magnitude in earlier steps (the least work)."""
    first_layers_bf16: int | Literal["auto"] = "auto"
    """The first so many layers stay in bf16. auto: 1, with delayed 0, which cannot have any."""
    last_layers_bf16: int | Literal["auto"] = "auto"
    """The last so many; auto as for the first."""
    param_gather: bool = False
    """Keep these layers' weights in FP8 only, also in checkpoints, and gather them as such after a step: half of bf16's memory and traffic.
    What trains are the optimizer's fp32 weights. Needs parallel.distributed_optimizer."""

    @property
    def edge_layers(self) -> tuple[int, int]:
        """First and last layers in bf16, as numbers."""
        auto = 0 if self.recipe == "delayed" else 1
        first, last = self.first_layers_bf16, self.last_layers_bf16
        return (auto if first == "auto" else first, auto if last == "auto" else last)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, linear warm-up, cosine decay."""

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN_KEYS

    lr: float = 1e-4
    min_lr: float = 0.0
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Not applied to norms, biases and the KV-shift scalars."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Ranks = tensor * context * pipeline * data; the data-parallel size is what remains of the world."""

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN_KEYS

    tensor: int = 1
    context: int = 1
    """Ranks that share one pack, each a stretch of its tokens; in the attention each has all tokens of some heads (Ulysses). For packs whose
    activations do not fit one GPU."""
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Model chunks per pipeline rank; above 1 the schedule is interleaved 1F1B."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals split over the tensor-parallel ranks by token."""
    distributed_optimizer: bool = True
    timeout_s: float = 600.0
    """When a rank has not answered for so long, every rank writes where it was into <run.dir>/hangs/ and the job ends."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN_KEYS

    every_steps: int = 100
    """Save every so many steps, and at the end; 0: only at the end, so that an interrupted run starts over."""
    keep: int = 2
    """Complete checkpoints kept; older ones are deleted after a newer one is complete."""
    asynchronous: bool = True
    """Write in a background process while training goes on."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN_KEYS

    tensorboard: bool = True
    progress: bool = True
    """A live bar on a terminal; otherwise a line every `every_steps` steps."""
    every_steps: int = 10
    profile_steps: tuple[int, int] | None = None
    """First and last step that torch.profiler records, e.g. [10, 12]; the trace goes to <run.dir>/tensorboard. Under nsys: that it captures."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The whole run."""

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN_KEYS

    run: RunSection = field(default_factory=RunSection)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
