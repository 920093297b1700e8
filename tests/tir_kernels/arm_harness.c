/* Calls one kernel, compiled for Arm, on tensors from a file, and writes them back.

   The file: u64 count; for each tensor u64 bits of an element, kind (DLPack's type code), number of
   dimensions and sizes, then its bytes. What TVM's runtime gives kernels is given here: tasks of a
   parallel loop run one after another. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

typedef struct {
  void *sync_handle;
  int32_t num_task;
} Group;
typedef int (*Task)(int id, Group *group, void *data);

static int launch(Task task, void *data, int wanted) {
  Group group = {0, wanted ? wanted : 3};
  for (int i = 0; i < group.num_task; ++i) {
    if (task(i, &group, data)) return -1;
  }
  return 0;
}
static void *allocate(int kind, int device, uint64_t size, int code, int bits) {
  (void)kind, (void)device, (void)code, (void)bits;
  return aligned_alloc(64, (size + 63) / 64 * 64);
}
static int release(int kind, int device, void *pointer) {
  (void)kind, (void)device;
  free(pointer);
  return 0;
}
void *__TVMBackendParallelLaunch = launch;
void *__TVMBackendAllocWorkspace = allocate;
void *__TVMBackendFreeWorkspace = release;

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; ++i) fputs(parts[i], stderr);
  fputc('\n', stderr);
}

int __tvm_ffi_kernel(void *, const TVMFFIAny *, int32_t, TVMFFIAny *);

static uint64_t number(FILE *file) {
  uint64_t value;
  if (fread(&value, 8, 1, file) != 1) exit(2);
  return value;
}

int main(int argc, char **argv) {
  FILE *file = argc == 2 ? fopen(argv[1], "r+b") : NULL;
  if (!file) return 2;
  int count = (int)number(file);
  DLTensor tensors[16];
  TVMFFIAny args[16], result;
  long starts[16];
  size_t sizes[16];
  if (count > 16) return 2;
  memset(args, 0, sizeof args);
  memset(&result, 0, sizeof result);
  memset(tensors, 0, sizeof tensors);
  for (int i = 0; i < count; ++i) {
    DLTensor *t = tensors + i;
    t->device.device_type = kDLCPU;
    t->dtype.bits = (uint8_t)number(file);
    t->dtype.code = (uint8_t)number(file);
    t->dtype.lanes = 1;
    t->ndim = (int32_t)number(file);
    t->shape = calloc(t->ndim, 8);
    t->strides = calloc(t->ndim, 8);
    sizes[i] = t->dtype.bits / 8;
    for (int d = 0; d < t->ndim; ++d) sizes[i] *= t->shape[d] = (int64_t)number(file);
    int64_t stride = 1;
    for (int d = t->ndim - 1; d >= 0; --d) {
      t->strides[d] = stride;
      stride *= t->shape[d];
    }
    starts[i] = ftell(file);
    t->data = aligned_alloc(64, (sizes[i] + 63) / 64 * 64);
    if (fread(t->data, 1, sizes[i], file) != sizes[i]) return 2;
    args[i].type_index = kTVMFFIDLTensorPtr;
    args[i].v_ptr = t;
  }
  if (__tvm_ffi_kernel(NULL, args, count, &result)) return 1;
  for (int i = 0; i < count; ++i) {
    fseek(file, starts[i], SEEK_SET);
    if (fwrite(tensors[i].data, 1, sizes[i], file) != sizes[i]) return 2;
  }
  return fclose(file) ? 2 : 0;
}
