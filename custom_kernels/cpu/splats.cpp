// 3D Gaussian splatting (Kerbl et al. 2023, arXiv 2308.04079): projection, sorting, tiles, compositing, and the gradients of all of it.
// custom_kernels/splats.py has the equations and the reference. Vectors are GCC's, 16 floats wide on every instruction set: 16 splats
// in the projection, 4 x 4 pixels in the rasteriser. Every sum has an order that does not depend on the number of threads.
#include <cmath>
#include <cstring>
#include <memory>

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

// ----------------------------------------------------------------------------------------------------------------- projection

INLINE V load(const float* from, int64_t stride, int lanes) {
    V x{};
    for (int i = 0; i < lanes; ++i) x[i] = from[i * stride];
    return x;
}
INLINE void store(V x, float* to, int64_t stride, int lanes) {
    for (int i = 0; i < lanes; ++i) to[i * stride] = x[i];
}

// What forward and backward have in common, of 16 splats.
struct Projection {
    V p[3], distance, direction[3];                 // camera-space point; unit vector from the camera, in the world
    V q[4], q_norm, axes[9], scale[3];              // unit quaternion; columns of W R(q)
    V J[6], M[6];                                   // Jacobian at `clamped`; M = J W R S
    V A, B, C, det, det0, ratio, opacity, logistic; // covariance with the blur; determinants; compensated opacity
    V u, v, J_mean[6], H[2][6], colour[3];
    I valid, inside[2], lit[3];                     // inside: x/z, y/z were not clamped
    V limit[2];
};

INLINE void project_point(const SplatView& view, Projection& s) {
    V clamped[3] = {s.p[0], s.p[1], s.p[2]};
    s.valid = view.lens == 2 ? (s.distance > view.nearest) : (s.p[2] > view.nearest);
    const V z = choose(s.valid, s.p[2], set(1));
    s.p[2] = clamped[2] = z;
    for (int i = 0; i < 2; ++i) {
        const V slope = s.p[i] / z;
        s.limit[i] = view.lens == 2 ? slope : most(least(slope, set(view.limits[2 * i + 1])), set(view.limits[2 * i]));
        s.inside[i] = view.lens == 2 ? (I)(slope == slope) : (I)(s.limit[i] == slope);
        clamped[i] = choose(s.inside[i], s.p[i], s.limit[i] * z);
    }
    Jet at[2];
    lens_project(view, clamped, at);
    for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 3; ++j) s.J[3 * i + j] = at[i].g[j];
        for (int j = 0; j < 6; ++j) s.H[i][j] = at[i].h[j];
    }
    if (any(~(s.inside[0] & s.inside[1]))) lens_project(view, s.p, at);
    s.u = at[0].v, s.v = at[1].v;
    for (int i = 0; i < 6; ++i) s.J_mean[i] = at[i / 3].g[i % 3];
    if (view.lens == 0) return;
    const V rr = s.p[0] * s.p[0] + s.p[1] * s.p[1];
    if (view.lens == 1) s.valid &= rr < z * z * (view.fold * view.fold);
    else for (int i = 0; i < LANES; ++i) s.valid[i] &= -(std::atan2(std::sqrt(rr[i]), s.p[2][i]) < view.fold);
}

