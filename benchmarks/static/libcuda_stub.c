/* A CUDA driver without a GPU, for measuring and testing the host's side of a launch.
 *
 * Triton's own launcher calls it: every call succeeds, no kernel runs, and a pointer is what it was given as. Each
 * function that is asked for gets a handle of its own, and the last launch is kept, for tests to read. A test may have
 * each launch handed to a function of its own, which executes it (tests/ptx/driver.py).
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

#define MAX_PARAMS 64

typedef struct {
  uint64_t function, stream;
  uint32_t grid[3], block, shared;
  uint64_t params[MAX_PARAMS]; /* the first eight bytes of each; meaningless past a parameter's own size */
} Launch;

typedef void (*Executor)(uint64_t function, uint32_t blocks, uint32_t shared, void **params);

static int64_t launches = 0;
static Executor executor = NULL;
static int params_to_keep = 0; /* the driver's interface does not tell how many there are */
static Launch last;

int64_t stub_launches(void) { return launches; }
void stub_keep_params(int count) { params_to_keep = count < MAX_PARAMS ? count : MAX_PARAMS; }
const Launch *stub_last_launch(void) { return &last; }
void stub_execute_with(Executor function) { executor = function; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  __atomic_add_fetch(&launches, 1, __ATOMIC_RELAXED);
  if (params_to_keep) {
    last.function = (uint64_t)function;
    last.stream = (uint64_t)config->hStream;
    last.grid[0] = config->gridDimX;
    last.grid[1] = config->gridDimY;
    last.grid[2] = config->gridDimZ;
    last.block = config->blockDimX;
    last.shared = config->sharedMemBytes;
    for (int i = 0; i < params_to_keep; ++i)
      memcpy(&last.params[i], params[i], sizeof(uint64_t));
  }
  if (executor)
    executor((uint64_t)function, config->gridDimX, config->sharedMemBytes, params);
  return CUDA_SUCCESS;
}

/* What a tensor map is made from, readable where a test finds it among the parameters, the address first. */
typedef struct {
  uint64_t address, columns, rows, stride;
  uint32_t box_columns, box_rows;
  uint8_t rank, itemsize, swizzle, fills_with_nan;
} TensorMap;

static int size_of(CUtensorMapDataType type) {
  switch (type) {
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
  case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
    return 2;
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    return 4;
  default:
    return 0;
  }
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  TensorMap made = {.address = (uint64_t)address, .rank = rank, .itemsize = size_of(type), .swizzle = swizzle};
  made.fills_with_nan = fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  if (rank == 2) {
    made.columns = shape[0];
    made.rows = shape[1];
    made.stride = strides[0];
    made.box_columns = box[0];
    made.box_rows = box[1];
  }
  memset(map, 0, sizeof *map);
  memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeIm2col(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                 const cuuint64_t *shape, const cuuint64_t *strides, const int *lower,
                                 const int *upper, cuuint32_t channels, cuuint32_t pixels,
                                 const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                 CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                 CUtensorMapFloatOOBfill fill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

/* What Triton asks of a device, as an H100 answers. */
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    *value = 232448;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
    *value = 233472;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    *value = 65536;
    break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
    *value = 132;
    break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    *value = 32;
    break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
    *value = 9;
    break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
    *value = 0;
    break;
  default:
    *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  static uint64_t handles = 0x1000;
  *function = (CUfunction)++handles;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = 12080;
  return CUDA_SUCCESS;
}

CUresult cuInit(unsigned int flags) { return CUDA_SUCCESS; }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "refused by the stub driver";
  return CUDA_SUCCESS;
}
