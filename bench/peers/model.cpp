// Whole models as llama.cpp and ik_llama.cpp run them, for Python's ctypes: a prompt, then decoding.
//
// One source for both: IK chooses ik_llama.cpp, whose interface is that of an older llama.cpp.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "llama.h"

namespace {

// Tokens that one call reads: the largest batch that the programs do not split (their default `n_ubatch`).
constexpr int32_t CHUNK = 512;

struct Model {
    llama_model* model;
    llama_context* context;
    // Tokens in the KV cache.
    int32_t length;
    int32_t words;
};

void quiet() {
    llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
}

// The type of a name of ggml, GGML_TYPE_COUNT for "".
ggml_type type_named(const char* name) {
    for (int type = 0; type < GGML_TYPE_COUNT; ++type)
        if (auto other = ggml_type_name(ggml_type(type)); other && std::strcmp(other, name) == 0)
            return ggml_type(type);
    return GGML_TYPE_COUNT;
}

// Append tokens; the logits after the last one, null if they cannot be decoded.
const float* append(Model* model, const int32_t* tokens, int32_t number) {
    for (int32_t start = 0; start < number; start += CHUNK) {
        auto part = const_cast<int32_t*>(tokens + start);
        auto count = std::min(CHUNK, number - start);
#ifdef IK
        auto batch = llama_batch_get_one(part, count, model->length, 0);
#else
        auto batch = llama_batch_get_one(part, count);
#endif
        if (llama_decode(model->context, batch))
            return nullptr;
        model->length += count;
    }
    llama_synchronize(model->context);
    return llama_get_logits_ith(model->context, -1);
}

int32_t most_likely(const Model* model, const float* logits) {
    return logits ? int32_t(std::max_element(logits, logits + model->words) - logits) : -1;
}

}  // namespace

extern "C" {

// Write a GGUF file in a type of llama-quantize; 0 if it worked.
//
// type: number of a `llama_ftype`.
// head: name of the type of embedding and head; "" for what llama-quantize mixes by itself, else all other matrices
//   have the type alone.
uint32_t model_quantize(const char* file, const char* out, int threads, int type, const char* head) {
    quiet();
    auto parameters = llama_model_quantize_default_params();
    parameters.nthread = threads;
    parameters.ftype = llama_ftype(type);
    parameters.allow_requantize = true;
    parameters.pure = *head != 0;
    parameters.output_tensor_type = parameters.token_embedding_type = type_named(head);
    return llama_model_quantize(file, out, &parameters);
}

// Load a model for up to `positions` tokens; null if it cannot be loaded. repack: ik_llama.cpp's option -rtr.
Model* model_new(const char* file, uint32_t positions, int threads, int repack) {
    quiet();
    auto options = llama_model_default_params();
#ifdef IK
    options.repack_tensors = repack;
    options.use_mmap = !repack;
#endif
    (void)repack;
    auto model = llama_model_load_from_file(file, options);
    if (!model)
        return nullptr;
    auto parameters = llama_context_default_params();
    parameters.n_ctx = positions;
    parameters.n_threads = parameters.n_threads_batch = threads;
#ifdef IK
    auto words = llama_n_vocab(model);
#else
    auto words = llama_vocab_n_tokens(llama_model_get_vocab(model));
#endif
    return new Model{model, llama_init_from_model(model, parameters), 0, words};
}

// Forget everything, read a prompt and return the next token, -1 if it cannot be read.
int32_t model_prompt(Model* model, const int32_t* tokens, int32_t number) {
#ifdef IK
    llama_kv_cache_clear(model->context);
#else
    llama_memory_clear(llama_get_memory(model->context), true);
#endif
    model->length = 0;
    return most_likely(model, append(model, tokens, number));
}

// Decode `number` tokens greedily, the first of them from `token`; return the last one, -1 if that fails.
int32_t model_decode(Model* model, int32_t token, int32_t number) {
    for (int32_t i = 0; i < number && token >= 0; ++i)
        token = most_likely(model, append(model, &token, 1));
    return token;
}

// Append a text token by token; the mean loss of all but the first token, each after those before it; NaN if it fails.
double model_loss(Model* model, const int32_t* tokens, int32_t number) {
    double sum = 0;
    for (int32_t i = 0; i + 1 < number; ++i) {
        auto logits = append(model, tokens + i, 1);
        if (!logits)
            return NAN;
        double most = *std::max_element(logits, logits + model->words), total = 0;
        for (int32_t word = 0; word < model->words; ++word)
            total += std::exp(logits[word] - most);
        sum += most + std::log(total) - logits[tokens[i + 1]];
    }
    return sum / (number - 1);
}

void model_free(Model* model) {
    llama_free(model->context);
#ifdef IK
    llama_free_model(model->model);
#else
    llama_model_free(model->model);
#endif
    delete model;
}
}
