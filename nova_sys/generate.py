"""Greedy generation with packed prompts: every step runs one forward pass over packs of (prompt + answer so far).

All prompts advance together, each a trunk segment of a pack; there is no key/value cache, so a step costs a full forward. That is right
for short answers of small models (evaluation during development).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from nova_sys.data.batch import DevicePack, Pack, padding_segments
from nova_sys.data.packing import pack_documents
from nova_sys.data.records import Message
from nova_sys.data.render import Renderer
from nova_sys.inference import LoadedModel, checkpoint_config, load_model
from nova_sys.parallel import Parallel, parallel_run
from nova_sys.step import run_schedule


def generate_greedy(
    checkpoint: str | Path,
    prompts: Sequence[str | list[Message]],
    max_new_tokens: int,
    *,
    overrides: Sequence[str] = (),
) -> list[str]:
    """The most probable continuation of each prompt, in order, without the token that ends it.

    Args:     prompts: plain texts, or dialogues (lists of messages) that go through the chat template the checkpoint was trained
              with. overrides: `key=value`, e.g. "parallel.tensor=2" when called on two ranks.
    Raises:   ValueError when a prompt leaves no room for an answer in a pack.
    """
    folder, config = checkpoint_config(checkpoint, overrides)
    with parallel_run(config.parallel, seed=config.train.seed) as parallel:
        model = load_model(folder, config, parallel)
        renderer = Renderer(model.tokenizer, config.data.template, "pairs")
        ids = [renderer.prompt_ids(prompt) for prompt in prompts]
        answers = greedy_ids(model, ids, max_new_tokens, renderer.stop_ids(), parallel)
        return [model.tokenizer.decode(answer) for answer in answers]


def greedy_ids(
    model: LoadedModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    stop_ids: set[int],
    parallel: Parallel,
) -> list[list[int]]:
    """Token ids of each prompt's continuation, cut before the first of `stop_ids`; the same on every rank."""
    pack_length = model.config.data.pack_length
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= pack_length - max_new_tokens:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens; it needs at least 1, and with {max_new_tokens} new ones must fit into "
                f"data.pack_length={pack_length}: shorten it, or set data.pack_length higher"
            )
    lengths = np.array([len(prompt) + max_new_tokens for prompt in prompts], dtype=np.int32)
    plan = pack_documents(lengths, pack_length, seed=0, epoch=0)
    groups = [
        plan.order[a:b].tolist() for a, b in zip(plan.offsets[:-1], plan.offsets[1:], strict=True)
    ]
    answers: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for _ in range(max_new_tokens):
        groups = [left for group in groups if (left := [i for i in group if not done[i]])]
        if not groups:
            break
        packs = [
            _prompt_pack([prompts[i] + answers[i] for i in group], pack_length) for group in groups
        ]
        for group, tokens in zip(groups, _most_probable(model, packs, parallel), strict=True):
            for i, token in zip(group, tokens, strict=True):
                done[i] = token in stop_ids
                if not done[i]:
                    answers[i].append(token)
    return answers


def _prompt_pack(sequences: list[list[int]], pack_length: int) -> Pack:
    """Each sequence a trunk; the rows are the last tokens, and there are no targets: the model then answers with logits."""
    ends = np.cumsum([len(sequence) for sequence in sequences])
    starts = np.concatenate([[0], ends[:-1]])
    segments_S4 = np.stack([starts, ends, starts, starts], axis=1).astype(np.int32)
    tokens_T = np.zeros(pack_length, dtype=np.int64)
    tokens_T[: ends[-1]] = np.concatenate(sequences)
    none = np.zeros(0, dtype=np.int64)
    return Pack(
        tokens_T=tokens_T,
        segments_S4=np.concatenate([segments_S4, padding_segments(int(ends[-1]), pack_length)]),
        row_R=ends.astype(np.int64) - 1,
        target_R=None,
        sequence_R=np.arange(len(sequences)),
        response_B=none,
        document_P=none,
        ref_logp_B=none.astype(np.float64),
        num_tokens=int(ends[-1]),
        num_loss_tokens=0,
    )


@torch.no_grad()
def _most_probable(model: LoadedModel, packs: list[Pack], parallel: Parallel) -> list[list[int]]:
    """The most probable next token of each row, per pack, on every rank."""

    def on_output(
        logits_RV: torch.Tensor, _: DevicePack
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        zero = torch.zeros((), device=logits_RV.device)
        return zero, zero.int(), logits_RV.argmax(dim=-1)

    collected = run_schedule(model.chunks, packs, on_output, parallel, forward_only=True)
    rows = [len(pack.row_R) for pack in packs]
    tokens = (
        torch.cat(collected)
        if collected
        else torch.empty(sum(rows), dtype=torch.long, device=parallel.device)
    )
    dist.broadcast(
        tokens, src=parallel.last_stage_rank, group=parallel.groups.pp
    )  # now every stage has them
    return [part.tolist() for part in tokens.split(rows)]
