"""Settings of the model and the ablations of Table 2."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from case_fast.errors import ConfigError

# Table 2: what each row switches off, in terms of the settings below.
ABLATIONS: dict[str, dict[str, bool]] = {
    "w/o Graph": {"cognition_graph": False, "concept_graph": False},
    "w/o Align": {"coarse_alignment": False, "fine_alignment": False},
    "w/o CSGraph": {"cognition_graph": False},
    "w/o ECGraph": {"concept_graph": False},
    "w/o CGAlign": {"coarse_alignment": False},
    "w/o FGAlign": {"fine_alignment": False},
}


@dataclass(frozen=True)
class CASEConfig:
    """Everything that decides the shape and the objective of `CASE`; the defaults are the paper's.

    Attributes:
        vocab_size: words, special tokens included.
        emotions: emotion labels.
        cognition_relations: types of edges in G_CS.
        eos_id: the word that ends a reply; it is not counted by the diversity loss.
        d_model: width of every module; heads must divide it.
        heads, layers, ffn: attention heads, layers of every encoder, graph encoder and decoder, width of the feed-forward nets.
        encoder_dropout, graph_dropout, decoder_dropout: dropout probabilities.
        cognition_graph, concept_graph: graph encoders on; off, the initial vertex embeddings stand in (Table 2).
        coarse_alignment, fine_alignment: the two MIM losses on.
        intensity: where emotion intensity enters the concept graph: "after" the encoder, as the paper says; "before_norm",
            into its last layer norm, where it cancels, as the authors' code has it; "off".
        mim_score: how both MIM losses score a pair: "bilinear_sigmoid", sigmoid(x^T W y), as the paper says; "dot", x . y, as
            the authors' code has it: w_coarse and w_fine are then without use.
        num_negatives: sampled negatives a pair in L_fine, None for all in the batch; seed: their seed, below 2^31.
        detach_posterior: the posterior is a fixed target in L_KL.
        alpha, gamma_align, gamma_emotion, gamma_generation, gamma_diversity: weights of the losses.
    """

    vocab_size: int = 24_000
    emotions: int = 32
    cognition_relations: int = 7
    eos_id: int = 3
    d_model: int = 300
    heads: int = 2
    layers: int = 1
    ffn: int = 300
    encoder_dropout: float = 0.0
    graph_dropout: float = 0.1
    decoder_dropout: float = 0.0
    cognition_graph: bool = True
    concept_graph: bool = True
    coarse_alignment: bool = True
    fine_alignment: bool = True
    intensity: Literal["after", "before_norm", "off"] = "after"
    mim_score: Literal["bilinear_sigmoid", "dot"] = "bilinear_sigmoid"
    num_negatives: int | None = None
    seed: int = 0
    detach_posterior: bool = True
    alpha: float = 0.2
    gamma_align: float = 1.0
    gamma_emotion: float = 1.0
    gamma_generation: float = 1.0
    gamma_diversity: float = 1.5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "emotions", "d_model", "heads", "layers", "ffn"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.d_model % self.heads:
            raise ConfigError(f"heads must divide d_model: {self.heads} does not divide {self.d_model}")
        for item in fields(self):
            if item.name.endswith("dropout") and not 0 <= getattr(self, item.name) < 1:
                raise ConfigError(f"{item.name} must be in [0, 1), not {getattr(self, item.name)}")
        if self.intensity not in ("after", "before_norm", "off"):
            raise ConfigError(f"intensity must be after, before_norm or off, not {self.intensity!r}")
        if self.mim_score not in ("bilinear_sigmoid", "dot"):
            raise ConfigError(f"mim_score must be bilinear_sigmoid or dot, not {self.mim_score!r}")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed must be in [0, 2^31), not {self.seed}")
        if self.num_negatives is not None and self.num_negatives < 1:
            raise ConfigError(f"num_negatives must be at least 1 or None, not {self.num_negatives}")

    @property
    def gammas(self) -> tuple[float, float, float, float]:
        return self.gamma_align, self.gamma_emotion, self.gamma_generation, self.gamma_diversity

    def ablated(self, name: str) -> Self:
        """These settings with one row of Table 2 ("w/o Graph", ...) switched off."""
        if name not in ABLATIONS:
            raise ConfigError(f"unknown ablation {name!r}; one of {', '.join(ABLATIONS)}")
        changed: dict[str, Any] = ABLATIONS[name]
        return replace(self, **changed)
