// Integer linear layers on sm_90a: int8 products of warpgroups, one scale a row of x and of w.
//
// A block stays on its multiprocessor and takes one tile of 128 x 256 of y after another. One warp copies operands into a ring of
// places in shared memory, 128 columns at a time; two warpgroups own 64 rows each. The blocks of a cluster take tiles one above the
// other and side by side; each copies a part of what they share, which goes to all that need it. While a warpgroup scales and stores its tile, the other
// still multiplies, and the ring fills for the next.
#include "integer.cuh"
#include "tensor_map.cuh"

namespace sq {
namespace {

constexpr int kRows = 128, kCols = 256, kDepth = 128;  // of a tile; kDepth bytes are a row in shared memory
constexpr int kStages = 4;
constexpr int kTall = 2, kWide = 1, kCluster = kTall * kWide;  // tiles of a cluster: one above the other share w, side by side x
constexpr int kGroupRows = 64;  // of a warpgroup
constexpr int kGroups = kRows / kGroupRows;
constexpr int kThreads = (1 + kGroups) * 128;
constexpr int kTileX = kRows * kDepth, kTileW = kCols * kDepth, kTile = kTileX + kTileW;
constexpr int kBand = 8;  // clusters of rows that are worked on side by side, so that they share the rows of w in the cache

// What is read once a tile for its columns, for each warpgroup: of two columns their scales and sums, and bias.
struct Columns {
  uint4 pairs[kCols / 2];
  float bias[kCols];
};
constexpr int kOut = 128;  // bytes of a row that a warp stores at once, 16 bits a value
struct Shared {
  uint64_t full[kStages], empty[kStages];
  Columns columns[kGroups];
  uint4 out[kGroups * 4][16 * kOut / 16];  // for each warp, 16 rows
};
constexpr size_t kBytes = 1024 + size_t(kStages) * kTile + sizeof(Shared);

#if SQ_HOPPER

constexpr int kSharing = kTall + kWide - 1;  // blocks that a block copies to, itself included

// ---- Instructions that only these kernels use. ----

// c[64, 256] (+)= A B^T of 32 int8 columns; A and B are described as for 16-bit products, in bytes.
#define SQ_I4(n) "+r"(c[n][0]), "+r"(c[n][1]), "+r"(c[n][2]), "+r"(c[n][3])
#define SQ_I32(n) SQ_I4(n), SQ_I4(n + 1), SQ_I4(n + 2), SQ_I4(n + 3), SQ_I4(n + 4), SQ_I4(n + 5), SQ_I4(n + 6), SQ_I4(n + 7)
__device__ __forceinline__ void integer_product(int32_t (&c)[kCols / 8][4], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
      "}, %128, %129, p;\n}\n"
      : SQ_I32(0), SQ_I32(8), SQ_I32(16), SQ_I32(24)
      : "l"(a), "l"(b), "r"(accumulate));
}
#undef SQ_I32
#undef SQ_I4

// Keeps the compiler from moving uses of accumulators across a wait.
__device__ __forceinline__ void pin(int32_t (&c)[kCols / 8][4]) {
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(c[n][e])::"memory");
  }
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Arrives at the barrier in the same place of the shared memory of block `rank` of the cluster.
__device__ __forceinline__ void arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// A box of a matrix from column x, row y on, to the kBlocks blocks of the cluster that have a bit in `blocks`, and their barriers.
template <int kBlocks>
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap &map, uint32_t barrier, int x, int y, uint16_t blocks) {
  if constexpr (kBlocks == 1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], "
        "%5;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "h"(blocks)
        : "memory");
  }
}
// A barrier of the threads of one warpgroup.
__device__ __forceinline__ void group_barrier(int group) { asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory"); }

#endif  // SQ_HOPPER

// ---- The tiles of a cluster, in order. ----

struct Tiles {
  unsigned strips, cols, units;  // clusters of rows and of columns, and their product

  // The cluster of rows and that of columns of a unit: bands of kBand clusters of rows, column by column.
  __device__ __forceinline__ void find(unsigned unit, unsigned &strip, unsigned &col) const {
    const unsigned band = unit / (kBand * cols), within = unit - band * kBand * cols;
    const unsigned left = strips - band * kBand, height = left < kBand ? left : kBand;
    col = within / height;
    strip = band * kBand + within - col * height;
  }
};

#if SQ_HOPPER

// The place of this block in its cluster.
struct Rank {
  unsigned tall, wide;
  __device__ __forceinline__ Rank() : tall(cluster_rank() / kWide), wide(cluster_rank() % kWide) {}
  // The block, by its rank, that is number i of those that this one shares operands with.
  __device__ __forceinline__ unsigned sharing(unsigned i) const {
    return i < kTall ? i * kWide + wide : tall * kWide + (i - kTall + (i - kTall >= wide ? 1 : 0));
  }
  __device__ __forceinline__ uint16_t row() const { return uint16_t(((1 << kWide) - 1) << tall * kWide); }
  __device__ __forceinline__ uint16_t column() const {
    uint16_t mask = 0;
    for (int i = 0; i < kTall; ++i) mask |= 1 << (i * kWide + wide);
    return mask;
  }
};

// ---- The copying warp: one thread. ----

__device__ __forceinline__ void copy_operands(uint32_t tiles_at, const Shared &shared, const CUtensorMap &x, const CUtensorMap &w,
                                              const Tiles &tiles, int steps) {
  constexpr int kPartX = kRows / kWide, kPartW = kCols / kTall;  // rows that this block copies
  const uint32_t full = shared_address(shared.full), empty = shared_address(shared.empty);
  const Rank rank;
  const uint32_t at_x = tiles_at + rank.wide * kPartX * kDepth, at_w = tiles_at + kTileX + rank.tall * kPartW * kDepth;
  uint32_t turn = 0;
  for (unsigned unit = blockIdx.x / kCluster; unit < tiles.units; unit += gridDim.x / kCluster) {
    unsigned strip, col;
    tiles.find(unit, strip, col);
    const int row_x = int((strip * kTall + rank.tall) * kRows + rank.wide * kPartX);
    const int row_w = int((col * kWide + rank.wide) * kCols + rank.tall * kPartW);
#pragma unroll 1
    for (int step = 0; step < steps; ++step, ++turn) {
      const uint32_t place = turn % kStages;
      barrier_wait(empty + 8 * place, turn / kStages & 1 ^ 1);
      barrier_expect(full + 8 * place, kTile);
      copy_box<kWide>(at_x + place * kTile, x, full + 8 * place, step * kDepth, row_x, rank.row());
      copy_box<kTall>(at_w + place * kTile, w, full + 8 * place, step * kDepth, row_w, rank.column());
    }
  }
}

// ---- A computing warpgroup. ----

// Two values of row `row` and their neighbours' places, with the residual.
template <typename T>
__device__ __forceinline__ void add_residual(const IntegerLinear &p, float (&v)[2], int64_t row, int64_t col) {
  if (row >= p.m || col >= p.n) return;
  const Pack<T, 2> r = load_pack<T, 2>(static_cast<const T *>(p.residual) + row * p.n + col);
#pragma unroll
  for (int i = 0; i < 2; ++i) v[i] = __fadd_rn(v[i], to_float(r.v[i]));
}

// Four 8 x 8 matrices of 16-bit pairs to shared memory; lane l points to row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]),
               "r"(r[3])
               : "memory");
}

