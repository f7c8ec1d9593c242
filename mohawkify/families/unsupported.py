"""Families that cannot be converted and the reasons, also listed in docs/families.md."""

from __future__ import annotations

_OUTSIDE = "its attention does not go through transformers' interface, and no adapter rebuilds its matrices"
_RECURRENT = "it is recurrent already"
_PARTLY_RECURRENT = "some of its layers are recurrent already, and every layer must have attention"
_ENCODER = "it is an encoder: every token attends to the future, which a recurrent state cannot"
_ENCODER_DECODER = "it has an encoder beside its decoder, and attention from one to the other"
_IMAGES = "it reads images too, and only text-only decoders are converted"

# A reason ends the sentence "a teacher of the family ... cannot be converted: ...".
UNSUPPORTED: dict[str, str] = {
    "bloom": "its attention adds the residual itself and its ALiBi is built from a padding mask, which cannot hold"
    " document borders",
    "gpt_oss": "attention sinks take a share of every row of its attention, which stage 1 does not capture, and its"
    " weights are published as MXFP4",
    "deepseek_v2": "its latent attention has values of another width than queries and keys",
    "deepseek_v3": "its latent attention has values of another width than queries and keys",
    "gptj": _OUTSIDE,
    "gpt_neo": _OUTSIDE,
    "codegen": _OUTSIDE,
    "mamba": _RECURRENT,
    "mamba2": _RECURRENT,
    "falcon_mamba": _RECURRENT,
    "rwkv": _RECURRENT,
    "recurrent_gemma": _PARTLY_RECURRENT,
    "jamba": _PARTLY_RECURRENT,
    "bamba": _PARTLY_RECURRENT,
    "zamba": _PARTLY_RECURRENT,
    "zamba2": _PARTLY_RECURRENT,
    "nemotron_h": _PARTLY_RECURRENT,
    "qwen3_next": _PARTLY_RECURRENT,
    "falcon_h1": "in every layer a recurrent part stands beside the attention already",
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "electra": _ENCODER,
    "t5": _ENCODER_DECODER,
    "bart": _ENCODER_DECODER,
    "pegasus": _ENCODER_DECODER,
    "whisper": "it has an encoder of sound beside its decoder, and attention from one to the other",
    "llava": _IMAGES,
    "qwen2_vl": _IMAGES,
    "gemma3": f"{_IMAGES}; the text-only type gemma3_text is supported",
    "mllama": _IMAGES,
}
