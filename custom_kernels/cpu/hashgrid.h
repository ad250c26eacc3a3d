// Multiresolution hash encoding (Müller et al. 2022, arXiv 2201.05989, section 3): cells, interpolation and its adjoint.
//
// Layout and indexing are tiny-cuda-nn's: see custom_kernels/hashgrid.py, whose torch reference this must match.
// The arithmetic of a level (cells, fractions, table indices) is done for sixteen points at a time, which compilers turn
// into vector instructions. Table entries are loaded and stored point by point; only AVX-512 gathers entries of two floats, and its
// arithmetic is the same, operation by operation.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>

#include "common.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors are passed between inlined functions only

namespace {

constexpr int LANES = 16, CORNERS = 8;

struct Level {
    float scale;          // cells along an axis
    uint32_t resolution;  // vertices along an axis
    uint32_t size;        // table entries
    int64_t offset;       // first entry
    bool hashed;
};

// Sixteen points in a level: table indices of their cells' corners (corner bits are x, y, z from the lowest),
// cells and fractions.
struct alignas(64) Cells {
    uint32_t index[CORNERS][LANES];
    uint32_t cell[3][LANES];
    float fraction[3][LANES];
};

}  // namespace

struct HashGrid {  // mirrored by _Grid in custom_kernels/hashgrid.py
    const int64_t* offsets;
    const float* resolutions;
    int32_t levels, features;
};

