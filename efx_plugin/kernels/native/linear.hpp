// The loops of the sparse product, written once and compiled for each instruction set.
//
// A `Dot` says how one kind of weight meets one kind of activation:
//   Mask, Value            of the packed weight; kColumns columns per group
//   Values                 a place among values: a pointer, or Nibbles
//   Element                what activations are converted to; a group's kColumns of them lie together
//   column(i)              which of a group's columns is the i-th of them
//   kVectors               vectors that a group expands to
//   Vector, Accumulator    16 rows
//   Floats                 16 floats
//   expand(mask, values, vectors)            the group's vectors, from whole vectors of values
//   multiply(accumulator, vector, elements)  add the products with one row of activations: of each vector with its
//                                            kColumns / kVectors elements
//   quantize(float)                          an element; not for elements that are bfloat16
//   finish(accumulator, floats, sums)        16 floats
//   round(floats, bf16)                      and their roundings
//   kSpans                 whether scales change along the columns; if so, finish is not called, but
//     load_scales(scales, is_fp16)           16 of them, as Floats
//     add_scaled(total, accumulator, scales, x_sum)  the Floats `total` plus a span's sums times its scales
//     store(floats, total)                   to 16 floats
//     kShift               what is added to weights to make them unsigned, or 0; x_sum is kShift times the sum of the
//                          span's elements
//   kTile                  rows of activations, an even number, whose sums fill the registers beside the vectors of two
//                          groups
//   blocks(m)              blocks for which they do, of m <= kTile rows
//
// Up to kTile rows of activations the weight is expanded in registers, straight into the products: the speed is that
// of reading it. Beyond, some hundred columns of a block at a time are expanded into the first-level cache too, and
// serve all further tiles of activations: the speed is that of the products.
//
// Every element of the result is summed in the order of the columns into one accumulator, whichever way is taken: it
// depends neither on the other rows of the batch nor on the number of threads. Where scales change along the columns,
// the accumulator begins again with each span, and its sums are added to totals, which lie in memory.
#pragma once

#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "layout.hpp"

#define EFX_INLINE __attribute__((always_inline))

namespace {

using efx::kBlock;

template <int I>
struct Index {
    static constexpr int value = I;
    constexpr operator int() const { return I; }
};

template <class F, int... I>
EFX_INLINE inline void unroll(F&& f, std::integer_sequence<int, I...>) {
    (f(Index<I>{}), ...);
}

// Call f(Index<0>), f(Index<1>), ...: loops over registers must be gone before registers are assigned.
template <int N, class F>
EFX_INLINE inline void unroll(F&& f) {
    unroll(f, std::make_integer_sequence<int, N>{});
}

inline float to_float(uint16_t bf16) {
    const uint32_t bits = uint32_t{bf16} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float to_float(float value) { return value; }

// Round to nearest, ties to even; a NaN stays one.
inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const uint32_t quiet = bits >> 16 | 0x40;
    return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet : rounded);
}

// The nearest integer, ties to even, of a number between -2^22 and 2^22.
inline int32_t nearest(float value) {
    const float shifted = value + 0x1.8p23f;  // whose last bit counts ones
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    return bits - 0x4B400000;
}

inline uint64_t load64(const uint8_t* bytes) {
    uint64_t value;
    std::memcpy(&value, bytes, 8);
    return value;
}

// A place among values of 4 bits.
struct Nibbles {
    const uint8_t* bytes;
    uint64_t next = 0;

    const uint8_t* at() const { return bytes + next / 2; }
    int bit() const { return next % 2 * 4; }
    uint64_t sixteen() const { return load64(at()) >> bit() | load64(at() + 1) << (8 - bit()); }
    void operator+=(int n) { next += n; }
};

// To the next group, behind n values.
template <class Value>
EFX_INLINE inline void skip(const Value*& values, int n) {
    values += n;
}
EFX_INLINE inline void skip(Nibbles& values, int n) { values.bytes += (n + 1) / 2; }

inline const char* address(const void* values) { return static_cast<const char*>(values); }
inline const char* address(const Nibbles& values) { return reinterpret_cast<const char*>(values.at()); }

