"""The families of ops, listed once for tests and scorecard. Needs only torch."""

from op_case import Case

from op_cases.bilinear_mim import BilinearMIM
from op_cases.cross_attention import CrossAttention
from op_cases.graph_attention import GraphAttention
from op_cases.linear_cross_entropy import LinearCrossEntropy
from op_cases.packed_attention import PackedAttention

FAMILIES: dict[str, type[Case]] = {
    kind.family: kind for kind in (BilinearMIM, CrossAttention, GraphAttention, LinearCrossEntropy, PackedAttention)
}
