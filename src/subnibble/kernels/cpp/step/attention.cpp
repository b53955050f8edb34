#include "step/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace subnibble {

namespace {

// Queries that share what is read of a tile.
constexpr std::int64_t kRows = 24;
// From this many rows on, a tile is made float32 once for all of them.
constexpr std::int64_t kManyRows = 9;
constexpr float kNone = -std::numeric_limits<float>::infinity();

// Tiles from `tile` on, where they were handed out.
template <typename Form>
Next next_of(const Form& form, const std::vector<std::uint8_t*>& runs, std::int64_t head, std::int64_t tile) {
    const auto run = static_cast<std::size_t>(tile / kRunTiles);
    if (run >= runs.size() || runs[run] == nullptr) return {};
    return {tile_at(runs, form, head, tile), form.tile_bytes()};
}

}  // namespace

// Memory of one unit of work.
struct Attention::Work {
    // (rows, room), padded with zeros; (rows, columns) twice; (width, 32); (32, room).
    float *q, *scores, *exact, *keys, *values;
    // Tokens that a range may have: scores of a row.
    std::int64_t columns;
    // Keys of the next unit of one range.
    Next next;
};

Attention::Attention(const StepFunctions& functions, KvStore& store, std::int64_t repeats, std::int64_t angles,
                     std::int64_t prefix_tokens)
    : functions_(functions), store_(store), repeats_(repeats), angles_(angles), width_(store.rules().width),
      room_(padded(width_, 16)), prefix_tokens_(prefix_tokens), prefix_tiles_((prefix_tokens + kTokens - 1) / kTokens) {}

std::int64_t Attention::scratch_numbers() const {
    const std::int64_t rows = std::max(kRows, repeats_), columns = kTokens * std::max(kRunTiles, prefix_tiles_);
    const std::int64_t of_row = room_ + 2 * columns + 2 * (room_ + 32);
    return rows * of_row + 2 * kTokens * room_;
}

void Attention::begin(const std::vector<Stretch>& stretches) {
    stretches_ = stretches;
    units_.clear();
    merged_.clear();
    partial_count_ = 0;
    const std::int64_t heads = store_.rules().heads, block = std::max<std::int64_t>(1, kRows / repeats_);
    for (std::size_t s = 0; s < stretches_.size(); ++s) {
        const Stretch& stretch = stretches_[s];
        const std::int64_t first = prefix_tiles_ > 0 ? 0 : 1;
        if (stretch.count == 1) {
            const std::int64_t last = 1 + stretch.start / (kRunTiles * kTokens) + 1, ranges = last - first;
            // Heads of one range lie side by side.
            for (std::int64_t range = first; range < last; ++range)
                for (std::int64_t head = 0; head < heads; ++head) {
                    const std::int64_t partial = partial_count_ + head * ranges + range - first;
                    units_.push_back({s, head, 0, 1, range, range + 1, ranges > 1 ? partial : -1});
                }
            if (ranges == 1) continue;
            for (std::int64_t head = 0; head < heads; ++head)
                merged_.push_back({s, head, 0, 1, first, last, partial_count_ + head * ranges});
            partial_count_ += heads * ranges;
            continue;
        }
        for (std::int64_t head = 0; head < heads; ++head)
            for (std::int64_t token = 0; token < stretch.count; token += block) {
                const std::int64_t count = std::min(block, stretch.count - token);
                const std::int64_t last = 1 + (stretch.start + token + count - 1) / (kRunTiles * kTokens) + 1;
                units_.push_back({s, head, token, count, first, last, -1});
            }
    }
    if (partial_count_ > partial_room_) {
        partial_room_ = 2 * partial_count_;
        partials_ = aligned<float>(partial_room_ * repeats_ * (room_ + 32));
    }
}

