// The records of layout.py: copied to shared memory by a warp, and expanded there.
constexpr u32 kValueBytes = EFX_INT8 ? 1 : 2, kMaskBytes = 128;
constexpr u32 kHeadBytes = kMaskBytes + (EFX_INT8 ? 8 : 16);
constexpr u32 kSlotBytes = (kHeadBytes + 1024 * kValueBytes + 15) / 16 * 16;

// Records that follow each other, to be copied to shared memory by a warp.
struct Stream {
    const uint4* from;  // what this lane copies first of the next record
    const u32* ends;    // where it ends is there
    u32 begin, end;     // of it, in 16 bytes; equal after the last
    int left;           // how many ends are to be read

    DEVICE Stream() {}
    DEVICE Stream(const u32* starts, const uint4* records, int count, u32 lane)
        : ends(starts), begin(__ldg(starts)), end(begin), left(count) {
        from = records + begin + lane;
        read_end();
    }

    // Copies the next record, 9 to 137 times 16 bytes (int8: to 73 times), or nothing after the last.
    DEVICE void copy_next(u32 slot, u32 lane) {
        const int units = end - begin, mine = units - (int)lane;
        slot += 16 * lane;
        if (mine > 0) copy16(slot, from);
        if (mine > 32) copy16(slot + 512, from + 32);
        if (mine > 64) copy16(slot + 1024, from + 64);
        if (!EFX_INT8 && units > 96) {  // more than two thirds of the weights are not zero
            if (mine > 96) copy16(slot + 1536, from + 96);
            if (mine > 128) copy16(slot + 2048, from + 128);
        }
        commit_copies();
        from += units, begin = end;
        read_end();  // now, so that the next copies need not wait for it
    }

    DEVICE void read_end() {
        if (left > 0) end = __ldg(++ends);
        left--;
    }
};

// int8 weights are expanded to this part of their value, which both dtypes hold exactly.
constexpr float kParts = 64;
constexpr u32 kZeros = 0x80808080;  // four bytes: 128 + weight

// The weights of a lane in a record in shared memory, expanded in pairs.
struct Weights {
    u32 mask;
    u32 record;  // its address

#if EFX_INT8
    u32 places[2];  // where the non-zeros of two steps begin for this lane, in bytes from there, in 16 bits each
    u32 spreading;  // how bytes are spread over four bits, the lowest ones of the lane
    u32 four;       // weights, with the zeros, a byte each
    u32 later;      // bytes of the weights that come next

    DEVICE Weights(u32 record, u32 lane) : mask(load32(record + 4 * lane)), record(record) {
        // How many bits each step has, in 8 bits each.
        u32 counts = mask - (mask >> 1 & 0x55555555);
        counts = (counts & 0x33333333) + (counts >> 2 & 0x33333333);
        counts = (counts + (counts >> 4)) & 0x0F0F0F0F;
        u32 below = counts;  // the same for all the lanes below together: at most 248
        add_from_all_below(below);
        below -= counts;
        places[0] = load32(record + kMaskBytes) + permute(below, 0, 0x4140);
        places[1] = load32(record + kMaskBytes + 4) + permute(below, 0, 0x4342);
        // The selector for `permute`: of its first operand the next byte for a bit that is set, else one of the second.
        // In the upper half, how many bits are taken of the first. It is the same for all records.
        u32 count = 0;
        spreading = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 is_set = lane >> i & 1;
            spreading |= (is_set ? count : 4) << 4 * i;
            count += is_set;
        }
        spreading |= 8 * count << 16;
    }

    // The weights of bits i and i + 1; for even i, in rising order, by all lanes together.
    DEVICE u32 pair(int i) {
        if (i % 8 == 0) {
            const u32 place = record + (i % 16 == 0 ? places[i / 16] & 0xFFFF : places[i / 16] >> 16);
            const u32 word = place & ~3u, middle = load32(word + 4);
            const u32 first = __funnelshift_r(load32(word), middle, 8 * place);
            const u32 second = __funnelshift_r(middle, load32(word + 8), 8 * place);
            const u32 spread = __shfl_sync(0xFFFFFFFF, spreading, mask >> i);
            four = permute(first, kZeros, spread);
            later = __funnelshift_rc(first, second, spread >> 16);
        }
        if (i % 8 == 4) four = permute(later, kZeros, __shfl_sync(0xFFFFFFFF, spreading, mask >> i));
        const u32 selector = i % 4 == 0 ? 0x4140 : 0x4342;
#if EFX_FP16  // In the low bits of 1024 a byte is 1024 + 128 + weight; / 64 - 18.
        return multiply_add(permute(four, 0x64646464, selector), 0x24002400, 0xCC80CC80);
#else  // As a bfloat16, of which the smallest 256 are their bits x 2^-133, it is (128 + weight) 2^-133; x 2^127 - 2.
        return multiply_add(permute(four, 0, selector), 0x7F007F00, 0xC000C000);
#endif
    }
#else
    u32 place;      // where the next non-zero is, in bytes from there
    u32 places[4];  // where the non-zeros of two steps begin for this lane, in 16 bits each

    DEVICE Weights(u32 record, u32 lane) : mask(load32(record + 4 * lane)), record(record) {
        const uint4 steps = load128(record + kMaskBytes);
        // How many bits each step has, in 4 bits each, then, for the even and the odd steps, in 8 bits each.
        u32 counts = mask - (mask >> 1 & 0x55555555);
        counts = (counts & 0x33333333) + (counts >> 2 & 0x33333333);
        const u32 even = counts & 0x0F0F0F0F, odd = counts >> 4 & 0x0F0F0F0F;
        u32 even_below = even, odd_below = odd;  // the same for all the lanes below together: at most 124
        add_from_all_below(even_below), add_from_all_below(odd_below);
        even_below -= even, odd_below -= odd;
        // Byte j of each, widened to 16 bits by its sign, which is 0.
        places[0] = steps.x + 2 * permute(even_below, odd_below, 0xC480);
        places[1] = steps.y + 2 * permute(even_below, odd_below, 0xD591);
        places[2] = steps.z + 2 * permute(even_below, odd_below, 0xE6A2);
        places[3] = steps.w + 2 * permute(even_below, odd_below, 0xF7B3);
    }

    // The weights of bits i and i + 1; for even i, in rising order.
    DEVICE u32 pair(int i) {
        if (i % 8 == 0) place = places[i / 8] & 0xFFFF;
        if (i % 8 == 4) place = places[i / 8] >> 16;
        u32 both = 0;
        if (mask >> i & 1) both = load16(record + place), place += 2;
        if (mask >> (i + 1) & 1) both = permute(both, load16(record + place), 0x5410), place += 2;
        return both;
    }
#endif

private:
    DEVICE static void add_from_all_below(u32& value) {
        add_from_below<1>(value);
        add_from_below<2>(value);
        add_from_below<4>(value);
        add_from_below<8>(value);
        add_from_below<16>(value);
    }
};