// Memory that lives as long as the thread that calls, so that a call allocates only when it needs more than any before.
char* workspace(int64_t size) {
    struct Memory {
        char* begin = nullptr;
        int64_t size = 0;
        ~Memory() { std::free(begin); }
    };
    static thread_local Memory memory;
    if (size > memory.size) {
        std::free(memory.begin);
        size = (size + size / 4 + efx::kAlign - 1) / efx::kAlign * efx::kAlign;
        memory.begin = static_cast<char*>(std::aligned_alloc(efx::kAlign, size));
        memory.size = memory.begin ? size : 0;
    }
    return memory.begin;
}

// Where results go, and what happens to the 16 floats of a block on their way.
template <class Dot>
struct Result {
    const efx::Call& call;
    int64_t first_row;      // rows of activations are counted from it
    const float* x_scales;  // of each of them, or null
    const int32_t* x_sums;  // of each of them, for each span: [spans][rows]; or null
    int64_t m, rows;        // how many they are, and how many are multiplied, see Tiles

    void write(const float* sums, int64_t row, int64_t block) const {
        const int64_t first = block * kBlock;
        const float* scales = call.weight.scales();
        const float x_scale = x_scales ? x_scales[row] : 1.0f;
        float y[kBlock];
        for (int i = 0; i < kBlock; i++) y[i] = sums[i] * (scales ? scales[first + i] * x_scale : x_scale);
        if (call.type == efx::kTypeBf16) {
            add_bias_and_store<uint16_t>(y, row, first);
        } else {
            add_bias_and_store<float>(y, row, first);
        }
    }

    // Where a row's results of a block go.
    char* at(int64_t row, int64_t block) const {
        const int64_t place = (first_row + row) * call.weight.header->rows + block * kBlock;
        return static_cast<char*>(call.y) + place * (call.type == efx::kTypeBf16 ? 2 : 4);
    }

   private:
    template <class T>
    void add_bias_and_store(float* y, int64_t row, int64_t first) const {
        const int64_t rows = call.weight.header->rows;
        const int64_t n = rows - first < kBlock ? rows - first : kBlock;
        if (call.bias) {
            const T* bias = static_cast<const T*>(call.bias) + first;
            for (int i = 0; i < n; i++) y[i] += to_float(bias[i]);
        }
        T rounded[kBlock];
        if constexpr (sizeof(T) == 2) {
            Dot::round(y, rounded);
        } else {
            std::memcpy(rounded, y, sizeof rounded);
        }
        char* to = at(row, first / kBlock);
        if (n == kBlock) {
            std::memcpy(to, rounded, sizeof rounded);
        } else {
            std::memcpy(to, rounded, n * sizeof(T));
        }
    }
};

template <class Dot>
struct Linear {
    using Mask = typename Dot::Mask;
    using Value = typename Dot::Value;
    using Values = typename Dot::Values;
    using Element = typename Dot::Element;
    using Vector = typename Dot::Vector;
    using Accumulator = typename Dot::Accumulator;
    using Total = typename Dot::Floats;

    static constexpr int kColumns = Dot::kColumns;
    static constexpr int kVectors = Dot::kVectors;
    static constexpr bool kIsBf16 = std::is_same_v<Element, uint16_t>;
    static constexpr int64_t kChunk = 256 / kVectors;  // groups expanded at a time
    // Rows of activations that are converted, and multiplied with a block, at once: each block reads them all, so that they
    // had better stay in a cache of a few MB.
    static constexpr int64_t kBytesAtOnce = 4 << 20, kLeastRowsAtOnce = 64, kMostRowsAtOnce = 512;
    static constexpr int64_t kMostTotals = 32;         // of the blocks that are multiplied at once

    struct Stream {
        const Mask* masks;
        Values values;
        const uint16_t* scales;  // of the span, where there are spans
    };

    static Stream stream(const efx::Weight& weight, int64_t block) {
        return {weight.masks<Mask>() + block * weight.header->groups,
                Values{weight.values<Value>() + weight.offsets()[block]},
                Dot::kSpans ? weight.span_scales(block) : nullptr};
    }

    // Where the span of a group ends, and the next ones; counted in groups.
    struct Spans {
        int64_t end, length, last;
        const int32_t* x_sums;  // of the first of the rows of activations, or null
        int64_t rows;           // all rows of activations
        bool is_fp16;
    };

