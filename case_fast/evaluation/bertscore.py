"""BERTScore (Zhang et al., 2020) by a model in a folder, without network.

Not by torchmetrics: its `bert_score` (1.9.0) sorts the replies and the references each by length, and does not put them back in
order, so that with more than one pair a reply is compared with another one's reference.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from case_fast.devices import resolve_device
from case_fast.errors import ConfigError, DataError
from case_fast.evaluation.measures import Measure, absent, of_rows, percent, placed
from case_fast.evaluation.metrics import signature_of
from case_fast.evaluation.replies import Reply
from case_fast.files import sha256
from case_fast.optional import needed
from case_fast.text_files import reading, require_file, require_folder

_FOLDER = "Give a folder with config.json, the tokenizer's files and model.safetensors, such as a copy of roberta-large"
_LONGEST = 512  # tokens of a text; what is longer is cut


class BertScore:
    """F1 of the best matches between the words of a reply and of its reference, as vectors of one layer.

    Args:
        folder: of a model that transformers' AutoModel opens.
        layer: whose vectors are compared, from 1; None: the last.
        baseline: table LAYER,P,R,F of what unrelated texts reach; F1 is given as (F1 - F) / (1 - F).

    Raises:
        MissingPackage: transformers is not installed. DataError: the folder or the table is none of these.
        ConfigError: the model has no such layer, or there is no such device.
    """

    def __init__(self, folder: str | Path, layer: int | None = None, baseline: str | Path | None = None, device: str = "auto",
                 batch_size: int = 64):
        folder = require_folder(folder, "model for BERTScore", _FOLDER)
        self.device, self.batch_size = resolve_device(device), batch_size
        transformers = needed("transformers", "BERTScore")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
            self.model = transformers.AutoModel.from_pretrained(folder, **local, dtype=torch.float32)
        except Exception as error:  # transformers, tokenizers, safetensors and torch each raise their own kinds
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise DataError(folder, f"the model cannot be loaded ({reason})", _FOLDER) from error
        layers = self.model.config.num_hidden_layers
        self.layer = layers if layer is None else layer
        if not 1 <= self.layer <= layers:
            raise ConfigError(f"bertscore_layer must lie in 1 .. {layers}, the layers of {folder}, not {layer}")
        self.model.to(self.device).eval()
        self.floor = 0.0 if baseline is None else _floor(baseline, self.layer)
        self.signature = signature_of(
            "bert_score", of="F1", scale=100, model=_digest(folder), layer=self.layer, idf="no",
            rescaled="no" if baseline is None else sha256(baseline)[:8], transformers=metadata.version("transformers"))

    def f1(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """(n,) of replies and their references; 0 where either has no word."""
        order = sorted(range(len(pairs)), key=lambda place: max(map(len, pairs[place])))
        found = np.zeros(len(pairs))
        for start in range(0, len(pairs), self.batch_size):
            chosen = order[start : start + self.batch_size]
            (one, has_one), (other, has_other) = (self._vectors([pairs[place][side] for place in chosen]) for side in (0, 1))
            alike = one @ other.transpose(1, 2)
            alike = alike.masked_fill(~(has_one[:, :, None] & has_other[:, None, :]), -torch.inf)
            precision, recall = (_mean(alike.amax(dim), has) for dim, has in ((2, has_one), (1, has_other)))
            both = precision + recall
            found[chosen] = torch.where(both != 0, 2 * precision * recall / both, 0).nan_to_num(0, 0, 0).double().cpu().numpy()
        return (found - self.floor) / (1 - self.floor)

    @torch.inference_mode()
    def _vectors(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(B, T, D) unit vectors and (B, T) which of them are words."""
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=_LONGEST, return_special_tokens_mask=True,
                                return_tensors="pt").to(self.device)
        words = inputs["attention_mask"].bool() & ~inputs.pop("special_tokens_mask").bool()
        vectors = self.model(**inputs, output_hidden_states=True).hidden_states[self.layer]
        return torch.nn.functional.normalize(vectors, dim=-1), words

    def measures(self, replies: Sequence[Reply]) -> list[Measure]:
        """Its mean over the replies that have a reference."""
        chosen = np.array([bool(reply.reference_words) for reply in replies])
        if not chosen.any():
            return [absent("bert_score", "overlap", "no reply has a reference", "higher")]
        scores = self.f1([(reply.text, reply.reference) for reply, known in zip(replies, chosen, strict=True) if known])
        rows = placed(np.stack([scores, np.ones(len(scores))], axis=1), chosen)
        return [of_rows("bert_score", "overlap", self.signature, "higher", rows, percent)]


def _mean(best: Tensor, has: Tensor) -> Tensor:
    return best.masked_fill(~has, 0).sum(1) / has.sum(1).clamp(min=1)


def _floor(path: str | Path, layer: int) -> float:
    """F of a layer in a table of baselines."""
    path = require_file(path, "baseline of BERTScore")
    with reading(path, "baseline of BERTScore"), open(path, encoding="utf-8", newline="") as stream:
        try:
            return next(float(row["F"]) for row in csv.DictReader(stream) if int(row["LAYER"]) == layer)
        except (StopIteration, KeyError, ValueError, TypeError, csv.Error) as error:
            raise DataError(path, f"no row of the layer {layer} in a table LAYER,P,R,F",
                            "Take the model's file of bert_score's rescale_baseline") from error


def _digest(folder: Path) -> str:
    """Eight digits over the weights."""
    whole = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        whole.update(sha256(path).encode())
    return whole.hexdigest()[:8]
