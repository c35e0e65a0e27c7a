// Linear layers on weights in records for many tokens; layout.py describes the records, variants.py the macros, the
// arguments and the grids.
constexpr int kTokenTiles = EFX_TOKEN_TILES;  // of 8 tokens, the n of mma.m16n8k16, that a thread block takes
constexpr int kRowBlocks = EFX_ROW_BLOCKS;    // blocks of 16 rows that a warp takes
constexpr int kWarps = EFX_WARPS;
constexpr u32 kTokenBytes = 128;  // of the activations of a token for a tile of weights
constexpr u32 kStageBytes = kTokenTiles * 8 * kTokenBytes;
constexpr u32 kPairBytes = kRowBlocks * kSlotBytes;  // of a warp's records for a tile of columns
constexpr int kPart = 4;                             // token tiles of which the sums are written at a time
constexpr u32 kPitch = 4 * (kRowBlocks * 16 + 4);    // from token to token there: lanes that store meet no bank twice
static_assert(kTokenTiles % kPart == 0 && kPart * 8 * kPitch <= 2 * kPairBytes, "the sums fit into a warp's ring");

// What the blocks of a grid take: the token blocks of a block of rows follow each other, so that its records come from
// the L2 cache for all but the first.
struct Place {
    int blocks;            // of a split
    int token, row_block;  // the first of this warp

    DEVICE Place(int block, int warp, int tokens, int rows) {
        const int across = (tokens + 8 * kTokenTiles - 1) / (8 * kTokenTiles);
        const int down = (rows + 16 * kRowBlocks * kWarps - 1) / (16 * kRowBlocks * kWarps);
        blocks = across * down;
        token = block % across * (8 * kTokenTiles);
        row_block = (block % blocks / across * kWarps + warp) * kRowBlocks;
    }
};

// Copies this thread's part of the activations for a tile of weights. The 16-byte units of odd tokens are swapped in
// pairs: so neither the copies nor `load128` below meet a bank twice.
DEVICE void copy_activations(u32 stage, const u16* from, int columns, int tokens) {
    const int token = threadIdx.x / 8, unit = threadIdx.x % 8;
    stage += token * kTokenBytes + 16 * (unit ^ token % 2);
#pragma unroll
    for (int i = 0; i < 2 * kTokenTiles / kWarps; i++)
        if (token + i * 4 * kWarps < tokens)
            copy16(stage + i * 4 * kWarps * kTokenBytes, from + (u64)(i * 4 * kWarps) * columns);
    commit_copies();
}

// Writes the sums of a warp for `kPart` token tiles, by way of its ring, which turns fragments into rows.
DEVICE void write(const float (&sums)[kPart][kRowBlocks][4], u32 ring, const float* scales, const u16* bias, u16* y,
                  int token, int tokens, int row, int rows) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kPart; n++)
#pragma unroll
        for (int r = 0; r < kRowBlocks; r++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                store32(ring + (8 * n + 2 * t + i % 2) * kPitch + 4 * (16 * r + 8 * (i / 2) + g),
                        __float_as_uint(sums[n][r][i]));
    __syncwarp();
    static_assert(kRowBlocks == 2, "a lane for each row");
    row += lane;
    if (row >= rows) return;
    const float scale = EFX_INT8 ? kParts * __ldg(scales + row) : 1, added = bias ? to_float(__ldg(bias + row)) : 0;
    y += (u64)token * rows + row;
#pragma unroll 8
    for (int i = 0; i < kPart * 8 && token + i < tokens; i++)
        y[(u64)i * rows] = round_to_16_bits(__uint_as_float(load32(ring + i * kPitch + 4 * lane)) * scale + added);
}

// y = x W^T + bias, where rows of int8 have scales. A thread block takes kWarps x kRowBlocks blocks of 16 rows,
// kTokenTiles tiles of tokens, and of the columns the part `split`. Its warps share the activations; each expands its own
// records, half a tile ahead of the products, and uses each weight for all the tokens. Fragments are as in efx_decode.
// `out` is y, or with several splits what efx_reduce adds up. The sums of a token depend on the bounds of the splits
// alone, not on the variant. That one block at a time is enough keeps the compiler from saving registers.
extern "C" __global__ void __launch_bounds__(kWarps * 32, 1)
efx_gemm(const u16* __restrict__ x, const u32* __restrict__ starts, const uint4* __restrict__ records,
         const float* __restrict__ scales, const u16* __restrict__ bias, void* __restrict__ out, int tokens, int rows,
         int columns, int splits) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);  // so that the compiler knows that it is uniform
    const Place place(blockIdx.x, warp, tokens, rows);
    const int high = (rows + 15) / 16, wide = columns / 64, split = blockIdx.x / place.blocks;
    const int first = split * wide / splits, last = (split + 1) * wide / splits;
    const u32 shared = shared_memory(), ring = shared + 2 * kStageBytes + warp * 2 * kPairBytes;

    Stream streams[kRowBlocks];
#pragma unroll
    for (int r = 0; r < kRowBlocks; r++) {
        const int block = min(place.row_block + r, high - 1);  // beyond the last it is taken again, in vain
        streams[r] = Stream(starts + (u64)block * wide + first, records, last - first, lane);
    }
    u32 slots = ring, next_slots = ring + kPairBytes, stage = shared, next_stage = shared + kStageBytes;
    const int left = tokens - place.token;
    x += (u64)(place.token + threadIdx.x / 8) * columns + first * 64 + threadIdx.x % 8 * 8;

    // Copies are in this order throughout: the records of a tile, its activations, the records of the next one.
