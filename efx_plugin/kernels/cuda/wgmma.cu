// Linear layers on weights in records for many tokens, by the tensor cores of compute capability 9.0; layout.py describes
// the records, variants.py the macros, wgmma.py the arguments and the grids.
constexpr int kTokens = EFX_TOKENS;       // that a thread block takes
constexpr int kStep = kTokens < 128 ? kTokens : 128;  // of these, that a product takes
constexpr int kSteps = kTokens / kStep;
constexpr int kWarps = 4 * EFX_GROUPS;    // that multiply, each 16 rows; four are a warpgroup
constexpr int kCopiers = EFX_REGISTERS ? 4 : 1;  // warps beside them, the first of which copies; four give registers away
constexpr int kStages = EFX_STAGES;       // tiles of activations, and of records per warp, that a block holds
constexpr u32 kTokenBytes = 128;          // of the activations of a token for a tile of weights
constexpr u32 kTileBytes = kTokens * kTokenBytes;
constexpr int kPart = kTokens < 64 ? kTokens : 64;  // tokens whose results are written at a time
constexpr u32 kPitch = 48;                // bytes from token to token there: lanes that store meet no bank twice
static_assert(kPart * kPitch <= kStages * kSlotBytes, "results fit into a warp's slots");

// Activations [tokens, columns] as wgmma.cu copies and multiplies them: tiles of 64 columns of kTokens tokens, one after
// the other, of each token 128 bytes. There column 16t + 4s + 2h + e comes at 16s + 8h + 2t + e, so that step s meets the
// weights' fragments, and 16-byte units are swizzled by 8 tokens. Tokens beyond the last are zeros.
extern "C" __global__ void __launch_bounds__(256)
efx_arrange(const u16* __restrict__ x, uint4* __restrict__ image, int tokens, int columns) {
    const int wide = columns / 64, across = (tokens + kTokens - 1) / kTokens;
    const int index = blockIdx.x * 256 + threadIdx.x, unit = index % 8, tile = index / 8 % wide, token = index / 8 / wide;
    if (token >= across * kTokens) return;
    uint4 four = {0, 0, 0, 0};
    if (token < tokens) {
        const u32* from = (const u32*)(x + (u64)token * columns + tile * 64 + 2 * unit);
        four = {__ldg(from), __ldg(from + 8), __ldg(from + 16), __ldg(from + 24)};
    }
    image[(((u64)(token / kTokens) * wide + tile) * kTokens + token % kTokens) * 8 + (unit ^ token % 8)] = four;
}

// What the blocks of a grid take: the token blocks of a block of rows follow each other, so that its records come from
// the L2 cache for all but the first.
struct Place {
    int blocks;                  // of a split
    int token_block, row_block;  // row_block: of 16 rows, the first

    DEVICE Place(int block, int tokens, int rows) {
        const int across = (tokens + kTokens - 1) / kTokens, down = (rows + 16 * kWarps - 1) / (16 * kWarps);
        blocks = across * down;
        token_block = block % across;
        row_block = block % blocks / across * kWarps;
    }
};

// The results of a warp's 16 rows from sums as `multiply` leaves them.
struct Finish {
    float scales[2], added[2];  // of rows g and g + 8

    DEVICE Finish(const float* of_rows, const u16* bias, int row, int rows) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bool is_there = row + 8 * i < rows;
            scales[i] = EFX_INT8 && is_there ? kParts * __ldg(of_rows + row + 8 * i) : 1;
            added[i] = bias && is_there ? to_float(__ldg(bias + row + 8 * i)) : 0;
        }
    }
    DEVICE u16 operator()(float sum, int i) const { return round_to_16_bits(sum * scales[i] + added[i]); }
};

// y = x W^T + bias, where rows of int8 have scales. A thread block takes kTokens tokens, 16 kWarps rows, and of the columns
// the part `split`. One warp copies tiles of activations and records to shared memory. Each of the others expands its own
// records, half a tile at a time, while its warpgroup multiplies the half before by the tokens of the block.
// `out` is y, or with several splits what efx_add adds up.
extern "C" __global__ void __launch_bounds__(32 * (kWarps + kCopiers), 1)
efx_wgmma(const uint4* __restrict__ image, const u32* __restrict__ starts, const uint4* __restrict__ records,
          const float* __restrict__ scales, const u16* __restrict__ bias, void* __restrict__ out, int tokens, int rows,
          int columns, int splits) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);  // so that the compiler knows that it is uniform
    const Place place(blockIdx.x, tokens, rows);
    const int high = (rows + 15) / 16, wide = columns / 64, split = blockIdx.x / place.blocks;
    const int first = split * wide / splits, last = (split + 1) * wide / splits;
    const u32 tiles = shared_memory(), slots = tiles + kStages * kTileBytes;  // of each warp kStages slots
    const u32 full = slots + kWarps * kStages * kSlotBytes, empty = full + 8 * kStages;  // barriers, of each stage one
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < kStages; i++) init_barrier(full + 8 * i, kWarps + 1), init_barrier(empty + 8 * i, kWarps);
        publish_barriers();
    }
    __syncthreads();

    if (warp >= kWarps) {
        if (EFX_REGISTERS) lower_registers<24>();
        // A lane copies the records of a warp, and one the activations.
        if (warp == kWarps && lane <= kWarps) {
            const bool is_of_records = lane < kWarps;
            const int block = min(place.row_block + (int)lane, high - 1);  // beyond the last it is taken again, in vain
            const u32* ends = starts + (u64)block * wide + first;
            u32 begin = __ldg(ends), end = __ldg(++ends), units = kTileBytes / 16;
            const uint4* from = is_of_records ? records + begin : image + ((u64)place.token_block * wide + first) * units;
            const u32 to = is_of_records ? slots + lane * kStages * kSlotBytes : tiles;
            const u32 distance = is_of_records ? kSlotBytes : kTileBytes;  // from stage to stage
            int stage = 0;
            u32 parity = 1;
#pragma unroll 1
            for (int tile = first; tile < last; tile++) {
                if (is_of_records) units = end - begin, begin = end;
                if (tile + 1 < last) end = __ldg(++ends);
                wait_barrier(empty + 8 * stage, parity);
                arrive_expecting(full + 8 * stage, 16 * units);
                copy_bulk(to + stage * distance, from, 16 * units, full + 8 * stage);
                from += units;
                if (++stage == kStages) stage = 0, parity ^= 1;
            }
        }
        return;
    }

    if (EFX_REGISTERS) raise_registers<EFX_REGISTERS>();
    const u32 own = slots + warp * kStages * kSlotBytes;
    float sums[kSteps][kStep / 2] = {};
    u32 a[2][2][4];  // fragments of the two halves of a tile, each for two steps of 16 columns
    int stage = 0, before = 0;
    u32 parity = 0;
