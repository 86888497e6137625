"""The operators in Triton, installed as `lvtp.triton_kernels`.

`KERNELS` maps an operator's name to its launcher, which takes the operator's arguments. `lvtp.use_backend("triton")`
raises for a name that is not here.
"""

from collections.abc import Callable

KERNELS: dict[str, Callable] = {}
