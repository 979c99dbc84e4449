// Sophia's step on the CPU: one pass over memory for a whole list of tensors.
//
// Knows nothing of Python or torch: addresses come in tables, and threads from the caller, who runs
// `step` in all of them at once. Chunks are handed out one by one, but their borders do not depend
// on the number of threads, and products are not contracted into multiply-adds: results are the
// same bits on every x86-64 and with any number of threads.

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#define CHUNK 16384    // elements that a thread takes at a time
#define BLOCK 1024     // elements that are widened to fp32 at a time; they fit into the first level
#define SMALLEST 1e-30f  // stands for a threshold that there is none of yet: all that moves is clipped

// As far as the processor goes: the loader takes the version that fits it.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(ONE_VERSION)
#define VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VERSIONS
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))

// kernels/cpu.py holds the same fields.
typedef struct {
  const int64_t *theta, *grad, *m, *h;  // address of each tensor's first element
  const int64_t *rho;                   // address of each tensor's threshold, a float
  const int64_t *size;                  // elements of each tensor
  const int64_t *first_chunk;           // where each tensor's chunks begin, and the end
  int64_t tensors;
  double lr;
  float decay;           // theta is multiplied by it
  float weight;          // 1 - beta1
  float eps;             // of h before it is divided by
  float hessian_weight;  // what h is divided by
  int32_t nesterov;
  int32_t bf16;          // parameters and gradients are, instead of fp32
  int32_t undo;          // take the last update back
  _Atomic int64_t next;     // the first chunk that nobody has taken
  _Atomic int64_t bad;      // whether a gradient is not finite
  _Atomic int64_t clipped;  // coordinates
} job;

typedef struct {
  float step, decay, weight, further, eps, hessian_weight, rho;
} scalars;

typedef struct {
  uint32_t clipped, bad;
} counts;

int64_t chunk_elements(void) { return CHUNK; }

int64_t job_bytes(void) { return sizeof(job); }

VERSIONS static void widen(float *to, const uint16_t *from, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = (uint32_t)from[i] << 16;
    memcpy(&to[i], &bits, sizeof bits);
  }
}

VERSIONS static void narrow(uint16_t *to, const float *from, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, &from[i], sizeof bits);
    uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // ties to even
    to[i] = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest;
  }
}

// On the way from one to the other; for a weight of 1 it is exactly there.
static inline float between(float from, float to, float weight) {
  return weight < 0.5f ? from + weight * (to - from) : to - (1.0f - weight) * (to - from);
}

// What is clipped. m is the average that holds g already; by Nesterov it goes further along g. That
// is a constant of each loop, for a weight of 0 past an m near fp32's end would make NaN.
ALWAYS_INLINE float ratio_of(float m, float h, float g, const scalars *s, int nesterov) {
  float numerator = nesterov ? between(m, g, s->further) : m;
  float curvature = h > s->eps ? h : s->eps;
  return numerator * s->hessian_weight / curvature;
}

static inline float clip(float ratio, float rho) {
  ratio = ratio > rho ? rho : ratio;
  return ratio < -rho ? -rho : ratio;
}

ALWAYS_INLINE counts update_as(float *restrict theta, const float *restrict g, float *restrict m,
                               const float *restrict h, int64_t n, scalars s, int nesterov) {
  uint32_t clipped = 0, bad = 0;
  for (int64_t i = 0; i < n; i++) {
    int is_finite = g[i] - g[i] == 0.0f;
    float grad = is_finite ? g[i] : 0.0f;
    bad += !is_finite;
    m[i] = between(m[i], grad, s.weight);
    float ratio = ratio_of(m[i], h[i], grad, &s, nesterov);
    clipped += (ratio >= s.rho) | (ratio <= -s.rho);
    theta[i] = theta[i] * s.decay - s.step * clip(ratio, s.rho);
  }
  return (counts){clipped, bad};
}

VERSIONS static counts update(float *restrict theta, const float *restrict g, float *restrict m,
                              const float *restrict h, int64_t n, scalars s) {
  return s.further > 0.0f ? update_as(theta, g, m, h, n, s, 1) : update_as(theta, g, m, h, n, s, 0);
}

// The way back, to rounding. With weight 1 the average that was has no influence on what comes.
VERSIONS static counts undo(float *restrict theta, const float *restrict g, float *restrict m,
                            const float *restrict h, int64_t n, scalars s) {
  for (int64_t i = 0; i < n; i++) {
    float grad = g[i] - g[i] == 0.0f ? g[i] : 0.0f;
    float ratio = ratio_of(m[i], h[i], grad, &s, s.further > 0.0f);
    theta[i] = (theta[i] + s.step * clip(ratio, s.rho)) / s.decay;
    m[i] = s.weight < 1.0f ? (m[i] - s.weight * grad) / (1.0f - s.weight) : 0.0f;
  }
  return (counts){0, 0};
}

static counts change_f32(const job *j, int64_t t, int64_t start, int64_t n, scalars s) {
  float *theta = (float *)j->theta[t] + start, *m = (float *)j->m[t] + start;
  const float *g = (const float *)j->grad[t] + start, *h = (const float *)j->h[t] + start;
  return j->undo ? undo(theta, g, m, h, n, s) : update(theta, g, m, h, n, s);
}

static counts change_bf16(const job *j, int64_t t, int64_t start, int64_t n, scalars s) {
  float theta[BLOCK], g[BLOCK];
  counts all = {0, 0};
  for (int64_t end = start + n; start < end; start += BLOCK) {
    n = end - start < BLOCK ? end - start : BLOCK;
    uint16_t *narrow_theta = (uint16_t *)j->theta[t] + start;
    float *m = (float *)j->m[t] + start;
    const float *h = (const float *)j->h[t] + start;
    widen(theta, narrow_theta, n);
    widen(g, (const uint16_t *)j->grad[t] + start, n);
    counts here = j->undo ? undo(theta, g, m, h, n, s) : update(theta, g, m, h, n, s);
    all.clipped += here.clipped;
    all.bad += here.bad;
    narrow(narrow_theta, theta, n);
  }
  return all;
}

// Run by every thread; ends when all chunks are taken. That one holds a NaN ends nothing: what is
// taken back would depend on which chunks other threads had come to.
void step(job *j) {
  int64_t chunks = j->first_chunk[j->tensors], t = 0, clipped = 0;
  for (int64_t c; (c = atomic_fetch_add(&j->next, 1)) < chunks;) {
    while (c >= j->first_chunk[t + 1]) t++;
    int64_t start = (c - j->first_chunk[t]) * CHUNK;
    int64_t n = j->size[t] - start < CHUNK ? j->size[t] - start : CHUNK;
    float rho = *(const float *)j->rho[t];
    rho = rho > SMALLEST ? rho : SMALLEST;
    scalars s = {(float)(j->lr / rho), j->decay, j->weight, j->nesterov ? j->weight : 0.0f,
                 j->eps, j->hessian_weight, rho};
    counts here = j->bf16 ? change_bf16(j, t, start, n, s) : change_f32(j, t, start, n, s);
    clipped += here.clipped;
    if (here.bad) j->bad = 1;
  }
  atomic_fetch_add(&j->clipped, clipped);
}
