// The only file that knows Python: it passes pointers and sizes through and computes nothing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "bilinear_mim/bilinear_mim.h"
#include "common/cuda.h"
#include "common/simd.h"
#include "cross_attention/cross_attention.h"
#include "graph_attention/graph_attention.h"
#include "vocabulary_loss/vocabulary_loss.h"
#ifdef CASE_FAST_WITH_CUDA
#include "cross_attention/cuda.h"
#include "graph_attention/cuda.h"
#endif

namespace py = pybind11;

static py::dict report() {
    case_fast_cuda_info cuda;
    {
        py::gil_scoped_release release;  // the first call may wait seconds for the CUDA driver
        case_fast_cuda_report(&cuda);
    }
    const int *first = cuda.architectures;
    py::dict out;
    out["version"] = CASE_FAST_VERSION;
    out["simd"] = case_fast_simd_name(case_fast_simd_level());
    out["cuda"] = cuda.compiled != 0;
    out["cuda_architectures"] = std::vector<int>(first, first + cuda.architecture_count);
    out["cuda_runtime"] = std::to_string(cuda.runtime_version / 1000) + "." + std::to_string(cuda.runtime_version % 1000 / 10);
    if (!cuda.compiled) out["cuda_runtime"] = "";
    out["cuda_devices"] = cuda.device_count;
    out["cuda_status"] = cuda.status;
    return out;
}

// Addresses of arrays; 0 stands for an absent one.
using Address = std::uintptr_t;
static void *pointer(Address address) { return reinterpret_cast<void *>(address); }

static int graph_attention_forward(std::int64_t vertices, std::int64_t edges, std::int64_t relations, int heads, int dim, int dtype,
                                   int index_bits, Address indptr, Address indices, Address relation, double scale,
                                   double dropout_p, std::uint64_t seed, Address query, Address key, Address value,
                                   Address relation_query, Address relation_key, Address out, Address weights, int threads) {
    const case_fast_graph graph = {vertices, edges, relations, heads, dim, dtype, index_bits, pointer(indptr), pointer(indices),
                                   pointer(relation), scale, dropout_p, seed};
    return case_fast_graph_attention_forward_cpu(&graph, pointer(query), pointer(key), pointer(value), pointer(relation_query),
                                                 pointer(relation_key), pointer(out), pointer(weights), threads);
}

static int graph_attention_backward(std::int64_t vertices, std::int64_t edges, std::int64_t relations, int heads, int dim, int dtype,
                                    int index_bits, Address indptr, Address indices, Address relation, double scale,
                                    double dropout_p, std::uint64_t seed, Address query, Address key, Address value,
                                    Address relation_query, Address relation_key, Address weights, Address grad_out,
                                    Address grad_query, Address grad_key, Address grad_value, Address grad_relation_query,
                                    Address grad_relation_key, int threads) {
    const case_fast_graph graph = {vertices, edges, relations, heads, dim, dtype, index_bits, pointer(indptr), pointer(indices),
                                   pointer(relation), scale, dropout_p, seed};
    return case_fast_graph_attention_backward_cpu(&graph, pointer(query), pointer(key), pointer(value), pointer(relation_query),
                                                  pointer(relation_key), pointer(weights), pointer(grad_out), pointer(grad_query),
                                                  pointer(grad_key), pointer(grad_value), pointer(grad_relation_query),
                                                  pointer(grad_relation_key), threads);
}

static int packed_attention_forward(std::int64_t batch, std::int64_t queries, std::int64_t key_sequences, std::int64_t keys, int heads,
                                    int dim, int dtype, int index_bits, int causal, Address cu_query, Address cu_key, Address key_of,
                                    Address key_length, std::int64_t query_stride, std::int64_t key_stride, std::int64_t value_stride,
                                    double scale, double dropout_p, std::uint64_t seed, Address query, Address key, Address value,
                                    Address out, Address lse, int threads) {
    const case_fast_attention call = {batch, queries, key_sequences, keys, heads, dim, dtype, index_bits, causal, pointer(cu_query),
                                      pointer(cu_key), pointer(key_of), pointer(key_length), query_stride, key_stride, value_stride,
                                      scale, dropout_p, seed};
    return case_fast_packed_attention_forward_cpu(&call, pointer(query), pointer(key), pointer(value), pointer(out), pointer(lse),
                                                  threads);
}

