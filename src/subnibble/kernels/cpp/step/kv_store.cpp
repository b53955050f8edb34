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

// Bits of `byte` from bit `shift` on.
int get(std::uint8_t byte, int shift, int bits) { return byte >> shift & ((1 << bits) - 1); }

// The byte that holds a number of a strip in its quad's vector, and the quad.
struct Place {
    std::int64_t byte, quad;

    Place(std::int64_t lane, std::int64_t along) : byte(4 * lane + along % 4), quad(along / 4) {}
    // In vectors of as many quads as there are places of `bits` bits in a byte.
    std::int64_t at(int bits) const { return kStripVector * (quad * bits / 8) + byte; }
    int shift(int bits) const { return static_cast<int>(quad * bits % 8); }
};

void put_code(std::uint8_t* strip, const StripForm& form, Place place, int code) {
    const int bits = form.bits == 3 ? 2 : form.bits;
    put(strip[place.at(bits)], place.shift(bits), bits, code & ((1 << bits) - 1));
    if (form.bits == 3) put(strip[kStripVector * form.low_vectors() + place.at(1)], place.shift(1), 1, code >> 2);
}

int get_code(const std::uint8_t* strip, const StripForm& form, Place place) {
    const int bits = form.bits == 3 ? 2 : form.bits, low = get(strip[place.at(bits)], place.shift(bits), bits);
    if (form.bits != 3) return low;
    return low | get(strip[kStripVector * form.low_vectors() + place.at(1)], place.shift(1), 1) << 2;
}

// A token's channel in a tile of keys, or of values: the strip, and the place in it.
std::uint8_t* strip_of(std::uint8_t* tile, const KeyForm& form, std::int64_t lane, std::int64_t) {
    return tile + lane / 16 * form.strip().nbytes();
}

Place place_of(const KeyForm&, std::int64_t lane, std::int64_t d) { return {lane % 16, d}; }

std::uint8_t* strip_of(std::uint8_t* tile, const ValueForm& form, std::int64_t, std::int64_t d) {
    return tile + d / 16 * form.strip().nbytes();
}

Place place_of(const ValueForm&, std::int64_t lane, std::int64_t d) { return {d % 16, lane}; }

template <typename Form>
void put_token(std::uint8_t* tile, const Form& form, std::int64_t lane, std::int64_t d, int code) {
    put_code(strip_of(tile, form, lane, d), form.strip(), place_of(form, lane, d), code);
}

template <typename Form>
int get_token(std::uint8_t* tile, const Form& form, std::int64_t lane, std::int64_t d) {
    return get_code(strip_of(tile, form, lane, d), form.strip(), place_of(form, lane, d));
}

// Code one token's numbers, with groups of channels.
template <typename Form>
void code_token(std::uint8_t* tile, const Form& form, std::int64_t lane, const float* x, float clip) {
    std::uint16_t* scales = halves(tile + form.scales_at());
    for (std::int64_t first = 0; first < form.width; first += form.group) {
        const std::int64_t last = std::min(form.width, first + form.group), at = form.scale_of(lane, first);
        const auto range = std::minmax_element(x + first, x + last);
        const Levels levels(*range.first, *range.second, form.bits, clip);
        scales[at] = levels.scale;
        scales[form.scales() + at] = levels.low;
        for (std::int64_t d = first; d < last; ++d) put_token(tile, form, lane, d, levels.code(x[d]));
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
    std::uint16_t* to = halves(tile) + lane * exact_values_.room();
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
        const std::uint16_t* from = halves(tile) + lane * exact_values_.room();
        for (std::int64_t d = 0; d < rules_.width; ++d) value[d] = from_half(from[d]);
        code_value(tile_at(layer.values.coded, coded_values_, head, token / kTokens), lane, value);
    }
}

void KvStore::code_key(std::uint8_t* tile, std::int64_t lane, const float* key, const float* center) const {
    float centered[256];
    for (std::int64_t d = 0; d < rules_.width; ++d) centered[d] = key[d] - (center == nullptr ? 0.0f : center[d]);
    code_token(tile, coded_keys_, lane, centered, rules_.clip);
}

void KvStore::code_channels(LayerTokens& layer, std::int64_t head, std::int64_t first) const {
    const KeyForm& form = coded_keys_;
    const std::int64_t last = first + form.group;
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
            const std::int64_t lane = token % kTokens, at = form.scale_of(lane, d);
            scales[at] = levels.scale;
            scales[form.scales() + at] = levels.low;
            put_token(tile, form, lane, d, levels.code(x[static_cast<std::size_t>(token - first)]));
        }
    }
}

void KvStore::code_value(std::uint8_t* tile, std::int64_t lane, const float* value) const {
    code_token(tile, coded_values_, lane, value, rules_.clip);
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
                    const std::int64_t at = key_form.scale_of(lane, d);
                    scaled(scales + at, scales + all + at, group * width + d);
                }
                continue;
            }
            const std::int64_t groups = of_keys ? key_form.groups() : value_form.groups();
            for (std::int64_t g = 0; g < groups; ++g, ++scale) {
                const std::int64_t at = kTokens * g + lane;
                scaled(scales + at, scales + all + at, scale);
            }
        }
        for (std::int64_t token = done; token < tokens; ++token) {
            const std::int64_t lane = token % kTokens;
            std::uint8_t* tile = of_keys ? tile_at(side.exact, exact_keys, head, token / kTokens)
                                         : tile_at(side.exact, exact_values, head, token / kTokens);
            for (std::int64_t d = 0; d < width; ++d)
                exact(of_keys ? halves(tile) + kTokens * d + lane : halves(tile) + lane * exact_values.room() + d,
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
            codes[index] = static_cast<std::uint8_t>(of_keys ? get_token(tile, key_form, lane, d)
                                                             : get_token(tile, value_form, lane, d));
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
                put_token(tile, key_form, lane, d, codes[index]);
            else
                put_token(tile, value_form, lane, d, codes[index]);
        },
        [&](std::uint16_t* scale, std::uint16_t* low, std::int64_t index) { *scale = scales[index], *low = lows[index]; },
        [&](std::uint16_t* number, std::int64_t index) { *number = exact[index]; });
}

}  // namespace subnibble