INLINE void project_shape(const SplatView& view, const SplatArrays& of, int64_t first, int lanes, Projection& s) {
    V q[4], n = set(0);
    for (int i = 0; i < 4; ++i) q[i] = load(of.quats + 4 * first + i, 4, lanes), n += q[i] * q[i];
    s.q_norm = most(root(n), set(1e-12f));
    for (int i = 0; i < 4; ++i) s.q[i] = q[i] / s.q_norm;
    const V w = s.q[0], x = s.q[1], y = s.q[2], z = s.q[3];
    const V R[9] = {1.f - 2.f * (y * y + z * z), 2.f * (x * y - w * z), 2.f * (x * z + w * y), 2.f * (x * y + w * z), 1.f - 2.f * (x * x + z * z),
                    2.f * (y * z - w * x), 2.f * (x * z - w * y), 2.f * (y * z + w * x), 1.f - 2.f * (x * x + y * y)};
    for (int j = 0; j < 3; ++j)
        for (int k = 0; k < 3; ++k) s.axes[3 * j + k] = view.rotation[3 * j] * R[k] + view.rotation[3 * j + 1] * R[3 + k] + view.rotation[3 * j + 2] * R[6 + k];
    for (int k = 0; k < 3; ++k) {
        s.scale[k] = exponential(load(of.log_scales + 3 * first + k, 3, lanes));
        for (int i = 0; i < 2; ++i) s.M[3 * i + k] = (s.J[3 * i] * s.axes[k] + s.J[3 * i + 1] * s.axes[3 + k] + s.J[3 * i + 2] * s.axes[6 + k]) * s.scale[k];
    }
    const V A0 = s.M[0] * s.M[0] + s.M[1] * s.M[1] + s.M[2] * s.M[2], C0_ = s.M[3] * s.M[3] + s.M[4] * s.M[4] + s.M[5] * s.M[5];
    s.B = s.M[0] * s.M[3] + s.M[1] * s.M[4] + s.M[2] * s.M[5];
    s.A = A0 + view.blur, s.C = C0_ + view.blur;
    // |row 0 x row 1|^2 is A0 C0 - B^2 without its cancellation
    const V c0 = s.M[1] * s.M[5] - s.M[2] * s.M[4], c1 = s.M[2] * s.M[3] - s.M[0] * s.M[5], c2 = s.M[0] * s.M[4] - s.M[1] * s.M[3];
    s.det0 = c0 * c0 + c1 * c1 + c2 * c2;
    s.det = s.det0 + view.blur * (A0 + C0_ + view.blur);
    s.ratio = view.antialiased ? root(most(s.det0 / s.det, set(LEAST_RATIO))) : set(1);
    s.logistic = 1.f / (1.f + exponential(-load(of.opacities + first, 1, lanes)));
    s.opacity = s.logistic * s.ratio;
    s.valid &= (s.det > 1e-12f) & (s.det < 1e18f) & (s.opacity >= LEAST_ALPHA) & (s.u < 1e6f) & (s.u > -1e6f) & (s.v < 1e6f) & (s.v > -1e6f);
}

INLINE void project_colour(const SplatView& view, const SplatArrays& of, int64_t first, int lanes, Projection& s) {
    const int used = (view.degree + 1) * (view.degree + 1) - 1;
    V basis[15];
    if (used) harmonics(view.degree, s.direction[0], s.direction[1], s.direction[2], basis);
    for (int c = 0; c < 3; ++c) {
        V x = C0 * load(of.dc + 3 * first + c, 3, lanes) + 0.5f;
        for (int k = 0; k < used; ++k) x += basis[k] * load(of.rest + 3 * (view.stored * first + k) + c, 3 * view.stored, lanes);
        s.lit[c] = x > 0.f;
        s.colour[c] = most(x, set(0));
        s.valid &= x == x;
    }
}

INLINE void project(const SplatView& view, const SplatArrays& of, int64_t first, int lanes, Projection& s) {
    V d[3];
    for (int i = 0; i < 3; ++i) d[i] = load(of.means + 3 * first + i, 3, lanes) - view.position[i];
    s.distance = root(d[0] * d[0] + d[1] * d[1] + d[2] * d[2]);
    const V inv = 1.f / most(s.distance, set(1e-12f));
    for (int i = 0; i < 3; ++i) {
        s.direction[i] = d[i] * inv;
        s.p[i] = view.rotation[3 * i] * d[0] + view.rotation[3 * i + 1] * d[1] + view.rotation[3 * i + 2] * d[2];
    }
    project_point(view, s);
    project_shape(view, of, first, lanes, s);
    if (any(s.valid)) project_colour(view, of, first, lanes, s);
    for (int i = lanes; i < LANES; ++i) s.valid[i] = 0;
}

