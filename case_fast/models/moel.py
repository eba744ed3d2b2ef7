"""MoEL (Lin et al., EMNLP-IJCNLP 2019): one listener, a decoder of its own, for each emotion; those of the five emotions that the
context shows most answer together, and a meta listener makes one reply of what they say."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case_fast import equations as eq
from case_fast import equations_baselines as eqb
from case_fast.arguments import at_least_1
from case_fast.batch import Batch
from case_fast.errors import ConfigError
from case_fast.models.base import Output, Reading
from case_fast.models.layers import (
    AnySeed,
    Decoder,
    DecoderLayer,
    DecoderState,
    Memory,
    drawn,
    normalized,
    seed_at,
)
from case_fast.models.transformer import MultiTRS, MultiTRSConfig


@dataclass(frozen=True)
class MoELConfig(MultiTRSConfig):
    """The settings of `MoEL`, on top of `MultiTRSConfig`; the defaults are those that its published figures come from.

    Attributes:
        layers: of the encoder and of the meta listener; every other listener has one.
        top_k: emotions whose listeners answer a dialogue, or all where there are fewer.
        schedule, schedule_floor: the probability that a step of training gives each dialogue the listener of its gold emotion
            alone is floor + (1 - floor) exp(-steps / schedule).
    """

    kind = "moel"

    layers: int = 1
    top_k: int = 5
    schedule: float = 10_000.0
    schedule_floor: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "top_k")
        if not self.schedule > 0:
            raise ConfigError(f"schedule must be above 0, not {self.schedule}")
        if not 0 <= self.schedule_floor <= 1:
            raise ConfigError(f"schedule_floor must be in [0, 1], not {self.schedule_floor}")


@dataclass
class Cut:
    """Rows of the sequences of all listeners, one listener after the other: ``index`` (m,) of the rows that they are taken from,
    ``pair`` (m,) the place in `Audiences.dialogue`; of each listener how many rows it has, ``sizes``, and its offsets ``cu``."""

    index: Tensor
    pair: Tensor
    sizes: list[int]
    cu: list[Tensor]


class Audiences:
    """Which dialogues each listener answers, those whose gate is above 0; the device is asked for it.

    Attributes:
        dialogue, gate: (P,) of all listeners, one after the other, the shared one first; counts: how many each has.
    """

    def __init__(self, gates: Tensor):
        """``gates`` (B, emotions); that of the shared listener is always 1."""
        gates = F.pad(gates, (1, 0), value=1.0).T
        answers = gates > 0
        listener, self.dialogue = answers.nonzero().unbind(1)
        self.gate = eq.take(gates.reshape(-1), listener * gates.shape[1] + self.dialogue)
        self.counts: list[int] = answers.sum(1).tolist()

    def cut(self, cu: Tensor) -> Cut:
        """The rows of the listeners' dialogues, out of sequences of one row after the other, cu (B + 1,)."""
        length = cu.diff().index_select(0, self.dialogue)
        own = F.pad(length.cumsum(0), (1, 0))
        ends = [0, *itertools.accumulate(self.counts)]
        starts = own[ends].tolist()
        pair = eq.segment_ids(own, starts[-1])
        index = torch.arange(starts[-1], device=cu.device) + (cu[self.dialogue] - own[:-1])[pair]
        return Cut(index, pair, [b - a for a, b in itertools.pairwise(starts)],
                   [own[a : b + 1] - own[a] for a, b in itertools.pairwise(ends)])

    def memories(self, memories: Sequence[Memory]) -> list[list[Memory]]:
        """What each listener reads, of its dialogues alone."""
        found: list[list[Memory]] = [[] for _ in self.counts]
        for memory in memories:
            cut = self.cut(memory.cu)
            for own, rows, cu in zip(found, eq.take(memory.rows, cut.index).split(cut.sizes), cut.cu, strict=True):
                own.append(Memory(rows, cu))
        return found