void Attention::run(const Team& team, const AttentionLayer& layer, std::int64_t layer_index, const float* q, float* out,
                    Scratch& scratch) {
    const std::int64_t heads = store_.rules().heads, most_rows = std::max(kRows, repeats_);
    const std::int64_t columns = kTokens * std::max(kRunTiles, prefix_tiles_);
    float* at = scratch.numbers.get();
    const auto take = [&](std::int64_t numbers) {
        float* from = at;
        at += numbers;
        return from;
    };
    Work work{};
    work.columns = columns;
    work.keys = take(kTokens * room_), work.values = take(kTokens * room_);
    work.q = take(most_rows * room_), work.scores = take(most_rows * columns);
    work.exact = take(most_rows * columns);
    const auto sums_at = [&](float* from, std::int64_t rows) {
        return Sums{from, from + rows * room_, from + rows * (room_ + 16)};
    };
    const Sums own = sums_at(take(most_rows * (room_ + 32)), most_rows);
    const Sums next = sums_at(take(most_rows * (room_ + 32)), most_rows);
    const auto partial = [&](std::int64_t index) {
        return sums_at(partials_.get() + index * repeats_ * (room_ + 32), repeats_);
    };
    for (std::size_t u = static_cast<std::size_t>(team.index); u < units_.size(); u += static_cast<std::size_t>(team.threads)) {
        const Unit& unit = units_[u];
        const Stretch& stretch = stretches_[unit.stretch];
        for (std::int64_t t = 0; t < unit.tokens; ++t) {
            const float* from = q + ((stretch.first + unit.token + t) * heads + unit.head) * repeats_ * width_;
            for (std::int64_t r = 0; r < repeats_; ++r) {
                float* row = work.q + (t * repeats_ + r) * room_;
                std::fill(std::copy(from + r * width_, from + (r + 1) * width_, row), row + room_, 0.0f);
            }
        }
        const std::size_t after = u + static_cast<std::size_t>(team.threads);
        work.next = after < units_.size() ? keys_of(units_[after], layer, layer_index) : Next{};
        if (unit.partial >= 0) {
            attend_range(unit, unit.first_range, layer, layer_index, work, partial(unit.partial));
            continue;
        }
        attend_range(unit, unit.first_range, layer, layer_index, work, own);
        for (std::int64_t range = unit.first_range + 1; range < unit.last_range; ++range) {
            attend_range(unit, range, layer, layer_index, work, next);
            merge(rows(unit), own, next);
        }
        write(unit, own, out);
    }
    if (merged_.empty()) return;
    team.meet();
    for (std::size_t u = static_cast<std::size_t>(team.index); u < merged_.size(); u += static_cast<std::size_t>(team.threads)) {
        const Unit& unit = merged_[u];
        const Sums first = partial(unit.partial);
        for (std::int64_t i = 1; i < unit.last_range - unit.first_range; ++i)
            merge(repeats_, first, partial(unit.partial + i));
        write(unit, first, out);
    }
}

Next Attention::keys_of(const Unit& unit, const AttentionLayer& layer, std::int64_t layer_index) const {
    const Side& keys = stretches_[unit.stretch].sequence->layer(layer_index).keys;
    if (unit.first_range == 0) return next_of(store_.keys(true), layer.prefix.keys, unit.head, 0);
    const std::int64_t tile = (unit.first_range - 1) * kRunTiles;
    const Next coded = next_of(store_.keys(false), keys.coded, unit.head, tile);
    return coded.from != nullptr ? coded : next_of(store_.keys(true), keys.exact, unit.head, tile);
}

