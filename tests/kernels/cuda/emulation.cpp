// Runs the kernels of EFX_SOURCE on a CPU. A thread of a block is a fiber, which runs until it meets others: at a barrier
// or at an instruction that a warp executes together. What ptx.cuh and hopper.cuh wrap is computed here as the PTX ISA
// describes it. EFX_GEMM and EFX_WGMMA say which kernels the source has.
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

#include <ucontext.h>

#define __global__
#define __restrict__
#define __launch_bounds__(...)
#define DEVICE inline

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
struct Index {
    u32 x;
};
Index threadIdx, blockIdx;

namespace machine {

struct Copy {
    u32 to;
    u8 bytes[16];
};

// A thread's access to shared memory. Those of the threads of a warp that are alike in all but thread and address are
// of one instruction: `before` counts what all of them do before it, `index` the accesses of the thread since then.
enum Kind { kLoad128, kCopy16, kStore32, kLoad32, kKinds };
struct Access {
    int kind, block, thread, before, index;
    u32 address;
};

// An "mbarrier" in shared memory, and the bulk copies that it expects and that are under way.
struct BulkCopy {
    u32 to;
    std::vector<u8> bytes;
};
struct Barrier {
    int arrivals, pending;
    long bytes;  // that are expected, less those that came
    u32 parity;  // of the phase that is going on
    std::vector<BulkCopy> copies;
};

// A product of a warpgroup: what a thread takes of it. It is under way until the thread waits for it.
struct Product {
    float a[2][16];  // rows g and g + 8
    u32 b;           // begins there
    float* sums;
    int tokens;
};

struct Thread {
    ucontext_t start;
    jmp_buf resume;
    std::vector<u8> stack;
    bool started, done;
    long meetings_of_warp, meetings_of_block;  // that this thread has come to
    std::vector<std::vector<Copy>> copies;     // under way, by groups; the last one is open
    int groups;                                // of copies, that are closed
    int before[kKinds], index[kKinds];         // of the last access of a kind
    const Barrier* waits;                      // for a phase of this one to end, or null
    u32 parity;                                // of that phase
    std::vector<std::vector<Product>> products;  // under way, by groups; the last one is open
};

// What a lane shows the others at a meeting of its warp.
struct Shown {
    float a[4][2], b[2][2];
    u32 value;
};

constexpr size_t kStackBytes = 64 << 10;
std::vector<Thread> threads;
std::vector<long> arrived_at_warp;  // arrivals at its meetings, by warp
long arrived_at_block;
std::vector<Shown> shown[2];  // by thread, at alternate meetings
std::vector<u8> shared;
std::map<u32, Barrier> barriers;  // by address
struct Range {
    const u8 *begin, *end;
};
std::vector<Range> readable;  // global memory
bool at_once;     // asynchronous copies land at once, not as late as they may
bool descending;  // lanes run in falling order, and warps by turns from meeting to meeting
long faults;
jmp_buf scheduler;

bool is_watched;
std::vector<Access> accesses;
void (*kernel)(const void* arguments);
const void* arguments;

Thread& self() { return threads[threadIdx.x]; }

void wait_for_others() {
    if (!_setjmp(self().resume)) _longjmp(scheduler, 1);
}
void meet_warp() {
    self().meetings_of_warp++, arrived_at_warp[threadIdx.x / 32]++;
    wait_for_others();
}
void meet_block() {
    self().meetings_of_block++, arrived_at_block++;
    wait_for_others();
}
bool is_over(const Barrier& barrier, u32 parity) { return barrier.parity != parity; }
bool may_run(const Thread& thread, int warp) {
    return !thread.done && (!thread.waits || is_over(*thread.waits, thread.parity)) && arrived_at_warp[warp] >= 32 * thread.meetings_of_warp &&
           arrived_at_block >= (long)threads.size() * thread.meetings_of_block;
}

bool land_one();  // a bulk copy, if one is under way

void run_thread() {
    kernel(arguments);
    self().done = true;
    _longjmp(scheduler, 1);
}
void resume(u32 index) {
    threadIdx.x = index;
    Thread& thread = threads[index];
    if (_setjmp(scheduler)) return;
    if (thread.started) _longjmp(thread.resume, 1);
    thread.started = true;
    setcontext(&thread.start);
}

void run_block(int count, size_t shared_bytes) {
    shared.assign(shared_bytes, 0xAB);
    if ((int)threads.size() != count) threads = std::vector<Thread>(count);
    arrived_at_warp.assign(count / 32, 0), arrived_at_block = 0;
    shown[0].assign(count, {}), shown[1].assign(count, {});
    for (Thread& thread : threads) {
        thread.started = thread.done = false;
        thread.meetings_of_warp = thread.meetings_of_block = thread.groups = 0;
        for (int& before : thread.before) before = -1;
        thread.waits = nullptr, thread.products.assign(1, {});
        thread.copies.assign(1, {});
        thread.stack.resize(kStackBytes);
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = thread.stack.data();
        thread.start.uc_stack.ss_size = kStackBytes;
        thread.start.uc_link = nullptr;
        makecontext(&thread.start, run_thread, 0);
    }
    barriers.clear();
    for (bool moved = true; moved;) {
        moved = false;
        for (int warp = 0; warp < count / 32; warp++)
            for (bool warp_moved = true; warp_moved;) {
                warp_moved = false;
                for (int i = 0; i < 32; i++) {
                    const int index = 32 * warp + (descending ? 31 - i : i);
                    if (may_run(threads[index], warp)) resume(index), moved = true, warp_moved = !descending;
                }
            }
        if (!moved) moved = land_one();  // as late as it may
    }
    for (const Thread& thread : threads) faults += !thread.done;  // threads wait for each other for ever
}

void watch(Kind kind, u32 address, int before) {
    if (!is_watched) return;
    int &last = self().before[kind], &index = self().index[kind];
    index = before == last ? index + 1 : 0, last = before;
    accesses.push_back({kind, (int)blockIdx.x, (int)threadIdx.x, before, index, address});
}

// Bytes of shared memory; those outside and those that are not aligned are a fault.
u8* at(u32 address, size_t size) {
    static u8 elsewhere[16];
    if (address % size == 0 && address + size <= shared.size()) return shared.data() + address;
    faults++;
    return elsewhere;
}
// Reads global memory; what is not readable and what is not aligned is a fault.
void read(void* to, const void* from, size_t size) {
    const u8* bytes = (const u8*)from;
    for (const Range& range : readable)
        if ((uintptr_t)bytes % size == 0 && bytes >= range.begin && bytes + size <= range.end) {
            std::memcpy(to, bytes, size);
            return;
        }
    faults++;
    std::memset(to, 0xFF, size);
}
void land(const Copy& copy) { std::memcpy(at(copy.to, 16), copy.bytes, 16); }

Barrier& barrier_at(u32 address) {
    static Barrier elsewhere;
    const auto found = barriers.find(address);
    if (found != barriers.end()) return found->second;
    faults++;  // it was not initialized
    return elsewhere;
}
// Ends the phase if all came.
void settle_barrier(Barrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.pending = barrier.arrivals, barrier.parity ^= 1;
}
void arrive_at(u32 address, long bytes) {
    Barrier& barrier = barrier_at(address);
    faults += barrier.pending == 0;  // more than it expects
    barrier.pending--, barrier.bytes += bytes;
    settle_barrier(barrier);
}
void land(Barrier& barrier, const BulkCopy& copy) {
    for (size_t i = 0; i < copy.bytes.size(); i += 16) std::memcpy(at(copy.to + i, 16), copy.bytes.data() + i, 16);
    barrier.bytes -= copy.bytes.size();
    settle_barrier(barrier);
}
bool land_one() {
    for (auto& [address, barrier] : barriers)
        if (!barrier.copies.empty()) {
            const BulkCopy copy = barrier.copies.front();
            barrier.copies.erase(barrier.copies.begin());
            land(barrier, copy);
            return true;
        }
    return false;
}

// Shows a lane's state to its warp; returns what all its lanes show.
const Shown* exchange(const Shown& mine) {
    std::vector<Shown>& board = shown[self().meetings_of_warp % 2];
    board[threadIdx.x] = mine;
    meet_warp();
    return &board[threadIdx.x / 32 * 32];
}

}  // namespace machine

