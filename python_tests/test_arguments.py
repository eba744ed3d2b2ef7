"""Types of arguments and settings: numbers of numpy are numbers, a wrong type names the argument and itself, a bias may be
None."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import handmade_examples, same, tiny_vocabulary
from op_cases import FAMILIES
from torch import Tensor

from case_fast import ops
from case_fast.arguments import misfit, number, plain, told, truth, whole
from case_fast.data.pack import make_batch
from case_fast.errors import ConfigError, SettingTypeError
from case_fast.generation import GenerationConfig, generate
from case_fast.models import MODELS, build, model_class
from case_fast.ops import Source
from case_fast.training.config import TrainConfig

G = torch.Generator().manual_seed(0)
X, Y, WEIGHT, BIAS = (torch.randn(shape, dtype=torch.float64, generator=G) for shape in ((5, 4), (5, 4), (7, 4), (7,)))
SEGMENT, TARGET, CU = torch.tensor([2, 0, 2, 1, 0]), torch.tensor([3, 0, 6, 2, 2]), torch.tensor([0, 2, 5])
NESTED = torch.nested.nested_tensor([X], layout=torch.jagged)
HEADS = X.view(5, 2, 2)
OPS = {  # a right call of each op
    "linear": {"x": X, "weight": WEIGHT, "bias": BIAS},
    "segment_sum": {"x": X, "segment": SEGMENT, "size": 4, "few": 0},
    "take": {"x": X, "index": SEGMENT, "few": 0},
    "segment_mean": {"x": X, "segment": SEGMENT, "size": 4},
    "segment_log_softmax": {"score": X, "segment": SEGMENT, "size": 4},
    "graph_attention": {"query": HEADS, "key": HEADS, "value": HEADS, "indptr": torch.tensor([0, 2, 2, 3, 5, 5]),
                        "indices": SEGMENT, "relation": SEGMENT, "relation_query": HEADS, "relation_key": HEADS,
                        "scale": 0.5, "dropout_p": 0.25,
                        "seed": 3},
    "packed_attention": {"query": HEADS, "key": HEADS, "value": HEADS, "cu_query": CU, "cu_key": CU, "causal": True,
                         "scale": 0.5, "dropout_p": 0.25, "seed": 3},
    "pooled_attention": {"query": X[:2, None], "rows": X, "cu": CU, "scale": 0.5, "dropout_p": 0.25, "seed": 3},
    "cross_attention": {"hidden": X, "cu_hidden": CU, "sources": [Source(HEADS, HEADS, CU, X[0], X[1], X[:4], X[:4].T)],
                        "eps": 0.5, "dropout_p": 0.25, "output_dropout_p": 0.25, "seed": 3},
    "prepare_sources": {"sources": [Source(HEADS, HEADS, CU, X[0], X[1], X[:4], X[:4].T)]},
    "bilinear_mim": {"x": X, "y": Y, "weight": X[:4], "num_negatives": 2, "seed": 3},
    "mim_sides": {"x": X, "y": Y, "weight": X[:4], "num_negatives": 2, "seed": 3},
    "linear_cross_entropy": {"hidden": X, "weight": WEIGHT, "bias": BIAS, "target": TARGET, "keep_bytes": 0},
    "top_words": {"hidden": X, "weight": WEIGHT, "bias": BIAS, "k": 3},
    "residual_norm": {"x": X, "update": Y, "weight": X[0], "bias": X[1], "eps": 0.5, "dropout_p": 0.25, "seed": 3},
    "residual": {"x": X, "update": Y, "dropout_p": 0.25, "seed": 3},
}


def results(name: str, **changes: object) -> list[Tensor]:
    found = getattr(ops, name)(**OPS[name] | changes)
    if name == "prepare_sources":
        found = [source.key for source in found.sources]
    return list(found) if isinstance(found, (tuple, list)) else [found]


def parameters(name: str) -> list[str]:
    return [each for each in get_type_hints(getattr(ops, name)) if each != "return"]


def test_the_table_holds_every_op():
    assert {"backend_name", "native_report", "PreparedSources", "RowSource", "Source", *OPS} == set(ops.__all__)
    assert set(FAMILIES) <= set(OPS)


# ---- ops

WRONG = [object(), {"a": 1}, slice(3), 1j]


@pytest.mark.parametrize("argument", [f"{name}.{each}" for name in OPS for each in parameters(name)])
def test_a_wrong_type_names_the_argument_and_itself(runs, argument):
    name, argument = argument.split(".")
    results(name)
    for wrong in WRONG:
        if argument in ("activation", "reduction", "score") and name != "segment_log_softmax":  # one of several words
            with pytest.raises(ValueError, match=rf"^{argument} must be .*, not "):
                results(name, **{argument: wrong})
            continue
        with pytest.raises(TypeError, match=rf"^{argument} must be .*, not .*\b{type(wrong).__name__}\b"):
            results(name, **{argument: wrong})


@pytest.mark.parametrize("name, changes, said", [
    ("linear", {"x": [[1.0]]}, "x must be a tensor, not list"),
    ("linear", {"x": X.numpy()}, "x must be a tensor, not ndarray"),
    ("linear", {"x": X.to_sparse()}, r"x must be a tensor, not a tensor that is not dense \(torch.sparse_coo\)"),
    ("linear", {"x": NESTED}, r"x must be a tensor, not a tensor that is not dense \(nested\)"),
    ("linear", {"x": X.float().to_mkldnn(), "weight": WEIGHT.float(), "bias": None}, "x must .*, not a tensor that is not dense"),
    ("linear", {"weight": [WEIGHT, 3]}, r"weight\[1\] must be a tensor, not 3 \(int\)"),
    ("linear", {"weight": None}, r"weight must be a tensor or Sequence\[Tensor\], not None"),
    ("linear", {"bias": 0}, r"bias must be a tensor or None, not 0 \(int\)"),
    ("linear", {"split": 1}, r"split must be True or False, not 1 \(int\)"),
    ("segment_sum", {"size": 4.0}, r"size must be a whole number, not 4\.0 \(float\)"),
    ("segment_sum", {"size": True}, r"size must be a whole number, not True \(bool\)"),
    ("segment_sum", {"size": "4"}, r"size must be a whole number, not '4' \(str\)"),
    ("segment_sum", {"size": None}, "size must be a whole number, not None"),
    ("take", {"index": 3}, r"index must be a tensor, not 3 \(int\)"),
    ("packed_attention", {"scale": torch.tensor(0.5)}, "scale must be a number, not a tensor"),
    ("packed_attention", {"dropout_p": "0.1"}, r"dropout_p must be a number, not '0\.1' \(str\)"),
    ("packed_attention", {"causal": torch.ones(2, 2)}, "causal must be True or False, not a tensor"),
    ("packed_attention", {"validate": "no"}, r"validate must be True or False, not 'no' \(str\)"),
    ("packed_attention", {"cu_query": [0, 2, 5]}, "cu_query must be a tensor, not list"),
    ("mim_sides", {"seed": "3"}, r"seed must be a whole number or an int64 tensor, not '3' \(str\)"),
    ("mim_sides", {"num_negatives": np.float64(2)}, r"num_negatives must be a whole number or None, not 2\.0 \(float\)"),
    ("cross_attention", {"sources": [3]}, r"sources\[0\] must be a case_fast.ops.Source or RowSource"),
    ("cross_attention", {"sources": [replace(OPS["cross_attention"]["sources"][0], key=[1])]},
     r"sources\[0\]\.key must be a tensor, not list"),
    ("cross_attention", {"sources": 3}, r"sources must be .*, not 3 \(int\)"),
    ("prepare_sources", {"sources": [replace(OPS["cross_attention"]["sources"][0], cu_keys=None)]},
     r"sources\[0\]\.cu_keys must be a tensor, not None"),
    ("residual_norm", {"eps": None}, "eps must be a number, not None"),
    ("top_words", {"k": 1.5}, r"k must be a whole number, not 1\.5 \(float\)"),
])
def test_what_is_said_of_a_wrong_type(name, changes, said):
    with pytest.raises(TypeError, match=rf"^{said}"):
        results(name, **changes)


@pytest.mark.parametrize("name, argument", [(name, each) for name, call in OPS.items() for each, value in call.items()
                                            if isinstance(value, (int, float))])
def test_numbers_of_numpy_are_numbers(runs, name, argument):
    value, expected = OPS[name][argument], results(name)
    kinds = [np.bool_] if isinstance(value, bool) else [np.float16, np.float32, np.float64] if isinstance(value, float) else [
        np.int8, np.int32, np.int64, np.uint8, np.uint64]
    for kind in kinds:
        assert all(torch.equal(*pair) for pair in zip(results(name, **{argument: kind(value)}), expected, strict=True))


def test_what_python_says_of_other_arguments_stays():
    with pytest.raises(TypeError, match="unexpected keyword argument 'biass'"):
        ops.linear(X, WEIGHT, biass=None)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'weight'"):
        ops.linear(X)
    with pytest.raises(TypeError, match="positional arguments but 9 were given"):
        ops.linear(X, WEIGHT, None, None, False, 1, 2, 3, 4)


# ---- a bias that is None

BIASES = [  # op, what may be None, torch's own
    ("linear", ["bias"], lambda x: F.linear(x, WEIGHT)),
    ("linear_cross_entropy", ["bias"], lambda x: F.cross_entropy(F.linear(x, WEIGHT), TARGET, reduction="none")),
    ("top_words", ["bias"], lambda x: F.linear(x, WEIGHT).log_softmax(1).topk(3).values),
    ("residual_norm", ["bias"], lambda x: F.layer_norm(x, (4,), X[0], None, 0.5)),
    ("residual_norm", ["weight"], lambda x: F.layer_norm(x, (4,), None, X[1], 0.5)),
    ("residual_norm", ["weight", "bias"], lambda x: F.layer_norm(x, (4,), None, None, 0.5)),
]


@pytest.mark.parametrize("name, absent, plain_torch", BIASES, ids=[f"{name}-{' '.join(absent)}" for name, absent, _ in BIASES])
def test_a_bias_may_be_none_where_torch_has_it_so(runs, name, absent, plain_torch):
    leaf, other = X.clone().requires_grad_(), X.clone().requires_grad_()
    first = "hidden" if "hidden" in OPS[name] else "x"
    more = {"update": None} if name == "residual_norm" else {}
    found = results(name, **{first: leaf}, **dict.fromkeys(absent), **more)[1 if name == "residual_norm" else 0]
    same(found.detach(), plain_torch(other).detach(), 1e-12)
    if name != "top_words":  # which has no gradient
        same(*[torch.autograd.grad((y**2).sum(), x)[0] for x, y in ((leaf, found), (other, plain_torch(other)))], 1e-12)


@pytest.mark.parametrize("absent", [["norm_bias"], ["norm_weight"], ["norm_weight", "norm_bias"]])
@pytest.mark.parametrize("over_rows", [False, True])
def test_a_layer_norm_of_a_source_may_be_without_weight_or_bias(runs, absent, over_rows):
    case = FAMILIES["cross_attention"].made([2, 3], [[3, 2], [1, 4]], over_rows=over_rows, dtype=torch.float64)
    filled = {"norm_weight": torch.ones(6, dtype=torch.float64), "norm_bias": torch.zeros(6, dtype=torch.float64)}
    expected = case.with_source(1, **{name: filled[name] for name in absent}).call()["out"]
    for sources in (case.with_source(1, **dict.fromkeys(absent)).sources,):
        assert torch.equal(ops.cross_attention(case.hidden, case.cu_hidden, sources), expected)
        if not over_rows:
            assert torch.equal(ops.cross_attention(case.hidden, case.cu_hidden, ops.prepare_sources(sources)), expected)


# ---- settings

CONFIGS = {"generation": GenerationConfig, "train": TrainConfig} | {name: model_class(name).Config for name in MODELS}
FIELDS = [(kind, item.name) for kind, config in CONFIGS.items() for item in fields(config)]


@pytest.mark.parametrize("kind, name", FIELDS, ids=[f"{kind}-{name}" for kind, name in FIELDS])
def test_a_setting_of_a_wrong_type_names_itself(kind, name):
    config = CONFIGS[kind]
    for wrong in [*WRONG, torch.tensor(1)]:
        with pytest.raises(SettingTypeError, match=rf"^{name} must be .*, not .*{type(wrong).__name__.lower()}") as caught:
            config(**{name: wrong})
        assert isinstance(caught.value, TypeError) and isinstance(caught.value, ConfigError)


OF_NUMPY = {bool: [np.bool_], int: [np.int32, np.int64, np.uint16], float: [np.float64]}
NUMBERS = [(kind, name) for kind, name in FIELDS if type(getattr(CONFIGS[kind](), name)) in OF_NUMPY]


@pytest.mark.parametrize("kind, name", NUMBERS, ids=[f"{kind}-{name}" for kind, name in NUMBERS])
def test_a_setting_that_is_a_number_of_numpy_is_one_of_python(kind, name):
    config = CONFIGS[kind]()
    value = getattr(config, name)
    for made in (replace(config, **{name: of(value)}) for of in OF_NUMPY[type(value)]):
        assert made == config and type(getattr(made, name)) is type(value)
        if kind != "generation":
            assert json.dumps(made.as_dict())


@pytest.mark.parametrize("config, name, wrong, said", [
    (GenerationConfig, "top_k", 2.5, r"top_k must be a whole number, not 2\.5 \(float\)"),
    (GenerationConfig, "beams", True, r"beams must be a whole number, not True \(bool\)"),
    (GenerationConfig, "temperature", "1", r"temperature must be a number, not '1' \(str\)"),
    (GenerationConfig, "allow_unk", 1, r"allow_unk must be True or False, not 1 \(int\)"),
    (GenerationConfig, "strategy", 3, r"strategy must be one of greedy, beam, sample, not 3 \(int\)"),
    (TrainConfig, "batch_size", "16", r"batch_size must be a whole number, not '16' \(str\)"),
    (TrainConfig, "betas", (0.9, "x"), r"betas\[1\] must be a number, not 'x' \(str\)"),
    (TrainConfig, "max_steps", 1.0, r"max_steps must be a whole number or None, not 1\.0 \(float\)"),
    (TrainConfig, "model", {"d_model": 16}, "model must be ModelConfig, not dict"),
    (CONFIGS["case"], "layers", 1.0, r"layers must be a whole number, not 1\.0 \(float\)"),
    (CONFIGS["case"], "num_negatives", "4", r"num_negatives must be a whole number or None, not '4' \(str\)"),
    (CONFIGS["moel"], "top_k", None, "top_k must be a whole number, not None"),
    (CONFIGS["cem"], "cognition", "yes", r"cognition must be True or False, not 'yes' \(str\)"),
])
def test_what_is_said_of_a_setting_of_a_wrong_type(config, name, wrong, said):
    with pytest.raises(SettingTypeError, match=f"^{said}$"):
        config(**{name: wrong})


def test_a_model_of_numbers_of_numpy_runs():
    settings = {"vocab_size": np.int64(len(tiny_vocabulary())), "d_model": np.int32(16), "ffn": np.uint8(12),
                "layers": np.int64(2), "num_negatives": np.int16(3), "graph_dropout": np.float32(0)}
    torch.manual_seed(0)
    model = build("case", **settings)
    torch.manual_seed(0)
    other = build("case", **{name: value.item() for name, value in settings.items()})
    examples, texts = handmade_examples()
    batches = [make_batch(examples, texts, seed=seed) for seed in (np.int32(7), np.uint64(7), 7)]
    losses = [each(batch).loss for each, batch in zip((model, model, other), batches, strict=True)]
    assert losses[0] == losses[1] == losses[2] and batches[0].seed.dtype == torch.int64
    config = GenerationConfig("sample", np.int64(5), top_k=np.int32(4), seed=np.int64(3))
    assert config == GenerationConfig("sample", 5, top_k=4, seed=3)
    assert generate(model, batches[0], config, np.int64(2)) == generate(other, batches[2], config, 2)
    with pytest.raises(TypeError, match=r"^seed must be a whole number, not 0\.5 \(float\)"):
        make_batch(examples, texts, seed=0.5)


# ---- the pieces


def test_numbers_and_truth_values():
    assert type(whole("n", np.int8(3))) is int and type(number("x", np.float32(0.5))) is float and number("x", 3) == 3
    assert truth("t", np.bool_(True)) is True and plain("text") == "text" and type(plain(np.str_("text"))) is str
    for check, wrong in ((whole, np.True_), (whole, 1.0), (whole, None), (number, True), (number, "1"), (number, X[0, 0]),
                         (truth, 0), (truth, None), (truth, "False")):
        with pytest.raises(TypeError, match="^it must be .*, not "):
            check("it", wrong)


def test_what_a_value_is_in_a_few_words():
    assert told(list(range(1000))) == "list" and len(told("x" * 1000)) < 50 and told(torch.ones(1000)) == "a tensor"


def test_alternatives_of_an_annotation():
    assert not misfit("x", [X, X], Tensor | list[Tensor] | None) and not misfit("x", None, Tensor | None)
    assert misfit("x", 3, Tensor | None) == "x must be a tensor or None, not 3 (int)"
