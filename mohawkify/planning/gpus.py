"""GPUs by name: values of the makers' data sheets, and assumptions of a plan. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mohawkify.errors import UsageError

# The part of its peak arithmetic that a GPU sustains in training: an assumption, since no run of this size was timed.
# Published trainings of plain Transformers reach 0.3 to 0.5; the scan of a mixer is less regular work than they have.
UTILISATION = 0.3
# The part of the memory that is left to the driver, the libraries, communication buffers and fragmentation.
HEADROOM = 0.1


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        name: as the command line has it.
        flops_per_second: peak dense bf16 arithmetic with float32 sums; None if unknown.
        fp32_flops_per_second: peak float32 arithmetic outside of tensor cores; None if unknown.
        bytes_per_second: bandwidth of its memory; None if unknown.
    """

    name: str
    memory_bytes: int
    flops_per_second: float | None
    fp32_flops_per_second: float | None
    bytes_per_second: float | None

    @property
    def usable_bytes(self) -> int:
        """The memory that a plan may fill."""
        return int(self.memory_bytes * (1 - HEADROOM))


GB = 10**9
GPUS = {
    # NVIDIA H100 data sheet, SXM5: 80 GB, 3.35 TB/s, 1,979 TFLOP/s in bf16 with sparsity (half of it dense), 67 in
    # float32.
    "H100": Gpu("H100", 80 * GB, 989.4e12, 67e12, 3.35e12),
    # NVIDIA H200 data sheet, SXM: 141 GB, 4.8 TB/s, 1,979 TFLOP/s in bf16 with sparsity (half of it dense), 67 in
    # float32.
    "H200": Gpu("H200", 141 * GB, 989.4e12, 67e12, 4.8e12),
    # NVIDIA A100 data sheet, SXM4 of 80 GB: 2,039 GB/s, 312 TFLOP/s in bf16, 19.5 in float32.
    "A100": Gpu("A100", 80 * GB, 312e12, 19.5e12, 2.039e12),
    # NVIDIA Ada architecture whitepaper, GeForce RTX 4090: 24 GB, 1,008 GB/s, 165.2 TFLOP/s in bf16 with float32 sums,
    # 82.6 in float32.
    "4090": Gpu("4090", 24 * GB, 165.2e12, 82.6e12, 1.008e12),
}


def find_gpu(name: str) -> Gpu:
    """A GPU by its name, in capitals or not.

    Raises:
        UsageError: there is no such GPU here.
    """
    found = GPUS.get(name.upper())
    if found is None:
        raise UsageError(f"--gpu: found {name}, expected one of {', '.join(GPUS)}")
    return found


def gpu_at_hand(name: str, memory_bytes: int) -> Gpu:
    """A GPU of this machine: its own memory, and the speeds of its model, if they are known.

    Args:
        name: as the driver has it, such as ``NVIDIA H100 80GB HBM3``.
    """
    words = name.upper().replace("-", " ").split()
    known = next((gpu for gpu in GPUS.values() if gpu.name in words), None)
    if known is None:
        return Gpu(name, memory_bytes, None, None, None)
    return replace(known, name=name, memory_bytes=memory_bytes)
