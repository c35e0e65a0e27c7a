// Products of int8 activations with weights of 8 and of 4 bits by VNNI, in registers of 512 bits.
//
// A `Simd` is a kind of `Registers` with
//   round(floats, bf16)            as in linear.hpp
//   expand_bytes(mask, values)     a group's 64 bytes, 0 where the mask is 0
//   expand_nibbles(mask, nibbles)  the same, a nibble in the lower half of each byte and anything in the upper half
#pragma once

#include <immintrin.h>

#include "linear.hpp"

namespace {

struct Registers {  // 32 of them
    using Floats = __m512;
    static constexpr int kTile = 24;
    static constexpr bool kSpans = false;
    static constexpr int kShift = 0;
    static constexpr int column(int i) { return i; }
    static constexpr int blocks(int m) { return m <= 4 ? 4 : m <= 8 ? 3 : m <= 13 ? 2 : 1; }
};

inline __m512i broadcast(const void* four_bytes) {
    int32_t bits;
    std::memcpy(&bits, four_bytes, 4);
    return _mm512_set1_epi32(bits);
}

// 16 bfloat16 as floats.
EFX_INLINE inline __m512 load_bf16(const uint16_t* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

struct Int8Weight {
    using Mask = uint64_t;
    using Value = int8_t;
    using Values = const Value*;
    static constexpr int kColumns = 4;
};

// int8 times int8, in integers. The instruction takes one side without a sign: activations are shifted by 128, which adds
// 128 times the sum of the row's weights.
template <class Simd>
struct Int8Int8 : Simd, Int8Weight {
    using Element = uint8_t;
    using Vector = __m512i;
    using Accumulator = __m512i;
    static constexpr int kVectors = 1;

    static Accumulator zero() { return _mm512_setzero_si512(); }
    static Element quantize(float x) { return static_cast<Element>(128 + nearest(x)); }
    EFX_INLINE static inline void expand(Mask mask, const Value* values, Vector* vectors) {
        vectors[0] = Simd::expand_bytes(mask, values);
    }
    EFX_INLINE static inline Accumulator multiply(Accumulator sum, Vector vector, const Element* x) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(broadcast(x)), "v"(vector));  // the intrinsic costs copies
        return sum;
    }
    EFX_INLINE static inline void finish(Accumulator sum, float* floats, const int32_t* sums) {
        const __m512i shift = _mm512_slli_epi32(_mm512_loadu_si512(sums), 7);
        _mm512_store_ps(floats, _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, shift)));
    }
};

// Bytes of rows of four columns into the order of int4, or back.
EFX_INLINE inline __m512i reorder(__m512i bytes) {
    const __m512i order = _mm512_set1_epi32(efx::kInt4Order[0] | efx::kInt4Order[1] << 8 | efx::kInt4Order[2] << 16 |
                                            efx::kInt4Order[3] << 24);
    const __m512i rows_of_lane = _mm512_set4_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0);
    return _mm512_shuffle_epi8(bytes, _mm512_add_epi8(order, rows_of_lane));
}

struct Int4Weight {
    using Mask = uint64_t;
    using Value = uint8_t;
    using Values = Nibbles;
    static constexpr bool kSpans = true;
    static constexpr int kColumns = 4, kTile = 16;

    EFX_INLINE static inline __m512 load_scales(const uint16_t* scales, bool is_fp16) {
        if (!is_fp16) return load_bf16(scales);
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
    }
    EFX_INLINE static inline void store(float* floats, __m512 total) { _mm512_store_ps(floats, total); }
};

// int4 times int8. The weights are the side without a sign: 8 is added to them, zeros too.
template <class Simd>
struct Int4Int8 : Simd, Int4Weight {
    using Element = int8_t;
    using Vector = __m512i;
    using Accumulator = __m512i;
    using Int4Weight::kSpans, Int4Weight::kTile;
    static constexpr int kVectors = 1, kShift = 8;
    static constexpr int blocks(int m) { return m <= 4 ? 4 : m <= 6 ? 3 : m <= 11 ? 2 : 1; }
    static constexpr int column(int i) { return efx::kInt4Order[i]; }

    static Accumulator zero() { return _mm512_setzero_si512(); }
    static Element quantize(float x) { return static_cast<Element>(nearest(x)); }
    EFX_INLINE static inline void expand(Mask mask, const Nibbles& values, Vector* vectors) {
        constexpr int kAndXor = 0x6A;  // (a & b) ^ c
        vectors[0] = _mm512_ternarylogic_epi32(Simd::expand_nibbles(mask, values), _mm512_set1_epi8(15),
                                               _mm512_set1_epi8(8), kAndXor);
    }
    EFX_INLINE static inline Accumulator multiply(Accumulator sum, Vector vector, const Element* x) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(vector), "v"(broadcast(x)));  // the intrinsic costs copies
        return sum;
    }
    EFX_INLINE static inline __m512 add_scaled(__m512 total, Accumulator sum, __m512 scales, int32_t x_sum) {
        const __m512i exact = _mm512_sub_epi32(sum, _mm512_set1_epi32(x_sum));
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scales, total);
    }
};

}  // namespace
