// AVX2 and FMA: eight values are moved under one byte of the mask by a shuffle that a table gives.
#include <immintrin.h>

#include "floats.hpp"

namespace {

struct Shuffles {
    alignas(64) uint8_t bytes[256][16];
};

// For each byte of a mask, the shuffle that moves the k-th word to the k-th set bit and clears the others.
constexpr Shuffles make_shuffles() {
    Shuffles shuffles{};
    for (int mask = 0; mask < 256; mask++) {
        uint8_t next = 0;
        for (int bit = 0; bit < 8; bit++) {
            const bool is_set = mask >> bit & 1;
            shuffles.bytes[mask][2 * bit] = is_set ? next : 0x80;
            shuffles.bytes[mask][2 * bit + 1] = is_set ? next + 1 : 0x80;
            next += is_set ? 2 : 0;
        }
    }
    return shuffles;
}

constexpr Shuffles kShuffles = make_shuffles();

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
    EFX_INLINE static inline void expand_pairs(uint32_t mask, const uint16_t* values, Floats* vectors) {
        const __m256i upper = expand(mask, values);
        const __m256i lower = expand(mask >> 16, values + __builtin_popcount(mask & 0xFFFF));
        const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
        vectors[0] = {_mm256_castsi256_ps(_mm256_slli_epi32(upper, 16)),
                      _mm256_castsi256_ps(_mm256_slli_epi32(lower, 16))};
        vectors[1] = {_mm256_castsi256_ps(_mm256_and_si256(upper, odd)),
                      _mm256_castsi256_ps(_mm256_and_si256(lower, odd))};
    }

   private:
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
