"""The truncation rule.

Every sequence `prefix + response_i` must fit `max_length`, and the packed document must fit
`pack_length` (prefix counted once when it is shared, once per response when it is not). A document
that does not fit

1. loses tokens from the START of its prefix (the end, nearest the answer, stays), down to a quarter
   of the limit;
2. then its responses are cut from the END, the longest first, down to a common length that fits.

The limit of step 1 is the longest sequence allowed: min(max_length, what pack_length leaves per
sequence). A prefix and every response keep at least one token. A document without a prefix (SFT) is
cut as if the tokens before its first loss token were the prefix. Nothing is dropped silently:
`StoreReport.truncated` counts each kind of cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nova_sys.data.encode import TokenPart


def fit_lengths(
    prefix: int, responses: Sequence[int], *, max_length: int, pack_length: int, share_prefix: bool
) -> tuple[int, list[int]]:
    """Lengths that the rule above leaves of a prefix and its responses, in tokens.

    Raises: ValueError when pack_length cannot hold such a prefix and one token per response.
    """
    copies = 1 if share_prefix else len(responses)

    def budget(kept: int) -> int:  # tokens that all responses together may take
        return pack_length - copies * kept

    if prefix + max(responses) <= max_length and sum(responses) <= budget(prefix):
        return prefix, list(responses)
    limit = min(max_length, pack_length // copies)
    wanted = min(max_length - max(responses), (pack_length - sum(responses)) // copies)
    kept = min(prefix, max(wanted, limit // 4, 1))
    if budget(kept) < len(responses):
        raise ValueError(
            f"pack_length {pack_length} cannot hold {len(responses)} responses behind a prefix of "
            f"{kept} tokens; each needs a token. Raise data.pack_length or share the prefix."
        )
    level = min(max_length - kept, _level(sorted(responses), budget(kept)))
    return kept, [min(length, level) for length in responses]


def _level(ascending: list[int], budget: int) -> int:
    """Largest cap with sum(min(length, cap)) <= budget."""
    for i, length in enumerate(ascending):
        cap = budget // (len(ascending) - i)
        if cap < length:
            return cap
        budget -= length
    return ascending[-1]


def truncate(
    parts: list[TokenPart], *, max_length: int, pack_length: int, share_prefix: bool
) -> tuple[list[TokenPart], list[str]]:
    """The document `[prefix, response_0, ...]` by the rule, and the kinds of cut made.

    Kinds: prefix, response, loss (a response lost all its loss tokens), identical (a pair's answers
    became equal).
    """
    prefix, responses = parts[0], parts[1:]
    without_prefix = len(prefix.tokens) == 0
    if without_prefix:
        lead = int(np.argmax(responses[0].loss)) if len(responses) == 1 else 0
        prefix, responses = (
            _cut(responses[0], 0, lead),
            [_cut(responses[0], lead, None), *responses[1:]],
        )
    before = [len(p.tokens) for p in responses]
    kept, after = fit_lengths(
        len(prefix.tokens),
        before,
        max_length=max_length,
        pack_length=pack_length,
        share_prefix=share_prefix,
    )
    if kept == len(prefix.tokens) and after == before:
        return parts, []
    kinds = ["prefix"] if kept < len(prefix.tokens) else []
    prefix = _cut(prefix, len(prefix.tokens) - kept, None)
    cut = [_cut(part, 0, length) for part, length in zip(responses, after, strict=True)]
    if after != before:
        kinds.append("response")
        if any(p.loss.any() and not c.loss.any() for p, c in zip(responses, cut, strict=True)):
            kinds.append("loss")
        if len(cut) == 2 and np.array_equal(cut[0].tokens, cut[1].tokens):
            kinds.append("identical")
    if without_prefix:
        cut[0] = TokenPart(
            np.concatenate([prefix.tokens, cut[0].tokens]),
            np.concatenate([prefix.loss, cut[0].loss]),
        )
        prefix = _cut(prefix, 0, 0)
    return [prefix, *cut], kinds


def _cut(part: TokenPart, start: int, stop: int | None) -> TokenPart:
    return TokenPart(part.tokens[start:stop], part.loss[start:stop])
