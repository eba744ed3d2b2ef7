"""CASE once more, slowly: written from the paper and the project's definitions, one dialogue at a time, in float64.

It shares nothing with the package but the weights and the examples: no packing, no CSR, no equation of `case_fast.equations`.
Graphs are lists of neighbours made here from the definitions; attention is a dense matrix a head; MIM is two loops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from slow_parts import SlowParts, sigmoid, softmax
from torch import Tensor

from case_fast.data.featurizer import Example, TextTable
from case_fast.data.vocabulary import BOS, CLS, EOS, LISTENER, SPEAKER
from case_fast.models import CASE

Neighbours = list[list[tuple[int, int]]]  # vertex -> (neighbour, relation) of each of its edges


@dataclass
class SlowDialogue:
    """What is known of one dialogue; names as in the paper."""

    cs: list[Tensor]
    ec: list[Tensor]
    er: dict[int, Tensor]  # text of a sub-utterance -> its reaction vector
    has_reaction: dict[int, bool]
    prior_cognition: Tensor
    posterior_cognition: Tensor
    prior_concept: Tensor
    posterior_concept: Tensor
    r_cog: Tensor
    r_emo: Tensor
    gate: Tensor
    r_aff: Tensor
    emotion: Tensor
    logits: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)


def undirected(vertices: int, edges: Sequence[tuple[int, int, int]]) -> Neighbours:
    """Neighbours in both directions, with a self-loop (relation 0) at every vertex."""
    found: Neighbours = [[(i, 0)] for i in range(vertices)]
    for a, b, relation in edges:
        found[a].append((b, relation))
        found[b].append((a, relation))
    return found


class SlowCase(SlowParts):
    """The weights of ``model`` as float64 leaves in ``weights``; ``forward`` builds the graph that their gradients come from."""

    def __init__(self, model: CASE, concepts: Mapping[str, Sequence[str]]):
        super().__init__(model)
        self.concepts = concepts

    # ---- parts

    def graph_encoder(self, name: str, x: Tensor, neighbours: Neighbours, intensity: Tensor | None = None) -> Tensor:
        """Post-LN layers of Eq. 1-2, vertex by vertex."""
        size = self.c.d_model // self.c.heads
        table = self.weights.get(f"{name}.relation_embedding")
        for place in range(self.c.layers):
            layer = f"{name}.layers.{place}"
            q, k, v = (self.linear(f"{layer}.{part}", x) for part in ("query", "key", "value"))
            relations = self.linear(f"{layer}.relation", table) if table is not None else None
            attended = []
            for i, edges in enumerate(neighbours):
                heads = []
                for h in range(self.c.heads):
                    part = slice(h * size, (h + 1) * size)
                    scores, values = [], []
                    for other, relation in edges:
                        query, key = q[i, part], k[other, part]
                        if relations is not None:  # first half l_q, second half l_k
                            query = query + relations[relation, : self.c.d_model][part]
                            key = key + relations[relation, self.c.d_model :][part]
                        scores.append((query * key).sum() / math.sqrt(size))
                        values.append(v[other, part])
                    heads.append(softmax(torch.stack(scores)) @ torch.stack(values))
                attended.append(torch.cat(heads))
            x = self.norm(f"{layer}.attention_norm", x + self.linear(f"{layer}.output", torch.stack(attended)))
            x = x + self.feed_forward(f"{layer}.ffn", x, gelu=True)
            if intensity is not None and place == self.c.layers - 1:
                x = x * (1 + intensity)[:, None]
            x = self.norm(f"{layer}.ffn_norm", x)
        return x

    # ---- one dialogue

    def text_vector(self, rows: Tensor) -> Tensor:
        """Of [CLS] and a text, as the cognition encoder sees it."""
        encoded = self.encoder("cognition_encoder", rows)
        return sum(encoded) / len(encoded) if self.c.vertex_pooling == "mean" else encoded[0]

    def cognition_vectors(self, e: Example, texts: TextTable) -> list[Tensor]:
        """cs_i of K_CS."""
        subs = len(e.sub_utterance)
        ids = [*e.sub_utterance.tolist(), *e.knowledge.tolist()]
        x = torch.stack([self.text_vector(self.embed([CLS, *texts.tokens(i)])) for i in ids])
        if self.c.cognition_graph:
            edges = [(0, i, 1) for i in range(1, subs)] + [(j, j + 1, 2) for j in range(1, subs - 1)]
            for n, (sub, relation) in enumerate(
                zip(e.knowledge_sub.tolist(), e.knowledge_relation.tolist(), strict=True)
            ):
                edges.append((sub, subs + n, 3 + relation))
            x = self.graph_encoder("cognition_graph", x, undirected(len(ids), edges))
        return list(x[subs:])

    def concept_vectors(self, e: Example, texts: TextTable) -> list[Tensor]:
        """ec_i of every vertex of G_EC: [CLS], the words, the concepts."""
        words, concepts = texts.vocabulary.decode(e.context), texts.vocabulary.decode(e.concept)
        n = len(words)
        pairs = [
            (i, j) for i, word in enumerate(words) for j, c in enumerate(concepts) if c in self.concepts.get(word, ())
        ]
        first = [min(i for i, j in pairs if j == concept) + 1 for concept in range(len(concepts))]
        kinds = self.weights["vertex_type.weight"][[0] * (n + 1) + [1] * len(concepts)]
        x = self.embed([CLS, *e.context.tolist(), *e.concept.tolist()], [*range(n + 1), *first]) + kinds
        intensity = torch.tensor(
            [0.0, *e.context_intensity.tolist(), *e.concept_intensity.tolist()], dtype=torch.float64
        )
        if not self.c.concept_graph:
            return list(x)
        edges = [(0, i, 1) for i in range(1, len(x))] + [(i, i + 1, 2) for i in range(1, n)]
        edges += [(1 + i, 1 + n + j, 3) for i, j in pairs]
        inside = intensity if self.c.intensity == "before_norm" else None
        x = self.graph_encoder("concept_graph", x, undirected(len(x), edges), inside)
        return list(x * (1 + intensity)[:, None] if self.c.intensity == "after" else x)

    def reactions(self, e: Example, texts: TextTable, context: Tensor) -> tuple[dict[int, Tensor], dict[int, bool]]:
        """er_i of each distinct sub-utterance."""
        er, found = {}, {}
        for i, text in enumerate(e.sub_utterance.tolist()):
            words = [w for k, sub in zip(e.reaction.tolist(), e.reaction_sub.tolist(), strict=True) if sub == i
                     for w in texts.tokens(k).tolist()]
            h = self.encoder("reaction_encoder", self.embed(words))
            h = h.mean(0) if len(h) else torch.zeros(self.c.d_model, dtype=torch.float64)
            joined = torch.stack([torch.cat([row, h]) for row in context])
            row = self.encoder("reaction_context_encoder", self.linear("reaction_fusion", joined))[0]
            if text in er:  # an equal text has equal inferences, and so an equal reaction
                assert torch.equal(er[text], row)
                continue
            er[text], found[text] = row, bool(words)
        return er, found

    def dialogue(self, e: Example, texts: TextTable) -> SlowDialogue:
        w, d = self.weights, self.c.d_model
        cs, ec = self.cognition_vectors(e, texts), self.concept_vectors(e, texts)
        roles = torch.stack([self.word(r) for r in [SPEAKER, *e.context_role.tolist()]])
        context = self.encoder("context_encoder", self.embed([CLS, *e.context.tolist()]) + roles)
        er, has_reaction = self.reactions(e, texts, context)
        reply = self.embed([CLS, *e.response.tolist()])
        y_cog = self.text_vector(reply)
        y_ctx = self.encoder("context_encoder", reply + self.word(LISTENER))[0]
        p_cs, p_ec = (self.linear(f"{name}.0", context[0]).tanh() for name in ("phi_cognition", "phi_concept"))

        def discern(vectors: list[Tensor], signal: Tensor) -> Tensor:
            divisor = {"none": 1.0, "fourth_root_d": math.sqrt(math.sqrt(d)), "sqrt_d": math.sqrt(d)}[self.c.discernment_scale]
            return (
                softmax(torch.stack([(v * signal).sum() / divisor for v in vectors]))
                if vectors
                else torch.zeros(0, dtype=torch.float64)
            )

        def expect(p: Tensor, vectors: list[Tensor]) -> Tensor:
            return sum((p[i] * v for i, v in enumerate(vectors)), torch.zeros(d, dtype=torch.float64))

        prior_cs, prior_ec, post_cs, post_ec = (
            discern(cs, p_cs),
            discern(ec, p_ec),
            discern(cs, y_cog),
            discern(ec, y_ctx),
        )
        r_cog, r_emo = expect(prior_cs, cs), expect(prior_ec, ec)
        er_0 = er[int(e.sub_utterance[0])]
        gate = sigmoid((w["w_aff"] * torch.cat([r_emo, er_0])).sum())
        r_aff = gate * r_emo + (1 - gate) * er_0
        emotion = softmax(torch.stack([(row * r_aff).sum() for row in w["w_emo"]]))
        fused = torch.stack([self.linear("fusion", torch.cat([row, r_cog, r_aff])).clamp(min=0) for row in context])
        knowledge = torch.stack(cs) if cs else torch.zeros(0, d, dtype=torch.float64)
        hidden = self.decoder(self.embed([BOS, *e.response.tolist()]), [knowledge, torch.stack(ec), fused])
        found = SlowDialogue(cs, ec, er, has_reaction, prior_cs, post_cs, prior_ec, post_ec, r_cog, r_emo, gate, r_aff, emotion,
                             self.linear("output", hidden))

        target = [*e.response.tolist(), EOS]
        bag = torch.cat([expect(post_cs, cs), expect(post_ec, ec)])
        eta = softmax(self.linear("eta.2", self.linear("eta.0", bag).tanh()))
        zero, kl = torch.zeros((), dtype=torch.float64), []
        for q, p in ((post_cs, prior_cs), (post_ec, prior_ec)):
            q = q.detach() if self.c.detach_posterior else q
            kl.append(sum((q[i] * (q[i] / p[i]).log() for i in range(len(q))), zero))
        found.losses = {
            "bow": -sum(eta[word].log() for word in target) / len(target),
            "kl": torch.stack(kl),  # of cognition, of concepts
            "emotion": -emotion[e.emotion].log(),
            "nll": torch.stack([-softmax(row)[word].log() for row, word in zip(found.logits, target, strict=True)]),
            "weights": torch.tensor([self.word_weights()[word] for word in target], dtype=torch.float64),
        }
        return found

    # ---- a batch

    def mim(self, pairs: list[tuple[Tensor, object]], others: dict[object, Tensor], weight: Tensor) -> Tensor:
        """Minus the mean bracket of Eq. 9 / 11 over ``pairs`` of a vector and the key of what it belongs to."""
        if not pairs:
            return torch.zeros((), dtype=torch.float64)
        score = self.c.mim_score
        if score == "standardized":  # by the batch's rows: of knowledge for the pairs, of affection for the others
            rows = self.standardized([x for x, _ in pairs])
            pairs = [(row, key) for row, (_, key) in zip(rows, pairs, strict=True)]
            others = dict(zip(others, self.standardized([*others.values()]), strict=True))
            weight = weight / self.c.d_model
        f = [{key: x @ y if score == "dot" else sigmoid(x @ weight @ y) for key, y in others.items()} for x, _ in pairs]
        total = torch.zeros((), dtype=torch.float64)
        for p, (_, own) in enumerate(pairs):
            positive = f[p][own]
            over_y = sum(f[p][key].exp() for key in others)
            over_x = positive.exp() + sum(f[o][own].exp() for o, (_, key) in enumerate(pairs) if key != own)
            total = total - (2 * positive - over_y.log() - over_x.log())
        return total / len(pairs)

    def standardized(self, rows: list[Tensor]) -> list[Tensor]:
        """Each feature less its mean, by its standard deviation, over these rows."""
        columns = []
        for column in torch.stack(rows).unbind(1):
            centred = column - sum(column) / len(column)
            columns.append(centred / (sum(centred**2) / len(column) + 1e-5).sqrt())
        return list(torch.stack(columns, 1))

    def forward(
        self, examples: Sequence[Example], texts: TextTable
    ) -> tuple[Tensor, dict[str, Tensor], list[SlowDialogue]]:
        """The total loss, its parts, and every dialogue."""
        c = self.c
        found = [self.dialogue(e, texts) for e in examples]
        zero = torch.zeros((), dtype=torch.float64)
        coarse = fine = zero
        if c.coarse_alignment:
            known = [(b, dialogue) for b, dialogue in enumerate(found) if dialogue.cs]
            coarse = self.mim([(dialogue.r_cog, b) for b, dialogue in known], {b: dialogue.r_emo for b, dialogue in known},
                              self.weights["w_coarse"])
        if c.fine_alignment:
            pairs, others = [], {}
            for b, (e, dialogue) in enumerate(zip(examples, found, strict=True)):
                others |= {(b, text): er for text, er in dialogue.er.items() if dialogue.has_reaction[text]}
                keys = [(b, int(e.sub_utterance[sub])) for sub in e.knowledge_sub]
                pairs += [(v, key) for v, key in zip(dialogue.cs, keys, strict=True) if key in others]
            fine = self.mim(pairs, others, self.weights["w_fine"])
        words = sum(len(dialogue.losses["nll"]) for dialogue in found)
        kl = sum(x.losses["kl"] for x in found) / len(found)
        if c.kl_reduction == "mean":
            vertices = [sum(len(x.cs) for x in found), sum(len(x.ec) for x in found)]
            kl = kl * len(found) / torch.tensor([max(count, 1) for count in vertices])
        losses = {
            "bow": sum(x.losses["bow"] for x in found) / len(found),
            "kl": kl.sum(),
            "coarse": coarse,
            "fine": fine,
            "emotion": sum(x.losses["emotion"] for x in found) / len(found),
            "generation": sum(x.losses["nll"].sum() for x in found) / words,
            "diversity": sum((x.losses["weights"] * x.losses["nll"]).sum() for x in found) / words,
        }
        alignment = losses["bow"] + losses["kl"] + losses["coarse"] + c.alpha * losses["fine"]
        total = (c.gamma_align * alignment + c.gamma_emotion * losses["emotion"] + c.gamma_generation * losses["generation"]
                 + c.gamma_diversity * losses["diversity"])
        return total, losses, found
