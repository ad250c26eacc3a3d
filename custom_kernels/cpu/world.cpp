// Sphere tracing of the procedural world: signed-distance primitives, patterns, materials, one sun, soft shadows, ambient occlusion.
// Rays are traced in packets of 16 lanes; every inner loop runs over lanes so that the compiler turns it into SIMD.
// The torch reference (csd3d/world/reference.py) computes the same numbers.

#include <cmath>
#include <cstring>

#include "common.h"

namespace {

constexpr int LANES = 16;
constexpr int PRIMITIVE = 18;  // type, material, position 3, rotation 9 (world to local, row-major), size 4
constexpr int MATERIAL = 11;   // colour 3, pattern colour 3, pattern, gloss, metal, snow, part of the object
constexpr int GLOBALS = 20;    // sun 3, sunlight 3, ambient 3, sky 3, ground 3, background kind, object cos, sin, 1/scale, floor z
constexpr int CAMERA = 16;     // camera to world 3x4, fx, fy, cx, cy
constexpr float BOUND = 1.45f, FAR = 100.f, HIT = 4e-4f;

enum Shape { SPHERE, BOX, CYLINDER, CONE, TORUS, CAPSULE, TUBE };
enum Pattern { PLAIN, STRIPES, CHECKS, DOTS };

inline float min2(float a, float b) { return a < b ? a : b; }
inline float max2(float a, float b) { return a > b ? a : b; }
inline float clamp01(float x) { return min2(max2(x, 0.f), 1.f); }
inline float length2(float x, float y) { return sqrtf(x * x + y * y); }
inline float mix(float a, float b, float w) { return a + (b - a) * w; }
inline float smoothstep(float a, float b, float x) {
    const float t = clamp01((x - a) / (b - a));
    return t * t * (3.f - 2.f * t);
}

struct Packet {
    alignas(64) float x[LANES], y[LANES], z[LANES];
};

// distance to a rounded cross-section given by its two signed half-extents
inline float extrude(float a, float b, float round) {
    return min2(max2(a, b), 0.f) + length2(max2(a, 0.f), max2(b, 0.f)) - round;
}

inline float shape_distance(int type, const float* s, float x, float y, float z) {
    switch (type) {
        case SPHERE: return sqrtf(x * x + y * y + z * z) - s[0];
        case BOX: {
            const float qx = fabsf(x) - s[0] + s[3], qy = fabsf(y) - s[1] + s[3], qz = fabsf(z) - s[2] + s[3];
            const float ox = max2(qx, 0.f), oy = max2(qy, 0.f), oz = max2(qz, 0.f);
            return sqrtf(ox * ox + oy * oy + oz * oz) + min2(max2(qx, max2(qy, qz)), 0.f) - s[3];
        }
        case CYLINDER: return extrude(length2(x, y) - s[0] + s[2], fabsf(z) - s[1] + s[2], s[2]);
        case CONE: {  // radii s[0] below, s[1] above, half height s[2]
            const float q = length2(x, y), k1 = s[1] - s[0], k2 = 2.f * s[2];
            const float ax = q - min2(q, z < 0.f ? s[0] : s[1]), ay = fabsf(z) - s[2];
            const float along = clamp01(((s[1] - q) * k1 + (s[2] - z) * k2) / (k1 * k1 + k2 * k2));
            const float bx = q - s[1] + k1 * along, by = z - s[2] + k2 * along;
            const float inside = (bx < 0.f && ay < 0.f) ? -1.f : 1.f;
            return inside * sqrtf(min2(ax * ax + ay * ay, bx * bx + by * by));
        }
        case TORUS: return length2(length2(x, y) - s[0], z) - s[1];
        case CAPSULE: {
            const float c = z - min2(max2(z, -s[1]), s[1]);
            return sqrtf(x * x + y * y + c * c) - s[0];
        }
        default: return extrude(fabsf(length2(x, y) - s[0]) - s[1], fabsf(z) - s[2], 0.f);
    }
}

struct Scene {
    const float* primitives;
    int64_t count;
    const float* materials;
    const float* g;

