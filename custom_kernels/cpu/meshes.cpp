// z-buffer of triangles with perspective-correct texture coordinates.
#include "common.h"

#include <cmath>

// corners [F, 3, 2] in pixels, inverse depths [F, 3], uv [F, 3, 2] -> nearest inverse depth [H, W] (0 where there is none) and its uv
// [H, W, 2], both zero at first. Each thread fills whole rows, so that the result is the same for any number of threads; of equally
// near triangles the first stays.
EXPORT void z_buffer(const double* corners, const double* inverse, const double* uv, int64_t faces, int64_t width, int64_t height,
                     double* nearest, double* found, int threads) {
    constexpr int64_t rows = 64;
    parallel_for(height, rows, threads, [&](int64_t first, int64_t last) {
        for (int64_t f = 0; f < faces; ++f) {
            const double *p = corners + 6 * f, *z = inverse + 3 * f, *t = uv + 6 * f;
            const double e1x = p[2] - p[0], e1y = p[3] - p[1], e2x = p[4] - p[0], e2y = p[5] - p[1];
            const double area = e1x * e2y - e1y * e2x;
            if (area == 0 || !std::isfinite(area)) continue;
            const double left = std::min({p[0], p[2], p[4]}), right = std::max({p[0], p[2], p[4]});
            const double top = std::min({p[1], p[3], p[5]}), bottom = std::max({p[1], p[3], p[5]});
            // clamped as doubles: a corner far away does not fit an integer
            const auto x0 = int64_t(std::clamp(std::ceil(left - 0.5), 0.0, double(width)));
            const auto x1 = int64_t(std::clamp(std::floor(right - 0.5) + 1, 0.0, double(width)));
            const auto y0 = int64_t(std::clamp(std::ceil(top - 0.5), double(first), double(last)));
            const auto y1 = int64_t(std::clamp(std::floor(bottom - 0.5) + 1, double(first), double(last)));
            for (int64_t y = y0; y < y1; ++y) {
                for (int64_t x = x0; x < x1; ++x) {
                    const double px = x + 0.5 - p[0], py = y + 0.5 - p[1];
                    const double v = (px * e2y - py * e2x) / area, w = (e1x * py - e1y * px) / area, u = 1 - v - w;
                    if (u < -1e-9 || v < -1e-9 || w < -1e-9) continue;
                    const double a = u * z[0], b = v * z[1], c = w * z[2], near = a + b + c;  // attributes / depth are linear here
                    const int64_t at = y * width + x;
                    if (!(near > nearest[at])) continue;
                    nearest[at] = near;
                    found[2 * at] = (a * t[0] + b * t[2] + c * t[4]) / near;
                    found[2 * at + 1] = (a * t[1] + b * t[3] + c * t[5]) / near;
                }
            }
        }
    });
}
