// What splats.cpp and splats_projection.h share: vectors, camera models with two derivatives, harmonics.
// Vectors are GCC's, 16 floats wide on every instruction set.
#pragma once

#include <cmath>
#include <cstring>

#include "common.h"

#pragma GCC diagnostic ignored "-Wpsabi"
#define INLINE __attribute__((always_inline)) static inline

typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));

namespace {
constexpr int LANES = 16, TILE = 16, BLOCK = 4, SUMS = 9;
constexpr float LEAST_ALPHA = 1.f / 255, MOST_ALPHA = 0.99f, LEAST_LIGHT = 1e-4f, LEAST_RATIO = 2.5e-5f;
constexpr int64_t MOST_PAIRS = int64_t(1) << 28;  // splats x tiles: 1 GiB of lists
}  // namespace

// Mirrors _View in splats.py. lens: 0 pinhole, 1 OpenCV's (rational), 2 fisheye. `stored` is the number of harmonics behind the first.
struct SplatView {
    float rotation[9], position[3], fx, fy, cx, cy, k[9], limits[4], fold, nearest, blur;
    int32_t width, height, lens, antialiased, degree, stored;
};

// Mirrors _Arrays in splats.py: parameters, or their gradients.
struct SplatArrays {
    float *means, *log_scales, *quats, *opacities, *dc, *rest;
};

INLINE V set(float x) { return V{} + x; }
INLINE V choose(I mask, V yes, V no) { return mask ? yes : no; }
INLINE V least(V a, V b) { return a < b ? a : b; }
INLINE V most(V a, V b) { return a > b ? a : b; }
INLINE V root(V x) {
    for (int i = 0; i < LANES; ++i) x[i] = std::sqrt(x[i]);
    return x;
}
INLINE bool any(I mask) {
#ifdef __AVX512F__
    return __builtin_ia32_ptestmd512((__attribute__((vector_size(64))) int)mask, (__attribute__((vector_size(64))) int)mask, -1) != 0;
#else
    typedef int64_t Q __attribute__((vector_size(64)));
    const Q q = (Q)mask;
    return ((q[0] | q[1]) | (q[2] | q[3]) | (q[4] | q[5]) | (q[6] | q[7])) != 0;
#endif
}
INLINE float sum(V x) {
    typedef float V8 __attribute__((vector_size(32)));
    typedef float V4 __attribute__((vector_size(16)));
    const V8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    const V4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[2]) + (b[1] + b[3]);
}
// e^x to 2 ulp for |x| < 87; clamped beyond. n = round(x / ln 2) by the addition of 1.5 * 2^23.
INLINE V exponential(V x) {
    x = most(least(x, set(87.f)), set(-87.f));
    const V shifted = x * 1.44269504f + 12582912.f, n = shifted - 12582912.f;
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = r * 1.3981999e-3f + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.f;
    const I bits = ((I)shifted - 0x4B400000 + 127) << 23;
    return p * (V)bits;
}

// -------------------------------------------------------------------------------------------------------------- camera models

// A function of the camera-space point (x, y, z): value, gradient, and second derivatives xx, xy, xz, yy, yz, zz.
struct Jet {
    V v, g[3], h[6];
};
static const int ROW[6] = {0, 0, 0, 1, 1, 2}, COLUMN[6] = {0, 1, 2, 1, 2, 2};

INLINE Jet variable(V value, int axis) {
    Jet a{};
    a.v = value, a.g[axis] = set(1);
    return a;
}
INLINE Jet operator+(const Jet& a, const Jet& b) {
    Jet c;
    c.v = a.v + b.v;
    for (int i = 0; i < 3; ++i) c.g[i] = a.g[i] + b.g[i];
    for (int i = 0; i < 6; ++i) c.h[i] = a.h[i] + b.h[i];
    return c;
}
INLINE Jet operator*(const Jet& a, float s) {
    Jet c;
    c.v = a.v * s;
    for (int i = 0; i < 3; ++i) c.g[i] = a.g[i] * s;
    for (int i = 0; i < 6; ++i) c.h[i] = a.h[i] * s;
    return c;
}
INLINE Jet operator+(Jet a, float s) {
    a.v = a.v + s;
    return a;
}
INLINE Jet operator*(const Jet& a, const Jet& b) {
    Jet c;
    c.v = a.v * b.v;
    for (int i = 0; i < 3; ++i) c.g[i] = a.g[i] * b.v + a.v * b.g[i];
    for (int i = 0; i < 6; ++i) {
        const int r = ROW[i], s = COLUMN[i];
        c.h[i] = a.h[i] * b.v + a.v * b.h[i] + a.g[r] * b.g[s] + a.g[s] * b.g[r];
    }
    return c;
}
// f(a) with f's value and two derivatives at a.v
INLINE Jet chain(const Jet& a, V f, V f1, V f2) {
    Jet c;
    c.v = f;
    for (int i = 0; i < 3; ++i) c.g[i] = f1 * a.g[i];
    for (int i = 0; i < 6; ++i) c.h[i] = f1 * a.h[i] + f2 * a.g[ROW[i]] * a.g[COLUMN[i]];
    return c;
}
INLINE Jet inverse(const Jet& a) {
    const V r = 1.f / a.v;
    return chain(a, r, -r * r, 2.f * r * r * r);
}
INLINE Jet square_root(const Jet& a) {
    const V r = root(a.v), f1 = 0.5f / r;
    return chain(a, r, f1, -0.5f * f1 / a.v);
}
// the angle atan2(a, b), a >= 0
INLINE Jet angle(const Jet& a, const Jet& b) {
    V value;
    for (int i = 0; i < LANES; ++i) value[i] = std::atan2(a.v[i], b.v[i]);
    const V n = 1.f / (a.v * a.v + b.v * b.v), fa = b.v * n, fb = -a.v * n;
    const V faa = -2.f * a.v * b.v * n * n, fab = (a.v * a.v - b.v * b.v) * n * n;
    Jet c;
    c.v = value;
    for (int i = 0; i < 3; ++i) c.g[i] = fa * a.g[i] + fb * b.g[i];
    for (int i = 0; i < 6; ++i) {
        const int r = ROW[i], s = COLUMN[i];
        c.h[i] = fa * a.h[i] + fb * b.h[i] + faa * (a.g[r] * a.g[s] - b.g[r] * b.g[s]) + fab * (a.g[r] * b.g[s] + b.g[r] * a.g[s]);
    }
    return c;
}
INLINE Jet polynomial(const Jet& u, const float* k, int count) {
    Jet d = u * k[count - 1];
    for (int i = count - 2; i >= 0; --i) d = (d + k[i]) * u;
    return d + 1.f;
}
INLINE void lens_project(const SplatView& view, const V p[3], Jet out[2]) {
    const Jet x = variable(p[0], 0), y = variable(p[1], 1), z = variable(p[2], 2);
    if (view.lens == 2) {
        const Jet r = square_root(x * x + y * y + 1e-12f), theta = angle(r, z);
        const Jet factor = theta * polynomial(theta * theta, view.k, 4) * inverse(r);
        out[0] = x * factor * view.fx + view.cx, out[1] = y * factor * view.fy + view.cy;
        return;
    }
    const Jet inv = inverse(z), a = x * inv, b = y * inv;
    if (view.lens == 0) {
        out[0] = a * view.fx + view.cx, out[1] = b * view.fy + view.cy;
        return;
    }
    const Jet aa = a * a, bb = b * b, ab = a * b * 2.f, u = aa + bb;
    const Jet d = polynomial(u, view.k, 4) * inverse(polynomial(u, view.k + 6, 3));
    const float p1 = view.k[4], p2 = view.k[5];
    out[0] = (a * d + ab * p1 + (u + aa * 2.f) * p2) * view.fx + view.cx;
    out[1] = (b * d + (u + bb * 2.f) * p1 + ab * p2) * view.fy + view.cy;
}

