/* NVIDIA's driver and CUDA runtime for a machine without a GPU: enough for TVM's CUDA runtime to
 * load, allocate, launch and capture. Memory is the host's, kernels compute nothing, and what is
 * called is written down, a line a call, in the file that STUB_LOG names.
 *
 * STUB_GPUS: how many GPUs (default 1). STUB_CAPABILITY: theirs, as 90 for 9.0 (default 90).
 * STUB_CUDA: the newest CUDA, as 13000 for 13.0 (the default). STUB_MEMORY: bytes of each GPU.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ERROR_INVALID_VALUE 1
#define ERROR_NO_BINARY_FOR_GPU 209
#define ERROR_NOT_FOUND 500
#define ERROR_STREAM_CAPTURE 900

typedef struct {
  unsigned grid[3], block[3], shared_bytes;
  void *stream;
  void *attributes;
  unsigned attribute_count;
} LaunchConfig;

typedef struct {
  unsigned char *image;
} Module;

typedef struct Graph {
  int kernels;
} Graph;

static int current_device;
static size_t allocated;
static void *capturing;  /* the stream that is being captured */
static int captured_kernels;

static long setting(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text && *text ? atol(text) : otherwise;
}

static void say(const char *line, const char *text, long a, long b, long c, long d) {
  const char *path = getenv("STUB_LOG");
  FILE *file = path ? fopen(path, "a") : NULL;
  if (!file) return;
  fprintf(file, "%s %s %ld %ld %ld %ld\n", line, text, a, b, c, d);
  fclose(file);
}

static int gpus(void) { return (int)setting("STUB_GPUS", 1); }
static size_t memory(void) { return (size_t)setting("STUB_MEMORY", 8l << 30); }

/* ------------------------------------------------------------------------------------ driver */

int cuInit(unsigned flags) { return flags ? ERROR_INVALID_VALUE : 0; }

int cuDriverGetVersion(int *version) {
  *version = (int)setting("STUB_CUDA", 13000);
  return 0;
}

int cuDeviceGetCount(int *count) {
  *count = gpus();
  return 0;
}

int cuDeviceGet(int *device, int index) {
  *device = index;
  return index < gpus() ? 0 : ERROR_INVALID_VALUE;
}

int cuDeviceGetName(char *name, int size, int device) {
  snprintf(name, size, "Stub GPU %d", device);
  return 0;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
  (void)device;
  *bytes = memory();
  return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  long capability = setting("STUB_CAPABILITY", 90);
  switch (attribute) {
    case 1: *value = 1024; return 0;        /* threads a block */
    case 8: *value = 49152; return 0;       /* shared memory a block */
    case 10: *value = 32; return 0;         /* warp size */
    case 12: *value = 65536; return 0;      /* registers a block */
    case 16: *value = 4; return 0;          /* multiprocessors */
    case 38: *value = 1 << 20; return 0;    /* L2 cache */
    case 75: *value = (int)(capability / 10); return 0;
    case 76: *value = (int)(capability % 10); return 0;
    default: *value = 1; return 0;
  }
}

int cuGetErrorName(int error, const char **name) {
  *name = error == ERROR_NOT_FOUND           ? "CUDA_ERROR_NOT_FOUND"
          : error == ERROR_NO_BINARY_FOR_GPU ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
                                             : "CUDA_ERROR_INVALID_VALUE";
  return 0;
}

int cuGetErrorString(int error, const char **text) { return cuGetErrorName(error, text); }

/* NVRTC asks for one, and goes on without. */
int cuGetExportTable(const void **table, const void *id) {
  (void)id;
  *table = NULL;
  return ERROR_NOT_FOUND;
}

static uint64_t read64(const unsigned char *at) {
  uint64_t value;
  memcpy(&value, at, sizeof value);
  return value;
}

static uint32_t read32(const unsigned char *at) {
  uint32_t value;
  memcpy(&value, at, sizeof value);
  return value;
}

static uint16_t read16(const unsigned char *at) {
  uint16_t value;
  memcpy(&value, at, sizeof value);
  return value;
}

/* Takes 64-bit ELF files for CUDA (machine 190) only, as a driver takes cubins. */
int cuModuleLoadData(Module **module, const void *image) {
  unsigned char *bytes = (unsigned char *)image;
  if (memcmp(bytes, "\177ELF\2", 5) || read16(bytes + 18) != 190) return ERROR_NO_BINARY_FOR_GPU;
  *module = malloc(sizeof **module);
  (*module)->image = bytes;
  say("module", "loaded", (long)read16(bytes + 60), current_device, 0, 0);
  return 0;
}

int cuModuleUnload(Module *module) {
  free(module);
  return 0;
}

/* Finds the function in the symbol table of the ELF file. */
int cuModuleGetFunction(char **function, Module *module, const char *name) {
  unsigned char *elf = module->image, *sections = elf + read64(elf + 40);
  unsigned size = read16(elf + 58), count = read16(elf + 60);
  for (unsigned i = 0; i < count; ++i) {
    unsigned char *table = sections + i * size;
    if (read32(table + 4) != 2) continue;
    unsigned char *symbols = elf + read64(table + 24);
    const char *names = (const char *)elf + read64(sections + read32(table + 40) * size + 24);
    for (uint64_t at = 0; at < read64(table + 32); at += 24) {
      int is_function = (symbols[at + 4] & 15) == 2;
      if (is_function && !strcmp(names + read32(symbols + at), name)) {
        *function = strdup(name);
        say("function", name, 0, 0, 0, 0);
        return 0;
      }
    }
  }
  return ERROR_NOT_FOUND;
}

