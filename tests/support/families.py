"""Hugging Face architectures from small random configs, each with inputs and the attention layers it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["REQUIRED", "WIDER", "Family", "padding_mask"]

Inputs = Callable[[int, int, str], dict[str, torch.Tensor]]

VOCABULARY = 97
_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**_IDS, **_BASE, "max_position_embeddings": 40}
DECODER = {**TEXT, "num_key_value_heads": 2, "use_cache": False}
VISION = {**_BASE, "image_size": 16, "patch_size": 8}
BART = {
    **_IDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
    "max_position_embeddings": 40,
    "use_cache": False,
}
T5 = {
    **_IDS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "use_cache": False,
}
SPEECH = {
    **TEXT,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}
WHISPER = {
    **{name: value for name, value in BART.items() if name != "max_position_embeddings"},
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 12,
}


def padding_mask(batch: int, length: int, side: str) -> torch.Tensor:
    """Return a ``[B, S]`` mask whose later rows are padded on ``side`` (``none``: nowhere); every row keeps a key."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        padded = 0 if side == "none" else min((row + 1) * length // (batch + 2), length - 1)
        if padded:
            mask[row, slice(0, padded) if side == "left" else slice(length - padded, length)] = 0
    return mask


def text(batch: int, length: int, side: str) -> dict[str, torch.Tensor]:
    """Token ids and their padding mask."""
    ids = torch.randint(3, VOCABULARY, (batch, length))
    return {"input_ids": ids, "attention_mask": padding_mask(batch, length, side)}


def ended_text(batch: int, length: int, side: str) -> dict[str, torch.Tensor]:
    """As :func:`text`, with the end token (the highest id) at the last valid position, where CLIP pools."""
    inputs = text(batch, length, side)
    inputs["input_ids"].clamp_(max=VOCABULARY - 2)
    for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        row[int(mask.nonzero().max())] = VOCABULARY - 1
    return inputs


def pair(batch: int, length: int, side: str) -> dict[str, torch.Tensor]:
    """An encoder's tokens with their mask, and a decoder's."""
    decoder = torch.randint(3, VOCABULARY, (batch, max(1, length - 2)))
    return {**text(batch, length, side), "decoder_input_ids": decoder}


def image(batch: int, length: int, side: str, size: int = 16) -> dict[str, torch.Tensor]:
    """Images; their length does not vary."""
    return {"pixel_values": torch.randn(batch, 3, size, size)}


def large_image(batch: int, length: int, side: str) -> dict[str, torch.Tensor]:
    """Images for hierarchical models, which halve them several times."""
    return image(batch, length, side, 32)


def speech(batch: int, length: int, side: str) -> dict[str, torch.Tensor]:
    """Raw audio of a fixed length."""
    return {"input_values": torch.randn(batch, 400)}


