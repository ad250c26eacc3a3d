// The processor's limit, to compare kernels with: multiply-adds on registers alone.
#include "common.h"
#include "simd.h"

// Does `count` rounds of independent multiply-adds of whole vectors; returns the floating-point operations done.
EXPORT double multiply_add_peak(int64_t count) {
    using simd::Floats;
    volatile float factor = 0.999999f, term = 1e-6f;  // unknown to the compiler
    const Floats x = simd::all(factor), y = simd::all(term);
    Floats sums[simd::ACCUMULATORS];
    UNROLL for (int k = 0; k < simd::ACCUMULATORS; ++k) sums[k] = simd::all(static_cast<float>(k));  // none equals another
    for (int64_t i = 0; i < count; ++i) {
        UNROLL for (int k = 0; k < simd::ACCUMULATORS; ++k) sums[k] = sums[k] * x + y;
    }
    Floats total = {};
    UNROLL for (int k = 0; k < simd::ACCUMULATORS; ++k) total += sums[k];
    volatile float sink = total[0];
    (void)sink;
    return 2.0 * simd::WIDTH * simd::ACCUMULATORS * static_cast<double>(count);
}
