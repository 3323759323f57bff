"""The table of machine code: how code is read and counted, on code whose counts are known, and the committed page.

What is compiled is compiled by `bench/machine_code.py` in a process of its own: this one runs kernels interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from machine import amd_isa
from machine import devices
from machine import sass
from machine.compiling import MachineCode
from machine.control_flow import Instruction
from machine.control_flow import Listing
from machine.control_flow import Loop
from machine.control_flow import Segment
from machine.control_flow import segments
from machine.recording import OtherPasses
from machine.ttir import Program
from machine.work import Work
from machine.work import turns_of
from page import COMMAND
from page import PAGE
from page import sources
from page import sources_of

ROOT = Path(__file__).parent.parent


def test_the_committed_page_was_made_of_these_sources() -> None:
    made_of, now = sources_of(PAGE.read_text()), sources(ROOT)
    stale = [name for name in {**made_of, **now} if made_of.get(name) != now.get(name)]
    assert not stale, f"run {COMMAND}: {stale} changed since docs/machine-code.md was generated"


def test_sources_are_the_kernels_that_the_cases_launch_and_what_these_import() -> None:
    """By what Python imports for the cases. Not attention's: no case compiles them."""
    imported = json.loads(run("-c", "import json, sys, launches; print(json.dumps([*sys.modules]))"))
    modules = {f"kernels/{name.rpartition('.')[2]}.py" for name in imported if name.startswith("autodropout.kernels.")}
    named = {name for name in sources(ROOT) if name.startswith("kernels/")}
    assert named <= modules
    assert {name for name in modules - named if name.endswith("_triton.py")} == set()
    assert "kernels/attention_triton.py" not in named


def tables() -> dict[str, list[list[dict[str, str]]]]:
    """The tables of the page by heading, each a list of lines, each a dict from the name of the column."""
    found: dict[str, list[list[dict[str, str]]]] = {}
    heading, names = "", []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif not line.startswith("|"):
            names = []
        elif not names:
            names = cells
            found.setdefault(heading, []).append([])
        elif not cells[0].startswith("---"):
            found[heading][-1].append(dict(zip(names, cells, strict=True)))
    return found


def cases() -> list[tuple[str, dict[str, str]]]:
    """The lines of the page about ops on activations, with the op."""
    return [(op, line) for op, found in tables().items() for line in found[0] if "activation" in line]


def test_page_nothing_is_spilled() -> None:
    kernels = [line for found in tables().values() for table in found for line in table if "spills" in line]
    assert len(kernels) >= 50
    assert [line for line in kernels if line["spills"] != "0"] == []


def test_page_bounds() -> None:
    """Memory bounds everything on an H100, and the tiled op on a B200."""
    assert len(cases()) >= 60
    by_issue = {
        name: {(op, line["activation"], line["layout"], line["dtype"]) for op, line in cases() if line[name][0] == "I"}
        for name in ("H100", "B200")
    }
    assert by_issue["H100"] == set()
    assert {case for case in by_issue["B200"] if case[0] == "tiled"} == set()


# SASS instructions per element on sm_90, at most: what was reached, with Triton 3.8. An H100 executes 10 in the time of
# a byte (132 processors, 4 x 32 lanes, 1.98 GHz, 3.35 TB/s), so that memory bounds what takes fewer than 10 times its
# bytes: 60 in bf16 for a batch norm or a sum, 100 for a backward, 40 for a softmax (docs/fused.md).
MOST_INSTRUCTIONS = {
    ("batch norm + tiled + ReLU", "128x160x32x32"): 44.1,
    ("batch norm + tiled + ReLU", "32x2048x7x7"): 58,
    ("batch norm + tiled + ReLU, backward", "128x160x32x32"): 66.1,
    ("batch norm + tiled + ReLU, backward", "32x2048x7x7"): 94,
    ("residual + drop path", "128x160x32x32"): 12,
    ("residual + drop path", "32x2048x7x7"): 12,
    ("residual + tiled", "128x160x32x32"): 28,
    ("residual + tiled", "32x2048x7x7"): 48,
    ("softmax + token", "60x10x150x300"): 36,
    ("softmax + token", "16x16x384x768"): 35,
    ("softmax + token, backward", "60x10x150x300"): 45,
    ("softmax + token, backward", "16x16x384x768"): 43,
}


