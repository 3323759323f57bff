"""What compilers make of the kernels, read without a GPU: launches recorded, compiled for a target, counted.

    recording -> compiling (sass, amd_isa, control_flow) -> work (ttir) -> devices

`recorded()` collects what the launchers would launch, `compile_launch` turns a launch into `MachineCode` for a target,
`work_of` multiplies that by trips and programs, `predict` compares the result with a device. Triton decides when a
kernel is decorated whether it is interpreted, so none of this works in a process with TRITON_INTERPRET set.
"""
