"""EmpDG (Li et al., COLING 2020) with its discriminators, which judge a reply by what the speaker says after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from case_fast import equations as eq
from case_fast import equations_baselines as eqb
from case_fast.arguments import at_least_1
from case_fast.batch import Batch
from case_fast.equations_baselines import Packed
from case_fast.errors import ConfigError
from case_fast.models.base import Length, Output, Reading, no_autocast
from case_fast.models.empdg import EmpDG, EmpDGConfig
from case_fast.models.layers import drawn, seed_at

GENERATOR, DISCRIMINATORS = "generator", "discriminators"  # whose turn a step is
_DEMO = {"discriminator_steps": 60, "rounds": 40, "validate_rounds": 10}


@dataclass(frozen=True)
class AdversarialEmpDGConfig(EmpDGConfig):
    """The settings of `AdversarialEmpDG`, on top of `EmpDGConfig`.

    Attributes:
        penalty: weight of the gradients' penalty in L_D.
        critic_lr: learning rate of the discriminators.
        discriminator_steps: steps of the phase in which they alone are trained.
        rounds: of the last phase, at most. validate_rounds: between two validations of it.
        critic_steps, generator_steps: steps of L_D, and then of L_G, in a round.
    """

    kind = "empdg-d"

    penalty: float = 0.1
    critic_lr: float = 1e-4
    discriminator_steps: int = 1_000
    rounds: int = 5_000
    validate_rounds: int = 200
    critic_steps: int = 1
    generator_steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "discriminator_steps", "rounds", "validate_rounds", "critic_steps", "generator_steps")
        if self.penalty < 0 or self.critic_lr <= 0:
            raise ConfigError(f"penalty must be 0 or more and critic_lr above 0, not {self.penalty} and {self.critic_lr}")

    @property
    def steps_of_round(self) -> int:
        return self.critic_steps + self.generator_steps

    def length(self, phase: str) -> Length | None:
        return {
            "discriminators": Length(self.discriminator_steps),
            "interactive": Length(self.rounds * self.steps_of_round, self.validate_rounds * self.steps_of_round),
        }.get(phase)


class Critic(nn.Module):
    """A discriminator: an LSTM over the words of a reply and over those of the feedback, a convolution of width 2 over the
    reply's states o, and score = w_2 . ReLU(W_1 ReLU(f + k + u + beta) + b_1) + b_2 with f = max_t ReLU(W_c [o_t ; o_{t+1}] + b),
    u the last state of the feedback, k what was understood of the context; f and u are 0 where there are no words for them.
    """

    def __init__(self, words: int, d: int):
        super().__init__()
        inner = max(1, d // 2)
        self.embedding = nn.Embedding(words, d)
        self.lstm = nn.LSTM(d, d)
        self.pairs, self.inner, self.outer = nn.Linear(2 * d, d), nn.Linear(d, inner), nn.Linear(inner, 1)
        self.shift = nn.Parameter(torch.zeros(d))
        for layer in (self.pairs, self.inner, self.outer):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def words(self, ids: Tensor) -> Tensor:
        return eq.take(self.embedding.weight, ids)

    def states(self, *parts: Packed) -> list[Packed]:
        """The LSTM's outputs of packed rows, of all parts by one call."""
        starts = [0]
        for rows, _ in parts:
            starts.append(starts[-1] + len(rows))
        rows = torch.cat([rows for rows, _ in parts])
        cu = torch.cat([parts[0][1][:1], *(cu[1:] + start for (_, cu), start in zip(parts, starts, strict=False))])
        states = states_in_order(self.lstm, rows, cu)
        return [(states[a:b], cu) for (a, b), (_, cu) in zip(pairwise(starts), parts, strict=True)]

    def score(self, states: Tensor, cu: Tensor, context: Tensor, feedback: Packed) -> Tensor:
        """(J,) of a reply's states, packed; context (J, d), feedback: its states, packed."""
        after, cu_after = feedback
        some = (cu_after.diff() > 0).unsqueeze(-1)
        behind = F.pad(after, (0, 0, 0, 1))  # a row that can be read where there is none
        last = torch.where(some, eq.take(behind, (cu_after[1:] - 1).clamp(min=0)), 0)
        found = eqb.largest_of_pairs(states, cu, self.pairs.weight, self.pairs.bias)
        return self.outer(F.relu(self.inner(F.relu(found + context + last + self.shift)))).squeeze(-1)


