#include "step/kv_store.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "memory.h"
#include "numbers.h"


namespace subnibble {

namespace {

// Of a pool's slab.
constexpr std::int64_t kSlabBytes = 1 << 20;
constexpr float kSmallestScale = 0x1p-14f;

std::size_t tile_of(std::int64_t token) { return static_cast<std::size_t>(token / kTokens); }

std::size_t run_of(std::int64_t token) { return static_cast<std::size_t>(token / kRunTokens); }

std::size_t runs_of(std::int64_t tokens) { return static_cast<std::size_t>((tokens + kRunTokens - 1) / kRunTokens); }

std::uint16_t* halves(std::uint8_t* from) { return reinterpret_cast<std::uint16_t*>(from); }

// Levels of a group: x is about low + scale * code, with codes 0 .. last. Scale and low are rounded to float16 first.
struct Levels {
    std::uint16_t scale, low;
    float of_scale, of_low, last;

    Levels(float least, float most, int bits, float clip) : last(static_cast<float>((1 << bits) - 1)) {
        const float middle = (least + most) / 2, half = clip * (most - least) / 2;
        low = to_half(middle - half);
        scale = to_half(std::max(2 * half / last, kSmallestScale));
        of_low = from_half(low);
        of_scale = from_half(scale);
    }
    int code(float x) const {
        const float number = nearest((x - of_low) / of_scale);
        return static_cast<int>(number < 0 ? 0 : number > last ? last : number);
    }
};

// Put `code` into `bits` bits of `byte`, from bit `shift` on.
void put(std::uint8_t& byte, int shift, int bits, int code) {
    const int mask = ((1 << bits) - 1) << shift;
    byte = static_cast<std::uint8_t>((byte & ~mask) | code << shift);
}

void put_key(std::uint8_t* tile, const KeyForm& form, std::int64_t d, std::int64_t lane, int code) {
    const std::int64_t l = lane % 16, half = lane / 16;
    if (form.bits == 8) {
        tile[32 * d + lane] = static_cast<std::uint8_t>(code);
    } else if (form.bits == 4) {
        put(tile[16 * d + l], static_cast<int>(4 * half), 4, code);
    } else {
        put(tile[16 * (d / 2) + l], static_cast<int>(4 * (d % 2) + 2 * half), 2, code & 3);
        if (form.bits == 3)
            put(tile[16 * ((form.width + 1) / 2) + 4 * d + lane / 8], static_cast<int>(lane % 8), 1, code >> 2);
    }
}

// Bits of `byte` from bit `shift` on.
int get(std::uint8_t byte, int shift, int bits) { return byte >> shift & ((1 << bits) - 1); }

int get_key(const std::uint8_t* tile, const KeyForm& form, std::int64_t d, std::int64_t lane) {
    const std::int64_t l = lane % 16, half = lane / 16;
    if (form.bits == 8) return tile[32 * d + lane];
    if (form.bits == 4) return get(tile[16 * d + l], static_cast<int>(4 * half), 4);
    const int low = get(tile[16 * (d / 2) + l], static_cast<int>(4 * (d % 2) + 2 * half), 2);
    if (form.bits == 2) return low;
    return low | get(tile[16 * ((form.width + 1) / 2) + 4 * d + lane / 8], static_cast<int>(lane % 8), 1) << 2;
}

int get_value(const std::uint8_t* row, const ValueForm& form, std::int64_t d) {
    const std::int64_t l = d % 16, v = d / 16;
    if (form.bits == 8) return row[d];
    if (form.bits == 4) return get(row[16 * (v / 2) + l], static_cast<int>(4 * (v % 2)), 4);
    const int low = get(row[16 * (v / 4) + l], static_cast<int>(2 * (v % 4)), 2);
    if (form.bits == 2) return low;
    return low | get(row[16 * ((form.vectors() + 3) / 4) + 2 * v + l / 8], static_cast<int>(l % 8), 1) << 2;
}

void put_value(std::uint8_t* row, const ValueForm& form, std::int64_t d, int code) {
    const std::int64_t l = d % 16, v = d / 16;
    if (form.bits == 8) {
        row[d] = static_cast<std::uint8_t>(code);
    } else if (form.bits == 4) {
        put(row[16 * (v / 2) + l], static_cast<int>(4 * (v % 2)), 4, code);
    } else {
        put(row[16 * (v / 4) + l], static_cast<int>(2 * (v % 4)), 2, code & 3);
        if (form.bits == 3)
            put(row[16 * ((form.vectors() + 3) / 4) + 2 * v + l / 8], static_cast<int>(l % 8), 1, code >> 2);
    }
}

}  // namespace

std::int64_t CacheRules::coded_tokens(std::int64_t tokens, bool of_keys) const {
    if (!coded()) return 0;
    if (of_keys && key_axis == Axis::channel) return tokens / window * window;
    return std::max<std::int64_t>(tokens - window, 0);
}

KeyForm CacheRules::key_form(bool exact) const { return {exact ? kExact : bits, width, key_axis, group}; }

ValueForm CacheRules::value_form(bool exact) const {
    return {exact ? kExact : bits, width, std::min(group, width)};
}

std::uint8_t* TilePool::take() {
    std::uint8_t* run;
    if (!free_.empty()) {
        run = free_.back();
        free_.pop_back();
    } else {
        if (made_ == room_) {
            const std::int64_t runs = std::max<std::int64_t>(1, kSlabBytes / run_bytes_);
            slabs_.push_back(long_lived(runs * run_bytes_));
            made_ = 0, room_ = runs;
        }
        run = slabs_.back().get() + made_++ * run_bytes_;
    }
    std::memset(run, 0, static_cast<std::size_t>(run_bytes_));
    return run;
}

std::int64_t TilePool::nbytes() const {
    if (slabs_.empty()) return 0;
    const auto full = static_cast<std::int64_t>(slabs_.size()) - 1;
    return (full * room_ + made_ - static_cast<std::int64_t>(free_.size())) * run_bytes_;
}

KvStore::KvStore(const CacheRules& rules)
    : rules_(rules), coded_keys_(rules.key_form(false)), exact_keys_(rules.key_form(true)),
      coded_values_(rules.value_form(false)), exact_values_(rules.value_form(true)),
      coded_key_tiles_(rules.heads * kRunTiles * coded_keys_.tile_bytes()), exact_key_tiles_(rules.heads * kRunTiles * exact_keys_.tile_bytes()),
      coded_value_tiles_(rules.heads * kRunTiles * coded_values_.tile_bytes()),
      exact_value_tiles_(rules.heads * kRunTiles * exact_values_.tile_bytes()) {
    if (rules.width > 256) throw std::invalid_argument("no kernel for heads of more than 256 channels");
}

std::int64_t KvStore::nbytes() const {
    return coded_key_tiles_.nbytes() + exact_key_tiles_.nbytes() + coded_value_tiles_.nbytes() +
           exact_value_tiles_.nbytes();
}

void KvStore::write_key(LayerTokens& layer, std::int64_t head, std::int64_t token, const float* key,
                        const float* center) const {
    const std::int64_t lane = token % kTokens;
    if (!rules_.keeps_exact()) {
        code_key(tile_at(layer.keys.coded, coded_keys_, head, token / kTokens), lane, key, center);
        return;
    }
    std::uint16_t* to = halves(tile_at(layer.keys.exact, exact_keys_, head, token / kTokens)) + lane;
    for (std::int64_t d = 0; d < rules_.width; ++d) to[kTokens * d] = to_half(key[d]);
}

void KvStore::write_value(LayerTokens& layer, std::int64_t head, std::int64_t token, const float* value) const {
    const std::int64_t lane = token % kTokens;
    if (!rules_.keeps_exact()) {
        code_value(tile_at(layer.values.coded, coded_values_, head, token / kTokens), lane, value);
        return;
    }
    std::uint8_t* tile = tile_at(layer.values.exact, exact_values_, head, token / kTokens);
    std::uint16_t* to = halves(tile + lane * exact_values_.row_bytes());
    for (std::int64_t d = 0; d < rules_.width; ++d) to[d] = to_half(value[d]);
}

void KvStore::code_keys(LayerTokens& layer, std::int64_t head, std::int64_t tokens, const float* center) const {
    if (!rules_.coded() || !rules_.keeps_exact()) return;
    const std::int64_t due = rules_.coded_tokens(tokens, true);
    if (rules_.key_axis == Axis::channel) {
        for (std::int64_t first = layer.keys.done; first < due; first += rules_.group) code_channels(layer, head, first);
        return;
    }
    float key[256];
    for (std::int64_t token = layer.keys.done; token < due; ++token) {
        const std::int64_t lane = token % kTokens;
        const std::uint16_t* from = halves(tile_at(layer.keys.exact, exact_keys_, head, token / kTokens)) + lane;
        for (std::int64_t d = 0; d < rules_.width; ++d) key[d] = from_half(from[kTokens * d]);
        code_key(tile_at(layer.keys.coded, coded_keys_, head, token / kTokens), lane, key, center);
    }
}

void KvStore::code_values(LayerTokens& layer, std::int64_t head, std::int64_t tokens) const {
    if (!rules_.coded() || !rules_.keeps_exact()) return;
    const std::int64_t due = rules_.coded_tokens(tokens, false);
    float value[256];
    for (std::int64_t token = layer.values.done; token < due; ++token) {
        const std::int64_t lane = token % kTokens;
        std::uint8_t* tile = tile_at(layer.values.exact, exact_values_, head, token / kTokens);
        const std::uint16_t* from = halves(tile + lane * exact_values_.row_bytes());
        for (std::int64_t d = 0; d < rules_.width; ++d) value[d] = from_half(from[d]);
        code_value(tile_at(layer.values.coded, coded_values_, head, token / kTokens), lane, value);
    }
}

void KvStore::code_key(std::uint8_t* tile, std::int64_t lane, const float* key, const float* center) const {
    const KeyForm& form = coded_keys_;
    std::uint16_t* scales = halves(tile + form.scales_at());
    float centered[256];
    for (std::int64_t d = 0; d < form.width; ++d) centered[d] = key[d] - (center == nullptr ? 0.0f : center[d]);
    for (std::int64_t g = 0; g < form.groups(); ++g) {
        const std::int64_t first = g * form.group, last = std::min(form.width, first + form.group);
        const auto range = std::minmax_element(centered + first, centered + last);
        const Levels levels(*range.first, *range.second, form.bits, rules_.clip);
        scales[kTokens * g + lane] = levels.scale;
        scales[form.scales() + kTokens * g + lane] = levels.low;
        for (std::int64_t d = first; d < last; ++d) put_key(tile, form, d, lane, levels.code(centered[d]));
    }
}

void KvStore::code_channels(LayerTokens& layer, std::int64_t head, std::int64_t first) const {
    const KeyForm& form = coded_keys_;
    const std::int64_t last = first + form.group, room = padded(form.width, 16);
    std::vector<float> x(static_cast<std::size_t>(form.group));
    for (std::int64_t d = 0; d < form.width; ++d) {
        for (std::int64_t token = first; token < last; ++token) {
            const std::uint8_t* tile = tile_at(layer.keys.exact, exact_keys_, head, token / kTokens);
            std::uint16_t half;
            std::memcpy(&half, tile + 2 * (kTokens * d + token % kTokens), 2);
            x[static_cast<std::size_t>(token - first)] = from_half(half);
        }
        const auto range = std::minmax_element(x.begin(), x.end());
        const Levels levels(*range.first, *range.second, form.bits, rules_.clip);
        for (std::int64_t token = first; token < last; ++token) {
            std::uint8_t* tile = tile_at(layer.keys.coded, form, head, token / kTokens);
            std::uint16_t* scales = halves(tile + form.scales_at());
            const std::int64_t lane = token % kTokens, at = form.by_halves() ? lane / 16 * room + d : kTokens * d + lane;
            scales[at] = levels.scale;
            scales[form.scales() + at] = levels.low;
            put_key(tile, form, d, lane, levels.code(x[static_cast<std::size_t>(token - first)]));
        }
    }
}

void KvStore::code_value(std::uint8_t* tile, std::int64_t lane, const float* value) const {
    const ValueForm& form = coded_values_;
    std::uint16_t* scales = halves(tile + form.scales_at());
    std::uint8_t* row = tile + lane * form.row_bytes();
    for (std::int64_t g = 0; g < form.groups(); ++g) {
        const std::int64_t first = g * form.group, last = std::min(form.width, first + form.group);
        const auto range = std::minmax_element(value + first, value + last);
        const Levels levels(*range.first, *range.second, form.bits, rules_.clip);
        scales[lane * form.groups() + g] = levels.scale;
        scales[form.scales() + lane * form.groups() + g] = levels.low;
        for (std::int64_t d = first; d < last; ++d) put_value(row, form, d, levels.code(value[d]));
    }
}

Sequence::Sequence(KvStore& store, std::int64_t layers) : store_(store), layers_(static_cast<std::size_t>(layers)) {}

Sequence::~Sequence() {
    for (LayerTokens& layer : layers_)
        for (const bool of_keys : {true, false}) trim(of_keys ? layer.keys : layer.values, of_keys, 0);
}

// Give back all runs without a token below `length`.
void Sequence::trim(Side& side, bool of_keys, std::int64_t length) {
    const std::size_t runs = runs_of(length);
    for (const bool exact : {true, false}) {
        std::vector<std::uint8_t*>& list = exact ? side.exact : side.coded;
        for (std::size_t i = runs; i < list.size(); ++i)
            if (list[i] != nullptr) store_.pool(of_keys, exact).give(list[i]);
        if (list.size() > runs) list.resize(runs);
    }
}

void Sequence::reserve(std::int64_t tokens) {
    const CacheRules& rules = store_.rules();
    const std::int64_t total = reserved_ = length_ + tokens;
    const std::size_t runs = runs_of(total);
    for (LayerTokens& layer : layers_)
        for (const bool of_keys : {true, false}) {
            Side& side = of_keys ? layer.keys : layer.values;
            side.coded.resize(runs, nullptr);
            side.exact.resize(runs, nullptr);
            if (rules.keeps_exact())
                for (std::size_t i = run_of(length_); i < runs; ++i)
                    if (side.exact[i] == nullptr) side.exact[i] = store_.pool(of_keys, true).take();
            const std::int64_t due = rules.coded_tokens(total, of_keys);
            for (std::size_t i = run_of(side.done); i < runs_of(due); ++i)
                if (side.coded[i] == nullptr) side.coded[i] = store_.pool(of_keys, false).take();
        }
}

void Sequence::place_angles(const float* cos, const float* sin, std::int64_t tokens, std::int64_t count) {
    angles_.resize(static_cast<std::size_t>((length_ + tokens + kTokens - 1) / kTokens));
    for (std::vector<float>& tile : angles_) tile.resize(static_cast<std::size_t>(2 * count * kTokens));
    for (std::int64_t t = 0; t < tokens; ++t) {
        float* to = angles_[tile_of(length_ + t)].data() + (length_ + t) % kTokens;
        for (std::int64_t a = 0; a < count; ++a) {
            to[a * kTokens] = cos[t * count + a];
            to[(count + a) * kTokens] = sin[t * count + a];
        }
    }
}

void Sequence::advance(std::int64_t tokens) {
    length_ += tokens;
    const CacheRules& rules = store_.rules();
    for (LayerTokens& layer : layers_)
        for (const bool of_keys : {true, false}) {
            Side& side = of_keys ? layer.keys : layer.values;
            const std::int64_t before = side.done;
            side.done = rules.coded_tokens(length_, of_keys);
            for (std::size_t i = run_of(before); (static_cast<std::int64_t>(i) + 1) * kRunTokens <= side.done; ++i)
                if (side.exact[i] != nullptr) {
                    store_.pool(of_keys, true).give(side.exact[i]);
                    side.exact[i] = nullptr;
                }
        }
}

bool Sequence::crop(std::int64_t length) {
    const CacheRules& rules = store_.rules();
    length = std::min(length, length_);
    for (const LayerTokens& layer : layers_)
        for (const bool of_keys : {true, false})
            if (rules.window > 0 && rules.coded() &&
                rules.coded_tokens(length, of_keys) != (of_keys ? layer.keys : layer.values).done)
                return false;
    for (LayerTokens& layer : layers_)
        for (const bool of_keys : {true, false}) {
            Side& side = of_keys ? layer.keys : layer.values;
            trim(side, of_keys, length);
            side.done = rules.coded_tokens(length, of_keys);
        }
    length_ = length;
    angles_.resize(std::min(angles_.size(), static_cast<std::size_t>((length + kTokens - 1) / kTokens)));
    return true;
}

// Numbers in the order of `read`: coded(tile, lane, channel, index), scaled(place of a scale, place of the lowest value,
// index), exact(place, index).
template <typename Coded, typename Scaled, typename Exact>
void Sequence::visit(std::int64_t layer, bool of_keys, std::int64_t tokens, Coded coded, Scaled scaled,
                     Exact exact) const {
    const CacheRules& rules = store_.rules();
    const LayerTokens& of_layer = layers_[static_cast<std::size_t>(layer)];
    const Side& side = of_keys ? of_layer.keys : of_layer.values;
    const KeyForm &key_form = store_.keys(false), &exact_keys = store_.keys(true);
    const ValueForm &value_form = store_.values(false), &exact_values = store_.values(true);
    const std::int64_t done = rules.coded_tokens(tokens, of_keys), width = rules.width;
    const bool by_channel = of_keys && rules.key_axis == Axis::channel;
    std::int64_t code = 0, scale = 0, number = 0;
    for (std::int64_t head = 0; head < rules.heads; ++head) {
        for (std::int64_t token = 0; token < done; ++token) {
            const std::int64_t lane = token % kTokens;
            std::uint8_t* tile = of_keys ? tile_at(side.coded, key_form, head, token / kTokens)
                                         : tile_at(side.coded, value_form, head, token / kTokens);
            for (std::int64_t d = 0; d < width; ++d) coded(tile, lane, d, code++);
            std::uint16_t* scales = halves(tile + (of_keys ? key_form.scales_at() : value_form.scales_at()));
            const std::int64_t all = of_keys ? key_form.scales() : value_form.scales();
            if (by_channel) {
                // Tokens of a group hold the same scales; they are written to all, and counted once.
                const std::int64_t group = head * (done / rules.group) + token / rules.group;
                for (std::int64_t d = 0; d < width; ++d) {
                    const std::int64_t at =
                        key_form.by_halves() ? lane / 16 * padded(width, 16) + d : kTokens * d + lane;
                    scaled(scales + at, scales + all + at, group * width + d);
                }
                continue;
            }
            const std::int64_t groups = of_keys ? key_form.groups() : value_form.groups();
            for (std::int64_t g = 0; g < groups; ++g, ++scale) {
                const std::int64_t at = of_keys ? kTokens * g + lane : lane * groups + g;
                scaled(scales + at, scales + all + at, scale);
            }
        }
        for (std::int64_t token = done; token < tokens; ++token) {
            const std::int64_t lane = token % kTokens;
            std::uint8_t* tile = of_keys ? tile_at(side.exact, exact_keys, head, token / kTokens)
                                         : tile_at(side.exact, exact_values, head, token / kTokens);
            for (std::int64_t d = 0; d < width; ++d)
                exact(of_keys ? halves(tile) + kTokens * d + lane : halves(tile + lane * exact_values.row_bytes()) + d,
                      number++);
        }
    }
}

void Sequence::read(std::int64_t layer, bool of_keys, std::uint8_t* codes, std::uint16_t* scales, std::uint16_t* lows,
                    std::uint16_t* exact) const {
    const KeyForm& key_form = store_.keys(false);
    const ValueForm& value_form = store_.values(false);
    visit(
        layer, of_keys, length_,
        [&](std::uint8_t* tile, std::int64_t lane, std::int64_t d, std::int64_t index) {
            const int code = of_keys ? get_key(tile, key_form, d, lane)
                                     : get_value(tile + lane * value_form.row_bytes(), value_form, d);
            codes[index] = static_cast<std::uint8_t>(code);
        },
        [&](const std::uint16_t* scale, const std::uint16_t* low, std::int64_t index) {
            scales[index] = *scale, lows[index] = *low;
        },
        [&](const std::uint16_t* number, std::int64_t index) { exact[index] = *number; });
}

void Sequence::write(std::int64_t layer, bool of_keys, const std::uint8_t* codes, const std::uint16_t* scales,
                     const std::uint16_t* lows, const std::uint16_t* exact) {
    const KeyForm& key_form = store_.keys(false);
    const ValueForm& value_form = store_.values(false);
    visit(
        layer, of_keys, reserved_,
        [&](std::uint8_t* tile, std::int64_t lane, std::int64_t d, std::int64_t index) {
            if (of_keys)
                put_key(tile, key_form, d, lane, codes[index]);
            else
                put_value(tile + lane * value_form.row_bytes(), value_form, d, codes[index]);
        },
        [&](std::uint16_t* scale, std::uint16_t* low, std::int64_t index) { *scale = scales[index], *low = lows[index]; },
        [&](std::uint16_t* number, std::int64_t index) { *number = exact[index]; });
}

}  // namespace subnibble
