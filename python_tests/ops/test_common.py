"""`common.call`: who watches sees the registered op; everyone else gets what it runs, and the same bits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from case_fast.ops import backend, bilinear_mim, common


class Seen(TorchDispatchMode):
    """Counts ops by name, and lets them run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Marked(torch.Tensor):
    """A subclass that does nothing of its own."""


def _calls(*arguments):
    """Of a stand-in op and of its implementation, in one call."""
    made = []
    common.call(lambda *x: made.append("op"), lambda *x: made.append("implementation"), *arguments)
    return made


def test_an_unwatched_call_takes_the_short_way():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert _calls("native", torch.ones(2), None, 3, 0.5, True, [torch.ones(2), None], parameter) == ["implementation"]


@pytest.mark.parametrize("argument", [Marked(), [torch.ones(2), Marked()], (torch.ones(2),), object()],
                         ids=["subclass", "in a list", "tuple", "unknown"])
def test_what_is_not_plain_goes_through_the_op(argument):
    assert _calls("native", torch.ones(2), argument) == ["op"]


def test_modes_transforms_and_compilers_see_the_op():
    with Seen():
        assert _calls(torch.ones(2)) == ["op"]
    inside = []
    torch.func.vmap(lambda x: (inside.extend(_calls(x)), x)[1])(torch.ones(2, 2))
    assert inside == ["op"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert _calls(torch.ones(2)) == ["op"]


def test_a_mode_sees_a_family_and_the_result_is_the_same():
    torch.manual_seed(0)
    x, y, weight = torch.randn(5, 7), torch.randn(5, 7), torch.randn(7, 7)
    plain = bilinear_mim(x, y, weight)
    with Seen() as seen:
        watched = bilinear_mim(x, y, weight)
    assert torch.equal(plain, watched)
    has_op = backend.backend_name("bilinear_mim") != "reference"
    assert ("case_fast::bilinear_mim_forward" in seen.names) == has_op