class Listening:
    """A listener while replies are decoded: its own cache, for its own dialogues.

    Attributes:
        places: of its dialogues among those that go on, ascending; hypotheses (n * beams,): theirs among all.
        gate: (n,), of each of its dialogues; weight (n * beams, 1), of each hypothesis.
    """

    def __init__(self, layer: DecoderLayer, state: DecoderState, gate: Tensor, places: list[int]):
        self.layer, self.state = layer, state
        self._stand(places, gate)

    def _stand(self, places: list[int], gate: Tensor) -> None:
        self.places, self.gate, beams = places, gate, self.state.beams
        self.weight = gate.repeat_interleave(beams).unsqueeze(1)
        first = torch.tensor(places, device=gate.device).unsqueeze(1) * beams
        self.hypotheses = (first + torch.arange(beams, device=gate.device)).flatten()

    def step(self, x: Tensor) -> Tensor:
        """p V of the newest words: x (dialogues * beams, d) of all, returns (n * beams, d) of its own."""
        self.state.begin()
        made = self.layer.step(x.index_select(0, self.hypotheses), 0, self.state)
        return made * self.weight.to(made.dtype)

    def reorder(self, origin: Tensor) -> None:
        """``origin``: as of `DecoderState.reorder`, each of its own dialogue, among all hypotheses."""
        own = torch.arange(len(self.hypotheses), device=origin.device)
        self.state.reorder(own + origin.index_select(0, self.hypotheses) - self.hypotheses)

    def keep(self, kept: list[int]) -> bool:
        """Go on with those of its dialogues that are at one of ``kept``; False where none is."""
        place = {old: new for new, old in enumerate(kept)}
        mine = [number for number, old in enumerate(self.places) if old in place]
        if mine:
            staying = torch.tensor(mine, device=self.gate.device)
            self.state.keep(staying)
            self._stand([place[self.places[number]] for number in mine], self.gate.index_select(0, staying))
        return bool(mine)


class MixtureState(DecoderState):
    """The cache of the meta listener, and of each listener in use one for its own dialogues, ``listening``."""

    def __init__(self, sources: list, beams: int, words: int, start: Tensor | None, added: Tensor | None,
                 listening: list[Listening]):
        super().__init__(sources, beams, words, start, added)
        self.listening = listening

    def reorder(self, origin: Tensor) -> None:
        super().reorder(origin)
        for part in self.listening:
            part.reorder(origin)

    def keep(self, kept: Tensor, dialogues: int | None = None) -> None:
        """No step reads more dialogues than go on: a listener has no room for them."""
        if dialogues not in (None, len(kept)):
            raise ValueError(f"a mixture goes on with the {len(kept)} dialogues that are kept, not with {dialogues}")
        parts, self.listening = self.listening, []  # what follows reorders the meta listener alone
        super().keep(kept)
        places = kept.tolist()
        self.listening = [part for part in parts if part.keep(places)]