// A splat in the picture. conic a b c; the depth at offset (dx, dy) from its middle is depth + slope . (dx, dy).
struct Splat {
    float u, v, a, b, c, opacity, least_power, colour[3], depth, slope[2], key;
    int32_t x0, x1, y0, y1;  // blocks of 4 pixels that it reaches, inclusive
    int32_t id;
    int64_t pairs;  // its first splat-tile pair
};

INLINE void place(const SplatView& view, const Projection& s, int i, int64_t id, Splat& o) {
    const float inv = 1.f / s.det[i];
    o.u = s.u[i], o.v = s.v[i], o.a = s.C[i] * inv, o.b = -s.B[i] * inv, o.c = s.A[i] * inv, o.opacity = s.opacity[i];
    for (int c = 0; c < 3; ++c) o.colour[c] = s.colour[c][i];
    o.least_power = std::log(LEAST_ALPHA / o.opacity);
    const float reach = -2.f * o.least_power, rx = std::sqrt(reach * s.A[i]), ry = std::sqrt(reach * s.C[i]);
    o.x0 = std::max(0, int(std::ceil(o.u - rx - 0.5f))), o.x1 = std::min(view.width - 1, int(std::floor(o.u + rx - 0.5f)));
    o.y0 = std::max(0, int(std::ceil(o.v - ry - 0.5f))), o.y1 = std::min(view.height - 1, int(std::floor(o.v + ry - 0.5f)));
    o.id = o.x0 <= o.x1 && o.y0 <= o.y1 ? int32_t(id) : -1;  // else no pixel's centre is in its ellipse
    o.x0 /= BLOCK, o.x1 /= BLOCK, o.y0 /= BLOCK, o.y1 /= BLOCK;
    float along[2] = {0, 0};  // covariance of the distance with u and v
    for (int k = 0; k < 3; ++k) {
        const float t = (s.p[0][i] * s.axes[k][i] + s.p[1][i] * s.axes[3 + k][i] + s.p[2][i] * s.axes[6 + k][i]) / s.distance[i] * s.scale[k][i];
        along[0] += t * s.M[k][i], along[1] += t * s.M[3 + k][i];
    }
    o.depth = s.distance[i], o.slope[0] = along[0] * o.a + along[1] * o.b, o.slope[1] = along[0] * o.b + along[1] * o.c;
    o.key = view.lens == 2 ? s.distance[i] : s.p[2][i];
}

// ------------------------------------------------------------------------------------------------------------ sorting and tiles

// One rendered picture, kept from forward to backward.
struct SplatPicture {
    SplatView view;
    int columns, rows;
    std::vector<Splat> splats;              // by depth
    std::vector<int64_t> starts;            // [tiles + 1] in `list`
    std::vector<int32_t> list;              // splats of each tile, by depth
    std::vector<V> light;                   // [tiles * 16] transmittance behind everything
    std::vector<I> last;                    // [tiles * 16] place in the tile's list of the last splat that counted
    int64_t pairs = 0;
};

static void sort_by_depth(std::vector<Splat>& found, std::vector<Splat>& out) {
    std::vector<uint64_t> keys, other;
    keys.reserve(found.size());
    for (size_t i = 0; i < found.size(); ++i) {
        uint32_t bits;
        std::memcpy(&bits, &found[i].key, 4);
        if (found[i].id >= 0) keys.push_back(uint64_t(bits) << 32 | i);
    }
    other.resize(keys.size());
    for (int shift = 32; shift < 64; shift += 8) {
        size_t count[257] = {};
        for (auto key : keys) ++count[(key >> shift & 255) + 1];
        for (int i = 0; i < 256; ++i) count[i + 1] += count[i];
        for (auto key : keys) other[count[key >> shift & 255]++] = key;
        keys.swap(other);
    }
    out.resize(keys.size());
    for (size_t i = 0; i < keys.size(); ++i) out[i] = found[keys[i] & 0xffffffff];
}

