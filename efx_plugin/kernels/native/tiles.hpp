// The loops of the sparse product where a processor multiplies tiles (AMX).
//
// A tile has up to 16 rows of 64 bytes. Sixteen vectors that groups expand to are a tile as they are: what a step of
// columns needs of 16 rows of the weight. A tile of up to 16 rows of activations, a step's columns of each, times that
// is added to a tile of 16 sums for each of these rows.
//
// Up to 16 rows of activations are one tile, and each step of four blocks is expanded for one product of each. Of more,
// two tiles meet two blocks at a time, some thousand columns of which are expanded into the second-level cache among the
// products with the first two tiles, and serve all others.
//
// Sums are in the order of the columns, whichever way is taken: an element of the result depends neither on the other
// rows of the batch nor on the number of threads.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include "linear.hpp"
#include "tile_instructions.hpp"
#include "vnni.hpp"

namespace {

template <class Dot>
struct Tiled {
    using Sparse = Linear<Dot>;
    using Element = typename Dot::Element;
    using Vector = typename Dot::Vector;
    using Accumulator = typename Dot::Accumulator;
    using Stream = typename Sparse::Stream;
    using Total = typename Dot::Floats;

    static constexpr int kFull = 16 / Dot::kVectors;  // groups that fill a tile
    static constexpr int64_t kTileBytes = 1024;
    static constexpr int64_t kChunk = 128;  // steps expanded at a time for several tiles of activations
    static constexpr int64_t kAhead = 4096;  // bytes of values
    // Activations of a chunk that are multiplied with a block at once, which stay in the second-level cache.
    static constexpr int64_t kBytesAtOnce = 1 << 20, kMostRowsAtOnce = 1024;

    // How m rows of activations are cut: into `count` tiles of `rows` rows. The last ones may begin before the ones before
    // them end: some rows are then computed twice, with the same result.
    struct Cut {
        int64_t m;
        int64_t count = m <= kBlock ? 1 : (m + 2 * kBlock - 1) / (2 * kBlock) * 2;
        int64_t rows = (m + count - 1) / count;
        int64_t first(int64_t tile) const { return rows * tile < m - rows ? rows * tile : m - rows; }
    };

    // A step is what one tile of a weight holds of the columns. It may not reach into the next span.
    struct Steps {
        int64_t groups;  // of a step
        int64_t count;
        int64_t span;  // steps of a span

        explicit Steps(const efx::Header& header) : groups(kFull), count(0), span(0) {
            const bool is_cut = Dot::kSpans && header.span < header.columns;
            const int64_t span_groups = is_cut ? header.span / Dot::kColumns : header.groups;
            if (is_cut && span_groups < groups) groups = span_groups;
            count = (header.groups + groups - 1) / groups;
            span = is_cut ? span_groups / groups : count;
        }
        int64_t depth() const { return groups * Dot::kVectors; }     // rows of a tile of weights
        int64_t row_bytes() const { return depth() * 4; }            // of a tile of activations
        int64_t columns() const { return groups * Dot::kColumns; }
    };

    // What all threads share.
    struct Shared {
        const Result<Dot>& result;
        Cut cut;
        Steps steps;
        char* x;  // [tiles / at once][steps][tiles at once][rows][row_bytes]

        const efx::Weight& weight() const { return result.call.weight; }
        int64_t tile_bytes() const { return cut.rows * steps.row_bytes(); }  // of a step
        int64_t at_once() const { return cut.count == 1 ? 1 : 2; }
        char* tile(int64_t i) const {
            const int64_t n = at_once();
            return x + (i / n * steps.count * n + i % n) * tile_bytes();
        }
    };

    // What a thread has for itself, each [tiles][blocks][16] but the first.
    struct Own {
        Vector* panel;     // [steps][blocks][16]
        Accumulator* sums;
        Total* totals;     // where there are spans
    };

