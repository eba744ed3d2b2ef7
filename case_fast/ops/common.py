"""What the ops of all families share around their kernels: dtypes, checks, layout, calls of the native module, registration, and
gradients."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch._C import _get_fp32_precision_getter as _fp32_precision  # torch.backends' own, which takes five times as long
from torch._C import _len_torch_dispatch_stack as _dispatch_modes
from torch._C._autograd import _profiler_enabled as _profiled
from torch.nn import Parameter

from case_fast.arguments import misfit_of_call, number, truth, whole
from case_fast.ops import backend, transforms
from case_fast.ops.device_flag import device_flag, raise_pending

HALF = (torch.float16, torch.bfloat16)
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # enum case_fast_dtype
INDEX_BITS = {torch.int32: 32, torch.int64: 64}
MAX_DIMENSION = 256  # of a head, in the GPU kernels of attention

# ------------------------------------------------------------------------------------------------------------------- dtypes


def device_type(x: Tensor) -> str:
    """As ``x.device.type``, which takes longer."""
    return "cpu" if x.is_cpu else x.device.type


def compute_dtype(like: Tensor) -> tuple[torch.dtype, bool]:
    """The dtype that a call on ``like`` computes in, and whether its inputs must be cast to it: under autocast, autocast's;
    on CPU, float32 in place of half precision."""
    device, dtype = device_type(like), like.dtype
    autocast = torch.is_autocast_enabled(device)
    if autocast:
        dtype = torch.get_autocast_dtype(device)
    elif dtype not in HALF:
        return dtype, False
    if device == "cpu" and dtype in HALF:
        return torch.float32, True
    return dtype, autocast


def cast(compute: torch.dtype, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """The inputs in that dtype; float64, as autocast does, and None stay as they are."""
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(compute) for x in inputs)


def restored(out: Tensor, given: torch.dtype) -> Tensor:
    """A result in the dtype that the caller gave; under autocast as it is."""
    return out if out.dtype == given or torch.is_autocast_enabled(out.device.type) else out.to(given)


def sum_dtype(x: Tensor) -> torch.dtype:
    """Of sums and losses: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def bf16_products() -> bool:
    """Whether torch lets products of float32 on CPU round their factors to bfloat16: `torch.set_float32_matmul_precision` of
    "medium", or ``torch.backends.mkldnn.matmul.fp32_precision = "bf16"``, which that sets."""
    return _fp32_precision("mkldnn", "matmul") == "bf16"


# ----------------------------------------------------------------------------------------------------------------- public ops


def public(function: Callable) -> Callable:
    """An op as callers have it. Where it fails and no check of its own said why, an argument of the wrong type is named, or the
    transform of torch that it cannot run under; a call that succeeds pays for nothing but this way round."""

    @functools.wraps(function)
    def op(*arguments, **named):
        if torch.compiler.is_compiling():
            return function(*arguments, **named)
        try:
            return function(*arguments, **named)
        except Exception as error:
            said = misfit_of_call(function, arguments, named)
            if said and not str(error).startswith(re.match(r"\w+", said)[0]):
                raise TypeError(said) from error
            if refusal := transforms.refusal(f"case_fast.ops.{function.__name__}", error):
                raise refusal from error
            raise

    return op


# --------------------------------------------------------------------------- checks: what is known without reading a tensor


def check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, not {x.dtype}")


def check_like(name: str, x: Tensor, dtype: torch.dtype, device: torch.device, like: str) -> None:
    """A float tensor that must have the dtype and device of ``like``."""
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} as {like}, not {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device} as {like}, not on {x.device}")


def check_index(name: str, x: Tensor, device: torch.device, like: str) -> None:
    if x.dtype not in INDEX_BITS:
        raise TypeError(f"{name} must be int32 or int64, not {x.dtype}")
    if x.dim() != 1:
        raise ValueError(f"{name} must have one dimension, not shape {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device} as {like}, not on {x.device}")


