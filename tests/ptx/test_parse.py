"""PTX text as a program."""

import pytest
from emulator.parse import PTXError, parse

TEXT = """
.visible .entry some_kernel(
	.param .align 64 .b8 some_kernel_param_0[128],
	.param .u32 some_kernel_param_1,
	.param .u64 .ptr .global .align 1 some_kernel_param_2
)
.reqntid 64
{
	.reg .pred %p<3>;
	.reg .b32 %r<4>;
	.loc 1 2 3
$L__BB0_1:                              // a comment; with a semicolon
	@!%p1 st.shared.v2.b32 [%r1+8], {%r2, %r3};   // another
	{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%r1], %r2;
	@!complete bra.uni waitLoop;
	}
	{
	.reg .pred complete;
	waitLoop:
	@complete bra waitLoop; ret;
	}
}
"""


def test_parameters_registers_and_instructions_are_read() -> None:
    program = parse(TEXT)
    assert [parameter.size for parameter in program.parameters] == [128, 4, 8]
    assert program.threads == 64
    store = program.code[0]
    assert (store.op, store.args, store.guard, store.unless) == (
        "st.shared.v2.b32",
        ["[%r1+8]", "{%r2, %r3}"],
        "%p1",
        True,
    )
    assert TEXT.split("\n")[store.line - 1].strip().startswith("@!%p1 st.shared")
    assert store.registers == {program.registers[name][1] for name in ("%r1", "%r2", "%r3")}
    assert program.labels["$L__BB0_1"] == 0


def test_names_in_braces_are_apart() -> None:
    program = parse(TEXT)
    first, second = (ins for ins in program.code if ins.parts[0] == "bra")
    assert first.guard != second.guard
    assert program.labels[first.args[0]] == 1
    assert program.labels[second.args[0]] == 3


def test_text_without_a_kernel_is_an_error() -> None:
    with pytest.raises(PTXError, match=r"no \.entry"):
        parse(".version 8.7")
