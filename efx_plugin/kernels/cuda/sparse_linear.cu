// Linear layers on weights in records; layout.py describes these, variants.py the macros, the arguments and the grids.
constexpr int kTokenTiles = EFX_TOKEN_TILES;  // of 8 tokens, the n of mma.m16n8k16
constexpr int kRowBlocks = EFX_ROW_BLOCKS;    // blocks of 16 rows that a thread block takes
constexpr int kWarps = EFX_WARPS;
constexpr int kStages = EFX_STAGES;  // slots in a warp's ring
constexpr u32 kRingBytes = kStages * kSlotBytes;

// The activations of a lane for a tile of weights: of each of its tokens 16, in two halves.
struct Activations {
    u32 pairs[kTokenTiles][8];

    DEVICE void load(int half, const u16* x, const u32 (&offsets)[kTokenTiles]) {
#pragma unroll
        for (int n = 0; n < kTokenTiles; n++) {
            const uint4 eight = __ldg((const uint4*)(x + offsets[n] + 8 * half));
            u32* to = pairs[n] + 4 * half;
            to[0] = eight.x, to[1] = eight.y, to[2] = eight.z, to[3] = eight.w;
        }
    }
};

// y = x W^T + bias, of int8 weights with scales of the rows. A thread block takes kRowBlocks blocks of 16 rows; each of
// its warps a share of the columns, so that with as many warps all variants have the same results. Lane 4g + t holds the fragments that the PTX ISA
// ("Matrix Fragments for mma.m16n8k16 with floating point type") names so: of A the weights of rows g and g + 8, of B the
// activations of token g, of the sums the tokens 2t and 2t + 1 of rows g and g + 8.
extern "C" __global__ void __launch_bounds__(kWarps * 32)
efx_decode(const u16* __restrict__ x, const u32* __restrict__ starts, const uint4* __restrict__ records,
           const float* __restrict__ scales, const u16* __restrict__ bias, u16* __restrict__ y, int tokens, int rows,
           int columns) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);  // so that the compiler knows that it is uniform
    const int high = (rows + 15) / 16, wide = columns / 64;
    const int first = warp * wide / kWarps, last = (warp + 1) * wide / kWarps;
    const u32 shared = shared_memory(), ring = shared + warp * kRingBytes, last_slot = ring + kRingBytes - kSlotBytes;

    Stream streams[kRowBlocks];
#pragma unroll
    for (int r = 0; r < kRowBlocks; r++) {
        const int block = min((int)blockIdx.x * kRowBlocks + r, high - 1);  // beyond the last it is taken again, in vain
        streams[r] = Stream(starts + (u64)block * wide + first, records, last - first, lane);
    }
#pragma unroll
    for (int s = 0; s < kStages - 1; s++) streams[s % kRowBlocks].copy_next(ring + s * kSlotBytes, lane);

    u32 offsets[kTokenTiles];  // of this lane's tokens; those beyond the last get its activations, and no result
#pragma unroll
    for (int n = 0; n < kTokenTiles; n++) offsets[n] = min(n * 8 + (int)g, tokens - 1) * columns + 16 * t;
    x += first * 64;
    Activations b;
    if (first < last) b.load(0, x, offsets), b.load(1, x, offsets);

    float sums[kRowBlocks][kTokenTiles][4] = {};
    u32 slot = ring, free_slot = last_slot;
#pragma unroll 1
    for (int tile = first; tile < last; tile++) {
        x += tile + 1 < last ? 64 : 0;
#pragma unroll
        for (int r = 0; r < kRowBlocks; r++) {
            streams[(r + kStages - 1) % kRowBlocks].copy_next(free_slot, lane);
            wait_copies<kStages - 1>();
            __syncwarp();
            Weights weights(slot, lane);
#pragma unroll
            for (int s = 0; s < 4; s++) {
                u32 a[4];
#pragma unroll
                for (int i = 0; i < 4; i++) a[i] = weights.pair(8 * s + 2 * i);
#pragma unroll
                for (int n = 0; n < kTokenTiles; n++) mma(sums[r][n], a, b.pairs[n][2 * s], b.pairs[n][2 * s + 1]);
                if (r == kRowBlocks - 1 && s % 2 == 1) b.load(s / 2, x, offsets);  // for the next tile
            }
            __syncwarp();
            free_slot = slot;
            slot = slot == last_slot ? ring : slot + kSlotBytes;
        }
    }

    // The sums of a block of rows take the places of the rings, register by register and lane by lane. Those of the warps
    // are added in order.
    static_assert(kTokenTiles * 512 <= kRingBytes, "a warp's sums fit into its ring");
#pragma unroll
    for (int r = 0; r < kRowBlocks; r++) {
#pragma unroll
        for (int n = 0; n < kTokenTiles; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) store32(ring + 512 * n + 128 * i + 4 * lane, __float_as_uint(sums[r][n][i]));
        __syncthreads();
        for (int e = threadIdx.x; e < kTokenTiles * 128; e += kWarps * 32) {
            const int token = e / 16, row_of_block = e % 16;
            const int row = ((int)blockIdx.x * kRowBlocks + r) * 16 + row_of_block;
            if (token >= tokens || row >= rows) continue;
            const int i = row_of_block / 8 * 2 + token % 2, owner = row_of_block % 8 * 4 + token % 8 / 2;
            const u32 at = shared + 512 * (token / 8) + 128 * i + 4 * owner;
            float sum = 0;
#pragma unroll
            for (int w = 0; w < kWarps; w++) sum += __uint_as_float(load32(at + w * kRingBytes));
            if (EFX_INT8) sum *= kParts * __ldg(scales + row);
            if (bias) sum += to_float(__ldg(bias + row));
            y[(u64)token * rows + row] = round_to_16_bits(sum);
        }
        __syncthreads();
    }
}

// Rows of W as a dense matrix, of int8 weights times their scales; a warp per tile.
extern "C" __global__ void __launch_bounds__(kWarps * 32)
efx_expand(const u32* __restrict__ starts, const uint4* __restrict__ records, const float* __restrict__ scales,
           u16* __restrict__ dense, int first_row, int rows, int columns) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int high = (rows + 15) / 16, wide = columns / 64, tile = blockIdx.x * kWarps + threadIdx.x / 32;
    if (tile >= high * wide) return;
    const u32 slot = shared_memory() + threadIdx.x / 32 * kSlotBytes;
    Stream(starts + (u64)first_row / 16 * wide + tile, records, 1, lane).copy_next(slot, lane);
    wait_copies<0>();
    __syncwarp();
    Weights weights(slot, lane);
    u32 pairs[2][8];  // of 16 adjacent columns of rows g and g + 8
#pragma unroll
    for (int i = 0; i < 16; i++) pairs[i % 2][i / 2] = weights.pair(2 * i);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = tile / wide * 16 + 8 * r + g;
        if (row >= rows) continue;
        if (EFX_INT8) {
            const float scale = kParts * __ldg(scales + first_row + row);
#pragma unroll
            for (u32& pair : pairs[r])
                pair = round_to_16_bits(scale * to_float(pair)) | round_to_16_bits(scale * to_float(pair >> 16)) << 16;
        }
        uint4* to = (uint4*)(dense + (u64)row * columns + tile % wide * 64 + 16 * t);
        to[0] = {pairs[r][0], pairs[r][1], pairs[r][2], pairs[r][3]};
        to[1] = {pairs[r][4], pairs[r][5], pairs[r][6], pairs[r][7]};
    }
}
