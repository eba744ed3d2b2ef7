"""Run by test_triton_graph_attention.py in a process of its own, since Triton reads TRITON_INTERPRET on import; and what the
workers of other families share.

    interpret    every case of `CASES` in Triton's interpreter against equations.py in float64: one JSON line a case
    compile      every kernel for sm_90, without a GPU: one JSON line a kernel
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from case_fast import equations

SEED = 0x1234_5678_9ABC_DEF0
CASES = {
    # name: vertices, edges, heads, dim, relations (0: plain), dropout, dtype, index dtype
    "prime sizes": (7, 23, 3, 13, 5, 0.3, "float32", "int64"),
    "plain, int32": (7, 40, 3, 13, 0, 0.0, "float32", "int32"),
    "the paper's head": (5, 20, 2, 150, 10, 0.2, "float32", "int32"),
    "largest head": (3, 9, 1, 256, 2, 0.0, "float32", "int64"),
    "one vertex": (1, 3, 1, 1, 1, 0.5, "float32", "int64"),
    "no edges": (4, 0, 2, 8, 3, 0.1, "float32", "int64"),
    "no vertices": (0, 0, 2, 8, 3, 0.1, "float32", "int64"),
    "rows longer than a block": (3, 120, 1, 5, 4, 0.1, "float32", "int64"),
    "more relations than a block": (5, 60, 2, 6, 37, 0.0, "float32", "int32"),
    "more vertices than a chunk": (70, 90, 1, 3, 2, 0.0, "float32", "int64"),
    "all dropped but few": (5, 40, 2, 4, 3, 0.95, "float32", "int64"),
    "float64": (6, 30, 2, 10, 3, 0.25, "float64", "int64"),
    "float64, plain": (6, 30, 1, 33, 0, 0.25, "float64", "int32"),
    "float16": (6, 30, 2, 10, 3, 0.25, "float16", "int64"),
    "bfloat16": (6, 30, 2, 10, 3, 0.25, "bfloat16", "int64"),
}


def in_own_process(script: str, mode: str, folder: Path, **environment: str) -> list[dict]:
    """The JSON lines that a worker of this folder prints; ``folder`` keeps what Triton compiles."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")} | environment
    here = Path(__file__).resolve()
    env |= {"PYTHONPATH": str(here.parents[2]), "TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(here.with_name(script)), mode]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def inputs(vertices: int, edges: int, heads: int, dim: int, relations: int, dtype: str, index: str) -> dict[str, Tensor]:
    """A random multigraph whose last two rows are empty (where there are more than two); parallel edges happen."""
    floats, integers = getattr(torch, dtype), getattr(torch, index)
    row = torch.randint(0, max(vertices - 2, 1), (edges,)).sort().values
    made = {"indptr": torch.zeros(vertices + 1, dtype=integers)}
    made["indptr"][1:] = torch.bincount(row, minlength=vertices).cumsum(0)
    made["indices"] = torch.randint(0, max(vertices, 1), (edges,)).to(integers)
    for name in ("query", "key", "value", "grad_out"):
        made[name] = torch.randn(vertices, heads, dim, dtype=torch.float64).to(floats)
    if relations:
        made["relation"] = torch.randint(0, relations, (edges,)).to(integers)
        for name in ("relation_query", "relation_key"):
            made[name] = torch.randn(relations, heads, dim, dtype=torch.float64).to(floats)
    return made


def truth(made: dict[str, Tensor], scale: float, dropout_p: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Output and gradients of equations.graph_attention."""
    floats = {name: x.to(dtype).requires_grad_() for name, x in made.items() if x.is_floating_point() and name != "grad_out"}
    integers = {name: x for name, x in made.items() if not x.is_floating_point()}
    out = equations.graph_attention(**floats, **integers, scale=scale, dropout_p=dropout_p, seed=SEED)
    order = ["query", "key", "value", "relation_query", "relation_key"]
    wanted = [floats[name] for name in order if name in floats]
    grads = torch.autograd.grad(out, wanted, made["grad_out"].to(dtype), allow_unused=True)
    return [out, *(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True))]


def arguments(made: dict[str, Tensor]) -> list[Tensor | None]:
    order = "query key value indptr indices relation relation_query relation_key".split()
    return [made.get(name) for name in order]


def worst(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [(a.double() - b.double()).abs().max().item() if b.numel() else 0.0 for a, b in zip(found, expected, strict=True)]


def interpret(case: str) -> dict:
    from case_fast.ops import graph_attention_triton as kernels

    torch.manual_seed(0)
    vertices, edges, heads, dim, relations, dropout_p, dtype, index = CASES[case]
    made = inputs(vertices, edges, heads, dim, relations, dtype, index)
    scale = dim**-0.5
    numbers = (scale, dropout_p, SEED)
    query, key, value, *rest = arguments(made)
    runs = []
    for _ in range(2 if edges < 30 else 1):
        out, weights = kernels.forward(query, key, value, *rest, *numbers)
        grads = kernels.backward(made["grad_out"], query, key, value, *rest, weights, *numbers)
        runs.append([out, *(g for g in grads if g is not None)])
    expected = truth(made, scale, dropout_p)
    plain = truth(made, scale, dropout_p, getattr(torch, dtype))
    return {
        "case": case,
        "error": worst(runs[0], expected),
        "plain_error": worst(plain, expected),
        "dtypes": [str(x.dtype) for x in runs[0]],
        "repeatable": all(torch.equal(a, b) for a, b in zip(runs[0], runs[-1], strict=True)),
        "weights": [list(weights.shape), str(weights.dtype)],
    }


def damaged() -> dict:
    """Indices out of range: what the flag says, and which rows are NaN."""
    from case_fast.ops import graph_attention_triton as kernels
    from case_fast.ops.device_flag import raise_pending

    torch.manual_seed(0)
    said = {}
    for name, place, wrong in (("indices", 0, 6), ("indices", 0, -1), ("relation", 0, 3), ("relation", 0, -7),
                               ("indptr", 6, 99), ("indptr", 1, -4)):
        made = inputs(6, 30, 2, 4, 3, "float32", "int64")
        made[name][place] = wrong
        query, key, value, *rest = arguments(made)
        out, weights = kernels.forward(query, key, value, *rest, 0.5, 0.0, 0)
        kernels.backward(made["grad_out"], query, key, value, *rest, weights, 0.5, 0.0, 0)
        try:
            raise_pending()
            error = ""
        except (ValueError, IndexError) as raised:
            error = f"{type(raised).__name__}: {raised}"
        try:
            raise_pending()
        except (ValueError, IndexError):
            error += " (and again)"
        said[f"{name} {wrong}"] = [error, out.isnan().any(dim=(1, 2)).tolist()]
    return said


def mask_of_kept(edges: int, heads: int, dropout_p: float) -> bool:
    """Whether the kernels drop exactly the edges that equations.dropout_keep drops: rows of one neighbour, values of 1."""
    from case_fast.ops import graph_attention_triton as kernels

    one = torch.ones(edges, heads, 1)
    places = torch.arange(edges + 1)
    out, _ = kernels.forward(one, one, one, places, places[:-1], None, None, None, 1.0, dropout_p, SEED)
    return torch.equal(out[:, :, 0] != 0, equations.dropout_keep(edges, heads, dropout_p, SEED, one.device))


def compiled(function, types: dict[str, str], constants: dict, options: dict, multiples: tuple[str, ...] = ()) -> dict:
    """A kernel compiled for sm_90 without a GPU: its target, its size, and what the assembler says of registers and spills.

    ``multiples``: the arguments that Triton is to know as multiples of 16 (addresses, in bytes), as it finds them at run time.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    known = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(function.arg_names) if name in multiples}
    source = ASTSource(function, signature, constexprs=constants, attrs=known)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    found = {}
    if os.access(tool, os.X_OK):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}
    return {"kernel": function.__name__, "target": re.search(r"\.target (\w+)", built.asm["ptx"])[1],
            "bytes": len(built.asm["cubin"]), "wgmma": "wgmma.mma_async" in built.asm["ptx"], **found}