static bool list_tiles(SplatPicture& picture) {
    constexpr int SIDE = TILE / BLOCK;
    const int tiles = picture.columns * picture.rows;
    picture.starts.assign(tiles + 1, 0);
    for (auto& s : picture.splats) {
        s.pairs = picture.pairs;
        picture.pairs += int64_t(s.x1 / SIDE - s.x0 / SIDE + 1) * (s.y1 / SIDE - s.y0 / SIDE + 1);
        if (picture.pairs > MOST_PAIRS) return false;
        for (int y = s.y0 / SIDE; y <= s.y1 / SIDE; ++y)
            for (int x = s.x0 / SIDE; x <= s.x1 / SIDE; ++x) ++picture.starts[y * picture.columns + x + 1];
    }
    for (int i = 0; i < tiles; ++i) picture.starts[i + 1] += picture.starts[i];
    picture.list.resize(picture.pairs);
    std::vector<int64_t> next(picture.starts.begin(), picture.starts.end() - 1);
    for (size_t i = 0; i < picture.splats.size(); ++i) {
        const auto& s = picture.splats[i];
        for (int y = s.y0 / SIDE; y <= s.y1 / SIDE; ++y)
            for (int x = s.x0 / SIDE; x <= s.x1 / SIDE; ++x) picture.list[next[y * picture.columns + x]++] = int32_t(i);
    }
    return true;
}

// ----------------------------------------------------------------------------------------------------------------- rasteriser

alignas(64) static const float LANE_X[16] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
alignas(64) static const float LANE_Y[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};

// The blocks of a tile that a splat reaches, and its exponent there: power = A + C + B dy.
struct Reach {
    int x0, x1, y0, y1;
    V dx[4], A[4], B[4], lane_y;
    float c, v;
    V dy(int y, int Y) const { return lane_y + (float((Y + y) * BLOCK) + 0.5f - v); }
};
INLINE Reach reach(const Splat& s, int X, int Y, V lane_x, V lane_y) {
    Reach r;
    r.x0 = std::max(s.x0 - X, 0), r.x1 = std::min(s.x1 - X, 3), r.y0 = std::max(s.y0 - Y, 0), r.y1 = std::min(s.y1 - Y, 3);
    for (int x = r.x0; x <= r.x1; ++x) {
        r.dx[x] = lane_x + (float((X + x) * BLOCK) + 0.5f - s.u);
        r.A[x] = (-0.5f * s.a) * r.dx[x] * r.dx[x];
        r.B[x] = (-s.b) * r.dx[x];
    }
    r.lane_y = lane_y, r.c = -0.5f * s.c, r.v = s.v;
    return r;
}