// Scales a warp's sums of rows row .. row + 15, columns from col on, and stores them. A thread has columns 2q, 2q + 1 of each eight,
// of rows lane / 4 and lane / 4 + 8. 16-bit values pass through the warp's part of shared memory, 64 columns at a time, so that whole
// rows of 128 bytes are stored; the 16-byte chunk c of row r is at place c ^ (r % 8).
template <typename T, bool kBeside, bool kNarrow>
__device__ __forceinline__ void finish(const IntegerLinear &p, const Columns &columns, uint4 *out, const int32_t (&c)[kCols / 8][4],
                                       int64_t row, int64_t col, const float (&scale)[2], const float (&zero)[2]) {
  constexpr int kBlocks = kOut / 16;  // of eight columns, that pass at once
  const int lane = threadIdx.x % 32, q = lane % 4;
#pragma unroll
  for (int first = 0; first < kCols / 8; first += kBlocks) {
    uint32_t packed[kBlocks][2];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int block = first + b;
      const uint4 pair = columns.pairs[block * 4 + q];
      float v[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        v[half][0] = scaled(shifted<kNarrow>(c[block][2 * half], zero[half], int32_t(pair.z)), scale[half], __uint_as_float(pair.x));
        v[half][1] = scaled(shifted<kNarrow>(c[block][2 * half + 1], zero[half], int32_t(pair.w)), scale[half], __uint_as_float(pair.y));
        if constexpr (kBeside) {
          if (p.bias) {
            const float2 bias = *reinterpret_cast<const float2 *>(&columns.bias[block * 8 + 2 * q]);
            v[half][0] = __fadd_rn(v[half][0], bias.x), v[half][1] = __fadd_rn(v[half][1], bias.y);
          }
          if (p.residual) add_residual<T>(p, v[half], row + lane / 4 + 8 * half, col + block * 8 + 2 * q);
        }
        if constexpr (sizeof(T) == 4) {
          const int64_t r = row + lane / 4 + 8 * half, at = col + block * 8 + 2 * q;
          if (r < p.m && at < p.n) *reinterpret_cast<float2 *>(static_cast<T *>(p.y) + r * p.n + at) = make_float2(v[half][0], v[half][1]);
        } else {
          packed[b][half] = pack_pair<T>(v[half][0], v[half][1]);
        }
      }
    }
    if constexpr (sizeof(T) == 2) {
      __syncwarp();  // the last columns have been read
#pragma unroll
      for (int b = 0; b < kBlocks; b += 2) {
        const uint32_t pieces[4] = {packed[b][0], packed[b][1], packed[b + 1][0], packed[b + 1][1]};
        const int r = lane % 16, chunk = b + lane / 16;
        store_matrices(shared_address(out) + r * kOut + ((chunk ^ (r % 8)) * 16), pieces);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 16 * kOut / 16 / 32; ++i) {
        const int r = i * 4 + lane / 8, chunk = lane % 8;
        const int64_t at = col + first * 8 + chunk * 8;
        if (row + r < p.m && at < p.n) {
          *reinterpret_cast<uint4 *>(static_cast<T *>(p.y) + (row + r) * p.n + at) = out[r * (kOut / 16) + (chunk ^ (r % 8))];
        }
      }
    }
  }
}