def seed_pair(seed: int | Tensor, device: torch.device) -> tuple[int, Tensor | None]:
    """A checked seed as the ops take it: a number, and the tensor whose value is XORed to it when a kernel runs (modulo 2^63).

    An int is the number alone. A tensor is XORed to 0, so that its value need not be known to the host: a captured or queued call
    draws by what the tensor holds when the call runs.
    """
    if type(seed) is int and 0 <= seed < 2**63:  # before every call: the short way
        return seed, None
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be a whole number or an int64 tensor, not one of {seed.dtype}")
        if seed.dim() > 1 or seed.numel() != 1:
            raise ValueError(f"seed must be one number, a tensor of shape () or (1,), not {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"seed must be on {device} as the other arguments, not on {seed.device}")
        return 0, seed
    seed = whole("seed", seed, "a whole number or an int64 tensor")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2^63), not {seed!r}")
    return seed, None


def probability(name: str, p: float) -> float:
    p = number(name, p)
    if not 0 <= p < 1:
        raise ValueError(f"{name} must be in [0, 1), not {p!r}")
    return p


def finite(name: str, x: float) -> float:
    x = number(name, x)
    if not 0 <= x < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, not {x!r}")
    return x


def check_sequences(query_name: str, cu_query: Tensor, key_name: str, cu_key: Tensor, of_name: str, key_of: Tensor | None,
                    device: torch.device) -> None:
    """Offsets of sequences of queries and of keys, and which keys each sequence of queries attends to."""
    for name, cu in ((query_name, cu_query), (key_name, cu_key)):
        check_index(name, cu, device, "the other arguments")
        if cu.shape[0] == 0:
            raise ValueError(f"{name} must hold one number more than there are sequences, so at least one")
    sequences = cu_query.shape[0] - 1
    if key_of is None:
        if cu_key.shape[0] != cu_query.shape[0]:
            raise ValueError(f"{key_name} must be ({sequences + 1},) as {query_name}, not {tuple(cu_key.shape)}; "
                             f"{of_name} would say which keys each sequence attends to")
        return
    check_index(of_name, key_of, device, "the other arguments")
    if key_of.shape[0] != sequences:
        raise ValueError(f"{of_name} must be ({sequences},), a number for each sequence of {query_name}, not "
                         f"{tuple(key_of.shape)}")
    if sequences and cu_key.shape[0] == 1:
        raise IndexError(f"{of_name} names sequences of {key_name}, which has none")


def attended_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised out, as query (n, H, d), and the log of each softmax' divisor (n, H), in the dtype of sums."""
    lse = torch.empty(query.shape[:2], dtype=sum_dtype(query), device=query.device)
    return torch.empty_like(query, memory_format=torch.contiguous_format), lse


def beyond_gpu(dimension: int, device: str) -> str:
    """What about heads of that size the kernels of attention do not take."""
    return "" if dimension <= MAX_DIMENSION or device == "cpu" else f"heads of more than {MAX_DIMENSION} dimensions"


# ----------------------------------------------------------------------------------------------------- checks that read a tensor


def reads(validate: bool | None, runs: str, device: str) -> bool:
    """Whether an op must check the contents of offsets and indices itself: by default on CPU, where the native kernels do."""
    kernels_do = runs == "native" and device == "cpu"
    if validate is None:
        return device == "cpu" and not kernels_do and not torch.compiler.is_compiling()
    return truth("validate", validate) and not kernels_do


@transforms.reading
def check_offsets(name: str, offsets: Tensor, end: int, of: str) -> None:
    """Raises IndexError at the first offset that is wrong; ``of`` says what the last one counts."""
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0:
        raise IndexError(f"{name} starts at {first}; it must start at 0")
    falls = (offsets[1:] < offsets[:-1]).nonzero()
    if falls.numel():
        place = int(falls[0])
        raise IndexError(f"{name} falls from {int(offsets[place])} to {int(offsets[place + 1])} at place {place + 1}")
    if last != end:
        raise IndexError(f"{name} ends at {last}; it must end at the number of {of}, {end}")


@transforms.reading
def check_within(name: str, index: Tensor, size: int) -> None:
    """Raises IndexError at the first entry outside [0, size)."""
    wrong = ((index < 0) | (index >= size)).nonzero()
    if wrong.numel():
        place = int(wrong[0])
        raise IndexError(f"{name} holds {int(index[place])} at place {place}; it must be in [0, {size})")


