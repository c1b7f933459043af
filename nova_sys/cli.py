"""The `nova` command. What is heavy is imported inside the commands: help appears at once."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from nova_sys.errors import exit_on_user_error
from nova_sys.launcher import launch
from nova_sys.log import setup_logging

app = typer.Typer(
    name="nova",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

convert = typer.Typer(no_args_is_help=True, help="Hugging Face folders in and out.")
app.add_typer(convert, name="convert")

Recipe = Annotated[
    Path, typer.Argument(help="A TOML recipe, e.g. launch/recipes/dpo_hh_small.toml.")
]
Checkpoint = Annotated[
    Path,
    typer.Argument(
        help="A run's checkpoints/step_N, a run folder (its last checkpoint), or a Hugging Face folder."
    ),
]
NewFolder = Annotated[Path, typer.Argument(help="A new folder.")]
Dtype = Annotated[
    Literal["keep", "fp32", "bf16", "fp16"],
    typer.Option(help="Of the weights that are written; keep: as they are stored."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one key, e.g. train.steps=100. Repeatable."
    ),
]
ModelOverrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the checkpoint's recipe for this command, e.g. parallel.tensor=2 (with --nproc 2) or "
        "train.precision=bf16. Repeatable.",
    ),
]
Nproc = Annotated[
    int, typer.Option(min=1, help="Local processes: one per GPU, or ranks on the CPU.")
]


@app.callback()
def _common(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of every error.")
    ] = False,
) -> None:
    """Aligns large language models on Megatron-core: supervised fine-tuning, preferences."""
    if debug:
        os.environ["NOVA_DEBUG"] = "1"  # workers inherit it
    setup_logging()


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    nproc: Nproc = 1,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print layout, parameters, packs and steps; train nothing."),
    ] = False,
) -> None:
    """Train what a recipe describes. On many machines: torchrun ... -m nova_sys.train RECIPE."""
    from nova_sys.config_io import check, load_recipe

    config = load_recipe(recipe, overrides or [])
    if dry_run:
        from nova_sys.plan import plan_text

        typer.echo(plan_text(config, nproc))
        return
    check(config, nproc)  # a mistake is told here, before nproc processes have started
    raise typer.Exit(launch("nova_sys.train", [str(recipe), *_set_flags(overrides)], nproc))


@app.command()
def prepare(recipe: Recipe, overrides: Overrides = None) -> None:
    """Tokenise and pack a recipe's data into its cache, and report what was found."""
    from nova_sys.config_io import check, load_recipe
    from nova_sys.config_rules import model_ranks
    from nova_sys.data.packing import pack_documents
    from nova_sys.data.prepare import prepare_data
    from nova_sys.start import starting_tokenizer

    config = load_recipe(recipe, overrides or [])
    check(config, model_ranks(config.parallel))  # any machine may prepare
    capacity = config.data.pack_length
    store = prepare_data(config, starting_tokenizer(config)).store
    lengths = store.document_lengths(config.data.share_prefix)
    plan = pack_documents(lengths, capacity, seed=config.train.seed, epoch=0)
    num_packs = len(plan.offsets) - 1
    typer.echo(f"{store.report}")
    typer.echo(
        f"{num_packs:,} packs of {capacity:,} tokens, {lengths.sum() / (num_packs * capacity):.1%} "
        f"filled; kept in {store.folder}"
    )


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        list[str],
        typer.Option(metavar="PAIRS", help="Preference pairs: JSON lines, or a glob. Repeatable."),
    ],
    reference: Annotated[
        Path | None, typer.Option(help="Reference checkpoint; without it rewards are log-probs.")
    ] = None,
    overrides: ModelOverrides = None,
    nproc: Nproc = 1,
    per_pair: Annotated[
        Path | None, typer.Option(metavar="OUT.jsonl", help="Write one line per pair to this file.")
    ] = None,
    with_ids: Annotated[
        bool, typer.Option("--with-ids", help="Also write each pair's token ids into --per-pair.")
    ] = False,
) -> None:
    """Reward accuracy, margins and losses of a checkpoint on preference pairs.

    The NLL is in nats per token, over all tokens of the answers together: a long answer weighs more than a short one.
    """
    if with_ids and per_pair is None:
        raise ValueError(
            "--with-ids: adds to the lines of --per-pair; give --per-pair OUT.jsonl too"
        )
    if nproc > 1:  # a mistake is told here, before nproc processes have started
        from nova_sys.saved_config import EVALUATE, config_for

        own = ['data.train="pairs"', 'algo.name="dpo"']
        for folder in (checkpoint, reference or checkpoint):
            config_for(EVALUATE, folder, overrides or [], nproc, own)
    argv = [str(checkpoint), *(part for path in data for part in ("--data", path))]
    argv += ["--reference", str(reference)] if reference else []
    argv += ["--per-pair", str(per_pair)] if per_pair else []
    argv += ["--with-ids"] if with_ids else []
    raise typer.Exit(launch("nova_sys.evaluate", [*argv, *_set_flags(overrides)], nproc))


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to continue.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            metavar="F", help="More prompts: one per line, or JSON lines. -: standard input."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation.")] = 128,
    temperature: Annotated[
        float, typer.Option(help="0: the most probable token. 1: the model's distribution.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens that hold this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    num_samples: Annotated[int, typer.Option(help="Continuations per prompt.")] = 1,
    chat: Annotated[
        bool, typer.Option("--chat", help="A text is a user's turn for the chat template.")
    ] = False,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Most tokens to cache at a time; 65536 unless given.")
    ] = None,
    json_lines: Annotated[
        bool | None,
        typer.Option(
            "--json/--text",
            help="What to print. Unless given: text on a terminal, JSON lines elsewhere, nothing with --out.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="OUT.jsonl", help="Write JSON lines to this file.")
    ] = None,
    with_ids: Annotated[
        bool, typer.Option("--with-ids", help="Add token ids to the JSON lines.")
    ] = False,
    overrides: ModelOverrides = None,
    nproc: Nproc = 1,
) -> None:
    """Continue prompts with a checkpoint's model, greedily or by sampling.

    Prompts come from the command line, --file, or standard input.
    """
    if json_lines is None:
        json_lines = not (out or sys.stdout.isatty())
    if with_ids and not (json_lines or out):
        raise ValueError("--with-ids: adds to JSON lines; give --json or --out OUT.jsonl too")
    if nproc > 1:  # a mistake is told here, before nproc processes have started
        from nova_sys.saved_config import GENERATE, config_for

        config_for(GENERATE, checkpoint, overrides or [], nproc)
    argv = [str(checkpoint), *(f"--prompt={text}" for text in prompts or [])]
    argv += [f"--max-new-tokens={max_new_tokens}", f"--temperature={temperature}"]
    argv += [f"--top-p={top_p}", f"--seed={seed}", f"--num-samples={num_samples}"]
    argv += [f"--batch-tokens={batch_tokens}"] if batch_tokens is not None else []
    argv += [f"--out={out}"] if out else []
    flags = {"--chat": chat, "--json": json_lines, "--with-ids": with_ids}
    argv += [name for name, given in flags.items() if given]
    with tempfile.TemporaryDirectory(prefix="nova_") as folder:
        if file == "-" or (file is None and not prompts and not sys.stdin.isatty()):
            piped = Path(folder) / "stdin"  # a file, because every rank reads it
            piped.write_bytes(sys.stdin.buffer.read())
            argv.append(f"--stdin-file={piped}")
        elif file is not None:
            argv.append(f"--file={file}")
        elif not prompts:
            raise ValueError(
                "no prompts: give them after the checkpoint, with --file, or on standard input"
            )
        raise typer.Exit(launch("nova_sys.generate", [*argv, *_set_flags(overrides)], nproc))


@convert.command("from-hf")
def from_hf(
    source: Annotated[
        Path, typer.Argument(metavar="DIR", help="A Hugging Face folder: config.json, safetensors.")
    ],
    out: NewFolder,
    dtype: Dtype = "keep",
) -> None:
    """Make a checkpoint of a Hugging Face folder. (A recipe's model.init_from, and nova evaluate and generate, take such a folder as it is.)

    Families: Llama, Mistral, Qwen2, Qwen3, Baichuan 2 7B, Baichuan-M1. One process on the CPU, in the memory of a few tensors.
    """
    from nova_sys.hf.convert import from_hf

    from_hf(source, out, dtype=dtype)
    typer.echo(f"wrote {out}")


@convert.command("to-hf")
def to_hf(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A run's checkpoints/step_N, or a run folder: its last checkpoint."),
    ],
    out: NewFolder,
    dtype: Dtype = "keep",
    shard_gb: Annotated[
        float, typer.Option(min=1e-6, help="Largest safetensors file, 10^9 bytes.")
    ] = 5.0,
) -> None:
    """Write a checkpoint as a folder that transformers loads: safetensors, config.json, tokenizer, chat template.

    Of any layout, and one process on the CPU, in the memory of a few tensors. Baichuan's architectures need the code files of the folder
    that training began with, and trust_remote_code.
    """
    from nova_sys.hf.convert import to_hf

    to_hf(checkpoint, out, dtype=dtype, shard_bytes=int(shard_gb * 1e9))
    typer.echo(f"wrote {out}")