// ------------------------------------------------------------------------------------------------------------------ harmonics

constexpr float C0 = 0.28209479177387814f, C1 = 0.4886025119029199f;
constexpr float C2[5] = {1.0925484305920792f, -1.0925484305920792f, 0.31539156525252005f, -1.0925484305920792f, 0.5462742152960396f};
constexpr float C3[7] = {-0.5900435899266435f, 2.890611442640554f, -0.4570457994644658f, 0.3731763325901154f,
                         -0.4570457994644658f, 1.445305721320277f, -0.5900435899266435f};

// the harmonics behind the first, of degree 1 to `degree`
INLINE void harmonics(int degree, V x, V y, V z, V out[15]) {
    out[0] = -C1 * y, out[1] = C1 * z, out[2] = -C1 * x;
    if (degree < 2) return;
    const V xx = x * x, yy = y * y, zz = z * z;
    out[3] = C2[0] * x * y, out[4] = C2[1] * y * z, out[5] = C2[2] * (2.f * zz - xx - yy), out[6] = C2[3] * x * z, out[7] = C2[4] * (xx - yy);
    if (degree < 3) return;
    out[8] = C3[0] * y * (3.f * xx - yy), out[9] = C3[1] * x * y * z, out[10] = C3[2] * y * (4.f * zz - xx - yy);
    out[11] = C3[3] * z * (2.f * zz - 3.f * xx - 3.f * yy), out[12] = C3[4] * x * (4.f * zz - xx - yy), out[13] = C3[5] * z * (xx - yy);
    out[14] = C3[6] * x * (xx - 3.f * yy);
}
// sum_k w_k d(harmonic k)/d(x, y, z)
INLINE void harmonics_gradient(int degree, V x, V y, V z, const V w[15], V out[3]) {
    out[0] = -C1 * w[2], out[1] = -C1 * w[0], out[2] = C1 * w[1];
    if (degree < 2) return;
    out[0] += C2[0] * y * w[3] - 2.f * C2[2] * x * w[5] + C2[3] * z * w[6] + 2.f * C2[4] * x * w[7];
    out[1] += C2[0] * x * w[3] + C2[1] * z * w[4] - 2.f * C2[2] * y * w[5] - 2.f * C2[4] * y * w[7];
    out[2] += C2[1] * y * w[4] + 4.f * C2[2] * z * w[5] + C2[3] * x * w[6];
    if (degree < 3) return;
    const V xx = x * x, yy = y * y, zz = z * z, xy = x * y, xz = x * z, yz = y * z;
    out[0] += C3[0] * w[8] * 6.f * xy + C3[1] * w[9] * yz - C3[2] * w[10] * 2.f * xy - C3[3] * w[11] * 6.f * xz +
              C3[4] * w[12] * (4.f * zz - 3.f * xx - yy) + C3[5] * w[13] * 2.f * xz + C3[6] * w[14] * 3.f * (xx - yy);
    out[1] += C3[0] * w[8] * 3.f * (xx - yy) + C3[1] * w[9] * xz + C3[2] * w[10] * (4.f * zz - xx - 3.f * yy) - C3[3] * w[11] * 6.f * yz -
              C3[4] * w[12] * 2.f * xy - C3[5] * w[13] * 2.f * yz - C3[6] * w[14] * 6.f * xy;
    out[2] += C3[1] * w[9] * xy + C3[2] * w[10] * 8.f * yz + C3[3] * w[11] * (6.f * zz - 3.f * xx - 3.f * yy) + C3[4] * w[12] * 8.f * xz +
              C3[5] * w[13] * (xx - yy);
}

