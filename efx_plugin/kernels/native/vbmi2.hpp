// Groups expanded by AVX-512 with VBMI2, into what products of bfloat16 take.
#pragma once

#include <immintrin.h>

#include "linear.hpp"
#include "vnni.hpp"

namespace {

// Groups expand in one instruction.
struct Vbmi2 : Registers {
    EFX_INLINE static inline void round(const float* floats, uint16_t* bf16) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(bf16), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(floats)));
    }
    EFX_INLINE static inline __m512i expand_bytes(uint64_t mask, const int8_t* values) {
        return _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(values));
    }
    EFX_INLINE static inline __m512i expand_nibbles(uint64_t mask, const Nibbles& values) {
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values.bytes));
        const __m512i words = _mm512_cvtepu8_epi16(pairs);
        return _mm512_maskz_expand_epi8(mask, _mm512_or_si512(words, _mm512_slli_epi16(words, 4)));
    }
};

struct FloatSums : Vbmi2 {
    using Vector = __m512i;
    using Accumulator = __m512;
    using Element = uint16_t;
    static Accumulator zero() { return _mm512_setzero_ps(); }
    EFX_INLINE static inline Accumulator multiply(Accumulator sum, Vector vector, const Element* x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)vector, (__m512bh)broadcast(x));
    }
    EFX_INLINE static inline void finish(Accumulator sum, float* floats, const int32_t*) {
        _mm512_store_ps(floats, sum);
    }
};

// bfloat16 times bfloat16.
struct Bf16Bf16 : FloatSums {
    using Mask = uint32_t;
    using Value = uint16_t;
    using Values = const Value*;
    static constexpr int kColumns = 2, kVectors = 1;

    EFX_INLINE static inline void expand(Mask mask, const Value* values, Vector* vectors) {
        vectors[0] = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
    }
};

// int8 times bfloat16: every int8 is a bfloat16.
struct Int8Bf16 : FloatSums, Int8Weight {
    static constexpr int kVectors = 2;
    static constexpr int blocks(int m) { return m <= 4 ? 3 : m <= 8 ? 2 : 1; }

    EFX_INLINE static inline void expand(Mask mask, const Value* values, Vector* vectors) {
        const __m512i fours = expand_bytes(mask, values);
        vectors[0] = pair(floats_of<0>(fours), floats_of<1>(fours));
        vectors[1] = pair(floats_of<2>(fours), floats_of<3>(fours));
    }

   private:
    // Column c of the 16 rows.
    template <int c>
    EFX_INLINE static inline __m512 floats_of(__m512i fours) {
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(c == 3 ? fours : _mm512_slli_epi32(fours, 24 - 8 * c), 24));
    }
    // The upper halves of both, which are all of a small integer.
    EFX_INLINE static inline __m512i pair(__m512 even, __m512 odd) {
        const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
        return _mm512_mask_blend_epi16(0xAAAAAAAA, low, _mm512_castps_si512(odd));
    }
};

// int4 times bfloat16.
struct Int4Bf16 : FloatSums, Int4Weight {
    using Int4Weight::kSpans, Int4Weight::kTile;
    static constexpr int kVectors = 2;
    static constexpr int blocks(int m) { return m <= 1 ? 4 : m <= 4 ? 3 : m <= 8 ? 2 : 1; }

    EFX_INLINE static inline void expand(Mask mask, const Nibbles& values, Vector* vectors) {
        // A look-up takes the lowest five bits of a word.
        alignas(64) static constexpr uint16_t kBf16[32] = {
            0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0,
            0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0,
            0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80};
        const __m512i table = _mm512_load_si512(kBf16), nibbles = expand_nibbles(mask, values);
        vectors[0] = _mm512_permutexvar_epi16(nibbles, table);
        vectors[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, 8), table);
    }
    EFX_INLINE static inline __m512 add_scaled(__m512 total, Accumulator sum, __m512 scales, int32_t) {
        return _mm512_fmadd_ps(sum, scales, total);
    }
};

}  // namespace
