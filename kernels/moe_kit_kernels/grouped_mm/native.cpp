// Grouped products on the CPU in float32: the rows of every expert times its matrix, and the gradients of that.
//
//     rows       z_p = W_e x_t(p) + b_e,  h_p = act(z_p)          (forward; also dx_p = W_e^T dz_p)
//     through    t_p = V_e^T dy_t(p),  dz_p = act'(w_p t_p),  w_p h_p,  dw_p = <t_p, h_p>
//     sums       dW_e = sum_p a_p b_p^T
//
// A product is made in tiles of up to 128 rows of one expert by 64 columns, which stay near a core until everything
// that follows the product is done with them. An expert's matrix passes once for 128 rows, from where it lies; the first rows of a tile
// ask for the part that comes next while they compute, so that few rows do not wait for memory. Rows are read where they lie.
//
// A matrix of N outputs over K inputs lies as [N, K] ("rows of outputs") or as [K, N]; the first is taken in dot products, the
// second in columns of registers. Every sum has one order, whatever the number of threads and the company of a row.
//
// Legend: P pairs sorted by expert, E experts, K width in, N width out, H activation width (N, or N / 2 when gated), m rows of a tile.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

// rows by columns of registers that are summed at a time
#if defined(__AVX512F__)
constexpr int DOT_ROWS = 6, ADD_COLUMNS = 4;
#else
constexpr int DOT_ROWS = 2, ADD_COLUMNS = 2;
#endif
constexpr int DOT_COLUMNS = 4, ADD_ROWS = 6;
// a tile, and the numbers of each sum that are added at a time
constexpr int64_t ROWS = 128, COLUMNS = 64, DOT_DEPTH = 512, ADD_DEPTH = 64;
// rows whose first group asks for what comes next while it computes; of more rows each group asks for its share
constexpr int64_t FEW = 32;
// numbers of a cache line
constexpr int64_t LINE = 16;
// rows of one expert that are one piece of work: a hot expert is cut into several
constexpr int64_t PART = 512;
// pairs that one pass of a weight's gradient sums into so many of its rows, and numbers of b that are laid side by side first
constexpr int64_t SUM_PAIRS = 512, SUM_HEIGHT = 96, PANEL = 16384;
// bytes of a gradient that one thread writes as one piece, and bytes from which fresh memory should come in huge pages
constexpr int64_t PIECE = 1 << 20, HUGE_BYTES = 4 << 20;

// calls rows(Number<R>, first) for all of `count` rows, up to MOST <= 6 at a time and as evenly as can be
template <int MOST, class Rows>
inline void in_groups(int64_t count, const Rows& rows) {
    static_assert(MOST <= 6, "one case for each count");
    const int64_t groups = (count + MOST - 1) / MOST;
    for (int64_t i = 0; i < groups; i++) {
        const int64_t first = count * i / groups;
        switch (count * (i + 1) / groups - first) {
            case 1: rows(Number<1>(), first); break;
            case 2: rows(Number<2>(), first); break;
            case 3: rows(Number<3>(), first); break;
            case 4: rows(Number<4>(), first); break;
            case 5: rows(Number<5>(), first); break;
            default: rows(Number<6>(), first); break;
        }
    }
}

// ---- products

typedef int Indices __attribute__((vector_size(LANES * sizeof(int))));
typedef float Four __attribute__((vector_size(4 * sizeof(float)), aligned(alignof(float)), may_alias));

// the sums of four registers
inline Four sums_of(Vector a, Vector b, Vector c, Vector d) {
    Indices even, odd, low, high;
    for (int i = 0; i < LANES; i++) {
        even[i] = i / 2 * 2 + i % 2 * LANES;
        odd[i] = even[i] + 1;
        low[i] = i / 4 * 4 + i % 2 + i / 2 % 2 * LANES;
        high[i] = low[i] + 2;
    }
    const Vector ab = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
    const Vector cd = __builtin_shuffle(c, d, even) + __builtin_shuffle(c, d, odd);
    const Vector all = __builtin_shuffle(ab, cd, low) + __builtin_shuffle(ab, cd, high);
    Four parts[LANES / 4];
    std::memcpy(parts, &all, sizeof parts);
    for (int n = LANES / 8; n > 0; n /= 2)
        for (int i = 0; i < n; i++) parts[i] += parts[i + n];
    return parts[0];
}

