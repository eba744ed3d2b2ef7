"""CASE as such models are usually written: padded and dense, plain torch modules. What `case_fast` is measured against.

The same model with the same names of weights (`plain_of`), written to be fast within its style: one batched call a layer and no
loop over items, `scaled_dot_product_attention` wherever there is no term of its own inside the softmax, relation embeddings
projected once for the types of edges and not for each pair, positions from a table, inferences padded apart from the longer
utterances, one negative log-likelihood for both losses over words. It does what padding brings with it: every slot of a batch
is computed, graphs are (B, N, N) with the terms of Eq. 1-2 for each pair, encoders give all rows and [CLS] is taken from them,
scores over the vocabulary are stored.

B dialogues; n words of the context, U sub-utterances, K inferences, N vertices of a graph, R reactions, m words of the reply:
each the most of any dialogue of the batch. Masks are True where there is something.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case_fast.data.featurizer import Example, TextTable
from case_fast.data.graphs import CSR
from case_fast.data.vocabulary import BOS, CLS, EOS, LISTENER, PAD, SPEAKER
from case_fast.equations import sinusoidal_position
from case_fast.models.case import CASE, CASEConfig

LENGTHS = ("n", "U", "Lu", "K", "Lk", "N", "R", "Lr", "m")
NO_TARGET = -100  # of `cross_entropy`
POSITIONS = 1024  # of the table: a context has at most 513 rows
MASKED = -1e9


@dataclass
class PaddedBatch:
    """What a `DataLoader` would give of B dialogues.

    Attributes:
        context, context_role: (B, n) [CLS] and words; context_mask (B, n).
        utterance: (B, U, Lu) [CLS] and words of each sub-utterance, utterance_words its mask; an empty slot is [CLS] alone.
        knowledge: (B, K, Lk) likewise of each inference, knowledge_words; knowledge_mask (B, K); knowledge_reaction (B, K) the
            reaction of the same sub-utterance.
        cognition_edge: (B, U + K, U + K) whether two vertices of G_CS are joined, cognition_relation the type of the edge, 0
            where there is none. An empty slot is joined to itself, so that no softmax is without an entry.
        concept_word, concept_position, concept_type, concept_intensity: (B, N) of the vertices of G_EC; concept_mask (B, N),
            concept_edge (B, N, N).
        reaction: (B, R, Lr) words, reaction_words its mask; reaction_mask (B, R) the rows that have a word; reaction_first (B,).
        response: (B, m) [CLS] and the reply; decoder_input, target (B, m); response_mask (B, m) of all three.
        emotion: (B,).
    """

    context: Tensor
    context_role: Tensor
    context_mask: Tensor
    utterance: Tensor
    utterance_words: Tensor
    knowledge: Tensor
    knowledge_words: Tensor
    knowledge_mask: Tensor
    knowledge_reaction: Tensor
    cognition_edge: Tensor
    cognition_relation: Tensor
    concept_word: Tensor
    concept_position: Tensor
    concept_type: Tensor
    concept_intensity: Tensor
    concept_mask: Tensor
    concept_edge: Tensor
    reaction: Tensor
    reaction_words: Tensor
    reaction_mask: Tensor
    reaction_first: Tensor
    response: Tensor
    decoder_input: Tensor
    target: Tensor
    response_mask: Tensor
    emotion: Tensor

    @property
    def lengths(self) -> dict[str, int]:
        """n, U, Lu, K, Lk, N, R, Lr, m."""
        tables = (self.context, self.utterance, self.knowledge, self.concept_word, self.reaction, self.response)
        return dict(zip(LENGTHS, [size for table in tables for size in table.shape[1:]], strict=True))

    def to(self, device: torch.device | str) -> PaddedBatch:
        return PaddedBatch(**{item.name: getattr(self, item.name).to(device) for item in fields(self)})


# ---------------------------------------------------------------------------------------------------------------- padding


def padded(rows: Sequence[np.ndarray], fill: float = PAD, least: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows as (len(rows), longest), at least ``least`` long, and where something stands."""
    sizes = np.array([len(row) for row in rows])
    mask = np.arange(max(least, sizes.max())) < sizes[:, None]
    table = np.full(mask.shape, fill, dtype=np.result_type(*rows))
    table[mask] = np.concatenate(rows)
    return table, mask


