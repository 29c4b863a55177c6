"""Runs what Triton compiled, without a GPU: an emulator of PTX.

Triton's interpreter runs the Python of a kernel. It sees neither the compiler nor threads. Here, Triton compiles a
kernel as for a GPU, and the PTX that comes out of it runs on the memory of CPU tensors:

    with emulated(90):
        loss = fused_cross_entropy(x, target, backend="triton")

1. `launching.py` is a driver for Triton. It looks like a GPU of an architecture, and gets every launch.
2. `ptx.py` reads the PTX of the kernel: blocks of instructions with their operands.
3. `translating.py` makes C of it. `instructions.py` has the arithmetic, `accesses.py` loads and stores, and
   `synchronising.py` what the threads of a warp do together. What is not known is an error, in the name of an
   instruction as in the number of its operands.
4. `building.py` compiles the C and calls it. `numbers.h` has PTX's numbers, `memory.h` the memory, `warps.h` and
   `running.h` run threads.
5. `tensors.py` finds the memory of a launch, which is that of the tensors that were passed. `faults.py` says what went
   wrong, with the line of the kernel, the program and the thread.

**Threads.** The code is cut into segments, straight pieces that end where threads part or meet. All threads that are at
a segment run through it, one after the other, up to the next. The threads that are furthest behind go first. At a
barrier all wait for each other, and at a shuffle those of a warp.

**What is checked.** Every access lies in an element of a tensor that was passed, and its address is a multiple of its
width. Between two barriers, no thread reads or writes in shared memory what another one writes; threads that hold
copies of the same elements may store the same value. Nor do two threads store different values at one place of a tensor
without a barrier between them. No program reads or writes what another program writes. The results are the same, bit
for bit, whether the warps of a program run in lockstep, one after the other, or from the last to the first
(`all_orders`). So threads whose results go nowhere may read what another one stores in place. An assertion on the
device is an error with its message.

**What is as bad as it may be.** Registers and shared memory that nobody wrote are NaN. A copy that nobody waits for
arrives when it is waited for, and its place is NaN until then. Approximate instructions are off by as much as the PTX
manual allows, up or down by their operands: the same operands always have the same error. Two to a whole exponent, and
division by such a number, are taken to be exact; the manual does not promise it.

**What is counted.** `Compiled.counts` has the instructions that were executed, by name; the bytes, requests and sectors
that were read and written in device memory; and the wavefronts that requests of shared memory take, with those that are
conflicts of banks. A warp's instruction is a request. With `by_element`, `Memory.times` tells how often each element of
a launch's tensors was asked for. How many wavefronts an access of 8 or 16 bytes takes is not in a manual: the emulator
takes the threads in order, 128 bytes at a time.

**What it is not.** It does not take the time of anything, and does not run the assembler's machine code. A GPU may
reorder memory accesses more than any order of warps here.
"""
