"""The names of Gluon that differ between the versions of Triton, under those of the newest."""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

#: Triton 3.9 calls both so.
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

#: Triton 3.7 calls it so.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

commit_group, wait_group = async_copy.commit_group, async_copy.wait_group
