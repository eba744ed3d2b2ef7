"""pooled_attention alone; what all ops have in common is in test_families.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import close
from op_cases.pooled_attention import PooledAttention
from op_checks import by_threads, identical

from case_fast.ops import packed_attention, pooled_attention


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_it_is_packed_attention_with_the_rows_for_every_head(runs, dropout_p):
    """And drops the same weights."""
    case = PooledAttention.made([5, 0, 1, 17], heads=3, dim=7, dtype=torch.float64, dropout_p=dropout_p, seed=2**40 + 1)

    def packed(query: torch.Tensor, rows: torch.Tensor, cu: torch.Tensor, scale: float, dropout_p: float, seed: int):
        shared = rows.unsqueeze(1).expand(-1, query.shape[1], -1)
        numbers = {"scale": scale, "dropout_p": dropout_p, "seed": seed}
        return packed_attention(query, shared, shared, torch.arange(len(cu)), cu.long(), **numbers)

    found = case.results()
    assert all(close(x, found[name], 1e-12) for name, x in case.results(packed).items())


def test_it_is_attention_with_keys_and_values_projected(runs):
    """What it stands for in an encoder's last layer: W_key^T q and W_value of the pooled row, for each head."""
    g = torch.Generator().manual_seed(1)
    lengths, heads, width, dim = [4, 1, 9], 2, 6, 3
    rows = torch.randn(sum(lengths), width, generator=g, dtype=torch.float64)
    query = torch.randn(len(lengths), heads, dim, generator=g, dtype=torch.float64)
    w_key, w_value = (torch.randn(heads, dim, width, generator=g, dtype=torch.float64) for _ in range(2))
    cu = torch.tensor([0, *lengths]).cumsum(0)
    key, value = (torch.einsum("tw,hdw->thd", rows, w) for w in (w_key, w_value))
    expected = packed_attention(query, key, value, torch.arange(len(cu)), cu)
    pooled = pooled_attention(torch.einsum("shd,hdw->shw", query, w_key), rows, cu, dim**-0.5)
    assert close(torch.einsum("shw,hdw->shd", pooled, w_value), expected, 1e-12)


@pytest.mark.parametrize("magnitude", [1e3, 1e6, 1e12])
def test_gradients_of_huge_scores_stay_of_the_size_of_grad_out(native, magnitude):
    """The softmax is saturated; what is recomputed in backward is off by the rounding of the scores, and no more."""
    case = PooledAttention.made([7, 20], dim=8, number=3)
    case = replace(case, query=case.query * magnitude**2)
    found = case.results()
    assert found["out"].abs().max() <= case.rows.abs().max() * 1.0001
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_the_bits_do_not_depend_on_threads(native, threads):
    for recipe in PooledAttention.VARIED:
        expected, found = by_threads(PooledAttention.made(**recipe).results, (1, threads))
        assert all(identical(x, expected[name]) for name, x in found.items())


def test_a_sequence_has_the_same_bits_alone_and_among_others(runs):
    case = PooledAttention.made([5, 0, 1, 17, 40], dim=37)
    together = case.results()
    for s, (begin, end) in enumerate(zip(case.cu[:-1].tolist(), case.cu[1:].tolist(), strict=True)):
        alone = replace(case, query=case.query[s : s + 1], rows=case.rows[begin:end], cu=torch.tensor([0, end - begin]),
                        grad_out=case.grad_out[s : s + 1]).results()
        assert identical(alone["out"], together["out"][s : s + 1])
        assert identical(alone["grad_query"], together["grad_query"][s : s + 1])
        assert identical(alone["grad_rows"], together["grad_rows"][begin:end])


def test_queries_by_head_and_rows_apart_are_read_in_place(native, monkeypatch):
    case = PooledAttention.made([5, 8], heads=3, dim=10)
    expected = case.results()
    turned = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in
              (("query", case.query), ("grad_out", case.grad_out))}
    apart = torch.cat([case.rows, case.rows], dim=1)[:, :10]
    made = replace(case, rows=apart, **turned)
    monkeypatch.setattr(PooledAttention.kernels(), "_dense", lambda x: x if x.stride(-1) == 1 else pytest.fail("copied"))
    assert all(identical(x, expected[name]) for name, x in made.results().items())


def test_only_one_number_a_sequence_and_head_is_kept(native):
    case = PooledAttention.made([50, 20], heads=3, dim=40)
    out = case.having({name: x.requires_grad_() for name, x in case.floats().items()}).call()["out"]
    own = {x.data_ptr() for x in case.arguments().values() if isinstance(x, torch.Tensor)} | {out.data_ptr()}
    (lse,) = [x for x in out.grad_fn.saved_tensors if x is not None and x.data_ptr() not in own]
    assert lse.shape == (2, 3)


def test_scale_is_not_guessed():
    case = PooledAttention.made([3])
    with pytest.raises(TypeError, match="scale"):
        pooled_attention(case.query, case.rows, case.cu)
