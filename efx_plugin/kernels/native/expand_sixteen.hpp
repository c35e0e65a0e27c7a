// Expansion of bytes on x86-64 before VBMI2.
#pragma once

#include <immintrin.h>

#include "linear.hpp"
#include "shuffles.hpp"

namespace {

// Sixteen bytes under 16 bits of the mask.
EFX_INLINE inline __m128i expand_sixteen(uint32_t mask, const int8_t* values) {
    const uint32_t first = mask & 0xFF, second = mask >> 8;
    const __m128 low = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kByteShuffles.bytes[first])));
    const __m128 both = _mm_loadh_pi(low, reinterpret_cast<const __m64*>(kByteShuffles.bytes[second]));
    // The second eight follow on the first; what is to be cleared stays so.
    const int n = __builtin_popcount(first);
    const __m128i offsets = _mm_load_si128(reinterpret_cast<const __m128i*>(kOffsets.bytes[n]));
    return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)),
                            _mm_add_epi8(_mm_castps_si128(both), offsets));
}

#ifdef __AVX512F__
EFX_INLINE inline __m512i join(const __m128i* four) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(four[1], four[0])),
                              _mm256_set_m128i(four[3], four[2]), 1);
}

// Sixty-four.
EFX_INLINE inline __m512i expand_sixty_four(uint64_t mask, const int8_t* values) {
    __m128i parts[4];
    unroll<4>([&](auto i) EFX_INLINE {
        const uint32_t kept = mask >> 16 * i & 0xFFFF;
        parts[i] = expand_sixteen(kept, values);
        values += __builtin_popcount(kept);
    });
    return join(parts);
}
#endif

}  // namespace
