// The traffic of Sophia's step with next to no arithmetic: four arrays read, two of them written.
// Work is shared out as in hf_sophia/kernels/sophia.c, so that only the arithmetic is missing.

#include <stdatomic.h>
#include <stdint.h>

#define CHUNK 16384

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(ONE_VERSION)
#define VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VERSIONS
#endif

// step.py holds the same fields.
typedef struct {
  const int64_t *theta, *grad, *m, *h;  // address of each tensor's first element
  const int64_t *size;                  // elements of each tensor
  const int64_t *first_chunk;           // where each tensor's chunks begin, and the end
  int64_t tensors;
  _Atomic int64_t next;  // the first chunk that nobody has taken
} job;

VERSIONS static void pass(float *restrict theta, const float *restrict g, float *restrict m,
                          const float *restrict h, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    m[i] += g[i];
    theta[i] += h[i] - m[i];
  }
}

void limit(job *j) {
  int64_t chunks = j->first_chunk[j->tensors], t = 0;
  for (int64_t c; (c = atomic_fetch_add(&j->next, 1)) < chunks;) {
    while (c >= j->first_chunk[t + 1]) t++;
    int64_t start = (c - j->first_chunk[t]) * CHUNK;
    int64_t n = j->size[t] - start < CHUNK ? j->size[t] - start : CHUNK;
    pass((float *)j->theta[t] + start, (const float *)j->grad[t] + start,
         (float *)j->m[t] + start, (const float *)j->h[t] + start, n);
  }
}