template <bool DEPTH>
static void forward_tile(SplatPicture& picture, int tile, float* rgb, float* depth, float* light) {
    const int X = tile % picture.columns * 4, Y = tile / picture.columns * 4, W = picture.view.width, H = picture.view.height;
    V lane_x, lane_y, T[16], R[16], G[16], B[16], D[16];
    std::memcpy(&lane_x, LANE_X, 64), std::memcpy(&lane_y, LANE_Y, 64);
    I last[16];
    unsigned alive = 0;
    for (int k = 0; k < 16; ++k) {
        const I here = ((lane_x + float((X + k % 4) * BLOCK)) < float(W)) & ((lane_y + float((Y + k / 4) * BLOCK)) < float(H));
        T[k] = choose(here, set(1), set(0)), R[k] = G[k] = B[k] = D[k] = V{}, last[k] = I{} - 1;
        alive |= unsigned(any(here)) << k;
    }
    const int64_t first = picture.starts[tile], count = picture.starts[tile + 1] - first;
    for (int at = 0; at < count && alive; ++at) {
        const Splat& s = picture.splats[picture.list[first + at]];
        const Reach r = reach(s, X, Y, lane_x, lane_y);
        for (int y = r.y0; y <= r.y1; ++y) {
            const V dy = r.dy(y, Y), C = r.c * dy * dy;
            for (int x = r.x0; x <= r.x1; ++x) {
                const int k = 4 * y + x;
                if (!(alive >> k & 1)) continue;
                const V power = r.B[x] * dy + (r.A[x] + C);
                const I counts = (power >= s.least_power) & (T[k] > LEAST_LIGHT);
                if (!any(counts)) continue;
                const V alpha = choose(counts, least(set(MOST_ALPHA), s.opacity * exponential(power)), V{}), w = alpha * T[k];
                R[k] += w * s.colour[0], G[k] += w * s.colour[1], B[k] += w * s.colour[2];
                if (DEPTH) D[k] += w * (s.depth + s.slope[0] * r.dx[x] + s.slope[1] * dy);
                T[k] -= w;
                last[k] = counts ? I{} + at : last[k];
                if (!any(T[k] > LEAST_LIGHT)) alive &= ~(1u << k);
            }
        }
    }
    for (int k = 0; k < 16; ++k) {
        picture.light[16 * tile + k] = T[k], picture.last[16 * tile + k] = last[k];
        for (int i = 0; i < 16; ++i) {
            const int x = (X + k % 4) * BLOCK + i % 4, y = (Y + k / 4) * BLOCK + i / 4;
            if (x >= W || y >= H) continue;
            const int64_t p = int64_t(y) * W + x;
            rgb[3 * p] = R[k][i], rgb[3 * p + 1] = G[k][i], rgb[3 * p + 2] = B[k][i], light[p] = T[k][i];
            if (DEPTH) depth[p] = D[k][i];
        }
    }
}

// Gradients of one tile, summed over its pixels: colour, opacity, u, v, and the conic, for each of its splat-tile pairs.
static void backward_tile(const SplatPicture& picture, int tile, const float* g_rgb, const float* g_light, float* sums) {
    const int X = tile % picture.columns * 4, Y = tile / picture.columns * 4, W = picture.view.width, H = picture.view.height;
    V lane_x, lane_y, T[16], g[3][16], D[16];
    std::memcpy(&lane_x, LANE_X, 64), std::memcpy(&lane_y, LANE_Y, 64);
    I last[16];
    int furthest = -1;
    for (int k = 0; k < 16; ++k) {
        T[k] = picture.light[16 * tile + k], last[k] = picture.last[16 * tile + k];
        g[0][k] = g[1][k] = g[2][k] = D[k] = V{};
        for (int i = 0; i < 16; ++i) {
            furthest = std::max(furthest, int(last[k][i]));
            const int x = (X + k % 4) * BLOCK + i % 4, y = (Y + k / 4) * BLOCK + i / 4;
            if (x >= W || y >= H) continue;
            const int64_t p = int64_t(y) * W + x;
            for (int c = 0; c < 3; ++c) g[c][k][i] = g_rgb[3 * p + c];
            D[k][i] = g_light[p] * T[k][i];  // sum over what is behind of weight x (gradient of its weight)
        }
    }
    const int64_t first = picture.starts[tile];
    for (int at = furthest; at >= 0; --at) {
        const Splat& s = picture.splats[picture.list[first + at]];
        const Reach r = reach(s, X, Y, lane_x, lane_y);
        V c0{}, c1{}, c2{}, p0{}, px{}, py{}, pxx{}, pxy{}, pyy{};
        bool found = false;
        for (int y = r.y0; y <= r.y1; ++y) {
            const V dy = r.dy(y, Y), C = r.c * dy * dy;
            for (int x = r.x0; x <= r.x1; ++x) {
                const int k = 4 * y + x;
                const V power = r.B[x] * dy + (r.A[x] + C);
                const I counts = (power >= s.least_power) & (last[k] >= at);
                if (!any(counts)) continue;
                found = true;
                const V e = s.opacity * exponential(power), alpha = choose(counts, least(set(MOST_ALPHA), e), V{});
                const V inv = 1.f / (1.f - alpha), before = T[k] * inv, w = alpha * before;
                c0 += w * g[0][k], c1 += w * g[1][k], c2 += w * g[2][k];
                const V shade = s.colour[0] * g[0][k] + s.colour[1] * g[1][k] + s.colour[2] * g[2][k];
                const V g_alpha = before * shade - D[k] * inv;
                const V g_power = choose(counts & (e < MOST_ALPHA), g_alpha * e, V{}), g_x = g_power * r.dx[x], g_y = g_power * dy;
                p0 += g_power, px += g_x, py += g_y, pxx += g_x * r.dx[x], pxy += g_x * dy, pyy += g_y * dy;
                D[k] += w * shade, T[k] = before;
            }
        }
        if (!found) continue;
        const int x_first = s.x0 / 4, width = s.x1 / 4 - x_first + 1;
        float* out = sums + SUMS * (s.pairs + int64_t(Y / 4 - s.y0 / 4) * width + X / 4 - x_first);
        out[0] = sum(c0), out[1] = sum(c1), out[2] = sum(c2), out[3] = sum(p0) / s.opacity;
        const float sx = sum(px), sy = sum(py);
        out[4] = s.a * sx + s.b * sy, out[5] = s.c * sy + s.b * sx;
        out[6] = -0.5f * sum(pxx), out[7] = -sum(pxy), out[8] = -0.5f * sum(pyy);
    }
}

