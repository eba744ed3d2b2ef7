"""Adam (Kingma and Ba, 2015) by torch's fused kernel, without `torch.optim`, whose optimizers import torch's compiler: 110 MB and
two seconds of a start that nothing here has a use for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Adam:
    """``torch.optim.Adam(groups, ..., fused=True)``, bit for bit.

    Attributes:
        param_groups: mappings with "params", "lr" (a number or a () tensor on their device), "betas", "eps", and what else the
            groups came with.
        state: of each parameter that had a gradient: "step" () float32, "exp_avg", "exp_avg_sq", on its device.
        found_inf: () float32 on the parameters' device, or None. A step in which it is 1 changes nothing.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], lr: float | Tensor, betas: tuple[float, float], eps: float):
        self.param_groups = [{"lr": lr, "betas": betas, "eps": eps} | group for group in groups]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self.found_inf: Tensor | None = None

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient; the others, and their moments, stay."""
        with torch.profiler.record_function("Optimizer.step#Adam"):
            for group in self.param_groups:
                moved = [parameter for parameter in group["params"] if parameter.grad is not None]
                if moved:
                    self._step(moved, group)

    def _step(self, moved: list[nn.Parameter], group: Mapping[str, Any]) -> None:
        for parameter in moved:
            if parameter not in self.state:
                self.state[parameter] = {"step": torch.zeros((), device=parameter.device),
                                         "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                                         "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format)}
        steps, averages, squares = ([self.state[parameter][part] for parameter in moved]
                                    for part in ("step", "exp_avg", "exp_avg_sq"))
        beta_1, beta_2 = group["betas"]
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            moved, [parameter.grad for parameter in moved], averages, squares, [], steps, lr=group["lr"], beta1=beta_1,
            beta2=beta_2, weight_decay=0.0, eps=group["eps"], amsgrad=False, maximize=False, grad_scale=None,
            found_inf=self.found_inf,
        )
        if self.found_inf is not None:
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))