def mel(batch: int, length: int, side: str) -> dict[str, torch.Tensor]:
    """Whisper's log-mel features, two frames for each position."""
    return {"input_features": torch.randn(batch, 8, 40)}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: For test ids.
        model: Name of the class in ``transformers``; an attribute of the model may follow after a dot.
        config: Name of its configuration class.
        options: Small sizes.
        inputs: Makes inputs from batch, length and padding side.
        attentions: ``xf.attention`` operators expected in the lifted Program.
        longest: The longest length the model allows, at most 40.
        only: The attention implementations it has.
        expect: Keyword arguments that every attention must have, or those of each layer.
    """

    name: str
    model: str
    config: str
    options: Mapping[str, Any]
    inputs: Inputs
    attentions: int
    longest: int = 40
    only: tuple[str, ...] = ("eager", "sdpa")
    expect: Mapping[str, Any] | tuple[Mapping[str, Any], ...] = ()

    def make(self, implementation: str) -> torch.nn.Module:
        """Return the model with random weights."""
        import transformers

        kind, _, part = self.model.partition(".")
        config = getattr(transformers, self.config)(**self.options, attn_implementation=implementation)
        torch.manual_seed(0)
        model = getattr(transformers, kind)(config).eval().requires_grad_(False)
        for name, value in model.named_parameters():
            # fresh models have unit norms, zero biases and tiny weights, which hide mistakes
            if value.dim() == 1 or "table" in name or "bias" in name:
                value.normal_(1.0 if "norm" in name.lower() and "weight" in name else 0.0, 0.3)
            else:
                value.mul_(3.0)
        chosen: torch.nn.Module = model.get_submodule(part) if part else model
        return chosen


CAUSAL = {"causal": True, "window_left": -1}
FULL = {"causal": False, "window_left": -1, "window_right": -1}
_LOCAL = {"causal": False, "window_left": 3, "window_right": 3}

REQUIRED = (
    Family("bert", "BertModel", "BertConfig", TEXT, text, 2, expect=FULL),
    Family(
        "distilbert",
        "DistilBertModel",
        "DistilBertConfig",
        {**_IDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40},
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
        {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "use_cache": False},
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

_OPT = {**_IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
WIDER = (
    Family("gemma", "GemmaModel", "GemmaConfig", {**DECODER, "head_dim": 8}, text, 2, expect=CAUSAL),
    # its logits go through a tanh, which attention has no place for: it stays plain
    Family(
        "gemma2",
        "Gemma2Model",
        "Gemma2Config",
        {**DECODER, "head_dim": 8, "sliding_window": 4},
        text,
        0,
        only=("eager",),
    ),
    Family(
        "gemma3",
        "Gemma3TextModel",
        "Gemma3TextConfig",
        {**DECODER, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        text,
        2,
        expect=({"causal": True, "window_left": 3}, CAUSAL),
    ),
    Family("phi", "PhiModel", "PhiConfig", DECODER, text, 2, expect=CAUSAL),
    Family("phi3", "Phi3Model", "Phi3Config", DECODER, text, 2, expect=CAUSAL),
    Family(
        "mistral",
        "MistralModel",
        "MistralConfig",
        {**DECODER, "sliding_window": 5},
        text,
        2,
        expect={"causal": True, "window_left": 4},
    ),
    Family(
        "opt",
        "OPTModel",
        "OPTConfig",
        {**_OPT, "word_embed_proj_dim": 32, "max_position_embeddings": 40, "use_cache": False},
        text,
        2,
        expect=CAUSAL,
    ),
    Family("gpt-neox", "GPTNeoXModel", "GPTNeoXConfig", {**DECODER, "rotary_pct": 0.5}, text, 2, expect=CAUSAL),
    Family("falcon", "FalconModel", "FalconConfig", DECODER, text, 2, expect=CAUSAL),
    Family("falcon-alibi", "FalconModel", "FalconConfig", {**DECODER, "alibi": True}, text, 2),
    Family(
        "bloom",
        "BloomModel",
        "BloomConfig",
        {**_IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False},
        text,
        2,
        only=("eager",),
    ),
    # disentangled attention adds products with positions to the logits: it stays plain
    Family(
        "deberta-v2",
        "DebertaV2Model",
        "DebertaV2Config",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16},
        text,
        0,
        only=("eager",),
    ),
    Family("electra", "ElectraModel", "ElectraConfig", {**TEXT, "embedding_size": 16}, text, 2, expect=FULL),
    Family("mpnet", "MPNetModel", "MPNetConfig", TEXT, text, 2, longest=38, only=("eager",)),
    Family("xlm-roberta", "XLMRobertaModel", "XLMRobertaConfig", TEXT, text, 2, longest=38, expect=FULL),
    Family("camembert", "CamembertModel", "CamembertConfig", TEXT, text, 2, longest=38, expect=FULL),
    Family("nomic-bert", "NomicBertModel", "NomicBertConfig", TEXT, text, 2, expect=FULL),
    Family("gte", "GteModel", "GteConfig", TEXT, text, 2, expect=FULL),
    Family("eurobert", "EuroBertModel", "EuroBertConfig", DECODER, text, 2, expect=FULL),
    Family("esm", "EsmModel", "EsmConfig", {**TEXT, "position_embedding_type": "rotary"}, text, 2, expect=FULL),
    Family("bart", "BartModel", "BartConfig", BART, pair, 6),
    Family("pegasus", "PegasusModel", "PegasusConfig", BART, pair, 6),
    Family("marian", "MarianModel", "MarianConfig", BART, pair, 6),
    Family("m2m100", "M2M100Model", "M2M100Config", BART, pair, 6),
    Family("t5", "T5Model", "T5Config", T5, pair, 6),
    Family("umt5-encoder", "UMT5EncoderModel", "UMT5Config", T5, text, 2),
    Family("vit-msn", "ViTMSNModel", "ViTMSNConfig", VISION, image, 2, expect=FULL),
    Family("beit", "BeitModel", "BeitConfig", {**VISION, "use_relative_position_bias": True}, image, 2, expect=FULL),
    Family("dinov2", "Dinov2Model", "Dinov2Config", VISION, image, 2, expect=FULL),
    Family("yolos", "YolosModel", "YolosConfig", {**VISION, "image_size": [16, 16]}, image, 2, expect=FULL),
    # two layers and the attention that pools them
    Family("siglip-vision", "SiglipVisionModel", "SiglipVisionConfig", VISION, image, 3, expect=FULL),
    Family("siglip-text", "SiglipTextModel", "SiglipTextConfig", TEXT, text, 2, expect=FULL),
    Family(
        "segformer",
        "SegformerModel",
        "SegformerConfig",
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 16, 24, 32],
            "num_attention_heads": [1, 2, 3, 4],
            "decoder_hidden_size": 16,
        },
        large_image,
        4,
        only=("eager",),
    ),
    Family(
        "pvt-v2",
        "PvtV2Model",
        "PvtV2Config",
        {
            "image_size": 32,
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 16, 24, 32],
            "num_attention_heads": [1, 2, 3, 4],
        },
        large_image,
        4,
        only=("eager",),
    ),
    Family("wav2vec2", "Wav2Vec2Model", "Wav2Vec2Config", SPEECH, speech, 2, expect=FULL),
    Family("hubert", "HubertModel", "HubertConfig", SPEECH, speech, 2, expect=FULL),
    Family(
        "wav2vec2-conformer",
        "Wav2Vec2ConformerModel",
        "Wav2Vec2ConformerConfig",
        {**SPEECH, "position_embeddings_type": "rotary"},
        speech,
        2,
        only=("eager",),
    ),
    Family(
        "ast",
        "ASTModel",
        "ASTConfig",
        {**_BASE, "patch_size": 4, "num_mel_bins": 8, "max_length": 16, "frequency_stride": 4, "time_stride": 4},
        lambda batch, length, side: {"input_values": torch.randn(batch, 16, 8)},
        2,
        expect=FULL,
    ),
    Family(
        "whisper",
        "WhisperModel",
        "WhisperConfig",
        WHISPER,
        lambda batch, length, side: {
            **mel(batch, length, side),
            "decoder_input_ids": torch.randint(3, VOCABULARY, (batch, 7)),
        },
        6,
    ),
    Family("starcoder2", "Starcoder2Model", "Starcoder2Config", DECODER, text, 2),
    Family("stablelm", "StableLmModel", "StableLmConfig", DECODER, text, 2, expect=CAUSAL),
    Family("olmo2", "Olmo2Model", "Olmo2Config", DECODER, text, 2, expect=CAUSAL),
    Family("cohere", "CohereModel", "CohereConfig", DECODER, text, 2, expect=CAUSAL),
    Family(
        "granite", "GraniteModel", "GraniteConfig", {**DECODER, "attention_multiplier": 0.3}, text, 2, expect=CAUSAL
    ),
    Family("glm", "GlmModel", "GlmConfig", {**DECODER, "head_dim": 8}, text, 2, expect=CAUSAL),
    Family("smollm3", "SmolLM3Model", "SmolLM3Config", DECODER, text, 2, expect=CAUSAL),
    Family(
        "gptj",
        "GPTJModel",
        "GPTJConfig",
        {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "rotary_dim": 4, "use_cache": False},
        text,
        2,
        only=("eager",),
    ),
    Family(
        "gpt-neo",
        "GPTNeoModel",
        "GPTNeoConfig",
        {
            **_IDS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 40,
            "use_cache": False,
        },
        text,
        2,
        only=("eager",),
    ),
    Family(
        "codegen",
        "CodeGenModel",
        "CodeGenConfig",
        {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "rotary_dim": 4, "use_cache": False},
        text,
        2,
        only=("eager",),
    ),
    Family(
        "gpt-bigcode",
        "GPTBigCodeModel",
        "GPTBigCodeConfig",
        {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "use_cache": False},
        text,
        2,
    ),
    Family(
        "gpt-oss",
        "GptOssModel",
        "GptOssConfig",
        {**DECODER, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4},
        text,
        0,
        only=("eager",),
    ),
    Family(
        "vivit",
        "VivitModel",
        "VivitConfig",
        {**VISION, "num_frames": 4, "tubelet_size": [2, 8, 8]},
        lambda batch, length, side: {"pixel_values": torch.randn(batch, 4, 3, 16, 16)},
        2,
    ),
    Family(
        "videomae",
        "VideoMAEModel",
        "VideoMAEConfig",
        {**VISION, "num_frames": 4},
        lambda batch, length, side: {"pixel_values": torch.randn(batch, 4, 3, 16, 16)},
        2,
    ),
    Family(
        "swinv2",
        "Swinv2Model",
        "Swinv2Config",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        large_image,
        4,
        only=("eager",),
    ),
    Family(
        "hiera",
        "HieraModel",
        "HieraConfig",
        {"image_size": [32, 32], "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
        large_image,
        4,
        only=("eager",),
    ),
    Family(
        "squeezebert", "SqueezeBertModel", "SqueezeBertConfig", {**TEXT, "embedding_size": 32}, text, 2, only=("eager",)
    ),
    Family("roformer", "RoFormerModel", "RoFormerConfig", TEXT, text, 2, only=("eager",)),
    Family(
        "funnel",
        "FunnelModel",
        "FunnelConfig",
        {**_IDS, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
        text,
        0,
        only=("eager",),
    ),
    Family(
        "nystromformer",
        "NystromformerModel",
        "NystromformerConfig",
        {**TEXT, "segment_means_seq_len": 8, "num_landmarks": 4},
        text,
        0,
        only=("eager",),
    ),
    Family(
        "levit",
        "LevitModel",
        "LevitConfig",
        {
            "image_size": 32,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "drop_path_rate": 0,
        },
        large_image,
        5,
        only=("eager",),
    ),
)