def test_page_instructions_of_the_fused_neighbours() -> None:
    checked = set()
    for op, line in cases():
        if (op, line["activation"]) in MOST_INSTRUCTIONS:
            most = MOST_INSTRUCTIONS[op, line["activation"]]
            assert float(line["sm_90"]) <= most, (op, line)
            checked.add((op, line["activation"], line["layout"], line["dtype"]))
    assert len(checked) == 2 * (2 * 8 + 4)


def test_page_one_read_and_one_write() -> None:
    """A second pass would be half more; bits of masks, placements, sums and masked lanes are less."""
    for op, line in cases():
        moved, needed = map(float, line["bytes"].split(" / "))
        assert needed - 0.005 <= moved <= 1.4 * needed, (op, line)


def test_page_tiled_accesses_are_as_wide_as_memory_allows() -> None:
    checked = 0
    for op, line in cases():
        if op in ("tiled", "copy"):
            _, c, height, width = map(int, line["activation"].split("x"))
            run = (c if line["layout"] == "channels_last" else height * width) * {"fp32": 4, "bf16": 2}[line["dtype"]]
            widest = next(size for size in (16, 8, 4, 2) if run % size == 0)
            assert min(map(int, line["width"].split("/"))) >= widest, (op, line)
            checked += 1
    assert checked >= 34


# ---- control flow ---------------------------------------------------------------------------------------------------


def listing(*lines: str) -> Listing:
    """One instruction a line, `label:` in front of what it names, `-> label` behind what goes there."""
    instructions, labels = [], {}
    for line in lines:
        name, colon, rest = line.rpartition(":")
        if colon:
            labels[name] = len(instructions)
        opcode, _, target = rest.strip().partition(" -> ")
        flows = {"branch": "branch", "jump": "jump", "call": "call", "exit": "end", "exit?": "may end"}
        instructions.append(Instruction(opcode, (len(instructions),), flows.get(opcode, "next"), target))
    return Listing(instructions, labels)


def counts(code: Listing) -> dict[int, dict[str, int]]:
    found, _ = segments(code)
    return {segment.loop: dict(segment.opcodes) for segment in found}


def test_instructions_are_counted_by_loop() -> None:
    code = listing("a", "outer: b", "inner: c", "c", "branch -> inner", "d", "branch -> outer", "e", "exit")
    _, loops = segments(code)
    assert [loop.parent for loop in loops] == [-1, 0]
    assert counts(code) == {-1: {"a": 1, "e": 1, "exit": 1}, 0: {"b": 1, "d": 1, "branch": 1}, 1: {"c": 2, "branch": 1}}
    assert dict(loops[1].lines) == {2: 1, 3: 1, 4: 1}


def test_both_sides_of_a_branch_count_and_what_is_never_reached_does_not() -> None:
    code = listing("branch -> else", "a", "jump -> end", "else: b", "end: exit", "trap: jump -> trap", "never")
    assert counts(code) == {-1: {"branch": 1, "a": 1, "jump": 1, "b": 1, "exit": 1}}


def test_code_goes_on_behind_an_exit_that_not_all_threads_take() -> None:
    assert counts(listing("exit?", "a", "exit", "never")) == {-1: {"exit?": 1, "a": 1, "exit": 1}}


