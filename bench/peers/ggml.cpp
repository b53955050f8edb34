// Products of ggml's quantized matrices, as llama.cpp and ik_llama.cpp run them, for Python's ctypes.
//
// One source for both: IK chooses ik_llama.cpp, whose ggml has no buffer types that repack weights, but a function that
// does. The library links its ggml statically, so that both can be in one process.

#include <cstdint>
#include <cstring>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"
#ifdef IK
#include "iqk/iqk_quantize.h"
#else
#include "ggml-cpu.h"
#endif

namespace {

// Copies of one matrix at different addresses, and their buffer.
struct Weights {
    int64_t columns = 0, rows = 0;
    ggml_context* context = nullptr;
    ggml_backend_buffer_t buffer = nullptr;
    std::vector<ggml_tensor*> copies;
};

// A graph that multiplies the same tokens with each of some copies.
struct Graph {
    ggml_context* context = nullptr;
    ggml_backend_buffer_t buffer = nullptr;
    ggml_backend_t backend = nullptr;
    ggml_cgraph* graph = nullptr;
    ggml_tensor* x = nullptr;
    ggml_tensor* y = nullptr;
};

ggml_context* context_of(size_t tensors) {
    return ggml_init({tensors * ggml_tensor_overhead() + ggml_graph_overhead_custom(tensors + 8, false), nullptr, true});
}

ggml_type type_named(const char* name) {
    for (int type = 0; type < GGML_TYPE_COUNT; ++type)
        if (const char* other = ggml_type_name(ggml_type(type)); other && std::strcmp(other, name) == 0)
            return ggml_type(type);
    return GGML_TYPE_COUNT;
}

ggml_to_float_t to_float(ggml_type type) {
#ifdef IK
    return ggml_internal_get_type_traits(type).to_float;
#else
    return ggml_get_type_traits(type)->to_float;
#endif
}

// ggml would print a line for every copy that it repacks.
void quiet() {
#ifndef IK
    ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
#endif
}

#ifndef IK
// The buffer type in which llama.cpp keeps weights of this type and shape: as llama-model-loader.cpp chooses it.
ggml_backend_buffer_type_t buffer_type(ggml_type type, int64_t columns, int64_t rows) {
    auto device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto registry = ggml_backend_dev_backend_reg(device);
    auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(registry, "ggml_backend_dev_get_extra_bufts"));
    for (auto types = extra ? extra(device) : nullptr; types && *types; ++types) {
        auto context = context_of(4);
        auto weight = ggml_new_tensor_2d(context, type, columns, rows);
        auto product = ggml_mul_mat(context, weight, ggml_new_tensor_2d(context, GGML_TYPE_F32, columns, 512));
        weight->buffer = ggml_backend_buft_alloc_buffer(*types, 0);
        bool fits = ggml_backend_dev_supports_op(device, product);
        ggml_backend_buffer_free(weight->buffer);
        ggml_free(context);
        if (fits)
            return *types;
    }
    return ggml_backend_cpu_buffer_type();
}
#endif

}  // namespace

extern "C" {

// Quantize a dense matrix (rows, columns) to a named type and keep copies of it; null if the type takes no such rows.
//
// dense: the matrix; overwritten by what the quantized one stands for.
// repack: ik_llama.cpp only: interleave rows (its option -rtr). llama.cpp always repacks what it can.
// bytes: gets the size of one copy.
Weights* weights_new(const char* name, int64_t columns, int64_t rows, int copies, int repack, float* dense,
                     int64_t* bytes) {
    quiet();
    auto type = type_named(name);
    if (type == GGML_TYPE_COUNT || columns % ggml_blck_size(type) || !to_float(type))
        return nullptr;
    // ggml's first context fills the tables with which it quantizes.
    auto weights = new Weights{columns, rows, context_of(copies)};
    auto row = ggml_row_size(type, columns);
    std::vector<char> codes(row * rows);
    ggml_quantize_chunk(type, dense, codes.data(), 0, rows, columns, nullptr);
    for (int64_t i = 0; i < rows; ++i)
        to_float(type)(codes.data() + i * row, dense + i * columns, columns);
    *bytes = int64_t(codes.size());
    for (int i = 0; i < copies; ++i)
        weights->copies.push_back(ggml_new_tensor_2d(weights->context, type, columns, rows));
#ifdef IK
    auto backend = ggml_backend_cpu_init();
    weights->buffer = ggml_backend_alloc_ctx_tensors(weights->context, backend);
    ggml_backend_free(backend);
#else
    weights->buffer = ggml_backend_alloc_ctx_tensors_from_buft(weights->context, buffer_type(type, columns, rows));
#endif
    ggml_backend_buffer_set_usage(weights->buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    for (auto copy : weights->copies) {
        ggml_backend_tensor_set(copy, codes.data(), 0, codes.size());
#ifdef IK
        if (repack)
            iqk_repack_tensor(copy);
#endif
    }
    (void)repack;
    return weights;
}

// Name of the buffer type, or of the repacked type: how the matrix is kept.
const char* weights_kept(const Weights* weights) {
#ifdef IK
    return ggml_type_name(weights->copies[0]->type);
#else
    return ggml_backend_buffer_name(weights->buffer);
#endif
}

void weights_free(Weights* weights) {
    ggml_backend_buffer_free(weights->buffer);
    ggml_free(weights->context);
    delete weights;
}

// A graph of products of `tokens` tokens with each of the first copies.
Graph* graph_new(const Weights* weights, int copies, int64_t tokens, int threads) {
    auto graph = new Graph;
    graph->context = context_of(2 * size_t(copies) + 8);
    graph->x = ggml_new_tensor_2d(graph->context, GGML_TYPE_F32, weights->columns, tokens);
    graph->graph = ggml_new_graph_custom(graph->context, 2 * size_t(copies) + 8, false);
    for (int i = 0; i < copies; ++i) {
        graph->y = ggml_mul_mat(graph->context, weights->copies[i], graph->x);
        ggml_build_forward_expand(graph->graph, graph->y);
    }
    graph->backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(graph->backend, threads);
    graph->buffer = ggml_backend_alloc_ctx_tensors(graph->context, graph->backend);
    return graph;
}

float* graph_x(const Graph* graph) { return static_cast<float*>(graph->x->data); }

// The last copy's product.
const float* graph_y(const Graph* graph) { return static_cast<const float*>(graph->y->data); }

int graph_run(const Graph* graph) { return ggml_backend_graph_compute(graph->backend, graph->graph); }

void graph_free(Graph* graph) {
    ggml_backend_buffer_free(graph->buffer);
    ggml_backend_free(graph->backend);
    ggml_free(graph->context);
    delete graph;
}
}