inline int min(int a, int b) { return a < b ? a : b; }
inline u32 __float_as_uint(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float __uint_as_float(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
template <class Value> inline Value __ldg(const Value* from) {
    Value value;
    machine::read(&value, from, sizeof value);
    return value;
}
inline void __syncwarp() { machine::meet_warp(); }
inline void __syncthreads() { machine::meet_block(); }
inline u32 __shfl_sync(u32, u32 value, u32 lane) {
    machine::Shown mine = {};
    mine.value = value;
    return machine::exchange(mine)[lane % 32].value;
}
inline u32 __funnelshift_rc(u32 low, u32 high, u32 bits) {
    return ((u64)high << 32 | low) >> (bits < 32 ? bits : 32);
}
inline u32 __funnelshift_r(u32 low, u32 high, u32 bits) { return __funnelshift_rc(low, high, bits % 32); }

inline u32 shared_memory() { return 0; }
inline void copy16(u32 to, const void* from) {
    machine::Copy copy = {to, {}};
    machine::read(copy.bytes, from, 16);
    machine::watch(machine::kCopy16, to, machine::self().groups);
    if (machine::at_once) machine::land(copy);
    else machine::self().copies.back().push_back(copy);
}
inline void commit_copies() { machine::self().copies.emplace_back(), machine::self().groups++; }
template <int groups> inline void wait_copies() {
    auto& copies = machine::self().copies;
    while ((int)copies.size() - 1 > groups) {
        for (const machine::Copy& copy : copies.front()) machine::land(copy);
        copies.erase(copies.begin());
    }
}
template <class Value> inline Value load(u32 from) {
    Value value;
    std::memcpy(&value, machine::at(from, sizeof value), sizeof value);
    return value;
}
inline u32 load16(u32 from) { return load<u16>(from); }
inline u32 load32(u32 from) {
    machine::watch(machine::kLoad32, from, machine::self().meetings_of_warp);
    return load<u32>(from);
}
inline uint4 load128(u32 from) {
    machine::watch(machine::kLoad128, from, machine::self().meetings_of_warp);
    return load<uint4>(from);
}
inline void store32(u32 to, u32 value) {
    machine::watch(machine::kStore32, to, machine::self().meetings_of_warp);
    std::memcpy(machine::at(to, 4), &value, 4);
}

inline u32 permute(u32 low, u32 high, u32 selector) {  // "prmt"
    const u64 bytes = (u64)high << 32 | low;
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        const u32 nibble = selector >> 4 * i & 15, byte = bytes >> 8 * (nibble & 7) & 0xFF;
        result |= (nibble & 8 ? byte >> 7 ? 0xFF : 0 : byte) << 8 * i;
    }
    return result;
}
template <int distance> inline void add_from_below(u32& value) {
    machine::Shown mine = {};
    mine.value = value;
    const int lane = threadIdx.x % 32;
    const machine::Shown* warp = machine::exchange(mine);
    if (lane >= distance) value += warp[lane - distance].value;
}

inline float to_float(u16 bits) {
#if EFX_FP16
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return value;
#else
    return __uint_as_float((u32)bits << 16);
#endif
}
inline u16 round_to_16_bits(float value) {
#if EFX_FP16
    const _Float16 rounded = value;
    u16 bits;
    std::memcpy(&bits, &rounded, 2);
    return bits;
#else
    const u32 bits = __float_as_uint(value);
    return value != value ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
#endif
}

inline u32 multiply_add(u32 a, u32 b, u32 c) {  // "fma.rn", half by half
    u32 result = 0;
    for (int half = 0; half < 2; half++) {
        const auto value = [=](u32 pair) { return (double)to_float(pair >> 16 * half); };
        const double sum = value(a) * value(b) + value(c);
        const float rounded = (float)sum;
        machine::faults += rounded != sum && sum == sum;  // else it would be rounded twice
        result |= (u32)round_to_16_bits(rounded) << 16 * half;
    }
    return result;
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": with g = lane / 4 and t = lane % 4,
// register i of A holds row g + 8 (i % 2), columns 2t and 2t + 1, plus 8 for i >= 2; register i of B rows 2t + 8i and
// 2t + 8i + 1 of column g; sum i row g + 8 (i / 2), column 2t + i % 2.
inline void mma(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    machine::Shown mine;
    for (int half = 0; half < 2; half++) {
        for (int i = 0; i < 4; i++) mine.a[i][half] = to_float(a[i] >> 16 * half);
        mine.b[0][half] = to_float(b0 >> 16 * half), mine.b[1][half] = to_float(b1 >> 16 * half);
    }
    const machine::Shown* warp = machine::exchange(mine);
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 4; i++) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        double sum = sums[i];
        for (int k = 0; k < 16; k++) {
            const int owner = k % 8 / 2, half = k % 2, upper = k / 8;
            sum += (double)warp[row % 8 * 4 + owner].a[row / 8 + 2 * upper][half] *
                   (double)warp[column * 4 + owner].b[upper][half];
        }
        sums[i] = (float)sum;
    }
}

