// A whole decoder: embeds tokens, runs all layers and the head. One call is one parallel region.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "step/attention.h"
#include "step/kv_store.h"
#include "step/site.h"

namespace subnibble {

// A norm of `width` channels. bias: null for none.
struct NormTerms {
    const float* gain = nullptr;
    const float* bias = nullptr;
    float eps = 0;
};

// A linear among the readers of a tensor's sites.
struct Place {
    std::size_t site, reader;
};

// A tensor of a layer: linears that take different steps on it are in different sites.
struct Tensor {
    std::vector<std::unique_ptr<Site>> sites;
};

struct Layer {
    NormTerms attention_norm, mlp_norm;
    // Norms of each head of queries and keys; gain null for none.
    NormTerms query_norm, key_norm;
    Tensor attention_in, attention_out, mlp_in, mlp_hidden;
    // Readers of attention_in and of mlp_in. The two other tensors have one reader each.
    Place query, key, value, gate, up;
    AttentionLayer attention;
};

// Rows of the embedding as float32: packed ranges of columns, or a dense table.
struct Table {
    std::int64_t rows, width;
    std::vector<Matrix> ranges;
    const void* dense = nullptr;
    Number dense_type = Number::float32;
};

// What all layers share.
struct DecoderForm {
    std::int64_t width, query_heads;
    // Rotated channels / 2.
    std::int64_t angles;
    // Factor of scores.
    float scaling;
    Gate gate;
    CacheRules cache;
    // Of queries and keys, for each head; empty for none.
    std::vector<HadamardRun> head_rotation;
    std::int64_t prefix_tokens;
};

// Tokens that one call appends to a sequence.
struct Append {
    Sequence* sequence;
    std::vector<std::int64_t> ids;
    // Logits after each token, or after the last one only.
    bool all_logits;
};

class Decoder {
   public:
    Decoder(const Kernel& kernel, const DecoderForm& form, Table table, std::vector<Layer> layers, NormTerms final_norm,
            std::unique_ptr<Site> head);

    // (d, widest block) float32 with the widths of blocks: multiplies the head's input; see modules.HeadInputMatrix.
    void set_head_input(const float* matrix, std::vector<std::int64_t> widths);
    // Cosines and sines, (positions, angles) each, which must live on.
    void set_angles(const float* cos, const float* sin, std::int64_t positions);
    // Keys and values of the prefix in a layer, (heads, prefix tokens, width) float32 each, keys as queries see them.
    void set_prefix(std::int64_t layer, const float* keys, const float* values);

    KvStore& store() { return store_; }
    std::int64_t layers() const { return static_cast<std::int64_t>(layers_.size()); }

    // Append tokens to sequences and write logits, (rows, vocabulary) float32: of each sequence its tokens' in order.
    // A sequence occurs once. stops: asked between passes; if it says true, the call ends with false, and sequences
    // hold what was appended so far.
    bool forward(const std::vector<Append>& appends, std::int64_t threads, float* logits,
                 const std::function<bool()>& stops);

   private:
    // Rows of one pass, and which of them get logits.
    struct Pass {
        std::vector<Stretch> stretches;
        std::vector<std::int64_t> ids, positions;
        // Row, and place among the call's logits.
        std::vector<std::pair<std::int64_t, std::int64_t>> logits;
    };
    void check(const std::vector<Append>& appends) const;
    void reserve(std::int64_t tokens, std::int64_t threads);
    void reserve_sites(Tensor& tensor, const Tensor* before);
    void run(const Pass& pass, std::int64_t threads, float* logits);
    void embed(const Pass& pass);
    void run_layer(const Team& team, const Pass& pass, std::int64_t index);
    void run_heads(const Team& team, const Pass& pass, std::int64_t index);
    void run_head(const Team& team, const Pass& pass, float* logits);
    void rotate(const float* cos, const float* sin, float* head) const;
    void enter_normed(const Team& team, const NormTerms& norm, Tensor& tensor, std::int64_t tokens, float* room);
    void multiply_input(const float* x, float* y) const;

    const Kernel& kernel_;
    const StepFunctions& functions_;
    DecoderForm form_;
    Table table_;
    KvStore store_;
    std::vector<Layer> layers_;
    NormTerms final_norm_;
    std::unique_ptr<Site> head_;
    const float* head_matrix_ = nullptr;
    std::vector<std::int64_t> head_widths_;
    const float *cos_ = nullptr, *sin_ = nullptr;
    std::int64_t positions_ = 0;
    std::vector<Aligned<std::uint8_t>> prefix_tiles_;
    Attention attention_;

    std::int64_t room_ = 0;
    std::vector<Scratch> scratch_;
    // What the readers of one tensor give: nothing else needs it by the time the next tensor is multiplied.
    Aligned<float> results_;
    // (tokens, width); (tokens, query heads, width of a head); likewise; (tokens, gate's rows).
    Aligned<float> hidden_, queries_, attended_, gated_;
};

}  // namespace subnibble
