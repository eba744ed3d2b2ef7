"""CASE: align cognition and affection, then answer with empathy (Zhou et al., ACL 2023)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from case_fast import equations as eq
from case_fast import ops
from case_fast.batch import Batch
from case_fast.equations import greatest as greatest  # for case_fast.generation
from case_fast.errors import CheckpointError
from case_fast.models.config import CASEConfig
from case_fast.models.layers import Decoder, DecoderState, Encoder, GraphEncoder, Memory

# The fields of a batch whose words each part of the model reads.
_CONTEXT_FIELDS = ("text", "concept_word", "context", "context_role", "reaction")
_REPLY_FIELDS = ("response", "response_role", "decoder_input")
_BOW_FIELDS = ("text", "concept_word", "response", "response_role")
SATURATED = 5.0  # |z| from which the sigmoid of Eq. 10 and 12 hardly has a gradient


@dataclass
class CASEOutput:
    """What a forward pass gives.

    Attributes:
        loss: the scalar to minimise (phase 1: L_BOW alone).
        losses: its parts: bow, kl, coarse, fine, emotion, generation, diversity (phase 1: bow alone).
        hidden: (M, d) what `CASE.output` makes next-word scores of; nll, prediction (M,): -log P of the target word, argmax.
        emotion_logits: (B, emotions), log-probabilities.
        prior_cognition, posterior_cognition: (K,) probabilities over the knowledge vertices (Eq. 4, 5), packed by cu_knowledge.
        prior_concept, posterior_concept: (V_ec,) over the vertices of G_EC (Eq. 4, 6), packed by concept.cu_vertices.
        gate: (B,) mu of Eq. 15. r_cog, r_emo, r_aff: (B, d). reaction: (R, d), er_i.
        diagnostics: InfoNCE bounds of both MIM losses and, where their score has a sigmoid, its share of saturated pairs.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    hidden: Tensor | None = None
    nll: Tensor | None = None
    prediction: Tensor | None = None
    emotion_logits: Tensor | None = None
    prior_cognition: Tensor | None = None
    posterior_cognition: Tensor | None = None
    prior_concept: Tensor | None = None
    posterior_concept: Tensor | None = None
    gate: Tensor | None = None
    r_cog: Tensor | None = None
    r_emo: Tensor | None = None
    r_aff: Tensor | None = None
    reaction: Tensor | None = None
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Reading:
    """What the model understood of a batch of contexts, before a reply is known.

    Attributes:
        knowledge (K, d): cs_i of K_CS; concept (V_ec, d): ec_i; context (T, d): S_X; reaction (R, d): er_i.
        log_prior_cognition (K,), log_prior_concept (V_ec,): Eq. 4.
        r_cog, r_emo, r_aff (B, d), gate (B,), emotion_logits (B, emotions): Eq. 3, 14-16.
        memories: what the decoder attends to, in order: K_CS, K_EC, S'_X.
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
    emotion_logits: Tensor
    memories: list[Memory]


class CASE(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="case_fast",
    tags=["empathetic-dialogue", "case"],
    paper_url="https://aclanthology.org/2023.acl-long.457",
):
    """The whole model. ``model(batch)`` takes a packed `Batch` and returns a `CASEOutput`; ``.loss.backward()`` trains it.

    ``set_phase(1)`` restricts training to L_BOW and freezes what that loss does not reach; ``set_phase(2)``, the state of
    a new model, trains the whole objective, with every trainable parameter in each step's graph.

    Running word counts of the diversity loss are a buffer: they grow in training mode only and are saved with the weights.
    """

    def __init__(self, config: CASEConfig):
        super().__init__()
        self.config = c = config
        d = c.d_model
        sizes = (c.layers, d, c.heads, c.ffn)
        self.embedding = nn.Embedding(c.vocab_size, d)
        self.vertex_type = nn.Embedding(2, d)
        self.context_encoder = Encoder(*sizes, c.encoder_dropout)
        self.cognition_encoder = Encoder(*sizes, c.encoder_dropout)
        self.reaction_encoder = Encoder(*sizes, c.encoder_dropout)
        self.reaction_fusion = nn.Linear(2 * d, d, bias=False)
        self.reaction_context_encoder = Encoder(*sizes, c.encoder_dropout)
        self.cognition_graph = GraphEncoder(*sizes, c.graph_dropout, relations=c.cognition_relations)
        self.concept_graph = GraphEncoder(*sizes, c.graph_dropout)
        self.phi_cognition = nn.Sequential(nn.Linear(d, d), nn.Tanh())
        self.phi_concept = nn.Sequential(nn.Linear(d, d), nn.Tanh())
        self.eta = nn.Sequential(nn.Linear(2 * d, d), nn.Tanh(), nn.Linear(d, c.vocab_size))
        self.w_coarse = nn.Parameter(torch.empty(d, d))
        self.w_fine = nn.Parameter(torch.empty(d, d))
        self.w_aff = nn.Parameter(torch.empty(2 * d))
        self.w_emo = nn.Parameter(torch.empty(c.emotions, d))
        self.fusion = nn.Linear(3 * d, d)
        self.decoder = Decoder(*sizes, c.decoder_dropout, sources=3)
        self.output = nn.Linear(d, c.vocab_size)
        self.register_buffer("word_counts", torch.zeros(c.vocab_size, dtype=torch.int64))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))  # training steps that drew negatives
        self.word_counts: Tensor
        self.draws: Tensor
        self.phase = 2
        self._frozen: list[nn.Parameter] = []
        self._initialize()
        for part in self._switched_off():
            part.requires_grad_(False)

    def _initialize(self) -> None:
        d = self.config.d_model
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=d**-0.5)
        nn.init.normal_(self.vertex_type.weight, std=1.0)  # as large as a scaled word embedding
        nn.init.normal_(self.w_coarse, std=1 / d)  # larger starts saturate the sigmoid
        nn.init.normal_(self.w_fine, std=1 / d)
        nn.init.normal_(self.w_aff, std=(2 * d) ** -0.5)
        nn.init.xavier_uniform_(self.w_emo)

    @classmethod
    def from_pretrained(cls, folder: str | Path, map_location: str = "cpu") -> Self:
        """The model that `save_pretrained` wrote into ``folder``, in evaluation mode, on the device ``map_location``.

        Folders only, where the mixin would ask the network for any path that does not exist: fetch a model from the hub
        first, with ``huggingface_hub.snapshot_download``. Strict: all weights and settings must be there and fit.

        Raises:
            CheckpointError: a part is missing, damaged, or not of this model.
        """
        folder = Path(folder)
        try:
            model = cls(CASEConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8"))))
            load_model(model, folder / "model.safetensors")
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            problem = f"{folder}: missing, damaged or not of this model ({error})"
            raise CheckpointError(f"{problem}. Give a folder that save_pretrained wrote") from error
        return model.to(map_location).eval()

    def load_embeddings(self, ids: Tensor, vectors: Tensor) -> None:
        """Put pretrained vectors (n, d) at the words ``ids`` (n,) of the shared table; the other words keep theirs."""
        if vectors.dim() != 2 or vectors.shape[1] != self.config.d_model:
            raise ValueError(f"vectors must be (n, {self.config.d_model}), not {tuple(vectors.shape)}")
        with torch.no_grad():
            self.embedding.weight[ids.long()] = vectors.to(self.embedding.weight)

    # ---- phases and ablations

    def _switched_off(self) -> Iterator[nn.Module | nn.Parameter]:
        """Parts that the settings leave without any use."""
        c = self.config
        if not c.cognition_graph:
            yield self.cognition_graph
        if not c.concept_graph:
            yield self.concept_graph
        if not c.coarse_alignment or c.mim_score == "dot":
            yield self.w_coarse
        if not c.fine_alignment or c.mim_score == "dot":
            yield self.w_fine

    def set_phase(self, phase: int) -> None:
        """1: L_BOW alone, parameters that it does not reach frozen. 2: the whole loss, those parameters trained again."""
        if phase not in (1, 2):
            raise ValueError(f"phase must be 1 or 2, not {phase}")
        self.phase = phase
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
        if phase == 1:
            for part in (self.reaction_encoder, self.reaction_fusion, self.reaction_context_encoder, self.phi_cognition,
                         self.phi_concept, self.w_coarse, self.w_fine, self.w_aff, self.w_emo, self.fusion, self.decoder,
                         self.output):
                for parameter in part.parameters() if isinstance(part, nn.Module) else [part]:
                    if parameter.requires_grad:
                        self._frozen.append(parameter.requires_grad_(False))

    # ---- reading the context (sections 3.1 and 3.2)

    def _look_up(self, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
        """Scaled rows of the shared table for the words that these fields of the batch hold.

        One lookup for all of them: the backward of each lookup fills a gradient as large as the table.
        """
        words = [getattr(batch, name) for name in names]
        rows = self.embedding(torch.cat(words)) * self.config.d_model**0.5
        return dict(zip(names, rows.split([len(ids) for ids in words]), strict=True))

    def _place(self, rows: Tensor, position: Tensor) -> Tensor:
        """word * sqrt(d) + sinusoidal position."""
        return rows + eq.sinusoidal_position(position, self.config.d_model, rows.dtype)

    def _place_packed(self, rows: Tensor, cu: Tensor) -> Tensor:
        return self._place(rows, eq.segment_positions(cu, rows.shape[0]))

    def _graph_vectors(self, batch: Batch, words: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """cs_i of the knowledge vertices (K, d) and ec_i of all concept vertices (V_ec, d)."""
        c = self.config
        texts = self.cognition_encoder(self._place_packed(words["text"], batch.cu_text), batch.cu_text, first_only=True)
        cognition = eq.take(texts, batch.cognition_text)
        if c.cognition_graph:
            g = batch.cognition
            cognition = self.cognition_graph(cognition, g.indptr, g.indices, g.relation)
        concept = self._place(words["concept_word"], batch.concept_position) + self.vertex_type(batch.concept_type)
        if c.concept_graph:
            g = batch.concept
            inside = batch.concept_intensity if c.intensity == "before_norm" else None
            concept = self.concept_graph(concept, g.indptr, g.indices, intensity=inside)
            if c.intensity == "after":
                concept = eq.superimpose_intensity(concept, batch.concept_intensity)
        return eq.take(cognition, batch.knowledge), concept

    def _reactions(self, batch: Batch, words: Tensor, context: Tensor) -> Tensor:
        """er_i, (R, d): the averaged reactions of each sub-utterance, seen in the light of the context."""
        rows = batch.reaction_dialogue.numel()
        encoded = self.reaction_encoder(self._place_packed(words, batch.cu_reaction), batch.cu_reaction)
        average = eq.segment_mean(encoded, eq.segment_ids(batch.cu_reaction, encoded.shape[0]), rows)
        # W [S_X[j] ; h_i] = W_1 S_X[j] + W_2 h_i: the first part is the same for all reactions of a dialogue
        of_context, of_reaction = self.reaction_fusion.weight.chunk(2, dim=1)
        fused = eq.take(F.linear(context, of_context), batch.reaction_context)
        place = eq.segment_ids(batch.cu_reaction_context, fused.shape[0])
        fused = fused + eq.take(F.linear(average.to(context.dtype), of_reaction), place)
        return self.reaction_context_encoder(fused, batch.cu_reaction_context, first_only=True)

    def _posteriors(self, batch: Batch, words: dict[str, Tensor], knowledge: Tensor, concept: Tensor) -> tuple[Tensor, Tensor]:
        """Log of Eq. 5 and 6, from the reply read by the cognition and the context encoder."""
        cu = batch.cu_response
        reply = self._place_packed(words["response"], cu)
        y_cog = self.cognition_encoder(reply, cu, first_only=True)
        y_ctx = self.context_encoder(reply + words["response_role"], cu, first_only=True)
        with _no_autocast(knowledge):
            return (
                eq.discernment(knowledge, y_cog, batch.knowledge_dialogue),
                eq.discernment(concept, y_ctx, batch.concept.dialogue),
            )

    def _bow_loss(self, batch: Batch, knowledge: Tensor, concept: Tensor, log_cognition: Tensor, log_concept: Tensor) -> Tensor:
        with _no_autocast(knowledge):
            cog = eq.expected_knowledge(log_cognition, knowledge, batch.knowledge_dialogue, batch.size)
            emo = eq.expected_knowledge(log_concept, concept, batch.concept.dialogue, batch.size)
        *inner, words = self.eta
        hidden = torch.cat([cog, emo], dim=-1)
        for layer in inner:
            hidden = layer(hidden)
        nll, _ = ops.linear_cross_entropy(hidden, words.weight, words.bias, batch.target, cu_target=batch.cu_target)
        return eq.bow_loss(nll, eq.segment_ids(batch.cu_target, nll.numel()), batch.size)

    def read(self, batch: Batch) -> Reading:
        """Everything up to the decoder; needs no reply."""
        words = self._look_up(batch, _CONTEXT_FIELDS)
        return self._read(batch, words, *self._graph_vectors(batch, words))

    def _read(self, batch: Batch, words: dict[str, Tensor], knowledge: Tensor, concept: Tensor) -> Reading:
        context = self._place_packed(words["context"], batch.cu_context) + words["context_role"]
        context = self.context_encoder(context, batch.cu_context)
        summary = eq.take(context, batch.cu_context[:-1])
        phi_cognition, phi_concept = self.phi_cognition(summary), self.phi_concept(summary)
        reaction = self._reactions(batch, words["reaction"], context)
        with _no_autocast(context):
            log_cognition = eq.discernment(knowledge, phi_cognition, batch.knowledge_dialogue)
            log_concept = eq.discernment(concept, phi_concept, batch.concept.dialogue)
            r_cog = eq.expected_knowledge(log_cognition, knowledge, batch.knowledge_dialogue, batch.size)
            r_emo = eq.expected_knowledge(log_concept, concept, batch.concept.dialogue, batch.size)
            er_0 = eq.full_precision(eq.take(reaction, batch.reaction_first))
            gate = eq.affect_gate(r_emo, er_0, self.w_aff)
            r_aff = eq.affect(r_emo, er_0, gate)
            emotion_logits = eq.emotion_log_probability(r_aff, self.w_emo)
        place = eq.segment_ids(batch.cu_context, context.shape[0])
        like = context.dtype
        fused = eq.fuse_context(context, r_cog.to(like), r_aff.to(like), place, self.fusion.weight, self.fusion.bias)
        offsets = (batch.cu_knowledge, batch.concept.cu_vertices, batch.cu_context)
        memories = [Memory(rows, cu) for rows, cu in zip((knowledge, concept, fused), offsets, strict=True)]
        return Reading(knowledge, concept, context, reaction, log_cognition, log_concept, r_cog, r_emo, r_aff, gate,
                       emotion_logits, memories)

    # ---- the objective

    def _coarse(self, batch: Batch, reading: Reading, diagnostics: dict[str, Tensor]) -> Tensor:
        """L_coarse over the dialogues that have knowledge (Eq. 9)."""
        known = (batch.cu_knowledge[1:] > batch.cu_knowledge[:-1]).nonzero().squeeze(1)
        pairs = torch.arange(known.numel(), device=known.device)
        cognition, affection = eq.take(reading.r_cog, known), eq.take(reading.r_emo, known)
        return self._mim(cognition, affection, self.w_coarse, pairs, None, "coarse", diagnostics)

    def _fine(self, batch: Batch, reading: Reading, diagnostics: dict[str, Tensor]) -> Tensor:
        """L_fine over the knowledge whose sub-utterance has a reaction (Eq. 11)."""
        row = torch.cumsum(batch.has_reaction, 0) - 1  # place of each reaction among those with a text
        paired = batch.has_reaction[batch.knowledge_reaction].nonzero().squeeze(1)
        positive = row[batch.knowledge_reaction[paired]]
        reactions = eq.take(reading.reaction, batch.has_reaction.nonzero().squeeze(1))
        knowledge, k = eq.take(reading.knowledge, paired), self.config.num_negatives
        return self._mim(knowledge, reactions, self.w_fine, positive, k, "fine", diagnostics)

    def _mim(self, x: Tensor, y: Tensor, weight: Tensor, positive: Tensor, num_negatives: int | None, name: str,
             diagnostics: dict[str, Tensor]) -> Tensor:
        seed = 0
        if num_negatives is not None:
            seed = (self.config.seed << 32) + int(self.draws)
            if self.training:
                self.draws += 1
        score = self.config.mim_score
        x, y = eq.full_precision(x), eq.full_precision(y)
        with _no_autocast(x):
            used = None if score == "dot" else weight
            side_y, side_x, logit = ops.mim_sides(x, y, used, positive, num_negatives, seed, score)
        pairs = max(logit.numel(), 1)
        with torch.no_grad():
            negatives_y, negatives_x = eq.mim_negatives(positive, y.shape[0], num_negatives)
            if score != "dot":
                diagnostics[f"{name}_saturated"] = (logit.abs() > SATURATED).sum() / pairs
            diagnostics[f"{name}_bound_affection"] = eq.infonce_bound(side_y, negatives_y)
            diagnostics[f"{name}_bound_cognition"] = eq.infonce_bound(side_x, negatives_x)
        return eq.reduced(side_y + side_x, "mean")

    def _diversity_weights(self, prediction: Tensor) -> Tensor:
        if self.training:
            said = prediction[prediction != self.config.eos_id]
            self.word_counts += torch.bincount(said, minlength=self.config.vocab_size)
        return eq.diversity_weights(self.word_counts)

    def forward(self, batch: Batch) -> CASEOutput:
        """Losses of a batch whose replies and emotions are known."""
        words = self._look_up(batch, _BOW_FIELDS if self.phase == 1 else _CONTEXT_FIELDS + _REPLY_FIELDS)
        knowledge, concept = self._graph_vectors(batch, words)
        log_q_cognition, log_q_concept = self._posteriors(batch, words, knowledge, concept)
        bow = self._bow_loss(batch, knowledge, concept, log_q_cognition, log_q_concept)
        if self.phase == 1:
            return CASEOutput(bow, {"bow": bow}, posterior_cognition=log_q_cognition.exp(), posterior_concept=log_q_concept.exp())

        reading = self._read(batch, words, knowledge, concept)
        kl = bow.new_zeros(())
        for log_q, log_p in ((log_q_cognition, reading.log_prior_cognition), (log_q_concept, reading.log_prior_concept)):
            kl = kl + eq.discernment_kl(log_q.detach() if self.config.detach_posterior else log_q, log_p, batch.size)
        diagnostics: dict[str, Tensor] = {}
        zero = bow.new_zeros(())
        coarse = self._coarse(batch, reading, diagnostics) if self.config.coarse_alignment else zero
        fine = self._fine(batch, reading, diagnostics) if self.config.fine_alignment else zero

        hidden = self.decoder(self._place_packed(words["decoder_input"], batch.cu_target), batch.cu_target, reading.memories)
        nll, prediction = ops.linear_cross_entropy(hidden, self.output.weight, self.output.bias, batch.target)
        losses = {
            "bow": bow, "kl": kl, "coarse": coarse, "fine": fine,
            "emotion": eq.emotion_loss(reading.emotion_logits, batch.emotion),
            "generation": eq.generation_loss(nll),
            "diversity": eq.diversity_loss(nll, batch.target, self._diversity_weights(prediction)),
        }
        alignment = eq.alignment_loss(bow, kl, coarse, fine, self.config.alpha)
        loss = eq.total_loss(alignment, losses["emotion"], losses["generation"], losses["diversity"], self.config.gammas)
        return CASEOutput(
            loss, losses, hidden, nll, prediction, reading.emotion_logits,
            reading.log_prior_cognition.exp(), log_q_cognition.exp(), reading.log_prior_concept.exp(), log_q_concept.exp(),
            reading.gate, reading.r_cog, reading.r_emo, reading.r_aff, reading.reaction, diagnostics,
        )

    # ---- decoding, one word at a time (case_fast.generation drives it)

    def start_decoding(self, reading: Reading, beams: int = 1) -> DecoderState:
        return self.decoder.start(reading.memories, beams)

    def reply_logits(self, words: Tensor, cu: Tensor, memories: Sequence[Memory], last_only: bool = False) -> Tensor:
        """(M, V) scores of the word after each of packed decoder inputs (M,), cu (B + 1,): the decoder without a cache.

        ``last_only``: (B, V), after the last of each sequence alone.
        """
        hidden = self._reply(words, cu, memories)
        return eq.full_precision(self.output(eq.take(hidden, cu[1:] - 1) if last_only else hidden))

    def reply_nll(self, words: Tensor, cu: Tensor, memories: Sequence[Memory], target: Tensor) -> Tensor:
        """(M,) -log P of the words ``target`` (M,) after each of packed decoder inputs, as `reply_logits` scores them."""
        return ops.linear_cross_entropy(self._reply(words, cu, memories), self.output.weight, self.output.bias, target)[0]

    def _reply(self, words: Tensor, cu: Tensor, memories: Sequence[Memory]) -> Tensor:
        return self.decoder(self._place_packed(self.embedding(words) * self.config.d_model**0.5, cu), cu, memories)

    def next_word_logits(self, words: Tensor, position: int, state: DecoderState) -> Tensor:
        """(B * beams, V) scores of the next word, given the newest words (B * beams,) at ``position`` (BOS is at 0)."""
        return eq.full_precision(self.output(self._decode(words, position, state)))

    def next_words(self, words: Tensor, position: int, state: DecoderState, k: int, never: Sequence[int] = ()
                   ) -> tuple[Tensor, Tensor]:
        """The k most probable next words and their log-probabilities among those not in ``never``, (B * beams, k) each.

        The scores are those of `next_word_logits`; log-probabilities come first, the best and then the lowest word first.
        """
        hidden, bias = self._decode(words, position, state), self.output.bias
        if never:
            bias = bias.index_fill(0, torch.tensor(never, device=bias.device), -math.inf)
        return ops.top_words(hidden, self.output.weight, bias, k)

    def _decode(self, words: Tensor, position: int, state: DecoderState) -> Tensor:
        x = self._place(self.embedding(words) * self.config.d_model**0.5, torch.full_like(words, position))
        return self.decoder.step(x, state)


def _no_autocast(like: Tensor) -> AbstractContextManager[None]:
    """Softmax, KL and the MIM sums run in float32 under autocast."""
    return torch.autocast(like.device.type, enabled=False)
