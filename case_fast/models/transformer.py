"""Transformer (Vaswani et al., 2017), one encoder and one decoder, and Multi-TRS (Rashkin et al., 2019), with an emotion head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from case_fast import equations as eq
from case_fast import equations_baselines as eqb
from case_fast.batch import Batch
from case_fast.errors import ConfigError
from case_fast.models.base import DialogueModel, ModelConfig, Output, Reading, no_autocast
from case_fast.models.layers import Decoder, Encoder, Memory, seed_at

PAD = 0  # the word that label smoothing leaves out

_DEMO = {"warmup": 200, "lr_scale": 0.35, "validate_every": 50, "min_steps": 200, "max_steps": 400, "log_every": 10,
         "checkpoint_every": 100}


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """The settings of `Transformer`, on top of `ModelConfig`; the defaults are those that its published figures come from.

    Attributes:
        attention_width: width of query, key and value together; heads must divide it. None: d_model.
        label_smoothing: share of the target's probability that all other words get, in [0, 1).
    """

    kind = "transformer"

    layers: int = 2
    ffn: int = 150
    attention_width: int | None = 40
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_width is not None and (self.attention_width < 1 or self.attention_width % self.heads):
            raise ConfigError(f"heads must divide attention_width: {self.heads} does not divide {self.attention_width}")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing must be in [0, 1), not {self.label_smoothing}")


class Transformer(DialogueModel, paper_url="https://arxiv.org/abs/1706.03762"):
    """H = Enc(X), D = Dec(Y, H), z = W_out D + b. It predicts no emotion."""

    Config: ClassVar[type[ModelConfig]] = TransformerConfig
    presets = {
        "released": {"warmup": 8_000},
        "frame": {"model": {"layers": 1, "ffn": 300, "attention_width": None, "label_smoothing": 0.0}},
        "demo": {"model": {"d_model": 128, "ffn": 128, "layers": 1, "encoder_dropout": 0.2, "decoder_dropout": 0.2}, **_DEMO},
    }
    published = {
        "": {"source": "Zhou et al. (ACL 2023), Table 1 (recipe: released)", "ppl_geometric": 37.65, "dist_1": 0.47,
             "dist_2": 2.05},
    }

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.config: TransformerConfig
        c = config
        sizes = (c.layers, c.d_model, c.heads, c.ffn)
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.encoder = Encoder(*sizes, c.encoder_dropout, width=c.attention_width)
        self.decoder = Decoder(*sizes, c.decoder_dropout, sources=1, width=c.attention_width)
        self.output = nn.Linear(c.d_model, c.vocab_size)
        self._add_parts()
        self.finish()

    def _add_parts(self) -> None:
        """What a model on top of this one has beside it."""

    def read(self, batch: Batch) -> Reading:
        return self._read(batch, self.look_up(self._words(batch.require(self.needs))))

    def _words(self, batch: Batch) -> dict[str, Tensor]:
        """What is read of the context, for `look_up`."""
        return {"context": batch.context, "context_role": batch.context_role}

    def _encoded(self, batch: Batch, words: dict[str, Tensor]) -> Tensor:
        """H, (T, d)."""
        rows = self.place(words["context"] + words["context_role"], batch.context_position, batch.longest)
        return self.encoder(rows, batch.cu_context, seed=seed_at(batch.seed, "context"))

    def _read(self, batch: Batch, words: dict[str, Tensor]) -> Reading:
        rows = self._encoded(batch, words)
        emotion = self._emotion(eq.take(rows, batch.cu_context[:-1]))
        return Reading(memories=[Memory(rows, batch.cu_context)], emotion_logits=emotion)

    def _emotion(self, summary: Tensor) -> Tensor | None:
        """Log-probabilities of the emotions from the [CLS] rows (B, d)."""
        return None

    def _decoded(self, batch: Batch) -> tuple[Reading, Tensor]:
        """What is read of the contexts, and the decoder's hidden states (M, d) of the replies."""
        words = self.look_up(self._words(batch.require(self.needs)) | {"decoder_input": batch.decoder_input})
        reading = self._read(batch, words)
        return reading, self.decode_replies(batch, words["decoder_input"], reading)

    def forward(self, batch: Batch) -> Output:
        reading, hidden = self._decoded(batch)
        nll, prediction = self.word_losses(hidden, batch.target)
        losses = {"generation": eq.generation_loss(nll, batch.target_weight)}
        loss = losses["generation"]
        if self.training and self.config.label_smoothing:
            weight, bias = self.output.weight, self.output.bias
            with no_autocast(hidden):
                rows = eq.full_precision(hidden)
                smoothed = eqb.label_smoothed(nll, rows, batch.target, weight, bias, self.config.label_smoothing, PAD)
            loss = losses["smoothed"] = eq.generation_loss(smoothed, batch.target_weight)
        if reading.emotion_logits is not None:
            losses["emotion"] = eq.emotion_loss(reading.emotion_logits, batch.emotion, batch.dialogue_weight)
            loss = loss + self._emotion_weight(batch, loss.dtype) * losses["emotion"]
        out = Output(loss=loss, losses=losses, hidden=hidden, nll=nll, prediction=prediction,
                     emotion_logits=reading.emotion_logits)
        self._add_losses(batch, reading, out)
        return out

    def _add_losses(self, batch: Batch, reading: Reading, out: Output) -> None:
        """The losses that a model on top of this one has beside these, into ``out``."""

    def _emotion_weight(self, batch: Batch, dtype: torch.dtype) -> float | Tensor:
        """lambda of L_emo."""
        return 0.0


@dataclass(frozen=True)
class MultiTRSConfig(TransformerConfig):
    """The settings of `MultiTRS`, on top of `TransformerConfig`; the defaults are those that its published figures come from.

    Attributes:
        gamma_emotion: weight of L_emo, times what emotion_scale says.
        emotion_scale: "one", "dialogue" (both losses summed over the batch) or "batch" (words summed, emotions averaged), see
            `case_fast.equations_baselines.emotion_scale`.
    """

    kind = "multi-trs"

    gamma_emotion: float = 1.0
    emotion_scale: Literal["one", "dialogue", "batch"] = "batch"


class MultiTRS(Transformer, paper_url="https://aclanthology.org/P19-1534"):
    """The `Transformer` with log P_emo = log softmax(W_emo c) of the context's [CLS] row c, and L = L_gen + lambda L_emo."""

    Config = MultiTRSConfig
    title = "Multi-TRS"
    presets = {
        "released": Transformer.presets["released"],
        "frame": {"model": {**Transformer.presets["frame"]["model"], "emotion_scale": "one"}},
        "demo": {"model": {**Transformer.presets["demo"]["model"], "emotion_scale": "one"}, **_DEMO},
    }
    published = {
        "": {"source": "Zhou et al. (ACL 2023), Table 1 (recipe: released)", "ppl_geometric": 37.45, "dist_1": 0.51,
             "dist_2": 2.12, "acc_1": 0.347},
    }

    def _add_parts(self) -> None:
        self.w_emo = nn.Parameter(torch.empty(self.config.emotions, self.config.d_model))

    def _initialize(self) -> None:
        super()._initialize()
        nn.init.xavier_uniform_(self.w_emo)

    def _emotion(self, summary: Tensor) -> Tensor:
        return eq.emotion_log_probability(summary, self.w_emo)

    def _emotion_weight(self, batch: Batch, dtype: torch.dtype) -> float | Tensor:
        dialogues, words = batch.sizes.to(dtype)
        return self.config.gamma_emotion * eqb.emotion_scale(self.config.emotion_scale, dialogues, words)
