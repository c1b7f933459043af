#include "cuda/linear_logprob/launch.h"

#include "cuda/common/hang_flag.h"
#include "cuda/common/launch.h"
#include "cuda/common/tensor_map.h"

namespace nova {
namespace {

struct Launch {
  int grid, cluster, threads, shared_bytes;  // the cluster's size stands in the kernel's attributes, too
  uintptr_t stream;
};

template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), const Launch& launch, const Arguments&... arguments) {
  if (launch.shared_bytes > 0) allow_shared_memory(kernel, launch.shared_bytes);
  kernel<<<launch.grid, launch.threads, launch.shared_bytes, reinterpret_cast<cudaStream_t>(launch.stream)>>>(
      arguments...);
  check(cudaGetLastError(), "linear_logprob");
  check_hang_flag("linear_logprob");
}

}  // namespace
}  // namespace nova

#include "cuda/linear_logprob/host.h"
