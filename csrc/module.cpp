// The only file that knows Python: it passes pointers and sizes through and computes nothing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/cuda.h"
#include "common/simd.h"
#include "graph_attention/graph_attention.h"
#ifdef CASE_FAST_WITH_CUDA
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
#endif

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native core of case_fast.";
    module.attr("__version__") = CASE_FAST_VERSION;
    module.attr("simd") = case_fast_simd_name(case_fast_simd_level());
    module.def("report", &report, "How the module was built, and what it finds on this machine now.");

    // Arguments and the status that comes back: graph_attention/graph_attention.h. Positional, for these run every step.
    const py::call_guard<py::gil_scoped_release> unlocked;
    module.def("graph_attention_forward", &graph_attention_forward, unlocked, "On the CPU; addresses of contiguous arrays.");
    module.def("graph_attention_backward", &graph_attention_backward, unlocked, "On the CPU; addresses of contiguous arrays.");
#ifdef CASE_FAST_WITH_CUDA
    module.def("graph_attention_workspace_cuda", &graph_attention_workspace_cuda, unlocked, "Bytes that a call needs beside its arguments.");
    module.def("graph_attention_forward_cuda", &graph_attention_forward_cuda, unlocked, "On the current device, asynchronous.");
    module.def("graph_attention_backward_cuda", &graph_attention_backward_cuda, unlocked, "On the current device, asynchronous.");
#endif
}
