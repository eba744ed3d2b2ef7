"""Inferences from COMET: a BART model fine-tuned on ATOMIC-2020 (Hwang et al. 2021), from a local folder.

The prompt is that of COMET-ATOMIC-2020, "{text} {relation} [GEN]", decoded by beam search. It needs
the package transformers.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from case_fast.devices import resolve_device
from case_fast.errors import ConfigError, DataError
from case_fast.knowledge.source import check_request, clean_inferences
from case_fast.text_files import require_folder

_log = logging.getLogger(__name__)

_GENERATE = "[GEN]"
_DOWNLOAD_AGAIN = "Unpack the COMET-ATOMIC-2020 BART folder again"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # by preference
_TOKENIZER = ("tokenizer.json", "vocab.json")  # either is enough to load one
_DEFINING = (
    *("config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)


class CometSource:
    """A `KnowledgeSource` over a COMET-BART folder (config, tokenizer, weights) as `transformers` reads it.

    Nothing is downloaded and no code of the folder runs. Weights are taken from safetensors where there are any; the
    released folder has only ``pytorch_model.bin``, a pickle, which transformers then reads with torch's restricted
    unpickler (``weights_only``): tensors and plain containers, nothing that can call a function.

    The answers to k inferences are the k best of ``beams`` beams. A text too long for ``max_input_tokens`` loses its
    beginning, never the relation. Prompts are batched by length; neither that nor ``batch_size`` changes an answer,
    except where two beams differ by rounding errors only. For the same reason ``device`` is no part of ``settings``.

    Raises:
        ConfigError: transformers is not installed, there is no such device, or an argument is out of range.
        DataError: the folder lacks a part, or a part is damaged or does not fit the others.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str = "auto",
        beams: int = 5,
        max_input_tokens: int = 128,
        max_new_tokens: int = 32,
        batch_size: int = 32,
    ):
        arguments = {"beams": beams, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
        for name, value, least in (
            *((n, v, 1) for n, v in arguments.items()),
            ("max_input_tokens", max_input_tokens, 8),
        ):
            if value < least:
                raise ConfigError(f"{name}: {value} is too small; at least {least} is needed")
        self.device, self.batch_size = resolve_device(device), batch_size
        self.settings: dict[str, Any] = {
            "beams": beams,
            "max_input_tokens": max_input_tokens,
            "max_new_tokens": max_new_tokens,
        }
        folder = require_folder(folder, "COMET folder", "Give the unpacked COMET-ATOMIC-2020 BART folder as comet:DIR")
        weights = weight_files(folder)
        self.tokenizer, self.model, generation_config = _load(folder, use_safetensors=weights[0].suffix != ".bin")
        self.identity = f"comet:{_digest(folder, weights)}"
        self.model.to(self.device).eval()
        self.tokenizer.padding_side = "right"
        self.tokenizer.truncation_side = "left"
        if len(self.tokenizer.tokenize(_GENERATE)) != 1:
            _log.warning("%s: %s is not one token of its tokenizer; is this a COMET model?", folder, _GENERATE)
        # All of the search is stated here; of the folder's own generation settings only the token ids count.
        tokens = self.model.generation_config
        self._search = partial(
            generation_config,
            num_beams=beams,
            do_sample=False,
            early_stopping=True,
            length_penalty=1.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            min_length=0,
            max_new_tokens=max_new_tokens,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
            decoder_start_token_id=tokens.decoder_start_token_id,
            forced_bos_token_id=tokens.forced_bos_token_id,
            forced_eos_token_id=tokens.forced_eos_token_id,
        )

    def infer(self, texts: Sequence[str], relations: Sequence[str], k: int) -> list[dict[str, list[str]]]:
        """See `KnowledgeSource`.

        Raises:
            ConfigError: ``k`` is larger than the number of beams.
        """
        check_request(relations, k)
        if k > self.settings["beams"]:
            raise ConfigError(f"k: {k} inferences asked of {self.settings['beams']} beams; raise beams or lower k")
        prompts = list(dict.fromkeys(f"{text} {relation} {_GENERATE}" for text in texts for relation in relations))
        answers: dict[str, list[str]] = {}
        if prompts:
            encoded = self.tokenizer(prompts, truncation=True, max_length=self.settings["max_input_tokens"])["input_ids"]
            order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]), reverse=True)
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                decoded = self._generate([encoded[i] for i in batch], k)
                for row, i in enumerate(batch):
                    answers[prompts[i]] = clean_inferences(decoded[row * k : (row + 1) * k], k)
        return [{relation: answers[f"{text} {relation} {_GENERATE}"] for relation in relations} for text in texts]

    @torch.inference_mode()
    def _generate(self, rows: list[list[int]], k: int) -> list[str]:
        """k decoded texts a row of token ids, best first."""
        inputs = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.device)
        sequences = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            generation_config=self._search(num_return_sequences=k),
        )
        decoded = self.tokenizer.batch_decode(sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.replace(_GENERATE, " ") for text in decoded]


def weight_files(folder: Path) -> list[Path]:
    """The files the weights come from, after a look that every part of the folder is there."""
    if not (folder / "config.json").is_file():
        raise DataError(folder, "no config.json in this COMET folder", _DOWNLOAD_AGAIN)
    if not any((folder / name).is_file() for name in _TOKENIZER):
        raise DataError(folder, "no tokenizer (tokenizer.json, or vocab.json and merges.txt) there", _DOWNLOAD_AGAIN)
    for pattern in _WEIGHTS:
        if files := sorted(file for file in folder.glob(pattern) if file.is_file()):
            return files
    raise DataError(folder, "no weights (model.safetensors or pytorch_model.bin) there", _DOWNLOAD_AGAIN)


def _load(folder: Path, use_safetensors: bool) -> tuple[Any, Any, type]:
    """(tokenizer, model in float32, transformers' GenerationConfig class)."""
    try:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig
    except ImportError as error:
        raise ConfigError(
            f"--knowledge comet:DIR needs the package transformers ({error}); pip install 'case_fast[comet]' brings it"
        ) from error
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        model, info = AutoModelForSeq2SeqLM.from_pretrained(
            folder, **local, use_safetensors=use_safetensors, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # transformers, tokenizers, safetensors and torch each raise their own kinds
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise DataError(folder, f"the COMET model cannot be loaded ({reason})", _DOWNLOAD_AGAIN) from error
    unfit = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if unfit:
        problem = f"{len(unfit)} weights are missing or of another shape than config.json says ({unfit[0]}, ...)"
        raise DataError(folder, problem, _DOWNLOAD_AGAIN)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        problem = f"the tokenizer has {len(tokenizer)} tokens, the weights have {rows}"
        raise DataError(folder, problem, "Tokenizer and weights must come from one folder")
    return tokenizer, model, GenerationConfig


def _digest(folder: Path, weights: list[Path]) -> str:
    """sha256 over the files that define the answers, each with its name."""
    whole = hashlib.sha256()
    for path in [*(folder / name for name in _DEFINING), *weights]:
        if path.is_file():
            with open(path, "rb") as file:
                whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
