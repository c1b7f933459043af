"""Megatron's names of weights in a checkpoint, with and without a layer's number."""

from __future__ import annotations

import re

LAYER = "decoder.layers."
"""What the names of a layer's weights begin with. All layers' are one tensor under that name, with the layer as first axis; in models whose
layers differ in shape each has its own, with its number behind this."""


def numbered(name: str, layer: int) -> str:
    """The name of one layer's weight, with its number."""
    return name.replace(LAYER, f"{LAYER}{layer}.", 1)


def split_layer(name: str) -> tuple[str, int | None]:
    """The inverse of `numbered`; None where there is no number."""
    found = re.match(re.escape(LAYER) + r"(\d+)\.", name)
    return (LAYER + name[found.end() :], int(found[1])) if found else (name, None)
