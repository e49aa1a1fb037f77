// What the machine can do at most, measured anew for every line read: bytes read from memory and
// multiply-adds from registers, by all threads at once. Answers one JSON object per line.
//
//     cc -O2 -march=native -pthread limits.c -o limits && echo | ./limits 2
//
// Memory: every thread sums its part of a buffer several times larger than a last-level cache. Arithmetic:
// fourteen independent accumulators hide the latency of the instruction; a width the CPU has no instruction
// for is null.
#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { kBytesPerThread = 192 << 20, kMaxThreads = 256, kAccumulators = 14, kPasses = 3 };

typedef void (*Work)(int thread);

static int num_threads;
static char* memory[kMaxThreads];
static pthread_barrier_t begin, end;
static Work current;
static volatile uint64_t sink[kMaxThreads * 8];

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

typedef uint64_t Words __attribute__((vector_size(64)));

static void read_memory(int thread) {
    const Words* words = (const Words*)memory[thread];
    Words a = {0}, b = {0}, c = {0}, d = {0};
    for (size_t i = 0; i < kBytesPerThread / sizeof(Words); i += 4) {
        a ^= words[i];
        b ^= words[i + 1];
        c ^= words[i + 2];
        d ^= words[i + 3];
    }
    a ^= b ^ c ^ d;
    sink[thread * 8] = a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
}

// kAccumulators variables, not an array: that one would live on the stack, and its loads and stores be what
// is measured.
#define EACH(one) \
    one(0) one(1) one(2) one(3) one(4) one(5) one(6) one(7) one(8) one(9) one(10) one(11) one(12) one(13)
#define DECLARE(i) SUMS sum##i = ZERO;
#define ADD(i)             \
    sum##i = NEXT(sum##i); \
    __asm__ volatile("" : REGISTER(sum##i));
#define CHAINS                            \
    EACH(DECLARE)                         \
    for (long n = 0; n < kRepeats; ++n) { \
        EACH(ADD)                         \
    }

static const long kRepeats = 2000000;

#if defined(__AVX512F__)
#define FLOAT_OPS (2.0 * 16)
#define SUMS __m512
#define ZERO _mm512_setzero_ps()
#define REGISTER "+v"
#define NEXT(sum) _mm512_fmadd_ps(x, x, sum)
static void float_chains(int thread) {
    (void)thread;
    const __m512 x = _mm512_set1_ps(0.5f);
    CHAINS
}
#undef NEXT
#if defined(__AVX512BF16__)
#define BFLOAT_OPS (2.0 * 32)
#define NEXT(sum) _mm512_dpbf16_ps(sum, x, x)
static void bfloat_chains(int thread) {
    (void)thread;
    const __m512bh x = (__m512bh)_mm512_setzero_si512();
    CHAINS
}
#undef NEXT
#endif
#if defined(__AVX512VNNI__)
#define INT8_OPS (2.0 * 64)
#undef SUMS
#undef ZERO
#define SUMS __m512i
#define ZERO _mm512_setzero_si512()
#define NEXT(sum) _mm512_dpbusd_epi32(sum, x, x)
static void int8_chains(int thread) {
    (void)thread;
    const __m512i x = _mm512_setzero_si512();
    CHAINS
}
#endif
#elif defined(__FMA__)
#define FLOAT_OPS (2.0 * 8)
#define SUMS __m256
#define ZERO _mm256_setzero_ps()
#define REGISTER "+x"
#define NEXT(sum) _mm256_fmadd_ps(x, x, sum)
static void float_chains(int thread) {
    (void)thread;
    const __m256 x = _mm256_set1_ps(0.5f);
    CHAINS
}
#endif

static void* serve(void* index) {
    const int thread = (int)(intptr_t)index;
    memory[thread] = aligned_alloc(4096, kBytesPerThread);
    if (memory[thread] == NULL)
        exit(1);
    memset(memory[thread], 1, kBytesPerThread);  // by its own thread: on its own node
    for (;;) {
        pthread_barrier_wait(&begin);
        current(thread);
        pthread_barrier_wait(&end);
    }
    return NULL;
}

// Median seconds of kPasses passes.
static double timed(Work work) {
    double times[kPasses];
    for (int pass = 0; pass < kPasses; ++pass) {
        current = work;
        const double from = now();
        pthread_barrier_wait(&begin);
        pthread_barrier_wait(&end);
        double took = now() - from;
        int at = pass;
        for (; at > 0 && times[at - 1] > took; --at)
            times[at] = times[at - 1];
        times[at] = took;
    }
    return times[kPasses / 2];
}

static void tell(const char* name, Work work, double amount, const char* after) {
    if (work == NULL)
        printf("\"%s\": null%s", name, after);
    else
        printf("\"%s\": %.2f%s", name, 1e-9 * amount * num_threads / timed(work), after);
}

int main(int count, char** arguments) {
    num_threads = count > 1 ? atoi(arguments[1]) : 1;
    if (num_threads < 1 || num_threads > kMaxThreads) {
        fprintf(stderr, "threads: %d must be in [1, %d]\n", num_threads, kMaxThreads);
        return 2;
    }
    pthread_barrier_init(&begin, NULL, (unsigned)num_threads + 1);
    pthread_barrier_init(&end, NULL, (unsigned)num_threads + 1);
    for (int i = 0; i < num_threads; ++i) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve, (void*)(intptr_t)i) != 0)
            return 1;
    }
    Work float_work = NULL, bfloat_work = NULL, int8_work = NULL;
    double float_ops = 0, bfloat_ops = 0, int8_ops = 0;
#ifdef FLOAT_OPS
    float_work = float_chains, float_ops = FLOAT_OPS;
#endif
#ifdef BFLOAT_OPS
    bfloat_work = bfloat_chains, bfloat_ops = BFLOAT_OPS;
#endif
#ifdef INT8_OPS
    int8_work = int8_chains, int8_ops = INT8_OPS;
#endif
    const double chains = (double)kRepeats * kAccumulators;
    char line[64];
    while (fgets(line, sizeof line, stdin) != NULL) {
        printf("{");
        tell("read_gb_per_s", read_memory, kBytesPerThread, ", ");
        tell("float32_gflop_per_s", float_work, chains * float_ops, ", ");
        tell("bfloat16_gflop_per_s", bfloat_work, chains * bfloat_ops, ", ");
        tell("int8_gop_per_s", int8_work, chains * int8_ops, "}\n");
        fflush(stdout);
    }
    return 0;
}
