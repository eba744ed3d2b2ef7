"""MIME (Majumder et al., EMNLP 2020): the speaker's emotion is mimicked by a blend of emotions of its own polarity, and balanced
by one of the other, each drawn from a distribution that the context decides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case_fast import equations as eq
from case_fast import equations_baselines as eqb
from case_fast.batch import Batch
from case_fast.errors import ConfigError
from case_fast.models.base import Output, Reading, no_autocast
from case_fast.models.layers import Encoder, Linear, Memory, drawn, product_of_parts, seed_at
from case_fast.models.transformer import MultiTRS, MultiTRSConfig

# Labels of the positive emotions (the paper's Table 1): caring, confident, content, excited, faithful, grateful, hopeful,
# impressed, joyful, prepared, proud, surprised, trusting. The other 19 are negative.
POSITIVE = (7, 8, 9, 14, 15, 17, 19, 20, 22, 25, 26, 29, 31)
LARGEST = 10.0  # of a logarithm of a variance, either way


@dataclass(frozen=True)
class MIMEConfig(MultiTRSConfig):
    """The settings of `MIME`, on top of `MultiTRSConfig`; the defaults are those that its published figures come from.

    Attributes:
        mimicry: the first refinement has the emotion's own polarity; off, always the positive one.
        grouping: a distribution for each polarity; off, one over all emotions, which both refinements read.
        stochastic: z is drawn in training; off, it is always its mean.
        sample_at_test: z is drawn in evaluation too.
        gamma_kl: weight of L_KL, times B / M as if both losses were summed over the batch.
    """

    kind = "mime"
    ablations = {"w/o Mimicry": {"mimicry": False}, "w/o Grouping": {"grouping": False}, "w/o Sampling": {"stochastic": False}}

    layers: int = 1
    mimicry: bool = True
    grouping: bool = True
    stochastic: bool = True
    sample_at_test: bool = False
    gamma_kl: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.emotions != 32:
            raise ConfigError(f"mime knows which of the 32 emotions are positive; emotions must be 32, not {self.emotions}")


class Gaussian(nn.Module):
    """Mean and log-variance (B, d) of a normal distribution, linear in hidden rows (B, d)."""

    def __init__(self, d_model: int):
        super().__init__()
        self.mean, self.log_variance = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(hidden), self.log_variance(hidden).clamp(-LARGEST, LARGEST)


@dataclass(kw_only=True)
class MIMEReading(Reading):
    """What MIME understood.

    Attributes:
        summary (B, d): c; priors: (mean, log-variance) of each group's z, (B, d) each.
        refined: M and M~, (T, d) each; positive (B,): whether M has the first group's blend.
    """

    summary: Tensor
    priors: list[tuple[Tensor, Tensor]]
    refined: tuple[Tensor, Tensor]
    positive: Tensor


class MIME(MultiTRS, paper_url="https://aclanthology.org/2020.emnlp-main.721"):
    """H = Enc(X), log P_emo = log softmax(A W c); for each polarity g an emotion e_g = softmax(W_g z_g) A_g of its own rows of A;
    M = Enc_1(W_1 [H; m]), M~ = Enc_2(W_2 [H; m~]) with m the emotion of the speaker's polarity, m~ the other; with G = [M; M~]
    the decoder reads W_f (sigmoid(W_c G) G).
    """

    Config = MIMEConfig
    published = {
        "": {"source": "Zhou et al. (ACL 2023), Table 1 (recipe: released)", "ppl_geometric": 37.33, "dist_1": 0.41,
             "dist_2": 1.62, "acc_1": 0.296},
    }
    shared = ("encoder",)

    def _add_parts(self) -> None:
        super()._add_parts()  # w_emo is A
        c, d = self.config, self.config.d_model
        negative = [label for label in range(c.emotions) if label not in POSITIVE]
        self.groups = [list(POSITIVE), negative] if c.grouping else [list(range(c.emotions))]
        self.register_buffer("is_positive", torch.tensor([label in POSITIVE for label in range(c.emotions)]), persistent=False)
        self.emotion_query = Linear(d, d, bias=False)
        self.prior_hidden = nn.Linear(d, d)
        self.prior = nn.ModuleList(Gaussian(d) for _ in self.groups)
        self.choice = nn.ModuleList(nn.Linear(d, len(group)) for group in self.groups)
        self.fusion = nn.ModuleList(Linear(2 * d, d, bias=False) for _ in range(2))
        self.refiner = nn.ModuleList(
            Encoder(c.layers, d, c.heads, c.ffn, c.encoder_dropout, width=c.attention_width) for _ in range(2)
        )
        self.posterior_hidden = nn.ModuleList(nn.Linear(2 * d, d) for _ in self.groups)
        self.posterior = nn.ModuleList(Gaussian(d) for _ in self.groups)
        self.gate, self.merge = Linear(2 * d, 2 * d), Linear(2 * d, d)

    def _emotion(self, summary: Tensor) -> Tensor:
        return super()._emotion(self.emotion_query(summary))

    def _read(self, batch: Batch, words: dict[str, Tensor]) -> MIMEReading:
        context = self._encoded(batch, words)
        summary = eq.take(context, batch.cu_context[:-1])
        emotion = self._emotion(summary)
        predicted = emotion.argmax(-1)
        label = torch.where(batch.emotion >= 0, batch.emotion, predicted) if self.training else predicted
        apart = self.config.mimicry and self.config.grouping
        positive = self.is_positive[label] if apart else torch.ones_like(label, dtype=torch.bool)
        with no_autocast(context):
            summary = eq.full_precision(summary)
            priors, blends = self._blends(batch, summary)
        mimicked, other = eqb.mimicry(blends[0], blends[-1], positive)
        refined = self._refined(batch, context, mimicked, 0), self._refined(batch, context, other, 1)
        joined = torch.cat(refined, dim=1)
        memory = self.merge(torch.sigmoid(self.gate(joined)) * joined)
        return MIMEReading(memories=[Memory(memory, batch.cu_context)], emotion_logits=emotion, summary=summary, priors=priors,
                           refined=refined, positive=positive)

    def _blends(self, batch: Batch, summary: Tensor) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """Of each group: mean and log-variance of z, and e_g = softmax(W_g z + b) A_g, (B, d)."""
        c = self.config
        hidden = F.relu(self.prior_hidden(summary))
        priors, blends = [], []
        for place, group in enumerate(self.groups):
            mean, log_variance = z, _ = self.prior[place](hidden)
            priors.append((mean, log_variance))
            if c.stochastic and self.training or c.sample_at_test and not self.training:
                noise = eqb.standard_normal(*mean.shape, drawn(seed_at(seed_at(batch.seed, "emotions"), place)), mean.device)
                z = mean + (log_variance / 2).exp() * noise.to(mean.dtype)
            blends.append(self.choice[place](z).softmax(-1) @ eq.full_precision(self.w_emo)[group])
        return priors, blends

    def _refined(self, batch: Batch, context: Tensor, emotion: Tensor, place: int) -> Tensor:
        """Enc(W [H; m]), (T, d)."""
        of_context, of_emotion = product_of_parts(self.fusion[place].weight, context, emotion)
        seed = seed_at(seed_at(batch.seed, "context with emotion"), place)
        return self.refiner[place](of_context + eq.take(of_emotion, batch.context_segment), batch.cu_context, seed=seed)

    def _add_losses(self, batch: Batch, reading: MIMEReading, out: Output) -> None:
        if not self.training:
            return
        with no_autocast(reading.summary):
            out.losses["kl"] = self._divergence(batch, reading)
        scale = eqb.emotion_scale("dialogue", *batch.sizes.to(out.loss.dtype))
        out.loss = out.loss + self.config.gamma_kl * scale * out.losses["kl"]

    def _divergence(self, batch: Batch, reading: MIMEReading) -> Tensor:
        """L_KL: over groups, the mean over dialogues of KL(q(z_g | X, its refinement) || p(z_g | X))."""
        of_row = reading.positive[batch.context_segment].unsqueeze(1)
        whole = reading.summary.new_zeros(())
        for place, prior in enumerate(reading.priors):
            mine, other = reading.refined if place == 0 else reading.refined[::-1]
            rows = eq.full_precision(torch.where(of_row, mine, other))
            seen = eq.segment_mean(rows, batch.context_segment, batch.size)
            posterior = self.posterior[place](F.relu(self.posterior_hidden[place](torch.cat([reading.summary, seen], dim=-1))))
            whole = whole + (eqb.gaussian_kl(posterior, prior) * batch.dialogue_weight.to(whole.dtype)).sum()
        return whole
