// Replays calls of the sparse kernels under sanitizers, or emulation: `replay FILE [RESULTS]` prints a line per call, its
// statuses and a hash of what it wrote, and writes the products to the second file.
//
// Each call packs a weight and multiplies with it, four times: on buffers of the heap, whose ends AddressSanitizer
// watches; and on buffers that end where an inaccessible page begins, which stops also the vector instructions that no
// sanitizer instruments. Each of both with one thread and with three, which must give the same bytes.
//
// A call is twelve int64 (the names of `Call`), then the bytes of the weight, the scales, the activations and the bias.
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "entry.hpp"

namespace {

constexpr size_t kPage = 4096;

// Memory whose end is watched; aligned as much as its size allows.
class Buffer {
   public:
    Buffer(bool beside_page, const std::vector<uint8_t>& content) : size_(content.size()) {
        if (!beside_page) {
            data_ = static_cast<uint8_t*>(std::malloc(size_));
        } else {
            const size_t inner = (size_ + kPage - 1) / kPage * kPage;
            mapped_ = inner + kPage;
            void* pages = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (pages == MAP_FAILED) std::abort();
            base_ = static_cast<uint8_t*>(pages);
            if (mprotect(base_ + inner, kPage, PROT_NONE)) std::abort();
            data_ = base_ + inner - size_;
        }
        if (size_) std::memcpy(data_, content.data(), size_);
    }
    ~Buffer() {
        if (base_) {
            munmap(base_, mapped_);
        } else {
            std::free(data_);
        }
    }
    Buffer(const Buffer&) = delete;

    void* data() { return data_; }
    void* data_or_null() { return size_ ? data_ : nullptr; }
    size_t size() const { return size_; }

   private:
    size_t size_;
    uint8_t* data_ = nullptr;
    uint8_t* base_ = nullptr;
    size_t mapped_ = 0;
};

// `field` of the packed header gets `value` before the product, unless it is negative.
struct Call {
    int64_t isa, kind, type, rows, columns, m, span, scale_type, scale_bytes, bias, field, value;

    int64_t weight_size() const { return rows * columns * (kind == 0 ? 2 : 1); }
    int64_t element() const { return type == 0 ? 2 : 4; }
};

struct Inputs {
    std::vector<uint8_t> weight, scales, x, bias;
};

void add(uint64_t* hash, Buffer& buffer) {  // FNV-1a
    const auto* bytes = static_cast<const uint8_t*>(buffer.data());
    for (size_t i = 0; i < buffer.size(); i++) *hash = (*hash ^ bytes[i]) * 0x100000001B3;
}

std::string replay(const Call& c, const Inputs& inputs, bool beside_page, int64_t threads,
                   std::FILE* results = nullptr) {
    Buffer weight(beside_page, inputs.weight), scales(beside_page, inputs.scales);
    Buffer x(beside_page, inputs.x), bias(beside_page, inputs.bias);
    Buffer y(beside_page, std::vector<uint8_t>(c.m * c.rows * c.element(), 0xA5));
    uint64_t hash = 0xCBF29CE484222325;
    int64_t packed = -1, product = -1;
    const int64_t size = efx_packed_size(c.isa, c.kind, weight.data(), c.rows, c.columns, c.span, threads);
    if (size > 0) {
        Buffer buffer(beside_page, std::vector<uint8_t>(size, 0xA5));
        packed = efx_pack(c.isa, c.kind, weight.data(), c.rows, c.columns, c.span, c.scale_type,
                          scales.data_or_null(), buffer.data(), size, threads);
        if (c.field >= 0) static_cast<int64_t*>(buffer.data())[c.field] = c.value;
        product = efx_linear(c.isa, buffer.data(), size, x.data(), c.type, c.m, c.columns, bias.data_or_null(), y.data(),
                             c.rows, threads);
        add(&hash, buffer);
    }
    add(&hash, y);
    if (results) std::fwrite(y.data(), 1, y.size(), results);
    char line[100];
    std::snprintf(line, sizeof line, "%lld %lld %lld %016llx", static_cast<long long>(size),
                  static_cast<long long>(packed), static_cast<long long>(product), static_cast<unsigned long long>(hash));
    return line;
}

std::vector<uint8_t> read(std::FILE* file, size_t size) {
    std::vector<uint8_t> bytes(size);
    if (size && std::fread(bytes.data(), 1, size, file) != size) std::abort();
    return bytes;
}

}  // namespace

int main(int count, char** arguments) {
    std::FILE* file = std::fopen(arguments[1], "rb");
    std::FILE* results = count > 2 ? std::fopen(arguments[2], "wb") : nullptr;
    if (!file || (count > 2 && !results)) return 1;
    Call call;
    while (std::fread(&call, sizeof call, 1, file) == 1) {
        Inputs inputs;
        inputs.weight = read(file, call.weight_size());
        inputs.scales = read(file, call.scale_bytes);
        inputs.x = read(file, call.m * call.columns * call.element());
        inputs.bias = read(file, call.bias ? call.rows * call.element() : 0);
        const std::string line = replay(call, inputs, false, 1, results);
        for (bool beside_page : {false, true}) {
            if (replay(call, inputs, beside_page, 3) != line || replay(call, inputs, beside_page, 1) != line) return 2;
        }
        std::puts(line.c_str());
    }
    std::fclose(file);
    if (results && std::fclose(results)) return 1;
    return 0;
}
