// A call of graph_attention on CUDA on its way from the C interface (cuda.cu) to the kernels of its storage type.
#pragma once

#include "graph_attention/cuda.h"

namespace case_fast {

constexpr int ROW_WARPS = 8;               // a block of the ROWS plan
constexpr int PARTS = 128;                 // of the vertices, at most, that relation gradients are first summed over
constexpr int MOST_SMALL_VERTICES = 4096;  // in a batch, for find_graphs to hold its counts in shared memory
constexpr int WINDOW = 32;                 // vertices: graphs that begin in the same window are worked on together

struct Groups {       // in the workspace
    int count, fits;  // fits: every group is small enough for shared memory
    int start[MOST_SMALL_VERTICES / WINDOW + 1];
};

enum Pass { FORWARD, BACKWARD };

struct Workspace {  // places in it, in bytes
    size_t dscore, row_table, column_table, part, start, cursor, list, groups, bytes = 0;
    int per_part, parts;
    size_t take(size_t size) {
        const size_t here = bytes;
        bytes += (size + 255) / 256 * 256;
        return here;
    }
    Workspace(const case_fast_graph &g, bool backward, int plan) {
        const size_t vertices = g.vertices, edges = g.edges, heads = g.heads, relations = g.relations;
        const size_t number = g.dtype == CASE_FAST_F64 ? 8 : 4;
        per_part = static_cast<int>(vertices / PARTS + 1 > 32 ? vertices / PARTS + 1 : 32);
        parts = static_cast<int>((vertices + per_part - 1) / per_part);
        groups = plan == CASE_FAST_PLAN_GRAPHS ? take(sizeof(Groups)) : 0;
        dscore = row_table = column_table = part = start = cursor = list = 0;
        if (!backward) return;
        dscore = take(edges * heads * number);
        row_table = take(vertices * heads * relations * number);
        column_table = take(vertices * heads * relations * number);
        part = take(2 * relations * heads * g.dim * number * parts);
        if (plan != CASE_FAST_PLAN_ROWS) return;
        start = take((vertices + 1) * sizeof(int));
        cursor = take(vertices * sizeof(int));
        list = take(edges * sizeof(int64_t));
    }
};

struct Call {  // the arguments of either function
    const case_fast_graph *g;
    Pass pass;
    const void *query, *key, *value, *relation_query, *relation_key, *grad_out;
    void *out, *weights, *grad_query, *grad_key, *grad_value, *grad_relation_query, *grad_relation_key;
    int path;  // the plan chosen
    void *workspace;
    int32_t *flag;
    void *stream;
};

// Launch the kernels for a call that was checked; return a case_fast_status.
int launch_f32(const Call &call);
int launch_f64(const Call &call);
int launch_f16(const Call &call);
int launch_bf16(const Call &call);

}  // namespace case_fast