static int packed_attention_backward(std::int64_t batch, std::int64_t queries, std::int64_t key_sequences, std::int64_t keys, int heads,
                                     int dim, int dtype, int index_bits, int causal, Address cu_query, Address cu_key, Address key_of,
                                     Address key_length, std::int64_t query_stride, std::int64_t key_stride, std::int64_t value_stride,
                                     double scale, double dropout_p, std::uint64_t seed, Address query, Address key, Address value,
                                     Address out, Address lse, Address grad_out, Address grad_query, std::int64_t grad_query_stride,
                                     Address grad_key, std::int64_t grad_key_stride, Address grad_value,
                                     std::int64_t grad_value_stride, int threads) {
    const case_fast_attention call = {batch, queries, key_sequences, keys, heads, dim, dtype, index_bits, causal, pointer(cu_query),
                                      pointer(cu_key), pointer(key_of), pointer(key_length), query_stride, key_stride, value_stride,
                                      scale, dropout_p, seed};
    return case_fast_packed_attention_backward_cpu(&call, pointer(query), pointer(key), pointer(value), pointer(out), pointer(lse),
                                                   pointer(grad_out), pointer(grad_query), grad_query_stride, pointer(grad_key),
                                                   grad_key_stride, pointer(grad_value), grad_value_stride, threads);
}

// The members of case_fast_source in their order: sizes, strides, addresses, seeds. Of case_fast_source_gradients: addresses.
using SourceMembers = std::array<std::int64_t, 15>;
using GradientMembers = std::array<Address, 6>;

static std::vector<case_fast_source> sources_of(const std::vector<SourceMembers> &all) {
    std::vector<case_fast_source> out;
    for (const SourceMembers &m : all) {
        const auto array = [&m](int i) { return pointer(static_cast<Address>(m[static_cast<std::size_t>(i)])); };
        out.push_back({m[0], m[1], m[2], m[3], array(4), array(5), array(6), array(7), array(8), array(9), array(10), array(11), array(12),
                       static_cast<std::uint64_t>(m[13]), static_cast<std::uint64_t>(m[14])});
    }
    return out;
}

static std::int64_t cross_attention_saved(std::int64_t batch, std::int64_t rows, int sources, int width, int heads, int dim) {
    const case_fast_cross_attention call = {batch, rows, sources, width, heads, dim, 0, 64, nullptr, 0, 0, 0};
    return case_fast_cross_attention_saved(&call);
}

static int cross_attention_forward(std::int64_t batch, std::int64_t rows, int width, int heads, int dim, int dtype, int index_bits,
                                   Address cu_hidden, double eps, double dropout_p, double output_dropout_p,
                                   const std::vector<SourceMembers> &sources, Address hidden, Address out, Address saved, int threads) {
    const case_fast_cross_attention call = {batch, rows, static_cast<std::int32_t>(sources.size()), width, heads, dim, dtype, index_bits,
                                            pointer(cu_hidden), eps, dropout_p, output_dropout_p};
    return case_fast_cross_attention_forward_cpu(&call, sources_of(sources).data(), pointer(hidden), pointer(out), pointer(saved), threads);
}

static int cross_attention_backward(std::int64_t batch, std::int64_t rows, int width, int heads, int dim, int dtype, int index_bits,
                                    Address cu_hidden, double eps, double dropout_p, double output_dropout_p,
                                    const std::vector<SourceMembers> &sources, Address saved, Address grad_out, Address grad_hidden,
                                    const std::vector<GradientMembers> &gradients, int threads) {
    const case_fast_cross_attention call = {batch, rows, static_cast<std::int32_t>(sources.size()), width, heads, dim, dtype, index_bits,
                                            pointer(cu_hidden), eps, dropout_p, output_dropout_p};
    if (gradients.size() != sources.size()) return CASE_FAST_BAD_ARGUMENT;
    std::vector<case_fast_source_gradients> into;
    for (const GradientMembers &g : gradients)
        into.push_back({pointer(g[0]), pointer(g[1]), pointer(g[2]), pointer(g[3]), pointer(g[4]), pointer(g[5])});
    return case_fast_cross_attention_backward_cpu(&call, sources_of(sources).data(), pointer(saved), pointer(grad_out),
                                                  pointer(grad_hidden), into.data(), threads);
}