// out[r][c] (+)= <x_r, w_c> over `depth` numbers from k; w has rows of K numbers
template <int R, int C, bool AHEAD>
inline void dots(const float* const* x, int64_t k, int64_t depth, const float* w, int64_t K, float* out) {
    Vector sums[R][C] = {};
    const bool more = k > 0;
    const int64_t end = k + depth;
    for (; k + LANES <= end; k += LANES) {
        Vector column[C];
        for (int c = 0; c < C; c++) {
            column[c] = load(w + c * K + k);
            if (AHEAD) __builtin_prefetch(w + (c + C) * K + k, 0, 2);
        }
        for (int r = 0; r < R; r++) {
            const Vector row = load(x[r] + k);
            for (int c = 0; c < C; c++) sums[r][c] = fused(row, column[c], sums[r][c]);
        }
    }
    for (int r = 0; r < R; r++) {
        float* to = out + r * COLUMNS;
        if constexpr (C == 4) {
            const Four found = sums_of(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
            *reinterpret_cast<Four*>(to) = more ? *reinterpret_cast<Four*>(to) + found : found;
        } else {
            // in the order of the four
            for (int c = 0; c < C; c++) to[c] = sums_of(sums[r][c], sums[r][c], sums[r][c], sums[r][c])[0] + (more ? to[c] : 0);
        }
        for (int c = 0; c < C; c++)
            for (int64_t rest = k; rest < end; rest++) to[c] = fused(x[r][rest], w[c * K + rest], to[c]);
    }
}

// out[r] (+)= sum of x[r][k] w_k over `depth` of k; w_k are `stride` numbers apart. PACK: copy w to `panel`, COLUMNS apart.
template <int R, int C, bool PACK, bool AHEAD>
inline void adds(const float* const* x, int64_t k, int64_t depth, const float* w, int64_t stride, float* out, float* panel) {
    const bool more = k > 0;
    Vector sums[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sums[r][c] = more ? load(out + r * COLUMNS + c * LANES) : Vector{};
    for (const int64_t end = k + depth; k < end; k++, w += stride) {
        Vector row[C];
        for (int c = 0; c < C; c++) {
            row[c] = load(w + c * LANES);
            if (PACK) store(panel + c * LANES, row[c]);
            if (AHEAD) __builtin_prefetch(w + ADD_DEPTH * stride + c * LANES, 0, 2);
        }
        if (PACK) panel += COLUMNS;
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) sums[r][c] = fused(x[r][k], row[c], sums[r][c]);
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out + r * COLUMNS + c * LANES, sums[r][c]);
}

// the matrices of all experts
struct Stack {
    const float* data;
    int64_t K, N;
    bool by_input;  // [K, N] instead of [N, K]
};

inline void fetch(const float* from, int64_t numbers) {
    for (int64_t i = 0; i < numbers; i += LINE) __builtin_prefetch(from + i, 0, 2);
}

// out [m, columns] = rows x times columns [n, n + columns) of expert e, rows of outputs. `first`: nobody had these columns yet.
void multiply_by_output(const float* const* x, int64_t m, const Stack& stack, int64_t e, int64_t n, int64_t columns,
                        float* out, bool first) {
    const int64_t K = stack.K;
    const float* w = stack.data + (e * stack.N + n) * K;
    for (int64_t k = 0; k < K; k += DOT_DEPTH) {
        const int64_t depth = std::min(DOT_DEPTH, K - k);
        // a group's rows stay in the first cache while the matrix passes
        in_groups<DOT_ROWS>(m, [&](auto R, int64_t r) {
            float* to = out + r * COLUMNS;
            int64_t c = 0;
            for (; c + DOT_COLUMNS <= columns; c += DOT_COLUMNS)
                if (first && r == 0)
                    dots<R(), DOT_COLUMNS, true>(x + r, k, depth, w + c * K, K, to + c);
                else
                    dots<R(), DOT_COLUMNS, false>(x + r, k, depth, w + c * K, K, to + c);
            for (; c < columns; c++) dots<R(), 1, false>(x + r, k, depth, w + c * K, K, to + c);
        });
    }
}

// the same for a matrix with rows of inputs
void multiply_by_input(const float* const* x, int64_t m, const Stack& stack, int64_t e, int64_t n, int64_t columns, float* out) {
    const int64_t K = stack.K, N = stack.N;
    const float* w = stack.data + e * K * N + n;
    const bool few = m <= FEW;
    alignas(64) float panel[ADD_DEPTH * COLUMNS];
    for (int64_t k = 0; k < K; k += ADD_DEPTH) {
        const int64_t depth = std::min(ADD_DEPTH, K - k);
        const float* part = w + k * N;
        int64_t c = 0;
        for (; c + ADD_COLUMNS * LANES <= columns; c += ADD_COLUMNS * LANES)
            in_groups<ADD_ROWS>(m, [&](auto R, int64_t r) {
                float* to = out + r * COLUMNS + c;
                // rows of a matrix lie far apart and often in each other's way: the first group lays them side by side
                if (r > 0)
                    adds<R(), ADD_COLUMNS, false, false>(x + r, k, depth, panel, COLUMNS, to, nullptr);
                else if (few)
                    adds<R(), ADD_COLUMNS, true, true>(x, k, depth, part + c, N, to, panel);
                else
                    adds<R(), ADD_COLUMNS, true, false>(x, k, depth, part + c, N, to, panel);
                if (few) return;
                const float* next = part + ADD_DEPTH * N + c;
                for (int64_t i = r * depth / m; i < (r + R()) * depth / m; i++) fetch(next + i * N, ADD_COLUMNS * LANES);
                if (c == 0)
                    for (int i = 0; i < R(); i++) fetch(x[r + i] + k + ADD_DEPTH, ADD_DEPTH);
            });
        for (; c + LANES <= columns; c += LANES)
            in_groups<ADD_ROWS>(m, [&](auto R, int64_t r) {
                adds<R(), 1, false, false>(x + r, k, depth, part + c, N, out + r * COLUMNS + c, nullptr);
            });
        for (; c < columns; c++)
            for (int64_t r = 0; r < m; r++) {
                float sum = k > 0 ? out[r * COLUMNS + c] : 0;
                for (int64_t i = 0; i < depth; i++) sum = fused(x[r][k + i], part[i * N + c], sum);
                out[r * COLUMNS + c] = sum;
            }
    }
}

void multiply(const float* const* x, int64_t m, const Stack& stack, int64_t e, int64_t n, int64_t columns, float* out,
              bool first) {
    if (stack.by_input)
        multiply_by_input(x, m, stack, e, n, columns, out);
    else
        multiply_by_output(x, m, stack, e, n, columns, out, first);
}

// out [R, columns] (+)= sum over n pairs of a_p [R] times b_p; they lie SUM_HEIGHT and COLUMNS numbers apart
template <int R, int C>
inline void sum_pairs(const float* a, int64_t n, const float* b, float* out, int64_t N, bool more) {
    Vector sums[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sums[r][c] = more ? load(out + r * N + c * LANES) : Vector{};
    for (int64_t p = 0; p < n; p++, a += SUM_HEIGHT, b += COLUMNS) {
        Vector row[C];
        for (int c = 0; c < C; c++) row[c] = load(b + c * LANES);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) sums[r][c] = fused(a[r], row[c], sums[r][c]);
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out + r * N + c * LANES, sums[r][c]);
}

// the same over `width` columns; b lies in chunks of n times COLUMNS numbers
template <int R>
inline void sum_width(const float* a, int64_t n, const float* b, float* out, int64_t width, int64_t N, bool more) {
    const auto at = [&](int64_t c) { return b + c / COLUMNS * COLUMNS * n + c % COLUMNS; };
    int64_t c = 0;
    for (; c + ADD_COLUMNS * LANES <= width; c += ADD_COLUMNS * LANES)
        sum_pairs<R, ADD_COLUMNS>(a, n, at(c), out + c, N, more);
    for (; c + LANES <= width; c += LANES) sum_pairs<R, 1>(a, n, at(c), out + c, N, more);
    for (; c < width; c++)
        for (int r = 0; r < R; r++) {
            float sum = more ? out[r * N + c] : 0;
            for (int64_t p = 0; p < n; p++) sum = fused(a[p * SUM_HEIGHT + r], at(c)[p * COLUMNS], sum);
            out[r * N + c] = sum;
        }
}

// ---- activations: a = act(z), d = act'(z)

// e^x to some 2 units in the last place; 0 and infinity outside of [-87, 88]
inline Vector exponential(Vector given) {
    const Vector most = Vector{} + 88.0f, least = Vector{} - 87.0f;
    Vector x = given > most ? most : given;
    x = x < least ? least : x;
    // the nearest whole power of two: adding 1.5 * 2^23 leaves no place for a fraction
    const Vector magic = Vector{} + 12582912.0f;
    const Vector shifted = fused(1.44269504f, x, magic), n = shifted - magic;
    const Vector r = fused(-1.42860677e-6f, n, fused(-0.693145752f, n, x));
    Vector p = fused(1.38888889e-3f, r, every(8.33333333e-3f));
    for (const float c : {4.16666667e-2f, 1.66666667e-1f, 0.5f}) p = fused(p, r, every(c));
    p = fused(p * r, r, r) + 1.0f;
    Indices power = __builtin_convertvector(n, Indices);
    power = (power + 127) << 23;
    Vector scale;
    std::memcpy(&scale, &power, sizeof scale);
    const Vector result = given > most ? Vector{} + __builtin_inff() : p * scale;
    return given < least ? Vector{} : result;
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }
inline Vector positive(Vector x) { return x > 0.0f ? x : Vector{}; }

struct Silu {
    static Vector value(Vector z) { return z * sigmoid(z); }
    static void both(Vector z, Vector& a, Vector& d) {
        const Vector s = sigmoid(z);
        a = z * s;
        d = s * fused(z, 1.0f - s, every(1.0f));
    }
};

struct Gelu {
    // erfc(|x|) with a relative error of 1.2e-7 (Numerical Recipes, 6.2)
    static Vector normal(Vector z) {
        const Vector x = (z < 0.0f ? -z : z) * 0.707106781f, t = 1.0f / fused(0.5f, x, every(1.0f));
        Vector p = fused(0.17087277f, t, every(-0.82215223f));
        for (const float c : {1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f})
            p = fused(p, t, every(c));
        const Vector tail = 0.5f * t * exponential(fused(p, t, every(-1.26551223f)) - x * x);
        return z < 0.0f ? tail : 1.0f - tail;
    }
    static Vector value(Vector z) { return z * normal(z); }
    static void both(Vector z, Vector& a, Vector& d) {
        const Vector phi = normal(z);
        a = z * phi;
        d = fused(z * 0.398942280f, exponential(-0.5f * z * z), phi);
    }
};

struct GeluTanh {
    // (1 + tanh(u)) / 2 = sigmoid(2 u)
    static Vector doubled(Vector z) { return 1.59576912f * fused(0.044715f * z * z, z, z); }
    static Vector value(Vector z) { return z * sigmoid(doubled(z)); }
    static void both(Vector z, Vector& a, Vector& d) {
        const Vector s = sigmoid(doubled(z));
        a = z * s;
        d = fused(a * (1.0f - s) * 1.59576912f, fused(3 * 0.044715f * z, z, every(1.0f)), s);
    }
};

struct Relu {
    static Vector value(Vector z) { return positive(z); }
    static void both(Vector z, Vector& a, Vector& d) {
        a = positive(z);
        d = z > 0.0f ? Vector{} + 1.0f : Vector{};
    }
};

struct Relu2 {
    static Vector value(Vector z) { return positive(z) * positive(z); }
    static void both(Vector z, Vector& a, Vector& d) {
        a = value(z);
        d = 2.0f * positive(z);
    }
};

// calls f(activation) for its number; the names are in native.py
template <class F>
inline void with_activation(int number, const F& f) {
    switch (number) {
        case 1: f(Silu()); break;
        case 2: f(Gelu()); break;
        case 3: f(GeluTanh()); break;
        case 4: f(Relu()); break;
        default: f(Relu2()); break;
    }
}

}  // namespace