// ------------------------------------------------------------------------------------------------- gradients of the projection

// g: gradients of colour 0..2, opacity 3, u 4, v 5, conic a b c 6..8; those of lanes that are not valid are 0.
INLINE void backward_shape(const SplatView& view, const Projection& s, const V g[SUMS], V g_p[3], V g_axes[9], V g_log_scale[3]) {
    const V inv = 1.f / s.det, a = s.C * inv, b = -s.B * inv, c = s.A * inv, half = 0.5f * g[7];
    // conic = covariance^-1, so its gradient goes back as -conic G conic
    const V t0 = a * g[6] + b * half, t1 = a * half + b * g[8], t2 = b * g[6] + c * half, t3 = b * half + c * g[8];
    V gA = -(t0 * a + t1 * b), gB = -2.f * (t0 * b + t1 * c), gC = -(t2 * b + t3 * c);
    V g_det0{};
    if (view.antialiased) {
        const V g_ratio = choose(s.det0 > LEAST_RATIO * s.det, g[3] * s.logistic, V{});
        g_det0 = g_ratio * 0.5f / (s.ratio * s.det);
        const V g_det = -g_ratio * 0.5f * s.ratio / s.det;
        gA += g_det * s.C, gC += g_det * s.A, gB += -2.f * s.B * g_det;
        gA += g_det0 * (s.C - view.blur), gC += g_det0 * (s.A - view.blur), gB += -2.f * s.B * g_det0;
    }
    V g_J[6] = {};
    for (int k = 0; k < 3; ++k) {
        const V gM[2] = {2.f * gA * s.M[k] + gB * s.M[3 + k], gB * s.M[k] + 2.f * gC * s.M[3 + k]};
        g_log_scale[k] = gM[0] * s.M[k] + gM[1] * s.M[3 + k];
        for (int j = 0; j < 3; ++j) {
            g_axes[3 * j + k] = (s.J[j] * gM[0] + s.J[3 + j] * gM[1]) * s.scale[k];
            for (int i = 0; i < 2; ++i) g_J[3 * i + j] += gM[i] * s.scale[k] * s.axes[3 * j + k];
        }
    }
    V at[3] = {};  // gradient of the clamped point
    for (int i = 0; i < 2; ++i)
        for (int m = 0; m < 6; ++m) {
            const int r = ROW[m], t = COLUMN[m];
            at[t] += g_J[3 * i + r] * s.H[i][m];
            if (r != t) at[r] += g_J[3 * i + t] * s.H[i][m];
        }
    g_p[2] = at[2];
    for (int i = 0; i < 2; ++i) g_p[i] = choose(s.inside[i], at[i], V{}), g_p[2] += choose(s.inside[i], V{}, at[i] * s.limit[i]);
    for (int j = 0; j < 3; ++j) g_p[j] += s.J_mean[j] * g[4] + s.J_mean[3 + j] * g[5];
}

