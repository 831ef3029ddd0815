"""Architectures on which every layer must become one attention, eager and sdpa."""

from __future__ import annotations

from family import (
    CAUSAL,
    DECODER,
    FULL,
    IDS,
    T5,
    TEXT,
    VISION,
    WHISPER,
    Family,
    ended_text,
    image,
    large_image,
    mel,
    text,
)

__all__ = ["REQUIRED"]

_LOCAL = {"causal": False, "window_left": 3, "window_right": 3}

REQUIRED = (
    Family("bert", "BertModel", "BertConfig", TEXT, text, 2, expect=FULL),
    Family(
        "distilbert",
        "DistilBertModel",
        "DistilBertConfig",
        {**IDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40},
        text,
        2,
        expect=FULL,
    ),
    Family("roberta", "RobertaModel", "RobertaConfig", TEXT, text, 2, longest=38, expect=FULL),
    Family("albert", "AlbertModel", "AlbertConfig", {**TEXT, "embedding_size": 16}, text, 2, expect=FULL),
    Family("t5-encoder", "T5EncoderModel", "T5Config", T5, text, 2, expect=FULL),
    Family("vit", "ViTModel", "ViTConfig", VISION, image, 2, expect=FULL),
    Family("deit", "DeiTModel", "DeiTConfig", VISION, image, 2, expect=FULL),
    Family(
        "swin",
        "SwinModel",
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        large_image,
        4,
        expect=FULL,
    ),
    Family("clip-text", "CLIPTextModel", "CLIPTextConfig", TEXT, ended_text, 2, expect=CAUSAL),
    Family("clip-vision", "CLIPVisionModel", "CLIPVisionConfig", VISION, image, 2, expect=FULL),
    Family("whisper-encoder", "WhisperModel.encoder", "WhisperConfig", WHISPER, mel, 2, expect=FULL),
    Family("qwen2", "Qwen2Model", "Qwen2Config", DECODER, text, 2, expect=CAUSAL),
    Family(
        "qwen2-window",
        "Qwen2Model",
        "Qwen2Config",
        {**DECODER, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        text,
        2,
        expect=(CAUSAL, {"causal": True, "window_left": 4}),
    ),
    Family("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 16}, text, 2, expect=CAUSAL),
    Family("llama", "LlamaForCausalLM", "LlamaConfig", DECODER, text, 2, expect=CAUSAL),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "use_cache": False},
        text,
        2,
        expect=CAUSAL,
    ),
    Family(
        "modernbert",
        "ModernBertModel",
        "ModernBertConfig",
        {**TEXT, "num_hidden_layers": 4, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2},
        text,
        4,
        expect=(FULL, _LOCAL, _LOCAL, FULL),
    ),
)