// What a thread holds of two columns of a tile, until it is put into shared memory.
struct ColumnPair {
  float scale[2] = {0.0f, 0.0f}, bias[2] = {0.0f, 0.0f};
  int32_t sum[2] = {0, 0};

  template <typename T>
  __device__ __forceinline__ void load(const IntegerLinear &p, int64_t col) {
    if (col >= p.n) return;  // n is even
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scale[i] = p.w_scale[col + i];
      if (p.bias) bias[i] = to_float(static_cast<const T *>(p.bias)[col + i]);
      if (p.x_zero) sum[i] = p.w_sums[col + i];
    }
  }
  __device__ __forceinline__ void put(Columns &to, int at) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) to.bias[at + i] = bias[i];
    to.pairs[at / 2] = make_uint4(__float_as_uint(scale[0]), __float_as_uint(scale[1]), uint32_t(sum[0]), uint32_t(sum[1]));
  }
};

template <typename T, bool kBeside>
__device__ __forceinline__ void compute(uint32_t tiles_at, Shared &shared, const IntegerLinear &p, const Tiles &tiles, int steps,
                                        int group) {
  const uint32_t full = shared_address(shared.full), empty = shared_address(shared.empty);
  const Rank rank;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  Columns &columns = shared.columns[group];
  uint4 *const out = shared.out[group * 4 + thread / 32];
  // Every warp says to all blocks that write to a place that it has read it.
  const unsigned writer = rank.sharing(lane);
  const auto release = [&](uint32_t turn) {
    __syncwarp();
    if (lane < kSharing) arrive_at(empty + 8 * (turn % kStages), writer);
  };
  uint32_t turn = 0;
  for (unsigned unit = blockIdx.x / kCluster; unit < tiles.units; unit += gridDim.x / kCluster) {
    unsigned strip, which;
    tiles.find(unit, strip, which);
    const int64_t col = (int64_t(which) * kWide + rank.wide) * kCols;
    const int64_t row = (int64_t(strip) * kTall + rank.tall) * kRows + group * kGroupRows + thread / 32 * 16;
    ColumnPair pair;
    pair.load<T>(p, col + 2 * thread);
    float scale[2] = {0.0f, 0.0f}, zero[2] = {0.0f, 0.0f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t own = row + lane / 4 + 8 * half;
      if (own >= p.m) continue;
      scale[half] = p.x_scale[own];
      if (p.x_zero) zero[half] = p.x_zero[own];
    }

    int32_t c[kCols / 8][4];
#pragma unroll 1
    for (int step = 0; step < steps; ++step, ++turn) {
      const uint32_t place = turn % kStages, at = tiles_at + place * kTile;
      barrier_wait(full + 8 * place, turn / kStages & 1);
      group_fence();
      const uint64_t a = describe<64>(at + group * kGroupRows * kDepth), b = describe<64>(at + kTileX);
#pragma unroll
      for (int part = 0; part < kDepth / 32; ++part) integer_product(c, a + part * 2, b + part * 2, step > 0 || part > 0);
      group_commit();
      if (step > 0) {
        group_wait<1>();
        release(turn - 1);
      }
    }
    group_wait<0>();
    pin(c);
    release(turn - 1);

    group_barrier(group);  // the columns of the last tile have been read
    pair.put(columns, 2 * thread);
    group_barrier(group);
    const bool narrow = fabsf(zero[0]) <= p.narrow && fabsf(zero[1]) <= p.narrow;
    if (__all_sync(0xffffffffu, narrow)) {
      finish<T, kBeside, true>(p, columns, out, c, row, col, scale, zero);
    } else {
      finish<T, kBeside, false>(p, columns, out, c, row, col, scale, zero);
    }
  }
}