#ifdef CASE_FAST_WITH_CUDA
static std::size_t graph_attention_workspace_cuda(std::int64_t vertices, std::int64_t edges, std::int64_t relations, int heads,
                                                  int dim, int dtype, int index_bits, Address indptr, Address indices,
                                                  Address relation, double scale, double dropout_p, std::uint64_t seed,
                                                  bool backward, int plan) {
    const case_fast_graph graph = {vertices, edges, relations, heads, dim, dtype, index_bits, pointer(indptr), pointer(indices),
                                   pointer(relation), scale, dropout_p, seed};
    return case_fast_graph_attention_workspace_cuda(&graph, backward, plan);
}

static int graph_attention_forward_cuda(std::int64_t vertices, std::int64_t edges, std::int64_t relations, int heads, int dim, int dtype,
                                    int index_bits, Address indptr, Address indices, Address relation, double scale,
                                    double dropout_p, std::uint64_t seed, Address query, Address key, Address value,
                                    Address relation_query, Address relation_key, Address out, Address weights, int plan,
                                    Address workspace, std::size_t workspace_bytes, Address flag, Address stream) {
    const case_fast_graph graph = {vertices, edges, relations, heads, dim, dtype, index_bits, pointer(indptr), pointer(indices),
                                   pointer(relation), scale, dropout_p, seed};
    return case_fast_graph_attention_forward_cuda(&graph, pointer(query), pointer(key), pointer(value), pointer(relation_query),
                                                  pointer(relation_key), pointer(out), pointer(weights), plan, pointer(workspace),
                                                  workspace_bytes, static_cast<std::int32_t *>(pointer(flag)), pointer(stream));
}

static int graph_attention_backward_cuda(std::int64_t vertices, std::int64_t edges, std::int64_t relations, int heads, int dim, int dtype,
                                    int index_bits, Address indptr, Address indices, Address relation, double scale,
                                    double dropout_p, std::uint64_t seed, Address query, Address key, Address value,
                                    Address relation_query, Address relation_key, Address weights, Address grad_out,
                                    Address grad_query, Address grad_key, Address grad_value, Address grad_relation_query,
                                    Address grad_relation_key, int plan, Address workspace, std::size_t workspace_bytes,
                                    Address flag, Address stream) {
    const case_fast_graph graph = {vertices, edges, relations, heads, dim, dtype, index_bits, pointer(indptr), pointer(indices),
                                   pointer(relation), scale, dropout_p, seed};
    return case_fast_graph_attention_backward_cuda(
        &graph, pointer(query), pointer(key), pointer(value), pointer(relation_query), pointer(relation_key), pointer(weights),
        pointer(grad_out), pointer(grad_query), pointer(grad_key), pointer(grad_value), pointer(grad_relation_query),
        pointer(grad_relation_key), plan, pointer(workspace), workspace_bytes, static_cast<std::int32_t *>(pointer(flag)),
        pointer(stream));
}

static std::size_t packed_attention_workspace_cuda(std::int64_t batch, std::int64_t queries, std::int64_t key_sequences,
                                                   std::int64_t keys, int heads, int dim, int dtype, int index_bits, int causal,
                                                   Address cu_query, Address cu_key, Address key_of, Address key_length,
                                                   std::int64_t query_stride, std::int64_t key_stride, std::int64_t value_stride,
                                                   double scale, double dropout_p, std::uint64_t seed, bool backward) {
    const case_fast_attention call = {batch, queries, key_sequences, keys, heads, dim, dtype, index_bits, causal, pointer(cu_query),
                                      pointer(cu_key), pointer(key_of), pointer(key_length), query_stride, key_stride, value_stride,
                                      scale, dropout_p, seed};
    return case_fast_packed_attention_workspace_cuda(&call, backward);
}