    // distance to the nearest primitive, and (if asked) the material there
    template <bool WITH_MATERIAL>
    void distance(const Packet& p, float* out, int* material) const {
        for (int l = 0; l < LANES; ++l) out[l] = FAR;
        for (int64_t i = 0; i < count; ++i) {
            const float* q = primitives + i * PRIMITIVE;
            const float *r = q + 5, *s = q + 14;
            switch (static_cast<int>(q[0])) {
#define CASE(TYPE)                                                                                            \
    case TYPE:                                                                                                \
        for (int l = 0; l < LANES; ++l) {                                                                     \
            const float x = p.x[l] - q[2], y = p.y[l] - q[3], z = p.z[l] - q[4];                              \
            const float d = shape_distance(TYPE, s, r[0] * x + r[1] * y + r[2] * z, r[3] * x + r[4] * y + r[5] * z, \
                                           r[6] * x + r[7] * y + r[8] * z);                                   \
            if (WITH_MATERIAL) material[l] = d < out[l] ? static_cast<int>(q[1]) : material[l];               \
            out[l] = min2(out[l], d);                                                                         \
        }                                                                                                     \
        break;
                CASE(SPHERE) CASE(BOX) CASE(CYLINDER) CASE(CONE) CASE(TORUS) CASE(CAPSULE) CASE(TUBE)
#undef CASE
            }
        }
    }