void Attention::attend_range(const Unit& unit, std::int64_t range, const AttentionLayer& layer, std::int64_t layer_index,
                             const Work& work, Sums sums) const {
    const CacheRules& rules = store_.rules();
    const Stretch& stretch = stretches_[unit.stretch];
    const std::int64_t count = rows(unit), first_token = stretch.start + unit.token;
    const std::int64_t last_token = first_token + unit.tokens - 1;
    const auto token_of = [&](std::int64_t row) { return first_token + row / repeats_; };
    // First token that a row sees, counted from the text's start: negative in the prefix.
    const auto least_of = [&](std::int64_t row) {
        return layer.window > 0 ? token_of(row) - layer.window + 1 : -prefix_tokens_;
    };
    for (std::int64_t r = 0; r < count; ++r) {
        std::fill(sums.values + r * room_, sums.values + (r + 1) * room_, 0.0f);
        sums.most[r] = kNone, sums.total[r] = 0;
    }
    const bool of_prefix = range == 0, many = count >= kManyRows;
    // Tiles of this range, and the token that the first tile begins with.
    const std::int64_t least = least_of(0);
    std::int64_t from = of_prefix ? 0 : (range - 1) * kRunTiles;
    const std::int64_t to = of_prefix ? prefix_tiles_ : std::min(from + kRunTiles, last_token / kTokens + 1);
    const std::int64_t origin = of_prefix ? -prefix_tokens_ : 0;
    while (from < to && origin + (from + 1) * kTokens <= least) ++from;
    if (from >= to) return;
    const std::int64_t head = unit.head, stride = work.columns;
    const LayerTokens& layer_tokens = stretch.sequence->layer(layer_index);
    const float* center = layer.key_center == nullptr ? nullptr : layer.key_center + head * width_;
    // How many tokens a row sees coded.
    const auto coded_of = [&](std::int64_t row, bool of_keys) {
        if (of_prefix) return std::int64_t{0};
        return rules.keeps_exact() ? rules.coded_tokens(token_of(row) + 1, of_keys) : to * kTokens;
    };
    // Call `call(where tiles are, first tile, number of tiles)` for tiles that lie side by side.
    const auto each_run = [&](const auto& form, const std::vector<std::uint8_t*>& runs, std::int64_t tile,
                              std::int64_t last, auto call) {
        for (std::int64_t count; tile < last; tile += count) {
            count = std::min(last - tile, kRunTiles - tile % kRunTiles);
            call(tile_at(runs, form, head, tile), tile, count);
        }
    };
    const auto keys_of = [&](bool exact) -> const std::vector<std::uint8_t*>& {
        return of_prefix ? layer.prefix.keys : exact ? layer_tokens.keys.exact : layer_tokens.keys.coded;
    };
    const auto values_of = [&](bool exact) -> const std::vector<std::uint8_t*>& {
        return of_prefix ? layer.prefix.values : exact ? layer_tokens.values.exact : layer_tokens.values.coded;
    };
    // Tiles that a row sees coded, and those that one sees at 16 bits, overlap if rows or a tile's tokens differ.
    const auto coded_end = [&](bool of_keys) {
        return std::clamp((coded_of(count - 1, of_keys) + kTokens - 1) / kTokens, from, to);
    };
    const auto exact_begin = [&](bool of_keys) { return std::clamp(coded_of(0, of_keys) / kTokens, from, to); };

    const auto key_scores = [&](bool exact, std::int64_t first, std::int64_t last, float* scores) {
        const KeyForm& form = store_.keys(exact);
        const float* added = exact ? nullptr : center;
        const bool rotates = rules.before_rope && !of_prefix, in_place = !rotates && (exact ? !many : form.whole());
        each_run(form, keys_of(exact), first, last, [&](const std::uint8_t* keys, std::int64_t tile, std::int64_t tiles) {
            float* out = scores + (tile - from) * kTokens;
            if (in_place) {
                functions_.key_scores(form, keys, tiles, added, work.q, count, room_, out, stride,
                                      next_of(store_.values(exact), values_of(exact), head, tile));
                return;
            }
            for (std::int64_t t = 0; t < tiles; ++t, keys += form.tile_bytes(), out += kTokens) {
                functions_.keys(form, keys, added, work.keys);
                if (rotates) rotate(work.keys, stretch.sequence->angles(tile + t));
                functions_.scores(work.keys, width_, work.q, count, room_, out, stride);
            }
        });
    };
    const std::int64_t columns = (to - from) * kTokens, base = origin + from * kTokens;
    {
        const std::int64_t coded = coded_end(true), exact = exact_begin(true);
        key_scores(false, from, coded, work.scores);
        key_scores(true, std::max(exact, coded), to, work.scores);
        key_scores(true, exact, coded, work.exact);
        for (std::int64_t r = 0; r < count; ++r)
            for (std::int64_t j = std::max(coded_of(r, true) - base, (exact - from) * kTokens); j < (coded - from) * kTokens; ++j)
                work.scores[r * stride + j] = work.exact[r * stride + j];
    }
    for (std::int64_t r = 0; r < count; ++r) {
        float* scores = work.scores + r * stride;
        const std::int64_t seen = of_prefix ? 0 : token_of(r) + 1;
        std::fill(scores, scores + std::clamp<std::int64_t>(least_of(r) - base, 0, columns), kNone);
        std::fill(scores + std::clamp<std::int64_t>(seen - base, 0, columns), scores + columns, kNone);
        sums.total[r] = functions_.exponentials(scores, columns, sums.most + r);
    }

    const std::int64_t end = of_prefix ? 0 : last_token + 1;
    const auto weigh = [&](bool exact, std::int64_t first, std::int64_t last, const float* weights) {
        const ValueForm& form = store_.values(exact);
        const bool in_place = exact ? !many : form.whole();
        each_run(form, values_of(exact), first, last, [&](const std::uint8_t* values, std::int64_t tile, std::int64_t tiles) {
            const float* p = weights + (tile - from) * kTokens;
            const std::int64_t tokens = std::min(tiles * kTokens, end - origin - tile * kTokens);
            if (in_place) {
                functions_.weigh(form, values, tokens, p, count, stride, sums.values, room_, work.next);
                return;
            }
            for (std::int64_t t = 0; t < tiles; ++t, values += form.tile_bytes(), p += kTokens) {
                functions_.values(form, values, work.values);
                functions_.weigh_floats(work.values, width_, std::min(kTokens, tokens - t * kTokens), p, count, stride,
                                        sums.values, room_);
            }
        });
    };
    // Weights of the tokens that a row sees coded, and of the others, are 0 in the sum of the other kind.
    const std::int64_t coded = coded_end(false), exact = exact_begin(false);
    if (exact < coded) {
        for (std::int64_t r = 0; r < count; ++r) {
            float *p = work.scores + r * stride, *others = work.exact + r * stride;
            const std::int64_t first = (exact - from) * kTokens;
            const std::int64_t middle = std::clamp<std::int64_t>(coded_of(r, false) - base, first, columns);
            std::fill(others + first, others + middle, 0.0f);
            std::copy(p + middle, p + columns, others + middle);
            std::fill(p + middle, p + columns, 0.0f);
        }
    }
    weigh(false, from, coded, work.scores);
    weigh(true, exact, to, exact < coded ? work.exact : work.scores);
}