// Pairs by expert.
struct Pairs {
    const int64_t* offsets;  // [E + 1] first sorted pair of each expert
    const int64_t* token;    // [P] token of each sorted pair
    const int64_t* order;    // [P] its place in the caller's order
    int64_t experts;
};

namespace {

// ---- the work of all experts

struct Part {
    int64_t e, first, end;
};

// runs of rows, those of the largest experts first; empty experts have none
std::vector<Part> parts_of(const Pairs& pairs) {
    std::vector<int64_t> experts(pairs.experts);
    for (int64_t e = 0; e < pairs.experts; e++) experts[e] = e;
    const int64_t* o = pairs.offsets;
    std::stable_sort(experts.begin(), experts.end(),
                     [o](int64_t a, int64_t b) { return o[a + 1] - o[a] > o[b + 1] - o[b]; });
    std::vector<Part> parts;
    for (const int64_t e : experts)
        for (int64_t first = o[e]; first < o[e + 1]; first += PART)
            parts.push_back({e, first, std::min(first + PART, o[e + 1])});
    return parts;
}

// calls tile(first, m, e, c, columns, ahead) for all rows and all chunks of `width` columns
template <class Tile>
void each_tile(const Pairs& pairs, int64_t width, int threads, const Tile& tile) {
    const std::vector<Part> parts = parts_of(pairs);
    const int64_t chunks = (width + COLUMNS - 1) / COLUMNS, count = parts.size();
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (int64_t task = 0; task < count * chunks; task++) {
        const Part part = parts[task / chunks];
        const int64_t c = task % chunks * COLUMNS, columns = std::min(COLUMNS, width - c);
        for (int64_t first = part.first; first < part.end; first += ROWS)
            tile(first, std::min(ROWS, part.end - first), part.e, c, columns, first == part.first);
    }
}

inline void find_rows(const float** rows, const float* x, const int64_t* token, int64_t first, int64_t m, int64_t K) {
    for (int64_t i = 0; i < m; i++) rows[i] = x + (token ? token[first + i] : first + i) * K;
}

inline void write(const float* tile, int64_t m, int64_t columns, float* to, int64_t stride) {
    for (int64_t i = 0; i < m; i++) std::memcpy(to + i * stride, tile + i * COLUMNS, columns * sizeof(float));
}

inline void read(float* tile, int64_t m, int64_t columns, const float* from, int64_t stride) {
    for (int64_t i = 0; i < m; i++) std::memcpy(tile + i * COLUMNS, from + i * stride, columns * sizeof(float));
}

inline void add_row(float* to, const float* row, int64_t columns) {
    for (int64_t c = 0; c < columns; c++) to[c] += row[c];
}

struct Tile {
    alignas(64) float numbers[ROWS * COLUMNS];
    // left as it is: a product writes all of a whole tile
    Tile() {}
    // where it does not, what lies behind the last column is computed with the rest and must be numbers
    void clear() { std::memset(numbers, 0, sizeof numbers); }
};

// ask for huge pages where fresh memory is written for the first time: a page of 4 KiB takes longer to get than to fill
void expect_writes(float* out, int64_t bytes) {
    if (bytes < HUGE_BYTES) return;
    const uintptr_t page = sysconf(_SC_PAGESIZE), from = (reinterpret_cast<uintptr_t>(out) + page - 1) / page * page;
    const uintptr_t to = (reinterpret_cast<uintptr_t>(out) + bytes) / page * page;
    madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
}

}  // namespace

