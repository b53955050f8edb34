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

}  // namespace

// Memory of one unit of work.
struct Attention::Work {
    // (rows, width); (rows, columns); (rows, 32) twice; (width, 32); (32, room).
    float *q, *scores, *other, *masked, *keys, *values;
    // Tokens that a range may have: scores of a row.
    std::int64_t columns;
};

Attention::Attention(const StepFunctions& functions, KvStore& store, std::int64_t repeats, std::int64_t angles,
                     std::int64_t prefix_tokens)
    : functions_(functions), store_(store), repeats_(repeats), angles_(angles), width_(store.rules().width),
      room_(padded(width_, 16)), prefix_tokens_(prefix_tokens), prefix_tiles_((prefix_tokens + kTokens - 1) / kTokens) {}

std::int64_t Attention::scratch_numbers() const {
    const std::int64_t rows = std::max(kRows, repeats_), columns = kTokens * std::max(kRunTiles, prefix_tiles_);
    const std::int64_t of_row = padded(width_, 16) + columns + 2 * kTokens + 2 * (room_ + 32);
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
        for (std::int64_t head = 0; head < heads; ++head) {
            if (stretch.count == 1) {
                const std::int64_t last = 1 + stretch.start / (kRunTiles * kTokens) + 1;
                if (last - first > 1) merged_.push_back({s, head, 0, 1, first, last, partial_count_});
                for (std::int64_t range = first; range < last; ++range)
                    units_.push_back({s, head, 0, 1, range, range + 1, last - first > 1 ? partial_count_++ : -1});
                continue;
            }
            for (std::int64_t token = 0; token < stretch.count; token += block) {
                const std::int64_t count = std::min(block, stretch.count - token);
                const std::int64_t last = 1 + (stretch.start + token + count - 1) / (kRunTiles * kTokens) + 1;
                units_.push_back({s, head, token, count, first, last, -1});
            }
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
    work.other = take(most_rows * kTokens), work.masked = take(most_rows * kTokens);
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
            for (std::int64_t r = 0; r < repeats_; ++r)
                std::copy(from + r * width_, from + (r + 1) * width_, work.q + (t * repeats_ + r) * room_);
        }
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
    const std::int64_t head = unit.head;
    const LayerTokens& layer_tokens = stretch.sequence->layer(layer_index);
    const float* center = layer.key_center == nullptr ? nullptr : layer.key_center + head * width_;
    // How many tokens a row sees coded.
    const auto coded_of = [&](std::int64_t row, bool of_keys) {
        return of_prefix ? 0 : rules.coded_tokens(token_of(row) + 1, of_keys);
    };

    const auto key_scores = [&](std::int64_t tile, bool exact, float* to_scores, std::int64_t stride) {
        const KeyForm& form = store_.keys(exact);
        const std::vector<std::uint8_t*>& runs = of_prefix ? layer.prefix.keys
                                                 : exact   ? layer_tokens.keys.exact
                                                           : layer_tokens.keys.coded;
        const std::uint8_t* keys = tile_at(runs, form, head, tile);
        const bool rotates = rules.before_rope && !of_prefix;
        if (!many && !rotates) {
            functions_.key_scores(form, keys, exact ? nullptr : center, work.q, count, room_, to_scores, stride);
            return;
        }
        functions_.keys(form, keys, exact ? nullptr : center, work.keys);
        if (rotates) {
            const float* cos = stretch.sequence->angles(tile);
            const float* sin = cos + angles_ * kTokens;
            for (std::int64_t i = 0; i < angles_ * kTokens; ++i) {
                float &x = work.keys[i], &y = work.keys[angles_ * kTokens + i];
                const float a = x, b = y;
                x = a * cos[i] - b * sin[i];
                y = b * cos[i] + a * sin[i];
            }
        }
        functions_.scores(work.keys, width_, work.q, count, room_, to_scores, stride);
    };

    const std::int64_t columns = (to - from) * kTokens, stride = work.columns;
    for (std::int64_t tile = from; tile < to; ++tile) {
        const std::int64_t base = origin + tile * kTokens, place = (tile - from) * kTokens;
        const std::int64_t coded_by_all = coded_of(0, true), coded_by_any = coded_of(count - 1, true);
        float* scores = work.scores + place;
        if (of_prefix || coded_by_any <= base) {
            key_scores(tile, true, scores, stride);
        } else if (!rules.keeps_exact() || coded_by_all >= std::min(base + kTokens, last_token + 1)) {
            key_scores(tile, false, scores, stride);
        } else {
            key_scores(tile, false, scores, stride);
            key_scores(tile, true, work.other, kTokens);
            for (std::int64_t r = 0; r < count; ++r)
                for (std::int64_t j = std::max<std::int64_t>(0, coded_of(r, true) - base); j < kTokens; ++j)
                    scores[r * stride + j] = work.other[r * kTokens + j];
        }
        for (std::int64_t r = 0; r < count; ++r) {
            const std::int64_t unseen = std::min(kTokens, least_of(r) - base);
            for (std::int64_t j = 0; j < unseen; ++j) scores[r * stride + j] = kNone;
            const std::int64_t seen = of_prefix ? prefix_tokens_ - tile * kTokens : token_of(r) + 1 - base;
            for (std::int64_t j = std::max<std::int64_t>(0, seen); j < kTokens; ++j) scores[r * stride + j] = kNone;
        }
    }
    for (std::int64_t r = 0; r < count; ++r)
        sums.total[r] = functions_.exponentials(work.scores + r * stride, columns, sums.most + r);

    const auto weigh = [&](std::int64_t tile, bool exact, std::int64_t tokens, const float* p, std::int64_t p_stride) {
        const ValueForm& form = store_.values(exact);
        const std::vector<std::uint8_t*>& runs = of_prefix ? layer.prefix.values
                                                 : exact   ? layer_tokens.values.exact
                                                           : layer_tokens.values.coded;
        const std::uint8_t* values = tile_at(runs, form, head, tile);
        if (!many) {
            functions_.weigh(form, values, tokens, p, count, p_stride, sums.values, room_);
            return;
        }
        functions_.values(form, values, work.values);
        functions_.weigh_floats(work.values, width_, tokens, p, count, p_stride, sums.values, room_);
    };
    for (std::int64_t tile = from; tile < to; ++tile) {
        const std::int64_t base = origin + tile * kTokens;
        const std::int64_t coded_by_all = coded_of(0, false), coded_by_any = coded_of(count - 1, false);
        const std::int64_t tokens =
            std::min(kTokens, of_prefix ? prefix_tokens_ - tile * kTokens : last_token + 1 - base);
        const float* p = work.scores + (tile - from) * kTokens;
        if (of_prefix || coded_by_any <= base) {
            weigh(tile, true, tokens, p, stride);
        } else if (!rules.keeps_exact() || coded_by_all >= base + tokens) {
            weigh(tile, false, tokens, p, stride);
        } else {
            for (const bool exact : {false, true}) {
                for (std::int64_t r = 0; r < count; ++r) {
                    const std::int64_t coded = coded_of(r, false) - base;
                    for (std::int64_t j = 0; j < kTokens; ++j)
                        work.masked[r * kTokens + j] = (j >= coded) == exact ? p[r * stride + j] : 0.0f;
                }
                weigh(tile, exact, tokens, work.masked, kTokens);
            }
        }
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
