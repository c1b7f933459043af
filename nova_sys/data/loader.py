"""Which packs each rank computes at each step: a pure function of the step, so a run resumes
anywhere.

The packs of epoch 0, 1, 2, ... form one endless stream; step s takes packs s * G .. s * G + G - 1
of it (G = `global_batch_packs`), whatever the data-parallel size, and crosses from one epoch into
the next. Nothing is dropped.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from nova_kernels.packed_attention.schedule import attention_schedule
from nova_sys.data.batch import Pack, build_pack
from nova_sys.data.packing import PackPlan, balance, pack_documents
from nova_sys.data.token_store import TokenStore

_PREFETCH_STEPS = 2


class PackLoader:
    """Micro-batches of one data-parallel rank.

    epochs: the stream ends behind `ceil(epochs * packs_per_epoch)` packs (`last_pack`), and packs
    that hold no documents fill the last step; None: it never ends.   ref_logp: see build_pack.
    tile_sizes: of the lists that the attention kernels loop over (packed_attention.schedule), which are
    made with the pack, in the loader's thread.

    Memory of each rank grows by about 70 bytes per document: 10 for the plans of two epochs, and 30 in each of two threads that make
    them, which malloc keeps; and by 8 per response of `ref_logp`. What the store holds is mapped: the ranks of a machine share it.

    Raises: ValueError when a document is longer than a pack, or the data-parallel size does not
    divide the global batch.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        pack_length: int,
        global_batch_packs: int,
        data_rank: int,
        data_size: int,
        seed: int,
        share_prefix: bool,
        epochs: float | None = None,
        ref_logp: np.ndarray | None = None,
        tile_sizes: Sequence[tuple[int, int]] = (),
    ) -> None:
        if global_batch_packs < 1 or global_batch_packs % data_size:
            raise ValueError(
                f"train.global_batch_packs is {global_batch_packs} and the data-parallel size "
                f"{data_size}; the first must be a multiple of the second. Change one of them."
            )
        self._store = store
        self._pack_length = pack_length
        self._global_batch_packs = global_batch_packs
        self._data_rank = data_rank
        self._data_size = data_size
        self._seed = seed
        self._share_prefix = share_prefix
        self._ref_logp = ref_logp
        self._tile_sizes = tile_sizes
        self._lengths = store.document_lengths(share_prefix)
        longest = int(self._lengths.max())
        if longest > pack_length:
            document = int(self._lengths.argmax())
            raise ValueError(
                f"{store.source_of(document)}: the document takes {longest} tokens, a pack has "
                f"{pack_length}; the store was built for other settings. Build it with this "
                "pack_length and share_prefix."
            )
        self._plans: dict[int, Future[PackPlan]] = {}
        self._plans_lock = threading.Lock()
        self._planner: threading.Thread | None = None
        self._thread: _Prefetcher | None = None
        self.packs_per_epoch = self._plan(0).num_packs
        self.last_pack = None if epochs is None else self._packs_of(epochs)

    @property
    def fill(self) -> float:
        """Share of all pack positions that hold a document's token."""
        return float(self._lengths.sum()) / (self.packs_per_epoch * self._pack_length)

    def steps_for(self, epochs: float) -> int:
        """Optimizer steps that `epochs` passes over the documents take."""
        return math.ceil(self._packs_of(epochs) / self._global_batch_packs)

    def _packs_of(self, epochs: float) -> int:
        return math.ceil(round(epochs * self.packs_per_epoch, 6))  # 1.1 * 50 is over 55

    def documents_of(self, step: int) -> list[np.ndarray]:
        """Documents of each of the step's G packs, over all ranks."""
        start = step * self._global_batch_packs
        packs = []
        for index in range(start, start + self._global_batch_packs):
            if self.last_pack is not None and index >= self.last_pack:
                packs.append(np.empty(0, np.int64))
            else:
                epoch, pack = divmod(index, self.packs_per_epoch)
                packs.append(self._plan(epoch).documents(pack))
        return packs

    def micro_batches(self, step: int) -> list[Pack]:
        """This rank's packs of a step, counted from 0."""
        packs = self.documents_of(step)
        mine = range(len(packs))
        if self._data_size > 1:
            mine = balance(self._work_of(packs), self._data_size)[self._data_rank]
        return [self._build(packs[i]) for i in mine]

    def _build(self, documents: np.ndarray) -> Pack:
        pack = build_pack(
            self._store,
            documents,
            self._pack_length,
            share_prefix=self._share_prefix,
            ref_logp=self._ref_logp,
        )
        for query_tokens, key_tokens in self._tile_sizes:
            attention_schedule(pack.index, query_tokens, key_tokens)
        assert pack.index  # worked out here, not in the step
        return pack

    def _work_of(self, packs: list[np.ndarray]) -> np.ndarray:
        """float64 (len(packs),): estimated cost of each pack."""
        work = self._store.document_work(np.concatenate(packs), self._share_prefix)
        ends = np.cumsum([len(documents) for documents in packs])
        return np.array([documents.sum() for documents in np.split(work, ends[:-1])])

    def _plan(self, epoch: int) -> PackPlan:
        future, is_new = self._future_plan(epoch)
        if is_new:
            self._make_plan(epoch, future)
        return future.result()

    def _future_plan(self, epoch: int) -> tuple[Future[PackPlan], bool]:
        """The plan of an epoch, which whoever finds it new must make; only the epoch before is kept, too: a step may span both."""
        with self._plans_lock:
            if epoch in self._plans:
                return self._plans[epoch], False
            self._plans = {e: plan for e, plan in self._plans.items() if e == epoch - 1}
            self._plans[epoch] = Future()
            return self._plans[epoch], True

    def _make_plan(self, epoch: int, future: Future[PackPlan]) -> None:
        try:
            future.set_result(
                pack_documents(self._lengths, self._pack_length, seed=self._seed, epoch=epoch)
            )
        except BaseException as error:
            future.set_exception(error)

    def plan_ahead(self, step: int) -> None:
        """Begins to plan the epoch behind the one in which `step` ends, in a thread, if it will be needed: planning takes seconds
        for tens of millions of documents, and no step should wait for it."""
        epoch = ((step + 1) * self._global_batch_packs - 1) // self.packs_per_epoch + 1
        if self.last_pack is not None and self.last_pack <= epoch * self.packs_per_epoch:
            return
        future, is_new = self._future_plan(epoch)
        if is_new:
            self._planner = threading.Thread(
                target=self._make_plan, args=(epoch, future), name="pack-planner", daemon=True
            )
            self._planner.start()

    def start(self, step: int) -> None:
        """Begins to build the micro-batches of `step` and later ones ahead of time, in a thread."""
        self.stop()
        self._thread = _Prefetcher(self, step)

    def next(self) -> list[Pack]:
        """The micro-batches of the next step, counted from start()'s."""
        if self._thread is None:
            raise RuntimeError("PackLoader.next() was called before start()")
        return self._thread.take()

    def stop(self) -> None:
        """Ends the threads, if there are any."""
        if self._thread is not None:
            self._thread.end()
            self._thread = None
        if self._planner is not None:
            self._planner.join()
            self._planner = None


class _Prefetcher:
    """A thread that keeps a few steps ready. An error in it is raised again where the step is
    taken."""

    def __init__(self, loader: PackLoader, step: int) -> None:
        self._loader = loader
        self._ready: queue.Queue[list[Pack] | BaseException] = queue.Queue(maxsize=_PREFETCH_STEPS)
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(step,), name="pack-loader", daemon=True
        )
        self._thread.start()

    def take(self) -> list[Pack]:
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # a second call must not wait for ever
            raise item
        return item

    def end(self) -> None:
        self._ended.set()
        while self._thread.is_alive():
            while not self._ready.empty():
                self._ready.get_nowait()
            self._thread.join(timeout=0.05)

    def _work(self, step: int) -> None:
        try:
            while not self._ended.is_set():
                batch = self._loader.micro_batches(step)
                self._loader.plan_ahead(step)
                self._put(batch)
                step += 1
        except BaseException as error:
            self._put(error)

    def _put(self, item: list[Pack] | BaseException) -> None:
        while not self._ended.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
