"""One file per algorithm; `build_algorithm` is the table."""

from nova_sys.algo.base import Algorithm, LossOutput
from nova_sys.algo.dpo import DPO
from nova_sys.algo.sft import SFT
from nova_sys.config import AlgoConfig


def build_algorithm(config: AlgoConfig) -> Algorithm:
    if config.name == "sft":
        return SFT()
    return DPO(
        beta=config.beta,
        loss=config.loss,
        label_smoothing=config.label_smoothing,
        target_margin=config.target_margin,
        length_normalize=config.length_normalize,
        nll_weight=config.nll_weight,
    )


__all__ = ["Algorithm", "LossOutput", "build_algorithm"]