extern "C" {

// z [P, N] = rows of x times their expert's matrix, plus bias and with `add` plus z; h [P, H] = act(z), with `gated`
// act(first half) * second half. by_token: x holds tokens, else sorted rows. activation 0: none, and h is null. z may be null where h
// is asked for.
void moe_kit_grouped_rows(const int64_t* offsets, const int64_t* token_P, const int64_t* order, const float* x, const float* w,
                          const float* bias, float* z, float* h, int64_t E, int64_t, int64_t, int64_t K, int64_t N, int64_t H,
                          int by_token, int by_input, int add, int activation, int gated, int threads) {
    const Pairs pairs{offsets, token_P, order, E};
    const Stack stack{w, K, N, by_input != 0};
    const int64_t* token = by_token ? token_P : nullptr;
    each_tile(pairs, H, threads, [&](int64_t first, int64_t m, int64_t e, int64_t c, int64_t columns, bool ahead) {
        const float* rows[ROWS];
        Tile halves[2];
        find_rows(rows, x, token, first, m, K);
        for (int half = 0; half <= gated; half++) {
            float* tile = halves[half].numbers;
            const int64_t n = half * H + c;
            if (columns < COLUMNS || K == 0) halves[half].clear();
            multiply(rows, m, stack, e, n, columns, tile, ahead);
            for (int64_t i = 0; i < m; i++) {
                if (bias) add_row(tile + i * COLUMNS, bias + e * N + n, columns);
                if (add) add_row(tile + i * COLUMNS, z + (first + i) * N + n, columns);
            }
            if (z) write(tile, m, columns, z + first * N + n, N);
        }
        if (!activation) return;
        with_activation(activation, [&](auto act) {
            for (int64_t i = 0; i < m * COLUMNS; i += LANES) {
                Vector a = act.value(load(halves[0].numbers + i));
                if (gated) a *= load(halves[1].numbers + i);
                store(halves[0].numbers + i, a);
            }
        });
        write(halves[0].numbers, m, columns, h + first * H + c, H);
    });
}

// Back through the second product and the activation. dy [T, D], v: the second stack as a matrix of H outputs over D inputs,
// weights in the caller's order, z [P, N]. Writes what is not null: dz [P, N], wh [P, H] = w h, dweights in the caller's order.
void moe_kit_grouped_through(const int64_t* offsets, const int64_t* token, const int64_t* order, const float* dy,
                             const float* v, const float* weights, const float* z, float* dz, float* wh, float* dweights,
                             int64_t E, int64_t, int64_t, int64_t D, int64_t H, int64_t N, int by_input, int activation,
                             int gated, int threads) {
    const Pairs pairs{offsets, token, order, E};
    const Stack stack{v, D, H, by_input != 0};
    const int64_t P = offsets[E];
    // what each chunk of columns gives to the gradient of a weight
    std::vector<float> parts(dweights ? (H + COLUMNS - 1) / COLUMNS * P : 0);
    each_tile(pairs, H, threads, [&](int64_t first, int64_t m, int64_t e, int64_t c, int64_t columns, bool ahead) {
        const float* rows[ROWS];
        Tile t, gate, up;
        find_rows(rows, dy, token, first, m, D);
        if (columns < COLUMNS || D == 0)
            for (Tile* tile : {&t, &gate, &up}) tile->clear();
        if (dz || dweights) multiply(rows, m, stack, e, c, columns, t.numbers, ahead);
        read(gate.numbers, m, columns, z + first * N + c, N);
        if (gated) read(up.numbers, m, columns, z + first * N + H + c, N);
        with_activation(activation, [&](auto act) {
            for (int64_t i = 0; i < m; i++) {
                const float w = weights[order[first + i]];
                Vector sum = {};
                for (int64_t j = i * COLUMNS; j < (i + 1) * COLUMNS; j += LANES) {
                    Vector a, d;
                    act.both(load(gate.numbers + j), a, d);
                    const Vector full = load(t.numbers + j), part = full * w;
                    Vector h = a, dh = part;
                    if (gated) {
                        const Vector other = load(up.numbers + j);
                        h *= other, dh *= other;
                        store(up.numbers + j, part * a);
                    }
                    sum = fused(full, h, sum);
                    store(t.numbers + j, h * w);
                    store(gate.numbers + j, dh * d);
                }
                if (dweights) parts[c / COLUMNS * P + first + i] = sum_of(sum);
            }
        });
        if (wh) write(t.numbers, m, columns, wh + first * H + c, H);
        if (dz) write(gate.numbers, m, columns, dz + first * N + c, N);
        if (dz && gated) write(up.numbers, m, columns, dz + first * N + H + c, N);
    });
    if (!dweights) return;
    for (int64_t p = 0; p < P; p++) {
        float sum = 0;
        for (int64_t c = 0; c * COLUMNS < H; c++) sum += parts[c * P + p];
        dweights[order[p]] = sum;
    }
}

// out [E, M, N] = sum over the rows of every expert of a_p [M] times b_p [N], zeros for an empty one. a_by_token, b_by_token: the
// tensor holds tokens, else sorted rows.
void moe_kit_grouped_sums(const int64_t* offsets, const int64_t* token, const int64_t*, const float* a, const float* b,
                          float* out, int64_t E, int64_t, int64_t, int64_t, int64_t M, int64_t N, int a_by_token,
                          int b_by_token, int threads) {
    if (M == 0 || N == 0) return;
    const int64_t *token_a = a_by_token ? token : nullptr, *token_b = b_by_token ? token : nullptr;
    expect_writes(out, E * M * N * sizeof(float));
    const int64_t strip = std::max<int64_t>(1, std::min(M, PIECE / (N * static_cast<int64_t>(sizeof(float)))));
    const int64_t strips = (M + strip - 1) / strip;
    int64_t most = 1;
    for (int64_t e = 0; e < E; e++) most = std::max(most, offsets[e + 1] - offsets[e]);
    most = std::min(most, SUM_PAIRS);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> panel_a(most * SUM_HEIGHT), panel_b(std::max(PANEL, most * COLUMNS));
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < E * strips; task++) {
            const int64_t e = task / strips, m = task % strips * strip, height = std::min(strip, M - m);
            float* piece = out + (e * M + m) * N;
            const int64_t begin = offsets[e], end = offsets[e + 1];
            if (begin == end) std::memset(piece, 0, height * N * sizeof(float));
            for (int64_t top = 0; top < height; top += SUM_HEIGHT)
                for (int64_t first = begin; first < end; first += SUM_PAIRS) {
                    const int64_t n = std::min(SUM_PAIRS, end - first), high = std::min(SUM_HEIGHT, height - top);
                    const auto row = [first](const float* of, const int64_t* token, int64_t p, int64_t width) {
                        return of + (token ? token[first + p] : first + p) * width;
                    };
                    for (int64_t p = 0; p < n; p++)
                        std::memcpy(&panel_a[p * SUM_HEIGHT], row(a, token_a, p, M) + m + top, high * sizeof(float));
                    // columns of b, chunk by chunk
                    const int64_t wide = std::max<int64_t>(1, PANEL / (n * COLUMNS)) * COLUMNS;
                    for (int64_t from = 0; from < N; from += wide) {
                        const int64_t width = std::min(wide, N - from);
                        for (int64_t c = 0; c < width; c += COLUMNS)
                            for (int64_t p = 0; p < n; p++)
                                std::memcpy(&panel_b[c * n + p * COLUMNS], row(b, token_b, p, N) + from + c,
                                            std::min(COLUMNS, width - c) * sizeof(float));
                        in_groups<ADD_ROWS>(high, [&](auto R, int64_t r) {
                            float* to = piece + (top + r) * N + from;
                            sum_width<R()>(&panel_a[r], n, panel_b.data(), to, width, N, first > begin);
                        });
                    }
                }
        }
    }
}

}  // extern "C"
