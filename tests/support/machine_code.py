"""What a cubin, an ELF file of CUDA machine code, says of its kernels: registers, stack, instructions of loops."""

import re
import struct
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

# Attributes of the section .nv.info: a format byte, the attribute's byte, and for this format a size and the value.
_SIZED_VALUE, _REGISTERS, _FRAME_BYTES = 0x04, 0x2F, 0x11
_NO_BITS = 8  # type of a section without content


class Resources(NamedTuple):
    registers: int  # per thread
    stack_bytes: int  # per thread; spilled registers lie there


class Instruction(NamedTuple):
    operation: str
    operands: str


def resources(cubin: bytes) -> dict[str, Resources]:
    """Of each kernel, by its symbol."""
    sections = _sections(cubin)
    symbols, names = sections[".symtab"], sections[".strtab"]
    values: dict[int, dict[int, int]] = {}
    info, at = sections[".nv.info"], 0
    while at < len(info):
        kind, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if kind == _SIZED_VALUE:
            if attribute in (_REGISTERS, _FRAME_BYTES):
                symbol, value = struct.unpack_from("<II", info, at)
                values.setdefault(attribute, {})[symbol] = value
            at += size
    return {
        _text(names, struct.unpack_from("<I", symbols, 24 * symbol)[0]): Resources(
            registers, values[_FRAME_BYTES][symbol]
        )
        for symbol, registers in values[_REGISTERS].items()
    }


def loops(cubin: bytes, symbol: str) -> list[list[Instruction]]:
    """The instructions of each loop of a kernel, those of the loops in it included."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    result = []
    for line in disassembly(cubin, symbol).splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", line):
            code.append(Instruction(found[1], found[2]))
            target = re.search(r"\((\.L_x_\d+)\)", found[2]) if found[1].startswith("BRA") else None
            if target and target[1] in labels:  # backwards
                result.append(code[labels[target[1]] :])
    return [loop for loop in result if len(loop) > 1]


def disassembly(cubin: bytes, symbol: str) -> str:
    """The text of a kernel's instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [nvdisasm(), "--print-code", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[symbol]


@cache
def nvdisasm() -> Path:
    """NVIDIA's disassembler, out of the wheel nvidia-cuda-nvdisasm."""
    return Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "nvdisasm")


def _sections(elf: bytes) -> dict[str, bytes]:
    """Of a 64-bit ELF file, by name."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    count, names_index = struct.unpack_from("<HH", elf, 60)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + 64 * i) for i in range(count)]
    contents = [b"" if kind == _NO_BITS else elf[at : at + size] for _, kind, _, _, at, size in headers]
    return {_text(contents[names_index], header[0]): content for header, content in zip(headers, contents, strict=True)}


def _text(strings: bytes, at: int) -> str:
    return strings[at : strings.index(b"\0", at)].decode()
