// AVX2 and FMA. PDEP would move nibbles at once, but takes hundreds of cycles before Zen 3.
#include <immintrin.h>

#include "expand_sixteen.hpp"
#include "floats.hpp"

namespace {

struct Avx2 {
    struct Floats {
        __m256 upper, lower;  // rows 0 to 7, 8 to 15
    };
    static constexpr int kTile = 6;
    static constexpr int blocks(int m) { return m == 1 ? 2 : 1; }

    static Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
    EFX_INLINE static inline void store(float* to, const Floats& floats) {
        _mm256_storeu_ps(to, floats.upper);
        _mm256_storeu_ps(to + 8, floats.lower);
    }
    EFX_INLINE static inline Floats multiply_add(Floats sum, const Floats& floats, float x) {
        const __m256 many = _mm256_set1_ps(x);
        return {_mm256_fmadd_ps(floats.upper, many, sum.upper), _mm256_fmadd_ps(floats.lower, many, sum.lower)};
    }
    EFX_INLINE static inline Floats multiply_add(Floats sum, const Floats& floats, const Floats& x) {
        return {_mm256_fmadd_ps(floats.upper, x.upper, sum.upper), _mm256_fmadd_ps(floats.lower, x.lower, sum.lower)};
    }
    EFX_INLINE static inline void expand_pairs(uint32_t mask, const uint16_t* values, Floats* vectors) {
        const __m256i upper = expand(mask, values);
        const __m256i lower = expand(mask >> 16, values + __builtin_popcount(mask & 0xFFFF));
        const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
        vectors[0] = {_mm256_castsi256_ps(_mm256_slli_epi32(upper, 16)),
                      _mm256_castsi256_ps(_mm256_slli_epi32(lower, 16))};
        vectors[1] = {_mm256_castsi256_ps(_mm256_and_si256(upper, odd)),
                      _mm256_castsi256_ps(_mm256_and_si256(lower, odd))};
    }
    EFX_INLINE static inline void expand_bytes(uint64_t mask, const int8_t* values, Floats* vectors) {
        const __m256i upper = expand_half(mask, values);  // four columns of eight rows
        const __m256i lower = expand_half(mask >> 32, values + __builtin_popcountll(mask & 0xFFFFFFFF));
        unroll<4>([&](auto c) EFX_INLINE { vectors[c] = {column<c>(upper), column<c>(lower)}; });
    }
    EFX_INLINE static inline void expand_nibbles(uint64_t mask, Nibbles values, Floats* vectors) {
        // Four rows each, the four values of a column together.
        const __m128i by_column = _mm_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15);
        __m128i rows[4];
        unroll<4>([&](auto i) EFX_INLINE {
            const __m128i first = expand_eight(mask >> 16 * i & 0xFF, values);
            const __m128i second = expand_eight(mask >> (16 * i + 8) & 0xFF, values);
            rows[i] = _mm_shuffle_epi8(_mm_unpacklo_epi64(first, second), by_column);
        });
        const __m128i upper01 = _mm_unpacklo_epi32(rows[0], rows[1]), upper23 = _mm_unpackhi_epi32(rows[0], rows[1]);
        const __m128i lower01 = _mm_unpacklo_epi32(rows[2], rows[3]), lower23 = _mm_unpackhi_epi32(rows[2], rows[3]);
        vectors[0] = nibbles_to_floats(_mm_unpacklo_epi64(upper01, lower01));
        vectors[1] = nibbles_to_floats(_mm_unpackhi_epi64(upper01, lower01));
        vectors[2] = nibbles_to_floats(_mm_unpacklo_epi64(upper23, lower23));
        vectors[3] = nibbles_to_floats(_mm_unpackhi_epi64(upper23, lower23));
    }

   private:
    EFX_INLINE static inline __m256i expand_half(uint64_t mask, const int8_t* values) {
        const uint32_t first = mask & 0xFFFF, second = mask >> 16 & 0xFFFF;
        return _mm256_set_m128i(expand_sixteen(second, values + __builtin_popcount(first)),
                                expand_sixteen(first, values));
    }
    template <int c>
    EFX_INLINE static inline __m256 column(__m256i fours) {
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(c == 3 ? fours : _mm256_slli_epi32(fours, 24 - 8 * c), 24));
    }
    // Two rows of four columns, under 8 bits of the mask: bytes, each a nibble; `values` goes on behind them.
    EFX_INLINE static inline __m128i expand_eight(uint64_t mask, Nibbles& values) {
        const __m128i half = _mm_set1_epi8(15);
        const __m128i loaded = _mm_cvtsi64_si128(static_cast<int64_t>(load64(values.at()) >> values.bit()));
        values += __builtin_popcountll(mask);
        const __m128i even = _mm_and_si128(loaded, half), odd = _mm_and_si128(_mm_srli_epi16(loaded, 4), half);
        const __m128i shuffle = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kByteShuffles.bytes[mask]));
        return _mm_shuffle_epi8(_mm_unpacklo_epi8(even, odd), shuffle);
    }
    EFX_INLINE static inline Floats nibbles_to_floats(__m128i nibbles) {
        const __m128i values = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
        const __m128i bytes = _mm_shuffle_epi8(values, nibbles);
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
    }
    // Two columns of eight rows, under 16 bits of the mask.
    EFX_INLINE static inline __m256i expand(uint32_t mask, const uint16_t* values) {
        const uint32_t first = mask & 0xFF, second = mask >> 8 & 0xFF;
        return _mm256_set_m128i(expand_byte(second, values + __builtin_popcount(first)), expand_byte(first, values));
    }
    EFX_INLINE static inline __m128i expand_byte(uint32_t mask, const uint16_t* values) {
        const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        return _mm_shuffle_epi8(loaded, _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffles.bytes[mask])));
    }
};

}  // namespace

const efx::Isa efx::avx2 = kFloatIsa<Avx2>;
