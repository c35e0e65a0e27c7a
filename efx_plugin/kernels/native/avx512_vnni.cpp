// AVX-512 with VNNI, without BF16 (Intel Cascade Lake and Ice Lake): int8 activations are multiplied in integers, all else as
// without VNNI.
#include <immintrin.h>

#include "expand_sixteen.hpp"
#include "linear.hpp"
#include "pack.hpp"
#include "vnni.hpp"

namespace {

struct Shuffled : Registers {
    EFX_INLINE static inline void round(const float* floats, uint16_t* bf16) {
        for (int i = 0; i < kBlock; i++) bf16[i] = to_bf16(floats[i]);
    }
    EFX_INLINE static inline __m512i expand_bytes(uint64_t mask, const int8_t* values) {
        return expand_sixty_four(mask, values);
    }
    EFX_INLINE static inline __m512i expand_nibbles(uint64_t mask, Nibbles values) {
        __m128i rows[4];  // each four rows of four columns
        unroll<4>([&](auto i) EFX_INLINE {
            const uint64_t kept = mask >> 16 * i & 0xFFFF;
            const uint64_t moved = _pdep_u64(values.sixteen(), 15 * _pdep_u64(kept, 0x1111'1111'1111'1111));
            const __m128i pairs = _mm_cvtsi64_si128(static_cast<int64_t>(moved));
            rows[i] = _mm_unpacklo_epi8(pairs, _mm_srli_epi16(pairs, 4));
            values += __builtin_popcountll(kept);
        });
        return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(rows[1], rows[0])),
                                  _mm256_set_m128i(rows[3], rows[2]), 1);
    }
};

int64_t linear(const efx::Call& call) {
    switch (call.weight.header->kind) {
        case efx::kInt8Dynamic:
            return Linear<Int8Int8<Shuffled>>::run(call);
        case efx::kInt4Dynamic:
            return Linear<Int4Int8<Shuffled>>::run(call);
        default:
            return efx::avx512.linear(call);
    }
}

}  // namespace

const efx::Isa efx::avx512_vnni{linear, count_block, pack_block};
