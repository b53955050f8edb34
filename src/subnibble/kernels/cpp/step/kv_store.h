// Keys and values of sequences: coded, except for the last tokens that the scheme keeps at 16 bits.
//
// Tokens lie in tiles of 32 (kv_form.h) that a pool hands out, so nothing is moved when a sequence grows. Which tokens a
// query sees coded depends on the scheme and on the query's place alone: so a text in one pass and the same text token
// by token give the same result.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "step/kv_form.h"

namespace subnibble {

// How the caches of a model are quantized; see tensor/cache_scheme.py.
struct CacheRules {
    std::int64_t heads, width;
    // kExact: nothing is coded.
    int bits;
    // By token: channels of a group. By channel: tokens of a group of keys; values have groups of as many channels.
    std::int64_t group;
    Axis key_axis;
    // Last tokens that stay at 16 bits.
    std::int64_t window;
    float clip;
    // Whether keys are stored without rotary positions.
    bool before_rope;

    bool coded() const { return bits != kExact; }
    // Whether a query sees tokens that are not coded.
    bool keeps_exact() const { return !coded() || window > 0; }
    // How many of a sequence's first tokens are coded, as its last one sees it.
    std::int64_t coded_tokens(std::int64_t tokens, bool of_keys) const;
    KeyForm key_form(bool exact) const;
    ValueForm value_form(bool exact) const;
};

// The tile of a head among runs of all heads.
template <typename Form>
std::uint8_t* tile_at(const std::vector<std::uint8_t*>& runs, const Form& form, std::int64_t head, std::int64_t tile) {
    return runs[static_cast<std::size_t>(tile / kRunTiles)] + (head * kRunTiles + tile % kRunTiles) * form.tile_bytes();
}

// Runs of tiles of one size, which is that of all heads together.
class TilePool {
   public:
    explicit TilePool(std::int64_t run_bytes) : run_bytes_(run_bytes) {}
    // Zeros.
    std::uint8_t* take();
    void give(std::uint8_t* run) { free_.push_back(run); }
    // Bytes that runs in use take.
    std::int64_t nbytes() const;

   private:
    std::int64_t run_bytes_;
    std::int64_t made_ = 0, room_ = 0;
    std::vector<std::shared_ptr<std::uint8_t>> slabs_;
    std::vector<std::uint8_t*> free_;
};

// The keys or the values of one layer in one sequence, in runs of 256 tokens: null where no token needs them.
struct Side {
    std::vector<std::uint8_t*> coded, exact;
    // First tokens that are coded.
    std::int64_t done = 0;
};

struct LayerTokens {
    Side keys, values;
};

class KvStore;

// One sequence. Its tiles return to the store's pools at its end.
class Sequence {
   public:
    Sequence(KvStore& store, std::int64_t layers);
    ~Sequence();
    Sequence(const Sequence&) = delete;
    Sequence& operator=(const Sequence&) = delete;

    std::int64_t length() const { return length_; }
    LayerTokens& layer(std::int64_t index) { return layers_[static_cast<std::size_t>(index)]; }

    // Make room for `tokens` more tokens.
    void reserve(std::int64_t tokens);
    // They are there, in all layers: tiles at 16 bits that no later query sees are given back.
    void advance(std::int64_t tokens);
    // Keep the first `length` tokens; false, and nothing is changed, if coded ones would have to return to 16 bits.
    bool crop(std::int64_t length);

    // Copy the tokens of one layer out, or in after `reserve` for as many: codes (heads, tokens, width), scales and lows
    // (heads, tokens, groups), by channel (heads, tokens / group, width) of each, and the other tokens,
    // (heads, tokens, width) float16.
    void read(std::int64_t layer, bool of_keys, std::uint8_t* codes, std::uint16_t* scales, std::uint16_t* lows,
              std::uint16_t* exact) const;
    void write(std::int64_t layer, bool of_keys, const std::uint8_t* codes, const std::uint16_t* scales,
               const std::uint16_t* lows, const std::uint16_t* exact);

    // Cosines and sines of tokens length .. length + tokens - 1, (tokens, count) each; only needed if keys are stored
    // without positions.
    void place_angles(const float* cos, const float* sin, std::int64_t tokens, std::int64_t count);
    // Those of a tile: cosines (count, 32), then sines.
    const float* angles(std::int64_t tile) const { return angles_[static_cast<std::size_t>(tile)].data(); }

   private:
    void trim(Side& side, bool of_keys, std::int64_t length);
    // Visit all numbers of one layer; see kv_store.cpp.
    template <typename Coded, typename Scaled, typename Exact>
    void visit(std::int64_t layer, bool of_keys, std::int64_t tokens, Coded coded, Scaled scaled, Exact exact) const;


    KvStore& store_;
    std::vector<LayerTokens> layers_;
    std::vector<std::vector<float>> angles_;
    // Tokens that there is room for.
    std::int64_t length_ = 0, reserved_ = 0;
};

class KvStore {
   public:
    explicit KvStore(const CacheRules& rules);

    const CacheRules& rules() const { return rules_; }
    // Forms of one head; tiles of all heads lie one after the other.
    const KeyForm& keys(bool exact) const { return exact ? exact_keys_ : coded_keys_; }
    const ValueForm& values(bool exact) const { return exact ? exact_values_ : coded_values_; }
    TilePool& pool(bool of_keys, bool exact) {
        return of_keys ? (exact ? exact_key_tiles_ : coded_key_tiles_) : (exact ? exact_value_tiles_ : coded_value_tiles_);
    }
    std::int64_t nbytes() const;

    // Write token `token` of one head: to the tile at 16 bits, or coded if no query sees it otherwise.
    void write_key(LayerTokens& layer, std::int64_t head, std::int64_t token, const float* key, const float* center) const;
    void write_value(LayerTokens& layer, std::int64_t head, std::int64_t token, const float* value) const;
    // Code what is due of one head once a sequence has `tokens` tokens. `done` is set by `Sequence::advance`.
    void code_keys(LayerTokens& layer, std::int64_t head, std::int64_t tokens, const float* center) const;
    void code_values(LayerTokens& layer, std::int64_t head, std::int64_t tokens) const;

   private:
    void code_key(std::uint8_t* tile, std::int64_t lane, const float* key, const float* center) const;
    void code_channels(LayerTokens& layer, std::int64_t head, std::int64_t first) const;
    void code_value(std::uint8_t* tile, std::int64_t lane, const float* value) const;

    CacheRules rules_;
    KeyForm coded_keys_, exact_keys_;
    ValueForm coded_values_, exact_values_;
    TilePool coded_key_tiles_, exact_key_tiles_, coded_value_tiles_, exact_value_tiles_;
};

}  // namespace subnibble