INLINE void backward_quaternion(const SplatView& view, const Projection& s, const V g_axes[9], V out[4]) {
    V r[9];  // gradient of R(q)
    for (int j = 0; j < 3; ++j)
        for (int k = 0; k < 3; ++k) r[3 * j + k] = view.rotation[j] * g_axes[k] + view.rotation[3 + j] * g_axes[3 + k] + view.rotation[6 + j] * g_axes[6 + k];
    const V w = s.q[0], x = s.q[1], y = s.q[2], z = s.q[3];
    const V g[4] = {2.f * (x * (r[7] - r[5]) + y * (r[2] - r[6]) + z * (r[3] - r[1])),
                    2.f * (y * (r[1] + r[3]) + z * (r[2] + r[6]) + w * (r[7] - r[5]) - 2.f * x * (r[4] + r[8])),
                    2.f * (x * (r[1] + r[3]) + z * (r[5] + r[7]) + w * (r[2] - r[6]) - 2.f * y * (r[0] + r[8])),
                    2.f * (x * (r[2] + r[6]) + y * (r[5] + r[7]) + w * (r[3] - r[1]) - 2.f * z * (r[0] + r[4]))};
    const V along = g[0] * w + g[1] * x + g[2] * y + g[3] * z;
    for (int i = 0; i < 4; ++i) out[i] = (g[i] - s.q[i] * along) / s.q_norm;
}

static void backward_block(const SplatView& view, const SplatArrays& of, const SplatArrays& to, int64_t first, int lanes, const float* sums) {
    V g[SUMS];
    I counts{};
    for (int i = 0; i < SUMS; ++i) g[i] = load(sums + i, SUMS, lanes), counts |= g[i] != 0.f;
    if (!any(counts)) return;  // the gradients are 0 already
    Projection s;
    project(view, of, first, lanes, s);
    counts &= s.valid;
    for (int i = 0; i < SUMS; ++i) g[i] = choose(counts, g[i], V{});
    V g_p[3], g_axes[9], g_log_scale[3], g_quat[4], g_mean[3];
    backward_shape(view, s, g, g_p, g_axes, g_log_scale);
    backward_quaternion(view, s, g_axes, g_quat);
    for (int i = 0; i < 3; ++i) g_mean[i] = view.rotation[i] * g_p[0] + view.rotation[3 + i] * g_p[1] + view.rotation[6 + i] * g_p[2];
    const int used = (view.degree + 1) * (view.degree + 1) - 1;
    V weights[15] = {}, basis[15];
    if (used) harmonics(view.degree, s.direction[0], s.direction[1], s.direction[2], basis);
    for (int c = 0; c < 3; ++c) {
        const V shade = choose(s.lit[c], g[c], V{});
        store(choose(counts, C0 * shade, V{}), to.dc + 3 * first + c, 3, lanes);
        for (int k = 0; k < used; ++k) {
            const int64_t at = 3 * (view.stored * first + k) + c;
            weights[k] += shade * load(of.rest + at, 3 * view.stored, lanes);
            store(choose(counts, basis[k] * shade, V{}), to.rest + at, 3 * view.stored, lanes);
        }
    }
    if (used) {
        V turn[3];
        harmonics_gradient(view.degree, s.direction[0], s.direction[1], s.direction[2], weights, turn);
        const V along = turn[0] * s.direction[0] + turn[1] * s.direction[1] + turn[2] * s.direction[2];
        for (int i = 0; i < 3; ++i) g_mean[i] += (turn[i] - s.direction[i] * along) / most(s.distance, set(1e-12f));
    }
    for (int i = 0; i < 3; ++i) {
        store(choose(counts, g_mean[i], V{}), to.means + 3 * first + i, 3, lanes);
        store(choose(counts, g_log_scale[i], V{}), to.log_scales + 3 * first + i, 3, lanes);
    }
    for (int i = 0; i < 4; ++i) store(choose(counts, g_quat[i], V{}), to.quats + 4 * first + i, 4, lanes);
    store(choose(counts, g[3] * s.ratio * s.logistic * (1.f - s.logistic), V{}), to.opacities + first, 1, lanes);
}

