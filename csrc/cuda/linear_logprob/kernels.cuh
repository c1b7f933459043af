// All kernels of linear_logprob for sm_90a.
#pragma once
#include "cuda/linear_logprob/dlogits.cuh"
#include "cuda/linear_logprob/fold.cuh"