    static Spans spans(const Result<Dot>& result, int64_t row, int64_t group) {
        if constexpr (!Dot::kSpans) return {};
        const efx::Header& header = *result.call.weight.header;
        const int64_t length = header.span < header.columns ? header.span / kColumns : header.groups;
        const int64_t span = group / length;
        const int64_t next = (span + 1) * length;
        return {next < header.groups ? next : header.groups,
                length,
                header.groups,
                result.x_sums ? result.x_sums + span * result.rows + row : nullptr,
                result.rows,
                header.scale_type == efx::kScaleFp16};
    }

    // Add the sums of a span to the totals [kBlocks][M], and begin the next one.
    template <int M, int kBlocks>
    EFX_INLINE static inline void end_span(Stream* streams, Spans& spans, Accumulator (&sums)[kBlocks][M],
                                           Total* totals) {
        unroll<kBlocks>([&](auto b) EFX_INLINE {
            const Total scales = Dot::load_scales(streams[b].scales, spans.is_fp16);
            streams[b].scales += kBlock;
            unroll<M>([&](auto m) EFX_INLINE {
                Total& total = totals[b * M + m];
                total = Dot::add_scaled(total, sums[b][m], scales, Dot::kShift ? spans.x_sums[m] : 0);
                sums[b][m] = Dot::zero();
            });
        });
        if (Dot::kShift) spans.x_sums += spans.rows;
        const int64_t next = spans.end + spans.length;
        spans.end = next < spans.last ? next : spans.last;
    }

    // Values are prefetched kAhead bytes ahead.
    template <int64_t kAhead = 2048>
    EFX_INLINE static inline void next_group(Stream& stream, int64_t group, Vector* vectors) {
        const Mask mask = stream.masks[group];
        Dot::expand(mask, stream.values, vectors);
        __builtin_prefetch(address(stream.values) + kAhead);
        skip(stream.values, sizeof(Mask) == 4 ? __builtin_popcount(mask) : __builtin_popcountll(mask));
        if (group % 8 == 0) {
            __builtin_prefetch(reinterpret_cast<const char*>(stream.masks + group) + kAhead / 4);
        }
    }

    // M rows of activations x [groups][M][kColumns] times kBlocks blocks, `stride` blocks apart: far-apart streams of
    // memory are read faster than one.
    template <int M, int kBlocks>
    __attribute__((noinline)) static void direct(const efx::Weight& weight, const Element* x, int64_t block,
                                                 int64_t stride, const Result<Dot>& result, Total* totals) {
        static_assert(kBlocks * M <= kMostTotals);
        Accumulator sums[kBlocks][M];
        Stream streams[kBlocks];
        unroll<kBlocks>([&](auto b) EFX_INLINE {
            streams[b] = stream(weight, block + b * stride);
            load_sums<M>(sums[b], nullptr, at(totals, b * M), true);
        });
        expand_and_multiply<M, kBlocks, false>(streams, 0, weight.header->groups, x, nullptr, sums,
                                               spans(result, 0, 0), totals);
        unroll<kBlocks>([&](auto b) EFX_INLINE {
            unroll<M>([&](auto m) EFX_INLINE {
                if (m < result.m) finish(sums[b][m], at(totals, b * M + m), block + b * stride, result, m);
            });
        });
    }

    // Without spans there are no totals.
    static Total* at(Total* totals, int64_t i) { return Dot::kSpans ? totals + i : nullptr; }

    EFX_INLINE static inline void finish(const Accumulator& sum, const Total* total, int64_t block,
                                         const Result<Dot>& result, int64_t m) {
        alignas(64) float floats[kBlock];
        if constexpr (Dot::kSpans) {
            Dot::store(floats, *total);
        } else {
            Dot::finish(sum, floats, result.call.weight.sums() + block * kBlock);
        }
        result.write(floats, m, block);
    }

    template <int M>
    static void direct_share(const efx::Weight& weight, const Element* x, int64_t begin, int64_t end,
                             const Result<Dot>& result, Total* totals) {
        constexpr int kBlocks = Dot::blocks(M);
        far_apart<kBlocks>(begin, end, [&](int64_t block, int64_t stride) {
            direct<M, kBlocks>(weight, x, block, stride, result, totals);
        });
    }