def test_what_is_called_counts_at_every_call_with_the_loops_of_the_call() -> None:
    code = listing(
        "call -> f", "loop: call -> f", "branch -> loop", "exit", "f: a", "within: b", "branch -> within", "exit"
    )
    found, loops = segments(code)
    assert sorted(loop.parent for loop in loops) == [-1, -1, 0]
    total: Counter[tuple[int, str]] = Counter()
    for segment in found:
        depth, loop = 0, segment.loop
        while loop != -1:
            depth, loop = depth + 1, loops[loop].parent
        for opcode, count in segment.opcodes.items():
            total[depth, opcode] += count
    assert total[0, "a"] == total[1, "a"] == 1
    assert total[1, "b"] == total[2, "b"] == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("branch -> middle", "head: a", "middle: b", "branch -> head", "exit"), "second entry"),
        (("f: call -> f", "exit"), "calls itself"),
        (("jump -> nowhere",), "no label"),
    ],
)
def test_what_cannot_be_counted_is_refused(lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segments(listing(*lines))


# ---- machine code ---------------------------------------------------------------------------------------------------

SASS = """
.text.some_kernel:
\t//## File "/there/some.py", line 7
        /*0000*/                   LDC R1, c[0x0][0x28] ;
\t//## File "/else/where.py", line 3 inlined at "/there/some.py", line 9
\t//## File "/there/some.py", line 9
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0030*/               @P0 EXIT ;
        /*0040*/                   BRA P2, `(.L_x_1) ;
        /*0050*/                   BRA.U `(.L_x_2) ;
.L_x_2:
        /*0060*/                   NOP;
        /*0070*/                   CALL.REL.NOINC `($f$) ;
        /*0080*/                   EXIT ;
$f$:
        /*0090*/                   RET.REL.NODEC R4 `(some_kernel) ;
"""


def test_sass_is_read() -> None:
    code = sass.read(SASS, "some.py")
    assert [(one.opcode, one.flow, one.label) for one in code.instructions] == [
        ("LDC", "next", ""),
        ("BRA", "branch", ".L_x_1"),
        ("LDG.E.128", "next", ""),
        ("EXIT", "may end", ""),
        ("BRA", "branch", ".L_x_1"),
        ("BRA.U", "jump", ".L_x_2"),
        ("CALL.REL.NOINC", "call", "$f$"),
        ("EXIT", "end", ""),
        ("RET.REL.NODEC", "end", ""),
    ]
    assert code.labels == {".text.some_kernel": 0, ".L_x_1": 3, ".L_x_2": 6, "$f$": 8}
    assert code.instructions[0].lines == (7,)
    assert set(code.instructions[1].lines) == {9}


NEVER_BACK = """
.L_x_0:
        /*0000*/                   FADD R1, R1, R2 ;
        /*0010*/              @!P0 CALL.REL.NOINC `(.L_x_1) ;
        /*0020*/                   BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   CALL.REL.NOINC `(.L_x_2) ;
        /*0040*/                   FMUL R1, R1, R2 ;
.L_x_2:
        /*0050*/                   EXIT ;
"""


def test_a_call_that_never_returns_is_a_jump() -> None:
    code = sass.read(NEVER_BACK, "some.py")
    assert [one.flow for one in code.instructions] == ["next", "branch", "jump", "jump", "next", "end"]
    assert counts(code) == {-1: {"CALL.REL.NOINC": 1, "EXIT": 1}, 0: {"FADD": 1, "CALL.REL.NOINC": 1, "BRA": 1}}


@pytest.mark.parametrize(
    ("opcode", "access", "pipe"),
    [
        ("LDG.E.128", ("load", 16), "lsu"),
        ("STG.E.64", ("store", 8), "lsu"),
        ("LDG.E.U8.CONSTANT", ("load", 1), "lsu"),
        ("ATOMG.E.ADD.64.STRONG.GPU", ("atomic", 8), "lsu"),
        ("LDL", ("spill", 4), "lsu"),
        ("STS", ("shared", 4), "lsu"),
        ("LDC.64", None, "none"),
        ("IADD3.X", None, "alu"),
        ("IMAD.WIDE.U32", None, "multiply"),
        ("UIADD3", None, "uniform"),
        ("FMUL", None, "fma"),
        ("F2FP.BF16.F32.PACK_AB", None, "alu"),
        ("F2F.F32.F64", None, "xu"),
    ],
)
def test_what_an_instruction_of_nvidia_takes(opcode: str, access: tuple[str, int] | None, pipe: str) -> None:
    assert sass.access(opcode) == access
    assert sass.pipe(opcode) == pipe


AMD = """
some_kernel:                            ; @some_kernel
\t.loc\t1 76 0 prologue_end             ; some.py:76:0
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:                                ; %loop
\t.loc\t1 20 7                          ; where.py:20:7 @[ some.py:80:3 ]
\tv_add_u32_e32 v0, 1, v0               ; a comment
\ts_cbranch_scc1 .LBB0_1
\ts_nop 0
\ts_endpgm
\t.section\t.rodata
\ts_trap 2
"""


def test_amd_isa_is_read() -> None:
    code = amd_isa.read(AMD, "some.py")
    assert [(one.opcode, one.flow, one.label, one.lines) for one in code.instructions] == [
        ("s_load_dwordx2", "next", "", (76,)),
        ("v_add_u32_e32", "next", "", (80,)),
        ("s_cbranch_scc1", "branch", ".LBB0_1", (80,)),
        ("s_endpgm", "end", "", (80,)),
    ]


@pytest.mark.parametrize(
    ("opcode", "access", "pipe"),
    [
        ("global_load_dwordx4", ("load", 16), "lsu"),
        ("buffer_store_short_d16_hi", ("store", 2), "lsu"),
        ("global_load_ubyte", ("load", 1), "lsu"),
        ("global_atomic_add_x2", ("atomic", 8), "lsu"),
        ("scratch_load_dword", ("spill", 4), "lsu"),
        ("ds_read_b64", ("shared", 8), "lsu"),
        ("s_load_dwordx4", None, "lsu"),
        ("v_mul_f32_e32", None, "vector"),
        ("s_add_i32", None, "scalar"),
    ],
)
def test_what_an_instruction_of_amd_takes(opcode: str, access: tuple[str, int] | None, pipe: str) -> None:
    assert amd_isa.access(opcode) == access
    assert amd_isa.pipe(opcode) == pipe


TTIR = """
#loc = loc("/there/some.py":1:1)
#loc2 = loc("/there/some.py":5:9)
#loc3 = loc("x"(#loc2))
#loc4 = loc(callsite(#loc3 at #loc))
module {
  tt.func public @some_kernel(%x_ptr: !tt.ptr<bf16> loc(#loc), %n: i32 loc(#loc)) attributes {noinline = false} {
    %step = arith.constant 64 : i32 loc(#loc)
    %pid = tt.get_program_id x : i32 loc(#loc)
    %first = arith.muli %pid, %step : i32 loc(#loc)
    %0 = tt.splat %x_ptr : !tt.ptr<bf16> -> tensor<4x16x!tt.ptr<bf16>> loc(#loc)
    %1 = scf.for %i = %first to %n step %step iter_args(%at = %0) -> (tensor<4x16x!tt.ptr<bf16>>)  : i32 {
      %2 = tt.addptr %at, %i : tensor<4x16x!tt.ptr<bf16>>, tensor<4x16xi32> loc(#loc4)
      %3 = tt.load %2, %mask, %other : tensor<4x16x!tt.ptr<bf16>> loc(#loc4)
      scf.yield %2 : tensor<4x16x!tt.ptr<bf16>> loc(#loc2)
    } loc(#loc2)
    %4 = tt.atomic_rmw add, acq_rel, gpu, %total_ptr, %5, %true : (!tt.ptr<i64>, i64, i1) -> i64 loc(#loc)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""


def test_ttir_is_read() -> None:
    program = Program(TTIR, "some.py")
    load, atomic = program.accesses
    assert (load.kind, load.argument, load.lanes, load.size, load.loop) == ("load", "x_ptr", 64, 2, 0)
    assert (atomic.kind, atomic.argument, atomic.lanes, atomic.size, atomic.loop) == ("atomic", "total_ptr", 1, 8, -1)
    assert set(program.loops[0].lines) == {1, 5}
    # Programs 0, 1 and 2 go from 0, 64 and 128 to 130 in steps of 64: 3, 2 and 1 turns.
    assert program.turns({"n": 130}, (3,)) == [2.0]
    assert program.turns({}, (3,)) == [None]


# ---- devices --------------------------------------------------------------------------------------------------------


def work(target: str, registers: int, shared: int, opcodes: dict[str, int], warps: int = 4, programs: int = 1) -> Work:
    warp = 64 if target.startswith("gfx") else 32
    code = MachineCode(
        target, warp, warps * warp, registers, 0, 0, shared, [Segment(-1, Counter(opcodes))], [Loop(-1)], ""
    )
    launch: Any = SimpleNamespace(programs=programs)
    return Work(launch, code, Counter(opcodes), {}, {("x", "load"): 3.35e6}, 0)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "resident"),
    [
        ("sm_90", 32, 0, 4, 64),  # 65536 / (32 * 32) = 64
        ("sm_90", 33, 0, 4, 48),  # 33 * 32 rounded up to 1280: 51 warps, whole fours of them
        ("sm_90", 255, 0, 4, 8),
        ("sm_90", 16, 0, 1, 32),  # 32 programs at most
        ("sm_90", 32, 56 * 1024, 4, 16),  # 57 KB each with the reserved one: 4 of 228 KB
        ("sm_120", 40, 0, 4, 48),
        ("gfx942", 64, 0, 4, 32),  # 512 / 64 = 8 a SIMD
        ("gfx942", 65, 0, 4, 28),  # 72 each: 7 a SIMD
        ("gfx942", 64, 17 * 1024, 4, 12),
    ],
)
def test_resident_warps(target: str, registers: int, shared: int, warps: int, resident: int) -> None:
    assert devices.resident_warps(work(target, registers, shared, {}, warps)) == resident


def test_prediction() -> None:
    """133 programs of 4 warps on 132 SMs: two on one of them."""
    found = devices.predict(
        work("sm_90", 32, 0, {"LOP3.LUT": 100, "FMUL": 20, "LDG.E.128": 2}, 4, 133), devices.DEVICES["H100"]
    )
    assert found.memory == pytest.approx(1e-6)
    # Integers: 100 instructions of 32 lanes through 64 lanes are 50 cycles; the schedulers need 122 / 4.
    assert found.pipe == "alu"
    assert found.issue == pytest.approx(50 * 4 * 2 / 1.98e9)
    # Products of integers and of floats share lanes: 60 products take 30 cycles, and with 80 floats 35 in all.
    assert devices.pipe_cycles(work("sm_90", 32, 0, {"IMAD": 60, "FFMA": 80})) == {
        "multiply": pytest.approx(30),
        "fma": pytest.approx(35),
        "issue": pytest.approx(35),
    }


def test_turns_of_loops_that_only_the_compiler_knows() -> None:
    """A loop through the lanes turns once a lane, one that tries an atomic again does not."""
    loops, program = [Loop(-1, Counter({9: 1})), Loop(-1, Counter({9: 1}))], Program("", "some.py")
    inside = [Segment(0, Counter({"global_atomic_cmpswap": 1})), Segment(1, Counter({"v_readlane_b32": 1}))]
    code = MachineCode("gfx942", 64, 256, 32, 0, 0, 0, inside, loops, "")
    assert turns_of(code, program, []) == ([1.0, 64.0], 2)


def test_what_pytorch_itself_moves_is_counted() -> None:
    with OtherPasses() as passes:
        x = torch.empty(10, 10, dtype=torch.float32, device="meta")
        torch.zeros(100, dtype=torch.int32, device="meta").view(torch.uint8)
        assert (passes.loaded, passes.stored) == (0, 400)
        x.copy_(x.t())
        assert (passes.loaded, passes.stored) == (400, 800)
        x.t().contiguous()
        assert (passes.loaded, passes.stored) == (800, 1200)


# ---- compiled -------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
import torch, triton
import triton.language as tl
from machine.compiling import compile_launch
from machine.recording import meta, missing_internals, recorded
from machine.work import work_of

@triton.jit
def sums_kernel(x_ptr, y_ptr, rows, columns, BLOCK: tl.constexpr):
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        total = tl.zeros((BLOCK,), tl.float32)  # here
        for first in range(0, columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            total += tl.load(x_ptr + row * columns + column, mask=column < columns, other=0.0)
        tl.store(y_ptr + row, tl.sum(total))

if missing_internals() is not None:
    print(json.dumps(missing_internals()))
    sys.exit()
found = []
for columns in (64 * 256, 65 * 256):
    with recorded() as launches:
        sums_kernel[(8,)](meta(20, columns, dtype=torch.float32), meta(20, dtype=torch.float32), 20, columns, BLOCK=256)
    for target in ("sm_90", "gfx942"):
        work = work_of(launches[0], compile_launch(launches[0], target))
        found.append((columns, target, work.asked, work.lane_loops, {k: v for (k, _), v in work.moved.items()}))
print(json.dumps(found))
"""


def run(*command: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "bench")
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_turns_of_loops_that_compilers_unroll(tmp_path: Path) -> None:
    """20 rows over 8 programs, 64 or 65 blocks a row: what is asked for follows from the program's text.

    A compiler that unrolls makes a second loop, or straight code, for the turns that are left over: they count in full,
    at most 3 turns beside 64 for what ptxas does, which is 4 at once.
    """
    # What is kept of an earlier run has the lines of that run's file; another comment makes it another kernel.
    (tmp_path / "script.py").write_text(SCRIPT.replace("# here", f"# {tmp_path}"))
    found = json.loads(run(tmp_path / "script.py"))
    if isinstance(found, str):
        pytest.skip(found)
    assert len(found) == 4
    for columns, target, asked, lane_loops, moved in found:
        exact = 20 * columns * 4
        assert exact <= asked["load"] <= exact * (1 if target == "gfx942" else 1 + 3 / 64), (columns, target)
        assert lane_loops == 0
        assert moved == {"x_ptr": exact, "y_ptr": 20 * 4}


@pytest.mark.slow
def test_table_of_one_case(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    out = run(ROOT / "bench/machine_code.py", "--only", "tiled 128x160x32x32 contiguous bf16", "--target", "sm_90",
              "--target", "gfx942", "--jobs", "1", "--json", file)  # fmt: skip
    assert max(map(len, out.splitlines())) <= 80
    nvidia, amd = (row for row in json.loads(file.read_text()) if row["op"] == "tiled")
    assert [nvidia["target"], amd["target"]] == ["sm_90", "gfx942"]
    assert set(nvidia["devices"]) == {"H100", "H200"}
    assert set(amd["devices"]) == {"MI300X"}
    for row in (nvidia, amd):
        assert row["minimum_loaded"] == row["minimum_stored"] == 2
        # Placements are written and read, below 32 bytes a map of 1,024 cells, and the table is read once.
        assert 2 <= row["stored"] <= 2 + 32 / 1024
        assert 2 <= row["loaded"] <= 2 + 32 / 1024
        assert row["spills"] == row["scratch"] == 0
        assert row["store_width"] == 16
        assert all(kernel["lane_loops"] <= 1 for kernel in row["kernels"])
        assert row["instructions"] == pytest.approx(sum(kernel["instructions"] for kernel in row["kernels"]))
        assert all(device["bound"] == "memory" for device in row["devices"].values())