class Mixture(Decoder):
    """The meta listener, over V_shared + sum of p_e V_e, V_e what the one layer of a listener makes of the decoder's input.

    A listener runs on the dialogues whose gate is above 0 and on no others; one that has none is in the graph all the same, with
    gradients of zeros, so that Adam goes on with their moments.
    """

    def __init__(self, emotions: int, layers: int, d_model: int, heads: int, ffn: int, dropout: float, width: int | None):
        super().__init__(layers, d_model, heads, ffn, dropout, 1, width)
        self.listeners = nn.ModuleList(  # the shared one first
            DecoderLayer(d_model, heads, ffn, dropout, 1, width) for _ in range(1 + emotions)
        )

    def forward(self, x: Tensor, cu: Tensor, memories: Sequence[Memory], added: Tensor | None = None, seed: AnySeed = 0,
                watched: list[Tensor] | None = None, *, gates: Tensor) -> Tensor:
        """As of `Decoder`; ``gates`` (B, emotions) p."""
        heard = Audiences(gates)
        cut, memories_of = heard.cut(cu), heard.memories(memories)
        rows = eq.take(x, cut.index).split(cut.sizes)
        added_of = [None] * len(rows) if added is None else eq.take(added, heard.dialogue).split(heard.counts)
        made, idle = [], []
        for place, listener in enumerate(self.listeners):
            if not heard.counts[place]:
                idle += [parameter.flatten()[:0] for parameter in listener.parameters()]
                continue
            own, normed = normalized(rows[place], listener.self_norm)
            made.append(listener(own, normed, cut.cu[place], memories_of[place], added=added_of[place],
                                 seed=seed_at(seed_at(seed, "listener"), place))[0])
        said = torch.cat(made)
        mixed = eq.segment_sum(said * eq.take(heard.gate.to(said.dtype), cut.pair).unsqueeze(1), cut.index, x.shape[0])
        if idle:
            mixed = mixed + torch.cat(idle).sum()
        return super().forward(mixed, cu, memories, added, seed, watched)

    @torch.no_grad()
    def start(self, memories: Sequence[Memory], beams: int, words: int, start: Tensor | None = None,
              added: Tensor | None = None, fixed: bool = False, *, gates: Tensor) -> MixtureState:
        """As of `Decoder`; no memory of it is taken again, ``fixed`` or not."""
        heard = Audiences(gates)
        parts = zip(self.listeners, heard.memories(memories), heard.dialogue.split(heard.counts), heard.gate.split(heard.counts),
                    strict=True)
        listening = []
        for listener, own, dialogues, gate in parts:
            if len(dialogues):
                sources = [[source.projected() for source in listener.sources(own)]]
                state = DecoderState(sources, beams, words, added=None if added is None else added[dialogues])
                listening.append(Listening(listener, state, gate, dialogues.tolist()))
        return MixtureState(self._keys_and_values(memories), beams, words, start, added, listening)

    def restart(self, state: DecoderState, memories: Sequence[Memory], start: Tensor | None, added: Tensor | None = None, *,
                gates: Tensor) -> bool:
        """Never: other dialogues have other listeners."""
        return False

    @torch.no_grad()
    def step(self, x: Tensor, state: MixtureState) -> Tensor:
        said = torch.cat([part.step(x) for part in state.listening])
        rows = torch.cat([part.hypotheses for part in state.listening])
        return super().step(eq.segment_sum(said, rows, x.shape[0]), state)


class MoEL(MultiTRS, paper_url="https://aclanthology.org/D19-1012"):
    """H = Enc(X), l = Key c; p = softmax over the 5 greatest of l, or, where training forces it, 1 at the gold emotion; the
    decoder is a `Mixture`: V = V_shared + sum of p_e V_e, each V of a listener's layer over Y and H, D = LN(layer(V, H)).
    """

    Config = MoELConfig
    asks = "which listeners answer a dialogue is read from the device"
    published = {
        "": {"source": "Zhou et al. (ACL 2023), Table 1 (recipe: released)", "ppl_geometric": 38.35, "dist_1": 0.44,
             "dist_2": 2.10, "acc_1": 0.322},
    }
    shared = ("encoder",)

    def _add_parts(self) -> None:
        super()._add_parts()  # w_emo is Key
        c = self.config
        self.decoder = Mixture(c.emotions, c.layers, c.d_model, c.heads, c.ffn, c.decoder_dropout, c.attention_width)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # of training
        self.steps: Tensor

    def _read(self, batch: Batch, words: dict[str, Tensor]) -> Reading:
        reading = super()._read(batch, words)
        gates = eqb.listener_gates(reading.emotion_logits, self.config.top_k)
        if self.training:
            probability = eqb.forcing_probability(self.steps, self.config.schedule, self.config.schedule_floor)
            forced = eqb.coin(self.steps, probability, drawn(seed_at(batch.seed_of_all, "teacher forcing")))
            gates = eqb.forced_gates(gates, batch.emotion, forced)
        return replace(reading, gates=gates)

    def beside_memories(self, reading: Reading) -> dict[str, Tensor | None]:
        return super().beside_memories(reading) | {"gates": reading.gates}

    def _add_losses(self, batch: Batch, reading: Reading, out: Output) -> None:
        if self.training:
            self.steps.add_(1)