    // product(block, stride) for blocks from `begin` to `end`, each for kBlocks of them that are `stride` blocks apart.
    template <int kBlocks, class F>
    static void far_apart(int64_t begin, int64_t end, F&& product) {
        const int64_t stride = (end - begin) / kBlocks;
        for (int64_t i = 0; i < stride; i++) product(begin + i, stride);
        if (stride * kBlocks == end - begin) return;
        if (stride) {  // some blocks once more: one function for all of them compiles in half the time of two
            product(end - kBlocks, 1);
        } else {
            for (int64_t block = begin; block < end; block++) product(block, 0);
        }
    }

    // Expand n groups to panel [n][kVectors], and multiply them with M rows of activations x [n][M][kColumns] meanwhile:
    // the expansion costs less among products than by itself.
    template <int M>
    __attribute__((noinline)) static void expand_tile(Stream* stream, int64_t begin, int64_t n, const Element* x,
                                                      Vector* panel, Accumulator* partial, Spans spans,
                                                      Total* totals) {
        Accumulator sums[1][M];
        load_sums<M>(sums[0], partial, totals, begin == 0);
        Stream local[1] = {*stream};
        expand_and_multiply<M, 1, true>(local, begin, n, x, panel, sums, spans, totals);
        *stream = local[0];
        store_sums<M>(sums[0], partial);
    }

    // The same with groups that have been expanded, of a stream that stood at `begin`.
    template <int M>
    __attribute__((noinline)) static void tile(Stream stream, int64_t begin, int64_t n, const Element* x,
                                               const Vector* panel, Accumulator* partial, Spans spans, Total* totals) {
        Accumulator sums[1][M];
        load_sums<M>(sums[0], partial, totals, begin == 0);
        for (int64_t group = 0; group < n; group++) {
            multiply<M, 1>(sums, panel + group * kVectors, x + group * M * kColumns);
            if constexpr (Dot::kSpans) {
                if (begin + group + 1 == spans.end) end_span<M, 1>(&stream, spans, sums, totals);
            }
        }
        store_sums<M>(sums[0], partial);
    }

    template <int M, int kBlocks>
    EFX_INLINE static inline void multiply(Accumulator (&sums)[kBlocks][M], const Vector* vectors, const Element* x) {
        // Vector by vector, for few registers hold vectors beside the sums.
        unroll<kVectors>([&](auto v) EFX_INLINE {
            unroll<M>([&](auto m) EFX_INLINE { multiply_vector<M, kBlocks, m, v>(sums, vectors, x); });
        });
    }

    template <int M, int kBlocks, int m>
    EFX_INLINE static inline void multiply_row(Accumulator (&sums)[kBlocks][M], const Vector* vectors,
                                               const Element* x) {
        unroll<kVectors>([&](auto v) EFX_INLINE { multiply_vector<M, kBlocks, m, v>(sums, vectors, x); });
    }

    // The v-th vectors of the blocks, with one row of activations.
    template <int M, int kBlocks, int m, int v>
    EFX_INLINE static inline void multiply_vector(Accumulator (&sums)[kBlocks][M], const Vector* vectors,
                                                  const Element* x) {
        constexpr int kFirst = m * kColumns + v * (kColumns / kVectors);
        unroll<kBlocks>([&](auto b) EFX_INLINE {
            sums[b][m] = Dot::multiply(sums[b][m], vectors[b * kVectors + v], x + kFirst);
        });
    }

    // Products of n groups, each expanded among the products of the one before, and stored to `panel` if kStore.
    template <int M, int kBlocks, bool kStore>
    EFX_INLINE static inline void expand_and_multiply(Stream* streams, int64_t begin, int64_t n, const Element* x,
                                                      Vector* panel, Accumulator (&sums)[kBlocks][M], Spans spans,
                                                      Total* totals) {
        Vector vectors[kBlocks * kVectors], next[kBlocks * kVectors];
        const auto expand = [&](auto b, int64_t group, Vector* to) EFX_INLINE {
            next_group(streams[b], begin + group, to + b * kVectors);
            if (!kStore) return;
            unroll<kVectors>([&](auto v) EFX_INLINE {
                panel[(group * kBlocks + b) * kVectors + v] = to[b * kVectors + v];
            });
        };
        unroll<kBlocks>([&](auto b) EFX_INLINE { expand(b, 0, vectors); });
        for (int64_t group = 1; group < n; group++, x += M * kColumns) {
            unroll<M>([&](auto m) EFX_INLINE {
                multiply_row<M, kBlocks, m>(sums, vectors, x);
                unroll<kBlocks>([&](auto b) EFX_INLINE {
                    if constexpr (b * M / kBlocks == m) expand(b, group, next);
                });
            });
            unroll<kBlocks * kVectors>([&](auto i) EFX_INLINE { vectors[i] = next[i]; });
            if constexpr (Dot::kSpans) {
                if (begin + group == spans.end) end_span<M, kBlocks>(streams, spans, sums, totals);
            }
        }
        multiply<M, kBlocks>(sums, vectors, x);
        if constexpr (Dot::kSpans) {
            if (begin + n == spans.end) end_span<M, kBlocks>(streams, spans, sums, totals);
        }
    }

