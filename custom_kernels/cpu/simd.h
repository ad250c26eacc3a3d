// Vectors of the widest registers that the build may use, by the vector extensions of GCC and Clang: one source serves every
// instruction set.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors are passed between inlined functions only

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 24")
#endif

namespace simd {

// ACCUMULATORS is how many sums fit in the registers beside the operands; COLUMNS how many vectors of a row are read for them at once.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, ACCUMULATORS = 24, COLUMNS = 4;
#elif defined(__AVX__)
constexpr int WIDTH = 8, ACCUMULATORS = 12, COLUMNS = 2;
#else
constexpr int WIDTH = 4, ACCUMULATORS = 12, COLUMNS = 2;
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef float Unaligned __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline Floats load_unaligned(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Floats x) { *reinterpret_cast<Floats*>(to) = x; }
inline Floats all(float x) { return x - Floats{}; }
inline Floats limit(Floats x, float low, float high) {  // a NaN stays one
    x = x < low ? all(low) : x;
    return x > high ? all(high) : x;
}

// exp(x) within 2 units in the last place: x = n log 2 + r, a polynomial of degree 6 in r (Cephes' expf), times 2^n in two factors,
// so that infinity and the smallest numbers come out right.
inline Floats exp(Floats x) {
    x = limit(x, -104.0f, 89.0f);
    const Floats shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const Floats n = (x * 1.44269504088896341f + shift) - shift;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Ints whole = __builtin_convertvector(n, Ints), half = whole >> 1;
    const Ints first = (half + 127) << 23, second = (whole - half + 127) << 23;
    return p * reinterpret_cast<Floats>(first) * reinterpret_cast<Floats>(second);
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }

// Zeroed floats, aligned for `load`.
class Buffer {
public:
    explicit Buffer(size_t count) : data_(static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 127) / 64 * 64))) {
        if (!data_) throw std::bad_alloc();
        std::memset(data_.get(), 0, count * sizeof(float));
    }
    float* get() const { return data_.get(); }

private:
    struct Free {
        void operator()(float* data) const { std::free(data); }
    };
    std::unique_ptr<float, Free> data_;
};

}  // namespace simd