#endif  // SQ_HOPPER

// kBeside: there is a bias or a residual.
template <typename T, bool kBeside>
__global__ void __launch_bounds__(kThreads, 1)
    integer_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w, const IntegerLinear p,
                   const Tiles tiles) {
#if SQ_HOPPER
  extern __shared__ unsigned char dynamic[];
  const uint32_t tiles_at = (shared_address(dynamic) + 1023) & ~1023u;
  Shared &shared = *reinterpret_cast<Shared *>(dynamic + (tiles_at - shared_address(dynamic)) + kStages * kTile);
  const int steps = ceil_div(p.k, kDepth);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared_address(&shared.full[i]), 1);
      barrier_init(shared_address(&shared.empty[i]), kSharing * kGroups * 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  const int role = __shfl_sync(~0u, int(threadIdx.x) / 128, 0);
  if (role == 0) {
    give_registers<40>();
    if (threadIdx.x == 0) copy_operands(tiles_at, shared, x, w, tiles, steps);
    __syncwarp();
  } else {
    take_registers<232>();
    compute<T, kBeside>(tiles_at, shared, p, tiles, steps, role - 1);
  }
  cluster_sync();  // other blocks may still arrive at barriers of this one
#endif
}

// A matrix of codes as the copy engine sees it: boxes of `rows` x kDepth, swizzled as products read them, zeros outside.
int make_map(CUtensorMap &map, const int8_t *codes, int64_t rows, int64_t cols, int box_rows) {
  const TensorMapEncoder encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t size[2] = {cuuint64_t(cols), cuuint64_t(rows)}, stride[1] = {cuuint64_t(cols)};
  const cuuint32_t box[2] = {kDepth, cuuint32_t(box_rows)}, step[2] = {1, 1};
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<int8_t *>(codes), size, stride, box, step,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

int integer_linear_hopper(const IntegerLinear &p, sq_dtype dtype, cudaStream_t stream) {
  const int64_t strips = ceil_div(p.m, int64_t(kTall * kRows)), cols = ceil_div(p.n, int64_t(kWide * kCols));
  if (!current_gpu().warpgroups || p.part != p.k || p.k % 16 != 0 || p.n % 8 != 0) return cudaErrorNotSupported;
  if (p.m > (1ll << 31) - 1024 || p.n > (1ll << 31) - 1024 || strips * cols > (1ll << 30)) return cudaErrorNotSupported;
  CUtensorMap x, w;
  if (const int status = make_map(x, p.x, p.m, p.k, kRows / kWide)) return status;
  if (const int status = make_map(w, p.w, p.n, p.k, kCols / kTall)) return status;
  const Tiles tiles = {unsigned(strips), unsigned(cols), unsigned(strips * cols)};
  return dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto kernel = p.bias || p.residual ? integer_kernel<T, true> : integer_kernel<T, false>;
    if (const int status = allow_shared(kernel, kBytes)) return status;
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {kCluster, 1, 1};
    cudaLaunchConfig_t config = {};
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kBytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    config.gridDim = dim3(kCluster);
    // Blocks stay: as many clusters as run at once, where there is work for more.
    int clusters = int(tiles.units);
    if (clusters > multiprocessors() / kCluster) {
      if (const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) return int(error);
      if (clusters < 1) return int(cudaErrorNotSupported);
      if (tiles.units < unsigned(clusters)) clusters = int(tiles.units);
    }
    config.gridDim = dim3(unsigned(clusters) * kCluster);
    return int(cudaLaunchKernelEx(&config, kernel, x, w, p, tiles));
  });
}

}  // namespace sq