    // Sums are kept in `partial` [M] between the chunks of a row, and the totals [M] where they are.
    template <int M>
    EFX_INLINE static inline void load_sums(Accumulator (&sums)[M], const Accumulator* partial, Total* totals,
                                            bool is_first) {
        unroll<M>([&](auto m) EFX_INLINE {
            sums[m] = is_first ? Dot::zero() : partial[m];
            if constexpr (Dot::kSpans) {
                if (is_first) totals[m] = Total{};
            }
        });
    }

    template <int M>
    EFX_INLINE static inline void store_sums(const Accumulator (&sums)[M], Accumulator* partial) {
        unroll<M>([&](auto m) EFX_INLINE { partial[m] = sums[m]; });
    }

    // Rows of activations cut into as few tiles as there may be, of nearly equal size: at least about half of kTile if there
    // is more than one. Beyond kExact a number is made even by the last row once more: there are fewer functions for
    // tiles then, and they compile in about half the time.
    struct Tiles {
        static_assert(Dot::kTile % 2 == 0);
        int64_t m;
        static constexpr int kExact = Dot::kTile < 8 ? Dot::kTile : 8;
        int64_t rows = m <= kExact ? m : m + m % 2;
        int64_t count = (rows + Dot::kTile - 1) / Dot::kTile;
        static constexpr int kLeast = (Dot::kTile / 2 + 1) / 2 * 2;  // of several tiles
        int64_t first(int64_t i) const { return count == 1 ? rows * i : rows / 2 * i / count * 2; }
        // Of two tiles, only the second reads what the first has expanded, which the second-level cache can give.
        int64_t chunk() const { return count <= 2 ? 4 * kChunk : kChunk; }
    };

    // All rows of activations, in chunks of tiles [groups of the chunk][rows of the tile][kColumns], times a block.
    static void panel_product(const efx::Weight& weight, const Element* x, const Tiles& tiles, int64_t block,
                              Vector* panel, Accumulator* partials, const Result<Dot>& result, Total* totals) {
        const int64_t groups = weight.header->groups, chunk = tiles.chunk();
        Stream values = stream(weight, block);
        for (int64_t begin = 0; begin < groups; begin += chunk) {
            const int64_t n = groups - begin < chunk ? groups - begin : chunk;
            const Stream start = values;
            for (int64_t i = 0; i < tiles.count; i++) {
                const int64_t row = tiles.first(i), rows = tiles.first(i + 1) - row;
                const Element* elements = x + (begin * tiles.rows + row * n) * kColumns;
                const Spans ends = spans(result, row, begin);
                with_rows<Tiles::kLeast, Dot::kTile>(rows, [&](auto rows_of_tile) EFX_INLINE {
                    if (i == 0) {
                        expand_tile<rows_of_tile>(&values, begin, n, elements, panel, partials, ends, totals);
                    } else {
                        tile<rows_of_tile>(start, begin, n, elements, panel, partials + row, ends, at(totals, row));
                    }
                });
            }
        }
        for (int64_t row = 0; row < tiles.m; row++) finish(partials[row], at(totals, row), block, result, row);
    }

    // f(Index<rows>), for the numbers of rows in tiles from kLeast to kMost.
    template <int kLeast, int kMost, class F>
    static void with_rows(int64_t rows, F&& f) {
        unroll<kMost - kLeast + 1>([&](auto i) EFX_INLINE {
            constexpr int kRows = kLeast + i;
            if constexpr (kRows <= Tiles::kExact || kRows % 2 == 0) {
                if (rows == kRows) f(Index<kRows>{});
            }
        });
    }