    // One step of a block, expanded; groups beyond the last are empty.
    EFX_INLINE static inline void expand(Stream& stream, const Shared& shared, int64_t step, Vector* to) {
        const int64_t groups = shared.weight().header->groups, n = shared.steps.groups, begin = step * n;
        if (n == kFull && begin + n <= groups) {
            unroll<kFull>([&](auto i) EFX_INLINE {
                Sparse::template next_group<kAhead>(stream, begin + i, to + i * Dot::kVectors);
            });
            return;
        }
        for (int64_t i = 0; i < n; i++, to += Dot::kVectors) {
            if (begin + i < groups) {
                Sparse::template next_group<kAhead>(stream, begin + i, to);
            } else {
                for (int v = 0; v < Dot::kVectors; v++) to[v] = Vector{};
            }
        }
    }

    // Products of kTiles tiles of activations, from `tile` on, with kBlocks blocks in steps [begin, end), which are expanded
    // to the panel if kExpand, and are there if not. The tiles are sums 0 to 3, activations 4 and 5, weights 6 and 7.
    template <int kTiles, int kBlocks, bool kExpand>
    __attribute__((noinline)) static void multiply(const Shared& shared, const Own& own, Stream* streams, int64_t tile,
                                                   int64_t begin, int64_t end) {
        static_assert(kTiles * kBlocks <= 4 && kTiles <= 2);
        constexpr int64_t kRing = kTiles == 1 ? 2 : kChunk;
        const int64_t first = tile * kBlocks * kBlock;
        Accumulator* sums = own.sums + first;
        const int64_t row_bytes = shared.steps.row_bytes(), tile_bytes = shared.tile_bytes();
        const char* x = shared.tile(tile) + begin * kTiles * tile_bytes;
        Stream local[kBlocks];
        unroll<kBlocks>([&](auto b) EFX_INLINE { local[b] = streams[b]; });
        unroll<kTiles * kBlocks>([&](auto i) EFX_INLINE {
            if (begin % shared.steps.span == 0) {
                tile_zero<i>();
            } else {
                tile_load<i>(sums + i * kBlock, 64);
            }
        });
        const auto slot = [&](int64_t step, int b) EFX_INLINE { return own.panel + (step % kRing * kBlocks + b) * 16; };
        if (kExpand) unroll<kBlocks>([&](auto b) EFX_INLINE { expand(local[b], shared, begin, slot(begin, b)); });
        for (int64_t step = begin; step < end; step++, x += kTiles * tile_bytes) {
            unroll<kTiles>([&](auto t) EFX_INLINE { tile_load<4 + t>(x + t * tile_bytes, row_bytes); });
            unroll<kBlocks>([&](auto b) EFX_INLINE {
                tile_load<6 + b % 2>(slot(step, b), 64);
                unroll<kTiles>([&](auto t) EFX_INLINE {
                    tile_multiply<t * kBlocks + b, 4 + t, 6 + b % 2, Element>();
                });
                if (kExpand && step + 1 < end) expand(local[b], shared, step + 1, slot(step + 1, b));
            });
            if constexpr (Dot::kSpans) {
                if ((step + 1) % shared.steps.span == 0 || step + 1 == shared.steps.count) {
                    unroll<kTiles * kBlocks>([&](auto i) EFX_INLINE {
                        tile_store<i>(sums + i * kBlock, 64);
                        tile_zero<i>();
                    });
                    end_span<kTiles, kBlocks>(shared, local, step / shared.steps.span, tile, sums, own.totals + first);
                }
            }
        }
        if (!Dot::kSpans || end % shared.steps.span != 0) {
            unroll<kTiles * kBlocks>([&](auto i) EFX_INLINE { tile_store<i>(sums + i * kBlock, 64); });
        }
        if (kExpand) unroll<kBlocks>([&](auto b) EFX_INLINE { streams[b] = local[b]; });
    }

