// 3D Gaussian splatting (Kerbl et al. 2023, arXiv 2308.04079): projection, sorting, tiles, compositing, and the gradients of all of it.
// custom_kernels/splats.py has the equations and the reference. Vectors are GCC's, 16 floats wide on every instruction set: 16 splats
// in the projection, 4 x 4 pixels in the rasteriser. Every sum has an order that does not depend on the number of threads.
#include <memory>

#include "splats_projection.h"

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
