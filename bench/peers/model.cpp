// Whole models as llama.cpp runs them, for Python's ctypes: a prompt, then greedy decoding.

#include <algorithm>
#include <cstdint>

#include "ggml-cpu.h"
#include "llama.h"

namespace {

struct Model {
    llama_model* model;
    llama_context* context;
};

// The next token by its logits; -1 if `tokens` cannot be decoded.
int32_t next(const Model* model, const int32_t* tokens, int32_t number) {
    if (llama_decode(model->context, llama_batch_get_one(const_cast<int32_t*>(tokens), number)))
        return -1;
    llama_synchronize(model->context);
    auto logits = llama_get_logits_ith(model->context, -1);
    auto words = llama_vocab_n_tokens(llama_model_get_vocab(model->model));
    return int32_t(std::max_element(logits, logits + words) - logits);
}

}  // namespace

extern "C" {

// Write a GGUF file as Q4_0, as llama-quantize does; 0 if it worked.
uint32_t model_quantize(const char* file, const char* out, int threads) {
    llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    auto parameters = llama_model_quantize_default_params();
    parameters.nthread = threads;
    parameters.ftype = LLAMA_FTYPE_MOSTLY_Q4_0;
    parameters.allow_requantize = true;
    return llama_model_quantize(file, out, &parameters);
}

// Load a model for up to `positions` tokens; null if it cannot be loaded.
Model* model_new(const char* file, uint32_t positions, int threads) {
    llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    auto model = llama_model_load_from_file(file, llama_model_default_params());
    if (!model)
        return nullptr;
    auto parameters = llama_context_default_params();
    parameters.n_ctx = positions;
    parameters.n_threads = parameters.n_threads_batch = threads;
    return new Model{model, llama_init_from_model(model, parameters)};
}

// Forget everything, read a prompt and return the next token.
int32_t model_prompt(const Model* model, const int32_t* tokens, int32_t number) {
    llama_memory_clear(llama_get_memory(model->context), true);
    return next(model, tokens, number);
}

// Decode `number` tokens, the first of them from `token`; return the last one.
int32_t model_decode(const Model* model, int32_t token, int32_t number) {
    for (int32_t i = 0; i < number && token >= 0; ++i)
        token = next(model, &token, 1);
    return token;
}

void model_free(Model* model) {
    llama_free(model->context);
    llama_model_free(model->model);
    delete model;
}
}
