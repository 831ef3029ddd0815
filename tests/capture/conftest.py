from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
DECODER = {**TEXT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WHISPER = {
    "vocab_size": 97,
    "num_mel_bins": 8,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_source_positions": 20,
    "max_target_positions": 12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 3,
    "classifier_proj_size": 16,
}
CLIP_TEXT = {**TEXT, "projection_dim": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
T5 = {
    "vocab_size": 97,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = {
    **{name: WHISPER[name] for name in WHISPER if not name.startswith(("num_mel", "max_", "classifier"))},
    "max_position_embeddings": 40,
}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}

MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**TEXT)),
    "bert-classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT, type_vocab_size=1)),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(vocab_size=97, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40)
    ),
    "albert": lambda: hf.AlbertModel(hf.AlbertConfig(**TEXT, embedding_size=16)),
    "modernbert": lambda: hf.ModernBertModel(
        hf.ModernBertConfig(
            **TEXT,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            cls_token_id=1,
            sep_token_id=2,
            local_attention=8,
        )
    ),
    "t5-encoder": lambda: hf.T5EncoderModel(hf.T5Config(**T5)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=40, bos_token_id=1, eos_token_id=2)
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=8, tie_word_embeddings=True)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)),
    "swin": lambda: hf.SwinModel(hf.SwinConfig(**SWIN)),
    "convnext": lambda: hf.ConvNextModel(
        hf.ConvNextConfig(image_size=32, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])
    ),
    "clip-text": lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**CLIP_TEXT)),
    "clip-vision": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION, projection_dim=24)),
    "clip": lambda: hf.CLIPModel(
        hf.CLIPConfig(text_config=CLIP_TEXT, vision_config={**VISION, "projection_dim": 24}, projection_dim=24)
    ),
    "whisper": lambda: hf.WhisperModel(hf.WhisperConfig(**WHISPER)),
    "whisper-classifier": lambda: hf.WhisperForAudioClassification(hf.WhisperConfig(**WHISPER)),
    "wav2vec2": lambda: hf.Wav2Vec2Model(
        hf.Wav2Vec2Config(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
            conv_dim=[8] * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        )
    ),
    "bart": lambda: hf.BartModel(hf.BartConfig(**BART)),
    "image-to-text": lambda: hf.VisionEncoderDecoderModel(
        hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            hf.ViTConfig(**VISION), hf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
        )
    ),
    "ast": lambda: hf.ASTModel(
        hf.ASTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
            max_length=32,
            num_mel_bins=16,
            patch_size=8,
        )
    ),
}


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[[str], Path]:
    """Write one of `MODELS` with seeded weights as a Hugging Face directory."""

    def save(name: str) -> Path:
        torch.manual_seed(0)
        folder = tmp_path / name
        MODELS[name]().eval().save_pretrained(folder)
        return folder

    return save
