"""Reading ptxas's log and machine code, on texts written by hand."""

import pytest

from benchmarks.static.machine_code import hides_bias, listing, read_log, read_product

LOG = """
ptxas info    : Compiling entry function 'linear_act_fwd_kernel' for 'sm_90a'
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient
ptxas info    : Function properties for linear_act_fwd_kernel
    {stack} bytes stack frame, 0 bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 161 registers, used 1 barriers
"""


def test_read_log_gives_registers_spills_and_warnings_of_wgmma() -> None:
    found = read_log(LOG.format(stack=8, loads=4))
    assert (found["registers"], found["spills"]) == (161, 12)
    assert [message[:7] for message in found["ptxas"]] == ["(C7515)"]
    clean = read_log(LOG.format(stack=0, loads=0).replace("(C7515)", "(C8000)"))
    assert (clean["spills"], clean["ptxas"]) == (0, [])


@pytest.mark.parametrize("log", ["", "Used 161 registers", "0 bytes stack frame, 0 bytes spill stores"])
def test_read_log_refuses_a_log_without_registers_or_spills(log: str) -> None:
    """Else no spills would be seen where none are mentioned."""
    with pytest.raises(AssertionError):
        read_log(log)


def machine_code(*lines: str) -> str:
    """A disassembler's listing of instructions and labels."""
    return "".join(
        f"{line}\n" if line.startswith(".L") else f"        /*{16 * i:04x}*/                   {line} ;\n"
        for i, line in enumerate(lines)
    )


LOAD = "@!P0 LDG.E.U16 R5, desc[UR4][R2.64]"
TILE = "UTMALDG.2D [UR8], [UR4]"
STORE = "STS.U16 [R7], R5"
MULTIPLY, WAIT = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
BACK, EXIT = "@P2 BRA `(.L_x_1)", "EXIT"


def product(*lines: str) -> dict[str, object]:
    return read_product(*listing(machine_code(*lines)), "HGMMA")


def test_waits_are_counted_in_the_loop_over_k_and_instructions_after_it() -> None:
    loop = (".L_x_1:", "SYNCS R1", MULTIPLY, MULTIPLY, WAIT, BACK)
    found = product(LOAD, TILE, *loop, WAIT, STORE, EXIT, ".L_x_2:", "SYNCS R1")
    assert (found["products"], found["waits"], found["epilogue"]) == (2, 1, 3)
    serialized = product(LOAD, TILE, ".L_x_1:", MULTIPLY, WAIT, MULTIPLY, WAIT, BACK, STORE, EXIT)
    assert (serialized["products"], serialized["waits"]) == (2, 2)
    assert product(LOAD, STORE, EXIT)["products"] == 0


@pytest.mark.parametrize(
    ("lines", "order", "hidden"),
    [
        ((LOAD, TILE, MULTIPLY, STORE), "load bias, load tile, multiply, use bias", True),
        ((TILE, LOAD, MULTIPLY, STORE), "load tile, load bias, multiply, use bias", True),
        ((LOAD, STORE, TILE, MULTIPLY), "load bias, use bias, load tile, multiply", False),
        ((TILE, MULTIPLY, LOAD, STORE), "load tile, multiply, load bias, use bias", False),
        (
            (LOAD, "LDGSTS.E.128 [R9], desc[UR4][R2.64]", MULTIPLY, STORE),
            "load bias, load tile, multiply, use bias",
            True,
        ),
        (("LDG.E.64 R4, desc[UR4][R2.64]", STORE, TILE, MULTIPLY), "load bias, use bias, load tile, multiply", False),
        ((LOAD, "IADD3 R55, UR5, R15, R6", TILE, MULTIPLY), "load bias, load tile, multiply", False),
        ((TILE, MULTIPLY), "load tile, multiply", False),
    ],
)
def test_machine_code_shows_whether_the_bias_is_waited_for_before_the_first_tile(
    lines: tuple[str, ...], order: str, hidden: bool
) -> None:
    found = product(*lines, EXIT)
    assert found["order"] == order
    assert hides_bias(order) == hidden
