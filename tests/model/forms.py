"""Small models of every form that open_clip has, with a tokenizer for those that do not read OpenAI's tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip

CONTEXT, VOCABULARY = 16, 99
TEXT = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
COCA_VISION = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
DECODER = {
    "context_length": CONTEXT,
    "vocab_size": VOCABULARY,
    "width": 32,
    "heads": 2,
    "layers": 1,
    "attn_pooler_heads": 2,
}
CUSTOM: dict[str, Any] = {"embed_dim": 24, "vision_cfg": VISION, "custom_text": True}
SIGLIP = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
WORDS = "a red blue green square circle cross moves left right up down and the slowly fast"

# Configurations as open_clip's own files have them.
FORMS: dict[str, dict[str, Any]] = {
    "clip": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT},
    "custom": {**CUSTOM, "text_cfg": TEXT},
    "mobileclip": {**CUSTOM, "text_cfg": {**TEXT, "no_causal_mask": True}},
    "siglip": {**CUSTOM, "init_logit_bias": -10, "text_cfg": {**TEXT, **SIGLIP}},
    "clipa": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last"}},
    "worldwide": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 98}},
    "first": {**CUSTOM, "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "first"}},
    "projection with bias": {
        "embed_dim": 24,
        "vision_cfg": VISION,
        "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True},
    },
    "no projection": {**CUSTOM, "embed_dim": 32, "text_cfg": {**TEXT, "proj_type": "none"}},
    "coca": {
        **CUSTOM,
        "vision_cfg": COCA_VISION,
        "multimodal_cfg": DECODER,
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    },
    "roberta": {
        **CUSTOM,
        "text_cfg": {"hf_model_name": "roberta", "hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp"},
    },
    "bert": {
        **CUSTOM,
        "text_cfg": {"hf_model_name": "roberta", "hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"},
    },
    "mt5": {**CUSTOM, "text_cfg": {"hf_model_name": "mt5", "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}},
    "nllb": {**CUSTOM, "text_cfg": {"hf_model_name": "m2m", "hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"}},
}
# Tiny image towers of timm.
EVA = {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "image_size": 224}
PE_CORE = {"timm_model_name": "vit_pe_core_tiny_patch16_384", "timm_pool": "map", "image_size": 384}


def hugging_face_configs(folder: Path) -> None:
    """Write the configurations of small text models, without weights."""
    import transformers

    shared = {"vocab_size": VOCABULARY, "num_attention_heads": 2, "num_hidden_layers": 2}
    configs = {
        "roberta": transformers.RobertaConfig(
            hidden_size=32, intermediate_size=64, max_position_embeddings=CONTEXT + 2, pad_token_id=1, **shared
        ),
        "mt5": transformers.MT5Config(vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2),
        "m2m": transformers.M2M100Config(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
        ),
    }
    for name, config in configs.items():
        config.save_pretrained(folder / name)


def tokenizer_folder(folder: Path, *, padding: int = 0, **options: str) -> Path:
    """Write a tokenizer of whole words in Hugging Face's format: ids 3 and up, end token 1; a stand-in for SigLIP's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    words = Tokenizer(
        models.WordLevel({**special, **{word: 3 + i for i, word in enumerate(WORDS.split())}}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": ("<pad>", "</s>")[padding], "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names, **options).save_pretrained(folder)
    return folder


def register(folder: Path, name: str, config: dict[str, Any]) -> str:
    """Register a configuration in open_clip; return its name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return name
