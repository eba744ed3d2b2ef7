// What cuda.cu hands to the kernels, which are compiled once per storage type: cuda_kernels.cu.
#pragma once

#include "common/launch.cuh"
#include "graph_attention/graph_attention.h"

namespace case_fast::graph_attention {

constexpr int ROW_WARPS = 8;               // a block of the ROWS plan
constexpr int PARTS = 128;                 // of the vertices, at most, that relation gradients are first summed over
constexpr int MOST_SMALL_VERTICES = 4096;  // in a batch, for find_graphs to hold its counts in shared memory
constexpr int WINDOW = 32;                 // vertices: graphs that begin in the same window are worked on together

struct Groups {       // in the workspace
    int count, fits;  // fits: every group is small enough for shared memory
    int start[MOST_SMALL_VERTICES / WINDOW + 1];
};

enum Pass { FORWARD, BACKWARD };

struct Workspace : Places {
    size_t dscore, row_table, column_table, part, start, cursor, list, groups;
    int per_part, parts;
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

// Launches the kernels of a call that was checked; a case_fast_status. cuda_kernels.cu, compiled once per storage type T.
template <class T> int launch_as(const Call &call);

}  // namespace case_fast::graph_attention