    static float element_scale(const efx::Call& call, int64_t row) {
        const int64_t columns = call.weight.header->columns;
        const int64_t from = row * columns;
        const float most =
            call.type == efx::kTypeBf16
                ? most_magnitude<uint16_t>(static_cast<const uint16_t*>(call.x) + from, columns)
                : most_magnitude<uint32_t>(static_cast<const float*>(call.x) + from, columns);
        return most / 127;
    }

    // Without their signs, floats are in the order of their bits; a NaN is above all.
    template <class Bits, class T>
    static float most_magnitude(const T* x, int64_t n) {
        Bits most = 0;
        for (int64_t i = 0; i < n; i++) {
            Bits bits;
            std::memcpy(&bits, x + i, sizeof bits);
            bits &= static_cast<Bits>(~Bits{0}) >> 1;
            most = bits > most ? bits : most;
        }
        T value;
        std::memcpy(&value, &most, sizeof value);
        return to_float(value);
    }

    // kShift times the sums of a row's elements in each span, `stride` places apart.
    static void sum_spans(const efx::Call& call, int64_t row, float scale, int32_t* to, int64_t stride) {
        const auto sum = [&](const auto* x) {
            const efx::Header& header = *call.weight.header;
            const float factor = inverse(scale);
            x += row * header.columns;
            for (int64_t begin = 0; begin < header.columns; begin += header.span, to += stride) {
                const int64_t end = begin + header.span < header.columns ? begin + header.span : header.columns;
                int32_t total = 0;
                for (int64_t i = begin; i < end; i++) total += Dot::quantize(to_float(x[i]) * factor);
                *to = Dot::kShift * total;
            }
        };
        if (call.type == efx::kTypeBf16) {
            sum(static_cast<const uint16_t*>(call.x));
        } else {
            sum(static_cast<const float*>(call.x));
        }
    }

    // 0 also for a scale so small that its inverse is no number.
    static float inverse(float scale) {
        const float inverse = 1 / scale;
        return inverse <= 0x1p127f ? inverse : 0;
    }

    // Activations of rows [row, row + m), groups [begin, begin + n), to [n][m][kColumns].
    static void pack_x(const Result<Dot>& result, int64_t row, int64_t m, int64_t begin, int64_t n, Element* to) {
        const int64_t columns = result.call.weight.header->columns;
        const bool is_quantized = result.x_scales != nullptr;
        const auto pack = [&](const auto* x, auto as_float) EFX_INLINE {
            using From = std::remove_cv_t<std::remove_reference_t<decltype(*x)>>;
            for (int64_t i = 0; i < m; i++) {
                const float scale = is_quantized ? inverse(result.x_scales[row + i]) : 1;
                const auto convert = [&](From value) EFX_INLINE -> Element {
                    if constexpr (kIsBf16) {
                        return value;  // bfloat16 both
                    } else {
                        return is_quantized ? Dot::quantize(as_float(value) * scale) : Element(as_float(value));
                    }
                };
                const int64_t source = row + i < result.m ? row + i : result.m - 1;
                const From* from = x + (result.first_row + source) * columns + begin * kColumns;
                const int64_t here = columns - begin * kColumns < n * kColumns ? columns - begin * kColumns : n * kColumns;
                int64_t column = 0;
                for (; column + kColumns <= here; column += kColumns) {
                    for (int c = 0; c < kColumns; c++) {
                        to[column * m + i * kColumns + c] = convert(from[column + Dot::column(c)]);
                    }
                }
                for (; column < n * kColumns; column += kColumns) {
                    for (int c = 0; c < kColumns; c++) {
                        const int64_t k = column + Dot::column(c);
                        to[column * m + i * kColumns + c] = convert(k < here ? from[k] : From{});
                    }
                }
            }
        };
        if (result.call.type == efx::kTypeBf16) {
            pack(static_cast<const uint16_t*>(result.call.x), [](uint16_t value) EFX_INLINE { return to_float(value); });
        } else if constexpr (!kIsBf16) {
            pack(static_cast<const float*>(result.call.x), [](float value) EFX_INLINE { return value; });
        }
    }

