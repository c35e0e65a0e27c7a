// What the files for aarch64 share: vectors of 16 rows, and expansion by shuffles of 16 bytes.
#pragma once

#include <arm_neon.h>

#include "linear.hpp"
#include "shuffles.hpp"

namespace {

// A group, each row's columns together.
struct Group {
    uint8x16_t fours[4];  // rows 0 to 3, ...
};

struct Floats {
    float32x4_t fours[4];
};

EFX_INLINE inline void store(float* to, const Floats& floats) {
    unroll<4>([&](auto i) EFX_INLINE { vst1q_f32(to + 4 * i, floats.fours[i]); });
}

// The bytes of a mask, and how many bits are set before each of them: at most 56, which a byte holds.
struct MaskBytes {
    uint64_t mask, before;

    EFX_INLINE explicit MaskBytes(uint64_t mask) : mask(mask) {
        const uint64_t counts = vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(mask))), 0);
        before = counts * 0x0101'0101'0101'0100;
    }
    EFX_INLINE int at(int i) const { return mask >> 8 * i & 0xFF; }
    EFX_INLINE int count_before(int i) const { return before >> 8 * i & 0xFF; }
};

// Sixteen bytes under bytes i and i + 1 of the mask.
EFX_INLINE inline uint8x16_t expand_sixteen(const MaskBytes& mask, int i, uint8x16_t values) {
    const uint8x16_t both = vcombine_u8(vld1_u8(kByteShuffles.bytes[mask.at(i)]),
                                        vld1_u8(kByteShuffles.bytes[mask.at(i + 1)]));
    // The second eight follow on the first; what is to be cleared stays so.
    const int n = mask.count_before(i + 1) - mask.count_before(i);
    return vqtbl1q_u8(values, vaddq_u8(both, vld1q_u8(kOffsets.bytes[n])));
}

EFX_INLINE inline Group expand_pairs(uint32_t mask, const uint16_t* values) {
    const MaskBytes bytes(mask);
    Group group;
    unroll<4>([&](auto i) EFX_INLINE {
        const uint8x16_t loaded = vreinterpretq_u8_u16(vld1q_u16(values + bytes.count_before(i)));
        group.fours[i] = vqtbl1q_u8(loaded, vld1q_u8(kShuffles.bytes[bytes.at(i)]));
    });
    return group;
}

EFX_INLINE inline Group expand_bytes(uint64_t mask, const int8_t* values) {
    const MaskBytes bytes(mask);
    Group group;
    unroll<4>([&](auto i) EFX_INLINE {
        const int8x16_t loaded = vld1q_s8(values + bytes.count_before(2 * i));
        group.fours[i] = expand_sixteen(bytes, 2 * i, vreinterpretq_u8_s8(loaded));
    });
    return group;
}

// Bytes, each a nibble.
EFX_INLINE inline Group expand_nibbles(uint64_t mask, const Nibbles& values) {
    const MaskBytes bytes(mask);
    Group group;
    unroll<4>([&](auto i) EFX_INLINE {
        Nibbles from = values;
        from += bytes.count_before(2 * i);
        const uint8x16_t loaded = vreinterpretq_u8_u64(vdupq_n_u64(from.sixteen()));
        const uint8x16_t even = vandq_u8(loaded, vdupq_n_u8(15)), odd = vshrq_n_u8(loaded, 4);
        group.fours[i] = expand_sixteen(bytes, 2 * i, vzip1q_u8(even, odd));
    });
    return group;
}

// Bytes, each an int8.
EFX_INLINE inline Group expand_signed_nibbles(uint64_t mask, const Nibbles& values) {
    static constexpr int8_t kValues[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    const uint8x16_t table = vreinterpretq_u8_s8(vld1q_s8(kValues));
    Group group = expand_nibbles(mask, values);
    unroll<4>([&](auto i) EFX_INLINE { group.fours[i] = vqtbl1q_u8(table, group.fours[i]); });
    return group;
}

// The c-th of each row's four int8, as floats: it is moved to the top of 32 bits, of which the others are fractions.
template <int c>
EFX_INLINE inline float32x4_t column_of(uint8x16_t rows) {
    static constexpr uint32_t kTops[4] = {0x00FF'FFFF | c << 24, 0x00FF'FFFF | (4 + c) << 24,
                                          0x00FF'FFFF | (8 + c) << 24, 0x00FF'FFFF | (12 + c) << 24};
    const uint8x16_t tops = vqtbl1q_u8(rows, vreinterpretq_u8_u32(vld1q_u32(kTops)));
    return vcvtq_n_f32_s32(vreinterpretq_s32_u8(tops), 24);
}

}  // namespace
