// Replays calls of the native codec under sanitizers: `replay FILE` prints a line per call, its result and a hash of
// what it wrote.
//
// Each call is made three times: on buffers of the heap, whose ends AddressSanitizer watches; and on buffers that end,
// then begin, where inaccessible pages do, which stop also the vector instructions that no sanitizer instruments.
//
// A call is ten int64 (the names of `Call`) and the bytes of its input buffers.
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" {
int64_t efx_pack(int64_t, const void*, int64_t, int64_t, int64_t, uint32_t, int64_t, uint8_t*, int64_t, int64_t*,
                 int64_t, void*, int64_t);
int64_t efx_unpack(int64_t, const void*, int64_t, const uint8_t*, int64_t, int64_t, int64_t, void*, int64_t);
int64_t efx_count(const uint8_t*, int64_t, int64_t, int64_t, int64_t*, int64_t);
int64_t efx_fours(const uint8_t*, int64_t, int64_t, int64_t);
}

namespace {

enum class Place { kHeap, kEnd, kBegin };

class Buffer {
   public:
    Buffer(Place place, size_t size, const uint8_t* content) {
        if (place == Place::kHeap) {
            data_ = static_cast<uint8_t*>(std::malloc(size));
        } else {
            const size_t inner = (size + kPage - 1) / kPage * kPage;
            mapped_ = inner + 2 * kPage;
            void* pages = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (pages == MAP_FAILED) std::abort();
            base_ = static_cast<uint8_t*>(pages);
            if (inner && mprotect(base_ + kPage, inner, PROT_READ | PROT_WRITE)) std::abort();
            data_ = base_ + kPage + (place == Place::kEnd ? inner - size : 0);
        }
        if (size && content) std::memcpy(data_, content, size);
        if (size && !content) std::memset(data_, 0xA5, size);
    }
    ~Buffer() {
        if (base_) {
            munmap(base_, mapped_);
        } else {
            std::free(data_);
        }
    }
    Buffer(const Buffer&) = delete;

    template <class T = uint8_t>
    T* as() {
        return reinterpret_cast<T*>(data_);
    }

   private:
    static constexpr size_t kPage = 4096;
    uint8_t* data_ = nullptr;
    uint8_t* base_ = nullptr;
    size_t mapped_ = 0;
};

struct Call {
    int64_t function, width, rows, columns, magnitude, fours, input_size, mask_size, counts_size, output_size;
};

struct Outcome {
    int64_t result;
    uint64_t hash = 0xCBF29CE484222325;  // FNV-1a

    void add(const uint8_t* bytes, size_t size) {
        for (size_t i = 0; i < size; i++) hash = (hash ^ bytes[i]) * 0x100000001B3;
    }
};

Outcome replay(const Call& c, const uint8_t* input, const uint8_t* mask_in, Place place) {
    Buffer in(place, c.input_size * c.width, input), mask(place, c.mask_size, mask_in);
    Buffer counts(place, c.counts_size * 8, nullptr), out(place, c.output_size * c.width, nullptr);
    Outcome outcome;
    switch (c.function) {
        case 0:
            outcome.result = efx_pack(c.width, in.as(), c.input_size, c.rows, c.columns, c.magnitude, c.fours,
                                      mask.as(), c.mask_size, counts.as<int64_t>(), c.counts_size, out.as(),
                                      c.output_size);
            if (outcome.result >= 0) {
                outcome.add(mask.as(), c.mask_size);
                outcome.add(counts.as(), c.counts_size * 8);
                outcome.add(out.as(), outcome.result * c.width);
            }
            return outcome;
        case 1:
            outcome.result = efx_unpack(c.width, in.as(), c.input_size, mask.as(), c.mask_size, c.rows, c.columns,
                                        out.as(), c.output_size);
            if (outcome.result >= 0) outcome.add(out.as(), c.output_size * c.width);
            return outcome;
        case 2:
            outcome.result =
                efx_count(mask.as(), c.mask_size, c.rows, c.columns, counts.as<int64_t>(), c.counts_size);
            if (outcome.result >= 0) outcome.add(counts.as(), c.counts_size * 8);
            return outcome;
        default:
            outcome.result = efx_fours(mask.as(), c.mask_size, c.rows, c.columns);
            return outcome;
    }
}

std::vector<uint8_t> read(std::FILE* file, size_t size) {
    std::vector<uint8_t> bytes(size + 1);
    if (std::fread(bytes.data(), 1, size, file) != size) std::abort();
    return bytes;
}

}  // namespace

int main(int, char** arguments) {
    std::FILE* file = std::fopen(arguments[1], "rb");
    if (!file) return 1;
    Call call;
    while (std::fread(&call, sizeof call, 1, file) == 1) {
        const std::vector<uint8_t> input = read(file, call.input_size * call.width);
        const std::vector<uint8_t> mask = read(file, call.function == 0 ? 0 : call.mask_size);
        const uint8_t* mask_in = call.function == 0 ? nullptr : mask.data();
        const Outcome outcome = replay(call, input.data(), mask_in, Place::kHeap);
        for (Place place : {Place::kEnd, Place::kBegin}) {
            const Outcome again = replay(call, input.data(), mask_in, place);
            if (again.result != outcome.result || again.hash != outcome.hash) return 2;
        }
        std::printf("%lld %016llx\n", static_cast<long long>(outcome.result),
                    static_cast<unsigned long long>(outcome.hash));
    }
    std::fclose(file);
    return 0;
}
