"""Run by test_linear_head: compiles every variant of the CUDA kernels to machine code, without a GPU."""

from __future__ import annotations

import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dft_lightning.ops import triton_kernels

ALIGNED = [["tt.divisibility", 16]]


def compiled(kernel, values: str, flags: bool, name: str = "", **others: bool) -> str:
    """Name, the kinds of code that came out, and how many loads and stores of 16 bytes are in it.

    As for rows that begin on 16 elements, of a vocabulary that 16 does not divide.
    """
    known = {
        "values": values,
        "reference_values": values,
        "reference_stride": "i64",
        "row_stride": "i64",
        "value_stride": "i64",
        "targets": "*i64",
        "correct": "*i1",
    }
    known |= {"vocabulary": "i32", "num_rows": "i32", "scale": "fp32", "softcap": "fp32"}
    known |= {"reference_scale": "fp32", "reference_softcap": "fp32"}
    known |= {"value_scale": "fp32", "smallest": "fp32"}
    constants = {each: 4096 if each == "BLOCK" else flags for each in kernel.arg_names if each.isupper()} | others
    signature = {name: "constexpr" if name in constants else known.get(name, "*fp32") for name in kernel.arg_names}
    aligned = [
        name.startswith("*") or kernel.arg_names[at].endswith("stride") for at, name in enumerate(signature.values())
    ]
    attrs = {(at,): ALIGNED for at, yes in enumerate(aligned) if yes}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    loads, stores = (len(re.findall(rf"{kind}\.global\.v4\.b32", result.asm["ptx"])) for kind in ("ld", "st"))
    return f"{kernel.__name__} {values} {name or flags} {' '.join(result.asm)} loads {loads} stores {stores}"


if __name__ == "__main__":
    for values in ("*bf16", "*fp16", "*fp32"):
        for flags in (True, False):
            print(compiled(triton_kernels._moments_kernel, values, flags))
            print(compiled(triton_kernels._gradient_kernel, values, flags))
            print(compiled(triton_kernels._cross_entropy_kernel, values, flags))
            print(compiled(triton_kernels._column_largest_kernel, values, flags, ROWS=16, BLOCK=512))
        print(compiled(triton_kernels._moments_kernel, values, False, "reference", KEEP=True))
        print(compiled(triton_kernels._moments_kernel, values, True, "unkept", KEEP=False))
