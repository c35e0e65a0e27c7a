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

#ifdef __AVX512BW__
// Sixty-four, sixteen by sixteen: no table, for each byte counts in its register how many are kept before it.
EFX_INLINE inline __m512i expand_sixty_four(uint64_t mask, const int8_t* values) {
    __m512i kept = _mm512_movm_epi8(mask);  // -1 for a byte that is kept
    kept = _mm512_add_epi8(kept, _mm512_bslli_epi128(kept, 1));
    kept = _mm512_add_epi8(kept, _mm512_bslli_epi128(kept, 2));
    kept = _mm512_add_epi8(kept, _mm512_bslli_epi128(kept, 4));
    kept = _mm512_add_epi8(kept, _mm512_bslli_epi128(kept, 8));           // -n for the n-th of sixteen
    const __m512i places = _mm512_xor_si512(kept, _mm512_set1_epi8(-1));  // n - 1
    const auto load = [&](uint64_t before) EFX_INLINE {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + __builtin_popcountll(before)));
    };
    __m512i four = _mm512_castsi128_si512(load(0));
    four = _mm512_mask_broadcast_i32x4(four, 0x00F0, load(mask & 0xFFFF));
    four = _mm512_mask_broadcast_i32x4(four, 0x0F00, load(mask & 0xFFFF'FFFF));
    four = _mm512_mask_broadcast_i32x4(four, 0xF000, load(mask & 0xFFFF'FFFF'FFFF));
    return _mm512_maskz_shuffle_epi8(mask, four, places);
}
#endif

}  // namespace