    // Add the sums of a span to the totals. A stream's scales are those of its first span.
    template <int kTiles, int kBlocks>
    EFX_INLINE static inline void end_span(const Shared& shared, const Stream* streams, int64_t span, int64_t tile,
                                           const Accumulator* sums, Total* totals) {
        const efx::Header& header = *shared.weight().header;
        unroll<kBlocks>([&](auto b) EFX_INLINE {
            const bool is_fp16 = header.scale_type == efx::kScaleFp16;
            const Total scales = Dot::load_scales(streams[b].scales + span * kBlock, is_fp16);
            unroll<kTiles>([&](auto t) EFX_INLINE {
                constexpr int kFirst = (t * kBlocks + b) * kBlock;
                const int32_t* x_sums = nullptr;
                if (Dot::kShift) x_sums = shared.result.x_sums + span * shared.cut.m + shared.cut.first(tile + t);
                for (int64_t i = 0; i < shared.cut.rows; i++) {
                    Total& total = totals[kFirst + i];
                    total = Dot::add_scaled(span ? total : Total{}, sums[kFirst + i], scales, x_sums ? x_sums[i] : 0);
                }
            });
        });
    }

    // The results of kBlocks blocks, `stride` blocks apart.
    template <int kTiles, int kBlocks>
    static void finish_blocks(const Shared& shared, const Own& own, int64_t block, int64_t stride) {
        for (int64_t i = 0; i < shared.cut.m; i++) __builtin_prefetch(shared.result.at(i, block), 1, 2);
        for (int64_t tile = 0; tile < shared.cut.count; tile++) {
            const int64_t first = (tile / kTiles * kTiles * kBlocks + tile % kTiles * kBlocks) * kBlock;
            for (int64_t i = 0; i < shared.cut.rows; i++) {
                for (int b = 0; b < kBlocks; b++) {  // two that are adjacent are in one line of the cache
                    const int64_t from = first + b * kBlock + i;
                    const Total* total = Dot::kSpans ? own.totals + from : nullptr;
                    finish(own.sums[from], total, block + b * stride, shared.result, shared.cut.first(tile) + i);
                }
            }
        }
    }

    // What `finish` of linear.hpp does, faster for whole blocks of bfloat16.
    EFX_INLINE static inline void finish(const Accumulator& sum, const Total* total, int64_t block,
                                         const Result<Dot>& result, int64_t row) {
        const efx::Call& call = result.call;
        const int64_t first = block * kBlock;
        if (call.type != efx::kTypeBf16 || call.weight.header->rows - first < kBlock) {
            Sparse::finish(sum, total, block, result, row);
            return;
        }
        alignas(64) float floats[kBlock];
        if constexpr (Dot::kSpans) {
            Dot::store(floats, *total);
        } else {
            Dot::finish(sum, floats, call.weight.sums() + first);
        }
        __m512 y = _mm512_load_ps(floats);
        __m512 scale = _mm512_set1_ps(result.x_scales ? result.x_scales[row] : 1.0f);
        if (const float* scales = call.weight.scales()) scale = _mm512_mul_ps(_mm512_loadu_ps(scales + first), scale);
        y = _mm512_mul_ps(y, scale);
        if (call.bias) y = _mm512_add_ps(y, load_bf16(static_cast<const uint16_t*>(call.bias) + first));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(result.at(row, block)), (__m256i)_mm512_cvtneps_pbh(y));
    }

    // One tile of activations times a thread's blocks, of which kBlocks, far apart, are read at once.
    template <int kBlocks>
    static void direct_share(const Shared& shared, const Own& own, int64_t begin, int64_t end) {
        Sparse::template far_apart<kBlocks>(begin, end, [&](int64_t block, int64_t stride) {
            Stream streams[kBlocks];
            for (int b = 0; b < kBlocks; b++) streams[b] = Sparse::stream(shared.weight(), block + b * stride);
            multiply<1, kBlocks, true>(shared, own, streams, 0, 0, shared.steps.count);
            finish_blocks<1, kBlocks>(shared, own, block, stride);
        });
    }

