"""EmpDG's discriminators once more, slowly: one dialogue and one word at a time, in float64, from the definitions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from helpers import slow_philox
from slow_empdg import SlowEmpDG
from slow_parts import sigmoid
from torch import Tensor

from case_fast.data.featurizer import Example, TextTable
from case_fast.data.text import stop_words
from case_fast.data.vocabulary import EOS

CRITICS = ("semantic_critic", "emotional_critic")


class SlowAdversarialEmpDG(SlowEmpDG):
    def losses(self, examples: Sequence[Example], texts: TextTable, seeds: Sequence[int]) -> dict[str, Tensor]:
        """"L_D" and "L_G" with their parts; seeds: what the shares of both discriminators are drawn by."""
        known = super().forward(examples, texts)
        judged = [place for place, e in enumerate(examples) if len(e.feedback)]
        sums = {name: torch.zeros((), dtype=torch.float64) for name in ("critic", "penalty", "adversarial")}
        for number, (critic, seed) in enumerate(zip(CRITICS, seeds, strict=True)):
            for place, b in enumerate(judged):
                share = (slow_philox((place, 0, 0, 8), (seed & 0xFFFFFFFF, seed >> 32))[0] + 0.5) / 2**32
                for name, part in self.of_dialogue(critic, examples[b], texts, self.found[b], number == 1, share).items():
                    sums[name] = sums[name] + part / len(judged)
        words = len(known["nll"])
        return known | sums | {
            "L_D": sums["critic"] + self.c.penalty * sums["penalty"],
            "L_G": known["loss"] + len(examples) / words * sums["adversarial"],
        }

    def of_dialogue(self, critic: str, e: Example, texts: TextTable, found: tuple, emotional: bool, share: float
                    ) -> dict[str, Tensor]:
        _, _, memory, words = found
        context = memory[1 + len(e.context)] if emotional else memory[0]

        def kept(word: int) -> bool:
            text = texts.vocabulary.words[word]
            return not emotional or (texts.emotional.intensity.get(text, 0) != 0 and text not in stop_words())

        table = self.weights[f"{critic}.embedding.weight"]
        said = [table[word] for word in [*e.response.tolist(), EOS] if kept(word)]
        after = [table[word] for word in e.feedback.tolist() if kept(word)]
        chosen = [row for row in words if kept(int(row.argmax()))]

        def expected(row: Tensor) -> Tensor:
            return sum(probability * vector for probability, vector in zip(row, table, strict=True))

        behind = self.lstm(critic, after)[-1] if after else torch.zeros_like(context)
        real, made = self.lstm(critic, said), self.lstm(critic, [expected(row.detach()) for row in chosen])

        def score(states: Sequence[Tensor]) -> Tensor:
            return self.score(critic, states, context.detach(), behind)

        mixed = [(share * a + (1 - share) * b).detach().requires_grad_() for a, b in zip(made, real, strict=False)]
        slopes = torch.autograd.grad(score(mixed), mixed, create_graph=True) if len(mixed) > 1 else []
        norm = sum((slope.square().sum() for slope in slopes), torch.zeros((), dtype=torch.float64)).sqrt() if slopes else 0.0
        reaching = self.lstm(critic, [expected(row) for row in chosen])
        return {"critic": score(made) - score(real), "penalty": torch.as_tensor((norm - 1) ** 2, dtype=torch.float64),
                "adversarial": -score(reaching)}

    def lstm(self, critic: str, rows: Sequence[Tensor]) -> list[Tensor]:
        """The hidden state after each row."""
        w = {name: self.weights[f"{critic}.lstm.{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        hidden = cell = torch.zeros(self.c.d_model, dtype=torch.float64)
        states = []
        for row in rows:
            gates = w["weight_ih"] @ row + w["bias_ih"] + w["weight_hh"] @ hidden + w["bias_hh"]
            enter, keep, new, leave = gates.chunk(4)
            cell = sigmoid(keep) * cell + sigmoid(enter) * new.tanh()
            hidden = sigmoid(leave) * cell.tanh()
            states.append(hidden)
        return states

    def score(self, critic: str, states: Sequence[Tensor], context: Tensor, behind: Tensor) -> Tensor:
        found = torch.zeros_like(context)
        for a, b in zip(states[:-1], states[1:], strict=True):
            found = torch.maximum(found, self.linear(f"{critic}.pairs", torch.cat([a, b])).clamp(min=0))
        inner = self.linear(f"{critic}.inner", (found + context + behind + self.weights[f"{critic}.shift"]).clamp(min=0))
        return self.linear(f"{critic}.outer", inner.clamp(min=0))[0]