#pragma unroll 1
    for (int tile = first; tile < last; tile++) {
        wait_barrier(full + 8 * stage, parity);
        Weights weights(own + stage * kSlotBytes, lane);
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < 8; i++) a[half][i / 4][i % 4] = weights.pair(16 * half + 2 * i);
            begin_products();
#pragma unroll
            for (int s = 0; s < 2; s++)
#pragma unroll
                for (int n = 0; n < kSteps; n++)
                    multiply(sums[n], a[half][s],
                             descriptor(tiles + stage * kTileBytes + n * kStep * kTokenBytes + 32 * (2 * half + s)));
            commit_products();
            wait_products<1>();
            if (half == 0 && tile > first && lane == 0) arrive(empty + 8 * before);  // all products of that tile are done
        }
        before = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
    wait_products<0>();
#pragma unroll
    for (int n = 0; n < kSteps; n++) settle(sums[n]);

    if (splits > 1) {
        uint4* partial = (uint4*)out + ((u64)blockIdx.x * kWarps + warp) * (kTokens / 8 * 32) + lane;
#pragma unroll
        for (int j = 0; j < kTokens / 8; j++) {
            const float* four = &sums[0][0] + 4 * j;
            partial[j * 32] = {__float_as_uint(four[0]), __float_as_uint(four[1]), __float_as_uint(four[2]),
                               __float_as_uint(four[3])};
        }
        return;
    }
    // By way of this warp's slots, which turns fragments into rows; all its records are done with.
    const int row = 16 * (place.row_block + warp), token = place.token_block * kTokens;
    const Finish finish(scales, bias, row + g, rows);
    const bool is_aligned = rows % 8 == 0 && (u64)out % 16 == 0;
#pragma unroll
    for (int part = 0; part < kTokens / kPart; part++) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kPart / 2; i++)
            store16(own + (i / 4 * 8 + 2 * t + i % 2) * kPitch + 2 * (g + i / 2 % 2 * 8),
                    finish((&sums[0][0])[part * kPart / 2 + i], i / 2 % 2));
        __syncwarp();
#pragma unroll 1
        for (int i = lane; i < 2 * kPart; i += 32) {  // eight rows of a token
            const int own_token = i / 2, first_row = row + 8 * (i % 2), of_all = token + part * kPart + own_token;
            if (of_all >= tokens || first_row >= rows) continue;
            u16* to = (u16*)out + (u64)of_all * rows + first_row;
            const u32 at = own + own_token * kPitch + 16 * (i % 2);
            if (is_aligned) *(uint4*)to = load128(at);
            else for (int r = 0; r < min(8, rows - first_row); r++) to[r] = load16(at + 2 * r);
        }
    }
}

// Adds what efx_wgmma has left, split by split; a warp takes 32 tokens of a warp's rows.
extern "C" __global__ void __launch_bounds__(128)
efx_add(const uint4* __restrict__ partial, const float* __restrict__ scales, const u16* __restrict__ bias,
        u16* __restrict__ y, int tokens, int rows, int splits) {
    constexpr int kPieces = kTokens / 32;
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int index = blockIdx.x * 4 + threadIdx.x / 32, part = index % kPieces, warp = index / kPieces % kWarps;
    const int block = index / kPieces / kWarps;
    const Place place(block, tokens, rows);
    partial += (((u64)block * kWarps + warp) * kPieces + part) * (4 * 32) + lane;
    float sums[4][4] = {};
#pragma unroll 1
    for (int split = 0; split < splits; split++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint4 four = __ldg(partial + j * 32);
            sums[j][0] += __uint_as_float(four.x), sums[j][1] += __uint_as_float(four.y);
            sums[j][2] += __uint_as_float(four.z), sums[j][3] += __uint_as_float(four.w);
        }
        partial += (u64)place.blocks * kWarps * (kTokens / 8 * 32);
    }
    const int row = 16 * (place.row_block + warp) + g, token = place.token_block * kTokens + 32 * part;
    const Finish finish(scales, bias, row, rows);
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int of_all = token + 8 * j + 2 * t + i % 2, own_row = row + i / 2 * 8;
            if (of_all < tokens && own_row < rows) y[(u64)of_all * rows + own_row] = finish(sums[j][i], i / 2);
        }
}