#if EFX_WGMMA
inline void store16(u32 to, u16 value) { std::memcpy(machine::at(to, 2), &value, 2); }

inline void init_barrier(u32 barrier, int arrivals) {
    machine::at(barrier, 8);
    machine::barriers[barrier] = {arrivals, arrivals, 0, 0, {}};
}
inline void publish_barriers() {}
inline void arrive(u32 barrier) { machine::arrive_at(barrier, 0); }
inline void arrive_expecting(u32 barrier, u32 bytes) { machine::arrive_at(barrier, bytes); }
inline void wait_barrier(u32 barrier, u32 parity) {
    machine::Thread& self = machine::self();
    self.waits = &machine::barrier_at(barrier), self.parity = parity;
    if (!machine::is_over(*self.waits, parity)) machine::wait_for_others();
    self.waits = nullptr;
}
inline void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    if (bytes % 16 || bytes > machine::shared.size()) machine::faults++, bytes = 0;
    machine::BulkCopy copy = {to, std::vector<u8>(bytes)};
    for (u32 i = 0; i < bytes; i += 16) machine::read(copy.bytes.data() + i, (const u8*)from + i, 16);
    machine::Barrier& expecting = machine::barrier_at(barrier);
    if (machine::at_once) machine::land(expecting, copy);
    else expecting.copies.push_back(copy);
}

