// A stand-in for libcuda.so.1 that launches nothing, and keeps what the last launch would have given to the kernel.
#include <cuda.h>
#include <string.h>

#define MOST 256

// The number and sizes of a kernel's parameters, from its machine code.
typedef struct {
  int count;
  int sizes[MOST];
} Function;

struct {
  int launches;
  unsigned grid[3], threads, shared;
  unsigned char values[MOST][8];
} last_launch;

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **params, void **extra) {
  Function *function = (Function *)f;
  last_launch.launches++;
  last_launch.grid[0] = config->gridDimX;
  last_launch.grid[1] = config->gridDimY;
  last_launch.grid[2] = config->gridDimZ;
  last_launch.threads = config->blockDimX;
  last_launch.shared = config->sharedMemBytes;
  memset(last_launch.values, 0, sizeof last_launch.values);
  for (int i = 0; i < function->count; i++)
    memcpy(last_launch.values[i], params[i], function->sizes[i]);
  return CUDA_SUCCESS;
}

// All memory counts as the device's.
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **data, CUdeviceptr pointer) {
  for (unsigned i = 0; i < count; i++)
    *(CUdeviceptr *)data[i] = pointer;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error that the stub does not know";
  return CUDA_SUCCESS;
}
