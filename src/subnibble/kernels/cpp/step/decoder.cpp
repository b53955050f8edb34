#include "step/decoder.h"

#include <algorithm>
#include <array>
#include <set>
#include <stdexcept>
#include <string>

#include "numbers.h"

namespace subnibble {

namespace {

// Tokens of a pass: enough to decode each weight once for many, few enough for the processor's cache.
constexpr std::int64_t kPassTokens = 256;

std::int64_t rows_of(const Tensor& tensor, Place place) { return tensor.sites[place.site]->rows(place.reader); }

constexpr std::array<Tensor Layer::*, 4> kTensors = {&Layer::attention_in, &Layer::attention_out, &Layer::mlp_in,
                                                     &Layer::mlp_hidden};

std::int64_t result_numbers(const Tensor& tensor) {
    std::int64_t numbers = 0;
    for (const auto& site : tensor.sites) numbers += site->result_numbers();
    return numbers;
}

const float* result_of(Tensor& tensor, Place place) { return tensor.sites[place.site]->result(place.reader); }

}  // namespace

Decoder::Decoder(const Kernel& kernel, const DecoderForm& form, Table table, std::vector<Layer> layers,
                 NormTerms final_norm, std::unique_ptr<Site> head)
    : kernel_(kernel), functions_(step_functions(kernel.name)), form_(form), table_(std::move(table)),
      store_(form.cache), layers_(std::move(layers)), final_norm_(final_norm), head_(std::move(head)),
      attention_(functions_, store_, form.query_heads / form.cache.heads, form.angles, form.prefix_tokens) {}

void Decoder::set_head_input(const float* matrix, std::vector<std::int64_t> widths) {
    head_matrix_ = matrix;
    head_widths_ = std::move(widths);
}

void Decoder::set_angles(const float* cos, const float* sin, std::int64_t positions) {
    cos_ = cos, sin_ = sin, positions_ = positions;
}

void Decoder::set_prefix(std::int64_t index, const float* keys, const float* values) {
    const std::int64_t heads = form_.cache.heads, width = form_.cache.width, tokens = form_.prefix_tokens;
    PrefixTiles& prefix = layers_[static_cast<std::size_t>(index)].attention.prefix;
    const KeyForm& key_form = store_.keys(true);
    const ValueForm& value_form = store_.values(true);
    prefix.tokens = tokens;
    for (std::int64_t first = 0; first < tokens; first += kRunTokens)
        for (const bool of_keys : {true, false}) {
            const std::int64_t bytes = heads * kRunTiles * (of_keys ? key_form.tile_bytes() : value_form.tile_bytes());
            prefix_tiles_.push_back(aligned<std::uint8_t>(bytes));
            std::fill(prefix_tiles_.back().get(), prefix_tiles_.back().get() + bytes, std::uint8_t{0});
            (of_keys ? prefix.keys : prefix.values).push_back(prefix_tiles_.back().get());
        }
    for (std::int64_t head = 0; head < heads; ++head)
        for (std::int64_t t = 0; t < tokens; ++t) {
            const float *key = keys + (head * tokens + t) * width, *value = values + (head * tokens + t) * width;
            std::uint8_t* of_values = tile_at(prefix.values, value_form, head, t / kTokens);
            auto* to_key = reinterpret_cast<std::uint16_t*>(tile_at(prefix.keys, key_form, head, t / kTokens));
            auto* to_value = reinterpret_cast<std::uint16_t*>(of_values) + t % kTokens * value_form.room();
            for (std::int64_t d = 0; d < width; ++d) {
                to_key[kTokens * d + t % kTokens] = to_half(key[d]);
                to_value[d] = to_half(value[d]);
            }
        }
}

void Decoder::check(const std::vector<Append>& appends) const {
    std::set<const Sequence*> known;
    for (const Append& append : appends) {
        if (!known.insert(append.sequence).second) throw std::invalid_argument("a sequence occurs twice in one step");
        for (const std::int64_t id : append.ids)
            if (id < 0 || id >= table_.rows)
                throw std::out_of_range("token id " + std::to_string(id) + " is outside the vocabulary of " +
                                        std::to_string(table_.rows));
        const std::int64_t total = append.sequence->length() + static_cast<std::int64_t>(append.ids.size());
        if (total + form_.prefix_tokens > positions_)
            throw std::out_of_range("a sequence of " + std::to_string(total) + " tokens has positions beyond " +
                                    std::to_string(positions_));
    }
}

void Decoder::reserve(std::int64_t tokens, std::int64_t threads) {
    if (tokens > room_) {
        // A few tokens more than asked for, so that a batch may grow.
        room_ = std::min(kPassTokens, tokens <= 1 ? 1 : padded(tokens, 32));
        const std::int64_t q = form_.query_heads * form_.cache.width;
        std::int64_t hidden = 0, results = 0;
        for (const Layer& layer : layers_) {
            for (const Tensor Layer::* tensor : kTensors) results = std::max(results, result_numbers(layer.*tensor));
            hidden = std::max(hidden, rows_of(layer.mlp_in, layer.gate));
        }
        results_ = aligned<float>(room_ * results);
        for (std::size_t index = 0; index < layers_.size(); ++index)
            for (Tensor Layer::* tensor : kTensors)
                reserve_sites(layers_[index].*tensor, index == 0 ? nullptr : &(layers_[index - 1].*tensor));
        head_->reserve(room_, nullptr, nullptr);
        hidden_ = aligned<float>(room_ * form_.width);
        queries_ = aligned<float>(room_ * q);
        attended_ = aligned<float>(room_ * q);
        gated_ = aligned<float>(room_ * hidden);
    }
    std::int64_t panels = head_->panel_bytes();
    std::int64_t numbers = std::max(attention_.scratch_numbers(), 2 * form_.width + head_->scratch_numbers());
    for (const Layer& layer : layers_)
        for (const Tensor* tensor : {&layer.attention_in, &layer.attention_out, &layer.mlp_in, &layer.mlp_hidden})
            for (const auto& site : tensor->sites) {
                panels = std::max(panels, site->panel_bytes());
                numbers = std::max(numbers, form_.width + site->scratch_numbers());
            }
    while (static_cast<std::int64_t>(scratch_.size()) < threads)
        scratch_.push_back({aligned<std::uint8_t>(panels), aligned<float>(numbers)});
}

// before: the same tensor of the layer before, null for none.
void Decoder::reserve_sites(Tensor& tensor, const Tensor* before) {
    float* results = results_.get();
    for (std::size_t index = 0; index < tensor.sites.size(); ++index) {
        const bool follows = before != nullptr && index < before->sites.size();
        tensor.sites[index]->reserve(room_, results, follows ? before->sites[index].get() : nullptr);
        results += room_ * tensor.sites[index]->result_numbers();
    }
}

bool Decoder::forward(const std::vector<Append>& appends, std::int64_t threads, float* logits,
                      const std::function<bool()>& stops) {
    check(appends);
    threads = std::max<std::int64_t>(threads, 1);
    std::int64_t left = 0;
    for (const Append& append : appends) left += static_cast<std::int64_t>(append.ids.size());
    if (left == 0) return true;
    reserve(std::min(left, kPassTokens), threads);
    Pass pass;
    std::int64_t place = 0;
    const auto flush = [&] {
        run(pass, threads, logits);
        for (const Stretch& stretch : pass.stretches) stretch.sequence->advance(stretch.count);
        pass = Pass{};
    };
    for (const Append& append : appends) {
        const auto count = static_cast<std::int64_t>(append.ids.size());
        for (std::int64_t done = 0; done < count;) {
            const auto used = static_cast<std::int64_t>(pass.ids.size());
            if (used == room_) {
                flush();
                if (stops()) return false;
                continue;
            }
            const std::int64_t here = std::min(room_ - used, count - done), start = append.sequence->length();
            append.sequence->reserve(here);
            pass.stretches.push_back({append.sequence, used, here, start});
            for (std::int64_t i = 0; i < here; ++i) {
                pass.ids.push_back(append.ids[static_cast<std::size_t>(done + i)]);
                pass.positions.push_back(form_.prefix_tokens + start + i);
                if (append.all_logits || done + i + 1 == count) pass.logits.emplace_back(used + i, place++);
            }
            done += here;
        }
    }
    if (!pass.ids.empty()) flush();
    return true;
}

void Decoder::run(const Pass& pass, std::int64_t threads, float* logits) {
    embed(pass);
    attention_.begin(pass.stretches);
    if (form_.cache.before_rope)
        for (const Stretch& stretch : pass.stretches) {
            const std::int64_t at = (form_.prefix_tokens + stretch.start) * form_.angles;
            stretch.sequence->place_angles(cos_ + at, sin_ + at, stretch.count, form_.angles);
        }
    run_together(threads, [&](const Team& team) {
        for (std::int64_t index = 0; index < layers(); ++index) run_layer(team, pass, index);
        if (!pass.logits.empty()) run_head(team, pass, logits);
    });
}

void Decoder::embed(const Pass& pass) {
    for (std::size_t t = 0; t < pass.ids.size(); ++t) {
        float* to = hidden_.get() + static_cast<std::int64_t>(t) * form_.width;
        const std::int64_t id = pass.ids[t];
        if (table_.dense != nullptr) {
            const auto* rows = static_cast<const std::uint8_t*>(table_.dense);
            for (std::int64_t i = 0; i < table_.width; ++i)
                to[i] = number(rows, table_.dense_type, id * table_.width + i);
            continue;
        }
        for (const Matrix& range : table_.ranges) {
            dequantize(kernel_, range, id, id + 1, to, Number::float32, form_.width);
            to += range.columns;
        }
    }
}

void Decoder::enter_normed(const Team& team, const NormTerms& norm, Tensor& tensor, std::int64_t tokens, float* room) {
    const auto [first, last] = team.share(tokens);
    for (std::int64_t t = first; t < last; ++t) {
        functions_.norm(hidden_.get() + t * form_.width, form_.width, norm.gain, norm.bias, norm.eps, room);
        for (const auto& site : tensor.sites) site->enter(t, room, room + form_.width);
    }
    team.meet();
}

void Decoder::run_layer(const Team& team, const Pass& pass, std::int64_t index) {
    Layer& layer = layers_[static_cast<std::size_t>(index)];
    Scratch& scratch = scratch_[static_cast<std::size_t>(team.index)];
    const auto tokens = static_cast<std::int64_t>(pass.ids.size());
    const auto nothing = [](std::size_t, std::int64_t, std::int64_t) {};
    const auto add_to_hidden = [&](Tensor& tensor) {
        return [this, tokens, result = tensor.sites[0]->result(0)](std::size_t, std::int64_t first, std::int64_t last) {
            for (std::int64_t t = 0; t < tokens; ++t)
                functions_.add(hidden_.get() + t * form_.width + first, result + t * form_.width + first, last - first);
        };
    };
    const auto multiply = [&](Tensor& tensor, auto finish) {
        for (const auto& site : tensor.sites) site->multiply(team, scratch, finish);
        team.meet();
    };
    const auto enter = [&](Tensor& tensor, const float* x) {
        Site& site = *tensor.sites[0];
        const auto [first, last] = team.share(tokens);
        for (std::int64_t t = first; t < last; ++t) site.enter(t, x + t * site.width(), scratch.numbers.get());
        team.meet();
    };

    if (team.index == 0)
        for (Tensor* tensor : {&layer.attention_in, &layer.attention_out, &layer.mlp_in, &layer.mlp_hidden})
            for (const auto& site : tensor->sites) site->begin(tokens);
    team.meet();
    enter_normed(team, layer.attention_norm, layer.attention_in, tokens, scratch.numbers.get());
    multiply(layer.attention_in, nothing);
    run_heads(team, pass, index);
    team.meet();
    attention_.run(team, layer.attention, index, queries_.get(), attended_.get(), scratch);
    team.meet();
    enter(layer.attention_out, attended_.get());
    multiply(layer.attention_out, add_to_hidden(layer.attention_out));
    enter_normed(team, layer.mlp_norm, layer.mlp_in, tokens, scratch.numbers.get());
    multiply(layer.mlp_in, nothing);
    const std::int64_t hidden = layer.mlp_hidden.sites[0]->width();
    const float *gate = result_of(layer.mlp_in, layer.gate), *up = result_of(layer.mlp_in, layer.up);
    const auto [first, last] = team.share(tokens);
    for (std::int64_t t = first; t < last; ++t)
        functions_.gate(form_.gate, gate + t * hidden, up + t * hidden, hidden, gated_.get() + t * hidden);
    // A thread enters the tokens that it has gated.
    enter(layer.mlp_hidden, gated_.get());
    multiply(layer.mlp_hidden, add_to_hidden(layer.mlp_hidden));
}

void Decoder::rotate(const float* cos, const float* sin, float* head) const {
    for (std::int64_t a = 0; a < form_.angles; ++a) {
        const float x = head[a], y = head[form_.angles + a];
        head[a] = x * cos[a] - y * sin[a];
        head[form_.angles + a] = y * cos[a] + x * sin[a];
    }
}

// Queries get norms, positions and the factor of scores; keys and values go to the store.
void Decoder::run_heads(const Team& team, const Pass& pass, std::int64_t index) {
    Layer& layer = layers_[static_cast<std::size_t>(index)];
    const std::int64_t heads = form_.cache.heads, width = form_.cache.width, repeats = form_.query_heads / heads;
    const float *query = result_of(layer.attention_in, layer.query), *key = result_of(layer.attention_in, layer.key),
                *value = result_of(layer.attention_in, layer.value);
    const auto prepared = [&](const float* from, const NormTerms& norm, std::int64_t position, bool rotates, float* to) {
        if (norm.gain != nullptr)
            functions_.norm(from, width, norm.gain, norm.bias, norm.eps, to);
        else
            std::copy(from, from + width, to);
        if (rotates) rotate(cos_ + position * form_.angles, sin_ + position * form_.angles, to);
        if (form_.head_rotation.empty()) return;
        float rotated[256], work[256];
        multiply_hadamard(functions_, form_.head_rotation, to, rotated, work);
        std::copy(rotated, rotated + width, to);
    };
    const auto stretches = static_cast<std::int64_t>(pass.stretches.size());
    for (std::int64_t unit = team.index; unit < stretches * heads; unit += team.threads) {
        const Stretch& stretch = pass.stretches[static_cast<std::size_t>(unit / heads)];
        const std::int64_t head = unit % heads;
        LayerTokens& tokens = stretch.sequence->layer(index);
        const float* center = layer.attention.key_center == nullptr ? nullptr : layer.attention.key_center + head * width;
        for (std::int64_t t = 0; t < stretch.count; ++t) {
            const std::int64_t row = stretch.first + t, position = pass.positions[static_cast<std::size_t>(row)];
            float prepared_key[256];
            prepared(key + (row * heads + head) * width, layer.key_norm, position, !form_.cache.before_rope, prepared_key);
            store_.write_key(tokens, head, stretch.start + t, prepared_key, center);
            store_.write_value(tokens, head, stretch.start + t, value + (row * heads + head) * width);
            for (std::int64_t r = head * repeats; r < (head + 1) * repeats; ++r) {
                float* to = queries_.get() + (row * form_.query_heads + r) * width;
                prepared(query + (row * form_.query_heads + r) * width, layer.query_norm, position, true, to);
                functions_.scale(to, form_.scaling, width);
            }
        }
        store_.code_keys(tokens, head, stretch.start + stretch.count, center);
        store_.code_values(tokens, head, stretch.start + stretch.count);
    }
}

void Decoder::multiply_input(const float* x, float* y) const {
    const std::int64_t widest = *std::max_element(head_widths_.begin(), head_widths_.end());
    std::int64_t first = 0;
    for (const std::int64_t width : head_widths_) {
        std::fill(y + first, y + first + width, 0.0f);
        for (std::int64_t i = 0; i < width; ++i)
            for (std::int64_t j = 0; j < width; ++j) y[first + j] += x[first + i] * head_matrix_[(first + i) * widest + j];
        first += width;
    }
}

void Decoder::run_head(const Team& team, const Pass& pass, float* logits) {
    Scratch& scratch = scratch_[static_cast<std::size_t>(team.index)];
    const auto count = static_cast<std::int64_t>(pass.logits.size());
    if (team.index == 0) {
        head_->begin(count);
        // Logits of a pass are side by side.
        head_->write_to(0, logits + pass.logits.front().second * table_.rows);
    }
    team.meet();
    const auto [first, last] = team.share(count);
    for (std::int64_t i = first; i < last; ++i) {
        const float* x = hidden_.get() + pass.logits[static_cast<std::size_t>(i)].first * form_.width;
        float *normed = scratch.numbers.get(), *mixed = normed + form_.width;
        functions_.norm(x, form_.width, final_norm_.gain, final_norm_.bias, final_norm_.eps, normed);
        if (head_matrix_ != nullptr) {
            multiply_input(normed, mixed);
            std::swap(normed, mixed);
        }
        head_->enter(i, normed, scratch.numbers.get() + 2 * form_.width);
    }
    team.meet();
    head_->multiply(team, scratch, [](std::size_t, std::int64_t, std::int64_t) {});
}

}  // namespace subnibble
