"""A COMET folder as the released one, but small: a BART of random weights, a tokenizer of a few words. Needs transformers."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
import transformers

from case_fast.knowledge import RELATIONS

WORDS = "i failed my exam lost dog won the game again to feel sad happy go home cry study rest win none . !".split()
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def make_tokenizer(folder: Path, generate_token: bool = True) -> int:
    """A word-level tokenizer in BART's frame; returns its size."""
    added = [*RELATIONS, "[GEN]"] if generate_token else list(RELATIONS)
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
    fast.add_tokens(added)  # as the released COMET has them: added, not special
    fast.save_pretrained(folder)
    return len(fast)


def make_comet(folder: Path, seed: int = 0, generate_token: bool = True, rows: int | None = None) -> Path:
    folder.mkdir()
    size = make_tokenizer(folder, generate_token)
    torch.manual_seed(seed)
    config = transformers.BartConfig(
        vocab_size=rows or size,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=160,
        init_std=0.5,  # far apart logits: no near ties, so rounding cannot reorder beams
        dropout=0.0,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    transformers.BartForConditionalGeneration(config).save_pretrained(folder)
    return folder
