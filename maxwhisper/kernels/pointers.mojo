"""Where the numbers of tensors lie.

A kernel is compiled for every shape that its tensors have in a graph, with all closures in it. So kernels only read
sizes and these pointers, and what computes is given nothing else: it is compiled once for all.
"""

from extensibility import ManagedTensorSlice

comptime Untracked = UntrackedOrigin[mut=True]
comptime Stored[dtype: DType] = Pointer[Scalar[dtype], Untracked]
comptime Numbers = Stored[DType.float32]


@always_inline
def stored[dtype: DType](tensor: ManagedTensorSlice) -> Stored[dtype]:
    """Returns what a tensor holds, as numbers of that many bytes; threads write and read it in turn."""
    return rebind[Stored[dtype]](tensor.unsafe_ptr().unsafe_origin_cast[Untracked]())


@always_inline
def numbers(tensor: ManagedTensorSlice) -> Numbers:
    return stored[DType.float32](tensor)


@always_inline
def untracked[T: Copyable](mut list: List[T]) -> Pointer[T, Untracked]:
    """Returns where a list's items are, as long as it lives."""
    return list.unsafe_ptr().unsafe_origin_cast[Untracked]()