# ------------------------------------------------------------------------------------------------------------------- layout


def like_indices(*indices: Tensor | None) -> tuple[Tensor | None, ...]:
    """int64 for all where they differ; the kernels take one of both."""
    dtype = None
    for x in indices:
        if x is not None and x.dtype != dtype:
            if dtype is not None:
                return tuple([x if x is None else x.long() for x in indices])
            dtype = x.dtype
    return indices


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else x.contiguous() for x in tensors]


def empty_like(*tensors: Tensor | None) -> list[Tensor]:
    """Uninitialised, contiguous tensors like those that are there: outputs and gradients."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors if x is not None]


def are_rows_apart(x: Tensor) -> bool:
    """Whether the rows of (T, H, D) are dense, wherever each row lies: what the kernels of attention read without a copy."""
    if x.is_contiguous():
        return True
    heads, dimension = x.shape[1:]
    dense = (x.stride(2) == 1 or dimension == 1) and (x.stride(1) == dimension or heads == 1)
    return dense and (x.stride(0) >= heads * dimension or x.shape[0] <= 1)


def rows_apart(x: Tensor) -> Tensor:
    """x, or a contiguous copy of it where its rows are not dense."""
    return x if are_rows_apart(x) else x.contiguous()


def row_stride(x: Tensor) -> int:
    """Elements from one row to the next."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1] * x.shape[2]


def dense_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """x (n, ...), or a view or a copy of it, whose rows are dense; the elements of a row; elements from one row to the next."""
    width = stride = math.prod(x.shape[1:])
    if not x.is_contiguous():
        x = x.reshape(x.shape[0], width)  # a view where it can be
        if x.stride(1) != 1 and width > 1:
            x = x.contiguous()
        stride = x.stride(0)
    return x, width, stride


def distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same as tensors of their own: torch.compile takes no tensor twice into an autograd.Function."""
    return [x if x is None else x.view_as(x) for x in tensors]


def pointers(*tensors: Tensor | None) -> list[int]:
    """Their addresses; 0 stands for an absent one."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def pointer_of(key_of: Tensor | None, cu_query: Tensor) -> int:
    """Of key_of; that of an empty one is 0, as of none at all, so any other that is never read stands for it."""
    return 0 if key_of is None else key_of.data_ptr() or cu_query.data_ptr()


# -------------------------------------------------------------------------------------------------------- the native module


def run_native(name: str, like: Tensor, call: tuple, arguments: Sequence, of_workspace: tuple = (), on_cuda: tuple = ()
               ) -> int:
    """The status of a native function where ``like`` lies: on CPU on torch's threads; on CUDA on torch's current stream, with its
    workspace and the device flag, where it waits for nothing.

    Args:
        name: such as "graph_attention_forward".
        call: the members of the struct that describes the call; arguments: what follows it on any device.
        of_workspace, on_cuda: for CUDA, what follows ``call`` for the workspace, and ``arguments`` for the function.
    """
    if like.is_cpu:
        return getattr(backend.native, name)(call, *arguments, torch.get_num_threads())
    raise_pending()
    with torch.cuda.device(like.device):
        size = getattr(backend.native, f"{name.rpartition('_')[0]}_workspace_cuda")(call, *of_workspace)
        workspace = torch.empty(size, dtype=torch.uint8, device=like.device)
        return getattr(backend.native, f"{name}_cuda")(
            call, *arguments, *on_cuda, workspace.data_ptr(), size, device_flag().data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )


def refuse(family: str, status: int) -> NoReturn:
    """Raises what a status of enum case_fast_status means that is about no argument's contents; nothing was written."""
    if status == 5:
        raise MemoryError(f"{family} found no memory for its workspace")
    if status == 6:
        raise RuntimeError(f"{family}: CUDA refused a launch; CUDA_LAUNCH_BLOCKING=1 shows where an earlier error arose")
    raise RuntimeError(f"{family}: the native kernel refused its arguments (status {status})")


