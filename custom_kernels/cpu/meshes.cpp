// Pictures of textured triangles: z-buffer, perspective-correct texture coordinates, bilinear texture, several samples a pixel.
//
// No multiply-add is contracted here and colours are integers, so that custom_kernels/meshes.py in numpy gives the same bytes.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "common.h"

#include <cmath>

namespace {

constexpr int64_t ROWS = 16;  // rows of pixels at a time, whose samples stay in the cache
constexpr double EDGE = -1e-9;  // least barycentric coordinate of a sample that is covered
constexpr int64_t ONE = 256;  // parts of a texel

struct Mesh {  // mirrored by _Mesh in custom_kernels/meshes.py
    const double *points, *inverse, *uv;  // [V, 2] in samples, [V] (0: behind the camera), [V, 2]
    const int64_t* faces;                 // [F, 3]
    int64_t count;
    const uint8_t* texture;  // [texture_height, texture_width, 3]
    int64_t texture_width, texture_height;
};

struct Triangle {  // one that faces the camera, and the samples [x0, x1) × [y0, y1) about it
    int64_t corner[3], x0, x1, y0, y1;
    double ax, ay, e1x, e1y, e2x, e2y, area, inverse[3];
};

// The inverse depth of a sample, and the corners' shares in it; 0 outside of the triangle.
inline double cover(const Triangle& t, int64_t x, int64_t y, double share[3]) {
    const double px = x + 0.5 - t.ax, py = y + 0.5 - t.ay;
    const double v = (px * t.e2y - py * t.e2x) / t.area, w = (t.e1x * py - t.e1y * px) / t.area, u = 1 - v - w;
    if (u < EDGE || v < EDGE || w < EDGE) return 0;
    share[0] = u * t.inverse[0], share[1] = v * t.inverse[1], share[2] = w * t.inverse[2];  // attributes / depth are linear here
    return share[0] + share[1] + share[2];
}

std::vector<Triangle> facing(const Mesh& mesh, int64_t width, int64_t height) {
    std::vector<Triangle> found;
    found.reserve(mesh.count / 2);
    for (int64_t f = 0; f < mesh.count; ++f) {
        Triangle t;
        const double* p[3];
        for (int k = 0; k < 3; ++k) {
            t.corner[k] = mesh.faces[3 * f + k];
            p[k] = mesh.points + 2 * t.corner[k];
            t.inverse[k] = mesh.inverse[t.corner[k]];
        }
        if (!(t.inverse[0] > 0 && t.inverse[1] > 0 && t.inverse[2] > 0)) continue;
        t.ax = p[0][0], t.ay = p[0][1];
        t.e1x = p[1][0] - t.ax, t.e1y = p[1][1] - t.ay, t.e2x = p[2][0] - t.ax, t.e2y = p[2][1] - t.ay;
        t.area = t.e1x * t.e2y - t.e1y * t.e2x;
        if (!(t.area < 0) || !std::isfinite(t.area)) continue;  // counter-clockwise with y down: the front
        const auto x = std::minmax({p[0][0], p[1][0], p[2][0]}), y = std::minmax({p[0][1], p[1][1], p[2][1]});
        // clamped as doubles: a corner far away does not fit an integer
        t.x0 = int64_t(std::clamp(std::ceil(x.first - 0.5), 0.0, double(width)));
        t.x1 = int64_t(std::clamp(std::floor(x.second - 0.5) + 1, 0.0, double(width)));
        t.y0 = int64_t(std::clamp(std::ceil(y.first - 0.5), 0.0, double(height)));
        t.y1 = int64_t(std::clamp(std::floor(y.second - 0.5) + 1, 0.0, double(height)));
        if (t.x0 < t.x1 && t.y0 < t.y1) found.push_back(t);
    }
    return found;
}

// Adds the texture's colour at (u, v) in 1 / ONE² to sum [3]; v runs upwards, and beyond its edges the texture goes on as there.
inline void add_colour(const Mesh& mesh, double u, double v, int64_t sum[3]) {
    const double width = double(mesh.texture_width), height = double(mesh.texture_height);
    const auto x = int64_t(std::floor(std::clamp(u * width - 0.5, 0.0, width - 1) * ONE + 0.5));
    const auto y = int64_t(std::floor(std::clamp((1 - v) * height - 0.5, 0.0, height - 1) * ONE + 0.5));
    const int64_t fx = x % ONE, fy = y % ONE, right = x / ONE + 1 < mesh.texture_width ? 3 : 0;
    const uint8_t* above = mesh.texture + 3 * (y / ONE * mesh.texture_width + x / ONE);
    const uint8_t* below = y / ONE + 1 < mesh.texture_height ? above + 3 * mesh.texture_width : above;
    for (int c = 0; c < 3; ++c) {
        const int64_t top = (ONE - fx) * above[c] + fx * above[c + right], bottom = (ONE - fx) * below[c] + fx * below[c + right];
        sum[c] += (ONE - fy) * top + fy * bottom;
    }
}

}  // namespace

// Draws the front faces before the grey `background` into picture [height, width, 3], with samples² samples a pixel. Each thread fills
// whole rows, so that the result is the same for any number of threads; of equally near triangles the first is seen.
EXPORT void draw_mesh(const Mesh* mesh, int64_t width, int64_t height, int64_t samples, int64_t background, uint8_t* picture,
                      int threads) {
    const int64_t columns = width * samples;
    const std::vector<Triangle> triangles = facing(*mesh, columns, height * samples);
    parallel_for(height, ROWS, threads, [&](int64_t first, int64_t last) {
        const int64_t top = first * samples, bottom = last * samples;
        std::vector<double> nearest((bottom - top) * columns, 0.0);
        std::vector<const Triangle*> seen(nearest.size(), nullptr);
        double share[3] = {};
        for (const Triangle& t : triangles) {
            for (int64_t y = std::max(t.y0, top); y < std::min(t.y1, bottom); ++y) {
                for (int64_t x = t.x0; x < t.x1; ++x) {
                    const double near = cover(t, x, y, share);
                    const int64_t at = (y - top) * columns + x;
                    if (near > nearest[at]) nearest[at] = near, seen[at] = &t;
                }
            }
        }
        for (int64_t row = first; row < last; ++row) {
            for (int64_t column = 0; column < width; ++column) {
                int64_t sum[3] = {0, 0, 0};
                for (int64_t k = 0; k < samples * samples; ++k) {
                    const int64_t y = row * samples + k / samples, x = column * samples + k % samples;
                    const Triangle* t = seen[(y - top) * columns + x];
                    if (t == nullptr) {
                        for (int64_t& c : sum) c += background * ONE * ONE;
                        continue;
                    }
                    const double near = cover(*t, x, y, share);
                    const double *a = mesh->uv + 2 * t->corner[0], *b = mesh->uv + 2 * t->corner[1], *c = mesh->uv + 2 * t->corner[2];
                    const double u = (share[0] * a[0] + share[1] * b[0] + share[2] * c[0]) / near;
                    const double v = (share[0] * a[1] + share[1] * b[1] + share[2] * c[1]) / near;
                    add_colour(*mesh, u, v, sum);
                }
                const int64_t whole = ONE * ONE * samples * samples;
                for (int c = 0; c < 3; ++c) picture[3 * (row * width + column) + c] = uint8_t((2 * sum[c] + whole) / (2 * whole));
            }
        }
    });
}
