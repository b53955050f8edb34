// 128-bit vectors of ARMv8.2 with dot products of bytes.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "matrix.h"

namespace {

struct V {
    static constexpr int lanes = 4, registers = 16;
    using F = float32x4_t;
    using I = uint32x4_t;

    static F broadcast(float value) { return vdupq_n_f32(value); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F sub(F a, F b) { return vsubq_f32(a, b); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static I load_bytes(const void* from) { return vreinterpretq_u32_u8(vld1q_u8(static_cast<const std::uint8_t*>(from))); }
    static void store_bytes(void* to, I a) { vst1q_u8(static_cast<std::uint8_t*>(to), vreinterpretq_u8_u32(a)); }
    static F load_floats(const float* from) { return vld1q_f32(from); }
    static void store_floats(float* to, F a) { vst1q_f32(to, a); }
    static I bytes(int value) { return vreinterpretq_u32_u8(vdupq_n_u8(static_cast<std::uint8_t>(value))); }
    static I broadcast_int(std::int32_t value) { return vdupq_n_u32(static_cast<std::uint32_t>(value)); }
    static I broadcast_bytes(const std::int8_t* from) {
        std::uint32_t four;
        std::memcpy(&four, from, 4);
        return vdupq_n_u32(four);
    }
    template <int COUNT>
    static I right(I a) {
        if constexpr (COUNT == 0) return a;
        else return vshrq_n_u32(a, COUNT);
    }
    // Of signed words.
    template <int COUNT>
    static I signed_right(I a) {
        return vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(a), COUNT));
    }
    template <int COUNT>
    static I left(I a) {
        return vshlq_n_u32(a, COUNT);
    }
    static I right_by(I a, int count) { return vshlq_u32(a, vdupq_n_s32(-count)); }
    static I bits_and(I a, I b) { return vandq_u32(a, b); }
    // Bits of low where mask has them, of high where only all has them.
    static I merge(I high, I low, I mask, I all) { return vandq_u32(vbslq_u32(mask, low, high), all); }
    static I choose_bytes(uint8x16_t table, I code) {
        return vreinterpretq_u32_u8(vqtbl1q_u8(table, vreinterpretq_u8_u32(code)));
    }
    static uint8x16_t e2m1_levels() {
        static const std::uint8_t levels[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
        return vld1q_u8(levels);
    }
    static I widen(const std::uint8_t* from) {
        std::uint32_t four;
        std::memcpy(&four, from, 4);
        return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
    }
    static I add_int(I a, I b) { return vaddq_u32(a, b); }
    static I sub_int(I a, I b) { return vsubq_u32(a, b); }
    static I mul_int(I a, I b) { return vmulq_u32(a, b); }
    static F to_float(I a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
    static F numbers(const std::uint8_t* from, subnibble::Number type) {
        if (type == subnibble::Number::float32) return vreinterpretq_f32_u8(vld1q_u8(from));
        const uint16x4_t halves = vreinterpret_u16_u8(vld1_u8(from));
        if (type == subnibble::Number::float16) return vcvt_f32_f16(vreinterpret_f16_u16(halves));
        return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(halves), 16));
    }
    // Whether a WIDE `dot` costs no more than another.
    static constexpr bool wide = false;
    // Adds products of unsigned bytes of `level`, 127 at most unless WIDE, and signed bytes of x, four in each lane.
    template <bool WIDE>
    static I dot(I sum, I level, I x) {
        const int8x16_t factors = vreinterpretq_s8_u32(x);
        int32x4_t result = vreinterpretq_s32_u32(sum);
        if constexpr (WIDE) {
            // Signed bytes end at 127: the highest bit apart.
            const uint8x16_t bytes = vreinterpretq_u8_u32(level);
            const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 7));
            result = vaddq_s32(result, vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), high, factors), 7));
            return vreinterpretq_u32_s32(
                vdotq_s32(result, vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(127))), factors));
        } else {
            return vreinterpretq_u32_s32(vdotq_s32(result, vreinterpretq_s8_u32(level), factors));
        }
    }
    static void round_to_int(const float* x, float factor, std::int64_t count, std::int32_t* out) {
        std::int64_t i = 0;
        for (; i + 4 <= count; i += 4) vst1q_s32(out + i, vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), factor)));
        for (; i < count; ++i) out[i] = vcvtns_s32_f32(x[i] * factor);
    }
};

}  // namespace