    static int64_t run(const efx::Call& call) {
        const int64_t fit = kBytesAtOnce / (call.weight.header->columns * sizeof(Element));
        const int64_t most = fit < kLeastRowsAtOnce ? kLeastRowsAtOnce : fit < kMostRowsAtOnce ? fit : kMostRowsAtOnce;
        for (int64_t row = 0; row < call.m; row += most) {
            const int64_t m = call.m - row < most ? call.m - row : most;
            if (const int64_t status = run_rows(call, row, m)) return status;
        }
        return efx::kOk;
    }

    static int64_t run_rows(const efx::Call& call, int64_t first_row, int64_t m) {
        const efx::Header& header = *call.weight.header;
        const int64_t groups = header.groups, blocks = header.blocks;
        const Tiles tiles{m};
        const bool is_direct = tiles.count == 1;
        const int64_t rows = tiles.rows;
        // One row of bfloat16 that needs no padding is read where it is.
        const bool in_place = m == 1 && kIsBf16 && header.columns == groups * kColumns;
        const int64_t x_bytes = in_place ? 0 : align(rows * groups * kColumns * sizeof(Element));
        const bool is_quantized = efx::is_dynamic(header.kind);
        const int64_t scale_bytes = is_quantized ? align(rows * sizeof(float)) : 0;
        const int64_t sum_bytes = Dot::kShift ? align(rows * efx::count_spans(header) * sizeof(int32_t)) : 0;
        const int64_t panel_bytes = is_direct ? 0 : tiles.chunk() * kVectors * sizeof(Vector);
        const int64_t partial_bytes = is_direct ? 0 : rows * sizeof(Accumulator);
        const int64_t total_bytes = Dot::kSpans ? (is_direct ? kMostTotals : rows) * sizeof(Total) : 0;
        const int64_t thread_bytes = align(panel_bytes + partial_bytes + total_bytes);
        const int64_t bytes = x_bytes + scale_bytes + sum_bytes + thread_bytes * call.threads;
        char* memory = bytes ? workspace(bytes) : nullptr;
        if (bytes && !memory) return efx::kMemory;
        auto* packed_x = reinterpret_cast<Element*>(memory);
        auto* x_scales = reinterpret_cast<float*>(memory + x_bytes);
        auto* x_sums = reinterpret_cast<int32_t*>(memory + x_bytes + scale_bytes);
        const Result<Dot> result{call, first_row, is_quantized ? x_scales : nullptr, Dot::kShift ? x_sums : nullptr, m, rows};

#pragma omp parallel num_threads(call.threads)
        {
            const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
            if (is_quantized) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < rows; i++) {
                    const int64_t row = first_row + (i < m ? i : m - 1);
                    x_scales[i] = element_scale(call, row);
                    if constexpr (Dot::kShift != 0) sum_spans(call, row, x_scales[i], x_sums + i, rows);
                }
            }
            if (!in_place) {
                const int64_t step = is_direct ? kChunk : tiles.chunk();
#pragma omp for schedule(static) collapse(2)
                for (int64_t group = 0; group < groups; group += step) {
                    for (int64_t i = 0; i < tiles.count; i++) {
                        const int64_t n = groups - group < step ? groups - group : step;
                        const int64_t row = tiles.first(i), here = tiles.first(i + 1) - row;
                        pack_x(result, row, here, group, n, packed_x + (group * rows + row * n) * kColumns);
                    }
                }
            }
            const Element* x = in_place ? static_cast<const Element*>(call.x) + first_row * header.columns : packed_x;
            const int64_t begin = blocks * thread / threads, end = blocks * (thread + 1) / threads;
            char* mine = memory + x_bytes + scale_bytes + sum_bytes + thread * thread_bytes;
            auto* totals = reinterpret_cast<Total*>(mine + panel_bytes + partial_bytes);
            if (is_direct) {
                with_rows<1, Dot::kTile>(rows, [&](auto rows_of_tile) EFX_INLINE {
                    direct_share<rows_of_tile>(call.weight, x, begin, end, result, totals);
                });
            } else {
                auto* panel = reinterpret_cast<Vector*>(mine);
                auto* partials = reinterpret_cast<Accumulator*>(mine + panel_bytes);
                for (int64_t block = begin; block < end; block++) {
                    panel_product(call.weight, x, tiles, block, panel, partials, result, totals);
                }
            }
        }
        return efx::kOk;
    }

    static int64_t align(int64_t bytes) { return (bytes + efx::kAlign - 1) / efx::kAlign * efx::kAlign; }
};

}  // namespace