static int packed_attention_forward_cuda(std::int64_t batch, std::int64_t queries, std::int64_t key_sequences, std::int64_t keys,
                                         int heads, int dim, int dtype, int index_bits, int causal, Address cu_query, Address cu_key,
                                         Address key_of, Address key_length, std::int64_t query_stride, std::int64_t key_stride,
                                         std::int64_t value_stride, double scale, double dropout_p, std::uint64_t seed, Address query,
                                         Address key, Address value, Address out, Address lse, int plan, Address workspace,
                                         std::size_t workspace_bytes, Address flag, Address stream) {
    const case_fast_attention call = {batch, queries, key_sequences, keys, heads, dim, dtype, index_bits, causal, pointer(cu_query),
                                      pointer(cu_key), pointer(key_of), pointer(key_length), query_stride, key_stride, value_stride,
                                      scale, dropout_p, seed};
    return case_fast_packed_attention_forward_cuda(&call, pointer(query), pointer(key), pointer(value), pointer(out), pointer(lse), plan,
                                                   pointer(workspace), workspace_bytes, static_cast<std::int32_t *>(pointer(flag)),
                                                   pointer(stream));
}

static int packed_attention_backward_cuda(std::int64_t batch, std::int64_t queries, std::int64_t key_sequences, std::int64_t keys,
                                          int heads, int dim, int dtype, int index_bits, int causal, Address cu_query, Address cu_key,
                                          Address key_of, Address key_length, std::int64_t query_stride, std::int64_t key_stride,
                                          std::int64_t value_stride, double scale, double dropout_p, std::uint64_t seed,
                                          Address query, Address key, Address value, Address out, Address lse, Address grad_out,
                                          Address grad_query, std::int64_t grad_query_stride, Address grad_key,
                                          std::int64_t grad_key_stride, Address grad_value, std::int64_t grad_value_stride,
                                          Address workspace, std::size_t workspace_bytes, Address flag, Address stream) {
    const case_fast_attention call = {batch, queries, key_sequences, keys, heads, dim, dtype, index_bits, causal, pointer(cu_query),
                                      pointer(cu_key), pointer(key_of), pointer(key_length), query_stride, key_stride, value_stride,
                                      scale, dropout_p, seed};
    return case_fast_packed_attention_backward_cuda(&call, pointer(query), pointer(key), pointer(value), pointer(out), pointer(lse),
                                                    pointer(grad_out), pointer(grad_query), grad_query_stride, pointer(grad_key),
                                                    grad_key_stride, pointer(grad_value), grad_value_stride, pointer(workspace),
                                                    workspace_bytes, static_cast<std::int32_t *>(pointer(flag)), pointer(stream));
}

static std::size_t cross_attention_workspace_cuda(std::int64_t batch, std::int64_t rows, int width, int heads, int dim, int dtype,
                                                  int index_bits, Address cu_hidden, double eps, double dropout_p,
                                                  double output_dropout_p, const std::vector<SourceMembers> &sources) {
    const case_fast_cross_attention call = {batch, rows, static_cast<std::int32_t>(sources.size()), width, heads, dim, dtype, index_bits,
                                            pointer(cu_hidden), eps, dropout_p, output_dropout_p};
    return case_fast_cross_attention_workspace_cuda(&call);
}

static int cross_attention_forward_cuda(std::int64_t batch, std::int64_t rows, int width, int heads, int dim, int dtype, int index_bits,
                                        Address cu_hidden, double eps, double dropout_p, double output_dropout_p,
                                        const std::vector<SourceMembers> &sources, Address hidden, Address out, Address workspace,
                                        std::size_t workspace_bytes, Address flag, Address stream) {
    const case_fast_cross_attention call = {batch, rows, static_cast<std::int32_t>(sources.size()), width, heads, dim, dtype, index_bits,
                                            pointer(cu_hidden), eps, dropout_p, output_dropout_p};
    return case_fast_cross_attention_forward_cuda(&call, sources_of(sources).data(), pointer(hidden), pointer(out), pointer(workspace),
                                                  workspace_bytes, static_cast<std::int32_t *>(pointer(flag)), pointer(stream));
}

