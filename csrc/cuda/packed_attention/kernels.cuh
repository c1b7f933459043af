// The device code of packed_attention: bf16, head dims 64 and 128. README.md of the op has the tables.
#pragma once
#include "cuda/packed_attention/backward_dkv.cuh"
#include "cuda/packed_attention/backward_dq.cuh"
#include "cuda/packed_attention/delta.cuh"
#include "cuda/packed_attention/forward.cuh"
