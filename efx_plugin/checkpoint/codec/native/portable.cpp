// Plain C++17, for any little-endian machine.
#include "rows.hpp"

namespace {

struct Portable {
    template <class T>
    static uint64_t nonzeros(const T* weights, int64_t n, T magnitude) {
        uint8_t flags[kWord] = {};  // one byte each, which compilers vectorize
        if (n == kWord) {
            for (int64_t i = 0; i < kWord; i++) flags[i] = (weights[i] & magnitude) != 0;
        } else {
            for (int64_t i = 0; i < n; i++) flags[i] = (weights[i] & magnitude) != 0;
        }
        uint64_t bits = 0;
        for (int64_t byte = 0; byte < 8; byte++) {
            uint64_t eight;
            std::memcpy(&eight, flags + 8 * byte, 8);
            // The factor moves the flag of byte i to bit 56 + i, and no two of its products meet.
            bits |= (eight * 0x0102040810204080 >> 56) << 8 * byte;
        }
        return bits;
    }

    template <class T>
    static void compress(const T* weights, uint64_t nonzeros, uint64_t kept, T* to, int64_t) {
        for (; kept; kept &= kept - 1) {
            const int lane = __builtin_ctzll(kept);
            *to++ = nonzeros >> lane & 1 ? weights[lane] : T{0};
        }
    }

    template <class T>
    static void expand(const T* from, int64_t, uint64_t mask, T* weights, int64_t n) {
        std::memset(weights, 0, n * sizeof(T));
        for (; mask; mask &= mask - 1) weights[__builtin_ctzll(mask)] = *from++;
    }
};

}  // namespace

const efx::Codec efx::portable = CodecOf<Portable>::table;
