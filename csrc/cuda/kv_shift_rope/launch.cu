#include "cuda/kv_shift_rope/launch.h"

#include "cuda/common/launch.h"

namespace nova {
namespace {

struct Launch {
  int grid, threads, shared_bytes;
  uintptr_t stream;
};

template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), const Launch& launch, const Arguments&... arguments) {
  kernel<<<launch.grid, launch.threads, launch.shared_bytes, reinterpret_cast<cudaStream_t>(launch.stream)>>>(
      arguments...);
  check(cudaGetLastError(), "kv_shift_rope");
}

}  // namespace
}  // namespace nova

#include "cuda/kv_shift_rope/host.h"