#pragma unroll
    for (int r = 0; r < kRowBlocks; r++) streams[r].copy_next(slots + r * kSlotBytes, lane);
    copy_activations(stage, x, columns, left);
    wait_copies<1>();
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRowBlocks; r++) streams[r].copy_next(next_slots + r * kSlotBytes, lane);

    Weights weights[kRowBlocks] = {Weights(slots, lane), Weights(slots + kSlotBytes, lane)};
    u32 a[2][kRowBlocks][2][4];  // fragments of the two halves of a tile, each for two mma
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int r = 0; r < kRowBlocks; r++) a[0][r][i / 4][i % 4] = weights[r].pair(2 * i);

    float sums[kTokenTiles][kRowBlocks][4] = {};
    const u32 units = g * kTokenBytes + 16 * (2 * t ^ g % 2);  // of this lane in a token tile: the first, and its neighbour
#pragma unroll 1
    for (int tile = first; tile < last; tile++) {
        wait_copies<kRowBlocks>();
        __syncthreads();  // this tile's activations are there, and those of the one before are done with
        x += 64;
        copy_activations(next_stage, x, columns, tile + 1 < last ? left : 0);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half == 1) {  // the records of this tile are done with; after the last one they are expanded again, in vain
                wait_copies<1>();
                __syncwarp();
                const u32 free_slots = slots;
                slots = tile + 1 < last ? next_slots : slots;
                next_slots = free_slots;
#pragma unroll
                for (int r = 0; r < kRowBlocks; r++) streams[r].copy_next(free_slots + r * kSlotBytes, lane);
#pragma unroll
                for (int r = 0; r < kRowBlocks; r++) weights[r] = Weights(slots + r * kSlotBytes, lane);
            }
#pragma unroll
            for (int n = 0; n < kTokenTiles; n++) {
                const uint4 b = load128(stage + n * 8 * kTokenBytes + (units ^ 16 * half));
#pragma unroll
                for (int r = 0; r < kRowBlocks; r++) mma(sums[n][r], a[half][r][0], b.x, b.y);
#pragma unroll
                for (int r = 0; r < kRowBlocks; r++) mma(sums[n][r], a[half][r][1], b.z, b.w);
#pragma unroll
                for (int p = n * 16 / kTokenTiles; p < (n + 1) * 16 / kTokenTiles; p++)
                    a[1 - half][p % 2][p / 8][p / 2 % 4] = weights[p % 2].pair(16 * (1 - half) + p / 2 * 2);
            }
        }
        const u32 free_stage = stage;
        stage = next_stage, next_stage = free_stage;
    }

    if (splits > 1) {
        uint4* partial = (uint4*)out + ((u64)blockIdx.x * kWarps + warp) * (kTokenTiles * kRowBlocks * 32) + lane;
#pragma unroll
        for (int n = 0; n < kTokenTiles; n++)
#pragma unroll
            for (int r = 0; r < kRowBlocks; r++) {
                const float* four = sums[n][r];
                partial[(n * kRowBlocks + r) * 32] = {__float_as_uint(four[0]), __float_as_uint(four[1]),
                                                      __float_as_uint(four[2]), __float_as_uint(four[3])};
            }
        return;
    }
#pragma unroll
    for (int n = 0; n < kTokenTiles; n += kPart) {
        float part[kPart][kRowBlocks][4];
#pragma unroll
        for (int i = 0; i < kPart * kRowBlocks * 4; i++) (&part[0][0][0])[i] = (&sums[n][0][0])[i];
        write(part, ring, scales, bias, (u16*)out, place.token + 8 * n, tokens, 16 * place.row_block, rows);
    }
}

// Adds what efx_gemm has left, split by split; a warp takes kPart token tiles of a warp.
extern "C" __global__ void __launch_bounds__(kWarps * 32)
efx_reduce(const uint4* __restrict__ partial, const float* __restrict__ scales, const u16* __restrict__ bias,
           u16* __restrict__ y, int tokens, int rows, int splits) {
    constexpr int kWrites = kTokenTiles / kPart;  // of a block
    const int block = blockIdx.x / kWrites, n = blockIdx.x % kWrites * kPart, warp = threadIdx.x / 32;
    const Place place(block, warp, tokens, rows);
    partial += (((u64)block * kWarps + warp) * kTokenTiles + n) * (kRowBlocks * 32) + threadIdx.x % 32;
    float sums[kPart][kRowBlocks][4] = {};
#pragma unroll 1
    for (int split = 0; split < splits; split++) {
#pragma unroll
        for (int i = 0; i < kPart * kRowBlocks; i++) {
            const uint4 four = __ldg(partial + i * 32);
            float* to = sums[i / kRowBlocks][i % kRowBlocks];
            to[0] += __uint_as_float(four.x), to[1] += __uint_as_float(four.y);
            to[2] += __uint_as_float(four.z), to[3] += __uint_as_float(four.w);
        }
        partial += (u64)place.blocks * kWarps * (kTokenTiles * kRowBlocks * 32);
    }
    const u32 own = shared_memory() + warp * kPart * 8 * kPitch;
    write(sums, own, scales, bias, y, place.token + 8 * n, tokens, 16 * place.row_block, rows);
}
