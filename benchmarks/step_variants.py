"""What the step would cost without packing, sharing or compacted response rows: the packs of a run, rebuilt without them.

Only packs change, made of public pieces; the trainer knows nothing of it. A step trains the same documents in every variant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nova_sys.data.batch import Pack, build_pack
from nova_sys.data.loader import PackLoader
from nova_sys.data.token_store import TokenStore

PEER_BATCH_PAIRS = 8
IGNORED = -100

Rebuild = Callable[["Source", int, list[Pack]], list[Pack]]
"""What documents come from, the step, its packs -> the packs to train on instead."""


@dataclass(frozen=True)
class Source:
    store: TokenStore
    pack_length: int
    share_prefix: bool
    ref_logp: np.ndarray

    @staticmethod
    def of(loader: PackLoader, store: TokenStore, pack_length: int, share_prefix: bool) -> Source:
        """With the reference log-probs that the loader puts into its packs."""
        ref_logp = np.full(store.num_responses, np.nan)
        for step in range(loader.steps_for(1.0)):
            for pack in loader.micro_batches(step):
                ref_logp[pack.response_B] = pack.ref_logp_B
        assert not np.isnan(ref_logp).any(), "an epoch holds every document"
        return Source(store, pack_length, share_prefix, ref_logp)

    def pack(self, documents: Sequence[int] | np.ndarray, length: int) -> Pack:
        return build_pack(
            self.store, documents, length, share_prefix=self.share_prefix, ref_logp=self.ref_logp
        )


def in_order(source: Source, step: int, _: list[Pack]) -> list[Pack]:
    """Pairs in the order of the data, eight per step as the peer takes them, in as many packs as they need."""
    lengths = source.store.document_lengths(source.share_prefix)
    first = step * PEER_BATCH_PAIRS
    packs: list[list[int]] = [[]]
    for number in range(first, first + PEER_BATCH_PAIRS):
        document = number % source.store.num_documents
        if lengths[[*packs[-1], document]].sum() > source.pack_length:
            packs.append([])
        packs[-1].append(document)
    return [source.pack(documents, source.pack_length) for documents in packs]


def padded(source: Source, _: int, packs: list[Pack]) -> list[Pack]:
    """Eight pairs in a micro-batch, each padded to the longest of them, instead of packs.

    Shared: a row per pair, `prefix | chosen | rejected`. Not shared: a row per answer, `prefix | answer`.
    """
    documents = np.concatenate([pack.document_P for pack in packs])
    batches = []
    for at in range(0, len(documents), PEER_BATCH_PAIRS):
        batch = documents[at : at + PEER_BATCH_PAIRS]
        width = max(_row_tokens(source, document) for document in batch)
        batches.append(_end_to_end([source.pack([document], width) for document in batch]))
    return batches


def all_rows(_: Source, __: int, packs: list[Pack]) -> list[Pack]:
    """The same losses from an output layer that is given every token, most of them without a target."""
    return [_with_all_rows(pack) for pack in packs]


def padded_all_rows(source: Source, step: int, packs: list[Pack]) -> list[Pack]:
    return all_rows(source, step, padded(source, step, packs))


def _row_tokens(source: Source, document: int) -> int:
    """Tokens of a pair's padded row, or of its two rows."""
    store = source.store
    first, last = store.document_parts[document : document + 2]
    prefix, *answers = np.diff(store.part_offsets[first : last + 1])
    return int(prefix + sum(answers) if source.share_prefix else 2 * (prefix + max(answers)))


def _end_to_end(packs: list[Pack]) -> Pack:
    """One pack of several, padding included."""
    tokens = np.cumsum([0, *(len(pack.tokens_T) for pack in packs)])[:-1]
    sequences = np.cumsum([0, *(len(pack.response_B) for pack in packs)])[:-1]

    def joined(name: str, offsets: np.ndarray | None = None) -> np.ndarray:
        arrays = [getattr(pack, name) for pack in packs]
        if offsets is not None:
            arrays = [a + a.dtype.type(n) for a, n in zip(arrays, offsets, strict=True)]
        return np.concatenate(arrays)

    return Pack(
        tokens_T=joined("tokens_T"),
        segments_S4=joined("segments_S4", tokens),
        row_R=joined("row_R", tokens),
        target_R=joined("target_R"),
        sequence_R=joined("sequence_R", sequences),
        response_B=joined("response_B"),
        document_P=joined("document_P"),
        ref_logp_B=joined("ref_logp_B"),
        num_tokens=sum(pack.num_tokens for pack in packs),
        num_loss_tokens=sum(pack.num_loss_tokens for pack in packs),
    )


def _with_all_rows(pack: Pack) -> Pack:
    others = np.setdiff1d(np.arange(len(pack.tokens_T)), pack.row_R)
    return replace(
        pack,
        row_R=np.concatenate([pack.row_R, others]),
        target_R=np.concatenate([pack.target_R, np.full(len(others), IGNORED)]),
        sequence_R=np.concatenate([pack.sequence_R, np.full(len(others), pack.sequence_R[-1])]),
    )


VARIANTS: dict[str, tuple[list[str], Rebuild | None]] = {
    "full": ([], None),
    "one_pack": (["train.global_batch_packs=1"], None),
    "unshared": (["data.share_prefix=false"], None),
    "padded": ([], padded),
    "all_rows": ([], all_rows),
    "plain": (["data.share_prefix=false"], padded_all_rows),
    "in_order": ([], in_order),
}
"""Name -> changed keys of the recipe, changed packs."""