@app.command()
def keys() -> None:
    """List every key of a recipe with its default, type and meaning."""
    from nova_sys.config_io import describe_fields

    for field in describe_fields():
        typer.echo(f"{f'{field.key} = {field.default}':<42} {field.type}. {field.doc}".rstrip())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, runs and the report.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Of the data and of both runs.")] = 0,
) -> None:
    """Align a small model from nothing: make data, SFT, then DPO on two processes, and report."""
    from nova_sys.demo import run_demo

    raise typer.Exit(run_demo(out, seed=seed))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[--all [--out DIR] [--minutes M] | --op OP] ...",
)
def bench(
    arguments: typer.Context,
    whole: Annotated[
        bool, typer.Option("--all", help="Tests and measures all on a Hopper GPU: make gpu-check.")
    ] = False,
) -> None:
    """Measure one op beside its peers, or with --all everything on a GPU. From the source tree; options go to benchmarks/run.py or gpu_check.py."""
    from nova_sys.bench import run_benchmark

    raise typer.Exit(run_benchmark(arguments.args, whole_machine=whole))


def main() -> None:
    """Entry point of the `nova` script."""
    with exit_on_user_error():
        app()


def _set_flags(overrides: list[str] | None) -> list[str]:
    return [part for override in overrides or [] for part in ("--set", override)]


if __name__ == "__main__":
    main()