static int cross_attention_drop_cuda(std::int64_t count, int dtype, double output_dropout_p, std::uint64_t output_seed, Address from,
                                     Address base, Address to, Address stream) {
    return case_fast_cross_attention_drop_cuda(count, dtype, output_dropout_p, output_seed, pointer(from), pointer(base), pointer(to),
                                               pointer(stream));
}
#endif

static std::int64_t bilinear_mim_saved(std::int64_t pairs, std::int64_t rows, int dim, int dtype, int score, std::int64_t negatives,
                                       Address positive, std::uint64_t seed) {
    const case_fast_mim mim = {pairs, rows, dim, dtype, score, negatives, static_cast<std::int64_t *>(pointer(positive)), seed,
                              CASE_FAST_MIM_AUTO};
    return case_fast_bilinear_mim_saved(&mim);
}

static int bilinear_mim_forward(std::int64_t pairs, std::int64_t rows, int dim, int dtype, int score, std::int64_t negatives,
                                Address positive, std::uint64_t seed, Address x, Address y, Address weight, Address side_y,
                                Address side_x, Address logit, Address saved, int threads) {
    const case_fast_mim mim = {pairs, rows, dim, dtype, score, negatives, static_cast<std::int64_t *>(pointer(positive)), seed,
                              CASE_FAST_MIM_AUTO};
    return case_fast_bilinear_mim_forward_cpu(&mim, pointer(x), pointer(y), pointer(weight), pointer(side_y), pointer(side_x),
                                              pointer(logit), pointer(saved), threads);
}

static int bilinear_mim_backward(std::int64_t pairs, std::int64_t rows, int dim, int dtype, int score, std::int64_t negatives,
                                 Address positive, std::uint64_t seed, Address x, Address y, Address weight, Address saved,
                                 Address grad_side_y, Address grad_side_x, Address grad_x, Address grad_y, Address grad_weight,
                                 int threads) {
    const case_fast_mim mim = {pairs, rows, dim, dtype, score, negatives, static_cast<std::int64_t *>(pointer(positive)), seed,
                              CASE_FAST_MIM_AUTO};
    return case_fast_bilinear_mim_backward_cpu(&mim, pointer(x), pointer(y), pointer(weight), pointer(saved), pointer(grad_side_y),
                                               pointer(grad_side_x), pointer(grad_x), pointer(grad_y), pointer(grad_weight), threads);
}

static int linear_cross_entropy_forward(std::int64_t rows, std::int64_t vocabulary, std::int64_t targets, int dim, int dtype,
                                        int index_bits, Address target, Address cu_target, Address hidden, Address weight,
                                        Address bias, Address nll, Address prediction, Address state, Address kept, int threads) {
    const case_fast_vocabulary call = {rows, vocabulary, targets, dim, dtype, index_bits, pointer(target), pointer(cu_target)};
    return case_fast_vocabulary_loss_forward_cpu(&call, pointer(hidden), pointer(weight), pointer(bias), pointer(nll),
                                                 static_cast<std::int64_t *>(pointer(prediction)), pointer(state), pointer(kept),
                                                 threads);
}

static int linear_cross_entropy_backward(std::int64_t rows, std::int64_t vocabulary, std::int64_t targets, int dim, int dtype,
                                         int index_bits, Address target, Address cu_target, Address hidden, Address weight,
                                         Address bias, Address state, Address kept, Address grad_nll, Address grad_hidden,
                                         Address grad_weight, Address grad_bias, int threads) {
    const case_fast_vocabulary call = {rows, vocabulary, targets, dim, dtype, index_bits, pointer(target), pointer(cu_target)};
    return case_fast_vocabulary_loss_backward_cpu(&call, pointer(hidden), pointer(weight), pointer(bias), pointer(state),
                                                  pointer(kept), pointer(grad_nll), pointer(grad_hidden), pointer(grad_weight),
                                                  pointer(grad_bias), threads);
}

