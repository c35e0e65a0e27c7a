// Dots for instruction sets that multiply floats: weights and activations are widened to 32 bits.
//
// A `Simd` has `Floats`, 16 of them, with zero(), load(from), store(to, floats), multiply_add(sum, floats, x), and
//   expand_pairs(mask, values, floats)   bfloat16 groups to floats[2], one column of 16 rows each
// and kTile, blocks(m) as in linear.hpp, for the number of its registers.
#pragma once

#include "linear.hpp"
#include "pack.hpp"

namespace {

template <class Simd>
struct FloatDot : Simd {
    using Vector = typename Simd::Floats;
    using Accumulator = typename Simd::Floats;
    using Element = float;
    static constexpr bool kQuantized = false;

    EFX_INLINE static inline void finish(const Accumulator& sum, float* floats, const int32_t*) {
        Simd::store(floats, sum);
    }
    EFX_INLINE static inline void round(const float* floats, uint16_t* bf16) {
        for (int i = 0; i < kBlock; i++) bf16[i] = to_bf16(floats[i]);
    }
};

template <class Simd>
struct Bf16Float : FloatDot<Simd> {
    using Mask = uint32_t;
    using Value = uint16_t;
    static constexpr int kColumns = 2, kVectors = 2;

    EFX_INLINE static inline void expand(Mask mask, const Value* values, typename Simd::Floats* vectors) {
        Simd::expand_pairs(mask, values, vectors);
    }
    EFX_INLINE static inline typename Simd::Floats multiply(typename Simd::Floats sum,
                                                            const typename Simd::Floats* vectors, const float* x) {
        sum = Simd::multiply_add(sum, vectors[0], x[0]);
        return Simd::multiply_add(sum, vectors[1], x[1]);
    }
};

// int8 weights are expanded value by value.
template <class Simd>
struct Int8Float : FloatDot<Simd> {
    using Mask = uint64_t;
    using Value = int8_t;
    static constexpr int kColumns = 4, kVectors = 4;

    static void expand(Mask mask, const Value* values, typename Simd::Floats* vectors) {
        alignas(64) float floats[4][kBlock] = {};
        for (; mask; mask &= mask - 1) {
            const int bit = __builtin_ctzll(mask);
            floats[bit % 4][bit / 4] = *values++;
        }
        unroll<4>([&](auto c) EFX_INLINE { vectors[c] = Simd::load(floats[c]); });
    }
    EFX_INLINE static inline typename Simd::Floats multiply(typename Simd::Floats sum,
                                                            const typename Simd::Floats* vectors, const float* x) {
        unroll<4>([&](auto c) EFX_INLINE { sum = Simd::multiply_add(sum, vectors[c], x[c]); });
        return sum;
    }
};

// Quantized activations are integers in floats.
template <class Simd>
struct Int8Quantized : Int8Float<Simd> {
    static constexpr bool kQuantized = true;
    static float quantize(float x) { return static_cast<float>(nearest(x)); }
};

template <class Simd>
int64_t linear(const efx::Call& call) {
    switch (call.weight.header->kind) {
        case efx::kBf16:
            return Linear<Bf16Float<Simd>>::run(call);
        case efx::kInt8:
            return Linear<Int8Float<Simd>>::run(call);
        default:
            return Linear<Int8Quantized<Simd>>::run(call);
    }
}

template <class Simd>
constexpr efx::Isa kFloatIsa{linear<Simd>, count_block, pack_block};

}  // namespace
