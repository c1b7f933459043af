"""A frozen model in host memory: each module's own weights are on the GPU only while it computes.

A pass reads every weight once per pack over the host's bus. On the GPU it needs one module's weights at a time, the largest of which are the
embedding, the output layer and the MLP's first projection; the model in GPU memory would need all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

BringWeight = Callable[[torch.Tensor], torch.Tensor]
"""A weight in host memory -> the same weight where the model computes."""


def move_to_host(chunks: Sequence[Any], device: torch.device) -> None:
    """Moves the weights of a model that will be read only, and has every module fetch its own when it runs."""
    on_gpu = device.type == "cuda"
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        in_host = parameter.data.to("cpu")
        parameter.data = in_host.pin_memory() if on_gpu else in_host

    def bring(weight: torch.Tensor) -> torch.Tensor:
        return weight.to(device, non_blocking=True)  # ordered by the stream that computes with it

    fetch_when_used(chunks, bring)


def fetch_when_used(chunks: Sequence[Any], bring: BringWeight) -> None:
    """Around each module's forward pass its own weights are replaced by what `bring` makes of them."""
    for chunk in chunks:
        tied = chunk.post_process and chunk.share_embeddings_and_output_weights
        for module in chunk.modules():
            own = list(module.parameters(recurse=False))
            if tied and module is chunk.output_layer and not own:
                own = [chunk.shared_embedding_or_output_weight()]  # the embedding's
            if own:
                visit = _Visit(own, bring)
                module.register_forward_pre_hook(visit.begin)
                module.register_forward_hook(visit.end, always_call=True)


class _Visit:
    """Weights that change places while their module runs."""

    def __init__(self, parameters: list[torch.nn.Parameter], bring: BringWeight) -> None:
        self._homes = [(parameter, parameter.data) for parameter in parameters]
        self._bring = bring

    def begin(self, *_: Any) -> None:
        for parameter, home in self._homes:
            parameter.data = self._bring(home)

    def end(self, *_: Any) -> None:
        for parameter, home in self._homes:
            parameter.data = home