def cross_compile(kernel: str, dtype: str, relation: bool, dropout: bool, index: str, dim: int = 150) -> dict:
    from case_fast.ops import graph_attention_triton as kernels

    sizes = kernels.shapes(torch.empty(84, 2, dim, dtype=getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype])), 336, 10)
    constants = sizes | {"RELATION": relation, "DROPOUT": dropout}
    types = {name: f"*{dtype}" for name in "query key value relation_query relation_key out grad_out x relation_x".split()}
    types |= {name: f"*{dtype}" for name in "grad_query grad_key grad_value".split()}
    types |= {name: "*fp32" for name in "weights dscore table part".split()} | {"flag": "*i32"}
    types |= {name: f"*{index}" for name in "indptr indices relation".split()}
    types |= {name: "*i64" for name in "column_start column_edge column_row".split()}
    types |= {name: "i32" for name in "vertices edges relations chunk".split()}
    types |= {"scale": "fp64", "seed": "u64", "drop_below": "i64", "kept_scale": "fp64"}
    if not relation and kernel != "relation_part":
        constants |= dict.fromkeys(("relation", "relation_query", "relation_key"))
    found = compiled(getattr(kernels, kernel), types, constants, {"num_warps": sizes["num_warps"]})
    name = f"{kernel} {dtype} {'relations' if relation else 'plain'}{' dropout' if dropout else ''} {index}"
    return found | {"kernel": name}


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "interpret":
        for case in CASES:
            print(json.dumps(interpret(case)), flush=True)
        print(json.dumps({"case": "damaged", "said": damaged()}), flush=True)
        print(json.dumps({"case": "kept", "equal": [mask_of_kept(40, 3, p) for p in (0.1, 0.5, 0.9)]}), flush=True)
    else:
        for kernel, dtype in product(("forward_rows", "backward_rows", "backward_columns"), ("fp32", "bf16")):
            for relation, dropout, index in ((True, True, "i32"), (True, False, "i64"), (False, False, "i32")):
                print(json.dumps(cross_compile(kernel, dtype, relation, dropout, index)), flush=True)
        for dtype in ("fp32", "bf16"):
            print(json.dumps(cross_compile("relation_part", dtype, True, False, "i32")), flush=True)


if __name__ == "__main__":
    main()
