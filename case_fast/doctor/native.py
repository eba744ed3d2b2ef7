"""Checks of the kernels: the native module and its build, and one small call of each family of ops beside its equation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from case_fast.doctor.check import Finding, Look, fail, ok, skip, warn
from case_fast.doctor.software import reinstall

if TYPE_CHECKING:
    from torch import Tensor

_FLOOR = 1e-5  # an op may be off by this and twice what plain torch is, as in the tests


def looks() -> Iterator[Look]:
    yield Look("module", _module, reinstall())
    yield Look("CUDA", _cuda, reinstall())
    for family in _calls("cpu"):
        yield Look(family, lambda family=family: _op(family, "cpu"), f"export CASE_FAST_BACKEND={family}=reference")


def looks_on_gpu() -> Iterator[Look]:
    """The families on the first GPU; none where there is no GPU, as another check says."""
    import torch

    for family in _calls("cpu") if torch.cuda.is_available() else ():
        yield Look(family, lambda family=family: _op(family, "cuda"), f"export CASE_FAST_BACKEND={family}=reference")


def _module() -> Finding:
    from case_fast.ops import native_report

    report = native_report()
    if report["available"]:
        return ok(f"{report['version']}, as the package; {len(report['families'])} families of ops, {report['simd']}")
    if "not built" in report["reason"]:
        return warn(f"{report['reason']}; ops run in plain torch, slower", reinstall())
    return fail(f"{report['reason']}; ops run in plain torch, slower", reinstall())


def _cuda() -> Finding:
    import torch

    from case_fast.ops import native_report

    report, there = native_report(), torch.cuda.is_available()
    if not report.get("cuda"):
        lacking = "the native module has no CUDA code" if report["available"] else "there is no native module"
        if there and torch.version.cuda:
            return warn(f"{lacking}, and torch sees a GPU", f"CASE_FAST_CUDA=1 {reinstall()}")
        return skip(f"{lacking}, and torch sees no GPU", f"CASE_FAST_CUDA=1 {reinstall()}")
    built = f"built by CUDA {report['cuda_runtime']} for {', '.join(f'sm_{number}' for number in report['cuda_architectures'])}"
    if not there:
        return skip(f"{built}; {report['cuda_status'] or 'torch sees no GPU'}", "nvidia-smi")
    if not report["cuda_devices"]:
        return fail(f"{built}; torch sees a GPU, the module does not: {report['cuda_status']}", "nvidia-smi")
    return ok(f"{built}; {report['cuda_devices']} seen")


def _op(family: str, device: str) -> Finding:
    """Results and gradients of a small call in float32 beside those of its equation in float64."""
    from case_fast.ops.backend import backend_with_reason

    runs, why = backend_with_reason(family, device)
    if runs == "triton":
        return skip(f"triton ({why}); compiling it takes too long for a look", "python -m pytest python_tests/ops -k gpu")
    call = _calls(device)[family]
    found, plain, true = (_results(*how) for how in ((call.op, call), (call.equation, call), (call.equation, call.doubled())))
    worst, off = "", 0.0
    for name, value in true.items():
        error, theirs = (_distance(other[name], value) for other in (found, plain))
        if not error <= 2 * theirs + _FLOOR:  # also of NaN
            return fail(f"{runs} ({why}): {name} is off by {error:.2g}, plain torch by {theirs:.2g}",
                        f"export CASE_FAST_BACKEND={family}=reference")
        if error >= off:
            worst, off = name, error
    return ok(f"{runs} ({why}), off by {off:.0e} ({worst})")


class _Call(NamedTuple):
    """A call of an op and of its equation: ``floats`` have gradients, and are given by their names, as ``rest`` is."""

    op: Callable
    equation: Callable
    floats: Mapping[str, Tensor]
    rest: Mapping[str, Any]

    def doubled(self) -> _Call:
        return self._replace(floats={name: x.double() for name, x in self.floats.items()})


def _results(function: Callable, call: _Call) -> dict[str, Tensor]:
    """The results by number, and the gradient of each float, of a sum in which every element has another weight."""
    import torch

    leaves = {name: x.detach().requires_grad_() for name, x in call.floats.items()}
    given = function(**leaves, **call.rest)
    outputs = [x for x in (given if isinstance(given, tuple) else (given,)) if x.numel()]
    whole = sum((x * torch.arange(1, x.numel() + 1, device=x.device).view(x.shape).to(x.dtype).cos()).sum()
                for x in outputs if x.requires_grad)
    gradients = torch.autograd.grad(whole, list(leaves.values()))
    named = {f"result {number}" if len(outputs) > 1 else "result": x.detach() for number, x in enumerate(outputs, 1)}
    return named | {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item() if a.shape == b.shape else float("inf")


def _calls(device: str) -> dict[str, _Call]:
    """One small call of each family: sequences of 3, none and 5 rows; two heads; values of order 1."""
    import torch

    from case_fast import equations, ops
    from case_fast.ops import reference

    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def places(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def decoder(run: Callable) -> Callable:
        def attend(hidden: Tensor, **source: Tensor) -> Tensor:
            return run(hidden, places(0, 2, 3, 4), [ops.Source(cu_keys=cu, **source)])

        return attend

    cu, heads = places(0, 3, 3, 8), {"query": some(8, 2, 5), "key": some(8, 2, 5), "value": some(8, 2, 5)}
    norm = {"weight": some(10), "bias": some(10)}
    return {
        "graph_attention": _Call(
            ops.graph_attention, equations.graph_attention,
            heads | {"relation_query": some(3, 2, 5), "relation_key": some(3, 2, 5)},
            {"indptr": places(0, 2, 2, 5, 6, 6, 7, 7, 8), "indices": places(0, 1, 2, 3, 7, 4, 5, 6),
             "relation": places(0, 1, 2, 0, 1, 2, 0, 1)}),
        "packed_attention": _Call(ops.packed_attention, equations.packed_attention, heads,
                                  {"cu_query": cu, "cu_key": cu, "causal": True}),
        "pooled_attention": _Call(ops.pooled_attention, reference.pooled_attention,
                                  {"query": some(3, 2, 10), "rows": some(8, 10)}, {"cu": cu, "scale": 0.4}),
        "cross_attention": _Call(
            decoder(ops.cross_attention), decoder(equations.cross_attention),
            {"hidden": some(4, 10), "key": some(8, 2, 5), "value": some(8, 2, 5), "norm_weight": some(10), "norm_bias": some(10),
             "query_weight": some(10, 10), "output_weight": some(10, 10)}, {}),
        "bilinear_mim": _Call(ops.bilinear_mim, equations.bilinear_mim,
                              {"x": some(8, 10), "y": some(5, 10), "weight": some(10, 10)},
                              {"positive": places(0, 1, 1, 2, 3, 4, 4, 4)}),
        "linear_cross_entropy": _Call(ops.linear_cross_entropy, equations.linear_cross_entropy,
                                      {"hidden": some(8, 10), "weight": some(50, 10), "bias": some(50)},
                                      {"target": places(*range(0, 48, 6))}),
        "linear": _Call(ops.linear, reference.linear, {"x": some(8, 10), "weight": some(7, 10), "bias": some(7)},
                        {"activation": "gelu"}),
        "residual_norm": _Call(ops.residual_norm, reference.residual_norm, {"x": some(8, 10), "update": some(8, 10)} | norm, {}),
        "segment_sum": _Call(_never_plain(ops.segment_sum), reference.segment_sum, {"x": some(8, 10)},
                             {"segment": places(2, 0, 2, 1, 4, 4, 0, 2), "size": 5}),
    }


def _never_plain(segment_sum: Callable) -> Callable:
    """As it is for many elements; plain torch sums few of them."""
    return lambda **arguments: segment_sum(**arguments, few=0)