template <int count> inline void lower_registers() {}
template <int count> inline void raise_registers() {}
inline void begin_products() {}
template <int count> inline void settle(float (&)[count]) {
    for (const auto& group : machine::self().products) machine::faults += !group.empty();
}

// Of a descriptor the emulation knows "128-Byte swizzling" with 1024 bytes from 8 rows to the next.
inline u64 descriptor(u32 address) { return address; }

// B is read when the product is done: unit i of 16 bytes of a row of 128 lies at i ^ (row % 8).
inline void finish_product(const machine::Product& product) {
    const int t = threadIdx.x % 4;
    for (int i = 0; i < product.tokens / 2; i++) {
        const int token = i / 4 * 8 + 2 * t + i % 2;
        double sum = product.sums[i];
        for (int k = 0; k < 16; k++) {
            const u32 linear = product.b + token * 128 + 2 * k;
            u16 value;
            std::memcpy(&value, machine::at(linear ^ (linear >> 7 & 7) << 4, 2), 2);
            sum += (double)product.a[i / 2 % 2][k] * (double)to_float(value);
        }
        product.sums[i] = (float)sum;
    }
}
// "Register Fragments for wgmma.m64nNk16": of A as for `mma`; sums 4j + i as those of `mma` of the columns 8j on.
template <int count> inline void multiply(float (&sums)[count], const u32 (&a)[4], u64 b) {
    machine::Shown mine = {};
    for (int i = 0; i < 4; i++)
        for (int half = 0; half < 2; half++) mine.a[i][half] = to_float(a[i] >> 16 * half);
    const machine::Shown* warp = machine::exchange(mine);
    machine::Product product = {{}, (u32)b, sums, 2 * count};
    const int g = threadIdx.x % 32 / 4;
    for (int r = 0; r < 2; r++)
        for (int k = 0; k < 16; k++) product.a[r][k] = warp[g * 4 + k % 8 / 2].a[r + 2 * (k / 8)][k % 2];
    if (machine::at_once != machine::descending) finish_product(product);  // so that all four pairs are tried
    else machine::self().products.back().push_back(product);
}
inline void commit_products() { machine::self().products.emplace_back(); }
template <int groups> inline void wait_products() {
    auto& products = machine::self().products;
    while ((int)products.size() - 1 > groups) {
        for (const machine::Product& product : products.front()) finish_product(product);
        products.erase(products.begin());
    }
}
#endif