namespace {

Level level_of(const HashGrid& grid, int l) {
    const float scale = grid.resolutions[l] - 1.0f;
    const uint32_t resolution = static_cast<uint32_t>(std::ceil(scale)) + 1;
    const int64_t size = grid.offsets[l + 1] - grid.offsets[l];
    const bool hashed = static_cast<double>(resolution) * resolution * resolution > static_cast<double>(size);
    return {scale, resolution, static_cast<uint32_t>(size), grid.offsets[l], hashed};
}

// a * b + c rounded once: rounding position * scale by itself loses the low bits of the fraction on fine levels.
inline float fused(float a, float b, float c) {
#if defined(__FMA__)
    return __builtin_fmaf(a, b, c);
#else
    return static_cast<float>(static_cast<double>(a) * b + c);
#endif
}

// Cell and fraction of x * scale + 0.5 along an axis, for x clamped to [0, 1]; a NaN gets some cell and a NaN fraction.
inline void locate(const float* x, const Level& level, uint32_t* cell, float* fraction) {
    for (int i = 0; i < LANES; ++i) {
        float inside = 0.0f > x[i] ? 0.0f : x[i];
        inside = 1.0f < inside ? 1.0f : inside;
        int32_t whole = static_cast<int32_t>(fused(inside, level.scale, 0.5f));
        whole = static_cast<uint32_t>(whole) > level.resolution ? 0 : whole;
        const float rest = fused(inside, level.scale, 0.5f - static_cast<float>(whole));
        const bool overshot = rest < 0.0f;  // the sum above was rounded up to a whole number
        cell[i] = overshot ? whole - 1 : whole;
        fraction[i] = overshot ? rest + 1.0f : rest;
    }
}

template <bool HASHED>
inline void find_corners(const Level& level, const uint32_t step[3], Cells& cells) {
    for (int c = 0; c < CORNERS; ++c) {
        const uint32_t far_x = c & 1, far_y = c >> 1 & 1, far_z = c >> 2;
        for (int i = 0; i < LANES; ++i) {
            const uint32_t x = (cells.cell[0][i] + far_x) * step[0];
            const uint32_t y = (cells.cell[1][i] + far_y) * step[1];
            const uint32_t z = (cells.cell[2][i] + far_z) * step[2];
            const uint32_t sum = x + y + z;  // a position at 1 reaches one row past the end: tiny-cuda-nn's modulo
            cells.index[c][i] = HASHED ? (x ^ y ^ z) & (level.size - 1) : sum >= level.size ? sum - level.size : sum;
        }
    }
}

inline void find_cells(const Level& level, const float* const axes[3], int64_t at, Cells& cells) {
    for (int k = 0; k < 3; ++k) locate(axes[k] + at, level, cells.cell[k], cells.fraction[k]);
    const uint32_t n = level.resolution;
    const uint32_t hashing[3] = {1u, 2654435761u, 805459861u}, counting[3] = {1u, n, n * n};
    if (level.hashed) find_corners<true>(level, hashing, cells);
    else find_corners<false>(level, counting, cells);
}

// Points per task where points are independent: many, because each task loads every level's table into the cache once.
// Results do not depend on it.
inline int64_t grain_for(int64_t count, int threads) {
    const int64_t share = count / std::max(threads, 1) + LANES;
    return std::clamp<int64_t>(share, 1024, 131072) / LANES * LANES;
}

// Copies positions [first, last) to one array an axis, padded to whole lanes.
struct Axes {
    std::vector<float> data;
    const float* axis[3];
    Axes(const float* positions, int64_t first, int64_t last) {
        const int64_t padded = (last - first + LANES - 1) / LANES * LANES;
        data.assign(3 * padded, 0.0f);
        for (int64_t i = first; i < last; ++i)
            for (int k = 0; k < 3; ++k) data[k * padded + i - first] = positions[3 * i + k];
        for (int k = 0; k < 3; ++k) axis[k] = data.data() + k * padded;
    }
};

// Two table entries, a corner and its neighbour along x, side by side in one vector.
template <int F>
struct Pair {
    typedef float One __attribute__((vector_size(4 * F)));
    typedef float Two __attribute__((vector_size(8 * F)));
    static_assert(sizeof(One) == 4 * F && sizeof(Two) == 8 * F);
    struct Halves {
        One side[2];
    };
    static Two join(const One& near, const One& far) {
        const Halves halves = {{near, far}};
        Two both;
        std::memcpy(&both, &halves, sizeof both);
        return both;
    }
    static Halves split(const Two& both) {
        Halves halves;
        std::memcpy(&halves, &both, sizeof both);
        return halves;
    }
};

// As above, with an entry of two floats handled as one double, which compilers join and split in registers.
template <>
struct Pair<2> {
    typedef float One __attribute__((vector_size(8)));
    typedef float Two __attribute__((vector_size(16)));
    typedef double Doubles __attribute__((vector_size(16)));
    struct Halves {
        One side[2];
    };
    static Two join(const One& near, const One& far) {
        double first, second;
        std::memcpy(&first, &near, sizeof first);
        std::memcpy(&second, &far, sizeof second);
        return reinterpret_cast<Two>(Doubles{first, second});
    }
    static Halves split(const Two& both) {
        const Doubles doubles = reinterpret_cast<Doubles>(both);
        const double first = doubles[0], second = doubles[1];
        Halves halves;
        std::memcpy(&halves.side[0], &first, sizeof first);
        std::memcpy(&halves.side[1], &second, sizeof second);
        return halves;
    }
};

template <int F>
inline typename Pair<F>::One load(const float* from) {
    typename Pair<F>::One value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// Entries at the corners 2r and 2r + 1 of point i.
template <int F>
inline typename Pair<F>::Two load_row(const Cells& cells, const float* table, int r, int i) {
    return Pair<F>::join(load<F>(table + static_cast<size_t>(cells.index[2 * r][i]) * F),
                         load<F>(table + static_cast<size_t>(cells.index[2 * r + 1][i]) * F));
}

template <int F>
inline void interpolate(const Cells& cells, const float* table, float* out) {
    for (int i = 0; i < LANES; ++i) {
        const float x = cells.fraction[0][i], y = cells.fraction[1][i], z = cells.fraction[2][i];
        const auto near_near = load_row<F>(cells, table, 0, i), far_near = load_row<F>(cells, table, 1, i);
        const auto near_far = load_row<F>(cells, table, 2, i), far_far = load_row<F>(cells, table, 3, i);
        const auto near = near_near + y * (far_near - near_near), far = near_far + y * (far_far - near_far);
        const auto along_x = Pair<F>::split(near + z * (far - near));
        const auto value = along_x.side[0] + x * (along_x.side[1] - along_x.side[0]);
        std::memcpy(out + i * F, &value, sizeof value);
    }
}

#if defined(__AVX512F__)
template <>
inline void interpolate<2>(const Cells& cells, const float* table, float* out) {
    typedef float Entries __attribute__((vector_size(64)));  // two features each of eight points
    const __m512i each_twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    for (int i = 0; i < LANES; i += 8) {
        const auto fraction = [&](int k) {
            const __m512 eight = _mm512_castps256_ps512(_mm256_loadu_ps(&cells.fraction[k][i]));
            return reinterpret_cast<Entries>(_mm512_permutexvar_ps(each_twice, eight));
        };
        const auto corner = [&](int c) {
            const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(&cells.index[c][i]));
            return reinterpret_cast<Entries>(_mm512_i32gather_pd(index, table, 8));
        };
        const Entries x = fraction(0), y = fraction(1), z = fraction(2);
        Entries side[2];
        for (int s = 0; s < 2; ++s) {
            const Entries near_near = corner(s), far_near = corner(2 + s), near_far = corner(4 + s), far_far = corner(6 + s);
            const Entries near = near_near + y * (far_near - near_near), far = near_far + y * (far_far - near_far);
            side[s] = near + z * (far - near);
        }
        const Entries value = side[0] + x * (side[1] - side[0]);
        std::memcpy(out + i * 2, &value, sizeof value);
    }
}
#endif

// Features of `count` points (a multiple of LANES) at all levels, to out[l * row + i * F].
template <int F>
void encode_levels(const float* const axes[3], int64_t count, const float* table, const HashGrid& grid, float* out, int64_t row) {
    Cells cells;
    for (int l = 0; l < grid.levels; ++l) {
        const Level level = level_of(grid, l);
        for (int64_t at = 0; at < count; at += LANES) {
            find_cells(level, axes, at, cells);
            interpolate<F>(cells, table + level.offset * F, &out[l * row + at * F]);
        }
    }
}

// Adds weight * grad to the corners' entries.
template <int F>
inline void scatter(const Cells& cells, const float* grad, int count, float* table) {
    for (int i = 0; i < count; ++i) {
        const float x = cells.fraction[0][i], y = cells.fraction[1][i], z = cells.fraction[2][i];
        const auto g = load<F>(grad + i * F);
        const auto both = Pair<F>::join((1.0f - x) * g, x * g);
        const auto near = (1.0f - z) * both, far = z * both;
        const typename Pair<F>::Two rows[4] = {(1.0f - y) * near, y * near, (1.0f - y) * far, y * far};
        for (int r = 0; r < 4; ++r) {
            const auto sums = Pair<F>::split(load_row<F>(cells, table, r, i) + rows[r]);
            for (int side = 0; side < 2; ++side) {
                float* const entry = table + static_cast<size_t>(cells.index[2 * r + side][i]) * F;
                std::memcpy(entry, &sums.side[side], sizeof sums.side[side]);
            }
        }
    }
}

// Makes indices relative to `low`; those outside [low, low + span) become `span`, an entry that is ignored.
inline void redirect(Cells& cells, uint32_t low, uint32_t span) {
    for (int c = 0; c < CORNERS; ++c)
        for (int i = 0; i < LANES; ++i) cells.index[c][i] = std::min(cells.index[c][i] - low, span);
}

// Adds the gradients grad[l * row + i * F] of `count` points to the table's. A task owns one level, or a range of its entries if there are
// more threads than levels, and visits all points in order, so that the sum of an entry does not depend on the threads. The axes are
// padded to whole lanes.
template <int F>
void scatter_levels(const float* const axes[3], int64_t count, const HashGrid& grid, const float* grad, int64_t row,
                    float* grad_table, int threads) {
    const int shards = std::max(1, (threads + grid.levels - 1) / grid.levels);
    parallel_for(static_cast<int64_t>(grid.levels) * shards, 1, threads, [&](int64_t task, int64_t) {
        const int64_t l = task / shards;
        const uint64_t shard = task % shards;
        const Level level = level_of(grid, static_cast<int>(l));
        const uint32_t low = level.size * shard / shards, span = level.size * (shard + 1) / shards - low;
        float* const own = grad_table + (level.offset + low) * F;
        std::vector<float> copy(shards > 1 ? (static_cast<size_t>(span) + 1) * F : 0);
        float* const sums = shards > 1 ? copy.data() : own;
        Cells cells;
        for (int64_t at = 0; at < count; at += LANES) {
            find_cells(level, axes, at, cells);
            if (shards > 1) redirect(cells, low, span);
            const int lanes = static_cast<int>(std::min<int64_t>(LANES, count - at));
            scatter<F>(cells, grad + l * row + at * F, lanes, sums);
        }
        if (shards > 1) std::copy(copy.begin(), copy.end() - F, own);
    });
}

}  // namespace
