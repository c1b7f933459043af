"""The same numbers as transformers, from the same folder: log-probs and gradients of every family."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nova_kernels.segments import segment_index
from nova_sys.config import ParallelConfig
from nova_sys.config_io import config_from
from nova_sys.hf.config_json import read_model
from nova_sys.hf.families import dims_of, table_of
from nova_sys.hf.weights import load_any_weights, their_tensor
from nova_sys.model.attention import PackLayout
from nova_sys.model.build import build_model, layer_of, shards_of, transformer_config
from nova_sys.model.gpt import PackedGPT
from nova_sys.parallel import Parallel, parallel_run

pytest.importorskip("transformers")
spec = importlib.util.spec_from_file_location("hf_models", Path(__file__).with_name("hf_models.py"))
assert spec is not None and spec.loader is not None
hf_models: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hf_models)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("hf")
    return {name: hf_models.make(name, root / name) for name in hf_models.OPTIONS}


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    with parallel_run(ParallelConfig(), seed=1) as joined:
        torch.set_num_threads(1)  # the tensors are tiny, and the machine may be busy
        yield joined


def ours_of(folder: Path, parallel: Parallel) -> PackedGPT:
    model = config_from([f"model.init_from={folder}"], folder).model
    config = transformer_config(model, parallel, dtype=torch.float32)
    sizes = {"vocab_size": model.vocab_size, "max_positions": hf_models.POSITIONS}
    (gpt,) = build_model(model, config, parallel, **sizes, seed=1)
    load_any_weights(folder, [gpt], model, model.vocab_size)
    return gpt


def logits_of(gpt: PackedGPT, ids: list[int], targets: list[int] | None = None) -> torch.Tensor:
    """Logits behind every token; with targets, the log-probs of those."""
    T = len(ids)
    segments = torch.tensor([[0, T, 0, 0]], dtype=torch.int32)
    layout = PackLayout(segments, segment_index(segments, T))
    wanted = None if targets is None else torch.tensor(targets)
    rows = torch.arange(T if targets is None else len(targets))
    return gpt.run(torch.tensor(ids), layout, rows, wanted)


@pytest.mark.parametrize("name", hf_models.OPTIONS)
def test_log_probs(references: dict[str, Any], parallel: Parallel, name: str) -> None:
    reference, ids = references[name], hf_models.probe_ids()
    with torch.no_grad():
        expected = hf_models.reference_logits(reference, ids).log_softmax(-1)
        got = logits_of(ours_of(reference.folder, parallel), ids).log_softmax(-1)
    assert expected.std() > 0.3  # rows differ, so an error in one of them would show
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", hf_models.OPTIONS)
def test_gradients_of_one_sft_step(
    references: dict[str, Any], parallel: Parallel, name: str
) -> None:
    """Of the mean NLL per token, for every tensor of the folder. Every one matters: none of the gradients is nearly zero."""
    reference, ids = references[name], hf_models.probe_ids()
    reference.model.zero_grad()
    logp = hf_models.reference_logits(reference, ids)[:-1].log_softmax(-1)
    (-logp[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].mean()).backward()
    expected = reference.tensors(lambda parameter: parameter.grad)
    gpt = ours_of(reference.folder, parallel)
    (-logits_of(gpt, ids, ids[1:]).mean()).backward()
    got = gradients_by_their_names(gpt, reference.folder)
    assert got.keys() == expected.keys()
    for key, gradient in expected.items():
        largest = gradient.abs().max()
        assert largest > 1e-5, key
        assert (got[key] - gradient).abs().max() < 1e-5 * largest, key


@torch.no_grad()
def gradients_by_their_names(gpt: PackedGPT, folder: Path) -> dict[str, torch.Tensor]:
    for parameter in gpt.parameters():
        assert parameter.grad is not None
        parameter.copy_(parameter.grad)  # then they are read as weights are
    whole: dict[tuple[str, int | None], list[torch.Tensor]] = {}
    for shard in shards_of(gpt):
        assert shard.data is not None
        whole.setdefault(layer_of(shard), []).append(shard.data)

    def rows(ours: str, layer: int | None, first: int, num_rows: int) -> torch.Tensor:
        return torch.cat(whole[ours, layer])[first : first + num_rows]

    family, model = read_model(folder)
    return {
        row.in_layer(layer): their_tensor(
            row, layer, dims_of(model, model.vocab_size, layer), torch.float32, rows
        )
        for row in table_of(family, model)
        for layer in (range(model.num_layers) if row.in_layers else [None])
    }
