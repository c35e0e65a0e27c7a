// The loops over rows and words, written once and compiled for each instruction set.
//
// An `Isa` has, for words of 64 weights of which `n` exist:
//   nonzeros(weights, n, magnitude)              the bits of the non-zeros
//   compress(weights, nonzeros, kept, to, room)  write the weights under `kept`, 0 for those outside of `nonzeros`
//   expand(from, left, mask, weights, n)         write n weights: the next value under a set bit, else 0
// None of them touches a weight beyond n, a value beyond `room` or `left`, or checks that the bits of a mask fit into
// them: that is done here. Everything has internal linkage, for the linker must not mix up instruction sets.
#pragma once

#include <cstring>

#include "bits.hpp"

namespace {

constexpr int64_t kWord = 64;
constexpr uint64_t kOnes = 0x1111111111111111;  // one in each four bits
constexpr uint64_t kTwos = 2 * kOnes;

inline uint64_t first_lanes(int64_t n) { return n < kWord ? (uint64_t{1} << n) - 1 : ~uint64_t{0}; }

inline uint64_t load_word(const uint8_t* mask, int64_t n) {
    uint64_t word = 0;
    std::memcpy(&word, mask, n == kWord ? 8 : (n + 7) / 8);
    return word;
}

// Bits set in each four, as the four's own four bits.
inline uint64_t count_fours(uint64_t word) {
    uint64_t pairs = word - ((word >> 1) & 0x5555555555555555);
    return (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333);
}

// Adding 5 carries 3 and 4 into the highest bit of their four.
inline uint64_t fours_above_two(uint64_t counts) { return (counts + 0x5555555555555555) & 0x8888888888888888; }

// Add bits from the lowest on to every four that has fewer than two.
inline uint64_t fill_fours(uint64_t word) {
    uint64_t counts = count_fours(word);
    for (int bit = 0; bit < 4; bit++) {
        uint64_t below_two = ~(counts + 6 * kOnes) >> 3 & kOnes;
        uint64_t added = below_two & ~(word >> bit);
        word |= added << bit;
        counts += added;
    }
    return word;
}

// Walk a row in words of 64 columns, the last of which may have fewer. `step(column, n)` returns 0, or a Status to end.
template <class Step>
inline int64_t for_each_word(int64_t columns, Step step) {
    int64_t column = 0;
    for (; column + kWord <= columns; column += kWord) {
        if (int64_t status = step(column, kWord)) return status;
    }
    return column < columns ? step(column, columns - column) : 0;
}

template <class T, class Isa, bool kFours>
int64_t pack_rows(const efx::Pack& pack) {
    const T* weight = static_cast<const T*>(pack.weight);
    T* packed = static_cast<T*>(pack.packed);
    const T magnitude = static_cast<T>(pack.magnitude);
    const int64_t mask_width = (pack.columns + 7) / 8;
    int64_t done = 0;
    for (int64_t row = 0; row < pack.rows; row++) {
        const int64_t before = done;
        const T* from = weight + row * pack.columns;
        uint8_t* mask = pack.mask + row * mask_width;
        const auto step = [&](int64_t column, int64_t n) __attribute__((always_inline)) -> int64_t {
            const uint64_t nonzeros = Isa::nonzeros(from + column, n, magnitude);
            uint64_t kept = nonzeros;
            if (kFours) {
                const uint64_t counts = count_fours(nonzeros);
                if (fours_above_two(counts)) return efx::kNot24;
                // Pruning leaves two in nearly every four, so filling up is the exception.
                if ((counts ^ kTwos) & first_lanes(n)) kept = fill_fours(nonzeros) & first_lanes(n);
            }
            std::memcpy(mask + column / 8, &kept, n == kWord ? 8 : (n + 7) / 8);
            const int64_t count = __builtin_popcountll(kept);
            if (packed) {
                if (count > pack.packed_size - done) return efx::kRoom;
                Isa::compress(from + column, nonzeros, kept, packed + done, pack.packed_size - done);
            }
            done += count;
            return 0;
        };
        if (int64_t status = for_each_word(pack.columns, step)) return status;
        pack.counts[row] = done - before;
    }
    return done;
}

template <class T, class Isa>
int64_t unpack_rows(const efx::Unpack& unpack) {
    const T* packed = static_cast<const T*>(unpack.packed);
    T* weight = static_cast<T*>(unpack.weight);
    const int64_t mask_width = (unpack.columns + 7) / 8;
    int64_t done = 0;
    for (int64_t row = 0; row < unpack.rows; row++) {
        const uint8_t* mask = unpack.mask + row * mask_width;
        T* to = weight + row * unpack.columns;
        const auto step = [&](int64_t column, int64_t n) __attribute__((always_inline)) -> int64_t {
            const uint64_t word = load_word(mask + column / 8, n);
            if (word & ~first_lanes(n)) return efx::kPadding;
            const int64_t count = __builtin_popcountll(word);
            if (count > unpack.packed_size - done) return efx::kRoom;
            Isa::expand(packed + done, unpack.packed_size - done, word, to + column, n);
            done += count;
            return 0;
        };
        if (int64_t status = for_each_word(unpack.columns, step)) return status;
    }
    return done == unpack.packed_size ? done : efx::kUnused;
}

template <class Isa>
struct CodecOf {
    static int64_t pack(const efx::Pack& pack) {
        switch (pack.width) {
            case 1:
                return pack.fours ? pack_rows<uint8_t, Isa, true>(pack) : pack_rows<uint8_t, Isa, false>(pack);
            case 2:
                return pack.fours ? pack_rows<uint16_t, Isa, true>(pack) : pack_rows<uint16_t, Isa, false>(pack);
            case 4:
                return pack.fours ? pack_rows<uint32_t, Isa, true>(pack) : pack_rows<uint32_t, Isa, false>(pack);
        }
        return efx::kWidth;
    }

    static int64_t unpack(const efx::Unpack& unpack) {
        switch (unpack.width) {
            case 1:
                return unpack_rows<uint8_t, Isa>(unpack);
            case 2:
                return unpack_rows<uint16_t, Isa>(unpack);
            case 4:
                return unpack_rows<uint32_t, Isa>(unpack);
        }
        return efx::kWidth;
    }

    static void count(const efx::Mask& mask, int64_t* counts) {
        const int64_t mask_width = (mask.columns + 7) / 8;
        for (int64_t row = 0; row < mask.rows; row++) {
            int64_t count = 0;
            for_each_word(8 * mask_width, [&](int64_t column, int64_t n) {
                count += __builtin_popcountll(load_word(mask.bytes + row * mask_width + column / 8, n));
                return 0;
            });
            counts[row] = count;
        }
    }

    static int64_t fours(const efx::Mask& mask) {
        const int64_t mask_width = (mask.columns + 7) / 8;
        uint64_t above_two = 0, not_two = 0;
        for (int64_t row = 0; row < mask.rows; row++) {
            for_each_word(mask.columns, [&](int64_t column, int64_t n) {
                const uint64_t lanes = first_lanes(n);
                const uint64_t counts = count_fours(load_word(mask.bytes + row * mask_width + column / 8, n) & lanes);
                above_two |= fours_above_two(counts);
                not_two |= (counts ^ kTwos) & lanes;
                return 0;
            });
        }
        return above_two ? 0 : not_two ? 1 : 2;
    }

    static constexpr efx::Codec table{pack, unpack, count, fours};
};

}  // namespace
