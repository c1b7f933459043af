"""Continues prompts with a checkpoint's model: greedily or by sampling, in batches, on any layout.

`nova generate CHECKPOINT PROMPT...`; with `--nproc N` it runs as `python -m nova_sys.generate` on every rank.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from nova_sys.config import RunConfig
from nova_sys.data.prompts import Prompt, read_prompts
from nova_sys.data.records import Message
from nova_sys.data.render import Renderer
from nova_sys.data.tokenizer import Tokenizer, load_tokenizer
from nova_sys.decode import Continuation, Decoder, continue_prompts
from nova_sys.errors import exit_on_user_error
from nova_sys.hf.carried import more_stop_ids
from nova_sys.inference import load_model
from nova_sys.log import current_rank, setup_logging
from nova_sys.outputs import refuse_output, say, whole_file
from nova_sys.parallel import Parallel, current_world_size, parallel_run
from nova_sys.sampling import Sampling, uniforms
from nova_sys.saved_config import GENERATE, config_for, files_of, resolve_any, tokenizer_of

logger = logging.getLogger(__name__)

BATCH_TOKENS = 65_536
"""Cached tokens of a batch: sequences times the longest of prompt + new tokens. 8 GiB for 32 layers of 8 KV heads of 128 in bf16."""
MAX_SEQUENCES = 256
"""Of a batch. A step reads all weights, whatever the batch: up to about so many sequences on a GPU, more of them are free."""

TELL_EVERY_S = 10.0

Item = tuple[int, int]
"""(prompt, sample), both counted from 0."""


@dataclass(frozen=True)
class Completion:
    """One sample for one prompt.

    ids: the new tokens, with the stop token if there was one; the text is without it.   logp: their summed log-probability under the
    model (temperature 1, whole vocabulary), nats.   finish_reason: stop, or length when max_new_tokens were used up.
    """

    index: int
    """Of the prompt, from 0."""
    sample: int
    prompt: str | list[Message]
    text: str
    finish_reason: str
    prompt_ids: list[int]
    ids: list[int]
    logp: float

    def as_json(self, *, with_ids: bool) -> str:
        record: dict[str, Any] = {
            "index": self.index,
            "sample": self.sample,
            "prompt": self.prompt,
            "completion": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": len(self.prompt_ids),
            "completion_tokens": len(self.ids),
            "logp": self.logp,
        }
        if with_ids:
            record |= {"prompt_ids": self.prompt_ids, "completion_ids": self.ids}
        return json.dumps(record, ensure_ascii=False)

    def as_text(self) -> str:
        """A text with its continuation; of a dialogue the answer alone."""
        return (self.prompt if isinstance(self.prompt, str) else "") + self.text


def generate(
    checkpoint: str | Path,
    prompts: Sequence[str | list[Message] | Prompt],
    sampling: Sampling | None = None,
    *,
    overrides: Sequence[str] = (),
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[Completion]:
    """Completions in the order of the prompts, each prompt's samples in a row, as their batches are done.

    Called on every rank of the job (one, unless started otherwise); every rank gets the same. The tokens do not depend on the layout
    or on batch_tokens, up to rounding.

    Args:     prompts: plain texts, or dialogues (lists of messages) for the chat template the checkpoint was trained with.
              sampling: greedy, 128 new tokens, unless given. overrides: `key=value`, e.g. "parallel.tensor=2".
              batch_tokens: most tokens to cache at a time; a batch has at least one sequence.
    Raises:   ValueError for a bad checkpoint, layout or prompt; before the model is loaded.
    """
    sampling = sampling or Sampling()
    asked = [
        prompt if isinstance(prompt, Prompt) else Prompt(prompt, f"prompt {number}")
        for number, prompt in enumerate(prompts, start=1)
    ]
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens = {batch_tokens}: must be 1 or more")
    folder, config = config_for(GENERATE, checkpoint, overrides, current_world_size())
    renderer = Renderer(load_tokenizer(tokenizer_of(folder)), config.data.template, "pairs")
    ids = [_prompt_ids(prompt, renderer, config, sampling) for prompt in asked]
    with parallel_run(config.parallel, seed=config.train.seed) as parallel:
        decoder = Decoder(
            load_model(folder, config, parallel),
            parallel,
            pack_length=config.data.pack_length,
            num_ids=renderer.tokenizer.vocab_size,
        )
        stop_ids = renderer.stop_ids() | more_stop_ids(folder)
        done = continue_all(decoder, ids, stop_ids, sampling, batch_tokens)
        for item, continuation in done:
            yield _completion(item, continuation, asked, ids, renderer.tokenizer)


def continue_all(
    decoder: Decoder,
    ids: Sequence[list[int]],
    stop_ids: set[int],
    sampling: Sampling,
    batch_tokens: int,
) -> Iterator[tuple[Item, Continuation]]:
    """Every sample of every prompt, in order, as their batches are done; data-parallel replicas take batches in turns."""
    parallel = decoder.parallel
    batches = plan_batches(
        [len(prompt) for prompt in ids], sampling, batch_tokens, parallel.data_size
    )
    for first in range(0, len(batches), parallel.data_size):
        group = batches[first : first + parallel.data_size]
        mine = group[parallel.data_rank] if parallel.data_rank < len(group) else []
        with parallel.watchdog.phase("generation"):
            done = _continue_batch(decoder, ids, mine, stop_ids, sampling)
            everything = _from_every_replica(done, parallel)
        yield from everything


def _prompt_ids(
    prompt: Prompt, renderer: Renderer, config: RunConfig, sampling: Sampling
) -> list[int]:
    if not prompt.content:
        raise ValueError(
            f"{prompt.where} is empty; a prompt has some text. Fill it or leave it out"
        )
    try:
        ids = renderer.prompt_ids(prompt.content, prompt.tools)
    except ValueError as error:
        raise ValueError(f"{prompt.where}: {error}") from error
    room = config.data.pack_length - sampling.max_new_tokens
    if not 0 < len(ids) <= room:
        raise ValueError(
            f"{prompt.where} has {len(ids)} tokens; with {sampling.max_new_tokens} new ones they must be at most "
            f"data.pack_length = {config.data.pack_length}, the positions of this model, and a prompt at least 1: shorten it, lower "
            f"--max-new-tokens, or raise the limit with --set data.pack_length={len(ids) + sampling.max_new_tokens}"
        )
    return ids


def plan_batches(
    lengths: Sequence[int], sampling: Sampling, batch_tokens: int, data_size: int
) -> list[list[Item]]:
    """Items in input order, in batches that cache at most `batch_tokens` and are no larger than one replica's share of all."""
    items = [(p, s) for p in range(len(lengths)) for s in range(sampling.num_samples)]
    most = min(MAX_SEQUENCES, -(-len(items) // data_size))
    batches: list[list[Item]] = []
    longest = 0
    for item in items:
        longest = max(longest, lengths[item[0]] + sampling.max_new_tokens)
        if (
            not batches
            or len(batches[-1]) == most
            or (len(batches[-1]) + 1) * longest > batch_tokens
        ):
            batches.append([])
            longest = lengths[item[0]] + sampling.max_new_tokens
        batches[-1].append(item)
    return batches


def _continue_batch(
    decoder: Decoder,
    ids: Sequence[list[int]],
    items: Sequence[Item],
    stop_ids: set[int],
    sampling: Sampling,
) -> list[tuple[Item, Continuation]]:
    if not items:
        return []
    asked = dict.fromkeys(prompt for prompt, _ in items)  # each prompt is computed once
    places = {prompt: place for place, prompt in enumerate(asked)}
    done = continue_prompts(
        decoder,
        [ids[prompt] for prompt in asked],
        [places[prompt] for prompt, _ in items],
        uniforms(sampling, items) if sampling.temperature > 0 else None,
        stop_ids,
        sampling,
    )
    return list(zip(items, done, strict=True))


def _from_every_replica(
    done: list[tuple[Item, Continuation]], parallel: Parallel
) -> list[tuple[Item, Continuation]]:
    """What the data-parallel replicas have done, in the order of their ranks, which is the input's; on every rank."""
    parts: list[Any] = [done]
    if parallel.data_size > 1:
        parts = [None] * parallel.data_size
        dist.all_gather_object(parts, done, group=parallel.groups.dp)
    return [result for part in parts for result in part]


def _completion(
    item: Item,
    continuation: Continuation,
    prompts: Sequence[Prompt],
    ids: Sequence[list[int]],
    tokenizer: Tokenizer,
) -> Completion:
    number, sample = item
    spoken = continuation.ids[:-1] if continuation.finish_reason == "stop" else continuation.ids
    return Completion(
        index=number,
        sample=sample,
        prompt=prompts[number].content,
        text=text_behind(ids[number], spoken, tokenizer),
        finish_reason=continuation.finish_reason,
        prompt_ids=ids[number],
        ids=continuation.ids,
        logp=continuation.logp,
    )


def text_behind(prompt_ids: list[int], ids: list[int], tokenizer: Tokenizer) -> str:
    """What `ids` add to the text of the prompt: decoded alone, a first piece that begins with a space may lose it."""
    before, whole = tokenizer.decode(prompt_ids), tokenizer.decode([*prompt_ids, *ids])
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(ids)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m nova_sys.generate", description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--stdin-file", type=Path)  # what standard input held, for every rank
    for name, value in vars(Sampling()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--with-ids", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args(argv)
    with exit_on_user_error():
        setup_logging()
        sampling = Sampling(**{name: getattr(args, name) for name in vars(Sampling())})
        prompts = [Prompt(text, f"prompt {n}") for n, text in enumerate(args.prompt, start=1)]
        prompts += read_prompts(args.file) if args.file else []
        prompts += read_prompts(args.stdin_file, "standard input") if args.stdin_file else []
        if args.out:
            inputs = [args.file] if args.file else []
            inputs += files_of(resolve_any(args.checkpoint))
            refuse_output("--out", args.out, inputs)
        completions = generate(
            args.checkpoint,
            [prompt.as_turn() for prompt in prompts] if args.chat else prompts,
            sampling,
            overrides=args.set,
            batch_tokens=args.batch_tokens,
        )
        writes = args.out and current_rank() == 0
        with whole_file("--out", args.out) if writes else nullcontext() as out:
            _write(completions, len(prompts) * sampling.num_samples, out, args)


def _write(
    completions: Iterator[Completion], total: int, out: TextIO | None, args: argparse.Namespace
) -> None:
    """Each completion as soon as its batch is done, by the main rank: JSON lines to `out`, text or JSON lines to standard output."""
    began = told = time.monotonic()
    num_tokens = 0
    for number, completion in enumerate(completions, start=1):
        num_tokens += len(completion.ids)
        if current_rank() != 0:
            continue
        if out is not None:
            print(completion.as_json(with_ids=args.with_ids), file=out, flush=True)
        if args.json:
            say(completion.as_json(with_ids=args.with_ids))
        elif out is None:
            say(completion.as_text())
        if time.monotonic() - told > TELL_EVERY_S or (out is not None and number == total):
            told = time.monotonic()
            speed = num_tokens / (told - began)
            logger.info("generate: %d of %d, %.0f tokens/s", number, total, speed)


if __name__ == "__main__":
    main(sys.argv[1:])