def slots(dialogues: Sequence[Sequence[np.ndarray]], empty: np.ndarray, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of each dialogue as (B, most rows, longest), slots without a row as ``empty``, and where something stands."""
    most = max(rows, *map(len, dialogues))
    table, mask = padded([row for rows in dialogues for row in [*rows, *[empty] * (most - len(rows))]], least=length)
    return table.reshape(len(dialogues), most, -1), mask.reshape(len(dialogues), most, -1)


def dense(graphs: Sequence[CSR], places: Sequence[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, size, size) whether two vertices are joined, and by which type of edge; vertex i of a graph stands at places[i]."""
    edge = np.zeros((len(graphs), size, size), dtype=bool)
    relation = np.zeros((len(graphs), size, size), dtype=np.int64)
    edge[:, np.arange(size), np.arange(size)] = True
    for b, (graph, place) in enumerate(zip(graphs, places, strict=True)):
        rows, columns = np.repeat(place, np.diff(graph.indptr)), place[graph.indices]
        edge[b, rows, columns], relation[b, rows, columns] = True, graph.relation
    return edge, relation


def collate(examples: Sequence[Example], texts: TextTable, least: Mapping[str, int] | None = None) -> PaddedBatch:
    """Pad examples whose text ids point into ``texts``: what `case_fast.data.pack.make_batch` packs.

    ``least``: of each of `LENGTHS`, so that several batches can have one shape.
    """
    least = dict.fromkeys(LENGTHS, 1) if least is None else least
    cls, bos, eos, none = (np.array(ids, dtype=np.int32) for ids in ([CLS], [BOS], [EOS], []))

    def words(ids: np.ndarray) -> list[np.ndarray]:
        return [np.concatenate([cls, texts.tokens(int(index))]) for index in ids]

    utterance, utterance_words = slots([words(e.sub_utterance) for e in examples], cls, least["U"], least["Lu"])
    knowledge, knowledge_words = slots([words(e.knowledge) for e in examples], cls, least["K"], least["Lk"])
    first = utterance.shape[1]  # the vertex of the first inference
    places = [np.concatenate([np.arange(len(e.sub_utterance)), first + np.arange(len(e.knowledge))]) for e in examples]
    cognition = dense([e.cognition_graph for e in examples], places, first + knowledge.shape[1])

    reactions, reaction_of, reaction_first = [], [], []
    for e in examples:
        _, firsts, row = np.unique(e.sub_utterance, return_index=True, return_inverse=True)  # equal ones share a reaction
        reactions.append([np.concatenate([none, *(texts.tokens(int(k)) for k in e.reaction[e.reaction_sub == sub])])
                          for sub in firsts])
        reaction_of.append(row[e.knowledge_sub])
        reaction_first.append(row[0])
    reaction, reaction_words = slots(reactions, none, least["R"], least["Lr"])

    n, k, vertices, m = least["n"], knowledge.shape[1], least["N"], least["m"]
    concept_word, concept_mask = padded([np.concatenate([cls, e.context, e.concept]) for e in examples], PAD, vertices)
    tokens = [np.arange(1 + len(e.context)) for e in examples]
    places = [np.arange(mask.sum()) for mask in concept_mask]
    concept_edge, _ = dense([e.concept_graph for e in examples], places, concept_mask.shape[1])
    context, context_mask = padded([np.concatenate([cls, e.context]) for e in examples], PAD, n)
    response, response_mask = padded([np.concatenate([cls, e.response]) for e in examples], PAD, m)
    concept_position = [np.concatenate([each, e.concept_position]) for each, e in zip(tokens, examples, strict=True)]
    concept_type = [np.repeat([0, 1], [len(each), len(e.concept)]) for each, e in zip(tokens, examples, strict=True)]
    intensity = [np.concatenate([np.zeros(1, np.float32), e.context_intensity, e.concept_intensity]) for e in examples]
    return PaddedBatch(
        context=_long(context), context_mask=torch.from_numpy(context_mask),
        context_role=_long(padded([np.concatenate([[SPEAKER], e.context_role]) for e in examples], PAD, n)[0]),
        utterance=_long(utterance), utterance_words=torch.from_numpy(utterance_words),
        knowledge=_long(knowledge), knowledge_words=torch.from_numpy(knowledge_words),
        knowledge_mask=torch.from_numpy(padded([e.knowledge for e in examples], PAD, k)[1]),
        knowledge_reaction=_long(padded(reaction_of, 0, k)[0]),
        cognition_edge=torch.from_numpy(cognition[0]), cognition_relation=torch.from_numpy(cognition[1]),
        concept_word=_long(concept_word), concept_position=_long(padded(concept_position, 0, vertices)[0]),
        concept_type=_long(padded(concept_type, 0, vertices)[0]),
        concept_intensity=torch.from_numpy(padded(intensity, 0, vertices)[0]),
        concept_mask=torch.from_numpy(concept_mask), concept_edge=torch.from_numpy(concept_edge),
        reaction=_long(reaction), reaction_words=torch.from_numpy(reaction_words),
        reaction_mask=torch.from_numpy(reaction_words.any(-1)), reaction_first=torch.tensor(reaction_first),
        response=_long(response), response_mask=torch.from_numpy(response_mask),
        decoder_input=_long(padded([np.concatenate([bos, e.response]) for e in examples], PAD, m)[0]),
        target=_long(padded([np.concatenate([e.response, eos]) for e in examples], NO_TARGET, m)[0]),
        emotion=torch.tensor([e.emotion for e in examples]),
    )


def _long(table: np.ndarray) -> Tensor:
    return torch.from_numpy(table.astype(np.int64))


# ----------------------------------------------------------------------------------------------------------------- layers


class Attention(nn.Module):
    def __init__(self, d: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.output = (nn.Linear(d, d, bias=False) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """x (b, n, d), memory (b, m, d), mask (b, m): (b, n, d)."""
        q, k, v = (part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part, y in ((self.query, x), (self.key, memory), (self.value, memory)))
        mask = None if mask is None else mask[:, None, None, :]
        p = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, mask, p, causal)
        return self.output(attended.transpose(1, 2).flatten(-2))


def feed_forward(d: int, width: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, width), activation(), nn.Linear(width, d))


class EncoderLayer(nn.Module):
    def __init__(self, d: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention, self.ffn = Attention(d, heads, dropout), feed_forward(d, ffn)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, normed, mask))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Encoder(nn.Module):
    def __init__(self, layers: int, d: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(d, heads, ffn, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (..., n, d), mask (..., n)."""
        shape = x.shape
        x, mask = x.reshape(-1, *shape[-2:]), mask.reshape(-1, shape[-2])
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x).reshape(shape)


class GraphEncoderLayer(nn.Module):
    """Post-LN (Eq. 1-2)."""

    def __init__(self, d: int, heads: int, ffn: int, dropout: float, relations: bool):
        super().__init__()
        self.heads, self.dropout_p = heads, dropout
        self.query, self.key, self.value, self.output = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.relation = nn.Linear(d, 2 * d, bias=False) if relations else None
        self.attention_norm, self.ffn_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.ffn, self.dropout = feed_forward(d, ffn, nn.GELU), nn.Dropout(dropout)

    def forward(self, x: Tensor, edge: Tensor, relation: Tensor | None, table: Tensor | None) -> Tensor:
        """x (B, N, d), edge and relation (B, N, N), table (types, d)."""
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value))
        if self.relation is None:
            p = self.dropout_p if self.training else 0.0
            attended = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), edge[:, None], p).transpose(1, 2)
        else:
            of_query, of_key = F.embedding(relation, self.relation(table)).chunk(2, dim=-1)  # (B, N, N, d) each
            of_pair = (q[:, :, None] + of_query.unflatten(-1, (self.heads, -1))) * (
                k[:, None] + of_key.unflatten(-1, (self.heads, -1)))
            scores = of_pair.sum(-1) * q.shape[-1] ** -0.5  # (B, N, N, H)
            weights = scores.masked_fill(~edge[..., None], MASKED).softmax(2)
            attended = torch.einsum("bijh,bjhc->bihc", F.dropout(weights, self.dropout_p, self.training), v)
        x = self.attention_norm(x + self.dropout(self.output(attended.flatten(-2))))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class GraphEncoder(nn.Module):
    def __init__(self, layers: int, d: int, heads: int, ffn: int, dropout: float, relations: int | None = None):
        super().__init__()
        self.relation_embedding = nn.Parameter(torch.empty(relations, d)) if relations else None
        self.layers = nn.ModuleList(GraphEncoderLayer(d, heads, ffn, dropout, bool(relations)) for _ in range(layers))

    def forward(self, x: Tensor, edge: Tensor, relation: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, edge, relation, self.relation_embedding)
        return x


class DecoderLayer(nn.Module):
    def __init__(self, d: int, heads: int, ffn: int, dropout: float, sources: int):
        super().__init__()
        self.self_norm, self.self_attention = nn.LayerNorm(d), Attention(d, heads, dropout)
        self.cross_norm = nn.ModuleList(nn.LayerNorm(d) for _ in range(sources))
        self.cross_attention = nn.ModuleList(Attention(d, heads, dropout) for _ in range(sources))
        self.ffn_norm, self.ffn, self.dropout = nn.LayerNorm(d), feed_forward(d, ffn), nn.Dropout(dropout)

    def forward(self, x: Tensor, memories: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """x (B, m, d); memories (B, ., d) with their masks. What has no rows at all adds nothing."""
        normed = self.self_norm(x)
        x = x + self.dropout(self.self_attention(normed, normed, causal=True))
        for norm, attention, (memory, mask) in zip(self.cross_norm, self.cross_attention, memories, strict=True):
            some = mask.any(-1)
            attended = attention(norm(x), memory, mask | ~some[:, None])
            x = x + self.dropout(attended * some[:, None, None])
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Decoder(nn.Module):
    def __init__(self, layers: int, d: int, heads: int, ffn: int, dropout: float, sources: int):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(d, heads, ffn, dropout, sources) for _ in range(layers))
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor, memories: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        for layer in self.layers:
            x = layer(x, memories)
        return self.norm(x)


# ------------------------------------------------------------------------------------------------------------------ model


@dataclass
class PlainReading:
    """What the decoder needs of B contexts, and what the losses need beside it.

    Attributes:
        memories: (B, ., d) rows with their masks: K_CS, K_EC, S'_X.
        reaction (B, R, d); r_cog, r_emo (B, d); log_prior_cognition (B, K), log_prior_concept (B, N); emotion (B, emotions).
    """

    memories: list[tuple[Tensor, Tensor]]
    reaction: Tensor
    r_cog: Tensor
    r_emo: Tensor
    log_prior_cognition: Tensor
    log_prior_concept: Tensor
    emotion: Tensor


class PlainCase(nn.Module):
    """``model(batch)`` gives the loss and its parts by name; ``phase`` as of `case_fast.models.CASE`.

    Raises:
        ValueError: settings other than the paper's for graphs, alignment and intensity.
    """

    def __init__(self, config: CASEConfig):
        super().__init__()
        usual = CASEConfig(**CASEConfig.printed)
        for name in ("cognition_graph", "concept_graph", "coarse_alignment", "fine_alignment", "intensity", "num_negatives",
                     "detach_posterior", *CASEConfig.printed):
            if getattr(config, name) != getattr(usual, name):
                raise ValueError(f"the plain form has the paper's {name}, {getattr(usual, name)!r}, alone")
        self.config, self.phase = config, "all"
        c, d = config, config.d_model
        sizes = (c.layers, d, c.heads, c.ffn)
        self.embedding, self.vertex_type = nn.Embedding(c.vocab_size, d), nn.Embedding(2, d)
        self.context_encoder, self.cognition_encoder, self.reaction_encoder, self.reaction_context_encoder = (
            Encoder(*sizes, c.encoder_dropout) for _ in range(4))
        self.reaction_fusion = nn.Linear(2 * d, d, bias=False)
        self.cognition_graph = GraphEncoder(*sizes, c.graph_dropout, c.cognition_relations)
        self.concept_graph = GraphEncoder(*sizes, c.graph_dropout)
        self.phi_cognition, self.phi_concept = (nn.Sequential(nn.Linear(d, d), nn.Tanh()) for _ in range(2))
        self.eta = nn.Sequential(nn.Linear(2 * d, d), nn.Tanh(), nn.Linear(d, c.vocab_size))
        self.w_coarse, self.w_fine = (nn.Parameter(torch.empty(d, d)) for _ in range(2))
        self.w_aff, self.w_emo = nn.Parameter(torch.empty(2 * d)), nn.Parameter(torch.empty(c.emotions, d))
        self.fusion = nn.Linear(3 * d, d)
        self.decoder = Decoder(*sizes, c.decoder_dropout, sources=3)
        self.output = nn.Linear(d, c.vocab_size)
        self.register_buffer("word_counts", torch.zeros(c.vocab_size, dtype=torch.int64))
        self.register_buffer("positions", sinusoidal_position(torch.arange(POSITIONS), d), persistent=False)

    def words(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) * self.config.d_model**0.5

    def placed(self, ids: Tensor) -> Tensor:
        """word * sqrt(d) + position, (..., n, d)."""
        return self.words(ids) + self.positions[: ids.shape[-1]]

    # ---- reading

    def graphs(self, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
        """cs_i of the inferences (B, K, d) and ec_i (B, N, d)."""
        utterance = self.cognition_encoder(self.placed(batch.utterance), batch.utterance_words)[:, :, 0]
        knowledge = self.cognition_encoder(self.placed(batch.knowledge), batch.knowledge_words)[:, :, 0]
        vertices = torch.cat([utterance, knowledge], dim=1)
        vertices = self.cognition_graph(vertices, batch.cognition_edge, batch.cognition_relation)
        concept = (self.words(batch.concept_word) + F.embedding(batch.concept_position, self.positions)
                   + self.vertex_type(batch.concept_type))
        concept = self.concept_graph(concept, batch.concept_edge)
        return vertices[:, utterance.shape[1] :], concept * (1 + batch.concept_intensity)[..., None]

    def reactions(self, batch: PaddedBatch, context: Tensor) -> Tensor:
        """er_i, (B, R, d)."""
        words = batch.reaction_words
        encoded = self.reaction_encoder(self.placed(batch.reaction), words | ~batch.reaction_mask[..., None])
        average = (encoded * words[..., None]).sum(2) / words.sum(2, keepdim=True).clamp(min=1)  # (B, R, d)
        size = (-1, average.shape[1], context.shape[1], -1)  # (B, R, n, d)
        fused = self.reaction_fusion(torch.cat([context[:, None].expand(size), average[:, :, None].expand(size)], dim=-1))
        return self.reaction_context_encoder(fused, batch.context_mask[:, None].expand(fused.shape[:-1]))[:, :, 0]

    def read(self, batch: PaddedBatch, knowledge: Tensor, concept: Tensor) -> PlainReading:
        context = self.placed(batch.context) + self.words(batch.context_role)
        context = self.context_encoder(context, batch.context_mask)
        reaction = self.reactions(batch, context)
        log_cognition = discernment(knowledge, self.phi_cognition(context[:, 0]), batch.knowledge_mask)
        log_concept = discernment(concept, self.phi_concept(context[:, 0]), batch.concept_mask)
        r_cog = expected(log_cognition, knowledge, batch.knowledge_mask)
        r_emo = expected(log_concept, concept, batch.concept_mask)
        er_0 = reaction[torch.arange(len(reaction)), batch.reaction_first]
        mu = torch.sigmoid(torch.cat([r_emo, er_0], dim=-1) @ self.w_aff)[:, None]
        r_aff = mu * r_emo + (1 - mu) * er_0
        size = (-1, context.shape[1], -1)
        fused = F.relu(self.fusion(torch.cat([context, r_cog[:, None].expand(size), r_aff[:, None].expand(size)], dim=-1)))
        memories = [(knowledge, batch.knowledge_mask), (concept, batch.concept_mask), (fused, batch.context_mask)]
        return PlainReading(memories, reaction, r_cog, r_emo, log_cognition, log_concept,
                            F.log_softmax(r_aff @ self.w_emo.T, dim=-1))

    # ---- the objective

    def posteriors(self, batch: PaddedBatch, knowledge: Tensor, concept: Tensor) -> tuple[Tensor, Tensor]:
        reply, mask = self.placed(batch.response), batch.response_mask
        of_cognition = self.cognition_encoder(reply, mask)[:, 0]
        listener = self.words(torch.full_like(batch.response, LISTENER))
        of_context = self.context_encoder(reply + listener, mask)[:, 0]
        return (discernment(knowledge, of_cognition, batch.knowledge_mask),
                discernment(concept, of_context, batch.concept_mask))

    def bow(self, batch: PaddedBatch, knowledge: Tensor, concept: Tensor, log_cognition: Tensor, log_concept: Tensor) -> Tensor:
        cog = expected(log_cognition, knowledge, batch.knowledge_mask)
        emo = expected(log_concept, concept, batch.concept_mask)
        log_words = F.log_softmax(self.eta(torch.cat([cog, emo], dim=-1)), dim=-1)  # (B, V)
        nll = -log_words.gather(1, batch.target.clamp(min=0)) * batch.response_mask
        return (nll.sum(1) / batch.response_mask.sum(1)).mean()

    def diversity_weights(self, prediction: Tensor, mask: Tensor) -> Tensor:
        """(V,) of Sabour et al. (2022)."""
        if self.training:
            said = mask & (prediction != self.config.eos_id)
            self.word_counts.index_add_(0, prediction.flatten(), said.flatten().long())
        counts = self.word_counts.double()
        weights = 1 - counts / counts.max().clamp(min=1)
        mean = weights.mean()
        return torch.where(mean > 0, weights / mean.clamp(min=1e-12), torch.ones_like(weights))

    def forward(self, batch: PaddedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        c, size = self.config, len(batch.emotion)
        knowledge, concept = self.graphs(batch)
        log_q_cognition, log_q_concept = self.posteriors(batch, knowledge, concept)
        bow = self.bow(batch, knowledge, concept, log_q_cognition, log_q_concept)
        if self.phase == "bow":
            return bow, {"bow": bow}

        reading = self.read(batch, knowledge, concept)
        kl = (divergence(log_q_cognition.detach(), reading.log_prior_cognition, batch.knowledge_mask)
              + divergence(log_q_concept.detach(), reading.log_prior_concept, batch.concept_mask)) / size
        known, places = batch.knowledge_mask.any(1), torch.arange(size, device=knowledge.device)
        coarse = mutual_information(reading.r_cog, reading.r_emo, self.w_coarse, places, known, known)
        own = (batch.knowledge_reaction + places[:, None] * batch.reaction_mask.shape[1]).flatten()
        with_reaction = batch.reaction_mask.flatten()
        fine = mutual_information(knowledge.flatten(0, 1), reading.reaction.flatten(0, 1), self.w_fine, own,
                                  batch.knowledge_mask.flatten() & with_reaction[own], with_reaction)

        hidden = self.decoder(self.placed(batch.decoder_input), reading.memories)
        logits, target = self.output(hidden).flatten(0, 1), batch.target.flatten()
        nll = F.cross_entropy(logits, target, reduction="none", ignore_index=NO_TARGET)
        weights = self.diversity_weights(logits.detach().argmax(-1), target >= 0)
        words = batch.response_mask.sum()
        losses = {
            "bow": bow, "kl": kl, "coarse": coarse, "fine": fine, "emotion": F.nll_loss(reading.emotion, batch.emotion),
            "generation": nll.sum() / words, "diversity": (weights.to(nll.dtype)[target.clamp(min=0)] * nll).sum() / words,
        }
        loss = (c.gamma_align * (bow + kl + coarse + c.alpha * fine) + c.gamma_emotion * losses["emotion"]
                + c.gamma_generation * losses["generation"] + c.gamma_diversity * losses["diversity"])
        return loss, losses


def plain_of(model: CASE) -> PlainCase:
    """The plain form with copies of a model's weights, in its phase (what is frozen included), mode and dtype."""
    weight = model.output.weight
    plain = PlainCase(model.config).to(weight)
    plain.positions = sinusoidal_position(torch.arange(POSITIONS, device=weight.device), model.config.d_model, weight.dtype)
    plain.load_state_dict(model.state_dict())
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(trained[name])
    plain.phase = model.phase
    return plain.train(model.training)


def discernment(vectors: Tensor, signal: Tensor, mask: Tensor) -> Tensor:
    """Eq. 4-6: (B, k) log-probabilities of vectors (B, k, d) under signal (B, d)."""
    scores = torch.einsum("bkd,bd->bk", vectors, signal)
    return F.log_softmax(scores.masked_fill(~mask, MASKED), dim=-1)


def expected(log_probability: Tensor, vectors: Tensor, mask: Tensor) -> Tensor:
    """Eq. 3, (B, d)."""
    return torch.einsum("bk,bkd->bd", log_probability.exp() * mask, vectors)


def divergence(log_posterior: Tensor, log_prior: Tensor, mask: Tensor) -> Tensor:
    """Eq. 7, of all dialogues."""
    return (log_posterior.exp() * (log_posterior - log_prior) * mask).sum()


def mutual_information(x: Tensor, y: Tensor, weight: Tensor, own: Tensor, pairs: Tensor, others: Tensor) -> Tensor:
    """Eq. 9-12 over the matrix of all scores: x (P, d), y (Q, d); own (P,) the row of y that belongs to each x; pairs (P,) and
    others (Q,) say which rows take part."""
    score = torch.sigmoid(x @ weight @ y.T)  # in (0, 1): its exponential needs no shift
    of_own = score.gather(1, own[:, None])[:, 0]
    terms = score.exp()
    over_y = (terms * others).sum(1)
    strange = pairs[:, None] & (own[:, None] != torch.arange(y.shape[0], device=y.device))
    over_x = of_own.exp() + (terms * strange).sum(0)[own]
    loss = over_y.clamp(min=1).log() + over_x.log() - 2 * of_own  # a pair's own term alone is at least 1
    return (loss * pairs).sum() / pairs.sum().clamp(min=1)