int cuFuncSetAttribute(const char *function, int attribute, int value) {
  say("attribute", function, attribute, value, 0, 0);
  return 0;
}

int cuLaunchKernelEx(const LaunchConfig *config, const char *function, void **arguments,
                     void **extra) {
  (void)arguments;
  (void)extra;
  if (config->shared_bytes > 227 * 1024) return ERROR_INVALID_VALUE;
  int captured = capturing && config->stream == capturing;
  captured_kernels += captured;
  say(captured ? "captured" : "launch", function,
      (long)config->grid[0] * config->grid[1] * config->grid[2],
      (long)config->block[0] * config->block[1] * config->block[2], config->shared_bytes,
      config->attribute_count);
  return 0;
}

int cuTensorMapEncodeTiled(void) { return ERROR_INVALID_VALUE; }

/* ----------------------------------------------------------------------------------- runtime */

const char *cudaGetErrorName(int error) {
  return error == ERROR_STREAM_CAPTURE ? "cudaErrorStreamCaptureUnsupported" : "cudaErrorStub";
}
const char *cudaGetErrorString(int error) { return cudaGetErrorName(error); }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }

int cudaGetDeviceCount(int *count) { return cuDeviceGetCount(count); }

int cudaSetDevice(int device) {
  if (device >= gpus()) return ERROR_INVALID_VALUE;
  current_device = device;
  return 0;
}

int cudaGetDevice(int *device) {
  *device = current_device;
  return 0;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  return cuDeviceGetAttribute(value, attribute, device);
}

/* cudaDeviceProp begins with name[256], uuid[16], luid[8], an unsigned, and then totalGlobalMem. */
int cudaGetDeviceProperties(char *properties, int device) {
  cuDeviceGetName(properties, 256, device);
  size_t total = memory();
  memcpy(properties + 288, &total, sizeof total);
  return 0;
}

int cudaMemGetInfo(size_t *available, size_t *total) {
  *total = memory();
  *available = *total - allocated;
  return 0;
}

/* A block of host memory with its size before it, zeroed. */
int cudaMalloc(void **pointer, size_t size) {
  if (capturing) return ERROR_STREAM_CAPTURE;
  say("malloc", "gpu", (long)size, (long)allocated, 0, 0);
  if (allocated + size > memory()) return 2;
  size_t *block = aligned_alloc(256, (size + 511) / 256 * 256);
  memset(block, 0, size + 256);
  *block = size;
  allocated += size;
  *pointer = (char *)block + 256;
  return 0;
}

int cudaFree(void *pointer) {
  if (capturing) return ERROR_STREAM_CAPTURE;
  if (!pointer) return 0;
  size_t *block = (size_t *)((char *)pointer - 256);
  allocated -= *block;
  free(block);
  return 0;
}

int cudaMallocHost(void **pointer, size_t size) {
  *pointer = calloc(1, size);
  return 0;
}

int cudaFreeHost(void *pointer) {
  free(pointer);
  return 0;
}

int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  if (capturing && stream != capturing) return ERROR_STREAM_CAPTURE;
  (void)kind;
  memmove(to, from, size);
  return 0;
}

int cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t size,
                        void *stream) {
  (void)to_device;
  (void)from_device;
  return cudaMemcpyAsync(to, from, size, 0, stream);
}

static int make(void **object) {
  *object = malloc(1);
  return 0;
}

int cudaStreamCreate(void **stream) { return make(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) {
  (void)flags;
  return make(stream);
}
int cudaStreamDestroy(void *stream) {
  free(stream);
  return 0;
}
int cudaStreamSynchronize(void *stream) {
  (void)stream;
  return capturing ? ERROR_STREAM_CAPTURE : 0;
}
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) {
  (void)stream;
  (void)event;
  (void)flags;
  return 0;
}
int cudaEventCreate(void **event) { return make(event); }
int cudaEventDestroy(void *event) {
  free(event);
  return 0;
}
int cudaEventRecord(void *event, void *stream) {
  (void)event;
  (void)stream;
  return 0;
}
int cudaEventSynchronize(void *event) {
  (void)event;
  return 0;
}
int cudaEventElapsedTime(float *milliseconds, void *start, void *stop) {
  (void)start;
  (void)stop;
  *milliseconds = 1.0f;
  return 0;
}

int cudaStreamBeginCapture(void *stream, int mode) {
  (void)mode;
  if (capturing) return ERROR_STREAM_CAPTURE;
  capturing = stream;
  captured_kernels = 0;
  return 0;
}

int cudaStreamEndCapture(void *stream, Graph **graph) {
  if (capturing != stream) return ERROR_STREAM_CAPTURE;
  capturing = NULL;
  *graph = malloc(sizeof **graph);
  (*graph)->kernels = captured_kernels;
  return 0;
}

int cudaGraphInstantiate(Graph **executable, Graph *graph, void *a, void *b, unsigned long long c) {
  (void)a;
  (void)b;
  (void)c;
  *executable = malloc(sizeof **executable);
  **executable = *graph;
  say("graph", "instantiated", graph->kernels, 0, 0, 0);
  return 0;
}

int cudaGraphDestroy(Graph *graph) {
  free(graph);
  return 0;
}

int cudaGraphExecDestroy(Graph *executable) {
  free(executable);
  return 0;
}

int cudaGraphLaunch(Graph *executable, void *stream) {
  (void)stream;
  say("graph", "launched", executable->kernels, 0, 0, 0);
  return 0;
}