static int top_words(std::int64_t rows, std::int64_t vocabulary, std::int64_t k, int dim, int dtype, Address hidden, Address weight,
                     Address bias, Address log_probability, Address word, int threads) {
    return case_fast_vocabulary_top_cpu(rows, vocabulary, k, dim, dtype, pointer(hidden), pointer(weight), pointer(bias),
                                        pointer(log_probability), static_cast<std::int64_t *>(pointer(word)), threads);
}

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native core of case_fast.";
    module.attr("__version__") = CASE_FAST_VERSION;
    module.attr("simd") = case_fast_simd_name(case_fast_simd_level());
    module.def("report", &report, "How the module was built, and what it finds on this machine now.");

    // Arguments and the status that comes back: the header of each family. Positional, for these run every step.
    const py::call_guard<py::gil_scoped_release> unlocked;
    module.def("graph_attention_forward", &graph_attention_forward, unlocked, "On the CPU; addresses of contiguous arrays.");
    module.def("graph_attention_backward", &graph_attention_backward, unlocked, "On the CPU; addresses of contiguous arrays.");
    module.def("bilinear_mim_saved", &bilinear_mim_saved, "Elements that forward keeps for backward.");
    module.def("bilinear_mim_forward", &bilinear_mim_forward, unlocked, "On the CPU; addresses of contiguous arrays.");
    module.def("bilinear_mim_backward", &bilinear_mim_backward, unlocked, "On the CPU; addresses of contiguous arrays.");
    module.def("packed_attention_forward", &packed_attention_forward, unlocked, "On the CPU; addresses of arrays.");
    module.def("packed_attention_backward", &packed_attention_backward, unlocked, "On the CPU; addresses of arrays.");
    module.def("cross_attention_saved", &cross_attention_saved, "Elements that backward needs from forward.");
    module.def("cross_attention_forward", &cross_attention_forward, unlocked, "On the CPU; addresses of arrays.");
    module.def("cross_attention_backward", &cross_attention_backward, unlocked, "On the CPU; addresses of arrays.");
    module.def("linear_cross_entropy_forward", &linear_cross_entropy_forward, unlocked, "On the CPU; addresses of contiguous arrays.");
    module.def("linear_cross_entropy_backward", &linear_cross_entropy_backward, unlocked, "On the CPU; addresses of contiguous arrays.");
    module.def("top_words", &top_words, unlocked, "On the CPU; addresses of contiguous arrays.");
#ifdef CASE_FAST_WITH_CUDA
    module.def("graph_attention_workspace_cuda", &graph_attention_workspace_cuda, unlocked, "Bytes that a call needs beside its arguments.");
    module.def("graph_attention_forward_cuda", &graph_attention_forward_cuda, unlocked, "On the current device, asynchronous.");
    module.def("graph_attention_backward_cuda", &graph_attention_backward_cuda, unlocked, "On the current device, asynchronous.");
    module.def("packed_attention_workspace_cuda", &packed_attention_workspace_cuda, unlocked, "Bytes that a call needs beside its arguments.");
    module.def("packed_attention_forward_cuda", &packed_attention_forward_cuda, unlocked, "On the current device, asynchronous.");
    module.def("packed_attention_backward_cuda", &packed_attention_backward_cuda, unlocked, "On the current device, asynchronous.");
    module.def("cross_attention_workspace_cuda", &cross_attention_workspace_cuda, unlocked, "Bytes that a call needs beside its arguments.");
    module.def("cross_attention_forward_cuda", &cross_attention_forward_cuda, unlocked, "On the current device, asynchronous.");
    module.def("cross_attention_drop_cuda", &cross_attention_drop_cuda, unlocked, "On the current device, asynchronous.");
#endif
}
