// Products of a tile of activations with the weights of a layer, blocked for the registers.
//
// A tile is TILE samples; its arrays are [TILE][LD], LD a compile-time constant so that rows are found by fixed displacements. Widths are
// multiples of 16, padded with zeros.
#pragma once

#include "simd.h"

namespace dense {

using simd::Floats;
using simd::WIDTH;

constexpr int TILE = 48;  // samples; a multiple of every number of rows of a register block

enum class Then { STORE, RELU, GATE };  // GATE: 0 where the activation that the gradient flows back to is 0

// out[s][o] = sum_i a[s][i] w[i][o] for R samples and N vectors of outputs; rows of w are `stride` apart.
template <int LD, int R, int N, Then THEN>
inline void multiply_block(const float* a, const float* w, int stride, int depth, float* out, const float* gate) {
    Floats sums[R][N] = {};
    for (int i = 0; i < depth; ++i) {
        Floats x[N];
        UNROLL for (int n = 0; n < N; ++n) x[n] = simd::load(w + i * stride + n * WIDTH);
        UNROLL for (int r = 0; r < R; ++r) {
            UNROLL for (int n = 0; n < N; ++n) sums[r][n] += a[r * LD + i] * x[n];
        }
    }
    const Floats zero = {};
    UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int n = 0; n < N; ++n) {
            Floats x = sums[r][n];
            if (THEN == Then::RELU) x = zero > x ? zero : x;  // in this order a NaN stays one
            if (THEN == Then::GATE) x = simd::load(gate + r * LD + n * WIDTH) <= zero ? zero : x;
            simd::store(out + r * LD + n * WIDTH, x);
        }
    }
}

template <int LD, int N, Then THEN>
inline void multiply_columns(const float* a, const float* w, int stride, int depth, float* out, const float* gate) {
    constexpr int R = N == 1 ? 12 : simd::ACCUMULATORS / N;
    static_assert(TILE % R == 0);
    for (int s = 0; s < TILE; s += R)
        multiply_block<LD, R, N, THEN>(a + s * LD, w, stride, depth, out + s * LD, gate + s * LD);
}

// out[s][o] = sum_{i < depth} a[s][i] w[i][o] for the whole tile, o < outputs.
template <int LD, Then THEN>
void multiply(const float* a, const float* w, int stride, int depth, int outputs, float* out, const float* gate) {
    constexpr int N = simd::COLUMNS;
    int o = 0;
    for (; o + N * WIDTH <= outputs; o += N * WIDTH)
        multiply_columns<LD, N, THEN>(a, w + o, stride, depth, out + o, gate + o);
    const int left = (outputs - o) / WIDTH;  // 0 unless registers are as wide as the padding
    if (left == 3) multiply_columns<LD, 3, THEN>(a, w + o, stride, depth, out + o, gate + o);
    if (left == 2) multiply_columns<LD, 2, THEN>(a, w + o, stride, depth, out + o, gate + o);
    if (left == 1) multiply_columns<LD, 1, THEN>(a, w + o, stride, depth, out + o, gate + o);
}

// sums[o][i] += sum_s g[s][o] a[s][i] for R outputs and N vectors of inputs; rows of sums are `stride` apart.
template <int LD, int R, int N>
inline void outer_block(const float* g, const float* a, float* to, int stride) {
    Floats sums[R][N];
    UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int n = 0; n < N; ++n) sums[r][n] = simd::load(to + r * stride + n * WIDTH);
    }
    for (int s = 0; s < TILE; ++s) {
        Floats x[N];
        UNROLL for (int n = 0; n < N; ++n) x[n] = simd::load(a + s * LD + n * WIDTH);
        UNROLL for (int r = 0; r < R; ++r) {
            UNROLL for (int n = 0; n < N; ++n) sums[r][n] += g[s * LD + r] * x[n];
        }
    }
    UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int n = 0; n < N; ++n) simd::store(to + r * stride + n * WIDTH, sums[r][n]);
    }
}

template <int LD, int N>
inline void outer_columns(const float* g, const float* a, int outputs, float* to, int stride) {
    constexpr int R = 4;  // divides every number of outputs
    for (int o = 0; o < outputs; o += R) outer_block<LD, R, N>(g + o, a, to + o * stride, stride);
}

// sums[o][i] += sum_s g[s][o] a[s][i] over the tile: a layer's weight gradient, sums [outputs][inputs].
template <int LD>
void add_outer(const float* g, const float* a, int outputs, int inputs, float* sums) {
    constexpr int N = simd::COLUMNS;
    int i = 0;
    for (; i + N * WIDTH <= inputs; i += N * WIDTH) outer_columns<LD, N>(g, a + i, outputs, sums + i, inputs);
    const int left = (inputs - i) / WIDTH;
    if (left == 3) outer_columns<LD, 3>(g, a + i, outputs, sums + i, inputs);
    if (left == 2) outer_columns<LD, 2>(g, a + i, outputs, sums + i, inputs);
    if (left == 1) outer_columns<LD, 1>(g, a + i, outputs, sums + i, inputs);
}

}  // namespace dense