def refuse_contents(family: str, status: int, names: dict[int, str], check: Callable[[], None]) -> NoReturn:
    """As `refuse`; for a status in ``names``, what ``check`` raises, which reads the contents and says which entry it is."""
    if status in names:
        check()
        raise IndexError(f"{names[status]} names what does not exist")
    refuse(family, status)


# ------------------------------------------------------------------------------------------------------------ registered ops

_library = torch.library.Library("case_fast", "FRAGMENT")


def register(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Defines ``case_fast::NAME`` of this schema, for CPU and CUDA alike, and what it returns for tensors without data."""
    name = schema.partition("(")[0]
    _library.define(schema)
    for device in ("CPU", "CUDA"):
        _library.impl(name, implementation, device)
    torch.library.register_fake(f"case_fast::{name}", fake, lib=_library)
    op = getattr(torch.ops.case_fast, name).default
    torch.library.register_vmap(f"case_fast::{name}", transforms.mapped(op), lib=_library)
    return op


_SIMPLE = frozenset({str, int, float, bool, type(None)})


def call(op: Callable, implementation: Callable, *arguments):
    """``op(*arguments)``, a registered op of this package that runs ``implementation``: straight where nothing watches, since the
    dispatcher's way from Python to Python can take longer than a step of decoding. Compilers, dispatch modes (fake tensors,
    tracing, counting), transforms of torch.func, subclasses of Tensor and torch's profiler see the op.
    """
    if torch.compiler.is_compiling():
        return op(*arguments)
    if _seen(arguments):
        if transforms.is_any():
            transforms.refuse(op, arguments)
        return op(*arguments)
    try:
        return implementation(*arguments)
    except RuntimeError:  # these two have no address; asked only now, since no other call should take the time
        if transforms.holds_legacy_batches(arguments):
            return transforms.each_alone(functools.partial(_without_graph, op, implementation), arguments)
        if transforms.holds_zeros(arguments):
            return op(*arguments)
        raise


def _without_graph(op: Callable, implementation: Callable, *arguments):
    """A kernel's call for one gradient of a batch, which is refused where that is differentiated itself and would lose it."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in arguments if isinstance(x, Tensor)):
        raise NotImplementedError(f"{op.name()} cannot differentiate a batch of gradients; CASE_FAST_BACKEND=reference can")
    return implementation(*arguments)


def watched(arguments: tuple) -> bool:
    """Whether anything but the op itself would see a call with these arguments."""
    return torch.compiler.is_compiling() or _seen(arguments)


def _seen(arguments: tuple) -> bool:
    """The same of a call that is not being compiled."""
    return _dispatch_modes() > 0 or _profiled() or transforms.is_any() or not _are_plain(arguments)


def _are_plain(arguments: tuple | list) -> bool:
    """Whether the kernels can take them as they lie: no subclass, and no tensor whose numbers are negated when they are read, as
    those of ``x.conj().imag``, which the dispatcher does."""
    for x in arguments:
        kind = type(x)
        if kind in _SIMPLE:
            continue
        if kind is list:
            if not _are_plain(x):
                return False
        elif (kind is not Tensor and kind is not Parameter) or x.is_neg():
            return False
    return True


# ---------------------------------------------------------------------------------------------------------------- gradients


class _NoSecondDerivative(torch.autograd.Function):
    """Passes gradients through as functions of all that they were computed from, and refuses to differentiate them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(family, count, *tensors):
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.family = inputs[0]

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(f"case_fast.ops.{ctx.family} has no second derivative; with CASE_FAST_BACKEND=reference it has")


def gradients(family: str, backward: Callable[..., list[Tensor]], tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
    """``backward(*tensors)``, the gradients of a family's op, which refuse to be differentiated again."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        if transforms.holds_legacy_batches(tensors):  # whose graph is of what it holds
            return transforms.each_alone(lambda *slices: list(gradients(family, backward, slices)), tensors)
        with torch.no_grad():
            found = backward(*tensors)
        return _NoSecondDerivative.apply(family, len(found), *found, *tensors)
    return backward(*tensors)


def plain_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_out: Tensor) -> tuple[Tensor, ...]:
    """Gradients of plain torch, from inside an op."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, grad_out, allow_unused=True, materialize_grads=True)
