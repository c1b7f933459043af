"""The CUDA kernels of linear_logprob in the emulator, with the interface of nova_kernels._C_cuda."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.kernels.emulation import Mutation, emulated

POINTERS = {
    "linear_logprob_fold": "x_RD w_VD target_R inverse_norm_V state_5SR e_RV max_KR",
    "linear_logprob_dlogits": "x_RD w_VD target_R inverse_norm_V rows_8R dz_RW",
    "linear_logprob_stored_dlogits": "e_RV max_KR target_R inverse_norm_V rows_8R dz_RW",
}
NUMBERS = {
    "linear_logprob_fold": "rows dim vocab splits group clusters inverse_temperature entropy argmax",
    "linear_logprob_dlogits": "rows dim vocab width wave_start wave_tiles group clusters "
    "inverse_temperature extras",
    "linear_logprob_stored_dlogits": "rows vocab width wave_start wave_tiles extras",
}


@dataclass
class EmulatedKernels:
    """seed: in which order threads and their asynchronous work run; mutant: which change is on, from 1."""

    seed: int = 0
    mutations: Sequence[Mutation] = ()
    mutant: int = 0
    launches: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in POINTERS:
            raise AttributeError(name)

        def launch(**arguments: Any) -> None:
            library = emulated("linear_logprob", tuple(self.mutations))
            library.set_run(self.seed, self.mutant)
            message = ctypes.create_string_buffer(400)
            assert arguments.pop("stream") == 0
            given: list[Any] = []
            given += [ctypes.c_void_p(arguments.pop(key)) for key in POINTERS[name].split()]
            for key in NUMBERS[name].split():
                number = arguments.pop(key)
                given.append(ctypes.c_float(number) if isinstance(number, float) else number)
            assert not arguments, arguments
            getattr(library, name)(*given, message, len(message))
            self.launches.append(name)
            self.seed += 1
            if message.value:
                raise ValueError(message.value.decode())

        return launch
