// Splats into the picture, 16 at a time, and the gradients back. custom_kernels/splats.py has the equations.
#pragma once

#include "splats_math.h"

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

