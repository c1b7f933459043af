"""tokenizer.json of a SentencePiece model, for transformers: it takes a bare tokenizer.model for BPE, and ours are unigram models."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

SPACE = "\u2581"
CONFIG, MODEL, FAST = "tokenizer_config.json", "tokenizer.model", "tokenizer.json"


def make_loadable(folder: Path) -> None:
    """Adds what transformers needs to a folder with a SentencePiece model alone.

    A unigram model becomes tokenizer.json, with the same ids for every text without a literal U+2581. Of a BPE model transformers
    makes a Llama tokenizer itself.
    """
    if (folder / FAST).exists() or (folder / CONFIG).exists():
        return
    data = (folder / MODEL).read_bytes()
    model = proto.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(data)
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(data)
    ids = {
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "unk_token": processor.unk_id(),
    }
    config: dict[str, object] = {
        name: processor.IdToPiece(token) for name, token in ids.items() if token >= 0
    }
    config |= {"clean_up_tokenization_spaces": False}
    if model.trainer_spec.model_type == proto.TrainerSpec.UNIGRAM:  # pyright: ignore[reportAttributeAccessIssue]
        _as_unigram(model, ids["bos_token"]).save(str(folder / FAST))
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        config |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": ids["bos_token"] >= 0}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _as_unigram(model: proto.ModelProto, bos_id: int) -> Tokenizer:  # pyright: ignore[reportAttributeAccessIssue]
    kinds = proto.ModelProto.SentencePiece  # pyright: ignore[reportAttributeAccessIssue]
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    tokenizer = Tokenizer(
        models.Unigram(pieces, unk_id=model.trainer_spec.unk_id, byte_fallback=True)
    )
    spec = model.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])  # pyright: ignore[reportAttributeAccessIssue]
    undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    undo += [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(undo)  # pyright: ignore[reportAttributeAccessIssue]
    fixed = [piece for piece in model.pieces if piece.type == kinds.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(p.piece, special=False, normalized=False) for p in fixed])
    control = [
        piece.piece for piece in model.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)
    ]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in control])
    if bos_id >= 0:
        bos = model.pieces[bos_id].piece
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    return tokenizer
