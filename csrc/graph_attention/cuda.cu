// graph_attention on CUDA: checks, choice of the plan, workspace. Kernels: cuda_kernels.cu, cuda_rows.cuh, cuda_order.cuh.
#include "graph_attention/cuda.h"

#include <cmath>

namespace case_fast::graph_attention {
namespace {

bool served(const case_fast_graph *g) {
    const int64_t most = INT32_MAX - 4096;  // so that a warp may count a little beyond the end
    return g && g->vertices >= 0 && g->vertices < most && g->edges >= 0 && g->edges < most && g->relations >= 0 &&
           g->relations < 65536 && g->heads > 0 && g->heads < 65536 && g->dim > 0 && g->dim <= 256 && g->dtype >= CASE_FAST_F32 &&
           g->dtype <= CASE_FAST_BF16 && (g->index_bits == 32 || g->index_bits == 64) && g->dropout_p >= 0 && g->dropout_p <= 1 &&
           std::isfinite(g->scale) && g->indptr && (g->indices || !g->edges) && (g->relation || !g->relations || !g->edges) &&
           (g->vertices || !g->edges) && g->vertices * g->heads < most * ROW_WARPS;
}

// GRAPHS where the batch is small enough to search; forward gains from shared memory only where rows are read often.
int chosen(const case_fast_graph &g, bool backward, int plan) {
    const bool small = g.vertices <= MOST_SMALL_VERTICES && g.vertices * g.edges <= int64_t(1) << 28;
    if (plan == CASE_FAST_PLAN_ROWS || !small) return CASE_FAST_PLAN_ROWS;
    if (plan == CASE_FAST_PLAN_GRAPHS || backward) return CASE_FAST_PLAN_GRAPHS;
    return g.edges >= 16 * g.vertices ? CASE_FAST_PLAN_GRAPHS : CASE_FAST_PLAN_ROWS;
}

int run(Call call, int plan, size_t workspace_bytes) {
    const case_fast_graph *g = call.g;
    if (!served(g) || plan < CASE_FAST_PLAN_AUTO || plan > CASE_FAST_PLAN_ROWS) return CASE_FAST_BAD_ARGUMENT;
    const bool back = call.pass == BACKWARD;
    const bool rows = call.query && call.key && call.value &&
                      (back ? call.grad_out && call.grad_query && call.grad_key && call.grad_value : call.out != nullptr);
    const bool biases =
        call.relation_query && call.relation_key && (!back || (call.grad_relation_query && call.grad_relation_key));
    if ((g->vertices && !rows) || (g->relations && !biases) || (g->edges && !call.weights)) return CASE_FAST_BAD_ARGUMENT;
    call.path = chosen(*g, back, plan);
    const size_t needed = Workspace(*g, back, call.path).bytes;
    if (needed > workspace_bytes || (needed && !call.workspace)) return CASE_FAST_BAD_ARGUMENT;
    return with_storage(g->dtype, [&](auto like) { return launch_as<decltype(like)>(call); });
}

}  // namespace
}  // namespace case_fast::graph_attention

extern "C" size_t case_fast_graph_attention_workspace_cuda(const case_fast_graph *graph, int backward, int plan) {
    using namespace case_fast::graph_attention;
    return served(graph) ? Workspace(*graph, backward, chosen(*graph, backward, plan)).bytes : 0;
}

extern "C" int case_fast_graph_attention_forward_cuda(const case_fast_graph *graph, const void *query, const void *key,
                                                      const void *value, const void *relation_query, const void *relation_key,
                                                      void *out, void *weights, int plan, void *workspace, size_t workspace_bytes,
                                                      int32_t *flag, void *stream) {
    using namespace case_fast::graph_attention;
    return run({graph, FORWARD, query, key, value, relation_query, relation_key, nullptr, out, weights, nullptr, nullptr, nullptr,
                nullptr, nullptr, 0, workspace, flag, stream},
               plan, workspace_bytes);
}

extern "C" int case_fast_graph_attention_backward_cuda(const case_fast_graph *graph, const void *query, const void *key,
                                                       const void *value, const void *relation_query, const void *relation_key,
                                                       const void *weights, const void *grad_out, void *grad_query,
                                                       void *grad_key, void *grad_value, void *grad_relation_query,
                                                       void *grad_relation_key, int plan, void *workspace, size_t workspace_bytes,
                                                       int32_t *flag, void *stream) {
    using namespace case_fast::graph_attention;
    return run({graph, BACKWARD, query, key, value, relation_query, relation_key, grad_out, nullptr, const_cast<void *>(weights),
                grad_query, grad_key, grad_value, grad_relation_query, grad_relation_key, 0, workspace, flag, stream},
               plan, workspace_bytes);
}
