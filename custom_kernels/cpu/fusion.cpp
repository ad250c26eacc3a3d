// Fusion of depth pictures into a truncated signed distance (Curless & Levoy 1996). custom_kernels/fusion.py describes it.
#include <cmath>

#include "common.h"

struct FusionView {
    float rotation[9], position[3], fx, fy, cx, cy;
    int32_t width, height;
    const float *rgb, *depth, *opacity;
};

namespace {
// The depth at a pixel: interpolated where its four neighbours are one surface, else the nearest one's.
float depth_at(const FusionView& view, float u, float v, int64_t nearest, float truncation) {
    const int x = int(std::floor(u - 0.5f)), y = int(std::floor(v - 0.5f));
    if (x < 0 || y < 0 || x + 1 >= view.width || y + 1 >= view.height) return view.depth[nearest];
    const int64_t p = int64_t(y) * view.width + x, q = p + view.width;
    const float *d = view.depth, *o = view.opacity;
    const float low = std::min({d[p], d[p + 1], d[q], d[q + 1]}), high = std::max({d[p], d[p + 1], d[q], d[q + 1]});
    if (high - low > truncation || std::min({o[p], o[p + 1], o[q], o[q + 1]}) <= 0.5f) return d[nearest];
    const float a = u - 0.5f - x, b = v - 0.5f - y;
    return (1 - b) * ((1 - a) * d[p] + a * d[p + 1]) + b * ((1 - a) * d[q] + a * d[q + 1]);
}
}  // namespace

// Adds one picture to the sums at the points low + voxel (i, j, k): distance, weight [X, Y, Z], colour [X, Y, Z, 4] with its weight last;
// hidden [X, Y, Z] becomes 1 where the point is behind a surface.
EXPORT void fuse_view(const FusionView* view, const float* low, float voxel, const int64_t* counts, float truncation, float* distance,
                      float* weight, float* colour, uint8_t* hidden, int threads) {
    const int64_t Y = counts[1], Z = counts[2];
    parallel_for(counts[0] * Y, 64, threads, [&](int64_t from, int64_t to) {
        const float* R = view->rotation;
        for (int64_t column = from; column < to; ++column) {
            const float x = low[0] + voxel * (column / Y) - view->position[0], y = low[1] + voxel * (column % Y) - view->position[1];
            for (int64_t k = 0; k < Z; ++k) {
                const float z = low[2] + voxel * k - view->position[2];
                const float px = R[0] * x + R[1] * y + R[2] * z, py = R[3] * x + R[4] * y + R[5] * z, pz = R[6] * x + R[7] * y + R[8] * z;
                if (!(pz > 1e-6f)) continue;
                const float u = view->fx * px / pz + view->cx, v = view->fy * py / pz + view->cy;
                if (!(u >= 0 && v >= 0 && u < view->width && v < view->height)) continue;
                const int64_t pixel = int64_t(v) * view->width + int64_t(u), at = column * Z + k;
                float signed_distance = truncation;  // where nothing is seen all is empty
                if (view->opacity[pixel] > 0.5f) signed_distance = depth_at(*view, u, v, pixel, truncation) - std::sqrt(px * px + py * py + pz * pz);
                if (signed_distance < -truncation) {
                    hidden[at] = 1;
                    continue;
                }
                const float t = std::min(1.f, signed_distance / truncation), near = 1 - std::fabs(t);
                distance[at] += t, weight[at] += 1;
                for (int c = 0; c < 3; ++c) colour[4 * at + c] += near * near * view->rgb[3 * pixel + c];
                colour[4 * at + 3] += near * near;
            }
        }
    });
}