    // Several tiles of activations times a thread's blocks, two at a time. `streams` [2 * pairs] and `own` have room for
    // all of them, for a chunk of the columns meets all blocks before the next one does: so much of the activations stays
    // in the second-level cache.
    static void pair_share(const Shared& shared, const Own& own, Stream* streams, int64_t begin, int64_t end) {
        const int64_t pairs = (end - begin + 1) / 2, adjacent = end - begin > 1;
        const auto block = [&](int64_t pair) { return adjacent && begin + 2 * pair > end - 2 ? end - 2 : begin + 2 * pair; };
        for (int64_t i = 0; i < 2 * pairs; i++) {
            streams[i] = Sparse::stream(shared.weight(), block(i / 2) + i % 2 * adjacent);
        }
        const int64_t steps = shared.steps.count;
        for (int64_t from = 0; from < steps; from += kChunk) {
            const int64_t to = steps - from < kChunk ? steps : from + kChunk;
            for (int64_t pair = 0; pair < pairs; pair++) {
                const Own mine = own_pair(shared, own, pair);
                multiply<2, 2, true>(shared, mine, streams + 2 * pair, 0, from, to);
                for (int64_t tile = 2; tile < shared.cut.count; tile += 2) {
                    multiply<2, 2, false>(shared, mine, streams + 2 * pair, tile, from, to);
                }
                if (to == steps) finish_blocks<2, 2>(shared, mine, block(pair), adjacent);
            }
        }
    }

    // Sums of one chunk are written out before those of the next pair begin.
    static Own own_pair(const Shared& shared, const Own& own, int64_t pair) {
        if (shared.steps.count <= kChunk) return own;
        const int64_t first = pair * shared.cut.count * 2 * kBlock;
        return {own.panel, own.sums + first, Dot::kSpans ? own.totals + first : nullptr};
    }

    // Row i of a tile of activations, in all steps. Rows are packed for themselves, other than in linear.hpp: with that loop, which
    // has several rows, 1,024 tokens of W8A8 take a tenth longer.
    static void pack_x(const Shared& shared, int64_t tile, int64_t i) {
        char* to = shared.tile(tile) + i * shared.steps.row_bytes();
        const Result<Dot>& result = shared.result;
        const int64_t columns = shared.weight().header->columns, step_columns = shared.steps.columns();
        const int64_t row = shared.cut.first(tile) + i;
        const float scale = result.x_scales ? Sparse::inverse(result.x_scales[row]) : 1;
        const auto pack = [&](const auto* x) EFX_INLINE {
            using From = std::remove_cv_t<std::remove_reference_t<decltype(*x)>>;
            const auto convert = [&](From value) EFX_INLINE -> Element {
                if constexpr (sizeof(Element) == 2) {
                    return value;
                } else {
                    return Dot::quantize(to_float(value) * scale);
                }
            };
            x += (result.first_row + row) * columns;
            for (int64_t begin = 0; begin < columns; begin += step_columns, to += shared.at_once() * shared.tile_bytes()) {
                auto* elements = reinterpret_cast<Element*>(to);
                if (begin + step_columns <= columns) {
                    for (int64_t c = 0; c < step_columns; c += Dot::kColumns) {
                        for (int j = 0; j < Dot::kColumns; j++) {
                            elements[c + j] = convert(x[begin + c + Dot::column(j)]);
                        }
                    }
                } else {
                    for (int64_t c = 0; c < step_columns; c++) {
                        const int64_t k = begin + c / Dot::kColumns * Dot::kColumns + Dot::column(c % Dot::kColumns);
                        elements[c] = convert(k < columns ? x[k] : From{});
                    }
                }
            }
        };
        if (result.call.type == efx::kTypeBf16) {
            pack(static_cast<const uint16_t*>(result.call.x));
        } else if constexpr (sizeof(Element) == 1) {
            pack(static_cast<const float*>(result.call.x));
        }
    }

