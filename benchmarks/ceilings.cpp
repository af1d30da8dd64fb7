// What this machine can do at most: fused multiply-adds a second, and bytes a second through memory. Prints GFLOP/s and
// GB/s (read and write together) for the number of threads in the first argument.
#include <omp.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#ifdef __AVX512F__
typedef float Vector __attribute__((vector_size(64)));
#else
typedef float Vector __attribute__((vector_size(32)));
#endif
constexpr int kChains = 10;  // latency times throughput of the multiply-add units, and no more than fits the registers

double best_of(int rounds, void (*work)()) {
  double best = 1e9;
  for (int i = 0; i < rounds; ++i) {
    const double start = omp_get_wtime();
    work();
    best = std::min(best, omp_get_wtime() - start);
  }
  return best;
}

constexpr long kSteps = 4'000'000;

void multiply_add() {
#pragma omp parallel
  {
    Vector sum[kChains] = {}, factor = sum[0] + 0.5f;
    for (long i = 0; i < kSteps; ++i) {
#pragma GCC unroll 10
      for (int c = 0; c < kChains; ++c) sum[c] = sum[c] * factor + factor;
#pragma GCC unroll 10
      for (int c = 0; c < kChains; ++c) asm volatile("" : "+x"(sum[c]));
    }
  }
}

constexpr size_t kBytes = size_t{1} << 28;
std::unique_ptr<char[]> from(new char[kBytes]), to(new char[kBytes]);

void copy() {
#pragma omp parallel
  {
    const size_t part = kBytes / omp_get_num_threads(), first = part * omp_get_thread_num();
    std::memcpy(to.get() + first, from.get() + first, part);
  }
}

int main(int, char** arguments) {
  const int threads = std::atoi(arguments[1]);
  omp_set_num_threads(threads);
  std::memset(from.get(), 1, kBytes);
  copy();
  const double flops = 2.0 * kSteps * kChains * (sizeof(Vector) / sizeof(float)) * threads;
  std::printf("%.1f %.1f\n", flops / best_of(5, multiply_add) / 1e9, 2.0 * kBytes / best_of(5, copy) / 1e9);
}
