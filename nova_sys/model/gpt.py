"""The model: Megatron-core's GPTModel, fed with packs and answering with log-probabilities of response rows."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from nova_sys.data.batch import DevicePack
from nova_sys.model.attention import PackLayout
from nova_sys.model.cache import DecodeLayout
from nova_sys.model.context_parallel import stretch
from nova_sys.model.output_layer import LogprobOutputLayer


class PackedGPT(GPTModel):
    """One pipeline stage (or chunk) of a decoder that runs on packs.

    forward(pack) returns
      - on the last stage: logp_R (R,) fp32, the log-probability of each response row's target;
      - on other stages: hidden (T, 1, D), or (T/tp, 1, D) under sequence parallelism.
    With a context-parallel group a rank's T is its stretch of the pack, but rows and log-probs are the whole pack's.
    """

    def forward(self, pack: DevicePack) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        layout = PackLayout(pack.segments_S4, pack.index)
        tokens_T, context = pack.tokens_T, self.pg_collection.cp
        if context.size() > 1:
            tokens_T = tokens_T[stretch(len(tokens_T), context)]
        return self.run(tokens_T, layout, pack.row_R, pack.target_R)

    def run(
        self,
        tokens_T: torch.Tensor,
        layout: PackLayout | DecodeLayout,
        row_R: torch.Tensor,
        target_R: torch.Tensor | None,
    ) -> torch.Tensor:
        """`forward`, for any layout of the tokens; without targets the last stage gives the rows' logits (R, vocab_size) fp32."""
        embedded_SBD = None
        if self.pre_process:
            embedded_SBD = self.embedding(input_ids=tokens_T[None], position_ids=None)
        hidden_SBD = self.decoder(
            hidden_states=embedded_SBD, attention_mask=None, packed_seq_params=layout
        )
        if not self.post_process:
            return hidden_SBD
        assert isinstance(self.output_layer, LogprobOutputLayer)
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else None
        )
        return self.output_layer(hidden_SBD, row_R, target_R, weight=weight)
