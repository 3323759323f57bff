"""Devices from their data sheets, and what they would make of a launch: how many warps fit, and what takes longest.

The model: memory moves what the program needs at the bandwidth of the data sheet, and each multiprocessor runs its
share of the programs at the rate of the pipe that they keep busiest; whichever takes longer is the bound. Nothing else
is modelled: no latency, no launch (microseconds each), no caches but the one that holds small tables, no bank or
address conflicts. A bound is therefore a time that no run can beat, and the share between the two says how far it is
from being the other.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .work import Work


@dataclass(frozen=True)
class Architecture:
    """What limits a multiprocessor (NVIDIA: SM, AMD: CU).

    Attributes:
        warps, programs: that are resident at most.
        registers: 32-bit registers, of all lanes.
        shared, reserved: bytes of shared memory, and how many of them each program costs beyond its own.
        cycles: cycles of a multiprocessor that one instruction of a warp keeps a pipe busy.
    """

    warps: int
    programs: int
    registers: int
    shared: int
    reserved: int
    cycles: dict[str, float]


def _nvidia(warps: int, programs: int, shared: int, fma_lanes: int, fp64_lanes: int) -> Architecture:
    """Four schedulers issue one instruction a cycle each; 64 lanes of integers, 16 of conversions, 32 of memory."""
    cycles = {"issue": 1 / 4, "alu": 32 / 64, "multiply": 32 / 64, "fma": 32 / fma_lanes, "fp64": 32 / fp64_lanes}
    return Architecture(warps, programs, 65536, shared * 1024, 1024, cycles | {"xu": 32 / 16, "lsu": 32 / 32})


def _amd(shared: int) -> Architecture:
    """Four vector units of 16 lanes, one scalar unit, addresses of 16 lanes a cycle; 512 registers a lane."""
    cycles = {"vector": 64 / 64, "scalar": 1.0, "lsu": 64 / 16}
    return Architecture(32, 32, 512 * 64 * 4, shared * 1024, 0, cycles)


ARCHITECTURES = {
    "sm_80": _nvidia(warps=64, programs=32, shared=164, fma_lanes=64, fp64_lanes=32),
    "sm_90": _nvidia(warps=64, programs=32, shared=228, fma_lanes=128, fp64_lanes=64),
    "sm_100": _nvidia(warps=64, programs=32, shared=228, fma_lanes=128, fp64_lanes=64),
    "sm_120": _nvidia(warps=48, programs=24, shared=100, fma_lanes=128, fp64_lanes=2),
    "gfx90a": _amd(shared=64),
    "gfx942": _amd(shared=64),
    "gfx950": _amd(shared=160),
}
ARCHITECTURE_SOURCES = """\
Warps, programs, registers and shared memory of a multiprocessor: NVIDIA CUDA C++ Programming Guide, technical
specifications per compute capability (also in CCCL's `cuda::arch_traits`); AMD ROCm, "AMD GPU specifications", and
"Pipeline descriptions" for 8 waves a SIMD. Lanes: NVIDIA A100 and H100 architecture white papers (schedulers, FP32,
FP64, INT32 and load/store units of an SM), CUDA C++ Programming Guide, throughput of arithmetic instructions, and the
description of pipelines in the Nsight Compute documentation for which instruction runs where; integers of compute
capability 10.0 and 12.0 are taken to run as on 9.0. AMD CDNA 3 white paper: four SIMDs of 16 lanes; loads and stores
are counted with 64 bytes a cycle, what CDNA 2 has."""


@dataclass(frozen=True)
class Device:
    """A product: its target, bytes a second, multiprocessors, cycles a second, and where those figures are from."""

    target: str
    bandwidth: float
    multiprocessors: int
    clock: float
    source: str


DEVICES = {
    "A100": Device(
        "sm_80", 2.039e12, 108, 1.41e9,
        "NVIDIA A100 80GB SXM data sheet (bandwidth), A100 architecture white paper (SMs, boost clock)",
    ),
    "H100": Device(
        "sm_90", 3.35e12, 132, 1.98e9,
        "NVIDIA H100 SXM data sheet (bandwidth), H100 architecture white paper (SMs); the clock is the one at which "
        "128 FP32 lanes make the stated 66.9 TFLOPS",
    ),
    "H200": Device(
        "sm_90", 4.8e12, 132, 1.98e9, "NVIDIA H200 SXM data sheet (bandwidth); SMs and clock as H100, same 67 TFLOPS"
    ),
    "B200": Device(
        "sm_100", 8.0e12, 148, 1.98e9,
        "NVIDIA DGX B200 data sheet (64 TB/s in 8 GPUs); 148 SMs as device queries report; the clock is the one at "
        "which 128 FP32 lanes make the 75 TFLOPS of an HGX B200 GPU",
    ),
    "MI300X": Device(
        "gfx942", 5.3e12, 304, 2.1e9, "AMD Instinct MI300X data sheet (bandwidth, CUs, peak engine clock)"
    ),
}  # fmt: skip


def resident_warps(work: Work) -> int:
    """Warps (AMD: waves) that fit on a multiprocessor at once, of programs like these."""
    code, limits = work.code, ARCHITECTURES[work.code.target]
    lane_registers = max(1, code.registers)
    if code.target.startswith("gfx"):
        by_registers = 4 * min(limits.warps // 4, 512 // (-(-lane_registers // 8) * 8))
    else:
        of_warp = -(-lane_registers * code.warp_size // 256) * 256
        by_registers = limits.registers // of_warp // 4 * 4
    programs = min(limits.programs, limits.warps // work.warps, by_registers // work.warps)
    if code.shared:
        programs = min(programs, limits.shared // (code.shared + limits.reserved))
    return programs * work.warps


def pipe_cycles(work: Work) -> dict[str, float]:
    """Cycles of a multiprocessor that one warp of a launch keeps each pipe busy."""
    cost = ARCHITECTURES[work.code.target].cycles
    cycles: Counter[str] = Counter()
    for opcode, count in work.opcodes.items():
        pipe = work.code.pipe(opcode)
        if pipe == "lsu":
            _, width = work.code.access(opcode) or ("", 4)
            bytes_a_cycle = 64 if work.code.target.startswith("gfx") else 128
            cycles[pipe] += count * max(cost[pipe], work.code.warp_size * width / bytes_a_cycle)  # type: ignore[assignment]
        elif pipe in cost:
            cycles[pipe] += count * cost[pipe]  # type: ignore[assignment]
            if pipe == "multiply":  # runs in half of the FMA lanes
                cycles["fma"] += count * cost["fma"]  # type: ignore[assignment]
        if "issue" in cost:
            cycles["issue"] += count * cost["issue"]  # type: ignore[assignment]
    return dict(cycles)


@dataclass(frozen=True)
class Prediction:
    """Seconds of one launch on a device, by what would bound it; `pipe` is the busiest one, "issue" the schedulers."""

    memory: float
    issue: float
    pipe: str


def predict(work: Work, device: Device) -> Prediction:
    """What bounds a launch: its bytes at full bandwidth, or the busiest pipe where most programs run."""
    programs = -(-work.launch.programs // device.multiprocessors)
    cycles = pipe_cycles(work)
    pipe = max(cycles, key=lambda name: cycles[name])
    return Prediction(
        memory=sum(work.moved.values()) / device.bandwidth,
        issue=cycles[pipe] * work.warps * programs / device.clock,
        pipe=pipe,
    )