// ------------------------------------------------------------------------------------------------------------------- interface

// Renders count splats; rgb [H, W, 3] before the background, depth [H, W] or null (sum of weight x distance), light [H, W]. Returns
// what splats_backward needs, to be given to splats_free; null if the splats reach too many tiles to be listed.
EXPORT SplatPicture* splats_forward(const SplatView* view, const SplatArrays* of, int64_t count, float* rgb, float* depth, float* light, int threads) {
    auto picture = std::make_unique<SplatPicture>();
    picture->view = *view;
    picture->columns = (view->width + TILE - 1) / TILE, picture->rows = (view->height + TILE - 1) / TILE;
    std::vector<Splat> found(count);
    parallel_for((count + LANES - 1) / LANES, 32, threads, [&](int64_t from, int64_t to) {
        for (int64_t block = from; block < to; ++block) {
            const int lanes = int(std::min<int64_t>(LANES, count - block * LANES));
            Projection s;
            project(*view, *of, block * LANES, lanes, s);
            for (int i = 0; i < lanes; ++i) {
                found[block * LANES + i].id = -1;
                if (s.valid[i]) place(*view, s, i, block * LANES + i, found[block * LANES + i]);
            }
        }
    });
    sort_by_depth(found, picture->splats);
    if (!list_tiles(*picture)) return nullptr;
    const int tiles = picture->columns * picture->rows;
    picture->light.resize(16 * tiles), picture->last.resize(16 * tiles);
    parallel_for(tiles, 2, threads, [&](int64_t from, int64_t to) {
        for (int64_t tile = from; tile < to; ++tile) {
            if (depth) forward_tile<true>(*picture, int(tile), rgb, depth, light);
            else forward_tile<false>(*picture, int(tile), rgb, depth, light);
        }
    });
    return picture.release();
}

// Adds nothing: writes the gradients of splats that were seen into `to`, which holds zeros. The depth has no gradient.
EXPORT void splats_backward(const SplatPicture* picture, const SplatArrays* of, int64_t count, const float* g_rgb, const float* g_light, const SplatArrays* to, int threads) {
    std::vector<float> sums(SUMS * picture->pairs), each(SUMS * count);
    parallel_for(picture->columns * picture->rows, 2, threads, [&](int64_t from, int64_t until) {
        for (int64_t tile = from; tile < until; ++tile) backward_tile(*picture, int(tile), g_rgb, g_light, sums.data());
    });
    for (size_t i = 0; i < picture->splats.size(); ++i) {
        const int64_t end = i + 1 < picture->splats.size() ? picture->splats[i + 1].pairs : picture->pairs;
        float* out = each.data() + SUMS * int64_t(picture->splats[i].id);
        for (int64_t pair = picture->splats[i].pairs; pair < end; ++pair)
            for (int k = 0; k < SUMS; ++k) out[k] += sums[SUMS * pair + k];
    }
    parallel_for((count + LANES - 1) / LANES, 32, threads, [&](int64_t from, int64_t until) {
        for (int64_t block = from; block < until; ++block) {
            const int64_t first = block * LANES;
            backward_block(picture->view, *of, *to, first, int(std::min<int64_t>(LANES, count - first)), each.data() + SUMS * first);
        }
    });
}

EXPORT void splats_free(SplatPicture* picture) { delete picture; }