def states_in_order(lstm: nn.LSTM, rows: Tensor, cu: Tensor) -> Tensor:
    """(n, h) the outputs of an LSTM at each of packed rows (n, d), cu (s + 1,): step by step over those of the s sequences, empty
    ones among them, that have so many rows. It asks the device for their lengths."""
    if not len(rows):  # all has gradients nevertheless, of zeros, as in a batch that is filled up: Adam goes on with its moments
        return rows.new_zeros(0, lstm.hidden_size) + sum(x.sum() for x in (rows, *lstm.parameters()))
    starts, lengths = cu.cpu()[:-1], cu.diff().cpu()
    order = lengths.argsort(descending=True, stable=True)
    step = torch.arange(int(lengths.max())).unsqueeze(1)
    there = step < lengths[order]
    place = (starts[order] + step)[there].to(rows.device)
    states = lstm(PackedSequence(rows.index_select(0, place), there.sum(1)))[0].data
    return torch.empty_like(states).index_copy(0, place, states)


class AdversarialEmpDG(EmpDG):
    """`EmpDG` and two discriminators, one for all words and one for the emotional ones. Phases: the generator as `EmpDG`; the
    discriminators alone, on L_D; both in turns, the generator on L_G = L - (B / M) mean(score_semantic + score_emotional).

    A generated reply is judged as the expected word vectors of the teacher-forced distribution, so that gradients reach the
    generator. Without feedback in the batch L_G is EmpDG's L.
    """

    Config = AdversarialEmpDGConfig
    title = "EmpDG + discriminators"
    needs = (*EmpDG.needs, "feedback")
    phases = ("generator", "discriminators", "interactive")
    presets = {
        "released": EmpDG.presets["released"],
        "frame": EmpDG.presets["frame"],
        "demo": EmpDG.presets["demo"] | {"model": EmpDG.presets["demo"]["model"] | _DEMO},
    }
    published = {}  # none for all 5 255 test turns
    asks = "the LSTMs of its discriminators take the lengths of the replies, and of the emotional words that were generated"

    def __init__(self, config: AdversarialEmpDGConfig):
        super().__init__(config)
        self.config: AdversarialEmpDGConfig
        with torch.random.fork_rng(devices=[]):  # what the generator is drawn by, now and later, is what EmpDG is drawn by
            self.semantic_critic, self.emotional_critic = (Critic(config.vocab_size, config.d_model) for _ in range(2))
        self._share_words()
        self.set_phase(self.phase)

    def _share_words(self) -> None:
        """The discriminators' tables of words start as the generator's."""
        with torch.no_grad():
            for critic in self.critics:
                critic.embedding.weight.copy_(self.embedding.weight)

    @property
    def critics(self) -> tuple[Critic, Critic]:
        return self.semantic_critic, self.emotional_critic

    def load_embeddings(self, ids: Tensor, vectors: Tensor) -> None:
        super().load_embeddings(ids, vectors)
        self._share_words()

    # ---- what a step trains

    def set_phase(self, name: str) -> None:
        self.turn = DISCRIMINATORS if name == "discriminators" else GENERATOR
        super().set_phase(name)

    def set_turn(self, step: int) -> None:
        c = self.config
        if self.phase == "interactive":
            turn = DISCRIMINATORS if step % c.steps_of_round < c.critic_steps else GENERATOR
            if turn != self.turn:
                self.turn = turn
                super().set_phase(self.phase)

    def unreached(self, phase: str) -> Iterable[nn.Module | nn.Parameter]:
        return self.critics if self.turn == GENERATOR else self._of_generator()

    def parameter_groups(self) -> list[dict[str, Any]]:
        (everything,) = super().parameter_groups()
        own = set(map(id, self._of_generator()))
        generator, critics = ([p for p in everything["params"] if (id(p) in own) == kept] for kept in (True, False))
        return [{"params": generator}, {"params": critics, "lr": self.config.critic_lr, "betas": (0.9, 0.999), "eps": 1e-8}]

    def _of_generator(self) -> list[nn.Parameter]:
        theirs = {id(parameter) for critic in self.critics for parameter in critic.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in theirs]

    # ---- the losses

    def forward(self, batch: Batch) -> Output:
        if not self.training or self.turn == GENERATOR:
            return super().forward(batch)
        with torch.no_grad():
            reading, hidden = self._decoded(batch)
        weight, place = batch.feedback.weight, seed_at(batch.seed, "discriminators")
        losses = {"critic": 0.0, "penalty": 0.0}
        with no_autocast(hidden):
            for number, (critic, context, generated, real, feedback) in enumerate(self._judged(batch, reading, hidden)):
                generated, real, feedback = critic.states(generated, real, feedback)
                share = eqb.uniform(len(weight), drawn(seed_at(place, number)), weight.device)
                score = partial(critic.score, context=context, feedback=feedback)
                difference, penalty = eqb.critic_losses(score, generated, real, share, weight)
                losses = {"critic": losses["critic"] + difference, "penalty": losses["penalty"] + penalty}
        return Output(loss=losses["critic"] + self.config.penalty * losses["penalty"], losses=losses)

    def _add_losses(self, batch: Batch, reading: Reading, out: Output) -> None:
        if self.phase != "interactive":
            return
        out.losses["adversarial"] = out.loss.new_zeros(())
        if not len(batch.feedback.dialogue):
            return
        with no_autocast(out.hidden):
            for critic, context, generated, _, feedback in self._judged(batch, reading, out.hidden):
                (states, cu), after = critic.states(generated, feedback)
                score = critic.score(states, cu, context, after)
                out.losses["adversarial"] = out.losses["adversarial"] - (batch.feedback.weight.to(score.dtype) * score).sum()
            dialogues, words = batch.sizes.to(out.loss.dtype)
            out.loss = out.loss + eqb.emotion_scale("dialogue", dialogues, words) * out.losses["adversarial"]

    def _judged(self, batch: Batch, reading: Reading, hidden: Tensor
                ) -> Iterator[tuple[Critic, Tensor, Packed, Packed, Packed]]:
        """Both discriminators with what they judge: the context (J, d) as it was read, detached; expected word vectors of the
        generated reply, those of the real one, and of the feedback, packed. The emotional one sees emotional words alone, of the
        generated reply those rows whose most probable word is one."""
        of, (memory,) = batch.feedback, reading.memories
        first = memory.cu.index_select(0, of.dialogue)  # [CLS], and behind the context [SEP]
        second = first + batch.cu_context.diff().index_select(0, of.dialogue)
        semantic, emotional = (eq.full_precision(eq.take(memory.rows, rows).detach()) for rows in (first, second))
        logits = eq.full_precision(self.output(eq.full_precision(eq.take(hidden, of.reply))))
        probability = logits.softmax(-1)
        felt = of.lexicon[logits.argmax(-1)].nonzero().squeeze(1)
        cu_felt = torch.searchsorted(of.reply_segment[felt], torch.arange(len(of.cu), device=felt.device))
        real, real_emotional = (batch.target.index_select(0, rows) for rows in (of.reply, of.reply_emotional))
        one, other = self.critics
        yield (one, semantic, (probability @ one.embedding.weight, of.cu_reply), (one.words(real), of.cu_reply),
               (one.words(of.word), of.cu))
        yield (other, emotional, (probability[felt] @ other.embedding.weight, cu_felt),
               (other.words(real_emotional), of.cu_reply_emotional), (other.words(of.emotional), of.cu_emotional))