// Keys of a tile, (width, 32), with rotary positions. angles: cosines (count, 32), then sines.
void Attention::rotate(float* keys, const float* angles) const {
    const std::int64_t count = angles_ * kTokens;
    for (std::int64_t i = 0; i < count; ++i) {
        const float a = keys[i], b = keys[count + i];
        keys[i] = a * angles[i] - b * angles[count + i];
        keys[count + i] = b * angles[i] + a * angles[count + i];
    }
}

void Attention::merge(std::int64_t rows, Sums into, Sums from) const {
    for (std::int64_t r = 0; r < rows; ++r) {
        if (from.total[r] == 0) continue;
        float* values = into.values + r * room_;
        const float* others = from.values + r * room_;
        const float most = std::max(into.most[r], from.most[r]);
        const float keep = into.total[r] == 0 ? 0.0f : std::exp(into.most[r] - most), take = std::exp(from.most[r] - most);
        for (std::int64_t d = 0; d < width_; ++d) values[d] = values[d] * keep + others[d] * take;
        into.total[r] = into.total[r] * keep + from.total[r] * take;
        into.most[r] = most;
    }
}

void Attention::write(const Unit& unit, Sums sums, float* out) const {
    const std::int64_t heads = store_.rules().heads;
    for (std::int64_t r = 0; r < rows(unit); ++r) {
        const std::int64_t token = stretches_[unit.stretch].first + unit.token + r / repeats_;
        float* to = out + ((token * heads + unit.head) * repeats_ + r % repeats_) * width_;
        const float factor = sums.total[r] > 0 ? 1.0f / sums.total[r] : 0.0f;
        for (std::int64_t d = 0; d < width_; ++d) to[d] = sums.values[r * room_ + d] * factor;
    }
}

}  // namespace subnibble
