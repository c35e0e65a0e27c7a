// Plain C++, for any processor.
#include "floats.hpp"

namespace {

struct Portable {
    struct Floats {
        float lanes[kBlock];
    };
    static constexpr int kTile = 4;
    static constexpr int blocks(int) { return 1; }

    static Floats zero() { return {}; }
    static Floats load(const float* from) {
        Floats floats;
        std::memcpy(floats.lanes, from, sizeof floats);
        return floats;
    }
    static void store(float* to, const Floats& floats) { std::memcpy(to, floats.lanes, sizeof floats); }
    EFX_INLINE static inline Floats multiply_add(Floats sum, const Floats& floats, float x) {
        for (int i = 0; i < kBlock; i++) sum.lanes[i] += floats.lanes[i] * x;
        return sum;
    }
    EFX_INLINE static inline Floats multiply_add(Floats sum, const Floats& floats, const Floats& x) {
        for (int i = 0; i < kBlock; i++) sum.lanes[i] += floats.lanes[i] * x.lanes[i];
        return sum;
    }
    static void expand_pairs(uint32_t mask, const uint16_t* values, Floats* vectors) {
        vectors[0] = vectors[1] = {};
        for (; mask; mask &= mask - 1) {
            const int bit = __builtin_ctz(mask);
            vectors[bit % 2].lanes[bit / 2] = to_float(*values++);
        }
    }
    static void expand_bytes(uint64_t mask, const int8_t* values, Floats* vectors) {
        vectors[0] = vectors[1] = vectors[2] = vectors[3] = {};
        for (; mask; mask &= mask - 1) {
            const int bit = __builtin_ctzll(mask);
            vectors[bit % 4].lanes[bit / 4] = *values++;
        }
    }
    static void expand_nibbles(uint64_t mask, Nibbles values, Floats* vectors) {
        vectors[0] = vectors[1] = vectors[2] = vectors[3] = {};
        for (; mask; mask &= mask - 1, values += 1) {
            const int bit = __builtin_ctzll(mask), nibble = *values.at() >> values.bit() & 15;
            vectors[efx::kInt4Order[bit % 4]].lanes[bit / 4] = static_cast<float>((nibble ^ 8) - 8);
        }
    }
};

}  // namespace

const efx::Isa efx::portable = kFloatIsa<Portable>;