    void background(const float* d, float* rgb) const {
        const float width = g[15] < 1.5f ? 0.6f : 0.03f;
        const float w = g[15] < 0.5f ? 1.f : smoothstep(-width, width, d[2]);
        for (int c = 0; c < 3; ++c) rgb[c] = mix(g[12 + c], g[9 + c], w);
    }
};

// the share of the pattern's second colour at an object point with object-frame normal n
float pattern_weight(int pattern, const float* p, const float* n) {
    if (pattern == STRIPES) {
        const float u = (p[2] + 0.5f * sqrtf(p[0] * p[0] + p[1] * p[1])) / 0.56f;  // the same from all around
        return u - floorf(u) < 0.5f ? 1.f : 0.f;
    }
    if (pattern == CHECKS) {
        const float s = floorf(p[0] / 0.48f + 0.5f) + floorf(p[1] / 0.48f + 0.5f) + floorf(p[2] / 0.48f + 0.25f);
        return s - 2.f * floorf(s / 2.f);
    }
    if (pattern == DOTS) {  // on the plane most parallel to the surface
        const float ax = fabsf(n[0]), ay = fabsf(n[1]), az = fabsf(n[2]);
        float u = ax >= ay && ax >= az ? p[1] : p[0], v = az > ax && az > ay ? p[1] : p[2];
        u = u / 0.38f + 0.5f;
        v = v / 0.38f + 0.5f;
        const float i = floorf(u), j = floorf(v), du = u - i - 0.5f, dv = v - j - 0.5f;
        return i + j == 2.f * floorf((i + j) / 2.f) && du * du + dv * dv < 0.18f ? 1.f : 0.f;
    }
    return 0.f;
}

struct Sample {
    float rgb[3], albedo[3], depth, object;
};

void surface_albedo(const Scene& scene, const float* m, const float* p, const float* n, float* albedo) {
    const float* g = scene.g;
    const float local[3] = {(g[16] * p[0] + g[17] * p[1]) * g[18], (-g[17] * p[0] + g[16] * p[1]) * g[18], (p[2] - g[19]) * g[18]};
    const float turned[3] = {g[16] * n[0] + g[17] * n[1], -g[17] * n[0] + g[16] * n[1], n[2]};
    const float w = pattern_weight(static_cast<int>(m[6]), local, turned), snow = m[9] * smoothstep(0.15f, 0.5f, n[2]);
    for (int c = 0; c < 3; ++c) albedo[c] = mix(mix(m[c], m[3 + c], w), 0.96f, snow);
}

void shade(const Scene& scene, const float* m, const float* n, const float* d, float shadow, float occlusion, Sample& s) {
    const float* g = scene.g;
    const float facing = max2(n[0] * g[0] + n[1] * g[1] + n[2] * g[2], 0.f) * shadow;
    const float dn = d[0] * n[0] + d[1] * n[1] + d[2] * n[2];
    const float r[3] = {d[0] - 2.f * dn * n[0], d[1] - 2.f * dn * n[1], d[2] - 2.f * dn * n[2]};
    const float glint = powf(max2(r[0] * g[0] + r[1] * g[1] + r[2] * g[2], 0.f), 24.f) * shadow;
    const float mirror = mix(mix(0.45f, 0.12f, clamp01(-r[2])), mix(0.75f, 1.05f, clamp01(r[2])), smoothstep(-0.12f, 0.12f, r[2]));
    for (int c = 0; c < 3; ++c) {
        const float light = g[6 + c] * occlusion * (0.7f + 0.3f * n[2]) + g[3 + c] * facing;
        const float matte = s.albedo[c] * light;
        const float metal = mix(s.albedo[c], 0.75f, 0.55f) * mirror * (0.4f * light + 0.6f * (g[3 + c] + g[6 + c]) * 0.8f);
        s.rgb[c] = clamp01(mix(matte, metal, m[8]) + (m[7] * 0.55f + m[8] * 0.4f) * glint * g[3 + c]);
    }
}

void normals(const Scene& scene, const Packet& p, Packet& n) {
    constexpr float E = 1e-3f;
    static const float K[4][3] = {{1, -1, -1}, {-1, -1, 1}, {-1, 1, -1}, {1, 1, 1}};
    alignas(64) float d[LANES];
    std::memset(&n, 0, sizeof(n));
    for (const auto& k : K) {
        Packet q;
        for (int l = 0; l < LANES; ++l) q.x[l] = p.x[l] + E * k[0], q.y[l] = p.y[l] + E * k[1], q.z[l] = p.z[l] + E * k[2];
        scene.distance<false>(q, d, nullptr);
        for (int l = 0; l < LANES; ++l) n.x[l] += k[0] * d[l], n.y[l] += k[1] * d[l], n.z[l] += k[2] * d[l];
    }
    for (int l = 0; l < LANES; ++l) {
        const float scale = 1.f / max2(sqrtf(n.x[l] * n.x[l] + n.y[l] * n.y[l] + n.z[l] * n.z[l]), 1e-12f);
        n.x[l] *= scale, n.y[l] *= scale, n.z[l] *= scale;
    }
}

// 24 steps towards the sun; the nearest miss relative to its distance is the penumbra
void shadows(const Scene& scene, const Packet& p, const Packet& n, float* shadow) {
    alignas(64) float d[LANES], t[LANES];
    for (int l = 0; l < LANES; ++l) t[l] = 0.02f, shadow[l] = 1.f;
    for (int step = 0; step < 24; ++step) {
        Packet q;
        for (int l = 0; l < LANES; ++l) {
            q.x[l] = p.x[l] + 0.01f * n.x[l] + t[l] * scene.g[0];
            q.y[l] = p.y[l] + 0.01f * n.y[l] + t[l] * scene.g[1];
            q.z[l] = p.z[l] + 0.01f * n.z[l] + t[l] * scene.g[2];
        }
        scene.distance<false>(q, d, nullptr);
        for (int l = 0; l < LANES; ++l) {
            shadow[l] = min2(shadow[l], clamp01(0.5f + 5.f * d[l] / t[l]));
            t[l] += max2(d[l], 0.02f);
        }
    }
    for (int l = 0; l < LANES; ++l) shadow[l] = shadow[l] * shadow[l] * (3.f - 2.f * shadow[l]);
}

void occlusions(const Scene& scene, const Packet& p, const Packet& n, float* occlusion) {
    alignas(64) float d[LANES];
    for (int l = 0; l < LANES; ++l) occlusion[l] = 1.f;
    for (int k = 1; k <= 3; ++k) {
        const float h = 0.08f * k;
        Packet q;
        for (int l = 0; l < LANES; ++l) q.x[l] = p.x[l] + h * n.x[l], q.y[l] = p.y[l] + h * n.y[l], q.z[l] = p.z[l] + h * n.z[l];
        scene.distance<false>(q, d, nullptr);
        for (int l = 0; l < LANES; ++l) occlusion[l] -= 0.9f / (1 << k) * clamp01((h - d[l]) / h);
    }
}

void trace(const Scene& scene, const float* origin, const Packet& dir, Sample* out) {
    alignas(64) float t[LANES], last[LANES], d[LANES];
    alignas(64) int hit[LANES], alive[LANES], material[LANES];
    int any = 0;
    for (int l = 0; l < LANES; ++l) {  // enter and leave the ball that bounds everything
        const float b = origin[0] * dir.x[l] + origin[1] * dir.y[l] + origin[2] * dir.z[l];
        const float c = origin[0] * origin[0] + origin[1] * origin[1] + origin[2] * origin[2] - BOUND * BOUND;
        const float disc = b * b - c, root = sqrtf(max2(disc, 0.f));
        t[l] = max2(-b - root, 0.f);
        last[l] = -b + root;
        alive[l] = disc > 0.f && last[l] > 0.f;
        hit[l] = 0;
        any |= alive[l];
    }
    Packet p;
    for (int step = 0; step < 128 && any; ++step) {
        for (int l = 0; l < LANES; ++l) {
            p.x[l] = origin[0] + t[l] * dir.x[l], p.y[l] = origin[1] + t[l] * dir.y[l], p.z[l] = origin[2] + t[l] * dir.z[l];
        }
        scene.distance<false>(p, d, nullptr);
        any = 0;
        for (int l = 0; l < LANES; ++l) {
            hit[l] |= alive[l] & (d[l] < HIT);
            alive[l] &= (d[l] >= HIT) & (t[l] < last[l]);
            t[l] += alive[l] ? d[l] : 0.f;
            any |= alive[l];
        }
    }
    int hits = 0;
    for (int l = 0; l < LANES; ++l) hits |= hit[l];
    Packet n;
    alignas(64) float shadow[LANES], occlusion[LANES];
    if (hits) {
        for (int l = 0; l < LANES; ++l) {
            p.x[l] = origin[0] + t[l] * dir.x[l], p.y[l] = origin[1] + t[l] * dir.y[l], p.z[l] = origin[2] + t[l] * dir.z[l];
        }
        scene.distance<true>(p, d, material);
        normals(scene, p, n);
        shadows(scene, p, n, shadow);
        occlusions(scene, p, n, occlusion);
    }
    for (int l = 0; l < LANES; ++l) {
        const float direction[3] = {dir.x[l], dir.y[l], dir.z[l]};
        Sample& s = out[l];
        if (!hit[l]) {
            scene.background(direction, s.rgb);
            std::memcpy(s.albedo, s.rgb, sizeof(s.rgb));
            s.depth = FAR, s.object = 0.f;
            continue;
        }
        const float* m = scene.materials + material[l] * MATERIAL;
        const float point[3] = {p.x[l], p.y[l], p.z[l]}, normal[3] = {n.x[l], n.y[l], n.z[l]};
        surface_albedo(scene, m, point, normal, s.albedo);
        shade(scene, m, normal, direction, shadow[l], occlusion[l], s);
        s.depth = t[l], s.object = m[10];
    }
}

struct Images {
    float *rgb, *albedo, *depth, *mask;
};

// one row of one image; `samples`² rays a pixel, the depth being that of the nearest
void render_row(const Scene& scene, const float* camera, int width, int row, int samples, const Images& out) {
    const int rays = width * samples * samples;
    std::vector<Sample> traced(rays + LANES);
    for (int first = 0; first < rays; first += LANES) {
        Packet dir;
        for (int l = 0; l < LANES; ++l) {
            const int ray = std::min(first + l, rays - 1), pixel = ray / (samples * samples), sub = ray % (samples * samples);
            const float u = (pixel + (sub % samples + 0.5f) / samples - camera[14]) / camera[12];
            const float v = -(row + (sub / samples + 0.5f) / samples - camera[15]) / camera[13];
            const float norm = 1.f / sqrtf(u * u + v * v + 1.f);
            float* axes[3] = {dir.x, dir.y, dir.z};
            for (int c = 0; c < 3; ++c) axes[c][l] = (camera[4 * c] * u + camera[4 * c + 1] * v - camera[4 * c + 2]) * norm;
        }
        const float origin[3] = {camera[3], camera[7], camera[11]};
        trace(scene, origin, dir, traced.data() + first);
    }
    for (int x = 0; x < width; ++x) {
        const int64_t pixel = static_cast<int64_t>(row) * width + x;
        float sum[7] = {0}, depth = FAR;
        for (int k = 0; k < samples * samples; ++k) {
            const Sample& s = traced[x * samples * samples + k];
            for (int c = 0; c < 3; ++c) sum[c] += s.rgb[c], sum[3 + c] += s.albedo[c];
            sum[6] += s.object;
            depth = min2(depth, s.depth);
        }
        const float scale = 1.f / (samples * samples);
        for (int c = 0; c < 3; ++c) out.rgb[3 * pixel + c] = sum[c] * scale;
        for (int c = 0; c < 3 && out.albedo; ++c) out.albedo[3 * pixel + c] = sum[3 + c] * scale;
        if (out.depth) out.depth[pixel] = depth;
        if (out.mask) out.mask[pixel] = sum[6] * scale;
    }
}

}  // namespace

// Renders `count` images, each of its own scene (primitives [first[i], first[i+1]), materials, globals) and camera.
// rgb [count,H,W,3]; albedo, depth, mask may be null.
EXPORT void world_render(int64_t count, const int64_t* first, const float* primitives, const int64_t* first_material,
                         const float* materials, const float* globals, const float* cameras, int width, int height, int samples,
                         float* rgb, float* albedo, float* depth, float* mask, int threads) {
    const int64_t pixels = static_cast<int64_t>(width) * height;
    parallel_for(count * height, 8, threads, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t i = task / height, at = i * pixels;
            const Scene scene{primitives + first[i] * PRIMITIVE, first[i + 1] - first[i],
                              materials + first_material[i] * MATERIAL, globals + i * GLOBALS};
            const Images out{rgb + 3 * at, albedo ? albedo + 3 * at : nullptr, depth ? depth + at : nullptr, mask ? mask + at : nullptr};
            render_row(scene, cameras + i * CAMERA, width, static_cast<int>(task % height), samples, out);
        }
    });
}