#include EFX_SOURCE

namespace {

struct Call {
    int grid, block, shared_bytes, at_once, descending, is_watched;
    int ranges;  // of global memory that may be read
    machine::Range range[6];
};

// Returns how many faults there were.
template <class Kernel> long launch(const Call& call, const Kernel& kernel) {
    machine::readable.assign(call.range, call.range + call.ranges);
    machine::at_once = call.at_once, machine::descending = call.descending;
    machine::kernel = [](const void* own) { (*(const Kernel*)own)(); };
    machine::arguments = &kernel, machine::faults = 0;
    machine::is_watched = call.is_watched, machine::accesses.clear();
    for (blockIdx.x = 0; (int)blockIdx.x < call.grid; blockIdx.x++) machine::run_block(call.block, call.shared_bytes);
    return machine::faults;
}

}  // namespace

// Those of the last launch, if it was watched, and their number.
extern "C" const machine::Access* accesses(long* count) {
    *count = machine::accesses.size();
    return machine::accesses.data();
}

#if EFX_WGMMA
extern "C" long emulate_arrange(const Call* call, const u16* x, uint4* image, int tokens, int columns) {
    return launch(*call, [=] { efx_arrange(x, image, tokens, columns); });
}

extern "C" long emulate_wgmma(const Call* call, const uint4* image, const u32* starts, const uint4* records,
                              const float* scales, const u16* bias, void* out, int tokens, int rows, int columns,
                              int splits) {
    return launch(*call, [=] { efx_wgmma(image, starts, records, scales, bias, out, tokens, rows, columns, splits); });
}

extern "C" long emulate_add(const Call* call, const uint4* partial, const float* scales, const u16* bias, u16* y,
                            int tokens, int rows, int splits) {
    return launch(*call, [=] { efx_add(partial, scales, bias, y, tokens, rows, splits); });
}
#elif EFX_GEMM
extern "C" long emulate_gemm(const Call* call, const u16* x, const u32* starts, const uint4* records,
                             const float* scales, const u16* bias, void* out, int tokens, int rows, int columns,
                             int splits) {
    return launch(*call, [=] { efx_gemm(x, starts, records, scales, bias, out, tokens, rows, columns, splits); });
}

extern "C" long emulate_reduce(const Call* call, const uint4* partial, const float* scales, const u16* bias, u16* y,
                               int tokens, int rows, int splits) {
    return launch(*call, [=] { efx_reduce(partial, scales, bias, y, tokens, rows, splits); });
}
#else
extern "C" long emulate_decode(const Call* call, const u16* x, const u32* starts, const uint4* records,
                               const float* scales, const u16* bias, u16* y, int tokens, int rows, int columns) {
    return launch(*call, [=] { efx_decode(x, starts, records, scales, bias, y, tokens, rows, columns); });
}

extern "C" long emulate_expand(const Call* call, const u32* starts, const uint4* records, const float* scales,
                               u16* dense, int first_row, int rows, int columns) {
    return launch(*call, [=] { efx_expand(starts, records, scales, dense, first_row, rows, columns); });
}
#endif
