"""CASE: align cognition and affection, then answer with empathy (Zhou et al., ACL 2023)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case_fast import equations as eq
from case_fast import ops
from case_fast.batch import Batch
from case_fast.errors import ConfigError
from case_fast.models.base import DialogueModel, ModelConfig, no_autocast
from case_fast.models.layers import (
    AnySeed,
    Decoder,
    Encoder,
    GraphEncoder,
    Linear,
    Memory,
    drawn,
    product,
    product_of_parts,
    seed_at,
)
from case_fast.models.results import Alignment, Choice, Inside, Output, Reading, Why

SPECIAL_WORDS = 8  # from padding to the roles, the first of every vocabulary
SATURATED = 5.0  # |z| from which the sigmoid of Eq. 10 and 12 hardly has a gradient
_DISCERNMENT_POWER = {"none": 0.0, "fourth_root_d": 0.25, "sqrt_d": 0.5}  # of d


@dataclass(frozen=True)
class CASEConfig(ModelConfig):
    """Everything that decides the shape and the objective of `CASE`, on top of `ModelConfig`. The defaults are the paper's but
    for those of `printed`, which are what made its losses learn (docs/paper.md).

    Attributes:
        cognition_relations: types of edges in G_CS.
        graph_dropout: of the graph encoders.
        cognition_graph: graph encoder of G_CS on; off, the initial vertex embeddings stand in (Table 2).
        concept_graph: likewise of G_EC.
        coarse_alignment: L_coarse on.
        fine_alignment: L_fine on.
        intensity: where emotion intensity enters the concept graph: "after" the encoder, as the paper says; "before_norm",
            into its last layer norm, where it cancels, as the authors' code has it; "off".
        mim_score: how both MIM losses score a pair: "bilinear_sigmoid", sigmoid(x^T W y), as the paper says; "standardized",
            sigmoid(x^T W y / d) of x and y standardized over the batch (`equations.standardized`); "dot", x . y, as the authors'
            code has it: w_coarse and w_fine are then without use.
        num_negatives: sampled negatives a pair in L_fine, None for all in the batch.
        discernment_scale: what divides the products of Eq. 4-6: "none", as the paper says; "fourth_root_d", d^1/4; "sqrt_d",
            d^1/2, as in attention.
        vertex_pooling: what the cognition encoder makes of a text: its [CLS] row ("cls"), or the "mean" of its rows.
        special_scale: how large the rows of special words and of vertex types start beside those of words, and how large place 0
            is, where [CLS] stands: below 1, what all vertices have in common is small.
        kl_reduction: L_KL is the "sum" over a dialogue's vertices, as the paper says, or the "mean" over the batch's vertices,
            as the authors' code has it, a small share of that.
        detach_posterior: the posterior is a fixed target in L_KL.
        alpha: weight of L_fine in L_align.
        gamma_align: weight of L_align.
        gamma_emotion: weight of L_emo.
        gamma_generation: weight of L_gen.
        gamma_diversity: weight of L_div.
    """

    kind = "case"
    ablations = {  # Table 2: what each row switches off
        "w/o Graph": {"cognition_graph": False, "concept_graph": False},
        "w/o Align": {"coarse_alignment": False, "fine_alignment": False},
        "w/o CSGraph": {"cognition_graph": False},
        "w/o ECGraph": {"concept_graph": False},
        "w/o CGAlign": {"coarse_alignment": False},
        "w/o FGAlign": {"fine_alignment": False},
    }
    retired = ("seed",)  # of drawn negatives; seeds come with the batch
    # What the paper prints, whatever the defaults are; it is also what there was before these were settings.
    printed = came_later = {"mim_score": "bilinear_sigmoid", "discernment_scale": "none", "vertex_pooling": "cls",
                            "special_scale": 1.0, "kl_reduction": "sum"}

    cognition_relations: int = 7
    graph_dropout: float = 0.1
    cognition_graph: bool = True
    concept_graph: bool = True
    coarse_alignment: bool = True
    fine_alignment: bool = True
    intensity: Literal["after", "before_norm", "off"] = "after"
    mim_score: Literal["bilinear_sigmoid", "standardized", "dot"] = "standardized"
    num_negatives: int | None = None
    discernment_scale: Literal["none", "fourth_root_d", "sqrt_d"] = "sqrt_d"
    vertex_pooling: Literal["cls", "mean"] = "mean"
    special_scale: float = 1.0
    kl_reduction: Literal["sum", "mean"] = "mean"
    detach_posterior: bool = True
    alpha: float = 0.2
    gamma_align: float = 1.0
    gamma_emotion: float = 1.0
    gamma_generation: float = 1.0
    gamma_diversity: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.special_scale < math.inf:
            raise ConfigError(f"special_scale must be a number of at least 0, not {self.special_scale!r}")
        if self.num_negatives is not None and self.num_negatives < 1:
            raise ConfigError(f"num_negatives must be at least 1 or None, not {self.num_negatives}")

    @property
    def gammas(self) -> tuple[float, float, float, float]:
        return self.gamma_align, self.gamma_emotion, self.gamma_generation, self.gamma_diversity


@dataclass(kw_only=True)
class CASEOutput(Output):
    """What a forward pass gives; losses are bow, kl, coarse, fine, emotion, generation, diversity (phase "bow": bow alone).

    Attributes:
        prior_cognition, posterior_cognition: (K,) probabilities over the knowledge vertices (Eq. 4, 5), packed by cu_knowledge.
        prior_concept, posterior_concept: (V_ec,) over the vertices of G_EC (Eq. 4, 6), packed by concept.graph.cu_vertices.
        gate: (B,) mu of Eq. 15.
        r_cog, r_emo, r_aff: (B, d).
        knowledge, concept, reaction: (K, d), (V_ec, d), (R, d): cs_i, ec_i, er_i.
        diagnostics: InfoNCE bounds of both MIM losses and, where their score has a sigmoid, its share of saturated pairs.
    """

    prior_cognition: Tensor | None = None
    posterior_cognition: Tensor | None = None
    prior_concept: Tensor | None = None
    posterior_concept: Tensor | None = None
    gate: Tensor | None = None
    r_cog: Tensor | None = None
    r_emo: Tensor | None = None
    r_aff: Tensor | None = None
    knowledge: Tensor | None = None
    concept: Tensor | None = None
    reaction: Tensor | None = None


@dataclass(kw_only=True)
class CASEReading(Reading):
    """What CASE understood of a batch of contexts; memories are K_CS, K_EC and S'_X.

    Attributes:
        knowledge, concept, context, reaction: (K, d) cs_i of K_CS; (V_ec, d) ec_i; (T, d) S_X; (R, d) er_i.
        log_prior_cognition, log_prior_concept: (K,), (V_ec,) Eq. 4.
        r_cog, r_emo, r_aff, gate: (B, d) each and (B,), Eq. 3, 14, 15.
    """

    knowledge: Tensor
    concept: Tensor
    context: Tensor
    reaction: Tensor
    log_prior_cognition: Tensor
    log_prior_concept: Tensor
    r_cog: Tensor
    r_emo: Tensor
    r_aff: Tensor
    gate: Tensor


class CASE(DialogueModel, tags=["empathetic-dialogue", "case"], paper_url="https://aclanthology.org/2023.acl-long.457"):
    """The whole model. ``model(batch)`` takes a packed `Batch` and returns a `CASEOutput`; ``.loss.backward()`` trains it.

    ``set_phase("bow")`` restricts training to L_BOW and freezes what that loss does not reach; ``set_phase("all")``, the state of
    a new model, trains the whole objective, with every trainable parameter in each step's graph.

    Running word counts of the diversity loss are a buffer: they grow in training mode only and are saved with the weights.
    """

    Config = CASEConfig
    needs = ("dialogue", "case", "concept")
    phases = ("bow", "all")
    presets = {
        "paper": {},
        "printed": {"model": CASEConfig.printed},
        "demo": {
            "model": {"d_model": 128, "ffn": 128, "encoder_dropout": 0.2, "decoder_dropout": 0.2},
            "phase1_epochs": 2,
            "warmup": 200,
            "lr_scale": 0.35,
            "validate_every": 50,
            "min_steps": 200,
            "max_steps": 400,
            "log_every": 10,
            "checkpoint_every": 100,
        },
    }
    published = {
        "": {"source": "Zhou et al. (ACL 2023), Table 1", "ppl_geometric": 35.37, "dist_1": 0.74, "dist_2": 4.01, "acc_1": 0.402},
        **{
            name: {"source": "Zhou et al. (ACL 2023), Table 2", "ppl_geometric": ppl, "dist_1": dist_1,
                   "dist_2": dist_2, "acc_1": accuracy}
            for name, ppl, dist_1, dist_2, accuracy in (
                ("w/o Graph", 36.10, 0.68, 3.50, 0.280), ("w/o Align", 35.75, 0.65, 3.34, 0.369),
                ("w/o CSGraph", 35.51, 0.64, 3.18, 0.375), ("w/o ECGraph", 36.24, 0.72, 3.94, 0.329),
                ("w/o CGAlign", 35.67, 0.68, 3.60, 0.378), ("w/o FGAlign", 35.55, 0.67, 3.43, 0.370),
            )
        },
    }
    shared = ("context_encoder", "cognition_encoder", "cognition_graph", "concept_graph")
    balance = ("concepts", "reactions")
    sources = (("inferences",), ("concepts",), ("context",))
    retired = ("draws",)  # a count of steps that drew negatives

    def __init__(self, config: CASEConfig):
        super().__init__(config)
        self.config: CASEConfig
        c, d = config, config.d_model
        sizes = (c.layers, d, c.heads, c.ffn)
        self.embedding = nn.Embedding(c.vocab_size, d)
        self.vertex_type = nn.Embedding(2, d)
        self.context_encoder = Encoder(*sizes, c.encoder_dropout)
        self.cognition_encoder = Encoder(*sizes, c.encoder_dropout)
        self.reaction_encoder = Encoder(*sizes, c.encoder_dropout)
        self.reaction_fusion = Linear(2 * d, d, bias=False)
        self.reaction_context_encoder = Encoder(*sizes, c.encoder_dropout)
        self.cognition_graph = GraphEncoder(*sizes, c.graph_dropout, relations=c.cognition_relations)
        self.concept_graph = GraphEncoder(*sizes, c.graph_dropout)
        self.phi_cognition = nn.Sequential(Linear(d, d), nn.Tanh())
        self.phi_concept = nn.Sequential(Linear(d, d), nn.Tanh())
        self.eta = nn.Sequential(Linear(2 * d, d), nn.Tanh(), nn.Linear(d, c.vocab_size))
        self.w_coarse = nn.Parameter(torch.empty(d, d))
        self.w_fine = nn.Parameter(torch.empty(d, d))
        self.w_aff = nn.Parameter(torch.empty(2 * d))
        self.w_emo = nn.Parameter(torch.empty(c.emotions, d))
        self.fusion = Linear(3 * d, d)
        self.decoder = Decoder(*sizes, c.decoder_dropout, sources=3)
        self.output = nn.Linear(d, c.vocab_size)
        self.count_words()
        self.finish()

    def _initialize(self) -> None:
        super()._initialize()
        d = self.config.d_model
        nn.init.normal_(self.vertex_type.weight, std=1.0)  # as large as a scaled word embedding
        with torch.no_grad():
            self.vertex_type.weight *= self.config.special_scale
            self.embedding.weight[:SPECIAL_WORDS] *= self.config.special_scale
        std = 1.0 if self.config.mim_score == "standardized" else 1 / d  # larger starts saturate the sigmoid
        nn.init.normal_(self.w_coarse, std=std)
        nn.init.normal_(self.w_fine, std=std)
        nn.init.normal_(self.w_aff, std=(2 * d) ** -0.5)
        nn.init.xavier_uniform_(self.w_emo)

    # ---- phases and ablations

    def switched_off(self) -> Iterator[nn.Module | nn.Parameter]:
        c = self.config
        if not c.cognition_graph:
            yield self.cognition_graph
        if not c.concept_graph:
            yield self.concept_graph
        if not c.coarse_alignment or c.mim_score == "dot":
            yield self.w_coarse
        if not c.fine_alignment or c.mim_score == "dot":
            yield self.w_fine

    def unreached(self, phase: str) -> Iterator[nn.Module | nn.Parameter]:
        if phase == "bow":
            yield from (self.reaction_encoder, self.reaction_fusion, self.reaction_context_encoder, self.phi_cognition,
                        self.phi_concept, self.w_coarse, self.w_fine, self.w_aff, self.w_emo, self.fusion, self.decoder,
                        self.output)

    # ---- reading the context (sections 3.1 and 3.2)

    def positions(self, position: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
        found, scale = super().positions(position, longest, dtype), self.config.special_scale
        return found if scale == 1 else torch.where((position == 0).unsqueeze(1), found * scale, found)

    def _text_vectors(self, rows: Tensor, cu: Tensor, seed: AnySeed, index: Tensor | None = None) -> Tensor:
        """(s, d), a vector for each text of the cognition encoder; its arguments."""
        if self.config.vertex_pooling == "cls":
            return self.cognition_encoder(rows, cu, first_only=True, seed=seed, index=index)
        encoded = self.cognition_encoder(rows, cu, seed=seed, index=index)
        text = torch.searchsorted(cu[1:], torch.arange(encoded.shape[0], device=cu.device), right=True)
        return eq.segment_mean(encoded, text, cu.shape[0] - 1)

    def _context_words(self, batch: Batch) -> dict[str, Tensor]:
        return {"text": batch.case.distinct_word, "concept": batch.concept.word, "context": batch.context,
                "context_role": batch.context_role, "reaction": batch.case.reaction}

    def _graph_vectors(self, batch: Batch, words: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """cs_i of the knowledge vertices (K, d), ec_i of all concept vertices (V_ec, d), and the replies, where they are among
        ``words`` and there behind the texts, as the cognition encoder reads them by the same call, (B, d)."""
        c, case, part = self.config, batch.case, batch.concept
        position, cu, index = case.distinct_position, case.cu_text, case.text_distinct
        if "response" in words:
            end = len(words["text"])
            position = torch.cat([position, case.response_position])
            index = torch.cat([index, torch.arange(len(case.distinct_word), end, device=index.device)])
            cu = torch.cat([cu, cu[-1] + case.cu_response[1:]])
        texts = self.place(words["text"], position, batch.longest)
        texts = self._text_vectors(texts, cu, seed_at(batch.seed, "texts"), index)
        texts, y_cog = texts.split([len(case.cu_text) - 1, len(cu) - len(case.cu_text)])
        of_vertex = case.cognition_text
        if c.cognition_graph:
            g, seed = case.cognition, seed_at(batch.seed, "cognition graph")
            cognition = self.cognition_graph(texts, g.indptr, g.indices, g.relation, seed=seed, index=of_vertex)
        else:
            cognition = eq.take(texts, of_vertex)
        concept = self.place(words["concept"], part.position, batch.longest) + self.vertex_type(part.type)
        if c.concept_graph:
            g, seed = part.graph, seed_at(batch.seed, "concept graph")
            inside = part.intensity if c.intensity == "before_norm" else None
            concept = self.concept_graph(concept, g.indptr, g.indices, intensity=inside, seed=seed)
            if c.intensity == "after":
                concept = eq.superimpose_intensity(concept, part.intensity)
        return eq.take(cognition, case.knowledge), concept, y_cog

    def _reactions(self, batch: Batch, words: Tensor, context: Tensor) -> Tensor:
        """er_i, (R, d): the averaged reactions of each sub-utterance, seen in the light of the context."""
        case = batch.case
        rows = case.reaction_dialogue.numel()
        encoded = self.place(words, case.reaction_position, batch.longest)
        encoded = self.reaction_encoder(encoded, case.cu_reaction, seed=seed_at(batch.seed, "reactions"))
        average = eq.segment_mean(encoded, case.reaction_segment, rows)
        # W [S_X[j] ; h_i]: the part of S_X is the same for all reactions of a dialogue
        of_context, of_reaction = product_of_parts(self.reaction_fusion.weight, context, average)
        fused = eq.take(of_context, case.reaction_context) + eq.take(of_reaction, case.reaction_context_segment)
        cu, seed = case.cu_reaction_context, seed_at(batch.seed, "reactions in context")
        return self.reaction_context_encoder(fused, cu, first_only=True, seed=seed)

    def _posteriors(self, batch: Batch, words: dict[str, Tensor], knowledge: Tensor, concept: Tensor, y_cog: Tensor
                    ) -> tuple[Tensor, Tensor]:
        """Log of Eq. 5 and 6, from the reply read by the cognition encoder (B, d), and by the context encoder here."""
        case, seed = batch.case, seed_at(batch.seed, "reply as context")
        reply = self.place(words["response"], case.response_position, batch.longest) + words["response_role"]
        y_ctx = self.context_encoder(reply, case.cu_response, first_only=True, seed=seed)
        with no_autocast(knowledge):
            return self._discerned(batch, knowledge, concept, y_cog, y_ctx)

    def _discerned(self, batch: Batch, knowledge: Tensor, concept: Tensor, of_cognition: Tensor, of_concept: Tensor
                   ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of both kinds of knowledge (Eq. 4-6), by signals (B, d) for each."""
        scale = self.config.d_model ** -_DISCERNMENT_POWER[self.config.discernment_scale]
        return (
            eq.discernment(knowledge, of_cognition, batch.case.knowledge_dialogue, scale),
            eq.discernment(concept, of_concept, batch.concept.graph.dialogue, scale),
        )

    def _expected(self, batch: Batch, knowledge: Tensor, concept: Tensor, log_cognition: Tensor, log_concept: Tensor
                  ) -> tuple[Tensor, Tensor]:
        """Eq. 3 for both kinds of knowledge, (B, d) each."""
        return (
            eq.expected_knowledge(log_cognition, knowledge, batch.case.knowledge_dialogue, batch.size),
            eq.expected_knowledge(log_concept, concept, batch.concept.graph.dialogue, batch.size),
        )

    def _bow_loss(self, batch: Batch, knowledge: Tensor, concept: Tensor, log_cognition: Tensor, log_concept: Tensor) -> Tensor:
        with no_autocast(knowledge):
            cog, emo = self._expected(batch, knowledge, concept, log_cognition, log_concept)
        *inner, words = self.eta
        hidden = torch.cat([cog, emo], dim=-1)
        for layer in inner:
            hidden = layer(hidden)
        nll, _ = ops.linear_cross_entropy(hidden, words.weight, words.bias, batch.target, cu_target=batch.cu_target)
        return eq.bow_loss(nll, batch.bow_weight)

    def read(self, batch: Batch) -> CASEReading:
        words = self.look_up(self._context_words(batch.require(self.needs)))
        return self._read(batch, words, *self._graph_vectors(batch, words)[:2])

    def _read(self, batch: Batch, words: dict[str, Tensor], knowledge: Tensor, concept: Tensor) -> CASEReading:
        context = self.place(words["context"], batch.context_position, batch.longest) + words["context_role"]
        context = self.context_encoder(context, batch.cu_context, seed=seed_at(batch.seed, "context"))
        summary = eq.take(context, batch.cu_context[:-1])
        phi_cognition, phi_concept = self.phi_cognition(summary), self.phi_concept(summary)
        reaction = self._reactions(batch, words["reaction"], context)
        with no_autocast(context):
            log_cognition, log_concept = self._discerned(batch, knowledge, concept, phi_cognition, phi_concept)
            r_cog, r_emo = self._expected(batch, knowledge, concept, log_cognition, log_concept)
            gate = eq.affect_gate(r_emo, self._first_reaction(batch, reaction), self.w_aff)
        return self._balanced(batch, gate, knowledge=knowledge, concept=concept, context=context, reaction=reaction,
                              log_prior_cognition=log_cognition, log_prior_concept=log_concept, r_cog=r_cog, r_emo=r_emo)

    def _first_reaction(self, batch: Batch, reaction: Tensor) -> Tensor:
        """er_0, (B, d)."""
        return eq.full_precision(eq.take(reaction, batch.case.reaction_first))

    def _balanced(self, batch: Batch, gate: Tensor, **read: Tensor) -> CASEReading:
        """The reading by a gate (B,) (Eq. 14, 16, 18); ``read``: what of it does not depend on the gate."""
        context, r_emo = read["context"], read["r_emo"]
        with no_autocast(context):
            r_aff = eq.affect(r_emo, self._first_reaction(batch, read["reaction"]), gate)
            emotion_logits = eq.emotion_log_probability(r_aff, self.w_emo)
        fused = self._fuse(context, read["r_cog"], r_aff, batch.context_segment)
        offsets = (batch.case.cu_knowledge, batch.concept.graph.cu_vertices, batch.cu_context)
        rows = (read["knowledge"], read["concept"], fused)
        return CASEReading(memories=[Memory(x, cu) for x, cu in zip(rows, offsets, strict=True)], emotion_logits=emotion_logits,
                           r_aff=r_aff, gate=gate, **read)

    def with_gate(self, batch: Batch, reading: CASEReading, gate: Tensor) -> CASEReading:
        names = ("knowledge", "concept", "context", "reaction", "log_prior_cognition", "log_prior_concept", "r_cog", "r_emo")
        return self._balanced(batch, gate, **{name: getattr(reading, name) for name in names})

    def _fuse(self, context: Tensor, r_cog: Tensor, r_aff: Tensor, segment: Tensor) -> Tensor:
        """S'_X, (T, d) (Eq. 18, `equations.fuse_context`), W_1 S_X[i] + (W_2 r_cog + W_3 r_aff + b): once a dialogue what is the
        same for all of its rows."""
        of_context, of_dialogue = self.fusion.weight.split([self.config.d_model, 2 * self.config.d_model], dim=1)
        same = product(torch.cat([r_cog, r_aff], dim=-1).to(context.dtype), of_dialogue, self.fusion.bias)
        return F.relu(product(context, of_context) + eq.take(same, segment))

    def explain(self, batch: Batch, reading: CASEReading, posterior: bool = False) -> Why:
        """Prior and posterior over both kinds of knowledge (Eq. 4-6) and the gate (Eq. 15)."""
        case, found = batch.case, (None, None)
        if posterior:
            words = self.look_up({"response": case.response, "response_role": case.response_role})
            reply = self.place(words["response"], case.response_position, batch.longest)
            y_cog = self._text_vectors(reply, case.cu_response, seed_at(batch.seed, "texts"))
            found = [log_q.exp() for log_q in self._posteriors(batch, words, reading.knowledge, reading.concept, y_cog)]
        priors = (reading.log_prior_cognition, reading.log_prior_concept)
        dialogues = (case.knowledge_dialogue, batch.concept.graph.dialogue)
        choices = [Choice(prior=p.exp(), dialogue=dialogue, posterior=q)
                   for p, dialogue, q in zip(priors, dialogues, found, strict=True)]
        return Why(emotion=reading.emotion_logits.exp(), choices=dict(zip(("inferences", "concepts"), choices, strict=True)),
                   gate=reading.gate)

    # ---- the objective

    def _coarse_pairs(self, batch: Batch, of: CASEReading | CASEOutput) -> tuple[Tensor, ...]:
        """What L_coarse compares (Eq. 9), the dialogues that have knowledge: x, y, W, positive, sizes."""
        known = batch.case.known
        pairs = torch.arange(known.shape[0], device=known.device)
        return eq.take(of.r_cog, known), eq.take(of.r_emo, known), self.w_coarse, pairs, batch.case.coarse_sizes

    def _fine_pairs(self, batch: Batch, of: CASEReading | CASEOutput) -> tuple[Tensor, ...]:
        """What L_fine compares (Eq. 11), the knowledge whose sub-utterance has a reaction; as `_coarse_pairs`."""
        case = batch.case
        knowledge, reactions = eq.take(of.knowledge, case.paired), eq.take(of.reaction, case.with_reaction)
        return knowledge, reactions, self.w_fine, case.positive, case.fine_sizes

    def _coarse(self, batch: Batch, reading: CASEReading, diagnostics: dict[str, Tensor]) -> Tensor:
        *_, pairs, sizes = aligned = self._coarse_pairs(batch, reading)
        negatives = (pairs < sizes[0]) * (sizes[0] - 1)
        return self._mim("coarse", batch, *aligned, (negatives, negatives), diagnostics)

    def _fine(self, batch: Batch, reading: CASEReading, diagnostics: dict[str, Tensor]) -> Tensor:
        negatives = batch.case.negatives_affection, batch.case.negatives_cognition
        return self._mim("fine", batch, *self._fine_pairs(batch, reading), negatives, diagnostics, self.config.num_negatives)

    def _mim(self, name: str, batch: Batch, x: Tensor, y: Tensor, weight: Tensor, positive: Tensor, sizes: Tensor,
             negatives: tuple[Tensor, ...], diagnostics: dict[str, Tensor], num_negatives: int | None = None) -> Tensor:
        """``negatives``: how many each pair has over rows of y (affection) and over rows of x (cognition)."""
        pairs, seed = sizes[0], batch.seed
        if (others := batch.others) is not None and others.negatives:
            x, y, positive, sizes = others.pairs(eq.full_precision(x), eq.full_precision(y), positive)
            pairs, seed = sizes[0] * others.count, others.seed  # each process has its share of what all of them make
            negatives = sizes[1] - 1, sizes[0] - eq.group_sizes(positive, y.shape[0])[positive]
        elif others is not None:
            pairs = others.total(pairs)
        if num_negatives is not None:
            negatives = tuple((count > 0) * num_negatives for count in negatives)
        seed = 0 if num_negatives is None else drawn(seed_at(seed, "negatives"))
        with no_autocast(x):
            compared, score = self._compared(x, y, weight, sizes)
            side_y, side_x, logit = ops.mim_sides(*compared, positive, num_negatives, seed, score, sizes=sizes)
        with torch.no_grad():
            if self.config.mim_score != "dot":
                diagnostics[f"{name}_saturated"] = eq.reduced((logit.abs() > SATURATED).to(logit.dtype), "mean", pairs)
            diagnostics[f"{name}_bound_affection"] = eq.infonce_bound(side_y, negatives[0], pairs)
            diagnostics[f"{name}_bound_cognition"] = eq.infonce_bound(side_x, negatives[1], pairs)
        return eq.reduced(side_y + side_x, "mean", pairs)

    def _compared(self, x: Tensor, y: Tensor, weight: Tensor, sizes: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor | None], str]:
        """x, y and W as `ops.mim_sides` takes them, and its score, by the settings; ``sizes``: (2,) pairs and rows of y that
        exist."""
        kind, x, y = self.config.mim_score, eq.full_precision(x), eq.full_precision(y)
        if kind == "dot":
            return (x, y, None), "dot"
        if kind == "standardized":
            x, y, weight = eq.standardized(x, sizes[0]), eq.standardized(y, sizes[1]), weight / weight.shape[0]
        return (x, y, weight), "bilinear_sigmoid"

    def _alignment(self, x: Tensor, y: Tensor, weight: Tensor, positive: Tensor, sizes: Tensor) -> Alignment:
        """The scores of all pairs, before any sigmoid."""
        with no_autocast(x):
            (x, y, used), _ = self._compared(x, y, weight, sizes)
            return Alignment(scores=(x if used is None else x @ used) @ y.T, positive=positive)

    def inside(self, batch: Batch, output: CASEOutput) -> Inside:
        """The vectors that attention and both alignments compare, the choices of Eq. 4-6, both alignments, the gate of Eq. 15."""
        return Inside(
            vectors={"cs": output.knowledge, "ec": output.concept, "er": output.reaction, "r_cog": output.r_cog,
                     "r_emo": output.r_emo},
            choices={
                "inferences": Choice(prior=output.prior_cognition, posterior=output.posterior_cognition,
                                     dialogue=batch.case.knowledge_dialogue),
                "concepts": Choice(prior=output.prior_concept, posterior=output.posterior_concept,
                                   dialogue=batch.concept.graph.dialogue),
            },
            alignments={"coarse": self._alignment(*self._coarse_pairs(batch, output)),
                        "fine": self._alignment(*self._fine_pairs(batch, output))},
            gate=output.gate,
        )

    def forward(self, batch: Batch) -> CASEOutput:
        """Losses of a batch whose replies and emotions are known."""
        batch.require(self.needs)
        bow_alone = self.phase == "bow"
        context_words, case = self._context_words(batch), batch.case
        reply_words = {"text": torch.cat([case.distinct_word, case.response]), "response": case.response,
                       "response_role": case.response_role}
        if bow_alone:
            words = self.look_up({"concept": context_words["concept"]} | reply_words)
        else:
            words = self.look_up(context_words | reply_words | {"decoder_input": batch.decoder_input})
        knowledge, concept, y_cog = self._graph_vectors(batch, words)
        log_q_cognition, log_q_concept = self._posteriors(batch, words, knowledge, concept, y_cog)
        bow = self._bow_loss(batch, knowledge, concept, log_q_cognition, log_q_concept)
        posteriors = {"posterior_cognition": log_q_cognition.exp(), "posterior_concept": log_q_concept.exp()}
        if bow_alone:
            return CASEOutput(loss=bow, losses={"bow": bow}, **posteriors)

        reading = self._read(batch, words, knowledge, concept)
        kl = bow.new_zeros(())
        for log_q, log_p, dialogue in (
            (log_q_cognition, reading.log_prior_cognition, batch.case.knowledge_dialogue),
            (log_q_concept, reading.log_prior_concept, batch.concept.graph.dialogue),
        ):
            weight = eq.take(batch.dialogue_weight, dialogue)
            weight = eq.shares(weight, batch.total) if self.config.kl_reduction == "mean" else weight
            kl = kl + eq.discernment_kl(log_q.detach() if self.config.detach_posterior else log_q, log_p, weight)
        diagnostics: dict[str, Tensor] = {}
        zero = bow.new_zeros(())
        coarse = self._coarse(batch, reading, diagnostics) if self.config.coarse_alignment else zero
        fine = self._fine(batch, reading, diagnostics) if self.config.fine_alignment else zero

        hidden = self.decode_replies(batch, words["decoder_input"], reading)
        nll, prediction = self.word_losses(hidden, batch.target)
        losses = {
            "bow": bow, "kl": kl, "coarse": coarse, "fine": fine,
            "emotion": eq.emotion_loss(reading.emotion_logits, batch.emotion, batch.dialogue_weight),
            "generation": eq.generation_loss(nll, batch.target_weight),
            "diversity": self.diversity_loss(batch, nll, prediction),
        }
        alignment = eq.alignment_loss(bow, kl, coarse, fine, self.config.alpha)
        return CASEOutput(
            loss=eq.total_loss(alignment, losses["emotion"], losses["generation"], losses["diversity"], self.config.gammas),
            losses=losses, hidden=hidden, nll=nll, prediction=prediction, emotion_logits=reading.emotion_logits,
            diagnostics=diagnostics, prior_cognition=reading.log_prior_cognition.exp(),
            prior_concept=reading.log_prior_concept.exp(), gate=reading.gate, r_cog=reading.r_cog, r_emo=reading.r_emo,
            r_aff=reading.r_aff, knowledge=knowledge, concept=concept, reaction=reading.reaction, **posteriors,
        )