    static int64_t run(const efx::Call& call) {
        const Steps steps(*call.weight.header);
        const int64_t chunk = steps.count < kChunk ? steps.count : kChunk;
        const int64_t fit = kBytesAtOnce / (chunk * steps.row_bytes());  // 128 or more
        const int64_t pieces = (call.m - 1) / (fit < kMostRowsAtOnce ? fit : kMostRowsAtOnce) + 1;
        const int64_t rows = (call.m + pieces - 1) / pieces;
        for (int64_t row = 0; row < call.m; row += rows) {
            const int64_t m = call.m - row < rows ? call.m - row : rows;
            if (const int64_t status = run_rows(call, steps, row, m)) return status;
        }
        return efx::kOk;
    }

    static int64_t run_rows(const efx::Call& call, const Steps& steps, int64_t first_row, int64_t m) {
        const efx::Header& header = *call.weight.header;
        const Cut cut{m};
        const bool is_direct = cut.count == 1, is_quantized = efx::is_dynamic(header.kind);
        const int64_t blocks_at_once = is_direct ? 4 : 2;
        const int64_t x_bytes = Sparse::align(cut.count * steps.count * cut.rows * steps.row_bytes());
        const int64_t scale_bytes = is_quantized ? Sparse::align(m * sizeof(float)) : 0;
        const int64_t sum_bytes = Dot::kShift ? Sparse::align(m * efx::count_spans(header) * sizeof(int32_t)) : 0;
        const int64_t panel_bytes = (is_direct ? 2 : kChunk) * blocks_at_once * kTileBytes;
        const int64_t most_pairs = ((header.blocks + call.threads - 1) / call.threads + 1) / 2;
        const int64_t kept_pairs = is_direct || steps.count <= kChunk ? 1 : most_pairs;
        const int64_t partial_bytes = kept_pairs * cut.count * blocks_at_once * kTileBytes;
        const int64_t stream_bytes = is_direct ? 0 : Sparse::align(2 * most_pairs * sizeof(Stream));
        const int64_t thread_bytes = panel_bytes + partial_bytes * (Dot::kSpans ? 2 : 1) + stream_bytes;
        char* memory = workspace(x_bytes + scale_bytes + sum_bytes + thread_bytes * call.threads);
        if (!memory) return efx::kMemory;
        auto* x_scales = reinterpret_cast<float*>(memory + x_bytes);
        auto* x_sums = reinterpret_cast<int32_t*>(memory + x_bytes + scale_bytes);
        const Result<Dot> result{call, first_row, is_quantized ? x_scales : nullptr, Dot::kShift ? x_sums : nullptr, m, m};
        const Shared shared{result, cut, steps, memory};

#pragma omp parallel num_threads(call.threads)
        {
            const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
            if (is_quantized) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < m; i++) {
                    x_scales[i] = Sparse::element_scale(call, first_row + i);
                    if constexpr (Dot::kShift != 0) Sparse::sum_spans(call, first_row + i, x_scales[i], x_sums + i, m);
                }
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < cut.count * cut.rows; i++) {
                pack_x(shared, i / cut.rows, i % cut.rows);
            }
            TileShapes shapes;
            for (int i = 0; i < 8; i++) {
                shapes.rows[i] = static_cast<uint8_t>(i < 6 ? cut.rows : steps.depth());
                shapes.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? steps.row_bytes() : 64);
            }
            tile_configure(shapes);
            char* mine = memory + x_bytes + scale_bytes + sum_bytes + thread * thread_bytes;
            const Own own{reinterpret_cast<Vector*>(mine + stream_bytes),
                          reinterpret_cast<Accumulator*>(mine + stream_bytes + panel_bytes),
                          reinterpret_cast<Total*>(mine + stream_bytes + panel_bytes + partial_bytes)};
            const int64_t begin = header.blocks * thread / threads, end = header.blocks * (thread + 1) / threads;
            if (is_direct) {
                direct_share<4>(shared, own, begin, end);
            } else {
                pair_share(shared, own, reinterpret_cast<Stream*>(mine), begin, end);
            }
            tile_release();
        }
        return efx::kOk;
    }
};

}  // namespace
