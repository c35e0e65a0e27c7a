// The instructions of the PTX ISA that the kernels use. Shared memory is addressed by its 32-bit addresses.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

DEVICE u32 shared_memory() {
    extern __shared__ __align__(16) u8 bytes[];
    return (u32)__cvta_generic_to_shared(bytes);
}

// "cp.async": 16 bytes from global to shared memory, past the first-level cache.
DEVICE void copy16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most so many groups of this thread's copies, the latest ones, are under way.
template <int groups> DEVICE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory"); }

DEVICE u32 load16(u32 from) {
    u16 value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(from));
    return value;
}
DEVICE u32 load32(u32 from) {
    u32 value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(from));
    return value;
}
DEVICE uint4 load128(u32 from) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(from));
    return value;
}
DEVICE void store16(u32 to, u16 value) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(value) : "memory"); }
DEVICE void store32(u32 to, u32 value) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory"); }

// Four of the eight bytes of `low` and `high`, by the four nibbles of the selector; 8 more repeat the byte's sign.
DEVICE u32 permute(u32 low, u32 high, u32 selector) {
    u32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
    return result;
}

// The value of the lane `distance` below is added, where there is one.
template <int distance> DEVICE void add_from_below(u32& value) {
    asm volatile("{.reg .pred inside; .reg .u32 other; shfl.sync.up.b32 other|inside, %0, %1, 0, -1;"
                 "@inside add.u32 %0, %0, other;}" : "+r"(value) : "n"(distance));
}

// "Matrix Fragments for mma.m16n8k16 with floating point type": sums += a * b in float32.
DEVICE void mma(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if EFX_FP16
#define EFX_MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define EFX_MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif
    asm volatile(EFX_MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a * b + c of each of two values, rounded once; of numbers that are not normal as well.
DEVICE u32 multiply_add(u32 a, u32 b, u32 c) {
    u32 result;
#if EFX_FP16
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
#endif
    return result;
}

DEVICE float to_float(u16 value) {
    float result;
#if EFX_FP16
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
#else
    result = __uint_as_float((u32)value << 16);
#endif
    return result;
}
DEVICE u16 round_to_16_bits(float value) {
    u16 result;
#if EFX_FP16
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
#endif
    return result;
}
