// For instruction sets without one that expands: the shuffles of bytes that move values under one byte of the mask.
#pragma once

#include <cstdint>

namespace {

template <int kSize>
struct Shuffles {
    alignas(64) uint8_t bytes[256][8 * kSize];
};

// For each byte of a mask, the shuffle that moves the k-th element, of kSize bytes, to the k-th set bit and clears the
// others.
template <int kSize>
constexpr Shuffles<kSize> make_shuffles() {
    Shuffles<kSize> shuffles{};
    for (int mask = 0; mask < 256; mask++) {
        uint8_t next = 0;
        for (int bit = 0; bit < 8; bit++) {
            const bool is_set = mask >> bit & 1;
            for (int i = 0; i < kSize; i++) shuffles.bytes[mask][kSize * bit + i] = is_set ? next + i : 0x80;
            next += is_set ? kSize : 0;
        }
    }
    return shuffles;
}

constexpr Shuffles<1> kByteShuffles = make_shuffles<1>();
constexpr Shuffles<2> kShuffles = make_shuffles<2>();

// Eight bytes of zeros, then eight times the row's number.
struct Offsets {
    alignas(16) uint8_t bytes[9][16];
};

constexpr Offsets make_offsets() {
    Offsets offsets{};
    for (int n = 0; n <= 8; n++) {
        for (int i = 8; i < 16; i++) offsets.bytes[n][i] = n;
    }
    return offsets;
}

constexpr Offsets kOffsets = make_offsets();

}  // namespace
