"""Tokenizers with vocabularies built in memory, and random text encoders to go with them.

Byte-level and character vocabularies: every prompt is representable, and two prompts that differ
never encode alike (within the length that a pipeline allows).
"""

import json
from functools import cache

import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny.base import PROMPTS

WIDTH = 32
CLIP_LENGTH = 77
PRINTABLE = [chr(code) for code in range(33, 127)]

# Qwen-Image cuts the first 34 tokens off its chat template: with these words as tokens the
# template has the length that it has with the published vocabulary.
QWEN_WORDS = (
    "system user assistant Describe the image by detailing the color, shape, size, texture,"
    " quantity, text, spatial relationships of the objects and background:"
)


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def clip_tokenizer() -> PreTrainedTokenizerBase:
    """Return a byte-level CLIP tokenizer of the usual length."""
    letters = _alphabet()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        model_max_length=CLIP_LENGTH,
    )


def clip_encoder(tokenizer: PreTrainedTokenizerBase, *, pooled: bool) -> PreTrainedModel:
    """Return a CLIP text model; `pooled` adds the projection of the pooled output."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if pooled else transformers.CLIPTextModel
    return kind(config)


def t5_tokenizer() -> PreTrainedTokenizerBase:
    """Return a character-level T5 tokenizer."""
    letters = [("▁", -2.0), *((letter, -3.0) for letter in PRINTABLE)]
    return transformers.T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters],
        extra_ids=0,
        model_max_length=128,
    )


def t5_encoder(
    tokenizer: PreTrainedTokenizerBase, *, kind: str = "T5", width: int = WIDTH
) -> PreTrainedModel:
    """Return a T5 encoder; `kind` is "T5" or "UMT5" (a position bias in every layer)."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


@cache
def _qwen_vocabulary() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        initial_alphabet=_alphabet(),
        show_progress=False,
    )
    corpus = [*QWEN_WORDS.split(), QWEN_WORDS, *PROMPTS, *(f" {prompt}" for prompt in PROMPTS)]
    trained.train_from_iterator(corpus, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tuple(tokens), tuple((left, right) for left, right in model["merges"])


def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """Return a byte-level Qwen2 tokenizer with a chat template."""
    tokens, merges = _qwen_vocabulary()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate([*tokens, *special])}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocab, merges=list(merges), additional_special_tokens=special[1:]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def _decoder(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }


def qwen3_encoder(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a Qwen3 language model."""
    return transformers.Qwen3Model(transformers.Qwen3Config(**_decoder(tokenizer)))


def glm_encoder(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a GLM language model."""
    return transformers.GlmModel(transformers.GlmConfig(**_decoder(tokenizer)))


def llama_tokenizer() -> PreTrainedTokenizerBase:
    """Return a character-level Llama tokenizer."""
    tokens = ["<unk>", "<s>", "</s>", "<pad>", "▁", *PRINTABLE]
    return transformers.LlamaTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        pad_token="<pad>",
        padding_side="right",
    )


def llama_encoder(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a Llama language model."""
    return transformers.LlamaModel(transformers.LlamaConfig(**_decoder(tokenizer)))


def qwen_vl_encoder(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a Qwen2.5-VL model with the least of a vision tower."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = transformers.Qwen2_5_VLConfig(
        text_config=_decoder(tokenizer) | {"rope_parameters": rope},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
        },
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def gemma_tokenizer() -> PreTrainedTokenizerBase:
    """Return a character-level Gemma tokenizer."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *PRINTABLE]
    return transformers.GemmaTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[]
    )


def gemma_encoder(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a Gemma 2 language model."""
    config = transformers.Gemma2Config(**_decoder(tokenizer), query_pre_attn_scalar=8)
    return transformers.Gemma2Model(config)
